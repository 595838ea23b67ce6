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
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch

from blockdiffusion.diffusion.denoiser import Denoiser, is_autoregressive
from blockdiffusion.errors import UserError, shown
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
from blockdiffusion.text import Given, encode_behind, encode_text

HOLE = re.compile(r"\[MASK(?::([^\]]*))?\]")
MOST_MASKS = 16_384  # of a text


@dataclass(frozen=True)
class Template:
    """Ids with the mask token in the holes, and the texts of what was given as text."""

    ids: list[int]
    given: list[Given]


def prepare_templates(
    model: Denoiser, templates: Any, num_samples: int, bos: bool | None
) -> list[Template]:
    """Templates as ids with the mask token in the holes, each repeated `num_samples` times.

    Args:
        templates: a text or ids, or a list of them. In a text `[MASK]` stands for one token and
            `[MASK:5]` for five; what is between holes is tokenised by itself, so that it reads in
            its place as it was given.
        bos: as for `stream`.

    Raises:
        UserError: a text without a tokenizer or with more than `MOST_MASKS` masks, a foreign id, a
            template with nothing to fill.
    """
    read = [_read(model, template) for template in as_list(templates)]
    rows = iter(with_bos(model, [template.ids for template in read], num_samples, bos))
    found = []
    for template in read:
        for row in islice(rows, num_samples):
            if model.config.mask_id not in row:
                raise UserError(
                    "a template has nothing to fill; put [MASK], or [MASK:5] for five tokens, "
                    "where text is missing (in ids, the model's mask_id)"
                )
            bos_tokens = len(row) - len(template.ids)
            given = [
                (start + bos_tokens if start else 0, stop + bos_tokens, text)
                for start, stop, text in template.given
            ]
            found.append(Template(row, given))
    return found


def _read(model: Denoiser, template: Any) -> Template:
    if not isinstance(template, str):
        return Template(as_ids(template), [])
    parts = HOLE.split(template)
    texts = parts[::2]
    counts = [_masks(number) for number in parts[1::2]]
    if sum(counts) > MOST_MASKS:
        raise UserError(
            f"the masks of a template stand for {sum(counts):,} tokens or more, and at most "
            f"{MOST_MASKS:,} are filled at a time; shorten the gaps, or fill one after the other"
        )
    ids: list[int] = []
    given: list[Given] = []
    for text, masks in zip(texts, [*counts, 0], strict=True):
        piece = (encode_behind if ids else encode_text)(model.tokenizer, text)
        given.append((len(ids), len(ids) + len(piece), text))
        ids += [*piece, *[model.config.mask_id] * masks]
    return Template(ids, given)


def _masks(number: str | None) -> int:
    """How many tokens `[MASK]` or `[MASK:number]` stands for."""
    if number is None:
        return 1
    if re.fullmatch("0*[1-9][0-9]*", number) is None:
        raise UserError(
            f"a template holds [MASK:{shown(number)[1:-1]}]; write [MASK] for one missing token, "
            "or [MASK:5] for five"
        )
    return int(number.lstrip("0")[:9])  # Python refuses to read numbers of thousands of digits


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
    state = _TemplateBatch(model, templates, options, generator)
    while state.active.numel():
        yield from denoise_block(model, state, options)
        yield state.finish_block(None)
    yield DoneEvent(state.ids_BT.cpu(), state.ends_B, state.given_B, state.nfe_B)


class _TemplateBatch(BlockBatch):
    """Rows that go from one block with a mask to the next."""

    def __init__(
        self,
        model: Denoiser,
        templates: Sequence[Sequence[int]],
        options: SamplingOptions,
        generator: torch.Generator,
    ):
        size, mask_id = model.config.block_size, model.config.mask_id
        self._due_B = [
            deque(dict.fromkeys(
                position // size * size for position, token in enumerate(row) if token == mask_id
            ))
            for row in templates
        ]  # fmt: skip
        self.given_B = torch.tensor([sum(token != mask_id for token in row) for row in templates])
        super().__init__(model, templates, options, generator)

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
