"""Samples for an evaluation: drawn in batches that can be repeated, kept in a JSON lines file.

A batch is drawn from a random stream that is named by the number of its first sample, and is
written when it is finished. So a killed run goes on with the first batch that is missing, and the
result is what it would have been.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

from blockdiffusion.errors import UserError, shown
from blockdiffusion.evaluate.generation.metrics import lowest_window_entropy
from blockdiffusion.evaluate.generation.options import DrawOptions, check_min_entropy
from blockdiffusion.evaluate.journal import fingerprint
from blockdiffusion.files.disk import append, storage_error, write_whole
from blockdiffusion.files.records import (
    Damaged,
    as_object,
    build,
    byte_lines,
    parse_json,
)
from blockdiffusion.limits import MOST_COUNT, check_limits
from blockdiffusion.models.inference import optimize_for_inference
from blockdiffusion.runtime.distributed import SINGLE, ProcessGroup
from blockdiffusion.runtime.seeding import derive_seed
from blockdiffusion.sampling import BlockDone, Finished, stream
from blockdiffusion.sampling.params import SETTINGS
from blockdiffusion.text import whole_text

STREAM = "generate-eval"
# What a sample depends on, by the names and in the order of the first files that tell it.
IDENTITY = {"max_new_tokens": "max_new_tokens", "eos": "eos", "policy": "sampler"} | {
    name: name
    for name in (*SETTINGS, "temperature", "top_k", "top_p", "top_p_rule", "use_cache", "window")
}
MOST_TRIES = 10  # samples drawn for each one that a guard lets through
Progress = Callable[[int, int], None]


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One text.

    Attributes:
        text: decoded, without special tokens.
        documents: the text, cut where an EOS was sampled before its end.
        ids: the model's tokens, BOS included; None for a text from elsewhere.
        length: new tokens without the EOS that ended it; None for a text from elsewhere.
        ended: whether a sampled EOS ended it; None where not known.
        nfe: network passes it took part in; None where not known.
        seconds: its share of the time of its batch; None where not known.
        seed: of the generator that its batch was drawn with; None where not known.
    """

    text: str
    documents: tuple[str, ...]
    ids: tuple[int, ...] | None = None
    length: int | None = None
    ended: bool | None = None
    nfe: int | None = None
    seconds: float | None = None
    seed: int | None = None

    def __post_init__(self) -> None:
        for name in ("length", "nfe", "seconds"):
            value = getattr(self, name)
            if value is not None and not 0 <= value <= MOST_COUNT:
                raise Damaged(f"{name} is {shown(value)}; it must be from 0 to {MOST_COUNT}")


@dataclass(frozen=True, kw_only=True)
class EntropyGuard:
    """Rejects samples that repeat themselves; the authors' rule is that of the defaults.

    Their samplers draw a sample anew, whatever was asked for, once the entropy of its last 256
    tokens falls below 4 nats, checked after every block. Here it is an option.

    Attributes:
        min_entropy: nats, of the model's tokens.
        window: tokens that are looked at; samples that are not longer always pass.
        step: the check is made at multiples of it and at the end: the block size.
    """

    min_entropy: float = 4.0
    window: int = 256
    step: int = 1

    def __post_init__(self) -> None:
        check_limits(self)
        check_min_entropy(self.min_entropy)

    def accepts(self, sample: Sample) -> bool:
        """Whether the sample passes.

        Raises:
            UserError: the sample has no token ids.
        """
        if sample.ids is None:
            raise UserError(
                "the entropy guard looks at the model's tokens, and these samples have no ids; "
                "leave it out, or draw the samples here"
            )
        lowest = lowest_window_entropy(sample.ids, self.window, self.step)
        return lowest is None or lowest >= self.min_entropy


@dataclass(frozen=True)
class Drawn:
    """Accepted samples in their order, how many were drawn for them, how many a guard rejected."""

    samples: list[Sample]
    drawn: int
    rejected: int


def draw_samples(
    model: Any,
    options: DrawOptions,
    *,
    file: Path | None = None,
    guard: EntropyGuard | None = None,
    progress: Progress | None = None,
    processes: ProcessGroup = SINGLE,
) -> Drawn:
    """Draws `options.num_samples` samples that the guard accepts.

    Args:
        model: any model that `sampling.stream` takes, with a tokenizer. A copy made for sampling
            draws (`models.inference`).
        file: JSON lines that keep every finished sample, rejected ones too; what it has already is
            not drawn again.
        guard: rejected samples are counted and replaced by further ones; None: none is rejected.
        progress: called with (done, total) tokens.
        processes: those that call this alike; each draws whole batches, the first writes `file`,
            and all return what one process would.

    Raises:
        UserError: the model has no tokenizer; `file` holds samples of something else; or the guard
            rejects nearly everything.
    """
    if model.tokenizer is None:
        raise UserError(
            "this model's directory has no tokenizer, so its samples cannot be given to a scorer; "
            "put its tokenizer.json there"
        )
    sampler = optimize_for_inference(model, int8=True) if options.int8 else model
    # What is kept, one process knows: others might read the file while it is written.
    kept = None
    if file is not None and processes.is_first:
        kept = SampleFile(file, identity(model, options))
    accepted: list[Sample] = []
    drawn = 0
    batches = _batches(options.num_samples, options.batch_size)
    while (missing := options.num_samples - len(accepted)) > 0:
        if drawn >= options.num_samples * MOST_TRIES:
            raise UserError(
                f"the guard accepted {len(accepted)} of {drawn} samples, too few to go on; lower "
                "its minimum entropy, or leave it out"
            )
        due = list(islice(batches, min(processes.size, -(-missing // options.batch_size))))
        known = processes.broadcast(partial(_known, kept, due))
        own = {}
        for number, (first, rows) in enumerate(due):
            if known[number] is None and processes.is_mine(number):
                expected = drawn + max(missing, rows)
                advance = _advance(progress, drawn, expected, options.max_new_tokens, len(due))
                own[number] = _draw_batch(sampler, options, first, rows, advance)
        new = iter(processes.collect(own))
        for (first, rows), found in zip(due, known, strict=True):
            if found is None:
                found = next(new)
                if kept is not None:
                    kept.add(first, found)
            drawn += rows
            accepted += [s for s in found if guard is None or guard.accepts(s)]
    return Drawn(accepted[: options.num_samples], drawn, drawn - len(accepted))


def _known(kept: SampleFile | None, due: Sequence[tuple[int, int]]) -> list[list[Sample] | None]:
    """What is kept of the batches that are due."""
    return [None if kept is None else kept.batch(first, rows) for first, rows in due]


def _advance(
    progress: Progress | None, drawn: int, expected: int, max_new_tokens: int, together: int
) -> Callable[[int], None]:
    """Takes the tokens of one of `together` batches that are drawn at the same time."""

    def advance(tokens: int) -> None:
        if progress is not None:
            done = drawn * max_new_tokens + tokens * together
            progress(min(done, expected * max_new_tokens), expected * max_new_tokens)

    return advance


def _batches(num_samples: int, batch_size: int) -> Iterator[tuple[int, int]]:
    """(first, rows) of the batches: those of the samples asked for, then whole ones without end."""
    for first in range(0, num_samples, batch_size):
        yield first, min(batch_size, num_samples - first)
    first = num_samples
    while True:
        yield first, batch_size
        first += batch_size


def _draw_batch(
    model: Any, options: DrawOptions, first: int, rows: int, advance: Callable[[int], None]
) -> list[Sample]:
    begin, tokens = time.perf_counter(), 0
    advance(0)
    seed = derive_seed(options.seed, STREAM, first)
    finished = []
    for event in stream(model, None, options, num_samples=rows, seed=seed):
        if isinstance(event, BlockDone):
            tokens += int((event.ends - event.starts).sum())
            advance(min(tokens, rows * options.max_new_tokens))
        elif isinstance(event, Finished):
            finished.append(event)
    share = (time.perf_counter() - begin) / rows
    finished.sort(key=lambda event: event.row)
    return [_sample(model, options, event, share, seed) for event in finished]


def _sample(model: Any, options: DrawOptions, event: Finished, seconds: float, seed: int) -> Sample:
    assert event.text is not None
    ids, given = event.ids, event.prompt_tokens
    ended = event.reason == "eos"
    return Sample(
        text=event.text,
        documents=documents_of(ids[given:], model.config.eos_id, model.tokenizer),
        ids=tuple(ids),
        length=len(ids) - given - ended,
        ended=ended,
        nfe=event.nfe,
        seconds=seconds,
        seed=seed,
    )


def documents_of(ids: Sequence[int], eos_id: int | None, tokenizer: Any) -> tuple[str, ...]:
    """The texts between the EOS of `ids`; those without a token are left out."""
    parts: list[list[int]] = [[]]
    for token in ids:
        if token == eos_id:
            parts.append([])
        else:
            parts[-1].append(token)
    return tuple(whole_text(tokenizer, part) for part in parts if part)


# --- The file -------------------------------------------------------------------------------------


def identity(model: Any, options: DrawOptions) -> str:
    """Everything that a sample depends on but its number, as a hash."""
    bos = model.config.bos if options.bos is None else options.bos
    precision = ["int8"] if options.int8 else []
    sampling = {name: getattr(options, new) for name, new in IDENTITY.items()}
    return fingerprint(model, sampling, options.seed, options.batch_size, bool(bos), *precision)


class SampleFile:
    """Finished batches, one JSON line a sample. What a kill or a full disk left of another batch is
    removed.

    Args:
        identity: of what is drawn; see `identity`.

    Raises:
        UserError: the file holds something else, or samples of another model or other options.
    """

    def __init__(self, path: Path, identity: str):
        self.path, self.identity = path, identity
        self._found: dict[tuple[int, int], dict[int, Sample]] = {}
        lines = list(byte_lines(path)) if path.exists() else []
        for record in filter(None, map(self._read, lines)):
            self._found.setdefault(record.batch, {})[record.index] = record.sample()
        whole = [batch for batch in self._found if self.batch(*batch) is not None]
        if len(lines) != sum(rows for _, rows in whole) or not all(
            line.endswith(b"\n") for line in lines
        ):
            write_whole(path, b"".join(self._lines(*b, self.batch(*b) or ()) for b in whole))

    def _read(self, line: bytes) -> _Record | None:
        """Reads a line; returns None for one of ours that was cut short."""
        begin = json.dumps({"identity": self.identity})[:-1].encode()
        try:
            values = as_object(parse_json(line))
        except Damaged:
            if begin.startswith(line.strip()) or line.startswith(begin):
                return None
            raise self._foreign() from None
        try:
            record = build(_Record, values, strict=False)
        except Damaged:
            raise self._foreign() from None
        if record.identity != self.identity:
            raise self._foreign()
        return record

    def _foreign(self) -> UserError:
        return UserError(
            f"{self.path} holds samples of another model or of other options; choose another place "
            "for the result, or remove that file"
        )

    def batch(self, first: int, rows: int) -> list[Sample] | None:
        """The samples `first` .. `first + rows - 1`, if drawn together and all there."""
        found = self._found.get((first, rows), {})
        wanted = range(first, first + rows)
        return [found[row] for row in wanted] if found.keys() == set(wanted) else None

    def add(self, first: int, samples: Sequence[Sample]) -> None:
        """Adds a finished batch; it survives a kill from here on.

        Raises:
            UserError: the file cannot be written.
        """
        try:
            with append(self.path) as file:
                file.write(self._lines(first, len(samples), samples))
        except OSError as error:
            raise storage_error(error, self.path) from error

    def _lines(self, first: int, rows: int, samples: Sequence[Sample]) -> bytes:
        text = ""
        for index, sample in enumerate(samples, first):
            values = {"identity": self.identity, "batch": [first, rows], "index": index}
            text += json.dumps(values | asdict(sample), ensure_ascii=False) + "\n"
        return text.encode()


@dataclass(frozen=True, kw_only=True)
class _Record(Sample):
    """A line of the file: a sample, of what it is one, the batch (first, rows), and its number."""

    identity: str
    batch: tuple[int, int]
    index: int

    def sample(self) -> Sample:
        return Sample(**{item.name: getattr(self, item.name) for item in fields(Sample)})


def read_samples(path: Path) -> list[Sample]:
    """The samples of a JSON lines file: one of ours, of `blockdiff sample --json`, or any with a
    `text` in every line.

    Raises:
        UserError: there is no such file, no sample in it, or a line without a text.
    """
    samples: dict[Any, tuple[int, Sample]] = {}
    for number, line in enumerate(byte_lines(path), 1):
        if not line.strip():
            continue
        try:
            record = as_object(parse_json(line))
            if {item.name for item in fields(_Record)} <= record.keys():
                own = build(_Record, record, strict=False)
            else:
                samples["line", number] = (0, _from_elsewhere(record))
                continue
        except Damaged as error:
            raise UserError(
                f"line {number} of {path} is no sample ({error}); each line must be a JSON object "
                "with a text"
            ) from None
        # A last batch that was short is drawn again, whole, when more samples are asked for.
        if own.index not in samples or own.batch[1] > samples[own.index][0]:
            samples[own.index] = (own.batch[1], own.sample())
    if not samples:
        raise UserError(f"there is no sample in {path}; give a file with a JSON object a line")
    return [sample for _, sample in samples.values()]


def _from_elsewhere(record: dict[str, Any]) -> Sample:
    found = build(_Elsewhere, record, strict=False)
    text, ids, given = found.text, found.ids, found.prompt_tokens
    return Sample(
        text=text,
        documents=(text,) if text else (),
        ids=ids,
        length=None if ids is None or given is None else max(len(ids) - given, 0),
        nfe=found.nfe,
        seed=found.seed,
    )


@dataclass(frozen=True, kw_only=True)
class _Elsewhere:
    """What is read of a line of another kind."""

    text: str
    ids: tuple[int, ...] | None = None
    prompt_tokens: int | None = None
    nfe: int | None = None
    seed: int | None = None
