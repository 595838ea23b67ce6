"""The likelihood of many rows, chunk by chunk, so that it can stop and go on."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import torch

from blockdiffusion.diffusion.denoiser import Denoiser
from blockdiffusion.evaluate.journal import Journal
from blockdiffusion.evaluate.likelihood import Likelihood, data_error, likelihood
from blockdiffusion.evaluate.windows import Window
from blockdiffusion.runtime.seeding import generator

CHUNK_TOKENS = 2**14  # what a kill loses at most: some passes of `likelihood`
TENSORS = ("nats_per_row", "exact_nats_per_row")
Progress = Callable[[float, float], None]


@dataclass(frozen=True, kw_only=True, slots=True)
class ScoreOptions:
    """How likelihoods are estimated: the arguments of `likelihood` of the same names."""

    estimator: str = "auto"
    samples: int = 8
    orders: int = 8
    target_stderr: float | None = None
    seed: int = 0


def score(
    model: Denoiser,
    windows: Sequence[Window],
    options: ScoreOptions,
    *,
    bos: bool,
    num_bytes: float | None = None,
    journal: Journal | None = None,
    name: str = "",
    progress: Progress | None = None,
) -> Likelihood:
    """Likelihood of all windows; each is scored by itself, `nats_per_row` is per unit.

    Args:
        windows: in the order of their units, which are numbered from 0.
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
    done, parts = 0, []
    for number, chunk in enumerate(chunks):
        key = f"{name} {number} {_digest(chunk)}"
        kept = None if journal is None else journal.get(key)
        if kept is None:

            def report(part: int, total: int, done: int = done, rows: int = len(chunk)) -> None:
                if progress is not None:
                    progress(done + rows * part / total, len(windows))

            ids_BL, valid_BL, given_BL = _rectangle(chunk)
            part = likelihood(
                model,
                ids_BL,
                options.estimator,
                options.samples,
                orders=options.orders,
                target_stderr=target,
                bos=bos,
                valid=valid_BL,
                given=given_BL,
                generator=generator(options.seed, "score", name, number),
                progress=report,
            )
            if journal is not None:
                journal.put(key, _to_json(part))
        else:
            part = _from_json(kept)
        parts.append(part)
        done += len(chunk)
        if progress is not None:
            progress(done, len(windows))
    return replace(_merged(parts, windows, num_bytes), target_stderr=options.target_stderr)


def _rectangle(chunk: Sequence[Window]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(ids, valid, given), each (B, L)."""
    length = max(len(window.ids) for window in chunk)
    ids_BL = np.zeros((len(chunk), length), dtype=np.int64)
    valid_BL, given_BL = np.zeros((2, len(chunk), length), dtype=bool)
    for row, window in enumerate(chunk):
        ids_BL[row, : len(window.ids)] = window.ids
        valid_BL[row, : len(window.ids)] = True
        given_BL[row, : window.given] = True
    return torch.from_numpy(ids_BL), torch.from_numpy(valid_BL), torch.from_numpy(given_BL)


def _digest(chunk: Sequence[Window]) -> str:
    digest = hashlib.blake2b(digest_size=12)
    for window in chunk:
        digest.update(f"{len(window.ids)} {window.given} {window.unit} ".encode())
        digest.update(window.ids.astype(np.int64).tobytes())
    return digest.hexdigest()


def _to_json(part: Likelihood) -> dict[str, Any]:
    values = asdict(part)
    return values | {
        name: None if values[name] is None else values[name].tolist() for name in TENSORS
    }


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

    nats_U = per_unit(torch.cat([part.nats_per_row for part in parts]))
    exact_parts = [p.exact_nats_per_row for p in parts if p.exact_nats_per_row is not None]
    exact_U = per_unit(torch.cat(exact_parts)) if exact_parts else None
    tokens_U = per_unit(tokens_W)
    nats = float(nats_U.sum()) / num_tokens
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
        orders_nats_per_token=_mean(parts, [part.orders_nats_per_token for part in parts]),
        order_bounds=_by_order(parts, [part.order_bounds for part in parts], _mean),
        num_tokens=num_tokens,
        num_rows=num_units,
        stderr_noise=_noise(parts, [part.stderr_noise for part in parts]),
        stderr_data=data_error(nats_U, tokens_U),
        exact_stderr_data=None if exact_U is None else data_error(exact_U, tokens_U),
        orders_stderr_noise=_noise(parts, [part.orders_stderr_noise for part in parts]),
        order_bounds_stderr_noise=_by_order(
            parts, [part.order_bounds_stderr_noise for part in parts], _noise
        ),
        samples=max(part.samples for part in parts),
        copies=max(part.copies for part in parts),
        seconds=sum(part.seconds for part in parts),
    )


def _totals(parts: Sequence[Likelihood], means: Sequence[float | None]) -> list[float] | None:
    """What are means over the tokens of each part, as sums; None if one is not known."""
    totals = [
        mean * part.num_tokens for part, mean in zip(parts, means, strict=True) if mean is not None
    ]
    return totals if len(totals) == len(parts) else None


def _mean(parts: Sequence[Likelihood], means: Sequence[float | None]) -> float | None:
    totals = _totals(parts, means)
    return None if totals is None else sum(totals) / sum(part.num_tokens for part in parts)


def _noise(parts: Sequence[Likelihood], errors: Sequence[float | None]) -> float | None:
    """Errors of independent parts: their squares add."""
    totals = _totals(parts, errors)
    return None if totals is None else math.hypot(*totals) / sum(p.num_tokens for p in parts)


def _by_order(
    parts: Sequence[Likelihood],
    values: Sequence[dict[int, float] | None],
    together: Callable[[Sequence[Likelihood], Sequence[float | None]], float | None],
) -> dict[int, float] | None:
    """`together` for every number of orders; None if one part has no values."""
    known = [value for value in values if value is not None]
    if len(known) < len(parts):
        return None
    found = {k: together(parts, [value[k] for value in known]) for k in known[0]}
    return {k: value for k, value in found.items() if value is not None}
