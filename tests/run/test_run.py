"""Run on a miniature script: what it writes, and what survives a kill at any moment."""

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import filelock
import jax.numpy as jnp
import numpy as np
import pytest
import toy_script
from comparing import Killed, assert_same, assert_same_state, interrupt, kill, rows_of
from matplotlib.figure import Figure
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from toy_script import Buffer, main, toy_config

from common.run import checkpoint, folder, stopping
from common.run.clock import Clock
from common.run.diagnosis import broken_parts
from common.run.errors import Diverged, InputError
from common.run.folder import close_run
from common.run.records import Records
from common.run.stopping import Stopped

ONLINE = {"online_steps": 24}


@pytest.fixture(autouse=True)
def nothing_left():
    """After a test no signal is pending, no run is open, and signals are handled as before."""
    before = [(number, signal.getsignal(number)) for number in (signal.SIGINT, signal.SIGTERM)]
    yield
    stopping.received.clear()
    close_run()
    for place in before:
        signal.signal(*place)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The folder of a run, offline then online, without interruption."""
    workdir = tmp_path_factory.mktemp("runs") / "whole"
    main(toy_config(**ONLINE), str(workdir))
    return workdir


# ------------------------------------------------------------------------------ what it writes


def test_the_folder_holds_what_was_measured(whole):
    files = "checkpoint.msgpack offline_checkpoint.msgpack config.json scores.csv episodes.csv "
    files += "results.json timing.json learning_curve.png tensorboard"
    assert set(os.listdir(whole)) == set(files.split())
    rows, results = rows_of(whole), json.loads((whole / "results.json").read_text())
    columns = "phase step seed score return_mean return_std episodes success_rate"
    assert list(rows[0]) == [*columns.split(), "critic_loss", "margin", "n"]
    steps = [("offline", step) for step in (12, 24, 36)] + [("online", x) for x in (0, 12, 24)]
    expected = [(phase, str(step), seed) for phase, step in steps for seed in "01"]
    assert [(row["phase"], row["step"], row["seed"]) for row in rows] == expected
    assert {row["success_rate"] for row in rows} == {""}  # the toy reports none
    assert all(row["margin"] == "" for row in rows[6:8])  # no update yet
    scores = np.array([float(row["score"]) for row in rows]).reshape(6, 2)
    np.testing.assert_array_equal(results["before_online"], scores[3])
    np.testing.assert_array_equal(results["last"], scores[5])
    np.testing.assert_array_equal(results["best"], scores[4:].max(axis=0))
    np.testing.assert_array_equal(results["mean_last_10"], scores[4:].mean(axis=0))
    assert results["n_stopped_at"] == [None, 12]
    timing = json.loads((whole / "timing.json").read_text())
    assert min(timing["steps_per_second"].values()) > 0
    assert 0 <= timing["compile_seconds"] < timing["wall_seconds"]


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
    events = EventAccumulator(str(whole / "tensorboard" / "seed_1")).Reload()
    tags = {tag: {x.step: x.value for x in events.Scalars(tag)} for tag in events.Tags()["scalars"]}
    assert all(len(events.Scalars(tag)) == len(tags[tag]) for tag in tags)  # each of them once
    offline, online = (float(rows_of(whole)[i]["margin"]) for i in (1, -1))
    assert tags["beta_weight"][12] == pytest.approx(offline, rel=1e-5)
    assert tags["online_beta_weight"][24] == pytest.approx(online, rel=1e-5)
    names = "n_away offline_eval_return online_eval_return episode_return is_success"
    assert set(names.split()) <= tags.keys()


def test_a_collapse_is_named_on_the_screen_in_results_and_picture(tmp_path, monkeypatch, capsys):
    """As soon as it shows, and at the end."""
    returns, drawn = iter([-10.0] * 7 + [-60.0] * 4), []

    def play(_):
        value = np.full((2, 3), next(returns))
        return SimpleNamespace(returns=value, success=np.nan * value)

    def savefig(figure, path, **_):
        drawn.append(figure.get_supxlabel())

    monkeypatch.setattr(toy_script, "play", play)
    monkeypatch.setattr(Figure, "savefig", savefig)
    warnings = main(toy_config(offline_steps=11 * 12), str(tmp_path / "run"))["warnings"]
    assert len(warnings) == 2 and all(text.startswith("collapse") for text in warnings)
    err = capsys.readouterr().err
    for seed, text in enumerate(warnings):
        sign = text.partition(":")[0]
        assert sign.endswith(f"(seed {seed})") and sign in drawn[0]
        assert err.count(f"warning: {sign}") == 2


# ------------------------------------------------------------------------------------ resuming

MOMENTS = {
    "before any checkpoint": (checkpoint, "write", 1),
    "while labelling": (checkpoint, "write", 3),
    "as a checkpoint is written": (os, "replace", 9),
    "in an evaluation": (toy_script, "play", 2),
    "between scores.csv and tensorboard": (Records, "_tags", 3),
    "at the switch": (toy_script, "save_checkpoint", 1),
    "before the results": (Clock, "report", 1),
    "after the results": (folder, "print_table", 1),
    "as checkpoints are removed": (shutil, "rmtree", 2),
}


@pytest.mark.parametrize("moment", MOMENTS)
def test_a_killed_run_ends_as_if_it_had_not_been(moment, whole, tmp_path, capsys):
    config, workdir = toy_config(**ONLINE), tmp_path / "run"
    if moment in ("while labelling", "as a checkpoint is written"):
        config.checkpoint_minutes = 1e-9  # a checkpoint after every call
    kill(main, config, workdir, *MOMENTS[moment])
    main(config, str(workdir))
    resumes = f"resumes {workdir} after" in capsys.readouterr().out
    assert resumes == (moment not in ("before any checkpoint", "after the results"))
    is_finished = moment == "after the results"  # then this is another run
    assert_same(whole, tmp_path / "run.1" if is_finished else workdir)
    assert os.listdir(tmp_path) == ["run"] or is_finished


def test_online_no_row_is_lost_or_doubled(whole, tmp_path):
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
    assert_same(whole, tmp_path / "run")  # and with it scores.csv and episodes.csv


@pytest.mark.parametrize("broken", ["newest", "all"])
def test_broken_checkpoints_are_passed_over(broken, whole, tmp_path, capsys):
    config, workdir = toy_config(**ONLINE), tmp_path / "run"
    kill(main, config, workdir, toy_script, "play", 3)
    paths = checkpoint.list_unfinished(workdir / "unfinished")
    paths = paths[:1] if broken == "newest" else paths
    for path in map(Path, paths):
        data = path.read_bytes()
        path.write_bytes(data[:50] + bytes([data[50] ^ 1]) + data[51:])
    main(config, str(workdir))
    out, err = capsys.readouterr()
    assert all(f"{path} is broken (its checksum does not match)" in err for path in paths)
    assert_same(whole, workdir)
    if broken == "newest":
        assert "after offline step 24" in out
    else:  # it starts again, and what had been written is kept
        assert len(rows_of(tmp_path / "run.1")) == 4
        assert len(os.listdir(tmp_path / "run.1" / "unfinished")) == 3


# ----------------------------------------------------------------------------- nothing is lost


def test_an_earlier_run_is_set_aside_where_it_lies(tmp_path, capsys):
    """The folder is a link."""
    disk, link = tmp_path / "disk", tmp_path / "link"
    (disk / "run").mkdir(parents=True)
    link.symlink_to(disk / "run")
    anew = partial(main, resume=False)
    for seed in (0, 5, 6):
        kill(anew, toy_config(seed=seed), link, toy_script, "play", 2)
    seeds = [rows_of(disk / name)[0]["seed"] for name in ("run.1", "run.2", "run")]
    assert seeds == ["0", "5", "6"] and link.is_symlink()
    assert f"the earlier run in {disk}/run is now {disk}/run.2" in capsys.readouterr().err


def test_an_unfinished_run_resumes_with_its_own_data_and_script_only(tmp_path, monkeypatch, capsys):
    workdir = tmp_path / "run"
    kill(main, toy_config(), workdir, toy_script, "play", 3)
    before = (workdir / "scores.csv").read_bytes()
    others = replace(toy_script.DATA, fingerprint="1" * 16)
    wider = lambda config: toy_script.State(*(jnp.zeros((2, 9)),) * 6)
    for owner, name, other, words in (
        (toy_script, "DATA", others, "had other data or another offline run"),
        (toy_script, "init", wider, "is of another script or version"),
    ):
        with monkeypatch.context() as patch, pytest.raises(InputError, match=words):
            patch.setattr(owner, name, other)
            main(toy_config(), str(workdir))
    assert (workdir / "scores.csv").read_bytes() == before
    main(toy_config(checkpoint_minutes=5.0, cache_dir="/elsewhere"), str(workdir))
    assert "after offline step 36" in capsys.readouterr().out


def test_two_runs_in_one_folder_are_refused(tmp_path):
    workdir = tmp_path / "run"
    kill(main, toy_config(), workdir, toy_script, "play", 3)
    close_run()
    with filelock.FileLock(workdir / "lock"):
        for resume in (True, False):
            with pytest.raises(InputError, match="is in use by another process: wait for it"):
                main(toy_config(), str(workdir), resume)
    main(toy_config(), str(workdir))
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


def test_a_second_signal_ends_the_process_while_a_call_computes():
    """The handler runs although the main thread waits for the device."""
    code = """
import os, signal, threading
import jax, jax.numpy as jnp
from common.run import stopping
from common.run.folder import Run
stopping.catch_signals()
run = Run.__new__(Run)
stopping.open_runs.append(run)
slow = jax.jit(lambda x: jax.lax.fori_loop(0, 10**9, lambda _, x: jnp.sin(x @ x), x))
for seconds in (0.5, 1.0):
    threading.Timer(seconds, os.kill, (os.getpid(), signal.SIGINT)).start()
run.log(1, {"x": slow(jnp.ones((300, 300)))})
"""
    command, root = [sys.executable, "-c", code], Path(__file__).parents[2]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=30)
    assert done.returncode == -signal.SIGINT
    assert "SIGINT: finishes the current step, then saves" in done.stderr


def test_before_there_is_a_run_a_signal_ends_the_process():
    stopping.catch_signals()
    with pytest.raises(Stopped, match="SIGTERM"):
        os.kill(os.getpid(), signal.SIGTERM)
    with pytest.raises(Stopped, match="SIGTERM"):
        stopping.stop_if_told()  # where the first one was ignored


def test_a_schedulers_handler_stays_and_other_threads_change_nothing():
    scheduler = lambda *_: None
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, scheduler)
    with ThreadPoolExecutor(1) as pool:
        pool.submit(stopping.catch_signals).result()
    assert signal.getsignal(signal.SIGINT) is scheduler
    stopping.catch_signals()
    assert signal.getsignal(signal.SIGINT) is not scheduler
    assert signal.getsignal(signal.SIGTERM) is scheduler


# ---------------------------------------------------------------------------------- divergence


NOT_FINITE = [
    # The phase, what its compiled call number `call` spoils, and what the message names
    ("iql", 6, ["critic"], "critic not finite between iql steps 20 and 24"),
    ("offline", 6 + 5, ["margin", "critic_loss"],
     "critic_loss, margin not finite between offline steps 16 and 20"),
    ("offline", 6 + 6, ["critic"], "critic not finite between offline steps 20 and 24"),
    ("online", 6 + 9 + 3, ["critic"], "critic_loss not finite between online steps 8 and 9"),
]  # fmt: skip


@pytest.mark.parametrize(("phase", "call", "spoiled", "words"), NOT_FINITE)
def test_divergence_stops_at_once_and_is_never_saved(
    phase, call, spoiled, words, tmp_path, monkeypatch
):
    train, calls = toy_script.train, []
    spoil = lambda x: {name: x[name].at[1].set(jnp.nan) for name in spoiled if name in x}

    def broken(*args, **kwargs):
        state, metrics = train(*args, **kwargs)
        calls.append(1)
        if len(calls) == call:
            state, metrics = state._replace(**spoil(state._asdict())), metrics | spoil(metrics)
        return state, metrics

    monkeypatch.setattr(toy_script, "train", broken)
    with pytest.raises(Diverged, match=f"diverged: {words}: lower") as error:
        main(toy_config(**ONLINE), str(tmp_path))
    newest, kept = checkpoint.load_newest(str(tmp_path / "unfinished")), "no checkpoint was due"
    if newest:
        kept = f"finite checkpoint, {newest['phase']} step {newest['step']}, stays in {tmp_path}"
        assert not broken_parts(newest["tree"])
    assert kept in str(error.value)


# ---------------------------------------------------------------------------------------- no room


@pytest.mark.parametrize("size", [500, 1_500, 3_000, 6_000])
def test_without_room_a_run_ends_and_resumes(size, whole, tmp_path, monkeypatch):
    """At its settings, a checkpoint, tensorboard's file and the picture."""
    monkeypatch.setattr("threading.excepthook", lambda failure: None)  # as cli does
    config, workdir = toy_config(**ONLINE), tmp_path / "run"
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:  # no file may grow larger, as if the disk were full
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
        with pytest.raises(OSError, match="File too large"):
            main(config, str(workdir))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    main(config, str(workdir))
    assert_same(whole, workdir)


# -------------------------------------------------------------------------- from an offline run


def test_a_run_continues_and_resumes_from_the_offline_part_of_one_run_only(whole, tmp_path):
    """An online run's folder holds the checkpoint from the end of its offline part."""
    parent, online = tmp_path / "parent", tmp_path / "online"
    shutil.copytree(whole, parent)
    config = toy_config(offline_checkpoint=str(parent), **ONLINE)
    kill(main, config, online, toy_script, "store", 17)
    start = parent / "offline_checkpoint.msgpack"
    content = start.read_bytes()
    start.write_bytes(b"another run's")
    with pytest.raises(InputError, match="had other data or another offline run: restore them"):
        main(config, str(online))
    start.write_bytes(content)
    main(config, str(online))
    assert rows_of(online) == rows_of(whole)[6:]
    assert_same_state(whole, online)
    start.unlink()
    with pytest.raises(InputError, match="was already trained online: name an offline run"):
        main(config, str(tmp_path / "new"))
