"""Environments by name, whether they work, and whether they fit the data."""

import gymnasium
import numpy as np
import pytest
from files import refused
from toys import Walk, tiny_config, toy_columns, write_hdf5

from common.data import load_dataset
from common.envs.make import env_spec, flatten
from common.evaluation import Collector, Evaluator
from common.run.errors import InputError

Box = gymnasium.spaces.Box


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return write_hdf5(tmp_path_factory.mktemp("data") / "walk.hdf5", **toy_columns(60))


def register(name, **attributes):
    """Registers a variant of Walk."""
    limit = attributes.pop("max_episode_steps", 7)
    cls = type(name, (Walk,), attributes)
    gymnasium.register(f"ssar-test/{name}-v0", lambda **_: cls(), max_episode_steps=limit)
    return f"ssar-test/{name}-v0"


@pytest.mark.parametrize("env", ["Hoper-v4", "no_module:Walk-v0", "toys:", "failing:Walk-v0"])
def test_unknown_environments_are_named(env, tmp_path, monkeypatch):
    (tmp_path / "failing.py").write_text("1 / 0\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(
        InputError, match=f"unknown environment '{env}' .*=<module>:<id> .*`pip install gymnasium-"
    ):
        env_spec(env, "test")


@pytest.mark.parametrize("method", ["__init__", "reset", "step"])
@pytest.mark.parametrize("error", [OSError(2, "No such file", "ant.xml"), AssertionError()])
def test_environments_that_fail_are_named(path, method, error):
    def fail(*_, **__):
        raise error

    message = refused(path, env=register("Failing", **{method: fail}))
    words = f"{type(error).__name__}: {error}".removesuffix(": ")
    assert message.startswith(f"ssar-test/Failing-v0 with arguments {{}} fails ({words}): fix it")


def test_a_time_limit_is_asked_for_and_kept_everywhere(tmp_path):
    columns = toy_columns(60)
    del columns["timeouts"]
    path = write_hdf5(tmp_path / "walk.hdf5", **columns)
    load_dataset(tiny_config(path, env=register("Own", max_episode_steps=None)))  # ends by itself
    on = lambda env, action: (env._observation(), 0.0, False, False, {})
    endless = register("Endless", max_episode_steps=None, step=on)
    words = "ssar-test/Endless-v0 has no time limit: give --config.max_episode_steps=<steps>"
    assert refused(path, env=endless) == words
    for env in (endless, register("Long", max_episode_steps=900, step=on)):
        data = load_dataset(tiny_config(path, env=env, max_episode_steps=4))
        assert Evaluator(data, 1, 2, 0)(zeros, None).lengths.tolist() == [[4, 4]]
        envs = Collector(data, 1, 0)
        envs.reset()
        assert [len(envs.step(np.zeros((1, 2))).finished) for _ in range(4)] == [0, 0, 0, 1]
        assert np.diff(np.flatnonzero(data.episode_ends)).max() <= 4


def zeros(_, obs, width=2):
    return np.zeros((*obs.shape[:2], width), np.float32)


def test_environments_that_do_not_fit_the_data_are_named(path):
    message = refused(path, env=register("One", action_space=Box(-1, 1, (1,))))
    assert "walk.hdf5 has observations of 4 and actions of 2 dimensions, but ssar-te" in message
    assert message.endswith("of 4 and 1: name the data's own environment with --config.env=<id>")
    message = refused(path, env="ssar-test/Goal-v0", observation_keys="clock")
    assert message.endswith("or choose among its --config.observation_keys=clock,position")
    message = refused(path, env="ssar-test/Walk-v0", observation_keys="clock")
    assert "'clock' must be named once and be among the observations" in message
    assert "ssar-test/Walk-v0: they have no keys" in message


@pytest.mark.parametrize(
    "space",
    [
        gymnasium.spaces.Discrete(3),
        Box(-np.inf, np.inf, (2,)),
        Box(np.float32([-1, 1]), np.float32([1, 1])),
        Box(0, 9, (2,), np.int32),
    ],
)
def test_action_spaces_that_actors_cannot_fill_are_named(path, space):
    message = refused(path, env=register("Odd", action_space=space, step=None))
    assert message.startswith("ssar-test/Odd-v0 has observations of ") and str(space)[:3] in message
    assert "and actions a Box of fractions between finite bounds, because" in message


@pytest.mark.parametrize(
    ("space", "bounds"),
    [
        (Box(-1, 1, (2, 2)), ""),
        (Box(-2, 2, ()), "[-2, 2]"),
        (Box(np.float64([0, 5]), np.float64([1, 7]), dtype=np.float64), "[0, 1] and [5, 7]"),
    ],
)
def test_actions_are_rescaled_alike_in_data_evaluation_and_online(tmp_path, capsys, space, bounds):
    """Data hold rows; the environment gets its own bounds, shape and type; rewards of [1] do."""
    got = []

    def step(self, action):
        got.append(action)
        observation, reward, *rest = Walk.step(self, np.reshape(action, -1)[:2])
        return observation, np.array([reward]), *rest

    env, columns = register("Shaped", action_space=space, step=step), toy_columns(60)
    low, high = space.low.ravel(), space.high.ravel()
    share = np.linspace(0, 1, len(columns["rewards"]))[:, None]
    columns["actions"] = (low + share * (high - low)).astype(np.float32)
    data = load_dataset(tiny_config(write_hdf5(tmp_path / "x", **columns), env=env))
    np.testing.assert_allclose(
        data.actions, np.broadcast_to(2 * share - 1, data.actions.shape), atol=1e-6
    )
    assert np.abs(data.actions).max() <= 1
    assert (f"; actions rescaled from {bounds};" in capsys.readouterr().out) == bool(bounds)
    Evaluator(data, 1, 1, 0)(lambda _, obs: zeros(_, obs, low.size) + np.float32(0.5), None)
    envs = Collector(data, 1, 0)
    envs.reset()
    envs.step(np.full((1, low.size), 0.5, np.float32))
    for action in got[-2:]:
        assert np.shape(action) == space.shape and action.dtype == space.dtype
        np.testing.assert_allclose(np.ravel(action), low + 0.75 * (high - low), rtol=1e-6)
    columns["actions"][9] += high - low
    words = (
        f"'actions' is not in {bounds or '[-1, 1]'}, the bounds of {env}, at row 9 (1 such rows)"
    )
    assert words in refused(write_hdf5(tmp_path / "y", **columns), env=env)


def test_observations_are_flattened_in_the_order_of_the_keys():
    one = {"b": np.array([[1, 2], [3, 4]]), "a": 5}
    assert flatten(one, ("b", "a")).tolist() == [1, 2, 3, 4, 5]
    assert flatten(one, ("b",)).tolist() == [1, 2, 3, 4]
    many = {"b": np.arange(6).reshape(3, 2), "a": np.array([7, 8, 9])}
    assert flatten(many, ("a", "b"), (3,)).tolist() == [[7, 0, 1], [8, 2, 3], [9, 4, 5]]
