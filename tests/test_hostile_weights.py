"""Weights that no program of ours wrote: crafted headers, other kinds of numbers, overflow."""

from __future__ import annotations

import json
import math
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

import blockdiffusion
from blockdiffusion.checkpoints.tensors import MOST_HEADER
from blockdiffusion.errors import UserError
from blockdiffusion.evaluate.scorer import load_scorer
from blockdiffusion.train.tensor_files import SavedTensors
from tests.command import blockdiff
from tests.conftest import GOLDEN
from tests.evaluate.scorers import save_gpt2
from tests.tiny import TEXT, write_recipe

WEIGHTS = "model.safetensors"


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Data, a run with checkpoints after each of two steps, and a judge of another program."""
    folder = tmp_path_factory.mktemp("weights")
    (folder / "text").write_text(TEXT)
    prepare = ("prepare", folder / "text", "--out", folder / "data", "--tokenizer", "byte",
               "--seq-len", 16, "--documents", "blank-line", "--workers", 1)  # fmt: skip
    write_recipe(folder / "recipe", folder / "data", folder / "run")
    for command in (prepare, ("train", folder / "recipe")):
        made = blockdiff(*command)
        assert made.returncode == 0, made.stderr
    save_gpt2(folder / "judge")
    for sums in folder.rglob("SHA256SUMS"):  # they would stop what the readers are to stop
        sums.unlink()
    return folder


@pytest.fixture
def file(place):
    """A file of weights below `place`, to be changed; restored behind the test."""
    kept = {}

    def of(name):
        path = place / name
        kept[path] = path.read_bytes()
        return path

    yield of
    for path, content in kept.items():
        path.write_bytes(content)


# --- headers --------------------------------------------------------------------------------------


def with_header(content, change):
    """A safetensors file whose header `change` has made of the old one's text."""
    length = int.from_bytes(content[:8], "little")
    header = change(content[8 : 8 + length].rstrip())
    return len(header).to_bytes(8, "little") + header + content[8 + length :]


def first_again(header, **other):
    name, entry = next((k, v) for k, v in json.loads(header).items() if k != "__metadata__")
    return header[:-1] + f",{json.dumps(name)}:{json.dumps(entry | other)}}}".encode()


def entry(header, **other):
    tree = json.loads(header)
    tree[max(tree.keys() - {"__metadata__"})].update(other)
    return json.dumps(tree).encode()


HEADERS = {
    "a tensor twice": first_again,
    "a kind twice": lambda header: header.replace(b'"dtype":', b'"dtype":"F32","dtype":', 1),
    "long": lambda header: header + b" " * (MOST_HEADER + 1 - len(header)),
    "deep": lambda header: header[:-1] + b',"x":' + b"[" * 10**5 + b"]" * 10**5 + b"}",
    "no object": lambda header: b"[]",
    "beyond the file": lambda header: entry(header, shape=[2**40], data_offsets=[0, 2**42]),
    "a product that wraps": lambda header: entry(header, shape=[2**63, 2]),
    "a negative shape": lambda header: entry(header, shape=[-1]),
    "offsets in reverse": lambda header: entry(header, data_offsets=[8, 4]),
    "no such kind": lambda header: entry(header, dtype="F4096"),
}
READERS = {
    "run/model/model.safetensors": lambda path: blockdiffusion.load(path.parent),
    "run/checkpoints/step-00000002/weights.safetensors": lambda path: SavedTensors(path, {}),
    "judge/model.safetensors": lambda path: load_scorer(str(path.parent)),
}


@pytest.mark.parametrize("what", HEADERS)
@pytest.mark.parametrize("name", READERS)
def test_a_crafted_header_is_refused(name, what, file):
    path = file(name)
    path.write_bytes(with_header(path.read_bytes(), HEADERS[what]))
    with pytest.raises(UserError, match=r"safetensors") as told:
        READERS[name](path)
    assert "unexpected tensor" not in str(told.value)  # found before what it holds is compared


# --- checkpoints ----------------------------------------------------------------------------------


def resume(place):
    return blockdiff("train", place / "recipe", "--resume", "train.steps=3")


@pytest.mark.parametrize("part", ["weights", "average", "optimizer"])
@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.float8_e4m3fn, torch.complex64])
def test_a_checkpoint_of_other_kinds_of_numbers_is_not_resumed(part, dtype, place, file):
    path = file(f"run/checkpoints/step-00000002/{part}.safetensors")
    save_file({name: tensor.to(dtype) for name, tensor in load_file(path).items()}, path)
    ended = resume(place)
    assert ended.returncode == 2 and "which no checkpoint does" in ended.stderr


@pytest.mark.parametrize(("left", "sentence"), [(None, "no moments, after 2 steps"),
                                                ("step", "only a part of")])  # fmt: skip
def test_a_checkpoint_without_moments_is_not_resumed(left, sentence, place, file):
    path = file("run/checkpoints/step-00000002/optimizer.safetensors")
    moments = load_file(path)
    save_file({n: t for n, t in moments.items() if left and n.endswith(f".{left}")}, path)
    ended = resume(place)
    assert ended.returncode == 2 and sentence in ended.stderr


# --- judges ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_judge_whose_weights_are_not_finite(value, dtype, place, file):
    path = file(f"judge/{WEIGHTS}")
    tensors = {name: tensor.to(dtype) for name, tensor in load_file(path).items()}
    tensors["transformer.h.1.mlp.c_fc.weight"][3, 4] = value
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"transformer\.h\.1\.mlp\.c_fc\.weight holds numbers"):
        load_scorer(str(place / "judge"))


@pytest.mark.parametrize("dtype", [torch.int64, torch.complex64, torch.float8_e4m3fn])
def test_a_judge_of_other_kinds_of_numbers(dtype, place, file):
    path = file(f"judge/{WEIGHTS}")
    tensors = load_file(path)
    name = "transformer.h.1.mlp.c_fc.weight"
    save_file(tensors | {name: tensors[name].to(dtype)}, path, metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"c_fc\.weight' holds '.*', which no weights are in"):
        load_scorer(str(place / "judge"))


@pytest.mark.parametrize("part", ["../weights.safetensors", "{}/run/model/model.safetensors",
                                  "missing.safetensors", "", 1, None])  # fmt: skip
def test_a_judge_whose_index_leads_elsewhere(part, place, tmp_path):
    judge = save_gpt2(tmp_path / "judge")
    (judge / WEIGHTS).rename(tmp_path / "weights.safetensors")
    (judge / "other.safetensors").write_bytes((tmp_path / "weights.safetensors").read_bytes())
    part = part.format(place) if isinstance(part, str) else part
    index = {"weight_map": dict.fromkeys(load_file(judge / "other.safetensors"), part)}
    (judge / f"{WEIGHTS}.index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match="no file of its folder"):
        load_scorer(str(judge))


# --- numbers that overflow ------------------------------------------------------------------------

RUN = "{p}/run --max-new-tokens 4"
OVERFLOWING = [
    f"sample {RUN}",
    f"sample {RUN} --stream",
    f"sample {RUN} --dtype int8",
    f"sample {RUN} --policy confidence --threshold 0.9 --top-p 0.9",
    "infill {p}/run a[MASK:2]b",
    "eval {p}/run --data {p}/data --rows 2 --samples 2",
    "eval {p}/run --data {p}/data --rows 2 --estimator orders --orders 2",
    "variance {p}/run --data {p}/data --batch-size 2 --batches 1 --replicates 2",
    "references {p}/data --model {p}/run --rows 2 --samples 2",
    "zero-shot {p}/run --only ptb --local ptb={p}/text --rows 2 --samples 2",
    f"generate-eval {RUN} --judge {{p}}/judge --num-samples 2",
    "generate-eval --judge {p}/run --samples-from {p}/samples.jsonl",
]


@pytest.mark.parametrize("command", OVERFLOWING)
def test_finite_weights_whose_logits_are_not(command, place, file):
    path = file(f"run/model/{WEIGHTS}")
    tensors = load_file(path)
    save_file({name: 1e30 * torch.ones_like(t) for name, t in tensors.items()}, path)
    (place / "samples.jsonl").write_text('{"text": "the cat sat"}\n{"text": "on the mat"}\n')
    ended = blockdiff(*command.replace("{p}", str(place)).split())
    assert ended.returncode == 2, ended.stdout + ended.stderr
    assert ended.stderr.count("blockdiff: error: ") == 1 and "finite" in ended.stderr


def test_a_judge_whose_logits_are_far_too_large(place, file):
    path = file(f"judge/{WEIGHTS}")
    tensors = load_file(path)
    tensors["transformer.ln_f.weight"] *= 1e6
    save_file(tensors, path, metadata={"format": "pt"})
    (place / "samples.jsonl").write_text('{"text": "the cat sat"}\n{"text": "on the mat"}\n')
    ended = blockdiff(
        "generate-eval", "--judge", place / "judge", "--samples-from", place / "samples.jsonl"
    )
    assert ended.returncode == 2 and "far too large" in ended.stderr


# --- kinds of models ------------------------------------------------------------------------------


@pytest.mark.parametrize("command", ["sample", "infill", "eval", "adapt", "compare", "convert"])
def test_commands_say_why_diffusion_gemma_is_not_read(place, tmp_path, command):
    shutil.copy(GOLDEN / "diffusion_gemma" / "config.json", tmp_path)
    save_file({"never.read": torch.zeros(1)}, tmp_path / WEIGHTS)
    options = {
        "infill": ("a[MASK:2]b",),
        "eval": ("--data", place / "data"),
        "adapt": ("--data", place / "data", "--block-size", 4, "--out", tmp_path / "out"),
        "compare": (tmp_path, "--data", place / "data"),
        "convert": ("--out", tmp_path / "out"),
    }
    made = blockdiff(command, tmp_path, *options.get(command, ()))
    assert made.returncode == 2 and made.stdout == ""
    assert made.stderr.count("\n") == 1 and "self-conditioning" in made.stderr


def test_diffusion_gemma_is_no_scorer(tmp_path):
    shutil.copy(GOLDEN / "diffusion_gemma" / "config.json", tmp_path)
    save_file({"never.read": torch.zeros(1)}, tmp_path / WEIGHTS)
    with pytest.raises(UserError, match="self-conditioning"):
        load_scorer(str(tmp_path))
