"""Settings: what cannot work is named before anything is compiled or written."""

import math
import os
import re

import jax
import ml_collections

from common.run.errors import InputError, explained
from common.run.workdir import absolute, check_folder, check_same, load_settings

CHOICES = {
    "coefficient": ("adaptive", "fixed"),
    "selection": ("auto", "none", "return", "success", "iql"),
    "anneal": ("linear", "cosine", "none"),
    "buffer_init": ("all", "half", "part", "none"),
    "physics": (None, "d4rl", "stock"),
    "matmul_precision": ("float32", "bfloat16"),
    "d4rl_rows": ("all", "qlearning"),
}
# The smallest value of a number; others, such as those of a variant, only have to be finite.
LOWEST = dict.fromkeys("""num_seeds batch_size eval_interval eval_episodes policy_freq full_length
    new_policy_freq update_period iql_steps num_sampled_actions block_size buffer_capacity
    updates_per_call max_episode_steps""".split(), 1)  # fmt: skip
LOWEST |= dict.fromkeys("""seed offline_steps online_steps warmup_steps discount expectile n_end
    target_update_rate actor_lr critic_lr coefficient_lr checkpoint_minutes policy_noise n_start
    noise_clip expl_noise exploration_noise coefficient_init bc_weight""".split(), 0)  # fmt: skip
LOWEST |= {"decay_steps": -1, "cql_temperature": 1e-6}
SIZES = ("hidden_dims", "coefficient_hidden_dims", "critic_layers")
HIGHEST = dict.fromkeys("discount target_update_rate expectile".split(), 1)
HIGHEST |= dict.fromkeys("actor_lr critic_lr coefficient_lr".split(), 1)
HIGHEST |= {"num_seeds": 4096, "batch_size": 2**20, "seed": 2**31 - 4097}
# A field, a test of it and of all settings c, and what is wrong where the test fails.
RULES = (
    ("task", lambda x, c: re.fullmatch(r"\w[\w.-]*", x),
     "must be letters, digits, . _ and -, because it names a folder"),
    ("hidden_dims", lambda x, c: "critic_layers" not in c or len(set(x)) == 1,
     "must be equal widths, because the critics have them too"),
    ("critic_layers", lambda x, c: len(x) == 2, "must be one number for each critic, such as 3,3"),
    ("reference", lambda x, c: len(x) == 2 and all(type(y) in (int, float) for y in x)
     and -1e30 < x[0] < x[1] < 1e30,
     "must be <random return>,<expert return>, such as -20.3,3234.3"),
    ("n_start", lambda x, c: x <= c.n_end, "must be at most --config.n_end={c.n_end}"),
    ("coefficient_init", lambda x, c: x or c.coefficient == "fixed",
     "leaves nothing to adapt: give a larger value, or coefficient=fixed"),
    ("warmup_steps", lambda x, c: not c.online_steps or x < c.online_steps,
     "must be smaller than --config.online_steps={c.online_steps}, or nothing is learned"),
    ("online_steps", lambda x, c: x or not c.offline_checkpoint,
     "leaves nothing to do: give the number of environment steps"),
    ("offline_steps", lambda x, c: x or c.online_steps,
     "leaves nothing to do: give it or --config.online_steps"),
    ("offline_steps", lambda x, c: c.dataset or c.dataset_path or not x and c.buffer_init == "none",
     "needs data: give --config.dataset=<Minari id>, d4rl:<file> or ogbench:<task>; to train "
     "without data, set offline_steps=0 and buffer_init=none"),
)  # fmt: skip
MULTIPLES = (
    ("updates_per_call", "policy_freq"),
    ("update_period", "policy_freq"),
    ("eval_interval", "policy_freq"),
    ("eval_interval", "updates_per_call"),
    ("offline_steps", "eval_interval"),
)  # of runs that train offline
# What a run from an offline checkpoint, and what a resumed run, may set anew.
ONLINE_FIELDS = """online_steps warmup_steps buffer_init buffer_capacity anneal decay_steps
    new_policy_freq exploration_noise eval_interval eval_episodes offline_checkpoint dataset
    dataset_path cache_dir checkpoint_minutes updates_per_call block_size wandb""".split()
MAY_CHANGE = ("cache_dir", "dataset_path", "checkpoint_minutes", "block_size", "wandb")
UNNAMED = ("seed", "offline_checkpoint", *MAY_CHANGE)  # in the names of folders


def default_folder(name: str, config, given=()) -> str:
    """The run folder, named after the settings that are `given`, so that unlike runs never meet.

    given: arguments like --config.n_end=5.0. Online: beside the folder of the offline run.
    """
    parent = config.offline_checkpoint
    place, base = os.path.split(absolute(parent) if parent else f"runs/{name}/{config.task}")
    unnamed = set(UNNAMED) - ({"dataset_path"} if not config.dataset else set())
    fields = sorted(setting.removeprefix("--config.") for setting in given)
    words = [x for x in fields if x.partition("=")[0] not in unnamed]
    words = [re.sub(r"[^\w.=,()+-]+", "_", x) for x in words] or ["online"] * bool(parent)
    folder = "-".join([base, *words]).encode()[:200].decode(errors="ignore")
    return os.path.join(place, folder, *([] if parent else [str(config.seed)]))


def prepare(config, workdir: str | None, name: str, resume: bool = True):
    """Checks everything or raises InputError; returns the frozen settings and the run folder."""
    config = ml_collections.ConfigDict(config)
    check_bounds(config)
    file = (config.dataset or "").removeprefix("d4rl:")
    if file.endswith((".hdf5", ".h5")):
        config.dataset_path = config.dataset_path or file
    for field in ("dataset_path", "offline_checkpoint", "cache_dir"):
        if config[field]:
            config[field] = absolute(config[field], f"--config.{field}")
    workdir = absolute(default_folder(name, config) if workdir is None else workdir)
    jax.config.update("jax_enable_x64", False)  # whatever the environment says
    what = f"JAX finds no device of JAX_PLATFORMS={jax.config.jax_platforms}"
    with explained(what, "unset JAX_PLATFORMS, or install JAX for it"):
        jax.devices()
    iql_steps = config.iql_steps if needs_iql(config) else 0
    sizes = divisors(math.gcd(config.eval_interval, iql_steps), config.get("policy_freq", 1))
    sizes = [size for size in sizes if size <= config.updates_per_call]
    config.updates_per_call = max(sizes, default=config.updates_per_call)
    if config.get("block_size", 0) is None and jax.default_backend() == "cpu":
        config.block_size = 32 if jax.local_device_count() == 1 else None  # devices would wait
    check_settings(config)
    check_folder(workdir, config, resume, MAY_CHANGE)
    jax.config.update("jax_default_matmul_precision", config.matmul_precision)
    return ml_collections.FrozenConfigDict(config), workdir


def needs_iql(config) -> bool:
    """Whether IQL has to label the data."""
    adaptive = config.coefficient == "adaptive" and not config.offline_checkpoint
    is_used = config.offline_steps or config.buffer_init != "none"
    return bool(adaptive and config.selection == "iql" and is_used)


def divisors(number: int, factor: int) -> list[int]:
    """The divisors of a number that are multiples of `factor`, in increasing order."""
    small = [d for d in range(1, math.isqrt(number) + 1) if number % d == 0]
    return sorted({d for d in (*small, *(number // x for x in small)) if d % factor == 0})


def scale_settings(config, given) -> None:
    """Fits the settings that depend on the run's length, unless `given`, to a given offline_steps.

    Periods and lengths keep their proportion to full_length. In the paper's tasks and the demos,
    coefficient_lr changes inversely, so that β_φ moves as far; elsewhere β_φ would outrun the
    critics (see experiments/).
    """
    check_bounds(config)
    share = config.offline_steps / config.get("full_length", math.inf)
    if "offline_steps" not in given or not share or config.offline_checkpoint:
        return
    scaled = {"update_period", "eval_interval", "iql_steps", "coefficient_lr"} - set(given)
    together = config.get("policy_freq", 1)
    if "update_period" in scaled:
        config.update_period = max(round(config.update_period * share / together), 1) * together
    if "eval_interval" in scaled:
        distance = lambda d: abs(math.log(d / config.eval_interval / share))
        lengths = divisors(math.gcd(config.offline_steps, config.online_steps), together)
        config.eval_interval = min(lengths, key=distance, default=config.eval_interval)
    if "iql_steps" in scaled:
        intervals = round(config.iql_steps * share / config.eval_interval)
        config.iql_steps = max(intervals, 1) * config.eval_interval
    if "coefficient_lr" in scaled and config.task == config.dataset:
        config.coefficient_lr = min(config.coefficient_lr / share, 1.0)


def refuse(config, field, why):
    """Raises InputError for the value of a field."""
    raise InputError(f"--config.{field}={config[field]} {why}")


def check_bounds(config) -> None:
    """Raises InputError for a number that is too small or too large, and for odd sizes."""
    for field, value in config.items():
        is_size = lambda x: type(x) is int and x > 0
        if field in SIZES and not (value and all(map(is_size, value))):
            refuse(config, field, "must be whole numbers of at least 1, such as (256,256)")
        if isinstance(value, (int, float)):
            limit = 2**31 - 1 if isinstance(value, int) else 1e30
            low, high = LOWEST.get(field, -limit), HIGHEST.get(field, limit)
            if not low <= value <= high:
                bound = f"at most {high}" if value > high else f"at least {low}"
                refuse(config, field, f"must be {bound}")


def check_settings(config) -> None:
    """Raises InputError, naming the field and the fix, for values that cannot work."""
    if source := config.offline_checkpoint:
        flag = f"--config.offline_checkpoint={source}"
        fix = "use that run's script, and leave out its settings and --config="
        check_same(load_settings(source), config, ONLINE_FIELDS, f"{flag} is a run", fix)
    for field, known in CHOICES.items():
        if config.get(field) not in known:
            refuse(config, field, f"is unknown: choose one of {', '.join(filter(None, known))}")
    check_bounds(config)
    for field, passes, why in RULES:
        if config.get(field) is not None and not passes(config[field], config):
            refuse(config, field, why.format(c=config))
    multiples = (("iql_steps", "updates_per_call"),) * needs_iql(config)
    if config.offline_steps and not config.offline_checkpoint:
        multiples += MULTIPLES
    for field, divisor in (("online_steps", "eval_interval"), *multiples):
        if config.get(field, 0) % config.get(divisor, 1):
            refuse(config, field, f"must be a multiple of --config.{divisor}={config[divisor]}")
