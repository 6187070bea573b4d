"""Environments by name, tried before anything is trained, and one episode at a time."""

import contextlib
import copy
import importlib
import warnings
import weakref

import gymnasium
import numpy as np
from gymnasium import spaces
from gymnasium.envs.registration import EnvSpec

from common.run.errors import Diverged, InputError, brief, explained

ARRAYS = (spaces.Box, spaces.Discrete, spaces.MultiBinary, spaces.MultiDiscrete)
TRIAL = 10_000  # steps in which an environment without a time limit has to end
RESUME = "fix the environment, then give the same command to resume"
# Modules whose environments are found by their id alone.
KNOWN_MODULES = (f"{__package__}.antmaze", "gymnasium_robotics", "ogbench", "common.data.demo")


def env_spec(env: str | None, source: str) -> EnvSpec:
    """Gymnasium's specification of an id or <module>:<id>; `source` is for the InputError."""
    if not env:
        raise InputError(f"{source} names no environment: give --config.env=<Gymnasium id>")
    module, _, env_id = env.rpartition(":")
    fix = "give --config.env=<Gymnasium id>, or <module>:<id> with the module that registers it"
    fix += "; `pip install gymnasium-robotics` brings PointMaze, Adroit and others"
    with explained(f"unknown environment '{env}'", fix):
        if module:
            importlib.import_module(module)  # registers its environments
        for known in KNOWN_MODULES:
            if env_id not in gymnasium.registry:
                with contextlib.suppress(ImportError):
                    importlib.import_module(known)
        return copy.deepcopy(gymnasium.spec(env_id))


def make_env(spec: EnvSpec) -> gymnasium.Env:
    """The environment as it is registered; a constructor can raise anything."""
    with warnings.catch_warnings():  # of v4, in which D4RL's data were recorded
        warnings.filterwarnings("ignore", ".*(is out of date|is deprecated).*")
        return gymnasium.make(spec)


def check_spaces(source: str, observations: gymnasium.Space, actions: gymnasium.Space, keys=()):
    """`keys`, or else all in alphabetical order, of dictionary observations; None without.

    Raises InputError for an unknown key, and for spaces that the project does not take.
    """
    known = tuple(sorted(observations)) if isinstance(observations, spaces.Dict) else ()
    parts = [observations[key] for key in known] or [observations]
    is_box = isinstance(actions, spaces.Box) and actions.dtype.kind == "f"
    finite = is_box and np.isfinite(actions.high - actions.low) & (actions.low < actions.high)
    if not np.all(finite) or not all(isinstance(part, ARRAYS) for part in parts):
        raise InputError(
            f"{source} has observations of {brief(observations)} and actions of {brief(actions)}: "
            "observations must be arrays, numbers or a dictionary of them, and actions a Box of "
            "fractions between finite bounds, because actors act in [-1, 1]"
        )
    for key in keys:
        if key not in known or keys.count(key) > 1:
            raise InputError(
                f"--config.observation_keys: '{key}' must be named once and be among the "
                f"observations of {source}: {', '.join(known) or 'they have no keys'}"
            )
    return keys or known or None


def flatten(observation, keys=None, rows=()) -> np.ndarray:
    """An observation as one row [O], or with rows=(T,) a batch of T as [T, O].

    Dictionaries are joined in the order of `keys`; discrete parts stay plain numbers.
    """
    parts = [observation[key] for key in keys] if keys else [observation]
    return np.concatenate([np.reshape(part, (*rows, -1)) for part in parts], axis=-1)


class Slot:
    """An environment with actions in [-1, 1], and the episode it is in."""

    def __init__(self, spec: EnvSpec, keys: tuple | None):
        env, self.name = make_env(spec), spec.id
        self.keys = check_spaces(spec.id, env.observation_space, env.action_space, keys or ())
        space = env.action_space  # rescaling may round beyond its bounds
        clip = lambda action: np.clip(action, space.low, space.high)
        env = gymnasium.wrappers.TransformAction(env, clip, space)
        low, high = np.full_like(space.low, -1), np.full_like(space.high, 1)
        self.env = gymnasium.wrappers.RescaleAction(env, low, high)
        weakref.finalize(self, self.env.close)

    def start(self, seed: int | None = None) -> None:
        self.total, self.length, self.success = 0.0, 0, np.nan
        if seed is not None:
            np.random.seed(seed)  # OGBench's mazes draw from it
        self._observe(self.env.reset(seed=seed)[0])

    def step(self, action: np.ndarray) -> tuple[float, bool, bool]:
        """Takes an action in [-1, 1]; returns the reward, and whether task or time has ended."""
        if not np.isfinite(action).all():
            fix = "lower --config.actor_lr or --config.critic_lr"
            raise Diverged(f"diverged: the actor's action is not finite: {fix}")
        action = action.reshape(self.env.action_space.shape)
        observation, reward, terminated, truncated, info = self.env.step(action)
        reward = np.asarray(reward, float).item()
        self.total, self.length = self.total + reward, self.length + 1
        self._observe(observation)
        for name in ("success", "is_success"):
            with contextlib.suppress(KeyError, TypeError, ValueError):  # None, or no number
                self.success = float(np.fmax(self.success, np.max(info[name])))
        return reward, terminated, truncated

    def _observe(self, observation):
        self.obs = flatten(observation, self.keys)
        if not (np.abs(self.obs) < 1e38).all():
            raise InputError(f"{self.name} gave an observation that is not finite: {RESUME}")


def try_env(spec: EnvSpec, source: str, keys: tuple, found: tuple | None = None):
    """Takes the first steps. Raises InputError if they fail, or if the data do not fit.

    keys: the user's choice. found: the widths of the data's observations and actions, if any.
    Returns the keys in use, the widths, and the bounds of its actions, float64 [2, A].
    """
    fix = "fix it or install what it needs, or name another environment with --config.env=<id>"
    with explained(f"{spec.id} with arguments {brief(spec.kwargs)} fails", fix):
        slot, ended = Slot(spec, keys), False
        actions = slot.env.env.action_space
        bounds = np.array([actions.low.ravel(), actions.high.ravel()], np.float64)
        slot.start(seed=0)
        widths = slot.obs.size, bounds.shape[1]
        while not ended and slot.length < (1 if spec.max_episode_steps else TRIAL):
            ended = any(slot.step(slot.env.action_space.sample())[1:])
    if found and found != widths:
        known = ",".join(sorted(slot.env.observation_space) if slot.keys else ())
        keys = f", or choose among its --config.observation_keys={known}" if known else ""
        raise InputError(
            f"{source} has observations of {found[0]} and actions of {found[1]} dimensions, but "
            f"{spec.id} of {widths[0]} and {widths[1]}: name the data's own environment with "
            f"--config.env=<id>{keys}"
        )
    if not ended and not spec.max_episode_steps:
        raise InputError(f"{spec.id} has no time limit: give --config.max_episode_steps=<steps>")
    spec.max_episode_steps = spec.max_episode_steps or TRIAL  # a better actor may never end it
    return slot.keys, widths, bounds
