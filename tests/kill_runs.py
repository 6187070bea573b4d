"""Kills runs of a script with SIGKILL at random moments, starts them again, and reports when.

    python tests/kill_runs.py <script> <data> <folder> <selection> <kills> <longest> [<online>]

A kill comes at most `longest` seconds after a loop, or a fifth of that after the program, starts.
`<folder>/whole` is a run without a kill, `<folder>/killed_0`, `killed_1`, ... those with, as many
as it takes. Each attempt is a process forked before JAX has started anything, so that it need not
import everything again. online: environment steps after the offline updates; then every step taken
is noted in `<run>.met`, as JSON lines [step, observations it led to], and the replay buffer at the
end is `<run>.npy`, its successors alone.
"""

import importlib
import json
import os
import random
import signal
import sys
import threading

import jax
import numpy as np
from toys import tiny_config

from common.evaluation import Collector
from common.report import RunLog


def kill_after(seconds):
    threading.Timer(seconds, os.kill, (os.getpid(), signal.SIGKILL)).start()


def take_notes(script, workdir):
    """Of this process's steps online and of its replay buffer."""
    step, compile_online, finish = Collector.step, script.compile_online, RunLog.finish
    buffers = []

    def noted_step(envs, actions):
        outcome = step(envs, actions)
        with open(f"{workdir}.met", "a") as file:
            print(json.dumps([envs.steps, outcome.next_obs.tolist()]), file=file)
        return outcome

    def noted_programs(*args):
        choose, collect, learn, totals = compile_online(*args)

        def noted_collect(*args):
            buffers[:] = [collect(*args)]
            return buffers[0]

        return choose, noted_collect, learn, totals

    def noted_finish(log, *args):
        if buffers:
            np.save(f"{workdir}.npy", buffers[0].rows.next_obs)
        return finish(log, *args)

    Collector.step, script.compile_online, RunLog.finish = noted_step, noted_programs, noted_finish


def attempt(script, config, workdir, delay=None):
    """One start of the run; returns whether it came to its end.

    delay: seconds after which it is killed, since its start if negative, else since a loop's.
    """
    pid = os.fork()
    if not pid:
        try:
            if delay is not None and delay < 0:
                kill_after(-delay)
            elif delay is not None:
                progress = script.progress
                script.progress = lambda *args, **more: kill_after(delay) or progress(*args, **more)
            take_notes(script, workdir)
            script.main(config, workdir)
            os._exit(0)
        except BaseException as error:
            print(repr(error), file=sys.stderr)
            os._exit(1)
    _, status = os.waitpid(pid, 0)
    if status not in (0, signal.SIGKILL):
        raise SystemExit(f"{workdir} failed with status {status}")
    return status == 0


def where(workdir, cache):
    """What the run was doing when it was killed, as its files tell."""
    if not os.path.exists(os.path.join(workdir, "config.json")):
        return "labelling" if os.path.isdir(cache) and os.listdir(cache) else "start"
    unfinished = os.path.join(workdir, "unfinished")
    if os.path.isdir(unfinished) and any("tmp" in name for name in os.listdir(unfinished)):
        return "checkpoint"
    path = os.path.join(workdir, "scores.csv")
    return f"{sum(1 for _ in open(path)) - 1 if os.path.exists(path) else 0} rows"


def main(name, data, folder, selection, kills, longest, online="0"):
    script = importlib.import_module(name)
    script.IQL_INTERVAL, script.UPDATES_PER_CALL = 60, 200  # ten of the twenty of an interval
    if not jax.config.jax_compilation_cache_dir:
        jax.config.update("jax_compilation_cache_dir", os.path.join(folder, "compiled"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    settings = {"num_seeds": 2, "offline_steps": 300, "checkpoint_minutes": 0.001}
    settings |= {"selection": selection, "iql_steps": 300, "expectile": 0.3}
    settings |= {"online_steps": int(online), "warmup_steps": 5, "buffer_init": "half"}

    cache = os.path.join(folder, "cache_whole")
    attempt(
        script, tiny_config(data, name, cache_dir=cache, **settings), os.path.join(folder, "whole")
    )

    rng, killed, number, longest = random.Random(0), [], 0, float(longest)
    while len(killed) < int(kills):
        workdir, cache = (os.path.join(folder, f"{x}_{number}") for x in ("killed", "cache_killed"))
        config = tiny_config(data, name, cache_dir=cache, **settings)
        while not attempt(script, config, workdir, delay=rng.uniform(-0.2, 1) * longest):
            killed.append(where(workdir, cache))
        number += 1
    print(json.dumps({"killed": killed, "runs": number}))


if __name__ == "__main__":
    main(*sys.argv[1:])
