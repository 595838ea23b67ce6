"""Tensors by name: read from safetensors, and compared with what a network has."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from blockdiffusion.costs import Network
from blockdiffusion.errors import UserError
from blockdiffusion.records import shown

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


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
    except (SafetensorError, OSError, ValueError, TypeError, KeyError) as error:
        raise UserError(
            f"{path} is truncated or no safetensors file ({error}); copy or download it again"
        ) from error


def check_tensors(config: Any, given: Mapping[str, torch.Tensor], path: Path, sizes: str) -> None:
    """Refuses tensors of a file that are not those of a network, before that is built.

    Args:
        config: of the network.
        sizes: where the configuration comes from, for the message.

    Raises:
        UserError: a tensor is missing, unexpected, of another shape, no floats or not finite; it
            is named.
    """
    # No more than can be there: a configuration may claim any number of layers.
    shapes = Network.of(config).shapes()
    wanted = dict(islice(shapes, len(given) + 4))
    missing, unexpected = sorted(wanted.keys() - given.keys()), sorted(given.keys() - wanted.keys())
    if missing or unexpected:
        parts = []
        if missing:
            parts.append(f"lacks {few(missing)}")
        if unexpected:
            parts.append(f"has the unexpected {few(unexpected)}")
        raise UserError(f"{path} {' and '.join(parts)}; it does not fit {sizes}")
    for name, shape in wanted.items():
        if given[name].dtype not in DTYPES:
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
    """Whether a tensor of floats has neither nan nor infinity."""
    # A sum reads the tensor once and writes nothing; it is not finite where an element is not.
    total = tensor.sum(dtype=torch.promote_types(tensor.dtype, torch.float32))
    return bool(total.isfinite()) or bool(tensor.isfinite().all())


def few(names: list[str], most: int = 3) -> str:
    """The first names, and how many more there are."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(shown(name)[1:-1] for name in names[:most]) + more
