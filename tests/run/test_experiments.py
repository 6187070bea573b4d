"""Comparing, filming and analysing runs with the scripts in experiments/."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import gymnasium
import imageio.v2 as imageio
import numpy as np
import pytest
import toy_script
from comparing import kill, rows_of
from scipy.stats import trim_mean
from toys import Walk, tiny_config, toy_columns, write_hdf5

import ssar_td3bc
from common.run import InputError
from common.run.folder import close_run
from experiments import analyse
from experiments.compare import COLUMNS, compare, interquartile_mean, interval
from experiments.watch import watch

ROOT = Path(__file__).parents[2]


class Drawn(Walk):
    """Walk with a picture."""

    metadata = {"render_modes": ["rgb_array"], "render_fps": 5}

    def __init__(self, render_mode=None):
        self.render_mode = render_mode

    def render(self):
        return np.full((64, 96, 3), 30 * self.steps, np.uint8)


gymnasium.register("ssar-test/Drawn-v0", f"{__name__}:Drawn", max_episode_steps=7)


# ------------------------------------------------------------------------------------- comparing


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Runs of two seeds each; `part` stopped online, and `new` before its first evaluation."""
    folder, online = tmp_path_factory.mktemp("runs"), {"online_steps": 24}
    settings = {"a": {}, "b": {"seed": 2}, "other": {"discount": 0.5}, "mine": {"dataset": "mine"}}
    for name, changes in settings.items():
        toy_script.main(toy_script.toy_config(**online | changes), str(folder / name))
    part = toy_script.toy_config(**online)
    kill(toy_script.main, part, folder / "part", toy_script, "store", 13)
    close_run()
    (folder / "new").mkdir()
    shutil.copy(folder / "a" / "config.json", folder / "new")
    (folder / "new" / "scores.csv").write_text("phase,step,seed,score\n")
    return folder


def test_the_table_gives_means_of_results_over_pooled_seeds(runs, tmp_path):
    table = compare([runs / name for name in ("a", "other", "b", "part")], tmp_path / "x.png")
    rows = [dict(zip(COLUMNS, row, strict=True)) for row in table]
    assert [(row["label"], row["seeds"]) for row in rows] == [
        ("discount=0.99", 4), ("discount=0.5", 2), ("discount=0.99 (unfinished)", 2)
    ]  # fmt: skip
    results = [json.loads((runs / name / "results.json").read_text()) for name in "ab"]
    for key in ("last", "mean_last_10", "best", "n", "behaviour"):
        values = results[0][key] + results[1][key]
        assert rows[0][key] == pytest.approx(np.mean(values)), key
        if f"{key}_low" in COLUMNS:
            assert min(values) <= rows[0][f"{key}_low"] < rows[0][key] < rows[0][f"{key}_high"]
    part = [float(row["score"]) for row in rows_of(runs / "part")[-2:]]
    assert rows[2]["last"] == pytest.approx(np.mean(part)) and np.isnan(rows[2]["behaviour"])


def test_the_interval_of_many_seeds_is_that_of_a_normal_mean():
    values = np.random.default_rng(0).standard_normal((400, 1))
    half = 1.96 * values.std() / 20
    expected = values.mean() + half * np.array([[-1], [1]])
    np.testing.assert_allclose(interval(values), expected, atol=0.1 * half)
    assert np.isnan(interval(values[:1])).all()


def test_the_interquartile_mean_resamples_seeds_within_their_task():
    rng = np.random.default_rng(0)
    tasks = [rng.normal(i, 1, 200 + i) for i in range(3)]
    draws = [np.concatenate([rng.choice(x, len(x)) for x in tasks]) for _ in range(2000)]
    low, high = np.percentile([trim_mean(draw, 0.25) for draw in draws], (2.5, 97.5))
    expected = [trim_mean(np.concatenate(tasks), 0.25), low, high]
    assert interquartile_mean(tasks) == pytest.approx(expected, abs=0.1 * (high - low))
    assert interquartile_mean(tasks)[0] == pytest.approx(expected[0])
    constant = [np.full(5, 0.0), np.full(5, 30.0), np.full(5, 90.0)]
    assert interquartile_mean(constant) == pytest.approx([trim_mean(constant, 0.25, None)] * 3)
    assert np.isnan(interquartile_mean([*constant, np.ones(1)])[1:]).all()


INCOMPARABLE = {
    "a nowhere": r"nowhere has no scores \(.*config.json.*\): name a run folder or wait",
    "a new": r"new has no scores \(.*\): .*wait for its first evaluation",
    "a mine": "a has data demo, but .*mine mine: compare runs of one task at a time",
    "a b a": "both hold seed 0 of the same settings: leave one of them out",
}


@pytest.mark.parametrize("names", INCOMPARABLE)
def test_what_cannot_be_compared_is_named(names, runs, tmp_path):
    with pytest.raises(SystemExit, match=INCOMPARABLE[names]) as error:
        compare([runs / name for name in names.split()], tmp_path / "x.png")
    assert "\n" not in str(error.value) and not (tmp_path / "x.png").exists()


def test_comparing_runs_without_jax(runs, tmp_path):
    code = "import runpy, sys; sys.modules['jax'] = None; sys.argv = sys.argv[1:]; "
    code += "runpy.run_path(sys.argv[0], run_name='__main__')"
    script, out = str(ROOT / "experiments" / "compare.py"), tmp_path / "x.png"
    command = [sys.executable, "-c", code, script, str(runs / "a"), f"--out={out}"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert re.search(r"toy_script +2 +-?\d", done.stdout) and out.stat().st_size > 10_000


# ------------------------------------------------------------------------ watching and analysing


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The folder of a run, which trusts returns above -6, and the episode of each of its rows."""
    folder, columns = tmp_path_factory.mktemp("trained"), toy_columns()
    episode = np.cumsum(np.r_[0, (columns["terminals"] | columns["timeouts"])[:-1]])
    returns = np.bincount(episode, columns["rewards"])
    is_better = (returns > np.median(returns))[episode]  # recorded by the better of two policies
    data = write_hdf5(folder / "toy.hdf5", **columns, **{"infos/policy_id": is_better})
    settings = {"env": "ssar-test/Drawn-v0", "num_seeds": 2, "offline_steps": 20}
    ssar_td3bc.main(tiny_config(data, return_threshold=-6.0, **settings), str(folder / "run"))
    return folder / "run", is_better, (returns > -6)[episode]


def test_the_film_shows_the_last_evaluation(trained, tmp_path, capsys, monkeypatch):
    run, out = shutil.copytree(trained[0], tmp_path / "run"), tmp_path / "x.mp4"
    config = (run / "config.json").read_text()
    (run / "config.json").write_text(config.replace("toy.hdf5", "gone.hdf5"))  # it needs no data
    watch(run, out, seed=1, episodes=3)
    found = re.findall(r"return (-[\d.]+), (\d) steps", capsys.readouterr().out)
    returns, steps = np.array(found, float).T
    last = float(rows_of(run)[-1]["return_mean"])
    np.testing.assert_allclose(returns.mean(), last, atol=0.01)
    frames = imageio.mimread(out)
    assert len(frames) == sum(steps) + 3 and frames[0].shape == (64, 96, 3)
    brightness = [30 * step for length in steps for step in np.arange(length + 1)]
    np.testing.assert_allclose([frame.mean() for frame in frames], brightness, atol=5)

    with pytest.raises(InputError, match=r"--seed=2 is not in .*: choose one of \[0, 1\]"):
        watch(run, out, seed=2)
    with pytest.raises(InputError, match="no usable checkpoint .*nowhere"):
        watch(tmp_path / "nowhere", out)
    monkeypatch.setitem(sys.modules, "imageio_ffmpeg", None)
    with pytest.raises(InputError, match="pip install imageio imageio-ffmpeg"):
        watch(run, out)


def test_the_numbers_of_a_run(trained, tmp_path):
    run, is_better, trusted = trained
    analyse.main([str(run), f"--csv={tmp_path / 'x.csv'}"])
    row, other = rows_of(tmp_path, "x.csv")
    assert (row.pop("run"), row.pop("seed"), other["seed"]) == (str(run), "0", "1")
    row = {name: float(x) for name, x in row.items()}
    assert 0.1 < trusted.mean() < 0.9 and row["trusted"] == pytest.approx(trusted.mean())
    assert row["good"] == pytest.approx(is_better.mean())
    assert row["precision"] == pytest.approx(is_better[trusted].mean())
    assert row["recall"] == pytest.approx(trusted[is_better].mean())
    assert 0 < row["visits_nearest_to_trusted"] < 1
    assert 0 < row["beta_trusted"] < 0.6 and row["beta_trusted"] != row["beta_noise_3.0"]


def test_nearest_states_are_those_of_a_search_by_hand():
    data, points = np.random.default_rng(0).normal(size=(2, 99, 3))
    brute = np.square(points[:, None] - data).sum(-1).argmin(1)
    np.testing.assert_array_equal(analyse.nearest(points, data), brute)
