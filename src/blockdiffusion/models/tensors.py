"""Tensors by name: read and written as safetensors, and compared with what a network has."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from blockdiffusion.errors import UserError
from blockdiffusion.files import create

DTYPES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16",
    torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8",
    torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip


def read_safetensors(path: Path) -> dict[str, torch.Tensor]:
    """All tensors of a file.

    Raises:
        UserError: it is missing, truncated or no safetensors file.
    """
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except FileNotFoundError as error:
        raise UserError(f"there is no {path}; copy or download it again") from error
    except (SafetensorError, OSError) as error:
        raise UserError(
            f"{path} is truncated or no safetensors file ({error}); copy or download it again"
        ) from error


def write_safetensors(tensors: Mapping[str, torch.Tensor], path: Path) -> str:
    """Writes a new file, the one that safetensors would write; returns its sha256.

    Its own writer holds no sum, hides from Python what the system said, and makes a whole copy of
    tensors that are on another device.

    Raises:
        OSError: it cannot be written.
    """
    names = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name in names:
        tensor = tensors[name]
        begin, end = end, end + tensor.numel() * tensor.element_size()
        kind, shape = DTYPES[tensor.dtype], list(tensor.shape)
        header[name] = {"dtype": kind, "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    digest = hashlib.sha256()
    with create(path) as file, ThreadPoolExecutor(1) as other:  # to hash while it is written

        def write(content: bytes | memoryview) -> None:
            hashed = other.submit(digest.update, content)
            file.write(content)
            hashed.result()

        write(len(text).to_bytes(8, "little") + text)
        for name in names:
            if tensors[name].numel():
                flat = tensors[name].detach().contiguous().cpu().reshape(-1)
                write(flat.view(torch.uint8).numpy().data)
    return digest.hexdigest()


def check_tensors(
    wanted: Mapping[str, torch.Tensor], given: Mapping[str, torch.Tensor], path: Path, sizes: str
) -> None:
    """Refuses tensors of a file that are not those of a network.

    Args:
        sizes: what the network was built after, for the message.

    Raises:
        UserError: a tensor is missing, unexpected, of another shape or no floats; it is named.
    """
    missing, unexpected = sorted(wanted.keys() - given.keys()), sorted(given.keys() - wanted.keys())
    if missing or unexpected:
        parts = []
        if missing:
            parts.append(f"lacks {few(missing)}")
        if unexpected:
            parts.append(f"has the unexpected {few(unexpected)}")
        raise UserError(f"{path} {' and '.join(parts)}; it does not fit {sizes}")
    for name, tensor in wanted.items():
        if not given[name].is_floating_point():
            raise UserError(f"{path}: {name} holds {given[name].dtype}, which no weights are in")
        if tensor.shape != given[name].shape:
            raise UserError(
                f"{path}: {name} has shape {tuple(given[name].shape)}, but by {sizes} it should "
                f"have {tuple(tensor.shape)}"
            )


def few(names: list[str], most: int = 3) -> str:
    """The first names, and how many more there are."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more
