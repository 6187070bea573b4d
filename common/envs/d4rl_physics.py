"""D4RL's physics on a current MuJoCo: the inertia that older builds gave to capsules.

Until MuJoCo 2.1.1 a capsule had the mass and inertia of a cylinder of length 2 h + r, where h is
its half-length and r its radius; since then both are exact. D4RL's data and reference scores come
from the older builds. Nothing else in Gymnasium's v4 models has changed. `python
benchmarks/physics.py hopper_medium-v2.hdf5` compares this with the states that a file recorded.
"""

import copy
import sys

import mujoco
import numpy as np
from gymnasium.envs.registration import EnvSpec, load_env_creator

# Gymnasium's models use old attributes, of which MuJoCo warns for every environment.
mujoco.set_mju_user_warning(lambda text: "deprecated" in text or print(text, file=sys.stderr))

MODELS = ("Hopper", "HalfCheetah", "Walker2d")
INERTIA = ("body_mass", "body_inertia", "body_ipos", "body_iquat")
INERTIA += ("body_sameframe", "geom_sameframe")  # which of the frames coincide


def d4rl_physics(spec: EnvSpec) -> EnvSpec | None:
    """The same environment with old capsules; None if D4RL has no such model."""
    if spec.id.startswith("ssar-jax/AntMaze-"):
        return spec  # it has them already
    if spec.name not in MODELS:
        return None
    spec = copy.deepcopy(spec)
    spec.kwargs |= {"stock": spec.entry_point}
    spec.entry_point = f"{__name__}:make_with_old_capsules"
    return spec


def make_with_old_capsules(stock: str, **kwargs):
    """The environment that the entry point `stock` makes, with old capsules."""
    env = load_env_creator(stock)(**kwargs)
    ours = env.unwrapped
    restore_old_capsules(ours.model, ours.data, mujoco.MjSpec.from_file(ours.fullpath))
    return env


def restore_old_capsules(model, data, source: mujoco.MjSpec) -> None:
    """Gives the bodies of a model, compiled from `source`, the inertia of the older builds."""
    for geom in source.geoms:
        if geom.type == mujoco.mjtGeom.mjGEOM_CAPSULE:
            geom.type, radius = mujoco.mjtGeom.mjGEOM_CYLINDER, geom.size[0]
            if np.isnan(geom.fromto[0]):  # it has a half-length instead
                geom.size[1] += radius / 2
            else:
                start, end = geom.fromto[:3], geom.fromto[3:]
                longer = radius / 2 * (end - start) / np.linalg.norm(end - start)
                geom.fromto = np.r_[start - longer, end + longer]
    cylinders = source.compile()
    for field in INERTIA:
        getattr(model, field)[:] = getattr(cylinders, field)
    mujoco.mj_setConst(model, data)
