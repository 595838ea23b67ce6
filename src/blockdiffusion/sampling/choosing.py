"""Which sampler a network has: by the name in the options, or the usual one of its objective."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from blockdiffusion.diffusion.objectives import DiscreteTime
from blockdiffusion.diffusion.schedules import Schedule, make_schedule
from blockdiffusion.errors import UserError, shown
from blockdiffusion.sampling.adaptive import MostCertain, Remasking
from blockdiffusion.sampling.params import MASKED_SAMPLERS, SAMPLERS, SamplingParams
from blockdiffusion.sampling.reverse import Analytic, UniformReverse
from blockdiffusion.sampling.samplers import (
    Ancestral,
    FirstHitting,
    Leftmost,
    Planned,
    RandomOrder,
    Sampler,
    SamplingContext,
)
from blockdiffusion.sampling.streams import RowStreams


def make_sampler(config: Any, params: SamplingParams | None = None) -> Sampler:
    """The sampler that `params` name or are given, or the usual one, for a network of this
    configuration.

    Raises:
        UserError: the network's objective has no such sampler, or not with these settings; it reads
            too many tokens at a time, or the network reads times that the sampler does not know.
    """
    params = params or SamplingParams()
    sampler = params.sampler
    if config.is_autoregressive:
        refuse_masks(sampler=sampler, stride=params.stride, **params.settings())
        return Leftmost()
    if isinstance(sampler, str | None):
        name = None if sampler is None else sampler.replace("_", "-")
        sampler = _family(config).make(config, name, params)
    else:
        sampler = _object(sampler, params)
    streams = RowStreams([bytes(16)], config.block_size)
    context = SamplingContext(config, torch.device("cpu"), SamplingParams(), streams)
    sampler.start(torch.ones(1, config.block_size, dtype=torch.bool), context)
    return sampler


def sampler_names(config: Any) -> tuple[str, ...]:
    """Return the names of the samplers that a network which denoises blocks can have."""
    return _family(config).names


def refuse_masks(**options: object) -> None:
    """Refuse options that say how masks are revealed, for a model without masks."""
    for name, value in options.items():
        if value is not None:
            raise UserError(
                f"{name} is given, but this model is autoregressive: it writes one token after the "
                "other and has no masks to reveal; leave it out"
            )


def _object(sampler: Any, params: SamplingParams) -> Sampler:
    if not isinstance(sampler, Sampler):
        if not hasattr(sampler, "plan"):
            raise UserError(f"sampler is {shown(sampler)}; it must be a name or a Sampler")
        sampler = Planned(sampler)
    if any(value is not None for value in params.settings().values()):
        raise UserError(
            "steps, schedule and the like go with a sampler's name; this object has its own"
        )
    return sampler


def _masked(config: Any, name: str | None, params: SamplingParams) -> Sampler:
    name = "first-hitting" if name is None else name
    if name not in MASKED_SAMPLERS:
        known = ", ".join(sorted(MASKED_SAMPLERS))
        raise UserError(f"unknown sampler {shown(name)}; known: {known}")
    params.check_read(name, MASKED_SAMPLERS)
    return _MASKED[name](name, params)


def _random(name: str, params: SamplingParams) -> Sampler:
    if params.tokens_per_step is None:
        raise UserError(
            "the sampler random needs the number of tokens of a pass: give tokens_per_step"
        )
    return RandomOrder(params.tokens_per_step)


def _most_certain(name: Any, params: SamplingParams) -> Sampler:
    return MostCertain(name, params.tokens_per_step, params.threshold, params.sub_block)


def _remasking(name: str, params: SamplingParams) -> Sampler:
    remask = 1.0 if params.remask is None else params.remask
    return Remasking(_steps(name, params), remask, _schedule(params))


def _steps(name: str, params: SamplingParams) -> int:
    if params.steps is None:
        raise UserError(f"the sampler {name} needs a number of steps per block: give steps")
    return params.steps


def _schedule(params: SamplingParams) -> Schedule:
    return make_schedule(params.schedule or "linear")


# What makes each of the samplers in `MASKED_SAMPLERS`, which help reads without PyTorch.
_MASKED: dict[str, Callable[[str, SamplingParams], Sampler]] = {
    "first-hitting": lambda name, params: FirstHitting(),
    "ancestral": lambda name, params: Ancestral(_steps(name, params), _schedule(params)),
    "random": _random,
    "leftmost": lambda name, params: Leftmost(params.tokens_per_step or 1),
    "confidence": _most_certain,
    "margin": _most_certain,
    "entropy": _most_certain,
    "remask": _remasking,
}


def _score_entropy(config: Any, name: str | None, params: SamplingParams) -> Sampler:
    if name not in (None, "analytic"):
        raise UserError(
            f"sampler is {name}, but a network of score entropy (SEDD) is sampled by its scores; "
            "use analytic"
        )
    params.check_read("analytic", {"analytic": SAMPLERS["analytic"]})
    steps = config.block_size if params.steps is None else params.steps
    return Analytic(steps, _schedule(params))


def _d3pm(config: Any, name: str | None, params: SamplingParams) -> Sampler:
    if name not in (None, "ancestral"):
        raise UserError(
            f"sampler is {name}, but a d3pm network is sampled by its own steps; use ancestral"
        )
    if params.schedule is not None:
        raise UserError(
            f"schedule is {params.schedule}, but a d3pm network has its own "
            f"({config.noise_schedule}); leave it out"
        )
    params.check_read("ancestral", {"ancestral": ("steps",)})
    kind = UniformReverse if config.transition == "uniform" else Ancestral
    steps = config.timesteps if params.steps is None else params.steps
    return kind(steps, DiscreteTime(config).schedule)


class _Family(NamedTuple):
    """The samplers of an objective: their names, and what makes one of a name, None included."""

    names: tuple[str, ...]
    make: Callable[[Any, str | None, SamplingParams], Sampler]


_FAMILIES = {
    "block_diffusion": _Family(tuple(MASKED_SAMPLERS), _masked),
    "score_entropy": _Family(("analytic",), _score_entropy),
    "d3pm": _Family(("ancestral",), _d3pm),
}


def _family(config: Any) -> _Family:
    """Return the samplers of an objective; of one that is not in the table those of masks."""
    return _FAMILIES.get(config.objective, _FAMILIES["block_diffusion"])
