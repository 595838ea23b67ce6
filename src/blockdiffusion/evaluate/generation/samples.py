"""Samples for an evaluation: drawn in repeatable batches, and kept in a JSON lines file.

The number of a batch's first sample names its random stream, and a batch is written when it is
finished. So a killed run resumes with the first batch that is missing, to the same result.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, fields
from functools import partial
from itertools import count, islice
from pathlib import Path
from typing import Any

from blockdiffusion.errors import UserError, shown
from blockdiffusion.evaluate.generation.metrics import lowest_window_entropy
from blockdiffusion.evaluate.generation.options import DrawOptions, check_min_entropy
from blockdiffusion.evaluate.journal import fingerprint
from blockdiffusion.files.disk import add_to, write_whole
from blockdiffusion.files.records import Damaged, as_object, build, byte_lines, parse_json
from blockdiffusion.limits import MOST_COUNT, check_limits
from blockdiffusion.models.inference import optimize_for_inference
from blockdiffusion.runtime.distributed import SINGLE, ProcessGroup
from blockdiffusion.runtime.seeding import derive_seed
from blockdiffusion.sampling import BlockDone, Finished, stream
from blockdiffusion.sampling.params import SETTINGS
from blockdiffusion.text import whole_text

STREAM = "generate-eval"
# The options that a sample depends on, by the names and in the order of the first files.
IDENTITY = {"max_new_tokens": "max_new_tokens", "eos": "eos", "policy": "sampler"} | {
    name: name
    for name in (*SETTINGS, "temperature", "top_k", "top_p", "top_p_rule", "use_cache", "window")
}
MOST_TRIES = 10  # samples drawn for each one that a guard accepts
Progress = Callable[[int, int], None]
Batch = tuple[int, int]  # the number of its first sample, and how many it has


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One text; None stands for what is not known of a text from elsewhere.

    Attributes:
        text: decoded, without special tokens.
        documents: the text, cut at every sampled EOS before its end.
        ids: the model's tokens, BOS included.
        length: new tokens without the EOS that ended it.
        ended: whether a sampled EOS ended it.
        nfe: network passes it took part in.
        seconds: its share of the time of its batch.
        seed: of the generator that its batch was drawn with.
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
    """Rejects samples that repeat themselves; the defaults are the authors' rule.

    Their samplers always draw a sample anew once the entropy of its last 256 tokens falls below 4
    nats, checked after every block. Here it is an option.

    Attributes:
        min_entropy: nats, of the model's tokens.
        window: the number of last tokens to look at; a sample that is not longer always passes.
        step: the block size: the check is made at its multiples and at the end.
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
    """Accepted samples in order, how many were drawn for them, how many a guard rejected."""

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
    """Draw `options.num_samples` samples that the guard accepts.

    Args:
        model: any model that `sampling.stream` takes, with a tokenizer. A copy made for sampling
            draws (`models.inference`).
        file: JSON lines that keep every finished sample, also rejected ones. Samples that it has
            are not drawn again.
        guard: rejected samples are counted and replaced by further ones; None rejects none.
        progress: called with (done, total) tokens.
        processes: those that make this call together; each draws whole batches, the first writes
            `file`, and all return what one process would.

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
    # Only the first process reads the file: others might while it is being written.
    file = file if processes.is_first else None
    kept = SampleFile(file, identity(model, options) if file else "")
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
        known = processes.broadcast(partial(kept.batches, due))
        own = {}
        for number, batch in enumerate(due):
            if known[number] is None and processes.is_mine(number):
                total = (drawn + max(missing, batch[1])) * options.max_new_tokens
                advance = partial(_advance, progress, drawn * options.max_new_tokens, total)
                own[number] = _draw_batch(sampler, options, *batch, len(due), advance)
        new = iter(processes.collect(own))
        for batch, found in zip(due, known, strict=True):
            if found is None:
                found = next(new)
                kept.add(batch[0], found)
            drawn += len(found)
            accepted += [s for s in found if guard is None or guard.accepts(s)]
    return Drawn(accepted[: options.num_samples], drawn, drawn - len(accepted))


def _advance(progress: Progress | None, before: int, total: int, tokens: int) -> None:
    if progress is not None:
        progress(min(before + tokens, total), total)


def _batches(num_samples: int, batch_size: int) -> Iterator[Batch]:
    """Yield the batches of the samples asked for, then whole ones without end."""
    for first in range(0, num_samples, batch_size):
        yield first, min(batch_size, num_samples - first)
    for first in count(num_samples, batch_size):
        yield first, batch_size


def _draw_batch(
    model: Any,
    options: DrawOptions,
    first: int,
    rows: int,
    together: int,
    advance: Callable[[int], None],
) -> list[Sample]:
    """Draw one of `together` batches; `advance` is told the tokens of all of them."""
    begin, tokens = time.perf_counter(), 0
    advance(0)
    seed = derive_seed(options.seed, STREAM, first)
    finished = []
    for event in stream(model, None, options, num_samples=rows, seed=seed):
        if isinstance(event, BlockDone):
            tokens += int((event.ends - event.starts).sum())
            advance(min(tokens, rows * options.max_new_tokens) * together)
        elif isinstance(event, Finished):
            finished.append(event)
    seconds = (time.perf_counter() - begin) / rows
    samples = []
    for event in sorted(finished, key=lambda event: event.row):
        assert event.text is not None
        new, ended = event.ids[event.prompt_tokens :], event.reason == "eos"
        samples.append(
            Sample(
                text=event.text,
                documents=documents_of(new, model.config.eos_id, model.tokenizer),
                ids=tuple(event.ids),
                length=len(new) - ended,
                ended=ended,
                nfe=event.nfe,
                seconds=seconds,
                seed=seed,
            )
        )
    return samples


def documents_of(ids: Sequence[int], eos_id: int | None, tokenizer: Any) -> tuple[str, ...]:
    """Return the texts between the EOS of `ids`, without empty ones."""
    parts: list[list[int]] = [[]]
    for token in ids:
        if token == eos_id:
            parts.append([])
        else:
            parts[-1].append(token)
    return tuple(whole_text(tokenizer, part) for part in parts if part)


# --- The file -------------------------------------------------------------------------------------


def identity(model: Any, options: DrawOptions) -> str:
    """Return a hash of everything that a sample depends on, except its number."""
    bos = model.config.bos if options.bos is None else options.bos
    precision = ["int8"] if options.int8 else []
    sampling = {name: getattr(options, new) for name, new in IDENTITY.items()}
    return fingerprint(model, sampling, options.seed, options.batch_size, bool(bos), *precision)


class SampleFile:
    """Finished batches, one JSON line a sample; parts of other batches, which a kill or a full
    disk left, are removed. A path of None keeps nothing.

    Raises:
        UserError: the file holds something else, or samples of another `identity`.
    """

    def __init__(self, path: Path | None, identity: str):
        self.path, self.identity = path, identity
        self._found: dict[Batch, dict[int, Sample]] = {}
        lines = list(byte_lines(path)) if path and path.exists() else []
        for record in filter(None, map(self._read, lines)):
            self._found.setdefault(record.batch, {})[record.index] = record
        whole = {b: found for b in self._found if (found := self.batches([b])[0]) is not None}
        clean = all(line.endswith(b"\n") for line in lines)
        if path and (len(lines) != sum(map(len, whole.values())) or not clean):
            write_whole(path, b"".join(self._lines(b[0], found) for b, found in whole.items()))

    def _read(self, line: bytes) -> _Record | None:
        """Read a line; return None for one of ours that was cut short."""
        begin = json.dumps({"identity": self.identity})[:-1].encode()
        try:
            values = as_object(parse_json(line))
        except Damaged:
            if begin.startswith(line.strip()) or line.startswith(begin):
                return None
            values = {}
        with suppress(Damaged):
            record = build(_Record, values, strict=False)
            if record.identity == self.identity:
                return record
        raise UserError(
            f"{self.path} holds samples of another model or of other options; choose another place "
            "for the result, or remove that file"
        )

    def batches(self, due: Sequence[Batch]) -> list[list[Sample] | None]:
        """Return the samples of each batch, or None if they were not drawn together as that."""
        whole: list[list[Sample] | None] = []
        for first, size in due:
            # A damaged file may claim any size, so no list of that size is made before this.
            found, rows = self._found.get((first, size), {}), range(first, first + size)
            complete = len(found) == size and all(index in rows for index in found)
            whole.append([found[index] for index in rows] if complete else None)
        return whole

    def add(self, first: int, samples: Sequence[Sample]) -> None:
        """Add a finished batch; it survives a kill from here on.

        Raises:
            UserError: the file cannot be written.
        """
        if self.path is not None:
            add_to(self.path, self._lines(first, samples))

    def _lines(self, first: int, samples: Sequence[Sample]) -> bytes:
        text = ""
        for index, sample in enumerate(samples, first):
            values = {"identity": self.identity, "batch": [first, len(samples)], "index": index}
            text += json.dumps(values | asdict(sample), ensure_ascii=False) + "\n"
        return text.encode()


@dataclass(frozen=True, kw_only=True)
class _Record(Sample):
    """A sample as a line of the file."""

    identity: str
    batch: Batch
    index: int


def read_samples(path: Path) -> list[Sample]:
    """Read the samples of a JSON lines file: one of ours, of `blockdiff sample --json`, or any with
    a `text` in every line.

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
        # A last batch that was short is drawn again, whole, if more samples are asked for.
        if own.index not in samples or own.batch[1] > samples[own.index][0]:
            samples[own.index] = (own.batch[1], own)
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
    """The known keys of a line from elsewhere."""

    text: str
    ids: tuple[int, ...] | None = None
    prompt_tokens: int | None = None
    nfe: int | None = None
    seed: int | None = None
