"""Floating-point operations of training and sampling passes, by formula.

Matrix products and attention are counted, a multiply-add as two operations. Attention computes
whole chunks or tiles, part of which the mask discards; what the mask needs is counted beside it.
The tests compare the formulas with PyTorch's own counter.

Symbols: S, L, N, V as in the concepts; B rows of a pass, T tokens of all streams of a row.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from math import prod
from typing import Literal

from blockdiffusion.estimate.sizes import NetworkSizes
from blockdiffusion.models.attention import CHUNK
from blockdiffusion.models.masks import Streams

AttentionKind = Literal["dense", "chunked", "flex", "causal", "needed"]

TILE = 128  # side of a tile of FlexAttention, and roughly of causal kernels
# Attention's gradient recomputes the scores: five products for the forward pass's two.
ATTENTION_BACKWARD = 2.5


@dataclass(frozen=True, kw_only=True)
class Pass:
    """One pass over some rows: forward, and in training backward.

    Attributes:
        rows: B.
        num_noisy: N; unused for autoregressive networks.
        scored: positions that get logits, over all rows and copies.
        given_bos: whether position 0 is given; an autoregressive network then reads L - 1 tokens.
        attention: how it is computed; see `attention_pairs`.
    """

    rows: int
    scored: float
    num_noisy: int = 1
    given_bos: bool = False
    attention: AttentionKind = "chunked"

    def tokens(self, sizes: NetworkSizes) -> int:
        """T."""
        if sizes.autoregressive:
            return sizes.seq_len - self.given_bos
        return sizes.streams(self.num_noisy).num_tokens

    def finished(self, sizes: NetworkSizes) -> float:
        """Tokens that the last layer finishes, over all rows."""
        return self.rows * self.tokens(sizes) if sizes.finishes_all else self.scored


@dataclass(frozen=True)
class Flops:
    """Floating-point operations.

    Attributes:
        layers: matrix products of the layers and of their conditioning.
        attention: scores and weighted sums, as computed.
        attention_needed: the part of these that the mask needs.
        head: logits.
    """

    layers: float
    attention: float
    attention_needed: float
    head: float

    @property
    def total(self) -> float:
        """All that is computed."""
        return self.layers + self.attention + self.head

    def __add__(self, other: Flops) -> Flops:
        return Flops(
            self.layers + other.layers,
            self.attention + other.attention,
            self.attention_needed + other.attention_needed,
            self.head + other.head,
        )

    def times(self, layers: float, attention: float, head: float) -> Flops:
        """Return each part times its factor."""
        return Flops(
            layers * self.layers,
            attention * self.attention,
            attention * self.attention_needed,
            head * self.head,
        )


def staircase(length: int, step: int) -> int:
    """Return the pairs of a query and a key if a query sees all keys up to the end of its step."""
    whole, rest = length - length % step, length % step
    return whole * (whole + step) // 2 + rest * length


def attention_pairs(streams: Streams, kind: AttentionKind) -> tuple[int, int]:
    """Return the pairs of a query and a key that are computed for one row and head: those of noisy
    queries, and those of clean ones.

    Args:
        kind: "needed" (by the mask), "chunked", "flex" (tiles that hold a visible pair; exact if S
            divides a tile or is a multiple of it), or "dense" (all).
    """
    length, size, copies = streams.seq_len, streams.block_size, streams.num_noisy
    clean, causal = int(streams.has_clean), streams.clean_attention == "causal"
    if kind == "dense":
        return copies * length * streams.num_tokens, clean * length * streams.num_tokens
    step = {"needed": size, "chunked": size * max(1, CHUNK // size), "flex": max(size, TILE)}[kind]
    own = length * (step if kind == "flex" else size)
    # A tile that holds several blocks also holds pairs with earlier ones.
    earlier = staircase(length, step) - (0 if kind == "flex" and size < TILE else length * size)
    if causal and kind != "chunked":
        step = 1 if kind == "needed" else TILE
    return copies * (own + clean * earlier), clean * staircase(length, step)


def causal_pairs(tokens: int, kind: AttentionKind) -> int:
    """Return the same for one autoregressive stream: "causal" kernels compute whole tiles."""
    return tokens**2 if kind == "dense" else staircase(tokens, 1 if kind == "needed" else TILE)


def _pass_pairs(sizes: NetworkSizes, p: Pass, kind: AttentionKind) -> int:
    """Pairs of one row and head in all layers; the last one may leave clean queries out."""
    if sizes.autoregressive:
        return sizes.num_hidden_layers * causal_pairs(p.tokens(sizes), kind)
    noisy, clean = attention_pairs(sizes.streams(p.num_noisy), kind)
    return sizes.num_hidden_layers * (noisy + clean) - (0 if sizes.finishes_all else clean)


def _flops(
    sizes: NetworkSizes,
    read: float,
    finished: float,
    scored: float,
    vectors: float,
    pairs: float,
    needed: float,
) -> Flops:
    """Operations of a pass that reads `read` tokens. The last layer finishes some of them, and
    makes only queries, keys and values of the others. Pairs are those of all rows and layers in one
    head; `vectors` go through the conditioning."""
    heads = sizes.hidden_size * (sizes.num_attention_heads * sizes.head_dim + sizes.cache_width)
    numbers = read * (sizes.num_hidden_layers - 1) * sizes.layer_numbers
    numbers += read * heads + finished * (sizes.layer_numbers - heads)
    numbers += sizes.conditioning * vectors
    per_pair = 4 * sizes.num_attention_heads * sizes.head_dim
    return Flops(
        layers=2 * numbers,
        attention=per_pair * pairs,
        attention_needed=per_pair * needed,
        head=2 * sizes.hidden_size * sizes.vocab_size * scored,
    )


def forward_flops(sizes: NetworkSizes, p: Pass) -> Flops:
    """Return those of a forward pass over [noisy_1; ...; noisy_N; clean], or over causal rows."""
    pairs, needed = (p.rows * _pass_pairs(sizes, p, kind) for kind in (p.attention, "needed"))
    read = p.rows * p.tokens(sizes)
    vectors = read if sizes.time_conditioning else 1
    return _flops(sizes, read, p.finished(sizes), p.scored, vectors, pairs, needed)


def training_flops(sizes: NetworkSizes, p: Pass, *, checkpointing: bool = False) -> Flops:
    """Return those of a forward and backward pass: a product's gradient is two products, and that
    of frozen weights one (if anything below them is trained, which is not looked at).

    Args:
        checkpointing: whether the backward pass computes the layers again.
    """
    again = int(checkpointing)
    return forward_flops(sizes, p).times(
        2 + sizes.trained_share + again,
        1 + ATTENTION_BACKWARD + again,
        2 + sizes.trains_output,
    )


def call_flops(sizes: NetworkSizes, rows: int, tokens: int, keys: float, scored: float) -> Flops:
    """Return those of a network call in sampling: `tokens` new tokens of every row against `keys`
    (their own included), with logits at `scored` positions over all rows."""
    new = rows * tokens
    pairs = sizes.num_hidden_layers * new * keys
    finished = new if sizes.finishes_all else scored
    vectors = new if sizes.time_conditioning else 0  # else it is folded into the weights
    return _flops(sizes, new, finished, scored, vectors, pairs, pairs)


def muon_flops(shapes: Iterable[tuple[int, ...]], steps: int = 5) -> int:
    """Return those of Muon's orthogonalisation, once an update: `steps` rounds of X Xt, its square,
    and that times X, for X with the shorter side first."""
    return sum(steps * (4 * min(shape) * prod(shape) + 2 * min(shape) ** 3) for shape in shapes)
