"""Batches of token rows from a prepared directory, in an order that is a function of (seed, step).

The only state is the number of the step, so a run resumes exactly, with any number of processes.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch

from blockdiffusion.data.manifest import MANIFEST_FILE, TOKENIZER_FOLDER, Manifest
from blockdiffusion.data.parts import id_dtype
from blockdiffusion.data.shards import BESIDE, file_beside
from blockdiffusion.errors import UserError
from blockdiffusion.files.checksums import Report, check_files, read_sums, silent
from blockdiffusion.runtime.seeding import derive_seed

REMEDY = "copy it again from where it was whole, or delete the directory and prepare it anew"
MOST_EPOCHS = 1000  # in one batch; more is a typing mistake, and takes all memory


@dataclass(frozen=True, slots=True)
class Batch:
    """Rows of tokens.

    Attributes:
        ids_BL: int64 token ids.
        valid_BL: bool, False at padding, which is at the right end of a row; None if there is none.
        target_BL: bool, False at context, which is not scored; None = all tokens are targets.
        document_BL: int64, the number of each token's example in its row, from 1, and 0 at
            padding; None = each row is one text.
    """

    ids_BL: torch.Tensor
    valid_BL: torch.Tensor | None = None
    target_BL: torch.Tensor | None = None
    document_BL: torch.Tensor | None = None

    @property
    def num_tokens(self) -> int:
        return self.ids_BL.numel() if self.valid_BL is None else int(self.valid_BL.sum())

    @property
    def attended_BL(self) -> torch.Tensor | None:
        """What `BlockDiffusion.encode` takes for `valid_BL`."""
        return self.valid_BL if self.document_BL is None else self.document_BL

    def unpacked(self) -> Batch:
        """Return the same texts, one a row, padded to the longest."""
        if self.document_BL is None or self.target_BL is None:
            return self
        ids, targets = [], []
        for row, document_L in enumerate(self.document_BL):
            for number in range(1, int(document_L.max()) + 1):
                own_L = document_L == number
                ids.append(self.ids_BL[row][own_L])
                targets.append(self.target_BL[row][own_L])
        lengths_B = torch.tensor([len(row) for row in ids])
        pad = partial(torch.nn.utils.rnn.pad_sequence, batch_first=True)
        valid_BL = torch.arange(int(lengths_B.max())) < lengths_B[:, None]
        return Batch(pad(ids), valid_BL, pad(targets))


class TokenRows:
    """The rows of one split of a prepared directory, memory-mapped.

    Its files are compared with their checksums when they are first used, by the first of several
    processes; see `checksums`.

    Args:
        report: gets the progress of that.

    Attributes:
        manifest: the directory's manifest.
        seq_len: tokens of a row (L).
        num_rows: rows of this split.

    Raises:
        UserError: there are no prepared data or no such split, or a file is missing or damaged.
    """

    def __init__(self, directory: str | Path, split: str, report: Report = silent) -> None:
        directory = Path(directory)
        self.manifest = Manifest.load(directory)
        if split not in self.manifest.splits:
            raise UserError(
                f"{directory} has no split {split!r}: it has {', '.join(self.manifest.splits)}"
            )
        shards = self.manifest.splits[split].shards
        self.seq_len = self.manifest.seq_len
        self._starts = np.cumsum([0, *(shard.rows for shard in shards)])
        self.num_rows = int(self._starts[-1])
        dtype = id_dtype(self.manifest.vocab_size)
        self._rows = [
            _map(directory / shard.file, dtype, (shard.rows, self.seq_len)) for shard in shards
        ]
        packing, self._beside = self.manifest.packing, None
        beside = [file_beside(shard.file, packing) for shard in shards]
        if packing in BESIDE:
            kind, more = BESIDE[packing][1], () if packing == "document" else (self.seq_len,)
            self._beside = [
                _map(directory / name, kind, (shard.rows, *more))
                for name, shard in zip(beside, shards, strict=True)
                if name is not None
            ]
        names = [MANIFEST_FILE, *beside]
        sums = read_sums(directory) or {}  # older directories have those of the manifest only
        used = {n: s for n, s in sums.items() if n in names or n.startswith(TOKENIZER_FOLDER)}
        used |= {shard.file: shard.sha256 for shard in shards}
        check_files(directory, used, REMEDY, report)

    def rows(self, indices: np.ndarray) -> Batch:
        """The rows with the numbers `indices` (B,), in that order.

        Raises:
            IndexError: a number outside 0 .. num_rows - 1.
        """
        indices = np.asarray(indices, dtype=np.int64)
        if len(indices) and not 0 <= indices.min() <= indices.max() < self.num_rows:
            raise IndexError(f"row numbers must be from 0 to {self.num_rows - 1}: {indices}")
        ids_BL = np.empty((len(indices), self.seq_len), dtype=np.int64)
        beside = np.empty((len(indices), *self._shape_beside), dtype=np.int64)
        shard_of_row = np.searchsorted(self._starts, indices, side="right") - 1
        for shard in np.unique(shard_of_row):
            where = np.flatnonzero(shard_of_row == shard)
            inside = indices[where] - self._starts[shard]
            ids_BL[where] = self._rows[shard][inside]
            if self._beside is not None:
                beside[where] = self._beside[shard][inside]
        ids = torch.from_numpy(ids_BL)
        if self._beside is None:
            return Batch(ids)
        if beside.ndim == 1:
            return Batch(ids, torch.from_numpy(np.arange(self.seq_len) < beside[:, None]))
        marks_BL = torch.from_numpy(beside)
        return Batch(ids, marks_BL > 0, marks_BL % 2 == 1, marks_BL // 2)

    @property
    def _shape_beside(self) -> tuple[int, ...]:
        return () if self._beside is None else self._beside[0].shape[1:]


def _map(path: Path, dtype: np.dtype, shape: tuple[int, ...]) -> np.ndarray:
    """Map `path` read-only; it must have exactly this size."""
    try:
        size = path.stat().st_size
    except FileNotFoundError:
        raise UserError(f"{path} is missing, though the manifest names it: {REMEDY}") from None
    expected = math.prod(shape) * dtype.itemsize
    if size != expected:
        raise UserError(f"{path} has {size} bytes and should have {expected}: {REMEDY}")
    return np.memmap(path, dtype=dtype, mode="r", shape=shape)


class BatchOrder:
    """The rows of each global batch: a pure function of (seed, step).

    Every epoch is a permutation drawn from (seed, epoch); batches follow each other without a gap,
    so one may span two epochs (or more, if it is larger than the data).

    Raises:
        UserError: there is no row, the batch is empty, or it has every row `MOST_EPOCHS` times.
    """

    def __init__(self, num_rows: int, batch_size: int, seed: int) -> None:
        if num_rows < 1 or batch_size < 1:
            raise UserError(
                f"a batch of {batch_size} rows out of {num_rows} cannot be drawn: both must be at "
                "least 1"
            )
        if batch_size > MOST_EPOCHS * num_rows:
            raise UserError(
                f"a batch of {batch_size} rows out of {num_rows} would have every row more than "
                f"{MOST_EPOCHS} times; give a smaller train.batch_size, or more data"
            )
        self.num_rows, self.batch_size, self.seed = num_rows, batch_size, seed
        self._epochs: OrderedDict[int, np.ndarray] = OrderedDict()

    def indices(self, step: int) -> np.ndarray:
        """Return the row numbers (B,) of global batch `step` (from 0)."""
        positions = np.arange(step * self.batch_size, (step + 1) * self.batch_size)
        epoch_of_position, places = np.divmod(positions, self.num_rows)
        rows = np.empty(self.batch_size, dtype=np.int64)
        for epoch in np.unique(epoch_of_position):
            here = epoch_of_position == epoch
            rows[here] = self._permutation(int(epoch))[places[here]]
        return rows

    def _permutation(self, epoch: int) -> np.ndarray:
        if epoch not in self._epochs:
            bits = np.random.Philox(derive_seed(self.seed, "order", epoch))
            self._epochs[epoch] = np.random.Generator(bits).permutation(self.num_rows)
            if len(self._epochs) > 2:  # one of a large corpus has tens of megabytes
                self._epochs.popitem(last=False)
        return self._epochs[epoch]


def free_tokens(batch: Batch, row_bos: bool) -> torch.Tensor:
    """Return bool (B, L): the tokens that are scored, so no padding, context or given BOS."""
    valid_BL = batch.valid_BL
    free_BL = torch.ones_like(batch.ids_BL).bool() if valid_BL is None else valid_BL.clone()
    if batch.target_BL is not None:
        free_BL &= batch.target_BL
    if row_bos:
        free_BL[:, 0] = False
    return free_BL
