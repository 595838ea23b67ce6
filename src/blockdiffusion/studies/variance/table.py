"""How noisy the estimators are: variances of the bound and of its gradient, side by side.

One model, the same held-out rows and the same seeds for all estimators and block sizes; only the
law of the masks differs. A network does not depend on the block size, so that one model can be
measured at several; at another than its own it was not trained for what it is asked.

Variances come from `variance.batch_moments`: masks redrawn, data fixed, one batch. Standard errors
are those over batches. They are compared at *equal passes*, and at *equal compute*: N copies cost
`corruption.relative_cost(N)` passes, and with the passes saved a mean could be taken over more of
them, so the variance is multiplied by the cost.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from blockdiffusion.data.loader import free_tokens
from blockdiffusion.diffusion.estimators import (
    T_MIN,
    Bernoulli,
    Estimator,
    for_block_size,
    make_estimator,
    relative_cost,
)
from blockdiffusion.diffusion.exact import MAX_BLOCK_SIZE, exact_blocks, num_subsets
from blockdiffusion.diffusion.objectives import Diffusion, diffusion_of
from blockdiffusion.diffusion.variance import Moments, average, batch_moments
from blockdiffusion.errors import UserError
from blockdiffusion.evaluate.journal import Journal
from blockdiffusion.evaluate.measured import Measured, mean_of, ratio_of
from blockdiffusion.evaluate.prepared import HeldOutText
from blockdiffusion.evaluate.replicates import Advance
from blockdiffusion.runtime.seeding import generator
from blockdiffusion.runtime.versions import versions
from blockdiffusion.studies.options import VarianceOptions

PAPER = "bernoulli (paper)"
EXACT = "the exact bound"
PAPER_LAW = Bernoulli(stratify="batch")  # linear, unclipped, times stratified over the batch
GROUPS = ("embedding", "attention", "mlp", "norms and modulation", "output")
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True, kw_only=True)
class VarianceRow:
    """One estimator at one block size.

    Attributes:
        label: the estimator as it was asked for; `estimator` is the one used.
        is_bound: whether it estimates the bound; clipped ones do not.
        t_min: mask probabilities below are left out; None for estimators that draw none.
        stratify: how the draws of a batch are spread, see `estimators.stratified_uniform`.
        cost: of a pass, in passes with one noisy copy.
        loss: mean over replicates and batches, nats per token; its error is that of the masks
            alone, with the data fixed.
        difference: of the loss from that of the table's reference at this block size, with the
            error of the masks: from the exact bound, or from another estimator with paired draws.
            None for the reference itself, and where there is none.
        loss_variance: of the batch's loss, for one pass (of N copies); nats per token, squared.
        gradient_variance: trace of the covariance of the gradient, for one pass.
        groups: the same by parameter group.
        signal_to_noise: squared norm of the expected gradient over gradient_variance.
        block_variance: as the paper's tables print it, see `variance.Moments`.
        loss_gain, gradient_gain: how many times less variance than the paper's estimator has, at
            equal passes; None where the variance is 0.
        note: what is different from what was asked for.
    """

    block_size: int
    label: str
    estimator: str
    is_bound: bool
    t_min: float | None
    stratify: str
    num_noisy: int
    cost: float
    loss: Measured
    difference: Measured | None
    loss_variance: Measured
    gradient_variance: Measured | None
    groups: dict[str, Measured]
    signal_to_noise: Measured | None
    block_variance: Measured | None
    loss_gain: Measured | None
    gradient_gain: Measured | None
    note: str | None

    @property
    def is_paper(self) -> bool:
        """Whether it is the estimator that the paper has."""
        return self.label == PAPER

    @property
    def bias(self) -> Measured | None:
        """`difference` of an estimator that is none of the bound."""
        return None if self.is_bound else self.difference

    def at_equal_compute(self, name: str) -> Measured | None:
        """`loss_variance`, `gradient_variance`, `loss_gain` or `gradient_gain` at equal compute."""
        found: Measured | None = getattr(self, name)
        if found is None:
            return None
        factor = 1 / self.cost if name.endswith("gain") else self.cost
        stderr = None if found.stderr is None else found.stderr * factor
        return Measured(value=found.value * factor, stderr=stderr)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        names = ("loss_variance", "gradient_variance", "loss_gain", "gradient_gain")
        equal = {f"{n}_equal_compute": self.at_equal_compute(n) for n in names}
        derived = {"bias": self.bias} | equal
        return asdict(self) | {n: None if m is None else asdict(m) for n, m in derived.items()}


@dataclass(frozen=True, kw_only=True)
class VarianceTable:
    """All estimators at all block sizes, and the conditions.

    Attributes:
        references: block size -> what differences are taken from: the exact bound, enumerated, up
            to S = 8; beyond, and for networks that read the time, the label of the unbiased
            estimator with the least variance.
        exact: block size -> that exact bound, nats per token, on the same rows.
        left_out: (block size, label, why) of what does not exist there.
    """

    rows: tuple[VarianceRow, ...]
    references: dict[int, str]
    exact: dict[int, float]
    left_out: tuple[tuple[int, str, str], ...]
    options: VarianceOptions
    seq_len: int
    model_block_size: int
    num_tokens: int
    bos: bool
    device: str
    dtype: str
    seconds: float

    def at(self, block_size: int) -> list[VarianceRow]:
        """The rows of one block size, as given."""
        return [row for row in self.rows if row.block_size == block_size]

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON, with the versions that they were measured with."""
        plain = ("seq_len", "model_block_size", "num_tokens", "bos", "device", "dtype", "seconds")
        return {
            **asdict(self.options),
            "t_min": T_MIN,
            **{name: getattr(self, name) for name in plain},
            "versions": versions(),
            "references": self.references,
            "exact": self.exact,
            "left_out": [
                {"block_size": s, "label": label, "why": why} for s, label, why in self.left_out
            ],
            "rows": [row.to_dict() for row in self.rows],
        }


def measure_variance(
    model: Any,
    text: HeldOutText,
    options: VarianceOptions | None = None,
    progress: Progress | None = None,
    journal: Path | None = None,
) -> VarianceTable:
    """The table of all estimators at all block sizes, on the first rows of `text`.

    The model is left as it was: its configuration, its gradients and its mode.

    Args:
        model: a `Denoiser` that is a module.
        text: from `prepared.read_rows`, `options.rows` rows.
        progress: called with (what is measured, done, total) units of work.
        journal: file that keeps what is finished, so that the same call after an interruption goes
            on; the caller removes it.

    Raises:
        UserError: too few rows, a block size that does not divide them, no estimator that exists
            at one of the block sizes for this network, a network of discrete time, or a loss or
            gradient that is not finite.
    """
    start = time.perf_counter()
    options = VarianceOptions() if options is None else options
    diffusion = _comparable(model)
    batches = _batches(text, options)
    length = text.batch.ids_BL.shape[1]
    plan, left_out = _plan(options, length, diffusion)
    sizes = list(dict.fromkeys(p.block_size for p in plan))
    enumerated = [s for s in sizes if diffusion.enumerable and s <= MAX_BLOCK_SIZE]
    work = sum(p.work for p in plan) + sum(_enumeration_work(size, options) for size in enumerated)
    tensors = [tensor for batch in batches for tensor in batch]
    conditions = (options.replicates, options.gradients, options.seed)
    kept = Journal.of(journal, model, *tensors, conditions)
    job = _Job(model, batches, options, Advance(progress, work * options.batches), kept)
    measured = [job.measure(p) for p in plan]
    exact = {size: job.enumerate(size) for size in enumerated}
    rows, references = _compared(measured, exact, length)
    return VarianceTable(
        rows=rows,
        references=references,
        exact={size: mean_of([x for (x,) in found.losses]).value for size, found in exact.items()},
        left_out=tuple(left_out),
        options=options,
        seq_len=length,
        model_block_size=model.config.block_size,
        num_tokens=sum(int(free_BL.sum()) for _, free_BL, _ in batches),
        bos=text.bos,
        device=str(model.device),
        dtype=str(next(model.parameters()).dtype).removeprefix("torch."),
        seconds=time.perf_counter() - start,
    )


# --- what to measure ---------------------------------------------------------------------------


def _comparable(model: Any) -> Diffusion:
    """What the model is trained on, which has several estimators."""
    diffusion = diffusion_of(model.config)
    if diffusion.usual_estimator == "timesteps":
        raise UserError(
            f"{diffusion.title} has one estimator, timesteps, which leaves nothing to compare; "
            "measure a network of masks in continuous time (bd3lm, mdlm or sedd)"
        )
    return diffusion


@dataclass(frozen=True)
class _Plan:
    block_size: int
    label: str
    law: Estimator
    note: str | None

    @property
    def work(self) -> int:
        return self.law.num_noisy + 1


def _plan(
    options: VarianceOptions, length: int, diffusion: Diffusion
) -> tuple[list[_Plan], list[tuple[int, str, str]]]:
    """Every estimator at every block size, the paper's first; and what does not exist there."""
    plan, left_out, possible = [], [], False
    for size in dict.fromkeys(options.block_sizes):
        if length % size:
            raise UserError(
                f"block size {size} does not divide the {length} tokens of a row; choose divisors"
            )
        plan.append(_Plan(size, PAPER, PAPER_LAW, None))
        for spec in dict.fromkeys(options.estimators):
            try:
                law, note = for_block_size(make_estimator(spec), size)
                diffusion.fitted(law)  # as `batch_moments` does
            except UserError as error:
                left_out.append((size, spec, str(error)))
                continue
            plan.append(_Plan(size, spec, law, note))
            possible = True
    if not possible:
        raise UserError(left_out[0][2])
    return plan, left_out


def _batches(text: HeldOutText, options: VarianceOptions) -> list[tuple[torch.Tensor, ...]]:
    """(clean, free, valid) of every batch."""
    ids_BL, valid_BL = text.batch.ids_BL, text.batch.valid_BL
    if len(ids_BL) < options.rows:
        raise UserError(
            f"{options.batches} batches of {options.batch_size} rows are {options.rows} rows, but "
            f"the split has {len(ids_BL)}; ask for fewer batches or smaller ones"
        )
    free_BL = free_tokens(text.batch, text.bos)
    valid_BL = torch.ones_like(free_BL) if valid_BL is None else valid_BL
    size = options.batch_size
    return [
        (ids_BL[i : i + size].long(), free_BL[i : i + size], valid_BL[i : i + size])
        for i in range(0, options.rows, size)
    ]


# --- measuring ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Cell:
    """One estimator at one block size: its moments on every batch."""

    plan: _Plan
    moments: list[Moments]

    def loss_variances(self) -> list[float]:
        return [m.loss_variance for m in self.moments]

    def gradient_variances(self) -> list[float]:
        return [math.fsum(m.gradient_variance.values()) for m in self.moments]


@dataclass(frozen=True)
class _Reference:
    """What differences are taken from: per batch the loss of every replicate, or one exact one."""

    label: str
    losses: list[tuple[float, ...]]


@dataclass(frozen=True)
class _Job:
    """Measures one thing after the other on the same batches."""

    model: Any
    batches: Sequence[tuple[torch.Tensor, ...]]
    options: VarianceOptions
    advance: Advance
    journal: Journal

    def measure(self, plan: _Plan) -> _Cell:
        """The moments of an estimator at a block size."""
        options, stage = self.options, f"S = {plan.block_size} {plan.label}"
        model = self.model.with_block_size(plan.block_size)

        def moments(index: int, clean_BL, free_BL, valid_BL) -> dict[str, Any]:
            source = generator(options.seed, "variance", index)
            found = batch_moments(
                model, clean_BL, free_BL, valid_BL, plan.law, options.replicates, source,
                gradients=options.gradients,
            )  # fmt: skip
            _check_finite(
                found.loss,
                found.loss_variance,
                *found.gradient_variance.values(),
                *found.gradient_square.values(),
            )
            return asdict(found)

        name = f"S={plan.block_size} {plan.label} {plan.law.name}"
        found = self._per_batch(name, stage, plan.work, moments)
        read = [Moments(**values | {"losses": tuple(values["losses"])}) for values in found]
        return _Cell(plan, read)

    def enumerate(self, size: int) -> _Reference:
        """The exact bound of every batch, nats per token."""
        training = self.model.training
        self.model.eval()
        model = self.model.with_block_size(size)

        def exact(index: int, clean_BL, free_BL, valid_BL) -> float:
            found = exact_blocks(model, clean_BL, free_BL, valid_BL)
            loss = float(found.nelbo_BK.sum()) / int(free_BL.sum())
            _check_finite(loss)
            return loss

        stage, work = f"S = {size} {EXACT}", _enumeration_work(size, self.options)
        losses = self._per_batch(f"S={size} exact", stage, work, exact)
        self.model.train(training)
        return _Reference(EXACT, [(loss,) for loss in losses])

    def _per_batch(
        self, name: str, stage: str, work: int, measure: Callable[..., Any]
    ) -> list[Any]:
        """What `measure` makes of (number of a batch, clean, free, valid or None)."""
        found, device = [], self.model.device
        for index, batch in enumerate(self.batches):
            self.advance(0, stage)
            clean_BL, free_BL, valid_BL = (tensor.to(device) for tensor in batch)
            valid = None if bool(valid_BL.all()) else valid_BL
            measured = partial(measure, index, clean_BL, free_BL, valid)
            found.append(self.journal.result(f"{name} batch {index}", measured))
            self.advance(work, stage)
        return found


def _enumeration_work(size: int, options: VarianceOptions) -> int:
    """Of a batch, in the units of `_Plan.work`; a backward pass counts as two forward ones."""
    return -(-num_subsets(size) // (options.replicates * (3 if options.gradients else 1)))


def _check_finite(*values: float) -> None:
    if not all(map(math.isfinite, values)):
        raise UserError(
            "the loss or its gradient is not finite (nan or infinity): the network's numbers "
            "overflow, or its weights have diverged; measure in float32, or take an earlier "
            "checkpoint"
        )


def parameter_group(name: str) -> str:
    """Which of `GROUPS` a parameter of `models.transformer` belongs to; "other" where in none."""
    parts = name.split(".")
    part = parts[2] if parts[0] == "layers" and len(parts) > 2 else parts[0]
    if part in ("embedding", "output"):
        return part
    if part in ("attn_qkv", "attn_out"):
        return "attention"
    if part in ("mlp_in", "mlp_out"):
        return "mlp"
    known = part == "time" or part.endswith(("norm", "modulation"))
    return "norms and modulation" if known else "other"


# --- from moments to rows ------------------------------------------------------------------------


def _compared(
    cells: Sequence[_Cell], exact: Mapping[int, _Reference], length: int
) -> tuple[tuple[VarianceRow, ...], dict[int, str]]:
    """All rows, and what the differences of each block size are taken from."""
    rows: list[VarianceRow] = []
    references = {}
    for size in dict.fromkeys(cell.plan.block_size for cell in cells):
        here = [cell for cell in cells if cell.plan.block_size == size]
        reference = exact[size] if size in exact else _reference(here)
        if reference is not None:
            references[size] = reference.label
        rows += [_row(cell, here[0], reference, length) for cell in here]
    return tuple(rows), references


def _reference(cells: Sequence[_Cell]) -> _Reference | None:
    """The unbiased estimator whose mean is known best."""
    unbiased = [cell for cell in cells if cell.plan.law.is_bound]
    best = min(unbiased, key=lambda c: math.fsum(c.loss_variances()), default=None)
    return None if best is None else _Reference(best.plan.label, [m.losses for m in best.moments])


def _row(cell: _Cell, paper: _Cell, reference: _Reference | None, length: int) -> VarianceRow:
    law, plan, mean = cell.plan.law, cell.plan, average(cell.moments)
    gradients = bool(mean.gradient_variance)
    squares = [math.fsum(m.gradient_square.values()) for m in cell.moments]
    blocks = [m.block_variance for m in cell.moments if m.block_variance is not None]
    difference = None
    if reference is not None and reference.label != plan.label:
        difference = _mean_loss(cell, reference)
    return VarianceRow(
        block_size=plan.block_size,
        label=plan.label,
        estimator=law.name,
        is_bound=law.is_bound,
        t_min=law.t_min if isinstance(law, Bernoulli) else None,
        stratify=law.stratify,  # type: ignore[attr-defined]  # all of this package's have it
        num_noisy=law.num_noisy,
        cost=relative_cost(law.num_noisy, has_clean=plan.block_size < length),
        loss=_mean_loss(cell),
        difference=difference,
        loss_variance=mean_of(cell.loss_variances()),
        gradient_variance=mean_of(cell.gradient_variances()) if gradients else None,
        groups=_by_group(cell.moments),
        signal_to_noise=ratio_of(squares, cell.gradient_variances()) if gradients else None,
        block_variance=mean_of(blocks) if blocks else None,
        loss_gain=ratio_of(paper.loss_variances(), cell.loss_variances()),
        gradient_gain=ratio_of(paper.gradient_variances(), cell.gradient_variances()),
        note=plan.note,
    )


def _by_group(moments: Sequence[Moments]) -> dict[str, Measured]:
    per_batch = []
    for found in moments:
        sums = dict.fromkeys(map(parameter_group, found.gradient_variance), 0.0)
        for name, variance in found.gradient_variance.items():
            sums[parameter_group(name)] += variance
        per_batch.append(sums)
    order = [group for group in (*GROUPS, "other") if group in per_batch[0]]
    return {group: mean_of([sums[group] for sums in per_batch]) for group in order}


def _mean_loss(cell: _Cell, reference: _Reference | None = None) -> Measured:
    """Mean loss (less the reference's, draw by draw), with the error of the masks alone."""
    losses_BR = torch.tensor([m.losses for m in cell.moments], dtype=torch.float64)
    if reference is not None:
        losses_BR -= torch.tensor(reference.losses, dtype=torch.float64)
    away_BR = losses_BR - losses_BR[:, :1]  # exactly 0 without noise
    stderr = (away_BR.var(1).sum() / away_BR.shape[1]).sqrt() / len(losses_BR)
    return Measured(value=float(losses_BR.mean()), stderr=float(stderr))
