"""Errors that are the user's to mend."""


class UserError(ValueError):
    """A value that cannot be used. The command prints its message, one line, without a traceback.

    Messages read ``name=value: what is allowed``, with the name as it stands in the config.
    """
