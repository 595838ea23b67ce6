"""Samplers on a grid of times: the reverse processes of score entropy and of uniform noise."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from blockdiffusion.diffusion.estimators import without_mask
from blockdiffusion.diffusion.losses import exclude_mask_token_, log_rate, uniform_reverse
from blockdiffusion.diffusion.schedules import Linear, Schedule
from blockdiffusion.sampling.logits import draw_columns, filtered_probs, probabilities
from blockdiffusion.sampling.samplers import (
    BlockState,
    Place,
    SamplingContext,
    Update,
    check_steps,
)


class GridState(BlockState):
    """A block whose passes are at the `steps` times of a grid, the last first.

    Attributes:
        number: of the next pass; it goes from the mask probability `now` to `then`.
    """

    def __init__(
        self, open_RS: torch.Tensor, steps: int, schedule: Schedule, context: SamplingContext
    ):
        super().__init__(open_RS, context)
        grid = torch.arange(steps, 0, -1, dtype=torch.float64) / steps
        self._prob = [*schedule.mask_prob(grid).tolist(), 0.0]
        self.number = 0

    @property
    def now(self) -> float:
        return self._prob[self.number]

    @property
    def then(self) -> float:
        return self._prob[self.number + 1]

    def mask_prob_R(self) -> torch.Tensor:
        return torch.tensor(self.now, dtype=torch.float64).expand(len(self.open_RS))


@dataclass(frozen=True)
class Analytic:
    """SEDD's analytic sampler on a grid of `steps` times, for masks.

    From t to the next earlier s a masked token becomes y with probability (e^(sigma_t - sigma_s) -
    1) s_y, which is u c_y for u = (p_t - p_s) / p_t and c of `losses.score_entropy`, and stays
    masked with what is left. Where the scores add up to more than one, nothing is left. The last
    step, to p = 0, reveals all (the authors' denoising step). Filters act on c / sum of c.

    The grid begins at p = 1, also for a network whose noise ended at 1 - eps: as the authors do,
    everything is masked at first, and sigma is cut.
    """

    steps: int
    schedule: Schedule = field(default_factory=Linear)
    name: str = "analytic"

    def __post_init__(self) -> None:
        check_steps(self.name, self.steps)

    def start(self, open_RS: torch.Tensor, context: SamplingContext) -> BlockState:
        return _AnalyticState(open_RS, self.steps, self.schedule, context)


class _AnalyticState(GridState):
    def step(self, place_M: Place, ids_M: torch.Tensor, logits_MV: torch.Tensor) -> Update:
        now, then = self.now, self.then
        self.number += 1
        rate_M = log_rate(logits_MV, self.context.config.mask_id).double().exp().cpu()
        revealed_M = self.context.streams.at(place_M[0]) < (now - then) / now * rate_M
        if then == 0:
            revealed_M[:] = True
        return self.reveal_some(revealed_M, place_M, logits_MV)


@dataclass(frozen=True)
class UniformReverse:
    """D3PM's ancestral sampler for uniform noise: T steps of p(x_s | x_t), all tokens in each.

    With `steps` = T it is the chain whose bound is measured; with fewer it takes longer steps of
    the same noise, by the same formula (`losses.uniform_reverse`), and is another law. Filters
    act on p(x_0 | x_t).
    """

    steps: int
    schedule: Schedule = field(default_factory=Linear)
    name: str = "ancestral"

    def __post_init__(self) -> None:
        check_steps(self.name, self.steps)

    def start(self, open_RS: torch.Tensor, context: SamplingContext) -> BlockState:
        return _UniformState(open_RS, self.steps, self.schedule, context)


class _UniformState(GridState):
    def initial_block(self, block_RS: torch.Tensor) -> torch.Tensor:
        config, device = self.context.config, block_RS.device
        uniform_RS = self.context.streams.each(block_RS.shape[1])
        noise_RS = without_mask((uniform_RS * (config.vocab_size - 1)).long(), config.mask_id)
        return torch.where(self.open_RS.to(device), noise_RS.to(device), block_RS)

    def wanted_RS(self) -> torch.Tensor:
        return self.open_RS

    def step(self, place_M: Place, ids_M: torch.Tensor, logits_MV: torch.Tensor) -> Update:
        mask_id = self.context.config.mask_id
        now, then = self.now, self.then
        prob_MV = probabilities(exclude_mask_token_(logits_MV, mask_id))
        clean_MV = filtered_probs(prob_MV, self.context.params)
        reverse_MV = uniform_reverse(clean_MV, ids_M, 1 - now, 1 - then, mask_id)
        token_M = draw_columns(reverse_MV, self.context.streams.at(place_M[0]))
        confidence_M = prob_MV.gather(-1, token_M[:, None])[:, 0]
        told_M = (token_M != ids_M) | (self.number == 0)
        self.number += 1
        if then == 0:
            self.undecided_RS[:] = False
        on_cpu_M = told_M.cpu()
        row_M, slot_M = (x[on_cpu_M] for x in place_M)
        return Update(row_M, slot_M, token_M[told_M], confidence_M[told_M])
