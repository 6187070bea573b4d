"""Offline data as flat arrays: episodes, returns, normalisation."""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import sys
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from gymnasium.envs.registration import EnvSpec

from common.stopping import note_saved

CHUNK = 16_384  # rows worked on at once: what is computed needs no copy of a column


@dataclass
class Dataset:
    """N transitions in the order they were recorded, and what is known about their origin."""

    observations: np.ndarray | None  # float32 [N, O]
    actions: np.ndarray | None  # float32 [N, A], in [-1, 1]
    rewards: np.ndarray  # float32 [N], as recorded
    next_observations: np.ndarray | None  # float32 [N, O], true successors
    terminals: np.ndarray  # bool [N], the task ended here (never a time limit)
    episode_ends: np.ndarray  # bool [N], the last row of its episode
    env: EnvSpec
    reference: tuple[float, float] | None  # (random, expert) return; None: scores are raw returns
    source: str  # for messages
    scattered: float = 0.0  # share of rows whose successor is not the next row, unaccountably
    physics: str = "stock"  # d4rl: with the capsules of older MuJoCo builds
    observation_keys: tuple[str, ...] = ()  # of dictionary observations; empty: see environments

    def __post_init__(self):
        self.widths = {key: getattr(self, key).shape[1] for key in ("observations", "actions")}
        rows = len(self.actions)
        at_bound = (np.abs(self.actions[i]).max(axis=1) > 0.999 for i in chunks(rows))
        self.saturated = sum(map(np.sum, at_bound)) / max(rows, 1)  # share with an action at ±1

    def __str__(self):
        """What a run is told to be of."""
        scores = "raw returns, for there are no reference scores"
        if self.reference is not None:
            scores = "0 at a return of {:g} and 100 at {:g}".format(*self.reference)
        name = os.path.basename(self.source) if os.path.isfile(self.source) else self.source
        return (
            f"{name}: {len(self.rewards):,} transitions in {len(self.returns):,} episodes; "
            f"evaluated in {self.env.id} with {self.physics} physics; scores are {scores}"
        )

    def take(self, column: str) -> np.ndarray:
        """Hands a column over and forgets it, so that the data are held once."""
        taken = getattr(self, column)
        setattr(self, column, None)
        return taken

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

    def apply_to(self, observations: np.ndarray) -> np.ndarray:
        """The same in place, of float32 [N, O]; returns that array."""
        np.subtract(observations, self.mean, out=observations)
        return np.divide(observations, self.std, out=observations)


def fit_normalizer(observations: np.ndarray, enabled: bool = True) -> Normalizer:
    """(mean, std + 1e-3) over the rows of [N, O]; the identity if not enabled or without rows."""
    rows, width = observations.shape
    if not enabled or not rows:
        return Normalizer(np.zeros(width, np.float32), np.ones(width, np.float32))
    mean = observations.mean(axis=0, dtype=np.float64)
    square = sum(np.square(observations[i] - mean).sum(axis=0) for i in chunks(rows))
    std = np.sqrt(square / rows) + 1e-3
    return Normalizer(mean.astype(np.float32), std.astype(np.float32))


class Fingerprint:
    """A short hash of the shapes and bits of arrays, one after the other."""

    def __init__(self):
        self.digest = hashlib.blake2b(digest_size=8)

    def add(self, array: np.ndarray) -> np.ndarray:
        """Takes note of an array and returns it."""
        self.digest.update(f"{array.dtype}{array.shape}".encode())
        self.digest.update(np.ascontiguousarray(array))
        return array

    def text(self) -> str:
        """The same arrays in the same order give the same 16 hexadecimal digits."""
        return self.digest.hexdigest()


def chunks(rows: int):
    """Slices that make up `rows` rows, in order."""
    return (slice(start, min(start + CHUNK, rows)) for start in range(0, rows, CHUNK))


# -------------------------------------------------------------------------------------- episodes


def find_episode_ends(
    observations, next_observations, terminals, timeouts=None, max_steps=None, tolerance=1e-6
) -> np.ndarray:
    """Last row of every episode, bool [N].

    That is a row which is terminal, timed out, whose successor, if known, is further than
    `tolerance` from the next row, the `max_steps`-th of its episode, or the last row of all.
    """
    ends = terminals.astype(bool).copy()
    if timeouts is not None:
        ends |= timeouts.astype(bool)
    if next_observations is not None:
        for i in chunks(len(ends) - 1):
            following = observations[i.start + 1 : i.stop + 1]
            ends[i] |= np.linalg.norm(next_observations[i] - following, axis=1) > tolerance
    ends[-1] = True
    return ends | at_step_limit(ends, max_steps)


def at_step_limit(ends: np.ndarray, max_steps: int | None) -> np.ndarray:
    """Rows that are the `max_steps`-th of their episode, or a multiple: bool [N]."""
    if not max_steps:
        return np.zeros_like(ends)
    first = np.flatnonzero(np.r_[True, ends[:-1]])
    position = np.arange(len(ends)) - np.repeat(first, np.diff(np.r_[first, len(ends)]))
    return (position + 1) % max_steps == 0


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


def cached_labels(cache_dir: str, name: list, shape: tuple, make) -> np.ndarray:
    """The bool array of that shape that make(folder) returns, kept in `cache_dir`.

    name: what it depends on. folder: where make may keep what it has done so far; None where
    `cache_dir` cannot be written.
    Of several processes that ask for the same labels, one makes them and the others wait.
    """
    path = os.path.join(os.path.expanduser(cache_dir), "-".join(map(str, name)) + ".npz")
    if (labels := _load_labels(path, shape)) is not None:
        return labels
    try:  # before the work
        os.makedirs(os.path.dirname(path), exist_ok=True)
        lock = open(f"{path}.lock", "w")  # stays, as another process may wait for it
        wait_for(lock, "makes these labels")
    except OSError as error:
        _warn(cache_dir, error)
        return make(None)
    with lock:
        if (labels := _load_labels(path, shape)) is None:
            labels = make(f"{path}.unfinished")
            try:
                with open(f"{path}.new", "wb") as file:
                    np.savez(file, trusted=labels)  # with a checksum, which np.save does not keep
                os.replace(f"{path}.new", path)
            except OSError as error:  # they are there all the same
                _warn(cache_dir, error)
            else:
                shutil.rmtree(f"{path}.unfinished", ignore_errors=True)
                note_saved("the labels of D̂")
    return labels


def _warn(cache_dir, error):
    print(
        f"warning: labels are not kept, for --config.cache_dir={cache_dir} cannot be written "
        f"({error.strerror or error})",
        file=sys.stderr,
    )


def wait_for(lock, does: str) -> None:
    """Locks an open file; says so when there is another process to wait for, and what that does."""
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        print(f"waits for the process that {does} ({lock.name})", file=sys.stderr, flush=True)
        fcntl.flock(lock, fcntl.LOCK_EX)


def _load_labels(path, shape):
    """None where they are not, or broken: to be made again."""
    try:
        with np.load(path, allow_pickle=False) as file:
            labels = file["trusted"]
    except Exception:  # whatever NumPy and zipfile make of it
        return None
    return labels if labels.dtype == bool and labels.shape == shape else None
