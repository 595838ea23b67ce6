"""Numbers for people: one formatter for each kind of number."""

from __future__ import annotations

import math
from collections.abc import Mapping
from datetime import timedelta
from typing import Any

SI = ("", "k", "M", "G", "T", "P", "E")
COUNTS = ("", "K", "M", "B", "T")
LONGEST_WAIT = 30 * 86_400.0  # seconds


def number(value: float | None) -> str:
    """Four significant digits; whole numbers whole; an empty text if not known."""
    if value is None:
        return ""
    if abs(value) >= 1e7 or not math.isfinite(value):
        return f"{value:.3g}".replace("e+0", "e").replace("e+", "e")
    if value == int(value):
        return f"{value:,.0f}"
    if abs(value) < 5e-4:  # four decimals would show at most one digit
        return scientific(value)
    digits = 3 - math.floor(math.log10(abs(value)))
    return f"{value:,.{min(max(digits, 0), 4)}f}"


def with_error(found: Mapping[str, Any] | None, spec: str | None = None) -> str:
    """12.3 ± 0.4: both in the format `spec`, or to the decimals of two digits of the error."""
    if found is None:
        return ""
    value, error = found["value"], found["stderr"]
    if spec is not None:
        return f"{value:{spec}}" + (f" ± {error:{spec}}" if error else "")
    if not error or not math.isfinite(error):
        return number(value)
    if abs(value) >= 1e7:
        return f"{number(value)} ± {number(error)}"
    places = _places(error)
    return f"{value:,.{places}f} ± {error:,.{places}f}"


def with_errors(value: float, spec: str, **errors: float | None) -> str:
    """5.4363 ± 0.0012 (noise) ± 0.0191 (data): each known error with its name."""
    known = {name: error for name, error in errors.items() if error is not None}
    return f"{value:{spec}}" + "".join(f" ± {e:{spec}} ({name})" for name, e in known.items())


def two_digits(error: float) -> str:
    """A standard error to two significant digits, without an exponent: 0.00031, 2.3, 120."""
    if not 0 < error < 1e15:  # of a run that has diverged
        return f"{error:.2g}"
    return f"{error:,.{_places(error)}f}"


def _places(error: float) -> int:
    """Return the decimals that show two digits of an error."""
    return max(1 - math.floor(math.log10(error)), 0)


def scientific(value: float, digits: int = 2) -> str:
    """0.00192 -> 1.92e-3; 0 stays 0."""
    if value == 0:
        return "0"
    mantissa, exponent = f"{value:.{digits}e}".split("e")
    return f"{mantissa}e{int(exponent)}"


def count(value: float) -> str:
    """Three digits and a letter: 25.3K, 3.91M, 65B; numbers under ten thousand as they are."""
    return f"{value:,.0f}" if value < 10_000 else _scaled(value, COUNTS)


def scaled(value: float, unit: str) -> str:
    """Three digits and a unit with its prefix: 3.91 GB, 120 TFLOP/s."""
    return _scaled(value, tuple(f" {prefix}{unit}" for prefix in SI))


def _scaled(value: float, units: tuple[str, ...]) -> str:
    # A number that rounds to 1000 K is 1 M.
    power = sum(value >= 0.9995 * 1000**power for power in range(1, len(units)))
    return f"{value / 1000**power:.3g}{units[power]}"


def duration(seconds: float) -> str:
    """8.1 us, 3.4 ms, 12.3 s, 8 min 54 s, 3 h 2 min, 4.5 days."""
    if seconds < 0.1:
        return f"{1e3 * seconds:.3g} ms" if seconds >= 1e-3 else f"{1e6 * seconds:.3g} us"
    if seconds < 60:
        return f"{seconds:.3g} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours < 48 else f"{seconds / 86_400:,.3g} days"


def clock(seconds: float) -> str:
    """1:02:03; from a day on with days before it, at most `LONGEST_WAIT`."""
    if seconds > LONGEST_WAIT:
        return f"more than {timedelta(seconds=LONGEST_WAIT).days} days"
    return str(timedelta(seconds=round(seconds)))
