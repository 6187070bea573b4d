"""Where the time of a run goes."""

import collections
import contextlib
import time

import numpy as np


class Clock:
    """The seconds of this process by activity, and of each compiled call by (phase, its steps)."""

    def __init__(self):
        self.began, self.calls = time.perf_counter(), collections.defaultdict(list)
        self.spent = dict.fromkeys(("evaluating", "writing"), 0.0)

    @contextlib.contextmanager
    def measure(self, activity: str):
        """Adds the time within to what was spent on `activity`."""
        began = time.perf_counter()
        yield
        self.spent[activity] += time.perf_counter() - began

    def report(self, earlier: float) -> dict:
        """The content of timing.json. earlier: seconds of the processes before this one."""
        median = {place: float(np.median(x[1:] or x)) for place, x in self.calls.items()}
        compiling = sum(max(x[0] - median[place], 0) for place, x in self.calls.items())
        spent = {"training": sum(map(sum, self.calls.values())) - compiling, "compiling": compiling}
        seconds = time.perf_counter() - self.began
        shares = {activity: x / seconds for activity, x in (spent | self.spent).items()}
        return {
            "steps_per_second": {phase: size / median[phase, size] for phase, size in median},
            "compile_seconds": compiling,
            "wall_seconds": earlier + seconds,
            "shares": shares | {"other": 1 - sum(shares.values())},
        }
