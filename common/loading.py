"""Data sets from D4RL's HDF5 files and from Minari, checked before they are used."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path

import h5py
import minari
import numpy as np
from gymnasium.envs.registration import EnvSpec, WrapperSpec
from minari.storage.datasets_root_dir import get_dataset_path

from common import d4rl
from common.checks import InputError
from common.dataset import Dataset, find_episode_ends
from common.environments import (
    check_keys,
    env_spec,
    flatten_observations,
    make_env,
    observation_width,
)
from common.physics import d4rl_physics, is_known

NEEDED = ("observations", "actions", "rewards", "terminals")
FLAGS = ("terminals", "timeouts")
ONE_A_ROW = ("rewards", *FLAGS)
FLAT_FORMAT = 2  # of Minari's flat copies, to be raised when what is written changes


def load_dataset(
    name: str | None,
    path: str | None = None,
    env: str | None = None,
    *,
    rows: str = "all",
    physics: str | None = None,
    keys: Sequence[str] = (),
    sparse: bool = False,
    cache_dir: str = "~/.cache/ssar-jax",
) -> Dataset:
    """Loads `demo`, `demo-sparse`, a D4RL task, `d4rl:<HDF5 file>` or a Minari id.

    path: the HDF5 file to read, whatever the name. env: the Gymnasium id, in place of what the name
    or the data's metadata give; alone, without name and path, there are no transitions, for
    training online. rows: `all`, every row whose successor is known, or `qlearning`, those that
    D4RL's qlearning_dataset gives. physics: `d4rl` or `stock`; None is d4rl for D4RL's names. keys:
    of dictionary observations, in this order; none of them for all. sparse: whether success, a
    reward of 1, is what matters. cache_dir: where Minari's episodes are kept flat.
    Raises InputError when the data cannot be used.
    """
    if not (name or path or env):
        raise InputError(
            "no data set and no environment: give --config.dataset=<Minari id or D4RL task> or "
            "=d4rl:<file>, or --config.env=<id>"
        )
    if env:
        env_spec(env, name)  # a name that is unknown shows before a large file is read
    stem = (name or "").removeprefix("d4rl:")
    is_file = (name or "").startswith("d4rl:") or stem.endswith((".hdf5", ".h5"))
    file = stem if is_file and stem not in d4rl.TASKS else None
    if path and file is not None and path != file:
        raise InputError(
            f"two files are given, --config.dataset={name} and --config.dataset_path={path}: leave "
            "out one of them"
        )
    file = path or file
    task = d4rl.find_task(stem, file)
    if file is not None or task:
        dataset = _load_hdf5(file if file is not None else d4rl.fetch(task), env, task, rows)
    elif name:
        dataset = _load_minari(_recorded(name), env, tuple(keys), rows, cache_dir)
    else:
        dataset = _no_data(env, keys)
    dataset.observation_keys = tuple(keys)
    if physics == "d4rl" or (physics is None and task and is_known(dataset.env)):
        dataset.env, dataset.physics = d4rl_physics(dataset.env), "d4rl"
    if sparse and len(dataset.rewards) and not (dataset.rewards == 1).any():
        raise InputError(
            f"{dataset.source}: no reward is 1, by which selection=success knows success (they lie "
            f"between {dataset.rewards.min():g} and {dataset.rewards.max():g}): give rewards of 1 "
            "for success and 0 else, or choose another --config.selection"
        )
    return dataset


def _recorded(name: str) -> str:
    """The Minari id that a name stands for; records a demo when it is first asked for."""
    if name in ("demo", "demo-sparse"):
        from common.demo import demo_dataset_id

        return demo_dataset_id(name)
    return name


# ------------------------------------------------------------------------------------------ HDF5


def _load_hdf5(path: str, env: str | None, task: d4rl.Task | None, rows: str) -> Dataset:
    path = os.path.expanduser(path)
    with _open_hdf5(path) as file:
        env_id, kwargs, reference = _read_metadata(path, file.attrs)
        if task and env_id and not env and _stem(env_id) != _stem(task.env_id):
            raise InputError(
                f"{path} is of {env_id}, but {task.name} of {task.env_id}: give that task's file, "
                "choose another task, or name the environment with --config.env=<id>"
            )
        if ":" in (env_id or "") and not env:
            raise InputError(
                f"{path} asks for a module to be imported, by its attribute env_id={env_id!r}: "
                f"give --config.env={env_id} if you trust it"
            )
        spec = env_spec(env or env_id or (task.env_id if task else None), path)
        if spec.id == (env_id or "").rpartition(":")[2]:
            spec.kwargs |= kwargs
        missing = [key for key in NEEDED if not isinstance(file.get(key), h5py.Dataset)]
        if missing:
            raise InputError(
                f"{path} has no key '{missing[0]}', only {', '.join(sorted(file)) or 'nothing'}: "
                "a D4RL file needs observations, actions, rewards and terminals"
            )
        _check_own(path, file)
        columns = _read_columns(path, file, rows)
    reference = reference or (task.reference if task else None)
    reference = reference or d4rl.reference_of(path) or d4rl.reference_of(spec.name)
    return _from_columns(path, spec, reference, rows, columns)


def _stem(env_id: str) -> str:
    """An environment's name without module, namespace and version."""
    return re.split("[:/]", env_id)[-1].rpartition("-v")[0]


def _read_metadata(path, attributes):
    """Environment's id, its keyword arguments, and (random, expert) return; None where absent."""
    found = {}
    for key in ("env_id", "env_kwargs", "ref_min_score", "ref_max_score"):
        value = attributes.get(key)
        found[key] = value.decode() if isinstance(value, bytes) else value
    try:
        key = "env_kwargs"
        kwargs = dict(json.loads(found[key] or "{}"))
        if _names_path(kwargs):
            raise ValueError("which is not opened on a file's word")
        key = "env_id"
        env_id = None if found[key] is None else str(np.asarray(found[key]).item())
        alone = [key for key in ("ref_min_score", "ref_max_score") if found[key] is not None]
        key = alone[0] if alone else "ref_min_score"
        if len(alone) == 1:
            raise ValueError("the other is missing")
        reference = _stored_reference(found)
    except (TypeError, ValueError):
        raise InputError(
            f"{path}: attribute '{key}' is '{found[key]}': mend or remove it (env_id is a name, "
            "env_kwargs a JSON object without paths, ref_min_score and ref_max_score are numbers, "
            "the first below the second)"
        ) from None
    return env_id, kwargs, reference


def _names_path(value) -> bool:
    """Whether a path is among what a data set wants an environment to be made with."""
    if isinstance(value, dict):
        return any(map(_names_path, value.values()))
    if isinstance(value, (list, tuple)):
        return any(map(_names_path, value))
    return isinstance(value, str) and (os.path.sep in value or value.startswith((".", "~")))


@contextlib.contextmanager
def _open_hdf5(path):
    if not os.path.isfile(path):
        what = f"{path} is a folder" if os.path.isdir(path) else f"no file {path}"
        raise InputError(
            f"{what}: give the data set's HDF5 file with --config.dataset_path=<file> "
            "or --config.dataset=d4rl:<file>"
        )
    try:
        with h5py.File(path, "r") as file:
            yield file
    except (OSError, RuntimeError, KeyError) as error:  # all of which h5py makes of broken bytes
        reason = " ".join(str(error).split())
        raise InputError(
            f"{path} is not a readable HDF5 file ({reason}): put a whole one in its place, or "
            "delete it, if it is of D4RL's folder, to have it downloaded again"
        ) from None


def _check_own(path, file) -> None:
    """Raises InputError for a column that leads out of the file, to wherever its maker wanted."""
    for key in (*NEEDED, "timeouts", "next_observations"):
        if key not in file:
            continue
        column = file.get(key)
        if not isinstance(column, h5py.Dataset):
            raise InputError(f"{path}: '{key}' holds no numbers: mend or remove it")
        elsewhere = column.file.filename != file.filename or column.external
        if column.is_virtual:
            elsewhere = elsewhere or any(x.file_name != "." for x in column.virtual_sources())
        if elsewhere:
            raise InputError(
                f"{path}: '{key}' lies in another file: copy its numbers into this one, as "
                "`h5repack` and h5py do"
            )


def _read_columns(source, stored, rows) -> dict[str, np.ndarray]:
    """The columns that matter, checked, as float32 or bool; read without a copy in another type."""
    optional = ("timeouts", "next_observations") if rows == "all" else ("timeouts",)
    stored = {key: stored[key] for key in (*NEEDED, *optional) if key in stored}
    _check_shapes(source, stored)
    columns = {}
    for key, column in stored.items():
        as_it_is = key in FLAGS or column.dtype == np.float32
        try:
            values = column[()] if as_it_is else column.astype(np.float32)[()]
        except MemoryError as error:
            raise InputError(
                f"{source}: '{key}', {column.shape}, does not fit into memory ({error}): give "
                "fewer rows, or put a whole file in its place, if it has not so many"
            ) from None
        _check_finite(source, key, values)
        if key in FLAGS and (odd := (values != 0) & (values != 1)).any():
            raise InputError(
                f"{source}: '{key}' is {values.flat[odd.argmax()]:g} at row {odd.argmax()}: give 0 "
                "or 1 in every row"
            )
        values = values.reshape(-1) if key in ONE_A_ROW else values
        columns[key] = values.astype(bool) if key in FLAGS else values
    _check_actions(source, columns["actions"])
    return columns


def _check_shapes(source, columns) -> None:
    observations = columns["observations"]
    for key, column in columns.items():
        axes, shape = (1 if key in ONE_A_ROW else 2), column.shape
        if axes == 1 and shape[1:] == (1,):
            shape = shape[:1]  # as D4RL reads it too
        if len(shape) != axes or column.dtype.kind not in "biuf":
            raise InputError(
                f"{source}: '{key}' has type {column.dtype} and shape {column.shape}: it needs "
                f"numbers, {'one a row' if axes == 1 else 'rows by dimensions'}"
            )
        if shape[0] != observations.shape[0]:
            raise InputError(
                f"{source}: '{key}' has {shape[0]} rows but 'observations' has "
                f"{observations.shape[0]}: every key needs one row a transition"
            )
        if not column.size:
            raise InputError(f"{source}: '{key}' is empty: the data needs at least one transition")
        if key == "next_observations" and shape != observations.shape:
            raise InputError(
                f"{source}: 'next_observations' has shape {shape} but 'observations' "
                f"{observations.shape}: they need the same dimensions"
            )


def _check_finite(source, key, column) -> None:
    bad = ~np.isfinite(column.reshape(len(column), -1)).all(axis=1)
    if bad.any():
        raise InputError(
            f"{source}: '{key}' is not finite in float32 at row {bad.argmax()} ({bad.sum()} such "
            "rows): remove those episodes from the data"
        )


def _check_actions(source, actions) -> None:
    outside = np.abs(actions).max(axis=1) > 1 + 1e-6
    if outside.any():
        row = outside.argmax()
        raise InputError(
            f"{source}: 'actions' reaches {np.abs(actions[row]).max():g} at row {row} "
            f"({outside.sum()} rows outside [-1, 1]): rescale or clip the actions to [-1, 1]"
        )


def _from_columns(source, spec, reference, rows, columns) -> Dataset:
    ends, keep = select_rows(columns, rows, spec.max_episode_steps)
    scattered = 0.0
    if "next_observations" in columns and len(ends) > 1:
        scattered = (ends & ~columns["terminals"] & ~columns.get("timeouts", np.False_))[:-1].mean()
    if not keep.any():
        raise InputError(f"{source} holds no transition whose successor is known: record episodes")
    observations, next_observations = columns["observations"], columns.get("next_observations")
    if not keep.all() or next_observations is None:
        kept = np.flatnonzero(keep)
        episode = np.cumsum(np.r_[0, ends[:-1]])[kept]
        ends = np.r_[episode[1:] != episode[:-1], True]
        next_observations = observations[np.minimum(kept + 1, len(keep) - 1)]
        columns = {key: columns[key][kept] for key in NEEDED}
    return Dataset(
        **{key: columns[key] for key in NEEDED},
        next_observations=next_observations,
        episode_ends=ends,
        env=spec,
        reference=reference,
        source=source,
        scattered=scattered,
    )


def select_rows(columns, rows: str, max_steps: int | None) -> tuple[np.ndarray, np.ndarray]:
    """Where episodes end, and which rows are transitions: bool [N] each.

    max_steps: the environment's time limit, which counts where no time-outs are recorded.
    rows=all: all with their recorded successors; without those, where the next row is the
    successor or the task ended. rows=qlearning: D4RL's qlearning_dataset, which takes the next row
    in any case and drops the last row of all and those that end by time-out.
    """
    terminals, timeouts = columns["terminals"], columns.get("timeouts")
    successors = columns.get("next_observations")
    if timeouts is not None and timeouts.any():
        max_steps = None  # recorded, perhaps under another limit than the environment's now
    ends = find_episode_ends(columns["observations"], successors, terminals, timeouts, max_steps)
    if rows == "qlearning":
        cut = timeouts if timeouts is not None else _d4rl_step_limits(terminals, max_steps)
        return ends, ~cut & (np.arange(len(cut)) < len(cut) - 1)
    return ends, np.ones_like(ends) if successors is not None else ~ends | terminals


def _d4rl_step_limits(terminals, max_steps) -> np.ndarray:
    """Rows that qlearning_dataset takes for time-outs where none are recorded: bool [N].

    It counts an episode's steps from 1 after a terminal, from 0 otherwise.
    """
    cut = np.zeros_like(terminals)
    first, step = 0, 0
    for last in (*np.flatnonzero(terminals), len(terminals) - 1):
        steps = np.arange(step, step + last + 1 - first)
        cut[first : last + 1] = steps % max_steps == max_steps - 1 if max_steps else False
        first, step = last + 1, 0 if cut[last] else 1
    return cut


# ---------------------------------------------------------------------------------------- Minari


def _load_minari(dataset_id, env, keys, rows, cache_dir) -> Dataset:
    stored = _find_minari(dataset_id)
    metadata = stored.storage.metadata
    named = metadata.get("eval_env_spec") or metadata.get("env_spec")
    spec = _registered_spec(named, dataset_id) if named and not env else env_spec(env, dataset_id)
    try:
        reference = _stored_reference(metadata)
        columns = _flat_columns(dataset_id, stored, keys, rows, cache_dir)
    except InputError:
        raise
    except Exception as error:  # whatever Minari makes of data that are not as it writes them
        raise _broken_minari(dataset_id, stored.storage.data_path, error) from None
    return _from_columns(dataset_id, spec, reference, rows, columns)


def _broken_minari(dataset_id, path, error):
    reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
    return InputError(
        f"Minari data set '{dataset_id}' in {path} is broken ({reason}): mend it, or delete it and "
        "have it downloaded or recorded again"
    )


def _registered_spec(text: str, source: str) -> EnvSpec:
    """The environment of that name that is registered here, as the data set wants it made.

    Its arguments, time limit and Gymnasium's own wrappers are the data's; their code is not run.
    """
    try:
        named = json.loads(text)
        env_id, kwargs = str(named["id"]), dict(named.get("kwargs") or {})
        wrappers = [
            WrapperSpec(wrapper["name"], str(wrapper["entry_point"]), wrapper.get("kwargs"))
            for wrapper in named.get("additional_wrappers") or ()
        ]
    except (ValueError, TypeError, KeyError, AttributeError):
        raise InputError(
            f"{source} does not tell its environment in a way that can be read: give the Gymnasium "
            "id with --config.env=<id>"
        ) from None
    foreign = [x.name for x in wrappers if not x.entry_point.startswith("gymnasium.wrappers.")]
    if ":" in env_id or foreign or _names_path([kwargs, *(x.kwargs for x in wrappers)]):
        raise InputError(
            f"{source} asks for code or files of its own, by its environment "
            f"{', with '.join([env_id, *foreign])}: give --config.env={env_id} if you trust it"
        )
    spec = env_spec(env_id, source)
    spec.kwargs |= kwargs
    spec.additional_wrappers = tuple(wrappers)
    spec.max_episode_steps = named.get("max_episode_steps", spec.max_episode_steps)
    return spec


def _find_minari(dataset_id):
    """The data set, downloaded unless Minari has it."""
    local_id = dataset_id.partition("://")[2].partition("/")[2] or dataset_id
    try:
        return minari.load_dataset(local_id, download=False)
    except Exception as error:  # whatever Minari makes of what is there
        path = ""
        with contextlib.suppress(ValueError, TypeError):  # of what is no id
            path = get_dataset_path(local_id)
        if os.path.isdir(path):
            raise _broken_minari(dataset_id, path, error) from None
    hint = d4rl.suggest(dataset_id)
    try:
        if hint or not re.search(r"-v\d+$", dataset_id):
            raise ValueError("ids are of the form [namespace/]name-v<number>")
        with contextlib.suppress(ImportError):
            from huggingface_hub.utils import logging

            logging.set_verbosity_error()  # not a line for every retry
        minari.download_dataset(dataset_id)
        return minari.load_dataset(local_id, download=False)
    except Exception as error:  # whatever Minari and the client of its remote raise
        reason = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
        reason = "not asked" if hint else reason
        raise InputError(
            f"no Minari data set '{dataset_id}', neither here nor from its remote ({reason}): "
            "`minari list local` and `minari list remote` show what there is, files are named "
            f"--config.dataset=d4rl:<file>{hint}"
        ) from None


def _flat_columns(source, stored, keys, rows, cache_dir) -> dict[str, np.ndarray]:
    """All episodes as columns, from a flat copy in `cache_dir` where there is one, else made."""
    digest = hashlib.blake2b(f"{FLAT_FORMAT}{keys}".encode(), digest_size=8)
    for folder, _, names in sorted(os.walk(stored.storage.data_path)):  # do its files change,
        for name in sorted(names):  # another copy is made
            status = os.stat(os.path.join(folder, name))
            digest.update(f"{name} {status.st_size} {status.st_mtime_ns}".encode())
    name = f"{stored.spec.dataset_id.replace('/', '-')}-{digest.hexdigest()}.hdf5"
    path = os.path.join(os.path.expanduser(cache_dir), "minari", name)
    with contextlib.suppress(OSError, KeyError), h5py.File(path, "r") as file:
        return _read_columns(source, file, rows)
    _check_own_episodes(source, stored)
    columns, unfinished = _join_episodes(source, stored, keys), f"{path}.{os.getpid()}"
    try:
        os.makedirs(os.path.dirname(path), exist_ok=True)
        with h5py.File(unfinished, "w") as file:
            for key, column in columns.items():
                file.create_dataset(key, data=column, fletcher32=True)
        os.replace(unfinished, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            os.remove(unfinished)
        reason = os.strerror(error.errno) if error.errno else error  # h5py's own are long
        print(f"warning: no flat copy is kept in {cache_dir} ({reason})", file=sys.stderr)
    return _read_columns(source, columns, rows)


def _check_own_episodes(source, stored) -> None:
    """Raises InputError for episodes that lead out of Minari's file, as _check_own does."""

    def links_out(name, link):
        return name if isinstance(link, h5py.ExternalLink) else None

    def lies_out(name, item):
        is_column = isinstance(item, h5py.Dataset)
        return name if is_column and (item.external or item.is_virtual) else None

    for file in Path(stored.storage.data_path).glob("*.hdf5"):
        with h5py.File(file, "r") as opened:
            if name := opened.visititems_links(links_out) or opened.visititems(lies_out):
                raise InputError(f"{source}: '{name}' lies in another file: put its numbers here")


def _join_episodes(source, stored, keys) -> dict[str, np.ndarray]:
    """D4RL's columns of a Minari data set, with true successors."""
    check_keys(keys, stored.observation_space, source)
    columns, start = {}, 0
    for episode in stored.iterate_episodes():
        observations = flatten_observations(episode.observations, keys)  # a row more than actions
        parts = {
            "observations": observations[:-1],
            "next_observations": observations[1:],
            "actions": episode.actions.reshape(len(episode.actions), -1),
            "rewards": episode.rewards,
            "terminals": episode.terminations,
            # An episode cut short in the recording ends all the same.
            "timeouts": np.r_[episode.truncations[:-1], not episode.terminations[-1]],
        }
        stop = start + len(episode.rewards)
        for key, part in parts.items():
            if key not in columns:
                kind = bool if key in FLAGS else np.float32
                columns[key] = np.empty((stored.total_steps, *part.shape[1:]), kind)
            columns[key][start:stop] = part
        start = stop
    return columns


# --------------------------------------------------------------------------------- without a file


def _stored_reference(metadata) -> tuple[float, float] | None:
    """(random, expert) return from a file's own metadata. Raises TypeError or ValueError."""
    if metadata.get("ref_min_score") is None or metadata.get("ref_max_score") is None:
        return None
    low, high = float(metadata["ref_min_score"]), float(metadata["ref_max_score"])
    if not -np.inf < low < high < np.inf:
        raise ValueError(f"{low} is to be below {high}")
    return low, high


def _no_data(env: str, keys) -> Dataset:
    spec = env_spec(env, env)
    made = make_env(spec)
    check_keys(keys, made.observation_space, env)
    width = observation_width(made.observation_space, keys)
    observations = np.zeros((0, width), np.float32)
    actions = np.zeros((0, observation_width(made.action_space)), np.float32)
    made.close()
    return Dataset(
        observations=observations,
        actions=actions,
        rewards=np.zeros(0, np.float32),
        next_observations=observations,
        terminals=np.zeros(0, bool),
        episode_ends=np.zeros(0, bool),
        env=spec,
        reference=d4rl.reference_of(spec.name),
        source=spec.id,
    )
