"""The ranges of numeric options: one table for the command line, recipes and Python.

A name means the same wherever it is an option. The bounds are far from every real use; they keep a
typing mistake, or a hostile file, from filling the memory or ending in a stack trace. Conditions on
several options (memory, divisors) are checked where all of them are known.
"""

from __future__ import annotations

import math
from dataclasses import fields
from typing import Any, NamedTuple

from blockdiffusion.errors import UserError, check_number, check_whole, shown

MOST_IDS = 2**24
MOST_TOKENS = 2**24  # of one text
SMALLEST, LARGEST = 1e-30, 1e30  # of real numbers: squares and inverses stay finite
MOST_COUNT = 10**12  # of steps, rows of a corpus and the like


class Limit(NamedTuple):
    """The interval of allowed values; an open end is not allowed itself."""

    least: float
    most: float
    whole: bool = True  # whole numbers only
    open_least: bool = False
    open_most: bool = False

    def instead_of(self, value: Any) -> str | None:
        """Return what a value must be instead; None if it is allowed."""
        if value != value:
            return "a number"
        if value < self.least or (self.open_least and value == self.least):
            return f"at least {shown(self.least)}" if self.whole else str(self)
        if value > self.most or (self.open_most and value == self.most):
            finite = ", and finite" * (self.most == math.inf)
            return f"at most {shown(self.most)}" if self.whole else f"{self}{finite}"
        measured = not self.whole and value and abs(value) != math.inf
        if measured and not SMALLEST <= abs(value) <= LARGEST:
            return f"0, or between {SMALLEST} and {LARGEST} in size"
        return None

    def __str__(self) -> str:
        """Return the interval in words: `at least 1`, `above 0`, `in [0, 1)`; "" if it is wide."""
        if self.least == -math.inf or (self.whole and self.least < 2):
            return ""
        if self.whole or self.most == math.inf:
            return f"{'above' if self.open_least else 'at least'} {self.least:g}"
        ends = "[("[self.open_least], "])"[self.open_most]
        return f"in {ends[0]}{self.least:g}, {self.most:g}{ends[1]}"


def interval(text: str) -> Limit:
    """Return the real numbers of an interval such as `[0, 1)`."""
    least, most = map(float, text[1:-1].split(","))
    return Limit(least, most, False, text[0] == "(", text[-1] == ")")


LIMITS: dict[str, Limit] = {
    # networks
    **dict.fromkeys(("vocab_size", "top_k"), Limit(1, MOST_IDS)),
    **dict.fromkeys(("mask_id", "bos_id", "eos_id", "pad_id", "start_id"), Limit(0, MOST_IDS)),
    **dict.fromkeys(
        ("seq_len", "block_size", "align", "tokens_per_step", "sub_block"), Limit(1, 2**20)
    ),
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
    "ar_loss": Limit(0, 1000, whole=False),
    "lora_rank": Limit(0, 2**14),
    "lora_alpha": interval("(0, 1000000]"),
    "num_noisy": Limit(1, 1024),
    "offset_step": interval("[0.001, 1]"),  # its inverse is a number of clips
    **dict.fromkeys(("lr", "eps", "clip_norm"), interval("(0, inf)")),
    "weight_decay": interval("[0, inf)"),
    **dict.fromkeys(
        ("momentum", "ema_decay", "dropout", "lora_dropout", "t_min"), interval("[0, 1)")
    ),
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
    # data
    "document_bytes": Limit(16, 2**25),
    "valid_fraction": interval("[0, 0.5]"),
    "skip_invalid": Limit(0, MOST_COUNT),
    # numbers that their owners check
    **dict.fromkeys(
        (
            "noise_eps", "temperature", "threshold", "min_entropy", "top_p", "remask", "tflops",
            "bandwidth", "memory", "price_per_hour", "target_stderr",
        ),
        interval("[-inf, inf]"),
    ),
}  # fmt: skip


def check_limit(name: str, value: Any, label: str | None = None) -> None:
    """Refuse a value that the option `name` cannot have; None stands for no value.

    Args:
        label: what messages call the option; its name by default.

    Raises:
        UserError: the value is not a number, not a whole one if one is needed, or out of range.
    """
    if value is None:
        return
    label, limit = label or name, LIMITS[name]
    (check_whole if limit.whole else check_number)(label, value)
    if allowed := limit.instead_of(value):
        raise UserError(f"{label} is {shown(value)}; it must be {allowed}")


def check_limits(options: Any, prefix: str = "") -> None:
    """Apply `check_limit` to every field of a dataclass that is in the table.

    Args:
        prefix: of the names in messages, such as `train.`; an entry with it goes first. With
            "--" they are those of the command line.
    """
    for item in fields(options):
        if name := limit_name(item.name, prefix):
            label = f"{prefix}{item.name}"
            label = label.replace("_", "-") if prefix == "--" else label
            check_limit(name, getattr(options, item.name), label)


def limit_name(name: str, prefix: str = "") -> str | None:
    """Return the entry of the table for a field, if any."""
    return next((entry for entry in (f"{prefix}{name}", name) if entry in LIMITS), None)
