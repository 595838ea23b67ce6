"""Random numbers for samplers: every row has its own stream.

A row's stream depends on the caller's generator, on the row's prompt, and on the number of rows
before it with the same prompt. So a row draws the same numbers alone and in any batch.

Shape suffixes: R rows, S positions of a block, M positions of a pass.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Sequence

import numpy as np
import torch

CHUNK = 256  # numbers that a row draws at a time


class RowStreams:
    """Uniform numbers in [0, 1), float64 on the CPU, for some or all rows of a batch.

    Args:
        keys: 128 bits for every row.
        most: the largest number of values that a row takes at once.
    """

    def __init__(self, keys: Sequence[bytes], most: int):
        # Philox is counter-based: its key is all there is to a stream (Salmon et al. 2011).
        self._sources = [
            np.random.Generator(np.random.Philox(key=int.from_bytes(key, "big"))) for key in keys
        ]
        self._held_BC = np.empty((len(keys), max(CHUNK, most)))
        self._used_B = np.full(len(keys), self._held_BC.shape[1])
        self._rows_R = np.arange(len(keys))

    def of(self, rows_R: torch.Tensor) -> RowStreams:
        """Returns the streams of some rows (in rising order), which continue from here."""
        part = object.__new__(RowStreams)
        part.__dict__ = self.__dict__ | {"_rows_R": self._rows_R[rows_R.numpy()]}
        return part

    def each(self, size: int) -> torch.Tensor:
        """Returns the next `size` numbers of every row (R, S)."""
        rows_M = torch.arange(len(self._rows_R)).repeat_interleave(size)
        return self.at(rows_M).view(-1, size)

    def at(self, row_M: torch.Tensor) -> torch.Tensor:
        """Returns a number (M,) for every position of a pass, each from its row's stream.

        Args:
            row_M: the row of each position, on the CPU, in rising order.
        """
        own_M = self._rows_R[row_M.numpy()]
        used_B = self._used_B + np.bincount(own_M, minlength=len(self._used_B))
        # A remainder that is too short is discarded, so that only the row's own demand matters.
        for row in np.flatnonzero(used_B > self._held_BC.shape[1]):
            self._sources[row].random(out=self._held_BC[row])
            used_B[row] -= self._used_B[row]
            self._used_B[row] = 0
        place_M = self._used_B[own_M]
        if len(own_M) > 1:
            place_M += np.arange(len(own_M)) - np.searchsorted(own_M, own_M)
        self._used_B[:] = used_B
        return torch.from_numpy(self._held_BC[own_M, place_M])


def row_streams(generator: torch.Generator, rows: Sequence[Sequence[int]], most: int) -> RowStreams:
    """Creates the streams of rows with these prompts."""
    base = torch.randint(2**63 - 1, (2,), generator=generator).numpy().tobytes()
    before: Counter[bytes] = Counter()
    keys = []
    for row in rows:
        given = np.asarray(row, dtype=np.int64).tobytes()
        digest = hashlib.blake2b(given, digest_size=16, key=base)
        digest.update(before[given].to_bytes(8, "big"))
        before[given] += 1
        keys.append(digest.digest())
    return RowStreams(keys, most)
