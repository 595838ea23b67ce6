"""The report of one training run, from its directory and from fresh samples."""

from __future__ import annotations

import platform
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from blockdiffusion.checkpoints.formats import load
from blockdiffusion.diffusion.denoiser import is_autoregressive
from blockdiffusion.diffusion.objectives import diffusion_of
from blockdiffusion.errors import UserError
from blockdiffusion.files.records import build, of_file, read_json, read_yaml
from blockdiffusion.models.block_diffusion import BlockDiffusion
from blockdiffusion.reports.curves import read_metrics
from blockdiffusion.reports.page import (
    Command,
    LikelihoodNumbers,
    ReportContents,
    RunFacts,
    Sample,
    write_report,
)
from blockdiffusion.reports.trace import Trace, trace_of_events
from blockdiffusion.runtime.seeding import generator
from blockdiffusion.runtime.versions import versions
from blockdiffusion.sampling import Finished, stream
from blockdiffusion.sampling.choosing import make_sampler
from blockdiffusion.train.checkpoint import latest, read_state

EVALUATION = "eval.json"


def report_run(
    run: str | Path,
    *,
    evaluation: str | Path | None = None,
    out: str | Path | None = None,
    num_samples: int = 3,
    max_new_tokens: int = 128,
    seed: int = 0,
) -> Path:
    """Write the page of the run in `run` and return its path.

    Args:
        evaluation: JSON of `blockdiff eval --json`; by default the `eval.json` of the run, if any.
        out: the page; `report.html` of the run by default.
        num_samples, max_new_tokens, seed: fresh samples for the page. The first one is also shown
            as a trace, unless the model is autoregressive.

    Raises:
        UserError: `run` holds no run, or the evaluation cannot be read.
    """
    run = Path(run)
    config = _read_config(run)
    model = load(run)
    trace, samples = _draw(model, num_samples, max_new_tokens, seed)
    page = Path(out) if out is not None else run / "report.html"
    curves = read_metrics(run)
    speeds = [speed for _, speed in curves.tokens_per_second]
    write_report(
        page,
        ReportContents(
            name=run.name or str(run),
            facts=_facts(model, run, config, speeds),
            likelihood=_likelihood(run, evaluation),
            curves=curves,
            trace=trace,
            samples=samples,
            config=config,
            commands=_commands(run, config),
        ),
    )
    return page


def _read_config(run: Path) -> dict[str, Any]:
    path, instead = run / "config.yaml", "give the run that wrote it"
    if not path.exists():
        raise UserError(f"{run} holds no training run (no config.yaml); give the out of a recipe")
    config = read_yaml(path, instead)
    with of_file(path, instead):
        build(_Run, config, strict=False)
    return config


@dataclass(frozen=True)
class _Data:
    path: str


@dataclass(frozen=True)
class _Train:
    batch_size: int


@dataclass(frozen=True)
class _Search:
    by: Literal["loss", "gradient"] = "loss"


@dataclass(frozen=True)
class _Run:
    """The keys of a recipe that the page reads; it only shows the others."""

    data: _Data
    train: _Train
    search: _Search


def _facts(
    model: BlockDiffusion, run: Path, config: Mapping[str, Any], speeds: list[float]
) -> RunFacts:
    checkpoint = latest(run)
    state = None if checkpoint is None else read_state(checkpoint)
    return RunFacts(
        block_size=model.config.block_size,
        seq_len=model.config.seq_len,
        vocab_size=model.config.vocab_size,
        parameters=sum(p.numel() for p in model.parameters()),
        clean_attention=model.config.clean_attention,
        autoregressive=is_autoregressive(model),
        diffusion="" if is_autoregressive(model) else diffusion_of(model.config).title,
        steps=None if state is None else state.step,
        batch_size=config["train"]["batch_size"],
        training_seconds=None if state is None else state.seconds,
        tokens_per_second=sorted(speeds)[len(speeds) // 2] if speeds else None,
        data=str(config["data"]["path"]),
        machine=f"{platform.machine()}, {torch.get_num_threads()} threads",
        versions=versions() if state is None else state.versions,
    )


def _likelihood(run: Path, evaluation: str | Path | None) -> LikelihoodNumbers | None:
    path = run / EVALUATION if evaluation is None else Path(evaluation)
    if evaluation is None and not path.exists():
        return None
    instead = "give what `blockdiff eval --json` wrote"
    values = read_json(path, instead)
    with of_file(path, instead):
        return LikelihoodNumbers.from_dict(values, f"{values.get('data')} ({values.get('split')})")


def _draw(
    model: BlockDiffusion, num_samples: int, max_new_tokens: int, seed: int
) -> tuple[Trace | None, list[Sample]]:
    """Draw samples without filters, each from its own random stream; trace the first."""
    trace, samples = None, []
    for number in range(num_samples):
        source = generator(seed, "report", number)
        events = list(stream(model, max_new_tokens=max_new_tokens, generator=source))
        done = events[-1]
        assert isinstance(done, Finished)
        replayed = number == 0 and not is_autoregressive(model)
        if replayed and model.tokenizer is not None:
            trace = trace_of_events(events, model.tokenizer, block_size=model.config.block_size)
        samples.append(
            Sample(
                text=" ".join(map(str, done.ids)) if done.text is None else done.text,
                seed=seed,
                sampler=make_sampler(model.config).name,
                nfe=done.nfe,
                tokens_per_forward=done.tokens_per_forward,
                num_tokens=len(done.ids) - done.prompt_tokens,
            )
        )
    return trace, samples


def _commands(run: Path, config: Mapping[str, Any]) -> list[Command]:
    place, data = shlex.quote(str(run)), shlex.quote(str(config["data"]["path"]))
    return [
        Command(purpose="Train it again", command=f"blockdiff train {place}/config.yaml out=again"),
        Command(purpose="Resume training", command=f"blockdiff train {place}/config.yaml --resume"),
        Command(purpose="Measure it", command=f"blockdiff eval {place} --data {data}"),
        Command(purpose="Read it", command=f"blockdiff sample {place} --stream"),
    ]
