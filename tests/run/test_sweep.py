"""Sweeps: what runs, what is skipped and what resumes; here and on a stand-in for SLURM."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import filelock
import pytest
from comparing import rows_of

from experiments.sweep import main

ROOT = Path(__file__).parents[2]
TASKS = ["--tasks", "hopper-medium-v2", "walker2d-medium-v2"]

# In place of an algorithm: every result is the seed, it takes checkpoint_minutes in seconds, and a
# discount of 0 fails.
SCRIPT = """
import json, os, time
from common.run import InputError, prepare, stopping
from common.run.cli import run
def main(config, workdir, resume):
    config, workdir = prepare(config, workdir, NAME, resume)
    os.makedirs(workdir, exist_ok=True)
    print("started", file=open(workdir + ".starts", "a"), flush=True)
    for _ in range(int(10 * config.checkpoint_minutes)):
        stopping.stop_if_told()
        time.sleep(0.1)
    if not config.discount:
        raise InputError("no such discount")
    seeds = [config.seed + i for i in range(config.num_seeds)]
    with open(f"{workdir}/scores.csv", "w") as file:
        for row in ("phase,step,seed,score,n", *(f"offline,9,{x},{x},1" for x in seeds)):
            print(row, file=file)
    results = {"algorithm": NAME, "behaviour": [0.0] * len(seeds), "unit": "normalised score"}
    results["mean_last_10"] = [(x + (config.task[0] == "w")) ** 2 for x in seeds]
    results["gpus"] = os.environ.get("CUDA_VISIBLE_DEVICES")
    for name, content in ("config", config.to_dict()), ("results", results):
        json.dump(content, open(f"{workdir}/{name}.json", "w"))

run(main, NAME)
"""

# Stand-ins for SLURM: a queue that keeps the script of a job and never starts it.
SLURM = {
    "sbatch": 'cat "${@: -1}" >> $QUEUE; echo Submitted batch job 7',
    "sacct": "echo 'JobID|State|NodeList'; for i in 0 1; do echo \"7_$i|PENDING|\"; done",
    "srun": "",
}


@pytest.fixture
def project(tmp_path):
    """A copy of the project where the script above stands for ours and for a user's variant."""
    root = tmp_path / "project"
    for name in ("configs", "common", "experiments"):
        shutil.copytree(ROOT / name, root / name)
    for name in ("ssar_td3bc", "my_variant"):
        (root / f"{name}.py").write_text(SCRIPT.replace("NAME", repr(name)))
    (root / "configs" / "my_variant.py").write_text("from configs.ssar_td3bc import *\n")
    return root


def command_of(project, folder, *arguments):
    return [sys.executable, str(project / "experiments" / "sweep.py"), str(folder), *arguments]


def sweep(project, folder, *arguments, **env):
    command, env = command_of(project, folder, *arguments), os.environ | env
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=120)


def starts(folder):
    """{run: how often it started}."""
    paths = folder.glob("*/*/*.starts")
    return {str(x.relative_to(folder).with_suffix("")): len(x.read_text().split()) for x in paths}


def test_finished_runs_are_skipped_and_the_table_grows(project, tmp_path):
    folder, two = tmp_path / "sweep", "--seeds-per-run=2"
    short = ("--", "--config.offline_steps=1000")  # refused unless the rest is scaled
    gpus = {"CUDA_VISIBLE_DEVICES": "GPU-8f3a, MIG-5c21"}
    done = sweep(project, folder, *TASKS, "--seeds=2", two, "--parallel=2", *short, **gpus)
    assert done.returncode == 0, done.stderr
    runs = [f"ssar_td3bc/{task}/0" for task in TASKS[1:]]
    assert starts(folder) == dict.fromkeys(runs, 1)
    used = [json.loads((folder / run / "results.json").read_text())["gpus"] for run in runs]
    assert used == ["GPU-8f3a", "MIG-5c21"]  # each has one of its own
    *rows, iqm = rows_of(folder, "table.csv")
    assert (iqm["task"], iqm["label"], iqm["seeds"]) == ("IQM", "ssar_td3bc", "4")
    assert float(iqm["mean_last_10"]) == 1.0  # of 0, 1 and 1, 4
    assert "over 2 tasks, ssar_td3bc: 1.0 [0.5, 2.5]" in done.stdout
    found = [(x["task"], x["seeds"], x["last"], x["last_low"], x["last_high"]) for x in rows]
    assert found == [(task, "2", "0.5", "0.0", "1.0") for task in TASKS[1:]]
    assert all((folder / f"{task}.png").stat().st_size for task in TASKS[1:])

    variant = ("--algorithms", "ssar_td3bc", "my_variant", "--tasks", *2 * ["hopper-medium-v2"])
    done = sweep(project, folder, *variant, "--seeds=2", two, *short)
    assert "2 runs, 1 of them finished" in done.stdout  # though the task is named twice
    assert starts(folder) == dict.fromkeys([*runs, "my_variant/hopper-medium-v2/0"], 1)
    table = done.stdout.partition("hopper-medium-v2\n")[2].partition("walker2d")[0]
    assert re.search(r"my_variant +2 +0.5 \[ .*\nssar_td3bc +2 +0.5 \[ ", table)

    done = sweep(project, folder, *TASKS, "--seeds=2", *short, "--config.discount=0.9")
    assert done.returncode == 1
    assert "discount=0.9 (there 0.99), num_seeds=1 (there 2): choose another" in done.stderr


def test_settings_vary_and_a_run_that_fails_is_named(project, tmp_path):
    folder = tmp_path / "sweep"
    arguments = ("--tasks", "demo", "demo-sparse", "--seeds=1", "--parallel=2")
    arguments += ("--vary", "n_end=2.0", "discount=0.0,0.9")
    done = sweep(project, folder, *arguments)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    runs = {f"ssar_td3bc/{x}-n_end=2.0-discount={y}/0" for x in arguments[1:3] for y in (0.0, 0.9)}
    assert starts(folder) == dict.fromkeys(runs, 1)
    for run in runs:
        assert (f"{run} failed: ssar_td3bc: no such discount" in done.stderr) == ("=0.0" in run)
    assert "sweep: 2 of 4 runs failed" in done.stderr
    rows = rows_of(folder, "table.csv")  # without an IQM of the runs that finished
    assert [(row["task"], row["last"]) for row in rows] == [("demo", "0.0"), ("demo-sparse", "0.0")]
    with filelock.FileLock(folder / "lock"):
        assert "in use by another sweep" in sweep(project, folder, *arguments).stderr


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--tasks", "hoper"], "unknown task 'hoper'"),
        ([*TASKS, "--algorithms", "sssar"], "has no script sssar.py"),
        ([*TASKS, "--", "--config.seed=1"], "leave --config.seed=1 out: the sweep sets the seeds"),
        ([*TASKS, "--seeds=3", "--seeds-per-run=2"], "must be a multiple of --seeds-per-run"),
        ([*TASKS, "--", "--config.discount=2.0"], "ssar_td3bc, hopper-medium-v2: --config.disc"),
        ([*TASKS, "--parallel=2"], "--parallel x --gpus = 2 is more than CUDA_VISIBLE"),
        ([*TASKS, "--slurm", "gpu"], "such as partition=gpu, not gpu"),
        ([*TASKS, "--vary", "n_end"], "such as n_end=2.0,3.0, not n_end"),
        ([*TASKS, "--config.seed=1"], "--config.seed=1 is unknown: the settings of the runs fol"),
        ([*TASKS, "--cluster=slurm"], "SLURM is not on this machine"),
    ],
)
def test_mistakes_are_named_before_anything_starts(arguments, words, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-8f3a")
    with pytest.raises(SystemExit) as end:
        main([str(tmp_path / "sweep"), *arguments])
    assert words in f"{end.value} {capsys.readouterr().err}"
    assert not (tmp_path / "sweep").exists()


@pytest.mark.slow
def test_slurm_gets_one_array_and_what_is_queued_is_not_submitted_again(project, tmp_path):
    folder, queue, tools = tmp_path / "sweep", tmp_path / "queue", tmp_path / "bin"
    tools.mkdir()
    for name, code in SLURM.items():
        (tools / name).write_text(f"#!/bin/bash\n{code}\n")
        (tools / name).chmod(0o755)
    env = os.environ | {"PATH": f"{tools}:{os.environ['PATH']}", "QUEUE": str(queue)}
    arguments = [*TASKS, "--seeds=1", "--cluster=slurm", "--hours=2", "--gpus=1", "--parallel=2"]
    command = command_of(project, folder, *arguments, "--slurm", "partition=gpu", "account=rl")
    for words in ("2 submitted", "2 are queued or running already"):
        waiting = subprocess.Popen(command, env=env, stdout=subprocess.PIPE, text=True)
        lines = waiting.stdout.readline() + waiting.stdout.readline()
        waiting.send_signal(signal.SIGINT)  # it stops waiting; the queue keeps its jobs
        waiting.communicate()
        assert waiting.returncode == 130 and f"\n{words}" in lines
    text = queue.read_text()
    for option in "array=0-1%2 time=120 gpus-per-node=1 partition=gpu account=rl signal=".split():
        assert text.count(f"#SBATCH --{option}") == 1, option

    numbers = {"JOB_ID": 7, "ARRAY_JOB_ID": 7, "ARRAY_TASK_ID": 1, "PROCID": 0, "LOCALID": 0}
    env |= {f"SLURM_{name}": str(x) for name, x in numbers.items()} | {"SUBMITIT_EXECUTOR": "slurm"}
    job = [sys.executable, "-m", "submitit.core._submit", folder / "jobs"]  # as in the script
    subprocess.run(job, env=env, check=True)
    assert starts(folder) == {f"ssar_td3bc/{TASKS[2]}/0": 1}


def test_a_stopped_sweep_stops_its_runs_and_starts_them_again(project, tmp_path):
    folder, log = tmp_path / "sweep", tmp_path / "sweep/jobs/ssar_td3bc/demo/0.log"
    arguments = ("--tasks=demo", "--seeds=1", "--", "--config.checkpoint_minutes=")
    command = command_of(project, folder, *arguments[:-1], f"{arguments[-1]}99")
    first = subprocess.Popen(command, start_new_session=True, stderr=subprocess.PIPE, text=True)
    while first.poll() is None and not starts(folder):
        time.sleep(0.05)
    os.killpg(first.pid, signal.SIGINT)  # as a terminal does
    assert "Traceback" not in first.communicate()[1]
    assert first.returncode == 130 and "stopped by SIGTERM" in log.read_text()
    done = sweep(project, folder, *arguments[:-1], f"{arguments[-1]}0")
    assert done.returncode == 0, done.stderr
    assert starts(folder) == {"ssar_td3bc/demo/0": 2}
