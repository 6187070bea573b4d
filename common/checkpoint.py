"""The trained state on disk, through orbax."""

import os

import orbax.checkpoint as ocp


def save_checkpoint(workdir: str, tree) -> str:
    """Writes a pytree of arrays to `workdir`/checkpoint, atomically; returns that folder."""
    path = os.path.join(os.path.abspath(workdir), "checkpoint")
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(path, tree, force=True)
    return path


def load_checkpoint(workdir: str, like=None):
    """What save_checkpoint wrote: as nested dictionaries, or as a tree like `like`.

    like: arrays, or what jax.eval_shape makes of the function that built them.
    """
    with ocp.StandardCheckpointer() as checkpointer:
        return checkpointer.restore(os.path.join(os.path.abspath(workdir), "checkpoint"), like)
