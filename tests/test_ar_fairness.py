"""The fairness study at toy size: both networks train on the same, and are compared row by row."""

import copy
import json
import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from blockdiffusion.data.options import PrepareOptions
from blockdiffusion.data.packing import prepare
from blockdiffusion.errors import UserError
from blockdiffusion.train import loop
from blockdiffusion.train.recipe import load_recipe
from studies import ar_fairness as study

MANIFEST = SimpleNamespace(
    seq_len=128, vocab_size=2049, mask_id=2048, row_bos=False, bos_id=None, eos_id=0
)


@pytest.fixture(scope="module")
def overrides(tmp_path_factory):
    """Toy data, and what makes the study as small."""
    folder = tmp_path_factory.mktemp("fairness")
    lines = [f"{n} times {k} is {n * k}, and so on" for n in range(12) for k in range(12)]
    (folder / "text.txt").write_text("\n\n".join(lines))
    options = PrepareOptions(seq_len=16, tokenizer="byte", documents="blank-line", num_workers=1)
    prepare([str(folder / "text.txt")], folder / "data", options)
    return (
        f"data.path={folder / 'data'}", "model.num_hidden_layers=1", "model.hidden_size=16",
        "model.num_attention_heads=2", "train.steps=6", "train.batch_size=4",
        "optim.warmup_steps=2",
        "eval.every=3", "eval.rows=8", "checkpoint.every=2",
    )  # fmt: skip


def result(job):
    return json.loads((job.out / study.RESULT).read_text())


def test_both_networks_train_on_the_same_batches(overrides, tmp_path, monkeypatch):
    seen = []
    real = loop.NextTokenLoss

    def remember(batch, free_BL):
        seen.append(batch.ids_BL)
        return real(batch, free_BL)

    monkeypatch.setattr(loop, "NextTokenLoss", remember)
    both = study.jobs(tmp_path, [1e-2], 1, overrides)
    for job in both:
        study.train_one(job)
    assert len(seen) == 12 and all(map(torch.equal, seen[:6], seen[6:]))
    found = [result(job) for job in both]
    assert found[0]["num_tokens"] == found[1]["num_tokens"]
    assert found[0]["nats_per_row"] != found[1]["nats_per_row"]
    for values in found:
        assert 0 < sum(values["nats_per_row"]) / values["num_tokens"] < math.log(258)
    lines = list(study.table(tmp_path, [1e-2], seeds=3))
    assert lines[4].startswith("| 1 | ") and "(1) nats per token" in lines[6]


@pytest.mark.parametrize("network", study.NETWORKS)
def test_a_run_that_was_killed_resumes_bit_for_bit(overrides, tmp_path, monkeypatch, network):
    whole = study.Job(tmp_path / "whole", network, 1e-2, 1, overrides)
    stopped = study.Job(tmp_path / "stopped", network, 1e-2, 1, overrides)
    study.train_one(whole)
    real, calls = loop.NextTokenLoss, []

    def die_in_step_five(batch, free_BL):
        calls.append(1)
        if len(calls) == 5:
            raise KeyboardInterrupt
        return real(batch, free_BL)

    monkeypatch.setattr(loop, "NextTokenLoss", die_in_step_five)
    with pytest.raises(KeyboardInterrupt):
        study.train_one(stopped)
    study.train_one(stopped)  # steps 5 and 6
    assert len(calls) == 7 and result(stopped) == result(whole)
    study.train_one(stopped)
    assert len(calls) == 7  # a finished run is left alone
    with pytest.raises(UserError, match=r"another model\.hidden_size"):
        study.train_one(
            study.Job(stopped.runs, network, 1e-2, 1, (*overrides, "model.hidden_size=32"))
        )


def test_the_networks_have_equal_sizes():
    recipe = load_recipe(study.RECIPE)
    ours, theirs = (
        sum(p.numel() for p in study.make_network(name, recipe, MANIFEST).parameters())
        for name in study.NETWORKS
    )
    assert abs(theirs / ours - 1) < 0.05


@torch.no_grad()
def test_their_network_is_the_library_s(random_ids):
    recipe = load_recipe(study.RECIPE, ["model.dropout=0.1"])
    model = study.make_network("gpt2", recipe, MANIFEST)
    ids = random_ids(2, 9, vocab_size=2049)
    found = model.head(model.eval().encode_causal(ids))
    plain = copy.deepcopy(model.backbone.model)
    plain.set_attn_implementation("sdpa")
    assert torch.equal(found, plain(ids).logits)
    assert {m.p for m in model.modules() if isinstance(m, torch.nn.Dropout)} == {0.0, 0.1}
    again = study.make_network("gpt2", recipe, MANIFEST)
    assert all(map(torch.equal, model.parameters(), again.parameters()))


def test_the_recipe_and_the_jobs():
    assert load_recipe(study.RECIPE).objective.name == "ar"
    jobs = study.jobs(Path("runs"), [1e-3, 2e-3], 3)
    assert len({job.out for job in jobs}) == 12
    assert [job.network for job in jobs[:2]] == ["ours", "gpt2"] and jobs[0].seed == jobs[1].seed


def test_errors_are_over_seeds_and_over_rows(tmp_path):
    """Differences of -1, 0 and 1 nats a row: a standard deviation of 1 over three rows."""
    for seed in (1, 2):
        for network, rows in (("ours", [9.0, 10.0, 11.0]), ("gpt2", [10.0, 10.0, 10.0])):
            out = study.Job(tmp_path, network, 2e-3, seed).out
            out.mkdir(parents=True)
            shifted = [row + 0.3 * seed * (network == "ours") for row in rows]
            values = {"parameters": 100, "num_tokens": 30, "nats_per_row": shifted}
            (out / study.RESULT).write_text(json.dumps(values))
    found = list(study.pairs(tmp_path, 2e-3, 3))
    assert [pair.seed for pair in found] == [1, 2]
    assert [o - t for o, t in (pair.nats for pair in found)] == pytest.approx([0.03, 0.06])
    assert study.data_error(found) == pytest.approx(math.sqrt(3) / 30)
    summary = list(study.table(tmp_path, [2e-3], 3))[-2]
    assert (
        summary.startswith("ours minus GPT-2: +0.0450 ± 0.0150 (2) nats") and "± 0.0577" in summary
    )
