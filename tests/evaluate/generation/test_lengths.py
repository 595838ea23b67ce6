"""Lengths of documents against a geometric law; stopping and going on."""

import math

import pytest
import torch
from scipy import stats

from blockdiffusion.errors import UserError
from blockdiffusion.evaluate.generation.lengths import DocumentLengths, document_lengths
from blockdiffusion.reports.terminal import length_lines

FALSE_ALARM = 1e-4


@pytest.fixture
def geometric(make_ar, make_model):
    """A network that ends its text at every token with probability 1/4, whatever it reads."""

    def make(kind="ar", **overrides):
        model = (make_ar if kind == "ar" else make_model)(eos_id=0, bos=False, **overrides)
        with torch.no_grad():
            model.output.weight.zero_()
            model.output.bias.zero_()
            model.output.bias[0] = math.log(11 / 3)  # of 12 tokens that are not the mask
        return model

    return make


@pytest.mark.parametrize(
    ("kind", "sizes"), [("ar", {}), ("block", {}), ("mdlm", dict(seq_len=4, block_size=4))]
)
def test_lengths_follow_their_law(geometric, kind, sizes):
    """Until EOS or the limit of 6 tokens, from each kind of model."""
    found = document_lengths(
        geometric(kind, **sizes), num_samples=2000, max_new_tokens=6, batch_size=1000
    )
    observed = [0] * 7
    for length, cut in zip(found.lengths, found.cut, strict=True):
        assert cut == (length == 6)
        observed[length] += 1
    law = [0.25 * 0.75**length for length in range(6)] + [0.75**6]
    assert stats.chisquare(observed, [2000 * p for p in law]).pvalue > FALSE_ALARM
    assert found.share_cut == observed[6] / 2000 and found.maximum == 6
    if kind == "ar":
        assert found.tokens_per_forward == 1


def test_a_measurement_that_was_stopped_goes_on(geometric, tmp_path, monkeypatch):
    model, options = geometric(), dict(num_samples=10, max_new_tokens=50, batch_size=4, seed=5)
    whole = document_lengths(model, **options)
    journal = tmp_path / "lengths.journal"
    told = []

    def stop(stage, done, total):
        told.append((stage, done, total))
        if done == 8:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        document_lengths(model, journal=journal, progress=stop, **options)
    assert told == [("documents", 4, 10), ("documents", 8, 10)] and journal.exists()
    sampled = []
    import blockdiffusion.evaluate.generation.lengths as module

    generate = module.generate
    monkeypatch.setattr(
        module, "generate", lambda *a, **o: sampled.append(o["num_samples"]) or generate(*a, **o)
    )
    again = document_lengths(model, journal=journal, **options)
    assert sampled == [2] and (again.lengths, again.cut) == (whole.lengths, whole.cut)
    assert again.nfe == whole.nfe and journal.exists()
    other = document_lengths(model, **{**options, "seed": 6})
    assert other.lengths != whole.lengths


def found(*lengths, limit=100):
    cut = tuple(length == limit for length in lengths)
    return DocumentLengths(
        lengths=lengths, cut=cut, max_new_tokens=limit, nfe=sum(lengths), seconds=1.0
    )


def test_the_histogram_counts_every_document_once():
    assert found(0, 1, 2, 3, 4, 7, 8, 100).histogram() == [
        (0, 2, 2), (2, 4, 2), (4, 8, 2), (8, 16, 1), (16, 32, 0), (32, 64, 0), (64, 128, 1)
    ]  # fmt: skip
    assert found(5).histogram() == [(4, 8, 1)] and found(0).histogram() == [(0, 2, 1)]


def test_the_summary_in_words():
    lines = length_lines(found(4, 7, 9, 100), "runs/demo")
    assert lines[0] == "runs/demo"
    text = "\n".join(lines)
    assert "median 8" in text and "max 100" in text and "mean 30.0" in text
    assert "25.0 % cut at 100 tokens" in text and "4 documents" in text
    bars = [line for line in lines if "█" in line]
    assert [line.split()[-1] for line in bars] == ["2", "1", "1"]


@pytest.mark.parametrize(("overrides", "options", "message"), [
    (dict(eos_id=None), {}, "names no EOS"),
    ({}, dict(num_samples=0), "num_samples is 0"),
    ({}, dict(batch_size=0), "batch_size is 0"),
    ({}, dict(max_new_tokens=0), "max_new_tokens is 0"),
])  # fmt: skip
def test_mistakes_are_told_in_one_sentence(make_ar, overrides, options, message):
    model = make_ar(**{"eos_id": 0, **overrides})
    with pytest.raises(UserError, match=message):
        document_lengths(model, **{"num_samples": 2, "max_new_tokens": 4, **options})
