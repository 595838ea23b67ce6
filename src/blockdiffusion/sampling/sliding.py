"""Texts longer than the row from a model of one block: the semi-autoregressive extension of MDLM.

A model with S = L was trained on single rows and never saw a clean past: a second block behind a
committed first one would be read by a network that was not made for it. So longer texts are written
inside one frame of L tokens that slides over the text (Sahoo et al. 2024, on semi-autoregressive
generation): the last L - stride tokens are kept as given, `stride` masks stand behind them, and the
block loop denoises the frame as it does a row with a prompt, all tokens seeing each other. Every
pass reads L tokens at the positions 0..L-1 that the network knows, and memory is constant.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch

from blockdiffusion.diffusion.denoiser import Denoiser
from blockdiffusion.errors import UserError
from blockdiffusion.sampling.context import CachedContext
from blockdiffusion.sampling.loop import (
    BlockBatch,
    BlockEvent,
    DoneEvent,
    Event,
    SamplingOptions,
    check_request,
    denoise_block,
)


def has_one_block(model: Denoiser) -> bool:
    """Whether the model was trained on rows of a single block (S = L)."""
    return model.config.block_size == model.config.seq_len


@torch.no_grad()
def sample_sliding(
    model: Denoiser,
    prompts: Sequence[Sequence[int]],
    options: SamplingOptions,
    generator: torch.Generator,
    stride: int | None = None,
) -> Iterator[Event]:
    """Samples a continuation of every prompt (ids; may be empty, ragged, or longer than L).

    Args:
        options: `window` must be None or L, which is what a frame is; a block of a `BlockEvent` is
            a frame, with the tokens it began with.
        stride: masked tokens that a slide adds, 1..L; None = half of L. With a stride of L nothing
            is kept, and the text is made of independent rows.

    Raises:
        UserError: a model of several blocks, or a stride or window out of range.
    """
    size = model.config.block_size
    if not has_one_block(model):
        raise UserError(
            f"stride is for models of one block, and this one has blocks of {size} tokens in rows "
            f"of {model.config.seq_len}; leave it out"
        )
    if stride is None:
        stride = max(1, size // 2)
    if not 1 <= stride <= size:
        raise UserError(f"stride is {stride}; it must be from 1 to the {size} tokens of the block")
    if options.window not in (None, size):
        raise UserError(
            f"the window is {options.window}, but a model of one block writes longer texts by "
            f"sliding that block, so that a token sees at most its {size} tokens; leave window out"
        )
    check_request(model, prompts, replace(options, window=None))
    state = _SlidingBatch(model, prompts, options, generator, stride)
    while state.active.numel():
        yield from denoise_block(model, state, options)
        yield state.finish_block(options.eos_id)
    yield DoneEvent(state.ids_BT.cpu(), state.ends_B, state.prompts_B, state.nfe_B)


class _Frame(CachedContext):
    """One block without a past: nothing is ever committed."""

    def read_on(self, ids_RT: torch.Tensor, counts_R: torch.Tensor) -> torch.Tensor:
        return torch.zeros_like(counts_R)

    def commit(self, clean_RS: torch.Tensor) -> None:
        pass


class _SlidingBatch(BlockBatch):
    """Where the frame of every row stands: `starts_R`, and up to `ends_B` its text is decided."""

    def __init__(
        self,
        model: Denoiser,
        prompts: Sequence[Sequence[int]],
        options: SamplingOptions,
        generator: torch.Generator,
        stride: int,
    ):
        self.stride = stride
        super().__init__(model, prompts, options, generator)

    def columns(self) -> int:
        """See `BlockBatch`; the last frame may stick out."""
        return max(int(self.limits_B.max()) + self.stride, self.size)

    def past(self, model: Denoiser, options: SamplingOptions) -> CachedContext:
        """See `BlockBatch`."""
        return _Frame(model, len(self.ids_BT), self.size, None)

    def first_starts(self) -> torch.Tensor:
        """See `BlockBatch`. A prompt that does not fill the frame is followed by masks; of a longer
        one the end stays."""
        kept = self.size - self.stride
        return torch.where(self.prompts_B < self.size, 0, self.prompts_B - kept)

    def open_block(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The current frame of every active row: ids, what is masked, what will be kept."""
        block_RS, _, kept_RS = super().open_block()
        position_RS = self.starts_R[:, None] + torch.arange(self.size)
        self.new_RS = position_RS >= self.ends_B[self.active, None]
        return block_RS, self.new_RS.clone(), kept_RS

    def finish_block(self, eos_id: int | None) -> BlockEvent:
        """Stores the frame, cuts at EOS or the limit, and slides the rows that go on."""
        event = super().finish_block(eos_id)
        self.starts_R = self.starts_R - self.size + self.stride
        return event
