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


def plot_run(path: str, history, finished, score_of, results: dict, config) -> None:
    """Score beside the behaviour's, β's band, n and where it stopped, and the margin.

    Thin lines are seeds, thick ones their mean, dots episodes of online training. Online steps
    follow the offline updates on the same axis, on a shaded ground.
    history: one dict an evaluation. finished: each seed's Finished. score_of: of a return.
    """
    updates = max([past["step"] for past in history if past["phase"] == "offline"], default=0)
    online = np.array([past["phase"] == "online" for past in history])
    steps = np.array([past["step"] for past in history]) / 1000 + online * updates / 1000
    series = {
        key: np.stack([past[key] for past in history])
        for key in history[0]
        if isinstance(history[0][key], np.ndarray)
    }
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(9, 5.6), layout="constrained")
        axes = figure.subplots(2, 2, sharex=True)
        (score, beta), (width, margin) = axes
        phase = " · online" if online.all() else ""
        figure.suptitle(
            f"{results['algorithm']} · {results['task']} · {config.coefficient} β{phase}",
            fontsize=11,
        )

        def curves(axis, key, colour, label, values=None):
            values = series[key] if values is None else values  # NaN: no update in the interval
            if values.shape[1] > 1:
                axis.plot(steps, values, color=colour, lw=0.7, alpha=0.4)
            mean = values.mean(axis=1)
            marker = "o" if np.isfinite(mean).sum() == 1 else None
            axis.plot(steps, mean, color=colour, lw=1.8, label=label, marker=marker, ms=4)

        episodes = [
            ((updates + episode.step) / 1000, score_of(episode.episode_return))
            for past in finished
            for episode in past
        ]
        if episodes:
            score.plot(*zip(*episodes, strict=True), ".", color=GREY, ms=3, alpha=0.6, zorder=1,
                       label="training episodes")  # fmt: skip
        curves(score, "score", BLUE, f"policy, {history[0]['episodes'][0]} episodes")
        if results["behaviour"][0] is not None:
            score.axhline(results["behaviour"][0], color=GREY, ls="--", lw=1, label="behaviour")
        score.set_title("normalised score" if results["normalized"] else "return")
        score.legend(loc="best")

        fade = series["anneal"]  # 1 offline
        low = (series["beta_min"] * fade).min(axis=1)
        high = (series["beta_max"] * fade).max(axis=1)
        beta.fill_between(steps, low, high, color=ORANGE, alpha=0.2, lw=0, label="min to max")
        curves(beta, "beta_mean", ORANGE, "mean", series["beta_mean"] * fade)
        beta.axhline(config.coefficient_init, color=GREY, ls="--", lw=1, label="initial")
        beta.set_title("coefficient β where the regulariser acts")
        beta.set_ylim(bottom=0)
        beta.legend(loc="best")

        if series["n"].shape[1] > 1:
            width.step(steps, series["n"], where="post", color=BLUE, lw=0.7, alpha=0.4)
        width.step(steps, series["n"].mean(axis=1), where="post", color=BLUE, lw=1.8, label="n")
        stops = [step for step in results["n_stopped_at"] if step is not None and step <= updates]
        for i, stop in enumerate(np.array(stops) / 1000):
            width.axvline(stop, color=GREY, ls=":", lw=1, label="n stopped" if i == 0 else None)
        width.set_ylim(config.n_start - 0.1, config.n_end + 0.1)
        width.set_title("threshold width n")
        width.legend(loc="best")

        curves(margin, "trusted_margin", ORANGE, "rows that the threshold tests")
        curves(margin, "margin", GREY, "all rows")
        margin.axhline(0, color="black", lw=0.6)
        margin.set_title("margin  log π(a|s) − C$_n$(s)")
        margin.legend(loc="best")

        unit = "updates" if updates else "environment steps"
        if updates and online.any():
            unit = "updates, then environment steps"
            for axis in axes.flat:
                axis.axvspan(updates / 1000, steps[-1], color=BLUE, alpha=0.06, lw=0, zorder=0)
            score.text(updates / 1000, 1, " online", transform=score.get_xaxis_transform(),
                       fontsize=8, color=BLUE, va="top",
                       bbox={"facecolor": "white", "lw": 0, "alpha": 0.6, "pad": 1})  # fmt: skip
        for axis in axes[1]:
            axis.set_xlabel(f"{unit} (thousands)")
            axis.set_xlim(0, steps[-1] * 1.01)
        figure.savefig(path, dpi=160)
