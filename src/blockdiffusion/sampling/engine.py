"""Many requests at a time: rows that begin, go on and end independently of each other.

Every request goes block by block, as in `sampling.loop`, with its own options, its own source of
randomness and its own place in its own block. A `step` is one pass of the network over all requests
that have a row: each brings the clean tokens that are not yet in the cache (its prompt, or the
block that it has just finished) and, once those are in, the block that it is denoising. So finished
requests leave, and waiting ones enter, between any two passes.

What a request writes depends on its options and seed alone, up to the rounding of kernels that see
another number of rows: it is what `generate` gives for it.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch

from blockdiffusion.diffusion.denoiser import Denoiser, is_autoregressive
from blockdiffusion.errors import UserError
from blockdiffusion.limits import check_limit
from blockdiffusion.models.inference import inference_form
from blockdiffusion.runtime.seeding import fresh_seed, seeded
from blockdiffusion.sampling.context import given_bos
from blockdiffusion.sampling.events import (
    BlockDone,
    Event,
    Finished,
    Reason,
    TokensRevealed,
    finished,
)
from blockdiffusion.sampling.logits import NOT_FINITE
from blockdiffusion.sampling.loop import check_request, check_room, check_window, eos_of
from blockdiffusion.sampling.params import FIELDS, SamplingParams, as_params
from blockdiffusion.sampling.requests import Row, prepare_rows, resolved
from blockdiffusion.sampling.samplers import BlockState, SamplingContext
from blockdiffusion.sampling.sliding import has_one_block
from blockdiffusion.sampling.streams import RowStreams, row_streams

ENGINES = ("num_samples", "stride", "window", "use_cache")  # what no request chooses
PREFILL_TOKENS = 512  # clean tokens that a request brings into one pass, at most


class _Request:
    """Where a request stands. `ids` are the prompt and the finished blocks; `num_read` of them,
    after the start symbol of an autoregressive network (`before`), are in the cache. The block in
    work begins at `start`, and its first `given` tokens are in `ids`."""

    def __init__(
        self,
        id: int,
        row: Row,
        params: SamplingParams,
        eos_id: int | None,
        streams: RowStreams,
        before: list[int],
    ):
        self.id, self.ids, self.prompt_text = id, list(row.ids), row.given
        self.params, self.eos_id, self.streams = params, eos_id, streams
        self.before, self.prompt_tokens = before, len(row.ids)
        self.limit = len(row.ids) + params.max_new_tokens
        self.num_read = self.nfe = self.start = self.given = self.step = 0
        self.state: BlockState | None = None
        self.block: list[int] = []

    def unread(self, size: int) -> list[int]:
        """Clean tokens for the next pass: whole blocks, as many as one pass takes."""
        most = max(size, PREFILL_TOKENS // size * size)
        stop = min(self.whole_blocks(size), self.num_read + most)
        skip = self.num_read - len(self.before)
        return self.before[self.num_read :] + self.ids[max(0, skip) : stop - len(self.before)]

    def whole_blocks(self, size: int) -> int:
        """Clean tokens in whole blocks, read or not."""
        return (len(self.before) + len(self.ids)) // size * size

    def open_block(self, context: SamplingContext) -> None:
        """Begins the block that follows the whole blocks of `ids`, which are read or being read."""
        size = context.config.block_size
        self.start = len(self.ids) // size * size
        self.given = len(self.ids) - self.start
        block = self.ids[self.start :] + [context.config.mask_id] * (size - self.given)
        open_1S = torch.arange(size)[None] >= self.given
        self.state = self.params.sampler.start(open_1S, context)
        filled_1S = self.state.initial_block(torch.tensor([block], device=context.device))
        self.block = filled_1S[0].tolist()
        self.step = 0

    def block_is_done(self) -> bool:
        """Whether all is decided that will be kept: up to the limit, or to a sampled EOS."""
        assert self.state is not None
        undecided = self.state.undecided_RS[0].tolist()
        for slot in range(min(len(self.block), self.limit - self.start)):
            if undecided[slot]:
                return False
            if slot >= self.given and self.block[slot] == self.eos_id:
                return True
        return True

    def close_block(self) -> Reason | None:
        """Adds the block to `ids`, cut at an EOS or the limit; why the request ends, if it does."""
        new = self.block[self.given : self.limit - self.start]
        reason: Reason | None = None
        if self.eos_id in new:
            new = new[: new.index(self.eos_id) + 1]
            reason = "eos"
        self.ids += new
        self.state = None
        return reason or ("length" if len(self.ids) == self.limit else None)

    def block_done(self) -> BlockDone:
        """The event of the block that was closed."""
        row, start, end = torch.tensor([self.id, self.start, len(self.ids)]).split(1)
        return BlockDone(row, start, torch.tensor([self.block]), end)


class Engine:
    """Samples many requests together, each as if it were alone.

    >>> engine = Engine(model, max_rows=8)
    >>> first = engine.submit("Once upon a time", seed=1)
    >>> second = engine.submit("The", max_new_tokens=64, top_p=0.9, seed=2)
    >>> texts = {event.row: event.text for event in engine.run() if isinstance(event, Finished)}

    Args:
        model: a network that denoises blocks, or predicts the next token.
        max_rows: requests in a pass; more wait.
        max_tokens: prompt and new tokens of a request, at most, where there is no window. The
            cache for `max_rows` times as many (with a window, for the window) is allocated now.
        window: a token sees the last `window` tokens, its own block included; None = all. Then
            requests may be of any length, in constant memory.
        optimize: sample with a copy of the model as it is now, which is made for it; the same up to
            rounding.

    Raises:
        UserError: a number is out of range.
    """

    def __init__(
        self,
        model: Denoiser,
        *,
        max_rows: int = 8,
        max_tokens: int = 1024,
        window: int | None = None,
        optimize: bool = True,
    ):
        for name, value in (("max_rows", max_rows), ("max_tokens", max_tokens)):
            check_limit(name, value)
        size = model.config.block_size
        check_limit("window", window)
        check_window(window, size)
        self.model = model = inference_form(model) if optimize else model
        self.max_rows, self.window = max_rows, window
        self.max_tokens = max_tokens
        check_room(model, max_rows, max_tokens, window, "lower max_rows or max_tokens")
        self._causal = is_autoregressive(model)
        most = max_tokens + self._causal  # the start symbol
        held = -(-most // size) * size if window is None else window + size
        self._cache = model.make_cache(max_rows, held)
        self._cache.clear()
        self._waiting: deque[_Request] = deque()
        self._rows: list[_Request] = []
        self._cancelled: list[_Request] = []
        self._next_id = 0

    @property
    def num_waiting(self) -> int:
        """Requests without a row."""
        return len(self._waiting)

    @property
    def num_active(self) -> int:
        """Requests with a row."""
        return len(self._rows)

    def submit(
        self,
        prompt: Any = None,
        params: SamplingParams | None = None,
        **options: Any,
    ) -> int:
        """Put a request into the queue; return its number.

        Args:
            prompt: a text or ids; None = from nothing.
            params: how to sample; `options`, fields of `SamplingParams` by name, go before it. The
                window is the engine's; `num_samples`, `stride` and `use_cache` are not for it.

        Raises:
            UserError: something is out of range, or the request does not fit into the engine.
        """
        request = self._request(prompt, as_params(params, **options))
        self._next_id += 1
        self._waiting.append(request)
        return request.id

    def check(self, prompt: Any = None, params: SamplingParams | None = None) -> None:
        """Refuse what `submit` would refuse."""
        self._request(prompt, as_params(params))

    def _request(self, prompt: Any, params: SamplingParams) -> _Request:
        for name in ENGINES:
            if getattr(params, name) not in (FIELDS[name].default, getattr(self, name, None)):
                raise UserError(
                    f"{name} is no option of a request; leave it out (a window is the engine's)"
                )
        prompt = None if prompt is None else [prompt]
        (row,) = rows = prepare_rows(self.model, prompt, 1, params.bos)
        params = resolved(self.model, replace(params, window=self.window))
        check_request(self.model, rows, params)
        total = len(row.ids) + params.max_new_tokens
        if self.window is None and total > self.max_tokens:
            raise UserError(
                f"a request of {len(row.ids)} given and {params.max_new_tokens} new tokens "
                f"does not fit into max_tokens = {self.max_tokens}; ask for less, or give the "
                "engine more, or a window"
            )
        if has_one_block(self.model) and total > self.model.config.seq_len:
            raise UserError(
                f"a request of {total} tokens in all goes beyond the one block of this model, "
                f"which has {self.model.config.seq_len}; generate slides its block over such texts"
            )
        seed = fresh_seed() if params.seed is None else params.seed
        streams = row_streams(seeded(seed), [row.ids], self.model.config.block_size)
        eos_id = eos_of(self.model, params)
        begins = row.ids[:1] == [given_bos(self.model)]
        before = [self.model.config.mask_id] if self._causal and not begins else []
        return _Request(self._next_id, row, params, eos_id, streams, before)

    def cancel(self, id: int) -> bool:
        """End a request; return whether it was still there. The next step returns what it wrote."""
        for number, request in enumerate(self._rows):
            if request.id == id:
                self._cancelled.append(request)
                self._leave(number)
                return True
        for request in self._waiting:
            if request.id == id:
                self._cancelled.append(request)
                self._waiting.remove(request)
                return True
        return False

    def run(self) -> Iterator[Event]:
        """Step until nothing is left, and yield what happens; requests may be submitted and
        cancelled meanwhile."""
        while self._rows or self._waiting or self._cancelled:
            yield from self.step()

    @torch.no_grad()
    def step(self) -> list[Event]:
        """One pass over all requests that have a row; what it decided."""
        while self._waiting and len(self._rows) < self.max_rows:
            self._cache.open_row()
            self._rows.append(self._waiting.popleft())
        decided = self._pass() if self._rows else []
        events: list[Event] = [self._finished(r, "cancelled") for r in self._cancelled]
        self._cancelled.clear()
        events += decided
        for number in reversed(range(len(self._rows))):
            request = self._rows[number]
            if request.state is not None and request.block_is_done():
                reason = request.close_block()
                events.append(request.block_done())
                if reason is not None:
                    events.append(self._finished(request, reason))
                    self._leave(number)
        return events

    def _pass(self) -> list[Event]:
        """Runs the network over every row's unread tokens and the block that follows them, and
        takes the decisions of those blocks."""
        size = self.model.config.block_size
        flat: list[int] = []
        tokens, clean, sigmas, firsts = [], [], [], []
        for request in self._rows:
            begin, unread = len(flat), request.unread(size)
            flat += unread
            clean.append(len(unread))
            # The token before the next one gives it; a block that is denoised is read itself.
            firsts.append(len(flat) - self._causal)
            if request.num_read + len(unread) == request.whole_blocks(size):
                if request.state is None:
                    request.open_block(self._context(request))
                flat += [] if self._causal else request.block
            tokens.append(len(flat) - begin)
            sigmas.append(None if request.state is None else request.state.sigma_R())
        wanted = [
            (request, first, request.state.wanted_RS()[0].nonzero().flatten())
            for request, first in zip(self._rows, firsts, strict=True)
            if request.state is not None
        ]
        wanted_M = torch.cat([
            torch.zeros(0, dtype=torch.long), *(first + slot_M for _, first, slot_M in wanted)
        ])  # fmt: skip
        device = self.model.device
        hidden_MD = self.model.decode_ragged(
            torch.tensor(flat, device=device),
            torch.tensor(tokens),
            torch.tensor(clean),
            self._cache,
            self.window,
            _times(sigmas, device),
            wanted_M.to(device),
        )
        logits_MV = self.model.head(hidden_MD)
        # From here on the pass has happened; what fails before update nothing.
        self._cache.commit(torch.tensor(clean))
        for request, count in zip(self._rows, clean, strict=True):
            request.num_read += count
            request.nfe += 1
        parts = logits_MV.split([len(slot_M) for *_, slot_M in wanted])
        return [
            self._decide(request, slot_M, logits_MV)
            for (request, _, slot_M), logits_MV in zip(wanted, parts, strict=True)
        ]

    def _decide(self, request: _Request, slot_M: torch.Tensor, logits_MV: torch.Tensor) -> Event:
        """Takes a request's decisions of this pass."""
        assert request.state is not None
        ids_M = torch.tensor([request.block[slot] for slot in slot_M.tolist()])
        place_M = (torch.zeros_like(slot_M), slot_M)
        update = request.state.step(place_M, ids_M.to(logits_MV.device), logits_MV)
        if any(map(math.isnan, update.confidences.tolist())):
            raise UserError(NOT_FINITE)
        for slot, token in zip(update.slots.tolist(), update.ids.tolist(), strict=True):
            request.block[slot] = token
        request.step += 1
        return TokensRevealed(
            request.step - 1,
            torch.full_like(update.slots, request.id),
            request.start + update.slots,
            update.ids,
            update.confidences,
        )

    def _context(self, request: _Request) -> SamplingContext:
        return SamplingContext(
            self.model.config, self.model.device, request.params, request.streams
        )

    def _leave(self, number: int) -> None:
        """Gives a row back; as in the cache, the last one takes its place."""
        self._cache.close_row(number)
        self._rows[number] = self._rows[-1]
        self._rows.pop()

    def _finished(self, request: _Request, reason: Reason) -> Finished:
        return finished(
            self.model,
            request.id,
            request.ids,
            request.prompt_tokens,
            request.prompt_text,
            reason,
            request.nfe,
        )


def _times(sigmas: list[torch.Tensor | None], device: torch.device) -> torch.Tensor | None:
    """What the network reads as the time of every row's block; None if it reads none."""
    if all(sigma is None for sigma in sigmas):
        return None
    zero = torch.zeros(1, device=device)  # a row whose prompt is still being read
    return torch.cat([zero if sigma is None else sigma for sigma in sigmas])
