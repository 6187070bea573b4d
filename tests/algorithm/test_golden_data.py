"""What the authors' helpers computed on a small data set: D̂, returns, normalisation, buffers."""

import numpy as np
from golden_cases import HERE
from helpers import settings

import ssar_td3bc as ssar
from common.data.dataset import find_episode_ends, fit_normalizer

with np.load(HERE / "data_helpers.npz", allow_pickle=False) as file:
    GOLDEN = dict(file)
REWARDS, TERMINALS = GOLDEN["dataset/rewards"], GOLDEN["dataset/terminals"]
MAX_STEPS = int(GOLDEN["max_steps"])


def ends_of(**options):
    observations, following = GOLDEN["dataset/observations"], GOLDEN["dataset/next_observations"]
    return find_episode_ends(observations, following, TERMINALS, **options)


def test_trusted_trajectories_are_the_authors():
    ends = ends_of(max_steps=MAX_STEPS)
    for threshold in (2, 4, 100):
        expected = GOLDEN[f"dense/ref_{threshold}/trusts"][: len(REWARDS)] > 0
        assert expected.any() == (threshold < 100)
        np.testing.assert_array_equal(ssar.select_by_return(REWARDS, ends, threshold), expected)
    raw = GOLDEN["sparse/raw_rewards"]
    for script, scale, bias in (("td3", 1, -1), ("cql", 10, -5)):
        expected = GOLDEN[f"sparse/{script}/trusts"][: len(raw)] > 0
        assert expected.any() and not expected.all()
        shifted = scale * raw + np.float32(bias)
        np.testing.assert_array_equal(ssar.select_by_success(shifted, ends, bias), expected)


def test_the_best_episodes_come_in_the_authors_order():
    """Their split has no time limit, a coarser gap between rows and no unfinished tail."""
    ends = ends_of(tolerance=1e-4)
    if not TERMINALS[-1]:
        ends = ends[: np.flatnonzero(ends)[-2] + 1]
    rows = np.arange(len(ends))
    trusted = np.stack([rows, rows + 1])  # of two seeds
    data = ssar.Transition(rows, rows, REWARDS[: len(ends)], rows, rows, trusted)
    kept = ssar.offline_part(data, ends, settings(ssar, buffer_init="part"))
    for count in (1, 2, 3, 50):
        best = GOLDEN[f"part/nums_{count}/kept_rows_in_order"]
        np.testing.assert_array_equal(kept.obs[: len(best)], best)
    assert len(kept.obs) == len(best)
    np.testing.assert_array_equal(kept.trusted, [kept.obs, kept.obs + 1])


def test_normalisation_is_the_authors():
    observations = GOLDEN["dataset/observations"]
    normalizer = fit_normalizer(observations)
    np.testing.assert_allclose(normalizer.mean, GOLDEN["normalize/mean"], atol=1e-6)
    np.testing.assert_allclose(normalizer.std, GOLDEN["normalize/std"], atol=1e-6)
    expected = GOLDEN["normalize/observations"]
    np.testing.assert_allclose(normalizer(observations), expected, atol=2e-5)
