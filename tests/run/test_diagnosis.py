"""Failure signatures, warnings and likely causes, from made-up evaluations."""

from types import SimpleNamespace

import numpy as np
import pytest
from toys import frozen

from common.run.diagnosis import broken_parts, check_trusted, likely_cause, warnings
from common.run.errors import InputError
from common.run.records import Records

DATA = SimpleNamespace(rewards=np.ones(4, np.float32), returns=np.zeros(1),
                       reference=(0.0, 100.0), scattered=0.0, source="toy",
                       episode_ends=np.array([0, 0, 0, 1], bool))  # fmt: skip


def rows(phase="offline", **columns):
    """Evaluations of seed 3 every thousand steps, of ten episodes; given what changes."""
    length = max(np.size(column) for column in columns.values())
    values = {"return_std": 5.0, "episodes": 10, "n": 1.0, "beta_mean": 1.0, "anneal": 1.0}
    values = {key: np.broadcast_to(x, length) for key, x in (values | columns).items()}
    first = 1 if phase == "offline" else 0
    found = [
        {key: float(x[t]) for key, x in values.items()}
        | {"phase": phase, "step": 1000 * (t + first), "seed": 3}
        for t in range(length)
    ]
    if phase == "online":  # no update before the first step
        del found[0]["anneal"], found[0]["beta_mean"]
    return found


def named(evaluations, trusted=0.5, data=DATA, **overrides):
    """What is warned of, by what it begins with; the signatures on a scale from 0 to 100."""
    records = Records.__new__(Records)
    records.evaluations, records.seeds = evaluations, [3]
    config = frozen(**{"offline_steps": 10_000, "coefficient_init": 1.0} | overrides)
    fraction = None if trusted is None else [trusted]
    found = warnings(config, data, records, fraction)
    assert all("seed 3" in text for text in found if text.startswith((COLLAPSE, THIN, SWITCH)))
    return [text.split(" (")[0].split(":")[0] for text in found]


RISE_AND_FALL = [10, 40, 70, 80, 80, 80, 50, 20, 20, 20]
# A Hopper run in which little changes except from one evaluation to the next.
UNSTEADY = [47, 44, 24, 34, 18, 34, 29, 35, 36, 16, 45, 29, 33, 42, 37, 19, 36, 1, 40, 5]
GROWS = 1 + 0.2 * np.arange(10)
COLLAPSE = "collapse while n grows"
THIN = "near-zero score with a thin sub-dataset"
SWITCH = "drop at the switch with β near zero"


def test_a_collapse_while_n_grows_is_named_and_no_other():
    assert named(rows(return_mean=RISE_AND_FALL, n=GROWS)) == [COLLAPSE]
    long_ago = rows(return_mean=[10] * 10 + RISE_AND_FALL, n=[1.0, *[1.6] * 19])
    assert named(long_ago) == []  # n had stopped
    assert named(rows(return_mean=RISE_AND_FALL)) == []
    assert named(rows(return_mean=[*range(0, 100, 10)], n=GROWS)) == []
    assert named(rows(return_mean=[80, 80, 80, 50, 48, 50, 45, 50, 46, 45], n=GROWS)) == []
    assert named(rows(return_mean=RISE_AND_FALL, n=GROWS, return_std=200.0)) == []  # chance
    assert named(rows(return_mean=UNSTEADY, n=1 + 0.08 * np.arange(20))) == []
    assert named(rows(return_mean=np.array(RISE_AND_FALL) / 20, n=GROWS)) == []  # never got far
    assert named(rows(return_mean=RISE_AND_FALL, n=GROWS), coefficient="fixed") == []


def test_a_collapse_after_the_first_evaluation_is_named():
    """Scores of a Hopper run with update_period=1000 and n_end=60: β is 0 from the third on."""
    returns = [56, 5, 8, 12, 12, 12, 12, 12, 12, 7, 12, 12]
    assert named(rows(return_mean=returns, n=[1, 6.9, *[12.8] * 10])) == [COLLAPSE]


def test_a_recovery_does_not_take_a_collapse_back():
    again = [*RISE_AND_FALL, 60, 80, 90]
    assert named(rows(return_mean=again, n=np.r_[GROWS, 3, 3, 3])) == [COLLAPSE]


def test_a_thin_sub_dataset_with_a_score_near_zero_is_named():
    assert named(rows(return_mean=[0, 1, 0, 2, 1, 0]), trusted=0.02) == [THIN]
    assert named(rows(return_mean=[0, 1, 0, 2]), trusted=0.02) == []  # less than half way
    assert named(rows(return_mean=[0, 1, 0, 2, 1, 0]), trusted=0.5) == []
    assert named(rows(return_mean=[0, 1, 0, 2, 30, 40]), trusted=0.02) == []


def test_a_drop_at_the_switch_is_named_if_the_coefficient_is_near_zero():
    falls, holds = [80, 30, 20, 25, 60], [80, 78, 75, 80, 82]
    small = {"anneal": 0.02, "phase": "online"}
    assert named(rows(return_mean=falls, **small)) == [SWITCH]
    assert named(rows(return_mean=falls, beta_mean=0.01, phase="online")) == [SWITCH]
    assert named(rows(return_mean=falls, phase="online")) == []
    unsteady = rows(return_mean=UNSTEADY) + rows(return_mean=[80, 39, 39, 36], **small)
    assert named(unsteady) == []
    assert named(rows(return_mean=holds, **small)) == []
    plain = {"coefficient_init": 0.0, "coefficient": "fixed"}  # TD3
    assert named(rows(return_mean=falls, **small), **plain) == []
    alone = {"offline_steps": 0, "coefficient": "fixed"}  # no switch
    assert named(rows(return_mean=falls, **small), **alone) == []
    again = {"offline_steps": 0, "offline_checkpoint": "runs/a"}
    assert named(rows(return_mean=falls, **small), **again) == [SWITCH]


def test_other_warnings():
    steady = rows(return_mean=[50.0] * 3, trusted_fraction=0.004)
    assert named(steady, trusted=None) == ["thin sub-dataset"]  # by the batches
    assert named(rows(return_mean=[50.0] * 3), trusted=None) == []
    assert named(steady, trusted=1.0) == ["selection=return trusts every transition"]
    scattered = SimpleNamespace(**vars(DATA) | {"scattered": 0.9})
    assert named(steady, data=scattered) == ["scattered rows"]
    assert named(steady, offline_steps=0, online_steps=40) == ["untrained coefficient"]


# ------------------------------------------------------------------------------- divergence


@pytest.mark.parametrize(
    ("overrides", "data", "words"),
    [
        ({"reward_scale": 500.0}, {}, "rewards make values of up to 5e+04: lower --config.reward"),
        ({}, {"rewards": np.full(1, 6, np.float32)}, "lower --config.critic_lr"),  # Hopper's
        ({}, {"rewards": np.zeros(0, np.float32)}, "lower --config.critic_lr"),
    ],
)
def test_the_likely_cause_follows_the_evidence(overrides, data, words):
    data = SimpleNamespace(**vars(DATA) | data)
    assert likely_cause(frozen(**overrides), data).startswith(words)


def test_broken_parts_are_named_after_the_fields():
    good, bad = np.ones(3, np.float32), np.array([1, np.nan, np.inf], np.float32)
    count = np.array([3], np.int32)
    tree = {"actor": {"w": good, "b": bad, "c": bad}, "opt": {"0": count, "1": {"mu": bad}}}
    assert broken_parts(tree) == ["actor", "opt"]
    assert broken_parts({"0": tree, "1": {"rows": {"reward": bad}}}) == ["actor", "opt", "rows"]
    assert broken_parts({"actor": {"w": good}, "step": count}) == []


def test_an_empty_sub_dataset_is_refused():
    none = np.zeros((2, 4), bool)
    check_trusted(none | [True, False, False, False], DATA, frozen())
    check_trusted(np.zeros((2, 0), bool), DATA, frozen())  # no data
    none[0] = True  # the second seed still trusts nothing
    for selection, words in (
        ("return", "give a --config.return_threshold below the best return, 8.0, or choose"),
        ("success", "no episode ends in a reward other than 2.0, or choose another"),
        ("iql", "lower --config.expectile or raise --config.iql_steps, or choose another"),
    ):
        config = frozen(selection=selection, reward_bias=2.0)
        with pytest.raises(
            InputError, match=f"selection={selection} trusts nothing in toy: {words}"
        ):
            check_trusted(none, DATA, config)
