"""Small pieces that every part of the report writes the same way."""

from __future__ import annotations

import json
import math


def missing(sentence: str) -> str:
    """The place of a part that has nothing to show; `sentence` says why, as HTML."""
    return f'<p class="missing">{sentence}</p>'


def script_json(value: object) -> str:
    """JSON that cannot end the script element it stands in."""
    text = json.dumps(value, separators=(",", ":"), allow_nan=False)
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def perplexity_of(nats_per_token: float) -> float:
    """exp, but infinity instead of an overflow: a diverged run has a report too."""
    return math.exp(nats_per_token) if nats_per_token < 700 else math.inf


def two_digits(error: float) -> str:
    """A standard error to two significant digits, without an exponent: 0.00031, 2.3, 120."""
    if not 0 < error < 1e15:  # of a run that has diverged
        return f"{error:.2g}"
    return f"{error:,.{max(1 - math.floor(math.log10(error)), 0)}f}"


def count(number: int) -> str:
    """Three digits and a unit: 25.3 K, 3.91 M, 169 M; numbers under ten thousand as they are."""
    if number < 10_000:
        return f"{number:,}"
    unit, size = next(
        (unit, size)
        for unit, size in (("B", 10**9), ("M", 10**6), ("K", 10**3))
        if number >= 0.9995 * size  # what rounds to 1000 K is 1 M
    )
    return f"{number / size:.3g} {unit}"


def duration(seconds: float) -> str:
    """12.3 s, 8 min 54 s, 3 h 2 min."""
    if seconds < 60:
        return f"{seconds:.3g} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s"
    hours, minutes = divmod(minutes, 60)
    return f"{hours:,} h {minutes} min"
