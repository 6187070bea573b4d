"""Failure signatures, warnings and likely causes, from made-up evaluations."""

import sys
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
from comparing import rows_of
from toys import frozen

from common.data.dataset import Dataset
from common.run.diagnosis import broken_parts, check_trusted, warnings
from common.run.errors import InputError
from common.run.plot import plot_run
from common.run.records import Records, print_table
from common.run.workdir import as_json

# One episode of return 30.
DATA = Dataset(*np.zeros((6, 4)), env=SimpleNamespace(id="toy"), source="toy", normalizer=None,
               fingerprint="0", reference=(0.0, 100.0), unit="normalised score")  # fmt: skip
DATA = replace(DATA, rewards=np.full(4, 7.5), episode_ends=np.array([0, 0, 0, 1], bool))
BETA = {"beta_min": 1.0, "beta_mean": 1.0, "beta_max": 1.0, "anneal": 1.0}


def rows(returns, phase="offline", seed=3, n=1.0, **columns):
    """Evaluations of a seed every thousand steps."""
    row = {"phase": phase, "seed": seed, "episodes": 10, "success_rate": np.nan} | BETA | columns
    found = [row | {"score": x, "return_mean": x, "return_std": 5.0} for x in map(float, returns)]
    for t, (x, row) in enumerate(zip(np.broadcast_to(n, len(found)), found, strict=True)):
        row |= {"n": x, "step": 1000 * (t + (phase == "offline"))}
    if phase == "online":  # no update before the first step
        found[0] = {key: x for key, x in found[0].items() if key not in BETA}
    return found


def warned(evaluations, trusted=0.5, data=DATA, **overrides):
    """What is warned of."""
    records = Records.__new__(Records)
    records.evaluations, records.seeds = evaluations, sorted({row["seed"] for row in evaluations})
    config = frozen(**{"offline_steps": 10_000, "coefficient_init": 1.0} | overrides)
    return warnings(config, data, records, trusted and [trusted] * len(records.seeds))


def named(*args, **kwargs):
    """What is warned of, by what it begins with."""
    return [text.split(":")[0].removesuffix(" (seed 3)") for text in warned(*args, **kwargs)]


RISE_AND_FALL = [10, 40, 70, 80, 80, 80, 30, 20, 3, 20, 15, 20]
FORGOTTEN = [3, 6, 1, 22, 22, 2, 33, 1, 1, 2, 1, 1, 3, 2]  # unsteady before it was lost
# A Hopper run in which little changes except from one evaluation to the next.
UNSTEADY = [47, 44, 24, 34, 18, 34, 29, 35, 36, 16, 45, 29, 33, 42, 37, 19, 36, 1, 40, 5]
GROWS, SWITCH = "collapse while n grows", "drop at the switch with β near zero"


def test_a_collapse_is_named_with_what_became_of_n_and_beta():
    (text,) = warned(rows(FORGOTTEN, n=1 + 0.2 * np.arange(14), beta_mean=1.45))
    assert text == (
        "collapse while n grows (seed 3): the score fell from 22 around offline step 7000 to at "
        "most 2 from offline step 8000 on; n 2.2 → 3, mean β 1.45 → 1.45 (at most 1.5); raise "
        "update_period or lower n_end, and raise coefficient_init"
    )
    # Hopper with update_period=1000 and n_end=60: β is 0 from the third evaluation on.
    early = [56, 5, 8, 12, 12, 12, 7]
    assert named(rows(early, n=[1, 6.9, *[12.8] * 5])) == [GROWS]
    for fallen in (early + [80] * 9, RISE_AND_FALL, [50] * 200 + [9] * 4, UNSTEADY * 5 + [3] * 5):
        assert named(rows(UNSTEADY, seed=2) + rows(fallen)) == ["collapse"]
        assert named(rows(fallen), coefficient="fixed") == ["collapse"]
    for fine in (UNSTEADY, range(0, 100, 10), [80, 80, 80, 50, 40, 45, 30, 50], [50] * 4 + [1] * 3):
        assert named(rows(fine, n=np.linspace(1, 3, len(fine)))) == []


def test_noise_is_rarely_called_a_collapse():
    """Two hundred evaluations that rise and then vary as Hopper's do."""
    noise = np.random.default_rng(0).normal(1, 0.35, (100, 200)).clip(0)
    runs = 60 * np.minimum(np.arange(200) / 60, 1) * noise
    assert sum(named(rows(returns, n=np.linspace(1, 3, 200))) != [] for returns in runs) <= 2


def test_a_score_near_zero_is_named():
    thin, poor = "near-zero score with a thin sub-dataset", replace(DATA, rewards=np.zeros(4))
    assert named(rows([0, 1, 0, 2, 1, 0]), trusted=0.02) == [thin]
    assert named(rows([0, 1, 0, 2]), trusted=0.02) == []  # less than half way
    assert named(rows([0, 1, 0, 2, 1, 0])) == ["near-zero score"]
    assert named(rows([0, 1, 0, 2, 1, 0]), data=poor) == []  # nor do the data
    assert named(rows([0, 1, 0, 2, 30, 40, 35]), trusted=0.02) == []


def test_a_drop_at_the_switch_is_named_if_the_coefficient_is_near_zero():
    falls, small, offline = [80, 20, 10, 20, 15], {"anneal": 0.02}, rows([80] * 5)
    assert named(offline + rows(falls, "online", **small)) == [SWITCH]
    assert named(rows(falls, "online", beta_mean=0.01), offline_checkpoint="runs/a") == [SWITCH]
    assert named(offline + rows(falls, "online", n=2.0)) == ["collapse"]
    assert named(offline + rows([80] * 9 + falls, "online", **small)) == ["collapse"]  # later
    assert named(offline + rows([80, 78, 20, 30, 82, 20], "online", **small)) == []


def test_a_thin_sub_dataset_is_named_by_the_batches_while_the_data_are_unknown():
    steady = rows([50] * 3, trusted_fraction=0.004)
    assert named(steady, trusted=None) == ["thin sub-dataset"]


def written(folder, evaluations, **overrides):
    """Records of two seeds that have been written."""
    records = Records(str(folder), frozen(seed=3, num_seeds=2, **overrides), DATA)
    records.evaluations = evaluations
    records.write()
    return records


def test_a_score_that_is_not_a_number_counts_as_what_it_is(tmp_path, capsys):
    records = written(tmp_path, rows([50, np.inf, 20]) + rows([np.nan] * 3, seed=4))
    found = warnings(records.config, DATA, records)
    assert found[0].startswith("not a number (seed 3): the score is inf at offline step 2000")
    results = records.results() | {"algorithm": "", "task": "", "seeds": [3, 4], "warnings": found}
    results = as_json(results | {"n_stopped_at": [None, None]})
    assert (results["last"], results["best"]) == ([20, None], [None, None])
    plot_run(str(tmp_path / "a.png"), records, results, records.config)
    print_table(results)
    last = "\nseed 3's last score, 20.000, is below the data's own, 30.000\n"
    assert capsys.readouterr().out.endswith(last)
    scores = [row["score"] for row in rows_of(tmp_path)]
    assert scores == ["50.0", "inf", "20.0", "nan", "nan", "nan"]
    records.close()


def test_wandb_gets_settings_curves_and_final_scores(tmp_path, monkeypatch):
    with monkeypatch.context() as patch, pytest.raises(InputError, match="wandb=a .* pip install"):
        patch.setitem(sys.modules, "wandb", None)
        written(tmp_path, [], wandb="a")
    why = "pip install wandb tensorboard to test --config.wandb"
    wandb, _ = (pytest.importorskip(name, reason=why) for name in ("wandb", "tensorboard"))
    monkeypatch.setenv("WANDB_MODE", "offline")
    records = written(tmp_path, rows([50, 20]) + rows([7, 8], seed=4), wandb="a")
    records.results()
    assert wandb.run.project == "a" and wandb.run.config["num_seeds"] == 2
    records.close()
    wandb.teardown()  # waits until the file is complete
    wandb.tensorboard.unpatch()  # other tests write tensorboard's files too
    (path,) = tmp_path.glob("wandb/offline-run-*/*.wandb")
    assert b"seed_4/offline_normalized_eval_score" in path.read_bytes()
    assert b"mean_last_10" in path.read_bytes()


def test_broken_parts_are_named_after_the_fields():
    good, bad = np.ones(3, np.float32), np.array([1, np.nan, np.inf], np.float32)
    count = np.array([3], np.int32)
    tree = {"actor": {"w": good, "b": bad, "c": bad}, "opt": {"0": count, "1": {"mu": bad}}}
    assert broken_parts({"0": tree, "1": {"rows": {"reward": bad}}}) == ["actor", "opt", "rows"]
    assert broken_parts({"actor": {"w": good}, "step": count}) == []


def test_an_empty_sub_dataset_is_refused():
    none = np.zeros((2, 4), bool)
    check_trusted(none | [True, False, False, False], DATA, frozen())
    check_trusted(np.zeros((2, 0), bool), DATA, frozen())  # no data
    none[0] = True  # the second seed still trusts nothing
    sparse = replace(DATA, rewards=np.float32([0, 0, 1, 0]))
    for selection, data, words in (
        ("return", DATA, "lower --config.return_threshold, or use task custom, which needs none"),
        ("success", DATA, "it needs two reward values, and episodes"),
        ("auto", sparse, "it needs .*: try selection=iql"),
        ("iql", DATA, "lower --config.expectile, or raise --config.iql_steps"),
    ):
        with pytest.raises(InputError, match=f"={selection} trusts nothing in toy: {words}"):
            check_trusted(none, data, frozen(selection=selection))


def test_success_rates_are_judged_where_they_are_the_score():
    """Returns there depend on how long an episode may last."""
    play = replace(DATA, unit="success rate in %", reference=None)

    def found(rates, trusted=0.5):
        evaluations = rows(100 * np.array(rates))
        for row, rate in zip(evaluations, rates, strict=True):
            row |= {"success_rate": rate, "return_mean": rate - 200}
        return named(evaluations, trusted, play)

    assert found([0.0] * 10, trusted=0.05) == ["near-zero score with a thin sub-dataset"]
    assert found([0, 0.3, 0.8, 0.9, 0.9, 1, 0, 0, 0.1, 0, 0, 0]) == ["collapse"]
    assert found(np.linspace(0, 1, 12)) == []
