"""The clean past of a batch, as the block loop sees it: cached, or computed anew each time; and the
same of autoregressive networks."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from blockdiffusion.diffusion.denoiser import Denoiser, find_bos_id, is_autoregressive

PREFILL_TOKENS = 512  # prompt tokens of one pass: bounds the memory of its attention mask


class CachedContext:
    """Keys and values of committed blocks are kept; a block is committed in the first pass of the
    next one."""

    def __init__(self, model: Denoiser, rows: int, longest: int, window: int | None):
        size = model.config.block_size
        capacity = longest if window is None else min(longest, window + size)
        self.model, self.window = model, window
        self.cache = model.make_cache(rows, capacity)
        self.pending_RS: torch.Tensor | None = None

    def read_on(self, ids_RT: torch.Tensor, counts_R: torch.Tensor) -> torch.Tensor:
        """Commits the first `counts_R` tokens (whole blocks) of `ids_RT`, which follow every row's
        past; returns the passes each row took part in."""
        assert self.pending_RS is None
        passes_R = torch.zeros_like(counts_R)
        size = self.model.config.block_size
        step = max(size, PREFILL_TOKENS // size * size)
        nothing = torch.zeros(0, dtype=torch.long, device=ids_RT.device)
        for first in range(0, int(counts_R.max()), step):
            todo_R = (counts_R - first).clamp(0, step)
            ids_P = torch.cat([
                ids[first : first + count]
                for ids, count in zip(ids_RT, todo_R.tolist(), strict=True)
            ])  # fmt: skip
            self.model.decode_ragged(
                ids_P, todo_R, todo_R, self.cache, self.window, wanted_M=nothing
            )
            self.cache.commit(todo_R)
            passes_R += todo_R > 0
        return passes_R

    def denoise(
        self,
        noisy_RS: torch.Tensor,
        wanted: tuple[torch.Tensor, torch.Tensor],
        sigma_R: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Hidden states (M, D) at the rows and slots `wanted` of the block that follows the past;
        `sigma_R` is its time, for networks that read one."""
        if self.pending_RS is None:
            return self.model.decode(noisy_RS, 0, self.cache, self.window, sigma_R, wanted)
        size = noisy_RS.shape[1]
        both = torch.cat([self.pending_RS, noisy_RS], dim=1)
        wanted = (wanted[0], size + wanted[1])
        hidden = self.model.decode(both, size, self.cache, self.window, sigma_R, wanted)
        self.cache.commit(size)
        self.pending_RS = None
        return hidden

    def commit(self, clean_RS: torch.Tensor) -> None:
        """Adds a finished block to the past (with the next pass)."""
        self.pending_RS = clean_RS

    def keep(self, rows: torch.Tensor) -> None:
        """Drops all rows but `rows`."""
        self.cache.keep(rows)
        if self.pending_RS is not None:
            self.pending_RS = self.pending_RS[rows.to(self.pending_RS.device)]


class _Reread:
    """A past of which only the tokens are kept."""

    def __init__(self, model: Any, rows: int, longest: int, window: int | None):
        self.model, self.window = model, window
        self.past_RT = torch.zeros(rows, longest, dtype=torch.long, device=model.device)
        self.lengths_R = torch.zeros(rows, dtype=torch.long)

    def read_on(self, ids_RT: torch.Tensor, counts_R: torch.Tensor) -> torch.Tensor:
        for row, (length, count) in enumerate(
            zip(self.lengths_R.tolist(), counts_R.tolist(), strict=True)
        ):
            self.past_RT[row, length : length + count] = ids_RT[row, :count]
        self.lengths_R = self.lengths_R + counts_R
        return torch.zeros_like(counts_R)

    def keep(self, rows: torch.Tensor) -> None:
        self.past_RT = self.past_RT[rows.to(self.past_RT.device)]
        self.lengths_R = self.lengths_R[rows]


class RecomputedContext(_Reread):
    """The past is read again in every pass: slow, and the reference for the cache."""

    def denoise(
        self,
        noisy_RS: torch.Tensor,
        wanted: tuple[torch.Tensor, torch.Tensor],
        sigma_R: torch.Tensor | None = None,
    ) -> torch.Tensor:
        rows, size = noisy_RS.shape
        total = int(self.lengths_R.max()) + size
        ids_RT = self.past_RT[:, :total].clone()
        slots_RS = (self.lengths_R[:, None] + torch.arange(size)).to(ids_RT.device)
        ids_RT.scatter_(1, slots_RS, noisy_RS)
        cache = self.model.make_cache(rows, total)
        hidden_RTD = self.model.decode(ids_RT, self.lengths_R, cache, self.window, sigma_R)
        return hidden_RTD[wanted[0], slots_RS[wanted]]

    def commit(self, clean_RS: torch.Tensor) -> None:
        self.read_on(clean_RS, torch.full_like(self.lengths_R, clean_RS.shape[1]))


# --- the autoregressive baseline: what gives a token is what stands before it ---------------------


class CausalContext:
    """Keys and values of all tokens that were read are kept; the last one is read by the pass that
    gives the next one. As in the likelihood (`denoiser.causal_nll`) the mask token stands before
    token 0 as a start symbol, where that is no given BOS; with a window a token sees the last
    `window` tokens, itself and the start symbol included."""

    def __init__(self, model: Any, rows: int, longest: int, window: int | None):
        self.model, self.window = model, window
        # A token's keys may take the place of those that have just left its window.
        capacity = longest + 1 if window is None else min(longest + 1, window)
        self.cache = model.make_cache(rows, capacity)
        self.last_R = torch.empty(0)

    def read_on(self, ids_RT: torch.Tensor, counts_R: torch.Tensor) -> torch.Tensor:
        """Reads the first `counts_R` tokens of every row, before any other, but for the last;
        returns the passes each row took part in."""
        inputs_RT, lengths_R = _after_start(self.model, ids_RT, counts_R)
        self.last_R = inputs_RT[torch.arange(len(inputs_RT)), lengths_R - 1]
        passes_R = torch.zeros_like(counts_R)
        longest = int(lengths_R.max()) - 1
        for first in range(0, longest, PREFILL_TOKENS):
            part_RT = inputs_RT[:, first : min(first + PREFILL_TOKENS, longest)]
            todo_R = (lengths_R - 1 - first).clamp(0, part_RT.shape[1])
            # Rows without tokens left commit nothing: what the pass writes lies beyond their end.
            self.model.decode_causal(part_RT, self.cache, self.window)
            self.cache.commit(todo_R)
            passes_R += todo_R > 0
        return passes_R

    def denoise(
        self,
        noisy_R1: torch.Tensor,
        wanted: tuple[torch.Tensor, torch.Tensor],
        sigma_R: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Hidden states (M, D) that give the next token of the rows `wanted`."""
        hidden_R1D = self.model.decode_causal(self.last_R[:, None], self.cache, self.window)
        self.cache.commit(1)
        return hidden_R1D[wanted[0], 0]

    def commit(self, clean_R1: torch.Tensor) -> None:
        """Adds a token to the past (with the next pass)."""
        self.last_R = clean_R1[:, 0]

    def keep(self, rows: torch.Tensor) -> None:
        """Drops all rows but `rows`."""
        self.cache.keep(rows)
        self.last_R = self.last_R[rows.to(self.last_R.device)]


class RecomputedCausalContext(_Reread):
    """All tokens are read again in every pass: slow, and the reference for the cache."""

    def __init__(self, model: Any, rows: int, longest: int, window: int | None):
        super().__init__(model, rows, longest + 1, window)

    def read_on(self, ids_RT: torch.Tensor, counts_R: torch.Tensor) -> torch.Tensor:
        return super().read_on(*_after_start(self.model, ids_RT, counts_R))

    def denoise(
        self,
        noisy_R1: torch.Tensor,
        wanted: tuple[torch.Tensor, torch.Tensor],
        sigma_R: torch.Tensor | None = None,
    ) -> torch.Tensor:
        rows, total = len(noisy_R1), int(self.lengths_R.max())
        cache = self.model.make_cache(rows, total)
        hidden_RTD = self.model.decode_causal(self.past_RT[:, :total], cache, self.window)
        return hidden_RTD[torch.arange(rows), self.lengths_R - 1][wanted[0]]

    def commit(self, clean_R1: torch.Tensor) -> None:
        super().read_on(clean_R1, torch.ones_like(self.lengths_R))


def given_bos(model: Any) -> int | None:
    """The BOS that takes the place of the start symbol, if a row begins with it."""
    return None if model.config.bos is False else find_bos_id(model)


def _after_start(
    model: Any, ids_RT: torch.Tensor, counts_R: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The first `counts_R` ids of every row after the start symbol, or as they are, where the row
    begins with a BOS that was given in training; and how many these are."""
    bos_id = given_bos(model)
    ids_RT = ids_RT[:, : int(counts_R.max())]
    started_RT = F.pad(ids_RT, (1, 0), value=model.config.mask_id)
    if bos_id is None or not ids_RT.shape[1]:
        return started_RT, counts_R + 1
    has_bos_R = (ids_RT[:, 0] == bos_id) & (counts_R > 0).to(ids_RT.device)
    given_RT = F.pad(ids_RT, (0, 1), value=model.config.mask_id)
    return torch.where(
        has_bos_R[:, None], given_RT, started_RT
    ), counts_R + 1 - has_bos_R.cpu().long()


Context = CachedContext | RecomputedContext | CausalContext | RecomputedCausalContext


def make_context(
    model: Any, rows: int, longest: int, window: int | None, use_cache: bool
) -> Context:
    """An empty past for rows of at most `longest` tokens."""
    if is_autoregressive(model):
        kind = CausalContext if use_cache else RecomputedCausalContext
    else:
        kind = CachedContext if use_cache else RecomputedContext
    return kind(model, rows, longest, window)
