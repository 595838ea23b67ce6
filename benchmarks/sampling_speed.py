"""Sampling with the 110M network, beside a GPT-2 of the same size in transformers.

python -m benchmarks.sampling_speed [--block-sizes 4 16] [--batches 1] [--tokens-per-step 1 4]
    [--dtypes float32 int8] [--tokens 64] [--rounds 3]

V = 50258, random weights, top-p 0.9, nothing ends early. One token a step is first hitting, more
are the policy `random`. All of a dtype and batch size take turns, `--rounds` times, and the best of
each counts, so that ratios hold on a noisy machine. GPT-2 is `generate` with a cache, in float32
where ours is int8 (it has no such products). Prints a Markdown table; the floor of a call is the
time to read the weights once, and that of its matrix products.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from benchmarks.machine import describe, matrix_flops, read_bandwidth
from benchmarks.training_step import VOCAB, paper_model
from blockdiffusion.models.inference import sampling_copy
from blockdiffusion.sampling import generate

TOP_P = 0.9


@dataclass
class Contestant:
    """A way to write text: `write(tokens)` returns the network calls that a row took. `floor` is
    the least time of a call in seconds: to read the weights, and for the matrix products."""

    name: str
    write: Callable[[int], int]
    floor: tuple[float, float] | None = None
    seconds: float = float("inf")
    calls: int = 0

    def race(self, tokens: int) -> None:
        start = time.perf_counter()
        self.calls = self.write(tokens)
        self.seconds = min(self.seconds, time.perf_counter() - start)


def ours(model: Any, batch: int, tokens_per_step: int, tokens: int) -> int:
    how: dict[str, Any] = {"policy": "random", "tokens_per_step": tokens_per_step}
    result = generate(
        model,
        num_samples=batch,
        max_new_tokens=tokens,
        eos=False,
        top_p=TOP_P,
        generator=torch.Generator().manual_seed(0),
        **({} if tokens_per_step == 1 else how),
    )
    return int(result.nfe.max())


def gpt2(dtype: torch.dtype) -> Any:
    """GPT-2 small with generic weights."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=VOCAB - 1, n_positions=1024))
    return model.to(dtype).eval()


@torch.no_grad()
def theirs(model: Any, batch: int, tokens: int) -> int:
    torch.manual_seed(0)
    start = torch.full((batch, 1), VOCAB - 2)
    model.generate(
        start,
        attention_mask=torch.ones_like(start),
        max_new_tokens=tokens,
        min_new_tokens=tokens,
        do_sample=True,
        top_p=TOP_P,
        top_k=0,
        pad_token_id=VOCAB - 2,
    )
    return tokens


def weights(model: Any) -> int:
    """Of a call: all but the input embedding, of which it takes a few rows."""
    return sum(p.numel() for name, p in model.named_parameters() if "embedding" not in name)


def contestants_of(
    dtype: str, batch: int, sizes: list[int], counts: list[int], bandwidth: float
) -> list[Contestant]:
    kind = torch.bfloat16 if dtype == "bfloat16" else torch.float32
    bytes_each = {"int8": 1, "bfloat16": 2, "float32": 4}[dtype]
    flops = matrix_flops(kind)
    found = []
    for size in sizes:
        plain = paper_model(size).to(kind).eval()
        number, head = weights(sampling_copy(plain)), plain.output.weight.numel()
        model = sampling_copy(plain, int8=dtype == "int8")
        for count in (n for n in counts if n <= size):
            # Every weight meets every token of the block; the head those that are drawn.
            products = 2 * batch * ((number - head) * size + head * count)
            floor = (number * bytes_each / bandwidth, products / flops)
            name = f"S = {size}, {count} a step"
            found.append(Contestant(name, partial(ours, model, batch, count), floor))
    return found


def table(contestants: list[Contestant], dtype: str, batch: int, tokens: int) -> str:
    """Lines of the table; the first contestant is what the others are compared with."""
    lines = []
    for one in contestants:
        floor = "" if one.floor is None else ", ".join(f"{1e3 * x:.1f}" for x in one.floor)
        lines.append(
            f"| {dtype} | {batch} | {one.name} | {batch * tokens / one.seconds:.1f} | "
            f"{1e3 * one.seconds / one.calls:.1f} | {one.calls} | {floor} | "
            f"{contestants[0].seconds / one.seconds:.2f} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--block-sizes", type=int, nargs="+", default=[4, 16])
    parser.add_argument("--batches", type=int, nargs="+", default=[1])
    parser.add_argument("--tokens-per-step", type=int, nargs="+", default=[1])
    parser.add_argument(
        "--dtypes", nargs="+", default=["float32"], choices=["float32", "bfloat16", "int8"]
    )
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    print(describe())
    bandwidth = read_bandwidth()
    print(f"read bandwidth {bandwidth / 1e9:.1f} GB/s\n")
    print(
        "| dtype | batch | | tokens/s | ms a call | calls | floor: reading, arithmetic (ms) "
        "| of GPT-2 |\n|---|---|---|---|---|---|---|---|"
    )
    for dtype in args.dtypes:
        reference = gpt2(torch.bfloat16 if dtype == "bfloat16" else torch.float32)
        for batch in args.batches:
            contestants = [
                Contestant("GPT-2, transformers", partial(theirs, reference, batch)),
                *contestants_of(
                    dtype, batch, args.block_sizes, args.tokens_per_step, bandwidth
                ),
            ]  # fmt: skip
            for contestant in contestants:
                contestant.write(2 * max(args.block_sizes))  # warms up
            for _ in range(args.rounds):
                for contestant in contestants:
                    contestant.race(args.tokens)
            print(table(contestants, dtype, batch, args.tokens), flush=True)


if __name__ == "__main__":
    main()
