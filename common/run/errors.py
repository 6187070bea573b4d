"""What a user can fix, in one sentence."""


class InputError(ValueError):
    """The user's input cannot be used; the message is one sentence: what, where, and the fix."""


class Diverged(InputError):
    """A loss, an action or a parameter is not finite; earlier checkpoints are kept."""


def brief(what) -> str:
    """An error's message, or any other object, on one line, for use within a sentence."""
    return " ".join(str(what).split()).rstrip(".")[:200] or type(what).__name__
