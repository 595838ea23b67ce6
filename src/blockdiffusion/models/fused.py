"""Halves of a layer with hand-written gradients, which keep less and read and write less.

A layer with one modulation for all tokens computes, twice,

    x + gate * dropout(linear(h)),   where h follows from linear(norm(x) * scale + shift).

Autograd would keep the norm's output, the GELU's output, each branch before its gate, and the
dropout noise in the type of the numbers. Here

* the backward pass computes the outputs of norm and GELU again, which costs little beside products;
* the gradient of the gate is read off the gradient of the weight, so the branch is not kept;
* queries and keys are rotated in place, and the dropout mask is kept as booleans.

The numbers are those of the plain layer, up to rounding. Under autocast products are computed in
the shorter type, as autocast would, and the cast weights are not kept.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

aten = torch.ops.aten


def gelu(h: torch.Tensor) -> torch.Tensor:
    """Return the tanh approximation of the GELU, as in the published networks."""
    return F.gelu(h, approximate="tanh")


def norm_linear(
    x_BTD: torch.Tensor,
    scale_D: torch.Tensor,
    shift_D: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    eps: float,
) -> torch.Tensor:
    """Return linear(norm(x) * scale + shift), (B, T, out)."""
    return _NormLinear.apply(x_BTD, scale_D, shift_D, weight, bias, eps)  # type: ignore


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
    """Return rotated queries and keys, and values, each (B, H, T, E), from a linear layer without
    bias after the norm; `cos` and `sin` are those of `transformer.Rotary`, (T, 1, E)."""
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
    """Return x + gate * dropout(linear(h)), or with linear(gelu(h))."""
    return _GatedSum.apply(x_BTD, gate_D, h_BTI, weight, bias, has_gelu, dropout)  # type: ignore


def gelu_linear(h: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """Return linear(gelu(h)), in the type of h, which under autocast is the shorter one."""
    return _GeluLinear.apply(h, weight, bias)  # type: ignore


def kept_by_dropout(x: torch.Tensor, dropout: float) -> torch.Tensor:
    """Return booleans of the shape of `x`, True with probability 1 - dropout, to 32 bits.

    On a CPU they come from the bits of whole words, in a third of the time of `bernoulli_`.
    """
    if x.device.type != "cpu":
        return torch.empty_like(x, dtype=torch.bool).bernoulli_(1 - dropout)
    words = torch.empty(-(-x.numel() // 2), dtype=torch.int64).random_(-(2**63), None)
    number = words.view(torch.int32)[: x.numel()].view(x.shape)  # in [-2^31, 2^31)
    return number >= round(dropout * 2**32) - 2**31


# --- norm, then a linear layer ------------------------------------------------------------------


class _NormLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x, scale, shift, weight, bias, eps: float) -> torch.Tensor:
        return _forward_norm_linear(ctx, x, scale, shift, weight, bias, eps)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads_out: torch.Tensor) -> Any:  # pyrefly: ignore[bad-override]
        *grads, grad_2d = _backward_norm_linear(ctx, grads_out[0])
        # out = normed @ weight.T + bias, so the gradient of the bias is the sum over tokens.
        has_bias = ctx.needs_input_grad[4]
        return *grads, grad_2d.sum(0, dtype=grads[-1].dtype) if has_bias else None, None


class _NormHeads(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x, scale, shift, weight, eps: float, cos, sin, num_heads: int
    ) -> tuple[torch.Tensor, ...]:
        out = _forward_norm_linear(ctx, x, scale, shift, weight, None, eps)
        heads = out.unflatten(-1, (3 * num_heads, -1))
        ctx.angles = [a.to(out.dtype) for a in (cos, sin)]
        _rotate_in_place(heads[:, :, : 2 * num_heads], *ctx.angles)
        return heads.transpose(1, 2).chunk(3, dim=1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads_out: torch.Tensor) -> Any:  # pyrefly: ignore[bad-override]
        grad = torch.cat([g.transpose(1, 2) for g in grads_out], 2)
        cos, sin = ctx.angles
        # A rotation is orthogonal: its gradient is the rotation by the opposite angle.
        _rotate_in_place(grad[:, :, : 2 * grads_out[0].shape[1]], cos, -sin)
        *grads, _ = _backward_norm_linear(ctx, grad.flatten(2))
        return *grads, None, None, None, None


def _rotate_in_place(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> None:
    """`transformer.rotate` without a second array of the size of `x`."""
    first, second = x.chunk(2, dim=-1)
    cos, sin = cos.chunk(2, dim=-1)[1], sin.chunk(2, dim=-1)[1]  # the halves without the minus sign
    before = first.clone()
    first.mul_(cos).addcmul_(second, sin, value=-1)
    second.mul_(cos).addcmul_(before, sin)


def _forward_norm_linear(ctx: Any, x, scale, shift, weight, bias, eps: float) -> torch.Tensor:
    short = _product_type(x)
    with torch.autocast(x.device.type, enabled=False):
        normed, mean, rstd = torch.native_layer_norm(x, scale.shape, scale, shift, eps)
        out = _linear(normed, weight, bias, short)
    # Not `normed`: the two numbers per token, mean and 1/std, make it again.
    ctx.save_for_backward(x, scale, shift, weight, mean, rstd)
    ctx.eps = eps
    return out


def _backward_norm_linear(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Gradients of x, scale, shift and weight; and `grad` as a matrix (tokens, out)."""
    x, scale, shift, weight, mean, rstd = ctx.saved_tensors
    grad_2d = grad.reshape(-1, len(weight))
    # The norm again: its output is one factor of the weight's gradient.
    normed = torch.native_layer_norm(x, scale.shape, scale, shift, ctx.eps)[0]
    grad_normed, grad_weight = _through_linear(grad_2d, normed.to(grad.dtype), weight, weight)
    of_norm = aten.native_layer_norm_backward(
        grad_normed.to(x.dtype), x, scale.shape, mean, rstd, scale, shift, [True, True, True]
    )
    return *of_norm, grad_weight, grad_2d


# --- a linear layer, then dropout, gate and sum ---------------------------------------------------


class _GatedSum(torch.autograd.Function):
    """out = x + gate * c * mask * branch with branch = inner @ weight.T + bias, where inner is h or
    gelu(h), and c = 1 / (1 - dropout)."""

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
        # G = mask * grad; the sums below run over tokens n.
        kept = grad.to(h.dtype) if mask is None else grad.to(h.dtype) * mask
        kept = kept.reshape(-1, len(weight))
        total = kept.sum(0, dtype=weight.dtype)
        # The gradient of the branch is c * gate * G. The factor is applied to the weight, which is
        # smaller than G: grad_inner = (c * gate * G) @ weight = G @ (c * gate * weight).
        factor = ctx.scale * gate.to(weight.dtype)
        # by_token is M = G.T @ inner, the gradient of the weight without the factor c * gate.
        grad_h, by_token = _through_linear(kept, h, weight, factor[:, None] * weight, ctx.has_gelu)
        # The gradient of gate_o is c * sum_n G[n, o] branch[n, o]. With the branch written out,
        #   sum_n G[n, o] (sum_i inner[n, i] weight[o, i] + bias[o])
        #     = sum_i M[o, i] weight[o, i] + bias[o] * sum_n G[n, o],
        # so it needs M, which is there anyway, and not the branch.
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


def _through_linear(
    grad_2d, h, weight, weight_back, has_gelu: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradients of h and of the weight of linear(h), or of linear(gelu(h)), whose output has the
    gradient `grad_2d` (tokens, out). The gradient of h is taken through `weight_back`."""
    h_2d = h.reshape(-1, h.shape[-1])
    # GELU's output again, as the factor of the weight's gradient; only its input was kept.
    grad_weight = (grad_2d.T @ (gelu(h_2d) if has_gelu else h_2d)).to(weight.dtype)
    grad_h = grad_2d @ weight_back.to(h.dtype)
    if has_gelu:
        grad_h = aten.gelu_backward(grad_h, h_2d, approximate="tanh")
    return grad_h.view(h.shape), grad_weight


def _linear(x, weight, bias, dtype: torch.dtype) -> torch.Tensor:
    return F.linear(x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype))


def _product_type(x: torch.Tensor) -> torch.dtype:
    """The type of products: autocast's, if it is on."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
