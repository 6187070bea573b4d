"""D4RL's physics: capsules, who gets them, AntMaze's rules, and replaying recorded states."""

import mujoco
import numpy as np
import pytest
from files import load, refused, write
from toys import record, toy_columns

from benchmarks import physics as benchmark
from common.data.d4rl import TASKS
from common.envs import antmaze
from common.envs.d4rl_physics import d4rl_physics
from common.envs.make import env_spec, make_env

# kg: torso, thigh, leg, foot of the older MuJoCo
HOPPER = (3.53429174, 3.92699082, 2.71433605, 5.0893801)


def model_of(spec):
    return make_env(spec).unwrapped.model


@pytest.mark.parametrize(
    ("env", "density"),
    [
        ("Hopper-v4", 1000),
        ("HalfCheetah-v4", 14 / 0.02036827720850775),  # 14 kg; its old capsules have this volume
        ("Walker2d-v4", 1000),
        ("ssar-jax/AntMaze-umaze-v2", 5),
    ],
)
def test_capsules_weigh_as_in_older_builds_and_touch_as_in_this_one(env, density):
    """They have the inertia of cylinders of length 2 h + r, for half-length h and radius r."""
    stock, places = env_spec(env, "test"), []
    ours = model_of(d4rl_physics(stock))
    capsules = ours.geom_type == mujoco.mjtGeom.mjGEOM_CAPSULE
    alone = capsules & (ours.body_geomnum[ours.geom_bodyid] == 1)
    bodies, (radius, half_length) = ours.geom_bodyid[alone], ours.geom_size[alone, :2].T
    length = 2 * half_length + radius
    mass = density * np.pi * radius**2 * length
    across = mass * (3 * radius**2 + length**2) / 12
    moments = np.sort([across, across, mass * radius**2 / 2], axis=0).T
    assert len(bodies) >= 4
    np.testing.assert_allclose(ours.body_mass[bodies], mass, rtol=1e-6)
    np.testing.assert_allclose(np.sort(ours.body_inertia[bodies]), moments, rtol=1e-6)
    np.testing.assert_allclose(ours.body_ipos[bodies], ours.geom_pos[alone], atol=1e-9)
    np.testing.assert_allclose(ours.body_subtreemass[0], ours.body_mass.sum())  # by mj_setConst
    for model in (ours, model_of(stock)):
        data = mujoco.MjData(model)
        data.qpos[:] = model.qpos0 + np.random.default_rng(1).normal(0, 0.3, model.nq)
        mujoco.mj_kinematics(model, data)
        places.append(np.c_[model.geom_type, model.geom_size, data.geom_xpos, data.geom_xmat])
    np.testing.assert_allclose(*places, atol=1e-12)


def test_who_gets_which_physics(tmp_path):
    columns, rows = toy_columns(60), 61
    columns |= {key: np.zeros((rows, 11)) for key in ("observations", "next_observations")}
    columns["actions"] = np.zeros((rows, 3))
    official = write(tmp_path, columns, "hopper_medium-v2.hdf5")
    own = write(tmp_path, columns, "mine.hdf5")

    def physics_of(dataset, path=None, env=None, physics=None):
        data = load(path, dataset=dataset, env=env, physics=physics)
        masses = model_of(data.env).body_mass[1:]
        assert (data.physics == "d4rl") == np.allclose(masses, HOPPER, rtol=1e-8)
        return data.physics

    assert physics_of("hopper-medium-v2", own) == "d4rl"
    assert physics_of(f"d4rl:{official}") == "d4rl"
    assert physics_of("some name", official) == "d4rl"
    assert physics_of("hopper-medium-v2", own, "Hopper-v5") == "d4rl"
    assert physics_of("hopper-medium-v2", own, physics="stock") == "stock"
    assert physics_of("mine", own, "Hopper-v4") == "stock"
    assert physics_of("mine", own, "Hopper-v4", physics="d4rl") == "d4rl"
    message = refused(own, physics="d4rl")
    assert "is for Hopper, HalfCheetah, Walker2d and AntMaze, not for ssar-test/Walk" in message


# ------------------------------------------------------------------------------------- AntMaze


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
    contacts = np.c_[ant.model.geom_solref, ant.model.geom_solimp[:, :3]]
    np.testing.assert_array_equal(np.unique(contacts, axis=0), [[0.02, 1, 0.8, 0.8, 0.01]])


def test_starts_and_goals_vary_as_in_d4rl(maze):
    ant, offsets, starts = maze.unwrapped, [], []
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


@pytest.mark.parametrize(("distance", "is_reached"), [(0.3, True), (0.8, False)])
def test_the_goal_ends_the_episode(maze, distance, is_reached):
    maze.reset(seed=0)
    ant = maze.unwrapped
    qpos = ant.init_qpos.copy()
    qpos[:2] = ant.goal + [distance, 0]
    ant.set_state(qpos, np.zeros(14))
    _, reward, terminated, truncated, info = maze.step(np.zeros(8, np.float32))
    assert (reward, terminated, truncated) == (is_reached, is_reached, False)
    assert info["success"] == is_reached


def test_walls_are_where_the_map_has_them_and_hold(maze):
    ant = maze.unwrapped
    boxes = ant.model.geom_type == mujoco.mjtGeom.mjGEOM_BOX
    middles, sizes = ant.model.geom_pos[boxes], ant.model.geom_size[boxes]
    assert sorted(map(tuple, middles[:, :2])) == sorted(map(tuple, ant.centres("#")))
    np.testing.assert_array_equal(sizes, np.full((len(sizes), 3), [2, 2, 1]))
    maze.reset(seed=0)
    qvel = np.zeros(14)
    qvel[0] = -8.0  # m/s, towards the wall left of the start
    ant.set_state(ant.init_qpos.copy(), qvel)
    path = [maze.step(np.zeros(8, np.float32))[0][0] for _ in range(10)]
    assert min(path) > -2 and path[-1] < -0.3  # it did get there


# ------------------------------------------------------------------------------------- replaying


@pytest.mark.parametrize("name", ["hopper-medium-v2", "antmaze-umaze-v2"])
def test_recorded_states_are_replayed(name, tmp_path, capsys):
    """To rounding in the physics that recorded them, visibly not in the other."""
    stock = env_spec(TASKS[name].env_id, name)
    stock.max_episode_steps = 60
    old = d4rl_physics(stock)
    env, rng = make_env(old), np.random.default_rng(0)
    state = {
        "infos/qpos": lambda env: env.data.qpos.copy(),
        "infos/qvel": lambda env: env.data.qvel.copy(),
        "infos/goal": lambda env: getattr(env, "goal", 0),
    }
    columns = record(env, 10, lambda *_: rng.uniform(-1, 1, env.action_space.shape), **state)
    if "antmaze" in name:
        del columns["next_observations"]
    path = write(tmp_path, columns, TASKS[name].file)
    assert load(path, dataset=name, env=None).physics == "d4rl"
    same = benchmark.replay(path, old, 100)
    assert same.next_observation.shape == (100,)
    assert max(error.max() for error in same) < 1e-4  # recorded in float32
    if old is not stock:
        other = benchmark.replay(path, stock, 100)
        assert other.observation.max() < 1e-5
        assert np.median(other.next_observation) > 100 * np.median(same.next_observation)
    benchmark.main([path, "--rows=50"])
    out = capsys.readouterr().out
    assert f"{path} in {stock.id}\n  physics=d4rl: 50 rows" in out
    assert ("  physics=stock: 50 rows" in out) == (old is not stock)
