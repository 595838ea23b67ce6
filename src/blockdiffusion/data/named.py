"""Named data sets as sources: from the hub or from local files of the same shape."""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import Any

from blockdiffusion.data.hub import fetch_split
from blockdiffusion.data.reading import TWICE, find, text_suffix, walk
from blockdiffusion.data.registry import (
    DATA_SETS,
    CharacterRanges,
    DataSet,
    LastDocuments,
    find_set,
    split_of,
)
from blockdiffusion.data.sources import (
    JSON_SUFFIXES,
    Csv,
    Invalid,
    JsonLines,
    Parquet,
    TextFile,
    open_file,
    refuse,
)
from blockdiffusion.errors import UserError
from blockdiffusion.files.disk import irregular

PIECE_CHARACTERS = 65_536
NO_TEXT = {".md", ".bin", ".len", ".chat"}  # notes about a set, and files of `prepare`
TITLE = re.compile(r"\s*= [^=].* =\s*")  # " = Title = "; a section has two signs or more
HEADING = re.compile(r"\s*= .* =\s*")  # both


@dataclass(frozen=True, kw_only=True, slots=True)
class NamedSet:
    """A data set as given: `NAME[:split][=PATH]`.

    Attributes:
        split: None if none was named.
        path: local file or folder; None: the hub.
    """

    data_set: DataSet
    split: str | None = None
    path: Path | None = None

    def training(self) -> NamedSplit:
        """Return the named split, else the training split."""
        return self.source(self.split or "train")

    def held_out(self) -> NamedSplit | None:
        """Return the split that becomes `valid` beside the training split, if any.

        A single local file without a rule to cut it is only training text.
        """
        wanted = self.data_set.held_out
        single = self.path is not None and self.path.is_file() and self.data_set.cut is None
        return None if self.split or wanted is None or single else self.source(wanted)

    def validation(self) -> NamedSplit:
        """Return the named split, else the held-out one.

        Raises:
            UserError: the set holds none out.
        """
        wanted = self.split or self.data_set.held_out
        if wanted is None:
            name, split = self.data_set.name, next(iter(self.data_set.splits))
            raise UserError(f"{name} has no held-out split: name one, as {name}:{split}")
        return self.source(wanted)

    def source(self, split: str) -> NamedSplit:
        """Return one split.

        Raises:
            UserError: the set has no such split, or the local path has no files of it.
        """
        data_set = self.data_set
        if split not in data_set.splits:
            raise UserError(
                f"{data_set.name} has no split {split!r}: it has {' and '.join(data_set.splits)}; "
                f"name one, as {data_set.name}:{next(iter(data_set.splits))}"
            )
        if self.path is None:
            return NamedSplit(f"{data_set.name}:{split}", data_set, split)
        files = local_files(data_set, split, self.path)
        return NamedSplit(f"{data_set.name}:{split}={self.path}", data_set, split, tuple(files))


def parse_named(text: str) -> NamedSet | None:
    """Return the data set that `text` names, unless it is a path that exists.

    Raises:
        UserError: there is no such local path, or no set of this name for it.
    """
    head, equals, local = text.partition("=")
    name, _, split = head.partition(":")
    if find(text) is not None:
        return None
    path = find(local) if equals else None
    if name not in DATA_SETS and path is None:
        return None
    data_set = find_set(name)
    if equals and path is None:
        raise UserError(f"there is no file or folder {local!r} to read {name} from")
    return NamedSet(data_set=data_set, split=split or None, path=path)


@dataclass(frozen=True, slots=True)
class NamedSplit:
    """One split of a named set, from local files or (`files` is None) from the hub."""

    name: str
    data_set: DataSet
    split: str
    files: tuple[Path, ...] | None = None

    @property
    def size(self) -> int | None:
        return None  # before it is downloaded, unpacked and cut

    def signature(self) -> dict[str, Any]:
        if self.files is None:
            return {"name": self.name, "repository": self.data_set.repository}
        status = [(file.name, file.stat()) for file in self.files]
        return {
            "name": self.name,
            "files": [[name, found.st_size, found.st_mtime_ns] for name, found in status],
        }

    def documents(self, invalid: Invalid = refuse) -> Iterator[str]:
        """Yield the documents as published, before `DataSet.detokenize`."""
        rows = self._rows(invalid)
        if self.data_set.documents == "article":
            return articles(rows)
        if self.data_set.documents == "paragraph":
            return paragraphs(rows)
        if self.data_set.documents == "piece":
            return chain.from_iterable(map(pieces, rows))
        return rows

    def _rows(self, invalid: Invalid) -> Iterator[str]:
        data_set = self.data_set
        files = fetch_split(data_set, self.split) if self.files is None else list(self.files)
        match data_set.cut:
            case LastDocuments(number=number, held_out=held_out):
                return _part(data_set, files, number, self.split == held_out)
            case CharacterRanges(ranges=ranges) if self.files is not None and _is_whole(files):
                begin, end = ranges[self.split]
                return iter([_text(files[0])[begin:end]])
        return chain.from_iterable(_open(file, data_set).documents(invalid) for file in files)


# --- local files -------------------------------------------------------------------------------


def local_files(data_set: DataSet, split: str, path: Path) -> list[Path]:
    """Return the files of a split: `path` itself, or those in the folder named after the split.

    All files of the folder belong to a set that is published as one.

    Raises:
        UserError: there are none, they are empty, not files, or of several formats; or `path` is a
            file named after another split.
    """
    if not path.is_dir():
        other = None if data_set.is_one_body else split_of(Path(path.name))
        if other not in (None, split):
            raise UserError(
                f"{path} is named after the split {other}, but {split} of {data_set.name} is asked "
                f"for: name the right file, or give {data_set.name}:{other}={path}"
            )
        reasons = {path: irregular(path.stat())}
        found = [path]
    else:
        reasons = {file: why for file, why in walk(path) if why != TWICE}
        found = [file for file in reasons if text_suffix(file) not in NO_TEXT]
        uncut = isinstance(data_set.cut, CharacterRanges) and _is_whole(found)
        if not (data_set.is_one_body or uncut):
            found = [file for file in found if split_of(file.relative_to(path)) == split]
    if not found:
        raise UserError(
            f"{path} has no file of the split {split} of {data_set.name}: put {split!r} into its "
            "name, or name the file itself"
        )
    kinds = {_kind(file) for file in found}
    if len(kinds) > 1:
        raise UserError(
            f"{path} has files of several formats for the split {split} of {data_set.name} "
            f"({', '.join(sorted(kinds))}): name the one to read"
        )
    for file in found:
        if why := reasons[file]:
            raise UserError(f"{file} is {why}: get it again, it should be a file with text in it")
    return found


def _is_whole(files: Sequence[Path]) -> bool:
    """Return whether this is one file with all splits in it."""
    return len(files) == 1 and split_of(Path(files[0].name)) is None


def _kind(file: Path) -> str:
    suffix = text_suffix(file)
    if suffix in JSON_SUFFIXES:
        return "JSON lines"
    return {".parquet": "parquet", ".csv": "CSV"}.get(suffix, "text")


def _open(file: Path, data_set: DataSet) -> Parquet | JsonLines | Csv | TextFile:
    """Open the rows of a file: the lines of a text file, or its whole text if that is cut later."""
    if text_suffix(file) == ".csv":
        return Csv(str(file), file, data_set.field, data_set.columns)
    rule = "auto" if data_set.documents == "piece" else "line"
    return open_file(file, str(file), data_set.field, rule, PIECE_CHARACTERS)


def _text(file: Path) -> str:
    return "".join(TextFile(str(file), file, "auto", 2**20).documents())


# --- documents ---------------------------------------------------------------------------------


def _lines(rows: Iterable[str]) -> Iterator[str]:
    """Yield the rows that are not blank, each with a line end."""
    return (row if row.endswith("\n") else f"{row}\n" for row in rows if row.strip())


def articles(rows: Iterable[str]) -> Iterator[str]:
    """Join WikiText's rows (lines) to articles, without blank rows."""
    lines: list[str] = []
    for line in _lines(rows):
        if lines and TITLE.fullmatch(line):
            yield "".join(lines)
            lines = []
        lines.append(line)
    if lines:
        yield "".join(lines)


def paragraphs(rows: Iterable[str]) -> Iterator[str]:
    """Yield WikiText's paragraphs, each with the titles before it, without blank rows.

    Titles at the end are the last document.
    """
    lines: list[str] = []
    for line in _lines(rows):
        lines.append(line)
        if not HEADING.fullmatch(line):
            yield "".join(lines)
            lines = []
    if lines:
        yield "".join(lines)


def pieces(text: str, length: int = PIECE_CHARACTERS) -> Iterator[str]:
    """Cut `text` after the next space behind every `length` characters."""
    start = 0
    while start < len(text):
        space = text.find(" ", start + length - 1)
        end = len(text) if space < 0 else space + 1
        yield text[start:end]
        start = end


def _part(data_set: DataSet, files: list[Path], number: int, is_last: bool) -> Iterator[str]:
    """Yield the last `number` rows of all files together, or those before them."""
    counts = [_num_rows(file, file.stat().st_mtime_ns, data_set) for file in files]
    border = sum(counts) - number
    if border < 1:
        raise UserError(
            f"{files[0].parent} has {sum(counts):,} documents of {data_set.name}, whose last "
            f"{number:,} are held out: give all of it, or name the files without the set's name"
        )
    first = 0
    for file, count in zip(files, counts, strict=True):
        before = min(max(border - first, 0), count)
        begin, end = (before, count) if is_last else (0, before)
        if begin < end:
            yield from islice(_open(file, data_set).documents(), begin, end)
        first += count


@functools.lru_cache(maxsize=1024)
def _num_rows(file: Path, modified_ns: int, data_set: DataSet) -> int:
    source = _open(file, data_set)
    if isinstance(source, Parquet):
        return source.num_rows()
    return sum(1 for _ in source.documents())
