"""Many prompts from a file: each as if alone, in order, once, whatever happens in between."""

import json
import os
import random
import signal
import time

import pytest
import torch

import blockdiffusion
from blockdiffusion.data.tokenizers import byte_tokenizer
from blockdiffusion.errors import UserError
from blockdiffusion.runtime.distributed import process_group
from blockdiffusion.sampling.params import SamplingParams
from blockdiffusion.serving import batch
from blockdiffusion.serving.batch import run_batch
from blockdiffusion.serving.options import BatchOptions
from tests.command import blockdiff
from tests.data.test_chat import TEMPLATE, messages
from tests.launch import assert_ended_well, launch, start_processes

OPTIONS = BatchOptions(sampling=SamplingParams(max_new_tokens=9, seed=3, num_samples=2), max_rows=3)


@pytest.fixture
def model(make_model):
    """A network over bytes that often ends, with a chat template."""
    made = make_model(vocab_size=258, mask_id=257, eos_id=256, bos=False, seq_len=64)
    made.tokenizer = byte_tokenizer()
    made.tokenizer.chat_template = TEMPLATE
    with torch.no_grad():
        made.output.bias[256] += 8
    return made


@pytest.fixture
def saved(model, tmp_path):
    model.save_pretrained(tmp_path / "model")
    model.tokenizer.save_pretrained(tmp_path / "model")
    return tmp_path


def write_lines(path, count=12):
    lines = []
    for number in range(count):
        line = {"prompt": "x" * (number % 7) + "y", "id": f"n{number}"}
        if number % 4 == 1:
            line = {"messages": messages(("user", f"{number}?")), "metadata": {"of": [number]}}
        if number % 4 == 2:
            line = {"template": "ab[MASK:5]c[MASK]", "top_k": 3}
        if number % 3 == 0:
            line |= {"max_new_tokens": 5, "seed": 10 + number, "sampler": "confidence",
                     "tokens_per_step": 2}  # fmt: skip
        lines.append(json.dumps(line))
    path.write_text("\n\n".join(lines))
    return path


def results(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_every_sample_is_that_of_generate_alone(model, tmp_path):
    prompts = write_lines(tmp_path / "p.jsonl")
    assert run_batch(model, prompts, tmp_path / "out.jsonl", OPTIONS) == 24
    found = results(tmp_path / "out.jsonl")
    lines = [json.loads(line) for line in prompts.read_text().split("\n\n")]
    assert [(r["line"], r["sample"]) for r in found] == [
        (2 * number + 1, sample) for number in range(12) for sample in range(2)
    ]
    ends = set()
    for result in found:
        line = lines[(result["line"] - 1) // 2]
        assert result.get("id") == line.get("id")
        assert result.get("metadata") == line.get("metadata")
        if "seed" in line and not result["sample"]:
            assert result["seed"] == line["seed"]
        own = {key: line[key] for key in ("sampler", "tokens_per_step", "top_k") if key in line}
        own |= {"seed": result["seed"]}
        if "template" in line:
            alone = blockdiffusion.infill(model, line["template"], **own)
            assert result["text"] == alone.texts[0] and result["new_tokens"] == 6
            continue
        own["max_new_tokens"] = line.get("max_new_tokens", 9)
        prompt = line.get("prompt")
        if prompt is None:
            text = f"[user]{(result['line'] - 1) // 2}?"
            prompt = [*text.encode(), 256, *b"\n[assistant]"]
        alone = blockdiffusion.generate(model, [prompt], **own)
        start, end = int(alone.prompt_lengths[0]), int(alone.lengths[0])
        new = alone.sequences[0, start:end].tolist()
        assert result["text"] == bytes(t for t in new if t < 256).decode(errors="replace")
        assert result["new_tokens"] == len(new) and result["prompt_tokens"] == start
        assert result["finish_reason"] == ("eos" if new[-1] == 256 else "length")
        ends.add(result["finish_reason"])
    assert ends == {"eos", "length"}
    assert {result["seed"] for result in found[:2]} != {found[0]["seed"]}


def test_a_result_does_not_depend_on_its_neighbours(model, tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    run_batch(model, write_lines(tmp_path / "p.jsonl"), one, OPTIONS)
    wide = BatchOptions(sampling=OPTIONS.sampling, max_rows=16)
    run_batch(model, tmp_path / "p.jsonl", two, wide)
    assert one.read_bytes() == two.read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one", "p.jsonl", "two"]


def test_what_is_finished_is_not_sampled_again(model, tmp_path, monkeypatch):
    """Stopped by Ctrl-C after five samples; another seed or other prompts begin anew."""
    prompts, out = write_lines(tmp_path / "p.jsonl"), tmp_path / "out.jsonl"
    run_batch(model, prompts, tmp_path / "whole.jsonl", OPTIONS)
    count = 0

    def stop(stage, done, total):
        nonlocal count
        count += 1
        if done == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_batch(model, prompts, out, OPTIONS, progress=stop)
    assert not out.exists() and count == 5
    seen = []
    real = batch.Engine.submit
    monkeypatch.setattr(batch.Engine, "submit", lambda *a: seen.append(1) or real(*a))
    run_batch(model, prompts, out, OPTIONS)
    assert out.read_bytes() == (tmp_path / "whole.jsonl").read_bytes()
    assert len(seen) == 18 - 5
    with pytest.raises(UserError, match="already there"):
        run_batch(model, prompts, out, OPTIONS)


def work(folder, out):
    with process_group() as processes:
        model = blockdiffusion.load(folder / "model")
        run_batch(model, folder / "p.jsonl", folder / out, OPTIONS, processes=processes)


def test_processes_share_the_work(saved):
    write_lines(saved / "p.jsonl")
    work(saved, "one")
    assert_ended_well(launch(2, work, saved, "two"))
    assert (saved / "one").read_bytes() == (saved / "two").read_bytes()
    assert not list(saved.glob("*journal*"))


def kill_and_resume(saved, kills, count):
    """Processes killed at random moments, one or two at a time; returns the kills in time."""
    write_lines(saved / "p.jsonl", count)
    work(saved, "whole")
    draw, in_time = random.Random(0), 0
    for number in range(kills):
        size = 1 + number % 2
        running = start_processes(size, work, saved, "killed")
        deadline = time.monotonic() + 60
        before = {path: path.stat().st_size for path in saved.glob("killed.journal*")}
        while time.monotonic() < deadline and not any(
            path.stat().st_size > before.get(path, 0) for path in saved.glob("killed.journal*")
        ):
            if all(process.exitcode is not None for process in running.processes):
                break
            time.sleep(0.005)
        time.sleep(draw.random() * 0.1)
        alive = [process for process in running.processes if process.exitcode is None]
        in_time += bool(alive)
        for process in alive:
            os.kill(process.pid, signal.SIGKILL)
        running.end()
        for path in saved.glob("killed.journal*"):
            assert path.stat().st_size >= before.get(path, 0)  # nothing was lost
        if (saved / "killed").exists():
            break
    if not (saved / "killed").exists():
        work(saved, "killed")
    assert (saved / "killed").read_bytes() == (saved / "whole").read_bytes()
    assert not list(saved.glob("killed.journal*"))
    return in_time


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork")
def test_two_kills(saved):
    assert kill_and_resume(saved, 2, 40) == 2


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork")
def test_twenty_kills(saved):
    assert kill_and_resume(saved, 20, 1200) == 20


@pytest.mark.parametrize(
    ("line", "key"),
    [
        ("", "holds no prompt"),
        ("{", "line 3 of .*is not JSON"),
        ("3", "line 3 of .*is not an object"),
        ("{}", "has none of them"),
        ('{"prompt": "a", "template": "b"}', "has prompt and template"),
        ('{"prompt": 3}', "prompt is 3"),
        ('{"prompt": "a", "tempreature": 1}', "has 'tempreature'"),
        ('{"prompt": "a", "temperature": 0}', "temperature is 0"),
        ('{"prompt": "a", "top_k": "many"}', "top_k is 'many'"),
        ('{"prompt": "a", "sampler": "best"}', "best"),
        ('{"prompt": "a", "steps": 4}', "steps"),
        ('{"prompt": "a", "max_new_tokens": 0}', "max_new_tokens is 0"),
        ('{"prompt": "a", "window": 8}', "has 'window'"),
        ('{"prompt": "a", "seed": -1}', "seed is -1"),
        ('{"messages": []}', "no list of messages"),
        ('{"messages": [{"role": "user", "content": "a<|mask|>"}]}', "only the chat template"),
        ('{"template": "ab"}', "nothing to fill"),
        ('{"template": "[MASK:99999999]"}', "at most"),
        ('{"prompt": "\\ud800"}', "not UTF-8"),
    ],
)
def test_a_bad_line_is_refused_before_any_work(line, key, model, tmp_path):
    first = '{"prompt": "a"}\n\n' if line else ""
    (tmp_path / "p.jsonl").write_text(f"{first}{line}\n")
    with pytest.raises(UserError, match=key):
        run_batch(model, tmp_path / "p.jsonl", tmp_path / "out", OPTIONS)
    assert not (tmp_path / "out").exists()
    assert not list(tmp_path.glob("*.journal*")) or not (tmp_path / "out.journal").stat().st_size


def test_the_command(saved, monkeypatch):
    monkeypatch.chdir(saved)
    (saved / "p.jsonl").write_text('{"prompt": "ab"}\n{"prompt": "c", "max_new_tokens": 3}\n')
    done = blockdiff("generate", "model", "p.jsonl", "--out", "out.jsonl", "--max-new-tokens", 6,
                     "--num-samples", 3)  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout == "out.jsonl: 6 samples\n" and len(results(saved / "out.jsonl")) == 6
    again = blockdiff("generate", "model", "p.jsonl", "--out", "out.jsonl")
    assert again.returncode == 2 and "already there" in again.stderr
