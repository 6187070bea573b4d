"""The trained state on disk, through orbax, and the start of an online run from an offline one."""

from __future__ import annotations

import json
import os

import numpy as np
import orbax.checkpoint as ocp

from common.checks import ONLINE_FIELDS, InputError
from common.dataset import Normalizer


def save_checkpoint(workdir, normalizer, trusted, data_fingerprint, name, state) -> str:
    """Writes all that training made to `workdir`/`name`, atomically; returns that folder.

    state: a pytree of arrays. trusted: D̂, bool [S, N]. data_fingerprint: of the data, in hex.
    """
    path = os.path.join(os.path.abspath(workdir), name)
    tree = {
        "state": state,
        "normalizer": normalizer._asdict(),
        "data_fingerprint": np.frombuffer(bytes.fromhex(data_fingerprint), np.uint8),
    }
    if trusted.size:  # there may be no data
        tree["trusted"] = np.ascontiguousarray(trusted)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(path, tree, force=True)
    return path


def load_checkpoint(workdir: str, like=None, name="checkpoint"):
    """What save_checkpoint wrote: as nested dictionaries, or as a tree like `like`.

    like: arrays, or what jax.eval_shape makes of the function that built them.
    """
    with ocp.StandardCheckpointer() as checkpointer:
        return checkpointer.restore(os.path.join(os.path.abspath(workdir), name), like)


def load_offline(config, data_fingerprint: str, state_like):
    """Where the run in `config.offline_checkpoint` stood when its offline training ended.

    state_like: a tree of the state's shapes. Returns the state, the normalizer and D̂, bool [S, N].
    Raises InputError when there is no such run, or when it had other settings or other data.
    """
    flag = f"--config.offline_checkpoint={config.offline_checkpoint}"
    workdir = os.path.expanduser(config.offline_checkpoint)
    settings = load_settings(workdir)
    differing = [
        f"{field}={config[field]} (there {settings[field]})"
        for field in config
        if field not in ONLINE_FIELDS
        and field in settings
        and _plain(config[field]) != settings[field]
    ]
    if differing:
        raise InputError(
            f"{flag} was trained with other settings than {', '.join(differing)}: leave those out, "
            "and --config= too, to take the run's own"
        )
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


def load_settings(workdir: str) -> dict:
    """The settings of the run in `workdir`. Raises InputError when that is no run's folder."""
    path = os.path.join(os.path.expanduser(workdir), "config.json")
    try:
        with open(path) as file:
            return json.load(file)
    except (OSError, ValueError) as error:
        raise InputError(
            f"--config.offline_checkpoint={workdir} is no run's folder ({path}: {error}): "
            "give the --workdir of a finished offline run"
        ) from None


def _plain(value):
    """The value as it comes back from JSON."""
    if isinstance(value, float) and not np.isfinite(value):
        return None
    return list(value) if isinstance(value, tuple) else value
