"""Kills runs with SIGKILL at random moments, starts them again, and checks how they end.

    python tests/run/kill_runs.py [--kills=10] [script ...]

Each script runs offline with IQL labelling, then without it but with online training. Every start
is a process, forked before JAX starts anything. A killed run must end with the bits of a run that
was not killed; online, every stored row must be the one that was met last at its step.
"""

import argparse
import glob
import importlib
import json
import os
import random
import signal
import sys
import tempfile
import threading
import time

import jax
import numpy as np

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path[:0] = [os.path.dirname(os.path.dirname(HERE)), os.path.dirname(HERE), HERE]
os.environ.setdefault("SSAR_TEST_SCRATCH", tempfile.gettempdir())

from comparing import assert_same, rows_of  # noqa: E402
from toys import tiny_config, toy_columns, write_hdf5  # noqa: E402

from common.evaluation import Collector  # noqa: E402
from common.run import Run  # noqa: E402


def attempt(main, config, workdir, delay=None):
    """One start of the run; whether it came to its end. delay: seconds until it is killed."""
    if child := os.fork():
        _, status = os.waitpid(child, 0)
        if status not in (0, signal.SIGKILL):
            raise SystemExit(f"{workdir} failed")  # and has said why
        return status == 0
    try:
        sys.stdout = open(os.devnull, "w")
        if delay is not None:
            threading.Timer(delay, os.kill, (os.getpid(), signal.SIGKILL)).start()
        note_rows(workdir)
        main(config, workdir)
        os._exit(0)
    except BaseException as error:
        print(repr(error), file=sys.stderr, flush=True)
        os._exit(1)


def note_rows(workdir):
    """Writes what every online step met to <workdir>.met, and the last buffer to <workdir>.npy."""
    step, save = Collector.step, Run.save

    def noted_step(envs, actions):
        outcome = step(envs, actions)
        with open(f"{workdir}.met", "a") as file:
            print(json.dumps([envs.steps, outcome.next_obs.tolist()]), file=file)
        return outcome

    def noted_save(run, step, tree):
        if hasattr(tree[-1], "rows"):
            np.save(f"{workdir}.npy", tree[-1].rows.next_obs)
        save(run, step, tree)

    Collector.step, Run.save = noted_step, noted_save


def check_online(whole, workdir, online_steps):
    """No row is lost or doubled, the curve's steps are right, and offline nothing changed."""
    with open(f"{workdir}.met") as file:
        met = dict(json.loads(line) for line in file if line.endswith("]]]\n"))
    assert sorted(met) == list(range(1, online_steps + 1))
    rows = np.stack([met[step] for step in sorted(met)], axis=1).astype(np.float32)
    np.testing.assert_array_equal(np.load(f"{workdir}.npy"), rows)
    expected, found = rows_of(whole), rows_of(workdir)
    place = lambda row: (row["phase"], row["step"], row["seed"])
    assert list(map(place, expected)) == list(map(place, found))
    is_offline = lambda row: row["phase"] == "offline"
    assert list(filter(is_offline, expected)) == list(filter(is_offline, found))


def main(name, folder, kills, online_steps):
    """Kills runs of a script so often, and prints what they were doing."""
    script = importlib.import_module(name)
    jax.config.update("jax_compilation_cache_dir", os.path.join(folder, "compiled"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    data = write_hdf5(os.path.join(folder, "toy.hdf5"), **toy_columns())
    settings = {"num_seeds": 2, "offline_steps": 300, "checkpoint_minutes": 0.001}
    settings |= {"selection": "return" if online_steps else "iql", "iql_steps": 1000}
    settings |= {"expectile": 0.3, "warmup_steps": 5, "updates_per_call": 10}
    settings |= {"buffer_init": "half", "online_steps": online_steps}

    def start(run, delay=None):
        cache = os.path.join(folder, f"cache_{run}")
        config = tiny_config(data, name, cache_dir=cache, **settings)
        return attempt(script.main, config, os.path.join(folder, run), delay)

    start("compiling")
    began = time.perf_counter()
    start("whole")
    longest = time.perf_counter() - began
    whole, rng, killed, number = os.path.join(folder, "whole"), random.Random(0), [], 0
    while len(killed) < kills:
        run, number = f"killed_{number}", number + 1
        workdir = os.path.join(folder, run)
        stretch = 1.0  # grows: a resumed run may have to compile what the cache does not hold
        while not start(run, rng.uniform(0.1, stretch) * longest):
            found = sorted(glob.glob("unfinished/*", root_dir=workdir))
            killed.append(os.path.basename(found[-1]) if found else "before a checkpoint")
            stretch *= 1.3
        if online_steps:
            check_online(whole, workdir, online_steps)
        else:
            assert_same(whole, workdir)
    print(f"{name}, {online_steps} online steps: {number} runs as without {len(killed)} kills, "
          f"after {', '.join(killed)}", flush=True)  # fmt: skip


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("scripts", nargs="*", default=["ssar_td3bc", "ssar_cql"])
    options = parser.parse_args()
    for script in options.scripts:
        for steps in (0, 200):
            with tempfile.TemporaryDirectory() as scratch:
                main(script, scratch, options.kills, steps)
