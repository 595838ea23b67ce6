"""The command line: what it prints, and how it tells a mistake."""

import contextlib
import io
import json
import os
import re
import resource
import signal
import subprocess
import sys
import time
from typing import get_args, get_type_hints

import pytest
import yaml

import blockdiffusion.evaluate.replicates as replicates
from blockdiffusion.checkpoints.options import Target, Weights
from blockdiffusion.data.detokenizers import DETOKENIZERS
from blockdiffusion.data.options import PrepareOptions
from blockdiffusion.data.registry import DATA_SETS
from blockdiffusion.data.shards import PACKERS
from blockdiffusion.diffusion.estimators import EstimatorName
from blockdiffusion.diffusion.schedules import SCHEDULES
from blockdiffusion.estimate.options import SampleDtype
from blockdiffusion.evaluate.zero_shot import options as zero_shot
from blockdiffusion.runtime.hardware import NAMES
from blockdiffusion.sampling.params import SAMPLERS, TopPRule
from blockdiffusion.studies.reproduce.scales import SCALES
from tests.command import blockdiff
from tests.conftest import GOLDEN
from tests.evaluate.scorers import save_gpt2
from tests.tiny import stop_at_third_group

TEXT = "The quick brown fox jumps over the lazy dog; it was not the first time.\n\n" * 300
RECIPE = {
    "model": {
        "num_hidden_layers": 1,
        "hidden_size": 16,
        "num_attention_heads": 2,
        "cond_dim": 8,
        "dropout": 0.0,
    },
    "train": {"steps": 6, "batch_size": 4, "threads": 1},
    "optim": {"warmup_steps": 2},
    "eval": {"every": 3, "rows": 4, "mc_samples": 2},
    "sample": {"every": 6, "max_new_tokens": 8},
}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with prepared data and a trained run, made by the commands themselves."""
    folder = tmp_path_factory.mktemp("cli")
    (folder / "text.txt").write_text(TEXT)
    recipe = RECIPE | {"out": str(folder / "run"), "data": {"path": str(folder / "data")}}
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    made = blockdiff(
        "prepare", folder / "text.txt", "--out", folder / "data", "--tokenizer", "byte",
        "--seq-len", 32, "--document-bytes", 2000,
    )  # fmt: skip
    assert made.returncode == 0, made.stderr
    assert "V = 258, L = 32" in made.stdout
    trained = blockdiff("train", folder / "recipe.yaml")
    assert trained.returncode == 0, trained.stderr
    assert "validation bound" in trained.stderr and "6 steps" in trained.stdout
    return folder


def test_help_answers_within_a_second_and_names_every_command():
    """A second of processor time: a busy machine does not count."""
    times = []
    for _ in range(3):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        shown = subprocess.run(
            [sys.executable, "-m", "blockdiffusion.cli", "--help"], capture_output=True, text=True
        )
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        times.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    assert shown.returncode == 0 and min(times) < 1
    for command in (
        "prepare", "datasets", "train", "eval", "zero-shot", "variance", "references", "sample",
        "generate", "infill", "generate-eval", "generate-compare", "report", "convert", "push",
        "lengths", "pareto", "reproduce",
    ):  # fmt: skip
        assert command in shown.stdout


def test_eval_prints_the_bound_with_its_sign_and_writes_json(place, tmp_path):
    run = blockdiff(
        "eval", place / "run", "--data", place / "data", "--estimator", "exact", "--limit", 4,
        "--json", tmp_path / "eval.json",
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    assert "perplexity            <= " in run.stdout and "exact perplexity" in run.stdout
    values = json.loads((tmp_path / "eval.json").read_text())
    assert values["num_tokens"] == 128 and values["split"] == "valid"
    assert f"<= {values['perplexity']:.2f}" in run.stdout
    # One token of the byte tokenizer is one byte (but for the EOS of documents).
    assert values["bits_per_byte"] == pytest.approx(values["nats_per_token"] / 0.6931, rel=0.02)


def test_a_killed_evaluation_goes_on_and_gives_the_same(place, tmp_path, monkeypatch):
    monkeypatch.setattr(replicates, "PASS_TOKENS", 64)
    files = [tmp_path / "whole.json", tmp_path / "killed.json"]
    options = ("eval", place / "run", "--data", place / "data", "--mc-samples", 2, "--per-row")
    assert blockdiff(*options, "--json", files[0]).returncode == 0
    stop_at_third_group(monkeypatch)
    assert blockdiff(*options, "--json", files[1]).returncode == 130
    journal = tmp_path / "killed.json.journal"
    assert journal.read_text().count('"name"') == 2 and not files[1].exists()
    again = blockdiff(*options, "--json", files[1])
    assert again.returncode == 0, again.stderr
    one, other = (json.loads(file.read_text()) | {"seconds": 0} for file in files)
    assert one == other and not journal.exists()
    monkeypatch.undo()
    gone = blockdiff(*options, "--json", place / "recipe.yaml" / "a.json")
    assert gone.returncode == 2 and gone.stderr.count("\n") == 1  # before it is measured


def test_eval_keeps_the_rows_where_it_is_asked_to(place, tmp_path):
    file = tmp_path / "eval.json"
    options = ("eval", place / "run", "--data", place / "data", "--limit", 4, "--bos")
    options += ("--json", file)
    assert blockdiff(*options).returncode == 0
    assert "nats_per_row" not in json.loads(file.read_text())
    assert blockdiff(*options, "--per-row").returncode == 0
    values = json.loads(file.read_text())
    assert values["tokens_per_row"] == [31] * 4
    assert sum(values["nats_per_row"]) / 124 == pytest.approx(values["nats_per_token"])


def test_lengths_are_measured_and_kept(place, tmp_path):
    file = tmp_path / "new" / "lengths.json"
    run = blockdiff(
        "lengths", place / "run", "--num-samples", 3, "--max-new-tokens", 20, "--batch-size", 2,
        "--window", 16, "--bos", "--top-p", 0.9, "--top-p-rule", "authors", "--json", file,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    values = json.loads(file.read_text())
    assert "tokens until EOS" in run.stdout and values["model"] == str(place / "run")
    assert len(values["lengths"]) == 3 and values["maximum"] == max(values["lengths"]) <= 20
    assert [path.name for path in file.parent.iterdir()] == ["lengths.json"]  # no journal is left


def test_zero_shot_prints_the_table_and_writes_three_files(place, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    (tmp_path / "ptb.valid.txt").write_text(" the <unk> 's N shares rose \n" * 30)
    files = [tmp_path / "new" / f"z.{end}" for end in ("json", "csv", "md")]
    run = blockdiff(
        "zero-shot", place / "run", "--local", f"ptb={tmp_path}", "--tasks", "ptb,lm1b",
        "--estimator", "exact", "--json", files[0], "--csv", files[1], "--markdown", files[2],
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    assert max(map(len, run.stdout.splitlines()[1:])) <= 100
    assert "lm1b: missing, the data set lm1b cannot be fetched" in run.stdout
    values = json.loads(files[0].read_text())
    assert values["model"] == str(place / "run") and values["frame"] == "none"
    ptb, lm1b = values["sets"]
    assert ptb["task"] == "ptb" and f"<= {ptb['perplexity']:.2f}" in run.stdout
    assert ptb["num_bytes"] == ptb["num_tokens"] and "cannot be fetched" in lm1b["missing"]
    assert f"<= {ptb['perplexity']:.2f} |" in files[2].read_text()
    assert files[1].read_text().count("\n") == 3
    names = {path.name for path in (tmp_path / "new").iterdir()}
    assert names == {"z.csv", "z.json", "z.md", "z.json.journal"}  # for when lm1b can be fetched


def test_references_prints_the_table_and_writes_two_files(place, tmp_path):
    files = [tmp_path / "new" / f"r.{end}" for end in ("json", "md")]
    run = blockdiff(
        "references", place / "data", "--model", place / "run", "--limit", 4, "--order", 3,
        "--estimator", "exact", "--json", files[0], "--markdown", files[1],
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    assert run.stdout == files[1].read_text()
    values = json.loads(files[0].read_text())
    assert values["data"] == str(place / "data") and values["num_tokens"] == 128
    names = [coder["coder"] for coder in values["coders"]]
    assert len(names) == 3 + 2 * 3 + 2 and names[-1] == f"{place / 'run'}, exact"
    assert all(f"{coder['bits_per_byte']:.4f}" in run.stdout for coder in values["coders"])
    assert {path.name for path in (tmp_path / "new").iterdir()} == {"r.json", "r.md"}


def test_datasets_lists_them():
    shown = blockdiff("datasets")
    assert shown.returncode == 0 and "openwebtext: " in shown.stdout
    assert "held out    validation, the last 100,000 documents" in shown.stdout


def test_variance_prints_the_table_and_writes_json_and_plot(place, tmp_path):
    options = (
        "variance", place / "run", "--data", place / "data", "--block-sizes", "1,4,32",
        "--estimators", "count", "--estimators", "complement", "--estimators", "bernoulli[0.3,0.8]",
        "--estimators", "resampled[0.3,0.8]", "--batch-size", 2, "--batches", 2, "--replicates", 3,
    )  # fmt: skip
    files = ("--json", tmp_path / "new" / "variance.json", "--plot", tmp_path / "variance.svg")
    run = blockdiff(*options, *files)
    assert run.returncode == 0, run.stderr
    lines = run.stdout.splitlines()
    assert max(map(len, lines[1:])) <= 100
    assert sum(line.startswith("  bernoulli (paper)") for line in lines) == 6  # loss and gradient
    assert any("both copies of a complement pair" in line for line in lines)
    assert any("left out: resampled[0.3,0.8]" in line for line in lines)
    values = json.loads((tmp_path / "new" / "variance.json").read_text())
    assert values["model"] == str(place / "run") and values["replicates"] == 3
    assert values["t_min"] == 1e-3 and {"torch", "blockdiffusion", "python"} <= set(
        values["versions"]
    )
    assert [row["block_size"] for row in values["rows"]] == [1] * 4 + [4] * 5 + [32] * 5
    assert all(f"{row['loss']['value']:.4f}" in run.stdout for row in values["rows"])
    assert (tmp_path / "variance.svg").read_text().startswith("<svg")
    fast = blockdiff(*options, "--no-gradients", "--block-sizes", 4)
    assert fast.returncode == 0 and "gradient  " not in fast.stdout
    # The same seed, the same masks: the same losses with and without gradients.
    start = lines.index(f"S = 4 (the model's): exact bound {values['exact']['4']:.4f}")
    assert lines[start : start + 7] == fast.stdout.splitlines()[3:10]


def test_a_plot_without_matplotlib_is_refused_before_the_work(place, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    plot, results = ("--plot", tmp_path / "a.svg"), tmp_path / "a.json"
    for command in (
        ("variance", place / "run", "--data", place / "data", "--json", results),
        ("generate-eval", place / "run", "--scorer", tmp_path / "none", "--json", results),
        ("generate-compare", tmp_path / "none.json"),
    ):
        run = blockdiff(*command, *plot)
        assert run.returncode == 2 and "pip install 'blockdiffusion[plots]'" in run.stderr
        assert run.stderr.count("\n") == 1 and not list(tmp_path.iterdir())


def test_points_are_measured_without_matplotlib_too(place, tmp_path, monkeypatch):
    options = (
        "pareto", place / "run", "--judge", save_gpt2(tmp_path / "judge"), "--num-samples", 2,
        "--max-new-tokens", 4, "--point", "first-hitting", "--out", tmp_path / "out",
    )  # fmt: skip
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "matplotlib", None)
        run = blockdiff(*options)
        assert run.returncode == 0 and "no pareto.svg: charts are drawn by" in run.stderr
        names = {path.name for path in (tmp_path / "out").iterdir()}
        assert {"pareto.json", "pareto.md", "pareto.csv"} <= names and "pareto.svg" not in names
    assert blockdiff(*options).returncode == 0  # from what was measured
    assert (tmp_path / "out" / "pareto.svg").read_text().startswith("<svg")


def test_generated_text_is_judged_and_compared(place, tmp_path):
    judge = save_gpt2(tmp_path / "judge")
    options = (
        "generate-eval", place / "run", "--scorer", judge, "--num-samples", 3,
        "--max-new-tokens", 16, "--batch-size", 2, "--reference", place / "data",
    )  # fmt: skip
    files = [tmp_path / f"a.{kind}" for kind in ("json", "csv", "md", "svg")]
    run = blockdiff(
        *options, "--label", "first", "--json", files[0], "--csv", files[1], "--markdown", files[2],
        "--plot", files[3],
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    values = json.loads(files[0].read_text())
    assert values["sampling"]["num_samples"] == 3 and values["label"] == "first"
    assert f"{values['text']['num_samples']} (" in run.stdout and "real text" in run.stdout
    assert (tmp_path / "a.samples.jsonl").read_text().count("\n") == 3
    assert files[1].read_text().count("\n") == 3 and files[3].read_text().startswith("<svg")
    given = blockdiff(
        "generate-eval", "--scorer", judge, "--samples-from", tmp_path / "a.samples.jsonl",
        "--json", tmp_path / "b.json",
    )  # fmt: skip
    assert given.returncode == 0 and "warning: which model" in given.stdout
    again = json.loads((tmp_path / "b.json").read_text())
    assert again["text"]["perplexity"] == pytest.approx(values["text"]["perplexity"])
    both = blockdiff("generate-compare", files[0], tmp_path / "b.json", "--markdown", files[2])
    assert both.returncode == 0, both.stderr
    assert both.stdout == files[2].read_text() and both.stdout.count("\n| ") == 4


def test_a_judge_and_its_samples_are_checked(place, tmp_path):
    judge = save_gpt2(tmp_path / "judge")
    (tmp_path / "empty.jsonl").write_text("")
    (tmp_path / "blank.jsonl").write_text('{"text": ""}\n')
    run = ["generate-eval", place / "run", "--scorer"]
    mistakes = [
        ([*run, place / "run"], "both the model under test and its scorer"),
        ([*run, GOLDEN / "bd3lm-hf"], "has no tokenizer"),
        ([*run, tmp_path / "none/at/all"], "none/at/all does not exist; give"),
        ([*run, tmp_path / "jugde"], "jugde does not exist; give a model directory"),
        ([*run, GOLDEN / "ar-lightning/last.ckpt"], "blockdiff convert"),
        ([*run, judge, "--context", 25], "from 2 to 24"),
        ([*run, judge, "--stride", 24], "stride is 24"),
        ([*run, judge, "--num-samples", 0], "--num-samples is 0"),
        ([*run, judge, "--mauve"], "give --reference"),
        ([*run, judge, "--reference", tmp_path / "none.txt", "--max-new-tokens", 4,
          "--num-samples", 1], "there is no file"),
        ([*run, judge, "--min-entropy", 0], "above 0"),
        ([*run, judge, "--samples-from", tmp_path / "empty.jsonl"], "no sample in"),
        ([*run, judge, "--samples-from", tmp_path / "blank.jsonl"], "nothing to score"),
        ([*run, judge, "--plot", tmp_path], "is a directory"),
        (["generate-eval", "--scorer", judge], "nothing to score"),
        (["generate-compare", place / "recipe.yaml"], "not valid JSON"),
    ]  # fmt: skip
    for arguments, expected in mistakes:
        failed = blockdiff(*arguments)
        assert failed.returncode == 2, (arguments, failed.stdout, failed.stderr)
        assert expected in failed.stderr and failed.stderr.count("\n") == 1, failed.stderr


def test_a_judge_of_other_ids_is_refused_before_samples_are_drawn(place, tmp_path):
    judge = save_gpt2(tmp_path / "judge", vocab_size=100, bos_token_id=1, eos_token_id=1)
    failed = blockdiff(
        "generate-eval", place / "run", "--scorer", judge, "--json", tmp_path / "a.json"
    )
    assert failed.returncode == 2 and failed.stderr.count("\n") == 1, failed.stderr
    assert "gives ids up to 256, but its network has 100 ids; the two do not" in failed.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["judge"]


@pytest.fixture
def interrupted_download(tmp_path, monkeypatch):
    """A function that leaves some files of `a/b` in the hub's cache; there is no connection."""
    import huggingface_hub

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    repo = tmp_path / "cache" / "models--a--b"
    snapshot = repo / "snapshots" / "c0ffee"
    snapshot.mkdir(parents=True)
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text("c0ffee")

    def leave(**files):
        for name, text in files.items():
            (snapshot / f"{name}.json").write_text(text)

    return leave


@pytest.mark.parametrize(
    ("files", "lacking"),
    [
        ({"tokenizer": "{}"}, "has no config.json and no model.safetensors; repeat with"),
        ({"config": '{"model_type": "bd3lm"}'}, "has no model.safetensors; repeat with"),
    ],
)
def test_an_interrupted_download_is_told(interrupted_download, place, tmp_path, files, lacking):
    interrupted_download(**files)
    recipe, new = place / "recipe.yaml", tmp_path / "new"
    for command in (
        ["sample", "a/b"],
        ["convert", "a/b", "--out", new],
        ["train", recipe, f"out={new}", "model.init_from=a/b"],
    ):
        failed = blockdiff(*command)
        assert failed.returncode == 2, (command, failed.stdout, failed.stderr)
        assert "a/b is incomplete in the cache: " in failed.stderr and lacking in failed.stderr
        assert failed.stderr.count("\n") == 1 and not (new / "model").exists()
    judged = blockdiff("generate-eval", place / "run", "--scorer", "a/b", "--num-samples", 1)
    assert judged.returncode == 2 and "a/b" in judged.stderr and judged.stderr.count("\n") == 1


def test_sample_repeats_with_a_seed_and_gives_json(place):
    options = ("sample", place / "run", "--max-new-tokens", 12, "--seed", 3)
    first, again = blockdiff(*options), blockdiff(*options)
    assert first.returncode == 0 and first.stdout == again.stdout
    lines = blockdiff(*options, "--num-samples", 2, "--prompt", "fox", "--json").stdout.splitlines()
    rows = [json.loads(line) for line in lines]
    assert len(rows) == 2 and all(row["text"].startswith("fox") for row in rows)
    assert rows[0]["prompt_tokens"] == 3 and rows[0]["seed"] == 3 and rows[0]["nfe"] > 0


@pytest.mark.parametrize(
    ("text", "told"),
    [('{"prompt": "a"}\n{"prompt": "b"}\n', True), ('\ufeff[\r\n"a"]', True), ("{\n}", True),
     ("{a}", False), ("[1] is a note", False), ("A 5", False)],
)  # fmt: skip
def test_a_prompt_file_that_holds_json_is_told(place, tmp_path, text, told):
    """Its name is that of a text, so it is read as one, as it stands."""
    (tmp_path / "prompt.txt").write_text(text)
    run = blockdiff("sample", place / "run", "--prompt-file", tmp_path / "prompt.txt",
                    "--max-new-tokens", 1, "--seed", 1)  # fmt: skip
    assert run.returncode == 0 and ("warning: the prompt file" in run.stderr) == told
    assert run.stderr.count("\n") == told and run.stdout.startswith(text.lstrip("\ufeff"))


def test_infill_keeps_what_is_given(place, tmp_path):
    text = "The quick [MASK:5] fox[MASK]"
    run = blockdiff("infill", place / "run", text, "--num-samples", 2, "--seed", 3, "--json")
    assert run.returncode == 0, run.stderr
    for line in run.stdout.splitlines():
        values = json.loads(line)
        # A token of the byte tokenizer is a byte; BOS is none of the text.
        assert len(values["ids"]) == values["prompt_tokens"] + 6
        assert values["text"].startswith("The quick ")
    (tmp_path / "template.txt").write_text(text)
    again = blockdiff("infill", place / "run", "--template-file", tmp_path / "template.txt",
                      "--num-samples", 2, "--seed", 3, "--json")  # fmt: skip
    assert again.stdout == run.stdout


def test_stream_prints_the_same_text(place):
    options = ("sample", place / "run", "--max-new-tokens", 30, "--seed", 5, "--prompt", "the ")
    whole, stream = blockdiff(*options), blockdiff(*options, "--stream")
    assert stream.returncode == 0 and stream.stdout.strip() == whole.stdout.strip()


def test_report_writes_the_page(place, tmp_path):
    made = blockdiff("report", place / "run", "--out", tmp_path / "page.html",
                     "--max-new-tokens", 16)  # fmt: skip
    assert made.returncode == 0, made.stderr
    page = (tmp_path / "page.html").read_text()
    assert page.startswith("<!DOCTYPE html>") and "validation" in page


def test_an_autoregressive_run_goes_through_all_commands(place, tmp_path):
    out = tmp_path / "ar"
    trained = blockdiff("train", place / "recipe.yaml", f"out={out}", "objective.name=ar",
                        "model.cond_dim=128")  # fmt: skip
    assert trained.returncode == 0, trained.stderr
    assert "step 6: validation 5." in trained.stderr
    assert "bound" not in trained.stderr and "<=" not in trained.stderr
    run = blockdiff("eval", out, "--data", place / "data", "--json", out / "eval.json")
    assert run.returncode == 0, run.stderr
    assert "exact in one pass" in run.stdout and "<=" not in run.stdout
    made = blockdiff("report", out)
    assert made.returncode == 0, made.stderr
    page = (out / "report.html").read_text()
    assert "Perplexity, exact" in page and "Perplexity, bound" not in page
    options = ("sample", out, "--max-new-tokens", 24, "--window", 16, "--seed", 3)
    options += ("--prompt", "the ")
    whole, stream = blockdiff(*options, "--json"), blockdiff(*options, "--stream")
    assert whole.returncode == 0, whole.stderr
    values = json.loads(whole.stdout)
    assert values["nfe"] == len(values["ids"]) - 4 + 1 and values["text"].startswith("the ")
    assert stream.stdout.strip() == values["text"].strip()
    for name, wrong, expected in (
        ("sample", ["--sampler", "ancestral", "--steps", "4"], "no masks to reveal"),
        ("eval", ["--data", place / "data", "--estimator", "count"], "exact in one pass"),
    ):
        refused = blockdiff(name, out, *wrong)
        assert refused.returncode == 2 and refused.stderr.count("\n") == 1
        assert expected in refused.stderr


def test_a_model_of_one_block_writes_beyond_its_row(place, tmp_path):
    out = tmp_path / "mdlm"
    trained = blockdiff("train", place / "recipe.yaml", f"out={out}", "model.block_size=32")
    assert trained.returncode == 0, trained.stderr
    options = ("sample", out, "--max-new-tokens", 64, "--no-eos", "--json", "--seed", 1)
    rows = [json.loads(blockdiff(*options, *more).stdout) for more in ((), ("--stride", 16))]
    assert rows[0] == rows[1] and len(rows[0]["ids"]) == rows[0]["nfe"] == 64


def test_an_existing_run_is_kept(place):
    before = (place / "run" / "metrics.jsonl").read_bytes()
    refused = blockdiff("train", place / "recipe.yaml")
    assert refused.returncode == 2 and "--resume" in refused.stderr
    assert (place / "run" / "metrics.jsonl").read_bytes() == before
    finished = blockdiff("train", place / "recipe.yaml", "--resume")
    assert finished.returncode == 0
    changed = blockdiff("train", place / "recipe.yaml", "optim.lr=0.1", "--resume")
    assert changed.returncode == 2 and "optim.lr" in changed.stderr


MISTAKES = {
    "unknown key": (["train", "{recipe}", "optim.warmup=3"], "optim.warmup_steps"),
    "wrong type": (["train", "{recipe}", "train.steps=many"], "train.steps"),
    "block size": (["train", "{recipe}", "model.block_size=5", "out={new}"], "divisor"),
    "masks for ar": (["train", "{recipe}", "out={new}", "objective.name=ar", "model.cond_dim=128",
                      "objective.estimator=count"], "objective.estimator is count"),
    "other weights": (["train", "{recipe}", "out={new}", "model.init_from={golden}"],
                      "vocab_size is 101 there and 258 here"),
    "no weights": (["train", "{recipe}", "out={new}", "model.init_from={folder}"], "config.json"),
    "own weights": (["train", "{recipe}", "model.init_from={run}"], "choose another out"),
    "no recipe": (["train", "{folder}/none.yaml"], "none.yaml"),
    "no data": (["eval", "{run}", "--data", "{folder}"], "manifest.json"),
    "no split": (["eval", "{run}", "--data", "{data}", "--split", "test"], "train, valid"),
    "other vocabulary": (["eval", "{golden}", "--data", "{data}"], "V = 258"),
    "estimator": (["eval", "{run}", "--data", "{data}", "--estimator", "x"], "exact or orders"),
    "replicates": (["variance", "{run}", "--data", "{data}", "--replicates", "1"], "at least 2"),
    "batches": (["variance", "{run}", "--data", "{data}", "--batches", "0"], "batches is 0"),
    "divisor": (["variance", "{run}", "--data", "{data}", "--block-sizes", "5", "--batch-size", "1",
                 "--batches", "1"], "does not divide the 32 tokens"),
    "sizes": (["variance", "{run}", "--data", "{data}", "--block-sizes", "4;8"], "commas"),
    "size 0": (["variance", "{run}", "--data", "{data}", "--block-sizes", "0"], "at least 1"),
    "law": (["variance", "{run}", "--data", "{data}", "--estimators", "x"], "unknown estimator"),
    "odd pairs": (["variance", "{run}", "--data", "{data}", "--estimators", "complementx3"],
                  "even"),
    "many rows": (["variance", "{run}", "--data", "{data}", "--batches", "5000"], "fewer batches"),
    "plot": (["variance", "{run}", "--data", "{data}", "--plot", "{recipe}/a.svg"], "recipe.yaml"),
    "plot folder": (["variance", "{run}", "--data", "{data}", "--plot", "{folder}"], "directory"),
    "order": (["references", "{data}", "--order", "0"], "order is 0"),
    "coded split": (["references", "{data}", "--split", "train"], "split is train"),
    "train rows": (["references", "{data}", "--train-rows", "0"], "--train-rows is 0"),
    "no references": (["references", "{folder}"], "no prepared data"),
    "other symbols": (["references", "{data}", "--model", "{golden}"], "V = 258"),
    "no set": (["prepare", "lambada", "--out", "{new}"], "no split 'train'"),
    "no suite": (["zero-shot", "{run}", "--suite", "all"], "must be one of paper"),
    "no task": (["zero-shot", "{run}", "--tasks", "wiki"], "ptb, wikitext, lm1b"),
    "no local": (["zero-shot", "{run}", "--local", "ptb={new}"], "no file or folder"),
    "no tokenizer": (["zero-shot", "{golden}"], "--tokenizer gpt2"),
    "other tokenizer": (["zero-shot", "{golden}", "--tokenizer", "byte"], "V = 258 and mask 257"),
    "stride": (["zero-shot", "{run}", "--packing", "document", "--stride", "6"], "multiples"),
    "stride of rows": (["zero-shot", "{run}", "--stride", "4"], "packing document"),
    "law of zero-shot": (["zero-shot", "{run}", "--estimator", "count[0.3,0.8]"], "clipped"),
    "no model": (["sample", "{folder}/nothing/here"], "does not exist"),
    "top p": (["sample", "{run}", "--top-p", "1.5"], "(0, 1]"),
    "temperature": (["sample", "{run}", "--temperature", "inf"], "temperature is inf"),
    "cold": (["sample", "{run}", "--temperature", "1e-45"], "between 1e-30 and"),
    "seed": (["sample", "{run}", "--seed", str(2**70)], "; it must be at most 1844"),
    "seed of infill": (["infill", "{run}", "[MASK]", "--seed", "-1"], "--seed is -1; it must be"),
    "steps": (["sample", "{run}", "--steps", "4"], "ancestral"),
    "slide": (["sample", "{run}", "--stride", "4"], "models of one block"),
    "policy": (["sample", "{run}", "--sampler", "best"], "first-hitting"),
    "window": (["sample", "{run}", "--window", "8", "--prompt", "ten letters"], "window"),
    "no gap": (["infill", "{run}", "nothing is missing"], "nothing to fill"),
    "no template": (["infill", "{run}"], "--template-file"),
    "two templates": (["infill", "{run}", "[MASK]", "--template-file", "b"], "--template-file"),
    "policy of infill": (["infill", "{run}", "[MASK]", "--tokens-per-step", "2"], "random"),
    "no point": (["pareto", "{run}", "--scorer", "{golden}", "--out", "{new}", "--point", "a:k=2"],
                 "there are steps, schedule"),
    "JSON prompt": (["sample", "{run}", "--prompt-file", "a.jsonl"], "is read as one plain text"),
    "packed prompt": (["sample", "{run}", "--prompt-file", "a.json.gz"], "named as JSON"),
    "prompt folder": (["sample", "{run}", "--prompt-file", "{folder}"], "is a folder: name a file"),
    "prompt device": (["sample", "{run}", "--prompt-file", "/dev/zero"], "is a device"),
    "template gone": (["infill", "{run}", "--template-file", "{new}"], "does not exist"),
    "pipe": (["prepare", "/dev/zero", "--out", "{new}"], "/dev/zero is a device: name a file"),
    "two prompts": (["sample", "{run}", "--prompt", "a", "--prompt-file", "b"], "one of them"),
    "stream many": (["sample", "{run}", "--stream", "--num-samples", "2"], "--stream"),
    "dtype": (["sample", "{run}", "--dtype", "int3"], "float32"),
    "device": (["sample", "{run}", "--device", "tpu"], "--device is tpu"),
    "schedule": (["sample", "{run}", "--schedule", "cosine"], "ancestral"),
    "clipped": (["eval", "{run}", "--data", "{data}", "--estimator", "count[0.3,0.8]"], "clipped"),
    "pairs": (["eval", "{run}", "--data", "{data}", "--estimator", "complementx3"], "even"),
    "target": (["eval", "{run}", "--data", "{data}", "--target-stderr", "0"], "target_stderr"),
    "rows of what": (["eval", "{run}", "--data", "{data}", "--per-row"], "give --json FILE"),
    "no lengths": (["lengths", "{run}", "--num-samples", "0"], "--num-samples is 0"),
    "no table": (["reproduce", "T0", "--scale", "tiny"], "there are T1, T2"),
    "not a run": (["report", "{data}"], "config.yaml"),
    "option": (["sample", "{run}", "--tempreature", "1"], "--temperature"),
    "missing text": (["prepare", "{folder}/no.txt", "--out", "{new}"], "no.txt"),
    "short corpus": (["prepare", "{folder}/recipe.yaml", "--out", "{new}", "--tokenizer", "byte",
                      "--valid-fraction", "0", "--seq-len", "100000"], "100,000 of one row"),
}  # fmt: skip


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_one_sentence_and_exit_code_two(place, name, tmp_path):
    arguments, expected = MISTAKES[name]
    names = {
        "recipe": place / "recipe.yaml", "folder": place, "run": place / "run",
        "data": place / "data", "golden": GOLDEN / "bd3lm-hf", "new": tmp_path / "new",
    }  # fmt: skip
    failed = blockdiff(*(a.format(**names) for a in arguments))
    assert failed.returncode == 2, (failed.stdout, failed.stderr)
    assert expected in failed.stderr and "Traceback" not in failed.stderr
    lines = [line for line in failed.stderr.splitlines() if line.strip()]
    assert len(lines) == 1 and lines[0].startswith("blockdiff: error: ")


def test_a_reader_that_goes_away_is_no_error(place):
    command = f"{sys.executable} -m blockdiffusion.cli sample {place / 'run'} --num-samples 40"
    piped = subprocess.run(
        f"{command} --max-new-tokens 8 | head -1", shell=True, capture_output=True, text=True
    )
    assert "Traceback" not in piped.stderr


def test_signals_save_and_tell_how_to_go_on(place, tmp_path):
    for number, code in ((signal.SIGINT, 130), (signal.SIGTERM, 143)):
        out = tmp_path / number.name
        process = subprocess.Popen(
            [sys.executable, "-m", "blockdiffusion.cli", "train", place / "recipe.yaml",
             f"out={out}", "train.steps=100000", "eval.every=null", "sample.every=null"],
            stderr=subprocess.PIPE, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"},
        )  # fmt: skip
        deadline = time.monotonic() + 300
        metrics = out / "metrics.jsonl"
        while not (metrics.exists() and metrics.read_bytes().count(b"\n") > 3):
            assert time.monotonic() < deadline and process.poll() is None
            time.sleep(0.05)
        process.send_signal(number)
        _, message = process.communicate(timeout=300)
        assert process.returncode == code
        assert "blockdiff train" in message and "--resume" in message
        assert list((out / "checkpoints").glob("step-*"))


@pytest.mark.parametrize(
    ("given", "written"),
    [
        (["--train.steps", "5"], "write train.steps=5,"),
        (["--lr=1e-3"], "write optim.lr=1e-3,"),
        (["--num-hidden-layers", "2"], "write model.num_hidden_layers=2,"),
        (["--batch_size"], "write search.batch_size=VALUE or train.batch_size=VALUE,"),
    ],
)
@pytest.mark.parametrize("command", ["train", "estimate"])
def test_an_option_that_is_a_key_of_the_recipe_says_how_it_is_written(command, given, written):
    ended = blockdiff(command, "recipes/demo.yaml", *given)
    assert ended.returncode == 2 and written in ended.stderr and ended.stderr.count("\n") == 1
    assert "No such option: --foo" in blockdiff(command, "recipes/demo.yaml", "--foo").stderr


@pytest.mark.parametrize("command", [["--help"], ["--version"], ["datasets"], ["eval", "--help"]])
def test_a_reader_that_goes_away_ends_a_command_quietly(command):
    """As `blockdiff ... | true` in a shell: with the exit code of SIGPIPE and no message."""
    read, write = os.pipe()
    os.close(read)
    ended = subprocess.run(
        [sys.executable, "-m", "blockdiffusion.cli", *command], stdout=write,
        stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    os.close(write)
    assert (ended.returncode, ended.stderr) == (128 + signal.SIGPIPE, "")


def test_python_runs_the_package():
    shown = subprocess.run(
        [sys.executable, "-m", "blockdiffusion", "--version"], capture_output=True, text=True
    )
    assert shown.stdout == blockdiff("--version").stdout and shown.stdout.startswith("blockdiff ")


def completions(words, monkeypatch):
    """What the shell is offered for the last word."""
    from blockdiffusion.cli import app

    words, out = f"blockdiff {words}", io.StringIO()
    monkeypatch.setenv("_BLOCKDIFF_COMPLETE", "complete_bash")
    monkeypatch.setenv("COMP_WORDS", words)
    monkeypatch.setenv("COMP_CWORD", str(len(words.split(" ")) - 1))
    with contextlib.redirect_stdout(out), contextlib.suppress(SystemExit):
        app([], prog_name="blockdiff", standalone_mode=False)
    return out.getvalue().split()


def test_the_shell_completes_values_to_those_that_there_are(monkeypatch):
    """All of them, and each is in the help."""
    allowed = {
        "prepare x --packing": PACKERS,
        "prepare x --documents": get_args(get_type_hints(PrepareOptions)["documents"]),
        "prepare x --detokenize": DETOKENIZERS,
        "estimate x --device": NAMES,
        "estimate x --sample-dtype": get_args(SampleDtype),
        "sample x --sampler": SAMPLERS,
        "sample x --schedule": SCHEDULES,
        "sample x --top-p-rule": get_args(TopPRule),
        "sample x --device": ("auto", "cpu", "cuda", "mps"),
        "sample x --dtype": ("auto", "float32", "float64", "bfloat16", "int8"),
        "eval x --dtype": ("auto", "float32", "float64", "bfloat16"),
        "variance x --estimators": get_args(EstimatorName),
        "zero-shot x --packing": zero_shot.PACKINGS,
        "zero-shot x --frame": zero_shot.FRAMES,
        "zero-shot x --suite": zero_shot.SUITES,
        "zero-shot x --tasks": [task.name for task in zero_shot.SUITES["paper"]],
        "reproduce T1 --scale": SCALES,
        "convert x --to": get_args(Target),
        "convert x --weights": get_args(Weights),
    }
    for words, values in allowed.items():
        assert sorted(completions(f"{words} ", monkeypatch)) == sorted(values), words
        command, *_, option = words.split()
        monkeypatch.delenv("_BLOCKDIFF_COMPLETE")
        shown = blockdiff(command, "--help").stdout.replace("-\n", "-")
        about = " ".join(re.split(r"\n +--", shown.partition(f"  {option} ")[2])[0].split())
        assert all(value in about for value in values), (words, about)
    for words in ("eval x --estimator ", "zero-shot x --estimator ", "references x --estimator "):
        assert completions(words, monkeypatch)[:3] == ["auto", "exact", "orders"]
    assert completions("prepare wiki", monkeypatch) == [
        n for n in DATA_SETS if n.startswith("wiki")
    ]
    assert completions("prepare ", monkeypatch) == []  # the shell's own: files
