"""What must hold on a GPU, too: the published logits, and the law of what is sampled."""

import copy

import pytest
import torch

import blockdiffusion
from blockdiffusion import Engine
from blockdiffusion.models.inference import sampling_copy
from blockdiffusion.sampling.engine import Finished
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


@torch.no_grad()
def test_padding_changes_no_logits(make_model, random_ids):
    model, ids = make_model(seq_len=128, num_layers=3).float(), random_ids(2, 128)
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
    model = sampling_copy(model) if folded else model
    result = blockdiffusion.generate(
        model, num_samples=DRAWS, max_new_tokens=4, bos=False, generator=seeded()
    )
    assert p_value(result, law_of(tiny_law_expected)) > FALSE_ALARM


def test_the_engine_keeps_the_law(tiny_law, tiny_law_expected):
    """Requests of one and of two blocks; chi-square with a false-alarm probability of 1e-4."""
    engine = Engine(sampling_copy(tiny_law.cuda()), max_rows=128, max_tokens=4)
    for seed in range(3000):
        engine.submit(max_new_tokens=4, bos=False, seed=seed)
        if seed % 3 == 0:
            engine.submit(max_new_tokens=2, bos=False, seed=seed)
    finished = [event.ids for event in engine.run() if isinstance(event, Finished)]
    texts = [tuple(ids) for ids in finished if len(ids) == 4]
    assert len(texts) == 3000 and p_value(texts, law_of(tiny_law_expected)) > FALSE_ALARM


@pytest.mark.parametrize("policy", [
    dict(policy="ancestral", steps=3), dict(policy="confidence", tokens_per_step=2),
    dict(policy="entropy", threshold=0.5), dict(policy="remask", steps=5), dict(top_p=0.8),
])  # fmt: skip
def test_every_policy_samples_what_a_cpu_samples(make_model, policy):
    """In float64, where rounding changes no draw."""
    model = make_model()
    results = [
        blockdiffusion.generate(
            on_device, [[1, 2, 3], []], 3, max_new_tokens=17, generator=seeded(), **policy
        ).sequences
        for on_device in (copy.deepcopy(model), model.cuda())
    ]
    assert torch.equal(*results)
