"""Causal models of transformers, tiny and random, as backbones; one of each family."""

from __future__ import annotations

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from blockdiffusion.diffusion.config import DiffusionConfig
from blockdiffusion.models.block_diffusion import BlockDiffusion
from blockdiffusion.models.causal_lm import adapted_model
from blockdiffusion.models.llada2 import LLaDA2Config, LLaDA2MoeModelLM

SIZES = dict(
    hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, head_dim=4, max_position_embeddings=64, attention_dropout=0.0,
    bos_token_id=0, eos_token_id=1, pad_token_id=None,
)  # fmt: skip
# What each adds to Llama's grouped keys, rotary positions, RMS norms and SwiGLU.
FAMILIES: dict[str, dict] = {
    "llama": {},
    # Windows in every other layer, soft-capped scores and logits, a scale of its own, a tied head.
    "gemma2": dict(sliding_window=3, attn_logit_softcapping=2.0, query_pre_attn_scalar=9),
    # Learned positions, a matrix for queries, keys and values that is transposed, biases.
    "gpt2": dict(n_embd=16, n_layer=2, n_head=4, n_positions=64, attn_pdrop=0.0,
                 resid_pdrop=0.0, embd_pdrop=0.0),
    "mistral": dict(sliding_window=3),  # in all layers
    "qwen2": {},  # biases of queries, keys and values
    "qwen3": {},  # norms of queries and keys
    "gemma3_text": dict(sliding_window=3, query_pre_attn_scalar=9,  # two rotary bases
                        layer_types=["sliding_attention", "full_attention"]),
    "phi3": dict(sliding_window=None),  # one matrix for queries, keys and values
    "olmo2": {},  # norms behind attention and MLP
    "gpt_neox": dict(rotary_pct=0.5),  # rotates half of a head; attention beside the MLP
    "opt": dict(ffn_dim=32, word_embed_proj_dim=16),  # learned positions with an offset
    "cohere": dict(logit_scale=0.25),  # scaled logits
    "granite": dict(logits_scaling=3.0, attention_multiplier=0.3, residual_multiplier=0.7),
    "stablelm": dict(partial_rotary_factor=0.5),  # hands no keywords to its layers
    "qwen3_moe": dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16,
                      norm_topk_prob=True),
}  # fmt: skip
# Our own network, which transformers does not know.
LLADA2 = dict(
    num_experts=8, num_experts_per_tok=2, num_shared_experts=1, n_group=4, topk_group=2,
    moe_intermediate_size=16, first_k_dense_replace=1, use_qkv_bias=True, use_bias=True,
)  # fmt: skip


SCALES = {
    "phi3": 0.3,
    "stablelm": 0.3,
}  # of weights; its logits are large, and norms round to float32


def make_causal_lm(family: str, vocab_size: int = 13, **more):
    """A random model of a family in float64, with large weights."""
    if family == "llada2_moe":
        return make_llada2(vocab_size=vocab_size, **more)
    sizes = {} if family == "gpt2" else SIZES
    config = AutoConfig.for_model(
        family, vocab_size=vocab_size, **{**sizes, **FAMILIES[family], **more}
    )
    torch.manual_seed(5)
    eager = {"experts_implementation": "eager"} if "num_experts" in FAMILIES[family] else {}
    network = AutoModelForCausalLM.from_config(config, **eager)  # the other one has no float64
    return with_large_weights(network, SCALES.get(family, 0.4))


def make_llada2(**sizes) -> LLaDA2MoeModelLM:
    """A random network with large weights and biases of the choice in float64."""
    torch.manual_seed(5)
    network = with_large_weights(
        LLaDA2MoeModelLM(LLaDA2Config(**{**SIZES, **LLADA2, "vocab_size": 13, **sizes}))
    )
    generator = torch.Generator().manual_seed(11)
    for name, buffer in network.named_buffers():
        assert name.endswith("expert_bias")
        buffer.copy_(0.2 * torch.randn(buffer.shape, generator=generator))
    return network


def with_large_weights(network, scale=0.4):
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            size = 0.1 if "norm" in name else scale
            parameter.add_(size * torch.randn(parameter.shape, generator=generator))
    return network.double().eval()


def make_hugging_face(
    family: str, vocab_size: int = 13, seq_len: int = 16, block_size: int = 4, **conventions
) -> BlockDiffusion:
    """A block diffusion model around one of a family, whose last id is the mask."""
    config = DiffusionConfig(
        vocab_size=vocab_size,
        seq_len=seq_len,
        block_size=block_size,
        mask_id=conventions.pop("mask_id", vocab_size - 1),
        **{"bos": False, **conventions},
    )
    return adapted_model(make_causal_lm(family, vocab_size), config).eval()
