"""What a run measures: its tables, tensorboard, and the content of results.json."""

import csv
import importlib.metadata
import os
import platform
import shutil

import jax
import numpy as np
from tensorboardX import SummaryWriter

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
        # Unlimited queues: when a disk is full, nothing empties them and a limit would block.
        self.writers = [SummaryWriter(f"{folder}/seed_{s}", max_queue=0) for s in self.seeds]

    def of(self, seed, *phases) -> list[dict]:
        """The evaluations of one seed in these phases."""
        return [e for e in self.evaluations if e["seed"] == seed and e["phase"] in phases]

    def write(self) -> None:
        """Rewrites both tables and adds what is new to tensorboard. Raises OSError."""
        metrics = sorted({key for row in self.evaluations for key in row} - set(EVALUATION))
        self._write_csv("scores.csv", EVALUATION + metrics, self.evaluations)
        self._write_csv("episodes.csv", EPISODE, self.episodes)
        for row in self.evaluations[self.shown[0] :]:
            self._add(row, self._tags(row))
        for row in self.episodes[self.shown[1] :]:
            tags = {f"episode_{key}": row[key] for key in ("return", "length")}
            if self.dataset.reference:
                tags["online_normalized_episode_score"] = row["score"]
            self._add(row, tags | {"is_success": row["success"]})
        self.shown = [len(self.evaluations), len(self.episodes)]
        for writer in self.writers:
            writer.flush()

    def _write_csv(self, name, columns, rows):
        path = os.path.join(self.workdir, name)
        with open(f"{path}.tmp", "w", newline="") as file:
            table = csv.DictWriter(file, columns)
            table.writeheader()
            table.writerows({key: "" if x != x else x for key, x in row.items()} for row in rows)
        os.replace(f"{path}.tmp", path)

    def _add(self, row, tags):
        writer = self.writers[self.seeds.index(row["seed"])]
        for tag, value in tags.items():
            if np.isfinite(value):
                writer.add_scalar(tag, value, row["step"])

    def _tags(self, row):
        phase, online = row["phase"], row["phase"] == "online"
        score = "normalized_eval_score" if self.dataset.reference else "eval_return"
        success = "success_rate" if online else "offline_success_rate"
        tags = {f"{phase}_{score}": row["score"], success: row["success_rate"]}
        for key in set(row) - set(EVALUATION):
            prefix = "online_" if online else "offline_" if key == "q1" else ""
            scale = self.config.batch_size if key == "constrained_fraction" else 1
            tags[prefix + TAGS.get(key, key)] = row[key] * scale
        return tags | (self._failures(row["seed"], row["step"]) if online else {})

    def _failures(self, seed, step=np.inf):
        """Failure rates of a seed online up to a step: of evaluations, and of training episodes."""
        evaluated = [e["success_rate"] for e in self.of(seed, "online") if e["step"] <= step]
        trained = [e["success"] for e in self.episodes if e["seed"] == seed and e["step"] <= step]
        failed = lambda success: 1 - float(np.mean(success or np.nan))
        return {"eval_regret": failed(evaluated), "train_regret": failed(trained)}

    def results(self) -> dict:
        """The measured part of results.json; lists have one entry a seed."""
        data, seeds = self.dataset, [self._results(seed) for seed in self.seeds]
        behaviour = float(np.mean(data.score(data.returns))) if len(data.returns) else np.nan
        columns = {key: [seed[key] for seed in seeds] for key in seeds[0]}
        return columns | {
            "normalized": data.reference is not None,
            "behaviour": [behaviour] * len(seeds),
            "before_online": columns["before_online"] if self.config.online_steps else None,
            "device": f"{jax.devices()[0].platform}: {jax.devices()[0].device_kind}",
            "versions": {"python": platform.python_version()}
            | {package: importlib.metadata.version(package) for package in PACKAGES},
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

    def _results(self, seed):
        rows, online = self.of(seed, "offline", "online"), self.of(seed, "online")
        learned = [row for row in online if row["step"] > self.config.warmup_steps] or rows
        scores = [row["score"] for row in learned]
        beta = [row["beta_mean"] * row["anneal"] for row in rows if "beta_mean" in row]
        return {
            "before_online": online[0]["score"] if online else None,
            "last": scores[-1],
            "mean_last_10": float(np.mean(scores[-10:])),
            "best": max(scores),
            "success_rate": rows[-1]["success_rate"],
            "n": rows[-1]["n"],
            "beta_mean": beta[-1] if beta else np.nan,
            **self._failures(seed),
        }

    def close(self) -> None:
        """Ends the writers' threads."""
        for writer in self.writers:
            writer.close()


def print_table(results: dict) -> None:
    """The scores of every seed, and their mean."""
    names = [name for name in SHOWN if results[name] and results[name][0] is not None]
    table = np.array([results[name] for name in names], float).T
    unit = "normalised score" if results["normalized"] else "return"
    print(f"{unit:>16}  " + "".join(f"{name:>14}" for name in names))
    labels = [f"seed {seed}" for seed in results["seeds"]]
    for label, row in zip([*labels, "mean"], [*table, table.mean(axis=0)], strict=True):
        print(f"{label:>16}  " + "".join(f"{x:14.3f}" for x in row))
