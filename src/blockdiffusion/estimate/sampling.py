"""The cost of sampling: network calls, operations, bytes, time, price."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from blockdiffusion.diffusion.objectives import diffusion_of
from blockdiffusion.errors import UserError
from blockdiffusion.estimate.flops import Flops, call_flops
from blockdiffusion.estimate.memory import cache_bytes, weight_bytes
from blockdiffusion.estimate.options import SamplingRequest
from blockdiffusion.estimate.sizes import NetworkSizes
from blockdiffusion.runtime.hardware import Hardware

DRAW_BYTES = 32  # traffic for each logit of a drawn token: softmax, filters, sum


@dataclass(frozen=True, kw_only=True)
class SamplingEstimate:
    """The cost of sampling.

    Attributes:
        new_tokens: of a row. calls: network calls that they take (nfe), commits riding on the next
            block's first call.
        flops: of an average call, over all rows. flops_per_token: of a new token.
        bytes_read: of an average call: weights, keys and values, and logits drawn from.
        weight_bytes_read: the weights among them.
        seconds_call: the sum of reading, arithmetic and starting kernels, but that on a GPU
            weights are read while kernels start.
        seconds_reading, seconds_arithmetic, seconds_starting: those three.
        tokens_per_second: of all rows. seconds_row: for the whole texts.
        weights, cache, logits: bytes of memory. largest_batch: rows that fit; 0: not even one.
        price_per_million: of a million tokens, or None.
    """

    request: SamplingRequest
    new_tokens: int
    calls: int
    tokens_per_forward: float
    flops: Flops
    flops_per_token: float
    bytes_read: float
    weight_bytes_read: float
    seconds_call: float
    seconds_reading: float
    seconds_arithmetic: float
    seconds_starting: float
    tokens_per_second: float
    seconds_row: float
    weights: float
    cache: float
    logits: float
    memory_of_device: float
    largest_batch: int
    price_per_million: float | None


@dataclass(frozen=True, kw_only=True)
class _Calls:
    """Network calls of one kind: tokens, keys and positions with logits of a row in each."""

    count: int
    tokens: int
    keys: float
    scored: float


def estimate_sampling(
    config: Any,
    sizes: NetworkSizes,
    device: Hardware,
    request: SamplingRequest,
    price_per_hour: float | None,
) -> SamplingEstimate:
    """Return the cost of sampling `request` on one device, every row from its beginning.

    Raises:
        UserError: the request does not fit the network.
    """
    length = request.max_new_tokens or sizes.seq_len
    _check(sizes, device, request, length)
    kinds = _calls(config, sizes, request, length)
    dtype, shares, rows = request.dtype, device.shares, request.batch
    calls = sum(kind.count for kind in kinds)

    def mean(of: str) -> float:
        return sum(kind.count * getattr(kind, of) for kind in kinds) / calls

    flops = Flops(0, 0, 0, 0)
    for kind in kinds:
        call = call_flops(sizes, rows, kind.tokens, kind.keys, kind.scored * rows)
        flops += call.times(*[kind.count / calls] * 3)
    weights, weights_read = weight_bytes(sizes, dtype)
    cached, drawn = cache_bytes(sizes, dtype), DRAW_BYTES * sizes.vocab_size
    of_rows = rows * (cached * mean("keys") + drawn * mean("scored"))
    weights_seconds = weights_read / (device.bandwidth * shares.reading)
    rows_seconds = of_rows / (device.bandwidth * shares.call_rows)
    # Products of 8 bits are not measured; they are not slower than those of float32.
    peak = device.flops["float32" if dtype == "int8" else dtype]
    arithmetic = flops.total / (peak * shares.call_products)
    starting = sizes.num_hidden_layers * shares.layer_seconds
    seconds = weights_seconds + starting + rows_seconds + arithmetic
    seconds -= min(weights_seconds, starting) if device.cuda else 0
    speed = rows * length / (calls * seconds)
    cache, logits = cached * _capacity(sizes, request, length), drawn * max(k.scored for k in kinds)
    return SamplingEstimate(
        request=request,
        new_tokens=length,
        calls=calls,
        tokens_per_forward=length / calls,
        flops=flops,
        flops_per_token=flops.total * calls / (rows * length),
        bytes_read=weights_read + of_rows,
        weight_bytes_read=weights_read,
        seconds_call=seconds,
        seconds_reading=weights_seconds + rows_seconds,
        seconds_arithmetic=arithmetic,
        seconds_starting=starting,
        tokens_per_second=speed,
        seconds_row=calls * seconds,
        weights=weights,
        cache=rows * cache,
        logits=rows * logits,
        memory_of_device=device.memory,
        largest_batch=max(0, int((device.memory - weights) // (cache + logits))),
        price_per_million=None if price_per_hour is None else price_per_hour / 3600 / speed * 1e6,
    )


def _check(sizes: NetworkSizes, device: Hardware, request: SamplingRequest, length: int) -> None:
    size, window = sizes.block_size, request.window
    if request.tokens_per_step > size:
        raise UserError(
            f"--tokens-per-step is {request.tokens_per_step}, more than the {size} tokens of a "
            "block; give at most that"
        )
    if window is not None and window < size:
        raise UserError(
            f"--window is {window}, smaller than a block of {size}; give at least one block"
        )
    if not sizes.autoregressive and not sizes.has_clean and length > sizes.seq_len:
        raise UserError(
            f"--max-new-tokens is {length}, beyond the one block of {size} tokens, which then "
            "slides over the text; give at most one block"
        )
    if request.dtype == "int8" and device.cuda:
        raise UserError(
            f"--sample-dtype is int8, which is for CPUs, and {device.name} is not one; take "
            "float32 or bfloat16"
        )


def _capacity(sizes: NetworkSizes, request: SamplingRequest, length: int) -> int:
    """Slots of a row in the cache."""
    longest = -(-length // sizes.block_size) * sizes.block_size
    if request.window is None:
        return longest
    return min(longest, request.window + sizes.block_size)


def _calls(config: Any, sizes: NetworkSizes, request: SamplingRequest, length: int) -> list[_Calls]:
    """The calls of a row. The first call of a block also commits the block before it."""
    size, limit = sizes.block_size, _capacity(sizes, request, length)
    if sizes.autoregressive:
        seen = sum(min(position + 1, limit) for position in range(length))
        return [_Calls(count=length, tokens=1, keys=seen / length, scored=1.0)]
    per_block, scored = -(-size // request.tokens_per_step), float(request.tokens_per_step)
    sampled = diffusion_of(config).sampled
    if sampled == "masked":
        scored = (size + 1) / 2
    elif sampled == "all":  # in every step
        per_block, scored = config.timesteps, float(size)
    blocks = -(-length // size)
    keys = [min((block + 1) * size, limit) for block in range(blocks)]
    kinds = [
        _Calls(count=1, tokens=size, keys=keys[0], scored=scored),
        _Calls(
            count=blocks - 1,
            tokens=2 * size,
            keys=sum(keys[1:]) / max(1, blocks - 1),
            scored=scored,
        ),
        _Calls(count=blocks * (per_block - 1), tokens=size, keys=sum(keys) / blocks, scored=scored),
    ]
    return [kind for kind in kinds if kind.count]
