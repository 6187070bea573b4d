"""Actors in their environment: evaluation, and the transitions of online training."""

from typing import NamedTuple

import numpy as np

from common.data.dataset import Dataset
from common.envs.make import RESUME, Slot
from common.run.errors import InputError
from common.run.stopping import stop_if_told

SEED_BLOCK = 100_000  # environment seeds of one training seed


class Episodes(NamedTuple):
    """One evaluation: E complete episodes of each of S seeds."""

    returns: np.ndarray  # [S, E], undiscounted, in the environment's rewards; NaN if they are
    lengths: np.ndarray  # [S, E], steps
    success: np.ndarray  # [S, E], 1 if the environment ever reported success; NaN if it never does


class Outcome(NamedTuple):
    """One step in the environment of each of S seeds."""

    reward: np.ndarray  # float32 [S], the environment's
    next_obs: np.ndarray  # float32 [S, O], standardised; the last of an episode if that has ended
    terminated: np.ndarray  # float32 [S], 1 where the task ended, 0 at a time limit
    obs: np.ndarray  # float32 [S, O], to act in next: next_obs, or the start of a new episode
    finished: list[dict]  # rows of episodes.csv: the episodes that ended with this step


class Evaluator:
    """Environments of their own, `episodes` for each seed, with the same starts every time."""

    def __init__(self, dataset: Dataset, num_seeds: int, episodes: int, seed: int):
        self.shape, self.normalizer = (num_seeds, episodes), dataset.normalizer
        places = list(np.ndindex(*self.shape))
        self.slots = [Slot(dataset.env, dataset.observation_keys) for _ in places]
        # A seed starts from the same states whether it is evaluated alone or with others.
        self.seeds = [(SEED_BLOCK * (seed + i) + j) % 2**31 for i, j in places]

    def __call__(self, act, actor_params) -> Episodes:
        """Plays act(actor_params, [S, E, O]) -> [S, E, A] until every slot has had one episode."""
        global_state = np.random.get_state()  # of online training, from which OGBench's mazes draw
        for slot, seed in zip(self.slots, self.seeds, strict=True):
            slot.start(seed)
        running = range(len(self.slots))
        while running:
            stop_if_told()
            batch = self.normalizer(np.stack([slot.obs for slot in self.slots]))
            actions = np.asarray(act(actor_params, batch.reshape(*self.shape, -1)))
            actions = actions.reshape(len(self.slots), -1)
            running = [i for i in running if not any(self.slots[i].step(actions[i])[1:])]
        np.random.set_state(global_state)
        found = zip(*((slot.total, slot.length, slot.success) for slot in self.slots), strict=True)
        return Episodes(*(np.reshape(column, self.shape) for column in found))


class Collector:
    """The environment of each seed for online training."""

    def __init__(self, dataset: Dataset, num_seeds: int, seed: int):
        self.slots = [Slot(dataset.env, dataset.observation_keys) for _ in range(num_seeds)]
        self.normalizer, self.first_seed = dataset.normalizer, seed
        # The last seed of each block; evaluations take the first.
        self.seeds = [(SEED_BLOCK * (seed + i + 1) - 1) % 2**31 for i in range(num_seeds)]

    def reset(self, step: int = 0) -> np.ndarray:
        """Starts episodes, other ones after `step` > 0 steps; returns standardised [S, O]."""
        self.steps = step
        for slot, seed in zip(self.slots, self.seeds, strict=True):
            later = np.random.SeedSequence([seed, step]).generate_state(1)[0] % 2**31
            slot.start(int(later) if step else seed)
        return self._observations()

    def step(self, actions: np.ndarray) -> Outcome:
        """Takes one step with actions [S, A] in [-1, 1]; a new episode follows one that ends."""
        finished = []
        self.steps += 1
        results = [slot.step(action) for slot, action in zip(self.slots, actions, strict=True)]
        next_obs = self._observations()
        for i, slot in enumerate(self.slots):
            if any(results[i][1:]):
                row = {"step": self.steps, "seed": self.first_seed + i, "return": slot.total}
                finished.append(row | {"length": slot.length, "success": slot.success})
                slot.start()
        reward, terminated, _ = np.array(results, np.float32).T
        if not np.isfinite(reward).all():  # it would spoil the buffer and every later update
            raise InputError(f"{self.slots[0].name} gave a reward that is not finite: {RESUME}")
        return Outcome(reward, next_obs, terminated, self._observations(), finished)

    def _observations(self) -> np.ndarray:
        return self.normalizer(np.stack([slot.obs for slot in self.slots]).astype(np.float32))
