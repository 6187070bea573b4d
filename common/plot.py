"""The picture of a run."""

from typing import NamedTuple

import matplotlib
import numpy as np
from matplotlib.figure import Figure  # no pyplot: the caller's backend stays as it is

STYLE = {
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titleweight": "bold",
    "axes.titlesize": 9,
    "axes.titlelocation": "left",
    "legend.frameon": False,
    "legend.fontsize": 8,
}
BLUE, ORANGE, GREY, RED = "#1f5fa8", "#c4561a", "#6b6b6b", "#b00020"


class Series(NamedTuple):
    """A run's evaluations on one axis: online steps follow the offline updates."""

    x: np.ndarray  # [T], thousands
    values: dict  # {metric: [T, S]}; NaN where an interval had no update
    switch: int  # offline updates before the first online step
    online: np.ndarray  # bool [T]


def plot_run(path: str, history, finished, score_of, results: dict, config) -> None:
    """Score beside the behaviour's, β's band, n and where it stopped, and the margin.

    Thin lines are seeds, thick ones their mean, dots episodes of online training, the shaded part
    is online. history: one dict an evaluation. finished: every seed's. score_of: of a return.
    """
    switch = max([past["step"] for past in history if past["phase"] == "offline"], default=0)
    online = np.array([past["phase"] == "online" for past in history])
    steps = np.array([past["step"] for past in history])
    keys = [key for key in history[0] if isinstance(history[0][key], np.ndarray)]
    values = {key: np.stack([past[key] for past in history]) for key in keys}
    series = Series((steps + online * switch) / 1000, values, switch, online)
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(9, 5.6), layout="constrained")
        axes = figure.subplots(2, 2, sharex=True)
        phase = " · online" if online.all() else ""
        figure.suptitle(
            f"{results['algorithm']} · {results['task']} · {config.coefficient} β{phase}",
            fontsize=11,
        )
        if results["warnings"]:
            heads = "\n".join(_head(warning) for warning in results["warnings"])
            figure.supxlabel(heads, fontsize=8, color=RED)
        _plot_score(axes[0, 0], series, finished, score_of, results)
        _plot_coefficient(axes[0, 1], series, config)
        _plot_threshold(axes[1, 0], series, results, config)
        _plot_margin(axes[1, 1], series)
        unit = "updates" if switch else "environment steps"
        if switch and online.any():
            unit = "updates, then environment steps"
            for axis in axes.flat:
                axis.axvspan(switch / 1000, series.x[-1], color=BLUE, alpha=0.06, lw=0, zorder=0)
            axes[0, 0].text(
                switch / 1000, 1, " online", transform=axes[0, 0].get_xaxis_transform(),
                fontsize=8, color=BLUE, va="top",
                bbox={"facecolor": "white", "lw": 0, "alpha": 0.6, "pad": 1},
            )  # fmt: skip
        for axis in axes[1]:
            axis.set_xlabel(f"{unit} (thousands)")
            axis.set_xlim(
                0, max(series.x[-1], 0.001) * 1.01
            )  # a run may end at its first evaluation
        figure.savefig(path, dpi=160)


def _curves(axis, x, values, colour, label):
    if values.shape[1] > 1:
        axis.plot(x, values, color=colour, lw=0.7, alpha=0.4)
    mean = values.mean(axis=1)
    marker = "o" if np.isfinite(mean).sum() == 1 else None
    axis.plot(x, mean, color=colour, lw=1.8, label=label, marker=marker, ms=4)


def _head(warning):
    """What has happened, without the numbers and the mend."""
    head, _, rest = warning.partition(": ")
    return f"{head}: {rest.partition(': ')[0]}" if head == "diverged" else head


def _plot_score(axis, series, finished, score_of, results):
    episodes = [
        ((series.switch + episode.step) / 1000, score_of(episode.episode_return))
        for past in finished
        for episode in past
    ]
    if episodes:
        axis.plot(*zip(*episodes, strict=True), ".", color=GREY, ms=3, alpha=0.6, zorder=1,
                  label="training episodes")  # fmt: skip
    label = f"policy, {series.values['episodes'][0, 0]} episodes"
    _curves(axis, series.x, series.values["score"], BLUE, label)
    if results["behaviour"][0] is not None:
        axis.axhline(results["behaviour"][0], color=GREY, ls="--", lw=1, label="behaviour")
    axis.set_title("normalised score" if results["normalized"] else "return")
    axis.legend(loc="best")


def _plot_coefficient(axis, series, config):
    fade = series.values["anneal"]  # 1 offline
    low = (series.values["beta_min"] * fade).min(axis=1)
    high = (series.values["beta_max"] * fade).max(axis=1)
    axis.fill_between(series.x, low, high, color=ORANGE, alpha=0.2, lw=0, label="min to max")
    _curves(axis, series.x, series.values["beta_mean"] * fade, ORANGE, "mean")
    axis.axhline(config.coefficient_init, color=GREY, ls="--", lw=1, label="initial")
    axis.set_title("coefficient β where the regulariser acts")
    axis.set_ylim(bottom=0)
    axis.legend(loc="best")


def _plot_threshold(axis, series, results, config):
    n = series.values["n"]
    if n.shape[1] > 1:
        axis.step(series.x, n, where="post", color=BLUE, lw=0.7, alpha=0.4)
    axis.step(series.x, n.mean(axis=1), where="post", color=BLUE, lw=1.8, label="n")
    stops = [s for s in results["n_stopped_at"] if s is not None and s <= series.switch]
    for i, stop in enumerate(stops):
        label = "n stopped" if i == 0 else None
        axis.axvline(stop / 1000, color=GREY, ls=":", lw=1, label=label)
    axis.set_ylim(config.n_start - 0.1, config.n_end + 0.1)
    axis.set_title("threshold width n")
    axis.legend(loc="best")


def _plot_margin(axis, series):
    _curves(
        axis, series.x, series.values["trusted_margin"], ORANGE, "rows that the threshold tests"
    )
    _curves(axis, series.x, series.values["margin"], GREY, "all rows")
    axis.axhline(0, color="black", lw=0.6)
    axis.set_title("margin  log π(a|s) − C$_n$(s)")
    axis.legend(loc="best")
