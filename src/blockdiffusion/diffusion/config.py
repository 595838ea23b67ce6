"""The conventions of a block diffusion model: what ids and blocks mean, for any network."""

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
Reading = Literal["same", "next", "shifted"]


class ObjectiveProperties:
    """Properties of a configuration's objective, which code asks instead of comparing its name.
    `objectives.diffusion_of` and `sampling.choosing` hold all else that objectives differ in."""

    @property
    def is_autoregressive(self: Any) -> bool:
        """Whether the network predicts the next token: it has no masks, blocks or noise."""
        return self.objective == "autoregressive"

    @property
    def is_masked_diffusion(self: Any) -> bool:
        """Whether the network is the paper's: masks in continuous time, with a cross-entropy."""
        return self.objective == "block_diffusion"


@dataclass(frozen=True, kw_only=True)
class DiffusionConfig(ObjectiveProperties):
    """How a `BlockDiffusion` reads and predicts tokens, without the sizes of its network.

    Attributes:
        vocab_size: V, including the mask token.
        seq_len: L of the training sequences. Any L that `block_size` divides can be evaluated.
        block_size: S, tokens of a diffusion block.
        mask_id: id of the mask token.
        clean_attention: whether a clean token sees all of its block ("block", as in the paper) or
            the tokens up to itself ("causal").
        block_attention: whether a noisy token sees all of its block ("full", as in the paper) or
            the tokens up to itself ("causal"). With `reading` "next" and causal clean tokens the
            latter is, from left to right, the autoregressive network itself at every block size.
        reading: what predicts token i. "same", as in the paper: the output at position i, which
            reads token i. "next": the output at position i, which reads token i - 1 in both
            streams (the first position reads `start_id`), as networks trained autoregressively
            do. "shifted", as in Fast-dLLM v2: the output at position i - 1, which reads token
            i - 1, the clean one at a block's first token; see `models/shifted.py`.
        start_id: the token before the first one with `reading` "next"; None = the mask token.
        objective: "block_diffusion"; "score_entropy" (SEDD) or "d3pm" for other diffusions inside
            a block; or "autoregressive" for the baseline that predicts the next token and has no
            blocks (its `block_size` is 1).
        time_conditioning: whether the network reads sigma; a BD3-LM does not.
        transition, timesteps, noise_schedule: for "d3pm": what a token turns into ("absorbing" for
            the mask, or "uniform"), T, and the schedule of the corruption probabilities on 1..T.
        noise_eps: the probability that a token is kept when the noise ends: 0, or 1e-3 for the
            published SEDD weights, which were trained with sigma = -log(1 - 0.999 t).
        bos: whether position 0 is a given BOS in this model's training data; None = unknown.
        bos_id, eos_id: ids of those tokens, if there are any.

    Raises:
        UserError: a value is not allowed, or contradicts another.
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
        for name in ("mask_id", "bos_id", "eos_id", "start_id"):
            value = getattr(self, name)
            check_limit(name, value)
            if (value or 0) >= self.vocab_size:
                raise UserError(
                    f"{name} {value} lies outside the vocabulary 0..{self.vocab_size - 1}"
                )
        _check_choice("clean_attention", self.clean_attention, get_args(CleanAttention))
        _check_choice("block_attention", self.block_attention, get_args(BlockAttention))
        _check_choice("reading", self.reading, get_args(Reading))
        _check_choice("objective", self.objective, get_args(Objective))
        _check_choice("transition", self.transition, get_args(Transition))
        if self.is_autoregressive and (self.block_size > 1 or self.time_conditioning):
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
                f"give 0 if the objective is {self.objective}"
            )


def _check_choice(name: str, value: Any, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise UserError(f"{name} is {shown(value)}; choose {' or '.join(allowed)}")
