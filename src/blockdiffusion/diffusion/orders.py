"""The K-order bound: between the NELBO and the exact log-likelihood, for blocks of any length.

Revealing the n free tokens of a block one at a time in an order o gives it the probability

    p(x | o) = product over j of p(x_{o_j} | x with o_j, o_{j+1}, ... masked).

The first-hitting sampler draws the order uniformly, so the likelihood is log E_o p(x | o), and the
NELBO is E_o log p(x | o) (Uria et al. 2014). In between lies the expectation of the log of the mean
of p(x | o) over K random orders: it is the NELBO at K = 1, grows with K and tends to the exact
value (Burda et al. 2016 show the same of importance-weighted bounds; Eso-LM, Sahoo et al. 2025,
arXiv 2506.01928, theorem 3.1, has it for any-order models). It costs S passes per order, all blocks
of a row at once.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch

from blockdiffusion.diffusion.denoiser import Denoiser, masked_nll


@torch.no_grad()
def order_nll(
    model: Denoiser,
    clean_BL: torch.Tensor,
    free_BL: torch.Tensor,
    num_orders: int,
    generator: torch.Generator,
    valid_BL: torch.Tensor | None = None,
    *,
    copies: int = 8,
    progress: Callable[[int], None] | None = None,
) -> torch.Tensor:
    """Return -log p(block | order) in nats, float64 (B, R, K), R = `num_orders` orders per block.

    Args:
        clean_BL: ids (B, L), L a multiple of the block size.
        free_BL: bool, the tokens that are scored; the others are given and never masked.
        valid_BL: bool, False at padding; None = no padding.
        copies: noisy copies in a pass, which share a clean stream.
        progress: called with the number of noisy copies just finished, of num_orders * S.
    """
    size = model.config.block_size
    batch, length = clean_BL.shape
    blocks = length // size
    rank_BRL = draw_orders(free_BL, size, num_orders, generator)
    total_BRK = torch.zeros(batch, num_orders, blocks, dtype=torch.float64, device=clean_BL.device)
    jobs = [(order, step) for order in range(num_orders) for step in range(size)]
    for first in range(0, len(jobs), copies):
        part = jobs[first : first + copies]
        order = torch.tensor([job[0] for job in part], device=clean_BL.device)
        step = torch.tensor([job[1] for job in part], device=clean_BL.device)[:, None]
        rank_BNL = rank_BRL[:, order]
        hidden_BNL = (rank_BNL >= step) & free_BL[:, None]
        noisy_BNL = clean_BL[:, None].masked_fill(hidden_BNL, model.config.mask_id)
        next_BNL = hidden_BNL & (rank_BNL == step)
        nll_BNL = masked_nll(model, noisy_BNL, clean_BL, next_BNL, valid_BL)
        nll_BNK = nll_BNL.double().unflatten(2, (blocks, size)).sum(-1)
        total_BRK.index_add_(1, order, nll_BNK)
        if progress is not None:
            progress(len(part))
    return total_BRK


def draw_orders(
    free_BL: torch.Tensor, block_size: int, num_orders: int, generator: torch.Generator
) -> torch.Tensor:
    """Return the place of every token in a random order of its block, int64 (B, R, L). Free tokens
    come first."""
    batch, length = free_BL.shape
    blocks = length // block_size
    score = torch.rand(
        (batch, num_orders, blocks, block_size), generator=generator, dtype=torch.float64
    ).to(free_BL.device)
    score = score.masked_fill(~free_BL.view(batch, 1, blocks, block_size), math.inf)
    return score.argsort(-1).argsort(-1).flatten(2)


def order_bound(nll_BRK: torch.Tensor, orders: int) -> torch.Tensor:
    """Return the bound of `orders` orders, (B, R / orders) in nats per row, one per replicate."""
    grouped = -nll_BRK.unflatten(1, (-1, orders))  # (B, R / orders, orders, K)
    return -(grouped.logsumexp(2) - math.log(orders)).sum(-1)
