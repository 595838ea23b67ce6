"""Measured values with their standard errors: means, and ratios of two means."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Measured:
    """A value and its standard error; None if not known (a single batch or sample)."""

    value: float
    stderr: float | None


def perplexity_of(nats_per_token: float) -> float:
    """Return exp, but infinity instead of an overflow: a diverged run has results, too."""
    return math.exp(nats_per_token) if nats_per_token < 700 else math.inf


def mean_of(values: Sequence[float]) -> Measured:
    """Return the mean of independent values with its standard error."""
    count = len(values)
    mean = math.fsum(values) / count
    if count < 2 or math.isinf(mean):
        return Measured(value=mean, stderr=None)
    spread = math.fsum((v - mean) ** 2 for v in values) / (count - 1)
    return Measured(value=mean, stderr=math.sqrt(spread / count))


def ratio_of(above: Sequence[float], below: Sequence[float]) -> Measured | None:
    """Return the ratio of two sums over the same independent units; None if divided by 0.

    The error is from the delta method: the ratio is linear in small deviations of the sums.
    """
    count, mean = len(below), math.fsum(below) / max(len(below), 1)
    if mean == 0:
        return None
    ratio = math.fsum(above) / count / mean
    if count < 2:
        return Measured(value=ratio, stderr=None)
    spread = math.fsum((a - ratio * b) ** 2 for a, b in zip(above, below, strict=True))
    return Measured(value=ratio, stderr=math.sqrt(spread / (count * (count - 1))) / abs(mean))
