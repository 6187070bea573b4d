"""What a run measures: its tables, tensorboard, and the content of results.json."""

import csv
import importlib.metadata
import io
import os
import shutil

import jax
import numpy as np
from tensorboardX import SummaryWriter

from common.run.errors import explained
from common.run.workdir import write_file

EVALUATION = "phase step seed score return_mean return_std episodes success_rate".split()
EPISODE = "step seed score return length success".split()
# Names that the authors' code logs under, so that curves line up.
TAGS = {"margin": "beta_weight", "constrained_fraction": "constrained_nums", "n": "n_away"}
PACKAGES = ("jax", "jaxlib", "flax", "optax", "gymnasium", "mujoco", "minari", "numpy")
SHOWN = ("behaviour", "before_online", "last", "mean_last_10", "best", "n", "beta_mean")


class Records:
    """Keeps scores.csv, episodes.csv and tensorboard up to date with two lists of rows.

    evaluations: dictionaries of EVALUATION and of the metrics that were measured. episodes:
    dictionaries of EPISODE. A success is NaN where the environment reports none.
    """

    def __init__(self, workdir, config, dataset):
        self.workdir, self.config, self.dataset = workdir, config, dataset
        self.seeds = [config.seed + i for i in range(config.num_seeds)]
        self.evaluations, self.episodes, self.shown = [], [], [0, 0]
        folder = os.path.join(workdir, "tensorboard")
        shutil.rmtree(folder, ignore_errors=True)
        self.wandb = None
        if project := config.get("wandb"):
            fix = "pip install wandb tensorboard, and wandb login"
            with explained(f"--config.wandb={project} does not start", fix):
                import wandb

                settings = {"config": config.to_dict(), "sync_tensorboard": True}
                self.wandb = wandb.init(project=project, dir=workdir, **settings)
        # Unlimited queues: when a disk is full, nothing empties them and a limit would block.
        self.writers = {s: SummaryWriter(f"{folder}/seed_{s}", max_queue=0) for s in self.seeds}

    def of(self, seed, *phases) -> list[dict]:
        """The evaluations of one seed in these phases, by default in all."""
        rows = [row for row in self.evaluations if row["seed"] == seed]
        return [row for row in rows if row["phase"] in phases or not phases]

    def column(self, name, *phases) -> np.ndarray:
        """One measure at every evaluation in these phases, by default in all: [S, T]."""
        measure = lambda seed: [row.get(name, np.nan) for row in self.of(seed, *phases)]
        return np.array([measure(seed) for seed in self.seeds])

    def write(self) -> None:
        """Rewrites both tables and adds what is new to tensorboard. Raises OSError."""
        metrics = sorted({key for row in self.evaluations for key in row} - set(EVALUATION))
        self._write_csv("scores.csv", EVALUATION + metrics, self.evaluations)
        self._write_csv("episodes.csv", EPISODE, self.episodes)
        new = self.evaluations[self.shown[0] :] + self.episodes[self.shown[1] :]
        self.shown = [len(self.evaluations), len(self.episodes)]
        for row in new:
            for tag, value in self._tags(row).items():
                if np.isfinite(value):
                    self.writers[row["seed"]].add_scalar(tag, value, row["step"])
        for writer in self.writers.values():
            writer.flush()

    def _write_csv(self, name, columns, rows):
        # A success that is NaN was not reported; a score that is NaN is written as it is.
        missing = lambda key, x: x != x and key.startswith("success")
        table = csv.DictWriter(text := io.StringIO(), columns)
        table.writeheader()
        table.writerows({k: x for k, x in row.items() if not missing(k, x)} for row in rows)
        write_file(os.path.join(self.workdir, name), text.getvalue().encode())

    def _tags(self, row):
        """An evaluation or an episode under the names that the authors' code logs."""
        phase, kind = row.get("phase", "online"), "eval" if "phase" in row else "episode"
        score = f"normalized_{kind}_score" if self.dataset.unit != "return" else f"{kind}_return"
        tags, online = {f"{phase}_{score}": row["score"]}, phase == "online"
        if kind == "episode":
            tags |= {f"episode_{key}": row[key] for key in ("return", "length")}
            return tags | {"is_success": row["success"]}
        tags["success_rate" if online else "offline_success_rate"] = row["success_rate"]
        for key in set(row) - set(EVALUATION):
            prefix = "online_" if online else "offline_" if key == "q1" else ""
            scale = self.config.batch_size if key == "constrained_fraction" else 1
            tags[prefix + TAGS.get(key, key)] = row[key] * scale
        return tags | (self._regrets(row["seed"], row["step"]) if online else {})

    def _regrets(self, seed, step=np.inf):
        """Mean share of failures online up to a step, in evaluations and training episodes."""
        played = [x["success_rate"] for x in self.of(seed, "online") if x["step"] <= step]
        trained = [x["success"] for x in self.episodes if x["seed"] == seed and x["step"] <= step]
        regret = lambda successes: 1 - float(np.mean(successes or np.nan))
        return {"eval_regret": regret(played), "train_regret": regret(trained)}

    def results(self) -> dict:
        """The measured part of results.json; scores and the like have one entry per seed."""
        data, online = self.dataset, self.of(self.seeds[0], "online")
        learned = sum(row["step"] > self.config.warmup_steps for row in online)
        scores = self.column("score")[:, -learned:]  # all of them if nothing was learned online
        columns = {
            "behaviour": np.full(len(self.seeds), data.behaviour),
            "last": scores[:, -1],
            "mean_last_10": scores[:, -10:].mean(axis=1),
            "best": scores.max(axis=1),
            "success_rate": self.column("success_rate")[:, -1],
            "n": self.column("n")[:, -1],
            "beta_mean": (self.column("beta_mean") * self.column("anneal"))[:, -1],
        }
        if online:
            columns["before_online"] = self.column("score", "online")[:, 0]
        columns = {name: column.tolist() for name, column in columns.items()}
        regrets = [self._regrets(seed) for seed in self.seeds]
        columns |= {name: [of_seed[name] for of_seed in regrets] for name in regrets[0]}
        if self.wandb:
            self.wandb.summary.update(columns)
        return columns | {
            "unit": data.unit,
            "normalised": data.unit != "return",
            "device": f"{jax.devices()[0].platform}: {jax.devices()[0].device_kind}",
            "versions": {name: importlib.metadata.version(name) for name in PACKAGES},
            "data": {
                "name": self.config.dataset or self.config.dataset_path,
                "source": os.path.basename(data.source),
                "env": data.env.id,
                "physics": data.physics,
                "transitions": len(data.rewards),
                "episodes": len(data.returns),
                "fingerprint": data.fingerprint,
            },
        }

    def close(self) -> None:
        """Ends the writers' threads, and the run at Weights & Biases."""
        for writer in self.writers.values():
            writer.close()
        if self.wandb:
            self.wandb.finish()


def print_table(results: dict) -> None:
    """The scores of every seed, their mean, and which of them end below the data's own."""
    is_known = lambda name: name != "behaviour" or None not in results[name]
    names = [name for name in SHOWN if name in results and is_known(name)]
    table = np.array([results[name] for name in names], float).T
    print(f"{results['unit']:>17} " + "".join(f"{name:>14}" for name in names))
    labels = [f"seed {seed}" for seed in results["seeds"]] + ["mean"]
    for label, row in zip(labels, [*table, table.mean(axis=0)], strict=True):
        print(f"{label:>16}  " + "".join(f"{x:14.3f}" for x in row))
    last, own = (np.array(results[name], float) for name in ("last", "behaviour"))
    for label, score, data in zip(labels, last, own, strict=False):  # the seeds, not their mean
        if score < data:
            print(f"{label}'s last score, {score:.3f}, is below the data's own, {data:.3f}")
