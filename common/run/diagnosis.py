"""Signs that a run cannot be trusted, and why it may have diverged."""

import numpy as np

from common.run.errors import InputError

WINDOW = 3  # evaluations whose mean is compared, because a single one is noisy
LATELY = 12  # evaluations in which n still grew; with the paper's settings it grows in every tenth
NEAR_ZERO = 0.1  # share of coefficient_init, of the data, or of the returns from floor to top


def check_trusted(trusted, dataset, config) -> None:
    """Raises InputError when a seed trusts no transition: trusted, bool [S, N]."""
    if trusted.size and not trusted.any(axis=1).all():
        lengths = np.diff(np.flatnonzero(dataset.episode_ends), prepend=-1)
        best = (config.reward_scale * dataset.returns + config.reward_bias * lengths).max()
        fix = {
            "return": f"give a --config.return_threshold below the best return, {best:.1f}",
            "success": f"no episode ends in a reward other than {config.reward_bias}",
            "iql": "lower --config.expectile or raise --config.iql_steps",
        }[config.selection]
        what = f"selection={config.selection} trusts nothing in {dataset.source}"
        raise InputError(f"{what}: {fix}, or choose another --config.selection")


def broken_parts(content, name="") -> list[str]:
    """Names of the arrays in nested dictionaries, cut at the first field, that are not finite."""
    if isinstance(content, dict):
        parts = [broken_parts(x, name or key.strip("0123456789")) for key, x in content.items()]
        return list(dict.fromkeys(sum(parts, [])))
    return [name] if content.dtype.kind == "f" and not np.isfinite(content).all() else []


def likely_cause(config, dataset) -> str:
    """Why training may have diverged, and what to do."""
    rewards = config.reward_scale * np.append(dataset.rewards, 1.0) + config.reward_bias
    value = np.abs(rewards).max() / max(1 - config.discount, 1e-3)
    if not value <= 1e4:
        return f"rewards make values of up to {value:.3g}: lower --config.reward_scale"
    return "lower --config.critic_lr and --config.actor_lr, or --config.n_end if n was growing"


def warnings(config, dataset, records, trusted_fraction=None) -> list[str]:
    """What the data and the evaluations warn of, each for the first seed that shows it.

    trusted_fraction: of the data, [S]; by default the mean share of the batches.
    """
    if trusted_fraction is None:
        rows = [records.of(seed, "offline") for seed in records.seeds]
        shares = [[row.get("trusted_fraction", np.nan) for row in of_seed] for of_seed in rows]
        trusted_fraction = [np.mean(x or np.nan) for x in shares]
    found, adaptive = [], config.coefficient == "adaptive"
    thinnest, selects = min(trusted_fraction), adaptive and config.selection != "none"
    if thinnest < 0.01:
        found.append(
            f"thin sub-dataset: only {thinnest:.2%} of the data is trusted, so the coefficient "
            "sees few states; lower return_threshold or select by iql"
        )
    if thinnest == 1 and selects and config.offline_steps:
        found.append(f"selection={config.selection} trusts every transition: it selects nothing")
    if dataset.scattered > 0.5:
        found.append(
            f"scattered rows: {dataset.scattered:.0%} of the rows are not followed by their "
            "successor, so returns are of pieces of episodes; keep the recorded order"
        )
    if adaptive and not (config.offline_steps or config.offline_checkpoint):
        found.append("untrained coefficient: it learns offline only; give coefficient=fixed")
    returns = [0.0, *dataset.returns, *(row["return_mean"] for row in records.evaluations)]
    floor, top = dataset.reference or (min(returns), max(returns))
    for check in (collapse_while_n_grows, thin_and_near_zero, drop_at_the_switch):
        for seed, fraction in zip(records.seeds, trusted_fraction, strict=True):
            offline, online = records.of(seed, "offline"), records.of(seed, "online")
            if text := check(offline, online, floor, top, config, fraction):
                found.append(text.replace("SEED", f"seed {seed}"))
                break
    return found


def windows(rows) -> np.ndarray:
    """Mean return of the last WINDOW evaluations, or of as many as there were: [T]."""
    means = [row["return_mean"] for row in rows]
    return np.array([np.mean(means[max(t - WINDOW, 0) : t]) for t in range(1, len(means) + 1)])


def spread(rows) -> float:
    """Standard deviation of one evaluation: among its episodes, or from one to the next.

    Second differences of independent numbers vary six times as much, and contain no trend.
    """
    between = np.diff([row["return_mean"] for row in rows], 2) ** 2 / 6
    among = np.mean([row["return_std"] ** 2 / row["episodes"] for row in rows])
    return float(np.sqrt(max(among, between.mean() if len(between) else 0.0)))


def is_lost(before, after, chance, floor, top) -> bool:
    """Whether half of the progress is lost, and more than chance explains."""
    reached, drop = before - floor, before - after
    return reached > NEAR_ZERO * (top - floor) and drop > max(0.5 * reached, chance)


def collapse_while_n_grows(offline, online, floor, top, config, trusted_fraction):
    """The return fell during offline training, and n had grown lately: it grows too fast."""
    if config.coefficient != "adaptive" or len(offline) < 2 * WINDOW:
        return None
    mean, n = windows(offline), [row["n"] for row in offline]
    counts = np.minimum(np.arange(len(mean)) + 1, WINDOW)
    # Five standard errors of a difference, because the peak is the best of many.
    chance = 5 * spread(offline) * np.sqrt(1 / counts + 1 / WINDOW)
    for now in range(WINDOW, len(mean)):
        peak = int(np.argmax((mean - chance)[: now - WINDOW + 1]))
        before = n[now - LATELY] if now >= LATELY else config.n_start
        if n[now] > before and is_lost(mean[peak], mean[now], chance[peak], floor, top):
            return (
                f"collapse while n grows (SEED): the return fell from {mean[peak]:.4g} at update "
                f"{offline[peak]['step']} to {mean[now]:.4g} at update {offline[now]['step']} as "
                f"n went from {before:.3g} to {n[now]:.3g}; raise update_period or lower n_end"
            )
    return None


def thin_and_near_zero(offline, online, floor, top, config, trusted_fraction):
    """Half of offline training is over and the return is near zero, while D̂ is thin."""
    is_early = len(offline) < WINDOW or offline[-1]["step"] < config.offline_steps / 2
    if is_early or not trusted_fraction < NEAR_ZERO:
        return None
    best = windows(offline)[WINDOW - 1 :].max()
    what = f"near-zero score with a thin sub-dataset (SEED): the best return is {best:.4g}"
    is_near_zero = best - floor < NEAR_ZERO * (top - floor)
    return f"{what}; lower return_threshold or expectile" if is_near_zero else None


def drop_at_the_switch(offline, online, floor, top, config, trusted_fraction):
    """The return fell in the first evaluations online while the regulariser was nearly off."""
    learned = [row for row in online[1:] if "anneal" in row][:WINDOW]
    if not (config.offline_steps or config.offline_checkpoint) or len(learned) < WINDOW:
        return None
    before, after = online[0]["return_mean"], windows(learned)[-1]
    chance = 3 * max(spread(rows) for rows in (learned, offline) if rows) * (1 + 1 / WINDOW) ** 0.5
    beta = np.mean([row["beta_mean"] * row["anneal"] for row in learned])
    if beta < NEAR_ZERO * config.coefficient_init and is_lost(before, after, chance, floor, top):
        return (
            f"drop at the switch with β near zero (SEED): the return fell from {before:.4g} to "
            f"{after:.4g} in {WINDOW} evaluations while β was {beta:.3g}; raise decay_steps, or "
            "coefficient_init offline"
        )
    return None
