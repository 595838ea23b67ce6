"""Every file that the commands read, every key of it, by nine wrong values: exit 0 or 2, never a
stack trace, in bounded time. `make test` takes every so many of them, `make test-all` all."""

from __future__ import annotations

import json
import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

import blockdiffusion.evaluate.replicates as replicates
from tests.command import blockdiff
from tests.conftest import GOLDEN
from tests.tiny import TEXT, stop_at_third_group, write_recipe

WRONG = {
    "null": None,
    "text": "text",
    "list": ["list"],
    "negative": -1,
    "huge": 10**30,
    "float": 0.5,
    "nested": {"nested": {"object": 1}},
    "empty": "",
}
CUT = "cut"
MOST_SECONDS = 30.0  # of a mutation, whatever else the machine does
SAMPLED = 60


@dataclass(frozen=True)
class Target:
    """A file, and the command that reads it; paths are in the folder of `place`.

    `kind` is json, yaml, lines (a JSON object a line) or header (in front of tensors).
    """

    file: str
    command: tuple[str, ...]
    kind: str = "json"


SAMPLE = ("sample", "{p}/run", "--max-new-tokens", "4", "--seed", "1")
EVAL = ("eval", "{p}/run", "--data", "{p}/data", "--limit", "4", "--mc-samples", "2")
REPORT = ("report", "{p}/run", "--num-samples", "1", "--max-new-tokens", "4")
RESUME = ("train", "{p}/run/config.yaml", "--resume", "out={p}/run")
ESTIMATE = ("estimate", "{p}/recipe.yaml", "--device", "h100")
JUDGE = ("generate-eval", "{p}/run", "--scorer", "{p}/judge", "--num-samples", "2", "--batch-size",
         "2", "--max-new-tokens", "4", "--json", "{p}/judged.json")  # fmt: skip
TARGETS = {
    "config.json": Target("run/model/config.json", SAMPLE),
    "bd3lm config.json": Target(
        "bd3lm/config.json", ("sample", "{p}/bd3lm", "--max-new-tokens", "2")
    ),
    "tokenizer_config.json": Target("run/model/tokenizer_config.json", SAMPLE),
    "card.json": Target("run/model/card.json", (*EVAL, "--card")),
    "header": Target("run/model/model.safetensors", SAMPLE, kind="header"),
    "manifest.json": Target("data/manifest.json", EVAL),
    "state.json": Target("run/checkpoints/step-00000002/state.json", RESUME),
    "state.json in a report": Target("run/checkpoints/step-00000002/state.json", REPORT),
    "metrics.jsonl": Target("run/metrics.jsonl", REPORT, kind="lines"),
    "metrics.jsonl, resumed": Target("run/metrics.jsonl", RESUME, kind="lines"),
    "config.yaml": Target("run/config.yaml", REPORT, kind="yaml"),
    "config.yaml, resumed": Target("run/config.yaml", RESUME, kind="yaml"),
    "recipe": Target("recipe.yaml", ESTIMATE, kind="yaml"),
    "eval.json": Target("run/eval.json", REPORT),
    "journal": Target(
        "eval.json.journal", (*EVAL, "--estimator", "count", "--json", "{p}/eval.json"),
        kind="lines",
    ),
    "samples": Target("judged.samples.jsonl", JUDGE, kind="lines"),
    "samples from a file": Target(
        "judged.samples.jsonl",
        ("generate-eval", "--scorer", "{p}/judge", "--samples-from", "{p}/judged.samples.jsonl"),
        kind="lines",
    ),
    "result": Target(
        "judged.json",
        ("generate-compare", "{p}/judged.json", "{p}/kept.json", "--csv", "{p}/a.csv",
         "--markdown", "{p}/a.md", "--plot", "{p}/a.svg"),
    ),
    "point": Target(
        "pareto/points/first-hitting.json",
        ("pareto", "{p}/run", "--scorer", "{p}/judge", "--out", "{p}/pareto", "--point",
         "first-hitting", "--num-samples", "2", "--batch-size", "2", "--max-new-tokens", "4"),
    ),
}  # fmt: skip


def run(folder: Path, command: tuple[str, ...]) -> Any:
    return blockdiff(*(part.replace("{p}", str(folder)) for part in command))


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """All of these files, made by the commands themselves."""
    folder = tmp_path_factory.mktemp("mutations")
    small_passes = pytest.MonkeyPatch()
    small_passes.setattr(replicates, "PASS_TOKENS", 32)  # several groups of rows
    (folder / "text.txt").write_text(TEXT)
    prepare = ("prepare", "{p}/text.txt", "--out", "{p}/data", "--tokenizer", "byte", "--seq-len",
               "16", "--documents", "blank-line", "--workers", "1")  # fmt: skip
    write_recipe(
        folder / "recipe.yaml",
        folder / "data",
        folder / "run",
        search={"every": 1, "widths": [0.5], "rows": 2, "batch_size": 1, "replicates": 2},
        eval={"every": 2, "rows": 2, "mc_samples": 2},
        sample={"every": 2, "max_new_tokens": 4},
        checkpoint={"every": 1},
    )
    judge = ("train", "{p}/recipe.yaml", "out={p}/judge", "train.seed=5")
    for command in (prepare, ("train", "{p}/recipe.yaml"), judge):
        made = run(folder, command)
        assert made.returncode == 0, made.stderr
    assert run(folder, (*EVAL, "--json", "{p}/run/eval.json")).returncode == 0
    with pytest.MonkeyPatch.context() as patch:
        stop_at_third_group(patch)
        assert run(folder, TARGETS["journal"].command).returncode == 130
    assert (folder / "eval.json.journal").read_text().count("sha256") == 2
    shutil.copytree(GOLDEN / "bd3lm-hf", folder / "bd3lm")
    for command in (JUDGE, TARGETS["point"].command):
        made = run(folder, command)
        assert made.returncode == 0, made.stderr
    shutil.copy(folder / "judged.json", folder / "kept.json")
    for sums in folder.rglob("SHA256SUMS"):  # they would stop what the readers are to stop
        sums.unlink()
    shutil.copytree(folder, whole_of(folder))
    yield folder
    small_passes.undo()


def whole_of(folder: Path) -> Path:
    """Where the files are kept as they were."""
    return folder.with_name(folder.name + "-whole")


# --- what is changed -----------------------------------------------------------------------------


def paths(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Of all keys, and of the first items of lists."""
    items: Any = ()
    if isinstance(value, dict):
        items = value.items()
    elif isinstance(value, list):
        items = list(enumerate(value))[:2]
    for key, inner in items:
        yield (*path, key)
        yield from paths(inner, (*path, key))


def changed(tree: Any, path: tuple[Any, ...], value: Any) -> Any:
    tree = json.loads(json.dumps(tree))
    inner = tree
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = value
    return tree


def read(content: bytes, kind: str) -> tuple[Any, Callable[[Any], bytes]]:
    """The values in a file, and how changed ones become its content."""
    if kind == "yaml":
        return yaml.safe_load(content), lambda tree: yaml.safe_dump(tree, sort_keys=False).encode()
    if kind == "lines":
        lines = [json.loads(line) for line in content.split(b"\n") if line.strip()]
        return lines, lambda tree: b"".join(json.dumps(x).encode() + b"\n" for x in tree)
    if kind == "header":
        length = int.from_bytes(content[:8], "little")

        def with_header(tree: Any) -> bytes:
            header = json.dumps(tree).encode()
            return len(header).to_bytes(8, "little") + header + content[8 + length :]

        return json.loads(content[8 : 8 + length]), with_header
    return json.loads(content), lambda tree: json.dumps(tree, indent=1).encode()


def chosen(tree: Any, kind: str) -> Iterator[tuple[Any, ...]]:
    """The keys that are changed: all, but of the tensors in a header, which are alike, a few."""
    return paths(dict(list(tree.items())[:4]) if kind == "header" else tree)


def count(content: bytes, kind: str) -> int:
    """How many mutations there are."""
    return sum(len(WRONG) + 1 for _ in chosen(read(content, kind)[0], kind))


def mutations(content: bytes, kind: str) -> Iterator[tuple[str, bytes]]:
    """What was done, and the file's content after it."""
    tree, write = read(content, kind)
    for path in chosen(tree, kind):
        name = ".".join(map(str, path))
        for wrong, value in WRONG.items():
            yield f"{name} {wrong}", write(changed(tree, path, value))
        whole = write(tree)
        found = whole.find(str(path[-1]).encode())
        yield f"{name} {CUT}", whole[: found + len(str(path[-1]))]


def outcomes(folder: Path, name: str, every: int = 1, first: int = 0) -> Counter[int]:
    """Runs the command of a target on every so many mutations; how often it ended how."""
    target = TARGETS[name]
    found: Counter[int] = Counter()
    for number, (what, content) in enumerate(
        mutations((whole_of(folder) / target.file).read_bytes(), target.kind)
    ):
        if number % every != first % every:
            continue
        shutil.rmtree(folder)
        shutil.copytree(whole_of(folder), folder)
        (folder / target.file).write_bytes(content)
        began = time.monotonic()
        try:
            ended = run(folder, target.command)
        except Exception as error:
            raise AssertionError(f"{name}: {what}: {type(error).__name__}: {error}") from error
        assert time.monotonic() - began < MOST_SECONDS, f"{name}: {what}"
        assert ended.returncode in (0, 2), f"{name}: {what}: {ended.stderr}"
        told = [line for line in ended.stderr.splitlines() if "blockdiff: error:" in line]
        assert len(told) == (ended.returncode == 2), f"{name}: {what}: {ended.stderr}"
        assert "Traceback" not in ended.stderr and all(len(line) < 1500 for line in told), what
        assert "nan" not in ended.stdout.split(), f"{name}: {what}: {ended.stdout}"
        found[ended.returncode] += 1
    return found


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # where a mutated place would be written


def test_a_sample_of_the_mutations(place):
    """A few of each file, spread over its keys and over the wrong values."""
    share = -(-SAMPLED // len(TARGETS))
    total: Counter[int] = Counter()
    for number, (name, target) in enumerate(TARGETS.items()):
        content = (whole_of(place) / target.file).read_bytes()
        every = max(count(content, target.kind) // share, 1)
        total += outcomes(place, name, every, first=number)
    print(f"{total.total()} mutations: {total[0]} ended with 0, {total[2]} with 2")
    assert total.total() >= 60 and total[2] > 20


@pytest.mark.slow
@pytest.mark.parametrize("name", TARGETS)
def test_all_mutations(place, name):
    found = outcomes(place, name)
    print(f"{name}: {found.total()} mutations: {found[0]} ended with 0, {found[2]} with 2")
    assert found.total() >= 9


def test_there_are_more_than_a_thousand(place):
    files = ((whole_of(place) / target.file, target.kind) for target in TARGETS.values())
    assert sum(count(file.read_bytes(), kind) for file, kind in files) >= 1000
