"""Minari data sets: episodes, keys, downloads, what a data set may not decide."""

import json
import os
import shutil
from unittest import mock

import files
import gymnasium
import h5py
import minari
import numpy as np
import pytest
import toys
from gymnasium import wrappers

from common.evaluation import Evaluator
from common.run.errors import InputError

TENTH = np.full(2, 0.1, np.float32)


@pytest.fixture(autouse=True)
def root(tmp_path, monkeypatch):
    """Minari's local folder, empty."""
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "minari"))
    (tmp_path / "minari").mkdir()
    return tmp_path / "minari"


def load(name, **settings):
    return files.load(None, **({"dataset": name, "env": None} | settings))


def record(name, env="ssar-test/Goal-v0", episodes=4, act=TENTH, **metadata):
    """A Minari data set, of observations in dictionaries by default."""
    env = gymnasium.make(env) if isinstance(env, str) else env
    spec, env = env.spec, minari.DataCollector(env)
    for seed in range(episodes):
        env.reset(seed=seed)
        done = False
        while not done:
            action = env.action_space.sample() if act is None else act
            _, _, terminated, truncated, _ = env.step(action)
            done = terminated or truncated
    env.create_dataset(name, algorithm_name="none", author="t", author_email="t",
                       code_permalink="t", description="t", eval_env=spec,
                       **metadata)  # fmt: skip
    return name


def test_columns_are_those_of_the_episodes(tmp_path):
    """Bit for bit what the same episodes in an HDF5 file give."""
    name = record("ssar-test/walk-v0", "ssar-test/Walk-v0", ref_min_score=-20.0, ref_max_score=-10)
    data = load(name)
    columns = toys.record(gymnasium.make("ssar-test/Walk-v0"), 4, lambda *_: np.full(2, 0.1))
    path = toys.write_hdf5(tmp_path / "walk.hdf5", **columns)
    same = load(name, dataset_path=path, env="ssar-test/Walk-v0")
    assert data.fingerprint == same.fingerprint and data.terminals.any()
    assert data.env.id == "ssar-test/Walk-v0" and data.env.max_episode_steps == 7
    assert data.score(-15.0) == 50  # on D4RL's scale, not on Minari's from 0 to 1


def test_dictionaries_are_joined_as_in_evaluation():
    data = load(record("ssar-test/goal-v0"))
    assert data.observation_keys == ("clock", "position")  # alphabetical
    assert "observations joined as clock, position" in str(data)
    seen = []
    act = lambda params, obs: seen.append(obs) or np.zeros((1, 1, 2), np.float32)
    Evaluator(data, num_seeds=1, episodes=1, seed=0)(act, None)
    length = data.episode_ends.argmax() + 1
    np.testing.assert_array_equal(data.observations[:length, 0], np.arange(length))
    assert [float(obs[0, 0, 0]) for obs in seen] == list(range(len(seen)))
    turned = load("ssar-test/goal-v0", observation_keys="position, clock")
    np.testing.assert_array_equal(turned.observations, data.observations[:, [2, 3, 0, 1]])
    one = load("ssar-test/goal-v0", observation_keys="position")
    np.testing.assert_array_equal(one.observations, data.observations[:, 2:])
    for keys, words in (("clok", "'clok' must be"), ("clock,clock", "'clock' must be named once")):
        with pytest.raises(InputError, match=f"{words}.*: clock, position"):
            load("ssar-test/goal-v0", observation_keys=keys)


def test_missing_data_sets_are_downloaded(tmp_path, monkeypatch, root):
    """By their id, or by a remote's address."""
    name = record("ssar-test/remote-v0")
    shutil.move(root / name, tmp_path / "remote")
    download = mock.Mock(side_effect=lambda _: shutil.copytree(tmp_path / "remote", root / name))
    monkeypatch.setattr(minari, "download_dataset", download)
    for address in (name, name, f"hf://somewhere/{name}"):
        assert len(load(address).returns) == 4
    shutil.rmtree(root / name)
    assert len(load(f"hf://somewhere/{name}").returns) == 4
    assert [call.args[0] for call in download.mock_calls] == [name, f"hf://somewhere/{name}"]
    download.side_effect = OSError("no route")
    for missing in ("mujoco/none-v0", "hopper-medium", "not an id"):
        with pytest.raises(
            InputError, match=f"no Minari data set '{missing}', .*no route.: see `m"
        ):
            load(missing)


def lacks_rewards(folder):
    with h5py.File(folder / "main_data.hdf5", "a") as file:
        del file["episode_1/rewards"]


def leads_out(folder):
    lacks_rewards(folder)
    with h5py.File(folder / "main_data.hdf5", "a") as file:
        file["episode_1/rewards"] = h5py.ExternalLink("/etc/hosts.hdf5", "rewards")


def cut_short(folder):
    os.truncate(folder / "main_data.hdf5", 1500)


def lacks_one(folder):
    """Reshaped to the rows that are there, these numbers would still be a table."""
    with h5py.File(folder / "main_data.hdf5", "a") as file:
        for key in ("clock", "position"):
            values = file[f"episode_2/observations/{key}"][:-1]
            del file[f"episode_2/observations/{key}"]
            file[f"episode_2/observations/{key}"] = values


def hides_spaces(folder):
    """Minari would make the environment, which is a command, to see its spaces."""
    metadata = json.loads((folder / "metadata.json").read_text())
    del metadata["observation_space"]
    (folder / "metadata.json").write_text(json.dumps(metadata))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"id": "os:Nowhere-v0"}, "unknown environment 'Nowhere-v0'"),
        (cut_short, "is not readable .*: give a complete copy, close what writes it"),
        (lacks_rewards, "is not readable .*rewards.*: give a complete copy, close"),
        (leads_out, "'episode_1/rewards' lies in another file"),
        (lacks_one, "bad-v0: episode 2 has [0-9]* observations and"),
        (hides_spaces, "is not readable .*no spaces"),
    ],
)
def test_data_that_are_broken_or_malicious_are_refused(change, words, root):
    record("ssar-test/bad-v0")
    folder = root / "ssar-test" / "bad-v0" / "data"
    if callable(change):
        change(folder)
    else:
        change_spec(folder, change)
    with pytest.raises(InputError, match=words) as error:
        load("ssar-test/bad-v0")
    assert "\n" not in str(error.value) and len(str(error.value)) < 600


def change_spec(folder, changes, wrappers=()):
    path = folder / "metadata.json"
    metadata = json.loads(path.read_text())
    spec = json.loads(metadata["eval_env_spec"]) | changes
    spec["additional_wrappers"] += wrappers
    path.write_text(json.dumps(metadata | {"eval_env_spec": json.dumps(spec)}))


def test_code_that_a_data_set_names_does_not_run(root, capsys):
    """The environment is the one registered here, and only harmless wrappers of Gymnasium stay."""
    env = wrappers.RescaleAction(gymnasium.make("ssar-test/Walk-v0"), -1.0, 1.0)
    record("ssar-test/sly-v0", wrappers.NormalizeReward(wrappers.NormalizeObservation(env)))
    shell = {"name": "shell", "entry_point": "subprocess:getoutput", "kwargs": {"cmd": "touch x"}}
    video = {"name": "RecordVideo", "kwargs": {"video_folder": "x"}}
    video["entry_point"] = "gymnasium.wrappers.rendering:RecordVideo"
    delay = {"name": "Delay", "entry_point": "gymnasium.wrappers.x:Y", "kwargs": {"a": "/tmp"}}
    changes = {"entry_point": "subprocess:getoutput", "max_episode_steps": 3}
    changes["kwargs"] = {"render_mode": "human", "a": [{"b": "/etc/passwd"}]}
    change_spec(root / "ssar-test" / "sly-v0" / "data", changes, [shell, video, delay])
    data = load("ssar-test/sly-v0")
    assert data.env.entry_point == gymnasium.spec("ssar-test/Walk-v0").entry_point
    assert (data.env.max_episode_steps, data.env.kwargs) == (3, {})
    assert [wrapper.name for wrapper in data.env.additional_wrappers] == ["RescaleAction"]
    names = "a, NormalizeObservation, NormalizeReward, shell, RecordVideo, Delay"
    assert f"evaluation leaves out {names} of ssar-test/sly-v0" in capsys.readouterr().err


def test_pendulum(capsys):
    """Everybody's first data set; its actions lie in [-2, 2]."""
    data = load(record("ssar-test/pendulum-v0", "Pendulum-v1", act=None))
    assert "; actions rescaled from [-2, 2]; scores are raw returns" in capsys.readouterr().out
    assert 0.9 < np.abs(data.actions).max() <= 1
    act = lambda params, obs: np.full((*obs.shape[:2], 1), 0.5, np.float32)
    played, env = Evaluator(data, 1, 1, seed=0)(act, None), gymnasium.make("Pendulum-v1")
    env.reset(seed=0)
    by_hand = sum(env.step(np.ones(1, np.float32))[1] for _ in range(200))
    assert played.returns[0, 0] == pytest.approx(by_hand) and played.lengths[0, 0] == 200


def test_discrete_parts_are_numbers_and_tuples_are_refused(monkeypatch):
    """Alike in the data and in evaluation: Minari stores discrete parts as one number a step."""
    spaces = gymnasium.spaces
    parts = {"a": spaces.Discrete(9), "b": spaces.MultiBinary(2), "c": spaces.MultiDiscrete([3, 3])}
    see = lambda env: {"a": env.steps, "b": np.ones(2, np.int8), "c": np.array([2, env.steps % 3])}
    kinds = {"observation_space": spaces.Dict(parts), "_observation": see}
    cls = type("Parts", (toys.Walk,), kinds)
    monkeypatch.setattr(toys, "Parts", cls, raising=False)
    gymnasium.register("ssar-test/Parts-v0", "toys:Parts", max_episode_steps=7)
    data = load(record("ssar-test/parts-v0", "ssar-test/Parts-v0"))
    assert data.observations[1].tolist() == [1, 1, 1, 2, 1]
    seen, act = [], lambda params, obs: seen.append(obs[0, 0]) or TENTH[None, None]
    Evaluator(data, num_seeds=1, episodes=1, seed=0)(act, None)
    np.testing.assert_array_equal(seen, data.observations[: len(seen)])
    record("ssar-test/odd-v0", "ssar-test/Pair-v0")
    with pytest.raises(InputError, match="odd-v0 has observations of .*: observations must be arr"):
        load("ssar-test/odd-v0")
