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
    """Holds the lock file `path`; `doing` is what a process does that others wait for.

    Where no lock can be made, it prints a warning and continues without one.
    """
    lock, waits = filelock.FileLock(path), False
    while not lock.is_locked:
        try:
            lock.acquire(timeout=1 if waits else 0)
        except filelock.Timeout:
            if not waits:
                print(f"waiting for the process that {doing} ({path})", file=sys.stderr, flush=True)
            waits = True
            stop_if_told()
        except OSError as error:
            _warn(path, "locked", error, "start one run at a time")
            break
    try:
        yield
    finally:
        lock.release()


def cached_labels(make, data, config) -> np.ndarray:
    """The labels bool [S, N] that make() returns, kept in cache_dir; a broken file is made again.

    data: the arrays that IQL learns from, or None.
    """
    arrays = fingerprint(*(np.asarray(x) for x in data if x is not None))
    name = "-".join(map(str, (arrays, *(config[field] for field in FIELDS))))
    path = os.path.join(os.path.expanduser(config.cache_dir), "labels", f"{name}.npz")
    with locked(f"{path}.lock", "makes these labels"):
        # Missing or broken: NumPy and zipfile raise many kinds.
        with contextlib.suppress(Exception), np.load(path, allow_pickle=False) as file:
            return file["trusted"]
        labels = make()
        try:
            np.savez(f"{path}.new.npz", trusted=labels)  # with checksums
            os.replace(f"{path}.new.npz", path)
        except OSError as error:
            _warn(path, "kept", error, "set --config.cache_dir")
    return labels


def _warn(path, what, error, fix):
    reason = error.strerror or error
    print(f"warning: {path} cannot be {what} ({reason}): {fix}", file=sys.stderr, flush=True)
