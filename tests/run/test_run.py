"""Run on a miniature script: what it writes, and what survives a kill at any moment."""

import contextlib
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import filelock
import jax.numpy as jnp
import numpy as np
import pytest
import toy_script
from comparing import assert_same, assert_same_state, rows_of
from tensorboardX.proto.event_pb2 import Event
from toy_script import Buffer, main, toy_config

from common.run import checkpoint, cli, folder, stopping
from common.run.checkpoint import load_checkpoint
from common.run.clock import Clock
from common.run.errors import Diverged, InputError
from common.run.folder import close_run
from common.run.records import Records
from common.run.stopping import Stopped

ONLINE = {"online_steps": 24}


class Killed(BaseException):
    """Ends a run where SIGKILL would: nothing is cleaned up."""


@pytest.fixture(autouse=True)
def signals():
    """No signal is pending, and the handlers are put back."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    stopping.received.clear()
    yield
    stopping.received.clear()
    close_run()
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The folder of a run, offline then online, without interruption."""
    workdir = tmp_path_factory.mktemp("runs") / "whole"
    main(toy_config(**ONLINE), str(workdir))
    return workdir


@contextlib.contextmanager
def interrupt(owner, name, call, action):
    """Meanwhile calls `action` before the call-th call of owner.name (1 is the first)."""
    work, calls = getattr(owner, name), []

    def watched(*args, **kwargs):
        calls.append(name)
        if len(calls) == call:
            action()
        return work(*args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(owner, name, watched)
        yield


def kill(config, workdir, owner, name, call):
    """A run that is killed when it calls owner.name for the call-th time."""

    def die():
        raise Killed

    with interrupt(owner, name, call, die), pytest.raises(Killed):
        main(config, str(workdir))


# ------------------------------------------------------------------------------ what it writes


def test_the_folder_holds_what_was_measured(whole):
    files = "checkpoint.msgpack offline_checkpoint.msgpack config.json scores.csv episodes.csv "
    files += "results.json timing.json learning_curve.png tensorboard"
    assert set(os.listdir(whole)) == set(files.split())
    rows = rows_of(whole)
    assert list(rows[0]) == [*"phase step seed score return_mean return_std episodes".split(),
                             "success_rate", "critic_loss", "margin", "n"]  # fmt: skip
    steps = [("offline", step) for step in (12, 24, 36)] + [("online", x) for x in (0, 12, 24)]
    expected = [(phase, str(step), seed) for phase, step in steps for seed in "01"]
    assert [(row["phase"], row["step"], row["seed"]) for row in rows] == expected
    assert {row["success_rate"] for row in rows} == {""}  # the toy reports none
    assert all(row["margin"] == "" for row in rows[6:8])  # no update yet
    results = json.loads((whole / "results.json").read_text())
    assert results["n_stopped_at"] == [None, 12] and results["algorithm"] == "toy_script"
    scores = np.array([float(row["score"]) for row in rows]).reshape(6, 2)
    np.testing.assert_array_equal(results["before_online"], scores[3])
    np.testing.assert_array_equal(results["last"], scores[5])
    np.testing.assert_array_equal(results["best"], scores[4:].max(axis=0))
    np.testing.assert_array_equal(results["mean_last_10"], scores[4:].mean(axis=0))
    timing = json.loads((whole / "timing.json").read_text())
    assert min(timing["steps_per_second"].values()) > 0
    assert 0 <= timing["compile_seconds"] < timing["wall_seconds"]
    assert json.loads((whole / "config.json").read_text())["updates_per_call"] == 4
    assert (whole / "learning_curve.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")


def test_interval_metrics_are_means_over_their_own_updates(whole):
    """Offline over three calls; online 7 of the first 12 steps have an update."""
    state, rows = toy_script.init(toy_config()), rows_of(whole)
    for calls, size, row in ((3, 4, rows[0]), (6, 4, None), (7, 1, rows[8])):
        losses = []
        for _ in range(calls):
            state, metrics = toy_script.train(state, size, online=size == 1)
            losses.append(float(metrics["critic_loss"][0]))
        if row:
            assert float(row["critic_loss"]) == pytest.approx(np.mean(losses), rel=1e-6)


def test_tensorboard_uses_the_authors_tags(whole):
    (path,) = (whole / "tensorboard" / "seed_1").iterdir()
    content, tags, position, count = path.read_bytes(), {}, 0, 0
    while position < len(content):  # length, its checksum, the event, its checksum
        length = int.from_bytes(content[position : position + 8], "little")
        event = Event.FromString(content[position + 12 : position + 12 + length])
        for value in event.summary.value:
            tags[event.step, value.tag] = value.simple_value
        position, count = position + 16 + length, count + len(event.summary.value)
    assert count == len(tags)  # each of them once
    rows = rows_of(whole)
    assert tags[12, "beta_weight"] == pytest.approx(float(rows[1]["margin"]), rel=1e-5)
    assert tags[24, "online_beta_weight"] == pytest.approx(float(rows[-1]["margin"]), rel=1e-5)
    names = "n_away offline_eval_return online_eval_return episode_return is_success"
    assert set(names.split()) <= {tag for _, tag in tags}


def test_checkpoint_holds_the_state_that_was_trained(whole):
    saved = load_checkpoint(str(whole))
    np.testing.assert_array_equal(saved["state"]["step"], [36 + 19] * 2)
    assert saved["trusted"].dtype == bool and saved["fingerprint"] == "0" * 16
    offline = load_checkpoint(str(whole), "offline_checkpoint")
    np.testing.assert_array_equal(offline["state"]["step"], [36] * 2)


# ------------------------------------------------------------------------------------ resuming

MOMENTS = {
    "before any checkpoint": (checkpoint, "write", 1),
    "as the first checkpoint is written": (os, "replace", 2),
    "while labelling": (checkpoint, "write", 3),
    "as a checkpoint is written": (os, "replace", 9),
    "at the end of an interval": (toy_script.Run, "evaluate", 2),
    "in an evaluation": (toy_script, "play", 2),
    "before scores.csv": (Records, "write", 2),
    "between scores.csv and tensorboard": (Records, "_tags", 3),
    "at the switch": (toy_script, "save_checkpoint", 1),
    "online": (toy_script, "store", 17),
    "before the results": (Clock, "report", 1),
    "after the results": (folder, "print_table", 1),
    "as checkpoints are removed": (shutil, "rmtree", 2),
}


@pytest.mark.parametrize("moment", MOMENTS)
def test_a_killed_run_ends_as_if_it_had_not_been(moment, whole, tmp_path, capsys):
    """Also with a checkpoint after every call, and when it is killed at the same place again."""
    config, workdir = toy_config(**ONLINE), tmp_path / "run"
    if moment in ("while labelling", "as a checkpoint is written", "online"):
        config.checkpoint_minutes = 1e-9
    kill(config, workdir, *MOMENTS[moment])
    main(config, str(workdir))
    resumes = f"resumes {workdir} after" in capsys.readouterr().out
    assert resumes == ("first" not in moment and "any" not in moment and "after" not in moment)
    is_finished = "after the results" in moment  # then this is another run
    assert_same(whole, tmp_path / "run.1" if is_finished else workdir)
    assert os.listdir(tmp_path) == ["run"] or is_finished


def test_online_no_row_is_lost_or_doubled(tmp_path):
    """Killed within an interval, the steps after the last checkpoint are made again."""
    config, met, buffers = toy_config(**ONLINE), [], []

    def note(step, buffer):
        met.append(step)
        buffers[:] = [Buffer(*map(np.asarray, buffer))]
        if met == [*range(1, 18)]:
            raise Killed

    with pytest.raises(Killed):
        main(config, str(tmp_path / "run"), met=note)
    main(config, str(tmp_path / "run"), met=note)
    assert met == [*range(1, 18), *range(13, 25)]
    np.testing.assert_array_equal(buffers[0].rows, [[*range(1, 25)]] * 2)
    assert buffers[0].added == 24
    steps = [row["step"] for row in rows_of(tmp_path / "run") if row["seed"] == "0"]
    assert steps == ["12", "24", "36", "0", "12", "24"]
    episodes = [row["step"] for row in rows_of(tmp_path / "run", "episodes.csv")]
    assert episodes == ["5", "10", "15", "20"]


@pytest.mark.parametrize("how", ["truncated", "flipped", "empty"])
def test_a_broken_checkpoint_falls_back_to_the_one_before(how, whole, tmp_path, capsys):
    config, workdir = toy_config(**ONLINE), tmp_path / "run"
    kill(config, workdir, toy_script, "play", 3)
    newest = workdir / "unfinished" / "offline-36.msgpack"
    data = newest.read_bytes()
    flipped = data[:50] + bytes([data[50] ^ 1]) + data[51:]
    newest.write_bytes({"truncated": data[:-9], "flipped": flipped, "empty": b""}[how])
    main(config, str(workdir))
    out, err = capsys.readouterr()
    assert err.count(f"{newest} is broken (its checksum does not match)") == 1
    assert "after offline step 24" in out
    assert_same(whole, workdir)


def test_without_a_whole_checkpoint_it_starts_again(whole, tmp_path):
    config, workdir = toy_config(**ONLINE), tmp_path / "run"
    kill(config, workdir, toy_script, "play", 3)
    for path in (workdir / "unfinished").iterdir():
        path.write_bytes(b"nothing")
    main(config, str(workdir))
    assert_same(whole, workdir)
    assert len(rows_of(tmp_path / "run.1")) == 4  # what had been written is kept
    assert len(os.listdir(tmp_path / "run.1" / "unfinished")) == 3


def test_a_call_of_main_that_raises_leaves_nothing_open(whole, tmp_path):
    """Whoever calls main twice in a process, after an error too, is not in his own way."""
    config, workdir = toy_config(**ONLINE), tmp_path / "run"
    kill(config, workdir, toy_script, "play", 2)
    with filelock.FileLock(workdir / "lock").acquire(timeout=0) if close_run() else None:
        pass  # the lock is free
    kill(config, workdir, toy_script, "play", 2)
    main(config, str(workdir))
    assert_same(whole, workdir)


# ----------------------------------------------------------------------------- nothing is lost


def test_an_earlier_run_is_set_aside(tmp_path, capsys):
    workdir = tmp_path / "run"
    for seed in (0, 5, 6):
        main(toy_config(seed=seed), str(workdir), resume=False)
    seeds = [rows_of(f"{workdir}{end}")[0]["seed"] for end in (".1", ".2", "")]
    assert seeds == ["0", "5", "6"]
    with pytest.raises(InputError, match=r"holds a run with other settings than seed=0 \(there 6"):
        main(toy_config(), str(workdir))
    assert f"the earlier run in {workdir} is now {workdir}.2" in capsys.readouterr().err
    assert (tmp_path / "run.1" / "results.json").exists()


def test_a_folder_behind_a_link_is_set_aside_where_it_lies(tmp_path):
    (tmp_path / "disk" / "run").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "disk" / "run")
    for _ in range(2):
        main(toy_config(), str(tmp_path / "link"))
    assert sorted(os.listdir(tmp_path / "disk")) == ["run", "run.1"]
    assert (tmp_path / "link").is_symlink()


def test_another_run_in_the_folder_is_refused_and_kept(tmp_path, monkeypatch):
    workdir = tmp_path / "run"
    kill(toy_config(), workdir, toy_script, "play", 3)
    before = (workdir / "scores.csv").read_bytes()
    with pytest.raises(InputError, match=r"with other settings than .*seed=3 \(there 0\): give"):
        main(toy_config(seed=3), str(workdir))
    with monkeypatch.context() as patch:
        patch.setattr(toy_script.Scores, "fingerprint", "1" * 16)
        with pytest.raises(InputError, match="had other data or another offline run: restore"):
            main(toy_config(), str(workdir))
    with monkeypatch.context() as patch:
        wider = lambda config: toy_script.State(*(jnp.zeros((2, 9)),) * 6)
        patch.setattr(toy_script, "init", wider)
        with pytest.raises(InputError, match="is of another script or version"):
            main(toy_config(), str(workdir))
    assert (workdir / "scores.csv").read_bytes() == before
    main(toy_config(seed=3), str(workdir), resume=False)
    assert (tmp_path / "run.1" / "scores.csv").read_bytes() == before
    assert rows_of(workdir)[0]["seed"] == "3"


def test_settings_that_may_change_resume_the_run(tmp_path, capsys):
    kill(toy_config(), tmp_path / "run", toy_script, "play", 3)
    main(toy_config(checkpoint_minutes=5.0, cache_dir="/elsewhere"), str(tmp_path / "run"))
    assert "after offline step 36" in capsys.readouterr().out


def test_two_runs_in_one_folder_are_refused(tmp_path):
    workdir = tmp_path / "run"
    kill(toy_config(), workdir, toy_script, "play", 3)
    close_run()
    code = "import filelock, sys; lock = filelock.FileLock(sys.argv[1]); lock.acquire(); print()"
    command = [sys.executable, "-uc", f"{code}; input()", str(workdir / "lock")]
    other = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    other.stdout.readline()
    for resume in (True, False):
        with pytest.raises(InputError, match="is in use by another process: wait for it"):
            main(toy_config(), str(workdir), resume)
    other.kill()
    other.wait()
    main(toy_config(), str(workdir))  # the system released it
    assert os.listdir(tmp_path) == ["run"]


# ------------------------------------------------------------------------------------- signals


def test_told_to_stop_it_saves_and_resumes(whole, tmp_path):
    """While it labels, trains, evaluates and collects."""
    config, workdir = toy_config(**ONLINE, checkpoint_minutes=60.0), tmp_path / "run"
    for owner, name, call, where in (
        (toy_script, "train", 3, "iql step 12"),
        (toy_script, "train", 5, "offline step 8"),
        (toy_script, "store", 7, "online step 7"),
    ):
        tell = lambda: stopping.received.append(signal.SIGTERM)
        with interrupt(owner, name, call, tell), pytest.raises(Stopped) as stopped:
            main(config, str(workdir))
        assert stopped.value.status == 143 and close_run() == where
        stopping.received.clear()
    main(config, str(workdir))
    assert_same(whole, workdir)


def test_signals_are_heard_while_a_call_computes():
    """The handler runs although the main thread waits for the device; a second signal kills."""
    code = """
import os, signal, sys, threading, time
import jax, jax.numpy as jnp
from common.run import stopping
from common.run.folder import Run
stopping.catch_signals()
run = Run.__new__(Run)
run._sums, run._size, run._phase = {}, 1, "offline"
slow = jax.jit(lambda x: jax.lax.fori_loop(0, 10**9, lambda _, x: jnp.sin(x @ x), x))
threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGINT)).start()
threading.Timer(1.0, os.kill, (os.getpid(), signal.SIGINT)).start()
run.log(1, {"x": slow(jnp.ones((300, 300)))})
"""
    began = time.perf_counter()
    command, root = [sys.executable, "-c", code], Path(__file__).parents[2]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=60)
    assert done.returncode == -signal.SIGINT
    assert (
        "SIGINT: finishes the current step, then saves" in done.stderr
        and "Traceback" not in done.stderr
    )
    assert time.perf_counter() - began < 30


# ---------------------------------------------------------------------------------- divergence


def diverge(monkeypatch, call, **bad):
    """The call-th compiled call returns metrics or arrays that are not finite."""
    train, calls = toy_script.train, []

    def broken(*args, **kwargs):
        state, metrics = train(*args, **kwargs)
        calls.append(1)
        if len(calls) == call:
            spoil = lambda x: x.at[1].set(jnp.nan)
            metrics |= {name: spoil(metrics[name]) for name in bad.get("metrics", ())}
            state = state._replace(**{name: spoil(getattr(state, name)) for name in bad["parts"]})
        return state, metrics

    monkeypatch.setattr(toy_script, "train", broken)


def test_divergence_stops_at_once_and_keeps_the_last_checkpoint(tmp_path, monkeypatch):
    """The sixth call labels the last time; nine offline calls follow it."""
    workdir = tmp_path / "run"
    diverge(monkeypatch, 6 + 5, metrics=["margin", "critic_loss"], parts=[])
    words = r"diverged: critic_loss, margin not finite in updates 17 to 20 \(offline\): lower "
    words += "--config.reward_scale, actor_lr or critic_lr; the last finite checkpoint, "
    words += f"offline step 12, stays in {workdir}"
    with pytest.raises(Diverged, match=words):
        main(toy_config(), str(workdir))
    assert "offline-12.msgpack" in os.listdir(workdir / "unfinished")
    assert len(rows_of(workdir)) == 2
    monkeypatch.undo()
    main(toy_config(), str(workdir))  # with the cause removed
    assert (workdir / "results.json").exists()


@pytest.mark.parametrize("phase", ["iql", "offline", "online"])
def test_a_state_that_is_not_finite_is_never_saved(phase, tmp_path, monkeypatch):
    call = {"iql": 6, "offline": 6 + 6, "online": 6 + 9 + 3}[phase]
    diverge(monkeypatch, call, parts=["critic"])
    with pytest.raises(Diverged, match=rf"critic.* \({phase}\)"):
        main(toy_config(**ONLINE), str(tmp_path))
    newest = checkpoint.load_newest(str(tmp_path / "unfinished"))
    assert newest is None or np.isfinite(newest["tree"].get("critic", 0)).all()


def test_online_the_step_is_named_exactly(tmp_path, monkeypatch):
    diverge(monkeypatch, 6 + 9 + 4, metrics=["margin"], parts=[])
    with pytest.raises(Diverged, match=r"margin not finite in environment step 9 \(online\)"):
        main(toy_config(**ONLINE), str(tmp_path))


# ---------------------------------------------------------------------------------------- no room


@contextlib.contextmanager
def largest_file(size):
    """Files of this process hold so many bytes at most, as if the disk were full."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("size", [500, 1_500, 3_000, 6_000])
def test_without_room_a_run_ends_and_resumes(size, whole, tmp_path, monkeypatch):
    """At its settings, a checkpoint, tensorboard's file and the picture."""
    monkeypatch.setattr("threading.excepthook", lambda failure: None)  # as cli does
    workdir = tmp_path / "run"
    with largest_file(size), pytest.raises(OSError, match="File too large") as error:
        main(toy_config(**ONLINE), str(workdir))
    assert error.value.errno in cli.NO_ROOM  # which the command line puts into a sentence
    main(toy_config(**ONLINE), str(workdir))
    assert_same(whole, workdir)


# -------------------------------------------------------------------------- from an offline run


def test_an_offline_run_continues_online(whole, tmp_path):
    """What an offline run leaves, and what was left at the switch, lead to the same."""
    offline = tmp_path / "offline"
    main(toy_config(), str(offline))
    for source, name in ((offline, "a"), (whole, "b")):
        config = toy_config(offline_checkpoint=str(source), **ONLINE)
        main(config, str(tmp_path / name))
        assert rows_of(tmp_path / name) == rows_of(whole)[6:]
        assert_same_state(whole, tmp_path / name)


def test_a_run_that_continued_another_one_resumes_from_that_one_only(tmp_path):
    """Whatever lies in the folder of the offline run by then."""
    offline, online = tmp_path / "offline", tmp_path / "online"
    main(toy_config(), str(offline))
    config = toy_config(offline_checkpoint=str(offline), **ONLINE)
    kill(config, online, toy_script, "store", 17)
    os.rename(offline, tmp_path / "moved")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(toy_script.Scores, "normalizer", SimpleNamespace(mean=1.0, std=2.0))
        main(toy_config(), str(offline))
    with pytest.raises(InputError, match="had other data or another offline run: restore them"):
        main(config, str(online))
    shutil.rmtree(offline)
    os.rename(tmp_path / "moved", offline)
    main(config, str(online))


def test_what_cannot_continue_online_is_refused(whole, tmp_path, monkeypatch):
    def attempt(source, words, **overrides):
        config = toy_config(offline_checkpoint=str(source), **ONLINE, **overrides)
        with pytest.raises(InputError, match=words):
            main(config, str(tmp_path / "new"))
        assert not (tmp_path / "new").exists() or not (tmp_path / "new" / "scores.csv").exists()

    copy = tmp_path / "copy"
    shutil.copytree(whole, copy)
    attempt(copy, r"with other settings than n_end=9.0 \(there 3.0\)", n_end=9.0)
    with monkeypatch.context() as patch:
        patch.setattr(toy_script.Scores, "fingerprint", "1" * 16)
        attempt(copy, "was trained on other data than toy")
    (copy / "offline_checkpoint.msgpack").write_bytes(b"half")
    attempt(copy, "no usable checkpoint .*offline_checkpoint.msgpack .*its checksum does not match")
    os.remove(copy / "offline_checkpoint.msgpack")
    attempt(copy, "was already trained online")
    os.remove(copy / "checkpoint.msgpack")
    attempt(copy, "no usable checkpoint .*checkpoint.msgpack .*No such file")
