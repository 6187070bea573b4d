"""Files in D4RL's layout: columns, names and attributes; the one sentence for bad ones."""

import sys

import gymnasium
import h5py
import numpy as np
import pytest
from files import load, refused, write
from toys import toy_columns

from common.data.d4rl import TASKS, reference_of
from common.data.hdf5 import REPLACE
from common.envs.make import env_spec

COLUMNS = ("observations", "actions", "rewards", "next_observations", "terminals")


def test_a_file_is_loaded_as_it_was_recorded(tmp_path, capsys):
    columns = toy_columns()
    path = write(tmp_path, columns, ref_min_score=-40.0, ref_max_score=0.0)
    data = load(path)
    for name in COLUMNS:
        np.testing.assert_array_equal(getattr(data, name), columns[name])
    np.testing.assert_array_equal(data.episode_ends, columns["terminals"] | columns["timeouts"])
    assert data.score(-10.0) == 75
    assert capsys.readouterr().out == (
        f"{path}: {len(data.rewards)} transitions in {len(data.returns)} episodes; evaluated in "
        "ssar-test/Walk-v0 with stock physics; scores are 0 at a return of -40 and 100 at 0\n"
    )
    as_in_d4rl = load(path, d4rl_rows="qlearning")
    dropped = columns["timeouts"].sum() + (not columns["timeouts"][-1])
    assert len(as_in_d4rl.rewards) == len(data.rewards) - dropped
    obs = columns["observations"]
    expected = (columns["next_observations"] - obs.mean(0)) / (obs.std(0) + 1e-3)
    standardised = load(path, normalize_observations=True).next_observations
    np.testing.assert_allclose(standardised, expected, atol=1e-5)


def test_training_without_data():
    data = load(dataset=None)
    assert [getattr(data, name).shape for name in COLUMNS] == [(0, 4), (0, 2), (0,), (0, 4), (0,)]
    assert (data.env.id, data.source, len(data.returns)) == (*["ssar-test/Walk-v0"] * 2, 0)
    assert "without --config.dataset names no env" in refused(dataset=None, env=None)


def test_the_files_attributes_name_environment_and_reference(tmp_path, capsys):
    """But no module to import, no file to open, and no window."""
    kwargs = '{"x": 1, "a": [{"b": "/etc/passwd"}], "c": "~x", "render_mode": "human"}'
    more = {"env_kwargs": kwargs, "ref_min_score": -10.0, "ref_max_score": 10.0}
    gymnasium.register("ssar-test/Loud-v0", lambda x=0: gymnasium.make("ssar-test/Walk-v0"))
    path = write(tmp_path, toy_columns(60), env_id="antigravity:ssar-test/Loud-v0", **more)
    data = load(path, env=None)
    assert (data.env.id, data.env.kwargs, data.score(0.0)) == ("ssar-test/Loud-v0", {"x": 1}, 50)
    assert "evaluation leaves out a, c of " in capsys.readouterr().err
    assert "antigravity" not in sys.modules
    assert load(path, env="ssar-test/Walk-v0").env.kwargs == {}


def test_scores_follow_the_user_the_data_or_the_environment(tmp_path):
    own = {"ref_min_score": 0.0, "ref_max_score": 5}
    assert reference_of({}, "Hopper-v4") == (-20.272305, 3234.3)
    assert reference_of(own, "Hopper-v4") == (0, 5)
    assert reference_of({}, "ssar-jax/AntMaze-umaze-v2") == (0, 1)
    assert reference_of({"ref_min_score": 0.0, "ref_max_score": None}, "Hopper-v5") is None
    assert reference_of(own | {"ref_max_score": -1}, "Ant-v4") is None
    assert load(write(tmp_path, toy_columns(60), **own), reference=(-10.0, 0.0)).score(-1.0) == 90


@pytest.mark.parametrize("task", TASKS.values(), ids=lambda task: task.name)
def test_every_task_of_d4rl_has_an_environment(task):
    assert env_spec(task.env_id, task.name).id == task.env_id
    # The mirror's pinned revision holds no mazes.
    assert (task.revision == "main") == task.name.startswith("antmaze")


def test_a_file_may_be_named_as_the_data_set(tmp_path, monkeypatch):
    """It is the file that is read, even if the cache holds another one of that name."""
    columns, folder, name = toy_columns(60), tmp_path / "cache", TASKS["hopper-medium-v2"].file
    folder.mkdir()
    monkeypatch.setenv("D4RL_DATASET_DIR", str(folder))
    write(folder, columns, name)
    own = write(tmp_path, columns | {"rewards": columns["rewards"] + 5}, name)
    for dataset, change in ((own, 5), (f"d4rl:{own}", 5), ("hopper-medium-v2", 0)):
        data = load(dataset=dataset)
        np.testing.assert_array_equal(data.rewards, columns["rewards"] + np.float32(change))
    assert "no file /no/such.hdf5: check" in refused(dataset="d4rl:/no/such.hdf5")


# ------------------------------------------------------- files that cannot be used

BAD_COLUMNS = [
    ("rewards", None, "has no key 'rewards', only actions, next_obs"),
    ("observations", lambda x: x[:0], "shape (0, 4), 'observations' (0, 4): it needs"),
    ("observations", lambda x: x[:, 0], "it needs numbers of shape (N, dimensions), N > 0"),
    ("observations", lambda x: np.nan * x, "'observations' is not finite in float32 at row 0"),
    ("next_observations", lambda x: x[:, :2], "'next_observations' has type float32 and"),
    ("actions", lambda x: x[:-1], "shape (60, 2), 'observations' (61, 4): it"),
    ("actions", lambda x: np.full(x.shape, b"left"), "'actions' has type |S4"),
    ("rewards", lambda x: np.c_[x, x], "it needs numbers of shape (N,), N > 0, that fit"),
    ("rewards", lambda x: x.astype(float) + 1e39, "not finite in float32 at row 0"),
    ("timeouts", lambda x: np.where(x, np.nan, 0), "'timeouts' is not finite"),
]


@pytest.mark.parametrize(("key", "change", "words"), BAD_COLUMNS)
def test_bad_columns_are_named(tmp_path, key, change, words):
    columns = toy_columns(60)
    columns[key] = change(columns[key]) if change else None
    path = write(tmp_path, columns)
    message = refused(path)
    assert message.startswith(path) and words in message


BAD_ATTRIBUTES = [
    ({"env_kwargs": "{"}, "is not readable (JSONDecodeError: Expecting property name"),
    ({"ref_min_score": "low", "ref_max_score": 1}, "(ValueError: could not convert string to f"),
    ({"env_id": np.bytes_("Walk-v9")}, "unknown environment 'Walk-v9'"),
    ({"env_kwargs": '{"wind": 3}'}, "ssar-test/Walk-v0 with arguments {'wind': 3} fails ("),
    ({"env_id": ""}, "names no environment: give --config.env=<Gymnasium id>"),
]


@pytest.mark.parametrize(("attributes", "words"), BAD_ATTRIBUTES)
def test_bad_attributes_are_named(tmp_path, attributes, words):
    attributes = {"env_id": "ssar-test/Walk-v0"} | attributes
    assert words in refused(write(tmp_path, toy_columns(60), **attributes), env=None)


@pytest.mark.parametrize("kind", ["link", "external", "virtual"])
def test_a_column_may_not_lie_in_another_file(tmp_path, kind):
    columns = toy_columns(60)
    rows = len(columns.pop("rewards"))
    path = write(tmp_path, columns)
    with h5py.File(path, "a") as file:
        if kind == "link":
            file["rewards"] = h5py.ExternalLink("/etc/hosts.hdf5", "rewards")
        elif kind == "external":
            outside = [("/etc/passwd", 0, 4 * rows)]
            file.create_dataset("rewards", (rows,), np.float32, external=outside)
        else:
            layout = h5py.VirtualLayout((rows,), np.float32)
            layout[:] = h5py.VirtualSource("/etc/hosts.hdf5", "rewards", (rows,))
            file.create_virtual_dataset("rewards", layout)
    assert "'rewards' lies in another file: copy its numbers into this one" in refused(path)


@pytest.mark.parametrize("kind", ["page", "half", "scrambled"])
def test_files_of_another_kind_are_named(tmp_path, kind):
    path = tmp_path / "toy.hdf5"
    write(tmp_path, toy_columns(60))
    whole = path.read_bytes()
    scrambled = bytearray(whole)
    scrambled[100:6000:7] = bytes(byte ^ 255 for byte in scrambled[100:6000:7])
    path.write_bytes({"page": b"<html>", "half": whole[:3000], "scrambled": scrambled}[kind])
    message = refused(str(path))
    assert message.startswith(f"{path} is not readable (")
    assert message.endswith(REPLACE)
