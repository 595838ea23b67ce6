"""Checkpoints: exact round trips, what is kept, damage, and a full disk."""

import errno
import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from blockdiffusion.errors import UserError
from blockdiffusion.files.checksums import differing, read_sums
from blockdiffusion.runtime.versions import versions
from blockdiffusion.train import checkpoint, tensor_files
from blockdiffusion.train.checkpoint import TrainState, latest, load, read_state, save
from blockdiffusion.train.optim import MovingAverage, OptimOptions, make_optimizer

STATE = TrainState(
    step=3,
    seconds=1.5,
    best_bound=None,
    config={"train": {"steps": 9}},
    data="d",
    threads=1,
    device="cpu",
    versions=versions(),
)


class Network(nn.Module):
    def __init__(self, width=3):
        super().__init__()
        self.inner = nn.Linear(2, width)
        self.unused = nn.Parameter(torch.ones(1))  # never has a gradient

    @property
    def backbone(self):
        return self

    def full_config(self):
        return self

    def saved_tensors(self):
        return self.state_dict()

    def save_pretrained(self, folder):
        (folder / "config.json").write_text("Network")


def trained(seed=0, width=3):
    """A network with its average and optimizer after two updates."""
    torch.manual_seed(seed)
    model = Network(width)
    average, optimizer = MovingAverage(model, 0.5), make_optimizer(model, OptimOptions())
    for step in (1, 2):
        model.inner(torch.randn(4, 2)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        average.update(step)
    return model, average, optimizer


@pytest.fixture
def saved(tmp_path):
    parts = trained()
    return save(tmp_path, STATE, *parts, keep=2), parts


def test_round_trip_is_exact_and_training_resumes_as_before(saved):
    folder, (model, average, optimizer) = saved
    other, other_average, other_optimizer = trained(seed=1)
    assert load(folder, other, other_average, other_optimizer) == STATE
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, dict(other.named_parameters())[name])
        assert torch.equal(average.average[name], other_average.average[name])
    for network, update in ((model, optimizer), (other, other_optimizer)):
        network.inner(torch.ones(4, 2)).square().sum().backward()
        update.step()
    assert torch.equal(model.inner.weight, other.inner.weight)


def test_the_last_ones_are_kept_and_the_newest_is_found(tmp_path):
    assert latest(tmp_path) is None
    parts = trained()
    for step in (3, 20, 100):
        save(tmp_path, replace(STATE, step=step), *parts, keep=2)
    names = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert names == ["step-00000020", "step-00000100"]
    assert read_state(latest(tmp_path)).step == 100


def test_leftovers_of_a_kill_are_removed_and_never_found(tmp_path, saved):
    folder, _ = saved
    for name in (".step-00000009.partial", ".step-00000001.partial"):
        shutil.copytree(folder, folder.with_name(name))
    (tmp_path / ".model.partial").mkdir()
    (tmp_path / ".metrics.jsonl.17.partial").write_text("{")
    assert latest(tmp_path) == folder
    with checkpoint.claimed(tmp_path):
        assert not list(tmp_path.rglob("*.partial"))
        assert latest(tmp_path) == folder


@pytest.mark.parametrize("file", [checkpoint.WEIGHTS, checkpoint.AVERAGE, checkpoint.OPTIMIZER])
@pytest.mark.parametrize("damage", ["truncated", "missing", "text", "empty"])
def test_damaged_tensors_name_their_file_and_change_nothing(saved, file, damage):
    folder, _ = saved
    path = folder / file
    content = path.read_bytes()
    path.unlink()
    if damage != "missing":
        path.write_bytes({"truncated": content[:-7], "text": b"hello", "empty": b""}[damage])
    model, average, optimizer = trained(seed=1)
    before = model.inner.weight.detach().clone()
    with pytest.raises(UserError, match=f"cannot resume from .*{file}.*remove the directory"):
        load(folder, model, average, optimizer)
    assert torch.equal(model.inner.weight, before)


@pytest.mark.parametrize("text", [None, "", "[]", "{}", '{"format": "other"}', '{"format": '])
def test_damaged_states_name_their_file(saved, text):
    folder, _ = saved
    (folder / "state.json").unlink()
    if text is not None:
        (folder / "state.json").write_text(text)
    with pytest.raises(UserError, match=r"cannot resume from .*state\.json"):
        read_state(folder)


def test_a_state_with_a_missing_field_is_refused(saved):
    folder, _ = saved
    state = json.loads((folder / "state.json").read_text())
    del state["threads"]
    (folder / "state.json").write_text(json.dumps(state))
    with pytest.raises(UserError, match="threads"):
        read_state(folder)


@pytest.mark.parametrize("clip", [0.5, "wide", [0.5], [0.1, None]])
def test_a_clip_that_is_none_is_refused(saved, clip):
    folder, _ = saved
    state = json.loads((folder / "state.json").read_text())
    assert read_state(folder).clip is None
    (folder / "state.json").write_text(json.dumps(state | {"clip": [0.45, 1]}))
    assert read_state(folder).clip == (0.45, 1.0)
    (folder / "state.json").write_text(json.dumps(state | {"clip": clip}))
    with pytest.raises(UserError, match=r"cannot resume from .*state\.json"):
        read_state(folder)


def test_a_checkpoint_of_another_shape_names_the_tensor(saved):
    folder, _ = saved
    with pytest.raises(
        UserError, match=r"inner\.bias has shape \(3,\) where this model has \(4,\)"
    ):
        load(folder, *trained(width=4))


def test_foreign_tensors_are_named(saved):
    folder, _ = saved
    tensors = load_file(folder / checkpoint.WEIGHTS)
    save_file(tensors | {"more": torch.ones(1)}, folder / checkpoint.WEIGHTS)
    with pytest.raises(UserError, match="has the unexpected tensor more"):
        load(folder, *trained())
    del tensors["inner.bias"]
    save_file(tensors, folder / checkpoint.WEIGHTS)
    with pytest.raises(UserError, match=r"lacks the tensor inner\.bias"):
        load(folder, *trained())


def test_shards_of_any_number_of_processes_are_one_checkpoint(saved):
    folder, (model, average, _) = saved
    for name in (checkpoint.WEIGHTS, checkpoint.AVERAGE, checkpoint.OPTIMIZER):
        whole = load_file(folder / name)
        for rank in range(3):  # rows 0 and 1, row 2, and none
            part = {n: t[2 * rank :][: 2 - rank].clone() for n, t in whole.items() if t.ndim}
            if rank == 0:
                part |= {n: t for n, t in whole.items() if not t.ndim}
            save_file(part, (folder / name).with_stem(f"{Path(name).stem}-0000{rank + 1}-of-00003"))
        (folder / name).unlink()
    other, other_average, other_optimizer = trained(seed=1)
    assert load(folder, other, other_average, other_optimizer) == STATE
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, dict(other.named_parameters())[name])
        assert torch.equal(average.average[name], other_average.average[name])
    (folder / "average-00002-of-00003.safetensors").unlink()
    with pytest.raises(UserError, match=r"average\.safetensors: it has 2 of the 3 files"):
        load(folder, *trained(seed=1))


def full_disk(monkeypatch, error):
    """Makes the second file that is saved fail after half of it."""
    real, calls = tensor_files.write_safetensors, []

    def write_safetensors(tensors, path):
        sha256 = real(tensors, path)
        calls.append(path)
        if len(calls) == 2:
            with open(path, "r+b") as file:
                file.truncate(path.stat().st_size // 2)
            raise error
        return sha256

    monkeypatch.setattr(tensor_files, "write_safetensors", write_safetensors)


def test_a_full_disk_leaves_the_earlier_checkpoint_and_no_part(saved, monkeypatch):
    folder, parts = saved
    before = {path: path.read_bytes() for path in folder.iterdir()}
    full_disk(monkeypatch, OSError(errno.ENOSPC, "No space left on device"))
    with pytest.raises(UserError, match=r"the disk is full: the checkpoint .*step-00000007"):
        save(folder.parents[1], replace(STATE, step=7), *parts, keep=1)
    assert list(folder.parent.iterdir()) == [folder]
    assert {path: path.read_bytes() for path in folder.iterdir()} == before


def test_other_errors_of_the_disk_are_not_called_a_full_one(saved, monkeypatch):
    folder, parts = saved
    full_disk(monkeypatch, PermissionError(errno.EACCES, "Permission denied"))
    with pytest.raises(UserError, match=r"checkpoint .*: Permission denied; choose another place"):
        save(folder.parents[1], replace(STATE, step=7), *parts, keep=1)
    assert list(folder.parent.iterdir()) == [folder]


def test_the_export_is_replaced_file_by_file_and_keeps_the_weights(tmp_path):
    model, average, _ = trained()
    (tmp_path / "tokenizer").mkdir()
    (tmp_path / "tokenizer" / "tokenizer.json").write_text("{}")
    weights = model.inner.weight.detach().clone()
    for _ in range(2):
        with average.swapped():
            checkpoint.export_model(tmp_path, model, tmp_path / "tokenizer")
        average.update(3)
    files = sorted(path.name for path in (tmp_path / "model").iterdir())
    assert files == ["SHA256SUMS", "config.json", "model.safetensors", "tokenizer.json"]
    assert differing(tmp_path / "model", read_sums(tmp_path / "model")) == []
    exported = load_file(tmp_path / "model" / "model.safetensors")
    assert not torch.equal(exported["inner.weight"], weights)
    assert torch.equal(model.inner.weight, weights)
    assert not (tmp_path / ".model.partial").exists()


@pytest.mark.parametrize("file", [checkpoint.WEIGHTS, checkpoint.AVERAGE, checkpoint.OPTIMIZER])
def test_numbers_that_are_not_finite_are_told(saved, file):
    folder, _ = saved
    tensors = load_file(folder / file)
    name = next(name for name, tensor in tensors.items() if tensor.numel() > 1)
    tensors[name].view(-1)[1] = float("nan")
    save_file(tensors, folder / file)
    with pytest.raises(UserError, match=f"{name} holds numbers that are not finite; remove the di"):
        load(folder, *trained(seed=1))
