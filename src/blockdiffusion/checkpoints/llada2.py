"""Reading the weights of LLaDA2, whose network is ours (`models/llada2.py`)."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers.initialization import no_init_weights

from blockdiffusion.checkpoints.finding import CONFIG, INDEX, WEIGHTS
from blockdiffusion.checkpoints.tensors import compare_tensors, read_safetensors
from blockdiffusion.errors import UserError
from blockdiffusion.files import records
from blockdiffusion.models.llada2 import SIZES, LLaDA2Config, LLaDA2MoeModelLM

ADVICE = "copy or download it again"
HEAD, EMBEDDINGS = "lm_head.weight", "model.word_embeddings.weight"


def read_llada2(folder: Path, config: LLaDA2Config, dtype: torch.dtype | None) -> LLaDA2MoeModelLM:
    """Read the network of a directory that `check_folder` has seen.

    Args:
        dtype: of the weights; None = each tensor's in the file.

    Raises:
        UserError: its config.json leaves out a size, or its tensors are not those of the network,
            or are not finite.
    """
    said = records.read_json(folder / CONFIG, ADVICE)
    if missing := [name for name in SIZES if name not in said]:
        raise UserError(f"{folder / CONFIG} has no {missing[0]}, which must be given; {ADVICE}")
    given = _read_weights(folder)
    # A configuration may claim any number of layers and experts; the file has a tensor for each.
    sparse = max(config.num_hidden_layers - config.first_k_dense_replace, 0)
    if config.num_hidden_layers + sparse * config.num_experts > len(given):
        raise UserError(
            f"{folder} has {len(given)} tensors, too few for the layers and experts that its "
            f"{CONFIG} says; {ADVICE}"
        )
    with torch.device("meta"), no_init_weights():
        network = LLaDA2MoeModelLM(config)
    wanted = {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}
    if config.tie_word_embeddings:
        del wanted[HEAD]
        _leave_out_head(given, folder)
    compare_tensors(wanted, given, folder, CONFIG)
    if dtype is not None:
        given = {name: tensor.to(dtype) for name, tensor in given.items()}
    network.load_state_dict(given, strict=False, assign=True)  # all that is wanted is there
    network.tie_weights()
    return network


def _leave_out_head(given: dict[str, torch.Tensor], folder: Path) -> None:
    """Leave out an output layer that repeats the embeddings, with which it is tied."""
    if (head := given.pop(HEAD, None)) is None:
        return
    embeddings = given.get(EMBEDDINGS)
    if embeddings is None or not torch.equal(head, embeddings):
        raise UserError(
            f"{folder}: {HEAD} is not {EMBEDDINGS}, but {CONFIG} says that they are tied; set "
            "tie_word_embeddings to false there if the model has both"
        )


def _read_weights(folder: Path) -> dict[str, torch.Tensor]:
    """Return the tensors of all files."""
    if not (folder / INDEX).is_file():
        return read_safetensors(folder / WEIGHTS)
    parts = set(records.read_json(folder / INDEX, ADVICE)["weight_map"].values())
    return {
        name: tensor
        for part in sorted(parts)
        for name, tensor in read_safetensors(folder / part).items()
    }
