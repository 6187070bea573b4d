"""The ways in which a run ends early."""

import errno
import signal

# The system refuses to write: another folder or more space is needed.
NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO)


class InputError(ValueError):
    """The user's input cannot be used; the message is one sentence: what, where, and the fix."""


class Diverged(InputError):
    """A loss, an action or a parameter is not finite; earlier checkpoints are kept."""


class Unwritable(InputError):
    """A file cannot be written, for example on a full disk; earlier files are intact."""

    def __init__(self, path: str, error: Exception):
        reason = getattr(error, "strerror", None) or " ".join(str(error).split())[:200]
        super().__init__(
            f"{path} cannot be written ({reason}): free space or fix its permissions; the same "
            "command then resumes from the last checkpoint, if there is one"
        )
        self.path, self.reason = path, reason


class Stopped(KeyboardInterrupt):
    """A signal stopped the run; `status` is the exit status, 128 + the signal's number."""

    def __init__(self, number: int):
        super().__init__(signal.Signals(number).name)
        self.status = 128 + number
