"""Per-token loss terms. They see tensors only, and never average: the caller normalises."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F


class Pieces(NamedTuple):
    """How `weighted_subs_nll` makes its logits.

    Attributes:
        most_logits: the most at a time.
        aligned: rows of logits are padded to a multiple of it with tokens of probability zero.
    """

    most_logits: int
    aligned: int


CPU_PIECES = Pieces(2**24, 1)  # 64 MB in float32
# 1 GB: small products are slow on GPUs, and so are rows that are not aligned.
GPU_PIECES = Pieces(2**28, 64)


def usual_pieces(device: torch.device) -> Pieces:
    """Return the pieces that suit a device."""
    return GPU_PIECES if device.type == "cuda" else CPU_PIECES


def exclude_mask_token_(logits: torch.Tensor, mask_id: int) -> torch.Tensor:
    """Give the mask token probability zero in place (..., V); return `logits`."""
    logits[..., mask_id] = -math.inf
    return logits


def subs_nll(logits_MV: torch.Tensor, target_M: torch.Tensor, mask_id: int) -> torch.Tensor:
    """Return -log p(target) in nats under the SUBS parameterisation, for M masked positions.

    SUBS (Sahoo et al. 2024; paper, section 3.1) gives the mask token probability zero, so the
    softmax runs over all other ids. Unmasked tokens are carried over and have no term here. The
    mask token's column of `logits_MV` is overwritten, which saves a copy of M x V numbers.
    """
    return F.cross_entropy(exclude_mask_token_(logits_MV, mask_id), target_M, reduction="none")


def weighted_subs_nll(
    hidden_MD: torch.Tensor,
    output: torch.nn.Linear,
    target_M: torch.Tensor,
    weight_M: torch.Tensor,
    mask_id: int,
    *,
    pieces: Pieces | None = None,
) -> torch.Tensor:
    """Return the sum over M masked positions of weight times -log p(target): a scalar in nats, in
    float32.

    The value and the gradients are those of `subs_nll` of the logits `output(hidden_MD)`. But the
    logits are made in `pieces` of rows (None = what suits the device), and the gradient of a piece
    is computed with it, since the weights are known. The logits of a large vocabulary would take
    most of the memory of a training step, and filling fresh memory takes time.

    Differentiable once, in `hidden_MD` and the parameters of `output`.
    """
    if pieces is None:
        pieces = usual_pieces(hidden_MD.device)
    loss = _WeightedSubsNll.apply(
        hidden_MD, output.weight, output.bias, target_M, weight_M, mask_id, pieces
    )
    assert isinstance(loss, torch.Tensor)
    return loss


class _WeightedSubsNll(torch.autograd.Function):
    """`weighted_subs_nll`. The gradient of a row of logits is weight * (softmax - one-hot).

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
        pieces: Pieces,
    ) -> torch.Tensor:
        device = hidden_MD.device.type
        autocast = torch.is_autocast_enabled(device)
        dtype = torch.get_autocast_dtype(device) if autocast else hidden_MD.dtype
        exact = torch.promote_types(dtype, torch.float32)  # of the softmax, and of all sums
        ctx.dtypes = [None if x is None else x.dtype for x in (hidden_MD, weight_VD, bias_V)]
        vocab = len(weight_VD)
        hidden_MD, weight_VD = hidden_MD.to(dtype), weight_VD.to(dtype)
        if spare := -vocab % pieces.aligned:
            weight_VD = F.pad(weight_VD, (0, 0, 0, spare))
            bias_V = None if bias_V is None else F.pad(bias_V, (0, spare))
        wanted = ctx.needs_input_grad[:3]
        grad_MD = torch.empty_like(hidden_MD) if wanted[0] else None
        # The first product overwrites it, if there is one.
        make = torch.empty_like if len(target_M) else torch.zeros_like
        grad_VD = make(weight_VD, dtype=exact) if wanted[1] else None
        grad_V = torch.zeros_like(weight_VD[:, 0], dtype=exact) if wanted[2] else None
        loss = torch.zeros((), dtype=exact, device=hidden_MD.device)
        rows = min(len(target_M), max(1, pieces.most_logits // len(weight_VD)))
        logits_RV = torch.empty(rows, len(weight_VD), dtype=exact, device=hidden_MD.device)
        with torch.autocast(device, enabled=False):
            for first in range(0, len(target_M), max(1, rows)):
                part = slice(first, min(first + rows, len(target_M)))
                hidden_RD, target_R = hidden_MD[part], target_M[part, None]
                weight_R = weight_M[part, None].to(exact)
                logits_RV = logits_RV[: len(target_R)]
                _linear_into(logits_RV, hidden_RD, weight_VD, bias_V)
                exclude_mask_token_(logits_RV, mask_id)
                logits_RV[:, vocab:] = -math.inf
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
                    if grad_VD is not None:
                        _add_product(grad_VD, short_RV.T, hidden_RD, is_first=not first)
                    if grad_V is not None:
                        grad_V += logits_RV.sum(0)
        ctx.grads = (
            grad_MD,
            None if grad_VD is None else grad_VD[:vocab],
            None if grad_V is None else grad_V[:vocab],
        )
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


def _add_product(into: torch.Tensor, a: torch.Tensor, b: torch.Tensor, is_first: bool) -> None:
    """into += a @ b, or into = a @ b the first time."""
    if into.dtype == a.dtype:
        torch.addmm(into, a, b, beta=0 if is_first else 1, out=into)
    elif is_first:
        into.copy_(a @ b)
    else:
        into += a @ b


def _linear_into(
    out_RV: torch.Tensor,
    hidden_RD: torch.Tensor,
    weight_VD: torch.Tensor,
    bias_V: torch.Tensor | None,
) -> None:
    """Write hidden @ weight.T + bias, without a second array if the types agree."""
    if out_RV.dtype != hidden_RD.dtype:
        out_RV.copy_(hidden_RD @ weight_VD.T)
    else:
        torch.mm(hidden_RD, weight_VD.T, out=out_RV)
    if bias_V is not None:
        out_RV += bias_V


# --- SEDD: score entropy ----------------------------------------------------------------------


def log_rate(logits_MV: torch.Tensor, mask_id: int) -> torch.Tensor:
    """Return log C (M,) for C = (e^sigma - 1) sum over y of s_y, at masked positions.

    SEDD's reverse process reveals faster than the true one by the factor C, which is 1 for true
    scores. The mask token's column of `logits_MV` is overwritten.
    """
    total_M = exclude_mask_token_(logits_MV, mask_id).logsumexp(-1)
    return total_M - math.log(logits_MV.shape[-1] - 1)


def score_entropy(logits_MV: torch.Tensor, target_M: torch.Tensor, mask_id: int) -> torch.Tensor:
    """Return the score entropy of M masked positions in nats, over r = 1 / (e^sigma - 1).

    Lou et al. (2024), section 3, for absorbing noise:

        sum over y of s_y - r log s_x0 + r (log r - 1)  =  r (C - 1 - log C - log(c_x0 / C)),

    where c_y = s_y / r = exp(logit_y) / (V - 1) and C is their sum (see `log_rate`). In this form
    nothing grows as sigma goes to 0. Its weight in the bound is dsigma/dt r = p'(t) / p(t), that of
    `subs_nll`: score entropy is the cross-entropy of the normalised scores, and C - 1 - log C >= 0.
    The mask token's column of `logits_MV` is overwritten.
    """
    logits_MV = _precise(logits_MV)
    total_M = log_rate(logits_MV, mask_id)
    own_M = logits_MV.gather(-1, target_M[:, None])[:, 0] - math.log(logits_MV.shape[-1] - 1)
    return total_M.exp() - 1 - own_M


# --- D3PM: discrete time, x0-parameterised ----------------------------------------------------


def uniform_kl(
    logits_MV: torch.Tensor,
    target_M: torch.Tensor,
    noisy_M: torch.Tensor,
    keep_M: torch.Tensor,
    keep_before_M: torch.Tensor,
    mask_id: int,
) -> torch.Tensor:
    """Return KL(q(x_s | x_t, x_0) || p(x_s | x_t)) in nats, uniform D3PM, M positions, s < t.

    A token is kept up to time t with probability keep_t, and is otherwise uniform over the V - 1
    tokens other than the mask. With the network's p(x_0 | x_t) in place of x_0 (Austin et al. 2021,
    equation 4), p(x_s | x_t) is in proportion to q(x_t | x_s) (keep_s p(x_s) + (1 - keep_s) / (V -
    1)). At s = 0 (keep_s = 1) the divergence is the reconstruction term -log p(x_0 | x_t).

    Only the factors of the target and the noisy token differ from those of all other tokens, so one
    sum over the vocabulary is enough. The mask token's column of `logits_MV` is overwritten.

    Args:
        target_M: x_0. noisy_M: x_t.
        keep_M, keep_before_M: keep_t and keep_s, float64, on the CPU.
    """
    tokens = logits_MV.shape[-1] - 1
    prob_MV = exclude_mask_token_(_precise(logits_MV), mask_id).softmax(-1)
    step_M = keep_M / keep_before_M  # kept from s to t
    # Differences from 1 are taken in float64: with many steps they are tiny.
    step_M, jump_M, keep_M, blank_M, keep_before_M, spread_M = (
        x.to(prob_MV.device, prob_MV.dtype)
        for x in (
            step_M, (1 - step_M) / tokens, keep_M, (1 - keep_M) / tokens,
            keep_before_M, (1 - keep_before_M) / tokens,
        )
    )  # fmt: skip

    tiny = torch.finfo(prob_MV.dtype).tiny
    before_MV = (keep_before_M[:, None] * prob_MV + spread_M[:, None]).clamp_min(tiny)
    log_before_MV = before_MV.log()  # log of the model's factor at x_s; the mask's is left out
    log_mask_M = log_before_MV[:, mask_id]
    log_target_M = log_before_MV.gather(-1, target_M[:, None])[:, 0]
    log_noisy_M = log_before_MV.gather(-1, noisy_M[:, None])[:, 0]
    noisy_prob_M = prob_MV.gather(-1, noisy_M[:, None])[:, 0]

    same_M = (target_M == noisy_M).to(prob_MV.dtype)
    true_M, model_M = keep_M * same_M + blank_M, keep_M * noisy_prob_M + blank_M  # of x_t
    log_spread_M = spread_M.clamp_min(tiny).log()
    # q(x_s) log(q's factor / model's factor): at the target, at the noisy token, at all others.
    at_target_M = (step_M * same_M + jump_M) * (
        (keep_before_M + spread_M) * ((keep_before_M + spread_M).log() - log_target_M)
    )
    at_noisy_M = step_M * (1 - same_M) * spread_M * (log_spread_M - log_noisy_M)
    log_rest_M = log_before_MV.sum(-1) - log_mask_M - log_target_M
    at_rest_M = jump_M * spread_M * ((tokens - 1) * log_spread_M - log_rest_M)
    return (at_target_M + at_noisy_M + at_rest_M) / true_M + (model_M / true_M).log()


def uniform_reverse(
    prob_MV: torch.Tensor,
    noisy_M: torch.Tensor,
    keep: float,
    keep_before: float,
    mask_id: int,
) -> torch.Tensor:
    """Return p(x_s | x_t) (M, V) of uniform D3PM, not normalised, from the denoiser's p(x_0 | x_t);
    see `uniform_kl`. `prob_MV` and the result give the mask token probability zero."""
    tokens = prob_MV.shape[-1] - 1
    step = keep / keep_before
    before_MV = keep_before * prob_MV + (1 - keep_before) / tokens
    before_MV[:, mask_id] = 0
    from_MV = torch.full_like(before_MV, (1 - step) / tokens)
    from_MV.scatter_add_(-1, noisy_M[:, None], torch.full_like(from_MV[:, :1], step))
    return from_MV * before_MV


def prior_kl(keep: float, tokens: int, absorbing: bool) -> float:
    """Return KL(q(x_T | x_0) || prior) in nats of one token that is kept to the end with
    probability `keep`; 0 at keep = 0.

    The prior of uniform noise is uniform over the `tokens` other than the mask. That of absorbing
    noise is the mask or, with probability `keep`, a uniform token: so the divergence is finite.
    """
    if absorbing:
        return keep * math.log(tokens)
    share = (1 - keep) / tokens
    rest = (tokens - 1) * share * math.log1p(-keep) if keep < 1 else 0.0
    return (keep + share) * math.log(keep * tokens + 1 - keep) + rest


def _precise(logits: torch.Tensor) -> torch.Tensor:
    """Logits in float32 at least: under autocast they come in a shorter type."""
    return logits.to(torch.promote_types(logits.dtype, torch.float32))
