"""Episodes and transitions against a plain loop, and fingerprints."""

from types import SimpleNamespace

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from common.data.dataset import Dataset, find_episode_ends, fingerprint
from common.data.load import transitions


@settings(max_examples=100, deadline=None)
@given(
    flags=st.lists(
        st.sampled_from(["", "", "", "terminal", "timeout", "gap"]), min_size=1, max_size=40
    ),
    max_steps=st.sampled_from([None, 1, 3, 5]),
)
def test_episodes_against_a_plain_loop(flags, max_steps):
    """With recorded successors, every row stays; without, those whose successor is known."""
    rows = len(flags)
    obs = np.arange(rows, dtype=np.float32)[:, None]
    next_obs = obs + 1
    next_obs[[flag == "gap" for flag in flags]] += 0.5
    terminals, timeouts = (np.array([f == kind for f in flags]) for kind in ("terminal", "timeout"))
    rewards = np.random.default_rng(rows).standard_normal(rows).astype(np.float32)
    for successors in (next_obs, None):
        limit = max_steps
        if successors is None and timeouts.any():
            limit = None  # recorded time-outs come first
        episodes, current = [], []
        for i, flag in enumerate(flags):
            current.append(i)
            is_end = flag in ("terminal", "timeout") or (flag == "gap" and successors is not None)
            if is_end or len(current) == limit or i == rows - 1:
                episodes.append(current)
                current = []
        last = [episode[-1] for episode in episodes]
        ends = find_episode_ends(obs, successors, terminals | timeouts, limit)
        assert np.flatnonzero(ends).tolist() == last
        totals = [rewards[episode].sum(dtype=float) for episode in episodes]
        found = Dataset.returns.fget(SimpleNamespace(rewards=rewards, episode_ends=ends))
        np.testing.assert_allclose(found, totals, atol=1e-6)
    columns = {"observations": obs, "terminals": terminals, "timeouts": timeouts}
    columns |= {"actions": obs, "rewards": rewards}
    expected = [i for i in range(rows) if i not in last or terminals[i]]
    if expected:
        kept = transitions("test", columns, "all", max_steps)
        assert kept["observations"][:, 0].tolist() == expected


def test_fingerprint_sees_every_bit():
    a, b = np.arange(5.0), np.arange(6.0)
    changed = np.r_[a[:-1], np.nextafter(a[-1], 9)]
    sets = ([a], [b], [a, b], [changed], [a.astype(np.float32)], [a.reshape(5, 1)])
    assert len({fingerprint(*arrays) for arrays in sets}) == len(sets)
    assert fingerprint(a) == fingerprint(a.copy()) and len(fingerprint(a)) == 16
