"""The likelihood of many rows, chunk by chunk, so that it can stop and go on."""

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
from blockdiffusion.evaluate.likelihood import Likelihood, data_error, likelihood
from blockdiffusion.evaluate.options import LikelihoodOptions
from blockdiffusion.evaluate.windows import Window, rectangle
from blockdiffusion.runtime.seeding import generator

ScoreOptions = LikelihoodOptions  # its name in the version before
CHUNK_TOKENS = 2**14  # what a kill loses at most: some passes of `likelihood`
TENSORS = ("nats_per_row", "exact_nats_per_row")
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
    """Likelihood of all windows; each is scored by itself, `nats_per_row` is per unit.

    Args:
        windows: in the order of their units, which are numbered from 0.
        seed: of the masks.
        bos: whether position 0 of every window is a BOS; it is among the given ones.
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
    """The likelihood of a chunk, as a journal keeps it."""
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
    values = asdict(part)
    return values | {
        name: None if values[name] is None else values[name].tolist() for name in TENSORS
    }


def _digest(chunk: Sequence[Window]) -> str:
    digest = hashlib.blake2b(digest_size=12)
    for window in chunk:
        digest.update(f"{len(window.ids)} {window.given} {window.unit} ".encode())
        digest.update(window.ids.astype(np.int64).tobytes())
    return digest.hexdigest()


def _from_json(values: dict[str, Any]) -> Likelihood:
    restored: dict[str, Any] = dict(values)
    for name in TENSORS:
        if values[name] is not None:
            restored[name] = torch.tensor(values[name], dtype=torch.float64)
    for name in ("order_bounds", "order_bounds_stderr_noise"):
        if values[name] is not None:
            restored[name] = {int(k): value for k, value in values[name].items()}
    return Likelihood(**restored)


# --- together ----------------------------------------------------------------------------------


def _merged(
    parts: Sequence[Likelihood], windows: Sequence[Window], num_bytes: float | None
) -> Likelihood:
    """One likelihood from those of independent chunks."""
    tokens_W = torch.tensor([len(window.ids) - window.given for window in windows])
    unit_W = torch.tensor([window.unit for window in windows])
    num_tokens, num_units = int(tokens_W.sum()), int(unit_W.max()) + 1
    assert num_tokens == sum(part.num_tokens for part in parts)

    def per_unit(values_W: torch.Tensor) -> torch.Tensor:
        return torch.zeros(num_units, dtype=values_W.dtype).index_add(0, unit_W, values_W)

    def together(name: str, add: Callable[[Sequence[float]], float]) -> Any:
        """Of means over the tokens of each part, or dicts of them; None if one is not known."""
        values = [getattr(part, name) for part in parts]
        if None in values:
            return None

        def total(means: Sequence[float]) -> float:
            counts = [part.num_tokens for part in parts]
            return add([mean * n for mean, n in zip(means, counts, strict=True)]) / num_tokens

        if isinstance(values[0], dict):
            return {k: total([value[k] for value in values]) for k in values[0]}
        return total(values)

    def noise(name: str) -> Any:
        return together(name, lambda errors: math.hypot(*errors))  # of independent parts

    nats_U, tokens_U = (
        per_unit(torch.cat([part.nats_per_row for part in parts])),
        per_unit(tokens_W),
    )
    nats = float(nats_U.sum()) / num_tokens
    exact_parts = [p.exact_nats_per_row for p in parts if p.exact_nats_per_row is not None]
    exact_U = per_unit(torch.cat(exact_parts)) if exact_parts else None
    exact = None if exact_U is None else float(exact_U.sum()) / num_tokens
    bits = None if not num_bytes else num_tokens / num_bytes / math.log(2)
    return replace(
        parts[0],
        nats_per_token=nats,
        exact_nats_per_token=exact,
        bits_per_byte=None if bits is None else nats * bits,
        exact_bits_per_byte=None if exact is None or bits is None else exact * bits,
        nats_per_row=nats_U,
        exact_nats_per_row=exact_U,
        orders_nats_per_token=together("orders_nats_per_token", sum),
        order_bounds=together("order_bounds", sum),
        num_tokens=num_tokens,
        num_rows=num_units,
        stderr_noise=noise("stderr_noise"),
        stderr_data=data_error(nats_U, tokens_U),
        exact_stderr_data=None if exact_U is None else data_error(exact_U, tokens_U),
        orders_stderr_noise=noise("orders_stderr_noise"),
        order_bounds_stderr_noise=noise("order_bounds_stderr_noise"),
        samples=max(part.samples for part in parts),
        copies=max(part.copies for part in parts),
        seconds=sum(part.seconds for part in parts),
    )
