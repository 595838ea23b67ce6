"""Checksums of written files, kept beside them in a format that `sha256sum -c` reads.

A directory without checksums is older or from another program; nothing is compared there. A
verified file is noted in `NOTES` with its size, dates and inode, and is not hashed again until one
of these changes.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import warnings
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from pathlib import Path, PurePosixPath
from typing import Any

from blockdiffusion.errors import UserError
from blockdiffusion.files.disk import written_aside
from blockdiffusion.runtime.distributed import current_group

SUMS = "SHA256SUMS"
NOTES = ".verified"
LINE = re.compile(r"([0-9a-fA-F]{64}) [ *](.+)")
REWRITTEN = {"README.md", "card.json"}  # people edit them; nothing is computed from them
MOST_BYTES = 2**24  # of either file: names and sums of 100,000 files
PIECE = 2**22
Report = Callable[[str, int, int | None], None]  # gets a stage, and what is done of how much


class Changed(UserWarning):
    """A file in use has changed since it was written."""


def silent(stage: str, done: int, total: int | None) -> None:
    """Report nothing."""


def sha256_of(path: Path, read: Callable[[int], None] = lambda count: None) -> str:
    """Return the sha256 of a file, calling `read` with the size of each piece."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while piece := file.read(PIECE):
            digest.update(piece)
            read(len(piece))
    return digest.hexdigest()


def sums_of(folder: Path, known: Mapping[str, str] | None = None) -> dict[str, str]:
    """Return the checksums of the files in a folder by name; `known` ones are not read."""
    names = sorted(path.name for path in folder.iterdir() if path.is_file())
    return {
        name: (known or {}).get(name) or sha256_of(folder / name)
        for name in names
        if name not in {SUMS, *REWRITTEN} and not name.startswith(".")
    }


def write_sums(folder: Path, sums: Mapping[str, str]) -> None:
    """Write `SHA256SUMS` into a folder."""
    with written_aside(folder / SUMS) as file:
        file.write("".join(f"{sha256}  {name}\n" for name, sha256 in sums.items()).encode())


def read_sums(folder: Path) -> dict[str, str] | None:
    """Read `SHA256SUMS` into sums by file name; return None if there is no such file.

    A line that is not about a file in the folder gives `SHA256SUMS` itself a sum that no file has,
    so that it is reported as damaged.
    """
    path = folder / SUMS
    if not path.is_file():
        return None
    sums: dict[str, str] = {}
    with open(path, "rb") as file:
        lines = file.read(MOST_BYTES).decode(errors="replace").splitlines()
    for line in lines:
        found = LINE.fullmatch(line)
        if found is None or found[2].startswith("/") or ".." in PurePosixPath(found[2]).parts:
            sums[SUMS] = ""
        else:
            sums[found[2]] = found[1].lower()
    return sums


def differing(
    folder: Path, sums: Mapping[str, str], report: Report = silent, *, remember: bool = False
) -> list[str]:
    """Return the names of the files that are missing or differ from `sums`.

    Args:
        report: gets the bytes read, of how many.
        remember: skip files that are noted as verified, and note those verified now.
    """
    notes = _read_notes(folder) if remember else {}
    states = {name: _state(folder / name, sums[name]) for name in sums}
    unread = [name for name, state in states.items() if state and state != notes.get(name)]
    total, done = sum(states[name][0] for name in unread), 0

    def read(count: int) -> None:
        nonlocal done
        done += count
        report("verify", done, total)

    bad = [name for name, state in states.items() if not state]
    bad += [name for name in unread if sha256_of(folder / name, read) != sums[name]]
    whole = {name: states[name] for name in unread if name not in bad}
    if remember and whole:
        # If it cannot be written, the files are read each time.
        with suppress(OSError, UserError), written_aside(folder / NOTES) as file:
            file.write(json.dumps(notes | whole).encode())
    return bad


def check_files(folder: Path, sums: Mapping[str, str], remedy: str, report: Report) -> None:
    """Refuse files that differ from `sums`, and remember those that do not.

    Of several processes only the first looks.

    Raises:
        UserError: a file is missing or damaged.
    """
    if current_group().is_first and (bad := differing(folder, sums, report, remember=True)):
        raise UserError(f"{named(folder, bad)}; {remedy}")


def warn_of_changes(folder: Path) -> None:
    """Warn about changed files in a model's folder; the user may have meant the change.

    Of several processes only the first looks.
    """
    sums = read_sums(folder)
    while sums is not None and current_group().is_first:
        bad = differing(folder, sums, remember=True)
        before, sums = sums, read_sums(folder)
        if sums == before:  # else a run has rewritten it meanwhile
            if bad:
                warnings.warn(f"{named(folder, bad)}; {accept(folder)}", Changed, stacklevel=3)
            return


def named(folder: Path, bad: Iterable[str]) -> str:
    """Return the beginning of a sentence about damaged files."""
    first, *more = (str(folder / name) for name in bad)
    others = f" (and {len(more)} more: {', '.join(more[:3])})" if more else ""
    return f"{first} is damaged or was changed: it does not match its sha256{others}"


def accept(folder: Path) -> str:
    """Return how a user confirms a change."""
    return f"if you changed it yourself, confirm it with `blockdiff verify {folder} --update`"


def _state(path: Path, sha256: str) -> list[Any]:
    """Return what identifies a file and its sum; an empty list if there is no file."""
    if not path.is_file():
        return []
    status = os.stat(path)
    return [status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino, sha256]


def _read_notes(folder: Path) -> dict[str, Any]:
    path = folder / NOTES
    with suppress(OSError, ValueError, RecursionError):
        if path.is_file() and path.stat().st_size <= MOST_BYTES:
            notes = json.loads(path.read_bytes())
            return notes if isinstance(notes, dict) else {}
    return {}
