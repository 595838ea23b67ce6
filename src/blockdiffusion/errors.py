"""The exception for a user's mistake, the one for lost processes, and helpers for messages."""

import reprlib
from collections.abc import Iterable, Sequence
from numbers import Integral, Real
from typing import Any

SHOWN = 60  # characters of a value in a message
WIDEST = 2**128  # whole numbers; beyond, even printing one takes time
_SHORT = reprlib.Repr()
_SHORT.maxlevel, _SHORT.maxstring, _SHORT.maxother, _SHORT.maxlong = 2, SHOWN, SHOWN, SHOWN


class UserError(ValueError):
    """A mistake of the user, in one sentence: what was given, what is allowed, what to change.

    The command line prints the sentence without a stack trace and exits with code 2.
    """


class PeerFailure(Exception):
    """This process ends because another one of its job did; see `distributed`. The message is
    empty if another process reports the reason."""

    def __init__(self, message: str, *, exit_code: int):
        super().__init__(message)
        self.exit_code = exit_code


def shown(value: Any) -> str:
    """Return a value as messages quote it: short, whatever its type and size."""
    if value is None:
        return "null"
    if isinstance(value, int) and not -WIDEST < value < WIDEST:
        return "a whole number of more than 38 digits"
    text = _SHORT.repr(value[:SHOWN] if isinstance(value, str | bytes) else value)
    return text if len(text) <= SHOWN else f"{text[:SHOWN]}..."


def counted(number: int, noun: str) -> str:
    """Return `1 row`, `2,000 rows` and the like."""
    return f"{number:,} {noun}{'s' * (number != 1)}"


def few(items: Sequence[str]) -> str:
    """Name the first three items and count the rest."""
    more = f" and {len(items) - 3:,} more" if len(items) > 3 else ""
    return ", ".join(items[:3]) + more


def either(names: Iterable[str]) -> str:
    """Return `a`, `a or b`, `a, b or c` and so on."""
    *most, last = names
    return f"{', '.join(most)} or {last}" if most else last


def reason(error: BaseException) -> str:
    """Return the first line of another library's error, truncated, or the error's class."""
    return str(error).strip().partition("\n")[0][:200] or type(error).__name__


def check_whole(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise UserError(f"{name} is {shown(value)}; it must be a whole number")


def check_number(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, Real):
        raise UserError(f"{name} is {shown(value)}; it must be a number")
