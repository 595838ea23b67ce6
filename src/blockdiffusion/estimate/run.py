"""The cost of a recipe before it runs: sizes, memory, operations, time and price on a device.

Nothing is downloaded, trained or allocated. What is expected of a device is its peaks
(`runtime.hardware`) times the shares of them that `hardware.Shares` says.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from blockdiffusion.data.manifest import FORMAT_VERSION, MANIFEST_FILE, Manifest
from blockdiffusion.errors import UserError
from blockdiffusion.estimate.options import SamplingRequest
from blockdiffusion.estimate.sampling import SamplingEstimate, estimate_sampling
from blockdiffusion.estimate.sizes import NetworkSizes, has_equal_layers
from blockdiffusion.estimate.training import TrainingEstimate, estimate_training
from blockdiffusion.limits import check_limit
from blockdiffusion.runtime.hardware import Hardware
from blockdiffusion.train.adapt import adapted_on_meta
from blockdiffusion.train.recipe import Recipe, network_config


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """The cost of a recipe on a device.

    Attributes:
        recipe: its name. device: with the shares of its peaks that are assumed.
        devices: how many share the rows of an update.
        parameters, embedding_parameters: all, and those of input embedding and output.
    """

    recipe: str
    device: Hardware
    devices: int
    network: NetworkSizes
    parameters: int
    embedding_parameters: int
    training: TrainingEstimate
    sampling: SamplingEstimate

    def to_dict(self) -> dict[str, Any]:
        """Return it as plain values, in seconds, bytes, FLOP and FLOP/s."""
        return _plain(asdict(self))


def estimate_recipe(
    recipe: Recipe,
    device: Hardware,
    *,
    name: str = "recipe",
    seq_len: int | None = None,
    vocab_size: int | None = None,
    devices: int = 1,
    price_per_hour: float | None = None,
    sampling: SamplingRequest | None = None,
) -> Estimate:
    """Return the cost of a recipe.

    Args:
        seq_len, vocab_size: L and V (with the mask) of data that are not prepared yet.
        price_per_hour: of one device, in any currency.
        sampling: what to sample; by default one row of L tokens.

    Raises:
        UserError: there are no prepared data and no sizes either, or they contradict each other, or
            the recipe does not fit them; or a number is not possible.
    """
    if price_per_hour is not None and not 0 <= price_per_hour < math.inf:
        raise UserError(f"--price-per-hour is {price_per_hour:g}; it must not be negative")
    manifest = manifest_of(recipe, seq_len, vocab_size)
    if recipe.adapt.parent is None:
        config: Any = network_config(recipe, manifest)
        sizes = NetworkSizes.of_config(config)
    else:
        adapted = adapted_on_meta(recipe, manifest)
        if not has_equal_layers(adapted):
            raise UserError(
                f"{recipe.adapt.parent} has layers of several kinds, or mixtures of experts, whose "
                "cost is not known; estimate a model of equal layers, or train a few steps: the "
                "run shows its speed"
            )
        config, sizes = adapted.config, NetworkSizes.of(adapted)
    request = sampling or SamplingRequest()
    return Estimate(
        recipe=name,
        device=device,
        devices=devices,
        network=sizes,
        parameters=sizes.parameters,
        embedding_parameters=sizes.embedding_parameters,
        training=estimate_training(
            recipe, manifest, config, sizes, device, devices, price_per_hour
        ),
        sampling=estimate_sampling(config, sizes, device, request, price_per_hour),
    )


def manifest_of(recipe: Recipe, seq_len: int | None, vocab_size: int | None) -> Manifest:
    """Return the manifest of the recipe's data, or one of the given sizes."""
    place, given = Path(recipe.data.path), {"seq_len": seq_len, "vocab_size": vocab_size}
    manifest = Manifest.load(place) if (place / MANIFEST_FILE).exists() else None
    for key, value in given.items():
        option = f"--{key.replace('_', '-')}"
        check_limit(key, value, option)
        if value is not None and value < 2:
            raise UserError(f"{option} is {value}; it must be at least 2")
        if manifest is not None and value not in (None, own := getattr(manifest, key)):
            raise UserError(
                f"{option} is {value}, but the data in {recipe.data.path} have {own}; leave it "
                "out, or give another data.path=..."
            )
    if manifest is not None:
        return manifest
    if seq_len is None or vocab_size is None:
        raise UserError(
            f"{recipe.data.path} holds no prepared data to read L and V from; give --seq-len and "
            "--vocab-size (with the mask: 50258 for gpt2), or prepare the data first"
        )
    return Manifest(
        format_version=FORMAT_VERSION, seq_len=seq_len, packing="wrap", row_bos=False,
        row_eos=False, document_eos=True, vocab_size=vocab_size, mask_id=vocab_size - 1,
        bos_id=None, eos_id=None, pad_id=0, tokenizer="", tokenizer_sha256="", sources=(),
        options={}, splits={},
    )  # fmt: skip


def _plain(value: Any) -> Any:
    """Plain values of JSON, with None for infinite numbers."""
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
