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
    ids_MC = None
    if filters.top_k is not None and filters.top_k < prob_MV.shape[-1]:
        prob_MV, ids_MC = prob_MV.topk(filters.top_k, dim=-1)
    if filters.top_p < 1:  # of the distribution that top-k left, renormalised
        prob_MV = prob_MV.clone()
        for prob_V in prob_MV:
            prob_V *= in_nucleus(prob_V, filters.top_p, filters.top_p_rule)
    return prob_MV, ids_MC


def in_nucleus(prob_V: torch.Tensor, top_p: float, rule: TopPRule) -> torch.Tensor:
    """bool (V,): the most likely tokens up to a share `top_p` of all; equal ones by their order.

    The vocabulary is not sorted, which would cost more than a small network's pass. Positive floats
    are in the order of their bits: the mass of all tokens with the same leading bits says which of
    these bins the boundary is in, and only that bin's tokens are sorted.
    """
    if prob_V.dtype not in _LEADING:
        prob_V = prob_V.float()
    integers, shift = _LEADING[prob_V.dtype]
    bin_V = prob_V.view(integers) >> shift
    mass_from_top = torch.bincount(bin_V, weights=prob_V.double()).flip(0).cumsum(0)
    limit = top_p * mass_from_top[-1]
    from_top = int((mass_from_top < limit).sum())  # bins that lie inside as a whole
    boundary = len(mass_from_top) - 1 - from_top
    above = mass_from_top[from_top - 1] if from_top else mass_from_top.new_zeros(())
    keep_V = bin_V > boundary
    ids = (bin_V == boundary).nonzero()[:, 0]
    prob, order = prob_V[ids].double().sort(descending=True, stable=True)
    reached = above + prob.cumsum(0)
    keep_V[ids[order]] = reached - prob < limit if rule == "transformers" else reached <= limit
    if not bool(keep_V.any()):
        keep_V[prob_V.argmax()] = True
    return keep_V


# Integers of the same width, and the bits of them that are not looked at: sign, exponent and seven
# bits of the fraction are left.
_LEADING = {torch.float32: (torch.int32, 16), torch.float64: (torch.int64, 45)}
