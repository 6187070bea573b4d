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
        elif env_id not in gymnasium.registry:
            for known in KNOWN_MODULES:
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
    except (gymnasium.error.Error, ImportError) as error:
        reason = " ".join(str(error).split()).rstrip(".")
        raise InputError(
            f"cannot make environment {spec.id} ({reason}): install what it needs"
        ) from None


def flatten_observations(observations, keys=None) -> np.ndarray:
    """Observations as [rows, O]; dictionaries are joined in the order of `keys`.

    By default those are all keys, in alphabetical order.
    """
    if isinstance(observations, dict):
        parts = [flatten_observations(observations[key]) for key in keys or sorted(observations)]
        return np.concatenate(parts, axis=1)
    return np.reshape(observations, (len(observations), -1))


def observation_keys(space, width: int, keys=None) -> tuple[str, ...] | None:
    """Keys of a dictionary space whose join is `width` wide; None for a space without keys.

    All keys in alphabetical order, if that fits; else, of a goal environment, `observation` and
    `desired_goal`, the order of most goal data, or `achieved_goal` and `observation`. `keys` are
    taken as they are. Raises InputError when one of them does not exist.
    """
    if not isinstance(space, gymnasium.spaces.Dict):
        return None
    everything = tuple(sorted(space))
    if keys:
        unknown = [key for key in keys if key not in everything]
        if unknown:
            raise InputError(
                f"--config.observation_keys names '{unknown[0]}', which the environment does not "
                f"observe: choose from {', '.join(everything)}"
            )
        return tuple(keys)
    for joined in (everything, ("observation", "desired_goal"), ("achieved_goal", "observation")):
        if set(joined) <= set(everything) and observation_width(space, joined) == width:
            return joined
    return everything


def observation_width(space, keys=None) -> int:
    """Width of a flattened observation, of those keys alone if given."""
    return sum(gymnasium.spaces.flatdim(space[key] if key else space) for key in keys or [None])
