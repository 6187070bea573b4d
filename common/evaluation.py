"""Policy evaluation in vectorised Gymnasium environments."""

from __future__ import annotations

from typing import NamedTuple

import gymnasium
import numpy as np

from common.checks import InputError
from common.dataset import Dataset, flatten_observations


class Episodes(NamedTuple):
    """One evaluation: E complete episodes of each of S seeds."""

    returns: np.ndarray  # [S, E], undiscounted, in the environment's rewards
    lengths: np.ndarray  # [S, E], steps
    success: (
        np.ndarray
    )  # [S, E], 1 where the environment reported success; NaN where it reports none


class Evaluator:
    """Environments of their own, `episodes` for each seed, with the same starts every time.

    Raises InputError when the environment does not exist, or its spaces do not fit the data.
    """

    def __init__(self, dataset: Dataset, num_seeds: int, episodes: int, seed: int):
        self.shape = (num_seeds, episodes)
        # Seed s starts from the same states whether it is evaluated alone or among others.
        self.reset_seeds = [
            100_000 * (seed + i) + j for i in range(num_seeds) for j in range(episodes)
        ]
        try:
            self.envs = gymnasium.make_vec(
                dataset.env,
                num_envs=num_seeds * episodes,
                vectorization_mode="sync",
                vector_kwargs={"autoreset_mode": gymnasium.vector.AutoresetMode.SAME_STEP},
            )
        except (gymnasium.error.Error, ImportError) as error:
            raise InputError(
                f"cannot make environment {dataset.env.id} ({error}): install what it needs"
            ) from None
        action_space = self.envs.single_action_space
        if not isinstance(action_space, gymnasium.spaces.Box):
            raise InputError(
                f"{dataset.env.id} takes actions of {action_space}, not a box in [-1, 1]: "
                "name an environment of continuous actions with --config.env=<id>"
            )
        spaces = {"observations": self.envs.single_observation_space, "actions": action_space}
        for key, space in spaces.items():
            width, expected = getattr(dataset, key).shape[1], gymnasium.spaces.flatdim(space)
            if width != expected:
                raise InputError(
                    f"{dataset.source}: '{key}' has {width} dimensions but {dataset.env.id} has "
                    f"{expected}: name the data's own environment with --config.env=<id>"
                )
        if not (np.all(action_space.low == -1) and np.all(action_space.high == 1)):
            low, high = action_space.low.min(), action_space.high.max()
            raise InputError(
                f"{dataset.env.id} takes actions in [{low}, {high}] but policies act in [-1, 1]: "
                "wrap the environment in gymnasium.wrappers.RescaleAction"
            )

    def __call__(self, act, actor_params, normalizer) -> Episodes:
        """Runs act(actor_params, [S, E, O]) -> [S, E, A] until every slot has had one episode."""
        slots = len(self.reset_seeds)
        returns, lengths, success = np.zeros(slots), np.zeros(slots, int), np.full(slots, np.nan)
        running = np.ones(slots, bool)
        observations, _ = self.envs.reset(seed=self.reset_seeds)
        while running.any():
            batch = normalizer(flatten_observations(observations)).reshape(*self.shape, -1)
            actions = np.asarray(act(actor_params, batch)).reshape(slots, -1)
            observations, rewards, terminated, truncated, infos = self.envs.step(actions)
            returns += rewards * running
            lengths += running
            ended = terminated | truncated
            # A slot that ended has been reset already; what its last step reported stands apart.
            reports = ((infos, running & ~ended), (infos.get("final_info", {}), running & ended))
            for report, slots_meant in reports:
                if "success" in report:
                    told = slots_meant & report.get("_success", True)
                    success[told] = np.fmax(success[told], np.asarray(report["success"])[told])
            running &= ~ended
        return Episodes(*(x.reshape(self.shape) for x in (returns, lengths, success)))
