"""LLaDA2's network against one written token by token, and its choice of experts.

What the published code computes is compared in `tests/checkpoints/test_published_families.py`.
"""

from __future__ import annotations

import math

import pytest
import torch

from blockdiffusion.diffusion.config import DiffusionConfig
from blockdiffusion.diffusion.denoiser import masked_loss
from blockdiffusion.models.block_diffusion import BlockDiffusion
from blockdiffusion.models.causal_lm import adapted_model
from blockdiffusion.models.inference import can_be_recorded, optimize_for_inference
from blockdiffusion.models.llada2 import Experts, LLaDA2Config
from tests.models.hugging_face import (
    LLADA2,
    SIZES,
    make_hugging_face,
    make_llada2,
    with_large_weights,
)
from tests.oracles import mask_by_loops

# --- the oracle: lists of tokens, loops over heads, positions and experts


def normed(x, weight, eps):
    return x / (x.square().mean() + eps).sqrt() * weight


def linear(x, tensors, name):
    y = tensors[f"{name}.weight"] @ x
    return y + tensors[f"{name}.bias"] if f"{name}.bias" in tensors else y


def swiglu(x, tensors, name):
    gate = linear(x, tensors, f"{name}.gate_proj")
    return linear(
        gate * gate.sigmoid() * linear(x, tensors, f"{name}.up_proj"), tensors, f"{name}.down_proj"
    )


def chosen_experts(scores, biases, config):
    """Experts of one token, by sorting lists."""
    size = config.num_experts // config.n_group
    preferences = [score + bias for score, bias in zip(scores, biases, strict=True)]
    groups = [preferences[first : first + size] for first in range(0, config.num_experts, size)]
    values = [sum(sorted(group)[-2:]) for group in groups]
    best = sorted(range(config.n_group), key=lambda group: values[group])[-config.topk_group :]
    open_ = [expert for expert in range(config.num_experts) if expert // size in best]
    return sorted(open_, key=lambda expert: preferences[expert])[-config.num_experts_per_tok :]


def mixture(x, tensors, name, config):
    scores = (tensors[f"{name}.gate.weight"] @ x).sigmoid()
    biases = tensors[f"{name}.gate.expert_bias"].tolist()
    chosen = chosen_experts(scores.tolist(), biases, config)
    total = sum(scores[expert] for expert in chosen) if len(chosen) > 1 else 1.0
    y = 0
    for expert in chosen:
        share = config.routed_scaling_factor * scores[expert] / total
        y = y + share * swiglu(x, tensors, f"{name}.experts.{expert}")
    if config.num_shared_experts:
        y = y + swiglu(x, tensors, f"{name}.shared_experts")
    return y


def rotated(head, position, config):
    """Turn the pairs (r, r + R/2) of the first R elements."""
    half = config.rotary_dim // 2
    turned = head.clone()
    for r in range(half):
        angle = position / config.rope_theta ** (2 * r / config.rotary_dim)
        cos, sin = math.cos(angle), math.sin(angle)
        turned[r] = head[r] * cos - head[r + half] * sin
        turned[r + half] = head[r + half] * cos + head[r] * sin
    return turned


def attention(xs, positions, mask, tensors, name, config):
    width, shared = config.head_dim, config.num_attention_heads // config.num_key_value_heads
    heads, keys = config.num_attention_heads, config.num_key_value_heads
    parts = [linear(x, tensors, f"{name}.query_key_value").view(-1, width) for x in xs]

    def head(token, number, norm):
        found = parts[token][number]
        if config.use_qk_norm:
            weight = tensors[f"{name}.{norm}_layernorm.weight"]
            found = normed(found, weight, config.rms_norm_eps)
        return rotated(found, positions[token], config)

    out = []
    for token in range(len(xs)):
        seen = [other for other in range(len(xs)) if mask[token, other]]
        pieces = []
        for number in range(heads):
            group, query = number // shared, head(token, number, "query")
            scores = [query @ head(other, heads + group, "key") / width**0.5 for other in seen]
            weights = torch.stack(scores).softmax(0)
            values = torch.stack([parts[other][heads + keys + group] for other in seen])
            pieces.append(weights @ values)
        out.append(linear(torch.cat(pieces), tensors, f"{name}.dense"))
    return out


def oracle_logits(network, ids, positions, mask):
    """Logits (T, V) of tokens under any mask."""
    config, tensors = network.config, network.state_dict()
    xs = [tensors["model.word_embeddings.weight"][token] for token in ids]

    def norm(x, name):
        return normed(x, tensors[f"model.{name}.weight"], config.rms_norm_eps)

    for number in range(config.num_hidden_layers):
        name = f"layers.{number}"
        inputs = [norm(x, f"{name}.input_layernorm") for x in xs]
        out = attention(inputs, positions, mask, tensors, f"model.{name}.attention", config)
        xs = [x + y for x, y in zip(xs, out, strict=True)]
        inputs = [norm(x, f"{name}.post_attention_layernorm") for x in xs]
        for token, x in enumerate(inputs):
            if number < config.first_k_dense_replace:
                xs[token] = xs[token] + swiglu(x, tensors, f"model.{name}.mlp")
            else:
                xs[token] = xs[token] + mixture(x, tensors, f"model.{name}.mlp", config)
    return torch.stack([tensors["lm_head.weight"] @ norm(x, "norm") for x in xs])


# --- the network

KINDS = {
    "usual": {},
    "other sizes": dict(
        hidden_size=20, num_hidden_layers=3, num_attention_heads=6, num_key_value_heads=3,
        head_dim=8, partial_rotary_factor=0.75, num_experts=12, n_group=3, topk_group=2,
        num_experts_per_tok=5, num_shared_experts=2, routed_scaling_factor=0.7,
        rope_theta=100.0, rms_norm_eps=1e-3, first_k_dense_replace=2,
    ),
    "tied, no norms of heads, no biases": dict(
        tie_word_embeddings=True, use_qk_norm=False, use_qkv_bias=False, use_bias=False,
        partial_rotary_factor=1.0,
    ),
    "one group, one expert of a token, none shared, no dense layer": dict(
        n_group=1, topk_group=1, num_experts_per_tok=1, num_shared_experts=0,
        first_k_dense_replace=0,
    ),
    "dense layers only": dict(first_k_dense_replace=9),
}  # fmt: skip


def block_diffusion(network, block_size=4, **conventions):
    config = DiffusionConfig(
        vocab_size=13, seq_len=16, block_size=block_size, mask_id=12, bos=False, **conventions
    )
    return adapted_model(network, config).eval()


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
def test_streams_and_cache_are_those_of_the_oracle(kind, random_ids):
    network = make_llada2(**KINDS[kind])
    clean = random_ids(1, 8)
    noisy = clean.clone()
    noisy[0, [1, 2, 4, 7]] = 12
    positions, mask = torch.arange(8).repeat(2), mask_by_loops(8, 4, 1)
    expected = oracle_logits(network, torch.cat([noisy, clean], 1)[0], positions.tolist(), mask)
    model = block_diffusion(network)
    assert (model.denoise_logits(noisy, clean)[0] - expected[:8]).abs().max() < 1e-10
    fast = optimize_for_inference(model)
    assert (fast.denoise_logits(noisy, clean)[0] - expected[:8]).abs().max() < 1e-10
    cache = model.make_cache(1, 8)
    first = model.head(model.decode(clean[:, :4], 4, cache))[0]
    assert (first - expected[8:12]).abs().max() < 1e-10
    cache.commit(4)
    second = model.head(model.decode(noisy[:, 4:], 0, cache))[0]
    assert (second - expected[4:8]).abs().max() < 1e-10


def test_every_kind_has_its_own_tensors():
    """The kinds above differ in what they switch on."""
    names = {kind: set(make_llada2(**sizes).state_dict()) for kind, sizes in KINDS.items()}
    assert len({frozenset(found) for found in names.values()}) == len(KINDS)
    tied = make_llada2(**KINDS["tied, no norms of heads, no biases"])
    assert tied.lm_head.weight is tied.model.word_embeddings.weight


# --- the experts


def make_experts(**sizes):
    config = LLaDA2Config(**{**SIZES, **LLADA2, **sizes})
    experts = with_large_weights(Experts(config))
    generator = torch.Generator().manual_seed(11)
    experts.gate.expert_bias.copy_(torch.randn(config.num_experts, generator=generator))
    return experts


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize(
    "sizes",
    [{}, dict(n_group=2, topk_group=1, num_experts_per_tok=4), dict(num_experts=32, n_group=8)],
)
def test_experts_over_all_tokens_and_token_by_token(sizes, training):
    """Values, and gradients of inputs and weights; an expert that nobody chose has none, or 0."""
    experts = make_experts(**sizes).train(training)
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(2, 9, 16, generator=generator, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(x.shape, generator=generator, dtype=torch.float64)
    tensors = {f"e.{name}": tensor for name, tensor in experts.named_parameters()}
    tensors |= {f"e.{name}": tensor for name, tensor in experts.named_buffers()}
    rows = [mixture(token, tensors, "e", experts.gate.config) for token in x.flatten(0, 1)]
    expected, found = torch.stack(rows).view_as(x), experts(x)
    assert (found - expected).abs().max() < 1e-12
    inputs = [x, *experts.parameters()]
    options = dict(allow_unused=True, materialize_grads=True)
    one = torch.autograd.grad((found * weight).sum(), inputs, **options)
    two = torch.autograd.grad((expected * weight).sum(), inputs, **options)
    for a, b in zip(one, two, strict=True):
        assert (a - b).abs().max() < 1e-10


def test_the_bias_changes_the_choice_and_not_the_weights():
    experts = make_experts(n_group=1, topk_group=1)
    x = torch.randn(5, 16, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    gate = experts.gate
    gate.expert_bias.copy_(torch.tensor([9.0, 9, 0, 0, 0, 0, 0, 0]))
    chosen, weight = gate(x)
    assert (chosen.sort().values == torch.tensor([0, 1])).all()
    scores = gate.logits(x).sigmoid().gather(1, chosen)
    assert torch.allclose(weight, 2.5 * scores / scores.sum(1, keepdim=True))


def test_in_training_every_expert_has_a_gradient(random_ids):
    """Otherwise distributed training would wait for those that nobody chose."""
    network = make_llada2(num_experts=64, n_group=4)
    model = block_diffusion(network).train()
    ids = random_ids(1, 4)
    scored = torch.ones(1, 1, 4, dtype=torch.bool)
    masked_loss(model, torch.full_like(ids, 12)[:, None], ids, scored, scored.double()).backward()
    gradients = [parameter.grad for parameter in network.parameters()]
    assert all(gradient is not None for gradient in gradients)
    assert sum(bool((gradient == 0).all()) for gradient in gradients) > 3 * 32


@torch.no_grad()
def test_in_16_bits_scores_are_computed_in_32():
    network = make_llada2().bfloat16()
    gate = network.model.layers[1].mlp.gate
    x = torch.randn(7, 16, generator=torch.Generator().manual_seed(3)).bfloat16()
    assert gate.logits(x).dtype == torch.float32
    assert torch.allclose(gate.logits(x), x.float() @ gate.weight.float().T)
    ids = torch.arange(8)[None]
    logits = block_diffusion(network).denoise_logits(ids, ids)
    assert logits.dtype == torch.float32 and logits.isfinite().all()


def test_passes_of_a_mixture_are_not_recorded():
    """A CUDA graph cannot wait for the numbers of tokens that chose each expert."""
    assert not can_be_recorded(block_diffusion(make_llada2()).backbone)
    assert can_be_recorded(make_hugging_face("llama").backbone)


def test_layers_without_mixtures_are_compiled():
    backbone = block_diffusion(make_llada2()).backbone
    backbone.compile_layers()
    dense, mixed = backbone.units()
    assert dense.mlp._compiled_call_impl is not None and mixed.mlp._compiled_call_impl is None
    assert mixed.input_layernorm._compiled_call_impl is not None


def test_the_wrapper_does_not_compare_ways_that_rounding_parts():
    """Scores that differ by little more than rounding: streams and cache choose other experts."""
    network = make_llada2(num_experts=64, hidden_size=32, num_hidden_layers=6).bfloat16()
    with torch.no_grad():
        for layer in network.model.layers[1:]:
            layer.mlp.gate.weight.mul_(3e-7)
            layer.mlp.gate.expert_bias.zero_()
    assert isinstance(block_diffusion(network), BlockDiffusion)
