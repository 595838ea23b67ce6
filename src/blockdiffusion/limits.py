"""The numbers that options may have: one table for the command line, recipes and Python.

A name means the same wherever it is an option. The bounds are far from every real use; they keep a
slip of the keyboard, or a hostile file, from filling the memory or ending in a stack trace. What
only some options together decide (a share of the memory, a divisor) is checked where it is known.
"""

from __future__ import annotations

import math
from dataclasses import fields
from typing import Any, NamedTuple

from blockdiffusion.errors import UserError, check_number, check_whole, shown

MOST_IDS = 2**24
MOST_TOKENS = 2**24  # of one text
SMALLEST, LARGEST = 1e-30, 1e30  # of what is no count: squares and inverses stay numbers
MOST_COUNT = 10**12  # of what is taken one after the other: steps, rows of a corpus


class Limit(NamedTuple):
    """The least and the most that is allowed; `whole`: whole numbers only."""

    least: float
    most: float
    whole: bool = True


LIMITS: dict[str, Limit] = {
    # networks
    **dict.fromkeys(("vocab_size", "top_k"), Limit(1, MOST_IDS)),
    **dict.fromkeys(("mask_id", "bos_id", "eos_id", "pad_id", "start_id"), Limit(0, MOST_IDS)),
    **dict.fromkeys(("seq_len", "block_size", "tokens_per_step"), Limit(1, 2**20)),
    **dict.fromkeys(("hidden_size", "cond_dim"), Limit(1, 2**17)),
    "num_hidden_layers": Limit(1, 10_000),
    "num_attention_heads": Limit(1, 10_000),
    "timesteps": Limit(1, 10**6),
    # training
    **dict.fromkeys(("train.steps", "every"), Limit(1, MOST_COUNT)),
    "warmup_steps": Limit(0, MOST_COUNT),
    **dict.fromkeys(("batch_size", "micro_batch_size", "batch", "max_rows"), Limit(1, 2**20)),
    "keep": Limit(1, 10**6),
    "threads": Limit(1, 4096),
    "num_noisy": Limit(1, 1024),
    "offset_step": Limit(0.001, 1, whole=False),  # its inverse is a number of clips
    # measuring
    **dict.fromkeys(("rows", "limit", "train_rows", "max_documents"), Limit(1, MOST_COUNT)),
    **dict.fromkeys(("mc_samples", "batches"), Limit(1, 10**6)),
    "replicates": Limit(2, 10**6),
    "orders": Limit(1, 10**5),
    "order": Limit(1, 64),
    # sampling
    **dict.fromkeys(("num_samples", "num"), Limit(1, 2**20)),
    **dict.fromkeys(("max_new_tokens", "max_tokens"), Limit(1, MOST_TOKENS)),
    **dict.fromkeys(("window", "context", "stride", "entropy_window"), Limit(1, 2**30)),
    "steps": Limit(1, 10**6),  # of a block
    # machines
    "seed": Limit(0, 2**64 - 1),
    **dict.fromkeys(("workers", "num_workers"), Limit(0, 1024)),
    "devices": Limit(1, 10**6),
    "document_bytes": Limit(1, 2**40),
    "skip_invalid": Limit(0, MOST_COUNT),
    # numbers whose owners tell, in their own words, which are allowed
    **dict.fromkeys(
        (
            "lr", "eps", "weight_decay", "clip_norm", "momentum", "ema_decay", "dropout", "t_min",
            "noise_eps", "temperature", "threshold", "min_entropy", "top_p", "remask",
            "valid_fraction", "tflops", "bandwidth", "memory", "price_per_hour", "target_stderr",
        ),
        Limit(-math.inf, math.inf, whole=False),
    ),
}  # fmt: skip


def check_limit(name: str, value: Any, label: str | None = None) -> None:
    """Refuses what the option `name` cannot be; None, which stands for no value, is allowed.

    Args:
        label: what to call the option; its name by default.

    Raises:
        UserError: the value is no number, no whole one where one is needed, or beyond its limits.
    """
    if value is None:
        return
    label, limit = label or name, LIMITS[name]
    (check_whole if limit.whole else check_number)(label, value)
    if value != value:
        raise UserError(f"{label} is nan; it must be a number")
    measured = not limit.whole and value and abs(value) != math.inf
    if measured and not SMALLEST <= abs(value) <= LARGEST:
        raise UserError(
            f"{label} is {shown(value)}; it must be 0, or between {SMALLEST} and {LARGEST} in size"
        )
    if value < limit.least:
        raise UserError(f"{label} is {shown(value)}; it must be at least {shown(limit.least)}")
    if value > limit.most:
        raise UserError(f"{label} is {shown(value)}; it must be at most {shown(limit.most)}")


def check_limits(options: Any, prefix: str = "") -> None:
    """`check_limit` for every field of a dataclass that is in the table.

    Args:
        prefix: of the names in messages, such as `train.`; an entry with it goes first. With
            "--" they are those of the command line.
    """
    for item in fields(options):
        for name in (f"{prefix}{item.name}", item.name):
            if name in LIMITS:
                label = f"{prefix}{item.name}"
                if prefix == "--":
                    label = label.replace("_", "-")
                check_limit(name, getattr(options, item.name), label)
                break
