"""From the settings to a data set that is checked, complete and standardised."""

import os

import numpy as np

from common.data import d4rl
from common.data.dataset import Dataset, find_episode_ends, fingerprint, fit_normalizer
from common.data.hdf5 import NEEDED, read_hdf5
from common.envs.d4rl_physics import MODELS, d4rl_physics
from common.envs.make import env_spec, try_env
from common.run.errors import InputError


def load_dataset(config) -> Dataset:
    """The data set of the settings; prints one line about it. Raises InputError.

    Reads the fields above `normalize_observations` in configs/*.py, and that one. Without a data
    set there are no transitions.
    """
    keys = tuple(config.observation_keys.replace(",", " ").split())
    source, task, (spec, reference, columns) = _read(config, keys)
    spec.max_episode_steps = config.max_episode_steps or spec.max_episode_steps
    old = d4rl_physics(spec)
    physics = config.physics or ("d4rl" if task and old else "stock")
    if physics == "d4rl" and not old:
        known = f"{', '.join(MODELS)} and AntMaze, not for {spec.id}"
        raise InputError(f"--config.physics=d4rl is for {known}: use --config.physics=stock")
    spec = old if physics == "d4rl" else spec
    found = columns and (columns["observations"].shape[1], columns["actions"].shape[1])
    keys, widths, bounds = try_env(spec, source, keys, found)
    if not columns:
        obs, actions = (np.zeros((0, width), np.float32) for width in widths)
        columns = {"observations": obs, "next_observations": obs, "actions": actions}
        columns |= {"rewards": np.zeros(0, np.float32), "terminals": np.zeros(0, bool)}
    columns["actions"], rescaled = _rescale(source, columns["actions"], bounds, spec.id)
    is_play, limit = (config.dataset or "").startswith("ogbench:"), spec.max_episode_steps
    columns = transitions(source, columns, config.d4rl_rows, limit, continues=is_play)
    reference = config.reference or reference
    unit = "success rate in %" if is_play else "normalised score" if reference else "return"
    normalizer = fit_normalizer(columns["observations"], config.normalize_observations)
    for key in ("observations", "next_observations"):
        columns[key] = normalizer(columns[key])
    dataset = Dataset(
        **columns,
        env=spec,
        source=source,
        normalizer=normalizer,
        fingerprint=fingerprint(*columns.values()),
        reference=reference,
        unit=unit,
        physics=physics,
        observation_keys=keys,
        rescaled=rescaled,
    )
    print(dataset, flush=True)
    return dataset


def _read(config, keys):
    """What is read, D4RL's task if it is one, and its (environment, reference scores, columns)."""
    name, path, env = config.dataset or "", config.dataset_path, config.env
    if not (name or path):
        spec = env_spec(env, "a run without --config.dataset")
        return spec.id, None, (spec, d4rl.reference_of({}, spec.id), None)
    stem = name.removeprefix("d4rl:")
    if stem not in d4rl.TASKS and (stem != name or stem.endswith((".hdf5", ".h5"))):
        path = path or stem
    if name.startswith("ogbench:"):
        from common.data.ogbench import read_ogbench  # late, or `python -m` would warn

        return read_ogbench(name.removeprefix("ogbench:"), path, env)
    task = d4rl.TASKS.get(stem) or d4rl.FILES.get(os.path.basename(path or ""))
    if path or task:
        path = path or d4rl.fetch(task)
        return path, task, read_hdf5(path, env, task)
    from common.data.demo import DEMOS, demo_dataset_id  # Minari is imported only if needed
    from common.data.minari import read_minari

    dataset_id = demo_dataset_id(name) if name in DEMOS else name
    return dataset_id, None, read_minari(dataset_id, env, keys)


def _rescale(source, actions, bounds, env_id) -> tuple[np.ndarray, str]:
    """Actions in [-1, 1], and from where: the environment's bounds [2, A], or "" for -1 and 1."""
    low, high = bounds
    text = " and ".join(dict.fromkeys(f"[{a:g}, {b:g}]" for a, b in bounds.T))
    slack = 1e-6 * np.abs(bounds).max(axis=0)  # float32 rounds
    outside = ((actions < low - slack) | (actions > high + slack)).any(axis=1)
    if outside.any():
        where = f"at row {outside.argmax()} ({outside.sum()} such rows)"
        fix = "fix those episodes, or name the data's own environment with --config.env=<id>"
        raise InputError(
            f"{source}: 'actions' is not in {text}, the bounds of {env_id}, {where}: {fix}"
        )
    if (low == -1).all() and (high == 1).all():
        return actions, ""
    return np.clip(2 * (actions - low) / (high - low) - 1, -1, 1).astype(np.float32), text


def transitions(source, columns, rows: str, max_steps: int | None, continues: bool = False):
    """The columns of all rows with known successors, with their successors and episode ends.

    rows=all: those with a recorded successor; if none are recorded, those that the next row follows
    or where the task ended. rows=qlearning: D4RL's qlearning_dataset, which takes the next row and
    drops time-outs and the last row. max_steps: the environment's limit, used if no time-outs are
    recorded. continues: whether episodes go on after the task has ended. Raises InputError.
    """
    obs, terminals = columns["observations"], columns["terminals"]
    timeouts = columns.get("timeouts", np.zeros_like(terminals))
    successors = columns.get("next_observations") if rows == "all" else None
    if timeouts.any():
        max_steps = None  # the recording may have had another limit
    ended = timeouts if continues else terminals | timeouts
    ends = find_episode_ends(obs, successors, ended, max_steps)
    found = {key: columns[key] for key in NEEDED}
    if successors is not None:
        return found | {"next_observations": successors, "episode_ends": ends}
    keep = ~ends | terminals
    if rows == "qlearning":
        keep = ~(timeouts if "timeouts" in columns else ends & ~terminals)
        keep[-1] = False
    kept = np.flatnonzero(keep)
    if not len(kept):
        raise InputError(f"{source} has no row with a known successor: record whole episodes")
    episode = np.cumsum(np.r_[0, ends[:-1]])[kept]
    found = {key: column[kept] for key, column in found.items()}
    found["next_observations"] = obs[np.minimum(kept + 1, len(ends) - 1)]
    found["episode_ends"] = np.r_[episode[1:] != episode[:-1], True]
    return found
