"""Converting between formats, the model card, and sending to a hub (a stand-in for it)."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

import blockdiffusion
from blockdiffusion.checkpoints.card import MARK, Card, public_name, read_card, render, write_card
from blockdiffusion.checkpoints.lightning import LightningOptions
from blockdiffusion.checkpoints.release import convert, push
from blockdiffusion.data.tokenizers import byte_tokenizer
from blockdiffusion.errors import UserError
from blockdiffusion.train.recipe import load_recipe
from blockdiffusion.train.run import run_training
from tests.checkpoints.lightning_files import lightning, save_with_settings, settings
from tests.command import blockdiff
from tests.conftest import GOLDEN
from tests.hostile import HOSTILE, check_markdown

DEMO = Path(__file__).parents[2] / "recipes" / "demo.yaml"


def equal_models(one, other):
    ours, theirs = one.state_dict(), other.state_dict()
    same = ours.keys() == theirs.keys() and all(torch.equal(t, theirs[n]) for n, t in ours.items())
    return same and all(ours[name].dtype == theirs[name].dtype for name in ours)


def front_matter(folder):
    text = (folder / "README.md").read_text()
    return yaml.safe_load(text.split("---")[1])


# --- converting ---------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["mdlm", "sedd", "ar"])
def test_a_golden_lightning_file_becomes_a_directory(kind, tmp_path):
    source = GOLDEN / f"{kind}-lightning" / "last.ckpt"
    options = LightningOptions(kind=kind, seq_len=32)
    made = convert(source, tmp_path / "made", lightning=options)
    again = blockdiffusion.load(tmp_path / "made")
    assert equal_models(made.model, again)
    assert made.model.full_config().to_dict() == again.full_config().to_dict()
    assert made.notes == (
        "no tokenizer: this model works with ids; convert with --tokenizer for text",
    )
    card = read_card(tmp_path / "made")
    assert card.source["kind"] == kind and card.source["weights"] == "moving average"
    assert card.source["converted from"] == "last.ckpt" and card.training == {"steps": 10}
    assert "position 0 of every row is given" in (tmp_path / "made" / "README.md").read_text()


def test_the_published_format_round_trips_bit_for_bit(bd3lm, tmp_path):
    """There, back, and there again: tensors and what config.json says of the network."""
    convert(GOLDEN / "bd3lm-hf", tmp_path / "ours")
    assert equal_models(bd3lm, blockdiffusion.load(tmp_path / "ours"))
    convert(tmp_path / "ours", tmp_path / "theirs", to="bd3lm")
    published = load_file(GOLDEN / "bd3lm-hf" / "model.safetensors")
    written = load_file(tmp_path / "theirs" / "model.safetensors")
    assert published.keys() == written.keys()
    for name, tensor in published.items():
        assert tensor.dtype == written[name].dtype and torch.equal(tensor, written[name]), name
    raw = json.loads((GOLDEN / "bd3lm-hf" / "config.json").read_text())
    ours = json.loads((tmp_path / "theirs" / "config.json").read_text())
    for key in raw.keys() - {"transformers_version", "auto_map"}:
        assert ours[key] == raw[key], key
    again = blockdiffusion.load(tmp_path / "theirs")
    assert equal_models(bd3lm, again)
    assert again.full_config().to_dict() == bd3lm.full_config().to_dict()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_any_precision_and_mask_round_trips(make_model, tmp_path, dtype):
    model = make_model(mask_id=3).to(dtype)
    model.save_pretrained(tmp_path / "ours")
    convert(tmp_path / "ours", tmp_path / "theirs", to="bd3lm")
    convert(tmp_path / "theirs", tmp_path / "back")
    for name in ("theirs", "back"):
        again = blockdiffusion.load(tmp_path / name)
        assert equal_models(model, again) and again.config.mask_id == 3


def test_our_own_format_round_trips_with_its_card(make_model, tmp_path):
    model = make_model(vocab_size=258, bos=True)
    model.save_pretrained(tmp_path / "ours")
    byte_tokenizer().save_pretrained(tmp_path / "ours")
    notes = ["It knows *little*.", "It was trained for a test."]
    card = Card(name="ours", training={"steps": 5}, datasets=["owner/text"], notes=notes)
    write_card(tmp_path / "ours", model.full_config(), card)
    made = convert(tmp_path / "ours", tmp_path / "copy")
    assert equal_models(model, blockdiffusion.load(tmp_path / "copy")) and made.notes == ()
    assert read_card(tmp_path / "copy") == replace(card, name="copy")
    text = (tmp_path / "copy" / "README.md").read_text()
    assert "## Notes\n\nIt knows *little*.\n\nIt was trained for a test.\n\n## Network" in text
    again = blockdiffusion.load(tmp_path / "copy")
    assert again.tokenizer.get_vocab() == byte_tokenizer().get_vocab()
    assert (again.config.bos, again.config.bos_id, again.config.eos_id) == (True, 256, 256)


def test_a_card_from_before_there_were_notes_is_read(make_model, tmp_path):
    write_card(tmp_path, make_model().full_config(), Card(name="old"))
    facts = json.loads((tmp_path / "card.json").read_text())
    del facts["notes"]
    (tmp_path / "card.json").write_text(json.dumps(facts))
    assert read_card(tmp_path) == Card(name="old")
    assert "## Notes" not in (tmp_path / "README.md").read_text()


def test_other_networks_have_no_place_in_the_published_format(make_ar, make_model, tmp_path):
    make_ar().save_pretrained(tmp_path / "ar")
    make_model(clean_attention="causal").save_pretrained(tmp_path / "causal")
    for name in ("ar", "causal"):
        with pytest.raises(UserError, match="keep it in our own format"):
            convert(tmp_path / name, tmp_path / "out", to="bd3lm")
    left = sorted(path.name for path in tmp_path.iterdir())
    assert left == ["ar", "causal"]


def test_a_causal_or_blockless_published_config(tmp_path):
    copy = shutil.copytree(GOLDEN / "bd3lm-hf", tmp_path / "model")
    raw = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(raw | {"cross_attn": False}))
    assert blockdiffusion.load(copy).config.block_size == 32  # no clean stream: one block
    (copy / "config.json").write_text(json.dumps(raw | {"causal": True}))
    with pytest.raises(UserError, match="causal network"):
        blockdiffusion.load(copy)


@pytest.fixture
def whole_file(make_model, tmp_path):
    """A Lightning file as the authors' code leaves it, with a tokenizer that has no mask."""
    model = make_model(vocab_size=258).float()
    tokenizer = byte_tokenizer()
    plain = json.loads(tokenizer.backend_tokenizer.to_str())
    plain["added_tokens"] = [t for t in plain["added_tokens"] if t["content"] != "<|mask|>"]
    tokenizer._tokenizer = type(tokenizer.backend_tokenizer).from_str(json.dumps(plain))
    path = tmp_path / "last.ckpt"
    save_with_settings(path, lightning(model), settings("bd3lm", model), tokenizer)
    return path, model


def test_a_whole_file_becomes_a_model_with_its_tokenizer(whole_file, tmp_path):
    path, model = whole_file
    run = blockdiff("convert", path, "--out", tmp_path / "made")
    assert run.returncode == 0, run.stderr
    assert "block_diffusion, S = 4, L = 16, V = 258, mask 257" in run.stdout
    assert "the tokenizer is the one in the file" in run.stdout
    again = blockdiffusion.load(tmp_path / "made")
    assert equal_models(model, again)
    assert (again.config.bos, again.config.bos_id, again.tokenizer.mask_token_id) == (
        True,
        256,
        257,
    )
    assert blockdiffusion.likelihood(again, ["Some text."], estimator="exact").bos
    assert read_card(tmp_path / "made").datasets == ["openwebtext"]
    files = sorted(file.name for file in (tmp_path / "made").iterdir())
    assert files == [
        ".verified", "README.md", "SHA256SUMS", "card.json", "config.json", "model.safetensors",
        "tokenizer.json", "tokenizer_config.json",
    ]  # fmt: skip


def test_a_run_starts_from_a_lightning_file(whole_file, prepared_bytes, tmp_path):
    """The paper's recipe from the authors' weights: another block size, our loop."""
    path, _ = whole_file
    overrides = [
        f"out={tmp_path / 'run'}", f"data.path={prepared_bytes}", f"model.init_from={path}",
        "model.num_hidden_layers=2", "model.hidden_size=16", "model.num_attention_heads=2",
        "model.cond_dim=8",
        "model.block_size=8", "train.steps=2", "train.batch_size=2", "eval.every=null",
        "sample.every=null",
    ]  # fmt: skip
    state = run_training(load_recipe(DEMO, overrides))
    assert state.step == 2
    assert read_card(tmp_path / "run" / "model").training["model"]["init_from"] == "last.ckpt"


@pytest.fixture(scope="module")
def prepared_bytes(tmp_path_factory):
    from blockdiffusion.data.packing import PrepareOptions, prepare

    folder = tmp_path_factory.mktemp("bytes")
    (folder / "text.txt").write_text("It was the best of times, it was the worst.\n\n" * 30)
    options = PrepareOptions(
        seq_len=16, tokenizer="byte", row_bos=True, document_bytes=100, num_workers=1,
        valid_fraction=0.2,
    )  # fmt: skip
    prepare([str(folder / "text.txt")], folder / "prepared", options)
    return folder / "prepared"


def test_mistakes_of_convert_leave_nothing(whole_file, tmp_path):
    path, _ = whole_file
    before = sorted(tmp_path.rglob("*"))
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("mine")
    golden = GOLDEN / "mdlm-lightning" / "last.ckpt"
    truncated = tmp_path / "cut.ckpt"
    truncated.write_bytes(path.read_bytes()[:-50])
    out = ("--out", tmp_path / "new")
    mistakes = [
        ([path, "--out", tmp_path / "full"], "already exists"),
        ([path, *out, "--to", "sdar"], "choose blockdiffusion or bd3lm"),
        ([path, *out, "--weights", "mean"], "choose ema or raw"),
        ([path, *out, "--kind", "mdlm"], "kind is bd3lm by its configuration and mdlm by --kind"),
        ([golden, *out], "--kind ... --seq-len ..."),
        ([golden, *out, "--kind", "mdlm", "--seq-len", 32, "--tokenizer", "byte"],
         "it has V = 258 and mask 257, the model V = 101 and mask 100"),
        ([golden, *out, "--kind", "mdlm", "--seq-len", 32, "--bos"], "needs a BOS token"),
        ([GOLDEN / "bd3lm-hf", *out, "--kind", "mdlm", "--num-attention-heads", 4],
         "leave out --kind, --num-attention-heads"),
        ([truncated, *out], "truncated"),
        ([tmp_path / "full", *out], "config.json"),
    ]  # fmt: skip
    for arguments, expected in mistakes:
        run = blockdiff("convert", *arguments)
        assert run.returncode == 2 and run.stderr.count("\n") == 1, run.stderr
        assert expected in run.stderr
        assert not (tmp_path / "new").exists()
    truncated.unlink()
    assert (tmp_path / "full" / "file").read_text() == "mine"
    shutil.rmtree(tmp_path / "full")
    assert sorted(tmp_path.rglob("*")) == before


def test_a_full_disk_leaves_nothing(bd3lm, tmp_path, monkeypatch):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("blockdiffusion.checkpoints.formats.write_safetensors", full)
    with pytest.raises(UserError, match=r"the disk is full: .* then convert again"):
        convert(GOLDEN / "bd3lm-hf", tmp_path / "new")
    assert not list(tmp_path.iterdir())


# --- the card -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run(tmp_path_factory, prepared_bytes):
    """A run whose last export comes two steps after its last evaluation but one."""
    out = tmp_path_factory.mktemp("run") / "small"
    overrides = [
        f"out={out}", f"data.path={prepared_bytes}", "model.num_hidden_layers=1",
        "model.hidden_size=16",
        "model.num_attention_heads=2", "model.cond_dim=8", "train.steps=4", "train.batch_size=2",
        "eval.every=2", "eval.rows=3", "eval.mc_samples=2", "sample.every=null",
        "checkpoint.every=2",
    ]  # fmt: skip
    run_training(load_recipe(DEMO, overrides))
    return out


def test_a_run_describes_its_model(run, prepared_bytes):
    folder = run / "model"
    card, config = read_card(folder), blockdiffusion.load(run).full_config()
    lines = (run / "metrics.jsonl").read_text().splitlines()
    logged = [json.loads(line) for line in lines if "valid_bound" in line]
    assert all("evaluation" not in line for line in logged)
    found = card.evaluation
    assert found["nats_per_token"] == logged[-1]["valid_bound"] and found["step"] == 4
    assert found["stderr_data"] == logged[-1]["valid_stderr_data"]
    assert (found["estimator"], found["samples"], found["num_rows"]) == ("complement", 2, 3)
    assert (found["bos"], found["split"], found["seq_len"]) == (True, "valid", 16)
    assert len(found["data_sha256"]) == 64 and found["num_tokens"] == 3 * 15
    assert card.training["steps"] == 4 and card.training["optim"]["ema_decay"] < 1
    assert card.datasets == ["text.txt"] and card.name == "small"
    text = (folder / "README.md").read_text()
    assert text == render(config, card)
    assert f"Perplexity <= {found['perplexity']:.2f}, measured so" in text
    assert str(prepared_bytes.parent) not in text + (folder / "card.json").read_text()


def test_notes_written_by_hand_outlive_further_training(run, tmp_path):
    copy = shutil.copytree(run, tmp_path / "small")
    facts = json.loads((copy / "model" / "card.json").read_text())
    (copy / "model" / "card.json").write_text(json.dumps(facts | {"notes": ["Mine."]}))
    newest = max((copy / "checkpoints").iterdir())
    shutil.rmtree(newest)  # the last steps are done again
    run_training(load_recipe(copy / "config.yaml", [f"out={copy}"]), resume=True)
    assert newest.exists() and read_card(copy / "model").notes == ["Mine."]


def test_the_front_matter_is_what_hubs_read(run):
    from huggingface_hub import ModelCard

    data = ModelCard.load(run / "model" / "README.md").data
    assert (data.library_name, data.pipeline_tag) == ("blockdiffusion", "text-generation")
    assert data.metrics == ["perplexity"] and "block-diffusion" in data.tags
    [result] = data.eval_results
    assert result.metric_value == read_card(run / "model").evaluation["perplexity"]
    assert result.metric_name == "perplexity (upper bound)" and data.datasets is None


def test_the_measured_step_is_told_where_it_is_not_the_last(make_model):
    found = {
        "data": "d", "split": "valid", "is_bound": False, "perplexity": 8.0, "step": 2,
    }  # fmt: skip
    config = make_model().full_config()
    for steps, told in ((2, False), (5, True)):
        text = render(config, Card(name="m", training={"steps": steps}, evaluation=found))
        assert ("after step 2; these are those after step 5" in text) == told
        assert "Perplexity 8.00" in text and "<=" not in text
    assert "not been measured yet" in render(config, Card(name="m"))
    hostile = Card(
        name=HOSTILE, source={HOSTILE: HOSTILE}, training={"x": {HOSTILE: 1}}, notes=[HOSTILE],
        datasets=[HOSTILE],
    )  # fmt: skip
    page = render(config, hostile)
    page = page[page.index("\n---\n") :]  # behind the front matter, where YAML quotes it
    assert "<script" not in page and page.count("](d)") == 1  # of the note, written by hand
    check_markdown(page[page.index("## Source") :])


def test_a_resumed_run_keeps_what_was_measured(run, tmp_path):
    copy = shutil.copytree(run, tmp_path / "small")
    before = read_card(copy / "model")
    shutil.rmtree(copy / "model")
    overrides = [f"out={copy}", "eval.mc_samples=7"]  # what is measured from now on
    run_training(load_recipe(copy / "config.yaml", overrides), resume=True)
    assert read_card(copy / "model") == before


def test_eval_puts_its_result_into_the_card(run, prepared_bytes, tmp_path):
    copy = shutil.copytree(run, tmp_path / "small")
    shown = blockdiff("eval", copy, "--data", prepared_bytes, "--estimator", "exact", "--card")
    assert shown.returncode == 0, shown.stderr
    found = read_card(copy / "model").evaluation
    assert found["estimator"] == "exact" and f"<= {found['perplexity']:.2f}" in shown.stdout
    text = (copy / "model" / "README.md").read_text()
    assert f"exactly {found['exact_perplexity']:.2f}" in text
    (copy / "model" / "README.md").write_text("my own words")
    refused = blockdiff("eval", copy, "--data", prepared_bytes, "--card")
    assert refused.returncode == 2 and "was not written by blockdiffusion" in refused.stderr
    refused = blockdiff("eval", GOLDEN / "bd3lm-hf", "--data", prepared_bytes, "--card")
    assert refused.returncode == 2 and "not in our own format" in refused.stderr


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"format": "other"}'])
def test_a_damaged_card_is_named(tmp_path, text):
    (tmp_path / "card.json").write_text(text)
    with pytest.raises(UserError, match=r"card\.json: it"):
        read_card(tmp_path)


def test_names_give_no_local_path_away(tmp_path):
    assert public_name(tmp_path / "some" / "data") == "data"
    assert public_name("owner/model") == "owner/model"


# --- sending ------------------------------------------------------------------------------------


class Response:
    def __init__(self, status_code):
        self.status_code = status_code


class Refused(Exception):
    def __init__(self, status_code):
        super().__init__("no\ndetails")
        self.response = Response(status_code)


@pytest.fixture
def hub(monkeypatch):
    """A hub in memory: what was uploaded, by repository. `fails` is raised by the next call."""
    import fnmatch

    import huggingface_hub

    class Hub:
        repositories: dict
        fails = None

    state = Hub()
    state.repositories = {}

    class FakeApi:
        def create_repo(self, repo_id, *, private, exist_ok):
            assert exist_ok
            if state.fails is not None:
                raise state.fails
            state.repositories.setdefault(repo_id, {"private": private, "files": []})
            return f"hub://{repo_id}"

        def model_info(self, repo_id):
            return type("Info", (), {"private": state.repositories[repo_id]["private"]})

        def upload_folder(self, *, repo_id, folder_path, allow_patterns, commit_message):
            assert commit_message
            state.repositories[repo_id]["files"] = sorted(
                path.name
                for path in folder_path.iterdir()
                if any(fnmatch.fnmatch(path.name, pattern) for pattern in allow_patterns)
            )

    monkeypatch.setattr(huggingface_hub, "HfApi", FakeApi)
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: "a token")
    return state


def test_push_sends_the_model_its_tokenizer_and_a_true_card(run, tmp_path, hub):
    copy = shutil.copytree(run, tmp_path / "small")
    (copy / "model" / "secret.env").write_text("password")
    config = json.loads((copy / "model" / "config.json").read_text())
    (copy / "model" / "config.json").write_text(json.dumps(config | {"bos": None}))
    (copy / "model" / "README.md").write_text(f"{MARK}\nold words")
    sent = blockdiff("push", copy, "owner/name", "--private")
    assert sent.returncode == 0 and sent.stdout == "hub://owner/name\n"
    repository = hub.repositories["owner/name"]
    assert repository["private"] and repository["files"] == [
        "README.md", "card.json", "config.json", "model.safetensors", "tokenizer.json",
        "tokenizer_config.json",
    ]  # fmt: skip
    text = (copy / "model" / "README.md").read_text()
    assert "old words" not in text and "| bos |" not in text.partition("## Training")[0]
    (copy / "model" / "README.md").write_text("my own words")
    push(copy, "owner/name")
    assert (copy / "model" / "README.md").read_text() == "my own words"


def test_push_tells_what_is_wrong_in_one_sentence(run, tmp_path, hub, monkeypatch):
    import huggingface_hub

    cut = shutil.copytree(run / "model", tmp_path / "cut")
    (cut / "model.safetensors").write_bytes((cut / "model.safetensors").read_bytes()[:-9])
    hub.repositories["owner/public"] = {"private": False, "files": []}
    mistakes = [
        ((run, "name"), "give it as owner/name", None),
        ((tmp_path, "owner/name"), "holds no config.json", None),
        ((cut, "owner/name"), "truncated", None),
        ((run, "owner/public", "--private"), "is public, so nothing was sent", None),
        ((run, "owner/name"), "refused to write owner/name (status 403)", Refused(403)),
        ((run, "owner/name"), "could not be sent to the hub (status 500)", Refused(500)),
        ((run, "owner/name"), "(ConnectionError: no route); check the conn",
         ConnectionError("no route\nat all")),
    ]  # fmt: skip
    for arguments, expected, failure in mistakes:
        hub.fails = failure
        refused = blockdiff("push", *arguments)
        assert refused.returncode == 2 and refused.stderr.count("\n") == 1, refused.stderr
        assert expected in refused.stderr
    assert not any(repository["files"] for repository in hub.repositories.values())
    hub.fails = None
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: None)
    refused = blockdiff("push", run, "owner/name")
    assert refused.returncode == 2 and "no Hugging Face token" in refused.stderr
