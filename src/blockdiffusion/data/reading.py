"""Text files: found in folders, unpacked, split into lines, decoded; a bounded piece at a time.

A line ends only at LF, CR LF or CR, as in text editors.
"""

from __future__ import annotations

import bz2
import errno
import gzip
import io
import lzma
import os
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from blockdiffusion.errors import UserError
from blockdiffusion.files.disk import FOLDER, irregular, open_regular, storage_error

MAX_DOCUMENT_BYTES = 64 * 2**20
MAX_TEXT_BYTES = 4 * 2**20  # tokenised at once, in some 300 times the memory
CHUNK_BYTES = 2**20
PACKED = (".gz", ".bz2", ".xz", ".zst")
BYTE_ORDER_MARK = b"\xef\xbb\xbf"
WIDE_MARKS = {  # the longer ones first
    b"\xff\xfe\0\0": "UTF-32", b"\0\0\xfe\xff": "UTF-32",
    b"\xff\xfe": "UTF-16", b"\xfe\xff": "UTF-16",
}  # fmt: skip
TWICE = "read under another name"


def find(name: str) -> Path | None:
    """Return the file or folder of this name, if any.

    Raises:
        UserError: it is a broken link.
    """
    path = Path(os.path.expanduser(name))
    try:
        if path.exists():
            return path
        if path.is_symlink():
            raise UserError(
                f"{name} is a link to {os.readlink(path)}, which is not there: fix or remove it"
            )
    except OSError as error:
        if error.errno != errno.ENAMETOOLONG:  # a text instead of a name
            raise
    return None


def walk(folder: Path) -> Iterator[tuple[Path, str | None]]:
    """Yield all files below a folder that are not hidden, by name, and why not to read one.

    Links are followed, but each folder and file is read once, and no folder above `folder`.
    """
    seen = {_identity(above.stat()) for above in folder.resolve().parents}
    ahead = [folder]
    while ahead:
        path = ahead.pop()
        try:
            status = path.stat()
        except OSError as error:
            if error.errno not in (errno.ENOENT, errno.ELOOP):
                raise
            yield path, "a link that leads nowhere"
            continue
        kind, again = irregular(status), _identity(status) in seen
        seen.add(_identity(status))
        if kind in (None, FOLDER) and again:
            yield path, TWICE
        elif kind == FOLDER:
            inside = (child for child in path.iterdir() if not child.name.startswith("."))
            ahead += sorted(inside, reverse=True)
        else:
            yield path, kind


def _identity(status: os.stat_result) -> tuple[int, int]:
    return status.st_dev, status.st_ino


def text_suffix(path: Path) -> str:
    """Return the suffix of a file once it is unpacked, in small letters."""
    suffix = path.suffix.lower()
    return Path(path.stem).suffix.lower() if suffix in PACKED else suffix


@contextmanager
def unpacked(path: Path, name: str) -> Iterator[BinaryIO]:
    """Open a file, unpacked piece by piece if its suffix is one of `PACKED`.

    Raises:
        UserError: it is not a regular file, or not whole; or pyarrow is needed and missing.
        OSError: it cannot be read.
    """
    with open_regular(path) as file:
        if path.suffix.lower() not in PACKED:
            yield file
            return
        try:
            yield _unpack(file, path.suffix.lower(), name)
        except (EOFError, OSError, zlib.error, lzma.LZMAError, MemoryError) as error:
            if getattr(error, "errno", None) is not None:
                raise  # of the disk
            reason = str(error) or "it asks for more memory than there is"
            raise UserError(
                f"{name} cannot be unpacked ({reason[:100]}): get it again or leave it out"
            ) from None


def _unpack(file: BinaryIO, suffix: str, name: str) -> BinaryIO:
    if suffix == ".zst":
        arrow, _ = import_arrow(name)
        return io.BufferedReader(arrow.CompressedInputStream(arrow.PythonFile(file, "r"), "zstd"))
    formats: dict[str, Any] = {".gz": gzip, ".bz2": bz2, ".xz": lzma}
    return formats[suffix].open(file)


def import_arrow(name: str) -> tuple[Any, Any]:
    """Import pyarrow and its parquet module, which reading `name` needs.

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


def read_text(path: Path, what: str) -> str:
    """Read the text of one small UTF-8 file, which may be packed, without a byte order mark.

    Args:
        what: its name in messages.

    Raises:
        UserError: it does not exist, is not text, is empty, or has more than `MAX_TEXT_BYTES`.
    """
    try:
        with unpacked(path, what) as file:
            raw = file.read(MAX_TEXT_BYTES + 1)
    except FileNotFoundError:
        raise UserError(f"{what} does not exist: check its name") from None
    except OSError as error:
        raise storage_error(error, path) from error
    if len(raw) > MAX_TEXT_BYTES:
        raise UserError(f"{what} has more than {MAX_TEXT_BYTES // 2**20} MiB of text: shorten it")
    if not (text := decode(raw, what, 0)):
        raise UserError(f"{what} is empty: name a file that has text in it")
    return text


def read_lines(file: BinaryIO, name: str) -> Iterator[tuple[int, int, bytes]]:
    """Yield (number from 1, byte offset, line with its end) for each line.

    Raises:
        UserError: a line is longer than `MAX_DOCUMENT_BYTES`.
    """
    number, offset, rest, more = 0, 0, b"", True
    while more:
        chunk = file.read(CHUNK_BYTES)
        more = bool(chunk)
        lines = (rest + chunk).splitlines(keepends=True)
        # A line may continue in the next chunk, where a CR may turn out to be half of a CR LF.
        continues = more and lines and not lines[-1].endswith(b"\n")
        rest = lines[-1] if continues else b""
        if continues and len(rest) <= MAX_DOCUMENT_BYTES:
            lines.pop()
        for line in lines:
            number += 1
            if len(line) > MAX_DOCUMENT_BYTES:
                raise too_long(f"line {number} of {name}", "shorter lines")
            yield number, offset, line
            offset += len(line)


def decode(raw: bytes, name: str, offset: int) -> str:
    """Decode UTF-8 at the byte `offset` of `name`, without a byte order mark at its start.

    Raises:
        UserError: it is not UTF-8 text.
    """
    if offset == 0:
        raw = raw.removeprefix(BYTE_ORDER_MARK)
        for mark, wide in WIDE_MARKS.items():
            if raw.startswith(mark):
                raise UserError(
                    f"{name} is {wide} text, by its byte order mark: convert it, as iconv -f "
                    f"{wide} -t UTF-8 does, or leave it out"
                )
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


def too_long(what: str, instead: str) -> UserError:
    """Return the error for a document that is not read."""
    return UserError(
        f"{what} is one document of more than {MAX_DOCUMENT_BYTES // 2**20} MiB, which would not "
        f"fit in memory: use {instead}"
    )


def kind_of(value: object) -> str:
    """Return what a value of JSON or parquet is, in words."""
    if value is None:
        return "null"
    for kind, words in ((bool, "a truth value"), (int | float, "a number"), (str, "a string"),
                        (list, "a list"), (Mapping, "an object"),
                        (bytes, "a string of bytes")):  # fmt: skip
        if isinstance(value, kind):
            return words
    return f"a value of type {type(value).__name__}"
