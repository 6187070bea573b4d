"""Offline data as flat arrays: loading, episodes, returns, normalisation."""

from __future__ import annotations

import copy
import hashlib
import importlib
import json
import os
import re
import sys
from dataclasses import dataclass
from typing import NamedTuple

import gymnasium
import h5py
import minari
import numpy as np
from gymnasium.envs.registration import EnvSpec

from common.checks import InputError

# The Gymnasium task that a D4RL file's name stands for: the data's rewards, in newer physics.
D4RL_ENVIRONMENTS = {
    "halfcheetah": "HalfCheetah-v4",
    "hopper": "Hopper-v4",
    "walker2d": "Walker2d-v4",
}
# D4RL's random and expert returns: score = 100 (return - random) / (expert - random).
D4RL_REFERENCES = {
    "halfcheetah": (-280.178953, 12135.0),
    "hopper": (-20.272305, 3234.3),
    "walker2d": (1.629008, 4592.3),
    "antmaze": (0.0, 1.0),
}


@dataclass(frozen=True)
class Dataset:
    """N transitions in the order they were recorded, and what is known about their origin."""

    observations: np.ndarray  # float32 [N, O]
    actions: np.ndarray  # float32 [N, A], in [-1, 1]
    rewards: np.ndarray  # float32 [N], as recorded
    next_observations: np.ndarray  # float32 [N, O], true successors
    terminals: np.ndarray  # bool [N], the task ended here (never a time limit)
    episode_ends: np.ndarray  # bool [N], the last row of its episode
    env: EnvSpec
    reference: tuple[float, float] | None  # (random, expert) return; None: scores are raw returns
    source: str  # for messages

    @property
    def returns(self) -> np.ndarray:
        """Undiscounted return of every episode, in recorded rewards: float64 [episodes]."""
        return episode_returns(self.rewards, self.episode_ends)

    def score(self, episode_return):
        """Normalised score, 100 = expert; the return itself where no reference exists."""
        if self.reference is None:
            return episode_return
        low, high = self.reference
        return 100 * (episode_return - low) / (high - low)


class Normalizer(NamedTuple):
    """Observation standardisation: one object for training data, evaluation and checkpoint."""

    mean: np.ndarray  # [O]
    std: np.ndarray  # [O]

    def __call__(self, observations: np.ndarray) -> np.ndarray:
        return ((observations - self.mean) / self.std).astype(np.float32)


def fit_normalizer(observations: np.ndarray, enabled: bool = True) -> Normalizer:
    """(mean, std + 1e-3) over the rows of [N, O]; the identity if not enabled or without rows."""
    width = observations.shape[1]
    if not enabled or not len(observations):
        return Normalizer(np.zeros(width, np.float32), np.ones(width, np.float32))
    mean = observations.mean(axis=0, dtype=np.float64)
    std = observations.std(axis=0, dtype=np.float64) + 1e-3
    return Normalizer(mean.astype(np.float32), std.astype(np.float32))


def flatten_observations(observations) -> np.ndarray:
    """Observations as [rows, O]; dictionaries are joined in alphabetical order of their keys."""
    if isinstance(observations, dict):
        parts = [flatten_observations(observations[key]) for key in sorted(observations)]
        return np.concatenate(parts, axis=1)
    return np.reshape(observations, (len(observations), -1))


def fingerprint(arrays) -> str:
    """A short hash of the shapes and bits of some arrays: the same data gives the same text."""
    digest = hashlib.blake2b(digest_size=8)
    for array in arrays:
        if array is not None:
            array = np.ascontiguousarray(array)
            digest.update(f"{array.dtype}{array.shape}".encode())
            digest.update(array)
    return digest.hexdigest()


# -------------------------------------------------------------------------------------- episodes


def find_episode_ends(
    observations, next_observations, terminals, timeouts=None, max_steps=None, tolerance=1e-6
) -> np.ndarray:
    """Last row of every episode, bool [N].

    That is a row which is terminal, timed out, further than `tolerance` from the row that follows,
    the `max_steps`-th of its episode, or the last row of all.
    """
    ends = terminals.astype(bool).copy()
    if timeouts is not None:
        ends |= timeouts.astype(bool)
    ends[:-1] |= np.linalg.norm(next_observations[:-1] - observations[1:], axis=1) > tolerance
    ends[-1] = True
    if max_steps:
        first = np.flatnonzero(np.r_[True, ends[:-1]])
        position = np.arange(len(ends)) - np.repeat(first, np.diff(np.r_[first, len(ends)]))
        ends |= (position + 1) % max_steps == 0
    return ends


def episode_lengths(ends: np.ndarray) -> np.ndarray:
    """Number of rows of every episode, int [episodes]."""
    return np.diff(np.flatnonzero(ends), prepend=-1)


def episode_returns(rewards: np.ndarray, ends: np.ndarray) -> np.ndarray:
    """Undiscounted return of every episode, float64 [episodes]."""
    if not len(rewards):
        return np.zeros(0)
    return np.add.reduceat(rewards.astype(np.float64), np.r_[0, np.flatnonzero(ends)[:-1] + 1])


def best_episodes(rewards: np.ndarray, ends: np.ndarray, count: int) -> np.ndarray:
    """Rows of the `count` episodes of highest return, best episode first: int [rows]."""
    order = np.argsort(-episode_returns(rewards, ends), kind="stable")[:count]
    last = np.flatnonzero(ends)
    first = np.r_[0, last[:-1] + 1]
    return np.concatenate([np.arange(first[i], last[i] + 1) for i in order])


# --------------------------------------------------------------------------------------- loading


def load_dataset(name: str | None, path: str | None = None, env: str | None = None) -> Dataset:
    """Loads `demo`, a D4RL task name, `d4rl:<HDF5 file>` or a local Minari id.

    `path` reads that HDF5 file whatever the name; `env` replaces the Gymnasium id that the name or
    the data's metadata gives. With `env` alone there are no transitions, for training online.
    Raises InputError when the data cannot be used.
    """
    name = name or path
    if not (name or env):
        raise InputError(
            "no data set and no environment: give --config.dataset=<local Minari id> or "
            "=d4rl:<file>, or --config.env=<id>"
        )
    if env:
        _env_spec(env, name)
    if not name:
        return _no_data(env)
    if path or name.startswith("d4rl:"):
        return _load_hdf5(path or name.removeprefix("d4rl:"), name, env)
    if re.fullmatch(r"(halfcheetah|hopper|walker2d|antmaze)-[a-z-]+-v\d", name):
        raise InputError(
            f"{name} is a D4RL task: give its HDF5 file with --config.dataset_path=<file>"
        )
    if name == "demo":
        from common.demo import demo_dataset_id

        name = demo_dataset_id()
    return _load_minari(name, env)


def _load_hdf5(path: str, name: str, env: str | None) -> Dataset:
    path = os.path.expanduser(path)
    if not os.path.isfile(path):
        raise InputError(
            f"no file {path}: give the data set's HDF5 file with --config.dataset_path=<file> "
            "or --config.dataset=d4rl:<file>"
        )
    try:
        file = h5py.File(path, "r")
    except OSError as error:
        raise InputError(
            f"{path} is not a readable HDF5 file ({error}): download it again"
        ) from None
    needed = ("observations", "actions", "rewards", "terminals")
    with file:
        missing = [key for key in needed if not isinstance(file.get(key), h5py.Dataset)]
        if missing:
            raise InputError(
                f"{path} has no key '{missing[0]}', only {', '.join(sorted(file)) or 'nothing'}: "
                "a D4RL file needs observations, actions, rewards and terminals"
            )
        columns = {
            key: file[key][()] for key in (*needed, "timeouts", "next_observations") if key in file
        }
        metadata = dict(file.attrs)
    task = os.path.basename(name.removeprefix("d4rl:")).lower().replace("_", "-")
    known = [env_id for prefix, env_id in D4RL_ENVIRONMENTS.items() if task.startswith(prefix)]
    spec = _env_spec(env or metadata.get("env_id") or (known[0] if known else None), path)
    if spec.id == metadata.get("env_id"):
        spec.kwargs |= json.loads(metadata.get("env_kwargs", "{}"))
    reference = _stored_reference(metadata) or D4RL_REFERENCES.get(task.split("-")[0])
    return _from_columns(path, spec, reference or D4RL_REFERENCES.get(spec.name.lower()), **columns)


def _load_minari(dataset_id: str, env: str | None) -> Dataset:
    try:
        stored = minari.load_dataset(dataset_id, download=False)
    except (FileNotFoundError, ValueError) as error:
        raise InputError(
            f"no local Minari data set '{dataset_id}' ({str(error).splitlines()[0]}): "
            f"`minari list local` shows what there is, `minari download {dataset_id}` fetches it; "
            "D4RL files are named --config.dataset=d4rl:<file>"
        ) from None
    metadata = stored.storage.metadata
    if env:
        spec = _env_spec(env, dataset_id)
    elif metadata.get("eval_env_spec"):
        spec = EnvSpec.from_json(metadata["eval_env_spec"])
    else:
        spec = stored.env_spec or _env_spec(None, dataset_id)
    reference = _stored_reference(metadata) or D4RL_REFERENCES.get(spec.name.lower())
    parts = {
        k: []
        for k in (
            "observations",
            "next_observations",
            "actions",
            "rewards",
            "terminals",
            "timeouts",
        )
    }
    for episode in stored.iterate_episodes():
        observations = flatten_observations(episode.observations)  # one row more than actions
        parts["observations"].append(observations[:-1])
        parts["next_observations"].append(observations[1:])
        parts["actions"].append(episode.actions)
        parts["rewards"].append(episode.rewards)
        parts["terminals"].append(episode.terminations)
        # An episode cut short in the recording ends all the same.
        parts["timeouts"].append(np.r_[episode.truncations[:-1], not episode.terminations[-1]])
    columns = {key: np.concatenate(part) for key, part in parts.items()}
    return _from_columns(dataset_id, spec, reference, **columns)


def _no_data(env: str) -> Dataset:
    spec = _env_spec(env, env)
    made = make_env(spec)
    widths = [gymnasium.spaces.flatdim(s) for s in (made.observation_space, made.action_space)]
    observations, actions = (np.zeros((0, width), np.float32) for width in widths)
    made.close()
    return Dataset(
        observations=observations,
        actions=actions,
        rewards=np.zeros(0, np.float32),
        next_observations=observations,
        terminals=np.zeros(0, bool),
        episode_ends=np.zeros(0, bool),
        env=spec,
        reference=D4RL_REFERENCES.get(spec.name.lower()),
        source=spec.id,
    )


def make_env(spec: EnvSpec, make=gymnasium.make, **kwargs):
    """The environment, or with make=gymnasium.make_vec several; raises InputError if it fails."""
    try:
        return make(spec, **kwargs)
    except (gymnasium.error.Error, ImportError) as error:
        reason = " ".join(str(error).split()).rstrip(".")
        raise InputError(
            f"cannot make environment {spec.id} ({reason}): install what it needs"
        ) from None


def _from_columns(source, spec, reference, **columns) -> Dataset:
    _check_columns(source, columns)
    observations, actions = columns["observations"], columns["actions"]
    rewards, terminals = columns["rewards"], columns["terminals"]
    timeouts, next_observations = columns.get("timeouts"), columns.get("next_observations")
    terminals = terminals.astype(bool)
    timeouts = np.zeros_like(terminals) if timeouts is None else timeouts.astype(bool)
    known = next_observations is not None
    if not known:  # a row's successor is the next row, where its episode goes on
        next_observations = np.concatenate([observations[1:], observations[-1:]])
    ends = find_episode_ends(
        observations, next_observations, terminals, timeouts, spec.max_episode_steps
    )
    keep = slice(None) if known else np.flatnonzero(~ends | terminals)
    episode = np.cumsum(np.r_[0, ends[:-1]])[keep]
    if not len(episode):
        raise InputError(f"{source} holds no transition whose successor is known: record episodes")
    return Dataset(
        observations=observations[keep].astype(np.float32),
        actions=actions[keep].astype(np.float32),
        rewards=rewards[keep].astype(np.float32),
        next_observations=next_observations[keep].astype(np.float32),
        terminals=terminals[keep],
        episode_ends=np.r_[episode[1:] != episode[:-1], True],
        env=spec,
        reference=reference,
        source=source,
    )


def _env_spec(env: str | None, source: str) -> EnvSpec:
    if env is None:
        raise InputError(
            f"{source} does not name its environment: give the Gymnasium id with --config.env=<id>"
        )
    module, _, env_id = env.rpartition(":")
    try:
        if module:
            importlib.import_module(module)  # registers its environments
        return copy.deepcopy(gymnasium.spec(env_id))
    except (gymnasium.error.Error, ImportError) as error:
        reason = str(error).splitlines()[0].rstrip(".")
        raise InputError(
            f"unknown environment '{env}' ({reason}): give a Gymnasium id with --config.env=<id>, "
            "or --config.env=<module>:<id> with the module that registers it"
        ) from None


def _stored_reference(metadata) -> tuple[float, float] | None:
    """(random, expert) return from a file's own metadata."""
    if metadata.get("ref_min_score") is None or metadata.get("ref_max_score") is None:
        return None
    return float(metadata["ref_min_score"]), float(metadata["ref_max_score"])


def _check_columns(source, columns) -> None:
    observations, actions = columns["observations"], columns["actions"]
    for key, column in columns.items():
        axes = 1 if key in ("rewards", "terminals", "timeouts") else 2
        if column.ndim != axes or column.dtype.kind not in "biuf":
            raise InputError(
                f"{source}: '{key}' has type {column.dtype} and shape {column.shape}: it needs "
                f"numbers, {'one a row' if axes == 1 else 'rows by dimensions'}"
            )
        if len(column) != len(observations):
            raise InputError(
                f"{source}: '{key}' has {len(column)} rows but 'observations' has "
                f"{len(observations)}: every key needs one row a transition"
            )
        if not column.size:
            raise InputError(f"{source}: '{key}' is empty: the data needs at least one transition")
        if key == "next_observations" and column.shape != observations.shape:
            raise InputError(
                f"{source}: 'next_observations' has shape {column.shape} but 'observations' "
                f"{observations.shape}: they need the same dimensions"
            )
        bad = ~np.isfinite(column.reshape(len(column), -1)).all(axis=1)
        if bad.any():
            raise InputError(
                f"{source}: '{key}' is not finite at row {bad.argmax()} ({bad.sum()} such rows): "
                "remove those episodes from the data"
            )
    outside = np.abs(actions).max(axis=1) > 1 + 1e-6
    if outside.any():
        row = outside.argmax()
        raise InputError(
            f"{source}: 'actions' reaches {np.abs(actions[row]).max():g} at row {row} "
            f"({outside.sum()} rows outside [-1, 1]): rescale or clip the actions to [-1, 1]"
        )


def cached_labels(cache_dir: str, name: list, make) -> np.ndarray:
    """The bool array that make() returns, kept in `cache_dir` under what it depends on, `name`."""
    path = os.path.join(os.path.expanduser(cache_dir), "-".join(map(str, name)) + ".npy")
    try:
        labels = np.load(path, allow_pickle=False)
        if labels.dtype == bool:
            return labels
    except (OSError, ValueError, EOFError):
        pass  # not there, or broken: made again
    labels = make()
    try:
        os.makedirs(os.path.dirname(path), exist_ok=True)
        with open(f"{path}.{os.getpid()}", "wb") as file:
            np.save(file, labels)
        os.replace(file.name, path)
    except OSError as error:
        print(f"warning: labels are not kept in {cache_dir} ({error.strerror})", file=sys.stderr)
    return labels
