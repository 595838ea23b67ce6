"""Causal language models of transformers as block diffusion models, and those published as such.

A directory of transformers holds a block diffusion model if its config.json has a section
`block_diffusion` (what `write_model` writes), if its `model_type` is one of `FAMILIES`, or if
the caller says the block size. Weights are read by transformers, from safetensors or GGUF only,
without code of the repository, and strictly.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
)

from blockdiffusion.checkpoints.finding import (
    ADAPTER,
    CONFIG,
    GGUF,
    INDEX,
    config_of,
    find_path,
)
from blockdiffusion.checkpoints.llada2 import read_llada2
from blockdiffusion.checkpoints.tensors import (
    FLOAT_KINDS,
    check_header,
    is_finite,
    read_safetensors,
)
from blockdiffusion.diffusion.config import DiffusionConfig
from blockdiffusion.errors import UserError, shown
from blockdiffusion.files import records
from blockdiffusion.files.records import Damaged
from blockdiffusion.from_pretrained import from_pretrained
from blockdiffusion.models.causal_lm import (
    SECTION,
    AdaptedModel,
    adapted_model,
    num_embeddings,
    without_weights,
)
from blockdiffusion.models.llada2 import LLaDA2Config, LLaDA2MoeModelLM
from blockdiffusion.models.lora import SECTION as LORA
from blockdiffusion.models.lora import AdapterOf, fingerprint, merge_adapter

MOST_LAYERS, MOST_NUMBER = 10_000, 2**32  # in a configuration
MOST_POSITIONS = 2**14  # of L, where only the network says how many positions it has
START_TOKEN = "<|endoftext|>"  # what GPT-2, Qwen and SmolLM put between documents
ADVICE = "copy or download it again"
COMPUTED = ("inv_freq", ".masked_bias")  # tensors of older files that networks now compute


@dataclass(frozen=True)
class Family:
    """A published family whose network is one of transformers, or `models.llada2`.

    Attributes:
        model_type: the network's.
        mask_id, block_size: what its code assumes where no file says it; None: nothing.
        conventions: what differs from the defaults of `DiffusionConfig`.
    """

    model_type: str
    mask_id: int | None = None
    block_size: int | None = None
    conventions: Mapping[str, Any] = field(default_factory=dict)


FAMILIES = {
    "sdar": Family("qwen3", mask_id=151669, block_size=4),
    "sdar_moe": Family("qwen3_moe", mask_id=151669, block_size=4),
    "a2d-qwen3": Family("qwen3", block_size=32),
    "a2d-qwen2": Family("qwen2", block_size=32),
    "a2d-llama": Family("llama", block_size=32),
    "Fast_dLLM_Qwen": Family(
        "qwen2", mask_id=151665, block_size=32, conventions={"reading": "shifted"}
    ),
    LLaDA2Config.model_type: Family(LLaDA2Config.model_type, mask_id=156895, block_size=32),
}
PUBLISHED = {"reading": "same", "clean_attention": "block"}  # if the family says nothing else
# A causal model as it is reads the token before and sees clean tokens up to it.
CAUSAL = {"reading": "next", "clean_attention": "causal"}
BLOCK_SIZE_KEYS = ("block_size", "bd_size", "canvas_length")
MASK_ID_KEYS = ("mask_token_id", "mask_id")


def is_causal_lm(raw: Mapping[str, Any]) -> bool:
    """Whether a config.json is that of a causal language model, adapted or not."""
    name = raw.get("model_type")
    if not isinstance(name, str):
        return False
    if name in FAMILIES:
        return True
    try:
        kind = type(AutoConfig.for_model(name))
    except (ValueError, KeyError):
        return False
    return kind in AutoModelForCausalLM._model_mapping


def read_causal_lm(
    path: Path,
    raw: Mapping[str, Any],
    *,
    block_size: int | None = None,
    mask_id: int | None = None,
    dtype: torch.dtype | None = None,
) -> AdaptedModel:
    """Read the model in a directory of transformers or in a GGUF file.

    Args:
        raw: the content of its config.json; {} of a GGUF file.
        block_size, mask_id: by default those of the files, the tokenizer's mask token, or what the
            family's own code assumes.
        dtype: of the weights; None = the file's.

    Raises:
        UserError: it cannot be read, a tensor is missing or unexpected, the family cannot be a
            backbone, or nothing says the block size or the mask token.
    """
    tokenizer = read_tokenizer(path)
    network = read_network(path, raw, dtype)
    config = section_of(path, raw, block_size=block_size, mask_id=mask_id)
    if config is None:
        config = _conventions(path, network, tokenizer, raw, block_size, mask_id)
    return adapted_model(network, config, tokenizer).eval()


def section_of(path: Path, raw: Mapping[str, Any], **given: int | None) -> DiffusionConfig | None:
    """Return the conventions in a config.json; None if it has none, as a parent's.

    Args:
        given: values that replace those of the file, unless None.

    Raises:
        UserError: they are damaged.
    """
    section = raw.get(SECTION)
    if section is None:
        return None
    with records.of_file(path / "config.json", ADVICE):
        if not isinstance(section, Mapping):
            raise Damaged(f"{SECTION} is {shown(section)}; it must be an object")
        given = {name: value for name, value in given.items() if value is not None}
        return records.build(DiffusionConfig, {**section, **given}, f"{SECTION}.")


def trained_with(path: Path, raw: Mapping[str, Any]) -> dict[str, str]:
    """Return the `reading` and `clean_attention` of a block diffusion model, as its section or its
    family says; {} of a causal model.

    Raises:
        UserError: the section is damaged.
    """
    section, family = section_of(path, raw), FAMILIES.get(raw.get("model_type", ""))
    if section is not None:
        return {name: getattr(section, name) for name in CAUSAL}
    return {} if family is None else {**PUBLISHED, **family.conventions}


def start_token_id(tokenizer: Any, network: PretrainedConfig) -> int | None:
    """Return the token before the first one: what separates documents in the parent's training
    data, as far as its tokenizer shows; None: there is no such token."""
    vocabulary = {} if tokenizer is None else tokenizer.get_vocab()
    return _first_given(
        vocabulary.get(START_TOKEN), _special(network, "bos"), _special(network, "eos")
    )


def _first_given(*values: int | None) -> int | None:
    return next((value for value in values if value is not None), None)


def _special(network: PretrainedConfig, name: str) -> int | None:
    """A special token of a configuration, which may list several, or one beyond its vocabulary."""
    found = getattr(network, f"{name}_token_id", None)
    found = found[0] if isinstance(found, list) and found else found
    return found if isinstance(found, int) and found < network.vocab_size else None


def known_mask_id(raw: Mapping[str, Any], network: PreTrainedModel, tokenizer: Any) -> int | None:
    """Return the mask token that the configuration, the tokenizer or the family names, if any."""
    family = FAMILIES.get(raw.get("model_type", ""))
    of_tokenizer = getattr(tokenizer, "mask_token_id", None)
    found = _first_given(*map(raw.get, MASK_ID_KEYS), of_tokenizer)
    if found is None and family is not None and family.mask_id is not None:
        return family.mask_id if family.mask_id < num_embeddings(network) else None
    return found


def _conventions(
    path: Path,
    network: PreTrainedModel,
    tokenizer: Any,
    raw: Mapping[str, Any],
    block_size: int | None,
    mask_id: int | None,
) -> DiffusionConfig:
    """Those of a model without a section of ours: given, from its files, or its family's."""
    family = FAMILIES.get(raw.get("model_type", ""))
    own = Family("", conventions=CAUSAL) if family is None else family
    keys = () if family is None else BLOCK_SIZE_KEYS
    size = _first_given(block_size, *map(raw.get, keys), own.block_size)
    if size is None:
        raise UserError(
            f"{path} is autoregressive and says no block size; give block_size=..., or make it a "
            "block diffusion model by `blockdiff adapt`"
        )
    mask = _first_given(mask_id, known_mask_id(raw, network, tokenizer))
    if mask is None:
        raise UserError(
            f"{path} has no mask token; give mask_id=..., the id of a token that no text has, or "
            "make it a block diffusion model by `blockdiff adapt`, which adds one"
        )
    config = network.config
    positions = getattr(config, "max_position_embeddings", None) or MOST_POSITIONS
    conventions: dict[str, Any] = {
        "vocab_size": num_embeddings(network),
        "seq_len": max(min(positions, MOST_POSITIONS) // size, 1) * size,
        "block_size": size,
        "mask_id": mask,
        "bos": False,
        "bos_id": _special(config, "bos"),
        "eos_id": _special(config, "eos"),
        **PUBLISHED,
        **own.conventions,
    }
    if conventions.get("reading") == "next":
        conventions["start_id"] = start_token_id(tokenizer, config)
    with records.of_file(path, "give other values"):
        return DiffusionConfig(**conventions)


# --- reading --------------------------------------------------------------------------------------


def load_network(name: str | Path, label: str, advice: str, **options: Any) -> PreTrainedModel:
    """The network of a directory, or of a hub id, whose `check_folder` was done.

    Args:
        label: what it is, for messages.
        options: of `AutoModelForCausalLM.from_pretrained`.

    Raises:
        UserError: it cannot be read, its tensors are not those of its configuration, or they hold
            numbers that are not finite.
    """
    network, report = from_pretrained(
        AutoModelForCausalLM,
        name,
        f"{label} cannot be read as a causal language model",
        advice,
        use_safetensors=True,
        output_loading_info=True,
        **{"dtype": "auto", **options},
    )
    problems = {"missing_keys": "lacks", "mismatched_keys": "has another shape for"}
    for key, problem in problems.items():
        if names := sorted(map(str, report[key])):
            raise UserError(
                f"{label} {problem} the tensor {names[0]}: the weights do not fit config.json, and "
                f"random numbers would take their place; {ADVICE}"
            )
    unused = sorted(n for n in map(str, report["unexpected_keys"]) if not n.endswith(COMPUTED))
    if unused:
        raise UserError(
            f"{label} has the unexpected tensor {shown(unused[0])}, which a network of config.json "
            f"has no use for, so they are not of one model; {ADVICE}"
        )
    for tensor, parameter in network.named_parameters():
        if parameter.is_floating_point() and not is_finite(parameter.detach()):
            raise UserError(
                f"{label}: {tensor} holds numbers that are not finite (nan or infinity); {advice}"
            )
    return network


def check_folder(folder: Path) -> None:
    """Refuse what transformers would accept: sizes that alone would fill the memory, weights
    outside the folder, oversized headers, and integers instead of weights. Links to a cache, as
    the hub's client makes them, are allowed."""
    config = config_of(folder)
    for name, value in config.items():
        most = MOST_LAYERS if "layer" in name else MOST_NUMBER
        if isinstance(value, int) and value > most:
            where = f"{folder / 'config.json'}: {shown(name)}"
            raise UserError(f"{where} is {shown(value)}; it must be at most {most}")
    if (index := folder / INDEX).exists():
        parts = records.read_json(index, ADVICE).get("weight_map")
        for part in set(parts.values()) if isinstance(parts, dict) else {None}:
            is_name = isinstance(part, str) and Path(part).name == part
            if not is_name or not (folder / part).is_file():
                raise UserError(
                    f"{index} names {shown(part)} for weights, which is no file of its folder; "
                    f"{ADVICE}"
                )
    for file in folder.glob("*.safetensors"):
        with records.of_file(file, ADVICE):
            header = check_header(file)
        for name, entry in {} if "quantization_config" in config else header.items():
            kind = entry.get("dtype") if isinstance(entry, dict) else None
            if name.endswith(".weight") and kind not in FLOAT_KINDS:
                raise UserError(
                    f"{file}: {shown(name)} holds {shown(kind)}, which no weights are in; {ADVICE}"
                )


def read_network(path: Path, raw: Mapping[str, Any], dtype: torch.dtype | None) -> PreTrainedModel:
    """Read the network of a directory or a GGUF file; an adapter is merged into its parent.

    Raises:
        UserError: see `read_causal_lm`; or the adapter's parent is not there, or another model.
    """
    if path.suffix == GGUF:
        return _read_gguf(path, dtype)
    if (path / ADAPTER).is_file():
        return _read_with_adapter(path, raw, dtype or torch.float32)
    check_folder(path)
    config = _network_config(path, raw)
    if isinstance(config, LLaDA2Config):
        return read_llada2(path, config, dtype)
    return load_network(path, f"the model in {path}", ADVICE, config=config, dtype=dtype or "auto")


def network_on_meta(path: Path, raw: Mapping[str, Any]) -> PreTrainedModel:
    """Return the network of a directory or a GGUF file on the device `meta`, without its weights.

    Raises:
        UserError: its configuration cannot be read.
    """
    if path.suffix == GGUF:
        advice = f"{ADVICE}, or pip install 'blockdiffusion[adapt]'"
        config = from_pretrained(
            AutoConfig, path.parent, f"{path} cannot be read", advice, gguf_file=path.name
        )
    else:
        check_folder(path)
        config = _network_config(path, raw)
    with torch.device("meta"):
        if isinstance(config, LLaDA2Config):
            return LLaDA2MoeModelLM(config)
        return AutoModelForCausalLM.from_config(config)


def _network_config(path: Path, raw: Mapping[str, Any]) -> PretrainedConfig:
    """The configuration of the network; a published family's as that of the same layers."""
    family = FAMILIES.get(raw.get("model_type", ""))
    name = raw["model_type"] if family is None else family.model_type
    left_out = ("model_type", "auto_map", "architectures", "attn_implementation", SECTION, LORA)
    known = {key: value for key, value in raw.items() if key not in left_out}
    try:
        if name == LLaDA2Config.model_type:
            return LLaDA2Config(**known)
        return AutoConfig.for_model(name, **known)
    except Exception as error:  # each family checks its configuration in its own way
        raise UserError(
            f"{path / 'config.json'} is no {name} configuration ({error}); {ADVICE}"
        ) from error


def _read_with_adapter(path: Path, raw: Mapping[str, Any], dtype: torch.dtype) -> PreTrainedModel:
    """Read the parent of an adapter, with a row for the mask token, and merge the adapter in."""
    file = path / CONFIG
    section = section_of(path, raw)
    with records.of_file(file, ADVICE):
        if section is None or not isinstance(raw.get(LORA), Mapping):
            raise Damaged(f"it has no {SECTION} or no {LORA}, which an adapter needs")
        origin = records.build(AdapterOf, raw[LORA], f"{LORA}.")
    try:
        parent = find_path(origin.parent)
        network = read_network(parent, config_of(parent), dtype)
    except UserError as error:
        raise UserError(
            f"{path} is an adapter, and its parent cannot be read: {error}; if it is elsewhere, "
            f"set {LORA}.parent in {file}"
        ) from error
    if fingerprint(network) != origin.fingerprint:
        raise UserError(
            f"{path} is an adapter of another model than the one in {origin.parent}, whose weights "
            f"differ from those it was trained with; set {LORA}.parent in {file} to that one"
        )
    if num_embeddings(network) < section.vocab_size:
        network.resize_token_embeddings(section.vocab_size, mean_resizing=False)
    with records.of_file(path / ADAPTER, ADVICE):
        tensors = read_safetensors(path / ADAPTER)
        merge_adapter(network, tensors, origin.scale, section.mask_id)
    return network


def _read_gguf(path: Path, dtype: torch.dtype | None) -> PreTrainedModel:
    """Read a GGUF file's weights as floats. The configuration that transformers keeps says that
    they are quantised, and would prevent saving them."""
    network = from_pretrained(
        AutoModelForCausalLM,
        path.parent,
        f"{path} cannot be read",
        f"{ADVICE}, or install the extra that reads GGUF: pip install 'blockdiffusion[adapt]'",
        gguf_file=path.name,
        dtype=dtype or torch.float32,
    )
    config = network.config.to_dict()
    config.pop("quantization_config", None)
    plain = without_weights(network, type(network.config)(**config))
    plain.load_state_dict(network.state_dict(), assign=True)
    plain.tie_weights()
    return plain


def read_tokenizer(path: Path) -> Any:
    """Read the tokenizer of a directory or of a GGUF file; None if there is none."""
    options: dict[str, Any] = {}
    if path.suffix == GGUF:
        options, path = {"gguf_file": path.name}, path.parent
    elif not (path / "tokenizer.json").is_file():
        return None
    return from_pretrained(
        AutoTokenizer, path, f"the tokenizer in {path} cannot be read", ADVICE, **options
    )
