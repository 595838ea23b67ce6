"""A row's result is its own: the same alone and in any batch, whatever padding holds."""

import pytest
import torch

import blockdiffusion
from blockdiffusion import UserError
from blockdiffusion.data.loader import Batch
from blockdiffusion.diffusion.denoiser import causal_nll
from blockdiffusion.diffusion.objectives import diffusion_of
from blockdiffusion.runtime.seeding import seeded
from blockdiffusion.train.loss import DiffusionLoss
from tests.tiny import NOISES

MODELS = NOISES | {
    "one token": dict(block_size=1),
    "one block": dict(block_size=16),
    "autoregressive": dict(objective="autoregressive", adaln=False, block_size=1),
}
POLICIES = [
    dict(policy="ancestral", steps=3),
    dict(policy="random", tokens_per_step=2),
    dict(policy="confidence", tokens_per_step=2),
    dict(policy="margin", threshold=0.3),
    dict(policy="entropy", threshold=0.5),
    dict(policy="remask", steps=5),
    dict(use_cache=False),
    dict(top_p=0.8),
    dict(top_k=3, temperature=0.7),
    dict(window=8),
]
SAMPLERS = [(name, {}) for name in MODELS]
SAMPLERS += [("masked", options) for options in POLICIES]
SAMPLERS += [("one block", dict(max_new_tokens=25, stride=5)), ("autoregressive", dict(window=6))]
PROMPTS = [[1, 2, 3], [], [4, 4, 4, 4, 7], [1, 2, 3], [9], []]


@pytest.mark.parametrize(("name", "options"), SAMPLERS, ids=str)
def test_samplers(make_model, name, options):
    """Also of a prompt that the batch has twice, whose texts differ."""
    model = make_model(eos_id=5, **MODELS[name])
    options = {"max_new_tokens": 11, **options}
    batch = blockdiffusion.generate(model, PROMPTS, **options, generator=seeded(2))
    for row, prompt in enumerate(PROMPTS):
        same = PROMPTS[: row + 1].count(prompt)
        alone = blockdiffusion.generate(model, [prompt] * same, **options, generator=seeded(2))
        length = int(batch.lengths[row])
        assert int(alone.lengths[-1]) == length and alone.nfe[-1] == batch.nfe[row]
        assert torch.equal(alone.sequences[-1, :length], batch.sequences[row, :length])
    assert batch.sequences[0].tolist() != batch.sequences[3].tolist()
    assert batch.sequences[1].tolist() != batch.sequences[5].tolist()


def test_infilling(make_model):
    model = make_model()
    templates = [[1, 12, 3, 12, 12, 6], [12], [2, 2, 12, 12, 12, 2, 2, 2, 12]]
    batch = blockdiffusion.infill(model, templates, generator=seeded(2))
    for row, template in enumerate(templates):
        alone = blockdiffusion.infill(model, [template], generator=seeded(2))
        assert torch.equal(alone.sequences[0], batch.sequences[row, : len(template)])


# --- estimators


ROWS = [[1, 2, 3, 4, 5, 6, 7, 8, 9], [1], [4, 4, 0, 0, 7], [3, 3]]
EXACT = {"masked": "exact", "one token": "complement", "autoregressive": "auto"}


@pytest.mark.parametrize("bos", [False, True])
@pytest.mark.parametrize("name", EXACT)
def test_likelihoods_without_noise(make_model, name, bos):
    model = make_model(bos_id=11, **MODELS[name])
    rows = [[11, *row] for row in ROWS] if bos else ROWS
    batch = blockdiffusion.likelihood(model, rows, EXACT[name], bos=bos)
    for row, ids in enumerate(rows):
        alone = blockdiffusion.likelihood(model, [ids], EXACT[name], bos=bos)
        assert alone.nats_per_row[0] == pytest.approx(batch.nats_per_row[row].item(), rel=1e-12)
        assert alone.exact_nats_per_row[0] == pytest.approx(
            batch.exact_nats_per_row[row].item(), rel=1e-12
        )


def test_start_symbols_of_autoregressive_rows(make_model):
    """A row whose token 0 is scored gets a start symbol, one whose token 0 is given does not."""
    model = make_model(**MODELS["autoregressive"])
    clean = torch.tensor([[0, 1, 2, 1], [1, 2, 0, 1], [3, 3, 3, 3]])
    free = torch.ones(3, 4, dtype=torch.bool)
    free[0, 0] = free[2, :3] = False
    batch = causal_nll(model, clean, free)
    assert (batch > 0).equal(free)
    for row in range(3):
        alone = causal_nll(model, clean[row : row + 1], free[row : row + 1])
        assert torch.allclose(alone[0], batch[row], rtol=1e-12, atol=0)
    result = blockdiffusion.likelihood(model, clean, bos=False, given=~free)
    assert torch.allclose(result.nats_per_row, batch.sum(1), rtol=1e-12)


@pytest.mark.parametrize("name", [name for name in MODELS if name != "autoregressive"])
def test_terms_of_a_draw(make_model, random_ids, name):
    """What noise a row gets depends on its number in the batch; what it then costs, on itself."""
    model, clean = make_model(**MODELS[name]), random_ids(4, 16)
    diffusion = diffusion_of(model.config)
    law, _ = diffusion.estimator(diffusion.usual_estimator)
    free = torch.ones(4, 16, dtype=torch.bool)
    free[1, 5:] = free[2, :3] = False
    valid = free.clone()
    valid[2] = True
    drawn = law(clean, free, model.config.block_size, model.config.mask_id, seeded(0))
    batch = diffusion.terms(model, drawn, clean, valid)
    for row in range(4):
        part = slice(row, row + 1)
        alone = diffusion.terms(model, drawn.rows(row, row + 1), clean[part], valid[part])
        assert torch.allclose(alone[0], batch[row], rtol=1e-10, atol=1e-12)
        assert (alone[0] != 0).any()


# --- padding


@pytest.mark.parametrize("mask_id", [0, 12])
@pytest.mark.parametrize("padding", [0, 12, 5, -7, 10**12])
@pytest.mark.parametrize("name", [*MODELS, "orders"])
def test_what_padding_holds_is_never_looked_at(make_model, name, padding, mask_id):
    model = make_model(mask_id=mask_id, **MODELS.get(name, {}))
    ids = torch.tensor([[1, 2, 3, 4, 5, 6, 7, 8], [3, *[1] * 7]])
    valid = torch.ones(2, 8, dtype=torch.bool)
    valid[1, 1:] = False
    estimator = "orders" if name == "orders" else "auto"

    def nats(ids):
        return blockdiffusion.likelihood(
            model, ids, estimator, 2, bos=False, valid=valid, generator=seeded(0)
        ).nats_per_row

    found, expected = nats(ids.masked_fill(~valid, padding)), nats(ids)
    assert found.isfinite().all() and (found > 0).any()
    assert torch.equal(found, expected)


@pytest.mark.parametrize("spec", ["complement", "count", "bernoulli", "bernoulli:cosinex3"])
@pytest.mark.parametrize("name", ["masked", "timed", "sedd"])
def test_training_on_padding_that_is_the_mask(make_model, name, spec):
    check_training(make_model(mask_id=0, **MODELS[name]), spec)


@pytest.mark.parametrize("name", ["absorbing", "uniform"])
def test_training_of_d3pm_on_padding_that_is_the_mask(make_model, name):
    check_training(make_model(mask_id=0, **MODELS[name]), "timesteps")


def check_training(model, spec):
    """The same loss, and as many scored positions, as with any other padding."""
    ids = torch.tensor([[1, 2, 3, 4, 5, 0, 0, 0]])
    valid = ids > 0
    law, _ = diffusion_of(model.config).estimator(spec)

    def loss(padding):
        clean = ids.masked_fill(~valid, padding)
        drawn = law(clean, valid, 4, 0, seeded(3))
        whole = DiffusionLoss(Batch(clean, valid), drawn)
        return whole.nats(model, slice(0, 1)).item(), whole.num_scored

    assert loss(0) == pytest.approx(loss(7), rel=1e-12) and loss(0)[0] > 0
    assert 0 < loss(0)[1] <= 5 * law.num_noisy


# --- ids that are none


@pytest.mark.parametrize("ids", [
    torch.tensor([[1.0, 2.5]]), torch.tensor([[True, False]]), [[1.5, 2]], [[True]], [[2**70]],
    [["a"]], [1, 2], [None], ["a", [1]],
])  # fmt: skip
def test_ids_that_are_no_whole_numbers_are_refused(make_model, ids):
    with pytest.raises(UserError, match=r"whole numbers|token ids|texts"):
        blockdiffusion.likelihood(make_model(), ids, bos=False)
