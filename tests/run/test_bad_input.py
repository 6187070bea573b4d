"""Bad input at the command line: one sentence with the fix, exit status 1, nothing touched."""

import errno
import importlib
import os
import pickle
import re
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import gymnasium_robotics  # noqa: F401  (prints warnings when it is imported)
import jax
import numpy as np
import pytest
from toys import tiny_config, toy_columns, write_hdf5, write_settings

from common.run import cli

ROOT = Path(__file__).parents[2]
COMPILED = []  # programs that this process has compiled
jax.monitoring.register_event_duration_secs_listener(
    lambda name, *_, **__: COMPILED.append(name) if "backend_compile" in name else None
)


@pytest.fixture
def command(monkeypatch, capfd):
    """Runs a command line in this process: exit status, stdout and stderr."""
    monkeypatch.setattr(cli, "catch_signals", lambda: None)
    monkeypatch.setattr(os, "_exit", sys.exit)
    for owner, name in ((threading, "excepthook"), (sys, "stdout"), (sys, "stderr")):
        monkeypatch.setattr(owner, name, getattr(owner, name))  # is put back

    def command(script, *arguments):
        monkeypatch.setattr(sys, "argv", [f"{script}.py", *arguments])
        capfd.readouterr()
        try:
            cli.run(importlib.import_module(script).main, script)
        except SystemExit as end:
            return end.code, *capfd.readouterr()
        return 0, *capfd.readouterr()

    return command


def files(folder):
    """Every file and folder below, with what tells whether it was written to."""
    found = {}
    for parent, _, names in os.walk(folder):
        found[parent] = sorted(names)
        for name in names:
            status = os.lstat(os.path.join(parent, name))
            found[os.path.join(parent, name)] = (status.st_size, status.st_mtime_ns)
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The files that the commands below name."""
    folder = tmp_path_factory.mktemp("bad")
    columns = toy_columns(120)
    data = write_hdf5(folder / "toy.hdf5", **columns)
    write_hdf5(folder / "other.hdf5", **toy_columns(120, seed=1))
    columns["rewards"][3] = np.inf
    write_hdf5(folder / "inf.hdf5", **columns)
    for script in ("ssar_td3bc", "ssar_cql"):
        write_settings(folder / f"{script}.py", data, script, offline_steps=20, full_length=20)
    (folder / "fails.py").write_text("import nowhere\n")
    (folder / "text.py").write_text('def get_config(): return {"loosen_bound": "yes"}\n')
    (folder / "thesis").mkdir()
    for name in ("file", "thesis/chapter.tex"):
        (folder / name).write_text("years of work")
    config = tiny_config(data, offline_steps=20, full_length=20)
    importlib.import_module("ssar_td3bc").main(config, str(folder / "finished"))
    for name in ("pickled", "mistyped", "unfinished"):
        shutil.copytree(folder / "finished", folder / name)
    with open(folder / "pickled" / "checkpoint.msgpack", "wb") as file:
        pickle.dump({"state": {}}, file)
    (folder / "mistyped" / "config.json").write_text('{"seed": ')
    (folder / "unfinished" / "unfinished").mkdir()
    (folder / "unfinished" / "unfinished" / "offline-20.msgpack").write_bytes(b"")
    return folder


def field(**values):
    return [f"--config.{name}={value}" for name, value in values.items()]


def file(name):
    return field(dataset_path=f"{{folder}}/{name}.hdf5")


ONLINE = field(online_steps=40)
GO_ON = "--config.offline_checkpoint={folder}/"
RUN = "--workdir={folder}/"

# What is given beside --config=<the toy's settings> and --workdir=<a new folder>, and words of the
# one sentence that it ends with.
TABLE = {
    # --- data and environments ---
    "no file": (file("none"), "none.hdf5"),
    "infinite": (file("inf"), "'rewards' is not finite in float32 at row 3"),
    "nothing trusted": (field(return_threshold=1e6), "=return trusts nothing in {folder}/toy.h"),
    # --- settings ---
    "a tuple that is none": (field(hidden_dims=256), "of type tuple, such as 16,16"),
    "a negative length": (field(offline_steps=-10), "offline_steps=-10 must be at least 0"),
    "a float for an int": (field(offline_steps="1.5"), "offline_steps=1.5 must be of type int"),
    "no truth value": (field(loosen_bound="no"), "loosen_bound=no must be of type bool"),
    "a text for a truth": ("--config={folder}/text.py", "has a value of a wrong type (TypeError"),
    "a file that fails": ("--config={folder}/fails.py", "loaded (ModuleNotFoundError: No mod"),
    "no settings file": ("--config=configs/none.py", "=configs/<script>.py:<task>"),
    "the other script's": (f"--config={ROOT}/configs/ssar_cql.py:demo", "remove backup_entropy,"),
    "no such task": (f"--config={ROOT}/configs/ssar_td3bc.py:hoper", "unknown task 'hoper' in "),
    "the task as a field": (field(task="x"), "did you mean --config=<file>:<task>?"),
    "a typing error": (field(nseeds=2), "no field 'nseeds': did you mean seed or num_seeds?"),
    "no such field": (field(zzz=3), "no field 'zzz': see --help"),
    "no such flag": ("--confg=x", "unknown flag --confg=x: a setting is --config.<field>=<value>"),
    "a field as a flag": ("--seed=3", "unknown flag --seed=3: a setting is --config.seed=<value>"),
    "a flag without a value": ("--workdir", "expected one argument"),
    # --- several processes ---
    "no cluster": ("--distributed=two", "--distributed=two cannot be used (ValueError: not"),
    "several processes from a checkpoint": (
        ["--distributed=localhost:9,2,0", GO_ON + "finished"], "cannot fine-tune: do that in each"
    ),
    # --- run folders ---
    "nobody's home": ("--workdir=~nobody_here/x", "~nobody_here/x names no folder: give"),
    "a file for a folder": (RUN + "file", "file cannot be used (NotADirectoryError"),
    "somebody's files": (RUN + "thesis", "thesis holds files that are no run: choose another"),
    "not to be written": ("--workdir=/proc/x", "/proc/x cannot be made (FileNotFoundError"),
    "another run's": (
        [RUN + "unfinished", *field(seed=3)],
        "holds a run with other settings than seed=3 (there 0): give the ones there, choose",
    ),
    # --- offline checkpoints ---
    "no run to continue": ([GO_ON + "none", *ONLINE], "none is not a run folder, because"),
    "nothing to do": (GO_ON + "finished", "online_steps=0 leaves nothing to do: give"),
    "other settings": (
        [GO_ON + "finished", *ONLINE, *field(n_end=5.0)],
        "with other settings than n_end=5.0 (there 3.0): use that run's script",
    ),
    "other data": ([GO_ON + "finished", *ONLINE, *file("other")], "was trained on other data"),
    "a pickled checkpoint": ([GO_ON + "pickled", *ONLINE], "its checksum does not match"),
    "settings cut short": ([GO_ON + "mistyped", *ONLINE], "config.json is not readable (JSON"),
    "the other script's run": (
        ("ssar_cql", [GO_ON + "finished", *ONLINE]), "is a run of another script, with expl_noise"
    ),
    "onto itself": (
        [GO_ON + "finished", RUN + "finished", *ONLINE],
        "is the run of --config.offline_checkpoint: choose another folder",
    ),
}  # fmt: skip
LATE = ("nothing trusted", "other data", "a pickled checkpoint")  # found in a folder of their own


@pytest.mark.parametrize("case", TABLE)
def test_bad_input_is_one_sentence_and_touches_nothing(case, command, folder):
    given, words = TABLE[case]
    script, given = given if isinstance(given, tuple) else ("ssar_td3bc", given)
    given = [given] if isinstance(given, str) else given
    fill = lambda text: text.replace("{folder}", str(folder))
    arguments = [f"--workdir={folder}/new"]
    if not any(argument.startswith("--config=") for argument in given):
        arguments = [f"--config={folder}/{script}.py", *arguments]
    before, compiled = files(folder), len(COMPILED)
    status, out, err = command(script, *arguments, *map(fill, given))
    if case in LATE:
        shutil.rmtree(folder / "new")
    assert status == 1, out + err
    assert err.startswith(f"{script}: ") and err.endswith("\n")
    assert err.count("\n") == 1 and len(err) < 800
    assert fill(words) in err
    assert "Traceback" not in err and not re.search(r"\d+%", err)
    assert files(folder) == before and (len(COMPILED) == compiled or case in LATE)


@pytest.mark.parametrize("script", ["ssar_td3bc", "ssar_cql"])
def test_help_names_every_setting(script, command):
    status, out, _ = command(script, "--help")
    assert status == 0
    fields = [f"--config.{field}=" for field in tiny_config(script=script)]
    for words in ("--workdir", "--noresume", "hopper-medium-v2", *fields):
        assert words in out


FAILURES = {
    "out of memory (MemoryError: 3 TiB): lower --config.num_seeds": MemoryError("3 TiB"),
    "out of memory (RuntimeError: RESOURCE": RuntimeError("RESOURCE_EXHAUSTED: no"),
    "/x cannot be written (full): free space": OSError(errno.ENOSPC, "full", "/x"),
}


@pytest.mark.parametrize("words", FAILURES)
def test_too_little_memory_or_disk_is_one_sentence(words, command, monkeypatch):
    def main(*_):
        raise FAILURES[words]

    monkeypatch.setattr("ssar_cql.main", main)
    status, _, err = command("ssar_cql")
    assert status == 1 and err.startswith(f"ssar_cql: {words}") and err.count("\n") == 1


OUTPUTS = {
    "a full disk": "{command} >/dev/full 2>&1",
    "no output": "{command} >&- 2>&-",
    "a reader that leaves": "{command} | head -c 1 >/dev/null; exit ${{PIPESTATUS[0]}}",
    "a reader of ASCII": "PYTHONIOENCODING=ascii {command}",
}


@pytest.mark.slow
@pytest.mark.parametrize("output", OUTPUTS)
def test_output_never_decides_about_the_run(output, folder):
    env = os.environ | {"PYTHONPATH": str(ROOT / "tests")}
    env.pop("PYTHONUNBUFFERED", None)
    workdir = folder / f"β_{output.replace(' ', '_')}"
    command = f"{sys.executable} {ROOT}/ssar_td3bc.py --config={folder}/ssar_td3bc.py --workdir="
    line = OUTPUTS[output].format(command=f"{command}{workdir}")
    done = subprocess.run(["bash", "-c", line], env=env, capture_output=True, text=True)
    assert done.returncode == 0 and (workdir / "results.json").exists(), done.stderr
    assert "Traceback" not in done.stderr and "Exception" not in done.stderr
