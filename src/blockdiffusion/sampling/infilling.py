"""Infilling: given tokens anywhere, and masks between them that are sampled.

A row goes block by block, as in `sampling.loop`; blocks that are given whole are only read. In a
block the given tokens are there from the first pass on, so that a mask sees all of its own block
and everything before it. What is given in later blocks it does not see: that is the model. A model
of one block (S = L) sees all of its row.

The law is that of the reverse process begun at the template: with first hitting every order of a
block's masks is equally likely. The probability of the whole text, given the given tokens, under
the sampler that writes from nothing is another one unless the network's predictions agree in every
order.
"""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from blockdiffusion.denoiser import Denoiser, is_autoregressive
from blockdiffusion.errors import UserError
from blockdiffusion.limits import check_limit
from blockdiffusion.sampling.loop import (
    BlockBatch,
    DoneEvent,
    Event,
    SamplingOptions,
    check_given,
    denoise_block,
)
from blockdiffusion.sampling.requests import as_ids, as_list, with_bos
from blockdiffusion.sampling.sliding import has_one_block

HOLE = re.compile(r"\[MASK(?::(\d+))?\]")


def prepare_templates(
    model: Denoiser, templates: Any, num_samples: int, bos: bool | None
) -> list[list[int]]:
    """Templates as ids with the mask token in the holes, each repeated `num_samples` times.

    Args:
        templates: a text or ids, or a list of them. In a text `[MASK]` stands for one token and
            `[MASK:5]` for five; what is between holes is tokenised by itself.
        bos: as for `stream`.

    Raises:
        UserError: a text without a tokenizer, a foreign id, a template with nothing to fill.
    """
    rows = with_bos(model, [_to_ids(model, t) for t in as_list(templates)], num_samples, bos)
    for row in rows:
        if model.config.mask_id not in row:
            raise UserError(
                "a template has nothing to fill; put [MASK], or [MASK:5] for five tokens, where "
                "text is missing (in ids, the model's mask_id)"
            )
    return rows


def _to_ids(model: Denoiser, template: Any) -> list[int]:
    if not isinstance(template, str):
        return as_ids(template)
    if model.tokenizer is None:
        raise UserError("this model's directory has no tokenizer; give templates as token ids")
    ids: list[int] = []
    end = 0
    for hole in HOLE.finditer(template):
        ids += model.tokenizer.encode(template[end : hole.start()], add_special_tokens=False)
        count = int((hole[1] or "1")[:20])
        check_limit("max_new_tokens", count, "the number in [MASK:...]")
        ids += [model.config.mask_id] * count
        end = hole.end()
    return ids + model.tokenizer.encode(template[end:], add_special_tokens=False)


@torch.no_grad()
def fill_events(
    model: Denoiser,
    templates: Sequence[Sequence[int]],
    options: SamplingOptions,
    generator: torch.Generator,
) -> Iterator[Event]:
    """Fills the masks of every template (ids, see `prepare_templates`).

    The events of `sample_events`; `DoneEvent.prompt_lengths` counts the given tokens, wherever they
    stand. `options.max_new_tokens` is 0, and `eos_id` is not read: a template has its length.

    Raises:
        UserError: an autoregressive network, or a template beyond the row of a model of one block.
    """
    if is_autoregressive(model):
        raise UserError(
            "this model is autoregressive: it sees what stands before a token only, and cannot "
            "fill what is missing; use generate, or a model that denoises"
        )
    check_given(model, templates, options, masks=True)
    length, longest = model.config.seq_len, max(map(len, templates))
    if has_one_block(model) and longest > length:
        raise UserError(
            f"a template has {longest} tokens, more than the one block of this model, which has "
            f"{length}; shorten it"
        )
    state = _TemplateBatch(model, templates, options)
    while state.active.numel():
        yield from denoise_block(model, state, options, generator)
        yield state.finish_block(None)
    yield DoneEvent(state.ids_BT.cpu(), state.ends_B, state.given_B, state.nfe_B)


class _TemplateBatch(BlockBatch):
    """Rows that go from one block with a mask to the next."""

    def __init__(
        self, model: Denoiser, templates: Sequence[Sequence[int]], options: SamplingOptions
    ):
        size, mask_id = model.config.block_size, model.config.mask_id
        self._due_B = [
            deque(dict.fromkeys(
                position // size * size for position, token in enumerate(row) if token == mask_id
            ))
            for row in templates
        ]  # fmt: skip
        self.given_B = torch.tensor([sum(token != mask_id for token in row) for row in templates])
        super().__init__(model, templates, options)

    def first_starts(self) -> torch.Tensor:
        """See `BlockBatch`."""
        return self.next_starts()

    def next_starts(self) -> torch.Tensor:
        """See `BlockBatch`."""
        rows = self.active.tolist()
        nowhere = self.limits_B.tolist()
        return torch.tensor([
            self._due_B[row].popleft() if self._due_B[row] else nowhere[row] for row in rows
        ])  # fmt: skip

    def open_block(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """See `BlockBatch`; what lies behind a template in its last block is masked, too."""
        block_RS, _, kept_RS = super().open_block()
        return block_RS, (block_RS == self.mask_id).cpu(), kept_RS
