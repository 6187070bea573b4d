"""The ways in which a run ends early."""

import signal


class InputError(ValueError):
    """The user's input cannot be used; the message is one sentence: what, where, and the fix."""


class Diverged(InputError):
    """A loss, an action or a parameter is not finite; earlier checkpoints are kept."""


class Stopped(KeyboardInterrupt):
    """A signal stopped the run; `status` is the exit status, 128 + the signal's number."""

    def __init__(self, number: int):
        super().__init__(signal.Signals(number).name)
        self.status = 128 + number
