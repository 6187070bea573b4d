"""Evaluation and online training: episodes in environments of their own, against loops by hand."""

import dataclasses
import gc

import gymnasium
import numpy as np
import pytest
from toys import ACTION, OBS, Walk, tiny_config, toy_columns, write_hdf5

from common.data import load_dataset
from common.data.dataset import Normalizer
from common.evaluation import Collector, Evaluator
from common.run import stopping
from common.run.errors import Diverged, InputError
from common.run.stopping import Stopped

HALF = Normalizer(np.full(OBS, 0.5, np.float32), np.full(OBS, 2, np.float32))
STILL = np.zeros((2, ACTION), np.float32)


@pytest.fixture(scope="module")
def walk(tmp_path_factory):
    path = write_hdf5(tmp_path_factory.mktemp("data") / "walk.hdf5", **toy_columns(100))
    return load_dataset(tiny_config(path, normalize_observations=False))


def proportional(gains, obs):
    """One controller for each seed: gains [S], observations [S, E, 4] -> [S, E, 2]."""
    return np.clip(-np.asarray(gains)[:, None, None] * obs[..., :2], -1, 1).astype(np.float32)


def by_hand(gain, seed):
    """Return, length and success of one episode, in a loop."""
    env = gymnasium.make("ssar-test/Walk-v0")
    obs, _ = env.reset(seed=seed)
    total, length, success, done = 0.0, 0, 0.0, False
    while not done:
        action = np.clip(-gain * obs[:2], -1, 1).astype(np.float32)
        obs, reward, terminated, truncated, info = env.step(action)
        done = terminated or truncated
        total, length, success = total + reward, length + 1, max(success, info["success"])
    return total, length, float(success)


def test_every_slot_plays_exactly_its_own_episode(walk):
    episodes = Evaluator(walk, num_seeds=2, episodes=5, seed=3)(proportional, [0.5, 2.0])
    for i, gain in enumerate([0.5, 2.0]):
        for j in range(5):
            expected = by_hand(gain, seed=100_000 * (3 + i) + j)
            found = episodes.returns[i, j], episodes.lengths[i, j], episodes.success[i, j]
            assert found == pytest.approx(expected, rel=1e-5)
    assert len(set(episodes.lengths.ravel())) > 1  # tasks end at different times
    assert 0 < episodes.success.mean() < 1


def test_evaluation_repeats_itself_and_seeds_are_independent(walk):
    evaluate = Evaluator(walk, num_seeds=2, episodes=4, seed=0)
    first, second = (evaluate(proportional, [1.0, 1.0]) for _ in range(2))
    np.testing.assert_array_equal(first, second)
    alone = Evaluator(walk, num_seeds=1, episodes=4, seed=1)(proportional, [1.0])
    np.testing.assert_array_equal(first.returns[1], alone.returns[0])
    assert not np.array_equal(first.returns[0], first.returns[1])  # other starts


def test_large_seeds_fit_old_random_generators(walk):
    evaluate, envs = Evaluator(walk, 2, 3, 20_240_101), Collector(walk, 2, 20_240_101)
    seeds = {*evaluate.seeds, *envs.seeds}
    assert len(seeds) == 8 and min(seeds) >= 0 and max(seeds) < 2**31


def test_a_signal_ends_an_evaluation(walk, monkeypatch):
    monkeypatch.setattr(stopping, "received", [15])
    with pytest.raises(Stopped) as error:
        Evaluator(walk, 1, 1, 0)(proportional, [1.0])
    assert error.value.status == 143


@pytest.mark.parametrize(
    ("info", "expected"),
    [
        ({}, np.nan),
        ({"success": None}, np.nan),
        ({"success": "yes"}, np.nan),
        ({"success": np.array([True])}, 1),
        ({"is_success": np.float32(1)}, 1),
        ({"success": 0.0}, 0),
    ],
)
def test_success_is_read_in_every_usual_form(walk, monkeypatch, info, expected):
    step = Walk.step
    monkeypatch.setattr(Walk, "step", lambda *args: (*step(*args)[:4], dict(info)))
    episodes = Evaluator(walk, num_seeds=1, episodes=2, seed=0)(proportional, [1.0])
    np.testing.assert_array_equal(episodes.success, np.full((1, 2), expected))


@pytest.mark.parametrize("env_id", ["ssar-test/Walk-v0", "ssar-test/Goal-v0"])
def test_collected_rows_are_those_of_a_loop_by_hand(walk, env_id):
    """A successor belongs to its own episode; a time limit is no terminal."""
    keys = ("clock", "position") if "Goal" in env_id else None
    spec = gymnasium.spec(env_id)
    data = dataclasses.replace(walk, env=spec, normalizer=HALF, observation_keys=keys)
    envs = Collector(data, num_seeds=2, seed=3)
    actions = np.random.default_rng(0).uniform(-1, 1, (60, 2, ACTION)).astype(np.float32)
    obs, outcomes, acted_in = envs.reset(), [], []
    for action in actions:
        acted_in.append(obs)
        outcomes.append(envs.step(action))
        obs = outcomes[-1].obs

    def standardise(obs):
        obs = np.concatenate([obs[key] for key in keys]) if keys else obs
        return (np.asarray(obs, np.float32) - np.float32(0.5)) / np.float32(2)

    limits = terminals = 0
    for i in range(2):
        env = gymnasium.make(spec)
        obs, _ = env.reset(seed=100_000 * (3 + i) + 99_999)
        total, length = 0.0, 0
        for t, action in enumerate(actions[:, i]):
            np.testing.assert_allclose(acted_in[t][i], standardise(obs), rtol=1e-6)
            obs, reward, terminated, truncated, _ = env.step(action)
            total, length = total + reward, length + 1
            assert outcomes[t].reward[i] == np.float32(reward)
            assert outcomes[t].terminated[i] == terminated
            np.testing.assert_allclose(outcomes[t].next_obs[i], standardise(obs), rtol=1e-6)
            finished = [row for row in outcomes[t].finished if row["seed"] == 3 + i]
            assert len(finished) == (terminated or truncated)
            if finished:
                terminals, limits = terminals + terminated, limits + (not terminated)
                assert finished[0]["return"] == pytest.approx(total, rel=1e-5)
                assert finished[0]["length"] == length and finished[0]["step"] == t + 1
                obs, _ = env.reset()
                total, length = 0.0, 0
    assert terminals and limits
    assert outcomes[0].reward.dtype == outcomes[0].next_obs.dtype == np.float32


def test_resumed_training_does_not_repeat_the_first_episodes(walk):
    starts = [Collector(walk, 2, seed=0).reset(step).tobytes() for step in (0, 0, 50, 50, 60)]
    assert starts[0] == starts[1] and starts[2] == starts[3] and len(set(starts)) == 3
    envs = Collector(walk, 1, seed=0)
    envs.reset(50)
    finished = [episode for _ in range(20) for episode in envs.step(STILL[:1]).finished]
    assert finished[0]["step"] == 50 + finished[0]["length"]


def test_actions_that_are_not_finite_are_not_blamed_on_the_environment(walk):
    envs = Collector(walk, 2, seed=0)
    envs.reset()
    with pytest.raises(Diverged, match="action is not finite in step 1 of an episode: lower"):
        envs.step(STILL + [[0, 0], [0, np.nan]])
    with pytest.raises(Diverged, match="action is not finite"):
        Evaluator(walk, 1, 1, 0)(proportional, [np.nan])


@pytest.mark.parametrize(
    ("what", "bad"), [("observation", np.full(OBS, np.nan, "f4")), ("reward", 1e39)]
)
def test_environments_that_give_no_finite_numbers_are_named(walk, monkeypatch, what, bad):
    outcome = {"observation": np.zeros(OBS, np.float32), "reward": 0.0} | {what: bad}
    monkeypatch.setattr(Walk, "step", lambda *_: (*outcome.values(), False, False, {}))
    envs = Collector(walk, 2, seed=0)
    envs.reset()
    message = (
        f"ssar-test/Walk-v0 gave an? {what} that is not finite (in|at environment) step 1: fix"
    )
    with np.errstate(over="ignore"), pytest.raises(InputError, match=message):
        envs.step(STILL)


def test_rewards_that_are_not_finite_make_returns_that_are_not(walk, monkeypatch):
    step = Walk.step
    monkeypatch.setattr(Walk, "step", lambda *x: (step(*x)[0], np.nan, *step(*x)[2:]))
    assert np.isnan(Evaluator(walk, 1, 2, 0)(proportional, [1.0]).returns).all()


def test_environments_are_closed_with_those_who_used_them(walk, monkeypatch):
    gc.collect()
    closed, users = [], [Evaluator(walk, 2, 3, 0), Collector(walk, 2, 0)]
    monkeypatch.setattr(Walk, "close", lambda self: closed.append(1))
    users.clear()
    gc.collect()
    assert len(closed) == 8
