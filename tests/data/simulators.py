"""Models to compare with, and recordings of the simulator's states."""

import mujoco
import numpy as np

from common.envs.make import make_env

STATES = {
    "infos/qpos": lambda env: env.data.qpos.copy(),
    "infos/qvel": lambda env: env.data.qvel.copy(),
}


def assert_old_capsules(model, density):
    """Every body that is one capsule has the inertia of a cylinder of length 2 h + r."""
    capsules = model.geom_type == mujoco.mjtGeom.mjGEOM_CAPSULE
    alone = model.body_geomnum[model.geom_bodyid] == 1
    radius, half_length = model.geom_size[capsules & alone, :2].T
    length = 2 * half_length + radius
    mass = density * np.pi * radius**2 * length
    across = mass * (3 * radius**2 + length**2) / 12
    moments = np.sort([across, across, mass * radius**2 / 2], axis=0).T
    bodies = model.geom_bodyid[capsules & alone]
    np.testing.assert_allclose(model.body_mass[bodies], mass, rtol=1e-6)
    np.testing.assert_allclose(np.sort(model.body_inertia[bodies]), moments, rtol=1e-6)
    np.testing.assert_allclose(model.body_ipos[bodies], model.geom_pos[capsules & alone], atol=1e-9)
    assert len(bodies) >= 4


def random_actions(spec):
    rng = np.random.default_rng(0)
    return lambda obs, _: rng.uniform(-1, 1, make_env(spec).action_space.shape)
