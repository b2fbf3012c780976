"""The error of a user's mistake, which the command prints in one line."""


class UsageError(ValueError):
    """A value, file or call of the user's that the run rejects.

    Its message is ``section.field=value: why; what to do``. The `bridge` command prints it without
    a traceback and ends with exit code 2; any other exception keeps its traceback.
    """

    is_usage_error = True


def is_usage_error(error: BaseException) -> bool:
    """Whether an exception is the rejection of a user's mistake.

    A package that does not import this one marks its own exception class with
    ``is_usage_error = True``.
    """
    return getattr(error, "is_usage_error", False) is True
