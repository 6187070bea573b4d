"""The picture of a run."""

import matplotlib
import numpy as np
from matplotlib.figure import Figure  # without pyplot, which would change the caller's backend

STYLE = {"font.size": 9, "axes.spines.top": False, "axes.spines.right": False}
STYLE |= {"axes.titlesize": 9, "legend.frameon": False, "legend.fontsize": 8}
BLUE, ORANGE, GREY, RED = "#1f5fa8", "#c4561a", "#6b6b6b", "#b00020"


def plot_run(path: str, records, results: dict, config) -> None:
    """The score and, if there is a coefficient, β, n and the margin.

    Thin lines are seeds, thick lines their mean; dots are episodes of online training.
    """
    column, switch = records.column, records.column("step", "offline")[0].max(initial=0) / 1000
    x = np.r_[column("step", "offline")[0] / 1000, column("step", "online")[0] / 1000 + switch]
    panels = [lambda axis: _score(axis, x, column, records.episodes, switch, results)]
    if np.nanmax(column("beta_max"), initial=0) > 0:
        panels.append(lambda axis: _coefficient(axis, x, column, config))
    if config.coefficient == "adaptive":
        panels.append(lambda axis: _threshold(axis, x, column, switch, results, config))
        panels.append(lambda axis: _margin(axis, x, column))
    shape = (len(panels) + 1) // 2, min(len(panels), 2)
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(4.5 * shape[1], 2.8 * shape[0]), layout="constrained")
        figure.suptitle(f"{results['algorithm']} · {results['task']} · {config.coefficient} β")
        figure.supxlabel("\n".join(x.partition(":")[0] for x in results["warnings"]), color=RED)
        for axis, draw in zip(figure.subplots(*shape, squeeze=False).flat, panels, strict=False):
            draw(axis)
            axis.legend(loc="best")
            parts = ["updates"] * bool(switch) + ["environment steps"] * bool(config.online_steps)
            axis.set_xlabel("thousands of " + ", then ".join(parts))
            axis.set_xlim(0, max(x[-1], 0.001) * 1.01)
            axis.axvspan(switch, max(switch, x[-1]), color=BLUE, alpha=0.06, lw=0, zorder=0)
        figure.savefig(path, dpi=160)


def _curves(axis, x, values, color, label, **style):
    if len(values) > 1:
        axis.plot(x, values.T, color=color, lw=0.7, alpha=0.4, **style)
    marker = "o" if np.isfinite(values[0]).sum() == 1 else None
    axis.plot(x, values.mean(0), color=color, lw=1.8, label=label, marker=marker, ms=4, **style)


def _score(axis, x, column, episodes, switch, results):
    steps = [switch + episode["step"] / 1000 for episode in episodes]
    scores = [episode["score"] for episode in episodes]
    axis.plot(steps, scores, ".", color=GREY, ms=3, label="training episodes" if episodes else None)
    _curves(axis, x, column("score"), BLUE, f"policy, {column('episodes')[0, 0]:.0f} episodes")
    if results["behaviour"][0] is not None:
        axis.axhline(results["behaviour"][0], color=GREY, ls="--", lw=1, label="behaviour")
    axis.set_title(results["unit"])


def _coefficient(axis, x, column, config):
    low, mean, high = (column(f"beta_{x}") * column("anneal") for x in ("min", "mean", "max"))
    axis.fill_between(x, low.min(0), high.max(0), color=ORANGE, alpha=0.2, lw=0, label="range")
    _curves(axis, x, mean, ORANGE, "mean")
    axis.axhline(config.coefficient_init, color=GREY, ls="--", lw=1, label="initial")
    axis.set_title("coefficient β where the regulariser acts")


def _threshold(axis, x, column, switch, results, config):
    n = column("n")
    if switch:  # offline training began with n_start
        x, n = np.r_[0, x], np.c_[np.full(len(n), config.n_start), n]
    _curves(axis, x, n, BLUE, "n", drawstyle="steps-post")
    for stop in results["n_stopped_at"]:
        if stop is not None and stop / 1000 <= switch:
            axis.axvline(stop / 1000, color=GREY, ls=":", lw=1)
    axis.set_ylim(config.n_start - 0.1, config.n_end + 0.1)
    axis.set_title("threshold width n, dotted where it stopped")


def _margin(axis, x, column):
    # Online both curves coincide, because every new transition is trusted.
    axis.plot(x, column("margin").mean(0), color=GREY, lw=4, alpha=0.5, label="all rows")
    _curves(axis, x, column("trusted_margin"), ORANGE, "rows that the threshold tests")
    axis.axhline(0, color="black", lw=0.6)
    axis.set_title("margin  log π(a|s) − C$_n$(s)")
