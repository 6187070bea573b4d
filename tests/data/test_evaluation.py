"""Evaluation and online training: episodes in environments of their own, against loops by hand."""

import dataclasses

import gymnasium
import numpy as np
import pytest
from files import load, write
from toys import ACTION, OBS, Walk, toy_columns

from common.data.dataset import Normalizer
from common.evaluation import Collector, Evaluator
from common.run import stopping
from common.run.errors import Diverged, InputError
from common.run.stopping import Stopped

HALF = Normalizer(np.full(OBS, 0.5, np.float32), np.full(OBS, 2, np.float32))
STILL = np.zeros((2, ACTION), np.float32)


@pytest.fixture(scope="module")
def walk(tmp_path_factory):
    return load(write(tmp_path_factory.mktemp("data"), toy_columns(100)))


def proportional(gains, obs):
    """One controller for each seed: gains [S], observations [S, E, 4] -> [S, E, 2]."""
    return np.clip(-np.asarray(gains)[:, None, None] * obs[..., :2], -1, 1).astype(np.float32)


def by_hand(gain, seed):
    """Return, length and success of one episode on standardised observations, in a loop."""
    env = gymnasium.make("ssar-test/Walk-v0")
    obs, _ = env.reset(seed=seed)
    total, length, success, done = 0.0, 0, 0.0, False
    while not done:
        action = np.clip(-gain * (obs[:2] - 0.5) / 2, -1, 1).astype(np.float32)
        obs, reward, terminated, truncated, info = env.step(action)
        done = terminated or truncated
        total, length, success = total + reward, length + 1, max(success, info["success"])
    return total, length, float(success)


def test_every_slot_plays_exactly_its_own_episode_every_time(walk):
    data, gains = dataclasses.replace(walk, normalizer=HALF), [1.0, 4.0]
    evaluate = Evaluator(data, num_seeds=2, episodes=5, seed=3)
    episodes, again = (evaluate(proportional, gains) for _ in range(2))
    np.testing.assert_array_equal(episodes, again)
    lengths = np.reshape([slot.length for slot in evaluate.slots], (2, 5))
    for i, gain in enumerate(gains):
        for j in range(5):
            expected = by_hand(gain, seed=100_000 * (3 + i) + j)
            found = episodes.returns[i, j], lengths[i, j], episodes.success[i, j]
            assert found == pytest.approx(expected, rel=1e-5)
    assert len(set(lengths.ravel())) > 1  # tasks end at different times
    assert 0 < episodes.success.mean() < 1


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
        ({"success": np.array([True])}, 1),
        ({"is_success": np.float32(1)}, 1),
    ],
)
def test_success_is_read_in_every_usual_form(walk, monkeypatch, info, expected):
    step = Walk.step
    monkeypatch.setattr(Walk, "step", lambda *args: (*step(*args)[:4], dict(info)))
    episodes = Evaluator(walk, num_seeds=1, episodes=2, seed=0)(proportional, [1.0])
    np.testing.assert_array_equal(episodes.success, np.full((1, 2), expected))


def test_collected_rows_are_those_of_a_loop_by_hand(walk):
    """A successor belongs to its own episode; a time limit is no terminal."""
    spec, keys = gymnasium.spec("ssar-test/Goal-v0"), ("clock", "one", "position")
    data = dataclasses.replace(walk, env=spec, normalizer=HALF, observation_keys=keys)
    collector, rng, ends = Collector(data, num_seeds=2, seed=3), np.random.default_rng(0), []
    envs, rewards = [gymnasium.make(spec) for _ in range(2)], [[], []]
    observations = [env.reset(seed=100_000 * (3 + i) + 99_999)[0] for i, env in enumerate(envs)]
    acted_in = collector.reset()

    def assert_standardised(row, obs):
        expected = (np.r_[obs["clock"], obs["one"], obs["position"]] - 0.5) / 2
        np.testing.assert_allclose(row, expected, rtol=1e-6)

    for step in range(1, 61):
        actions = rng.uniform(-1, 1, (2, ACTION)).astype(np.float32)
        outcome = collector.step(actions)
        for i, env in enumerate(envs):
            assert_standardised(acted_in[i], observations[i])
            observations[i], reward, terminated, truncated, _ = env.step(actions[i])
            rewards[i].append(reward)
            assert_standardised(outcome.next_obs[i], observations[i])
            assert outcome.reward[i] == np.float32(reward)
            assert outcome.terminated[i] == terminated
            finished = [row for row in outcome.finished if row["seed"] == 3 + i]
            assert len(finished) == (terminated or truncated)
            for row in finished:
                assert (row["step"], row["length"]) == (step, len(rewards[i]))
                assert row["return"] == pytest.approx(sum(rewards[i]))
                ends.append(terminated)
                observations[i], rewards[i] = env.reset()[0], []
        acted_in = outcome.obs
    assert {*ends} == {True, False}
    assert outcome.reward.dtype == outcome.next_obs.dtype == np.float32


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
    with pytest.raises(Diverged, match="action is not finite: lower"):
        envs.step(STILL + [[0, 0], [0, np.nan]])
    with pytest.raises(Diverged, match="action is not finite"):
        Evaluator(walk, 1, 1, 0)(proportional, [np.nan])


def test_environments_that_give_no_finite_numbers_are_named(walk, monkeypatch):
    for obs, reward, what in ((np.nan, 0.0, "an observation"), (0.0, 1e39, "a reward")):
        outcome = np.full(OBS, obs), reward, False, False, {}
        monkeypatch.setattr(Walk, "step", lambda *_, outcome=outcome: outcome)
        envs = Collector(walk, 2, seed=0)
        envs.reset()
        with pytest.raises(InputError, match=f"Walk-v0 gave {what} that is not finite: fix"):
            envs.step(STILL)
