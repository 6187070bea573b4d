"""Environments by name, and their observations as flat rows."""

from __future__ import annotations

import contextlib
import copy
import importlib
import warnings

import gymnasium
import numpy as np
from gymnasium.envs.registration import EnvSpec

from common.checks import InputError

# Packages whose environments are found without naming the package.
KNOWN_MODULES = ("common.antmaze", "common.demo", "gymnasium_robotics")


def env_spec(env: str | None, source: str) -> EnvSpec:
    """What Gymnasium knows of `env`, an id or <module>:<id>.

    Raises InputError, naming `source`, when nothing is registered by that name.
    """
    if env is None:
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
    except (gymnasium.error.Error, ImportError) as error:
        reason = str(error).splitlines()[0].rstrip(".")
        raise InputError(
            f"unknown environment '{env}' ({reason}): give a Gymnasium id with --config.env=<id>, "
            "or --config.env=<module>:<id> with the module that registers it; "
            "`pip install gymnasium-robotics` brings PointMaze, AntMaze, Adroit and others"
        ) from None


def make_env(spec: EnvSpec, make=gymnasium.make, **kwargs):
    """The environment, or with make=gymnasium.make_vec several; raises InputError if it fails."""
    try:
        with warnings.catch_warnings():  # v4 is what D4RL's data are of, though there is a v5
            warnings.filterwarnings("ignore", ".*is out of date.*")
            return make(spec, **kwargs)
    except (gymnasium.error.Error, ImportError, TypeError) as error:
        reason = " ".join(str(error).split()).rstrip(".")
        given = f" with {str(spec.kwargs)[:200]}" if spec.kwargs else ""
        raise InputError(
            f"cannot make environment {spec.id}{given} ({reason}): install what it needs, mend "
            "the data's env_kwargs, or name another with --config.env=<id>"
        ) from None


def flatten_observations(observations, keys=None) -> np.ndarray:
    """Observations as [rows, O]; dictionaries are joined in the order of `keys`.

    By default those are all keys, in alphabetical order.
    """
    if isinstance(observations, dict):
        parts = [flatten_observations(observations[key]) for key in keys or sorted(observations)]
        return np.concatenate(parts, axis=1)
    return np.reshape(observations, (len(observations), -1))


def check_keys(keys, space, source: str) -> None:
    """Raises InputError unless `keys` are some of a dictionary space, or none."""
    known = sorted(space) if isinstance(space, gymnasium.spaces.Dict) else []
    unknown = [key for key in keys or () if key not in known]
    if len(set(keys or ())) < len(keys or ()):
        raise InputError(f"--config.observation_keys={','.join(keys)} names a key twice: once each")
    if unknown:
        raise InputError(
            f"--config.observation_keys names '{unknown[0]}', which is not among the observations "
            f"of {source}: {'choose from ' + ', '.join(known) if known else 'leave it out'}"
        )


def observation_keys(space, dataset) -> tuple[str, ...] | None:
    """Keys of a dictionary space in the order of the data's columns; None for a space without keys.

    The dataset's own `observation_keys`, if it has any; all keys in alphabetical order, if that is
    as wide as the data; else, of a goal environment, `observation` and `desired_goal`, or
    `achieved_goal` and `observation` where the data's last columns change within an episode, as a
    goal does not. Raises InputError when one of the keys does not exist.
    """
    check_keys(dataset.observation_keys, space, dataset.env.id)
    if not isinstance(space, gymnasium.spaces.Dict):
        return None
    if dataset.observation_keys:
        return tuple(dataset.observation_keys)
    width, everything = dataset.widths["observations"], tuple(sorted(space))
    goal_first, goal_last = ("achieved_goal", "observation"), ("observation", "desired_goal")
    if observation_width(space, everything) != width and set(goal_last) <= set(space):
        if observation_width(space, goal_last) == width:
            length = dataset.episode_ends.argmax() + 1  # of the first episode
            goals = dataset.observations[:length, -observation_width(space["desired_goal"]) :]
            return goal_last if (goals == goals[0]).all() else goal_first
    return everything


def observation_width(space, keys=None) -> int:
    """Width of a flattened observation, of those keys alone if given."""
    return sum(gymnasium.spaces.flatdim(space[key] if key else space) for key in keys or [None])
