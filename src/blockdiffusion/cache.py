"""The cache of keys and values of clean blocks, while sampling.

Keys are stored rotated, in storage that is allocated once. A position p lives in slot
p % capacity, so that with a sliding window the storage is a ring and memory stays constant. Passes
write the keys of all their tokens into their slots; only `commit` makes them part of the cache
(the slots of a block that is still noisy lie beyond `lengths_B` and are overwritten by the next
pass).
"""

from __future__ import annotations

from typing import NamedTuple

import torch


class Placement(NamedTuple):
    """Slots of a pass's tokens; `straight` is their slice where all rows share it, in order."""

    slots_BT: torch.Tensor
    straight: slice | None
    used: int


class BlockCache:
    """Keys and values (batch, heads, capacity, head width) of every layer.

    Attributes:
        lengths_B: committed tokens of every row, int64 on the CPU.
        capacity: tokens a row can hold at a time.
    """

    def __init__(
        self,
        num_layers: int,
        batch: int,
        num_heads: int,
        head_width: int,
        capacity: int,
        *,
        dtype: torch.dtype,
        device: torch.device,
    ):
        shape = (batch, num_heads, capacity, head_width)
        self.keys = [torch.zeros(shape, dtype=dtype, device=device) for _ in range(num_layers)]
        self.values = [torch.zeros(shape, dtype=dtype, device=device) for _ in range(num_layers)]
        self.lengths_B = torch.zeros(batch, dtype=torch.long)
        self.capacity = capacity

    @property
    def uniform(self) -> bool:
        """Whether all rows hold the same number of tokens."""
        return bool((self.lengths_B == self.lengths_B[0]).all())

    def place(self, num_tokens: int) -> Placement:
        """Where a pass over the next `num_tokens` positions of every row puts its keys."""
        slots_BT = (self.lengths_B[:, None] + torch.arange(num_tokens)) % self.capacity
        first, last = int(slots_BT[0, 0]), int(slots_BT[0, -1])
        straight = self.uniform and last - first + 1 == num_tokens
        straight_slice = slice(first, last + 1) if straight else None
        return Placement(slots_BT, straight_slice, self._used(num_tokens))

    def _used(self, num_tokens: int) -> int:
        """Slots in use by any row once `num_tokens` more are written."""
        return min(self.capacity, int(self.lengths_B.max()) + num_tokens)

    def write(
        self, layer: int, k_BHTE: torch.Tensor, v_BHTE: torch.Tensor, place: Placement
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Puts a pass's keys and values into their slots; returns the layer's used storage."""
        keys, values = self.keys[layer], self.values[layer]
        if place.straight is not None:
            keys[:, :, place.straight] = k_BHTE
            values[:, :, place.straight] = v_BHTE
        else:
            row_B1 = torch.arange(place.slots_BT.shape[0])[:, None]
            keys[row_B1, :, place.slots_BT] = k_BHTE.transpose(1, 2)
            values[row_B1, :, place.slots_BT] = v_BHTE.transpose(1, 2)
        return keys[:, :, : place.used], values[:, :, : place.used]

    def positions(self, num_tokens: int) -> torch.Tensor:
        """Position held by every used slot, (B, used); -1 where a row's slot is empty.

        Positions are those after the next `num_tokens` tokens were written.
        """
        slot = torch.arange(self._used(num_tokens))
        end_B1 = (self.lengths_B + num_tokens)[:, None]
        latest = end_B1 - 1 - (end_B1 - 1 - slot) % self.capacity
        return latest.clamp(min=-1)

    def commit(self, num_tokens_B: torch.Tensor | int) -> None:
        """Makes the first `num_tokens_B` of the tokens just written part of the cache."""
        self.lengths_B = self.lengths_B + num_tokens_B

    def keep(self, rows: torch.Tensor) -> None:
        """Drops all rows of the batch but `rows` (indices)."""
        self.keys = [x[rows.to(x.device)] for x in self.keys]
        self.values = [x[rows.to(x.device)] for x in self.values]
        self.lengths_B = self.lengths_B[rows]
