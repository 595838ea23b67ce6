"""Finite weights whose logits overflow: nothing is drawn or printed, but a sentence."""

import pytest
import torch

import blockdiffusion
from blockdiffusion.errors import UserError
from blockdiffusion.sampling import Engine, generate, infill
from blockdiffusion.sampling.logits import draw_tokens
from blockdiffusion.sampling.params import SamplingParams
from tests.command import blockdiff

D3PM = dict(objective="d3pm", time_conditioning=True, timesteps=8)
KINDS = {
    "masks": {},
    "score entropy": dict(objective="score_entropy", time_conditioning=True),
    "d3pm": D3PM,
    "uniform d3pm": {**D3PM, "transition": "uniform"},
    "one block": dict(block_size=16),
}


def overflowing(model):
    model = model.float()
    with torch.no_grad():
        model.output.weight.fill_(3e38)
    return model


@pytest.mark.parametrize("kind", KINDS)
def test_no_process_draws_from_what_is_not_finite(make_model, kind):
    with pytest.raises(UserError, match="logits are not finite"):
        generate(overflowing(make_model(**KINDS[kind])), max_new_tokens=8)


@pytest.mark.parametrize(
    "options",
    [
        dict(top_p=0.9), dict(top_k=3), dict(temperature=0.7), dict(top_k=3, top_p=0.5),
        dict(sampler="ancestral", steps=4), dict(sampler="random", tokens_per_step=2),
        dict(sampler="confidence", threshold=0.9), dict(sampler="entropy", tokens_per_step=2),
        dict(sampler="margin", tokens_per_step=2), dict(sampler="remask", steps=4),
        dict(use_cache=False), dict(window=8),
    ],
)  # fmt: skip
def test_no_policy_and_no_filter_does(make_model, options):
    with pytest.raises(UserError, match="logits are not finite"):
        generate(overflowing(make_model()), max_new_tokens=8, **options)


def test_neither_do_the_baseline_gaps_and_the_engine(make_model, make_ar):
    with pytest.raises(UserError, match="logits are not finite"):
        generate(overflowing(make_ar()), max_new_tokens=8)
    model = overflowing(make_model())
    with pytest.raises(UserError, match="logits are not finite"):
        infill(model, [[1, 12, 2]])
    engine = Engine(model)
    engine.submit([1, 2], seed=1)
    with pytest.raises(UserError, match="logits are not finite"):
        list(engine.run())


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("where", [0, 3, 6])
def test_one_logit_is_enough(value, where):
    logits_MV = torch.zeros(4, 7)
    logits_MV[2, where] = value
    with pytest.raises(UserError, match="logits are not finite"):
        draw_tokens(logits_MV, 1, SamplingParams(), torch.rand(4).double())
    logits_MV[2] = torch.finfo(torch.float32).min  # but minus infinity is a probability of zero
    logits_MV[2, 5] = 0
    logits_MV[0, 2:] = -torch.inf
    token_M, _ = draw_tokens(logits_MV, 1, SamplingParams(), torch.rand(4).double())
    assert token_M[2] == 5 and token_M[0] == 0


@pytest.mark.parametrize(
    "estimator", ["auto", "count", "complement", "bernoulli", "orders", "exact"]
)
def test_no_likelihood_is_told(make_model, random_ids, estimator):
    with pytest.raises(UserError, match=r"the likelihood is (nan|inf) nats a token"):
        blockdiffusion.likelihood(
            overflowing(make_model()), random_ids(2, 16), estimator=estimator, mc_samples=2
        )


def test_nor_one_whose_perplexity_is_no_number(make_ar, random_ids):
    model = make_ar()
    with torch.no_grad():
        model.output.bias[12] = 1e6
        model.output.bias[0] = 1e5
    with pytest.raises(UserError, match=r"the likelihood is \d.* nats a token"):
        blockdiffusion.likelihood(model, random_ids(2, 16))


def test_the_command_line_tells_it(make_model, tmp_path):
    overflowing(make_model()).save_pretrained(tmp_path)
    for more in ((), ("--top-p", 0.9), ("--json",), ("--dtype", "bfloat16")):
        run = blockdiff("sample", tmp_path, "--max-new-tokens", 8, "--seed", 1, *more)
        assert run.returncode == 2 and run.stdout == "" and "not finite" in run.stderr
