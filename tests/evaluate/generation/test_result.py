"""The whole evaluation: its numbers from those of every sample, its tables, its picture."""

import csv
import io
import json
import math
import sys
import xml.etree.ElementTree as ET
from types import SimpleNamespace

import numpy as np
import pytest

from blockdiffusion.data.options import PrepareOptions
from blockdiffusion.data.packing import prepare
from blockdiffusion.data.tokenizers import byte_tokenizer
from blockdiffusion.errors import UserError
from blockdiffusion.evaluate.generation.judge import CausalJudge, DiffusionJudge, load_judge
from blockdiffusion.evaluate.generation.mauve_score import mauve_score
from blockdiffusion.evaluate.generation.metrics import distinct, self_bleu, token_entropy
from blockdiffusion.evaluate.generation.picture import generation_picture
from blockdiffusion.evaluate.generation.reference import reference_samples
from blockdiffusion.evaluate.generation.result import Conditions, evaluate_samples
from blockdiffusion.evaluate.generation.run import GenerateEval, generate_and_judge, samples_file
from blockdiffusion.evaluate.generation.samples import Drawn, DrawOptions, Sample
from blockdiffusion.evaluate.generation.table import (
    check_comparable,
    columns,
    csv_text,
    markdown_text,
    number,
    read_result,
    with_error,
)
from blockdiffusion.reports.terminal import generation_lines
from tests.evaluate.judges import BYTES, save_gpt2, with_bytes
from tests.hostile import HOSTILE, check_csv, check_markdown, check_picture

TEXTS = ["It was the best", "of times, of times, of times", "", "xyz", "aaaa aaaa aaaa", "o"]
REAL = ["the worst of times", "that there ever was"]


def sample_of(text, **more):
    return Sample(text=text, documents=(text,) if text else (), **more)


@pytest.fixture(scope="module")
def judge(tmp_path_factory):
    return load_judge(str(save_gpt2(tmp_path_factory.mktemp("judge"))))


@pytest.fixture(scope="module")
def result(judge):
    samples = [
        sample_of(text, length=len(text), nfe=len(text) + 2, seconds=0.5, ended=index % 2 == 0)
        for index, text in enumerate(TEXTS)
    ]
    conditions = Conditions(label="mine", warnings=("watch | out",), reference_source="the tale")
    real = [sample_of(text) for text in REAL]
    return evaluate_samples(Drawn(samples, 8, 2), judge, conditions, reference=real)


def test_the_numbers_are_those_of_the_samples(result):
    rows = [row for row in result.per_sample if row["tokens"]]
    assert [row["tokens"] for row in result.per_sample] == [len(text) for text in TEXTS]
    nats, tokens = [row["nats"] for row in rows], [row["tokens"] for row in rows]
    text = result.text
    assert (text.num_samples, text.num_empty, text.num_tokens) == (6, 1, sum(tokens))
    assert text.perplexity == pytest.approx(math.exp(sum(nats) / sum(tokens)))
    low, high = text.interval
    assert math.sqrt(low * high) == pytest.approx(text.perplexity)
    reach = 1.959964 * text.nats_per_token.stderr
    assert high / text.perplexity == pytest.approx(math.exp(reach))
    each = [math.exp(n / t) for n, t in zip(nats, tokens, strict=True)]
    assert text.mean_perplexity.value == pytest.approx(np.mean(each))
    assert text.mean_perplexity.stderr == pytest.approx(np.std(each, ddof=1) / math.sqrt(5))
    ids = [list(t.encode()) for t in TEXTS if t]
    assert text.entropy.value == pytest.approx(np.mean([token_entropy(i) for i in ids]))
    assert text.pooled_entropy == pytest.approx(token_entropy([t for i in ids for t in i]))
    assert text.distinct == {n: distinct(ids, n) for n in (1, 2, 3, 4)}
    assert text.self_bleu == self_bleu(ids)
    fourgrams = {"It was the best": 0, TEXTS[1]: 15 / 25, "aaaa aaaa aaaa": 6 / 11}
    assert text.repetition[4].value == pytest.approx(sum(fourgrams.values()) / 3)
    assert text.longest_repeat.value == pytest.approx((1 / 15 + 18 / 28 + 0 + 9 / 14 + 0) / 5,
                                                      abs=0.02)  # fmt: skip


def test_lengths_and_cost(result):
    lengths, cost = result.lengths, result.cost
    known = [len(text) for text in TEXTS]
    assert lengths.median == np.median(known) and lengths.maximum == max(known)
    assert lengths.ended == 0.5 and sum(lengths.counts) == 6
    assert cost.nfe.value == pytest.approx(np.mean(known) + 2)
    assert cost.tokens_per_forward == pytest.approx((sum(known) + 3) / (sum(known) + 12))
    assert cost.tokens_per_second == pytest.approx((sum(known) + 3) / 3)
    assert (result.drawn, result.rejected) == (8, 2)


def test_everything_is_written(result, tmp_path):
    values = json.loads(json.dumps(result.to_dict()))
    (tmp_path / "r.json").write_text(json.dumps(values))
    again = read_result(tmp_path / "r.json")
    assert again["text"]["perplexity"] == result.text.perplexity
    mine, real = csv.DictReader(io.StringIO(csv_text([again])))
    assert float(mine["perplexity"]) == result.text.perplexity and mine["label"] == "mine"
    assert float(mine["rep_4"]) == result.text.repetition[4].value
    assert float(real["perplexity"]) == result.reference.perplexity
    assert real["label"] == "real text (the tale)" and real["nfe"] == ""
    assert columns(result.to_dict()) == columns(again)
    page = markdown_text([again])
    table = [line for line in page.splitlines() if line.startswith("|")]
    assert len(table) == 4 and len({line.count("|") for line in table}) == 1
    assert number(result.text.perplexity) in page and "* watch | out" in page
    lines = generation_lines(again)
    assert max(map(len, lines)) <= 100 and "  warning: watch | out" in lines
    assert any(number(result.reference.perplexity) in line for line in lines)


def test_the_picture_has_a_dot_for_every_result_and_text(result):
    values = result.to_dict()
    other = {**values, "label": "a <second> & more", "lengths": None}
    picture = ET.fromstring(generation_picture([values, other]))
    dots = [e for e in picture.iter() if e.tag.endswith("circle")]
    assert len(dots) == 2 * 3  # the real text once; each in the plot and in the legend
    assert sum("real" in e.get("class") for e in dots) == 2
    bars = [e for e in picture.iter() if e.get("class") == "bar"]
    assert len(bars) == sum(count > 0 for count in values["lengths"]["counts"])
    words = " ".join(e.text or "" for e in picture.iter())
    assert "a <second> & more" in words and "33 % ended" not in words and "50 % ended" in words


def test_text_from_outside_does_no_harm(result):
    judge = {**result.to_dict()["judge"], "name": HOSTILE}
    values = {
        **result.to_dict(), "label": HOSTILE, "model": HOSTILE, "judge": judge,
        "reference_source": HOSTILE, "warnings": [HOSTILE],
    }  # fmt: skip
    check_csv(csv_text([values]))
    check_markdown(markdown_text([values], [HOSTILE]))
    check_picture(generation_picture([values]))


def test_dots_stand_at_their_values(result):
    """Linear in entropy, logarithmic in perplexity."""
    values = result.to_dict()

    def moved(entropy, perplexity):
        text = {**values["text"], "entropy": {"value": entropy, "stderr": None},
                "perplexity": perplexity, "interval": None}  # fmt: skip
        return {**values, "text": text, "reference": None}

    picture = ET.fromstring(generation_picture([moved(1, 10), moved(2, 20), moved(3, 40)]))
    dots = [e for e in picture.iter() if e.tag.endswith("circle")][:3]
    x, y = ([float(e.get(name)) for e in dots] for name in ("cx", "cy"))
    assert x[1] - x[0] == pytest.approx(x[2] - x[1], abs=0.2) and x[1] > x[0]
    assert y[1] - y[0] == pytest.approx(y[2] - y[1], abs=0.2) and y[1] < y[0]


def test_a_picture_of_one_sample_without_errors(judge):
    alone = evaluate_samples(
        Drawn([sample_of("abc", length=3)], 1, 0), judge, Conditions(label="one")
    )
    assert alone.text.interval is None and alone.text.self_bleu is None and alone.cost is None
    assert "all samples have 3 tokens" in generation_picture([alone.to_dict()])
    assert generation_lines(alone.to_dict()) and csv_text([alone.to_dict()])
    assert "±" not in markdown_text([alone.to_dict()])


def test_a_bound_is_marked_everywhere(make_model):
    judge = DiffusionJudge("ours", with_bytes(make_model(**BYTES, seq_len=16, bos=False)))
    samples = [sample_of(text) for text in TEXTS]
    values = evaluate_samples(Drawn(samples, 6, 0), judge, Conditions(label="x")).to_dict()
    assert values["judge"]["is_bound"]
    assert sum("<= " in line for line in generation_lines(values)) == 2
    assert "bound on gen. perplexity" in markdown_text([values])
    assert "≤ " in markdown_text([values]) and "upper bound on" in generation_picture([values])
    assert ",True," in csv_text([values])


def test_results_of_different_judges_do_not_compare(result):
    values = result.to_dict()
    assert check_comparable([values, values], ["a", "b"]) == []
    fewer = {**values, "text": {**values["text"], "num_samples": 3}}
    (note,) = check_comparable([values, fewer], ["a", "b"])
    assert "depend on the number of samples" in note
    longer = {**values, "lengths": {**values["lengths"], "median": 99}}
    assert "length" in check_comparable([values, longer], ["a", "b"])[0]
    for key, words in (("fingerprint", "another judge"), ("stride", "another stride")):
        other = {**values, "judge": {**values["judge"], key: 1}}
        with pytest.raises(UserError, match=f"b was judged with {words}"):
            check_comparable([values, other], ["a", "b"])


def test_what_is_no_result_is_refused(tmp_path):
    for content, message in (
        ("{", "not valid JSON"),
        ("[]", "keys with values"),
        ("{}", "is not what"),
    ):
        (tmp_path / "r.json").write_text(content)
        with pytest.raises(UserError, match=message):
            read_result(tmp_path / "r.json")
    with pytest.raises(UserError, match="cannot read"):
        read_result(tmp_path / "none.json")


def test_numbers_as_people_write_them():
    shown = [number(v) for v in (None, 0, 128.0, 12.3456, 0.01234, 88198.6, 6.6e13, math.inf)]
    assert shown == ["", "0", "128", "12.35", "0.0123", "88,199", "6.6e13", "inf"]
    assert with_error({"value": 12.3456, "stderr": 0.0321}) == "12.346 ± 0.032"
    assert with_error({"value": 0.0, "stderr": 0.0}) == "0" and with_error(None) == ""


def test_nothing_to_judge_is_refused(judge):
    with pytest.raises(UserError, match="all 2 samples are empty"):
        evaluate_samples(Drawn([sample_of(""), sample_of("")], 2, 0), judge, Conditions(label="x"))


# --- MAUVE and real text --------------------------------------------------------------------------


def test_mauve_gets_features_of_real_text_and_of_samples(judge, monkeypatch):
    given = {}

    def compute_mauve(**options):
        given.update(options)
        return SimpleNamespace(mauve=0.25)

    monkeypatch.setitem(sys.modules, "mauve", SimpleNamespace(compute_mauve=compute_mauve))
    real = [sample_of(text) for text in REAL]
    drawn = Drawn([sample_of(text) for text in TEXTS], 6, 0)
    found = evaluate_samples(
        drawn, judge, Conditions(label="x", seed=3), reference=real, mauve=True
    )
    assert found.mauve == 0.25 and given["seed"] == 3
    assert given["p_features"].shape == (2, 16) and given["q_features"].shape == (5, 16)
    assert "  MAUVE                 0.2500" in generation_lines(found.to_dict())
    with pytest.raises(UserError, match="compares with real text"):
        evaluate_samples(drawn, judge, Conditions(label="x"), mauve=True)


def test_mauve_of_the_package():
    """Equal texts are not told apart, far ones are (its own k-means; a fixed seed)."""
    pytest.importorskip("mauve", reason="mauve-text is not installed (extra: metrics)")
    source = np.random.default_rng(0)
    one = source.normal(size=(200, 8)).astype(np.float32)
    assert mauve_score(one, one) > 0.95
    assert mauve_score(one, one + 20) < 0.2


def test_mauve_without_its_package(judge, monkeypatch):
    monkeypatch.setitem(sys.modules, "mauve", None)
    with pytest.raises(UserError, match=r"blockdiffusion\[metrics\]"):
        evaluate_samples(
            Drawn([sample_of("ab")], 1, 0), judge, Conditions(label="x"), reference=[], mauve=True
        )


def test_real_text_is_cut_to_the_length_of_samples(tmp_path):
    text = "".join(f"{n:04d} lines of text in the tale\n" for n in range(60))
    (tmp_path / "a.txt").write_text(text)
    pieces = reference_samples([str(tmp_path / "a.txt")], 5, 40, byte_tokenizer())
    starts = [text.index(piece.text) for piece in pieces]
    assert len(pieces) == 5 and all(len(piece.text) == 40 for piece in pieces)
    assert starts == sorted(starts) and all(start % 40 == 0 for start in starts)
    assert starts[-1] - starts[0] > len(text) / 2  # spread over it
    prepare([str(tmp_path / "a.txt")], tmp_path / "data", PrepareOptions(
        seq_len=32, tokenizer="byte", row_bos=True, document_bytes=100, num_workers=1,
    ))  # fmt: skip
    rows = reference_samples([str(tmp_path / "data")], 3, 20, None, "train")
    assert len(rows) == 3
    for row in rows:
        assert sum(map(len, row.documents)) in (19, 20)  # an EOS may stand between
        assert all(document in text for document in row.documents)
    with pytest.raises(UserError, match="no split 'test'"):
        reference_samples([str(tmp_path / "data")], 3, 20, None, "test")
    with pytest.raises(UserError, match="there is no file"):
        reference_samples([str(tmp_path / "none.txt")], 3, 20, byte_tokenizer())


# --- From options to the result -------------------------------------------------------------------


def test_a_killed_evaluation_goes_on_to_the_same_result(make_model, tmp_path, monkeypatch):
    model = with_bytes(make_model(**BYTES))
    options = GenerateEval(
        model="m",
        judge=str(save_gpt2(tmp_path / "judge")),
        draw=DrawOptions(num_samples=5, max_new_tokens=12, batch_size=2),
    )

    def run(place):
        return generate_and_judge(options, load_model=lambda _: model, beside=tmp_path / place)

    whole = run("whole.json").to_dict()
    with monkeypatch.context() as patch:
        patch.setattr(CausalJudge, "nll", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            run("cut.json")
    assert samples_file(tmp_path / "cut.json").name == "cut.samples.jsonl"
    again = run("cut.json").to_dict()
    for name in ("text", "lengths", "per_sample", "judge", "sampling", "drawn", "rejected"):
        assert again[name] == whole[name]


def test_options_that_make_no_sense_are_refused():
    for changes, message in (
        (dict(model=None), "nothing to judge"), (dict(mauve=True), "compares with real text"),
        (dict(min_entropy=-1.0), "above 0"),
    ):  # fmt: skip
        with pytest.raises(UserError, match=message):
            GenerateEval(**{"model": "m", "judge": "j", **changes})
