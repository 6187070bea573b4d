"""Environments: policy evaluation, and the transitions of online training."""

from __future__ import annotations

import sys
import time
from typing import NamedTuple

import gymnasium
import numpy as np

from common.checks import InputError
from common.dataset import Dataset
from common.environments import (
    flatten_observations,
    make_env,
    observation_keys,
    observation_width,
)
from common.stopping import stop, stop_is_due

SEED_BLOCK = 100_000  # of every training seed: environments of two of them never share a seed


class Episodes(NamedTuple):
    """One evaluation: E complete episodes of each of S seeds."""

    returns: np.ndarray  # [S, E], undiscounted, in the environment's rewards
    lengths: np.ndarray  # [S, E], steps
    success: (
        np.ndarray
    )  # [S, E], 1 where the environment reported success; NaN where it reports none


class Outcome(NamedTuple):
    """One step in the environment of each of S seeds."""

    reward: np.ndarray  # float32 [S], the environment's
    next_obs: np.ndarray  # float32 [S, O], standardised; at an episode's end still of that episode
    terminated: np.ndarray  # float32 [S], 1 where the task ended; a time limit is no end
    obs: np.ndarray  # float32 [S, O], to act in next: next_obs, or the start of a new episode


class Finished(NamedTuple):
    """An episode of online training."""

    step: int  # the environment step at which it ended
    slot: int  # its seed's place among the seeds
    episode_return: float
    length: int
    success: float  # NaN where the environment reports none


def make_envs(dataset: Dataset, num_envs: int):
    """The data set's environment, `num_envs` times, each started again as soon as it has ended.

    Returns it and the keys of its observations, None unless they are dictionaries.
    Raises InputError when it does not exist, or its spaces do not fit the data.
    """
    envs = make_env(
        dataset.env,
        gymnasium.make_vec,
        num_envs=num_envs,
        vectorization_mode="sync",
        vector_kwargs={"autoreset_mode": gymnasium.vector.AutoresetMode.SAME_STEP},
    )
    action_space = envs.single_action_space
    if not isinstance(action_space, gymnasium.spaces.Box):
        raise InputError(
            f"{dataset.env.id} takes actions of {action_space}, not a box in [-1, 1]: "
            "name an environment of continuous actions with --config.env=<id>"
        )
    space = envs.single_observation_space
    keys = observation_keys(space, dataset)
    widths = {
        "observations": observation_width(space, keys),
        "actions": observation_width(action_space),
    }
    for key, width in widths.items():
        if width != dataset.widths[key]:
            joined = f" ({', '.join(keys)})" if keys and key == "observations" else ""
            raise InputError(
                f"{dataset.source}: '{key}' has {dataset.widths[key]} dimensions but "
                f"{dataset.env.id} has {width}{joined}: name the data's own environment with "
                f"--config.env=<id>{', or the keys with --config.observation_keys' if keys else ''}"
            )
    if not (np.all(action_space.low == -1) and np.all(action_space.high == 1)):
        low, high = action_space.low.min(), action_space.high.max()
        raise InputError(
            f"{dataset.env.id} takes actions in [{low}, {high}] but policies act in [-1, 1]: "
            "wrap the environment in gymnasium.wrappers.RescaleAction"
        )
    return envs, keys


def record_success(success, infos, running, ended) -> None:
    """Writes what a step reported into `success` [slots], 1 once reached, of `running` slots.

    A slot that ended has been reset already; what its last step reported stands apart.
    """
    reports = ((infos, running & ~ended), (infos.get("final_info", {}), running & ended))
    for report, slots_meant in reports:
        if "success" in report:
            told = slots_meant & report.get("_success", True)
            success[told] = np.fmax(success[told], np.asarray(report["success"])[told])


class Evaluator:
    """Environments of their own, `episodes` for each seed, with the same starts every time.

    Raises InputError as make_envs does.
    """

    def __init__(self, dataset: Dataset, num_seeds: int, episodes: int, seed: int):
        self.shape = (num_seeds, episodes)
        # Seed s starts from the same states whether it is evaluated alone or among others.
        self.reset_seeds = [
            SEED_BLOCK * (seed + i) + j for i in range(num_seeds) for j in range(episodes)
        ]
        self.envs, self.keys = make_envs(dataset, num_seeds * episodes)
        dataset.observation_keys = self.keys or ()  # found by the data, which are given up later
        if self.keys and self.keys != tuple(sorted(self.envs.single_observation_space)):
            joined = ", ".join(self.keys)
            print(f"observations of {dataset.env.id} are joined as {joined}", file=sys.stderr)

    def __call__(self, act, actor_params, normalizer) -> Episodes:
        """Runs act(actor_params, [S, E, O]) -> [S, E, A] until every slot has had one episode.

        Raises Stopped when the run is told to stop meanwhile.
        """
        slots = len(self.reset_seeds)
        returns, lengths, success = np.zeros(slots), np.zeros(slots, int), np.full(slots, np.nan)
        running = np.ones(slots, bool)
        observations, _ = self.envs.reset(seed=self.reset_seeds)
        while running.any():
            if stop_is_due():
                stop()
            flat = flatten_observations(observations, self.keys)
            batch = normalizer(flat).reshape(*self.shape, -1)
            actions = np.asarray(act(actor_params, batch)).reshape(slots, -1)
            observations, rewards, terminated, truncated, infos = self.envs.step(actions)
            returns += rewards * running
            lengths += running
            ended = terminated | truncated
            record_success(success, infos, running, ended)
            running &= ~ended
        return Episodes(*(x.reshape(self.shape) for x in (returns, lengths, success)))


class Collector:
    """The environment of each seed for online training, apart from those of evaluation.

    Observations come out standardised as the data are. `finished` holds the episodes that have
    ended, `seconds` the time spent inside the environments. Raises InputError as make_envs does.
    """

    def __init__(self, dataset: Dataset, num_seeds: int, seed: int, normalizer):
        self.envs, self.keys = make_envs(dataset, num_seeds)
        self.normalizer = normalizer
        # The last seeds of the blocks that evaluations take the first of.
        self.reset_seeds = [SEED_BLOCK * (seed + i + 1) - 1 for i in range(num_seeds)]
        self.finished: list[Finished] = []
        self.seconds = 0.0

    def reset(self, step: int = 0) -> np.ndarray:
        """New episodes from the seeds; returns observations [S, O].

        step: environment steps taken before. After some, the first episodes are not those of the
        start again.
        """
        seeds = self.reset_seeds
        if step:
            seeds = [
                int(np.random.SeedSequence([seed, step]).generate_state(1)[0]) for seed in seeds
            ]
        observations, _ = self.envs.reset(seed=seeds)
        slots, self.steps = len(self.reset_seeds), step
        self.returns, self.lengths = np.zeros(slots), np.zeros(slots, int)
        self.success = np.full(slots, np.nan)
        return self._standardise(observations)

    def take_finished(self) -> list[Finished]:
        """The episodes that have ended since this was last asked."""
        finished, self.finished = self.finished, []
        return finished

    def step(self, actions: np.ndarray) -> Outcome:
        """Takes one step with actions [S, A] in [-1, 1].

        Raises InputError when the environment gives what is not finite.
        """
        started = time.perf_counter()
        observations, rewards, terminated, truncated, infos = self.envs.step(actions)
        self.seconds += time.perf_counter() - started
        with np.errstate(over="ignore"):  # which shows as not finite below
            learned_from = rewards.astype(np.float32)
        self.steps += 1
        self.returns += rewards
        self.lengths += 1
        ended = terminated | truncated
        record_success(self.success, infos, np.ones_like(ended), ended)
        obs = self._standardise(observations)
        next_obs = obs
        if ended.any():
            next_obs = obs.copy()
            for i in np.flatnonzero(ended):
                next_obs[i] = self._standardise(_as_batch(infos["final_obs"][i]))[0]
                episode = (self.returns[i], self.lengths[i], self.success[i])
                self.finished.append(Finished(self.steps, int(i), *(x.item() for x in episode)))
            self.returns[ended], self.lengths[ended], self.success[ended] = 0, 0, np.nan
        for what, x in (("reward", learned_from), ("observation", next_obs), ("observation", obs)):
            if not np.isfinite(x).all():  # it would spoil the buffer, and every update after
                raise InputError(
                    f"{self.envs.spec.id} gave a {what} that is not finite at environment step "
                    f"{self.steps}: mend the environment; the same command goes on from the last "
                    "checkpoint, if there is one"
                )
        return Outcome(learned_from, next_obs, terminated.astype(np.float32), obs)

    def _standardise(self, observations) -> np.ndarray:
        flat = flatten_observations(observations, self.keys)
        return self.normalizer(flat.astype(np.float32))


def _as_batch(observation):
    """One observation as a batch of one."""
    if isinstance(observation, dict):
        return {key: _as_batch(value) for key, value in observation.items()}
    return np.asarray(observation)[None]
