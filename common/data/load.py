"""From the settings to a data set that is checked, complete and standardised."""

import numpy as np

from common.data import d4rl
from common.data.dataset import Dataset, find_episode_ends, fingerprint, fit_normalizer
from common.data.download import fetch
from common.data.hdf5 import NEEDED, Recording, read_hdf5
from common.envs.d4rl_physics import d4rl_physics, is_known
from common.envs.make import check_env, env_spec
from common.run.errors import InputError


def load_dataset(config) -> Dataset:
    """The data set of the settings; prints one line about it. Raises InputError.

    Reads config.dataset (demo | demo-sparse | a D4RL task | d4rl:<HDF5 file> | a Minari id),
    dataset_path (the HDF5 file to read instead), env (the Gymnasium id, in place of the data's own;
    without a data set there are no transitions), physics (d4rl | stock; None means d4rl for D4RL's
    tasks), observation_keys, d4rl_rows, normalize_observations, selection and cache_dir.
    """
    keys = tuple(config.observation_keys.replace(",", " ").split())
    recording, task = _read(config, keys)
    spec, physics, scattered = recording.env, "stock", 0.0
    if config.physics == "d4rl" or (config.physics is None and task and is_known(spec)):
        spec, physics = d4rl_physics(spec), "d4rl"
    if recording.columns:
        columns, scattered = _transitions(recording, config)
        episode = columns["observations"][: columns["episode_ends"].argmax() + 1]
        keys, *_ = check_env(spec, recording.source, keys, episode, columns["actions"].shape[1])
    else:
        keys, *widths = check_env(spec, recording.source, keys)
        obs, actions = (np.zeros((0, width), np.float32) for width in widths)
        columns = {"observations": obs, "next_observations": obs, "actions": actions}
        columns |= dict.fromkeys(("terminals", "episode_ends"), np.zeros(0, bool))
        columns["rewards"] = np.zeros(0, np.float32)
    normalizer = fit_normalizer(columns["observations"], config.normalize_observations)
    for key in ("observations", "next_observations"):
        columns[key] = normalizer(columns[key])
    dataset = Dataset(
        **columns,
        env=spec,
        source=recording.source,
        normalizer=normalizer,
        fingerprint=fingerprint(*columns.values()),
        reference=recording.reference or d4rl.reference_of(spec.name),
        physics=physics,
        observation_keys=keys,
        scattered=scattered,
    )
    print(dataset, flush=True)
    return dataset


def _read(config, keys) -> tuple[Recording, d4rl.Task | None]:
    """What the named source holds, and D4RL's task if it is one; no columns without a source."""
    name, path, env = config.dataset or "", config.dataset_path, config.env
    if env or not (name or path):
        spec = env_spec(env, name or path or "a run without --config.dataset")
    stem = name.removeprefix("d4rl:")
    is_file = stem != name or stem.endswith((".hdf5", ".h5"))
    if is_file and stem not in d4rl.TASKS:
        path = path or stem
    task = d4rl.find_task(stem, path)
    if path or task:
        return read_hdf5(path or fetch(task), env, task, config.d4rl_rows), task
    if not name:
        return Recording(spec.id, spec, None, {}), None
    from common.data.demo import DEMOS, demo_dataset_id  # Minari is imported only if needed
    from common.data.minari import read_minari

    dataset_id = demo_dataset_id(name) if name in DEMOS else name
    return read_minari(dataset_id, env, keys, config.d4rl_rows, config.cache_dir), None


def _transitions(recording: Recording, config) -> tuple[dict[str, np.ndarray], float]:
    """The rows with known successors; the share of all rows that the next row does not follow."""
    columns, source, scattered = recording.columns, recording.source, 0.0
    ends, keep = select_rows(columns, config.d4rl_rows, recording.env.max_episode_steps)
    successors = columns.get("next_observations")
    if not keep.any():
        raise InputError(f"{source} holds no transition with a known successor: record episodes")
    if successors is not None and len(ends) > 1:
        gaps = ends & ~columns["terminals"] & ~columns.get("timeouts", np.False_)
        scattered = float(gaps[:-1].mean())
    columns = {key: columns[key] for key in NEEDED}
    if not keep.all() or successors is None:
        kept = np.flatnonzero(keep)
        episode = np.cumsum(np.r_[0, ends[:-1]])[kept]
        ends = np.r_[episode[1:] != episode[:-1], True]
        successors = columns["observations"][np.minimum(kept + 1, len(keep) - 1)]
        columns = {key: column[kept] for key, column in columns.items()}
    rewards = columns["rewards"]
    if config.selection == "success" and not (rewards == 1).any():
        raise InputError(
            f"{source}: no reward is 1, by which selection=success recognises success (they lie "
            f"between {rewards.min():g} and {rewards.max():g}): give rewards of 1 for success and "
            "0 elsewhere, or choose another --config.selection"
        )
    return columns | {"next_observations": successors, "episode_ends": ends}, scattered


def select_rows(columns, rows: str, max_steps: int | None) -> tuple[np.ndarray, np.ndarray]:
    """Where episodes end, and which rows are transitions: bool [N] each.

    rows=all: every row with a recorded successor; if none are recorded, every row that the next row
    follows or where the task ended. rows=qlearning: D4RL's qlearning_dataset, which always takes
    the next row and drops the last row of all and those that end by time-out. max_steps: the
    environment's time limit, used if no time-outs are recorded.
    """
    terminals, timeouts = columns["terminals"], columns.get("timeouts")
    successors = columns.get("next_observations")
    if timeouts is not None and timeouts.any():
        max_steps = None  # the recording may have had another limit
    ends = find_episode_ends(columns["observations"], successors, terminals, timeouts, max_steps)
    if rows == "qlearning":
        cut = timeouts if timeouts is not None else ends & ~terminals
        return ends, ~cut & (np.arange(len(cut)) < len(cut) - 1)
    return ends, np.ones_like(ends) if successors is not None else ~ends | terminals
