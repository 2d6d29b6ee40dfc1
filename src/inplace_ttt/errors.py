"""Errors that users can fix, each a message of one plain line."""


class UserError(ValueError):
    """A mistake the user can fix: the message says what is wrong and what to do. The command line prints it bare."""


def in_one_line(error: Exception, most: int | None = 300) -> str:
    """Return the message of a library's error on one line, its first ``most`` characters (None: all)."""
    return " ".join(str(error).split())[:most]


class SourceError(UserError):
    """A document source that cannot be read."""
