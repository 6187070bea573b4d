"""The trained state on disk, through orbax."""

import os

import orbax.checkpoint as ocp


def save_checkpoint(workdir: str, tree) -> str:
    """Writes a pytree of arrays to `workdir`/checkpoint, atomically; returns that folder."""
    path = os.path.join(os.path.abspath(workdir), "checkpoint")
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(path, tree, force=True)
    return path


def load_checkpoint(workdir: str, like):
    """Reads what save_checkpoint wrote, into a tree like `like`: arrays or jax.eval_shape's."""
    with ocp.StandardCheckpointer() as checkpointer:
        return checkpointer.restore(os.path.join(os.path.abspath(workdir), "checkpoint"), like)
