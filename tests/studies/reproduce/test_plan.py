"""Plans: every step after those it needs, recipes that load, the paper's sizes, refusals."""

import re
from dataclasses import replace

import pytest

from blockdiffusion.errors import UserError
from blockdiffusion.reports.numbers import count
from blockdiffusion.studies.reproduce import plan_tables
from blockdiffusion.studies.reproduce.listing import plan_lines
from blockdiffusion.studies.reproduce.paper import TABLES
from blockdiffusion.studies.reproduce.plan import recipe_text
from blockdiffusion.studies.reproduce.scales import PAPER, SCALES, TINY
from blockdiffusion.train.recipe import load_recipe
from tests.command import blockdiff
from tests.studies.reproduce.toy import DOCS, TOY


@pytest.fixture
def local(tmp_path):
    """`--data` of everything that a scale can read from local files."""
    for name in ("wikitext2", "judge", "lambada"):
        (tmp_path / name).mkdir()
    return [f"{name}={tmp_path / name}" for name in ("wikitext2", "judge", "lambada")]


def plan_of(scale, local, tmp_path, tables=tuple(TABLES)):
    return plan_tables(tables, scale, tmp_path / "out", local if scale in (TINY, TOY) else [])


@pytest.mark.parametrize("scale", [*SCALES.values(), TOY], ids=lambda scale: scale.name)
def test_every_step_stands_after_those_that_it_needs(scale, local, tmp_path):
    plan = plan_of(scale, local, tmp_path)
    done = set()
    for step in plan.steps:
        assert done.issuperset(step.needs), step.name
        done.add(step.name)
        if step.kind == "measure":  # of another text, and it is made anew
            assert step.needs[1] == f"prepare-{step.name.partition('-')[0]}"
    assert len(done) == len(plan.steps) == len({step.product for step in plan.steps})


@pytest.mark.parametrize("scale", [*SCALES.values(), TOY], ids=lambda scale: scale.name)
def test_every_run_is_a_valid_recipe(scale, local, tmp_path):
    runs = [step.run for step in plan_of(scale, local, tmp_path).steps if step.run is not None]
    for run in runs:
        (tmp_path / "recipe.yaml").write_bytes(recipe_text(run))
        recipe = load_recipe(tmp_path / "recipe.yaml")
        assert recipe.train.steps == run.steps
        size = recipe.model.block_size
        length = run.tokens // run.steps // recipe.train.batch_size
        assert recipe.objective.name == "mdlm" or (size is not None and length % size == 0)


def test_tables_share_the_base_and_the_runs(local, tmp_path):
    alone = plan_of(TINY, local, tmp_path, ["T3"])
    trained = [step.name for step in alone.steps if step.kind == "train"]
    systems = ["ar", "d3pm", "sedd", "base", "mdlm", "s16", "s8", "s4"]
    assert trained == [f"train-wikitext2-{name}" for name in systems]
    for name in ("mdlm", "s4", "s8", "s16"):
        step = alone.step(f"train-wikitext2-{name}")
        assert "train-wikitext2-base" in step.needs
        assert step.run.recipe["model"]["init_from"] == str(tmp_path / "out/runs/wikitext2-base")
    together = plan_of(TINY, local, tmp_path, ["T3", "T4", "T5", "T6", "T7"])
    more = {step.name for step in together.steps if step.kind == "train"} - set(trained)
    assert more == {"train-judge"}


def test_a_table_that_is_named_twice_is_made_once(tmp_path):
    plan = plan_tables(["T3", "t3"], PAPER, tmp_path)
    assert [table.name for table in plan.tables] == ["T3"]


def test_models_from_scratch_see_as_many_tokens(local, tmp_path):
    for scale in (*SCALES.values(), TOY):
        plan = plan_of(scale, local, tmp_path, ["T3"])
        runs = {step.name.rpartition("-")[2]: step.run for step in plan.steps if step.run}
        for name in ("mdlm", "s4", "s8", "s16"):
            assert runs["base"].tokens + runs[name].tokens == runs["ar"].tokens
        assert runs["sedd"].tokens == runs["d3pm"].tokens == runs["ar"].tokens


def test_the_paper_scale_has_the_papers_sizes(tmp_path):
    plan = plan_of(PAPER, [], tmp_path)
    runs = {step.name.removeprefix("train-"): step.run for step in plan.steps if step.run}
    assert count(runs["lm1b-ar"].tokens) == "65.5B" and count(runs["owt-ar"].tokens) == "524B"
    assert count(runs["lm1b-t1-linear"].tokens) == "16B"
    assert count(runs["lm1b-t2-s4-0-1"].tokens) == "9.83B"
    assert count(runs["lm1b-t8-s4-log"].tokens) == "3.01B"
    assert runs["owt-base"].steps == 850_000 and runs["owt-s4"].steps == 150_000
    s4 = runs["owt-s4"].recipe
    assert s4["search"] == {"every": 5000} and s4["objective"] == {
        "name": "bd3lm",
        "estimator": "bernoulli",
    }
    assert s4["optim"]["lr"] == 3e-4 and s4["train"]["batch_size"] == 512
    # 110M parameters, 170M with input and output embeddings, without conditioning's.
    assert count(runs["owt-ar"].parameters) == "162M"
    assert runs["lm1b-t1-tuned"].recipe["objective"]["clip"] == [1.0, 1.0]
    assert runs["lm1b-t2-sL-0-0.5"].recipe["model"]["block_size"] == 128
    commands = " ".join(word for step in plan.steps for word in step.command)
    assert "lm1b --out" in commands and "--tokenizer bert-base-uncased" in commands
    assert (
        "--scorer openai-community/gpt2-large --num-samples 300 --max-new-tokens 2047" in commands
    )


def test_the_cost_for_every_number_of_gpus_is_that_of_the_plan(tmp_path):
    page = (DOCS / "how-to" / "reproduce.md").read_text()
    head = next(line for line in page.splitlines() if line.startswith("| GPUs |"))
    names = [cell.strip() for cell in head.split("|")[2:-1]]
    rows = re.findall(r"^\| (\d+) \|(.*hours.*)\|$", page, re.M)
    assert names == ["T1", "T2", "T3", "T4", "T7", "T8"] and [int(n) for n, _ in rows] == [
        1,
        2,
        4,
        8,
    ]
    flops = {}
    for name in names:
        runs = (step.run for step in plan_of(PAPER, [], tmp_path, [name]).steps if step.run)
        flops[name] = sum(run.flops for run in runs)
    for gpus, cells in rows:
        for name, cell in zip(names, cells.split("|"), strict=True):
            value, unit = cell.split()
            seconds = flops[name] / PAPER.flops / int(gpus)
            assert float(value) == pytest.approx(
                seconds / {"hours": 3600, "days": 86_400}[unit], rel=0.03
            ), (gpus, name)


def test_a_dry_run_tells_the_sizes_and_writes_nothing(tmp_path):
    out = tmp_path / "out"
    ended = blockdiff("reproduce", "T4", "--scale", "paper", "--out", out, "--dry-run")
    assert ended.returncode == 0 and not out.exists()
    text = ended.stdout
    assert "prepare-owt: to do" in text and "blockdiff prepare openwebtext --out" in text
    assert "850,000 updates of 512 rows, 446B tokens" in text
    assert (
        "bd3lm, S = 4 (estimator bernoulli); from" in text
        and "12 layers, width 768, 162M parameters" in text
    )
    assert "14 steps, 0 done; 7 runs of" in text and "days" in text.splitlines()[-1]


def test_the_cost_of_blocks_is_below_twice_that_of_plain_diffusion(tmp_path):
    runs = {s.name: s.run for s in plan_of(PAPER, [], tmp_path, ["T4"]).steps if s.run}
    ratio = runs["train-owt-s4"].flops / runs["train-owt-mdlm"].flops
    assert 1.5 < ratio < 2  # the layers twice, the output once


# --- what is refused ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["T9", "--scale", "tiny"], "no table 'T9' to reproduce; the nearest is T"),
        (["T3", "--scale", "tinny"], "no scale 'tinny'; the nearest is tiny"),
        (["T3", "--scale", "tiny"], "needs wikitext2, which is not downloaded; say where its fol"),
        (["T3", "--scale", "tiny", "--data", "wikitext=."], "say where its folder is with --data"),
        (["T3", "--scale", "tiny", "--data", "wikitxt2=."], "the nearest name is wikitext2"),
        (["T3", "--scale", "tiny", "--data", "wikitext2=no"], "no file or folder 'no' to read"),
        (["T3", "--scale", "paper", "--data", "judge=."], "at the scale paper there are lm1b"),
        (["T5", "--scale", "tiny", "--data", "wikitext2=."], "measures local text of other kinds"),
        (["T7", "--scale", "tiny", "--data", "wikitext2=."], "say where it is with --data judge="),
        (
            ["T7", "--scale", "tiny", "--data", "wikitext2=.", "--data", "judge=docs"],
            "is the text that the models under test are trained on",
        ),
        (
            ["T7", "--scale", "paper", "--scorer", "runs/reproduce-paper/runs/owt-s4"],
            "is one of the models under test",
        ),
    ],
)
def test_a_mistake_is_one_sentence(arguments, sentence, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "docs").mkdir()
    ended = blockdiff("reproduce", *arguments)
    assert ended.returncode == 2
    assert sentence in ended.stderr and ended.stderr.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["docs"]


def test_documents_without_an_eos_have_no_length(local, tmp_path):
    text = replace(TINY.texts["owt"], document_eos=False)
    scale = replace(TINY, texts={"lm1b": text, "owt": text})
    with pytest.raises(UserError, match="T6 measures the tokens until an EOS, and the text"):
        plan_tables(["T6"], scale, tmp_path / "out", local)
    assert plan_tables(["T3"], scale, tmp_path / "out", local).steps


def test_another_model_can_be_the_scorer(local, tmp_path):
    plan = plan_tables(["T7"], TINY, tmp_path / "out", local[:1], scorer="some/model")
    assert plan.scorer == "some/model" and not any("judge" in s.name for s in plan.steps)
    measured = [step for step in plan.steps if step.kind == "measure"]
    assert all("some/model" in step.command for step in measured)
    assert len(measured) == 12  # SEDD and D3PM have no 2L
    d3pm = plan.step("wikitext2-d3pm-generated-L").command
    assert d3pm[:2] == ("generate-eval", str(tmp_path / "out/runs/wikitext2-d3pm"))
    assert d3pm[d3pm.index("--max-new-tokens") + 1] == "127"


def test_a_listing_is_of_the_plan(local, tmp_path):
    plan = plan_of(TINY, local, tmp_path, ["T3"])
    lines = "\n".join(plan_lines(plan))
    assert all(f"\n{step.name}: to do" in lines for step in plan.steps)
    assert "\n16 steps, 0 done; 8 runs of 20.9M tokens in all" in lines
