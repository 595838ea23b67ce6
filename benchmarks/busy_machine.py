"""Training and sampling beside other programs: what the waiting of OpenMP's threads costs.

python -m benchmarks.busy_machine [--competitors 0 2 8] [--seconds 6] [--rounds 2] [--only training]

Between two parallel parts of the network a thread waits for its partners. Where it spins, it takes
the core that a partner may be waiting for. Every setting is a process of its own, with its
variables set before PyTorch is imported; all of them take turns, `--rounds` times, beside so many
processes that compute without end. Prints tokens a second, the median of the rounds, as a Markdown
table.

The tasks: `training`, steps of the demo's network (4 rows of 128 tokens); `large training`, steps
of the paper's 110M network at L = 1,024; `sampling` and `large sampling`, one text with these.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

SETTINGS = {
    "default": {},
    "passive": {"OMP_WAIT_POLICY": "PASSIVE"},
    "spins 0": {"GOMP_SPINCOUNT": "0"},
    "spins 1,000": {"GOMP_SPINCOUNT": "1000"},
    "spins 10,000": {"GOMP_SPINCOUNT": "10000"},
    "one thread": {"OMP_NUM_THREADS": "1"},
}
OWN = "blockdiff"  # the setting that the command makes by itself
VARIABLES = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "OMP_NUM_THREADS")


def training(large: bool) -> tuple[Callable[[], object], int]:
    """A training step, and its tokens."""
    import torch

    from benchmarks.training_step import generic_model, paper_config
    from blockdiffusion.diffusion.denoiser import masked_loss
    from blockdiffusion.diffusion.estimators import Complement
    from blockdiffusion.runtime.devices import keep_freed_memory
    from blockdiffusion.train.optim import OptimOptions, make_optimizer

    keep_freed_memory()
    config = paper_config(16) if large else demo_config()
    model = generic_model(config).train()
    optimizer = make_optimizer(model.backbone, OptimOptions(lr=1e-6))
    draw = torch.Generator().manual_seed(1)
    rows = 1 if large else 4
    clean = torch.randint(0, config.vocab_size - 1, (rows, config.seq_len), generator=draw)
    free = torch.ones_like(clean, dtype=torch.bool)

    def step() -> None:
        noisy = Complement()(clean, free, config.block_size, config.mask_id, draw)
        masked_loss(model, noisy.noisy_BNL, clean, noisy.scored_BNL, noisy.weight_BNL).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step, clean.numel()


def sampling(large: bool) -> tuple[Callable[[], object], int]:
    """A short text, and its tokens."""
    from benchmarks.training_step import generic_model, paper_config
    from blockdiffusion.models.inference import optimize_for_inference
    from blockdiffusion.sampling import generate

    config = paper_config(4) if large else demo_config()
    model = optimize_for_inference(generic_model(config).eval())
    tokens = 16 if large else 64
    return lambda: generate(model, max_new_tokens=tokens, eos=False, top_p=0.9), tokens


def demo_config():
    """The sizes of the demo's network."""
    from blockdiffusion.models.transformer import BlockDiffusionConfig

    return BlockDiffusionConfig(
        vocab_size=2050, seq_len=128, block_size=4, hidden_size=128, num_hidden_layers=4,
        num_attention_heads=4,
        cond_dim=64, dropout=0.0,
    )  # fmt: skip


TASKS = {
    "training": lambda: training(large=False),
    "large training": lambda: training(large=True),
    "sampling": lambda: sampling(large=False),
    "large sampling": lambda: sampling(large=True),
}


def measure(task: str, seconds: float) -> float:
    """Tokens a second in this process."""
    step, tokens = TASKS[task]()
    step()
    start, done, spent = time.perf_counter(), 0, 0.0
    while spent < seconds:
        step()
        done += 1
        spent = time.perf_counter() - start
    return done * tokens / spent


@contextmanager
def competitors(count: int) -> Iterator[None]:
    """So many processes that compute without end."""
    endless = [sys.executable, "-c", "while True: pass"]
    processes = [subprocess.Popen(endless) for _ in range(count)]
    try:
        yield
    finally:
        for process in processes:
            process.kill()
            process.wait()


def run(setting: str, task: str, seconds: float) -> float:
    """`measure` in a process with a setting."""
    plain = {name: value for name, value in os.environ.items() if name not in VARIABLES}
    command = [sys.executable, "-m", "benchmarks.busy_machine", "--measure", task]
    command += ["--seconds", str(seconds), *(["--own"] if setting == OWN else [])]
    env = plain | SETTINGS.get(setting, {})
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=True)
    return float(done.stdout.split()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--competitors", type=int, nargs="+", default=[0, 2, 8])
    parser.add_argument("--seconds", type=float, default=6)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--only", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--settings", nargs="+", choices=[*SETTINGS, OWN])
    parser.add_argument("--measure", choices=TASKS, help="in this process; for the above")
    parser.add_argument("--own", action="store_true", help="with what the command sets")
    args = parser.parse_args()
    if args.measure:
        if args.own:
            from blockdiffusion.runtime.devices import spin_briefly_if_busy

            spin_briefly_if_busy()
        print(measure(args.measure, args.seconds))
        return
    settings = args.settings or [*SETTINGS, OWN]
    print(f"| task | others | {' | '.join(settings)} |")
    print(f"|---|---|{'---|' * len(settings)}")
    for task in args.only:
        for count in args.competitors:
            with competitors(count):
                rounds = [
                    [run(setting, task, args.seconds) for setting in settings]
                    for _ in range(args.rounds)
                ]
            rates = [statistics.median(column) for column in zip(*rounds, strict=True)]
            print(f"| {task} | {count} | {' | '.join(f'{r:,.0f}' for r in rates)} |", flush=True)


if __name__ == "__main__":
    main()
