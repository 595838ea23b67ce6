"""The one exception that a user's mistake raises."""


class UserError(ValueError):
    """A mistake of the user, told in one sentence: what was given, what is allowed, what to change.

    The command line prints the sentence and exits with code 2; no stack trace is shown.
    """
