"""Whether two finished runs are the same."""

import csv
import os
from pathlib import Path

import numpy as np

from common.run.checkpoint import load_checkpoint


def rows_of(workdir, name="scores.csv") -> list[dict]:
    """The rows of a run's table."""
    with open(os.path.join(workdir, name)) as file:
        return list(csv.DictReader(file))


def flat(tree, path="") -> dict:
    """{path: array} of nested dictionaries."""
    if not isinstance(tree, dict):
        return {path: np.asarray(tree)}
    return {k: v for key, child in tree.items() for k, v in flat(child, f"{path}/{key}").items()}


def assert_same_state(a, b, names=("checkpoint", "checkpoint")):
    """Two checkpoints agree in every bit of their states."""
    states = [flat(load_checkpoint(str(x), name)) for x, name in zip((a, b), names, strict=True)]
    assert states[0].keys() == states[1].keys()
    for key, x in states[0].items():
        np.testing.assert_array_equal(x, states[1][key], err_msg=key)


def assert_same(a, b):
    """Two finished runs agree in every bit of parameters, scores and results."""
    assert_same_state(a, b)
    for name in ("scores.csv", "episodes.csv", "results.json"):
        assert Path(a, name).read_bytes() == Path(b, name).read_bytes(), name
    assert sorted(os.listdir(a)) == sorted(os.listdir(b))
