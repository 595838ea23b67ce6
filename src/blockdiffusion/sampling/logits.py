"""From logits to a token: temperature, top-k, top-p, and a draw.

Filters act on the denoiser's p(x0 | .), which gives the mask token probability zero.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import get_args

import torch

from blockdiffusion.diffusion.losses import exclude_mask_token_
from blockdiffusion.errors import UserError, shown
from blockdiffusion.models.cuda_graphs import Recorder
from blockdiffusion.sampling.nucleus import Nucleus, TopPRule, draw_from_sorted, sorted_nuclei

RECORDED_LOGITS = 2**22  # draws from more take long anyway, and recordings hold memory
NOT_FINITE = (
    "the network's logits are not finite (nan or infinity), so nothing can be drawn: its numbers "
    "overflow, or its weights have diverged; sample in float32, or take an earlier checkpoint"
)
TEMPERATURES = (1e-3, 1e3)  # beyond them quotients of logits overflow, or nothing is left of them


@dataclass(frozen=True, kw_only=True)
class Filters:
    """How the distribution of a token is changed before the draw; the defaults change nothing.

    Attributes:
        temperature: logits are divided by it; in [0.001, 1000].
        top_k: keep the k most likely tokens; None = all.
        top_p: keep the most likely tokens up to this probability, in (0, 1]; 1 = all.
        top_p_rule: "transformers" keeps the token that crosses top_p; "authors" drops it, but
            always keeps the first (the published results use theirs).
    """

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float = 1.0
    top_p_rule: TopPRule = "transformers"

    def __post_init__(self) -> None:
        lowest, highest = TEMPERATURES
        if not lowest <= self.temperature <= highest:
            raise UserError(
                f"temperature is {self.temperature}; it must lie in [{lowest:g}, {highest:g}] "
                "(top_k=1 is greedy)"
            )
        if self.top_k is not None and self.top_k < 1:
            raise UserError(f"top_k is {self.top_k}; it must be at least 1")
        if not 0 < self.top_p <= 1:
            raise UserError(f"top_p is {self.top_p}; it must lie in (0, 1], where 1 keeps all")
        if self.top_p_rule not in get_args(TopPRule):
            raise UserError(
                f"top_p_rule is {shown(self.top_p_rule)}; choose one of "
                f"{', '.join(get_args(TopPRule))}"
            )


def draw_tokens(
    logits_MV: torch.Tensor, mask_id: int, filters: Filters, uniform_M: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Draws M tokens; returns their ids and the denoiser's probabilities of them, both (M,).

    The probabilities are those before filtering. The draw inverts the cumulative distribution in
    float64 with one number of `uniform_M`, in [0, 1), per token (Gumbel noise in float32 over a
    large vocabulary would lower the temperature: Zheng et al. 2024). `logits_MV` may be
    overwritten.
    """
    draw = partial(_drawn, mask_id, filters)
    uniform_M = uniform_M.to(logits_MV.device)
    if logits_MV.device.type != "cuda" or not 0 < logits_MV.numel() <= RECORDED_LOGITS:
        return draw(logits_MV, uniform_M)
    kind = (logits_MV.shape, logits_MV.dtype, logits_MV.device, mask_id, filters)
    token_M, confidence_M = _recorded_draws().run(kind, draw, (logits_MV, uniform_M))
    return token_M, confidence_M


def _drawn(
    mask_id: int, filters: Filters, logits_MV: torch.Tensor, uniform_M: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """`draw_tokens` with given numbers in [0, 1)."""
    prob_MV = probabilities(exclude_mask_token_(logits_MV, mask_id))
    warm_MV = (
        prob_MV if filters.temperature == 1 else probabilities(logits_MV / filters.temperature)
    )
    kept_MC, ids_MC = _top_k(warm_MV, filters.top_k)
    if filters.top_p == 1 or not len(kept_MC):
        choice_M = draw_columns(kept_MC, uniform_M)
    elif kept_MC.device.type == "cpu":
        choice_M = _from_nuclei(kept_MC, filters, uniform_M)
    else:
        choice_M = draw_from_sorted(kept_MC, filters.top_p, filters.top_p_rule, uniform_M)
    token_M1 = choice_M[:, None] if ids_MC is None else ids_MC.gather(1, choice_M[:, None])
    confidence_M = prob_MV.gather(1, token_M1)[:, 0]
    if prob_MV.device.type == "cpu":
        return token_M1[:, 0], confidence_M
    # A GPU is not waited for: `refuse_masks_written` finds the mask, which is never drawn.
    return token_M1[:, 0].where(confidence_M == confidence_M, mask_id), confidence_M


def probabilities(logits_MV: torch.Tensor) -> torch.Tensor:
    """The softmax of every row.

    Raises:
        UserError: on a CPU, where logits are not finite: then all of their row is nan.
    """
    prob_MV = logits_MV.softmax(-1)
    if prob_MV.device.type == "cpu" and not math.isfinite(prob_MV.select(-1, 0).sum().item()):
        raise UserError(NOT_FINITE)
    return prob_MV


def refuse_masks_written(ids: torch.Tensor, mask_id: int) -> None:
    """Refuses a finished text with the mask token, which stands where logits were not finite."""
    if bool((ids == mask_id).any()):
        raise UserError(NOT_FINITE)


@lru_cache(maxsize=1)
def _recorded_draws() -> Recorder:
    """Of all samplers of this process: a draw is some thirty kernels."""
    return Recorder(most=8)


def draw_columns(weight_MC: torch.Tensor, uniform_M: torch.Tensor) -> torch.Tensor:
    """A column (M,) of every row, drawn in proportion to its weight by inversion in float64."""
    cumulative_MC = weight_MC.double().cumsum(-1)
    target_M1 = uniform_M[:, None] * cumulative_MC[:, -1:]
    found_M = torch.searchsorted(cumulative_MC, target_M1, right=True)[:, 0]
    if found_M.device.type == "cpu":
        return found_M
    return found_M.clamp(max=weight_MC.shape[-1] - 1)  # beyond where a weight is nan


def _from_nuclei(
    weight_MC: torch.Tensor, filters: Filters, uniform_M: torch.Tensor
) -> torch.Tensor:
    """`draw_columns` of the nuclei of the rows."""
    return torch.stack([
        Nucleus(weight_C, filters.top_p, filters.top_p_rule).draw(uniform)
        for weight_C, uniform in zip(weight_MC, uniform_M.tolist(), strict=True)
    ])  # fmt: skip


def filtered_probs(prob_MV: torch.Tensor, filters: Filters) -> torch.Tensor:
    """A denoiser's distributions (M, V) after the filters, normalised; float64."""
    if filters.temperature != 1:
        prob_MV = (prob_MV.log() / filters.temperature).softmax(-1)
    kept_MC, ids_MC = _nuclei(*_top_k(prob_MV, filters.top_k), filters)
    if ids_MC is not None:
        kept_MC = torch.zeros_like(prob_MV).scatter(-1, ids_MC, kept_MC)
    return kept_MC.double() / kept_MC.double().sum(-1, keepdim=True)


def _top_k(prob_MV: torch.Tensor, top_k: int | None) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The probabilities that stay, and their ids (None = all, in order)."""
    if top_k is None or top_k >= prob_MV.shape[-1]:
        return prob_MV, None
    return prob_MV.topk(top_k, dim=-1)


def _nuclei(
    prob_MC: torch.Tensor, ids_MC: torch.Tensor | None, filters: Filters
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The same with zeros outside the nuclei (of what top-k left, renormalised)."""
    if filters.top_p == 1 or not len(prob_MC):
        return prob_MC, ids_MC
    if prob_MC.device.type == "cpu":
        rule = filters.top_p_rule
        inside = [Nucleus(prob_C, filters.top_p, rule).mask() for prob_C in prob_MC]
        return prob_MC * torch.stack(inside), ids_MC
    kept_MC, order_MC = sorted_nuclei(prob_MC, filters.top_p, filters.top_p_rule)
    return kept_MC, order_MC if ids_MC is None else ids_MC.gather(1, order_MC)
