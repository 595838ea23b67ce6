"""Published families of block diffusion models, compared with what their authors' code computes.

`expected.safetensors` of a folder holds it; its README says how it was made. Three things are
compared: logits (streams, cache, training passes), training losses, and samples.

The authors' softmax holds the mask token, which ours gives probability zero. So their loss is ours
minus log(1 - p(mask)) at every token, see `published_loss`.

Shape suffixes: B rows, L tokens of a row, T tokens of a block, V vocabulary, M masked tokens.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

import blockdiffusion
from blockdiffusion.diffusion.denoiser import masked_loss
from blockdiffusion.sampling.adaptive import TIE
from tests.conftest import GOLDEN

# Families whose files hold neither block size nor mask token: these are those of the golden data.
OPTIONS = {
    "sdar": {},
    "dllm_a2d_qwen3": dict(block_size=4, mask_id=317),
    "fast_dllm_v2": dict(mask_id=318),
    "llada2_moe": dict(block_size=4, mask_id=318),
}
CASES = ("p0", "p1", "p3", "ragged")
TOLERANCE = 1e-4


@pytest.fixture(scope="module", params=OPTIONS)
def published(request):
    """A model as published, and what its authors' code computes with it."""
    return read(request.param)


def read(family):
    model = blockdiffusion.load(GOLDEN / family, **OPTIONS[family])
    return model, load_file(GOLDEN / family / "expected.safetensors")


def unshifted(model):
    """The same network, whose output at a token is taken as the prediction of this token."""
    made = model.with_backbone(model.backbone)
    made.config = replace(model.config, reading="same")
    return made


def close(found, wanted, tolerance=TOLERANCE):
    return found.shape == wanted.shape and float((found - wanted).abs().max()) < tolerance


# --- logits


@torch.no_grad()
def test_logits_of_a_block_with_and_without_a_cache(published):
    """The first token of a Fast-dLLM block is predicted by the clean pass over the one before, and
    by no row of its own `logits`, except in a text's first block."""
    model, expected = published
    for case in CASES:
        prefix = int(expected[f"{case}.prefix_len"])
        for kind in ("all", "part"):
            ids = expected[f"{case}.{kind}.input_ids"][None]
            wanted = expected[f"{case}.{kind}.logits"].clone()
            if f"{case}.prefix_logits" in expected:
                wanted[0] = expected[f"{case}.prefix_logits"][-1]
            assert close(model.denoise_logits(ids, ids)[0, prefix:], wanted)
            cache = model.make_cache(1, 32)
            if prefix:
                model.decode(ids[:, :prefix], prefix, cache)
                cache.commit(prefix)
            assert close(model.head(model.decode(ids[:, prefix:], 0, cache))[0], wanted)


@torch.no_grad()
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("family", ["sdar", "fast_dllm_v2"])
def test_logits_of_clean_tokens(family, case):
    model, expected = read(family)
    model, ids = unshifted(model), expected[f"{case}.clean.input_ids"][None]
    name = "logits" if family == "sdar" else "raw_logits"
    wanted = expected[f"{case}.clean.{name}"]
    cache = model.make_cache(1, 32)
    assert close(model.head(model.decode(ids, ids.shape[1], cache))[0], wanted)
    if ids.shape[1] > model.config.block_size:  # else there is no clean stream
        assert close(both_streams(model, ids, ids)[0, ids.shape[1] :], wanted)


def both_streams(model, noisy_BL, clean_BL, valid_BL=None):
    """Logits (B, 2L, V) over the noisy copy and the clean stream."""
    scored_BNL = torch.ones(len(noisy_BL), 2, noisy_BL.shape[1], dtype=torch.bool)
    hidden = model.encode(noisy_BL[:, None], clean_BL, None, valid_BL, scored_BNL)
    return model.head(hidden).view(len(noisy_BL), scored_BNL[0].numel(), -1)


@torch.no_grad()
@pytest.mark.parametrize("case", CASES)
def test_raw_logits_of_fast_dllm(case):
    model, expected = read("fast_dllm_v2")
    prefix = int(expected[f"{case}.prefix_len"])
    for kind in ("all", "part"):
        ids = expected[f"{case}.{kind}.input_ids"][None]
        wanted = expected[f"{case}.{kind}.raw_logits"]
        assert close(unshifted(model).denoise_logits(ids, ids)[0, prefix:], wanted)
        if prefix:
            found = both_streams(unshifted(model), ids, ids)[0, len(ids[0]) :][:prefix]
            assert close(found, expected[f"{case}.prefix_logits"])


@torch.no_grad()
@pytest.mark.parametrize("case", CASES)
def test_logits_of_all_tokens_of_llada2(case):
    """One pass over the prefix, in whole blocks, and the block that follows it."""
    model, expected = read("llada2_moe")
    for kind in ("all", "part"):
        ids = expected[f"{case}.{kind}.input_ids"][None]
        length, prefix = ids.shape[1], int(expected[f"{case}.prefix_len"])
        if prefix:
            found = both_streams(model, ids, ids)[0]
            found = torch.cat([found[length:][:prefix], found[prefix:length]])
        else:  # there is no clean stream
            found = model.denoise_logits(ids, ids)[0]
        assert close(found, expected[f"{case}.{kind}.all_logits"])


@torch.no_grad()
def test_router_of_llada2():
    model, expected = read("llada2_moe")
    ids, seen = expected["router.input_ids"][None], []
    gate = model.backbone.model.model.layers[1].mlp.gate
    hook = gate.register_forward_hook(lambda gate, x, out: seen.append((gate.logits(*x), out)))
    both_streams(model, ids, ids)
    hook.remove()
    ((logits_PN, (chosen_PK, _)),) = seen
    length = ids.shape[1]
    assert close(logits_PN[length:], expected["router.layer0.logits"])
    for clean in (chosen_PK[length:], chosen_PK[:length]):  # all tokens are known
        assert torch.equal(clean.sort(-1).values, expected["router.layer0.experts"].sort(-1).values)


@torch.no_grad()
def test_a_prompt_padded_on_the_left():
    """A2D fills a ragged prompt with hidden tokens on its left. Its positions begin at the first
    real token, ours at the padding: rotary attention sees differences only."""
    model, expected = read("dllm_a2d_qwen3")
    ids = expected["leftpad.input_ids"][None]
    padding = ids.shape[1] - model.config.block_size - len(expected["leftpad.prompt"])
    logits = left_padded_logits(model, ids, padding)
    assert padding == 2 and close(logits[0, -4:], expected["leftpad.logits"])
    place_L = torch.arange(ids.shape[1])
    seen_LL = (place_L // 4 <= place_L[:, None] // 4) & (
        torch.minimum(place_L, place_L[:, None]) > 1
    )
    assert torch.equal(expected["leftpad.attention_mask"], seen_LL)
    assert torch.equal(expected["leftpad.position_ids"], (place_L - padding).clamp(min=0))


def left_padded_logits(model, ids_BL, padding):
    valid_BL = (torch.arange(ids_BL.shape[1]) >= padding).expand_as(ids_BL)
    return model.head(model.encode(ids_BL[:, None], ids_BL, valid_BL=valid_BL))[:, 0]


# --- training


def samples_of(family, expected, name):
    """The samples of a pass, each alone: noisy and clean ids (1, L), and logits (2L, V)."""
    concat_BT = expected[f"{name}.concat_input_ids"]
    arrays = ("logits", "all_raw_logits", "raw_logits")
    logits = next(expected[f"{name}.{a}"] for a in arrays if f"{name}.{a}" in expected)
    if family != "sdar":
        positions = expected.get(f"{name}.concat_position_ids", torch.arange(20).repeat(2)[None])
        assert (positions == torch.arange(20).repeat(2)).all()
        for ids_T, logits_TV in zip(concat_BT, logits, strict=True):
            yield (*ids_T[None].chunk(2, 1), logits_TV)
        return
    # Positions begin anew with each copy of each sample that was packed into the row.
    starts = (expected[f"{name}.concat_position_ids"] == 0).nonzero().flatten().tolist()
    for noisy, clean, end in zip(
        starts[::2], starts[1::2], [*starts[2::2], len(concat_BT)], strict=True
    ):
        noisy_L, clean_L = concat_BT[noisy:clean], concat_BT[clean:end]
        yield noisy_L[None], clean_L[None], logits[noisy:end]


def filled(ids_BL, size, value):
    """The ids with whole blocks, and which of them are real."""
    padding = -ids_BL.shape[1] % size
    valid_BL = F.pad(torch.ones_like(ids_BL, dtype=torch.bool), (0, padding))
    return F.pad(ids_BL, (0, padding), value=value), valid_BL


PASSES = [
    *(("sdar", name) for name in ("train", "train_sft", "train_packed")),
    *(
        ("dllm_a2d_qwen3", name)
        for name in ("train", "train_sft", "train_shifted", "train_uniform_batchnorm")
    ),
    *(
        (family, name)
        for family in ("fast_dllm_v2", "llada2_moe")
        for name in ("train", "train_sft")
    ),
]


@torch.no_grad()
@pytest.mark.parametrize(("family", "name"), PASSES)
def test_logits_of_a_training_pass(family, name):
    model, expected = read(family)
    model, number = unshifted(model), 0
    for noisy, clean, wanted in samples_of(family, expected, name):
        length, mask_id = clean.shape[1], model.config.mask_id
        noisy, valid = filled(noisy, 4, mask_id)
        clean, _ = filled(clean, 4, mask_id)
        found = both_streams(model, noisy, clean, valid)[0].unflatten(0, (2, -1))[:, :length]
        assert close(found.flatten(0, 1), wanted)
        number += 1
    rows = {"sdar": 1 + (name == "train_packed"), "llada2_moe": 1}
    rows["fast_dllm_v2"] = 4  # with the complements
    assert number == rows.get(family, 2)


def published_loss(model, noisy_BL, clean_BL, masked_BL, weight_BL, valid_BL=None):
    """The sum of the weighted cross-entropies as the authors compute it, from `masked_loss`."""
    scored, weight = masked_BL[:, None], weight_BL[:, None]
    ours = masked_loss(model, noisy_BL[:, None], clean_BL, scored, weight, valid_BL)
    hidden_MD = model.encode(noisy_BL[:, None], clean_BL, None, valid_BL, scored)
    mask_prob_M = model.head(hidden_MD).softmax(-1)[:, model.config.mask_id]
    assert mask_prob_M.max() < 0.1  # the golden weights make it small
    return ours - (weight[scored] * torch.log1p(-mask_prob_M)).sum()


@torch.no_grad()
@pytest.mark.parametrize("name", ["train", "train_sft", "train_packed"])
def test_the_loss_of_sdar(name):
    """Cross-entropy / p_mask, summed, per labelled token; packed samples see themselves only."""
    model, expected = read("sdar")
    masked_L, rate_M = expected[f"{name}.masked"].bool(), expected[f"{name}.p_mask_of_masked"]
    weight_L = torch.zeros(masked_L.shape).masked_scatter(masked_L, 1 / rate_M)
    total, begin, scored = 0.0, 0, []
    for noisy, clean, _ in samples_of("sdar", expected, name):
        part = slice(begin, begin + clean.shape[1])
        begin += clean.shape[1]
        assert torch.equal(clean[0], expected[f"{name}.input_ids"][part])
        scored += [masked_L[part], torch.zeros_like(masked_L[part])]
        noisy, valid = filled(noisy, 4, 319)
        clean, _ = filled(clean, 4, 319)
        masked, weight = (filled(x[None, part], 4, 0)[0] for x in (masked_L, weight_L))
        assert torch.equal(noisy == 319, masked | ~valid)
        total += published_loss(model, noisy, clean, masked, weight, valid)
    assert torch.equal(torch.cat(scored), expected[f"{name}.loss_rows_of_concat"])
    labels = int((expected[f"{name}.labels"] != -100).sum())
    assert close(total / labels, expected[f"{name}.loss"])


@torch.no_grad()
@pytest.mark.parametrize("name", ["train", "train_sft", "train_uniform_batchnorm"])
def test_the_loss_of_a2d(name):
    """Cross-entropy / t, or unweighted, summed; per labelled token, or per row."""
    model, expected = read("dllm_a2d_qwen3")
    noisy, clean = expected[f"{name}.concat_input_ids"].chunk(2, 1)
    masked, weight = expected[f"{name}.masked"].bool(), expected[f"{name}.loss_weights"]
    if name == "train_uniform_batchnorm":
        assert (weight == 1).all() and (expected[f"{name}.labels"] == clean)[masked].all()
        count = len(clean)
    else:
        assert close(weight, (1 / expected[f"{name}.t"])[:, None].expand_as(weight), 1e-2)
        count = int((expected[f"{name}.labels"] != -100).sum())
    assert torch.equal(clean, expected[f"{name}.input_ids"])
    assert torch.equal(noisy, clean.masked_fill(masked, 317))
    assert close(
        published_loss(model, noisy, clean, masked, weight) / count, expected[f"{name}.loss"]
    )


@torch.no_grad()
def test_the_shifted_loss_of_a2d():
    """An option of A2D: the logits of position i are those of row i - 1 of the noisy copy, over the
    edges of blocks too (and row 0 gives its own). The model is ours; this reading of it is not."""
    model, expected = read("dllm_a2d_qwen3")
    noisy, clean = expected["train_shifted.concat_input_ids"].chunk(2, 1)
    assert torch.equal(clean, expected["train_shifted.input_ids"])
    logits = model.denoise_logits(noisy, clean)
    shifted = torch.cat([logits[:, :1], logits[:, :-1]], 1)
    masked = expected["train_shifted.masked"].bool()
    nll_M = F.cross_entropy(shifted[masked], clean[masked], reduction="none")
    count = int((expected["train_shifted.labels"] != -100).sum())
    found = (expected["train_shifted.loss_weights"][masked] * nll_M).sum() / count
    assert close(found, expected["train_shifted.loss"])


@torch.no_grad()
@pytest.mark.parametrize("name", ["train", "train_sft"])
def test_the_loss_of_fast_dllm(name):
    """The mean cross-entropy of the next token at the noisy rows, over masks and their complements.

    So the authors train a block's first token with the noisy row before it, while their sampler
    takes the clean one. Here both take the clean one; the other tokens have the same loss.
    """
    model, expected = read("fast_dllm_v2")
    noisy, clean = expected[f"{name}.concat_input_ids"].chunk(2, 1)
    scored = expected[f"{name}.concat_labels"] != -100
    given = (expected[f"{name}.labels"] == -100).repeat(2, 1)
    assert torch.equal(scored, (noisy == 318) & ~given)
    assert torch.equal(clean, expected[f"{name}.input_ids"].repeat(2, 1))
    assert torch.equal(expected[f"{name}.raw_logits"], expected[f"{name}.all_raw_logits"][:, :20])
    assert torch.equal(scored[:2] ^ scored[2:], ~given[:2])
    scored[:, 0] = False  # no row predicts it
    logits = unshifted(model).denoise_logits(noisy, clean)[:, :-1]
    nll = F.pad(F.cross_entropy(logits.mT, clean[:, 1:], reduction="none"), (1, 0))
    assert close(nll[scored].mean(), expected[f"{name}.loss"])
    starts = scored & (torch.arange(scored.shape[1]) % 4 == 0)
    inner = scored & ~starts
    ours = published_loss(model, noisy, clean, inner, inner.float())
    assert close(ours / inner.sum(), nll[inner].mean())
    logits = expected[f"{name}.all_raw_logits"][:, clean.shape[1] : -1]
    nll = F.pad(F.cross_entropy(logits.mT, clean[:, 1:], reduction="none"), (1, 0))
    ours = published_loss(model, noisy, clean, starts, starts.float())
    assert starts.any() and close(ours / starts.sum(), nll[starts].mean())


@torch.no_grad()
@pytest.mark.parametrize("name", ["train", "train_sft"])
def test_the_loss_of_llada2(name):
    """The mean cross-entropy of the masked tokens. `loss_if_shifted`, an option of theirs that no
    published recipe sets, is that of the next tokens at the same rows."""
    model, expected = read("llada2_moe")
    noisy, clean = expected[f"{name}.concat_input_ids"].chunk(2, 1)
    labels = expected[f"{name}.labels"]
    masked = labels != -100
    assert torch.equal(noisy, clean.masked_fill(masked, 318))
    ours = published_loss(model, noisy, clean, masked, masked.float())
    assert close(ours / masked.sum(), expected[f"{name}.loss"])
    logits = model.denoise_logits(noisy, clean)[0, :-1]
    assert close(F.cross_entropy(logits, labels[0, 1:]), expected[f"{name}.loss_if_shifted"])


# --- samples


def scheduled_numbers(size, steps):
    """How many tokens each of a block's steps reveals: the first ones take what is left over."""
    return [size // steps + (step < size % steps) for step in range(steps)]


def chosen_by_rule(rule, confidence_T, is_masked_T, number, threshold, resolution):
    """Which tokens of a block a step reveals, by the published rules."""
    masked = is_masked_T.nonzero().flatten().tolist()
    if rule == "sequential":
        return masked[:number]
    steps_T = (1 - confidence_T.double()) / resolution
    ranked = sorted(masked, key=lambda place: float(steps_T[place].round()))  # keeps ties in order
    above = [place for place in masked if confidence_T[place] > threshold]
    if rule == "low_confidence_dynamic" and len(above) >= number:
        return above
    return ranked[:number]


@torch.no_grad()
def sampled_by_rule(
    model,
    prompt,
    new_blocks,
    rule,
    *,
    steps=4,
    threshold=0.85,
    filtered=False,
    padding=0,
    as_ours=False,
):
    """Greedy samples by the published rules, token by token: the reference of the tests below.

    Args:
        filtered: whether confidences are those after top_k=1, as in SDAR's own code: all 1.
        padding: hidden tokens on the left of the prompt.
        as_ours: whether the mask token has probability zero, and confidences are ranked in steps
            of `TIE`; trained networks hardly notice either, random ones do.

    Returns:
        The ids, and the number of passes.
    """
    size, mask_id = model.config.block_size, model.config.mask_id
    ids, passes = [mask_id] * padding + prompt, 0
    stop = len(ids) // size * size + size * new_blocks
    while len(ids) < stop:
        given = len(ids) % size
        row_1L = torch.tensor([ids + [mask_id] * (size - given)])
        block_T = row_1L[0, -size:]
        for number in scheduled_numbers(size, steps):
            if not (block_T == mask_id).any():
                break
            logits_TV = left_padded_logits(model, row_1L, padding)[0, -size:]
            if as_ours:
                logits_TV[:, mask_id] = -torch.inf
            prob_T, best_T = logits_TV.softmax(-1).max(-1)
            confidence_T = torch.ones(size) if filtered else prob_T
            chosen = chosen_by_rule(
                rule, confidence_T, block_T == mask_id, number, threshold, TIE if as_ours else 1e-9
            )
            block_T[chosen] = best_T[chosen]
            passes += 1
        ids = row_1L[0].tolist()
    return ids[padding:], passes


def generated(model, prompt, new_tokens, **options):
    """The same by `generate`: ids and passes, those that read the prompt left out."""
    reads = model.config.block_size <= len(prompt)
    options = dict(max_new_tokens=new_tokens, top_k=1, eos=False, bos=False) | options
    made = blockdiffusion.generate(model, [prompt], **options)
    return made.sequences[0].tolist(), int(made.nfe[0]) - reads


# The published samples: family, name, and the rule that made them. The prompt is `name`'s, or that
# of the family's first sample.
PUBLISHED = [
    ("sdar", "sample_sequential", dict(rule="sequential")),
    ("sdar", "sample_one_step_per_block", dict(rule="low_confidence_dynamic", filtered=True)),
    ("dllm_a2d_qwen3", "sample_aligned", dict(rule="low_confidence_static")),
    ("dllm_a2d_qwen3", "sample_half_steps", dict(rule="low_confidence_static", steps=2)),
]
LLADA2 = [  # threshold and number of steps
    ("sample_default", 0.95, 4),
    ("sample_threshold_03", 0.3, 4),
    ("sample_half_steps", 0.95, 2),
]
# The options of `generate` that write them.
OURS = {
    "sample_sequential": [dict(sampler="leftmost")],
    "sample_one_step_per_block": [
        dict(sampler="confidence", threshold=0.0),
        dict(sampler="leftmost", tokens_per_step=4),
    ],
    "sample_aligned": [dict(sampler="confidence", tokens_per_step=1)],
    "sample_half_steps": [dict(sampler="confidence", tokens_per_step=2)],
}


def sample_of(expected, name):
    prompt = expected.get(f"{name}.prompt", expected.get("sample_sequential.prompt"))
    return prompt.flatten().tolist(), expected[f"{name}.output_ids"].flatten().tolist()


@pytest.mark.parametrize(
    ("family", "name", "rule"), PUBLISHED, ids=[name for _, name, _ in PUBLISHED]
)
def test_published_samples_token_for_token(family, name, rule):
    model, expected = read(family)
    prompt, wanted = sample_of(expected, name)
    ids, passes = sampled_by_rule(model, prompt, -(-len(wanted) // 4) - len(prompt) // 4, **rule)
    assert ids == wanted
    for options in OURS[name]:
        new = len(wanted) - len(prompt)
        assert generated(model, prompt, new, **options) == (wanted, passes)
        assert generated(model, prompt, new, use_cache=False, **options)[0] == wanted


@pytest.mark.parametrize(("name", "threshold", "steps"), LLADA2)
def test_samples_of_llada2_token_for_token(name, threshold, steps):
    """Their code fills the last block and returns a part of it."""
    model, expected = read("llada2_moe")
    prompt, wanted = expected["sample.prompt"].tolist(), expected[f"{name}.output_ids"].tolist()
    rule = dict(threshold=threshold, steps=steps)
    ids, passes = sampled_by_rule(model, prompt, 4, "low_confidence_dynamic", **rule)
    assert ids[: len(prompt) + len(wanted)] == prompt + wanted
    options = dict(sampler="confidence", threshold=threshold, tokens_per_step=4 // steps)
    assert generated(model, prompt, len(ids) - len(prompt), **options) == (ids, passes)


def test_samples_of_llada2_at_thresholds_that_decide():
    """Most confidences of the random weights lie between 0.03 and 0.15."""
    model, expected = read("llada2_moe")
    prompt, passes_of_rules = expected["sample.prompt"].tolist(), set()
    for threshold in (0.1, 0.07, 0.05, 0.04):
        for steps in (4, 2):
            rule = dict(threshold=threshold, steps=steps, as_ours=True)
            ids, passes = sampled_by_rule(model, prompt, 4, "low_confidence_dynamic", **rule)
            options = dict(sampler="confidence", threshold=threshold, tokens_per_step=4 // steps)
            assert generated(model, prompt, len(ids) - len(prompt), **options) == (ids, passes)
            passes_of_rules.add(passes)
    assert len(passes_of_rules) > 4, passes_of_rules


def test_a2d_samples_after_a_prompt_padded_on_the_left():
    """`generate` puts a ragged prompt's end into the first block. Padding on the left, as A2D does
    it, is a matter of `encode` and its `valid_BL`."""
    model, expected = read("dllm_a2d_qwen3")
    prompt, wanted = sample_of(expected, "sample_leftpad")
    found, _ = sampled_by_rule(model, prompt, 3, "low_confidence_static", padding=2)
    assert found == wanted[2:]
    ours, _ = generated(model, prompt, 12, sampler="confidence", tokens_per_step=1)
    assert ours != found


# Greedy choice with the network's own confidences, as SGLang and lmdeploy serve these models. In
# SDAR's own code top_k=1 makes them all 1; ours measures them before any filter.
RULES = [
    ("low_confidence_static", dict(steps=4), dict(tokens_per_step=1)),
    ("low_confidence_static", dict(steps=2), dict(tokens_per_step=2)),
    *(
        (
            "low_confidence_dynamic",
            dict(steps=steps, threshold=threshold),
            dict(tokens_per_step=4 // steps, threshold=threshold),
        )
        for steps in (4, 2)
        for threshold in (0.95, 0.85, 0.1)
    ),
]


@pytest.mark.parametrize("family", ["sdar", "dllm_a2d_qwen3"])
def test_greedy_samples_by_every_published_rule(family):
    model, expected = read(family)
    name = "sample_sequential" if family == "sdar" else "sample_leftpad"
    prompt = expected[f"{name}.prompt"].flatten().tolist()
    passes_of_rules = set()
    for rule, how, options in RULES:
        wanted, passes = sampled_by_rule(model, prompt, 3, rule, as_ours=True, **how)
        found = generated(model, prompt, len(wanted) - len(prompt), sampler="confidence", **options)
        assert found == (wanted, passes)
        passes_of_rules.add(passes)
    assert len(passes_of_rules) > 3  # thresholds and numbers matter


def next_token(network, ids, forbidden):
    """The most likely token after whole blocks, by their last row."""
    cache = network.make_cache(1, len(ids))
    logits_V = network.head(network.decode(torch.tensor([ids]), len(ids), cache))[0, -1]
    logits_V[forbidden] = -torch.inf
    return int(logits_V.argmax())


@torch.no_grad()
def sampled_by_fast_dllm(model, prompt, new_blocks, threshold, sub_block, as_ours=False):
    """Greedy samples by the rule of Fast-dLLM v2; ids and passes. See `sampled_by_rule`.

    Parts of a block are filled one after another. A pass reveals all tokens of its part that are
    more certain than the threshold, and always the most certain one. The pass over a finished block
    gives the first token of the next one.
    """
    size, mask_id, network = model.config.block_size, model.config.mask_id, unshifted(model)
    forbidden, resolution = ([mask_id], TIE) if as_ours else ([], 1e-9)
    ids, passes = list(prompt), 0
    if len(ids) % size == 0:
        ids.append(next_token(network, ids, forbidden))
    for _ in range(new_blocks):
        row_1L = torch.tensor([ids + [mask_id] * (-len(ids) % size)])
        for first in range(0, size, sub_block):
            part = slice(first, first + sub_block)
            part_T = row_1L[0, -size:][part]
            while (part_T == mask_id).any():
                logits_TV = network.denoise_logits(row_1L, row_1L)[0, -size:]
                logits_TV = torch.cat([logits_TV[:1], logits_TV[:-1]])[part]
                logits_TV[:, forbidden] = -torch.inf
                prob_T, best_T = logits_TV.softmax(-1).max(-1)
                chosen = chosen_by_rule(
                    "low_confidence_dynamic", prob_T, part_T == mask_id, 1, threshold, resolution
                )
                part_T[chosen] = best_T[chosen]
                passes += 1
        ids = row_1L[0].tolist()
        ids.append(next_token(network, ids, forbidden))
        passes += 1
    return ids, passes


FAST = [("sample_block", 0.9, 4), ("sample_small_blocks", 0.9, 2), ("sample_threshold_02", 0.2, 4)]


@pytest.mark.parametrize(("name", "threshold", "sub_block"), FAST)
def test_samples_of_fast_dllm_token_for_token(name, threshold, sub_block):
    model, expected = read("fast_dllm_v2")
    prompt, wanted = expected["sample.prompt"].tolist(), expected[f"{name}.output_ids"].tolist()
    ids, passes = sampled_by_fast_dllm(model, prompt, 4, threshold, sub_block)
    assert ids == wanted
    options = dict(sampler="confidence", threshold=threshold, sub_block=sub_block)
    assert generated(model, prompt, len(wanted) - len(prompt), **options) == (wanted, passes)
    found, _ = generated(model, prompt, len(wanted) - len(prompt), use_cache=False, **options)
    assert found == wanted


@pytest.mark.parametrize("length", [11, 8, 3])
def test_greedy_samples_of_fast_dllm_at_other_thresholds_and_parts(length):
    """From prompts that end inside a block, at its edge, and in the first one. (At the edge of the
    first one their code drops the prompt.)"""
    model, expected = read("fast_dllm_v2")
    prompt = expected["sample.prompt"].tolist()[:length]
    passes_of_rules = set()
    for threshold in (0.9, 0.3, 0.05):
        for sub_block in (2, 3, 4):
            wanted, passes = sampled_by_fast_dllm(model, prompt, 2, threshold, sub_block, True)
            # Their pass over a prompt of whole blocks gives a token, too; ours only reads.
            passes += length % 4 == 0
            options = dict(sampler="confidence", threshold=threshold, sub_block=sub_block)
            found = generated(model, prompt, len(wanted) - length, **options)
            assert found == (wanted, passes)
            passes_of_rules.add(passes)
    assert len(passes_of_rules) > 2
