"""Likelihood of text under a model, with its two standard errors.

A diffusion likelihood is a bound (NELBO). It is estimated by drawing noise with any unbiased
estimator of the network's objective (see `objectives`). For masks it can be enumerated (`exact`,
blocks of up to 8 tokens), which also gives the exact log-likelihood; `orders` gives a tighter bound
for blocks of any length. The *noise* error is that of the estimate on these data, the *data* error
that of these data as a sample of all text of the kind.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeGuard

import torch

from blockdiffusion.diffusion.denoiser import Denoiser, bos_id
from blockdiffusion.diffusion.estimators import T_MIN, Bernoulli, Estimator
from blockdiffusion.diffusion.exact import enumeration_is_cheap, num_subsets
from blockdiffusion.diffusion.objectives import diffusion_of
from blockdiffusion.errors import UserError
from blockdiffusion.evaluate.journal import Journal
from blockdiffusion.evaluate.options import LikelihoodOptions
from blockdiffusion.evaluate.replicates import (
    Progress,
    Replicates,
    Rows,
    drawn,
    enumerated,
    next_token_nll,
)
from blockdiffusion.evaluate.windows import rectangle
from blockdiffusion.options import changed
from blockdiffusion.runtime.distributed import SINGLE, ProcessGroup
from blockdiffusion.runtime.seeding import generator as seeded_generator
from blockdiffusion.sampling.requests import as_ids
from blockdiffusion.text import encode_text

MOST_NATS = 200.0  # per token: up to it, ends of intervals and squares of perplexities are finite
CUT = "mask probabilities below {:g} left out"  # by `t_min`
Z95 = 1.959963984540054
PER_ROW = ("nats_per_row", "exact_nats_per_row")


@dataclass(frozen=True, kw_only=True)
class Likelihood:
    """The likelihood of some text under a model, in nats unless a name says otherwise.

    Values that the estimator does not give, or that are not known, are None.

    Attributes:
        nats_per_token: bound on the negative log-likelihood, per counted token.
        exact_nats_per_token: the exact value.
        bits_per_byte, exact_bits_per_byte: of the two; known if the number of bytes is.
        nats_per_row, exact_nats_per_row: float64 (B,), sums over the counted tokens of each row.
        orders_nats_per_token: the tighter bound of the estimator `orders`.
        order_bounds: number of orders K -> bound in nats per token, for K = 1, 2, 4, ... up to
            `orders`, from the same draws.
        num_tokens: counted tokens, without given ones and padding.
        stderr_noise: standard error of nats_per_token if the masks were drawn again for the same
            data, from independent replicates; 0 for `exact`; None from a single sample.
            orders_stderr_noise and order_bounds_stderr_noise are the same for the tighter bounds.
        stderr_data: standard error over rows (documents), None from a single row. The spread over
            rows contains the rows' own noise. exact_stderr_data is the same for the exact value.
        target_stderr: the noise error that was asked for.
        estimator: the estimator used, `samples` its independent replicates, and `copies` the noisy
            copies of every row that were evaluated in all.
        bos: whether position 0 was given (BOS) and not counted.
        is_bound: False if nats_per_token is itself exact: an autoregressive model, and S = 1
            with any estimator but "bernoulli", which draws whether the only token is masked.
        t_min: `bernoulli` leaves out mask probabilities below it; the others need no cut.
        note: how the estimator differs from the one that was asked for.
    """

    nats_per_token: float
    exact_nats_per_token: float | None
    bits_per_byte: float | None
    exact_bits_per_byte: float | None
    nats_per_row: torch.Tensor
    exact_nats_per_row: torch.Tensor | None
    orders_nats_per_token: float | None
    order_bounds: dict[int, float] | None
    num_tokens: int
    num_rows: int
    stderr_noise: float | None
    stderr_data: float | None
    exact_stderr_data: float | None
    orders_stderr_noise: float | None
    order_bounds_stderr_noise: dict[int, float] | None
    target_stderr: float | None
    estimator: str
    samples: int
    copies: int
    bos: bool
    is_bound: bool
    block_size: int
    t_min: float | None
    note: str | None
    seconds: float

    @property
    def perplexity(self) -> float:
        """exp(nats_per_token); an upper bound if `is_bound`."""
        return math.exp(self.nats_per_token)

    @property
    def exact_perplexity(self) -> float | None:
        return None if self.exact_nats_per_token is None else math.exp(self.exact_nats_per_token)

    @property
    def orders_perplexity(self) -> float | None:
        return None if self.orders_nats_per_token is None else math.exp(self.orders_nats_per_token)

    @property
    def remarks(self) -> list[str]:
        """How the result differs from what was asked for, a sentence each."""
        remarks = [] if self.note is None else [self.note]
        tighter = self.orders_stderr_noise
        error = self.stderr_noise if tighter is None else tighter
        if self.target_stderr is not None and error is not None and error > self.target_stderr:
            remarks.append(
                f"the noise error is {error:.2g} after {self.samples:,} draws, the most that are "
                f"made: the target of {self.target_stderr:g} was not reached"
            )
        return remarks

    @property
    def interval(self) -> tuple[float, float] | None:
        """95 % interval of nats_per_token, from the larger of the two errors (that of the data,
        except for a handful of rows)."""
        known = [e for e in (self.stderr_data, self.stderr_noise) if e is not None]
        if not known:
            return None
        reach = Z95 * max(known)
        return self.nats_per_token - reach, self.nats_per_token + reach

    def to_dict(self, rows: bool = False) -> dict[str, Any]:
        """Return plain values for JSON, with `rows` also the values per row."""
        values = asdict(self)
        for name in PER_ROW:
            tensor = values.pop(name)
            if rows and tensor is not None:
                values[name] = tensor.tolist()
        derived = ("perplexity", "exact_perplexity", "orders_perplexity", "interval")
        return values | {name: getattr(self, name) for name in derived}


def likelihood(
    model: Denoiser,
    ids: torch.Tensor | Sequence[str] | Sequence[Sequence[int]],
    options: LikelihoodOptions | str | None = None,
    samples: int | None = None,
    *,
    bos: bool | None = None,
    valid: torch.Tensor | None = None,
    given: torch.Tensor | None = None,
    generator: torch.Generator | None = None,
    t_min: float = T_MIN,
    num_bytes: float | None = None,
    progress: Progress | None = None,
    processes: ProcessGroup = SINGLE,
    journal: Path | None = None,
    **changes: Any,
) -> Likelihood:
    """Measure nats per token, perplexity and bits per byte of `ids`, with error bars.

    Args:
        model: from `blockdiffusion.load`, or any `Denoiser`; evaluated in its own precision.
        ids: token ids (B, L), or a list of id lists, or a list of texts (needs a tokenizer). Rows
            that do not fill their last block are padded; padding is neither seen nor counted.
        options: how to estimate, or the name of an estimator; `changes` sets single fields.
        samples: the older name of `mc_samples`.
        bos: whether position 0 of each row is given and not counted. None takes it from the
            model's configuration, which means no BOS if it does not say. Texts get the BOS
            prepended.
        valid: bool (B, L), False at padding; None means all valid.
        given: bool (B, L), True at context tokens, besides a BOS: they are read as they are, never
            masked and not counted; see `evaluate.windows`.
        generator: source of the masks; a fixed seed by default.
        t_min: "bernoulli" leaves out mask probabilities below it (relative bias below 0.1 %).
        num_bytes: UTF-8 bytes of the counted text, for bits per byte; known for texts.
        progress: called with (done, total) units of work.
        processes: those that make this call together. They share the rows, group by group, draw
            all masks each, and return what one process would.
        journal: file that keeps finished groups of rows. After a kill the same call resumes from
            it, with any number of processes, and gives the same result but for `seconds`. The
            caller removes it.

    Raises:
        UserError: ids outside the vocabulary, a clipped schedule, blocks too long to enumerate, an
            estimator that the network does not allow, nothing to score, or no finite value.
    """
    start = time.perf_counter()
    if isinstance(options, str):
        options, changes = None, {"estimator": options} | changes
    if samples is not None:
        changes = changes | {"samples": samples}
    options, config = changed(options or LikelihoodOptions(), changes), model.config
    name, estimator, note = choose_estimator(options, config, t_min)
    text = _Text.of(model, ids, bos, valid, given, num_bytes)
    tensors, num_tokens = (text.clean_BL, text.free_BL, text.valid_BL), int(text.free_BL.sum())
    kept = Journal.of(journal, model, *tensors, name, options.orders, t_min)
    rows = Rows(model, *tensors, processes, kept)
    if config.is_autoregressive:
        found = next_token_nll(rows, progress)
    elif name == "exact":
        found = enumerated(rows, progress)
    else:
        generator = seeded_generator(0, "likelihood") if generator is None else generator
        draws = Replicates(
            rows=rows, estimator=estimator, orders=options.orders, generator=generator
        )
        found = drawn(draws, options, num_tokens, progress)
    row_B = found.nelbo_BR.mean(1)
    is_exact = _is_exact(config, estimator)
    bounds = {k: float(bound_BR.sum(0).mean()) / num_tokens for k, bound_BR in found.orders.items()}
    noises = {k: found.noise_error(num_tokens, k) for k in bounds}
    return Likelihood(
        **row_values(row_B, row_B if is_exact else found.exact_B, text.free_BL.sum(1),
                     text.num_bytes),
        orders_nats_per_token=bounds.get(options.orders),
        order_bounds=bounds or None,
        stderr_noise=0.0 if name == "exact" else found.noise_error(num_tokens),
        orders_stderr_noise=noises.get(options.orders),
        order_bounds_stderr_noise={k: e for k, e in noises.items() if e is not None} or None,
        target_stderr=options.target_stderr,
        estimator=name,
        samples=found.nelbo_BR.shape[1],
        copies=found.copies,
        bos=text.bos,
        is_bound=not is_exact,
        block_size=config.block_size,
        t_min=t_min if isinstance(estimator, Bernoulli) else None,
        note=note,
        seconds=time.perf_counter() - start,
    )  # fmt: skip


def choose_estimator(
    options: LikelihoodOptions, config: Any, t_min: float = T_MIN
) -> tuple[str, Estimator | None, str | None]:
    """Return the estimator's name ("auto" resolved), the estimator itself (None if masks are not
    drawn from one), and a note if it differs from the one that was asked for.

    Raises:
        UserError: the estimator is unknown, clipped, or not one that the network allows.
    """
    name = options.estimator
    if config.is_autoregressive:
        if name not in ("auto", "exact"):
            raise UserError(
                f"estimator is {name}, but the likelihood of an autoregressive model is exact in "
                "one pass; use exact or auto"
            )
        return "exact", None, None
    diffusion = diffusion_of(config)
    if name == "auto":
        exact = diffusion.enumerable and enumeration_is_cheap(config.block_size, options.mc_samples)
        name = "exact" if exact else diffusion.usual_estimator
    if name in ("exact", "orders"):
        if not diffusion.enumerable:
            raise UserError(
                f"estimator {name} needs a masked diffusion network that reads no time; use auto"
            )
        if name == "exact":
            num_subsets(config.block_size)  # refuses long blocks
        return name, None, None
    try:
        estimator, note = diffusion.estimator(name, t_min)
    except UserError as error:
        also = "auto, exact or orders" if diffusion.enumerable else "auto"
        raise UserError(f"{error}; a likelihood can also be {also}") from None
    if not estimator.is_bound:
        raise UserError(
            f"{estimator.name} is clipped: it does not bound the likelihood and gives no "
            "perplexity; evaluate with an unclipped estimator"
        )
    return name, estimator, note


def _is_exact(config: Any, estimator: Estimator | None) -> bool:
    """Whether the value is the likelihood itself: a block of one token has one mask set only,
    and it is always drawn."""
    if config.block_size > 1 or isinstance(estimator, Bernoulli):
        return False
    return config.is_autoregressive or diffusion_of(config).enumerable


def row_values(
    bound_B: torch.Tensor,
    exact_B: torch.Tensor | None,
    tokens_B: torch.Tensor,
    num_bytes: float | None,
) -> dict[str, Any]:
    """Return the fields of a `Likelihood` that follow from the nats and counted tokens of its rows.

    Raises:
        UserError: the values are not finite, or far too large.
    """
    num_tokens = int(tokens_B.sum())
    values: dict[str, Any] = {"num_tokens": num_tokens, "num_rows": len(bound_B)}
    for kind, row_B in (("", bound_B), ("exact_", exact_B)):
        nats = None if row_B is None else float(row_B.sum()) / num_tokens
        if nats is not None and not nats < MOST_NATS:  # nan is not less, either
            raise UserError(
                f"the likelihood is {nats:.4g} nats a token: the network's logits are not finite "
                "or far too large, as its numbers overflow or its weights have diverged; measure "
                "in float32, or take an earlier checkpoint"
            )
        bits = None
        if nats is not None and num_bytes:
            bits = nats * num_tokens / num_bytes / math.log(2)
        values |= {
            f"{kind}nats_per_row": row_B,
            f"{kind}nats_per_token": nats,
            f"{kind}bits_per_byte": bits,
            f"{kind}stderr_data": None if row_B is None else data_error(row_B, tokens_B),
        }
    return values  # fmt: skip


def data_error(row_B: torch.Tensor, tokens_B: torch.Tensor) -> float | None:
    """Return the standard error of the ratio sum(nats) / sum(tokens) over independent rows."""
    used = tokens_B > 0
    row_B, tokens_B = row_B[used], tokens_B[used].double().cpu()
    count = len(row_B)
    if count < 2:
        return None
    residual_B = row_B - row_B.sum() / tokens_B.sum() * tokens_B
    return float((residual_B.square().sum() * count / (count - 1)).sqrt() / tokens_B.sum())


# --- input -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Text:
    """The text to score, as (B, L) with L a multiple of the block size; `free_BL` counts."""

    clean_BL: torch.Tensor
    free_BL: torch.Tensor
    valid_BL: torch.Tensor
    bos: bool
    num_bytes: float | None

    @classmethod
    def of(cls, model: Denoiser, ids: Any, bos: bool | None, valid, given, num_bytes) -> _Text:
        """Read the arguments of `likelihood`."""
        config = model.config
        bos = bool(config.bos) if bos is None else bos
        rows = ids
        if _are_texts(ids):
            first = [bos_id(model)] if bos else []
            rows = [first + encode_text(model.tokenizer, text) for text in ids]
            if num_bytes is None:
                num_bytes = sum(len(text.encode()) for text in ids)
        clean_BL, valid_BL = _tensors(rows, valid, config.block_size)
        _check_ids(clean_BL[valid_BL], config)
        free_BL = valid_BL.clone()
        if bos:
            free_BL[:, 0] = False
        if given is not None:
            if not isinstance(ids, torch.Tensor) or given.shape != ids.shape:
                raise UserError("given needs a tensor of ids, and must have its shape")
            free_BL[:, : given.shape[1]] &= ~given.bool().cpu()
        if not free_BL.any():
            raise UserError("there is nothing to score: every token is given or padding")
        return cls(clean_BL, free_BL, valid_BL, bos, num_bytes)


def _are_texts(ids: Any) -> TypeGuard[Sequence[str]]:
    if isinstance(ids, str):
        raise UserError("ids is a single text; give a list of texts")
    if isinstance(ids, torch.Tensor) or not any(isinstance(row, str) for row in ids):
        return False
    if not all(isinstance(row, str) for row in ids):
        raise UserError("ids holds texts and other things; give a list of texts, or of id lists")
    return True


def _tensors(
    ids: torch.Tensor | Sequence[Sequence[int]], valid: torch.Tensor | None, block_size: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return ids and validity as (B, L) with L a multiple of the block size."""
    if not isinstance(ids, torch.Tensor):
        if valid is not None:
            raise UserError("valid needs a tensor of ids; lists are padded by themselves")
        rows = [as_ids(row, "a row") for row in ids]
        if not rows or not all(map(len, rows)):
            raise UserError("there is an empty row or no row at all; every row needs a token")
        return rectangle(rows, block_size)
    if ids.ndim != 2 or ids.numel() == 0:
        raise UserError(f"ids have shape {tuple(ids.shape)}; they must be (rows, tokens)")
    if ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool:
        raise UserError(f"ids are of the type {ids.dtype}; token ids are whole numbers")
    clean = ids.long().cpu()
    valid = torch.ones_like(clean, dtype=torch.bool) if valid is None else valid.bool().cpu()
    if valid.shape != clean.shape:
        raise UserError(f"valid has shape {tuple(valid.shape)}, but ids {tuple(clean.shape)}")
    clean = clean.masked_fill(~valid, 0)  # the network must not read what padding holds
    pad = (0, -clean.shape[1] % block_size)
    return torch.nn.functional.pad(clean, pad), torch.nn.functional.pad(valid, pad)


def _check_ids(ids: torch.Tensor, config: Any) -> None:
    if len(ids) and (ids.min() < 0 or ids.max() >= config.vocab_size):
        raise UserError(
            f"ids run from {ids.min()} to {ids.max()}, but the vocabulary is "
            f"0..{config.vocab_size - 1}; was another tokenizer used?"
        )
    if (ids == config.mask_id).any():
        raise UserError(f"ids contain the mask token {config.mask_id}, which is no text")
