"""What training, likelihood and samplers ask of a network: the Protocol, and one use of it."""

from __future__ import annotations

from typing import Any, Protocol

import torch

from blockdiffusion.cache import BlockCache
from blockdiffusion.errors import UserError
from blockdiffusion.objectives import subs_nll


class Denoiser(Protocol):
    """A network that predicts the tokens behind the masks of a block, given the clean past.

    `config` has `block_size`, `mask_id` and `vocab_size`. `tokenizer` is a Hugging Face tokenizer
    or None.
    """

    config: Any
    tokenizer: Any

    @property
    def device(self) -> torch.device: ...

    def encode(
        self,
        noisy_BNL: torch.Tensor,
        clean_BL: torch.Tensor | None,
        sigma_BNK: torch.Tensor | None = None,
        valid_BL: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Hidden states (B, N, L, D) of N noisy copies that share one clean stream."""
        ...

    def head(self, hidden: torch.Tensor) -> torch.Tensor:
        """Logits (..., V) of hidden states (..., D), before SUBS."""
        ...

    def make_cache(self, batch: int, capacity: int) -> BlockCache:
        """An empty cache for `batch` rows of at most `capacity` tokens at a time."""
        ...

    def decode(
        self,
        ids_BT: torch.Tensor,
        num_clean: int | torch.Tensor,
        cache: BlockCache,
        window: int | None = None,
    ) -> torch.Tensor:
        """Hidden states (B, T, D) of the tokens that follow the cache.

        The first `num_clean` tokens of each row are clean (whole blocks, to be committed by the
        caller), then comes a block being denoised.
        """
        ...


def bos_id(model: Denoiser) -> int:
    """Id of the BOS token, as the configuration or else the tokenizer names it.

    Raises:
        UserError: neither does.
    """
    found = model.config.bos_id
    if found is None and model.tokenizer is not None:
        found = model.tokenizer.bos_token_id
    if found is None:
        raise UserError("bos=True needs a BOS token, and this model names none; use bos=False")
    return found


def masked_nll(
    model: Denoiser,
    noisy_BNL: torch.Tensor,
    clean_BL: torch.Tensor,
    valid_BL: torch.Tensor | None = None,
    sigma_BNK: torch.Tensor | None = None,
    scored_BNL: torch.Tensor | None = None,
) -> torch.Tensor:
    """-log p(x_l | noisy block, clean past) in nats at masked positions, 0 elsewhere; (B, N, L).

    Logits are computed at the masked positions only, or at those of them in `scored_BNL`.
    """
    mask_id = model.config.mask_id
    hidden_BNLD = model.encode(noisy_BNL, clean_BL, sigma_BNK, valid_BL)
    masked_BNL = noisy_BNL == mask_id if scored_BNL is None else scored_BNL
    target_BNL = clean_BL[:, None].expand_as(noisy_BNL)
    logits_MV = model.head(hidden_BNLD[masked_BNL])
    nll_M = subs_nll(logits_MV, target_BNL[masked_BNL], mask_id)
    return torch.zeros_like(noisy_BNL, dtype=nll_M.dtype).masked_scatter(masked_BNL, nll_M)
