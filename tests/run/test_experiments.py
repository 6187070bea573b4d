"""Comparing, filming and analysing runs with the scripts in experiments/."""

import contextlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import gymnasium
import imageio.v2 as imageio
import numpy as np
import pytest
import toy_script
from comparing import rows_of
from matplotlib.figure import Figure
from toys import Walk, tiny_config, toy_columns, write_hdf5

import ssar_td3bc
from common.run import InputError
from common.run.folder import close_run
from experiments import analyse
from experiments.compare import COLUMNS, compare, interval
from experiments.watch import watch

ROOT = Path(__file__).parents[2]


class Drawn(Walk):
    """Walk with a picture."""

    metadata = {"render_modes": ["rgb_array"], "render_fps": 5}

    def __init__(self, render_mode=None):
        self.render_mode = render_mode

    def render(self):
        return np.full((64, 96, 3), 30 * self.steps, np.uint8)


class Undrawn(Drawn):
    """Walk on a machine without a renderer."""

    def render(self):
        raise RuntimeError("no display")


for name in ("Drawn", "Undrawn"):
    gymnasium.register(f"ssar-test/{name}-v0", f"{__name__}:{name}", max_episode_steps=7)


# ------------------------------------------------------------------------------------- comparing


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Runs of two seeds each; `part` stopped online, and `new` before its first evaluation."""
    folder, online = tmp_path_factory.mktemp("runs"), {"online_steps": 24}
    settings = {"a": {}, "b": {"seed": 2}, "other": {"discount": 0.5}, "mine": {"dataset": "mine"}}
    for name, changes in settings.items():
        toy_script.main(toy_script.toy_config(**online | changes), str(folder / name))

    def stop(step, _):
        if step > 12:
            raise InterruptedError

    with contextlib.suppress(InterruptedError):
        toy_script.main(toy_script.toy_config(**online), str(folder / "part"), met=stop)
    close_run()
    (folder / "new").mkdir()
    for name in ("config.json", "scores.csv"):
        text = (folder / "a" / name).read_text()
        (folder / "new" / name).write_text(text.splitlines()[0] if "csv" in name else text)
    return folder


def test_the_table_gives_means_of_results_over_pooled_seeds(runs, tmp_path, capsys):
    table = compare([runs / name for name in ("a", "other", "b", "part")], tmp_path / "x.png")
    rows = [dict(zip(COLUMNS, row, strict=True)) for row in table]
    labels = ["discount=0.99", "discount=0.5", "discount=0.99 (unfinished)"]
    assert [(x["label"], x["seeds"]) for x in rows] == list(zip(labels, (4, 2, 2), strict=True))
    results = [json.loads((runs / name / "results.json").read_text()) for name in "ab"]
    for key in ("last", "mean_last_10", "best", "n", "behaviour"):
        values = results[0][key] + results[1][key]
        assert rows[0][key] == pytest.approx(np.mean(values)), key
        if f"{key}_low" in COLUMNS:
            assert min(values) <= rows[0][f"{key}_low"] < rows[0][key] < rows[0][f"{key}_high"]
    part = [float(row["score"]) for row in rows_of(runs / "part")[-2:]]
    assert rows[2]["last"] == pytest.approx(np.mean(part)) and np.isnan(rows[2]["behaviour"])
    lines = capsys.readouterr().out.splitlines()
    assert [line[: len(label)] for line, label in zip(lines[1:-1], labels, strict=True)] == labels


def test_the_picture_has_means_bands_and_the_switch(runs, tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *_, **__: drawn.append(figure.axes[0]))
    compare([runs / name for name in ("a", "part")], tmp_path / "x.png")
    whole, switch, part, _ = drawn[0].lines
    assert [whole.get_label(), part.get_label()] == [
        "toy_script, 2 seeds", f"{runs}/part (unfinished), 2 seeds"
    ]  # fmt: skip
    assert (whole.get_linestyle(), part.get_linestyle()) == ("-", "--")
    np.testing.assert_allclose(1000 * whole.get_xdata(), [12, 24, 36, 36, 48, 60])
    np.testing.assert_allclose(1000 * part.get_xdata(), [12, 24, 36, 36, 48])
    np.testing.assert_allclose(1000 * np.array(switch.get_xdata()), 36)
    scores = np.reshape([float(row["score"]) for row in rows_of(runs / "a")], (6, 2))
    np.testing.assert_allclose(whole.get_ydata(), scores.mean(axis=1))
    band = drawn[0].collections[0].get_paths()[0].vertices[:, 1]
    assert (band.min(), band.max()) == (scores.min(), scores.max())  # all that two seeds say


def test_the_interval_of_many_seeds_is_that_of_a_normal_mean():
    values = np.random.default_rng(0).standard_normal((400, 1))
    half = 1.96 * values.std() / 20
    expected = values.mean() + half * np.array([[-1], [1]])
    np.testing.assert_allclose(interval(values), expected, atol=0.1 * half)
    assert np.isnan(interval(values[:1])).all()


@pytest.mark.parametrize(
    ("names", "words"),
    [
        (
            ["a", "nowhere"],
            r"nowhere has no scores \(.*config.json.*\): name a run folder, such as .*/0, or",
        ),
        (["a", "new"], r"new has no scores \(.*\): .*wait for its first evaluation"),
        (["a", "mine"], "a has data demo, but .*mine mine: compare runs of one task at a time"),
        (["a", "b", "a"], "both hold seed 0 of the same settings: leave one of them out"),
    ],
)
def test_what_cannot_be_compared_is_named(names, words, runs, tmp_path):
    with pytest.raises(SystemExit, match=words) as error:
        compare([runs / name for name in names], tmp_path / "x.png")
    assert "\n" not in str(error.value) and not (tmp_path / "x.png").exists()


def test_comparing_runs_without_jax(runs, tmp_path):
    code = "import runpy, sys; sys.modules['jax'] = None; sys.argv = sys.argv[1:]; "
    code += "runpy.run_path(sys.argv[0], run_name='__main__')"
    script, out = str(ROOT / "experiments" / "compare.py"), tmp_path / "x.png"
    command = [sys.executable, "-c", code, script, str(runs / "a"), f"--out={out}"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert re.search(r"toy_script +2 +-?\d", done.stdout) and out.stat().st_size > 10_000


# -------------------------------------------------------------------------------------- watching


def train(folder, env="ssar-test/Drawn-v0", **settings):
    """A run whose data set is gone afterwards."""
    data = write_hdf5(folder / "toy.hdf5", **toy_columns())
    config = tiny_config(data, env=env, num_seeds=2, offline_steps=20, **settings)
    ssar_td3bc.main(config, str(folder / "run"))
    os.remove(data)
    return folder / "run"


def test_the_film_shows_the_last_evaluation(tmp_path, capsys):
    run, out = train(tmp_path), tmp_path / "x.mp4"
    capsys.readouterr()
    watch(run, out, seed=1, episodes=3)
    found = re.findall(r"return (-[\d.]+), (\d) steps", capsys.readouterr().out)
    returns, steps = np.array(found, float).T
    last = float(rows_of(run)[-1]["return_mean"])
    np.testing.assert_allclose(returns.mean(), last, atol=0.01)
    frames = imageio.mimread(out)
    assert len(frames) == sum(steps) + 3 and frames[0].shape == (64, 96, 3)
    brightness = [30 * step for length in steps for step in np.arange(length + 1)]
    np.testing.assert_allclose([frame.mean() for frame in frames], brightness, atol=5)
    with pytest.raises(InputError, match=r"seeds \[0, 1\]: choose among these"):
        watch(run, out, seed=2)


def test_what_a_film_needs_is_named(tmp_path, monkeypatch):
    with pytest.raises(InputError, match="no usable checkpoint .*nowhere"):
        watch(tmp_path / "nowhere", tmp_path / "x.mp4")
    run = train(tmp_path, "ssar-test/Undrawn-v0")
    with pytest.raises(InputError, match=r"cannot be drawn \(no display\): install what"):
        watch(run, tmp_path / "x.mp4")
    monkeypatch.setitem(sys.modules, "imageio_ffmpeg", None)
    with pytest.raises(InputError, match="pip install imageio imageio-ffmpeg"):
        watch(run, tmp_path / "x.mp4")
    env = os.environ | {"MUJOCO_GL": "paper"}
    command = [sys.executable, str(ROOT / "experiments" / "watch.py"), str(run)]
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr.count("\n") == 1
    assert done.stderr.startswith("watch: MUJOCO_GL=paper does not work")


# ------------------------------------------------------------------------------------- analysing


def test_the_numbers_of_a_run(tmp_path, capsys):
    columns = toy_columns()
    ends = columns["terminals"] | columns["timeouts"]
    episode = np.cumsum(np.r_[0, ends[:-1]])
    returns = np.bincount(episode, columns["rewards"])
    is_better = (returns > np.median(returns))[episode]  # by the better of two policies
    data = write_hdf5(tmp_path / "toy.hdf5", **columns, **{"infos/policy_id": is_better})
    config = tiny_config(data, offline_steps=20, selection="return", return_threshold=-6.0)
    ssar_td3bc.main(config, str(tmp_path / "run"))
    analyse.main([str(tmp_path / "run"), f"--csv={tmp_path / 'x.csv'}"])
    (row,) = [
        {k: float(x) for k, x in row.items() if k != "run"} for row in rows_of(tmp_path, "x.csv")
    ]
    trusted = (returns > -6)[episode]
    assert 0.1 < trusted.mean() < 0.9 and row["trusted"] == pytest.approx(trusted.mean())
    assert row["good"] == pytest.approx(is_better.mean())
    assert row["precision"] == pytest.approx(is_better[trusted].mean())
    assert row["recall"] == pytest.approx(trusted[is_better].mean())
    assert 0 < row["visits_nearest_to_trusted"] < 1
    assert 0 < row["beta_trusted"] < 0.6 and row["beta_trusted"] != row["beta_noise_3.0"]
    assert f"{row['q_error']:.3f}" in capsys.readouterr().out


def test_returns_and_nearest_states():
    class Play:
        """Rewards 1, 2, 4; then the episode ends."""

        obs, left = np.zeros(2), 3

        def start(self, seed):
            self.left = 3

        def step(self, action):
            self.left -= 1
            return 2.0 ** (2 - self.left), False, self.left == 0

    class Data:
        env = observation_keys = None
        normalizer = staticmethod(lambda obs: obs)

    class Config:
        reward_scale, reward_bias, discount = 2.0, 1.0, 0.5

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(analyse, "Slot", lambda *_: Play())
        act, value = lambda *_: np.zeros((1, 1)), lambda *_: 8.0
        _, _, returns = analyse.play(act, None, value, Data, Config)
    last = 9 + 8 / 2  # what follows the end of time
    assert returns[:3].tolist() == [3 + 5 / 2 + last / 4, 5 + last / 2, last]
    assert len(returns) == 30
    data, points = np.random.default_rng(0).normal(size=(2, 99, 3))
    brute = np.square(points[:, None] - data).sum(-1).argmin(1)
    np.testing.assert_array_equal(analyse.nearest(points, data), brute)
