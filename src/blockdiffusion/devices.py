"""Which device to use, how its memory is to be kept, and how its threads wait."""

from __future__ import annotations

import ctypes
import os
import platform
import re
import time
from pathlib import Path
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


SPINS = 1000  # turns of a loop: some microseconds


def spin_briefly_if_busy() -> None:
    """On a busy machine, lets threads that wait for others of this process sleep soon.

    To be called before PyTorch is imported. GNU's OpenMP has a thread turn in a loop for
    milliseconds between two parallel parts of a network. On a quiet machine that saves waking it.
    On a busy one it holds the core that the partner it waits for needs, and both stand still. The
    number of threads stays: the last digits of results may depend on it.

    What the environment says already (`GOMP_SPINCOUNT`, `OMP_WAIT_POLICY`) counts.
    """
    if not {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT"} & os.environ.keys() and is_busy():
        os.environ["GOMP_SPINCOUNT"] = str(SPINS)


def is_busy() -> bool:
    """Whether other programs leave fewer cores than this process may use; False where Linux's
    /proc is missing."""
    try:
        spare = (os.cpu_count() or 1) - len(os.sched_getaffinity(0))
        for _ in range(5):  # a program that runs each time is no passer-by
            found = re.search(r"procs_running (\d+)", Path("/proc/stat").read_text())
            if found is None or int(found[1]) - 1 <= spare:
                return False
            time.sleep(0.004)
    except (OSError, AttributeError):
        return False
    return True


COMPILATIONS = 64  # of one function, each for other shapes


def allow_compilations() -> None:
    """Lets PyTorch compile a function for many shapes: after 8 it would go on uncompiled."""
    import torch._dynamo

    limit = torch._dynamo.config.recompile_limit
    torch._dynamo.config.recompile_limit = max(limit, COMPILATIONS)
