import pytest
import torch

from blockdiffusion.errors import UserError
from blockdiffusion.sampling.logits import draw_tokens, filtered_probs
from blockdiffusion.sampling.params import SamplingParams

PROBS = torch.tensor([0.05, 0.6, 0.0, 0.35])  # id 2 is the mask token


def uniforms(count):
    return torch.rand(count, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def law(filters, draws=4000, probs=PROBS, mask_id=2):
    """Relative frequencies of the drawn ids."""
    logits = probs.log().clamp(min=-50).repeat(draws, 1)
    logits[:, mask_id] = 3.0  # whatever the network says there
    ids, confidence = draw_tokens(logits, mask_id, filters, uniforms(draws))
    assert torch.allclose(confidence, probs[ids], atol=1e-6)
    return torch.bincount(ids, minlength=len(probs)) / draws


@pytest.mark.parametrize(("filters", "expected"), [
    (SamplingParams(), [0.05, 0.6, 0, 0.35]),
    (SamplingParams(top_k=2), [0, 0.6 / 0.95, 0, 0.35 / 0.95]),
    (SamplingParams(top_k=1), [0, 1, 0, 0]),
    (SamplingParams(top_p=0.9), [0, 0.6 / 0.95, 0, 0.35 / 0.95]),
    (SamplingParams(top_p=0.9, top_p_rule="authors"), [0, 1, 0, 0]),
    (SamplingParams(top_p=0.01), [0, 1, 0, 0]),
    (SamplingParams(top_p=0.01, top_p_rule="authors"), [0, 1, 0, 0]),
    (SamplingParams(top_p=0.96, top_p_rule="authors"), [0, 0.6 / 0.95, 0, 0.35 / 0.95]),
    (SamplingParams(top_k=3, top_p=1.0), [0.05, 0.6, 0, 0.35]),
])  # fmt: skip
def test_filters_give_the_law_they_should(filters, expected):
    """4,000 draws; every frequency within 4.9 standard errors (below 0.039; false alarm 1e-5)."""
    assert (law(filters) - torch.tensor(expected)).abs().max() < 0.039


def test_temperature_sharpens():
    p = PROBS**2 / (PROBS**2).sum()
    assert (law(SamplingParams(temperature=0.5)) - p).abs().max() < 0.039


def test_top_p_acts_on_what_top_k_left():
    frequencies = law(SamplingParams(top_k=2, top_p=0.6))  # 0.6 of 0.95 is 0.63: enough
    assert frequencies.tolist() == [0, 1, 0, 0]


def test_filtered_distributions_are_those_that_are_drawn_from():
    filters = SamplingParams(temperature=0.7, top_k=3, top_p=0.8)
    (found,) = filtered_probs(PROBS[None].double(), filters)
    assert (law(filters) - found).abs().max() < 0.039
    assert found.count_nonzero() == 1 or found.count_nonzero() == 2
    assert found.sum().item() == pytest.approx(1)


def test_nothing_to_draw_is_no_draw():
    nothing = torch.zeros(0, 4)
    for filters in (SamplingParams(), SamplingParams(top_p=0.5), SamplingParams(top_k=2)):
        ids, confidence = draw_tokens(nothing.clone(), 2, filters, uniforms(0))
        assert len(ids) == len(confidence) == 0 and not ids.is_floating_point()


@pytest.mark.parametrize(
    "filters", [SamplingParams(), SamplingParams(top_p=0.8), SamplingParams(top_k=7)], ids=str
)
def test_a_draw_depends_on_its_own_number_alone(filters):
    logits = torch.randn(5, 30, generator=torch.Generator().manual_seed(0))
    together = draw_tokens(logits.clone(), 29, filters, uniforms(5))[0]
    for row, number in enumerate(uniforms(5)):
        alone = draw_tokens(logits[row : row + 1].clone(), 29, filters, number[None])[0]
        assert alone == together[row]


@pytest.mark.parametrize("options", [
    dict(temperature=0), dict(top_k=0), dict(top_p=0.0), dict(top_p=1.1), dict(top_p_rule="hf"),
])  # fmt: skip
def test_options_out_of_range_are_refused(options):
    with pytest.raises(UserError, match=next(iter(options))):
        SamplingParams(**options)


@pytest.mark.parametrize("temperature", [1e-3, 1e3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_ends_of_the_temperatures_can_be_drawn_from(temperature, dtype):
    """The most likely token, and (nearly) any; 100 draws of two tokens, which miss one of them with
    a probability of 1.6e-30."""
    logits = torch.tensor([[60.0, -60.0, 90.0]], dtype=dtype).repeat(100, 1)
    ids, confidence = draw_tokens(logits, 2, SamplingParams(temperature=temperature), uniforms(100))
    assert set(ids.tolist()) == ({0} if temperature < 1 else {0, 1}) and (confidence >= 0).all()
