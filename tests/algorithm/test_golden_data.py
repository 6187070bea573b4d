"""What the authors' helpers computed on a small data set: D̂, returns, normalisation, buffers."""

import numpy as np
import pytest
from golden_cases import HERE
from helpers import both_scripts, settings

from common.data.dataset import episode_returns, find_episode_ends, fit_normalizer


@pytest.fixture(scope="module")
def helpers():
    with np.load(HERE / "data_helpers.npz", allow_pickle=False) as file:
        return dict(file)


def ends_of(helpers, **options):
    keys = ("observations", "next_observations", "terminals")
    return find_episode_ends(*(helpers[f"dataset/{key}"] for key in keys), **options)


@both_scripts
def test_trusted_trajectories_are_the_authors(ssar, helpers):
    rewards, ends = (
        helpers["dataset/rewards"],
        ends_of(helpers, max_steps=int(helpers["max_steps"])),
    )
    for threshold in (2, 4, 100):
        expected = helpers[f"dense/ref_{threshold}/trusts"][: len(rewards)] > 0
        assert expected.any() == (threshold < 100)
        np.testing.assert_array_equal(ssar.select_by_return(rewards, ends, threshold), expected)
    raw = helpers["sparse/raw_rewards"]
    for script, scale, bias in (("td3", 1, -1), ("cql", 10, -5)):
        expected = helpers[f"sparse/{script}/trusts"][: len(raw)] > 0
        assert expected.any() and not expected.all()
        shifted = scale * raw + np.float32(bias)
        np.testing.assert_array_equal(ssar.select_by_success(shifted, ends, bias), expected)


@both_scripts
def test_the_best_episodes_come_in_the_authors_order(ssar, helpers):
    """Their split has no time limit, a coarser gap between rows and no unfinished tail."""
    ends = ends_of(helpers, tolerance=1e-4)
    if not helpers["dataset/terminals"][-1]:
        ends = ends[: np.flatnonzero(ends)[-2] + 1]
    rows, column = np.arange(len(ends), dtype=np.float32), np.zeros((len(ends), 1))
    rewards, trusted = helpers["dataset/rewards"][: len(ends)], rows[None] % 2
    data = ssar.Transition(rows[:, None], column, rewards, column, rows, trusted)
    kept = ssar.offline_part(data, ends, settings(ssar, buffer_init="part"))
    order = kept.obs[:, 0].astype(int)
    for count in (1, 2, 3):
        best = helpers[f"part/nums_{count}/kept_rows_in_order"]
        np.testing.assert_array_equal(order[: len(best)], best)
    np.testing.assert_array_equal(order, helpers["part/nums_50/kept_rows_in_order"])
    np.testing.assert_array_equal(kept.reward, rewards[order])
    np.testing.assert_array_equal(kept.trusted, trusted[:, order])


def test_returns_are_the_authors(helpers):
    rewards, terminals = helpers["dataset/rewards"], helpers["dataset/terminals"]
    returns = episode_returns(rewards, ends_of(helpers, max_steps=int(helpers["max_steps"])))
    np.testing.assert_allclose(returns.mean(), helpers["avg_high_returns/none"], rtol=1e-6)
    high = returns[returns > 2].mean()
    np.testing.assert_allclose(high, helpers["avg_high_returns/2"], rtol=1e-6)
    # Their reward range splits at terminals and the time limit, and drops an unfinished tail.
    for limit in (8, 1000):
        ends = ends_of(helpers, max_steps=limit, tolerance=np.inf)
        returns = episode_returns(rewards, ends)
        if not terminals[-1] and len(ends) - 1 - np.flatnonzero(ends[:-1])[-1] < limit:
            returns = returns[:-1]
        expected = helpers[f"reward_range/max{limit}"]
        np.testing.assert_allclose([returns.min(), returns.max()], expected, rtol=1e-6)


def test_normalisation_is_the_authors(helpers):
    observations = helpers["dataset/observations"]
    normalizer = fit_normalizer(observations)
    np.testing.assert_allclose(normalizer.mean, helpers["normalize/mean"], atol=1e-6)
    np.testing.assert_allclose(normalizer.std, helpers["normalize/std"], atol=1e-6)
    expected = helpers["normalize/observations"]
    np.testing.assert_allclose(normalizer(observations), expected, atol=2e-5)
