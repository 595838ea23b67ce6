"""Directories that appear whole or not at all: written aside, flushed to the disk, renamed."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from blockdiffusion.errors import UserError
from blockdiffusion.files.checksums import SUMS
from blockdiffusion.files.disk import FULL_DISK, remove, storage_error


def sync(path: Path) -> None:
    """Flush the contents of a file, or the names in a directory, to the disk."""
    if path.is_dir() and os.name == "nt":
        return  # Windows cannot open a directory
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def publish_directory(partial: Path, final: Path) -> None:
    """Give the complete directory `partial` the name `final`, once it is on the disk.

    Files of an existing directory are replaced, the checksums last: until then it has none.
    """
    for path in partial.iterdir():
        sync(path)
    sync(partial)
    if not final.exists():
        partial.rename(final)
        try:
            sync(final.parent)
        except OSError:  # reported as not written, it must not be there
            remove(final)
            raise
    else:
        (final / SUMS).unlink(missing_ok=True)
        for path in sorted(partial.iterdir(), key=lambda path: path.name == SUMS):
            os.replace(path, final / path.name)
        partial.rmdir()
        sync(final)


@contextmanager
def writing(what: str, partial: Path | None = None, then: str = "resume the run") -> Iterator[None]:
    """Remove `partial` if writing `what` fails, and report why in one sentence."""
    try:
        yield
    except OSError as error:
        if partial is not None:
            shutil.rmtree(partial, ignore_errors=True)
        if error.errno in FULL_DISK:
            raise UserError(
                f"the disk is full: the {what} could not be written; what was written before "
                f"it is intact: free some space, then {then}"
            ) from error
        raise storage_error(error, what) from error
