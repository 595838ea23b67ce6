"""How to sample: every option once, with its default, its help and its range.

`generate`, `stream`, `infill`, the engine and evaluations take the options, and the command line is
made from them. This module imports no PyTorch, so that `--help` answers at once.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, Literal, get_args

from blockdiffusion.diffusion.schedules import SCHEDULES
from blockdiffusion.errors import UserError, either, shown
from blockdiffusion.limits import check_limits
from blockdiffusion.options import Renamed, changed, option

TopPRule = Literal["transformers", "authors"]
TEMPERATURES = (1e-3, 1e3)  # beyond them quotients of logits overflow, or nothing is left of them
SETTINGS = (
    "steps",
    "schedule",
    "tokens_per_step",
    "threshold",
    "sub_block",
    "remask",
)  # of named samplers
MASKED_SAMPLERS: dict[str, tuple[str, ...]] = {  # of masked diffusion: the settings that each reads
    "first-hitting": (),
    "ancestral": ("steps", "schedule"),
    "random": ("tokens_per_step",),
    "leftmost": ("tokens_per_step",),
    "confidence": ("tokens_per_step", "threshold", "sub_block"),
    "margin": ("tokens_per_step", "threshold", "sub_block"),
    "entropy": ("tokens_per_step", "threshold", "sub_block"),
    "remask": ("steps", "schedule", "remask"),
}
SAMPLERS = MASKED_SAMPLERS | {"analytic": ("steps", "schedule")}


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """How to sample.

    >>> params = SamplingParams(max_new_tokens=64, top_p=0.9, seed=1)
    >>> generate(model, "Once upon a time", params)

    Raises:
        UserError: a value is out of range.
    """

    num_samples: int = option(1, "Samples of each prompt.")
    max_new_tokens: int = option(128, "Tokens after the prompt, at most.")
    sampler: Any = option(
        None,
        f"{either(MASKED_SAMPLERS)}; SEDD: analytic; by default the model's. In Python also an "
        "object, see `sampling.samplers`.",
        choices=" ".join(SAMPLERS),
        was="policy",
    )
    steps: int | None = option(None, "Steps per block, for ancestral, remask and analytic.")
    schedule: str | None = option(
        None, f"Noise schedule of the steps: {either(SCHEDULES)}.", " ".join(SCHEDULES)
    )
    tokens_per_step: int | None = option(
        None,
        "Tokens of a pass, for random, leftmost, confidence, margin and entropy; with a threshold, "
        "at least so many.",
    )
    threshold: float | None = option(
        None, "Reveal what reaches it: confidence or margin in [0, 1], or entropy in nats."
    )
    sub_block: int | None = option(
        None, "Confidence, margin and entropy fill a block in parts of so many tokens, in order."
    )
    remask: float | None = option(
        None, "Share of the largest rate of remask, in [0, 1]; 1 by default."
    )
    stride: int | None = option(
        None, "Models of one block: new tokens of each slide beyond L; L/2 by default."
    )
    top_p: float = option(1.0, "Nucleus, in (0, 1]; 1 keeps all.")
    top_p_rule: TopPRule = option(
        "transformers",
        "transformers (keeps the token that crosses) or authors (drops it).",
        "transformers authors",
    )
    top_k: int | None = option(None, "Keep the k most likely tokens.")
    temperature: float = option(1.0, "In [0.001, 1000].")
    window: int | None = option(
        None, "A token sees the last WINDOW tokens, its block included; constant memory."
    )
    bos: bool | None = option(
        None, "Position 0 is a given BOS; by default as in training.", flags="--bos/--no-bos"
    )
    eos: bool = option(True, "End at a sampled EOS.")
    use_cache: bool = option(
        True, "Keep keys and values of finished blocks.", flags="--cache/--no-cache"
    )
    seed: int | None = option(None, "For a draw that can be repeated.")

    def __post_init__(self) -> None:
        check_limits(self)
        lowest, highest = TEMPERATURES
        if not lowest <= self.temperature <= highest:
            raise UserError(
                f"temperature is {self.temperature}; it must lie in [{lowest:g}, {highest:g}] "
                "(top_k=1 is greedy)"
            )
        if not 0 < self.top_p <= 1:
            raise UserError(f"top_p is {self.top_p}; it must lie in (0, 1], where 1 keeps all")
        if self.top_p_rule not in get_args(TopPRule):
            raise UserError(
                f"top_p_rule is {shown(self.top_p_rule)}; choose one of "
                f"{', '.join(get_args(TopPRule))}"
            )

    def settings(self) -> dict[str, Any]:
        """Those that belong to a sampler's name."""
        return {name: getattr(self, name) for name in SETTINGS}

    def check_read(self, name: str, reads: Mapping[str, Sequence[str]]) -> None:
        """Refuses settings that the sampler `name` has no use for; `reads`: what each one reads."""
        for setting, value in self.settings().items():
            if value is not None and setting not in reads[name]:
                readers = [other for other, read in reads.items() if setting in read]
                advice = f", or take {either(readers)}" if readers else ""
                raise UserError(
                    f"{setting} is {value}, which has no meaning for the sampler {name}; leave it "
                    f"out{advice}"
                )


FIELDS = {item.name: item for item in fields(SamplingParams)}
SamplingParams.__doc__ = f"{SamplingParams.__doc__}\n    Args:\n" + "\n".join(
    f"        {name}: {item.metadata['help']}" for name, item in FIELDS.items()
)


def as_params(params: SamplingParams | None = None, **options: Any) -> SamplingParams:
    """`params`, or the defaults, with what `options` say instead.

    Raises:
        UserError: an option that there is not, or a value out of range.
    """
    if isinstance(params, int):
        warnings.warn("give num_samples by name", Renamed, stacklevel=3)
        params, options = None, {"num_samples": params} | options
    if not isinstance(params, SamplingParams | None):
        raise UserError(f"params is {shown(params)}; give SamplingParams, or options by name")
    return changed(params or SamplingParams(), options)
