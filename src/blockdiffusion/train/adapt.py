"""From a causal language model to the block diffusion model that a recipe adapts it to."""

from __future__ import annotations

from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from blockdiffusion.checkpoints.causal_lm import (
    FAMILIES,
    known_mask_id,
    network_on_meta,
    read_network,
    read_tokenizer,
    section_of,
    start_token_id,
    trained_with,
)
from blockdiffusion.checkpoints.formats import find_causal_lm
from blockdiffusion.data.manifest import TOKENIZER_FOLDER
from blockdiffusion.data.tokenizers import load_tokenizer
from blockdiffusion.diffusion.config import DiffusionConfig
from blockdiffusion.errors import UserError, shown
from blockdiffusion.models.causal_lm import AdaptedModel, adapted_model, num_embeddings
from blockdiffusion.models.lora import add_lora, fingerprint
from blockdiffusion.runtime.seeding import seed_global
from blockdiffusion.train.recipe import with_block_size

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from blockdiffusion.data.manifest import Manifest
    from blockdiffusion.train.options import AdaptOptions
    from blockdiffusion.train.recipe import Recipe

MEAN = "mean"


def adapted_for(recipe: Recipe, manifest: Manifest) -> AdaptedModel:
    """Read the parent of a recipe, give it a mask token, and make it a block diffusion model.

    With causal clean tokens its autoregressive reading is the parent's, exactly, before training.

    Raises:
        UserError: the parent cannot be read, is no causal model or one that cannot be adapted; the
            data were prepared with another tokenizer.
    """
    options = recipe.adapt
    assert options.parent is not None
    path, raw = find_causal_lm(options.parent)
    tokenizer = load_tokenizer(Path(recipe.data.path) / TOKENIZER_FOLDER)
    parents = read_tokenizer(path)
    _check_tokenizers(parents, tokenizer, options.parent, recipe.data.path)
    _check_conventions(trained_with(path, raw), options)
    network = read_network(path, raw, torch.float32)
    digest = fingerprint(network) if options.lora_rank else ""
    if section_of(path, raw) is None:
        copied = _copied_row(options, parents)
        if copied is None and raw.get("model_type") in FAMILIES:  # it was trained with a mask token
            copied = known_mask_id(raw, network, parents)
        _add_mask(network, manifest.mask_id, copied)
    return _adapted(recipe, manifest, network, digest, parents, tokenizer)


def adapted_on_meta(recipe: Recipe, manifest: Manifest) -> AdaptedModel:
    """Return the model of `adapted_for` on PyTorch's device `meta`: names and shapes only. Only the
    parent's configuration is read.

    Raises:
        UserError: see `adapted_for`.
    """
    assert recipe.adapt.parent is not None
    path, raw = find_causal_lm(recipe.adapt.parent)
    network = network_on_meta(path, raw)
    if manifest.mask_id >= num_embeddings(network):
        network.resize_token_embeddings(manifest.mask_id + 1, mean_resizing=False)
    return _adapted(recipe, manifest, network, "")


def _adapted(
    recipe: Recipe,
    manifest: Manifest,
    network: PreTrainedModel,
    digest: str,
    parents: Any = None,
    tokenizer: Any = None,
) -> AdaptedModel:
    """Return the model around a network that has a mask token.

    Args:
        digest: the fingerprint of the parent's weights.
        parents, tokenizer: that of the parent, and that of the data.
    """
    options, size = recipe.adapt, with_block_size(recipe, manifest).model.block_size
    assert options.parent is not None and size is not None
    adapters = None
    if options.lora_rank:
        is_local = Path(options.parent).exists()
        with torch.random.fork_rng(devices=[]):
            seed_global(recipe.train.seed, "weights")
            adapters = add_lora(
                network,
                rank=options.lora_rank,
                alpha=options.lora_alpha,
                dropout=options.lora_dropout,
                mask_id=manifest.mask_id,
                parent=str(Path(options.parent).resolve()) if is_local else options.parent,
                fingerprint=digest,
            )
    _freeze(network, options)
    config = DiffusionConfig(
        vocab_size=num_embeddings(network),
        seq_len=manifest.seq_len,
        block_size=size,
        mask_id=manifest.mask_id,
        clean_attention=options.clean_attention,
        block_attention=options.block_attention,
        reading=options.reading,
        start_id=start_token_id(parents, network.config) if options.reading == "next" else None,
        bos=manifest.row_bos,
        bos_id=manifest.bos_id,
        eos_id=manifest.eos_id,
    )
    return adapted_model(network, config, tokenizer, adapters)


def _check_tokenizers(parents: Any, of_data: Any, parent: str, data: str) -> None:
    """Refuse data of another tokenizer than the parent's; the data's has a mask token more."""
    if parents is None:
        return
    own, vocabulary = parents.get_vocab(), of_data.get_vocab()
    without_mask = {t: i for t, i in vocabulary.items() if t != of_data.mask_token}
    if own not in (vocabulary, without_mask):
        raise UserError(
            f"{data} was prepared with another tokenizer than that of {parent}; prepare the data "
            f"with --tokenizer {parent}"
        )


def _check_conventions(before: dict[str, str], options: AdaptOptions) -> None:
    """Refuse another reading or attention than that of a parent that is a block diffusion model."""
    for name, found in before.items():
        wanted = getattr(options, name)
        if found != wanted:
            raise UserError(
                f"adapt.{name} is {wanted}, but {options.parent} was trained with {found!r}; "
                f"set adapt.{name}={found}"
            )


def _copied_row(options: AdaptOptions, tokenizer: Any) -> int | None:
    """Return the id whose row the mask token copies; None: the mean of all rows."""
    if options.mask == MEAN:
        return None
    found = {} if tokenizer is None else tokenizer.get_vocab()
    if options.mask not in found:
        raise UserError(
            f"adapt.mask is {shown(options.mask)}, which is no token of {options.parent}; give "
            "mean, or one of its tokens"
        )
    return found[options.mask]


def _add_mask(network: PreTrainedModel, mask_id: int, copied: int | None) -> None:
    """Set the rows of the mask token, which may be new or a row of padding: the mean of those of
    real tokens, or a copy."""
    before = [table.detach().clone() for table in _tables(network)]
    if mask_id >= len(before[0]):
        network.resize_token_embeddings(mask_id + 1, mean_resizing=False)
    with torch.no_grad():
        for table, old in zip(_tables(network), before, strict=True):
            table[mask_id] = old[:mask_id].mean(0) if copied is None else old[copied]


def _freeze(network: PreTrainedModel, options: AdaptOptions) -> None:
    """Let the parameters of `adapt.freeze` keep their values."""
    named = dict(network.named_parameters())
    for pattern in options.freeze:
        found = [name for name in named if fnmatchcase(name, pattern)]
        if not found:
            raise UserError(
                f"adapt.freeze has {shown(pattern)}, which matches no parameter of "
                f"{options.parent}; its first is {next(iter(named))}"
            )
        for name in found:
            named[name].requires_grad_(False)
    if not any(parameter.requires_grad for parameter in named.values()):
        raise UserError("adapt.freeze matches all parameters, so nothing is trained; freeze less")


def _tables(network: PreTrainedModel) -> list[torch.Tensor]:
    """Return the weights of the embeddings and, if it is not the same, of the output layer."""
    layers: list[Any] = [network.get_input_embeddings(), network.get_output_embeddings()]
    weights = [layer.weight for layer in layers]
    return weights[:1] if weights[0] is weights[1] else weights
