"""The block loop: a generator of events.

Rows of a batch go block by block, in step. How a block comes to be is a `Process` (see
`sampling.processes`): it says what each pass reads and where it needs logits, and then which tokens
change. A finished block is committed to the past with the first pass of the next one. The command
line, `generate` and the pictures all consume the same events.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch

from blockdiffusion.diffusion.denoiser import Denoiser, NextTokenModel
from blockdiffusion.errors import UserError
from blockdiffusion.runtime.hardware import check_memory
from blockdiffusion.sampling.context import CachedContext, RecomputedContext
from blockdiffusion.sampling.logits import Filters
from blockdiffusion.sampling.policies import FirstHitting, Policy
from blockdiffusion.sampling.processes import Process, Setting, as_process
from blockdiffusion.sampling.streams import row_streams


@dataclass(frozen=True, kw_only=True)
class SamplingOptions:
    """What to sample, and how.

    Attributes:
        max_new_tokens: tokens after the prompt (and BOS); a row may stop earlier at EOS.
        policy: which tokens a pass reveals, or any other process that fits the network.
        filters: temperature, top-k, top-p.
        eos_id: a sampled token of this id ends its row; None = rows never end early.
        window: a token sees the last `window` tokens, its own block included; None = all.
        use_cache: keep keys and values of finished blocks (same result, less work).
    """

    max_new_tokens: int
    policy: Policy | Process = field(default_factory=FirstHitting)
    filters: Filters = field(default_factory=Filters)
    eos_id: int | None = None
    window: int | None = None
    use_cache: bool = True


@dataclass(frozen=True)
class StepEvent:
    """One pass: M tokens were decided, or changed. All tensors are (M,).

    `ids` and `confidences` are on the network's device, where a look at them waits for the pass;
    the others are on the CPU.

    Where noise turns tokens into others (uniform D3PM), the first pass tells all tokens of the
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
class BlockEvent:
    """A block of every listed row is finished. `ends` is where each row's kept text now ends."""

    rows: torch.Tensor
    starts: torch.Tensor
    ids: torch.Tensor
    ends: torch.Tensor


@dataclass(frozen=True)
class DoneEvent:
    """All rows are finished.

    Attributes:
        ids: (B, T), valid up to `lengths` (B,), prompts included.
        prompt_lengths: (B,) tokens that were given, BOS included.
        nfe: (B,) network passes each row took part in, commits included, a fused pass once.
    """

    ids: torch.Tensor
    lengths: torch.Tensor
    prompt_lengths: torch.Tensor
    nfe: torch.Tensor


Event = StepEvent | BlockEvent | DoneEvent


@torch.no_grad()
def sample_events(
    model: Denoiser,
    prompts: Sequence[Sequence[int]],
    options: SamplingOptions,
    generator: torch.Generator,
) -> Iterator[Event]:
    """Samples a continuation of every prompt (ids; may be empty or ragged)."""
    check_request(model, prompts, options)
    state = BlockBatch(model, prompts, options, generator)
    while state.active.numel():
        yield from denoise_block(model, state, options)
        yield state.finish_block(options.eos_id)
    yield DoneEvent(state.ids_BT.cpu(), state.ends_B, state.prompts_B, state.nfe_B)


def denoise_block(
    model: Denoiser, state: BlockBatch, options: SamplingOptions
) -> Iterator[StepEvent]:
    """Takes the current block of all active rows from noise to text."""
    block_RS, open_RS, kept_RS = state.open_block()
    streams = state.streams.of(state.active)
    setting = Setting(model.config, model.device, options.filters, streams)
    course = as_process(options.policy).begin(open_RS, setting)
    block_RS = course.fill(block_RS)
    ended_R = torch.zeros(len(block_RS), dtype=torch.bool)
    step = 0
    while True:
        # A row can leave once every kept position is decided.
        takes_part_R = (course.undecided_RS & kept_RS).any(1) & ~ended_R
        if not bool(takes_part_R.any()):
            break
        row_M, slot_M = (course.wanted_RS() & takes_part_R[:, None]).nonzero(as_tuple=True)
        wanted = (row_M.to(block_RS.device), slot_M.to(block_RS.device))
        logits_MV = model.head(state.context.denoise(block_RS, wanted, course.sigma_R()))
        state.nfe_B[state.active[takes_part_R]] += 1
        changes = course.decide((row_M, slot_M), block_RS[wanted], logits_MV)
        row_M, slot_M = changes.rows, changes.slots
        block_RS[row_M, slot_M] = changes.ids
        yield StepEvent(
            step,
            state.active[row_M],
            state.starts_R[row_M] + slot_M,
            changes.ids,
            changes.confidences,
        )
        if options.eos_id is not None:
            ended_R |= _decided_up_to_eos(
                block_RS.cpu(), course.undecided_RS, state.new_RS, options.eos_id
            )
        step += 1
    state.block_RS = block_RS


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
        prompts: Sequence[Sequence[int]],
        options: SamplingOptions,
        generator: torch.Generator,
    ):
        self.size = model.config.block_size
        self.streams = row_streams(generator, prompts, self.size)
        self.mask_id = model.config.mask_id
        self.prompts_B = torch.tensor([len(p) for p in prompts])
        self.limits_B = self.prompts_B + options.max_new_tokens
        shape = (len(prompts), self.columns())
        self.ids_BT = torch.full(shape, self.mask_id, device=model.device)
        for row, prompt in enumerate(prompts):
            self.ids_BT[row, : len(prompt)] = torch.as_tensor(prompt, dtype=torch.long)
        self.ends_B = self.prompts_B.clone()
        self.active = torch.arange(len(prompts))
        self.starts_R = self.first_starts()
        self.context = self.past(model, options)
        self.nfe_B = self.context.read_on(self.ids_BT, self.starts_R)
        self.block_RS = self.new_RS = torch.empty(0)

    def columns(self) -> int:
        """Tokens of the longest row, whole blocks."""
        return -(-int(self.limits_B.max()) // self.size) * self.size

    def past(self, model: Denoiser, options: SamplingOptions) -> CachedContext | RecomputedContext:
        """The clean past of all rows, empty."""
        kind = CachedContext if options.use_cache else RecomputedContext
        rows, longest = self.ids_BT.shape
        return kind(model, rows, longest, options.window)

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

    def finish_block(self, eos_id: int | None) -> BlockEvent:
        """Stores the block, cuts at EOS or the limit, and lets finished rows leave."""
        rows, starts_R = self.active, self.starts_R
        position_RS = starts_R[:, None] + torch.arange(self.size)
        device = self.ids_BT.device
        self.ids_BT[rows[:, None].to(device), position_RS.to(device)] = self.block_RS
        block_RS = self.block_RS.cpu()
        next_R = self.next_starts()
        done_R = next_R >= self.limits_B[rows]
        ends_R = torch.where(done_R, self.limits_B[rows], starts_R + self.size)
        if eos_id is not None:
            is_eos_RS = (block_RS == eos_id) & self.new_RS & (position_RS < ends_R[:, None])
            has_eos_R = is_eos_RS.any(1)
            after_R = starts_R + is_eos_RS.long().argmax(1) + 1
            ends_R = torch.where(has_eos_R, after_R, ends_R)
            done_R = done_R | has_eos_R
        self.ends_B[rows] = ends_R
        go_on = (~done_R).nonzero().flatten()
        if len(go_on):
            self._remember(go_on, next_R)
        self.active, self.starts_R = rows[go_on], next_R[go_on]
        return BlockEvent(rows, starts_R, block_RS, ends_R)

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
    config = model.config
    held = tokens if window is None else min(tokens, window + config.block_size)
    cached = 4 * getattr(config, "num_layers", 0) * getattr(config, "width", 0)
    needed = rows * (8.0 * tokens + cached * held + 4.0 * config.block_size * config.vocab_size)
    check_memory(needed, f"sampling {rows:,} rows of {tokens:,} tokens", lower, model.device)


def check_request(
    model: Denoiser | NextTokenModel, prompts: Sequence[Sequence[int]], options: SamplingOptions
) -> None:
    if options.max_new_tokens < 1:
        raise UserError(f"max_new_tokens is {options.max_new_tokens}; it must be at least 1")
    check_given(model, prompts, options)


def check_given(
    model: Denoiser | NextTokenModel,
    rows: Sequence[Sequence[int]],
    options: SamplingOptions,
    masks: bool = False,
) -> None:
    """Refuses what cannot be given: too long for the window, or ids that the model does not have;
    the mask token, too, unless `masks` are to be filled."""
    config = model.config
    if not len(rows):
        raise UserError("there is no prompt; give at least one, which may be empty")
    window = options.window
    longest = max(map(len, rows)) + options.max_new_tokens
    check_room(model, len(rows), longest, window, "lower num_samples or max_new_tokens")
    check_window(window, config.block_size)
    for row in rows:
        if window is not None and len(row) > window:
            raise UserError(
                f"a prompt has {len(row)} tokens, more than the window of {window}; "
                "shorten it or widen the window"
            )
        for token in row:
            if not 0 <= token < config.vocab_size or (token == config.mask_id and not masks):
                no_mask = f" without the mask token {config.mask_id} (infill fills masks)"
                raise UserError(
                    f"a prompt holds the id {token}; allowed are 0..{config.vocab_size - 1}"
                    f"{'' if masks else no_mask}"
                )
