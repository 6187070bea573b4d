"""Results that take long: one process makes them, the others wait, and a file keeps them."""

import contextlib
import os
import sys

import filelock
import numpy as np

from common.data.dataset import fingerprint
from common.run.stopping import stop_if_told

# Besides the data, what the labels that IQL makes depend on.
FIELDS = ("seed", "num_seeds", "expectile", "iql_steps", "batch_size", "discount")
FIELDS += ("target_update_rate", "matmul_precision")


@contextlib.contextmanager
def locked(path: str, doing: str):
    """Holds the lock file `path`; `doing` is what a process does that others wait for."""
    lock, waits = filelock.FileLock(path), False
    while not lock.is_locked:
        try:
            lock.acquire(timeout=1 if waits else 0)
        except filelock.Timeout:
            if not waits:
                print(f"waiting for the process that {doing} ({path})", file=sys.stderr, flush=True)
            waits = True
            stop_if_told()
    try:
        yield
    finally:
        lock.release()


def cached_labels(make, data, config) -> np.ndarray:
    """The labels bool [S, N] that make() returns, from an earlier run where one has made them.

    data: the arrays that IQL learns from, or None.
    """
    arrays = fingerprint(*(np.asarray(x) for x in data if x is not None))
    name = "-".join(map(str, (arrays, *(config[field] for field in FIELDS))))
    make_all = lambda: {"trusted": make()}
    return cached(config.cache_dir, f"labels/{name}", make_all, "makes these labels")["trusted"]


def cached(cache_dir: str, name: str, make, doing: str) -> dict[str, np.ndarray]:
    """The arrays that make() returns, kept in `cache_dir`; a broken file is made again."""
    path = os.path.join(os.path.expanduser(cache_dir), f"{name}.npz")
    if (arrays := _load(path)) is not None:
        return arrays
    with contextlib.ExitStack() as stack:
        try:  # before the work
            os.makedirs(os.path.dirname(path), exist_ok=True)
            stack.enter_context(locked(f"{path}.lock", doing))
        except OSError as error:
            _warn(path, error)
            return make()
        if (arrays := _load(path)) is None:
            arrays = make()
            try:
                np.savez(f"{path}.new.npz", **arrays)  # with checksums
                os.replace(f"{path}.new.npz", path)
            except OSError as error:
                _warn(path, error)
    return arrays


def _load(path):
    try:
        with np.load(path, allow_pickle=False) as file:
            return dict(file)
    except Exception:  # missing or broken: NumPy and zipfile raise many kinds
        return None


def _warn(path, error):
    reason = error.strerror or error
    print(f"warning: {path} cannot be kept ({reason}): set --config.cache_dir", file=sys.stderr)
