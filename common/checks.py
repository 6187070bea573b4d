"""Settings that cannot work, caught before anything is compiled or written."""

import errno
import fcntl
import json
import os
import re
import tempfile


class InputError(ValueError):
    """What the user gave cannot be used; the message is one sentence: what, where, and the mend."""


NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO)


class Unwritable(InputError):
    """A file cannot be written, as on a full disk; what had been written before is whole."""

    def __init__(self, path: str, error: Exception):
        reason = getattr(error, "strerror", None) or " ".join(str(error).split())[:200]
        self.reason = f"{path} cannot be written ({reason})"
        super().__init__(
            f"{self.reason}: free space or mend its permissions, and the same command goes on from "
            "the last checkpoint, if there is one"
        )


CHOICES = {
    "coefficient": ("adaptive", "fixed"),
    "selection": ("none", "return", "success", "iql"),
    "anneal": ("linear", "cosine", "none"),
    "buffer_init": ("all", "half", "part", "none"),
    "physics": (None, "d4rl", "stock"),
    "matmul_precision": ("float32", "bfloat16"),
    "d4rl_rows": ("all", "qlearning"),
}
AT_LEAST_ONE = """num_seeds eval_interval eval_episodes batch_size policy_freq new_policy_freq
    update_period iql_steps num_sampled_actions block_size buffer_capacity""".split()
NOT_NEGATIVE = ("offline_steps", "online_steps", "warmup_steps", "checkpoint_minutes")
RANGES = {
    "discount": (0, 1),
    "target_update_rate": (0, 1),
    "expectile": (0, 1),
    "actor_lr": (0, 1),
    "critic_lr": (0, 1),
    "coefficient_lr": (0, 1),
    "coefficient_init": (0, float("inf")),
    "policy_noise": (0, float("inf")),
    "noise_clip": (0, float("inf")),
    "expl_noise": (0, float("inf")),
    "exploration_noise": (0, float("inf")),
    "cql_temperature": (1e-6, float("inf")),
    "target_action_gap": (-float("inf"), float("inf")),
    "bc_weight": (0, float("inf")),
    "n_start": (0, float("inf")),
    "reward_scale": (-float("inf"), float("inf")),
    "reward_bias": (-float("inf"), float("inf")),
}
WIDTHS = ("hidden_dims", "coefficient_hidden_dims")
MULTIPLES = (
    ("eval_interval", "policy_freq"),  # this and the next matter offline
    ("offline_steps", "eval_interval"),
    ("online_steps", "eval_interval"),
)
# What a run that goes on from an offline one may set for itself; where the data lie is its own too.
ONLINE_FIELDS = """online_steps warmup_steps buffer_init buffer_capacity anneal decay_steps
    new_policy_freq exploration_noise eval_interval eval_episodes offline_checkpoint dataset
    dataset_path cache_dir checkpoint_minutes""".split()

# What a run that is gone on with after a stop may set anew.
MAY_CHANGE = ("cache_dir", "dataset_path", "checkpoint_minutes")


def check_config(config) -> None:
    """Raises InputError, naming the field and the mend, for values that cannot work.

    And for those that the run in `offline_checkpoint` did not have.
    """
    if config.offline_checkpoint:
        _check_same_settings(config)

    def refuse(field, why):
        alias = " (cql_alpha)" if field == "coefficient_init" and "cql_alpha" in config else ""
        raise InputError(f"--config.{field}={config[field]}{alias} {why}")

    if not re.fullmatch(r"\w[\w.-]*", config.task):
        refuse("task", "must be a plain name, as it names a folder: letters, digits, . _ and -")
    for field, known in CHOICES.items():
        if config[field] not in known:
            refuse(field, f"is unknown: choose one of {', '.join(filter(None, known))}")
    for field in AT_LEAST_ONE:
        if field in config and config[field] is not None and config[field] < 1:
            refuse(field, "must be at least 1")
    for field in (*AT_LEAST_ONE, *NOT_NEGATIVE, "decay_steps"):
        if field in config and (config[field] or 0) >= 2**31:
            refuse(field, "must be below 2^31")
    if config.batch_size > 2**20:
        refuse("batch_size", "must be at most 2^20")
    for field in NOT_NEGATIVE:
        if not 0 <= config[field] < float("inf"):
            refuse(field, "must not be negative, nor unbounded")
    for field, (low, high) in RANGES.items():
        if field in config and not (low <= config[field] <= high and abs(config[field]) < 1e30):
            too_large = low <= config[field] <= high
            refuse(field, "is too large" if too_large else f"must lie between {low} and {high}")
    for field in WIDTHS:
        if not config[field] or not all(isinstance(w, int) and w > 0 for w in config[field]):
            refuse(field, "must be layer widths such as (256,256)")
    if "critic_layers" in config:
        layers = config.critic_layers
        if len(layers) != 2 or not all(isinstance(n, int) and n > 0 for n in layers):
            refuse("critic_layers", "must be the hidden layers of two critics such as (3,3)")
        if len(set(config.hidden_dims)) > 1:
            refuse("hidden_dims", "must be equal widths, which the critics have too")
        bounds = [config.clip_diff_min, config.clip_diff_max]
        for field, bound in zip(("clip_diff_min", "clip_diff_max"), bounds, strict=True):
            if bound is not None and bound != bound:
                refuse(field, "is no number: give a bound, or leave it out")
        if None not in bounds and not bounds[0] < bounds[1]:
            refuse("clip_diff_min", f"must be below --config.clip_diff_max={bounds[1]}")
    for field, divisor in MULTIPLES[2:] if config.offline_checkpoint else MULTIPLES:
        if divisor in config and config[field] % config[divisor]:
            refuse(field, f"must be a multiple of --config.{divisor}={config[divisor]}")
    if config.coefficient == "adaptive" and config.coefficient_init == 0:
        refuse("coefficient_init", "leaves nothing to adapt: give more, or coefficient=fixed")
    if config.num_seeds > 4096:
        refuse("num_seeds", "is more than one program can hold: run them in several")
    if not 0 <= config.seed < 2**31 - config.num_seeds:
        refuse("seed", "must be at least 0 and below 2^31")
    if not config.n_start <= config.n_end < float("inf"):
        refuse("n_start", f"must be at most --config.n_end={config.n_end}")
    by_return = config.coefficient == "adaptive" and config.selection == "return"
    threshold = config.return_threshold
    if by_return and (threshold is None or not abs(threshold) < float("inf")):
        refuse("return_threshold", "is no return to exceed: give G_T, or another selection")
    _check_online(config, refuse)


def _check_online(config, refuse):
    offline = config.offline_steps > 0 and not config.offline_checkpoint
    if not config.online_steps:
        if config.offline_checkpoint:
            refuse("online_steps", "leaves nothing to do: give the number of environment steps")
        if not offline:
            refuse("offline_steps", "leaves nothing to do: give it or --config.online_steps")
    elif config.warmup_steps >= config.online_steps:
        refuse("warmup_steps", f"leaves no update in --config.online_steps={config.online_steps}")
    needs_data = offline or config.buffer_init != "none"
    if needs_data and not (config.dataset or config.dataset_path):
        raise InputError(
            "no data set: give --config.dataset=<local Minari id> or =d4rl:<file>; "
            "only offline_steps=0 with buffer_init=none does without"
        )


def _check_same_settings(config):
    flag = f"--config.offline_checkpoint={config.offline_checkpoint}"
    settings = load_settings(config.offline_checkpoint)
    foreign = sorted(set(settings) - set(config))
    if foreign:
        raise InputError(
            f"{flag} is a run of another script, with {', '.join(foreign)}: use the script it is of"
        )
    differing = [
        f"{field}={config[field]} (there {settings[field]})"
        for field in sorted(set(settings) - set(ONLINE_FIELDS))
        if _as_json(config[field]) != settings[field]
    ]
    if differing:
        raise InputError(
            f"{flag} was trained with other settings than {', '.join(differing)}: leave those out, "
            "and --config= too, to take the run's own"
        )


def load_settings(workdir: str, flag: str = "--config.offline_checkpoint") -> dict:
    """The settings of the run in `workdir`. Raises InputError when that is no run's folder."""
    path = os.path.join(os.path.expanduser(workdir), "config.json")
    try:
        with open(path) as file:
            settings = json.load(file)
        if not isinstance(settings, dict):
            raise ValueError
        return settings
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or "not readable"
        raise InputError(
            f"{flag}={workdir} is no run's folder ({path}: {reason}): give another"
        ) from None


def is_unfinished(workdir: str) -> bool:
    """Whether a run was begun in `workdir` and did not come to its end.

    Its results are followed by the removal of what it could have gone on from.
    """
    is_over = _has(workdir, "results.json") and not _has(workdir, "unfinished")
    return _has(workdir, "config.json") and not is_over


def _has(workdir, name):
    return os.path.exists(os.path.join(workdir, name))


def lock(workdir: str):
    """The open file that keeps other processes out of `workdir`, until this one ends or closes it.

    Raises InputError when another process has it.
    """
    path = os.path.join(workdir, "lock")
    try:
        file = open(path, "a+")
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if not _has(workdir, "lock") or not os.path.samestat(
            os.fstat(file.fileno()), os.stat(path)
        ):
            file.close()  # the process that had it has just removed it
            return lock(workdir)
    except BlockingIOError:
        file.seek(0)
        process = file.read().strip()
        file.close()
        raise InputError(
            f"{workdir} is in use by process {process}: wait for it, stop it, or choose another "
            "folder"
        ) from None
    except OSError as error:
        raise InputError(
            f"{workdir} cannot be locked ({error.strerror}: {path}): choose another folder"
        ) from None
    file.truncate(0)  # of a process that died
    file.write(f"{os.getpid()}\n")
    file.flush()
    return file


def _check_unfinished(workdir, config):
    """Raises InputError when the unfinished run there has other settings."""
    settings, now = load_settings(workdir, "--workdir"), lasting_settings(config)
    if foreign := sorted(set(settings) - set(config)):
        raise InputError(
            f"--workdir={workdir} holds an unfinished run of another script, with "
            f"{', '.join(foreign)}: choose another folder, or give --noresume to set it aside"
        )
    differing = [
        f"{field}={now[field]} (there {settings.get(field)})"
        for field in sorted(now)
        if now[field] != settings.get(field)
    ]
    if differing:
        raise InputError(
            f"--workdir={workdir} holds an unfinished run with other settings than "
            f"{', '.join(differing)}: give those to go on with it, choose another folder, or give "
            "--noresume to set it aside"
        )


def lasting_settings(config) -> dict:
    """Those that a run keeps from its start to its end, as they come back from its config.json."""
    return {field: _as_json(config[field]) for field in set(config) - set(MAY_CHANGE)}


def _as_json(value):
    """The value as it comes back from a run's config.json."""
    if isinstance(value, float) and not abs(value) < float("inf"):
        return None
    return list(value) if isinstance(value, tuple) else value


def check_workdir(workdir: str, config, resume: bool) -> None:
    """Raises InputError when no run folder can be made there, or it is the run to go on from.

    And when it is another process's, or, to resume, holds an unfinished run with other settings.
    """
    source = os.path.realpath(os.path.expanduser(config.offline_checkpoint or ""))
    if config.offline_checkpoint and os.path.realpath(workdir) == source:
        raise InputError(
            f"--workdir={workdir} is the run of --config.offline_checkpoint: choose another folder"
        )
    if os.path.exists(workdir) and not os.path.isdir(workdir):
        raise InputError(f"--workdir={workdir} is a file: choose another folder")
    # What a start that died at once may leave is no reason to refuse.
    begun = {"lock", "unfinished", "unfinished.old", "config.json.new"}
    if os.path.isdir(workdir) and set(os.listdir(workdir)) - begun:
        is_run = _has(workdir, "scores.csv") or _has(workdir, "unfinished")
        if not _has(workdir, "config.json") and not (is_run and not resume):
            mend = ", or give --noresume to set it aside" if is_run else ""
            what = "a run whose config.json is missing" if is_run else "files of no run"
            raise InputError(f"--workdir={workdir} holds {what}: choose another folder{mend}")
    if _has(workdir, "lock"):
        lock(workdir).close()
    if resume and is_unfinished(workdir):
        _check_unfinished(workdir, config)
    parent = os.path.abspath(workdir)
    while not os.path.exists(parent):
        parent = os.path.dirname(parent)
    try:
        tempfile.TemporaryFile(dir=parent).close()
    except OSError as error:
        raise InputError(
            f"--workdir={workdir} cannot be written in {parent} ({error.strerror}): choose another "
            "folder"
        ) from None
