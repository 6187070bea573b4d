"""The command line of the scripts: settings in, one sentence and an exit status out."""

import argparse
import ast
import contextlib
import difflib
import errno
import os
import runpy
import sys
import threading
import warnings
from pathlib import Path

import jax
import ml_collections

from common.run.errors import NO_ROOM, Diverged, InputError, Stopped, Unwritable
from common.run.folder import close_run, explain
from common.run.settings import scale_settings
from common.run.stopping import catch_signals
from common.run.workdir import load_settings

ROOT = Path(__file__).parents[2]
TRUTH = {"true": True, "false": False}
READ = {int: int, float: float, bool: lambda text: TRUTH[text.lower()], tuple: ast.literal_eval}


def run(main, name: str) -> None:
    """Runs main(config, workdir, resume) as the command line says.

    A user's mistake ends the process with one sentence and status 1, Ctrl-C with status 130 and
    SIGTERM with 143.
    """
    catch_signals()
    threading.excepthook = _report_thread
    try:
        options, settings = _parse(name)
        config, workdir = load_config(name, options.config, settings), options.workdir
        warnings.filterwarnings("ignore", ".*persistent compilation cache")  # compiles again
        if not jax.config.jax_compilation_cache_dir:
            folder = os.path.join(os.path.expanduser(config.cache_dir), "compiled")
            jax.config.update("jax_compilation_cache_dir", folder)
        if options.distributed:
            join_hosts(options.distributed, config)
            workdir = workdir and os.path.join(workdir, str(config.seed))
        main(config, workdir, options.resume)
        sys.stdout.flush()
    except Stopped as stopped:
        where = close_run()
        how = f"resumes from {where}" if where else "starts again, because nothing was saved"
        with contextlib.suppress(OSError):  # whoever reads may be gone
            print(f"{name}: stopped by {stopped}: the same command {how}", flush=True)
        os._exit(stopped.status)  # at once: other hosts or a closed pipe would hold it up
    except Exception as error:
        _fail(explain(error) if isinstance(error, Diverged) else error, name)
    finally:
        close_run()


def _report_thread(failure):
    if not issubclass(failure.exc_type, OSError):  # a full disk, which the run reports by itself
        threading.__excepthook__(failure)


def _fail(error, name):
    """Ends the process with one sentence; raises errors that are not the user's."""
    close_run()  # and with it the progress bar
    if isinstance(error, OSError) and error.errno in (*NO_ROOM, errno.EPIPE, errno.EACCES):
        error = Unwritable(error.filename or "the output", error)
    if isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in str(error):
        reason = " ".join(str(error).split())[:200]
        error = InputError(f"out of memory ({reason}): lower --config.num_seeds or batch_size")
    if not isinstance(error, InputError):
        raise error
    for stream in (sys.stderr, sys.stdout):
        with contextlib.suppress(OSError):  # the other one may be on the full disk
            print(f"{name}: {error}", file=stream, flush=True)
            break
    if isinstance(error, Unwritable):
        os._exit(1)  # without trying to flush open files again
    sys.exit(1)


def _refuse(message):
    raise InputError(message)


def _parse(name):
    """The flags, and the settings among the arguments."""
    module = _load_file(f"{ROOT}/configs/{name}.py")
    fields = "\n".join(f"  --config.{x}={y}" for x, y in module["get_config"]().items())
    layout = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(name, formatter_class=layout, allow_abbrev=False)
    parser.description = sys.modules["__main__"].__doc__
    tasks = ", ".join(module.get("TASKS", ()))
    parser.epilog = f"tasks: {tasks}\nfields, as the task demo sets them:\n{fields}"
    parser.error = _refuse
    add = parser.add_argument
    add("--config", metavar="FILE:TASK", help=f"settings, such as configs/{name}.py:<task>")
    add("--workdir", help=f"run folder, by default runs/{name}/<task>/<seed>")
    add("--noresume", dest="resume", action="store_false", help="set an unfinished run aside")
    add("--distributed", help="auto, or <host>:<port>,<processes>,<i>: share the seeds")
    return parser.parse_known_args()


def load_config(name: str, file: str | None, settings: list[str]):
    """The ConfigDict of <file>[:<task>] with --config.<field>=<value> settings applied.

    Without a file: the script's own, or the settings of the run in offline_checkpoint. If the
    settings shorten offline_steps, the others are scaled. Raises InputError.
    """
    config, given = _get_config(f"{ROOT}/configs/{name}.py"), {}
    if file:
        known, config = config, _get_config(*file.rsplit(":", 1))
        if missing := sorted(set(known) - set(config)):
            fields = ", ".join(missing)
            raise InputError(f"--config={file} lacks {fields}: add them, or give one for {name}")
        _check_types(config, known)
    for setting in settings:
        field, _, text = setting.removeprefix("--config.").partition("=")
        if not setting.startswith("--config.") or "=" not in setting:
            field = field.lstrip("-") if field.lstrip("-") in config else "<field>"
            raise InputError(f"unknown flag {setting}: a setting is --config.{field}=<value>")
        given[field] = _read(config, field, text)
    if given.get("offline_checkpoint") and not file:
        for field, value in load_settings(given["offline_checkpoint"]).items():
            with config.ignore_type():
                if field in config:
                    config[field] = tuple(value) if isinstance(value, list) else value
    config.update(given)
    scale_settings(config, given)
    return config


def _read(config, field, text):
    """The value of a field from the command line."""
    if field == "task" or field not in config:
        near = difflib.get_close_matches(field, list(config), 2) or ["--help"]
        near = " or ".join(near) if field != "task" else "--config=<file>:<task>"
        raise InputError(f"no field '{field}': did you mean {near}?")
    kind = config.get_type(field)
    try:
        value = READ.get(kind, str)(text)
        if not isinstance(value, kind):
            raise ValueError
        return value
    except (ValueError, SyntaxError, KeyError, TypeError):
        raise InputError(f"--config.{field}={text} must be of type {kind.__name__}") from None


def _check_types(config, known):
    """Raises InputError for a field of another type than the script's own settings have."""
    for field in known:
        kind, found = known.get_type(field), config.get_type(field)
        if found is not kind and (kind, found) != (float, int):
            raise InputError(f"--config.{field}={config[field]!r} must be of type {kind.__name__}")


def _get_config(path, *task):
    try:
        return ml_collections.ConfigDict(_load_file(path)["get_config"](*task))
    except InputError:
        raise
    except Exception as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise InputError(f"--config={':'.join([path, *task])} fails: {reason}") from None


def _load_file(path):
    try:
        return runpy.run_path(path)
    except Exception as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise InputError(f"the settings file {path} cannot be loaded: {reason}") from None


def join_hosts(hosts: str, config) -> None:
    """Makes this process one of several that share the seeds, and config that of its share.

    hosts: "auto" where JAX finds the others itself, or "<address of the first>,<processes>,<i>".
    """
    flag, auto = f"--distributed={hosts}", hosts == "auto"
    address, count, i = [*hosts.split(","), "", ""][:3]
    if not auto and not (count.isdigit() and i.isdigit() and int(i) < int(count)):
        raise InputError(f"{flag} cannot be read: give auto, or <host>:<port>,<processes>,<i>")
    if config.offline_checkpoint:
        raise InputError(f"{flag} is for new runs: resume from each process's folder by itself")
    jax.config.update("jax_enable_preemption_service", False)  # it would take SIGTERM
    if auto or config.num_seeds % int(count) == 0:
        place = {} if auto else {"num_processes": int(count), "process_id": int(i)}
        try:  # the first to end waits for the last, and episodes differ in length
            jax.distributed.initialize(
                None if auto else address, shutdown_timeout_seconds=86_400, **place
            )
        except (RuntimeError, ValueError) as error:
            reason = " ".join(str(error).split())
            raise InputError(f"{flag} finds no cluster ({reason})") from None
        count = jax.process_count()
    if config.num_seeds % int(count):
        raise InputError(f"{flag}: {count} processes cannot share {config.num_seeds} seeds evenly")
    config.num_seeds //= int(count)
    config.seed += jax.process_index() * config.num_seeds
