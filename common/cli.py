"""The command line of the scripts."""

import contextlib
import difflib
import functools
import importlib
import os
import re
import sys
import tempfile
import time
import warnings

import jax
from absl import app, flags, logging
from ml_collections import config_flags

from common.checks import NO_ROOM, InputError, Unwritable, load_settings
from common.stopping import GRACE, Stopped, catch_signals, where_saved

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))


def run(main, name: str) -> None:
    """Runs main(config, workdir, resume) with what --config=, --config.<field>= and so on say.

    What the user can mend ends as one line on stderr and exit status 1; Ctrl-C and SIGTERM with
    130 and 143.
    """
    if {"-h", "-help", "--help"} & set(sys.argv):
        print(_usage(name))
        return
    default = os.path.join(ROOT, "configs", f"{name}.py")
    started = []
    try:
        config = config_flags.DEFINE_config_file("config", default)
        workdir = flags.DEFINE_string("workdir", None, "run folder")
        resume = flags.DEFINE_bool("resume", True, "go on with an unfinished run in the run folder")
        hosts = flags.DEFINE_string("distributed", None, "auto, or <host>:<port>,<processes>,<i>")

        def parse(argv):
            rest = flags.FLAGS(argv)
            config.value.keys()  # a file that could not be loaded raises here
            missing = set(_settings(name).get_config()) - set(config.value)
            if missing:
                raise ValueError(
                    f"the settings file given by --config lacks {', '.join(sorted(missing))}: "
                    f"give one for {name}, for example --config=configs/{name}.py:hopper-medium-v2"
                )
            if any(arg.startswith("--config.task") for arg in argv):
                raise ValueError(f"the task is chosen by --config=configs/{name}.py:<task>")
            if len(rest) > 1:
                raise ValueError(f"'{rest[1]}' is no flag: settings are given as --config.<field>=")
            _check_types(config.value, _settings(name).get_config())
            return rest

        def start(_):
            started.append(True)
            logging.set_verbosity(logging.WARNING)
            given = config_flags.get_override_values(flags.FLAGS["config"])
            if config.value.offline_checkpoint and not flags.FLAGS["config"].present:
                restore_settings(config.value, given)
            keep_programs(config.value.cache_dir)
            folder = workdir.value
            if hosts.value:
                join_hosts(hosts.value, config.value)
                folder = folder and os.path.join(folder, str(config.value.seed))
            main(config.value, folder, resume.value)
            sys.stdout.flush()  # here a full disk or a pipe that is closed can still be told

        catch_signals()
        app.run(start, flags_parser=parse)
    except (Stopped, Exception) as error:
        _end(error, name, bool(started))


def _end(error, name, is_started):
    """Ends the process with one sentence; raises the error again where it is a fault of ours."""
    if isinstance(error, Stopped):
        _leave(error, name)
    text = "nobody reads what is printed any more: the same command goes on"
    if isinstance(error, OSError) and error.errno in NO_ROOM:
        error = Unwritable(error.filename or "what is printed", error)
    if isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in str(error):
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        error = InputError(
            f"out of memory ({reason}): lower --config.num_seeds or batch_size, in another "
            "--workdir, or give fewer rows"
        )
    if isinstance(error, (BrokenPipeError, Unwritable)):
        text = error if isinstance(error, Unwritable) else text
        for stream in (sys.stderr, sys.stdout):  # if it is not the one that is full
            with contextlib.suppress(OSError):
                print(f"{name}: {text}", file=stream, flush=True)
                break
        os._exit(1)  # open files would try again, and fill the screen
    if isinstance(error, InputError):
        sys.exit(f"{name}: {error}")
    if is_started:  # not about the command line
        raise error
    sys.exit(f"{name}: {_one_line(error, name)}")


def _check_types(config, like):
    """Raises ValueError for a field of another type than the script's own settings give it."""
    for field in like:
        value, kind = config[field], like.get_type(field)
        number = kind is float and isinstance(value, int) and not isinstance(value, bool)
        if not (value is None or type(value) is kind or number or kind is type(None)):
            raise ValueError(f"--config.{field}={value!r} must be of type {kind.__name__}")


def _leave(stopped, name):
    """Ends the process, without waiting for the program under way."""
    where = where_saved()
    goes_on = f"goes on from {where}" if where else "starts anew, for nothing was due to be saved"
    with contextlib.suppress(OSError):
        print(f"{name}: stopped by {stopped}: the same command {goes_on}", flush=True)
    if jax.distributed.is_initialized() and not jax.process_index():
        time.sleep(GRACE)  # the others end with this one, and may be saving
    os._exit(stopped.status)


def restore_settings(config, given) -> None:
    """Gives `config` the settings of the run in `offline_checkpoint`, then those given."""
    settings = load_settings(config.offline_checkpoint) | {
        "offline_checkpoint": config.offline_checkpoint
    }
    with config.ignore_type():
        for field in set(config) & set(settings):
            value = settings[field]
            config[field] = tuple(value) if isinstance(value, list) else value
    config.update(given)  # afterwards: a field may have two names


def keep_programs(cache_dir: str) -> None:
    """Compiled programs go to `cache_dir`/compiled, unless JAX_COMPILATION_CACHE_DIR is set."""
    # What does not fit into it, or was cut short, is compiled again: no reason for a page of text.
    warnings.filterwarnings("ignore", "Error (reading|writing) persistent compilation cache entry")
    if jax.config.jax_compilation_cache_dir:
        return
    path = os.path.join(os.path.expanduser(cache_dir), "compiled")
    try:
        os.makedirs(path, exist_ok=True)
        tempfile.TemporaryFile(dir=path).close()
        for entry in os.scandir(path):
            if not entry.stat().st_size:  # of a disk that was full
                os.remove(entry.path)
    except OSError as error:
        print(
            f"warning: compiled programs are not kept, for --config.cache_dir={cache_dir} cannot "
            f"be written ({error.strerror})",
            file=sys.stderr,
        )
        return
    jax.config.update("jax_compilation_cache_dir", path)


def _settings(name):
    return importlib.import_module(f"configs.{name}")


def _one_line(error, name) -> str:
    if isinstance(error, AttributeError) and "get_config" in str(error):
        return "the settings file given by --config has no get_config: give one that defines it"
    if isinstance(error, AttributeError):  # an unknown field
        field = str(error).split("\\n")[0].strip("'\"\\")
        known = sorted(_settings(name).get_config())
        if near := difflib.get_close_matches(field, known, 1):
            return f"no field '{field}': is {near[0]} meant?"
        return f"no field '{field}': --config.<field>= takes {', '.join(known)}"
    if isinstance(error, OSError):
        return (
            "no such settings file: give --config=<file>[:<task>], "
            f"for example --config=configs/{name}.py:hopper-medium-v2"
        )
    if (
        isinstance(error, flags.UnrecognizedFlagError)
        and error.flagname in _settings(name).get_config()
    ):
        return f"no flag --{error.flagname}: give --config.{error.flagname}=<value>"
    while "Traceback" in str(error) and error.__context__:
        error = error.__context__
    text = " ".join(str(error).split())
    if isinstance(error, (SyntaxError, ImportError, NameError, KeyError)):
        text = f"the settings file given by --config cannot be loaded ({text})"
    for pattern, words in REWORDED:
        text = re.sub(pattern, words, text)
    return text


REWORDED = (
    (r".*invalid literal for int.*base 10: '(.*)'.*", r"'\1' is no whole number: write it in full"),
    (r".*Non-boolean argument to boolean flag', '(.*)'.*", r"'\1' is neither True nor False"),
    (r".*in argv before a value for --config.*",
     "--config=<file>[:<task>] comes before any --config.<field>="),
)  # fmt: skip


def join_hosts(hosts: str, config) -> None:
    """Makes this process one of several that share the seeds, and `config` that of its own share.

    hosts: "auto" where JAX finds the others itself (SLURM, a TPU pod), or the first process's
    address, how many there are and which this is: "<host>:<port>,<processes>,<i>". Raises
    InputError when that cannot be read or the seeds cannot be shared evenly.
    """
    flag = f"--distributed={hosts}"
    jax.config.update("jax_enable_preemption_service", False)  # it would take SIGTERM
    # The first to end waits for the last, and seeds differ in how long their episodes are.
    initialize = functools.partial(jax.distributed.initialize, shutdown_timeout_seconds=86_400)
    parts = hosts.split(",")
    if config.offline_checkpoint:
        raise InputError(f"{flag} goes with new runs: go on from each process's folder by itself")
    if parts == ["auto"]:
        try:
            initialize()
        except (RuntimeError, ValueError) as error:
            reason = " ".join(str(error).split())
            raise InputError(
                f"{flag} finds no cluster ({reason}): give <host>:<port>,<processes>,<i>"
            ) from None
    elif len(parts) == 3 and parts[1].isdigit() and parts[2].isdigit():
        count, index = int(parts[1]), int(parts[2])
        if not index < count:
            raise InputError(
                f"{flag} is no process of {count}: the last number is below the second"
            )
        _check_shares(flag, config, count)
        initialize(parts[0], count, index)
    else:
        raise InputError(f"{flag} cannot be read: give auto, or <host>:<port>,<processes>,<i>")
    _check_shares(flag, config, jax.process_count())
    config.num_seeds //= jax.process_count()
    config.seed += jax.process_index() * config.num_seeds


def _check_shares(flag, config, count):
    if config.num_seeds % count:
        raise InputError(
            f"{flag}: --config.num_seeds={config.num_seeds} cannot be shared by {count} processes: "
            "give a multiple"
        )


def _usage(name) -> str:
    module = _settings(name)
    fields = [f"  --config.{field}={value}" for field, value in module.get_config().items()]
    return "\n".join(
        [
            sys.modules["__main__"].__doc__,
            f"--config=configs/{name}.py:<task>, first; tasks: {', '.join(module.TASKS)}",
            f"--workdir=<folder>, by default runs/{name}/<task>/<seed>",
            "--noresume: sets an unfinished run there aside, instead of going on with it",
            "--distributed=auto, or <host>:<port>,<processes>,<i>: processes that share the seeds",
            "Fields, as the task demo sets them:",
            *fields,
        ]
    )
