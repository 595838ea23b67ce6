"""Every table from text to page, at the size of seconds, on this project's own pages."""

import json
import signal
from dataclasses import replace

import pytest

from blockdiffusion.data.options import PrepareOptions
from blockdiffusion.data.packing import prepare
from blockdiffusion.errors import UserError
from blockdiffusion.reproduce import Reproduced, conductor, plan_tables, reproduce
from blockdiffusion.reproduce.cells import document_tokens
from blockdiffusion.reproduce.kept import Kept
from blockdiffusion.reproduce.paper import TABLES
from blockdiffusion.reproduce.plan import make_plan
from blockdiffusion.train.loop import BatchOrder
from tests.reproduce.toy import DOCS, TOY, InProcess, write_pages


@pytest.fixture(scope="module", autouse=True)
def no_waiting():
    patch = pytest.MonkeyPatch()
    patch.setattr(conductor, "SECONDS_BETWEEN_LOOKS", 0.0)
    yield
    patch.undo()


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("reproduce")
    (folder / "passages.jsonl").write_text(
        "".join(
            json.dumps({"text": " ".join(part.split())}) + "\n"
            for part in (DOCS / "concepts.md").read_text().split("\n\n")[:40]
        )
    )
    pages = write_pages(folder / "text")
    return [f"wikitext2={pages}", f"lambada={folder / 'passages.jsonl'}",
            f"judge={DOCS / 'how-to'}"]  # fmt: skip


def few(name, *systems):
    """A table with a few of its rows."""
    table = TABLES[name]
    rows = tuple(row for row in table.rows if row.system in systems)
    return replace(table, rows=rows, chains=(systems,))


SMALLER = [
    *(TABLES[name] for name in ("T3", "T5", "T6", "T7")),
    few("T1", "t1-ar", "t1-linear", "t1-tuned"),
    few("T2", "t2-sL-0.3-0.8", "t2-sL-0-1"),
    few("T8", "t8-s4-0.45-0.95", "t8-s4-log"),
]


@pytest.fixture(scope="module")
def made(data, tmp_path_factory):
    out = tmp_path_factory.mktemp("made")
    said = []
    plan = make_plan(SMALLER, TOY, out, data)
    found = reproduce(plan, said.append, InProcess())
    return plan, {one.name: one for one in found}, said


def column(made: Reproduced, name: str) -> dict[str, dict]:
    """system -> what was measured in a column."""
    rows = made.values["rows"]
    return {row["system"]: row["ours"][name] for row in rows if name in row["ours"]}


def test_every_table_stands_beside_the_papers(made):
    plan, found, _ = made
    assert list(found) == ["T3", "T5", "T6", "T7", "T1", "T2", "T8"]
    for table in plan.tables:
        one = found[table.name]
        page = one.markdown.read_text()
        assert json.loads(one.json.read_text()) == one.values
        assert page.startswith(f"# {table.name} at the scale toy: ")
        for row in table.rows:
            assert f"| {row.label}" in page
            for figure in row.figures.values():
                assert f"{figure.value:,.{table.places}f}" in page or table.name == "T5"
        assert one.values["said"] and all(f"* {said}" in page for said in one.values["said"])
        assert str(plan.out) not in page


def test_perplexities_are_bounds_where_they_are(made):
    t3 = column(made[1]["T3"], "perplexity")
    assert list(t3) == [row.system for row in TABLES["T3"].rows]
    assert [name for name, cell in t3.items() if not cell["is_bound"]] == ["ar"]
    assert all(1 < cell["value"] < 320 and cell["stderr"] > 0 for cell in t3.values())
    assert t3["s4"]["estimator"] == "exact" and t3["s4"]["exact_perplexity"] <= t3["s4"]["value"]
    assert {t3[name]["estimator"] for name in ("mdlm", "s8", "s16")} == {"complement"}
    assert len({cell["num_tokens"] for cell in t3.values()}) == 1
    (order,) = made[1]["T3"].values["orders"]
    assert order["expected"][0] == "ar" and len(order["comparisons"]) == 6
    assert all(one["is_paired"] for one in order["comparisons"])
    t1 = column(made[1]["T1"], "perplexity")
    assert not any(cell["is_bound"] for cell in t1.values())  # S = 1 is exact


def test_the_noise_of_the_loss_is_measured_with_the_noise_of_training(made):
    t1 = column(made[1]["T1"], "variance")
    assert list(t1) == ["t1-linear", "t1-tuned"]
    assert t1["t1-linear"]["loss_variance"] > 0
    assert t1["t1-tuned"]["loss_variance"] == 0  # everything masked: data alone are left
    t8 = column(made[1]["T8"], "variance")
    assert t8["t8-s4-0.45-0.95"]["value"] < t8["t8-s4-log"]["value"]
    assert len(column(made[1]["T2"], "variance")) == 2


def test_zero_shot_sets_that_are_not_given_are_left_out(made):
    table = made[1]["T5"]
    assert {name for row in table.values["rows"] for name in row["ours"]} == {"lambada"}
    assert "Lambada, ours" in table.markdown.read_text()
    assert "PTB, ours" not in table.markdown.read_text()


def test_documents_are_counted_and_limited(made):
    longest = column(made[1]["T6"], "max")
    assert longest["sedd"]["value"] <= 31 and longest["mdlm"]["value"] <= 31
    assert longest["s16"]["value"] <= 40 and longest["ar"]["value"] <= 40
    plan = made[0]
    own = document_tokens(plan.step("prepare-pages").product)
    assert column(made[1]["T6"], "median")["data"]["value"] == sorted(own)[len(own) // 2]
    assert own.min() > 0 and len(own) > 40


def test_document_tokens_are_those_between_the_ends(tmp_path):
    lines = ["abc", "de", "f" * 20, "ghij" * 3, "k"]
    (tmp_path / "text.txt").write_text("\n".join(lines))
    options = dict(seq_len=8, tokenizer="byte", documents="line", valid_fraction=0.0)
    for number, framed in enumerate(({}, {"row_bos": True, "row_eos": True})):
        out = tmp_path / f"rows{number}"
        prepare([str(tmp_path / "text.txt")], out, PrepareOptions(**options, **framed))
        # 43 tokens with every EOS; rows hold 40 of them, framed 42: what ends there is counted.
        assert document_tokens(out).tolist() == [3, 2, 20, 12][: 3 + number]
    out = tmp_path / "none"
    prepare([str(tmp_path / "text.txt")], out, PrepareOptions(**options, document_eos=False))
    with pytest.raises(UserError, match="no EOS after its documents"):
        document_tokens(out)


def test_generated_text_has_entropy_and_calls_beside_it(made):
    plan, found, _ = made
    short, long = column(found["T7"], "L"), column(found["T7"], "2L")
    assert set(short) - set(long) == {"sedd"}
    for cells, length in ((short, 31), (long, 63)):
        for cell in cells.values():
            assert cell["samples"] == 3 and cell["nfe"] >= length and cell["value"] > 1
            assert cell["entropy"]["value"] > 0
    notes = " ".join(found["T7"].values["notes"])
    assert "Judge: runs/judge, autoregressive" in notes and plan.judge.endswith("runs/judge")
    judge, judged = (plan.step(name).run for name in ("train-judge", "train-pages-ar"))
    assert judge.parameters > judged.parameters


def test_what_is_made_is_left_alone(made, data):
    plan, found, _ = made
    again = InProcess()
    repeated = reproduce(make_plan(SMALLER, TOY, plan.out, data), lambda line: None, again)
    assert again.commands == []
    assert [one.values for one in repeated] == [one.values for one in found.values()]


def test_another_recipe_never_overwrites_a_run(made, data):
    plan = made[0]
    faster = replace(TOY, optim={**TOY.optim, "lr": 2e-2})
    with pytest.raises(UserError, match=r"runs/pages-ar was trained with other settings, data or"):
        reproduce(plan_tables(["T3"], faster, plan.out, data), lambda line: None, InProcess())
    kept = Kept(plan)
    assert all(kept.state(step) == "done" for step in plan.steps)


def test_a_measurement_follows_its_run_and_options(made, data):
    plan = made[0]
    fewer = replace(TOY, measure=replace(TOY.measure, rows=6))
    other = plan_tables(["T3"], fewer, plan.out, data)
    states = {step.name: Kept(other).state(step) for step in other.steps}
    assert {name for name, state in states.items() if state == "out of date"} == {
        step.name for step in other.steps if step.kind == "measure"
    }


def test_interrupted_and_resumed_is_as_uninterrupted(made, data, tmp_path, monkeypatch):
    table = few("T3", "mdlm", "s4")
    plan = make_plan([table], TOY, tmp_path, data)
    steps = iter([3])  # of the base: its third update is interrupted
    indices = BatchOrder.indices

    def interrupted(self, step):
        if step + 1 == next(steps, None):
            signal.raise_signal(signal.SIGINT)
        return indices(self, step)

    class Stopping(InProcess):
        def __call__(self, command, log, threads):
            if "pages-base" not in command[1]:
                return super().__call__(command, log, threads)
            with monkeypatch.context() as patch:
                patch.setattr(BatchOrder, "indices", interrupted)
                return super().__call__(command, log, threads)

    steps = iter([None, None, 3])
    with pytest.raises(UserError, match="the step train-pages-base failed: it ended with code 130"):
        reproduce(plan, lambda line: None, Stopping())
    base = plan.step("train-pages-base")
    assert Kept(plan).state(base) == "interrupted" and Kept(plan).progress(base) == 3

    said, going_on = [], InProcess()
    (resumed,) = reproduce(make_plan([table], TOY, tmp_path, data), said.append, going_on)
    assert "train-pages-base: goes on" in said and going_on.commands[0][-1] == "--resume"
    whole = column(made[1]["T3"], "perplexity")
    assert column(resumed, "perplexity") == {name: whole[name] for name in ("mdlm", "s4")}
