"""The start of a run: checks of the model, the data and the directory; a checkpoint, if any."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

from blockdiffusion.data.loader import TokenRows
from blockdiffusion.errors import UserError
from blockdiffusion.models.transformer import BlockDiffusionModel
from blockdiffusion.runtime.distributed import ProcessGroup, current_group
from blockdiffusion.train import checkpoint as checkpoints
from blockdiffusion.train.checkpoint import TrainState
from blockdiffusion.train.optim import MovingAverage
from blockdiffusion.train.options import ObjectiveOptions, TrainOptions


def check_fit(model: BlockDiffusionModel, rows: TokenRows, objective: ObjectiveOptions) -> None:
    config = model.full_config()
    for name, value in objective.of_network.items():
        of_model = getattr(config, name)
        if of_model != value:
            raise UserError(
                f"objective.name is {objective.name}, but the network's {name} is {of_model}, not "
                f"{value}; build the model for the objective"
            )
    for name in ("seq_len", "vocab_size", "mask_id"):
        of_model, of_data = getattr(config, name), getattr(rows.manifest, name)
        if of_model != of_data:
            raise UserError(
                f"the model's {name} is {of_model}, but the data's is {of_data}; "
                "prepare the data for this model, or build the model for the data"
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
    state = replace(
        fresh,
        step=saved.step,
        seconds=saved.seconds,
        best_bound=saved.best_bound,
        clip=saved.clip,
        evaluation=saved.evaluation,
    )
    return state, note
