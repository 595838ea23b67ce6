"""A second backbone: causal models of transformers, through their attention interface."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn
from transformers import (
    AttentionInterface,
    Gemma2Config,
    Gemma2ForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
)

from blockdiffusion.diffusion.config import DiffusionConfig
from blockdiffusion.models.backbone import ALL, AttentionSizes, Outputs, Read
from blockdiffusion.models.block_diffusion import BlockDiffusion

SIZES = dict(
    hidden_size=16, intermediate_size=32, num_attention_heads=4, num_key_value_heads=2, head_dim=4,
    max_position_embeddings=64, attention_dropout=0.0, bos_token_id=0, eos_token_id=1,
)  # fmt: skip


def _attend(module, query, key, value, attention_mask, *, read: Read, **_):
    """What transformers calls for each layer; `read` came with the call of the model."""
    return read(module.layer_idx, query, key, value).transpose(1, 2), None


AttentionInterface.register("block_diffusion", _attend)


class HuggingFaceBackbone(nn.Module):
    """A causal language model as a `Backbone`."""

    def __init__(self, model):
        super().__init__()
        self.model = model
        self.config = model.config
        self.activation_checkpointing = False
        model.set_attn_implementation("block_diffusion")

    @property
    def attention(self) -> AttentionSizes:
        config = self.config
        kinds = (
            getattr(config, "layer_types", None) or ["full_attention"] * config.num_hidden_layers
        )
        windows = tuple(config.sliding_window if "sliding" in kind else None for kind in kinds)
        return AttentionSizes(
            config.num_hidden_layers,
            config.num_attention_heads,
            config.num_key_value_heads,
            config.head_dim,
            scale=self.model.base_model.layers[0].self_attn.scaling,
            softcap=getattr(config, "attn_logit_softcapping", None),
            windows=windows,
        )

    @property
    def output(self) -> nn.Linear:
        return self.model.get_output_embeddings()

    @property
    def device(self) -> torch.device:
        return self.model.device

    @property
    def dtype(self) -> torch.dtype:
        return self.model.dtype

    def forward(self, ids_BT, positions_BT, read: Read, outputs: Outputs = ALL, sigma_BT=None):
        hidden = self.model.base_model(
            input_ids=ids_BT,
            position_ids=positions_BT.expand(len(ids_BT), -1),
            use_cache=False,
            read=read,
        ).last_hidden_state
        return outputs.take(hidden)

    def head(self, hidden: torch.Tensor) -> torch.Tensor:
        logits = self.output(hidden)
        cap = getattr(self.config, "final_logit_softcapping", None)
        return logits if cap is None else cap * torch.tanh(logits / cap)

    def units(self):
        return list(self.model.base_model.layers)

    def hidden_matrices(self):
        layers = self.model.base_model.layers
        return [p for layer in layers for p in layer.parameters() if p.ndim == 2]

    def empty_copy(self):
        with torch.device("meta"):
            return HuggingFaceBackbone(type(self.model)(self.config))


def llama(vocab_size: int) -> LlamaForCausalLM:
    """Grouped keys and values, rotary positions, RMS norms, SwiGLU."""
    return LlamaForCausalLM(LlamaConfig(vocab_size=vocab_size, num_hidden_layers=2, **SIZES))


def gemma2(vocab_size: int) -> Gemma2ForCausalLM:
    """Also a window in every other layer, soft-capped scores, a scale of its own, a tied head."""
    return Gemma2ForCausalLM(
        Gemma2Config(
            vocab_size=vocab_size,
            num_hidden_layers=2,
            sliding_window=3,
            attn_logit_softcapping=2.0,
            query_pre_attn_scalar=9,
            pad_token_id=None,
            **SIZES,
        )
    )


FAMILIES: dict[str, Callable] = {"llama": llama, "gemma2": gemma2}


def make_hugging_face(
    family: str, vocab_size: int = 13, seq_len: int = 16, block_size: int = 4, **conventions
) -> BlockDiffusion:
    """A random model of a family in float64, with large weights, whose last id is the mask."""
    torch.manual_seed(5)
    network = FAMILIES[family](vocab_size)
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            scale = 0.1 if "norm" in name else 0.4
            parameter.add_(scale * torch.randn(parameter.shape, generator=generator))
    config = DiffusionConfig(
        vocab_size=vocab_size,
        seq_len=seq_len,
        block_size=block_size,
        mask_id=conventions.pop("mask_id", vocab_size - 1),
        **{"bos": False, **conventions},
    )
    return BlockDiffusion(HuggingFaceBackbone(network.double().eval()), config).eval()
