"""IQL's labels: one process makes them, the others wait, and a file keeps them."""

import contextlib
import os
import sys

import numpy as np

from common.data.dataset import fingerprint
from common.run.workdir import locked

# Besides the data, what the labels depend on.
FIELDS = ("seed", "num_seeds", "expectile", "iql_steps", "batch_size", "discount")
FIELDS += ("target_update_rate", "matmul_precision")


def cached_labels(make, data, config) -> np.ndarray:
    """The labels bool [S, N] that make() returns, kept in cache_dir; a broken file is made again.

    data: the arrays that IQL learns from, or None.
    """
    arrays = fingerprint(*(np.asarray(x) for x in data if x is not None))
    name = "-".join(map(str, (arrays, *(config[field] for field in FIELDS))))
    path = os.path.join(config.cache_dir, "labels", f"{name}.npz")
    busy = f"waiting for the process that makes the labels {path}"
    with locked(f"{path}.lock", busy, waits=True):
        # Missing or broken: NumPy and zipfile raise many kinds.
        with contextlib.suppress(Exception), np.load(path, allow_pickle=False) as file:
            return file["trusted"]
        labels = make()
        try:
            np.savez(f"{path}.new.npz", trusted=labels)  # with checksums
            os.replace(f"{path}.new.npz", path)
        except OSError as error:
            what = f"{path} cannot be kept ({error.strerror or error}): set --config.cache_dir"
            print(f"warning: {what}", file=sys.stderr, flush=True)
    return labels
