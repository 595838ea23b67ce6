"""Sources of text: streams of documents from files, folders, data sets and built-in corpora.

Only one document at a time is in memory, so a source may be larger than it.
"""

from __future__ import annotations

import csv
import importlib
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, Protocol

from blockdiffusion.data.python_library import python_docs, python_source
from blockdiffusion.data.reading import (
    MAX_DOCUMENT_BYTES,
    PACKED,
    decode,
    find,
    import_arrow,
    kind_of,
    read_lines,
    text_suffix,
    too_long,
    unpacked,
    walk,
)
from blockdiffusion.data.registry import BUILT_INS
from blockdiffusion.errors import UserError, few, reason, shown
from blockdiffusion.files.disk import EMPTY, check_regular
from blockdiffusion.files.records import unique

BUILT_IN = dict(zip(BUILT_INS, (python_docs, python_source), strict=True))
JSON_SUFFIXES = (".jsonl", ".ndjson", ".json")
# Surely meant as a file, so that a misspelt path is never looked up on the hub.
TEXT_SUFFIXES = (".txt", ".md", ".rst", ".tokens", ".text", ".csv")
FILE_SUFFIXES = (*JSON_SUFFIXES, *PACKED, ".parquet", *TEXT_SUFFIXES)
HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+(:[\w.-]*(:[\w.\[\]%-]+)?)?")

LINE_END = re.compile(rb"\r\n|\n|\r")
BLANK_LINE = re.compile(rb"(?>\r\n|\n|\r)(?:[ \t]*+(?>\r\n|\n|\r))+")
SPACE = re.compile(rb" ")

Invalid = Callable[[UserError], None]
# (record, field, where) -> the document in it, as `field_text`.
ReadRecord = Callable[[Mapping[str, Any], str, str], str]


def refuse(error: UserError) -> None:
    """Raise the error for a document that cannot be read."""
    raise error


class Source(Protocol):
    """One stream of documents.

    Attributes:
        name: as the user gave it, or the path of a file in a given folder.
        size: UTF-8 bytes; None if unknown beforehand.
    """

    @property
    def name(self) -> str: ...

    @property
    def size(self) -> int | None: ...

    def signature(self) -> dict[str, Any]:
        """Return what identifies this text cheaply: size and date, or name and version."""
        ...

    def documents(self, invalid: Invalid = refuse) -> Iterator[str]:
        """Yield the documents in a fixed order.

        Args:
            invalid: gets the error for each document that cannot be read, which is left out unless
                this raises.

        Raises:
            UserError: the text is not as it should be; says where.
        """
        ...


def open_sources(
    names: Sequence[str],
    *,
    field: str,
    documents: str,
    document_bytes: int,
    left_out: list[str] | None = None,
    read: ReadRecord | None = None,
) -> list[Source]:
    """Open the sources called `names`, in this order; a folder gives one for each file.

    Args:
        names: paths of text (any UTF-8), JSON lines, CSV, all also packed (see `reading.PACKED`),
            of parquet files, or of folders of them (see `reading.walk`); `python-docs`,
            `python-source`; or Hugging Face data sets as `owner/name[:configuration[:split]]`. A
            path that exists comes before a name.
        field: of the text in JSON lines, CSV, parquet files and data sets, see `field_text`.
        documents: how text files are cut, see `TextFile`.
        document_bytes: see `TextFile`.
        left_out: gets the files in folders that are not read and not empty, and why.
        read: makes a document of a record that is no text; only sources of records can then be
            opened.

    Raises:
        UserError: there is no such source, or it is empty or not a regular file.
    """
    open_one = partial(
        open_file, field=field, documents=documents, document_bytes=document_bytes, read=read
    )
    opened: list[Source] = []
    for name in names:
        path = find(name)
        if path is not None and path.is_dir():
            found = dict(walk(path))
            unread = [f"{file} ({why})" for file, why in found.items() if why not in (None, EMPTY)]
            files = [open_one(file, str(file)) for file, why in found.items() if why is None]
            if not files:
                but = f", but {few(unread)}" if unread else ""
                raise UserError(
                    f"the folder {name} holds no text{but}: name one that has files in it"
                )
            opened += files
            if left_out is not None:
                left_out += unread
        elif path is not None:
            check_regular(path)
            opened.append(open_one(path, name))
        elif name in BUILT_IN and read is None:
            opened.append(BuiltIn(name))
        elif HUB_NAME.fullmatch(name) and not name.lower().endswith(FILE_SUFFIXES):
            opened.append(HubDataset(name, field, read or field_text))
        else:
            raise UserError(
                f"there is no file or folder {shown(name)}: give a path that exists, "
                f"{', '.join(BUILT_IN)}, a set that `blockdiff datasets` lists, or a Hugging Face "
                "data set as owner/name"
            )
    return opened


def open_file(
    path: Path,
    name: str,
    field: str,
    documents: str,
    document_bytes: int,
    read: ReadRecord | None = None,
) -> JsonLines | Csv | Parquet | TextFile:
    """Open a file as its suffix says; see `open_sources`."""
    if text_suffix(path) in JSON_SUFFIXES:
        return JsonLines(name, path, field, read or field_text)
    if text_suffix(path) == ".parquet":
        return Parquet(name, path, field, read or field_text)
    if read is not None:
        raise UserError(
            f"{name} is plain text or CSV, which holds no list of messages; give JSON lines "
            "(.jsonl), parquet or a Hugging Face data set"
        )
    if text_suffix(path) == ".csv":
        return Csv(name, path, field)
    return TextFile(name, path, documents, document_bytes)


@dataclass(frozen=True, slots=True)
class _File:
    """A source that is a file."""

    name: str
    path: Path

    @property
    def size(self) -> int | None:
        """None for a packed file, or one that holds more than the text."""
        is_plain = text_suffix(self.path) == self.path.suffix.lower() != ".parquet"
        return self.path.stat().st_size if is_plain else None

    def signature(self) -> dict[str, Any]:
        status = self.path.stat()
        return {"name": self.name, "size": status.st_size, "modified_ns": status.st_mtime_ns}


@dataclass(frozen=True, slots=True)
class TextFile(_File):
    """A UTF-8 text file, cut into documents by a rule.

    `file`: the file is one document. `line`: every line that is not blank is one. `blank-line`:
    blank lines separate documents. `auto`: the file is one document, but a larger one is cut after
    each `document_bytes` at the next blank line; if the same length again holds none, at the next
    line end, else at the next space. `auto` and `file` keep every byte except a byte order mark,
    and no rule changes the line ends within a document.
    """

    rule: str
    document_bytes: int

    def documents(self, invalid: Invalid = refuse) -> Iterator[str]:
        cut: dict[str, Callable[[BinaryIO], Iterator[tuple[int, bytes]]]] = {
            "auto": self._pieces,
            "file": self._whole,
            "line": self._lines,
            "blank-line": self._paragraphs,
        }
        with unpacked(self.path, self.name) as file:
            for offset, raw in cut[self.rule](file):
                try:
                    yield decode(raw, self.name, offset)
                except UserError as error:
                    invalid(error)

    def _pieces(self, file: BinaryIO) -> Iterator[tuple[int, bytes]]:
        buffer, offset = b"", 0
        while True:
            buffer += file.read(2 * self.document_bytes - len(buffer))
            if len(buffer) <= self.document_bytes:
                break
            end = _cut(buffer, self.document_bytes, 2 * self.document_bytes)
            yield offset, buffer[:end]
            buffer, offset = buffer[end:], offset + end
        if buffer:
            yield offset, buffer

    def _whole(self, file: BinaryIO) -> Iterator[tuple[int, bytes]]:
        raw = file.read(MAX_DOCUMENT_BYTES + 1)
        if len(raw) > MAX_DOCUMENT_BYTES:
            raise too_long(self.name, "documents=auto")
        yield 0, raw

    def _lines(self, file: BinaryIO) -> Iterator[tuple[int, bytes]]:
        for _, offset, line in read_lines(file, self.name):
            if line.strip():
                yield offset, line.rstrip(b"\r\n")

    def _paragraphs(self, file: BinaryIO) -> Iterator[tuple[int, bytes]]:
        paragraph, start = bytearray(), 0
        for _, offset, line in read_lines(file, self.name):
            if line.strip():
                start = start if paragraph else offset
                paragraph += line
                if len(paragraph) > MAX_DOCUMENT_BYTES:
                    raise too_long(self.name, "documents=auto")
            elif paragraph:
                yield start, bytes(paragraph).rstrip(b"\r\n")
                paragraph.clear()
        if paragraph:
            yield start, bytes(paragraph).rstrip(b"\r\n")


def _cut(buffer: bytes, start: int, window: int) -> int:
    """Return where the first document of `buffer` ends, at `start` or later.

    `window` is the length of a full buffer; a shorter one is the end of the file.
    """
    # Unless the file ends here, a CR may be half of a CR LF.
    known = len(buffer) - (len(buffer) == window and buffer.endswith(b"\r"))
    for pattern in (BLANK_LINE, LINE_END, SPACE):
        if match := pattern.search(buffer, start, known):
            return match.end()
    if len(buffer) < window:
        return len(buffer)
    end = len(buffer) - 1  # not inside a character: UTF-8's later bytes are 0b10xxxxxx
    while end > start and buffer[end] & 0xC0 == 0x80:
        end -= 1
    return end


# --- rows with fields --------------------------------------------------------------------------


def field_text(record: Mapping[str, Any], field: str, where: str) -> str:
    """Return the text of a record: its key `field`, else follow the names between the dots.

    Raises:
        UserError: there is none, or it is not a string that can be a document.
    """
    value, place = record, ""
    for key in [field] if field in record else field.split("."):
        if not isinstance(value, Mapping):
            raise _no_string(where, field, value, f"at {place[:-1]!r}")
        if key not in value:
            raise no_field(where, field, [f"{place}{name}" for name in value])
        value, place = value[key], f"{place}{key}."
    if not isinstance(value, str):
        raise _no_string(where, field, value, "there")
    if len(value) > MAX_DOCUMENT_BYTES:
        raise too_long(where, "shorter documents")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise UserError(
            f"{where} holds half a surrogate pair, which is not a character: fix it"
        ) from None
    return value


def _no_string(where: str, field: str, value: object, place: str) -> UserError:
    return UserError(
        f"{where} has no string {field!r}: {kind_of(value)} stands {place}; fix it, or name the "
        "text's (--field NAME)"
    )


def no_field(where: str, field: str, names: Sequence[str]) -> UserError:
    there = ", ".join(map(shown, names[:8])) or "none"
    return UserError(
        f"{where} has no string {field!r} (its fields: {there}): name the text's (--field NAME)"
    )


JSON = json.JSONDecoder(object_pairs_hook=unique)


@dataclass(frozen=True, slots=True)
class JsonLines(_File):
    """A file with one JSON object a line; the document is its string `field`."""

    field: str
    read: ReadRecord = field_text

    def documents(self, invalid: Invalid = refuse) -> Iterator[str]:
        is_first = True
        with unpacked(self.path, self.name) as file:
            for number, offset, raw in read_lines(file, self.name):
                try:
                    if not (line := decode(raw, self.name, offset).strip()):
                        continue
                    text = None if is_first and line[0] == "[" else self._text(line, number)
                except UserError as error:
                    invalid(error)
                else:
                    if text is None:
                        raise UserError(
                            f"{self.name} is one JSON array: write one object per line, as "
                            "jq -c '.[]' does"
                        )
                    yield text
                is_first = False

    def _text(self, line: str, number: int) -> str:
        where = f"line {number} of {self.name}"
        try:
            record = JSON.decode(line)
        except (ValueError, RecursionError) as error:
            raise UserError(
                f"{where} is not JSON ({error}): every line must be one whole JSON object, as "
                "jq -c . writes them"
            ) from None
        if not isinstance(record, dict):
            raise UserError(
                f"{where} is not a JSON object but {kind_of(record)}: every line must be one, with "
                "the text"
            )
        return self.read(record, self.field, where)


@dataclass(frozen=True, slots=True)
class Csv(_File):
    """A CSV file (UTF-8, commas, double quotes); the document is the column `field`.

    `columns` names the columns of a file without a header that has `field`. Columns of the same
    name are joined with a space. Blank lines between rows are skipped.
    """

    field: str
    columns: tuple[str, ...] = ()

    def documents(self, invalid: Invalid = refuse) -> Iterator[str]:
        csv.field_size_limit(MAX_DOCUMENT_BYTES)
        number, columns = 0, self.columns
        try:
            with unpacked(self.path, self.name) as file:
                lines = (decode(raw, self.name, at) for _, at, raw in read_lines(file, self.name))
                for row in csv.reader(lines, skipinitialspace=True, strict=True):
                    number += 1
                    if not row:
                        continue
                    if number == 1 and self.field in row:
                        columns = tuple(row)
                    elif self.field not in columns or len(row) != len(columns):
                        where = f"row {number} of {self.name}"
                        invalid(no_field(where, self.field, columns or row))
                    else:
                        named = zip(columns, row, strict=True)
                        yield " ".join(text for column, text in named if column == self.field)
        except csv.Error as error:
            raise UserError(
                f"{self.name} cannot be read as CSV (after row {number}: {error}): it must be "
                "UTF-8 with commas and double quotes"
            ) from None


@dataclass(frozen=True, slots=True)
class Parquet(_File):
    """A parquet file; the document is the string column `field`."""

    field: str
    read: ReadRecord = field_text

    def documents(self, invalid: Invalid = refuse) -> Iterator[str]:
        with self._opened() as table:
            names = table.schema_arrow.names
            top = self.field if self.field in names else self.field.partition(".")[0]
            number = 0
            # Few rows, since a dictionary or packed bytes may expand far beyond the file.
            for batch in table.iter_batches(batch_size=8, columns=[self.field]):
                if top not in batch.schema.names:
                    raise no_field(self.name, self.field, names)
                for value in batch.column(batch.schema.names.index(top)):
                    number += 1
                    try:
                        yield self._text(top, value, f"row {number} of {self.name}")
                    except UserError as error:
                        invalid(error)

    def _text(self, top: str, value: Any, where: str) -> str:
        try:
            found = value.as_py()
        except UnicodeDecodeError as error:
            raise UserError(
                f"{where} is not UTF-8 text (at byte {error.start} of {self.field!r}): fix it"
            ) from None
        except (ValueError, OverflowError):  # a date that Python has none for
            found = value
        return self.read({top: found}, self.field, where)

    def num_rows(self) -> int:
        """Return the number of rows, read from the end of the file.

        Raises:
            UserError: it is not a whole parquet file.
        """
        with self._opened() as table:
            return table.metadata.num_rows

    @contextmanager
    def _opened(self) -> Iterator[Any]:
        if self.path.suffix.lower() in PACKED:
            raise UserError(f"{self.name} is packed, which parquet files are inside: unpack it")
        arrow, parquet = import_arrow(self.name)
        try:
            with parquet.ParquetFile(self.path) as table:
                yield table
        except (arrow.ArrowException, OSError) as error:
            if getattr(error, "errno", None) is not None:
                raise  # of the disk
            raise UserError(f"{self.name} cannot be read as parquet: {reason(error)}") from None


@dataclass(frozen=True, slots=True)
class HubDataset:
    """A Hugging Face data set `owner/name[:configuration[:split]]`, streamed; split `train`."""

    name: str
    field: str
    read: ReadRecord = field_text

    @property
    def size(self) -> int | None:
        return None

    def signature(self) -> dict[str, Any]:
        return {"name": self.name}

    def documents(self, invalid: Invalid = refuse) -> Iterator[str]:
        repository, _, rest = self.name.partition(":")
        configuration, _, split = rest.partition(":")
        try:
            datasets: Any = importlib.import_module("datasets")
        except ImportError:
            raise UserError(
                f"there is no file {self.name!r}, and reading it as a Hugging Face data set needs "
                "the package datasets: pip install 'blockdiffusion[data]'"
            ) from None
        try:
            rows = datasets.load_dataset(
                repository, configuration or None, split=split or "train", streaming=True
            )
            for number, row in enumerate(rows, 1):
                try:
                    yield self.read(row, self.field, f"row {number} of {self.name}")
                except UserError as error:
                    invalid(error)
        except UserError:
            raise
        except Exception as error:  # the library and the network raise errors of a hundred classes
            raise self._failure(error) from error

    def _failure(self, error: Exception) -> UserError:
        if "script" in str(error).lower():
            return UserError(
                f"the data set {self.name} is built by a loading script, which is no longer run: "
                "download its parquet files (branch refs/convert/parquet) and name those"
            )
        return UserError(
            f"{self.name!r} is not a local file, and the Hugging Face data set of this name cannot "
            f"be read ({reason(error)}): check the name and the network, or name local files"
        )


@dataclass(frozen=True, slots=True)
class BuiltIn:
    """One of the built-in corpora, see `python_library`."""

    name: str

    @property
    def size(self) -> int | None:
        return sum(len(text.encode()) for text in self.documents())

    def signature(self) -> dict[str, Any]:
        import platform

        return {"name": self.name, "python": platform.python_version()}

    def documents(self, invalid: Invalid = refuse) -> Iterator[str]:
        yield from BUILT_IN[self.name]()
