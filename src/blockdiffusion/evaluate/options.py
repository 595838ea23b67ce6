"""How a likelihood is estimated: the options of everything that measures one.

This module imports no PyTorch: the command line and recipes are made from it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from blockdiffusion.errors import UserError
from blockdiffusion.limits import check_limits
from blockdiffusion.options import option

MC_SAMPLES = "Independent draws of the masks; two or more give a noise error."


@dataclass(frozen=True, kw_only=True, slots=True)
class LikelihoodOptions:
    """How a likelihood is estimated.

    "auto" is "exact" if that takes no more noisy copies than `mc_samples` complement pairs (with
    the default of 8: up to S = 4), else the unbiased estimator with the least noise: complement
    pairs, or "timesteps" for D3PM, which has no other. Distributions of masks are written as for
    `estimators.make_estimator`, not clipped. "exact" and "orders" need masks and a network without
    time input; "exact" has no noise. The likelihood of an autoregressive model is exact, in one
    pass; it allows "exact" and "auto" only. With a target, `mc_samples` replicates are drawn at a
    time until the noise error (of the tighter bound, for "orders") is at most the target and well
    known, or until there are 4,096; the result's `remarks` then say so.

    Raises:
        UserError: a value is not allowed.
    """

    PREFIX: ClassVar[str] = ""  # of the names in messages

    estimator: str = option(
        "auto",
        "auto (exact where that costs no more than --mc-samples complement pairs, else these), "
        "exact (enumerates; S <= 8), orders (a tighter bound), or a distribution of masks: "
        "complement, count, bernoulli, bernoulli:cosine, ...",
        choices="auto exact orders complement count bernoulli",
    )
    mc_samples: int = option(8, MC_SAMPLES, was="samples")
    orders: int = option(8, "K of the K-order bound, for orders.")
    target_stderr: float | None = option(
        None, "Draw until the Monte Carlo error is at most this, at most 4,096 times."
    )

    def __post_init__(self) -> None:
        check_limits(self, self.PREFIX)
        if self.target_stderr is not None and not self.target_stderr > 0:
            raise UserError(
                f"{self.PREFIX}target_stderr is {self.target_stderr}; it must be above 0"
            )
