"""Runs that fail: what is not finite ends them, SPEC section 10's signatures are named."""

import json
import os

import jax
import numpy as np
import pytest
from matplotlib.figure import Figure
from test_resume import config_of, rows_of
from toys import frozen, tiny_config, toy_columns, write_hdf5

import ssar_td3bc as ssar
from common import cli
from common.checks import InputError
from common.diagnosis import Diverged, first_broken, likely_cause, signatures
from common.evaluation import Episodes, Evaluator
from common.loading import load_dataset


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_hdf5(tmp_path_factory.mktemp("data") / "toy.hdf5", **toy_columns())


# ------------------------------------------------------------------------- what is not finite


def test_the_first_that_broke_is_named():
    broke = {"actor_loss": np.array([0, 9]), "q1": np.array([0, 7]), "critic_loss": [0, 7]}
    broke["margin"] = np.array([8, 0])
    parts = {"actor": np.array([True, True])}
    assert first_broken([20, 20], broke, parts) == (1, 7, ["critic_loss", "q1"])
    whole = dict.fromkeys(broke, np.zeros(2, int))
    parts = {name: np.array([False, name != "key"]) for name in ("coefficient", "actor", "key")}
    assert first_broken([20, 21], whole, parts) == (1, 21, ["actor", "coefficient"])
    assert first_broken([20, 20], whole, {"actor": np.zeros(2, bool)}) is None


@pytest.mark.parametrize(
    ("overrides", "evidence", "words"),
    [
        ({"reward_scale": 100.0}, {"largest_reward": 500.0}, "rewards of up to 500 make values"),
        ({"critic_lr": 0.1}, {}, "--config.critic_lr=0.1 is large: lower it"),
        ({}, {"n_grows": True}, "n was growing: raise --config.update_period=10"),
        ({"script": "ssar_cql"}, {"saturated": 0.3}, "30% of the rows have an action at ±1"),
        ({}, {"saturated": 0.3}, "nothing stands out"),
        ({}, {"largest_reward": 6.0}, "nothing stands out"),  # Hopper's
    ],
)
def test_the_likely_cause_follows_the_evidence(overrides, evidence, words):
    known = {"n_grows": False, "saturated": 0.0, "largest_reward": 1.0} | evidence
    assert likely_cause(frozen(**overrides), **known).startswith(words)


def test_a_run_that_diverges_keeps_what_it_had(data, tmp_path):
    """The poisoned row is met after some intervals; all before it is as it would have been."""
    columns = toy_columns()
    columns["rewards"][88] = 1e30  # first drawn in update 42
    poisoned = write_hdf5(tmp_path / "poisoned.hdf5", **columns)
    workdir = str(tmp_path / "run")
    config = config_of(poisoned, selection="none", batch_size=4)
    with pytest.raises(Diverged, match=r"critic_loss .*is not finite at update 42 \(offline\)"):
        ssar.main(config, workdir)
    rows = rows_of(workdir, "scores.csv")
    done = len(rows) // 2 * 20
    assert 0 < done < 60
    assert np.isfinite([float(row["critic_loss"]) for row in rows]).all()
    (name,) = [name for name in os.listdir(workdir + "/unfinished") if name == str(done // 20)]
    with pytest.raises(
        Diverged, match=f"finite checkpoint, of offline update {done}, stays in"
    ) as e:
        ssar.main(config, workdir)  # the same again, to the bit
    update = int(str(e.value).split("update ")[1].split()[0])
    assert done < update <= done + 20
    assert "rewards of up to 1e+30" in str(e.value) and "\n" not in str(e.value)
    assert rows_of(workdir, "scores.csv") == rows
    assert {"learning_curve.png", "unfinished"} <= set(os.listdir(workdir))
    with open(workdir + "/diverged.txt") as file:
        assert file.read() == f"{e.value}\n"
    assert "results.json" not in os.listdir(workdir)


def test_online_runs_and_labelling_stop_too(data, tmp_path):
    settings = {"offline_steps": 0, "online_steps": 40, "buffer_init": "none", "dataset": None}
    settings |= {"dataset_path": None, "coefficient": "fixed", "reward_scale": 1e29}
    with pytest.raises(Diverged, match=r"critic_loss.* is not finite at update 1 \(online\)"):
        ssar.main(tiny_config(**settings), str(tmp_path / "online"))
    assert os.path.exists(tmp_path / "online" / "episodes.csv")
    config = tiny_config(data, selection="iql", reward_scale=1e29, cache_dir=str(tmp_path))
    with pytest.raises(Diverged, match="iql_critic_loss is not finite at update 1 of the IQL"):
        ssar.main(config, str(tmp_path / "iql"))
    assert not [name for name in os.listdir(tmp_path) if name.endswith(".npz")]


def test_rows_out_of_their_order_are_named(data, tmp_path, capsys):
    columns, rng = toy_columns(), np.random.default_rng(0)
    shuffled = rng.permutation(len(columns["rewards"]))
    columns = {name: column[shuffled] for name, column in columns.items()}
    path = write_hdf5(tmp_path / "shuffled.hdf5", **columns)
    results = ssar.main(config_of(path, selection="none"), str(tmp_path / "run"))
    assert any(text.startswith("scattered rows: ") for text in results["warnings"])
    assert "warning: scattered rows: " in capsys.readouterr().err


def test_episodes_of_one_step_are_no_rows_out_of_their_order(tmp_path):
    columns = toy_columns()
    columns["timeouts"] = ~columns["terminals"].astype(bool)
    path = write_hdf5(tmp_path / "short.hdf5", **columns)
    dataset = load_dataset(None, path, env="ssar-test/Walk-v0")
    assert len(dataset.returns) == len(dataset.rewards) and dataset.scattered == 0


@pytest.mark.parametrize(
    "error",
    [
        MemoryError("Unable to allocate 3 TiB"),
        jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory"),
    ],
)
def test_too_little_memory_is_one_sentence(error):
    with pytest.raises(SystemExit, match="^ssar_cql: out of memory .*: lower --config.num_seeds "):
        cli._end(error, "ssar_cql", True)


@pytest.mark.parametrize("bad", [np.nan, 1e39])  # the latter in float32
def test_an_environment_that_gives_nan_is_named(bad, tmp_path, monkeypatch):
    import toys

    step = toys.Walk.step

    def broken(self, action):
        obs, reward, *rest = step(self, action)
        return obs, bad if self.steps == 2 else reward, *rest

    monkeypatch.setattr(toys.Walk, "step", broken)
    settings = {"offline_steps": 0, "online_steps": 40, "buffer_init": "none", "dataset": None}
    config = tiny_config(**settings | {"dataset_path": None, "coefficient": "fixed"})
    with pytest.raises(InputError, match="Walk-v0 gave a reward that is not finite .* step 2: "):
        ssar.main(config, str(tmp_path / "run"))


# ---------------------------------------------------------------------------- signatures


def history(phase="offline", **columns):
    """Evaluations of one seed every thousand steps, of ten episodes; given what changes."""
    length = max(np.size(column) for column in columns.values())
    rows = {"return_std": 5.0, "episodes": 10, "n": 1.0, "beta_mean": 1.0, "anneal": 1.0} | columns
    rows = {key: np.broadcast_to(np.asarray(x, float), length) for key, x in rows.items()}
    first = 1 if phase == "offline" else 0
    return [
        {key: np.array([x[t]]) for key, x in rows.items()}
        | {"phase": phase, "step": 1000 * (t + first)}
        | {"measured": [] if phase == "online" and t == 0 else ["anneal", "beta_mean"]}
        for t in range(length)
    ]


def named(history, trusted=0.5, **overrides):
    """The signatures found, on a scale from 0 to 100, by what they begin with."""
    config = frozen(**{"offline_steps": 10_000, "coefficient_init": 1.0} | overrides)
    found = signatures(history, 0.0, 100.0, [trusted], config, [3])
    assert all("seed 3" in text and "SEED" not in text for text in found)
    return [text.split(" (")[0] for text in found]


RISE_AND_FALL = [10, 40, 70, 80, 80, 80, 50, 20, 20, 20]
# A Hopper run in which little changes but from one evaluation to the next.
UNSTEADY = [47, 44, 24, 34, 18, 34, 29, 35, 36, 16, 45, 29, 33, 42, 37, 19, 36, 1, 40, 5]
GROWS = 1 + 0.2 * np.arange(10)
COLLAPSE = "collapse while n grows"
THIN = "near-zero score with a thin sub-dataset"
SWITCH = "drop at the switch with β near zero"


def test_a_collapse_while_n_grows_is_named_and_no_other():
    assert named(history(return_mean=RISE_AND_FALL, n=GROWS)) == [COLLAPSE]
    long_ago = history(return_mean=[10] * 10 + RISE_AND_FALL, n=[1.0, *[1.6] * 19])
    assert named(long_ago) == []  # n had stopped
    assert named(history(return_mean=RISE_AND_FALL)) == []
    assert named(history(return_mean=[*range(0, 100, 10)], n=GROWS)) == []
    assert named(history(return_mean=[80, 80, 80, 50, 48, 50, 45, 50, 46, 45], n=GROWS)) == []
    chance = history(return_mean=RISE_AND_FALL, n=GROWS, return_std=200.0)
    assert named(chance) == []  # ten episodes cannot tell
    assert named(history(return_mean=UNSTEADY, n=1 + 0.08 * np.arange(20))) == []
    assert named(history(return_mean=np.array(RISE_AND_FALL) / 20, n=GROWS)) == []  # never got far
    fixed = history(return_mean=RISE_AND_FALL, n=GROWS)
    assert named(fixed, coefficient="fixed") == []


def test_a_collapse_after_the_first_evaluation_is_named():
    """Scores of a Hopper run with update_period=1000 and n_end=60: β is 0 from the third on."""
    returns = [56, 5, 8, 12, 12, 12, 12, 12, 12, 7, 12, 12]
    assert named(history(return_mean=returns, n=[1, 6.9, *[12.8] * 10])) == [COLLAPSE]


def test_nothing_after_the_fact_takes_a_collapse_back():
    again = [*RISE_AND_FALL, 60, 80, 90]
    assert named(history(return_mean=again, n=np.r_[GROWS, 3, 3, 3])) == [COLLAPSE]


def test_a_score_near_zero_with_thin_data_is_named():
    assert named(history(return_mean=[0, 1, 0, 2, 1, 0]), trusted=0.02) == [THIN]
    assert named(history(return_mean=[0, 1, 0, 2]), trusted=0.02) == []  # less than half way
    assert named(history(return_mean=[0, 1, 0, 2, 1, 0]), trusted=0.5) == []
    assert named(history(return_mean=[0, 1, 0, 2, 30, 40]), trusted=0.02) == []


def test_a_drop_at_the_switch_is_named_if_the_coefficient_is_near_zero():
    falls, holds = [80, 30, 20, 25, 60], [80, 78, 75, 80, 82]
    small = {"anneal": 0.02, "phase": "online"}
    assert named(history(return_mean=falls, **small)) == [SWITCH]
    assert named(history(return_mean=falls, beta_mean=0.01, phase="online")) == [SWITCH]
    assert named(history(return_mean=falls, phase="online")) == []
    assert (
        named(history(return_mean=UNSTEADY) + history(return_mean=[80, 39, 39, 36], **small)) == []
    )
    assert named(history(return_mean=holds, **small)) == []
    assert named(history(return_mean=falls, **small), coefficient_init=0.0) == []  # plain TD3
    assert named(history(return_mean=falls, **small), offline_steps=0) == []  # no switch
    again = {"offline_steps": 0, "offline_checkpoint": "runs/a"}
    assert named(history(return_mean=falls, **small), **again) == [SWITCH]


CASES = {
    # Returns of the evaluations, offline then online; settings; what is named.
    "collapse": ([-10] * 8 + [-60] * 3, {}, COLLAPSE),
    "thin": ([-90] * 11, {"return_threshold": -4.0}, THIN),
    "switch": (
        [-10] * 12 + [-60] * 4,
        {"online_steps": 80, "warmup_steps": 1, "decay_steps": 1, "coefficient_init": 1.0},
        SWITCH,
    ),
}


def scripted_run(data, workdir, returns, monkeypatch, **settings):
    """Results and pictures' captions of real training whose evaluations give these returns."""
    scripted, drawn = iter(returns), []

    def evaluate(*_, **__):
        value = np.full((1, 3), float(next(scripted)))
        return Episodes(value, value, value)

    def savefig(figure, path, **_):
        drawn.append(figure.get_supxlabel())
        open(path, "w").close()

    monkeypatch.setattr(Evaluator, "__call__", evaluate)
    monkeypatch.setattr(Figure, "savefig", savefig)
    # n grows at every other evaluation of the eleven, whatever the margin.
    settings = {"offline_steps": 220, "update_period": 40, "expl_noise": 0.0} | settings
    results = ssar.main(tiny_config(data, **settings), workdir)
    assert next(scripted, None) is None
    return results, drawn


def test_a_healthy_run_is_silent(data, tmp_path, monkeypatch, capsys):
    """As long as those below, n growing, its scores unsteady, β small after the switch."""
    returns = [-60, -50, -30, -35, -20, -12, -18, -10, -14, -8, -8, -12, -12, -10, -14, -9]
    settings = {"online_steps": 80, "warmup_steps": 1, "decay_steps": 1, "coefficient_init": 1.0}
    settings |= {"buffer_capacity": 80, "batch_size": 16}
    results, drawn = scripted_run(data, str(tmp_path / "run"), returns, monkeypatch, **settings)
    assert results["warnings"] == [] and drawn == [""]
    assert "warning" not in capsys.readouterr().err


@pytest.mark.parametrize("case", CASES)
def test_runs_name_their_failure_in_log_results_and_picture(
    case, data, tmp_path, monkeypatch, capsys
):
    returns, settings, expected = CASES[case]
    workdir = str(tmp_path / "run")
    results, drawn = scripted_run(data, workdir, returns, monkeypatch, **settings)
    err = capsys.readouterr().err
    (text,) = [text for text in results["warnings"] if text.startswith(expected)]
    assert err.count(f"warning: {expected} (seed 0)") == 2  # as soon as it shows, and at the end
    assert err.index(f"warning: {expected}") < err.rindex("line: ")
    assert f"{expected} (seed 0)" in drawn[0]
    with open(os.path.join(workdir, "results.json")) as file:
        assert text in json.load(file)["warnings"]
