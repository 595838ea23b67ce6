import json
import pickle
import re
import shutil
import time

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModel

import blockdiffusion
from blockdiffusion.checkpoints.finding import COPY_AGAIN
from blockdiffusion.checkpoints.formats import copy_weights
from blockdiffusion.checkpoints.tensors import is_finite, read_safetensors
from blockdiffusion.data.tokenizers import byte_tokenizer
from blockdiffusion.errors import UserError
from blockdiffusion.files.records import read_json
from blockdiffusion.models.transformer import BlockDiffusionConfig, BlockDiffusionModel
from tests.conftest import GOLDEN


@pytest.fixture
def copy(tmp_path):
    """A writable copy of the published-format golden directory."""
    return shutil.copytree(GOLDEN / "bd3lm-hf", tmp_path / "model")


def test_the_published_format(bd3lm):
    config = bd3lm.config
    assert (config.block_size, config.mask_id, config.vocab_size) == (4, 100, 101)
    assert bd3lm.tokenizer is None and config.bos is None and not bd3lm.training


@torch.no_grad()
def test_our_own_directories_round_trip(bd3lm, bd3lm_expected, tmp_path):
    bd3lm.save_pretrained(tmp_path / "run" / "model")
    for place in (tmp_path / "run" / "model", tmp_path / "run"):  # a run's directory works too
        again = blockdiffusion.load(place)
        clean, noisy = bd3lm_expected["x0"], bd3lm_expected["xt"]
        assert torch.equal(again.denoise_logits(noisy, clean), bd3lm.denoise_logits(noisy, clean))
        assert again.config.mask_id == 100 and again.config.block_size == 4


def test_transformers_reads_our_directories(bd3lm, tmp_path):
    bd3lm.save_pretrained(tmp_path)
    config = AutoConfig.from_pretrained(tmp_path)
    assert isinstance(config, BlockDiffusionConfig) and config.block_size == 4
    network = AutoModel.from_pretrained(tmp_path)
    again = BlockDiffusionModel(config).with_backbone(network)
    for name, tensor in bd3lm.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor)


def test_dtype_and_tokenizer(copy):
    model = blockdiffusion.load(copy, dtype=torch.float64)
    assert model.dtype == torch.float64


def change_weights(folder, change):
    state = load_file(folder / "model.safetensors")
    change(state)
    save_file(state, folder / "model.safetensors")


def test_a_missing_key_is_named(copy):
    change_weights(copy, lambda s: s.pop("backbone.blocks.1.attn_qkv.weight"))
    with pytest.raises(UserError, match=r"lacks layers\.1\.attn_qkv\.weight"):
        blockdiffusion.load(copy)


def test_an_unexpected_key_is_named(copy):
    change_weights(copy, lambda s: s.update({"backbone.extra.weight": torch.zeros(2)}))
    with pytest.raises(UserError, match=r"unexpected backbone\.extra\.weight"):
        blockdiffusion.load(copy)


def test_another_shape_is_named(copy):
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | {"cond_dim": 16}))
    with pytest.raises(UserError, match=r"has shape .* but by config\.json it should"):
        blockdiffusion.load(copy)


def test_a_truncated_file_is_reported(copy):
    weights = copy / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(UserError, match="truncated"):
        blockdiffusion.load(copy)


def test_a_pickle_is_never_opened(copy, tmp_path):
    witness = tmp_path / "witness"

    class Bomb:
        def __reduce__(self):
            return (witness.touch, ())

    (copy / "model.safetensors").unlink()
    (copy / "pytorch_model.bin").write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(UserError, match=r"pytorch_model\.bin, a pickle"):
        blockdiffusion.load(copy)
    with pytest.raises(UserError, match="pickle"):
        blockdiffusion.load(copy / "pytorch_model.bin")
    assert not witness.exists()


@pytest.mark.parametrize("text", ["{", "[1]", '{"model_type": "gpt2"}', '{"model_type": "bd3lm"}'])
def test_a_foreign_or_broken_config_is_reported(copy, text):
    (copy / "config.json").write_text(text)
    with pytest.raises(UserError, match=r"config\.json"):
        blockdiffusion.load(copy)


def test_nothing_there(tmp_path):
    with pytest.raises(UserError, match="does not exist"):
        blockdiffusion.load(tmp_path / "nowhere" / "at" / "all")
    with pytest.raises(UserError, match=r"no config\.json"):
        blockdiffusion.load(tmp_path)


@pytest.mark.parametrize("name", ["runs/dmeo", "./dmeo", "a/b/c", "../a", "/nowhere/x", "~/x"])
def test_no_hub_is_asked_for_a_path(name, tmp_path, monkeypatch):
    import huggingface_hub

    def asked(*args, **kwargs):
        raise AssertionError("the hub was asked")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", asked)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    with pytest.raises(UserError, match=f"^{re.escape(name)} does not exist") as told:
        blockdiffusion.load(name)
    here = "the folder runs is here and has no dmeo in it" in str(told.value)
    assert here == (name == "runs/dmeo")


def test_a_file_that_is_gone_is_no_traceback(copy):
    with pytest.raises(UserError, match=r"cannot read .*config\.json \(No such file"):
        read_json(copy / "gone" / "config.json", COPY_AGAIN)
    with pytest.raises(UserError, match=r"^there is no .*gone\.safetensors; copy or download"):
        read_safetensors(copy / "gone.safetensors")


def test_a_hub_id_that_cannot_be_had(monkeypatch):
    import huggingface_hub

    def unreachable(*args, **kwargs):
        raise ConnectionError("no network")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", unreachable)
    with pytest.raises(UserError, match=r"the download from the hub failed \(ConnectionError\)"):
        blockdiffusion.load("someone/some-model")


def test_a_hub_id_loads_from_the_snapshot(monkeypatch):
    import huggingface_hub

    asked = []

    def snapshot(hub_id, allow_patterns):
        asked.append(hub_id)
        return str(GOLDEN / "bd3lm-hf")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    assert blockdiffusion.load("someone/some-model").config.block_size == 4
    assert asked == ["someone/some-model"]


def test_a_hub_id_with_weights_in_several_files(monkeypatch, tmp_path):
    """All large models have several. The snapshot holds what the patterns let through."""
    import huggingface_hub

    from tests.models.hugging_face import make_causal_lm

    make_causal_lm("llama").float().save_pretrained(tmp_path / "hub", max_shard_size="4KB")
    assert len(list((tmp_path / "hub").glob("*.safetensors"))) > 1

    def snapshot(hub_id, allow_patterns):
        folder = tmp_path / "snapshot"
        folder.mkdir(exist_ok=True)
        for pattern in allow_patterns:
            for file in (tmp_path / "hub").glob(pattern):
                shutil.copy(file, folder)
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    assert blockdiffusion.load("someone/large", 4, 12).config.block_size == 4
    (gone, *_) = (tmp_path / "hub").glob("*.safetensors")
    gone.unlink()
    shutil.rmtree(tmp_path / "snapshot")
    with pytest.raises(UserError, match=rf"names '{gone.name}' for weights, which is no file"):
        blockdiffusion.load("someone/large", 4, 12)


@torch.no_grad()
def test_an_autoregressive_model_round_trips(make_ar, random_ids, tmp_path):
    model, ids = make_ar(), random_ids(2, 16)
    model.save_pretrained(tmp_path)
    again = blockdiffusion.load(tmp_path)
    assert (again.config.objective, again.backbone.config.adaln, again.config.block_size) == (
        "autoregressive",
        False,
        1,
    )
    assert torch.equal(again.encode_causal(ids), model.encode_causal(ids))


# --- weights of another model ------------------------------------------------------------------


@torch.no_grad()
def test_weights_go_to_another_block_size_length_and_dropout(make_model, tmp_path):
    source = make_model()
    source.save_pretrained(tmp_path)
    config = BlockDiffusionConfig(
        vocab_size=13,
        seq_len=32,
        block_size=16,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        cond_dim=8,
    )
    model = BlockDiffusionModel(config)
    copy_weights(tmp_path, model)
    for name, parameter in source.backbone.named_parameters():
        assert torch.equal(model.backbone.get_parameter(name), parameter.float())
    assert (model.config.block_size, model.backbone.config.dropout, model.dtype) == (
        16,
        0.1,
        torch.float32,
    )


def test_weights_come_from_the_published_format_too(bd3lm):
    model = BlockDiffusionModel(
        BlockDiffusionConfig(**bd3lm.full_config().to_dict() | {"block_size": 8})
    )
    copy_weights(GOLDEN / "bd3lm-hf", model)
    assert torch.equal(model.output.weight, bd3lm.output.weight)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (dict(hidden_size=32), "hidden_size is 16 there and 32 here"),
        (
            dict(num_hidden_layers=3, num_attention_heads=4),
            "num_hidden_layers is 2 there and 3 here",
        ),
        (dict(num_attention_heads=4), "num_attention_heads is 2 there and 4 here"),
        (dict(cond_dim=4), "cond_dim is 8 there and 4 here"),
        (dict(vocab_size=14), "vocab_size is 13 there and 14 here"),
        (dict(mask_id=3), "mask_id is 12 there and 3 here"),
        (dict(clean_attention="causal"), "clean_attention is block there and causal here"),
        (dict(objective="autoregressive", block_size=1), "objective is block_diffusion there"),
    ],
)
def test_weights_of_another_network_are_refused(make_model, tmp_path, overrides, message):
    make_model().save_pretrained(tmp_path)
    other = make_model(**overrides)
    before = other.output.weight.clone()
    with pytest.raises(UserError, match=message):
        copy_weights(tmp_path, other)
    assert torch.equal(other.output.weight, before)


def test_weights_of_another_tokenizer_are_refused(make_model, tmp_path):
    model = make_model(vocab_size=258)
    model.save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    model.tokenizer = byte_tokenizer()
    copy_weights(tmp_path, model)
    model.tokenizer.add_tokens(["new"])
    with pytest.raises(UserError, match="trained with another tokenizer"):
        copy_weights(tmp_path, model)


# --- sizes and numbers, before anything is built -------------------------------------------------


@pytest.fixture
def ours(make_model, tmp_path):
    """A small model in our own format."""
    make_model().float().save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("num_hidden_layers", 10**12, "num_hidden_layers is 1000000000000; it must be at most"),
        ("num_hidden_layers", 9_999, r"lacks layers\.\d"),
        ("hidden_size", 131_072, "has shape"),
        ("vocab_size", 2**24, "has shape"),
        ("vocab_size", "abc", "vocab_size is 'abc'; it must be a whole number"),
        ("vocab_size", None, "vocab_size is null"),
        ("hidden_size", 0.5, r"hidden_size is 0\.5; it must be a whole number"),
        ("seq_len", -1, "seq_len is -1; it must be at least 1"),
        ("cond_dim", 10**30, "cond_dim is 10*; it must be at most"),
        ("mask_id", 99_999, "mask_id 99999 lies outside the vocabulary"),
        ("eos_id", 99_999, "eos_id 99999 lies outside the vocabulary"),
        ("bos_id", -1, "bos_id is -1; it must be at least 0"),
        ("dropout", [], r"dropout is \[\]; it must be a number"),
        ("objective", {}, r"objective is \{\}; it must be a text"),
        ("model_type", ["x"] * 10**6, r"has model_type \['x', 'x'"),
    ],
)
def test_a_configuration_is_compared_with_the_weights_first(ours, name, value, message):
    folder = ours
    raw = json.loads((folder / "config.json").read_text())
    assert name in raw
    (folder / "config.json").write_text(json.dumps(raw | {name: value}))
    began = time.process_time()
    with pytest.raises(UserError, match=message) as told:
        blockdiffusion.load(folder)
    assert time.process_time() - began < 5 and len(str(told.value)) < 500


def test_what_transformers_adds_to_a_configuration_is_not_read(ours):
    folder = ours
    raw = json.loads((folder / "config.json").read_text())
    more = {"num_labels": 10**12, "id2label": 5, "auto_map": 1, "torch_dtype": [1]}
    (folder / "config.json").write_text(json.dumps(raw | more))
    assert blockdiffusion.load(folder).config.vocab_size == raw["vocab_size"]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_weights_that_are_not_finite_are_named(ours, value, dtype):
    folder = ours
    tensors = {n: t.to(dtype) for n, t in load_file(folder / "model.safetensors").items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    blockdiffusion.load(folder)
    name = sorted(tensors)[-1]
    tensors[name].view(-1)[-1] = value
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=f"{re.escape(name)} holds numbers that are not finite"):
        blockdiffusion.load(folder)


def test_large_numbers_are_finite():
    largest = torch.full((100,), torch.finfo(torch.float16).max, dtype=torch.float16)
    assert is_finite(largest) and is_finite(torch.full((100,), 3e38)) and is_finite(torch.zeros(0))
    assert not is_finite(torch.tensor([torch.inf, -torch.inf, 0]))
