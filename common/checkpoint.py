"""The trained state on disk, through orbax, and the start of an online run from an offline one."""

from __future__ import annotations

import os

import jax
import numpy as np
import orbax.checkpoint as ocp

from common.checks import InputError
from common.dataset import Normalizer


def save_checkpoint(workdir, normalizer, trusted, data_fingerprint, name, state) -> str:
    """Writes all that training made to `workdir`/`name`, atomically; returns that folder.

    state: a pytree of arrays. trusted: D̂, bool [S, N]. data_fingerprint: of the data, in hex.
    """
    path = os.path.join(os.path.abspath(workdir), name)
    tree = {
        "state": jax.tree.map(_to_host, state),
        "normalizer": normalizer._asdict(),
        "data_fingerprint": np.frombuffer(bytes.fromhex(data_fingerprint), np.uint8),
    }
    if trusted.size:  # there may be no data
        tree["trusted"] = np.ascontiguousarray(trusted)
    with _checkpointer() as checkpointer:
        checkpointer.save(path, tree, force=True)
    return path


def load_checkpoint(workdir: str, like=None, name="checkpoint"):
    """What save_checkpoint wrote: as nested dictionaries, or as a tree like `like`.

    like: arrays, or what jax.eval_shape makes of the function that built them.
    """
    with _checkpointer() as checkpointer:
        words = lambda x: jax.eval_shape(jax.random.key_data, x) if _is_key(x) else x
        shapes = jax.tree.map(words, like) if like else None
        tree = checkpointer.restore(os.path.join(os.path.abspath(workdir), name), shapes)
    return jax.tree.map(_like, tree, like) if like else tree


def _checkpointer():
    """Of this process alone: several that share the seeds write a folder each."""
    i = jax.process_index()
    options = ocp.options.MultiprocessingOptions(
        primary_host=i, active_processes={i}, barrier_sync_key_prefix=f"process{i}"
    )
    return ocp.StandardCheckpointer(multiprocessing_options=options)


def _is_key(x):
    return jax.numpy.issubdtype(x.dtype, jax.dtypes.prng_key)


def _to_host(x):
    """An array as orbax reads it back wherever that is; a PRNG key as its words."""
    return np.asarray(jax.random.key_data(x) if _is_key(x) else x)


def _like(x, like):
    """x as `like` is: a PRNG key, an array of NumPy's, or one of JAX's."""
    if _is_key(like):
        return jax.random.wrap_key_data(x)
    return np.asarray(x) if isinstance(like, np.ndarray) else jax.numpy.asarray(x)


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
