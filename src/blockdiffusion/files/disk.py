"""Files that appear whole or not at all, and that are never written through a link."""

from __future__ import annotations

import errno
import os
import re
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from blockdiffusion.errors import UserError

FULL_DISK = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
# Already open: standard input, and files that a shell passes as <(command).
GIVEN = re.compile(r"/dev/stdin|/(dev|proc/self)/fd/\d+")
EMPTY, FOLDER = "empty", "a folder"
REMEDIES = {
    errno.EACCES: "choose another place, or change its rights",
    errno.EPERM: "choose another place, or change its rights",
    errno.EROFS: "choose another place",
    errno.ENAMETOOLONG: "choose a shorter name",
    errno.ENOTDIR: "a part of this path is a file; choose another place",
    errno.EISDIR: "give the name of a file",
    errno.ENOENT: "check the name",
    errno.ELOOP: "its links lead round in a circle; remove them",
    errno.EMFILE: "allow more open files (ulimit -n)",
    errno.ENFILE: "close other programs, which hold too many files open",
    errno.EIO: "check the disk, then run the same command again",
    errno.ESTALE: "the file server has lost it; run the same command again",
}


def irregular(status: os.stat_result) -> str | None:
    """Return the kind of a path, or None for a regular file with content."""
    for kind, words in (
        (stat.S_ISREG, None if status.st_size else EMPTY),  # files below /proc claim to be empty
        (stat.S_ISDIR, FOLDER),
        (stat.S_ISFIFO, "a named pipe"),
        (stat.S_ISSOCK, "a socket"),
    ):
        if kind(status.st_mode):
            return words
    return "a device"


def check_regular(path: Path, may_be_empty: bool = False) -> None:
    """Refuse files that would block or never end; standard input may be of any kind.

    Raises:
        UserError: it is not a regular file, or it is empty.
        OSError: there is none.
    """
    kind = None if GIVEN.fullmatch(str(path)) else irregular(path.stat())
    if kind and not (may_be_empty and kind == EMPTY):
        raise UserError(f"{path} is {kind}: name a file that has text in it")


def open_regular(path: Path, may_be_empty: bool = False) -> BinaryIO:
    """Open a file to read that `check_regular` allows."""
    check_regular(path, may_be_empty)
    # It may have been replaced by a pipe since, which waits for a writer.
    at_once = 0 if GIVEN.fullmatch(str(path)) else getattr(os, "O_NONBLOCK", 0)
    return open(path, "rb", opener=lambda name, flags: os.open(name, flags | at_once))


def partial_path(path: Path) -> Path:
    """Return the name of `path` until it is complete: hidden, and unique to this process."""
    return path.with_name(f".{path.name}.{os.getpid()}.partial")


def create(path: Path) -> BinaryIO:
    """Open a new file to write; a leftover or a link of this name is removed first."""
    path.unlink(missing_ok=True)
    return open(path, "xb")


def append(path: Path, buffering: int = -1) -> BinaryIO:
    """Open a file to append to, made if there is none.

    Raises:
        UserError: the path is a link or not a regular file.
    """
    return open(path, "ab", buffering, opener=_open_itself)  # type: ignore[return-value]


def add_to(path: Path, content: bytes) -> None:
    """Appends to a file; the content survives a kill from here on.

    Raises:
        UserError: it cannot be written.
    """
    try:
        with append(path) as file:
            file.write(content)
    except OSError as error:
        raise storage_error(error, path) from error


def _open_itself(path: str, flags: int) -> int:
    """Open a regular file, following no link: whoever places one must not choose the file."""
    flags |= getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)  # a FIFO would wait
    refused = UserError(
        f"{path} is a link or not a regular file, so it is not written; remove it, or choose "
        "another place"
    )
    try:
        descriptor = os.open(path, flags, 0o666)
    except OSError as error:
        raise (refused if error.errno in (errno.ELOOP, errno.ENXIO) else error) from None
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise refused
    return descriptor


def refuse_no_file(path: Path) -> None:
    """Refuse to replace a directory, a device or a pipe by a file."""
    if path.is_dir():
        raise UserError(f"{path} is a directory; give the name of a file")
    if path.exists() and not path.is_file():
        raise UserError(f"{path} is not a regular file; give the name of a file")


@contextmanager
def written_aside(path: Path) -> Iterator[BinaryIO]:
    """Yield a binary file that gets the name `path` when the block ends, unless it fails.

    A kill at any moment leaves the old `path` (or none), never half of the new one.

    Raises:
        UserError: `path` is not a file, but a device, for example.
    """
    refuse_no_file(path)
    partial = partial_path(path)
    try:
        with create(partial) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def write_whole(path: Path, content: bytes) -> None:
    """Write a file whole, and make the folders above it.

    Raises:
        UserError: it cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with written_aside(path) as file:
            file.write(content)
    except OSError as error:
        raise storage_error(error, path) from error


def remove(path: Path) -> None:
    """Remove a file, a link (not its target) or a directory with its contents."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


@contextmanager
def locked(path: Path, taken: str) -> Iterator[None]:
    """Hold the lock file `path` until the block ends; the system frees it if the process dies.

    Raises:
        UserError: another process holds it (with the message `taken`), or it is a link.
    """
    with append(path) as file:
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


def storage_error(error: OSError, where: Path | str | None = None) -> UserError:
    """Return the error for failed reading or writing, at `where` if `error` names no file."""
    reason = error.strerror or str(error) or type(error).__name__
    if error.errno in FULL_DISK:
        return UserError(
            f"no room left to write {where or error.filename or 'a file'} ({reason}): free some "
            "space and run the same command again; it resumes from what is already done"
        )
    what = f"cannot read or write {error.filename or where}" if error.filename or where else ""
    told = ": ".join(filter(None, (what, reason)))
    remedy = REMEDIES.get(error.errno or 0)
    return UserError(f"{told}; {remedy}" if remedy else told)
