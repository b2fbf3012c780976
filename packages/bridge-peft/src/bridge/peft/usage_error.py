"""The error of a user's mistake in a PEFT section."""


class UsageError(ValueError):
    """A field of the section that does not fit the model.

    The loop recognizes it by the mark, since this package does not import the loop's own.
    """

    is_usage_error = True
