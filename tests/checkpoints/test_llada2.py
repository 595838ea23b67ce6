"""Directories of LLaDA2: read strictly, saved, adapted, measured and sampled like any other."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

import blockdiffusion
from blockdiffusion.checkpoints.formats import load_parent, write_model
from blockdiffusion.errors import UserError
from blockdiffusion.models.causal_lm import AdaptedModel
from blockdiffusion.models.llada2 import LLaDA2MoeModelLM
from tests.command import blockdiff
from tests.conftest import GOLDEN
from tests.models.hugging_face import make_llada2
from tests.tiny import TEXT
from tests.train.test_adapt import save_bytes

GIVEN = dict(block_size=4, mask_id=318)
WEIGHTS = "model.safetensors"


@pytest.fixture
def folder(tmp_path):
    """A copy of the golden model, to be changed."""
    made = tmp_path / "llada2"
    made.mkdir()
    for name in ("config.json", WEIGHTS):
        shutil.copy(GOLDEN / "llada2_moe" / name, made)
    return made


def change_config(folder, **changes):
    """Change keys; None leaves one out."""
    path = folder / "config.json"
    config = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in config.items() if value is not None}))


def save_random(folder, **sizes):
    """A random network as published: no word of blocks and mask token."""
    network = make_llada2(eos_token_id=None, **sizes).float()
    folder.mkdir(exist_ok=True)
    network.config.save_pretrained(folder)
    state = network.state_dict()
    if network.config.tie_word_embeddings:
        del state["lm_head.weight"]
    save_file(state, folder / WEIGHTS, {"format": "pt"})
    return network


# --- conventions


def test_conventions_are_those_of_the_authors_code_where_no_file_says_them(tmp_path):
    save_random(tmp_path, hidden_size=8, vocab_size=157184, pad_token_id=156892, bos_token_id=None)
    config = blockdiffusion.load(tmp_path).config
    assert (config.block_size, config.mask_id, config.eos_id) == (32, 156895, 156892)
    assert (config.reading, config.clean_attention, config.block_attention) == (
        "same", "block", "full",
    )  # fmt: skip
    assert config.bos is False and config.bos_id is None


def test_the_mask_token_of_the_authors_code_lies_beyond_a_small_vocabulary(folder):
    with pytest.raises(UserError, match="has no mask token; give mask_id="):
        blockdiffusion.load(folder)
    config = blockdiffusion.load(folder, mask_id=318).config
    assert (config.block_size, config.eos_id) == (32, 317)
    change_config(folder, mask_token_id=300, block_size=8, eos_token_id=316)
    config = blockdiffusion.load(folder).config
    assert (config.block_size, config.mask_id, config.eos_id) == (8, 300, 316)


def test_the_mask_token_of_the_tokenizer(tmp_path):
    save_random(tmp_path, vocab_size=300)
    save_bytes(tmp_path, mask=True)
    model = blockdiffusion.load(tmp_path)
    assert model.config.mask_id == model.tokenizer.mask_token_id == 257


# --- reading and saving


@torch.no_grad()
@pytest.mark.parametrize("sizes", [{}, dict(tie_word_embeddings=True, use_qk_norm=False)])
def test_what_is_saved_has_the_published_names_and_is_read_again(tmp_path, random_ids, sizes):
    network = save_random(tmp_path / "published", **sizes)
    model = blockdiffusion.load(tmp_path / "published", block_size=4, mask_id=12)
    wanted = load_file(tmp_path / "published" / WEIGHTS)
    ids = random_ids(2, 16)
    before = model.denoise_logits(ids, ids)
    (tmp_path / "ours").mkdir()
    write_model(model, tmp_path / "ours")
    found = load_file(tmp_path / "ours" / WEIGHTS)
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    raw = json.loads((tmp_path / "ours" / "config.json").read_text())
    assert raw["model_type"] == "llada2_moe" and raw["architectures"] == ["LLaDA2MoeModelLM"]
    for name in ("rope_theta", "n_group", "partial_rotary_factor", "head_dim"):
        assert raw[name] == getattr(network.config, name)
    again = blockdiffusion.load(tmp_path / "ours")
    assert again.config == model.config
    assert torch.equal(again.denoise_logits(ids, ids), before)


def test_weights_in_several_files_and_other_types(folder, tmp_path):
    tensors = load_file(folder / WEIGHTS)
    whole = blockdiffusion.load(folder, **GIVEN).backbone.state_dict()
    (folder / WEIGHTS).unlink()
    names, parts = sorted(tensors), {}
    for part, first in (("a.safetensors", 0), ("b.safetensors", 1)):
        save_file({name: tensors[name] for name in names[first::2]}, folder / part)
        parts |= dict.fromkeys(names[first::2], part)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": parts}))
    found = blockdiffusion.load(folder, **GIVEN).backbone.state_dict()
    assert all(torch.equal(found[name], whole[name]) for name in whole)
    half = blockdiffusion.load(folder, dtype=torch.bfloat16, **GIVEN)
    assert half.dtype == torch.bfloat16
    assert {x.dtype for x in half.backbone.state_dict().values()} == {torch.bfloat16}


def test_a_mixture_of_types_stays_one(folder):
    """Published weights are in 16 bits; the bias of the choice may be in 32."""
    tensors = load_file(folder / WEIGHTS)
    kept = {n: t if n.endswith("expert_bias") else t.bfloat16() for n, t in tensors.items()}
    save_file(kept, folder / WEIGHTS)
    model = blockdiffusion.load(folder, **GIVEN)
    gate = model.backbone.model.model.layers[1].mlp.gate
    assert model.dtype == torch.bfloat16 and gate.expert_bias.dtype == torch.float32
    assert torch.equal(gate.expert_bias, tensors["model.layers.1.mlp.gate.expert_bias"])
    ids = torch.arange(8)[None]
    assert model.denoise_logits(ids, ids).isfinite().all()


def test_a_tied_output_layer_may_be_repeated_and_must_then_be_equal(tmp_path):
    network = save_random(tmp_path, tie_word_embeddings=True)
    tensors = load_file(tmp_path / WEIGHTS)
    assert "lm_head.weight" not in tensors
    tensors["lm_head.weight"] = tensors["model.word_embeddings.weight"].clone()
    save_file(tensors, tmp_path / WEIGHTS)
    model = blockdiffusion.load(tmp_path, block_size=4, mask_id=12).backbone.model
    assert model.lm_head.weight is model.model.word_embeddings.weight
    assert torch.equal(model.lm_head.weight, network.lm_head.weight)
    tensors["lm_head.weight"][3, 3] += 1
    save_file(tensors, tmp_path / WEIGHTS)
    with pytest.raises(UserError, match=r"lm_head\.weight is not .* tie_word_embeddings"):
        blockdiffusion.load(tmp_path, block_size=4, mask_id=12)


# --- refusals

LAYER = "model.layers.1.mlp"
REFUSED = {
    "hidden_act": ("gelu", "hidden_act is 'gelu'; it must be 'silu'"),
    "score_function": ("softmax", "score_function is 'softmax'; it must be 'sigmoid'"),
    "norm_topk_prob": (False, "norm_topk_prob is False; it must be True"),
    "rope_scaling": ({"type": "yarn", "factor": 4}, "rope_scaling is .*; it must be null"),
    "rope_parameters": ({"rope_type": "linear"}, "rope_parameters is .*; it must be null"),
    "use_sliding_window": (True, "use_sliding_window is True; it must be False"),
    "norm_head": (True, "norm_head is True"),
    "router_dtype": ("bf16", "router_dtype is 'bf16'"),
    "use_rmsnorm": (False, "use_rmsnorm is False"),
    "moe_router_enable_expert_bias": (False, "moe_router_enable_expert_bias is False"),
    "embedding_dropout": (0.1, "embedding_dropout is 0.1; it must be 0"),
    "use_qk_norm": ("yes", "use_qk_norm is 'yes'; it must be true or false"),
    "num_experts": (0, "num_experts is 0; it must be at least 1"),
    "hidden_size": (2**30, "hidden_size is 1073741824; it must be at most"),
    "num_hidden_layers": (2.5, "num_hidden_layers is 2.5; it must be a whole number"),
    "head_dim": ("16", "head_dim is '16'; it must be a whole number"),
    "rope_theta": (0, "rope_theta is 0; it must be at least 1"),
    "rms_norm_eps": (-1e-6, "rms_norm_eps is -1e-06; it must be above 0"),
    "routed_scaling_factor": (0.0, "routed_scaling_factor is 0.0; it must be above 0"),
    "partial_rotary_factor": (1.5, "partial_rotary_factor is 1.5"),
    "rotary_dim": (4, "rotary_dim must be head_dim times partial_rotary_factor"),
    "num_key_value_heads": (3, "must be a multiple of num_key_value_heads"),
    "n_group": (3, "num_experts must be a multiple of n_group"),
    "topk_group": (5, "topk_group must be at most n_group"),
    "num_experts_per_tok": (5, "num_experts_per_tok must be at most"),
    "num_shared_experts": (-1, "num_shared_experts is -1; it must be at least 0"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_the_network_does_not_compute_is_refused(folder, name):
    value, message = REFUSED[name]
    change_config(folder, **{name: value})
    with pytest.raises(UserError, match=message) as caught:
        blockdiffusion.load(folder, **GIVEN)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["rope_theta", "n_group", "num_experts_per_tok", "head_dim"])
def test_a_size_that_is_left_out_has_no_default(folder, name):
    change_config(folder, **{name: None})
    with pytest.raises(UserError, match=f"{name}"):
        blockdiffusion.load(folder, **GIVEN)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(num_hidden_layers=4_000), "too few for the layers and experts"),
        (dict(num_experts=2**14), "too few for the layers and experts"),
        (dict(num_hidden_layers=9_999, num_experts=2**15), "times num_experts must be at most"),
    ],
)
def test_sizes_that_the_file_cannot_hold_are_refused_before_they_cost_anything(
    folder, changes, message
):
    change_config(folder, **changes)
    with pytest.raises(UserError, match=message):
        blockdiffusion.load(folder, **GIVEN)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop(f"{LAYER}.gate.expert_bias"), rf"lacks {LAYER}\.gate\.expert_bias"),
        (lambda t: t.update({"model.extra": torch.zeros(1)}), r"has the unexpected model\.extra"),
        (
            lambda t: t.update({f"{LAYER}.experts.3.up_proj.weight": torch.zeros(24, 47)}),
            r"experts\.3\.up_proj\.weight has shape \(24, 47\).* should have \(24, 48\)",
        ),
        (
            lambda t: t[f"{LAYER}.gate.expert_bias"].fill_(float("nan")),
            r"expert_bias holds numbers that are not finite",
        ),
        (
            lambda t: t[f"{LAYER}.experts.7.down_proj.weight"].fill_(float("inf")),
            r"experts\.7\.down_proj\.weight holds numbers that are not finite",
        ),
        (
            lambda t: t.update({f"{LAYER}.gate.expert_bias": torch.zeros(8, dtype=torch.long)}),
            r"expert_bias holds torch\.int64",
        ),
    ],
)
def test_other_tensors_than_the_networks_are_refused(folder, change, message):
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS)
    with pytest.raises(UserError, match=message):
        blockdiffusion.load(folder, **GIVEN)


def test_a_merged_checkpoint_of_the_training_code_is_refused_by_its_names(folder):
    """dFactory trains on experts in one tensor, and converts them back for publication."""
    tensors = load_file(folder / WEIGHTS)
    for kind in ("gate_proj", "up_proj", "down_proj"):
        names = [f"{LAYER}.experts.{number}.{kind}.weight" for number in range(8)]
        tensors[f"{LAYER}.experts.{kind}"] = torch.stack([tensors.pop(name) for name in names])
    save_file(tensors, folder / WEIGHTS)
    with pytest.raises(UserError, match=r"too few|lacks"):
        blockdiffusion.load(folder, **GIVEN)


# --- commands


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A published model with a tokenizer, and data prepared with it."""
    folder = tmp_path_factory.mktemp("llada2")
    network = save_random(folder / "parent", vocab_size=300)
    change_config(folder / "parent", block_size=4)
    save_bytes(folder / "parent", mask=True)
    (folder / "text.txt").write_text(TEXT)
    made = blockdiff(
        "prepare", folder / "text.txt", "--out", folder / "data", "--tokenizer",
        folder / "parent", "--seq-len", 32, "--documents", "blank-line", "--workers", 1,
    )  # fmt: skip
    assert made.returncode == 0, made.stderr
    return folder, network


def ran(*arguments):
    made = blockdiff(*arguments)
    assert made.returncode == 0, made.stderr
    assert "model of type" not in made.stderr  # a warning of transformers
    return made


def test_sampled_measured_converted_as_published(place, tmp_path):
    folder, _ = place
    assert ran("sample", folder / "parent", "--max-new-tokens", 8, "--no-eos").stdout
    converted = tmp_path / "converted"
    options = ("--out", converted, "--tokenizer", folder / "parent")
    ran("convert", folder / "parent", *options)
    for estimator in ("bernoulli", "exact", "orders"):
        found = []
        for path in (folder / "parent", converted):
            file = tmp_path / f"{path.name}-{estimator}.json"
            ran("eval", path, "--data", folder / "data", "--limit", 2, "--estimator", estimator,
                "--json", file)  # fmt: skip
            found.append(json.loads(file.read_text())["nats_per_token"])
        assert found[0] == found[1]


SAME = ("adapt.reading=same", "adapt.clean_attention=block")
SHORT = ("train.steps=2", "train.batch_size=2", "optim.warmup_steps=1", "eval.every=null")


@pytest.mark.parametrize("lora", [0, 2])
def test_adapted_from_the_published_model(place, tmp_path, lora):
    """Training starts from the published weights, those of the mask token included."""
    folder, network = place
    run = tmp_path / "run"
    options = (folder / "parent", "--data", folder / "data", "--block-size", 4, "--out", run)
    ran("adapt", *options, *SAME, *SHORT, "sample.every=null", f"adapt.lora_rank={lora}",
        "optim.lr=1e-6")  # fmt: skip
    model = blockdiffusion.load(run)
    assert isinstance(model, AdaptedModel) and model.config.reading == "same"
    assert model.config.mask_id == 257 and model.config.block_size == 4
    for name, tensor in network.state_dict().items():
        found = model.backbone.model.state_dict()[name]
        assert (found - tensor).abs().max() < 1e-4, name
    ran("compare", folder / "parent", run, "--data", folder / "data", "--limit", 2)


def test_the_cost_of_a_mixture_is_not_guessed(place, tmp_path):
    folder, _ = place
    recipe = {
        "out": str(tmp_path / "run"), "data": {"path": str(folder / "data")},
        "model": {"block_size": 4}, "train": {"steps": 2, "batch_size": 2},
        "adapt": {"parent": str(folder / "parent"), "reading": "same", "clean_attention": "block"},
    }  # fmt: skip
    (tmp_path / "recipe.yaml").write_text(json.dumps(recipe))
    made = blockdiff("estimate", tmp_path / "recipe.yaml", "--device", "h100")
    assert made.returncode == 2 and "mixtures of experts" in made.stderr


def test_another_reading_than_the_published_one_is_refused(place, tmp_path):
    folder, _ = place
    options = ("--data", folder / "data", "--block-size", 4, "--out", tmp_path / "run")
    for given, key in (((), "adapt.reading=same"), (SAME[:1], "adapt.clean_attention=block")):
        made = blockdiff("adapt", folder / "parent", *options, *given)
        assert made.returncode == 2 and f"set {key}" in made.stderr


def test_a_published_parent_is_a_block_diffusion_model(place):
    """`compare` reads it from left to right by its own conventions, not as a causal model."""
    folder, _ = place
    parent = load_parent(folder / "parent")
    assert isinstance(parent, AdaptedModel) and parent.config.clean_attention == "block"
    assert isinstance(parent.backbone.model, LLaDA2MoeModelLM)


def test_it_is_no_scorer(place):
    """A scorer is a causal model, which this network is not."""
    folder, _ = place
    made = blockdiff("generate-eval", folder / "parent", "--scorer", folder / "parent")
    assert made.returncode == 2 and made.stderr.count("\n") == 1
