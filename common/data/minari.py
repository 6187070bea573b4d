"""Minari data sets as D4RL's columns."""

import hashlib
import json
import sys
from pathlib import Path

import h5py
import minari
import numpy as np
from gymnasium.envs.registration import EnvSpec, WrapperSpec
from minari.storage.datasets_root_dir import get_dataset_path

from common.data.cache import cached
from common.data.hdf5 import Recording, check_contained, own_spec, read_columns, read_reference
from common.envs.make import check_spaces, env_spec, flatten, reason_of
from common.run.errors import InputError

# Wrappers of a recording that evaluation leaves out: they change the reward, or they normalise by
# statistics that the data set does not hold.
LEFT_OUT = ("NormalizeReward", "NormalizeObservation", "TransformReward", "ClipReward")


def read_minari(dataset_id: str, env: str | None, keys, rows: str, cache_dir: str) -> Recording:
    """Reads a Minari data set, downloaded if it is missing; `keys` as in flatten."""
    local_id = dataset_id.partition("://")[2].partition("/")[2] or dataset_id
    path = get_dataset_path(local_id)
    try:
        if not path.is_dir():
            minari.download_dataset(dataset_id)
    except Exception as error:  # Minari and its remotes raise many kinds
        raise InputError(
            f"no Minari data set '{dataset_id}', neither here nor at its remote "
            f"({reason_of(error)}): see `minari list local` and `minari list remote`; D4RL's tasks "
            "have names like hopper-medium-v2, and files are given as --config.dataset=d4rl:<file>"
        ) from None
    try:
        stored = minari.load_dataset(local_id)
        metadata = stored.storage.metadata
        named = metadata.get("eval_env_spec") or metadata.get("env_spec")
        spec = env_spec(env, dataset_id) if env or not named else _read_spec(named, dataset_id)
        check_spaces(dataset_id, stored.observation_space, stored.action_space, keys)
        reference = read_reference(metadata)
        # Episodes read slowly: a flat copy is kept until the files change.
        files = sorted(Path(stored.storage.data_path).rglob("*"))
        versions = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files]
        digest = hashlib.blake2b(f"{keys}{versions}".encode(), digest_size=8).hexdigest()
        name = f"minari/{local_id.replace('/', '-')}-{digest}"
        join = lambda: _join_episodes(dataset_id, stored, keys)
        columns = cached(cache_dir, name, join, "reads these episodes")
        return Recording(dataset_id, spec, reference, read_columns(dataset_id, columns, rows))
    except InputError:
        raise
    except Exception as error:  # Minari raises many kinds for data in another form than its own
        raise InputError(
            f"Minari data set '{dataset_id}' in {path} is broken ({type(error).__name__}: "
            f"{reason_of(error)}): fix it, or delete it to download or record it again"
        ) from None


def _read_spec(text: str, source: str) -> EnvSpec:
    """The environment of a data set, without the wrappers that evaluation leaves out."""
    named = json.loads(text)
    wrappers = [
        WrapperSpec(wrapper["name"], wrapper["entry_point"], wrapper.get("kwargs"))
        for wrapper in named.get("additional_wrappers") or ()
    ]
    spec = own_spec(source, named["id"], named.get("kwargs"), wrappers)
    spec.additional_wrappers = tuple(x for x in wrappers if x.name not in LEFT_OUT)
    spec.max_episode_steps = named.get("max_episode_steps", spec.max_episode_steps)
    if left_out := ", ".join(x.name for x in wrappers if x.name in LEFT_OUT):
        message = f"{source} was recorded through {left_out}, which evaluation leaves out"
        print(f"warning: {message}", file=sys.stderr)
    return spec


def _join_episodes(source, stored, keys) -> dict[str, np.ndarray]:
    """D4RL's columns of a Minari data set, with true successors."""
    for path in Path(stored.storage.data_path).glob("*.hdf5"):
        with h5py.File(path, "r") as file:
            check_contained(source, file)
    columns = {}
    for episode in stored.iterate_episodes():
        steps = len(episode.rewards)
        observations = flatten(episode.observations, keys, (steps + 1,))
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
