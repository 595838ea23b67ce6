"""The clean past of a batch, as the samplers see it: cached, or computed anew each time.

Two of each: for the block loop, and (`...Past`) for the autoregressive baseline.
"""

from __future__ import annotations

from typing import Any

import torch

from blockdiffusion.diffusion.denoiser import Denoiser, NextTokenModel

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


# --- the autoregressive baseline ----------------------------------------------------------------


class CachedPast:
    """Keys and values of all tokens that were read are kept."""

    def __init__(self, model: NextTokenModel, rows: int, longest: int, window: int | None):
        self.model, self.window = model, window
        # A token's keys may take the place of those that have just left its window.
        self.cache = model.make_cache(rows, longest if window is None else min(longest, window))

    def read_on(self, ids_RT: torch.Tensor, counts_R: torch.Tensor) -> torch.Tensor:
        """Reads the first `counts_R` tokens of every row, before any other; returns the passes each
        row took part in."""
        passes_R = torch.zeros_like(counts_R)
        longest = int(counts_R.max())
        for first in range(0, longest, PREFILL_TOKENS):
            part_RT = ids_RT[:, first : min(first + PREFILL_TOKENS, longest)]
            todo_R = (counts_R - first).clamp(0, part_RT.shape[1])
            # Rows without tokens left commit nothing: what the pass writes lies beyond their end.
            self.model.decode_causal(part_RT, self.cache, self.window)
            self.cache.commit(todo_R)
            passes_R += todo_R > 0
        return passes_R

    def read(self, ids_R: torch.Tensor) -> torch.Tensor:
        """Reads one more token of every row; its hidden states (R, D)."""
        hidden_R1D = self.model.decode_causal(ids_R[:, None], self.cache, self.window)
        self.cache.commit(1)
        return hidden_R1D[:, 0]

    def keep(self, rows: torch.Tensor) -> None:
        """Drops all rows but `rows`."""
        self.cache.keep(rows)


class RecomputedPast(_Reread):
    """All tokens are read again in every pass: slow, and the reference for the cache."""

    def read(self, ids_R: torch.Tensor) -> torch.Tensor:
        row_R = torch.arange(len(ids_R))
        self.past_RT[row_R, self.lengths_R] = ids_R
        self.lengths_R = self.lengths_R + 1
        total = int(self.lengths_R.max())
        cache = self.model.make_cache(len(ids_R), total)
        hidden_RTD = self.model.decode_causal(self.past_RT[:, :total], cache, self.window)
        return hidden_RTD[row_R, self.lengths_R - 1]
