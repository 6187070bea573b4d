"""Ctrl-C and SIGTERM: what is under way may end and be saved first, if that takes a few seconds."""

from __future__ import annotations

import contextlib
import signal
import sys
import time

import jax

GRACE = 10.0  # seconds from the signal until the run stops where it is, unless it is saving
_caught = []  # the signal that told the run to stop
_unhurried = []  # what is under way and may outlast GRACE
_saved = []  # where this process last saved the run


class Stopped(KeyboardInterrupt):
    """The run was told to stop; `status` is its exit status, 128 + the signal's number.

    at_once: whether it was told so twice.
    """

    def __init__(self, number: int, at_once: bool = False):
        super().__init__(signal.Signals(number).name)
        self.status, self.at_once = 128 + number, at_once


def catch_signals() -> None:
    """From now on Ctrl-C and SIGTERM raise Stopped: after GRACE, or at once the second time.

    A handler that stands for SIGTERM already is left alone, as a scheduler's may.
    """
    signal.signal(signal.SIGINT, _catch)
    signal.signal(signal.SIGALRM, _stop)
    if signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:
        signal.signal(signal.SIGTERM, _catch)


def note_saved(where: str) -> None:
    """Remembers, for what is said at the end, where the run can go on from."""
    _saved[:] = [where]


def where_saved() -> str | None:
    """Where the run can go on from; None if nothing has been saved."""
    return _saved[0] if _saved else None


def stop_is_due() -> bool:
    """Whether a signal has come: save, then call stop()."""
    return bool(_caught)


def stop(at_once: bool = False) -> None:
    """Raises Stopped for the signal that came."""
    signal.setitimer(signal.ITIMER_REAL, 0)
    raise Stopped(_caught[0], at_once)


@contextlib.contextmanager
def unhurried():
    """What is done inside, saving, is not cut off after GRACE, but by a second signal alone."""
    _unhurried.append(True)
    try:
        yield
    finally:
        _unhurried.pop()


def wait_for(tree):
    """Blocks until every array of `tree` is there and returns it; signals are heard meanwhile."""
    for leaf in jax.tree.leaves(tree):
        while hasattr(leaf, "is_ready") and not leaf.is_ready():  # which PRNG keys do not have
            time.sleep(0.005)
    return jax.block_until_ready(tree)


def _catch(number, _):
    if _caught:
        stop(at_once=True)
    _caught.append(number)
    signal.setitimer(signal.ITIMER_REAL, GRACE)
    with contextlib.suppress(OSError):  # Ctrl-C ends what a pipe leads to as well
        print(f"\n{signal.Signals(number).name}: stops within {GRACE:.0f} s", file=sys.stderr)


def _stop(*_):
    if not _unhurried:
        stop()
