"""What a token of a training step costs over the length of the rows, measured.

python -m benchmarks.length_scaling [--dtype float32] [--lengths 256 ...] [--plot FILE]

The paper's 110M network, S = 16, one noisy copy, forward and backward. Every step reads as many
tokens of text (2,048, or one row), so that what a step costs whatever it reads is shared alike; the
lengths take turns. Beside the seconds stands what the operations say: the account's, without the
pairs of tokens that a chunk of attention computes for nothing ("asked for").
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import torch

from benchmarks.charts import named_curves
from benchmarks.machine import describe
from benchmarks.training_step import VOCAB, Task, generic_model, paper_config, step_flops
from blockdiffusion.diffusion.denoiser import masked_loss
from blockdiffusion.diffusion.estimators import Corrupted
from blockdiffusion.models.transformer import BlockDiffusionConfig, BlockDiffusionModel
from blockdiffusion.runtime.devices import keep_freed_memory

BLOCK_SIZE, TOKENS = 16, 2048


def config_of(length: int) -> BlockDiffusionConfig:
    config = paper_config(BLOCK_SIZE)
    config.seq_len = length
    return config


def rows_of(length: int) -> int:
    return max(1, TOKENS // length)


def corrupted(length: int) -> tuple[torch.Tensor, Corrupted]:
    """Rows, and the same with half of the tokens masked."""
    draw = torch.Generator().manual_seed(1)
    clean = torch.randint(0, VOCAB - 1, (rows_of(length), length), generator=draw)
    return clean, Task("float32", 1, BLOCK_SIZE).corrupted(clean)


def step(model: BlockDiffusionModel, length: int, dtype: torch.dtype) -> float:
    """Seconds of forward and backward. The network has no weights that depend on the length."""
    clean, noisy = corrupted(length)
    start = time.perf_counter()
    with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        nats = masked_loss(model, noisy.noisy_BNL, clean, noisy.scored_BNL, noisy.weight_BNL)
    (nats / clean.numel()).backward()
    seconds = time.perf_counter() - start
    model.zero_grad()
    return seconds


def flops(length: int) -> float:
    """Of a token of text."""
    clean, noisy = corrupted(length)
    masked = int((noisy.noisy_BNL == VOCAB - 1).sum())
    return step_flops(config_of(length), masked, batch=len(clean)) / clean.numel()


def picture(seconds: dict[int, float], per_flop: float) -> str:
    """Measured milliseconds of a token, and its operations at one speed."""
    lengths = sorted(seconds)
    between = range(lengths[0], lengths[-1] + 1, lengths[0])
    return named_curves(
        {
            "measured": [(n, 1e3 * seconds[n]) for n in lengths],
            "operations, at the speed of the shortest rows": [
                (n, 1e3 * per_flop * flops(n)) for n in between
            ],
        },
        end=lengths[-1],
        title="Milliseconds of training per token of text over the length of a row",
        x_label="L",
        y_label="ms per token",
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--lengths", type=int, nargs="+", default=[256, 512, 1024, 2048, 4096])
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--plot", type=Path)
    args = parser.parse_args()
    keep_freed_memory()
    model = generic_model(config_of(args.lengths[0])).train()
    found: dict[int, list[float]] = {length: [] for length in args.lengths}
    for _ in range(args.repeats + 1):
        for length in args.lengths:
            found[length].append(step(model, length, getattr(torch, args.dtype)))
    seconds = {n: min(times[1:]) / (n * rows_of(n)) for n, times in found.items()}
    first = min(seconds)
    print(f"{describe()}\n{args.dtype}, S = {BLOCK_SIZE}; best of {args.repeats} steps, in turn\n")
    print(
        "| L | rows | ms a token | times the first | GFLOP a token | times the first | GFLOP/s |\n"
        "|---|---|---|---|---|---|---|"
    )
    for length, each in seconds.items():
        needed = flops(length)
        print(
            f"| {length:,} | {rows_of(length)} | {1e3 * each:.2f} | {each / seconds[first]:.2f} | "
            f"{needed / 1e9:.2f} | {needed / flops(first):.2f} | {needed / each / 1e9:.0f} |"
        )
    if args.plot is not None:
        args.plot.write_text(picture(seconds, seconds[first] / flops(first)))


if __name__ == "__main__":
    main()
