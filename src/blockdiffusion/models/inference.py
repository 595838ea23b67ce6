"""A copy of a network for sampling: the same function with less to read and to compute.

* The modulation (adaLN) of a network without time input is the same for every token of every pass.
  Shifts and scales, with the weights of the norms, are folded into the linear layers after the
  norms, and gates into those before the sums. A plain pre-norm transformer remains.
* The layers of Llama and its relatives in transformers are fused on a CPU (see `fused_llama`), and
  GPT-2's transposed layers become linear ones.
* On a CPU the weights of linear layers are laid out once as oneDNN's products read them: the same
  numbers, in half the time for few rows.
* With `int8` the weights of linear layers are stored in 8 bits, with one scale per output, and
  inputs are rounded to 7 bits, with one scale per pass: an approximation, for CPUs.
* On a GPU the kernels of a pass over the cache are recorded and started together.

The copy samples and scores; it is not trained or saved.
"""

from __future__ import annotations

import copy
import platform
import warnings
from collections.abc import Callable
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import nn

from blockdiffusion.errors import UserError
from blockdiffusion.models.backbone import ALL, Outputs
from blockdiffusion.models.block_diffusion import BlockDiffusion
from blockdiffusion.models.fused import gelu
from blockdiffusion.models.llada2 import Experts
from blockdiffusion.models.transformer import (
    NORM_EPS,
    DiT,
    Layer,
    Linear,
    LinearGelu,
    Modulation,
    Rotary,
    TimeEmbedding,
    attended,
    split_heads,
)

AnyModel = TypeVar("AnyModel", bound=BlockDiffusion)


@torch.no_grad()
def optimize_for_inference(model: AnyModel, *, int8: bool = False) -> AnyModel:
    """Return a copy of `model` that samples: the same function, faster.

    It shares the weights that are neither folded, packed nor rounded. A network that reads the time
    keeps its modulation.

    Args:
        int8: round weights and inputs of linear layers to 8 bits.

    Raises:
        UserError: int8 on a device, a machine or for a type that has no such products.
    """
    if int8:
        _check_int8(model)
    backbone = model.backbone
    folds = isinstance(backbone, DiT) and not model.config.time_conditioning
    if folds:
        made = _folded(backbone)
    else:  # the modules are copied, the tensors shared
        tensors = (*backbone.parameters(), *backbone.buffers())
        made = copy.deepcopy(backbone, {id(tensor): tensor for tensor in tensors})
        simplify = getattr(made, "simplify", None)  # of causal models
        if simplify is not None and (int8 or _packs(model)):  # weights are copied anyway
            simplify()
    if int8:
        _replace(made, Int8Linear)
    elif _packs(model):
        _replace(made, PackedLinear)
    sampling = model.with_backbone(made.eval())
    sampling.records_passes = model.device.type == "cuda" and can_be_recorded(made)
    return sampling.eval()


def can_be_recorded(network: nn.Module) -> bool:
    """Return whether the kernels of a pass are always the same ones: not with a mixture of experts,
    where the host first asks how many tokens chose each."""
    return not any(isinstance(module, Experts) for module in network.modules())


class FoldedLayer(nn.Module):
    """A `Layer` whose norms and modulation are in the weights of its linear layers."""

    def __init__(self, layer: Layer, cond: torch.Tensor | None):
        super().__init__()
        self.num_attention_heads = layer.num_attention_heads
        modulation = (m.double().flatten() for m in layer.modulate(cond))
        attn_shift, attn_scale, attn_gate, mlp_shift, mlp_scale, mlp_gate = modulation
        self.attn_qkv = _behind_norm(
            layer.attn_qkv, layer.attn_norm.weight * (1 + attn_scale), attn_shift
        )
        self.attn_out = _gated(layer.attn_out, attn_gate)
        self.mlp_in = _behind_norm(layer.mlp_in, layer.mlp_norm.weight * (1 + mlp_scale), mlp_shift)
        self.mlp_out = _gated(layer.mlp_out, mlp_gate)

    def forward(
        self,
        x_BTD: torch.Tensor,
        cond: torch.Tensor | None,
        rotary: Rotary,
        read: Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor],
        outputs: Outputs = ALL,
    ) -> torch.Tensor:
        """As in `Layer`; `cond` is in the weights."""
        qkv = split_heads(self.attn_qkv(_normed(x_BTD)), self.num_attention_heads, rotary)
        x_BTD = plus(outputs.take(x_BTD), self.attn_out, attended(qkv, read, outputs))
        return plus(x_BTD, self.mlp_out, self.mlp_in(_normed(x_BTD)))


class PackedLinear(nn.Module):
    """A linear layer whose weight is laid out for oneDNN's products, for any number of rows.

    PyTorch's compiler replaces frozen linear layers by the same operators.
    """

    def __init__(self, linear: nn.Linear):
        super().__init__()
        self.packed = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach())
        self.bias = None if linear.bias is None else linear.bias.detach()
        self.then = ("gelu", [], "tanh") if isinstance(linear, LinearGelu) else ("none", [], "")

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return torch.ops.mkldnn._linear_pointwise(input, self.packed, self.bias, *self.then)

    def plus(self, x: torch.Tensor, input: torch.Tensor) -> torch.Tensor:
        """Return x + self(input), rounded once, for layers without GELU."""
        return torch.ops.mkldnn._linear_pointwise.binary(input, x, self.packed, self.bias, "add")


class Int8Linear(nn.Module):
    """A linear layer with products of 8-bit integers and a scale for each output.

    Inputs are rounded to 7 bits, since sums of two products would overflow 16 bits on CPUs without
    instructions for them.
    """

    def __init__(self, linear: nn.Linear):
        super().__init__()
        weight = linear.weight.float()
        scale = weight.abs().amax(1).clamp(min=1e-12) / 127
        zero_point = torch.zeros(len(scale), dtype=torch.long)
        bias = None if linear.bias is None else linear.bias.float()
        with warnings.catch_warnings():
            # PyTorch's quantized tensors are deprecated; nothing else feeds these products.
            warnings.simplefilter("ignore", UserWarning)
            rounded = torch.quantize_per_channel(weight, scale.double(), zero_point, 0, torch.qint8)
            self.packed = torch.ops.quantized.linear_prepack(rounded, bias)
        self.has_gelu = isinstance(linear, LinearGelu)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        try:
            out = torch.ops.quantized.linear_dynamic(input, self.packed, True)
        except RuntimeError:
            if bool(input.isfinite().all()):
                raise
            raise UserError(
                "the network's numbers are not finite (nan or infinity), so they cannot be "
                "rounded to 8 bits: its weights have diverged; take an earlier checkpoint"
            ) from None
        return gelu(out) if self.has_gelu else out


def plus(x: torch.Tensor, linear: nn.Module, input: torch.Tensor) -> torch.Tensor:
    """Return x + linear(input), in one operation where the layer has it."""
    return linear.plus(x, input) if isinstance(linear, PackedLinear) else x + linear(input)


def _normed(x: torch.Tensor) -> torch.Tensor:
    return F.layer_norm(x, x.shape[-1:], eps=NORM_EPS)


def _folded(network: DiT) -> DiT:
    made = copy.copy(network)  # shares what is not replaced
    made._modules = dict(network._modules)
    made.config = copy.deepcopy(network.config)
    made.config.adaln = False
    cond = None if network.time is None else network.time(torch.zeros(1, 1, device=network.device))
    made.layers = nn.ModuleList(FoldedLayer(layer, cond) for layer in network.layers)  # type: ignore
    shift, scale = (
        (torch.zeros((), device=network.device),) * 2
        if network.final_modulation is None
        else (m.flatten() for m in network.final_modulation(cond))
    )
    made.output = _behind_norm(
        network.output, network.final_norm.weight * (1 + scale.double()), shift.double()
    )
    made.final_norm = copy.deepcopy(network.final_norm)
    nn.init.ones_(made.final_norm.weight)
    made.time = made.final_modulation = None
    return made


def like_linear(weight: torch.Tensor, bias: torch.Tensor | None) -> nn.Linear:
    """Return a linear layer that holds these tensors; a parameter stays the same object."""
    with torch.device("meta"):
        made = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None)
    made.weight = nn.Parameter(weight.detach(), requires_grad=False)
    if isinstance(bias, nn.Parameter):
        made.bias = bias
    elif bias is not None:
        made.bias = nn.Parameter(bias.detach(), requires_grad=False)
    return made


def _behind_norm(linear: Linear, scale: torch.Tensor, shift: torch.Tensor) -> Linear:
    """A layer that reads x and computes `linear` of x * scale + shift; folded in float64."""
    weight = linear.weight.double()
    bias = weight @ shift.expand(weight.shape[1])
    if linear.bias is not None:
        bias = bias + linear.bias.double()
    return _like(linear, weight * scale, bias)


def _gated(linear: Linear, gate: torch.Tensor) -> Linear:
    bias = None if linear.bias is None else gate * linear.bias.double()
    return _like(linear, gate[:, None] * linear.weight.double(), bias)


def _like(linear: Linear, weight: torch.Tensor, bias: torch.Tensor | None) -> Linear:
    with torch.device("meta"):
        made = type(linear)(weight.shape[1], weight.shape[0], bias=bias is not None)
    dtype = linear.weight.dtype
    made.weight = nn.Parameter(weight.to(dtype), requires_grad=False)
    if bias is not None:
        made.bias = nn.Parameter(bias.to(dtype), requires_grad=False)
    return made


def _replace(module: nn.Module, kind: Callable[[nn.Linear], nn.Module]) -> None:
    """Replace every linear layer by a `kind`."""
    for name, child in module.named_children():
        if isinstance(child, TimeEmbedding | Modulation):
            continue  # small, and kept only if the network reads the time
        if isinstance(child, nn.Linear):
            setattr(module, name, kind(child))
        else:
            _replace(child, kind)


def _packs(model: BlockDiffusion) -> bool:
    """Whether oneDNN has products for this network's device and type."""
    if model.device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return False
    if model.dtype == torch.bfloat16:
        return torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return model.dtype == torch.float32


def _check_int8(model: BlockDiffusion) -> None:
    if model.device.type != "cpu":
        raise UserError(
            f"int8 is for CPUs, and this network is on {model.device.type}; leave the type as it is"
        )
    if "fbgemm" not in torch.backends.quantized.supported_engines:
        raise UserError(
            f"this PyTorch has no 8-bit products for {platform.machine()} processors; leave the "
            "type as it is"
        )
    if model.dtype != torch.float32:
        raise UserError(f"int8 starts from float32 weights, not {model.dtype}; load those")


sampling_copy = optimize_for_inference  # the old name, for one version

# For each model: its state when its copy was made, and the copy; None = it is a copy itself.
_copies: WeakKeyDictionary[nn.Module, tuple[Any, nn.Module | None]] = WeakKeyDictionary()


def inference_form(model: Any) -> Any:
    """Return the copy of `model` that samples, made once and again when weights or configuration
    changed.

    A model in training mode, such a copy itself, and any other object are returned as they are.
    PyTorch does not count changes of `weight.data`, so these go unnoticed.
    """
    if not isinstance(model, BlockDiffusion):
        return model
    if model.training:
        _copies.pop(model, None)
        return model
    weights = [(weight.data_ptr(), weight._version) for weight in model.parameters()]
    state = (weights, dict(vars(model.config)))
    known, made = _copies.get(model, (None, None))
    if known != state:
        own = (FoldedLayer, PackedLinear, Int8Linear)
        is_copy = any(isinstance(module, own) for module in model.modules())
        _copies.pop(model, None)  # before the new one needs memory
        made = None if is_copy else optimize_for_inference(model)
        _copies[model] = state, made
    if made is None:
        return model
    made.tokenizer = model.tokenizer
    return made
