"""How a block comes to be: the reverse processes, one for each kind of noise.

* `Planned`: masks whose passes a `Policy` draws before the network runs (masked diffusion, and
  D3PM with absorbing noise, where the order of reveals does not depend on the tokens either),
* `MostCertain`: the predictions say which masks are revealed: fewer passes, another law,
* `Remasking`: decided tokens may be masked again, to be decided better (ReMDM),
* `Analytic`: SEDD's analytic step (Lou et al. 2024, section 4; "Tweedie"), where the network
  also says how likely a token is revealed,
* `UniformReverse`: D3PM with uniform noise (Austin et al. 2021), where every token may change in
  every step and all are decided at the end.

Given tokens are never changed by any of them.

Shape suffixes: R rows of the batch, S positions of the block, M positions of a pass, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, Protocol, runtime_checkable

import torch

from blockdiffusion.diffusion.estimators import without_mask
from blockdiffusion.diffusion.losses import exclude_mask_token_, log_rate, uniform_reverse
from blockdiffusion.diffusion.objectives import DiscreteTime
from blockdiffusion.diffusion.schedules import Linear, Schedule, make_schedule, noise_level
from blockdiffusion.errors import UserError, shown
from blockdiffusion.sampling.logits import (
    Filters,
    draw_columns,
    draw_tokens,
    filtered_probs,
    probabilities,
)
from blockdiffusion.sampling.policies import (
    Ancestral,
    FirstHitting,
    Policy,
    PolicySettings,
    RandomOrder,
    TimedPolicy,
    check_tokens_per_step,
    in_order,
)
from blockdiffusion.sampling.streams import RowStreams

TIE = 2.0**-10  # uncertainties are told apart by as much; see `MostCertain`

Place = tuple[torch.Tensor, torch.Tensor]  # rows and slots, (M,) each, on the CPU


class Setting(NamedTuple):
    """What draws in a block depend on: the network's configuration and device, filters, and the
    random numbers of the block's rows."""

    config: Any
    device: torch.device
    filters: Filters
    streams: RowStreams


class Changes(NamedTuple):
    """What a pass decides or changes; (M,) each, rows and slots on the CPU.

    `confidences` are the denoiser's probabilities of the ids, before any filter.
    """

    rows: torch.Tensor
    slots: torch.Tensor
    ids: torch.Tensor
    confidences: torch.Tensor


class Course(Protocol):
    """One block of all rows on its way from noise to text.

    `undecided_RS` (bool, on the CPU): positions to be sampled whose token may still change.
    """

    undecided_RS: torch.Tensor

    def fill(self, block_RS: torch.Tensor) -> torch.Tensor:
        """The block as it begins, from one with masks where tokens are to be sampled."""
        ...

    def sigma_R(self) -> torch.Tensor | None:
        """What the network reads as the time of the next pass; None if it reads none."""
        ...

    def wanted_RS(self) -> torch.Tensor:
        """bool, on the CPU: the positions whose logits the next pass needs."""
        ...

    def decide(self, place_M: Place, ids_M: torch.Tensor, logits_MV: torch.Tensor) -> Changes:
        """Makes a pass's decisions, from the logits at wanted positions that hold `ids_M`.

        Positions of rows that have left are missing. The next pass is another one.
        """
        ...


@runtime_checkable
class Process(Protocol):
    """A way in which blocks come to be."""

    @property
    def name(self) -> str: ...

    def begin(self, open_RS: torch.Tensor, setting: Setting) -> Course:
        """The course of a block; `open_RS` (bool, CPU) marks the tokens that are to be sampled."""
        ...


# --- masks, in passes drawn ahead ---------------------------------------------------------------


@dataclass(frozen=True)
class Planned:
    """A policy's plan, carried out: logits are computed where a pass reveals a token, only."""

    policy: Policy

    @property
    def name(self) -> str:
        """The policy's."""
        return self.policy.name

    def begin(self, open_RS: torch.Tensor, setting: Setting) -> Course:
        """See `Process`.

        Raises:
            UserError: the network reads the time, and the policy knows none.
        """
        if not setting.config.time_conditioning:
            return _PlannedCourse(self.policy.plan(open_RS, setting.streams), None, setting)
        if not isinstance(self.policy, TimedPolicy):
            raise UserError(
                f"this network reads the time, which the policy {self.policy.name} does not tell; "
                "take first-hitting or ancestral"
            )
        prob_RS = self.policy.reveal_probs(open_RS, setting.streams)
        return _PlannedCourse(in_order(prob_RS, open_RS), prob_RS, setting)


class _PlannedCourse:
    def __init__(self, pass_RS: torch.Tensor, prob_RS: torch.Tensor | None, setting: Setting):
        self.pass_RS, self.prob_RS, self.setting = pass_RS, prob_RS, setting
        self.undecided_RS = pass_RS >= 0
        self.step = 0

    def fill(self, block_RS: torch.Tensor) -> torch.Tensor:
        return block_RS

    def sigma_R(self) -> torch.Tensor | None:
        if self.prob_RS is None:
            return None
        # All tokens of a row that share a pass share its time.
        prob_R = self.prob_RS.where(self.wanted_RS(), 0.0).amax(1)
        return noise_level(prob_R).float().to(self.setting.device)

    def wanted_RS(self) -> torch.Tensor:
        return self.pass_RS == self.step

    def decide(self, place_M: Place, ids_M: torch.Tensor, logits_MV: torch.Tensor) -> Changes:
        setting = self.setting
        token_M, confidence_M = draw_tokens(
            logits_MV, setting.config.mask_id, setting.filters, setting.streams.at(place_M[0])
        )
        self.undecided_RS[place_M] = False
        self.step += 1
        return Changes(*place_M, token_M, confidence_M)


# --- masks, as the predictions say --------------------------------------------------------------


@dataclass(frozen=True)
class MostCertain:
    """Each pass reveals the masked tokens whose predictions are the most certain.

    An approximation: the order depends on the predictions, and tokens that share a pass are drawn
    independently of each other. What is certain is measured on p(x0 | .) before any filter:

    * "confidence": the probability of the most likely token (LLaDA, Nie et al. 2025; with a
      threshold Fast-dLLM, Wu et al. 2025),
    * "margin": by how much it exceeds that of the second (Kim et al. 2025),
    * "entropy": the entropy in nats; with a threshold, as many tokens as have entropies that add
      up, without the largest, to at most it (EB-sampler, Ben-Hamu et al. 2025).

    Tokens go in the order of their uncertainties, rounded to 2^-10; of equal ones the first in the
    text goes first. Without that the rounding of kernels would choose among positions that see the
    same, as all masks of a text's first block do.

    Args:
        tokens_per_step: reveal so many in every pass, or
        threshold: reveal all that reach it, but at least one.
    """

    name: Literal["confidence", "margin", "entropy"]
    tokens_per_step: int | None = None
    threshold: float | None = None

    def __post_init__(self) -> None:
        if (self.tokens_per_step is None) == (self.threshold is None):
            raise UserError(
                f"the policy {self.name} needs either tokens_per_step or threshold; give one"
            )
        if self.tokens_per_step is not None:
            check_tokens_per_step(self.tokens_per_step)
        elif self.name == "entropy" and not self._threshold >= 0:
            raise UserError(f"threshold is {self.threshold}; entropies are at least 0 nats")
        elif self.name != "entropy" and not 0 <= self._threshold <= 1:
            raise UserError(f"threshold is {self.threshold}; for {self.name} it lies in [0, 1]")

    @property
    def _threshold(self) -> float:
        assert self.threshold is not None
        return self.threshold

    def begin(self, open_RS: torch.Tensor, setting: Setting) -> Course:
        """See `Process`."""
        if self.tokens_per_step is not None:
            check_tokens_per_step(self.tokens_per_step, open_RS.shape[1])
        return _MostCertainCourse(self, open_RS, setting)

    def uncertainty(self, prob_MV: torch.Tensor) -> torch.Tensor:
        """What the tokens of a pass are ordered by, float64 (M,): the least is revealed first."""
        if self.name == "entropy":
            return torch.special.entr(prob_MV.double()).sum(-1)
        first_M2 = prob_MV.topk(2, dim=-1).values.double()
        margin = self.name == "margin"
        return 1 - (first_M2[:, 0] - first_M2[:, 1] if margin else first_M2[:, 0])

    def revealed(self, ordered_RS: torch.Tensor) -> torch.Tensor:
        """Which tokens are revealed, bool (R, S), given their uncertainties in the order in which
        they go (infinite where there is no masked token)."""
        rank_S = torch.arange(ordered_RS.shape[1])
        if self.tokens_per_step is not None:
            kept_RS = (rank_S < self.tokens_per_step).expand_as(ordered_RS)
        elif self.name == "entropy":
            kept_RS = ordered_RS.cumsum(1) - ordered_RS <= self._threshold
        else:
            kept_RS = ordered_RS <= 1 - self._threshold
        return (kept_RS | (rank_S == 0)) & ordered_RS.isfinite()


class _MostCertainCourse:
    def __init__(self, process: MostCertain, open_RS: torch.Tensor, setting: Setting):
        self.process, self.setting = process, setting
        self.open_RS, self.undecided_RS = open_RS, open_RS.clone()

    def fill(self, block_RS: torch.Tensor) -> torch.Tensor:
        return block_RS

    def sigma_R(self) -> torch.Tensor | None:
        if not self.setting.config.time_conditioning:
            return None
        share_R = self.undecided_RS.sum(1) / self.open_RS.sum(1).clamp(min=1)
        return noise_level(share_R.double()).float().to(self.setting.device)

    def wanted_RS(self) -> torch.Tensor:
        return self.undecided_RS

    def decide(self, place_M: Place, ids_M: torch.Tensor, logits_MV: torch.Tensor) -> Changes:
        setting = self.setting
        logits_MV = exclude_mask_token_(logits_MV, setting.config.mask_id)
        uncertainty_M = self.process.uncertainty(probabilities(logits_MV)).cpu()
        all_RS = torch.full(self.open_RS.shape, torch.inf, dtype=torch.float64)
        all_RS[place_M] = uncertainty_M
        order_RS = (all_RS / TIE).round().argsort(dim=1, stable=True)
        ordered_RS = all_RS.gather(1, order_RS)
        chosen_RS = torch.zeros_like(self.open_RS)
        chosen_RS.scatter_(1, order_RS, self.process.revealed(ordered_RS))
        chosen_M = chosen_RS[place_M]
        row_M, slot_M = (x[chosen_M] for x in place_M)
        token_M, confidence_M = draw_tokens(
            _rows(logits_MV, chosen_M),
            setting.config.mask_id,
            setting.filters,
            setting.streams.at(row_M),
        )
        self.undecided_RS[row_M, slot_M] = False
        return Changes(row_M, slot_M, token_M, confidence_M)


# --- masks that come back -----------------------------------------------------------------------


@dataclass(frozen=True)
class Remasking:
    """ReMDM (Wang et al. 2025): ancestral steps in which decided tokens may be masked again.

    From mask probability p_t to p_s a decided token is masked with probability sigma, and a masked
    one revealed with 1 - (p_s - sigma (1 - p_t)) / p_t, so that p_s of the tokens are masked then,
    as without remasking. sigma is `remask` times the largest that allows it, min(1, p_s / (1 -
    p_t)) ("rescale"); with `remask` 0 it is `Ancestral`, pass by pass. A network that predicts each
    token exactly, given any others, keeps its law; for others, and few steps, it is an
    approximation whose point is that mistakes can be mended.
    """

    steps: int
    remask: float = 1.0
    schedule: Schedule = field(default_factory=Linear)
    name: str = "remask"

    def __post_init__(self) -> None:
        _check_steps(self.name, self.steps)
        if not 0 <= self.remask <= 1:
            raise UserError(f"remask is {self.remask}; it must lie in [0, 1]")

    def begin(self, open_RS: torch.Tensor, setting: Setting) -> Course:
        """See `Process`."""
        return _RemaskingCourse(self, open_RS, setting)


class _RemaskingCourse:
    """What happens to a token depends on coins alone, which are thrown before each pass: so logits
    are needed where it reveals a token, only."""

    def __init__(self, process: Remasking, open_RS: torch.Tensor, setting: Setting):
        self.open_RS, self.undecided_RS = open_RS, open_RS.clone()
        self.masked_RS = open_RS.clone()
        self.prob = _falling(process.schedule, process.steps)
        self.remask, self.setting = process.remask, setting
        self.step = 0
        self._throw_coins()

    def _throw_coins(self) -> None:
        """Which tokens the next pass reveals, and which decided ones it masks again."""
        now, then = self.prob[self.step], self.prob[self.step + 1]
        keep = 1 - now
        sigma = self.remask * min(1.0, then / keep) if keep > 0 else 0.0
        reveal = 1 - (then - sigma * keep) / now
        coin_RS = self.setting.streams.each(self.open_RS.shape[1])
        self.revealed_RS = self.masked_RS & ((coin_RS < reveal) | (then == 0))
        self.forgotten_RS = self.open_RS & ~self.masked_RS & (coin_RS < sigma)

    def fill(self, block_RS: torch.Tensor) -> torch.Tensor:
        return block_RS

    def sigma_R(self) -> torch.Tensor | None:
        return _same_for_all(self.prob[self.step], self.open_RS, self.setting)

    def wanted_RS(self) -> torch.Tensor:
        return self.revealed_RS

    def decide(self, place_M: Place, ids_M: torch.Tensor, logits_MV: torch.Tensor) -> Changes:
        mask_id = self.setting.config.mask_id
        token_M, confidence_M = draw_tokens(
            logits_MV, mask_id, self.setting.filters, self.setting.streams.at(place_M[0])
        )
        # No row leaves before the last step: all that is forgotten is in a row that goes on.
        row_F, slot_F = self.forgotten_RS.nonzero(as_tuple=True)
        self.masked_RS[place_M] = False
        self.masked_RS |= self.forgotten_RS
        self.step += 1
        if self.prob[self.step] == 0:
            self.undecided_RS[:] = False
        else:
            self._throw_coins()
        return Changes(
            torch.cat([place_M[0], row_F]),
            torch.cat([place_M[1], slot_F]),
            torch.cat([token_M, torch.full_like(row_F, mask_id, device=token_M.device)]),
            torch.cat([confidence_M, confidence_M.new_zeros(len(row_F))]),
        )


# --- SEDD ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Analytic:
    """SEDD's analytic sampler on a grid of `steps` times, for masks.

    From t to the next earlier s a masked token becomes y with probability (e^(sigma_t - sigma_s) -
    1) s_y, which is u c_y for u = (p_t - p_s) / p_t and c of `losses.score_entropy`, and stays
    masked with what is left. Where the scores add up to more than one, nothing is left. The last
    step, to p = 0, reveals all (the authors' denoising step). Filters act on c / sum of c.

    The grid begins at p = 1, also for a network whose noise ended at 1 - eps: as the authors do,
    everything is masked at first, and sigma is cut.
    """

    steps: int
    schedule: Schedule = field(default_factory=Linear)
    name: str = "analytic"

    def __post_init__(self) -> None:
        _check_steps(self.name, self.steps)

    def begin(self, open_RS: torch.Tensor, setting: Setting) -> Course:
        """See `Process`."""
        return _AnalyticCourse(open_RS, _falling(self.schedule, self.steps), setting)


class _AnalyticCourse:
    def __init__(self, open_RS: torch.Tensor, prob: list[float], setting: Setting):
        self.undecided_RS = open_RS.clone()
        self.prob, self.setting = prob, setting
        self.step = 0

    def fill(self, block_RS: torch.Tensor) -> torch.Tensor:
        return block_RS

    def sigma_R(self) -> torch.Tensor | None:
        return _same_for_all(self.prob[self.step], self.undecided_RS, self.setting)

    def wanted_RS(self) -> torch.Tensor:
        return self.undecided_RS

    def decide(self, place_M: Place, ids_M: torch.Tensor, logits_MV: torch.Tensor) -> Changes:
        config, streams = self.setting.config, self.setting.streams
        now, then = self.prob[self.step], self.prob[self.step + 1]
        self.step += 1
        rate_M = log_rate(logits_MV, config.mask_id).double().exp().cpu()
        revealed_M = streams.at(place_M[0]) < (now - then) / now * rate_M
        if then == 0:
            revealed_M[:] = True
        row_M, slot_M = (x[revealed_M] for x in place_M)
        token_M, confidence_M = draw_tokens(
            _rows(logits_MV, revealed_M),
            config.mask_id,
            self.setting.filters,
            streams.at(row_M),
        )
        self.undecided_RS[row_M, slot_M] = False
        return Changes(row_M, slot_M, token_M, confidence_M)


# --- D3PM with uniform noise --------------------------------------------------------------------


@dataclass(frozen=True)
class UniformReverse:
    """D3PM's ancestral sampler for uniform noise: T steps of p(x_s | x_t), all tokens in each.

    With `steps` = T it is the chain whose bound is measured; with fewer it takes longer steps of
    the same noise, by the same formula (`losses.uniform_reverse`), and is another law. Filters
    act on p(x_0 | x_t).
    """

    steps: int
    schedule: Schedule = field(default_factory=Linear)
    name: str = "ancestral"

    def __post_init__(self) -> None:
        _check_steps(self.name, self.steps)

    def begin(self, open_RS: torch.Tensor, setting: Setting) -> Course:
        """See `Process`."""
        return _UniformCourse(open_RS, _falling(self.schedule, self.steps), setting)


class _UniformCourse:
    def __init__(self, open_RS: torch.Tensor, prob: list[float], setting: Setting):
        self.open_RS, self.undecided_RS = open_RS, open_RS.clone()
        self.prob, self.setting = prob, setting
        self.step = 0

    def fill(self, block_RS: torch.Tensor) -> torch.Tensor:
        config, device = self.setting.config, block_RS.device
        uniform_RS = self.setting.streams.each(block_RS.shape[1])
        noise_RS = without_mask((uniform_RS * (config.vocab_size - 1)).long(), config.mask_id)
        return torch.where(self.open_RS.to(device), noise_RS.to(device), block_RS)

    def sigma_R(self) -> torch.Tensor | None:
        return _same_for_all(self.prob[self.step], self.open_RS, self.setting)

    def wanted_RS(self) -> torch.Tensor:
        return self.open_RS

    def decide(self, place_M: Place, ids_M: torch.Tensor, logits_MV: torch.Tensor) -> Changes:
        mask_id = self.setting.config.mask_id
        now, then = self.prob[self.step], self.prob[self.step + 1]
        prob_MV = probabilities(exclude_mask_token_(logits_MV, mask_id))
        clean_MV = filtered_probs(prob_MV, self.setting.filters)
        reverse_MV = uniform_reverse(clean_MV, ids_M, 1 - now, 1 - then, mask_id)
        token_M = draw_columns(reverse_MV, self.setting.streams.at(place_M[0]))
        confidence_M = prob_MV.gather(-1, token_M[:, None])[:, 0]
        told_M = (token_M != ids_M) | (self.step == 0)
        self.step += 1
        if then == 0:
            self.undecided_RS[:] = False
        on_cpu_M = told_M.cpu()
        row_M, slot_M = (x[on_cpu_M] for x in place_M)
        return Changes(row_M, slot_M, token_M[told_M], confidence_M[told_M])


def _rows(logits_MV: torch.Tensor, chosen_M: torch.Tensor) -> torch.Tensor:
    """Those that `chosen_M`, on the CPU, marks; without asking a GPU how many there are."""
    return logits_MV[chosen_M.nonzero().flatten().to(logits_MV.device)]


def _same_for_all(prob: float, open_RS: torch.Tensor, setting: Setting) -> torch.Tensor | None:
    if not setting.config.time_conditioning:
        return None
    level = noise_level(torch.tensor(prob, dtype=torch.float64)).float()
    return level.expand(len(open_RS)).to(setting.device)


def _falling(schedule: Schedule, steps: int) -> list[float]:
    """p at the `steps` times of the grid, the last first, and 0."""
    grid = torch.arange(steps, 0, -1, dtype=torch.float64) / steps
    return [*schedule.mask_prob(grid).tolist(), 0.0]


# --- which for which network --------------------------------------------------------------------


def as_process(policy: Policy | Process) -> Process:
    """A policy as the process that carries out its plans; a process as it is."""
    return policy if isinstance(policy, Process) else Planned(policy)


def make_process(
    config: Any, policy: str | None = None, settings: PolicySettings | None = None
) -> Policy | Process:
    """The process called `policy`, or the usual one, of a network of this configuration.

    Raises:
        UserError: the network's objective has no such process, or not with these settings.
    """
    name = None if policy is None else policy.replace("_", "-")
    made = _MAKERS[config.objective](config, name, settings or PolicySettings())
    check_fits(made, config)
    return made


def check_fits(policy: Policy | Process, config: Any) -> None:
    """Refuses a policy that cannot begin a block of a network of this configuration.

    Raises:
        UserError: it reads too many tokens at a time, or the network reads times it does not tell.
    """
    streams = RowStreams([bytes(16)], config.block_size)
    setting = Setting(config, torch.device("cpu"), Filters(), streams)
    as_process(policy).begin(torch.ones(1, config.block_size, dtype=torch.bool), setting)


def _masked(config: Any, name: str | None, settings: PolicySettings) -> Policy | Process:
    name = "first-hitting" if name is None else name
    if name not in _MASKED:
        raise UserError(f"unknown policy {shown(name)}; known: {', '.join(sorted(_MASKED))}")
    settings.check_read(name, {other: reads for other, (reads, _) in _MASKED.items()})
    return _MASKED[name][1](name, settings)


def _first_hitting(name: str, settings: PolicySettings) -> Policy:
    return FirstHitting()


def _ancestral(name: str, settings: PolicySettings) -> Policy:
    return Ancestral(_needed_steps(name, settings), make_schedule(settings.schedule or "linear"))


def _random(name: str, settings: PolicySettings) -> Policy:
    if settings.tokens_per_step is None:
        raise UserError(
            "the policy random needs the number of tokens of a pass: give tokens_per_step"
        )
    return RandomOrder(settings.tokens_per_step)


def _most_certain(name: str, settings: PolicySettings) -> Process:
    return MostCertain(name, settings.tokens_per_step, settings.threshold)  # type: ignore[arg-type]


def _remasking(name: str, settings: PolicySettings) -> Process:
    return Remasking(
        _needed_steps(name, settings),
        1.0 if settings.remask is None else settings.remask,
        make_schedule(settings.schedule or "linear"),
    )


def _needed_steps(name: str, settings: PolicySettings) -> int:
    if settings.steps is None:
        raise UserError(f"the policy {name} needs a number of steps per block: give steps")
    return settings.steps


_Maker = Callable[[str, PolicySettings], Policy | Process]
# The policies of masked diffusion: the settings that each reads, and who makes it.
_MASKED: dict[str, tuple[tuple[str, ...], _Maker]] = {
    "first-hitting": ((), _first_hitting),
    "ancestral": (("steps", "schedule"), _ancestral),
    "random": (("tokens_per_step",), _random),
    "confidence": (("tokens_per_step", "threshold"), _most_certain),
    "margin": (("tokens_per_step", "threshold"), _most_certain),
    "entropy": (("tokens_per_step", "threshold"), _most_certain),
    "remask": (("steps", "schedule", "remask"), _remasking),
}


def _score_entropy(config: Any, name: str | None, settings: PolicySettings) -> Policy | Process:
    if name not in (None, "analytic"):
        raise UserError(
            f"policy is {name}, but a network of score entropy (SEDD) is sampled by its scores; "
            "use analytic"
        )
    settings.check_read("analytic", {"analytic": ("steps", "schedule")})
    steps = config.block_size if settings.steps is None else settings.steps
    return Analytic(steps, make_schedule(settings.schedule or "linear"))


def _d3pm(config: Any, name: str | None, settings: PolicySettings) -> Policy | Process:
    if name not in (None, "ancestral"):
        raise UserError(
            f"policy is {name}, but a d3pm network is sampled by its own steps; use ancestral"
        )
    if settings.schedule is not None:
        raise UserError(
            f"schedule is {settings.schedule}, but a d3pm network has its own "
            f"({config.noise_schedule}); leave it out"
        )
    settings.check_read("ancestral", {"ancestral": ("steps",)})
    kind = UniformReverse if config.transition == "uniform" else Ancestral
    steps = config.timesteps if settings.steps is None else settings.steps
    return kind(steps, DiscreteTime(config).schedule)


_MAKERS = {"block_diffusion": _masked, "score_entropy": _score_entropy, "d3pm": _d3pm}


def _check_steps(name: str, steps: int) -> None:
    if steps < 1:
        raise UserError(f"the {name} sampler needs at least 1 step, not {steps}")
