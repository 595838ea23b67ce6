"""The README's commands and Python, run in order at reduced size."""

import re
import shlex
from pathlib import Path

import pytest

from tests.command import blockdiff

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
# What makes the commands small; everything else is run as it stands.
SMALLER = {
    "prepare": ["--tokenizer", "bpe:300", "--document-bytes", "4000"],
    "train": [
        "train.steps=4", "train.batch_size=4", "model.num_hidden_layers=1", "model.hidden_size=32",
        "eval.rows=2", "sample.max_new_tokens=8",
    ],
    "eval": ["--limit", "2"],
    "sample": ["--max-new-tokens", "8"],
    "report": ["--max-new-tokens", "8", "--num-samples", "1"],
}  # fmt: skip


def blocks(language):
    """The fenced blocks of a language ("" for none), in order."""
    fences = re.findall(r"^```(\w*)\n(.*?)^```$", README, re.S | re.M)
    return [text for name, text in fences if name == language]


def blockdiff_lines():
    lines = [line for block in blocks("sh") for line in block.splitlines()]
    return [line for line in lines if line.startswith("blockdiff ")]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A working folder like the one the README supposes: some notes, recipes, a trained model."""
    folder = tmp_path_factory.mktemp("readme")
    (folder / "notes").mkdir()
    text = "Once upon a time there was a small model. It read one block after another.\n\n"
    (folder / "notes" / "story.txt").write_text(text * 300)
    (folder / "notes" / "other.md").write_text("# Notes\n\nIt was the best of times.\n" * 100)
    for name in ("recipes", "pretrained"):
        (folder / name).symlink_to(ROOT / name)
    return folder


def test_the_commands_run_in_order(place, monkeypatch):
    monkeypatch.chdir(place)
    lines = blockdiff_lines()
    assert [shlex.split(line)[1] for line in lines] == ["sample", *SMALLER]
    for line in lines:
        _, command, *arguments = shlex.split(line, comments=True)
        run = blockdiff(command, *arguments, *SMALLER[command])
        assert run.returncode == 0, (line, run.stderr)
    assert (place / "runs" / "notes" / "report.html").is_file()


def test_the_sample_of_the_trained_model_is_what_it_writes(place, monkeypatch):
    monkeypatch.chdir(place)
    _, command, *arguments = shlex.split(blockdiff_lines()[0])
    written = blockdiff(command, *arguments).stdout
    assert written.replace("\r\n", "\n") in blocks("")  # its books have both line ends


def test_the_python_runs(place, monkeypatch, capsys):
    monkeypatch.chdir(place)
    for block in blocks("python"):
        exec(compile(block, "README.md", "exec"), {})
    printed = capsys.readouterr().out
    assert printed.startswith("4 ") and "perplexity <= " in printed and "Once upon" in printed


def test_the_make_targets_exist():
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"make ([a-z-]+)", README):
        assert re.search(rf"^{target}:", makefile, re.M), target


def test_links_lead_somewhere():
    for target in re.findall(r"\]\(([^)]+)\)", README):
        if not target.startswith("http"):
            assert (ROOT / target.split("#")[0]).exists(), target


def test_the_tree_is_the_tree():
    (tree,) = [block for block in blocks("") if "src/blockdiffusion/" in block]
    for name in re.findall(r"[a-z_]+\.py\b|[a-z_]+/", tree):
        if name != "src/":
            assert list(ROOT.glob(f"**/{name.rstrip('/')}")), name
