"""Samples against laws that were enumerated."""

from __future__ import annotations

from collections import Counter

import torch
from scipy import stats

from blockdiffusion.sampling import Generation

FALSE_ALARM = 1e-4
DRAWS = 8_000


def seeded(seed: int = 1) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def p_value(result: Generation, law: dict[tuple[int, ...], float]) -> float:
    """Chi-square of the rows of `result` against a law; cells that expect under 5 are pooled."""
    assert abs(sum(law.values()) - 1) < 1e-6
    counts = Counter(
        tuple(row[:length].tolist())
        for row, length in zip(result.sequences, result.lengths.tolist(), strict=True)
    )
    assert counts.keys() <= law.keys()
    draws = counts.total()
    wanted = torch.tensor([prob * draws for prob in law.values()], dtype=torch.float64)
    observed = torch.tensor([float(counts[text]) for text in law], dtype=torch.float64)
    pooled = wanted < 5
    if pooled.any():
        observed = torch.cat([observed[~pooled], observed[pooled].sum()[None]])
        wanted = torch.cat([wanted[~pooled], wanted[pooled].sum()[None]])
    assert len(wanted) > 5
    scaled = wanted / wanted.sum() * observed.sum()
    return stats.chisquare(observed.numpy(), scaled.numpy()).pvalue
