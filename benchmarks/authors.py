"""The authors' network, from a checkout of github.com/kuleshov-group/bd3lms, on a CPU or a GPU.

Their Hugging Face class runs as it is, but for its caches, which it would put on a CUDA device in
bfloat16, and for the type of its layers, which it fixes at float32 and their training at bfloat16.
What stands around it in their code (a Lightning module), the loss of a training step and
a step of their sampler, is put in terms of tensors here: all positions of the noisy stream get
logits, and a sampling step gives every token of the block a distribution in float64, sorts it for
the nucleus, draws all tokens and keeps one.

    git clone https://github.com/kuleshov-group/bd3lms && pip install einops
    python -m benchmarks.sampling_speed --authors bd3lms
    python -m benchmarks.training_step --authors bd3lms
    python -m benchmarks.training_gpu --authors bd3lms
"""

from __future__ import annotations

import importlib
import sys
import types
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

HIDDEN = -1e6  # their "negative infinity"


def authors_network(
    checkout: Path, block_size: int, vocab_size: int, seq_len: int, **sizes: Any
) -> Any:
    """Their network with generic weights; the paper's sizes, but for those of `sizes`.

    `sizes` are further arguments of their configuration, such as `attn_backend="flex"`.
    """
    package = types.ModuleType("authors_models")  # without their other models and what those need
    package.__path__ = [str(checkout / "models" / "hf")]
    sys.modules["authors_models"] = package
    configuration = importlib.import_module("authors_models.configuration_bd3lm")
    modeling = importlib.import_module("authors_models.modeling_bd3lm")
    torch.manual_seed(0)
    known = {"attn_backend": "sdpa", "cond_dim": 128, "var_min": False, **sizes}
    network = modeling.BD3LM(
        configuration.BD3LMConfig(
            block_size=block_size, vocab_size=vocab_size, model_length=seq_len, **known
        )
    )
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    return network


@contextmanager
def unscripted(network: Any) -> Iterator[None]:
    """Puts plain functions in the place of those that go through TorchScript."""
    modeling: Any = sys.modules[type(network).__module__]
    with patch.multiple(
        modeling,
        modulate_fused=lambda x, shift, scale: x * (1 + scale) + shift,
        bias_dropout_add_scale_fused_train=partial(modeling.bias_dropout_add_scale, training=True),
    ):
        yield


def log_probabilities(network: Any, ids: torch.Tensor, noisy: torch.Tensor, **how: Any) -> Any:
    """Their log p(x0 | xt) at the positions of `noisy`: the mask excluded, known tokens kept."""
    logits = network.backbone(ids, torch.zeros(len(ids), device=ids.device), **how)[0]
    mask_id = logits.shape[-1] - 1
    logits[:, :, mask_id] += HIDDEN
    logits = logits - torch.logsumexp(logits, dim=-1, keepdim=True)
    known = noisy != mask_id
    logits[known] = HIDDEN
    logits[known, noisy[known]] = 0
    return logits


def training_loss(network: Any, noisy: torch.Tensor, clean: torch.Tensor, weight: torch.Tensor):
    """Their loss of one batch (B, L), with given masks and weights."""
    log_p = log_probabilities(network, torch.cat([noisy, clean], dim=1), noisy)
    return -(weight * log_p.gather(-1, clean[:, :, None]).squeeze(-1)).mean()


@torch.no_grad()
def write(network: Any, block_size: int, tokens: int, top_p: float) -> int:
    """Samples by first hitting with their cache, batch 1; returns the network calls."""
    config, device = network.config, next(network.parameters()).device
    for block in network.backbone.blocks:
        shape = (1, config.model_length, 3 * config.hidden_dim)
        block.kv_cache = torch.zeros(shape, device=device)
        block.cache_idx = 0
    calls = 0
    for _ in range(tokens // block_size):
        x = torch.full((1, block_size), config.vocab_size - 1, device=device)
        for _ in range(block_size):
            p = log_probabilities(network, x, x, sample_mode=True).double().exp()
            p = _their_nucleus(p, top_p)
            noise = 1e-10 - (torch.rand_like(p) + 1e-10).log()
            drawn = (p / noise).argmax(-1)
            masked = (x[0] == config.vocab_size - 1).nonzero().flatten()
            place = masked[torch.randint(len(masked), ())]
            x[0, place] = drawn[0, place]
            calls += 1
        log_probabilities(network, x, x, sample_mode=True, store_kv=True)
        calls += 1
    return calls


def _their_nucleus(p: torch.Tensor, top_p: float) -> torch.Tensor:
    sorted_p, order = p.sort(dim=-1, descending=True)
    kept = sorted_p.cumsum(-1) <= top_p
    kept[..., 0] = True
    p = p.scatter(-1, order, sorted_p * kept)
    return p / p.sum(-1, keepdim=True)
