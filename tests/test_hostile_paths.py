"""Every option of every command that names a place, with places that cannot be."""

import inspect
import os
import shutil
from pathlib import Path
from typing import get_type_hints

import pytest

from blockdiffusion.cli import COMMANDS
from tests.command import blockdiff
from tests.tiny import TEXT, write_recipe

# `{}` is the place; capitals are files that are there, NEW may be made.
LINES = """
prepare {} --out NEW --tokenizer byte
prepare TEXT --out {} --tokenizer byte
prepare TEXT --out NEW --tokenizer {}
prepare TEXT --out NEW --tokenizer byte --valid {}
estimate {}
estimate RECIPE --json {}
estimate RECIPE data.path={}
train {}
train RECIPE out={}
train RECIPE out=NEW data.path={}
train RECIPE out=NEW model.init_from={}
report {}
report RUN --evaluation {}
report RUN --num-samples 1 --max-new-tokens 4 --out {}
adapt {} --data DATA --block-size 4 --out NEW
adapt JUDGE --data {} --block-size 4 --out NEW
adapt JUDGE --chat {} --block-size 4 --out NEW
adapt JUDGE --data DATA --block-size 4 --out {}
compare {} RUN --data DATA
compare JUDGE {} --data DATA
compare JUDGE RUN --data {}
compare JUDGE RUN --data DATA --json {}
eval {} --data DATA
eval RUN --data {}
eval RUN --data DATA --limit 2 --json {}
zero-shot {} --only ptb --local ptb=TEXT
zero-shot RUN --only ptb --local ptb=TEXT --limit 2 --tokenizer {}
zero-shot RUN --only ptb --local ptb=TEXT --limit 2 --json {}
zero-shot RUN --only ptb --local ptb=TEXT --limit 2 --csv {}
zero-shot RUN --only ptb --local ptb=TEXT --limit 2 --markdown {}
references {}
references DATA --model {}
references DATA --limit 2 --json {}
references DATA --limit 2 --markdown {}
variance {} --data DATA
variance RUN --data {}
variance RUN --data DATA --json {}
variance RUN --data DATA --plot {}
sample {}
sample RUN --prompt-file {}
decide {} CASES
decide RUN {}
decide RUN CASES --out {}
decide RUN CASES --calibrate {}
chat {}
generate {} PROMPTS --out NEW
generate RUN {} --out NEW
generate RUN PROMPTS --out {}
infill {} a[MASK:2]b
infill RUN --template-file {}
lengths {}
lengths RUN --num-samples 1 --json {}
generate-eval {} --scorer JUDGE --num-samples 2
generate-eval RUN --scorer {} --num-samples 2
generate-eval RUN --scorer JUDGE --num-samples 2 --reference {}
generate-eval --scorer JUDGE --samples-from {}
generate-eval RUN --scorer JUDGE --num-samples 2 --json {}
generate-eval RUN --scorer JUDGE --num-samples 2 --csv {}
generate-eval RUN --scorer JUDGE --num-samples 2 --markdown {}
generate-eval RUN --scorer JUDGE --num-samples 2 --plot {}
generate-compare {}
generate-compare RESULT --csv {}
generate-compare RESULT --markdown {}
generate-compare RESULT --plot {}
pareto {} --scorer JUDGE --out NEW
pareto RUN --scorer {} --out NEW
pareto RUN --scorer JUDGE --out {}
reproduce T1 --scale tiny --data wikitext2={}
reproduce T1 --scale tiny --data wikitext2=TEXT --out {}
verify {}
convert {} --out NEW
convert RUN --out {}
convert RUN --out NEW --tokenizer {}
push {} owner/name
""".strip().splitlines()
MAY_BE_A_FOLDER = {  # of any content
    "prepare {} --out NEW --tokenizer byte",
    "prepare TEXT --out NEW --tokenizer byte --valid {}",
    "train RECIPE out={}",
    "estimate RECIPE data.path={}",
    "generate-eval RUN --scorer JUDGE --num-samples 2 --reference {}",
    "pareto RUN --scorer JUDGE --out {}",
    "reproduce T1 --scale tiny --data wikitext2={}",
    "reproduce T1 --scale tiny --data wikitext2=TEXT --out {}",
}
OUTPUTS = ("--out {}", "--json {}", "--csv {}", "--markdown {}", "--plot {}", "out={}")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("paths")
    (folder / "TEXT").write_text(TEXT)
    (folder / "PROMPTS").write_text('{"prompt": "The"}')
    (folder / "CASES").write_text('{"prompt": "The", "choices": [" cat", " dog"]}')
    made = blockdiff("prepare", folder / "TEXT", "--out", folder / "DATA", "--tokenizer", "byte",
                     "--seq-len", 16, "--documents", "blank-line", "--workers", 1)  # fmt: skip
    assert made.returncode == 0, made.stderr
    write_recipe(folder / "RECIPE", folder / "DATA", folder / "RUN")
    for name, seed in (("RUN", 0), ("JUDGE", 1)):
        made = blockdiff("train", folder / "RECIPE", f"out={folder / name}", f"train.seed={seed}")
        assert made.returncode == 0, made.stderr
    judged = blockdiff("generate-eval", folder / "RUN", "--scorer", folder / "JUDGE",
                       "--num-samples", 2, "--max-new-tokens", 4,
                       "--json", folder / "RESULT")  # fmt: skip
    assert judged.returncode == 0, judged.stderr
    (folder / "folder").mkdir()
    (folder / "folder" / "text.txt").write_text(TEXT)
    return folder


def places(folder):
    """Places that cannot be, not by the superuser either, by what is wrong with them."""
    return {
        "a folder": folder / "folder",
        "below a file": folder / "TEXT" / "x",
        "a long name": folder / ("n" * 300),
        "a long path": folder / "/".join(["d" * 100] * 50),
        "null": "a\0b",
        "a lone half of a character": "a\ud800b",
        "links in a circle": folder / "circle",
        "read-only": "/proc/self/x",
    }


def words(line, folder, where):
    for word in line.split():
        for name in ("TEXT", "RECIPE", "DATA", "RUN", "JUDGE", "RESULT", "PROMPTS", "CASES", "NEW"):
            if word == name or word.endswith(f"={name}"):
                word = word.removesuffix(name) + str(folder / name)
        yield word.replace("{}", str(where))


def refuse(line, place, what):
    where = places(place)[what]
    ended = blockdiff(*words(line, place, where))
    shutil.rmtree(place / "NEW", ignore_errors=True)
    about = f"{line} with {what}: {ended.returncode} {ended.stderr[-500:]}"
    assert ended.returncode == 2, about
    assert ended.stderr.count("blockdiff: error: ") == 1 and "Traceback" not in ended.stderr, about
    assert len(ended.stderr) < 4000, about


@pytest.fixture(autouse=True)
def offline(monkeypatch, place):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    if not (place / "circle").is_symlink():
        os.symlink(place / "circle", place / "circle")


def cases():
    for line in LINES:
        for what in places(Path()):
            if what == "a folder" and line in MAY_BE_A_FOLDER:
                continue
            if what == "links in a circle" and line.endswith(OUTPUTS):
                continue  # a file takes the place of the link
            yield line, what


@pytest.mark.parametrize(("line", "what"), list(cases())[::9])
def test_a_place_that_cannot_be_is_a_sentence(line, what, place):
    refuse(line, place, what)


@pytest.mark.slow
@pytest.mark.parametrize("line", LINES)
def test_every_place_that_cannot_be_is_a_sentence(line, place):
    for other, what in cases():
        if other == line:
            refuse(line, place, what)


def test_every_option_that_names_a_place_is_among_the_lines():
    for name, command in COMMANDS.items():
        lines = [line for line in LINES if line.split()[0] == name]
        parameters = inspect.signature(command).parameters
        hints = {key: parameter.annotation for key, parameter in parameters.items()}
        hints |= get_type_hints(command, include_extras=True)
        for key, hint in hints.items():
            if "Path" in str(hint) and key != "return":
                option = f"--{key.removesuffix('_file').replace('_', '-')}"
                option = f"{option}-file" if key in ("prompt_file", "template_file") else option
                is_option = "OptionInfo" in str(hint)
                assert any(
                    (f"{option} {{}}" in line) if is_option else ("{}" in line) for line in lines
                ), (name, key)
