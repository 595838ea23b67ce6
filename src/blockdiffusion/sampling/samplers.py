"""How a block comes to be: samplers, and those whose passes are drawn before the network runs.

A `Sampler` starts a `BlockState` for each block. The state says what each pass reads and where it
needs logits, and then which tokens change. `Scheduled` samplers reveal masks in passes that they
draw ahead, because the mask process of absorbing diffusion does not depend on the tokens; a pass
that would reveal nothing is skipped, since what it predicts is thrown away, whether or not the
network reads the time. `adaptive` samplers look at the predictions, `reverse` ones carry out other
noises. Given tokens are never changed by any of them.

Shape suffixes: R rows of the batch, S positions of the block, M positions of a pass, V vocabulary.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch

from blockdiffusion.diffusion.schedules import Linear, Schedule, noise_level
from blockdiffusion.errors import UserError
from blockdiffusion.sampling.logits import draw_tokens
from blockdiffusion.sampling.params import SamplingParams
from blockdiffusion.sampling.streams import RowStreams

Place = tuple[torch.Tensor, torch.Tensor]  # rows and slots, (M,) each, on the CPU


class SamplingContext(NamedTuple):
    """What draws in a block depend on: the network's configuration and device, the options, and the
    random numbers of the block's rows."""

    config: Any
    device: torch.device
    params: SamplingParams
    streams: RowStreams


class Update(NamedTuple):
    """What a pass decides or changes; (M,) each, rows and slots on the CPU.

    `confidences` are the denoiser's probabilities of the ids, before any filter.
    """

    rows: torch.Tensor
    slots: torch.Tensor
    ids: torch.Tensor
    confidences: torch.Tensor


class BlockState(ABC):
    """One block of all rows on its way from noise to text.

    Attributes:
        open_RS: bool, on the CPU: the tokens that are to be sampled.
        undecided_RS: those of them whose token may still change.
    """

    def __init__(self, open_RS: torch.Tensor, context: SamplingContext):
        self.open_RS, self.undecided_RS = open_RS, open_RS.clone()
        self.context = context

    def initial_block(self, block_RS: torch.Tensor) -> torch.Tensor:
        """The block as it begins, from one with masks where tokens are to be sampled."""
        return block_RS

    @abstractmethod
    def mask_prob_R(self) -> torch.Tensor:
        """float64: the mask probability p(t) at the time of the next pass, for each row."""

    def sigma_R(self) -> torch.Tensor | None:
        """What the network reads as the time of the next pass; None if it reads none."""
        if not self.context.config.time_conditioning:
            return None
        return noise_level(self.mask_prob_R()).float().to(self.context.device)

    def wanted_RS(self) -> torch.Tensor:
        """bool, on the CPU: the positions whose logits the next pass needs."""
        return self.undecided_RS

    @abstractmethod
    def step(self, place_M: Place, ids_M: torch.Tensor, logits_MV: torch.Tensor) -> Update:
        """Makes a pass's decisions, from the logits at wanted positions that hold `ids_M`.

        Positions of rows that have left are missing. The next pass is another one.
        """

    def reveal(self, place_M: Place, logits_MV: torch.Tensor) -> Update:
        """Draws the tokens at these places, which are decided then."""
        context = self.context
        token_M, confidence_M = draw_tokens(
            logits_MV, context.config.mask_id, context.params, context.streams.at(place_M[0])
        )
        self.undecided_RS[place_M] = False
        return Update(*place_M, token_M, confidence_M)

    def reveal_some(
        self, chosen_M: torch.Tensor, place_M: Place, logits_MV: torch.Tensor
    ) -> Update:
        """The same where `chosen_M`, on the CPU, says so; without asking a GPU how many these
        are."""
        row_M, slot_M = (x[chosen_M] for x in place_M)
        number_M = chosen_M.nonzero().flatten().to(logits_MV.device)
        return self.reveal((row_M, slot_M), logits_MV[number_M])


@runtime_checkable
class Sampler(Protocol):
    """A way in which blocks come to be."""

    @property
    def name(self) -> str: ...

    def start(self, open_RS: torch.Tensor, context: SamplingContext) -> BlockState:
        """The state of a block; `open_RS` (bool, CPU) marks the tokens that are to be sampled."""
        ...


class Scheduled(ABC):
    """A sampler that draws the pass of each masked token ahead: logits are computed where a pass
    reveals a token, only. A subclass has a `name`, and `plan` or `reveal_probs`."""

    @property
    @abstractmethod
    def name(self) -> str: ...

    def plan(self, masked_RS: torch.Tensor, streams: RowStreams) -> torch.Tensor:
        """int64 (R, S): the pass (0, 1, ...) that reveals each position; -1 where it is not masked.

        The passes of a row are 0..n-1 without gaps. `streams` has the random numbers of the R rows.
        """
        prob_RS = self.reveal_probs(masked_RS, streams)
        assert prob_RS is not None
        return in_order(prob_RS, masked_RS)

    def reveal_probs(self, masked_RS: torch.Tensor, streams: RowStreams) -> torch.Tensor | None:
        """float64 (R, S): the mask probability p(t) of the time at which the network is asked for
        each masked position; `plan` is `in_order` of it. None: this sampler knows no times, as
        networks that read them need."""
        return None

    def start(self, open_RS: torch.Tensor, context: SamplingContext) -> BlockState:
        """See `Sampler`.

        Raises:
            UserError: the network reads the time, and this sampler knows none.
        """
        if not context.config.time_conditioning:
            return _ScheduledState(self.plan(open_RS, context.streams), None, context)
        prob_RS = self.reveal_probs(open_RS, context.streams)
        if prob_RS is None:
            raise UserError(
                f"this network reads the time, which the sampler {self.name} does not know; "
                "take first-hitting or ancestral"
            )
        return _ScheduledState(in_order(prob_RS, open_RS), prob_RS, context)


class _ScheduledState(BlockState):
    def __init__(
        self, pass_RS: torch.Tensor, prob_RS: torch.Tensor | None, context: SamplingContext
    ):
        super().__init__(pass_RS >= 0, context)
        self.pass_RS, self.prob_RS = pass_RS, prob_RS
        self.number = 0

    def mask_prob_R(self) -> torch.Tensor:
        assert self.prob_RS is not None
        # All tokens of a row that share a pass share its time.
        return self.prob_RS.where(self.wanted_RS(), 0.0).amax(1)

    def wanted_RS(self) -> torch.Tensor:
        return self.pass_RS == self.number

    def step(self, place_M: Place, ids_M: torch.Tensor, logits_MV: torch.Tensor) -> Update:
        self.number += 1
        return self.reveal(place_M, logits_MV)


@dataclass(frozen=True)
class Planned(Scheduled):
    """A user's object with a `name` and `plan`, and `reveal_probs` where it knows times."""

    policy: Any

    @property
    def name(self) -> str:
        return self.policy.name

    def plan(self, masked_RS: torch.Tensor, streams: RowStreams) -> torch.Tensor:
        return self.policy.plan(masked_RS, streams)

    def reveal_probs(self, masked_RS: torch.Tensor, streams: RowStreams) -> torch.Tensor | None:
        probs = getattr(self.policy, "reveal_probs", None)
        return None if probs is None else probs(masked_RS, streams)


@dataclass(frozen=True)
class Leftmost(Scheduled):
    """The first `tokens_per_step` masked tokens in every pass: from left to right.

    With one this is the only sampler of an autoregressive network, and samples from the chain of
    left-to-right conditionals of any other; with more, tokens that share a pass are drawn
    independently of each other.
    """

    tokens_per_step: int = 1
    name: str = "leftmost"

    def __post_init__(self) -> None:
        check_tokens_per_step(self.tokens_per_step)

    def plan(self, masked_RS: torch.Tensor, streams: RowStreams) -> torch.Tensor:
        check_tokens_per_step(self.tokens_per_step, masked_RS.shape[1])
        place_RS = masked_RS.long().cumsum(1) - 1
        return torch.where(masked_RS, place_RS // self.tokens_per_step, -1)


@dataclass(frozen=True)
class FirstHitting(Scheduled):
    """One token per pass, its position uniform among the masked ones (Zheng et al. 2024).

    The law of the continuous-time reverse process, in n passes for n masked tokens.
    """

    name: str = "first-hitting"

    def reveal_probs(self, masked_RS: torch.Tensor, streams: RowStreams) -> torch.Tensor:
        return 1 - streams.each(masked_RS.shape[1])


@dataclass(frozen=True)
class Ancestral(Scheduled):
    """The reverse process on a grid of `steps` times: tokens that fall in one step are revealed
    together, each from its own marginal. Tends to `FirstHitting` as the steps grow, with every
    schedule; the schedule decides how the tokens spread over few steps."""

    steps: int
    schedule: Schedule = field(default_factory=Linear)
    name: str = "ancestral"

    def __post_init__(self) -> None:
        check_steps(self.name, self.steps)

    def reveal_probs(self, masked_RS: torch.Tensor, streams: RowStreams) -> torch.Tensor:
        # A token masked at t=1 is revealed between grid times i and i-1 with probability
        # p(t_i) - p(t_{i-1}): the step in which a uniform number lies.
        grid = torch.arange(1, self.steps + 1, dtype=torch.float64) / self.steps
        prob = self.schedule.mask_prob(grid)
        uniform_RS = streams.each(masked_RS.shape[1])
        # Where noise ends before 1, what is left beyond the last p(t_i) goes with the first step.
        step_RS = torch.searchsorted(prob, uniform_RS, right=True).clamp(max=self.steps - 1)
        return prob[step_RS]


@dataclass(frozen=True)
class RandomOrder(Scheduled):
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


def in_order(prob_RS: torch.Tensor, masked_RS: torch.Tensor) -> torch.Tensor:
    """Passes in order of falling probability (> 0); equal ones share a pass."""
    prob_RS = torch.where(masked_RS, prob_RS, 0.0)  # after all masked ones
    ordered_RS, order_RS = prob_RS.sort(dim=1, descending=True)
    changes_RS = (ordered_RS[:, 1:] != ordered_RS[:, :-1]).long()
    rank_RS = torch.cat([torch.zeros_like(order_RS[:, :1]), changes_RS.cumsum(1)], dim=1)
    ranks_RS = torch.empty_like(rank_RS).scatter_(1, order_RS, rank_RS)
    return torch.where(masked_RS, ranks_RS, -1)


def check_tokens_per_step(tokens: int, block_size: int | None = None) -> None:
    """Refuses a number of tokens that no pass can reveal."""
    most = "" if block_size is None else f" and at most {block_size}, the tokens of a block"
    if tokens < 1 or (block_size is not None and tokens > block_size):
        raise UserError(f"tokens_per_step is {tokens}; it must be at least 1{most}")


def check_steps(name: str, steps: int) -> None:
    if steps < 1:
        raise UserError(f"the {name} sampler needs at least 1 step, not {steps}")
