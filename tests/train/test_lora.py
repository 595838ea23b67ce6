"""LoRA: an adapter is trained and saved alone; merged, it computes what it did in training."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import blockdiffusion
from blockdiffusion.checkpoints.finding import ADAPTER, WEIGHTS
from blockdiffusion.errors import UserError
from blockdiffusion.models.lora import SECTION, merge_adapter
from blockdiffusion.train.adapt import adapted_for
from blockdiffusion.train.optim import trainable
from blockdiffusion.train.recipe import load_recipe
from blockdiffusion.train.run import run_training
from tests.command import blockdiff
from tests.models.hugging_face import make_causal_lm
from tests.train.test_adapt import place, recipe, rows_of, save_parent  # noqa: F401

pytest.importorskip("peft")
LORA = ("adapt.lora_rank=4", "adapt.lora_alpha=16", "optim.lr=1e-2", "optim.ema_decay=0.5")


def adapt(made):
    return adapted_for(made, rows_of(made).manifest).eval()


def test_before_training_it_is_the_parent(recipe):  # noqa: F811
    ids = torch.as_tensor(rows_of(recipe()).rows(range(3)).ids_BL)
    noisy = torch.where(torch.arange(ids.shape[1]) % 3 == 0, 257, ids)
    full, low = adapt(recipe()), adapt(recipe(*LORA))
    torch.testing.assert_close(low.denoise_logits(noisy, ids), full.denoise_logits(noisy, ids))
    named = trainable(low.backbone)
    assert {name.split(".")[-2 if "lora" not in name else -3] for name in named} == {
        "lora_A", "lora_B", "trainable_tokens_delta",
    }  # fmt: skip
    assert sum(p.numel() for p in named.values()) < 0.4 * sum(p.numel() for p in full.parameters())


@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox"])
def test_merged_it_computes_what_it_computed_in_training(recipe, tmp_path, family):  # noqa: F811
    """Heads tied (GPT-2) and not; GPT-2's layers hold their weights transposed."""
    save_parent(tmp_path / "parent", family)
    made = recipe(f"adapt.parent={tmp_path / 'parent'}", *LORA)
    run_training(made)
    model = tmp_path / "run" / "model"
    assert (model / ADAPTER).exists() and not (model / WEIGHTS).exists()
    merged = blockdiffusion.load(tmp_path / "run", dtype=torch.float64)
    # The adapter as it was in training, by peft's own layers.
    low = adapt(made)
    tensors = load_file(model / ADAPTER)
    named = {
        "base_model.model." + name.replace(".default", ""): p
        for name, p in trainable(low.backbone.model).items()
    }
    assert named.keys() == tensors.keys()
    for name, parameter in named.items():
        parameter.data = tensors[name]
    ids = torch.as_tensor(rows_of(made).rows(range(3)).ids_BL)
    noisy = torch.where(torch.arange(ids.shape[1]) % 3 == 0, 257, ids)
    single = blockdiffusion.load(tmp_path / "run").denoise_logits(noisy, ids)[..., :257]
    torch.testing.assert_close(single, low.denoise_logits(noisy, ids)[..., :257])
    low.double()
    found, expected = merged.denoise_logits(noisy, ids), low.denoise_logits(noisy, ids)
    # No token is predicted to be the mask, 257.
    torch.testing.assert_close(found[..., :257], expected[..., :257], rtol=1e-6, atol=1e-6)
    start = adapt(recipe(f"adapt.parent={tmp_path / 'parent'}")).double()
    assert (found - start.denoise_logits(noisy, ids)).abs().max() > 1e-2  # it has learnt something


def test_only_the_adapter_is_trained_and_kept(recipe, tmp_path):  # noqa: F811
    """A run that is resumed ends as one that was not; its checkpoints are small."""
    run_training(recipe(*LORA, f"out={tmp_path / 'whole'}", "checkpoint.every=2"))
    part = recipe(*LORA, f"out={tmp_path / 'part'}", "checkpoint.every=2", "train.steps=2")
    run_training(part)
    more = load_recipe(tmp_path / "part" / "config.yaml", ["train.steps=4"])
    run_training(more, resume=True)
    one, two = (load_file(tmp_path / run / "model" / ADAPTER) for run in ("whole", "part"))
    assert one.keys() == two.keys()
    for name, tensor in one.items():
        assert torch.equal(tensor, two[name]), name
    size = sum(t.numel() for t in one.values())
    held = sum(
        file.stat().st_size
        for file in (tmp_path / "whole" / "checkpoints" / "step-00000004").iterdir()
    )
    assert held < 4 * 4 * size + 100_000  # weights, average and two moments


def test_a_merged_copy_is_a_directory_of_transformers(recipe, place, tmp_path):  # noqa: F811
    run_training(recipe(*LORA))
    ended = blockdiff("convert", tmp_path / "run", "--out", tmp_path / "merged")
    assert ended.returncode == 0, ended.stderr
    config = json.loads((tmp_path / "merged" / "config.json").read_text())
    assert SECTION not in config and (tmp_path / "merged" / WEIGHTS).exists()
    ids = torch.arange(12)[None]
    causal = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    ours = blockdiffusion.load(tmp_path / "run")
    start = torch.full((1, 1), 256)
    expected = causal(torch.cat([start, ids[:, :-1]], 1)).logits
    one = ours.with_block_size(1)
    noisy = torch.full_like(ids, 257)
    found = one.denoise_logits(noisy, ids)[..., :257]
    torch.testing.assert_close(found, expected[..., :257], rtol=1e-4, atol=1e-4)
    again = recipe(f"adapt.parent={tmp_path / 'run'}", f"out={tmp_path / 'again'}")
    run_training(again)  # full training, from the merged weights
    assert blockdiffusion.load(tmp_path / "again").config.block_size == 4


def test_peft_reads_the_adapter(recipe, place, tmp_path):  # noqa: F811
    from peft import PeftModel

    run_training(recipe(*LORA))
    parent = AutoModelForCausalLM.from_pretrained(place / "parent")
    parent.resize_token_embeddings(258)
    theirs = PeftModel.from_pretrained(parent, tmp_path / "run" / "model").eval()
    ids = torch.arange(12)[None]
    ours = blockdiffusion.load(tmp_path / "run").with_block_size(1)
    noisy = torch.full_like(ids, 257)
    found = ours.denoise_logits(noisy, ids)[..., :257]
    start = torch.full((1, 1), 256)
    expected = theirs(torch.cat([start, ids[:, :-1]], 1)).logits[..., :257]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_an_adapter_of_another_parent_is_refused(recipe, place, tmp_path):  # noqa: F811
    shutil.copytree(place / "parent", tmp_path / "parent")
    run_training(recipe(f"adapt.parent={tmp_path / 'parent'}", *LORA))
    network = AutoModelForCausalLM.from_pretrained(place / "parent")
    torch.nn.init.normal_(network.model.norm.weight)
    network.save_pretrained(tmp_path / "parent")
    ended = blockdiff("sample", tmp_path / "run", "--max-new-tokens", 4)
    assert ended.returncode == 2 and "an adapter of another model" in ended.stderr
    shutil.rmtree(tmp_path / "parent")
    ended = blockdiff("sample", tmp_path / "run", "--max-new-tokens", 4)
    assert ended.returncode == 2 and "its parent cannot be read" in ended.stderr


def test_damaged_adapters_are_refused(recipe, tmp_path):  # noqa: F811
    run_training(recipe(*LORA))
    file = tmp_path / "run" / "model" / ADAPTER
    whole = load_file(file)
    name = next(n for n in whole if n.endswith("lora_A.weight"))
    for damaged, message in (
        ({n: t for n, t in whole.items() if n != name}, "but no"),
        (
            whole | {"base_model.model.there.lora_A.weight": whole[name].clone()},
            "belongs to no layer",
        ),
        (whole | {name: whole[name][:, 1:].contiguous()}, "does not fit"),
    ):
        save_file(damaged, file)
        with pytest.raises(UserError, match=message):
            blockdiffusion.load(tmp_path / "run")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["adapt.lora_alpha=8"], "adapt.lora_rank is 0, so nothing reads it"),
        (["adapt.lora_rank=-1"], "adapt.lora_rank is -1"),
        (["adapt.lora_rank=4", "adapt.lora_dropout=1"], "adapt.lora_dropout is 1"),
        (["adapt.lora_rank=4", "train.parallel=fsdp"], "set train.parallel=ddp"),
    ],
)
def test_options_that_do_not_fit_are_refused(recipe, overrides, message):  # noqa: F811
    with pytest.raises(UserError, match=message):
        recipe(*overrides)


def test_merging_in_the_oracle_of_one_matrix():
    network = make_causal_lm("llama", 64)
    layer = network.model.layers[0].self_attn.q_proj
    before, generator = layer.weight.detach().clone(), torch.Generator().manual_seed(0)
    a = torch.randn(2, before.shape[1], generator=generator)
    b = torch.randn(before.shape[0], 2, generator=generator)
    name = "base_model.model.model.layers.0.self_attn.q_proj.lora_"
    merge_adapter(network, {f"{name}A.weight": a, f"{name}B.weight": b}, 0.5, 0)
    torch.testing.assert_close(layer.weight.double(), before + 0.5 * (b @ a).double())
