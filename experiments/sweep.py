r"""Runs scripts, tasks and seeds on this machine or on a SLURM cluster, through submitit.

    python experiments/sweep.py runs/sweep --tasks hopper-medium-v2 walker2d-medium-v2 --seeds=5
    python experiments/sweep.py runs/fixed --tasks hopper-medium-v2 --seeds=5 --seeds-per-run=5 \
        --cluster=slurm --parallel=8 --slurm partition=gpu mem=16G -- --config.coefficient=fixed

An algorithm is a script <name>.py in this repository with its settings in configs/<name>.py. A run
does what `python <name>.py --config=configs/<name>.py:<task>` does with the settings after `--`.
Its folder is <folder>/<name>/<task>/<first seed>. The same command skips finished runs, waits for
those that the cluster still has, and resumes the rest. A cluster's job whose time is up is queued
again and resumes. At the end, the scores of all finished runs in the folder are printed and written
to <folder>/table.csv. The output of jobs is in <folder>/jobs.
"""

import argparse
import collections
import contextlib
import csv
import dataclasses
import itertools
import json
import os
import runpy
import shutil
import signal
import sys
import time
from pathlib import Path

import filelock
import jax
import numpy as np
import submitit

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from common.run import InputError, prepare  # noqa: E402
from common.run.cli import load_config  # noqa: E402
from common.run.settings import MAY_CHANGE  # noqa: E402
from common.run.workdir import check_same, load_settings, write_json  # noqa: E402

SCORES = ("behaviour", "last", "mean_last_10", "best")


@dataclasses.dataclass(frozen=True)
class Run:
    """One run of a script: the function that submitit stores and calls."""

    folder: Path
    algorithm: str
    task: str
    seed: int
    num_seeds: int
    settings: tuple[str, ...]

    @property
    def name(self):
        return f"{self.algorithm}/{self.task}/{self.seed}"

    def arguments(self):
        """The settings file with its task, and the settings that change it."""
        seeds = f"--config.seed={self.seed}", f"--config.num_seeds={self.num_seeds}"
        return f"{ROOT}/configs/{self.algorithm}.py:{self.task}", [*seeds, *self.settings]

    def is_finished(self):
        return (self.folder / self.name / "results.json").exists()

    def __call__(self):
        if self.is_finished():  # by a job that was submitted twice
            return
        if os.environ.get("SUBMITIT_EXECUTOR") == "local":
            os.setpgrp()  # Ctrl-C reaches the sweep alone, which then sends SIGTERM
            signal.signal(signal.SIGTERM, signal.SIG_DFL)  # the script installs its own handler
        script, (file, settings) = f"{ROOT}/{self.algorithm}.py", self.arguments()
        sys.argv = [script, f"--config={file}", f"--workdir={self.folder / self.name}", *settings]
        print(*sys.argv, flush=True)
        sys.path.insert(0, str(ROOT))
        runpy.run_path(script, run_name="__main__")

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
    add("--seeds", type=int, default=5, help="how many for each task: 0, 1, ... (5)")
    add("--seeds-per-run", type=int, default=1, help="seeds in one program (1)")
    add("--cluster", choices=("local", "slurm"), default="local", help="where to run (local)")
    add("--parallel", type=int, default=1, help="runs at a time (1)")
    add("--hours", type=float, default=24.0, help="time limit of a job on the cluster (24)")
    add("--gpus", type=int, default=1, help="GPUs for each run; 0 on a machine without any (1)")
    add("--cpus", type=int, default=4, help="CPUs for each run on the cluster (4)")
    add("--slurm", nargs="+", default=[], metavar="KEY=VALUE", help="partition, account, mem, ...")
    args = parser.parse_args(argv[:split])
    args.settings, args.folder = argv[split + 1 :], Path(args.folder).expanduser().absolute()
    args.tasks, args.algorithms = (list(dict.fromkeys(x)) for x in (args.tasks, args.algorithms))
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
    args.visible = [int(gpu) for gpu in visible if gpu.strip().isdigit()] or range(10**6)
    if args.cluster == "local" and args.parallel * args.gpus > len(args.visible):
        parser.error("--parallel runs with --gpus each need more GPUs than CUDA_VISIBLE_DEVICES")
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
    if wrong := [setting for setting in run.settings if setting.startswith(own)]:
        raise InputError(f"leave {wrong[0]} out: the sweep sets the seeds, see --seeds")
    try:
        config = load_config(run.algorithm, *run.arguments())
        config, _ = prepare(config, str(run.folder / run.name), run.algorithm, resume=False)
    except InputError as error:
        raise InputError(f"{run.algorithm}, {run.task}: {error}") from None
    free = ("seed", "block_size", *MAY_CHANGE)  # block_size depends on the machine
    for path in (run.folder / run.name).parent.glob("*/config.json"):
        if path.parent.name.isdigit():  # no earlier run that was set aside
            what = f"{path.parent} is a run"
            check_same(load_settings(path.parent), config, free, what, "choose another folder")


def run_here(runs, args):
    """Fills `parallel` slots, each with its own GPUs; closing it stops them. Yields (run, job)."""
    executor = submitit.LocalExecutor(args.folder / "jobs")
    executor.update_parameters(timeout_min=10**6)
    waiting, running = collections.deque(runs), {}
    try:
        while waiting or running:
            for slot in range(args.parallel):
                if slot in running and running[slot][1].done():
                    yield running.pop(slot)
                if slot not in running and waiting:
                    run = waiting.popleft()
                    gpus = list(args.visible[slot * args.gpus : (slot + 1) * args.gpus])
                    executor.update_parameters(gpus_per_node=args.gpus, visible_gpus=gpus)
                    previous = signal.signal(signal.SIGINT, signal.SIG_IGN)  # the job inherits it
                    running[slot] = run, executor.submit(run)
                    signal.signal(signal.SIGINT, previous)
                    print(f"{run.name} starts; {len(waiting)} wait", flush=True)
            time.sleep(0.5)
    finally:
        stop_jobs([job for _, job in running.values()])


def stop_jobs(jobs):
    """Sends SIGTERM, so that runs save and stop; again at each signal, and after a minute."""

    def stop(*_):
        for job in jobs:
            if not job.done():
                os.kill(int(job.job_id), signal.SIGTERM)  # submitit's process forwards it

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, stop)
    for tenth in itertools.count():
        if all([job.done() for job in jobs]):
            break
        if tenth % 600 == 0:
            print("sweep: stopping the runs; a second signal ends them at once", file=sys.stderr)
            stop()
        time.sleep(0.1)


def run_on_slurm(runs, args):
    """Submits the runs that are not queued as one array, and waits. Yields (run, job) at ends."""
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
                yield run, running.pop(run)
        time.sleep(2)  # submitit asks the cluster less often


def reason(job):
    """Why a job ended without results: the last line of its output."""
    for path in (job.paths.stderr, job.paths.stdout):
        text = path.read_text(errors="replace").strip() if path.exists() else ""
        if text:
            return f"{text.splitlines()[-1]} ({path})"
    return f"it wrote nothing ({job.paths.stderr})"


def write_table(folder):
    """Prints mean ± standard deviation over the finished seeds, and writes them to table.csv."""
    groups = collections.defaultdict(list)  # (algorithm, task): results of the runs
    for path in sorted(folder.glob("*/*/*/results.json")):
        algorithm, task, seed = path.parts[-4:-1]
        if seed.isdigit():
            groups[algorithm, task].append(json.loads(path.read_text()))
    line = "{:15} {:31} {:>5}" + "{:>18}" * len(SCORES)
    print(line.format("algorithm", "task", "seeds", *SCORES))
    with open(folder / "table.csv", "w", newline="") as file:
        writer = csv.writer(file)
        columns = [f"{key}_{of}" for key in SCORES for of in ("mean", "std")]
        writer.writerow(["algorithm", "task", "seeds", *columns])
        for (algorithm, task), results in groups.items():
            scores = np.array([sum((x[key] for x in results), []) for key in SCORES], float)
            count = scores.shape[1]
            deviations = scores.std(axis=1, ddof=min(1, count - 1))  # 0 for one seed
            pairs = np.stack([scores.mean(axis=1), deviations], axis=1)
            writer.writerow([algorithm, task, count, *pairs.ravel().tolist()])
            shown = [f"{mean:.1f} ± {deviation:.1f}" for mean, deviation in pairs]
            print(line.format(algorithm, task, count, *shown))


def sweep(args, runs):
    """Runs what is not finished. Returns what to exit with: None if nothing failed."""
    unfinished = [run for run in runs if not run.is_finished()]
    print(f"{len(runs)} runs, {len(runs) - len(unfinished)} of them finished", flush=True)
    start = run_here if args.cluster == "local" else run_on_slurm
    failed, status = [], None
    try:
        with contextlib.closing(start(unfinished, args)) as ends:
            for run, job in ends:
                if run.is_finished():
                    print(f"{run.name} is finished", flush=True)
                else:
                    failed.append(run)
                    print(f"{run.name} failed: {reason(job)}", file=sys.stderr, flush=True)
    except KeyboardInterrupt as stop:
        print("sweep: stopped: the same command resumes", file=sys.stderr)
        status = 143 if stop.args else 130
    write_table(args.folder)
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
    runs = [
        Run(args.folder, algorithm, task, seed, args.seeds_per_run, tuple(args.settings))
        for algorithm, task, seed in itertools.product(args.algorithms, args.tasks, firsts)
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
