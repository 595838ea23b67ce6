"""What is written is compared with its checksums: at first use, on resuming, by `verify`."""

import os
import shutil
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

import blockdiffusion
from blockdiffusion.checkpoints.tensors import write_safetensors
from blockdiffusion.checkpoints.verify import verify
from blockdiffusion.data.loader import TokenRows
from blockdiffusion.data.options import PrepareOptions
from blockdiffusion.data.packing import prepare
from blockdiffusion.errors import UserError
from blockdiffusion.files import checksums
from blockdiffusion.files.checksums import NOTES, SUMS, Changed, differing, read_sums, sha256_of
from tests.command import blockdiff
from tests.tiny import TEXT, write_recipe


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    (folder / "text.txt").write_text(TEXT)
    options = PrepareOptions(
        seq_len=16, tokenizer="byte", packing="document", documents="blank-line", num_workers=1
    )
    prepare([str(folder / "text.txt")], folder / "data", options)
    recipe = write_recipe(
        folder / "recipe.yaml", folder / "data", folder / "run", steps=4, checkpoint={"every": 2}
    )
    made = blockdiff("train", recipe)
    assert made.returncode == 0, made.stderr
    return folder


@pytest.fixture
def place(whole, tmp_path):
    """A copy of everything."""
    shutil.copytree(whole, tmp_path / "copy", dirs_exist_ok=True)
    return tmp_path / "copy"


def flip(path, place=None):
    """Changes one bit; by default in the middle."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2 if place is None else place] ^= 1
    path.write_bytes(content)


def resume(place, *more):
    return blockdiff(
        "train", place / "recipe.yaml", "--resume", f"out={place / 'run'}",
        f"data.path={place / 'data'}", *more,
    )  # fmt: skip


# --- data -----------------------------------------------------------------------------------------

DATA_FILES = [
    "train-00000.bin", "train-00000.len", "tokenizer/tokenizer.json", "manifest.json",
]  # fmt: skip


@pytest.mark.parametrize("name", DATA_FILES)
@pytest.mark.parametrize("used", [False, True])
def test_changed_data_are_not_trained_on(place, name, used):
    """Whether or not they were found whole before."""
    if used:
        TokenRows(place / "data", "train")
    path = place / "data" / name
    flip(path, path.read_bytes().index(b"e") if path.suffix == ".json" else None)
    for command in (
        ("train", place / "recipe.yaml", f"out={place / 'new'}", f"data.path={place / 'data'}"),
        ("references", place / "data", "--limit", 2),
    ):
        ended = blockdiff(*command)
        assert ended.returncode == 2 and "Traceback" not in ended.stderr
        assert name == "manifest.json" or f"{path} is damaged or was changed" in ended.stderr
    assert not (place / "new" / "checkpoints").exists()


def test_data_are_read_once_and_again_when_they_change(place, monkeypatch):
    read = []
    real = checksums.sha256_of
    monkeypatch.setattr(checksums, "sha256_of", lambda p, *a: read.append(p.name) or real(p, *a))
    seen = []
    TokenRows(place / "data", "valid", lambda stage, done, total: seen.append((done, total)))
    assert "valid-00000.bin" in read and "train-00000.bin" not in read
    assert seen[-1][0] == seen[-1][1] > 0
    read.clear()
    TokenRows(place / "data", "valid")
    assert read == []
    os.utime(place / "data" / "valid-00000.bin")
    TokenRows(place / "data", "valid")
    assert read == ["valid-00000.bin"]
    (place / "data" / NOTES).write_text("[1")
    TokenRows(place / "data", "valid")
    assert read.count("valid-00000.bin") == 2


def test_data_that_cannot_be_written_are_checked_each_time(place, monkeypatch):
    def read_only(path):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(checksums, "written_aside", read_only)
    (place / "data" / NOTES).unlink(missing_ok=True)
    for _ in range(2):
        assert TokenRows(place / "data", "train").num_rows > 0
    flip(place / "data" / "train-00000.bin")
    with pytest.raises(UserError, match="is damaged or was changed"):
        TokenRows(place / "data", "train")


def test_older_data_have_the_sums_of_the_manifest(place):
    (place / "data" / SUMS).unlink()
    assert TokenRows(place / "data", "train").num_rows > 0
    flip(place / "data" / "train-00000.bin")
    with pytest.raises(UserError, match=r"train-00000\.bin is damaged or was changed"):
        TokenRows(place / "data", "train")
    assert [one.bad for one in verify(place / "data")] == [("train-00000.bin",)]


# --- checkpoints ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["weights", "average", "optimizer", "state"])
def test_a_flipped_bit_in_a_checkpoint_is_not_resumed_from(place, name):
    folder = place / "run" / "checkpoints" / "step-00000004"
    path = folder / (f"{name}.json" if name == "state" else f"{name}.safetensors")
    flip(path, path.read_bytes().index(b"4") if name == "state" else -3)
    before = {p: p.read_bytes() for p in (place / "run").rglob("*") if p.is_file()}
    ended = resume(place)
    assert ended.returncode == 2 and ended.stderr.count("\n") == 1
    assert f"{path} is damaged or was changed" in ended.stderr
    assert {p: p.read_bytes() for p in (place / "run").rglob("*") if p.is_file()} == before
    shutil.rmtree(folder)  # as the sentence says
    assert resume(place).returncode == 0


def test_a_checkpoint_without_sums_says_so(place):
    (place / "run" / "checkpoints" / "step-00000004" / SUMS).unlink()
    assert resume(place).returncode == 0
    assert "its checkpoint has no checksums" in (place / "run" / "metrics.jsonl").read_text()


@pytest.mark.parametrize(
    "text", ["hello\n", "0" * 64 + "  ../../recipe.yaml\n", "\xff\n", "x" * 99]
)
def test_sums_that_are_damaged_themselves_are_named(place, text):
    path = place / "run" / "checkpoints" / "step-00000004" / SUMS
    path.write_text(path.read_text() + text)
    ended = resume(place)
    assert ended.returncode == 2 and f"{path} is damaged or was changed" in ended.stderr


# --- models ---------------------------------------------------------------------------------------


def test_a_changed_model_is_loaded_with_a_warning_until_the_change_is_accepted(place):
    file = place / "run" / "model" / "model.safetensors"
    state = load_file(file)
    save_file({name: tensor + 1 for name, tensor in state.items()}, file)
    for _ in range(2):
        ended = blockdiff("sample", place / "run", "--max-new-tokens", 4, "--seed", 1)
        assert ended.returncode == 0
        assert ended.stderr.count("blockdiff: warning: ") == 1
        assert f"{file} is damaged or was changed" in ended.stderr
    with pytest.warns(Changed, match=r"blockdiff verify .*model --update"):
        blockdiffusion.load(place / "run")
    assert blockdiff("verify", place / "run").returncode == 2
    assert blockdiff("verify", place / "run" / "model", "--update").returncode == 0
    assert blockdiff("verify", place / "run").returncode == 0
    ended = blockdiff("sample", place / "run", "--max-new-tokens", 4, "--seed", 1)
    assert ended.returncode == 0 and ended.stderr == ""


def test_the_card_may_be_edited(place):
    for name in ("README.md", "card.json"):
        path = place / "run" / "model" / name
        path.write_text(path.read_text() + "\n")
    assert blockdiff("verify", place / "run").returncode == 0


@pytest.mark.parametrize("to", ["blockdiffusion", "bd3lm"])
def test_converted_models_have_sums(place, to):
    out = place / "made"
    assert blockdiff("convert", place / "run", "--out", out, "--to", to).returncode == 0
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= read_sums(out).keys()
    assert differing(out, read_sums(out)) == []


def test_weights_are_the_bytes_that_safetensors_writes(tmp_path):
    tensors = {
        "b": torch.randn(3, 4), 'a"ü': torch.randn(5).bfloat16(), "scalar": torch.tensor(3.0),
        "none": torch.empty(0, 3), "ids": torch.arange(3), "turned": torch.randn(4, 6).T,
        "flags": torch.tensor([True, False]), "double": torch.randn(2).double(),
    }  # fmt: skip
    sha256 = write_safetensors(tensors, tmp_path / "ours")
    plain = {name: tensor.contiguous() for name, tensor in tensors.items()}
    save_file(plain, tmp_path / "theirs", {"format": "pt"})
    back = load_file(tmp_path / "ours")
    assert back.keys() == tensors.keys()
    assert all(torch.equal(back[name], tensor) for name, tensor in tensors.items())
    assert sha256 == sha256_of(tmp_path / "ours")
    one_kind = {name: tensor for name, tensor in plain.items() if tensor.dtype == torch.float32}
    assert write_safetensors(one_kind, tmp_path / "ours")
    save_file(one_kind, tmp_path / "theirs", {"format": "pt"})
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()


def test_a_model_is_written_as_transformers_writes_it(place, tmp_path):
    model = blockdiffusion.load(place / "run")
    model.save_pretrained(tmp_path)
    for name in ("config.json", "model.safetensors"):
        assert (tmp_path / name).read_bytes() == (place / "run" / "model" / name).read_bytes()


# --- the command ----------------------------------------------------------------------------------


def test_verify_lists_what_it_finds(place):
    shutil.copy(place / "run" / "model" / "model.safetensors", place / "text.safetensors")
    ended = blockdiff("verify", place)
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.splitlines() == [
        f"{place}: no checksums (text.safetensors): an older version or another program",
        f"{place / 'data'}: 7 of 7 files intact",
        f"{place / 'run/checkpoints/step-00000002'}: 4 of 4 files intact",
        f"{place / 'run/checkpoints/step-00000004'}: 4 of 4 files intact",
        f"{place / 'run/model'}: 4 of 4 files intact",
    ]
    flip(place / "data" / "valid-00000.len")
    (place / "run" / "checkpoints" / "step-00000002" / "average.safetensors").unlink()
    ended = blockdiff("verify", place)
    assert ended.returncode == 2
    for path in ("data/valid-00000.len", "run/checkpoints/step-00000002/average.safetensors"):
        assert str(place / path) in ended.stderr and f": {place / path}\n" in ended.stdout
    (place / "empty").mkdir()
    for wrong in ("empty", "nowhere", "text.txt"):
        ended = blockdiff("verify", place / wrong)
        assert ended.returncode == 2 and ended.stderr.count("\n") == 1


def test_an_update_never_accepts_changed_data(place):
    flip(place / "data" / "train-00000.bin")
    assert blockdiff("verify", place / "data", "--update").returncode == 2


@pytest.mark.skipif(shutil.which("sha256sum") is None, reason="there is no sha256sum")
@pytest.mark.parametrize("folder", ["data", "run/model", "run/checkpoints/step-00000004"])
def test_sha256sum_reads_the_sums(place, folder):
    subprocess.run(["sha256sum", "-c", "--strict", SUMS], cwd=place / folder, check=True)


# --- links ----------------------------------------------------------------------------------------


@pytest.mark.skipif(sys.platform == "win32", reason="links need rights there")
@pytest.mark.parametrize("name", [".lock", "metrics.jsonl", "config.yaml"])
@pytest.mark.parametrize("kind", ["link", "dangling", "pipe"])
def test_a_link_in_a_run_leads_to_no_other_file(place, name, kind):
    victim = place / "victim"
    path = place / "run" / name
    content = path.read_text()
    path.unlink()
    if kind == "pipe":
        os.mkfifo(path)
    else:
        path.symlink_to(victim)
    if kind == "link":
        victim.write_text(content if name != ".lock" else "precious")
    before = victim.read_bytes() if victim.exists() else None
    if kind != "pipe" or name == ".lock":  # what is read there is another matter
        ended = resume(place, "checkpoint.keep=3")
        assert ended.returncode in (0, 2) and "Traceback" not in ended.stderr
        assert (victim.read_bytes() if victim.exists() else None) == before
    if name == ".lock":
        assert ended.returncode == 2 and "is a link or not a regular file" in ended.stderr


@pytest.mark.skipif(sys.platform == "win32", reason="links need rights there")
def test_links_among_what_is_written_aside_and_added_to_are_not_followed(place):
    victim = place / "victim"
    victim.write_text("precious")
    pid = os.getpid()
    places = [
        place / f".e.json.{pid}.partial",
        place / "run" / f".config.yaml.{pid}.partial",
        place / "run" / "checkpoints" / ".step-00000006.partial",
        place / "run" / ".model.partial",
        place / "run" / "model" / f".SHA256SUMS.{pid}.partial",
        place / "data" / f"{NOTES}.{pid}.partial",
        place / ".made.partial",
    ]
    (place / "data" / NOTES).unlink(missing_ok=True)
    for path in places:
        path.symlink_to(victim)
    run = ("eval", place / "run", "--data", place / "data", "--limit", 2, "--json")
    for command in (
        (*run, place / "e.json"), ("convert", place / "run", "--out", place / "made"),
    ):  # fmt: skip
        assert blockdiff(*command).returncode in (0, 2)
    recipe = place / "recipe.yaml"
    recipe.write_text(recipe.read_text().replace("steps: 4", "steps: 4"))
    assert resume(place).returncode == 0
    (place / "f.json.journal").symlink_to(victim)
    ended = blockdiff(*run, place / "f.json")
    assert ended.returncode == 2 and "f.json.journal is a link" in ended.stderr
    assert victim.read_text() == "precious"


def test_a_device_is_not_replaced_by_a_file(place, monkeypatch):
    device = place / "device"
    os.mkfifo(device)
    ended = blockdiff(
        "eval", place / "run", "--data", place / "data", "--limit", 2, "--json", device
    )
    assert ended.returncode == 2 and "not a regular file" in ended.stderr
    assert device.is_fifo()


# --- what is told ---------------------------------------------------------------------------------


def test_a_batch_larger_than_the_data_is_told(place):
    rows = TokenRows(place / "data", "train").num_rows
    ended = blockdiff(
        "train", place / "recipe.yaml", f"out={place / 'new'}", f"data.path={place / 'data'}",
        f"train.batch_size={rows + 1}", "train.steps=1",
    )  # fmt: skip
    assert ended.returncode == 0, ended.stderr
    notes = (place / "new" / "metrics.jsonl").read_text()
    assert f"train.batch_size is {rows + 1}, more than the {rows} rows of the data" in notes
