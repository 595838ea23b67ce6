import pytest
import torch

from blockdiffusion.checkpoints.formats import load
from blockdiffusion.diffusion.denoiser import masked_nll
from blockdiffusion.errors import UserError
from blockdiffusion.models.inference import optimize_for_inference
from blockdiffusion.models.transformer import (
    BlockDiffusionConfig,
    BlockDiffusionModel,
    Linear,
    LinearGelu,
    mlp,
)
from tests.oracles import condition, mask_by_loops, network, subs_log_prob

GOLDEN_TOLERANCE = 1e-4


def half_masked(clean, mask_id, seed=1):
    hidden = torch.rand(clean.shape, generator=torch.Generator().manual_seed(seed)) < 0.5
    return clean.masked_fill(hidden, mask_id)


# --- golden values -----------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["dense", "chunked", "flex"])
@torch.no_grad()
def test_golden_training_logits_and_loss(bd3lm, bd3lm_expected, backend):
    bd3lm.attention_backend = backend
    clean, noisy, t = (bd3lm_expected[name] for name in ("x0", "xt", "t"))
    logits = bd3lm.denoise_logits(noisy, clean)
    assert (logits - bd3lm_expected["train_logits"]).abs().max() < GOLDEN_TOLERANCE
    loss = masked_nll(bd3lm, noisy[:, None], clean, (noisy != clean)[:, None])[:, 0] / t
    assert (loss - bd3lm_expected["loss_per_token"]).abs().max() < GOLDEN_TOLERANCE


@torch.no_grad()
def test_golden_sampling_logits_with_and_without_cache(bd3lm, bd3lm_expected):
    ids = bd3lm_expected["sample_ids"]
    for key in ("sample_logits_last_block", "sample_logits_last_block_cached"):
        whole = bd3lm.decode(ids, 8, bd3lm.make_cache(3, 12))[:, 8:]  # nothing was cached
        assert (bd3lm.head(whole) - bd3lm_expected[key]).abs().max() < GOLDEN_TOLERANCE
        cache = bd3lm.make_cache(3, 12)
        bd3lm.decode(ids[:, :4], 4, cache)
        cache.commit(4)
        bd3lm.decode(ids[:, 4:8], 4, cache)
        cache.commit(4)
        cached = bd3lm.decode(ids[:, 8:], 0, cache)
        assert (bd3lm.head(cached) - bd3lm_expected[key]).abs().max() < GOLDEN_TOLERANCE


# --- the network against the oracle ------------------------------------------------------------


@pytest.mark.parametrize("backend", ["dense", "chunked", "flex"])
@pytest.mark.parametrize(("size", "copies", "clean_attention"), [
    (4, 1, "block"), (1, 2, "block"), (2, 3, "causal"), (8, 1, "block"),
])  # fmt: skip
@torch.no_grad()
def test_encode_equals_the_oracle(make_model, random_ids, size, copies, clean_attention, backend):
    model = make_model(block_size=size, clean_attention=clean_attention)
    model.attention_backend = backend
    clean = random_ids(2, 16)
    noisy = torch.stack([half_masked(clean, 12, seed=s) for s in range(copies)], dim=1)
    logits = model.head(model.encode(noisy, clean))
    mask = mask_by_loops(16, size, copies, clean_attention)
    positions = torch.arange(16).repeat(copies + 1)
    for row in range(2):
        ids = torch.cat([noisy[row].flatten(), clean[row]])
        expected = network(model, ids, positions, mask)[: copies * 16].view(copies, 16, -1)
        assert (logits[row] - expected).abs().max() < 1e-9


@torch.no_grad()
def test_time_conditioning_equals_the_oracle(make_model, random_ids):
    model, clean = make_model(time_conditioning=True), random_ids(2, 16)
    noisy = half_masked(clean, 12)
    sigma = torch.linspace(0.1, 2, 8).view(2, 4).double()
    logits = model.denoise_logits(noisy, clean, sigma)
    per_row = model.denoise_logits(noisy, clean, sigma[:, 0])
    mask, positions = mask_by_loops(16, 4, 1), torch.arange(16).repeat(2)
    for row in range(2):
        ids = torch.cat([noisy[row], clean[row]])
        for given, out in ((sigma[row].repeat_interleave(4), logits),
                           (sigma[row, 0].repeat(16), per_row)):  # fmt: skip
            cond = condition(model, torch.cat([given, torch.zeros(16).double()]))
            expected = network(model, ids, positions, mask, cond)[:16]
            assert (out[row] - expected).abs().max() < 1e-5  # frequencies are float32, as published
    with pytest.raises(UserError, match="sigma"):
        model.denoise_logits(noisy, clean)


@torch.no_grad()
def test_decode_with_time_conditioning_equals_encode(make_model, random_ids):
    model, clean = make_model(time_conditioning=True), random_ids(2, 8)
    noisy = clean.clone()
    noisy[:, 4:] = 12
    sigma = torch.tensor([0.3, 1.7], dtype=torch.float64)
    expected = model.denoise_logits(noisy, clean, sigma)[:, 4:]
    cache = model.make_cache(2, 8)
    hidden = model.decode(torch.cat([clean[:, :4], noisy[:, 4:]], 1), 4, cache, sigma_B=sigma)
    assert (model.head(hidden[:, 4:]) - expected).abs().max() < 1e-9


# --- identities --------------------------------------------------------------------------------


@torch.no_grad()
def test_blocks_of_one_token_are_the_chain_rule(make_model, random_ids):
    """S = 1, all masked: token l is read at a mask in position l after x_<l, causally."""
    model, clean = make_model(block_size=1), random_ids(1, 12)
    nll = masked_nll(
        model, torch.full((1, 1, 12), 12), clean, torch.ones(1, 1, 12, dtype=torch.bool)
    )[0, 0]
    for l in range(12):
        ids = torch.cat([clean[0, :l], torch.tensor([12])])
        causal = torch.ones(l + 1, l + 1, dtype=torch.bool).tril()
        logits = network(model, ids, torch.arange(l + 1), causal)[-1]
        assert abs(nll[l] + subs_log_prob(logits, 12)[clean[0, l]]) < 1e-9


def test_one_pass_equals_two_passes_in_loss_and_gradient(make_model, random_ids):
    """[noisy ; clean] in one pass = clean keys and values first, then all noisy blocks on them."""
    model, clean = make_model(), random_ids(1, 16)
    noisy = half_masked(clean, 12)
    masked_nll(model, noisy[:, None], clean, (noisy == 12)[:, None]).sum().backward()
    one_pass = {
        n: p.grad.clone() for n, p in model.backbone.named_parameters() if p.grad is not None
    }
    loss = masked_nll(model, noisy[:, None], clean, (noisy == 12)[:, None]).sum()

    model.zero_grad()
    mask, past = mask_by_loops(16, 4, 1), []
    network(model, clean[0], torch.arange(16), mask[16:, 16:], remember=past)
    both = torch.cat([mask[:16, 16:], mask[:16, :16]], dim=1)
    logits = network(model, noisy[0], torch.arange(16), both, past=past)
    log_prob = subs_log_prob(logits, 12)[torch.arange(16), clean[0]]
    two_pass_loss = -log_prob[noisy[0] == 12].sum()
    two_pass_loss.backward()
    assert torch.allclose(loss, two_pass_loss, atol=1e-10)
    for name, parameter in model.backbone.named_parameters():
        assert torch.allclose(one_pass[name], parameter.grad, atol=1e-9), name


@torch.no_grad()
def test_one_block_is_plain_masked_diffusion(make_model, random_ids):
    model, clean = make_model(block_size=16), random_ids(2, 16)
    noisy = half_masked(clean, 12)
    without = model.denoise_logits(noisy)
    assert torch.equal(without, model.denoise_logits(noisy, clean))
    for row in range(2):
        everything = torch.ones(16, 16, dtype=torch.bool)
        expected = network(model, noisy[row], torch.arange(16), everything)
        assert (without[row] - expected).abs().max() < 1e-9


@pytest.mark.parametrize("backend", ["dense", "chunked", "flex"])
@pytest.mark.parametrize(("size", "copies"), [(2, 1), (4, 2)])
@torch.no_grad()
def test_a_token_changes_exactly_what_the_mask_allows(
    make_model, random_ids, size, copies, backend
):
    """Each token of each stream in turn; reach = the mask composed over the layers."""
    length = 8
    model, clean = make_model(block_size=size), random_ids(1, length)
    model.attention_backend = backend
    noisy = torch.stack([half_masked(clean, 12, s) for s in range(copies)], dim=1)
    mask = mask_by_loops(length, size, copies).double()
    reach = torch.linalg.matrix_power(mask, model.backbone.config.num_hidden_layers) > 0
    before = model.encode(noisy, clean).flatten(1, 2)[0]
    for token in range((copies + 1) * length):
        ids = torch.cat([noisy.flatten(), clean.flatten()])
        ids[token] = (ids[token] + 1) % 12
        changed_noisy = ids[: copies * length].view(1, copies, length)
        after = model.encode(changed_noisy, ids[None, copies * length :]).flatten(1, 2)[0]
        changed = (before - after).abs().amax(-1) > 1e-12
        assert torch.equal(changed, reach[: copies * length, token])


@torch.no_grad()
def test_padding_changes_nothing(make_model, random_ids):
    model, clean = make_model(), random_ids(1, 16)
    noisy = half_masked(clean, 12)[:, None]
    valid = torch.arange(16)[None] < 10
    before = model.encode(noisy, clean, valid_BL=valid)
    other = clean.clone()
    other[:, 10:] = 0
    after = model.encode(torch.where(valid[:, None], noisy, 3), other, valid_BL=valid)
    assert torch.allclose(before[..., :10, :], after[..., :10, :], atol=1e-12)
    assert not torch.isnan(before).any()


# --- the autoregressive baseline ----------------------------------------------------------------


@pytest.mark.parametrize("adaln", [False, True])
@torch.no_grad()
def test_encode_causal_equals_the_oracle(make_ar, random_ids, adaln):
    model, ids = make_ar(adaln=adaln), random_ids(2, 16)
    logits = model.head(model.encode_causal(ids))
    for row in range(2):
        expected = network(model, ids[row], torch.arange(16), torch.ones(16, 16).tril() > 0)
        assert (logits[row] - expected).abs().max() < 1e-9


@torch.no_grad()
def test_a_token_changes_exactly_what_follows_it(make_ar, random_ids):
    model, ids = make_ar(), random_ids(1, 10)
    before = model.encode_causal(ids)[0]
    for token in range(10):
        other = ids.clone()
        other[0, token] = (ids[0, token] + 1) % 12
        changed = (before - model.encode_causal(other)[0]).abs().amax(-1) > 1e-12
        assert torch.equal(changed, torch.arange(10) >= token)


@torch.no_grad()
def test_padding_changes_nothing_for_the_causal_network_either(make_ar, random_ids):
    """Wherever it lies: behind, in the middle, or in front."""
    model, ids = make_ar(), random_ids(3, 8)
    valid = torch.ones(3, 8, dtype=torch.bool)
    valid[0, 5:], valid[1, 2:4], valid[2, 0] = False, False, False
    before = model.encode_causal(ids, valid)
    after = model.encode_causal(torch.where(valid, ids, 11), valid)
    assert torch.allclose(before[valid], after[valid], atol=1e-12)
    assert not torch.isnan(before).any()
    whole = model.encode_causal(ids[:1, :5])
    assert torch.allclose(before[:1, :5], whole, atol=1e-12)


@torch.no_grad()
def test_causal_steps_equal_one_pass(make_ar, random_ids):
    """Token by token and in parts of three, against all tokens at once: every logit."""
    model, ids = make_ar(), random_ids(2, 15)
    expected = model.head(model.encode_causal(ids))
    for part in (1, 3):
        cache = model.make_cache(2, 15)
        for start in range(0, 15, part):
            hidden = model.decode_causal(ids[:, start : start + part], cache)
            assert torch.allclose(model.head(hidden), expected[:, start : start + part], atol=1e-10)
            cache.commit(part)


def test_a_network_is_used_for_its_own_objective_only(make_model, make_ar, random_ids):
    clean = random_ids(1, 16)
    with pytest.raises(UserError, match="made to predict the next token, not to denoise blocks"):
        make_ar().denoise_logits(clean, clean)
    with pytest.raises(UserError, match="made to predict the next token"):
        make_ar().decode(clean, 0, make_ar().make_cache(1, 16))
    with pytest.raises(UserError, match="made to denoise blocks, not to predict the next token"):
        make_model().encode_causal(clean)
    with pytest.raises(UserError, match="made to denoise blocks"):
        make_model().decode_causal(clean, make_model().make_cache(1, 16))


# --- the PreTrainedModel -----------------------------------------------------------------------


@torch.no_grad()
def test_save_and_load_give_identical_logits(make_model, random_ids, tmp_path):
    model, clean = make_model(), random_ids(2, 16)
    noisy = half_masked(clean, 12)
    expected = model.denoise_logits(noisy, clean)
    model.save_pretrained(tmp_path)
    again = load(tmp_path, dtype=torch.float64).eval()
    assert torch.equal(again.denoise_logits(noisy, clean), expected)


def test_a_new_model_starts_at_the_uniform_distribution(random_ids):
    """Modulations and the output layer start at zero, as in the paper."""
    model = BlockDiffusionModel(
        BlockDiffusionConfig(vocab_size=13, hidden_size=24, num_hidden_layers=2)
    ).eval()
    clean = random_ids(2, 16)
    nll = masked_nll(
        model, torch.full((2, 1, 16), 12), clean, torch.ones(2, 1, 16, dtype=torch.bool)
    )
    assert torch.allclose(nll, torch.log(torch.tensor(12.0)), atol=1e-6)


def test_dropout_is_active_in_training_only(make_model, random_ids):
    model, clean = make_model(dropout=0.5), random_ids(1, 16)
    with torch.no_grad():
        assert torch.equal(model.denoise_logits(clean, clean), model.denoise_logits(clean, clean))
        model.train()
        assert not torch.equal(
            model.denoise_logits(clean, clean), model.denoise_logits(clean, clean)
        )


def test_rotary_angles_stay_exact_far_out():
    from blockdiffusion.models.transformer import rotary_tables

    cos = rotary_tables(torch.tensor([100_000]), 64, torch.float64).cos[:, 0, :32]
    j = torch.arange(32, dtype=torch.float64)
    exact = torch.cos(100_000 * 10_000 ** (-j / 32))
    assert (cos[0] - exact).abs().max() < 1e-9


@pytest.mark.parametrize(("overrides", "message"), [
    (dict(seq_len=10, block_size=4), "multiple of the block size"),
    (dict(mask_id=13), "outside the vocabulary"),
    (dict(hidden_size=18, num_attention_heads=2), "multiple of 2"),
    (dict(clean_attention="full"), "block or causal"),
    (dict(num_hidden_layers=0), "num_hidden_layers"),
    (dict(adaln=False, time_conditioning=True), "adaln"),
    (dict(dropout=1.0), r"dropout is 1.0; it must be in \[0, 1\)"),
    (dict(objective="ar"), "choose block_diffusion or score_entropy or d3pm or"),
    (dict(objective="autoregressive", block_size=4), "block_size 1"),
    (dict(objective="d3pm"), "timesteps is None; a d3pm network needs"),
    (dict(objective="d3pm", timesteps=3, transition="gauss"), "absorbing or uniform"),
    (dict(noise_schedule="cosin"), "unknown schedule"),
    (dict(objective="score_entropy", noise_eps=1), r"lie in \[0, 1\)"),
    (dict(noise_eps=1e-3), "which only score_entropy and d3pm networks have"),
])  # fmt: skip
def test_impossible_configurations_are_refused(overrides, message):
    with pytest.raises(UserError, match=message):
        BlockDiffusionConfig(
            **{**dict(vocab_size=13, hidden_size=16, num_attention_heads=2), **overrides}
        )


def test_sequences_that_do_not_fit_are_refused(make_model, random_ids):
    model = make_model()
    with pytest.raises(UserError, match="not a multiple"):
        model.denoise_logits(random_ids(1, 10), random_ids(1, 10))
    with pytest.raises(UserError, match="clean_ids are needed"):
        model.denoise_logits(random_ids(1, 8))


@pytest.mark.parametrize("short", [False, True], ids=["float64", "autocast"])
def test_the_mlp_has_its_gradients_though_it_keeps_less(short):
    """Against autograd's own; the GELU's output is not kept."""
    torch.manual_seed(0)
    dtype = torch.float32 if short else torch.float64
    inner, outer = LinearGelu(8, 32).to(dtype), Linear(32, 8).to(dtype)
    x = torch.randn(2, 20, 8, dtype=dtype, requires_grad=True)  # few rows go another way
    inputs, kept = [x, *inner.parameters(), *outer.parameters()], []
    with (
        torch.autocast("cpu", torch.bfloat16, enabled=short),
        torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.shape) or t, lambda t: t),
    ):
        found = mlp(x, inner, outer)
    assert sum(shape[-1:] == (32,) and len(shape) == 3 for shape in kept) == 1
    with torch.autocast("cpu", torch.bfloat16, enabled=short):
        expected = outer(inner(x))
    assert torch.equal(found, expected)
    weight = torch.randn(expected.shape).to(expected.dtype)
    for one, other in zip(
        torch.autograd.grad(found, inputs, weight),
        torch.autograd.grad(expected, inputs, weight),
        strict=True,
    ):
        assert one.dtype == other.dtype
        torch.testing.assert_close(one, other, rtol=0.02 if short else 1e-12, atol=0.02 * short)


def test_copies_of_networks_that_read_the_time_score_with_gradients_enabled(make_model, random_ids):
    """Their layers are packed, and no gradient goes through them."""
    copy = optimize_for_inference(make_model(time_conditioning=True).float())
    ids = random_ids(1, 16)
    with torch.enable_grad():
        logits = copy.denoise_logits(ids, ids, torch.ones(1))
    assert logits.isfinite().all()
