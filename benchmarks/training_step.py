"""One training step (forward + backward) of the 110M network: V = 50258, L = 1024, batch 1.

python -m benchmarks.training_step [--block-size 16] [--dtypes float32 bfloat16] [--repeats 5]
python -m benchmarks.training_step --num-noisy 1 2        (N copies on one clean stream)
python -m benchmarks.training_step --authors CHECKOUT     (see benchmarks.authors)

Each is a process of its own, so that its memory can be told; they take turns. AdamW's update comes
after every step and is not timed; products are, after that, whose best rate is the peak. Freed
memory is kept, as in `blockdiff train`, unless --give-back is given.

On a GPU: python -m benchmarks.training_gpu.
"""

from __future__ import annotations

import argparse
import multiprocessing
import resource
import statistics
import time
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path

import torch

from benchmarks import authors
from benchmarks.machine import describe, matrix_flops
from blockdiffusion.diffusion.denoiser import masked_loss
from blockdiffusion.diffusion.estimators import Corrupted, Count
from blockdiffusion.models.transformer import BlockDiffusionConfig, BlockDiffusionModel
from blockdiffusion.runtime.devices import keep_freed_memory
from blockdiffusion.runtime.hardware import share_of_peak
from blockdiffusion.train.optim import OptimOptions, make_optimizer

VOCAB, LENGTH = 50258, 1024


def paper_config(block_size: int) -> BlockDiffusionConfig:
    """The sizes of the paper's network: 110M parameters, 170M with both embeddings."""
    return BlockDiffusionConfig(
        vocab_size=VOCAB, seq_len=LENGTH, block_size=block_size, hidden_size=768,
        num_hidden_layers=12,
        num_attention_heads=12, cond_dim=128, dropout=0.1,
    )  # fmt: skip


def generic_model(config: BlockDiffusionConfig) -> BlockDiffusionModel:
    """A network with generic weights: zeros would let kernels cheat."""
    torch.manual_seed(0)
    model = BlockDiffusionModel(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    return model


def paper_model(block_size: int) -> BlockDiffusionModel:
    """The paper's network."""
    return generic_model(paper_config(block_size))


def step_flops(
    config: BlockDiffusionConfig, masked: int, num_noisy: int = 1, batch: int = 1
) -> float:
    """Multiply-adds of forward and backward, times two; attention and head included.

    `masked` tokens of the batch have logits. Where one block is the whole sequence there is no
    clean stream.
    """
    width, layers, length = config.hidden_size, config.num_hidden_layers, config.seq_len
    has_clean = config.block_size < length
    streams = num_noisy + has_clean
    tokens = batch * streams * length
    per_token = 2 * 12 * width**2  # qkv, out, mlp
    unfinished = tokens - masked  # by the last layer
    blocks = per_token * tokens * layers - 2 * 9 * width**2 * unfinished
    seen = (length + config.block_size) / 2  # keys of a query, on average, in every stream
    queries = layers * tokens - has_clean * batch * length  # no clean ones in the last layer
    attention = 2 * 2 * width * seen * queries
    return 3 * (blocks + attention + 2 * masked * width * config.vocab_size)


@dataclass(frozen=True)
class Task:
    """What one process repeats: our step in a type and with N copies, or the authors'."""

    dtype: str
    num_noisy: int
    block_size: int
    checkout: Path | None = None
    keep_freed: bool = True

    @property
    def name(self) -> str:
        if self.checkout:
            return "authors' code, float32"
        return f"N = {self.num_noisy}, {self.dtype}"

    def corrupted(self, clean: torch.Tensor) -> Corrupted:
        """Half of the tokens on average; the same draw every time."""
        free = torch.ones_like(clean, dtype=torch.bool)
        estimator = Count(num_noisy=self.num_noisy)
        draw = torch.Generator().manual_seed(2)
        return estimator(clean, free, self.block_size, VOCAB - 1, draw)


def steps(task: Task, pipe: Connection) -> None:
    """Performs a step whenever asked; answers its seconds, the most memory so far in bytes, and the
    FLOP/s of matrix products right after it."""
    if task.keep_freed and not task.checkout:
        keep_freed_memory()
    clean = torch.randint(0, VOCAB - 1, (1, LENGTH), generator=torch.Generator().manual_seed(1))
    batch = task.corrupted(clean)
    if task.checkout:
        model = authors.authors_network(task.checkout, task.block_size, VOCAB, LENGTH).train()
        optimizer: torch.optim.Optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6)
    else:
        model = paper_model(task.block_size).train()
        optimizer = make_optimizer(model.backbone, OptimOptions(lr=1e-6))
    dtype = getattr(torch, task.dtype)

    def loss() -> torch.Tensor:
        if task.checkout:
            noisy, weight = batch.noisy_BNL[:, 0], batch.weight_BNL[:, 0]
            return authors.training_loss(model, noisy, clean, weight)
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            nats = masked_loss(model, batch.noisy_BNL, clean, batch.scored_BNL, batch.weight_BNL)
        return nats / (task.num_noisy * LENGTH)

    while pipe.recv():
        start = time.perf_counter()
        loss().backward()
        seconds = time.perf_counter() - start
        optimizer.step()
        optimizer.zero_grad()
        memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        pipe.send((seconds, memory, 0.0 if task.checkout else matrix_flops(dtype)))


def in_turn(tasks: list[Task], rounds: int) -> list[tuple[list[float], float, float]]:
    """Seconds of every step, the first one left out, the most memory and the peak of every task."""
    spawn = multiprocessing.get_context("spawn")
    pipes, processes = [], []
    for task in tasks:
        ours, theirs = spawn.Pipe()
        processes.append(spawn.Process(target=steps, args=(task, theirs), daemon=True))
        processes[-1].start()
        pipes.append(ours)
    found: list[tuple[list[float], float, float]] = [([], 0.0, 0.0) for _ in tasks]
    for turn in range(rounds + 1):
        for index, pipe in enumerate(pipes):
            pipe.send(True)
            seconds, memory, flops = pipe.recv()
            times, _, peak = found[index]
            found[index] = (times + [seconds] * (turn > 0), memory, max(peak, flops))
    for pipe, process in zip(pipes, processes, strict=True):
        pipe.send(False)
        process.join()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--block-size", type=int, default=16)
    parser.add_argument("--dtypes", nargs="+", choices=["float32", "bfloat16"], default=["float32"])
    parser.add_argument("--num-noisy", type=int, nargs="+", default=[1])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--give-back", action="store_true", help="freed memory, to the kernel")
    parser.add_argument("--authors", type=Path, help="a checkout of kuleshov-group/bd3lms")
    args = parser.parse_args()
    size = args.block_size
    tasks = [] if args.authors is None else [Task("float32", 1, size, args.authors)]
    tasks += [
        Task(dtype, copies, size, keep_freed=not args.give_back)
        for dtype in args.dtypes
        for copies in args.num_noisy
    ]
    print(describe())
    print(f"S = {size}; best (median) of {args.repeats} steps each, in turn\n")
    print(
        "| | seconds | TFLOP | of the peak | most memory, with AdamW | times the first |\n"
        "|---|---|---|---|---|---|"
    )
    found = in_turn(tasks, args.repeats)
    for task, (seconds, memory, peak) in zip(tasks, found, strict=True):
        clean = torch.zeros(1, LENGTH, dtype=torch.long)
        masked = int((task.corrupted(clean).noisy_BNL == VOCAB - 1).sum())
        flops = step_flops(paper_config(size), masked, task.num_noisy)
        best = min(seconds)
        share = share_of_peak(flops / best, peak)
        of_peak = "" if share is None else f"{share:.0%} of {peak / 1e9:.0f} GFLOP/s"
        print(
            f"| {task.name} | {best:.2f} ({statistics.median(seconds):.2f}) | {flops / 1e12:.2f} | "
            f"{'' if task.checkout else of_peak} | {memory / 2**30:.2f} GiB | "
            f"{best / min(found[0][0]):.2f} |"
        )


if __name__ == "__main__":
    main()
