"""What training, likelihood and samplers ask of a network: Protocols, and the loss of each."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol, TypeGuard

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from blockdiffusion.diffusion.losses import subs_nll, usual_pieces, weighted_subs_nll
from blockdiffusion.errors import UserError
from blockdiffusion.models.cache import BlockCache


class Denoiser(Protocol):
    """A network that predicts the tokens behind the masks of a block, given the clean past.

    `config` is a `DiffusionConfig`, `backbone` the network inside (`models.backbone`), and
    `tokenizer` a Hugging Face tokenizer or None.
    """

    config: Any
    backbone: Any
    tokenizer: Any

    @property
    def device(self) -> torch.device: ...

    def encode(
        self,
        noisy_BNL: torch.Tensor,
        clean_BL: torch.Tensor | None,
        sigma_BNK: torch.Tensor | None = None,
        valid_BL: torch.Tensor | None = None,
        scored_BNL: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Hidden states (B, N, L, D) of N noisy copies that share one clean stream, or (M, D) of
        the positions `scored_BNL`."""
        ...

    def head(self, hidden: torch.Tensor) -> torch.Tensor:
        """Logits (..., V) of hidden states (..., D), before SUBS."""
        ...

    @property
    def output(self) -> torch.nn.Linear:
        """The layer behind `head`, for losses that take its logits piece by piece."""
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
        sigma_B: torch.Tensor | None = None,
        wanted: tuple[torch.Tensor, torch.Tensor] | None = None,
    ) -> torch.Tensor:
        """Hidden states (B, T, D) of the tokens that follow the cache, or (M, D) of those at the
        rows and columns `wanted`.

        The first `num_clean` tokens of each row are clean (whole blocks, to be committed by the
        caller), then comes a block being denoised; `sigma_B` is its time, for time-conditioned
        networks.
        """
        ...

    def decode_ragged(
        self,
        ids_P: torch.Tensor,
        tokens_B: torch.Tensor,
        clean_B: torch.Tensor,
        cache: BlockCache,
        window: int | None = None,
        sigma_B: torch.Tensor | None = None,
        wanted_M: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """`decode` for rows of different numbers of tokens: hidden states (P, D), or (M, D)."""
        ...


class NextTokenModel(Protocol):
    """A network that predicts each token from those before it: the autoregressive baseline.

    `config` is that of a `Denoiser`, with the objective "autoregressive" and blocks of one token.
    """

    config: Any
    backbone: Any
    tokenizer: Any

    @property
    def device(self) -> torch.device: ...

    def encode_causal(
        self, ids_BT: torch.Tensor, valid_BT: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Hidden states (B, T, D); each token sees those up to itself."""
        ...

    def head(self, hidden: torch.Tensor) -> torch.Tensor:
        """Logits (..., V) of hidden states (..., D), the mask token included."""
        ...

    def make_cache(self, batch: int, capacity: int) -> BlockCache:
        """An empty cache for `batch` rows of at most `capacity` tokens at a time."""
        ...

    def decode_causal(
        self, ids_BT: torch.Tensor, cache: BlockCache, window: int | None = None
    ) -> torch.Tensor:
        """Hidden states (B, T, D) of the tokens that follow the cache, for the caller to commit."""

    @property
    def output(self) -> torch.nn.Linear:
        """The layer behind `head`, for losses that take its logits piece by piece."""
        ...


def is_autoregressive(model: Any) -> TypeGuard[NextTokenModel]:
    """Whether a model predicts the next token and not the tokens behind masks."""
    return model.config.is_autoregressive


def find_bos_id(model: Denoiser | NextTokenModel) -> int | None:
    """Id of the BOS token, as the configuration or else the tokenizer names it, or None."""
    found = model.config.bos_id
    if found is None and model.tokenizer is not None:
        found = model.tokenizer.bos_token_id
    return found


def bos_id(model: Denoiser | NextTokenModel) -> int:
    """The same where there has to be one.

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
    """-log p(x_l | noisy block, clean past) in nats at scored positions, 0 elsewhere; (B, N, L).

    Args:
        scored_BNL: bool, the masked positions to score, all or some; only they get logits. Other
            positions may hold the mask token too, as padding may.
    """
    mask_id = model.config.mask_id
    target_M = clean_BL[:, None].expand_as(noisy_BNL)[scored_BNL]
    return scored_terms(
        model,
        noisy_BNL,
        clean_BL,
        scored_BNL,
        lambda logits_RV, part: subs_nll(logits_RV, target_M[part], mask_id),
        valid_BL,
        sigma_BNK,
    )


def scored_terms(
    model: Denoiser,
    noisy_BNL: torch.Tensor,
    clean_BL: torch.Tensor,
    scored_BNL: torch.Tensor,
    term: Callable[[torch.Tensor, slice], torch.Tensor],
    valid_BL: torch.Tensor | None = None,
    sigma_BNK: torch.Tensor | None = None,
) -> torch.Tensor:
    """What `term` makes of the logits (M, V) of the scored positions, 0 elsewhere; (B, N, L).

    It gets the logits (R, V) of some of the M positions at a time, and which these are. For a
    gradient they are computed again, so that the logits of many positions never exist at once.
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
    """Sum over scored positions of weight times `masked_nll`: a scalar in nats, for training.

    It never holds the logits of all scored positions; see `losses.weighted_subs_nll`.
    """
    hidden_MD = model.encode(noisy_BNL, clean_BL, sigma_BNK, valid_BL, scored_BNL)
    target_BNL = clean_BL[:, None].expand_as(noisy_BNL)
    return weighted_subs_nll(
        hidden_MD,
        model.output,
        target_BNL[scored_BNL],
        weight_BNL[scored_BNL],
        model.config.mask_id,
    )


def causal_nll(
    model: NextTokenModel,
    clean_BL: torch.Tensor,
    free_BL: torch.Tensor,
    valid_BL: torch.Tensor | None = None,
) -> torch.Tensor:
    """-log p(x_l | x^{<l}) in nats at free tokens, 0 elsewhere; (B, L).

    The network reads x_0 .. x_{L-2} and predicts x_1 .. x_{L-1}. In rows whose token 0 has to be
    predicted too, because it is no given BOS, the mask token stands before it as a start symbol: a
    block diffusion model and this one then score exactly the same tokens. A model that was trained
    with the start symbol (`bos` is false in its configuration) gets it in every row. The mask token
    has probability zero. Logits are computed at free tokens only.

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
    """The sum of `causal_nll`: a scalar in nats, for training, as `masked_loss` does it."""
    hidden_MD, target_M = _before_free_tokens(model, clean_BL, free_BL, valid_BL)
    weight_M = torch.ones_like(target_M, dtype=torch.float32)
    return weighted_subs_nll(hidden_MD, model.output, target_M, weight_M, model.config.mask_id)


def _before_free_tokens(
    model: NextTokenModel,
    clean_BL: torch.Tensor,
    free_BL: torch.Tensor,
    valid_BL: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Hidden states (M, D) that predict the free tokens, and those tokens."""
    # Whether a row begins with the start symbol is its own matter, not its neighbours'.
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
    """The rows in groups of at most `pass_tokens` tokens (but at least one row), one pass each."""
    rows = max(1, pass_tokens // tokens_per_row)
    return [slice(first, min(first + rows, num_rows)) for first in range(0, num_rows, rows)]
