"""Draws the learning curves of several runs over one another, and prints one table.

    python experiments/compare.py runs/ssar_td3bc/demo/0 runs/ssar_td3bc/demo-coefficient=fixed/0

Runs that differ only in their seeds share a curve: the mean over the seeds and its 95 % interval, a
percentile bootstrap over seeds as in rliable. One seed is a thin line without an interval. The
legend names the settings that differ, or else the folders. Unfinished runs are dashed, and a dotted
line marks where online training begins. None of this needs JAX.
"""

import argparse
import json
import os
from pathlib import Path
from typing import NamedTuple

import numpy as np

os.environ["MPLBACKEND"] = "agg"  # a notebook's backend may not be installed here
from matplotlib.figure import Figure  # noqa: E402

COLUMNS = """label seeds last last_low last_high mean_last_10 mean_last_10_low mean_last_10_high
    best best_low best_high n behaviour""".split()
# Settings in which the seeds of one curve may differ.
FREE = set("""seed num_seeds offline_checkpoint dataset_path cache_dir checkpoint_minutes
    updates_per_call block_size wandb eval_episodes""".split())  # fmt: skip


class Run(NamedTuple):
    """What the files in a run folder say."""

    folder: Path
    config: dict
    data: str  # the data set and environment, without which scores cannot be compared
    results: dict  # empty until the run has finished
    seeds: dict  # {seed: its rows of scores.csv, an array with the names of the columns}


def read_run(folder: Path) -> Run:
    """Raises SystemExit with one sentence if there is no run in the folder."""
    path, layout = folder / "results.json", {"delimiter": ",", "names": True, "ndmin": 1}
    try:
        config = dict(json.loads((folder / "config.json").read_text()))
        data = [config["dataset"] or config["dataset_path"], config["env"], config["physics"]]
        data += [config.get("max_episode_steps"), config.get("reference")]
        data = ", ".join(str(x) for x in data if x)
        results = dict(json.loads(path.read_text())) if path.exists() else {}
        rows = np.genfromtxt(folder / "scores.csv", dtype=None, encoding="utf-8", **layout)
        seeds = {int(seed): rows[rows["seed"] == seed] for seed in np.unique(rows["seed"])}
        if not seeds:
            raise ValueError("scores.csv has no rows")
    except (OSError, ValueError, TypeError, KeyError) as error:
        reason = " ".join(str(error).split()).rstrip(".")
        near = f", such as {folder}/0," * (folder / "0").is_dir()
        fix = f"name a run folder{near} or wait for its first evaluation"
        raise SystemExit(f"compare: {folder} has no scores ({reason}): {fix}") from None
    return Run(folder, config, data, results, seeds)


def pool(runs: list[Run]) -> list[Run]:
    """One run with all seeds for those of the same settings. Raises SystemExit."""
    pooled = {}
    for run in runs:
        marks = {x.results["data"]["fingerprint"] for x in (run, runs[0]) if "data" in x.results}
        if run.data != runs[0].data or len(marks) > 1:
            data = f"{runs[0].folder} has data {runs[0].data}, but {run.folder} {run.data}"
            raise SystemExit(f"compare: {data}: compare runs of one task at a time")
        settings = sorted(x for x in run.config.items() if x[0] not in FREE and x[1] is not None)
        same = json.dumps([run.results.get("algorithm"), settings])
        first = pooled.setdefault(same, run._replace(seeds={}))
        if twice := first.seeds.keys() & run.seeds.keys():
            both = f"{first.folder} and {run.folder} both hold seed {min(twice)}"
            raise SystemExit(f"compare: {both} of the same settings: leave one of them out")
        first.seeds.update(run.seeds)
    return list(pooled.values())


def label_of(run: Run, runs: list[Run]) -> str:
    """What tells a run from the others: script and settings, or else its folder."""
    peers = [x.config for x in runs if x.config.keys() == run.config.keys()]
    fields = [x for x in run.config if any(peer[x] != run.config[x] for peer in peers)]
    words = [f"{x}={run.config[x]}".replace(" ", "") for x in fields if x not in FREE]
    scripts = {x.results["algorithm"] for x in runs if x.results}
    if run.results and (not words or len(scripts) > 1):
        words.insert(0, run.results["algorithm"])
    label = ", ".join(words) if 0 < len(", ".join(words)) <= 60 else str(run.folder)
    return label if run.results else f"{label} (unfinished)"


def interval(values: np.ndarray) -> np.ndarray:
    """Ends of the 95 % bootstrap interval of the mean over S seeds: [S, T] -> [2, T].

    NaN for one seed.
    """
    count = len(values)
    draws = np.random.default_rng(0).multinomial(count, np.full(count, 1 / count), size=2000)
    ends = np.percentile(draws @ values / count, (2.5, 97.5), axis=0)
    return ends if count > 1 else ends * np.nan


def interquartile_mean(tasks: list[np.ndarray]) -> list[float]:
    """The IQM of all scores, and its 95 % stratified bootstrap interval, as in rliable.

    tasks: the scores [S] of the seeds of each task, which are resampled within their task. Without
    a second seed in every task, the ends are NaN.
    """
    rng = np.random.default_rng(0)
    draws = np.concatenate([rng.choice(scores, (2000, len(scores))) for scores in tasks], axis=1)
    draws = np.sort(np.concatenate([np.concatenate(tasks)[None], draws]), axis=1)
    cut = draws.shape[1] // 4
    iqm, *resampled = draws[:, cut : draws.shape[1] - cut].mean(axis=1)
    ends = np.percentile(resampled, (2.5, 97.5)) if min(map(len, tasks)) > 1 else (np.nan, np.nan)
    return [iqm, *ends]


def draw(axis, run: Run, label: str, color: str) -> None:
    """The mean score with its interval, and a dotted line where online training begins."""
    length = min(map(len, run.seeds.values()))  # as far as all seeds have come
    first, *_ = seeds = [rows[:length] for rows in run.seeds.values()]
    scores = np.array([rows["score"] for rows in seeds], float)
    is_online, switch = first["phase"] == "online", run.config["offline_steps"]
    x = (first["step"] + switch * is_online) / 1000  # fine-tuning begins where its parent ended
    label = f"{label}, {len(seeds)} seed{'s' * (len(seeds) > 1)}"
    style = {"lw": 1.8 if len(seeds) > 1 else 0.8, "marker": "." if length == 1 else None}
    style |= {"ls": "-" if run.results else "--"}
    axis.plot(x, scores.mean(axis=0), color=color, label=label, **style)
    axis.fill_between(x, *interval(scores), color=color, alpha=0.2, lw=0)
    if switch and is_online.any():
        axis.axvline(switch / 1000, color="grey", ls=":", lw=1)


def summarise(run: Run, label: str) -> list:
    """A row of the table, see COLUMNS: means over seeds of what results.json gives."""
    measured = []
    for rows in run.seeds.values():
        learned = rows[(rows["phase"] == "online") & (rows["step"] > run.config["warmup_steps"])]
        scores = (learned if len(learned) else rows)["score"]
        measured.append([scores[-1], scores[-10:].mean(), scores.max(), rows["n"][-1]])
    measured = np.array(measured, float)
    table = np.stack([measured.mean(axis=0), *interval(measured)], axis=1)  # [4, 3]
    behaviour = np.array(run.results.get("behaviour", [None]), float)[0]
    return [label, len(measured), *table[:3].ravel().tolist(), table[3, 0], behaviour]


def compare(folders: list[Path], picture: Path) -> list[list]:
    """Draws the runs, prints a table and returns its rows. Raises SystemExit with one sentence."""
    runs = pool([read_run(folder) for folder in folders])
    table = [summarise(run, label_of(run, runs)) for run in runs]
    size = 7.5, 3.8 + 0.22 * len(runs)  # each run adds a line to the legend
    figure = Figure(figsize=size, layout="constrained")
    axis = figure.subplots()
    for i, (run, (label, *_)) in enumerate(zip(runs, table, strict=True)):
        draw(axis, run, label, f"C{i}")
    is_online = any(run.config["online_steps"] for run in runs)
    steps = "thousands of updates" + ", then environment steps" * is_online
    axis.set(xlabel=steps, ylabel=runs[0].results.get("unit", "score"))
    figure.legend(loc="outside upper left")
    try:
        figure.savefig(picture, dpi=160)
    except (OSError, ValueError) as error:
        raise SystemExit(f"compare: --out={picture} cannot be written: {error}") from None
    width = max(len(label) for label, *_ in table)
    head = "{:{}}  seeds" + 3 * "{:>24}" + "      n  behaviour"
    line = "{:{}}  {:5}" + 3 * "{:>8.1f} [{:6.1f},{:6.1f}]" + "{:7.2f}{:11.1f}"
    print(head.format("", width, "last", "mean of last ten", "best"))
    for label, *numbers in table:
        print(line.format(label, width, *numbers).replace("[   nan,   nan]", " " * 15))
    print(f"-> {picture}")
    return table


if __name__ == "__main__":
    layout = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=layout)
    parser.add_argument("runs", nargs="+", type=Path, help="run folders")
    parser.add_argument("--out", default="compare.png", type=Path, help="picture (compare.png)")
    args = parser.parse_args()
    compare(args.runs, args.out)
