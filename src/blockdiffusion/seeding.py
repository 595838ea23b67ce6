"""Random streams that are functions of a seed and of names, not of what ran before.

Every random draw of training and evaluation comes from a stream named by what it is for
(`("corruption", step)`, `("dropout", step, micro_batch)`), so that resuming, accumulation and the
number of processes never change a draw.
"""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

from blockdiffusion.errors import UserError, check_whole

if TYPE_CHECKING:
    import torch


def derive_seed(seed: int, *names: int | str) -> int:
    """A 63-bit seed for the stream `names` of `seed`; equal on every machine and Python version."""
    text = "\x1f".join([str(int(seed)), *(f"{type(n).__name__}:{n}" for n in names)])
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1


def generator(seed: int, *names: int | str) -> torch.Generator:
    """A fresh CPU `torch.Generator` for the stream `names` of `seed`."""
    import torch

    return torch.Generator().manual_seed(derive_seed(seed, *names))


def seeded(seed: int) -> torch.Generator:
    """A fresh CPU `torch.Generator` of this very seed, as a caller gives it.

    Raises:
        UserError: PyTorch has no such seed.
    """
    import torch

    check_whole("seed", seed)
    if not 0 <= seed < 2**64:
        raise UserError(f"seed is {seed}; it must lie in 0..2**64 - 1")
    return torch.Generator().manual_seed(seed)
