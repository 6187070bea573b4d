"""Environments by name, whether they work, and whether they fit the data."""

import gymnasium
import numpy as np
import pytest
from files import load, refused, write
from toys import Walk, toy_columns

from common.evaluation import Collector, Evaluator

Box = gymnasium.spaces.Box


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return write(tmp_path_factory.mktemp("data"), toy_columns(60))


def register(name, **attributes):
    """Registers a variant of Walk."""
    limit = attributes.pop("max_episode_steps", 7)
    cls = type(name, (Walk,), attributes)
    gymnasium.register(f"ssar-test/{name}-v0", lambda **_: cls(), max_episode_steps=limit)
    return f"ssar-test/{name}-v0"


def fail(*_, **__):
    raise AssertionError


FAILS = "ssar-test/Odd-v0 with arguments {} fails (AssertionError): fix"
ACTIONS = "and actions a Box of fractions between finite bounds, because"
KEYS = "must be named once and be among the observations of ssar-test/"
# An environment, or how it differs from Walk; the keys that are given; words of the sentence.
BAD = [
    ("Hoper-v4", "", "unknown environment 'Hoper-v4' ("),
    ("no_module:Walk-v0", "", "or <module>:<id> with the module that registers it; `pip install"),
    ({"__init__": fail}, "", FAILS),
    ({"reset": fail}, "", FAILS),
    ({"step": fail}, "", FAILS),
    ({"action_space": Box(-1, 1, (1,))}, "", "-v0 of 4 and 1: name the data's own environment"),
    ("ssar-test/Goal-v0", "clock", "among its --config.observation_keys=clock,one,position"),
    ("ssar-test/Goal-v0", "clok", f"'clok' {KEYS}Goal-v0: clock, one, position"),
    ("ssar-test/Goal-v0", "clock,clock", f"'clock' {KEYS}Goal-v0: clock, one, position"),
    ("ssar-test/Walk-v0", "clock", f"'clock' {KEYS}Walk-v0: they have no keys"),
    ({"action_space": gymnasium.spaces.Discrete(3)}, "", ACTIONS),
    ({"action_space": Box(-np.inf, np.inf, (2,))}, "", ACTIONS),
    ({"action_space": Box(np.float32([-1, 1]), np.float32([1, 1]))}, "", ACTIONS),
    ({"action_space": Box(0, 9, (2,), np.int32)}, "", ACTIONS),
    ({"observation_space": gymnasium.spaces.Tuple([Box(-1, 1)])}, "", ACTIONS),
]


@pytest.mark.parametrize(("env", "keys", "words"), BAD)
def test_environments_that_cannot_be_used_are_named(path, env, keys, words):
    env = register("Odd", **env) if isinstance(env, dict) else env
    assert words in refused(path, env=env, observation_keys=keys)


def test_a_time_limit_is_asked_for_and_kept_everywhere(tmp_path):
    columns = toy_columns(60)
    del columns["timeouts"]
    path = write(tmp_path, columns)
    load(path, env=register("Own", max_episode_steps=None))  # ends by itself
    on = lambda env, action: (env._observation(), 0.0, False, False, {})
    endless = register("Endless", max_episode_steps=None, step=on)
    words = "ssar-test/Endless-v0 has no time limit: give --config.max_episode_steps=<steps>"
    assert refused(path, env=endless) == words
    for env in (endless, register("Long", max_episode_steps=900, step=on)):
        data = load(path, env=env, max_episode_steps=4)
        evaluate = Evaluator(data, 1, 2, 0)
        evaluate(zeros, None)
        assert [slot.length for slot in evaluate.slots] == [4, 4]
        envs = Collector(data, 1, 0)
        envs.reset()
        assert [len(envs.step(np.zeros((1, 2))).finished) for _ in range(4)] == [0, 0, 0, 1]
        assert np.diff(np.flatnonzero(data.episode_ends)).max() <= 4


def zeros(_, obs, width=2):
    return np.zeros((*obs.shape[:2], width), np.float32)


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
    data = load(write(tmp_path, columns), env=env)
    expected = np.broadcast_to(2 * share - 1, data.actions.shape)
    np.testing.assert_allclose(data.actions, expected, atol=1e-6)
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
    message = refused(write(tmp_path, columns), env=env)
    assert f"not in {bounds or '[-1, 1]'}, the bounds of {env}, at row 9 (1 such rows)" in message
