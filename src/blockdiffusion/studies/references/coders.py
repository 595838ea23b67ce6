"""What other coders need for the symbols that a model is scored on: n-gram models, compressors.

A likelihood is a code length, so a model of any sequence compares with whatever else codes it. All
get the training split of one prepared directory and code the same held-out rows. What they may
read differs, and stands in the table: a model and an n-gram model begin anew in every row, as in
training; a compressor reads the rows as one text.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from blockdiffusion.data.loader import Batch, TokenRows, free_tokens
from blockdiffusion.data.manifest import TOKENIZER_FOLDER, Manifest, data_fingerprint
from blockdiffusion.data.tokenizers import load_tokenizer
from blockdiffusion.diffusion.denoiser import Denoiser
from blockdiffusion.errors import UserError
from blockdiffusion.evaluate.journal import Journal
from blockdiffusion.evaluate.likelihood import Likelihood, choose_estimator, data_error
from blockdiffusion.evaluate.prepared import read_rows
from blockdiffusion.evaluate.scoring import score
from blockdiffusion.evaluate.windows import Window
from blockdiffusion.runtime.versions import versions
from blockdiffusion.studies.options import CoderOptions
from blockdiffusion.studies.references.compressors import COMPRESSORS, PREFIX_BYTES, Compressor
from blockdiffusion.studies.references.ngram import count_ngrams

MAX_TRAIN_TOKENS = 2**25  # n-grams are counted in memory, about 120 bytes for a token
ROWS_AT_ONCE = 4096
BETWEEN_DOCUMENTS = "\0"  # one byte for an EOS, which the others pay for, too
Progress = Callable[[str, int, int | None], None]


@dataclass(frozen=True, kw_only=True, slots=True)
class CoderRow:
    """What one coder needs.

    Attributes:
        reads: what it knows when it codes a symbol, besides what it learnt.
        bits_per_byte: of the text that the coded symbols cover.
        stderr_data: of bits_per_byte, over rows; None for compressors, which code no row alone.
        stderr_noise: of bits_per_byte, of the masks; None where nothing is drawn.
        is_bound: whether it needs at most so many.
    """

    coder: str
    reads: str
    bits_per_token: float
    bits_per_byte: float
    stderr_data: float | None = None
    stderr_noise: float | None = None
    is_bound: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class CoderTable:
    """All coders, over the same symbols.

    Attributes:
        num_tokens: symbols that were coded, `num_rows` the rows that they stand in, `num_bytes`
            the UTF-8 bytes of text that they cover (those of the split times the share of tokens).
        train_tokens: symbols of the training rows that the n-grams were counted on.
        seq_len: L.
        models: likelihoods by name, each as `Likelihood.to_dict` gives it.
    """

    rows: tuple[CoderRow, ...]
    options: CoderOptions
    num_tokens: int
    num_rows: int
    num_bytes: float
    train_tokens: int
    seq_len: int
    vocab_size: int
    bos: bool
    models: dict[str, dict[str, Any]]

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON, with the versions that they were measured with."""
        values = asdict(self)
        coders, options = values.pop("rows"), values.pop("options")
        return {
            **options,
            **values,
            "coders": coders,
            "versions": versions(),
        }


def compare_coders(
    directory: str | Path,
    options: CoderOptions | None = None,
    models: Mapping[str, Denoiser] | None = None,
    progress: Progress | None = None,
    journal: Path | None = None,
) -> CoderTable:
    """The bits that n-gram models, compressors and `models` spend on held-out rows.

    Args:
        directory: what `blockdiff prepare` made.
        models: by the names that the table gives them, of any kind that `likelihood` takes.
        progress: called with (what is measured, done, how many there are).
        journal: file that keeps what is finished, so that the same call resumes after an
            interruption; the caller removes it.

    Raises:
        UserError: no such data or split, too many training tokens, a model of other symbols, or an
            estimator that a model does not allow.
    """
    options = CoderOptions() if options is None else options
    report = progress or (lambda *_: None)
    # Every model is checked before anything long begins.
    for model in (models or {}).values():
        read_rows(directory, options.split, model, options.limit, options.bos)
        choose_estimator(options.score, model.config)
    symbols = _Symbols.of(Path(directory), options)
    of_models = ("score", "seed")
    settings = {n: value for n, value in asdict(options).items() if n not in of_models}
    kept = Journal(journal, repr((symbols.fingerprint, settings)))
    rows = [CoderRow(**row) for row in kept.result("n-grams", partial(_ngrams, symbols, report))]
    for number, compressor in enumerate(COMPRESSORS):
        report("compressors", number, len(COMPRESSORS))
        measured = kept.result(compressor.name, partial(_compressed, symbols, compressor))
        rows += [CoderRow(**row) for row in measured]
    found = {}
    for name, model in (models or {}).items():
        result = _model(model, name, symbols, report, journal)
        rows += _model_rows(name, result, symbols)
        found[name] = result.to_dict()
    return CoderTable(
        rows=tuple(rows),
        options=options,
        num_tokens=symbols.num_tokens,
        num_rows=len(symbols.held_out.ids_BL),
        num_bytes=symbols.num_bytes,
        train_tokens=int(symbols.counted(symbols.train).sum()),
        seq_len=symbols.manifest.seq_len,
        vocab_size=symbols.manifest.vocab_size,
        bos=symbols.bos,
        models=found,
    )


# --- the symbols -------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class _Symbols:
    """Rows to learn from and rows to code."""

    directory: Path
    manifest: Manifest
    options: CoderOptions
    train: Batch
    held_out: Batch
    bos: bool
    num_bytes: float

    @classmethod
    def of(cls, directory: Path, options: CoderOptions) -> _Symbols:
        source, train = TokenRows(directory, options.split), TokenRows(directory, "train")
        manifest, split = source.manifest, source.manifest.splits[options.split]
        if manifest.packing == "chat":
            raise UserError(
                f"{directory} holds conversations, of which only responses are scored; give data "
                "prepared with --packing wrap or document"
            )
        held_out = source.rows(np.arange(min(source.num_rows, options.limit or source.num_rows)))
        share = int(_valid(held_out).sum()) / split.tokens
        train_rows = min(train.num_rows, options.train_rows or train.num_rows)
        if train_rows * train.seq_len > MAX_TRAIN_TOKENS:
            raise UserError(
                f"{directory} has {train_rows * train.seq_len:,} training tokens, and n-grams of "
                f"at most {MAX_TRAIN_TOKENS:,} are counted in memory; give train_rows, up to "
                f"{MAX_TRAIN_TOKENS // train.seq_len}"
            )
        return cls(
            directory=directory,
            manifest=manifest,
            options=options,
            train=train.rows(np.arange(train_rows)),
            held_out=held_out,
            bos=manifest.row_bos if options.bos is None else options.bos,
            num_bytes=split.bytes * share,
        )

    @property
    def fingerprint(self) -> str:
        splits = ("train", self.options.split)
        return " ".join(data_fingerprint(self.manifest, split) for split in splits)

    def counted(self, batch: Batch) -> np.ndarray:
        """Which positions (B, L) are coded: not padding, not given."""
        return free_tokens(batch, self.bos).numpy()

    @property
    def num_tokens(self) -> int:
        return int(self.counted(self.held_out).sum())

    @cached_property
    def texts(self) -> tuple[bytes, bytes]:
        """The training text, as much as compressors can reach back to, and the held-out one."""
        split = self.manifest.splits["train"]
        rows = math.ceil(PREFIX_BYTES * split.rows / max(split.bytes, 1))
        valid_BL = self.train.valid_BL
        last = Batch(self.train.ids_BL[-rows:], None if valid_BL is None else valid_BL[-rows:])
        return self._text(last)[-PREFIX_BYTES:], self._text(self.held_out)

    def _text(self, batch: Batch) -> bytes:
        """The rows' text, with a single byte for every EOS."""
        tokenizer = load_tokenizer(self.directory / TOKENIZER_FOLDER)
        ids = batch.ids_BL.numpy()[self.counted(batch)]
        eos = self.manifest.eos_id
        ends = [] if eos is None else np.flatnonzero(ids == eos)
        documents = [
            str(tokenizer.decode(piece[piece != eos].tolist(), skip_special_tokens=True))
            for piece in np.split(ids, ends)
        ]
        return BETWEEN_DOCUMENTS.join(documents).encode()


def _valid(batch: Batch) -> np.ndarray:
    if batch.valid_BL is None:
        return np.ones(batch.ids_BL.shape, dtype=bool)
    return batch.valid_BL.numpy()


# --- the coders --------------------------------------------------------------------------------


def _ngrams(symbols: _Symbols, progress: Progress) -> list[dict[str, Any]]:
    options, manifest = symbols.options, symbols.manifest
    model = count_ngrams(
        symbols.train.ids_BL.numpy(),
        symbols.counted(symbols.train),
        _valid(symbols.train),
        order=options.order,
        vocab_size=manifest.vocab_size,
        num_symbols=manifest.vocab_size - 1,  # all but the mask
        progress=lambda done, total: progress("n-grams: orders", done, total),
    )
    ids_BL, counted_BL = symbols.held_out.ids_BL.numpy(), symbols.counted(symbols.held_out)
    nats_BK = np.concatenate(
        [
            (model.nats(ids_BL[rows]) * counted_BL[rows]).sum(-1).T
            for rows in _slices(len(ids_BL), ROWS_AT_ONCE)
        ]
    )
    tokens_B = torch.from_numpy(counted_BL.sum(1))
    return [
        _row(
            f"{k}-gram (Kneser-Ney)",
            "nothing" if k == 1 else f"{k - 1} before in the row",
            float(nats_B.sum()),
            symbols,
            error=data_error(torch.from_numpy(nats_B), tokens_B),
        )
        for k, nats_B in enumerate(nats_BK.T.copy(), 1)
    ]


def _slices(total: int, size: int) -> Iterator[slice]:
    for first in range(0, total, size):
        yield slice(first, first + size)


def _compressed(symbols: _Symbols, compressor: Compressor) -> list[dict[str, Any]]:
    before, text = symbols.texts
    return [
        _row(
            f"{compressor.name}, {how}",
            f"{compressor.window} before{what}",
            bits * math.log(2),
            symbols,
        )
        for how, what, bits in (
            ("alone", ", held-out text only", compressor.bits(text)),
            ("after the training text", "", compressor.bits_after(before, text)),
        )
    ]


def _model(
    model: Denoiser, name: str, symbols: _Symbols, progress: Progress, journal: Path | None
) -> Likelihood:
    options = symbols.options
    kept = Journal.of(journal, model, asdict(options.score), options.seed)
    valid_BL = _valid(symbols.held_out)
    windows = [
        Window(ids=ids[valid], given=int(symbols.bos), unit=number)
        for number, (ids, valid) in enumerate(
            zip(symbols.held_out.ids_BL.numpy(), valid_BL, strict=True)
        )
    ]
    return score(
        model,
        windows,
        options.score,
        seed=options.seed,
        bos=symbols.bos,
        num_bytes=symbols.num_bytes,
        journal=kept,
        progress=lambda done, total: progress(f"{name}: rows", int(done), int(total)),
    )


def _model_rows(name: str, result: Likelihood, symbols: _Symbols) -> Iterator[CoderRow]:
    """The bound, and what is known better than that."""

    def row(what: str, nats: float, error, noise, is_bound: bool) -> CoderRow:
        reads = "all before in the row"
        if result.block_size > 1:
            reads = "blocks before in the row; of its own, what is revealed"
        total = nats * result.num_tokens
        found = _row(f"{name}, {what}", reads, total, symbols, error, noise, is_bound)
        return CoderRow(**found)

    noise = None if result.estimator == "exact" else result.stderr_noise
    what = "bound" if result.is_bound else "exact"
    yield row(what, result.nats_per_token, result.stderr_data, noise, result.is_bound)
    if result.orders_nats_per_token is not None:
        what = f"{max(result.order_bounds or {})}-order bound"
        yield row(what, result.orders_nats_per_token, None, result.orders_stderr_noise, True)
    if result.is_bound and result.exact_nats_per_token is not None:
        yield row("exact", result.exact_nats_per_token, result.exact_stderr_data, None, False)


def _row(
    coder: str,
    reads: str,
    nats: float,
    symbols: _Symbols,
    error: float | None = None,
    noise: float | None = None,
    is_bound: bool = False,
) -> dict[str, Any]:
    """A row's values; `nats` of all symbols, `error` and `noise` in nats per token."""
    per_byte = symbols.num_tokens / symbols.num_bytes / math.log(2)
    return {
        "coder": coder,
        "reads": reads,
        "bits_per_token": nats / symbols.num_tokens / math.log(2),
        "bits_per_byte": nats / symbols.num_bytes / math.log(2),
        "stderr_data": None if error is None else error * per_byte,
        "stderr_noise": None if noise is None else noise * per_byte,
        "is_bound": is_bound,
    }
