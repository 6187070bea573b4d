"""The command line of the scripts: settings in, one sentence and an exit status out."""

import argparse
import ast
import contextlib
import difflib
import errno
import inspect
import os
import re
import runpy
import sys
import threading
import warnings
from pathlib import Path

import jax
import ml_collections

from common.run.errors import InputError, brief, explained
from common.run.folder import close_run
from common.run.settings import default_folder, scale_settings
from common.run.stopping import Stopped, catch_signals
from common.run.workdir import absolute, load_settings

ROOT = Path(__file__).parents[2]
# The system refuses to write: another folder or more space is needed.
NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO, errno.EACCES)


class Output:
    """A stream that never decides about the run: what its reader does not take is dropped."""

    def __init__(self, stream):
        self._stream = stream or open(os.devnull, "w")
        if hasattr(self._stream, "reconfigure"):  # a notebook's stream takes any text
            self._stream.reconfigure(errors="backslashreplace")

    def __getattr__(self, name):
        return getattr(self._stream, name)

    def write(self, text):
        try:
            self._stream.write(text)
            self._stream.flush()
        except (OSError, ValueError):  # full, gone or closed
            nowhere = open(os.devnull, "w")  # what waits in a buffer goes there too
            with contextlib.suppress(OSError, ValueError):
                os.dup2(nowhere.fileno(), self._stream.fileno())
            self._stream = nowhere


def run(main, name: str) -> None:
    """Runs main(config, workdir, resume) as the command line says.

    A user's mistake ends it with one sentence and status 1, Ctrl-C with 130, SIGTERM with 143.
    """
    sys.stdout, sys.stderr = Output(sys.stdout), Output(sys.stderr)
    catch_signals()
    os.environ["MPLBACKEND"] = "agg"  # that of a notebook's shell may not be installed here
    # The run itself reports a full disk that a writer's thread meets.
    threading.excepthook = lambda x: issubclass(x.exc_type, OSError) or threading.__excepthook__(x)
    workdir = None
    try:
        options, settings = _parse(name)
        config = load_config(name, options.config, settings)
        if options.distributed:
            join_hosts(options.distributed, config)
        workdir = default_folder(name, config, settings)
        if options.workdir is not None:
            own = [str(config.seed)] if options.distributed else []
            workdir = os.path.join(absolute(options.workdir), *own)
        warnings.filterwarnings("ignore", ".*persistent compilation cache")  # compiles again
        if not jax.config.jax_compilation_cache_dir:
            folder = os.path.join(absolute(config.cache_dir, "--config.cache_dir"), "compiled")
            jax.config.update("jax_compilation_cache_dir", folder)
        main(config, workdir, options.resume)
    except Stopped as stopped:
        where = close_run()
        how = f"resumes from {where}" if where else "resumes what was saved, or else starts again"
        print(f"{name}: stopped by {stopped}: the same command {how}", flush=True)
        os._exit(stopped.status)  # at once: other hosts would hold it up
    except Exception as error:
        _fail(error, name, workdir)
    finally:
        close_run()


def _fail(error, name, workdir):
    """Ends the process with one sentence; raises errors that are not the user's."""
    close_run()  # and with it the progress bar
    if isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in str(error):
        reason = f"out of memory ({brief(error)})"
        error = InputError(f"{reason}: lower --config.num_seeds or batch_size")
    is_full = isinstance(error, OSError) and error.errno in NO_ROOM
    if is_full:
        where = error.filename or workdir
        fix = "free space or fix its permissions; then give the same command to resume"
        error = InputError(f"{where} cannot be written ({error.strerror}): {fix}")
    if not isinstance(error, InputError):
        raise error
    print(f"{name}: {error}", file=sys.stderr, flush=True)
    if is_full:
        os._exit(1)  # without trying to flush open files again
    sys.exit(1)


def _parse(name):
    """The flags, and the settings among the arguments."""
    module, _ = _load(f"{ROOT}/configs/{name}.py")
    layout = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(name, formatter_class=layout, exit_on_error=False)
    parser.description = sys.modules["__main__"].__doc__
    # The settings file explains every field; a variant's may not.
    source = inspect.getsource(module["defaults"]) if "defaults" in module else ""
    fields = source.partition("ConfigDict()\n")[2].partition("    return c\n")[0]
    fields = re.sub(r"c\.(\w+) = (config_dict\.placeholder\(\w+\))?", r"--config.\1=", fields)
    tasks = ", ".join(module.get("TASKS", ()))
    parser.epilog = f"tasks: {tasks}\nfields and defaults; tasks change some:\n{fields}"
    add = parser.add_argument
    add("--config", metavar="FILE:TASK", help=f"settings, such as configs/{name}.py:<task>")
    add("--workdir", help=f"run folder, by default runs/{name}/<task and settings>/<seed>")
    add("--noresume", dest="resume", action="store_false", help="set an earlier run aside")
    add("--distributed", help="auto, or <host>:<port>,<processes>,<i>: share the seeds")
    with explained("unknown command line", "see --help"):
        return parser.parse_known_args()


def load_config(name: str, file: str | None, settings: list[str]):
    """The ConfigDict of <file>[:<task>] with --config.<field>=<value> applied, then scaled.

    Fields that a file leaves out are those of the script's task custom. Without a file: the demo,
    or the settings of the run in offline_checkpoint. Raises InputError.
    """
    own, given = f"{ROOT}/configs/{name}.py", {}
    module, config = _load(own)
    if file is not None and "custom" in module.get("TASKS", ()):
        _, config = _load(own, "custom")
    if file is not None:
        theirs = _load(*file.rsplit(":", 1))[1].to_dict()
        if foreign := sorted(set(theirs) - set(config)):
            raise InputError(f"--config={file}: remove {', '.join(foreign)}, which {name} lacks")
        with explained(f"--config={file} has a value of a wrong type", "see --help for the types"):
            config.update(theirs)
    for setting in settings:
        field, _, text = setting.removeprefix("--config.").partition("=")
        if not setting.startswith("--config.") or "=" not in setting:
            field = field.lstrip("-") if field.lstrip("-") in config else "<field>"
            raise InputError(f"unknown flag {setting}: a setting is --config.{field}=<value>")
        given[field] = _read(config, field, text)
    if given.get("offline_checkpoint") and not file:
        saved = load_settings(given["offline_checkpoint"])
        with explained("--config.offline_checkpoint has other settings", "use that run's script"):
            config.update({field: value for field, value in saved.items() if field in config})
    elif not file and given.get("dataset", given.get("dataset_path") or "demo") != "demo":
        task = given["dataset"] if given.get("dataset") in module.get("TASKS", ()) else "custom"
        fix = f"for these data give --config=configs/{name}.py:{task}"
        print(f"note: the settings are the demo's; {fix}", flush=True)
    config.update(given)
    scale_settings(config, given)
    return config


def _read(config, field, text):
    """The value of a field from the command line."""
    if field == "task" or field not in config:
        near = " or ".join(difflib.get_close_matches(field, list(config), 2))
        near = "--config=<file>:<task>" if field == "task" else near
        raise InputError(f"no field '{field}': {f'did you mean {near}?' if near else 'see --help'}")
    kind = config.get_type(field)
    if kind is str:
        return text
    try:
        given = ast.literal_eval(text.capitalize() if kind is bool else text)
        if kind(given) != given or isinstance(given, bool) != (kind is bool):  # 1e4 is an int too
            raise ValueError
        return kind(given)
    except (ValueError, SyntaxError, TypeError, OverflowError):
        example = ",".join(map(str, config[field] or ())) if kind is tuple else ""
        form = kind.__name__ + f", such as {example}" * bool(example)
        raise InputError(f"--config.{field}={text} must be of type {form}") from None


def _load(path, *task):
    """A settings file as a dictionary of its names, and the ConfigDict that it gives."""
    what, fix = f"the settings {':'.join([path, *task])} cannot be loaded", "fix or replace them"
    if not os.path.exists(path):
        fix = "write --config=configs/<script>.py:<task>"
    with explained(what, fix):
        module = runpy.run_path(path)
        tasks = module.get("TASKS", task)
        if task and task[0] not in tasks:
            near = " or ".join(difflib.get_close_matches(task[0], tasks, 2))
            fix = f"did you mean {near}?" if near else f"choose one of {', '.join(tasks)}"
            raise InputError(f"unknown task '{task[0]}' in {path}: {fix}")
        return module, ml_collections.ConfigDict(module["get_config"](*task))


def join_hosts(hosts: str, config) -> None:
    """Makes this process one of several that share the seeds, and config that of its share.

    hosts: "auto" where JAX finds the others itself, or "<address of the first>,<processes>,<i>".
    """
    flag = f"--distributed={hosts}"
    if config.offline_checkpoint:
        raise InputError(f"{flag} cannot fine-tune: do that in each process's folder separately")
    jax.config.update("jax_enable_preemption_service", False)  # it would take SIGTERM
    with explained(f"{flag} cannot be used", "give auto, or <host>:<port>,<processes>,<i>"):
        address, count, i = (None,) * 3 if hosts == "auto" else hosts.split(",")
        place = () if hosts == "auto" else (address, int(count), int(i))
        # The first to end waits for the last, and episodes differ in length.
        jax.distributed.initialize(*place, shutdown_timeout_seconds=86_400)
    count = jax.process_count()
    if config.num_seeds % count:
        raise InputError(f"{flag}: --config.num_seeds must be a multiple of {count} processes")
    config.num_seeds //= count
    config.seed += jax.process_index() * config.num_seeds
