"""Which device to use, how its memory is to be kept, and how its threads wait."""

from __future__ import annotations

import ctypes
import os
import platform
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


# Parameters of glibc's mallopt, and the largest value it takes.
TRIM_THRESHOLD, MMAP_THRESHOLD, MOST = -1, -3, 2**31 - 1


def keep_freed_memory() -> bool:
    """Lets this process keep the memory that it frees, for what it allocates next.

    By default the C library of Linux gives blocks above 32 MB back to the kernel at once and gets
    them again page by page, filled with zeros: as many bytes more to write in every step of a
    training whose activations are so large.

    Returns:
        Whether it was done: with glibc only, and not where the environment sets its own thresholds
        (`MALLOC_..._`, `GLIBC_TUNABLES`).
    """
    own = any(name.startswith("MALLOC_") or name == "GLIBC_TUNABLES" for name in os.environ)
    if own or platform.libc_ver()[0] != "glibc":
        return False
    mallopt = ctypes.CDLL(None).mallopt
    return all(mallopt(name, MOST) == 1 for name in (TRIM_THRESHOLD, MMAP_THRESHOLD))


SPINS = 1000  # turns of a loop: some microseconds, as long as it takes to wake a thread


def spin_briefly() -> None:
    """Lets threads that wait for others of this process sleep soon, before PyTorch is imported.

    By default GNU's OpenMP has a thread turn in a loop for milliseconds between two parallel parts
    of a network. On a busy machine it holds the core that the partner it waits for needs, and both
    stand still. On a quiet one the partner is there before it would sleep. The number of threads
    stays: results may differ in their last digits with it.

    What the environment says already (`GOMP_SPINCOUNT`, `OMP_WAIT_POLICY`) counts.
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", str(SPINS))


COMPILATIONS = 64  # of one function, each for other shapes


def allow_compilations() -> None:
    """Lets PyTorch compile a function for many shapes: after 8 it would go on uncompiled."""
    import torch._dynamo

    limit = torch._dynamo.config.recompile_limit
    torch._dynamo.config.recompile_limit = max(limit, COMPILATIONS)
