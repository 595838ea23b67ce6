"""The adaptation study: what does a causal model lose as a block diffusion model, by each choice?

    python -m studies.adaptation run PARENT --data DIR [--only s4 ...] [--steps 200] [--runs DIR]
    python -m studies.adaptation score --text FILE [--rows 16] [--runs DIR]
    python -m studies.adaptation table [--runs DIR] [--against s4]

Every run is `blockdiff train studies/adaptation.yaml` in a process of its own, on the same rows in
the same order. `score` reads the first tokens of a text in rows of the data's length and leaves
the nats of every row in the run's folder: autoregressive, from left to right in blocks, exact over
random orders (up to blocks of 4), and the bound. `table` prints the
means, and differences to one run with the standard error over rows.

The opponent is `tuned`: the parent trained for as many steps on the same rows, as a model of
one-token blocks, which is its own likelihood. A finished run is left alone and an interrupted one
resumes, so `run` can be called again at any time.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from blockdiffusion.evaluate.measured import mean_of

RECIPE = Path(__file__).with_name("adaptation.yaml")
RESULT = "test-rows.json"  # of a run: nats of every row by reading
EXACT_UP_TO = 4  # blocks of so many tokens are enumerated

# Name of a run -> its block size and what differs from the recipe.
RUNS: dict[str, tuple[int, tuple[str, ...]]] = {
    "tuned": (1, ()),
    "s4": (4, ("objective.ar_loss=0.5",)),
    "s8": (8, ("objective.ar_loss=0.5",)),
    "s16": (16, ("objective.ar_loss=0.5",)),
    "s4-no-ar-loss": (4, ()),
    "s4-causal-blocks": (4, ("objective.ar_loss=0.5", "adapt.block_attention=causal")),
    "s4-same-reading": (4, ("adapt.reading=same",)),
    "s4-block-clean": (4, ("adapt.clean_attention=block",)),
    "s4-grown": (4, ("objective.ar_loss=0.5", "train.block_sizes=[1,2,4]")),
    "s4-lora": (4, ("objective.ar_loss=0.5", "adapt.lora_rank=16", "optim.lr=1e-3")),
    "s4-reserved-mask": (4, ("objective.ar_loss=0.5", "adapt.mask=<reponame>")),
}


def perform(name: str, parent: str, data: Path, steps: int, runs: Path) -> None:
    """Train one run, or resume it; its output goes into a log beside it."""
    size, overrides = RUNS[name]
    out = runs / name
    if (out / "model").exists():
        return
    command = [
        sys.executable, "-m", "blockdiffusion", "train", str(RECIPE), f"out={out}",
        f"data.path={data}", f"adapt.parent={parent}", f"model.block_size={size}",
        f"train.steps={steps}", *overrides,
    ]  # fmt: skip
    if (out / "checkpoints").exists():
        command.append("--resume")
    runs.mkdir(parents=True, exist_ok=True)
    with open(runs / f"{name}.log", "a") as log:
        code = subprocess.run(command, stdout=log, stderr=log).returncode
    print(f"{name}: {'done' if code == 0 else f'stopped with {code}, see its log'}", flush=True)


# --- scores --------------------------------------------------------------------------------------


def score(name: str, text: str, num_rows: int, runs: Path) -> None:
    """Leave the nats of every row, by reading, in the folder of a finished run."""
    import torch

    import blockdiffusion
    from blockdiffusion.evaluate.compare import left_to_right_nats
    from blockdiffusion.evaluate.likelihood import likelihood

    model = blockdiffusion.load(runs / name)
    length, size = model.config.seq_len, model.config.block_size
    # A token is at most 64 characters here: so many suffice.
    ids = model.tokenizer(text[: 64 * num_rows * length])["input_ids"]
    rows_RL = torch.tensor(ids[: num_rows * length]).view(num_rows, length)
    readings: dict[str, list[float]] = {}
    if model.config.reading == "next" and model.config.clean_attention == "causal":
        one = model.with_block_size(1)
        readings["autoregressive"] = [left_to_right_nats(one, row) for row in rows_RL.split(1)]
    if size > 1:
        readings["left to right"] = [left_to_right_nats(model, row) for row in rows_RL.split(1)]
        best = "exact" if size <= EXACT_UP_TO else "complement"
        found = [likelihood(model, row, estimator=best) for row in rows_RL.split(1)]
        if best == "exact":
            readings["exact"] = [f.exact_nats_per_token * f.num_tokens for f in found]
        readings["bound"] = [f.nats_per_token * f.num_tokens for f in found]
    result = {"length": length, "block_size": size, "readings": readings}
    (runs / name / RESULT).write_text(json.dumps(result))
    print(f"{name}: scored", flush=True)


def table(runs: Path, against: str) -> Iterator[str]:
    """Return the lines of a Markdown table: perplexities, and differences in nats per token."""
    found = {
        name: json.loads((runs / name / RESULT).read_text())
        for name in RUNS
        if (runs / name / RESULT).exists()
    }
    columns = list(dict.fromkeys(r for run in found.values() for r in run["readings"]))
    yield f"| run | {' | '.join(columns)} |"
    yield "|" + "---|" * (len(columns) + 1)
    reference = found.get(against, {"readings": {}})["readings"]
    for name, run in found.items():
        cells = []
        for column in columns:
            nats = run["readings"].get(column)
            cells.append("" if nats is None else _cell(nats, reference.get(column), run["length"]))
        yield f"| {name} | {' | '.join(cells)} |"
    yield ""
    yield f"Perplexity, and nats per token more than `{against}` (± standard error over rows)."


def _cell(nats: list[float], reference: list[float] | None, length: int) -> str:
    perplexity = math.exp(mean_of([n / length for n in nats]).value)
    if reference is None or reference == nats:
        return f"{perplexity:.2f}"
    more = mean_of([(n - r) / length for n, r in zip(nats, reference, strict=True)])
    return f"{perplexity:.2f} ({more.value:+.3f} ± {more.stderr:.3f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("action", choices=["run", "score", "table"])
    parser.add_argument("parent", nargs="?", help="of `run`: the causal language model")
    parser.add_argument("--data", type=Path, help="of `run`: rows with the parent's tokenizer")
    parser.add_argument("--text", type=Path, help="of `score`: the text of the test")
    parser.add_argument("--rows", type=int, default=16, help="of `score`")
    parser.add_argument("--steps", type=int, default=200, help="of `run`")
    parser.add_argument("--only", nargs="+", choices=RUNS, default=list(RUNS))
    parser.add_argument("--against", choices=RUNS, default="tuned")
    parser.add_argument("--runs", type=Path, default=Path("runs/adaptation"))
    args = parser.parse_args()
    if args.action == "table":
        print("\n".join(table(args.runs, args.against)))
        return
    for name in args.only:
        if args.action == "run":
            perform(name, args.parent, args.data, args.steps, args.runs)
        elif (args.runs / name / "model").exists():
            score(name, args.text.read_text(encoding="utf-8"), args.rows, args.runs)


if __name__ == "__main__":
    main()
