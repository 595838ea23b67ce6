"""The training loop: one process or several, resumable bit for bit.

Everything random is a function of (seed, step): the order of the rows, the masks of the whole
global batch, and (with the number of the micro-batch) dropout. So neither resuming nor the size of
the micro-batches changes what the network is trained on, nor does the number of processes: each of
them draws all of the global batch, and computes the loss of its rows.

Steps count from 1: step n is the n-th update, and checkpoint n holds the weights after it.
"""

from __future__ import annotations

import math
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import yaml
from torch import nn

from blockdiffusion.data.loader import Batch, BatchOrder, TokenRows, free_tokens
from blockdiffusion.data.manifest import data_fingerprint
from blockdiffusion.diffusion.denoiser import is_autoregressive
from blockdiffusion.diffusion.estimators import for_block_size
from blockdiffusion.diffusion.objectives import diffusion_of
from blockdiffusion.errors import UserError
from blockdiffusion.files.disk import written_aside
from blockdiffusion.runtime.devices import keep_freed_memory, select_device
from blockdiffusion.runtime.distributed import ALONE, Team, current, local
from blockdiffusion.runtime.seeding import generator, seed_global
from blockdiffusion.train import checkpoint as checkpoints
from blockdiffusion.train.checkpoint import CheckpointOptions, TrainState
from blockdiffusion.train.loggers import JsonLines, Logger, cut_metrics
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
from blockdiffusion.train.speed import Speed
from blockdiffusion.train.spread import Spread, spread_over

if TYPE_CHECKING:
    from blockdiffusion.checkpoints.card import Card
    from blockdiffusion.models.transformer import BlockDiffusionModel
    from blockdiffusion.train.schedule_search import ScheduleSearch


@dataclass(frozen=True, kw_only=True, slots=True)
class Periodic:
    """Something to do with the averaged model every so many steps, and after the last one.

    `run` returns values to log: `{"valid_bound": nats per token, ...}` of an evaluation,
    `{"samples": [text, ...]}` of samples. `evaluation`, a mapping of what was measured and how, is
    not logged but kept in the state, for the model card.
    """

    every: int
    run: Callable[[BlockDiffusionModel], Mapping[str, Any]]

    def due(self, step: int, steps: int) -> bool:
        """Whether it is time after update `step` of `steps`."""
        return step % self.every == 0 or step == steps


class Interrupted(Exception):
    """A signal ended the run after its step was finished and saved.

    Attributes:
        exit_code: what a shell expects of a process that the signal ended (130, 143).
    """

    def __init__(self, number: int, message: str):
        super().__init__(message)
        self.signal = signal.Signals(number)
        self.exit_code = 128 + number


def train(
    model: BlockDiffusionModel,
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
    team: Team = ALONE,
) -> TrainState:
    """Trains `model` in place on the rows of prepared data; writes the run into `out`.

    All processes of a team call it with equal arguments, after they have joined
    (`distributed.joined`).

    Args:
        model: with its initial weights, of the sizes of the data; moved to the device.
        rows: the training split.
        out: the run's directory, see `train.checkpoint` for what it holds.
        search: for the clip of `objective`, with the averaged model; what it found is logged, and
            trained with from the step on that began with it.
        periodic: evaluations and samples of the averaged model, in this order; what they return is
            logged, and the best bound is taken from `valid_bound`.
        loggers: displays and services that get every number, besides metrics.jsonl.
        tokenizer: directory of tokenizer files to copy beside the released model.
        describe: what the card of the released model says at a state.
        config: the resolved configuration, saved with the run.
        notes: sentences to log at the start.
        resume: go on from the newest checkpoint in `out` (from the start when there is none yet).
        resume_command: the shell command that resumes this run, quoted when it is interrupted.
        team: the processes that share every batch; the first of them logs and writes.

    Returns:
        The state of the last checkpoint. `model` holds the last weights, not their average; the
        average is in `out`/model/. (With `fsdp` in several processes its parameters are shards.)

    Raises:
        UserError: data and model do not fit, the processes cannot share a batch, `out` holds a run
            (or none, to resume), a checkpoint is damaged, the disk is full, or the loss is not
            finite.
        Interrupted: SIGINT or SIGTERM came, to any of the processes; the step was finished and
            saved.
    """
    _check_fit(model, rows, objective)
    _check_shares(options, team)
    config = dict(config or {})
    device = team.claim(select_device(options.device, "train.device"))
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    if device.type == "cpu":
        keep_freed_memory()
    model.to(device)  # type: ignore  # transformers wraps it without types
    spread = spread_over(model, team, options.parallel)
    model.activation_checkpointing = options.activation_checkpointing
    if options.compile and device.type == "cuda":
        model.compile_layers()
    optimizer = make_optimizer(model, optim)
    average = MovingAverage(model, optim.ema_decay)
    order = BatchOrder(rows.num_rows, options.batch_size, options.seed)
    autocast = torch.autocast(device.type, dtype=torch.bfloat16, enabled=options.dtype == "bf16")

    if options.batch_size > rows.num_rows:
        notes = [
            *notes,
            f"train.batch_size is {options.batch_size}, more than the {rows.num_rows} rows of the "
            "data: every update reads rows more than once",
        ]
    newest = team.from_first(lambda: _find_checkpoint(out, resume))
    state = TrainState(
        step=0,
        seconds=0.0,
        best_bound=None,
        config=config,
        data=data_fingerprint(rows.manifest),
        threads=torch.get_num_threads(),
        device=str(device),
        versions=checkpoints.versions(),
        processes=team.size,
    )
    note = None
    if newest is not None:
        state, note = _restore(newest, state, options.steps, model, average, optimizer)
    clip = objective.clip if state.clip is None else state.clip
    estimator, estimator_note = None, None  # the next-token loss has none
    if not is_autoregressive(model):
        clipped = replace(objective, clip=clip).make_estimator()
        estimator, estimator_note = for_block_size(clipped, model.config.block_size)
        estimator = diffusion_of(model.config).fitted(estimator)

    def export(state: TrainState) -> None:
        with spread.averaged(average) as averaged:
            if team.is_first:
                card = None if describe is None else describe(state)
                checkpoints.export_model(out, averaged, tokenizer, card)

    speed = Speed(model, options, device, rows.manifest.row_bos, team.size)
    began = time.perf_counter() - state.seconds
    running = _running(out, loggers, config, state.step + 1, team)

    with running as report, _StopSignals(team) as stop:
        if estimator_note is not None and objective.estimator is not None:
            notes = [*notes, estimator_note]
        for start_note in notes:
            report(state.step, {"note": start_note})
        if note is not None:
            report(state.step, {"note": note})
            # A kill may have come between the checkpoint and its export, or the end of old ones.
            export(state)
            if team.is_first:
                checkpoints.remove_old(out, checkpoint.keep)
        if search is not None and clip is not None:
            report(state.step, {"clip": list(clip)})
        for step in range(state.step + 1, options.steps + 1):
            if search is not None and search.due(step):
                with spread.averaged(average) as averaged:
                    found = search.run(averaged, step)
                report(step, found.to_log())
                state = replace(state, clip=found.clip)
                estimator = diffusion_of(model.config).fitted(search.estimators[found.clip])

            step_began = time.perf_counter()
            indices = order.indices(step - 1)
            batch = rows.rows(indices)
            free_BL = free_tokens(batch, rows.manifest.row_bos)
            if estimator is None:
                batch_loss = NextTokenLoss(batch, free_BL)
            else:
                corrupted = estimator(
                    batch.ids_BL,
                    free_BL,
                    model.config.block_size,
                    model.config.mask_id,
                    generator(options.seed, "corruption", step),
                )
                batch_loss = DiffusionLoss(batch, corrupted)

            model.train()
            losses = accumulate_gradients(
                spread, batch_loss, max(1, int(free_BL.sum())), step, options, autocast
            )
            norm = clip_gradients(model.parameters(), optim.clip_norm)
            loss, grad_norm = torch.stack([losses.sum(), norm]).tolist()  # waits for the device
            loss = team.sum(loss)
            if not (math.isfinite(loss) and math.isfinite(grad_norm)):
                where = _not_finite_where(losses, loss, indices, spread, options)
                raise UserError(_not_finite_message(step, where, checkpoints.latest(out)))

            lr = learning_rate(optim, step, options.steps)
            set_learning_rate(optimizer, lr)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            average.update(step)

            now = time.perf_counter()
            values = {
                "loss": loss,
                "lr": lr,
                "grad_norm": grad_norm,
                "tokens_per_second": round(_num_tokens(batch) / (now - step_began), 1),
                **speed.reached(batch_loss, now - step_began),
                "seconds": round(now - began, 3),
            }
            report(step, values)

            best, evaluation = state.best_bound, state.evaluation
            if not stop.seen():  # an interrupted run has no time for these
                due = [what for what in periodic if what.due(step, options.steps)]
                for values in _use_average(spread, average, due):
                    values = dict(values)
                    if measured := values.pop("evaluation", None):
                        evaluation = {**measured, "step": step}
                    report(step, values)
                    best = _lower(best, values.get("valid_bound"))

            seconds = time.perf_counter() - began
            state = replace(
                state, step=step, seconds=seconds, best_bound=best, evaluation=evaluation
            )
            interrupt = stop.seen()
            if interrupt or step % checkpoint.every == 0 or step == options.steps:
                keep = checkpoint.keep
                checkpoints.save(out, state, model, average, optimizer, keep=keep, team=team)
                export(state)
            if interrupt:
                raise Interrupted(interrupt, _farewell(interrupt, state, out, resume_command))
    return state


def accumulate_gradients(
    spread: Spread,
    batch_loss: BatchLoss,
    num_free: int,
    step: int,
    options: TrainOptions,
    autocast: torch.autocast,
) -> torch.Tensor:
    """Adds the gradient of a global batch's loss to the parameters, one micro-batch at a time.

    The loss is that of the whole batch divided by its number of free tokens `num_free`: nats per
    token, whatever the size of the micro-batches. A process passes its share of the rows.

    Returns:
        What each micro-batch of this process contributes to the loss; the sum is the loss.
    """
    passes = _passes(len(batch_loss.batch.ids_BL), options, spread.team)
    losses = []
    for number, rows in passes.items():
        # Dropout draws from PyTorch's global stream, which evaluation and samples use too.
        seed_global(options.seed, "dropout", step, number)
        with spread.last_pass(len(losses) == len(passes) - 1):
            with autocast:
                loss = spread.nats(batch_loss, rows) / num_free
            spread.backward(loss)
        losses.append(loss.detach())
    return torch.stack(losses)


def _passes(num_rows: int, options: TrainOptions, team: Team) -> dict[int, slice]:
    """The micro-batches of this process: their number in the whole batch -> their rows.

    Where `micro_batch_size` divides the processes' shares, they are those of one process.
    """
    share = team.share(num_rows)
    size = options.micro_batch_size or num_rows
    starts = range(share.start, share.stop, size)
    first = team.rank * len(starts)
    return {
        first + index: slice(start, min(start + size, share.stop))
        for index, start in enumerate(starts)
    }


def _use_average(
    spread: Spread, average: MovingAverage, due: Sequence[Periodic]
) -> Iterator[Mapping[str, Any]]:
    """What each of `due` has to say about the averaged model."""
    for what in due:
        with spread.averaged(average) as model, torch.no_grad():
            values = what.run(model.eval())
        yield values


# --- Starting and resuming ------------------------------------------------------------------------


def _check_fit(model: BlockDiffusionModel, rows: TokenRows, objective: ObjectiveOptions) -> None:
    for name, value in objective.of_network.items():
        of_model = getattr(model.config, name)
        if of_model != value:
            raise UserError(
                f"objective.name is {objective.name}, but the network's {name} is {of_model}, not "
                f"{value}; build the model for the objective"
            )
    for name in ("seq_len", "vocab_size", "mask_id"):
        of_model, of_data = getattr(model.config, name), getattr(rows.manifest, name)
        if of_model != of_data:
            raise UserError(
                f"the model's {name} is {of_model}, but the data's is {of_data}; "
                "prepare the data for this model, or build the model for the data"
            )


def _check_shares(options: TrainOptions, team: Team) -> None:
    if options.batch_size % team.size:
        raise UserError(
            f"train.batch_size is {options.batch_size}, which {team.size} processes cannot share "
            f"equally; start another number of processes, or give a multiple of {team.size}"
        )


def _find_checkpoint(out: Path, resume: bool) -> Path | None:
    """The checkpoint to go on from, if any, once `out` is found to be fit for the run."""
    if out.exists() and not out.is_dir():
        raise UserError(f"out is {out}, which is a file; choose a directory")
    if resume and not checkpoints.holds_run(out):
        raise UserError(f"{out} holds no run to resume; check out, or start without --resume")
    if not resume and checkpoints.holds_run(out):
        raise UserError(
            f"{out} already holds a run; go on with it by --resume, or choose another out=..."
        )
    return checkpoints.latest(out)


def _restore(
    newest: Path,
    fresh: TrainState,
    steps: int,
    model: nn.Module,
    average: MovingAverage,
    optimizer: torch.optim.Optimizer,
) -> tuple[TrainState, str]:
    """Loads checkpoint `newest`; returns the state to go on from, and what to tell about it."""
    has_sums = checkpoints.check_sums(newest) if current().is_first else True
    saved = checkpoints.read_state(newest)
    if saved.data != fresh.data:
        raise UserError(
            f"the prepared data are not those that the run in {newest.parent.parent} began with; "
            "resume with the same data, or start a new run in another out=..."
        )
    if saved.step > steps:
        raise UserError(
            f"train.steps is {steps}, but the run has already made {saved.step} steps; "
            "give a larger number"
        )
    checkpoints.load(newest, model, average, optimizer)
    note = f"resumed from step {saved.step}"
    if saved.step == steps:
        note = f"the run is complete: it has made its {steps} steps"
    if not has_sums:
        note += "; its checkpoint has no checksums, so damage would not be seen"
    for name in ("threads", "device", "versions", "processes"):
        before, now = getattr(saved, name), getattr(fresh, name)
        if before != now:
            note += f"; {name} changed from {before} to {now}: not bit for bit the same"
    state = replace(
        fresh,
        step=saved.step,
        seconds=saved.seconds,
        best_bound=saved.best_bound,
        clip=saved.clip,
        evaluation=saved.evaluation,
    )
    return state, note


# --- Reporting and stopping -----------------------------------------------------------------------


Report = Callable[[int, Mapping[str, Any]], None]


@contextmanager
def _running(
    out: Path, loggers: Sequence[Logger], config: Mapping[str, Any], first_step: int, team: Team
) -> Iterator[Report]:
    """The run's directory, claimed by the first process, and a function that reports there."""
    if team.is_first:
        with checkpoints.claimed(out), _reporting(out, loggers, config, first_step) as report:
            team.wait()
            yield report
        return
    team.wait()
    if not (out / "checkpoints").is_dir():
        raise UserError(
            f"out is {out}, which process {team.rank} does not see; choose a directory that all "
            "machines share"
        )
    yield lambda step, values: None


@contextmanager
def _reporting(
    out: Path, loggers: Sequence[Logger], config: Mapping[str, Any], first_step: int
) -> Iterator[Report]:
    """A function that logs values to metrics.jsonl and to every logger; saves the configuration."""
    with written_aside(out / "config.yaml") as file:
        file.write(yaml.safe_dump(dict(config), sort_keys=False, allow_unicode=True).encode())
    cut_metrics(out / "metrics.jsonl", first_step - 1)
    everyone = [JsonLines(out / "metrics.jsonl"), *loggers]

    def report(step: int, values: Mapping[str, Any]) -> None:
        for logger in everyone:
            logger.log(step, values)

    with ExitStack() as stack:
        for logger in everyone:
            logger.start(config, first_step)
            stack.callback(logger.finish)
        yield report


TWICE = 2.0  # seconds


class _StopSignals:
    """Remembers the first SIGINT or SIGTERM; a second one acts as usual.

    A process of several may get the same one twice, from who stops the job and from torchrun: what
    comes within `TWICE` is one.
    """

    def __init__(self, team: Team) -> None:
        self._team = team
        self._signal = 0
        self._again = 0.0  # from when on a signal is a second one
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> _StopSignals:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._previous[number] = signal.signal(number, self._remember)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def seen(self) -> int:
        """The signal that this process or another one got, 0 for none; all processes ask."""
        return self._team.largest(self._signal)

    def _remember(self, number: int, _frame: object) -> None:
        now = time.monotonic()
        if self._signal == 0:
            self._signal, self._again = number, now + (TWICE if self._team.size > 1 else 0)
            if self._team.is_first:
                # Not print: a handler may run in the middle of another write to the same stream.
                os.write(2, b"\nfinishing this step, then saving; once more stops at once\n")
        elif now >= self._again:
            self.__exit__()
            signal.raise_signal(number)


def _farewell(number: int, state: TrainState, out: Path, resume_command: str | None) -> str:
    message = f"{signal.Signals(number).name}: saved step {state.step} in {out}"
    return f"{message}; go on with: {resume_command}" if resume_command else message


def _not_finite_where(
    losses: torch.Tensor, total: float, indices: np.ndarray, spread: Spread, options: TrainOptions
) -> str:
    """Which micro-batch, or else which parameter, a non-finite number is first seen in.

    All processes ask; each looks at its own.
    """
    found = _first_not_finite(losses, total, indices, spread, options)
    return min(spread.team.gather(found))[1]


def _first_not_finite(
    losses: torch.Tensor, total: float, indices: np.ndarray, spread: Spread, options: TrainOptions
) -> tuple[int, str]:
    """The same for one process, and a place in the order of micro-batches and parameters."""
    passes = _passes(len(indices), options, spread.team)
    for loss, (number, share) in zip(losses.tolist(), passes.items(), strict=True):
        if not math.isfinite(loss):
            numbers = indices[share].tolist()
            rows = ", ".join(map(str, numbers[:8])) + (", ..." if len(numbers) > 8 else "")
            where = f"micro-batch {number + 1} of {len(passes) * spread.team.size} (rows {rows})"
            return number, f"the loss is {loss} in {where}"
    for place, (name, parameter) in enumerate(spread.model.named_parameters(), len(indices)):
        if parameter.grad is not None and not local(parameter.grad).isfinite().all():
            return place, f"the loss is {total:.4g} but the gradient of {name} is not finite"
    return sys.maxsize, f"the loss is {total:.4g} but the norm of the gradient overflows"


def _not_finite_message(step: int, where: str, newest: Path | None) -> str:
    kept = f"{newest} is the last good checkpoint" if newest else "there is no checkpoint yet"
    return (
        f"step {step}: {where}; the weights were left as they were before this step and {kept}; "
        "a new run with a lower optim.lr or train.dtype=float32 may hold"
    )


def _num_tokens(batch: Batch) -> int:
    return batch.ids_BL.numel() if batch.valid_BL is None else int(batch.valid_BL.sum())


def _lower(best: float | None, bound: float | None) -> float | None:
    return min((value for value in (best, bound) if value is not None), default=None)
