"""What a user can fix, in one sentence."""

import contextlib

from common.run.stopping import stop_if_told


class InputError(ValueError):
    """The user's input cannot be used; the message is one sentence: what, where, and the fix."""


class Diverged(InputError):
    """A loss, an action or a parameter is not finite; earlier checkpoints are kept."""


def brief(what, length: int = 200) -> str:
    """An error with its type, or any other object, on one line for use within a sentence."""
    text = " ".join(str(what).split()).rstrip(".")[:length]
    if isinstance(what, Exception):
        text = f"{type(what).__name__}: {text}".removesuffix(": ")
    return text


@contextlib.contextmanager
def explained(what: str, fix: str):
    """Raises InputError, "<what> (<the error>): <fix>", for every error within except its own."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        stop_if_told()  # libraries turn a signal's exception into errors of their own
        reason = brief(error.__cause__ or error, 600)  # long enough for the list of tasks
        raise InputError(f"{what} ({reason}): {fix}") from None
