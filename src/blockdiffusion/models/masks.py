"""The attention masks of block diffusion as predicates (query, key) -> bool.

A training pass has the streams [noisy_1; ...; noisy_N; clean] of L tokens each, with positions
0..L-1 in every stream (paper, section 3.2 and appendix B.6). A query sees a key iff

* block diagonal: both lie in the same stream's same block, or
* offset block causal: the query is noisy, the key clean, and the key's block is earlier, or
* block causal: both are clean and the key's block is not later.

Everything else (the dense mask, FlexAttention's block mask, the parts of chunked attention, the
figure in the documentation) is derived from these predicates.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from blockdiffusion.diffusion.config import CleanAttention


@dataclass(frozen=True)
class Streams:
    """The layout of a pass: `num_noisy` noisy copies of `seq_len` tokens, then the clean stream.

    `clean_attention="causal"` makes the clean stream token-causal instead of block-causal. If one
    block is the whole sequence, nothing would see the clean stream, which may be left out. With
    `window` = W a query sees keys less than W positions away.
    """

    seq_len: int
    block_size: int
    num_noisy: int = 1
    has_clean: bool = True
    clean_attention: CleanAttention = "block"
    window: int | None = None

    @property
    def num_tokens(self) -> int:
        """Tokens of all streams."""
        return (self.num_noisy + self.has_clean) * self.seq_len


def stream_predicate(streams: Streams, q: torch.Tensor, kv: torch.Tensor) -> torch.Tensor:
    """Return whether query index `q` sees key index `kv`, both over all streams (broadcast)."""
    length, size = streams.seq_len, streams.block_size
    q_stream, kv_stream = q // length, kv // length
    q_position, kv_position = q % length, kv % length
    q_block, kv_block = q_position // size, kv_position // size
    q_clean, kv_clean = q_stream == streams.num_noisy, kv_stream == streams.num_noisy

    block_diagonal = ~q_clean & (q_stream == kv_stream) & (q_block == kv_block)
    offset_block_causal = ~q_clean & kv_clean & (kv_block < q_block)
    if streams.clean_attention == "causal":
        clean_causal = q_clean & kv_clean & (kv_position <= q_position)
    else:
        clean_causal = q_clean & kv_clean & (kv_block <= q_block)
    seen = block_diagonal | offset_block_causal | clean_causal
    if streams.window is not None:
        seen = seen & (q_position - kv_position < streams.window)
    return seen


def dense_mask(streams: Streams, device: torch.device | str | None = None) -> torch.Tensor:
    """Return the whole mask, bool (T, T), T = streams.num_tokens; row = query, column = key."""
    index = torch.arange(streams.num_tokens, device=device)
    return stream_predicate(streams, index[:, None], index[None, :])


def decode_predicate(
    q_position: torch.Tensor,
    kv_position: torch.Tensor,
    q_clean: torch.Tensor,
    *,
    block_size: int,
    window: int | None = None,
    clean_attention: CleanAttention = "block",
    layer_window: int | None = None,
) -> torch.Tensor:
    """Return the same rule for sampling, when each position exists once (broadcast over all).

    The keys are clean blocks and, last, the block being denoised; a key of position -1 is an empty
    slot. With `window` = W a query sees the last W tokens, its own block included; with
    `layer_window` = W keys less than W positions away, as in `Streams`.
    """
    q_block, kv_block = q_position // block_size, kv_position // block_size
    seen = kv_block <= q_block
    if clean_attention == "causal":
        seen = torch.where(q_clean, kv_position <= q_position, seen)
    if window is not None:
        seen = seen & (kv_position >= (q_block + 1) * block_size - window)
    if layer_window is not None:
        seen = seen & (q_position - kv_position < layer_window)
    return seen & (kv_position >= 0)
