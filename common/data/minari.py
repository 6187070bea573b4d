"""Minari data sets as D4RL's columns."""

import json
from pathlib import Path

import minari
import numpy as np
from gymnasium.envs.registration import WrapperSpec
from minari.storage.datasets_root_dir import get_dataset_path

from common.data.d4rl import reference_of
from common.data.hdf5 import REPLACE, open_hdf5, own_spec, read_columns
from common.envs.make import check_spaces, env_spec, flatten
from common.run.errors import InputError, explained


def read_minari(dataset_id: str, env: str | None, keys: tuple) -> tuple:
    """Environment, reference scores and columns of a data set, downloaded if it is missing.

    env, keys: the user's choice. Raises InputError if it cannot be used.
    """
    local_id = dataset_id.partition("://")[2].partition("/")[2] or dataset_id
    path = get_dataset_path(local_id)
    fix = "see `minari list local` and `minari list remote`; D4RL's tasks have names like "
    fix += "hopper-medium-v2, and files are given as --config.dataset=d4rl:<file>"
    with explained(f"no Minari data set '{dataset_id}' here, nor could it be downloaded", fix):
        if not path.is_dir():
            print(f"downloading {dataset_id} into {path}, once", flush=True)
            minari.download_dataset(dataset_id)
    with explained(f"Minari data set '{dataset_id}' in {path} is not readable", REPLACE):
        metadata = json.loads((path / "data" / "metadata.json").read_text(encoding="utf-8"))
        if not metadata.keys() >= {"observation_space", "action_space"}:
            raise KeyError("no spaces")  # Minari would make the environment that the file names
        named = json.loads(metadata.get("eval_env_spec") or metadata.get("env_spec") or "null")
        if env or not named:
            spec = env_spec(env, dataset_id)
        else:
            wrappers = named.get("additional_wrappers") or ()
            wrappers = [WrapperSpec(x["name"], x["entry_point"], x.get("kwargs")) for x in wrappers]
            spec = own_spec(dataset_id, named["id"], named.get("kwargs"), wrappers)
            spec.max_episode_steps = named.get("max_episode_steps", spec.max_episode_steps)
        stored = minari.load_dataset(local_id)
        keys = check_spaces(dataset_id, stored.observation_space, stored.action_space, keys)
        print(f"reading {stored.total_episodes:,} episodes of {dataset_id}", flush=True)
        columns = read_columns(dataset_id, _join_episodes(dataset_id, stored, keys))
        return spec, reference_of(metadata, spec.id), columns


def _join_episodes(source, stored, keys) -> dict[str, np.ndarray]:
    """D4RL's columns of a Minari data set, with true successors."""
    for path in Path(stored.storage.data_path).glob("*.hdf5"):
        open_hdf5(path).close()
    columns = {}
    for episode in stored.iterate_episodes():
        given, steps = episode.observations, len(episode.rewards)
        observed = {len(given[key]) for key in keys} if keys else {len(given)}
        actions = len(episode.actions)
        others = {actions, len(episode.terminations), len(episode.truncations)}
        if observed != {steps + 1} or others != {steps} or not steps:
            found = f"{min(observed)} observations and {actions} actions for {steps} rewards"
            fix = "record it with one observation more than rewards, without empty episodes"
            raise InputError(f"{source}: episode {episode.id} has {found}: {fix}")
        observations = flatten(given, keys, (steps + 1,))
        parts = {
            "observations": observations[:-1],
            "next_observations": observations[1:],
            "actions": episode.actions.reshape(steps, -1),
            "rewards": episode.rewards,
            "terminals": episode.terminations,
            # An episode that the recording cut short ends too.
            "timeouts": np.r_[episode.truncations[:-1], not episode.terminations[-1]],
        }
        for key, part in parts.items():
            columns.setdefault(key, []).append(part)
    return {key: np.concatenate(parts).astype(np.float32) for key, parts in columns.items()}
