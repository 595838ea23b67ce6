"""The account of a training run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from math import prod
from typing import Any

import torch

from blockdiffusion.data.manifest import Manifest
from blockdiffusion.diffusion.estimators import Estimator, for_block_size
from blockdiffusion.diffusion.objectives import diffusion_of
from blockdiffusion.errors import UserError
from blockdiffusion.estimate.flops import (
    BYTES,
    Flops,
    Layout,
    Network,
    Pass,
    activation_bytes,
    forward_flops,
    muon_flops,
    training_flops,
    training_traffic,
    update_traffic,
)
from blockdiffusion.limits import check_limit
from blockdiffusion.models.attention import resolve_backend
from blockdiffusion.runtime.hardware import Hardware
from blockdiffusion.train.optim import is_hidden_matrix
from blockdiffusion.train.recipe import Recipe

DRAWN_TOKENS = 2**16  # of rows that are masked to see how many positions are scored
EVALUATED_COPIES = 8  # that share one clean stream (`evaluate.likelihood.COPIES`)


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Bytes on one device, by kind.

    Attributes:
        weights, gradients, optimizer, average: of all parameters, in float32; with
            `train.parallel: fsdp` on several devices a device's share of them (but of the gradients
            all, where they are summed over several micro-batches before they are exchanged).
        gathered: with fsdp, weights and gradients that are whole while a pass needs them: those of
            one layer, and what is not in layers.
        activations: kept from forward to backward, for one micro-batch.
        copies: weights rounded to bf16.
        loss: logits held at a time, and the gradient of the output.
        working: most of the backward pass of a layer.
        peak: the most at a time; not all kinds exist together.
    """

    weights: float
    gradients: float
    optimizer: float
    average: float
    gathered: float
    activations: float
    copies: float
    loss: float
    working: float
    peak: float


@dataclass(frozen=True, kw_only=True)
class Seconds:
    """Time of one update on every device, by what it is spent on.

    Attributes:
        products: matrix products of layers and output. attention: scores, sums and their gradients.
        traffic: what passes over the activations between them. update: optimizer and average.
        exchange: gradients between devices, as if nothing else went on meanwhile.
        starting: of kernels; on a GPU what it takes longer than the kernels themselves.
    """

    products: float
    attention: float
    traffic: float
    update: float
    exchange: float
    starting: float

    @property
    def total(self) -> float:
        """Of an update."""
        work = self.products + self.attention + self.traffic
        return work + self.update + self.exchange + self.starting


@dataclass(frozen=True, kw_only=True)
class TrainingAccount:
    """What training costs. See `Memory` and `Seconds`.

    Attributes:
        num_noisy: N. tokens_read: of all streams of a row. tokens_scored: of a row, on average.
        flops: of an update on all devices.
        flops_per_token: of a token of text. flops_run: of all updates.
        flops_evaluation, flops_search: of the validation bound and the search for the clip.
        micro_batch: rows of a pass on a device; the recipe's, or the most that fit.
        largest_micro_batch: the most rows that fit, of those that a device has; 0: none.
        fits: whether the recipe's own fits.
        seconds_run: of all updates, evaluations and searches.
        tokens_per_second: of text. flops_per_second: of one device. peak_share: of its peak.
        price: of the run, or None.
    """

    steps: int
    batch_size: int
    dtype: str
    num_noisy: int
    tokens_read: int
    tokens_scored: float
    tokens_run: float
    flops: Flops
    flops_per_token: float
    flops_run: float
    flops_evaluation: float
    flops_search: float
    memory: Memory
    memory_of_device: float
    micro_batch: int
    largest_micro_batch: int
    fits: bool
    seconds: Seconds
    seconds_update: float
    seconds_run: float
    tokens_per_second: float
    flops_per_second: float
    peak_share: float
    price: float | None


def training_account(
    recipe: Recipe,
    manifest: Manifest,
    config: Any,
    device: Hardware,
    devices: int,
    price_per_hour: float | None,
) -> TrainingAccount:
    """The account of `recipe` on `devices` devices that share the rows of every update.

    Raises:
        UserError: the rows cannot be shared evenly.
    """
    options, network = recipe.train, Network.of(config)
    check_limit("devices", devices, "--devices")
    if options.batch_size % devices:
        raise UserError(
            f"--devices is {devices}; it must divide train.batch_size, which is "
            f"{options.batch_size}"
        )
    rows = options.batch_size // devices
    drawn = drawn_rows(recipe, manifest, config)
    dtype = options.dtype
    layout = Layout(
        compiled=recipe.train.compile,
        dtype=dtype,
        cuda=device.cuda,
        checkpointing=options.activation_checkpointing,
        fused_loss=_is_cross_entropy(config),
    )

    def passes(count: int) -> Pass:
        scored = drawn.scored * count
        return Pass(rows=count, scored=scored, num_noisy=drawn.num_noisy,
                    given_bos=manifest.row_bos, attention=_attention(network, device))  # fmt: skip

    optimizer = optimizer_bytes(network, recipe.optim.name)
    shards = devices if options.parallel == "fsdp" else 1
    wanted = min(options.micro_batch_size or rows, rows)

    def memory(count: int) -> Memory:
        if shards > 1:
            return _shard_memory(
                network, passes(count), layout, optimizer, shards, one_pass=count >= rows
            )
        whole = devices == 1 and count >= rows
        return _memory(network, passes(count), layout, optimizer, whole=whole)

    most = largest(lambda count: memory(count).peak <= device.memory, rows)
    micro = min(wanted, most) or 1
    flops = training_flops(network, passes(rows), checkpointing=layout.checkpointing)
    flops = flops.times(devices)
    extra = [_evaluation(recipe, network, drawn), _search(recipe, network, passes)]
    seconds = _seconds(
        recipe, network, passes, layout, device, devices, shards, rows, micro, optimizer
    )
    # Evaluations are in float32, and on one device.
    slow = device.flops["float32"] * device.shares.products
    total = options.steps * seconds.total + sum(extra) / slow
    text = options.steps * options.batch_size * network.seq_len * drawn.valid
    done = flops.total / devices / seconds.total
    return TrainingAccount(
        steps=options.steps,
        batch_size=options.batch_size,
        dtype=dtype,
        num_noisy=drawn.num_noisy,
        tokens_read=passes(1).tokens(network),
        tokens_scored=drawn.scored,
        tokens_run=text,
        flops=flops,
        flops_per_token=flops.total * options.steps / text,
        flops_run=flops.total * options.steps,
        flops_evaluation=extra[0],
        flops_search=extra[1],
        memory=memory(micro),
        memory_of_device=device.memory,
        micro_batch=micro,
        largest_micro_batch=most,
        fits=wanted <= most,
        seconds=seconds,
        seconds_update=seconds.total,
        seconds_run=total,
        tokens_per_second=text / options.steps / seconds.total,
        flops_per_second=done,
        peak_share=done / device.flops[dtype],
        price=None if price_per_hour is None else price_per_hour * devices * total / 3600,
    )


def _is_cross_entropy(config: Any) -> bool:
    """Whether the loss is that of next or masked tokens, whose gradient is made at once."""
    uniform = config.objective == "d3pm" and config.transition == "uniform"
    return not (uniform or config.objective == "score_entropy")


def _attention(network: Network, device: Hardware) -> Any:
    """How attention is computed there."""
    if network.autoregressive:
        return "causal"
    return resolve_backend(None, torch.device("cuda" if device.cuda else "cpu"))


# --- what a row is made into ----------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Drawn:
    """What the estimator makes of a row: N, scored positions on average; share without padding."""

    num_noisy: int
    scored: float
    valid: float


def drawn_rows(recipe: Recipe, manifest: Manifest, config: Any) -> Drawn:
    """What the recipe's masks leave to score, seen by drawing some."""
    split = manifest.splits.get("train")
    length = manifest.seq_len
    valid = 1.0 if split is None or not split.rows else split.tokens / (split.rows * length)
    free = length - manifest.row_bos
    if recipe.objective.name == "ar":
        return Drawn(num_noisy=1, scored=free * valid, valid=valid)
    law, _ = for_block_size(recipe.objective.make_estimator(), config.block_size)
    law = diffusion_of(config).fitted(law)
    return Drawn(
        num_noisy=law.num_noisy, scored=_scored(law, config, manifest) * valid, valid=valid
    )


def _scored(law: Estimator, config: Any, manifest: Manifest) -> float:
    """Positions of a row that have logits, in all copies, on average."""
    rows = max(1, DRAWN_TOKENS // config.seq_len)
    clean_BL = torch.zeros(rows, config.seq_len, dtype=torch.long)
    free_BL = torch.ones_like(clean_BL, dtype=torch.bool)
    free_BL[:, : int(manifest.row_bos)] = False
    draw = torch.Generator().manual_seed(0)
    drawn = law(clean_BL, free_BL, config.block_size, config.mask_id, draw)
    scored_BNL = (drawn.weight_BNL > 0) | (drawn.noisy_BNL != clean_BL[:, None])
    return float(scored_BNL.sum()) / rows


# --- memory ---------------------------------------------------------------------------------------


def optimizer_bytes(network: Network, name: str) -> float:
    """AdamW: two moments, and a counter for every tensor; Muon: one for the hidden matrices."""
    total = 0
    for parameter, shape in network.shapes():
        if name == "muon" and is_hidden_matrix(parameter, len(shape)):
            total += 4 * prod(shape)
        else:
            total += 8 * prod(shape) + 4
    return total


def _memory(network: Network, p: Pass, layout: Layout, optimizer: float, *, whole: bool) -> Memory:
    """`whole`: the pass is the whole update on one device: gradients come as activations go."""
    weights = BYTES["float32"] * network.parameters
    held = activation_bytes(network, p, layout)
    standing = 2 * weights + optimizer  # weights, average, optimizer
    if whole:
        peak = standing + max(held.peak, weights + held.working)
    else:
        peak = standing + weights + held.peak
    return Memory(
        weights=weights,
        gradients=weights,
        optimizer=optimizer,
        average=weights,
        gathered=0.0,
        activations=held.saved,
        copies=held.copies,
        loss=held.loss,
        working=held.working,
        peak=peak,
    )


def _shard_memory(
    network: Network, p: Pass, layout: Layout, optimizer: float, shards: int, *, one_pass: bool
) -> Memory:
    """Of one of `shards` devices that have a part of every tensor (FSDP2). An evaluation puts a
    whole copy of the averaged weights together, which has to fit, too."""
    whole = BYTES["float32"] * network.parameters
    outside = network.parameters - network.num_layers * network.layer_parameters
    held = activation_bytes(network, p, layout)
    weights, average = whole / shards, whole / shards
    gradients = weights if one_pass else whole
    # Of a unit weights and gradient at a time.
    gathered = 2 * BYTES["float32"] * (outside + network.layer_parameters)
    standing = weights + average + optimizer / shards
    return Memory(
        weights=weights,
        gradients=gradients,
        optimizer=optimizer / shards,
        average=average,
        gathered=gathered,
        activations=held.saved,
        copies=held.copies,
        loss=held.loss,
        working=held.working,
        peak=standing + max(gradients + gathered + held.peak, whole),
    )


def largest(fits: Callable[[int], bool], most: int) -> int:
    """The largest number of 1..most that fits, if smaller ones do; 0 where none does."""
    low, high = 0, most
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return low


# --- time -----------------------------------------------------------------------------------------


def _seconds(
    recipe: Recipe,
    network: Network,
    passes: Callable[[int], Pass],
    layout: Layout,
    device: Hardware,
    devices: int,
    shards: int,
    rows: int,
    micro: int,
    optimizer: float,
) -> Seconds:
    """Of an update, whose rows go through in passes of `micro` rows."""
    shares, peak = device.shares, device.flops[layout.dtype]
    flops = training_flops(network, passes(rows), checkpointing=layout.checkpointing)
    count = -(-rows // micro)
    products = (flops.layers + flops.head) / (peak * shares.products)
    attending = peak if device.cuda else device.flops["float32"]
    attention = flops.attention / (attending * shares.attention)
    # A micro-batch's gradient is added to the sum, and its bf16 weights are made anew.
    moved = training_traffic(network, passes(rows), layout) + count * 4 * 3 * network.parameters
    share = shares.traffic_compiled if layout.compiled else shares.traffic
    traffic = moved / (device.bandwidth * share)
    update = update_traffic(network, optimizer) / shards / (device.bandwidth * shares.reading)
    exchanged = 0
    if recipe.optim.name == "muon":
        shapes = [s for n, s in network.shapes() if is_hidden_matrix(n, len(s))]
        update += muon_flops(shapes) / (device.flops["bf16"] * shares.products)
        if shards > 1:  # each puts the matrices together, in bf16, and computes all of them
            exchanged = BYTES["bf16"] * sum(map(prod, shapes))
    starts = count * (3 + layout.checkpointing) * network.num_layers * shares.layer_seconds
    # Gradients are summed and handed back; with shards they are summed once, and weights handed out
    # for the forward and the backward pass of every micro-batch.
    rounds = 2 if shards == 1 else 1 + 2 * count
    exchanged += rounds * 4 * network.parameters
    exchange = (devices - 1) / devices * exchanged / device.link
    return Seconds(
        products=products,
        attention=attention,
        traffic=traffic,
        update=update,
        exchange=exchange,
        starting=max(0.0, starts - products - attention - traffic) if device.cuda else starts,
    )


def _evaluation(recipe: Recipe, network: Network, drawn: Drawn) -> float:
    """Operations of all validation bounds, about."""
    options = recipe.eval
    if options.every is None:
        return 0.0
    times = -(-recipe.train.steps // options.every)
    rows = options.rows or 0  # null: all rows, whose number only the data tell
    copies = _evaluated_copies(recipe, network)
    shared = 1 if network.autoregressive else min(copies, EVALUATED_COPIES)
    one = Pass(rows=1, scored=shared * network.seq_len / 2, num_noisy=shared)
    return times * rows * copies / shared * forward_flops(network, one).total


def _evaluated_copies(recipe: Recipe, network: Network) -> int:
    """Noisy copies of a row that a validation bound reads."""
    options = recipe.eval
    size = network.block_size
    if network.autoregressive or size == 1:
        return 1
    if options.estimator == "auto" and not network.time_conditioning:
        return min(2**size - 1, 2 * options.samples)  # what is cheaper
    if options.estimator == "exact":
        return 2**size - 1
    if options.estimator == "orders":
        return options.samples * options.orders * size
    paired = options.estimator in ("auto", "complement")
    return options.samples * (2 if paired else 1)


def _search(recipe: Recipe, network: Network, passes: Callable[[int], Pass]) -> float:
    """Operations of all searches for the clip."""
    from blockdiffusion.train.schedule_search import clip_grid

    options = recipe.search
    if options.every is None:
        return 0.0
    times = (recipe.train.steps - 1) // options.every
    drawn = len(clip_grid(options, network.block_size)) * options.rows * options.replicates
    one = replace(passes(1))
    cost = training_flops if options.by == "gradient" else forward_flops
    return times * drawn * cost(network, one).total
