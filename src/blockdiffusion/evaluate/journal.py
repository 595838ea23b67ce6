"""What a long measurement has finished, kept in a file so that it goes on where it was stopped."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from blockdiffusion.files.disk import append, storage_error
from blockdiffusion.files.records import Damaged, json_lines, sealed, unsealed
from blockdiffusion.models.block_diffusion import BlockDiffusion


class Journal:
    """Results by name, one JSON line each, appended as they are found.

    Args:
        path: of the file; results in it that were found under another `identity` do not count.
            None: nothing is kept.
        identity: everything that the results depend on, as text.
    """

    def __init__(self, path: Path | None, identity: str):
        self.path, self.identity = path, identity
        self._found: dict[str, Any] = {}
        for line in json_lines(path, finite=False) if path and path.exists() else ():
            try:
                entry = unsealed(line)
            except Damaged:  # of something else, or changed
                continue
            if entry.get("identity") == identity and isinstance(entry.get("name"), str):
                self._found[entry["name"]] = entry.get("result")

    @classmethod
    def of(cls, path: Path | None, model: Any, *others: Any) -> Journal:
        """A journal of results that depend on a model and on `others`; see `fingerprint`."""
        return cls(path, fingerprint(model, *others) if path else "")

    def __len__(self) -> int:
        return len(self._found)

    def get(self, name: str) -> Any | None:
        """The result called `name`, or None."""
        return self._found.get(name)

    def put(self, name: str, result: Any) -> None:
        """Adds a result, of plain values; it survives a kill from here on.

        Raises:
            UserError: the disk is full.
        """
        if self.path is None:
            return
        self._found[name] = result
        entry = sealed({"identity": self.identity, "name": name, "result": result})
        try:
            with append(self.path) as file:
                file.write(b"\n" + json.dumps(entry).encode() + b"\n")
        except OSError as error:
            raise storage_error(error, self.path) from error

    def result(self, name: str, measure: Callable[[], Any]) -> Any:
        """The result called `name`: found here, or else measured now and added."""
        found = self.get(name)
        if found is None:
            found = measure()
            self.put(name, found)
        return found


NO_JOURNAL = Journal(None, "")


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
    if isinstance(model, BlockDiffusion):
        facts = {**model.backbone.config.to_dict(), **asdict(model.config)}
    else:
        facts = model.config.to_dict()
    digest = hashlib.sha256(repr(sorted(facts.items(), key=str)).encode())
    for value in (*model.state_dict().values(), *others):
        if isinstance(value, torch.Tensor):
            plain = value.detach().cpu().contiguous()
            digest.update(repr((plain.dtype, tuple(plain.shape))).encode())
            digest.update(plain.view(torch.uint8).numpy().tobytes() if plain.numel() else b"")
        else:
            digest.update(repr(value).encode())
    return digest.hexdigest()
