"""Per-token loss terms. They see tensors only, and never average: the caller normalises."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F


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
