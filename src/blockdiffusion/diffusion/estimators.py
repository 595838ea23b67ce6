"""The estimators of the training loss and of the NELBO: which tokens to mask, with what weight.

An `Estimator` draws N noisy copies of every row, with a weight for each masked token, such that
sum(weight * nll) over a row, divided by N, estimates the row's NELBO in nats:

* `Bernoulli`, the paper's: a time t per block, each token masked with probability p(t), weight
  w(t); optionally with the authors' resampling of the share of masked tokens,
* `Count`: the number k of masked tokens instead of t. It is Bernoulli with t integrated out (a
  Rao-Blackwell step, exact for networks without time input): no 1/t tail, no empty blocks,
* `Complement`: pairs of copies, the second masking what the first kept,
* `Timesteps`, D3PM's: a time on the grid 1..T per block, with masks or with uniform tokens.

Corruption is drawn for a whole global batch at once, from one generator on the CPU, and sliced
afterwards. So the masks depend on the generator's seed and a row's index in the global batch alone,
not on micro-batches, the number of processes or the device. The draws are stratified over that
batch: spread evenly, while every single one keeps its marginal distribution.

Shape suffixes: B rows, N noisy copies, L tokens, K blocks, S tokens of a block.
"""

from __future__ import annotations

import math
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from functools import lru_cache
from typing import Literal, get_args

import torch

from blockdiffusion.diffusion.schedules import Linear, Schedule, make_schedule, prob_range
from blockdiffusion.errors import UserError, shown
from blockdiffusion.limits import check_limit

LINEAR = Linear()
T_MIN = 1e-3  # where the authors cut t (their sampling_eps_min)
EstimatorName = Literal["bernoulli", "resampled", "count", "complement"]
Transition = Literal["absorbing", "uniform"]
Stratify = Literal["none", "batch", "row"]
Draw = tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]


@dataclass(frozen=True)
class Corrupted:
    """N noisy copies of every row, with the loss weight of each token.

    sum(weight * term) over a row, divided by N, estimates the row's NELBO in nats.

    Attributes:
        noisy_BNL: ids.
        weight_BNL: loss weight, 0 at positions that are not scored.
        scored_BNL: bool, the positions that have a loss term: those that the draw masked or, with
            uniform noise, could have changed. Ids do not show it: padding may hold the mask token.
        prob_BNK: the probability p(t) with which every block's tokens were corrupted, which a
            time-conditioned network reads (as sigma); None if t is integrated out.
        before_BNK: the same one step earlier in time (closer to the text), if time is discrete.
            Both are float64, on the CPU.
    """

    noisy_BNL: torch.Tensor
    weight_BNL: torch.Tensor
    scored_BNL: torch.Tensor
    prob_BNK: torch.Tensor | None = None
    before_BNK: torch.Tensor | None = None

    def rows(self, start: int, stop: int) -> Corrupted:
        """Return the rows [start, stop) of the batch."""
        return _field_by_field([self], lambda parts: parts[0][start:stop])

    def with_clean_stream(self, weight_BL: torch.Tensor) -> Corrupted:
        """Return it with the clean stream as a copy more, scored where its weight is positive."""
        return replace(
            self,
            weight_BNL=torch.cat([self.weight_BNL, weight_BL[:, None]], 1),
            scored_BNL=torch.cat([self.scored_BNL, weight_BL[:, None] > 0], 1),
        )

    def to(self, device: torch.device) -> Corrupted:
        """Return it with everything except the probabilities on a device."""
        return replace(
            self,
            noisy_BNL=self.noisy_BNL.to(device),
            weight_BNL=self.weight_BNL.to(device),
            scored_BNL=self.scored_BNL.to(device),
        )


def all_copies(drawn: Sequence[Corrupted]) -> Corrupted:
    """Return the noisy copies of several draws of one estimator, for the same rows, as one."""
    return _field_by_field(drawn, lambda parts: torch.cat(parts, dim=1))


def _field_by_field(
    drawn: Sequence[Corrupted], make: Callable[[list[torch.Tensor]], torch.Tensor]
) -> Corrupted:
    columns = ([getattr(one, item.name) for one in drawn] for item in fields(Corrupted))
    return Corrupted(*(None if parts[0] is None else make(parts) for parts in columns))  # type: ignore


# --- the estimators --------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Estimator(ABC):
    """A distribution of masks and weights.

    Attributes:
        schedule: of the mask probabilities.
        num_noisy: N, noisy copies of every row that share one clean stream.
        stratify: see `stratified_uniform`.
    """

    schedule: Schedule = LINEAR
    num_noisy: int = 1
    stratify: Stratify = "row"

    def __post_init__(self) -> None:
        check_limit("num_noisy", self.num_noisy)

    @property
    @abstractmethod
    def name(self) -> str:
        """The name that `make_estimator` reads."""

    @property
    def is_bound(self) -> bool:
        """Whether its expectation bounds the negative log-likelihood (not when clipped)."""
        return self.schedule.is_bound

    def __call__(
        self,
        clean_BL: torch.Tensor,
        free_BL: torch.Tensor,
        block_size: int,
        mask_id: int,
        generator: torch.Generator,
    ) -> Corrupted:
        """Mask free tokens of `clean_BL`.

        Args:
            clean_BL: token ids (B, L); L is a multiple of `block_size`.
            free_BL: bool (B, L), the tokens that may be masked and are scored. Given tokens (BOS,
                a prompt) and padding are not free.

        Returns:
            `Corrupted`, on the device of `clean_BL`; weights are float32.
        """
        masked_BNL, weight_BNK, prob_BNK = self._draw(free_BL.cpu(), block_size, generator)
        return _corrupted(clean_BL, masked_BNL, weight_BNK, mask_id, prob_BNK)

    def _draw(self, free_BL: torch.Tensor, block_size: int, generator: torch.Generator) -> Draw:
        """Masks (B, N, L), weights per block (B, N, K), and the mask probabilities (B, N, K) or
        None, on the CPU."""
        raise NotImplementedError

    def _full_name(self, kind: str, usual_copies: int = 1) -> str:
        base = f":{self.schedule.name}".removeprefix(":linear")
        copies = "" if self.num_noisy == usual_copies else f"x{self.num_noisy}"
        return f"{kind}{base}{copies}"


@dataclass(frozen=True, kw_only=True)
class Bernoulli(Estimator):
    """The paper's corruption: one t per block, every free token masked with probability p(t).

    Attributes:
        t_min: smaller mask probabilities are left out of the expectation, which then is too low by
            a share of at most t_min; below the largest one of the schedule. (Times begin where p(t)
            = t_min, for the linear schedule at t_min, and weights are scaled by the share of the
            times that is left.) Uncut, 1/t has infinite variance. The authors cut at 1e-3, without
            the scale.
        resample: redraw the masks of a block at its t until the share of masked tokens lies in the
            clip, as the authors' option does; it needs a clipped schedule and changes the
            distribution.
    """

    t_min: float = T_MIN
    resample: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.resample and self.schedule.is_bound:
            raise UserError(
                "estimator resampled keeps the share of masked tokens inside a clip, but none is "
                "given; give one, or take bernoulli"
            )
        omega = round(prob_range(self.schedule)[1], 9)
        if self.t_min >= omega:
            raise UserError(
                f"t_min is {self.t_min:g}, but the mask probabilities of {self.name} end at "
                f"{omega:g}, so that none is left to draw; give a smaller t_min ({T_MIN:g} is "
                "usual)"
            )

    @property
    def name(self) -> str:
        return self._full_name("resampled" if self.resample else "bernoulli")

    def _draw(self, free_BL: torch.Tensor, block_size: int, generator: torch.Generator) -> Draw:
        batch, length = free_BL.shape
        shape = (batch, self.num_noisy, length // block_size)
        uniform_BNK = stratified_uniform(shape, generator, self.stratify)
        low, high = self.schedule.t_range
        cut = float(self.schedule.inverse(torch.tensor(self.t_min, dtype=torch.float64)))
        start = min(max(low, cut), high)
        share = (high - start) / (high - low) if high > low else 1.0  # of the range of t
        t_BNK = start + (high - start) * uniform_BNK
        prob_BNK = self.schedule.mask_prob(t_BNK)
        if self.resample:
            count_BNK = self._resampled_count(prob_BNK, free_BL, block_size, generator)
            masked_BNL = _random_subsets(count_BNK, free_BL, generator)
        else:
            masked_BNL = _coins(prob_BNK, free_BL, generator)
        return masked_BNL, share * self.schedule.loss_weight(t_BNK), prob_BNK

    def _resampled_count(
        self,
        prob_BNK: torch.Tensor,
        free_BL: torch.Tensor,
        block_size: int,
        generator: torch.Generator,
    ) -> torch.Tensor:
        """Masked tokens per block: binomial, given that the share lies in the clip.

        The authors draw again until it does; this draws from the same distribution at once. A block
        with given tokens in which no share fits takes the nearest.
        """
        beta, omega = prob_range(self.schedule)
        free_BK = free_BL.unflatten(1, (-1, block_size)).sum(-1)
        allowed_BKC = _allowed_counts(block_size, beta, omega)[free_BK].double()  # C: counts 0..S
        mass_BNKC = _binomial_probs(free_BK, prob_BNK, block_size) * allowed_BKC[:, None]
        impossible = mass_BNKC.sum(-1, keepdim=True) == 0
        mass_BNKC = torch.where(impossible, allowed_BKC[:, None], mass_BNKC)
        drawn = torch.multinomial(mass_BNKC.flatten(0, -2), 1, generator=generator)
        return drawn.view(prob_BNK.shape)


@dataclass(frozen=True, kw_only=True)
class Count(Estimator):
    """The number of masked tokens is drawn, t is integrated out: unbiased, with less variance.

    Of the n free tokens of a block k are masked, a uniform subset. Without a clip k is uniform on
    1..n with weight n/k, whatever the schedule: all have the same NELBO. A clip [beta, omega] gives
    the clipped objective of `Bernoulli` the same way: k has probability c_k / c and weight c / k,
    where c_k is in proportion to P(Bin(n, omega) >= k) - P(Bin(n, beta) >= k), and c their sum.

    With `timed`, for a network that reads t, the mask probability is drawn after k, from its
    distribution given k: Beta(k, n - k + 1). The pair of both then has the distribution that the
    weight w(t) makes of `Bernoulli`'s, and weight n/k.
    """

    timed: bool = False

    @property
    def name(self) -> str:
        return self._full_name("count")

    def _draw(self, free_BL: torch.Tensor, block_size: int, generator: torch.Generator) -> Draw:
        count_BNK, weight_BNK = self.draw_counts(free_BL, block_size, generator)
        masked_BNL = _random_subsets(count_BNK, free_BL, generator)
        prob_BNK = _prob_of_count(count_BNK, free_BL, generator) if self.timed else None
        return masked_BNL, weight_BNK, prob_BNK

    def draw_counts(
        self, free_BL: torch.Tensor, block_size: int, generator: torch.Generator
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the masked tokens per block (B, N, K), 0 if none is free, and their weight."""
        free_BK = free_BL.unflatten(1, (-1, block_size)).sum(-1)
        shape = (len(free_BK), self.num_noisy, free_BK.shape[1])
        uniform_BNK = stratified_uniform(shape, generator, self.stratify)
        weights = count_weights(self.schedule, block_size)[free_BK][:, None]  # (B, 1, K, S)
        total_BNK = weights.sum(-1)
        below = weights.cumsum(-1) / total_BNK[..., None].clamp_min(1e-300)
        # k is 1 + the number of cumulative probabilities that lie below u in (0, 1].
        count_BNK = 1 + (uniform_BNK[..., None] > below[..., :-1]).sum(-1)
        count_BNK = torch.minimum(count_BNK, free_BK[:, None])  # 0 if nothing is free
        return count_BNK, total_BNK / count_BNK.clamp_min(1)


@dataclass(frozen=True, kw_only=True)
class Complement(Estimator):
    """`Count` in pairs of copies: the second masks what the first kept (all, if it masked all).

    k is uniform on 1..n, with the weight n/k and, under a clip, c_k n/k (see `count_weights`). The
    second copy has exactly the first one's distribution, so the mean of both has the expectation of
    `Count` with the same schedule, and every pass scores every token at least once. A block of one
    token has no complement: see `for_block_size`. `timed` is that of `Count`.
    """

    num_noisy: int = 2
    timed: bool = False

    def __post_init__(self) -> None:
        if self.num_noisy < 2 or self.num_noisy % 2:
            raise UserError(
                f"complement pairs with {self.num_noisy} noisy copies do not work out; "
                "num_noisy must be even and at least 2"
            )

    @property
    def name(self) -> str:
        return self._full_name("complement", usual_copies=2)

    def _draw(self, free_BL: torch.Tensor, block_size: int, generator: torch.Generator) -> Draw:
        free_B1K = free_BL.unflatten(1, (-1, block_size)).sum(-1)[:, None]
        pairs = Count(num_noisy=self.num_noisy // 2, stratify=self.stratify)
        count_BPK, _ = pairs.draw_counts(free_BL, block_size, generator)
        masked_BPL = _random_subsets(count_BPK, free_BL, generator)
        whole_BPK = count_BPK == free_B1K  # also if nothing is free
        all_BPL = whole_BPK.repeat_interleave(block_size, dim=-1)
        rest_BPL = free_BL[:, None] & (all_BPL | ~masked_BPL)
        rest_BPK = torch.where(whole_BPK, count_BPK, free_B1K - count_BPK)
        masked_BNL = torch.stack([masked_BPL, rest_BPL], dim=2).flatten(1, 2)
        count_BNK = torch.stack([count_BPK, rest_BPK], dim=2).flatten(1, 2)
        prob_BNK = _prob_of_count(count_BNK, free_BL, generator) if self.timed else None
        count_BNK = count_BNK.clamp_min(1)  # if nothing is free, nothing is masked either
        share_BNK = count_weights(self.schedule, block_size)[free_B1K, count_BNK - 1]
        return masked_BNL, share_BNK * free_B1K / count_BNK, prob_BNK


@dataclass(frozen=True, kw_only=True)
class Timesteps(Estimator):
    """The corruption of D3PM (Austin et al. 2021): a time per block, uniform on the grid 1..T.

    At time t a free token has been replaced with probability p(t / T): by the mask ("absorbing"),
    or by a token drawn uniformly from those that are no mask ("uniform"; it may be the same). The
    bound is a sum over t = 1..T, so a term weighs T. An absorbing one is a share (p_t - p_{t-1}) /
    p_t of the cross-entropy of a masked token; the weight of masked tokens has that factor already,
    and is 0 elsewhere. A uniform one is `losses.uniform_kl`, at every free token.

    Attributes:
        timesteps: T.
        vocab_size: V, including the mask.
    """

    timesteps: int
    transition: Transition
    vocab_size: int

    @property
    def name(self) -> str:
        return "timesteps"

    def __call__(
        self,
        clean_BL: torch.Tensor,
        free_BL: torch.Tensor,
        block_size: int,
        mask_id: int,
        generator: torch.Generator,
    ) -> Corrupted:
        """Corrupt free tokens; see `Estimator`. With uniform noise all free tokens have weight."""
        batch, length = clean_BL.shape
        shape = (batch, self.num_noisy, length // block_size)
        uniform_BNK = stratified_uniform(shape, generator, self.stratify)
        step_BNK = (uniform_BNK * self.timesteps).ceil().clamp(1, self.timesteps)
        prob_BNK = self.schedule.mask_prob(step_BNK / self.timesteps)
        before_BNK = self.schedule.mask_prob((step_BNK - 1) / self.timesteps)
        hit_BNL = _coins(prob_BNK, free_BL.cpu(), generator)
        if self.transition == "absorbing":
            weight_BNK = self.timesteps * (prob_BNK - before_BNK) / prob_BNK
            drawn = _corrupted(clean_BL, hit_BNL, weight_BNK, mask_id, prob_BNK)
            return replace(drawn, before_BNK=before_BNK)
        device = clean_BL.device
        number_BNL = torch.randint(self.vocab_size - 1, tuple(hit_BNL.shape), generator=generator)
        other_BNL = without_mask(number_BNL, mask_id).to(device)
        noisy_BNL = torch.where(hit_BNL.to(device), other_BNL, clean_BL[:, None])
        scored_BNL = free_BL.cpu()[:, None].expand(hit_BNL.shape).to(device)
        return Corrupted(
            noisy_BNL, self.timesteps * scored_BNL.float(), scored_BNL, prob_BNK, before_BNK
        )


def for_block_size(estimator: Estimator, block_size: int) -> tuple[Estimator, str | None]:
    """Return the estimator to use at this block size, and a note if it is another one.

    Raises:
        UserError: no share of masked tokens of such a block lies in the clip of `resampled`.
    """
    if isinstance(estimator, Complement) and block_size == 1:
        single = Count(
            schedule=estimator.schedule,
            num_noisy=estimator.num_noisy // 2,
            stratify=estimator.stratify,
            timed=estimator.timed,
        )
        note = "blocks of one token: both copies of a complement pair are equal, one is used"
        return single, note
    if isinstance(estimator, Bernoulli) and estimator.resample:
        beta, omega = prob_range(estimator.schedule)
        if not any(beta <= k / block_size <= omega for k in range(1, block_size + 1)):
            raise UserError(
                f"{estimator.name}: no number of masked tokens out of {block_size} has its share "
                "in the clip; widen the clip, or take bernoulli"
            )
    return estimator, None


def relative_cost(num_noisy: int, has_clean: bool = True) -> float:
    """Return the cost of a pass with N noisy copies in passes of one: (N + 1) / 2 with a clean
    stream."""
    return (num_noisy + 1) / 2 if has_clean else float(num_noisy)


def make_estimator(
    spec: str, *, t_min: float = T_MIN, stratify: Stratify = "row"
) -> Bernoulli | Count | Complement:
    """Return an estimator by its name: `KIND[:SCHEDULE][[BETA,OMEGA]][xN]`.

    Examples: `bernoulli`, `bernoulli:cosine`, `bernoulli[0.45,0.95]`, `resampled[0.3,0.8]`,
    `count`, `count[0.45,0.95]`, `countx4`, `complement`.

    Raises:
        UserError: the name is not one, or its parts contradict each other.
    """
    parts = _SPEC.fullmatch(spec.replace(" ", ""))
    if parts is None or parts["kind"] not in get_args(EstimatorName):
        raise UserError(
            f"unknown estimator {shown(spec)}; write {'|'.join(get_args(EstimatorName))}, then "
            "optionally :SCHEDULE, [BETA,OMEGA] and xN, as in bernoulli:linear[0.45,0.95]x2"
        )
    clip = None
    if parts["clip"]:
        try:
            beta, omega = (float(end) for end in parts["clip"].split(","))
        except ValueError:
            raise UserError(f"{shown(spec)}: a clip is two numbers, as in [0.45,0.95]") from None
        clip = (beta, omega)
    return build_estimator(
        parts["kind"],  # type: ignore[arg-type]  # just checked
        schedule=parts["schedule"] or "linear",
        clip=clip,
        num_noisy=int(parts["copies"][:20]) if parts["copies"] else None,
        t_min=t_min,
        stratify=stratify,
    )


_SPEC = re.compile(
    r"(?P<kind>[a-z]+)(:(?P<schedule>[\w-]+?))?(\[(?P<clip>[^\]]*)\])?(x(?P<copies>\d+))?"
)


def build_estimator(
    kind: EstimatorName,
    *,
    schedule: str = "linear",
    clip: tuple[float, float] | None = None,
    num_noisy: int | None = None,
    t_min: float = T_MIN,
    stratify: Stratify = "row",
) -> Bernoulli | Count | Complement:
    """Return an estimator by its parts; `num_noisy` None is one copy (a pair for `complement`).

    Raises:
        UserError: the parts contradict each other.
    """
    noise = make_schedule(schedule, clip)
    if num_noisy is None:
        num_noisy = 2 if kind == "complement" else 1
    if kind == "complement":
        return Complement(schedule=noise, num_noisy=num_noisy, stratify=stratify)
    if kind == "count":
        return Count(schedule=noise, num_noisy=num_noisy, stratify=stratify)
    return Bernoulli(
        schedule=noise,
        t_min=t_min,
        num_noisy=num_noisy,
        resample=kind == "resampled",
        stratify=stratify,
    )


# --- drawing ---------------------------------------------------------------------------------


def stratified_uniform(
    shape_BNK: tuple[int, int, int], generator: torch.Generator, stratify: Stratify = "row"
) -> torch.Tensor:
    """Return numbers (B, N, K) on (0, 1], float64, each uniform, spread evenly by `stratify`.

    * "none": independent.
    * "batch": one in each of B*N*K equal strata, in random order. (The authors' strata are not
      permuted: at batch 1 their first block always sees little noise.)
    * "row": the same, and in addition the N copies of a block lie in N equal strata, and the K
      blocks of a row (of the copies in one such stratum) in K equal ones, so that the score of each
      row has less noise too.
    """
    batch, copies, blocks = shape_BNK
    within = 1 - torch.rand(shape_BNK, generator=generator, dtype=torch.float64)
    if stratify == "none":
        return within
    count = batch * copies * blocks
    if stratify == "batch":
        order = torch.randperm(count, generator=generator).view(shape_BNK)
        return (order + within) / count
    # Three nested levels: (0, 1] is cut into N intervals, each of these into K, each of these into
    # B, and every one of the N*K*B cells gets one number. The digits (copy, block, row) of a cell
    # are drawn from the top down:
    # 1. for every block of a row, its copies are assigned to the N intervals by a permutation;
    copy_BNK = _permutations((batch, blocks, copies), generator).transpose(1, 2)
    # 2. in each interval of a row, its K blocks (one copy of each) are assigned to the K parts;
    block_BNK = _permutations((batch, copies, blocks), generator).gather(1, copy_BNK)
    # 3. each such part holds one number of every row; a permutation assigns them to the B cells.
    # Each digit is uniform whatever those above it are, so each number is uniform by itself.
    row_BNK = _permutations((copies, blocks, batch), generator)[
        copy_BNK, block_BNK, torch.arange(batch)[:, None, None]
    ]
    return ((copy_BNK * blocks + block_BNK) * batch + row_BNK + within) / count


def _permutations(shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    """Independent random permutations along the last axis."""
    return torch.rand(shape, generator=generator, dtype=torch.float64).argsort(-1)


@lru_cache(maxsize=64)
def count_weights(schedule: Schedule, block_size: int) -> torch.Tensor:
    """Return c (S + 1, S): c[n, k-1] is the weight of k masked of n free tokens under `schedule`.

    The expected loss of a block with n free tokens is sum over k of c[n, k-1] times the mean, over
    masked sets of k tokens, of the mean negative log-likelihood of the masked ones. All c are 1
    without a clip, because k C(n, k) times the integral of w p^k (1-p)^(n-k) dt is 1. As
    w dt = dp/p, a clip leaves the probability that the k-th smallest of n uniform numbers lies in
    [beta, omega], divided by the width of the interval of t.
    """
    low, high = schedule.t_range
    beta, omega = prob_range(schedule)
    every_n = torch.arange(block_size + 1)[:, None]
    probs = [
        _binomial_probs(
            every_n, torch.full((block_size + 1, 1, 1), p, dtype=torch.float64), block_size
        )[:, 0, 0]
        for p in (beta, omega)
    ]
    if high > low:
        # P(Bin(n, p) >= k) at both ends, by summing the probabilities from the top.
        tails = [p.flip(-1).cumsum(-1).flip(-1) for p in probs]
        weights = (tails[1] - tails[0]) / (high - low)
    else:  # a single point: k Bin(k; n, p) is p times the density of the k-th smallest
        weight = schedule.loss_weight(torch.tensor(high, dtype=torch.float64))
        weights = torch.arange(block_size + 1) * probs[1] * weight
    return weights[:, 1:].clamp_min(0)


@lru_cache(maxsize=64)
def _log_choose(size: int) -> torch.Tensor:
    """log C(n, k) for 0 <= n, k <= size; -inf where k > n."""
    n = torch.arange(size + 1, dtype=torch.float64)
    log = (n[:, None] + 1).lgamma() - (n + 1).lgamma() - (n[:, None] - n + 1).clamp_min(1).lgamma()
    return log.masked_fill(n > n[:, None], -math.inf)


def _binomial_probs(num_BK: torch.Tensor, prob_BNK: torch.Tensor, size: int) -> torch.Tensor:
    """Bin(k; n, p) for k = 0..size, float64 (B, N, K, size + 1)."""
    count_C = torch.arange(size + 1, dtype=torch.float64)
    kept_BNKC = (num_BK[..., None] - count_C).clamp_min(0)[:, None]
    prob = prob_BNK.double()[..., None]
    log_BNKC = torch.xlogy(count_C, prob) + torch.special.xlog1py(kept_BNKC, -prob)
    return (log_BNKC + _log_choose(size)[num_BK][:, None]).exp()


@lru_cache(maxsize=64)
def _allowed_counts(block_size: int, beta: float, omega: float) -> torch.Tensor:
    """bool (S + 1, S + 1): whether k of n free tokens is a share in [beta, omega], or the nearest.

    As in the authors' code, a clip that begins at t_min or below has no lower end.
    """
    allowed = torch.zeros(block_size + 1, block_size + 1, dtype=torch.bool)
    low = beta if beta > T_MIN else 0.0
    for n in range(block_size + 1):
        shares = [k / max(n, 1) for k in range(n + 1)]
        fits = [low <= share <= omega for share in shares]
        if not any(fits):
            away = [max(low - share, share - omega) for share in shares]
            fits = [distance == min(away) for distance in away]
        allowed[n, : n + 1] = torch.tensor(fits)
    return allowed


def _random_subsets(
    count_BNK: torch.Tensor, free_BL: torch.Tensor, generator: torch.Generator
) -> torch.Tensor:
    """bool (B, N, L): `count` of the free tokens of every block, a uniform subset."""
    batch, copies, blocks = count_BNK.shape
    shape = (batch, copies, blocks, free_BL.shape[1] // blocks)
    score = torch.rand(shape, generator=generator, dtype=torch.float64)
    score.masked_fill_(~free_BL.view(batch, 1, blocks, -1), math.inf)
    rank = score.argsort(-1).argsort(-1)
    return (rank < count_BNK[..., None]).flatten(2)


def _coins(
    prob_BNK: torch.Tensor, free_BL: torch.Tensor, generator: torch.Generator
) -> torch.Tensor:
    """bool (B, N, L): each free token with its block's probability."""
    size = free_BL.shape[-1] // prob_BNK.shape[-1]
    prob_BNL = prob_BNK.repeat_interleave(size, dim=-1)
    coin_BNL = torch.rand(prob_BNL.shape, generator=generator, dtype=torch.float64)
    return (coin_BNL < prob_BNL) & free_BL[:, None]


def without_mask(number: torch.Tensor, mask_id: int) -> torch.Tensor:
    """Return token ids from their number among all tokens except the mask."""
    return number + (number >= mask_id)


def _prob_of_count(
    count_BNK: torch.Tensor, free_BL: torch.Tensor, generator: torch.Generator
) -> torch.Tensor:
    """Mask probabilities (B, N, K) given that k of n tokens are masked: Beta(k, n - k + 1), the
    k-th smallest of n uniform numbers. 1 if nothing is free."""
    batch, copies, blocks = count_BNK.shape
    free_BK = free_BL.unflatten(1, (blocks, -1)).sum(-1)
    size = free_BL.shape[1] // blocks
    uniform = 1 - torch.rand(batch, copies, blocks, size, generator=generator, dtype=torch.float64)
    beyond = torch.arange(size) >= free_BK[:, None, :, None]
    ordered = uniform.masked_fill(beyond, math.inf).sort(-1).values
    prob_BNK = ordered.gather(-1, (count_BNK - 1).clamp_min(0)[..., None])[..., 0]
    return prob_BNK.clamp(max=1)


def _corrupted(
    clean_BL: torch.Tensor,
    masked_BNL: torch.Tensor,
    weight_BNK: torch.Tensor,
    mask_id: int,
    prob_BNK: torch.Tensor | None,
) -> Corrupted:
    device = clean_BL.device
    size = masked_BNL.shape[-1] // weight_BNK.shape[-1]
    weight_BNL = weight_BNK.repeat_interleave(size, dim=-1)
    weight_BNL = torch.where(masked_BNL, weight_BNL, 0.0).float().to(device)
    masked_BNL = masked_BNL.to(device)
    noisy_BNL = clean_BL[:, None].masked_fill(masked_BNL, mask_id)
    return Corrupted(noisy_BNL, weight_BNL, masked_BNL, prob_BNK)
