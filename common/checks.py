"""Settings that cannot work, caught before anything is compiled or written."""


class InputError(ValueError):
    """What the user gave cannot be used; the message is one sentence: what, where, and the mend."""


CHOICES = {
    "coefficient": ("adaptive", "fixed"),
    "selection": ("none", "return", "success", "iql"),
    "anneal": ("linear", "cosine", "none"),
}
COUNTS = (
    "num_seeds",
    "offline_steps",
    "eval_interval",
    "eval_episodes",
    "batch_size",
    "policy_freq",
)
COUNTS += ("update_period", "iql_steps")
MULTIPLES = (("eval_interval", "policy_freq"), ("offline_steps", "eval_interval"))


def check_config(config) -> None:
    """Raises InputError, naming the field and the mend, for values that cannot work."""
    for field, known in CHOICES.items():
        if config[field] not in known:
            raise InputError(
                f"--config.{field}={config[field]} is unknown: choose one of {', '.join(known)}"
            )
    for field in COUNTS:
        if field in config and config[field] < 1:
            raise InputError(f"--config.{field}={config[field]} must be at least 1")
    for field, divisor in MULTIPLES:
        if divisor in config and config[field] % config[divisor]:
            raise InputError(
                f"--config.{field}={config[field]} must be a multiple "
                f"of --config.{divisor}={config[divisor]}"
            )
    if config.selection == "return" and config.return_threshold is None:
        raise InputError(
            "selection=return needs --config.return_threshold=<G_T>, a return to exceed"
        )
    if not 0 < config.expectile < 1:
        raise InputError(f"--config.expectile={config.expectile} must lie between 0 and 1")
    if not 0 < config.n_start <= config.n_end:
        raise InputError(
            f"--config.n_start={config.n_start} must be positive and at most n_end={config.n_end}"
        )
