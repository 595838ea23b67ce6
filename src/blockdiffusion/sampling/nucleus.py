"""The nucleus: the most likely tokens up to a share of all probability, and draws among them."""

from __future__ import annotations

import torch

from blockdiffusion.sampling.params import TopPRule

# Integers of the same width, and the bits of them that are not looked at: sign, exponent and seven
# bits of the fraction are left.
_LEADING = {torch.float32: (torch.int32, 16), torch.float64: (torch.int64, 45)}


class Nucleus:
    """The nucleus of one distribution (V,), found without sorting it: for CPUs.

    Sorting a vocabulary costs more than a small network's pass. Positive floats are in the order of
    their bits: the mass of all tokens with the same leading bits says which of these bins the
    boundary is in, and only that bin's tokens are sorted. Equal tokens are in by their order.

    Args:
        prob_V: need not be normalised.
        top_p: the share of the whole; in (0, 1).
        rule: see `SamplingParams`.
    """

    def __init__(self, prob_V: torch.Tensor, top_p: float, rule: TopPRule):
        if prob_V.dtype not in _LEADING:
            prob_V = prob_V.float()
        integers, shift = _LEADING[prob_V.dtype]
        self.prob_V = prob_V
        self.bin_V = prob_V.view(integers) >> shift
        counts = torch.bincount(self.bin_V, weights=prob_V.double())
        self.mass_from_top = counts.flip(0).cumsum(0)
        limit = top_p * self.mass_from_top[-1].item()
        self.whole = int((self.mass_from_top < limit).sum())  # bins that lie inside as a whole
        self.above = self._mass_of_first(self.whole)
        ids, prob = self._tokens(self.whole)
        prob, order = prob.sort(descending=True, stable=True)
        reached = self.above + prob.cumsum(0)
        inside = reached - prob < limit if rule == "transformers" else reached <= limit
        if not self.whole and not bool(inside[0]):
            inside[0] = True
        self.edge_ids, self.edge_prob = ids[order[inside]], prob[inside]

    def mask(self) -> torch.Tensor:
        """bool (V,): which tokens are inside."""
        inside_V = self.bin_V > len(self.mass_from_top) - 1 - self.whole
        inside_V[self.edge_ids] = True
        return inside_V

    def draw(self, uniform: float) -> torch.Tensor:
        """A token's id, (): the inverse, in float64, of the cumulative distribution of those inside
        (from the likely bins to the unlikely ones), at a number in [0, 1)."""
        target = uniform * (self.above + self.edge_prob.sum().item())
        if target >= self.above:
            return _at(self.edge_ids, self.edge_prob, target - self.above)
        number = int(torch.searchsorted(self.mass_from_top, target, right=True))
        return _at(*self._tokens(number), target - self._mass_of_first(number))

    def _tokens(self, number: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Ids of the tokens in a bin, counted from the top, and their probabilities; no zeros."""
        which = len(self.mass_from_top) - 1 - number
        inside_V = self.bin_V == which
        if which == 0:
            inside_V &= self.prob_V > 0
        ids = inside_V.nonzero()[:, 0]
        return ids, self.prob_V[ids].double()

    def _mass_of_first(self, bins: int) -> float:
        return self.mass_from_top[bins - 1].item() if bins else 0.0


def _at(ids: torch.Tensor, prob: torch.Tensor, target: float) -> torch.Tensor:
    place = torch.searchsorted(prob.cumsum(0), target, right=True)
    return ids[place.clamp(max=len(ids) - 1)]  # beyond the last one by rounding


def sorted_nuclei(
    prob_MV: torch.Tensor, top_p: float, rule: TopPRule
) -> tuple[torch.Tensor, torch.Tensor]:
    """The nuclei of M distributions by sorting them, without asking the device: for GPUs.

    Returns:
        Probabilities in descending order, zero outside the nucleus, and their ids; both (M, V).
    """
    prob_MV, ids_MV, _, inside_MV = _sorted(prob_MV, top_p, rule)
    return prob_MV * inside_MV, ids_MV


def draw_from_sorted(
    prob_MV: torch.Tensor, top_p: float, rule: TopPRule, uniform_M: torch.Tensor
) -> torch.Tensor:
    """A token of each nucleus (M,): the inverse, in float64, of the cumulative distribution (from
    the likely tokens to the unlikely ones) at numbers in [0, 1); for GPUs."""
    _, ids_MV, reached_MV, inside_MV = _sorted(prob_MV, top_p, rule)
    target_M1 = uniform_M[:, None] * reached_MV.where(inside_MV, 0.0).amax(1, keepdim=True)
    place_M1 = torch.searchsorted(reached_MV, target_M1, right=True)
    place_M1 = place_M1.clamp(max=prob_MV.shape[-1] - 1)  # beyond where one is nan
    return ids_MV.gather(1, place_M1)[:, 0]


def _sorted(
    prob_MV: torch.Tensor, top_p: float, rule: TopPRule
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Probabilities in descending order, their ids, sums in float64 up to each, and which are in
    the nucleus."""
    prob_MV, ids_MV = prob_MV.sort(dim=-1, descending=True, stable=True)
    reached_MV = prob_MV.double().cumsum(-1)
    limit_M1 = top_p * reached_MV[:, -1:]
    if rule == "transformers":
        inside_MV = reached_MV - prob_MV < limit_M1
    else:
        inside_MV = reached_MV <= limit_M1
    inside_MV[:, 0] = True
    return prob_MV, ids_MV, reached_MV, inside_MV
