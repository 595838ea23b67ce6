"""An account of a recipe before it runs: sizes, memory, operations, time and price on a device.

Nothing is downloaded, trained or allocated: the formulas are those of `flops`, the devices those of
`hardware`. What is expected of a device is its peaks times the shares that `hardware.Shares` says.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from blockdiffusion.data.manifest import FORMAT_VERSION, MANIFEST_FILE, Manifest
from blockdiffusion.errors import UserError
from blockdiffusion.estimate.flops import Network
from blockdiffusion.estimate.sampling import SamplingAccount, SamplingRequest, sampling_account
from blockdiffusion.estimate.training import TrainingAccount, training_account
from blockdiffusion.limits import check_limit
from blockdiffusion.runtime.hardware import Hardware
from blockdiffusion.train.recipe import Recipe, network_config


@dataclass(frozen=True, kw_only=True)
class Account:
    """What a recipe costs on a device.

    Attributes:
        recipe: its name. device: with the shares of its peaks that are assumed.
        devices: how many share the rows of an update.
        parameters, embedding_parameters: all, and those of input embedding and output.
    """

    recipe: str
    device: Hardware
    devices: int
    network: Network
    parameters: int
    embedding_parameters: int
    training: TrainingAccount
    sampling: SamplingAccount

    def to_dict(self) -> dict[str, Any]:
        """As plain values; seconds, bytes, FLOP and FLOP/s."""
        return _plain(asdict(self))


def make_account(
    recipe: Recipe,
    device: Hardware,
    *,
    name: str = "recipe",
    seq_len: int | None = None,
    vocab_size: int | None = None,
    devices: int = 1,
    price_per_hour: float | None = None,
    sampling: SamplingRequest | None = None,
) -> Account:
    """The account of a recipe.

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
    config = network_config(recipe, manifest)
    network = Network.of(config)
    return Account(
        recipe=name,
        device=device,
        devices=devices,
        network=network,
        parameters=network.parameters,
        embedding_parameters=network.embedding_parameters,
        training=training_account(recipe, manifest, config, device, devices, price_per_hour),
        sampling=sampling_account(config, device, sampling or SamplingRequest(), price_per_hour),
    )


def manifest_of(recipe: Recipe, seq_len: int | None, vocab_size: int | None) -> Manifest:
    """The manifest of the recipe's data, or one that says as much as is given."""
    for option, value in (("--seq-len", seq_len), ("--vocab-size", vocab_size)):
        check_limit(option[2:].replace("-", "_"), value, option)
        if value is not None and value < 2:
            raise UserError(f"{option} is {value}; it must be at least 2")
    if (Path(recipe.data.path) / MANIFEST_FILE).exists():
        manifest = Manifest.load(recipe.data.path)
        for option, value, own in (
            ("--seq-len", seq_len, manifest.seq_len),
            ("--vocab-size", vocab_size, manifest.vocab_size),
        ):
            if value not in (None, own):
                raise UserError(
                    f"{option} is {value}, but the data in {recipe.data.path} have {own}; leave it "
                    "out, or give another data.path=..."
                )
        return manifest
    if seq_len is None or vocab_size is None:
        raise UserError(
            f"{recipe.data.path} holds no prepared data to read L and V from; give --seq-len and "
            "--vocab-size (with the mask: 50258 for gpt2), or prepare the data first"
        )
    return Manifest(
        format_version=FORMAT_VERSION,
        seq_len=seq_len,
        packing="wrap",
        row_bos=False,
        row_eos=False,
        document_eos=True,
        vocab_size=vocab_size,
        mask_id=vocab_size - 1,
        bos_id=None,
        eos_id=None,
        pad_id=0,
        tokenizer="",
        tokenizer_sha256="",
        sources=(),
        options={},
        splits={},
    )


def _plain(value: Any) -> Any:
    """Mappings and sequences of JSON, without what is infinite."""
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
