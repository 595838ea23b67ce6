"""Zero-shot perplexity: one model on other kinds of text than it was trained on (paper, table 5).

The default conventions are those of the paper's evaluation: documents detokenized, one after the
other with nothing between them, wrapped to rows of the model's length. Every number comes with its
conventions.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from blockdiffusion.data.detokenizers import DETOKENIZERS
from blockdiffusion.data.named import NamedSet, NamedSplit
from blockdiffusion.data.parts import id_dtype
from blockdiffusion.data.shards import RowRules, WrapPacker
from blockdiffusion.data.tokenizers import encode, vocab_size
from blockdiffusion.diffusion.denoiser import Denoiser, bos_id
from blockdiffusion.errors import UserError
from blockdiffusion.evaluate.journal import Journal
from blockdiffusion.evaluate.likelihood import Likelihood, choose_estimator
from blockdiffusion.evaluate.scoring import score
from blockdiffusion.evaluate.windows import Window, check_stride, default_stride, document_windows
from blockdiffusion.evaluate.zero_shot.options import Task, ZeroShotOptions
from blockdiffusion.runtime.versions import versions

Progress = Callable[[str, int, int | None], None]


@dataclass(frozen=True, kw_only=True)
class ZeroShotRow:
    """One set: its likelihood and its conventions, or why it is missing.

    Attributes:
        task: its name in the suite.
        source: set, split and local path.
        detokenizer: see `data.detokenizers`.
        documents: those read, without blank ones.
        num_bytes: UTF-8 bytes that the counted tokens cover, after detokenizing: those of the whole
            text times the share of its tokens that were kept.
        result: None if the set is `missing`, with the reason there.
    """

    task: str
    source: str
    detokenizer: str
    documents: int = 0
    num_bytes: float = 0.0
    result: Likelihood | None = None
    missing: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return plain values, with those of the likelihood beside the others."""
        values = vars(self) | ({} if self.result is None else self.result.to_dict())
        return {name: value for name, value in values.items() if name != "result"}


@dataclass(frozen=True, kw_only=True)
class ZeroShotTable:
    """All sets of a suite, and the context, stride (None if wrapped) and frame that were used."""

    rows: tuple[ZeroShotRow, ...]
    options: ZeroShotOptions
    context: int
    stride: int | None
    frame: str
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON, with the versions that they were measured with."""
        return {
            **asdict(self.options),
            "context": self.context,
            "stride": self.stride,
            "frame": self.frame,
            "seconds": self.seconds,
            "versions": versions(),
            "sets": [row.to_dict() for row in self.rows],
        }


def measure_zero_shot(
    model: Denoiser,
    options: ZeroShotOptions | None = None,
    progress: Progress | None = None,
    journal: Path | None = None,
) -> ZeroShotTable:
    """Measure the likelihood of every set of a suite under a model.

    A set that cannot be read is in the table with the reason, and the others are measured.

    Args:
        model: any kind that `likelihood` takes, with a tokenizer.
        progress: called with (the set and the unit, done, total or None).
        journal: file that keeps finished parts, from which the same call resumes after an
            interruption, or once a missing set can be read; the caller removes it.

    Raises:
        UserError: the options do not fit the model, or no set at all can be read.
    """
    start = time.perf_counter()
    options = options or ZeroShotOptions()
    cutter = _Cutter.of(model, options)
    kept = Journal.of(journal, model, asdict(options.score), options.seed)
    rows = [
        _measure(model, cutter, options, task, named, kept, progress or (lambda *_: None))
        for task, named in options.sources()
    ]
    if all(row.result is None for row in rows):
        raise UserError(f"no set of the suite can be read; of {rows[0].task}: {rows[0].missing}")
    return ZeroShotTable(
        rows=tuple(rows),
        options=options,
        context=cutter.context,
        stride=cutter.stride,
        frame=cutter.frame,
        seconds=time.perf_counter() - start,
    )


def _measure(
    model: Denoiser,
    cutter: _Cutter,
    options: ZeroShotOptions,
    task: Task,
    named: NamedSet,
    journal: Journal,
    progress: Progress,
) -> ZeroShotRow:
    split = f"{named.data_set.name}:{named.split}"
    row = ZeroShotRow(
        task=task.name,
        source=split if named.path is None else f"{split}={named.path}",
        detokenizer=named.data_set.detokenize,
    )
    try:
        text = cutter.read(
            named.validation(), lambda done: progress(f"{task.name}: documents", done, None)
        )
    except UserError as error:
        return replace(row, missing=str(error))
    result = score(
        model,
        text.windows,
        options.score,
        seed=options.seed,
        bos=cutter.bos is not None,
        num_bytes=text.num_bytes,
        journal=journal,
        name=task.name,
        progress=lambda done, total: progress(f"{task.name}: rows", int(done), int(total)),
    )
    return replace(row, documents=text.documents, num_bytes=text.num_bytes, result=result)


# --- from documents to rows --------------------------------------------------------------------


class _Text(NamedTuple):
    windows: list[Window]
    documents: int
    num_bytes: float


@dataclass(frozen=True, kw_only=True)
class _Cutter:
    """Makes rows from a set's documents; tokens whose id is None are not inserted."""

    tokenizer: Any
    context: int
    stride: int | None  # None: the documents are wrapped
    frame: str
    bos: int | None
    row_eos: int | None
    document_eos: int | None
    options: ZeroShotOptions

    @classmethod
    def of(cls, model: Denoiser, options: ZeroShotOptions) -> _Cutter:
        """Return the conventions for this model.

        Raises:
            UserError: the model has no tokenizer, or the options do not fit it.
        """
        tokenizer, config = model.tokenizer, model.config
        if tokenizer is None:
            raise UserError(
                "this model's directory has no tokenizer, and texts need one: save one into it, or "
                "name one (--tokenizer gpt2)"
            )
        if vocab_size(tokenizer) > config.vocab_size or (
            tokenizer.mask_token_id not in (None, config.mask_id)
        ):
            raise UserError(
                f"the tokenizer has V = {vocab_size(tokenizer)} and mask "
                f"{tokenizer.mask_token_id}, the model V = {config.vocab_size} and mask "
                f"{config.mask_id}: name the tokenizer that the model was trained with"
            )
        choose_estimator(options.score, config)  # must fail before anything is read
        frame = options.frame
        if frame == "auto":
            frame = {None: "bos-eos", True: "bos", False: "none"}[config.bos]
        context = options.context or config.seq_len
        stride = None
        if options.packing == "document":
            stride = options.stride or default_stride(context, config.block_size)
            check_stride(context, stride, config.block_size, frame != "none")
        row_eos = frame == "bos-eos" and stride is None
        if context <= (frame != "none") + row_eos:
            raise UserError(f"context is {context}: no room for text in a row with {frame}")
        eos = config.eos_id if config.eos_id is not None else tokenizer.eos_token_id
        if eos is None and (row_eos or options.document_eos):
            raise UserError("this model names no EOS token: give frame bos or none")
        return cls(
            tokenizer=tokenizer,
            context=context,
            stride=stride,
            frame=frame,
            bos=None if frame == "none" else bos_id(model),
            row_eos=eos if row_eos else None,
            document_eos=eos if options.document_eos else None,
            options=options,
        )

    def read(self, source: NamedSplit, progress: Callable[[int], None]) -> _Text:
        """Return the rows of a set; `progress` is called with the number of documents read.

        Raises:
            UserError: it cannot be read, or does not fill a row.
        """
        documents = self._documents(source, progress)
        text = self._wrapped(documents) if self.stride is None else self._windows(documents)
        if not text.windows:
            raise UserError(
                f"{source.name} does not fill one row of {self.context} tokens: give a smaller "
                "context, or packing document"
            )
        return text

    def _documents(
        self, source: NamedSplit, progress: Callable[[int], None]
    ) -> Iterator[tuple[np.ndarray, int]]:
        """Yield (token ids, UTF-8 bytes) of each document."""
        detokenize = DETOKENIZERS[source.data_set.detokenize]
        texts = (text for text in source.documents() if text.strip())
        for number, text in enumerate(map(detokenize, islice(texts, self.options.max_documents))):
            progress(number)
            yield np.array(encode(self.tokenizer, text), dtype=np.int64), len(text.encode())

    def _wrapped(self, read: Iterator[tuple[np.ndarray, int]]) -> _Text:
        rules = RowRules(
            seq_len=self.context,
            dtype=id_dtype(vocab_size(self.tokenizer)),
            pad_id=0,
            row_bos_id=self.bos,
            row_eos_id=self.row_eos,
            document_eos_id=self.document_eos,
        )
        packer, limit = WrapPacker(rules), self.options.limit
        rows: list[np.ndarray] = []
        documents = num_bytes = num_tokens = 0
        for ids, size in read:
            made, _ = packer.add(ids.astype(rules.dtype), np.array([len(ids)]))
            rows += list(made)
            documents += 1
            num_bytes += size
            num_tokens += len(ids) + (self.document_eos is not None)
            if limit is not None and len(rows) >= limit:
                break
        given = int(self.bos is not None)
        windows = [Window(ids=row, given=given, unit=n) for n, row in enumerate(rows[:limit])]
        share = len(windows) * rules.payload / max(num_tokens, 1)
        return _Text(windows, documents, num_bytes * share)

    def _windows(self, read: Iterator[tuple[np.ndarray, int]]) -> _Text:
        assert self.stride is not None
        windows: list[Window] = []
        documents = num_bytes = 0
        for ids, size in read:
            if self.document_eos is not None:
                ids = np.append(ids, self.document_eos)
            windows += document_windows(ids, documents, self.context, self.stride, self.bos)
            documents += 1
            num_bytes += size
        return _Text(windows, documents, num_bytes)
