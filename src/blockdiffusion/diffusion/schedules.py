"""Noise schedules: the probability that a token is masked at time t, and the weight of its loss.

A schedule is described by the probability p(t) = 1 - alpha_t that a token is masked at time t in
(0, 1], with p(0) = 0 and p(1) = 1, and by the weight w(t) = -alpha'_t / (1 - alpha_t) = p'(t)/p(t)
that the negative evidence lower bound (NELBO) gives to a masked token (paper, equation 8). All
schedules with the same end points have the same NELBO in continuous time; they differ in variance
(paper, section 5 and table 8): the integral of p'^2/p decides, which is infinite for the linear,
square root and logarithmic schedules unless t is cut, and finite for the square and the cosine.

Help and shell completion read the names in `SCHEDULES`, so importing this module must not import
PyTorch, which takes seconds.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from blockdiffusion.errors import UserError, shown

if TYPE_CHECKING:
    import torch

CLEANEST = 1e-3  # the authors' eps: networks read no time at which fewer tokens are kept


class Schedule:
    """A noise schedule, as corruption, likelihood and samplers use it.

    Attributes:
        name: in configurations and reports.
        is_bound: whether the loss weighted by this schedule bounds the negative log-likelihood.
        t_range: the interval that training draws t from, before any cut at `t_min`.
    """

    name: str
    is_bound = True
    t_range = (0.0, 1.0)

    def __repr__(self) -> str:
        return f"{type(self).__name__}()"

    def mask_prob(self, t: torch.Tensor) -> torch.Tensor:
        """Return p(t), elementwise."""
        raise NotImplementedError

    def loss_weight(self, t: torch.Tensor) -> torch.Tensor:
        """Return w(t) = p'(t) / p(t), elementwise."""
        raise NotImplementedError

    def inverse(self, p: torch.Tensor) -> torch.Tensor:
        """Return the t with mask_prob(t) = p, elementwise."""
        raise NotImplementedError


Unclipped = Schedule  # the old name, for one version


class Linear(Schedule):
    """p(t) = t, w(t) = 1/t: the paper's schedule (log-linear in alpha)."""

    name = "linear"

    def mask_prob(self, t: torch.Tensor) -> torch.Tensor:
        return t

    def loss_weight(self, t: torch.Tensor) -> torch.Tensor:
        return 1 / t

    def inverse(self, p: torch.Tensor) -> torch.Tensor:
        return p


class Cosine(Schedule):
    """p(t) = 1 - cos(pi t / 2), written without the cancellation at small t."""

    name = "cosine"

    def mask_prob(self, t: torch.Tensor) -> torch.Tensor:
        angle = t * (math.pi / 2)
        return angle.sin().square() / (1 + angle.cos())

    def loss_weight(self, t: torch.Tensor) -> torch.Tensor:
        return (math.pi / 2) / (t * (math.pi / 4)).tan()

    def inverse(self, p: torch.Tensor) -> torch.Tensor:
        return (p * (2 - p)).sqrt().atan2(1 - p) * (2 / math.pi)


class Square(Schedule):
    """p(t) = t^2, w(t) = 2/t."""

    name = "square"

    def mask_prob(self, t: torch.Tensor) -> torch.Tensor:
        return t.square()

    def loss_weight(self, t: torch.Tensor) -> torch.Tensor:
        return 2 / t

    def inverse(self, p: torch.Tensor) -> torch.Tensor:
        return p.sqrt()


class Sqrt(Schedule):
    """p(t) = sqrt(t), w(t) = 1/(2t)."""

    name = "sqrt"

    def mask_prob(self, t: torch.Tensor) -> torch.Tensor:
        return t.sqrt()

    def loss_weight(self, t: torch.Tensor) -> torch.Tensor:
        return 1 / (2 * t)

    def inverse(self, p: torch.Tensor) -> torch.Tensor:
        return p.square()


class Log(Schedule):
    """p(t) = log(1 + t) / log 2."""

    name = "log"

    def mask_prob(self, t: torch.Tensor) -> torch.Tensor:
        return t.log1p() / math.log(2)

    def loss_weight(self, t: torch.Tensor) -> torch.Tensor:
        return 1 / ((1 + t) * t.log1p())

    def inverse(self, p: torch.Tensor) -> torch.Tensor:
        return (p * math.log(2)).expm1()


class Clipped(Schedule):
    """`base` with t restricted so that the mask probability stays in [beta, omega] (section 5.2).

    t is uniform between base.inverse(beta) and base.inverse(omega); p and w are those of `base` at
    that t. It changes the training objective, so it gives neither a bound nor a perplexity.
    """

    is_bound = False

    def __init__(self, base: Schedule, beta: float, omega: float):
        import torch

        if not 0 <= beta <= omega <= 1 or omega == 0:
            raise UserError(
                f"the clip [{beta}, {omega}] is empty or leaves (0, 1]; "
                "give 0 <= beta <= omega <= 1 with omega > 0"
            )
        self.base, self.beta, self.omega = base, float(beta), float(omega)
        low, high = base.inverse(torch.tensor([beta, omega], dtype=torch.float64)).tolist()
        self.t_range = (low, high)
        self.name = f"{base.name}[{_shortest(self.beta)},{_shortest(self.omega)}]"

    def mask_prob(self, t: torch.Tensor) -> torch.Tensor:
        return self.base.mask_prob(t)

    def loss_weight(self, t: torch.Tensor) -> torch.Tensor:
        return self.base.loss_weight(t)

    def inverse(self, p: torch.Tensor) -> torch.Tensor:
        return self.base.inverse(p)


def _shortest(value: float) -> str:
    short = f"{value:g}"
    return short if float(short) == value else repr(value)


class Scaled(Schedule):
    """`base` that ends at the mask probability 1 - eps: p(t) = (1 - eps) base(t), the same weight.

    The published SEDD and MDLM weights of Lou et al. and Sahoo et al. were trained with this noise
    (linear, eps = 1e-3: sigma = -log(1 - 0.999 t)). Its bound also has the term of the prior, see
    `losses.prior_kl`.
    """

    def __init__(self, base: Schedule, eps: float):
        self.base, self.eps, self.name = base, eps, base.name
        self.is_bound, self.t_range = base.is_bound, base.t_range

    def mask_prob(self, t: torch.Tensor) -> torch.Tensor:
        return (1 - self.eps) * self.base.mask_prob(t)

    def loss_weight(self, t: torch.Tensor) -> torch.Tensor:
        return self.base.loss_weight(t)

    def inverse(self, p: torch.Tensor) -> torch.Tensor:
        return self.base.inverse(p / (1 - self.eps))


SCHEDULES: dict[str, type[Schedule]] = {
    kind.name: kind for kind in (Linear, Cosine, Square, Sqrt, Log)
}


def make_schedule(name: str, clip: tuple[float, float] | None = None) -> Schedule:
    """Return the schedule called `name`, clipped to mask probabilities `clip` = (beta, omega).

    Raises:
        UserError: the name is unknown, or the clip is empty or leaves (0, 1].
    """
    if name not in SCHEDULES:
        raise UserError(f"unknown schedule {shown(name)}; known: {', '.join(SCHEDULES)}")
    base = SCHEDULES[name]()
    return base if clip is None else Clipped(base, *clip)


def prob_range(schedule: Schedule) -> tuple[float, float]:
    """Return the mask probabilities (beta, omega) at the ends of the schedule's `t_range`."""
    import torch

    ends = torch.tensor(schedule.t_range, dtype=torch.float64)
    beta, omega = schedule.mask_prob(ends).tolist()
    return beta, omega


def noise_level(prob: torch.Tensor) -> torch.Tensor:
    """Return sigma = -log(1 - p), which a time-conditioned network reads, at most -log(1e-3) = 6.9.

    The authors cut it at the same value (their `sigma_max`): at p = 1 it would be infinite.
    """
    return -(-prob.clamp(max=1 - CLEANEST)).log1p()
