"""Files that cannot be used: each ends in one sentence."""

import subprocess
import sys

import h5py
import numpy as np
import pytest
from files import load, refused, write
from toys import toy_columns

from common.data.hdf5 import REPLACE


def put(row, value):
    """A change of one row of a column."""

    def change(column):
        column = column.copy()
        column[row] = value
        return column

    return change


BAD_COLUMNS = {
    "no rewards": ({"rewards": None}, "has no key 'rewards', only actions, next_obs"),
    "fewer actions": ({"actions": lambda x: x[:-1]}, "shape (60, 2), 'observations' (61, 4): it"),
    "flat": ({"observations": lambda x: x[:, 0]}, "it needs numbers of shape (N, dimensions), "),
    "two rewards": (
        {"rewards": lambda x: np.c_[x, x]},
        "it needs numbers of shape (N,), N > 0, that fit",
    ),
    "scalar": ({"rewards": lambda x: np.float32(1)}, "'rewards' has type float32 and shape (), "),
    "text": ({"actions": lambda x: np.full(x.shape, b"left")}, "'actions' has type |S4"),
    "nan": ({"observations": put(7, np.nan)}, "'observations' is not finite in float32 at row 7"),
    "too large": ({"rewards": lambda x: x.astype(float) + 1e39}, "not finite in float32 at row 0"),
    "loud": (
        {"actions": put((9, 0), 1.5)},
        "not in [-1, 1], the bounds of ssar-test/Walk-v0, at row 9",
    ),
    "nan flag": ({"timeouts": lambda x: np.where(x, np.nan, 0)}, "'timeouts' is not finite"),
    "narrow": (
        {"next_observations": lambda x: x[:, :2]},
        "'next_observations' has type float32 and",
    ),
    "no rows": ({key: lambda x: x[:0] for key in toy_columns(1)}, "shape (0, 4), 'observations'"),
}


@pytest.mark.parametrize("name", BAD_COLUMNS)
def test_bad_columns_are_named(tmp_path, name):
    changes, words = BAD_COLUMNS[name]
    columns = toy_columns(60)
    for key, change in changes.items():
        columns[key] = change(columns[key]) if change else None
    path = write(tmp_path, columns)
    message = refused(path)
    assert message.startswith(path) and words in message


@pytest.mark.parametrize(
    ("attributes", "words"),
    [
        ({"env_kwargs": "{"}, "is not readable (JSONDecodeError: Expecting property name"),
        (
            {"ref_min_score": "low", "ref_max_score": 1},
            "(ValueError: could not convert string to f",
        ),
        ({"env_id": np.bytes_("Walk-v9")}, "unknown environment 'Walk-v9'"),
        ({"env_id": "antigravity:Walk-v0"}, "unknown environment 'Walk-v0'"),
        ({"env_kwargs": '{"wind": 3}'}, "ssar-test/Walk-v0 with arguments {'wind': 3} fails ("),
        ({"env_id": ""}, "names no environment: give --config.env=<Gymnasium id>"),
    ],
)
def test_bad_metadata_are_named(tmp_path, attributes, words):
    attributes = {"env_id": "ssar-test/Walk-v0"} | attributes
    assert words in refused(write(tmp_path, toy_columns(60), **attributes), env=None)


def test_files_and_rendering_that_data_ask_for_are_left_out(tmp_path, capsys):
    """And no module that they name is imported."""
    kwargs = '{"a": [{"b": "/etc/passwd"}], "c": "~x", "render_mode": "human"}'
    data = {"env_id": "antigravity:ssar-test/Walk-v0", "env_kwargs": kwargs}
    assert load(write(tmp_path, toy_columns(60), **data), env=None).env.kwargs == {}
    assert "evaluation leaves out a, c of " in capsys.readouterr().err
    assert "antigravity" not in sys.modules


@pytest.mark.parametrize("kind", ["link", "external", "virtual"])
def test_a_column_may_not_lie_in_another_file(tmp_path, kind):
    columns = toy_columns(60)
    path, rows = write(tmp_path, columns), len(columns["rewards"])
    with h5py.File(path, "a") as file:
        del file["rewards"]
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


@pytest.mark.parametrize("kind", ["empty", "page", "half", "scrambled"])
def test_files_of_another_kind_are_named(tmp_path, kind):
    path = tmp_path / "toy.hdf5"
    write(tmp_path, toy_columns(60))
    whole = path.read_bytes()
    scrambled = bytearray(whole)
    scrambled[100:6000:7] = bytes(byte ^ 255 for byte in scrambled[100:6000:7])
    contents = {"empty": b"", "page": b"<html>", "half": whole[:3000], "scrambled": scrambled}
    path.write_bytes(contents[kind])
    message = refused(str(path))
    assert message.startswith(f"{path} is not readable (")
    assert message.endswith(REPLACE)


def test_a_file_that_is_being_written_is_said_to_be_locked(tmp_path):
    path = write(tmp_path, toy_columns(60))
    code = f"import h5py; file = h5py.File({path!r}, 'a'); print(); input()"
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen([sys.executable, "-c", code], **pipes) as writer:
        writer.stdout.readline()
        assert "close what writes it, or set HDF5_USE_FILE_LOCKING" in refused(path)
        writer.communicate("\n")


def test_a_file_is_read_where_there_are_no_locks(tmp_path, monkeypatch):
    path, opened = write(tmp_path, toy_columns(60)), h5py.File

    def file_of(path, mode, locking=True):
        if locking:
            raise OSError(37, "unable to lock file, error message = 'No locks available'")
        return opened(path, mode, locking=False)

    monkeypatch.setattr(h5py, "File", file_of)
    assert len(load(path).rewards) == 61
