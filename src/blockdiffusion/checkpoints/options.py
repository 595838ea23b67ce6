"""The options for reading a Lightning checkpoint. This module imports no PyTorch."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Literal, get_args

from blockdiffusion.errors import UserError, shown
from blockdiffusion.limits import check_limits
from blockdiffusion.options import option

if TYPE_CHECKING:
    from blockdiffusion.diffusion.config import Objective

Target = Literal["blockdiffusion", "bd3lm"]
Weights = Literal["ema", "raw"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Kind:
    """The network of one of the authors' algorithms."""

    objective: Objective
    time_conditioning: bool = False
    has_adaln: bool = True
    has_blocks: bool = False
    one_token: bool = False  # without blocks: whether a block is one token, or else the whole row
    given_first: bool = False  # whether position 0 is given, whatever token it is
    scaled_eps: float = 0.0  # noise_eps with the option `mdlm_loss_scale`


# The authors' algo.name -> ours.
KINDS = {
    "mdlm": Kind(objective="block_diffusion"),
    "sedd": Kind(objective="score_entropy", time_conditioning=True, scaled_eps=1e-3),
    "ar": Kind(objective="autoregressive", has_adaln=False, one_token=True, given_first=True),
    "bd3lm": Kind(objective="block_diffusion", has_blocks=True),
}


@dataclass(frozen=True, kw_only=True, slots=True)
class LightningOptions:
    """Which weights to take, and what a file does not say about its network.

    What a file does say must not be contradicted. See `BlockDiffusionConfig` for the sizes. The
    authors evaluate the moving average (`ema`). The published SEDD weights were trained with
    sigma = -log(1 - 0.999 t), which is `noise_eps` 0.001.
    """

    weights: Weights = option(
        "ema", "Of a .ckpt: ema (the moving average) or raw (as trained).", "ema raw"
    )
    kind: str | None = option(
        None, "Of a .ckpt that does not say: mdlm, sedd, ar or bd3lm.", "mdlm sedd ar bd3lm"
    )
    block_size: int | None = option(None, "S, of a bd3lm .ckpt that does not say.")
    seq_len: int | None = option(None, "L, of a .ckpt that does not say.")
    num_attention_heads: int | None = option(
        None, "Heads, of a .ckpt that does not say.", was="num_heads"
    )
    mask_id: int | None = option(None, "Mask token of a .ckpt, if it is not the last id.")
    noise_eps: float | None = option(None, "Of a sedd .ckpt: 0.001 for the published weights.")

    def __post_init__(self) -> None:
        if self.weights not in get_args(Weights):
            raise UserError(f"--weights is {shown(self.weights)}; choose ema or raw")
        if self.kind is not None and self.kind not in KINDS:
            raise UserError(f"--kind is {shown(self.kind)}; choose {', '.join(KINDS)}")
        check_limits(self, "--")

    def given(self) -> list[str]:
        """The options that are not at their defaults, as the command line calls them."""
        return [flag(f.name) for f in fields(self) if getattr(self, f.name) != f.default]


def flag(name: str) -> str:
    """How the command line calls one of `LightningOptions`."""
    return "--" + name.replace("_", "-")
