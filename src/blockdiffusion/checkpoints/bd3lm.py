"""The published `bd3lm` format: names of tensors and keys of config.json, read and written."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from blockdiffusion.errors import UserError
from blockdiffusion.files.records import of_file, typed
from blockdiffusion.models.transformer import ROTARY_BASE, BlockDiffusionConfig

MODEL_TYPE = "bd3lm"

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
# In the files, but not part of the network: the clip of the noise schedule, and rotary frequencies,
# which follow from the sizes.
ROTARY = "backbone.rotary_emb.inv_freq"
CLIP = {"sampling_eps_min": 1e-3, "sampling_eps_max": 1.0}  # no clip
BD3LM_IGNORED = {*CLIP, ROTARY}

# The authors' code for the format, with which transformers reads the files written here.
AUTHORS_CODE = "kuleshov-group/bd3lm-owt-block_size4"
# Our key -> theirs in config.json.
CONFIG_KEYS = {
    "vocab_size": "vocab_size",
    "seq_len": "model_length",
    "block_size": "block_size",
    "hidden_size": "hidden_dim",
    "num_hidden_layers": "n_blocks",
    "num_attention_heads": "n_heads",
    "cond_dim": "cond_dim",
    "dropout": "dropout",
}


_KEYS = {
    **dict.fromkeys(CONFIG_KEYS.values(), int),
    "dropout": float,
    **dict.fromkeys(("mask_id", "mask_index"), int | None),
    **dict.fromkeys(("causal", "cross_attn", "adaln", "time_conditioning"), bool),
}


def from_bd3lm(
    raw: Mapping[str, Any], state: Mapping[str, torch.Tensor], folder: Path
) -> tuple[BlockDiffusionConfig, dict[str, torch.Tensor]]:
    """Return our configuration and names for a published directory (sizes from its config).

    Raises:
        UserError: the config lacks a key, or describes a causal network.
    """
    file = folder / "config.json"
    with of_file(file, "copy or download it again"):
        found = typed(_KEYS, raw)
        if found.get("causal"):
            raise UserError(
                "a causal network, which was never published in this format; convert the "
                "Lightning file it comes from"
            )
        missing = [theirs for theirs in CONFIG_KEYS.values() if theirs not in found]
        if missing:
            raise UserError(f"the key {missing[0]!r} is missing")
        sizes = {ours: found[theirs] for ours, theirs in CONFIG_KEYS.items()}
        if not found.get("cross_attn", True):  # no clean stream: one block is the whole sequence
            sizes["block_size"] = sizes["seq_len"]
        config = BlockDiffusionConfig(
            **sizes,
            mask_id=found.get("mask_id", found.get("mask_index")),
            adaln=found.get("adaln", True),
            time_conditioning=found.get("time_conditioning", False),
        )
    return config, {our_name(n): tensor for n, tensor in state.items() if n not in BD3LM_IGNORED}


def to_bd3lm(
    config: BlockDiffusionConfig, state: Mapping[str, torch.Tensor]
) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """Return config.json and tensors of the published format for one of our networks.

    BOS, EOS and the tokenizer are left out, for which the format has no key. The clip of the noise
    schedule, which is not part of the network, is written as none.

    Raises:
        UserError: the format cannot describe the network.
    """
    if not config.is_masked_diffusion or config.clean_attention != "block":
        raise UserError(
            "the bd3lm format holds block diffusion networks whose clean tokens see whole blocks; "
            f"this one has objective {config.objective} and clean_attention "
            f"{config.clean_attention}, so keep it in our own format"
        )
    raw: dict[str, Any] = {theirs: getattr(config, ours) for ours, theirs in CONFIG_KEYS.items()}
    raw |= {
        "model_type": MODEL_TYPE,
        "architectures": ["BD3LM"],
        "auto_map": {
            "AutoConfig": f"{AUTHORS_CODE}--configuration_bd3lm.BD3LMConfig",
            "AutoModelForMaskedLM": f"{AUTHORS_CODE}--modeling_bd3lm.BD3LM",
        },
        "adaln": config.adaln,
        "time_conditioning": config.time_conditioning,
        "attn_backend": "sdpa",
        "causal": False,
        "cross_attn": True,
        "return_dict": False,
        "var_min": True,
        **CLIP,
    }
    if config.mask_id != config.vocab_size - 1:
        raw["mask_id"] = config.mask_id
    tensors = {their_name(name): tensor for name, tensor in state.items()}
    width = config.hidden_size // config.num_attention_heads
    exponent = torch.arange(0, width, 2).float() / width
    tensors[ROTARY] = 1.0 / (ROTARY_BASE**exponent)
    tensors |= {name: torch.tensor(value) for name, value in CLIP.items()}
    return raw, tensors


def our_name(published: str) -> str:
    """Return our name of a published tensor; an unknown one stays, and is reported later."""
    return _translated(published, BD3LM_NAMES, "blocks", "layers")


def their_name(ours: str) -> str:
    """Return the published name of one of our tensors."""
    names = {ours: theirs for theirs, ours in BD3LM_NAMES.items()}
    return _translated(ours, names, "layers", "blocks")


def _translated(name: str, names: Mapping[str, str], stack: str, other_stack: str) -> str:
    number = re.search(rf"\b{stack}\.(\d+)\.", name)
    general = name if number is None else name.replace(number.group(), f"{stack}.N.", 1)
    for old, new in names.items():
        if general == old or general.startswith(old + "."):
            found = new + general[len(old) :]
            if number is None:
                return found
            return found.replace(f"{other_stack}.N.", f"{other_stack}.{number.group(1)}.", 1)
    return name
