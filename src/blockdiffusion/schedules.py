"""Noise schedules: how likely a token is masked at time t, and what its loss then weighs.

A schedule is described by the probability p(t) = 1 - alpha_t that a token is masked at time t in
(0, 1], with p(0) = 0 and p(1) = 1, and by the weight w(t) = -alpha'_t / (1 - alpha_t) = p'(t)/p(t)
that the negative evidence lower bound (NELBO) gives to a masked token (paper, equation 8). All
schedules with the same end points have the same NELBO in continuous time; they differ in variance.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch

from blockdiffusion.errors import UserError


class Schedule(Protocol):
    """What corruption, likelihood and samplers ask of a noise schedule."""

    @property
    def name(self) -> str:
        """The name that configurations and reports use."""
        ...

    @property
    def is_bound(self) -> bool:
        """Whether the weighted loss under this schedule bounds the negative log-likelihood."""
        ...

    @property
    def t_range(self) -> tuple[float, float]:
        """The interval that training draws t from, before any cut at `t_min`."""
        ...

    def mask_prob(self, t: torch.Tensor) -> torch.Tensor:
        """p(t), elementwise."""
        ...

    def loss_weight(self, t: torch.Tensor) -> torch.Tensor:
        """w(t) = p'(t) / p(t), elementwise."""
        ...

    def inverse(self, p: torch.Tensor) -> torch.Tensor:
        """The t with mask_prob(t) = p, elementwise."""
        ...


@dataclass(frozen=True)
class Linear:
    """p(t) = t, w(t) = 1/t: the paper's schedule (log-linear in alpha)."""

    name: str = "linear"
    is_bound: bool = True
    t_range: tuple[float, float] = (0.0, 1.0)

    def mask_prob(self, t: torch.Tensor) -> torch.Tensor:
        return t

    def loss_weight(self, t: torch.Tensor) -> torch.Tensor:
        return 1 / t

    def inverse(self, p: torch.Tensor) -> torch.Tensor:
        return p


class Clipped:
    """`base` with t restricted so that the mask probability stays in [beta, omega] (section 5.2).

    t is uniform between base.inverse(beta) and base.inverse(omega); p and w are those of `base` at
    that t. It changes the training objective, so it is never a bound and never a perplexity.
    """

    is_bound = False

    def __init__(self, base: Schedule, beta: float, omega: float):
        if not 0 <= beta <= omega <= 1 or omega == 0:
            raise UserError(
                f"the clip [{beta}, {omega}] is empty or leaves (0, 1]; "
                "give 0 <= beta <= omega <= 1 with omega > 0"
            )
        self.base, self.beta, self.omega = base, float(beta), float(omega)
        low, high = base.inverse(torch.tensor([beta, omega], dtype=torch.float64)).tolist()
        self.t_range = (low, high)
        self.name = f"{base.name}[{beta:g},{omega:g}]"

    def mask_prob(self, t: torch.Tensor) -> torch.Tensor:
        return self.base.mask_prob(t)

    def loss_weight(self, t: torch.Tensor) -> torch.Tensor:
        return self.base.loss_weight(t)

    def inverse(self, p: torch.Tensor) -> torch.Tensor:
        return self.base.inverse(p)


SCHEDULES: dict[str, type[Linear]] = {"linear": Linear}


def make_schedule(name: str, clip: tuple[float, float] | None = None) -> Schedule:
    """The schedule called `name`, clipped to mask probabilities `clip` = (beta, omega) if given."""
    if name not in SCHEDULES:
        raise UserError(f"unknown schedule {name!r}; known: {', '.join(sorted(SCHEDULES))}")
    base = SCHEDULES[name]()
    return base if clip is None else Clipped(base, *clip)
