"""Sampling from an adapted model, beside `generate` of transformers with its parent.

python -m benchmarks.adapted_speed PARENT CHILD [--dtypes float32 bfloat16 int8] [--batches 1 8]
    [--threads 1] [--tokens 64] [--rounds 3]

CHILD is a model of `blockdiff adapt`. Top-p 0.9, prompts of 16 random tokens, nothing ends early.
The parent uses its own cache (`DynamicCache`); the child reveals one token a pass (`leftmost`), or
four by `confidence` with a fixed number, which is the speed of the mechanism and says nothing of
what such samples are worth. int8 is compared with the parent in float32. All of a batch size take
turns, `--rounds` times; the best of each counts, so ratios hold on a noisy machine. The floor is
the time to read each weight once.
"""

from __future__ import annotations

import argparse
from functools import partial
from typing import Any

import torch

import blockdiffusion
from benchmarks.machine import describe, read_bandwidth
from benchmarks.sampling_speed import TOP_P, Contestant
from blockdiffusion.checkpoints.formats import load_parent
from blockdiffusion.models.inference import optimize_for_inference
from blockdiffusion.sampling import generate

PROMPT = 16
BYTES = {"float32": 4, "bfloat16": 2, "int8": 1}


@torch.no_grad()
def theirs(model: Any, prompts: torch.Tensor, tokens: int) -> int:
    torch.manual_seed(0)
    model.generate(
        prompts,
        attention_mask=torch.ones_like(prompts),
        max_new_tokens=tokens,
        min_new_tokens=tokens,
        do_sample=True,
        top_p=TOP_P,
        top_k=0,
        pad_token_id=0,
    )
    return tokens


def ours(model: Any, prompts: torch.Tensor, how: dict[str, Any], tokens: int) -> int:
    made = generate(
        model, prompts.tolist(), max_new_tokens=tokens, eos=False, top_p=TOP_P, seed=0, **how
    )
    return int(made.nfe.max())


def contestants(
    parent: str, child: str, batch: int, dtypes: list[str], bandwidth: float
) -> list[Contestant]:
    prompts = torch.randint(
        1000, 40_000, (batch, PROMPT), generator=torch.Generator().manual_seed(0)
    )
    found = []
    for dtype in dtypes:
        kind = torch.bfloat16 if dtype == "bfloat16" else torch.float32
        plain = blockdiffusion.load(child, dtype=kind).eval()
        floor = (sum(p.numel() for p in plain.parameters()) * BYTES[dtype] / bandwidth,)
        if dtype != "int8":
            model = load_parent(parent).to(kind)
            write = partial(theirs, model, prompts)
            found.append(Contestant(dtype, "parent, transformers", batch, write, floor))
        adapted = optimize_for_inference(plain, int8=dtype == "int8")
        rival = "bfloat16" if dtype == "bfloat16" else "float32"
        ways = {"leftmost": 1, "confidence": min(4, plain.config.block_size)}
        for sampler, count in ways.items():
            how = {"sampler": sampler, "tokens_per_step": count}
            write = partial(ours, adapted, prompts, how)
            name = f"child, {sampler}, {count} a pass"
            found.append(Contestant(dtype, name, batch, write, floor, rival))
    return found


def table(racers: list[Contestant], tokens: int) -> str:
    rivals = {one.dtype: one for one in racers if one.rival is None}
    lines = []
    for one in racers:
        ratio = ""
        if one.rival in rivals:
            ratio = f"{one.rate(tokens) / rivals[one.rival].rate(tokens):.2f}"
        lines.append(
            f"| {one.dtype} | {one.batch} | {one.name} | {one.rate(tokens):.1f} | "
            f"{1e3 * one.seconds / one.calls:.1f} | {one.calls} | {1e3 * one.floor[0]:.1f} | "
            f"{ratio} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("parent")
    parser.add_argument("child")
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"], choices=BYTES)
    parser.add_argument("--batches", type=int, nargs="+", default=[1])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    print(describe())
    bandwidth = read_bandwidth()
    print(f"read bandwidth {bandwidth / 1e9:.1f} GB/s\n")
    print(
        "| dtype | batch | | tokens/s | ms a pass | passes | floor: reading (ms) | of parent |\n"
        "|---|---|---|---|---|---|---|---|"
    )
    for batch in args.batches:
        racers = contestants(args.parent, args.child, batch, args.dtypes, bandwidth)
        for racer in racers:
            racer.write(8)  # warms up
        for _ in range(args.rounds):
            for racer in racers:
                racer.race(args.tokens)
        print(table(racers, args.tokens), flush=True)


if __name__ == "__main__":
    main()
