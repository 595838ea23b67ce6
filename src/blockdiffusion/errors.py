"""The one exception that a user's mistake raises, and that of a process that ends with others."""

from numbers import Integral, Real


class UserError(ValueError):
    """A mistake of the user, told in one sentence: what was given, what is allowed, what to change.

    The command line prints the sentence and exits with code 2; no stack trace is shown.
    """


class Elsewhere(Exception):
    """This process ends because another one of its job did; see `ranks`.

    Its text, often empty, is what there is left to say.

    Attributes:
        exit_code: of this process.
    """

    def __init__(self, message: str, *, exit_code: int):
        super().__init__(message)
        self.exit_code = exit_code


def check_whole(name: str, value: object) -> None:
    """Refuses what is no whole number."""
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise UserError(f"{name} is {repr(value)[:60]}; it must be a whole number")


def check_number(name: str, value: object) -> None:
    """Refuses what is no number."""
    if isinstance(value, bool) or not isinstance(value, Real):
        raise UserError(f"{name} is {repr(value)[:60]}; it must be a number")
