"""Signals: the first asks the run to stop; what is installed already stays."""

import os
import signal
from concurrent.futures import ThreadPoolExecutor

import pytest

from common.run import stopping
from common.run.stopping import Stopped


@pytest.fixture(autouse=True)
def handlers(monkeypatch):
    """Leaves the handlers of this process as they are."""
    monkeypatch.setattr(stopping, "received", [])
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def test_before_there_is_a_run_a_signal_ends_the_process():
    stopping.catch_signals()
    with pytest.raises(Stopped, match="SIGTERM"):
        os.kill(os.getpid(), signal.SIGTERM)
    with pytest.raises(Stopped, match="SIGTERM"):
        stopping.stop_if_told()  # where the first one was ignored


def test_a_schedulers_handler_stays_and_other_threads_change_nothing():
    scheduler = lambda *_: None
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, scheduler)
    with ThreadPoolExecutor(1) as pool:
        pool.submit(stopping.catch_signals).result()
    assert signal.getsignal(signal.SIGINT) is scheduler
    stopping.catch_signals()
    assert signal.getsignal(signal.SIGINT) is not scheduler
    assert signal.getsignal(signal.SIGTERM) is scheduler
