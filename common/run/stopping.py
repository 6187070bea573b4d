"""Ctrl-C and SIGTERM: the first one asks the run to save and stop, the second ends it at once."""

import signal
import sys
import threading

received = []  # the signal that asks the run to stop
open_runs = []  # the run of this process that holds a lock, writers and a progress bar


class Stopped(KeyboardInterrupt):
    """A signal stopped the run; `status` is the exit status, 128 + the signal's number."""

    def __init__(self, number: int):
        super().__init__(signal.Signals(number).name)
        self.status = 128 + number


def catch_signals() -> None:
    """From now on the first Ctrl-C or SIGTERM sets a flag that an open run looks at between steps.

    Before there is a run, it ends the process. A SIGTERM handler that is already installed stays.
    """
    if threading.current_thread() is not threading.main_thread():
        return
    received.clear()
    signal.signal(signal.SIGINT, _ask_to_stop)
    if signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:
        signal.signal(signal.SIGTERM, _ask_to_stop)


def stop_if_told() -> None:
    """Raises Stopped if a signal has asked the run to stop."""
    if received:
        raise Stopped(received[0])


def _ask_to_stop(number, _):
    received.append(number)
    for caught in (signal.SIGINT, signal.SIGTERM):
        if signal.getsignal(caught) is _ask_to_stop:
            signal.signal(caught, signal.SIG_DFL)
    if not open_runs:
        raise Stopped(number)  # ignored in some callbacks: then the run stops as it begins
    what = "finishes the current step, then saves; a second signal stops at once"
    print(f"\n{signal.Signals(number).name}: {what}", file=sys.stderr)
