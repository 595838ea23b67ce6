"""Per-token loss terms. They see tensors only, and never average: the caller normalises."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F

LOGITS = 2**24  # logits that a loss holds at a time (64 MB in float32)


def exclude_mask_token_(logits: torch.Tensor, mask_id: int) -> torch.Tensor:
    """Gives the mask token probability zero, in place (..., V); returns `logits`."""
    logits[..., mask_id] = -math.inf
    return logits


def subs_nll(logits_MV: torch.Tensor, target_M: torch.Tensor, mask_id: int) -> torch.Tensor:
    """-log p(target) in nats under the SUBS parameterisation, for M masked positions.

    SUBS (Sahoo et al. 2024; paper, section 3.1) gives the mask token probability zero, so the
    softmax runs over all other ids. Unmasked tokens are carried over: they have no term here.
    The mask token's column of `logits_MV` is overwritten, which saves a copy of M x V numbers.
    """
    return F.cross_entropy(exclude_mask_token_(logits_MV, mask_id), target_M, reduction="none")


def weighted_subs_nll(
    hidden_MD: torch.Tensor,
    output: torch.nn.Linear,
    target_M: torch.Tensor,
    weight_M: torch.Tensor,
    mask_id: int,
    *,
    most_logits: int = LOGITS,
) -> torch.Tensor:
    """Sum over M masked positions of weight times -log p(target): a scalar in nats, in float32.

    The same number, and the same gradients, as `subs_nll` of the logits `output(hidden_MD)`, but
    no more than `most_logits` logits exist at a time: they are made a few rows after another, and
    the gradient of those rows is computed at once, since the weights are known. Logits of a large
    vocabulary are most of the memory of a training step, and filling fresh memory takes time.

    Differentiable once, in `hidden_MD` and the parameters of `output`.
    """
    loss = _WeightedSubsNll.apply(
        hidden_MD, output.weight, output.bias, target_M, weight_M, mask_id, most_logits
    )
    assert isinstance(loss, torch.Tensor)
    return loss


class _WeightedSubsNll(torch.autograd.Function):
    """See `weighted_subs_nll`. The gradient of a row of logits is weight * (softmax - one-hot).

    Shape suffix: R rows at a time.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden_MD: torch.Tensor,
        weight_VD: torch.Tensor,
        bias_V: torch.Tensor | None,
        target_M: torch.Tensor,
        weight_M: torch.Tensor,
        mask_id: int,
        most_logits: int,
    ) -> torch.Tensor:
        device = hidden_MD.device.type
        autocast = torch.is_autocast_enabled(device)
        dtype = torch.get_autocast_dtype(device) if autocast else hidden_MD.dtype
        exact = torch.promote_types(dtype, torch.float32)  # of the softmax, and of all sums
        ctx.dtypes = [None if x is None else x.dtype for x in (hidden_MD, weight_VD, bias_V)]
        hidden_MD, weight_VD = hidden_MD.to(dtype), weight_VD.to(dtype)
        wanted = ctx.needs_input_grad[:3]
        grad_MD = torch.empty_like(hidden_MD) if wanted[0] else None
        grad_VD = torch.zeros_like(weight_VD, dtype=exact) if wanted[1] else None
        grad_V = torch.zeros_like(weight_VD[:, 0], dtype=exact) if wanted[2] else None
        loss = torch.zeros((), dtype=exact, device=hidden_MD.device)
        rows = min(len(target_M), max(1, most_logits // len(weight_VD)))
        logits_RV = torch.empty(rows, len(weight_VD), dtype=exact, device=hidden_MD.device)
        with torch.autocast(device, enabled=False):
            for first in range(0, len(target_M), max(1, rows)):
                part = slice(first, min(first + rows, len(target_M)))
                hidden_RD, target_R = hidden_MD[part], target_M[part, None]
                weight_R = weight_M[part, None].to(exact)
                logits_RV = logits_RV[: len(target_R)]
                _linear_into(logits_RV, hidden_RD, weight_VD, bias_V)
                exclude_mask_token_(logits_RV, mask_id)
                logits_RV -= logits_RV.amax(1, keepdim=True)
                of_target_R = logits_RV.gather(1, target_R)
                total_R = logits_RV.exp_().sum(1, keepdim=True)
                loss += (weight_R * (total_R.log() - of_target_R)).sum()
                if any(wanted):
                    logits_RV *= weight_R / total_R
                    logits_RV.scatter_add_(1, target_R, -weight_R)
                    short_RV = logits_RV.to(dtype)
                    if grad_MD is not None:
                        torch.mm(short_RV, weight_VD, out=grad_MD[part])
                    if grad_VD is not None and dtype == exact:
                        grad_VD.addmm_(short_RV.T, hidden_RD)
                    elif grad_VD is not None:
                        grad_VD += short_RV.T @ hidden_RD
                    if grad_V is not None:
                        grad_V += logits_RV.sum(0)
        ctx.grads = (grad_MD, grad_VD, grad_V)
        return loss

    @staticmethod
    def backward(ctx: Any, *grad_outputs: torch.Tensor) -> Any:
        grads, ctx.grads = ctx.grads, None
        assert grads is not None, "this loss can be differentiated only once"
        scaled = [
            None if grad is None else grad.mul_(grad_outputs[0]).to(dtype)
            for grad, dtype in zip(grads, ctx.dtypes, strict=True)
        ]
        return (*scaled, None, None, None, None)


def _linear_into(
    out_RV: torch.Tensor,
    hidden_RD: torch.Tensor,
    weight_VD: torch.Tensor,
    bias_V: torch.Tensor | None,
) -> None:
    """Writes hidden @ weight.T + bias, without a second array where the dtypes agree."""
    if out_RV.dtype != hidden_RD.dtype:
        out_RV.copy_(hidden_RD @ weight_VD.T)
    else:
        torch.mm(hidden_RD, weight_VD.T, out=out_RV)
    if bias_V is not None:
        out_RV += bias_V
