"""The documentation: its Python runs, its command lines, links and tables are those of the program.

Conventions of the pages: every ```python block runs, in order, in one namespace per page and in a
folder where the models that the pages name stand (small ones). Lines of ```sh blocks that begin
with `blockdiff` are parsed by the program, not run.
"""

import dataclasses
import json
import re
import shlex
from pathlib import Path
from typing import get_type_hints

import pytest
import typer.main
import yaml
from safetensors.torch import save_file

import blockdiffusion
from blockdiffusion.checkpoints.bd3lm import BD3LM_NAMES
from blockdiffusion.cli import app
from blockdiffusion.cli.options import OLD_NAMES
from blockdiffusion.data.options import PrepareOptions
from blockdiffusion.data.packing import prepare
from blockdiffusion.data.registry import DATA_SETS
from blockdiffusion.data.tokenizers import byte_tokenizer
from blockdiffusion.diffusion.schedules import SCHEDULES
from blockdiffusion.evaluate.generation.result import (
    Cost,
    GenerationResult,
    Lengths,
    TextNumbers,
)
from blockdiffusion.evaluate.generation.samples import Sample
from blockdiffusion.evaluate.likelihood import Likelihood, choose_estimator
from blockdiffusion.evaluate.options import LikelihoodOptions
from blockdiffusion.evaluate.scorer import ScorerFacts
from blockdiffusion.evaluate.zero_shot.suite import ZeroShotOptions
from blockdiffusion.files.records import convert, describe
from blockdiffusion.limits import LIMITS, limit_name
from blockdiffusion.models.transformer import BlockDiffusionConfig
from blockdiffusion.runtime.hardware import choose_hardware
from blockdiffusion.sampling.choosing import make_sampler
from blockdiffusion.sampling.params import FIELDS, SamplingParams
from blockdiffusion.studies.references.coders import CoderOptions, CoderRow, CoderTable
from blockdiffusion.studies.reproduce.paper import TABLES, find_table
from blockdiffusion.studies.reproduce.scales import find_scale
from blockdiffusion.studies.variance.table import VarianceOptions
from blockdiffusion.train.recipe import Recipe, load_recipe
from blockdiffusion.train.run import run_training
from tests.checkpoints.lightning_files import lightning, save_with_settings, settings
from tests.evaluate.scorers import save_gpt2

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
HOW_TO = DOCS / "how-to"
PAGES = sorted(DOCS.rglob("*.md"))
TOP = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")]
COMMANDS = typer.main.get_command(app).commands  # type: ignore[attr-defined]
NO_DEFAULT = "*required*"
CONFIGS = {  # of networks that have the policy
    None: BlockDiffusionConfig(),
    "analytic": BlockDiffusionConfig(objective="score_entropy", time_conditioning=True),
}


def name_of(page):
    return str(page.relative_to(ROOT))


def blocks(page, language):
    return re.findall(rf"^```{language}\n(.*?)^```$", page.read_text(), re.S | re.M)


def prose(page):
    """The page without its fenced blocks."""
    return re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.S | re.M)


def table_rows(page):
    """The cells of every row of a page's tables, heads and rules left out."""
    for line in prose(page).splitlines():
        if line.startswith("|"):
            yield [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]]


# --- The Python blocks run ------------------------------------------------------------------------


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with what the pages suppose: recipes, a run, a published model, a tokenizer."""
    folder = tmp_path_factory.mktemp("docs")
    (folder / "recipes").symlink_to(ROOT / "recipes")
    text = "Return the number of small blocks. If there is none, return the next one.\n\n" * 60
    (folder / "text.txt").write_text(text)
    options = PrepareOptions(seq_len=32, tokenizer="byte", document_bytes=500, num_workers=1)
    smaller = [
        "train.steps=2", "train.batch_size=2", "model.num_hidden_layers=1", "model.hidden_size=32",
        "eval.rows=2", "sample.max_new_tokens=8",
    ]  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        prepare(["text.txt"], "runs/demo-data", options)
        run_training(load_recipe("recipes/demo.yaml", smaller))
    published_model(folder / "kuleshov-group" / "bd3lm-owt-block_size4")
    save_gpt2(folder / "judge")
    tokenizer_like_gpt2(folder / "gpt2")
    small = blockdiffusion.BlockDiffusionConfig(
        vocab_size=258,
        seq_len=16,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        cond_dim=8,
    )
    model = blockdiffusion.BlockDiffusionModel(small)
    save_with_settings(folder / "whole.ckpt", lightning(model), settings("bd3lm", model), None)
    save_with_settings(folder / "last.ckpt", lightning(model), {}, None)
    return folder


def tokenizer_like_gpt2(folder):
    """GPT-2's ids: 50256 for the end of text, and no mask; the words are bytes."""
    plain = json.loads(byte_tokenizer().backend_tokenizer.to_str())
    plain["model"]["vocab"] |= {f"unused {number}": number for number in range(256, 50256)}
    plain["added_tokens"] = [plain["added_tokens"][0] | {"id": 50256}]
    folder.mkdir()
    (folder / "tokenizer.json").write_text(json.dumps(plain))


def published_model(folder):
    """A directory in the published format: GPT-2's ids, otherwise tiny."""
    config = blockdiffusion.BlockDiffusionConfig(
        vocab_size=50258,
        seq_len=1024,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        cond_dim=8,
    )
    state = {}
    for name, tensor in blockdiffusion.BlockDiffusionModel(config).backbone.state_dict().items():
        theirs, ours = next(
            (theirs.replace(".N.", ".0."), ours.replace(".N.", ".0."))
            for theirs, ours in BD3LM_NAMES.items()
            if f"{name}.".startswith(f"{ours.replace('.N.', '.0.')}.")
        )
        state[theirs + name.removeprefix(ours)] = tensor
    raw = {
        "model_type": "bd3lm", "vocab_size": 50258, "model_length": 1024, "block_size": 4,
        "hidden_dim": 16, "n_blocks": 1, "n_heads": 2, "cond_dim": 8, "dropout": 0.1,
    }  # fmt: skip
    folder.mkdir(parents=True)
    save_file(state, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(raw))


@pytest.mark.parametrize("page", [p for p in PAGES if blocks(p, "python")], ids=name_of)
def test_the_python_runs(page, place, monkeypatch, capsys):
    monkeypatch.chdir(place)
    # The page on extensions adds a schedule by its name.
    monkeypatch.setattr("blockdiffusion.diffusion.schedules.SCHEDULES", dict(SCHEDULES))
    namespace = {}
    for block in blocks(page, "python"):
        exec(compile(block, name_of(page), "exec"), namespace)
    assert ("print(" in page.read_text()) == bool(capsys.readouterr().out)


def test_every_block_has_a_known_language():
    for page in [*PAGES, *TOP]:
        for language in re.findall(r"^```(.+)$", page.read_text(), re.M):
            assert language in {"python", "sh", "math", "yaml"}, (page, language)


# --- Command lines --------------------------------------------------------------------------------


def command_lines(text):
    """The blockdiff commands of a shell script, each as its words."""
    for line in text.replace("\\\n", " ").splitlines():
        for part in line.split("&&"):
            if part.strip().startswith("blockdiff "):
                yield shlex.split(re.split(r"\s[>|]\s", part)[0], comments=True)[1:]


def shown_commands():
    for page in [*PAGES, *TOP]:
        for block in blocks(page, "sh"):
            yield from ((name_of(page), words) for words in command_lines(block))
    for recipe in sorted((ROOT / "recipes").glob("*.yaml")):
        comments = re.findall(r"^# ?(.*)$", recipe.read_text(), re.M)
        yield from ((name_of(recipe), words) for words in command_lines("\n".join(comments)))


@pytest.mark.parametrize(
    ("page", "words"), [pytest.param(p, w, id=f"{p}: {' '.join(w)}") for p, w in shown_commands()]
)
def test_a_command_line_is_understood(page, words):
    name, *arguments = words
    values = COMMANDS[name].make_context(name, arguments).params  # fails on an unknown option
    if name == "prepare":
        known = {field.name for field in dataclasses.fields(PrepareOptions)}
        values["valid"] = values["valid"] or ()
        PrepareOptions(**{key: value for key, value in values.items() if key in known})
    elif name == "train":
        recipe = Path(values["recipe"])
        if recipe.name == "config.yaml":  # a run's own
            recipe = Path("recipes/demo.yaml")
        load_recipe(ROOT / recipe, values["overrides"] or [])
    elif name == "estimate":
        load_recipe(ROOT / values["recipe"], values["overrides"] or [])
        numbers = {key: values[key] for key in ("tflops", "bandwidth", "memory")}
        if values["device"] != "cpu":  # which would be measured
            choose_hardware(values["device"], **numbers)
    elif name == "eval":
        choose_estimator(
            LikelihoodOptions(estimator=values["estimator"]), BlockDiffusionConfig()
        )  # refuses an unknown one
    elif name == "references":
        known = {field.name for field in dataclasses.fields(CoderOptions)}
        CoderOptions(**{key: value for key, value in values.items() if key in known})
        choose_estimator(LikelihoodOptions(estimator=values["estimator"]), BlockDiffusionConfig())
    elif name == "variance":
        VarianceOptions(estimators=tuple(values["estimators"] or ("count",)))
    elif name == "zero-shot":
        known = {field.name for field in dataclasses.fields(ZeroShotOptions)} - {"local"}
        ZeroShotOptions(**{k: tuple(v) if isinstance(v, list) else v for k, v in values.items()
                           if k in known and v is not None})  # fmt: skip
        choose_estimator(LikelihoodOptions(estimator=values["estimator"]), BlockDiffusionConfig())
    elif name == "reproduce":
        find_scale(values["scale"])
        for table in values["tables"]:
            find_table(table)
        known = {"judge", *DATA_SETS, *TABLES["T5"].columns}
        assert all(entry.partition("=")[0] in known for entry in values["data"] or ())
    elif name in ("sample", "generate-eval"):
        params = SamplingParams(**{name: values[name] for name in FIELDS if name in values})
        make_sampler(CONFIGS.get(params.sampler, CONFIGS[None]), params)


def options_of(command):
    return {text for p in COMMANDS[command].params for text in (*p.opts, *p.secondary_opts)}


@pytest.mark.parametrize("page", [*PAGES, *TOP], ids=name_of)
def test_options_in_the_prose_exist(page):
    """`--option` alone belongs to some command, behind a command's name to that one."""
    everywhere = {"--help", "--version"}.union(*map(options_of, COMMANDS))
    everywhere |= OLD_NAMES.keys() if page.name == "CHANGELOG.md" else set()
    for code in re.findall(r"`([^`]+)`", prose(page)):
        words = code.removeprefix("blockdiff ").split()
        known = everywhere
        if words[0] in COMMANDS:
            known = options_of(words[0]) | {"--help"}
        elif code.startswith("blockdiff "):
            assert words[0] in everywhere, code
        unknown = [w for w in words if w.startswith("--") and w not in known]
        assert not unknown, f"{code}: {unknown}"


# --- Tables ---------------------------------------------------------------------------------------


def leaves(kind=Recipe, prefix=""):
    """(key, type, field) of every key of a recipe."""
    types = get_type_hints(kind)
    for field in dataclasses.fields(kind):
        if dataclasses.is_dataclass(types[field.name]):
            yield from leaves(types[field.name], f"{prefix}{field.name}.")
        else:
            yield f"{prefix}{field.name}", types[field.name], field


def plain(text):
    """Text without Markdown and dashes, to compare a meaning with an option's help."""
    text = re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", text).replace("--", "").replace("-", "_")
    text = re.sub(r"[`$*\\]", "", text).strip().rstrip(". ")
    return text[:1].lower() + text[1:]


def test_the_table_of_recipe_keys_is_the_program():
    rows = [r for r in table_rows(HOW_TO / "recipe-keys.md") if r[0].startswith("`")]
    shown = {key.strip("`"): (kind, default.strip("`"), text) for key, kind, default, text in rows}
    assert list(shown) == [key for key, _, _ in leaves()] and len(shown) == len(rows)
    for key, kind, field in leaves():
        name = limit_name(field.name, key.removesuffix(field.name))
        limits = str(LIMITS[name]) if name else ""
        assert shown[key][0] == ", ".join(filter(None, (describe(kind), limits))), key
        assert plain(shown[key][2]) == plain(field.metadata["help"]), key
        if field.default is dataclasses.MISSING:
            assert shown[key][1] == NO_DEFAULT, key
        else:
            assert convert(kind, yaml.safe_load(shown[key][1])) == field.default, key


def test_recipe_keys_in_the_pages_exist():
    known = {key for key, _, _ in leaves()}
    sections = {key.split(".")[0] for key in known if "." in key}
    for page in (HOW_TO / "train.md", HOW_TO / "prepare.md", HOW_TO / "recipe-keys.md"):
        for code in re.findall(r"`([a-z]+\.[a-z_*]+)(?:=[^`]*)?`", prose(page)):
            section, name = code.split(".")
            if section in sections and name not in {"*", "md"}:
                assert code in known, f"{page.name}: {code}"


def test_our_side_of_the_authors_keys_exists():
    known = {key for key, _, _ in leaves()}
    rows = [row for row in table_rows(HOW_TO / "authors-keys.md") if row[0].startswith("`")]
    assert len(rows) > 60
    for theirs, ours, note in rows:
        assert ours != "-" or note, theirs
        for code in re.findall(r"`([^`]+)`", ours):
            command, *option = code.split()
            if option and option[0].startswith("--"):
                assert option[0] in options_of(command), code
            elif option:  # an argument, such as `eval MODEL`
                names = {parameter.name for parameter in COMMANDS[command].params}
                assert names & {option[0].lower(), f"{option[0].lower()}s"}, code
            else:
                assert code in known, code


def test_the_table_of_prepare_options_is_the_program():
    rows = [r for r in table_rows(HOW_TO / "prepare.md") if len(r) == 4 and r[0].startswith("`--")]
    of_command = {
        text: p for p in COMMANDS["prepare"].params for text in p.opts if text.startswith("--")
    }
    fields = {field.name: field for field in dataclasses.fields(PrepareOptions)}
    assert {row[0].strip("`") for row in rows} == of_command.keys() - {"--help"}
    assert {row[1].strip("`") for row in rows} == fields.keys() | {"out"}
    for option, name, default, meaning in ([cell.strip("`") for cell in row] for row in rows):
        assert meaning
        if name != "out":
            value = yaml.safe_load(default)
            assert value == (list(v) if isinstance(v := fields[name].default, tuple) else v), name
            assert (of_command[option].default or value) == value, option
            assert plain(meaning) == plain(fields[name].metadata["help"]), option


def test_the_table_of_rooms_is_the_program():
    shown = [row for row in table_rows(DOCS / "design.md") if len(row) == 3 and ".py`](" in row[1]]
    files = [row[1].split("`")[1] for row in shown]
    rooms = ["top" if "/" not in file else f"`{file.split('/')[0]}/`" for file in files]
    assert [row[0] for row in shown] == rooms
    root = ROOT / "src" / "blockdiffusion"
    written = [path for path in root.rglob("*.py") if path.read_text() and path.parent != root]
    top = [path for path in root.glob("*.py") if path.name != "__init__.py"]
    assert sorted(files) == sorted(str(path.relative_to(root)) for path in [*written, *top])


def test_everything_that_is_written_is_explained(place):
    explained = set(re.findall(r"`(\w+)`", (HOW_TO / "train.md").read_text()))
    for line in (place / "runs" / "demo" / "metrics.jsonl").read_text().splitlines():
        assert json.loads(line).keys() - {"step"} <= explained
    explained = set(re.findall(r"`(\w+)`", (HOW_TO / "evaluate.md").read_text()))
    fields = {f.name for f in dataclasses.fields(Likelihood) if not f.name.endswith("per_row")}
    assert fields | {"perplexity", "exact_perplexity", "interval"} <= explained
    explained = set(re.findall(r"`(\w+)`", (HOW_TO / "references.md").read_text()))
    for kind in (CoderRow, CoderTable, CoderOptions):
        assert {field.name for field in dataclasses.fields(kind)} - {"options"} <= explained
    explained = set(re.findall(r"`(\w+)`", (HOW_TO / "generate-eval.md").read_text()))
    for kind in (GenerationResult, TextNumbers, Lengths, Cost, ScorerFacts, Sample):
        assert {field.name for field in dataclasses.fields(kind)} <= explained
    names = set(re.findall(r"`(\w+)`", (HOW_TO / "python.md").read_text()))
    assert set(blockdiffusion.__all__) - {"__version__"} <= names


# --- Links and the rest ---------------------------------------------------------------------------


def anchors(page):
    heads = re.findall(r"^#+ (.+)$", prose(page), re.M)
    return {re.sub(r"[^\w\- ]", "", head.lower()).strip().replace(" ", "-") for head in heads}


@pytest.mark.parametrize("page", [*PAGES, *TOP], ids=name_of)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        if not target.startswith(("http:", "https:")):
            path, _, anchor = target.partition("#")
            linked = page.parent / path if path else page
            assert linked.exists(), target
            assert not anchor or anchor in anchors(linked), target


def test_the_citation_and_the_changelog_are_of_this_version():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["version"] == blockdiffusion.__version__
    assert [a["family-names"] for a in citation["references"][0]["authors"]][::7] == [
        "Arriola",
        "Kuleshov",
    ]
    assert f"## [{blockdiffusion.__version__}]" in (ROOT / "CHANGELOG.md").read_text()
