"""Which device to use."""

from __future__ import annotations

from typing import TYPE_CHECKING

from blockdiffusion.errors import UserError

if TYPE_CHECKING:
    import torch


def select_device(name: str, option: str = "device") -> torch.device:
    """The device called `name`; "auto" takes CUDA, then MPS, then the CPU.

    Args:
        option: what the user would change, for the message.

    Raises:
        UserError: there is no such device, or not on this machine.
    """
    import torch

    has = {
        "cuda": torch.cuda.is_available(),
        "mps": torch.backends.mps.is_available(),
        "cpu": True,
    }
    if name == "auto":
        return torch.device(next(kind for kind, there in has.items() if there))
    if not has.get(name, False):
        there = ", ".join(kind for kind, present in has.items() if present)
        raise UserError(f"{option} is {name}, but this machine has only {there}; use one or auto")
    return torch.device(name)
