"""Errors that are the user's to mend."""


class UserError(ValueError):
    """A value that cannot be used. The command prints its message, one line, without a traceback.

    Messages read ``name=value: what is allowed``, with the name as it stands in the config.
    """


def one_line(error: BaseException) -> str:
    """Its kind and message, or only its kind where it says nothing."""
    message = " ".join(str(error).split())
    return f"{type(error).__name__}: {message}" if message else type(error).__name__
