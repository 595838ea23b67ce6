"""Halves of a layer with gradients of their own, which keep little and pass over little.

A layer with one modulation for all tokens computes, twice, `x + gate * dropout(linear(...))` of
`linear(norm(x) * scale + shift)`. Left to autograd it would keep the norm's output, GELU's output,
each branch before its gate and the noise of dropout in the type of the numbers. Here

* the norm's output and GELU's are computed again, in passes that cost nothing beside the products;
* the gate's gradient, sum over tokens of grad * branch, is read off the weight's: with
  M = (masked grad)^T input it is the sum over inputs of M * weight, so the branch is not needed;
* queries and keys are rotated where they are, and the mask of dropout is kept as booleans.

The numbers are those of the plain layer, to rounding. Under autocast products are of the shorter
type, as they would be; the casts of the weights are not kept.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

aten = torch.ops.aten


def gelu(h: torch.Tensor) -> torch.Tensor:
    """The tanh approximation, as in the published networks."""
    return F.gelu(h, approximate="tanh")


def norm_linear(
    x_BTD: torch.Tensor,
    scale_D: torch.Tensor,
    shift_D: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    eps: float,
) -> torch.Tensor:
    """linear(norm(x) * scale + shift), (B, T, out)."""
    out = _NormLinear.apply(x_BTD, scale_D, shift_D, weight, bias, eps)
    assert isinstance(out, torch.Tensor)
    return out


def norm_heads(
    x_BTD: torch.Tensor,
    scale_D: torch.Tensor,
    shift_D: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    cos: torch.Tensor,
    sin: torch.Tensor,
    num_heads: int,
) -> tuple[torch.Tensor, ...]:
    """Rotated queries and keys, and values, each (B, H, T, E), of a linear layer without bias
    behind the norm; cos and sin are those of `transformer.Rotary`, (T, 1, E)."""
    return _NormHeads.apply(x_BTD, scale_D, shift_D, weight, eps, cos, sin, num_heads)


def gated_sum(
    x_BTD: torch.Tensor,
    gate_D: torch.Tensor,
    h_BTI: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    *,
    has_gelu: bool,
    dropout: float,
) -> torch.Tensor:
    """x + gate * dropout(linear(h)), or of gelu(h)."""
    out = _GatedSum.apply(x_BTD, gate_D, h_BTI, weight, bias, has_gelu, dropout)
    assert isinstance(out, torch.Tensor)
    return out


def gelu_linear(h: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """linear(gelu(h)), in the type of h, which under autocast is the shorter one."""
    out = _GeluLinear.apply(h, weight, bias)
    assert isinstance(out, torch.Tensor)
    return out


def kept_by_dropout(x: torch.Tensor, dropout: float) -> torch.Tensor:
    """bool, of the shape of `x`: True with probability 1 - dropout, to 32 bits.

    On a CPU from the bits of whole words, a third of the time of PyTorch's Bernoulli numbers.
    """
    if x.device.type != "cpu":
        return torch.empty_like(x, dtype=torch.bool).bernoulli_(1 - dropout)
    words = torch.empty(-(-x.numel() // 2), dtype=torch.int64).random_(-(2**63), None)
    number = words.view(torch.int32)[: x.numel()].view(x.shape)  # in [-2^31, 2^31)
    return number >= round(dropout * 2**32) - 2**31


class _NormLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x, scale, shift, weight, bias, eps: float) -> torch.Tensor:
        return _forward_behind_norm(ctx, x, scale, shift, weight, bias, eps)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads_out: torch.Tensor) -> Any:  # pyrefly: ignore[bad-override]
        *grads, grad_2d = _backward_behind_norm(ctx, grads_out[0])
        has_bias = ctx.needs_input_grad[4]
        return *grads, grad_2d.sum(0, dtype=grads[-1].dtype) if has_bias else None, None


class _NormHeads(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x, scale, shift, weight, eps: float, cos, sin, num_heads: int
    ) -> tuple[torch.Tensor, ...]:
        out = _forward_behind_norm(ctx, x, scale, shift, weight, None, eps)
        heads = out.unflatten(-1, (3 * num_heads, -1))
        ctx.angles = [a.to(out.dtype) for a in (cos, sin)]
        _rotate_in_place(heads[:, :, : 2 * num_heads], *ctx.angles)
        return heads.transpose(1, 2).chunk(3, dim=1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads_out: torch.Tensor) -> Any:  # pyrefly: ignore[bad-override]
        grad = torch.cat([g.transpose(1, 2) for g in grads_out], 2)
        cos, sin = ctx.angles
        _rotate_in_place(grad[:, :, : 2 * grads_out[0].shape[1]], cos, -sin)
        *grads, _ = _backward_behind_norm(ctx, grad.flatten(2))
        return *grads, None, None, None, None


def _rotate_in_place(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> None:
    """`transformer.rotate`, for which there is no second array."""
    first, second = x.chunk(2, dim=-1)
    cos, sin = cos.chunk(2, dim=-1)[1], sin.chunk(2, dim=-1)[1]
    before = first.clone()
    first.mul_(cos).addcmul_(second, sin, value=-1)
    second.mul_(cos).addcmul_(before, sin)


def _linear(x, weight, bias, dtype: torch.dtype) -> torch.Tensor:
    """A linear layer computed in a type."""
    return F.linear(x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype))


def _through_linear(
    grad_2d, h, weight, weight_back, has_gelu: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradients of h, by the weight as `weight_back` has it, and of the weight, of linear(h) or
    linear(gelu(h)); products are of h's type. `grad_2d` is the output's, (tokens, out)."""
    h_2d = h.reshape(-1, h.shape[-1])
    grad_weight = (grad_2d.T @ (gelu(h_2d) if has_gelu else h_2d)).to(weight.dtype)
    grad_h = grad_2d @ weight_back.to(h.dtype)
    if has_gelu:
        grad_h = aten.gelu_backward(grad_h, h_2d, approximate="tanh")
    return grad_h.view(h.shape), grad_weight


def _product_type(x: torch.Tensor) -> torch.dtype:
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype


def _forward_behind_norm(ctx: Any, x, scale, shift, weight, bias, eps: float) -> torch.Tensor:
    short = _product_type(x)
    with torch.autocast(x.device.type, enabled=False):
        normed, mean, rstd = torch.native_layer_norm(x, scale.shape, scale, shift, eps)
        out = _linear(normed, weight, bias, short)
    ctx.save_for_backward(x, scale, shift, weight, mean, rstd)
    ctx.eps = eps
    return out


def _backward_behind_norm(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Gradients of x, scale, shift and weight; the output's as a matrix (tokens, out)."""
    x, scale, shift, weight, mean, rstd = ctx.saved_tensors
    grad_2d = grad.reshape(-1, len(weight))
    normed = torch.native_layer_norm(x, scale.shape, scale, shift, ctx.eps)[0]
    grad_normed, grad_weight = _through_linear(grad_2d, normed.to(grad.dtype), weight, weight)
    of_norm = aten.native_layer_norm_backward(
        grad_normed.to(x.dtype), x, scale.shape, mean, rstd, scale, shift, [True, True, True]
    )
    return *of_norm, grad_weight, grad_2d


class _GatedSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x, gate, h, weight, bias, has_gelu: bool, dropout: float) -> torch.Tensor:
        short, mask = _product_type(h), None
        with torch.autocast(x.device.type, enabled=False):
            inner = gelu(h) if has_gelu else h
            branch = _linear(inner, weight, bias, short)
            if dropout:
                mask = kept_by_dropout(branch, dropout)
                branch.mul_(mask)
            ctx.scale = 1 / (1 - dropout)
            out = torch.addcmul(x, gate, branch, value=ctx.scale)
        ctx.save_for_backward(gate, h, weight, bias, mask)
        ctx.has_gelu = has_gelu
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads_out: torch.Tensor) -> Any:  # pyrefly: ignore[bad-override]
        (grad,) = grads_out
        gate, h, weight, bias, mask = ctx.saved_tensors
        kept = grad.to(h.dtype) if mask is None else grad.to(h.dtype) * mask
        kept = kept.reshape(-1, len(weight))
        total = kept.sum(0, dtype=weight.dtype)
        factor = ctx.scale * gate.to(weight.dtype)
        # M of the module's text is the gradient of a weight without its factor.
        grad_h, by_token = _through_linear(kept, h, weight, factor[:, None] * weight, ctx.has_gelu)
        of_gate = (by_token * weight).sum(1)
        if bias is not None:
            of_gate += bias * total
        return (
            grad,
            (ctx.scale * of_gate).to(gate.dtype),
            grad_h,
            by_token.mul_(factor[:, None]),
            None if bias is None else factor * total,
            None,
            None,
        )


class _GeluLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, h, weight, bias) -> torch.Tensor:
        ctx.save_for_backward(h, weight)
        with torch.autocast(h.device.type, enabled=False):
            return _linear(gelu(h), weight, bias, h.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads_out: torch.Tensor) -> Any:  # pyrefly: ignore[bad-override]
        (grad,), (h, weight) = grads_out, ctx.saved_tensors
        grad_2d = grad.reshape(-1, len(weight))
        of_h, of_weight = _through_linear(grad_2d, h, weight, weight, has_gelu=True)
        return of_h, of_weight, grad_2d.sum(0, dtype=weight.dtype)
