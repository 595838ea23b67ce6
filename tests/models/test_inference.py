"""The copy for sampling is the same function; in 8 bits nearly."""

import copy

import pytest
import torch
from torch import nn

import blockdiffusion
from blockdiffusion.errors import UserError
from blockdiffusion.models.inference import (
    FoldedLayer,
    Int8Linear,
    PackedLinear,
    optimize_for_inference,
)
from blockdiffusion.models.transformer import Linear, LinearGelu
from tests.conftest import GOLDEN
from tests.models.hugging_face import FAMILIES, make_hugging_face

# The types whose products oneDNN has here.
HAS_BF16 = torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()
PACKED = [torch.float32] * torch.backends.mkldnn.is_available() + [torch.bfloat16] * HAS_BF16
KINDS = {
    "block": {},
    "causal past": dict(clean_attention="causal"),
    "no modulation": dict(adaln=False),
    "timed": dict(time_conditioning=True),
}


def outputs(model, ids):
    """Logits in every way in which a copy is used: a whole row, against the cache, ragged."""
    noisy = ids.clone()
    noisy[:, ::3] = model.config.mask_id
    timed = model.config.time_conditioning
    sigma = torch.tensor([0.3, 1.0]) if timed else None
    with torch.no_grad():
        whole = model.denoise_logits(noisy, ids, sigma)
        cache = model.make_cache(2, 16)
        model.decode(ids[:, :4], 4, cache)
        cache.commit(4)
        cached = model.head(model.decode(noisy[:, 4:8], 0, cache, None, sigma))
        flat = torch.cat([ids[0, 4:8], noisy[0, 8:12], noisy[1, 4:8]])
        tokens, clean = torch.tensor([8, 4]), torch.tensor([4, 0])
        ragged = model.head(model.decode_ragged(flat, tokens, clean, cache, None, sigma))
    return torch.cat([x.flatten() for x in (whole, cached, ragged)])


@pytest.mark.parametrize("kind", KINDS)
def test_the_copy_has_the_same_logits(make_model, random_ids, kind):
    model, ids = make_model(**KINDS[kind]), random_ids(2, 16)
    before = copy.deepcopy(model.backbone.state_dict())
    folded = optimize_for_inference(model)
    assert torch.allclose(outputs(folded, ids), outputs(model, ids), atol=1e-10)
    single = optimize_for_inference(copy.deepcopy(model).float())
    assert (outputs(single, ids) - outputs(model, ids)).abs().max() < 1e-4
    assert all(
        torch.equal(value, before[name]) for name, value in model.backbone.state_dict().items()
    )
    assert not any(
        p.requires_grad for layer in folded.backbone.layers for p in layer.parameters()
    ) or (kind == "timed")
    folds = [isinstance(layer, FoldedLayer) for layer in folded.backbone.layers]
    assert all(folds) if kind != "timed" else not any(folds)


def test_the_autoregressive_baseline_has_one_too(make_ar, random_ids):
    model, ids = make_ar(), random_ids(2, 12)
    folded = optimize_for_inference(model)
    assert torch.allclose(
        folded.head(folded.encode_causal(ids)), model.head(model.encode_causal(ids)), atol=1e-10
    )


def test_a_published_checkpoint_has_the_same_logits():
    model = blockdiffusion.load(GOLDEN / "bd3lm-hf").eval()
    length, size = 2 * model.config.block_size, model.config.vocab_size
    ids = torch.randint(size - 1, (2, length), generator=torch.Generator().manual_seed(0))
    noisy = ids.clone()
    noisy[:, ::2] = model.config.mask_id
    with torch.no_grad():
        ours = optimize_for_inference(model).denoise_logits(noisy, ids)
        assert (ours - model.denoise_logits(noisy, ids)).abs().max() < 1e-4


def test_the_copy_is_made_for_the_same_use(make_model):
    """Tokenizer and configuration are there; the embedding is not stored twice."""
    model = make_model(eos_id=5)
    model.tokenizer = object()
    folded = optimize_for_inference(model)
    assert folded.tokenizer is model.tokenizer and model.backbone.config.adaln
    assert folded.backbone.embedding.weight is model.backbone.embedding.weight
    assert folded.config.eos_id == 5 and not folded.training
    seeds = (torch.Generator().manual_seed(3) for _ in range(2))
    model.tokenizer = folded.tokenizer = None
    one, two = (
        blockdiffusion.generate(m, max_new_tokens=40, bos=False, generator=seed)
        for m, seed in zip((model, folded), seeds, strict=True)
    )
    assert torch.equal(one.sequences, two.sequences)


@pytest.mark.parametrize("kind", [Linear, LinearGelu])
@pytest.mark.parametrize("dtype", PACKED)
@pytest.mark.parametrize("shape", [(48,), (1, 48), (2, 3, 48), (300, 48), (1, 0, 48)])
def test_packed_weights_give_the_same_products(kind, dtype, shape):
    draw = torch.Generator().manual_seed(0)
    linear = kind(48, 96).to(dtype)
    x = torch.randn(shape, generator=draw).to(dtype)
    with torch.no_grad():
        expected, found = linear.double()(x.double()), PackedLinear(linear.to(dtype))(x)
    assert found.shape == expected.shape and found.dtype == dtype
    step = {torch.float32: 1e-5, torch.bfloat16: 2**-7}[dtype]
    assert torch.allclose(found.double(), expected, rtol=step, atol=step)


@pytest.mark.parametrize("dtype", PACKED)
def test_a_sum_rides_on_a_packed_product(dtype):
    """Within the rounding of its type of the exact sum; also of no rows at all."""
    torch.manual_seed(0)
    linear, x, input = Linear(24, 40), torch.randn(1, 5, 40), torch.randn(1, 5, 24)
    linear, x, input = (part.to(dtype) for part in (linear, x, input))
    packed = PackedLinear(linear)
    found, nothing = packed.plus(x, input), packed.plus(x[:, :0], input[:, :0])
    exact = x.double() + linear.double()(input.double())
    assert found.dtype == dtype and nothing.shape == (1, 0, 40)
    assert (found.double() - exact).abs().max() < torch.finfo(dtype).eps * exact.abs().max()


def test_weights_are_packed_where_products_are_measured_to_gain(make_model):
    """float32 and bf16 on CPUs; float64 is left as it is."""
    for dtype in (torch.float64, *PACKED):
        copied = optimize_for_inference(copy.deepcopy(make_model()).to(dtype))
        parts = list(copied.modules())
        assert any(isinstance(part, PackedLinear) for part in parts) == (dtype in PACKED)
        assert any(isinstance(part, nn.Linear) for part in parts) == (dtype not in PACKED)


def test_a_network_in_bf16_gives_logits_in_float32(make_model, random_ids):
    model, ids = copy.deepcopy(make_model()).bfloat16(), random_ids(1, 16)
    for network in (model, optimize_for_inference(model)):
        with torch.no_grad():
            assert network.denoise_logits(ids, ids).dtype == torch.float32


@pytest.mark.parametrize("kind", KINDS)
def test_int8_is_near(make_model, random_ids, kind):
    """Logits differ by a few percent of their spread; every linear layer is in 8 bits."""
    sizes = dict(hidden_size=64, num_hidden_layers=3, num_attention_heads=2) | KINDS[kind]
    model = make_model(**sizes).float()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(0.5)
    ids = random_ids(2, 16)
    rounded = optimize_for_inference(model, int8=True)
    rest = [name for name, part in rounded.backbone.named_modules() if isinstance(part, nn.Linear)]
    assert all(name.startswith("time.") or name.endswith("modulation") for name in rest)
    assert sum(isinstance(part, Int8Linear) for part in rounded.modules()) >= 4 * 3 + 1
    expected, found = outputs(model, ids), outputs(rounded, ids)
    difference = (found - expected).std() / expected.std()
    assert 1e-4 < difference < 0.1


def test_int8_rounds_weights_to_the_nearest_step():
    linear = nn.Linear(64, 8, bias=False)
    with torch.no_grad():
        linear.weight.copy_(torch.randn(8, 64, generator=torch.Generator().manual_seed(0)))
    step = linear.weight.abs().amax(1, keepdim=True) / 127
    nearest = (linear.weight / step).round() * step
    # The steps 2^-6 and 1 of inputs are exact in 7 bits: what is left is the rounded weight.
    eye = torch.eye(64)
    assert torch.allclose(Int8Linear(linear)(eye).T, nearest, atol=1e-5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda model: model.double(), "starts from float32 weights, not torch.float64"),
        (lambda model: model.float().to("meta"), "int8 is for CPUs"),
    ],
)
def test_where_there_is_no_int8(make_model, change, message):
    with pytest.raises(UserError, match=message):
        optimize_for_inference(change(make_model()), int8=True)


def test_a_machine_without_8_bit_products(make_model, monkeypatch):
    monkeypatch.setattr(torch.backends.quantized.__class__, "supported_engines", ["none"])
    with pytest.raises(UserError, match="no 8-bit products for"):
        optimize_for_inference(make_model().float(), int8=True)


@pytest.mark.parametrize("folded", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_only_what_is_wanted_is_finished(make_model, random_ids, kind, folded):
    """The states at some rows and columns are those of the whole pass, and all keys are written."""
    model = make_model(**KINDS[kind])
    model = optimize_for_inference(model) if folded else model
    ids, rows, columns = random_ids(3, 12), torch.tensor([0, 2, 2]), torch.tensor([9, 8, 11])
    sigma = torch.tensor([0.3, 0.7, 1.1])
    with torch.no_grad():
        caches = [model.make_cache(3, 12) for _ in range(4)]
        whole = model.decode(ids, 8, caches[0], None, sigma)
        some = model.decode(ids, 8, caches[1], None, sigma, (rows, columns))
        nothing = model.decode(ids, 8, caches[2], None, sigma, (rows[:0], columns[:0]))
        flat = model.decode_ragged(
            ids.flatten(), torch.tensor([12] * 3), torch.tensor([8] * 3), caches[3], None, sigma,
            rows * 12 + columns,
        )  # fmt: skip
    assert torch.allclose(some, whole[rows, columns], atol=1e-12)
    assert torch.allclose(flat, whole[rows, columns], atol=1e-12)
    assert nothing.shape == (0, model.backbone.config.hidden_size)
    stored = [torch.stack([*cache.keys, *cache.values]) for cache in caches]
    assert all(torch.allclose(stored[0], found, atol=1e-12) for found in stored[1:])


@pytest.mark.parametrize("family", FAMILIES)
def test_weights_that_stay_as_they_are_are_shared(family):
    """In float64 nothing is packed, so no weight is copied; in float32 no embedding and no norm."""
    model = make_hugging_face(family).train()
    copied = optimize_for_inference(model)
    assert model.backbone.training and not copied.backbone.training
    assert copied.backbone is not model.backbone
    for one, two in zip(model.parameters(), copied.parameters(), strict=True):
        assert one is two
    packed = optimize_for_inference(model.float())
    own = {id(p) for p in model.parameters()}
    assert list(packed.parameters()) and all(id(p) in own for p in packed.parameters())
    assert not any(isinstance(part, PackedLinear) for part in model.modules())
