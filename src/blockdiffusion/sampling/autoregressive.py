"""The sampler of the autoregressive baseline: one token of every row in each pass.

It yields the events of the block loop, with blocks of one token, and keeps the conventions of the
likelihood (`denoiser.causal_nll`): the network reads x_0 .. x_{l-1} to give x_l, and where token 0
is no given BOS the mask token stands before it as a start symbol.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from blockdiffusion.diffusion.denoiser import NextTokenModel, find_bos_id
from blockdiffusion.sampling.context import CachedPast, RecomputedPast
from blockdiffusion.sampling.logits import draw_tokens
from blockdiffusion.sampling.loop import (
    BlockEvent,
    DoneEvent,
    Event,
    SamplingOptions,
    StepEvent,
    check_request,
)
from blockdiffusion.sampling.streams import row_streams


@torch.no_grad()
def sample_next_tokens(
    model: NextTokenModel,
    prompts: Sequence[Sequence[int]],
    options: SamplingOptions,
    generator: torch.Generator,
) -> Iterator[Event]:
    """Samples a continuation of every prompt (ids; may be empty or ragged).

    A prompt that begins with the BOS gets no start symbol, unless the model was trained with one
    (`bos` is false in its configuration). `options.policy` is not read; with a window a token sees
    the last `window` tokens, itself and the start symbol included.
    """
    check_request(model, prompts, options)
    state = _Rows(model, prompts, options)
    streams = row_streams(generator, prompts, 1)
    while state.active.numel():
        logits_RV = model.head(state.past.read(state.last_R))
        uniform_R = streams.of(state.active).each(1)[:, 0]
        token_R, confidence_R = draw_tokens(
            logits_RV, model.config.mask_id, options.filters, uniform_R
        )
        positions_R = state.ends_B[state.active]
        yield StepEvent(0, state.active, positions_R, token_R, confidence_R)
        yield state.append(token_R, options.eos_id)
    yield DoneEvent(state.ids_BT.cpu(), state.ends_B, state.prompts_B, state.nfe_B)


class _Rows:
    """Where every row stands. R counts the active rows, B all of them."""

    def __init__(
        self, model: NextTokenModel, prompts: Sequence[Sequence[int]], options: SamplingOptions
    ):
        config, device = model.config, model.device
        bos_id = None if config.bos is False else find_bos_id(model)
        self.prompts_B = torch.tensor([len(prompt) for prompt in prompts])
        self.limits_B = self.prompts_B + options.max_new_tokens
        shape = (len(prompts), int(self.limits_B.max()))
        self.ids_BT = torch.full(shape, config.mask_id, device=device)
        inputs_BT = torch.full((shape[0], 1 + int(self.prompts_B.max())), config.mask_id)
        lengths_B = torch.zeros_like(self.prompts_B)
        for row, prompt in enumerate(prompts):
            has_bos = bos_id is not None and [*prompt[:1]] == [bos_id]
            given = [*prompt] if has_bos else [config.mask_id, *prompt]
            inputs_BT[row, : len(given)] = torch.as_tensor(given)
            self.ids_BT[row, : len(prompt)] = torch.as_tensor(prompt, dtype=torch.long)
            lengths_B[row] = len(given)
        self.ends_B = self.prompts_B.clone()
        self.active = torch.arange(len(prompts))
        kind = CachedPast if options.use_cache else RecomputedPast
        self.past = kind(model, len(prompts), shape[1] + 1, options.window)
        # The last token is read by the pass that gives the next one.
        self.nfe_B = self.past.read_on(inputs_BT.to(device), lengths_B - 1)
        self.last_R = inputs_BT.gather(1, lengths_B[:, None] - 1)[:, 0].to(device)

    def append(self, token_R: torch.Tensor, eos_id: int | None) -> BlockEvent:
        """Stores the tokens of a pass and lets finished rows leave."""
        rows = self.active
        positions_R = self.ends_B[rows]
        self.ids_BT[rows, positions_R] = token_R
        self.ends_B[rows] += 1
        self.nfe_B[rows] += 1
        done_R = self.ends_B[rows] >= self.limits_B[rows]
        if eos_id is not None:
            done_R = done_R | (token_R.cpu() == eos_id)
        go_on = (~done_R).nonzero().flatten()
        self.active, self.last_R = rows, token_R
        if len(go_on) < len(rows):
            self.past.keep(go_on)
            self.active, self.last_R = rows[go_on], token_R[go_on.to(token_R.device)]
        return BlockEvent(rows, positions_R, token_R[:, None].cpu(), positions_R + 1)
