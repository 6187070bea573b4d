"""Bad input at the command line: one sentence with the fix, exit status 1, nothing touched."""

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
from toys import tiny_config, toy_columns, write_hdf5

from common.run import InputError, cli

ROOT = Path(__file__).parents[2]
SETTINGS = """
def get_config(task=None):
    from toys import tiny_config
    return tiny_config({data!r}, {script!r}, offline_steps=20, full_length=20, **{more!r})
"""
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


TEXT = 'def get_config(): return {"loosen_bound": "yes"}'
TYPO = 'def get_config(): return {"n_ende": 2.0}'


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The files that the commands below name."""
    folder = tmp_path_factory.mktemp("bad")
    columns = toy_columns(120)
    data = write_hdf5(folder / "toy.hdf5", **columns)
    write_hdf5(folder / "other.hdf5", **toy_columns(120, seed=1))
    columns["rewards"][3] = np.inf
    write_hdf5(folder / "inf.hdf5", **columns)
    for name, path, more in (
        ("ssar_td3bc", data, {}),
        ("ssar_cql", data, {}),
        ("sly", data, {"task": "../x"}),
        ("free", None, {"dataset": None}),
    ):
        script = name if name.startswith("ssar") else "ssar_td3bc"
        (folder / f"{name}.py").write_text(SETTINGS.format(data=path, script=script, more=more))
    for name, text in (("nothing", "x = 3"), ("prose", "I would"), ("fails", "import nowhere"),
                       ("text", TEXT), ("typo", TYPO)):  # fmt: skip
        (folder / f"{name}.py").write_text(f"{text}\n")
    (folder / "thesis").mkdir()
    for name in ("file", "thesis/chapter.tex"):
        (folder / name).write_text("years of work")
    config = tiny_config(data, offline_steps=20, full_length=20)
    importlib.import_module("ssar_td3bc").main(config, str(folder / "finished"))
    for name in "broken swapped mistyped listed unfinished unnamed".split():
        shutil.copytree(folder / "finished", folder / name)
    (folder / "broken" / "checkpoint.msgpack").write_bytes(b"")
    with open(folder / "swapped" / "checkpoint.msgpack", "wb") as file:
        pickle.dump({"state": {}}, file)
    (folder / "mistyped" / "config.json").write_text('{"seed": ')
    (folder / "listed" / "config.json").write_text("[1]")
    (folder / "unfinished" / "unfinished").mkdir()
    (folder / "unfinished" / "unfinished" / "offline-20.msgpack").write_bytes(b"")
    os.remove(folder / "unnamed" / "config.json")
    return folder


def field(**values):
    return [f"--config.{name}={value}" for name, value in values.items()]


def file(name):
    return field(dataset_path=f"{{folder}}/{name}.hdf5")


ONLINE = field(online_steps=40)
GO_ON = "--config.offline_checkpoint={folder}/"
RUN = "--workdir={folder}/"
FREE = "--config={folder}/free.py"

# What is given beside --config=<the toy's settings> and --workdir=<a new folder>, and words of the
# one sentence that it ends with.
TABLE = {
    # --- data and environments ---
    "no file": (file("none"), "none.hdf5"),
    "infinite": (file("inf"), "'rewards' is not finite in float32 at row 3"),
    "unknown environment": (field(env="Hoper-v4"), "unknown environment 'Hoper-v4'"),
    "another robot": (field(env="Hopper-v4"), "but Hopper-v4 "),
    "no Minari id": ([FREE, *field(dataset="mujoco/none-v0")], "mujoco/none-v0"),
    "no data at all": (FREE, "task=toy needs data: give --config.dataset="),
    # --- settings ---
    "a tuple that is none": ("--config.hidden_dims=256", "of type tuple, such as 16,16"),
    "a negative length": ("--config.offline_steps=-10", "offline_steps=-10 must be at least 0"),
    "no full length": ("--config.full_length=0", "full_length=0 must be at least 1"),
    "a text for a truth": ("--config={folder}/text.py", "loosen_bound=yes must be a bool"),
    "a field misspelt in a file": ("--config={folder}/typo.py", "has a field 'n_ende' that ssar_"),
    "no settings in the file": ("--config={folder}/nothing.py", "loaded (KeyError"),
    "no Python in the file": ("--config={folder}/prose.py", "loaded (SyntaxError"),
    "a file that fails": ("--config={folder}/fails.py", "loaded (ModuleNotFoundError: No mod"),
    "no settings file": ("--config=configs/none.py", "none.py cannot be loaded"),
    "the other script's": (f"--config={ROOT}/configs/ssar_cql.py:demo", "a field 'backup_entropy'"),
    "no such task": (f"--config={ROOT}/configs/ssar_td3bc.py:hoper", "unknown task 'hoper' in "),
    "a path as a task": ("--config={folder}/sly.py", "task=../x must be letters, digits"),
    "the task as a field": (field(task="x"), "did you mean --config=<file>:<task>?"),
    "a float for an int": (field(offline_steps="1.5"), "offline_steps=1.5 must be of type int"),
    "no truth value": (field(loosen_bound="no"), "loosen_bound=no must be of type bool"),
    "no number": (field(batch_size="many"), "batch_size=many must be of type int"),
    "a typing error": (field(nseeds=2), "no field 'nseeds': did you mean seed or num_seeds?"),
    "no such field": (field(zzz=3), "no field 'zzz': see --help"),
    "no such flag": ("--confg=x", "unknown flag --confg=x: a setting is --config.<field>=<value>"),
    "a field as a flag": ("--seed=3", "unknown flag --seed=3: a setting is --config.seed=<value>"),
    "a word": ("hopper-medium-v2", "unknown flag hopper-medium-v2: a setting is"),
    "a flag without a value": ("--workdir", "expected one argument"),
    "an empty folder name": ("--workdir=", "--workdir= names no folder: give a full"),
    "an empty file name": ("--config=", "the settings  cannot be loaded"),
    "nobody's home": ("--workdir=~nobody_here/x", "~nobody_here/x names no folder: give"),
    "widths of halves": (field(hidden_dims="(1.5,2)"), "hidden_dims=(1.5, 2) must be whole"),
    # --- several processes ---
    "no cluster": ("--distributed=two", "--distributed=two cannot be used (ValueError: not"),
    "several processes from a checkpoint": (
        ["--distributed=localhost:9,2,0", GO_ON + "finished"], "is for new runs: resume from each"
    ),
    # --- run folders ---
    "a file for a folder": (RUN + "file", "file is a file: choose another folder"),
    "somebody's files": (RUN + "thesis", "thesis holds files that are no run: choose another"),
    "not to be written": ("--workdir=/proc/x", "/proc/x cannot be made (FileNotFoundError"),
    "another run's": (
        [RUN + "unfinished", *field(seed=3)],
        "holds a run with other settings than seed=3 (there 0): give the ones there, choose",
    ),
    "the other script's unfinished run": (
        ("ssar_cql", [RUN + "unfinished"]),
        "holds a run of another script, with expl_noise",
    ),
    "a run without settings": (RUN + "unnamed", "unnamed is not a run folder, because"),
    # --- offline checkpoints ---
    "no run to continue": ([GO_ON + "none", *ONLINE], "none is not a run folder, because"),
    "nothing to do": (GO_ON + "finished", "online_steps=0 leaves nothing to do: give"),
    "other settings": (
        [GO_ON + "finished", *ONLINE, *field(n_end=5.0)],
        "with other settings than n_end=5.0 (there 3.0): use that run's script",
    ),
    "other data": ([GO_ON + "finished", *ONLINE, *file("other")], "was trained on other data"),
    "a broken checkpoint": ([GO_ON + "broken", *ONLINE], "no usable checkpoint {folder}/broken"),
    "a pickled checkpoint": ([GO_ON + "swapped", *ONLINE], "its checksum does not match"),
    "settings cut short": ([GO_ON + "mistyped", *ONLINE], "config.json is not readable (JSON"),
    "settings in a list": ([GO_ON + "listed", *ONLINE], "config.json is not readable (TypeError"),
    "the other script's run": (
        ("ssar_cql", [GO_ON + "finished", *ONLINE]), "is a run of another script, with expl_noise"
    ),
    "onto itself": (
        [GO_ON + "finished", RUN + "finished", *ONLINE],
        "is the run of --config.offline_checkpoint: choose another folder",
    ),
}  # fmt: skip
LATE = ("other data", "a broken checkpoint", "a pickled checkpoint")  # seen in a folder of its own


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


def test_nothing_trusted_is_found_before_training(command, folder):
    """And the corrected command begins in the same folder."""
    arguments = [f"--config={folder}/ssar_td3bc.py", f"--workdir={folder}/thin"]
    status, _, err = command("ssar_td3bc", *arguments, "--config.return_threshold=1e6")
    assert status == 1 and err.count("\n") == 1
    assert "selection=return finds no D̂ in " in err and "lower --config.return_threshold" in err
    assert command("ssar_td3bc", *arguments)[0] == 0
    assert not (folder / "thin.1").exists()


@pytest.mark.parametrize("script", ["ssar_td3bc", "ssar_cql"])
def test_help_names_every_setting(script, command):
    status, out, _ = command(script, "--help")
    assert status == 0
    fields = [f"--config.{field}=" for field in tiny_config(script=script)]
    for words in ("--workdir", "--noresume", "hopper-medium-v2", *fields):
        assert words in out


@pytest.mark.parametrize("error", [MemoryError("3 TiB"), RuntimeError("RESOURCE_EXHAUSTED: no")])
def test_too_little_memory_is_one_sentence(error, command, monkeypatch):
    def main(*_):
        raise error

    monkeypatch.setattr("ssar_cql.main", main)
    status, _, err = command("ssar_cql")
    assert status == 1 and err.startswith("ssar_cql: out of memory (") and err.count("\n") == 1


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


def test_an_error_without_output_has_its_status(folder):
    command = f"{sys.executable} {ROOT}/ssar_td3bc.py --workdir={folder}/file >&- 2>&-"
    assert subprocess.run(["bash", "-c", command]).returncode == 1


def test_a_variant_without_settings_is_told_which_file_it_lacks():
    with pytest.raises(InputError, match=r"configs/my_variant\.py cannot be loaded"):
        cli._parse("my_variant")
