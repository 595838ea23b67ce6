"""Recipes: YAML files and `section.key=value` overrides, read strictly into frozen dataclasses.

Nothing is guessed and nothing is dropped: an unknown key is refused with the nearest known one, a
value of the wrong type with what is allowed. The resolved recipe is saved with the run, and is
itself a recipe.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import MISSING, asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from blockdiffusion.errors import UserError, shown
from blockdiffusion.evaluate.options import MC_SAMPLES, LikelihoodOptions
from blockdiffusion.files.records import Typed, build, of_file, read_yaml
from blockdiffusion.limits import check_limits
from blockdiffusion.options import option
from blockdiffusion.runtime.hardware import check_memory
from blockdiffusion.train.checkpoint import CheckpointOptions
from blockdiffusion.train.loggers import LogOptions
from blockdiffusion.train.optim import OptimOptions
from blockdiffusion.train.options import ObjectiveOptions, TrainOptions
from blockdiffusion.train.schedule_search import SearchOptions, check_objective

if TYPE_CHECKING:
    from blockdiffusion.data.manifest import Manifest
    from blockdiffusion.models.transformer import BlockDiffusionConfig, BlockDiffusionModel

USUAL_BLOCK_SIZE = 4


@dataclass(frozen=True, kw_only=True, slots=True)
class DataOptions:
    """The prepared data."""

    path: str
    """Directory that `blockdiff prepare` made; it decides L and the vocabulary."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelOptions:
    """The network; the defaults are the paper's. See `BlockDiffusionConfig`."""

    num_hidden_layers: int = option(12, "layers", was="num_layers")
    hidden_size: int = option(768, "width of the layers", was="width")
    num_attention_heads: int = option(12, "attention heads of a layer", was="num_heads")
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
        if self.hidden_size % (2 * self.num_attention_heads):
            raise UserError(
                f"model.hidden_size is {self.hidden_size}; it must be a multiple of 2 * "
                f"model.num_attention_heads, which is {2 * self.num_attention_heads}"
            )
        if not 0 <= self.dropout < 1:
            raise UserError(f"model.dropout is {self.dropout}; it must be in [0, 1)")


@dataclass(frozen=True, kw_only=True, slots=True)
class EvalOptions(LikelihoodOptions):
    """The validation bound during training."""

    PREFIX: ClassVar[str] = "eval."

    mc_samples: int = option(4, MC_SAMPLES, was="samples")
    every: int | None = 1000
    """Steps between two evaluations; null: never. The last step is always evaluated otherwise."""
    rows: int | None = 256
    """Validation rows that are scored, the first ones; null: all."""


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
        if self.objective.is_autoregressive:
            self._check_autoregressive()
            size = 1
        elif size is None and not self.objective.has_one_block:  # which waits for the data's L
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
    if recipe.objective.has_one_block:
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

    from blockdiffusion.models.meta import count_parameters
    from blockdiffusion.models.transformer import BlockDiffusionModel
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
