"""Run folders: whose they are, what they hold, and how an earlier run makes room."""

import errno
import glob
import json
import os
import sys
from pathlib import Path

import filelock

from common.run.errors import InputError, explained


def check_same(theirs: dict, config, free, what: str, fix: str) -> None:
    """Raises InputError unless the settings are `theirs`, except in the `free` fields."""
    mine = as_json(config.to_dict())
    if foreign := sorted(set(theirs) - set(mine)):
        raise InputError(f"{what} of another script, with {', '.join(foreign)}: {fix}")
    fields = [x for x in sorted(set(mine) - set(free)) if mine[x] != theirs.get(x)]
    if fields:
        differing = ", ".join(f"{x}={mine[x]} (there {theirs.get(x)})" for x in fields)
        raise InputError(f"{what} with other settings than {differing}: {fix}")


def as_json(content):
    """The content as JSON gives it back, with null for numbers that JSON cannot hold."""
    return json.loads(json.dumps(content), parse_constant=lambda _: None)


def absolute(path: str, flag: str = "--workdir") -> str:
    """The path in full, with `~` expanded. Raises InputError for one that names nothing."""
    full = os.path.expanduser(path)
    if not path or full.startswith("~"):
        raise InputError(f"{flag}={path} names no folder: give a full path, or set HOME for ~")
    return os.path.abspath(full)


def load_settings(workdir: str, flag: str = "--config.offline_checkpoint") -> dict:
    """The settings of the run in `workdir`. Raises InputError when it holds no run."""
    path = os.path.join(absolute(workdir, flag), "config.json")
    what = f"{flag}={workdir} is not a run folder, because {path} is not readable"
    near = os.path.join(workdir, "0") if has_run(os.path.join(workdir, "0")) else "another folder"
    with explained(what, f"name {near}"), open(path) as file:
        return dict(json.load(file))


def has_run(workdir: str) -> bool:
    """Whether there is a run that is worth keeping in `workdir`."""
    kept = ("scores.csv", "*.msgpack", "unfinished/*.msgpack", "unfinished/*.broken")
    return any(glob.glob(os.path.join(glob.escape(workdir), pattern)) for pattern in kept)


def check_folder(workdir: str, config, resume: bool, may_change) -> None:
    """Raises InputError if no run can be made in `workdir`, or resumed with other `may_change`."""
    flag, fix = f"--workdir={workdir}", "choose another folder"
    source = os.path.realpath(config.offline_checkpoint or "")
    if config.offline_checkpoint and os.path.realpath(workdir) == source:
        raise InputError(f"{flag} is the run of --config.offline_checkpoint: {fix}")
    with explained(f"{flag} cannot be used", fix):
        found = set(os.listdir(workdir)) if os.path.exists(workdir) else set()
    found -= {"lock", "config.json.tmp"}
    if found and found.isdisjoint({"config.json", "scores.csv", "unfinished"}):
        raise InputError(f"{flag} holds files that are no run: {fix}")
    if resume and has_run(workdir):
        fix = f"give the ones there, {fix}, or set it aside with --noresume"
        settings = load_settings(workdir, "--workdir")
        check_same(settings, config, may_change, f"{flag} holds a run", fix)


def lock_folder(workdir: str) -> filelock.FileLock:
    """Locks a run folder, or warns where it cannot be locked. Raises InputError if it is in use."""
    lock = filelock.FileLock(os.path.join(workdir, "lock"))
    try:
        lock.acquire(timeout=0)
    except filelock.Timeout:
        fix = "wait for it, stop it, or choose another folder"
        raise InputError(f"--workdir={workdir} is in use by another process: {fix}") from None
    except OSError as error:
        if error.errno != errno.ENOLCK:
            raise
        what = f"{workdir} cannot be locked ({error.strerror}): start one run at a time"
        print(f"warning: {what}", file=sys.stderr, flush=True)
    return lock


def set_aside(workdir: str) -> bool:
    """Renames an earlier run's folder to <workdir>.1, .2, ...; returns whether there was one."""
    workdir, number = os.path.realpath(workdir), 1
    if not has_run(workdir):
        return False
    while os.path.exists(aside := f"{workdir}.{number}"):
        number += 1
    os.rename(workdir, aside)
    os.makedirs(workdir)
    Path(aside, "lock").unlink(missing_ok=True)
    print(f"the earlier run in {workdir} is now {aside}", file=sys.stderr)
    return True


def write_json(path: str, content) -> None:
    write_file(path, json.dumps(as_json(content), indent=2).encode() + b"\n")


def write_file(path: str, data: bytes) -> None:
    """Replaces a file as a whole. Raises OSError."""
    with open(f"{path}.tmp", "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(f"{path}.tmp", path)
