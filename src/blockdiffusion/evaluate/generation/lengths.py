"""Lengths of sampled documents: tokens until a sampled EOS (paper, table 6)."""

from __future__ import annotations

import statistics
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from blockdiffusion.diffusion.denoiser import Denoiser
from blockdiffusion.errors import UserError
from blockdiffusion.evaluate.journal import Journal
from blockdiffusion.limits import check_limit
from blockdiffusion.runtime.seeding import generator
from blockdiffusion.sampling import generate

Progress = Callable[[str, int, int | None], None]


@dataclass(frozen=True, kw_only=True)
class DocumentLengths:
    """Lengths of sampled documents.

    Attributes:
        lengths: tokens of each document, without BOS and EOS.
        cut: whether each was cut at the limit `max_new_tokens`, before any EOS.
        nfe: network passes, summed over documents.
        seconds: time spent since the last start.
    """

    lengths: tuple[int, ...]
    cut: tuple[bool, ...]
    max_new_tokens: int
    nfe: int
    seconds: float

    @property
    def median(self) -> float:
        return statistics.median(self.lengths)

    @property
    def mean(self) -> float:
        """The mean over all documents, cut ones included."""
        return statistics.fmean(self.lengths)

    @property
    def maximum(self) -> int:
        return max(self.lengths)

    @property
    def share_cut(self) -> float:
        return sum(self.cut) / len(self.cut)

    @property
    def tokens_per_forward(self) -> float:
        """New tokens, each document's EOS included, per network pass."""
        return (sum(self.lengths) + self.cut.count(False)) / self.nfe

    def histogram(self) -> list[tuple[int, int, int]]:
        """Return (low, high, documents) by powers of two: low <= length < high, without gaps."""
        bins = Counter(max(length.bit_length(), 1) for length in self.lengths)
        powers = range(min(bins), max(bins) + 1)
        return [(2 ** (p - 1) if p > 1 else 0, 2**p, bins[p]) for p in powers]

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        derived = ("median", "mean", "maximum", "share_cut", "tokens_per_forward")
        return asdict(self) | {name: getattr(self, name) for name in derived}


def document_lengths(
    model: Denoiser,
    num_samples: int = 500,
    max_new_tokens: int = 131_072,
    *,
    batch_size: int = 16,
    seed: int = 0,
    journal: Path | None = None,
    progress: Progress | None = None,
    **sampling: Any,
) -> DocumentLengths:
    """Sample documents from nothing, each until EOS or the limit, and measure their lengths.

    Rows of a batch that have ended cost nothing more. Memory is that of one batch, and does not
    grow with the length if there is a `window` (or for a model of one block, whose frame slides).

    Args:
        batch_size: documents sampled at a time.
        seed: of the documents; every batch has its own random stream.
        journal: file that keeps finished batches, from which a stopped measurement resumes; the
            caller removes it.
        progress: called with (stage, done, total) documents.
        sampling: further options of `blockdiffusion.stream`, such as `window` or `top_p`.

    Raises:
        UserError: the model has no EOS, or options out of range.
    """
    if model.config.eos_id is None:
        raise UserError("this model names no EOS to end a document; train it with one")
    for name, value in (("num_samples", num_samples), ("batch_size", batch_size)):
        check_limit(name, value)
    began = time.perf_counter()
    settings = (num_samples, max_new_tokens, batch_size, seed, sorted(sampling.items()))
    kept, found = Journal.of(journal, model, settings), []
    for batch in range(-(-num_samples // batch_size)):
        count = min(batch_size, num_samples - batch * batch_size)
        source = generator(seed, "lengths", batch)
        draw = partial(_drawn, model, count, max_new_tokens, source, sampling)
        found.append(kept.result(str(batch), draw))
        if progress is not None:
            progress("documents", batch * batch_size + count, num_samples)
    return DocumentLengths(
        lengths=tuple(length for batch in found for length in batch["lengths"]),
        cut=tuple(cut for batch in found for cut in batch["cut"]),
        max_new_tokens=max_new_tokens,
        nfe=sum(batch["nfe"] for batch in found),
        seconds=time.perf_counter() - began,
    )


def _drawn(
    model: Denoiser, count: int, max_new_tokens: int, source: torch.Generator, sampling: Any
) -> dict[str, Any]:
    """Sample a batch; return its lengths as plain values."""
    result = generate(
        model, num_samples=count, max_new_tokens=max_new_tokens, generator=source, **sampling
    )
    last_B = result.sequences.gather(1, result.lengths[:, None] - 1)[:, 0]
    assert model.config.eos_id is not None  # checked by the caller
    ended_B = last_B.eq(model.config.eos_id)
    return {
        "lengths": (result.lengths - result.prompt_lengths - ended_B.long()).tolist(),
        "cut": (~ended_B).tolist(),
        "nfe": int(result.nfe.sum()),
    }
