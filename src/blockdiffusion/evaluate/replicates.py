"""Estimates per row, group of rows by group: computed exactly, or drawn again and again.

A group is one or a few passes of the network. Several processes deal the groups out, and a journal
keeps those that are finished.
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
MAX_SAMPLES = 4096  # replicates after which a target of the noise error is given up
TRUSTED = 30  # degrees of freedom from which a noise error may end the drawing
Progress = Callable[[int, int], None]


@dataclass
class Found:
    """Estimates per row and replicate (B, R), in nats; `orders` has one such for every K.

    Rows of one group share their draws, groups are independent: the noise of the whole is the sum
    of the groups'.
    """

    nelbo_BR: torch.Tensor
    groups: list[slice]
    copies: int
    exact_B: torch.Tensor | None = None
    orders: dict[int, torch.Tensor] = field(default_factory=dict)

    def noise_error(self, num_tokens: int, orders: int | None = None) -> float | None:
        """Standard error per token of the mean over replicates; None from a single one."""
        value_BR = self.nelbo_BR if orders is None else self.orders[orders]
        replicates = value_BR.shape[1]
        if replicates < 2:
            return None
        variance = sum(float(value_BR[rows].sum(0).var()) for rows in self.groups)
        return math.sqrt(variance / replicates) / num_tokens

    @property
    def degrees_of_freedom(self) -> int:
        """Of the noise error: how far it can be trusted."""
        return len(self.groups) * (self.nelbo_BR.shape[1] - 1)

    def extended(self, more: Found) -> Found:
        """With further replicates of the same rows."""
        orders = {k: torch.cat([v, more.orders[k]], dim=1) for k, v in self.orders.items()}
        nelbo_BR = torch.cat([self.nelbo_BR, more.nelbo_BR], dim=1)
        return Found(nelbo_BR, self.groups, self.copies + more.copies, orders=orders)


class Advance:
    """Counts units of work for a progress that is called with (done, total)."""

    def __init__(self, progress: Callable[..., None] | None, total: int):
        self.progress, self.total, self.done = progress, total, 0

    def __call__(self, finished: int, *stage: str) -> None:
        self.done += finished
        if self.progress is not None:
            self.progress(*stage, self.done, max(self.done, self.total))


@dataclass(frozen=True)
class Rows:
    """What is to be scored: ids (B, L), which of them count, and which are no padding."""

    model: Any
    clean_BL: torch.Tensor
    free_BL: torch.Tensor
    valid_BL: torch.Tensor
    processes: ProcessGroup
    journal: Journal

    def groups(self, streams: int) -> list[slice]:
        """The rows, so many at a time as one pass over so many streams may have."""
        num_rows, length = self.clean_BL.shape
        return row_groups(num_rows, length * streams, PASS_TOKENS)

    def by_group(
        self,
        groups: Sequence[slice],
        name: Callable[[slice], str],
        estimate: Callable[..., Sequence[torch.Tensor]],
        pass_over: Callable[[torch.Tensor, torch.Tensor], None],
    ) -> list[torch.Tensor]:
        """What `estimate` makes of each group's (clean, free, valid or None), over all rows.

        Args:
            name: of a group, in the journal.
            estimate: gives float64 tensors, their first dimension the group's rows.
            pass_over: called with (clean, free) instead, for a group of another process or one that
                was finished before a kill.
        """
        own = {}
        for index, rows in enumerate(groups):
            tensors = (self.clean_BL[rows], self.free_BL[rows], self.valid_BL[rows])
            clean, free, valid = (tensor.to(self.model.device) for tensor in tensors)
            is_own, key = self.processes.is_mine(index), name(rows)
            found = self.journal.get(key) if is_own else None
            if is_own and found is None:
                own[index] = estimate(clean, free, None if bool(valid.all()) else valid)
                self.journal.put(key, [tensor.tolist() for tensor in own[index]])
                continue
            pass_over(clean, free)
            if is_own:
                own[index] = [torch.tensor(values, dtype=torch.float64) for values in found or ()]
        return [torch.cat(parts) for parts in zip(*self.processes.collect(own), strict=True)]


@torch.no_grad()
def next_token_nll(rows: Rows, progress: Progress | None) -> Found:
    """The exact negative log-likelihood of an autoregressive model."""
    groups = rows.groups(1)
    advance = Advance(progress, len(groups))

    def nll(*tensors) -> list[torch.Tensor]:
        found_BL = causal_nll(rows.model, *tensors).double()
        advance(1)
        return [found_BL.sum(1).cpu()]

    (nll_B,) = rows.by_group(groups, str, nll, lambda *_: advance(1))
    return Found(nll_B[:, None], groups, copies=1, exact_B=nll_B)


def enumerated(rows: Rows, progress: Progress | None) -> Found:
    """The bound (one replicate without noise) and the exact negative log-likelihood."""
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
    """Draws any number of independent replicates of what `estimator`, or orders, give for rows."""

    rows: Rows
    estimator: Estimator | None
    """None: the K-order bound."""
    orders: int
    generator: torch.Generator

    @property
    def copies(self) -> int:
        """Noisy copies of a row that one replicate evaluates."""
        if self.estimator is not None:
            return self.estimator.num_noisy
        return self.orders * self.rows.model.config.block_size

    @property
    def powers(self) -> list[int]:
        """The numbers of orders that have a bound: 1, 2, 4, ... and `orders` itself."""
        if self.estimator is not None:
            return []
        return sorted({2**i for i in range(self.orders.bit_length())} | {self.orders})

    @torch.no_grad()
    def draw(self, samples: int, advance: Advance) -> Found:
        """`samples` replicates; `advance` is told how many noisy copies of rows are done."""
        groups = self.rows.groups(min(samples * self.copies, COPIES) + 1)
        nelbo_BR, *tighter = self.rows.by_group(
            groups,
            lambda rows: f"{rows} {samples} {_digest(self.generator)}",
            lambda *tensors: self._estimates(samples, advance, *tensors),
            lambda clean_BL, free_BL: self._pass_over(samples, advance, clean_BL, free_BL),
        )
        bounds = dict(zip(self.powers, tighter, strict=True))
        return Found(nelbo_BR, groups, samples * self.copies, orders=bounds)

    def _estimates(
        self, samples: int, advance: Advance, clean_BL, free_BL, valid_BL
    ) -> list[torch.Tensor]:
        """The NELBO (B, samples) of a group of rows, and the bounds of 1, 2, 4, ... orders."""

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
        """Draws the noise of a group of rows, so that the next one gets its own."""
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
        """The k-order bound (B, samples): the mean over the whole groups of k of a replicate."""
        usable = self.orders // k * k
        nll_BXK = nll_BRK.unflatten(1, (-1, self.orders))[:, :, :usable].flatten(1, 2)
        return order_bound(nll_BXK, k).unflatten(1, (-1, usable // k)).mean(-1)

    def _masked(self, samples: int, passed, clean_BL, free_BL, valid_BL) -> torch.Tensor:
        """NELBO estimates (B, samples) of a group of rows."""
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
    """`mc_samples` replicates, or as many times that as the target of the noise error asks for."""
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
        if made >= MAX_SAMPLES or (error <= target and found.degrees_of_freedom >= TRUSTED):
            break
        still = samples * -(-(MAX_SAMPLES - made) // samples)  # whole rounds, at most
        advance.total = int(advance.done * min(max(2, (error / target) ** 2), 1 + still / made))
        found = found.extended(replicates.draw(samples, advance))
    return found


def _digest(generator: torch.Generator) -> str:
    """Of what will be drawn next."""
    return hashlib.sha256(generator.get_state().numpy().tobytes()).hexdigest()[:16]
