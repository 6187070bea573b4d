"""The picture of a run."""

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
BLUE, ORANGE, GREY = "#1f5fa8", "#c4561a", "#6b6b6b"


def plot_run(path: str, history: list[dict], results: dict, config) -> None:
    """Score beside the behaviour's, β's band, n and where it stopped, and the margin.

    Thin lines are seeds, thick ones their mean.
    """
    steps = np.array([past["step"] for past in history]) / 1000
    series = {
        key: np.stack([past[key] for past in history])
        for key in history[0]
        if np.ndim(history[0][key]) == 1
    }
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(9, 5.6), layout="constrained")
        axes = figure.subplots(2, 2, sharex=True)
        (score, beta), (width, margin) = axes
        figure.suptitle(
            f"{results['algorithm']} · {results['task']} · {config.coefficient} β", fontsize=11
        )

        def curves(axis, key, colour, label):
            if series[key].shape[1] > 1:
                axis.plot(steps, series[key], color=colour, lw=0.7, alpha=0.4)
            axis.plot(steps, series[key].mean(axis=1), color=colour, lw=1.8, label=label)

        curves(score, "score", BLUE, f"policy, {history[0]['episodes'][0]} episodes")
        score.axhline(results["behaviour"][0], color=GREY, ls="--", lw=1, label="behaviour")
        score.set_title("normalised score" if results["normalized"] else "return")
        score.legend(loc="best")

        low, high = series["beta_min"].min(axis=1), series["beta_max"].max(axis=1)
        beta.fill_between(steps, low, high, color=ORANGE, alpha=0.2, lw=0, label="min to max")
        curves(beta, "beta_mean", ORANGE, "mean")
        beta.axhline(config.coefficient_init, color=GREY, ls="--", lw=1, label="initial")
        beta.set_title("coefficient β where the regulariser acts")
        beta.set_ylim(bottom=0)
        beta.legend(loc="best")

        if series["n"].shape[1] > 1:
            width.step(steps, series["n"], where="post", color=BLUE, lw=0.7, alpha=0.4)
        width.step(steps, series["n"].mean(axis=1), where="post", color=BLUE, lw=1.8, label="n")
        stops = [step / 1000 for step in results["n_stopped_at"] if step is not None]
        for i, stop in enumerate(stops):
            width.axvline(stop, color=GREY, ls=":", lw=1, label="n stopped" if i == 0 else None)
        width.set_ylim(config.n_start - 0.1, config.n_end + 0.1)
        width.set_title("threshold width n")
        width.legend(loc="best")

        curves(margin, "trusted_margin", ORANGE, "rows that the threshold tests")
        curves(margin, "margin", GREY, "all rows")
        margin.axhline(0, color="black", lw=0.6)
        margin.set_title("margin  log π(a|s) − C$_n$(s)")
        margin.legend(loc="best")

        for axis in axes[1]:
            axis.set_xlabel("updates (thousands)")
            axis.set_xlim(0, steps[-1])
        figure.savefig(path, dpi=160)
