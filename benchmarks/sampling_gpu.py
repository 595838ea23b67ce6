"""Sampling with the 110M network on a GPU, in bfloat16, beside a GPT-2 of the same size.

python -m benchmarks.sampling_gpu [--block-sizes 4 16] [--batches 1 8 64 256] [--tokens 128]
python -m benchmarks.sampling_gpu --authors CHECKOUT     (see benchmarks.authors; float32, one row)
python -m benchmarks.sampling_gpu --rehearse             (a tiny network on the CPU)

V = 50258, random weights, top-p 0.9, nothing ends early, so that nothing waits for a token's id.
One token a step is first hitting, four are the policy `random`; "by kernels" starts every kernel of
a pass by itself, where the others replay a recording. A row is printed as soon as it is known: the
better of two runs after one that warms up and records.

The floor of a call is the time to read the weights and the keys and values of half of the text
once, or that of its matrix products if it is longer.
"""

from __future__ import annotations

import argparse
import time
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks import authors
from benchmarks.machine import describe
from benchmarks.sampling_speed import TOP_P, gpt2, matrix_weights, ours, theirs
from benchmarks.training_gpu import Place, chosen_place, product_flops
from benchmarks.training_step import generic_model
from blockdiffusion.models.inference import optimize_for_inference
from blockdiffusion.runtime.hardware import best_seconds

BYTES = 2  # of a number in bfloat16


def bandwidth(place: Place) -> float:
    """Bytes per second, read and written, of a copy that no cache holds."""
    source = torch.ones(2**29 if place.device.type == "cuda" else 2**20, device=place.device)
    target = torch.empty_like(source)

    def copy() -> None:
        target.copy_(source)
        place.wait()

    return 2 * source.numel() * source.element_size() / best_seconds(copy)


class Table:
    """Times ways of writing, and prints a row for each."""

    def __init__(self, place: Place, tokens: int) -> None:
        self.place, self.tokens = place, tokens
        self.bandwidth, self.flops = bandwidth(place), product_flops(place)
        self.rival: dict[int, float] = {}  # tokens/s of GPT-2, by the batch
        print(
            f"copy {self.bandwidth / 1e12:.2f} TB/s, products {self.flops / 1e12:.0f} TFLOP/s\n\n"
            "| | batch | tokens/s | ms a call | calls | floor, ms | times the floor | of GPT-2 |\n"
            "|---|---|---|---|---|---|---|---|",
            flush=True,
        )

    def add(
        self, name: str, batch: int, write: Callable[[int], int], floor: float | None = None
    ) -> float | None:
        """One row; tokens per second, or None if something went wrong, which is printed."""
        try:
            seconds, calls = self._best(write)
        except Exception:
            traceback.print_exc()
            print(f"| {name} | {batch} | failed" + " |" * 6, flush=True)
            return None
        rate, call = batch * self.tokens / seconds, seconds / calls
        bound = "| " if floor is None else f"{1e3 * floor:.3f} | {call / floor:.1f}"
        times = f"{rate / self.rival[batch]:.1f}" if batch in self.rival else ""
        print(
            f"| {name} | {batch} | {rate:,.0f} | {1e3 * call:.2f} | {calls} | {bound} | {times} |",
            flush=True,
        )
        return rate

    def _best(self, write: Callable[[int], int]) -> tuple[float, int]:
        """Seconds and network calls."""
        self.place.begin(1)
        write(self.tokens)
        found = []
        for _ in range(2):
            self.place.wait()
            start = time.perf_counter()
            calls = write(self.tokens)
            self.place.wait()
            found.append((time.perf_counter() - start, calls))
        return min(found)

    def floor(self, model: Any, batch: int, tokens_per_step: int) -> float:
        """Seconds of a call at least."""
        config, number = model.full_config(), matrix_weights(model)
        head = model.output.weight.numel()
        cached = 2 * config.num_hidden_layers * config.hidden_size * batch * self.tokens / 2
        reading = BYTES * (number + cached) / self.bandwidth
        places = batch * (number - head) * config.block_size
        products = 2 * (places + batch * head * tokens_per_step) / self.flops
        return max(reading, products)


def compare(table: Table, place: Place, args: argparse.Namespace) -> None:
    """All rows: GPT-2 first, for every batch, and the authors' code last."""
    rival = None if args.rehearse else gpt2(torch.bfloat16).to(place.device)
    for batch in args.batches if rival is not None else []:
        rate = table.add("GPT-2, transformers", batch, partial(theirs, rival, batch))
        if rate is not None:
            table.rival[batch] = rate
    for size in args.block_sizes:
        with torch.device(place.device):
            plain = generic_model(place.config(size)).to(place.dtype).eval()
        model = optimize_for_inference(plain)
        for batch in args.batches:
            for count in (1, 4):
                floor = table.floor(plain, batch, count)
                write = partial(ours, model, batch, count)
                table.add(f"S = {size}, {count} a step", batch, write, floor)
        recorded, model.records_passes = model.records_passes, False
        write = partial(ours, model, 1, 1)
        table.add(f"S = {size}, 1 a step, by kernels", 1, write, table.floor(plain, 1, 1))
        model.records_passes = recorded
    for size in args.block_sizes if args.authors is not None else []:
        config = place.config(size)
        with torch.device(place.device):
            network = authors.authors_network(
                args.authors, size, config.vocab_size, config.seq_len
            ).eval()
        write = partial(authors.write, network, size, top_p=TOP_P)
        table.add(f"S = {size}, authors' code", 1, write)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--block-sizes", type=int, nargs="+", default=[4, 16])
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8, 64, 256])
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--authors", type=Path, help="a checkout of kuleshov-group/bd3lms")
    parser.add_argument("--rehearse", action="store_true", help="on the CPU, with a tiny network")
    args = parser.parse_args()
    place = chosen_place(args.rehearse)
    place.begin(1)
    print(f"{describe()}\n{place.describe()}")
    compare(Table(place, args.tokens), place, args)


if __name__ == "__main__":
    main()
