"""AntMaze v2: D4RL's ant, mazes and rules."""

import re

import h5py
import mujoco
import numpy as np
import pytest
from simulators import STATES, assert_old_capsules, random_actions
from toys import record, tiny_config, write_hdf5

from benchmarks import physics as benchmark
from common.data import load_dataset
from common.data.d4rl import TASKS
from common.envs import antmaze
from common.envs.make import env_spec, make_env


@pytest.fixture(scope="module", params=antmaze.MAZES)
def maze(request):
    return make_env(env_spec(f"ssar-jax/AntMaze-{request.param}-v2", "test"))


def test_the_maze_has_d4rls_rules(maze):
    ant = maze.unwrapped
    goals = {(5, 5): (0, 8), (8, 8): (20, 20), (9, 12): (32, 24)}  # x, y of the goal's cell
    assert tuple(ant.goal_cell) == goals[ant.cells.shape]
    assert maze.spec.max_episode_steps == (700 if ant.cells.shape == (5, 5) else 1000)
    assert (maze.observation_space.shape, maze.action_space.shape) == ((29,), (8,))
    assert ant.dt == pytest.approx(0.1)
    assert set(ant.model.actuator_gear[:, 0]) == {30}
    offsets, starts = [], []
    for seed in range(300):
        starts.append(maze.reset(seed=seed)[0])
        offsets.append(ant.goal - ant.goal_cell)
    offsets, starts = np.array(offsets), np.array(starts)
    assert offsets.min() >= 0 and 1.3 < offsets.max() <= 1.5
    np.testing.assert_allclose(offsets.mean(axis=0), 0.75, atol=0.08)
    assert np.abs(starts[:, :15] - ant.init_qpos)[:, [0, 1, 2, *range(7, 15)]].max() <= 0.1
    np.testing.assert_allclose(np.linalg.norm(starts[:, 3:7], axis=1), 1)
    np.testing.assert_allclose(starts[:, 15:].std(), 0.1, rtol=0.05)
    np.testing.assert_array_equal(maze.reset(seed=7)[0], starts[7])
    maze.reset()
    assert not np.array_equal(ant.goal, ant.goal_cell + offsets[7])  # a new one each


def test_the_goal_ends_the_episode(maze):
    ant, reached = maze.unwrapped, []
    maze.reset(seed=0)
    for distance in (0.0, 0.3, 0.8):
        qpos = ant.init_qpos.copy()
        qpos[:2] = ant.goal + [distance, 0]
        ant.set_state(qpos, np.zeros(14))
        _, reward, terminated, truncated, info = maze.step(np.zeros(8, np.float32))
        assert reward == terminated == info["success"]
        assert not truncated
        reached.append(terminated)
    assert reached == [True, True, False]


def test_the_ant_is_d4rls():
    """The masses of cylinders of density 5, and D4RL's contacts."""
    model = make_env(env_spec("ssar-jax/AntMaze-umaze-v2", "test")).unwrapped.model
    assert_old_capsules(model, density=5)
    for geom in (model.geom("floor"), model.geom("left_leg_geom")):
        np.testing.assert_allclose(geom.solref, [0.02, 1])
        np.testing.assert_allclose(geom.solimp[:3], [0.8, 0.8, 0.01])


def test_walls_are_where_the_map_has_them_and_hold(maze):
    ant = maze.unwrapped
    boxes = ant.model.geom_type == mujoco.mjtGeom.mjGEOM_BOX
    middles, sizes = ant.model.geom_pos[boxes], ant.model.geom_size[boxes]
    assert len(middles) == (ant.cells == "#").sum()
    np.testing.assert_array_equal(sizes, np.full((len(sizes), 3), [2, 2, 1]))
    inside = lambda xy: (np.abs(middles[:, :2] - xy) < 2).all(axis=1).any()
    for kind in "#R G":
        for xy in ant.centres(kind):
            assert inside(xy) == (kind == "#")
    maze.reset(seed=0)
    qvel = np.zeros(14)
    qvel[0] = -8.0  # m/s, towards the wall left of the start
    ant.set_state(ant.init_qpos.copy(), qvel)
    path = [maze.step(np.zeros(8, np.float32))[0][0] for _ in range(10)]
    assert min(path) > -2 and path[-1] < -0.3  # it did get there


def test_an_antmaze_file_loads_and_is_replayed(tmp_path, capsys):
    """D4RL's files have no next_observations; score 100 is a success in every episode."""
    spec, task = env_spec("ssar-jax/AntMaze-umaze-v2", "test"), TASKS["antmaze-umaze-v2"]
    spec.max_episode_steps = 60
    extra = STATES | {"infos/goal": lambda ant: ant.goal}
    columns = record(make_env(spec), 5, random_actions(spec), **extra)
    path = write_hdf5(tmp_path / task.file, **columns)
    config = tiny_config(path, dataset=task.name, env=None)
    with h5py.File(path, "a") as file:
        del file["next_observations"]
        file["rewards"][7] = 1
    data = load_dataset(config)
    assert (data.env.id, data.physics) == (spec.id, "d4rl")
    assert data.score(0.25) == 25
    benchmark.main([path, "--rows=50"])
    lines = capsys.readouterr().out.splitlines()
    errors = [float(error) for error in re.findall(r"\d\.\de[-+]\d+", lines[-1])]
    assert len(errors) == 6 and max(errors[:4]) < 1e-3
