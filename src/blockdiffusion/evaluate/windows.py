"""Windows over documents of any length, and rows padded to a rectangle."""

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
        given: the number of tokens at its beginning that are read and not scored (BOS, context).
        unit: the number of its document, or of its wrapped row: the unit of the data error.
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
    """Yield windows of at most `context` tokens over a document; every token is scored once.

    The first window scores all of its tokens; each later one starts `stride` tokens further and
    scores its last `stride` tokens (the last window: the rest). So every token is scored with at
    least `context - stride` positions before it (a BOS counts as one), or with all that precedes it
    in the document. Every window starts at position 0, with its own BOS if `bos_id` is not None.

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
    """Yield (start, end, first scored) of the windows over `length` tokens.

    The scored parts follow each other without gap or overlap. As the authors' do
    (`record_generative_perplexity`), window i starts at i * stride.
    """
    first = 0
    for start in range(0, max(length - context, 0) + stride, stride):
        end = min(start + context, length)
        yield start, end, first
        first = end


def default_stride(context: int, block_size: int) -> int:
    """Return half of the context, in whole blocks if it has several."""
    half = max(context // 2, 1)
    return half if block_size >= context else max(half // block_size, 1) * block_size


def check_stride(context: int, stride: int, block_size: int, bos: bool) -> None:
    """Refuse windows that a model of this block size cannot score.

    The scored part must begin with a block: context and stride are multiples of S. A model of one
    block a row (S is the context: MDLM) takes any stride, as its block may be partly given.

    Raises:
        UserError: the context or the stride is another number.
    """
    if context < 1 + bos or not 1 <= stride <= context:
        raise UserError(
            f"stride is {stride} and context {context}: the stride must be from 1 to the context"
        )
    one_block = block_size == context
    whole = one_block or context % block_size == stride % block_size == 0
    if not whole or stride > context - bos:
        largest = (context - bos) // block_size * block_size
        allowed = f"multiples of the block size {block_size}, the stride at most {largest}"
        if one_block:
            allowed = f"from 1 to {context - bos}"
        raise UserError(f"context {context} with stride {stride} cannot be scored: give {allowed}")


def rectangle(
    rows: Sequence[Sequence[int] | np.ndarray], multiple: int = 1
) -> tuple[torch.Tensor, torch.Tensor]:
    """Pad rows of any length with 0 to int64 (B, L), L a multiple; return them and validity."""
    tensors = [torch.from_numpy(np.asarray(row, dtype=np.int64)) for row in rows]
    found = torch.nn.utils.rnn.pad_sequence(tensors, batch_first=True)
    found = torch.nn.functional.pad(found, (0, -found.shape[1] % multiple))
    lengths = torch.tensor([len(row) for row in rows])
    return found, torch.arange(found.shape[1]) < lengths[:, None]
