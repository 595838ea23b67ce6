"""The fused layers of Llama's relatives compute what transformers computes."""

import copy

import pytest
import torch

from blockdiffusion.models.fused_llama import FusedLlama
from blockdiffusion.models.inference import Int8Linear, PackedLinear, optimize_for_inference
from tests.models.hugging_face import FAMILIES, make_hugging_face
from tests.models.test_inference import PACKED, outputs

FUSED = {"llama", "mistral", "qwen2", "qwen3"}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_simplified_network_has_the_same_logits(family, random_ids):
    """In float64, where transformers' norms round to float32. A family with Llama's modules but
    other sums (Granite) keeps its own layers."""
    model = make_hugging_face(family, reading="next", clean_attention="causal")
    simple = copy.deepcopy(model)
    simple.backbone.simplify()
    body = simple.backbone.model.base_model
    assert isinstance(body, FusedLlama) == (family in FUSED)
    assert not any(type(part).__name__ == "Conv1D" for part in body.modules())
    expected, found = outputs(model, random_ids(2, 16)), outputs(simple, random_ids(2, 16))
    assert (found - expected).abs().max() < 1e-5 * expected.abs().max()


@pytest.mark.skipif(torch.float32 not in PACKED, reason="no oneDNN")
@pytest.mark.parametrize("family", [*sorted(FUSED), "gpt2"])
def test_the_copy_is_simplified_and_packed(family, random_ids):
    model = make_hugging_face(family, reading="next").float()
    packed = optimize_for_inference(model)
    kinds = [type(part) for part in packed.backbone.model.modules()]
    # Four products in each of two layers, and the head.
    assert kinds.count(PackedLinear) == 9
    assert not any(isinstance(part, PackedLinear | FusedLlama) for part in model.modules())
    expected, found = outputs(model, random_ids(2, 16)), outputs(packed, random_ids(2, 16))
    assert (found - expected).abs().max() < 1e-4 * expected.abs().max()


@pytest.mark.skipif(
    "fbgemm" not in torch.backends.quantized.supported_engines, reason="no 8-bit products"
)
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_8_bits_round_every_product(family, random_ids):
    model = make_hugging_face(family).float()
    rounded = optimize_for_inference(model, int8=True)
    kinds = [type(part) for part in rounded.backbone.model.modules()]
    assert kinds.count(Int8Linear) == 9
    expected, found = outputs(model, random_ids(2, 16)), outputs(rounded, random_ids(2, 16))
    assert (found - expected).abs().mean() < 0.2 * expected.std()
