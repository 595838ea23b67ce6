"""Samples against laws that were enumerated."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping

import torch
from scipy import stats

from blockdiffusion.models.transformer import BlockDiffusionModel
from blockdiffusion.runtime import seeding
from blockdiffusion.sampling import Generation
from blockdiffusion.sampling.streams import RowStreams, row_streams

FALSE_ALARM = 1e-4  # of each test
DRAWS = 8_000
# Block sizes of rows whose law can be enumerated: 3 tokens and a mask, or 2 tokens and a mask.
SHAPES = {
    "S=1": dict(vocab_size=4, mask_id=3, seq_len=4, block_size=1),
    "S=2": dict(vocab_size=4, mask_id=3, seq_len=4, block_size=2),
    "S=4": dict(vocab_size=3, mask_id=2, seq_len=8, block_size=4),
    "S=L": dict(vocab_size=4, mask_id=3, seq_len=4, block_size=4),
}


def of_shape(make: Callable[..., BlockDiffusionModel], shape: str) -> BlockDiffusionModel:
    """A network of a shape whose law has many likely texts: with two tokens its random weights are
    made smaller, or one text would be nearly certain."""
    model = make(**SHAPES[shape])
    if model.config.vocab_size == 3:
        with torch.no_grad():
            for parameter in model.output.parameters():
                parameter.mul_(0.25)
    return model


def seeded(seed: int = 1) -> torch.Generator:
    return seeding.seeded(seed)


def streams(rows: int, seed: int = 1) -> RowStreams:
    """Random numbers for so many rows from nothing."""
    return row_streams(seeded(seed), [[]] * rows, most=64)


def texts_of(result: Generation) -> list[tuple[int, ...]]:
    """The tokens of every row."""
    rows = zip(result.sequences.tolist(), result.lengths.tolist(), strict=True)
    return [tuple(row[:length]) for row, length in rows]


def law_of(expected: Mapping[str, torch.Tensor]) -> dict[tuple[int, ...], float]:
    """Text -> probability, of a file with all sequences and their probabilities."""
    texts = map(tuple, expected["sequences"].tolist())
    return dict(zip(texts, expected["probabilities"].tolist(), strict=True))


def p_value(
    samples: Generation | Iterable[tuple[int, ...]], law: Mapping[tuple[int, ...], float]
) -> float:
    """Chi-square of samples against a law; cells that expect under 5 are pooled."""
    assert abs(sum(law.values()) - 1) < 1e-6
    counts = Counter(texts_of(samples) if isinstance(samples, Generation) else samples)
    assert {text for text, prob in law.items() if prob > 0} >= counts.keys()
    draws = counts.total()
    wanted = torch.tensor([prob * draws for prob in law.values()], dtype=torch.float64)
    observed = torch.tensor([float(counts[text]) for text in law], dtype=torch.float64)
    pooled = wanted < 5
    if wanted[pooled].sum() > 0:
        observed = torch.cat([observed[~pooled], observed[pooled].sum()[None]])
        wanted = torch.cat([wanted[~pooled], wanted[pooled].sum()[None]])
    else:  # what cannot occur did not, as was asserted
        observed, wanted = observed[~pooled], wanted[~pooled]
    assert len(wanted) > 2
    scaled = wanted / wanted.sum() * observed.sum()
    return stats.chisquare(observed.numpy(), scaled.numpy()).pvalue
