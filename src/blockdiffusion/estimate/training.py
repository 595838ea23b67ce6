"""The cost of a training run: memory, operations, time, price."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch

from blockdiffusion.data.manifest import Manifest
from blockdiffusion.diffusion.estimators import for_block_size
from blockdiffusion.diffusion.objectives import diffusion_of
from blockdiffusion.errors import UserError
from blockdiffusion.estimate.flops import Flops, Pass, forward_flops, muon_flops, training_flops
from blockdiffusion.estimate.memory import (
    Execution,
    Memory,
    traffic_bytes,
    training_memory,
    update_bytes,
)
from blockdiffusion.estimate.sizes import NetworkSizes
from blockdiffusion.evaluate.likelihood import choose_estimator
from blockdiffusion.evaluate.replicates import COPIES
from blockdiffusion.limits import check_limit
from blockdiffusion.models.attention import resolve_backend
from blockdiffusion.runtime.hardware import Hardware
from blockdiffusion.train.recipe import Recipe
from blockdiffusion.train.schedule_search import clip_grid

DRAWN_TOKENS = 2**16  # tokens that are masked to count the scored positions


@dataclass(frozen=True, kw_only=True)
class Seconds:
    """Time of one update on every device, by purpose.

    Attributes:
        products: matrix products of layers and output. attention: scores, sums and their gradients.
        traffic: operations on the activations between them. update: optimizer and average.
        exchange: gradients between devices, not overlapped with anything.
        starting: launching kernels; on a GPU only the excess over the kernels' own time.
    """

    products: float
    attention: float
    traffic: float
    update: float
    exchange: float
    starting: float

    @property
    def total(self) -> float:
        """Seconds of an update."""
        return sum(vars(self).values())


@dataclass(frozen=True, kw_only=True)
class TrainingEstimate:
    """The cost of training. See `Memory` and `Seconds`.

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


@dataclass(frozen=True, kw_only=True)
class _Update:
    """An update of a recipe on some devices, each with `rows` of its rows."""

    recipe: Recipe
    sizes: NetworkSizes
    how: Execution
    row: Pass
    device: Hardware
    devices: int
    rows: int

    @property
    def shards(self) -> int:
        return self.devices if self.recipe.train.parallel == "fsdp" else 1

    def of(self, rows: int) -> Pass:
        """Return a pass over so many rows."""
        return replace(self.row, rows=rows, scored=rows * self.row.scored)

    @property
    def flops(self) -> Flops:
        """Operations of one device."""
        return training_flops(self.sizes, self.of(self.rows), checkpointing=self.how.checkpointing)

    def memory(self, rows: int) -> Memory:
        """Return it for passes of so many rows. Replicas sum whole gradients in any case."""
        one_pass = rows >= self.rows and (self.shards > 1 or self.devices == 1)
        return training_memory(
            self.sizes, self.of(rows), self.how, self.recipe.optim,
            shards=self.shards, one_pass=one_pass,
        )  # fmt: skip

    def seconds(self, micro: int) -> Seconds:
        """Return it for passes of `micro` rows."""
        sizes, device, flops, optim = self.sizes, self.device, self.flops, self.recipe.optim
        shares, peak, count = device.shares, device.flops[self.how.dtype], -(-self.rows // micro)
        products = (flops.layers + flops.head) / (peak * shares.products)
        attending = peak if device.cuda else device.flops["float32"]
        attention = flops.attention / (attending * shares.attention)
        # Per micro-batch the gradient is added to the sum, and weights are cast to bfloat16.
        moved = traffic_bytes(sizes, self.of(self.rows), self.how)
        moved += count * (8 * sizes.trained_parameters + 4 * sizes.parameters)
        share = shares.traffic_compiled if self.how.compiled else shares.traffic
        traffic = moved / (device.bandwidth * share)
        update = update_bytes(sizes, optim) / self.shards / (device.bandwidth * shares.reading)
        # Replicas sum gradients and return them; shards sum them once, and gather weights for the
        # forward and the backward pass of every micro-batch.
        exchanged = 8 * sizes.trained_parameters
        if self.shards > 1:
            exchanged = 4 * (sizes.trained_parameters + 2 * count * sizes.parameters)
        if optim.name == "muon":
            matrices = sizes.num_hidden_layers * muon_flops(sizes.layer_matrices)
            update += matrices / (device.flops["bfloat16"] * shares.products)
            if self.shards > 1:  # each device gathers the matrices, in bfloat16
                exchanged += 2 * sizes.num_hidden_layers * sizes.layer_numbers
        starts = (
            count * (3 + self.how.checkpointing) * sizes.num_hidden_layers * shares.layer_seconds
        )
        return Seconds(
            products=products,
            attention=attention,
            traffic=traffic,
            update=update,
            exchange=(self.devices - 1) / self.devices * exchanged / device.link,
            starting=max(0.0, starts - products - attention - traffic) if device.cuda else starts,
        )


def estimate_training(
    recipe: Recipe,
    manifest: Manifest,
    config: Any,
    sizes: NetworkSizes,
    device: Hardware,
    devices: int,
    price_per_hour: float | None,
) -> TrainingEstimate:
    """Return the cost of `recipe` on `devices` devices that share the rows of every update.

    Raises:
        UserError: the rows cannot be shared evenly.
    """
    options, rows = recipe.train, _rows_of_device(recipe, devices)
    drawn = drawn_rows(recipe, manifest, config)
    update = _Update(
        recipe=recipe, sizes=sizes, device=device, devices=devices, rows=rows,
        how=_execution(recipe, config, device),
        row=Pass(rows=1, scored=drawn.scored, num_noisy=drawn.num_noisy, given_bos=manifest.row_bos,
                 attention=_attention(sizes, device)),
    )  # fmt: skip
    wanted = min(options.micro_batch_size or rows, rows)
    most = largest(lambda count: update.memory(count).peak <= device.memory, rows)
    micro = min(wanted, most) or 1
    seconds, flops = update.seconds(micro), update.flops.times(devices, devices, devices)
    evaluation = _evaluation(recipe, config, sizes)
    search = _search(recipe, sizes, update.row)
    rate = flops.total / devices / seconds.total
    # Evaluations are in float32, and on one device.
    slow = device.flops["float32"] * device.shares.products
    total = options.steps * seconds.total + (evaluation + search) / slow
    text = options.steps * options.batch_size * sizes.seq_len * drawn.valid
    return TrainingEstimate(
        steps=options.steps,
        batch_size=options.batch_size,
        dtype=options.dtype,
        num_noisy=drawn.num_noisy,
        tokens_read=update.row.tokens(sizes),
        tokens_scored=drawn.scored,
        tokens_run=text,
        flops=flops,
        flops_per_token=flops.total * options.steps / text,
        flops_run=flops.total * options.steps,
        flops_evaluation=evaluation,
        flops_search=search,
        memory=update.memory(micro),
        memory_of_device=device.memory,
        micro_batch=micro,
        largest_micro_batch=most,
        fits=wanted <= most,
        seconds=seconds,
        seconds_update=seconds.total,
        seconds_run=total,
        tokens_per_second=text / options.steps / seconds.total,
        flops_per_second=rate,
        peak_share=rate / device.flops[options.dtype],
        price=None if price_per_hour is None else price_per_hour * devices * total / 3600,
    )


def _rows_of_device(recipe: Recipe, devices: int) -> int:
    check_limit("devices", devices, "--devices")
    size = recipe.train.batch_size
    if size % devices:
        raise UserError(f"--devices is {devices}; it must divide train.batch_size, which is {size}")
    return size // devices


def largest(fits: Callable[[int], bool], most: int) -> int:
    """Return the largest number of 1..most that fits, if all smaller ones do; 0 if none does."""
    return bisect_left(range(1, most + 1), True, key=lambda count: not fits(count))


def _execution(recipe: Recipe, config: Any, device: Hardware) -> Execution:
    """How passes are computed."""
    options = recipe.train
    return Execution(
        dtype=options.dtype,
        cuda=device.cuda,
        checkpointing=options.activation_checkpointing,
        compiled=options.compile,
        cross_entropy=config.is_autoregressive or diffusion_of(config).is_cross_entropy,
    )


def _attention(sizes: NetworkSizes, device: Hardware) -> Any:
    """How attention is computed on the device."""
    if sizes.autoregressive:
        return "causal"
    return resolve_backend(None, torch.device("cuda" if device.cuda else "cpu"))


# --- scored positions -----------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Drawn:
    """A row after the estimator: N, mean number of scored positions, share that is no padding."""

    num_noisy: int
    scored: float
    valid: float


def drawn_rows(recipe: Recipe, manifest: Manifest, config: Any) -> Drawn:
    """Return N and the scored positions of the recipe's masks, measured by drawing some."""
    split, length = manifest.splits.get("train"), manifest.seq_len
    valid = 1.0 if split is None or not split.rows else split.tokens / (split.rows * length)
    if config.is_autoregressive:
        return Drawn(num_noisy=1, scored=(length - manifest.row_bos) * valid, valid=valid)
    estimator, _ = for_block_size(recipe.objective.make_estimator(), config.block_size)
    estimator = diffusion_of(config).fitted(estimator)
    clean_BL = torch.zeros(max(1, DRAWN_TOKENS // length), length, dtype=torch.long)
    free_BL = torch.ones_like(clean_BL, dtype=torch.bool)
    free_BL[:, : int(manifest.row_bos)] = False
    draw = torch.Generator().manual_seed(0)
    drawn = estimator(clean_BL, free_BL, config.block_size, config.mask_id, draw)
    scored_BNL = (drawn.weight_BNL > 0) | (drawn.noisy_BNL != clean_BL[:, None])
    scored = float(scored_BNL.sum()) / len(clean_BL) * valid
    return Drawn(num_noisy=estimator.num_noisy, scored=scored, valid=valid)


# --- evaluation and search ------------------------------------------------------------------------


def _evaluation(recipe: Recipe, config: Any, sizes: NetworkSizes) -> float:
    """Operations of all validation bounds, approximately."""
    options, length = recipe.eval, sizes.seq_len
    if options.every is None:
        return 0.0
    times, rows = -(-recipe.train.steps // options.every), options.rows or 0  # null: not known
    copies, size = 1, sizes.block_size
    if not sizes.autoregressive and size > 1:
        name, estimator, _ = choose_estimator(options, config)
        if estimator is not None:
            copies = options.mc_samples * estimator.num_noisy
        else:
            copies = 2**size - 1 if name == "exact" else options.mc_samples * options.orders * size
    shared = min(copies, COPIES)
    one = Pass(rows=1, scored=shared * length / 2, num_noisy=shared)
    return times * rows * copies / shared * forward_flops(sizes, one).total


def _search(recipe: Recipe, sizes: NetworkSizes, row: Pass) -> float:
    """Operations of all searches for the clip."""
    options = recipe.search
    if options.every is None:
        return 0.0
    times = (recipe.train.steps - 1) // options.every
    drawn = len(clip_grid(options, sizes.block_size)) * options.rows * options.replicates
    cost = training_flops if options.by == "gradient" else forward_flops
    return times * drawn * cost(sizes, row).total
