"""Sweeps: what runs, what is skipped and what resumes; here and on a stand-in for SLURM."""

import csv
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
from toys import toy_columns, write_hdf5

from experiments.sweep import main

ROOT = Path(__file__).parents[2]
TASKS = ["--tasks", "hopper-medium-v2", "walker2d-medium-v2"]

# In place of an algorithm: every result is the seed; a discount of 0 fails.
SCRIPT = """
import json, os, time
from common.run import InputError, prepare
from common.run.cli import run
def main(config, workdir, resume):
    config, workdir = prepare(config, workdir, NAME, resume)
    os.makedirs(workdir, exist_ok=True)
    print("started", file=open(workdir + ".starts", "a"), flush=True)
    time.sleep(config.checkpoint_minutes)
    if not config.discount:
        raise InputError("no such discount")
    seeds = [config.seed + i for i in range(config.num_seeds)]
    with open(f"{workdir}/scores.csv", "w") as file:
        for row in ("phase,step,seed,score,n", *(f"offline,9,{x},{x},1" for x in seeds)):
            print(row, file=file)
    results = {"algorithm": NAME, "behaviour": [0.0] * len(seeds)}
    results["gpus"] = os.environ.get("CUDA_VISIBLE_DEVICES")
    for name, content in ("config", config.to_dict()), ("results", results):
        json.dump(content, open(f"{workdir}/{name}.json", "w"))

run(main, NAME)
"""

# A queue that starts everything at once, and the tasks of an array one after the other.
SBATCH = r"""#!/bin/bash
path=${@: -1}
cat $path >> $QUEUE/scripts
export SLURM_ARRAY_JOB_ID=$((100 + $(ls $QUEUE | wc -l))) SLURM_PROCID=0 SLURM_LOCALID=0
export SLURM_JOB_ID=$SLURM_ARRAY_JOB_ID SLURM_NODEID=0
tasks=$(seq 0 $(sed -n 's/.*--array=0-\([0-9]*\).*/\1/p' $path))
for i in $tasks; do echo PENDING > $QUEUE/${SLURM_JOB_ID}_$i; done
setsid bash -c 'for i in $1; do state=$QUEUE/${SLURM_JOB_ID}_$i; echo RUNNING > $state
SLURM_ARRAY_TASK_ID=$i bash $0; echo COMPLETED > $state; done' $path "$tasks" &> /dev/null &
echo Submitted batch job $SLURM_JOB_ID
"""
SRUN = """#!/bin/bash
while [[ $1 == -* ]]; do [[ $1 == *=* || $1 == --unbuffered ]] || shift; shift; done
log=$LOGS/${SLURM_ARRAY_JOB_ID}_${SLURM_ARRAY_TASK_ID}_0_log
exec "$@" >> $log.out 2>> $log.err
"""
SACCT = """#!/bin/bash
echo "JobID|State|NodeList"
cd $QUEUE
for name in [0-9]*; do echo "$name|$(cat $name)|here"; done
"""


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


@pytest.mark.slow
def test_varied_settings_make_a_grid(project, tmp_path):
    grid = ("--tasks=demo", "--seeds=1", "--vary", "n_end=2.0,3.0", "discount=0.5,0.9")
    done = sweep(project, tmp_path / "sweep", *grid)
    assert done.returncode == 0, done.stderr
    places = [f"demo-n_end={n}-discount={d}" for n in ("2.0", "3.0") for d in (0.5, 0.9)]
    assert starts(tmp_path / "sweep") == {f"ssar_td3bc/{place}/0": 1 for place in places}
    rows = list(csv.DictReader((tmp_path / "sweep" / "table.csv").open()))
    assert {row["task"] for row in rows} == {"demo"} and len({row["label"] for row in rows}) == 4
    refused = sweep(project, tmp_path / "other", *grid[:3], "n_ends=2.0")
    assert "no field 'n_ends'" in refused.stderr and refused.returncode == 1


def test_finished_runs_are_skipped_and_the_table_grows(project, tmp_path):
    folder, two = tmp_path / "sweep", "--seeds-per-run=2"
    short = ("--", "--config.offline_steps=1000")  # refused unless the rest is scaled
    done = sweep(project, folder, *TASKS, "--seeds=2", two, "--parallel=2", *short)
    assert done.returncode == 0, done.stderr
    runs = {f"ssar_td3bc/{task}/0": 1 for task in TASKS[1:]}
    assert starts(folder) == runs
    rows = csv.DictReader((folder / "table.csv").open())
    found = [(x["task"], x["seeds"], x["last"], x["last_low"], x["last_high"]) for x in rows]
    assert found == [(task, "2", "0.5", "0.0", "1.0") for task in TASKS[1:]]
    assert all((folder / f"{task}.png").stat().st_size for task in TASKS[1:])

    variant = ("--algorithms", "ssar_td3bc", "my_variant", "--tasks", *2 * ["hopper-medium-v2"])
    done = sweep(project, folder, *variant, "--seeds=4", two, *short)
    assert "4 runs, 1 of them finished" in done.stdout  # though the task is named twice
    new = ("ssar_td3bc/hopper-medium-v2/2", *(f"my_variant/hopper-medium-v2/{i}" for i in (0, 2)))
    assert starts(folder) == runs | dict.fromkeys(new, 1)
    table = done.stdout.partition("hopper-medium-v2\n")[2].partition("walker2d")[0]
    assert re.search(r"my_variant +4 +1.5 \[ .*\nssar_td3bc +4 +1.5 \[ ", table)

    done = sweep(project, folder, *TASKS, "--seeds=2", *short, "--config.discount=0.9")
    assert done.returncode == 1
    assert "discount=0.9 (there 0.99), num_seeds=1 (there 2): choose another" in done.stderr


@pytest.mark.parametrize("visible", ["GPU-8f3a, MIG-5c21", "3,5,7", ""])
def test_each_run_gets_a_gpu_of_its_own_by_whatever_name(visible, project, tmp_path):
    arguments = (*TASKS, "--seeds=1", "--parallel=2")
    done = sweep(project, tmp_path, *arguments, CUDA_VISIBLE_DEVICES=visible)
    assert done.returncode == 0, done.stderr
    paths = [tmp_path / "ssar_td3bc" / task / "0" / "results.json" for task in TASKS[1:]]
    given = [json.loads(path.read_text())["gpus"] for path in paths]
    assert given == (visible.replace(" ", "").split(",") * 2)[:2]


def test_a_run_that_fails_is_named_and_the_others_run(project, tmp_path):
    folder, arguments = tmp_path / "sweep", (*TASKS, "--seeds=1", "--", "--config.discount=0.0")
    done = sweep(project, folder, *arguments)
    assert done.returncode == 1
    assert len(starts(folder)) == 2
    for task in TASKS[1:]:
        assert f"ssar_td3bc/{task}/0 failed: ssar_td3bc: no such discount" in done.stderr
    assert "sweep: 2 of 2 runs failed" in done.stderr
    assert "Traceback" not in done.stderr
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
        ([*TASKS, "--parallel=0"], "--parallel must be at least 1"),
        ([*TASKS, "--parallel=2"], "each need more GPUs than CUDA_VISIBLE_DEVICES"),
        ([*TASKS, "--slurm", "gpu"], "such as partition=gpu, not gpu"),
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
    queue.mkdir()
    tools.mkdir()
    for name, code in {"sbatch": SBATCH, "srun": SRUN, "sacct": SACCT}.items():
        (tools / name).write_text(code)
        (tools / name).chmod(0o755)
    env = {"PATH": f"{tools}:{os.environ['PATH']}", "QUEUE": f"{queue}", "LOGS": f"{folder}/jobs"}
    arguments = [*TASKS, "--seeds=1", "--cluster=slurm", "--hours=2", "--gpus=1", "--parallel=2"]
    arguments += ["--slurm", "partition=gpu", "account=rl", "--", "--config.checkpoint_minutes=9"]
    command = command_of(project, folder, *arguments)
    first = subprocess.Popen(command, env=os.environ | env, stdout=subprocess.PIPE, text=True)
    while first.poll() is None and not starts(folder):
        time.sleep(0.1)
    first.send_signal(signal.SIGINT)  # it stops waiting; the queue keeps its jobs
    assert "submitted" in first.communicate()[0]
    assert first.returncode == 130
    done = sweep(project, folder, *arguments, **env)
    assert done.returncode == 0, done.stderr
    assert "2 are queued or running already" in done.stdout
    assert starts(folder) == {f"ssar_td3bc/{task}/0": 1 for task in TASKS[1:]}
    text = (queue / "scripts").read_text()
    for option in "array=0-1%2 time=120 gpus-per-node=1 partition=gpu account=rl signal=".split():
        assert text.count(f"#SBATCH --{option}") == 1, option


@pytest.mark.slow
def test_a_stopped_sweep_stops_its_runs_and_resumes_them(tmp_path):
    data = write_hdf5(tmp_path / "toy.hdf5", **toy_columns(300))
    folder = tmp_path / "sweep"
    command = command_of(ROOT, folder, "--tasks", "custom", "--seeds=1", "--")
    settings = "env=toys:ssar-test/Walk-v0 selection=none eval_interval=20 offline_steps=2000"
    settings += " hidden_dims=(16,16) coefficient_hidden_dims=(16,) checkpoint_minutes=60.0"
    settings += f" eval_episodes=1 batch_size=16 dataset=d4rl:{data}"
    command += [f"--config.{setting}" for setting in settings.split()]
    env, run = os.environ | {"PYTHONPATH": f"{ROOT}/tests"}, folder / "ssar_td3bc/custom/0"
    first = subprocess.Popen(command, env=env, start_new_session=True, stderr=subprocess.PIPE)
    while first.poll() is None and not (run / "scores.csv").exists():
        time.sleep(0.05)
    os.killpg(first.pid, signal.SIGINT)  # as a terminal does
    assert b"Traceback" not in first.communicate()[1]
    assert first.returncode == 130
    rows = (run / "scores.csv").read_text()
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (run / "scores.csv").read_text().startswith(rows)
    steps = [int(row["step"]) for row in csv.DictReader((run / "scores.csv").open())]
    assert steps == list(range(20, 2001, 20))
    assert json.loads((run / "results.json").read_text())["seeds"] == [0]
