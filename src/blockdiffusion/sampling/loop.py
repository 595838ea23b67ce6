"""The block loop: a generator of events.

Rows of a batch go block by block, in step. How a block comes to be is a `Sampler` (see
`sampling.samplers`): it says what each pass reads and where it needs logits, and then which tokens
change. A finished block is committed to the past with the first pass of the next one. The command
line, `generate` and the pictures all consume the same events.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from blockdiffusion.diffusion.denoiser import Denoiser, NextTokenModel
from blockdiffusion.errors import UserError, counted
from blockdiffusion.runtime.hardware import check_memory
from blockdiffusion.sampling.context import Context, make_context
from blockdiffusion.sampling.events import BlockDone, Event, TokensRevealed, finished
from blockdiffusion.sampling.params import SamplingParams
from blockdiffusion.sampling.requests import Row
from blockdiffusion.sampling.samplers import SamplingContext
from blockdiffusion.sampling.streams import row_streams


@torch.no_grad()
def sample_events(
    model: Denoiser,
    rows: Sequence[Row],
    params: SamplingParams,
    generator: torch.Generator,
) -> Iterator[Event]:
    """Samples a continuation of every row (which may be empty or ragged)."""
    check_request(model, rows, params)
    yield from run_blocks(model, BlockBatch(model, rows, params, generator), params)


def run_blocks(model: Denoiser, batch: BlockBatch, params: SamplingParams) -> Iterator[Event]:
    """Block after block, until all rows are finished."""
    while batch.active.numel():
        yield from denoise_block(model, batch, params)
        yield from batch.finish_block()


def denoise_block(
    model: Denoiser, batch: BlockBatch, params: SamplingParams
) -> Iterator[TokensRevealed]:
    """Takes the current block of all active rows from noise to text."""
    block_RS, open_RS, kept_RS = batch.open_block()
    streams = batch.streams.of(batch.active)
    context = SamplingContext(model.config, model.device, params, streams)
    state = params.sampler.start(open_RS, context)
    block_RS = state.initial_block(block_RS)
    ended_R = torch.zeros(len(block_RS), dtype=torch.bool)
    step = 0
    while True:
        # A row can leave once every kept position is decided.
        takes_part_R = (state.undecided_RS & kept_RS).any(1) & ~ended_R
        if not bool(takes_part_R.any()):
            break
        row_M, slot_M = (state.wanted_RS() & takes_part_R[:, None]).nonzero(as_tuple=True)
        wanted = (row_M.to(block_RS.device), slot_M.to(block_RS.device))
        logits_MV = model.head(batch.context.denoise(block_RS, wanted, state.sigma_R()))
        batch.nfe_B[batch.active[takes_part_R]] += 1
        update = state.step((row_M, slot_M), block_RS[wanted], logits_MV)
        row_M, slot_M = update.rows, update.slots
        block_RS[row_M, slot_M] = update.ids
        yield TokensRevealed(
            step,
            batch.active[row_M],
            batch.starts_R[row_M] + slot_M,
            update.ids,
            update.confidences,
        )
        if batch.eos_id is not None:
            ended_R |= _decided_up_to_eos(
                block_RS.cpu(), state.undecided_RS, batch.new_RS, batch.eos_id
            )
        step += 1
    batch.block_RS = block_RS


def _decided_up_to_eos(
    block_RS: torch.Tensor, undecided_RS: torch.Tensor, new_RS: torch.Tensor, eos_id: int
) -> torch.Tensor:
    """Whether a row has a sampled EOS and all before it is decided: the rest will be cut."""
    is_eos_RS = (block_RS == eos_id) & new_RS & ~undecided_RS
    undecided_before_RS = undecided_RS.long().cumsum(1) > 0
    return (is_eos_RS & ~undecided_before_RS).any(1)


class BlockBatch:
    """Where every row stands. R counts the active rows, B all of them."""

    def __init__(
        self,
        model: Denoiser,
        prompts: Sequence[Row],
        params: SamplingParams,
        generator: torch.Generator,
        new_tokens: int | None = None,
    ):
        new_tokens = params.max_new_tokens if new_tokens is None else new_tokens
        self.size = model.config.block_size
        self.model, self.rows = model, prompts
        self.streams = row_streams(generator, [row.ids for row in prompts], self.size)
        self.mask_id = model.config.mask_id
        self.eos_id = eos_of(model, params)
        self.prompts_B = torch.tensor([len(row.ids) for row in prompts])
        self.given_B = self.prompts_B
        self.limits_B = self.prompts_B + new_tokens
        shape = (len(prompts), self.columns())
        self.ids_BT = torch.full(shape, self.mask_id, device=model.device)
        for row, (ids, _) in enumerate(prompts):
            self.ids_BT[row, : len(ids)] = torch.as_tensor(ids, dtype=torch.long)
        self.ends_B = self.prompts_B.clone()
        self.active = torch.arange(len(prompts))
        self.starts_R = self.first_starts()
        self.context = self.past(model, params)
        self.nfe_B = self.context.read_on(self.ids_BT, self.starts_R)
        self.block_RS = self.new_RS = torch.empty(0)

    def columns(self) -> int:
        """Tokens of the longest row, whole blocks."""
        return -(-int(self.limits_B.max()) // self.size) * self.size

    def past(self, model: Denoiser, params: SamplingParams) -> Context:
        """The clean past of all rows, empty."""
        rows, longest = self.ids_BT.shape
        return make_context(model, rows, longest, params.window, params.use_cache)

    def first_starts(self) -> torch.Tensor:
        """Where every row's first block with something to sample begins."""
        return self.prompts_B // self.size * self.size

    def next_starts(self) -> torch.Tensor:
        """Where the next such block of every active row begins; at or beyond its limit: nowhere."""
        return self.starts_R + self.size

    def open_block(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The current block of every active row: ids, what is to be sampled, what will be kept."""
        position_RS = self.starts_R[:, None] + torch.arange(self.size)
        device = self.ids_BT.device
        block_RS = self.ids_BT[self.active[:, None].to(device), position_RS.to(device)]
        self.new_RS = position_RS >= self.prompts_B[self.active, None]
        kept_RS = position_RS < self.limits_B[self.active, None]
        return block_RS, self.new_RS.clone(), kept_RS

    def finish_block(self) -> list[Event]:
        """Stores the block, cuts at EOS or the limit, and lets finished rows leave."""
        rows, starts_R = self.active, self.starts_R
        position_RS = starts_R[:, None] + torch.arange(self.size)
        device = self.ids_BT.device
        self.ids_BT[rows[:, None].to(device), position_RS.to(device)] = self.block_RS
        block_RS = self.block_RS.cpu()
        next_R = self.next_starts()
        done_R = next_R >= self.limits_B[rows]
        ends_R = torch.where(done_R, self.limits_B[rows], starts_R + self.size)
        has_eos_R = torch.zeros_like(done_R)
        if self.eos_id is not None:
            is_eos_RS = (block_RS == self.eos_id) & self.new_RS & (position_RS < ends_R[:, None])
            has_eos_R = is_eos_RS.any(1)
            after_R = starts_R + is_eos_RS.long().argmax(1) + 1
            ends_R = torch.where(has_eos_R, after_R, ends_R)
            done_R = done_R | has_eos_R
        self.ends_B[rows] = ends_R
        go_on = (~done_R).nonzero().flatten()
        if len(go_on):
            self._remember(go_on, next_R)
        self.active, self.starts_R = rows[go_on], next_R[go_on]
        done = BlockDone(rows, starts_R, block_RS, ends_R)
        return [done, *self._finished(rows[done_R], has_eos_R[done_R])]

    def _finished(self, rows: torch.Tensor, has_eos_R: torch.Tensor) -> Iterator[Event]:
        if not len(rows):
            return
        ids_RT = self.ids_BT[rows.to(self.ids_BT.device)].cpu()
        for row, ids, has_eos in zip(rows.tolist(), ids_RT, has_eos_R.tolist(), strict=True):
            yield finished(
                self.model,
                row,
                ids[: self.ends_B[row]].tolist(),
                int(self.given_B[row]),
                self.rows[row].given,
                "eos" if has_eos else "length",
                int(self.nfe_B[row]),
            )

    def _remember(self, go_on: torch.Tensor, next_R: torch.Tensor) -> None:
        """Makes the finished blocks, and what is given up to the next ones, the past of the rows
        that go on."""
        ahead_R = next_R - self.starts_R
        one_block = bool((ahead_R[go_on] == self.size).all())
        if one_block:
            self.context.commit(self.block_RS)
        if len(go_on) < len(self.active):
            self.context.keep(go_on)
        if not one_block:
            rows, starts_R, ahead_R = self.active[go_on], self.starts_R[go_on], ahead_R[go_on]
            column_RT = starts_R[:, None] + torch.arange(int(ahead_R.max()))
            column_RT = column_RT.clamp(max=self.ids_BT.shape[1] - 1)
            device = self.ids_BT.device
            given_RT = self.ids_BT[rows[:, None].to(device), column_RT.to(device)]
            self.nfe_B[rows] += self.context.read_on(given_RT, ahead_R)


def eos_of(model: Denoiser | NextTokenModel, params: SamplingParams) -> int | None:
    """A sampled token of this id ends its row; None: rows never end early."""
    return model.config.eos_id if params.eos else None


def check_window(window: int | None, block_size: int) -> None:
    if window is not None and window < block_size:
        raise UserError(
            f"the window of {window} tokens is smaller than a block of {block_size}; "
            "give at least one block"
        )


def check_room(
    model: Denoiser | NextTokenModel, rows: int, tokens: int, window: int | None, lower: str
) -> None:
    """Refuses rows that do not fit into memory together: their ids, their keys and values (at two
    bytes a number) and the logits of a block."""
    config, sizes = model.config, model.backbone.attention
    held = tokens if window is None else min(tokens, window + config.block_size)
    cached = 4 * sizes.num_hidden_layers * sizes.num_key_value_heads * sizes.head_dim
    needed = rows * (8.0 * tokens + cached * held + 4.0 * config.block_size * config.vocab_size)
    what = f"sampling {counted(rows, 'row')} of {counted(tokens, 'token')}"
    check_memory(needed, what, lower, model.device)


def check_request(
    model: Denoiser | NextTokenModel, rows: Sequence[Row], params: SamplingParams
) -> None:
    check_given(model, rows, params, params.max_new_tokens)


def check_given(
    model: Denoiser | NextTokenModel,
    rows: Sequence[Row],
    params: SamplingParams,
    new_tokens: int,
    masks: bool = False,
) -> None:
    """Refuses what cannot be given: too long for the window, or ids that the model does not have;
    the mask token, too, unless `masks` are to be filled."""
    config = model.config
    if not len(rows):
        raise UserError("there is no prompt; give at least one, which may be empty")
    window = params.window
    longest = max(len(row.ids) for row in rows) + new_tokens
    check_room(model, len(rows), longest, window, "lower num_samples or max_new_tokens")
    check_window(window, config.block_size)
    for ids, _ in rows:
        if window is not None and len(ids) > window:
            raise UserError(
                f"a prompt has {len(ids)} tokens, more than the window of {window}; "
                "shorten it or widen the window"
            )
        for token in ids:
            if not 0 <= token < config.vocab_size or (token == config.mask_id and not masks):
                no_mask = f" without the mask token {config.mask_id} (infill fills masks)"
                raise UserError(
                    f"a prompt holds the id {token}; allowed are 0..{config.vocab_size - 1}"
                    f"{'' if masks else no_mask}"
                )
