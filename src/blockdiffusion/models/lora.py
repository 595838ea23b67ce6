"""Low-rank adaptation (LoRA, Hu et al. 2021) of a causal language model.

peft adds the matrices for training. The embedding of the mask token is trained beside them; all
other weights stay as they are. A trained adapter is merged into the weights when it is read, so
that a model with an adapter samples and scores like any other, and needs no peft.

Shape suffixes: O outputs, I inputs of a linear layer, R rank.
"""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from blockdiffusion.errors import UserError

SECTION = "block_diffusion_lora"  # of config.json: an `AdapterOf`
PREFIX = "base_model.model."  # of peft's names in a file
A, B, ROW = ".lora_A.weight", ".lora_B.weight", ".token_adapter.trainable_tokens_delta"
SAMPLE = 1024  # numbers of a tensor that enter a fingerprint


@dataclass(frozen=True, kw_only=True)
class AdapterOf:
    """What an adapter belongs to, as config.json keeps it.

    Attributes:
        parent: path or hub id of the model that it is added to.
        fingerprint: of that model's weights; see `fingerprint`.
        scale: factor of the product of both matrices.
    """

    parent: str
    fingerprint: str
    scale: float


@dataclass(frozen=True, kw_only=True)
class Lora:
    """Adapters that a network holds in training: peft's configuration, and their origin."""

    config: Any
    origin: AdapterOf


def fingerprint(network: PreTrainedModel) -> str:
    """Return a digest of the first numbers of every tensor, in float32.

    Two models of a family differ in it; one model in two precisions that hold the same numbers
    does not.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(network.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.flatten()[:SAMPLE].float().cpu().numpy().tobytes())
    return digest.hexdigest()


def add_lora(
    network: PreTrainedModel,
    *,
    rank: int,
    alpha: float,
    dropout: float,
    mask_id: int,
    parent: str,
    fingerprint: str,
) -> Lora:
    """Add adapters to all linear layers but the output layer, in place; nothing else stays
    trainable but the embedding of the mask token.

    The network computes the same as before: one of each pair of matrices starts at zero.

    Raises:
        UserError: peft is not installed.
    """
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError as error:
        raise UserError(
            "adapt.lora_rank needs the package peft; install it with "
            "pip install 'blockdiffusion[adapt]', or set adapt.lora_rank=0"
        ) from error
    embeddings = network.get_input_embeddings()
    name = next(n for n, module in network.named_modules() if module is embeddings)
    config = LoraConfig(
        r=rank,
        lora_alpha=alpha,  # type: ignore  # peft takes fractions, too
        lora_dropout=dropout,
        target_modules="all-linear",
        trainable_token_indices={name.rpartition(".")[2]: [mask_id]},
        base_model_name_or_path=parent,
    )
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="fan_in_fan_out")  # of Conv1D, which it sets
        inject_adapter_in_model(config, network)
    return Lora(
        config=config,
        origin=AdapterOf(parent=parent, fingerprint=fingerprint, scale=alpha / rank),
    )


def adapter_tensors(network: PreTrainedModel) -> dict[str, torch.Tensor]:
    """Return the trainable tensors by the names that peft gives them in a file."""
    return {
        PREFIX + name.replace(".default", ""): parameter
        for name, parameter in network.named_parameters()
        if parameter.requires_grad
    }


@torch.no_grad()
def merge_adapter(
    network: PreTrainedModel, tensors: Mapping[str, torch.Tensor], scale: float, mask_id: int
) -> None:
    """Add an adapter to the weights of a network without adapters, in place.

    Raises:
        UserError: a tensor belongs to no layer of the network, or has another shape.
    """
    modules = dict(network.named_modules())
    left = dict(tensors)
    while left:
        name = next(iter(left))
        tensor = left.pop(name)
        for ending in (A, B, ROW):
            module = modules.get(name.removeprefix(PREFIX).removesuffix(ending))
            if name.endswith(ending) and module is not None:
                break
        else:
            raise UserError(f"the adapter's tensor {name} belongs to no layer of the parent")
        weight: Any = module.weight
        if name.endswith(ROW):
            if tensor.shape != (1, weight.shape[1]):
                raise _misshapen(name, tensor)
            weight[mask_id] = tensor[0]
            continue
        other = name.removesuffix(A) + B if name.endswith(A) else name.removesuffix(B) + A
        if other not in left:
            raise UserError(f"the adapter has {name}, but no {other}")
        a_RI, b_OR = (tensor, left.pop(other)) if name.endswith(A) else (left.pop(other), tensor)
        weight_OI = weight.T if isinstance(module, Conv1D) else weight
        if (b_OR.shape[0], a_RI.shape[1]) != weight_OI.shape or b_OR.shape[1] != len(a_RI):
            raise _misshapen(name, tensor)
        kind = torch.promote_types(weight_OI.dtype, torch.float32)
        weight_OI += (scale * (b_OR.to(kind) @ a_RI.to(kind))).to(weight_OI)


def _misshapen(name: str, tensor: torch.Tensor) -> UserError:
    shape = "x".join(map(str, tensor.shape))
    return UserError(f"the adapter's tensor {name} is {shape}, which does not fit the parent")
