"""What the studies can be asked for. This module imports no PyTorch."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

from blockdiffusion.errors import UserError
from blockdiffusion.evaluate.generation.options import SCORER, DrawOptions, ScorerOptions
from blockdiffusion.evaluate.options import LikelihoodOptions
from blockdiffusion.limits import check_limit, check_limits
from blockdiffusion.options import REQUIRED, all_but, option
from blockdiffusion.sampling.params import SETTINGS

MAX_ORDER = 16
DEFAULT_ESTIMATORS = (
    "bernoulli", "bernoulli:cosine", "bernoulli:square", "bernoulli:sqrt", "bernoulli:log",
    "bernoulli[0.3,0.8]", "bernoulli[0.45,0.95]", "bernoulli[1,1]", "resampled[0.3,0.8]",
    "count", "complement", "countx4", "count[0.45,0.95]", "complement[0.45,0.95]",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True, slots=True)
class CoderOptions:
    """What `references` codes, and how.

    Raises:
        UserError: a value is not allowed.
    """

    split: str = option("valid", "Split whose rows are coded.")
    limit: int | None = option(None, "Code only the first rows.", was="rows")
    order: int = option(6, "Longest n-gram; shorter ones are listed too.")
    train_rows: int | None = option(None, "Learn from the first training rows only.")
    bos: bool | None = option(
        None, "Position 0 is a given BOS; by default as in training.", flags="--bos/--no-bos"
    )
    score: LikelihoodOptions = field(default=LikelihoodOptions())
    seed: int = option(0, "Of the masks.")

    def __post_init__(self) -> None:
        check_limits(self)
        if not 1 <= self.order <= MAX_ORDER:
            raise UserError(f"order is {self.order}; it must be from 1 to {MAX_ORDER}")
        if self.split == "train":
            raise UserError("split is train, which the n-grams are counted on; choose another one")


@dataclass(frozen=True, kw_only=True)
class Pareto(ScorerOptions):
    """What `pareto` measures.

    Attributes:
        points: of `points.Point`; the usual ones of the model if there are none.
        draw: how all samples are drawn, but for the sampler and its settings.
    """

    model: str = option(REQUIRED, "Model or run directory, or a Hugging Face id.", positional=True)
    scorer: str = option(REQUIRED, SCORER)
    out: Path = option(REQUIRED, "Folder for all results; a stopped run resumes there.")
    points: tuple[Any, ...] = ()
    draw: Annotated[
        DrawOptions,
        all_but(DrawOptions, "sampler", *SETTINGS, "stride", "use_cache", "int8"),
    ] = field(default=DrawOptions(max_new_tokens=128))


@dataclass(frozen=True, kw_only=True)
class VarianceOptions:
    """What `variance` measures.

    `estimators` are written as for `estimators.make_estimator`; the paper's is measured besides.
    Each block size divides the rows' length. The loss and gradient of a batch of `batch_size` rows
    have the variance; standard errors need two batches.
    """

    estimators: tuple[str, ...] = option(
        DEFAULT_ESTIMATORS,
        "A distribution of masks: complement, count, bernoulli or resampled, as in "
        "bernoulli[0.3,0.8]; may be repeated.",
        "complement count bernoulli resampled",
    )
    block_sizes: tuple[int, ...] = option((1, 4, 8, 16), "Every S to measure at.")
    batch_size: int = option(16, "Rows of a batch.")
    batches: int = option(4, "Batches of different rows.")
    replicates: int = option(16, "Draws of the masks of every batch.")
    gradients: bool = option(True, "Measure the gradient, too.")
    seed: int = option(0, "Of the masks.")

    def __post_init__(self) -> None:
        from blockdiffusion.diffusion.estimators import make_estimator

        if not self.estimators or not self.block_sizes:
            raise UserError("nothing to measure: give at least one estimator and one block size")
        for spec in self.estimators:
            make_estimator(spec)
        check_limits(self)
        for size in self.block_sizes:
            check_limit("block_size", size, "a block size")

    @property
    def rows(self) -> int:
        """Rows of the data that are read."""
        return self.batch_size * self.batches
