"""Every operation on the disk fails in turn; what a run began, the next one ends the same."""

import gc
import json
import shutil
from collections import Counter

import pytest

import blockdiffusion.evaluate.replicates as replicates
from blockdiffusion.data import packing
from blockdiffusion.files.checksums import NOTES, SUMS
from blockdiffusion.train.checkpoint import holds_run
from tests.command import blockdiff
from tests.faulty_disk import FaultyDisk
from tests.tiny import TEXT, write_recipe

TIMES = {"seconds", "tokens_per_second", "tflops_per_second", "peak_share"}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Text, prepared data, and a run, outside the folder whose disk fails."""
    folder = tmp_path_factory.mktemp("whole")
    (folder / "text.txt").write_text(TEXT[:2900])
    assert prepare(folder, folder / "data").returncode == 0
    recipe = write_recipe(
        folder / "recipe.yaml",
        folder / "data",
        folder / "run",
        eval={"every": 2, "rows": 2, "mc_samples": 2},
        checkpoint={"every": 1, "keep": 1},
    )
    assert blockdiff("train", recipe).returncode == 0
    return folder


def prepare(place, out):
    return blockdiff(
        "prepare", place / "text.txt", "--out", out, "--tokenizer", "byte", "--seq-len", 16,
        "--packing", "document", "--documents", "blank-line", "--workers", 1,
    )  # fmt: skip


def train(place, out):
    resume = ["--resume"] if holds_run(out / "run") else []
    return blockdiff("train", place / "recipe.yaml", f"out={out / 'run'}", *resume)


def evaluate(place, out):
    return blockdiff(
        "eval", place / "run", "--data", place / "data", "--mc-samples", 2, "--estimator", "count",
        "--json", out / "eval.json",
    )  # fmt: skip


def convert(place, out):
    return blockdiff("convert", place / "run", "--out", out / "model")


def content(folder):
    """What lies in a folder, without what tells the time, and without notes of what was checked."""
    found = {}
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        if path.name in (NOTES, ".lock"):
            continue
        data = path.read_bytes()
        if path.suffix in (".json", ".jsonl"):
            lines = data.decode().splitlines() if path.suffix == ".jsonl" else [data.decode()]
            values = [without_times(json.loads(line)) for line in lines]
            data = [v for v in values if not (isinstance(v, dict) and "note" in v)]
        elif path.name == SUMS:  # of files that tell the time
            data = [line for line in data.splitlines() if not line.endswith(b".json")]
        elif path.name == "config.yaml":
            data = data.replace(str(folder).encode(), b"")
        found[str(path.relative_to(folder))] = data
    return found


def without_times(value):
    if isinstance(value, dict):
        return {k: without_times(v) for k, v in value.items() if k not in TIMES and k != "out"}
    return [without_times(item) for item in value] if isinstance(value, list) else value


def run_on_faulty_disk(command, place, folder, fails=0, full=False):
    folder.mkdir()
    with FaultyDisk(folder, fails, full).installed() as disk:
        ended = command(place, folder)
    gc.collect()
    return disk, ended


def each_fault(command, place, tmp_path, first, every):
    """Every `every`-th operation fails, once and from then on; the outcomes are counted."""
    whole, ended = run_on_faulty_disk(command, place, tmp_path / "whole")
    assert ended.returncode == 0, ended.stderr
    expected = content(tmp_path / "whole")
    outcomes = Counter(operations=whole.count)
    for full in (False, True):
        for number in range(first, whole.count + 1, every):
            folder = tmp_path / f"{full}-{number}"
            disk, ended = run_on_faulty_disk(command, place, folder, number, full)
            about = f"{command.__name__}, {disk.failed}: {ended.stderr}"
            if not disk.failed:
                continue  # a removal, which a full disk still does, was the last operation
            outcomes["faults"] += 1
            assert ended.returncode in (0, 2), about
            if ended.returncode == 2:
                outcomes["sentences"] += 1
                said = [line for line in ended.stderr.splitlines() if "blockdiff: error: " in line]
                assert len(said) == 1 and "Traceback" not in ended.stderr, about
                ended = command(place, folder)
                assert ended.returncode == 0, f"{about} then {ended.stderr}"
            else:
                outcomes["of no importance"] += 1
                print(disk.failed)
            found = content(folder)
            assert found.keys() == expected.keys(), about
            for name, data in expected.items():
                assert found[name] == data, f"{about} {name}"
            shutil.rmtree(folder)
    print(command.__name__, dict(outcomes))
    return outcomes


COMMANDS = [prepare, train, evaluate, convert]
PARTS = 8  # of all operations, for tests of less than a minute each


@pytest.fixture(autouse=True)
def many_small_writes(monkeypatch):
    monkeypatch.setattr(replicates, "PASS_TOKENS", 64)
    monkeypatch.setattr(packing, "UNIT_BYTES", 2000)
    monkeypatch.setattr(packing, "SHARD_TOKENS", 16 * 40)


@pytest.mark.parametrize("command", COMMANDS)
def test_a_write_that_fails_is_told_and_nothing_is_lost(command, place, tmp_path):
    outcomes = each_fault(command, place, tmp_path, first=7, every=37)
    assert outcomes["sentences"] >= 2


@pytest.mark.slow
@pytest.mark.parametrize("first", range(1, PARTS + 1))
@pytest.mark.parametrize("command", COMMANDS)
def test_every_write_that_fails_is_told_and_nothing_is_lost(command, first, place, tmp_path):
    outcomes = each_fault(command, place, tmp_path, first, every=PARTS)
    assert outcomes["sentences"] > outcomes["operations"] / PARTS
