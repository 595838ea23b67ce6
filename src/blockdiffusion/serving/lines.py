"""JSON lines of requests, with the line named in every error."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from blockdiffusion.data.reading import decode, read_lines, unpacked
from blockdiffusion.data.sources import JSON
from blockdiffusion.errors import UserError, shown

COPIED = ("id", "metadata")  # from a line to its results


def records(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield (number from 1, object) of each line that is not blank.

    Raises:
        UserError: a line is no JSON object.
    """
    with unpacked(path, str(path)) as file:
        for number, offset, raw in read_lines(file, str(path)):
            line = decode(raw, str(path), offset).strip()
            if line:
                with about(number, path):
                    yield number, _object(line)


def check_keys(record: dict[str, Any], known: tuple[str, ...]) -> None:
    """Refuse keys that nothing reads.

    Raises:
        UserError: there is one.
    """
    known = (*known, *COPIED)
    unknown = record.keys() - {*known}
    if unknown:
        raise UserError(
            f"it has {shown(min(unknown))}; known are {', '.join(known)} (put what is yours into "
            "metadata)"
        )


def copied(record: dict[str, Any]) -> dict[str, Any]:
    """Return what a line says of itself."""
    return {name: record[name] for name in COPIED if name in record}


@contextmanager
def about(line: int, path: Path) -> Iterator[None]:
    """Name the line in an error."""
    try:
        yield
    except UserError as error:
        raise UserError(f"line {line} of {path}: {error}") from None


def _object(line: str) -> dict[str, Any]:
    try:
        record = JSON.decode(line)
    except (ValueError, RecursionError) as error:
        raise UserError(f"it is not JSON ({error}); write one object a line") from None
    if not isinstance(record, dict):
        raise UserError('it is not an object; write {"prompt": "..."}')
    return record
