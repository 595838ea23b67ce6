"""Named tensors: read and written as safetensors, and compared with those of a network."""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from blockdiffusion.errors import SHOWN, UserError, few
from blockdiffusion.files.disk import create, open_regular
from blockdiffusion.files.records import Damaged, as_object, parse_json
from blockdiffusion.models.transformer import meta_model

FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
DTYPES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16",
    torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8",
    torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip
FLOAT_KINDS = {DTYPES[dtype] for dtype in FLOATS}
MOST_HEADER = 2**25  # bytes: 300,000 tensors


def check_header(path: Path) -> dict[str, Any]:
    """Return the header of a file, after checking its length and that no name appears twice.

    safetensors reads it again with every tensor, and keeps the last of two tensors of one name.

    Raises:
        Damaged: the header is longer than any in use, no JSON object, or names a tensor twice.
        UserError: the path is not a regular file.
    """
    with open_regular(path, may_be_empty=True) as file:
        length = int.from_bytes(file.read(8) or b"", "little")
        if length > MOST_HEADER:
            raise Damaged(f"its header has {length:,} bytes; at most {MOST_HEADER:,} are read")
        return as_object(parse_json(file.read(length)))


def read_safetensors(path: Path) -> dict[str, torch.Tensor]:
    """Return all tensors of a file.

    Raises:
        UserError: the file is missing, truncated or not a safetensors file.
    """
    try:
        check_header(path)
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except FileNotFoundError as error:
        raise UserError(f"there is no {path}; copy or download it again") from error
    except (SafetensorError, OSError, ValueError, TypeError, KeyError) as error:
        raise UserError(
            f"{path} is truncated or no safetensors file ({error}); copy or download it again"
        ) from error


def write_safetensors(tensors: Mapping[str, torch.Tensor], path: Path) -> str:
    """Write a new file, byte for byte as safetensors does; return its sha256.

    The library's writer gives no sum, hides the system's errors, and copies all tensors of another
    device at once.
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


def check_tensors(config: Any, given: Mapping[str, torch.Tensor], path: Path, sizes: str) -> None:
    """Refuse tensors of a file that do not fit a network, before it is built.

    Args:
        config: of the network.
        sizes: the source of the configuration, for the message.

    Raises:
        UserError: it names a tensor that is missing, unexpected, of another shape, not of floats,
            or not finite.
    """
    # A configuration may claim any number of layers; the file cannot have more than its tensors.
    config = copy.deepcopy(config)
    config.num_hidden_layers = min(config.num_hidden_layers, len(given) + 1)
    wanted = {name: tuple(x.shape) for name, x in meta_model(config).backbone.state_dict().items()}
    compare_tensors(wanted, given, path, sizes)


def compare_tensors(
    wanted: Mapping[str, tuple[int, ...]],
    given: Mapping[str, torch.Tensor],
    path: Path,
    sizes: str,
) -> None:
    """Refuse tensors of a file that are not the wanted ones, by name and shape; see
    `check_tensors`."""
    missing, unexpected = sorted(wanted.keys() - given.keys()), sorted(given.keys() - wanted.keys())
    if missing or unexpected:
        found = {"lacks": missing, "has the unexpected": unexpected}
        parts = [
            f"{what} {few([n[:SHOWN] for n in names])}" for what, names in found.items() if names
        ]
        raise UserError(f"{path} {' and '.join(parts)}; it does not fit {sizes}")
    for name, shape in wanted.items():
        if given[name].dtype not in FLOATS:
            raise UserError(f"{path}: {name} holds {given[name].dtype}, which no weights are in")
        if given[name].shape != shape:
            raise UserError(
                f"{path}: {name} has shape {tuple(given[name].shape)}, but by {sizes} it should "
                f"have {shape}"
            )
        if not is_finite(given[name]):
            raise UserError(
                f"{path}: {name} holds numbers that are not finite (nan or infinity), so the "
                "weights are damaged or have diverged; take an earlier checkpoint, or another copy"
            )


def is_finite(tensor: torch.Tensor) -> bool:
    """Return whether a tensor of floats has neither nan nor infinity."""
    # A sum reads the tensor once and writes nothing, and is not finite if an element is not.
    total = tensor.sum(dtype=torch.promote_types(tensor.dtype, torch.float32))
    return bool(total.isfinite()) or bool(tensor.isfinite().all())
