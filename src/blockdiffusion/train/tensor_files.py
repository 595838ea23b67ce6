"""Named tensors in safetensors files: in one file, or in one per process that holds shards.

A shard is some rows (of the first dimension) of a tensor, in the order of the ranks. Any number of
processes can read the files of any other number: each reads the rows that it holds.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from blockdiffusion.checkpoints.tensors import (
    FLOAT_KINDS,
    check_header,
    is_finite,
    write_safetensors,
)
from blockdiffusion.errors import UserError, shown
from blockdiffusion.files.records import Damaged
from blockdiffusion.runtime.distributed import ProcessGroup, first_row, is_sharded, local

Shape = tuple[int, ...]


def save_tensors(
    tensors: Mapping[str, torch.Tensor], path: Path, processes: ProcessGroup
) -> tuple[Path, str]:
    """Write the tensors; of sharded ones, the rows that this process holds.

    The first process writes what is not sharded.

    Returns:
        The file (`path`; with shards, weights-00001-of-00002.safetensors and the like), and its
        sha256.
    """
    if any(map(is_sharded, tensors.values())):
        rank = f"{processes.rank + 1:05d}-of-{processes.size:05d}"
        path = path.with_name(f"{path.stem}-{rank}{path.suffix}")
    own = {n: local(t) for n, t in tensors.items() if processes.is_first or is_sharded(t)}
    return path, write_safetensors(own, path)


class SavedTensors:
    """The files of `save_tensors`, checked but not yet read.

    Args:
        path: of the one file; the files of several processes are beside it.
        shapes: of the tensors that must be there, whole.
        may_lack: whether some may be missing.

    Raises:
        UserError: a file is missing or truncated, or belongs to another model.
    """

    def __init__(self, path: Path, shapes: Mapping[str, Shape], may_lack: bool = False):
        parts = {file: _read_shapes(file) for file in _files(path)}
        names = next(iter(parts.values())).keys()  # the first file has a part of everything
        for name in sorted(shapes.keys() ^ names):
            if name in shapes and may_lack:
                continue
            problem = "lacks the" if name in shapes else "has the unexpected"
            raise damaged(path, f"it {problem} tensor {name}, so it is not of this model")
        self._pieces: dict[str, list[tuple[Path, Shape]]] = {}
        for name in names:
            pieces = [(file, part[name]) for file, part in parts.items() if name in part]
            given, wanted = _joined([shape for _, shape in pieces]), shapes[name]
            if given != wanted:
                raise damaged(path, f"{name} has shape {given} where this model has {wanted}")
            self._pieces[name] = pieces

    def __contains__(self, name: str) -> bool:
        return name in self._pieces

    def read_into(self, tensor: torch.Tensor, name: str) -> torch.Tensor:
        """Copy the tensor `name`, or the rows of a shard, into `tensor`; return `tensor`."""
        own, first = local(tensor), first_row(tensor)
        start, file = 0, None  # the first row of a file
        for file, shape in self._pieces[name]:
            if not shape:
                with safe_open(file, "pt") as opened:
                    own.copy_(opened.get_tensor(name))
                continue
            low, high = max(start, first), min(start + shape[0], first + len(own))
            if low < high:
                with safe_open(file, "pt") as opened:
                    rows = opened.get_slice(name)[low - start : high - start]
                own[low - first : high - first].copy_(rows)
            start += shape[0]
        if not is_finite(own):
            raise damaged(file, f"{name} holds numbers that are not finite")
        return tensor


def _files(path: Path) -> list[Path]:
    shards = sorted(path.parent.glob(f"{path.stem}-*-of-*{path.suffix}"))
    if path.exists() or not shards:
        return [path]
    number = shards[0].stem.rpartition("-")[2]
    count = int(number) if number.isdecimal() else 0
    if len(shards) != count:
        raise damaged(path, f"it has {len(shards)} of the {count} files of its processes")
    return shards


def _read_shapes(file: Path) -> dict[str, Shape]:
    try:
        check_header(file)
        with safe_open(file, "pt") as opened:
            stored = {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118 (no dict)
            shapes = {name: tuple(tensor.get_shape()) for name, tensor in stored.items()}
            kinds = {name: tensor.get_dtype() for name, tensor in stored.items()}
    except (OSError, SafetensorError, Damaged) as error:
        why = f"it is missing, truncated or not safetensors: {error}"
        raise damaged(file, why) from error
    for name, kind in kinds.items():
        if kind not in FLOAT_KINDS:
            raise damaged(file, f"{shown(name)} holds {kind}, which no checkpoint does")
    return shapes


def _joined(shapes: list[Shape]) -> Shape:
    return (sum(shape[0] for shape in shapes), *shapes[0][1:]) if shapes[0] else ()


def damaged(path: Path, why: str) -> UserError:
    """Return the error for an unusable file of a checkpoint."""
    return UserError(
        f"cannot resume from {path}: {why}; remove the directory {path.parent} to resume from the "
        "checkpoint before it"
    )
