"""What an adaptation cost: a parent and its child on the same tokens with the same context.

Each row is a window, whose first token is context and the others are scored, as transformers does
without a BOS; or a conversation, of which the last response is scored. The parent scores it by its
own forward pass, the child by its likelihood in blocks (bound, and exact or over orders), along the
order from left to right, and as an autoregressive model.

Shape suffixes: R rows, L tokens of a row.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from blockdiffusion.data.loader import Batch
from blockdiffusion.diffusion.denoiser import masked_nll
from blockdiffusion.errors import UserError
from blockdiffusion.evaluate.likelihood import choose_estimator, likelihood
from blockdiffusion.evaluate.measured import Measured, perplexity_of, ratio_of
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


@dataclass(frozen=True)
class _Text:
    """A row as a model reads it.

    Attributes:
        start_id: the token before the first one; None = there is none.
        ids_1L: the tokens.
        skipped: how many of them, from the first, are context.
    """

    start_id: int | None
    ids_1L: torch.Tensor
    skipped: int = 0

    @property
    def num_scored(self) -> int:
        return self.ids_1L.shape[1] - self.skipped

    def of(self, model: AdaptedModel) -> _Text:
        """Return the row for a model: one without a start symbol has that token in the row."""
        if self.start_id is None or model.config.reading == "next":
            return self
        start_11 = self.ids_1L.new_full((1, 1), self.start_id)
        return _Text(None, torch.cat([start_11, self.ids_1L], dim=1), self.skipped + 1)

    def read_by(self, model: AdaptedModel) -> AdaptedModel:
        """Return the model with this row's start symbol."""
        if self.start_id is None or model.config.reading != "next":
            return model
        made = model.with_backbone(model.backbone)
        made.config = replace(model.config, start_id=self.start_id, bos=False)
        return made


def compare(
    parent: Any,
    child: AdaptedModel,
    rows: torch.Tensor | Batch,
    options: LikelihoodOptions | None = None,
    *,
    generator: torch.Generator | None = None,
    progress: Progress | None = None,
) -> Comparison:
    """Score rows by a parent and by its child.

    Args:
        parent: a causal model of transformers, or an `AdaptedModel`, which is read
            autoregressively.
        rows: windows of tokens (R, L), or conversations, of which only targets are scored.
        options: of the child's likelihood in blocks.

    Raises:
        UserError: the rows are shorter than two tokens, or the child cannot be measured so.
    """
    batch = rows if isinstance(rows, Batch) else Batch(rows)
    if batch.ids_BL.shape[1] < 2:
        raise UserError(
            f"a row has {batch.ids_BL.shape[1]} token; at least 2 are needed to score one"
        )
    options = options or LikelihoodOptions()
    choose_estimator(options, child.config)
    found: dict[tuple[str, bool], list[float]] = {}
    counts = []
    for number in range(len(batch.ids_BL)):
        of_parent, of_child = _texts(batch, number, child)
        counts.append(of_parent.num_scored)
        row = {(PARENT, False): _parents(parent, of_parent)}
        for reading, nats in (row | _childs(child, of_child, options, generator)).items():
            found.setdefault(reading, []).append(nats)
        if progress is not None:
            progress(number + 1, len(batch.ids_BL))
    own = found[PARENT, False]
    readings = [
        Reading(
            name=name,
            is_bound=is_bound,
            nats_per_token=_per_token(nats, counts),
            lost=_per_token([n - p for n, p in zip(nats, own, strict=True)], counts),
        )
        for (name, is_bound), nats in found.items()
    ]
    return Comparison(
        num_rows=len(counts),
        num_tokens=sum(counts),
        block_size=child.config.block_size,
        readings=readings,
    )


def _per_token(nats: list[float], counts: list[int]) -> Measured:
    found = ratio_of(nats, counts)
    assert found is not None, "every row has a scored token"
    return found


def _texts(batch: Batch, number: int, child: AdaptedModel) -> tuple[_Text, _Text]:
    """Return a row as the parent and as the child read it: the same tokens and context.

    A window has no start symbol, as in transformers: its first token is that. A conversation begins
    with the child's, if it has one.
    """
    ids_1L = batch.ids_BL[number][None].to(child.device)
    if batch.target_BL is None:
        window = _Text(int(ids_1L[0, 0]), ids_1L[:, 1:])
        return window, window.of(child)
    assert batch.valid_BL is not None
    length, scored = int(batch.valid_BL[number].sum()), int(batch.target_BL[number].sum())
    start_id = child.config.start_id if child.config.reading == "next" else None
    text = _Text(start_id, ids_1L[:, :length], length - scored)
    return text, text


@torch.no_grad()
def _parents(parent: Any, text: _Text) -> float:
    if isinstance(parent, AdaptedModel):
        text = text.of(parent)
        return _autoregressive(text.read_by(parent), text)
    ids_1L = text.ids_1L.to(parent.device)
    begun = [] if text.start_id is None else [ids_1L.new_full((1, 1), text.start_id)]
    read_1T = torch.cat([*begun, ids_1L], dim=1)
    logits_TV = parent(input_ids=read_1T, use_cache=False).logits[0, -1 - text.num_scored : -1]
    target_T = ids_1L[0, text.skipped :]
    nll_T = torch.nn.functional.cross_entropy(logits_TV.float(), target_T, reduction="none")
    return float(nll_T.double().sum())


def _childs(
    child: AdaptedModel,
    text: _Text,
    options: LikelihoodOptions,
    generator: torch.Generator | None,
) -> dict[tuple[str, bool], float]:
    """Return the nats of a row by the name of each reading, and whether it is an upper bound."""
    model = text.read_by(child)
    given_1L = torch.arange(text.ids_1L.shape[1])[None] < text.skipped
    found = likelihood(model, text.ids_1L, options, bos=False, given=given_1L, generator=generator)
    name = f"child, blocks of {model.config.block_size}"
    per_token = {(f"{name}, bound", True): found.nats_per_token}
    if not found.is_bound:
        per_token = {(name, False): found.nats_per_token}
    elif found.exact_nats_per_token is not None:
        per_token[f"{name}, random order", False] = found.exact_nats_per_token
    if found.orders_nats_per_token is not None:
        per_token[f"{name}, {options.orders} orders", True] = found.orders_nats_per_token
    values = {key: value * found.num_tokens for key, value in per_token.items()}
    values[f"{name}, left to right", False] = left_to_right_nats(model, text.ids_1L, text.skipped)
    if model.config.reading != "same" and model.config.clean_attention == "causal":
        values["child, autoregressive", False] = _autoregressive(model, text)
    return values


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


def _autoregressive(model: AdaptedModel, text: _Text) -> float:
    return left_to_right_nats(model.with_block_size(1), text.ids_1L, text.skipped)
