"""All documents of a preparation, in order, and the choice of those held out for validation."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from blockdiffusion.data.chat import conversation_text
from blockdiffusion.data.detokenizers import DETOKENIZERS
from blockdiffusion.data.named import NamedSplit, parse_named
from blockdiffusion.data.options import PrepareOptions
from blockdiffusion.data.sources import Source, open_sources
from blockdiffusion.errors import UserError, counted, few
from blockdiffusion.files.disk import GIVEN
from blockdiffusion.limits import MOST_COUNT
from blockdiffusion.runtime.seeding import derive_seed


class Corpus:
    """The documents of all sources in order, and the choice of those held out.

    Attributes:
        groups: the sources of "train" and "valid".
        left_out: files in folders that are not read, and why.
        skipped: for each group, by a source's id: documents that could not be read, last time.
    """

    def __init__(self, sources: Sequence[str], options: PrepareOptions) -> None:
        if not sources:
            raise UserError("there is no source to prepare: name files, a data set or python-docs")
        self.options = options
        self.groups: dict[str, list[Source]] = {"train": [], "valid": []}
        self.left_out: list[str] = []
        self.skipped: dict[str, Counter[int]] = {}
        for name in map(str, sources):
            if named := parse_named(name):
                self._refuse_chat(name)
                self.groups["train"].append(named.training())
                held_out = None if options.valid else named.held_out()
                self.groups["valid"] += [] if held_out is None else [held_out]
            else:
                self.groups["train"] += self._open(name)
        for name in options.valid:
            if named := parse_named(name):
                self._refuse_chat(name)
            self.groups["valid"] += self._open(name) if named is None else [named.validation()]

    def _open(self, name: str) -> list[Source]:
        options = self.options
        return open_sources(
            [name],
            field=options.field,
            documents=options.documents,
            document_bytes=options.document_bytes,
            left_out=self.left_out,
            read=conversation_text if options.packing == "chat" else None,
        )

    def _refuse_chat(self, name: str) -> None:
        if self.options.packing == "chat":
            raise UserError(
                f"{name} is a set of texts, which holds no conversations; give JSON lines, "
                "parquet or a Hugging Face data set of messages"
            )

    def account(self) -> Iterator[str]:
        """Yield a line about what was read, and one about what was left out."""
        sources = [source for group in self.groups.values() for source in group]
        names = [
            str(file)
            for source in sources
            for file in (isinstance(source, NamedSplit) and source.files) or [source.name]
        ]
        yield f"read {counted(len(names), 'source')}: {few(names)}"
        if self.left_out:
            yield f"left out {len(self.left_out):,}: {few(self.left_out)}"

    def signatures(self) -> list[dict[str, Any]]:
        """Return what identifies this corpus, with which sources are only for validation."""
        return [
            source.signature() | {"valid_only": group == "valid"}
            for group, sources in self.groups.items()
            for source in sources
        ]

    def num_bytes(self) -> int | None:
        """Return the UTF-8 bytes of all sources; None if one does not know."""
        sizes = [source.size for sources in self.groups.values() for source in sources]
        return None if None in sizes else sum(size for size in sizes if size is not None)

    def documents(self, group: str) -> Iterator[tuple[Source, str]]:
        """Yield the documents of "train" or "valid" that are not blank, each with its source.

        Raises:
            UserError: more than `options.skip_invalid` documents of both cannot be read.
        """
        skipped = self.skipped[group] = Counter()
        for source in self.groups[group]:
            for text in source.documents(functools.partial(self._skip, skipped, source)):
                if text.strip():
                    yield source, text

    def _skip(self, skipped: Counter[int], source: Source, error: UserError) -> None:
        skipped[id(source)] += 1
        allowed = self.options.skip_invalid
        if sum(counts.total() for counts in self.skipped.values()) > allowed:
            more = f", which has left out {allowed:,} already" if allowed else ""
            raise UserError(
                f"{error}, or leave such documents out (--skip-invalid N){more}"
            ) from None

    @property
    def draws(self) -> bool:
        """Whether validation documents are drawn from the training sources."""
        return not self.groups["valid"] and self.options.valid_fraction > 0

    @property
    def has_valid(self) -> bool:
        return bool(self.groups["valid"]) or self.draws

    @functools.cached_property
    def first_draw(self) -> int:
        """The number of documents of the first draw: all, in a corpus smaller than one draw."""
        return sum(1 for _ in islice(self.documents("train"), self._draw_size))

    @property
    def _draw_size(self) -> int:
        return min(round(1 / self.options.valid_fraction), MOST_COUNT)

    def check_split(self) -> None:
        """Check before any work whether validation documents can be drawn.

        Raises:
            UserError: there are not two documents; or a pipe would be read twice.
        """
        if self.draws or self.options.tokenizer.startswith("bpe:"):
            for name in (source.name for group in self.groups.values() for source in group):
                if GIVEN.fullmatch(name) and not Path(name).is_file():
                    raise UserError(
                        f"{name} is a pipe, whose text comes once, but it is read twice to draw "
                        "validation documents or to train a BPE: write it to a file, or give "
                        "valid_fraction 0 and another tokenizer"
                    )
        if self.draws and self.first_draw == 1:
            raise UserError(
                "the sources hold one document, which cannot be split into training and "
                "validation: cut it into documents by --documents blank-line or a smaller "
                "--document-bytes, name --valid sources, or give --valid-fraction 0"
            )

    def is_valid(self, number: int) -> bool:
        """Return whether document `number` of the group "train" is held out for validation.

        One of every round(1 / valid_fraction) documents is, at a place drawn from the seed and the
        number of the draw.
        """
        if not self.draws:
            return False
        draw, place = divmod(number, self._draw_size)
        size = self.first_draw if draw == 0 else self._draw_size
        return place == derive_seed(self.options.seed, "valid", draw) % size

    def detokenizer(self, source: Source) -> str:
        """Return the detokenizer of a source: the option's, else a named set's own."""
        if self.options.detokenize == "none" and isinstance(source, NamedSplit):
            return source.data_set.detokenize
        return self.options.detokenize

    def training_text(self) -> Iterator[str]:
        """Yield the detokenized documents of the training split, from which a BPE learns."""
        for number, (source, text) in enumerate(self.documents("train")):
            if not self.is_valid(number):
                yield DETOKENIZERS[self.detokenizer(source)](text)
