"""Sampling with the 110M network: V = 50258, first hitting, top-p 0.9, batch 1 by default.

python -m benchmarks.sampling_speed [--block-size 4] [--batch 1] [--tokens 256] [--dtype ...]
"""

from __future__ import annotations

import argparse
import time

import torch

from benchmarks.machine import describe, read_bandwidth
from benchmarks.training_step import paper_model
from blockdiffusion.sampling import generate


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--block-size", type=int, default=4)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    args = parser.parse_args()
    model = paper_model(args.block_size).to(getattr(torch, args.dtype)).eval()

    def sample(tokens: int):
        generator = torch.Generator().manual_seed(0)
        return generate(
            model, num_samples=args.batch, max_new_tokens=tokens, top_p=0.9, generator=generator
        )

    sample(2 * args.block_size)
    start = time.perf_counter()
    result = sample(args.tokens)
    seconds = time.perf_counter() - start
    calls = int(result.nfe.max())
    # Every call reads all weights but the input embedding, of which it takes a few rows.
    read = sum(p.numel() * p.element_size() for p in model.parameters())
    read -= model.embedding.weight.numel() * model.embedding.weight.element_size()
    bandwidth = read_bandwidth()
    print(describe())
    print(
        f"S={args.block_size} batch {args.batch} {args.dtype}: "
        f"{args.batch * args.tokens / seconds:.1f} tokens/s, {calls} network calls, "
        f"{seconds / calls * 1e3:.1f} ms a call; reading {read / 1e6:.0f} MB of weights at the "
        f"measured {bandwidth / 1e9:.1f} GB/s takes {read / bandwidth * 1e3:.1f} ms"
    )


if __name__ == "__main__":
    main()
