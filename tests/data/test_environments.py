"""Environments by name, whether they fit the data, and those of gymnasium-robotics."""

import gymnasium
import numpy as np
import pytest
from toys import Walk, record, tiny_config, toy_columns, write_hdf5

from common.data import load_dataset
from common.envs.make import env_spec, flatten, make_env, resolve_keys
from common.evaluation import Evaluator
from common.run.errors import InputError

BOX = lambda width: gymnasium.spaces.Box(-1, 1, (width,))
GOALS = gymnasium.spaces.Dict(achieved_goal=BOX(2), desired_goal=BOX(2), observation=BOX(5))


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return write_hdf5(tmp_path_factory.mktemp("data") / "walk.hdf5", **toy_columns(60))


def register(name, **attributes):
    """Registers a variant of Walk."""
    limit = attributes.pop("max_episode_steps", 7)
    cls = type(name, (Walk,), attributes)
    gymnasium.register(f"ssar-test/{name}-v0", lambda **_: cls(), max_episode_steps=limit)
    return f"ssar-test/{name}-v0"


def refused(path, env, **settings):
    with pytest.raises(InputError) as error:
        load_dataset(tiny_config(path, env=env, **settings))
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("env", ["Hoper-v4", "no_module:Walk-v0", "toys:", "failing:Walk-v0"])
def test_unknown_environments_are_named(env, tmp_path, monkeypatch):
    (tmp_path / "failing.py").write_text("1 / 0\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(
        InputError, match=f"unknown environment '{env}' .*=<module>:<id> .*`pip install gymnasium-"
    ):
        env_spec(env, "test")


def test_a_specification_is_a_copy():
    """An environment may name the module that registers it."""
    env_spec("toys:ssar-test/Walk-v0", "test").kwargs["x"] = 1
    assert env_spec("ssar-test/Walk-v0", "test").kwargs == {}


@pytest.mark.parametrize(
    ("method", "words"),
    [
        ("__init__", "cannot make environment ssar-test/Failing-v0 with arguments {} ("),
        ("step", "ssar-test/Failing-v0 fails in its first steps ("),
    ],
)
@pytest.mark.parametrize("error", [OSError(2, "No such file", "ant.xml"), AssertionError()])
def test_environments_that_fail_are_named(path, method, words, error):
    def fail(*_, **__):
        raise error

    message = refused(path, register("Failing", **{method: fail}))
    assert message.startswith(words + (str(error) or "AssertionError"))


def test_an_environment_whose_episodes_do_not_end_is_refused(path):
    load_dataset(tiny_config(path, env=register("Own", max_episode_steps=None)))  # ends by itself
    on = lambda env, action: (env._observation(), 0.0, False, False, {})
    message = refused(path, register("Endless", max_episode_steps=None, step=on))
    assert "Endless-v0 fails in its first steps (no end after 10,000, although max_ep" in message


def test_environments_that_do_not_fit_the_data_are_named(path):
    message = refused(path, "ssar-test/One-v0")
    assert "walk.hdf5 has observations of 4 and actions of 2 dimensions, but ssar-te" in message
    assert "ssar-test/One-v0 of 4 and 1: name the data's own environment with" in message
    message = refused(path, "ssar-test/Wide-v0")
    assert "takes actions in [-2.0, 2.0] but actors act in [-1, 1]: wrap" in message
    for env in ("ssar-test/Buttons-v0", "ssar-test/Pair-v0"):
        assert f"{env} has observations of " in refused(path, env)
    message = refused(path, "ssar-test/Goal-v0", observation_keys="clock")
    assert "but ssar-test/Goal-v0 of 2 (clock; see --config.observation_keys) and 2" in message
    message = refused(path, "ssar-test/Walk-v0", observation_keys="clock")
    assert "'clock' must be named once and be among the observations" in message
    assert "ssar-test/Walk-v0: they have no keys" in message


@pytest.mark.parametrize("shape", [(2, 2), ()])
def test_actions_and_rewards_may_have_any_shape(tmp_path, shape):
    """Data hold rows; the environment gets its own shape."""

    def step(self, action):
        assert np.shape(action) == shape
        observation, reward, *rest = Walk.step(self, np.reshape(action, -1)[:2])
        return observation, np.array([reward]), *rest

    space = gymnasium.spaces.Box(-1, 1, shape, np.float32)
    env, columns = register("Shaped", action_space=space, step=step), toy_columns(60)
    width = int(np.prod(shape))
    columns["actions"] = np.zeros((len(columns["rewards"]), width), np.float32)
    data = load_dataset(tiny_config(write_hdf5(tmp_path / "shaped", **columns), env=env))
    act = lambda params, obs: np.zeros((*obs.shape[:2], width), np.float32)
    assert np.isfinite(Evaluator(data, 1, 2, 0)(act, None).returns).all()


def test_goal_environments_are_joined_like_their_data():
    """If not all keys fit: a goal stays the same within an episode, and velocities do not."""
    everything = ("achieved_goal", "desired_goal", "observation")
    goal_last, goal_first = ("observation", "desired_goal"), ("achieved_goal", "observation")
    moving = lambda width: np.arange(3 * width, dtype=np.float32).reshape(3, width)
    still = moving(7)
    still[:, -2:] = 7
    assert resolve_keys((), GOALS, moving(9)) == everything
    assert resolve_keys((), GOALS, still) == goal_last
    assert resolve_keys((), GOALS, moving(7)) == goal_first
    assert resolve_keys((), GOALS, moving(3)) == everything  # and then refused for its width
    assert resolve_keys((), GOALS, None) == everything
    assert resolve_keys(("observation",), GOALS, moving(9)) == ("observation",)


def test_observations_are_flattened_in_the_order_of_the_keys():
    one = {"b": np.array([[1, 2], [3, 4]]), "a": 5}
    assert flatten(one).tolist() == [5, 1, 2, 3, 4]
    assert flatten(one, ("b", "a")).tolist() == [1, 2, 3, 4, 5]
    assert flatten(one, ("b",)).tolist() == [1, 2, 3, 4]
    many = {"b": np.arange(6).reshape(3, 2), "a": np.array([7, 8, 9])}
    assert flatten(many, None, (3,)).tolist() == [[7, 0, 1], [8, 2, 3], [9, 4, 5]]


def test_point_maze_data_with_the_goal_at_the_end(tmp_path):
    """x, y, their velocities and the goal's x, y: driven straight at the goal."""
    pytest.importorskip("gymnasium_robotics", reason="pip install -r requirements-test.txt")
    spec = env_spec("PointMaze_UMaze-v3", "test")
    spec.kwargs |= {"continuing_task": False}
    spec.max_episode_steps = 60
    joined = gymnasium.wrappers.TransformObservation(
        make_env(spec), lambda x: np.r_[x["observation"], x["desired_goal"]], BOX(6)
    )
    drive = lambda obs, _: np.clip(2 * (obs[4:] - obs[:2]) - 0.3 * obs[2:4], -1, 1)
    path = write_hdf5(tmp_path / "maze.hdf5", **record(joined, 30, drive))
    config = tiny_config(path, env="PointMaze_UMaze-v3", selection="success")
    config.normalize_observations = False
    data = load_dataset(config)
    assert data.observation_keys == ("observation", "desired_goal")
    won = data.rewards[data.episode_ends] == 1
    assert 0 < won.mean() < 1
    act = lambda params, obs: drive(obs.T, None).T.astype(np.float32)
    success = Evaluator(data, num_seeds=1, episodes=5, seed=0)(act, None).success
    assert set(success.ravel()) <= {0, 1}
