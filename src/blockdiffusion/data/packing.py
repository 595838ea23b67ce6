"""`prepare`: from sources of text to a directory of token rows, memory-mapped by `loader`.

Documents are read in order, tokenised in units by worker processes into part files, and packed in
order into rows and shards; the manifest is written last. The result depends on the text and the
options alone, not on the number of workers, nor on interruptions.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from blockdiffusion.data.chat import check_template
from blockdiffusion.data.corpus import Corpus
from blockdiffusion.data.manifest import (
    FORMAT_VERSION,
    MANIFEST_FILE,
    TOKENIZER_FOLDER,
    Manifest,
    Split,
)
from blockdiffusion.data.options import PrepareOptions
from blockdiffusion.data.parts import UNIT_BYTES, Job, PartRules, id_dtype, read_part, run_jobs
from blockdiffusion.data.shards import PACKERS, ChatPacker, Packer, RowRules, ShardWriter
from blockdiffusion.data.sources import Source
from blockdiffusion.errors import UserError, counted, shown
from blockdiffusion.files.checksums import SUMS, Report, silent
from blockdiffusion.files.disk import locked, storage_error, written_aside
from blockdiffusion.files.records import read_json

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

SHARD_TOKENS = 64 * 2**20
BPE_TEXT_BYTES = 2**30  # more text improves no BPE, but takes more time and memory
PARTS_FOLDER = "parts"
LOCK_FILE = "lock"
SHARD_FILES = r"\.?(train|valid)-\d{5}\.(bin|len|chat)(\.\d+\.partial)?"
SETTINGS_FILE = "settings.json"


def prepare(
    sources: Sequence[str],
    out: str | Path,
    options: PrepareOptions,
    progress: Report | None = None,
    tell: Callable[[str], None] = lambda line: None,
) -> Manifest:
    """Make the directory `out` of token rows from `sources`; see `sources.open_sources`.

    A run that was stopped at any moment resumes when it is called again. A directory finished with
    the same options from the same sources is left as it is. It needs room for twice the tokens
    while it works.

    Args:
        progress: gets the stage ("tokenizer", "tokenize" or "pack"), and how many of how many bytes
            of text are done (None: unknown).
        tell: gets a line about what was read at the end, and one about what was left out, if any.

    Raises:
        UserError: bad options or sources; too little text; `out` holds something else, was made
            with other options, or is used by another process; the disk is full.
    """
    out = Path(out)
    try:
        corpus = Corpus(sources, options)
        settings = {"options": options.content(), "sources": corpus.signatures()}
        if (manifest := _finished(out, settings)) is None:
            with _claimed(out):
                manifest = _prepare(corpus, out, settings, progress or silent)
    except OSError as error:
        raise storage_error(error, out) from error
    for line in corpus.account():
        tell(line)
    return manifest


def _finished(out: Path, settings: dict[str, Any]) -> Manifest | None:
    """Return the manifest of `out` if it is finished; refuse one made from something else."""
    if not (out / MANIFEST_FILE).exists():
        return None
    manifest = Manifest.load(out)
    remedy = "name another directory, or delete this one to prepare it anew"
    wanted, were = settings["options"], PrepareOptions().content() | manifest.options
    if differing := [
        f"{name}={shown(were[name])}, not {shown(value)}"
        for name, value in wanted.items()
        if were[name] != value
    ]:
        raise UserError(f"{out} was prepared with {'; '.join(differing)}: {remedy}")
    recorded = [
        {name: value for name, value in source.items() if name not in ("documents", "skipped")}
        for source in manifest.sources
    ]
    if [source["name"] for source in recorded] != [s["name"] for s in settings["sources"]]:
        names = ", ".join(source["name"] for source in recorded)
        raise UserError(f"{out} was prepared from other sources ({names}): {remedy}")
    for before, now in zip(recorded, settings["sources"], strict=True):
        if before != now:
            raise UserError(f"{now['name']} has changed since {out} was prepared: {remedy}")
    shutil.rmtree(out / PARTS_FOLDER, ignore_errors=True)  # killed while removing them
    return manifest


@contextmanager
def _claimed(out: Path) -> Iterator[None]:
    """Make `out`, check that it holds nothing else, and lock it against a second process."""
    if out.exists() and not out.is_dir():
        raise UserError(f"{out} is a file: name a directory to prepare the data into")
    lock = out / PARTS_FOLDER / LOCK_FILE
    if not lock.exists() and out.is_dir():
        others = sorted(path.name for path in out.iterdir() if path.name != PARTS_FOLDER)
        if others:
            raise UserError(
                f"{out} holds other files ({', '.join(others[:3])}): name a new or an empty "
                "directory"
            )
    lock.parent.mkdir(parents=True, exist_ok=True)
    taken = f"another process is preparing {out} right now: wait for it, or name another directory"
    with locked(lock, taken):
        yield


def _prepare(corpus: Corpus, out: Path, settings: dict[str, Any], progress: Report) -> Manifest:
    from blockdiffusion.data.tokenizers import fingerprint, require_token, vocab_size

    corpus.check_split()
    options = corpus.options
    tokenizer = _tokenizer(corpus, out, settings, progress)
    bos_id, eos_id = tokenizer.bos_token_id, tokenizer.eos_token_id
    size = vocab_size(tokenizer)
    row_rules = RowRules(
        seq_len=options.seq_len,
        dtype=id_dtype(size),
        pad_id=eos_id or 0,
        align=options.align,
        row_bos_id=require_token(tokenizer, "bos", "row_bos") if options.row_bos else None,
        row_eos_id=require_token(tokenizer, "eos", "row_eos") if options.row_eos else None,
        document_eos_id=(
            require_token(tokenizer, "eos", "document_eos") if options.document_eos else None
        ),
    )
    part_rules = PartRules(
        tokenizer_file=str(out / TOKENIZER_FOLDER / "tokenizer.json"),
        tokenizer_sha256=fingerprint(tokenizer),
        vocab_size=size,
        mask_id=tokenizer.mask_token_id,
        detokenize=options.detokenize,
        chat_template=_chat_template(tokenizer, options),
    )
    units, counts = _tokenize(corpus, out / PARTS_FOLDER, part_rules, progress)
    splits = _pack(corpus, out, units, row_rules, progress)
    manifest = Manifest(
        format_version=FORMAT_VERSION,
        seq_len=options.seq_len,
        packing=options.packing,
        row_bos=options.row_bos,
        row_eos=options.row_eos,
        document_eos=options.document_eos,
        vocab_size=size,
        mask_id=part_rules.mask_id,
        bos_id=bos_id,
        eos_id=eos_id,
        pad_id=row_rules.pad_id,
        tokenizer=options.tokenizer,
        tokenizer_sha256=part_rules.tokenizer_sha256,
        sources=tuple(
            signature | count for signature, count in zip(settings["sources"], counts, strict=True)
        ),
        options=settings["options"],
        splits=splits,
    )
    manifest.save(out)
    shutil.rmtree(out / PARTS_FOLDER)
    return manifest


def _chat_template(tokenizer: Any, options: PrepareOptions) -> str | None:
    """Return the template of conversations; None for plain text."""
    from blockdiffusion.data.tokenizers import require_token

    if options.packing != "chat":
        return None
    check_template(tokenizer)
    require_token(tokenizer, "eos", "packing=chat")
    return tokenizer.chat_template


def _tokenizer(
    corpus: Corpus, out: Path, settings: dict[str, Any], progress: Report
) -> PreTrainedTokenizerFast:
    """Return the tokenizer in `out`, made there unless a stopped run already did."""
    from blockdiffusion.data.tokenizers import load_tokenizer, save_tokenizer, train_bpe

    folder, record = out / TOKENIZER_FOLDER, out / PARTS_FOLDER / SETTINGS_FILE
    if folder.exists() and record.exists() and read_json(record, "remove it") == settings:
        return load_tokenizer(folder)
    spec = corpus.options.tokenizer
    if spec.startswith("bpe:"):
        tokenizer = train_bpe(_bpe_text(corpus, progress), int(spec.removeprefix("bpe:")))
    else:
        tokenizer = load_tokenizer(spec)
    aside = out / PARTS_FOLDER / f"{TOKENIZER_FOLDER}.partial"
    shutil.rmtree(aside, ignore_errors=True)
    save_tokenizer(tokenizer, aside)
    record.unlink(missing_ok=True)  # from here on it would describe another tokenizer
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(aside, folder)
    with written_aside(record) as file:
        file.write(json.dumps(settings).encode())
    # As it is loaded later, so that nothing can depend on how it was made.
    return load_tokenizer(folder)


def _bpe_text(corpus: Corpus, progress: Report) -> Iterator[str]:
    total = corpus.num_bytes()
    done = 0
    for text in corpus.training_text():
        yield text
        done += len(text.encode())
        progress("tokenizer", done, total)
        if done >= BPE_TEXT_BYTES:
            return


@dataclass(frozen=True, slots=True)
class Unit:
    """Consecutive documents of one group, and the part file they are tokenised into."""

    path: Path
    group: str
    first_document: int
    num_documents: int
    num_bytes: int


def _tokenize(
    corpus: Corpus, parts: Path, rules: PartRules, progress: Report
) -> tuple[list[Unit], list[dict[str, int]]]:
    """Write the part of every unit; return the units in order, and the counts of each source."""
    units: list[Unit] = []
    counts = {id(source): {"documents": 0} for group in corpus.groups.values() for source in group}
    total = corpus.num_bytes()
    done = 0

    def count(num_bytes: int) -> None:
        nonlocal done
        done += num_bytes
        progress("tokenize", done, total)

    def missing() -> Iterator[Job]:
        under_way: set[Path] = set()
        for group in corpus.groups:
            first = 0
            for documents in _batches(corpus.documents(group), corpus.detokenizer):
                for source, _ in documents:
                    counts[id(source)]["documents"] += 1
                texts = [text for _, text in documents]
                raw = [text.encode() for text in texts]
                own = dataclasses.replace(rules, detokenize=corpus.detokenizer(documents[0][0]))
                path = parts / f"{own.key(raw)}.part"
                num_bytes = sum(map(len, raw))
                units.append(Unit(path, group, first, len(texts), num_bytes))
                first += len(texts)
                if path in under_way or path.exists():
                    count(num_bytes)
                else:
                    under_way.add(path)
                    yield Job(path, texts, num_bytes, own)

    cores = _num_cores()
    num_workers = min(corpus.options.num_workers or cores, 4 * cores)  # more would only take memory
    run_jobs(missing(), num_workers, lambda job: count(job.num_bytes))
    for skipped in corpus.skipped.values():
        for source, number in skipped.items():
            counts[source]["skipped"] = number
    return units, list(counts.values())


def _num_cores() -> int:
    """Return the number of cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _batches(
    documents: Iterator[tuple[Source, str]], detokenizer: Callable[[Source], str]
) -> Iterator[list[tuple[Source, str]]]:
    """Yield consecutive documents with one detokenizer, just over `UNIT_BYTES` characters each."""
    batch: list[tuple[Source, str]] = []
    length = 0
    for source, text in documents:
        if batch and detokenizer(source) != detokenizer(batch[0][0]):
            yield batch
            batch, length = [], 0
        batch.append((source, text))
        length += len(text)
        if length >= UNIT_BYTES:
            yield batch
            batch, length = [], 0
    if batch:
        yield batch


@dataclass
class _SplitState:
    packer: Packer
    writer: ShardWriter
    documents: int = 0
    tokens: int = 0
    bytes: int = 0


def _pack(
    corpus: Corpus, out: Path, units: list[Unit], rules: RowRules, progress: Report
) -> dict[str, Split]:
    """Write the shards of both splits from the parts."""
    for path in out.iterdir():  # of a run stopped while packing
        if re.fullmatch(SHARD_FILES, path.name) or (
            path.name.startswith((f".{MANIFEST_FILE}.", f".{SUMS}."))
        ):
            path.unlink()
    rows_per_shard = max(1, SHARD_TOKENS // rules.seq_len)
    packing = corpus.options.packing
    states = {
        name: _SplitState(PACKERS[packing](rules), ShardWriter(out, name, rows_per_shard, packing))
        for name in ("train", "valid")
    }
    total = sum(unit.num_bytes for unit in units)
    done = 0
    try:
        for unit in units:
            _pack_unit(corpus, unit, states)
            done += unit.num_bytes
            progress("pack", done, total)
        splits = {
            name: _finish_split(name, states[name], rules)
            for name in (("train", "valid") if corpus.has_valid else ("train",))
        }
    finally:
        for state in states.values():
            state.writer.close()
    return splits


def _pack_unit(corpus: Corpus, unit: Unit, states: dict[str, _SplitState]) -> None:
    ids, lengths, sizes, is_target = read_part(unit.path, corpus.options.packing == "chat")
    assert len(lengths) == unit.num_documents
    numbers = range(unit.first_document, unit.first_document + unit.num_documents)
    is_valid = np.array([unit.group == "valid" or corpus.is_valid(n) for n in numbers])
    at_once = max(1, SHARD_TOKENS // corpus.options.seq_len)  # short documents in very long rows
    for name, chosen in (("train", ~is_valid), ("valid", is_valid)):
        if chosen.any():
            state = states[name]
            chosen_tokens, ends = np.repeat(chosen, lengths), np.cumsum(lengths[chosen])
            chosen_ids = ids[chosen_tokens]
            targets = None if is_target is None else is_target[chosen_tokens]
            for first in range(0, len(ends), at_once):
                some = lengths[chosen][first : first + at_once]
                end = ends[first + len(some) - 1]
                own = slice(end - some.sum(), end)
                its_targets = None if targets is None else targets[own]
                state.writer.write(*state.packer.add(chosen_ids[own], some, its_targets))
            state.documents += int(chosen.sum())
            state.tokens += len(chosen_ids) + corpus.options.document_eos * int(chosen.sum())
            state.bytes += int(sizes[chosen].sum())


def _finish_split(name: str, state: _SplitState, rules: RowRules) -> Split:
    """Write the split's last shard; return its counts.

    Raises:
        UserError: it does not fill one row.
    """
    if (rest := state.packer.finish()) is not None:
        state.writer.write(*rest)
    if state.writer.num_rows == 0:
        what, more = {
            "train": ("training", "more text"),
            "valid": ("validation", "more validation text (valid, valid_fraction)"),
        }[name]
        if state.packer.left_over and isinstance(state.packer, ChatPacker):
            raise UserError(
                f"no {what} conversation has a response within its first {rules.seq_len:,} tokens: "
                "give a larger seq_len, or shorter conversations"
            )
        raise UserError(
            f"the {what} text has {counted(state.tokens, 'token')}, fewer than the "
            f"{rules.payload:,} of one row: give {more} or a smaller seq_len"
        )
    state.writer.finish()
    dropped = state.packer.left_over
    return Split(
        documents=state.documents,
        tokens=state.writer.tokens,
        bytes=round(state.bytes * (1 - dropped / state.tokens)),
        rows=state.writer.num_rows,
        dropped_tokens=dropped,
        shards=tuple(state.writer.shards),
    )
