"""Environments of gymnasium-robotics: goals as in PointMaze, human demonstrations as in Adroit."""

import sys

import gymnasium
import numpy as np
import pytest
from toys import tiny_config, write_hdf5

import ssar_td3bc as ssar
from common.checks import InputError
from common.environments import env_spec, make_env
from common.loading import load_dataset

pytest.importorskip("gymnasium_robotics", reason="pip install -r requirements-test.txt")


@pytest.fixture(scope="module")
def maze(tmp_path_factory):
    """PointMaze, driven straight at the goal: x, y, their velocities and the goal's x, y."""
    spec = env_spec("PointMaze_UMaze-v3", "test")
    env = make_env(spec, continuing_task=False, max_episode_steps=60)
    names = ("observations", "actions", "rewards", "next_observations", "terminals", "timeouts")
    columns = {name: [] for name in names}
    for seed in range(30):
        (seen, _), done = env.reset(seed=seed), False
        while not done:
            obs = np.r_[seen["observation"], seen["desired_goal"]]
            action = np.clip(2 * (obs[4:] - obs[:2]) - 0.3 * obs[2:4], -1, 1).astype(np.float32)
            seen, reward, terminal, timeout, _ = env.step(action)
            done = terminal or timeout
            following = np.r_[seen["observation"], seen["desired_goal"]]
            values = (obs, action, reward, following, terminal, timeout and not terminal)
            for name, value in zip(names, values, strict=True):
                columns[name].append(value)
    env.close()
    path = str(tmp_path_factory.mktemp("data") / "maze.hdf5")
    return write_hdf5(path, **{name: np.array(column) for name, column in columns.items()})


@pytest.mark.slow
def test_sparse_goal_data_are_trained_on_and_success_is_reported(maze, tmp_path, capsys):
    columns = load_dataset("maze", maze, "PointMaze_UMaze-v3")
    ends = columns.episode_ends
    won = columns.rewards[ends] == 1
    assert 0 < won.mean() < 1
    config = tiny_config(
        maze,
        env="gymnasium_robotics:PointMaze_UMaze-v3",
        selection="success",
        reward_bias=-1.0,
        loosen_bound=False,
    )
    results = ssar.main(config, str(tmp_path / "run"))
    lengths = np.diff(np.flatnonzero(ends), prepend=-1)
    assert results["trusted_fraction"][0] == pytest.approx(lengths[won].sum() / len(ends))
    assert 0 <= results["success_rate"][0] <= 1
    printed = capsys.readouterr()
    assert "joined as observation, desired_goal" in printed.err


def test_adroit_demonstrations_need_nothing_special(tmp_path):
    """39 observations, 28 actions, episodes longer than the environment's limit, its own id."""
    env = make_env(env_spec("AdroitHandDoor-v1", "test"))
    rows = 2 * (env.spec.max_episode_steps + 50)
    rng = np.random.default_rng(0)
    obs = rng.standard_normal((rows, 39)).astype(np.float32)
    timeouts = np.zeros(rows, bool)
    timeouts[[rows // 2 - 1, rows - 1]] = True
    path = write_hdf5(
        tmp_path / "door.hdf5",
        observations=obs,
        next_observations=np.r_[obs[1:], obs[:1]],
        actions=rng.uniform(-1, 1, (rows, 28)).astype(np.float32),
        rewards=rng.standard_normal(rows).astype(np.float32),
        terminals=np.zeros(rows, bool),
        timeouts=timeouts,
    )
    config = tiny_config(path, env="AdroitHandDoor-v1", selection="none", eval_episodes=1)
    results = ssar.main(config, str(tmp_path / "run"))
    assert results["data"]["episodes"] == 2
    assert results["data"]["env"] == "AdroitHandDoor-v1"


def test_the_optional_package_is_named_where_it_lacks(monkeypatch):
    monkeypatch.setitem(sys.modules, "gymnasium_robotics", None)  # as if it were not installed
    monkeypatch.delitem(gymnasium.registry, "PointMaze_UMaze-v3")
    with pytest.raises(InputError, match="'PointMaze_UMaze-v3' .*`pip install gymnasium-robotics`"):
        env_spec("PointMaze_UMaze-v3", "test")
