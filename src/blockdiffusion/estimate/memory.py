"""Bytes of training and sampling: one model for every network.

For every token a layer keeps the residual stream twice, in float32, and a share of the inputs and
outputs of its matrices (the sum of their sides), in the type of the products. The shares are
calibrated on CPUs; docs/results/estimate.md compares measurements with the estimates.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from blockdiffusion.diffusion.losses import CPU_PIECES, GPU_PIECES
from blockdiffusion.estimate.flops import Pass
from blockdiffusion.estimate.options import SampleDtype
from blockdiffusion.estimate.sizes import NetworkSizes
from blockdiffusion.train.adamw_8bit import PIECE
from blockdiffusion.train.optim import OptimOptions

Dtype = Literal["float32", "bfloat16"]

BYTES = {"float32": 4, "bfloat16": 2, "int8": 4}  # int8: all but matrices
AUTOGRAD, FUSED = 1.1, 0.55  # shares kept by autograd, and by layers' own gradients
WORKING = 0.75  # share of what passes through a layer that its backward pass needs


@dataclass(frozen=True, kw_only=True)
class Execution:
    """How a training pass is computed.

    Attributes:
        dtype: "bfloat16" is autocast: the residual stream and all sums stay float32.
        cuda: whether on a GPU, which makes more logits at a time.
        checkpointing: whether only the inputs of the layers are kept.
        compiled: whether layers are compiled, which leaves their gradients to autograd.
        cross_entropy: whether the gradient of the logits is made at once.
    """

    dtype: Dtype = "float32"
    cuda: bool = False
    checkpointing: bool = False
    compiled: bool = False
    cross_entropy: bool = True


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Bytes of training on one device.

    Attributes:
        weights, gradients, optimizer, average: in float32, of all parameters, and the last three of
            trained ones; with `train.parallel: fsdp` a device's share (of gradients that several
            micro-batches are summed in, all).
        gathered: with fsdp, weights and gradients that are whole while a pass needs them.
        activations: kept from forward to backward, for one micro-batch.
        working: the most needed in addition at a time: the backward pass of a layer, or logits
            and the gradient of the output.
        peak: the most at a time; not all kinds exist together.
    """

    weights: float
    gradients: float
    optimizer: float
    average: float
    gathered: float
    activations: float
    working: float
    peak: float


def token_bytes(sizes: NetworkSizes, dtype: Dtype, share: float = 1.0) -> float:
    """Return what a layer keeps of a token: all that passes through it with the share 1."""
    matrices = sizes.layer_matrices + (sizes.modulation if sizes.time_conditioning else ())
    return 8 * sizes.hidden_size + share * BYTES[dtype] * sum(map(sum, matrices))


def token_layers(sizes: NetworkSizes, p: Pass) -> float:
    """Return the tokens of all layers; in the last one, those it does not finish count half."""
    read = p.rows * p.tokens(sizes)
    return (sizes.num_hidden_layers - 0.5) * read + 0.5 * p.finished(sizes)


def pass_bytes(sizes: NetworkSizes, p: Pass, how: Execution) -> tuple[float, float]:
    """Return the activations that a pass keeps, and its largest working space."""
    read, fused = p.rows * p.tokens(sizes), sizes.fused_layers and not how.compiled
    own = token_bytes(sizes, how.dtype, FUSED if fused else AUTOGRAD)
    kept = token_layers(sizes, p) * own
    working = WORKING * read * token_bytes(sizes, how.dtype)
    if how.checkpointing:
        kept, working = 4 * sizes.hidden_size * sizes.num_hidden_layers * read, working + read * own
    # Logits, and the gradient of the output; rounded copies too.
    rounded = how.dtype == "bfloat16"
    most_logits = (GPU_PIECES if how.cuda else CPU_PIECES).most_logits
    per_logit = (8 if rounded else 4) if how.cross_entropy else 16
    logits = per_logit * min(most_logits, p.scored * sizes.vocab_size)
    output = (10 if rounded else 4) * sizes.vocab_size * sizes.hidden_size
    return kept, max(working, logits + output)


def optimizer_bytes(sizes: NetworkSizes, optim: OptimOptions) -> float:
    """Return the state: two moments for AdamW, one for the matrices of the layers for Muon."""
    if optim.state == "8bit":
        return 2 * (1 + 4 / PIECE) * sizes.trained_parameters
    muon = sizes.num_hidden_layers * sizes.layer_numbers if optim.name == "muon" else 0
    return 8 * sizes.trained_parameters - 4 * sizes.trained_share * muon


def training_memory(
    sizes: NetworkSizes,
    p: Pass,
    how: Execution,
    optim: OptimOptions,
    *,
    shards: int,
    one_pass: bool,
) -> Memory:
    """Return the memory of a device that holds one of `shards` parts of every tensor.

    Args:
        one_pass: whether the pass is the device's whole update. Gradients then replace activations
            during the backward pass, and with shards a device sums its part of them only.
    """
    whole, trained = 4 * sizes.parameters, 4 * sizes.trained_parameters
    weights, state = whole / shards, optimizer_bytes(sizes, optim) / shards
    average = trained / shards
    gradients = average if one_pass else trained
    # Of a unit at a time: a layer, or what is in none.
    outside = sizes.parameters - sizes.num_hidden_layers * sizes.layer_parameters
    gathered = 8 * (outside + sizes.layer_parameters) if shards > 1 else 0
    kept, working = pass_bytes(sizes, p, how)
    peak = gradients + gathered + kept + working
    if shards > 1:
        peak = max(peak, whole)  # an evaluation puts the averaged weights together
    elif one_pass:
        peak = max(kept, gradients) + working
    return Memory(
        weights=weights,
        gradients=gradients,
        optimizer=state,
        average=average,
        gathered=gathered,
        activations=kept,
        working=working,
        peak=weights + average + state + peak,
    )


def traffic_bytes(sizes: NetworkSizes, p: Pass, how: Execution) -> float:
    """Return what the operations between the products read and write, forward and backward: all
    that passes through the layers, twice in each of three passes, and eight times the logits."""
    layers = 2 * (3 + how.checkpointing) * token_layers(sizes, p) * token_bytes(sizes, how.dtype)
    return layers + 8 * 4 * p.scored * sizes.vocab_size


def update_bytes(sizes: NetworkSizes, optim: OptimOptions) -> float:
    """Return what clipping, optimizer and moving average read and write in an update: the gradient
    four times, weights and average five times in all, the optimizer's state once each way."""
    return 4 * 9 * sizes.trained_parameters + 2 * optimizer_bytes(sizes, optim)


def weight_bytes(sizes: NetworkSizes, dtype: SampleDtype) -> tuple[float, float]:
    """Return the weights of the copy that samples (with adaLN folded away unless the network reads
    the time): all, and those that a call reads, which takes only rows of the input embedding. With
    int8 matrices have one byte per number, except the input embedding."""
    table = sizes.vocab_size * sizes.hidden_size
    kept = sizes.parameters - (0 if sizes.time_conditioning else sizes.conditioning)
    held = BYTES[dtype] * kept
    if dtype == "int8":
        held -= 3 * (sizes.num_hidden_layers * sizes.layer_numbers + table)
    return held, held - (0 if sizes.tied else BYTES[dtype] * table)


def cache_bytes(sizes: NetworkSizes, dtype: SampleDtype) -> int:
    """Return the keys and values of a token in all layers."""
    return BYTES[dtype] * sizes.num_hidden_layers * sizes.cache_width
