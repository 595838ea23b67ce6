"""Files like the authors' Lightning checkpoints, with what real ones hold besides tensors."""

from __future__ import annotations

import sys
import types
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from blockdiffusion.checkpoints.bd3lm import their_name
from blockdiffusion.models.transformer import BlockDiffusionModel


def authors_tensors(model: BlockDiffusionModel) -> OrderedDict[str, torch.Tensor]:
    """The model's tensors under the authors' names and in their order, with their buffer."""
    width = model.backbone.config.hidden_size // model.backbone.config.num_attention_heads
    tensors = OrderedDict(
        (their_name(n), t.detach().float()) for n, t in model.backbone.state_dict().items()
    )
    tensors["backbone.rotary_emb.inv_freq"] = 10_000.0 ** (-torch.arange(0, width, 2) / width)
    return tensors


def lightning(model: BlockDiffusionModel, **more: Any) -> dict[str, Any]:
    """The content of a file: `model` is the average, the trained weights differ from it."""
    tensors = authors_tensors(model)
    parameters = [t for name, t in tensors.items() if not name.endswith("inv_freq")]
    rest = {"state": {0: {"exp_avg": torch.zeros(1000)}}, "param_groups": [{"lr": 3e-4}]}
    content = {
        "epoch": 1,
        "global_step": 77,
        "pytorch-lightning_version": "2.5.0",
        "state_dict": OrderedDict((name, t + 1) for name, t in tensors.items()),
        "optimizer_states": [rest],
        "ema": {"decay": 0.9999, "num_updates": 77, "shadow_params": parameters},
    }
    content["state_dict"]._metadata = {"": {"version": 1}}
    return content | more


@contextmanager
def foreign_class(module: str, name: str) -> Iterator[type]:
    """A class of a library that exists inside of the block only."""
    assert module not in sys.modules
    made = type(name, (), {"__module__": module})
    library = types.ModuleType(module)
    setattr(library, name, made)
    sys.modules[module] = library
    try:
        yield made
    finally:
        del sys.modules[module]


def save_with_settings(path: Path, content: dict[str, Any], settings: Any, tokenizer: Any) -> None:
    """Saves a file whose hyper_parameters hold an omegaconf configuration, which is gone after."""
    with (
        foreign_class("omegaconf_dictconfig", "DictConfig") as container,
        foreign_class("omegaconf_nodes", "AnyNode") as leaf,
    ):

        def node(value: Any, parent: Any) -> Any:
            made = container() if isinstance(value, dict) else leaf()
            made.__dict__.update(_metadata={"ref_type": Any}, _parent=parent)
            if isinstance(value, dict):
                made._content = {key: node(item, made) for key, item in value.items()}
            else:
                made._val = value
            return made

        hyper_parameters = {"config": node(settings, None), "tokenizer": tokenizer}
        torch.save(content | {"hyper_parameters": hyper_parameters}, path)


def settings(kind: str, model: BlockDiffusionModel) -> dict[str, Any]:
    """The authors' configuration of a run that made `model`."""
    config = model.full_config()
    return {
        "algo": {
            "name": kind,
            "time_conditioning": config.time_conditioning,
            "ignore_bos": kind != "ar",
        },
        "model": {
            "length": config.seq_len,
            "hidden_size": config.hidden_size,
            "cond_dim": config.cond_dim,
            "n_blocks": config.num_hidden_layers,
            "n_heads": config.num_attention_heads,
            "dropout": 0.25,
        },
        "block_size": config.block_size if kind == "bd3lm" else "${model.length}",
        "data": {"tokenizer_name_or_path": "gpt2", "train": "openwebtext"},
    }
