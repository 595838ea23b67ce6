"""Thousands of prompts from a file into a file of results, through the engine.

Each finished sample is appended to a journal beside the results, so the same command resumes after
any end, with any number of processes. The results are written at the end, whole, in the order of
the prompts. A sample depends on its line, the options and the seed alone.
"""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal, get_type_hints

from blockdiffusion.data.chat import messages_of, prompt_ids
from blockdiffusion.errors import UserError, shown
from blockdiffusion.evaluate.journal import Journal, fingerprint
from blockdiffusion.files.checksums import sha256_of
from blockdiffusion.files.disk import locked, write_whole
from blockdiffusion.files.records import Damaged, typed
from blockdiffusion.runtime.distributed import SINGLE, ProcessGroup
from blockdiffusion.runtime.seeding import derive_seed
from blockdiffusion.sampling.api import infill
from blockdiffusion.sampling.engine import Engine
from blockdiffusion.sampling.events import Finished
from blockdiffusion.sampling.infilling import prepare_templates
from blockdiffusion.sampling.params import SamplingParams
from blockdiffusion.sampling.requests import prepare_rows, resolved
from blockdiffusion.serving.lines import about, check_keys, copied, records
from blockdiffusion.serving.options import OF_LINE, BatchOptions
from blockdiffusion.text import whole_text

Kind = Literal["prompt", "messages", "template"]
KINDS: tuple[Kind, ...] = ("prompt", "messages", "template")
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Job:
    """One sample of a line.

    Attributes:
        line, sample: the line's number, from 1, and the sample's, from 0.
        copied: what the line says of itself.
        content: a text; of messages, their tokens.
        params: with the sample's own seed.
    """

    line: int
    sample: int
    copied: dict[str, Any]
    kind: Kind
    content: Any
    params: SamplingParams

    @property
    def name(self) -> str:
        return f"{self.line} {self.sample}"

    def result(self, model: Any, ids: list[int], prompt_tokens: int, text: str | None,
               reason: str, passes: int) -> dict[str, Any]:  # fmt: skip
        """Return the line of results: of a template the whole text, else what is new."""
        new = text
        if self.kind == "prompt" and text is not None:
            new = text[len(self.content) :]
        elif self.kind == "messages":
            new = whole_text(model.tokenizer, ids[prompt_tokens:])
        return {
            "line": self.line,
            "sample": self.sample,
            **self.copied,
            "text": new,
            "finish_reason": reason,
            "prompt_tokens": prompt_tokens,
            "new_tokens": len(ids) - prompt_tokens,
            "passes": passes,
            "seed": self.params.seed,
        }


def run_batch(
    model: Any,
    prompts: Path,
    out: Path,
    options: BatchOptions | None = None,
    *,
    progress: Progress | None = None,
    processes: ProcessGroup = SINGLE,
) -> int:
    """Sample every line of `prompts` and write the results to `out`; return their number.

    Args:
        prompts: JSON lines, each with a `prompt` (a text), `messages` (through the chat template),
            or a `template` (a text with [MASK], which is filled); with an `id` and `metadata` if
            you like, and with sampling options of its own.
        out: JSON lines; see `Job.result`. It must not exist.
        progress: called with ("generate", finished samples, all of them).
        processes: those that make this call together and share the samples.

    Raises:
        UserError: a line is no request (before any work), the results exist, or the disk is full.
    """
    options = options or BatchOptions()
    if out.exists():
        raise UserError(f"{out} is already there; remove it, or give another --out")
    jobs = read_jobs(model, prompts, options.sampling)
    identity = fingerprint(model, sha256_of(prompts), options.sampling)
    own = journal_of(out, processes.rank)
    taken = f"another process is writing {out} right now: wait for it, or give another --out"
    with locked(own, taken):
        journal = Journal(own, identity)
        done = {name for j in _journals(out, identity) for name in j.names()}
        mine = [job for job in jobs[processes.rank :: processes.size] if job.name not in done]
        left = len(mine)

        def finish(job: Job, result: dict[str, Any]) -> None:
            nonlocal left
            journal.put(job.name, result)
            left -= 1
            if progress is not None:  # of this process's share
                share = len(jobs[processes.rank :: processes.size])
                progress("generate", share - left, share)

        _sample(model, mine, options, prompts, finish)
        processes.barrier()
        if processes.is_first:
            _publish(out, identity, jobs)
        processes.barrier()
    return len(jobs)


def journal_of(out: Path, rank: int) -> Path:
    """Return the journal of a process beside the results."""
    return out.with_name(f"{out.name}.journal{rank or ''}")


def _journals(out: Path, identity: str) -> list[Journal]:
    """Return the journals of all processes, also of an earlier run that had more."""
    paths = sorted(out.parent.glob(f"{_escaped(out.name)}.journal*"))
    return [Journal(path, identity) for path in paths]


def _escaped(name: str) -> str:
    return "".join(f"[{letter}]" if letter in "*?[" else letter for letter in name)


def _publish(out: Path, identity: str, jobs: Sequence[Job]) -> None:
    """Write the results in order, and remove the journals."""
    journals = _journals(out, identity)
    found = {name: journal.get(name) for journal in journals for name in journal.names()}
    lines = [json.dumps(found[job.name]) for job in jobs]
    write_whole(out, "".join(f"{line}\n" for line in lines).encode())
    for journal in journals:
        assert journal.path is not None
        journal.path.unlink(missing_ok=True)


def _sample(
    model: Any,
    jobs: Sequence[Job],
    options: BatchOptions,
    prompts: Path,
    finish: Callable[[Job, dict[str, Any]], None],
) -> None:
    requests = [job for job in jobs if job.kind != "template"]
    if requests:
        for job, event in _engine_events(model, requests, options, prompts):
            finish(
                job,
                job.result(
                    model, event.ids, event.prompt_tokens, event.text, event.reason, event.nfe
                ),
            )
    for job in jobs:
        if job.kind == "template":
            with about(job.line, prompts):
                made = infill(model, job.content, job.params)
            assert made.texts is not None
            ids, given = made.sequences[0].tolist(), int(made.prompt_lengths[0])
            result = job.result(model, ids, given, made.texts[0], "length", int(made.nfe[0]))
            finish(job, result)


def _engine_events(
    model: Any, jobs: Sequence[Job], options: BatchOptions, prompts: Path
) -> Iterator[tuple[Job, Finished]]:
    """Yield each finished request. All are checked before the first pass; few wait at a time."""
    longest = 1
    for job in jobs:
        (row,) = prepare_rows(model, [job.content], 1, job.params.bos)
        longest = max(longest, len(row.ids) + job.params.max_new_tokens)
    engine = Engine(
        model,
        max_rows=min(options.max_rows, len(jobs)),
        max_tokens=longest,
        window=options.sampling.window,
    )
    for job in jobs:
        with about(job.line, prompts):
            engine.check(job.content, job.params)
    waiting, running = deque(jobs), {}
    while waiting or running:
        while waiting and engine.num_waiting < engine.max_rows:
            job = waiting.popleft()
            running[engine.submit(job.content, job.params)] = job
        for event in engine.step():
            if isinstance(event, Finished):
                yield running.pop(event.row), event


# --- lines ----------------------------------------------------------------------------------------


def read_jobs(model: Any, prompts: Path, params: SamplingParams) -> list[Job]:
    """Return the samples of all lines, checked as far as a model can be asked without a pass.

    Raises:
        UserError: a line is no request, or there is none; the line is named.
    """
    jobs: list[Job] = []
    for number, record in records(prompts):
        with about(number, prompts):
            jobs += _jobs(model, record, number, params)
    if not jobs:
        raise UserError(f'{prompts} holds no prompt; write lines such as {{"prompt": "..."}}')
    return jobs


def _jobs(model: Any, record: dict[str, Any], number: int, params: SamplingParams) -> list[Job]:
    """Return the samples of one line."""
    given = [kind for kind in KINDS if kind in record]
    if len(given) != 1:
        which = "none of them" if not given else f"{' and '.join(given)}"
        raise UserError(f"it has {which}; give one of {', '.join(KINDS)}")
    check_keys(record, (*KINDS, *OF_LINE))
    own = _options(record, params)
    kind, content = given[0], record[given[0]]
    if kind == "messages":
        content = prompt_ids(model.tokenizer, messages_of(content, "messages"))
    elif not isinstance(content, str):
        raise UserError(f"{kind} is {shown(content)}; it must be a text")
    resolved(model, own)
    if kind == "template":
        prepare_templates(model, [content], 1, own.bos)
    seed, is_lines = own.seed, "seed" in record
    assert seed is not None
    return [
        Job(number, sample, copied(record), kind, content, replace(
            own, num_samples=1,
            seed=seed if is_lines and not sample
            else derive_seed(seed, "generate", number, sample),
        ))
        for sample in range(params.num_samples)
    ]  # fmt: skip


def _options(record: dict[str, Any], params: SamplingParams) -> SamplingParams:
    """Return the options of a line: its own, and else those of the command."""
    hints = get_type_hints(SamplingParams)
    kinds = {item.name: hints[item.name] for item in fields(SamplingParams)}
    kinds = {name: kinds[name] for name in OF_LINE} | {"sampler": str | None}
    try:
        own = typed(kinds, record)
    except Damaged as error:
        raise UserError(str(error)) from None
    own |= {"seed": params.seed} if own.get("seed") is None else {}
    return replace(params, **own)
