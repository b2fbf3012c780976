"""The error for a user's mistake in a PEFT section."""


class UsageError(ValueError):
    """A field of the section does not fit the model.

    The loop recognizes it by `is_usage_error`, since this package does not import the loop's class.
    """

    is_usage_error = True
