"""Sweeps: what runs, what is left out, what goes on; here and on a stand-in for SLURM."""

import csv
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time

import pytest
from conftest import ROOT
from toys import toy_columns, write_hdf5

from common.checks import lock

SWEEP = os.path.join(ROOT, "experiments", "sweep.py")

# In place of an algorithm: every result is the seed; a discount of 0 is refused.
SCRIPT = """
import json, os, sys, time
given = dict(arg.removeprefix("--").split("=", 1) for arg in sys.argv[1:])
seed, count = int(given["config.seed"]), int(given["config.num_seeds"])
os.makedirs(given["workdir"], exist_ok=True)
with open(os.path.join(given["workdir"], "starts"), "a") as file:
    file.write(given["config"] + "\\n")
time.sleep(float(given.get("config.eval_interval", 0)))
with open(os.path.join(given["workdir"], "config.json"), "w") as file:
    json.dump(given, file)
if given.get("config.discount") == "0.0":
    print("told", file=sys.stderr)
    sys.exit("ssar_td3bc: no such discount")
values = [float(seed + i) for i in range(count)]
results = {key: values for key in ("behaviour", "last", "mean_last_10", "best")}
with open(os.path.join(given["workdir"], "results.json"), "w") as file:
    json.dump(results, file)
"""

# A queue that starts everything at once; array tasks one after the other.
SBATCH = """
import os, re, subprocess, sys
path = sys.argv[-1]
with open(path) as file:
    text = file.read()
with open(os.path.join(os.environ["QUEUE"], "scripts"), "a") as file:
    file.write(text)
job = str(100 + len(os.listdir(os.environ["QUEUE"])))
array = re.search(r"--array=0-(\\d+)%?(\\d*)", text)
names = [f"{job}_{i}" for i in range(int(array[1]) + 1)] if array else [job]
command = []
for i, name in enumerate(names):
    with open(os.path.join(os.environ["QUEUE"], name), "w") as file:
        file.write("PENDING")
    export = f"export SLURM_JOB_ID={job} SLURM_PROCID=0 SLURM_LOCALID=0 SLURM_NODEID=0;"
    if array:
        export += f" export SLURM_ARRAY_JOB_ID={job} SLURM_ARRAY_TASK_ID={i};"
    state = os.path.join(os.environ["QUEUE"], name)
    command.append(f"({export} echo RUNNING > {state}; bash {path}; echo COMPLETED > {state})")
nowhere = subprocess.DEVNULL
subprocess.Popen(
    ["bash", "-c", "; ".join(command)], start_new_session=True, stdout=nowhere, stderr=nowhere
)
print("Submitted batch job", job)
"""
SRUN = """
import os, subprocess, sys
command = sys.argv[1:]
while command[0].startswith("-"):
    command = command[1 if "=" in command[0] or command[0] == "--unbuffered" else 2:]
name = os.environ.get("SLURM_ARRAY_JOB_ID", os.environ["SLURM_JOB_ID"])
if "SLURM_ARRAY_TASK_ID" in os.environ:
    name += "_" + os.environ["SLURM_ARRAY_TASK_ID"]
logs = os.path.join(os.environ["LOGS"], name + "_0_log.")
with open(logs + "out", "a") as out, open(logs + "err", "a") as err:
    sys.exit(subprocess.run(command, stdout=out, stderr=err).returncode)
"""
SACCT = """
import os
print("JobID|State|NodeList")
for name in os.listdir(os.environ["QUEUE"]):
    if name != "scripts":
        with open(os.path.join(os.environ["QUEUE"], name)) as file:
            print(name, file.read().strip(), "here", sep="|")
"""


@pytest.fixture
def project(tmp_path):
    """A copy of the project whose only algorithm is the one above."""
    root = tmp_path / "project"
    for name in ("configs", "common", "experiments"):
        shutil.copytree(os.path.join(ROOT, name), root / name)
    (root / "ssar_td3bc.py").write_text(SCRIPT)
    return root


def sweep(project, folder, *arguments, **env):
    command = [sys.executable, str(project / "experiments" / "sweep.py"), str(folder), *arguments]
    env = os.environ | {key: str(value) for key, value in env.items()}
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=120)


def starts(folder):
    """{run: how often it was started}."""
    found = {}
    for parent, _, names in os.walk(folder):
        if "starts" in names:
            with open(os.path.join(parent, "starts")) as file:
                found[os.path.relpath(parent, folder)] = len(file.readlines())
    return found


TASKS = ["--tasks", "hopper-medium-v2", "walker2d-medium-v2"]


def test_finished_runs_are_left_out_and_the_table_grows(project, tmp_path):
    folder = tmp_path / "sweep"
    done = sweep(project, folder, *TASKS, "--seeds=2", "--seeds-per-run=2", "--parallel=2")
    assert done.returncode == 0, done.stderr
    runs = {f"ssar_td3bc/{task}/0": 1 for task in TASKS[1:]}
    assert starts(folder) == runs
    with open(folder / "table.csv") as file:
        rows = list(csv.DictReader(file))
    assert [(row["task"], row["seeds"], row["last_mean"]) for row in rows] == [
        (task, "2", "0.5") for task in TASKS[1:]
    ]
    assert re.search(r"hopper-medium-v2 +2 +0.5 ± 0.7", done.stdout)

    done = sweep(project, folder, *TASKS, "--seeds=4", "--seeds-per-run=2")
    assert "4 runs, 2 of them finished" in done.stdout
    assert starts(folder) == runs | {f"ssar_td3bc/{task}/2": 1 for task in TASKS[1:]}
    assert re.search(r"hopper-medium-v2 +4 +1.5 ± 1.3", done.stdout)
    more = sweep(
        project, folder, "--tasks", *2 * ["hopper-expert-v2"], "--seeds=2", "--seeds-per-run=2"
    )
    assert "1 runs, 0 of them finished" in more.stdout  # though it is named twice
    with open(folder / "table.csv") as file:
        assert [row["seeds"] for row in csv.DictReader(file)] == ["2", "4", "4"]


def test_a_run_that_fails_is_named_and_the_others_go_on(project, tmp_path):
    folder = tmp_path / "sweep"
    done = sweep(project, folder, *TASKS, "--seeds=1", "--", "--config.discount=0.0")
    assert done.returncode == 1
    assert len(starts(folder)) == 2
    for task in TASKS[1:]:
        assert f"ssar_td3bc/{task}/0 failed: ssar_td3bc: no such discount" in done.stderr
    assert done.stderr.splitlines()[-1].startswith("sweep: 2 of 2 runs failed")
    assert "Traceback" not in done.stderr
    with lock(folder):
        again = sweep(project, folder, *TASKS, "--seeds=1", "--", "--config.discount=0.0")
        assert f"is in use by process {os.getpid()}" in again.stderr
    again = sweep(project, folder, *TASKS, "--seeds=1")
    assert again.returncode == 1  # other settings in the same folder
    assert "choose another folder" in again.stderr


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--tasks", "hoper"], "unknown task 'hoper'"),
        ([*TASKS, "--", "--config.seed=1"], "'--config.seed=1' after -- is no setting"),
        ([*TASKS, "--", "--config.discont=1"], "is no setting for ssar_td3bc"),
        ([*TASKS, "--seeds=3", "--seeds-per-run=2"], "must be a multiple of --seeds-per-run"),
        ([*TASKS, "--", "--config.offline_steps=4k"], "ssar_td3bc, hopper-medium-v2: flag --"),
        ([*TASKS, "--", "--config.discount=2.0"], "--config.discount=2.0 must lie between"),
        ([*TASKS, "--parallel=0"], "--parallel must be at least 1"),
        ([*TASKS, "--slurm", "gpu"], "such as partition=gpu, not gpu"),
        ([*TASKS, "--cluster=slurm"], "there is no SLURM here"),
    ],
)
def test_what_cannot_run_is_said_before_anything_starts(arguments, words, tmp_path):
    command = [sys.executable, SWEEP, str(tmp_path / "sweep"), *arguments]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode != 0
    assert words in done.stderr
    assert "Traceback" not in done.stderr
    assert starts(tmp_path) == {}


@pytest.mark.slow
def test_slurm_gets_one_array_and_what_is_queued_is_not_submitted_again(project, tmp_path):
    folder, queue, tools = tmp_path / "sweep", tmp_path / "queue", tmp_path / "bin"
    queue.mkdir()
    tools.mkdir()
    for name, code in (("sbatch", SBATCH), ("srun", SRUN), ("sacct", SACCT)):
        (tools / name).write_text(f"#!{sys.executable}\n{code}")
        (tools / name).chmod(0o755)
    env = {"PATH": f"{tools}:{os.environ['PATH']}", "QUEUE": queue, "LOGS": folder / "jobs"}
    arguments = [*TASKS, "--seeds=1", "--cluster=slurm", "--hours=2", "--gpus=1", "--parallel=2"]
    arguments += ["--slurm", "partition=gpu", "account=rl", "--", "--config.eval_interval=4"]
    command = [sys.executable, str(project / "experiments" / "sweep.py"), str(folder), *arguments]
    texts = {key: str(value) for key, value in env.items()}
    first = subprocess.Popen(command, env=os.environ | texts, stdout=subprocess.PIPE, text=True)
    while not starts(folder):
        assert first.poll() is None
        time.sleep(0.1)
    first.send_signal(signal.SIGINT)  # it waits no longer; the queue goes on
    assert "submitted" in first.communicate()[0]
    assert first.returncode == 130
    done = sweep(project, folder, *arguments, **env)
    assert done.returncode == 0, done.stderr
    assert "2 are queued or running already" in done.stdout
    assert starts(folder) == {f"ssar_td3bc/{task}/0": 1 for task in TASKS[1:]}
    text = (queue / "scripts").read_text()
    for option in ("--array=0-1%2", "--time=120", "--gpus-per-node=1", "--partition=gpu",
                   "--account=rl", "--signal=USR2@"):  # fmt: skip
        assert text.count(f"#SBATCH {option}") == 1, option


@pytest.mark.slow
def test_a_stopped_sweep_stops_its_runs_and_goes_on_with_them(tmp_path):
    """The real script, an hour from checkpoint to checkpoint: the stop makes the one there is."""
    data = write_hdf5(tmp_path / "toy.hdf5", **toy_columns(300))
    folder = tmp_path / "sweep"
    command = [sys.executable, SWEEP, str(folder), "--tasks", "custom", "--seeds=1", "--"]
    command += [f"--config.{setting}" for setting in (
        f"dataset=d4rl:{data}", "env=toys:ssar-test/Walk-v0", "selection=none", "eval_interval=20",
        "offline_steps=2000", "hidden_dims=(16,16)", "coefficient_hidden_dims=(16,)",
        "checkpoint_minutes=60.0", "eval_episodes=1", "batch_size=16",
    )]  # fmt: skip
    env = os.environ | {"PYTHONPATH": os.path.join(ROOT, "tests")}
    run = folder / "ssar_td3bc" / "custom" / "0"
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    first = subprocess.Popen(command, env=env, start_new_session=True, **pipes)
    while not (run / "scores.csv").exists():
        assert first.poll() is None, first.communicate()
        time.sleep(0.05)
    os.killpg(first.pid, signal.SIGINT)  # as a terminal does
    _, err = first.communicate()
    assert first.returncode == 130
    assert b"Traceback" not in err
    rows = (run / "scores.csv").read_text()
    assert len(list((run / "unfinished").iterdir())) == 1
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (run / "scores.csv").read_text().startswith(rows)
    logs = [path.read_text() for path in (folder / "jobs").glob("*.out")]
    assert sum("goes on in" in log for log in logs) == 1
    with open(run / "scores.csv") as file:
        steps = [int(row["step"]) for row in csv.DictReader(file)]
    assert steps == list(range(20, 2001, 20))
    assert json.loads((run / "results.json").read_text())["seeds"] == [0]
