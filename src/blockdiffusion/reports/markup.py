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
