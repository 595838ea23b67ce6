"""Reading models: our own directories and the published `bd3lm` Hugging Face format.

Weights are read from safetensors only, so that nothing in a file can run, and strictly: a missing,
unexpected or misshapen tensor is an error that names it.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from blockdiffusion.errors import UserError
from blockdiffusion.models.transformer import BlockDiffusionConfig, BlockDiffusionModel

WEIGHTS = "model.safetensors"
PICKLES = (".bin", ".ckpt", ".pt", ".pth", ".pkl")
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")

# Published name -> ours; `N` stands for a layer's number.
BD3LM_NAMES = {
    "backbone.vocab_embed.embedding": "embedding.weight",
    "backbone.sigma_map.mlp.0": "time.linear_in",
    "backbone.sigma_map.mlp.2": "time.linear_out",
    "backbone.blocks.N.norm1": "layers.N.attn_norm",
    "backbone.blocks.N.attn_qkv": "layers.N.attn_qkv",
    "backbone.blocks.N.attn_out": "layers.N.attn_out",
    "backbone.blocks.N.norm2": "layers.N.mlp_norm",
    "backbone.blocks.N.mlp.0": "layers.N.mlp_in",
    "backbone.blocks.N.mlp.2": "layers.N.mlp_out",
    "backbone.blocks.N.adaLN_modulation": "layers.N.modulation",
    "backbone.output_layer.norm_final": "final_norm",
    "backbone.output_layer.adaLN_modulation": "final_modulation",
    "backbone.output_layer.linear": "output",
}
# In the files, but no part of the network: the clip of the noise schedule, and rotary
# frequencies, which follow from the sizes.
BD3LM_IGNORED = {"sampling_eps_min", "sampling_eps_max", "backbone.rotary_emb.inv_freq"}

# What the weights of two networks must agree on, to mean the same.
SAME = (
    "objective",
    "transition",
    "vocab_size",
    "mask_id",
    "width",
    "num_layers",
    "num_heads",
    "adaln",
    "cond_dim",
    "time_conditioning",
    "clean_attention",
)


def load(
    path_or_hub_id: str | Path,
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> BlockDiffusionModel:
    """A model in eval mode, from one of our directories or a published `bd3lm` one.

    Args:
        path_or_hub_id: a directory with config.json and model.safetensors (a training run's
            directory works too), or a Hugging Face id such as
            `kuleshov-group/bd3lm-owt-block_size4`.
        device, dtype: where the weights go and in which precision; the file's by default.

    Returns:
        The model; `.config.block_size`, `.config.mask_id` and `.tokenizer` (None where the
        directory has none) are set.

    Raises:
        UserError: nothing there, a pickle, a truncated file, or tensors that do not fit.
    """
    folder = _find(path_or_hub_id)
    raw = _read_config(folder / "config.json")
    state = _read_weights(folder / WEIGHTS)
    model_type = raw.get("model_type")
    if model_type == "bd3lm":
        config, state = _from_bd3lm(raw, state, folder)
    elif model_type == BlockDiffusionConfig.model_type:
        config = BlockDiffusionConfig.from_dict(raw)
    else:
        raise UserError(
            f"{folder / 'config.json'} has model_type {model_type!r}; "
            f"readable are {BlockDiffusionConfig.model_type!r} and 'bd3lm'"
        )
    model = BlockDiffusionModel(config)
    _check_tensors(model.state_dict(), state, folder / WEIGHTS)
    model.load_state_dict(state)
    if dtype is None and state:
        dtype = next(iter(state.values())).dtype
    model.to(device=device, dtype=dtype)  # type: ignore
    model.tokenizer = _read_tokenizer(folder)
    return model.eval()


def copy_weights(path_or_hub_id: str | Path, model: BlockDiffusionModel) -> None:
    """Gives `model` the weights of another one, which may have another block size and length.

    Args:
        path_or_hub_id: as in `load`.
        model: of the same sizes and conventions (`SAME`), with its tokenizer, where it has one.

    Raises:
        UserError: see `load`; or the two differ in what the weights depend on, or in their tokens.
    """
    source = load(path_or_hub_id, dtype=model.dtype)
    for name in SAME:
        theirs, ours = getattr(source.config, name), getattr(model.config, name)
        if theirs != ours:
            raise UserError(
                f"the weights in {path_or_hub_id} cannot be taken over: {name} is {theirs} there "
                f"and {ours} here; make both equal, or start from another model"
            )
    tokenizers = [m.tokenizer for m in (source, model) if m.tokenizer is not None]
    if len(tokenizers) == 2 and tokenizers[0].get_vocab() != tokenizers[1].get_vocab():
        raise UserError(
            f"the weights in {path_or_hub_id} cannot be taken over: they were trained with another "
            "tokenizer; prepare the data with that model's, or start from another model"
        )
    model.load_state_dict(source.state_dict())


def _find(path_or_hub_id: str | Path) -> Path:
    """The local folder that holds the model; downloads a hub id."""
    path = Path(path_or_hub_id)
    if path.is_file():
        if path.suffix in PICKLES:
            raise UserError(
                f"{path} is a pickle, which can hold code and is never opened; "
                "give a directory with config.json and model.safetensors"
            )
        raise UserError(f"{path} is a file; give the directory that holds config.json")
    for folder in (path, path / "model"):
        if (folder / "config.json").is_file():
            if not (folder / WEIGHTS).is_file():
                raise UserError(_no_weights(folder))
            return folder
    if path.is_dir():
        raise UserError(
            f"{path} holds no config.json; give a model's or a training run's directory"
        )
    if not HUB_ID.fullmatch(str(path_or_hub_id)):
        raise UserError(f"{path} does not exist; give a model directory or a Hugging Face id")
    return _download(str(path_or_hub_id))


def _no_weights(folder: Path) -> str:
    pickles = sorted(p.name for p in folder.iterdir() if p.suffix in PICKLES)
    if pickles:
        return (
            f"{folder} holds {pickles[0]}, a pickle, which can hold code and is never opened; "
            f"a {WEIGHTS} is needed"
        )
    return f"{folder} has a config.json but no {WEIGHTS}"


def _download(hub_id: str) -> Path:
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(hub_id, allow_patterns=["*.json", WEIGHTS, "*.txt"]))
    except Exception as error:  # the hub client has no common base class for its failures
        raise UserError(
            f"{hub_id} is no local directory and could not be had from the hub "
            f"({type(error).__name__}); check the name and the connection, or give a directory"
        ) from error


def _read_config(path: Path) -> dict[str, Any]:
    try:
        raw = json.loads(path.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not valid JSON ({error})") from error
    if not isinstance(raw, dict):
        raise UserError(f"{path} holds no JSON object")
    return raw


def _read_weights(path: Path) -> dict[str, torch.Tensor]:
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise UserError(
            f"{path} is truncated or no safetensors file ({error}); copy or download it again"
        ) from error


def _from_bd3lm(
    raw: dict[str, Any], state: dict[str, torch.Tensor], folder: Path
) -> tuple[BlockDiffusionConfig, dict[str, torch.Tensor]]:
    """Our configuration and names for a published `bd3lm` directory (sizes from its config)."""
    try:
        config = BlockDiffusionConfig(
            vocab_size=raw["vocab_size"],
            seq_len=raw["model_length"],
            block_size=raw["block_size"],
            mask_id=raw.get("mask_id", raw.get("mask_index")),
            width=raw["hidden_dim"],
            num_layers=raw["n_blocks"],
            num_heads=raw["n_heads"],
            cond_dim=raw["cond_dim"],
            dropout=raw["dropout"],
            adaln=raw.get("adaln", True),
            time_conditioning=raw.get("time_conditioning", False),
        )
    except KeyError as error:
        raise UserError(f"{folder / 'config.json'} lacks the key {error}") from error
    renamed = {}
    for name, tensor in state.items():
        if name in BD3LM_IGNORED:
            continue
        renamed[_our_name(name)] = tensor
    return config, renamed


def _our_name(published: str) -> str:
    """Our name of a published tensor; the name itself where it is unknown (reported later)."""
    number = re.search(r"blocks\.(\d+)\.", published)
    general = re.sub(r"blocks\.\d+\.", "blocks.N.", published)
    for theirs, ours in BD3LM_NAMES.items():
        if general == theirs or general.startswith(theirs + "."):
            name = ours + general[len(theirs) :]
            return name.replace("layers.N", f"layers.{number.group(1)}") if number else name
    return published


def _check_tensors(
    wanted: dict[str, torch.Tensor], given: dict[str, torch.Tensor], path: Path
) -> None:
    missing, unexpected = sorted(wanted.keys() - given.keys()), sorted(given.keys() - wanted.keys())
    if missing or unexpected:
        parts = []
        if missing:
            parts.append(f"lacks {_few(missing)}")
        if unexpected:
            parts.append(f"has the unexpected {_few(unexpected)}")
        raise UserError(f"{path} {' and '.join(parts)}; it does not fit its config.json")
    for name, tensor in wanted.items():
        if tensor.shape != given[name].shape:
            raise UserError(
                f"{path}: {name} has shape {tuple(given[name].shape)}, "
                f"but config.json asks for {tuple(tensor.shape)}"
            )


def _few(names: list[str], most: int = 3) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def _read_tokenizer(folder: Path) -> Any:
    if not (folder / "tokenizer.json").is_file():
        return None
    from transformers import PreTrainedTokenizerFast

    try:
        return PreTrainedTokenizerFast.from_pretrained(folder)
    except Exception as error:  # malformed files fail in many ways, none of them the user's code
        raise UserError(
            f"the tokenizer in {folder} cannot be read ({type(error).__name__}: {error})"
        ) from error
