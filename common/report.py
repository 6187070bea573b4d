"""The run folder: settings, scores, results, tensorboard, the picture, and what resuming needs."""

from __future__ import annotations

import contextlib
import csv
import functools
import importlib.metadata
import json
import os
import platform
import re
import shutil
import sys
import time

import jax
import numpy as np
from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event
from tensorboardX.proto.summary_pb2 import Summary
from tqdm import tqdm

from common.checkpoint import Checkpoints, check_format, fill
from common.checks import InputError, Unwritable, is_unfinished, lasting_settings, lock
from common.dataset import Fingerprint
from common.diagnosis import Diverged, first_broken, likely_cause, signatures
from common.evaluation import Finished
from common.plot import plot_run
from common.stopping import Stopped, note_saved

# Names that the authors' code logs under, so that curves line up.
TENSORBOARD_TAGS = {
    "margin": "beta_weight",
    "constrained_fraction": "constrained_nums",
    "n": "n_away",
}
PACKAGES = ("jax", "jaxlib", "flax", "optax", "gymnasium", "mujoco", "minari", "numpy")


def progress(total: int, label: str, unit: str = "update", done: int = 0) -> tqdm:
    """A progress bar that counts gradient updates, or environment steps; `done` of them before."""
    bar = {"total": total, "desc": label, "unit": unit, "initial": done, "unit_scale": True}
    if sys.stderr.isatty():
        return tqdm(**bar, dynamic_ncols=True, mininterval=0.5)
    return tqdm(**bar, file=Lines(), ncols=0, mininterval=30.0, maxinterval=30.0)


class Lines:
    """A log file for a progress bar: every state of it that is written is a line of its own."""

    encoding = "utf-8"
    last = ""

    def write(self, text: str) -> None:
        text = text.strip()
        if text and text != self.last:
            with contextlib.suppress(OSError):  # a bar is no reason to end a run
                print(text, file=sys.stderr)
            self.last = text

    def flush(self) -> None:
        with contextlib.suppress(OSError):
            sys.stderr.flush()


def writes(method):
    """A method of RunLog that raises Unwritable when the run folder cannot be written."""

    @functools.wraps(method)
    def watched(self, *args, **kwargs):
        try:
            return method(self, *args, **kwargs)
        except BrokenPipeError:  # of what is printed
            raise
        except OSError as error:
            raise Unwritable(self.workdir, error) from None

    return watched


class RunLog:
    """Writes one run; results.json marks it as finished. Goes on with an unfinished one.

    started: time.perf_counter() at the start of the program. resume: whether an unfinished run in
    `workdir`, whose settings have been checked, goes on from its last checkpoint; otherwise
    whatever is there is set aside.
    Raises InputError when the folder cannot be written, is another process's, or when the run
    there had other data.
    """

    def __init__(
        self, algorithm, workdir, config, dataset, trusted, data_fingerprint, started, resume
    ):
        self.workdir = workdir
        self.algorithm, self.config, self.dataset = algorithm, config, dataset
        self.seeds = [config.seed + i for i in range(config.num_seeds)]
        self.trusted_fraction = trusted.mean(axis=1) if trusted.size else np.ones(len(trusted))
        self.data_fingerprint, self.returns = data_fingerprint, dataset.returns
        self.started, self.seconds_before = started, 0.0
        self.compile_seconds = 0.0
        self.history = []  # one dict an evaluation: phase, step; score and metrics, float64 [S]
        self.finished = [[] for _ in self.seeds]  # every seed's episodes of online training
        self.failures = np.zeros(len(self.seeds))  # of those; NaN where success is not reported
        self.speeds = []  # updates/s of every seed offline
        self.online_speeds = []  # the same online; environment steps/s, and the environments' share
        self.arrays, self.saved = {}, None  # what to go on from; phase and step last saved
        self.warned = set()
        self.trusted_fingerprint = _fingerprint(trusted)
        try:
            os.makedirs(workdir, exist_ok=True)
            self.lock = lock(workdir)
            saved = self._load() if resume and is_unfinished(workdir) else None
            if not saved:  # and if there was another run, or one that had not come to a checkpoint
                self._set_aside()
                self._write_json("config.json", config.to_dict())
                self.checkpoints = self._checkpoints()
            for name in ("scores.csv", "episodes.csv", "tensorboard", "diverged.txt"):  # or again
                remove(os.path.join(workdir, name))
            self.writers = []  # SummaryWriter's own thread would wait forever on a full disk
            for seed in self.seeds:
                folder = os.path.join(workdir, "tensorboard", f"seed_{seed}")
                os.makedirs(folder)
                self.writers.append(EventsWriter(os.path.join(folder, "events")))
            if saved:
                self._take_over(*saved)
        except OSError as error:
            reason = ": ".join(filter(None, (error.strerror, error.filename))) or error
            raise InputError(
                f"--workdir={workdir} cannot be written ({reason}): choose another folder"
            ) from None
        self._warn()  # of the data: before the run, not after it

    def _checkpoints(self):
        folder = os.path.join(self.workdir, "unfinished")
        return Checkpoints(folder, self.config.checkpoint_minutes)

    def _load(self):
        """What the unfinished run saved last, checked; None without any."""
        self.checkpoints = self._checkpoints()
        if saved := self.checkpoints.load():
            self._check_data(saved[1])
        else:
            self.checkpoints.close()
        return saved

    def _set_aside(self):
        """Renames what is there to <workdir>.1, .2, ..., unless there is nothing yet."""
        number, workdir = 1, os.path.realpath(self.workdir)
        with contextlib.suppress(OSError):  # unless there is something in it
            os.rmdir(os.path.join(workdir, "unfinished"))
        if set(os.listdir(workdir)) <= {"lock", "config.json", "config.json.new", "unfinished.old"}:
            return
        while os.path.exists(f"{workdir}.{number}"):
            number += 1
        held, aside = self.lock, f"{workdir}.{number}"
        os.rename(workdir, aside)
        print(f"the earlier run in {self.workdir} is now {aside}", file=sys.stderr)
        os.makedirs(workdir)
        self.lock = lock(workdir)
        os.remove(os.path.join(aside, "lock"))
        held.close()

    def _check_data(self, records):
        """Raises InputError when it was saved under other circumstances than there are now."""
        mend = "choose another --workdir, or give --noresume to set it aside"
        try:
            check_format(records)
        except ValueError as error:
            raise InputError(
                f"the checkpoint in {self.workdir} is of another version ({error}): {mend}"
            ) from None
        if records["settings"] != lasting_settings(self.config):
            raise InputError(
                f"the checkpoint in {self.workdir} has other settings than its config.json: {mend}"
            )
        for what, now in (
            ("data", self.data_fingerprint),
            ("trusted rows", self.trusted_fingerprint),
        ):
            if records[what] != now:
                raise InputError(
                    f"the unfinished run in {self.workdir} had other {what} ({records[what]}) than "
                    f"there are now ({now}): restore them, choose another --workdir, or give "
                    "--noresume"
                )

    def _take_over(self, arrays, records):
        """What the last checkpoint holds; rows written after it were of no use."""
        for past in records["history"]:
            for key in set(past) - {"phase", "step", "measured"}:
                past[key] = np.array(past[key])
            self._add_interval(past)
        if episodes := [Finished(*episode) for episode in records["episodes"]]:
            self._add_episodes(episodes)
        self.speeds, self.online_speeds = records["speeds"], records["online_speeds"]
        self.compile_seconds, self.seconds_before = records["compile_seconds"], records["seconds"]
        self.arrays, self.saved = arrays, (records["phase"], records["step"])
        note_saved("{} step {}".format(*self.saved))
        print("goes on in {} after {} step {}".format(self.workdir, *self.saved), flush=True)

    def was_in(self, phase) -> bool:
        """Whether this phase is where the unfinished run saved last."""
        return bool(self.saved) and self.saved[0] == phase

    def done(self, phase) -> int:
        """Where in this phase the unfinished run saved last: updates offline, steps online."""
        return self.saved[1] if self.was_in(phase) else 0

    def restore(self, phase, tree):
        """`tree` as the unfinished run last saved it, if that was in this phase."""
        if not (self.arrays and self.was_in(phase)):
            return tree
        arrays, self.arrays = self.arrays, {}
        try:
            return fill(tree, arrays)
        except ValueError as error:
            raise InputError(
                f"the checkpoint in {self.workdir} is of another version or shape ({error}): "
                "choose another --workdir, or give --noresume"
            ) from None

    def is_due(self, step) -> bool:
        """Whether to save now: every `checkpoint_minutes`, and when told to stop."""
        return self.checkpoints.due(is_interval=step % self.config.eval_interval == 0)

    @writes
    def save(self, tree, phase, step, envs=None) -> None:
        """Writes what the run can go on from; raises Stopped afterwards if told to stop.

        tree: arrays, all finite. step: updates offline, environment steps online; an evaluation
        that is due at it comes after. envs: a Collector.
        """
        if envs:
            self._add_episodes(envs.take_finished())
        self.checkpoints.save(
            step,
            tree,
            phase=phase,
            settings=lasting_settings(self.config),
            **{"data": self.data_fingerprint, "trusted rows": self.trusted_fingerprint},
            history=[
                {key: x.tolist() if isinstance(x, np.ndarray) else x for key, x in past.items()}
                for past in self.history
            ],
            episodes=sorted(episode for past in self.finished for episode in past),
            speeds=self.speeds,
            online_speeds=self.online_speeds,
            compile_seconds=self.compile_seconds,
            seconds=self.seconds_before + time.perf_counter() - self.started,
        )
        self.saved = phase, step

    @contextlib.contextmanager
    def evaluating(self, bar, tree, phase, *more):
        """Shows it on the bar; `save`s, however long that takes, if told to stop inside."""
        bar.set_description(f"{phase}, evaluates", refresh=sys.stderr.isatty())
        try:
            yield
        except Stopped as stopped:
            if not stopped.at_once and self.saved != (phase, more[0]):
                self.save(tree, phase, *more)
            raise
        bar.set_description(phase, refresh=False)

    @writes
    def check_finite(self, phase, updates, broke, parts, rewards) -> None:
        """Raises Diverged when a metric or a part of the state is not finite.

        updates, broke, parts: see first_broken. rewards: an array of those learned from. What has
        been written stays, the last checkpoint too.
        """
        broken = first_broken(*jax.device_get((updates, broke, parts)))
        if not broken:
            return
        i, update, names = broken
        n = [past["n"][i] for past in self.history[-2:]]
        cause = likely_cause(
            self.config,
            n_grows=len(n) == 2 and n[0] < n[1],
            saturated=self.dataset.saturated,
            largest_reward=float(np.abs(np.asarray(rewards)).max(initial=0)),
        )
        kept = "no checkpoint was due before"
        if self.saved:
            where = os.path.join(self.workdir, "unfinished")
            phase, step = self.saved
            unit = "update" if phase == "offline" else "environment step"
            kept = f"the last finite checkpoint, of {phase} {unit} {step}, stays in {where}"
        elif self.config.checkpoint_minutes:
            kept += ", with --config.checkpoint_minutes=0 one is before every evaluation"
        others = f" (with {', '.join(names[1:4])})" if names[1:] else ""
        at = f"at update {update} ({phase}) of seed {self.seeds[i]}"
        message = f"diverged: {names[0]}{others} is not finite {at}: {cause}; {kept}"
        with contextlib.suppress(OSError):  # this is to be said even if the disk is full
            with open(os.path.join(self.workdir, "diverged.txt"), "w") as file:
                file.write(message + "\n")
            if self.history:
                known = self._summary([None] * len(self.seeds))
                self._plot(finite(known | {"warnings": [message, *known["warnings"]]}))
        for writer in self.writers:
            writer.close()
        self.lock.close()
        raise Diverged(message)

    @contextlib.contextmanager
    def compiling(self):
        """Times what happens inside as compilation."""
        print("compiles ...", file=sys.stderr, flush=True)
        started = time.perf_counter()
        yield
        self.compile_seconds += time.perf_counter() - started

    @contextlib.contextmanager
    def training(self, updates):
        """Times what happens inside as `updates` offline updates of every seed."""
        started = time.perf_counter()
        yield
        self.speeds.append(updates / (time.perf_counter() - started))

    @writes
    def collected(self, step, steps, seconds, envs):
        """Adds the `steps` that end at environment step `step`: their time, and what has ended."""
        updates = min(steps, max(step - self.config.warmup_steps, 0))
        is_half_warm_up = updates < steps and step < self.config.online_steps
        if steps and not is_half_warm_up:
            rates = (updates / seconds, steps / seconds * len(self.seeds), envs.seconds / seconds)
            self.online_speeds.append(rates)
        envs.seconds = 0.0
        self._add_episodes(envs.take_finished())

    def _add_episodes(self, finished):
        rows = []
        for episode in finished:
            past = self.finished[episode.slot]
            past.append(episode)
            self.failures[episode.slot] += 1 - episode.success
            score = self.dataset.score(episode.episode_return)
            values = {
                "episode_return": episode.episode_return,
                "online_normalized_episode_score": score if self.dataset.reference else np.nan,
                "episode_length": episode.length,
                "is_success": episode.success,
                "train_regret": self.failures[episode.slot] / len(past),
            }
            self._add_scalars(episode.slot, values, episode.step)
            seed, won = self.seeds[episode.slot], blank(episode.success)
            rows.append([episode.step, seed, score, episode.episode_return, episode.length, won])
        self._add_rows(
            "episodes.csv", ["step", "seed", "score", "return", "length", "success"], rows
        )

    @writes
    def interval(self, phase, step, episodes, info):
        """Adds an evaluation, and the mean metrics of the interval before it.

        step: updates offline, environment steps online. info: every metric, [S]; None where no
        update in the interval gave it.
        """
        scores = self.dataset.score(episodes.returns)
        metrics = {key: info[key] for key in sorted(info)}
        missing = np.full(len(self.seeds), np.nan)
        past = {
            "phase": phase,
            "step": step,
            "score": scores.mean(axis=1),
            "return_mean": episodes.returns.mean(axis=1),
            "return_std": episodes.returns.std(axis=1),
            "episodes": np.full(len(self.seeds), episodes.returns.shape[1]),
            "success_rate": episodes.success.mean(axis=1),
            "measured": [key for key, x in metrics.items() if x is not None],
        }
        for key, x in metrics.items():
            past[key] = missing if x is None else np.asarray(x, np.float64)
        self._add_interval(past)
        self._warn()

    def _add_interval(self, past):
        self.history.append(past)
        phase, step, measured = past["phase"], past["step"], past["measured"]
        columns = {key: x for key, x in past.items() if isinstance(x, np.ndarray)}
        rows = [
            [phase, step, seed]
            + [
                repr(x[i].item()) if key in measured else blank(x[i].item())
                for key, x in columns.items()
            ]
            for i, seed in enumerate(self.seeds)
        ]
        self._add_rows("scores.csv", ["phase", "step", "seed", *columns], rows)
        regrets = self._eval_regrets() if phase == "online" else np.full(len(self.seeds), np.nan)
        for i, writer in enumerate(self.writers):
            name = "normalized_eval_score" if self.dataset.reference else "eval_return"
            values = {f"{phase}_{name}": past["score"][i]}
            rate = "success_rate" if phase == "online" else "offline_success_rate"
            values |= {rate: past["success_rate"][i], "eval_regret": regrets[i]}
            for key in measured:
                scale = self.config.batch_size if key == "constrained_fraction" else 1
                prefix = "online_" if phase == "online" else "offline_" if key == "q1" else ""
                values[prefix + TENSORBOARD_TAGS.get(key, key)] = past[key][i] * scale
            self._add_scalars(i, values, step)
            writer.flush()

    def headline(self) -> dict:
        """What the progress bar shows: seed means of the last interval."""
        last = self.history[-1]
        shown = {"score": f"{last['score'].mean():.1f}"}
        if "beta_mean" in last["measured"]:
            shown["beta"] = f"{(last['beta_mean'] * last['anneal']).mean():.3f}"
        return shown | {"n": f"{last['n'].mean():.2f}"}

    @writes
    def finish(self, n_stopped_at) -> dict:
        """Writes results.json and the picture, prints the table; returns results.json's content."""
        n_stopped_at = [int(step) if step >= 0 else None for step in np.asarray(n_stopped_at)]
        offline = [past for past in self.history if past["phase"] == "offline"]
        online = [past for past in self.history if past["phase"] == "online"]
        learned = [past for past in online if past["step"] > self.config.warmup_steps]
        scores = np.stack([past["score"] for past in learned or offline])  # [intervals, S]
        last = self.history[-1]
        beta = [
            past["beta_mean"] * past["anneal"]
            for past in self.history
            if "beta_mean" in past["measured"]
        ]
        results = self._summary(n_stopped_at) | {
            "before_online": online[0]["score"].tolist() if online else None,
            "last": scores[-1].tolist(),
            "mean_last_10": scores[-10:].mean(axis=0).tolist(),
            "best": scores.max(axis=0).tolist(),
            "success_rate": last["success_rate"].tolist(),
            "eval_regret": self._eval_regrets().tolist(),
            "train_regret": [
                float(failed / len(past)) if past else np.nan
                for failed, past in zip(self.failures, self.finished, strict=True)
            ],
            "n": last["n"].tolist(),
            "beta_mean": beta[-1].tolist() if beta else [np.nan] * len(self.seeds),
            "trusted_fraction": self.trusted_fraction.tolist(),
            "device": f"{jax.devices()[0].platform}: {jax.devices()[0].device_kind}",
            "versions": {"python": platform.python_version()}
            | {package: importlib.metadata.version(package) for package in PACKAGES},
            "data": self._data(),
        }
        results = finite(results)
        for writer in self.writers:
            writer.close()
        self._plot(results)
        timing = self._timing(bool(online))
        self._write_json("timing.json", timing)
        self._write_json("results.json", results)  # from here on the run is finished
        with contextlib.suppress(OSError):  # the results are there
            self.checkpoints.remove()
            os.remove(self.lock.name)
        self.lock.close()
        self._print_table(results, timing)
        return results

    def _summary(self, n_stopped_at):
        """Results that the picture shows."""
        behaviour = self.dataset.score(self.returns)
        return {
            "algorithm": self.algorithm,
            "task": self.config.task,
            "seeds": self.seeds,
            "normalized": self.dataset.reference is not None,
            "behaviour": [behaviour.mean() if len(behaviour) else np.nan] * len(self.seeds),
            "n_stopped_at": n_stopped_at,
            "warnings": self.warnings(),
        }

    def _plot(self, results):
        picture = os.path.join(self.workdir, "learning_curve.png")
        plot_run(picture, self.history, self.finished, self.dataset.score, results, self.config)

    def _timing(self, online):
        measured = online and self.online_speeds  # not of a run gone on with at its very end
        rates = np.median(self.online_speeds, axis=0).tolist() if measured else [None] * 3
        return {
            "updates_per_second": float(np.median(self.speeds)) if self.speeds else rates[0],
            "online_updates_per_second": rates[0],
            "env_steps_per_second": rates[1],
            "env_share": rates[2],
            "compile_seconds": self.compile_seconds,
            "wall_seconds": self.seconds_before + time.perf_counter() - self.started,
        }

    def _data(self):
        return {
            "name": self.config.dataset or self.config.dataset_path,
            "source": os.path.basename(self.dataset.source),
            "env": self.dataset.env.id,
            "physics": self.dataset.physics,
            "transitions": len(self.dataset.rewards),
            "episodes": len(self.dataset.returns),
            "fingerprint": self.data_fingerprint,
        }

    def warnings(self) -> list[str]:
        """Known signs of a run not to be trusted, in words."""
        found = []
        if self.trusted_fraction.min() < 0.01:
            found.append(
                f"thin sub-dataset: only {self.trusted_fraction.min():.2%} of the data is trusted, "
                "so the coefficient sees few states and the score may stay near zero for want of "
                "coverage; lower return_threshold or select by iql"
            )
        selected = self.config.selection != "none" and self.config.coefficient == "adaptive"
        if selected and self.config.offline_steps and self.trusted_fraction.min() == 1:
            found.append(
                f"selection={self.config.selection} trusts every transition: it selects nothing"
            )
        online, capacity = self.config.online_steps, self.config.buffer_capacity
        if online and capacity and capacity < self.config.batch_size:
            found.append(
                f"small buffer: buffer_capacity={capacity} is less than a batch, so each stored "
                "row is drawn again and again; raise it"
            )
        if self.dataset.scattered > 0.5:
            found.append(
                f"scattered rows: {self.dataset.scattered:.0%} of the rows do not go on in the "
                "next one, so that returns, and what is trusted by them, are of pieces of "
                "episodes; keep the rows in the order they were recorded in, and next_observations "
                "as exact as observations"
            )
        untrained = not (self.config.offline_steps or self.config.offline_checkpoint)
        if untrained and self.config.coefficient == "adaptive":
            found.append(
                "untrained coefficient: without offline training β_φ knows nothing; give "
                "coefficient=fixed, with coefficient_init=0 for the plain algorithm"
            )
        means = [past["return_mean"] for past in self.history]
        returns = np.concatenate([[0.0], self.returns, *means])
        floor, scale = self.dataset.reference or (returns.min(), returns.max())
        found += signatures(
            self.history, floor, scale, self.trusted_fraction, self.config, self.seeds
        )
        return found

    def _eval_regrets(self):
        """Mean failure rate of the evaluations online, [S]; NaN where none tells."""
        rates = [past["success_rate"] for past in self.history if past["phase"] == "online"]
        return 1 - np.mean(rates, axis=0) if rates else np.full(len(self.seeds), np.nan)

    def _add_rows(self, name, header, rows):
        with open(os.path.join(self.workdir, name), "a", newline="") as file:
            table = csv.writer(file)
            if file.tell() == 0:
                table.writerow(header)
            table.writerows(rows)

    def _add_scalars(self, i, values, step):
        """To tensorboard, for the i-th seed, what is a number."""
        numbers = {tag: float(value) for tag, value in values.items() if np.isfinite(value)}
        summary = Summary(value=[Summary.Value(tag=t, simple_value=x) for t, x in numbers.items()])
        self.writers[i].write_event(Event(wall_time=time.time(), step=step, summary=summary))

    def _print_table(self, results, timing):
        unit = "normalised score" if results["normalized"] else "return"
        columns = ["behaviour", "before_online", "last", "mean_last_10", "best", "n", "beta_mean"]
        columns = [name for name in columns if results[name] and results[name][0] is not None]
        lines = [f"{unit:>16}  " + "".join(f"{name:>14}" for name in columns)]
        rows = [
            (f"seed {seed}", [results[c][i] for c in columns]) for i, seed in enumerate(self.seeds)
        ]
        if len(rows) > 1:
            rows.append(("mean", np.mean(np.array([row for _, row in rows], float), axis=0)))
        lines += [
            f"{name:>16}  " + "".join(f"{value:14.3f}" for value in np.array(values, float))
            for name, values in rows
        ]
        print("\n".join(lines))
        speeds = []
        if self.speeds:
            speeds.append(f"{timing['updates_per_second']:.0f} updates/s")
        if timing["env_steps_per_second"]:
            speeds.append(
                f"{timing['env_steps_per_second']:.0f} environment steps/s and "
                f"{timing['online_updates_per_second']:.0f} updates/s online"
            )
        print(f"{', '.join(speeds)}, {timing['wall_seconds']:.0f} s in all -> {self.workdir}")
        self._warn(again=True)

    def _warn(self, again=False):
        """Prints the warnings, those that have been printed before too if asked to."""
        for warning in self.warnings():
            kind = re.split("[:(]", warning)[0]
            if again or kind not in self.warned:
                tqdm.write(f"warning: {warning}", file=sys.stderr)  # above the progress bar
                self.warned.add(kind)

    def _write_json(self, name, content):
        path = os.path.join(self.workdir, name)
        with open(path + ".new", "w") as file:
            json.dump(finite(content), file, indent=2, allow_nan=False)
            file.write("\n")
            os.fsync(file.fileno())
        os.replace(path + ".new", path)  # whole or not at all


def blank(value):
    """The number, or nothing in place of NaN."""
    return "" if np.isnan(value) else repr(value)


def finite(content):
    """The content with null for numbers that JSON cannot hold."""
    if isinstance(content, dict):
        return {key: finite(value) for key, value in content.items()}
    if isinstance(content, (list, tuple)):
        return [finite(value) for value in content]
    return None if isinstance(content, float) and not np.isfinite(content) else content


def remove(path: str) -> None:
    """A file or folder that may be there."""
    if os.path.isdir(path):
        shutil.rmtree(path)
    elif os.path.exists(path):
        os.remove(path)


def _fingerprint(trusted) -> str:
    fingerprint = Fingerprint()
    fingerprint.add(np.packbits(trusted))
    return fingerprint.text()
