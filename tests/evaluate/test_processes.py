"""Measured by several processes: the numbers of one, to the last digit."""

import json
from pathlib import Path
from unittest.mock import patch

import pytest
import torch

import blockdiffusion.evaluate.replicates as replicates
from blockdiffusion.checkpoints.formats import load
from blockdiffusion.data.options import PrepareOptions
from blockdiffusion.data.packing import prepare
from blockdiffusion.data.tokenizers import byte_tokenizer
from blockdiffusion.evaluate.generation.samples import DrawOptions, EntropyGuard, draw_samples
from blockdiffusion.evaluate.likelihood import likelihood
from blockdiffusion.models.transformer import BlockDiffusionModel
from blockdiffusion.runtime.distributed import process_group
from tests.evaluate.scorers import BYTES, save_gpt2, with_bytes
from tests.launch import assert_ended_well, command, launch

KINDS = [
    ("plain", "complement", {}), ("plain", "bernoulli", {}), ("plain", "exact", {}),
    ("plain", "orders", {"orders": 3}), ("plain", "count", {"target_stderr": 0.3}),
    ("ar", "auto", {}),
]  # fmt: skip
GUARD = EntropyGuard(min_entropy=2.0, window=8, step=4)  # no token twice in any window
DRAW = DrawOptions(num_samples=7, max_new_tokens=12, batch_size=2, eos=False)


@pytest.fixture
def models(make_model, make_ar, tmp_path) -> Path:
    for name, make in (("plain", make_model), ("ar", make_ar)):
        model = with_bytes(make(**BYTES))
        model.save_pretrained(tmp_path / name)
        byte_tokenizer().save_pretrained(tmp_path / name)
    return tmp_path


@patch.object(replicates, "PASS_TOKENS", 96)  # a row or two at a time
def measure(folder: Path) -> None:
    """Likelihoods and samples, into a file of the number of processes."""
    ids = torch.randint(256, (7, 16), generator=torch.Generator().manual_seed(1))
    found = []
    with process_group() as processes:
        for name, estimator, options in KINDS:
            model = load(folder / name).double().eval()
            journal = folder / f"journal{processes.size}"
            result = likelihood(
                model, ids, estimator, mc_samples=3, processes=processes, journal=journal, **options
            )
            found.append(result.to_dict(rows=True) | {"seconds": None})
        model = with_bytes(load(folder / "plain").double().eval())
        file = folder / f"samples{processes.size}.jsonl"
        for guard in (None, GUARD):
            drawn = draw_samples(model, DRAW, file=file, guard=guard, processes=processes)
            found += [[s.ids for s in drawn.samples], drawn.drawn, drawn.rejected]
        of_all = processes.gather(found)
    if processes.is_first:
        (folder / f"found{processes.size}.json").write_text(json.dumps(of_all))


def test_likelihood_and_samples_are_those_of_one_process(models):
    measure(models)
    (one,) = json.loads((models / "found1.json").read_text())
    *_, drawn, rejected = one
    assert rejected > 0 and drawn > DRAW.num_samples  # the guard had something to do
    for size in (2, 3):
        assert_ended_well(launch(size, measure, models))
        assert json.loads((models / f"found{size}.json").read_text()) == [one] * size
        lines = [
            [(sample["index"], sample["ids"]) for sample in map(json.loads, file.splitlines())]
            for file in ((models / f"samples{s}.jsonl").read_text() for s in (1, size))
        ]
        assert lines[0] == lines[1]


def test_any_number_of_processes_goes_on_from_the_journal_of_any_other(models, monkeypatch):
    assert_ended_well(launch(2, measure, models))
    one, _ = json.loads((models / "found2.json").read_text())

    def asked(*arguments, **more):
        raise AssertionError("the network was asked")

    monkeypatch.setattr(BlockDiffusionModel, "encode", asked)
    monkeypatch.setattr(BlockDiffusionModel, "encode_causal", asked)
    monkeypatch.setattr(replicates, "PASS_TOKENS", 96)
    ids = torch.randint(256, (7, 16), generator=torch.Generator().manual_seed(1))
    for (name, estimator, options), expected in zip(KINDS, one, strict=False):
        model = load(models / name).double().eval()
        found = likelihood(
            model, ids, estimator, mc_samples=3, journal=models / "journal2", **options
        )
        values = found.to_dict(rows=True) | {"seconds": None}
        assert json.loads(json.dumps(values)) == expected


def test_the_commands_say_and_write_what_one_process_does(models, tmp_path):
    (tmp_path / "text.txt").write_text("The quick brown fox jumps over the lazy dog. " * 40)
    options = PrepareOptions(
        seq_len=16, tokenizer="byte", document_bytes=200, valid_fraction=0.3, num_workers=1
    )
    prepare([str(tmp_path / "text.txt")], tmp_path / "data", options)
    judge = save_gpt2(tmp_path / "judge")
    commands = {
        "eval": ["eval", models / "plain", "--data", tmp_path / "data", "--no-bos"],
        "generate-eval": [
            "generate-eval", models / "plain", "--scorer", judge, "--num-samples", 5,
            "--batch-size", 2, "--max-new-tokens", 8, "--no-bos",
        ],
    }  # fmt: skip
    for name, arguments in commands.items():
        results = []
        for size in (1, 2):
            file = tmp_path / f"{name}{size}.json"
            ended = launch(size, command, *arguments, "--json", file)
            assert_ended_well(ended)
            assert ended[0].out and not any(process.out + process.err for process in ended[1:])
            results.append(json.loads(file.read_text()))
        for key in ("nats_per_token", "stderr_noise", "per_sample", "text", "num_tokens"):
            assert results[0].get(key) == results[1].get(key)
