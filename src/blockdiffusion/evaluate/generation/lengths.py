"""How long documents become: tokens until a sampled EOS (paper, table 6)."""

from __future__ import annotations

import statistics
import time
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
        cut: whether the document was cut at the limit, before any EOS.
        max_new_tokens: the limit.
        nfe: network passes that all documents took part in.
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
        """Of the documents as they are, cut ones included."""
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
        """(low, high, documents) by powers of two: low <= length < high, without gaps."""
        last = max(self.maximum.bit_length(), 1)
        bins = [0] * last
        for length in self.lengths:
            bins[max(length.bit_length(), 1) - 1] += 1
        edges = [0, *(2**power for power in range(1, last + 1))]
        filled = next(index for index, documents in enumerate(bins) if documents)
        return list(zip(edges[:-1], edges[1:], bins, strict=True))[filled:]

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
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
    """Samples documents from nothing, each until EOS or the limit, and measures their lengths.

    Rows of a batch that have ended cost nothing more. Memory is that of one batch, and constant
    over the length with a `window` (or for a model of one block, whose frame slides).

    Args:
        batch_size: documents sampled at a time.
        seed: of the documents; every batch has a random stream of its own.
        journal: a file that keeps finished batches, so that a measurement that was stopped goes on;
            the caller removes it.
        progress: called with (stage, done, total) documents.
        sampling: further options of `blockdiffusion.stream`, such as `window` or `top_p`.

    Raises:
        UserError: the model has no EOS, or options out of range.
    """
    if model.config.eos_id is None:
        raise UserError("this model names no EOS, at which a document would end; train it with one")
    for name, value in (("num_samples", num_samples), ("batch_size", batch_size)):
        check_limit(name, value)
    began = time.perf_counter()
    settings = (num_samples, max_new_tokens, batch_size, seed, sorted(sampling.items()))
    kept = Journal.of(journal, model, settings)

    lengths: list[int] = []
    cut: list[bool] = []
    nfe = 0
    for batch in range(-(-num_samples // batch_size)):
        count = min(batch_size, num_samples - batch * batch_size)
        source = generator(seed, "lengths", batch)
        draw = partial(_drawn, model, count, max_new_tokens, source, sampling)
        found = kept.result(str(batch), draw)
        lengths += found["lengths"]
        cut += found["cut"]
        nfe += found["nfe"]
        if progress is not None:
            progress("documents", len(lengths), num_samples)
    return DocumentLengths(
        lengths=tuple(lengths),
        cut=tuple(cut),
        max_new_tokens=max_new_tokens,
        nfe=nfe,
        seconds=time.perf_counter() - began,
    )


def _drawn(
    model: Denoiser, count: int, max_new_tokens: int, source: torch.Generator, sampling: Any
) -> dict[str, Any]:
    """The lengths of a batch, as a journal keeps them."""
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
