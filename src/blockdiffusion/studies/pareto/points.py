"""Operating points: a sampler with its settings, as callers name them and as they are usual."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, get_args, get_origin, get_type_hints

from blockdiffusion.errors import UserError, shown
from blockdiffusion.sampling.choosing import make_sampler, sampler_names
from blockdiffusion.sampling.params import SETTINGS, SamplingParams

TOKENS = (1, 2, 4, 8, 16)  # of a pass, in the usual points
THRESHOLDS = {"confidence": (0.9, 0.7), "entropy": (0.1, 0.5, 2.0)}
# What a point may set in its own way, instead of as all points do.
KINDS: dict[str, type] = {
    name: str if get_origin(hint) is Literal else (get_args(hint) or (hint,))[0]  # without None
    for name, hint in get_type_hints(SamplingParams).items()
    if name in (*SETTINGS, "temperature", "top_k", "top_p", "top_p_rule")
}


@dataclass(frozen=True)
class Point:
    """A way to sample: `sampler` and its settings by name, as in `SamplingParams`."""

    sampler: str
    settings: tuple[tuple[str, Any], ...] = ()

    @property
    def label(self) -> str:
        """How it is given on the command line: "confidence:threshold=0.9"."""
        values = ",".join(f"{name}={value}" for name, value in self.settings)
        return f"{self.sampler}:{values}" if values else self.sampler

    def check(self, config: Any) -> None:
        """Refuses what a network of this configuration cannot do.

        Raises:
            UserError: an autoregressive network, an unknown sampler, or settings that it does not
                read or that do not fit.
        """
        _refuse_autoregressive(config)
        make_sampler(config, SamplingParams(sampler=self.sampler, **dict(self.settings)))


# The published samples are drawn so: one token a pass, nucleus 0.9 by the authors' rule.
AUTHORS = Point("first-hitting", (("top_p", 0.9), ("top_p_rule", "authors")))


def parse_point(text: str) -> Point:
    """A point from its label.

    Raises:
        UserError: a setting that there is not, or whose value is none.
    """
    sampler, _, rest = text.partition(":")
    settings = []
    for item in filter(None, rest.split(",")):
        name, _, value = item.partition("=")
        if name not in KINDS:
            raise UserError(
                f"the point {shown(text)} names the setting {shown(name)}; there are "
                f"{', '.join(KINDS)}, as in confidence:threshold=0.9"
            )
        try:
            settings.append((name, KINDS[name](value)))
        except ValueError:
            raise UserError(
                f"the point {shown(text)} gives {shown(value)} for {name}, which is no "
                f"{KINDS[name].__name__}"
            ) from None
    return Point(sampler, tuple(settings))


def _refuse_autoregressive(config: Any) -> None:
    if config.is_autoregressive:
        raise UserError(
            "this model is autoregressive: every token takes a pass, and there is nothing to "
            "choose; take a model that denoises"
        )


def usual_points(config: Any) -> tuple[Point, ...]:
    """Points from one token a pass to many, for a network of this configuration; for masked
    diffusion the authors' is the first.

    Raises:
        UserError: an autoregressive network, which can be sampled in one way only.
    """
    _refuse_autoregressive(config)
    size = config.block_size
    tokens = [n for n in TOKENS if n <= size]
    steps = [-(-size // n) for n in tokens]
    names = sampler_names(config)
    if len(names) == 1:  # an objective with a sampler of its own, which takes steps
        if most := config.timesteps:
            steps = [most // share for share in (1, 2, 4, 8) if share <= most]
        else:  # continuous time
            steps = [2 * size, *steps]
        return tuple(Point(names[0], (("steps", n),)) for n in steps)
    no_times = () if config.time_conditioning else tokens[1:]  # which a random order does not know
    return (
        AUTHORS,
        Point("first-hitting"),
        *(Point("ancestral", (("steps", n),)) for n in steps),
        *(Point("random", (("tokens_per_step", n),)) for n in no_times),
        *(Point("confidence", (("tokens_per_step", n),)) for n in tokens),
        *(
            Point(sampler, (("threshold", value),))
            for sampler, values in THRESHOLDS.items()
            for value in values
        ),
        *(Point("remask", (("steps", n),)) for n in (2 * size, *steps[:2])),
    )
