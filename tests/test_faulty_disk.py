"""Every operation on the disk fails in turn; what a command began, the next one ends the same."""

import gc
import json
import os
import shutil
from collections import Counter
from dataclasses import dataclass, replace
from types import SimpleNamespace

import pytest

import blockdiffusion.evaluate.likelihood as likelihood_module
import blockdiffusion.evaluate.replicates as replicates
from blockdiffusion.data import packing
from blockdiffusion.evaluate.generation import samples
from blockdiffusion.evaluate.journal import Journal
from blockdiffusion.files.checksums import NOTES, SUMS
from blockdiffusion.studies.reproduce import paper, runner
from blockdiffusion.studies.reproduce.scales import SCALES
from blockdiffusion.train.checkpoint import holds_run
from tests.command import blockdiff
from tests.faulty_disk import FaultyDisk
from tests.studies.reproduce.toy import TOY
from tests.tiny import TEXT, write_recipe

TIMES = {"seconds", "search_seconds", "tokens_per_second", "tflops_per_second", "peak_share"}
FREQUENT = {"every": 1, "keep": 1}


@dataclass(frozen=True)
class Command:
    """A command line: {p} is the `place`, {o} the folder whose disk fails.

    Attributes:
        begins: a folder of the place that is copied to {o} first: the command changes it.
        parts: of all its faults, for tests of less than a minute each.
    """

    line: str
    begins: str = ""
    parts: int = 1

    def run(self, place, out):
        words = self.line.format(p=place, o=out).split()
        return blockdiff(*words, *["--resume"] * (words[0] == "train" and holds_run(out / "run")))


DRAW = "--num-samples 3 --batch-size 2 --max-new-tokens 4"
JUDGED = f"--judge {{p}}/judge {DRAW}"
COMMANDS = {
    "prepare": Command(
        "prepare {p}/text.txt --out {o}/data --tokenizer byte --seq-len 16 --packing document "
        "--documents blank-line --workers 1",
        parts=2,
    ),
    "train": Command("train {p}/recipe.yaml out={o}/run", parts=8),
    "train, with its search": Command("train {p}/search.yaml out={o}/run", parts=12),
    "eval": Command(
        "eval {p}/run --data {p}/data --samples 2 --estimator count --per-row --json {o}/eval.json"
    ),
    "eval --card": Command(
        "eval {o}/model --data {p}/data --samples 2 --rows 8 --estimator count --card "
        "--json {o}/eval.json",
        begins="run/model",
    ),
    "zero-shot": Command(
        "zero-shot {p}/run --only lambada --local lambada={p}/passages.jsonl --samples 2 --rows 4 "
        "--json {o}/a.json --csv {o}/a.csv --markdown {o}/a.md"
    ),
    "references": Command(
        "references {p}/data --model {p}/run --rows 4 --samples 2 --order 2 --json {o}/a.json "
        "--markdown {o}/a.md"
    ),
    "variance": Command(
        "variance {p}/run --data {p}/data --block-sizes 1,4 --estimators count --batch-size 2 "
        "--batches 2 --replicates 2 --json {o}/a.json --plot {o}/a.svg"
    ),
    "lengths": Command(f"lengths {{p}}/run {DRAW} --json {{o}}/a.json"),
    "generate-eval": Command(
        f"generate-eval {{p}}/run {JUDGED} --json {{o}}/a.json --csv {{o}}/a.csv "
        "--markdown {o}/a.md --plot {o}/a.svg"
    ),
    "generate-compare": Command(
        "generate-compare {p}/judged.json --csv {o}/a.csv --markdown {o}/a.md --plot {o}/a.svg"
    ),
    "pareto": Command(
        f"pareto {{p}}/run {JUDGED} --out {{o}}/pareto --point first-hitting "
        "--point confidence:tokens_per_step=2"
    ),
    "estimate": Command("estimate {p}/recipe.yaml --device h100 --json {o}/a.json"),
    "report": Command("report {p}/run --num-samples 1 --max-new-tokens 4 --out {o}/a.html"),
    "reproduce": Command(
        "reproduce T3 --scale toy --out {o}/tables --data wikitext2={p}/pages", parts=16
    ),
    "convert": Command("convert {p}/run --out {o}/model"),
    "convert --to bd3lm": Command("convert {p}/run --out {o}/model --to bd3lm"),
    "verify --update": Command("verify {o}/changed --update", begins="changed"),
    "push": Command("push {o}/model somebody/model", begins="run/model"),
}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Text, prepared data, runs and results, outside the folder whose disk fails."""
    folder = tmp_path_factory.mktemp("whole")
    (folder / "text.txt").write_text(TEXT[:2900])
    passages = TEXT.split("\n\n")[:9]
    (folder / "passages.jsonl").write_text(
        "".join(json.dumps({"text": p}) + "\n" for p in passages)
    )
    (folder / "pages").mkdir()
    for split in ("train", "valid", "test"):
        (folder / "pages" / f"wiki.{split}.tokens").write_text(" = Cats = \n" + TEXT[:700])
    data, run = folder / "data", folder / "run"
    often = dict(eval={"every": 2, "rows": 2, "mc_samples": 2}, checkpoint=FREQUENT)
    write_recipe(folder / "recipe.yaml", data, run, **often)
    search = {"every": 1, "widths": [0.5], "rows": 2, "batch_size": 1, "replicates": 2}
    write_recipe(folder / "search.yaml", data, run, search=search, checkpoint=FREQUENT)
    for line in (
        COMMANDS["prepare"].line.replace("{o}", "{p}"),
        COMMANDS["train"].line.replace("{o}", "{p}"),
        "train {p}/recipe.yaml out={p}/judge train.seed=5",
        f"generate-eval {{p}}/run {JUDGED} --json {{p}}/judged.json",
    ):
        made = Command(line).run(folder, folder / "none")
        assert made.returncode == 0, made.stderr
    shutil.copytree(run / "model", folder / "changed")
    with open(folder / "changed" / "tokenizer.json", "a") as file:
        file.write("\n")
    gc.collect()
    gc.freeze()  # so that it is quick after each fault
    yield folder
    gc.unfreeze()


@pytest.fixture(autouse=True)
def many_small_writes(monkeypatch):
    monkeypatch.setattr(replicates, "PASS_TOKENS", 64)
    monkeypatch.setattr(packing, "UNIT_BYTES", 2000)
    monkeypatch.setattr(packing, "SHARD_TOKENS", 16 * 40)


@pytest.fixture(autouse=True)
def timeless(monkeypatch):
    """Samples and likelihoods take no time, so that tables and pictures show none."""
    for module in (samples, likelihood_module):
        monkeypatch.setattr(module, "time", SimpleNamespace(perf_counter=lambda: 0.0))


@pytest.fixture(autouse=True)
def small_reproduction(monkeypatch):
    """`reproduce` makes one row of table 3, of three steps, which run in this process."""
    table = paper.TABLES["T3"]
    rows = tuple(row for row in table.rows if row.system == "ar")
    monkeypatch.setitem(paper.TABLES, "T3", replace(table, rows=rows, chains=(("ar",),)))
    texts = {name: replace(text, tokenizer="byte") for name, text in TOY.texts.items()}
    toy = replace(TOY, texts=texts, steps=replace(TOY.steps, base=1), jobs=1)
    monkeypatch.setitem(SCALES, "toy", toy)
    monkeypatch.setattr(runner, "POLL_SECONDS", 0.0)
    process = SimpleNamespace(Popen=InThisProcess, PIPE=None)
    monkeypatch.setattr(runner, "subprocess", process)


class InThisProcess:
    """A `blockdiff` command that a step starts; it has ended when it has begun."""

    def __init__(self, command, stdout, **_):
        self.ended = blockdiff(*command[command.index("blockdiffusion.cli") + 1 :])
        os.write(stdout.fileno(), (self.ended.stdout + self.ended.stderr).encode())

    def poll(self):
        return self.ended.returncode


@pytest.fixture(autouse=True)
def hub(monkeypatch):
    """A hub that takes everything."""
    import huggingface_hub

    class Hub:
        def create_repo(self, name, **_):
            return name

        def upload_folder(self, **_):
            pass

    monkeypatch.setattr(huggingface_hub, "get_token", lambda: "token")
    monkeypatch.setattr(huggingface_hub, "HfApi", Hub)


@pytest.fixture(autouse=True)
def finished(monkeypatch):
    """Counts the pieces of measurements that are finished and kept."""
    counts = Counter()

    def counted(kept, name):
        real = getattr(kept, name)

        def keep(*arguments):
            real(*arguments)
            counts["pieces"] += arguments[0].path is not None

        monkeypatch.setattr(kept, name, keep)

    counted(Journal, "put")
    counted(samples.SampleFile, "add")
    return counts


def content(folder):
    """What lies in a folder, without what tells the time, and without notes of what was checked."""
    found = {}
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        if path.name in (NOTES, ".lock") or path.suffix == ".log":
            continue
        data = path.read_bytes()
        if path.suffix in (".json", ".jsonl"):
            lines = data.decode().splitlines() if path.suffix == ".jsonl" else [data.decode()]
            values = [without_times(json.loads(line)) for line in lines]
            data = [value for value in values if not of_a_resume(value)]
        elif path.name == SUMS:  # of files that tell the time
            data = [line for line in data.splitlines() if not line.endswith(b".json")]
        elif path.suffix in (".yaml", ".md"):
            data = data.replace(str(folder).encode(), b"")
        found[str(path.relative_to(folder))] = data
    return found


def of_a_resume(line):
    """Whether a line of the metrics only says that a run is resumed, and with which clip."""
    return isinstance(line, dict) and ("note" in line or line.keys() == {"step", "clip"})


def without_times(value):
    if isinstance(value, dict):
        return {k: without_times(v) for k, v in value.items() if k not in TIMES and k != "out"}
    return [without_times(item) for item in value] if isinstance(value, list) else value


def run_on_faulty_disk(command, place, folder, fails=0, full=False):
    folder.mkdir()
    if command.begins:
        shutil.copytree(place / command.begins, folder / command.begins.rpartition("/")[2])
    with FaultyDisk(folder, fails, full).installed() as disk:
        ended = command.run(place, folder)
    gc.collect()
    return disk, ended


def each_fault(name, place, tmp_path, finished, part, parts=None):
    """Operations fail in turn, once and from then on; the outcomes are counted.

    Operations are taken from number `part` on in steps of `parts`, by default about three of them.
    """
    command = COMMANDS[name]
    folder = tmp_path / "disk"
    whole, ended = run_on_faulty_disk(command, place, folder)
    assert ended.returncode == 0, ended.stderr
    expected, pieces = content(folder), finished["pieces"]
    shutil.rmtree(folder)
    outcomes = Counter(operations=whole.count)
    parts = parts or max(19, whole.count // 3)
    for full in (False, True):
        for number in range(part, whole.count + 1, parts):
            finished.clear()
            disk, ended = run_on_faulty_disk(command, place, folder, number, full)
            about = f"{name}, {number}, {disk.failed}: {ended.stderr}"
            if disk.failed:  # else a removal, which a full disk still does, was the last operation
                outcomes["faults"] += 1
                assert ended.returncode in (0, 2), about
            if ended.returncode == 2:
                outcomes["sentences"] += 1
                said = [line for line in ended.stderr.splitlines() if "blockdiff: error: " in line]
                assert len(said) == 1 and "Traceback" not in ended.stderr, about
                ended = command.run(place, folder)
                assert ended.returncode == 0, f"{about} then {ended.stderr}"
                assert finished["pieces"] <= pieces, f"{about} is measured twice"
            elif disk.failed:
                outcomes["harmless"] += 1
                print(disk.failed)
            found = content(folder)
            assert found.keys() == expected.keys(), about
            for file, data in expected.items():
                assert found[file] == data, f"{about} {file}"
            shutil.rmtree(folder)
    print(f"{name}: {dict(outcomes)}")
    return outcomes


@pytest.mark.parametrize("name", COMMANDS)
def test_a_write_that_fails_is_told_and_nothing_is_lost(name, place, tmp_path, finished):
    outcomes = each_fault(name, place, tmp_path, finished, part=7)
    assert outcomes["sentences"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "part"), [(name, part) for name, c in COMMANDS.items() for part in range(c.parts)]
)
def test_every_write_that_fails_is_told_and_nothing_is_lost(name, part, place, tmp_path, finished):
    parts = COMMANDS[name].parts
    outcomes = each_fault(name, place, tmp_path, finished, part + 1, parts)
    assert outcomes["sentences"] > outcomes["operations"] / parts
