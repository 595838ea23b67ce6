"""The paper's transformer (a DiT with rotary positions and adaptive layer norm), in one file.

From top to bottom: configuration, small parts, a layer, the network `DiT`, and the model that it
and `BlockDiffusion` make.

The arithmetic is that of the published checkpoints, to the digit. Two things differ, at no cost:
the last layer's clean stream computes keys and values only, and for a network without time input
the modulation is one vector, fused into the layer norms.

Shape suffixes: B batch, T tokens of all streams, D width, H heads, E head width, V vocabulary,
C width of the conditioning.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import fields
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import AutoConfig, AutoModel, PretrainedConfig, PreTrainedModel

from blockdiffusion.diffusion.config import DiffusionConfig, ObjectiveProperties
from blockdiffusion.errors import UserError
from blockdiffusion.limits import check_limit
from blockdiffusion.models import fused
from blockdiffusion.models.backbone import ALL, AttentionSizes, Outputs, Read
from blockdiffusion.models.block_diffusion import BlockDiffusion
from blockdiffusion.options import renamed
from blockdiffusion.runtime.devices import allow_compilations

NORM_EPS = 1e-5
ROTARY_BASE = 10_000.0
FREQUENCIES = 256  # features of the time embedding
FEW_ROWS, SPLIT = 32, 8  # see Linear; the fastest on two cores
# Sizes by the names of the version before.
OLD_SIZES = {
    "width": "hidden_size",
    "num_layers": "num_hidden_layers",
    "num_heads": "num_attention_heads",
}


class BlockDiffusionConfig(ObjectiveProperties, PretrainedConfig):
    """config.json: the sizes of the paper's network, and the conventions of the model around it.

    Args:
        vocab_size: V, including the mask token.
        seq_len, block_size, mask_id, clean_attention, objective, transition, timesteps,
            noise_schedule, noise_eps, bos, bos_id, eos_id: see `DiffusionConfig`; mask_id None =
            V - 1.
        hidden_size, num_hidden_layers, num_attention_heads, cond_dim, dropout: the network
            (paper: 768, 12, 12, 128, 0.1).
        adaln: whether a conditioning modulates the layers (no for the AR baseline).
        time_conditioning: whether the network reads sigma; a BD3-LM does not.
    """

    model_type = "blockdiffusion"

    def __init__(
        self,
        vocab_size: int = 258,
        seq_len: int = 128,
        block_size: int = 4,
        mask_id: int | None = None,
        hidden_size: int = 192,
        num_hidden_layers: int = 6,
        num_attention_heads: int = 6,
        cond_dim: int = 128,
        dropout: float = 0.1,
        adaln: bool = True,
        time_conditioning: bool = False,
        clean_attention: str = "block",
        objective: str = "block_diffusion",
        transition: str = "absorbing",
        timesteps: int | None = None,
        noise_schedule: str = "linear",
        noise_eps: float = 0.0,
        bos: bool | None = None,
        bos_id: int | None = None,
        eos_id: int | None = None,
        **kwargs: Any,
    ):
        kwargs = renamed(kwargs, OLD_SIZES)
        self.vocab_size = vocab_size
        self.seq_len = seq_len
        self.block_size = block_size
        self.mask_id = vocab_size - 1 if mask_id is None else mask_id
        self.hidden_size = kwargs.pop("hidden_size", hidden_size)
        self.num_hidden_layers = kwargs.pop("num_hidden_layers", num_hidden_layers)
        self.num_attention_heads = kwargs.pop("num_attention_heads", num_attention_heads)
        self.cond_dim = cond_dim
        self.dropout = dropout
        self.adaln = adaln
        self.time_conditioning = time_conditioning
        self.clean_attention = clean_attention
        self.objective = objective
        self.transition = transition
        self.timesteps = timesteps
        self.noise_schedule = noise_schedule
        self.noise_eps = noise_eps
        self.bos = bos
        self.bos_id = bos_id
        self.eos_id = eos_id
        kwargs.setdefault("tie_word_embeddings", False)
        super().__init__(**kwargs)
        self._check()

    def diffusion(self) -> DiffusionConfig:
        """Return the conventions alone.

        Raises:
            UserError: a value is not allowed.
        """
        return DiffusionConfig(**{name: getattr(self, name) for name in CONVENTIONS})

    def _check(self) -> None:
        for name in (*OLD_SIZES.values(), "cond_dim", "dropout"):
            check_limit(name, getattr(self, name))
        self.diffusion()
        if self.hidden_size % (2 * self.num_attention_heads):
            raise UserError(
                f"hidden_size {self.hidden_size} must be a multiple of 2 * num_attention_heads = "
                f"{2 * self.num_attention_heads}"
            )
        if not 0 <= self.dropout < 1:
            raise UserError(f"dropout is {self.dropout}; it must be in [0, 1)")
        if self.time_conditioning and not self.adaln:
            raise UserError("time_conditioning needs adaln: true, which carries the time")


# The conventions that the paper's model may choose; its `reading` is always "same".
CONVENTIONS = tuple(
    field.name
    for field in fields(DiffusionConfig)
    if field.name not in ("reading", "start_id", "block_attention")
)


# --- small parts -----------------------------------------------------------------------------


class Rotary(NamedTuple):
    """The rotary angles of a pass's tokens, (..., T, 1, E), as factors of heads (..., T, H, E):
    `cos` is the cosines twice, `sin` the negative sines, then the sines."""

    cos: torch.Tensor
    sin: torch.Tensor


def rotary_tables(positions: torch.Tensor, head_dim: int, dtype: torch.dtype) -> Rotary:
    """Return the angles of positions (..., T), computed in float64: in float32 those at position
    100,000 would shift logits by 7e-4."""
    half = torch.arange(head_dim // 2, device=positions.device, dtype=torch.float64)
    frequency = ROTARY_BASE ** (-2 * half / head_dim)
    angle = positions[..., None, None].to(torch.float64) * frequency
    cos, sin = angle.cos().to(dtype), angle.sin().to(dtype)
    return Rotary(torch.cat([cos, cos], dim=-1), torch.cat([-sin, sin], dim=-1))


def rotate(x_BTHE: torch.Tensor, rotary: Rotary) -> torch.Tensor:
    """Return the rotary embedding by halves: (x1, x2) -> (x1 cos - x2 sin, x2 cos + x1 sin).

    It takes few operations, whose number is what costs for few tokens, and none pads a gradient.
    """
    cos, sin = (x.to(x_BTHE.dtype) for x in rotary)
    exchanged = x_BTHE.roll(x_BTHE.shape[-1] // 2, -1)
    return torch.addcmul(exchanged.mul_(sin), x_BTHE, cos)


class Linear(nn.Linear):
    """A linear layer that splits its weight among threads on a CPU for few rows (sampling).

    Reading the weight bounds such products, and the library's own kernel lets one thread wait: for
    4 to 16 rows the split is about twice as fast on two cores.
    """

    starts_at_zero = False  # see `BlockDiffusionModel._init_weights`

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        out_features, in_features = self.weight.shape
        parts = math.gcd(out_features, SPLIT)
        if input.device.type != "cpu" or input.numel() > FEW_ROWS * in_features or parts == 1:
            return super().forward(input)
        rows = input.reshape(1, -1, in_features).expand(parts, -1, -1)
        split = torch.bmm(rows, self.weight.view(parts, -1, in_features).transpose(1, 2))
        out = split.transpose(0, 1).reshape(*input.shape[:-1], out_features)
        return out if self.bias is None else out + self.bias


class LinearGelu(Linear):
    """A linear layer, then the GELU."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return fused.gelu(super().forward(input))


def mlp(input: torch.Tensor, inner: LinearGelu, outer: Linear) -> torch.Tensor:
    """Return outer(inner(input)). The backward pass computes the GELU again, so it is not kept."""
    if not _are_plain(inner, outer) or not torch.is_grad_enabled() or torch.compiler.is_compiling():
        return outer(inner(input))
    return fused.gelu_linear(Linear.forward(inner, input), outer.weight, outer.bias)


def _are_plain(*layers: nn.Module) -> bool:
    """Whether the linear layers are those of this file: nothing has replaced them."""
    return all(type(layer) in (Linear, LinearGelu) for layer in layers)


class Norm(nn.Module):
    """Layer norm with a weight and no bias, then modulated: LN(x) * (1 + scale) + shift."""

    def __init__(self, width: int):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: torch.Tensor, shift: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        shape = self.weight.shape
        if not is_per_token(scale):
            return F.layer_norm(x, shape, *self.affine(shift, scale), NORM_EPS)
        return F.layer_norm(x, shape, self.weight, None, NORM_EPS) * (1 + scale) + shift

    def affine(self, shift: torch.Tensor, scale: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return weight and bias (D,) of the norm with one modulation for all tokens."""
        dtype = self.weight.dtype  # under autocast the modulation comes in a shorter one
        return self.weight * (1 + scale.flatten().to(dtype)), shift.flatten().to(dtype)


class TimeEmbedding(nn.Module):
    """sigma -> conditioning (..., C): cosines and sines, then linear, silu, linear."""

    def __init__(self, cond_dim: int):
        super().__init__()
        self.linear_in = nn.Linear(FREQUENCIES, cond_dim)
        self.linear_out = nn.Linear(cond_dim, cond_dim)

    def forward(self, sigma: torch.Tensor) -> torch.Tensor:
        half = FREQUENCIES // 2
        index = torch.arange(half, device=sigma.device, dtype=torch.float32)
        angle = sigma[..., None].float() * torch.exp(-math.log(10_000.0) * index / half)
        features = torch.cat([angle.cos(), angle.sin()], dim=-1).to(self.linear_in.weight.dtype)
        return F.silu(self.linear_out(F.silu(self.linear_in(features))))


class Modulation(Linear):
    """Conditioning (..., C) -> `count` vectors of the width (DiT's adaLN)."""

    def __init__(self, cond_dim: int, width: int, count: int):
        super().__init__(cond_dim, count * width)
        self.count = count
        self.starts_at_zero = True

    def forward(self, input: torch.Tensor) -> tuple[torch.Tensor, ...]:  # type: ignore[override]
        return super().forward(input).chunk(self.count, dim=-1)


def is_per_token(m: torch.Tensor) -> bool:
    """Return whether a modulation or conditioning (..., D) is not one vector for all tokens; it is
    not for no tokens either."""
    return m.shape[:-1].numel() != 1


def split_heads(qkv_BTD: torch.Tensor, num_heads: int, rotary: Rotary) -> tuple[torch.Tensor, ...]:
    """Return rotated queries and keys, and values, each (B, H, T, E), from (B, T, 3 H E)."""
    heads = qkv_BTD.unflatten(-1, (3 * num_heads, -1))
    both, v = heads.split([2 * num_heads, num_heads], dim=2)
    q, k = rotate(both, rotary).transpose(1, 2).chunk(2, dim=1)
    return q, k, v.transpose(1, 2)


def attended(
    qkv: tuple[torch.Tensor, ...],
    read: Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor],
    outputs: Outputs,
) -> torch.Tensor:
    """Return the attention of the wanted tokens, with heads side by side."""
    q, k, v = qkv
    return outputs.take(read(q[:, :, : outputs.first], k, v).transpose(1, 2).flatten(2))


class Layer(nn.Module):
    """Attention and MLP, each with its norm, its modulation and its gate.

    Attributes:
        compiled: whether the parts before and after attention are compiled, which makes few of
            their small operations: for training on GPUs.
    """

    compiled = False

    def __init__(self, config: BlockDiffusionConfig):
        super().__init__()
        width = config.hidden_size
        self.num_attention_heads = config.num_attention_heads
        self.dropout = config.dropout
        self.attn_norm = Norm(width)
        self.attn_qkv = Linear(width, 3 * width, bias=False)
        self.attn_out = Linear(width, width, bias=False)
        self.mlp_norm = Norm(width)
        self.mlp_in = LinearGelu(width, 4 * width)
        self.mlp_out = Linear(4 * width, width)
        self.modulation = Modulation(config.cond_dim, width, 6) if config.adaln else None
        # With a modulation the gates start at zero instead.
        self.attn_out.starts_at_zero = self.mlp_out.starts_at_zero = self.modulation is None

    def modulate(self, cond: torch.Tensor | None) -> tuple[torch.Tensor, ...]:
        """Return shift, scale and gate of attention, then those of the MLP."""
        if self.modulation is not None:
            return self.modulation(cond)
        zero, one = torch.zeros_like(self.attn_norm.weight), torch.ones_like(self.attn_norm.weight)
        return zero, zero, one, zero, zero, one

    def forward(
        self,
        x_BTD: torch.Tensor,
        cond: torch.Tensor | None,
        rotary: Rotary,
        read: Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor],
        outputs: Outputs = ALL,
    ) -> torch.Tensor:
        """Return the residual stream (B, T, D) after this layer; `read(q, k, v)` is attention.

        With `outputs`, return it for these tokens; the others give keys and values only.
        """
        shift, scale, *modulation = self.modulate(cond)
        attn_in, attn_out_mlp = Layer._attn_in, Layer._attn_out_mlp
        if torch.is_grad_enabled() and self.compiled:
            attn_in, attn_out_mlp = _compiled_parts()
        elif torch.is_grad_enabled() and not is_per_token(scale) and self._is_plain():
            attn_in, attn_out_mlp = Layer._attn_in_fused, Layer._attn_out_mlp_fused
        out = attended(attn_in(self, x_BTD, shift, scale, rotary), read, outputs)
        if outputs.places is not None and self.compiled:  # it would be compiled per number
            attn_out_mlp = Layer._attn_out_mlp
        modulation = [outputs.take(m) if is_per_token(m) else m for m in modulation]
        return attn_out_mlp(self, outputs.take(x_BTD), out, *modulation)

    def _attn_in(
        self,
        x_BTD: torch.Tensor,
        shift: torch.Tensor,
        scale: torch.Tensor,
        rotary: Rotary,
    ) -> tuple[torch.Tensor, ...]:
        """Queries, keys and values of `split_heads`."""
        return split_heads(
            self.attn_qkv(self.attn_norm(x_BTD, shift, scale)), self.num_attention_heads, rotary
        )

    def _attn_out_mlp(
        self,
        x_BTD: torch.Tensor,
        out_BTD: torch.Tensor,
        attn_gate: torch.Tensor,
        mlp_shift: torch.Tensor,
        mlp_scale: torch.Tensor,
        mlp_gate: torch.Tensor,
    ) -> torch.Tensor:
        """The residual stream after this layer, from the one before it and attention's output."""
        x_BTD = torch.addcmul(x_BTD, attn_gate, self._drop(self.attn_out(out_BTD)))
        h_BTD = self.mlp_norm(x_BTD, mlp_shift, mlp_scale)
        out_BTD = mlp(h_BTD, self.mlp_in, self.mlp_out)
        return torch.addcmul(x_BTD, mlp_gate, self._drop(out_BTD))

    def _is_plain(self) -> bool:
        return _are_plain(self.attn_qkv, self.attn_out, self.mlp_in, self.mlp_out)

    def _attn_in_fused(
        self,
        x_BTD: torch.Tensor,
        shift: torch.Tensor,
        scale: torch.Tensor,
        rotary: Rotary,
    ) -> tuple[torch.Tensor, ...]:
        """`_attn_in` for one modulation, with the gradient of `fused`."""
        weight, bias = self.attn_norm.affine(shift, scale)
        return fused.norm_heads(
            x_BTD, weight, bias, self.attn_qkv.weight, NORM_EPS, *rotary, self.num_attention_heads
        )

    def _attn_out_mlp_fused(
        self,
        x_BTD: torch.Tensor,
        out_BTD: torch.Tensor,
        attn_gate: torch.Tensor,
        mlp_shift: torch.Tensor,
        mlp_scale: torch.Tensor,
        mlp_gate: torch.Tensor,
    ) -> torch.Tensor:
        """`_attn_out_mlp` for one modulation, with the gradient of `fused`."""
        dropout = self.dropout if self.training else 0.0
        add = partial(fused.gated_sum, dropout=dropout)
        out, inner, outer = self.attn_out, self.mlp_in, self.mlp_out
        x_BTD = add(x_BTD, attn_gate.flatten(), out_BTD, out.weight, out.bias, has_gelu=False)
        weight, bias = self.mlp_norm.affine(mlp_shift, mlp_scale)
        h_BTI = fused.norm_linear(x_BTD, weight, bias, inner.weight, inner.bias, NORM_EPS)
        return add(x_BTD, mlp_gate.flatten(), h_BTI, outer.weight, outer.bias, has_gelu=True)

    def _drop(self, x: torch.Tensor) -> torch.Tensor:
        return F.dropout(x, self.dropout, self.training) if self.dropout else x


@lru_cache(maxsize=1)
def _compiled_parts() -> tuple[Callable[..., Any], Callable[..., Any]]:
    """The compiled parts, the same for all layers, whose weights are inputs; one per shape."""
    allow_compilations()
    return (
        torch.compile(Layer._attn_in, dynamic=False),
        torch.compile(Layer._attn_out_mlp, dynamic=False),
    )


# --- the network -----------------------------------------------------------------------------


class DiT(PreTrainedModel):
    """The paper's network: a `backbone.Backbone`; see `BlockDiffusionConfig` for its sizes.

    Attributes:
        activation_checkpointing: whether only the inputs of the layers are kept for the backward
            pass, which computes the layers again: less memory, a third more work, equal numbers.
    """

    config_class = BlockDiffusionConfig
    base_model_prefix = ""
    main_input_name = "ids_BT"
    logits_are_linear = True
    layers: list[Layer]  # an nn.ModuleList

    def __init__(self, config: BlockDiffusionConfig):
        super().__init__(config)
        self.activation_checkpointing = False
        self.embedding = nn.Embedding(config.vocab_size, config.hidden_size)
        self.time = TimeEmbedding(config.cond_dim) if config.adaln else None
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.num_hidden_layers))  # type: ignore
        self.final_norm = Norm(config.hidden_size)
        self.final_modulation = (
            Modulation(config.cond_dim, config.hidden_size, 2) if config.adaln else None
        )
        self.output = Linear(config.hidden_size, config.vocab_size)
        self.output.starts_at_zero = True
        self.post_init()

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        """As in transformers, with the weights copied out of the mapped file, in which they may be
        unaligned, so that matrix products round as they did before saving."""
        loaded = super().from_pretrained(*args, **kwargs)
        for parameter in (loaded[0] if isinstance(loaded, tuple) else loaded).parameters():
            parameter.data = parameter.data.clone()
        return loaded

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """The authors' initialisation: PyTorch's defaults, with modulations and the output at zero.

        In layers without modulation the last product before each sum starts at zero, so that a
        layer begins as the identity, as it does with modulation, whose gates start at zero.
        PyTorch's defaults would add noise several times as large as the embeddings, and the
        baseline would learn slowly.
        """
        if isinstance(module, Linear) and module.starts_at_zero:
            for parameter in module.parameters():
                nn.init.zeros_(parameter)
        elif isinstance(module, nn.Linear):
            module.reset_parameters()
        elif isinstance(module, nn.Embedding):
            nn.init.kaiming_uniform_(module.weight, a=math.sqrt(5))
        elif isinstance(module, Norm):
            nn.init.ones_(module.weight)

    @property
    def attention(self) -> AttentionSizes:
        layers, heads = self.config.num_hidden_layers, self.config.num_attention_heads
        return AttentionSizes(layers, heads, heads, self.config.hidden_size // heads)

    def forward(
        self,
        ids_BT: torch.Tensor,
        positions_BT: torch.Tensor,
        read: Read,
        outputs: Outputs = ALL,
        sigma_BT: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Return the hidden states of the wanted tokens after all layers and the norm.

        For the other tokens the last layer computes only keys and values.
        """
        x_BTD = self.embedding(ids_BT)
        rotary = rotary_tables(positions_BT, self.attention.head_dim, x_BTD.dtype)
        cond = self._condition(sigma_BT)
        again = self.activation_checkpointing and torch.is_grad_enabled()
        for index, layer in enumerate(self.layers):
            last = outputs if layer is self.layers[-1] else ALL
            arguments = (x_BTD, cond, rotary, partial(read, index), last)
            # The random state is kept too, so the layers computed again have the same dropout.
            x_BTD = (
                checkpoint(layer, *arguments, use_reentrant=False) if again else layer(*arguments)
            )
        per_token = cond is not None and is_per_token(cond)
        return self._finish(x_BTD, outputs.take(cond) if per_token else cond)

    def _condition(self, sigma_BT: torch.Tensor | None) -> torch.Tensor | None:
        """The conditioning, which broadcasts over (B, T): one vector for all without time input."""
        if self.time is None:
            return None
        if not self.config.time_conditioning or sigma_BT is None:
            return self.time(torch.zeros(1, 1, device=self.device))
        return self.time(sigma_BT)

    def _finish(self, x_BTD: torch.Tensor, cond: torch.Tensor | None) -> torch.Tensor:
        if self.final_modulation is not None:
            return self.final_norm(x_BTD, *self.final_modulation(cond))
        zero = torch.zeros_like(self.final_norm.weight)
        return self.final_norm(x_BTD, zero, zero)

    def head(self, hidden: torch.Tensor) -> torch.Tensor:
        logits = self.output(hidden)
        return logits.to(torch.promote_types(logits.dtype, torch.float32))

    def saved_tensors(self) -> dict[str, torch.Tensor]:
        """The weights by their names in files."""
        return self.state_dict()

    def units(self) -> list[Layer]:
        return list(self.layers)

    def hidden_matrices(self) -> list[nn.Parameter]:
        """Return the matrices of attention and MLP. A modulation is left out: without time it acts
        as one vector, and its gradient has rank 1."""
        return [
            parameter
            for layer in self.layers
            for name, parameter in layer.named_parameters()
            if parameter.ndim == 2 and not name.startswith("modulation")
        ]

    def empty_copy(self) -> DiT:
        with torch.device("meta"):
            return type(self)(self.config)  # type: ignore  # typed by its base class

    def compile_layers(self) -> None:
        for layer in self.layers:
            layer.compiled = True


# `AutoConfig` and `AutoModel` of transformers read our directories, once this module is imported.
AutoConfig.register(BlockDiffusionConfig.model_type, BlockDiffusionConfig)
AutoModel.register(BlockDiffusionConfig, DiT)


# --- the model -------------------------------------------------------------------------------


class BlockDiffusionModel(BlockDiffusion):
    """The paper's model: a `DiT` in a `BlockDiffusion`.

    Args:
        config: sizes and conventions; the conventions are then `self.config`.
    """

    backbone: DiT

    def __init__(self, config: BlockDiffusionConfig):
        super().__init__(DiT(config), config.diffusion())

    def full_config(self) -> BlockDiffusionConfig:
        """Return sizes and conventions together, the content of config.json."""
        full = copy.deepcopy(self.backbone.config)
        for name in CONVENTIONS:
            setattr(full, name, getattr(self.config, name))
        full.dtype = str(self.dtype).removeprefix("torch.")
        full.architectures = [BlockDiffusionModel.__name__]
        return full  # type: ignore  # typed by its base class

    def save_pretrained(self, folder: str | Path) -> None:
        """Write config.json and model.safetensors into `folder`, which `load` reads."""
        self.backbone.save_pretrained(folder)
        self.full_config().save_pretrained(folder)


# --- the same without storage ----------------------------------------------------------------


def meta_model(config: BlockDiffusionConfig) -> BlockDiffusionModel:
    """Return the model of a configuration on PyTorch's device `meta`: names and shapes only."""
    with torch.device("meta"):
        return BlockDiffusionModel(config)


def count_parameters(config: BlockDiffusionConfig) -> int:
    """Return the parameters of a configuration's network, which may claim any number of layers."""
    few = copy.deepcopy(config)
    counts = []
    for few.num_hidden_layers in (1, 2):
        counts.append(sum(parameter.numel() for parameter in meta_model(few).parameters()))
    return counts[0] + (config.num_hidden_layers - 1) * (counts[1] - counts[0])
