"""AdamW whose moments take a byte a number instead of four.

Moments are coded in pieces of 256 numbers, each with its largest size in float32 (blockwise
quantization, Dettmers et al. 2022, "8-bit Optimizers via Block-wise Quantization"). A number is
coded by a root of its share of the largest, so that small ones keep their relative precision:

    first moment   m = sign(c) (c / 127)^2 m_max,   c in -127 .. 127
    second moment  v = (c / 255)^4 v_max,           c in 0 .. 255

Codes are rounded at random, up or down, so that the expected code is right: an average that moves
by a thousandth a step would otherwise never leave its code. The draws depend on the step and on the
parameter's number alone, and moments are saved decoded, which loses nothing: a run resumes bit for
bit, and a checkpoint is one of AdamW.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from blockdiffusion.runtime.seeding import derive_seed

PIECE = 256
MOMENTS = ("exp_avg", "exp_avg_sq")


class Coded:
    """A tensor of numbers in 8 bits.

    Args:
        values: the numbers.
        signed: whether some may be negative; decides on the code, see above.
        generator: of the rounding; None = to the nearest code.
    """

    def __init__(
        self, values: torch.Tensor, signed: bool, generator: torch.Generator | None = None
    ):
        self.shape, self.signed = values.shape, signed
        self._most, self._power = (127, 2) if signed else (255, 4)
        self.encode(values, generator)

    def encode(self, values: torch.Tensor, generator: torch.Generator | None) -> None:
        """Code other numbers of the same shape."""
        flat = values.flatten()
        pieces = F.pad(flat, (0, -len(flat) % PIECE)).view(-1, PIECE)
        self.largest = pieces.abs().amax(1, keepdim=True)
        share = pieces.abs().div_(self.largest.clamp_min(torch.finfo(pieces.dtype).tiny))
        for _ in range(self._power // 2):
            share.sqrt_()
        share.mul_(self._most)
        if generator is None:
            share.round_()
        else:
            share.add_(torch.rand(share.shape, generator=generator, device=share.device)).floor_()
        share.clamp_(max=self._most)
        self.codes = share.mul_(pieces.sign()).char() if self.signed else share.byte()

    def decode(self) -> torch.Tensor:
        """Return the numbers in float32."""
        share = self.codes.float().div_(self._most)
        pieces = share.square() if self._power == 4 else share
        pieces = pieces.square().mul_(self.largest)
        if self.signed:
            pieces.mul_(self.codes.sign())
        return pieces.flatten()[: self.shape.numel()].view(self.shape)


class AdamW8bit(torch.optim.Optimizer):
    """AdamW with coded moments; weights and gradients are what they are.

    Args:
        groups: as those of `torch.optim.AdamW`, with `weight_decay`.
    """

    def __init__(self, groups: list[dict[str, Any]], lr: float, betas: tuple[float, float],
                 eps: float):  # fmt: skip
        super().__init__(groups, {"lr": lr, "betas": betas, "eps": eps})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        assert closure is None
        number = 0
        for group in self.param_groups:
            for parameter in group["params"]:
                number += 1
                if parameter.grad is not None:
                    self._update(parameter, group, number)

    def _update(self, parameter: nn.Parameter, group: dict[str, Any], number: int) -> None:
        grad, state = parameter.grad, self.state[parameter]
        assert grad is not None
        if not state:
            zero = torch.zeros_like(grad, dtype=torch.float32)
            self.load_moments(parameter, {"step": torch.zeros(()), **dict.fromkeys(MOMENTS, zero)})
            state = self.state[parameter]
        state["step"] += 1
        step, (beta1, beta2) = int(state["step"]), group["betas"]
        mean, square = state["exp_avg"].decode(), state["exp_avg_sq"].decode()
        mean.lerp_(grad.float(), 1 - beta1)
        square.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
        parameter.mul_(1 - group["lr"] * group["weight_decay"])
        size = (square / (1 - beta2**step)).sqrt_().add_(group["eps"])
        parameter.addcdiv_(mean, size, value=-group["lr"] / (1 - beta1**step))
        generator = torch.Generator(grad.device)
        generator.manual_seed(derive_seed(step, "moments", number))
        state["exp_avg"].encode(mean, generator)
        state["exp_avg_sq"].encode(square, generator)

    def moments(self, parameter: nn.Parameter) -> dict[str, torch.Tensor]:
        """Return the state of a parameter as `torch.optim.AdamW` has it."""
        state = self.state[parameter]
        return {name: v.decode() if isinstance(v, Coded) else v for name, v in state.items()}

    def load_moments(self, parameter: nn.Parameter, moments: Mapping[str, torch.Tensor]) -> None:
        """Take the state of a parameter as `torch.optim.AdamW` has it."""
        mean, square = (moments[name] for name in MOMENTS)
        self.state[parameter] = {
            "step": moments["step"].cpu(),
            "exp_avg": Coded(mean, signed=True),
            "exp_avg_sq": Coded(square, signed=False),
        }
