"""What sampling reports while it runs: the events of `stream` and of the `Engine`.

A row is the number that `Engine.submit` returned, or in `stream` the row of the batch: the samples
of the first prompt, then those of the second, and so on.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch

from blockdiffusion.sampling.logits import refuse_masks_written
from blockdiffusion.text import Given, whole_text

Reason = Literal["length", "eos", "cancelled"]


@dataclass(frozen=True)
class TokensRevealed:
    """A pass decided, or changed, M tokens. All tensors are (M,).

    In `stream` one event is about all rows, in the engine each row has its own. `ids` and
    `confidences` are on the network's device, where a look at them waits for the pass; the others
    are on the CPU.

    Where noise turns tokens into others (uniform D3PM), the first pass reports all tokens of the
    block, and later ones those that change: the last word on a position counts.

    Attributes:
        step: number of the pass within its block, from 0.
        rows, positions, ids: which row, where in it, and what.
        confidences: the denoiser's probability of the token, before any filter.
    """

    step: int
    rows: torch.Tensor
    positions: torch.Tensor
    ids: torch.Tensor
    confidences: torch.Tensor


@dataclass(frozen=True)
class BlockDone:
    """A block of every listed row is finished; in the engine, of one row.

    Attributes:
        rows, starts: (R,) which rows, and the first position of the block.
        ids: (R, S) of the whole block.
        ends: (R,) where the kept text of each row now ends.
    """

    rows: torch.Tensor
    starts: torch.Tensor
    ids: torch.Tensor
    ends: torch.Tensor


@dataclass(frozen=True)
class Finished:
    """A row is finished.

    Attributes:
        ids: BOS and prompt, then what was written, up to and with an EOS.
        prompt_tokens: how many of them were given.
        text: the prompt as it was given, and what is new, without special tokens; None without a
            tokenizer.
        reason: "length", "eos" or "cancelled" (then only finished blocks are there).
        nfe: passes that the row took part in, commits included, a fused pass once.
    """

    row: int
    ids: list[int]
    prompt_tokens: int
    text: str | None
    reason: Reason
    nfe: int

    @property
    def tokens_per_forward(self) -> float:
        """New tokens per pass."""
        return (len(self.ids) - self.prompt_tokens) / max(1, self.nfe)


Event = TokensRevealed | BlockDone | Finished


def finished(
    model: Any,
    row: int,
    ids: list[int],
    prompt_tokens: int,
    given: Sequence[Given],
    reason: Reason,
    nfe: int,
) -> Finished:
    """The event, with its text; `given`: what of the ids was given as text.

    Raises:
        UserError: the mask token was written, as logits were not finite.
    """
    refuse_masks_written(ids, model.config.mask_id)
    text = None if model.tokenizer is None else whole_text(model.tokenizer, ids, given)
    return Finished(row, ids, prompt_tokens, text, reason, nfe)
