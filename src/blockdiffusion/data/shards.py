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
    """The layout of a row; an id that is None is not used."""

    seq_len: int
    dtype: np.dtype
    pad_id: int
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

    def add(self, ids: np.ndarray, lengths: np.ndarray) -> tuple[np.ndarray, np.ndarray | None]:
        """Return the rows (n, L) that these documents complete, and their lengths (n,) if padded.

        Args:
            ids: the tokens of all documents, one after the other.
            lengths: the number of tokens of each document.
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

    @property
    def left_over(self) -> int:
        """The number of tokens that never filled a row."""
        return len(self._rest)


class DocumentPacker:
    """One document a row, padded at the right; a longer one continues in the next rows."""

    left_over = 0

    def __init__(self, rules: RowRules) -> None:
        self.rules = rules

    def add(self, ids: np.ndarray, lengths: np.ndarray) -> tuple[np.ndarray, np.ndarray | None]:
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


Packer = WrapPacker | DocumentPacker
PACKERS: dict[str, type[Packer]] = {"wrap": WrapPacker, "document": DocumentPacker}


@dataclass(frozen=True, kw_only=True, slots=True)
class Shard:
    """One file of rows: its name, its number of rows, the sha256 of its bytes."""

    file: str
    rows: int
    sha256: str


def lengths_file(shard_file: str) -> str:
    """Return the file beside a shard that has the lengths of its rows, little-endian uint32."""
    return shard_file.removesuffix(".bin") + ".len"


class ShardWriter:
    """Writes rows into `<split>-00000.bin`, `-00001.bin`, ... of at most `rows_per_shard`.

    A file has a hidden name until it is whole.
    """

    def __init__(self, directory: Path, split: str, rows_per_shard: int) -> None:
        self.directory = directory
        self.split = split
        self.rows_per_shard = rows_per_shard
        self.shards: list[Shard] = []
        self.tokens = 0  # valid positions written
        self._file: BinaryIO | None = None
        self._lengths_file: BinaryIO | None = None
        self._rows = 0  # in the unfinished shard

    def write(self, rows: np.ndarray, lengths: np.ndarray | None) -> None:
        """Append rows (n, L), with their lengths (n,) if they are padded."""
        self.tokens += int(lengths.sum()) if lengths is not None else rows.size
        while len(rows):
            count = min(len(rows), self.rows_per_shard - self._rows)
            self._append(rows[:count], None if lengths is None else lengths[:count])
            rows, lengths = rows[count:], None if lengths is None else lengths[count:]
            if self._rows == self.rows_per_shard:
                self._finish_shard()

    def finish(self) -> None:
        """Give the last shard its name."""
        if self._rows:
            self._finish_shard()

    def close(self) -> None:
        """Remove an unfinished shard, if any."""
        for file in (self._file, self._lengths_file):
            if file is not None:
                with suppress(OSError):  # a full disk: the buffer cannot be written either
                    file.close()
                Path(file.name).unlink(missing_ok=True)
        self._file = self._lengths_file = None

    @property
    def num_rows(self) -> int:
        return sum(shard.rows for shard in self.shards) + self._rows

    @property
    def _name(self) -> str:
        return f"{self.split}-{len(self.shards):05d}.bin"

    def _append(self, rows: np.ndarray, lengths: np.ndarray | None) -> None:
        if self._file is None:
            self._file = self._open(self._name)
            self._digest = hashlib.sha256()
        data = rows.tobytes()
        self._digest.update(data)
        self._file.write(data)
        if lengths is not None:
            if self._lengths_file is None:
                self._lengths_file = self._open(lengths_file(self._name))
            self._lengths_file.write(lengths.astype("<u4").tobytes())
        self._rows += len(rows)

    def _open(self, name: str) -> BinaryIO:
        return create(partial_path(self.directory / name))

    def _finish_shard(self) -> None:
        name = self._name
        for file, final in ((self._lengths_file, lengths_file(name)), (self._file, name)):
            if file is not None:
                file.flush()
                os.fsync(file.fileno())
                file.close()
                os.replace(file.name, self.directory / final)
        self.shards.append(Shard(file=name, rows=self._rows, sha256=self._digest.hexdigest()))
        self._file = self._lengths_file = None
        self._rows = 0
