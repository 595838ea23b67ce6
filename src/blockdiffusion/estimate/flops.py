"""Floating-point operations of training and sampling passes, by formula.

Counted are matrix products and attention, a multiply-add as two. Attention computes whole chunks or
tiles, of which the mask throws a part away; what the mask asks for is told beside it. The tests
compare the formulas with PyTorch's own counter.

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

TILE = 128  # of FlexAttention, and of causal kernels, about
# Attention's gradient makes the scores again: five products for the forward pass's two.
ATTENTION_BACKWARD = 2.5


@dataclass(frozen=True, kw_only=True)
class Pass:
    """One pass over some rows: forward, and in training backward.

    Attributes:
        rows: B.
        num_noisy: N; not read by autoregressive networks.
        scored: positions, over all rows and copies, of which there are logits.
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
        """Tokens, over all rows, that leave the last layer."""
        return self.rows * self.tokens(sizes) if sizes.autoregressive else self.scored


@dataclass(frozen=True)
class Flops:
    """Floating-point operations.

    Attributes:
        layers: matrix products of the layers, with what conditions them.
        attention: scores and sums over them, as computed.
        attention_needed: the part of these that the mask asks for.
        head: logits.
    """

    layers: float
    attention: float
    attention_needed: float
    head: float

    @property
    def total(self) -> float:
        """As computed."""
        return self.layers + self.attention + self.head

    def __add__(self, other: Flops) -> Flops:
        return Flops(
            self.layers + other.layers,
            self.attention + other.attention,
            self.attention_needed + other.attention_needed,
            self.head + other.head,
        )

    def times(self, layers: float, attention: float, head: float) -> Flops:
        """Each part by its factor."""
        return Flops(
            layers * self.layers,
            attention * self.attention,
            attention * self.attention_needed,
            head * self.head,
        )


def staircase(length: int, step: int) -> int:
    """Pairs of a query and a key where a query sees all keys up to the end of its step."""
    whole, rest = length - length % step, length % step
    return whole * (whole + step) // 2 + rest * length


def attention_pairs(streams: Streams, kind: AttentionKind) -> tuple[int, int]:
    """Pairs of a query and a key that are computed for one row and head: those whose query is
    noisy, and those whose query is clean.

    Args:
        kind: "needed" (what the mask asks for), "chunked", "flex" (tiles that hold a visible pair;
            exact where S divides a tile or is divided by it), or "dense" (all).
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
    """The same of one autoregressive stream: "causal" kernels compute whole tiles."""
    return tokens**2 if kind == "dense" else staircase(tokens, 1 if kind == "needed" else TILE)


def _pass_pairs(sizes: NetworkSizes, p: Pass, kind: AttentionKind) -> int:
    """Pairs of one row and head in all layers; the last one has no clean queries."""
    if sizes.autoregressive:
        return sizes.num_hidden_layers * causal_pairs(p.tokens(sizes), kind)
    noisy, clean = attention_pairs(sizes.streams(p.num_noisy), kind)
    return sizes.num_hidden_layers * noisy + (sizes.num_hidden_layers - 1) * clean


def _flops(
    sizes: NetworkSizes,
    read: float,
    finished: float,
    scored: float,
    vectors: float,
    pairs: float,
    needed: float,
) -> Flops:
    """Of `read` tokens, of which the last layer finishes some: of the others it makes queries, keys
    and values. Pairs are those of all rows and layers, in one head; `vectors` are conditioned."""
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
    """Of a forward pass over [noisy_1; ...; noisy_N; clean], or over causal rows."""
    pairs, needed = (p.rows * _pass_pairs(sizes, p, kind) for kind in (p.attention, "needed"))
    read = p.rows * p.tokens(sizes)
    vectors = read if sizes.time_conditioning else 1
    return _flops(sizes, read, p.finished(sizes), p.scored, vectors, pairs, needed)


def training_flops(sizes: NetworkSizes, p: Pass, *, checkpointing: bool = False) -> Flops:
    """Of a forward and backward pass: a product's gradient is two products.

    Args:
        checkpointing: whether the layers are computed again in the backward pass.
    """
    again = int(checkpointing)
    return forward_flops(sizes, p).times(3 + again, 1 + ATTENTION_BACKWARD + again, 3)


def call_flops(sizes: NetworkSizes, rows: int, tokens: int, keys: float, scored: float) -> Flops:
    """Of a network call in sampling: `tokens` new ones of every row against `keys` (their own
    included), with logits at `scored` positions over all rows, which are what the last layer
    finishes (an autoregressive network finishes all)."""
    new = rows * tokens
    pairs = sizes.num_hidden_layers * new * keys
    finished = new if sizes.autoregressive else scored
    vectors = new if sizes.time_conditioning else 0  # elsewhere it is in the weights
    return _flops(sizes, new, finished, scored, vectors, pairs, pairs)


def muon_flops(shapes: Iterable[tuple[int, ...]], steps: int = 5) -> int:
    """Of Muon's orthogonalisation of matrices, once an update: `steps` rounds of X Xt, its square,
    and that times X, for X with the shorter side first."""
    return sum(steps * (4 * min(shape) * prod(shape) + 2 * min(shape) ** 3) for shape in shapes)
