"""Attention over the streams of a training pass, and over the cache while sampling.

Three backends compute the same function:

* `dense`: softmax over the whole masked score matrix, written out. Slow; the oracle.
* `chunked`: part by part, noisy blocks with themselves and chunks of queries with the clean keys
  that lie before or in the chunk: about a quarter of the dense work, on CPUs by PyTorch's fused
  kernel. Default on CPU and MPS.
* `flex`: FlexAttention with a block mask built once per layout. Default on CUDA; it has no
  backward on CPU.

Keys and values may have fewer heads than queries (GQA): each is shared by equally many. Networks
with soft-capped scores take `dense`, and their own product over the cache.

Shape suffixes: B batch, H heads, J heads of keys and values, E head width, T tokens of all streams,
Q queries, C a chunk.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import lru_cache, partial
from typing import Any, Literal, NamedTuple, get_args

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from blockdiffusion.errors import UserError, shown
from blockdiffusion.models.backbone import AttentionSizes
from blockdiffusion.models.cache import RaggedPlacement
from blockdiffusion.models.masks import Streams, dense_mask, stream_predicate
from blockdiffusion.runtime.devices import allow_compilations

Backend = Literal["dense", "chunked", "flex"]
# What a backend makes of a pass's masks, by the number of queries and the layer's window.
Built = dict[tuple[int, int | None], Any]
CHUNK = 128  # tokens of a query chunk; measured best between 64 and 256 at L = 1024 on CPU


def resolve_backend(name: str | None, device: torch.device) -> Backend:
    """The backend called `name`, or the default of `device` for None.

    Raises:
        UserError: for an unknown name.
    """
    if name is None:
        return "flex" if device.type == "cuda" else "chunked"
    if name not in get_args(Backend):
        raise UserError(
            f"unknown attention backend {shown(name)}; known: {', '.join(get_args(Backend))}"
        )
    return name  # type: ignore[return-value]  # just checked


def attend(
    q_BHQE: torch.Tensor,
    k_BJTE: torch.Tensor,
    v_BJTE: torch.Tensor,
    streams: Streams,
    backend: Backend,
    valid_BL: torch.Tensor | None = None,
    built: Built | None = None,
    sizes: AttentionSizes | None = None,
) -> torch.Tensor:
    """Attention of a training pass (B, H, Q, E).

    The queries are those of all streams, or of the noisy streams only (Q = num_noisy * seq_len).
    `valid_BL` (bool) marks the keys of each stream that exist; padding still sees itself, so that
    no row of the softmax is empty. `built` keeps what a backend makes of the mask: give all layers
    of a pass the same one, empty at first. `sizes` gives the scale and the soft cap of the scores;
    None = 1/sqrt(E), and none.
    """
    assert k_BJTE.shape[2] == streams.num_tokens
    built = {} if built is None else built
    softcap = None if sizes is None else sizes.softcap
    functions = {
        "dense": partial(_dense, softcap=softcap),
        "chunked": partial(_chunked, built=built),
        "flex": partial(_flex, built=built),
    }
    backend = backend if softcap is None else "dense"
    with torch.autocast(q_BHQE.device.type, enabled=False):
        q, k, v = scaled(q_BHQE, sizes), k_BJTE, v_BJTE
        if backend != "flex":
            k, v = (for_every_head(x, q.shape[1]) for x in (k, v))
        if backend != "chunked":  # which does it itself, and keeps the shorter numbers
            q, k, v = map(lifted, (q, k, v))
        return functions[backend](q, k, v, streams, valid_BL).to(q_BHQE.dtype)


def scaled(q: torch.Tensor, sizes: AttentionSizes | None) -> torch.Tensor:
    """Queries (..., E) whose scores have the network's scale once they are divided by sqrt(E)."""
    if sizes is None or sizes.scale is None:
        return q
    factor = sizes.scale * math.sqrt(q.shape[-1])
    return q if math.isclose(factor, 1, rel_tol=1e-12) else q * factor


def for_every_head(x_BJTE: torch.Tensor, num_heads: int) -> torch.Tensor:
    """Keys or values (B, H, T, E), repeated for the query heads that share them."""
    shared = num_heads // x_BJTE.shape[1]
    return x_BJTE if shared == 1 else x_BJTE.repeat_interleave(shared, dim=1)


def lifted(x: torch.Tensor) -> torch.Tensor:
    """What attention over streams computes with: on a CPU float32 in the place of bf16. PyTorch's
    kernel is faster with it there, its backward pass by half."""
    return x.float() if x.dtype == torch.bfloat16 and x.device.type == "cpu" else x


def attend_cached(
    q_BHTE: torch.Tensor,
    k_BJKE: torch.Tensor,
    v_BJKE: torch.Tensor,
    mask_BTK: torch.Tensor | None,
    sizes: AttentionSizes | None = None,
) -> torch.Tensor:
    """Attention of new tokens over the keys of a cache.

    `mask_BTK` is True where a key is visible, or what is added to its score; None = all are.
    """
    mask = None if mask_BTK is None else mask_BTK[:, None]
    q, shared = scaled(q_BHTE, sizes), q_BHTE.shape[1] != k_BJKE.shape[1]
    if sizes is not None and sizes.softcap is not None:
        k, v = (for_every_head(x, q.shape[1]) for x in (k_BJKE, v_BJKE))
        return _written_softmax(q, k, mask, sizes.softcap) @ v
    return F.scaled_dot_product_attention(q, k_BJKE, v_BJKE, attn_mask=mask, enable_gqa=shared)


class RaggedGroup(NamedTuple):
    """Rows that go through one call of attention, padded to the same number T of queries.

    Attributes:
        rows: which rows.
        index_M: which tokens of the pass (P) are theirs.
        place_M: row (of these rows) and column (of T) of each.
        mask_RTK: visible keys of every query.
    """

    rows: slice
    index_M: torch.Tensor
    place_M: tuple[torch.Tensor, torch.Tensor]
    mask_RTK: torch.Tensor


def ragged_groups(
    place: RaggedPlacement,
    tokens_B: torch.Tensor,
    few: int,
    visible: Callable[[slice, int], torch.Tensor],
    device: torch.device,
) -> list[RaggedGroup]:
    """The groups, on `device`, of a pass with `tokens_B` tokens of each row, placed at `place`.

    Rows of at most `few` tokens go together (all rows take part, so that their keys need not be
    copied), longer ones alone. `visible(rows, tokens)` is a group's mask.
    """
    is_long_B = tokens_B > few

    def group(rows: slice, tokens: int, mine_P: torch.Tensor) -> RaggedGroup:
        index_M = mine_P.nonzero().flatten()
        row_M, column_M = place.rows_P[index_M] - rows.start, place.offsets_P[index_M]
        place_M = (row_M.to(device), column_M.to(device))
        return RaggedGroup(rows, index_M.to(device), place_M, visible(rows, tokens).to(device))

    groups = []
    if not is_long_B.all():
        longest = int(tokens_B[~is_long_B].max())
        groups.append(group(slice(0, len(tokens_B)), longest, ~is_long_B[place.rows_P]))
    for row in is_long_B.nonzero().flatten().tolist():
        groups.append(group(slice(row, row + 1), int(tokens_B[row]), place.rows_P == row))
    return groups


def attend_ragged(
    q_1HPE: torch.Tensor,
    k_BJKE: torch.Tensor,
    v_BJKE: torch.Tensor,
    groups: Sequence[RaggedGroup],
    sizes: AttentionSizes | None = None,
) -> torch.Tensor:
    """`attend_cached` for rows of different numbers of tokens, one after another; (1, H, P, E)."""
    q_PHE = q_1HPE[0].transpose(0, 1)
    out_PHE = torch.empty_like(q_PHE)
    for group in groups:
        queries_RTHE = q_PHE.new_zeros(*group.mask_RTK.shape[:2], *q_PHE.shape[1:])
        queries_RTHE[group.place_M] = q_PHE[group.index_M]
        queries_RHTE = queries_RTHE.transpose(1, 2)
        keys, values = k_BJKE[group.rows], v_BJKE[group.rows]
        found_RHTE = attend_cached(queries_RHTE, keys, values, group.mask_RTK, sizes)
        out_PHE[group.index_M] = found_RHTE.transpose(1, 2)[group.place_M]
    return out_PHE.transpose(0, 1)[None]


def causal_mask(valid_BT: torch.Tensor, window: int | None = None) -> torch.Tensor:
    """bool (B, T, T): which keys a token of one autoregressive stream sees.

    `valid_BT` (bool) marks the keys that exist. Padding still sees itself, so that no row of the
    softmax is empty.
    """
    index = torch.arange(valid_BT.shape[1], device=valid_BT.device)
    away_TT = index[:, None] - index
    near_TT = away_TT >= 0 if window is None else (away_TT >= 0) & (away_TT < window)
    return (valid_BT[:, None] | (away_TT == 0)) & near_TT


def attend_causal(
    q_BHTE: torch.Tensor,
    k_BJTE: torch.Tensor,
    v_BJTE: torch.Tensor,
    mask_BTT: torch.Tensor | None,
    sizes: AttentionSizes | None = None,
) -> torch.Tensor:
    """Attention of one autoregressive stream; `mask_BTT` None = each token sees those up to it."""
    if mask_BTT is None:
        shared = q_BHTE.shape[1] != k_BJTE.shape[1]
        q = scaled(q_BHTE, sizes)
        return F.scaled_dot_product_attention(q, k_BJTE, v_BJTE, is_causal=True, enable_gqa=shared)
    return attend_cached(q_BHTE, k_BJTE, v_BJTE, mask_BTT, sizes)


# --- dense: the oracle -----------------------------------------------------------------------


def _dense(
    q, k, v, streams: Streams, valid_BL: torch.Tensor | None, softcap: float | None = None
) -> torch.Tensor:
    visible = dense_mask(streams, q.device)[: q.shape[2]]
    if valid_BL is not None:
        copies = streams.num_noisy + streams.has_clean
        itself = torch.eye(streams.num_tokens, dtype=torch.bool, device=q.device)[: q.shape[2]]
        visible = visible & (valid_BL.repeat(1, copies)[:, None, None] | itself)
    return _written_softmax(q, k, visible, softcap) @ v


def _written_softmax(
    q, k, visible: torch.Tensor | None, softcap: float | None = None
) -> torch.Tensor:
    """Attention's weights; `visible` is True where a key is seen, or what is added to its score."""
    scores = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if visible is None:
        return scores.softmax(-1)
    if visible.dtype == torch.bool:
        return scores.masked_fill(~visible, -math.inf).softmax(-1)
    return (scores + visible).softmax(-1)


# --- chunked: exact, without most of the scores that the mask would throw away -----------------


class Part(NamedTuple):
    """Queries and keys that are computed together. The keys of a clean query are all in one part,
    those of a noisy one in two: its own block, and the clean blocks before.

    Attributes:
        queries, keys: five-dimensional views of them in tensors (B, H, T, ...) of all streams.
        merged: two neighbouring dimensions of these views are one while computing, this and the
            next; then they are (B', H, Q', ...) and (B', H, K', ...).
        free: how many keys, from the first, all queries see.
        mask: bool (Q', K' - free) or (B', 1, Q', K' - free): which of the others; None = all.
    """

    queries: Callable[[torch.Tensor], torch.Tensor]
    keys: Callable[[torch.Tensor], torch.Tensor]
    merged: int
    free: int = 0
    mask: torch.Tensor | None = None

    def asking(self, *tensors: torch.Tensor) -> list[torch.Tensor]:
        """The queries' part of each, merged: a view where that can be."""
        return [self.queries(x).flatten(self.merged, self.merged + 1) for x in tensors]

    def asked(self, *tensors: torch.Tensor) -> list[torch.Tensor]:
        """The keys' part of each."""
        return [self.keys(x).flatten(self.merged, self.merged + 1) for x in tensors]

    def bias(self, dtype: torch.dtype) -> torch.Tensor | None:
        """What is added to the scores: 0 where a key is seen, else minus infinity."""
        if self.mask is None:
            return None
        hidden = torch.zeros_like(self.mask, dtype=dtype).masked_fill_(~self.mask, -math.inf)
        return F.pad(hidden, (self.free, 0))

    def normaliser(self, lse: torch.Tensor) -> torch.Tensor:
        """log sum exp of the scores, minus infinity for a query that sees no key."""
        if self.mask is None or self.free:
            return lse
        return lse.masked_fill(~self.mask.any(-1), -math.inf)


def _chunked(
    q, k, v, streams: Streams, valid_BL: torch.Tensor | None, built: Built
) -> torch.Tensor:
    kind = (q.shape[2], streams.window)
    if kind not in built:
        parts = [_own_blocks(streams, valid_BL)]
        if streams.has_clean:
            parts += _chunks(streams, valid_BL, q.device, is_noisy=True)
        if q.shape[2] > streams.num_noisy * streams.seq_len:
            parts += _chunks(streams, valid_BL, q.device, is_noisy=False)
        built[kind] = parts
    out = _InParts.apply(q, k, v, built[kind])
    assert isinstance(out, torch.Tensor)
    return out


def _own_blocks(streams: Streams, valid_BL: torch.Tensor | None) -> Part:
    """The noisy blocks, each of which sees itself."""
    size, noisy = streams.block_size, streams.num_noisy * streams.seq_len

    def blocks(x_BHT: torch.Tensor) -> torch.Tensor:
        return x_BHT[:, :, :noisy].unflatten(2, (-1, size)).transpose(1, 2)

    mask = None
    has_window = streams.window is not None and streams.window < size
    if has_window or streams.block_attention == "causal":
        mask = stream_predicate(streams, *_grid(0, size, 0, size))
    if valid_BL is not None:
        valid = valid_BL.repeat(1, streams.num_noisy).view(-1, 1, 1, size)
        valid = valid | torch.eye(size, dtype=torch.bool, device=valid.device)
        mask = valid if mask is None else valid & mask.to(valid.device)
    return Part(blocks, blocks, merged=0, mask=mask)


def _chunks(
    streams: Streams, valid_BL: torch.Tensor | None, device: torch.device, *, is_noisy: bool
) -> list[Part]:
    """The noisy queries in chunks, or the clean ones, each with the clean keys that it sees."""
    length, size = streams.seq_len, streams.block_size
    noisy, copies = streams.num_noisy * length, streams.num_noisy if is_noisy else 1

    def queries(start: int, stop: int, x_BHT: torch.Tensor) -> torch.Tensor:
        mine = x_BHT[:, :, :noisy] if is_noisy else x_BHT[:, :, noisy:]
        return mine.unflatten(2, (copies, length))[:, :, :, start:stop]

    def keys(number: int, x_BHT: torch.Tensor) -> torch.Tensor:
        return x_BHT[:, :, None, noisy : noisy + number]

    parts, chunk = [], size * max(1, CHUNK // size)
    for start in range(0, length, chunk):
        stop = min(start + chunk, length)
        number = stop - size * is_noisy  # nothing noisy sees the chunk's last clean block
        if not number:
            continue
        free = start if streams.window is None else 0
        mask = _chunk_mask(streams, start, stop, free, number, is_noisy, device)
        if valid_BL is not None:  # and no query sees padding, except clean padding itself
            valid = valid_BL[:, None, :number].expand(-1, stop - start, -1)
            index = torch.arange(number, device=device)
            valid = valid if is_noisy else valid | (index[start:stop, None] == index)
            free, mask = 0, (valid & F.pad(mask, (free, 0), value=True))[:, None]
        mask = torch.cat([mask] * copies, dim=-2)
        parts.append(Part(partial(queries, start, stop), partial(keys, number), 2, free, mask))
    return parts


@lru_cache(maxsize=1024)
def _chunk_mask(
    streams: Streams,
    start: int,
    stop: int,
    first: int,
    number: int,
    is_noisy: bool,
    device: torch.device,
) -> torch.Tensor:
    """Which clean keys in [first, number) the queries at [start, stop) see; earlier ones they do,
    and later ones not."""
    one = replace(streams, num_noisy=1, has_clean=True)
    shift = 0 if is_noisy else streams.seq_len
    query, key = _grid(start + shift, stop + shift, first, number, device)
    return stream_predicate(one, query, key + streams.seq_len)


def _grid(
    start: int, stop: int, first: int, end: int, device: torch.device | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Queries [start, stop) as a column and keys [first, end) as a row."""
    return (
        torch.arange(start, stop, device=device)[:, None],
        torch.arange(first, end, device=device),
    )


class _InParts(torch.autograd.Function):
    """Attention part by part. Softmaxes over two parts are merged by their normalisers. No score
    is kept for the gradient, which computes each part's again, normalised by the whole."""

    @staticmethod
    def forward(ctx: Any, q, k, v, parts: Sequence[Part]) -> torch.Tensor:
        attend_part = _flash if q.device.type == "cpu" else _written_out
        given, (q, k, v) = (q, k, v), map(lifted, (q, k, v))
        out = _tokens_first(q)
        lse_BHT = out.new_full(out.shape[:3], -math.inf, dtype=_normaliser_type(q.dtype))
        for part in parts:
            found, lse = attend_part(part, *part.asking(q), *part.asked(k, v))
            so_far, lse_so_far = part.queries(out), part.queries(lse_BHT)
            lse = lse.view(lse_so_far.shape)
            both = torch.logaddexp(lse_so_far, lse)
            share = (lse - both).exp_().to(out.dtype)
            so_far.lerp_(found.view(so_far.shape), share.unsqueeze(-1))
            lse_so_far.copy_(both)
        out = out.to(given[0].dtype)
        ctx.save_for_backward(*given, out, lse_BHT)
        ctx.parts = parts
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads_out: torch.Tensor) -> Any:  # pyrefly: ignore[bad-override]
        *given, lse_BHT = ctx.saved_tensors
        grad, q, k, v, out = map(lifted, (grads_out[0], *given))
        backward_part = _flash_backward if q.device.type == "cpu" else _written_out_backward
        grads = tuple(_tokens_first(x) for x in (q, k, v))
        for part in ctx.parts:
            own = backward_part(part, *part.asking(grad, out, lse_BHT, q), *part.asked(k, v))
            views = (part.queries(grads[0]), part.keys(grads[1]), part.keys(grads[2]))
            for view, gradient in zip(views, own, strict=True):
                view += gradient.view(view.shape)
        return *(x.to(grads_out[0].dtype) for x in grads), None


def _tokens_first(x_BHTE: torch.Tensor) -> torch.Tensor:
    """Zeros of this shape that lie in memory as (B, T, H, E), as linear layers read and write."""
    return x_BHTE.new_zeros(x_BHTE.transpose(1, 2).shape).transpose(1, 2)


def _flash(part: Part, q, k, v) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention of a part on a CPU, and its normaliser: PyTorch's kernel, which tells both."""
    out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        q, k, v, 0.0, False, attn_mask=part.bias(q.dtype)
    )
    return out, part.normaliser(lse)


def _flash_backward(part: Part, grad, out, lse, q, k, v) -> tuple[torch.Tensor, ...]:
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
        grad, q, k, v, out, lse, 0.0, False, attn_mask=part.bias(q.dtype)
    )


def _written_out(part: Part, q, k, v) -> tuple[torch.Tensor, torch.Tensor]:
    """The same by products and a softmax, for other devices."""
    scores = _scores(part, q, k)
    lse = part.normaliser(scores.logsumexp(-1))
    return (scores - lse[..., None]).exp().nan_to_num_(0.0).to(v.dtype) @ v, lse


def _written_out_backward(part: Part, grad, out, lse, q, k, v) -> tuple[torch.Tensor, ...]:
    prob = (_scores(part, q, k) - lse[..., None]).exp()
    by_prob = grad @ v.transpose(-1, -2) - (grad * out).sum(-1, keepdim=True)
    by_score = (prob * by_prob / math.sqrt(q.shape[-1])).to(q.dtype)
    return (
        by_score @ k,
        by_score.transpose(-1, -2) @ q,
        prob.to(grad.dtype).transpose(-1, -2) @ grad,
    )


def _scores(part: Part, q, k) -> torch.Tensor:
    scores = (q @ k.transpose(-1, -2)).to(_normaliser_type(q.dtype)) / math.sqrt(q.shape[-1])
    bias = part.bias(scores.dtype)
    return scores if bias is None else scores + bias


def _normaliser_type(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


# --- flex: block-sparse kernels on CUDA -------------------------------------------------------


def _mask_mod(streams: Streams, b, h, q_index, kv_index):
    return stream_predicate(streams, q_index, kv_index)


def _padded_mask_mod(streams: Streams, valid_BL: torch.Tensor, b, h, q_index, kv_index):
    seen = stream_predicate(streams, q_index, kv_index)
    return seen & (valid_BL[b, kv_index % streams.seq_len] | (q_index == kv_index))


@lru_cache(maxsize=16)
def _flex_block_mask(streams: Streams, queries: int, device: torch.device):
    from torch.nn.attention.flex_attention import create_block_mask

    return create_block_mask(
        partial(_mask_mod, streams), None, None, queries, streams.num_tokens, device=device
    )


@lru_cache(maxsize=1)
def _compiled_flex():
    from torch.nn.attention.flex_attention import flex_attention

    allow_compilations()  # every layout is compiled for itself
    return torch.compile(flex_attention, dynamic=False)


def _flex(q, k, v, streams: Streams, valid_BL: torch.Tensor | None, built: Built) -> torch.Tensor:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    queries = q.shape[2]
    if valid_BL is None:
        block_mask = _flex_block_mask(streams, queries, q.device)
    elif (queries, streams.window) in built:
        block_mask = built[queries, streams.window]
    else:
        block_mask = built[queries, streams.window] = create_block_mask(
            partial(_padded_mask_mod, streams, valid_BL),
            q.shape[0],
            None,
            queries,
            streams.num_tokens,
            device=q.device,
        )
    function = _compiled_flex() if q.device.type == "cuda" else flex_attention
    return function(q, k, v, block_mask=block_mask, enable_gqa=q.shape[1] != k.shape[1])
