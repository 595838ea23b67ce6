"""The clean past of a batch, as the block loop sees it: cached, or computed anew each time."""

from __future__ import annotations

import torch

from blockdiffusion.denoiser import Denoiser

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

    def prefill(self, ids_RT: torch.Tensor, lengths_R: torch.Tensor) -> torch.Tensor:
        """Commits the first `lengths_R` tokens (whole blocks) of every row; returns the passes
        each row took part in."""
        size = self.model.config.block_size
        step = max(size, PREFILL_TOKENS // size * size)
        passes_R = torch.zeros_like(lengths_R)
        for first in range(0, int(lengths_R.max()), step):
            part = ids_RT[:, first : min(first + step, int(lengths_R.max()))]
            todo_R = (lengths_R - first).clamp(0, part.shape[1])
            # Rows without tokens left commit nothing: what the pass writes lies beyond their end.
            self.model.decode(part, part.shape[1], self.cache, self.window)
            self.cache.commit(todo_R)
            passes_R += todo_R > 0
        return passes_R

    def denoise(self, noisy_RS: torch.Tensor, sigma_R: torch.Tensor | None = None) -> torch.Tensor:
        """Hidden states (R, S, D) of the block that follows the past; `sigma_R` is its time, for
        networks that read one."""
        if self.pending_RS is None:
            return self.model.decode(noisy_RS, 0, self.cache, self.window, sigma_R)
        size = noisy_RS.shape[1]
        both = torch.cat([self.pending_RS, noisy_RS], dim=1)
        hidden = self.model.decode(both, size, self.cache, self.window, sigma_R)
        self.cache.commit(size)
        self.pending_RS = None
        return hidden[:, size:]

    def commit(self, clean_RS: torch.Tensor) -> None:
        """Adds a finished block to the past (with the next pass)."""
        self.pending_RS = clean_RS

    def keep(self, rows: torch.Tensor) -> None:
        """Drops all rows but `rows`."""
        self.cache.keep(rows)
        if self.pending_RS is not None:
            self.pending_RS = self.pending_RS[rows.to(self.pending_RS.device)]


class RecomputedContext:
    """The past is read again in every pass: slow, and the reference for the cache."""

    def __init__(self, model: Denoiser, rows: int, longest: int, window: int | None):
        self.model, self.window = model, window
        self.past_RT = torch.zeros(rows, longest, dtype=torch.long, device=model.device)
        self.lengths_R = torch.zeros(rows, dtype=torch.long)

    def prefill(self, ids_RT: torch.Tensor, lengths_R: torch.Tensor) -> torch.Tensor:
        self.past_RT[:, : ids_RT.shape[1]] = ids_RT
        self.lengths_R = lengths_R
        return torch.zeros_like(lengths_R)

    def denoise(self, noisy_RS: torch.Tensor, sigma_R: torch.Tensor | None = None) -> torch.Tensor:
        rows, size = noisy_RS.shape
        total = int(self.lengths_R.max()) + size
        ids_RT = self.past_RT[:, :total].clone()
        slots_RS = (self.lengths_R[:, None] + torch.arange(size)).to(ids_RT.device)
        ids_RT.scatter_(1, slots_RS, noisy_RS)
        cache = self.model.make_cache(rows, total)
        hidden = self.model.decode(ids_RT, self.lengths_R, cache, self.window, sigma_R)
        return hidden.gather(1, slots_RS[..., None].expand(-1, -1, hidden.shape[-1]))

    def commit(self, clean_RS: torch.Tensor) -> None:
        size = clean_RS.shape[1]
        slots_RS = (self.lengths_R[:, None] + torch.arange(size)).to(clean_RS.device)
        self.past_RT.scatter_(1, slots_RS, clean_RS)
        self.lengths_R = self.lengths_R + size

    def keep(self, rows: torch.Tensor) -> None:
        self.past_RT = self.past_RT[rows.to(self.past_RT.device)]
        self.lengths_R = self.lengths_R[rows]
