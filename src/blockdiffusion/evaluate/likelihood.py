"""Likelihood of text under a model, with its two standard errors.

A diffusion likelihood is a bound (NELBO). It is estimated by drawing noise with any unbiased
estimator of the network's objective (see `objectives`), or, for masks, enumerated (`exact`, blocks
of up to 8 tokens), which also gives the exact log-likelihood; `orders` gives a tighter bound for
blocks of any length. The *noise* error says how far the estimate may lie from the value on these
data, the *data* error how far that may lie from the value on all text of the kind.
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
    Found,
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

# A token; with it the ends of all intervals, and squares of perplexities, are numbers.
MOST_NATS = 200.0
CUT = "mask probabilities below {:g} left out"  # by `t_min`
Z95 = 1.959963984540054


@dataclass(frozen=True, kw_only=True)
class Likelihood:
    """What a model gives to some text, in nats unless it says otherwise.

    Attributes:
        nats_per_token: the bound on the negative log-likelihood, per counted token.
        exact_nats_per_token: the exact value; None unless the estimator gives it.
        perplexity: exp(nats_per_token); an upper bound where `is_bound`.
        exact_perplexity: exp(exact_nats_per_token), or None.
        bits_per_byte: of the bound; None where the number of bytes is not known.
        exact_bits_per_byte: of the exact value, or None.
        nats_per_row: float64 (B,), the bound of each row (a sum over its counted tokens).
        exact_nats_per_row: float64 (B,), or None.
        num_tokens: counted tokens (given tokens and padding are not counted).
        orders_nats_per_token: the tighter bound that `orders` gives, or None.
        orders_perplexity: exp(orders_nats_per_token), or None.
        order_bounds: number of orders K -> bound in nats per token, for K = 1, 2, 4, ... up to
            `orders`, from the same draws; None for other estimators.
        stderr_noise: standard error of nats_per_token with the data fixed and the masks redrawn,
            from independent replicates; 0 for `exact`; None from a single sample.
        orders_stderr_noise: the same of orders_nats_per_token, or None.
        order_bounds_stderr_noise: the same of every one of order_bounds, or None.
        target_stderr: what the noise error was to be at most; None where nothing was asked.
        stderr_data: standard error over rows (documents), None from a single row. The spread over
            rows contains the rows' own noise.
        exact_stderr_data: the same of exact_nats_per_token, or None.
        interval: 95 % interval of nats_per_token, from the larger of the two errors (that of the
            data, but for a handful of rows).
        estimator: the estimator used, `samples` its independent replicates, and `copies` how many
            noisy copies of every row were evaluated for them in all.
        bos: whether position 0 was given (BOS) and not counted.
        is_bound: False where nats_per_token is itself exact: an autoregressive model, and S = 1
            with any estimator but "bernoulli", which draws whether the only token is masked.
        t_min: mask probabilities below are left out by `bernoulli`; None for the others, which need
            no cut.
        note: how the estimator is another one than was asked for, or None.
        seconds: time spent.
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
        return math.exp(self.nats_per_token)

    @property
    def exact_perplexity(self) -> float | None:
        return None if self.exact_nats_per_token is None else math.exp(self.exact_nats_per_token)

    @property
    def orders_perplexity(self) -> float | None:
        return None if self.orders_nats_per_token is None else math.exp(self.orders_nats_per_token)

    @property
    def remarks(self) -> list[str]:
        """What is not as it was asked for, a sentence each."""
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
        known = [e for e in (self.stderr_data, self.stderr_noise) if e is not None]
        if not known:
            return None
        error = max(known)
        return self.nats_per_token - Z95 * error, self.nats_per_token + Z95 * error

    def to_dict(self, rows: bool = False) -> dict[str, Any]:
        """Plain values for JSON; with `rows` the values per row too."""
        values = asdict(self)
        for name in ("nats_per_row", "exact_nats_per_row"):
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
    """Nats per token, perplexity and bits per byte of `ids`, with error bars.

    Args:
        model: from `blockdiffusion.load`, or any `Denoiser`; evaluated in its own precision.
        ids: token ids (B, L), or a list of id lists, or a list of texts (needs a tokenizer). Rows
            that do not fill their last block are padded; padding is not seen and not counted.
        options: how to estimate, or the name of an estimator; `changes` are fields of it by name.
        samples: the older name of `mc_samples`.
        bos: whether position 0 of each row is given and not counted; None = what the model's
            configuration says, and no BOS where it says nothing. Texts get the BOS put before them.
        valid: bool (B, L), False at padding; None = all valid.
        given: bool (B, L), True at tokens that are read as they are, never masked and not counted,
            besides a BOS: the context of what is scored, see `evaluate.windows`.
        generator: source of the masks; a fixed seed by default.
        t_min: mask probabilities below are left out by "bernoulli" (relative bias below 0.1 %).
        num_bytes: UTF-8 bytes of the counted text, for bits per byte; known for texts.
        progress: called with (done, total) units of work.
        processes: those that call this alike and share the rows, group by group. All of them draw
            all masks, and return what one process would.
        journal: file that keeps finished groups of rows, so that the same call resumes after a
            kill, with any number of processes, to the same result but for `seconds`. The caller
            removes it.

    Raises:
        UserError: for ids outside the vocabulary, a clipped schedule, blocks too long to
            enumerate, an estimator that the network does not allow, or nothing to score.
    """
    start = time.perf_counter()
    options = _options(options, samples, changes)
    method = choose_estimator(options, model.config, t_min)
    text = _Text.of(model, ids, bos, valid, given, num_bytes)
    tensors = (text.clean_BL, text.free_BL, text.valid_BL)
    kept = Journal.of(journal, model, *tensors, method[0], options.orders, t_min)
    rows = Rows(model, *tensors, processes, kept)
    generator = seeded_generator(0, "likelihood") if generator is None else generator
    found = _estimate(rows, method, options, generator, text.num_tokens, progress)
    return _result(found, method, options, text, t_min, model.config, start)


def _options(
    options: LikelihoodOptions | str | None, samples: int | None, changes: dict[str, Any]
) -> LikelihoodOptions:
    if isinstance(options, str):
        options, changes = None, {"estimator": options} | changes
    if samples is not None:
        changes = changes | {"samples": samples}
    return changed(options or LikelihoodOptions(), changes)


Method = tuple[str, Estimator | None, str | None]


def choose_estimator(options: LikelihoodOptions, config: Any, t_min: float = T_MIN) -> Method:
    """The estimator's name ("auto" resolved), its distribution of masks (None: nothing is drawn
    from one), and a note where it is another one than was asked for.

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
        masks, note = diffusion.estimator(name, t_min)
    except UserError as error:
        also = "auto, exact or orders" if diffusion.enumerable else "auto"
        raise UserError(f"{error}; a likelihood can also be {also}") from None
    if not masks.is_bound:
        raise UserError(
            f"{masks.name} is clipped: it does not bound the likelihood and gives no "
            "perplexity; evaluate with an unclipped estimator"
        )
    return name, masks, note


def _estimate(
    rows: Rows,
    method: Method,
    options: LikelihoodOptions,
    generator: torch.Generator,
    num_tokens: int,
    progress: Progress | None,
) -> Found:
    name, masks, _ = method
    if rows.model.config.is_autoregressive:
        return next_token_nll(rows, progress)
    if name == "exact":
        return enumerated(rows, progress)
    replicates = Replicates(rows=rows, estimator=masks, orders=options.orders, generator=generator)
    return drawn(replicates, options, num_tokens, progress)


def _is_exact(config: Any, masks: Estimator | None) -> bool:
    """Whether what bounds longer blocks is the likelihood itself: a block has one mask set only,
    which is always drawn."""
    if config.block_size > 1 or isinstance(masks, Bernoulli):
        return False
    return config.is_autoregressive or diffusion_of(config).enumerable


def _result(
    found: Found,
    method: Method,
    options: LikelihoodOptions,
    text: _Text,
    t_min: float,
    config: Any,
    start: float,
) -> Likelihood:
    """Per token what was found per row; `start`: when the measurement began.

    Raises:
        UserError: it is no number.
    """
    name, masks, note = method
    num_tokens, tokens_B = text.num_tokens, text.free_BL.sum(1)
    row_B = found.nelbo_BR.mean(1)
    is_exact = _is_exact(config, masks)
    exact_B = row_B if is_exact else found.exact_B
    nats = float(row_B.sum()) / num_tokens
    exact = None if exact_B is None else float(exact_B.sum()) / num_tokens
    if not all(value is None or value < MOST_NATS for value in (nats, exact)):  # nan is not
        raise UserError(
            f"the likelihood is {nats:.4g} nats a token: the network's logits are not finite or "
            "far too large, as its numbers overflow or its weights have diverged; measure in "
            "float32, or take an earlier checkpoint"
        )
    bounds = {k: float(bound_BR.sum(0).mean()) / num_tokens for k, bound_BR in found.orders.items()}
    noises = {k: found.noise_error(num_tokens, k) for k in bounds}
    return Likelihood(
        nats_per_token=nats,
        exact_nats_per_token=exact,
        bits_per_byte=text.bits_per_byte(nats),
        exact_bits_per_byte=text.bits_per_byte(exact),
        nats_per_row=row_B,
        exact_nats_per_row=exact_B,
        orders_nats_per_token=bounds.get(options.orders),
        order_bounds=bounds or None,
        num_tokens=num_tokens,
        num_rows=len(row_B),
        stderr_noise=0.0 if name == "exact" else found.noise_error(num_tokens),
        stderr_data=data_error(row_B, tokens_B),
        exact_stderr_data=None if exact_B is None else data_error(exact_B, tokens_B),
        orders_stderr_noise=noises.get(options.orders),
        order_bounds_stderr_noise={k: e for k, e in noises.items() if e is not None} or None,
        target_stderr=options.target_stderr,
        estimator=name,
        samples=found.nelbo_BR.shape[1],
        copies=found.copies,
        bos=text.bos,
        is_bound=not is_exact,
        block_size=config.block_size,
        t_min=t_min if isinstance(masks, Bernoulli) else None,
        note=note,
        seconds=time.perf_counter() - start,
    )


def data_error(row_B: torch.Tensor, tokens_B: torch.Tensor) -> float | None:
    """Standard error of the ratio sum(nats) / sum(tokens) over independent rows."""
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
    """What is scored, as (B, L) with L a multiple of the block size; `free_BL` is what counts."""

    clean_BL: torch.Tensor
    free_BL: torch.Tensor
    valid_BL: torch.Tensor
    bos: bool
    num_bytes: float | None

    @classmethod
    def of(cls, model: Denoiser, ids: Any, bos: bool | None, valid, given, num_bytes) -> _Text:
        """Reads the arguments of `likelihood`."""
        config = model.config
        bos = bool(config.bos) if bos is None else bos
        rows = ids
        if _are_texts(ids):
            first = [bos_id(model)] if bos else []
            rows = [first + encode_text(model.tokenizer, text) for text in ids]
            if num_bytes is None:
                num_bytes = sum(len(text.encode()) for text in ids)
        clean_BL, valid_BL = _tensors(rows, valid, config.block_size)
        _check_ids(clean_BL, valid_BL, config)
        free_BL = valid_BL.clone()
        if bos:
            free_BL[:, 0] = False
        if given is not None:
            if not isinstance(ids, torch.Tensor) or given.shape != ids.shape:
                raise UserError("given goes with a tensor of ids and has its shape")
            free_BL[:, : given.shape[1]] &= ~given.bool().cpu()
        if not free_BL.any():
            raise UserError("there is nothing to score: every token is given or padding")
        return cls(clean_BL, free_BL, valid_BL, bos, num_bytes)

    @property
    def num_tokens(self) -> int:
        return int(self.free_BL.sum())

    def bits_per_byte(self, nats: float | None) -> float | None:
        """Of so many nats per token; None where one of the two is not known."""
        if nats is None or not self.num_bytes:
            return None
        return nats * self.num_tokens / self.num_bytes / math.log(2)


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
    """ids and validity as (B, L) with L a multiple of the block size."""
    if not isinstance(ids, torch.Tensor):
        if valid is not None:
            raise UserError("valid goes with a tensor of ids; lists are padded by themselves")
        rows = [as_ids(row, "a row") for row in ids]
        if not rows or not all(map(len, rows)):
            raise UserError("there is an empty row or no row at all; every row needs a token")
        return rectangle(rows, block_size)
    if ids.ndim != 2 or ids.numel() == 0:
        raise UserError(f"ids have shape {tuple(ids.shape)}; (rows, tokens) is needed")
    if ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool:
        raise UserError(f"ids are of the type {ids.dtype}; token ids are whole numbers")
    clean = ids.long().cpu()
    valid = torch.ones_like(clean, dtype=torch.bool) if valid is None else valid.bool().cpu()
    if valid.shape != clean.shape:
        raise UserError(f"valid has shape {tuple(valid.shape)}, ids {tuple(clean.shape)}")
    clean = clean.masked_fill(~valid, 0)  # the network must not read what padding holds
    pad = (0, -clean.shape[1] % block_size)
    return torch.nn.functional.pad(clean, pad), torch.nn.functional.pad(valid, pad)


def _check_ids(clean_BL: torch.Tensor, valid_BL: torch.Tensor, config: Any) -> None:
    used = clean_BL[valid_BL]
    if len(used) and (used.min() < 0 or used.max() >= config.vocab_size):
        raise UserError(
            f"ids run from {used.min()} to {used.max()}, but the vocabulary is "
            f"0..{config.vocab_size - 1}; was another tokenizer used?"
        )
    if (used == config.mask_id).any():
        raise UserError(f"ids contain the mask token {config.mask_id}, which is no text")
