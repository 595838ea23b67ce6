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
from dataclasses import dataclass, fields
from typing import Any, Literal

import torch

from blockdiffusion.diffusion.denoiser import Denoiser, is_autoregressive
from blockdiffusion.errors import UserError
from blockdiffusion.limits import check_limit
from blockdiffusion.runtime.seeding import fresh_seed, seeded
from blockdiffusion.sampling.logits import NOT_FINITE, Filters
from blockdiffusion.sampling.loop import SamplingOptions, check_request, check_room, check_window
from blockdiffusion.sampling.policies import PolicySettings
from blockdiffusion.sampling.processes import Course, Setting, as_process
from blockdiffusion.sampling.requests import given_prompt, prepare_prompts, sampling_options
from blockdiffusion.sampling.sliding import has_one_block
from blockdiffusion.sampling.streams import RowStreams, row_streams
from blockdiffusion.text import Given, whole_text

# What a request may choose beside its length, BOS and seed.
OPTIONS = (
    "eos",
    "policy",
    *(setting.name for setting in fields(PolicySettings)),
    *(filter.name for filter in fields(Filters)),
)
PREFILL_TOKENS = 512  # clean tokens that a request brings into one pass, at most

Reason = Literal["length", "eos", "cancelled"]


@dataclass(frozen=True)
class Revealed:
    """A pass decided, or changed, tokens of a request: position -> id and the denoiser's
    probability of it, before any filter."""

    id: int
    positions: list[int]
    ids: list[int]
    confidences: list[float]


@dataclass(frozen=True)
class BlockDone:
    """A block of a request is finished: its first position, and the ids that are kept of it."""

    id: int
    start: int
    ids: list[int]


@dataclass(frozen=True)
class Finished:
    """A request is finished.

    Attributes:
        ids: BOS and prompt, then what was written, up to and with an EOS.
        prompt_tokens: how many of them were given.
        text: the prompt as it was given, and what is new, without special tokens; None without a
            tokenizer.
        reason: "length", "eos" or "cancelled" (then only finished blocks are there).
        nfe: passes that the request took part in.
    """

    id: int
    ids: list[int]
    prompt_tokens: int
    text: str | None
    reason: Reason
    nfe: int

    @property
    def tokens_per_forward(self) -> float:
        """New tokens per pass."""
        return (len(self.ids) - self.prompt_tokens) / max(1, self.nfe)


EngineEvent = Revealed | BlockDone | Finished


class _Request:
    """Where a request stands. `ids` are the prompt and the finished blocks; `num_read` of them are
    in the cache. The block in work begins at `start`, and its first `given` tokens are in `ids`."""

    def __init__(
        self,
        id: int,
        ids: list[int],
        prompt_text: list[Given],
        options: SamplingOptions,
        streams: RowStreams,
    ):
        self.id, self.ids, self.prompt_text = id, ids, prompt_text
        self.options, self.streams = options, streams
        self.prompt_tokens = len(ids)
        self.limit = len(ids) + options.max_new_tokens
        self.num_read = self.nfe = self.start = self.given = 0
        self.course: Course | None = None
        self.block: list[int] = []

    def unread(self, size: int) -> list[int]:
        """Clean tokens for the next pass: whole blocks, as many as one pass takes."""
        most = max(size, PREFILL_TOKENS // size * size)
        stop = min(len(self.ids) // size * size, self.num_read + most)
        return self.ids[self.num_read : stop]

    def open_block(self, setting: Setting) -> None:
        """Begins the block that follows the whole blocks of `ids`, which are read or being read."""
        size = setting.config.block_size
        self.start = len(self.ids) // size * size
        self.given = len(self.ids) - self.start
        block = self.ids[self.start :] + [setting.config.mask_id] * (size - self.given)
        open_1S = torch.arange(size)[None] >= self.given
        self.course = as_process(self.options.policy).begin(open_1S, setting)
        filled_1S = self.course.fill(torch.tensor([block], device=setting.device))
        self.block = filled_1S[0].tolist()

    def block_is_done(self) -> bool:
        """Whether all is decided that will be kept: up to the limit, or to a sampled EOS."""
        assert self.course is not None
        undecided = self.course.undecided_RS[0].tolist()
        for slot in range(min(len(self.block), self.limit - self.start)):
            if undecided[slot]:
                return False
            if slot >= self.given and self.block[slot] == self.options.eos_id:
                return True
        return True

    def close_block(self) -> Reason | None:
        """Adds the block to `ids`, cut at an EOS or the limit; why the request ends, if it does."""
        new = self.block[self.given : self.limit - self.start]
        reason: Reason | None = None
        if self.options.eos_id in new:
            new = new[: new.index(self.options.eos_id) + 1]
            reason = "eos"
        self.ids += new
        self.course = None
        return reason or ("length" if len(self.ids) == self.limit else None)


class Engine:
    """Samples many requests together, each as if it were alone.

    >>> engine = Engine(model, max_rows=8)
    >>> first = engine.submit("Once upon a time", seed=1)
    >>> second = engine.submit("The", max_new_tokens=64, top_p=0.9, seed=2)
    >>> texts = {event.id: event.text for event in engine.run() if isinstance(event, Finished)}

    Args:
        model: a network that denoises blocks.
        max_rows: requests in a pass; more wait.
        max_tokens: prompt and new tokens of a request, at most, where there is no window. The
            cache for `max_rows` times as many (with a window, for the window) is allocated now.
        window: a token sees the last `window` tokens, its own block included; None = all. Then
            requests may be of any length, in constant memory.

    Raises:
        UserError: an autoregressive network, or a number out of range.
    """

    def __init__(
        self,
        model: Denoiser,
        *,
        max_rows: int = 8,
        max_tokens: int = 1024,
        window: int | None = None,
    ):
        if is_autoregressive(model):
            raise UserError(
                "the engine serves networks that denoise blocks, and this one predicts the next "
                "token; use generate"
            )
        for name, value in (("max_rows", max_rows), ("max_tokens", max_tokens)):
            check_limit(name, value)
        size = model.config.block_size
        check_limit("window", window)
        check_window(window, size)
        self.model, self.max_rows, self.window = model, max_rows, window
        self.max_tokens = max_tokens
        check_room(model, max_rows, max_tokens, window, "lower max_rows or max_tokens")
        held = -(-max_tokens // size) * size if window is None else window + size
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
        *,
        max_new_tokens: int = 128,
        bos: bool | None = None,
        seed: int | None = None,
        **options: Any,
    ) -> int:
        """Puts a request into the queue; returns its number.

        Args:
            prompt: a text or ids; None = from nothing.
            max_new_tokens, bos: as for `generate`.
            seed: of its draws; None = any.
            options: `eos`, `policy` and its settings, `temperature`, `top_k`, `top_p`,
                `top_p_rule`, as for `generate`.

        Raises:
            UserError: something is out of range, or the request does not fit into the engine.
        """
        for name in options:
            if name not in OPTIONS:
                raise UserError(
                    f"{name} is no option of a request; there are {', '.join(OPTIONS)} (a window "
                    "is the engine's)"
                )
        prompts = prepare_prompts(self.model, None if prompt is None else [prompt], 1, bos)
        sampling = sampling_options(
            self.model, max_new_tokens=max_new_tokens, window=self.window, **options
        )
        check_request(self.model, prompts, sampling)
        total = len(prompts[0]) + max_new_tokens
        if self.window is None and total > self.max_tokens:
            raise UserError(
                f"a request of {len(prompts[0])} given and {max_new_tokens} new tokens does not "
                f"fit into max_tokens = {self.max_tokens}; ask for less, or give the engine more, "
                "or a window"
            )
        if has_one_block(self.model) and total > self.model.config.seq_len:
            raise UserError(
                f"a request of {total} tokens in all goes beyond the one block of this model, "
                f"which has {self.model.config.seq_len}; generate slides its block over such texts"
            )
        generator = seeded(fresh_seed() if seed is None else seed)
        streams = row_streams(generator, prompts, self.model.config.block_size)
        text = given_prompt(prompt, len(prompts[0]))
        request = _Request(self._next_id, list(prompts[0]), text, sampling, streams)
        self._next_id += 1
        self._waiting.append(request)
        return request.id

    def cancel(self, id: int) -> bool:
        """Ends a request; whether it was still there. The next step tells what it had written."""
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

    def run(self) -> Iterator[EngineEvent]:
        """Steps until nothing is left, and tells what happens; requests may be submitted and
        cancelled meanwhile."""
        while self._rows or self._waiting or self._cancelled:
            yield from self.step()

    @torch.no_grad()
    def step(self) -> list[EngineEvent]:
        """One pass over all requests that have a row; what it decided."""
        while self._waiting and len(self._rows) < self.max_rows:
            self._cache.open_row()
            self._rows.append(self._waiting.popleft())
        decided = self._pass() if self._rows else []
        events: list[EngineEvent] = [self._finished(r, "cancelled") for r in self._cancelled]
        self._cancelled.clear()
        events += decided
        for number in reversed(range(len(self._rows))):
            request = self._rows[number]
            if request.course is not None and request.block_is_done():
                reason = request.close_block()
                events.append(BlockDone(request.id, request.start, request.ids[request.start :]))
                if reason is not None:
                    events.append(self._finished(request, reason))
                    self._leave(number)
        return events

    def _pass(self) -> list[EngineEvent]:
        """Runs the network over every row's unread tokens and the block that follows them, and
        takes the decisions of those blocks."""
        size = self.model.config.block_size
        flat: list[int] = []
        tokens, clean, sigmas, firsts = [], [], [], []
        for request in self._rows:
            unread = request.unread(size)
            flat += unread
            firsts.append(len(flat))
            all_read = request.num_read + len(unread) == len(request.ids) // size * size
            if all_read:
                if request.course is None:
                    request.open_block(self._setting(request))
                flat += request.block
            tokens.append(len(unread) + size * all_read)
            clean.append(len(unread))
            sigmas.append(None if request.course is None else request.course.sigma_R())
        wanted = [
            (request, first, request.course.wanted_RS()[0].nonzero().flatten())
            for request, first in zip(self._rows, firsts, strict=True)
            if request.course is not None
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
        # From here on the pass has happened; what fails before changes nothing.
        self._cache.commit(torch.tensor(clean))
        for request, count in zip(self._rows, clean, strict=True):
            request.num_read += count
            request.nfe += 1
        parts = logits_MV.split([len(slot_M) for *_, slot_M in wanted])
        return [
            self._decide(request, slot_M, logits_MV)
            for (request, _, slot_M), logits_MV in zip(wanted, parts, strict=True)
        ]

    def _decide(self, request: _Request, slot_M: torch.Tensor, logits_MV: torch.Tensor) -> Revealed:
        """Takes a request's decisions of this pass."""
        assert request.course is not None
        ids_M = torch.tensor([request.block[slot] for slot in slot_M.tolist()])
        place_M = (torch.zeros_like(slot_M), slot_M)
        changes = request.course.decide(place_M, ids_M.to(logits_MV.device), logits_MV)
        slots, ids = changes.slots.tolist(), changes.ids.tolist()
        confidences = changes.confidences.tolist()
        if any(map(math.isnan, confidences)):
            raise UserError(NOT_FINITE)
        for slot, token in zip(slots, ids, strict=True):
            request.block[slot] = token
        positions = [request.start + slot for slot in slots]
        return Revealed(request.id, positions, ids, confidences)

    def _setting(self, request: _Request) -> Setting:
        return Setting(
            self.model.config, self.model.device, request.options.filters, request.streams
        )

    def _leave(self, number: int) -> None:
        """Gives a row back; as in the cache, the last one takes its place."""
        self._cache.close_row(number)
        self._rows[number] = self._rows[-1]
        self._rows.pop()

    def _finished(self, request: _Request, reason: Reason) -> Finished:
        tokenizer = self.model.tokenizer
        return Finished(
            id=request.id,
            ids=request.ids,
            prompt_tokens=request.prompt_tokens,
            text=None
            if tokenizer is None
            else whole_text(tokenizer, request.ids, request.prompt_text),
            reason=reason,
            nfe=request.nfe,
        )


def _times(sigmas: list[torch.Tensor | None], device: torch.device) -> torch.Tensor | None:
    """What the network reads as the time of every row's block; None if it reads none."""
    if all(sigma is None for sigma in sigmas):
        return None
    zero = torch.zeros(1, device=device)  # a row whose prompt is still being read
    return torch.cat([zero if sigma is None else sigma for sigma in sigmas])
