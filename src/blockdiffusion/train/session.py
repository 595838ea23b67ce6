"""What surrounds the training loop: checks, the run's directory and log, restoring, and signals."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import nn

from blockdiffusion.data.loader import TokenRows
from blockdiffusion.errors import UserError
from blockdiffusion.files.disk import written_aside
from blockdiffusion.models.block_diffusion import BlockDiffusion
from blockdiffusion.models.causal_lm import has_vocabulary
from blockdiffusion.runtime.distributed import ProcessGroup, current_group
from blockdiffusion.train import checkpoint as checkpoints
from blockdiffusion.train.checkpoint import TrainState
from blockdiffusion.train.loggers import JsonLines, Logger, cut_metrics
from blockdiffusion.train.optim import MovingAverage
from blockdiffusion.train.options import ObjectiveOptions, TrainOptions

Report = Callable[[int, Mapping[str, Any]], None]


class Interrupted(Exception):
    """A signal ended the run after its step was finished and saved.

    Attributes:
        exit_code: by the shell's convention for the signal (130, 143).
    """

    def __init__(self, number: int, message: str):
        self.signal = signal.Signals(number)
        super().__init__(f"{self.signal.name}: {message}")
        self.exit_code = 128 + number


@contextmanager
def running(
    out: Path,
    loggers: Sequence[Logger],
    config: Mapping[str, Any],
    first_step: int,
    processes: ProcessGroup,
) -> Iterator[Report]:
    """Yield a function that reports into the run's directory, which the first process claims."""
    if processes.is_first:
        with checkpoints.claimed(out), _reporting(out, loggers, config, first_step) as report:
            processes.barrier()
            yield report
        return
    processes.barrier()
    if not (out / "checkpoints").is_dir():
        raise UserError(
            f"out is {out}, which process {processes.rank} does not see; choose a directory "
            "that all machines share"
        )
    yield lambda step, values: None


@contextmanager
def _reporting(
    out: Path, loggers: Sequence[Logger], config: Mapping[str, Any], first_step: int
) -> Iterator[Report]:
    """Save the configuration; yield a function that logs to metrics.jsonl and every logger."""
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


TWICE = 2.0  # seconds in which a signal that comes twice counts once


class StopSignals:
    """Remembers the first SIGINT or SIGTERM; a second one acts as usual.

    One of several processes may get the same signal twice, from the user and from torchrun.
    """

    def __init__(self, processes: ProcessGroup) -> None:
        self._processes = processes
        self._signal = 0
        self._again = 0.0  # when a second signal starts to count
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._previous[number] = signal.signal(number, self._remember)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def seen(self) -> int:
        """Return the signal that a process got, 0 for none; collective."""
        return self._processes.max(self._signal)

    def _remember(self, number: int, _frame: object) -> None:
        now = time.monotonic()
        if self._signal == 0:
            self._signal, self._again = number, now + (TWICE if self._processes.size > 1 else 0)
            if self._processes.is_first:
                # Not print: a handler may run in the middle of another write to the same stream.
                os.write(2, b"\nfinishing this step, then saving; once more stops at once\n")
        elif now >= self._again:
            self.__exit__()
            signal.raise_signal(number)


# --- The start of a run ---------------------------------------------------------------------------


def check_fit(model: BlockDiffusion, rows: TokenRows, objective: ObjectiveOptions) -> None:
    config = model.config
    for name, value in objective.of_network.items():
        of_model = getattr(config, name, getattr(model.backbone.config, name, value))
        if of_model != value:
            raise UserError(
                f"objective.name is {objective.name}, but the network's {name} is {of_model}, not "
                f"{value}; build the model for the objective"
            )
    for name in ("seq_len", "vocab_size", "mask_id"):
        of_model, of_data = getattr(config, name), getattr(rows.manifest, name)
        fits = has_vocabulary(model, of_data) if name == "vocab_size" else of_model == of_data
        if not fits:
            raise UserError(
                f"the model's {name} is {of_model}, but the data's is {of_data}; "
                "prepare the data for this model, or build the model for the data"
            )
    if rows.manifest.packing == "chat":
        _check_chat(model, rows)
    predicts_next = config.reading != "same" and config.clean_attention == "causal"
    if objective.ar_loss and not predicts_next:
        raise UserError(
            f"objective.ar_loss is {objective.ar_loss}, but the network reads its own token or "
            "sees clean tokens in blocks, so its clean stream predicts no next token; set "
            "objective.ar_loss=0, or adapt a causal model with its own reading and attention"
        )


def _check_chat(model: BlockDiffusion, rows: TokenRows) -> None:
    size, align = model.config.block_size, rows.manifest.options.get("align")
    if model.config.is_autoregressive:
        raise UserError(
            "the data hold conversations, several in a row, which the autoregressive baseline "
            "cannot keep apart; train with another objective.name, or adapt with model.block_size=1"
        )
    if not isinstance(align, int) or align % size:
        raise UserError(
            f"model.block_size is {size}, which does not divide the data's align={align}, so a "
            f"block would span two conversations; prepare the data with --align {size}"
        )


def check_shares(options: TrainOptions, processes: ProcessGroup) -> None:
    if options.batch_size % processes.size:
        raise UserError(
            f"train.batch_size is {options.batch_size}, which {processes.size} processes cannot "
            "share equally; start another number of processes, or give a multiple of "
            f"{processes.size}"
        )


def find_checkpoint(out: Path, resume: bool) -> Path | None:
    """Return the checkpoint to resume from, if any, after checking that `out` fits the run."""
    if out.exists() and not out.is_dir():
        raise UserError(f"out is {out}, which is a file; choose a directory")
    if resume and not checkpoints.holds_run(out):
        raise UserError(f"{out} holds no run to resume; check out, or start without --resume")
    if not resume and checkpoints.holds_run(out):
        raise UserError(
            f"{out} already holds a run; resume it with --resume, or choose another out=..."
        )
    return checkpoints.latest(out)


def restore(
    newest: Path,
    fresh: TrainState,
    steps: int,
    model: nn.Module,
    average: MovingAverage,
    optimizer: torch.optim.Optimizer,
) -> tuple[TrainState, str]:
    """Load checkpoint `newest`; return the state to resume from and a note for the log."""
    has_sums = checkpoints.check_sums(newest) if current_group().is_first else True
    saved = checkpoints.read_state(newest)
    if saved.data != fresh.data:
        raise UserError(
            f"the prepared data are not those of the run in {newest.parent.parent}; resume with "
            "the same data, or start a new run in another out=..."
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
    names = ("step", "seconds", "best_bound", "clip", "evaluation")
    return replace(fresh, **{name: getattr(saved, name) for name in names}), note
