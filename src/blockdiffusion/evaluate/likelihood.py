"""Likelihood of text under a model, with its two standard errors.

A masked diffusion likelihood is a bound (NELBO) that is either estimated by drawing masks
(`bernoulli`, the paper's way) or enumerated (`exact`, blocks of up to 8 tokens), which also gives
the exact log-likelihood. The *noise* error says how far the estimate may lie from the value on
these data, the *data* error how far that may lie from the value on all text of the kind.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, TypeGuard, cast, get_args

import torch

from blockdiffusion.corruption import T_MIN, bernoulli
from blockdiffusion.denoiser import Denoiser, bos_id, masked_nll
from blockdiffusion.errors import UserError
from blockdiffusion.exact import exact_blocks, num_subsets
from blockdiffusion.schedules import Linear, Schedule
from blockdiffusion.seeding import generator as seeded_generator

Estimator = Literal["bernoulli", "exact"]
PASS_TOKENS = 16_384  # tokens of one pass over all streams: bounds memory
COPIES = 8  # noisy copies that share one clean stream
Z95 = 1.959963984540054
Progress = Callable[[int, int], None]


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
        stderr_noise: standard error of nats_per_token with the data fixed and the masks redrawn,
            from independent replicates; 0 for `exact`; None from a single sample.
        stderr_data: standard error over rows (documents), None from a single row. The spread over
            rows contains the rows' own noise.
        exact_stderr_data: the same of exact_nats_per_token, or None.
        interval: 95 % interval of nats_per_token, from the larger of the two errors (that of the
            data, but for a handful of rows).
        bos: whether position 0 was given (BOS) and not counted.
        is_bound: False where nats_per_token is itself exact (S = 1, enumerated).
        t_min: where `bernoulli` cuts t; None for `exact`.
        seconds: time spent.
    """

    nats_per_token: float
    exact_nats_per_token: float | None
    bits_per_byte: float | None
    exact_bits_per_byte: float | None
    nats_per_row: torch.Tensor
    exact_nats_per_row: torch.Tensor | None
    num_tokens: int
    num_rows: int
    stderr_noise: float | None
    stderr_data: float | None
    exact_stderr_data: float | None
    estimator: str
    samples: int
    bos: bool
    is_bound: bool
    block_size: int
    t_min: float | None
    seconds: float

    @property
    def perplexity(self) -> float:
        return math.exp(self.nats_per_token)

    @property
    def exact_perplexity(self) -> float | None:
        return None if self.exact_nats_per_token is None else math.exp(self.exact_nats_per_token)

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
        derived = ("perplexity", "exact_perplexity", "interval")
        return values | {name: getattr(self, name) for name in derived}


def likelihood(
    model: Denoiser,
    ids: torch.Tensor | Sequence[str] | Sequence[Sequence[int]],
    estimator: Estimator = "bernoulli",
    samples: int = 8,
    *,
    bos: bool | None = None,
    valid: torch.Tensor | None = None,
    generator: torch.Generator | None = None,
    schedule: Schedule | None = None,
    t_min: float = T_MIN,
    num_bytes: float | None = None,
    progress: Progress | None = None,
) -> Likelihood:
    """Nats per token, perplexity and bits per byte of `ids`, with error bars.

    Args:
        model: from `blockdiffusion.load`, or any `Denoiser`; evaluated in its own precision.
        ids: token ids (B, L), or a list of id lists, or a list of texts (needs a tokenizer). Rows
            that do not fill their last block are padded; padding is not seen and not counted.
        estimator: "bernoulli" (draws masks; any block size) or "exact" (enumerates; S <= 8).
        samples: independent replicates of the masks for `bernoulli`; the noise error needs two.
        bos: whether position 0 of each row is given and not counted; None = what the model's
            configuration says, and no BOS where it says nothing. Texts get the BOS put before them.
        valid: bool (B, L), False at padding; None = all valid.
        generator: source of the masks; a fixed seed by default.
        schedule: noise schedule of `bernoulli` (linear by default).
        t_min: where `bernoulli` cuts t, as the authors do (relative bias below 0.1 %).
        num_bytes: UTF-8 bytes of the counted text, for bits per byte; known for texts.
        progress: called with (done, total) units of work.

    Raises:
        UserError: for ids outside the vocabulary, a clipped schedule, blocks too long to
            enumerate, or nothing to score.
    """
    start = time.perf_counter()
    config = model.config
    if estimator not in get_args(Estimator):
        raise UserError(f"unknown estimator {estimator!r}; known: {', '.join(get_args(Estimator))}")
    schedule = Linear() if schedule is None else schedule
    if not schedule.is_bound:
        raise UserError(
            f"the schedule {schedule.name} does not bound the likelihood and gives no perplexity; "
            "evaluate with an unclipped one"
        )
    if samples < 1:
        raise UserError(f"samples is {samples}; at least 1 replicate of the masks is needed")
    given_bos = bool(config.bos) if bos is None else bos
    if _are_texts(ids):
        if num_bytes is None:
            num_bytes = sum(len(text.encode()) for text in ids)
        rows = _tokenize(model, ids, given_bos)
    else:
        rows = cast("torch.Tensor | Sequence[Sequence[int]]", ids)
    clean_BL, valid_BL = _rectangle(rows, valid, config.block_size)
    _check_ids(clean_BL, valid_BL, config)
    free_BL = valid_BL.clone()
    if given_bos:
        free_BL[:, 0] = False
    num_tokens = int(free_BL.sum())
    if num_tokens == 0:
        raise UserError("there is nothing to score: every token is given or padding")

    if estimator == "exact":
        nelbo_BR, nll_B = _enumerate(model, clean_BL, free_BL, valid_BL, progress)
        samples, t_cut = 1, None
    else:
        source = generator if generator is not None else seeded_generator(0, "likelihood")
        nelbo_BR, nll_B = (
            _draw(model, clean_BL, free_BL, valid_BL, samples, schedule, t_min, source, progress),
            None,
        )
        t_cut = t_min
    row_B = nelbo_BR.mean(1)
    nats = float(row_B.sum()) / num_tokens
    exact = None if nll_B is None else float(nll_B.sum()) / num_tokens
    return Likelihood(
        nats_per_token=nats,
        exact_nats_per_token=exact,
        bits_per_byte=_bits_per_byte(nats, num_tokens, num_bytes),
        exact_bits_per_byte=None if exact is None else _bits_per_byte(exact, num_tokens, num_bytes),
        nats_per_row=row_B,
        exact_nats_per_row=nll_B,
        num_tokens=num_tokens,
        num_rows=len(row_B),
        stderr_noise=0.0 if estimator == "exact" else _noise_error(nelbo_BR, num_tokens),
        stderr_data=_data_error(row_B, free_BL.sum(1)),
        exact_stderr_data=None if nll_B is None else _data_error(nll_B, free_BL.sum(1)),
        estimator=estimator,
        samples=samples,
        bos=given_bos,
        is_bound=not (estimator == "exact" and config.block_size == 1),
        block_size=config.block_size,
        t_min=t_cut,
        seconds=time.perf_counter() - start,
    )


# --- the two estimators ----------------------------------------------------------------------


def _row_groups(num_rows: int, tokens_per_row: int) -> list[slice]:
    rows = max(1, PASS_TOKENS // tokens_per_row)
    return [slice(first, min(first + rows, num_rows)) for first in range(0, num_rows, rows)]


def _enumerate(model, clean_BL, free_BL, valid_BL, progress: Progress | None):
    """The bound (B, 1) and the exact negative log-likelihood (B,) of every row."""
    sets = num_subsets(model.config.block_size)
    copies = min(sets, COPIES)
    groups = _row_groups(len(clean_BL), clean_BL.shape[1] * (copies + 1))
    done, nelbo, nll = 0, [], []

    def advance(finished: int) -> None:
        nonlocal done
        done += finished
        if progress is not None:
            progress(done, sets * len(groups))

    for rows in groups:
        blocks = exact_blocks(
            model,
            clean_BL[rows].to(model.device),
            free_BL[rows].to(model.device),
            _maybe(valid_BL[rows].to(model.device)),
            advance,
        )
        nelbo.append(blocks.nelbo_BK.sum(1).cpu())
        nll.append(blocks.nll_BK.sum(1).cpu())
    return torch.cat(nelbo)[:, None], torch.cat(nll)


@torch.no_grad()
def _draw(
    model, clean_BL, free_BL, valid_BL, samples, schedule, t_min, generator, progress
) -> torch.Tensor:
    """NELBO estimates (B, samples): every replicate has its own masks, stratified over rows."""
    config = model.config
    copies = min(samples, COPIES)
    groups = _row_groups(len(clean_BL), clean_BL.shape[1] * (copies + 1))
    estimate_BR = torch.zeros(len(clean_BL), samples, dtype=torch.float64)
    done = 0
    for rows in groups:
        clean, free, valid = (x[rows].to(model.device) for x in (clean_BL, free_BL, valid_BL))
        for first in range(0, samples, copies):
            drawn = [
                bernoulli(
                    clean, free, config.block_size, config.mask_id, schedule, generator, t_min=t_min
                )
                for _ in range(first, min(first + copies, samples))
            ]
            noisy_BNL = torch.cat([c.noisy_BNL for c in drawn], dim=1)
            weight_BNL = torch.cat([c.weight_BNL for c in drawn], dim=1)
            nll_BNL = masked_nll(model, noisy_BNL, clean, _maybe(valid))
            total_BN = (nll_BNL.double() * weight_BNL.double()).sum(-1)
            estimate_BR[rows, first : first + len(drawn)] = total_BN.cpu()
            done += len(clean) * len(drawn)
            if progress is not None:
                progress(done, len(clean_BL) * samples)
    return estimate_BR


def _maybe(valid_BL: torch.Tensor) -> torch.Tensor | None:
    return None if bool(valid_BL.all()) else valid_BL


# --- errors and units ------------------------------------------------------------------------


def _noise_error(nelbo_BR: torch.Tensor, num_tokens: int) -> float | None:
    replicate_R = nelbo_BR.sum(0) / num_tokens
    if len(replicate_R) < 2:
        return None
    return float(replicate_R.std() / math.sqrt(len(replicate_R)))


def _data_error(row_B: torch.Tensor, tokens_B: torch.Tensor) -> float | None:
    """Standard error of the ratio sum(nats) / sum(tokens) over independent rows."""
    used = tokens_B > 0
    row_B, tokens_B = row_B[used], tokens_B[used].double().cpu()
    count = len(row_B)
    if count < 2:
        return None
    residual_B = row_B - row_B.sum() / tokens_B.sum() * tokens_B
    return float((residual_B.square().sum() * count / (count - 1)).sqrt() / tokens_B.sum())


def _bits_per_byte(nats: float, num_tokens: int, num_bytes: float | None) -> float | None:
    return None if not num_bytes else nats * num_tokens / num_bytes / math.log(2)


# --- input -----------------------------------------------------------------------------------


def _are_texts(ids: Any) -> TypeGuard[Sequence[str]]:
    if isinstance(ids, str):
        raise UserError("ids is a single text; give a list of texts")
    return not isinstance(ids, torch.Tensor) and len(ids) > 0 and isinstance(ids[0], str)


def _tokenize(model: Denoiser, texts: Sequence[str], bos: bool) -> list[list[int]]:
    if model.tokenizer is None:
        raise UserError("this model's directory has no tokenizer; give token ids")
    rows = [model.tokenizer.encode(text, add_special_tokens=False) for text in texts]
    if not bos:
        return rows
    first = bos_id(model)
    return [[first, *row] for row in rows]


def _rectangle(
    ids: torch.Tensor | Sequence[Sequence[int]], valid: torch.Tensor | None, block_size: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """ids and validity as (B, L) with L a multiple of the block size."""
    if isinstance(ids, torch.Tensor):
        if ids.ndim != 2 or ids.numel() == 0:
            raise UserError(f"ids have shape {tuple(ids.shape)}; (rows, tokens) is needed")
        clean = ids.long().cpu()
        valid = torch.ones_like(clean, dtype=torch.bool) if valid is None else valid.bool().cpu()
        if valid.shape != clean.shape:
            raise UserError(f"valid has shape {tuple(valid.shape)}, ids {tuple(clean.shape)}")
    else:
        if not len(ids) or not all(len(row) for row in ids):
            raise UserError("there is an empty row or no row at all; every row needs a token")
        if valid is not None:
            raise UserError("valid goes with a tensor of ids; lists are padded by themselves")
        longest = max(len(row) for row in ids)
        clean = torch.zeros(len(ids), longest, dtype=torch.long)
        valid = torch.zeros(len(ids), longest, dtype=torch.bool)
        for index, row in enumerate(ids):
            clean[index, : len(row)] = torch.as_tensor(row)
            valid[index, : len(row)] = True
    missing = -clean.shape[1] % block_size
    pad = (0, missing)
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
