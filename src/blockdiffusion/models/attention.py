"""Attention over the streams of a training pass, and over the cache while sampling.

Three backends compute the same function:

* `dense`: softmax over the whole masked score matrix, written out. Slow; the oracle.
* `chunked`: in parts, each noisy block with itself and each chunk of queries with the clean keys
  before or inside the chunk: about a quarter of the dense work, on CPUs by PyTorch's fused kernel.
  The default on CPU and MPS.
* `flex`: FlexAttention with a block mask built once per layout. The default on CUDA; it has no
  backward pass on CPU.

Keys and values may have fewer heads than queries (GQA): equally many queries share each. Networks
with soft-capped scores use `dense`, and a written softmax over the cache.

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
# A backend's form of a pass's masks, by the number of queries and the layer's window.
Built = dict[tuple[int, int | None], Any]
CHUNK = 128  # tokens of a query chunk; the fastest of 64 to 256 at L = 1024 on a CPU


def resolve_backend(name: str | None, device: torch.device) -> Backend:
    """Return the backend called `name`; None = the default of `device`.

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
    """Return the attention of a training pass, (B, H, Q, E).

    Args:
        q_BHQE: queries of all streams, or of the noisy ones only (Q = num_noisy * seq_len).
        valid_BL: bool, False at padding; or the number of each token's document, whole blocks that
            do not see each other, 0 at padding. Padding still sees itself, so that no row of the
            softmax is empty.
        built: holds the backend's form of the masks: one for all layers of a pass, empty at first.
        sizes: scale and soft cap of the scores; None = 1/sqrt(E), and no cap.
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
        if backend != "chunked":  # which upcasts itself, and keeps the shorter numbers
            q, k, v = map(upcast, (q, k, v))
        return functions[backend](q, k, v, streams, valid_BL).to(q_BHQE.dtype)


def scaled(q: torch.Tensor, sizes: AttentionSizes | None) -> torch.Tensor:
    """Return queries (..., E) whose scores, divided by sqrt(E), have the network's scale."""
    if sizes is None or sizes.scale is None:
        return q
    factor = sizes.scale * math.sqrt(q.shape[-1])
    return q if math.isclose(factor, 1, rel_tol=1e-12) else q * factor


def for_every_head(x_BJTE: torch.Tensor, num_heads: int) -> torch.Tensor:
    """Return keys or values (B, H, T, E), repeated for the query heads that share them."""
    shared = num_heads // x_BJTE.shape[1]
    return x_BJTE if shared == 1 else x_BJTE.repeat_interleave(shared, dim=1)


def upcast(x: torch.Tensor) -> torch.Tensor:
    """Return bfloat16 as float32 on a CPU, where PyTorch's kernel is faster with it (its backward
    pass by half)."""
    return x.float() if x.dtype == torch.bfloat16 and x.device.type == "cpu" else x


def attend_cached(
    q_BHTE: torch.Tensor,
    k_BJKE: torch.Tensor,
    v_BJKE: torch.Tensor,
    mask_BTK: torch.Tensor | None,
    sizes: AttentionSizes | None = None,
) -> torch.Tensor:
    """Return the attention (B, H, T, E) of new tokens over the keys of a cache.

    `mask_BTK` is True at visible keys, or is added to the scores; None = all keys are visible.
    """
    mask = None if mask_BTK is None else mask_BTK[:, None]
    q, shared = scaled(q_BHTE, sizes), q_BHTE.shape[1] != k_BJKE.shape[1]
    if sizes is not None and sizes.softcap is not None:
        k, v = (for_every_head(x, q.shape[1]) for x in (k_BJKE, v_BJKE))
        return _written_softmax(q, k, mask, sizes.softcap) @ v
    return F.scaled_dot_product_attention(q, k_BJKE, v_BJKE, attn_mask=mask, enable_gqa=shared)


class RaggedGroup(NamedTuple):
    """Rows that share one call of attention, padded to the same number T of queries.

    Attributes:
        rows: the rows.
        index_M: their tokens among those of the pass (P).
        place_M: row (of these rows) and column (of T) of each token.
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
    """Return the groups, on `device`, of a pass with `tokens_B` tokens of each row at `place`.

    Rows of at most `few` tokens form one group (which spans all rows, so that no keys are copied);
    each longer row is a group. `visible(rows, tokens)` gives a group's mask.
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
    """Return `attend_cached` of concatenated rows of different lengths, (1, H, P, E)."""
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
    """Return which keys a token of an autoregressive stream sees, bool (B, T, T).

    `valid_BT` is False at padding, which still sees itself, so that no row of the softmax is empty.
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
    """Return the attention of an autoregressive stream; `mask_BTT` None = the causal mask."""
    if mask_BTT is None:
        shared = q_BHTE.shape[1] != k_BJTE.shape[1]
        q = scaled(q_BHTE, sizes)
        return F.scaled_dot_product_attention(q, k_BJTE, v_BJTE, is_causal=True, enable_gqa=shared)
    return attend_cached(q_BHTE, k_BJTE, v_BJTE, mask_BTT, sizes)


def of_one_document(query_BQ: torch.Tensor, key_BK: torch.Tensor) -> torch.Tensor:
    """Return which keys (B, Q or 1, K) are no padding and, if documents are numbered, of the
    query's document; the arguments are parts of `valid_BL`."""
    if key_BK.dtype == torch.bool:
        return key_BK[:, None]
    return (query_BQ[:, :, None] == key_BK[:, None]) & (key_BK[:, None] != 0)


# --- dense: the oracle -----------------------------------------------------------------------


def _dense(
    q, k, v, streams: Streams, valid_BL: torch.Tensor | None, softcap: float | None = None
) -> torch.Tensor:
    visible = dense_mask(streams, q.device)[: q.shape[2]]
    if valid_BL is not None:
        copies = streams.num_noisy + streams.has_clean
        itself = torch.eye(streams.num_tokens, dtype=torch.bool, device=q.device)[: q.shape[2]]
        key_BT = valid_BL.repeat(1, copies)
        allowed_BQT = of_one_document(key_BT[:, : q.shape[2]], key_BT)
        visible = visible & (allowed_BQT[:, None] | itself)
    return _written_softmax(q, k, visible, softcap) @ v


def _written_softmax(
    q, k, visible: torch.Tensor | None, softcap: float | None = None
) -> torch.Tensor:
    """Attention's weights; `visible` is as in `attend_cached`."""
    scores = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if visible is None:
        return scores.softmax(-1)
    if visible.dtype == torch.bool:
        return scores.masked_fill(~visible, -math.inf).softmax(-1)
    return (scores + visible).softmax(-1)


# --- chunked: exact, without most of the scores that the mask would discard ----------------------
#
# The mask is mostly empty, so attention is computed in parts, rectangles of queries and keys. The
# keys of a clean query all lie in one part. Those of a noisy query lie in two: its own block, and
# the clean blocks before it. Each part is a softmax of its own, and two parts a and b of the same
# query are merged by their normalisers, lse = log sum exp of the scores:
#
#     lse = log(exp lse_a + exp lse_b),   out = exp(lse_a - lse) out_a + exp(lse_b - lse) out_b.
#
# This is the softmax over both, and copies no key next to another.


class Part(NamedTuple):
    """Queries and keys whose scores are computed together.

    Attributes:
        queries, keys: make five-dimensional views of them from tensors (B, H, T, ...) of all
            streams.
        merged: dimensions `merged` and `merged + 1` of these views are one while computing; the
            shapes then are (B', H, Q', ...) and (B', H, K', ...).
        free: how many keys, from the first, every query sees.
        mask: which of the other keys are seen, bool (Q', K' - free) or (B', 1, Q', K' - free);
            None = all.
    """

    queries: Callable[[torch.Tensor], torch.Tensor]
    keys: Callable[[torch.Tensor], torch.Tensor]
    merged: int
    free: int = 0
    mask: torch.Tensor | None = None

    def gather_queries(self, *tensors: torch.Tensor) -> list[torch.Tensor]:
        """Return the queries' part of each tensor, merged: a view if possible."""
        return [self.queries(x).flatten(self.merged, self.merged + 1) for x in tensors]

    def gather_keys(self, *tensors: torch.Tensor) -> list[torch.Tensor]:
        """Return the keys' part of each tensor, merged."""
        return [self.keys(x).flatten(self.merged, self.merged + 1) for x in tensors]

    def bias(self, dtype: torch.dtype) -> torch.Tensor | None:
        """Return what is added to the scores: 0 at visible keys, else minus infinity."""
        if self.mask is None:
            return None
        hidden = torch.zeros_like(self.mask, dtype=dtype).masked_fill_(~self.mask, -math.inf)
        return F.pad(hidden, (self.free, 0))

    def normaliser(self, lse: torch.Tensor) -> torch.Tensor:
        """Return log sum exp of the scores, corrected to minus infinity for a query that sees no
        key, whose share in the merge then is 0."""
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
    return _InParts.apply(q, k, v, built[kind])  # type: ignore


def _own_blocks(streams: Streams, valid_BL: torch.Tensor | None) -> Part:
    """The noisy blocks, each of which sees itself: the blocks become rows of the batch."""
    size, noisy = streams.block_size, streams.num_noisy * streams.seq_len

    def blocks(x_BHT: torch.Tensor) -> torch.Tensor:
        return x_BHT[:, :, :noisy].unflatten(2, (-1, size)).transpose(1, 2)

    mask = None
    has_window = streams.window is not None and streams.window < size
    if has_window or streams.block_attention == "causal":
        mask = stream_predicate(streams, *_grid(0, size, 0, size))
    if valid_BL is not None:
        valid = valid_BL.bool().repeat(1, streams.num_noisy).view(-1, 1, 1, size)
        valid = valid | torch.eye(size, dtype=torch.bool, device=valid.device)
        mask = valid if mask is None else valid & mask.to(valid.device)
    return Part(blocks, blocks, merged=0, mask=mask)


def _chunks(
    streams: Streams, valid_BL: torch.Tensor | None, device: torch.device, *, is_noisy: bool
) -> list[Part]:
    """The noisy queries in chunks, or the clean ones, each with the clean keys that it sees. The
    queries of all noisy copies at the same positions form one chunk, as they see the same keys."""
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
        number = stop - size * is_noisy  # no noisy query sees the chunk's last clean block
        if not number:
            continue
        # Keys before the chunk need no mask, unless a window hides some.
        free = start if streams.window is None else 0
        mask = _chunk_mask(streams, start, stop, free, number, is_noisy, device)
        if valid_BL is not None:  # no query sees padding, except clean padding itself
            valid = of_one_document(valid_BL[:, start:stop], valid_BL[:, :number])
            valid = valid.expand(-1, stop - start, -1)
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
    """Which clean keys in [first, number) the queries at [start, stop) see."""
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
    """Attention part by part.

    No scores are kept for the gradient. With the normaliser lse of the whole row, a part's weights
    are P = exp(scores - lse), so each part's gradient is computed by itself, from q, k, v, the
    merged output and lse, and added into those of the parts before.
    """

    @staticmethod
    def forward(ctx: Any, q, k, v, parts: Sequence[Part]) -> torch.Tensor:
        attend_part = _flash if q.device.type == "cpu" else _written_out
        given, (q, k, v) = (q, k, v), map(upcast, (q, k, v))
        out = _tokens_first(q)
        # Nothing is merged yet: the sum of no exponentials.
        lse_BHT = out.new_full(out.shape[:3], -math.inf, dtype=_normaliser_type(q.dtype))
        for part in parts:
            found, lse = attend_part(part, *part.gather_queries(q), *part.gather_keys(k, v))
            so_far, lse_so_far = part.queries(out), part.queries(lse_BHT)  # views, written below
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
        grad, q, k, v, out = map(upcast, (grads_out[0], *given))
        backward_part = _flash_backward if q.device.type == "cpu" else _written_out_backward
        grads = tuple(_tokens_first(x) for x in (q, k, v))
        for part in ctx.parts:
            # The kernels normalise by the lse that they are given: here that of the whole row.
            own = backward_part(
                part, *part.gather_queries(grad, out, lse_BHT, q), *part.gather_keys(k, v)
            )
            views = (part.queries(grads[0]), part.keys(grads[1]), part.keys(grads[2]))
            for view, gradient in zip(views, own, strict=True):
                view += gradient.view(view.shape)
        return *(x.to(grads_out[0].dtype) for x in grads), None


def _tokens_first(x_BHTE: torch.Tensor) -> torch.Tensor:
    """Zeros of this shape, laid out in memory as (B, T, H, E), as linear layers read and write."""
    return x_BHTE.new_zeros(x_BHTE.transpose(1, 2).shape).transpose(1, 2)


def _flash(part: Part, q, k, v) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention of a part and its normaliser, by PyTorch's CPU kernel, which returns both."""
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
    # A query that sees no key has only nan here, and a share of 0.
    return (scores - lse[..., None]).exp().nan_to_num_(0.0).to(v.dtype) @ v, lse


def _written_out_backward(part: Part, grad, out, lse, q, k, v) -> tuple[torch.Tensor, ...]:
    prob = (_scores(part, q, k) - lse[..., None]).exp()
    # Softmax: dL/dscore = P * (dL/dP - sum over all keys of P dL/dP), and that sum is grad . out.
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


def _flex(q, k, v, streams: Streams, valid_BL: torch.Tensor | None, built: Built) -> torch.Tensor:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    kind = (q.shape[2], streams.window)
    if valid_BL is None:
        block_mask = _flex_block_mask(streams, q.shape[2], q.device)
    else:
        if kind not in built:
            mask_mod = partial(_padded_mask_mod, streams, valid_BL)
            shape = (len(q), None, q.shape[2], streams.num_tokens)
            built[kind] = create_block_mask(mask_mod, *shape, device=q.device)
        block_mask = built[kind]
    function = _compiled_flex() if q.device.type == "cuda" else flex_attention
    return function(q, k, v, block_mask=block_mask, enable_gqa=q.shape[1] != k.shape[1])


def _mask_mod(streams: Streams, b, h, q_index, kv_index):
    return stream_predicate(streams, q_index, kv_index)


def _padded_mask_mod(streams: Streams, valid_BL: torch.Tensor, b, h, q_index, kv_index):
    seen = stream_predicate(streams, q_index, kv_index)
    allowed = valid_BL[b, kv_index % streams.seq_len]
    if valid_BL.dtype != torch.bool:
        allowed = (allowed != 0) & (allowed == valid_BL[b, q_index % streams.seq_len])
    return seen & (allowed | (q_index == kv_index))


@lru_cache(maxsize=16)
def _flex_block_mask(streams: Streams, queries: int, device: torch.device):
    from torch.nn.attention.flex_attention import create_block_mask

    shape = (None, None, queries, streams.num_tokens)
    return create_block_mask(partial(_mask_mod, streams), *shape, device=device)


@lru_cache(maxsize=1)
def _compiled_flex():
    from torch.nn.attention.flex_attention import flex_attention

    allow_compilations()  # every layout is compiled for itself
    return torch.compile(flex_attention, dynamic=False)
