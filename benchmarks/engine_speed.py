"""Requests of random lengths with the 110M network: one by one, in batches, through the engine.

python -m benchmarks.engine_speed [--requests 32] [--rows 8] [--dtype bfloat16] [--block-size 16]
    [--tokens-per-step 4]

Prompts have 0 to 32 tokens, and 8 to 96 new ones are asked for; V = 50258, random weights, top-p
0.9, nothing ends early. In a batch all rows go on until the longest is done; only what was asked
for counts. The three take turns, twice; the better time counts.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import Any

import torch

from benchmarks.machine import describe
from benchmarks.sampling_speed import TOP_P
from benchmarks.training_step import VOCAB, paper_model
from blockdiffusion import Engine
from blockdiffusion.models.inference import optimize_for_inference
from blockdiffusion.sampling import generate

Request = tuple[list[int], int]  # prompt, new tokens


def requests_of(count: int) -> list[Request]:
    """Prompts and lengths, always the same."""
    draw = torch.Generator().manual_seed(0)

    def number(low: int, high: int) -> int:
        return int(torch.randint(low, high, (), generator=draw))

    return [
        ([number(0, VOCAB - 2) for _ in range(number(0, 33))], number(8, 97)) for _ in range(count)
    ]


def in_batches(model: Any, requests: list[Request], rows: int, how: dict[str, Any]) -> None:
    for first in range(0, len(requests), rows):
        prompts, lengths = zip(*requests[first : first + rows], strict=True)
        generate(
            model, list(prompts), max_new_tokens=max(lengths), eos=False,
            generator=torch.Generator().manual_seed(first), **how,
        )  # fmt: skip


def in_engine(model: Any, requests: list[Request], rows: int, how: dict[str, Any]) -> None:
    engine = Engine(model, max_rows=rows, max_tokens=256)
    for seed, (prompt, length) in enumerate(requests):
        engine.submit(prompt, max_new_tokens=length, eos=False, seed=seed, **how)
    for _ in engine.run():
        pass


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--requests", type=int, default=32)
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="bfloat16")
    parser.add_argument("--block-size", type=int, default=16)
    parser.add_argument("--tokens-per-step", type=int, default=4)
    args = parser.parse_args()
    model = optimize_for_inference(
        paper_model(args.block_size).to(getattr(torch, args.dtype)).eval()
    )
    how = {"sampler": "random", "tokens_per_step": args.tokens_per_step, "top_p": TOP_P}
    requests = requests_of(args.requests)
    asked = sum(length for _, length in requests)
    ways: dict[str, Callable[[], None]] = {
        "one by one": lambda: in_batches(model, requests, 1, how),
        f"batches of {args.rows}": lambda: in_batches(model, requests, args.rows, how),
        f"engine, {args.rows} rows": lambda: in_engine(model, requests, args.rows, how),
    }
    print(describe())
    print(f"{args.dtype}, S = {args.block_size}, {args.tokens_per_step} a step; {asked} tokens\n")
    best = dict.fromkeys(ways, float("inf"))
    for _ in range(2):
        for name, write in ways.items():
            start = time.perf_counter()
            write()
            best[name] = min(best[name], time.perf_counter() - start)
    print("| | seconds | tokens/s | times one by one |\n|---|---|---|---|")
    for name, seconds in best.items():
        times = best["one by one"] / seconds
        print(f"| {name} | {seconds:.1f} | {asked / seconds:.0f} | {times:.2f} |")


if __name__ == "__main__":
    main()
