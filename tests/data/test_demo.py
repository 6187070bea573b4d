"""The demos: what they hold, and when they are recorded."""

from pathlib import Path

import minari
import numpy as np
import pytest
from files import load

from common.data import demo


@pytest.fixture
def few_episodes(monkeypatch, tmp_path):
    """A short demo, in a Minari folder of its own."""
    monkeypatch.setattr(demo, "EPISODES", 4)
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "rows", "score"), [("demo", 30_000, 54.07141), ("demo-sparse", 25_102, 26.83333)]
)
def test_the_whole_demos_are_always_the_same(name, rows, score):
    data = load(dataset=name, env=None)
    assert len(data.rewards) == rows
    assert data.score(data.returns).mean() == pytest.approx(score, abs=1e-4)


def test_the_demo_is_a_real_minari_data_set(few_episodes):
    data = load(dataset="demo", env=None, selection="none")
    stored = minari.load_dataset("ssar-jax/reacher/mixed-v0")
    returns = [episode.rewards.sum() for episode in stored.iterate_episodes()]
    np.testing.assert_allclose(data.returns, returns, rtol=1e-5)
    assert (data.env.id, data.observations.shape) == ("Reacher-v5", (200, 10))


def test_the_sparse_demo_rewards_success_alone(few_episodes):
    data = load(dataset="demo-sparse", env=None, selection="success")
    np.testing.assert_array_equal(data.rewards, data.terminals)
    assert data.env.id == "ssar-jax/SparseReacher-v0"
    assert data.score(data.returns).tolist() == [100, 0, 100, 0]


@pytest.mark.parametrize("missing", ["metadata.json", "main_data.hdf5"])
def test_a_recording_that_was_killed_is_made_again(missing, few_episodes, capsys):
    folder = Path(minari.load_dataset(demo.demo_dataset_id("demo")).storage.data_path)
    whole = {path.name: path.read_bytes() for path in folder.iterdir()}
    (folder / missing).unlink()
    for _ in range(2):
        demo.demo_dataset_id("demo")
    assert capsys.readouterr().err.count("recording ssar-jax/reacher/mixed-v0, once:   0%") == 2
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == whole
