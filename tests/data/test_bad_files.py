"""Files that cannot be used: each ends in one sentence."""

import h5py
import numpy as np
import pytest
from files import load, refused, write
from toys import toy_columns

from common.data.hdf5 import REPLACE

BAD_COLUMNS = [
    ("rewards", None, "has no key 'rewards', only actions, next_obs"),
    ("observations", lambda x: x[:0], "shape (0, 4), 'observations' (0, 4): it needs"),
    ("observations", lambda x: x[:, 0], "it needs numbers of shape (N, dimensions), N > 0"),
    ("observations", lambda x: np.nan * x, "'observations' is not finite in float32 at row 0"),
    ("next_observations", lambda x: x[:, :2], "'next_observations' has type float32 and"),
    ("actions", lambda x: x[:-1], "shape (60, 2), 'observations' (61, 4): it"),
    ("actions", lambda x: np.full(x.shape, b"left"), "'actions' has type |S4"),
    ("rewards", lambda x: np.float32(1), "'rewards' has type float32 and shape (), "),
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


def test_a_file_is_read_where_there_are_no_locks(tmp_path, monkeypatch):
    path, opened = write(tmp_path, toy_columns(60)), h5py.File

    def file_of(path, mode, locking=True):
        if locking:
            raise OSError(37, "unable to lock file, error message = 'No locks available'")
        return opened(path, mode, locking=False)

    monkeypatch.setattr(h5py, "File", file_of)
    assert len(load(path).rewards) == 61
