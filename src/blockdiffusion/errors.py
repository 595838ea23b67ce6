"""The one exception that a user's mistake raises, and that of a process that ends with others."""

import reprlib
from collections.abc import Sequence
from numbers import Integral, Real
from typing import Any

SHOWN = 60  # characters of a value in a message
WIDEST = 2**128  # whole numbers; beyond, even printing one takes time
_SHORT = reprlib.Repr()
_SHORT.maxlevel, _SHORT.maxstring, _SHORT.maxother, _SHORT.maxlong = 2, SHOWN, SHOWN, SHOWN


class UserError(ValueError):
    """A mistake of the user, told in one sentence: what was given, what is allowed, what to change.

    The command line prints the sentence and exits with code 2; no stack trace is shown.
    """


class PeerFailure(Exception):
    """This process ends because another one of its job did; see `distributed`.

    Its text, often empty, is what there is left to say.

    Attributes:
        exit_code: of this process.
    """

    def __init__(self, message: str, *, exit_code: int):
        super().__init__(message)
        self.exit_code = exit_code


def shown(value: Any) -> str:
    """Returns a value as a message quotes it: short, whatever its type and size."""
    if value is None:
        return "null"
    if isinstance(value, int) and not -WIDEST < value < WIDEST:
        return "a whole number of more than 38 digits"
    text = _SHORT.repr(value[:SHOWN] if isinstance(value, str | bytes) else value)
    return text if len(text) <= SHOWN else f"{text[:SHOWN]}..."


def counted(number: int, noun: str) -> str:
    """`1 row`, `2,000 rows`."""
    return f"{number:,} {noun}{'s' * (number != 1)}"


def few(items: Sequence[str]) -> str:
    """Names the first three items and counts the rest."""
    more = f" and {len(items) - 3:,} more" if len(items) > 3 else ""
    return ", ".join(items[:3]) + more


def reason(error: BaseException) -> str:
    """Returns the first line of another library's error, truncated, or the error's class."""
    return str(error).strip().partition("\n")[0][:200] or type(error).__name__


def check_whole(name: str, value: object) -> None:
    """Refuses what is no whole number."""
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise UserError(f"{name} is {shown(value)}; it must be a whole number")


def check_number(name: str, value: object) -> None:
    """Refuses what is no number."""
    if isinstance(value, bool) or not isinstance(value, Real):
        raise UserError(f"{name} is {shown(value)}; it must be a number")
