"""The authors' Lightning files: golden ones, and files with everything that real ones hold."""

import json
import os
from collections import OrderedDict

import pytest
import torch
from safetensors.torch import load_file

import blockdiffusion
from blockdiffusion.checkpoints.formats import copy_weights, find_model
from blockdiffusion.checkpoints.lightning import LightningOptions, read_lightning
from blockdiffusion.data.tokenizers import byte_tokenizer
from blockdiffusion.diffusion.denoiser import causal_nll, masked_nll
from blockdiffusion.diffusion.estimators import Corrupted
from blockdiffusion.diffusion.objectives import diffusion_of
from blockdiffusion.diffusion.schedules import noise_level
from blockdiffusion.errors import UserError
from blockdiffusion.models.transformer import BlockDiffusionConfig, BlockDiffusionModel
from tests.checkpoints.lightning_files import lightning, save_with_settings, settings
from tests.checkpoints.test_unpickling import Calls
from tests.conftest import GOLDEN
from tests.noise_oracles import log_score

TOLERANCE = 1e-4  # of the golden arrays


# --- golden files -------------------------------------------------------------------------------


def golden(kind, **options):
    """The model of a golden file, which says nothing but its tensors, and its arrays."""
    folder = GOLDEN / f"{kind}-lightning"
    sizes = json.loads((folder / "arch.json").read_text())
    found = find_model(
        folder / "last.ckpt", LightningOptions(kind=kind, seq_len=sizes["length"], **options)
    )
    config = found.config
    assert (config.hidden_size, config.num_hidden_layers, config.num_attention_heads) == (64, 2, 4)
    assert (config.vocab_size, config.mask_id) == (101, sizes["mask_index"])
    assert (config.block_size, config.seq_len) == (sizes["block_size"], sizes["length"])
    return found.model, load_file(folder / "expected.safetensors")


def far(ours, theirs):
    return (ours - theirs).abs().max() > TOLERANCE


@torch.no_grad()
def test_golden_mdlm_logits_and_loss():
    model, expected = golden("mdlm")
    noisy, clean = expected["xt"], expected["x0"]
    assert not far(model.denoise_logits(noisy), expected["logits"])
    loss = masked_nll(model, noisy[:, None], clean, (noisy == 100)[:, None])[:, 0] / expected["t"]
    assert not far(loss, expected["loss_per_token"])
    trained, _ = golden("mdlm", weights="raw")  # differ on purpose
    assert far(trained.denoise_logits(noisy), expected["logits"])


@torch.no_grad()
def test_golden_sedd_logits_scores_and_loss():
    model, expected = golden("sedd")
    assert model.config.time_conditioning and model.config.objective == "score_entropy"
    clean, noisy, t, sigma = (expected[name] for name in ("x0", "xt", "t", "sigma"))
    assert torch.allclose(noise_level(t[:, :1]), sigma)
    logits = model.denoise_logits(noisy, sigma=sigma[:, 0])
    assert not far(logits, expected["logits"])
    assert far(model.denoise_logits(noisy, sigma=sigma[:, 0] + 1), expected["logits"])
    score = log_score(logits.flatten(0, 1), noisy.flatten(), sigma.expand_as(noisy).flatten())
    assert not far(score.view_as(logits), expected["log_score"])
    drawn = Corrupted(noisy[:, None], torch.ones(3, 1, 32), (noisy == 100)[:, None], t[:, None, :1])
    loss = diffusion_of(model.config).terms(model, drawn, clean)[:, 0] / t
    assert not far(loss, expected["loss_per_token"])
    assert torch.equal(loss == 0, noisy != 100)


def test_the_end_of_a_sedd_networks_noise(tmp_path):
    """As the option says, or the authors' flag; 0 where neither does."""
    golden_file = GOLDEN / "sedd-lightning" / "last.ckpt"
    for eps in (None, 1e-3):
        options = LightningOptions(kind="sedd", seq_len=32, noise_eps=eps)
        assert find_model(golden_file, options).config.noise_eps == (eps or 0)
    config = BlockDiffusionConfig(
        vocab_size=11, seq_len=16, block_size=16, hidden_size=16, num_hidden_layers=1,
        num_attention_heads=2, cond_dim=8,
        objective="score_entropy", time_conditioning=True,
    )  # fmt: skip
    model = BlockDiffusionModel(config)
    said = settings("sedd", model)
    said["algo"]["mdlm_loss_scale"] = True
    save_with_settings(tmp_path / "last.ckpt", lightning(model), said, None)
    assert find_model(tmp_path / "last.ckpt").config.noise_eps == 1e-3


@torch.no_grad()
def test_golden_ar_logits_and_loss():
    model, expected = golden("ar")
    clean = expected["x0"]
    assert model.config.objective == "autoregressive" and model.config.bos
    assert not far(model.head(model.encode_causal(clean[:, :-1])), expected["logits"])
    free = torch.ones_like(clean, dtype=torch.bool)
    free[:, 0] = False
    assert not far(causal_nll(model, clean, free)[:, 1:], expected["loss_per_token"])


def test_what_a_golden_file_does_not_say_is_asked_for():
    path = GOLDEN / "mdlm-lightning" / "last.ckpt"
    with pytest.raises(UserError, match=r"kind and seq_len are; run blockdiff convert .*--kind"):
        blockdiffusion.load(path)
    with pytest.raises(UserError, match=r"say what its seq_len is; .* --seq-len \.\.\.$"):
        find_model(GOLDEN / "ar-lightning" / "last.ckpt")  # only AR has no time embedding
    with pytest.raises(UserError, match=r"its seq_len is; .* --seq-len \.\.\.$"):
        find_model(path, LightningOptions(kind="mdlm"))
    with pytest.raises(UserError, match=r"its block_size is; .* --block-size \.\.\.$"):
        find_model(path, LightningOptions(kind="bd3lm", seq_len=32))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(kind="ar"), "has a time embedding.*one of mdlm, sedd, bd3lm"),
        (dict(kind="mdlm", block_size=4), "block_size is 32 by its kind and 4 by --block-size"),
        (
            dict(kind="mdlm", num_attention_heads=8),
            "num_attention_heads is 4 by its tensors and 8 by --num-attention-heads",
        ),
        (dict(kind="bd3lm", block_size=5), "not a multiple of the block size"),
        (dict(kind="mdlm", mask_id=101), "outside the vocabulary"),
    ],
)
def test_options_must_not_contradict_a_file(options, message):
    with pytest.raises(UserError, match=message):
        find_model(GOLDEN / "mdlm-lightning" / "last.ckpt", LightningOptions(seq_len=32, **options))


@pytest.mark.parametrize(
    "options",
    [dict(weights="best"), dict(kind="dit"), dict(seq_len=0), dict(num_attention_heads=-1)],
)
def test_impossible_options_are_refused(options):
    with pytest.raises(UserError, match="--"):
        LightningOptions(**options)


# --- files like the real ones --------------------------------------------------------------------

KINDS = {
    "mdlm": dict(block_size=16),
    "bd3lm": dict(block_size=4),
    "sedd": dict(block_size=16, time_conditioning=True),
    "ar": dict(block_size=1, objective="autoregressive", adaln=False, cond_dim=128),
}


@pytest.fixture
def model(make_model):
    return make_model().float()


def equal_weights(one, other):
    theirs = dict(other.named_parameters())
    return all(torch.equal(p.float(), theirs[name].float()) for name, p in one.named_parameters())


@pytest.mark.parametrize("kind", KINDS)
def test_a_whole_file_needs_no_options(make_model, tmp_path, kind):
    """Sizes come out of the omegaconf configuration, whose classes are gone."""
    model = make_model(vocab_size=258, **KINDS[kind]).float()
    path = tmp_path / "last.ckpt"
    save_with_settings(path, lightning(model), settings(kind, model), byte_tokenizer())
    again = blockdiffusion.load(path)
    assert equal_weights(model, again) and not again.training
    config, expected = again.full_config(), model.full_config()
    for name in (
        "seq_len",
        "block_size",
        "num_attention_heads",
        "cond_dim",
        "adaln",
        "time_conditioning",
    ):
        assert getattr(config, name) == getattr(expected, name), name
    assert config.bos is True and config.dropout == 0.25
    read = read_lightning(path)
    assert (read.kind, read.steps, read.weights) == (kind, 77, "ema")
    assert read.tokenizer == byte_tokenizer().backend_tokenizer.to_str()


def test_raw_weights_are_the_state_dict(model, tmp_path):
    path = tmp_path / "last.ckpt"
    save_with_settings(path, lightning(model), settings("bd3lm", model), None)
    raw = find_model(path, LightningOptions(weights="raw")).model
    for name, parameter in model.backbone.named_parameters():
        assert torch.equal(raw.backbone.get_parameter(name), parameter + 1)


def test_names_of_a_compiled_network_are_understood(model, tmp_path):
    content = lightning(model)
    content["state_dict"] = OrderedDict(
        (name.replace("backbone.", "backbone._orig_mod."), t)
        for name, t in content["state_dict"].items()
    )
    path = tmp_path / "last.ckpt"
    save_with_settings(path, content, settings("bd3lm", model), None)
    assert equal_weights(model, blockdiffusion.load(path))


def test_code_in_a_file_never_runs(model, tmp_path):
    witness = tmp_path / "witness"
    bomb = Calls(os.system, f"touch {witness}")
    path = tmp_path / "last.ckpt"
    content = lightning(model, callbacks={"a": bomb}, lr_schedulers=[bomb])
    save_with_settings(path, content, settings("bd3lm", model), bomb)
    assert equal_weights(model, blockdiffusion.load(path)) and not witness.exists()
    content["state_dict"]["backbone.blocks.0.norm1.weight"] = bomb
    save_with_settings(path, content, settings("bd3lm", model), bomb)
    with pytest.raises(UserError, match=r"norm1\.weight' in its state_dict is no tensor"):
        blockdiffusion.load(path)
    assert not witness.exists()


def test_a_configuration_that_contains_itself_is_no_trap(model, tmp_path):
    loop = {"algo": {"name": "${block_size}"}, "block_size": "${algo.name}"}
    loop["model"] = loop
    content = lightning(model, hyper_parameters={"config": loop})
    torch.save(content, tmp_path / "last.ckpt")
    with pytest.raises(UserError, match="does not say what its kind and seq_len are"):
        blockdiffusion.load(tmp_path / "last.ckpt")


@pytest.mark.parametrize("nonsense", ["${eval:8}", 3.5, [8], {"a": 8}, True, "long", None])
def test_values_of_another_type_are_not_settings(model, tmp_path, nonsense):
    path, said = tmp_path / "last.ckpt", settings("bd3lm", model)
    said["model"] |= {"length": nonsense, "n_heads": nonsense, "dropout": "much"}
    save_with_settings(path, lightning(model), said, Calls(str, nonsense))
    with pytest.raises(UserError, match="does not say what its seq_len is"):
        blockdiffusion.load(path)
    found = find_model(path, LightningOptions(seq_len=16))
    assert (found.config.num_attention_heads, found.config.dropout) == (2, 0.1)


def test_plain_dictionaries_are_settings_too(model, tmp_path):
    content = lightning(model, hyper_parameters={"config": settings("bd3lm", model)})
    torch.save(content, tmp_path / "last.ckpt")
    assert blockdiffusion.load(tmp_path / "last.ckpt").config.block_size == 4


def change(content, how):
    names, averages = list(content["state_dict"]), content["ema"]["shadow_params"]
    if how == "short":
        averages.pop()
    elif how == "long":
        averages.append(averages[0])
    elif how == "order":
        averages.reverse()
    elif how == "no ema":
        content["ema"] = None
    elif how == "no tensors":
        del content["state_dict"]
    elif how == "missing":  # in both, as where a layer was lost
        at = names.index("backbone.blocks.0.mlp.0.weight")
        del content["state_dict"][names[at]], averages[at]
    elif how == "unexpected":
        content["state_dict"]["backbone.extra"] = torch.ones(1)
        averages.append(torch.ones(1))
    elif how == "lost layer":
        content["state_dict"] = OrderedDict(
            (name.replace("blocks.1", "blocks.7"), t) for name, t in content["state_dict"].items()
        )
    elif how == "integers":
        averages[:] = [t.long() for t in averages]
    elif how == "misshapen":
        at = names.index("backbone.output_layer.linear.bias")
        content["state_dict"][names[at]] = averages[at] = torch.ones(3)
    elif how == "other network":
        content["state_dict"] = {"weight": torch.ones(1)}
        content["ema"]["shadow_params"] = [torch.ones(1)]


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("short", r"average has 29 tensors, but its state_dict has 30 parameters.*--weights raw"),
        ("long", "average has 31 tensors"),
        ("order", r"moving average of .* has shape .*--weights raw"),
        ("no ema", r"no moving average .*--weights raw"),
        ("no tensors", "no state_dict, so it is no Lightning checkpoint"),
        ("missing", r"lacks layers\.0\.mlp_in\.weight"),
        ("unexpected", r"unexpected backbone\.extra"),
        ("misshapen", r"output\.bias has shape \(3,\), but by its own sizes it should"),
        ("lost layer", r"lacks backbone\.blocks\.1"),
        ("integers", r"holds torch\.int64, which no weights are in"),
        ("other network", "no checkpoint of the authors' transformer"),
    ],
)
def test_tensors_that_do_not_fit_are_named(model, tmp_path, how, message):
    content = lightning(model)
    change(content, how)
    path = tmp_path / "last.ckpt"
    save_with_settings(path, content, settings("bd3lm", model), None)
    with pytest.raises(UserError, match=message) as caught:
        blockdiffusion.load(path)
    assert "last.ckpt" in str(caught.value)
    if "raw" in message:
        assert find_model(path, LightningOptions(weights="raw")).config.hidden_size == 16


def test_unreadable_kinds_and_contradictions_are_refused(model, tmp_path):
    path = tmp_path / "last.ckpt"
    said = settings("bd3lm", model)
    said["algo"]["name"] = "d3pm"
    save_with_settings(path, lightning(model), said, None)
    with pytest.raises(UserError, match="trained as 'd3pm'; readable are mdlm, sedd, ar, bd3lm"):
        blockdiffusion.load(path)
    said = settings("bd3lm", model)
    said["model"]["n_heads"] = 4
    save_with_settings(path, lightning(model), said, None)
    with pytest.raises(
        UserError, match="num_attention_heads is 2 by its tensors and 4 by its configuration"
    ):
        blockdiffusion.load(path)


def test_a_bert_has_its_own_mask(model, make_model, tmp_path):
    """Its id is in the tokenizer; without it the last id would be a silent mistake."""
    path = tmp_path / "last.ckpt"
    said = settings("bd3lm", model)
    said["data"]["tokenizer_name_or_path"] = "bert-base-uncased"
    save_with_settings(path, lightning(model), said, None)
    with pytest.raises(UserError, match=r"its mask_id is; .*--mask-id"):
        blockdiffusion.load(path)
    assert find_model(path, LightningOptions(mask_id=3)).config.mask_id == 3
    larger = make_model(vocab_size=300)
    save_with_settings(path, lightning(larger), said, byte_tokenizer())
    assert blockdiffusion.load(path).config.mask_id == 257


def test_a_directory_of_checkpoints_names_the_file(model, tmp_path):
    torch.save(lightning(model), tmp_path / "last.ckpt")
    with pytest.raises(UserError, match=r"give the file itself, such as .*last\.ckpt"):
        blockdiffusion.load(tmp_path)


# --- starting from one ---------------------------------------------------------------------------


def test_a_bd3lm_starts_from_an_mdlm(make_model, tmp_path):
    """Both are modulated by the embedding of sigma = 0, so the weights mean the same."""
    source = make_model(block_size=16).float()
    path = tmp_path / "last.ckpt"
    save_with_settings(path, lightning(source), settings("mdlm", source), None)
    fine = make_model(block_size=4, bos=True).float()
    copy_weights(path, fine)
    assert equal_weights(source, fine) and fine.config.block_size == 4


def test_a_bd3lm_does_not_start_from_sedd_or_ar(make_model, tmp_path):
    path = tmp_path / "last.ckpt"
    for kind in ("sedd", "ar"):
        source = make_model(**KINDS[kind]).float()
        save_with_settings(path, lightning(source), settings(kind, source), None)
        with pytest.raises(UserError, match=r"cannot be taken over: (objective|time_cond)"):
            copy_weights(path, make_model(block_size=4))


@pytest.mark.parametrize("given", [True, False])
def test_weights_of_another_bos_convention_are_refused(make_model, tmp_path, given):
    make_model(bos=given).save_pretrained(tmp_path)
    option = "--row-bos" if given else "--no-row-bos"
    with pytest.raises(UserError, match=f"prepare the data with {option}"):
        copy_weights(tmp_path, make_model(bos=not given))
    for agrees in (given, None):
        copy_weights(tmp_path, make_model(bos=agrees))
