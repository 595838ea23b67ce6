"""A causal model becomes a block diffusion model: it starts as the parent, its files are read."""

import json
import shutil
from dataclasses import replace

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

import blockdiffusion
from blockdiffusion.data.loader import Batch, TokenRows
from blockdiffusion.data.options import PrepareOptions
from blockdiffusion.data.packing import prepare
from blockdiffusion.data.tokenizers import byte_tokenizer
from blockdiffusion.diffusion.denoiser import masked_nll
from blockdiffusion.diffusion.estimators import Corrupted
from blockdiffusion.errors import UserError
from blockdiffusion.estimate.run import estimate_recipe
from blockdiffusion.estimate.sizes import NetworkSizes
from blockdiffusion.models.causal_lm import CausalLM
from blockdiffusion.runtime.hardware import find_hardware
from blockdiffusion.train.adapt import adapted_for
from blockdiffusion.train.loss import DiffusionLoss
from blockdiffusion.train.recipe import recipe_of
from blockdiffusion.train.run import run_training
from tests.command import blockdiff
from tests.models.hugging_face import make_causal_lm, make_hugging_face
from tests.tiny import TEXT

L = 32


def save_parent(folder, family="llama", **sizes):
    """A model over the bytes and <|endoftext|>, whose tokenizer has no mask token."""
    network = make_causal_lm(family, 257, **sizes).float()
    network.save_pretrained(folder)
    save_bytes(folder)
    return network


def save_bytes(folder, mask=False):
    """The tokenizer over the bytes and <|endoftext|>, with a mask token or without."""
    state = json.loads(byte_tokenizer().backend_tokenizer.to_str())
    if not mask:
        state["added_tokens"] = [t for t in state["added_tokens"] if t["content"] != "<|mask|>"]
    path = folder / "tokenizer.json"
    path.write_text(json.dumps(state))
    special = {"eos_token": "<|endoftext|>"} | ({"mask_token": "<|mask|>"} if mask else {})
    PreTrainedTokenizerFast(tokenizer_file=str(path), **special).save_pretrained(folder)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("adapt")
    save_parent(folder / "parent")
    (folder / "text.txt").write_text(TEXT)
    options = dict(seq_len=L, documents="blank-line", row_bos=False, num_workers=1)
    for name, tokenizer in (("data", str(folder / "parent")), ("other", "bpe:280")):
        prepare(
            [str(folder / "text.txt")],
            folder / name,
            PrepareOptions(tokenizer=tokenizer, **options),
        )
    return folder


@pytest.fixture
def recipe(place, tmp_path):
    def make(*overrides):
        return recipe_of([
            f"adapt.parent={place / 'parent'}", f"data.path={place / 'data'}",
            f"out={tmp_path / 'run'}", "train.steps=4", "train.batch_size=4", "train.threads=1",
            "optim.warmup_steps=1", "eval.every=null", "sample.every=null", *overrides,
        ])  # fmt: skip

    return make


def rows_of(recipe):
    return TokenRows(recipe.data.path, "train")


def adapt(recipe):
    return adapted_for(recipe, rows_of(recipe).manifest).eval()


@torch.no_grad()
@pytest.mark.parametrize("reading", ["next", "shifted"])
def test_before_training_the_autoregressive_reading_is_the_parent(recipe, place, reading):
    """Blocks of one token, and larger ones that are causal inside and read from left to right. The
    first token follows the start symbol, which the shifted reading needs in the row."""
    made = recipe("adapt.block_attention=causal", f"adapt.reading={reading}")
    model, ids = adapt(made), torch.as_tensor(rows_of(made).rows(range(6)).ids_BL)
    parent = AutoModelForCausalLM.from_pretrained(place / "parent").eval()
    started = reading == "shifted"
    if started:
        ids[:, 0] = 256
    read = ids if started else torch.cat([torch.full((6, 1), 256), ids[:, :-1]], 1)
    logits = parent(read).logits[:, : L - started].transpose(1, 2)
    nll = torch.nn.functional.cross_entropy(logits, ids[:, started:])
    small = model.with_block_size(1)
    found = blockdiffusion.likelihood(small, ids, estimator="exact", bos=started)
    assert not found.is_bound and found.nats_per_token == pytest.approx(float(nll), abs=1e-5)
    # All tokens left to right within a block of four: what a causal block gives in one pass.
    columns = torch.arange(L) % 4
    total = torch.zeros(6, L)
    for first in range(4):
        scored = (columns == first).expand(6, 1, L)
        noisy = ids[:, None].masked_fill((columns >= first).expand(6, 1, L), model.config.mask_id)
        total += masked_nll(model, noisy, ids, scored)[:, 0]
    assert float(total[:, started:].mean()) == pytest.approx(float(nll), abs=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("reading", ["next", "shifted"])
def test_left_to_right_greedy_samples_are_those_of_the_parent(recipe, place, reading):
    model = adapt(recipe("adapt.block_attention=causal", f"adapt.reading={reading}"))
    parent = AutoModelForCausalLM.from_pretrained(place / "parent").eval()
    prompt = [84, 104, 101, 32, 99]
    start = [] if reading == "shifted" else [model.config.start_id]
    expected = parent.generate(
        torch.tensor([start + prompt]), max_new_tokens=11, do_sample=False, eos_token_id=None
    )
    made = blockdiffusion.generate(
        model, [prompt], max_new_tokens=11, sampler="leftmost", top_k=1, eos=False, bos=False
    )
    assert made.sequences[0].tolist() == expected[0, len(start) :].tolist()


def test_the_mask_token_starts_as_the_mean_or_as_a_copy(recipe, place):
    parent = AutoModelForCausalLM.from_pretrained(place / "parent")
    table, head = parent.get_input_embeddings().weight, parent.get_output_embeddings().weight
    for mask, row, of_head in (
        ("mean", table.mean(0), head.mean(0)),
        ("<|endoftext|>", table[256], head[256]),
    ):
        network = adapt(recipe(f"adapt.mask={mask}")).backbone.model
        for after, before, started in (
            (network.get_input_embeddings().weight, table, row),
            (network.get_output_embeddings().weight, head, of_head),
        ):
            assert after.shape[0] == 258 and torch.equal(after[:257], before)
            assert torch.allclose(after[257], started, atol=1e-6)


def test_rows_of_padding_hold_the_mask(tmp_path, recipe, place):
    """A vocabulary that was padded has room for it; nothing else changes."""
    network = save_parent(tmp_path / "padded")
    network.resize_token_embeddings(264, mean_resizing=False)
    network.save_pretrained(tmp_path / "padded")
    model = adapt(recipe(f"adapt.parent={tmp_path / 'padded'}"))
    assert model.config.vocab_size == 264 and model.config.mask_id == 257
    table = network.get_input_embeddings().weight
    found = model.backbone.model.get_input_embeddings().weight
    assert torch.allclose(found[257], table[:257].mean(0), atol=1e-6)
    assert torch.equal(found[258:], table[258:])


@pytest.mark.parametrize(
    ("family", "reading"), [("llama", "next"), ("gemma2", "next"), ("llama", "shifted")]
)
def test_the_next_token_loss_of_the_same_pass(family, reading, random_ids):
    """The loss is that of the diffusion plus the weighted one of the clean stream, as gradients."""
    options = dict(reading=reading, clean_attention="causal", start_id=3)
    clean = random_ids(2, 16)
    scored = torch.rand(2, 2, 16, generator=torch.Generator().manual_seed(1)) < 0.5
    weight = scored.double() * torch.rand(2, 2, 16, generator=torch.Generator().manual_seed(2))
    noisy = clean[:, None].expand(2, 2, 16).masked_fill(scored, 12)
    free = torch.ones(2, 16, dtype=torch.bool)
    free[0, 0] = False
    if reading == "shifted":
        free[1, 0] = False
    batch = Batch(clean)
    gradients = []
    for joint in (True, False):
        model = make_hugging_face(family, **options)
        ar_weight = 0.7 * free if joint else None
        loss = DiffusionLoss(batch, Corrupted(noisy, weight, scored), ar_weight)
        nats = loss.nats(model, slice(0, 2))
        if not joint:
            small = model.with_block_size(1)
            all_masked = torch.full_like(clean, 12)[:, None]
            nats = nats + 0.7 * masked_nll(small, all_masked, clean, free[:, None]).sum()
        else:
            assert loss.num_scored == int(scored.sum()) + int(free.sum())
        nats.backward()
        gradients.append([float(nats), *(p.grad for p in model.parameters())])
    assert gradients[0][0] == pytest.approx(gradients[1][0], rel=1e-5)
    for one, two in zip(gradients[0][1:], gradients[1][1:], strict=True):
        assert torch.allclose(one, two, atol=1e-4)


def test_a_run_resumes_bit_for_bit_and_is_read_by_everyone(recipe, tmp_path):
    """With the next-token loss; then another run starts from it with larger blocks."""
    whole = recipe("objective.ar_loss=0.5", "checkpoint.every=2", "eval.every=4", "eval.rows=4")
    run_training(whole)
    resumed = replace(whole, out=str(tmp_path / "again"))
    run_training(replace(resumed, train=replace(whole.train, steps=2)))
    run_training(replace(resumed, optim=replace(whole.optim, schedule="constant")), resume=True)
    folders = [tmp_path / name / "model" for name in ("run", "again")]
    one, two = map(blockdiffusion.load, folders)
    assert isinstance(one.backbone, CausalLM) and one.config == two.config
    for name, tensor in one.state_dict().items():
        assert torch.equal(tensor, two.state_dict()[name]), name
    ids = torch.as_tensor(rows_of(whole).rows(range(2)).ids_BL)
    plain = AutoModelForCausalLM.from_pretrained(folders[0]).eval()
    read = torch.cat([torch.full((2, 1), 256), ids[:, :-1]], 1)
    with torch.no_grad():
        logits = plain(read).logits
        found = one.with_block_size(1).denoise_logits(torch.full_like(ids, 257), ids)
    assert torch.allclose(logits, found, atol=1e-5)
    assert '"parent": "parent"' in (folders[0] / "README.md").read_text()
    larger = recipe(
        f"adapt.parent={folders[0]}", f"out={tmp_path / 'larger'}", "model.block_size=8"
    )
    run_training(larger)
    assert blockdiffusion.load(tmp_path / "larger").config.block_size == 8
    with pytest.raises(UserError, match=r"adapt\.reading is same, but .* was trained with 'next'"):
        adapt(recipe(f"adapt.parent={folders[0]}", "adapt.reading=same"))


def test_the_shifted_reading_is_trained_saved_and_read(recipe, tmp_path, monkeypatch):
    """With the next-token loss, which no clean token has for a row's first one."""
    weights = []
    nats = DiffusionLoss.nats
    monkeypatch.setattr(
        DiffusionLoss, "nats", lambda *given: weights.append(given[0].ar_weight_BL) or nats(*given)
    )
    run_training(recipe("adapt.reading=shifted", "objective.ar_loss=0.5"))
    assert len(weights) == 4
    for weight_BL in weights:
        assert (weight_BL[:, 0] == 0).all() and (weight_BL[:, 1:] > 0).any()
    model = blockdiffusion.load(tmp_path / "run")
    assert model.config.reading == "shifted" and model.config.start_id is None
    made = blockdiffusion.generate(model, "The", max_new_tokens=6, seed=1)
    slow = blockdiffusion.generate(model, "The", max_new_tokens=6, seed=1, use_cache=False)
    assert torch.equal(made.sequences, slow.sequences)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["objective.name=ar"], "objective.name is ar, but adapt.parent is given"),
        (["objective.name=sedd"], "set objective.name=bd3lm"),
        (["model.hidden_size=48"], "model.hidden_size is 48, but the network is that of adapt"),
        (["adapt.parent=null", "adapt.reading=same"], "adapt.reading is same, but adapt.parent is"),
        (["adapt.mask=<nothing>"], "adapt.mask is '<nothing>', which is no token of"),
        (["model.block_size=5"], "does not divide the 32 tokens"),
        (["adapt.reading=same", "objective.ar_loss=1"], "its clean stream predicts no next token"),
        (["adapt.clean_attention=block", "objective.ar_loss=1"], "set objective.ar_loss=0"),
        (["objective.ar_loss=-1"], "objective.ar_loss is -1"),
    ],
)
def test_mistakes_are_one_sentence(recipe, overrides, message):
    with pytest.raises(UserError, match=message):
        run_training(recipe(*overrides))


def test_parents_that_do_not_fit(recipe, place, tmp_path, make_model):
    with pytest.raises(UserError, match=r"another tokenizer than that of .*--tokenizer"):
        adapt(recipe(f"data.path={place / 'other'}"))
    make_model().save_pretrained(tmp_path / "ours")
    with pytest.raises(UserError, match="model_type is 'blockdiffusion'; give a causal"):
        adapt(recipe(f"adapt.parent={tmp_path / 'ours'}"))
    with pytest.raises(UserError, match="does not exist"):
        adapt(recipe("adapt.parent=./nowhere"))


def test_a_next_token_loss_needs_a_clean_stream_that_predicts(tmp_path, place):
    own = recipe_of([
        f"data.path={place / 'data'}", f"out={tmp_path / 'run'}", "train.steps=1",
        "train.batch_size=2", "objective.ar_loss=1", "model.num_hidden_layers=1",
        "model.hidden_size=8", "model.num_attention_heads=1",
    ])  # fmt: skip
    with pytest.raises(UserError, match=r"objective\.ar_loss=0"):
        run_training(own)


def test_the_command(place, tmp_path):
    data, out = place / "data", tmp_path / "run"
    arguments = ("adapt", place / "parent", "--data", data, "--block-size", 4, "--out", out)
    run = blockdiff(*arguments, "--steps", 2, "train.batch_size=2", "train.threads=1")
    assert run.returncode == 0, run.stderr
    assert blockdiffusion.load(out).config.block_size == 4
    again = blockdiff(*arguments, "--steps", 2)
    assert again.returncode == 2 and "already holds a run" in again.stderr
    wrong = blockdiff(*arguments, "adapt.redaing=same")
    assert wrong.returncode == 2 and "adapt.reading" in wrong.stderr
    text = blockdiff("sample", out, "--max-new-tokens", 5)
    assert text.returncode == 0


@pytest.mark.parametrize("more", [(), ("adapt.lora_rank=2",), ("adapt.freeze=[model.layers.0.*]",)])
def test_its_cost_is_estimated_from_the_configuration_alone(more, recipe, place, tmp_path):
    """Sizes are those of the network that is trained, before anything is read or prepared."""
    shutil.copytree(place / "parent", tmp_path / "parent")
    save_file({}, tmp_path / "parent" / "model.safetensors")
    made = recipe(
        f"adapt.parent={tmp_path / 'parent'}", "data.path=nothing", "train.steps=3", *more
    )
    found = estimate_recipe(made, find_hardware("h100"), seq_len=L, vocab_size=258)
    real = adapt(recipe(*more))
    assert found.network == NetworkSizes.of(real)
    trained = sum(p.numel() for p in real.parameters() if p.requires_grad)
    whole = sum(p.numel() for p in real.parameters())
    assert found.parameters == whole
    assert found.training.memory.optimizer == 8 * trained
    assert found.training.memory.average == found.training.memory.gradients == 4 * trained
    assert (trained < whole) == bool(more)
    run_training(recipe(*more))
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert all(json.loads(line)["tflops_per_second"] > 0 for line in lines if "loss" in line)
