"""The account of sampling."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, get_args

from blockdiffusion.errors import UserError, shown
from blockdiffusion.estimate.flops import (
    DRAW_BYTES,
    Flops,
    Network,
    SampleDtype,
    cache_bytes,
    call_flops,
    read_bytes,
    weight_bytes,
)
from blockdiffusion.limits import check_limit
from blockdiffusion.runtime.hardware import Hardware


@dataclass(frozen=True, kw_only=True)
class SamplingRequest:
    """What to sample.

    Attributes:
        batch: rows at a time.
        tokens_per_step: tokens of a row that a network call decides; 1 is first hitting.
        max_new_tokens: of a row; None: L.
        window: a token sees the last so many; None: all.
        dtype: of weights and cache; int8: matrices in 8 bits, the rest in float32, on CPUs.
    """

    batch: int = 1
    tokens_per_step: int = 1
    max_new_tokens: int | None = None
    window: int | None = None
    dtype: SampleDtype = "float32"

    def __post_init__(self) -> None:
        for name in ("batch", "tokens_per_step", "max_new_tokens", "window"):
            check_limit(name, getattr(self, name), "--" + name.replace("_", "-"))
        if self.dtype not in get_args(SampleDtype):
            raise UserError(f"--sample-dtype is {shown(self.dtype)}; choose float32, bf16 or int8")


@dataclass(frozen=True, kw_only=True)
class SamplingAccount:
    """What sampling costs.

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


def sampling_account(
    config: Any, device: Hardware, request: SamplingRequest, price_per_hour: float | None
) -> SamplingAccount:
    """The account of sampling `request` on one device, every row from its beginning.

    Raises:
        UserError: the request does not fit the network.
    """
    network = Network.of(config)
    length = request.max_new_tokens or network.seq_len
    _check(network, request, length)
    if request.dtype == "int8" and device.cuda:
        raise UserError(
            f"--sample-dtype is int8, which is for CPUs, and {device.name} is none; take "
            "float32 or bf16"
        )
    course = _course(config, network, request, length)
    dtype, shares = request.dtype, device.shares
    rows = request.batch

    flops = Flops(layers=0, attention=0, attention_needed=0, head=0)
    keys_read = 0.0
    for tokens, keys, scored, times in course:
        call = call_flops(network, rows, tokens, keys, scored * rows)
        flops += call.times(times)
        keys_read += times * keys
    calls = sum(times for *_, times in course)
    drawn = sum(scored * times for _, _, scored, times in course) / calls
    weights_read = read_bytes(network, dtype)
    of_rows = cache_bytes(network, rows, 1, dtype) * keys_read / calls
    of_rows += DRAW_BYTES * rows * drawn * network.vocab_size
    weights_seconds = weights_read / (device.bandwidth * shares.reading)
    rows_seconds = of_rows / (device.bandwidth * shares.call_rows)
    # Products of 8 bits are not measured; they are not slower than those of float32.
    peak = device.flops["float32" if dtype == "int8" else dtype]
    arithmetic = flops.total / calls / (peak * shares.call_products)
    starting = network.num_layers * shares.layer_seconds
    both = (max if device.cuda else _sum)(weights_seconds, starting)
    seconds = both + rows_seconds + arithmetic
    speed = rows * length / (calls * seconds)

    weights = weight_bytes(network, dtype)
    capacity = _capacity(network, request, length)
    cache = cache_bytes(network, 1, capacity, dtype)
    logits = DRAW_BYTES * max(scored for _, _, scored, _ in course) * network.vocab_size
    return SamplingAccount(
        request=request,
        new_tokens=length,
        calls=calls,
        tokens_per_forward=length / calls,
        flops=flops.times(1 / calls),
        flops_per_token=flops.total / (rows * length),
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


def _sum(*parts: float) -> float:
    return sum(parts)


def _check(network: Network, request: SamplingRequest, length: int) -> None:
    size, window = network.block_size, request.window
    if request.tokens_per_step > size:
        raise UserError(
            f"--tokens-per-step is {request.tokens_per_step}, more than the {size} tokens of a "
            "block; give at most that"
        )
    if window is not None and window < size:
        raise UserError(
            f"--window is {window}, smaller than a block of {size}; give at least one block"
        )
    one_block = not network.autoregressive and not network.has_clean
    if one_block and length > network.seq_len:
        raise UserError(
            f"--max-new-tokens is {length}, beyond the one block of {size} tokens, which then "
            "slides over the text; plan for at most one block"
        )


def _capacity(network: Network, request: SamplingRequest, length: int) -> int:
    """Slots of the cache for a row."""
    longest = -(-length // network.block_size) * network.block_size
    if request.window is None:
        return longest
    return min(longest, request.window + network.block_size)


def _course(
    config: Any, network: Network, request: SamplingRequest, length: int
) -> list[tuple[int, float, float, int]]:
    """The calls of a row: tokens read, keys seen, positions with logits, how many such calls."""
    size, limit = network.block_size, _capacity(network, request, length)
    if network.autoregressive:
        seen = sum(min(position + 1, limit) for position in range(length))
        return [(1, seen / length, 1.0, length)]
    calls, scored = -(-size // request.tokens_per_step), float(request.tokens_per_step)
    if config.objective == "score_entropy":  # every token that is still masked
        scored = (size + 1) / 2
    elif config.objective == "d3pm" and config.transition == "uniform":  # all tokens, all steps
        calls, scored = config.timesteps, float(size)
    blocks = -(-length // size)
    keys = [min((block + 1) * size, limit) for block in range(blocks)]
    # The first call of a block also commits the block before it.
    course = [(size, float(keys[0]), scored, 1)]
    if blocks > 1:
        course.append((2 * size, sum(keys[1:]) / (blocks - 1), scored, blocks - 1))
    if calls > 1:
        course.append((size, sum(keys) / blocks, scored, blocks * (calls - 1)))
    return course
