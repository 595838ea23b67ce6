"""Steps are carried out in order, some at a time; failures and signals lose nothing."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest

from blockdiffusion.data.options import PrepareOptions
from blockdiffusion.data.packing import prepare
from blockdiffusion.errors import UserError
from blockdiffusion.files.disk import locked
from blockdiffusion.studies.reproduce import runner as module
from blockdiffusion.studies.reproduce.listing import plan_lines
from blockdiffusion.studies.reproduce.plan import Plan, Step
from blockdiffusion.studies.reproduce.runner import Slot, launch, run_steps, slots
from blockdiffusion.studies.reproduce.scales import PAPER, SMALL
from blockdiffusion.studies.reproduce.step_cache import StepCache
from tests.evaluate.scorers import BYTES
from tests.studies.reproduce.toy import TOY


@pytest.fixture(autouse=True)
def looks_often(monkeypatch):
    monkeypatch.setattr(module, "POLL_SECONDS", 0.01)


def measure(out, name, *needs, words=()):
    return Step(
        name=name,
        kind="measure",
        command=("measure", *words),
        needs=needs,
        product=out / "results" / f"{name}.json",
    )


def plan_of(out, *steps):
    return Plan(tables=(), scale=TOY, out=out, data={}, scorer=None, steps=steps)


class Fake:
    """A process that ends when it was looked at a few times, and writes its product."""

    def __init__(self, product, code=0, looks=3):
        self.product, self.code, self.looks, self.interrupted = product, code, looks, False

    def poll(self):
        self.looks -= 1
        if self.interrupted:
            return 130
        if self.looks > 0:
            return None
        if self.code == 0:
            self.product.write_text("{}")
        return self.code

    def send_signal(self, number):
        self.interrupted = True


class Fakes:
    """Starts fakes; the codes and durations of some are given by step."""

    def __init__(self, plan, **settings):
        self.plan, self.settings, self.began, self.most = plan, settings, [], 0
        self.made = {}

    def __call__(self, command, log, slot):
        step = self.plan.step(log.stem)
        self.began.append(step.name)
        self.made[step.name] = Fake(step.product, **self.settings.get(step.name, {}))
        running = [fake for fake in self.made.values() if fake.looks > 0]
        self.most = max(self.most, len(running))
        assert slot == Slot({"OMP_NUM_THREADS": "1"})
        return self.made[step.name]


def test_steps_wait_for_their_needs_and_two_run_at_a_time(tmp_path):
    steps = [measure(tmp_path, "a"), measure(tmp_path, "b", "a"), measure(tmp_path, "c"),
             measure(tmp_path, "d"), measure(tmp_path, "e", "b", "d")]  # fmt: skip
    plan, said = plan_of(tmp_path, *steps), []
    fakes = Fakes(plan)
    run_steps(plan, said.append, fakes)
    assert fakes.began[:2] == ["a", "c"] and fakes.began[-1] == "e" and fakes.most == 2
    assert sorted(fakes.began) == ["a", "b", "c", "d", "e"]
    assert any(line.startswith("e: done in") and line.endswith("0 steps left") for line in said)

    again = Fakes(plan)
    run_steps(plan, said.append, again)
    assert again.began == [] and said[-1] == "e: done before"


def test_a_measurement_is_repeated_when_it_is_another_or_its_result_is_gone(tmp_path):
    plan = plan_of(tmp_path, measure(tmp_path, "a"), measure(tmp_path, "b"))
    run_steps(plan, lambda line: None, Fakes(plan))
    (tmp_path / "results" / "a.json").unlink()
    leftover = tmp_path / "results" / "b.json.journal"
    leftover.write_text("of other options")
    changed = plan_of(tmp_path, plan.steps[0], measure(tmp_path, "b", words=("--limit", "2")))
    assert [StepCache(changed).state(step) for step in changed.steps] == [
        "interrupted",
        "out of date",
    ]
    fakes = Fakes(changed)
    run_steps(changed, lambda line: None, fakes)
    assert fakes.began == ["a", "b"] and not leftover.exists()


def test_what_was_interrupted_keeps_its_journal(tmp_path):
    plan = plan_of(tmp_path, measure(tmp_path, "a"))
    journal = tmp_path / "results" / "a.json.journal"

    def killed(command, log, slot):
        journal.write_text("half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_steps(plan, lambda line: None, killed)
    said = []
    run_steps(plan, said.append, Fakes(plan))
    assert journal.read_text() == "half" and said[0] == "a: resumes"


def test_what_is_measured_is_not_measured_again_for_its_note(tmp_path, monkeypatch):
    plan = plan_of(tmp_path, measure(tmp_path, "a"))
    with monkeypatch.context() as patch:
        patch.setattr(StepCache, "finish", lambda *_: (_ for _ in ()).throw(UserError("disk full")))
        with pytest.raises(UserError, match="disk full"):
            run_steps(plan, lambda line: None, Fakes(plan))
    again = Fakes(plan)
    run_steps(plan, lambda line: None, again)
    note = json.loads((tmp_path / "steps" / "a.json").read_text())
    assert again.began == [] and note["done"]


def test_a_failure_is_the_steps_own_sentence_and_the_other_is_kept(tmp_path):
    plan = plan_of(tmp_path, measure(tmp_path, "a"), measure(tmp_path, "b"))

    class Telling(Fakes):
        def __call__(self, command, log, slot):
            log.parent.mkdir(exist_ok=True)
            if log.stem == "b":
                with open(log, "a") as file:
                    file.write(f"Traceback\nblockdiff: error: no room left ({len(self.began)})\n")
            return super().__call__(command, log, slot)

    for _ in range(2):  # the sentence is that of this time, not of an earlier one in the log
        fakes = Telling(plan, b={"code": 2})
        with pytest.raises(
            UserError, match=r"^the step b failed: no room left \((1|0)\)$"
        ) as error:
            run_steps(plan, lambda line: None, fakes)
        assert str(len(fakes.began) - 1) in str(error.value)
    assert fakes.began == ["b"]  # a had succeeded at the same moment

    silent = Fakes(plan, b={"code": -9})
    (tmp_path / "logs" / "b.log").unlink()
    with pytest.raises(UserError, match=r"it ended with code -9, see .*b\.log"):
        run_steps(plan, lambda line: None, silent)


def test_a_failure_stops_the_others(tmp_path):
    plan = plan_of(tmp_path, measure(tmp_path, "a"), measure(tmp_path, "b"))
    fakes, said = Fakes(plan, a={"looks": 10**9}, b={"code": 1}), []
    with pytest.raises(UserError, match="step b failed"):
        run_steps(plan, said.append, fakes)
    assert fakes.made["a"].interrupted and said[-1].startswith("stopping a;")


@pytest.fixture
def heeds_interrupts():
    """Ctrl-C is heard, as in a terminal; what a shell starts in the background ignores it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_is_passed_on_once(tmp_path, number, heeds_interrupts):
    plan = plan_of(tmp_path, measure(tmp_path, "a"))
    fakes = Fakes(plan, a={"looks": 10**9})
    timer = threading.Timer(0.3, os.kill, [os.getpid(), number])
    timer.start()
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(KeyboardInterrupt):
        run_steps(plan, lambda line: None, fakes)
    timer.join()
    assert fakes.made["a"].interrupted and signal.getsignal(signal.SIGTERM) is before
    assert StepCache(plan).state(plan.steps[0]) == "interrupted"


def test_processes_are_of_their_own_and_can_be_interrupted(tmp_path, monkeypatch):
    script = tmp_path / "python"
    script.write_text(
        f"#!{sys.executable}\nimport os, signal, sys, time\n"
        # As `train` does: a shell's background jobs, and so their children, ignore it.
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "threads, leads = os.environ['OMP_NUM_THREADS'], os.getsid(0) == os.getpid()\n"
        "print(sys.argv[1:], threads, leads, flush=True)\n"
        "try:\n    time.sleep(600)\nexcept KeyboardInterrupt:\n    sys.exit(130)\n"
    )
    script.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(script))
    log = tmp_path / "logs" / "a.log"
    process = launch(["train", "x.yaml"], log, Slot({"OMP_NUM_THREADS": "3"}))
    deadline = time.monotonic() + 60
    while not (log.exists() and log.read_text().endswith("\n")) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert log.read_text() == "['-m', 'blockdiffusion.cli', 'train', 'x.yaml'] 3 True\n"
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    while process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
    assert process.poll() == 130
    process.send_signal(signal.SIGINT)  # nothing is left to be interrupted


def test_notes_do_not_depend_on_the_place(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def note(out, option="--out"):
        plan = plan_of(out, measure(out, "a", words=(option, str(out / "x.json"))))
        run_steps(plan, lambda line: None, Fakes(plan))
        return json.loads((Path(out) / "steps" / "a.json").read_text())["identity"]

    assert note(tmp_path / "one") == note(Path("out"))
    assert note(tmp_path / "one", "--json") != note(tmp_path / "two")


def test_a_step_for_each_gpu(monkeypatch):
    gpus = replace(TOY, jobs=None)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    for count, expected in (
        (0, [Slot({})]),
        (2, [Slot({"CUDA_VISIBLE_DEVICES": n}) for n in "01"]),
    ):
        monkeypatch.setattr("torch.cuda.device_count", lambda count=count: count)
        assert slots(gpus) == slots(SMALL) == expected
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5,7")
    assert slots(gpus) == [Slot({"CUDA_VISIBLE_DEVICES": n}) for n in "57"]
    assert slots(TOY) == [Slot({"OMP_NUM_THREADS": "1"})] * 2


def test_the_papers_steps_are_spread_over_all_gpus(monkeypatch, tmp_path):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    for gpus, processes in ((0, 1), (1, 1), (2, 2), (6, 4), (8, 8)):  # 6 do not divide 512 rows
        monkeypatch.setattr("torch.cuda.device_count", lambda gpus=gpus: gpus)
        (slot,) = slots(PAPER)
        assert slot.processes == processes
        visible = {"CUDA_VISIBLE_DEVICES": ",".join(map(str, range(gpus)))} if gpus else {}
        assert slot.environment == visible
    lines = plan_lines(Plan(tables=(), scale=PAPER, out=tmp_path, data={}, scorer=None, steps=()))
    assert "one at a time, by 8 processes" in lines[2] and "by 8 processes" in lines[-1]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,5")
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    assert slots(PAPER) == [Slot({"CUDA_VISIBLE_DEVICES": "3,5"}, 2)]


@pytest.mark.parametrize("command", ["train", "eval", "generate-eval", "zero-shot", "prepare"])
def test_what_processes_share_is_started_by_torchrun(tmp_path, monkeypatch, command):
    started = []
    monkeypatch.setattr(module.subprocess, "Popen", lambda words, **more: started.append(words))
    for processes in (1, 4):
        launch([command, "x"], tmp_path / "log", Slot({}, processes))
    alone, together = started
    assert alone == [sys.executable, "-m", "blockdiffusion.cli", command, "x"]
    torchrun = ["torch.distributed.run", "--standalone", "--nproc-per-node", "4", "-m"]
    shared = command in ("train", "eval", "generate-eval")
    assert together == ([*alone[:2], *torchrun, *alone[2:]] if shared else alone)


STARTS_A_STEP = """
import sys, time
from pathlib import Path
from blockdiffusion.studies.reproduce.runner import Slot, launch
launch(sys.argv[3:], Path(sys.argv[1]), Slot({}, int(sys.argv[2])))
time.sleep(600)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="needs kill -9")
@pytest.mark.parametrize("processes", [1, 2])
def test_a_step_dies_with_a_conductor_that_is_killed(tmp_path, processes):
    """Those of torchrun, too; at once, so that the next runner finds the run free."""
    (tmp_path / "text.txt").write_text("The quick brown fox jumps over the lazy dog. " * 40)
    prepare([str(tmp_path / "text.txt")], tmp_path / "data", PrepareOptions(
        seq_len=16, tokenizer="byte", document_bytes=200,
    ))  # fmt: skip
    run, log = tmp_path / "run", tmp_path / "log"
    (tmp_path / "recipe.yaml").write_text(
        f"out: {run}\ndata: {{path: {tmp_path / 'data'}}}\n"
        "model: {num_hidden_layers: 1, hidden_size: 8, num_attention_heads: 1, cond_dim: 4}\n"
        "train: {steps: 1000000, batch_size: 2, threads: 1}\n"
        "eval: {every: null}\nsample: {every: null}\n"
    )
    command = ["train", str(tmp_path / "recipe.yaml")]
    runner = subprocess.Popen(
        [sys.executable, "-c", STARTS_A_STEP, str(log), str(processes), *command],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    metrics, deadline = run / "metrics.jsonl", time.monotonic() + 120
    while not (metrics.exists() and b'"loss"' in metrics.read_bytes()):
        assert time.monotonic() < deadline and runner.poll() is None, log.read_text()
        time.sleep(0.1)
    runner.kill()
    runner.wait()
    deadline = time.monotonic() + 10
    while True:
        try:
            with locked(run / ".lock", "the step lives on"):
                break
        except UserError:
            assert time.monotonic() < deadline
            time.sleep(0.05)


@pytest.mark.slow
def test_two_processes_share_a_step(tmp_path, make_model):
    """Started by the runner itself: the same numbers as of one process."""
    (tmp_path / "text.txt").write_text("The quick brown fox jumps over the lazy dog. " * 40)
    options = PrepareOptions(seq_len=16, tokenizer="byte", valid_fraction=0.3, document_bytes=200)
    prepare([str(tmp_path / "text.txt")], tmp_path / "data", options)
    make_model(**BYTES).save_pretrained(tmp_path / "model")
    found = []
    for processes in (1, 2):
        file, log = tmp_path / f"{processes}.json", tmp_path / f"{processes}.log"
        command = ["eval", str(tmp_path / "model"), "--data", str(tmp_path / "data"), "--no-bos"]
        process = launch([*command, "--json", str(file)], log, Slot({}, processes))
        deadline = time.monotonic() + 300
        while process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.1)
        assert process.poll() == 0, log.read_text()
        found.append(json.loads(file.read_text()) | {"seconds": None})
    assert found[0] == found[1]
