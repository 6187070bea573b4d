"""Both scripts from start to end on a toy task: what they write, and how they stop and fail."""

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from comparing import assert_same, assert_same_state, rows_of
from matplotlib.figure import Figure
from toys import tiny_config, toy_columns, write_hdf5

import ssar_cql
import ssar_td3bc
from common.data import load_dataset
from common.evaluation import Collector, Episodes, Evaluator
from common.run import Run
from common.run.checkpoint import load_checkpoint
from common.run.errors import Diverged

ROOT = Path(__file__).parents[2]


class Killed(BaseException):
    """Ends a run where SIGKILL would: nothing is cleaned up."""


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_hdf5(tmp_path_factory.mktemp("data") / "toy.hdf5", **toy_columns())


def config_of(data, script, **overrides):
    """Two seeds, offline then online; the replay buffer goes round three times."""
    settings = {"num_seeds": 2, "online_steps": 40, "buffer_init": "half", "buffer_capacity": 12}
    settings |= {"reward_scale": 2.0, "reward_bias": -0.5, "return_threshold": -45.0}
    settings |= {"checkpoint_minutes": 0.0}
    if script is ssar_td3bc:
        settings["new_policy_freq"] = 3
    return tiny_config(data, script.__name__, **settings | overrides)


class Whole:
    """A finished run without a stop: its folder, results, and what its environments met."""

    def __init__(self, script, data, workdir):
        self.script, self.workdir, self.met, self.buffers = script, workdir, [], []
        with pytest.MonkeyPatch.context() as patch:
            record(patch, self.met, self.buffers)
            self.results = script.main(config_of(data, script), str(workdir))


def record(patch, met, buffers):
    """Notes (actions, outcome) of every step online, and the buffers that are saved."""
    step, save = Collector.step, Run.save

    def noted_step(envs, actions):
        met.append((actions, step(envs, actions)))
        return met[-1][1]

    def noted_save(run, step, tree):
        if hasattr(tree[-1], "rows"):
            buffers[:] = [tree[-1]]
        save(run, step, tree)

    patch.setattr(Collector, "step", noted_step)
    patch.setattr(Run, "save", noted_save)


@pytest.fixture(scope="module", params=[ssar_td3bc, ssar_cql], ids=lambda x: x.__name__)
def whole(request, data, tmp_path_factory):
    return Whole(request.param, data, tmp_path_factory.mktemp("runs") / "whole")


def kill(script, config, workdir, owner, name, call):
    """A run that ends when it calls owner.name for the call-th time (1 is the first)."""
    work, calls = getattr(owner, name), []

    def watched(*args, **kwargs):
        calls.append(1)
        if len(calls) == call:
            raise Killed
        return work(*args, **kwargs)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
        patch.setattr(owner, name, watched)
        script.main(config, str(workdir))


# ------------------------------------------------------------------------------- what a run does


def test_the_folder_tells_what_happened(whole):
    rows, results = rows_of(whole.workdir), whole.results
    steps = [("offline", 20), ("offline", 40), ("offline", 60)]
    steps += [("online", 0), ("online", 20), ("online", 40)]
    place = [(row["phase"], int(row["step"]), row["seed"]) for row in rows]
    assert place == [(*step, seed) for step in steps for seed in "01"]
    scores = np.array([float(row["score"]) for row in rows]).reshape(6, 2)
    np.testing.assert_array_equal(scores[3], scores[2])  # at the switch nothing has changed
    np.testing.assert_array_equal(results["last"], scores[-1])
    success = np.array([float(row["success_rate"]) for row in rows]).reshape(6, 2)
    np.testing.assert_array_equal(results["success_rate"], success[-1])
    assert all(float(row["anneal"]) == 1 for row in rows[:6])
    assert 0 < float(rows[-1]["anneal"]) < float(rows[8]["anneal"]) < 1
    assert json.loads((whole.workdir / "results.json").read_text()) == results
    assert results["warnings"] == []
    assert results["data"]["transitions"] >= 600 and not results["normalized"]
    for seed in "01":
        episodes = [x for x in rows_of(whole.workdir, "episodes.csv") if x["seed"] == seed]
        ends = np.cumsum([int(x["length"]) for x in episodes])
        np.testing.assert_array_equal(ends, [int(x["step"]) for x in episodes])
        assert 40 - 7 <= ends[-1] <= 40  # no episode is longer than 7


def test_the_checkpoint_plays_as_the_run_did(whole, data):
    """The restored actor and normalizer repeat the last evaluation, to the last bit."""
    import jax

    config, saved = config_of(data, whole.script), load_checkpoint(str(whole.workdir))
    assert saved["state"]["step"].tolist() == [60 + 30] * 2
    dataset = load_dataset(config)
    np.testing.assert_array_equal(saved["normalizer"]["std"], dataset.normalizer.std)
    evaluate = Evaluator(dataset, config.num_seeds, config.eval_episodes, config.seed)
    again = evaluate(jax.jit(jax.vmap(whole.script.act)), saved["state"]["actor"])
    last = [float(row["return_mean"]) for row in rows_of(whole.workdir)[-2:]]
    np.testing.assert_array_equal(again.returns.mean(axis=1), last)


def test_online_leaves_the_coefficient_and_the_threshold_as_they_were(whole):
    before = load_checkpoint(str(whole.workdir), "offline_checkpoint")["state"]
    after = load_checkpoint(str(whole.workdir))["state"]
    for part in ("coefficient", "coefficient_opt", "threshold"):
        np.testing.assert_equal(after[part], before[part])
    with pytest.raises(AssertionError):
        np.testing.assert_equal(after["actor"], before["actor"])
    assert after["online_step"].tolist() == [30, 30]  # none in the ten steps of the warm-up


def test_what_is_stored_is_what_was_met(whole):
    """Rewards as offline, each episode's own successors, trusted; the twelve newest rows."""
    (buffer,), ended = whole.buffers, 0
    rows = [np.asarray(column) for column in buffer.rows]
    for t in range(40 - 12, 40):
        action, outcome = whole.met[t]
        expected = (whole.met[t - 1][1].obs, action, 2 * outcome.reward - 0.5, outcome.next_obs)
        expected += (outcome.terminated, np.ones(2))
        for column, values in zip(rows, expected, strict=True):
            np.testing.assert_allclose(column[:, t % 12], values, rtol=1e-6)
        ended += (outcome.obs != outcome.next_obs).any(axis=1).sum()
    assert ended  # or successors and starts could not be told apart
    assert not np.array_equal(rows[0][0], rows[0][1])  # every seed met its own


def test_an_offline_run_continues_online(whole, data, tmp_path):
    config = config_of(data, whole.script, offline_checkpoint=str(whole.workdir))
    whole.script.main(config, str(tmp_path / "online"))
    assert rows_of(tmp_path / "online") == rows_of(whole.workdir)[6:]
    assert_same_state(tmp_path / "online", whole.workdir)


# ------------------------------------------------------------------------------------- stopping


def test_a_killed_run_ends_as_the_same_command_without_a_kill(whole, data, tmp_path):
    """And as the offline part of the run that continued online."""
    config = config_of(data, whole.script, online_steps=0)
    whole.script.main(config, str(tmp_path / "whole"))
    kill(whole.script, config, tmp_path / "run", Evaluator, "__call__", 3)
    results = whole.script.main(config, str(tmp_path / "run"))
    assert_same(tmp_path / "whole", tmp_path / "run")
    assert rows_of(tmp_path / "run") == rows_of(whole.workdir)[:6]
    assert_same_state(tmp_path / "run", whole.workdir, ("checkpoint", "offline_checkpoint"))
    assert "before_online" not in results


@pytest.mark.slow
def test_online_no_row_is_lost_or_doubled(whole, data, tmp_path):
    """Killed in the third interval online; the rows after the second are met again."""
    config = config_of(data, whole.script, online_steps=80, buffer_capacity=None)
    met, buffers = [], []
    with pytest.MonkeyPatch.context() as patch:
        record(patch, met, buffers)
        kill(whole.script, config, tmp_path / "run", Collector, "step", 47)
        del met[40:]
        whole.script.main(config, str(tmp_path / "run"))
    (buffer,) = buffers
    for field in ("next_obs", "terminated"):
        expected = np.stack([getattr(outcome, field) for _, outcome in met], axis=1)
        np.testing.assert_array_equal(np.asarray(getattr(buffer.rows, field)), expected)
    assert len(np.unique(np.asarray(buffer.rows.next_obs)[0], axis=0)) == 80  # no row twice
    rows = [row for row in rows_of(tmp_path / "run") if row["seed"] == "0"]
    assert [int(row["step"]) for row in rows] == [20, 40, 60, 0, 20, 40, 60, 80]
    anneal = [float(row["anneal"]) for row in rows[4:]]
    assert anneal == sorted(anneal, reverse=True)
    state = load_checkpoint(str(tmp_path / "run"))["state"]
    assert state["step"].tolist() == [60 + 70] * 2


@pytest.mark.slow
@pytest.mark.parametrize("script", ["ssar_td3bc", "ssar_cql"])
def test_sigkill_at_random_moments(script):
    """A short form of kill_runs.py: processes, offline with labelling, and online."""
    command = [sys.executable, Path(__file__).parent / "kill_runs.py", "--kills=2", script]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("runs as without") == 2


SETTINGS = """
from toys import tiny_config

def get_config(task=None):
    more = {{"checkpoint_minutes": 60.0, "updates_per_call": 2}}
    return tiny_config({data!r}, num_seeds=2, offline_steps=4000, **more)
"""


def command_of(data, tmp_path, script=ROOT / "ssar_td3bc.py"):
    """A command line, and the environment that it runs in."""
    (tmp_path / "settings.py").write_text(SETTINGS.format(data=data))
    command = [sys.executable, script, f"--workdir={tmp_path / 'run'}"]
    env = os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}
    return [*command, f"--config={tmp_path / 'settings.py'}"], env


@pytest.mark.slow
def test_a_signal_saves_and_the_same_command_resumes(data, tmp_path):
    """An hour between checkpoints, except before evaluations."""
    (command, env), workdir, reached = command_of(data, tmp_path), tmp_path / "run", 0
    for number, status in ((signal.SIGTERM, 143), (signal.SIGINT, 130)):
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        process = subprocess.Popen(command, env=env, **pipes)
        while not (workdir / "scores.csv").exists() or len(rows_of(workdir)) < reached + 4:
            assert process.poll() is None, process.stderr.read()[-2000:]
            time.sleep(0.02)
        process.send_signal(number)
        out, err = process.communicate(timeout=60)
        assert process.returncode == status, err[-2000:]
        name = signal.Signals(number).name
        words = f"ssar_td3bc: stopped by {name}: the same command resumes from offline step "
        assert out.splitlines()[-1].startswith(words) and "Traceback" not in err
        reached = len(rows_of(workdir))
    steps = [int(row["step"]) for row in rows_of(workdir) if row["seed"] == "0"]
    assert steps == list(range(20, 20 * len(steps) + 1, 20)) and len(steps) >= 4


@pytest.mark.slow
def test_a_closed_pipe_changes_neither_checkpoint_nor_status(data, tmp_path):
    """As in `python ssar_td3bc.py | tee log`, where Ctrl-C ends tee too."""
    (command, env), scores = command_of(data, tmp_path), tmp_path / "run" / "scores.csv"
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen(command, env=env, **pipes)
    while not scores.exists():
        time.sleep(0.02)
    process.stdout.close()
    process.send_signal(signal.SIGINT)
    assert "Traceback" not in process.stderr.read() and process.wait(60) == 130
    assert list((tmp_path / "run" / "unfinished").glob("offline-*.msgpack"))


# --------------------------------------------------------------------------------- failing well


def test_a_run_that_diverges_keeps_what_it_had(tmp_path):
    columns = toy_columns()
    columns["rewards"][88] = 1e30
    poisoned = write_hdf5(tmp_path / "poisoned.hdf5", **columns)
    settings = {"selection": "none", "batch_size": 4, "online_steps": 0, "offline_steps": 1000}
    config = config_of(poisoned, ssar_td3bc, **settings)
    found = []
    for _ in range(2):  # the same again, to the bit
        with pytest.raises(Diverged, match="diverged: .*critic_loss") as error:
            ssar_td3bc.main(config, str(tmp_path / "run"))
        found.append(str(error.value))
    assert "lower --config.reward_scale, actor_lr or critic_lr" in found[1]
    assert "(offline)" in found[1] and "\n" not in found[1]
    last, first = (int(found[1].split(word)[1].split()[0]) for word in (" to ", "updates "))
    assert last - first == config.updates_per_call - 1
    if done := (first - 1) // 20 * 20:
        assert f"the last finite checkpoint, offline step {done}, stays in" in found[1]
    assert len(rows_of(tmp_path / "run")) == 2 * ((first - 1) // 20)


def test_online_divergence_is_named_by_the_command_line(data, tmp_path):
    """Before the actor acts again."""
    command, env = command_of(data, tmp_path)
    command += [f"--config.{x}" for x in ("offline_steps=0", "online_steps=40", "buffer_init=none",
                "coefficient=fixed", "reward_scale=1e29", "selection=none")]  # fmt: skip
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == 1, done.stderr[-2000:]
    words = r"ssar_td3bc: diverged: critic_loss"
    assert done.stderr.splitlines()[-1].startswith(words)
    assert "not finite in environment step 1" in done.stderr and "(online)" in done.stderr


CASES = {
    # Returns of the evaluations, offline then online; settings; the warnings.
    "healthy": (
        [-60, -50, -30, -35, -20, -12, -18, -10, -14, -8, -8, -12, -12, -10, -14, -9],
        {"online_steps": 80, "warmup_steps": 1, "decay_steps": 1, "coefficient_init": 1.0}, [],
    ),
    "collapse": ([-10] * 7 + [-60] * 4, {}, ["collapse while n grows (seed 0)"]),
    "thin": (
        [-90] * 11, {"return_threshold": -3.0}, ["near-zero score with a thin sub-dataset (seed 0)"]
    ),
    "switch": (
        [-10] * 12 + [-60] * 4,
        {"online_steps": 80, "warmup_steps": 1, "decay_steps": 1, "coefficient_init": 1.0},
        ["drop at the switch with β near zero (seed 0)"],
    ),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_failures_are_named_on_the_screen_in_results_and_picture(
    case, data, tmp_path, monkeypatch, capsys
):
    """As soon as they show, and at the end."""
    returns, settings, expected = CASES[case]
    scripted, drawn = iter(returns), []

    def evaluate(*_, **__):
        value = np.full((1, 3), float(next(scripted)))
        return Episodes(value, value, value)

    def savefig(figure, path, **_):
        drawn.append(figure.get_supxlabel())
        Path(path).write_text("")

    monkeypatch.setattr(Evaluator, "__call__", evaluate)
    monkeypatch.setattr(Figure, "savefig", savefig)
    # n grows at every other evaluation of the eleven, whatever the margin.
    settings = {"offline_steps": 220, "update_period": 40, "expl_noise": 0.0} | settings
    results = ssar_td3bc.main(tiny_config(data, **settings), str(tmp_path / "run"))
    assert next(scripted, None) is None
    heads = [text.partition(":")[0] for text in results["warnings"]]
    assert [head for head in heads if "(seed" in head] == expected
    err = capsys.readouterr().err
    for head in expected:
        assert err.count(f"warning: {head}") == 2 and head in drawn[0]


@pytest.mark.slow
def test_a_process_without_room_says_one_sentence(data, tmp_path):
    command, env = command_of(data, tmp_path)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, before[1]))
    try:
        env |= {"JAX_ENABLE_COMPILATION_CACHE": "false"}
        done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=120)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert done.returncode == 1
    last = done.stderr.splitlines()[-1]
    assert last.startswith(f"ssar_td3bc: {tmp_path}/run")
    assert "cannot be written (File too large): free space" in last
    assert "Traceback" not in done.stderr and "Exception" not in done.stderr


def test_plain_td3_draws_fewer_panels(data, tmp_path, monkeypatch):
    drawn = []
    savefig = Figure.savefig
    keep = lambda figure, path, **more: drawn.append(figure) or savefig(figure, path, **more)
    monkeypatch.setattr(Figure, "savefig", keep)
    for coefficient_init, titles in ((0.0, ["return"]), (0.4, ["return", "coefficient β where"])):
        more = {"coefficient": "fixed", "coefficient_init": coefficient_init}
        results = ssar_td3bc.main(tiny_config(data, **more), str(tmp_path / str(coefficient_init)))
        assert results["trusted_fraction"] == [1.0] and results["n_stopped_at"] == [None]
        found = [axis.get_title() for axis in drawn[-1].axes]
        pairs = zip(found, titles, strict=True)
        assert all(title.startswith(start) for title, start in pairs)


@pytest.mark.slow
def test_a_copy_of_a_script_runs_under_its_own_name(data, tmp_path):
    copy = tmp_path / "clone"
    shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns(".git", "runs", "tests", "docs"))
    shutil.copy(ROOT / "ssar_td3bc.py", copy / "my_variant.py")
    (copy / "configs" / "my_variant.py").write_text("from configs.ssar_td3bc import *\n")
    short = [f"--config.{x}" for x in ("offline_steps=4", "eval_interval=4", "eval_episodes=1")]
    short += [f"--config.dataset_path={data}", "--config.env=ssar-test/Walk-v0",
              "--config.dataset=toy", "--config.return_threshold=-20"]  # fmt: skip
    code = f"import toys, runpy, sys; sys.argv = {['my_variant.py', *short]!r}; "
    code += "sys.path.insert(0, ''); runpy.run_path('my_variant.py', run_name='__main__')"
    env = os.environ | {"PYTHONPATH": str(ROOT / "tests")}
    done = subprocess.run([sys.executable, "-c", code], cwd=copy, env=env, capture_output=True)
    assert done.returncode == 0, done.stderr.decode()[-2000:]
    (path,) = copy.glob("runs/my_variant/demo-*/0/results.json")
    results = json.loads(path.read_text())
    assert results["algorithm"] == "my_variant"


def test_what_is_imported_by_a_run():
    """The package alone draws no picture and reads no data."""
    code = "import sys, common.run, common.run.cli; heavy = 'matplotlib h5py mujoco minari "
    code += "gymnasium'.split(); assert not set(heavy) & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
