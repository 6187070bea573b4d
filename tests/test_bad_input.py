"""Bad input at the command line: one sentence with the mend, exit status 1, nothing touched."""

import json
import os
import pickle
import re
import shutil
import subprocess
import sys

import h5py
import numpy as np
import pytest
from conftest import ROOT
from toys import toy_columns, write_hdf5

from common.checks import lock

SETTINGS = """
def get_config(task=None):
    from toys import tiny_config
    return tiny_config({data!r}, {script!r}, offline_steps=20)
"""


WORDS = """
given = get_config

def get_config(task=None):
    config = given()
    with config.ignore_type():
        config.batch_size = "many"
    return config
"""


class Commands:
    """Runs command lines, and looks after the files in `folder`."""

    def __init__(self, folder):
        self.folder = folder
        env = os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT}/tests", "JAX_PLATFORMS": "cpu"}
        for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"):
            env[name] = "http://127.0.0.1:9"  # nothing is out there
        env["HF_HUB_OFFLINE"] = "1"  # Minari's remote, which would be asked again for half a minute
        self.server = subprocess.Popen(
            [sys.executable, os.path.join(ROOT, "tests", "command_server.py")],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT, env=env,
        )  # fmt: skip

    def __call__(self, script, *arguments):
        """Exit status, stdout and stderr."""
        self.server.stdin.write(json.dumps([script, *arguments]) + "\n")
        self.server.stdin.flush()
        return json.loads(self.server.stdout.readline())

    def files(self):
        """Every file and folder below, with what tells whether it was written to."""
        found = {}
        for parent, _, names in os.walk(self.folder):
            found[parent] = sorted(names)
            for name in names:
                status = os.lstat(os.path.join(parent, name))
                found[os.path.join(parent, name)] = (status.st_size, status.st_mtime_ns)
        return found


def spoiled(path, **changes):
    """The toy data with other columns, or attributes."""
    columns, attributes = toy_columns(60), {}
    for name, change in changes.items():
        if name.startswith(("env_", "ref_")):
            attributes[name] = change
        elif callable(change):
            columns[name] = change(columns[name])
        elif change is None:
            columns.pop(name)
        else:
            columns[name] = change
    write_hdf5(path, **columns)
    with h5py.File(path, "a") as file:
        file.attrs.update(attributes)


def put(row, value):
    """A change of one row of a column."""

    def change(column):
        column = column.copy()
        column[row] = value
        return column

    return change


FILES = {
    "no_rewards": {"rewards": None},
    "short": {"actions": lambda x: x[:-1]},
    "flat": {"observations": lambda x: x[:, 0]},
    "cube": {"actions": lambda x: x[:, :, None]},
    "two_rewards": {"rewards": lambda x: np.stack([x, x], axis=1)},
    "text": {"actions": lambda x: np.full(x.shape, b"left")},
    "complex": {"rewards": lambda x: x.astype(complex)},
    "nan": {"observations": put(7, np.nan)},
    "inf": {"rewards": put(3, np.inf)},
    "loud": {"actions": put(9, 1.5)},
    "no_rows": {key: lambda x: x[:0] for key in toy_columns(1)},
    "narrow": {"next_observations": lambda x: x[:, :-1]},
    "dense": {"rewards": lambda x: x - 0.5},
    "wide_data": {key: lambda x: np.c_[x, x] for key in ("observations", "next_observations")},
    "kwargs": {"env_id": "ssar-test/Walk-v0", "env_kwargs": "{"},
    "wind": {"env_id": "ssar-test/Walk-v0", "env_kwargs": '{"wind": 3}'},
    "path": {"env_id": "Hopper-v5", "env_kwargs": '{"xml_file": "/etc/passwd"}'},
    "path_within": {"env_id": "Hopper-v5", "env_kwargs": '{"xml_file": [{"a": "../x.xml"}]}'},
    "ids": {"env_id": np.array([b"Hopper-v5", b"Hopper-v4"])},
    "reference": {"ref_min_score": "low", "ref_max_score": 1.0},
    "level": {"ref_min_score": 1.0, "ref_max_score": 1.0},
    "module": {"env_id": "antigravity:Walk-v0"},
    "half_terminal": {"terminals": lambda x: np.where(np.arange(len(x)) == 5, 0.5, x)},
    "one_reference": {"ref_min_score": 1.0},
}


@pytest.fixture(scope="module")
def commands(tmp_path_factory):
    """The files that the commands below name, and what runs them."""
    folder = str(tmp_path_factory.mktemp("bad"))
    at = lambda *names: os.path.join(folder, *names)
    data = write_hdf5(at("toy.hdf5"), **toy_columns(120))
    write_hdf5(at("other.hdf5"), **toy_columns(120, seed=1))
    for name, changes in FILES.items():
        spoiled(at(f"{name}.hdf5"), **changes)
    for script in ("ssar_td3bc", "ssar_cql"):
        with open(at(f"{script}.py"), "w") as file:
            file.write(SETTINGS.format(data=data, script=script))
    for name, text in (
        ("nothing", "settings = 3\n"),
        ("prose", "I would like\n"),
        ("fails", "import nowhere_to_be_found\n"),
        ("words", SETTINGS.format(data=data, script="ssar_td3bc") + WORDS),
    ):
        with open(at(f"{name}.py"), "w") as file:
            file.write(text)
    with open(at("page.hdf5"), "w") as file:
        file.write("<html>")
    with open(at("pickled.hdf5"), "wb") as file:
        pickle.dump(toy_columns(60), file)
    with open(data, "rb") as file, open(at("half.hdf5"), "wb") as half:
        half.write(file.read()[: os.path.getsize(data) // 2])
    open(at("empty.hdf5"), "w").close()
    shutil.copy(data, at("elsewhere.hdf5"))
    with h5py.File(at("elsewhere.hdf5"), "a") as file:
        del file["rewards"]
        file["rewards"] = h5py.ExternalLink(data, "rewards")
    shutil.copy(data, at("raw.hdf5"))
    with h5py.File(at("raw.hdf5"), "a") as file:
        rows = len(file["rewards"])
        del file["rewards"]
        external = [("/etc/passwd", 0, 4 * rows)]
        file.create_dataset("rewards", (rows,), np.float32, external=external)
    for name, key, there in (
        ("folders", "timeouts", None),
        ("dangling", "next_observations", h5py.SoftLink("/nowhere")),
    ):
        shutil.copy(data, at(f"{name}.hdf5"))
        with h5py.File(at(f"{name}.hdf5"), "a") as file:
            del file[key]
            if there:
                file[key] = there
            else:
                file.create_group(key)
    with open(data, "rb") as file, open(at("scrambled.hdf5"), "wb") as scrambled:
        content = bytearray(file.read())
        for place in range(100, 6000, 7):
            content[place] ^= 255
        scrambled.write(content)
    with h5py.File(at("huge.hdf5"), "w") as file:  # of which nothing is on the disk
        for name, column in toy_columns(1).items():
            shape = (10**13, *column.shape[1:])
            file.create_dataset(name, shape, np.float32, chunks=(1024, *shape[1:]))
    with h5py.File(at("group.hdf5"), "w") as file:
        file["actions"] = h5py.SoftLink("/nowhere")

    # run folders: none, a file, another's, finished, unfinished, in use
    os.makedirs(at("thesis"))
    for name in ("file", "thesis/chapter.tex"):
        with open(at(name), "w") as file:
            file.write("years of work")
    commands = Commands(folder)
    settings = f"--config={at('ssar_td3bc.py')}"
    status, _, err = commands("ssar_td3bc", settings, f"--workdir={at('finished')}")
    assert status == 0, err
    copies = ("broken", "swapped", "mistyped", "listed", "unfinished", "used", "foreign", "unnamed")
    for name in copies:
        shutil.copytree(at("finished"), at(name))
    for parent, _, names in os.walk(at("broken", "checkpoint")):
        for name in names:
            open(os.path.join(parent, name), "w").close()
    shutil.rmtree(at("swapped", "checkpoint"))
    with open(at("swapped", "checkpoint"), "wb") as file:
        pickle.dump({"state": {}}, file)
    with open(at("mistyped", "config.json"), "w") as file:
        file.write('{"seed": ')
    with open(at("listed", "config.json"), "w") as file:
        file.write("[1]")
    for name in ("unfinished", "used", "foreign"):
        os.remove(at(name, "results.json"))
    os.remove(at("unnamed", "config.json"))
    held = lock(at("used"))
    yield commands
    held.close()
    commands.server.stdin.close()
    commands.server.wait()


def file(name):
    return f"--config.dataset_path={{folder}}/{name}.hdf5"


def field(**values):
    return [f"--config.{name}={value}" for name, value in values.items()]


ONLINE = field(online_steps=40)
GO_ON = "--config.offline_checkpoint={folder}/"
RUN = "--workdir={folder}/"

# What is given beside --config=<the toy's settings> and --workdir=<a new folder>; words of the one
# sentence it ends with.
TABLE = {
    # --- files ---
    "no file": (file("none"), "no file {folder}/none.hdf5: give the data set's HDF5 file with"),
    "a folder": ("--config.dataset_path={folder}", "{folder} is a folder: give the data set's"),
    "a web page": (file("page"), "page.hdf5 is not a readable HDF5 file"),
    "a pickle": (file("pickled"), "pickled.hdf5 is not a readable HDF5 file"),
    "half a file": (file("half"), "half.hdf5 is not a readable HDF5 file"),
    "scrambled bytes": (file("scrambled"), "scrambled.hdf5 is not a readable HDF5 file"),
    "an empty file": (file("empty"), "empty.hdf5 is not a readable HDF5 file"),
    "two files": (["--config.dataset=d4rl:a.hdf5", file("toy")], "two files are given"),
    # --- keys, shapes, types, values ---
    "no rewards": (file("no_rewards"), "no_rewards.hdf5 has no key 'rewards', only actions, "),
    "a dangling link": (file("group"), "group.hdf5 has no key 'observations', only actions: "),
    "a link out of the file": (file("elsewhere"), "'rewards' lies in another file: copy"),
    "numbers out of the file": (file("raw"), "'rewards' lies in another file: copy"),
    "a group for a column": (file("folders"), "'timeouts' holds no numbers: mend or remove it"),
    "a dangling column": (file("dangling"), "'next_observations' holds no numbers: mend or"),
    "fewer actions": (file("short"), "'observations' has 61: every key needs one row"),
    "flat observations": (file("flat"), "'observations' has type float32 and shape (61,): it"),
    "actions in a cube": (file("cube"), "'actions' has type float32 and shape (61, 2, 1): it"),
    "two rewards a row": (file("two_rewards"), "'rewards' has type float32 and shape (61, 2): "),
    "actions as text": (file("text"), "'actions' has type |S4 and shape (61, 2): it needs numbers"),
    "complex rewards": (file("complex"), "'rewards' has type complex128 and shape (61,): it needs"),
    "nan": (file("nan"), "'observations' is not finite in float32 at row 7 (1 such rows): remove"),
    "infinite": (file("inf"), "'rewards' is not finite in float32 at row 3 (1 such rows): remove"),
    "actions beyond 1": (file("loud"), "'actions' reaches 1.5 at row 9 (1 rows outside [-1, 1])"),
    "no rows": (file("no_rows"), "is empty: the data needs at least one transition"),
    "narrow successors": (file("narrow"), "'next_observations' has shape (61, 3) but"),
    "broken kwargs": ([file("kwargs"), *field(env="")], "attribute 'env_kwargs' is '{': mend or"),
    "unknown kwargs": ([file("wind"), *field(env="")], "cannot make environment ssar-test/Walk-v0"),
    "a path in kwargs": ([file("path"), *field(env="")], "a JSON object without paths"),
    "a path within kwargs": (
        [file("path_within"), *field(env="")], "a JSON object without paths"
    ),
    "half a terminal": (file("half_terminal"), "'terminals' is 0.5 at row 5: give 0 or 1 in every"),
    "more rows than memory": (file("huge"), "'observations', (10000000000000, 4), does not fit"),
    "half a reference": (file("one_reference"), "attribute 'ref_min_score' is '1.0': mend or rem"),
    "two environments": ([file("ids"), *field(env="")], "attribute 'env_id' is '[b'Hopper-v5'"),
    "no scale": (file("level"), "attribute 'ref_min_score' is '1.0': mend or remove it"),
    "no reference": (file("reference"), "attribute 'ref_min_score' is 'low': mend or remove it"),
    "a module in a file": (
        [file("module"), *field(env="")],
        "env_id='antigravity:Walk-v0': give --config.env=antigravity:Walk-v0 if you trust it",
    ),
    "no environment": ([file("toy"), *field(env="")], "does not name its environment: give"),
    # --- trusted rows ---
    "nothing above G_T": (field(return_threshold="1e6"), "trusts nothing in toy: lower --config."),
    "no success": (
        [file("dense"), *field(selection="success")],
        "no reward is 1, by which selection=success knows success",
    ),
    "no G_T": (field(return_threshold="nan"), "return_threshold=nan is no return to exceed"),
    # --- environments ---
    "unknown environment": (field(env="Hoper-v4"), "unknown environment 'Hoper-v4'"),
    "unknown module": (field(env="none:Walk-v0"), "unknown environment 'none:Walk-v0'"),
    "another robot": (field(env="Hopper-v4"), "has 4 dimensions but Hopper-v4 has 11"),
    "one action": (field(env="ssar-test/One-v0"), "'actions' has 2 dimensions but"),
    "larger actions": (field(env="ssar-test/Wide-v0"), "takes actions in [-2.0, 2.0] but policies"),
    "discrete actions": (field(env="CartPole-v1"), "takes actions of Discrete(2), not a box"),
    "wide observations": (file("wide_data"), "'observations' has 8 dimensions but ssar-test/Walk"),
    "keys of none": (field(observation_keys="position"), "names 'position', which is not"),
    "a key twice": (field(observation_keys="a,a"), "names a key twice: once each"),
    # --- remotes: every proxy is a closed port ---
    "no such Minari id": (
        field(dataset="mujoco/none-v0", dataset_path=""),
        "no Minari data set 'mujoco/none-v0', neither here nor from its remote",
    ),
    "no Minari id": (field(dataset="not an id", dataset_path=""), "no Minari data set 'not an id'"),
    "an older version": (
        field(dataset="hopper-medium-v0", dataset_path=""),
        "; D4RL's is called hopper-medium-v2",
    ),
    "no network": (
        field(dataset="hopper-medium-v2", dataset_path="", env=""),
        "cannot download hopper_medium-v2.hdf5: https://",
    ),
    "another task's environment": (
        [file("wind"), *field(dataset="hopper-medium-v2", env="")],
        "is of ssar-test/Walk-v0, but hopper-medium-v2 of Hopper-v4",
    ),
    # --- settings ---
    "no settings in the file": ("--config={folder}/nothing.py", "has no get_config"),
    "no Python in the file": ("--config={folder}/prose.py", "cannot be loaded (invalid syntax "),
    "a file that fails": ("--config={folder}/fails.py", "cannot be loaded (No module"),
    "a word in the file": ("--config={folder}/words.py", "batch_size='many' must be of type int"),
    "fields before the file": (
        [*field(seed=1), "--config={folder}/ssar_td3bc.py"],
        "--config=<file>[:<task>] comes before any --config.<field>=",
    ),
    "a float for an int": (field(offline_steps="1e4"), "'1e4' is no whole number: write it"),
    "no truth value": (field(loosen_bound="no"), "'no' is neither True nor False"),
    "a typing error": (field(ofline_steps=20), "no field 'ofline_steps': is offline_steps meant?"),
    "too long an interval": (field(eval_interval=3 * 10**9), "must be below 2^31"),
    "too large a batch": (field(batch_size=10**9), "must be at most 2^20"),
    "too large a reward": (field(reward_scale="1e30"), "reward_scale=1e+30 is too large"),
    "no such field": (field(zzz=3), "no field 'zzz': --config.<field>= takes"),
    "no such flag": ("--confg=x", "Unknown command line flag 'confg'"),
    "a field as a flag": ("--seed=3", "no flag --seed: give --config.seed=<value>"),
    "a word": ("hopper-medium-v2", "'hopper-medium-v2' is no flag"),
    "no number": (field(batch_size="many"), "'many' is no whole number: write it"),
    "no settings file": ("--config=configs/none.py", "no such settings file"),
    "the other script's": ("--config=configs/ssar_cql.py:demo", "lacks expl_noise"),
    "no such task": ("--config=configs/ssar_td3bc.py:hoper-v2", "unknown task 'hoper-v2'"),
    "the task as a field": (field(task="hopper-medium-v2"), "the task is chosen by --config="),
    "no batch": (field(batch_size=0), "batch_size=0 must be at least 1"),
    "no episode": (field(eval_episodes=0), "eval_episodes=0 must be at least 1"),
    "a rate of nan": (field(critic_lr="nan"), "critic_lr=nan must lie between 0 and 1"),
    "a rate below 0": (field(actor_lr=-1e-3), "actor_lr=-0.001 must lie between 0 and 1"),
    "a discount above 1": (field(discount=1.5), "discount=1.5 must lie between 0 and 1"),
    "minutes of nan": (field(checkpoint_minutes="nan"), "checkpoint_minutes=nan must not be"),
    "widths of halves": (field(hidden_dims="(1.5,2)"), "hidden_dims=(1.5, 2) must be layer widths"),
    "an unknown choice": (field(selection="best"), "is unknown: choose one of none, return,"),
    "an interval too many": (field(offline_steps=50), "must be a multiple of --config.eval_"),
    "an odd interval": (field(eval_interval=5), "must be a multiple of --config.policy_freq=2"),
    "n from above": (field(n_start=9.0), "n_start=9.0 must be at most --config.n_end=3.0"),
    "a seed below 0": (field(seed=-1), "seed=-1 must be at least 0"),
    "nothing to do": (field(offline_steps=0), "leaves nothing to do: give it or"),
    "warm-up alone": ([*ONLINE, *field(warmup_steps=40)], "leaves no update in --config.online_"),
    "nothing to adapt": (field(coefficient_init=0.0), "leaves nothing to adapt: give more, or"),
    "no data at all": (
        field(dataset="", dataset_path=""),
        "no data set: give --config.dataset=<local Minari id> or =d4rl:<file>",
    ),
    "CQL: one critic": (("ssar_cql", field(critic_layers="(3,)")), "hidden layers of two critics"),
    "CQL: crossed bounds": (
        ("ssar_cql", field(clip_diff_min=5.0, clip_diff_max=1.0)),
        "clip_diff_min=5.0 must be below --config.clip_diff_max=1.0",
    ),
    "CQL: no samples": (("ssar_cql", field(num_sampled_actions=0)), "must be at least 1"),
    # --- several processes ---
    "no cluster": ("--distributed=two", "--distributed=two cannot be read: give auto, or"),
    "seeds that cannot be shared": (
        ["--distributed=localhost:9,2,0"],
        "num_seeds=1 cannot be shared by 2 processes: give a multiple",
    ),
    "no such process": ("--distributed=localhost:9,2,2", "is no process of 2"),
    # --- run folders ---
    "a file for a folder": (RUN + "file", "file is a file: choose another folder"),
    "somebody's files": (RUN + "thesis", "thesis holds files of no run: choose another folder"),
    "not to be written": ("--workdir=/proc/x", "--workdir=/proc/x cannot be written in /proc"),
    "another run's": (
        [RUN + "unfinished", *field(seed=3)],
        "holds an unfinished run with other settings than seed=3 (there 0): give those to go on",
    ),
    "in use": (RUN + "used", "used is in use by process"),
    "settings cut short": (
        [RUN + "mistyped", GO_ON + "mistyped", *ONLINE], "mistyped is no run's folder"
    ),
    "settings in a list": ([RUN + "listed", GO_ON + "listed", *ONLINE], "is no run's folder"),
    "the other script's unfinished run": (
        ("ssar_cql", [RUN + "foreign"]), "an unfinished run of another script, with expl_noise"
    ),
    # --- checkpoints ---
    "no run to go on from": ([GO_ON + "none", *ONLINE], "none is no run's folder ("),
    "nothing to go on with": (GO_ON + "finished", "online_steps=0 leaves nothing to do: give"),
    "other settings": (
        [GO_ON + "finished", *ONLINE, *field(n_end=5.0)],
        "other settings than n_end=5.0 (there 3.0): leave those out",
    ),
    "other data": (
        [GO_ON + "finished", *ONLINE, file("other")],
        "was trained on other data (",
    ),
    "a broken checkpoint": ([GO_ON + "broken", *ONLINE], "has no usable checkpoint in"),
    "a pickled checkpoint": ([GO_ON + "swapped", *ONLINE], "has no usable checkpoint in"),
    "the other script's run": (
        ("ssar_cql", [GO_ON + "finished", *ONLINE]),
        "is a run of another script, with expl_noise",
    ),
    "a run without settings": (
        RUN + "unnamed", "holds a run whose config.json is missing: choose another folder, or give"
    ),
    "onto itself": (
        [GO_ON + "finished", RUN + "finished", *ONLINE],
        "is the run of --config.offline_checkpoint: choose another folder",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", TABLE)
def test_bad_input_is_one_sentence_and_touches_nothing(case, commands):
    given, words = TABLE[case]
    script, given = given if isinstance(given, tuple) else ("ssar_td3bc", given)
    given = [given] if isinstance(given, str) else given
    fill = lambda text: text.replace("{folder}", commands.folder)
    arguments = [f"--workdir={commands.folder}/new"]
    if not any(argument.startswith("--config=") for argument in given):
        arguments = [f"--config={commands.folder}/{script}.py", *arguments]
    before = commands.files()
    status, out, err = commands(script, *arguments, *map(fill, given))
    assert status == 1, out + err
    assert err.startswith(f"{script}: ") and err.endswith("\n")
    assert err.count("\n") == 1 and len(err) < 800
    assert fill(words) in err
    assert not re.search(r"Traceback|Error\b|Exception", err)
    assert "compiles" not in err
    assert commands.files() == before


@pytest.mark.parametrize("script", ["ssar_td3bc", "ssar_cql"])
def test_a_process_of_its_own_ends_alike(script, tmp_path):
    command = [sys.executable, os.path.join(ROOT, f"{script}.py"), "--config.batch_size=0"]
    done = subprocess.run(
        [*command, f"--workdir={tmp_path / 'run'}"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 1
    assert done.stderr == f"{script}: --config.batch_size=0 must be at least 1\n"
    assert not os.listdir(tmp_path)


@pytest.mark.parametrize("full", ["stdout", "stderr"])
def test_what_is_printed_may_have_no_room_either(full, commands):
    """One sentence on the other; the same command goes on once there is room."""
    workdir = os.path.join(commands.folder, f"full_{full}")
    command = [sys.executable, os.path.join(ROOT, "ssar_td3bc.py"), f"--workdir={workdir}"]
    command += [f"--config={commands.folder}/ssar_td3bc.py"]
    env = os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT}/tests"}
    env.pop("PYTHONUNBUFFERED", None)
    with open("/dev/full", "w") as nowhere:
        streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE} | {full: nowhere}
        done = subprocess.run(command, **streams, env=env, text=True)
    said = (done.stdout or "") + (done.stderr or "")
    assert done.returncode == 1
    last = said.splitlines()[-1]
    assert last.startswith(
        "ssar_td3bc: what is printed cannot be written (No space left on device)"
    )
    assert "Traceback" not in said
    shutil.rmtree(workdir, ignore_errors=True)


def test_names_of_folders_are_plain(commands):
    """A task is part of the run folder's path, and settings may come from a file."""
    path = os.path.join(commands.folder, "sly.py")
    for task in ("../../x", "/x", "a/b", "..", ""):
        with open(path, "w") as file:
            file.write(
                "def get_config(task=None):\n    from toys import tiny_config\n"
                f"    return tiny_config('{commands.folder}/toy.hdf5', task={task!r})\n"
            )
        status, _, err = commands("ssar_td3bc", f"--config={path}")
        assert status == 1 and f"--config.task={task} must be a plain name" in err
    os.remove(path)
