"""What a long measurement has finished, kept in a file so that it goes on where it was stopped."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import torch

from blockdiffusion.files.disk import append, storage_error
from blockdiffusion.files.records import Damaged, json_lines, sealed, unsealed


class Journal:
    """Results by name, one JSON line each, appended as they are found.

    Args:
        path: of the file; results in it that were found under another `identity` do not count.
        identity: everything that the results depend on, as text; see `fingerprint`.
    """

    def __init__(self, path: Path, identity: str):
        self.path, self.identity = path, identity
        self._found: dict[str, Any] = {}
        for line in json_lines(path, finite=False) if path.exists() else ():
            try:
                entry = unsealed(line)
            except Damaged:  # of something else, or changed
                continue
            if entry.get("identity") == identity and isinstance(entry.get("name"), str):
                self._found[entry["name"]] = entry.get("result")

    def __len__(self) -> int:
        return len(self._found)

    def get(self, name: str) -> Any | None:
        """The result called `name`, or None."""
        return self._found.get(name)

    def put(self, name: str, result: Any) -> None:
        """Adds a result; it survives a kill from here on.

        Raises:
            UserError: the disk is full.
        """
        self._found[name] = result
        entry = sealed({"identity": self.identity, "name": name, "result": result})
        try:
            with append(self.path) as file:
                file.write(b"\n" + json.dumps(entry).encode() + b"\n")
        except OSError as error:
            raise storage_error(error, self.path) from error


def journal_beside(result: Path | None) -> Path | None:
    """The journal of a measurement whose result goes into the file `result`; None without one."""
    return None if result is None else result.with_name(f"{result.name}.journal")


def remove_journal(result: Path | None) -> None:
    """Removes the journal beside `result`; only when all files of the result are written.

    Otherwise a full disk at the end would cost the measurement.
    """
    if (journal := journal_beside(result)) is not None:
        journal.unlink(missing_ok=True)


def fingerprint(model: Any, *others: Any) -> str:
    """A hash of a model's configuration and weights, and of tensors and plain values."""
    digest = hashlib.sha256(repr(sorted(model.config.to_dict().items(), key=str)).encode())
    for value in (*model.state_dict().values(), *others):
        if isinstance(value, torch.Tensor):
            plain = value.detach().cpu().contiguous()
            digest.update(repr((plain.dtype, tuple(plain.shape))).encode())
            digest.update(plain.view(torch.uint8).numpy().tobytes() if plain.numel() else b"")
        else:
            digest.update(repr(value).encode())
    return digest.hexdigest()
