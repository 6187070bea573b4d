"""Minari data sets: episodes, keys, downloads, what a data set may not decide."""

import json
import os
import shutil
from pathlib import Path
from unittest import mock

import gymnasium
import h5py
import minari
import numpy as np
import pytest
import toys
from gymnasium import wrappers

from common.data import load_dataset
from common.data import minari as reader
from common.evaluation import Evaluator
from common.run.errors import InputError


@pytest.fixture(autouse=True)
def root(tmp_path, monkeypatch):
    """Minari's local folder, empty."""
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "minari"))
    (tmp_path / "minari").mkdir()
    return tmp_path / "minari"


def load(name, tmp_path, **settings):
    settings = {"env": None, "normalize_observations": False, "selection": "none"} | settings
    settings = {"cache_dir": str(tmp_path / "cache")} | settings
    return load_dataset(toys.tiny_config(dataset=name, **settings))


def record(name, env="ssar-test/Goal-v0", episodes=4, **metadata):
    """A Minari data set, of observations in dictionaries by default."""
    env = gymnasium.make(env) if isinstance(env, str) else env
    spec, env = env.spec, minari.DataCollector(env)
    for seed in range(episodes):
        env.reset(seed=seed)
        done = False
        while not done:
            _, _, terminated, truncated, _ = env.step(np.full(2, 0.1, np.float32))
            done = terminated or truncated
    env.create_dataset(name, algorithm_name="none", author="t", author_email="t",
                       code_permalink="t", description="t", eval_env=spec,
                       **metadata)  # fmt: skip
    return name


def test_columns_are_those_of_the_episodes(tmp_path):
    """Bit for bit what the same episodes in an HDF5 file give."""
    name = record("ssar-test/walk-v0", "ssar-test/Walk-v0", ref_min_score=-20.0, ref_max_score=-10)
    data = load(name, tmp_path)
    columns = toys.record(gymnasium.make("ssar-test/Walk-v0"), 4, lambda *_: np.full(2, 0.1))
    path = toys.write_hdf5(tmp_path / "walk.hdf5", **columns)
    same = load(name, tmp_path, dataset_path=path, env="ssar-test/Walk-v0")
    assert data.fingerprint == same.fingerprint and data.terminals.any()
    assert data.env.id == "ssar-test/Walk-v0" and data.env.max_episode_steps == 7
    assert data.score(-15.0) == 50  # on D4RL's scale, not on Minari's from 0 to 1


def test_dictionaries_are_joined_as_in_evaluation(tmp_path):
    data = load(record("ssar-test/goal-v0"), tmp_path)
    assert data.observation_keys == ("clock", "position")  # alphabetical
    assert "observations joined as clock, position" in str(data)
    seen = []
    act = lambda params, obs: seen.append(obs) or np.zeros((1, 1, 2), np.float32)
    Evaluator(data, num_seeds=1, episodes=1, seed=0)(act, None)
    length = data.episode_ends.argmax() + 1
    np.testing.assert_array_equal(data.observations[:length, 0], np.arange(length))
    assert [float(obs[0, 0, 0]) for obs in seen] == list(range(len(seen)))
    turned = load("ssar-test/goal-v0", tmp_path, observation_keys="position, clock")
    np.testing.assert_array_equal(turned.observations, data.observations[:, [2, 3, 0, 1]])
    one = load("ssar-test/goal-v0", tmp_path, observation_keys="position")
    np.testing.assert_array_equal(one.observations, data.observations[:, 2:])
    for keys, words in (("clok", "'clok' must be"), ("clock,clock", "'clock' must be named once")):
        with pytest.raises(InputError, match=f"{words}.*: clock, position"):
            load("ssar-test/goal-v0", tmp_path, observation_keys=keys)


def test_a_flat_copy_is_kept_until_the_data_change(tmp_path, monkeypatch):
    name = record("ssar-test/flat-v0")
    join = mock.Mock(side_effect=reader._join_episodes)
    monkeypatch.setattr(reader, "_join_episodes", join)
    first, second = load(name, tmp_path), load(name, tmp_path)
    assert first.fingerprint == second.fingerprint and join.call_count == 1
    load(name, tmp_path, observation_keys="clock")
    assert join.call_count == 2
    shutil.rmtree(Path(os.environ["MINARI_DATASETS_PATH"], name))
    assert len(load(record(name, episodes=6), tmp_path).returns) == 6


def test_missing_data_sets_are_downloaded(tmp_path, monkeypatch, root):
    """By their id, or by a remote's address."""
    name = record("ssar-test/remote-v0")
    shutil.move(root / name, tmp_path / "remote")
    download = mock.Mock(side_effect=lambda _: shutil.copytree(tmp_path / "remote", root / name))
    monkeypatch.setattr(minari, "download_dataset", download)
    for address in (name, name, f"hf://somewhere/{name}"):
        assert len(load(address, tmp_path).returns) == 4
    shutil.rmtree(root / name)
    assert len(load(f"hf://somewhere/{name}", tmp_path).returns) == 4
    assert [call.args[0] for call in download.mock_calls] == [name, f"hf://somewhere/{name}"]
    download.side_effect = OSError("no route")
    for missing in ("mujoco/none-v0", "hopper-medium", "not an id"):
        with pytest.raises(
            InputError, match=f"no Minari data set '{missing}', .*no route.: see `m"
        ):
            load(missing, tmp_path)


def lacks_rewards(folder):
    with h5py.File(folder / "main_data.hdf5", "a") as file:
        del file["episode_1/rewards"]


def leads_out(folder):
    lacks_rewards(folder)
    with h5py.File(folder / "main_data.hdf5", "a") as file:
        file["episode_1/rewards"] = h5py.ExternalLink("/etc/hosts.hdf5", "rewards")


def cut_short(folder):
    os.truncate(folder / "main_data.hdf5", 1500)


SHELL = {"name": "shell", "entry_point": "subprocess:getoutput", "kwargs": {"cmd": "touch x"}}
VIDEO = {"name": "Video", "entry_point": "gymnasium.wrappers.x:Y", "kwargs": {"folder": "/tmp"}}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"id": "os:Goal-v0"}, "asks for code or files of its own, .* os:Goal-v0 and argum"),
        ({"additional_wrappers": [SHELL]}, "of its own, .*Goal-v0, with shell and arg"),
        ({"additional_wrappers": [VIDEO]}, "asks for code or files of its own"),
        ({"kwargs": {"a": [{"b": "/etc/passwd"}]}}, "asks for code or files of its own"),
        ({"id": "Nowhere-v0"}, "unknown environment 'Nowhere-v0'"),
        (cut_short, "is broken .*: fix it, or delete it"),
        (lacks_rewards, "is broken .*rewards.*: fix it, or delete it"),
        (leads_out, "'episode_1/rewards' lies in another file"),
    ],
)
def test_data_that_are_broken_or_malicious_are_refused(change, words, tmp_path, root):
    record("ssar-test/bad-v0")
    folder = root / "ssar-test" / "bad-v0" / "data"
    if callable(change):
        change(folder)
    else:
        change_spec(folder, change)
    with pytest.raises(InputError, match=words) as error:
        load("ssar-test/bad-v0", tmp_path)
    assert "\n" not in str(error.value) and len(str(error.value)) < 600


def change_spec(folder, changes):
    path = folder / "metadata.json"
    metadata = json.loads(path.read_text())
    spec = json.loads(metadata["eval_env_spec"]) | changes
    path.write_text(json.dumps(metadata | {"eval_env_spec": json.dumps(spec)}))


def test_a_reference_that_cannot_be_used_is_refused(tmp_path):
    record("ssar-test/bad-v0", ref_min_score=1.0, ref_max_score=1.0)
    with pytest.raises(InputError, match="is broken .*1.0 is not below 1.0"):
        load("ssar-test/bad-v0", tmp_path)


def test_code_that_a_data_set_names_does_not_run(tmp_path, root, capsys):
    """The environment is the one registered here; Gymnasium's wrappers stay, except for rewards."""
    env = wrappers.RescaleAction(gymnasium.make("ssar-test/Walk-v0"), -1.0, 1.0)
    record("ssar-test/sly-v0", wrappers.NormalizeReward(env))
    changes = {"entry_point": "subprocess:getoutput", "max_episode_steps": 3}
    change_spec(root / "ssar-test" / "sly-v0" / "data", changes)
    data = load("ssar-test/sly-v0", tmp_path)
    assert data.env.entry_point == gymnasium.spec("ssar-test/Walk-v0").entry_point
    assert data.env.max_episode_steps == 3
    assert [wrapper.name for wrapper in data.env.additional_wrappers] == ["RescaleAction"]
    assert "recorded through NormalizeReward, which evaluation leaves" in capsys.readouterr().err


def test_spaces_that_cannot_be_flattened_are_named(tmp_path):
    record("ssar-test/odd-v0", "ssar-test/Pair-v0")
    with pytest.raises(InputError, match="odd-v0 has observations of .*: observations must be arr"):
        load("ssar-test/odd-v0", tmp_path)
