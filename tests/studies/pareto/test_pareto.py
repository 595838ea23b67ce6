"""Operating points: which there are, what each comes to, and that none is measured twice."""

import csv
import io
import xml.etree.ElementTree as ET

import pytest

from blockdiffusion.errors import UserError
from blockdiffusion.evaluate.generation.run import GenerateEval, generate_and_judge
from blockdiffusion.evaluate.generation.samples import DrawOptions
from blockdiffusion.evaluate.likelihood import likelihood
from blockdiffusion.studies.pareto import run as module
from blockdiffusion.studies.pareto.picture import pareto_picture
from blockdiffusion.studies.pareto.points import AUTHORS, Point, parse_point, usual_points
from blockdiffusion.studies.pareto.run import Pareto, dominates, measure_pareto
from blockdiffusion.studies.pareto.table import csv_text, markdown_text
from tests.evaluate.judges import BYTES, save_gpt2, with_bytes
from tests.hostile import HOSTILE, check_csv, check_markdown, check_picture

DRAW = DrawOptions(num_samples=5, max_new_tokens=12, batch_size=3, eos=False, seed=4)
POINTS = ("first-hitting", "random:tokens_per_step=2", "confidence:threshold=0.0")


@pytest.fixture(scope="module")
def judge(tmp_path_factory):
    return str(save_gpt2(tmp_path_factory.mktemp("judge")))


@pytest.fixture
def measure(make_model, judge, tmp_path):
    model = with_bytes(make_model(**BYTES, seq_len=16))

    def measure(points=POINTS, draw=DRAW, out=tmp_path / "out", **more):
        options = Pareto(
            model="mine", judge=judge, out=out, draw=draw,
            points=tuple(parse_point(text) for text in points), **more,
        )  # fmt: skip
        return measure_pareto(options, load_model=lambda name: model)

    measure.model, measure.out = model, tmp_path
    return measure


def test_every_point_is_what_generate_eval_finds(measure, judge):
    result = measure()
    assert [point["label"] for point in result["points"]] == list(POINTS)
    # 12 tokens: 12 passes; pairs: 6; whole blocks of 4: 3.
    assert [point["calls_per_token"] for point in result["points"]] == [1, 1 / 2, 1 / 4]
    draw = DrawOptions(
        num_samples=5, max_new_tokens=12, batch_size=3, eos=False, seed=4, policy="random",
        tokens_per_step=2,
    )  # fmt: skip
    alone = generate_and_judge(
        GenerateEval(model="mine", judge=judge, draw=draw), load_model=lambda name: measure.model
    )
    found = result["points"][1]
    assert found["text"]["perplexity"] == pytest.approx(alone.text.perplexity, rel=1e-9)
    assert found["text"]["entropy"]["value"] == pytest.approx(alone.text.entropy.value, rel=1e-9)


def test_the_bound_is_that_of_the_samples(measure, monkeypatch):
    scored = []

    def remember(model, rows, **options):
        scored.append(rows)
        return likelihood(model, rows, **options)

    monkeypatch.setattr(module, "likelihood", remember)
    result = measure(points=POINTS[:1])
    assert [len(row) for row in scored[0]] == [12] * 5
    exact = likelihood(measure.model, scored[0], "exact")
    found = result["points"][0]["bound"]
    assert found["value"] == pytest.approx(exact.nats_per_token, rel=0.2)


def test_a_point_that_is_there_is_not_measured_again(measure, monkeypatch, tmp_path):
    first = measure(points=POINTS[:2])
    drawn = []
    original = module.draw_samples
    monkeypatch.setattr(
        module, "draw_samples", lambda *a, **k: drawn.append(a[1].policy) or original(*a, **k)
    )
    second = measure()
    assert drawn == ["confidence"]
    for before, after in zip(first["points"], second["points"], strict=False):
        assert before["text"] == after["text"] and before["bound"] == after["bound"]
    with pytest.raises(UserError, match="another --out"):
        measure(draw=DrawOptions(num_samples=5, max_new_tokens=12, seed=5, eos=False))


def test_a_killed_measurement_keeps_its_samples(measure, monkeypatch):
    def stop(*args, **options):
        raise KeyboardInterrupt

    original = module.evaluate_samples
    monkeypatch.setattr(module, "evaluate_samples", stop)
    with pytest.raises(KeyboardInterrupt):
        measure(points=POINTS[:1])
    monkeypatch.setattr(module, "evaluate_samples", original)
    monkeypatch.setattr(
        "blockdiffusion.evaluate.generation.samples.stream",
        lambda *a, **k: pytest.fail("drawn again"),
    )
    assert len(measure(points=POINTS[:1])["points"]) == 1


def test_tables_and_picture(measure, tmp_path):
    (tmp_path / "real.txt").write_text("It was the best of times, it was the worst. " * 20)
    result = measure(reference=(str(tmp_path / "real.txt"),))
    table = markdown_text(result)
    assert table.count("\n| ") == 5 and "real text" in table and "confidence:threshold=0.0" in table
    rows = list(csv.DictReader(io.StringIO(csv_text(result))))
    assert [float(row["calls_per_token"]) for row in rows] == [1, 0.5, 0.25]
    root = ET.fromstring(pareto_picture(result))
    dots = [n for n in root.iter() if n.tag.endswith("circle") and "dot" in n.get("class", "")]
    assert len(dots) == 3 * (2 * 3 + 1)  # two costs, three sides, and the legend
    assert pareto_picture(result).count("real text</text>") == 4
    result |= {"model": HOSTILE, "reference_source": HOSTILE, "warnings": [HOSTILE]}
    result["judge"]["name"] = result["points"][0]["label"] = HOSTILE
    check_csv(csv_text(result))
    check_markdown(markdown_text(result))
    check_picture(pareto_picture(result))


def test_the_authors_setting_is_measured_and_marked(measure):
    """With its own filters, whatever the other points have."""
    points = ("first-hitting:top_p=0.9,top_p_rule=authors", "first-hitting")
    result = measure(points=points)
    assert [point["is_authors"] for point in result["points"]] == [True, False]
    draw = DrawOptions(
        num_samples=5, max_new_tokens=12, batch_size=3, eos=False, seed=4, top_p=0.9,
        top_p_rule="authors",
    )  # fmt: skip
    again = measure(points=points[1:], draw=draw, out=measure.out / "again")
    assert [point["is_authors"] for point in again["points"]] == [True]
    assert again["points"][0]["text"] == result["points"][0]["text"] != result["points"][1]["text"]
    assert "| first-hitting:top_p=0.9,top_p_rule=authors (the authors' setting) |" in (
        markdown_text(result)
    )
    assert [row["is_authors"] for row in csv.DictReader(io.StringIO(csv_text(result)))] == [
        "1",
        "0",
    ]
    root = ET.fromstring(pareto_picture(result))
    rings = [n for n in root.iter() if n.tag.endswith("circle") and "ring" in n.get("class", "")]
    assert len(rings) == 2 * 3 + 1  # two costs, three sides, and the legend


def test_the_usual_points_have_the_authors_setting_once(make_model, measure, monkeypatch):
    assert usual_points(make_model().config)[0] == AUTHORS
    monkeypatch.setattr(module, "usual_points", lambda config: (AUTHORS, Point("first-hitting")))
    assert len(measure(points=())["points"]) == 2
    draw = DrawOptions(num_samples=5, max_new_tokens=12, top_p=0.9, top_p_rule="authors")
    (point,) = measure(points=(), draw=draw, out=measure.out / "again")["points"]
    assert point["label"] == "first-hitting" and point["is_authors"]


def test_dominated_points():
    def point(calls, perplexity, entropy):
        text = {"perplexity": perplexity, "entropy": {"value": entropy}}
        return {"calls_per_token": calls, "text": text}

    best = point(0.5, 20.0, 5.0)
    assert dominates(best, point(1.0, 20.0, 5.0)) and dominates(best, point(0.5, 21.0, 4.9))
    assert not dominates(best, best)
    assert not dominates(best, point(1.0, 19.0, 5.0))
    assert not dominates(best, point(1.0, 30.0, 5.1))  # another entropy is another text


@pytest.mark.parametrize("overrides", [
    {}, dict(block_size=16), dict(objective="score_entropy", time_conditioning=True),
    dict(objective="d3pm", timesteps=5, time_conditioning=True), dict(time_conditioning=True),
])  # fmt: skip
def test_usual_points_fit_their_network(make_model, overrides):
    config = make_model(**overrides).config
    points = usual_points(config)
    for point in points:
        point.check(config)
        assert parse_point(point.label) == point
    assert len(set(points)) == len(points) > 2


@pytest.mark.parametrize(("text", "message"), [
    ("confidence:treshold=1", "treshold"), ("ancestral:steps=many", "no int"),
    ("best", "unknown policy"), ("first-hitting:top_p=2", r"top_p is 2\.0; it must"),
    ("random:tokens_per_step=5", "at most 4"),
    ("first-hitting:steps=3", "no meaning"),
])  # fmt: skip
def test_a_point_that_there_is_not(make_model, text, message):
    with pytest.raises(UserError, match=message):
        parse_point(text).check(make_model().config)


def test_nothing_to_choose(make_ar):
    with pytest.raises(UserError, match="autoregressive"):
        usual_points(make_ar().config)
    with pytest.raises(UserError, match="autoregressive"):
        Point("first-hitting").check(make_ar().config)
    assert Point("first-hitting").label == "first-hitting"
