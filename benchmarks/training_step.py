"""One training step (forward + backward) of the 110M network: V = 50258, L = 1024, batch 1.

python -m benchmarks.training_step [--block-size 16] [--dtype float32] [--repeats 5]
python -m benchmarks.training_step --num-noisy 1 2   (N copies on one clean stream, in turn)

Freed memory is kept, as in `blockdiff train`, unless --give-back is given.
"""

from __future__ import annotations

import argparse
import resource
import time

import torch

from benchmarks.machine import describe, matrix_flops
from blockdiffusion.corruption import Count
from blockdiffusion.denoiser import masked_loss
from blockdiffusion.devices import keep_freed_memory
from blockdiffusion.models.transformer import BlockDiffusionConfig, BlockDiffusionModel

VOCAB, LENGTH = 50258, 1024


def paper_model(block_size: int) -> BlockDiffusionModel:
    """The paper's network (110M parameters, 170M with both embeddings), generic weights."""
    torch.manual_seed(0)
    model = BlockDiffusionModel(
        BlockDiffusionConfig(
            vocab_size=VOCAB, seq_len=LENGTH, block_size=block_size, width=768, num_layers=12,
            num_heads=12, cond_dim=128, dropout=0.1,
        )
    )  # fmt: skip
    for parameter in model.parameters():  # zeros would let kernels cheat
        torch.nn.init.normal_(parameter, std=0.02)
    return model


def step_flops(masked: int, num_noisy: int = 1) -> float:
    """Multiply-adds of forward and backward, times two; attention and head included."""
    width, layers, streams = 768, 12, num_noisy + 1
    per_token = 2 * 12 * width**2  # qkv, out, mlp
    unfinished = streams * LENGTH - masked  # by the last layer
    blocks = per_token * streams * LENGTH * layers - 2 * 9 * width**2 * unfinished
    attention = layers * streams * 2 * width * LENGTH * LENGTH  # a triangle of L x L each
    return 3 * (blocks + attention + 2 * masked * width * VOCAB)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--block-size", type=int, default=16)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--num-noisy", type=int, nargs="+", default=[1])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--give-back", action="store_true", help="freed memory, to the kernel")
    args = parser.parse_args()
    kept = not args.give_back and keep_freed_memory()
    dtype = getattr(torch, args.dtype)
    model = paper_model(args.block_size).train()
    clean = torch.randint(0, VOCAB - 1, (1, LENGTH), generator=torch.Generator().manual_seed(1))
    free = torch.ones_like(clean, dtype=torch.bool)
    # Half of the tokens on average; the same draw every time.
    drawn = {
        copies: Count(num_noisy=copies)(
            clean, free, args.block_size, VOCAB - 1, torch.Generator().manual_seed(2)
        )
        for copies in args.num_noisy
    }
    times: dict[int, list[float]] = {copies: [] for copies in drawn}
    for _ in range(args.repeats + 1):
        for copies, corrupted in drawn.items():
            model.zero_grad()
            start = time.perf_counter()
            with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
                nats = masked_loss(model, corrupted.noisy_BNL, clean, corrupted.weight_BNL)
            (nats / (copies * free.sum())).backward()
            times[copies].append(time.perf_counter() - start)
    peak = matrix_flops(dtype)
    resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(describe())
    print(f"freed memory {'kept' if kept else 'given back'}; at most {resident:.2f} GiB resident")
    first = args.num_noisy[0]
    for copies, corrupted in drawn.items():
        masked = int((corrupted.noisy_BNL == VOCAB - 1).sum())
        best, flops = min(times[copies][1:]), step_flops(masked, copies)
        ratio = best / min(times[first][1:])
        print(
            f"S={args.block_size} N={copies} {args.dtype}: {best:.2f} s a step (median "
            f"{sorted(times[copies][1:])[args.repeats // 2]:.2f}), {LENGTH / best:.0f} tokens/s, "
            f"{flops / 1e12:.2f} TFLOP, {flops / best / 1e9:.0f} GFLOP/s = "
            f"{flops / best / peak:.0%} of the measured {peak / 1e9:.0f}; {masked} tokens masked; "
            f"{ratio:.2f} times N={first}"
        )


if __name__ == "__main__":
    main()
