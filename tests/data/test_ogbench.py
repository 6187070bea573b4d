"""OGBench's tasks by name, and play data recorded with its oracles."""

import shlex
from pathlib import Path
from unittest import mock

import gymnasium
import numpy as np
import pytest
from files import load

from common.data import load_dataset, ogbench
from common.data.ogbench import parse, record
from common.evaluation import Collector, Evaluator
from common.run.cli import load_config
from common.run.errors import InputError

pytest.importorskip("ogbench", reason="pip install ogbench, with Python 3.12 or older")

MAZES = [f"{robot}maze-{size}" for robot in ("point", "ant", "humanoid")
         for size in ("medium", "large", "giant", "teleport")]  # fmt: skip
FAMILIES = [*((maze, "navigate") for maze in MAZES), ("antsoccer-arena", "navigate")]
FAMILIES += [("antsoccer-medium", "stitch"), ("scene", "play")]
FAMILIES += [(f"cube-{n}", "play") for n in ("single", "double", "triple", "quadruple", "octuple")]
FAMILIES += [(f"puzzle-{size}", "noisy") for size in ("3x3", "4x4", "4x5", "4x6")]


@pytest.mark.parametrize(("family", "kind"), FAMILIES)
def test_every_task_has_a_file_and_an_environment(family, kind):
    for task in ("", *(f"-task{i}" for i in range(1, 6))):
        env_id, file = parse(f"{family}-{kind}-singletask{task}-v0")
        assert (env_id, file) == (f"{family}-singletask{task}-v0", f"{family}-{kind}-v0.npz")
        assert gymnasium.spec(env_id).kwargs["reward_task_id"] == int(task[-1:] or 0)


@pytest.mark.parametrize("name", ["cube-single-play-v0", "cube-single-play-singletask-task6-v0",
                                  "cubes-play-singletask-v0"])  # fmt: skip
def test_other_names_are_refused(name):
    with pytest.raises(
        InputError, match=f"ogbench:{name} is not one of OGBench's single tasks: give a"
    ):
        load(None, dataset=f"ogbench:{name}", env=None)


@pytest.fixture(scope="module")
def walk(tmp_path_factory):
    """Two trajectories in a maze, in a file."""
    path = tmp_path_factory.mktemp("ogbench") / "walk.npz"
    np.savez_compressed(path, **record("pointmaze-medium", 1001, seed=0))
    return path


def settings(path, task="pointmaze-medium-navigate-singletask-task1-v0"):
    return {"dataset": f"ogbench:{task}", "dataset_path": str(path), "env": None}


def test_a_recording_is_read_as_ogbench_reads_its_own(walk):
    stored = dict(np.load(walk))
    assert stored["terminals"].nonzero()[0].tolist() == [1000, 2001]
    data = load(None, **settings(walk))
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
    again, other = (record("pointmaze-medium", 1001, seed) for seed in (0, 4))
    for key, column in np.load(walk).items():
        np.testing.assert_array_equal(again[key], column)
        assert key == "terminals" or not np.array_equal(other[key], column)


@pytest.mark.parametrize("env", ["antmaze-medium", "cube-no", "no-such-thing"])
def test_what_has_no_oracle_is_not_recorded(env):
    with pytest.raises(
        InputError, match=f"there is no oracle for {env}: choose a pointmaze, a cube or a"
    ):
        record(env, 10, 0)


@pytest.mark.parametrize("kind", ["page", "half", "other keys"])
def test_files_of_another_kind_are_named(walk, tmp_path, kind):
    path, whole = tmp_path / "data.npz", walk.read_bytes()
    path.write_bytes({"page": b"<html>", "half": whole[: len(whole) // 2]}.get(kind, b""))
    if kind == "other keys":
        np.savez(path, observations=np.zeros((3, 2)))
    with pytest.raises(InputError) as error:
        load(None, **settings(path))
    assert str(error.value).startswith(f"{path} is not readable as OGBench's pointmaze-medium-nav")
    assert "give a complete pointmaze-medium-navigate-v0.npz" in str(error.value)


def test_pickles_are_not_loaded(tmp_path):
    np.savez(path := tmp_path / "data.npz", observations=np.array([{}], dtype=object))
    with pytest.raises(InputError, match="is not readable as OGBench's .*allow_pickle=False"):
        load(None, **settings(path))


def test_the_recorder_prints_a_command_and_overwrites_nothing(tmp_path, monkeypatch, capsys):
    out = tmp_path / "a walk"
    monkeypatch.setattr(
        ogbench.sys, "argv", "x record pointmaze-medium --steps=1 --out".split() + [str(out)]
    )
    with monkeypatch.context() as patch, pytest.raises(SystemExit, match="nothing was recorded"):
        patch.setattr(ogbench, "record", mock.Mock(side_effect=KeyboardInterrupt))
        ogbench.main()
    ogbench.main()
    before = Path(f"{out}.npz").read_bytes()
    _, *flags = shlex.split(capsys.readouterr().out.splitlines()[-1])[1:]
    config = load_config("ssar_td3bc", flags[0].removeprefix("--config="), flags[1:])
    assert len(load_dataset(config).rewards) == 1000
    with pytest.raises(SystemExit, match="a walk.npz exists: remove it, or give another file"):
        ogbench.main()
    assert Path(f"{out}.npz").read_bytes() == before


def test_evaluations_leave_the_random_numbers_of_online_training_alone(walk):
    """OGBench's mazes draw their starts from NumPy's global generator."""
    data = load(None, **settings(walk))
    data.env.max_episode_steps = 3
    evaluate, envs = Evaluator(data, 1, 2, seed=0), Collector(data, 1, seed=0)
    act, starts = lambda params, obs: np.zeros((*obs.shape[:-1], 2)), [envs.reset()]
    lengths = [evaluate(act, None).returns]
    for _ in range(3):
        starts.append(envs.step(np.zeros((1, 2))).obs)
    starts.append(envs.reset())
    np.testing.assert_array_equal(starts[0], starts[-1])
    evaluate(act, None)
    again = [envs.step(np.zeros((1, 2))).obs for _ in range(3)]
    np.testing.assert_array_equal(starts[1:4], again)
    assert not np.array_equal(starts[0], starts[3])
    assert lengths[0].shape == (1, 2)


def test_without_the_package_one_sentence_says_so(monkeypatch):
    monkeypatch.setitem(ogbench.sys.modules, "ogbench", None)
    with pytest.raises(InputError, match="ogbench:x needs the package ogbench .*: pip install og"):
        load(None, dataset="ogbench:x", env=None)
