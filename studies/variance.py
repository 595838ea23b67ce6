"""The variance study: which estimator trains best, at equal tokens and at equal compute.

    python -m studies.variance run [--jobs 2] [--seeds 3] [--only s4 s16 ...] [--runs DIR]
    python -m studies.variance table [--runs DIR]

Every arm is a training run in its own directory, driven through `blockdiff train` with
studies/variance.yaml. A finished arm is left alone and an interrupted one resumes where it stopped,
so `run` can be called again at any time. The important arms come first: whatever is finished is a
whole study. All arms of a part start from the same weights (trained with S = L) and, per seed, see
the same rows in the same order; they are compared pairwise per seed, on the same validation rows
with the same masks.
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

RECIPE = Path(__file__).with_name("variance.yaml")
BASE_STEPS = 1000  # as in the recipe
FULL_SIZE = (
    "model.num_hidden_layers=6",
    "model.hidden_size=192",
    "model.num_attention_heads=6",
    "model.cond_dim=128",
)


@dataclass(frozen=True)
class Arm:
    """One way to train: its overrides of the recipe.

    `cost` is what a step costs against one noisy copy and a clean stream; `tier` 1 comes after all
    arms of tier 0. `more_steps`: beyond those of its part.
    """

    name: str
    overrides: tuple[str, ...]
    cost: float = 1.0
    tier: int = 0
    more_steps: int = 0

    @property
    def folder(self) -> str:
        return "".join(c if c.isalnum() else "-" for c in self.name)


@dataclass(frozen=True)
class Part:
    """Arms that are compared with each other; the first is the reference.

    `seeds`: at most so many; `base`: the run with S = L that the arms start from.
    """

    name: str
    title: str
    steps: int
    common: tuple[str, ...]
    arms: tuple[Arm, ...]
    seeds: int | None = None
    base: str = "base"


BERNOULLI = "objective.estimator=bernoulli"
COMPLEMENT = "objective.estimator=complement"
COUNT = "objective.estimator=count"
CLIP = "objective.clip=[0.45,0.95]"
ESTIMATORS = (
    Arm("linear", ()),
    Arm("clip [0.45, 0.95]", (CLIP,)),
    Arm("count", (COUNT,)),
    Arm("complement", (COMPLEMENT,), 1.5),
    Arm("complement, clip [0.45, 0.95]", (COMPLEMENT, CLIP), 1.5),
    Arm("count, clip [0.45, 0.95]", (COUNT, CLIP), tier=1),
    Arm("searched clip", ("search.every=60", "search.rows=32", "search.replicates=4"), tier=1),
    Arm("cosine", ("objective.schedule=cosine",), tier=1),
    Arm("square root", ("objective.schedule=sqrt",), tier=1),
    Arm("logarithmic", ("objective.schedule=log",), tier=1),
    Arm("complement, N = 4", (COMPLEMENT, "objective.num_noisy=4"), 2.5, tier=1),
)
# Two copies that both follow the clip (the second of a pair masks what the clip leaves out); the
# paper's best clip at S = 16 (its table 8), and as the authors resample mask rates.
LOWER_CLIP = "objective.clip=[0.3,0.8]"
LONGER = (
    *ESTIMATORS,
    Arm("count, clip [0.45, 0.95], N = 2", (COUNT, CLIP, "objective.num_noisy=2"), 1.5, tier=1),
    Arm("clip [0.3, 0.8]", (LOWER_CLIP,), tier=1),
    Arm("count, clip [0.3, 0.8], N = 2", (COUNT, LOWER_CLIP, "objective.num_noisy=2"), 1.5, tier=1),
    Arm("clip [0.3, 0.8], resampled", ("objective.estimator=resampled", LOWER_CLIP), tier=1),
)
# Without blocks and conditioning, whose sizes are then the defaults.
AUTOREGRESSIVE = (
    "objective.name=ar",
    "objective.estimator=null",
    "model.block_size=1",
    "model.cond_dim=128",
)
FROM_BASE = ("model.init_from={base}", BERNOULLI)
PAIRS = ("model.init_from={base}", COMPLEMENT)
PARTS = (
    Part(
        "s4",
        "S = 4",
        300,
        (*FROM_BASE, "model.block_size=4", "eval.estimator=exact"),
        ESTIMATORS,
    ),
    Part(
        "s16",
        "S = 16",
        300,
        (*FROM_BASE, "model.block_size=16", "eval.estimator=complement"),
        LONGER,
    ),
    Part(
        "s1",
        "S = 1 and the autoregressive model, from scratch",
        900,
        ("eval.estimator=exact", "eval.every=300"),
        (
            Arm("autoregressive", AUTOREGRESSIVE, 0.5),
            Arm("S = 1, linear", ("model.block_size=1", BERNOULLI)),
            Arm(
                "S = 1, everything masked",
                ("model.block_size=1", BERNOULLI, "objective.clip=[1,1]"),
            ),
        ),
    ),
    Part(
        "gap",
        "the bound and the exact value along training, from the base",
        480,
        ("eval.every=120", "eval.rows=64"),
        (
            # From scratch, over as many tokens as the base and the arm together.
            Arm(
                "autoregressive",
                (*AUTOREGRESSIVE, "eval.every=40"),
                0.5,
                more_steps=BASE_STEPS,
            ),
            Arm("S = 2", (*PAIRS, "model.block_size=2", "eval.estimator=exact"), 1.5),
            Arm("S = 4", (*PAIRS, "model.block_size=4", "eval.estimator=exact"), 1.5),
            Arm("S = 8", (*PAIRS, "model.block_size=8", "eval.estimator=exact"), 1.5),
            Arm(
                "S = 16",
                (
                    *PAIRS,
                    "model.block_size=16",
                    "eval.estimator=orders",
                    "eval.orders=8",
                    "eval.mc_samples=2",
                ),
                1.5,
            ),
        ),
        seeds=1,
    ),
    Part(
        "full",
        "S = 4, a larger network",
        300,
        (*FROM_BASE, *FULL_SIZE, "model.block_size=4", "eval.estimator=exact"),
        ESTIMATORS[:4],
        seeds=1,
        base="base-full",
    ),
)


@dataclass(frozen=True)
class Job:
    """A training run: where, how many steps, with what."""

    out: Path
    steps: int
    overrides: tuple[str, ...]

    @property
    def finished(self) -> bool:
        return (self.out / "checkpoints" / f"step-{self.steps:08d}").exists()


def folder_of(runs: Path, part: Part, arm: Arm, seed: int) -> Path:
    return runs / part.name / arm.folder / f"seed{seed}"


def bases(runs: Path, names: Sequence[str]) -> Iterator[Job]:
    """The runs with S = L that the chosen parts start from."""
    wanted = {part.base for part in PARTS if part.name in names}
    if "base" in wanted:
        yield Job(runs / "base", BASE_STEPS, ())
    if "base-full" in wanted:
        yield Job(runs / "base-full", BASE_STEPS, (*FULL_SIZE, "train.threads=2"))


def jobs(runs: Path, names: Sequence[str], seeds: int) -> Iterator[Job]:
    """All runs of the chosen parts from their bases, the important ones first."""
    for tier in (0, 1):
        for part in PARTS:
            if part.name not in names:
                continue
            for seed in range(min(seeds, part.seeds or seeds)):
                for arm in part.arms:
                    if arm.tier != tier:
                        continue
                    steps = part.steps + arm.more_steps
                    settings = (*part.common, *arm.overrides, f"train.steps={steps}")
                    if not any(setting.startswith("eval.every=") for setting in settings):
                        # Where the arm has cost as much as the reference in all.
                        settings += (f"eval.every={at_equal_compute(part, arm)}",)
                    settings += (f"train.seed={seed + 1}",)
                    yield Job(
                        folder_of(runs, part, arm, seed),
                        steps,
                        tuple(s.format(base=runs / part.base) for s in settings),
                    )


def at_equal_compute(part: Part, arm: Arm) -> int:
    return round(part.steps / max(arm.cost, 1.0))


def perform(job: Job) -> None:
    """Trains, or resumes; what the run says goes into a log beside it."""
    if job.finished:
        return
    job.out.parent.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "blockdiffusion.cli", "train", str(RECIPE), f"out={job.out}"]
    command += job.overrides
    if (job.out / "config.yaml").exists():
        command.append("--resume")
    with open(job.out.with_suffix(".log"), "a") as log:
        code = subprocess.run(command, stdout=log, stderr=log).returncode
    print(f"{job.out}: {'done' if code == 0 else f'stopped with {code}, see its log'}", flush=True)


def run(runs: Path, names: Sequence[str], seeds: int, workers: int) -> None:
    for job in bases(runs, names):
        perform(job)
    with ThreadPoolExecutor(workers) as pool:
        list(pool.map(perform, jobs(runs, names, seeds)))


# --- the tables ------------------------------------------------------------------------------


def evaluations(out: Path) -> dict[int, dict[str, float]]:
    """Step -> what the evaluation after it gave, of one run; empty where there is none."""
    path = out / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    values = [json.loads(line) for line in lines]
    return {value["step"]: value for value in values if "valid_bound" in value}


def comparison(runs: Path, part: Part, seeds: int) -> Iterator[str]:
    """A Markdown table: bound at equal tokens and compute, and the paired difference; below it the
    noise of the bounds, where they are estimated (with the same masks for all arms)."""
    reference = part.arms[0]
    noise = 0.0
    yield f"| {part.title} | equal tokens | difference | equal compute | difference |"
    yield "|---|---|---|---|---|"
    for arm in part.arms:
        cells = []
        for step in (part.steps, at_equal_compute(part, arm)):
            pairs = []
            for seed in range(seeds):
                ours = evaluations(folder_of(runs, part, arm, seed)).get(step)
                theirs = evaluations(folder_of(runs, part, reference, seed)).get(part.steps)
                if ours and theirs:
                    pairs.append((ours["valid_bound"], theirs["valid_bound"]))
                    noise = max(noise, ours["valid_stderr_noise"])
            differences = [ours - theirs for ours, theirs in pairs]
            cells.append(f"{statistics.fmean(p[0] for p in pairs):.4f}" if pairs else "")
            cells.append(mean_and_error(differences))
        if any(cells):
            yield f"| {arm.name} | " + " | ".join(cells) + " |"
    if noise:
        yield f"\nNoise of each bound: at most {noise:.4f}."


def mean_and_error(values: Sequence[float]) -> str:
    """Mean ± standard error over seeds, and how many there are."""
    if not values:
        return ""
    if len(values) == 1:
        return f"{values[0]:+.4f} (1)"
    error = statistics.stdev(values) / math.sqrt(len(values))
    return f"{statistics.fmean(values):+.4f} ± {error:.4f} ({len(values)})"


def gaps(runs: Path, part: Part) -> Iterator[str]:
    """A Markdown table: how far each size is from the autoregressive model of as many tokens.

    The distance is split into the bound's (bound less exact value) and the model's (exact value
    less autoregressive); at S = 16 the bound of 8 orders stands for the exact value.
    """
    reference, *sizes = part.arms
    theirs = evaluations(folder_of(runs, part, reference, 0))
    yield "| S | step | bound | exact | noise | AR | the bound's part | the model's part |"
    yield "|---|---|---|---|---|---|---|---|"
    for arm in sizes:
        for step, value in evaluations(folder_of(runs, part, arm, 0)).items():
            exact = value.get("valid_exact", value.get("valid_orders"))
            other = theirs.get(step + reference.more_steps, {}).get("valid_bound")
            if exact is not None and other is not None:
                bound, noise = value["valid_bound"], value["valid_stderr_noise"]
                numbers = (bound, exact, noise, other, bound - exact, exact - other)
                yield f"| {arm.name} | {step} | " + " | ".join(f"{x:.4f}" for x in numbers) + " |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("action", choices=["run", "table"])
    parser.add_argument("--runs", type=Path, default=Path("runs/variance"))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time, of one thread each")
    names = [part.name for part in PARTS]
    parser.add_argument("--only", nargs="+", default=names, choices=names)
    args = parser.parse_args()
    if args.action == "run":
        run(args.runs, args.only, args.seeds, args.jobs)
    for part in PARTS:
        if part.name in args.only:
            lines = (
                gaps(args.runs, part)
                if part.name == "gap"
                else comparison(args.runs, part, args.seeds)
            )
            print("\n" + "\n".join(lines))


if __name__ == "__main__":
    main()
