"""Rows and episodes against a plain loop."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.data.load import transitions
from common.run.errors import InputError

FLAGS = ("", "", "", "terminal", "timeout", "both", "gap")


def rows_by_hand(flags, kept, limit, successors):
    """The rows that training may use, and the number of the episode of each."""
    rows, episodes, episode, steps, last = [], [], 0, 0, len(flags) - 1
    if "timeout" in flags or "both" in flags:
        limit = None
    for i, flag in enumerate(flags):
        steps += 1
        is_terminal, timed_out = flag in ("terminal", "both"), flag in ("timeout", "both")
        is_end = is_terminal or timed_out or steps == limit or i == last
        if kept == "qlearning":
            is_kept = i < last and not timed_out and (is_terminal or steps != limit)
        elif successors:
            is_kept, is_end = True, is_end or flag == "gap"
        else:
            is_kept = is_terminal or not is_end
        if is_kept:
            rows.append(i)
            episodes.append(episode)
        if is_end:
            episode, steps = episode + 1, 0
    return rows, episodes


@settings(max_examples=200, deadline=None)
@given(
    flags=st.lists(st.sampled_from(FLAGS), min_size=1, max_size=40),
    kept=st.sampled_from(["all", "qlearning"]),
    limit=st.sampled_from([None, 1, 3, 5]),
    successors=st.booleans(),
)
def test_rows_and_episodes_against_a_plain_loop(flags, kept, limit, successors):
    """Recorded time-outs come before the step limit, and recorded successors before the next row.

    A gap is a row whose recorded successor is not the next row.
    """
    flags = np.array(flags)
    obs = np.arange(len(flags), dtype=np.float32)[:, None]
    next_obs = np.r_[obs[1:], obs[-1:]] + 0.5 * (flags == "gap")[:, None]
    columns = {"observations": obs, "actions": obs, "rewards": obs[:, 0]}
    columns["terminals"] = np.isin(flags, ["terminal", "both"])
    timeouts = np.isin(flags, ["timeout", "both"])
    if timeouts.any():
        columns["timeouts"] = timeouts
    if successors:
        columns["next_observations"] = next_obs
    rows, episodes = rows_by_hand(flags, kept, limit, successors)
    if not rows:
        with pytest.raises(InputError, match="x has no row with a known successor: record whole"):
            transitions("x", columns, kept, limit)
        return
    found = transitions("x", columns, kept, limit)
    for name in ("observations", "actions", "rewards", "terminals"):
        np.testing.assert_array_equal(found[name], columns[name][rows])
    following = next_obs if successors and kept == "all" else np.r_[obs[1:], obs[-1:]]
    np.testing.assert_array_equal(found["next_observations"], following[rows])
    np.testing.assert_array_equal(found["episode_ends"], np.r_[np.diff(episodes) > 0, True])
