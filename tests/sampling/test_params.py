"""The options of sampling: one object, its fields by name, and the command line say the same."""

import pytest

import blockdiffusion
from blockdiffusion import SamplingParams, UserError
from blockdiffusion.sampling import choosing
from blockdiffusion.sampling.params import FIELDS, MASKED_SAMPLERS, SAMPLERS
from tests.command import blockdiff
from tests.tokenizer_kinds import KINDS


def test_an_object_and_options_by_name_are_the_same(make_model):
    model = make_model(mask_id=12)
    values = dict(max_new_tokens=9, num_samples=3, bos=False, top_p=0.8, sampler="margin")
    values |= dict(tokens_per_step=2, seed=5)
    params = SamplingParams(**values)
    for sample, what in ((blockdiffusion.generate, [1, 2]), (blockdiffusion.infill, [1, 12, 12])):
        by_name = sample(model, what, **values)
        assert sample(model, what, params).sequences.equal(by_name.sequences)
        other = sample(model, what, params, seed=6)  # an option goes before the object
        assert not other.sequences.equal(by_name.sequences)
    engine = blockdiffusion.Engine(model)
    numbers = [
        engine.submit([1, 2], SamplingParams(seed=3, max_new_tokens=5)),
        engine.submit([1, 2], seed=3, max_new_tokens=5),
    ]
    ended = {event.row: event.ids for event in engine.run() if hasattr(event, "reason")}
    assert ended[numbers[0]] == ended[numbers[1]]


def test_the_old_name_is_read_with_a_note(make_model, tmp_path):
    model = make_model()
    with pytest.warns(FutureWarning, match="policy is now sampler"):
        old = blockdiffusion.generate(model, policy="random", tokens_per_step=2, seed=1)
    new = blockdiffusion.generate(model, sampler="random", tokens_per_step=2, seed=1)
    assert old.sequences.equal(new.sequences)
    tokenizer = KINDS["bytes"]()
    size = len(tokenizer)
    make_model(vocab_size=size + 1, mask_id=size).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    more = ("--tokens-per-step", 2, "--seed", 1, "--max-new-tokens", 9)
    said = [blockdiff("sample", tmp_path, f"--{name}", "random", *more)
            for name in ("sampler", "policy")]  # fmt: skip
    assert said[0].stdout == said[1].stdout and not said[0].stderr
    assert said[1].stderr.count("--policy is now --sampler") == 1
    assert "--policy" not in blockdiff("sample", "--help").stdout


def test_every_option_has_help_and_is_told(make_model):
    shown = " ".join(blockdiff("sample", "--help").stdout.split())
    for name, item in FIELDS.items():
        flag = item.metadata["flags"].partition("/")[0] or f"--{name.replace('_', '-')}"
        assert item.metadata["help"] and f"{flag} " in shown.replace("/", " ")
        assert f"{name}: {item.metadata['help']}" in (SamplingParams.__doc__ or "")


@pytest.mark.parametrize(("given", "options", "message"), [
    (None, dict(top_q=0.9), "'top_q' is no option; there are num_samples"),
    ({}, {}, r"params is \{\}; give SamplingParams"),
    (None, dict(temperature=0), r"temperature is 0; it must lie in \[0\.001"),
    (None, dict(top_p_rule="mine"), "choose one of transformers, authors"),
    (None, dict(max_new_tokens=0), "max_new_tokens is 0; it must be at least 1"),
])  # fmt: skip
def test_mistakes_are_told_in_one_sentence(make_model, given, options, message):
    with pytest.raises(UserError, match=message):
        blockdiffusion.generate(make_model(), None, given, **options)


def test_every_sampler_of_masked_diffusion_can_be_made():
    """The names that help shows are those that have a class behind them."""
    assert list(MASKED_SAMPLERS) == list(choosing._MASKED)
    assert set(SAMPLERS) == {
        name for family in choosing._FAMILIES.values() for name in family.names
    }
