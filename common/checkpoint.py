"""The trained state on disk, through orbax: at the end, and on the way to it."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import shutil
import sys
import tempfile
import time

import jax
import numpy as np
import orbax.checkpoint as ocp
from tqdm import tqdm

from common.checks import NO_ROOM, InputError, Unwritable
from common.dataset import Normalizer
from common.stopping import note_saved, stop, stop_is_due, unhurried

FORMAT = 4  # of what a run can go on from
DIGESTS = "digests.json"  # beside orbax's files: what they hash to


def save_checkpoint(workdir, normalizer, trusted, data_fingerprint, name, state) -> str:
    """Writes all that training made to `workdir`/`name`, atomically; returns that folder.

    state: a pytree of arrays. trusted: D̂, bool [S, N]. data_fingerprint: of the data, in hex.
    Raises Unwritable.
    """
    path = os.path.join(os.path.abspath(workdir), name)
    tree = {
        "state": jax.tree.map(_to_host, state),
        "normalizer": normalizer._asdict(),
        "data_fingerprint": np.frombuffer(bytes.fromhex(data_fingerprint), np.uint8),
    }
    if trusted.size:  # there may be no data
        tree["trusted"] = np.ascontiguousarray(trusted)
    with _unwritable(path), unhurried():
        _reserve(os.path.abspath(workdir), tree)
        with _checkpointer() as checkpointer:
            checkpointer.save(path, tree, force=True)
        _write_digests(path)
    return path


def load_checkpoint(workdir: str, like=None, name="checkpoint"):
    """What save_checkpoint wrote: as nested dictionaries, or as a tree like `like`.

    like: arrays, or what jax.eval_shape makes of the function that built them. Raises ValueError
    when a file is not as it was written.
    """
    if broken := _broken(os.path.join(workdir, name)):
        raise ValueError(broken)
    with _checkpointer() as checkpointer:
        words = lambda x: jax.eval_shape(jax.random.key_data, x) if _is_key(x) else x
        shapes = jax.tree.map(words, like) if like else None
        tree = checkpointer.restore(os.path.join(os.path.abspath(workdir), name), shapes)
    return jax.tree.map(_like, tree, like) if like else tree


class Checkpoints:
    """The last two states of unfinished work, in a folder of their own, each written atomically.

    What was being written when the process died is not there the next time. folder: None where
    nothing is to be kept. minutes: from one to the next. is_needed: whether a folder that cannot be
    written ends the work, or but costs a warning. Raises OSError where it cannot be written.
    """

    def __init__(self, folder: str | None, minutes: float, is_needed: bool = True):
        self.folder, self.is_needed = folder and os.path.abspath(folder), is_needed
        if not folder:
            return
        try:
            os.makedirs(self.folder, exist_ok=True)
        except OSError as error:
            if is_needed:
                raise
            self._do_without(Unwritable(self.folder, error))
            return
        options = ocp.CheckpointManagerOptions(
            max_to_keep=2,
            enable_async_checkpointing=False,  # the state's memory is written to next
            create=False,
            cleanup_tmp_directories=True,
            multiprocessing_options=_this_process_alone(ocp.options.MultiprocessingOptions),
        )
        self.manager = ocp.CheckpointManager(self.folder, options=options)
        self.seconds, self.written = 60 * minutes, time.perf_counter()

    def due(self, is_interval: bool = True) -> bool:
        """Whether it is time to save: also when the run was told to stop.

        is_interval: whether an interval has just ended: every one is saved if `minutes` are 0.
        """
        if not self.folder:
            return False
        is_time = time.perf_counter() - self.written >= self.seconds
        return stop_is_due() or is_time and (is_interval or self.seconds > 0)

    def save(self, step: int, tree, **records) -> None:
        """Writes a pytree of arrays as of `step`, and what JSON can hold beside it.

        Raises Stopped afterwards if the run was told to stop. Raises Unwritable.
        """
        with unhurried():
            self._write(step, tree, records)
        self.written = time.perf_counter()
        if stop_is_due():
            stop()

    def _write(self, step, tree, records):
        flat = {path: _to_host(x) for path, x in _by_path(tree) if x.size}
        records |= {"step": step, "format": FORMAT}
        args = ocp.args.Composite(
            tree=ocp.args.StandardSave(flat), records=ocp.args.JsonSave(records)
        )
        try:
            with _unwritable(self.folder):
                _reserve(self.folder, flat, json.dumps(records))
                number = (self.manager.latest_step() or 0) + 1
                self.manager.save(number, args=args)
                _write_digests(os.path.join(self.folder, str(number)))
            note_saved(f"{records.get('phase', 'iql')} step {step}")
        except Unwritable as error:
            if self.is_needed:
                raise
            self._do_without(error)

    def _do_without(self, error):
        tqdm.write(f"warning: no checkpoints are kept: {error.reason}", file=sys.stderr)
        self.folder = None

    def close(self) -> None:
        """Nothing more is read or written."""
        self.manager.close()

    def remove(self) -> None:
        """The work is done."""
        self.close()
        os.rename(self.folder, f"{self.folder}.old")  # at once: half of it would look broken
        shutil.rmtree(f"{self.folder}.old", ignore_errors=True)

    def resume(self, tree):
        """`tree` and its step as last saved; as it is, and 0, without any that fits."""
        saved = self.folder and self.load()
        if not saved:
            return tree, 0
        try:
            check_format(saved[1])
            return fill(tree, saved[0]), saved[1]["step"]
        except ValueError as error:
            self._set_aside(self.manager.latest_step(), f"of another version or shape: {error}")
            return self.resume(tree)

    def load(self):
        """The newest whole one: its arrays by path, and its records; None without any."""
        args = ocp.args.Composite(tree=ocp.args.StandardRestore(), records=ocp.args.JsonRestore())
        for step in sorted(self.manager.all_steps(), reverse=True):
            path = os.path.join(self.folder, str(step))
            if broken := _broken(path):  # orbax would fill the screen
                self._set_aside(step, broken)
                continue
            try:
                saved = self.manager.restore(step, args=args)
            except Exception as error:  # whatever orbax makes of it
                self._set_aside(step, " ".join(str(error).split())[:120])
            else:
                return saved.tree, saved.records
        return None

    def _set_aside(self, step, reason):
        path = os.path.join(self.folder, str(step))
        number = sum(name.startswith("broken") for name in os.listdir(self.folder))
        aside = os.path.join(self.folder, f"broken_{number}_of_step_{step}")
        print(
            f"warning: the checkpoint {path} is broken ({reason}): it is now {aside}, and the one "
            "before it is gone on from, if there is one",
            file=sys.stderr,
        )
        os.rename(path, aside)
        self.manager.reload()


def fill(like, arrays: dict):
    """A tree like `like` of the arrays that Checkpoints.save took from one.

    Raises ValueError, naming it, for an array that is missing or of another shape or type.
    """

    def fit(path, like):
        if not like.size:
            return like
        name, x = _name(path), arrays.get(_name(path))
        raw = jax.eval_shape(jax.random.key_data, like) if _is_key(like) else like
        if x is None or x.shape != raw.shape or x.dtype != raw.dtype:
            found = "is missing" if x is None else f"is {x.dtype}{list(x.shape)}"
            raise ValueError(f"{name} {found}, not {raw.dtype}{list(raw.shape)}")
        return _like(x, like)

    return jax.tree_util.tree_map_with_path(fit, like)


def _by_path(tree):
    return ((_name(path), x) for path, x in jax.tree_util.tree_leaves_with_path(tree))


def _name(path):
    return jax.tree_util.keystr(path, simple=True, separator=".")


def check_format(records: dict) -> None:
    """Raises ValueError for what another version has saved."""
    if records.get("format") != FORMAT:
        raise ValueError(f"its format is {records.get('format')}, not {FORMAT}")


def _write_digests(path):
    """After orbax's files, what they hash to: it does not notice when a stored number changes."""
    with open(os.path.join(path, f"{DIGESTS}.new"), "w") as file:
        json.dump(_digests(path), file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(os.path.join(path, f"{DIGESTS}.new"), os.path.join(path, DIGESTS))


def _digests(path):
    found = {}
    for parent, _, names in os.walk(path):
        for name in names:
            file = os.path.join(parent, name)
            if not name.startswith(DIGESTS):
                with open(file, "rb") as opened:
                    digest = hashlib.file_digest(opened, "sha256").hexdigest()
                found[os.path.relpath(file, path)] = digest
    return found


def _broken(path):
    """What is wrong with the files of a checkpoint, in a few words; nothing if all are whole."""
    try:
        with open(os.path.join(path, DIGESTS)) as file:
            written = json.load(file)
        now = _digests(path)
    except (OSError, ValueError) as error:
        return f"its {DIGESTS}: {getattr(error, 'strerror', None) or 'not readable'}"
    if not (written and isinstance(written, dict)):
        return f"its {DIGESTS}: not readable"
    if missing := sorted(written.keys() - now.keys()):
        return f"{missing[0]} is missing"
    changed = [name for name in written if written[name] != now[name]]
    return f"{changed[0]} is not as it was written" if changed else None


@contextlib.contextmanager
def _unwritable(path):
    """Turns what the disk, or orbax, says of it into Unwritable."""
    try:
        yield
    except OSError as error:
        raise Unwritable(path, error) from None
    except Exception as error:  # orbax's own, with the system's words in them
        if not any(os.strerror(number) in str(error) for number in (*NO_ROOM, errno.EACCES)):
            raise
        raise Unwritable(path, error) from None


def _reserve(folder, tree, text=""):
    """Raises OSError unless there is room for `tree`: orbax fills the screen when there is none."""
    size = sum(x.nbytes for x in jax.tree.leaves(tree)) + len(text)
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            os.posix_fallocate(file.fileno(), 0, int(1.1 * size) + 2**18)
    except OSError as error:
        if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL):  # of file systems that cannot tell
            raise


def _checkpointer():
    options = _this_process_alone(ocp.options.MultiprocessingOptions)
    return ocp.StandardCheckpointer(multiprocessing_options=options)


def _this_process_alone(options):
    """Several that share the seeds write a folder each."""
    i = jax.process_index()
    return options(primary_host=i, active_processes={i}, barrier_sync_key_prefix=f"process{i}")


def _is_key(x):
    return jax.numpy.issubdtype(x.dtype, jax.dtypes.prng_key)


def _to_host(x):
    """An array as orbax reads it back wherever that is; a PRNG key as its words."""
    return np.asarray(jax.random.key_data(x) if _is_key(x) else x)


def _like(x, like):
    """x as `like` is: a PRNG key, an array of NumPy's, or one of JAX's, where that lies."""
    if isinstance(like, np.ndarray):
        return np.asarray(x)
    x = jax.random.wrap_key_data(x) if _is_key(like) else jax.numpy.asarray(x)
    return jax.device_put(x, like.sharding) if isinstance(like, jax.Array) else x


def load_offline(config, data_fingerprint: str, state_like):
    """Where the run in `config.offline_checkpoint` stood when its offline training ended.

    state_like: a tree of the state's shapes. Returns the state, the normalizer and D̂, bool [S, N].
    Raises InputError when it has not ended, or when the run had other data.
    """
    flag = f"--config.offline_checkpoint={config.offline_checkpoint}"
    workdir = os.path.expanduser(config.offline_checkpoint)
    name = "offline_checkpoint"  # of a run that went on online
    if not os.path.isdir(os.path.join(workdir, name)):
        name = "checkpoint"
    try:
        saved = load_checkpoint(workdir, name=name)
        recorded = bytes(saved["data_fingerprint"]).hex()
        if recorded != data_fingerprint:
            raise InputError(
                f"{flag} was trained on other data ({recorded}) than "
                f"{config.dataset_path or config.dataset} ({data_fingerprint}): name its own data "
                "set with --config.dataset= or --config.dataset_path="
            )
        like = {key: value for key, value in saved.items() if key != "state"}
        saved = load_checkpoint(workdir, like | {"state": state_like}, name)
    except InputError:
        raise
    except Exception as error:  # whatever orbax makes of a file that is missing or broken
        raise InputError(
            f"{flag} has no usable checkpoint in {os.path.join(workdir, name)} "
            f"({' '.join(str(error).split())[:200]}): name a run whose offline training has ended"
        ) from None
    if np.any(saved["state"].online_step):
        raise InputError(f"{flag} has been trained online already: name an offline run")
    normalizer = {key: np.asarray(value) for key, value in saved["normalizer"].items()}
    return saved["state"], Normalizer(**normalizer), np.asarray(saved["trusted"])
