"""Both scripts from start to end on a toy task: what they write, and how they stop and fail."""

import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from comparing import assert_same, assert_same_state, kill, rows_of
from toys import tiny_config, toy_columns, write_hdf5, write_settings

import ssar_cql
import ssar_td3bc
from common.data import load_dataset
from common.evaluation import Evaluator
from common.run.checkpoint import list_unfinished, load_checkpoint
from common.run.errors import Diverged

ROOT = Path(__file__).parents[2]


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


@pytest.fixture(scope="module", params=[ssar_td3bc, ssar_cql], ids=lambda x: x.__name__)
def whole(request, data, tmp_path_factory):
    """A script, and the folder of its run without a stop."""
    script, workdir = request.param, tmp_path_factory.mktemp("runs") / "whole"
    script.main(config_of(data, script), str(workdir))
    return script, workdir


# ------------------------------------------------------------------------------- what a run does


def test_the_folder_tells_what_happened(whole):
    _, workdir = whole
    rows, results = rows_of(workdir), json.loads((workdir / "results.json").read_text())
    column = lambda name: np.array([float(row[name]) for row in rows]).reshape(6, 2)
    np.testing.assert_array_equal(column("score")[3], column("score")[2])  # before any update
    np.testing.assert_array_equal(column("success_rate")[-1], results["success_rate"])
    assert {float(row["anneal"]) for row in rows[:6]} == {1}
    assert 0 < float(rows[-1]["anneal"]) < float(rows[8]["anneal"]) < 1
    assert results["warnings"] == [] and results["data"]["transitions"] >= 600
    for seed in "01":
        episodes = [x for x in rows_of(workdir, "episodes.csv") if x["seed"] == seed]
        ends = np.cumsum([int(x["length"]) for x in episodes])
        np.testing.assert_array_equal(ends, [int(x["step"]) for x in episodes])
        assert 40 - 7 <= ends[-1] <= 40  # no episode is longer than 7


def test_the_checkpoint_plays_as_the_run_did(whole, data):
    """To the last bit; and online training leaves the coefficient and the threshold alone."""
    script, workdir = whole
    config, saved = config_of(data, script), load_checkpoint(str(workdir))
    dataset, state = load_dataset(config), saved["state"]
    np.testing.assert_array_equal(saved["normalizer"]["std"], dataset.normalizer.std)
    evaluate = Evaluator(dataset, config.num_seeds, config.eval_episodes, config.seed)
    again = evaluate(jax.jit(jax.vmap(script.act)), state["actor"])
    last = [float(row["return_mean"]) for row in rows_of(workdir)[-2:]]
    np.testing.assert_array_equal(again.returns.mean(axis=1), last)

    assert state["step"].tolist() == [60 + 30] * 2  # none in the ten steps of the warm-up
    assert state["online_step"].tolist() == [30, 30]
    offline = load_checkpoint(str(workdir), "offline_checkpoint")["state"]
    for part in ("coefficient", "coefficient_opt", "threshold"):
        np.testing.assert_equal(state[part], offline[part])


def test_without_a_coefficient_there_is_no_threshold_to_record(data, tmp_path):
    config = tiny_config(data, coefficient="fixed", coefficient_init=0.0)
    results = ssar_td3bc.main(config, str(tmp_path / "run"))
    assert results["trusted_fraction"] == [1.0] and results["n_stopped_at"] == [None]


@pytest.mark.slow
def test_cql_learns_from_scaled_rewards_offline_and_online(tmp_path, monkeypatch):
    columns, used, modify = toy_columns(), [], ssar_cql.modify_reward
    columns["rewards"] = columns["terminals"].astype(np.float32)
    data = write_hdf5(tmp_path / "sparse.hdf5", **columns)

    def modify_noted(reward, config):
        used.append((config.reward_scale, config.reward_bias))
        return modify(reward, config)

    monkeypatch.setattr(ssar_cql, "modify_reward", modify_noted)
    sparse = {"scale_sparse_rewards": True, "selection": "auto", "return_threshold": None}
    config = tiny_config(data, "ssar_cql", online_steps=20, **sparse)
    ssar_cql.main(config, str(tmp_path / "run"))
    assert used == [(10, -5)] * (1 + 20)


# ------------------------------------------------------------------------------------- stopping


def test_a_killed_offline_run_continues_online_to_the_same_end(whole, data, tmp_path):
    script, workdir = whole
    offline, online = tmp_path / "offline", tmp_path / "online"
    config = config_of(data, script, online_steps=0)
    kill(script.main, config, offline, Evaluator, "__call__", 3)
    assert "before_online" not in script.main(config, str(offline))
    assert rows_of(offline) == rows_of(workdir)[:6]
    assert_same_state(offline, workdir, ("checkpoint", "offline_checkpoint"))
    script.main(config_of(data, script, offline_checkpoint=str(offline)), str(online))
    assert rows_of(online) == rows_of(workdir)[6:]
    assert_same_state(online, workdir)


# Runs a script, and notes what every online step met and the latest buffer.
NOTING = """
import importlib, json, sys
import numpy as np
from common.evaluation import Collector
from common.run import Run
from toys import tiny_config

script, workdir, settings = sys.argv[1:]
step, save = Collector.step, Run.save

def noted_step(envs, actions):
    outcome = step(envs, actions)
    with open(workdir + ".met", "a") as file:
        print(json.dumps([envs.steps, outcome.next_obs.tolist()]), file=file)
    return outcome

def noted_save(run, step, tree):
    if hasattr(tree[-1], "rows"):
        np.save(workdir + ".npy", tree[-1].rows.next_obs)
    save(run, step, tree)

Collector.step, Run.save = noted_step, noted_save
main = importlib.import_module(script).main
print("imported", flush=True)
main(tiny_config(script=script, **json.loads(settings)), workdir)
"""


@pytest.mark.slow
@pytest.mark.parametrize("online_steps", [0, 200])
@pytest.mark.parametrize("script", ["ssar_td3bc", "ssar_cql"])
def test_sigkill_at_random_moments(script, online_steps, data, tmp_path):
    """With labelling, the bits of a run that was not killed; online, no row lost or doubled."""
    settings = {"dataset_path": data, "num_seeds": 2, "offline_steps": 300, "warmup_steps": 5}
    settings |= {"selection": "return" if online_steps else "iql", "expectile": 0.3}
    settings |= {"iql_steps": 1000, "updates_per_call": 10, "checkpoint_minutes": 0.001}
    settings |= {"buffer_init": "half", "online_steps": online_steps}
    env = os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}

    def seconds(workdir, delay=None):
        """How long a run takes after its imports; None if it was killed after `delay`."""
        command = [sys.executable, "-c", NOTING, script, workdir, json.dumps(settings)]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        process = subprocess.Popen(command, env=env, **pipes)
        process.stdout.readline()
        began = time.perf_counter()
        try:
            _, err = process.communicate(timeout=delay)
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()
            return None
        assert process.returncode == 0, err[-3000:]
        return time.perf_counter() - began

    seconds(tmp_path / "compiling")
    whole, run, rng = tmp_path / "whole", tmp_path / "run", random.Random(0)
    longest = seconds(whole)
    phase, kept = "online" if online_steps else "offline", []
    while not any(phase in path for path in kept):  # until a kill leaves a checkpoint of the phase
        assert seconds(run, rng.uniform(0.15, 0.4) * longest) is None  # killed before its end
        kept = list_unfinished(run / "unfinished")
    seconds(run)
    if not online_steps:
        return assert_same(whole, run)
    met = dict(map(json.loads, Path(f"{run}.met").read_text().splitlines()))
    assert sorted(met) == [*range(1, online_steps + 1)]
    rows = np.stack([met[step] for step in sorted(met)], axis=1).astype(np.float32)
    np.testing.assert_array_equal(np.load(f"{run}.npy"), rows)
    place = lambda row: (row["phase"], row["step"], row["seed"])
    assert [*map(place, rows_of(run))] == [*map(place, rows_of(whole))]
    offline = lambda folder: [row for row in rows_of(folder) if row["phase"] == "offline"]
    assert offline(run) == offline(whole)


@pytest.mark.slow
def test_a_signal_saves_and_the_same_command_resumes(data, tmp_path):
    """A copy under its own name, an hour between checkpoints, and JAX told to use float64."""
    clone, workdir, reached = tmp_path / "clone", tmp_path / "clone/runs/my_variant/toy/0", 0
    for name in ("common", "configs"):
        shutil.copytree(ROOT / name, clone / name)
    shutil.copy(ROOT / "ssar_td3bc.py", clone / "my_variant.py")
    (clone / "configs" / "my_variant.py").write_text("from configs.ssar_td3bc import *\n")
    settings = {"num_seeds": 2, "offline_steps": 4000, "updates_per_call": 2}
    write_settings(clone / "settings.py", data, checkpoint_minutes=60.0, **settings)
    command = [sys.executable, "my_variant.py", "--config=settings.py"]
    env = os.environ | {"JAX_ENABLE_X64": "1", "PYTHONPATH": f"{ROOT / 'tests'}"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    for number, status in ((signal.SIGTERM, 143), (signal.SIGINT, 130)):
        process = subprocess.Popen(command, cwd=clone, env=env, **pipes)
        while not (workdir / "scores.csv").exists() or len(rows_of(workdir)) < reached + 4:
            assert process.poll() is None, process.stderr.read()[-2000:]
            time.sleep(0.02)
        process.send_signal(number)
        out, err = process.communicate(timeout=60)
        assert process.returncode == status, err[-2000:]
        words = f"my_variant: stopped by {number.name}: the same command resumes from offline step "
        assert out.splitlines()[-1].startswith(words) and "Traceback" not in err
        reached = len(rows_of(workdir))
    steps = [int(row["step"]) for row in rows_of(workdir) if row["seed"] == "0"]
    assert steps == list(range(20, 20 * len(steps) + 1, 20)) and len(steps) >= 4


# --------------------------------------------------------------------------------- failing well


def test_a_run_that_diverges_keeps_what_it_had(tmp_path):
    columns = toy_columns()
    columns["rewards"][88] = 1e30
    poisoned = write_hdf5(tmp_path / "poisoned.hdf5", **columns)
    settings = {"selection": "none", "batch_size": 4, "online_steps": 0, "offline_steps": 1000}
    config, messages = config_of(poisoned, ssar_td3bc, **settings), set()
    for _ in range(2):  # resumes from the last checkpoint, and diverges at the same update
        with pytest.raises(Diverged, match="diverged: .*critic_loss.*(offline)") as error:
            ssar_td3bc.main(config, str(tmp_path / "run"))
        messages.add(str(error.value))
    (message,) = messages
    first, last = map(int, re.search(r"between offline steps (\d+) and (\d+)", message).groups())
    assert last - first == config.updates_per_call
    done = first // 20 * 20
    assert done and f"the last finite checkpoint, offline step {done}, stays in" in message
    assert len(rows_of(tmp_path / "run")) == 2 * done // 20
