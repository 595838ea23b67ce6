"""Attention over the streams of a training pass, and over the cache while sampling.

Three backends compute the same function:

* `dense`: softmax over the whole masked score matrix, written out. Slow; the oracle.
* `chunked`: scaled_dot_product_attention chunk by chunk, so that no score is computed for keys
  that lie behind the chunk: about a quarter of the dense work. Default on CPU and MPS.
* `flex`: FlexAttention with a block mask built once per layout. Default on CUDA; it has no
  backward on CPU.

Shape suffixes: B batch, H heads, E head width, T tokens of all streams, Q queries, C a chunk.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import lru_cache, partial
from typing import Any, Literal, NamedTuple, get_args

import torch
import torch.nn.functional as F

from blockdiffusion.cache import RaggedPlacement
from blockdiffusion.devices import allow_compilations
from blockdiffusion.errors import UserError
from blockdiffusion.masks import Streams, dense_mask, stream_predicate

Backend = Literal["dense", "chunked", "flex"]
BlockMasks = dict[int, Any]  # FlexAttention's, of a pass with padding, by the number of queries
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
            f"unknown attention backend {name!r}; known: {', '.join(get_args(Backend))}"
        )
    return name  # type: ignore[return-value]  # just checked


def attend(
    q_BHQE: torch.Tensor,
    k_BHTE: torch.Tensor,
    v_BHTE: torch.Tensor,
    streams: Streams,
    backend: Backend,
    valid_BL: torch.Tensor | None = None,
    built: BlockMasks | None = None,
) -> torch.Tensor:
    """Attention of a training pass (B, H, Q, E), softmax scale 1/sqrt(E).

    The queries are those of all streams, or of the noisy streams only (Q = num_noisy * seq_len).
    `valid_BL` (bool) marks the keys of each stream that exist; padding still sees itself, so that
    no row of the softmax is empty. `built` keeps what flex makes of them: give all layers of a pass
    the same one, empty at first.
    """
    assert k_BHTE.shape[2] == streams.num_tokens
    function = {"dense": _dense, "chunked": _chunked, "flex": partial(_flex, built=built)}[backend]
    if q_BHQE.device.type != "cpu" or q_BHQE.dtype != torch.bfloat16:
        return function(q_BHQE, k_BHTE, v_BHTE, streams, valid_BL)
    # PyTorch's attention is faster in float32 there, its backward pass by half.
    with torch.autocast("cpu", enabled=False):
        q, k, v = q_BHQE.float(), k_BHTE.float(), v_BHTE.float()
        return function(q, k, v, streams, valid_BL).to(q_BHQE.dtype)


def attend_cached(
    q_BHTE: torch.Tensor,
    k_BHKE: torch.Tensor,
    v_BHKE: torch.Tensor,
    mask_BTK: torch.Tensor | None,
) -> torch.Tensor:
    """Attention of new tokens over the keys of a cache.

    `mask_BTK` is True where a key is visible, or what is added to its score; None = all are.
    """
    mask = None if mask_BTK is None else mask_BTK[:, None]
    return F.scaled_dot_product_attention(q_BHTE, k_BHKE, v_BHKE, attn_mask=mask)


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
    k_BHKE: torch.Tensor,
    v_BHKE: torch.Tensor,
    groups: Sequence[RaggedGroup],
) -> torch.Tensor:
    """`attend_cached` for rows of different numbers of tokens, one after another; (1, H, P, E)."""
    q_PHE = q_1HPE[0].transpose(0, 1)
    out_PHE = torch.empty_like(q_PHE)
    for group in groups:
        queries_RTHE = q_PHE.new_zeros(*group.mask_RTK.shape[:2], *q_PHE.shape[1:])
        queries_RTHE[group.place_M] = q_PHE[group.index_M]
        found_RHTE = F.scaled_dot_product_attention(
            queries_RTHE.transpose(1, 2),
            k_BHKE[group.rows],
            v_BHKE[group.rows],
            attn_mask=group.mask_RTK[:, None],
        )
        out_PHE[group.index_M] = found_RHTE.transpose(1, 2)[group.place_M]
    return out_PHE.transpose(0, 1)[None]


def attend_causal(
    q_BHTE: torch.Tensor,
    k_BHTE: torch.Tensor,
    v_BHTE: torch.Tensor,
    valid_BT: torch.Tensor | None = None,
) -> torch.Tensor:
    """Attention of one autoregressive stream; `valid_BT` (bool) marks the keys that exist.

    Padding still sees itself, so that no row of the softmax is empty.
    """
    if valid_BT is None:
        return F.scaled_dot_product_attention(q_BHTE, k_BHTE, v_BHTE, is_causal=True)
    tokens = valid_BT.shape[1]
    itself_TT = torch.eye(tokens, dtype=torch.bool, device=valid_BT.device)
    mask_BTT = (valid_BT[:, None] | itself_TT).tril()
    return F.scaled_dot_product_attention(q_BHTE, k_BHTE, v_BHTE, attn_mask=mask_BTT[:, None])


# --- dense: the oracle -----------------------------------------------------------------------


def _dense(q, k, v, streams: Streams, valid_BL: torch.Tensor | None) -> torch.Tensor:
    visible = dense_mask(streams, q.device)[: q.shape[2]]
    if valid_BL is not None:
        copies = streams.num_noisy + streams.has_clean
        itself = torch.eye(streams.num_tokens, dtype=torch.bool, device=q.device)[: q.shape[2]]
        visible = visible & (valid_BL.repeat(1, copies)[:, None, None] | itself)
    scores = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])
    return scores.masked_fill(~visible, -math.inf).softmax(-1) @ v


# --- chunked: exact, without the scores that the mask would throw away ------------------------


@lru_cache(maxsize=64)
def _chunk_masks(
    streams: Streams, start: int, stop: int, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """Masks of the queries [start, stop): noisy over [own noisy chunk; clean prefix], and clean
    over the clean prefix. The prefix ends at `stop`."""
    length = streams.seq_len
    one = Streams(length, streams.block_size, 1, True, streams.clean_attention)
    chunk = torch.arange(start, stop, device=device)
    prefix = torch.arange(length, length + stop, device=device)
    noisy = stream_predicate(one, chunk[:, None], torch.cat([chunk, prefix])[None])
    clean = stream_predicate(one, (chunk + length)[:, None], prefix[None])
    return noisy, clean


def _chunked(q, k, v, streams: Streams, valid_BL: torch.Tensor | None) -> torch.Tensor:
    length, copies = streams.seq_len, streams.num_noisy
    batch = q.shape[0]
    size = streams.block_size * max(1, CHUNK // streams.block_size)
    # Splits, not slices: their gradients are put together once, not padded and added.
    (q_n, q_c), (k_n, k_c), (v_n, v_c) = (
        x.split([copies * length, x.shape[2] - copies * length], dim=2) for x in (q, k, v)
    )
    chunks_n = [x.unflatten(2, (copies, length)).split(size, dim=3) for x in (q_n, k_n, v_n)]
    chunks_c = q_c.split(size, dim=2)

    noisy_out, clean_out = [], []
    for index, start in enumerate(range(0, length, size)):
        stop = min(start + size, length)
        queries, own_keys, own_values = (x[index] for x in chunks_n)
        noisy_mask, clean_mask = _chunk_masks(streams, start, stop, q.device)
        # A noisy chunk of a single block sees nothing of its own block's clean tokens: drop them.
        prefix = (stop - streams.block_size) if streams.has_clean else 0
        noisy_mask = noisy_mask[:, : stop - start + prefix]
        valid = None if valid_BL is None else valid_BL[:, :stop]
        keys = _with_prefix(own_keys, k_c[:, :, :prefix])
        values = _with_prefix(own_values, v_c[:, :, :prefix])
        mask = _noisy_key_mask(noisy_mask, valid, start, prefix, copies)
        out = F.scaled_dot_product_attention(
            queries.transpose(1, 2).flatten(0, 1), keys, values, attn_mask=mask
        )
        noisy_out.append(out.unflatten(0, (batch, copies)).transpose(1, 2))
        if q_c.shape[2]:
            mask = clean_mask
            if valid is not None:
                itself = torch.eye(stop, dtype=torch.bool, device=q.device)[start:]
                mask = (clean_mask & (valid[:, None] | itself))[:, None]
            clean_out.append(
                F.scaled_dot_product_attention(
                    chunks_c[index], k_c[:, :, :stop], v_c[:, :, :stop], attn_mask=mask
                )
            )
    out = torch.cat(noisy_out, dim=3).flatten(2, 3)
    return torch.cat([out, *clean_out], dim=2) if clean_out else out


def _with_prefix(chunk_BHNCE: torch.Tensor, prefix_BHPE: torch.Tensor) -> torch.Tensor:
    """(B*N, H, C + P, E): every noisy copy's own chunk, followed by the clean prefix they share."""
    copies = chunk_BHNCE.shape[2]
    shared = prefix_BHPE[:, :, None].expand(-1, -1, copies, -1, -1)
    return torch.cat([chunk_BHNCE, shared], dim=3).transpose(1, 2).flatten(0, 1)


def _noisy_key_mask(
    mask_CK: torch.Tensor, valid_BK: torch.Tensor | None, start: int, prefix: int, copies: int
) -> torch.Tensor:
    if valid_BK is None:
        return mask_CK
    own = valid_BK[:, None, start:] | torch.eye(
        mask_CK.shape[0], dtype=torch.bool, device=mask_CK.device
    )
    clean = valid_BK[:, None, :prefix].expand(-1, mask_CK.shape[0], -1)
    mask_BCK = mask_CK & torch.cat([own, clean], dim=2)
    return mask_BCK.repeat_interleave(copies, dim=0)[:, None]


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


def _flex(
    q, k, v, streams: Streams, valid_BL: torch.Tensor | None, built: BlockMasks | None = None
) -> torch.Tensor:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    built, queries = {} if built is None else built, q.shape[2]
    if valid_BL is None:
        block_mask = _flex_block_mask(streams, queries, q.device)
    elif queries in built:
        block_mask = built[queries]
    else:
        block_mask = built[queries] = create_block_mask(
            partial(_padded_mask_mod, streams, valid_BL),
            q.shape[0],
            None,
            queries,
            streams.num_tokens,
            device=q.device,
        )
    function = _compiled_flex() if q.device.type == "cuda" else flex_attention
    return function(q, k, v, block_mask=block_mask)
