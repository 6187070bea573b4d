"""Killing runs at chosen moments, and comparing finished runs."""

import contextlib
import csv
import os
from pathlib import Path

import numpy as np
import pytest

from common.run.checkpoint import load_checkpoint


class Killed(BaseException):
    """Ends a run where SIGKILL would: nothing is cleaned up."""


@contextlib.contextmanager
def interrupt(owner, name, call, action):
    """Meanwhile calls `action` before the call-th call of owner.name (1 is the first)."""
    work, calls = getattr(owner, name), []

    def watched(*args, **kwargs):
        calls.append(name)
        if len(calls) == call:
            action()
        return work(*args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(owner, name, watched)
        yield


def kill(main, config, workdir, owner, name, call):
    """A run that is killed when it calls owner.name for the call-th time."""

    def die():
        raise Killed

    with interrupt(owner, name, call, die), pytest.raises(Killed):
        main(config, str(workdir))


def rows_of(workdir, name="scores.csv") -> list[dict]:
    """The rows of a run's table."""
    with open(os.path.join(workdir, name)) as file:
        return list(csv.DictReader(file))


def assert_same_state(a, b, names=("checkpoint", "checkpoint")):
    """Two checkpoints agree in every number."""
    folders = zip((a, b), names, strict=True)
    np.testing.assert_equal(*(load_checkpoint(str(folder), name) for folder, name in folders))


def assert_same(a, b):
    """Two finished runs agree in every bit of parameters, scores and results."""
    assert_same_state(a, b)
    for name in ("scores.csv", "episodes.csv", "results.json"):
        assert Path(a, name).read_bytes() == Path(b, name).read_bytes(), name
    assert {*os.listdir(a)} - {"lock"} == {*os.listdir(b)} - {"lock"}
