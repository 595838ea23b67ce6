"""The options of `generate`. This module imports no PyTorch: the command line is made from it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated

from blockdiffusion.limits import check_limits
from blockdiffusion.options import all_but, option
from blockdiffusion.sampling.params import SamplingParams

# What a line of prompts may say for itself; the window is one for all.
OF_LINE = (
    "max_new_tokens", "sampler", "steps", "schedule", "tokens_per_step", "threshold", "sub_block",
    "remask", "top_p", "top_p_rule", "top_k", "temperature", "bos", "eos", "seed",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class BatchOptions:
    """How many prompts are sampled, unless their lines say otherwise."""

    sampling: Annotated[SamplingParams, all_but(SamplingParams, "stride", "use_cache")] = field(
        default=SamplingParams(max_new_tokens=256, seed=0)
    )
    max_rows: int = option(8, "Requests in a pass; more are faster together, and take more memory.")

    def __post_init__(self) -> None:
        check_limits(self)
