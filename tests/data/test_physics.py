"""D4RL's physics: masses, moments, who gets them, and replaying recorded states."""

import gymnasium
import mujoco
import numpy as np
import pytest
from simulators import STATES, assert_old_capsules, random_actions
from toys import record, tiny_config, toy_columns, write_hdf5

from benchmarks import physics as benchmark
from common.data import load_dataset
from common.envs.d4rl_physics import d4rl_physics
from common.envs.make import make_env
from common.run.errors import InputError

# kg: torso, thigh, leg, foot of the older MuJoCo
HOPPER = (3.53429174, 3.92699082, 2.71433605, 5.0893801)


def d4rl_model(name):
    return make_env(d4rl_physics(gymnasium.spec(f"{name}-v4"))).unwrapped.model


@pytest.mark.parametrize("name", ["Hopper", "HalfCheetah", "Walker2d"])
def test_capsules_weigh_as_in_older_builds_and_touch_as_in_this_one(name):
    ours, stock = d4rl_model(name), make_env(gymnasium.spec(f"{name}-v4")).unwrapped.model
    # HalfCheetah is rescaled to 14 kg; its old capsules have this volume.
    assert_old_capsules(ours, 14 / 0.02036827720850775 if name == "HalfCheetah" else 1000)
    if name == "Hopper":
        np.testing.assert_allclose(ours.body_mass[1:], HOPPER, rtol=1e-8)
    np.testing.assert_allclose(ours.body_subtreemass[0], ours.body_mass.sum())  # by mj_setConst
    places = []
    for model in (ours, stock):
        data = mujoco.MjData(model)
        data.qpos[:] = model.qpos0 + np.random.default_rng(1).normal(0, 0.3, model.nq)
        mujoco.mj_kinematics(model, data)
        places.append(np.c_[model.geom_type, model.geom_size, data.geom_xpos, data.geom_xmat])
    np.testing.assert_allclose(*places, atol=1e-12)


def test_who_gets_which_physics(tmp_path):
    columns = toy_columns(60)
    rows = len(columns["rewards"])
    columns |= {key: np.zeros((rows, 11)) for key in ("observations", "next_observations")}
    columns["actions"] = np.zeros((rows, 3))
    official = write_hdf5(tmp_path / "hopper_medium-v2.hdf5", **columns)
    own = write_hdf5(tmp_path / "mine.hdf5", **columns)

    def physics_of(dataset, path=None, env=None, physics=None):
        data = load_dataset(tiny_config(path, dataset=dataset, env=env, physics=physics))
        mass = make_env(data.env).unwrapped.model.body_mass[1]
        assert (data.physics == "d4rl") == (mass == pytest.approx(HOPPER[0]))
        return data.physics

    assert physics_of("hopper-medium-v2", own) == "d4rl"
    assert physics_of(f"d4rl:{official}") == "d4rl"
    assert physics_of("some name", official) == "d4rl"
    assert physics_of("hopper-medium-v2", own, "Hopper-v5") == "d4rl"
    assert physics_of("hopper-medium-v2", own, physics="stock") == "stock"
    assert physics_of("mine", own, "Hopper-v4") == "stock"
    assert physics_of("mine", own, "Hopper-v4", physics="d4rl") == "d4rl"
    assert gymnasium.spec("Hopper-v4").entry_point.startswith("gymnasium")  # left as registered
    with pytest.raises(InputError, match="is for Hopper, .* and AntMaze, not for ssar-test/Walk"):
        physics_of("toy", own, "ssar-test/Walk-v0", physics="d4rl")


def test_recorded_states_are_replayed(tmp_path, capsys):
    """To rounding in the physics that recorded them, visibly not in the other."""
    stock = gymnasium.spec("Hopper-v4")
    old = d4rl_physics(stock)
    columns = record(make_env(old), 10, random_actions(old), **STATES)
    path = write_hdf5(tmp_path / "hopper_medium-v2.hdf5", **columns)
    same = benchmark.replay(path, old, 100)
    assert same.next_observation.shape == (100,)
    assert max(error.max() for error in same) < 1e-4  # recorded in float32
    other = benchmark.replay(path, stock, 100)
    assert other.observation.max() < 1e-5
    assert np.median(other.next_observation) > 100 * np.median(same.next_observation)
    benchmark.main([path, "--rows=50"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"{path} in Hopper-v4"
    for line, physics in ((lines[1], "d4rl"), (lines[3], "stock")):
        assert line == f"  physics={physics}: 50 rows, error after one step, median of"


def test_files_that_cannot_be_replayed_are_named(tmp_path):
    for name, words in (
        ("hopper_medium-v2", "has no infos/qpos"),
        ("mine", "give --env=<Gymnasium id>"),
    ):
        path = write_hdf5(tmp_path / f"{name}.hdf5", **toy_columns(60))
        with pytest.raises(SystemExit, match=words):
            benchmark.main([path])
