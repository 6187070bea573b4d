"""IQL's labels, which take as long as a run, are kept for the next one."""

import contextlib
import io
import os
import sys

import numpy as np

from common.data.dataset import fingerprint
from common.run.workdir import write_file

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
    # Missing or broken: NumPy and zipfile raise many kinds.
    with contextlib.suppress(Exception), np.load(path, allow_pickle=False) as file:
        return file["trusted"]
    labels = make()
    np.savez(content := io.BytesIO(), trusted=labels)  # with checksums
    try:
        os.makedirs(os.path.dirname(path), exist_ok=True)
        write_file(path, content.getvalue())
    except OSError as error:
        what = f"{path} cannot be kept ({error.strerror}): set --config.cache_dir"
        print(f"warning: {what}", file=sys.stderr, flush=True)
    return labels
