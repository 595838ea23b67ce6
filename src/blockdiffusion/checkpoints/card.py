"""The model card: the description of a model directory, for people and hubs.

`card.json` holds the facts that config.json does not. README.md is written from these two files and
nothing else, so it can be rewritten at any time and always agrees with them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from blockdiffusion.errors import shown
from blockdiffusion.escape import markdown, markdown_prose, markdown_table
from blockdiffusion.files.records import Damaged, build, of_file, read_json

if TYPE_CHECKING:
    pass

FORMAT = "blockdiffusion-card-1"
FACTS, README = "card.json", "README.md"
MARK = "<!-- Written by blockdiffusion from config.json and card.json; changes here are lost. -->"

EXAMPLE = """```python
import blockdiffusion

model = blockdiffusion.load("PATH_OR_HUB_ID")
print(blockdiffusion.{call})
```"""
# Rows of the table of the network, as config.json calls them.
NETWORK = (
    "objective", "block_size", "seq_len", "vocab_size", "mask_id", "bos", "bos_id", "eos_id",
    "num_hidden_layers", "hidden_size", "num_attention_heads", "cond_dim", "time_conditioning",
    "clean_attention", "block_attention", "reading",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Card:
    """Facts about a model beside its configuration, as plain values of JSON."""

    name: str
    """The title."""
    source: dict[str, Any] | None = None
    """Where converted weights came from."""
    training: dict[str, Any] | None = None
    """How the weights were trained: steps, and the sections of the recipe."""
    datasets: list[str] | None = None
    """Their training data; ids of a hub if they look like `owner/name`."""
    evaluation: dict[str, Any] | None = None
    """How the perplexity was measured, and what came out: see
    `evaluate.prepared.evaluation_facts`."""
    notes: list[str] | None = None
    """Other information for users, such as limits; paragraphs, written by hand."""

    def to_json(self) -> str:
        """The content of card.json."""
        return json.dumps({"format": FORMAT, **asdict(self)}, indent=2) + "\n"


def public_name(source: str | Path) -> str:
    """Return a hub's id, or the last part of a local path, which keeps the rest private."""
    path = Path(source)
    return path.resolve().name if path.exists() or path.is_absolute() else str(source)


def write_card(folder: Path, config: Any, card: Card) -> None:
    """Write card.json and README.md into a model directory."""
    (folder / FACTS).write_text(card.to_json(), encoding="utf-8")
    (folder / README).write_text(render(config, card), encoding="utf-8")


def read_card(folder: Path) -> Card | None:
    """Return the facts of a model directory; None if it has none.

    Raises:
        UserError: card.json is damaged, or of another version.
    """
    path = folder / FACTS
    if not path.is_file():
        return None
    instead = "remove it, and the card is written without it"
    content = read_json(path, instead)
    with of_file(path, instead):
        if content.get("format") != FORMAT:
            raise Damaged(f"its format is {shown(content.get('format'))}, not {FORMAT}")
        card = build(Card, content, strict=False)
        check_evaluation(card.evaluation)
    return card


def check_evaluation(found: dict[str, Any] | None) -> None:
    """Refuse measured facts from which no card can be written; see `Card.evaluation`.

    Raises:
        Damaged: one is missing or of another type.
    """
    if found is not None:
        build(_Told, found, "evaluation.", strict=False)


@dataclass(frozen=True, kw_only=True)
class _Told:
    """The measured facts that a card states in words."""

    data: str
    split: str
    is_bound: bool
    perplexity: float
    exact_perplexity: float | None = None
    step: int | None = None


def is_ours(folder: Path) -> bool:
    """Return whether the README.md of a directory may be written: there is none, or it is ours."""
    path = folder / README
    if not path.is_file():
        return not path.exists()
    return MARK in path.read_text(encoding="utf-8", errors="replace")


def render(config: Any, card: Card) -> str:
    """Return README.md: YAML front matter for the hub, then the facts in words and tables."""
    from blockdiffusion.diffusion.config import DiffusionConfig
    from blockdiffusion.models.causal_lm import SECTION

    call = "generate(model, max_new_tokens=64)"
    sizes, section = config, getattr(config, SECTION, None)
    config = config if section is None else DiffusionConfig(**section)
    if config.is_autoregressive:
        call = 'likelihood(model, ["Some text."])'
    parts = [
        f"---\n{_front_matter(config, card)}\n---",
        MARK,
        f"# {markdown(card.name)}",
        _summary(config),
        EXAMPLE.format(call=call),
        *(["## Notes", *map(markdown_prose, card.notes)] if card.notes else []),
        "## Network",
        _table({name: getattr(config, name, getattr(sizes, name, None)) for name in NETWORK}),
    ]
    if card.source is not None:
        parts += ["## Source", _table(card.source)]
    if card.training is not None or card.datasets:
        parts += ["## Training", _table({"datasets": card.datasets, **(card.training or {})})]
    parts += ["## How its perplexity is measured", _evaluation(config, card)]
    return "\n\n".join(parts) + "\n"


def _front_matter(config: Any, card: Card) -> str:
    from huggingface_hub import EvalResult, ModelCardData

    kind = "autoregressive" if config.is_autoregressive else "block-diffusion"
    results, found = None, card.evaluation
    if found is not None:
        results = [
            EvalResult(
                task_type="text-generation",
                dataset_type=found["data"],
                dataset_name=found["data"],
                dataset_split=found["split"],
                metric_type="perplexity",
                metric_name="perplexity (upper bound)" if found["is_bound"] else "perplexity",
                metric_value=found["perplexity"],
            )
        ]
    data = ModelCardData(
        library_name="blockdiffusion",
        pipeline_tag="text-generation",
        tags=[kind, "blockdiffusion", "safetensors", "arxiv:2503.09573"],
        datasets=[name for name in card.datasets or () if "/" in name] or None,
        metrics=["perplexity"],
        model_name=None if results is None else card.name,
        eval_results=results,
    )
    return data.to_yaml()


def _summary(config: Any) -> str:
    paper = "[Block Diffusion](https://arxiv.org/abs/2503.09573)"
    if config.is_autoregressive:
        return f"An autoregressive language model, the baseline of {paper}, for `blockdiffusion`."
    if config.block_size == config.seq_len:
        return (
            f"A diffusion language model over whole sequences of {config.seq_len} tokens "
            f"(objective `{config.objective}`), as in {paper}, for `blockdiffusion`."
        )
    return (
        f"A language model that is autoregressive over blocks of {config.block_size} tokens and a "
        f"diffusion inside them (objective `{config.objective}`): {paper}, for `blockdiffusion`."
    )


def _evaluation(config: Any, card: Card) -> str:
    found = card.evaluation
    given = {
        True: "Position 0 of every row is given (a BOS) and not counted.",
        False: "No BOS is given; position 0 is counted like any other.",
        None: "It is unknown whether position 0 is a given BOS for this model.",
    }[config.bos]
    if found is None:
        return (
            f"It has not been measured yet. {given} Rows have {config.seq_len} tokens. Measure it "
            "with `blockdiff eval`, which states estimator, samples, convention and error bars."
        )
    sign = "<= " if found["is_bound"] else ""
    said = f"Perplexity {sign}{found['perplexity']:.2f}"
    if found.get("exact_perplexity") is not None and found["is_bound"]:
        said += f", exactly {found['exact_perplexity']:.2f}"
    step, now = found.get("step"), (card.training or {}).get("steps")
    if step != now:
        said += f" (of the weights after step {step}; these are those after step {now})"
    return f"{said}, measured so:\n\n{_table(found)}"


def _table(values: Mapping[str, Any]) -> str:
    rows = [
        (name, value if isinstance(value, str) else json.dumps(value))
        for name, value in values.items()
        if value is not None
    ]
    return "\n".join(["| | |", "|---|---|", *markdown_table(rows)])
