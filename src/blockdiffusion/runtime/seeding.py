"""Random streams that are functions of a seed and of names, whatever ran before.

Every random draw of training and evaluation comes from a stream named after its purpose
(`("corruption", step)`, `("dropout", step, micro_batch)`), so resuming, accumulation and the number
of processes never change a draw.
"""

from __future__ import annotations

import hashlib
import secrets
import sys
from array import array
from typing import TYPE_CHECKING

from blockdiffusion.errors import UserError, check_whole

if TYPE_CHECKING:
    import torch

TWISTER_WORDS = 624  # of 32 bits each


def derive_seed(seed: int, *names: int | str) -> int:
    """Return a 63-bit seed for the stream `names` of `seed`, equal on every machine."""
    digest = hashlib.blake2b(_named(seed, names).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def generator(seed: int, *names: int | str) -> torch.Generator:
    """Return a new CPU `torch.Generator` for the stream `names` of `seed`."""
    return _expanded(_named(seed, names))


def seeded(seed: int) -> torch.Generator:
    """Return a new CPU `torch.Generator` for a caller's seed.

    Raises:
        UserError: the seed is out of range or not a whole number.
    """
    check_whole("seed", seed)
    if not 0 <= seed < 2**64:
        raise UserError(f"seed is {seed}; it must lie in 0..2**64 - 1")
    return _expanded(f"seed {int(seed)}")


def fresh_seed() -> int:
    """Return a random seed."""
    return secrets.randbits(63)


def seed_global(seed: int, *names: int | str) -> None:
    """Seed PyTorch's global generators (of dropout and initial weights) with the stream `names`."""
    import torch

    torch.manual_seed(derive_seed(seed, *names))  # GPUs, whose generators read all 64 bits
    torch.set_rng_state(generator(seed, *names).get_state())


def _named(seed: int, names: tuple[int | str, ...]) -> str:
    return "\x1f".join([str(int(seed)), *(f"{type(n).__name__}:{n}" for n in names)])


def _expanded(name: str) -> torch.Generator:
    """Return a generator whose whole state is the SHAKE-256 hash of the name.

    PyTorch's `manual_seed` uses only the lowest 32 bits of a seed for its Mersenne Twister: seeds
    that differ in higher bits give equal numbers, and of 100,000 named streams two probably agree.
    """
    import torch

    made = torch.Generator()
    state = made.manual_seed(0).get_state().numpy()
    words = array("I", hashlib.shake_256(name.encode()).digest(4 * TWISTER_WORDS))
    if sys.byteorder == "big":
        words.byteswap()
    # Seed, number of words left, whether seeded, next word, words: each word takes 8 bytes.
    state[24 : 24 + 8 * TWISTER_WORDS].view("uint64")[:] = words
    made.set_state(torch.from_numpy(state))
    return made
