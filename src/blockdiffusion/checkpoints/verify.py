"""Compare a directory and all below it with the checksums written with its files."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from blockdiffusion.data.manifest import MANIFEST_FILE, Manifest
from blockdiffusion.errors import UserError
from blockdiffusion.files.checksums import Report, differing, read_sums, silent, sums_of, write_sums
from blockdiffusion.files.disk import storage_error

BIG = (".safetensors", ".ckpt", ".bin", ".pt", ".pth")  # weights, which should have sums


@dataclass(frozen=True, slots=True)
class Verified:
    """The result for one folder.

    Attributes:
        num_files: files with a checksum.
        bad: those among them that are missing or have changed.
        without: names of files of weights in a folder without checksums.
    """

    folder: Path
    num_files: int
    bad: tuple[str, ...] = ()
    without: tuple[str, ...] = ()


def verify(
    directory: str | Path, *, update: bool = False, report: Report = silent
) -> list[Verified]:
    """Compare every file that has a checksum, in prepared data, runs, checkpoints and models.

    Args:
        directory: any of these, or a folder of them.
        update: write the checksums of models and checkpoints as they are now. Those of prepared
            data stay, since runs are tied to them.
        report: called with the number of bytes read, and their total.

    Raises:
        UserError: there is no such directory, it cannot be read, or it holds none of these.
    """
    directory = Path(directory)
    if not directory.is_dir():
        raise UserError(f"{directory} is not a directory; give prepared data, a run or a model")
    found = []
    for place, folders, files in os.walk(directory, onerror=_unreadable):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        folder, is_data = Path(place), MANIFEST_FILE in files
        weights = tuple(sorted(name for name in files if name.endswith(BIG)))
        sums = read_sums(folder)
        if update and not is_data and (sums is not None or weights):
            sums = sums_of(folder)
            write_sums(folder, sums)
        if sums is None and is_data:  # of an older version
            splits = Manifest.load(folder).splits.values()
            sums = {shard.file: shard.sha256 for split in splits for shard in split.shards}
        if sums is not None:
            bad = tuple(differing(folder, sums, report))
            found.append(Verified(folder, len(sums), bad=bad))
        elif weights:
            found.append(Verified(folder, 0, without=weights))
    if not found:
        raise UserError(f"{directory} holds no prepared data, no run and no model; give one")
    return found


def _unreadable(error: OSError) -> None:
    raise storage_error(error) from error
