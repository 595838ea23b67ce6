"""Text from outside, made safe for where it is shown: a terminal, CSV, Markdown, HTML and SVG.

Text that is sampled or read, labels, paths, tokens and names may hold anything. All of it passes
one of these functions, and nothing else in the package writes to a standard stream or builds a
table's cells.
"""

from __future__ import annotations

import csv
import html as library
import io
import os
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from typing import IO, Any

# Control characters, those that change the direction of writing, and halves of surrogate pairs.
UNSEEN = "\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff\ufffe\uffff"
_FOR_TERMINAL = re.compile(f"[{UNSEEN}]|\r(?!\n)")
_FOR_FILES = re.compile(f"[{UNSEEN}]")
# Characters that a spreadsheet may drop at the start of a cell, then the signs of a formula.
_FORMULA = re.compile("[\\s\u200b-\u200f\u2060\ufeff]*[=+@\uff1d\uff0b\uff0d\uff20-]|[\t\n]")
_TAG = re.compile(r"<(?=[A-Za-z/!?])")
_ENTITY = re.compile(r"&(?=#?\w+;)")
_LINK = re.compile(r"\](?=[(:])")  # `[text](address)`, `[name]: address`
# A link to anything but a page, such as javascript:; spaces may precede the address.
_HARMFUL_LINK = re.compile(r"\](?=[(:]\s*<?(?!(?i:https?|mailto):)[^\s/?#)]*(?::|&))")


def terminal(text: str) -> str:
    """Replace control characters by signs such as `\\x1b`; newlines and tabs stay."""
    return _FOR_TERMINAL.sub(lambda found: ascii(found[0])[1:-1], text)


def for_stream(text: str, stream: IO[str]) -> str:
    """Apply `terminal` if the stream is a terminal; otherwise return the text unchanged."""
    return terminal(text) if stream.isatty() else text


class Forgiving:
    """A stream that ignores failures: a full disk, a closed terminal or reader."""

    def __init__(self, stream: IO[str]):
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        with suppress(OSError):
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        with suppress(OSError):
            self._stream.flush()


def mend_standard_streams() -> None:
    """Prepare the standard streams for a command.

    A closed one is replaced by /dev/null, so that no other file gets its number. Letters that an
    encoding lacks are written as `\\xe9`. Failures of standard error are ignored.
    """
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))  # noqa: SIM115  # stays open
    for output in (sys.stdout, sys.stderr):
        if isinstance(output, io.TextIOWrapper):
            output.reconfigure(errors="backslashreplace")
    if not isinstance(sys.stderr, Forgiving):
        sys.stderr = Forgiving(sys.stderr)  # type: ignore[assignment]  # as far as it is used


def say(text: str, *, err: bool = False, end: str = "\n") -> None:
    """Write to standard output or error."""
    stream = sys.stderr if err else sys.stdout
    try:
        stream.write(for_stream(text, stream) + end)
        stream.flush()
    except OSError as error:
        error.filename = "standard output"  # for the message
        raise


def csv_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return a CSV file with one line per row; missing values and None become empty cells.

    An apostrophe is put before text that a spreadsheet would read as a formula.
    """
    out = io.StringIO()
    names = dict.fromkeys(name for row in rows for name in row)
    writer = csv.DictWriter(out, list(names), lineterminator="\n")
    named: Mapping[str, Any] = {name: name for name in names}
    for row in (named, *rows):
        writer.writerow({name: _csv_cell(value) for name, value in row.items()})
    return out.getvalue()


def _csv_cell(value: Any) -> Any:
    if value is None or isinstance(value, int | float):
        return value
    # A bare \r ends a row for some readers, and Python's writer does not quote it.
    text = re.sub("\r\n?", "\n", _FOR_FILES.sub("\ufffd", str(value)))
    return f"'{text}" if _FORMULA.match(text) else text


def markdown(text: object) -> str:
    """Return one line of text without tags and links; other markup stays."""
    line = " ".join(markdown_prose(_ENTITY.sub("&amp;", str(text))).split())
    return _LINK.sub(r"]\\", line)


def markdown_prose(text: str) -> str:
    """Return handwritten Markdown without its tags, and without links that are not to a page."""
    return _HARMFUL_LINK.sub(r"]\\", _TAG.sub("&lt;", _FOR_FILES.sub("\ufffd", text)))


def markdown_table(rows: Iterable[Iterable[object]]) -> list[str]:
    """Return the lines of a table; the second row holds the rules below the headings."""
    return [f"| {' | '.join(map(_markdown_cell, row))} |" for row in rows]


def _markdown_cell(text: object) -> str:
    return markdown(re.sub(r"[\\`|]", r"\\\g<0>", str(text)))


def seen(text: object) -> str:
    """Return text without characters that XML forbids; it is not escaped yet."""
    return _FOR_FILES.sub("\ufffd", str(text))


def one_line(text: object) -> str:
    """Return the same as one line."""
    return " ".join(seen(text).split())


def html(text: object) -> str:
    """Return text for an element or an attribute of HTML or SVG."""
    return library.escape(seen(text))
