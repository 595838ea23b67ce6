"""Every numeric option of every command, by what is no such number: exit 0 or 2, one sentence."""

from __future__ import annotations

import shutil
import time
from collections import Counter

import pytest

from blockdiffusion.cli import COMMANDS
from tests.command import blockdiff
from tests.test_hostile_paths import place, words  # noqa: F401 (a fixture)
from tests.test_limits import options_of

VALUES = ("0", "-1", "nan", "inf", "-inf", "1e308", "-1e308", "1e-300", "5e-324", str(10**18),
          str(2**63), "9" * 5000, "", "text", "1.5", "1_0", "\u0663")  # fmt: skip
MOST_SECONDS = 30.0
# The shortest line of each command that has a number; capitals as in `test_hostile_paths`.
LINES = {
    "prepare": "TEXT --out NEW --tokenizer byte --seq-len 16 --documents blank-line --workers 1",
    "estimate": "RECIPE --device h100",
    "report": "RUN --out NEW --num-samples 1 --max-new-tokens 4",
    "adapt": "JUDGE --data DATA --block-size 4 --out NEW --steps 1 train.batch_size=2",
    "compare": "JUDGE RUN --data DATA --limit 2",
    "eval": "RUN --data DATA --rows 2 --samples 1",
    "zero-shot": "RUN --only ptb --local ptb=TEXT --rows 2 --samples 1",
    "references": "DATA --model RUN --rows 2 --order 2 --samples 1",
    "variance": "RUN --data DATA --batch-size 2 --batches 1 --replicates 2",
    "sample": "RUN --max-new-tokens 4",
    "decide": "RUN CASES",
    "chat": "RUN",
    "generate": "RUN PROMPTS --out NEW --max-new-tokens 4",
    "infill": "RUN a[MASK:2]b",
    "lengths": "RUN --num-samples 1 --max-new-tokens 4",
    "generate-eval": "RUN --judge JUDGE --num-samples 2 --max-new-tokens 4 --reference DATA",
    "pareto": "RUN --judge JUDGE --out NEW --num-samples 2 --max-new-tokens 4 --point random:"
    "tokens_per_step=2",
    "convert": "RUN --out NEW",
}
# What makes an option count.
BESIDE = {
    "valid_fraction": "--seq-len 8",
    "steps": "--policy ancestral",
    "tokens_per_step": "--policy random",
    "threshold": "--policy confidence",
    "sub_block": "--policy confidence --threshold 0.9",
    "remask": "--policy remask --steps 2",
    "entropy_window": "--min-entropy 0.1",
    "tflops": "--device mine --bandwidth 9 --memory 9",
    "bandwidth": "--device mine --tflops 9 --memory 9",
    "memory": "--device mine --tflops 9 --bandwidth 9",
}


def cases():
    return [
        (command, option, value)
        for command, function in COMMANDS.items()
        for option in options_of(function)
        for value in VALUES
    ]


def check(folder, command, option, value):
    given = f"--{option.replace('_', '-')}={value}"
    of_no_sampler = (command, option) in (("estimate", "tokens_per_step"), ("adapt", "steps"))
    beside = "" if of_no_sampler else BESIDE.get(option, "")
    line = f"{command} {LINES[command]} {beside}"
    began = time.monotonic()
    ended = blockdiff(*words(line, folder, ""), given)  # the last of two counts
    shutil.rmtree(folder / "NEW", ignore_errors=True)
    (folder / "NEW").unlink(missing_ok=True)
    about = f"{line} {given[:60]}: {ended.returncode} {ended.stdout[-300:]} {ended.stderr[-500:]}"
    assert time.monotonic() - began < MOST_SECONDS, about
    assert ended.returncode in (0, 2), about
    assert ended.stderr.count("blockdiff: error: ") == (ended.returncode == 2), about
    assert len(ended.stderr) < 4000 and "Traceback" not in ended.stderr, about
    assert not {"nan", "inf"} & set(ended.stdout.replace(",", " ").split()), about
    return ended.returncode


def test_every_command_with_a_number_has_a_line():
    assert {command for command, _, _ in cases()} == LINES.keys()
    assert len({(command, option) for command, option, _ in cases()}) > 80


@pytest.mark.parametrize(("command", "option", "value"), cases()[::37])
def test_a_sample_of_the_numbers(command, option, value, place):  # noqa: F811
    check(place, command, option, value)


@pytest.mark.parametrize(
    ("command", "option"), [("prepare", "valid_fraction"), ("eval", "target_stderr")]
)
@pytest.mark.parametrize("value", ["1e-300", "5e-324", "1e-25"])
def test_numbers_close_to_zero(command, option, value, place):  # noqa: F811
    assert check(place, command, option, value) == (0 if value == "1e-25" else 2)


@pytest.mark.slow
@pytest.mark.parametrize("command", LINES)
def test_all_numbers(command, place):  # noqa: F811
    found = Counter(check(place, *case) for case in cases() if case[0] == command)
    print(f"{command}: {found.total()} numbers: {found[0]} ended with 0, {found[2]} with 2")
    assert found[2] > found.total() / 2
