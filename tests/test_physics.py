"""D4RL's physics: masses, moments, who gets them, and replaying recorded states."""

import os
import re
import xml.etree.ElementTree as ET

import gymnasium
import h5py
import mujoco
import numpy as np
import pytest
from gymnasium.envs.mujoco import mujoco_env
from toys import toy_columns, write_hdf5

from common import antmaze, d4rl, physics
from common.checks import InputError
from common.environments import env_spec, make_env
from common.evaluation import Evaluator
from common.loading import load_dataset

FILES = {"Hopper": "hopper.xml", "HalfCheetah": "half_cheetah.xml", "Walker2d": "walker2d.xml"}
# kg: torso, thigh, leg, foot of the older MuJoCo
HOPPER = (3.53429174, 3.92699082, 2.71433605, 5.0893801)


def cylinder_model(source):
    """A model whose capsules are cylinders of length 2 h + r, which MuJoCo weighs exactly."""
    tree = ET.ElementTree(ET.fromstring(source))
    for geom in tree.iter("geom"):
        if geom.get("type") != "capsule":
            continue
        radius = float(geom.get("size").split()[0])
        geom.set("type", "cylinder")
        if geom.get("fromto"):
            ends = np.array(geom.get("fromto").split(), float).reshape(2, 3)
            along = (ends[1] - ends[0]) / np.linalg.norm(ends[1] - ends[0])
            ends += radius / 2 * np.outer([-1, 1], along)
            geom.set("fromto", " ".join(map(str, ends.ravel())))
        else:
            half_length = float(geom.get("size").split()[1])
            geom.set("size", f"{radius} {half_length + radius / 2}")
    return mujoco.MjModel.from_xml_string(ET.tostring(tree.getroot(), encoding="unicode"))


def asset(name):
    with open(os.path.join(os.path.dirname(mujoco_env.__file__), "assets", name)) as file:
        return file.read()


def d4rl_model(name):
    return make_env(physics.d4rl_physics(gymnasium.spec(f"{name}-v4"))).unwrapped.model


def mass_matrices(model, count=5):
    """Inertia in joint space at random poses: [count, nv, nv]."""
    data, rng, matrices = mujoco.MjData(model), np.random.default_rng(0), []
    for _ in range(count):
        data.qpos[:] = model.qpos0 + rng.normal(0, 0.5, model.nq)
        mujoco.mj_forward(model, data)
        columns = []
        for unit in np.eye(model.nv):
            column = np.zeros(model.nv)
            mujoco.mj_mulM(model, data, column, unit)
            columns.append(column)
        matrices.append(columns)
    return np.array(matrices)


def test_hopper_weighs_what_it_did():
    np.testing.assert_allclose(d4rl_model("Hopper").body_mass[1:], HOPPER, rtol=1e-8)
    stock = make_env(gymnasium.spec("Hopper-v4")).unwrapped.model.body_mass[1:]
    assert (stock > 1.02 * np.array(HOPPER)).all()


@pytest.mark.parametrize("name", FILES)
def test_bodies_are_those_of_cylinders_that_mujoco_weighs_itself(name):
    ours, reference = d4rl_model(name), cylinder_model(asset(FILES[name]))
    np.testing.assert_allclose(ours.body_mass, reference.body_mass, rtol=1e-6)
    np.testing.assert_allclose(ours.body_ipos, reference.body_ipos, atol=1e-9)
    np.testing.assert_allclose(mass_matrices(ours), mass_matrices(reference), rtol=1e-6, atol=1e-9)
    for derived in ("body_subtreemass", "body_invweight0", "dof_invweight0"):  # by mj_setConst
        np.testing.assert_allclose(getattr(ours, derived), getattr(reference, derived), rtol=1e-5)
    if name == "HalfCheetah":
        assert ours.body_mass.sum() == pytest.approx(14)


@pytest.mark.parametrize("name", FILES)
def test_what_bodies_touch_with_is_left_alone(name):
    ours, stock = d4rl_model(name), make_env(gymnasium.spec(f"{name}-v4")).unwrapped.model
    np.testing.assert_array_equal(ours.geom_size, stock.geom_size)
    places = []
    for model in (ours, stock):
        data = mujoco.MjData(model)
        data.qpos[:] = model.qpos0 + np.random.default_rng(1).normal(0, 0.3, model.nq)
        mujoco.mj_kinematics(model, data)
        places.append(np.c_[data.geom_xpos, data.geom_xmat])
    np.testing.assert_allclose(*places, atol=1e-12)


def test_who_gets_which_physics(tmp_path):
    columns = toy_columns(60)
    rows = len(columns["rewards"])
    for key in ("observations", "next_observations"):
        columns[key] = np.zeros((rows, 11), np.float32)
    columns["actions"] = np.zeros((rows, 3), np.float32)
    official = write_hdf5(tmp_path / "hopper_medium-v2.hdf5", **columns)
    own = write_hdf5(tmp_path / "mine.hdf5", **columns)

    def physics_of(*args, **kwargs):
        dataset = load_dataset(*args, **kwargs)
        mass = make_env(dataset.env).unwrapped.model.body_mass[1]
        assert (dataset.physics == "d4rl") == (mass == pytest.approx(HOPPER[0]))
        return dataset.physics

    assert physics_of("hopper-medium-v2", own) == "d4rl"
    assert physics_of("d4rl:" + official) == "d4rl"
    assert physics_of(None, official) == "d4rl"
    assert physics_of("some name", official) == "d4rl"
    assert physics_of("hopper-medium-v0", own, "Hopper-v4") == "stock"
    with pytest.raises(InputError, match="Hopper-v3 needs mujoco-py: use --config.env=Hopper-v4"):
        load_dataset("hopper-medium-v2", own, "Hopper-v3")
    assert physics_of("hopper-medium-v2", own, "Hopper-v5") == "d4rl"
    assert physics_of("hopper-medium-v2", own, physics="stock") == "stock"
    assert physics_of("d4rl:" + own, env="Hopper-v4") == "stock"
    assert physics_of("d4rl:" + own, env="Hopper-v4", physics="d4rl") == "d4rl"
    assert gymnasium.spec("Hopper-v4").entry_point.startswith("gymnasium")  # left as registered
    with pytest.raises(InputError, match="physics=d4rl is for Hopper, .* not for ssar-test/Walk"):
        load_dataset("toy", own, "ssar-test/Walk-v0", physics="d4rl")


def record(spec, path, steps=300, **extra):
    """A file with the simulator's states, of random actions."""
    env = make_env(spec)
    rng, (obs, _) = np.random.default_rng(0), env.reset(seed=0)
    names = ("observations", "actions", "rewards", "next_observations", "terminals", "timeouts")
    columns = {name: [] for name in (*names, "infos/qpos", "infos/qvel", *extra)}
    for _ in range(steps):
        data, action = env.unwrapped.data, rng.uniform(-1, 1, env.action_space.shape)
        before = data.qpos.copy(), data.qvel.copy(), *(f(env.unwrapped) for f in extra.values())
        following, reward, terminal, timeout, _ = env.step(action.astype(np.float32))
        values = (obs, action.astype(np.float32), reward, following, terminal, timeout)
        for name, value in zip(columns, (*values, *before), strict=True):
            columns[name].append(value)
        obs = env.reset()[0] if terminal or timeout else following
    kinds = {name: bool if name in ("terminals", "timeouts") else np.float32 for name in columns}
    return write_hdf5(path, **{name: np.array(x, kinds[name]) for name, x in columns.items()})


def test_recorded_states_are_replayed(tmp_path, capsys):
    """To rounding in the physics they were recorded in, visibly not in the other."""
    stock = gymnasium.spec("Hopper-v4")
    path = record(physics.d4rl_physics(stock), tmp_path / "hopper_medium-v2.hdf5")
    same = physics.replay(path, physics.d4rl_physics(stock), 100)
    assert same.next_observation.shape == (100,)
    assert max(error.max() for error in same) < 1e-4  # recorded in float32
    other = physics.replay(path, stock, 100)
    assert other.observation.max() < 1e-5
    assert np.median(other.next_observation) > 100 * np.median(same.next_observation)
    physics.main([path, "--rows=50"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"{path}: 50 rows in Hopper-v4, error after one step:"
    assert lines[1].startswith("  physics=d4rl: median of observation ")
    assert lines[2].startswith("  physics=stock: median of observation ")


def test_files_that_cannot_be_replayed_are_named(tmp_path):
    path = write_hdf5(tmp_path / "hopper_medium-v2.hdf5", **toy_columns(60))
    states = record(gymnasium.spec("Hopper-v4"), tmp_path / "hopper_random-v2.hdf5", steps=20)
    for arguments, words in (
        ([path], "has no infos/qpos"),
        ([write_hdf5(tmp_path / "mine.hdf5", **toy_columns(60))], "give the Gymnasium id"),
        ([str(tmp_path / "hopper_expert-v2.hdf5")], "No such file"),
        ([states, "--rows=0"], "no rows to replay"),
        ([states, "--env=Walker2d-v4"], r"states of \(6, 6\) numbers, but Walker2d-v4 \(9, 9\)"),
    ):
        with pytest.raises(SystemExit, match=words):
            physics.main(arguments)


# ---------------------------------------------------------------------------------------- AntMaze


@pytest.fixture(scope="module", params=antmaze.MAZES)
def maze(request):
    spec = env_spec(f"ssar-jax/AntMaze-{request.param}-v2", "test")
    env = make_env(spec)
    yield env
    env.close()


def test_the_maze_has_d4rls_rules(maze):
    ant = maze.unwrapped
    goals = {(5, 5): (0, 8), (8, 8): (20, 20), (9, 12): (32, 24)}  # x, y of the goal's cell
    assert tuple(ant.goal_cell) == goals[ant.cells.shape]
    assert maze.spec.max_episode_steps == (700 if ant.cells.shape == (5, 5) else 1000)
    assert maze.observation_space.shape == (29,)
    assert maze.action_space.shape == (8,)
    assert ant.dt == pytest.approx(0.1)
    assert set(ant.model.actuator_gear[:, 0]) == {30}
    offsets, starts = [], []
    for seed in range(300):
        obs, info = maze.reset(seed=seed)
        np.testing.assert_array_equal(obs, np.r_[ant.data.qpos[:15], ant.data.qvel[:14]])
        offsets.append(info["goal"] - ant.goal_cell)
        starts.append(obs)
    offsets, starts = np.array(offsets), np.array(starts)
    assert offsets.min() >= 0 and 1.3 < offsets.max() <= 1.5
    np.testing.assert_allclose(offsets.mean(axis=0), 0.75, atol=0.08)
    assert np.abs(starts[:, :15] - ant.init_qpos)[:, [0, 1, 2, *range(7, 15)]].max() <= 0.1
    np.testing.assert_allclose(np.linalg.norm(starts[:, 3:7], axis=1), 1)
    np.testing.assert_allclose(starts[:, 15:].std(), 0.1, rtol=0.05)
    np.testing.assert_array_equal(maze.reset(seed=7)[0], starts[7])
    assert not np.array_equal(maze.reset()[1]["goal"], maze.reset()[1]["goal"])  # a new one each


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
    """The masses of cylinders, of density 5."""
    env = make_env(env_spec("ssar-jax/AntMaze-umaze-v2", "test")).unwrapped
    reference = cylinder_model(env._model_xml())
    np.testing.assert_allclose(env.model.body_mass, reference.body_mass, rtol=1e-6)
    np.testing.assert_allclose(
        mass_matrices(env.model), mass_matrices(reference), rtol=1e-6, atol=1e-9
    )
    capsule = 5 * np.pi * 0.08**2 * (0.2 * 2**0.5 + 0.08)
    np.testing.assert_allclose(env.model.body("aux_1").mass, capsule)
    floor, leg = env.model.geom("floor"), env.model.geom("left_leg_geom")
    for geom in (floor, leg):
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
    for _ in range(10):
        obs = maze.step(np.zeros(8, np.float32))[0]
        assert obs[0] > -2
    assert obs[0] < -0.3  # it did get there


def test_an_antmaze_file_loads_and_is_played(tmp_path, capsys):
    """D4RL's files have no next_observations; score 100 is a success in every episode."""
    spec = env_spec("ssar-jax/AntMaze-umaze-v2", "test")
    task = d4rl.TASKS["antmaze-umaze-v2"]
    path = record(spec, tmp_path / task.file, **{"infos/goal": lambda ant: ant.goal})
    with h5py.File(path, "a") as file:
        del file["next_observations"]
        with pytest.raises(InputError, match="no reward is 1, by which selection=success"):
            load_dataset(task.name, path, sparse=True)
        file["rewards"][7] = 1
    dataset = load_dataset(task.name, path, sparse=True)
    assert (dataset.env.id, dataset.physics) == (spec.id, "d4rl")
    assert dataset.score(0.25) == 25
    dataset.env.max_episode_steps = 3
    still = lambda params, obs: np.zeros((*obs.shape[:2], 8), np.float32)
    episodes = Evaluator(dataset, num_seeds=1, episodes=2, seed=0)(still, None, lambda obs: obs)
    assert (episodes.lengths == 3).all() and (episodes.success == 0).all()
    physics.main([path, "--rows=50"])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2
    errors = [float(error) for error in re.findall(r"\d\.\de[-+]\d+", lines[1])]
    assert len(errors) == 6 and max(errors) < 1e-3
