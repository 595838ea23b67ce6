"""The authors' Lightning checkpoints (`last.ckpt`), read without running what is pickled in them.

Such a file holds the trained weights (`state_dict`), their moving average (`ema`, a list in the
order of the parameters), optimizer and loop states, and in `hyper_parameters` the run's omegaconf
configuration and its tokenizer. The sizes of the network come from the shapes of the tensors, from
the configuration if it can be read, and from `LightningOptions` for the rest.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard

import torch

from blockdiffusion.checkpoints.bd3lm import BD3LM_IGNORED, ROTARY, our_name
from blockdiffusion.checkpoints.options import KINDS, LightningOptions, Weights, flag
from blockdiffusion.checkpoints.settings import Settings
from blockdiffusion.checkpoints.unpickling import Archive, StoredTensor
from blockdiffusion.errors import UserError, shown
from blockdiffusion.models.transformer import BlockDiffusionConfig

COMPILED = "_orig_mod."  # in the names of a network that torch.compile wrapped


@dataclass(frozen=True, kw_only=True)
class LightningFile:
    """The contents of a file.

    Attributes:
        config: sizes and conventions of the network.
        state: its tensors, under our names.
        kind: the authors' algo.name.
        weights: which of the two sets of weights `state` is.
        steps: number of updates, if recorded.
        data: the authors' name of the training data, if recorded.
        tokenizer: the tokenizer's JSON, if there is one.
    """

    config: BlockDiffusionConfig
    state: dict[str, torch.Tensor]
    kind: str
    weights: Weights
    steps: int | None
    data: str | None
    tokenizer: str | None


def read_lightning(path: Path, options: LightningOptions | None = None) -> LightningFile:
    """Read a `last.ckpt` of the authors' code without running anything in it.

    Raises:
        UserError: the file is damaged or no such checkpoint, its average does not fit its weights,
            or a size can be deduced neither from it nor from the options.
    """
    options = options or LightningOptions()
    with Archive(path) as archive:
        content = archive.content if isinstance(archive.content, dict) else {}
        trained = _trained(content.get("state_dict"), path)
        chosen = _averaged(content, trained, path) if options.weights == "ema" else trained
        chosen = {our_name(n): stored for n, stored in chosen.items() if n not in BD3LM_IGNORED}
        settings = Settings(content.get("hyper_parameters"))
        shapes = {name: stored.shape for name, stored in chosen.items()}
        rotary = trained[ROTARY].shape if ROTARY in trained else None
        kind, config = _configuration(shapes, rotary, settings, options, path)
        state = {name: archive.tensor(stored) for name, stored in chosen.items()}
    steps = content.get("global_step")
    return LightningFile(
        config=config,
        state=state,
        kind=kind,
        weights=options.weights,
        steps=steps if type(steps) is int else None,
        data=settings.value("data.train", str),
        tokenizer=settings.tokenizer,
    )


# --- Tensors --------------------------------------------------------------------------------------


def _trained(state_dict: Any, path: Path) -> dict[str, StoredTensor]:
    """The tensors of `state_dict`, including buffers, by their names in the uncompiled network."""
    if not isinstance(state_dict, dict) or not state_dict:
        raise UserError(
            f"{path} holds no state_dict, so it is no Lightning checkpoint; "
            "give the authors' last.ckpt"
        )
    found = {}
    for name, stored in state_dict.items():
        if not isinstance(name, str) or not _is_tensor(stored):
            raise UserError(
                f"{path}: {shown(name)} in its state_dict is no tensor that can be read; "
                "only plain tensors are"
            )
        found[name.replace(COMPILED, "")] = stored
    return found


def _averaged(
    content: Mapping[str, Any], trained: Mapping[str, StoredTensor], path: Path
) -> dict[str, StoredTensor]:
    """The moving average by name. The file has a list in the order of the parameters."""
    average = content.get("ema")
    averages = average.get("shadow_params") if isinstance(average, dict) else None
    if not isinstance(averages, list):
        raise UserError(
            f"{path} holds no moving average (ema); take the weights as trained by --weights raw"
        )
    names = [name for name in trained if name not in BD3LM_IGNORED]
    if len(averages) != len(names):
        raise UserError(
            f"{path}: its moving average has {len(averages)} tensors, but its state_dict has "
            f"{len(names)} parameters, so it cannot be told which is which; take the weights as "
            "trained by --weights raw"
        )
    for name, stored in zip(names, averages, strict=True):
        shape = stored.shape if _is_tensor(stored) else None
        if shape != trained[name].shape:
            raise UserError(
                f"{path}: the moving average of {name} has shape {shape}, but the parameter has "
                f"{trained[name].shape}; take the weights as trained by --weights raw"
            )
    return dict(zip(names, averages, strict=True))


def _is_tensor(stored: Any) -> TypeGuard[StoredTensor]:
    return isinstance(stored, StoredTensor) and stored.is_sound()


# --- Sizes ----------------------------------------------------------------------------------------


def _configuration(
    shapes: Mapping[str, tuple[int, ...]],
    rotary: tuple[int, ...] | None,
    settings: Settings,
    options: LightningOptions,
    path: Path,
) -> tuple[str, BlockDiffusionConfig]:
    """The kind and the sizes of the network, from tensors, configuration and options."""
    sizes = _sizes_of_tensors(shapes, rotary, path)
    sizes |= _agreed_sizes(sizes, settings, options, path)
    kind_name = sizes.pop("kind")
    kind = KINDS[kind_name]
    if sizes["adaln"] and not kind.has_adaln:
        raise UserError(
            f"{path} has a time embedding, which the network of {kind_name} does not use; its kind "
            f"is one of {', '.join(name for name, kind in KINDS.items() if kind.has_adaln)}"
        )
    dropout = settings.value("model.dropout", float)
    if dropout is None:
        dropout = settings.value("model.dropout", int)
    if dropout is not None:
        sizes["dropout"] = float(dropout)
    eps = options.noise_eps
    if eps is None:
        eps = kind.scaled_eps if settings.value("algo.mdlm_loss_scale", bool) else 0.0
    config = BlockDiffusionConfig(
        **sizes,
        objective=kind.objective,
        time_conditioning=kind.time_conditioning
        or bool(settings.value("algo.time_conditioning", bool)),
        noise_eps=eps,
        bos=True if kind.given_first or settings.value("algo.ignore_bos", bool) else None,
    )
    return kind_name, config


def _agreed_sizes(
    seen: Mapping[str, Any], settings: Settings, options: LightningOptions, path: Path
) -> dict[str, Any]:
    """The kind and the sizes that the shapes `seen` do not determine, if all sources agree."""

    def agreed(name: str, **others: Any) -> Any:
        """The value of `name` by the tensors, `others` and the option."""
        given = {
            "its tensors": seen.get(name),
            **{f"its {who}": value for who, value in others.items()},
            flag(name): getattr(options, name),
        }
        known = {who: value for who, value in given.items() if value is not None}
        if len(set(known.values())) > 1:
            parts = " and ".join(f"{value} by {who}" for who, value in known.items())
            raise UserError(f"{path}: {name} is {parts}; leave the option out, or correct it")
        return next(iter(known.values()), None)

    kind_name: str | None = agreed("kind", configuration=settings.value("algo.name", str))
    kind = KINDS.get(kind_name or "")
    if kind_name is not None and kind is None:
        raise UserError(
            f"{path} was trained as {shown(kind_name)}; readable are {', '.join(KINDS)}"
        )
    found: dict[str, Any] = {
        "kind": kind_name,
        "seq_len": agreed("seq_len", configuration=settings.value("model.length", int)),
        "num_attention_heads": agreed(
            "num_attention_heads", configuration=settings.value("model.n_heads", int)
        ),
    }
    if kind is not None and kind.has_blocks:
        configured = settings.value("block_size", int)
        found["block_size"] = agreed("block_size", configuration=configured)
    elif kind is not None and found["seq_len"] is not None:
        only = 1 if kind.one_token else found["seq_len"]
        found["block_size"] = agreed("block_size", kind=only)
    missing = [name for name, value in found.items() if value is None]
    found["mask_id"] = agreed("mask_id", tokenizer=settings.mask_id())
    tokenizer_name = settings.value("data.tokenizer_name_or_path", str) or ""
    if found["mask_id"] is None and "bert" in tokenizer_name:  # has one of its own
        missing.append("mask_id")
    if missing:
        raise UserError(_unknown(missing, path))
    return found


def _sizes_of_tensors(
    shapes: Mapping[str, tuple[int, ...]], rotary: tuple[int, ...] | None, path: Path
) -> dict[str, Any]:
    """The sizes that the shapes determine; `rotary` has one frequency for two numbers of a head."""
    embedding = shapes.get("embedding.weight", ())
    layers = {int(m[1]) for name in shapes if (m := re.match(r"layers\.(\d{1,6})\.", name))}
    if len(embedding) != 2 or 0 in embedding or not layers:
        raise UserError(
            f"{path} holds no backbone.vocab_embed.embedding or no backbone.blocks, so it is no "
            "checkpoint of the authors' transformer; other networks are not readable"
        )
    if lost := set(range(len(layers))) - layers:
        raise UserError(f"{path} lacks backbone.blocks.{min(lost)}; copy or download it again")
    vocab_size, width = embedding
    sizes: dict[str, Any] = {"vocab_size": vocab_size, "hidden_size": width}
    sizes["num_hidden_layers"] = len(layers)
    condition = shapes.get("time.linear_out.weight", ())
    sizes["adaln"] = bool(condition)
    if condition:
        sizes["cond_dim"] = condition[0]
    else:
        (sizes["kind"],) = (name for name, kind in KINDS.items() if not kind.has_adaln)
    if rotary and rotary[0] and width % (2 * rotary[0]) == 0:
        sizes["num_attention_heads"] = width // (2 * rotary[0])
    return sizes


def _unknown(missing: list[str], path: Path) -> str:
    words = " and ".join(missing)
    options = " ".join(f"{flag(name)} ..." for name in missing)
    return (
        f"{path} does not say what its {words} {'are' if len(missing) > 1 else 'is'}; "
        f"run blockdiff convert {path} --out DIRECTORY {options}"
    )
