"""Recipes: YAML files and `section.key=value` overrides, read strictly into frozen dataclasses.

Nothing is guessed or dropped: an unknown key is refused with the nearest known one, a value of the
wrong type with the allowed ones. The resolved recipe is saved with the run, and is itself a recipe.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import MISSING, asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from blockdiffusion.errors import UserError, shown
from blockdiffusion.evaluate.options import MC_SAMPLES, LikelihoodOptions
from blockdiffusion.files.records import Damaged, Typed, build, of_file, read_yaml
from blockdiffusion.limits import check_limits
from blockdiffusion.options import REQUIRED, option
from blockdiffusion.runtime.hardware import check_memory
from blockdiffusion.train.checkpoint import CheckpointOptions
from blockdiffusion.train.loggers import LogOptions
from blockdiffusion.train.optim import OptimOptions
from blockdiffusion.train.options import AdaptOptions, ObjectiveOptions, TrainOptions
from blockdiffusion.train.schedule_search import SearchOptions, check_objective

if TYPE_CHECKING:
    from blockdiffusion.data.manifest import Manifest
    from blockdiffusion.models.block_diffusion import BlockDiffusion
    from blockdiffusion.models.transformer import BlockDiffusionConfig

USUAL_BLOCK_SIZE = 4


@dataclass(frozen=True, kw_only=True, slots=True)
class DataOptions:
    """The prepared data."""

    path: str = option(
        REQUIRED,
        "directory that blockdiff prepare made; it decides L, V, the mask and the BOS convention",
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelOptions:
    """The network; the defaults are the paper's. See `BlockDiffusionConfig`."""

    num_hidden_layers: int = option(12, "layers", was="num_layers")
    hidden_size: int = option(768, "width; a multiple of 2 · num_attention_heads", was="width")
    num_attention_heads: int = option(12, "attention heads", was="num_heads")
    cond_dim: int = option(128, "width of the conditioning that modulates the layers (adaLN)")
    block_size: int | None = option(
        None,
        "S, tokens of a diffusion block; divides L. 1 is autoregressive, L is plain diffusion. "
        "null: 4, and L for objective.name: mdlm, which allows no other. ar has no blocks: leave "
        "it out, the run stores 1",
    )
    dropout: float = option(0.1, "dropout in training")
    clean_attention: Literal["block", "causal"] = option(
        "block",
        "how clean tokens see each other: by whole blocks (paper) or causally token by token",
    )
    init_from: str | None = option(
        None,
        "start from the weights of this run or model directory (or Hugging Face id, or Lightning "
        "file) of the same sizes; null: random weights",
    )

    def __post_init__(self) -> None:
        check_limits(self, "model.")
        if self.hidden_size % (2 * self.num_attention_heads):
            raise UserError(
                f"model.hidden_size is {self.hidden_size}; it must be a multiple of 2 * "
                f"model.num_attention_heads, which is {2 * self.num_attention_heads}"
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class EvalOptions(LikelihoodOptions):
    """The validation bound during training."""

    PREFIX: ClassVar[str] = "eval."

    mc_samples: int = option(4, MC_SAMPLES, was="samples")
    every: int | None = option(
        1000, "steps between two evaluations, and one after the last step; null: never"
    )
    rows: int | None = option(256, "validation rows to score, the first ones; null: all")


@dataclass(frozen=True, kw_only=True, slots=True)
class SampleOptions:
    """Samples during training."""

    every: int | None = option(
        1000, "steps between two sets, and one after the last step; null: never"
    )
    num: int = option(1, "number of samples in a set")
    max_new_tokens: int = option(64, "tokens of a sample")

    def __post_init__(self) -> None:
        check_limits(self, "sample.")


@dataclass(frozen=True, kw_only=True, slots=True)
class Recipe:
    """Everything that a training run depends on."""

    out: str = option(REQUIRED, "directory of the run, made if needed")
    data: DataOptions
    model: ModelOptions = field(default_factory=ModelOptions)
    adapt: AdaptOptions = field(default_factory=AdaptOptions)
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
        if self.objective.is_autoregressive:
            self._check_autoregressive()
            size = 1
        elif size is None and not self.objective.has_one_block:  # which waits for the data's L
            size = USUAL_BLOCK_SIZE
        object.__setattr__(self, "model", replace(self.model, block_size=size))
        self._check_adapted()

    def _check_adapted(self) -> None:
        """Refuse what an adapted model does not read, and what only one reads."""
        if self.adapt.parent is None:
            changed, usual, why = self.adapt, AdaptOptions(), "adapt.parent is null"
            section = "adapt"
        else:
            changed, usual, why = self.model, ModelOptions(), "the network is that of adapt.parent"
            section = "model"
            if not self.objective.is_adaptable:
                raise UserError(
                    f"objective.name is {self.objective.name}, but adapt.parent is given; causal "
                    "models are adapted to masked diffusion: set objective.name=bd3lm"
                )
        if self.adapt.lora_rank and self.train.parallel == "fsdp":
            raise UserError(
                "adapt.lora_rank is given, but train.parallel is fsdp, which shards all weights "
                "alike; set train.parallel=ddp"
            )
        for item in fields(usual):
            value = getattr(changed, item.name)
            if item.name not in ("parent", "block_size") and value != getattr(usual, item.name):
                raise UserError(f"{section}.{item.name} is {value}, but {why}; leave it out")

    def _check_autoregressive(self) -> None:
        usual = ModelOptions()
        for name, stored, allowed in (
            ("block_size", 1, (None, 1, USUAL_BLOCK_SIZE)),
            ("cond_dim", usual.cond_dim, (usual.cond_dim,)),
            ("clean_attention", usual.clean_attention, (usual.clean_attention,)),
        ):
            if (value := getattr(self.model, name)) not in allowed:
                raise UserError(
                    f"model.{name} is {value}, but objective.name is {self.objective.name}, whose "
                    f"network has no blocks and no conditioning; set model.{name}={stored}"
                )
        if self.eval.estimator not in ("auto", "exact"):
            raise UserError(
                f"eval.estimator is {self.eval.estimator}, but objective.name is "
                f"{self.objective.name}, whose likelihood is exact; set eval.estimator=auto"
            )


# --- Reading --------------------------------------------------------------------------------------


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read a YAML recipe; each of `overrides` is `section.key=value` and wins over the file.

    Raises:
        UserError: the file cannot be read, a key is unknown, or a value is not allowed.
    """
    tree = read_yaml(Path(path), "fix it, or give another recipe")
    _override(tree, overrides)
    with of_file(Path(path), ""):
        return build(Recipe, tree)


def recipe_of(overrides: Sequence[str]) -> Recipe:
    """Return the recipe of `section.key=value` alone; of several for a key the last counts.

    Raises:
        UserError: a key is unknown or missing, or a value is not allowed.
    """
    tree: dict[str, Any] = {}
    _override(tree, overrides)
    try:
        return build(Recipe, tree)
    except Damaged as error:
        raise UserError(str(error)) from error


def _override(tree: dict[str, Any], overrides: Sequence[str]) -> None:
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


def to_dict(recipe: Recipe) -> dict[str, Any]:
    """Return the recipe as nested plain values, as in `config.yaml` and checkpoints."""
    return json.loads(json.dumps(asdict(recipe)))  # with lists instead of tuples


def differences(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[str]:
    """Return the dotted keys whose values differ between two recipes given as nested mappings."""
    flat_before, flat_after = dict(_flatten(before)), dict(_flatten(after))
    keys = [*flat_before, *(key for key in flat_after if key not in flat_before)]
    return [key for key in keys if flat_before.get(key, MISSING) != flat_after.get(key, MISSING)]


def _flatten(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from _flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


# --- From a recipe to a run -----------------------------------------------------------------------


def with_block_size(recipe: Recipe, manifest: Manifest) -> Recipe:
    """Return the recipe with its block size, which the data's L may decide.

    Raises:
        UserError: the block size does not divide L, or is not L for an objective of one block.
    """
    size, length = recipe.model.block_size, manifest.seq_len
    if recipe.objective.has_one_block:
        if size not in (None, length):
            raise UserError(
                f"model.block_size is {size}, but objective.name is {recipe.objective.name}, whose "
                f"block is the whole row of {length} tokens; set model.block_size=null, or "
                "objective.name=bd3lm"
            )
        size = length
    assert size is not None
    grown = recipe.train.block_sizes
    if grown and (recipe.objective.is_autoregressive or recipe.objective.has_one_block):
        raise UserError(
            f"train.block_sizes is {list(grown)}, but objective.name is {recipe.objective.name}, "
            "which has one block size; leave it out"
        )
    if grown and grown[-1] != size:
        raise UserError(
            f"train.block_sizes is {list(grown)}, but model.block_size is {size}; the last of them "
            "must be equal"
        )
    if length % size:
        raise UserError(
            f"model.block_size is {size}, which does not divide the {length} tokens of a row of "
            f"{recipe.data.path}; choose a divisor"
        )
    return replace(recipe, model=replace(recipe.model, block_size=size))


def network_config(recipe: Recipe, manifest: Manifest) -> BlockDiffusionConfig:
    """Return the configuration of a network of the recipe's sizes for the data's L and vocabulary.

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


def build_model(recipe: Recipe, manifest: Manifest) -> BlockDiffusion:
    """Build that network with random weights, a function of `train.seed`."""
    import torch

    from blockdiffusion.models.transformer import BlockDiffusionModel, count_parameters
    from blockdiffusion.runtime.seeding import seed_global

    config = network_config(recipe, manifest)
    weights = count_parameters(config)
    ids = recipe.train.batch_size * config.seq_len
    check_memory(
        4.0 * weights + 8.0 * ids,  # the least there is: shards may leave the rest to others
        f"training {weights:,} parameters on {ids:,} tokens an update",
        "lower model.hidden_size, model.num_hidden_layers or train.batch_size",
    )
    with torch.random.fork_rng(devices=[]):
        seed_global(recipe.train.seed, "weights")
        return BlockDiffusionModel(config)
