"""What `blockdiff estimate` says against what really happens: CPU time of one thread, and memory.

python -m benchmarks.estimate [NAME ...] [--json FILE]
python -m benchmarks.estimate --plot FILE   (operations per token over L, as SVG; measures nothing)

Every network is estimated for this machine's CPU, measured with one thread, then trained for a few
updates and sampled from, in a process of its own. Time is that of the processor, not of the clock,
so that other work on the machine matters less; memory is the growth of the resident set to its
peak, in another process where the C library gives freed memory back at once (and, last column, in
the first one, where it does not). The prediction is made from the recipe's sizes and the measured
peaks alone.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

SMALL = {
    "num_hidden_layers": 4,
    "hidden_size": 128,
    "num_attention_heads": 4,
    "cond_dim": 64,
    "block_size": 4,
    "dropout": 0.0,
}
MEDIUM = {
    "num_hidden_layers": 6,
    "hidden_size": 384,
    "num_attention_heads": 6,
    "cond_dim": 128,
    "block_size": 16,
    "dropout": 0.1,
}
PAPER = {
    "num_hidden_layers": 12,
    "hidden_size": 768,
    "num_attention_heads": 12,
    "cond_dim": 128,
    "dropout": 0.1,
}
# name -> L, V, rows of an update and of a pass, model, objective, other sections
CASES: dict[str, dict[str, Any]] = {
    "demo": {"L": 128, "V": 2049, "batch": 4, "model": SMALL},
    "medium": {"L": 512, "V": 8192, "batch": 4, "model": MEDIUM},
    "medium, N = 1": {"L": 512, "V": 8192, "batch": 4, "model": MEDIUM,
                      "objective": {"estimator": "bernoulli"}},
    "medium, S = L": {"L": 512, "V": 8192, "batch": 4, "model": MEDIUM | {"block_size": 512},
                      "objective": {"estimator": "bernoulli"}},
    "medium, long": {"L": 2048, "V": 8192, "batch": 1, "model": MEDIUM,
                     "objective": {"estimator": "count"}},
    "medium, micro-batches": {"L": 512, "V": 8192, "batch": 4, "micro": 1, "model": MEDIUM},
    "medium, checkpointing": {"L": 512, "V": 8192, "batch": 4, "model": MEDIUM,
                              "train": {"activation_checkpointing": True}},
    "medium, bf16": {"L": 512, "V": 8192, "batch": 4, "model": MEDIUM,
                     "train": {"dtype": "bfloat16"}},
    "demo, Muon": {"L": 128, "V": 2049, "batch": 4, "model": SMALL, "optim": {"name": "muon"}},
    "medium, autoregressive": {"L": 512, "V": 8192, "batch": 4, "objective": {"name": "ar"},
                               "model": {k: v for k, v in MEDIUM.items()
                                         if k not in ("block_size", "cond_dim")}},
    "medium, Muon": {"L": 512, "V": 8192, "batch": 4, "model": MEDIUM, "optim": {"name": "muon"}},
    "paper, L = 512": {"L": 512, "V": 50258, "batch": 1, "model": PAPER | {"block_size": 16},
                       "objective": {"estimator": "bernoulli"}, "updates": 1},
}  # fmt: skip


def recipe_of(case: dict[str, Any], out: str) -> Any:
    """The recipe of a case."""
    import yaml

    from blockdiffusion.train.recipe import load_recipe

    train = {"steps": 1, "batch_size": case["batch"], "micro_batch_size": case.get("micro")}
    tree = {
        "out": out,
        "data": {"path": f"{out}/none"},
        "model": case["model"],
        "objective": case.get("objective", {}),
        "train": train | case.get("train", {}),
        "optim": case.get("optim", {}),
        "eval": {"every": None},
    }
    path = Path(out) / "recipe.yaml"
    path.write_text(yaml.safe_dump(tree))
    return load_recipe(path)


def resident(name: str) -> int:
    """A line of /proc/self/status in bytes: VmRSS now, VmHWM at its highest."""
    line = next(s for s in Path("/proc/self/status").read_text().splitlines() if name in s)
    return 1024 * int(line.split()[1])


def updates(recipe: Any, manifest: Any, count: int) -> Iterator[None]:
    """Trains a new network on random rows, update by update."""
    import torch

    from blockdiffusion.data.loader import Batch
    from blockdiffusion.diffusion.estimators import for_block_size
    from blockdiffusion.diffusion.objectives import diffusion_of
    from blockdiffusion.runtime.distributed import SINGLE
    from blockdiffusion.train.loop import accumulate_gradients
    from blockdiffusion.train.loss import DiffusionLoss, NextTokenLoss
    from blockdiffusion.train.optim import MovingAverage, clip_gradients, make_optimizer
    from blockdiffusion.train.parallel import Parallelism
    from blockdiffusion.train.recipe import build_model

    draw = torch.Generator().manual_seed(0)
    shape = (recipe.train.batch_size, manifest.seq_len)
    ids_BL = torch.randint(0, manifest.vocab_size - 1, shape, generator=draw)
    free_BL = torch.ones_like(ids_BL, dtype=torch.bool)
    model = build_model(recipe, manifest).train()
    model.backbone.activation_checkpointing = recipe.train.activation_checkpointing
    for parameter in model.parameters():  # zeros would let kernels cheat
        torch.nn.init.normal_(parameter, std=0.02, generator=draw)
    optimizer, average = (
        make_optimizer(model.backbone, recipe.optim),
        MovingAverage(model.backbone, 0.9999),
    )
    if recipe.objective.name == "ar":
        loss: Any = NextTokenLoss(Batch(ids_BL, None), free_BL)
    else:
        estimator, _ = for_block_size(recipe.objective.make_estimator(), model.config.block_size)
        estimator = diffusion_of(model.config).fitted(estimator)
        config = model.config
        drawn = estimator(ids_BL, free_BL, config.block_size, config.mask_id, draw)
        loss = DiffusionLoss(Batch(ids_BL, None), drawn)
    autocast = torch.autocast("cpu", dtype=torch.bfloat16, enabled=recipe.train.dtype == "bfloat16")
    parallelism = Parallelism(model, SINGLE)
    for step in range(1, count + 1):
        accumulate_gradients(parallelism, loss, free_BL.sum().item(), step, recipe.train, autocast)
        clip_gradients(model.parameters(), recipe.optim.clip_norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        average.update(step)
        yield


def measured_training(recipe: Any, manifest: Any, count: int) -> dict[str, float]:
    """CPU seconds of an update (the best one), and bytes that training holds at most."""
    Path("/proc/self/clear_refs").write_text("5")  # forget the highest resident set so far
    before = resident("VmRSS")
    times = [time.process_time()]
    for _ in updates(recipe, manifest, count + 1):
        times.append(time.process_time())
    seconds = [end - start for start, end in pairwise(times)]
    return {"seconds": min(seconds[1:]), "bytes": resident("VmHWM") - before}


def measured_sampling(recipe: Any, manifest: Any, tokens: int) -> dict[str, float]:
    """CPU seconds of a network call, over a text of `tokens` tokens."""
    import torch

    from blockdiffusion.models.inference import optimize_for_inference
    from blockdiffusion.sampling import generate
    from blockdiffusion.train.recipe import build_model

    model = build_model(recipe, manifest).eval()
    draw = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.02, generator=draw)

    copy = optimize_for_inference(model)

    def sample(count: int) -> Any:
        return generate(copy, num_samples=1, max_new_tokens=count, top_p=0.9, generator=draw)

    sample(2 * model.config.block_size)
    start = time.process_time()
    result = sample(tokens)
    seconds = time.process_time() - start
    return {"seconds": seconds / int(result.nfe.max()), "calls": int(result.nfe.max())}


def compare(name: str, memory_only: bool) -> dict[str, Any]:
    """A case: predicted and measured."""
    import torch

    from blockdiffusion.estimate.run import estimate_recipe, manifest_of
    from blockdiffusion.estimate.sampling import SamplingRequest
    from blockdiffusion.runtime.hardware import GPUS, this_cpu

    torch.set_num_threads(1)
    case = CASES[name]
    with tempfile.TemporaryDirectory() as out:
        recipe = recipe_of(case, out)
    sizes = {"seq_len": case["L"], "vocab_size": case["V"]}
    tokens = min(64, case["L"])
    cpu = GPUS[0] if memory_only else this_cpu(time.process_time)
    cpu = replace(cpu, cuda=False)
    request = SamplingRequest(max_new_tokens=tokens)
    found = estimate_recipe(recipe, cpu, sampling=request, **sizes)
    manifest = manifest_of(recipe, **sizes)
    count = 1 if memory_only else case.get("updates", 2)
    training = measured_training(recipe, manifest, count)
    if memory_only:
        return training
    one_block = not found.network.autoregressive and not found.network.has_clean
    sampling = None if one_block else measured_sampling(recipe, manifest, tokens)
    return {
        "name": name,
        "gflops": cpu.flops["float32"] / 1e9,
        "gb_per_second": cpu.bandwidth / 1e9,
        "tflop": found.training.flops.total / 1e12,
        "predicted_seconds": found.training.seconds.total,
        "parts": vars(found.training.seconds),
        "measured_seconds": training["seconds"],
        "predicted_bytes": found.training.memory.peak,
        "held_bytes": training["bytes"],
        "predicted_call": found.sampling.seconds_call,
        "measured_call": None if sampling is None else sampling["seconds"],
    }


def row(found: dict[str, Any]) -> str:
    """A line of the table."""

    def pair(predicted: float, measured: float | None, factor: float) -> str:
        if measured is None:
            return "| - | - | - |"
        ratio = predicted / measured
        return f"| {factor * predicted:,.3g} | {factor * measured:,.3g} | {ratio:.2f} |"

    parts = [
        pair(found["predicted_seconds"], found["measured_seconds"], 1),
        pair(found["predicted_bytes"], found["measured_bytes"], 1e-6),
        pair(found["predicted_call"], found["measured_call"], 1e3),
    ]
    cells = " ".join(parts).replace("| |", "|")
    held = f"{found['held_bytes'] / 1e6:,.3g}"
    return f"| {found['name']} | {found['tflop']:.3g} {cells} {held} |"


HEAD = """\
| network | TFLOP an update | s predicted | measured | ratio | MB predicted | measured | ratio | \
ms a call predicted | measured | ratio | MB held |
|---|---|---|---|---|---|---|---|---|---|---|---|"""
GIVE_BACK = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}


def child(name: str, what: str, environment: dict[str, str]) -> dict[str, Any]:
    """What a process of its own finds."""
    command = [sys.executable, "-m", "benchmarks.estimate", name, "--child", what]
    ended = subprocess.run(
        command, capture_output=True, text=True, check=True, env=os.environ | environment
    )
    return json.loads(ended.stdout.splitlines()[-1])


def picture() -> str:
    """Training operations per token of text over L, the paper's network, as one SVG."""
    from benchmarks.charts import named_curves
    from blockdiffusion.estimate.flops import Pass, training_flops
    from blockdiffusion.estimate.sizes import NetworkSizes
    from blockdiffusion.models.transformer import BlockDiffusionConfig

    lengths = range(512, 16_384 + 1, 512)
    kinds = {"S = 16, N = 2": (16, 2), "S = 16, N = 1": (16, 1), "S = L": (None, 1)}
    curves = {}
    for name, (size, copies) in kinds.items():
        points = []
        for length in lengths:
            config = BlockDiffusionConfig(
                vocab_size=50258, seq_len=length, block_size=size or length, **PAPER
            )
            p = Pass(rows=1, scored=copies * length / 2, num_noisy=copies, attention="flex")
            flops = training_flops(NetworkSizes.of_config(config), p).total
            points.append((length, flops / length / 1e9))
        curves[name] = points
    return named_curves(
        curves,
        end=lengths[-1],
        title="GFLOP of training per token of text over the length of a row",
        x_label="L",
        y_label="GFLOP per token",
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", default=[], metavar="NAME", help=", ".join(CASES))
    parser.add_argument("--json", type=Path, help="JSON lines of what was found")
    parser.add_argument("--child", choices=["time", "memory"], help=argparse.SUPPRESS)
    parser.add_argument("--plot", type=Path)
    args = parser.parse_args()
    if args.plot is not None:
        args.plot.write_text(picture())
        return
    if args.child:
        print(json.dumps(compare(args.names[0], args.child == "memory")))
        return
    from benchmarks.machine import describe

    print(f"{describe()} (one thread used)\n\n{HEAD}")
    lines = []
    for name in args.names or CASES:
        found = child(name, "time", {})
        found["measured_bytes"] = child(name, "memory", GIVE_BACK)["bytes"]
        lines.append(json.dumps(found))
        print(row(found), flush=True)
    if args.json is not None:
        args.json.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
