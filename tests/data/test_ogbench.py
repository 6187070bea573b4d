"""OGBench's tasks by name, and play data recorded with its oracles."""

import shlex
from pathlib import Path

import gymnasium
import numpy as np
import pytest
from files import load, refused

from common.data import load_dataset, ogbench
from common.data.ogbench import parse
from common.evaluation import Collector, Evaluator
from common.run.cli import load_config
from common.run.errors import InputError
from experiments import record as recorder
from experiments.record import record

pytest.importorskip("ogbench", reason="pip install ogbench, with Python 3.12 or older")

TASK = {"dataset": "ogbench:pointmaze-medium-navigate-singletask-task1-v0", "env": None}
FILE = "pointmaze-medium-navigate-v0.npz"
FAMILIES = [("humanoidmaze-giant", "navigate"), ("cube-single", "play"), ("puzzle-3x3", "noisy")]


@pytest.mark.parametrize(("family", "kind"), FAMILIES)
def test_every_task_has_a_file_and_an_environment(family, kind):
    for task in ("", "-task1", "-task5"):
        env_id, file = parse(f"{family}-{kind}-singletask{task}-v0")
        assert (env_id, file) == (f"{family}-singletask{task}-v0", f"{family}-{kind}-v0.npz")
        assert gymnasium.spec(env_id).kwargs["reward_task_id"] == int(task[-1:] or 0)


@pytest.mark.parametrize("name", ["cube-single-play-v0", "cubes-play-singletask-v0",
                                  "cube-single-play-singletask-task6-v0"])  # fmt: skip
def test_other_names_are_refused(name):
    message = refused(dataset=f"ogbench:{name}", env=None)
    assert message.startswith(f"ogbench:{name} is not one of OGBench's single tasks: give a name ")


@pytest.fixture(scope="module")
def walk(tmp_path_factory):
    """Two trajectories in a maze, in a file."""
    path = tmp_path_factory.mktemp("ogbench") / "walk.npz"
    np.savez_compressed(path, **record("pointmaze-medium", 1001, seed=0))
    return path


def test_a_recording_is_read_as_ogbench_reads_its_own(walk):
    stored = dict(np.load(walk))
    assert stored["terminals"].nonzero()[0].tolist() == [1000, 2001]
    data = load(walk, **TASK)
    assert data.observations.shape == (2000, 2) and data.actions.shape == (2000, 2)
    np.testing.assert_array_equal(data.next_observations[:1000], stored["observations"][1:1001])
    assert data.episode_ends.nonzero()[0].tolist() == [999, 1999]
    # The reward is -1, and 0 where the agent is at the goal, which ends the task but no trajectory.
    np.testing.assert_array_equal(data.rewards, data.terminals - 1.0)
    maze = gymnasium.make(data.env.id).unwrapped
    maze.reset()
    distance = np.linalg.norm(stored["qpos"] - maze.cur_goal_xy, axis=1)
    is_there = distance <= maze._goal_tol  # before the action
    np.testing.assert_array_equal(data.terminals, np.delete(is_there, [1000, 2001]))
    assert data.terminals.any()
    assert np.isnan(data.behaviour)  # of walks from goal to goal
    assert data.score(np.array([-5.0, -200.0]), np.array([1.0, 0.0])).tolist() == [100, 0]


def test_the_same_seed_records_the_same(walk):
    again, other = (record("pointmaze-medium", 1000, seed) for seed in (0, 4))
    for key, column in np.load(walk).items():
        np.testing.assert_array_equal(again[key], column[:1001])
        assert key == "terminals" or not np.array_equal(other[key], again[key])


@pytest.mark.parametrize("env", ["antmaze-medium", "cube-no"])
def test_what_has_no_oracle_is_not_recorded(env):
    with pytest.raises(InputError, match=f"no oracle for {env}: choose a pointmaze, a cube or a"):
        record(env, 10, 0)


@pytest.mark.parametrize("kind", ["page", "half", "other keys", "pickle"])
def test_files_of_another_kind_are_named(walk, tmp_path, kind):
    path, whole = tmp_path / "data.npz", walk.read_bytes()
    arrays = {"pickle": np.array([{}], dtype=object), "other keys": np.zeros((3, 2))}
    if kind in arrays:
        np.savez(path, observations=arrays[kind])
    else:
        path.write_bytes({"page": b"<html>", "half": whole[: len(whole) // 2]}[kind])
    message = refused(path, **TASK)
    assert message.startswith(f"{path} is not readable as OGBench's {FILE} (")
    assert message.endswith(f"): give a complete {FILE}")
    assert ("allow_pickle" in message) == (kind == "pickle")


def test_a_missing_file_is_downloaded_from_the_mirror(tmp_path, monkeypatch):
    """Which cannot be reached, because the tests are offline."""
    monkeypatch.setattr(ogbench, "FOLDER", str(tmp_path))
    mirror = "huggingface.co/datasets/zhouzypaul/ogbench_datasets"
    expected = f"cannot download {FILE} from {mirror} into {tmp_path} ("
    assert refused(**TASK).startswith(expected)
    (tmp_path / FILE).write_bytes(b"<html>")
    assert refused(**TASK).endswith("remove it, and it is downloaded again")


def test_the_recorder_prints_a_command_and_overwrites_nothing(tmp_path, monkeypatch, capsys):
    out = tmp_path / "a walk"
    arguments = ["x", "record", "pointmaze-medium", "--steps=1", f"--out={out}"]
    monkeypatch.setattr(recorder.sys, "argv", arguments)
    recorder.main()
    before = Path(f"{out}.npz").read_bytes()
    _, *flags = shlex.split(capsys.readouterr().out.splitlines()[-1])[1:]
    config = load_config("ssar_td3bc", flags[0].removeprefix("--config="), flags[1:])
    assert len(load_dataset(config).rewards) == 1000
    with pytest.raises(SystemExit, match="a walk.npz exists: remove it, or give another file"):
        recorder.main()
    assert Path(f"{out}.npz").read_bytes() == before


def test_evaluations_leave_the_random_numbers_of_online_training_alone(walk):
    """OGBench's mazes draw their starts from NumPy's global generator."""
    data = load(walk, **TASK)
    data.env.max_episode_steps = 3
    evaluate, envs = Evaluator(data, 1, 2, seed=0), Collector(data, 1, seed=0)
    still = lambda params, obs: np.zeros((*obs.shape[:-1], 2))

    def next_start():
        return [envs.step(np.zeros((1, 2))).obs for _ in range(3)][-1]

    first, second = envs.reset(), next_start()
    np.testing.assert_array_equal(envs.reset(), first)
    evaluate(still, None)
    np.testing.assert_array_equal(next_start(), second)
    assert not np.array_equal(first, second)


def test_without_the_package_one_sentence_says_so(monkeypatch):
    monkeypatch.setitem(recorder.sys.modules, "ogbench", None)
    message = refused(dataset="ogbench:x", env=None)
    assert message.startswith("ogbench:x needs the package ogbench (") and "pip install" in message
