"""Where text comes from: streams of documents from files, folders, data sets, the built-in corpus.

Nothing is read whole except one document at a time, so a source may be larger than memory.
"""

from __future__ import annotations

import csv
import importlib
import json
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Protocol

from blockdiffusion.data.python_docs import python_docs
from blockdiffusion.data.python_source import python_source
from blockdiffusion.errors import UserError

MAX_DOCUMENT_BYTES = 64 * 2**20
BUILT_IN = {"python-docs": python_docs, "python-source": python_source}
DOCUMENT_RULES = ("auto", "file", "line", "blank-line")
JSON_SUFFIXES = (".jsonl", ".ndjson", ".json")
# What is surely meant as a file, so that a misspelt path is never looked up on the hub.
FILE_SUFFIXES = (*JSON_SUFFIXES, ".parquet", ".txt", ".md", ".rst", ".tokens", ".text", ".csv")
HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+(:[\w.-]*(:[\w.\[\]%-]+)?)?")

BYTE_ORDER_MARK = b"\xef\xbb\xbf"
BLANK_LINE = re.compile(rb"\n(?:[ \t\r]*\n)+")
LINE_END = re.compile(rb"\n")
SPACE = re.compile(rb" ")


class Source(Protocol):
    """One stream of documents.

    Attributes:
        name: as the user gave it, or the file's path inside the folder that was given.
        size: UTF-8 bytes, as far as known beforehand; None where it is not.
    """

    @property
    def name(self) -> str: ...

    @property
    def size(self) -> int | None: ...

    def signature(self) -> dict[str, Any]:
        """What tells this text from another, cheap to get: size and date, or name and version."""
        ...

    def documents(self) -> Iterator[str]:
        """The documents, in a fixed order.

        Raises:
            UserError: the text is not what it should be; says where.
        """
        ...


def open_sources(
    names: Sequence[str], *, field: str, documents: str, document_bytes: int
) -> list[Source]:
    """The sources that `names` stand for, in this order; a folder gives one for each file.

    Args:
        names: paths of text (any UTF-8), JSON lines, parquet files, or of folders of them (read
            recursively, by name, without hidden ones); `python-docs`, `python-source`; or Hugging
            Face data sets as `owner/name[:configuration[:split]]`. A path that exists comes before
            a name.
        field: where JSON lines, parquet files and data sets have the text.
        documents: how text files are cut, see `TextFile`.
        document_bytes: see `TextFile`.

    Raises:
        UserError: a name stands for nothing, or for an empty file or folder.
    """

    def open_file(path: Path, name: str) -> Source:
        if path.suffix.lower() in JSON_SUFFIXES:
            return JsonLines(name, path, field)
        if path.suffix.lower() == ".parquet":
            return Parquet(name, path, field)
        return TextFile(name, path, documents, document_bytes)

    opened: list[Source] = []
    for name in names:
        path = Path(name).expanduser()
        if path.is_dir():
            files = [file for file in _walk(path) if file.stat().st_size > 0]
            if not files:
                raise UserError(f"the folder {name} holds no text: name one that has files in it")
            opened += [open_file(file, str(file)) for file in files]
        elif path.exists():
            if path.is_file() and path.stat().st_size == 0:
                raise UserError(f"the file {name} is empty: name one that has text in it")
            opened.append(open_file(path, name))
        elif name in BUILT_IN:
            opened.append(BuiltIn(name))
        elif HUB_NAME.fullmatch(name) and not name.lower().endswith(FILE_SUFFIXES):
            opened.append(HubDataset(name, field))
        else:
            raise UserError(
                f"there is no file or folder {name!r}: give a path that exists, "
                f"{', '.join(BUILT_IN)}, a set that `blockdiff datasets` lists, or a Hugging Face "
                "data set as owner/name"
            )
    return opened


def _walk(folder: Path) -> Iterator[Path]:
    for path in sorted(folder.iterdir()):
        if path.name.startswith("."):
            continue
        if path.is_dir():
            yield from _walk(path)
        elif path.is_file():
            yield path


def _file_signature(name: str, path: Path) -> dict[str, Any]:
    status = path.stat()
    return {"name": name, "size": status.st_size, "modified_ns": status.st_mtime_ns}


@dataclass(frozen=True, slots=True)
class TextFile:
    """A UTF-8 text file, cut to documents by the rule `documents`.

    `file`: the file is one document. `line`: every line that is not blank is one. `blank-line`:
    blank lines stand between documents. `auto`: the file is one document, but one larger than
    `document_bytes` is cut after each `document_bytes` at the next blank line; where the same
    length again holds none, at the next line end, else at the next space. `auto` and `file` keep
    every byte except a byte order mark.
    """

    name: str
    path: Path
    rule: str
    document_bytes: int

    @property
    def size(self) -> int | None:
        return self.path.stat().st_size

    def signature(self) -> dict[str, Any]:
        return _file_signature(self.name, self.path)

    def documents(self) -> Iterator[str]:
        cut: dict[str, Callable[[], Iterator[tuple[int, bytes]]]] = {
            "auto": self._pieces,
            "file": self._whole,
            "line": self._lines,
            "blank-line": self._paragraphs,
        }
        for offset, raw in cut[self.rule]():
            if offset == 0:
                raw = raw.removeprefix(BYTE_ORDER_MARK)
            yield _decode(raw, self.name, offset)

    def _pieces(self) -> Iterator[tuple[int, bytes]]:
        buffer, offset = b"", 0
        with open(self.path, "rb") as file:
            while True:
                buffer += file.read(2 * self.document_bytes - len(buffer))
                if len(buffer) <= self.document_bytes:
                    break
                end = _cut(buffer, self.document_bytes, 2 * self.document_bytes)
                yield offset, buffer[:end]
                buffer, offset = buffer[end:], offset + end
        if buffer:
            yield offset, buffer

    def _whole(self) -> Iterator[tuple[int, bytes]]:
        with open(self.path, "rb") as file:
            raw = file.read(MAX_DOCUMENT_BYTES + 1)
        if len(raw) > MAX_DOCUMENT_BYTES:
            raise _too_long(self.name, "documents=auto")
        yield 0, raw

    def _lines(self) -> Iterator[tuple[int, bytes]]:
        with open(self.path, "rb") as file:
            for _, offset, line in _read_lines(file, self.name):
                if line.strip():
                    yield offset, line.rstrip(b"\r\n")

    def _paragraphs(self) -> Iterator[tuple[int, bytes]]:
        lines: list[bytes] = []
        start = length = 0
        with open(self.path, "rb") as file:
            for _, offset, line in _read_lines(file, self.name):
                if line.strip():
                    start = start if lines else offset
                    lines.append(line)
                    length = length + len(line)
                    if length > MAX_DOCUMENT_BYTES:
                        raise _too_long(self.name, "documents=auto")
                elif lines:
                    yield start, b"".join(lines).rstrip(b"\r\n")
                    lines, length = [], 0
        if lines:
            yield start, b"".join(lines).rstrip(b"\r\n")


def _cut(buffer: bytes, start: int, window: int) -> int:
    """Where the document at the beginning of `buffer` ends, at `start` or later.

    `window` is the length of a full buffer; a shorter one is the end of the file.
    """
    for pattern in (BLANK_LINE, LINE_END, SPACE):
        if match := pattern.search(buffer, start):
            return match.end()
    if len(buffer) < window:
        return len(buffer)
    end = len(buffer) - 1  # not inside a character: UTF-8's later bytes are 0b10xxxxxx
    while end > start and buffer[end] & 0xC0 == 0x80:
        end -= 1
    return end


def _read_lines(file: BinaryIO, name: str) -> Iterator[tuple[int, int, bytes]]:
    """(number from 1, byte offset, line with its end) for each line."""
    number = offset = 0
    while line := file.readline(MAX_DOCUMENT_BYTES + 1):
        number += 1
        if len(line) > MAX_DOCUMENT_BYTES:
            raise _too_long(f"line {number} of {name}", "shorter lines")
        yield number, offset, line
        offset += len(line)


def _decode(raw: bytes, name: str, offset: int) -> str:
    if (zero := raw.find(b"\0")) >= 0:
        raise UserError(
            f"{name} is not a text file (a NUL byte at byte offset {offset + zero}): leave it "
            "out, unpack it, or convert it to UTF-8"
        )
    try:
        return raw.decode()
    except UnicodeDecodeError as error:
        raise UserError(
            f"{name} is not UTF-8 text (at byte offset {offset + error.start}): convert it to "
            "UTF-8 or leave it out"
        ) from None


def _too_long(what: str, instead: str) -> UserError:
    return UserError(
        f"{what} is one document of more than {MAX_DOCUMENT_BYTES // 2**20} MiB, which would not "
        f"fit in memory: use {instead}"
    )


@dataclass(frozen=True, slots=True)
class JsonLines:
    """A file with one JSON object a line; the document is its string `field`."""

    name: str
    path: Path
    field: str

    @property
    def size(self) -> int | None:
        return self.path.stat().st_size

    def signature(self) -> dict[str, Any]:
        return _file_signature(self.name, self.path)

    def documents(self) -> Iterator[str]:
        with open(self.path, "rb") as file:
            for number, offset, raw in _read_lines(file, self.name):
                raw = raw.removeprefix(BYTE_ORDER_MARK) if number == 1 else raw
                if line := _decode(raw, self.name, offset).strip():
                    yield self._text(line, number)

    def _text(self, line: str, number: int) -> str:
        where = f"line {number} of {self.name}"
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise UserError(
                f"{where} is not JSON ({error}): every line must be a JSON object"
            ) from None
        if not isinstance(record, dict):
            raise UserError(f"{where} is not a JSON object: every line must be one, with the text")
        text = record.get(self.field)
        if not isinstance(text, str):
            raise _no_field(where, self.field, list(record))
        if not _is_unicode(text):
            raise UserError(f"{where} holds half a surrogate pair, which is no character: mend it")
        return text


@dataclass(frozen=True, slots=True)
class Csv:
    """A CSV file (UTF-8, commas, double quotes); the document is the column `field`.

    Without a header that names `field` the columns are called `columns`; those of the same name are
    joined with a space.
    """

    name: str
    path: Path
    field: str
    columns: tuple[str, ...] = ()

    @property
    def size(self) -> int | None:
        return self.path.stat().st_size

    def signature(self) -> dict[str, Any]:
        return _file_signature(self.name, self.path)

    def documents(self) -> Iterator[str]:
        csv.field_size_limit(MAX_DOCUMENT_BYTES)
        number = 0
        try:
            with open(self.path, encoding="utf-8-sig", newline="") as file:
                columns: Sequence[str] = ()
                for row in csv.reader(file, skipinitialspace=True, strict=True):
                    number += 1
                    if number == 1 and self.field in row:
                        columns = row
                        continue
                    columns = columns or self.columns
                    if self.field not in columns or len(row) != len(columns):
                        raise _no_field(f"row {number} of {self.name}", self.field, columns or row)
                    named = zip(columns, row, strict=True)
                    yield " ".join(text for column, text in named if column == self.field)
        except (csv.Error, UnicodeDecodeError) as error:
            raise UserError(
                f"{self.name} cannot be read as CSV (after row {number}: {error}): it must be "
                "UTF-8 with commas and double quotes"
            ) from None


@dataclass(frozen=True, slots=True)
class Parquet:
    """A parquet file; the document is the string column `field`."""

    name: str
    path: Path
    field: str

    @property
    def size(self) -> int | None:
        return None  # compressed, and with other columns beside the text

    def signature(self) -> dict[str, Any]:
        return _file_signature(self.name, self.path)

    def documents(self) -> Iterator[str]:
        arrow, parquet = import_arrow(self.name)
        try:
            with parquet.ParquetFile(self.path) as table:
                names = table.schema_arrow.names
                if self.field not in names:
                    raise _no_field(self.name, self.field, names)
                number = 0
                for batch in table.iter_batches(batch_size=256, columns=[self.field]):
                    for text in batch.column(0).to_pylist():
                        number += 1
                        if not isinstance(text, str):
                            raise _no_field(f"row {number} of {self.name}", self.field, names)
                        yield text
        except arrow.ArrowException as error:
            raise _no_parquet(self.name, error) from None

    def num_rows(self) -> int:
        """The rows of the file, from what stands at its end.

        Raises:
            UserError: it is no whole parquet file.
        """
        arrow, parquet = import_arrow(self.name)
        try:
            with parquet.ParquetFile(self.path) as table:
                return table.metadata.num_rows
        except arrow.ArrowException as error:
            raise _no_parquet(self.name, error) from None


def import_arrow(name: str) -> tuple[Any, Any]:
    """pyarrow and its parquet module, to read `name` with.

    Raises:
        UserError: they are not installed.
    """
    try:
        import pyarrow as arrow
        import pyarrow.parquet as parquet
    except ImportError:
        raise UserError(
            f"reading {name} needs pyarrow: pip install 'blockdiffusion[data]'"
        ) from None
    return arrow, parquet


def _no_parquet(name: str, error: Exception) -> UserError:
    first_line = str(error).partition("\n")[0]
    return UserError(f"{name} cannot be read as parquet: {first_line}")


@dataclass(frozen=True, slots=True)
class HubDataset:
    """A Hugging Face data set `owner/name[:configuration[:split]]`, streamed; split `train`."""

    name: str
    field: str

    @property
    def size(self) -> int | None:
        return None

    def signature(self) -> dict[str, Any]:
        return {"name": self.name}

    def documents(self) -> Iterator[str]:
        repository, _, rest = self.name.partition(":")
        configuration, _, split = rest.partition(":")
        try:
            datasets: Any = importlib.import_module("datasets")
        except ImportError:
            raise UserError(
                f"there is no file {self.name!r}, and reading it as a Hugging Face data set needs "
                "the package datasets: pip install 'blockdiffusion[data]'"
            ) from None
        # The library and the network fail in a hundred ways, and none is this program's fault.
        try:
            rows = iter(
                datasets.load_dataset(
                    repository, configuration or None, split=split or "train", streaming=True
                )
            )
        except Exception as error:
            raise self._failure(error) from error
        number = 0
        while True:
            try:
                row = next(rows, None)
            except Exception as error:
                raise self._failure(error) from error
            if row is None:
                return
            number += 1
            if not isinstance(text := row.get(self.field), str):
                raise _no_field(f"row {number} of {self.name}", self.field, list(row))
            if not _is_unicode(text):
                raise UserError(f"row {number} of {self.name} holds half a surrogate pair")
            yield text

    def _failure(self, error: Exception) -> UserError:
        if "script" in str(error).lower():
            return UserError(
                f"the data set {self.name} is built by a loading script, which is no longer run: "
                "download its parquet files (branch refs/convert/parquet) and name those"
            )
        first_line = str(error).strip().partition("\n")[0] or type(error).__name__
        return UserError(
            f"{self.name!r} is no file here, and the Hugging Face data set of this name cannot be "
            f"read ({first_line}): check the name and the network, or name local files"
        )


@dataclass(frozen=True, slots=True)
class BuiltIn:
    """One of the built-in corpora, see `python_docs` and `python_source`."""

    name: str

    @property
    def size(self) -> int | None:
        return sum(len(text.encode()) for text in self.documents())

    def signature(self) -> dict[str, Any]:
        import platform

        return {"name": self.name, "python": platform.python_version()}

    def documents(self) -> Iterator[str]:
        yield from BUILT_IN[self.name]()


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _no_field(where: str, field: str, names: Sequence[str]) -> UserError:
    shown = ", ".join(map(repr, names[:8])) or "none"
    return UserError(
        f"{where} has no string {field!r} (its fields: {shown}): name the text's with field=..."
    )
