"""The training loop: one process or several, resumable bit for bit.

Everything random is a function of (seed, step): the order of the rows, the masks of the whole
global batch, and (with the number of the micro-batch) dropout. So neither resuming nor the size of
the micro-batches changes what the network is trained on, nor does the number of processes: each of
them draws all of the global batch, and computes the loss of its rows.

Steps count from 1: step n is the n-th update, and checkpoint n holds the weights after it.
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from blockdiffusion.data.loader import BatchOrder, TokenRows, free_tokens
from blockdiffusion.data.manifest import data_fingerprint
from blockdiffusion.diffusion.denoiser import is_autoregressive
from blockdiffusion.diffusion.estimators import for_block_size
from blockdiffusion.diffusion.objectives import diffusion_of
from blockdiffusion.errors import UserError
from blockdiffusion.runtime.devices import keep_freed_memory, select_device
from blockdiffusion.runtime.distributed import SINGLE, ProcessGroup, local
from blockdiffusion.runtime.seeding import generator, seed_global
from blockdiffusion.runtime.versions import versions
from blockdiffusion.train import checkpoint as checkpoints
from blockdiffusion.train.checkpoint import CheckpointOptions, TrainState
from blockdiffusion.train.loggers import Logger
from blockdiffusion.train.loss import BatchLoss, DiffusionLoss, NextTokenLoss
from blockdiffusion.train.optim import (
    MovingAverage,
    OptimOptions,
    clip_gradients,
    learning_rate,
    make_optimizer,
    set_learning_rate,
)
from blockdiffusion.train.options import ObjectiveOptions, TrainOptions
from blockdiffusion.train.parallel import Parallelism, parallelize
from blockdiffusion.train.session import (
    Interrupted,
    Report,
    StopSignals,
    check_fit,
    check_shares,
    find_checkpoint,
    restore,
    running,
)
from blockdiffusion.train.speed import Speed

if TYPE_CHECKING:
    from blockdiffusion.checkpoints.card import Card
    from blockdiffusion.models.block_diffusion import BlockDiffusion
    from blockdiffusion.train.schedule_search import ScheduleSearch


@dataclass(frozen=True, kw_only=True, slots=True)
class Periodic:
    """An evaluation or samples of the averaged model, every so many steps and after the last one.

    `run` returns values to log: `{"valid_bound": nats per token, ...}` of an evaluation,
    `{"samples": [text, ...]}` of samples. `evaluation`, a mapping, is not logged but kept in the
    state, for the model card.
    """

    every: int
    run: Callable[[BlockDiffusion], Mapping[str, Any]]

    def due(self, step: int, steps: int) -> bool:
        return step % self.every == 0 or step == steps


def train(
    model: BlockDiffusion,
    rows: TokenRows,
    *,
    out: Path,
    options: TrainOptions,
    objective: ObjectiveOptions,
    optim: OptimOptions,
    checkpoint: CheckpointOptions,
    search: ScheduleSearch | None = None,
    periodic: Sequence[Periodic] = (),
    loggers: Sequence[Logger] = (),
    tokenizer: Path | None = None,
    describe: Callable[[TrainState], Card] | None = None,
    config: Mapping[str, Any] | None = None,
    notes: Sequence[str] = (),
    resume: bool = False,
    resume_command: str | None = None,
    processes: ProcessGroup = SINGLE,
) -> TrainState:
    """Train `model` in place on the rows of prepared data; write the run into `out`.

    All processes of a job call it with equal arguments, within `distributed.process_group`.

    Args:
        model: with its initial weights, of the sizes of the data; moved to the device.
        rows: the training split.
        out: the run's directory, see `train.checkpoint` for what it holds.
        search: for the clip of `objective`, with the averaged model; the clip is logged and used
            from the step that begins with the search.
        periodic: evaluations and samples of the averaged model, in this order; their values are
            logged, and the best bound is taken from `valid_bound`.
        loggers: displays and services that get every number, besides metrics.jsonl.
        tokenizer: directory of tokenizer files to copy beside the released model.
        describe: makes the card of the released model from a state.
        config: the resolved configuration, saved with the run.
        notes: sentences to log at the start.
        resume: from the newest checkpoint in `out` (from the start if there is none yet).
        resume_command: the shell command that resumes this run, quoted when it is interrupted.
        processes: the processes that share every batch; the first of them logs and writes.

    Returns:
        The state of the last checkpoint. `model` holds the last weights, not their average; the
        average is in `out`/model/. (With `fsdp` in several processes its parameters are shards.)

    Raises:
        UserError: data and model do not fit, the processes cannot share a batch, `out` holds a run
            (or none, to resume), a checkpoint is damaged, the disk is full, or the loss is not
            finite.
        Interrupted: any of the processes got SIGINT or SIGTERM; the step was finished and saved.
    """
    check_fit(model, rows, objective)
    check_shares(options, processes)
    training = _Training(model, rows, out, options, objective, optim, search, processes)
    newest = processes.broadcast(lambda: find_checkpoint(out, resume))
    resumed = training.begin(newest, dict(config or {}))
    release = _Release(training, out, checkpoint, tokenizer, describe)
    first_step = training.state.step + 1
    run = running(out, loggers, training.state.config, first_step, processes)
    with run as report, StopSignals(processes) as stop:
        for note in (*notes, *training.notes, *resumed):
            report(training.state.step, {"note": note})
        if resumed:
            release.again()
        if search is not None and training.clip is not None:
            report(training.state.step, {"clip": list(training.clip)})
        for step in range(first_step, options.steps + 1):
            training.search(step, report)
            training.update(step, report)
            if not stop.seen():  # an interrupted run has no time for these
                due = [what for what in periodic if what.due(step, options.steps)]
                training.measure(step, due, report)
            interrupt = stop.seen()
            training.finish(step)
            if interrupt or step % checkpoint.every == 0 or step == options.steps:
                release.save()
            if interrupt:
                hint = f"; resume with: {resume_command}" if resume_command else ""
                raise Interrupted(interrupt, f"saved step {step} in {out}{hint}")
    return training.state


class _Training:
    """A network in training: its parameters, what moves them, and how far they have come.

    Attributes:
        state: after the last update.
        notes: about the data and the estimator, for the log.
        clip: of the mask probabilities, in use now.
    """

    def __init__(
        self,
        model: BlockDiffusion,
        rows: TokenRows,
        out: Path,
        options: TrainOptions,
        objective: ObjectiveOptions,
        optim: OptimOptions,
        search: ScheduleSearch | None,
        processes: ProcessGroup,
    ):
        self.model, self.rows, self.out, self.options = model, rows, out, options
        self.objective, self.optim, self.processes = objective, optim, processes
        self._search = search
        self.device = processes.set_device(select_device(options.device, "train.device"))
        if options.threads is not None:
            torch.set_num_threads(options.threads)
        if self.device.type == "cpu":
            keep_freed_memory()
        model.to(self.device)
        network = model.backbone
        self.parallelism = parallelize(model, processes, options.parallel)
        network.activation_checkpointing = options.activation_checkpointing
        if options.compile and self.device.type == "cuda":
            network.compile_layers()
        self.optimizer = make_optimizer(network, optim)
        self.average = MovingAverage(network, optim.ema_decay)
        self.order = BatchOrder(rows.num_rows, options.batch_size, options.seed)
        self.autocast = torch.autocast(
            self.device.type, dtype=torch.bfloat16, enabled=options.dtype == "bfloat16"
        )
        self.speed = Speed(model, options, self.device, rows.manifest.row_bos, processes.size)

    def begin(self, newest: Path | None, config: dict[str, Any]) -> list[str]:
        """Begin, from the checkpoint `newest` if there is one; return notes about it."""
        resumed = []
        self.state = TrainState(
            step=0,
            seconds=0.0,
            best_bound=None,
            config=config,
            data=data_fingerprint(self.rows.manifest),
            threads=torch.get_num_threads(),
            device=str(self.device),
            versions=versions(),
            processes=self.processes.size,
        )
        if newest is not None:
            network, steps = self.model.backbone, self.options.steps
            self.state, note = restore(
                newest, self.state, steps, network, self.average, self.optimizer
            )
            resumed.append(note)
        self.clip = self.objective.clip if self.state.clip is None else self.state.clip
        self.notes = []
        if self.options.batch_size > self.rows.num_rows:
            self.notes.append(
                f"train.batch_size is {self.options.batch_size}, more than the "
                f"{self.rows.num_rows} rows of the data: every update reads rows more than once"
            )
        self.estimator = None  # the next-token loss has none
        if not is_autoregressive(self.model):
            clipped = replace(self.objective, clip=self.clip).make_estimator()
            estimator, note = for_block_size(clipped, self.model.config.block_size)
            self.estimator = diffusion_of(self.model.config).fitted(estimator)
            for size in self.options.block_sizes:
                for_block_size(self.estimator, size)  # refuses now what it would refuse later
            if note is not None and self.objective.estimator is not None:
                self.notes.append(note)
        self._began = time.perf_counter() - self.state.seconds
        return resumed

    def search(self, step: int, report: Report) -> None:
        """Search for the clip of update `step` and later ones, if a search is due."""
        if self._search is None or not self._search.due(step):
            return
        with self.parallelism.ema_weights(self.average) as averaged:
            found = self._search.run(averaged, step)
        report(step, found.to_log())
        self.state, self.clip = replace(self.state, clip=found.clip), found.clip
        estimator = self._search.estimators[found.clip]
        self.estimator = diffusion_of(self.model.config).fitted(estimator)

    def update(self, step: int, report: Report) -> None:
        """Make update `step` of the weights and their average.

        Raises:
            UserError: the loss or its gradient is not finite; the weights are left as they were.
        """
        began, options = time.perf_counter(), self.options
        indices = self.order.indices(step - 1)
        batch_loss, num_free = self._batch_loss(step, indices)
        self.model.train()
        losses = accumulate_gradients(
            self.parallelism, batch_loss, max(1, num_free), step, options, self.autocast
        )
        norm = clip_gradients(self.model.parameters(), self.optim.clip_norm)
        loss, grad_norm = torch.stack([losses.sum(), norm]).tolist()  # waits for the device
        loss = self.processes.sum(loss)
        if not (math.isfinite(loss) and math.isfinite(grad_norm)):
            found = _first_not_finite(losses, loss, indices, self.parallelism, options)
            where = min(self.processes.gather(found))[1]
            newest = checkpoints.latest(self.out)
            good = f"{newest} is the last good checkpoint" if newest else "there is no checkpoint"
            raise UserError(
                f"step {step}: {where}; the weights were left as they were before this step and "
                f"{good}; a new run with a lower optim.lr or train.dtype=float32 may hold"
            )
        lr = learning_rate(self.optim, step, options.steps)
        set_learning_rate(self.optimizer, lr)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.average.update(step)
        now = time.perf_counter()
        report(step, {
            "loss": loss,
            "lr": lr,
            "grad_norm": grad_norm,
            **({"block_size": options.block_size_at(step)} if options.block_sizes else {}),
            "tokens_per_second": round(batch_loss.batch.num_tokens / (now - began), 1),
            **self.speed.reached(batch_loss, now - began),
            "seconds": round(now - self._began, 3),
        })  # fmt: skip

    def _batch_loss(self, step: int, indices: np.ndarray) -> tuple[BatchLoss, int]:
        """Return the loss of the rows of update `step`, and its number of free tokens."""
        batch = self.rows.rows(indices)
        free_BL = free_tokens(batch, self.rows.manifest.row_bos)
        num_free = int(free_BL.sum())
        if self.estimator is None:
            return NextTokenLoss(batch, free_BL), num_free
        config = self.model.config
        source = generator(self.options.seed, "corruption", step)
        size = self.options.block_size_at(step) or config.block_size
        estimator, _ = for_block_size(self.estimator, size)
        corrupted = estimator(batch.ids_BL, free_BL, size, config.mask_id, source)
        ar_loss = self.objective.ar_loss
        ar_weight_BL = ar_loss * free_BL if ar_loss else None
        if ar_weight_BL is not None and config.reading == "shifted":
            # No clean token predicts a row's first one. (Those of conversations are not learnt.)
            ar_weight_BL[:, 0] = 0
        return DiffusionLoss(batch, corrupted, ar_weight_BL, size), num_free

    def measure(self, step: int, due: Sequence[Periodic], report: Report) -> None:
        """Report what each of `due` returns for the averaged model; the state keeps evaluations."""
        for what in due:
            with self.parallelism.ema_weights(self.average) as model, torch.no_grad():
                values = dict(what.run(model.eval()))
            if measured := values.pop("evaluation", None):
                self.state = replace(self.state, evaluation={**measured, "step": step})
            report(step, values)
            bounds = (self.state.best_bound, values.get("valid_bound"))
            best = min((bound for bound in bounds if bound is not None), default=None)
            self.state = replace(self.state, best_bound=best)

    def finish(self, step: int) -> None:
        """Record that update `step` is made, and all that was due after it."""
        self.state = replace(self.state, step=step, seconds=time.perf_counter() - self._began)


@dataclass(frozen=True)
class _Release:
    """Writes the checkpoints of a run and its averaged model."""

    training: _Training
    out: Path
    options: CheckpointOptions
    tokenizer: Path | None
    describe: Callable[[TrainState], Card] | None

    def save(self) -> None:
        """Write a checkpoint of the state, and export the model."""
        t = self.training
        checkpoints.save(
            self.out, t.state, t.model.backbone, t.average, t.optimizer,
            keep=self.options.keep, processes=t.processes,
        )  # fmt: skip
        self._export()

    def again(self) -> None:
        """Repeat what follows a checkpoint: a kill may have come before its export."""
        self._export()
        if self.training.processes.is_first:
            checkpoints.remove_old(self.out, self.options.keep)

    def _export(self) -> None:
        training = self.training
        with training.parallelism.ema_weights(training.average) as averaged:
            if training.processes.is_first:
                card = None if self.describe is None else self.describe(training.state)
                checkpoints.export_model(self.out, averaged, self.tokenizer, card)


def accumulate_gradients(
    parallelism: Parallelism,
    batch_loss: BatchLoss,
    num_free: int,
    step: int,
    options: TrainOptions,
    autocast: torch.autocast,
) -> torch.Tensor:
    """Add the gradient of a global batch's loss to the parameters, one micro-batch at a time.

    The loss is that of the whole batch divided by its number of free tokens `num_free`: nats per
    token, whatever the size of the micro-batches. A process passes its share of the rows.

    Returns:
        The contribution of each micro-batch of this process; their sum is the loss.
    """
    passes = _passes(len(batch_loss.batch.ids_BL), options, parallelism.processes)
    losses = []
    for number, rows in passes.items():
        # Dropout draws from PyTorch's global stream, which evaluation and samples use too.
        seed_global(options.seed, "dropout", step, number)
        with parallelism.last_pass(len(losses) == len(passes) - 1):
            with autocast:
                loss = parallelism.nats(batch_loss, rows) / num_free
            parallelism.backward(loss)
        losses.append(loss.detach())
    return torch.stack(losses)


def _passes(num_rows: int, options: TrainOptions, processes: ProcessGroup) -> dict[int, slice]:
    """Return the micro-batches of this process: their number in the whole batch -> their rows.

    If `micro_batch_size` divides the processes' shares, they are those of one process.
    """
    share = processes.share(num_rows)
    size = options.micro_batch_size or num_rows
    starts = range(share.start, share.stop, size)
    first = processes.rank * len(starts)
    return {
        first + index: slice(start, min(start + size, share.stop))
        for index, start in enumerate(starts)
    }


def _first_not_finite(
    losses: torch.Tensor,
    total: float,
    indices: np.ndarray,
    parallelism: Parallelism,
    options: TrainOptions,
) -> tuple[int, str]:
    """Return where this process first sees a number that is not finite: its place in the order of
    micro-batches and parameters, and a sentence."""
    passes = _passes(len(indices), options, parallelism.processes)
    for loss, (number, share) in zip(losses.tolist(), passes.items(), strict=True):
        if not math.isfinite(loss):
            numbers = indices[share].tolist()
            rows = ", ".join(map(str, numbers[:8])) + (", ..." if len(numbers) > 8 else "")
            count = len(passes) * parallelism.processes.size
            where = f"micro-batch {number + 1} of {count} (rows {rows})"
            return number, f"the loss is {loss} in {where}"
    for place, (name, parameter) in enumerate(
        parallelism.model.backbone.named_parameters(), len(indices)
    ):
        if parameter.grad is not None and not local(parameter.grad).isfinite().all():
            return place, f"the loss is {total:.4g} but the gradient of {name} is not finite"
    return sys.maxsize, f"the loss is {total:.4g} but the norm of the gradient overflows"
