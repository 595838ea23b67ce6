"""From logits to a token: temperature, top-k, top-p, and a draw.

Filters act on the denoiser's p(x0 | .), which gives the mask token probability zero.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import torch

from blockdiffusion.errors import UserError
from blockdiffusion.objectives import exclude_mask_token_

TopPRule = Literal["transformers", "authors"]
CANDIDATES = 512  # most likely tokens looked at first; a nucleus seldom needs more


@dataclass(frozen=True, kw_only=True)
class Filters:
    """How the distribution of a token is changed before the draw; the defaults change nothing.

    Attributes:
        temperature: logits are divided by it; > 0.
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
        if not self.temperature > 0:
            raise UserError(
                f"temperature is {self.temperature}; it must be above 0 (top_k=1 is greedy)"
            )
        if self.top_k is not None and self.top_k < 1:
            raise UserError(f"top_k is {self.top_k}; it must be at least 1")
        if not 0 < self.top_p <= 1:
            raise UserError(f"top_p is {self.top_p}; it must lie in (0, 1], where 1 keeps all")
        if self.top_p_rule not in get_args(TopPRule):
            raise UserError(
                f"top_p_rule is {self.top_p_rule!r}; choose one of {', '.join(get_args(TopPRule))}"
            )


def draw_tokens(
    logits_MV: torch.Tensor, mask_id: int, filters: Filters, generator: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor]:
    """Draws M tokens; returns their ids and the denoiser's probabilities of them, both (M,).

    The probabilities are those before filtering. The draw inverts the cumulative distribution in
    float64 with one uniform number per token (Gumbel noise in float32 over a large vocabulary
    would lower the temperature: Zheng et al. 2024).
    """
    logits_MV = exclude_mask_token_(logits_MV, mask_id)
    prob_MV = logits_MV.softmax(-1)
    kept_MC, ids_MC = _filtered(
        (logits_MV / filters.temperature).softmax(-1) if filters.temperature != 1 else prob_MV,
        filters,
    )
    choice_M1 = draw_columns(kept_MC, generator)[:, None]
    token_M1 = choice_M1 if ids_MC is None else ids_MC.gather(1, choice_M1)
    return token_M1[:, 0], prob_MV.gather(1, token_M1)[:, 0]


def draw_columns(weight_MC: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """A column (M,) of every row, drawn in proportion to its weight by inversion in float64."""
    cumulative_MC = weight_MC.double().cumsum(-1)
    uniform_M1 = torch.rand(len(weight_MC), 1, generator=generator, dtype=torch.float64)
    target_M1 = uniform_M1.to(weight_MC.device) * cumulative_MC[:, -1:]
    return torch.searchsorted(cumulative_MC, target_M1, right=True)[:, 0]


def filtered_probs(prob_MV: torch.Tensor, filters: Filters) -> torch.Tensor:
    """A denoiser's distributions (M, V) after the filters, normalised; float64."""
    if filters.temperature != 1:
        prob_MV = (prob_MV.log() / filters.temperature).softmax(-1)
    kept_MC, ids_MC = _filtered(prob_MV, filters)
    if ids_MC is not None:
        kept_MC = torch.zeros_like(prob_MV).scatter(-1, ids_MC, kept_MC)
    return kept_MC.double() / kept_MC.double().sum(-1, keepdim=True)


def _filtered(prob_MV: torch.Tensor, filters: Filters) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Unnormalised probabilities of the tokens that stay, and their ids (None = all, in order)."""
    vocabulary = prob_MV.shape[-1]
    if filters.top_k is None and filters.top_p == 1:
        return prob_MV, None
    wanted = vocabulary if filters.top_k is None else min(filters.top_k, vocabulary)
    if filters.top_p == 1:
        return prob_MV.topk(wanted, dim=-1)
    # Top-p acts on the distribution that top-k left, renormalised.
    count = min(wanted, CANDIDATES)
    top_MC, ids_MC = prob_MV.topk(count, dim=-1)
    total_M1 = _top_mass(prob_MV, wanted)
    if count < wanted and bool((top_MC.sum(-1, keepdim=True) < filters.top_p * total_M1).any()):
        top_MC, ids_MC = prob_MV.topk(wanted, dim=-1)
    cumulative_MC = top_MC.double().cumsum(-1) / total_M1
    if filters.top_p_rule == "transformers":
        keep_MC = cumulative_MC - top_MC / total_M1 < filters.top_p
    else:
        keep_MC = cumulative_MC <= filters.top_p
    keep_MC[:, 0] = True
    return top_MC * keep_MC, ids_MC


def _top_mass(prob_MV: torch.Tensor, wanted: int) -> torch.Tensor:
    """Total probability (M, 1) of the `wanted` most likely tokens, float64."""
    if wanted == prob_MV.shape[-1]:
        return prob_MV.double().sum(-1, keepdim=True)
    return prob_MV.topk(wanted, dim=-1).values.double().sum(-1, keepdim=True)
