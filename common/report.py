"""The run folder: config.json, scores.csv, results.json, tensorboard events, and the picture."""

from __future__ import annotations

import contextlib
import csv
import importlib.metadata
import json
import os
import platform
import sys
import time

import jax
import numpy as np
import tensorboardX
from tqdm import tqdm

from common.plot import plot_run

# Names that the authors' code logs under, so that curves line up.
TENSORBOARD_TAGS = {
    "margin": "beta_weight",
    "constrained_fraction": "constrained_nums",
    "q1": "offline_q1",
    "n": "n_away",
}
PACKAGES = ("jax", "jaxlib", "flax", "optax", "gymnasium", "mujoco", "minari", "numpy")


def progress(total: int, label: str) -> tqdm:
    """A progress bar that counts gradient updates."""
    return tqdm(
        total=total, desc=label, unit="update", unit_scale=True, dynamic_ncols=True, mininterval=0.5
    )


class RunLog:
    """Writes one run; results.json marks it as finished."""

    def __init__(self, algorithm, workdir, config, dataset, trusted, data_fingerprint):
        self.workdir = workdir
        self.algorithm, self.config, self.dataset = algorithm, config, dataset
        self.seeds = [config.seed + i for i in range(config.num_seeds)]
        self.trusted_fraction = trusted.mean(axis=1)
        self.data_fingerprint = data_fingerprint
        self.compile_seconds = 0.0
        self.metrics = []
        self.history = []  # one dict an interval: step, updates_per_second; score and metrics [S]
        set_aside(self.workdir)
        os.makedirs(self.workdir, exist_ok=True)
        self._write_json("config.json", config.to_dict())
        self.writers = [
            tensorboardX.SummaryWriter(os.path.join(self.workdir, "tensorboard", f"seed_{seed}"))
            for seed in self.seeds
        ]
        self._print_warnings()  # of the data: before the run, not after it

    @contextlib.contextmanager
    def compiling(self):
        """Times what happens inside as compilation."""
        started = time.perf_counter()
        yield
        self.compile_seconds = time.perf_counter() - started

    @contextlib.contextmanager
    def training(self, updates):
        """Times what happens inside as `updates` updates of every seed."""
        started = time.perf_counter()
        yield
        self.updates_per_second = updates / (time.perf_counter() - started)

    def interval(self, phase, step, episodes, info):
        """Adds an evaluation after update `step` and the mean metrics of the interval before it."""
        self.metrics = sorted(info)
        scores = self.dataset.score(episodes.returns)
        row = {
            "score": scores.mean(axis=1),
            "return_mean": episodes.returns.mean(axis=1),
            "return_std": episodes.returns.std(axis=1),
            "episodes": np.full(len(self.seeds), episodes.returns.shape[1]),
            "success_rate": episodes.success.mean(axis=1),
            **{key: np.asarray(info[key]) for key in self.metrics},
        }
        self.history.append(
            {"phase": phase, "step": step, "updates_per_second": self.updates_per_second, **row}
        )
        with open(os.path.join(self.workdir, "scores.csv"), "a", newline="") as file:
            table = csv.writer(file)
            if len(self.history) == 1:
                table.writerow(["phase", "step", "seed", *row])
            for i, seed in enumerate(self.seeds):
                values = [
                    repr(x[i].item()) if np.isfinite(x[i]) or k in info else ""
                    for k, x in row.items()
                ]
                table.writerow([phase, step, seed, *values])
        for i, writer in enumerate(self.writers):
            name = "normalized_eval_score" if self.dataset.reference else "eval_return"
            writer.add_scalar(f"{phase}_{name}", scores[i].mean(), step)
            if np.isfinite(row["success_rate"][i]):
                writer.add_scalar("success_rate", row["success_rate"][i], step)
                regret = np.mean([1 - past["success_rate"][i] for past in self.history])
                writer.add_scalar("eval_regret", regret, step)
            for key in info:
                value = row[key][i] * (
                    self.config.batch_size if key == "constrained_fraction" else 1
                )
                writer.add_scalar(TENSORBOARD_TAGS.get(key, key), value, step)
            writer.flush()

    def headline(self) -> dict:
        """What the progress bar shows: seed means of the last interval."""
        last = self.history[-1]
        return {
            "score": f"{last['score'].mean():.1f}",
            "beta": f"{last['beta_mean'].mean():.3f}",
            "n": f"{last['n'].mean():.2f}",
        }

    def finish(self, n_stopped_at, wall_seconds) -> dict:
        """Writes results.json and the picture, prints the table; returns results.json's content."""
        scores = np.stack([past["score"] for past in self.history])  # [intervals, S]
        behaviour = self.dataset.score(self.dataset.returns).mean()
        last = self.history[-1]
        speeds = [past["updates_per_second"] for past in self.history]
        results = {
            "algorithm": self.algorithm,
            "task": self.config.task,
            "seeds": self.seeds,
            "normalized": self.dataset.reference is not None,
            "behaviour": [float(behaviour)] * len(self.seeds),
            "last": scores[-1].tolist(),
            "mean_last_10": scores[-10:].mean(axis=0).tolist(),
            "best": scores.max(axis=0).tolist(),
            "n": last["n"].tolist(),
            "n_stopped_at": [int(step) if step >= 0 else None for step in np.asarray(n_stopped_at)],
            "beta_mean": last["beta_mean"].tolist(),
            "trusted_fraction": self.trusted_fraction.tolist(),
            "updates_per_second": float(np.median(speeds)),
            "compile_seconds": self.compile_seconds,
            "wall_seconds": wall_seconds,
            "warnings": self.warnings(),
            "device": f"{jax.devices()[0].platform}: {jax.devices()[0].device_kind}",
            "versions": {"python": platform.python_version()}
            | {package: importlib.metadata.version(package) for package in PACKAGES},
            "data": {
                "name": self.config.dataset or self.config.dataset_path,
                "source": os.path.basename(self.dataset.source),
                "env": self.dataset.env.id,
                "transitions": len(self.dataset.rewards),
                "episodes": len(self.dataset.returns),
                "fingerprint": self.data_fingerprint,
            },
        }
        for writer in self.writers:
            writer.close()
        plot_run(
            os.path.join(self.workdir, "learning_curve.png"), self.history, results, self.config
        )
        self._write_json("results.json", results)
        self._print_table(results)
        return results

    def warnings(self) -> list[str]:
        """Known signs of a run not to be trusted, in words."""
        found = []
        if self.trusted_fraction.min() < 0.01:
            found.append(
                f"thin sub-dataset: only {self.trusted_fraction.min():.2%} of the data is trusted, "
                "so the coefficient sees few states; lower return_threshold or select by iql"
            )
        selected = self.config.selection != "none" and self.config.coefficient == "adaptive"
        if selected and self.trusted_fraction.min() == 1:
            found.append(
                f"selection={self.config.selection} trusts every transition: it selects nothing"
            )
        last = self.history[-1] if self.history else {}
        broken = [key for key in self.metrics if not np.isfinite(last[key]).all()]
        if broken:
            found.append(f"diverged: {', '.join(broken)} not finite in the last interval")
        return found

    def _print_table(self, results):
        unit = "normalised score" if results["normalized"] else "return"
        columns = ("behaviour", "last", "mean_last_10", "best", "n", "beta_mean")
        lines = [f"{unit:>16}  " + "".join(f"{name:>14}" for name in columns)]
        rows = [
            (f"seed {seed}", [results[c][i] for c in columns]) for i, seed in enumerate(self.seeds)
        ]
        if len(rows) > 1:
            rows.append(("mean", [float(np.mean(results[c])) for c in columns]))
        lines += [
            f"{name:>16}  " + "".join(f"{value:14.3f}" for value in values) for name, values in rows
        ]
        print("\n".join(lines))
        print(
            f"{results['updates_per_second']:.0f} updates/s, {results['wall_seconds']:.0f} s in all"
            f" -> {self.workdir}"
        )
        self._print_warnings()

    def _print_warnings(self):
        for warning in self.warnings():
            print(f"warning: {warning}", file=sys.stderr)

    def _write_json(self, name, content):
        with open(os.path.join(self.workdir, name), "w") as file:
            json.dump(finite(content), file, indent=2, allow_nan=False)
            file.write("\n")


def finite(content):
    """The content with null for numbers that JSON cannot hold."""
    if isinstance(content, dict):
        return {key: finite(value) for key, value in content.items()}
    if isinstance(content, (list, tuple)):
        return [finite(value) for value in content]
    return None if isinstance(content, float) and not np.isfinite(content) else content


def set_aside(workdir: str) -> None:
    """Renames an earlier run's folder to <workdir>.1, .2, ...: nothing already written is lost."""
    if not os.path.isdir(workdir) or not os.listdir(workdir):
        return
    number = 1
    while os.path.exists(f"{workdir.rstrip('/')}.{number}"):
        number += 1
    aside = f"{workdir.rstrip('/')}.{number}"
    os.rename(workdir, aside)
    print(f"the earlier run in {workdir} is now {aside}", file=sys.stderr)
