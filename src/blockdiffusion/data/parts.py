"""Tokenising on all cores: units of text go to worker processes, each unit becomes one file.

A part is named by a hash of its text, tokenizer and detokenizer, and appears whole or not at all.
So a stopped run resumes with the parts that exist.
"""

from __future__ import annotations

import functools
import hashlib
import io
import json
import os
import pickle
import queue
import signal
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import suppress
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from blockdiffusion.data.chat import render
from blockdiffusion.data.detokenizers import DETOKENIZERS
from blockdiffusion.data.tokenizers import load_tokenizer
from blockdiffusion.errors import UserError, shown
from blockdiffusion.files.disk import written_aside

if TYPE_CHECKING:
    from tokenizers import Tokenizer

PART_VERSION = 1
UNIT_BYTES = 2**20


@dataclass(frozen=True, slots=True)
class PartRules:
    """All that a part depends on besides its text."""

    tokenizer_file: str
    tokenizer_sha256: str
    vocab_size: int
    mask_id: int
    detokenize: str
    chat_template: str | None = None  # of conversations; None: the texts are plain

    def key(self, raw_texts: Iterable[bytes]) -> str:
        """Return the name of the part made from `raw_texts`."""
        digest = hashlib.blake2b(digest_size=16)
        digest.update(f"{PART_VERSION} {self.tokenizer_sha256} {self.detokenize}".encode())
        if self.chat_template is not None:
            digest.update(f" chat {self.chat_template}".encode())
        for raw in raw_texts:
            digest.update(f" {len(raw)} ".encode())
            digest.update(raw)
        return digest.hexdigest()


@dataclass(frozen=True, slots=True)
class Job:
    """One unit of text to tokenise into the file `path`."""

    path: Path
    texts: list[str]
    num_bytes: int
    rules: PartRules


def id_dtype(vocab_size: int) -> np.dtype:
    """Return the smallest type that holds every id: uint16 up to 65,536 ids, else uint32."""
    return np.dtype("<u2" if vocab_size <= 2**16 else "<u4")


def write_part(job: Job) -> None:
    """Tokenise a unit into its file.

    Raises:
        UserError: a text becomes the mask token, or a conversation cannot be rendered.
        OSError: the file cannot be written.
    """
    tokenize = _plain if job.rules.chat_template is None else _conversation
    detokenize, dtype = DETOKENIZERS[job.rules.detokenize], id_dtype(job.rules.vocab_size)
    ids: list[np.ndarray] = []
    targets: list[np.ndarray] = []
    sizes: list[int] = []
    for text in map(detokenize, job.texts):
        found, is_target = tokenize(job.rules, text)
        ids.append(np.array(found, dtype=dtype))
        targets.append(np.array(is_target, dtype=bool))
        sizes.append(len(text.encode()))
        if (ids[-1] == job.rules.mask_id).any():
            raise UserError(
                "a document contains the tokenizer's mask token itself "
                f"({shown(text)}): take it out of the text, or use another tokenizer"
            )
    content = io.BytesIO()  # numpy hides the reason when it cannot write to a file itself
    np.save(content, np.concatenate(ids))
    np.save(content, np.array([len(document) for document in ids], dtype=np.int64))
    np.save(content, np.array(sizes, dtype=np.int64))
    if job.rules.chat_template is not None:
        np.save(content, np.concatenate(targets))
    with written_aside(job.path) as file:
        file.write(content.getbuffer())


def _plain(rules: PartRules, text: str) -> tuple[list[int], list[bool]]:
    # A batch of one: no second thread (the processes have the cores), no offsets.
    tokenizer = _open_tokenizer(rules.tokenizer_file)
    return tokenizer.encode_batch_fast([text], add_special_tokens=False)[0].ids, []


def _conversation(rules: PartRules, text: str) -> tuple[list[int], list[bool]]:
    rendered = render(_open_chat_tokenizer(rules.tokenizer_file), json.loads(text))
    return rendered.ids, rendered.is_target


class TokenizedUnit(NamedTuple):
    """A unit's documents, one after another.

    Attributes:
        ids: of all documents.
        lengths, sizes: number of ids, and of UTF-8 bytes, of each.
        is_target: for each id of a conversation, whether it is of a response; None in plain text.
    """

    ids: np.ndarray
    lengths: np.ndarray
    sizes: np.ndarray
    is_target: np.ndarray | None


def read_part(path: Path, is_chat: bool) -> TokenizedUnit:
    """Return the content of a part."""
    with open(path, "rb") as file:
        arrays = [np.load(file, allow_pickle=False) for _ in range(3 + is_chat)]
    return TokenizedUnit(*arrays, *([] if is_chat else [None]))


@functools.lru_cache(maxsize=1)
def _open_tokenizer(path: str) -> Tokenizer:
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(path)
    tokenizer.encode_special_tokens = True  # "<|mask|>" in a text is plain text
    return tokenizer


@functools.lru_cache(maxsize=1)
def _open_chat_tokenizer(path: str) -> Any:
    return load_tokenizer(Path(path).parent)


def run_jobs(jobs: Iterator[Job], num_workers: int, on_done: Callable[[Job], None]) -> None:
    """Write the parts of `jobs` in at most `num_workers` processes.

    Raises:
        UserError: a worker was killed, or reading the jobs or writing a part failed. The parts that
            were under way are finished first.
    """
    for opened in (_open_tokenizer, _open_chat_tokenizer):
        opened.cache_clear()  # another preparation may have written another file there
    first = list(islice(jobs, num_workers))
    jobs = chain(first, jobs)
    if len(first) < 2:
        for job in jobs:
            write_part(job)
            on_done(job)
        return
    workers: list[Worker] = []
    try:
        for _ in first:
            workers.append(Worker())
        _run_in(workers, jobs, on_done)
    finally:
        for worker in workers:
            worker.close()


def _run_in(workers: list[Worker], jobs: Iterator[Job], on_done: Callable[[Job], None]) -> None:
    idle: queue.SimpleQueue[Worker] = queue.SimpleQueue()
    for worker in workers:
        idle.put(worker)
    pending: dict[Future[None], Job] = {}

    def run(job: Job) -> None:
        worker = idle.get()
        try:
            worker.write_part(job)
        finally:
            idle.put(worker)

    def collect() -> None:
        done, _ = wait(pending, return_when=FIRST_COMPLETED)
        for future in done:
            job = pending.pop(future)
            future.result()
            on_done(job)

    with ThreadPoolExecutor(len(workers)) as threads:  # a thread waits for each worker
        for job in jobs:
            try:
                pending[threads.submit(run, job)] = job
            except RuntimeError as error:  # no more threads
                raise _no_more_workers(error) from None
            # This keeps every worker busy; more would only hold text in memory.
            while len(pending) >= len(workers) + 2:
                collect()
        while pending:
            collect()


def _no_more_workers(error: Exception) -> UserError:
    return UserError(
        f"the system cannot start that many worker processes ({error}): give a smaller num_workers"
    )


class Worker:
    """A process that writes parts: it reads pickled jobs and answers None or an exception.

    A `multiprocessing` pool would run the caller's main script again in every worker, with all its
    imports, and its workers outlive a killed parent. This one ends when its standard input does.
    """

    def __init__(self) -> None:
        # The same search path as here, whatever the caller did to it.
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        try:
            self.process = subprocess.Popen(
                [sys.executable, "-c", "from blockdiffusion.data.parts import serve; serve()"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                env=environment,
            )
        except (OSError, MemoryError) as error:
            raise _no_more_workers(error) from None

    def write_part(self, job: Job) -> None:
        """Send `job`, wait for it, and raise the exception it raised there, if any.

        Raises:
            UserError: the process has ended.
        """
        to_worker, from_worker = self.process.stdin, self.process.stdout
        assert to_worker is not None and from_worker is not None
        try:
            pickle.dump(job, to_worker)
            to_worker.flush()
            error = pickle.load(from_worker)
        except (BrokenPipeError, EOFError, pickle.UnpicklingError):
            raise UserError(
                f"a worker process ended by itself (exit status {self.process.wait()}; out of "
                "memory?): run the same again, with a smaller num_workers if need be; it resumes "
                "from what is already done"
            ) from None
        if isinstance(error, MemoryError):
            raise UserError(
                "a worker process is out of memory: run the same again with a smaller num_workers; "
                "it resumes from what is already done"
            )
        if error is not None:
            raise error

    def close(self) -> None:
        """End the process, and wait until it has."""
        for pipe in (self.process.stdin, self.process.stdout):
            if pipe is not None:
                with suppress(BrokenPipeError):
                    pipe.close()
        self.process.wait()


def serve() -> None:
    """Run a worker process: do jobs from standard input until its end."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # a library's output must not get between the answers
    while True:
        try:
            job = pickle.load(sys.stdin.buffer)
        except (EOFError, pickle.UnpicklingError):  # closed, or killed while it wrote
            return
        error = None
        try:
            write_part(job)
        except Exception as raised:
            error = raised
        try:
            pickle.dump(error, answers)
            answers.flush()
        except BrokenPipeError:
            return
