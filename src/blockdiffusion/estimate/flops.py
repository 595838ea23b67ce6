"""What training and sampling cost: parameters, floating-point operations, bytes. Arithmetic only.

The operations counted are those of matrix products and of attention, a multiply-add as two. They
are the ones that the program really makes: attention computes whole chunks (or tiles), of which the
mask throws a part away; the operations that the mask asks for are told beside them.

Every formula is tested against the network: operations against PyTorch's own counter, bytes against
the tensors that exist. Symbols are those of the concepts: S, L, N, V; D width, C width of the
conditioning, B rows of a pass, T tokens of all its streams.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields
from math import prod
from typing import Any, Literal

from blockdiffusion.diffusion.losses import CPU_PIECES, GPU_PIECES
from blockdiffusion.models.attention import CHUNK
from blockdiffusion.models.masks import Streams

AttentionKind = Literal["dense", "chunked", "flex", "causal", "needed"]
Dtype = Literal["float32", "bf16"]
SampleDtype = Literal["float32", "bf16", "int8"]

TILE = 128  # of FlexAttention, and of the causal kernels, about
FREQUENCIES = 256  # features of the time embedding
BYTES = {"float32": 4, "bf16": 2}
# Attention's gradient makes the scores again: five products for the forward pass's two.
ATTENTION_BACKWARD = 2.5
DRAW_BYTES = 32  # read and written for each logit of a drawn token: softmax, filters, sum


@dataclass(frozen=True, kw_only=True)
class Network:
    """Sizes of a network, as its configuration has them.

    Attributes:
        cond_dim: C, or None where layers are not modulated.
        autoregressive: whether it predicts the next token; S is then 1.
    """

    vocab_size: int
    seq_len: int
    block_size: int
    width: int
    num_layers: int
    num_heads: int
    cond_dim: int | None
    dropout: float = 0.0
    time_conditioning: bool = False
    autoregressive: bool = False
    clean_attention: Literal["block", "causal"] = "block"

    @classmethod
    def of(cls, config: Any) -> Network:
        """The sizes in a `BlockDiffusionConfig`."""
        own = {item.name for item in fields(cls)} - {"cond_dim", "autoregressive"}
        return cls(
            cond_dim=config.cond_dim if config.adaln else None,
            autoregressive=config.objective == "autoregressive",
            **{name: getattr(config, name) for name in own},
        )

    @property
    def has_clean(self) -> bool:
        """Whether a training pass reads the clean stream: not where one block is the whole row."""
        return not self.autoregressive and self.block_size < self.seq_len

    def shapes(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Name and shape of every parameter, in the network's order."""
        width, cond = self.width, self.cond_dim
        yield "embedding.weight", (self.vocab_size, width)
        if cond is not None:
            yield "time.linear_in.weight", (cond, FREQUENCIES)
            yield "time.linear_in.bias", (cond,)
            yield "time.linear_out.weight", (cond, cond)
            yield "time.linear_out.bias", (cond,)
        for index in range(self.num_layers):
            layer = f"layers.{index}."
            yield f"{layer}attn_norm.weight", (width,)
            yield f"{layer}attn_qkv.weight", (3 * width, width)
            yield f"{layer}attn_out.weight", (width, width)
            yield f"{layer}mlp_norm.weight", (width,)
            yield f"{layer}mlp_in.weight", (4 * width, width)
            yield f"{layer}mlp_in.bias", (4 * width,)
            yield f"{layer}mlp_out.weight", (width, 4 * width)
            yield f"{layer}mlp_out.bias", (width,)
            if cond is not None:
                yield f"{layer}modulation.weight", (6 * width, cond)
                yield f"{layer}modulation.bias", (6 * width,)
        yield "final_norm.weight", (width,)
        if cond is not None:
            yield "final_modulation.weight", (2 * width, cond)
            yield "final_modulation.bias", (2 * width,)
        yield "output.weight", (self.vocab_size, width)
        yield "output.bias", (self.vocab_size,)

    @property
    def parameters(self) -> int:
        """All parameters, both embeddings included."""
        return sum(prod(shape) for _, shape in self.shapes())

    @property
    def layer_parameters(self) -> int:
        """Those of one layer."""
        return sum(prod(shape) for name, shape in self.shapes() if name.startswith("layers.0."))

    def sampled_shapes(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Those of the copy that samples (`models.inference`): norms and modulation of a network
        that does not read the time are in the weights behind them, which then have biases."""
        if self.time_conditioning:
            yield from self.shapes()
            return
        for name, shape in self.shapes():
            if not any(
                part in name for part in ("time.", "modulation.", "attn_norm.", "mlp_norm.")
            ):
                yield name, shape
            if name.endswith("attn_qkv.weight"):
                yield name.replace("weight", "bias"), shape[:1]

    @property
    def embedding_parameters(self) -> int:
        """Those of the input embedding and of the output."""
        return 2 * self.vocab_size * self.width + self.vocab_size


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

    def tokens(self, network: Network) -> int:
        """T, tokens of all streams of a row."""
        if network.autoregressive:
            return network.seq_len - self.given_bos
        return (self.num_noisy + network.has_clean) * network.seq_len

    def asked(self, network: Network) -> int:
        """Tokens of a row that have queries in the last layer."""
        if network.autoregressive:
            return self.tokens(network)
        return self.num_noisy * network.seq_len

    def finished(self, network: Network) -> float:
        """Tokens, over all rows, that leave the last layer."""
        return self.rows * self.tokens(network) if network.autoregressive else self.scored

    def streams(self, network: Network) -> Streams:
        """The layout of a row."""
        return Streams(
            network.seq_len,
            network.block_size,
            self.num_noisy,
            network.has_clean,
            network.clean_attention,
        )


@dataclass(frozen=True, kw_only=True)
class Flops:
    """Floating-point operations.

    Attributes:
        layers: matrix products of the layers, the modulation included.
        attention: scores and sums over them, as computed.
        attention_needed: the part of these that the mask asks for.
        head: logits, and what follows from them.
    """

    layers: float
    attention: float
    attention_needed: float
    head: float

    @property
    def total(self) -> float:
        """As computed."""
        return self.layers + self.attention + self.head

    @property
    def needed(self) -> float:
        """Without what attention computes and throws away."""
        return self.layers + self.attention_needed + self.head

    def __add__(self, other: Flops) -> Flops:
        return Flops(
            **{f.name: getattr(self, f.name) + getattr(other, f.name) for f in fields(self)}
        )

    def times(self, factor: float) -> Flops:
        """So many times as much."""
        return Flops(**{f.name: factor * getattr(self, f.name) for f in fields(self)})


# --- attention ------------------------------------------------------------------------------------


def attention_pairs(streams: Streams, kind: AttentionKind) -> tuple[int, int]:
    """Pairs of a query and a key that are computed for one row and head: those whose query is
    noisy, and those whose query is clean.

    Args:
        kind: "chunked", "flex" (tiles of 128 by 128 that hold a visible pair), "dense" (all), or
            "needed" (the visible ones).
    """
    length, size, copies = streams.seq_len, streams.block_size, streams.num_noisy
    clean, blocks = int(streams.has_clean), streams.seq_len // streams.block_size
    if kind == "dense":
        return copies * length * streams.num_tokens, clean * length * streams.num_tokens
    if kind == "needed":
        noisy = length * size + clean * size**2 * blocks * (blocks - 1) // 2
        if streams.clean_attention == "causal":
            return copies * noisy, clean * length * (length + 1) // 2
        return copies * noisy, clean * size**2 * blocks * (blocks + 1) // 2
    if kind == "flex":
        return _tile_pairs(streams)
    assert kind == "chunked", kind
    chunk = size * max(1, CHUNK // size)
    noisy_pairs, clean_pairs = copies * length * size, 0
    for start in range(0, length, chunk):
        stop = min(start + chunk, length)
        noisy_pairs += clean * copies * (stop - start) * (stop - size)
        clean_pairs += clean * (stop - start) * stop
    return noisy_pairs, clean_pairs


def _tile_pairs(streams: Streams) -> tuple[int, int]:
    """The pairs of FlexAttention, for rows of whole tiles; shorter ones count as one tile."""
    length, size = streams.seq_len, streams.block_size
    noisy = clean = 0
    for start in range(0, length, TILE):
        stop = min(start + TILE, length)
        first_block, last_block = start // size, (stop - 1) // size
        own = -(-min((last_block + 1) * size, length) // TILE) - first_block * size // TILE
        noisy += own
        if streams.has_clean:
            noisy += -(-last_block * size // TILE)
            seen = stop if streams.clean_attention == "causal" else (last_block + 1) * size
            clean += -(-min(seen, length) // TILE)
    return streams.num_noisy * noisy * TILE**2, clean * TILE**2


def causal_pairs(tokens: int, kind: AttentionKind) -> int:
    """The same for one autoregressive stream: "causal" kernels compute whole tiles."""
    if kind == "dense":
        return tokens**2
    if kind == "needed":
        return tokens * (tokens + 1) // 2
    tiles = range(TILE, tokens + TILE, TILE)
    return sum((min(end, tokens) - (end - TILE)) * min(end, tokens) for end in tiles)


def _pass_pairs(network: Network, p: Pass, kind: AttentionKind) -> int:
    """Pairs of one row and head in all layers; the last one has no clean queries."""
    if network.autoregressive:
        return network.num_layers * causal_pairs(p.tokens(network), kind)
    noisy, clean = attention_pairs(p.streams(network), kind)
    return network.num_layers * noisy + (network.num_layers - 1) * clean


# --- operations -----------------------------------------------------------------------------------


def forward_flops(network: Network, p: Pass) -> Flops:
    """Operations of a forward pass over [noisy_1; ...; noisy_N; clean], or over one causal row."""
    width, layers = network.width, network.num_layers
    read, kept = p.rows * p.tokens(network), p.finished(network)
    # Queries, keys and values are made of all tokens in all layers; in the last layer all but the
    # scored ones stop there.
    products = 2 * 3 * width**2 * layers * read
    products += 2 * 9 * width**2 * ((layers - 1) * read + kept)
    embed, modulate, final = _modulation_flops(network, read, kept)
    products += embed + modulate + final
    return Flops(
        layers=products,
        attention=4 * width * p.rows * _pass_pairs(network, p, p.attention),
        attention_needed=4 * width * p.rows * _pass_pairs(network, p, "needed"),
        head=2 * width * network.vocab_size * p.scored,
    )


def _modulation_flops(network: Network, read: int, kept: float) -> tuple[float, float, float]:
    """adaLN, of one vector for all tokens, or, with time, of one for each: the embedding of the
    time, the modulations of all layers, and the last one."""
    cond, width = network.cond_dim, network.width
    if cond is None:
        return 0, 0, 0
    if not network.time_conditioning:
        read = kept = 1
    embed = 2 * read * cond * (FREQUENCIES + cond)
    return embed, 2 * read * 6 * width * cond * network.num_layers, 2 * kept * 2 * width * cond


def training_flops(network: Network, p: Pass, *, checkpointing: bool = False) -> Flops:
    """Operations of a forward and backward pass.

    A product's gradient is two products. The first one of the time embedding needs only one, its
    input being no parameter's.

    Args:
        checkpointing: whether the layers are computed again in the backward pass.
    """
    forward = forward_flops(network, p)
    times = 3 + checkpointing
    attention = 1 + ATTENTION_BACKWARD + checkpointing
    layers = times * forward.layers
    if network.cond_dim is not None:
        read = p.rows * p.tokens(network)
        layers -= 2 * (read if network.time_conditioning else 1) * network.cond_dim * FREQUENCIES
        if checkpointing:  # all but what stands before and after the layers
            embed, _, final = _modulation_flops(network, read, p.finished(network))
            layers -= embed + final
    return Flops(
        layers=layers,
        attention=attention * forward.attention,
        attention_needed=attention * forward.attention_needed,
        head=3 * forward.head,
    )


def muon_flops(shapes: Iterator[tuple[int, ...]] | list[tuple[int, ...]], steps: int = 5) -> int:
    """Operations of Muon's orthogonalisation of matrices, once an update: `steps` rounds of
    X Xt, its square, and that times X, for X with the shorter side first."""
    total = 0
    for rows, columns in shapes:
        short, long = sorted((rows, columns))
        total += steps * (4 * short**2 * long + 2 * short**3)
    return total


def call_flops(network: Network, rows: int, tokens: int, keys: float, scored: float) -> Flops:
    """Operations of one network call in sampling: `tokens` new ones of every row against `keys`
    (their own included), with logits at `scored` positions over all rows, which are what the last
    layer finishes (an autoregressive network finishes all). The network is the copy that samples,
    which has a modulation only where it reads the time."""
    width, new = network.width, rows * tokens
    last = new if network.autoregressive else scored
    modulation = sum(_modulation_flops(network, new, last)) if network.time_conditioning else 0
    pairs = network.num_layers * new * keys
    return Flops(
        layers=2 * width**2 * (12 * (network.num_layers - 1) * new + 3 * new + 9 * last)
        + modulation,
        attention=4 * width * pairs,
        attention_needed=4 * width * pairs,
        head=2 * width * network.vocab_size * scored,
    )


# --- bytes ----------------------------------------------------------------------------------------


def weight_bytes(network: Network, dtype: SampleDtype) -> int:
    """All weights of the copy that samples."""
    return embedding_bytes(network, dtype) + read_bytes(network, dtype)


def embedding_bytes(network: Network, dtype: SampleDtype) -> int:
    """The input embedding; it is not rounded to 8 bits."""
    return BYTES[_held(dtype)] * network.vocab_size * network.width


def read_bytes(network: Network, dtype: SampleDtype) -> int:
    """Weights that a network call reads: all but the input embedding, of which it takes rows.

    With int8 the matrices of layers and output take a byte for each number, and eight for the scale
    and the offset of each of their rows.
    """
    total = 0
    for name, shape in network.sampled_shapes():
        if name.startswith("embedding."):
            continue
        is_linear = len(shape) == 2 and not name.startswith("time.") and "modulation." not in name
        if dtype == "int8" and is_linear:
            total += prod(shape) + 8 * shape[0]
        else:
            total += BYTES[_held(dtype)] * prod(shape)
    return total


def cache_bytes(network: Network, rows: int, capacity: int, dtype: SampleDtype) -> int:
    """Keys and values of `capacity` tokens of every row, in all layers."""
    return 2 * BYTES[_held(dtype)] * network.num_layers * network.width * rows * capacity


def _held(dtype: SampleDtype) -> Dtype:
    """The type of what is not a matrix: products of 8 bits take and give float32."""
    return "float32" if dtype == "int8" else dtype


@dataclass(frozen=True, kw_only=True)
class Layout:
    """How a training pass lies in memory: where it runs, and in what precision.

    Attributes:
        dtype: "bf16" is autocast: the residual stream and the sums stay float32.
        cuda: there dropout left to autograd keeps bytes, elsewhere numbers of the compute type.
        checkpointing: whether only the inputs of the layers are kept.
        compiled: whether layers are compiled, which leaves their gradients to autograd.
        fused_loss: whether the gradient of the logits is made at once (cross-entropy), or later,
            from logits that are made again.
    """

    dtype: Dtype = "float32"
    cuda: bool = False
    checkpointing: bool = False
    compiled: bool = False
    fused_loss: bool = True

    def fuses(self, network: Network) -> bool:
        """Whether layers have gradients of their own (`models.fused`)."""
        return not (self.compiled or network.time_conditioning)


@dataclass(frozen=True, kw_only=True)
class Activations:
    """Bytes that a training pass holds besides the parameters and what belongs to them.

    Attributes:
        saved: kept from the forward pass for the backward pass.
        copies: bf16 copies of the weights, kept as long.
        loss: the most that is held at the end of the forward pass: logits, the gradient of the
            output layer, which is made there, and with checkpointing the other bf16 copies.
        working: the most that the backward pass of a layer holds besides.
    """

    saved: float
    copies: float
    loss: float
    working: float

    @property
    def peak(self) -> float:
        """The most at a time."""
        return self.saved + self.copies + max(self.loss, self.working)


def activation_bytes(network: Network, p: Pass, layout: Layout) -> Activations:
    """What a pass over `p.rows` rows holds."""
    read, kept = p.rows * p.tokens(network), p.finished(network)
    layers, short = network.num_layers, BYTES[layout.dtype]
    first, last = (_layer_bytes(network, p, layout, is_last=x) for x in (False, True))
    if layout.checkpointing:
        # The residual stream before every layer; one layer's own at a time.
        saved, again = 4 * network.width * layers * read, first if layers > 1 else last
    else:
        saved, again = (layers - 1) * first + last, 0.0
    saved += kept * (4 * network.width + 8) + 8 * read  # the last norm; the ids
    saved += 2 * 4 * p.tokens(network) * network.width // network.num_heads // 2  # angles
    if network.time_conditioning and network.cond_dim is not None:
        # The embedding of every token's time, and the last modulation.
        saved += short * read * (FREQUENCIES + 4 * network.cond_dim)
        saved += kept * network.width * (4 + short)
    loss, copies = _loss_bytes(network, p, layout), 0.0
    if layout.dtype == "bf16":
        # Of the weights whose products autograd differentiates: of the modulations, and where
        # layers have no gradients of their own of all others but the one behind the GELU.
        matrices = [
            shape
            for name, shape in network.shapes()
            if len(shape) == 2
            and "layers." in name
            and ("modulation" in name if layout.fuses(network) else "mlp_out" not in name)
        ]
        copies = 2 * sum(map(prod, matrices))
        if layout.checkpointing:  # in the backward pass those of one layer
            loss, copies = loss + copies * (layers - 1) / layers, copies / layers
    working = again + read * network.width * (14 * short + 8)
    return Activations(saved=saved, copies=copies, loss=loss, working=working)


def _layer_bytes(network: Network, p: Pass, layout: Layout, *, is_last: bool) -> float:
    """What one layer keeps for its gradient.

    In units of the width: the residual stream (float32), queries, keys and values, what attention
    gave, the residual stream again, and the MLP before its nonlinearity (4); with dropout a byte of
    each branch. FlexAttention's output is kept once more, in the order of the tokens.

    A layer that reads the time, or is compiled, leaves more to autograd: the outputs of its norms,
    rotated queries and keys beside the product that the values are a part of, both branches before
    their gates (where these are learned), and dropout's noise in their type.
    """
    width, short = network.width, BYTES[layout.dtype]
    read = p.rows * p.tokens(network)
    asked = p.rows * p.asked(network) if is_last else read
    kept = p.finished(network) if is_last else read
    timed, plain = network.time_conditioning, not layout.fuses(network)
    before = width * (4 + (6 if plain else 3) * short) + 8
    reordered = p.attention == "flex" and not network.autoregressive
    attention = width * (1 + reordered) * short + 4 * network.num_heads
    dropped = short if plain and not layout.cuda else 1
    numbers = (7 if network.cond_dim is not None else 5) if plain else 4
    after = width * (4 + numbers * short + 2 * dropped * (network.dropout > 0)) + 8
    own = read * before + asked * attention + kept * after
    if kept < asked:  # what attention gave is kept again for these, and their places
        own += kept * (width * short + 16)
    if timed:  # the modulation of every token, and what it is multiplied with
        own += (kept * 2 if is_last else read * 6) * width * short
        own += (read + kept) * width * (4 + short)
    if plain and layout.dtype == "bf16" and not layout.cuda:  # angles, rounded for each layer
        own += 2 * 2 * short * p.tokens(network) * (width // network.num_heads // 2)
    return own


def _loss_bytes(network: Network, p: Pass, layout: Layout) -> float:
    """Logits and the gradient of the output layer, which the masked loss makes at once."""
    vocab, width, short = network.vocab_size, network.width, BYTES[layout.dtype]
    pieces = GPU_PIECES if layout.cuda else CPU_PIECES
    logits = 4 * min(pieces.most_logits, p.scored * vocab)
    if not layout.fused_loss:  # three more of their kind in the softmax, and what they are made of
        return logits * (3 + short / 4) + 2 * short * p.scored * width
    rounded = 2 * logits * short / 4 if layout.dtype == "bf16" else 0
    gradients = 4 * (vocab * width + vocab) + 2 * short * p.scored * width
    copies = 2 * vocab * width + 4 * vocab * width if layout.dtype == "bf16" else 0
    return logits + rounded + gradients + copies


def training_traffic(network: Network, p: Pass, layout: Layout) -> float:
    """Bytes that the operations between the products read and write, forward and backward, about.

    Norms, rotations, copies, dropout, gates and nonlinearities pass over the activations; their
    gradients pass over twice as much. Logits are passed over eight times in all.
    """
    width, short = network.width, BYTES[layout.dtype]
    read, kept = p.rows * p.tokens(network), p.finished(network)
    before = width * ((4 + short) + 4 * short)
    after = width * (
        4 * short
        + 2 * (8 + short)
        + (4 + short)
        + 8 * short
        + (6 * short if network.dropout else 0)
    )
    layers = network.num_layers
    forward = layers * read * before + ((layers - 1) * read + kept) * after
    chunks = 0.0
    if p.attention == "chunked" and not network.autoregressive:
        # In bf16 queries, keys, values and the output are lifted to float32, or brought back.
        forward += layers * read * width * (24 if layout.dtype == "bf16" else 0)
        # The gradients of every chunk's keys and values, in float32, are added to the others'.
        keys = sum(attention_pairs(p.streams(network), "chunked")) / CHUNK
        chunks = layers * p.rows * keys * width * 2 * 3 * 4
    times = 3 + layout.checkpointing
    return times * forward + chunks + 8 * 4 * p.scored * network.vocab_size


def update_traffic(network: Network, state_bytes: float) -> float:
    """Bytes that clipping, the optimizer and the moving average read and write in an update: the
    gradient four times, weights and average twice more, the optimizer's state once each way."""
    return 4 * network.parameters * (4 + 2 + 3) + 2 * state_bytes
