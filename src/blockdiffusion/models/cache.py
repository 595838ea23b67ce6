"""The cache of keys and values of clean blocks, while sampling.

Keys are stored rotated, in storage that is allocated once. Position p has slot p % capacity: with a
sliding window the storage is a ring, and memory is constant. A pass writes the keys of all its
tokens into their slots, and `commit` makes them part of the cache. (The slots of a block that is
still noisy lie beyond `lengths_B`, and the next pass overwrites them.)
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F

from blockdiffusion.models.cuda_graphs import Recorder

SLOTS = 256  # recorded passes read a multiple of it; see `BlockCache.static_used`


class Placement(NamedTuple):
    """Rows and slots of a pass's tokens, on the cache's device. `straight` is the slice of slots if
    all rows have the same ones, in order; `used` is how many slots attention reads."""

    rows_B1: torch.Tensor
    slots_BT: torch.Tensor
    straight: slice | None
    used: int


class RaggedPlacement(NamedTuple):
    """Row, number in the row and slot of each of the P tokens of a pass over rows of different
    lengths."""

    rows_P: torch.Tensor
    offsets_P: torch.Tensor
    slots_P: torch.Tensor
    used: int

    def to(self, device: torch.device) -> RaggedPlacement:
        """Return it on a device: once for a pass, not in every layer."""
        moved = (x.to(device) for x in (self.rows_P, self.offsets_P, self.slots_P))
        return RaggedPlacement(*moved, used=self.used)


class BlockCache:
    """Keys and values (batch, key-value heads, capacity, head width) of every layer.

    All rows are in use. After `clear` none is: rows then come and go with `open_row` and
    `close_row`, and B is their current number.

    Attributes:
        lengths_B: committed tokens of every row, int64 on the CPU.
        capacity: the most tokens that a row holds at a time.
        recorder: of passes over this storage; None = each pass starts its own kernels.
        start_id: the token before the first one, for networks that read each token one position
            later; None for others.
    """

    def __init__(
        self,
        num_layers: int,
        batch: int,
        num_key_value_heads: int,
        head_width: int,
        capacity: int,
        *,
        dtype: torch.dtype,
        device: torch.device,
        recorder: Recorder | None = None,
        start_id: int | None = None,
    ):
        shape = (batch, num_key_value_heads, capacity, head_width)
        self.keys = [torch.zeros(shape, dtype=dtype, device=device) for _ in range(num_layers)]
        self.values = [torch.zeros(shape, dtype=dtype, device=device) for _ in range(num_layers)]
        self.lengths_B = torch.zeros(batch, dtype=torch.long)
        self.capacity = capacity
        self.recorder = recorder
        self.start_id = start_id
        # The last committed token of every row, or its hidden state (see `shifted`).
        self._last_B: torch.Tensor | None = None
        if start_id is not None:
            self._last_B = torch.full((batch,), start_id, device=device)
        self._passed = torch.zeros(0, device=device)  # those of the last pass, rows in turn
        self._firsts_B = torch.zeros(0)  # the first one of each row
        self._counts_B: torch.Tensor | None = None  # the only ones that can be committed

    @property
    def uniform(self) -> bool:
        """Whether all rows hold the same number of tokens."""
        return bool((self.lengths_B == self.lengths_B[0]).all())

    def place(self, num_tokens: int) -> Placement:
        """Return the placement of a pass over the next `num_tokens` positions of every row."""
        slots_BT = (self.lengths_B[:, None] + torch.arange(num_tokens)) % self.capacity
        first, last = int(slots_BT[0, 0]), int(slots_BT[0, -1])
        straight = self.uniform and last - first + 1 == num_tokens
        straight_slice = slice(first, last + 1) if straight else None
        device = self.keys[0].device
        rows_B1 = torch.arange(len(slots_BT), device=device)[:, None]
        return Placement(rows_B1, slots_BT.to(device), straight_slice, self._used(num_tokens))

    def place_ragged(self, tokens_B: torch.Tensor) -> RaggedPlacement:
        """Return, on the CPU, the placement of a pass over the next `tokens_B` positions of each
        row."""
        rows_P = torch.arange(len(tokens_B)).repeat_interleave(tokens_B)
        firsts_B = tokens_B.cumsum(0) - tokens_B
        offsets_P = torch.arange(len(rows_P)) - firsts_B[rows_P]
        slots_P = (self.lengths_B[rows_P] + offsets_P) % self.capacity
        return RaggedPlacement(rows_P, offsets_P, slots_P, self._used(tokens_B))

    def _used(self, num_tokens_B: int | torch.Tensor) -> int:
        """Slots that any row uses after so many more are written."""
        return min(self.capacity, int((self.lengths_B + num_tokens_B).max()))

    def static_used(self, num_tokens: int) -> int:
        """Return `used` for a pass over so many tokens of every row, rounded up, so that many
        passes have the same."""
        return min(self.capacity, -(-self._used(num_tokens) // SLOTS) * SLOTS)

    def place_static(self, lengths_B: torch.Tensor, num_tokens: int, used: int) -> Placement:
        """Return the placement from lengths on the cache's device, without reading their values."""
        column_T = torch.arange(num_tokens, device=lengths_B.device)
        rows_B1 = torch.arange(len(lengths_B), device=lengths_B.device)[:, None]
        return Placement(rows_B1, (lengths_B[:, None] + column_T) % self.capacity, None, used)

    def write(
        self, layer: int, k_BHTE: torch.Tensor, v_BHTE: torch.Tensor, place: Placement
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Write a pass's keys and values into their slots; return the layer's used storage."""
        keys, values = self.keys[layer], self.values[layer]
        if place.straight is not None:
            keys[:, :, place.straight] = k_BHTE
            values[:, :, place.straight] = v_BHTE
        else:
            keys[place.rows_B1, :, place.slots_BT] = k_BHTE.transpose(1, 2)
            values[place.rows_B1, :, place.slots_BT] = v_BHTE.transpose(1, 2)
        return keys[:, :, : place.used], values[:, :, : place.used]

    def write_ragged(
        self, layer: int, k_PHE: torch.Tensor, v_PHE: torch.Tensor, place: RaggedPlacement
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Write as `write` does, for concatenated rows of different lengths."""
        rows = len(self.lengths_B)
        keys, values = self.keys[layer][:rows], self.values[layer][:rows]
        keys[place.rows_P, :, place.slots_P] = k_PHE
        values[place.rows_P, :, place.slots_P] = v_PHE
        return keys[:, :, : place.used], values[:, :, : place.used]

    def delayed(self, ids_BT: torch.Tensor) -> torch.Tensor:
        """Return what the network reads in a pass over the next tokens of every row: these tokens,
        or with `start_id` those one position earlier."""
        if self.start_id is None:
            return ids_BT
        tokens_B = torch.full((len(ids_BT),), ids_BT.shape[1])
        return self.delayed_ragged(ids_BT.flatten(), tokens_B).view_as(ids_BT)

    def delayed_ragged(self, ids_P: torch.Tensor, tokens_B: torch.Tensor) -> torch.Tensor:
        """Return `delayed` of concatenated rows of different lengths."""
        if self.start_id is None:
            return ids_P
        self.passed(ids_P, tokens_B.cumsum(0) - tokens_B)
        has_some_B = tokens_B > 0
        first_M, has_some_B = (x.to(ids_P.device) for x in (self._firsts_B[has_some_B], has_some_B))
        before_P = F.pad(ids_P[:-1], (1, 0))
        before_P[first_M] = self.kept_of(ids_P)[has_some_B]
        return before_P

    def kept_of(self, passed: torch.Tensor) -> torch.Tensor:
        """Return what is kept of each row's last committed token, (B, ...): an element of what
        `passed` was given, which has this shape."""
        if self._last_B is None:
            self._last_B = passed.new_zeros(len(self.keys[0]), *passed.shape[1:])
        return self._last_B[: len(self.lengths_B)]

    def passed(
        self, passed_P: torch.Tensor, firsts_B: torch.Tensor, counts_B: torch.Tensor | None = None
    ) -> None:
        """Note the tokens of a pass, or their hidden states: the next `commit` of n tokens of a row
        keeps the one at `firsts_B` + n - 1. With `counts_B` only so many can be committed."""
        self._passed, self._firsts_B, self._counts_B = passed_P, firsts_B, counts_B

    def positions(self, num_tokens_B: int | torch.Tensor) -> torch.Tensor:
        """Return the position in every used slot, (B, used), -1 if it is empty, after the next
        `num_tokens_B` tokens are written."""
        ends_B = self.lengths_B + num_tokens_B
        return held_positions(ends_B, self._used(num_tokens_B), self.capacity)

    def commit(self, num_tokens_B: torch.Tensor | int) -> None:
        """Make the first `num_tokens_B` of the tokens just written part of the cache."""
        if self._last_B is not None:
            counts_B = self._counts_B
            assert counts_B is None or bool((counts_B == num_tokens_B).all())
            end_B = self._firsts_B + num_tokens_B
            some_B = (end_B > self._firsts_B).nonzero().flatten()
            last_M = self._passed[(end_B[some_B] - 1).to(self._passed.device)]
            self._last_B[some_B.to(last_M.device)] = last_M
        self.lengths_B = self.lengths_B + num_tokens_B

    def clear(self) -> None:
        """Leave no row in use."""
        self.lengths_B = self.lengths_B[:0]

    def open_row(self) -> int:
        """Put an empty row into use, as the last; return its index."""
        rows = len(self.lengths_B)
        assert rows < len(self.keys[0]), "the cache has no row left"
        if self.start_id is not None and self._last_B is not None:
            self._last_B[rows] = self.start_id
        self.lengths_B = torch.cat([self.lengths_B, torch.zeros(1, dtype=torch.long)])
        return rows

    def close_row(self, row: int) -> None:
        """Free a row; the last one moves to its index."""
        last = len(self.lengths_B) - 1
        if row != last:
            held = min(self.capacity, int(self.lengths_B[last]))
            for stored in (*self.keys, *self.values):
                stored[row, :, :held] = stored[last, :, :held]
            self.lengths_B[row] = self.lengths_B[last]
            if self._last_B is not None:
                self._last_B[row] = self._last_B[last]
        self.lengths_B = self.lengths_B[:last]

    def keep(self, rows: torch.Tensor) -> None:
        """Drop all rows of the batch except `rows` (indices)."""
        self.keys = [x[rows.to(x.device)] for x in self.keys]
        self.values = [x[rows.to(x.device)] for x in self.values]
        self.lengths_B = self.lengths_B[rows]
        if self._last_B is not None:
            self._last_B = self._last_B[rows.to(self._last_B.device)]
        if self.recorder is not None:
            self.recorder.forget()


def held_positions(ends_B: torch.Tensor, used: int, capacity: int) -> torch.Tensor:
    """Return the position in each of the first `used` slots, (B, used), -1 if it is empty, after
    all positions before `ends_B` were written."""
    slot = torch.arange(used, device=ends_B.device)
    last_B1 = ends_B[:, None] - 1
    return (last_B1 - (last_B1 - slot) % capacity).clamp(min=-1)
