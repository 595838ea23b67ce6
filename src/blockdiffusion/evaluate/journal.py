"""Finished parts of a long measurement, kept in a file from which it resumes."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from blockdiffusion.files.disk import add_to
from blockdiffusion.files.records import Damaged, json_lines, sealed, unsealed
from blockdiffusion.models.block_diffusion import BlockDiffusion


class Journal:
    """Results by name, one JSON line each, appended as they are found.

    Args:
        path: of the file; None keeps nothing.
        identity: everything that the results depend on, as text; results in the file that were
            found under another one are ignored.
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
        """Open a journal of results that depend on a model and on `others`; see `fingerprint`."""
        return cls(path, fingerprint(model, *others) if path else "")

    def __len__(self) -> int:
        return len(self._found)

    def names(self) -> list[str]:
        """Return the names of the results."""
        return list(self._found)

    def get(self, name: str) -> Any | None:
        return self._found.get(name)

    def put(self, name: str, result: Any) -> None:
        """Add a result of plain values; it survives a kill from here on.

        Raises:
            UserError: the disk is full.
        """
        if self.path is not None:
            self._found[name] = result
            entry = sealed({"identity": self.identity, "name": name, "result": result})
            add_to(self.path, b"\n" + json.dumps(entry).encode() + b"\n")

    def result(self, name: str, measure: Callable[[], Any]) -> Any:
        """Return the result called `name`, measured and added now if it is not there."""
        found = self.get(name)
        if found is None:
            found = measure()
            self.put(name, found)
        return found


NO_JOURNAL = Journal(None, "")


def journal_beside(result: Path | None) -> Path | None:
    """Return the path of the journal for the file `result`; None without one."""
    return None if result is None else result.with_name(f"{result.name}.journal")


def remove_journal(result: Path | None) -> None:
    """Remove the journal beside `result`.

    Call it only after all files of the result are written: a full disk at the end would otherwise
    cost the measurement.
    """
    if (journal := journal_beside(result)) is not None:
        journal.unlink(missing_ok=True)


def fingerprint(model: Any, *others: Any) -> str:
    """Return a hash of a model's configuration and weights, and of tensors and plain values."""
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
