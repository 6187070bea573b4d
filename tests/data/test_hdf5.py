"""Files in D4RL's layout: rows, episodes, names and attributes."""

import gymnasium
import numpy as np
import pytest
from files import load, refused, write
from toys import toy_columns

from common.data.d4rl import TASKS, reference_of
from common.envs.make import env_spec

COLUMNS = ("observations", "actions", "rewards", "next_observations", "terminals")


def test_every_row_with_a_recorded_successor_is_kept(tmp_path, capsys):
    columns = toy_columns()
    path = write(tmp_path, columns, ref_min_score=-40.0, ref_max_score=0.0)
    data = load(path)
    for name in COLUMNS:
        np.testing.assert_array_equal(getattr(data, name), columns[name])
    np.testing.assert_array_equal(data.episode_ends, columns["terminals"] | columns["timeouts"])
    standardised, obs = load(path, normalize_observations=True), columns["observations"]
    expected = (columns["next_observations"] - obs.mean(0)) / (obs.std(0) + 1e-3)
    np.testing.assert_allclose(standardised.next_observations, expected, atol=1e-5)
    assert data.score(-10.0) == 75
    assert capsys.readouterr().out.splitlines()[0] == (
        f"{path}: {len(data.rewards)} transitions in {len(data.returns)} episodes; evaluated in "
        "ssar-test/Walk-v0 with stock physics; scores are 0 at a return of -40 and 100 at 0"
    )


@pytest.mark.parametrize("has_timeouts", [True, False])
def test_rows_without_a_known_successor_are_dropped(tmp_path, has_timeouts):
    """The next row is the successor; time-outs, or else the step limit's last rows, have none."""
    columns = toy_columns()
    kept = np.flatnonzero(~columns["timeouts"])
    episode = np.cumsum(np.r_[0, (columns["terminals"] | columns["timeouts"])[:-1]])[kept]
    del columns["next_observations"]
    if not has_timeouts:
        del columns["timeouts"]
    data = load(write(tmp_path, columns))
    np.testing.assert_array_equal(data.observations, columns["observations"][kept])
    goes_on = ~columns["terminals"][kept]
    successors = columns["observations"][kept[goes_on] + 1]
    np.testing.assert_array_equal(data.next_observations[goes_on], successors)
    # An episode that lost its last row still ends where it did.
    np.testing.assert_array_equal(data.episode_ends, np.r_[np.diff(episode) > 0, True])
    assert data.score(-3.0) == -3.0  # there is no reference


def test_recorded_time_outs_come_before_the_step_limit(tmp_path):
    """Demonstrations may be longer than the environment allows now."""
    columns = toy_columns()
    columns["terminals"][:] = columns["timeouts"][:] = False
    columns["next_observations"][:-1] = columns["observations"][1:]
    columns["timeouts"][9::10] = True
    data = load(write(tmp_path, columns))
    assert data.env.max_episode_steps == 7
    assert set(np.diff(np.flatnonzero(data.episode_ends))[:-1]) == {10}
    assert not data.terminals.any()


@pytest.mark.parametrize("stored", ["timeouts", "both", "limit"])
def test_qlearning_rows_are_d4rls(tmp_path, stored):
    columns = toy_columns(400)
    columns["timeouts"][np.flatnonzero(columns["terminals"])[3]] = True  # ended by both
    timeouts = columns["timeouts"].copy()
    if stored == "timeouts":
        del columns["next_observations"]
    if stored == "limit":
        del columns["timeouts"]
        timeouts &= ~columns["terminals"]
    data = load(write(tmp_path, columns), d4rl_rows="qlearning")
    rows = np.flatnonzero(~timeouts[:-1])
    for name in COLUMNS:
        is_next = name == "next_observations"
        expected = columns["observations" if is_next else name][rows + is_next]
        np.testing.assert_array_equal(getattr(data, name), expected, err_msg=name)
    # Episodes end where they did, so none lies across a reset.
    clock = data.observations[:, 2]
    np.testing.assert_array_equal(data.episode_ends[:-1], np.diff(clock) < 1)


def test_training_without_data():
    data = load(None, dataset=None)
    assert [getattr(data, name).shape for name in COLUMNS] == [(0, 4), (0, 2), (0,), (0, 4), (0,)]
    assert (data.env.id, data.source, len(data.returns)) == (*["ssar-test/Walk-v0"] * 2, 0)
    assert "without --config.dataset names no env" in refused(None, dataset=None, env=None)


def test_the_files_attributes_name_environment_and_reference(tmp_path):
    more = {"env_kwargs": '{"x": 1, "render_mode": "human"}'}
    more |= {"ref_min_score": -10.0, "ref_max_score": 10.0}
    gymnasium.register("ssar-test/Loud-v0", lambda x=0: gymnasium.make("ssar-test/Walk-v0"))
    path = write(tmp_path, toy_columns(60), env_id="ssar-test/Loud-v0", **more)
    data = load(path, env=None)
    assert (data.env.id, data.env.kwargs, data.score(0.0)) == ("ssar-test/Loud-v0", {"x": 1}, 50)
    assert load(path, env="ssar-test/Walk-v0").env.kwargs == {}


def test_scores_follow_the_user_the_data_or_the_environment(tmp_path):
    own = {"ref_min_score": 0.0, "ref_max_score": 5}
    assert reference_of({}, "Hopper-v4") == (-20.272305, 3234.3)
    assert reference_of(own, "Hopper-v4") == (0, 5)
    assert reference_of({}, "ssar-jax/AntMaze-umaze-v2") == (0, 1)
    for name in ("Hopper-v5", "AntMaze_UMazeDense-v5", "Ant-v4"):
        assert reference_of({"ref_min_score": 0.0, "ref_max_score": None}, name) is None
    assert reference_of(own | {"ref_max_score": -1}, "Ant-v4") is None
    assert load(write(tmp_path, toy_columns(60), **own), reference=(-10.0, 0.0)).score(-1.0) == 90
    for task in TASKS.values():
        assert env_spec(task.env_id, task.name).id == task.env_id


def test_a_file_may_be_named_as_the_data_set(tmp_path, monkeypatch):
    """It is the file that is read, even if the cache holds another one of that name."""
    columns, folder, name = toy_columns(60), tmp_path / "cache", TASKS["hopper-medium-v2"].file
    folder.mkdir()
    monkeypatch.setenv("D4RL_DATASET_DIR", str(folder))
    write(folder, columns, name)
    own = write(tmp_path, columns | {"rewards": columns["rewards"] + 5}, name)
    for dataset, change in ((own, 5), (f"d4rl:{own}", 5), ("hopper-medium-v2", 0)):
        data = load(None, dataset=dataset)
        np.testing.assert_array_equal(data.rewards, columns["rewards"] + np.float32(change))
    assert "no file /no/such.hdf5: check" in refused(None, dataset="d4rl:/no/such.hdf5")
    assert "no file own/hopper.hdf5: check" in refused(None, dataset="own/hopper.hdf5")
