"""Run: everything that the training loops need of their run folder."""

import contextlib
import os
import shutil
import sys
import time

import jax
import numpy as np
from tqdm import tqdm

from common.run import checkpoint, diagnosis, stopping
from common.run.clock import Clock
from common.run.errors import Diverged, InputError, explained
from common.run.records import Records, print_table
from common.run.workdir import as_json, lock_folder, set_aside, write_json


def close_run() -> str | None:
    """Releases what the latest run holds; returns where its latest checkpoint is, if anywhere."""
    if not stopping.open_runs:
        return None
    run = stopping.open_runs.pop()
    with contextlib.suppress(OSError):
        run._held.close()
    return run._saved


class Run:
    """One run and its folder; its methods raise OSError when the folder cannot be written."""

    def __init__(self, script, workdir, config, dataset, resume):
        """Begins the run in `workdir`, or resumes it. Raises InputError if it is in use."""
        close_run()
        with explained(f"--workdir={workdir} cannot be made", "choose another folder"):
            os.makedirs(workdir, exist_ok=True)
        self.workdir, self.step, self._phase = workdir, 0, None
        self._script, self._config, self._dataset = script, config, dataset
        self._unfinished = os.path.join(workdir, "unfinished")
        self._sums, self._size, self._warned = {}, 1, set()
        self._saved, self._clock, self._earlier = None, Clock(), 0.0
        self._saved_at = time.perf_counter()
        self._bar, self._held = tqdm(disable=True), contextlib.ExitStack()
        self._origin = checkpoint.origin(config, dataset)
        self._lock = lock_folder(workdir)
        self._held.callback(lambda: self._lock.release())  # after all others
        stopping.open_runs.append(self)
        newest = checkpoint.load_newest(self._unfinished) if resume else None
        if newest and newest.get("origin") != self._origin:
            what = f"the unfinished run in {workdir} had other data or another offline run"
            raise InputError(f"{what}: restore them, or set it aside with --noresume")
        if not newest:
            if set_aside(workdir):  # and the lock with it
                self._lock.release()
                self._lock = lock_folder(workdir)
            write_json(os.path.join(workdir, "config.json"), config.to_dict())
            print(f"starts {workdir}, with an evaluation every {config.eval_interval:,} steps")
            print("compiling, up to a minute the first time", flush=True)
        os.makedirs(self._unfinished, exist_ok=True)
        self._records = Records(workdir, config, dataset)
        self._held.callback(self._records.close)
        if newest:
            self._records.evaluations = newest["evaluations"]
            self._records.episodes = newest["episodes"]
            self._records.write()
            self._earlier = newest["seconds"]
            self._saved = f"{newest['phase']} step {newest['step']}"
            print(f"resumes {workdir} after {self._saved}", flush=True)

    def resume(self, phase: str, tree, total: int):
        """Begins a phase; returns `tree` as this run last saved it in that phase, else as it is."""
        stopping.stop_if_told()
        self._phase, self._total, self.step, self._sums = phase, total, 0, {}
        if saved := checkpoint.load_newest(self._unfinished, phase):
            what = f"the unfinished run in {self.workdir}"
            tree = checkpoint.from_dict(tree, saved["tree"], what)
            self.step, self._sums = saved["step"], saved["sums"]
        unit, pause = "step" if phase == "online" else "update", 0.5 if sys.stderr.isatty() else 30
        bar = {"initial": self.step, "total": total, "disable": self.step >= total, "unit": unit}
        bar |= {"mininterval": pause, "unit_scale": True, "dynamic_ncols": True}
        self._bar.close()
        self._bar = tqdm(desc=f"{phase} (compiling)", **bar)
        self._held.callback(self._bar.close)
        return tree

    def steps(self, until: int, size: int = 1):
        """Yields the number of steps done after each compiled call of `size`, up to `until`."""
        self._size, spent = size, self._clock.spent
        while self.step + size <= until:
            began = time.perf_counter() - spent["writing"]
            self.step += size
            yield self.step
            seconds = time.perf_counter() - spent["writing"] - began
            warms_up = self._phase == "online" and self.step <= self._config.warmup_steps
            self._clock.calls["warm-up" if warms_up else self._phase, size].append(seconds)
            self._bar.set_description(self._phase, refresh=False)
            self._bar.update(size)

    def log(self, step: int, metrics: dict, finished=()) -> None:
        """Adds the metrics, [S] each, of a compiled call, and episodes. Raises Diverged."""
        for row in finished:
            score = self._dataset.score(row["return"], row["success"])
            self._records.episodes.append(row | {"score": score})
        # Unlike np.asarray, block_until_ready lets signals be heard.
        metrics = jax.device_get(jax.block_until_ready(metrics))
        values = {name: np.asarray(x, np.float64) for name, x in metrics.items()}
        self._check([name for name, x in values.items() if not np.isfinite(x).all()], step)
        for name, x in values.items():
            total, count = self._sums.get(name, (0.0, 0))
            self._sums[name] = [total + self._size * x, count + self._size]

    def _check(self, broken, step):
        """Raises Diverged if anything is broken: β is named first, then the losses."""
        if not broken:
            return
        broken.sort(key=lambda name: ("beta" not in name, "loss" not in name))
        where = f"between {self._phase} steps {step - self._size} and {step}"
        kept = "no checkpoint was due before"
        if self._saved:
            kept = f"the last finite checkpoint, {self._saved}, stays in {self._unfinished}"
        fix = "lower --config.reward_scale, actor_lr or critic_lr"
        raise Diverged(f"diverged: {', '.join(broken[:4])} not finite {where}: {fix}; {kept}")

    def save(self, step: int, tree) -> None:
        """Writes a checkpoint after an interval, a phase or checkpoint_minutes, or if told to stop.

        Raises Diverged when the tree is not finite, and Stopped after the last of these.
        """
        ends = step == self._total or self._phase != "iql" and not step % self._config.eval_interval
        seconds, now = 60 * self._config.checkpoint_minutes, time.perf_counter()
        if not (ends or stopping.received or 0 < seconds <= now - self._saved_at):
            return
        with self._clock.measure("writing"):
            content = {"phase": self._phase, "step": step, "origin": self._origin}
            content |= {"tree": checkpoint.to_dict(tree), "sums": self._sums}
            self._check(diagnosis.broken_parts(content["tree"]), step)
            content |= {key: getattr(self._records, key) for key in ("evaluations", "episodes")}
            content["seconds"] = self._earlier + now - self._clock.began
            path = os.path.join(self._unfinished, f"{self._phase}-{step}.msgpack")
            checkpoint.write(path, content)
            for old in checkpoint.list_unfinished(self._unfinished, self._phase)[2:]:
                os.remove(old)
        self._saved, self._saved_at = f"{self._phase} step {step}", time.perf_counter()
        stopping.stop_if_told()

    def evaluate(self, step: int, play, n) -> None:
        """Adds the evaluation play() -> Episodes unless it was made before; n: [S]."""
        rows = self._records.evaluations
        if any((row["phase"], row["step"]) == (self._phase, step) for row in rows):
            return
        sums, self._sums = self._sums, {}
        self._bar.set_description(f"{self._phase} (evaluating)", refresh=sys.stderr.isatty())
        with self._clock.measure("evaluating"):
            episodes = play()
        self._bar.set_description(self._phase, refresh=False)
        returns, scores = episodes.returns, self._dataset.score(episodes.returns, episodes.success)
        columns = {"score": scores.mean(1), "return_mean": returns.mean(1), "n": np.asarray(n)}
        columns |= {"return_std": returns.std(1), "success_rate": episodes.success.mean(1)}
        columns |= {name: total / count for name, (total, count) in sums.items()}
        for i, seed in enumerate(self._records.seeds):
            row = {"phase": self._phase, "step": step, "seed": seed, "episodes": returns.shape[1]}
            rows.append(row | {name: float(x[i]) for name, x in columns.items()})
        with self._clock.measure("writing"):
            self._records.write()
        self._warn(diagnosis.warnings(self._config, self._dataset, self._records))
        shown = {"score": f"{columns['score'].mean():.1f}", "n": columns["n"].mean()}
        if "beta_mean" in columns:
            shown["β"] = (columns["beta_mean"] * columns["anneal"]).mean()
        self._bar.set_postfix(shown, refresh=False)

    def _warn(self, warnings):
        """Prints each kind of warning once."""
        for warning in warnings:
            kind = warning.partition(":")[0]
            if kind not in self._warned:
                tqdm.write(f"warning: {warning}", file=sys.stderr)
            self._warned.add(kind)

    def finish(self, n_stopped_at, trusted) -> dict:
        """Writes results.json, timing.json and the picture; returns the content of results.json.

        n_stopped_at: [S], the update at which n stopped, negative for never. trusted: bool [S, N].
        """
        from common.run.plot import plot_run

        config, stops = self._config, [int(x) if x >= 0 else None for x in np.asarray(n_stopped_at)]
        fractions = [float(of_seed.mean()) if of_seed.size else 1.0 for of_seed in trusted]
        warnings = diagnosis.warnings(config, self._dataset, self._records, fractions)
        results = {"algorithm": self._script, "task": config.task, "seeds": self._records.seeds}
        results |= self._records.results() | {"n_stopped_at": stops, "warnings": warnings}
        results = as_json(results | {"trusted_fraction": fractions})
        path = lambda name: os.path.join(self.workdir, name)
        plot_run(path("learning_curve.png"), self._records, results, config)
        timing = self._clock.report(self._earlier)
        write_json(path("timing.json"), timing)
        write_json(path("results.json"), results)  # the run is finished from here on
        with contextlib.suppress(OSError):
            shutil.rmtree(self._unfinished)
            os.remove(path("lock"))
        close_run()
        print_table(results)
        shares = ", ".join(f"{name} {x:.0%}" for name, x in timing["shares"].items())
        since = "; since the last start" * bool(self._earlier)
        print(f"{timing['wall_seconds']:.0f} s in all{since}: {shares}")
        print(f"-> {self.workdir}", flush=True)
        self._warned.clear()
        self._warn(warnings)
        return results
