"""D4RL's physics on a current MuJoCo: the inertia that older builds gave to capsules.

Until MuJoCo 2.1.1 a capsule weighed as much as a cylinder of length 2 h + r, h its half-length and
r its radius, and had that cylinder's inertia; since then both are exact. D4RL's data and reference
scores come from the older builds. Everything else of Gymnasium's v4 models is as it was.

    python -m common.physics hopper_medium-v2.hdf5

replays rows of a file that recorded the simulator's state (`infos/qpos`, `infos/qvel`), each for
one step, and prints how far the simulator ends from the recorded successor.
"""

from __future__ import annotations

import argparse
import copy
import sys
from typing import NamedTuple

import h5py
import mujoco
import numpy as np
from gymnasium.envs.registration import EnvSpec, load_env_creator

from common.checks import InputError

DENSITY = 1000.0  # kg/m³, MuJoCo's default
TOTAL_MASS = {"HalfCheetah": 14.0}  # kg, to which its XML file rescales the model
MODELS = ("Hopper", "HalfCheetah", "Walker2d")


def is_known(spec: EnvSpec) -> bool:
    """Whether D4RL has such a model."""
    return spec.name in MODELS or spec.entry_point == "common.antmaze:AntMaze"


def d4rl_physics(spec: EnvSpec) -> EnvSpec:
    """The same environment with old capsules. Raises InputError where D4RL has no such model."""
    if spec.entry_point == "common.antmaze:AntMaze":
        return spec  # it has them already
    if not is_known(spec):
        raise InputError(
            f"--config.physics=d4rl is for Hopper, HalfCheetah, Walker2d and AntMaze, not for "
            f"{spec.id}: use --config.physics=stock"
        )
    if spec.version < 4:
        raise InputError(f"{spec.id} needs mujoco-py: use --config.env={spec.name}-v4")
    spec = copy.deepcopy(spec)
    spec.kwargs |= {"stock": spec.entry_point, "total_mass": TOTAL_MASS.get(spec.name)}
    spec.entry_point = "common.physics:make_with_old_capsules"
    return spec


def make_with_old_capsules(stock: str, total_mass: float | None, **kwargs):
    """The environment that the entry point `stock` makes, with old capsules."""
    env = load_env_creator(stock)(**kwargs)
    restore_old_capsules(env.unwrapped.model, env.unwrapped.data, DENSITY, total_mass)
    return env


def restore_old_capsules(model, data, density: float, total_mass: float | None = None) -> None:
    """Gives every body of a model of spheres and capsules the inertia that older builds gave it.

    density: kg/m³, of all geoms. total_mass: kg, of the whole model afterwards, if given.
    """
    for body in range(1, model.nbody):
        geoms = np.flatnonzero(model.geom_bodyid == body)
        masses, inertias = zip(*(_geom_inertia(model, g, density) for g in geoms), strict=True)
        mass = sum(masses)
        centre = np.average(model.geom_pos[geoms], axis=0, weights=masses)
        inertia = np.zeros((3, 3))
        for geom, m, principal in zip(geoms, masses, inertias, strict=True):
            turn, offset = _matrix(model.geom_quat[geom]), model.geom_pos[geom] - centre
            inertia += turn @ np.diag(principal) @ turn.T
            inertia += m * (offset @ offset * np.eye(3) - np.outer(offset, offset))  # Steiner
        moments, axes = np.linalg.eigh(inertia)
        axes[:, 2] *= np.sign(np.linalg.det(axes))  # a rotation, not a reflection
        quat = np.zeros(4)
        mujoco.mju_mat2Quat(quat, axes.ravel())
        model.body_mass[body], model.body_inertia[body] = mass, moments
        model.body_ipos[body], model.body_iquat[body] = centre, quat
        # The frames above hold, whatever the compiler found to coincide.
        model.body_sameframe[body] = model.geom_sameframe[geoms] = 0
    if total_mass is not None:
        scale = total_mass / model.body_mass.sum()
        model.body_mass[:] *= scale
        model.body_inertia[:] *= scale
    mujoco.mj_setConst(model, data)


def _geom_inertia(model, geom: int, density: float) -> tuple[float, np.ndarray]:
    """Mass, and moments about the geom's own axes [3], of a sphere or an old capsule."""
    radius, half_length = model.geom_size[geom][:2]
    if model.geom_type[geom] == mujoco.mjtGeom.mjGEOM_SPHERE:
        mass = density * 4 / 3 * np.pi * radius**3
        return mass, np.full(3, 2 / 5 * mass * radius**2)
    if model.geom_type[geom] != mujoco.mjtGeom.mjGEOM_CAPSULE:
        raise ValueError(f"geom {geom} is neither a sphere nor a capsule")
    length = 2 * half_length + radius
    mass = density * np.pi * radius**2 * length
    across = mass * (3 * radius**2 + length**2) / 12
    return mass, np.array([across, across, mass * radius**2 / 2])


def _matrix(quat) -> np.ndarray:
    matrix = np.zeros(9)
    mujoco.mju_quat2Mat(matrix, quat)
    return matrix.reshape(3, 3)


# ------------------------------------------------------------------- does it simulate as recorded?


class Replay(NamedTuple):
    """Rows replayed for one step: the largest error over the dimensions, of each row."""

    observation: np.ndarray  # [K], before the step: 0 where state and row belong together
    next_observation: np.ndarray  # [K], after it
    reward: np.ndarray  # [K]


def replay(path: str, spec: EnvSpec, num_rows: int = 1000, seed: int = 0) -> Replay:
    """Sets the simulator to recorded states of a D4RL file, takes one step each, and compares.

    Takes up to `num_rows` rows at random, none of them the last of an episode. Raises InputError
    when the file has no such rows, or no states of this environment.
    """
    from common.environments import make_env

    env = make_env(spec)
    env.reset(seed=seed)
    simulator, errors = env.unwrapped, []
    with h5py.File(path, "r") as file:
        needed = ("infos/qpos", "infos/qvel", "observations", "actions", "rewards", "terminals")
        missing = [key for key in needed if key not in file]
        if missing:
            raise InputError(f"{path} has no {missing[0]}: give a file that records it")
        widths = file["infos/qpos"].shape[1], file["infos/qvel"].shape[1]
        if widths != (simulator.model.nq, simulator.model.nv):
            raise InputError(
                f"{path} has states of {widths} numbers, but {spec.id} "
                f"{(simulator.model.nq, simulator.model.nv)}: name its environment with --env=<id>"
            )
        ends = file["terminals"][()].astype(bool)
        if "timeouts" in file:
            ends |= file["timeouts"][()].astype(bool)
        rows = np.flatnonzero(~ends[:-1])
        if not len(rows) or num_rows < 1:
            raise InputError(
                f"{path}: no rows to replay: give --rows=1 or more, and longer episodes"
            )
        num_rows = min(num_rows, len(rows))
        rows = np.sort(np.random.default_rng(seed).choice(rows, num_rows, replace=False))
        qpos, qvel, observations, actions, rewards = (file[key][rows] for key in needed[:-1])
        stored = "next_observations" in file
        following = file["next_observations"][rows] if stored else file["observations"][rows + 1]
        goals = file["infos/goal"][rows] if "infos/goal" in file else None
    for i in range(num_rows):
        simulator.set_state(qpos[i].astype(float), qvel[i].astype(float))
        if goals is not None:
            simulator.goal = goals[i]
        start = simulator._get_obs()
        end, reward, *_ = simulator.step(actions[i])
        pairs = ((start, observations[i]), (end, following[i]), (reward, rewards[i]))
        errors.append([np.abs(np.subtract(*pair)).max() for pair in pairs])
    env.close()
    return Replay(*np.array(errors).T)


def main(arguments=None) -> None:
    """Replays files under D4RL's physics and, of a robot, Gymnasium's; prints the errors."""
    from common import d4rl
    from common.environments import env_spec

    parser = argparse.ArgumentParser(description=replay.__doc__.splitlines()[0])
    parser.add_argument("files", nargs="+", help="HDF5 files with infos/qpos and infos/qvel")
    parser.add_argument("--env", help="Gymnasium id; by default what a file tells, or its name")
    parser.add_argument("--rows", type=int, default=1000, help="of each file, at most")
    given = parser.parse_args(arguments)
    try:
        for path in given.files:
            task = d4rl.find_task("", path)
            with h5py.File(path, "r") as file:
                env_id = given.env or file.attrs.get("env_id") or (task.env_id if task else None)
            spec = env_spec(env_id, path)
            ways = {"d4rl": d4rl_physics(spec)} | ({"stock": spec} if spec.name in MODELS else {})
            for name, way in ways.items():
                found = replay(path, way, given.rows)
                if name == "d4rl":
                    print(f"{path}: {len(found.reward)} rows in {spec.id}, error after one step:")
                texts = [
                    f"{key} {np.median(error):.1e} (at most {error.max():.1e})"
                    for key, error in found._asdict().items()
                ]
                print(f"  physics={name}: median of {', '.join(texts)}")
    except (InputError, OSError) as error:
        sys.exit(f"physics: {error}".replace("--config.env", "--env"))


if __name__ == "__main__":
    main()
