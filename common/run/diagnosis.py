"""Signs that a run cannot be trusted, and why it may have diverged."""

import numpy as np
from tqdm import tqdm

from common.run.errors import InputError

WINDOW = 4  # evaluations that are looked at together, because a single one is noisy
KEPT = 0.3  # a loss keeps less than this share of what had been reached
NEAR_ZERO = 0.1  # share of coefficient_init, of the data, or of the returns from floor to top


def check_trusted(trusted, dataset, config) -> None:
    """Raises InputError when a seed trusts no transition: trusted, bool [S, N]."""
    if not trusted.size or config.coefficient == "fixed":
        return
    fix = {
        "return": "lower --config.return_threshold, or use task custom, which needs none",
        "iql": "lower --config.expectile, or raise --config.iql_steps",
    }
    fix = fix.get(config.selection, "no episode ends with the higher reward, so try selection=iql")
    is_sparse = len(np.unique(dataset.rewards)) == 2
    if is_dense := config.selection == "success" and not is_sparse:
        fix = "give rewards of two values, for success and failure, or another --config.selection"
    tqdm.write(f"D̂ holds {trusted.mean():.1%} of the transitions")
    if is_dense or not trusted.any(axis=1).all():
        what = f"selection={config.selection} finds no D̂ in {dataset.source}"
        raise InputError(f"{what}: {fix}")


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
    returns = [0.0, *dataset.returns, *(row["return_mean"] for row in records.evaluations)]
    returns = [x for x in returns if np.isfinite(x)]
    floor, top = dataset.reference or (min(returns), max(returns))
    own = np.mean(dataset.returns) if len(dataset.returns) else floor
    for seed, fraction in zip(records.seeds, trusted_fraction, strict=True):
        rows = records.of(seed)
        if dataset.scored_by_success:  # returns depend on how long an episode may last
            rows, floor, top, own = [_as_return(row) for row in rows], 0.0, 1.0, 0.0
        for sign, text in signatures(rows, fraction, floor, top, own, config):
            found.append(f"{sign} (seed {seed}): {text}")
    return found


def _as_return(row):
    rate = row["success_rate"]
    return row | {"return_mean": rate, "return_std": (rate * (1 - rate)) ** 0.5}


def signatures(rows, trusted_fraction, floor, top, own, config):
    """Yields each failure that one seed's evaluations show, and what to do.

    floor, top: the returns between which progress is measured. own: the data's mean return.
    """
    broken = [row for row in rows if not np.isfinite(row["return_mean"])]
    if broken:
        what = f"the return is {broken[0]['return_mean']} at {place(broken[0])}"
        yield "not a number", f"{what}; check the rewards of the environment"
    rows = [row for row in rows if np.isfinite(row["return_mean"])]
    returns, near_zero = [row["return_mean"] for row in rows], floor + NEAR_ZERO * (top - floor)
    levels = [np.median(returns[max(t - WINDOW, 0) : t]) for t in range(1, len(rows) + 1)]
    offline = [row["step"] for row in rows if row["phase"] == "offline"]
    if len(offline) >= WINDOW and offline[-1] >= config.offline_steps / 2:
        best, is_thin = max(levels[WINDOW - 1 : len(offline)]), trusted_fraction < NEAR_ZERO
        if best < near_zero and (is_thin or best < own):
            sign = "near-zero score" + " with a thin sub-dataset" * is_thin
            fix = "lower return_threshold or expectile" if is_thin else "raise coefficient_init"
            yield sign, f"the return is {best:.4g} at best, and {own:.4g} in the data; {fix}"
        last, cap = rows[len(offline) - 1], 1.5 * config.coefficient_init
        if config.coefficient == "adaptive" and last.get("beta_min", 0) > 0.98 * cap:
            what = f"β is at its maximum on every state, and n at {last['n']:.3g}"
            yield "coefficient no longer adapts", f"{what}; lower coefficient_lr or raise n_end"
    for now in range(WINDOW, len(rows)):
        first = now - WINDOW + 1
        # With its standard error, because few episodes of sparse success vary much.
        error = lambda row: row["return_std"] / row["episodes"] ** 0.5
        best = max(row["return_mean"] + error(row) for row in rows[first : now + 1])
        peak = int(np.argmax(levels[:first]))
        if levels[peak] > near_zero and best - floor < KEPT * (levels[peak] - floor):
            sign, why = explain_loss(rows, peak, now, config)
            what = f"the return fell from {levels[peak]:.4g} around {place(rows[peak])}"
            now_at = f"{max(returns[first : now + 1]):.4g} from {place(rows[first])} on"
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
