"""Data in D4RL's HDF5 layout, checked before they are used."""

import json
import os
import re
from typing import NamedTuple

import h5py
import numpy as np
from gymnasium.envs.registration import EnvSpec

from common.data import d4rl
from common.envs.make import env_spec, reason_of
from common.run.errors import InputError

NEEDED = ("observations", "actions", "rewards", "terminals")
FLAGS = ("terminals", "timeouts")
ONE_A_ROW = ("rewards", *FLAGS)


class Recording(NamedTuple):
    """What a file or a Minari data set holds."""

    source: str  # for messages
    env: EnvSpec
    reference: tuple[float, float] | None  # (random, expert) return; None: by the environment
    columns: dict[str, np.ndarray]  # D4RL's keys, float32 or bool


def read_hdf5(path: str, env: str | None, task: d4rl.Task | None, rows: str) -> Recording:
    """Reads a file in D4RL's layout. Raises InputError if it cannot be used."""
    path = os.path.expanduser(path)
    if not os.path.isfile(path):
        raise InputError(f"no file {path}: give the data set's with --config.dataset_path=<file>")
    try:
        with h5py.File(path, "r") as file:
            check_contained(path, file)
            spec, reference = _read_attributes(path, file.attrs, env, task)
            stored = {key: file[key] for key in file if isinstance(file.get(key), h5py.Dataset)}
            return Recording(path, spec, reference, read_columns(path, stored, rows))
    except (OSError, RuntimeError, KeyError, MemoryError) as error:  # what broken bytes raise
        reason, fix = reason_of(error), "give a complete copy of it"
        if "unable to lock" in reason:
            fix = "close the program that writes it, or set HDF5_USE_FILE_LOCKING=FALSE"
        raise InputError(f"{path} is not a readable HDF5 file ({reason}): {fix}") from None


def _read_attributes(path, attributes, env, task):
    """The environment and the reference."""
    env_id = attributes.get("env_id", "")
    env_id = env_id.decode() if isinstance(env_id, bytes) else str(env_id)
    try:
        kwargs = dict(json.loads(attributes.get("env_kwargs", "{}")))
        reference = read_reference(attributes)
    except (TypeError, ValueError) as error:
        raise InputError(
            f"{path}: its attributes cannot be used ({error}): env_kwargs is a JSON object, "
            "ref_min_score and ref_max_score are numbers, the first below the second"
        ) from None
    if env_id and not env:
        spec = own_spec(path, env_id, kwargs)
    else:
        spec = env_spec(env or (task and task.env_id), path)
    return spec, reference or (None if env_id else d4rl.reference_of(task.name if task else path))


def own_spec(source: str, env_id: str, kwargs: dict | None, wrappers=()) -> EnvSpec:
    """The environment registered here by that name, if it runs no code and opens no file."""
    foreign = [x.name for x in wrappers if not x.entry_point.startswith("gymnasium.wrappers.")]
    given = json.dumps([kwargs, *(x.kwargs for x in wrappers)])
    if ":" in env_id or foreign or re.search(r'/|"[.~]', given):
        raise InputError(
            f"{source} asks for code or files of its own, by its environment "
            f"{', with '.join([env_id, *foreign])} and arguments {given[:200]}: give "
            f"--config.env={env_id} if you trust it"
        )
    spec = env_spec(env_id, source)
    spec.kwargs |= kwargs or {}
    spec.kwargs.pop("render_mode", None)
    spec.additional_wrappers = tuple(wrappers)
    return spec


def read_reference(metadata) -> tuple[float, float] | None:
    """(random, expert) return if both are given. Raises TypeError or ValueError."""
    scores = metadata.get("ref_min_score"), metadata.get("ref_max_score")
    if None in scores:
        return None
    low, high = map(float, scores)
    if not -np.inf < low < high < np.inf:
        raise ValueError(f"{low} is not below {high}")
    return low, high


def check_contained(source: str, file: h5py.File) -> None:
    """Raises InputError if a part of the file lies in another file."""
    is_outside = lambda x: isinstance(x, h5py.Dataset) and (x.external or x.is_virtual)
    link = file.visititems_links(lambda name, x: isinstance(x, h5py.ExternalLink) and name or None)
    if name := link or file.visititems(lambda name, x: is_outside(x) and name or None):
        raise InputError(f"{source}: '{name}' lies in another file: copy its numbers into this one")


def read_columns(source: str, stored, rows: str) -> dict[str, np.ndarray]:
    """The columns that matter, as float32 or bool; qlearning rows need no successors."""
    if missing := [key for key in NEEDED if key not in stored]:
        raise InputError(
            f"{source} has no key '{missing[0]}', only {', '.join(sorted(stored)) or 'nothing'}: "
            f"a D4RL file needs {', '.join(NEEDED)}"
        )
    optional = ("timeouts", "next_observations") if rows == "all" else ("timeouts",)
    keys = [key for key in (*NEEDED, *optional) if key in stored]
    like = stored["observations"].shape
    return {key: _read_column(source, key, stored[key], like) for key in keys}


def _read_column(source, key, stored, like) -> np.ndarray:
    ndim, shape = (1 if key in ONE_A_ROW else 2), stored.shape
    if ndim == 1 and shape[1:] == (1,):
        shape = shape[:1]  # D4RL accepts this too
    fits = shape == like if key == "next_observations" else shape[:1] == like[:1]
    if len(shape) != ndim or not fits or stored.dtype.kind not in "biuf" or not stored.size:
        raise InputError(
            f"{source}: '{key}' has type {stored.dtype} and shape {shape}, 'observations' {like}: "
            f"it needs numbers of shape {'(N,)' if ndim == 1 else '(N, dimensions)'}, with N > 0 "
            "the same for every key, and successors need the dimensions of observations"
        )
    with np.errstate(over="ignore"):  # found as not finite
        values = stored[()].reshape(shape).astype(np.float32, copy=False)
    valid, needs = np.isfinite(values), "finite in float32"
    if key == "actions":
        valid, needs = np.abs(values) <= 1 + 1e-6, "in [-1, 1], to which you may rescale it,"
    elif key in FLAGS:
        valid, needs = (values == 0) | (values == 1), "0 or 1"
    bad = ~valid.reshape(len(values), -1).all(axis=1)
    if bad.any():
        raise InputError(
            f"{source}: '{key}' is not {needs} at row {bad.argmax()} ({bad.sum()} such rows): fix "
            "or remove those episodes"
        )
    return values.astype(bool) if key in FLAGS else values
