"""Data sets in files: written, loaded as they are recorded, refused."""

import pytest
from toys import tiny_config, write_hdf5

from common.data import load_dataset
from common.run.errors import InputError


def load(path=None, **settings):
    """The data as they are recorded."""
    return load_dataset(tiny_config(path, **({"normalize_observations": False} | settings)))


def write(tmp_path, columns, name="toy.hdf5", **attributes):
    return write_hdf5(tmp_path / name, attributes, **columns)


def refused(path=None, **settings):
    """The one sentence that refuses a file."""
    with pytest.raises(InputError) as error:
        load(path, **settings)
    assert "\n" not in str(error.value)
    return str(error.value)
