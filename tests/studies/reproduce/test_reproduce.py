"""Every table from text to page, at the size of seconds, on this project's own pages."""

import json
import signal
from dataclasses import replace

import numpy as np
import pytest
import yaml

from blockdiffusion.data import named
from blockdiffusion.data.loader import BatchOrder, TokenRows
from blockdiffusion.data.manifest import Manifest
from blockdiffusion.data.options import PrepareOptions
from blockdiffusion.data.packing import prepare
from blockdiffusion.data.registry import DATA_SETS, LastDocuments, find_set
from blockdiffusion.errors import UserError
from blockdiffusion.escape import markdown
from blockdiffusion.files.disk import locked
from blockdiffusion.studies.reproduce import (
    Reproduced,
    _write_table,
    plan_tables,
    reproduce,
    runner,
)
from blockdiffusion.studies.reproduce.cells import document_tokens
from blockdiffusion.studies.reproduce.paper import TABLES
from blockdiffusion.studies.reproduce.plan import make_plan
from blockdiffusion.studies.reproduce.scales import PAPER, SCALES, SMALL
from blockdiffusion.studies.reproduce.step_cache import StepCache
from tests.command import blockdiff
from tests.evaluate.scorers import save_gpt2
from tests.studies.reproduce.toy import DOCS, TOY, InProcess, write_pages
from tests.test_mutations import mutations


@pytest.fixture(scope="module", autouse=True)
def no_waiting():
    patch = pytest.MonkeyPatch()
    patch.setattr(runner, "POLL_SECONDS", 0.0)
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
    """A table with a few of its rows, and the quoted ones."""
    table = TABLES[name]
    rows = tuple(row for row in table.rows if row.system in systems or row.quoted)
    return replace(table, rows=rows, chains=(systems,))


SMALLER = [
    *(TABLES[name] for name in ("T3", "T5", "T6")),
    few("T7", "ar", "s4", "mdlm", "sedd", "d3pm"),
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
        assert one.values["said"] and all(
            f"* {markdown(said)}" in page for said in one.values["said"]
        )
        assert str(plan.out) not in page


def test_perplexities_are_bounds_where_they_are(made):
    t3 = column(made[1]["T3"], "perplexity")
    assert list(t3) == [row.system for row in TABLES["T3"].rows]
    assert [name for name, cell in t3.items() if not cell["is_bound"]] == ["ar"]
    values = {name: (cell["value"], cell["stderr"]) for name, cell in t3.items()}
    # Of 258 symbols, hardly learnt; D3PM's few draws of a rare time are noisy.
    assert all(1 < value < 320 + 2 * stderr for value, stderr in values.values()), values
    assert all(stderr > 0 for _, stderr in values.values())
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
    assert column(made[1]["T6"], "median")["data"]["value"] == np.median(own)
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
    assert set(short) - set(long) == {"sedd", "d3pm"}
    assert short["d3pm"]["nfe"] <= 32  # no pass that reveals nothing
    (row,) = (line for line in found["T7"].markdown.read_text().split("\n") if "| D3PM" in line)
    assert row.endswith("|  |  |  |  |  |") and "±" in row  # no 2L, no figure of the paper
    assert not any("D3PM" in said for said in found["T7"].values["said"])
    for cells, length in ((short, 31), (long, 63)):
        for cell in cells.values():
            assert cell["samples"] == 3 and cell["value"] > 1
            assert cell["entropy"]["value"] > 0
        assert all(c["nfe"] >= length for name, c in cells.items() if name != "d3pm")
    notes = " ".join(found["T7"].values["notes"])
    assert "Scorer: runs/judge, autoregressive" in notes and plan.scorer.endswith("runs/judge")
    scorer, scored = (plan.step(name).run for name in ("train-judge", "train-pages-ar"))
    assert scorer.parameters > scored.parameters


def test_what_is_made_is_left_alone(made, data):
    plan, found, _ = made
    again = InProcess()
    repeated = reproduce(make_plan(SMALLER, TOY, plan.out, data), lambda line: None, again)
    assert again.commands == []
    assert [one.values for one in repeated] == [one.values for one in found.values()]


def test_the_command_shows_the_page(made, data, monkeypatch):
    plan, found, _ = made
    monkeypatch.setitem(SCALES, "toy", TOY)
    options = [word for entry in data for word in ("--data", entry)]
    ended = blockdiff("reproduce", "t3", "--scale", "toy", "--out", plan.out, *options)
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.strip() == found["T3"].markdown.read_text().strip()
    assert ended.stderr.count(": done before") == 16
    listed = blockdiff(
        "reproduce", "t3", "--scale", "toy", "--out", plan.out, *options, "--dry-run"
    )
    assert "16 steps, 16 done" in listed.stdout and "is left: 0 FLOP" in listed.stdout


@pytest.mark.parametrize("every", [600, pytest.param(60, marks=pytest.mark.slow)])
def test_damaged_results_are_told_and_damaged_notes_are_made_anew(made, every):
    """Every file of results, and notes, by a sample of wrong values; see `test_mutations`."""
    plan, _, _ = made
    results = sorted((plan.out / "results").rglob("*.json"))
    assert len(results) > 20
    ended = []
    for number, file in enumerate(results):
        whole = file.read_bytes()
        changes = list(mutations(whole, "json"))
        for _, content in changes[number % 40 :: every]:
            file.write_bytes(content)
            for table in plan.tables:
                try:
                    _write_table(plan, table)
                    ended.append(0)
                except UserError as error:
                    assert len(str(error)) < 500
                    ended.append(2)
        file.write_bytes(whole)
    print(f"{len(ended)} mutations: {ended.count(0)} read, {ended.count(2)} told")
    assert ended.count(0) and ended.count(2)
    kept, step = StepCache(plan), plan.steps[0]
    note = plan.out / "steps" / f"{step.name}.json"
    whole = note.read_bytes()
    for _, content in mutations(whole, "json"):
        note.write_bytes(content)
        assert kept.state(step) in ("to do", "out of date", "interrupted", "done")
    note.write_bytes(whole)
    assert kept.state(step) == "done"
    for table in plan.tables:
        _write_table(plan, table)


def test_two_processes_do_not_work_in_one_place(made):
    plan = made[0]
    with (
        locked(plan.out / "lock", "taken"),
        pytest.raises(UserError, match=r"another process is at work in .*; wait for it, or choose"),
    ):
        reproduce(plan, lambda line: None, InProcess())


def test_another_recipe_never_overwrites_a_run(made, data):
    plan = made[0]
    faster = replace(TOY, optim={**TOY.optim, "lr": 2e-2})
    with pytest.raises(UserError, match=r"runs/pages-ar was trained with other settings, data or"):
        reproduce(plan_tables(["T3"], faster, plan.out, data), lambda line: None, InProcess())
    kept = StepCache(plan)
    assert all(kept.state(step) == "done" for step in plan.steps)


def test_a_measurement_follows_its_run_and_options(made, data):
    plan = made[0]
    fewer = replace(TOY, measure=replace(TOY.measure, rows=6))
    other = plan_tables(["T3"], fewer, plan.out, data)
    states = {step.name: StepCache(other).state(step) for step in other.steps}
    assert {name for name, state in states.items() if state == "out of date"} == {
        step.name for step in other.steps if step.kind == "measure"
    }


def reduced(scale, tokenizer):
    """`small` or `paper` with its own recipe, at the sizes of the toy."""
    sizes = dict(seq_len=32, batch_size=4, micro_batch_size=2)
    texts = {name: replace(t, tokenizer=tokenizer, **sizes) for name, t in scale.texts.items()}
    measure = replace(
        scale.measure, variance_batch=2, variance_batches=2, documents=2, longest=40, generated=2,
        batch=2, samples=2,
    )  # fmt: skip
    return replace(
        scale,
        texts=texts,
        model={**TOY.model, "dropout": scale.model["dropout"]},
        train={**scale.train, "device": "cpu"},
        optim={**scale.optim, "warmup_steps": 2},
        evaluation={"every": 2, "rows": 4},
        checkpoint={"every": 2},
        search={"every": 2, "rows": 8, "replicates": 2},
        steps=TOY.steps,
        measure=measure,
    )


@pytest.fixture
def few_held_out(monkeypatch):
    """OpenWebText of which the last 20 documents are held out, not the last 100,000."""
    cut = replace(find_set("openwebtext"), cut=LastDocuments(number=20))
    monkeypatch.setitem(DATA_SETS, "openwebtext", cut)


def made_reduced(scale, tables, folder, scorer=None):
    """(plan, tables by name) of a reduced scale, on sentences of this project's pages."""
    sentences = [s for s in (DOCS / "concepts.md").read_text().split("\n") if len(s) > 60]
    (folder / "lm1b").mkdir()
    for split, part in (("train", sentences[:80]), ("test", sentences[80:100])):
        (folder / "lm1b" / f"{split}.txt").write_text("\n".join(part))
    (folder / "openwebtext").mkdir()
    (folder / "openwebtext" / "documents.txt").write_text("\n".join(sentences[:100]))
    local = [f"{name}={folder / name}" for name in ("lm1b", "openwebtext")]
    plan = make_plan(tables, reduced(scale, "byte"), folder / "out", local, scorer)
    found = {one.name: one for one in reproduce(plan, lambda line: None, InProcess())}
    if any(table.corpus == "owt" for table in tables):
        prepared = plan.out / "data" / "owt"
        rows = {split: TokenRows(prepared, split) for split in ("train", "valid")}
        text = {
            split: bytes(i for i in kept.rows(range(kept.num_rows)).ids_BL.flatten() if i < 256)
            for split, kept in rows.items()
        }
        first, last = sentences[80].encode(), sentences[98].encode()  # rows may cut the last off
        assert first in text["valid"] and last in text["valid"]
        assert first not in text["train"] and sentences[70].encode() in text["train"]
    return plan, found


def test_the_commands_of_small_at_reduced_size(tmp_path, few_held_out):
    scorer = save_gpt2(tmp_path / "judge")
    tables = [few("T4", "s4"), few("T6", "mdlm"), few("T7", "s4")]
    plan, found = made_reduced(SMALL, tables, tmp_path, str(scorer))
    run = plan.out / "runs" / "owt-s4"
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert any("clip_grid" in line for line in lines)  # the schedule search
    assert yaml.safe_load((run / "config.yaml").read_text())["train"]["dtype"] == "bfloat16"
    assert "causal language model" in " ".join(found["T7"].values["notes"])
    assert len(found["T6"].values["said"]) == 1


@pytest.fixture
def no_hub(monkeypatch):
    def unreachable(data_set, split):
        raise UserError(f"cannot reach the hub for {data_set.name}")

    monkeypatch.setattr(named, "fetch_split", unreachable)


def test_the_commands_of_paper_at_reduced_size(tmp_path, few_held_out, no_hub):
    tables = [few("T3", "ar", "s4"), few("T5", "ar"), few("T1", "t1-linear")]
    plan, found = made_reduced(PAPER, tables, tmp_path)
    rows = Manifest.load(plan.out / "data" / "lm1b").splits["valid"].rows
    told = found["T3"].values["notes"][0]
    assert f"lm1b, {rows} rows of 32 tokens" in told and "a BOS given" in told
    t5 = found["T5"].values
    assert list(t5["rows"][0]["ours"]) == ["lm1b"]
    assert any("ptb is missing: cannot reach the hub" in note for note in t5["notes"])
    assert column(found["T1"], "variance")["t1-linear"]["value"] > 0


@pytest.mark.slow
@pytest.mark.parametrize("scale", [SMALL, PAPER], ids=lambda scale: scale.name)
def test_every_table_of_small_and_paper_at_reduced_size(scale, tmp_path, few_held_out, no_hub):
    """All rows but of T2 and T8, of which one of every block size, with every noise of T8."""
    scorer = save_gpt2(tmp_path / "judge")
    tables = [
        *(TABLES[name] for name in ("T1", "T3", "T4", "T5", "T6", "T7")),
        few("T2", "t2-sL-0-0.5", "t2-s16-0.3-0.8", "t2-s4-0.5-1"),
        few("T8", *(f"t8-s4-{noise}" for noise in ("linear", "log", "sqrt")),
            "t8-s16-square", "t8-s16-cosine"),
    ]  # fmt: skip
    plan, found = made_reduced(scale, tables, tmp_path, str(scorer))
    for table in tables:
        for name in table.columns:
            # T5 has one local set; of T1 the autoregressive row has no noise.
            wanted = {row.system for row in table.built if name in row.measured}
            wanted = wanted if table.name != "T5" or name == "lm1b" else set()
            made = {system for system in column(found[table.name], name) if system != "data"}
            assert made == wanted, (table.name, name)
    assert {step.name for step in plan.steps if step.kind == "prepare"} == {
        "prepare-lm1b", "prepare-owt",
    }  # fmt: skip


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
        def __call__(self, command, log, place):
            if "pages-base" not in command[1]:
                return super().__call__(command, log, place)
            with monkeypatch.context() as patch:
                patch.setattr(BatchOrder, "indices", interrupted)
                return super().__call__(command, log, place)

    steps = iter([None, None, 3])
    with pytest.raises(UserError, match="the step train-pages-base failed: it ended with code 130"):
        reproduce(plan, lambda line: None, Stopping())
    base = plan.step("train-pages-base")
    assert StepCache(plan).state(base) == "interrupted" and StepCache(plan).progress(base) == 3

    said, going_on = [], InProcess()
    (resumed,) = reproduce(make_plan([table], TOY, tmp_path, data), said.append, going_on)
    assert "train-pages-base: resumes" in said and going_on.commands[0][-1] == "--resume"
    whole = column(made[1]["T3"], "perplexity")
    assert column(resumed, "perplexity") == {name: whole[name] for name in ("mdlm", "s4")}
