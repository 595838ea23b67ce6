"""What must hold on a GPU, too: the published logits, and the law of what is sampled."""

import copy

import pytest
import torch
from scipy import stats

import blockdiffusion
from blockdiffusion import Engine
from blockdiffusion.diffusion.denoiser import masked_loss
from blockdiffusion.diffusion.losses import exclude_mask_token_
from blockdiffusion.models.attention import attend
from blockdiffusion.models.inference import optimize_for_inference
from blockdiffusion.models.masks import Streams
from blockdiffusion.sampling import Finished
from blockdiffusion.sampling.logits import draw_tokens, filtered_probs
from blockdiffusion.sampling.params import SamplingParams
from tests.models.hugging_face import make_hugging_face
from tests.sampling.laws import DRAWS, FALSE_ALARM, law_of, p_value, seeded

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
TOLERANCE = 2e-4  # float32; matrix products of a GPU round in other places than those of a CPU


@torch.no_grad()
def test_a_checkpoint_has_its_logits(bd3lm, bd3lm_expected):
    """The published ones, by flex attention over the streams."""
    model = bd3lm.cuda()
    clean, noisy = (bd3lm_expected[name].cuda() for name in ("x0", "xt"))
    found = model.denoise_logits(noisy, clean).cpu()
    assert (found - bd3lm_expected["train_logits"]).abs().max() < TOLERANCE


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "length, block_size",
    [(length, size) for length in (1024, 4096) for size in (1, 4, 8, 16, 128, length)],
)
def test_flex_attention_equals_the_dense_oracle(length, block_size, dtype):
    """Forward and backward; the oracle in float32, of the same rounded numbers."""
    streams = Streams(length, block_size, has_clean=block_size < length)
    draw = torch.Generator("cuda").manual_seed(0)
    shape = (1, 2, streams.num_tokens, 64)
    q, k, v, weight = (
        torch.randn(shape, generator=draw, device="cuda").to(dtype) for _ in range(4)
    )

    def results(backend, dtype):
        inputs = [x.to(dtype).requires_grad_() for x in (q, k, v)]
        out = attend(*inputs, streams, backend)
        gradients = torch.autograd.grad((out * weight.to(dtype)).sum(), inputs)
        return [x.detach().float() for x in (out, *gradients)]

    tolerance = 2e-2 if dtype == torch.bfloat16 else 1e-4
    for found, expected in zip(
        results("flex", dtype), results("dense", torch.float32), strict=True
    ):
        assert (found - expected).norm() < tolerance * expected.norm()


@torch.no_grad()
def test_padding_changes_no_logits(make_model, random_ids):
    model, ids = (
        make_model(seq_len=128, hidden_size=64, num_hidden_layers=3).float(),
        random_ids(2, 128),
    )
    noisy = ids[:, None].masked_fill(ids[:, None] % 3 == 0, model.config.mask_id)
    valid = torch.arange(128)[None] < torch.tensor([[128], [90]])
    model.attention_backend = "dense"
    expected = model.encode(noisy, ids, valid_BL=valid)
    model.attention_backend = None
    found = model.cuda().encode(noisy.cuda(), ids.cuda(), valid_BL=valid.cuda()).cpu()
    assert (found - expected).abs().max() < TOLERANCE * expected.abs().max()


@pytest.mark.parametrize("folded", [False, True])
def test_samples_keep_the_law(tiny_law, tiny_law_expected, folded):
    """Chi-square with a false-alarm probability of 1e-4."""
    model = tiny_law.cuda()
    model = optimize_for_inference(model) if folded else model
    result = blockdiffusion.generate(
        model, num_samples=DRAWS, max_new_tokens=4, bos=False, generator=seeded()
    )
    assert p_value(result, law_of(tiny_law_expected)) > FALSE_ALARM


def test_the_engine_keeps_the_law(tiny_law, tiny_law_expected):
    """Requests of one and of two blocks; chi-square with a false-alarm probability of 1e-4."""
    engine = Engine(optimize_for_inference(tiny_law.cuda()), max_rows=128, max_tokens=4)
    for seed in range(3000):
        engine.submit(max_new_tokens=4, bos=False, seed=seed)
        if seed % 3 == 0:
            engine.submit(max_new_tokens=2, bos=False, seed=seed)
    finished = [event.ids for event in engine.run() if isinstance(event, Finished)]
    texts = [tuple(ids) for ids in finished if len(ids) == 4]
    assert len(texts) == 3000 and p_value(texts, law_of(tiny_law_expected)) > FALSE_ALARM


@pytest.mark.parametrize("policy", [
    dict(sampler="ancestral", steps=3), dict(sampler="confidence", tokens_per_step=2),
    dict(sampler="entropy", threshold=0.5), dict(sampler="remask", steps=5),
    dict(window=8), dict(eos=False),
])  # fmt: skip
@pytest.mark.parametrize("recorded", [False, True])
def test_every_policy_samples_what_a_cpu_samples(make_model, policy, recorded):
    """In float64, where rounding changes no draw; passes one kernel at a time, and as graphs."""
    model = make_model()
    on_gpu = copy.deepcopy(model).cuda()
    on_gpu = optimize_for_inference(on_gpu) if recorded else on_gpu
    assert on_gpu.records_passes == recorded
    results = [
        blockdiffusion.generate(
            on_device,
            [[1, 2, 3], []],
            num_samples=3,
            max_new_tokens=41,
            generator=seeded(),
            **policy,
        ).sequences.cpu()
        for on_device in (model, on_gpu)
    ]
    assert torch.equal(*results)


@pytest.mark.parametrize("policy", [dict(), dict(window=8), dict(sampler="ancestral", steps=2)])
@pytest.mark.parametrize("recorded", [False, True])
def test_the_shifted_reading_samples_what_a_cpu_samples(policy, recorded):
    """The cache keeps a hidden state of each row, taken from the memory of a recorded pass."""
    results = []
    for device in ("cpu", "cuda"):
        model = make_hugging_face("llama", reading="shifted", eos_id=None).to(device)
        model = optimize_for_inference(model) if recorded and device == "cuda" else model
        made = blockdiffusion.generate(
            model, [[1, 2, 3], []], num_samples=3, max_new_tokens=21, generator=seeded(), **policy
        )
        results.append(made.sequences.cpu())
    assert torch.equal(*results)


def test_a_mixture_of_experts_samples_what_a_cpu_samples():
    results = []
    for device in ("cpu", "cuda"):
        model = make_hugging_face("llada2_moe", eos_id=None).to(device)
        made = blockdiffusion.generate(
            model, [[1, 2, 3], []], num_samples=3, max_new_tokens=21, generator=seeded()
        )
        results.append(made.sequences.cpu())
    assert torch.equal(*results)


@pytest.mark.parametrize("filters", [
    {}, dict(top_p=0.8), dict(top_p=0.8, top_p_rule="authors"), dict(top_k=5, temperature=0.7),
])  # fmt: skip
@pytest.mark.parametrize("rows", [500, 2])
def test_draws_keep_their_law(filters, rows):
    """Many draws at once, and one after another (recorded); chi-square, false alarms 1e-4."""
    filters, draw = SamplingParams(**filters), seeded()
    logits = torch.randn(12, generator=draw, dtype=torch.float64)
    law = filtered_probs(exclude_mask_token_(logits.clone()[None], 11).softmax(-1), filters)[0]
    counts = torch.zeros(12, dtype=torch.float64)
    for _ in range(4000 // rows):
        given = logits.cuda().expand(rows, -1).clone()
        tokens, probs = draw_tokens(
            given, 11, filters, torch.rand(rows, generator=draw, dtype=torch.float64)
        )
        counts += torch.bincount(tokens.cpu(), minlength=12)
        kept = exclude_mask_token_(logits.clone(), 11).softmax(-1)[tokens.cpu()]
        assert torch.allclose(probs.cpu(), kept)
    inside = law > 0
    assert counts[~inside].sum() == 0
    expected = law[inside] * counts.sum()
    assert stats.chisquare(counts[inside], expected).pvalue > FALSE_ALARM


def test_the_autoregressive_baseline_samples_what_a_cpu_samples(make_ar):
    model = make_ar()
    on_gpu = optimize_for_inference(copy.deepcopy(model).cuda())
    assert on_gpu.records_passes
    results = [
        blockdiffusion.generate(
            on_device, [[1, 2, 3], []], num_samples=3, max_new_tokens=30, generator=seeded()
        ).sequences.cpu()
        for on_device in (model, on_gpu)
    ]
    assert torch.equal(*results)


def test_compiled_layers_have_the_same_gradients(make_model, random_ids):
    """In float32, and with flex attention in both."""
    model = make_model(hidden_size=64, num_hidden_layers=3, seq_len=128).float().cuda().train()
    clean = random_ids(2, 128).cuda()
    noisy = clean[:, None].masked_fill(clean[:, None] % 3 == 0, model.config.mask_id)
    weight = torch.rand(2, 1, 128, generator=seeded()).cuda()
    results = []
    for compiled in (False, True):
        for layer in model.backbone.layers:
            layer.compiled = compiled
        loss = masked_loss(model, noisy, clean, noisy == model.config.mask_id, weight)
        results.append([loss.detach(), *torch.autograd.grad(loss, list(model.parameters()))])
    for found, expected in zip(*results, strict=True):
        assert (found - expected).norm() < 1e-3 * expected.norm() + 1e-6
