"""Data in D4RL's HDF5 layout, checked before they are used."""

import json
import os
import re
import sys

import h5py
import numpy as np
from gymnasium.envs.registration import EnvSpec

from common.data.d4rl import Task, reference_of
from common.envs.make import env_spec
from common.run.errors import InputError, explained

REPLACE = "give a complete copy, close what is writing it, or set HDF5_USE_FILE_LOCKING=FALSE"
NEEDED = ("observations", "actions", "rewards", "terminals")
# Wrappers that evaluation keeps: Gymnasium's own, except those that change the reward, normalise by
# statistics that the data set does not hold, or make pictures.
KEPT = r"(?i)gymnasium\.wrappers\.(?!.*(reward|normalizeobs|render|video))"


def read_hdf5(path: str, env: str | None, task: Task | None) -> tuple:
    """Environment, reference scores and columns of a file. Raises InputError if it is unusable.

    env: the user's, in place of the file's own. task: D4RL's, for a file that names none.
    """
    if not os.path.isfile(path):
        raise InputError(f"no file {path}: check --config.dataset or --config.dataset_path")
    with explained(f"{path} is not readable", REPLACE), open_hdf5(path) as file:
        named = file.attrs.get("env_id", "")
        named = named.decode() if isinstance(named, bytes) else named
        if env or not named:
            spec = env_spec(env or (task and task.env_id), path)
        else:
            spec = own_spec(path, named, json.loads(file.attrs.get("env_kwargs", "{}")))
        stored = {key: file[key] for key in file if isinstance(file.get(key), h5py.Dataset)}
        return spec, reference_of(file.attrs, spec.id), read_columns(path, stored)


def open_hdf5(path: str) -> h5py.File:
    """The file, to read. Raises InputError if a part of it lies elsewhere."""
    try:
        file = h5py.File(path, "r")
    except OSError as error:
        if "No locks available" not in str(error):
            raise
        file = h5py.File(path, "r", locking=False)
    is_outside = lambda x: isinstance(x, h5py.Dataset) and (x.external or x.is_virtual)
    link = file.visititems_links(lambda name, x: isinstance(x, h5py.ExternalLink) and name or None)
    if name := link or file.visititems(lambda name, x: is_outside(x) and name or None):
        raise InputError(f"{path}: '{name}' lies in another file: copy its numbers into this one")
    return file


def own_spec(source: str, env_id: str, kwargs: dict | None, wrappers=()) -> EnvSpec:
    """The environment registered here by the name that a data set gives.

    Modules, rendering, what names files, and wrappers other than those above are left out.
    """
    spec = env_spec(env_id.rpartition(":")[2], source)
    others = [x.name for x in wrappers if not re.match(KEPT, x.entry_point)]
    kwargs = {key: value for key, value in (kwargs or {}).items() if key != "render_mode"}
    given = [*kwargs.items(), *((x.name, x.kwargs) for x in wrappers)]
    names_file = lambda value: re.search(r'/|"[.~]', json.dumps(value))
    left_out = [name for name, value in given if name in others or names_file(value)]
    spec.kwargs |= {key: kwargs[key] for key in kwargs if key not in left_out}
    spec.additional_wrappers = tuple(x for x in wrappers if x.name not in left_out)
    if left_out:
        message = f"evaluation leaves out {', '.join(left_out)} of {source}"
        print(f"warning: {message}", file=sys.stderr, flush=True)
    return spec


def read_columns(source: str, stored) -> dict[str, np.ndarray]:
    """The columns that matter, checked: float32 or bool."""
    columns, like = {}, None
    for key in (*NEEDED, "timeouts", "next_observations"):
        if key not in stored and key in NEEDED:
            found = f"only {', '.join(sorted(stored)) or 'nothing'}"
            raise InputError(f"{source} has no key '{key}', {found}: it needs {', '.join(NEEDED)}")
        if key not in stored:
            continue
        column, ndim = stored[key], 1 if key in ("rewards", "terminals", "timeouts") else 2
        # D4RL accepts rewards and flags of shape (N, 1) too.
        shape = column.shape[:1] if column.shape[ndim:] == (1,) else column.shape
        like = like or shape
        fits = shape == like if key == "next_observations" else shape[:1] == like[:1]
        if len(shape) != ndim or not fits or column.dtype.kind not in "biuf" or not column.size:
            raise InputError(
                f"{source}: '{key}' has type {column.dtype} and shape {shape}, 'observations' "
                f"{like}: it needs numbers of shape {'(N,)' if ndim == 1 else '(N, dimensions)'}, "
                "N > 0, that fit the observations"
            )
        with np.errstate(over="ignore"):  # found as not finite
            values = column[()].reshape(shape).astype(np.float32, copy=False)
        bad = ~np.isfinite(values).reshape(len(values), -1).all(axis=1)
        if bad.any():
            where = f"at row {bad.argmax()} ({bad.sum()} such rows): fix those episodes"
            raise InputError(f"{source}: '{key}' is not finite in float32 {where}")
        is_flag = key in ("terminals", "timeouts")
        columns[key] = values.astype(bool) if is_flag else values
    return columns
