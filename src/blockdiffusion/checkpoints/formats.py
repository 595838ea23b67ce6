"""Reading models: our own directories, published `bd3lm` directories, the authors' Lightning files.

Weights are read from safetensors, or from a pickle that is not executed (`unpickling`), so no code
in a file can run. A missing, unexpected or misshapen tensor is an error that names it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_type_hints

import torch
from transformers.initialization import no_init_weights

from blockdiffusion.checkpoints.bd3lm import MODEL_TYPE as BD3LM
from blockdiffusion.checkpoints.bd3lm import from_bd3lm
from blockdiffusion.checkpoints.causal_lm import (
    FAMILIES,
    is_causal_lm,
    read_causal_lm,
    read_network,
)
from blockdiffusion.checkpoints.finding import (
    ADAPTER,
    CONFIG,
    COPY_AGAIN,
    GGUF,
    WEIGHTS,
    config_of,
    find_path,
)
from blockdiffusion.checkpoints.lightning import LightningFile, LightningOptions, read_lightning
from blockdiffusion.checkpoints.tensors import check_tensors, read_safetensors, write_safetensors
from blockdiffusion.errors import UserError, shown
from blockdiffusion.files import records
from blockdiffusion.files.checksums import warn_of_changes
from blockdiffusion.from_pretrained import from_pretrained
from blockdiffusion.models.block_diffusion import BlockDiffusion
from blockdiffusion.models.causal_lm import SECTION, AdaptedModel
from blockdiffusion.models.transformer import OLD_SIZES, BlockDiffusionConfig, BlockDiffusionModel
from blockdiffusion.options import renamed

DtypeName = Literal["float32", "float64", "bfloat16", "float16"]
Format = Literal["blockdiffusion", "bd3lm", "lightning", "transformers"]

# What two networks must have in common if the weights of one are to fit the other.
SAME = (
    "objective", "transition", "vocab_size", "mask_id", "hidden_size", "num_hidden_layers",
    "num_attention_heads", "adaln", "cond_dim", "time_conditioning", "clean_attention",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Found:
    """A model and its source.

    Attributes:
        path: its local directory or file.
        lightning: the other contents of a file whose format is "lightning".
    """

    model: BlockDiffusion
    format: Format
    path: Path
    lightning: LightningFile | None = None

    @property
    def config(self) -> BlockDiffusionConfig:
        """The model's sizes and conventions."""
        return self.model.full_config()


def load(
    path_or_hub_id: str | Path,
    block_size: int | None = None,
    mask_id: int | None = None,
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> BlockDiffusion:
    """Return a model in eval mode from our directory, a published one, or a Lightning file.

    Args:
        path_or_hub_id: a directory with config.json and model.safetensors, or a training run's; a
            Hugging Face id such as `kuleshov-group/bd3lm-owt-block_size4`; or a `last.ckpt` of the
            authors' code, whose moving average is read without running anything.
        device, dtype: of the weights; by default the CPU and the type in the file.

    Returns:
        The model with its `.config` and `.tokenizer` (None if the directory has none).

    Warns:
        checksums.Changed: a file of the directory has changed since it was written.

    Raises:
        UserError: there is nothing to load, a pickle of another kind, a truncated file, tensors
            that do not fit, or a Lightning file that lacks sizes (`blockdiff convert` takes them).
    """
    return find_model(
        path_or_hub_id, block_size=block_size, mask_id=mask_id, device=device, dtype=dtype
    ).model


def find_model(
    path_or_hub_id: str | Path,
    lightning: LightningOptions | None = None,
    *,
    block_size: int | None = None,
    mask_id: int | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> Found:
    """Load as `load` does, with options for a Lightning file; return the model and its source.

    Raises:
        UserError: see `load`; or options for a Lightning file are given for something else.
    """
    path = find_path(path_or_hub_id)
    raw = config_of(path)
    if path.suffix == GGUF or is_causal_lm(raw):
        adapted = read_causal_lm(path, raw, block_size=block_size, mask_id=mask_id, dtype=dtype)
        if path.is_dir():
            warn_of_changes(path)
        return Found(model=adapted.to(device), format="transformers", path=path)
    read: LightningFile | None = None
    if path.is_file():
        kind: Format = "lightning"
        read = read_lightning(path, lightning)
        config, state, file = read.config, read.state, path
    elif lightning is not None and lightning.given():
        raise UserError(
            f"{path} is no Lightning file; leave out {', '.join(lightning.given())}, which only a "
            "Lightning file needs"
        )
    else:
        file = path / WEIGHTS
        kind, config, state = _read_directory(path, raw)
    check_tensors(config, state, file, CONFIG if read is None else "its own sizes")
    with no_init_weights():  # all of them are in the file
        model = BlockDiffusionModel(config)
    model.backbone.load_state_dict(state)
    if dtype is None and state:
        dtype = next(iter(state.values())).dtype
    model.to(device=device, dtype=dtype)
    if read is None:
        model.tokenizer = _read_tokenizer(path)
        warn_of_changes(path)  # last, so that an unreadable file gives one message only
    return Found(model=model.eval(), format=kind, path=path, lightning=read)


def load_parent(path_or_hub_id: str | Path) -> Any:
    """Return a causal model of transformers as it is, or the block diffusion model around it that a
    directory holds, which may be of a published family.

    Raises:
        UserError: see `load`; or it is neither.
    """
    path, raw = find_causal_lm(path_or_hub_id)
    is_adapted = SECTION in raw or raw.get("model_type") in FAMILIES
    return load(path) if is_adapted else read_network(path, raw, None).eval()


def find_causal_lm(path_or_hub_id: str | Path) -> tuple[Path, dict[str, Any]]:
    """Return the place of a causal language model, adapted or not, and its config.json ({} for a
    GGUF file).

    Raises:
        UserError: there is no such model.
    """
    path = find_path(path_or_hub_id)
    raw = config_of(path)
    if path.suffix != GGUF and not is_causal_lm(raw):
        raise UserError(
            f"{path_or_hub_id}: its model_type is {shown(raw.get('model_type'))}; give a causal "
            "language model of transformers, or one that was adapted"
        )
    return path, raw


def copy_weights(path_or_hub_id: str | Path, model: BlockDiffusion) -> None:
    """Copy the weights of another model, which may have another block size and length, to `model`.

    Args:
        path_or_hub_id: as in `load`.
        model: of the same sizes and conventions (`SAME`, and the given BOS if both name it), with
            its tokenizer, if it has one.

    Raises:
        UserError: see `load`; or the two differ in what the weights depend on, or in their tokens.
    """
    source = load(path_or_hub_id, dtype=model.dtype)
    source_config, config = source.full_config(), model.full_config()
    for name in SAME:
        theirs, ours = getattr(source_config, name), getattr(config, name)
        if theirs != ours:
            raise UserError(
                f"the weights in {path_or_hub_id} cannot be taken over: {name} is {theirs} there "
                f"and {ours} here; make both equal, or start from another model"
            )
    given, wanted = source_config.bos, config.bos
    if None not in (given, wanted) and given != wanted:
        with_bos = "with a given BOS at position 0 of every row" if given else "without one"
        raise UserError(
            f"the weights in {path_or_hub_id} were trained {with_bos}, and the data here have "
            f"{'none' if given else 'a given BOS at position 0'}; prepare the data with "
            f"{'--row-bos' if given else '--no-row-bos'}, or start from another model"
        )
    tokenizers = [m.tokenizer for m in (source, model) if m.tokenizer is not None]
    if len(tokenizers) == 2 and tokenizers[0].get_vocab() != tokenizers[1].get_vocab():
        raise UserError(
            f"the weights in {path_or_hub_id} cannot be taken over: they were trained with another "
            "tokenizer; prepare the data with that model's, or start from another model"
        )
    model.backbone.load_state_dict(source.backbone.state_dict())


def write_model(model: BlockDiffusion, folder: Path) -> dict[str, str]:
    """Write config.json and the weights, as `save_pretrained` does.

    Returns:
        The sha256 of the weights, by the name of their file.
    """
    model.full_config().save_pretrained(folder)
    name = WEIGHTS
    if isinstance(model, AdaptedModel) and (lora := model.backbone.lora) is not None:
        lora.config.save_pretrained(str(folder))
        name = ADAPTER
    return {name: write_safetensors(model.backbone.saved_tensors(), folder / name)}


# --- Reading directories --------------------------------------------------------------------------


def _read_directory(
    folder: Path, raw: Mapping[str, Any]
) -> tuple[Format, BlockDiffusionConfig, dict[str, torch.Tensor]]:
    state = read_safetensors(folder / WEIGHTS)
    model_type = raw.get("model_type")
    if model_type == BD3LM:
        return "bd3lm", *from_bd3lm(raw, state, folder)
    if model_type == BlockDiffusionConfig.model_type:
        return "blockdiffusion", read_config(folder / CONFIG, raw), state
    raise UserError(
        f"{folder / CONFIG} has model_type {shown(model_type)}; "
        f"readable are {BlockDiffusionConfig.model_type!r}, {BD3LM!r}, and causal language models "
        "that transformers reads without code of the repository"
    )


def read_config(path: Path, raw: Mapping[str, Any] | None = None) -> BlockDiffusionConfig:
    """Return the configuration in one of our config.json, without keys that are not ours.

    Raises:
        UserError: it cannot be read, or describes no network.
    """
    raw = records.read_json(path, COPY_AGAIN) if raw is None else raw
    hints = get_type_hints(BlockDiffusionConfig.__init__)
    own = {name: hint for name, hint in hints.items() if name not in ("kwargs", "return")}
    own |= {"dtype": DtypeName | None, "architectures": list[str] | None}
    with records.of_file(path, COPY_AGAIN):
        return BlockDiffusionConfig(**records.typed(own, renamed(raw, OLD_SIZES)))


def _read_tokenizer(folder: Path) -> Any:
    if not (folder / "tokenizer.json").is_file():
        return None
    from transformers import PreTrainedTokenizerFast

    return from_pretrained(
        PreTrainedTokenizerFast,
        folder,
        f"the tokenizer in {folder} cannot be read",
        COPY_AGAIN,
    )
