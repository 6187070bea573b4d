r"""Runs scripts, tasks and seeds on this machine or, through submitit, on a SLURM cluster.

    python experiments/sweep.py runs/sweep --tasks hopper-medium-v2 walker2d-medium-v2 --seeds=5
    python experiments/sweep.py runs/fixed --tasks hopper-medium-v2 --seeds=5 --seeds-per-run=5 \
        --cluster=slurm --parallel=8 --slurm partition=gpu mem=16G -- --config.coefficient=fixed

    python experiments/sweep.py runs/grid --tasks=custom --seeds=3 --vary n_end=2.0,3.0 \
        dataset=d4rl:a.hdf5,d4rl:b.hdf5 -- --config.offline_steps=40000

An algorithm is a script <name>.py in this repository with its settings in configs/<name>.py. A run
does what `python <name>.py --config=configs/<name>.py:<task>` does with the settings after `--`.
With --vary there is a run for every combination of the values, and it is named after them. Its
folder is <folder>/<name>/<task>-<varied settings>/<first seed>. The same command skips finished
runs, waits for those that the cluster still has, and resumes the rest. A cluster's job whose time
is up is queued again and resumes. At the end, experiments/compare.py compares all finished runs in
the folder, in <folder>/table.csv and in a picture for each task and data set. The output of jobs is
in <folder>/jobs.
"""

import argparse
import collections
import contextlib
import csv
import dataclasses
import itertools
import json
import os
import re
import runpy
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import filelock
import jax
import submitit

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from common.run import InputError, prepare  # noqa: E402
from common.run.cli import load_config  # noqa: E402
from common.run.settings import MAY_CHANGE  # noqa: E402
from common.run.workdir import check_same, load_settings, write_json  # noqa: E402
from experiments.compare import COLUMNS, compare, interquartile_mean  # noqa: E402


@dataclasses.dataclass(frozen=True)
class Run:
    """One run of a script: on SLURM, the function that submitit stores and calls."""

    folder: Path
    algorithm: str
    task: str
    seed: int
    num_seeds: int
    settings: tuple[str, ...]
    varied: tuple[str, ...] = ()  # those settings in which the runs of a task differ

    @property
    def name(self):
        words = [re.sub(r"[^\w.=-]+", "_", x.removeprefix("--config.")) for x in self.varied]
        return f"{self.algorithm}/{'-'.join([self.task, *words])}/{self.seed}"

    def command(self):
        """The script, its settings file with the task, and the settings that change it."""
        file = f"{ROOT}/configs/{self.algorithm}.py:{self.task}"
        flags = [f"--config={file}", f"--workdir={self.folder / self.name}"]
        flags += [f"--config.seed={self.seed}", f"--config.num_seeds={self.num_seeds}"]
        return [f"{ROOT}/{self.algorithm}.py", *flags, *self.settings, *self.varied]

    def is_finished(self):
        return (self.folder / self.name / "results.json").exists()

    def __call__(self):
        if not self.is_finished():  # by a job that was submitted twice
            sys.argv, sys.path[:0] = self.command(), [str(ROOT)]
            print(*sys.argv, flush=True)
            runpy.run_path(sys.argv[0], run_name="__main__")

    def checkpoint(self):
        """submitit calls this when the time is up, and queues what it returns."""
        return submitit.helpers.DelayedSubmission(self)


def parse(argv):
    """The arguments; `settings` are those after `--`."""
    split = argv.index("--") if "--" in argv else len(argv)
    layout = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=layout)
    add = parser.add_argument
    add("folder", help="where the runs go")
    add("--algorithms", nargs="+", default=["ssar_td3bc"], metavar="NAME", help="(ssar_td3bc)")
    add("--tasks", nargs="+", required=True, metavar="TASK", help="tasks of their settings files")
    add("--vary", nargs="+", default=[], metavar="FIELD=VALUE,...", help="a run for each value")
    add("--seeds", type=int, default=5, help="how many for each task: 0, 1, ... (5)")
    add("--seeds-per-run", type=int, default=1, help="seeds in one program (1)")
    add("--cluster", choices=("local", "slurm"), default="local", help="where to run (local)")
    add("--parallel", type=int, default=1, help="runs at a time (1)")
    add("--hours", type=float, default=24.0, help="time limit of a job on the cluster (24)")
    add("--gpus", type=int, default=1, help="GPUs for each run; 0 on a machine without any (1)")
    add("--cpus", type=int, default=4, help="CPUs for each run on the cluster (4)")
    add("--slurm", nargs="+", default=[], metavar="KEY=VALUE", help="partition, account, mem, ...")
    args, unknown = parser.parse_known_args(argv[:split])
    if unknown:
        parser.error(f"{unknown[0]} is unknown: the settings of the runs follow after --")
    if wrong := [pair for pair in args.vary if "=" not in pair]:
        parser.error(f"--vary takes <field>=<value>,..., such as n_end=2.0,3.0, not {wrong[0]}")
    args.settings, args.folder = argv[split + 1 :], Path(args.folder).expanduser().absolute()
    args.tasks, args.algorithms = (list(dict.fromkeys(x)) for x in (args.tasks, args.algorithms))
    args.grid = []
    for field, _, values in (pair.partition("=") for pair in args.vary):
        values = dict.fromkeys(re.split(r",(?![^(]*\))", values))  # tuples have commas too
        args.grid.append([f"--config.{field}={value}" for value in values])
    # Numbers, or names such as GPU-8f3a or MIG-5c21; by default as many as are asked for.
    needed = args.parallel * args.gpus
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", ",".join(map(str, range(needed))))
    args.visible = [gpu.strip() for gpu in visible.split(",") if gpu.strip()]
    if args.cluster == "local" and args.visible and needed > len(args.visible):
        parser.error(f"--parallel x --gpus = {needed} is more than CUDA_VISIBLE_DEVICES={visible}")
    for field in ("seeds", "seeds_per_run", "parallel"):
        if getattr(args, field) < 1:
            parser.error(f"--{field.replace('_', '-')} must be at least 1")
    if args.seeds % args.seeds_per_run:
        parser.error(f"--seeds={args.seeds} must be a multiple of --seeds-per-run")
    if wrong := [pair for pair in args.slurm if "=" not in pair]:
        parser.error(f"--slurm takes <key>=<value>, such as partition=gpu, not {wrong[0]}")
    if args.cluster == "slurm" and not shutil.which("srun"):
        parser.error("SLURM is not on this machine: use a login node, or --cluster=local")
    return args


def check(run):
    """Raises InputError if a script refuses a run's settings, or its task has runs with others."""
    if not (ROOT / f"{run.algorithm}.py").exists():
        raise InputError(f"--algorithms: {ROOT} has no script {run.algorithm}.py")
    own = ("--config.seed=", "--config.num_seeds=")
    if wrong := [setting for setting in (*run.settings, *run.varied) if setting.startswith(own)]:
        raise InputError(f"leave {wrong[0]} out: the sweep sets the seeds, see --seeds")
    try:
        _, file, _, *settings = run.command()
        config = load_config(run.algorithm, file.removeprefix("--config="), settings)
        config, _ = prepare(config, str(run.folder / run.name), run.algorithm, resume=False)
    except InputError as error:
        raise InputError(f"{run.algorithm}, {run.task}: {error}") from None
    free = ("seed", "block_size", *MAY_CHANGE)  # block_size depends on the machine
    for path in (run.folder / run.name).parent.glob("*/config.json"):
        if path.parent.name.isdigit():  # no earlier run that was set aside
            what = f"{path.parent} is a run"
            check_same(load_settings(path.parent), config, free, what, "choose another folder")


def run_here(runs, args):
    """Fills `parallel` slots, each with its own GPUs; closing it stops them. Yields (run, logs)."""
    waiting, running = collections.deque(runs), {}
    try:
        while waiting or running:
            for slot in range(args.parallel):
                if slot in running and running[slot][1].poll() is not None:
                    run, _, log = running.pop(slot)
                    yield run, [log]
                if slot not in running and waiting:
                    run = waiting.popleft()
                    log = args.folder / "jobs" / f"{run.name}.log"
                    log.parent.mkdir(parents=True, exist_ok=True)
                    gpus = ",".join(args.visible[slot * args.gpus : (slot + 1) * args.gpus])
                    env = os.environ | {"CUDA_VISIBLE_DEVICES": gpus, "PYTHONUNBUFFERED": "1"}
                    command = [sys.executable, *run.command()]
                    with open(log, "w") as file:  # a session of its own hears no Ctrl-C
                        where = {"stdout": file, "stderr": subprocess.STDOUT, "env": env}
                        process = subprocess.Popen(command, start_new_session=True, **where)
                    running[slot] = run, process, log
                    print(f"{run.name} starts; {len(waiting)} wait; output in {log}", flush=True)
            time.sleep(0.5)
    finally:
        stop([process for _, process, _ in running.values()])


def stop(processes):
    """Sends SIGTERM, so that runs save and stop; again at each signal, and after a minute."""

    def send(*_):
        for process in processes:
            process.terminate()

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, send)
    for tenth in itertools.count():
        if all([process.poll() is not None for process in processes]):
            break
        if tenth % 600 == 0:
            print("sweep: stopping the runs; a second signal ends them at once", file=sys.stderr)
            send()
        time.sleep(0.1)


def run_on_slurm(runs, args):
    """Submits the runs that are not queued as one array, and waits. Yields (run, logs)."""
    jobs, path = args.folder / "jobs", args.folder / "jobs" / "slurm.json"
    ids = json.loads(path.read_text()) if path.exists() else {}
    known = {run: submitit.SlurmJob(jobs, ids[run.name]) for run in runs if run.name in ids}
    running = {run: job for run, job in known.items() if not job.done(force_check=True)}
    if running:
        print(f"{len(running)} are queued or running already (see {path})", flush=True)
    if new := [run for run in runs if run not in running]:
        executor = submitit.SlurmExecutor(jobs, max_num_timeout=1000)
        options = {"job_name": "ssar", "time": int(60 * args.hours)}
        options |= {"cpus_per_task": args.cpus, "gpus_per_node": args.gpus or None}
        options |= {"array_parallelism": args.parallel}
        options |= dict(pair.split("=", 1) for pair in args.slurm)
        try:
            executor.update_parameters(**options)
        except (TypeError, ValueError) as error:
            message = " ".join(str(error).split())
            raise InputError(f"--slurm {' '.join(args.slurm)}: {message}") from None
        with executor.batch():
            submitted = [executor.submit(run) for run in new]
        running |= zip(new, submitted, strict=True)
        ids |= {run.name: job.job_id for run, job in running.items()}
        write_json(str(path), ids)
        print(f"{len(new)} submitted; Ctrl-C stops waiting and leaves them queued", flush=True)
    while running:
        for run, job in list(running.items()):
            if run.is_finished() or job.done():
                del running[run]
                yield run, [job.paths.stderr, job.paths.stdout]
        time.sleep(2)  # submitit asks the cluster less often


def reason(logs):
    """Why a run ended without results: the last line of its output."""
    for log in logs:
        text = log.read_text(errors="replace").strip() if log.exists() else ""
        if text:
            return f"{text.splitlines()[-1]} ({log})"
    return f"it wrote nothing ({logs[0]})"


def compare_runs(folder, runs):
    """Compares the finished runs of each task and data set in table.csv and in a picture."""
    tasks = collections.defaultdict(list)
    for path in sorted(folder.glob("*/*/*/results.json")):
        if path.parent.name.isdigit():  # no earlier run that was set aside
            config = json.loads((path.parent / "config.json").read_text())
            data = config["dataset"] or config["dataset_path"] or ""
            words = dict.fromkeys([config["task"], re.sub(r"[^\w.-]+", "_", data).strip("_")])
            tasks["-".join(filter(None, words))].append(path.parent)
    with open(folder / "table.csv", "w", newline="") as file:
        names = ["task", *COLUMNS]
        writer = csv.DictWriter(file, names)
        writer.writeheader()
        for task, folders in tasks.items():
            print(f"\n{task}")
            try:
                rows = compare(folders, folder / f"{task}.png")
            except SystemExit as error:  # their environments or their rows differ
                print(error, file=sys.stderr)
                continue
            writer.writerows(dict(zip(names, [task, *row], strict=True)) for row in rows)
        writer.writerows(compare_over_tasks(runs))


def compare_over_tasks(runs):
    """The interquartile mean of each setting, once all runs have finished: rows of table.csv."""
    scores = collections.defaultdict(lambda: collections.defaultdict(list))
    for run in runs if all(run.is_finished() for run in runs) else ():
        results = json.loads((run.folder / run.name / "results.json").read_text())
        if results["unit"] == "return":  # raw returns of different tasks have no common mean
            return
        data = [x for x in run.varied if x.startswith("--config.dataset=")]
        words = [x.removeprefix("--config.") for x in run.varied if x not in data]
        label = ", ".join([run.algorithm, *words])
        scores[label][run.task, *data] += results["mean_last_10"]
    for label, tasks in scores.items():
        if len(tasks) > 1:
            mean, low, high = interquartile_mean([*tasks.values()])
            print(f"\nIQM of the means of the last ten over {len(tasks)} tasks, {label}: ", end="")
            print(f"{mean:.1f} [{low:.1f}, {high:.1f}]".removesuffix(" [nan, nan]"))
            ends = {"mean_last_10_low": low, "mean_last_10_high": high}
            seeds = sum(map(len, tasks.values()))
            yield {"task": "IQM", "label": label, "seeds": seeds, "mean_last_10": mean, **ends}


def sweep(args, runs):
    """Runs what is not finished. Returns what to exit with: None if nothing failed."""
    unfinished = [run for run in runs if not run.is_finished()]
    print(f"{len(runs)} runs, {len(runs) - len(unfinished)} of them finished", flush=True)
    start = run_here if args.cluster == "local" else run_on_slurm
    failed, status = [], None
    try:
        with contextlib.closing(start(unfinished, args)) as ends:
            for run, logs in ends:
                if run.is_finished():
                    print(f"{run.name} is finished", flush=True)
                else:
                    failed.append(run)
                    print(f"{run.name} failed: {reason(logs)}", file=sys.stderr, flush=True)
    except KeyboardInterrupt as stop:
        print("sweep: stopped: the same command resumes", file=sys.stderr)
        status = 143 if stop.args else 130
    compare_runs(args.folder, runs)
    if failed and not status:
        status = f"sweep: {len(failed)} of {len(runs)} runs failed: the same command retries them"
    return status


def terminate(*_):
    """Makes SIGTERM act like Ctrl-C."""
    raise KeyboardInterrupt("SIGTERM")


def main(argv):
    """Checks everything, then runs the sweep and exits with its status."""
    args = parse(argv)
    firsts = range(0, args.seeds, args.seeds_per_run)
    places = itertools.product(args.algorithms, args.tasks, itertools.product(*args.grid), firsts)
    runs = [
        Run(args.folder, algorithm, task, seed, args.seeds_per_run, tuple(args.settings), varied)
        for algorithm, task, varied, seed in places
    ]
    jax.config.update("jax_platforms", "cpu")  # the GPUs are for the runs
    try:
        for run in runs[:: len(firsts)]:
            check(run)
        args.folder.mkdir(parents=True, exist_ok=True)
        signal.signal(signal.SIGTERM, terminate)
        with filelock.FileLock(args.folder / "lock").acquire(timeout=0):
            status = sweep(args, runs)
    except filelock.Timeout:
        status = f"sweep: {args.folder} is in use by another sweep: wait, or choose another folder"
    except (InputError, OSError) as error:
        status = f"sweep: {error}"
    sys.exit(status)


if __name__ == "__main__":
    main(sys.argv[1:])
