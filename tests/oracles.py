"""Slow, readable references. Written from the definitions, sharing no code with the package."""

from __future__ import annotations

import itertools
import math

import torch
import torch.nn.functional as F


def mask_by_loops(length, block_size, num_noisy, clean_attention="block"):
    """The attention mask of [noisy_1; ...; noisy_N; clean], one pair of tokens at a time."""
    total = (num_noisy + 1) * length
    mask = torch.zeros(total, total, dtype=torch.bool)
    for q in range(total):
        for k in range(total):
            q_stream, q_pos = divmod(q, length)
            k_stream, k_pos = divmod(k, length)
            q_block, k_block = q_pos // block_size, k_pos // block_size
            q_noisy, k_noisy = q_stream < num_noisy, k_stream < num_noisy
            if q_noisy and k_noisy:
                mask[q, k] = q_stream == k_stream and q_block == k_block
            elif q_noisy:
                mask[q, k] = k_block < q_block
            elif not k_noisy:
                causal = k_pos <= q_pos if clean_attention == "causal" else k_block <= q_block
                mask[q, k] = causal
    return mask


def network(model, ids, positions, mask, cond=None, remember=None, past=None):
    """Logits (T, V) of one sequence under any mask, straight from the published conventions.

    `remember` (a list) receives every layer's keys and values; `past` (such a list) puts earlier
    keys and values before this sequence's own, with `mask` (T, past + T).
    """
    net, config = model.backbone, model.backbone.config
    heads = config.num_attention_heads
    half = config.hidden_size // heads // 2
    angle = positions.double()[:, None] * 10_000.0 ** (-torch.arange(half).double() / half)
    cos, sin = angle.cos(), angle.sin()

    def norm(x, weight):
        x = (x - x.mean(-1, keepdim=True)) / (x.var(-1, unbiased=False, keepdim=True) + 1e-5).sqrt()
        return x * weight

    def rotate(x):  # (heads, T, E)
        x1, x2 = x[..., :half], x[..., half:]
        return torch.cat([x1 * cos - x2 * sin, x2 * cos + x1 * sin], dim=-1)

    def modulated(module, count):
        """Shifts, scales and gates; without adaLN they change nothing."""
        if module is None:
            zero, one = (
                torch.zeros(config.hidden_size),
                torch.ones(config.hidden_size),
            )
            return [zero, zero, one, zero, zero, one][:count]
        return (cond @ module.weight.T + module.bias).chunk(count, dim=-1)

    if cond is None and config.adaln:
        cond = condition(model, torch.zeros(len(ids), dtype=torch.float64))
    x = net.embedding.weight[ids]
    for index, layer in enumerate(net.layers):
        shift, scale, gate, mlp_shift, mlp_scale, mlp_gate = modulated(layer.modulation, 6)
        h = norm(x, layer.attn_norm.weight) * (1 + scale) + shift
        q, k, v = (h @ layer.attn_qkv.weight.T).view(len(ids), 3, heads, -1).permute(1, 2, 0, 3)
        q, k = rotate(q), rotate(k)
        if remember is not None:
            remember.append((k, v))
        if past is not None:
            k, v = torch.cat([past[index][0], k], 1), torch.cat([past[index][1], v], 1)
        scores = q @ k.transpose(1, 2) / math.sqrt(2 * half)
        read = scores.masked_fill(~mask, -math.inf).softmax(-1) @ v
        x = x + gate * (read.transpose(0, 1).flatten(1) @ layer.attn_out.weight.T)
        h = norm(x, layer.mlp_norm.weight) * (1 + mlp_scale) + mlp_shift
        h = F.gelu(h @ layer.mlp_in.weight.T + layer.mlp_in.bias, approximate="tanh")
        x = x + mlp_gate * (h @ layer.mlp_out.weight.T + layer.mlp_out.bias)
    shift, scale = modulated(net.final_modulation, 2)
    h = norm(x, net.final_norm.weight) * (1 + scale) + shift
    return h @ net.output.weight.T + net.output.bias


def condition(model, sigma):
    """Time embedding (T, C) of sigma (T,)."""
    frequency = 10_000.0 ** (-torch.arange(128).double() / 128)
    e = torch.cat([(sigma[:, None] * frequency).cos(), (sigma[:, None] * frequency).sin()], -1)
    time = model.backbone.time
    h = F.silu(e @ time.linear_in.weight.T + time.linear_in.bias)
    return F.silu(h @ time.linear_out.weight.T + time.linear_out.bias)


def subs_log_prob(logits, mask_id):
    """Log-softmax over all ids but the mask id."""
    keep = [i for i in range(logits.shape[-1]) if i != mask_id]
    out = torch.full_like(logits, -math.inf)
    out[..., keep] = logits[..., keep].log_softmax(-1)
    return out


def exact_block(log_prob_of, free):
    """(NELBO, NLL) of one block; `log_prob_of(A)` gives {l: log p(x_l | x with A masked)}.

    The NELBO sums over mask sets, the likelihood averages over all orders of revealing: no
    recursion, unlike the package.
    """
    nelbo = 0.0
    n = len(free)
    for k in range(1, n + 1):
        for subset in itertools.combinations(free, k):
            terms = log_prob_of(frozenset(subset))
            nelbo -= sum(terms.values()) / (k * math.comb(n, k))
    orders = []
    for order in itertools.permutations(free):
        total = 0.0
        for step, token in enumerate(order):
            total += log_prob_of(frozenset(order[step:]))[token]
        orders.append(total)
    likelihood = sum(math.exp(o) for o in orders) / len(orders)
    return nelbo, -math.log(likelihood)
