"""The exact NELBO and the exact log-likelihood of short blocks, by enumeration.

A block with n free tokens has 2^n - 1 non-empty mask sets A. With k = |A|,

    NELBO = sum over A of 1 / (k C(n, k)) * sum over l in A of -log p(x_l | x with A masked),

which is the paper's bound with t integrated out and has no variance. The same terms give the exact
log-likelihood of the first-hitting sampler, log p = f(all free tokens), by the recursion

    f(A) = log (1/k * sum over l in A of p(x_l | x with A masked) * exp f(A - l)),   f(empty) = 0,

because that sampler reveals a uniformly chosen masked token at each step. It is the marginal over
random orders. DUEL (Turok et al. 2026, arXiv 2603.01367) has the likelihood of samplers with a
deterministic order, TUBE (Ivanov et al. 2026, arXiv 2605.24292) an upper bound on log p.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch

from blockdiffusion.diffusion.denoiser import Denoiser, masked_nll
from blockdiffusion.errors import UserError

MAX_BLOCK_SIZE = 8
PASS_TOKENS = 16_384  # noisy tokens of a pass, which bounds memory


@dataclass(frozen=True)
class ExactBlocks:
    """The bound and the exact negative log-likelihood of each block (B, K), float64, in nats."""

    nelbo_BK: torch.Tensor
    nll_BK: torch.Tensor


def num_subsets(block_size: int) -> int:
    """Return the network evaluations of every block: 2^S - 1.

    Raises:
        UserError: the block is too long to enumerate.
    """
    if block_size > MAX_BLOCK_SIZE:
        raise UserError(
            f"the exact likelihood enumerates 2^S mask sets and goes up to S = {MAX_BLOCK_SIZE}, "
            f"but this model has S = {block_size}; use the estimator auto or orders"
        )
    return 2**block_size - 1


def enumeration_is_cheap(block_size: int, pairs: int) -> bool:
    """Return whether enumeration takes no more noisy copies than so many complement pairs."""
    return block_size <= MAX_BLOCK_SIZE and num_subsets(block_size) <= 2 * pairs


@torch.no_grad()
def exact_blocks(
    model: Denoiser,
    clean_BL: torch.Tensor,
    free_BL: torch.Tensor,
    valid_BL: torch.Tensor | None = None,
    progress: Callable[[int], None] | None = None,
) -> ExactBlocks:
    """Return the sums over all mask sets of all blocks.

    Args:
        clean_BL: ids (B, L), L a multiple of the block size S <= 8.
        free_BL: bool, the tokens that are scored; the others are given and never masked.
        valid_BL: bool, False at padding; None = no padding.
        progress: called with the number of mask sets just finished (of 2^S - 1).
    """
    size = model.config.block_size
    batch, length = clean_BL.shape
    subsets = torch.arange(1, num_subsets(size) + 1, device=clean_BL.device)
    member_AS = (subsets[:, None] >> torch.arange(size, device=clean_BL.device)) & 1 == 1
    free_BKS = free_BL.unflatten(1, (-1, size))
    # A block is evaluated at A only if all of A is free in it.
    member_1A1S = member_AS[None, :, None]
    masked_BAKS = member_1A1S & ~(member_1A1S & ~free_BKS[:, None]).any(-1, keepdim=True)
    masked_BAL = masked_BAKS.flatten(2)
    per_pass = max(1, PASS_TOKENS // (batch * length))
    nll_BAL = torch.zeros(masked_BAL.shape, dtype=torch.float64, device=clean_BL.device)
    for first in range(0, len(subsets), per_pass):
        part = masked_BAL[:, first : first + per_pass]
        if part.any():
            noisy_BNL = clean_BL[:, None].masked_fill(part, model.config.mask_id)
            nll_BAL[:, first : first + per_pass] = masked_nll(
                model, noisy_BNL, clean_BL, part, valid_BL
            ).double()
        if progress is not None:
            progress(part.shape[1])
    nll_ABKS = nll_BAL.unflatten(2, (-1, size)).transpose(0, 1)
    member_ABK = masked_BAKS.any(-1).transpose(0, 1)
    return ExactBlocks(
        _nelbo(nll_ABKS, member_ABK, member_AS.sum(1), free_BKS.sum(-1)),
        _nll(nll_ABKS, member_AS, free_BKS),
    )


def _nelbo(nll_ABKS, evaluated_ABK, members_A, free_BK) -> torch.Tensor:
    size = nll_ABKS.shape[-1]
    weight = torch.zeros(size + 1, size + 1, dtype=torch.float64, device=nll_ABKS.device)
    for n in range(1, size + 1):
        for k in range(1, n + 1):
            weight[n, k] = 1 / (k * math.comb(n, k))
    weight_ABK = weight[free_BK[None], members_A[:, None, None]] * evaluated_ABK
    return (weight_ABK * nll_ABKS.sum(-1)).sum(0)


def _nll(nll_ABKS, member_AS, free_BKS) -> torch.Tensor:
    """The recursion over subsets, numbered by their bits: A - l always comes before A."""
    log_prob = [torch.zeros_like(nll_ABKS[0, ..., 0])]
    for subset in range(1, len(member_AS) + 1):
        members = member_AS[subset - 1].nonzero().flatten().tolist()
        terms = [-nll_ABKS[subset - 1, ..., m] + log_prob[subset ^ (1 << m)] for m in members]
        log_prob.append(torch.stack(terms).logsumexp(0) - math.log(len(members)))
    bits = 2 ** torch.arange(free_BKS.shape[-1], device=free_BKS.device)
    free_set_BK = (free_BKS * bits).sum(-1)
    return -torch.stack(log_prob).gather(0, free_set_BK[None])[0]
