"""Training losses and log-likelihood terms of a model: of masked tokens, and of next tokens."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from blockdiffusion.diffusion.losses import subs_nll, usual_pieces, weighted_subs_nll
from blockdiffusion.errors import UserError
from blockdiffusion.models.block_diffusion import BlockDiffusion

Denoiser = BlockDiffusion  # a model that predicts the tokens behind the masks of a block
NextTokenModel = BlockDiffusion  # the autoregressive baseline, which predicts each next token


def is_autoregressive(model: BlockDiffusion) -> bool:
    """Return whether a model predicts the next token and not the tokens behind masks."""
    return model.config.is_autoregressive


def find_bos_id(model: BlockDiffusion) -> int | None:
    """Return the id of the BOS token by the configuration, or else by the tokenizer, or None."""
    found = model.config.bos_id
    if found is None and model.tokenizer is not None:
        found = model.tokenizer.bos_token_id
    return found


def bos_id(model: BlockDiffusion) -> int:
    """Return the id of the BOS token, which must exist.

    Raises:
        UserError: neither names one.
    """
    found = find_bos_id(model)
    if found is None:
        raise UserError("bos=True needs a BOS token, and this model names none; use bos=False")
    return found


def masked_nll(
    model: Denoiser,
    noisy_BNL: torch.Tensor,
    clean_BL: torch.Tensor,
    scored_BNL: torch.Tensor,
    valid_BL: torch.Tensor | None = None,
    sigma_BNK: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return -log p(x_l | noisy block, clean past) in nats, (B, N, L), 0 if not scored.

    Args:
        scored_BNL: bool, the masked positions to score, all or some; only they get logits. Other
            positions may hold the mask token too, as padding may.
    """
    target_M = clean_BL[:, None].expand_as(noisy_BNL)[scored_BNL]

    def term(logits_RV: torch.Tensor, part: slice) -> torch.Tensor:
        return subs_nll(logits_RV, target_M[part], model.config.mask_id)

    return scored_terms(model, noisy_BNL, clean_BL, scored_BNL, term, valid_BL, sigma_BNK)


def scored_terms(
    model: Denoiser,
    noisy_BNL: torch.Tensor,
    clean_BL: torch.Tensor,
    scored_BNL: torch.Tensor,
    term: Callable[[torch.Tensor, slice], torch.Tensor],
    valid_BL: torch.Tensor | None = None,
    sigma_BNK: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return `term` of the logits (M, V) of the scored positions, (B, N, L), 0 elsewhere.

    `term` gets the logits (R, V) of some of the M positions at a time, and the slice of these. For
    a gradient they are computed again, so that the logits of many positions never exist at once.
    """
    hidden_MD = model.encode(noisy_BNL, clean_BL, sigma_BNK, valid_BL, scored_BNL)
    rows = max(1, usual_pieces(hidden_MD.device).most_logits // model.config.vocab_size)

    def terms(hidden_RD: torch.Tensor, part: slice) -> torch.Tensor:
        return term(model.head(hidden_RD), part)

    if len(hidden_MD) <= rows:
        term_M = terms(hidden_MD, slice(None))
    else:
        parts = [slice(first, first + rows) for first in range(0, len(hidden_MD), rows)]
        term_M = torch.cat([
            checkpoint(terms, hidden_MD[part], part, use_reentrant=False, preserve_rng_state=False)
            for part in parts
        ])  # fmt: skip
    return torch.zeros_like(noisy_BNL, dtype=term_M.dtype).masked_scatter(scored_BNL, term_M)


def masked_loss(
    model: Denoiser,
    noisy_BNL: torch.Tensor,
    clean_BL: torch.Tensor,
    scored_BNL: torch.Tensor,
    weight_BNL: torch.Tensor,
    valid_BL: torch.Tensor | None = None,
    sigma_BNK: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return the sum over scored positions of weight times `masked_nll`: a scalar in nats, for
    training. Few logits exist at a time, see `losses.weighted_subs_nll`.

    Args:
        scored_BNL, weight_BNL: a copy more than `noisy_BNL` stands for the clean stream, whose
            outputs predict the next token; see `BlockDiffusion.encode`.
    """
    hidden_MD = model.encode(noisy_BNL, clean_BL, sigma_BNK, valid_BL, scored_BNL)
    target_BNL = clean_BL[:, None].expand_as(scored_BNL)
    return _weighted_nll(model, hidden_MD, target_BNL[scored_BNL], weight_BNL[scored_BNL])


def _weighted_nll(
    model: Denoiser, hidden_MD: torch.Tensor, target_M: torch.Tensor, weight_M: torch.Tensor
) -> torch.Tensor:
    """Return the sum of weight * -log p(target), from hidden states."""
    mask_id = model.config.mask_id
    if model.backbone.logits_are_linear:
        return weighted_subs_nll(hidden_MD, model.output, target_M, weight_M, mask_id)
    return (weight_M * subs_nll(model.head(hidden_MD), target_M, mask_id)).sum()


def causal_nll(
    model: NextTokenModel,
    clean_BL: torch.Tensor,
    free_BL: torch.Tensor,
    valid_BL: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return -log p(x_l | x^{<l}) in nats at free tokens, (B, L), 0 elsewhere.

    The network reads x_0 .. x_{L-2} and predicts x_1 .. x_{L-1}. In rows whose token 0 is free too,
    because it is no given BOS, the mask token precedes it as a start symbol, so that a block
    diffusion model and this one score exactly the same tokens. A model that was trained with the
    start symbol (`bos` is false in its configuration) gets it in every row. The mask token has
    probability zero. Only free tokens get logits.

    Args:
        free_BL: bool, the tokens that are scored.
        valid_BL: bool, False at padding; None = no padding.
    """
    hidden_MD, target_M = _before_free_tokens(model, clean_BL, free_BL, valid_BL)
    nll_M = subs_nll(model.head(hidden_MD), target_M, model.config.mask_id)
    return torch.zeros_like(free_BL, dtype=nll_M.dtype).masked_scatter(free_BL, nll_M)


def causal_loss(
    model: NextTokenModel,
    clean_BL: torch.Tensor,
    free_BL: torch.Tensor,
    valid_BL: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return the sum of `causal_nll`: a scalar in nats, for training, computed as `masked_loss`."""
    hidden_MD, target_M = _before_free_tokens(model, clean_BL, free_BL, valid_BL)
    weight_M = torch.ones_like(target_M, dtype=torch.float32)
    return _weighted_nll(model, hidden_MD, target_M, weight_M)


def _before_free_tokens(
    model: NextTokenModel,
    clean_BL: torch.Tensor,
    free_BL: torch.Tensor,
    valid_BL: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Hidden states (M, D) that predict the free tokens, and those tokens."""
    # Each row has the start symbol or not, whatever its neighbours have.
    first_B = (~free_BL[:, 0]).long() * (model.config.bos is not False)
    longest = clean_BL.shape[1] - int(first_B.min())
    column_BT = first_B[:, None] + torch.arange(longest, device=clean_BL.device)
    past_BT = F.pad(clean_BL[:, :-1], (1, 1), value=model.config.mask_id).gather(1, column_BT)
    valid_BT = None
    if valid_BL is not None:
        valid_BT = F.pad(valid_BL[:, :-1], (1, 1), value=True).gather(1, column_BT)
    scored_BT = F.pad(free_BL, (0, 1)).gather(1, column_BT)  # in the order of `free_BL`
    return model.encode_causal(past_BT, valid_BT)[scored_BT], clean_BL[free_BL]


def row_groups(num_rows: int, tokens_per_row: int, pass_tokens: int) -> list[slice]:
    """Return slices of rows with at most `pass_tokens` tokens each, or one row."""
    rows = max(1, pass_tokens // tokens_per_row)
    return [slice(first, min(first + rows, num_rows)) for first in range(0, num_rows, rows)]
