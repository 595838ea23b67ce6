"""How much the loss and its gradient scatter when only the masks are drawn again.

All numbers are of one batch with its data fixed and dropout off, from R independent replicates of
the masks: sample variances with R - 1 in the denominator, so that their expectation is the true
value. The gradient is that of the batch's loss in nats per token; its variance is the trace of the
covariance matrix, the sum over all parameters.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import nn

from blockdiffusion.corruption import Corrupted, Estimator
from blockdiffusion.denoiser import masked_nll
from blockdiffusion.errors import UserError


@dataclass(frozen=True, kw_only=True)
class Moments:
    """Mean and variance over the masks, of one batch, or averaged over several.

    Attributes:
        loss: mean of the batch's loss, nats per token.
        loss_variance: variance of that loss from draw to draw.
        block_variance: what the paper's tables 2 and 8 print: the variance, over all blocks of the
            batch, of a block's mean loss per token: noise and data together.
        gradient_variance: per parameter, the trace of the covariance of its gradient; empty where
            gradients were not asked for.
        gradient_square: per parameter, the squared norm of the expected gradient, unbiased (so it
            can come out negative).
    """

    loss: float
    loss_variance: float
    block_variance: float
    gradient_variance: dict[str, float]
    gradient_square: dict[str, float]

    @property
    def signal_to_noise(self) -> float | None:
        """Squared norm of the expected gradient over the trace of its covariance."""
        trace = math.fsum(self.gradient_variance.values())
        return math.fsum(self.gradient_square.values()) / trace if trace > 0 else None


def batch_moments(
    model: nn.Module,
    clean_BL: torch.Tensor,
    free_BL: torch.Tensor,
    valid_BL: torch.Tensor | None,
    estimator: Estimator,
    replicates: int,
    generator: torch.Generator,
    *,
    gradients: bool = False,
) -> Moments:
    """Moments of the loss of one batch under `estimator`, from `replicates` draws of the masks.

    Two estimators given generators of the same seed see the same uniform numbers where their draws
    have the same shapes: common random numbers.

    Args:
        model: a `Denoiser`; put into eval mode (no dropout). Its gradients are cleared.
        clean_BL, free_BL, valid_BL: as in `exact.exact_blocks`, on the model's device.

    Raises:
        UserError: fewer than two replicates.
    """
    if replicates < 2:
        raise UserError(f"replicates is {replicates}; a variance needs at least 2")
    model.eval()
    size = model.config.block_size
    num_free = int(free_BL.sum())
    losses, block_variances = [], []
    sums = _GradientSums(model) if gradients else None
    for _ in range(replicates):
        drawn = estimator(clean_BL, free_BL, size, model.config.mask_id, generator)
        with torch.set_grad_enabled(gradients):
            term_BNL = weighted_nll(model, drawn, clean_BL, valid_BL)
            loss = term_BNL.sum() / (num_free * term_BNL.shape[1])
        if sums is not None:
            sums.add(loss)
        losses.append(float(loss.detach().double()))
        block_BK = term_BNL.detach().double().mean(1).unflatten(-1, (-1, size)).mean(-1)
        block_variances.append(float(block_BK.var()))
    values = torch.tensor(losses, dtype=torch.float64)
    return Moments(
        loss=float(values.mean()),
        loss_variance=float(values.var()),
        block_variance=sum(block_variances) / replicates,
        gradient_variance={} if sums is None else sums.variance(replicates),
        gradient_square={} if sums is None else sums.square(replicates),
    )


def weighted_nll(
    model: nn.Module, drawn: Corrupted, clean_BL: torch.Tensor, valid_BL: torch.Tensor | None
) -> torch.Tensor:
    """weight * nll of every token (B, N, L), in nats: what the training loss sums."""
    return masked_nll(model, drawn.noisy_BNL, clean_BL, valid_BL) * drawn.weight_BNL


class _GradientSums:
    """Sums of gradients and of their squares over replicates, per parameter."""

    def __init__(self, model: nn.Module):
        self.parameters = {n: p for n, p in model.named_parameters() if p.requires_grad}
        self.total = {n: torch.zeros_like(p) for n, p in self.parameters.items()}
        self.squares = dict.fromkeys(self.parameters, 0.0)

    def add(self, loss: torch.Tensor) -> None:
        for parameter in self.parameters.values():
            parameter.grad = None
        loss.backward()
        for name, parameter in self.parameters.items():
            if parameter.grad is not None:
                self.total[name] += parameter.grad
                self.squares[name] += float(parameter.grad.double().square().sum())
            parameter.grad = None

    def variance(self, count: int) -> dict[str, float]:
        """Trace of the sample covariance: (sum |g|^2 - |sum g|^2 / R) / (R - 1)."""
        return {
            name: max(0.0, (self.squares[name] - self._norm(name) / count) / (count - 1))
            for name in self.parameters
        }

    def square(self, count: int) -> dict[str, float]:
        """|mean g|^2 less its own variance: unbiased for the squared norm of the expectation."""
        variance = self.variance(count)
        return {
            name: self._norm(name) / count**2 - variance[name] / count for name in self.parameters
        }

    def _norm(self, name: str) -> float:
        return float(self.total[name].double().square().sum())


def average(moments: list[Moments]) -> Moments:
    """The mean of the moments of several batches."""
    count = len(moments)

    def mean(values: list[dict[str, float]]) -> dict[str, float]:
        return {name: math.fsum(v[name] for v in values) / count for name in values[0]}

    return Moments(
        loss=math.fsum(m.loss for m in moments) / count,
        loss_variance=math.fsum(m.loss_variance for m in moments) / count,
        block_variance=math.fsum(m.block_variance for m in moments) / count,
        gradient_variance=mean([m.gradient_variance for m in moments]),
        gradient_square=mean([m.gradient_square for m in moments]),
    )
