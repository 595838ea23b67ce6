"""The manifest of a prepared data directory: its contents and its origin."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from blockdiffusion.data.shards import PACKERS, Shard, file_beside
from blockdiffusion.errors import UserError, shown
from blockdiffusion.files.checksums import sha256_of, sums_of, write_sums
from blockdiffusion.files.disk import written_aside
from blockdiffusion.files.records import Damaged, build, of_file, read_json
from blockdiffusion.limits import MOST_COUNT, check_limits

FORMAT_VERSION = 1
MANIFEST_FILE = "manifest.json"
TOKENIZER_FOLDER = "tokenizer"
MOST_BYTES = 2**60  # of text
SHARD_NAME = re.compile(r"[\w-]+\.bin")
DAMAGED = "it is damaged: delete its directory and prepare the data again"


@dataclass(frozen=True, kw_only=True, slots=True)
class Split:
    """One split of a prepared directory.

    Attributes:
        tokens: valid positions of its rows: document tokens, document EOS, row BOS and row EOS.
        bytes: UTF-8 bytes of the text of the kept document tokens (after detokenizing); if tokens
            were dropped at the end, all text times the share of tokens kept.
        rows: rows of `seq_len` ids.
        dropped_tokens: document tokens in no row: those at the end that did not fill one, and those
            cut from conversations longer than a row.
        shards: the files, in order.
    """

    documents: int
    tokens: int
    bytes: int
    rows: int
    dropped_tokens: int
    shards: tuple[Shard, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Manifest:
    """The contents of `manifest.json`.

    Attributes:
        packing: "wrap" (no padding), "document" (one document a row, padded at the right) or
            "chat" (several conversations a row; see `shards.ChatPacker`).
        row_bos: whether every row begins with BOS, which is given: never masked, never scored.
        tokenizer: the option; the tokenizer itself is in the folder `tokenizer`.
        sources: name, signature, split and number of documents of each source.
        options: all options that the content depends on.
        splits: "train", and "valid" if there is one.
    """

    format_version: int
    seq_len: int
    packing: str
    row_bos: bool
    row_eos: bool
    document_eos: bool
    vocab_size: int
    mask_id: int
    bos_id: int | None
    eos_id: int | None
    pad_id: int
    tokenizer: str
    tokenizer_sha256: str
    sources: tuple[dict[str, Any], ...]
    options: dict[str, Any]
    splits: dict[str, Split]

    def save(self, directory: Path) -> None:
        """Write the checksums of all files, then `manifest.json`, into `directory`."""
        content = (json.dumps(dataclasses.asdict(self), indent=2) + "\n").encode()
        sums = {MANIFEST_FILE: hashlib.sha256(content).hexdigest()}
        for split in self.splits.values():
            sums |= {shard.file: shard.sha256 for shard in split.shards}
            beside = [file_beside(shard.file, self.packing) for shard in split.shards]
            sums |= {name: sha256_of(directory / name) for name in beside if name is not None}
        if (tokenizer := directory / TOKENIZER_FOLDER).is_dir():
            sums |= {f"{TOKENIZER_FOLDER}/{n}": s for n, s in sums_of(tokenizer).items()}
        write_sums(directory, sums)
        with written_aside(directory / MANIFEST_FILE) as file:
            file.write(content)

    @classmethod
    def load(cls, directory: str | Path) -> Manifest:
        """Read the manifest of `directory`.

        Raises:
            UserError: there is none, it is damaged, or another version wrote it.
        """
        path = Path(directory) / MANIFEST_FILE
        if not path.exists():
            raise UserError(
                f"{directory} holds no prepared data (no {MANIFEST_FILE}): name a directory that "
                "`blockdiff prepare` finished, or run the same prepare again to finish it"
            )
        found = read_json(path, DAMAGED)
        version = found.get("format_version")
        if version != FORMAT_VERSION:
            raise UserError(
                f"{path} has format version {shown(version)}, and this program reads "
                f"{FORMAT_VERSION}: prepare the data again"
            )
        with of_file(path, DAMAGED):
            manifest = build(cls, found)
            manifest._check()
        return manifest

    def _check(self) -> None:
        """Refuse what `prepare` never writes."""
        check_limits(self)
        for name in ("mask_id", "bos_id", "eos_id", "pad_id"):
            if (getattr(self, name) or 0) >= self.vocab_size:
                raise Damaged(f"{name} is {getattr(self, name)}, which is not below vocab_size")
        if self.packing not in PACKERS:
            raise Damaged(f"packing is {shown(self.packing)}; it must be {' or '.join(PACKERS)}")
        if not self.splits:
            raise Damaged("splits is empty")
        if not all(isinstance(source.get("name"), str) for source in self.sources):
            raise Damaged("one of the sources has no name")
        for name, split in self.splits.items():
            counted = sum(shard.rows for shard in split.shards)
            if not 1 <= split.rows == counted <= MOST_COUNT:
                raise Damaged(f"splits.{name} has {split.rows} rows, and {counted} in its shards")
            if not 1 <= split.tokens <= split.rows * self.seq_len:
                raise Damaged(f"splits.{name} has {split.tokens} tokens in {split.rows} rows")
            for what in ("bytes", "documents"):
                if not 1 <= getattr(split, what) <= MOST_BYTES:
                    raise Damaged(f"splits.{name}.{what} is {getattr(split, what)}")
            for shard in split.shards:
                if shard.rows < 1 or not SHARD_NAME.fullmatch(shard.file):
                    raise Damaged(f"splits.{name} has the shard {shown(shard.file)}")


def data_fingerprint(manifest: Manifest, split: str = "train") -> str:
    """Return a hash of the rows: a run resumes only with the same ones."""
    shards = [(shard.rows, shard.sha256) for shard in manifest.splits[split].shards]
    identity = [manifest.seq_len, manifest.vocab_size, manifest.tokenizer_sha256, shards]
    return hashlib.sha256(json.dumps(identity).encode()).hexdigest()
