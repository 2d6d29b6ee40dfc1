"""What a user did wrong, said in one plain line."""


class UserError(ValueError):
    """A mistake the user can mend: the message says what is wrong and what to do. The command line prints it bare."""


def in_one_line(error: Exception, most: int | None = 300) -> str:
    """What an error of a library says, without line breaks, its first ``most`` characters (None: all)."""
    return " ".join(str(error).split())[:most]


class SourceError(UserError):
    """A document source that cannot be read."""
