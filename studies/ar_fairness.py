"""The fairness study: is our autoregressive baseline as good as a GPT-2 of transformers?

    python -m studies.ar_fairness run [--seeds 3] [--jobs 2] [--runs DIR] [--lr 2e-3 ...]
    python -m studies.ar_fairness table [--runs DIR] [--lr 2e-3 ...]

Every comparison with a baseline is worth as much as the baseline. Both networks are trained by this
package's loop with studies/ar_fairness.yaml: the same rows in the same order (per seed), tokens,
start symbol, optimizer, learning rates, average of the weights and steps; each has the
initialisation that it usually has. They score the same validation rows, exactly, and are compared
pairwise per seed, and row by row.

GPT-2 has the same width, layers, heads and dropout (where ours has it: behind attention and MLP).
Its embeddings are not tied, as ours are not: then the parameters are equal but for its learnt
positions (L times the width) and some biases, 1 % at these sizes. Tied, it would have a fifth less.

A finished run is left alone and an interrupted one resumes where it stopped, so `run` can be called
again at any time. `run` takes section.key=value too, which both networks then get.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import subprocess
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from studies.variance import mean_and_error

RECIPE = Path(__file__).with_name("ar_fairness.yaml")
NETWORKS = ("ours", "gpt2")
RESULT = "valid-rows.json"  # of a run: nats and tokens of every validation row


@dataclass(frozen=True)
class Job:
    """A training run of one network."""

    runs: Path
    network: str
    lr: float
    seed: int
    overrides: tuple[str, ...] = ()

    @property
    def out(self) -> Path:
        return self.runs / f"lr{self.lr:g}" / self.network / f"seed{self.seed}"

    @property
    def command(self) -> list[str]:
        return [
            sys.executable, "-m", "studies.ar_fairness", "one", "--runs", str(self.runs),
            "--network", self.network, "--lr", str(self.lr), "--seed", str(self.seed),
            *self.overrides,
        ]  # fmt: skip


def jobs(
    runs: Path, rates: Sequence[float], seeds: int, overrides: Sequence[str] = ()
) -> list[Job]:
    """All runs; both networks of a seed come together."""
    return [
        Job(runs, network, lr, seed + 1, tuple(overrides))
        for seed in range(seeds)
        for lr in rates
        for network in NETWORKS
    ]


def perform(job: Job) -> None:
    """Trains in a process of its own, or resumes; what the run says goes into a log beside it."""
    job.out.parent.mkdir(parents=True, exist_ok=True)
    with open(job.out.with_suffix(".log"), "a") as log:
        code = subprocess.run(job.command, stdout=log, stderr=log).returncode
    print(f"{job.out}: {'done' if code == 0 else f'stopped with {code}, see its log'}", flush=True)


# --- one run -------------------------------------------------------------------------------------


def gpt2(config: Any) -> Any:
    """Make a GPT-2 of transformers of the sizes of our `config`, autoregressive as ours is."""
    from transformers import GPT2Config, GPT2LMHeadModel

    from blockdiffusion.models.causal_lm import adapted_model

    network = GPT2LMHeadModel(
        GPT2Config(
            vocab_size=config.vocab_size,
            n_positions=config.seq_len,
            n_embd=config.hidden_size,
            n_layer=config.num_hidden_layers,
            n_head=config.num_attention_heads,
            resid_pdrop=config.dropout,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
            tie_word_embeddings=False,
            bos_token_id=config.bos_id,
            eos_token_id=config.eos_id,
        )
    )
    return adapted_model(network, config.diffusion())


def make_network(name: str, recipe: Any, manifest: Any) -> Any:
    """The network called `name` with its usual initialisation, a function of the recipe's seed."""
    import torch

    from blockdiffusion.runtime.seeding import seed_global
    from blockdiffusion.train.recipe import build_model

    ours = build_model(recipe, manifest)
    if name == "ours":
        return ours
    with torch.random.fork_rng(devices=[]):
        seed_global(recipe.train.seed, "weights")
        return gpt2(ours.full_config())


def train_one(job: Job) -> None:
    """Trains the network of `job`, or resumes; leaves the likelihood of every row in its folder."""
    import numpy as np

    from blockdiffusion.data.loader import TokenRows
    from blockdiffusion.errors import UserError
    from blockdiffusion.evaluate.likelihood import likelihood
    from blockdiffusion.files.disk import written_aside
    from blockdiffusion.train import checkpoint as checkpoints
    from blockdiffusion.train.display import make_display
    from blockdiffusion.train.loop import Periodic, train
    from blockdiffusion.train.recipe import differences, load_recipe, to_dict

    settings = [*job.overrides, f"out={job.out}", f"optim.lr={job.lr}", f"train.seed={job.seed}"]
    recipe = load_recipe(RECIPE, settings)
    saved = job.out / "config.yaml"
    changed = differences(to_dict(load_recipe(saved)), to_dict(recipe)) if saved.exists() else []
    if changed:
        raise UserError(
            f"{job.out} was started with another {', '.join(changed)}; choose another --runs"
        )
    rows, held_out = TokenRows(recipe.data.path, "train"), TokenRows(recipe.data.path, "valid")
    model = make_network(job.network, recipe, rows.manifest)

    def score(network: Any, number: int | None) -> Any:
        batch = held_out.rows(np.arange(min(number or held_out.num_rows, held_out.num_rows)))
        return likelihood(network, batch.ids_BL, valid=batch.valid_BL)

    def on_the_way(network: Any) -> dict[str, float]:
        found = score(network, recipe.eval.rows)
        return {"valid_bound": found.nats_per_token, "valid_perplexity": found.perplexity}

    def at_the_end(network: Any) -> dict[str, float]:
        found = score(network, None)
        values = {
            "parameters": sum(parameter.numel() for parameter in network.parameters()),
            "num_tokens": found.num_tokens,
            "nats_per_row": found.nats_per_row.tolist(),
        }
        with written_aside(job.out / RESULT) as file:
            file.write(json.dumps(values).encode())
        return {"valid_all": found.nats_per_token}

    train(
        model,
        rows,
        out=job.out,
        options=recipe.train,
        objective=recipe.objective,
        optim=recipe.optim,
        checkpoint=recipe.checkpoint,
        periodic=[
            Periodic(every=recipe.eval.every or recipe.train.steps, run=on_the_way),
            Periodic(every=recipe.train.steps, run=at_the_end),
        ],
        loggers=[make_display(recipe.train.steps)],
        config=to_dict(recipe),
        resume=checkpoints.holds_run(job.out),
    )


# --- the table -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Pair:
    """Both networks of one seed, on the same rows."""

    seed: int
    parameters: tuple[int, int]
    nats: tuple[float, float]
    row_differences: tuple[float, ...]  # ours minus theirs, nats
    num_tokens: int


def pairs(runs: Path, lr: float, seeds: int) -> Iterator[Pair]:
    """The seeds of which both runs are finished."""
    for seed in range(1, seeds + 1):
        files = [Job(runs, network, lr, seed).out / RESULT for network in NETWORKS]
        if not all(file.exists() for file in files):
            continue
        ours, theirs = (json.loads(file.read_text()) for file in files)
        rows = list(zip(ours["nats_per_row"], theirs["nats_per_row"], strict=True))
        tokens = ours["num_tokens"]
        yield Pair(
            seed=seed,
            parameters=(ours["parameters"], theirs["parameters"]),
            nats=(sum(o for o, _ in rows) / tokens, sum(t for _, t in rows) / tokens),
            row_differences=tuple(o - t for o, t in rows),
            num_tokens=tokens,
        )


def data_error(found: Sequence[Pair]) -> float:
    """Standard error over rows of the difference in nats per token, seeds averaged row by row."""
    rows = [statistics.fmean(r) for r in zip(*(p.row_differences for p in found), strict=True)]
    return statistics.stdev(rows) * math.sqrt(len(rows)) / found[0].num_tokens


def table(runs: Path, rates: Sequence[float], seeds: int) -> Iterator[str]:
    """A Markdown table for every learning rate, and a sentence that sums it up."""
    for lr in rates:
        found = list(pairs(runs, lr, seeds))
        if not found:
            continue
        ours, theirs = found[0].parameters
        more = 100 * (theirs / ours - 1)
        yield f"learning rate {lr:g}; parameters: {ours:,}, GPT-2 {theirs:,} ({more:+.1f} %)"
        yield ""
        yield "| seed | ours, nats per token | perplexity | GPT-2 | perplexity | difference |"
        yield "|---|---|---|---|---|---|"
        for pair in found:
            cells = " | ".join(f"{nats:.4f} | {math.exp(nats):.2f}" for nats in pair.nats)
            yield f"| {pair.seed} | {cells} | {pair.nats[0] - pair.nats[1]:+.4f} |"
        differences = [pair.nats[0] - pair.nats[1] for pair in found]
        yield ""
        yield (
            f"ours minus GPT-2: {mean_and_error(differences)} nats per token over seeds, "
            f"± {data_error(found):.4f} over rows (below zero: ours is better)"
        )
        yield ""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("action", choices=["run", "table", "one"])
    parser.add_argument("overrides", nargs="*", help="section.key=value, for both networks")
    parser.add_argument("--runs", type=Path, default=Path("runs/ar-fairness"))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time, of one thread each")
    parser.add_argument("--lr", type=float, nargs="+", default=[2e-3])
    parser.add_argument("--network", choices=NETWORKS, default="ours", help="of `one`")
    parser.add_argument("--seed", type=int, default=1, help="of `one`")
    args = parser.parse_intermixed_args()
    if args.action == "one":
        train_one(Job(args.runs, args.network, args.lr[0], args.seed, tuple(args.overrides)))
        return
    if args.action == "run":
        with ThreadPoolExecutor(args.jobs) as pool:
            list(pool.map(perform, jobs(args.runs, args.lr, args.seeds, args.overrides)))
    print("\n".join(table(args.runs, args.lr, args.seeds)))


if __name__ == "__main__":
    main()
