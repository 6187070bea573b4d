"""Environments by name, checked against the data, and their observations as flat rows."""

import contextlib
import copy
import importlib
import math
import warnings

import gymnasium
import numpy as np
from gymnasium import spaces
from gymnasium.envs.registration import EnvSpec

from common.run.errors import InputError

# Modules whose environments are found by their id alone.
KNOWN_MODULES = (f"{__package__}.antmaze", "gymnasium_robotics", "common.data.demo")


def reason_of(error: Exception) -> str:
    """The error's message on one line, for use within a sentence."""
    return " ".join(str(error).split()).rstrip(".")[:200] or type(error).__name__


def env_spec(env: str | None, source: str) -> EnvSpec:
    """Gymnasium's specification of an id or <module>:<id>; `source` is for the InputError."""
    if not env:
        raise InputError(
            f"{source} does not name its environment: give the Gymnasium id with --config.env=<id>"
        )
    module, _, env_id = env.rpartition(":")
    try:
        if module:
            importlib.import_module(module)  # registers its environments
        for known in KNOWN_MODULES:
            if env_id not in gymnasium.registry:
                with contextlib.suppress(ImportError):
                    importlib.import_module(known)
        return copy.deepcopy(gymnasium.spec(env_id))
    except Exception as error:  # an imported module can raise anything
        raise InputError(
            f"unknown environment '{env}' ({reason_of(error)}): give --config.env=<Gymnasium id>, "
            "or --config.env=<module>:<id> with the module that registers it; `pip install "
            "gymnasium-robotics` brings PointMaze, Adroit and others"
        ) from None


def make_env(spec: EnvSpec) -> gymnasium.Env:
    """The environment. Raises InputError if it cannot be made."""
    try:
        with warnings.catch_warnings():  # of v4, in which D4RL's data were recorded
            warnings.filterwarnings("ignore", ".*(is out of date|is deprecated).*")
            return gymnasium.make(spec)
    except Exception as error:  # a constructor can raise anything
        raise InputError(
            f"cannot make environment {spec.id} with arguments {str(spec.kwargs)[:200]} "
            f"({reason_of(error)}): install what it needs, fix the data's env_kwargs, or name "
            "another with --config.env=<id>"
        ) from None


def flatten(observation, keys=None, rows=()) -> np.ndarray:
    """An observation as one row [O], or with rows=(T,) a batch of T as [T, O].

    Dictionaries are joined in the order of `keys`, by default of all keys in alphabetical order.
    """
    if isinstance(observation, dict):
        parts = [flatten(observation[key], None, rows) for key in keys or sorted(observation)]
        return np.concatenate(parts, axis=-1)
    return np.reshape(observation, (*rows, -1))


def width(space: gymnasium.Space, keys=None) -> int:
    """Length of a flattened observation or action."""
    parts = [space[key] for key in keys or space] if isinstance(space, spaces.Dict) else [space]
    return sum(math.prod(part.shape) for part in parts)


def check_spaces(source: str, observations: gymnasium.Space, actions: gymnasium.Space, keys):
    """Raises InputError for spaces that cannot be flattened, or without one of the keys."""
    known = sorted(observations) if isinstance(observations, spaces.Dict) else []
    parts = [observations[key] for key in known] or [observations]
    if not isinstance(actions, spaces.Box) or any(part.shape is None for part in parts):
        raise InputError(
            f"{source} has observations of {observations} and actions of {actions}: observations "
            "must be arrays or dictionaries of arrays, and actions continuous"
        )
    for key in keys:
        if key not in known or keys.count(key) > 1:
            raise InputError(
                f"--config.observation_keys: '{key}' must be named once and be among the "
                f"observations of {source}: {', '.join(known) or 'they have no keys'}"
            )


def resolve_keys(keys, space: gymnasium.Space, episode: np.ndarray | None):
    """Keys of a dictionary space in the order of the data's columns; None for other spaces.

    keys: the user's choice; empty for all in alphabetical order or, if the data have another width,
    two keys of a goal environment. episode: the data's first, [T, O], or None.
    """
    if not isinstance(space, spaces.Dict):
        return None
    everything, goal_last = tuple(sorted(space)), ("observation", "desired_goal")
    if keys or episode is None or width(space) == episode.shape[1]:
        return tuple(keys) or everything
    if set(goal_last) <= set(space) and width(space, goal_last) == episode.shape[1]:
        last = episode[:, -width(space["desired_goal"]) :]
        is_goal = (last == last[0]).all()  # a goal does not change within an episode
        return goal_last if is_goal else ("achieved_goal", "observation")
    return everything


def check_env(spec: EnvSpec, source: str, keys, episode=None, action_width=None):
    """Tries the environment and compares it with the data; see resolve_keys.

    Returns the resolved keys, and the widths of observations and actions. Raises InputError.
    """
    env = make_env(spec)
    check_spaces(spec.id, env.observation_space, env.action_space, keys)
    keys = resolve_keys(keys, env.observation_space, episode)
    widths = width(env.observation_space, keys), width(env.action_space)
    found = widths if episode is None else (episode.shape[1], action_width)
    if found != widths:
        joined = f" ({', '.join(keys)}; see --config.observation_keys)" if keys else ""
        raise InputError(
            f"{source} has observations of {found[0]} and actions of {found[1]} dimensions, but "
            f"{spec.id} of {widths[0]}{joined} and {widths[1]}: name the data's own environment "
            "with --config.env=<id>"
        )
    low, high = env.action_space.low, env.action_space.high
    if not (np.all(low == -1) and np.all(high == 1)):
        raise InputError(
            f"{spec.id} takes actions in [{low.min()}, {high.max()}] but actors act in [-1, 1]: "
            "wrap the environment in gymnasium.wrappers.RescaleAction"
        )
    try:
        env.reset(seed=0)
        for _ in range(10_000):
            _, reward, terminated, truncated, _ = env.step(env.action_space.sample())
            np.asarray(reward, float).item()
            if terminated or truncated or spec.max_episode_steps:
                break
        else:
            raise ValueError("no end after 10,000, although max_episode_steps sets no limit")
        env.close()
    except Exception as error:  # an environment can raise anything
        raise InputError(
            f"{spec.id} fails in its first steps ({reason_of(error)}): fix the environment, or "
            "name another with --config.env=<id>"
        ) from None
    return keys, *widths
