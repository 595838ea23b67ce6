"""A disk that fails at the n-th operation that changes it, for tests of what is then left.

Operations are counted below one folder: opening for writing, writing, flushing, closing, syncing,
renaming, removing, making folders. What libraries written in Rust write is one operation.
"""

from __future__ import annotations

import builtins
import errno
import io
import os
import unittest.mock
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

REMOVING = {"unlink", "remove", "rmdir", "truncate"}  # what a full disk still does


class FaultyDisk:
    """Fails with EIO at operation `fails` (from 1), or is full from there on; counts them all.

    Args:
        folder: operations elsewhere neither count nor fail.
        fails: 0 = none.
        full: ENOSPC for every operation from `fails` on that needs room.
    """

    def __init__(self, folder: Path, fails: int = 0, full: bool = False):
        self.folder, self.fails, self.full = str(folder), fails, full
        self.count = 0
        self.failed: list[str] = []

    def operation(self, kind: str, path: Any) -> None:
        """Counts one, and fails if it is its turn."""
        if isinstance(path, int):
            path = os.readlink(f"/proc/self/fd/{path}")
        if not str(path).startswith(self.folder):
            return
        self.count += 1
        number = self.count
        due = self.fails and (number >= self.fails if self.full else number == self.fails)
        if due and not (self.full and kind in REMOVING):
            self.failed.append(f"{kind} {path}")
            code = errno.ENOSPC if self.full else errno.EIO
            raise OSError(code, os.strerror(code), str(path) if kind != "write" else None)

    @contextmanager
    def installed(self) -> Iterator[FaultyDisk]:
        """The disk is this one until the block ends."""
        real_open, real_os_open = builtins.open, os.open
        real_save = PreTrainedTokenizerBase.save_pretrained

        def fake_open(file: Any, mode: str = "r", *more: Any, **named: Any) -> Any:
            if isinstance(file, int) or not set(mode) & set("wax+"):
                return real_open(file, mode, *more, **named)
            self.operation("open", file)
            return _Written(real_open(file, mode, *more, **named), self, os.fspath(file))

        def fake_os_open(path: Any, flags: int, *more: Any, **named: Any) -> int:
            if flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
                self.operation("os.open", path)
            return real_os_open(path, flags, *more, **named)

        def fake_save(tokenizer: Any, folder: Any, *more: Any, **named: Any) -> Any:
            try:
                self.operation("save", folder)
            except OSError as error:  # as the library written in Rust tells it
                raise Exception(f"{error.strerror} (os error {error.errno})") from None
            return real_save(tokenizer, folder, *more, **named)

        def counted(name: str) -> Any:
            real = getattr(os, name)

            def operation(path: Any, *more: Any, dir_fd: int | None = None, **named: Any) -> Any:
                if dir_fd is None:
                    self.operation(name, path)
                    return real(path, *more, **named)
                self.operation(name, os.path.join(os.readlink(f"/proc/self/fd/{dir_fd}"), path))
                return real(path, *more, dir_fd=dir_fd, **named)

            return operation

        with ExitStack() as stack:
            patch = unittest.mock.patch.object
            for module in (builtins, io):
                stack.enter_context(patch(module, "open", fake_open))
            stack.enter_context(patch(os, "open", fake_os_open))
            for name in ("replace", "rename", "mkdir", "rmdir", "unlink", "remove", "fsync"):
                stack.enter_context(patch(os, name, counted(name)))
            stack.enter_context(patch(PreTrainedTokenizerBase, "save_pretrained", fake_save))
            yield self


class _Written:
    """A file that is written to a faulty disk; of a write that fails, half is done."""

    def __init__(self, file: Any, disk: FaultyDisk, path: str):
        self._file, self._disk, self._path = file, disk, path

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)

    def __enter__(self) -> _Written:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def write(self, data: Any) -> Any:
        try:
            self._disk.operation("write", self._path)
        except OSError:
            self._file.write(data[: len(data) // 2])
            raise
        return self._file.write(data)

    def writelines(self, lines: Any) -> None:
        for line in lines:
            self.write(line)

    def flush(self) -> None:
        self._disk.operation("flush", self._path)
        self._file.flush()

    def truncate(self, size: int | None = None) -> int:
        self._disk.operation("truncate", self._path)
        return self._file.truncate(size)

    def close(self) -> None:
        if self._file.closed:
            return
        self._file.close()
        self._disk.operation("close", self._path)
