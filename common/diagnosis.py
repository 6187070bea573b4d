"""What shows that a run is failing: numbers that are not finite, SPEC section 10's signatures."""

from __future__ import annotations

import jax
import numpy as np

from common.checks import InputError

WINDOW = 3  # evaluations whose mean is compared, for a single one is noisy
LATELY = 12  # evaluations in which n still grew; in the authors' settings it does in every tenth
DROP = 0.5  # share of what had been reached that is lost
NEAR_ZERO = 0.1  # share of β_init, or of the scores from floor to scale


class Diverged(InputError):
    """A loss or a parameter is no longer finite; what training made before it is kept."""


def first_broken(updates, broke: dict, parts: dict):
    """The seed's place, the update, and the names of what was first not finite; None for nothing.

    updates: of every seed so far, [S]. broke: {metric: the first of them at which it was not
    finite, [S], 0 for none}. parts: {part of the state: whether it now is not finite, bool [S]}.
    """
    found = [
        (int(at[i]), rank(name), i, name) for name, at in broke.items() for i in np.flatnonzero(at)
    ]
    found = found or [
        (int(updates[i]), rank(name), i, name)
        for name, is_broken in parts.items()
        for i in np.flatnonzero(is_broken)
    ]
    if not found:
        return None
    update, _, seed, _ = min(found)
    return (
        int(seed),
        update,
        [name for at, _, i, name in sorted(found) if (at, i) == (update, seed)],
    )


def check_labelling(done: int, num_updates: int, broke: dict, parts: dict, config) -> None:
    """Raises Diverged when the IQL that labels D̂ broke in the updates that follow `done` others.

    broke, parts: as first_broken takes them, updates counted from these on.
    """
    broke, parts = jax.device_get((broke, parts))
    if broken := first_broken([num_updates] * config.num_seeds, broke, parts):
        seed, update, names = broken
        raise Diverged(
            f"diverged: {names[0]} is not finite at update {done + update} of the IQL that selects "
            f"the trusted rows, seed {config.seed + seed}: lower "
            f"--config.reward_scale={config.reward_scale:g}, or choose another --config.selection"
        )


def rank(name: str) -> int:
    """Of what broke at once: β, which earlier updates made, then losses, the critic's first."""
    order = ("beta_mean", "beta_min", "beta_max", "critic_loss", "critic", "actor_loss", "actor")
    order += ("iql_value_loss", "iql_critic_loss", "coefficient")
    return order.index(name) if name in order else len(order)


def likely_cause(config, n_grows: bool, saturated: float, largest_reward: float) -> str:
    """Why training may have diverged, and the mend.

    n_grows: whether it did in the last intervals. saturated: share of the data's rows that have an
    action at ±1. largest_reward: in size, of those learned from.
    """
    causes, value = [], largest_reward / max(1 - config.discount, 1e-3)
    if not value <= 1e4:
        causes.append(
            f"rewards of up to {largest_reward:.3g} make values of up to {value:.3g}: lower "
            f"--config.reward_scale={config.reward_scale:g}"
        )
    for field in ("critic_lr", "actor_lr", "coefficient_lr"):
        if config[field] > 1e-3:
            causes.append(f"--config.{field}={config[field]:g} is large: lower it")
    if causes:  # enough of them: what follows is less telling
        return ", or ".join(causes)
    if n_grows:
        causes.append(
            f"n was growing: raise --config.update_period={config.update_period} or lower "
            f"--config.n_end={config.n_end:g}"
        )
    if saturated > 0.05 and "num_sampled_actions" in config:  # whose π is a tanh of a Gaussian
        causes.append(
            f"{saturated:.0%} of the rows have an action at ±1, where log π is steep: rescale the "
            "actions"
        )
    return ", or ".join(causes) or "nothing stands out: lower --config.critic_lr and actor_lr"


def signatures(history, floor: float, scale: float, trusted_fraction, config, seeds) -> list[str]:
    """SPEC section 10's failures that the evaluations so far show, for the first seed of each.

    history: one dict an evaluation, as RunLog keeps them. floor, scale: returns of a useless policy
    and of a good one. trusted_fraction: of D̂ in the data, [S].
    """
    offline = [past for past in history if past["phase"] == "offline"]
    online = [past for past in history if past["phase"] == "online"]
    checks = (
        (collapse_while_n_grows, (offline, floor, scale, config)),
        (thin_and_near_zero, (offline, floor, scale, config, trusted_fraction)),
        (drop_at_the_switch, (online, offline, floor, scale, config)),
    )
    found = []
    for check, args in checks:
        names = [(seed, text) for i, seed in enumerate(seeds) if (text := check(i, *args))]
        if names:
            seed, text = names[0]
            others = f", and {len(names) - 1} more" if len(names) > 1 else ""
            found.append(text.replace("SEED", f"seed {seed}{others}"))
    return found


def windows(history, i):
    """Mean returns of the i-th seed's last WINDOW evaluations, or as many as there were, [T]."""
    sums = np.cumsum([0, *(past["return_mean"][i] for past in history)])
    first = np.maximum(np.arange(1, len(sums)) - WINDOW, 0)
    return (sums[1:] - sums[first]) / (np.arange(1, len(sums)) - first)


def spread(history, i) -> float:
    """Standard deviation of one evaluation: among its episodes, or from one to the next.

    Second differences of independent numbers vary six times as much as these, and hold no trend.
    """
    means = np.array([past["return_mean"][i] for past in history])
    errors = [past["return_std"][i] / past["episodes"][i] ** 0.5 for past in history]
    between = np.mean(np.diff(means, 2) ** 2) / 6 if len(means) > 2 else 0.0
    return float(np.sqrt(max(np.mean(np.square(errors)), between)))


def _lost(before, after, chance, floor, scale) -> bool:
    """Whether half of what had been reached is lost, and that by more than chance can do."""
    reached, drop = before - floor, before - after
    return reached > NEAR_ZERO * (scale - floor) and drop > max(DROP * reached, chance)


def collapse_while_n_grows(i, history, floor, scale, config) -> str | None:
    """The score fell mid-training, and n had grown lately: it grows too fast."""
    if config.coefficient != "adaptive" or len(history) < 2 * WINDOW:
        return None
    mean, n = windows(history, i), [past["n"][i] for past in history]
    counts = np.minimum(np.arange(len(mean)) + 1, WINDOW)
    # Five standard errors of a difference, as the peak is the best of many.
    chance = 5 * spread(history, i) * np.sqrt(1 / counts + 1 / WINDOW)
    for now in range(WINDOW, len(mean)):
        peak = int(np.argmax((mean - chance)[: now - WINDOW + 1]))
        n_before = n[now - LATELY] if now >= LATELY else config.n_start
        if n[now] > n_before and _lost(mean[peak], mean[now], chance[peak], floor, scale):
            return (
                f"collapse while n grows (SEED): the return fell from {mean[peak]:.4g} up to "
                f"update {history[peak]['step']} to {mean[now]:.4g} at update "
                f"{history[now]['step']} as n went from {n_before:.3g} to {n[now]:.3g}; let n grow "
                f"more slowly with update_period above {config.update_period}, or less with a "
                "lower n_end"
            )
    return None


def thin_and_near_zero(i, history, floor, scale, config, trusted_fraction) -> str | None:
    """Half the training is over, the score is near zero and D̂ thin: β_φ sees too few states."""
    if trusted_fraction[i] >= NEAR_ZERO or len(history) < WINDOW:
        return None
    if history[-1]["step"] < config.offline_steps / 2:
        return None
    best = windows(history, i)[WINDOW - 1 :].max()
    if best - floor >= NEAR_ZERO * (scale - floor):
        return None
    return (
        f"near-zero score with a thin sub-dataset (SEED): the best return is {best:.4g} and only "
        f"{trusted_fraction[i]:.2%} of the data is trusted, so the coefficient sees few states; "
        "trust more of it with a lower return_threshold or expectile, or record more good episodes"
    )


def drop_at_the_switch(i, history, offline, floor, scale, config) -> str | None:
    """The score fell in the first evaluations online while the regulariser was next to off."""
    trained = config.offline_steps or config.offline_checkpoint
    learned = [past for past in history[1:] if "anneal" in past["measured"]][:WINDOW]
    if not trained or not config.coefficient_init or len(learned) < WINDOW:
        return None
    before, after = history[0]["return_mean"][i], windows(learned, i)[-1]
    deviation = max(spread(learned, i), spread(offline, i) if offline else 0.0)
    chance = 3 * deviation * (1 + 1 / WINDOW) ** 0.5
    beta = np.mean([past["beta_mean"][i] * past["anneal"][i] for past in learned])
    near_zero = beta < NEAR_ZERO * config.coefficient_init
    if not (near_zero and _lost(before, after, chance, floor, scale)):
        return None
    return (
        f"drop at the switch with β near zero (SEED): the return fell from {before:.4g} to "
        f"{after:.4g} in the first {WINDOW} evaluations online while β was {beta:.3g}, of "
        f"coefficient_init={config.coefficient_init:.3g}; anneal more slowly with decay_steps "
        f"above {config.decay_steps}, or train offline with a larger coefficient_init"
    )
