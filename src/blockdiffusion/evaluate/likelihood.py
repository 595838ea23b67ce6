"""Likelihood of text under a model, with its two standard errors.

A diffusion likelihood is a bound (NELBO). It is estimated by drawing noise with any unbiased
estimator of the network's objective (see `objectives`), or, for masks, enumerated (`exact`, blocks
of up to 8 tokens), which also gives the exact log-likelihood; `orders` gives a tighter bound for
blocks of any length. The *noise* error says how far the estimate may lie from the value on these
data, the *data* error how far that may lie from the value on all text of the kind.
"""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TypeGuard, cast

import torch

from blockdiffusion.diffusion.denoiser import (
    Denoiser,
    NextTokenModel,
    bos_id,
    causal_nll,
    is_autoregressive,
    row_groups,
)
from blockdiffusion.diffusion.estimators import T_MIN, Bernoulli, Estimator, all_copies
from blockdiffusion.diffusion.exact import enumeration_is_cheap, exact_blocks, num_subsets
from blockdiffusion.diffusion.objectives import diffusion_of
from blockdiffusion.diffusion.orders import draw_orders, order_bound, order_nll
from blockdiffusion.errors import UserError
from blockdiffusion.evaluate.journal import Journal, fingerprint
from blockdiffusion.limits import check_limit
from blockdiffusion.runtime.distributed import ALONE, Team
from blockdiffusion.runtime.seeding import generator as seeded_generator
from blockdiffusion.sampling.requests import as_ids
from blockdiffusion.text import encode_text

MOST_NATS = 700.0  # a token; exp of more is no number
PASS_TOKENS = 16_384  # tokens of one pass over all streams: bounds memory
COPIES = 8  # noisy copies that share one clean stream
MAX_SAMPLES = 4096  # replicates after which a target of the noise error is given up
USUAL_SAMPLES = 8
CUT = "mask probabilities below {:g} left out"  # by `t_min`
TRUSTED = 30  # degrees of freedom from which a noise error may end the drawing
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
    estimator: str = "auto",
    samples: int = USUAL_SAMPLES,
    *,
    orders: int = 8,
    target_stderr: float | None = None,
    bos: bool | None = None,
    valid: torch.Tensor | None = None,
    given: torch.Tensor | None = None,
    generator: torch.Generator | None = None,
    t_min: float = T_MIN,
    num_bytes: float | None = None,
    progress: Progress | None = None,
    team: Team = ALONE,
    journal: Path | None = None,
) -> Likelihood:
    """Nats per token, perplexity and bits per byte of `ids`, with error bars.

    Args:
        model: from `blockdiffusion.load`, or any `Denoiser`; evaluated in its own precision.
        ids: token ids (B, L), or a list of id lists, or a list of texts (needs a tokenizer). Rows
            that do not fill their last block are padded; padding is not seen and not counted.
        estimator: "exact" (enumerates; S <= 8), "orders" (the K-order bound), or a law of masks as
            `estimators.make_estimator` reads it, not clipped: "count", "complement", "bernoulli",
            "bernoulli:cosine", ... "auto" is "exact" where that takes no more noisy copies than
            `samples` complement pairs (with the usual 8 up to S = 4), and else the unbiased one
            with the least noise: complement pairs; "timesteps" for D3PM, which has no other.
            "exact" and "orders" need masks and a network without time input. The likelihood of an
            autoregressive model is exact, in one pass; it allows "exact" and "auto" only.
        samples: independent replicates of the masks; the noise error needs two.
        orders: K of the bound of "orders"; every replicate draws so many orders of each block.
        target_stderr: go on until the noise error (of the tighter bound, for "orders") is at most
            this and well known, `samples` replicates at a time, or 4,096 replicates are made; the
            result's `remarks` say so. "exact" has no noise and draws nothing.
        bos: whether position 0 of each row is given and not counted; None = what the model's
            configuration says, and no BOS where it says nothing. Texts get the BOS put before them.
        valid: bool (B, L), False at padding; None = all valid.
        given: bool (B, L), True at tokens that are read as they are, never masked and not counted,
            besides a BOS: the context of what is scored, see `evaluate.windows`.
        generator: source of the masks; a fixed seed by default.
        t_min: mask probabilities below are left out by "bernoulli" (relative bias below 0.1 %).
        num_bytes: UTF-8 bytes of the counted text, for bits per byte; known for texts.
        progress: called with (done, total) units of work.
        team: processes that call this alike and share the rows, group by group. All of them draw
            all masks, and return what one process would.
        journal: file that keeps finished groups of rows, so that the same call goes on after a
            kill, in a team of any size, to the same result but for `seconds`. The caller removes
            it.

    Raises:
        UserError: for ids outside the vocabulary, a clipped schedule, blocks too long to
            enumerate, an estimator that the network does not allow, or nothing to score.
    """
    start = time.perf_counter()
    config = model.config
    for name, value in (
        ("samples", samples), ("orders", orders), ("target_stderr", target_stderr),
    ):  # fmt: skip
        check_limit(name, value)
    estimator, law, note = choose_estimator(estimator, config, samples, t_min)
    if target_stderr is not None and not target_stderr > 0:
        raise UserError(f"target_stderr is {target_stderr}; it must be above 0")
    given_bos = bool(config.bos) if bos is None else bos
    if _are_texts(ids):
        rows = _tokenize(model, ids, given_bos)
        if num_bytes is None:
            num_bytes = sum(len(text.encode()) for text in ids)
    else:
        rows = cast("torch.Tensor | Sequence[Sequence[int]]", ids)
    clean_BL, valid_BL = _rectangle(rows, valid, config.block_size)
    _check_ids(clean_BL, valid_BL, config)
    free_BL = valid_BL.clone()
    if given_bos:
        free_BL[:, 0] = False
    if given is not None:
        free_BL &= ~_like(given, ids, free_BL)
    num_tokens = int(free_BL.sum())
    if num_tokens == 0:
        raise UserError("there is nothing to score: every token is given or padding")

    kept = _Kept(None)
    if journal is not None:
        tensors = (clean_BL, free_BL, valid_BL)
        kept = _Kept(Journal(journal, fingerprint(model, *tensors, estimator, orders, t_min)))
    if is_autoregressive(model):
        found = _next_token(model, clean_BL, free_BL, valid_BL, progress, team, kept)
    elif estimator == "exact":
        found = _enumerate(model, clean_BL, free_BL, valid_BL, progress, team, kept)
    else:
        draw = _Replicates(
            model=model,
            law=law,
            orders=orders,
            clean_BL=clean_BL,
            free_BL=free_BL,
            valid_BL=valid_BL,
            generator=generator if generator is not None else seeded_generator(0, "likelihood"),
            team=team,
            kept=kept,
        )
        found = _draw_until(draw, samples, num_tokens, target_stderr, progress)
    row_B = found.nelbo_BR.mean(1)
    is_exact = _is_exact(config, law)
    if is_exact:  # what is no bound
        found.exact_B = row_B
    nats = float(row_B.sum()) / num_tokens
    exact = None if found.exact_B is None else float(found.exact_B.sum()) / num_tokens
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
        bits_per_byte=_bits_per_byte(nats, num_tokens, num_bytes),
        exact_bits_per_byte=None if exact is None else _bits_per_byte(exact, num_tokens, num_bytes),
        nats_per_row=row_B,
        exact_nats_per_row=found.exact_B,
        orders_nats_per_token=bounds.get(orders),
        order_bounds=bounds or None,
        num_tokens=num_tokens,
        num_rows=len(row_B),
        stderr_noise=0.0 if estimator == "exact" else found.noise_error(num_tokens),
        stderr_data=data_error(row_B, free_BL.sum(1)),
        exact_stderr_data=(
            None if found.exact_B is None else data_error(found.exact_B, free_BL.sum(1))
        ),
        orders_stderr_noise=noises.get(orders),
        order_bounds_stderr_noise={k: e for k, e in noises.items() if e is not None} or None,
        target_stderr=target_stderr,
        estimator=estimator,
        samples=found.nelbo_BR.shape[1],
        copies=found.copies,
        bos=given_bos,
        is_bound=not is_exact,
        block_size=config.block_size,
        t_min=t_min if isinstance(law, Bernoulli) else None,
        note=note,
        seconds=time.perf_counter() - start,
    )


def choose_estimator(
    name: str, config: Any, samples: int = USUAL_SAMPLES, t_min: float = T_MIN
) -> tuple[str, Estimator | None, str | None]:
    """What "auto" stands for, the law of masks (None where there is none to draw from), and a note
    where it is another one than was asked for.

    Args:
        config: of the network.
        samples: what "auto" may cost, in complement pairs.

    Raises:
        UserError: the estimator is unknown, clipped, or not one that the network allows.
    """
    if config.objective == "autoregressive":
        if name not in ("auto", "exact"):
            raise UserError(
                f"estimator is {name}, but the likelihood of an autoregressive model is exact in "
                "one pass; use exact or auto"
            )
        return "exact", None, None
    diffusion = diffusion_of(config)
    if name == "auto":
        exact = diffusion.enumerable and enumeration_is_cheap(config.block_size, samples)
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
        law, note = diffusion.estimator(name, t_min)
    except UserError as error:
        also = "auto, exact or orders" if diffusion.enumerable else "auto"
        raise UserError(f"{error}; a likelihood can also be {also}") from None
    if not law.is_bound:
        raise UserError(
            f"{law.name} is clipped: it does not bound the likelihood and gives no "
            "perplexity; evaluate with an unclipped estimator"
        )
    return name, law, note


def _is_exact(config: Any, law: Estimator | None) -> bool:
    """Whether what bounds longer blocks is the likelihood itself: a block has one mask set only,
    which is always drawn."""
    if config.block_size > 1 or isinstance(law, Bernoulli):
        return False
    return config.objective == "autoregressive" or diffusion_of(config).enumerable


# --- enumeration and replicates --------------------------------------------------------------


@dataclass
class _Found:
    """Estimates per row and replicate (B, R), in nats; `orders` has one such for every K.

    Rows of one group share their draws, groups are independent: the noise of the whole is the sum
    of the groups'.
    """

    nelbo_BR: torch.Tensor
    groups: list[slice]
    copies: int
    exact_B: torch.Tensor | None = None
    orders: dict[int, torch.Tensor] = field(default_factory=dict)

    def noise_error(self, num_tokens: int, orders: int | None = None) -> float | None:
        """Standard error per token of the mean over replicates; None from a single one."""
        value_BR = self.nelbo_BR if orders is None else self.orders[orders]
        replicates = value_BR.shape[1]
        if replicates < 2:
            return None
        variance = sum(float(value_BR[rows].sum(0).var()) for rows in self.groups)
        return math.sqrt(variance / replicates) / num_tokens

    @property
    def degrees_of_freedom(self) -> int:
        """Of the noise error: how far it can be trusted."""
        return len(self.groups) * (self.nelbo_BR.shape[1] - 1)

    def extended(self, more: _Found) -> _Found:
        """With further replicates of the same rows."""
        orders = {k: torch.cat([v, more.orders[k]], dim=1) for k, v in self.orders.items()}
        return _Found(
            torch.cat([self.nelbo_BR, more.nelbo_BR], dim=1),
            self.groups,
            self.copies + more.copies,
            orders=orders,
        )


@dataclass(frozen=True)
class _Kept:
    """Finished groups of rows, in a journal where one is asked for: float64 tensors by name."""

    journal: Journal | None

    def get(self, name: str) -> list[torch.Tensor] | None:
        found = None if self.journal is None else self.journal.get(name)
        if found is None:
            return None
        return [torch.tensor(values, dtype=torch.float64) for values in found]

    def put(self, name: str, *tensors: torch.Tensor) -> None:
        if self.journal is not None:
            self.journal.put(name, [tensor.tolist() for tensor in tensors])


@torch.no_grad()
def _next_token(
    model: NextTokenModel,
    clean_BL,
    free_BL,
    valid_BL,
    progress: Progress | None,
    team: Team,
    kept: _Kept,
) -> _Found:
    """The exact negative log-likelihood of an autoregressive model."""
    groups = row_groups(len(clean_BL), clean_BL.shape[1], PASS_TOKENS)
    nll = {}
    for index, rows in enumerate(groups):
        if not team.has(index):
            pass
        elif (before := kept.get(str(rows))) is not None:
            (nll[index],) = before
        else:
            clean, free, valid = (x[rows].to(model.device) for x in (clean_BL, free_BL, valid_BL))
            nll[index] = causal_nll(model, clean, free, _maybe(valid)).double().sum(1).cpu()
            kept.put(str(rows), nll[index])
        if progress is not None:
            progress(index + 1, len(groups))
    nll_B = torch.cat(team.collect(nll))
    return _Found(nll_B[:, None], groups, copies=1, exact_B=nll_B)


def _enumerate(
    model, clean_BL, free_BL, valid_BL, progress: Progress | None, team: Team, kept: _Kept
) -> _Found:
    """The bound (one replicate without noise) and the exact negative log-likelihood."""
    sets = num_subsets(model.config.block_size)
    copies = min(sets, COPIES)
    groups = row_groups(len(clean_BL), clean_BL.shape[1] * (copies + 1), PASS_TOKENS)
    done, nelbo, nll = 0, {}, {}

    def advance(finished: int) -> None:
        nonlocal done
        done += finished
        if progress is not None:
            progress(done, sets * len(groups))

    for index, rows in enumerate(groups):
        before = kept.get(str(rows)) if team.has(index) else None
        if before is not None:
            nelbo[index], nll[index] = before
        if before is not None or not team.has(index):
            advance(sets)
            continue
        blocks = exact_blocks(
            model,
            clean_BL[rows].to(model.device),
            free_BL[rows].to(model.device),
            _maybe(valid_BL[rows].to(model.device)),
            advance,
        )
        nelbo[index] = blocks.nelbo_BK.sum(1).cpu()
        nll[index] = blocks.nll_BK.sum(1).cpu()
        kept.put(str(rows), nelbo[index], nll[index])
    nelbo_B, nll_B = torch.cat(team.collect(nelbo)), torch.cat(team.collect(nll))
    return _Found(nelbo_B[:, None], groups, sets, exact_B=nll_B)


@dataclass(frozen=True, kw_only=True)
class _Replicates:
    """What `_draw` needs to draw any number of independent replicates."""

    model: Denoiser
    law: Estimator | None
    """None: the K-order bound."""
    orders: int
    clean_BL: torch.Tensor
    free_BL: torch.Tensor
    valid_BL: torch.Tensor
    generator: torch.Generator
    team: Team
    kept: _Kept

    @property
    def copies(self) -> int:
        """Noisy copies of a row that one replicate evaluates."""
        per_order = self.model.config.block_size
        return self.orders * per_order if self.law is None else self.law.num_noisy

    def draw(self, samples: int, advance: Callable[[int], None]) -> _Found:
        """`samples` replicates; `advance` is told how many noisy copies of rows are done."""
        num_rows, length = self.clean_BL.shape
        shared = min(samples * self.copies, COPIES)
        groups = row_groups(num_rows, length * (shared + 1), PASS_TOKENS)
        own = {}
        for index, rows in enumerate(groups):
            device = self.model.device
            clean = self.clean_BL[rows].to(device)
            free, valid = self.free_BL[rows].to(device), self.valid_BL[rows].to(device)
            done_rows = len(clean)

            def passed(copies: int, done_rows: int = done_rows) -> None:
                advance(copies * done_rows)

            name = f"{rows} {samples} {_digest(self.generator)}"
            before = self.kept.get(name) if self.team.has(index) else None
            if before is not None:
                powers = [] if self.law is not None else _powers(self.orders)
                own[index] = before[0], dict(zip(powers, before[1:], strict=True))
            if before is not None or not self.team.has(index):
                self._pass_over(clean, free, samples)
                passed(samples * self.copies)
                continue
            if self.law is None:
                own[index] = self._ordered(clean, free, valid, samples, passed)
            else:
                own[index] = self._masked(clean, free, valid, samples, passed), {}
            self.kept.put(name, own[index][0], *own[index][1].values())
        nelbo, tighter = zip(*self.team.collect(own), strict=True)
        return _Found(
            torch.cat(nelbo),
            groups,
            samples * self.copies,
            orders={k: torch.cat([values[k] for values in tighter]) for k in tighter[0]},
        )

    def _pass_over(self, clean_BL, free_BL, samples: int) -> None:
        """Draws what is not used: the noise of a group of rows that another process evaluates, or
        that was evaluated before."""
        config = self.model.config
        if self.law is None:
            draw_orders(free_BL, config.block_size, samples * self.orders, self.generator)
            return
        for _ in range(samples):
            self.law(clean_BL, free_BL, config.block_size, config.mask_id, self.generator)

    def _ordered(
        self, clean_BL, free_BL, valid_BL, samples: int, passed
    ) -> tuple[torch.Tensor, dict[int, torch.Tensor]]:
        """The NELBO (B, samples) of a group of rows, and the bounds of k = 1, 2, 4, ... orders."""
        nll_BRK = order_nll(
            self.model,
            clean_BL,
            free_BL,
            samples * self.orders,
            self.generator,
            _maybe(valid_BL),
            copies=COPIES,
            progress=passed,
        ).cpu()
        bounds = {k: self._tighter(nll_BRK, k) for k in _powers(self.orders)}
        return bounds[1], bounds

    def _tighter(self, nll_BRK: torch.Tensor, k: int) -> torch.Tensor:
        """The k-order bound (B, samples): the mean over the whole groups of k of a replicate."""
        usable = self.orders // k * k
        nll_BXK = nll_BRK.unflatten(1, (-1, self.orders))[:, :, :usable].flatten(1, 2)
        return order_bound(nll_BXK, k).unflatten(1, (-1, usable // k)).mean(-1)

    def _masked(self, clean_BL, free_BL, valid_BL, samples: int, passed) -> torch.Tensor:
        """NELBO estimates (B, samples) of a group of rows."""
        assert self.law is not None
        config, diffusion = self.model.config, diffusion_of(self.model.config)
        prior_B1 = diffusion.prior_nats * free_BL.sum(1, keepdim=True).double().cpu()
        together = max(1, COPIES // self.law.num_noisy)
        estimates = []
        for first in range(0, samples, together):
            drawn = [
                self.law(clean_BL, free_BL, config.block_size, config.mask_id, self.generator)
                for _ in range(first, min(first + together, samples))
            ]
            every = all_copies(drawn)
            term_BNL = diffusion.terms(self.model, every, clean_BL, _maybe(valid_BL))
            total_BN = (term_BNL.double() * every.weight_BNL.double()).sum(-1).cpu()
            estimates.append(total_BN.unflatten(1, (len(drawn), -1)).mean(-1) + prior_B1)
            passed(every.noisy_BNL.shape[1])
        return torch.cat(estimates, dim=1)


@torch.no_grad()
def _draw_until(
    replicates: _Replicates,
    samples: int,
    num_tokens: int,
    target_stderr: float | None,
    progress: Progress | None,
) -> _Found:
    """`samples` replicates, or as many times that as the target of the noise error asks for."""
    samples = max(samples, 2) if target_stderr is not None else samples
    total = done = samples * replicates.copies * len(replicates.clean_BL)
    done = 0

    def advance(finished: int) -> None:
        nonlocal done
        done += finished
        if progress is not None:
            progress(done, max(done, total))

    orders = replicates.orders if replicates.law is None else None
    found = replicates.draw(samples, advance)
    while target_stderr is not None:
        error = found.noise_error(num_tokens, orders)
        assert error is not None  # two replicates at least
        if error <= target_stderr and found.degrees_of_freedom >= TRUSTED:
            break
        made = found.nelbo_BR.shape[1]
        if made >= MAX_SAMPLES:
            break
        still = samples * -(-(MAX_SAMPLES - made) // samples)  # whole rounds, at most
        total = int(done * min(max(2, (error / target_stderr) ** 2), 1 + still / made))
        found = found.extended(replicates.draw(samples, advance))
    return found


def _digest(generator: torch.Generator) -> str:
    """Of what will be drawn next."""
    return hashlib.sha256(generator.get_state().numpy().tobytes()).hexdigest()[:16]


def _powers(orders: int) -> list[int]:
    """1, 2, 4, ... and `orders` itself."""
    powers = [2**i for i in range(orders.bit_length()) if 2**i <= orders]
    return sorted({*powers, orders} - {0})


def _maybe(valid_BL: torch.Tensor) -> torch.Tensor | None:
    return None if bool(valid_BL.all()) else valid_BL


# --- errors and units ------------------------------------------------------------------------


def data_error(row_B: torch.Tensor, tokens_B: torch.Tensor) -> float | None:
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
    if isinstance(ids, torch.Tensor) or not any(isinstance(row, str) for row in ids):
        return False
    if not all(isinstance(row, str) for row in ids):
        raise UserError("ids holds texts and other things; give a list of texts, or of id lists")
    return True


def _tokenize(model: Denoiser, texts: Sequence[str], bos: bool) -> list[list[int]]:
    rows = [encode_text(model.tokenizer, text) for text in texts]
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
        if ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool:
            raise UserError(f"ids are of the type {ids.dtype}; token ids are whole numbers")
        clean = ids.long().cpu()
        valid = torch.ones_like(clean, dtype=torch.bool) if valid is None else valid.bool().cpu()
        if valid.shape != clean.shape:
            raise UserError(f"valid has shape {tuple(valid.shape)}, ids {tuple(clean.shape)}")
    else:
        if valid is not None:
            raise UserError("valid goes with a tensor of ids; lists are padded by themselves")
        rows = [torch.tensor(as_ids(row, "a row")) for row in ids]
        if not rows or not all(map(len, rows)):
            raise UserError("there is an empty row or no row at all; every row needs a token")
        longest = max(len(row) for row in rows)
        clean = torch.zeros(len(rows), longest, dtype=torch.long)
        valid = torch.zeros(len(rows), longest, dtype=torch.bool)
        for index, row in enumerate(rows):
            clean[index, : len(row)] = row
            valid[index, : len(row)] = True
    clean = clean.masked_fill(~valid, 0)  # the network must not read what padding holds
    missing = -clean.shape[1] % block_size
    pad = (0, missing)
    return torch.nn.functional.pad(clean, pad), torch.nn.functional.pad(valid, pad)


def _like(given: torch.Tensor, ids: Any, free_BL: torch.Tensor) -> torch.Tensor:
    """`given`, padded as the ids were."""
    if not isinstance(ids, torch.Tensor) or given.shape != ids.shape:
        raise UserError("given goes with a tensor of ids and has its shape")
    return torch.nn.functional.pad(given.bool().cpu(), (0, free_BL.shape[1] - given.shape[1]))


def _check_ids(clean_BL: torch.Tensor, valid_BL: torch.Tensor, config: Any) -> None:
    used = clean_BL[valid_BL]
    if len(used) and (used.min() < 0 or used.max() >= config.vocab_size):
        raise UserError(
            f"ids run from {used.min()} to {used.max()}, but the vocabulary is "
            f"0..{config.vocab_size - 1}; was another tokenizer used?"
        )
    if (used == config.mask_id).any():
        raise UserError(f"ids contain the mask token {config.mask_id}, which is no text")
