"""From tokens of documents to rows of one length, and from rows to shard files."""

from __future__ import annotations

import hashlib
import os
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np

from blockdiffusion.files.disk import create, partial_path


@dataclass(frozen=True, kw_only=True, slots=True)
class RowRules:
    """The layout of a row; an id that is None is not used, and `align` is read by chat alone."""

    seq_len: int
    dtype: np.dtype
    pad_id: int
    align: int = 1
    row_bos_id: int | None = None
    row_eos_id: int | None = None
    document_eos_id: int | None = None

    @property
    def payload(self) -> int:
        """The number of document tokens that fit into a row."""
        return self.seq_len - (self.row_bos_id is not None) - (self.row_eos_id is not None)


class WrapPacker:
    """The paper's packing: documents one after the other, cut wherever a row is full.

    Keeps tokens that do not fill a row yet.
    """

    def __init__(self, rules: RowRules) -> None:
        self.rules = rules
        self._rest = np.empty(0, dtype=rules.dtype)

    def add(
        self, ids: np.ndarray, lengths: np.ndarray, is_target: np.ndarray | None = None
    ) -> Rows:
        """Return the rows that these documents complete.

        Args:
            ids: the tokens of all documents, one after the other.
            lengths: the number of tokens of each document.
            is_target: of conversations, for each id whether it is of a response.
        """
        rules = self.rules
        if rules.document_eos_id is not None:
            ids = np.insert(ids, np.cumsum(lengths), rules.document_eos_id)
        stream = np.concatenate([self._rest, ids])
        num_rows = len(stream) // rules.payload
        self._rest = stream[num_rows * rules.payload :].copy()
        rows = stream[: num_rows * rules.payload].reshape(num_rows, rules.payload)
        if rules.row_bos_id is not None:
            rows = np.insert(rows, 0, rules.row_bos_id, axis=1)
        if rules.row_eos_id is not None:
            rows = np.insert(rows, rows.shape[1], rules.row_eos_id, axis=1)
        return rows, None

    def finish(self) -> Rows | None:
        """Return the rows that are left at the end, if any."""
        return None

    @property
    def left_over(self) -> int:
        """The number of tokens that are in no row."""
        return len(self._rest)


class DocumentPacker:
    """One document a row, padded at the right; a longer one continues in the next rows."""

    left_over = 0

    def __init__(self, rules: RowRules) -> None:
        self.rules = rules

    def finish(self) -> Rows | None:
        return None

    def add(
        self, ids: np.ndarray, lengths: np.ndarray, is_target: np.ndarray | None = None
    ) -> Rows:
        rules = self.rules
        totals = lengths + (rules.document_eos_id is not None)
        num_rows = int((-(-totals // rules.payload)).sum())
        rows = np.full((num_rows, rules.seq_len), rules.pad_id, dtype=rules.dtype)
        row_lengths = np.empty(num_rows, dtype="<u4")
        bos, eos = (
            np.array([] if token is None else [token], dtype=rules.dtype)
            for token in (rules.row_bos_id, rules.row_eos_id)
        )
        row = 0
        for document in np.split(ids, np.cumsum(lengths)[:-1]):
            if rules.document_eos_id is not None:
                document = np.append(document, rules.document_eos_id)
            for start in range(0, len(document), rules.payload):
                tokens = np.concatenate([bos, document[start : start + rules.payload], eos])
                rows[row, : len(tokens)], row_lengths[row] = tokens, len(tokens)
                row += 1
        assert row == num_rows
        return rows, row_lengths


class ChatPacker:
    """Several examples of conversations a row, each filled with EOS to a multiple of `align`.

    A document holds one or more examples, each of which ends with its targets. An example goes into
    the fullest open row that has room. One longer than a row is cut, and left out if no target
    remains. Beside each token stands a mark: twice the number of its example in the row, from 1,
    plus 1 if it is a target; 0 at padding.
    """

    def __init__(self, rules: RowRules) -> None:
        self.rules = rules
        self.left_over = 0
        self._open: list[_OpenRow] = []

    def add(
        self, ids: np.ndarray, lengths: np.ndarray, is_target: np.ndarray | None = None
    ) -> Rows:
        assert is_target is not None
        done = []
        ends_with_targets = is_target & ~np.append(is_target[1:], False)
        start = 0
        for end in np.flatnonzero(ends_with_targets) + 1:
            cut = min(end, start + self.rules.seq_len)
            if not is_target[start:cut].any():
                cut = start
            else:
                done += self._place(ids[start:cut], is_target[start:cut])
            self.left_over += int(end - cut)
            start = end
        return self._stacked(done)

    def finish(self) -> Rows | None:
        rows, self._open = self._open, []
        return self._stacked(rows) if rows else None

    def _place(self, ids: np.ndarray, is_target: np.ndarray) -> list[_OpenRow]:
        """Write an example into a row; return the row if it must make room for another."""
        rules = self.rules
        size = -(-len(ids) // rules.align) * rules.align
        fitting = [row for row in self._open if row.has_room(size)]
        row = max(fitting, key=lambda row: row.used, default=None)
        if row is None:
            row = _OpenRow(
                np.full(rules.seq_len, rules.pad_id, dtype=rules.dtype),
                np.zeros(rules.seq_len, dtype=MARK),
            )
            self._open.append(row)
        row.write(ids, is_target, size)
        if len(self._open) <= MOST_OPEN:
            return []
        fullest = max(self._open, key=lambda row: row.used)
        self._open = [row for row in self._open if row is not fullest]
        return [fullest]

    def _stacked(self, rows: list[_OpenRow]) -> Rows:
        shape = (len(rows), self.rules.seq_len)
        ids = np.array([row.ids for row in rows], dtype=self.rules.dtype).reshape(shape)
        return ids, np.array([row.marks for row in rows], dtype=MARK).reshape(shape)


@dataclass
class _OpenRow:
    """A row that still has room."""

    ids: np.ndarray
    marks: np.ndarray
    used: int = 0
    documents: int = 0

    def has_room(self, size: int) -> bool:
        return len(self.ids) - self.used >= size and self.documents < MOST_DOCUMENTS

    def write(self, ids: np.ndarray, is_target: np.ndarray, size: int) -> None:
        """Write an example; the row holds EOS behind it already, which are targets."""
        self.documents += 1
        self.ids[self.used : self.used + len(ids)] = ids
        marks = self.marks[self.used : self.used + size]
        marks[:] = 2 * self.documents + 1
        marks[: len(ids)] -= ~is_target
        self.used += size


MARK = np.dtype("<u2")
MOST_DOCUMENTS = 2**15 - 1  # of a row: their marks are 16 bits
MOST_OPEN = 64  # rows that wait for an example that fits
# Rows (n, L), and what stands beside them, if anything: lengths (n,), or marks (n, L).
Rows = tuple[np.ndarray, np.ndarray | None]
Packer = WrapPacker | DocumentPacker | ChatPacker
PACKERS: dict[str, type[Packer]] = {
    "wrap": WrapPacker,
    "document": DocumentPacker,
    "chat": ChatPacker,
}
# Suffix and type of the file beside a shard, by packing.
LENGTHS, MARKS = (".len", np.dtype("<u4")), (".chat", MARK)
BESIDE = {"document": LENGTHS, "chat": MARKS}


@dataclass(frozen=True, kw_only=True, slots=True)
class Shard:
    """One file of rows: its name, its number of rows, the sha256 of its bytes."""

    file: str
    rows: int
    sha256: str


def file_beside(shard_file: str, packing: str) -> str | None:
    """Return the file that has the lengths or the marks of a shard's rows; None: there is none."""
    if packing not in BESIDE:
        return None
    return shard_file.removesuffix(".bin") + BESIDE[packing][0]


class ShardWriter:
    """Writes rows into `<split>-00000.bin`, `-00001.bin`, ... of at most `rows_per_shard`.

    A file has a hidden name until it is whole.

    Args:
        packing: of the rows, which decides what is written beside them.
    """

    def __init__(self, directory: Path, split: str, rows_per_shard: int, packing: str) -> None:
        self.directory, self.packing = directory, packing
        self.split = split
        self.rows_per_shard = rows_per_shard
        self.shards: list[Shard] = []
        self.tokens = 0  # valid positions written
        self._file: BinaryIO | None = None
        self._beside_file: BinaryIO | None = None
        self._rows = 0  # in the unfinished shard

    def write(self, rows: np.ndarray, beside: np.ndarray | None) -> None:
        """Append rows (n, L), with their lengths (n,) or marks (n, L) if they are padded."""
        if beside is None:
            self.tokens += rows.size
        else:
            self.tokens += int(beside.sum() if beside.ndim == 1 else np.count_nonzero(beside))
        while len(rows):
            count = min(len(rows), self.rows_per_shard - self._rows)
            self._append(rows[:count], None if beside is None else beside[:count])
            rows, beside = rows[count:], None if beside is None else beside[count:]
            if self._rows == self.rows_per_shard:
                self._finish_shard()

    def finish(self) -> None:
        """Give the last shard its name."""
        if self._rows:
            self._finish_shard()

    def close(self) -> None:
        """Remove an unfinished shard, if any."""
        for file in (self._file, self._beside_file):
            if file is not None:
                with suppress(OSError):  # a full disk: the buffer cannot be written either
                    file.close()
                Path(file.name).unlink(missing_ok=True)
        self._file = self._beside_file = None

    @property
    def num_rows(self) -> int:
        return sum(shard.rows for shard in self.shards) + self._rows

    @property
    def _name(self) -> str:
        return f"{self.split}-{len(self.shards):05d}.bin"

    def _append(self, rows: np.ndarray, beside: np.ndarray | None) -> None:
        if self._file is None:
            self._file = self._open(self._name)
            self._digest = hashlib.sha256()
        data = rows.tobytes()
        self._digest.update(data)
        self._file.write(data)
        if beside is not None:
            if self._beside_file is None:
                self._beside_file = self._open(self._name_beside)
            self._beside_file.write(beside.astype(BESIDE[self.packing][1]).tobytes())
        self._rows += len(rows)

    @property
    def _name_beside(self) -> str:
        return file_beside(self._name, self.packing) or ""

    def _open(self, name: str) -> BinaryIO:
        return create(partial_path(self.directory / name))

    def _finish_shard(self) -> None:
        name = self._name
        for file, final in ((self._beside_file, self._name_beside), (self._file, name)):
            if file is not None:
                file.flush()
                os.fsync(file.fileno())
                file.close()
                os.replace(file.name, self.directory / final)
        self.shards.append(Shard(file=name, rows=self._rows, sha256=self._digest.hexdigest()))
        self._file = self._beside_file = None
        self._rows = 0
