"""Held-out text from a prepared data directory, checked against the model that scores it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from blockdiffusion.checkpoints.card import public_name
from blockdiffusion.data.loader import Batch, TokenRows, free_tokens
from blockdiffusion.data.manifest import Manifest, data_fingerprint
from blockdiffusion.diffusion.denoiser import Denoiser
from blockdiffusion.errors import UserError
from blockdiffusion.evaluate.likelihood import Likelihood
from blockdiffusion.files.checksums import Report, silent
from blockdiffusion.limits import check_limit
from blockdiffusion.models.causal_lm import has_vocabulary

# The values of a likelihood that a model card keeps.
MEASURED = (
    "nats_per_token", "perplexity", "is_bound", "stderr_noise", "stderr_data",
    "exact_nats_per_token", "exact_perplexity", "orders_nats_per_token", "orders_perplexity",
    "estimator", "samples", "copies", "t_min", "bos", "num_tokens", "num_rows",
)  # fmt: skip


@dataclass(frozen=True)
class HeldOutText:
    """Rows to score, the UTF-8 bytes that they cover, and whether position 0 is a given BOS.

    The bytes of a part of a split are the split's times the share of tokens; those of responses are
    not known (None). Conversations stand one example a row.
    """

    batch: Batch
    num_bytes: float | None
    bos: bool

    @property
    def given_BL(self) -> torch.Tensor | None:
        """Context besides a BOS, bool (B, L); None = there is none."""
        return None if self.batch.target_BL is None else ~self.batch.target_BL

    def free_tokens(self) -> torch.Tensor:
        """Count the tokens of every row, int64 (B,), without padding and a given BOS."""
        return free_tokens(self.batch, self.bos).sum(1)


def read_rows(
    directory: str | Path,
    split: str,
    model: Denoiser,
    rows: int | None = None,
    bos: bool | None = None,
    report: Report = silent,
) -> HeldOutText:
    """Read the first `rows` rows (None = all) of a split.

    Model and data must agree on the BOS unless `bos` is given; if the model does not say, the data
    decide. `report` is called with the progress of the check of the files.

    Raises:
        UserError: no such data or split, no rows, damaged data, or data made for another
            vocabulary.
    """
    check_limit("rows", rows)
    source = TokenRows(directory, split, report)
    manifest, config = source.manifest, model.config
    if not has_vocabulary(model, manifest.vocab_size) or config.mask_id != manifest.mask_id:
        raise UserError(
            f"{directory} has V = {manifest.vocab_size} and mask {manifest.mask_id}, the model "
            f"V = {config.vocab_size} and mask {config.mask_id}; prepare the text with the "
            "model's tokenizer"
        )
    if bos is None:
        bos = manifest.row_bos
        if config.bos is not None and bool(config.bos) != bos:
            with_bos = "the data have" if bos else "the model has"
            raise UserError(
                f"only {with_bos} a given BOS at the start of a row; prepare {directory} "
                "the other way, or choose with --bos (given, not counted) or --no-bos"
            )
    count = min(source.num_rows, rows or source.num_rows)
    batch = source.rows(np.arange(count)).unpacked()
    info = manifest.splits[split]
    num_bytes = info.bytes * batch.num_tokens / info.tokens
    return HeldOutText(batch, None if batch.target_BL is not None else num_bytes, bos)


def evaluation_facts(
    result: Likelihood, manifest: Manifest, directory: str | Path, split: str, *, seed: int
) -> dict[str, Any]:
    """Return what a model card says of a measured likelihood, enough to repeat it.

    Args:
        result: of the first rows of a split.
        manifest: of the prepared data in `directory`.
        seed: of the masks.
    """
    values = {name: getattr(result, name) for name in MEASURED}
    return {name: value for name, value in values.items() if value is not None} | {
        "data": public_name(directory),
        "split": split,
        "data_sha256": data_fingerprint(manifest, split),
        "seq_len": manifest.seq_len,
        "seed": seed,
    }
