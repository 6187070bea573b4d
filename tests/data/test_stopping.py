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


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_the_first_signal_sets_a_flag_for_an_open_run(number, status, monkeypatch):
    stopping.catch_signals()
    monkeypatch.setattr(stopping, "open_runs", ["a run"])
    stopping.stop_if_told()
    os.kill(os.getpid(), number)
    assert stopping.received == [number]
    with pytest.raises(Stopped, match=number.name) as error:
        stopping.stop_if_told()
    assert error.value.status == status
    assert {signal.getsignal(x) for x in (signal.SIGINT, signal.SIGTERM)} == {signal.SIG_DFL}


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
