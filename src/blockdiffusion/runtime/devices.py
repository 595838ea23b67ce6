"""Choice of the device, reuse of freed memory, and waiting threads."""

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
    """Return the device called `name`; "auto" takes CUDA, then MPS, then the CPU.

    Args:
        option: its name in messages.

    Raises:
        UserError: this machine has no such device.
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
    """Let this process keep the memory that it frees, for its next allocations.

    By default glibc returns blocks above 32 MB to the kernel at once and gets them again page by
    page, filled with zeros, in every step of a training with such large activations.

    Returns:
        Whether it was done: only with glibc, and unless the environment sets its own thresholds
        (`MALLOC_..._`, `GLIBC_TUNABLES`).
    """
    own = any(name.startswith("MALLOC_") or name == "GLIBC_TUNABLES" for name in os.environ)
    if own or platform.libc_ver()[0] != "glibc":
        return False
    mallopt = ctypes.CDLL(None).mallopt
    return all(mallopt(name, MOST) == 1 for name in (TRIM_THRESHOLD, MMAP_THRESHOLD))


SPINS = 1000  # turns of a loop: some microseconds


def spin_briefly_if_busy() -> None:
    """On a busy machine, let waiting threads of this process sleep after a short spin.

    Call it before PyTorch is imported. Between two parallel regions GNU OpenMP lets a thread spin
    for milliseconds, which saves waking it. On a busy machine the spin occupies the core that the
    other thread needs. The number of threads does not change, because the last digits of results
    may depend on it. `GOMP_SPINCOUNT` and `OMP_WAIT_POLICY` of the environment take precedence.
    """
    if not {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT"} & os.environ.keys() and is_busy():
        os.environ["GOMP_SPINCOUNT"] = str(SPINS)


def is_busy() -> bool:
    """Return whether other programs leave this process fewer cores than it may use.

    Without Linux's /proc it is False.
    """
    try:
        spare = (os.cpu_count() or 1) - len(os.sched_getaffinity(0))
        for _ in range(5):  # programs that run only briefly do not count
            found = re.search(r"procs_running (\d+)", Path("/proc/stat").read_text())
            if found is None or int(found[1]) - 1 <= spare:
                return False
            time.sleep(0.004)
    except (OSError, AttributeError):
        return False
    return True


COMPILATIONS = 64  # of one function, each for other shapes


def allow_compilations() -> None:
    """Let PyTorch compile a function for many shapes: after 8 it would run uncompiled."""
    import torch._dynamo

    limit = torch._dynamo.config.recompile_limit
    torch._dynamo.config.recompile_limit = max(limit, COMPILATIONS)
