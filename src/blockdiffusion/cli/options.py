"""Options that several commands have."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

MODEL = Annotated[str, typer.Argument(help="Model or run directory, or a Hugging Face id.")]
DEVICE = Annotated[str, typer.Option(help="auto, cpu, cuda or mps.")]
DTYPE = Annotated[str, typer.Option(help="Weights: auto (as saved), float32, float64 or bf16.")]
SAMPLING_DTYPE = Annotated[
    str,
    typer.Option(help="Weights: auto (as saved), float32, float64, bf16 or int8 (approximate)."),
]
BOS = Annotated[
    bool | None,
    typer.Option("--bos/--no-bos", help="Position 0 is a given BOS; by default as in training."),
]
# Of measurements.
JSON_FILE = Annotated[
    Path | None,
    typer.Option("--json", help="Write the result here; once stopped, it goes on from there."),
]
SAMPLES = Annotated[int, typer.Option(help="Independent draws of the masks.")]
ORDERS = Annotated[int, typer.Option(help="K of the K-order bound, for orders.")]
MASK_SEED = Annotated[int, typer.Option(help="Of the masks.")]

# How to sample: of `sample`, `infill` and `generate-eval`.
POLICY = Annotated[
    str | None,
    typer.Option(
        help="first-hitting, ancestral, random, confidence, margin, entropy or remask; SEDD: "
        "analytic; by default the model's."
    ),
]
STEPS = Annotated[
    int | None, typer.Option(help="Steps per block, for ancestral, remask and analytic.")
]
TOKENS_PER_STEP = Annotated[
    int | None,
    typer.Option(help="Tokens of a pass, for random, confidence, margin and entropy."),
]
THRESHOLD = Annotated[
    float | None,
    typer.Option(help="Instead: of confidence or margin in [0, 1], or of entropy in nats."),
]
REMASK = Annotated[
    float | None, typer.Option(help="Share of the largest rate of remask, in [0, 1]; 1 by default.")
]
SCHEDULE = Annotated[
    str | None, typer.Option(help="Noise schedule of the steps: linear, cosine, square, ...")
]
STRIDE = Annotated[
    int | None,
    typer.Option(help="Models of one block: new tokens of each slide beyond L; L/2 by default."),
]
TOP_P = Annotated[float, typer.Option(help="Nucleus, in (0, 1]; 1 keeps all.")]
TOP_P_RULE = Annotated[
    str, typer.Option(help="transformers (keeps the token that crosses) or authors (drops it).")
]
TOP_K = Annotated[int | None, typer.Option(help="Keep the k most likely tokens.")]
TEMPERATURE = Annotated[float, typer.Option(help="Above 0.")]
WINDOW = Annotated[
    int | None, typer.Option(help="A token sees the last WINDOW tokens; constant memory.")
]
SEED = Annotated[int | None, typer.Option(help="For a draw that can be repeated.")]
JSON_LINES = Annotated[bool, typer.Option("--json", help="One JSON object a sample.")]
EOS = Annotated[bool, typer.Option(help="End at a sampled EOS.")]
CACHE = Annotated[bool, typer.Option(help="Keep keys and values of finished blocks.")]
