"""Where the time of a run goes."""

import collections
import contextlib
import time

import numpy as np


class Clock:
    """The seconds of this process, and of each compiled call: {phase: [seconds, ...]}."""

    def __init__(self):
        self.began, self.calls = time.perf_counter(), collections.defaultdict(list)
        self.spent = dict.fromkeys(("training", "compiling", "evaluating", "writing"), 0.0)

    @contextlib.contextmanager
    def measure(self, activity: str):
        """Adds the time within to what was spent on `activity`."""
        began = time.perf_counter()
        yield
        self.spent[activity] += time.perf_counter() - began

    def report(self, config, earlier: float) -> dict:
        """The content of timing.json; null for phases without a call. earlier: seconds before."""
        calls = {phase: x for phase, x in self.calls.items() if x}
        if "online" in calls:  # with an update, unlike those of the warm-up
            calls["online"] = calls["online"][-(config.online_steps - config.warmup_steps) :]
        median = {phase: float(np.median(x[1:] or x)) for phase, x in calls.items()}
        offline = config.updates_per_call / median["offline"] if "offline" in median else None
        online = 1 / median["online"] if "online" in median else None
        compiling = sum(max(x[0] - median[phase], 0) for phase, x in calls.items())
        training = sum(map(sum, self.calls.values())) - compiling
        seconds = time.perf_counter() - self.began
        spent = self.spent | {"compiling": compiling, "training": training}
        shares = {activity: x / seconds for activity, x in spent.items()}
        return {
            "updates_per_second": offline or online,
            "online_updates_per_second": online,
            "env_steps_per_second": online and online * config.num_seeds,
            "compile_seconds": compiling,
            "wall_seconds": earlier + seconds,
            "shares": shares | {"other": 1 - sum(shares.values())},
        }
