"""A parent and its child on the same tokens: against transformers, and against loops."""

import json

import pytest
import torch

from blockdiffusion.diffusion.denoiser import masked_nll
from blockdiffusion.errors import UserError
from blockdiffusion.evaluate.compare import compare, left_to_right_nats
from blockdiffusion.evaluate.options import LikelihoodOptions
from tests.models.hugging_face import make_causal_lm, make_hugging_face

CAUSAL = dict(reading="next", clean_attention="causal")


def parents_nats(family, ids):
    logits = make_causal_lm(family)(ids).logits[:, :-1]
    return torch.nn.functional.cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none")


@torch.no_grad()
@pytest.mark.parametrize(
    ("family", "reading"),
    [("llama", "next"), ("gpt2", "next"), ("gemma2", "next"), ("gemma2", "shifted")],
)
def test_an_untrained_child_reads_as_its_parent_where_it_promises_to(family, reading, random_ids):
    """Autoregressively at any attention inside blocks; left to right where that is causal. The mask
    token's probability, which the child does not have, is taken out of the parent's."""
    ids = random_ids(3, 14)
    parent = make_causal_lm(family)
    bias = torch.zeros(13, dtype=torch.float64)
    bias[12] = -torch.inf
    parent.register_forward_hook(lambda m, i, out: setattr(out, "logits", out.logits + bias))
    for attention in ("causal", "full"):
        child = make_hugging_face(
            family, block_attention=attention, **CAUSAL | dict(reading=reading)
        )
        found = compare(parent, child, ids)
        readings = {reading.name: reading for reading in found.readings}
        lost = {name: reading.lost.value for name, reading in readings.items()}
        assert lost["parent"] == 0 and abs(lost["child, autoregressive"]) < 1e-6
        along = abs(lost["child, blocks of 4, left to right"])
        assert along < 1e-6 if attention == "causal" else along > 1e-3
        bound, exact = (lost[f"child, blocks of 4, {name}"] for name in ("bound", "random order"))
        assert bound > exact and readings["child, blocks of 4, bound"].is_bound
        assert found.num_tokens == 39 and found.num_rows == 3


@torch.no_grad()
@pytest.mark.parametrize("reading", ["next", "shifted"])
def test_a_parent_that_was_adapted_has_the_same_context(reading, random_ids):
    """With both readings it is the causal model, here compared with itself."""
    model = make_hugging_face("llama", **CAUSAL | dict(reading=reading))
    found = compare(model, model, random_ids(2, 14))
    assert {r.name: r.lost.value for r in found.readings}["child, autoregressive"] == 0
    other = compare(make_hugging_face("llama", **CAUSAL), model, random_ids(2, 14))
    assert other.readings[0].nats_per_token.value == pytest.approx(
        found.readings[0].nats_per_token.value, abs=1e-6
    )


@torch.no_grad()
def test_the_parents_value_is_that_of_transformers(random_ids):
    ids = random_ids(4, 16)
    found = compare(make_causal_lm("llama"), make_hugging_face("llama", **CAUSAL), ids)
    rows = parents_nats("llama", ids).mean(1)
    parent = found.readings[0].nats_per_token
    assert parent.value == pytest.approx(float(rows.mean()), abs=1e-6)
    assert parent.stderr == pytest.approx(float(rows.std() / 2), rel=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("reading", ["same", "next", "shifted"])
@pytest.mark.parametrize("length", [16, 14])
def test_left_to_right_is_the_sum_of_its_conditionals(reading, length, random_ids):
    model = make_hugging_face("llama", reading=reading)
    ids = random_ids(1, length)
    padded = torch.nn.functional.pad(ids, (0, -length % 4), value=0)
    valid = (torch.arange(padded.shape[1]) < length)[None]
    total = 0.0
    for place in range(1, length):
        block = place // 4 * 4
        noisy = padded.clone()
        noisy[:, place : block + 4] = 12
        scored = torch.arange(padded.shape[1]) == place
        total += float(masked_nll(model, noisy[:, None], padded, scored[None, None], valid).sum())
    assert left_to_right_nats(model, ids, skipped=1) == pytest.approx(total, rel=1e-5)


@torch.no_grad()
def test_a_child_of_its_own_reading_and_orders(random_ids):
    """With the reading "same" the first token is given in the row; orders instead of subsets."""
    child = make_hugging_face("llama", block_size=8, reading="same")
    options = LikelihoodOptions(estimator="orders", mc_samples=2, orders=4)
    found = compare(make_causal_lm("llama"), child, random_ids(2, 16), options)
    names = [reading.name for reading in found.readings]
    assert names == [
        "parent", "child, blocks of 8, bound", "child, blocks of 8, 4 orders",
        "child, blocks of 8, left to right",
    ]  # fmt: skip
    assert [reading.is_bound for reading in found.readings] == [False, True, True, False]
    json.dumps(found.to_dict())


def test_a_row_needs_two_tokens(random_ids):
    with pytest.raises(UserError, match="at least 2 are needed"):
        compare(make_causal_lm("llama"), make_hugging_face("llama"), random_ids(2, 1))
