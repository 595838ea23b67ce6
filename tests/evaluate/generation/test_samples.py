"""Samples: drawn so that a killed run goes on, guarded openly, and read from any JSON lines."""

import json

import pytest

from blockdiffusion.errors import UserError
from blockdiffusion.evaluate.generation import samples as sampling
from blockdiffusion.evaluate.generation.metrics import token_entropy
from blockdiffusion.evaluate.generation.samples import (
    DrawOptions,
    EntropyGuard,
    documents_of,
    draw_samples,
    read_samples,
)
from blockdiffusion.runtime.seeding import seeded
from blockdiffusion.sampling import generate
from tests.evaluate.scorers import BYTES, with_bytes


@pytest.fixture
def model(make_model):
    return with_bytes(make_model(**BYTES))


def options(**changes):
    return DrawOptions(**{**dict(num_samples=7, max_new_tokens=10, batch_size=3, eos=False),
                          **changes})  # fmt: skip


def without_time(samples):
    return [(s.text, s.ids, s.length, s.nfe, s.seed, s.ended, s.documents) for s in samples]


def test_samples_are_those_of_generate(model):
    """Each batch again from the seed that its samples state."""
    drawn = draw_samples(model, options(top_p=0.9, bos=True))
    assert (len(drawn.samples), drawn.drawn, drawn.rejected) == (7, 7, 0)
    for first, rows in ((0, 3), (3, 3), (6, 1)):
        batch = drawn.samples[first : first + rows]
        again = generate(
            model, num_samples=rows, max_new_tokens=10, eos=False, top_p=0.9, bos=True,
            generator=seeded(batch[0].seed),
        )  # fmt: skip
        assert [list(s.ids) for s in batch] == again.sequences.tolist()
        assert [s.text for s in batch] == again.texts
        assert [s.nfe for s in batch] == again.nfe.tolist()
        assert {s.length for s in batch} == {10} and batch[0].seconds > 0


def test_eight_bits_are_asked_of_the_copy_and_kept_apart(model, monkeypatch, tmp_path):
    """A copy in 8 bits draws other samples, so they are not taken for those of the network."""
    asked = []

    def copy(model, *, int8):
        asked.append(int8)
        return model

    monkeypatch.setattr(sampling, "optimize_for_inference", copy)
    file = tmp_path / "samples.jsonl"
    draw_samples(model, options(int8=True), file=file)
    with pytest.raises(UserError, match="other options"):
        draw_samples(model, options(), file=file)
    assert asked == [True]


def test_an_eos_ends_a_sample_and_is_not_counted(model):
    model.output.weight.data.zero_()
    model.output.bias.data.zero_()[256] = 2  # an EOS with probability 0.028
    drawn = draw_samples(model, options(eos=True, max_new_tokens=30, num_samples=12))
    ended = [sample for sample in drawn.samples if sample.ended]
    assert ended and len(ended) < 12
    for sample in drawn.samples:
        assert sample.length == len(sample.ids) - sample.ended == sum(t != 256 for t in sample.ids)
        assert sample.ended == (sample.ids[-1] == 256)
        assert len(sample.documents) <= 1
    through = draw_samples(model, options(max_new_tokens=30)).samples
    assert any(len(sample.documents) > 1 for sample in through)
    assert {sample.ended for sample in through} == {False}


def test_documents_end_at_an_eos(model):
    ids = [97, 98, 256, 256, 99, 256]
    assert documents_of(ids, 256, model.tokenizer) == ("ab", "c")
    assert documents_of([256], 256, model.tokenizer) == ()
    assert documents_of([97], None, model.tokenizer) == ("a",)


def test_a_killed_run_goes_on(model, tmp_path, monkeypatch):
    whole = draw_samples(model, options())
    real, calls = sampling.stream, []

    def interrupted(*args, **more):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(*args, **more)

    file = tmp_path / "s.jsonl"
    monkeypatch.setattr(sampling, "stream", interrupted)
    with pytest.raises(KeyboardInterrupt):
        draw_samples(model, options(), file=file)
    kept = file.read_bytes()
    first, *_ = kept.splitlines(keepends=True)
    # Half of the next batch: a line and a half.
    begun = first.replace(b'"batch": [0, ', b'"batch": [3, ').replace(b'"index": 0', b'"index": 3')
    file.write_bytes(kept + begun + begun[:100])
    seen = []
    resumed = draw_samples(model, options(), file=file, progress=lambda *call: seen.append(call))
    assert without_time(resumed.samples) == without_time(whole.samples)
    assert len(calls) == 4 and seen[-1] == (70, 70)
    assert [json.loads(line)["index"] for line in file.read_text().splitlines()] == list(range(7))
    assert without_time(read_samples(file)) == without_time(whole.samples)
    assert without_time(draw_samples(model, options(), file=file).samples) == without_time(
        whole.samples
    )
    assert len(calls) == 4  # all was there


def test_a_batch_that_claims_to_be_huge_takes_no_memory(model, tmp_path):
    file = tmp_path / "s.jsonl"
    whole = draw_samples(model, options(), file=file)
    claim = b'"batch": [0, 1' + b"0" * 30 + b"]"
    file.write_bytes(file.read_bytes().replace(b'"batch": [0, 3]', claim, 1))
    assert without_time(draw_samples(model, options(), file=file).samples) == without_time(
        whole.samples
    )
    assert claim not in file.read_bytes()


def test_more_samples_go_on_from_fewer(model, tmp_path, monkeypatch):
    file = tmp_path / "s.jsonl"
    few = draw_samples(model, options(num_samples=6), file=file)
    calls = []
    real = sampling.stream
    monkeypatch.setattr(sampling, "stream", lambda *a, **k: calls.append(1) or real(*a, **k))
    many = draw_samples(model, options(num_samples=12), file=file)
    assert without_time(many.samples[:6]) == without_time(few.samples) and len(calls) == 2
    fresh = draw_samples(model, options(num_samples=12))
    assert without_time(fresh.samples) == without_time(many.samples)
    again = draw_samples(model, options(num_samples=6), file=file)  # fewer: nothing is lost
    assert without_time(again.samples) == without_time(few.samples)
    assert without_time(read_samples(file)) == without_time(many.samples)
    short = draw_samples(model, options(num_samples=13), file=file)
    draw_samples(model, options(num_samples=15), file=file)  # completes the last batch
    again = read_samples(file)
    assert len(again) == 15 and again[12].ids == short.samples[12].ids


def test_a_file_of_something_else_is_left_alone(model, tmp_path):
    file = tmp_path / "s.jsonl"
    draw_samples(model, options(), file=file)
    before = file.read_bytes()
    for changes in (dict(seed=1), dict(top_p=0.5), dict(max_new_tokens=11), dict(bos=True),
                    dict(batch_size=4)):  # fmt: skip
        with pytest.raises(UserError, match="other options"):
            draw_samples(model, options(**changes), file=file)
    model.output.bias.data += 0.1
    with pytest.raises(UserError, match="another model"):
        draw_samples(model, options(), file=file)
    assert file.read_bytes() == before
    file.write_text('{"text": "mine"}\n')
    with pytest.raises(UserError, match="choose another place"):
        draw_samples(model, options(), file=file)


def test_a_guard_rejects_openly(model, tmp_path):
    """Accepted are the first that pass, of the same samples as without it."""
    every = draw_samples(model, options(num_samples=12)).samples
    entropies = [token_entropy(s.ids[-8:]) for s in every]
    limit = max(entropies)  # of eight tokens that differ
    assert min(entropies[:6]) < limit
    guard = EntropyGuard(min_entropy=limit, window=8, step=100)
    file = tmp_path / "s.jsonl"
    drawn = draw_samples(model, options(num_samples=6), file=file, guard=guard)
    assert len(drawn.samples) == 6 and drawn.rejected > 0
    assert all(token_entropy(s.ids[-8:]) >= limit for s in drawn.samples)
    kept = read_samples(file)
    assert len(kept) == drawn.drawn
    passing = [s for s in kept if guard.accepts(s)]
    assert len(passing) == drawn.drawn - drawn.rejected
    assert without_time(passing[:6]) == without_time(drawn.samples)
    assert not EntropyGuard(min_entropy=99, window=9).accepts(every[0])
    assert EntropyGuard(min_entropy=99, window=10).accepts(every[0])  # not longer than the window
    with pytest.raises(UserError, match="accepted 0 of"):
        draw_samples(model, options(num_samples=1), guard=EntropyGuard(min_entropy=99, window=4))


def test_samples_from_elsewhere(tmp_path):
    file = tmp_path / "s.jsonl"
    file.write_text(
        '{"text": "one"}\n\n{"text": "", "ids": [1, 2, 3], "prompt_tokens": 1, "nfe": 4}\n'
    )
    one, two = read_samples(file)
    assert (one.text, one.documents, one.ids, one.length) == ("one", ("one",), None, None)
    assert (two.documents, two.ids, two.length, two.nfe) == ((), (1, 2, 3), 2, 4)
    with pytest.raises(UserError, match="have no ids"):
        EntropyGuard().accepts(one)


@pytest.mark.parametrize(("content", "message"), [
    ("", "no sample in"), ("\n\n", "no sample in"), ("plain text\n", "line 1 of"),
    ('{"text": "a"}\n{"txt": "b"}\n', "line 2 of"), ('{"text": 3}\n', "line 1 of"),
    ("[1]\n", "line 1 of"),
])  # fmt: skip
def test_files_without_samples_are_refused(tmp_path, content, message):
    (tmp_path / "s.jsonl").write_text(content)
    with pytest.raises(UserError, match=message):
        read_samples(tmp_path / "s.jsonl")


def test_bad_options_are_refused(model, make_model, tmp_path):
    for changes, message in (
        (dict(num_samples=0), "num_samples is 0"), (dict(batch_size=0), "batch_size is 0"),
        (dict(max_new_tokens=0), "max_new_tokens is 0"),
        (dict(top_p=0), "top_p is 0"),
    ):  # fmt: skip
        with pytest.raises(UserError, match=message):
            options(**changes)
    for entropy, window in ((0, 256), (4, 0)):
        with pytest.raises(UserError, match=r"above 0|at least 1"):
            EntropyGuard(min_entropy=entropy, window=window)
    with pytest.raises(UserError, match="no tokenizer"):
        draw_samples(make_model(), options())
    with pytest.raises(UserError, match="cannot read "):
        read_samples(tmp_path / "none.jsonl")


def test_every_line_says_what_it_is(model, tmp_path):
    draw_samples(model, options(num_samples=1), file=tmp_path / "s.jsonl")
    (line,) = (tmp_path / "s.jsonl").read_text().splitlines()
    record = json.loads(line)
    assert record["index"] == 0 and record["batch"] == [0, 1] and len(record["ids"]) == 10
    assert {"text", "documents", "length", "ended", "nfe", "seconds", "seed"} <= record.keys()
