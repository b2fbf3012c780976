"""The error of a user's mistake, which the command prints on one line."""


class UsageError(ValueError):
    """A mistake of the user's: a value, a file or a call that is rejected.

    The message is ``section.field=value: what is wrong; what to do``. The `bridge` command prints
    it without a traceback and ends with exit code 2; any other exception keeps its traceback.
    """

    is_usage_error = True


def is_usage_error(error: BaseException) -> bool:
    """Whether an exception is about a mistake of the user's.

    Packages that do not import this one mark their exception classes with
    ``is_usage_error = True``.
    """
    return getattr(error, "is_usage_error", False) is True
