"""Checkpoints of a run: written aside and renamed, without pickle, resumed bit for bit.

A run lives in one directory:

    config.yaml                  the resolved configuration
    metrics.jsonl                one line per step, evaluation and set of samples
    checkpoints/step-00001000/   weights, average and optimizer as safetensors, and state.json
                                 (of processes that hold shards: a file of each), SHA256SUMS
    model/                       the averaged weights and the tokenizer, ready to be loaded

A kill at any moment leaves a whole checkpoint under its final name or none. What is being written
or removed is called `.*.partial`; the next start clears it. Checkpoints and the model have
checksums (`checksums`): a run is not resumed from a changed file.
"""

from __future__ import annotations

import json
import math
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from blockdiffusion.checkpoints.card import Card, check_evaluation, write_card
from blockdiffusion.checkpoints.formats import write_model
from blockdiffusion.errors import UserError, shown
from blockdiffusion.files.checksums import (
    accept,
    differing,
    named,
    read_sums,
    sums_of,
    write_sums,
)
from blockdiffusion.files.directories import publish_directory, sync, writing
from blockdiffusion.files.disk import create, locked, remove, storage_error
from blockdiffusion.files.records import (
    MOST_JSON,
    Damaged,
    as_object,
    build,
    parse_json,
    read_bytes,
)
from blockdiffusion.limits import check_limits
from blockdiffusion.models.block_diffusion import BlockDiffusion
from blockdiffusion.options import option
from blockdiffusion.runtime.distributed import SINGLE, ProcessGroup, is_sharded
from blockdiffusion.train.optim import (
    MovingAverage,
    moments_of,
    optimizer_state_keys,
    set_moments,
    trainable,
)
from blockdiffusion.train.tensor_files import SavedTensors, damaged, save_tensors

FORMAT = "blockdiffusion-checkpoint-1"
WEIGHTS, AVERAGE, OPTIMIZER = "weights.safetensors", "average.safetensors", "optimizer.safetensors"
STATE = "state.json"


@dataclass(frozen=True, kw_only=True, slots=True)
class CheckpointOptions:
    """When checkpoints are written; one is always written at the end and when interrupted."""

    every: int = option(1000, "steps between two checkpoints")
    keep: int = option(2, "how many checkpoints to keep; older ones are removed")

    def __post_init__(self) -> None:
        check_limits(self, "checkpoint.")


@dataclass(frozen=True, kw_only=True)
class TrainState:
    """The contents of a checkpoint besides tensors."""

    step: int
    """Updates made."""
    seconds: float
    """Wall-clock time of training, summed over all resumes."""
    best_bound: float | None
    """The lowest validation bound so far, nats per token."""
    config: dict[str, Any]
    data: str
    """Fingerprint of the prepared data."""
    threads: int
    """Threads of the CPU operators; results are equal bit for bit only at an equal number."""
    device: str
    versions: dict[str, str]
    clip: tuple[float, float] | None = None
    """The clip of the last schedule search; None: no search yet, the recipe's clip is used."""
    evaluation: dict[str, Any] | None = None
    """The last evaluation: its step, what it measured and how; None: none yet."""
    processes: int = 1
    """The number of processes; with another number sums round differently."""


# --- The run directory ----------------------------------------------------------------------------


def holds_run(out: Path) -> bool:
    """Return whether a new run would overwrite something in `out`."""
    names = ("config.yaml", "metrics.jsonl", "checkpoints", "model")
    return any((out / name).exists() for name in names)


@contextmanager
def claimed(out: Path) -> Iterator[None]:
    """Make the run's directory, lock it against a second process and clear it of leftovers.

    Raises:
        UserError: another process is at work in it, or it cannot be written.
    """
    taken = (
        f"another process is training in {out} right now; wait for it, or choose another out=..."
    )
    with ExitStack() as stack:
        try:
            (out / "checkpoints").mkdir(parents=True, exist_ok=True)
            stack.enter_context(locked(out / ".lock", taken))
            for folder in (out, out / "checkpoints"):
                for path in folder.glob(".*.partial"):
                    remove(path)
        except OSError as error:
            raise storage_error(error, out) from error
        yield


def latest(out: Path) -> Path | None:
    """Return the directory of the newest checkpoint in `out`, or None."""
    checkpoints = _all_checkpoints(out)
    return checkpoints[-1] if checkpoints else None


# --- Saving ---------------------------------------------------------------------------------------


def save(
    out: Path,
    state: TrainState,
    model: nn.Module,
    average: MovingAverage,
    optimizer: torch.optim.Optimizer,
    *,
    keep: int,
    processes: ProcessGroup = SINGLE,
) -> Path:
    """Write checkpoint `state.step` of the run in `out` and remove all but the last `keep`.

    All `processes` call it. Each writes its shards; the first writes what is not sharded.

    Raises:
        UserError: it cannot be written. The earlier checkpoints stay, and nothing of the new one
            (the next start clears shards that other processes may be writing).
    """
    final = out / "checkpoints" / f"step-{state.step:08d}"
    partial = final.with_name(f".{final.name}.partial")
    parameters = trainable(model)
    tensors: dict[str, dict[str, torch.Tensor]] = {
        WEIGHTS: {name: p.detach() for name, p in parameters.items()},
        AVERAGE: average.average,
        OPTIMIZER: {
            f"{name}.{key}": tensor
            for name, p in parameters.items()
            for key, tensor in moments_of(optimizer, p).items()
        },
    }
    sharded = any(map(is_sharded, tensors[WEIGHTS].values()))
    if not (sharded or processes.is_first):
        return final
    with writing(f"checkpoint {final}", None if sharded else partial):
        if processes.is_first:
            partial.mkdir(parents=True)
        if sharded:
            processes.barrier()  # the directory exists
        sums: dict[str, str] = {}
        for name, tensors_of_file in tensors.items():
            path, sums[path.name] = save_tensors(tensors_of_file, partial / name, processes)
            sync(path)
        if sharded:  # of all processes' files
            sums = {name: s for part in processes.gather(sums) for name, s in part.items()}
        if not processes.is_first:
            return final
        text = json.dumps({"format": FORMAT, **asdict(state)}, indent=2)
        with create(partial / STATE) as file:
            file.write(f"{text}\n".encode())
        write_sums(partial, sums_of(partial, sums))
        publish_directory(partial, final)
    remove_old(out, keep)
    return final


def remove_old(out: Path, keep: int) -> None:
    """Remove all but the last `keep` checkpoints."""
    with writing(f"checkpoints of {out}"):
        for old in _all_checkpoints(out)[:-keep]:
            # Renamed first: a kill in the middle must not leave half of it under its name.
            shutil.rmtree(old.rename(old.with_name(f".{old.name}.partial")))


def export_model(
    out: Path, model: BlockDiffusion, tokenizer: Path | None, card: Card | None = None
) -> None:
    """Write the weights of `model`, the tokenizer's files and the model card to `out`/model/.

    The files of an earlier export are replaced one by one. Only the weights and the card differ
    between two exports of a run, so the directory can be loaded at every moment.

    Raises:
        UserError: it cannot be written; an earlier export stays.
    """
    final, partial = out / "model", out / ".model.partial"
    with writing(f"model {final}", partial):
        partial.mkdir()
        for path in [] if tokenizer is None else tokenizer.iterdir():
            shutil.copyfile(path, partial / path.name)  # without its permissions
        sums = write_model(model, partial)
        if card is not None:
            write_card(partial, model.full_config(), card)
        write_sums(partial, sums_of(partial, sums))
        publish_directory(partial, final)


# --- Loading --------------------------------------------------------------------------------------


def read_state(checkpoint: Path) -> TrainState:
    """Read the state of a checkpoint directory.

    Raises:
        UserError: state.json is missing, damaged, or of another format.
    """
    path = checkpoint / STATE
    try:
        loaded = as_object(parse_json(read_bytes(path, MOST_JSON), finite=False))
        if loaded.get("format") != FORMAT:
            raise Damaged(f"its format is {shown(loaded.get('format'))}")
        state = build(TrainState, loaded, strict=False)
        if state.step < 0 or state.processes < 1 or not 0 <= state.seconds < math.inf:
            raise Damaged("its step, its seconds or its processes are no such number")
        check_evaluation(state.evaluation)
        return state
    except (OSError, Damaged) as error:
        raise damaged(path, f"it cannot be read as a {FORMAT} state: {error}") from error


def check_sums(checkpoint: Path) -> bool:
    """Compare a checkpoint's files with their checksums; return whether it has any.

    Raises:
        UserError: a file is missing or changed.
    """
    sums = read_sums(checkpoint)
    if sums is not None and (bad := differing(checkpoint, sums)):
        raise UserError(
            f"cannot resume: {named(checkpoint, bad)}; remove the directory {checkpoint} to resume "
            f"from the checkpoint before it, or {accept(checkpoint)}"
        )
    return sums is not None


def load(
    checkpoint: Path,
    model: nn.Module,
    average: MovingAverage,
    optimizer: torch.optim.Optimizer,
) -> TrainState:
    """Restore weights, average and optimizer from a checkpoint directory; return its state.

    Raises:
        UserError: a file is missing, truncated, or belongs to a model of another shape.
    """
    state = read_state(checkpoint)
    parameters = trainable(model)
    weights = SavedTensors(checkpoint / WEIGHTS, _shapes(parameters))
    averages = SavedTensors(checkpoint / AVERAGE, _shapes(average.average))
    kept = {name: optimizer_state_keys(optimizer, p) for name, p in parameters.items()}
    shapes = {
        f"{name}.{key}": () if key == "step" else tuple(p.shape)
        for name, p in parameters.items()
        for key in kept[name]
    }
    # A parameter that never had a gradient has no moments.
    moments = SavedTensors(checkpoint / OPTIMIZER, shapes, may_lack=True)
    with torch.no_grad():
        for name, parameter in parameters.items():
            weights.read_into(parameter, name)
            averages.read_into(average.average[name], name)
            given = [key for key in kept[name] if f"{name}.{key}" in moments]
            if given and len(given) < len(kept[name]):
                raise damaged(checkpoint / OPTIMIZER, f"it has only a part of {name}'s moments")
            read = {
                key: moments.read_into(_like_moment(parameter, key), f"{name}.{key}")
                for key in given
            }
            set_moments(optimizer, parameter, read)
    if state.step and not any(optimizer.state[p] for p in parameters.values()):
        raise damaged(checkpoint / OPTIMIZER, f"it has no moments, after {state.step} steps")
    return state


def _like_moment(parameter: torch.Tensor, key: str) -> torch.Tensor:
    if key == "step":
        return torch.empty((), dtype=torch.float32, device=parameter.device)
    return torch.empty_like(parameter, requires_grad=False)


def _shapes(tensors: Mapping[str, torch.Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def _all_checkpoints(out: Path) -> list[Path]:
    found = (out / "checkpoints").glob("step-*")
    return sorted(path for path in found if re.fullmatch(r"step-\d{8,}", path.name))
