"""Sampling is fast by default: with a copy made once, and anew when the weights change."""

import gc
from dataclasses import replace

import pytest
import torch

import blockdiffusion
from blockdiffusion import Engine, optimize_for_inference
from blockdiffusion.models.inference import FoldedLayer, PackedLinear, inference_form
from tests.tiny import TIMED


def greedy(model, **options):
    return blockdiffusion.generate(
        model, [[1, 2, 3]], max_new_tokens=40, top_k=1, seed=1, eos=False, **options
    ).sequences


@pytest.mark.parametrize("kind", [{}, TIMED, dict(block_size=16)])
def test_it_writes_what_the_plain_network_writes(make_model, kind):
    model = make_model(**kind)
    assert greedy(model).equal(greedy(model, optimize=False))
    filled = [
        blockdiffusion.infill(model, [[1, 12, 3, 12]], seed=1, optimize=optimize).sequences
        for optimize in (True, False)
    ]
    assert filled[0].equal(filled[1])


def test_the_copy_is_made_once(make_model):
    model = make_model().float()
    made = inference_form(model)
    assert any(isinstance(module, FoldedLayer) for module in made.modules())
    if torch.backends.mkldnn.is_available():
        assert any(isinstance(module, PackedLinear) for module in made.modules())
    greedy(model)
    assert inference_form(model) is made and inference_form(made) is made
    assert Engine(model).model is made and Engine(model, optimize=False).model is model
    assert blockdiffusion.likelihood(model, [[1, 2]]) is not None
    assert inference_form(model) is made  # which reading does not change


@pytest.mark.parametrize("change", [
    lambda model: torch.nn.init.zeros_(model.output.bias),
    lambda model: model.load_state_dict({k: -v for k, v in model.state_dict().items()}),
    lambda model: torch.optim.SGD(model.parameters(), lr=1.0).step(),
    lambda model: model.to(torch.float32),
    lambda model: setattr(model, "config", replace(model.config, eos_id=7)),
])  # fmt: skip
def test_a_change_makes_it_anew(make_model, change):
    model = make_model()
    made = inference_form(model)
    for weight in model.parameters():
        weight.grad = torch.ones_like(weight)
    change(model)
    again = inference_form(model)
    assert again is not made and again.config.eos_id == model.config.eos_id
    assert greedy(model).equal(greedy(model, optimize=False))


def test_training_and_the_end_of_a_model_drop_it(make_model):
    from weakref import ref

    model = make_model()
    made = ref(inference_form(model))
    model.train()
    assert inference_form(model) is model
    gc.collect()
    assert made() is None
    made = ref(inference_form(model.eval()))
    del model
    gc.collect()
    assert made() is None


def test_the_tokenizer_is_the_models(make_model):
    model = make_model()
    inference_form(model)
    model.tokenizer = object()
    assert inference_form(model).tokenizer is model.tokenizer


def test_a_copy_made_by_name_samples_as_it_is(make_model):
    model = make_model()
    made = optimize_for_inference(model)
    assert greedy(made).equal(greedy(model))
