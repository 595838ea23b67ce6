"""The variance of the loss and of its gradient over the draws of the masks.

All numbers are for one batch with its data fixed and dropout off, from R independent replicates of
the masks: sample variances with R - 1 in the denominator, which are unbiased. The gradient is that
of the batch's loss in nats per token; its variance is the trace of the covariance matrix, the sum
over all parameters.

Shape suffixes: B rows, N noisy copies, L tokens, K blocks, S tokens of a block.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch

from blockdiffusion.diffusion.denoiser import row_groups
from blockdiffusion.diffusion.estimators import Corrupted, Estimator
from blockdiffusion.diffusion.objectives import diffusion_of
from blockdiffusion.errors import UserError
from blockdiffusion.runtime.seeding import seeded

PASS_TOKENS = 8192  # tokens of all streams of a pass with its gradient, which bounds memory


@dataclass(frozen=True, kw_only=True)
class Moments:
    """Mean and variance over the masks of one batch, or averages of these over several batches.

    Attributes:
        loss: mean of the batch's loss in nats per token, with the prior's part of a bound.
        loss_variance: variance of that loss over the draws.
        block_variance: the variance in the paper's tables 2 and 8: over all blocks of the batch, of
            a block's mean loss per free token, with noise and data together. None if the batch has
            fewer than two blocks with free tokens.
        gradient_variance: per parameter, the trace of the covariance of its gradient; empty without
            gradients.
        gradient_square: per parameter, the squared norm of the expected gradient, unbiased (so it
            can be negative).
        losses: the loss of every replicate.
    """

    loss: float
    loss_variance: float
    block_variance: float | None
    gradient_variance: dict[str, float]
    gradient_square: dict[str, float]
    losses: tuple[float, ...]

    @property
    def signal_to_noise(self) -> float | None:
        """Squared norm of the expected gradient over the trace of its covariance; None without
        gradients or without variance."""
        trace = math.fsum(self.gradient_variance.values())
        return math.fsum(self.gradient_square.values()) / trace if trace > 0 else None


def batch_moments(
    model: Any,
    clean_BL: torch.Tensor,
    free_BL: torch.Tensor,
    valid_BL: torch.Tensor | None,
    estimator: Estimator,
    replicates: int,
    generator: torch.Generator,
    *,
    gradients: bool = False,
) -> Moments:
    """Return the moments of the loss of one batch from `replicates` draws of the masks.

    Every replicate has its own stream of random numbers, seeded from `generator`. So two estimators
    with generators of the same seed get, replicate by replicate, the same uniform numbers if their
    draws have the same shapes: common random numbers.

    Args:
        model: evaluated without dropout, and left as it was, with its gradients.
        clean_BL, free_BL, valid_BL: as in `exact.exact_blocks`, on the model's device.

    Raises:
        UserError: fewer than two replicates, no free token, or an estimator that the network does
            not allow.
    """
    if replicates < 2:
        raise UserError(f"replicates is {replicates}; a variance needs at least 2")
    if not free_BL.any():
        raise UserError("there is nothing to score: every token is given or padding")
    size = model.config.block_size
    diffusion = diffusion_of(model.config)
    estimator = diffusion.fitted(estimator)
    parameters = (
        {n: p for n, p in model.backbone.named_parameters() if p.requires_grad} if gradients else {}
    )
    spread = _GradientSpread()
    losses, block_variances = [], []
    training = model.training
    model.eval()
    try:
        for _ in range(replicates):
            seed = int(torch.randint(2**63 - 1, (), generator=generator))
            drawn = estimator(clean_BL, free_BL, size, model.config.mask_id, seeded(seed))
            term_BL, gradient = _loss_terms(model, drawn, clean_BL, free_BL, valid_BL, parameters)
            spread.add(gradient)
            losses.append(float(term_BL.sum() / free_BL.sum().cpu()) + diffusion.prior_nats)
            block_variances.append(_block_variance(term_BL, free_BL.cpu(), size))
    finally:
        model.train(training)
    away = torch.tensor(losses, dtype=torch.float64) - losses[0]  # 0 to the digit without noise
    return Moments(
        loss=losses[0] + float(away.mean()),
        loss_variance=float(away.var()),
        block_variance=_mean_or_none(block_variances),
        gradient_variance=spread.variance(),
        gradient_square=spread.square(),
        losses=tuple(losses),
    )


def average(moments: list[Moments]) -> Moments:
    """Return the mean of the moments of several batches, with the `losses` of all."""
    count = len(moments)

    def mean(values: list[dict[str, float]]) -> dict[str, float]:
        return {name: math.fsum(v[name] for v in values) / count for name in values[0]}

    return Moments(
        loss=math.fsum(m.loss for m in moments) / count,
        loss_variance=math.fsum(m.loss_variance for m in moments) / count,
        block_variance=_mean_or_none([m.block_variance for m in moments]),
        gradient_variance=mean([m.gradient_variance for m in moments]),
        gradient_square=mean([m.gradient_square for m in moments]),
        losses=tuple(loss for m in moments for loss in m.losses),
    )


def _loss_terms(
    model: Any,
    drawn: Corrupted,
    clean_BL: torch.Tensor,
    free_BL: torch.Tensor,
    valid_BL: torch.Tensor | None,
    parameters: dict[str, torch.Tensor],
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """weight * term of every token, averaged over the copies, (B, L) in nats, float64 on the CPU;
    and the gradient of its sum divided by the number of free tokens."""
    batch, copies, length = drawn.noisy_BNL.shape
    scale = 1 / (int(free_BL.sum()) * copies)
    terms: list[torch.Tensor] = []
    gradient: dict[str, torch.Tensor] = {}
    for rows in row_groups(batch, (copies + 1) * length, PASS_TOKENS):
        part = drawn.rows(rows.start, rows.stop)
        valid = None if valid_BL is None else valid_BL[rows]
        with torch.set_grad_enabled(bool(parameters)):
            term_BNL = diffusion_of(model.config).terms(model, part, clean_BL[rows], valid)
            term_BNL = term_BNL * part.weight_BNL
        terms.append(term_BNL.detach().cpu().double().mean(1))
        if parameters:
            of_part = torch.autograd.grad(
                term_BNL.sum() * scale, list(parameters.values()), allow_unused=True
            )
            for name, values in zip(parameters, of_part, strict=True):
                if values is not None:
                    gradient[name] = gradient[name] + values if name in gradient else values
    zeros = {n: torch.zeros_like(p) for n, p in parameters.items() if n not in gradient}
    return torch.cat(terms), gradient | zeros


def _block_variance(term_BL: torch.Tensor, free_BL: torch.Tensor, size: int) -> float | None:
    """Variance over the blocks of their mean loss per free token."""
    free_BK = free_BL.unflatten(1, (-1, size)).sum(-1)
    total_BK = term_BL.unflatten(1, (-1, size)).sum(-1)
    scored = free_BK > 0
    return float((total_BK[scored] / free_BK[scored]).var()) if scored.sum() > 1 else None


def _mean_or_none(values: list[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return math.fsum(known) / len(known) if known else None


class _GradientSpread:
    """Mean of gradients and summed squared distance from it, per parameter, by Welford's update:
    no difference of two large sums, and exactly 0 for equal gradients."""

    def __init__(self) -> None:
        self.count = 0
        self.mean: dict[str, torch.Tensor] = {}
        self.distance: dict[str, float] = {}

    def add(self, gradient: dict[str, torch.Tensor]) -> None:
        self.count += 1
        for name, values in gradient.items():
            values = values.to(torch.promote_types(values.dtype, torch.float32))
            if name not in self.mean:
                self.mean[name] = torch.zeros_like(values)
                self.distance[name] = 0.0
            before = values - self.mean[name]
            self.mean[name] += before / self.count
            self.distance[name] += float((before * (values - self.mean[name])).sum())

    def variance(self) -> dict[str, float]:
        """Return the trace of the sample covariance."""
        return {name: max(0.0, d) / (self.count - 1) for name, d in self.distance.items()}

    def square(self) -> dict[str, float]:
        """Return |mean|^2 less its variance: unbiased for the squared norm of the expectation."""
        variance = self.variance()
        return {
            name: float(mean.square().sum()) - variance[name] / self.count
            for name, mean in self.mean.items()
        }
