"""The options of `estimate`. This module imports no PyTorch."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, get_args

from blockdiffusion.errors import UserError, shown
from blockdiffusion.limits import check_limits
from blockdiffusion.options import option
from blockdiffusion.runtime.hardware import NAMES

SampleDtype = Literal["float32", "bfloat16", "int8"]


@dataclass(frozen=True, kw_only=True)
class SamplingRequest:
    """The texts to sample. `int8`: matrices in 8 bits, the rest in float32, on CPUs."""

    batch: int = option(1, "Sampling: rows at a time.")
    tokens_per_step: int = option(1, "Sampling: tokens that a call decides; 1 is first hitting.")
    max_new_tokens: int | None = option(None, "Sampling: by default L.")
    window: int | None = option(None, "Sampling: tokens that a token sees.")
    dtype: SampleDtype = option(
        "float32",
        "Sampling: float32, bfloat16 or int8.",
        "float32 bfloat16 int8",
        flags="--sample-dtype",
    )

    def __post_init__(self) -> None:
        check_limits(self, "--")
        if self.dtype not in get_args(SampleDtype):
            raise UserError(
                f"--sample-dtype is {shown(self.dtype)}; choose float32, bfloat16 or int8"
            )


@dataclass(frozen=True, kw_only=True)
class EstimateOptions:
    """The devices and the sizes that `estimate` is asked about."""

    device: str = option(
        "cpu",
        f"cpu (this machine, measured), {', '.join(NAMES[:-1])}; or any name, with "
        "--tflops, --bandwidth and --memory.",
        " ".join(NAMES),
    )
    devices: int = option(1, "How many share the rows of an update.")
    price_per_hour: float | None = option(None, "Of one device, in any currency.")
    tflops: float | None = option(None, "Another device: its peak in the recipe's precision.")
    bandwidth: float | None = option(None, "Another device: of its memory, GB/s.")
    memory: float | None = option(None, "Another device: GB.")
    seq_len: int | None = option(None, "L, if the data are not prepared yet.")
    vocab_size: int | None = option(None, "V with the mask, if the data are not prepared yet.")
    sampling: SamplingRequest = field(default=SamplingRequest())
