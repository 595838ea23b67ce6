"""Which masked tokens of a block are revealed in which pass.

The policies here draw the passes before the network runs, because the mask process of absorbing
diffusion does not depend on the tokens. A pass that would reveal nothing is skipped: what it
predicts is thrown away, whether or not the network reads the time.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Protocol, runtime_checkable

import torch

from blockdiffusion.diffusion.schedules import Linear, Schedule
from blockdiffusion.errors import UserError
from blockdiffusion.limits import check_limits
from blockdiffusion.sampling.streams import RowStreams


class Policy(Protocol):
    """Draws the pass (0, 1, ...) that reveals each masked token of a block."""

    @property
    def name(self) -> str: ...

    def plan(self, masked_RS: torch.Tensor, streams: RowStreams) -> torch.Tensor:
        """int64 (R, S): the pass that reveals each position; -1 where it is not masked.

        The passes of a row are 0..n-1 without gaps. `streams` has the random numbers of the R rows.
        """
        ...


@runtime_checkable
class TimedPolicy(Policy, Protocol):
    """A policy that also knows when: needed for networks that read the time."""

    def reveal_probs(self, masked_RS: torch.Tensor, streams: RowStreams) -> torch.Tensor:
        """float64 (R, S): the mask probability p(t) of the time at which the network is asked for
        each masked position; `plan` is `in_order` of it."""
        ...


@dataclass(frozen=True)
class FirstHitting:
    """One token per pass, its position uniform among the masked ones (Zheng et al. 2024).

    The law of the continuous-time reverse process, in n passes for n masked tokens.
    """

    name: str = "first-hitting"

    def plan(self, masked_RS: torch.Tensor, streams: RowStreams) -> torch.Tensor:
        return in_order(self.reveal_probs(masked_RS, streams), masked_RS)

    def reveal_probs(self, masked_RS: torch.Tensor, streams: RowStreams) -> torch.Tensor:
        """See `TimedPolicy`."""
        return 1 - streams.each(masked_RS.shape[1])


@dataclass(frozen=True)
class Ancestral:
    """The reverse process on a grid of `steps` times: tokens that fall in one step are revealed
    together, each from its own marginal. Tends to `FirstHitting` as the steps grow, with every
    schedule; the schedule decides how the tokens spread over few steps."""

    steps: int
    schedule: Schedule = field(default_factory=Linear)
    name: str = "ancestral"

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise UserError(f"the ancestral sampler needs at least 1 step, not {self.steps}")

    def plan(self, masked_RS: torch.Tensor, streams: RowStreams) -> torch.Tensor:
        return in_order(self.reveal_probs(masked_RS, streams), masked_RS)

    def reveal_probs(self, masked_RS: torch.Tensor, streams: RowStreams) -> torch.Tensor:
        """See `TimedPolicy`."""
        # A token masked at t=1 is revealed between grid times i and i-1 with probability
        # p(t_i) - p(t_{i-1}): the step in which a uniform number lies.
        grid = torch.arange(1, self.steps + 1, dtype=torch.float64) / self.steps
        prob = self.schedule.mask_prob(grid)
        uniform_RS = streams.each(masked_RS.shape[1])
        # Where noise ends before 1, what is left beyond the last p(t_i) goes with the first step.
        step_RS = torch.searchsorted(prob, uniform_RS, right=True).clamp(max=self.steps - 1)
        return prob[step_RS]


def in_order(prob_RS: torch.Tensor, masked_RS: torch.Tensor) -> torch.Tensor:
    """Passes in order of falling probability (> 0); equal ones share a pass."""
    prob_RS = torch.where(masked_RS, prob_RS, 0.0)  # after all masked ones
    ordered_RS, order_RS = prob_RS.sort(dim=1, descending=True)
    changes_RS = (ordered_RS[:, 1:] != ordered_RS[:, :-1]).long()
    rank_RS = torch.cat([torch.zeros_like(order_RS[:, :1]), changes_RS.cumsum(1)], dim=1)
    ranks_RS = torch.empty_like(rank_RS).scatter_(1, order_RS, rank_RS)
    return torch.where(masked_RS, ranks_RS, -1)


@dataclass(frozen=True)
class RandomOrder:
    """`tokens_per_step` tokens in every pass, at positions that are uniform among the masked ones.

    With one it is `FirstHitting`. With more, tokens that share a pass are drawn independently of
    each other: an approximation.
    """

    tokens_per_step: int
    name: str = "random"

    def __post_init__(self) -> None:
        check_tokens_per_step(self.tokens_per_step)

    def plan(self, masked_RS: torch.Tensor, streams: RowStreams) -> torch.Tensor:
        check_tokens_per_step(self.tokens_per_step, masked_RS.shape[1])
        order_RS = FirstHitting().plan(masked_RS, streams)
        return torch.where(masked_RS, order_RS // self.tokens_per_step, -1)


def check_tokens_per_step(tokens: int, block_size: int | None = None) -> None:
    """Refuses a number of tokens that no pass can reveal."""
    most = "" if block_size is None else f" and at most {block_size}, the tokens of a block"
    if tokens < 1 or (block_size is not None and tokens > block_size):
        raise UserError(f"tokens_per_step is {tokens}; it must be at least 1{most}")


@dataclass(frozen=True, kw_only=True)
class PolicySettings:
    """What the names of policies may need.

    Attributes:
        steps: passes of a block. schedule: how they are spread over the noise.
        tokens_per_step: tokens that a pass reveals.
        threshold: of what a prediction must have to be revealed.
        remask: share of the largest possible rate at which decided tokens are masked again.
    """

    steps: int | None = None
    schedule: str | None = None
    tokens_per_step: int | None = None
    threshold: float | None = None
    remask: float | None = None

    def __post_init__(self) -> None:
        check_limits(self)

    def check_read(self, name: str, reads: Mapping[str, Sequence[str]]) -> None:
        """Refuses what the policy `name` has no use for; `reads`: what each policy reads."""
        for item in fields(self):
            value = getattr(self, item.name)
            if value is not None and item.name not in reads[name]:
                readers = [other for other, read in reads.items() if item.name in read]
                advice = f", or take {_either(readers)}" if readers else ""
                raise UserError(
                    f"{item.name} is {value}, which has no meaning for the policy {name}; leave it "
                    f"out{advice}"
                )


def _either(names: Sequence[str]) -> str:
    *most, last = names
    return f"{', '.join(most)} or {last}" if most else last
