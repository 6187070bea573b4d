"""Signs that a run cannot be trusted, and why it may have diverged."""

import numpy as np
from tqdm import tqdm

from common.run.errors import InputError

WINDOW = 4  # evaluations that are looked at together, because a single one is noisy
KEPT = 0.3  # a loss keeps less than this share of what had been reached
NEAR_ZERO = 0.1  # share of coefficient_init, of the data, or of the scores from floor to top


def check_trusted(trusted, dataset, config) -> None:
    """Raises InputError when a seed trusts no transition: trusted, bool [S, N]."""
    if not trusted.size or config.coefficient == "fixed":
        return
    is_dense = config.selection == "success" and len(np.unique(dataset.rewards)) != 2
    if is_dense or not trusted.any(axis=1).all():
        fixes = {
            "return": "lower --config.return_threshold, or use task custom, which needs none",
            "iql": "lower --config.expectile, or raise --config.iql_steps",
        }
        fix = "it needs two reward values, and episodes that end with the higher: try selection=iql"
        fix = fixes.get(config.selection, fix)
        what = f"--config.selection={config.selection} trusts nothing in {dataset.source}"
        raise InputError(f"{what}: {fix}")
    tqdm.write(f"D̂ holds {trusted.mean():.1%} of the transitions")


def broken_parts(content, name="") -> list[str]:
    """Names of the arrays in nested dictionaries, cut at the first field, that are not finite."""
    if isinstance(content, dict):
        parts = [broken_parts(x, name or key.strip("0123456789")) for key, x in content.items()]
        return list(dict.fromkeys(sum(parts, [])))
    return [name] if content.dtype.kind == "f" and not np.isfinite(content).all() else []


def warnings(config, dataset, records, trusted_fraction=None) -> list[str]:
    """What the data and the evaluations warn of, the latter for each seed.

    trusted_fraction: of the data, [S]; by default the share of the latest batches.
    """
    if trusted_fraction is None:
        rows = [records.of(seed, "offline") or [{}] for seed in records.seeds]
        trusted_fraction = [of_seed[-1].get("trusted_fraction", np.nan) for of_seed in rows]
    found = []
    if (thinnest := min(trusted_fraction)) < 0.01:
        what = f"thin sub-dataset: only {thinnest:.2%} of the data is trusted"
        found.append(f"{what}; lower return_threshold or select by iql")
    floor, top = 0.0, 100.0
    if dataset.unit == "return":
        scores = [row["score"] for row in records.evaluations if np.isfinite(row["score"])]
        floor, top = min(0.0, *dataset.returns, *scores), max(0.0, *dataset.returns, *scores)
    for seed, fraction in zip(records.seeds, trusted_fraction, strict=True):
        for sign, text in signatures(records.of(seed), fraction, floor, top, dataset, config):
            found.append(f"{sign} (seed {seed}): {text}")
    return found


def signatures(rows, trusted_fraction, floor, top, dataset, config):
    """Yields each failure of one seed, and what to do; progress is from `floor` to `top`."""
    if broken := [row for row in rows if not np.isfinite(row["score"])]:
        what = f"the score is {broken[0]['score']} at {place(broken[0])}"
        part = "reports of success" if dataset.unit == "success rate in %" else "rewards"
        yield "not a number", f"{what}; check the {part} of the environment"
    rows = [row for row in rows if np.isfinite(row["score"])]
    scores, near_zero = [row["score"] for row in rows], floor + NEAR_ZERO * (top - floor)
    levels = [np.median(scores[max(t - WINDOW, 0) : t]) for t in range(1, len(rows) + 1)]
    offline = [row["step"] for row in rows if row["phase"] == "offline"]
    if len(offline) >= WINDOW and offline[-1] >= config.offline_steps / 2:
        best, is_thin = max(levels[WINDOW - 1 : len(offline)]), trusted_fraction < NEAR_ZERO
        if best < near_zero and (is_thin or best < dataset.behaviour):
            sign = "near-zero score" + " with a thin sub-dataset" * is_thin
            fix = "lower return_threshold or expectile" if is_thin else "raise coefficient_init"
            own = "" if np.isnan(dataset.behaviour) else f", in the data {dataset.behaviour:.4g}"
            yield sign, f"the best median of {WINDOW} evaluations is {best:.4g}{own}; {fix}"
        last, cap = rows[len(offline) - 1], 1.5 * config.coefficient_init
        if config.coefficient == "adaptive" and last.get("beta_min", 0) > 0.98 * cap:
            what = f"β is at its maximum on every state, and n at {last['n']:.3g}"
            yield "coefficient no longer adapts", f"{what}; lower coefficient_lr or raise n_end"
    # With its standard error, because few episodes of sparse success vary much.
    highest = [row["score"] + dataset.spread(row) / row["episodes"] ** 0.5 for row in rows]
    for now in range(WINDOW, len(rows)):
        first = now - WINDOW + 1
        peak, best = int(np.argmax(levels[:first])), max(highest[first : now + 1])
        if levels[peak] > near_zero and best - floor < KEPT * (levels[peak] - floor):
            sign, why = explain_loss(rows, peak, now, config)
            what = f"the score fell from {levels[peak]:.4g} around {place(rows[peak])}"
            now_at = f"{max(scores[first : now + 1]):.4g} from {place(rows[first])} on"
            yield sign, f"{what} to at most {now_at}; {why}"
            break


def place(row) -> str:
    return f"{row['phase']} step {row['step']}"


def explain_loss(rows, peak, now, config):
    """Names a loss between two evaluations by what became of n and β, and says what to do."""
    beta = [rows[i].get("beta_mean", np.nan) * rows[i].get("anneal", np.nan) for i in (peak, now)]
    n, init = [rows[i]["n"] for i in (peak, now)], config.coefficient_init
    cap = (1.5 if config.coefficient == "adaptive" else 1.0) * init
    facts = f"n {n[0]:.3g} → {n[1]:.3g}, mean β {beta[0]:.3g} → {beta[1]:.3g} (at most {cap:.3g})"
    learned = sum(row["phase"] == "online" and "anneal" in row for row in rows[: now + 1])
    if learned and beta[1] < NEAR_ZERO * init:
        sign = "drop at the switch with β near zero" if learned <= 2 * WINDOW else "collapse"
        return sign, f"{facts}; raise decay_steps, or coefficient_init offline"
    grows = n[1] > n[0] and not learned  # online n stands still
    fixes = ["raise update_period or lower n_end"] if grows else []
    if not grows or beta[1] > 0.9 * cap:
        fixes.append("raise coefficient_init")
    sign = "collapse while n grows" if grows else "collapse"
    return sign, f"{facts}; {', and '.join(fixes)}"
