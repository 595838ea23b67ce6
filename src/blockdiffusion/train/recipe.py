"""Recipes: YAML files and `section.key=value` overrides, read strictly into frozen dataclasses.

Nothing is guessed and nothing is dropped: an unknown key is refused with the nearest known one, a
value of the wrong type with what is allowed. The resolved recipe is saved with the run, and is
itself a recipe.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import MISSING, asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from blockdiffusion.errors import UserError, shown
from blockdiffusion.estimate.flops import Network
from blockdiffusion.files.records import Typed, build, of_file, read_yaml
from blockdiffusion.limits import check_limits
from blockdiffusion.runtime.distributed import Team, joined
from blockdiffusion.runtime.hardware import check_memory
from blockdiffusion.train.checkpoint import CheckpointOptions, TrainState, latest
from blockdiffusion.train.loggers import LogOptions
from blockdiffusion.train.loop import ObjectiveOptions, TrainOptions
from blockdiffusion.train.optim import OptimOptions
from blockdiffusion.train.schedule_search import SearchOptions, check_objective

if TYPE_CHECKING:
    from blockdiffusion.checkpoints.card import Card
    from blockdiffusion.data.manifest import Manifest
    from blockdiffusion.models.transformer import BlockDiffusionConfig, BlockDiffusionModel
    from blockdiffusion.train.loop import Periodic
    from blockdiffusion.train.schedule_search import ScheduleSearch

USUAL_BLOCK_SIZE = 4


@dataclass(frozen=True, kw_only=True, slots=True)
class DataOptions:
    """The prepared data."""

    path: str
    """Directory that `blockdiff prepare` made; it decides L and the vocabulary."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelOptions:
    """The network; the defaults are the paper's. See `BlockDiffusionConfig`."""

    num_layers: int = 12
    width: int = 768
    num_heads: int = 12
    cond_dim: int = 128
    block_size: int | None = None
    """S, tokens of a diffusion block; it divides the data's L. null: 4, and L for `mdlm`, whose
    block is the row. `ar` has none and stores 1."""
    dropout: float = 0.1
    clean_attention: Literal["block", "causal"] = "block"
    init_from: str | None = None
    """Run or model whose weights to start from; null: random ones."""

    def __post_init__(self) -> None:
        check_limits(self, "model.")
        if self.width % (2 * self.num_heads):
            raise UserError(
                f"model.width is {self.width}; it must be a multiple of 2 * model.num_heads, "
                f"which is {2 * self.num_heads}"
            )
        if not 0 <= self.dropout < 1:
            raise UserError(f"model.dropout is {self.dropout}; it must be in [0, 1)")


@dataclass(frozen=True, kw_only=True, slots=True)
class EvalOptions:
    """The validation bound during training."""

    every: int | None = 1000
    """Steps between two evaluations; null: never. The last step is always evaluated otherwise."""
    rows: int | None = 256
    """Validation rows that are scored, the first ones; null: all."""
    estimator: str = "auto"
    """As in `blockdiff eval`: auto, count, complement, bernoulli, exact, ..."""
    samples: int = 4
    """Independent draws of the masks; auto enumerates where that takes no more copies."""
    orders: int = 8
    """K of the K-order bound, for the estimator orders."""

    def __post_init__(self) -> None:
        check_limits(self, "eval.")


@dataclass(frozen=True, kw_only=True, slots=True)
class SampleOptions:
    """Samples during training."""

    every: int | None = 1000
    """Steps between two sets of samples; null: never."""
    num: int = 1
    max_new_tokens: int = 64

    def __post_init__(self) -> None:
        check_limits(self, "sample.")


@dataclass(frozen=True, kw_only=True, slots=True)
class Recipe:
    """Everything that a training run depends on."""

    out: str
    """Directory of the run."""
    data: DataOptions
    model: ModelOptions = field(default_factory=ModelOptions)
    objective: ObjectiveOptions = field(default_factory=ObjectiveOptions)
    search: SearchOptions = field(default_factory=SearchOptions)
    train: TrainOptions
    optim: OptimOptions = field(default_factory=OptimOptions)
    eval: EvalOptions = field(default_factory=EvalOptions)
    sample: SampleOptions = field(default_factory=SampleOptions)
    checkpoint: CheckpointOptions = field(default_factory=CheckpointOptions)
    log: LogOptions = field(default_factory=LogOptions)

    def __post_init__(self) -> None:
        if self.search.every is not None:
            check_objective(self.objective)
        size = self.model.block_size
        if self.objective.name == "ar":
            self._check_autoregressive()
            size = 1
        elif size is None and self.objective.name != "mdlm":  # which waits for the data's L
            size = USUAL_BLOCK_SIZE
        object.__setattr__(self, "model", replace(self.model, block_size=size))

    def _check_autoregressive(self) -> None:
        usual = ModelOptions(block_size=USUAL_BLOCK_SIZE)
        for name in ("block_size", "cond_dim", "clean_attention"):
            value, default = getattr(self.model, name), getattr(usual, name)
            stored = 1 if name == "block_size" else default
            if value is None:
                continue
            if value not in (default, stored):
                raise UserError(
                    f"model.{name} is {value}, but objective.name is ar, whose network has no "
                    f"blocks and no conditioning; set model.{name}={stored}"
                )
        if self.eval.estimator not in ("auto", "exact"):
            raise UserError(
                f"eval.estimator is {self.eval.estimator}, but objective.name is ar, whose "
                "likelihood is exact; set eval.estimator=auto"
            )


MOST_NAMES = 20  # sources that a model card names

# What a resumed run may change: nothing here touches the weights. (Data that were moved are
# recognised by their fingerprint.)
CHANGEABLE = ("out", "data.path", "eval.", "sample.", "checkpoint.", "log.", "train.parallel")


# --- Reading --------------------------------------------------------------------------------------


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Reads a YAML recipe; each of `overrides` is `section.key=value` and wins over the file.

    Raises:
        UserError: the file cannot be read, a key is unknown, or a value is not allowed.
    """
    tree = read_yaml(Path(path), "mend it, or give another recipe")
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals or not key:
            raise UserError(f"{shown(override)} is no override; write section.key=value")
        *sections, name = key.split(".")
        place = tree
        for section in sections:
            place = place.setdefault(section, {})
            if not isinstance(place, dict):
                raise UserError(f"{shown(override)}: {section} is a value, not a section")
        place[name] = Typed(text)
    with of_file(Path(path), ""):
        return build(Recipe, tree)


def to_dict(recipe: Recipe) -> dict[str, Any]:
    """The recipe as nested plain values: what `config.yaml` and checkpoints hold."""
    return _plain(asdict(recipe))


def differences(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[str]:
    """The dotted keys whose values differ between two recipes given as nested mappings."""
    flat_before, flat_after = dict(_flatten(before)), dict(_flatten(after))
    keys = [*flat_before, *(key for key in flat_after if key not in flat_before)]
    return [key for key in keys if flat_before.get(key, MISSING) != flat_after.get(key, MISSING)]


def _plain(value: Any) -> Any:
    """Tuples become lists, as YAML and JSON have them."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value


def _flatten(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from _flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


# --- From a recipe to a run -----------------------------------------------------------------------


def with_block_size(recipe: Recipe, manifest: Manifest) -> Recipe:
    """The recipe with the block size that the data's L decides where there is a choice.

    Raises:
        UserError: the block size does not divide L, or is not L for `mdlm`.
    """
    size, length = recipe.model.block_size, manifest.seq_len
    if recipe.objective.name == "mdlm":
        if size not in (None, length):
            raise UserError(
                f"model.block_size is {size}, but objective.name is mdlm, whose block is the whole "
                f"row of {length} tokens; set model.block_size=null, or objective.name=bd3lm"
            )
        size = length
    assert size is not None
    if length % size:
        raise UserError(
            f"model.block_size is {size}, which does not divide the {length} tokens of a row of "
            f"{recipe.data.path}; choose a divisor"
        )
    return replace(recipe, model=replace(recipe.model, block_size=size))


def network_config(recipe: Recipe, manifest: Manifest) -> BlockDiffusionConfig:
    """The configuration of a network of the recipe's sizes for the data's L and vocabulary.

    Raises:
        UserError: see `with_block_size`.
    """
    from blockdiffusion.models.transformer import BlockDiffusionConfig

    sizes: dict[str, Any] = asdict(with_block_size(recipe, manifest).model)
    del sizes["init_from"]
    return BlockDiffusionConfig(
        **sizes,
        **recipe.objective.of_network,
        vocab_size=manifest.vocab_size,
        seq_len=manifest.seq_len,
        mask_id=manifest.mask_id,
        bos=manifest.row_bos,
        bos_id=manifest.bos_id,
        eos_id=manifest.eos_id,
    )


def build_model(recipe: Recipe, manifest: Manifest) -> BlockDiffusionModel:
    """That network. Its weights are random, a function of `train.seed`.

    Raises:
        UserError: see `with_block_size`.
    """
    import torch

    from blockdiffusion.models.transformer import BlockDiffusionModel
    from blockdiffusion.runtime.seeding import seed_global

    config = network_config(recipe, manifest)
    weights, ids = Network.of(config).parameters, recipe.train.batch_size * config.seq_len
    check_memory(
        4.0 * weights + 8.0 * ids,  # the least there is: shards may leave the rest to others
        f"training {weights:,} parameters on {ids:,} tokens an update",
        "lower model.width, model.num_layers or train.batch_size",
    )
    with torch.random.fork_rng(devices=[]):
        seed_global(recipe.train.seed, "weights")
        return BlockDiffusionModel(config)


def run_training(
    recipe: Recipe, *, resume: bool = False, resume_command: str | None = None
) -> TrainState:
    """Trains as the recipe says, with a display on standard error; see `train.loop.train`.

    Started by torchrun, the processes share the work; the first of them logs and writes.

    Args:
        resume: go on with the run in `recipe.out`; the recipe may differ from the run's in
            `out`, `data.path`, `eval`, `sample`, `checkpoint`, `log` and `train.parallel`, and in
            `train.steps` where the learning rate does not depend on it.
        resume_command: what an interrupted run tells its user to type; by default a command that
            resumes from the run's own config.yaml.

    Raises:
        UserError: see `train.loop.train`; and the recipe is not the one of the run to resume.
        Elsewhere: another process of the job ended.
    """
    with joined() as team:
        return _run_training(recipe, team, resume, resume_command)


def _run_training(
    recipe: Recipe, team: Team, resume: bool, resume_command: str | None
) -> TrainState:
    from blockdiffusion.data.loader import TokenRows
    from blockdiffusion.data.manifest import TOKENIZER_FOLDER
    from blockdiffusion.data.tokenizers import load_tokenizer
    from blockdiffusion.reports.terminal import progress_bar
    from blockdiffusion.train.display import make_display
    from blockdiffusion.train.loggers import make_loggers
    from blockdiffusion.train.loop import train

    out, data = Path(recipe.out), Path(recipe.data.path)
    with progress_bar("data", quiet=not team.is_first) as report:
        rows = TokenRows(data, "train", report)
    recipe = with_block_size(recipe, rows.manifest)
    if resume:
        _refuse_changes(recipe, out / "config.yaml")
    model = build_model(recipe, rows.manifest)
    tokenizer = data / TOKENIZER_FOLDER
    model.tokenizer = load_tokenizer(tokenizer)  # for samples
    notes = []
    if recipe.model.init_from is not None and not (resume and latest(out)):
        notes.append(_start_weights(recipe.model.init_from, out, model))
    saved = shlex.quote(str(out / "config.yaml"))
    loggers = [make_display(recipe.train.steps), *make_loggers(recipe.log, out)]
    return train(
        model,
        rows,
        out=out,
        options=recipe.train,
        objective=recipe.objective,
        optim=recipe.optim,
        checkpoint=recipe.checkpoint,
        search=_search(recipe, data, rows.manifest, model.config.block_size, team),
        periodic=[
            *_evaluation(recipe, data, rows.manifest, model.config, team),
            *_sampling(recipe, team),
        ],
        loggers=loggers if team.is_first else [],
        tokenizer=tokenizer,
        describe=lambda state: _card(recipe, rows.manifest, state),
        config=to_dict(recipe),
        notes=notes,
        resume=resume,
        resume_command=resume_command or f"blockdiff train {saved} --resume",
        team=team,
    )


def _start_weights(init_from: str, out: Path, model: BlockDiffusionModel) -> str:
    """Copies the weights in; returns what to tell about it."""
    from blockdiffusion.checkpoints.formats import copy_weights

    if Path(init_from).resolve() in (out.resolve(), (out / "model").resolve()):
        raise UserError(
            f"model.init_from and out are both {out}; choose another out=... for the new run"
        )
    copy_weights(init_from, model)
    return f"started from the weights in {init_from}"


def _refuse_changes(recipe: Recipe, saved: Path) -> None:
    if not saved.exists():
        return  # `train` says what is missing
    changed = differences(to_dict(load_recipe(saved)), to_dict(recipe))
    changed = [key for key in changed if not key.startswith(CHANGEABLE)]
    if recipe.optim.schedule == "constant":
        changed = [key for key in changed if key != "train.steps"]
    if changed:
        keys = ", ".join(changed)
        why = " (the learning rate depends on it)" if changed == ["train.steps"] else ""
        raise UserError(
            f"the run in {saved.parent} was started with another {keys}{why}; resume with its own "
            f"{saved}, or choose another out=... for a new run"
        )


def _search(
    recipe: Recipe, data: Path, manifest: Manifest, block_size: int, team: Team
) -> ScheduleSearch | None:
    if recipe.search.every is None:
        return None
    from blockdiffusion.data.loader import TokenRows
    from blockdiffusion.train.schedule_search import ScheduleSearch

    if "valid" not in manifest.splits:
        raise UserError(f"{data} has no validation rows; set search.every=null to train without")
    return ScheduleSearch(
        recipe.search,
        recipe.objective,
        TokenRows(data, "valid"),
        block_size,
        recipe.train.seed,
        team,
    )


def _evaluation(
    recipe: Recipe, data: Path, manifest: Manifest, network: Any, team: Team
) -> list[Periodic]:
    """The validation bound, with the same masks at every evaluation: less noise in the curve."""
    if recipe.eval.every is None:
        return []
    import numpy as np

    from blockdiffusion.data.loader import TokenRows
    from blockdiffusion.evaluate.likelihood import choose_estimator, likelihood
    from blockdiffusion.evaluate.prepared import evaluation_facts
    from blockdiffusion.runtime.seeding import generator
    from blockdiffusion.train.loop import Periodic

    if "valid" not in manifest.splits:
        raise UserError(f"{data} has no validation rows; set eval.every=null to train without")
    choose_estimator(recipe.eval.estimator, network)  # now, not at the first evaluation
    rows = TokenRows(data, "valid")
    batch = rows.rows(np.arange(min(rows.num_rows, recipe.eval.rows or rows.num_rows)))

    def evaluate(model: Any) -> dict[str, Any]:
        result = likelihood(
            model,
            batch.ids_BL,
            estimator=recipe.eval.estimator,
            samples=recipe.eval.samples,
            orders=recipe.eval.orders,
            valid=batch.valid_BL,
            generator=generator(recipe.train.seed, "evaluate"),
            team=team,
        )
        tighter = {
            "valid_exact": result.exact_nats_per_token,
            "valid_orders": result.orders_nats_per_token,
        }
        return {
            "valid_bound": result.nats_per_token,
            "valid_stderr_noise": result.stderr_noise,
            "valid_stderr_data": result.stderr_data,
            "valid_perplexity_bound" if result.is_bound else "valid_perplexity": result.perplexity,
            **{name: value for name, value in tighter.items() if value is not None},
            "evaluation": evaluation_facts(result, manifest, data, "valid", seed=recipe.train.seed),
        }

    return [Periodic(every=recipe.eval.every, run=evaluate)]


def _card(recipe: Recipe, manifest: Manifest, state: TrainState) -> Card:
    """What the card of the run's released model says."""
    from blockdiffusion.checkpoints.card import Card, public_name, read_card

    sections = {name: to_dict(recipe)[name] for name in ("model", "objective", "train", "optim")}
    init_from = recipe.model.init_from
    sections["model"]["init_from"] = None if init_from is None else public_name(init_from)
    # What is of this machine tells nobody anything.
    memory = ("micro_batch_size", "activation_checkpointing", "parallel")
    for name in ("steps", "device", "threads", "compile", *memory):
        del sections["train"][name]
    names = [
        Path(source["name"]).name if "size" in source else source["name"].partition(":")[0]
        for source in manifest.sources
    ]
    before = read_card(Path(recipe.out) / "model")
    return Card(
        name=Path(recipe.out).resolve().name,
        notes=None if before is None else before.notes,  # written by hand
        training={"steps": state.step, **sections},
        datasets=list(dict.fromkeys(names))[:MOST_NAMES],
        evaluation=state.evaluation,
    )


def _sampling(recipe: Recipe, team: Team) -> list[Periodic]:
    if recipe.sample.every is None:
        return []
    from blockdiffusion.runtime.seeding import generator
    from blockdiffusion.sampling import generate
    from blockdiffusion.train.loop import Periodic

    def sample(model: Any) -> dict[str, list[str]]:
        if not team.is_first:
            return {}
        result = generate(
            model,
            num_samples=recipe.sample.num,
            max_new_tokens=recipe.sample.max_new_tokens,
            generator=generator(recipe.train.seed, "sample"),
        )
        return {"samples": result.texts or []}

    return [Periodic(every=recipe.sample.every, run=sample)]
