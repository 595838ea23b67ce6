"""What is loaded through transformers never brings code with it."""

import builtins
import json
import re
from pathlib import Path

import pytest
import transformers

import blockdiffusion
from blockdiffusion.data.tokenizers import byte_tokenizer, load_tokenizer
from blockdiffusion.errors import UserError
from blockdiffusion.evaluate.scorer import load_scorer
from tests.command import blockdiff
from tests.evaluate.scorers import save_gpt2

ROOT = Path(__file__).parents[1]
EVIL = """open({marker!r}, "w")
import transformers
class Tok(transformers.PreTrainedTokenizerFast): pass
class Config(transformers.PretrainedConfig): model_type = "evil"
class Model(transformers.PreTrainedModel): config_class = Config
"""


@pytest.fixture
def evil(tmp_path, monkeypatch):
    """Puts code of its own into a folder; fails where the code ran, or somebody was asked."""
    marker = tmp_path / "it-ran"
    monkeypatch.setattr(builtins, "input", lambda *_: pytest.fail("standard input was asked"))

    def into(folder, tokenizer=True, model_type="evil"):
        (folder / "evil.py").write_text(EVIL.format(marker=str(marker)))
        change(folder / "config.json", model_type=model_type, auto_map={
            "AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model",
        })  # fmt: skip
        if tokenizer:
            auto_map = {"AutoTokenizer": ["evil.Tok", "evil.Tok"]}
            change(folder / "tokenizer_config.json", tokenizer_class="Tok", auto_map=auto_map)
        return str(folder)

    yield into
    assert not marker.exists()


def change(file, **values):
    old = json.loads(file.read_text()) if file.exists() else {}
    file.write_text(json.dumps(old | values))


def test_a_tokenizer(evil, tmp_path):
    byte_tokenizer().save_pretrained(tmp_path)
    folder = evil(tmp_path)
    with pytest.raises(UserError, match=r"own \(auto_map\), which is never run"):
        load_tokenizer(folder)
    (tmp_path / "a.txt").write_text("some text\n")
    run = blockdiff("prepare", tmp_path / "a.txt", "--out", tmp_path / "o", "--tokenizer", folder)
    assert run.returncode == 2 and len(run.stderr.splitlines()) == 1


@pytest.mark.parametrize("tokenizer", [True, False])
def test_a_judge(evil, tmp_path, tokenizer):
    save_gpt2(tmp_path)
    with pytest.raises(UserError, match="never run"):
        load_scorer(evil(tmp_path, tokenizer))


def test_a_judge_whose_kind_is_known_is_read_without_its_code(evil, tmp_path):
    save_gpt2(tmp_path)
    assert load_scorer(evil(tmp_path, tokenizer=False, model_type="gpt2")).context == 24


def test_the_tokenizer_of_a_model(evil, tmp_path, make_model):
    """Its kind is known, so it is read plainly."""
    make_model(vocab_size=258).save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    kind = json.loads((tmp_path / "config.json").read_text())["model_type"]
    loaded = blockdiffusion.load(evil(tmp_path, model_type=kind))
    assert type(loaded) is blockdiffusion.BlockDiffusionModel
    assert isinstance(loaded.tokenizer, transformers.PreTrainedTokenizerFast)


def test_nothing_else_loads_through_transformers():
    callers = {
        str(path.relative_to(ROOT))
        for folder in ("src", "studies", "benchmarks")
        for path in (ROOT / folder).rglob("*.py")
        for line in path.read_text().splitlines()
        if re.search(r"\.from_pretrained\(|trust_remote_code=True|\bpipeline\(", line)
        and "super().from_pretrained(" not in line
    }
    assert callers == {"src/blockdiffusion/from_pretrained.py"}
