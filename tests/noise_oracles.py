"""Slow references for SEDD and D3PM: matrices and enumeration, straight from the papers.

One block of S tokens after a clean past; the states of a block are all tuples of ids. Networks are
asked through `denoise_logits`, which has an oracle of its own.
"""

from __future__ import annotations

import itertools
import math

import numpy as np
import torch

SIGMA_MAX = math.log(1000)


def sigma_of(p):
    """What the network reads, for a number or a tensor."""
    return (-torch.log1p(-torch.as_tensor(p, dtype=torch.float64))).clamp(max=SIGMA_MAX)


def log_score(
    logits_MV: torch.Tensor, noisy_M: torch.Tensor, sigma_M: torch.Tensor
) -> torch.Tensor:
    """log s_y (M, V), the estimated ratios q(y) / q(x_t) of M noisy tokens at noise sigma.

    SEDD with absorbing noise (Lou et al. 2024, section 3), as the authors of the paper scale
    it: logits - log(e^sigma - 1) - log(V - 1), and 0 at the noisy token itself.
    """
    scale_M = torch.expm1(sigma_M).log() + math.log(logits_MV.shape[-1] - 1)
    return (logits_MV - scale_M[:, None]).scatter(-1, noisy_M[:, None], 0.0)


def block_states(model, data_only):
    """Every content of a block, (states, S)."""
    ids = range(model.config.vocab_size)
    ids = [i for i in ids if not (data_only and i == model.config.mask_id)]
    return torch.tensor(list(itertools.product(ids, repeat=model.config.block_size)))


@torch.no_grad()
def logits_of(model, past, states, p):
    """Logits (states, S, V) of the block after `past`, corrupted with probability p (one for all
    states, or each its own)."""
    size, before = model.config.block_size, len(past)
    rows = torch.cat([torch.tensor(past, dtype=torch.long).expand(len(states), -1), states], dim=1)
    sigma = sigma_of(p).expand(len(states))
    return model.denoise_logits(rows, rows, sigma).double()[:, before : before + size]


def denoised(model, logits):
    """p(x_0 | x_t) over all ids, 0 for the mask."""
    keep = [i for i in range(logits.shape[-1]) if i != model.config.mask_id]
    probs = torch.zeros_like(logits)
    probs[..., keep] = logits[..., keep].softmax(-1)
    return probs


# --- D3PM ---------------------------------------------------------------------------------------


def step_matrices(model, transition, probs):
    """Q_t (V, V), rows from and columns to, for the cumulative jump probabilities p_1 .. p_T."""
    size, mask_id = model.config.vocab_size, model.config.mask_id
    away = torch.zeros(size, size, dtype=torch.float64)
    if transition == "absorbing":
        away[:, mask_id] = 1
    else:
        away[:] = 1 / (size - 1)
        away[:, mask_id] = 0
    matrices, before = [], 0.0
    for p in probs:
        keep = (1 - p) / (1 - before)
        matrices.append(keep * torch.eye(size, dtype=torch.float64) + (1 - keep) * away)
        before = p
    return matrices


def product(matrices, size=4):
    """Q_1 ... Q_t; the identity where there is none."""
    out = torch.eye(size, dtype=torch.float64)
    for matrix in matrices:
        out = out @ matrix
    return out


def posterior(from_zero, step, probs_0, x_t):
    """Austin et al., equation 4: sum over x_0 of q(x_{t-1}, x_t | x_0) p(x_0), normalised."""
    joint = (probs_0 @ from_zero) * step[:, x_t]
    return joint / joint.sum()


def divergence(from_zero, step, guess, x_0, x_t):
    """KL(q(x_{t-1} | x_t, x_0) || p(x_{t-1} | x_t)); at t = 1 -log p(x_0 | x_1)."""
    true = posterior(from_zero, step, torch.eye(len(guess), dtype=torch.float64)[x_0], x_t)
    ours = posterior(from_zero, step, guess, x_t)
    some = true > 0
    return float((true[some] * (true[some] / ours[some]).log()).sum())


def d3pm_kl(model, transition, probs, step, logits, x_0, x_t):
    """The term of time step + 1 for one token."""
    matrices = step_matrices(model, transition, probs)
    from_zero = product(matrices[:step], model.config.vocab_size)
    return divergence(from_zero, matrices[step], denoised(model, logits), x_0, x_t)


def d3pm_bound(model, clean, transition, probs):
    """The bound of one row in nats (equation 1), every x_t of every block at every t enumerated."""
    size, vocab = model.config.block_size, model.config.vocab_size
    matrices = step_matrices(model, transition, probs)
    states = block_states(model, data_only=transition == "uniform")
    total = 0.0
    for start in range(0, len(clean), size):
        past, target = clean[:start], clean[start : start + size]
        from_zero = torch.eye(vocab, dtype=torch.float64)  # Q_1 ... Q_{t-1}
        for p, step in zip(probs, matrices, strict=True):
            to_now = from_zero @ step
            clean_probs = denoised(model, logits_of(model, past, states, p))
            for state, probs_0 in zip(states.tolist(), clean_probs, strict=True):
                chance = math.prod(float(to_now[x, y]) for x, y in zip(target, state, strict=True))
                if chance == 0:
                    continue
                for x, y, guess in zip(target, state, probs_0, strict=True):
                    total += chance * divergence(from_zero, step, guess, x, y)
            from_zero = to_now
    return total


def d3pm_step(model, transition, probs, step):
    """p(x_{t-1} | x_t) of single tokens, as a function for `chain_law`: x_t and guess -> (V,)."""
    matrices = step_matrices(model, transition, probs)
    from_zero = product(matrices[:step], model.config.vocab_size)
    return lambda logits, x_t: posterior(from_zero, matrices[step], denoised(model, logits), x_t)


# --- SEDD ---------------------------------------------------------------------------------------


def scores(logits, x_t, sigma):
    """s (..., V) at a position that holds x_t, as the authors scale it; sigma (...,)."""
    scale = sigma.expm1().log() + math.log(logits.shape[-1] - 1)
    out = (logits - scale[..., None]).exp()
    out[..., x_t] = 1
    return out


def sedd_bound(model, clean, low=0.0):
    """The integral of the score entropy over p in [low, 1] of one row, all mask sets enumerated.

    Quadrature in sigma below 6.9, where the network's input is cut, and in p above.
    """
    nodes, weights = (torch.from_numpy(x) for x in np.polynomial.legendre.leggauss(48))
    first = -math.log1p(-low)
    sigma = first + (SIGMA_MAX - first) * (nodes + 1) / 2
    p = torch.cat([-torch.expm1(-sigma), 1 - 1e-3 * (1 - nodes) / 2])
    weight = torch.cat([(SIGMA_MAX - first) / 2 * (-sigma).exp() * weights, 1e-3 / 2 * weights])
    ratio = 1 / sigma_of(p).expm1()
    size, mask_id = model.config.block_size, model.config.mask_id
    total = 0.0
    for start in range(0, len(clean), size):
        past, target = clean[:start], clean[start : start + size]
        for masked in itertools.product([False, True], repeat=size):
            state = [mask_id if m else x for m, x in zip(masked, target, strict=True)]
            logits = logits_of(model, past, torch.tensor(state).expand(len(p), -1), p)
            chance = torch.stack([p if m else 1 - p for m in masked]).prod(0)
            for place, (m, x) in enumerate(zip(masked, target, strict=True)):
                if m:
                    s = scores(logits[:, place], mask_id, sigma_of(p))
                    entropy = s.sum(-1) - 1 - ratio * s[:, x].log() + ratio * (ratio.log() - 1)
                    total += float((weight * chance * entropy / ratio / p).sum())
    return total


def sedd_step(p_now, p_then, mask_id=3):
    """The authors' analytic step for single tokens: the staggered score times the transition."""
    now, then = (
        -torch.tensor(1 - min(p, 1 - 1e-13), dtype=torch.float64).log() for p in (p_now, p_then)
    )

    def step(logits, x_t):
        s = scores(logits, x_t, now)
        staggered = s * (now - then).exp()
        staggered[mask_id] += (1 - (now - then).exp()) * s.sum()
        move = torch.zeros_like(s)
        move[x_t] += (then - now).exp()
        if x_t == mask_id:
            move += 1 - (then - now).exp()
        probs = (staggered * move).clamp_min(0)
        if p_then == 0:
            probs[mask_id] = 0
        return probs / probs.sum()

    return step


# --- the law of a chain -------------------------------------------------------------------------


def chain_law(model, steps, uniform, num_blocks=2):
    """Probability of every sequence of `num_blocks` blocks under a reverse chain: dict of tuples.

    Args:
        steps: (p_t, function (logits, x_t) -> probabilities of x_s), from the last time down.
        uniform: begin with uniform tokens instead of masks.
    """
    texts = {(): 1.0}
    for _ in range(num_blocks):
        longer = {}
        for past, chance in texts.items():
            for block, probability in _block_law(model, past, steps, uniform).items():
                longer[past + block] = chance * probability
        texts = longer
    return texts


def _block_law(model, past, steps, uniform):
    size, mask_id = model.config.block_size, model.config.mask_id
    states = block_states(model, data_only=uniform)
    keys = [tuple(s) for s in states.tolist()]
    law = {k: 1 / len(keys) if uniform else float(all(i == mask_id for i in k)) for k in keys}
    for p, step in steps:
        after = dict.fromkeys(keys, 0.0)
        logits = logits_of(model, list(past), states, p)
        for key, at in zip(keys, logits, strict=True):
            if law[key] == 0:
                continue
            each = torch.stack([step(at[i], key[i]) for i in range(size)])
            chances = each.gather(1, states.T).prod(0)  # of every next state
            for other, chance in zip(keys, chances.tolist(), strict=True):
                after[other] += law[key] * chance
        law = after
    return {k: v for k, v in law.items() if mask_id not in k}


def random_order_law(model):
    """Probability of every row of L tokens (dict of tuples): those of a block are drawn one after
    the other in a random order, each given the past and those before it.

    For a network that reads no time this is the law of the continuous-time reverse process.
    """
    config = model.config
    states = block_states(model, data_only=False)
    keys, texts = [tuple(s) for s in states.tolist()], {(): 1.0}
    for _ in range(config.seq_len // config.block_size):
        longer = {}
        for past, chance in texts.items():
            guesses = denoised(model, logits_of(model, list(past), states, 1.0)).tolist()
            law = dict.fromkeys(keys, 0.0) | {(config.mask_id,) * config.block_size: chance}
            for _ in range(config.block_size):
                after = dict.fromkeys(keys, 0.0)
                for key, guess in zip(keys, guesses, strict=True):
                    hidden = [i for i, token in enumerate(key) if token == config.mask_id]
                    for i in hidden if law[key] > 0 else ():
                        for token, prob in enumerate(guess[i]):
                            new = (*key[:i], token, *key[i + 1 :])
                            after[new] += law[key] * prob / len(hidden)
                law = after
            longer |= {(*past, *k): p for k, p in law.items() if config.mask_id not in k}
        texts = longer
    return texts


def first_hitting_law(model, num_blocks=2, points=300):
    """The law of the continuous-time reverse process of masks, for blocks of two tokens.

    The mask probabilities at which the two tokens appear are uniform and independent; the first
    one to appear has the larger. Midpoint rule over both.
    """
    mask_id = model.config.mask_id
    p = (torch.arange(points, dtype=torch.float64) + 0.5) / points
    ids = [i for i in range(model.config.vocab_size) if i != mask_id]

    def guesses(past, state):
        logits = logits_of(model, past, torch.tensor(state).expand(points, -1), p)
        return denoised(model, logits)

    texts = {(): 1.0}
    for _ in range(num_blocks):
        longer = {}
        for past, chance in texts.items():
            empty = guesses(list(past), [mask_id, mask_id])
            after_0 = {x: guesses(list(past), [x, mask_id])[:, 1] for x in ids}
            after_1 = {y: guesses(list(past), [mask_id, y])[:, 0] for y in ids}
            for x, y in itertools.product(ids, repeat=2):
                total = 0.0
                for first, second in (
                    (empty[:, 0, x], after_0[x][:, y]),
                    (empty[:, 1, y], after_1[y][:, x]),
                ):
                    below = (second.cumsum(0) - second / 2) / points
                    total += float((first * below).mean())
                longer[(*past, x, y)] = chance * total
        texts = longer
    return texts
