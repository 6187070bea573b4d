"""Minari data sets: episodes, keys, downloads, what a data set may not decide."""

import json
import shutil
from unittest import mock

import files
import gymnasium
import h5py
import minari
import numpy as np
import pytest
import toys
from gymnasium import spaces

from common.evaluation import Evaluator

NAME = "ssar-test/recorded-v0"
TENTH = np.full(2, 0.1, np.float32)


class Parts(toys.Walk):
    """Walk with observations in discrete parts."""

    observation_space = spaces.Dict(
        c=spaces.MultiDiscrete([3, 3]), b=spaces.MultiBinary(2), a=spaces.Discrete(9)
    )

    def _observation(self):
        return {"c": np.array([2, self.steps % 3]), "b": np.ones(2, np.int8), "a": self.steps}


gymnasium.register("ssar-test/Parts-v0", f"{__name__}:Parts", max_episode_steps=7)


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """Where the data set NAME lies, in a Minari folder of its own."""
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "minari"))
    (tmp_path / "minari").mkdir()
    return tmp_path / "minari" / NAME


def load(name=NAME, **settings):
    return files.load(None, **({"dataset": name, "env": None} | settings))


def refused(name=NAME):
    return files.refused(None, dataset=name, env=None)


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
    data = load()
    columns = toys.record(gymnasium.make("ssar-test/Walk-v0"), 4, lambda *_: TENTH)
    same = files.load(files.write(tmp_path, columns))
    assert data.fingerprint == same.fingerprint and data.terminals.any()
    assert data.env.id == "ssar-test/Walk-v0" and data.env.max_episode_steps == 7
    assert data.score(-15.0) == 50  # on D4RL's scale, not on Minari's from 0 to 1


def test_parts_are_joined_as_in_evaluation():
    """Minari stores discrete parts as one number a step."""
    record("ssar-test/Parts-v0")
    data = load()
    assert data.observation_keys == ("a", "b", "c")
    assert "observations joined as a, b, c" in str(data)
    assert data.observations[1].tolist() == [1, 1, 1, 2, 1]
    seen, act = [], lambda _, obs: seen.append(obs[0, 0]) or TENTH[None, None]
    Evaluator(data, num_seeds=1, episodes=1, seed=0)(act, None)
    np.testing.assert_array_equal(seen, data.observations[: len(seen)])
    turned, one = load(observation_keys="c, a"), load(observation_keys="b")
    np.testing.assert_array_equal(turned.observations, data.observations[:, [3, 4, 0]])
    np.testing.assert_array_equal(one.observations, data.observations[:, 1:3])


def test_missing_data_sets_are_downloaded(tmp_path, monkeypatch, folder):
    """By their id, or by a remote's address."""
    record("ssar-test/Walk-v0")
    shutil.move(folder, tmp_path / "remote")
    download = mock.Mock(side_effect=lambda _: shutil.copytree(tmp_path / "remote", folder))
    monkeypatch.setattr(minari, "download_dataset", download)
    address = f"hf://somewhere/{NAME}"
    for name in (NAME, NAME, address):
        assert len(load(name).returns) == 4
    shutil.rmtree(folder)
    assert len(load(address).returns) == 4
    assert [call.args[0] for call in download.mock_calls] == [NAME, address]
    download.side_effect = OSError("no route")
    for missing in ("mujoco/none-v0", "hopper-medium", "not an id"):
        message = refused(missing)
        assert message.startswith(f"no Minari data set '{missing}', neither here nor at its remote")
        assert "no route): see `minari list local`" in message


def no_spaces(folder):
    """Minari would make the environment, which is a command, to see its spaces."""
    path = folder / "data" / "metadata.json"
    path.write_text(path.read_text().replace("observation_space", "x"))


def leads_out(folder):
    with h5py.File(folder / "data" / "main_data.hdf5", "a") as file:
        del file["episode_1/rewards"]
        file["episode_1/rewards"] = h5py.ExternalLink("/etc/hosts.hdf5", "rewards")


def lacks_one(folder):
    with h5py.File(folder / "data" / "main_data.hdf5", "a") as file:
        observations = file["episode_2/observations"][:-1]
        del file["episode_2/observations"]
        file["episode_2/observations"] = observations


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (no_spaces, "is not readable (KeyError: 'no spaces'): give a complete copy, close what"),
        (leads_out, "'episode_1/rewards' lies in another file"),
        (lacks_one, "episode 2 has 5 observations and 5 actions for 5 rewards: it needs one"),
    ],
)
def test_data_that_are_broken_or_malicious_are_refused(change, words, folder):
    record("ssar-test/Walk-v0")
    change(folder)
    assert words in refused()


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
    data = load()
    assert data.env.entry_point == gymnasium.spec("ssar-test/Walk-v0").entry_point
    assert (data.env.max_episode_steps, data.env.kwargs) == (3, {})
    assert [wrapper.name for wrapper in data.env.additional_wrappers] == ["RescaleAction"]
    names = "a, NormalizeObservation, NormalizeReward, RecordVideo, Delay, getoutput"
    assert f"evaluation leaves out {names} of {NAME}" in capsys.readouterr().err
