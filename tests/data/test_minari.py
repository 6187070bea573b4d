"""Minari data sets: episodes, keys, downloads, what a data set may not decide."""

import json
import shutil
from unittest import mock

import gymnasium
import h5py
import minari
import numpy as np
import pytest
from files import load, refused, write
from toys import record as record_columns

from common.evaluation import Evaluator

NAME = "ssar-test/recorded-v0"
DATA = {"dataset": NAME, "env": None}
TENTH = np.full(2, 0.1, np.float32)


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """Where the data set NAME lies, in a Minari folder of its own."""
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "minari"))
    (tmp_path / "minari").mkdir()
    return tmp_path / "minari" / NAME


def record(env_id, **metadata):
    """Four episodes of one action, as the data set NAME."""
    env = minari.DataCollector(gymnasium.make(env_id))
    for seed in range(4):
        env.reset(seed=seed)
        while not any(env.step(TENTH)[2:4]):
            pass
    about = dict.fromkeys(("algorithm_name", "author", "author_email", "code_permalink"), "x")
    env.create_dataset(NAME, description="x", eval_env=env_id, **about, **metadata)


def test_columns_are_those_of_the_episodes(tmp_path):
    """Bit for bit what the same episodes in an HDF5 file give."""
    record("ssar-test/Walk-v0", ref_min_score=-20.0, ref_max_score=-10)
    data = load(**DATA)
    columns = record_columns(gymnasium.make("ssar-test/Walk-v0"), 4, lambda *_: TENTH)
    same = load(write(tmp_path, columns))
    assert data.fingerprint == same.fingerprint and data.terminals.any()
    assert data.env.id == "ssar-test/Walk-v0" and data.env.max_episode_steps == 7
    assert data.score(-15.0) == 50  # on D4RL's scale, not on Minari's from 0 to 1


def test_dictionaries_are_joined_as_in_evaluation():
    """Minari stores discrete parts as one number a step."""
    record("ssar-test/Goal-v0")
    data = load(**DATA)
    assert data.observation_keys == ("clock", "one", "position")  # alphabetical
    assert "observations joined as clock, one, position" in str(data)
    seen, act = [], lambda _, obs: seen.append(obs[0, 0]) or TENTH[None, None]
    Evaluator(data, num_seeds=1, episodes=1, seed=0)(act, None)
    np.testing.assert_array_equal(seen, data.observations[: len(seen)])
    assert [row[:2].tolist() for row in seen] == [[i, 1] for i in range(len(seen))]
    turned = load(**DATA, observation_keys="position, clock")
    np.testing.assert_array_equal(turned.observations, data.observations[:, [2, 3, 0]])


def test_missing_data_sets_are_downloaded(tmp_path, monkeypatch, folder):
    """By their id, or by a remote's address."""
    record("ssar-test/Walk-v0")
    shutil.move(folder, tmp_path / "remote")
    download = mock.Mock(side_effect=lambda _: shutil.copytree(tmp_path / "remote", folder))
    monkeypatch.setattr(minari, "download_dataset", download)
    address = f"hf://somewhere/{NAME}"
    for name in (NAME, NAME, address):
        assert len(load(dataset=name, env=None).returns) == 4
    shutil.rmtree(folder)
    assert len(load(dataset=address, env=None).returns) == 4
    assert [call.args[0] for call in download.mock_calls] == [NAME, address]
    download.side_effect = OSError("no route")
    for missing in ("mujoco/none-v0", "hopper-medium", "not an id"):
        message = refused(dataset=missing, env=None)
        assert message.startswith(f"no Minari data set '{missing}' here, nor could it be down")
        assert "no route): see `minari list local`" in message


BROKEN = {
    "spaces": "is not readable (KeyError: 'no spaces'): give a complete copy, close what is",
    "rewards": "'episode_2/rewards' lies in another file",
    "observations": "episode 2 has 5 observations and 5 actions for 5 rewards: record it",
}


@pytest.mark.parametrize("part", BROKEN)
def test_data_that_are_broken_or_malicious_are_refused(part, folder):
    """Without spaces, Minari would make the environment, which is a command, to see them."""
    record("ssar-test/Walk-v0")
    path = folder / "data" / "metadata.json"
    if part == "spaces":
        path.write_text(path.read_text().replace("observation_space", "x"))
    else:
        elsewhere = h5py.ExternalLink("/etc/hosts.hdf5", part)
        with h5py.File(path.with_name("main_data.hdf5"), "a") as file:
            fewer = file["episode_2"][part][:-1]
            del file["episode_2"][part]
            file["episode_2"][part] = elsewhere if part == "rewards" else fewer
    assert BROKEN[part] in refused(**DATA)


def test_code_that_a_data_set_names_does_not_run(folder, capsys):
    """The environment is the one registered here, and only harmless wrappers of Gymnasium stay."""
    record("ssar-test/Walk-v0")
    wrappers = [
        ("gymnasium.wrappers.transform_action:RescaleAction", {"min_action": -1, "max_action": 1}),
        ("gymnasium.wrappers.stateful_observation:NormalizeObservation", {}),
        ("gymnasium.wrappers.stateful_reward:NormalizeReward", {}),
        ("gymnasium.wrappers.rendering:RecordVideo", {"video_folder": "x"}),
        ("gymnasium.wrappers.x:Delay", {"a": "/tmp"}),
        ("subprocess:getoutput", {"cmd": "touch x"}),
    ]
    keys = ("name", "entry_point", "kwargs")
    wrappers = [(entry.split(":")[1], entry, kwargs) for entry, kwargs in wrappers]
    spec = {"id": "antigravity:ssar-test/Walk-v0", "entry_point": "subprocess:getoutput"}
    spec |= {"kwargs": {"render_mode": "human", "a": ["/etc/passwd"]}, "max_episode_steps": 3}
    spec["additional_wrappers"] = [dict(zip(keys, x, strict=True)) for x in wrappers]
    path = folder / "data" / "metadata.json"
    metadata = json.loads(path.read_text()) | {"eval_env_spec": json.dumps(spec)}
    path.write_text(json.dumps(metadata))
    data = load(**DATA)
    assert data.env.entry_point == gymnasium.spec("ssar-test/Walk-v0").entry_point
    assert (data.env.max_episode_steps, data.env.kwargs) == (3, {})
    assert [wrapper.name for wrapper in data.env.additional_wrappers] == ["RescaleAction"]
    names = "a, NormalizeObservation, NormalizeReward, RecordVideo, Delay, getoutput"
    assert f"evaluation leaves out {names} of {NAME}" in capsys.readouterr().err
