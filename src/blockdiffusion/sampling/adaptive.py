"""Samplers of masks that look at the predictions, and one that masks decided tokens again."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import torch

from blockdiffusion.diffusion.losses import exclude_mask_token_
from blockdiffusion.diffusion.schedules import Linear, Schedule
from blockdiffusion.errors import UserError
from blockdiffusion.limits import check_limit
from blockdiffusion.sampling.logits import probabilities
from blockdiffusion.sampling.reverse import GridState
from blockdiffusion.sampling.samplers import (
    BlockState,
    Place,
    SamplingContext,
    Update,
    check_steps,
    check_tokens_per_step,
)

TIE = 2.0**-10  # uncertainties are told apart by as much; see `MostCertain`


@dataclass(frozen=True)
class MostCertain:
    """Each pass reveals the masked tokens whose predictions are the most certain.

    An approximation: the order depends on the predictions, and tokens that share a pass are drawn
    independently of each other. What is certain is measured on p(x0 | .) before any filter:

    * "confidence": the probability of the most likely token (LLaDA, Nie et al. 2025; with a
      threshold Fast-dLLM, Wu et al. 2025),
    * "margin": by how much it exceeds that of the second (Kim et al. 2025),
    * "entropy": the entropy in nats; with a threshold, as many tokens as have entropies that add
      up, without the largest, to at most it (EB-sampler, Ben-Hamu et al. 2025).

    A block's first token goes alone, before the others, if the reading is "shifted": the clean past
    alone predicts it, so no pass over the block makes it more certain (Fast-dLLM v2, Wu et al.
    2025).

    Tokens go in the order of their uncertainties, rounded to 2^-10; of equal ones the first in the
    text goes first. Without that the rounding of kernels would choose among positions that see the
    same, as all masks of a text's first block do.

    Args:
        tokens_per_step: reveal so many in every pass; with a threshold at least so many (SDAR's
            dynamic rule, Cheng et al. 2025).
        threshold: reveal all that reach it, but at least one.
        sub_block: fill the block in parts of so many tokens, from left to right; None: as a whole.
    """

    name: Literal["confidence", "margin", "entropy"]
    tokens_per_step: int | None = None
    threshold: float | None = None
    sub_block: int | None = None

    def __post_init__(self) -> None:
        check_limit("sub_block", self.sub_block)
        if self.tokens_per_step is None and self.threshold is None:
            raise UserError(
                f"the sampler {self.name} needs tokens_per_step or threshold; give one, or both"
            )
        if self.tokens_per_step is not None:
            check_tokens_per_step(self.tokens_per_step)
        if self.threshold is None:
            return
        if self.name == "entropy" and not self.threshold >= 0:
            raise UserError(f"threshold is {self.threshold}; entropies are at least 0 nats")
        if self.name != "entropy" and not 0 <= self.threshold <= 1:
            raise UserError(f"threshold is {self.threshold}; for {self.name} it lies in [0, 1]")

    def start(self, open_RS: torch.Tensor, context: SamplingContext) -> BlockState:
        if self.tokens_per_step is not None:
            check_tokens_per_step(self.tokens_per_step, open_RS.shape[1])
        return _MostCertainState(self, open_RS, context)

    def uncertainty(self, prob_MV: torch.Tensor) -> torch.Tensor:
        """What the tokens of a pass are ordered by, float64 (M,): the least is revealed first."""
        if self.name == "entropy":
            return torch.special.entr(prob_MV.double()).sum(-1)
        first_M2 = prob_MV.topk(2, dim=-1).values.double()
        margin = self.name == "margin"
        return 1 - (first_M2[:, 0] - first_M2[:, 1] if margin else first_M2[:, 0])

    def revealed(self, ordered_RS: torch.Tensor) -> torch.Tensor:
        """Which tokens are revealed, bool (R, S), given their uncertainties in the order in which
        they go (infinite where there is no masked token)."""
        first_S = torch.arange(ordered_RS.shape[1]) < (self.tokens_per_step or 1)
        kept_RS = first_S.expand_as(ordered_RS)
        if self.threshold is not None and self.name == "entropy":
            kept_RS = kept_RS | (ordered_RS.cumsum(1) - ordered_RS <= self.threshold)
        elif self.threshold is not None:
            kept_RS = kept_RS | (ordered_RS <= 1 - self.threshold)
        return kept_RS & ordered_RS.isfinite()


class _MostCertainState(BlockState):
    def __init__(self, sampler: MostCertain, open_RS: torch.Tensor, context: SamplingContext):
        super().__init__(open_RS, context)
        self.sampler = sampler

    def mask_prob_R(self) -> torch.Tensor:
        return (self.undecided_RS.sum(1) / self.open_RS.sum(1).clamp(min=1)).double()

    def wanted_RS(self) -> torch.Tensor:
        wanted_RS, size = self.undecided_RS, self.open_RS.shape[1]
        if self.sampler.sub_block is not None:
            part_S = torch.arange(size) // self.sampler.sub_block
            part_R1 = torch.where(wanted_RS, part_S, size).amin(1, keepdim=True)
            wanted_RS = wanted_RS & (part_S == part_R1)
        if self.context.config.reading == "shifted":
            wanted_RS = wanted_RS & ((torch.arange(size) == 0) | ~wanted_RS[:, :1])
        return wanted_RS

    def step(self, place_M: Place, ids_M: torch.Tensor, logits_MV: torch.Tensor) -> Update:
        logits_MV = exclude_mask_token_(logits_MV, self.context.config.mask_id)
        uncertainty_M = self.sampler.uncertainty(probabilities(logits_MV)).cpu()
        all_RS = torch.full(self.open_RS.shape, torch.inf, dtype=torch.float64)
        all_RS[place_M] = uncertainty_M
        order_RS = (all_RS / TIE).round().argsort(dim=1, stable=True)
        ordered_RS = all_RS.gather(1, order_RS)
        chosen_RS = torch.zeros_like(self.open_RS)
        chosen_RS.scatter_(1, order_RS, self.sampler.revealed(ordered_RS))
        return self.reveal_some(chosen_RS[place_M], place_M, logits_MV)


@dataclass(frozen=True)
class Remasking:
    """ReMDM (Wang et al. 2025): ancestral steps in which decided tokens may be masked again.

    From mask probability p_t to p_s a decided token is masked with probability sigma, and a masked
    one revealed with 1 - (p_s - sigma (1 - p_t)) / p_t, so that p_s of the tokens are masked then,
    as without remasking. sigma is `remask` times the largest that allows it, min(1, p_s / (1 -
    p_t)) ("rescale"); with `remask` 0 it is `Ancestral`, pass by pass. A network that predicts each
    token exactly, given any others, keeps its law; for others, and few steps, it is an
    approximation whose point is that mistakes can be mended.
    """

    steps: int
    remask: float = 1.0
    schedule: Schedule = field(default_factory=Linear)
    name: str = "remask"

    def __post_init__(self) -> None:
        check_steps(self.name, self.steps)
        if not 0 <= self.remask <= 1:
            raise UserError(f"remask is {self.remask}; it must lie in [0, 1]")

    def start(self, open_RS: torch.Tensor, context: SamplingContext) -> BlockState:
        return _RemaskingState(self, open_RS, context)


class _RemaskingState(GridState):
    """What happens to a token depends on coins alone, which are thrown before each pass: so logits
    are needed where it reveals a token, only."""

    def __init__(self, sampler: Remasking, open_RS: torch.Tensor, context: SamplingContext):
        super().__init__(open_RS, sampler.steps, sampler.schedule, context)
        self.masked_RS = open_RS.clone()
        self.remask = sampler.remask
        self._throw_coins()

    def _throw_coins(self) -> None:
        """Which tokens the next pass reveals, and which decided ones it masks again."""
        now, then = self.now, self.then
        keep = 1 - now
        sigma = self.remask * min(1.0, then / keep) if keep > 0 else 0.0
        reveal = 1 - (then - sigma * keep) / now
        coin_RS = self.context.streams.each(self.open_RS.shape[1])
        self.revealed_RS = self.masked_RS & ((coin_RS < reveal) | (then == 0))
        self.forgotten_RS = self.open_RS & ~self.masked_RS & (coin_RS < sigma)

    def wanted_RS(self) -> torch.Tensor:
        return self.revealed_RS

    def step(self, place_M: Place, ids_M: torch.Tensor, logits_MV: torch.Tensor) -> Update:
        row_M, slot_M, token_M, confidence_M = self.reveal(place_M, logits_MV)
        # No row leaves before the last step: all that is forgotten is in a row that goes on.
        row_F, slot_F = self.forgotten_RS.nonzero(as_tuple=True)
        self.masked_RS[place_M] = False
        self.masked_RS |= self.forgotten_RS
        self.number += 1
        if self.now == 0:
            self.undecided_RS[:] = False
        else:
            self.undecided_RS[place_M] = True  # they may be masked again
            self._throw_coins()
        mask_F = torch.full_like(row_F, self.context.config.mask_id, device=token_M.device)
        return Update(
            torch.cat([row_M, row_F]),
            torch.cat([slot_M, slot_F]),
            torch.cat([token_M, mask_F]),
            torch.cat([confidence_M, confidence_M.new_zeros(len(row_F))]),
        )
