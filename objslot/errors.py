"""The two errors of this package that callers may want to catch."""


class UserError(ValueError):
    """Something the user can put right: one line that says what was wrong and what to do.

    The command line prints the message without a traceback and leaves with exit code 2.
    """


class BackendError(RuntimeError):
    """A backend asked for by name does not exist or cannot serve this call; the message says why."""
