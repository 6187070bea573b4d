r"""Runs algorithms, tasks and seeds on this machine or on a SLURM cluster, through submitit.

    python experiments/sweep.py runs/sweep --tasks hopper-medium-v2 walker2d-medium-v2 --seeds=5
    python experiments/sweep.py runs/fixed --tasks hopper-medium-v2 --seeds=5 --seeds-per-run=5 \
        --cluster=slurm --parallel=8 --slurm partition=gpu mem=16G -- --config.coefficient=fixed

A run is what `python <algorithm>.py --config=configs/<algorithm>.py:<task>` with the settings after
`--` does, in <folder>/<algorithm>/<task>/<first seed>. The same command started again leaves out
what is finished, waits for what is still queued or running on the cluster, and goes on with the
rest where its last checkpoint is. A cluster's job whose time is up is queued again and goes on too.
At the end, or when it is stopped, the scores of all finished runs in the folder are printed and
written to <folder>/table.csv. What jobs print is in <folder>/jobs.
"""

import argparse
import collections
import csv
import dataclasses
import glob
import importlib
import json
import os
import runpy
import shutil
import signal
import sys
import time

import numpy as np
import submitit
from absl import flags
from ml_collections import config_flags

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)
from common.checks import InputError, check_config, lock  # noqa: E402

ALGORITHMS = ("ssar_td3bc", "ssar_cql")
OWN_FIELDS = ("task", "seed", "num_seeds")  # are set by the sweep
SCORES = ("behaviour", "last", "mean_last_10", "best")


@dataclasses.dataclass(frozen=True)
class Run:
    """One run of a script, as the job that submitit stores and calls."""

    root: str
    folder: str
    algorithm: str
    task: str
    seed: int
    num_seeds: int
    settings: tuple[str, ...]

    @property
    def name(self):
        return f"{self.algorithm}/{self.task}/{self.seed}"

    @property
    def workdir(self):
        return os.path.join(self.folder, self.algorithm, self.task, str(self.seed))

    def finished(self):
        return os.path.exists(os.path.join(self.workdir, "results.json"))

    def __call__(self):
        if self.finished():  # by a job that was submitted twice
            return
        if os.environ.get("SUBMITIT_EXECUTOR") == "local":
            os.setpgrp()  # Ctrl-C is the sweep's to hear, which then sends SIGTERM
            signal.signal(signal.SIGTERM, signal.SIG_DFL)  # for the script to take
        script = os.path.join(self.root, f"{self.algorithm}.py")
        sys.path.insert(0, self.root)
        sys.argv = [
            script,
            f"--config={self.root}/configs/{self.algorithm}.py:{self.task}",
            f"--config.seed={self.seed}",
            f"--config.num_seeds={self.num_seeds}",
            *self.settings,
            f"--workdir={self.workdir}",
        ]
        print(*sys.argv, flush=True)
        try:
            runpy.run_path(script, run_name="__main__")
        except SystemExit as end:
            if isinstance(end.code, str):  # what the user can mend: submitit knows no exit
                raise RuntimeError(end.code) from None
            if end.code:  # submitit's own, when the time is up
                raise

    def checkpoint(self):
        """submitit calls this when the time is up: what to queue in place of this job."""
        return submitit.helpers.DelayedSubmission(self)


class Help(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """The description as it stands, and every default."""


def parse(argv):
    """The arguments, and the settings after `--`."""
    split = argv.index("--") if "--" in argv else len(argv)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=Help)
    parser.add_argument("folder", help="where the runs go")
    parser.add_argument(
        "--algorithms", nargs="+", default=["ssar_td3bc"], choices=ALGORITHMS, help="scripts"
    )
    parser.add_argument("--tasks", nargs="+", required=True, help="of the scripts' tables")
    parser.add_argument("--seeds", type=int, default=5, help="0, 1, ...; so many a task")
    parser.add_argument("--seeds-per-run", type=int, default=1, help="in one program")
    parser.add_argument(
        "--cluster", choices=("local", "slurm"), default="local", help="where: here, or on SLURM"
    )
    parser.add_argument("--parallel", type=int, default=1, help="runs at a time")
    parser.add_argument("--hours", type=float, default=24.0, help="a job's time, on the cluster")
    parser.add_argument("--gpus", type=int, default=1, help="of each run; 0 where there are none")
    parser.add_argument("--cpus", type=int, default=4, help="of each run, on the cluster")
    parser.add_argument(
        "--slurm", nargs="+", default=[], metavar="KEY=VALUE", help="partition, account, mem, ..."
    )
    args, settings = parser.parse_args(argv[:split]), argv[split + 1 :]
    args.tasks, args.algorithms = (list(dict.fromkeys(x)) for x in (args.tasks, args.algorithms))
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "").replace(",", " ").split()
    args.visible = [int(gpu) for gpu in visible if gpu.isdigit()] or range(10**6)
    if args.cluster == "local" and args.parallel * args.gpus > len(args.visible):
        parser.error(f"--parallel={args.parallel} with --gpus={args.gpus} needs more GPUs than "
                     f"CUDA_VISIBLE_DEVICES={','.join(visible)} names")  # fmt: skip
    for field in ("seeds", "seeds_per_run", "parallel"):
        if getattr(args, field) < 1:
            parser.error(f"--{field.replace('_', '-')} must be at least 1")
    if args.seeds % args.seeds_per_run:
        parser.error(f"--seeds={args.seeds} must be a multiple of --seeds-per-run")
    if unreadable := [pair for pair in args.slurm if "=" not in pair]:
        parser.error(f"--slurm takes <key>=<value>, such as partition=gpu, not {unreadable[0]}")
    if args.cluster == "slurm" and not shutil.which("srun"):
        parser.error("there is no SLURM here: start it on a login node, or give --cluster=local")
    for algorithm in args.algorithms:
        check_settings(parser, algorithm, args.tasks, settings)
    return args, settings


def check_settings(parser, algorithm, tasks, settings):
    """Stops before anything is submitted for tasks and fields that do not exist."""
    module = importlib.import_module(f"configs.{algorithm}")
    for task in tasks:
        if task not in module.TASKS:
            parser.error(f"unknown task '{task}': choose of {', '.join(module.TASKS)}")
    fields = set(module.get_config(tasks[0])) - set(OWN_FIELDS)
    for setting in settings:
        field = setting.partition("=")[0].removeprefix("--config.")
        if not setting.startswith("--config.") or "=" not in setting or field not in fields:
            known = ", ".join(sorted(fields))
            parser.error(
                f"'{setting}' after -- is no setting for {algorithm}: give --config.<field>=<value>"
                f" with a field of {known}"
            )
    for task in tasks:
        values = flags.FlagValues()
        config_flags.DEFINE_config_file("config", flag_values=values)
        arguments = [f"--config={ROOT}/configs/{algorithm}.py:{task}", *settings]
        try:
            values(["sweep", *arguments])
            check_config(values.config)
        except (flags.Error, ValueError, TypeError) as error:
            parser.error(f"{algorithm}, {task}: {' '.join(str(error).split())}")


def check_folder(folder, args, settings):
    """Writes sweep.json, or stops when the folder's runs have other settings than these.

    Returns the open file that keeps other sweeps out.
    """
    path = os.path.join(folder, "sweep.json")
    mine = {"settings": sorted(settings), "seeds_per_run": args.seeds_per_run}
    if os.path.exists(path):
        with open(path) as file:
            theirs = json.load(file)
        if theirs != mine and glob.glob(os.path.join(glob.escape(folder), *"***", "config.json")):
            sys.exit(
                f"sweep: {folder} holds runs of {json.dumps(theirs)}, not {json.dumps(mine)}: "
                "choose another folder"
            )
    elif os.path.isdir(folder) and set(os.listdir(folder)) - {"lock"}:
        sys.exit(f"sweep: {folder} holds files of no sweep: choose another folder")
    try:
        os.makedirs(folder, exist_ok=True)
        held = lock(folder)
        write_json(path, mine)
    except InputError as error:
        sys.exit(f"sweep: {error}")
    except OSError as error:
        sys.exit(f"sweep: {folder} cannot be written ({error.strerror}): choose another folder")
    return held


def write_json(path, content):
    """Whole or not at all."""
    with open(path + ".new", "w") as file:
        json.dump(content, file, indent=2)
    os.replace(path + ".new", path)


def run_here(runs, args, jobs):
    """Runs at most `parallel` at a time; when stopped, so are they. Yields (run, job) at an end."""
    executor = submitit.LocalExecutor(jobs)
    waiting, running = collections.deque(runs), {}
    try:
        while waiting or running:
            for slot in range(args.parallel):
                if slot in running and running[slot][1].done():
                    yield running.pop(slot)
                if slot not in running and waiting:
                    run = waiting.popleft()
                    gpus = args.visible[slot * args.gpus : (slot + 1) * args.gpus]
                    executor.update_parameters(
                        timeout_min=10**6, gpus_per_node=args.gpus, visible_gpus=[*gpus]
                    )
                    heard = signal.signal(signal.SIGINT, signal.SIG_IGN)  # by the job too
                    running[slot] = run, executor.submit(run)
                    signal.signal(signal.SIGINT, heard)
                    print(f"{run.name} starts, {len(waiting)} wait", flush=True)
            time.sleep(0.5)
    finally:
        stop_jobs([job for _, job in running.values()])


def stop_jobs(running):
    """SIGTERM for the runs, which may save first; once more for one that was just starting."""
    asked = 0.0
    while running := [job for job in running if not job.done()]:
        if time.monotonic() - asked > 10:
            for job in running:
                os.kill(int(job.job_id), signal.SIGTERM)  # to submitit's process, which forwards it
            asked = time.monotonic()
        time.sleep(0.1)


def run_on_slurm(runs, args, jobs):
    """Submits what is not queued yet as one array and waits. Yields (run, job) at an end."""
    path = os.path.join(jobs, "slurm.json")
    ids = {}
    if os.path.exists(path):
        with open(path) as file:
            ids = json.load(file)
    known = {run: submitit.SlurmJob(jobs, ids[run.name]) for run in runs if run.name in ids}
    running = [(run, job) for run, job in known.items() if not job.done(force_check=True)]
    new = [run for run in runs if run not in dict(running)]
    if running:
        print(f"{len(running)} are queued or running already (by {path})", flush=True)
    if new:
        executor = submitit.SlurmExecutor(jobs, max_num_timeout=1000)  # each goes on further
        parameters = {
            "job_name": "ssar",
            "time": int(60 * args.hours),
            "cpus_per_task": args.cpus,
            "gpus_per_node": args.gpus or None,
            "array_parallelism": args.parallel,
        }
        try:
            given = dict(pair.split("=", 1) for pair in args.slurm)
            executor.update_parameters(**parameters | given)
        except (TypeError, ValueError) as error:
            message = " ".join(str(error).split())
            raise SystemExit(f"sweep: --slurm {' '.join(args.slurm)}: {message}") from None
        with executor.batch():
            submitted = [executor.submit(run) for run in new]
        running += zip(new, submitted, strict=True)
        write_json(path, ids | {run.name: job.job_id for run, job in running})
        print(f"{len(new)} submitted; to stop waiting, Ctrl-C: they stay in the queue", flush=True)
    while running:
        ended = [(run, job) for run, job in running if run.finished() or job.done()]
        running = [pair for pair in running if pair not in ended]
        yield from ended
        time.sleep(2)  # submitit asks the cluster less often


def reason(run, job):
    """Why a job ended without results: the last line that it wrote."""
    for path in (job.paths.stderr, job.paths.stdout):
        if path.exists() and (lines := path.read_text(errors="replace").split("\n")):
            lines = [line.split("\r")[-1].strip() for line in lines if line.strip()]
            if lines:
                return f"{lines[-1].removeprefix('RuntimeError: ')} ({path})"
    return f"it wrote nothing ({job.paths.stderr})"


def deviation(values):
    """Of a sample; 0 for a single value."""
    return np.std(values, ddof=1) if len(values) > 1 else 0.0


def write_table(folder):
    """table.csv, and the same on the screen: mean ± standard deviation of the finished seeds."""
    groups = collections.defaultdict(lambda: collections.defaultdict(list))
    for path in sorted(glob.glob(os.path.join(glob.escape(folder), *"***", "results.json"))):
        algorithm, task, seed = path.split(os.sep)[-4:-1]
        if not seed.isdigit():  # an earlier run, set aside
            continue
        with open(path) as file:
            results = json.load(file)
        for key in SCORES:
            values = [np.nan if value is None else value for value in results[key]]
            groups[algorithm, task][key] += values
    with open(os.path.join(folder, "table.csv"), "w", newline="") as file:
        writer = csv.writer(file)
        columns = [f"{key}_{of}" for key in SCORES for of in ("mean", "std")]
        writer.writerow(["algorithm", "task", "seeds", *columns])
        for (algorithm, task), scores in groups.items():
            values = [f(scores[key]) for key in SCORES for f in (np.mean, deviation)]
            writer.writerow([algorithm, task, len(scores["last"]), *map(float, values)])
    print("{:12}{:32}{:>6}".format("algorithm", "task", "seeds"), end="")
    print("".join(f"{key:>18}" for key in SCORES))
    for (algorithm, task), scores in groups.items():
        shown = [f"{np.mean(scores[key]):.1f} ± {deviation(scores[key]):.1f}" for key in SCORES]
        print(f"{algorithm:12}{task:32}{len(scores['last']):>6}", end="")
        print("".join(f"{text:>18}" for text in shown))


def terminate(*_):
    """SIGTERM is like Ctrl-C."""
    raise KeyboardInterrupt("SIGTERM")


def main(argv):
    """Runs what is not finished; exit status 1 when something failed."""
    args, settings = parse(argv)
    folder = os.path.abspath(os.path.expanduser(args.folder))
    held = check_folder(folder, args, settings)
    firsts = range(0, args.seeds, args.seeds_per_run)
    runs = [
        Run(ROOT, folder, algorithm, task, seed, args.seeds_per_run, tuple(settings))
        for algorithm in args.algorithms
        for task in args.tasks
        for seed in firsts
    ]
    unfinished = [run for run in runs if not run.finished()]
    print(f"{len(runs)} runs, {len(runs) - len(unfinished)} of them finished", flush=True)
    signal.signal(signal.SIGTERM, terminate)
    start = run_here if args.cluster == "local" else run_on_slurm
    failed = 0
    try:
        for run, job in start(unfinished, args, os.path.join(folder, "jobs")):
            if run.finished():
                print(f"{run.name} is finished", flush=True)
            else:
                failed += 1
                print(f"{run.name} failed: {reason(run, job)}", file=sys.stderr, flush=True)
    except KeyboardInterrupt as stop:
        print("stopped: the same command goes on", file=sys.stderr)
        write_table(folder)
        sys.exit(143 if stop.args else 130)
    write_table(folder)
    held.close()
    if failed:
        sys.exit(f"sweep: {failed} of {len(runs)} runs failed: the same command tries them again")


if __name__ == "__main__":
    main(sys.argv[1:])
