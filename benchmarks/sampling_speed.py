"""Sampling with the 110M network, beside a GPT-2 of the same size in transformers.

python -m benchmarks.sampling_speed [--block-sizes 4 16] [--batches 1] [--tokens-per-step 1 4]
    [--dtypes float32 int8] [--tokens 64] [--rounds 3] [--authors CHECKOUT]

V = 50258, random weights, top-p 0.9, nothing ends early. One token a step is first hitting, more
are the policy `random`. All of a batch size take turns, `--rounds` times; the best of each counts
(ratios hold on a noisy machine). GPT-2 is `generate` with a cache; int8 is compared with its
bfloat16 where that is measured, and else with float32. The authors' code (see
`benchmarks.authors`), in float32 and with one row, takes part where --authors says where it is.
Prints a Markdown table; the floor of a call is the time to read the weights once, and that of its
matrix products.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks import authors
from benchmarks.machine import describe, matrix_flops, read_bandwidth
from benchmarks.training_step import LENGTH, VOCAB, paper_model
from blockdiffusion.models.inference import optimize_for_inference
from blockdiffusion.sampling import generate

TOP_P = 0.9


@dataclass
class Contestant:
    """A way to write text.

    Attributes:
        write: writes so many tokens a row; returns the network calls that a row took.
        floor: the least time of a call in seconds: to read the weights, and for the matrix products
            where the speed of such products is measured (not in 8 bits).
        rival: key of the GPT-2 that it is compared with.
        block_size: key of the authors' network that it is compared with.
    """

    dtype: str
    name: str
    batch: int
    write: Callable[[int], int]
    floor: tuple[float, ...] = ()
    rival: str | None = None
    block_size: int | None = None
    seconds: float = float("inf")
    calls: int = 0

    def race(self, tokens: int) -> None:
        start = time.perf_counter()
        self.calls = self.write(tokens)
        self.seconds = min(self.seconds, time.perf_counter() - start)

    def rate(self, tokens: int) -> float:
        return self.batch * tokens / self.seconds


def ours(model: Any, batch: int, tokens_per_step: int, tokens: int) -> int:
    how: dict[str, Any] = {"sampler": "random", "tokens_per_step": tokens_per_step}
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
    start = torch.full((batch, 1), VOCAB - 2, device=model.device)
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


def matrix_weights(model: Any) -> int:
    """Numbers that a call of the folded network reads: all but the input embedding, of which it
    takes a few rows, and the modulation."""
    return sum(
        p.numel()
        for name, p in model.backbone.named_parameters()
        if not any(part in name for part in ("embedding", "modulation", "time."))
    )


def contestants_of(
    dtype: str, batch: int, sizes: list[int], counts: list[int], rival: str, bandwidth: float
) -> list[Contestant]:
    kind = torch.bfloat16 if dtype == "bfloat16" else torch.float32
    bytes_each = {"int8": 1, "bfloat16": 2, "float32": 4}[dtype]
    flops = matrix_flops(kind)
    found = []
    for size in sizes:
        plain = paper_model(size).to(kind).eval()
        number, head = matrix_weights(plain), plain.output.weight.numel()
        model = optimize_for_inference(plain, int8=dtype == "int8")
        for count in (n for n in counts if n <= size):
            # Every weight meets every token of the block; the head those that are drawn.
            products = 2 * batch * ((number - head) * size + head * count)
            arithmetic = () if dtype == "int8" else (products / flops,)
            found.append(
                Contestant(
                    dtype,
                    f"S = {size}, {count} a step",
                    batch,
                    partial(ours, model, batch, count),
                    (number * bytes_each / bandwidth, *arithmetic),
                    rival,
                    size,
                )
            )
    return found


def others(
    batch: int, dtypes: list[str], sizes: list[int], checkout: Path | None
) -> dict[str | int, Contestant]:
    """What ours are compared with, by dtype (GPT-2) and block size (the authors' code, one row)."""
    found: dict[str | int, Contestant] = {}
    for dtype in dtypes:
        if dtype != "int8" or "bfloat16" not in dtypes:
            key = "bfloat16" if dtype == "bfloat16" else "float32"
            model = gpt2(getattr(torch, key))
            found[key] = Contestant(
                key, "GPT-2, transformers", batch, partial(theirs, model, batch)
            )
    if checkout is not None:
        for size in sizes:
            network = authors.authors_network(checkout, size, VOCAB, LENGTH).eval()
            write = partial(authors.write, network, size, top_p=TOP_P)
            found[size] = Contestant("float32", f"S = {size}, authors' code", 1, write)
    return found


def table(contestants: list[Contestant], compared: dict[str | int, Contestant], tokens: int) -> str:
    lines = []
    for one in contestants:
        floor = ", ".join(f"{1e3 * x:.1f}" for x in one.floor)
        lines.append(
            f"| {one.dtype} | {one.batch} | {one.name} | {one.rate(tokens):.1f} | "
            f"{1e3 * one.seconds / one.calls:.1f} | {one.calls} | {floor} | "
            f"{_times(one, compared.get(one.rival or ''), tokens)} | "
            f"{_times(one, compared.get(one.block_size or ''), tokens)} |"
        )
    return "\n".join(lines)


def _times(one: Contestant, other: Contestant | None, tokens: int) -> str:
    return "" if other is None else f"{one.rate(tokens) / other.rate(tokens):.2f}"


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
    parser.add_argument("--authors", type=Path, help="a checkout of kuleshov-group/bd3lms")
    args = parser.parse_args()
    print(describe())
    bandwidth = read_bandwidth()
    print(f"read bandwidth {bandwidth / 1e9:.1f} GB/s\n")
    print(
        "| dtype | batch | | tokens/s | ms a call | calls | floor: reading, arithmetic (ms) "
        "| of GPT-2 | of the authors' code |\n|---|---|---|---|---|---|---|---|---|"
    )
    for batch in args.batches:
        compared = others(batch, args.dtypes, args.block_sizes, args.authors)
        contestants = list(compared.values())
        for dtype in args.dtypes:
            rival = next(key for key in (dtype, "bfloat16", "float32") if key in compared)
            contestants += contestants_of(
                dtype, batch, args.block_sizes, args.tokens_per_step, rival, bandwidth
            )
        for contestant in contestants:
            contestant.write(2 * max(args.block_sizes))  # warms up
        for _ in range(args.rounds):
            for contestant in contestants:
                contestant.race(args.tokens)
        print(table(contestants, compared, args.tokens), flush=True)


if __name__ == "__main__":
    main()
