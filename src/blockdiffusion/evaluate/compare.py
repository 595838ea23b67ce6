"""What an adaptation cost: a parent and its child on the same tokens with the same context.

Each row is a window. Its first token is context and the others are scored, as transformers does
without a BOS: the parent by its own forward pass, the child by its likelihood in blocks (bound, and
exact or over orders), along the order from left to right, and as an autoregressive model.

Shape suffixes: R rows, L tokens of a row.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from blockdiffusion.diffusion.denoiser import masked_nll
from blockdiffusion.errors import UserError
from blockdiffusion.evaluate.likelihood import choose_estimator, likelihood
from blockdiffusion.evaluate.measured import Measured, mean_of, perplexity_of
from blockdiffusion.evaluate.options import LikelihoodOptions
from blockdiffusion.evaluate.replicates import Progress
from blockdiffusion.models.causal_lm import AdaptedModel

PARENT = "parent"


@dataclass(frozen=True, kw_only=True)
class Reading:
    """One way to score the rows.

    Attributes:
        name: what is measured.
        is_bound: whether the value is an upper bound.
        nats_per_token: its mean over tokens, with the standard error over rows.
        lost: its difference to the parent, with the paired standard error over rows.
    """

    name: str
    is_bound: bool
    nats_per_token: Measured
    lost: Measured

    @property
    def perplexity(self) -> float:
        """exp of the nats per token."""
        return perplexity_of(self.nats_per_token.value)


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """The readings of a parent, which is the first, and of its child."""

    num_rows: int
    num_tokens: int
    block_size: int
    readings: list[Reading]

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        values = asdict(self)
        for found, reading in zip(values["readings"], self.readings, strict=True):
            found["perplexity"] = reading.perplexity
        return values


def compare(
    parent: Any,
    child: AdaptedModel,
    ids_RL: torch.Tensor,
    options: LikelihoodOptions | None = None,
    *,
    generator: torch.Generator | None = None,
    progress: Progress | None = None,
) -> Comparison:
    """Score rows by a parent and by its child.

    Args:
        parent: a causal model of transformers, or an `AdaptedModel`, which is read
            autoregressively.
        ids_RL: windows of tokens, of one length.
        options: of the child's likelihood in blocks.

    Raises:
        UserError: the rows are shorter than two tokens, or the child cannot be measured so.
    """
    if ids_RL.shape[1] < 2:
        raise UserError(f"a row has {ids_RL.shape[1]} token; at least 2 are needed to score one")
    options = options or LikelihoodOptions()
    choose_estimator(options, child.config)
    found: dict[tuple[str, bool], list[float]] = {}
    for number, ids_1L in enumerate(ids_RL.split(1)):
        ids_1L = ids_1L.to(child.device)
        row = {(PARENT, False): _parents(parent, ids_1L)}
        for reading, nats in (row | _childs(child, ids_1L, options, generator)).items():
            found.setdefault(reading, []).append(nats)
        if progress is not None:
            progress(number + 1, len(ids_RL))
    tokens, own = ids_RL.shape[1] - 1, found[PARENT, False]
    readings = [
        Reading(
            name=name,
            is_bound=is_bound,
            nats_per_token=mean_of([n / tokens for n in nats]),
            lost=mean_of([(n - p) / tokens for n, p in zip(nats, own, strict=True)]),
        )
        for (name, is_bound), nats in found.items()
    ]
    return Comparison(
        num_rows=len(ids_RL),
        num_tokens=len(ids_RL) * tokens,
        block_size=child.config.block_size,
        readings=readings,
    )


@torch.no_grad()
def _parents(parent: Any, ids_1L: torch.Tensor) -> float:
    if isinstance(parent, AdaptedModel):
        return _autoregressive(_starting(parent, ids_1L), ids_1L)
    ids_1L = ids_1L.to(parent.device)
    logits = parent(input_ids=ids_1L, use_cache=False).logits
    nll = torch.nn.functional.cross_entropy(logits[0, :-1].float(), ids_1L[0, 1:], reduction="none")
    return float(nll.double().sum())


def _childs(
    child: AdaptedModel,
    ids_1L: torch.Tensor,
    options: LikelihoodOptions,
    generator: torch.Generator | None,
) -> dict[tuple[str, bool], float]:
    """Return the nats of a row by the name of each reading, and whether it is an upper bound."""
    model = _starting(child, ids_1L)
    given = model.config.reading != "next"  # there is no start symbol: the token is in the row
    text, skipped = (ids_1L, 1) if given else (ids_1L[:, 1:], 0)
    found = likelihood(model, text, options, bos=given, generator=generator)
    name = f"child, blocks of {model.config.block_size}"
    per_token = {(f"{name}, bound", True): found.nats_per_token}
    if not found.is_bound:
        per_token = {(name, False): found.nats_per_token}
    elif found.exact_nats_per_token is not None:
        per_token[f"{name}, random order", False] = found.exact_nats_per_token
    if found.orders_nats_per_token is not None:
        per_token[f"{name}, {options.orders} orders", True] = found.orders_nats_per_token
    values = {key: value * found.num_tokens for key, value in per_token.items()}
    values[f"{name}, left to right", False] = left_to_right_nats(model, text, skipped)
    if model.config.reading != "same" and model.config.clean_attention == "causal":
        values["child, autoregressive", False] = _autoregressive(model, ids_1L)
    return values


def _starting(model: AdaptedModel, ids_1L: torch.Tensor) -> AdaptedModel:
    """Return the model with a row's first token as its start symbol, if it has one."""
    if model.config.reading != "next":
        return model
    made = model.with_backbone(model.backbone)
    made.config = replace(model.config, start_id=int(ids_1L[0, 0]), bos=False)
    return made


@torch.no_grad()
def left_to_right_nats(model: AdaptedModel, ids_1L: torch.Tensor, skipped: int = 0) -> float:
    """Return -log p of a row along the order from left to right in every block: each token given
    the blocks before and the tokens before it in its own.

    Args:
        skipped: how many tokens, from the first, are context.
    """
    size, length = model.config.block_size, ids_1L.shape[1]
    padding = -length % size
    ids_1T = torch.nn.functional.pad(ids_1L, (0, padding), value=model.config.mask_id)
    column_T = torch.arange(length + padding, device=ids_1T.device)
    valid_1T = (column_T < length)[None]
    # Copy n hides the tokens from place n of each block on, and scores those at place n.
    place_T, number_N1 = column_T % size, torch.arange(size, device=ids_1T.device)[:, None]
    counted_T = (column_T >= skipped) & (column_T < length)
    hidden_NT = (place_T >= number_N1) & (column_T >= skipped)
    noisy_1NT = ids_1T[:, None].expand(1, size, -1).masked_fill(hidden_NT, model.config.mask_id)
    scored_1NT = ((place_T == number_N1) & counted_T)[None]
    valid = None if not padding else valid_1T
    return float(masked_nll(model, noisy_1NT, ids_1T, scored_1NT, valid).double().sum())


def _autoregressive(model: AdaptedModel, ids_1L: torch.Tensor) -> float:
    """Return -log p of a row given its first token, which `_starting` made the start symbol."""
    model, starts = model.with_block_size(1), model.config.reading == "next"
    return left_to_right_nats(model, ids_1L[:, starts:], skipped=0 if starts else 1)
