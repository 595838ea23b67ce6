"""The layers of Llama and its relatives with less to start, for copies that sample.

With few tokens in a pass, transformers' small operations and modules take a good part of the time.
Here queries, keys and values are one product, gate and up another, and norms
and rotations are few operations. Weights and order of the arithmetic are those of transformers.

Shape suffixes: B batch, T tokens, D width, H heads, J heads of keys and values, E head width, N
heads of queries, keys and values together.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from transformers.pytorch_utils import Conv1D

from blockdiffusion.models.backbone import AttentionSizes, Read
from blockdiffusion.models.inference import like_linear, plus

LAYER = {"self_attn", "mlp", "input_layernorm", "post_attention_layernorm"}
ATTENTION = {"q_proj", "k_proj", "v_proj", "o_proj"}
HEAD_NORMS = {"q_norm", "k_norm"}  # of Qwen 3
MLP = {"gate_proj", "up_proj", "down_proj", "act_fn"}


def fused_llama(network: Any, sizes: AttentionSizes) -> nn.Module | None:
    """Return the body of a network of transformers with fused layers; None if its modules are not
    those of Llama.

    The names of modules do not fix what they compute: the caller compares the two.
    """
    found = {name for name, _ in network.named_children()}
    if not {"embed_tokens", "layers", "norm", "rotary_emb"} <= found:
        return None
    return FusedLlama(network, sizes) if all(map(_is_llama, network.layers)) else None


def replace_conv1d(module: nn.Module) -> None:
    """Replace GPT-2's transposed linear layers by usual ones, which can be packed or rounded."""
    for name, child in module.named_children():
        if isinstance(child, Conv1D):
            setattr(module, name, like_linear(child.weight.T.contiguous(), child.bias))
        else:
            replace_conv1d(child)


class _Hidden(NamedTuple):
    last_hidden_state: torch.Tensor


class FusedLlama(nn.Module):
    """Embeddings, fused layers and the final norm, called as the body in transformers is."""

    def __init__(self, network: Any, sizes: AttentionSizes):
        super().__init__()
        self.embed_tokens, self.rotary_emb = network.embed_tokens, network.rotary_emb
        self.layers = nn.ModuleList(_Layer(layer, sizes) for layer in network.layers)
        self.norm = network.norm

    def forward(
        self, input_ids: torch.Tensor, position_ids: torch.Tensor, read: Read, use_cache: bool
    ) -> _Hidden:
        """Return the hidden states (B, T, D) after the final norm; nothing else is kept."""
        x_BTD = self.embed_tokens(input_ids)
        cos, sin = (x[:, :, None] for x in self.rotary_emb(x_BTD, position_ids=position_ids))
        # x cos + rotate(x) sin, where rotate swaps the halves of a head and negates the first.
        half = sin.shape[-1] // 2
        sin = torch.cat([-sin[..., :half], sin[..., half:]], dim=-1)
        for index, layer in enumerate(self.layers):
            x_BTD = layer(x_BTD, cos, sin, index, read)
        return _Hidden(self.norm(x_BTD))


class _Layer(nn.Module):
    def __init__(self, layer: Any, sizes: AttentionSizes):
        super().__init__()
        attention, mlp = layer.self_attn, layer.mlp
        self.heads, self.kv_heads = sizes.num_attention_heads, sizes.num_key_value_heads
        self.attn_norm, self.mlp_norm = layer.input_layernorm, layer.post_attention_layernorm
        self.attn_qkv = _stacked(attention.q_proj, attention.k_proj, attention.v_proj)
        self.attn_out, self.mlp_out = attention.o_proj, mlp.down_proj
        self.mlp_in = _stacked(mlp.gate_proj, mlp.up_proj)
        self.activation = mlp.act_fn
        self.q_norm = getattr(attention, "q_norm", None)
        self.k_norm = getattr(attention, "k_norm", None)

    def forward(
        self, x_BTD: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, index: int, read: Read
    ) -> torch.Tensor:
        heads, rotated = self.heads, self.heads + self.kv_heads
        qkv_BTNE = self.attn_qkv(_normed(self.attn_norm, x_BTD)).unflatten(
            -1, (rotated + self.kv_heads, -1)
        )
        qk_BTNE, v_BTJE = qkv_BTNE[:, :, :rotated], qkv_BTNE[:, :, rotated:]
        if self.q_norm is not None:
            q, k = qk_BTNE[:, :, :heads], qk_BTNE[:, :, heads:]
            qk_BTNE = torch.cat([_normed(self.q_norm, q), _normed(self.k_norm, k)], dim=2)
        qk_BTNE = qk_BTNE * cos + qk_BTNE.roll(qk_BTNE.shape[-1] // 2, -1) * sin
        q, k, v = (
            x.transpose(1, 2) for x in (qk_BTNE[:, :, :heads], qk_BTNE[:, :, heads:], v_BTJE)
        )
        attended_BTD = read(index, q, k, v).transpose(1, 2).flatten(2)
        x_BTD = plus(x_BTD, self.attn_out, attended_BTD)
        gate, up = self.mlp_in(_normed(self.mlp_norm, x_BTD)).chunk(2, -1)
        return plus(x_BTD, self.mlp_out, self.activation(gate) * up)


def _normed(norm: Any, x: torch.Tensor) -> torch.Tensor:
    return F.rms_norm(x, norm.weight.shape, norm.weight, norm.variance_epsilon)


def _is_llama(layer: nn.Module) -> bool:
    parts = dict(layer.named_children())
    if set(parts) != LAYER:
        return False
    attention, mlp = (dict(parts[name].named_children()) for name in ("self_attn", "mlp"))
    norms = [part for name, part in {**parts, **attention}.items() if name.endswith("norm")]
    linear = [part for name, part in {**attention, **mlp}.items() if name.endswith("proj")]
    return (
        set(attention) in (ATTENTION, ATTENTION | HEAD_NORMS)
        and set(mlp) == MLP
        and all(hasattr(norm, "variance_epsilon") for norm in norms)
        and all(type(part) is nn.Linear for part in linear)
    )


def _stacked(*layers: nn.Linear) -> nn.Linear:
    """One linear layer whose outputs are those of all."""
    bias = None
    if any(layer.bias is not None for layer in layers):
        zeros = [torch.zeros_like(layer.weight[:, 0]) for layer in layers]
        pairs = zip(layers, zeros, strict=True)
        bias = torch.cat([zero if layer.bias is None else layer.bias for layer, zero in pairs])
    return like_linear(torch.cat([layer.weight for layer in layers]), bias)
