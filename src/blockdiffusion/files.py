"""Files that appear whole or not at all."""

from __future__ import annotations

import errno
import os
import re
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from blockdiffusion.errors import UserError

FULL_DISK = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
# Open already: standard input, and what a shell hands over as <(command).
GIVEN = re.compile(r"/dev/stdin|/(dev|proc/self)/fd/\d+")
EMPTY, FOLDER = "empty", "a folder"


def irregular(status: os.stat_result) -> str | None:
    """What a path is, in words, if it is no regular file with something in it."""
    for kind, words in (
        (stat.S_ISREG, None if status.st_size else EMPTY),  # as all below /proc claim to be
        (stat.S_ISDIR, FOLDER),
        (stat.S_ISFIFO, "a named pipe"),
        (stat.S_ISSOCK, "a socket"),
    ):
        if kind(status.st_mode):
            return words
    return "a device"


def check_regular(path: Path) -> None:
    """Refuses what would be waited for, or never ends; standard input may be anything.

    Raises:
        UserError: it is no regular file, or an empty one.
        OSError: there is none.
    """
    if not GIVEN.fullmatch(str(path)) and (kind := irregular(path.stat())):
        raise UserError(f"{path} is {kind}: name a file that has text in it")


def open_regular(path: Path) -> BinaryIO:
    """Opens a file to read what `check_regular` does not refuse."""
    check_regular(path)
    # It may have become another one since, and a pipe waits for a writer.
    at_once = 0 if GIVEN.fullmatch(str(path)) else getattr(os, "O_NONBLOCK", 0)
    return open(path, "rb", opener=lambda name, flags: os.open(name, flags | at_once))


def partial_path(path: Path) -> Path:
    """Where `path` is written before it gets its name; hidden, and unique to this process."""
    return path.with_name(f".{path.name}.{os.getpid()}.partial")


@contextmanager
def written_aside(path: Path) -> Iterator[BinaryIO]:
    """A binary file that gets the name `path` when the block ends, and is removed if it fails.

    A kill at any moment leaves the old `path` (or none), never half of the new one.
    """
    partial = partial_path(path)
    try:
        with open(partial, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def write_whole(path: Path, content: bytes) -> None:
    """Writes a file whole, and makes the folders above it.

    Raises:
        UserError: it cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with written_aside(path) as file:
            file.write(content)
    except OSError as error:
        raise storage_error(error, path) from error


@contextmanager
def locked(path: Path, taken: str) -> Iterator[None]:
    """Holds the lock file `path` until the block ends; the system frees it if the process dies.

    Raises:
        UserError: another process holds it; `taken` is the sentence.
    """
    with open(path, "wb") as file:
        try:
            import fcntl
        except ImportError:  # no such locks on this system
            pass
        else:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise UserError(taken) from None
        yield


def storage_error(error: OSError, directory: Path) -> UserError:
    """The sentence for a write into `directory` that failed."""
    reason = error.strerror or str(error)
    if error.errno in FULL_DISK:
        return UserError(
            f"no room left to write {directory} ({reason}): free some space and run the same "
            "command again, it goes on from what is already done"
        )
    return UserError(f"cannot read or write {error.filename or directory}: {reason}")
