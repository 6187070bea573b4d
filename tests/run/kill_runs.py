"""Kills runs with SIGKILL at random moments, starts them again, and checks how they end.

    python tests/run/kill_runs.py [--kills=10] [script ...]

Each script runs offline with IQL labelling, then without it but with online training. Every start
is a process, forked before JAX starts anything. A killed run must end with the bits of a run that
was not killed; online, every stored row must be the one that was met last at its step.
"""

import argparse
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
            with open(f"{workdir}.log") as file:
                raise SystemExit(f"{workdir} failed:\n{file.read()[-2000:]}")
        return status == 0
    try:
        with open(f"{workdir}.log", "a") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
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


def check_online(whole, workdir, config):
    """No row is lost or doubled, the curve's steps are right, and offline nothing changed."""
    with open(f"{workdir}.met") as file:
        met = dict(json.loads(line) for line in file if line.endswith("]]]\n"))
    assert sorted(met) == list(range(1, config.online_steps + 1))
    rows = np.stack([met[step] for step in sorted(met)], axis=1).astype(np.float32)
    np.testing.assert_array_equal(np.load(f"{workdir}.npy"), rows)
    expected, found = rows_of(whole), rows_of(workdir)
    place = lambda row: (row["phase"], row["step"], row["seed"])
    assert list(map(place, expected)) == list(map(place, found))
    pairs = zip(expected, found, strict=True)
    assert all(a == b for a, b in pairs if a["phase"] == "offline")


def main(name, folder, kills, online_steps):
    """Prints what the runs were doing when they were killed."""
    script = importlib.import_module(name)
    jax.config.update("jax_compilation_cache_dir", os.path.join(folder, "compiled"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    data = write_hdf5(os.path.join(folder, "toy.hdf5"), **toy_columns())
    settings = {"num_seeds": 2, "offline_steps": 300, "checkpoint_minutes": 0.001}
    settings |= {"selection": "return" if online_steps else "iql", "iql_steps": 1000}
    settings |= {"expectile": 0.3, "warmup_steps": 5}
    settings |= {"updates_per_call": 10, "buffer_init": "half", "online_steps": online_steps}
    cache = lambda name: {"cache_dir": os.path.join(folder, f"cache_{name}")}
    for name in ("compiling", "whole"):
        began, whole = time.perf_counter(), os.path.join(folder, name)
        attempt(script.main, tiny_config(data, script.__name__, **settings, **cache(name)), whole)
    longest = time.perf_counter() - began
    rng, killed, number = random.Random(0), [], 0
    while len(killed) < kills:
        name, number = f"killed_{number}", number + 1
        config, workdir = None, os.path.join(folder, name)
        config = tiny_config(data, script.__name__, **settings, **cache(name))
        stretch = 1.0  # grows: a resumed run may have to compile what the cache does not hold
        while not attempt(script.main, config, workdir, rng.uniform(0.1, stretch) * longest):
            unfinished = os.path.join(workdir, "unfinished")
            found = sorted(os.listdir(unfinished)) if os.path.exists(unfinished) else []
            killed.append(found[-1] if found else "before a checkpoint")
            stretch *= 1.3
        if online_steps:
            check_online(whole, workdir, config)
        else:
            assert_same(whole, workdir)
    print(f"{script.__name__}, {online_steps} online steps: {number} runs as without {len(killed)} "
          f"kills, after {', '.join(killed)}", flush=True)  # fmt: skip


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("scripts", nargs="*", default=["ssar_td3bc", "ssar_cql"])
    options = parser.parse_args()
    for script in options.scripts:
        for steps in (0, 200):
            with tempfile.TemporaryDirectory() as scratch:
                main(script, scratch, options.kills, steps)
