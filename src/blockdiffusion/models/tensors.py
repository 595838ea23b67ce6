"""Tensors by name: read from safetensors, and compared with what a network has."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from blockdiffusion.errors import UserError


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
