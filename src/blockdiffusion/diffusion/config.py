"""The conventions of a block diffusion model: what ids and blocks mean, whatever the network is."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, get_args

from blockdiffusion.diffusion.estimators import Transition
from blockdiffusion.diffusion.schedules import make_schedule
from blockdiffusion.errors import UserError, shown
from blockdiffusion.limits import check_limit

Objective = Literal["block_diffusion", "score_entropy", "d3pm", "autoregressive"]
CleanAttention = Literal["block", "causal"]
BlockAttention = Literal["full", "causal"]
Reading = Literal["same", "next"]


@dataclass(frozen=True, kw_only=True)
class DiffusionConfig:
    """How a `BlockDiffusion` reads and predicts tokens; the sizes of its network are not here.

    Attributes:
        vocab_size: V, the mask token included.
        seq_len: L of the training sequences. Any L that `block_size` divides can be evaluated.
        block_size: S, tokens of a diffusion block.
        mask_id: id of the mask token.
        clean_attention: how clean tokens see each other: whole blocks ("block", paper), or each
            those up to itself ("causal").
        block_attention: how noisy tokens of a block see each other: all of them ("full", paper), or
            each those up to itself ("causal"). With `reading` "next" and causal clean tokens the
            latter is, from left to right, the autoregressive network itself at every block size.
        reading: the network's output at position i speaks of token i ("same", paper), or of token
            i + 1 ("next", as networks trained autoregressively do): then position i reads token
            i - 1, in both streams, and the first reads `start_id`.
        start_id: what stands before the first token with `reading` "next"; None: the mask token.
        objective: "block_diffusion"; "score_entropy" (SEDD) or "d3pm", for other diffusions inside
            a block; or "autoregressive" for the baseline that predicts the next token and has no
            blocks (its `block_size` is 1).
        time_conditioning: whether the network reads sigma; a BD3-LM does not.
        transition, timesteps, noise_schedule: of "d3pm": what tokens turn into ("absorbing" for the
            mask, "uniform"), T, and the schedule of the mask (or jump) probabilities on 1..T.
        noise_eps: noise ends where a token is still kept with this probability: 0, and 1e-3 for the
            published SEDD weights, which were trained with sigma = -log(1 - 0.999 t).
        bos: whether position 0 is a given BOS in this model's training data; None = not known.
        bos_id, eos_id: ids of those tokens, where there are any.

    Raises:
        UserError: a value is not allowed, or does not go with another.
    """

    vocab_size: int
    seq_len: int
    block_size: int
    mask_id: int
    clean_attention: CleanAttention = "block"
    block_attention: BlockAttention = "full"
    reading: Reading = "same"
    start_id: int | None = None
    objective: Objective = "block_diffusion"
    time_conditioning: bool = False
    transition: Transition = "absorbing"
    timesteps: int | None = None
    noise_schedule: str = "linear"
    noise_eps: float = 0.0
    bos: bool | None = None
    bos_id: int | None = None
    eos_id: int | None = None

    def __post_init__(self) -> None:
        for name in ("vocab_size", "seq_len", "block_size", "timesteps", "noise_eps"):
            check_limit(name, getattr(self, name))
        if self.seq_len % self.block_size:
            raise UserError(
                f"the sequence length {self.seq_len} is not a multiple of the block size "
                f"{self.block_size}; choose a block_size that divides it"
            )
        self._check_ids()
        _check_choice("clean_attention", self.clean_attention, get_args(CleanAttention))
        _check_choice("block_attention", self.block_attention, get_args(BlockAttention))
        _check_choice("reading", self.reading, get_args(Reading))
        _check_choice("objective", self.objective, get_args(Objective))
        _check_choice("transition", self.transition, get_args(Transition))
        if self.objective == "autoregressive" and (self.block_size > 1 or self.time_conditioning):
            raise UserError(
                "an autoregressive network has no blocks and reads no time; give it block_size 1 "
                "and time_conditioning false"
            )
        if self.objective == "d3pm" and (self.timesteps is None or self.timesteps < 1):
            raise UserError(
                f"timesteps is {self.timesteps}; a d3pm network needs at least 1 time step"
            )
        make_schedule(self.noise_schedule)  # refuses an unknown one
        if not 0 <= self.noise_eps < 1:
            raise UserError(f"noise_eps is {self.noise_eps}; it must lie in [0, 1)")
        if self.noise_eps and self.objective not in ("score_entropy", "d3pm"):
            raise UserError(
                f"noise_eps is {self.noise_eps}, which only score_entropy and d3pm networks have; "
                f"give 0 where the objective is {self.objective}"
            )

    def _check_ids(self) -> None:
        for name in ("mask_id", "bos_id", "eos_id", "start_id"):
            value = getattr(self, name)
            check_limit(name, value)
            if (value or 0) >= self.vocab_size:
                raise UserError(
                    f"{name} {value} lies outside the vocabulary 0..{self.vocab_size - 1}"
                )


def _check_choice(name: str, value: Any, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise UserError(f"{name} is {shown(value)}; choose {' or '.join(allowed)}")
