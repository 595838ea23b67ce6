"""The likelihood of many windows, chunk by chunk, with a journal to resume from."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from functools import partial
from typing import Any

import numpy as np
import torch

from blockdiffusion.diffusion.denoiser import Denoiser
from blockdiffusion.evaluate.journal import NO_JOURNAL, Journal
from blockdiffusion.evaluate.likelihood import PER_ROW, Likelihood, likelihood, row_values
from blockdiffusion.evaluate.options import LikelihoodOptions
from blockdiffusion.evaluate.windows import Window, rectangle
from blockdiffusion.runtime.seeding import generator

ScoreOptions = LikelihoodOptions  # its name in the version before
CHUNK_TOKENS = 2**14  # a kill loses at most these: some passes of `likelihood`
Progress = Callable[[float, float], None]


def score(
    model: Denoiser,
    windows: Sequence[Window],
    options: LikelihoodOptions,
    *,
    bos: bool,
    seed: int = 0,
    num_bytes: float | None = None,
    journal: Journal = NO_JOURNAL,
    name: str = "",
    progress: Progress | None = None,
) -> Likelihood:
    """Measure the likelihood of all windows, each by itself; `nats_per_row` is per unit.

    Args:
        windows: in the order of their units, which are numbered from 0.
        seed: of the masks.
        bos: whether position 0 of every window is a BOS; it is among the given tokens.
        num_bytes: UTF-8 bytes that the scored tokens cover.
        journal: keeps finished chunks.
        name: of these windows in the journal and in the random streams of the masks.
        progress: called with (rows done, all rows).

    Raises:
        UserError: see `likelihood`.
    """
    longest = max(len(window.ids) for window in windows)
    size = max(1, CHUNK_TOKENS // longest)
    chunks = [windows[first : first + size] for first in range(0, len(windows), size)]
    target = options.target_stderr
    if target is not None:
        target *= math.sqrt(len(chunks))  # independent chunks of one size
    of_chunk = replace(options, target_stderr=target)
    done, parts = 0, []
    for number, chunk in enumerate(chunks):

        def report(part: float, total: float, done: int = done, rows: int = len(chunk)) -> None:
            if progress is not None:
                progress(done + rows * part / total, len(windows))

        source = generator(seed, "score", name, number)
        key = f"{name} {number} {_digest(chunk)}"
        found = journal.result(key, partial(_measured, model, chunk, of_chunk, bos, source, report))
        parts.append(_from_json(found))
        report(1, 1)
        done += len(chunk)
    return replace(_merged(parts, windows, num_bytes), target_stderr=options.target_stderr)


def _measured(
    model: Denoiser,
    chunk: Sequence[Window],
    options: LikelihoodOptions,
    bos: bool,
    source: torch.Generator,
    progress: Progress,
) -> dict[str, Any]:
    """Return the likelihood of a chunk as plain values."""
    ids_BL, valid_BL = rectangle([window.ids for window in chunk])
    given_B = torch.tensor([window.given for window in chunk])
    part = likelihood(
        model,
        ids_BL,
        options,
        bos=bos,
        valid=valid_BL,
        given=torch.arange(ids_BL.shape[1]) < given_B[:, None],
        generator=source,
        progress=progress,
    )
    rows = {n: None if (row_B := getattr(part, n)) is None else row_B.tolist() for n in PER_ROW}
    return asdict(part) | rows


def _digest(chunk: Sequence[Window]) -> str:
    digest = hashlib.blake2b(digest_size=12)
    for window in chunk:
        digest.update(f"{len(window.ids)} {window.given} {window.unit} ".encode())
        digest.update(window.ids.astype(np.int64).tobytes())
    return digest.hexdigest()


def _from_json(values: dict[str, Any]) -> Likelihood:
    known = {name: value for name, value in values.items() if value is not None}
    for name in known.keys() & PER_ROW:
        known[name] = torch.tensor(values[name], dtype=torch.float64)
    for name in known.keys() & {"order_bounds", "order_bounds_stderr_noise"}:
        known[name] = {int(k): value for k, value in values[name].items()}
    return Likelihood(**values | known)


def _merged(
    parts: Sequence[Likelihood], windows: Sequence[Window], num_bytes: float | None
) -> Likelihood:
    """Return one likelihood from those of independent chunks."""
    unit_W = torch.tensor([window.unit for window in windows])

    def per_unit(values_W: torch.Tensor) -> torch.Tensor:
        sums_U = torch.zeros(int(unit_W.max()) + 1, dtype=values_W.dtype)
        return sums_U.index_add(0, unit_W, values_W)

    tokens_U = per_unit(torch.tensor([len(window.ids) - window.given for window in windows]))
    counts = [part.num_tokens for part in parts]
    assert int(tokens_U.sum()) == sum(counts)

    def together(name: str, add: Callable[..., float]) -> Any:
        """Add up means over the tokens of each part, or dicts of them; None if one is unknown."""
        values = [getattr(part, name) for part in parts]
        if None in values:
            return None

        def total(means: Sequence[float]) -> float:
            sums = [mean * count for mean, count in zip(means, counts, strict=True)]
            return add(sums) / sum(counts)

        if isinstance(values[0], dict):
            return {k: total([value[k] for value in values]) for k in values[0]}
        return total(values)

    bounds = ("orders_nats_per_token", "order_bounds")
    noises = ("stderr_noise", "orders_stderr_noise", "order_bounds_stderr_noise")
    exact = [part.exact_nats_per_row for part in parts if part.exact_nats_per_row is not None]
    return replace(
        parts[0],
        **row_values(
            per_unit(torch.cat([part.nats_per_row for part in parts])),
            per_unit(torch.cat(exact)) if exact else None,
            tokens_U,
            num_bytes,
        ),
        **{name: together(name, sum) for name in bounds},
        # Errors of independent parts.
        **{name: together(name, lambda errors: math.hypot(*errors)) for name in noises},
        samples=max(part.samples for part in parts),
        copies=max(part.copies for part in parts),
        seconds=sum(part.seconds for part in parts),
    )
