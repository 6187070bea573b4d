"""Runs that are stopped and gone on with: the same bits as without a stop, and nothing lost."""

import contextlib
import csv
import errno
import fcntl
import gc
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import ROOT
from matplotlib.figure import Figure
from toys import tiny_config, toy_columns, write_hdf5
from tqdm import tqdm

import ssar_td3bc as ssar
from common import checkpoint, cli, report, stopping
from common.checkpoint import Checkpoints, load_checkpoint
from common.checks import InputError, lock
from common.demo import demo_dataset_id
from common.evaluation import Collector, Evaluator


class Killed(BaseException):
    """What ends a run in these tests where a real one would be killed."""


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_hdf5(tmp_path_factory.mktemp("data") / "toy.hdf5", **toy_columns())


def config_of(data, script=ssar, **overrides):
    """Two seeds, a checkpoint at every evaluation."""
    return tiny_config(
        data, script.__name__, **({"num_seeds": 2, "checkpoint_minutes": 0.0} | overrides)
    )


@pytest.fixture(scope="module")
def whole(data, tmp_path_factory):
    """The folder of a run without a stop."""
    workdir = str(tmp_path_factory.mktemp("runs") / "whole")
    ssar.main(config_of(data), workdir)
    return workdir


def kill_at(owner, name, call, monkeypatch):
    """owner.name raises Killed instead of doing its work for that time, the first being 1."""
    work, calls = getattr(owner, name), []

    def watched(*args, **kwargs):
        calls.append(1)
        if len(calls) == call:
            raise Killed
        return work(*args, **kwargs)

    monkeypatch.setattr(owner, name, watched)


def start_and_kill(config, workdir, *moment, script=ssar):
    """A run up to the moment that kill_at is told."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        kill_at(*moment, monkeypatch)
        try:  # without pytest.raises, whose traceback would keep the run and its lock alive
            script.main(config, workdir)
        except Killed:
            gc.collect()
            return
    pytest.fail("it was not killed")


def read(workdir, name):
    with open(os.path.join(workdir, name), "rb") as file:
        return file.read()


def rows_of(workdir, name):
    with open(os.path.join(workdir, name)) as file:
        return list(csv.DictReader(file))


def flat(tree, path=""):
    """{path: array} of nested dictionaries and lists."""
    if isinstance(tree, dict):
        children = tree.items()
    elif isinstance(tree, (list, tuple)):
        children = enumerate(tree)
    else:
        return {} if tree is None else {path: np.asarray(tree)}
    return {k: v for key, child in children for k, v in flat(child, f"{path}/{key}").items()}


def assert_same(a, b):
    """Two finished runs agree in every bit of parameters, scores and results."""
    states = [flat(load_checkpoint(workdir)) for workdir in (a, b)]
    assert states[0].keys() == states[1].keys()
    for key, x in states[0].items():
        np.testing.assert_array_equal(x, states[1][key], err_msg=key)
    for name in ("scores.csv", "results.json"):
        assert read(a, name) == read(b, name), name
    assert sorted(os.listdir(a)) == sorted(os.listdir(b))


def kill_runs(*arguments):
    """What tests/kill_runs.py reports, after ten kills or more."""
    command = [sys.executable, os.path.join(ROOT, "tests", "kill_runs.py"), *arguments]
    env = os.environ | {"PYTHONPATH": ROOT}
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    report = json.loads(done.stdout.splitlines()[-1])
    assert len(report["killed"]) >= 10
    return report


@pytest.mark.slow
@pytest.mark.parametrize("script", ["ssar_td3bc", "ssar_cql"])
def test_sigkill_at_random_moments_changes_no_bit(script, data, tmp_path):
    """Ten kills or more, in labelling, intervals, evaluations and checkpoints, up to the end."""
    report = kill_runs(script, data, str(tmp_path), "iql", "10", "2.5")
    for i in range(report["runs"]):
        assert_same(str(tmp_path / "whole"), str(tmp_path / f"killed_{i}"))


@pytest.mark.slow
def test_sigkill_online_loses_no_row_and_doubles_none(data, tmp_path):
    """What the last process to take a step met is in that step's place, and the curve is whole."""
    report = kill_runs("ssar_td3bc", data, str(tmp_path), "return", "10", "4", "200")
    killed = report["killed"]
    for name in ("whole", *(f"killed_{i}" for i in range(report["runs"]))):
        workdir = str(tmp_path / name)
        with open(f"{workdir}.met") as file:
            lines = [line for line in file if line.endswith("]]]\n")]  # none that a kill cut short
        met = dict(json.loads(line) for line in lines)
        assert sorted(met) == list(range(1, 201))
        expected = np.stack([met[step] for step in sorted(met)], axis=1)  # [S, steps, O]
        np.testing.assert_array_equal(np.load(f"{workdir}.npy"), expected.astype(np.float32))
        rows = [row for row in rows_of(workdir, "scores.csv") if row["seed"] == "1"]
        steps = [("offline", step) for step in range(20, 301, 20)]
        steps += [("online", step) for step in range(0, 201, 20)]
        assert [(row["phase"], int(row["step"])) for row in rows] == steps
        offline = [row["score"] for row in rows[:15]]
        if name == "whole":
            expected_offline = offline
        assert offline == expected_offline
        np.testing.assert_array_equal(load_checkpoint(workdir)["state"]["online_step"], 195)
        for seed in "01":
            episodes = [r for r in rows_of(workdir, "episodes.csv") if r["seed"] == seed]
            ends = [int(row["step"]) for row in episodes]
            starts = [end - int(row["length"]) for end, row in zip(ends, episodes, strict=True)]
            # One episode follows the other; those that end with a process are in no row.
            assert all(a <= b for a, b in zip([0, *ends], starts, strict=False))
            assert sum(a < b for a, b in zip([0, *ends], starts, strict=False)) <= len(killed)


@pytest.mark.parametrize(
    ("moment", "done"),
    [
        ((ssar.RunLog, "save", 2), 20),  # the interval is trained, but not in a checkpoint
        ((Evaluator, "__call__", 2), 40),  # it is, its evaluation under way
        ((ssar.RunLog, "_add_rows", 2), 40),  # evaluated, but not in scores.csv
        ((ssar.RunLog, "finish", 1), 60),  # all done but the results
    ],
    ids=["checkpoint", "evaluation", "scores", "results"],
)
def test_a_run_goes_on_from_its_last_checkpoint(moment, done, data, whole, tmp_path, capsys):
    workdir = str(tmp_path / "run")
    start_and_kill(config_of(data), workdir, *moment)
    assert not os.path.exists(os.path.join(workdir, "results.json"))
    ssar.main(config_of(data), workdir)
    assert f"goes on in {workdir} after offline step {done}" in capsys.readouterr().out
    assert_same(whole, workdir)
    assert os.listdir(tmp_path) == ["run"]


def test_going_on_at_the_very_end_of_a_short_run_online(data, tmp_path):
    """In a process that takes no step, of a run whose only interval had been no whole one."""
    config = config_of(data, online_steps=20)
    workdir = str(tmp_path / "run")
    start_and_kill(config, workdir, Evaluator, "__call__", 5)  # three offline, one before a step
    results = ssar.main(config, workdir)
    assert len(results["last"]) == 2
    with open(os.path.join(workdir, "timing.json")) as file:
        assert json.load(file)["env_steps_per_second"] is None


@pytest.mark.parametrize("before, after", [(120, 1200), (1200, 120)])  # of 6 and 60 updates
def test_calls_of_another_size_than_before_compute_the_same(
    before, after, data, tmp_path, monkeypatch
):
    """As where a run is gone on with on another device."""
    config = config_of(data, eval_interval=60, offline_steps=120, checkpoint_minutes=1e-9)
    monkeypatch.setattr(ssar, "UPDATES_PER_CALL", before)
    ssar.main(config, str(tmp_path / "whole"))
    start_and_kill(config, str(tmp_path / "run"), ssar, "broken_parts", 3 if before < after else 2)
    monkeypatch.setattr(ssar, "UPDATES_PER_CALL", after)
    ssar.main(config, str(tmp_path / "run"))
    whole, run = (load_checkpoint(str(tmp_path / name))["state"] for name in ("whole", "run"))
    assert whole["step"].tolist() == [120, 120]
    for key, x in flat(whole).items():
        np.testing.assert_array_equal(x, flat(run)[key], err_msg=key)
    rows = [rows_of(str(tmp_path / name), "scores.csv") for name in ("whole", "run")]
    for a, b in zip(*rows, strict=True):
        for key in set(a) - {"phase"}:
            if a[key]:
                np.testing.assert_allclose(float(a[key]), float(b[key]), rtol=1e-5, err_msg=key)


def test_a_start_that_dies_at_once_leaves_a_folder_to_start_in(data, whole, tmp_path):
    workdir = str(tmp_path / "run")
    start_and_kill(config_of(data), workdir, ssar.RunLog, "_write_json", 1)
    assert os.listdir(workdir) == ["lock"]
    ssar.main(config_of(data), workdir)
    assert_same(whole, workdir)


def test_the_progress_bar_may_be_switched_off(data, whole, tmp_path, monkeypatch):
    monkeypatch.setattr(ssar, "progress", lambda *_, **__: tqdm(disable=True))
    ssar.main(config_of(data), str(tmp_path / "run"))
    assert_same(whole, str(tmp_path / "run"))


def test_online_the_buffer_and_the_steps_go_on(data, tmp_path, monkeypatch):
    """Killed within the third interval online; rows stored after the second are met again."""
    script = ssar  # whose `finetune` is the other's, word for word
    config = config_of(data, script, online_steps=80, buffer_init="half")
    workdir, acted, buffers = str(tmp_path / "run"), [], []
    step, compile_online = Collector.step, script.compile_online

    def recorded_step(envs, actions):
        acted.append(step(envs, actions))
        return acted[-1]

    def recorded_programs(*args):
        choose, collect, learn, totals = compile_online(*args)

        def recorded_collect(*args):
            buffers[:] = [collect(*args)]
            return buffers[0]

        return choose, recorded_collect, learn, totals

    monkeypatch.setattr(Collector, "step", recorded_step)
    monkeypatch.setattr(script, "compile_online", recorded_programs)
    start_and_kill(config, workdir, Collector, "step", 47, script=script)
    before = acted[:40]
    del acted[:]
    script.main(config, workdir)
    met = before + acted
    assert len(met) == 80
    (buffer,) = buffers
    assert int(buffer.added) == 80
    for field in ("reward", "next_obs", "terminated"):
        stored = np.asarray(getattr(buffer.rows, field))
        np.testing.assert_array_equal(
            stored, np.stack([getattr(outcome, field) for outcome in met], axis=1), err_msg=field
        )
    assert len(np.unique(np.asarray(buffer.rows.next_obs)[0], axis=0)) == 80  # no row twice

    rows = [row for row in rows_of(workdir, "scores.csv") if row["seed"] == "0"]
    steps = [("offline", str(step)) for step in (20, 40, 60)]
    steps += [("online", str(step)) for step in (0, 20, 40, 60, 80)]
    assert [(row["phase"], row["step"]) for row in rows] == steps
    anneal = [float(row["anneal"]) for row in rows[4:]]
    assert all(a > b for a, b in zip(anneal, anneal[1:], strict=False))
    for seed in "01":
        episodes = [row for row in rows_of(workdir, "episodes.csv") if row["seed"] == seed]
        ends = [int(row["step"]) for row in episodes]
        starts = [end - int(row["length"]) for end, row in zip(ends, episodes, strict=True)]
        assert all(a == b for a, b in zip(ends, starts[1:], strict=False) if b != 40)
        assert 40 in starts  # a new episode after the kill
    state = load_checkpoint(workdir)["state"]
    np.testing.assert_array_equal(state["online_step"], 80 - config.warmup_steps)
    np.testing.assert_array_equal(state["step"], 60 + 80 - config.warmup_steps)


def stopped_run(data, workdir, **overrides):
    """One with two checkpoints and evaluations, killed in the third interval; its settings."""
    config = config_of(data, **overrides)
    start_and_kill(config, workdir, ssar, "broken_parts", 3)
    return config


def damage(folder, how):
    """Breaks every larger file of orbax's in a checkpoint."""
    for parent, _, names in os.walk(folder):
        for name in names:
            path = os.path.join(parent, name)
            size = os.path.getsize(path)
            if size > 500 and name != checkpoint.DIGESTS:
                with open(path, "r+b") as file:
                    if how == "truncated":
                        file.truncate(size // 2)
                    else:
                        file.seek(size // 2)
                        byte = file.read(1)[0]
                        file.seek(size // 2)
                        file.write(bytes([byte ^ 1]))


@pytest.mark.parametrize("how", ["truncated", "flipped"])
def test_a_broken_checkpoint_falls_back_to_the_one_before(how, data, whole, tmp_path, capfd):
    workdir = str(tmp_path / "run")
    config = stopped_run(data, workdir)
    damage(os.path.join(workdir, "unfinished", "2"), how)
    ssar.main(config, workdir)
    printed = capfd.readouterr()
    assert f"the checkpoint {workdir}/unfinished/2 is broken" in printed.err
    assert "Traceback" not in printed.err and "Error" not in printed.err
    assert "goes on in" in printed.out and "after offline step 20" in printed.out
    assert_same(whole, workdir)


def test_a_finished_runs_checkpoint_is_checked_too(whole, tmp_path):
    shutil.copytree(whole, tmp_path / "run")
    assert load_checkpoint(str(tmp_path / "run"))
    damage(tmp_path / "run" / "checkpoint", "flipped")
    with pytest.raises(ValueError, match="is not as it was written"):
        load_checkpoint(str(tmp_path / "run"))


@pytest.mark.parametrize(
    "broken, sentence",
    [
        (lambda text: text[:-1], "digests.json: not readable"),
        (lambda text: "[]", "digests.json: not readable"),
        (lambda text: "{}", "digests.json: not readable"),
        (lambda text: text.replace("manifest.ocdbt", "manifest.ocdbu"), "ocdbu is missing"),
        (lambda text: text.replace('": "', '": "0'), "is not as it was written"),
    ],
)
def test_a_broken_list_of_digests_is_noticed(broken, sentence, whole, tmp_path):
    shutil.copytree(whole, tmp_path / "run")
    path = tmp_path / "run" / "checkpoint" / checkpoint.DIGESTS
    path.write_text(broken(path.read_text()))
    with pytest.raises(ValueError, match=sentence):
        load_checkpoint(str(tmp_path / "run"))


def test_without_a_whole_checkpoint_it_starts_over(data, whole, tmp_path, capsys):
    workdir = str(tmp_path / "run")
    config = stopped_run(data, workdir)
    for step in "12":
        damage(os.path.join(workdir, "unfinished", step), "truncated")
    ssar.main(config, workdir)
    assert capsys.readouterr().err.count("is broken") == 2
    assert_same(whole, workdir)
    assert len(rows_of(workdir + ".1", "scores.csv")) == 4  # what had been written is kept
    assert len(os.listdir(os.path.join(workdir + ".1", "unfinished"))) == 2


def test_another_run_in_the_folder_is_refused_and_kept(data, tmp_path):
    workdir = str(tmp_path / "run")
    stopped_run(data, workdir)
    before = read(workdir, "scores.csv")
    with pytest.raises(InputError, match=r"discount=0.5 \(there 0.99\), seed=3 \(there 0\)"):
        ssar.main(config_of(data, seed=3, discount=0.5), workdir)
    other = write_hdf5(tmp_path / "other.hdf5", **toy_columns(seed=1))
    with pytest.raises(InputError, match="had other data"):
        ssar.main(config_of(other), workdir)
    with open(os.path.join(workdir, "config.json"), "r+") as file:
        settings = json.load(file) | {"discount": 0.5}
        file.seek(0)
        file.truncate()
        json.dump(settings, file)
    with pytest.raises(InputError, match="run has other settings than its config.json"):
        ssar.main(config_of(data, discount=0.5), workdir)
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(checkpoint, "FORMAT", checkpoint.FORMAT + 1)
        with pytest.raises(InputError, match="run is of another version .its format is 4, not 5"):
            ssar.main(config_of(data, discount=0.5), workdir)
    assert read(workdir, "scores.csv") == before
    ssar.main(config_of(data, seed=3), workdir, resume=False)
    assert read(workdir + ".1", "scores.csv") == before
    assert rows_of(workdir, "scores.csv")[0]["seed"] == "3"


def test_a_checkpoint_of_another_shape_is_refused(data, tmp_path, monkeypatch):
    workdir = str(tmp_path / "run")
    config = stopped_run(data, workdir)
    init_state = ssar.init_state
    monkeypatch.setattr(ssar, "init_state", lambda key, obs, *args: init_state(key, obs + 1, *args))
    monkeypatch.setattr(ssar, "pretrain", lambda state, *args: args[2].restore("offline", [state]))
    with pytest.raises(InputError, match=r"of another version or shape .*kernel is float32\["):
        ssar.main(config, workdir)
    assert len(os.listdir(os.path.join(workdir, "unfinished"))) == 2


def test_settings_of_a_run_set_aside_do_not_come_back(data, tmp_path):
    """Killed as it goes on; set aside for other settings; these are what the folder then holds."""
    workdir = str(tmp_path / "run")
    start_and_kill(stopped_run(data, workdir), workdir, report, "remove", 2)
    assert not os.path.exists(os.path.join(workdir, "scores.csv"))
    config = config_of(data, discount=0.5)
    with pytest.MonkeyPatch.context() as monkeypatch:
        kill_at(Evaluator, "__call__", 2, monkeypatch)
        try:
            ssar.main(config, workdir, resume=False)
        except Killed:
            pass
    assert len(os.listdir(os.path.join(workdir + ".1", "unfinished"))) == 2
    ssar.main(config, workdir)
    ssar.main(config, str(tmp_path / "whole"))
    assert_same(str(tmp_path / "whole"), workdir)


def test_a_run_without_settings_is_set_aside_when_told_to(data, whole, tmp_path):
    workdir = str(tmp_path / "run")
    stopped_run(data, workdir)
    os.remove(os.path.join(workdir, "config.json"))
    with pytest.raises(InputError, match="config.json is missing: .* or give --noresume to set it"):
        ssar.main(config_of(data), workdir)
    ssar.main(config_of(data), workdir, resume=False)
    assert_same(whole, workdir)
    assert len(os.listdir(os.path.join(workdir + ".1", "unfinished"))) == 2


def test_checkpoints_without_settings_are_set_aside(data, whole, tmp_path):
    workdir = str(tmp_path / "run")
    stopped_run(data, workdir, discount=0.5)
    for name in ("config.json", "scores.csv", "episodes.csv"):
        with contextlib.suppress(FileNotFoundError):
            os.remove(os.path.join(workdir, name))
    shutil.rmtree(os.path.join(workdir, "tensorboard"))
    ssar.main(config_of(data), workdir)
    assert_same(whole, workdir)
    assert len(os.listdir(os.path.join(workdir + ".1", "unfinished"))) == 2


def test_killed_after_its_results_a_run_is_finished_not_begun_again(data, whole, tmp_path):
    workdir = str(tmp_path / "run")
    start_and_kill(config_of(data), workdir, Checkpoints, "remove", 1)
    assert os.path.exists(os.path.join(workdir, "results.json"))
    ssar.main(config_of(data), workdir)
    assert_same(whole, workdir)
    assert os.listdir(tmp_path) == ["run"]


def test_files_that_cannot_be_removed_cost_no_result(data, whole, tmp_path, monkeypatch):
    workdir = str(tmp_path / "run")
    monkeypatch.setattr(Checkpoints, "remove", mock.Mock(side_effect=OSError(39, "Not empty")))
    results = ssar.main(config_of(data), workdir)
    assert json.loads(read(whole, "results.json")) == results


def test_a_folder_behind_a_link_is_set_aside_where_it_lies(data, tmp_path):
    os.makedirs(tmp_path / "disk" / "run")
    os.symlink(tmp_path / "disk" / "run", tmp_path / "link")
    for _ in range(2):
        ssar.main(config_of(data), str(tmp_path / "link"))
    assert sorted(os.listdir(tmp_path / "disk")) == ["run", "run.1"]
    assert os.path.islink(tmp_path / "link")


def test_a_lock_that_was_removed_meanwhile_is_taken_anew(tmp_path, monkeypatch):
    """The process that had it removes it between the other's opening and locking."""
    flock, path = fcntl.flock, str(tmp_path / "lock")
    calls = []

    def late(file, how):
        calls.append(file)
        if len(calls) == 1:
            os.remove(path)
            open(path, "w").close()
        return flock(file, how)

    monkeypatch.setattr(fcntl, "flock", late)
    with lock(str(tmp_path)) as held:
        assert len(calls) == 2 and calls[0].closed
        assert os.path.samestat(os.fstat(held.fileno()), os.stat(path))


def test_two_runs_in_one_folder_are_refused(data, tmp_path):
    workdir = str(tmp_path / "run")
    config = stopped_run(data, workdir)
    with lock(workdir):
        with pytest.raises(InputError, match=f"in use by process {os.getpid()}"):
            ssar.main(config, workdir)
        with pytest.MonkeyPatch.context() as monkeypatch:  # taken after the first look
            monkeypatch.setattr(ssar, "check_workdir", lambda *_: None)
            with pytest.raises(InputError, match="in use by process"):
                ssar.main(config, workdir, resume=False)
    assert os.listdir(tmp_path) == ["run"]
    with open(os.path.join(workdir, "lock"), "w") as file:
        file.write("1\n")  # of a process that died: nobody holds it
    ssar.main(config, workdir)
    assert not os.path.exists(os.path.join(workdir, "lock"))


# ----------------------------------------------------------------------------------- no room


@contextlib.contextmanager
def largest_file(size):
    """While it lasts, files of this process can hold so many bytes, as where a disk is full."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize(
    ("size", "minutes", "done"),
    [
        (500, 0.0, 0),  # config.json is longer
        (4_000, 60.0, 1),  # scores.csv, or tensorboard's file, at some evaluation
        (100_000, 0.0, 0),  # the first checkpoint
        (100_000, 60.0, 3),  # the trained state
    ],
)
def test_without_room_a_run_stops_and_goes_on(size, minutes, done, data, whole, tmp_path):
    workdir = str(tmp_path / "run")
    config = config_of(data, checkpoint_minutes=minutes)
    with largest_file(size), pytest.raises(InputError) as error:
        ssar.main(config, workdir)
    message = str(error.value)
    assert f"{workdir}" in message and "cannot be written (File too large): " in message
    assert "\n" not in message
    if done:
        assert "the same command goes on from the last checkpoint" in message
        assert len(rows_of(workdir, "scores.csv")) >= 2 * done
    del error  # its traceback keeps the run, and its lock, alive
    ssar.main(config, workdir)
    assert_same(whole, workdir)


def test_a_picture_that_cannot_be_written_costs_no_result(data, whole, tmp_path, monkeypatch):
    def no_room(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    workdir = str(tmp_path / "run")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Figure, "savefig", no_room)
        with pytest.raises(InputError, match="run cannot be written .No space left on device.: "):
            ssar.main(config_of(data), workdir)
    assert "results.json" not in os.listdir(workdir)
    ssar.main(config_of(data), workdir)
    assert_same(whole, workdir)


def test_labelling_does_without_checkpoints_where_there_is_no_room(tmp_path, capsys):
    for folder, file in (("full", 1000), ("file", None)):
        path = tmp_path / folder
        if file is None:
            path.write_text("no folder")
        kept = Checkpoints(str(path), 0.0, is_needed=False)
        with largest_file(1000):
            if kept.due():
                kept.save(1, {"a": np.zeros(3)})
        assert not kept.due()
        warning = capsys.readouterr().err
        assert warning.startswith("warning: no checkpoints are kept: ") and warning.count("\n") == 1
    needed = Checkpoints(str(tmp_path / "needed"), 0.0)
    with (
        largest_file(1000),
        pytest.raises(InputError, match="cannot be written .File too large.: "),
    ):
        needed.save(1, {"a": np.zeros(3)})


def test_programs_are_not_kept_where_there_is_no_folder(tmp_path, capsys, monkeypatch):
    (tmp_path / "file").write_text("no folder")
    with pytest.MonkeyPatch.context() as patch:
        config = mock.Mock(jax_compilation_cache_dir=None)
        patch.setattr(cli.jax, "config", config)
        cli.keep_programs(str(tmp_path / "file"))
        config.update.assert_not_called()
        assert "programs are not kept" in capsys.readouterr().err
        os.makedirs(tmp_path / "new" / "compiled")
        (tmp_path / "new" / "compiled" / "whole").write_text("x")
        (tmp_path / "new" / "compiled" / "cut").write_text("")  # as a full disk leaves them
        cli.keep_programs(str(tmp_path / "new"))
        config.update.assert_called_once()
    assert os.listdir(tmp_path / "new" / "compiled") == ["whole"]


def test_without_room_for_the_demo_it_is_not_begun(tmp_path, monkeypatch):
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path))
    with largest_file(100_000), pytest.raises(InputError, match="demo cannot be recorded in .*: "):
        demo_dataset_id("demo")
    assert not os.listdir(tmp_path)


def test_a_process_without_room_says_one_sentence(data, tmp_path):
    (tmp_path / "settings.py").write_text(
        SETTINGS.format(tests=os.path.join(ROOT, "tests"), data=data)
    )
    command = [sys.executable, os.path.join(ROOT, "ssar_td3bc.py")]
    command += [f"--config={tmp_path / 'settings.py'}", f"--workdir={tmp_path / 'run'}"]
    with largest_file(4_000):
        env = os.environ | {"JAX_ENABLE_COMPILATION_CACHE": "false"}  # which would warn as well
        done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == 1
    last = done.stderr.splitlines()[-1]
    assert last.startswith(f"ssar_td3bc: {tmp_path}/run cannot be written (File too large): free ")
    assert "Traceback" not in done.stderr and "Exception" not in done.stderr


# ---------------------------------------------------------------------------------------- signals


@pytest.fixture
def signals():
    """Puts the handlers back."""
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGALRM)
    before = [signal.getsignal(number) for number in numbers]
    yield
    signal.setitimer(signal.ITIMER_REAL, 0)
    for number, handler in zip(numbers, before, strict=True):
        signal.signal(number, handler)
    stopping._caught.clear()


def slow():
    """A program of several seconds."""
    body = lambda _, x: jnp.sin(x @ x)
    return jax.jit(lambda x: jax.lax.fori_loop(0, 3000, body, x))(jnp.ones((600, 600)))


def test_a_signal_ends_a_long_program_after_the_grace(signals, monkeypatch, capsys):
    monkeypatch.setattr(stopping, "GRACE", 0.3)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    stopping.catch_signals()
    result = slow()
    os.kill(os.getpid(), signal.SIGTERM)
    with pytest.raises(stopping.Stopped, match="SIGTERM") as stopped:
        stopping.wait_for(result)
    assert stopped.value.status == 143
    assert not result.is_ready()  # it was not waited for
    assert "SIGTERM: stops within" in capsys.readouterr().err


def test_a_second_signal_ends_it_at_once_and_other_handlers_stay(signals):
    other = lambda *_: None
    signal.signal(signal.SIGTERM, other)
    stopping.catch_signals()
    assert signal.getsignal(signal.SIGTERM) is other
    os.kill(os.getpid(), signal.SIGINT)
    assert stopping.stop_is_due()
    with pytest.raises(stopping.Stopped, match="SIGINT") as stopped:
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(5)
    assert stopped.value.status == 130


def test_a_signal_is_heard_where_nobody_reads_what_is_printed(signals, monkeypatch):
    """Ctrl-C ends what a pipe leads to as well."""
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w", buffering=1) as nowhere:
        monkeypatch.setattr(sys, "stderr", nowhere)
        stopping.catch_signals()
        os.kill(os.getpid(), signal.SIGINT)
        assert stopping.stop_is_due()
        monkeypatch.undo()
        with contextlib.suppress(BrokenPipeError):
            nowhere.flush()
        os.dup2(os.open(os.devnull, os.O_WRONLY), writer)  # or closing it would raise


def test_saving_may_take_longer_than_the_grace(signals, monkeypatch, tmp_path):
    monkeypatch.setattr(stopping, "GRACE", 0.2)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    stopping.catch_signals()
    write = checkpoint._write_digests
    monkeypatch.setattr(checkpoint, "_write_digests", lambda path: time.sleep(0.5) or write(path))
    kept = Checkpoints(str(tmp_path / "kept"), 60.0)
    os.kill(os.getpid(), signal.SIGTERM)
    with pytest.raises(stopping.Stopped) as stopped:
        kept.save(7, {"a": np.arange(3)})
    assert not stopped.value.at_once
    assert kept.load()[1]["step"] == 7


def test_told_to_stop_after_it_diverged_it_says_so(data, tmp_path, monkeypatch, signals):
    """Online, where it would show at the next evaluation alone."""
    config = config_of(data, offline_steps=20, online_steps=40, checkpoint_minutes=60.0)
    online_step, step = ssar.online_step, Collector.step

    def told(envs, actions):
        if envs.steps == 30:
            stopping._caught.append(signal.SIGTERM)
        return step(envs, actions)

    monkeypatch.setattr(Collector, "step", told)
    spoil = lambda tree: jax.tree.map(lambda x: x * jnp.nan, tree)

    class Spoiled:
        """Its program, whose critics are not finite from update 12 on."""

        def lower(self, *args, **kwargs):
            compiled = online_step.lower(*args, **kwargs).compile()

            def run(state, *args):
                state, totals = compiled(state, *args)
                if state.online_step[0] == 12:
                    state = state._replace(critic=spoil(state.critic))
                return state, totals

            return mock.Mock(compile=lambda: run)

        def __call__(self, *args, **kwargs):
            return online_step(*args, **kwargs)

    monkeypatch.setattr(ssar, "online_step", Spoiled())
    workdir = tmp_path / "run"
    with pytest.raises(InputError, match=r"diverged: critic_loss.* is not finite at update 33 "):
        ssar.main(config, str(workdir))
    assert "diverged: critic_loss" in (workdir / "diverged.txt").read_text()
    assert not os.listdir(workdir / "unfinished")


def test_a_second_signal_ends_an_evaluation_unsaved(data, tmp_path, monkeypatch, signals):
    def twice(*_, **__):
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGINT)
        time.sleep(5)

    monkeypatch.setattr(Evaluator, "__call__", twice)
    stopping.catch_signals()
    with contextlib.suppress(stopping.Stopped):
        ssar.main(config_of(data, checkpoint_minutes=60.0), str(tmp_path / "run"))
    assert not os.listdir(tmp_path / "run" / "unfinished")


def test_told_to_stop_within_an_interval_it_is_saved_there(data, tmp_path, monkeypatch, signals):
    """Within intervals and within evaluations; nothing else kept what there was."""
    monkeypatch.setattr(ssar, "UPDATES_PER_CALL", 120)  # six at a time
    settings = {"eval_interval": 60, "online_steps": 120, "checkpoint_minutes": 60.0}
    config = config_of(data, buffer_init="half", **settings)
    ssar.main(config, str(tmp_path / "whole"))
    workdir = str(tmp_path / "run")
    for owner, name, call, phase, step in (
        (ssar, "broken_parts", 2, "offline", 12),
        (Evaluator, "__call__", 1, "offline", 60),
        (Evaluator, "__call__", 2, "online", 0),  # the first is the one just left
        (Collector, "step", 47, "online", 47),
        (Evaluator, "__call__", 1, "online", 60),
    ):
        with pytest.MonkeyPatch.context() as patch:
            work, calls = getattr(owner, name), []

            def told(*args, work=work, calls=calls, call=call, **more):
                calls.append(1)
                if len(calls) == call:
                    stopping._caught.append(signal.SIGTERM)
                return work(*args, **more)

            patch.setattr(owner, name, told)
            with contextlib.suppress(stopping.Stopped):
                ssar.main(config, workdir)
        assert stopping.where_saved() == f"{phase} step {step}"
        stopping._caught.clear()
    ssar.main(config, workdir)
    rows = [rows_of(str(tmp_path / name), "scores.csv") for name in ("whole", "run")]
    assert rows[0][:4] == rows[1][:4]  # two seeds, offline and before the first step online
    assert [row["step"] for row in rows[1]] == [row["step"] for row in rows[0]]
    for seed in "01":
        episodes = [row for row in rows_of(workdir, "episodes.csv") if row["seed"] == seed]
        ends = [int(row["step"]) for row in episodes]
        starts = [end - int(row["length"]) for end, row in zip(ends, episodes, strict=True)]
        assert all(a == b or b in (47, 60) for a, b in zip([0, *ends], starts, strict=False))
    state = load_checkpoint(workdir)["state"]
    np.testing.assert_array_equal(state["step"], 60 + 120 - config.warmup_steps)


SETTINGS = """
import sys
sys.path.insert(0, {tests!r})
from toys import tiny_config

def get_config(task=None):
    return tiny_config({data!r}, num_seeds=2, offline_steps=4000, checkpoint_minutes=60.0)
"""


@pytest.mark.slow
def test_a_signal_saves_and_the_same_command_goes_on(data, tmp_path):
    """An hour from checkpoint to checkpoint: the one there is comes of the signal."""
    (tmp_path / "settings.py").write_text(
        SETTINGS.format(tests=os.path.join(ROOT, "tests"), data=data)
    )
    workdir = str(tmp_path / "run")
    command = [sys.executable, os.path.join(ROOT, "ssar_td3bc.py"), f"--workdir={workdir}"]
    command += [f"--config={tmp_path / 'settings.py'}"]
    reached = 0
    for number, status in ((signal.SIGTERM, 143), (signal.SIGINT, 130)):
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        path = os.path.join(workdir, "scores.csv")
        while not os.path.exists(path) or len(rows_of(workdir, "scores.csv")) < reached + 4:
            assert process.poll() is None, process.stderr.read()[-2000:]
            time.sleep(0.02)
        process.send_signal(number)
        out, err = process.communicate(timeout=60)
        assert process.returncode == status, err[-2000:]
        assert "the same command goes on from offline step " in out.splitlines()[-1]
        assert "Traceback" not in err
        reached = len(rows_of(workdir, "scores.csv"))
        assert len(os.listdir(os.path.join(workdir, "unfinished"))) <= 2
    assert 8 <= reached < 400
    rows = rows_of(workdir, "scores.csv")
    steps = [int(row["step"]) for row in rows if row["seed"] == "0"]
    assert steps == list(range(20, 20 * len(steps) + 1, 20))
