"""Estimates for rows of text, by groups of rows: computed exactly, or from repeated draws.

A group takes one or a few passes of the network. Processes share the groups, and a journal keeps
those that are finished.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from blockdiffusion.diffusion.denoiser import causal_nll, row_groups
from blockdiffusion.diffusion.estimators import Corrupted, Estimator, all_copies
from blockdiffusion.diffusion.exact import exact_blocks, num_subsets
from blockdiffusion.diffusion.objectives import diffusion_of
from blockdiffusion.diffusion.orders import draw_orders, order_bound, order_nll
from blockdiffusion.evaluate.journal import Journal
from blockdiffusion.evaluate.options import LikelihoodOptions
from blockdiffusion.runtime.distributed import ProcessGroup

PASS_TOKENS = 16_384  # tokens of one pass over all streams: bounds memory
COPIES = 8  # noisy copies that share one clean stream
MAX_SAMPLES = 4096  # replicates, whatever the target of the noise error
TRUSTED = 30  # degrees of freedom that a noise error needs to end the drawing
Progress = Callable[[int, int], None]


@dataclass
class Found:
    """Estimates per row and replicate (B, R), in nats; `orders` has one such tensor for every K.

    Rows of one group share their draws, and groups are independent: their variances add up.
    """

    nelbo_BR: torch.Tensor
    groups: list[slice]
    copies: int
    exact_B: torch.Tensor | None = None
    orders: dict[int, torch.Tensor] = field(default_factory=dict)

    def noise_error(self, num_tokens: int, orders: int | None = None) -> float | None:
        """Return the standard error per token of the mean over replicates; None from one."""
        value_BR = self.nelbo_BR if orders is None else self.orders[orders]
        replicates = value_BR.shape[1]
        if replicates < 2:
            return None
        variance = sum(float(value_BR[rows].sum(0).var()) for rows in self.groups)
        return math.sqrt(variance / replicates) / num_tokens

    def extended(self, more: Found) -> Found:
        """Add further replicates of the same rows."""
        orders = {k: torch.cat([v, more.orders[k]], dim=1) for k, v in self.orders.items()}
        nelbo_BR = torch.cat([self.nelbo_BR, more.nelbo_BR], dim=1)
        return Found(nelbo_BR, self.groups, self.copies + more.copies, orders=orders)


class Advance:
    """Counts units of work and reports them to a progress, as (done, total)."""

    def __init__(self, progress: Callable[..., None] | None, total: int):
        self.progress, self.total, self.done = progress, total, 0

    def __call__(self, finished: int, *stage: str) -> None:
        self.done += finished
        if self.progress is not None:
            self.progress(*stage, self.done, max(self.done, self.total))


@dataclass(frozen=True)
class Rows:
    """Rows to score: ids (B, L), which of them count, and which are not padding."""

    model: Any
    clean_BL: torch.Tensor
    free_BL: torch.Tensor
    valid_BL: torch.Tensor
    processes: ProcessGroup
    journal: Journal

    def groups(self, streams: int) -> list[slice]:
        """Cut the rows into groups that one pass over so many streams may hold."""
        num_rows, length = self.clean_BL.shape
        return row_groups(num_rows, length * streams, PASS_TOKENS)

    def by_group(
        self,
        groups: Sequence[slice],
        name: Callable[[slice], str],
        estimate: Callable[..., Sequence[torch.Tensor]],
        pass_over: Callable[[torch.Tensor, torch.Tensor], None],
    ) -> list[torch.Tensor]:
        """Call `estimate` with each group's (clean, free, valid or None); join its results.

        Args:
            name: of a group, in the journal.
            estimate: returns float64 tensors; their first dimension is the group's rows.
            pass_over: called with (clean, free) instead, if the group belongs to another process
                or was finished before a kill.
        """
        own = {}
        for index, rows in enumerate(groups):
            tensors = (self.clean_BL[rows], self.free_BL[rows], self.valid_BL[rows])
            clean, free, valid = (tensor.to(self.model.device) for tensor in tensors)
            is_own, key = self.processes.is_mine(index), name(rows)
            kept = self.journal.get(key) if is_own else None
            if is_own and kept is None:
                own[index] = estimate(clean, free, None if bool(valid.all()) else valid)
                self.journal.put(key, [tensor.tolist() for tensor in own[index]])
                continue
            pass_over(clean, free)
            if kept is not None:
                own[index] = [torch.tensor(values, dtype=torch.float64) for values in kept]
        return [torch.cat(parts) for parts in zip(*self.processes.collect(own), strict=True)]


@torch.no_grad()
def next_token_nll(rows: Rows, progress: Progress | None) -> Found:
    """Compute the exact negative log-likelihood of an autoregressive model."""
    groups = rows.groups(1)
    advance = Advance(progress, len(groups))

    def nll(*tensors) -> list[torch.Tensor]:
        found_BL = causal_nll(rows.model, *tensors).double()
        advance(1)
        return [found_BL.sum(1).cpu()]

    (nll_B,) = rows.by_group(groups, str, nll, lambda *_: advance(1))
    return Found(nll_B[:, None], groups, copies=1, exact_B=nll_B)


def enumerated(rows: Rows, progress: Progress | None) -> Found:
    """Compute the bound (one replicate without noise) and the exact negative log-likelihood."""
    sets = num_subsets(rows.model.config.block_size)
    groups = rows.groups(min(sets, COPIES) + 1)
    advance = Advance(progress, sets * len(groups))

    def blocks(*tensors) -> list[torch.Tensor]:
        found = exact_blocks(rows.model, *tensors, progress=advance)
        return [found.nelbo_BK.sum(1).cpu(), found.nll_BK.sum(1).cpu()]

    nelbo_B, nll_B = rows.by_group(groups, str, blocks, lambda *_: advance(sets))
    return Found(nelbo_B[:, None], groups, sets, exact_B=nll_B)


# --- drawn ---------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Replicates:
    """Draws independent replicates of an estimator, or of the K-order bound if it is None."""

    rows: Rows
    estimator: Estimator | None
    orders: int
    generator: torch.Generator

    @property
    def copies(self) -> int:
        """The noisy copies of a row that one replicate evaluates."""
        if self.estimator is not None:
            return self.estimator.num_noisy
        return self.orders * self.rows.model.config.block_size

    @property
    def powers(self) -> list[int]:
        """The numbers of orders K that get a bound: 1, 2, 4, ... and `orders` itself."""
        if self.estimator is not None:
            return []
        return sorted({2**i for i in range(self.orders.bit_length())} | {self.orders})

    @torch.no_grad()
    def draw(self, samples: int, advance: Advance) -> Found:
        """Draw `samples` replicates; `advance` counts the noisy copies of rows."""
        groups = self.rows.groups(min(samples * self.copies, COPIES) + 1)
        nelbo_BR, *tighter = self.rows.by_group(
            groups,
            lambda rows: f"{rows} {samples} {_digest(self.generator)}",
            lambda *tensors: self._estimates(samples, advance, *tensors),
            lambda *tensors: self._pass_over(samples, advance, *tensors),
        )
        bounds = dict(zip(self.powers, tighter, strict=True))
        return Found(nelbo_BR, groups, samples * self.copies, orders=bounds)

    def _estimates(
        self, samples: int, advance: Advance, clean_BL, free_BL, valid_BL
    ) -> list[torch.Tensor]:
        """Return the NELBO (B, samples) of a group of rows, and the bound of each of `powers`."""

        def passed(copies: int) -> None:
            advance(copies * len(clean_BL))

        if self.estimator is not None:
            return [self._masked(samples, passed, clean_BL, free_BL, valid_BL)]
        nll_BRK = order_nll(
            self.rows.model,
            clean_BL,
            free_BL,
            samples * self.orders,
            self.generator,
            valid_BL,
            copies=COPIES,
            progress=passed,
        ).cpu()
        bounds = [self._tighter(nll_BRK, k) for k in self.powers]
        return [bounds[0], *bounds]

    def _pass_over(self, samples: int, advance: Advance, clean_BL, free_BL) -> None:
        """Draw the noise of a group and drop it, so that the next group gets its own."""
        config = self.rows.model.config
        if self.estimator is None:
            draw_orders(free_BL, config.block_size, samples * self.orders, self.generator)
        else:
            for _ in range(samples):
                self._mask(clean_BL, free_BL)
        advance(samples * self.copies * len(clean_BL))

    def _mask(self, clean_BL, free_BL) -> Corrupted:
        assert self.estimator is not None
        config = self.rows.model.config
        return self.estimator(clean_BL, free_BL, config.block_size, config.mask_id, self.generator)

    def _tighter(self, nll_BRK: torch.Tensor, k: int) -> torch.Tensor:
        """Return the k-order bound (B, samples): a replicate's mean over its whole groups of k."""
        usable = self.orders // k * k
        nll_BXK = nll_BRK.unflatten(1, (-1, self.orders))[:, :, :usable].flatten(1, 2)
        return order_bound(nll_BXK, k).unflatten(1, (-1, usable // k)).mean(-1)

    def _masked(self, samples: int, passed, clean_BL, free_BL, valid_BL) -> torch.Tensor:
        """Return NELBO estimates (B, samples) of a group of rows."""
        model, diffusion = self.rows.model, diffusion_of(self.rows.model.config)
        prior_B1 = diffusion.prior_nats * free_BL.sum(1, keepdim=True).double().cpu()
        together = max(1, COPIES // self.copies)
        estimates = []
        for first in range(0, samples, together):
            count = min(together, samples - first)
            every = all_copies([self._mask(clean_BL, free_BL) for _ in range(count)])
            term_BNL = diffusion.terms(model, every, clean_BL, valid_BL)
            total_BN = (term_BNL.double() * every.weight_BNL.double()).sum(-1).cpu()
            estimates.append(total_BN.unflatten(1, (count, -1)).mean(-1) + prior_B1)
            passed(every.noisy_BNL.shape[1])
        return torch.cat(estimates, dim=1)


def drawn(
    replicates: Replicates, options: LikelihoodOptions, num_tokens: int, progress: Progress | None
) -> Found:
    """Draw `mc_samples` replicates, or a multiple if the target of the noise error needs it."""
    target, samples = options.target_stderr, options.mc_samples
    if target is not None:
        samples = max(samples, 2)
    num_rows = len(replicates.rows.clean_BL)
    advance = Advance(progress, samples * replicates.copies * num_rows)
    orders = replicates.orders if replicates.estimator is None else None
    found = replicates.draw(samples, advance)
    while target is not None:
        error = found.noise_error(num_tokens, orders)
        assert error is not None  # two replicates at least
        made = found.nelbo_BR.shape[1]
        degrees_of_freedom = len(found.groups) * (made - 1)
        if made >= MAX_SAMPLES or (error <= target and degrees_of_freedom >= TRUSTED):
            break
        still = samples * -(-(MAX_SAMPLES - made) // samples)  # whole rounds, at most
        advance.total = int(advance.done * min(max(2, (error / target) ** 2), 1 + still / made))
        found = found.extended(replicates.draw(samples, advance))
    return found


def _digest(generator: torch.Generator) -> str:
    """Return a hash of the generator's state: the name of its next draws."""
    return hashlib.sha256(generator.get_state().numpy().tobytes()).hexdigest()[:16]
