"""Evaluation: one episode a slot, seeded, in environments of its own."""

import gymnasium
import numpy as np
import pytest
from toys import toy_columns, write_hdf5

from common.checks import InputError
from common.dataset import Normalizer, fit_normalizer
from common.evaluation import Evaluator
from common.loading import load_dataset

IDENTITY = Normalizer(np.zeros(4, np.float32), np.ones(4, np.float32))


@pytest.fixture(scope="module")
def walk(tmp_path_factory):
    path = write_hdf5(tmp_path_factory.mktemp("data") / "walk.hdf5", **toy_columns(100))
    return load_dataset("walk", path, "ssar-test/Walk-v0")


def proportional(gains, obs):
    """One controller a seed: gains [S], observations [S, E, 4] -> [S, E, 2]."""
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
    return total, length, success


def test_every_slot_runs_exactly_its_own_episode(walk):
    episodes = Evaluator(walk, num_seeds=2, episodes=5, seed=3)(proportional, [0.5, 2.0], IDENTITY)
    for i, gain in enumerate([0.5, 2.0]):
        for j in range(5):
            total, length, success = by_hand(gain, seed=100_000 * (3 + i) + j)
            assert episodes.returns[i, j] == pytest.approx(total, rel=1e-5)
            assert episodes.lengths[i, j] == length
            assert episodes.success[i, j] == success
    assert len(set(episodes.lengths.ravel())) > 1  # tasks end at different times
    assert 0 < episodes.success.mean() < 1


def test_evaluation_repeats_itself_and_a_seed_does_not_depend_on_the_others(walk):
    evaluate = Evaluator(walk, num_seeds=2, episodes=4, seed=0)
    first = evaluate(proportional, [1.0, 1.0], IDENTITY)
    second = evaluate(proportional, [1.0, 1.0], IDENTITY)
    for a, b in zip(first, second, strict=True):
        np.testing.assert_array_equal(a, b)
    alone = Evaluator(walk, num_seeds=1, episodes=4, seed=1)(proportional, [1.0], IDENTITY)
    np.testing.assert_array_equal(first.returns[1], alone.returns[0])
    assert not np.array_equal(first.returns[0], first.returns[1])  # other starts


def test_policies_see_what_the_normalizer_makes_of_observations(walk):
    normalizer = fit_normalizer(walk.observations)
    evaluator = Evaluator(walk, num_seeds=1, episodes=2, seed=0)
    undo = lambda gains, obs: proportional(gains, obs * normalizer.std + normalizer.mean)
    raw = evaluator(proportional, [1.0], IDENTITY)
    standardised = evaluator(undo, [1.0], normalizer)
    np.testing.assert_allclose(raw.returns, standardised.returns, rtol=1e-4)
    different = evaluator(proportional, [1.0], normalizer)
    assert not np.allclose(raw.returns, different.returns, rtol=1e-3)


def test_environments_that_do_not_fit_the_data_are_named(walk):
    def message(env_id):
        data = load_dataset("walk", walk.source, env_id)
        with pytest.raises(InputError) as error:
            Evaluator(data, num_seeds=1, episodes=1, seed=0)
        return str(error.value)

    assert "'observations' has 4 dimensions but Hopper-v4 has 11" in message("Hopper-v4")
    assert "--config.env=" in message("Hopper-v4")
    assert "'actions' has 2 dimensions" in message("ssar-test/One-v0")
    assert "actions in [-2.0, 2.0]" in message("ssar-test/Wide-v0")
    assert "RescaleAction" in message("ssar-test/Wide-v0")


def test_success_is_blank_where_the_environment_reports_none():
    demo = load_dataset("demo")
    still = lambda params, obs: np.zeros((*obs.shape[:2], 2), np.float32)
    episodes = Evaluator(demo, num_seeds=1, episodes=2, seed=0)(
        still, None, fit_normalizer(demo.observations)
    )
    assert np.isnan(episodes.success).all()
    assert (episodes.lengths == 50).all()
