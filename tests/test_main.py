"""The whole program: outputs, reproducibility, D̂ of each kind."""

import csv
import json
import os
import subprocess
import sys
from unittest import mock

import jax
import numpy as np
import pytest
from conftest import ROOT
from tensorboardX.proto.event_pb2 import Event
from toys import same_bits, tiny_config, toy_columns, toy_states, write_hdf5

import ssar_cql
import ssar_td3bc as ssar
from common.checkpoint import load_checkpoint
from common.dataset import Normalizer, fit_normalizer
from common.evaluation import Collector, Evaluator
from common.loading import load_dataset


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_hdf5(tmp_path_factory.mktemp("data") / "toy.hdf5", **toy_columns())


SMALL = "buffer_capacity=12 is less than a batch, so each stored row is drawn again and again; "
SMALL += "raise it"


class Run:
    """A finished run of two seeds, offline then online: script, folder and what main returned.

    acted: [(actions, Outcome), ...] of its environments. buffer: the replay buffer at the end.
    """

    def __init__(self, script, data, workdir):
        self.script, self.workdir, self.data, self.acted = script, workdir, data, []
        step, compile_online = Collector.step, script.compile_online

        def recorded_step(envs, actions):
            self.acted.append((actions, step(envs, actions)))
            return self.acted[-1][-1]

        def recorded_programs(*args):
            choose, collect, learn, totals = compile_online(*args)

            def recorded_collect(*args):
                self.buffer = collect(*args)
                return self.buffer

            return choose, recorded_collect, learn, totals

        with mock.patch.object(Collector, "step", recorded_step):
            with mock.patch.object(script, "compile_online", recorded_programs):
                self.results = script.main(self.config(), workdir)

    def config(self, **overrides):
        settings = {"num_seeds": 2, "online_steps": 40, "buffer_init": "half"}
        settings |= {"buffer_capacity": 12}  # it goes round three times
        settings |= {"reward_scale": 2.0, "reward_bias": -0.5, "return_threshold": -45.0}
        if self.script is ssar:
            settings["new_policy_freq"] = 3
        return tiny_config(self.data, self.script.__name__, **(settings | overrides))


@pytest.fixture(scope="module", params=[ssar, ssar_cql], ids=lambda script: script.__name__)
def run(request, data, tmp_path_factory):
    return Run(request.param, data, str(tmp_path_factory.mktemp("runs") / "two"))


def rows_of(workdir):
    with open(os.path.join(workdir, "scores.csv")) as file:
        return list(csv.DictReader(file))


def checkpoint_of(workdir, run, name="checkpoint"):
    config = ssar.ml_collections.FrozenConfigDict(run.config())
    state = jax.eval_shape(lambda: toy_states(config, range(config.num_seeds), run.script))
    like = load_checkpoint(workdir, name=name) | {"state": state}
    return load_checkpoint(workdir, like, name)


def test_run_folder_holds_what_was_promised(run):
    workdir, results = run.workdir, run.results
    assert {"config.json", "scores.csv", "results.json", "checkpoint", "tensorboard",
            "learning_curve.png", "episodes.csv", "offline_checkpoint",
            } <= set(os.listdir(workdir))  # fmt: skip
    with open(os.path.join(workdir, "results.json")) as file:
        assert json.load(file) == results
    for key in ("behaviour", "before_online", "last", "mean_last_10", "best", "n", "n_stopped_at",
                "beta_mean", "success_rate", "eval_regret", "train_regret"):  # fmt: skip
        assert len(results[key]) == 2, key
    assert results["normalized"] is False
    for key in ("trusted_fraction", "warnings", "device", "versions"):
        assert key in results
    with open(os.path.join(workdir, "timing.json")) as file:
        timing = json.load(file)
    for key in ("updates_per_second", "online_updates_per_second", "env_steps_per_second",
                "env_share", "compile_seconds", "wall_seconds"):  # fmt: skip
        assert timing[key] > 0
    assert timing["compile_seconds"] < timing["wall_seconds"]
    assert not {"unfinished", "lock"} & set(os.listdir(workdir))
    assert results["data"]["transitions"] >= 600
    assert results["warnings"] == ["small buffer: " + SMALL]  # and nothing else to warn of
    with open(os.path.join(workdir, "config.json")) as file:
        assert json.load(file)["update_period"] == 10
    with open(os.path.join(workdir, "learning_curve.png"), "rb") as file:
        assert file.read(8) == b"\x89PNG\r\n\x1a\n"

    rows = rows_of(workdir)
    assert list(rows[0])[:8] == ["phase", "step", "seed", "score", "return_mean", "return_std",
                                 "episodes", "success_rate"]  # fmt: skip
    steps = [("offline", step) for step in (20, 40, 60)]
    steps += [("online", step) for step in (0, 20, 40)]
    assert [(row["phase"], int(row["step"]), row["seed"]) for row in rows] == [
        (*step, seed) for step in steps for seed in "01"
    ]
    scores = np.array([float(row["score"]) for row in rows]).reshape(6, 2)
    np.testing.assert_array_equal(results["before_online"], scores[2])
    np.testing.assert_array_equal(scores[3], scores[2])  # at the switch nothing has changed
    np.testing.assert_array_equal(results["last"], scores[-1])
    np.testing.assert_array_equal(results["best"], scores[4:].max(axis=0))
    np.testing.assert_allclose(results["mean_last_10"], scores[4:].mean(axis=0))
    success = np.array([float(row["success_rate"]) for row in rows]).reshape(6, 2)
    np.testing.assert_allclose(results["eval_regret"], 1 - success[3:].mean(axis=0))
    assert all(float(row["anneal"]) == 1 for row in rows[:6])
    assert all(row["anneal"] == "" for row in rows[6:8])  # no update yet
    assert 0 < float(rows[-1]["anneal"]) < float(rows[8]["anneal"]) < 1


def test_episodes_of_online_training_are_listed(run):
    with open(os.path.join(run.workdir, "episodes.csv")) as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == ["step", "seed", "score", "return", "length", "success"]
    for seed in "01":
        of_seed = [row for row in rows if row["seed"] == seed]
        lengths = [int(row["length"]) for row in of_seed]
        np.testing.assert_array_equal(np.cumsum(lengths), [int(row["step"]) for row in of_seed])
        assert 40 - 7 <= sum(lengths) <= 40  # no episode is longer than 7
        won = [float(row["success"]) for row in of_seed]
        assert run.results["train_regret"][int(seed)] == pytest.approx(1 - np.mean(won))


def test_tensorboard_uses_the_authors_tags(run):
    folder = os.path.join(run.workdir, "tensorboard", "seed_1")
    (name,) = os.listdir(folder)
    with open(os.path.join(folder, name), "rb") as file:
        content = file.read()
    tags, position = {}, 0
    while position < len(content):  # length, its checksum, the event, its checksum
        length = int.from_bytes(content[position : position + 8], "little")
        event = Event.FromString(content[position + 12 : position + 12 + length])
        tags |= {value.tag: value.simple_value for value in event.summary.value}
        position += 16 + length
    expected = "beta_min beta_mean beta_max beta_weight constrained_nums n_away offline_q1 "
    expected += "offline_eval_return online_q1 success_rate eval_regret online_eval_return "
    expected += "episode_return episode_length is_success train_regret"
    assert set(expected.split()) <= set(tags)
    last = rows_of(run.workdir)[5]
    assert tags["online_q1"] == pytest.approx(float(rows_of(run.workdir)[-1]["q1"]), rel=1e-5)
    assert tags["beta_weight"] == pytest.approx(float(last["margin"]), rel=1e-5)
    batch = tiny_config().batch_size
    assert tags["constrained_nums"] == pytest.approx(
        float(last["constrained_fraction"]) * batch, rel=1e-5
    )


def test_checkpoint_plays_as_the_run_did(run, data):
    """The restored actor and normalizer repeat the last evaluation of the run, to the last bit."""
    workdir, results, config = run.workdir, run.results, run.config()
    saved = checkpoint_of(workdir, run)
    assert saved["state"].step.tolist() == [60 + 30, 60 + 30]
    np.testing.assert_allclose(saved["state"].threshold.n, results["n"])
    dataset = load_dataset("toy", data, "ssar-test/Walk-v0")
    normalizer = fit_normalizer(dataset.observations)
    np.testing.assert_array_equal(saved["normalizer"]["std"], normalizer.std)
    evaluate = Evaluator(dataset, config.num_seeds, config.eval_episodes, config.seed)
    again = evaluate(run.script.act, saved["state"].actor, Normalizer(**saved["normalizer"]))
    last = [float(row["return_mean"]) for row in rows_of(workdir)[-2:]]
    np.testing.assert_array_equal(again.returns.mean(axis=1), last)
    assert np.abs(np.array(last) - results["behaviour"]).max() > 0.01  # a policy of its own


def test_data_reach_the_device_as_recorded(data):
    """Time limits are no terminals, rewards scaled and shifted, all observations standardised."""
    columns = toy_columns()

    def load(script=ssar, **overrides):
        dataset = load_dataset("toy", data, "ssar-test/Walk-v0")
        settings = tiny_config(reward_scale=10.0, reward_bias=-5.0, **overrides)
        loaded = script.load_data(dataset, ssar.ml_collections.FrozenConfigDict(settings))
        for column in ("observations", "actions", "next_observations"):
            assert getattr(dataset, column) is None  # held once
        return loaded

    transitions, normalizer, fingerprint = load()
    assert columns["timeouts"].any()
    np.testing.assert_array_equal(transitions.terminated, columns["terminals"])
    np.testing.assert_array_equal(transitions.action, columns["actions"])
    np.testing.assert_allclose(transitions.reward, 10 * columns["rewards"] - 5, rtol=1e-6)
    obs, next_obs = columns["observations"], columns["next_observations"]
    mean, std = obs.mean(axis=0), obs.std(axis=0) + 1e-3
    np.testing.assert_allclose(transitions.obs, (obs - mean) / std, atol=1e-5)
    np.testing.assert_allclose(transitions.next_obs, (next_obs - mean) / std, atol=1e-5)
    np.testing.assert_array_equal(transitions.obs, normalizer(obs))  # as evaluation does it
    clipped = load(ssar_cql)[0].action  # no action where tanh is ±1
    assert np.abs(columns["actions"]).max() == 1
    np.testing.assert_array_equal(clipped, columns["actions"].clip(-0.9999, 0.9999))
    raw = load(normalize_observations=False)
    np.testing.assert_array_equal(raw[0].obs, obs)
    assert fingerprint == load()[2] != raw[2]


def test_evaluation_scores_the_policy_on_standardised_observations(data, tmp_path, monkeypatch):
    seen = []
    act = ssar.act
    monkeypatch.setattr(ssar, "act", lambda params, obs: seen.append(obs) or act(params, obs))
    ssar.main(tiny_config(data, offline_steps=20), str(tmp_path / "run"))
    clock = np.concatenate([obs[0, :, 2] for obs in seen])  # counts 0, 1, 2, ... before
    assert clock.min() < -0.5
    assert abs(clock.mean()) < 2


def test_online_leaves_the_coefficient_and_the_threshold_as_they_were(run):
    before = checkpoint_of(run.workdir, run, "offline_checkpoint")["state"]
    after = checkpoint_of(run.workdir, run)["state"]
    frozen_parts = lambda state: (state.coefficient, state.coefficient_opt, state.threshold)
    assert same_bits(frozen_parts(before), frozen_parts(after))
    assert not same_bits(before.actor, after.actor)
    assert before.online_step.tolist() == [0, 0]
    assert after.online_step.tolist() == [30, 30]  # none in the ten steps of the warm-up


def test_what_is_stored_is_what_was_met(run):
    """Rewards as offline, the episode's own successors, trusted; the twelve newest rows."""
    rows = [np.asarray(column) for column in run.buffer.rows]
    ended = 0
    for t in range(40 - 12, 40):
        action, outcome = run.acted[t]
        expected = (run.acted[t - 1][1].obs, action, 2 * outcome.reward - 0.5, outcome.next_obs)
        expected += (outcome.terminated, np.ones(2))
        for column, values in zip(rows, expected, strict=True):
            np.testing.assert_allclose(column[:, t % 12], values, rtol=1e-6)
        ended += (outcome.obs != outcome.next_obs).any(axis=1).sum()
    assert ended  # or successors and starts could not be told apart
    assert 0 < rows[4].sum() < rows[4].size
    assert not np.array_equal(rows[0][0], rows[0][1])  # every seed met its own


@pytest.mark.parametrize("run", [ssar], ids=["ssar_td3bc"], indirect=True)
def test_the_actor_moves_at_the_updates_it_should(run):
    """Offline every second of 60 updates, online every third of 30, the 61st being the first."""
    state = checkpoint_of(run.workdir, run)["state"]
    steps = lambda opt_state: opt_state[0].count.tolist()
    assert steps(state.actor_opt) == [30 + 10] * 2
    assert steps(state.critic_opt) == [60 + 30] * 2


def test_the_same_command_gives_the_same_bits(run, tmp_path):
    results = run.script.main(run.config(online_steps=0), str(tmp_path))
    assert results["before_online"] is None
    assert rows_of(str(tmp_path)) == rows_of(run.workdir)[:6]
    ended = checkpoint_of(str(tmp_path), run)
    assert same_bits(ended, checkpoint_of(run.workdir, run, "offline_checkpoint"))


def test_going_on_from_a_checkpoint_gives_the_same_bits_as_going_straight_on(run, tmp_path):
    """What an offline run leaves and what was left at the switch are the same: see above."""
    online = str(tmp_path / "online")
    run.script.main(run.config(offline_checkpoint=run.workdir), online)
    assert rows_of(online) == rows_of(run.workdir)[6:]
    assert same_bits(checkpoint_of(online, run), checkpoint_of(run.workdir, run))
    with open(os.path.join(online, "episodes.csv")) as file:
        with open(os.path.join(run.workdir, "episodes.csv")) as other:
            assert file.read() == other.read()


@pytest.mark.parametrize("run", [ssar], ids=["ssar_td3bc"], indirect=True)
def test_another_seed_gives_another_run(run, data, tmp_path):
    results = ssar.main(run.config(seed=1, num_seeds=1, online_steps=0), str(tmp_path / "one"))
    assert results["seeds"] == [1]
    pair, single = rows_of(run.workdir)[1:6:2], rows_of(str(tmp_path / "one"))
    for a, b in zip(pair, single, strict=True):  # seed 1 alone is seed 1 of the two
        assert float(a["score"]) == pytest.approx(float(b["score"]), rel=1e-3)
        assert float(a["critic_loss"]) == pytest.approx(float(b["critic_loss"]), rel=1e-3)
    assert rows_of(run.workdir)[0]["critic_loss"] != single[0]["critic_loss"]


def test_an_earlier_run_is_set_aside_not_overwritten(data, tmp_path, capsys):
    workdir = str(tmp_path / "run")
    ssar.main(tiny_config(data, offline_steps=20), workdir)
    before = rows_of(workdir)
    ssar.main(tiny_config(data, offline_steps=20, seed=5), workdir)
    assert rows_of(workdir + ".1") == before
    assert rows_of(workdir) != before
    assert "is now" in capsys.readouterr().err


def test_iql_labels_are_cached(data, tmp_path, monkeypatch):
    settings = {"selection": "iql", "iql_steps": 600, "expectile": 0.3}
    settings |= {"cache_dir": str(tmp_path / "cache")}
    config = tiny_config(data, **settings)
    first = ssar.main(config, str(tmp_path / "a"))
    assert 0 < first["trusted_fraction"][0] < 1
    monkeypatch.setattr(ssar, "label_by_iql", lambda *_: pytest.fail("trained again"))
    second = ssar.main(config, str(tmp_path / "b"))
    assert second["trusted_fraction"] == first["trusted_fraction"]
    assert rows_of(str(tmp_path / "a")) == rows_of(str(tmp_path / "b"))
    for changed in ({"expectile": 0.5}, {"seed": 1}, {"iql_steps": 31}, {"reward_bias": -1.0},
                    {"target_update_rate": 0.1}, {"discount": 0.9}, {"num_seeds": 2}):  # fmt: skip
        config = tiny_config(data, **(settings | changed))
        with pytest.raises(pytest.fail.Exception, match="trained again"):
            ssar.main(config, str(tmp_path / "c"))


def test_a_fixed_coefficient_needs_no_sub_dataset(data, tmp_path):
    config = tiny_config(data, coefficient="fixed", return_threshold=1e9)
    results = ssar.main(config, str(tmp_path / "run"))
    assert results["trusted_fraction"] == [1.0]
    assert results["beta_mean"] == pytest.approx([config.coefficient_init])
    assert results["n_stopped_at"] == [None]


def test_sparse_rewards_select_by_success(tmp_path):
    columns = toy_columns()
    ends = columns["terminals"] | columns["timeouts"]
    won = np.random.default_rng(0).random(ends.sum()) < 0.3
    columns["rewards"] = np.zeros(len(ends), np.float32)
    columns["rewards"][np.flatnonzero(ends)[won]] = 1
    path = write_hdf5(tmp_path / "sparse.hdf5", **columns)
    config = tiny_config(path, selection="success", reward_bias=-1.0, loosen_bound=False)
    results = ssar.main(config, str(tmp_path / "run"))
    lengths = np.diff(np.flatnonzero(ends), prepend=-1)
    assert results["trusted_fraction"][0] == pytest.approx(lengths[won].sum() / len(ends))


def test_a_thin_sub_dataset_is_a_warning(data, tmp_path, capsys):
    columns = toy_columns(4000)
    lengths = np.diff(np.flatnonzero(columns["terminals"] | columns["timeouts"]), prepend=-1)
    columns["rewards"][: lengths[0]] = 100
    path = write_hdf5(tmp_path / "thin.hdf5", **columns)
    results = ssar.main(tiny_config(path, return_threshold=99.0), str(tmp_path / "run"))
    assert "thin sub-dataset" in results["warnings"][0]
    assert capsys.readouterr().err.count("warning: thin sub-dataset") == 2  # before and after
    everything = ssar.main(tiny_config(data, return_threshold=-1e9), str(tmp_path / "all"))
    assert "selects nothing" in everything["warnings"][0]


@pytest.mark.parametrize("script", ["ssar_td3bc", "ssar_cql"])
def test_help_names_every_setting(script):
    command = [sys.executable, os.path.join(ROOT, f"{script}.py"), "--help"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0
    settings = tiny_config(script=script)
    for words in ("--workdir=", "hopper-medium-v2", *(f"--config.{x}=" for x in settings)):
        assert words in done.stdout
