"""Checkpoints: one file each, a SHA-256 followed by msgpack, written whole or not at all."""

import errno
import hashlib
import os
import sys
from pathlib import Path

import jax
import numpy as np
from flax import serialization

from common.run.errors import InputError, brief, explained
from common.run.workdir import write_file


def write(path: str, content: dict) -> None:
    """Replaces a file with nested dictionaries of arrays, numbers and text. Raises OSError."""
    data = serialization.msgpack_serialize(content)
    write_file(path, hashlib.sha256(data).digest() + data)
    _read(path)  # raises OSError if it reads back differently


def _read(path):
    with open(path, "rb") as file:
        digest, data = file.read(32), file.read()
    if hashlib.sha256(data).digest() != digest:
        raise OSError(errno.EIO, "its checksum does not match", path)
    return data


def to_dict(tree) -> dict:
    """A tree of arrays as nested dictionaries of NumPy arrays, PRNG keys as their words."""
    words = lambda x: jax.random.key_data(x) if _is_key(x) else x
    return serialization.to_state_dict(jax.device_get(jax.tree.map(words, tree)))


def from_dict(like, content: dict, what: str):
    """The inverse of to_dict: a tree like `like` in structure, shapes, types and devices.

    Raises InputError, beginning with `what`, when the content does not fit.
    """

    def fit(like, x):
        words, x = jax.eval_shape(jax.random.key_data, like) if _is_key(like) else like, np.array(x)
        if (x.shape, x.dtype) != (words.shape, words.dtype):
            raise ValueError(f"{x.dtype}{list(x.shape)} is not {words.dtype}{list(words.shape)}")
        x = jax.random.wrap_key_data(x) if _is_key(like) else x
        return jax.device_put(x, getattr(like, "sharding", None))

    try:
        return jax.tree.map(fit, like, serialization.from_state_dict(like, content))
    except ValueError as error:
        what = f"{what} is of another script or version ({brief(error)})"
        raise InputError(f"{what}: use those that wrote it") from None


def _is_key(x):
    return jax.numpy.issubdtype(x.dtype, jax.dtypes.prng_key)


def list_unfinished(folder: str, phase: str = "*") -> list[str]:
    """The checkpoints <phase>-<step>.msgpack in a folder, the newest first."""
    # The alphabetical order of iql, offline and online is their order in a run.
    place = lambda path: (path.stem.split("-")[0], int(path.stem.split("-")[1]))
    return [str(x) for x in sorted(Path(folder).glob(f"{phase}-*.msgpack"), key=place)][::-1]


def load_newest(folder: str, phase: str = "*") -> dict | None:
    """The newest intact checkpoint, None without one; broken ones are renamed with a warning."""
    for path in list_unfinished(folder, phase):
        try:
            return serialization.msgpack_restore(_read(path))
        except OSError as error:
            os.replace(path, f"{path}.broken")
            what = f"{path} is broken ({error.strerror}): using the one before it, if any"
            print(f"warning: {what}", file=sys.stderr)
    return None


def save_checkpoint(workdir: str, name: str, state, trusted, dataset) -> None:
    """Writes what training made, arrays [S, ...] and D̂ bool [S, N], to <workdir>/<name>.msgpack."""
    content = {"state": to_dict(state), "trusted": np.asarray(trusted)}
    content["normalizer"] = {"mean": dataset.normalizer.mean, "std": dataset.normalizer.std}
    content["fingerprint"] = dataset.fingerprint
    write(os.path.join(workdir, f"{name}.msgpack"), content)


def load_checkpoint(workdir: str, name: str = "checkpoint") -> dict:
    """What save_checkpoint wrote, as nested dictionaries of NumPy arrays. Raises InputError."""
    path = os.path.join(os.path.expanduser(workdir), f"{name}.msgpack")
    fix = "name the folder of a run whose training has ended"
    with explained(f"no usable checkpoint {path}", fix):
        return serialization.msgpack_restore(_read(path))


def load_offline(config, dataset, like):
    """State and D̂, bool [S, N], at the end of offline training in config.offline_checkpoint.

    like: a tree of the state's shapes. Raises InputError.
    """
    flag = f"--config.offline_checkpoint={config.offline_checkpoint}"
    saved = load_checkpoint(config.offline_checkpoint, _offline_path(config).stem)
    if saved["fingerprint"] != dataset.fingerprint:
        raise InputError(f"{flag} was trained on other data than {dataset.source}: give that data")
    if np.any(saved["state"].get("online_step", 0)):
        raise InputError(f"{flag} was already trained online: name an offline run")
    return from_dict(like, saved["state"], flag), saved["trusted"]


def origin(config, dataset) -> str:
    """What a run begins from: the data's fingerprint and the digest of an offline checkpoint."""
    path = config.offline_checkpoint and _offline_path(config)
    digest = path.read_bytes()[:32] if path and path.is_file() else b""
    return dataset.fingerprint + digest.hex()


def _offline_path(config):
    """The checkpoint from the end of offline training; a run that continued online has two."""
    path = Path(config.offline_checkpoint, "offline_checkpoint.msgpack")
    return path if path.exists() else path.with_name("checkpoint.msgpack")
