"""Offline data as flat arrays: episodes, returns, normalisation."""

import hashlib
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from gymnasium.envs.registration import EnvSpec


class Normalizer(NamedTuple):
    """Standardises observations: the same for training data, evaluation and checkpoint."""

    mean: np.ndarray  # float32 [O]
    std: np.ndarray  # float32 [O]

    def __call__(self, observations: np.ndarray) -> np.ndarray:
        return ((observations - self.mean) / self.std).astype(np.float32)


def fit_normalizer(observations: np.ndarray, enabled: bool = True) -> Normalizer:
    """(mean, std + 1e-3) over the rows of [N, O]; the identity if disabled or without rows."""
    mean, std = np.zeros(observations.shape[1]), np.ones(observations.shape[1])
    if enabled and len(observations):
        mean = observations.mean(axis=0, dtype=np.float64)
        std = observations.std(axis=0, dtype=np.float64) + 1e-3
    return Normalizer(mean.astype(np.float32), std.astype(np.float32))


@dataclass(frozen=True)
class Dataset:
    """N transitions in the order of their recording, and what is known about their origin."""

    observations: np.ndarray  # float32 [N, O], standardised
    actions: np.ndarray  # float32 [N, A], in [-1, 1]
    rewards: np.ndarray  # float32 [N], as recorded
    next_observations: np.ndarray  # float32 [N, O], true successors, standardised
    terminals: np.ndarray  # bool [N], the task ended here (never a time limit)
    episode_ends: np.ndarray  # bool [N], the last row of its episode
    env: EnvSpec  # the environment of evaluation and online training
    source: str  # for messages
    normalizer: Normalizer
    fingerprint: str  # 16 hexadecimal digits, of all columns as they stand here
    reference: tuple[float, float] | None = None  # (random, expert) return, if there is one
    unit: str = "return"  # of a score, or "normalised score", or "success rate in %"
    physics: str = "stock"  # d4rl: with the capsules of older MuJoCo builds
    observation_keys: tuple[str, ...] | None = None  # of dictionary observations, in column order
    rescaled: str = ""  # the environment's bounds of actions, unless they are -1 and 1

    def __str__(self):
        scores = "raw returns, because there are no reference scores"
        if self.unit == "success rate in %":
            scores = "success rates in per cent"
        elif self.reference:
            scores = "0 at a return of {:g} and 100 at {:g}".format(*self.reference)
        keys = ", ".join(self.observation_keys or ())
        changes = f" and observations joined as {keys}" if keys else ""
        changes += f"; actions rescaled from {self.rescaled}" if self.rescaled else ""
        return (
            f"{self.source}: {len(self.rewards):,} transitions in {len(self.returns):,} episodes; "
            f"evaluated in {self.env.id} with {self.physics} physics{changes}; scores are {scores}"
        )

    @property
    def returns(self) -> np.ndarray:
        """Undiscounted return of every episode, in recorded rewards: float64 [episodes]."""
        if not len(self.rewards):
            return np.zeros(0)
        first = np.r_[0, np.flatnonzero(self.episode_ends)[:-1] + 1]
        return np.add.reduceat(self.rewards.astype(np.float64), first)

    @property
    def behaviour(self) -> float:
        """The mean score of the data's own episodes; NaN without episodes, and for play data."""
        return float(np.mean(self.score(self.returns))) if len(self.rewards) else np.nan

    def score(self, episode_return, success=np.nan):
        """Normalised score, 100 = expert; the success rate in %, or the return itself."""
        if self.unit == "success rate in %":
            return 100.0 * success
        if self.unit == "return":
            return episode_return
        low, high = self.reference
        return 100 * (episode_return - low) / (high - low)

    def spread(self, row: dict) -> float:
        """The standard deviation of the scores in one evaluation, a row of scores.csv."""
        if self.unit == "success rate in %":
            return 100 * (row["success_rate"] * (1 - row["success_rate"])) ** 0.5
        return self.score(row["return_std"]) - self.score(0.0)


def fingerprint(*arrays: np.ndarray) -> str:
    """16 hexadecimal digits that depend on the shapes and all bits of the arrays."""
    digest = hashlib.blake2b(digest_size=8)
    for array in arrays:
        digest.update(f"{array.dtype}{array.shape}".encode())
        digest.update(np.ascontiguousarray(array))
    return digest.hexdigest()


def find_episode_ends(obs, successors, ended, max_steps=None, tolerance=1e-6) -> np.ndarray:
    """Last row of every episode, bool [N].

    A row ends its episode if it has `ended` there, if its recorded successor differs from the next
    row by more than `tolerance`, if it is the episode's `max_steps`-th row, or if no row follows.
    """
    ends = ended.astype(bool)
    if successors is not None:
        gap = np.linalg.norm(successors[:-1] - obs[1:], axis=1)
        ends[:-1] |= gap > tolerance
    ends[-1:] = True
    if max_steps:
        first = np.flatnonzero(np.r_[True, ends[:-1]])
        position = np.arange(len(ends)) - np.repeat(first, np.diff(np.r_[first, len(ends)]))
        ends |= (position + 1) % max_steps == 0
    return ends
