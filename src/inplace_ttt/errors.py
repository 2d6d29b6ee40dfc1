"""What a user did wrong, said in one plain line."""


class UserError(ValueError):
    """A mistake the user can mend: the message says what is wrong and what to do. The command line prints it bare."""


class SourceError(UserError):
    """A document source that cannot be read."""
