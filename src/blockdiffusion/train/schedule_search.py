"""The data-driven search of the clipped schedule (paper, section 5.3, and its recipe).

Which clip [beta, omega] of the mask probabilities has the least variance depends on the data, the
block size and the state of the training. So from time to time a grid of clips is tried with the
averaged weights on validation text, all with the same random numbers. Training continues with the
clip whose loss (or gradient) varies least over draws of the masks of a batch.

Masking everything, the clip [1, 1], has no variance at any block size. For blocks of one token it
is the right answer: all clips have the same expectation there (the autoregressive likelihood), and
the grid contains it. For longer blocks it is another objective (tokens predicted independently),
and the grid must not contain it.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch

from blockdiffusion.data.loader import TokenRows, free_tokens
from blockdiffusion.diffusion.estimators import Estimator, for_block_size
from blockdiffusion.diffusion.variance import Moments, batch_moments
from blockdiffusion.errors import UserError
from blockdiffusion.limits import check_limits
from blockdiffusion.options import option
from blockdiffusion.runtime.distributed import SINGLE, ProcessGroup
from blockdiffusion.runtime.seeding import generator
from blockdiffusion.train.options import OBJECTIVES, ObjectiveOptions

if TYPE_CHECKING:
    from blockdiffusion.models.block_diffusion import BlockDiffusion

Clip = tuple[float, float]
Criterion = Literal["loss", "gradient"]
EVERYTHING_MASKED: Clip = (1.0, 1.0)
MOST_WIDTHS = 100


@dataclass(frozen=True, kw_only=True, slots=True)
class SearchOptions:
    """When, on what and over which clips to search; widths and offsets are the paper's."""

    every: int | None = option(
        None, "steps between two searches (the paper: about 5000); null: never"
    )
    widths: tuple[float, ...] = option(
        (0.5, 0.6, 0.7, 0.8, 0.9), "widths of the clips that are tried, in (0, 1]"
    )
    offset_step: float = option(
        0.05, "each width is tried at 0 and at every multiple of this that fits below 1"
    )
    rows: int = option(64, "validation rows that are used, the first ones")
    batch_size: int = option(8, "rows of a batch whose variance is taken")
    replicates: int = option(8, "draws of the masks, per clip and batch")
    by: Criterion = option(
        "loss", "whose variance is compared: the batch's loss (paper), or its gradient"
    )

    def __post_init__(self) -> None:
        check_limits(self, "search.")
        if not 1 <= len(self.widths) <= MOST_WIDTHS:
            raise UserError(
                f"search.widths has {len(self.widths)} widths; give 1 to {MOST_WIDTHS}, in (0, 1]"
            )
        for width in self.widths:
            if not 0 < width <= 1:
                raise UserError(f"search.widths has {width}; every width must be in (0, 1]")


def clip_grid(options: SearchOptions, block_size: int) -> list[Clip]:
    """Return the clips (beta, omega) by rising width, then rising beta; at S = 1 also [1, 1].

    Ends are rounded to nine digits: 0.15 + 0.8 is 0.95.
    """
    grid = [EVERYTHING_MASKED] if block_size == 1 else []
    for width in sorted(set(options.widths)):
        num_offsets = math.floor((1 - width) / options.offset_step + 1e-9) + 1
        betas = [round(index * options.offset_step, 9) for index in range(num_offsets)]
        grid += [(beta, min(1.0, round(beta + width, 9))) for beta in betas]
    return grid


@dataclass(frozen=True, kw_only=True, slots=True)
class SearchResult:
    """The best clip and the variance of every clip, in the order of the grid."""

    clip: Clip
    variances: dict[Clip, float]
    seconds: float

    def to_log(self) -> dict[str, Any]:
        """As metrics.jsonl has it: `clip_grid` holds [beta, omega, variance] of every clip."""
        return {
            "clip": list(self.clip),
            "clip_grid": [[*clip, variance] for clip, variance in self.variances.items()],
            "search_seconds": round(self.seconds, 3),
        }


class ScheduleSearch:
    """Tries the clips of a grid, with the estimator that `objective` trains with.

    A step that is due begins with a search. The first step has none: an untrained network predicts
    the same everywhere, so the search would measure only the weights of the estimator. Until the
    first search, training uses the clip of the recipe, if any.

    Attributes:
        estimators: the estimator of every clip of the grid.

    Args:
        objective: of the recipe; its clip is replaced.
        rows: the validation split.
        block_size: of the network.
        seed: of the run; the masks are a function of it, the step and the number of the batch.
        processes: the processes that share the batches, and find the same.

    Raises:
        UserError: the objective has no clip, or its estimator cannot use a clip of the grid at
            this block size.
    """

    def __init__(
        self,
        options: SearchOptions,
        objective: ObjectiveOptions,
        rows: TokenRows,
        block_size: int,
        seed: int,
        processes: ProcessGroup = SINGLE,
    ):
        check_objective(objective)
        self._options, self._rows, self._seed, self._processes = options, rows, seed, processes
        self.estimators: dict[Clip, Estimator] = {
            clip: for_block_size(replace(objective, clip=clip).make_estimator(), block_size)[0]
            for clip in clip_grid(options, block_size)
        }

    def due(self, step: int) -> bool:
        return self._options.every is not None and step % self._options.every == 0

    def run(self, model: BlockDiffusion, step: int) -> SearchResult:
        """Search with the weights of `model`; dropout is off, gradients are cleared.

        All clips see the same rows and the same random numbers.

        Raises:
            UserError: a variance is not finite.
        """
        began = time.perf_counter()
        count = min(self._options.rows, self._rows.num_rows)
        starts = range(0, count, self._options.batch_size)
        own = {}
        for number, start in enumerate(starts):
            if self._processes.is_mine(number):
                stop = min(start + self._options.batch_size, count)
                own[number] = self._batch_variances(model, step, number, np.arange(start, stop))
        mean_C = sum(self._processes.collect(own), start=torch.zeros(())) / len(starts)
        variances = dict(zip(self.estimators, mean_C.tolist(), strict=True))
        return SearchResult(
            clip=least_variance(variances, step),
            variances=variances,
            seconds=time.perf_counter() - began,
        )

    def _batch_variances(
        self, model: BlockDiffusion, step: int, number: int, indices: np.ndarray
    ) -> torch.Tensor:
        """float64 (C,): the variance of one batch under each of the C clips."""
        batch = self._rows.rows(indices)
        free_BL = free_tokens(batch, self._rows.manifest.row_bos)
        attended_BL = batch.attended_BL
        valid_BL = None if attended_BL is None else attended_BL.to(model.device)
        variances = []
        for estimator in self.estimators.values():
            moments = batch_moments(
                model,
                batch.ids_BL.to(model.device),
                free_BL.to(model.device),
                valid_BL,
                estimator,
                self._options.replicates,
                generator(self._seed, "search", step, number),  # the same for every clip
                gradients=self._options.by == "gradient",
            )
            variances.append(variance_of(moments, self._options.by))
        return torch.tensor(variances, dtype=torch.float64)


def check_objective(objective: ObjectiveOptions) -> None:
    """Refuse an objective that has no clip to search."""
    if objective.allows_clip:
        return
    kind, name = OBJECTIVES[objective.name], objective.name
    if "clip" in kind.reads:
        raise UserError(
            f"search.every is given, but objective.estimator is {objective.used_estimator}, which "
            f"draws the number of masked tokens before the time that {name} reads and has no clip; "
            "set objective.estimator=bernoulli, or search.every=null"
        )
    raise UserError(
        f"search.every is given, but objective.name is {name}, {kind.why_not} and has no clip; "
        "set search.every=null"
    )


def variance_of(moments: Moments, by: Criterion) -> float:
    """Return the variance of a batch's loss, or the trace of the covariance of its gradient."""
    if by == "loss":
        return moments.loss_variance
    return math.fsum(moments.gradient_variance.values())


def least_variance(variances: dict[Clip, float], step: int) -> Clip:
    """Return the clip of least variance; among equals the one that masks most, then the widest.

    So if no clip has any variance (S = 1, masks that are not Bernoulli draws), all is masked.

    Raises:
        UserError: a variance is not finite; `step` says when.
    """
    for clip, variance in variances.items():
        if not math.isfinite(variance):
            raise UserError(
                f"step {step}: the search found a variance of {variance} for the clip "
                f"{list(clip)}: the averaged weights have diverged; a new run with a lower "
                "optim.lr may hold"
            )

    def rank(clip: Clip) -> tuple[float, float, float]:
        return variances[clip], -round(clip[0] + clip[1], 9), clip[0]  # 0.15 + 0.8 is 0.95

    return min(variances, key=rank)
