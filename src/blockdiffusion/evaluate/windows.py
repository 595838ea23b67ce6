"""Rows to score from documents of any length: wrapped as in training, or windows with a stride."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from blockdiffusion.errors import UserError


@dataclass(frozen=True, kw_only=True, slots=True)
class Window:
    """A row to score.

    Attributes:
        ids: its tokens (T,).
        given: how many at its beginning are read and not scored (BOS and context).
        unit: the number of the document, or of the wrapped row, that its nats belong to: the unit
            of the data error.
    """

    ids: np.ndarray
    given: int
    unit: int


def document_windows(
    ids: Sequence[int] | np.ndarray,
    unit: int,
    context: int,
    stride: int,
    bos_id: int | None = None,
) -> Iterator[Window]:
    """Windows of at most `context` tokens over a document; every token is scored exactly once.

    The first window scores all of its tokens, each next one lies `stride` tokens further and scores
    the last `stride` (the last window: what is left). So every token is scored with at least
    `context - stride` positions before it (a BOS counts as one), or else with all of the document
    that there is. Window by window the model begins anew: positions start at 0, after a BOS of
    its own if `bos_id` is not None.

    Args:
        ids: tokens of the document (T,), at least one.
        unit: the document's number.
        context, stride: see `check_stride`.
    """
    document = np.asarray(ids)
    lead = np.array([] if bos_id is None else [bos_id], dtype=document.dtype)
    for start, end, first in spans(len(document), context - len(lead), stride):
        row = np.concatenate([lead, document[start:end]])
        yield Window(ids=row, given=len(lead) + first - start, unit=unit)


def spans(length: int, context: int, stride: int) -> Iterator[tuple[int, int, int]]:
    """(start, end, first scored) of the windows over `length` tokens.

    The scored parts follow each other without gap or overlap. The rule is the authors'
    (`record_generative_perplexity`): window i starts at i * stride.
    """
    first = 0
    for start in range(0, max(length - context, 0) + stride, stride):
        end = min(start + context, length)
        yield start, end, first
        first = end


def default_stride(context: int, block_size: int) -> int:
    """Half of the context, in whole blocks where it has several."""
    half = max(context // 2, 1)
    return half if block_size >= context else max(half // block_size, 1) * block_size


def check_stride(context: int, stride: int, block_size: int, bos: bool) -> None:
    """Refuses windows that a model of this block size cannot score.

    What is scored must begin with a block: context and stride are multiples of S. A model of one
    block a row (S is the context: MDLM) takes any stride, as its block is then partly given.

    Raises:
        UserError: the context or the stride is not one of those.
    """
    if context < 1 + bos or not 1 <= stride <= context:
        raise UserError(
            f"stride is {stride} and context {context}: the stride must be from 1 to the context"
        )
    if block_size == context:
        fits = stride <= context - bos
    else:
        fits = context % block_size == 0 and stride % block_size == 0 and stride <= context - bos
    if not fits:
        largest = (context - bos) // block_size * block_size
        allowed = f"multiples of the block size {block_size}, the stride at most {largest}"
        if block_size == context:
            allowed = f"from 1 to {context - bos}"
        raise UserError(f"context {context} with stride {stride} cannot be scored: give {allowed}")


def rectangle(
    rows: Sequence[Sequence[int] | np.ndarray], multiple: int = 1
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows of any length as int64 (B, L), padded with 0 to whole multiples, and which is valid."""
    longest = max(len(row) for row in rows)
    found = np.zeros((len(rows), longest + -longest % multiple), dtype=np.int64)
    valid = np.zeros(found.shape, dtype=bool)
    for index, row in enumerate(rows):
        found[index, : len(row)] = row
        valid[index, : len(row)] = True
    return torch.from_numpy(found), torch.from_numpy(valid)
