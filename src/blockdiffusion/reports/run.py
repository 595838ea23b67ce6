"""The report of one training run, gathered from its directory and from fresh samples."""

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
from blockdiffusion.models.transformer import BlockDiffusionModel
from blockdiffusion.reports.page import (
    Command,
    LikelihoodNumbers,
    ReportContents,
    RunFacts,
    Sample,
    read_metrics,
    write_report,
)
from blockdiffusion.reports.trace import Trace, trace_of_events
from blockdiffusion.runtime.seeding import generator
from blockdiffusion.sampling import DoneEvent, collect, prepare_prompts, stream
from blockdiffusion.sampling.processes import as_process, make_process
from blockdiffusion.train.checkpoint import latest, read_state, versions

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
    """Writes the page of the run in `run` and returns its path.

    Args:
        evaluation: JSON of `blockdiff eval --json`; `eval.json` of the run where it exists.
        out: the page; `report.html` of the run by default.
        num_samples, max_new_tokens, seed: fresh samples for the page; the first one is the trace.
            An autoregressive model has samples only.

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


@dataclass(frozen=True, kw_only=True)
class _Data:
    path: str


@dataclass(frozen=True, kw_only=True)
class _Train:
    batch_size: int


@dataclass(frozen=True, kw_only=True)
class _Search:
    by: Literal["loss", "gradient"] = "loss"


@dataclass(frozen=True, kw_only=True)
class _Run:
    """What the page reads of a recipe; the rest it shows."""

    data: _Data
    train: _Train
    search: _Search


def _facts(
    model: BlockDiffusionModel, run: Path, config: Mapping[str, Any], speeds: list[float]
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
    model: BlockDiffusionModel, num_samples: int, max_new_tokens: int, seed: int
) -> tuple[Trace | None, list[Sample]]:
    """Samples without filters, each from its own stream of the seed, and the first one's trace."""
    trace, samples = None, []
    for number in range(num_samples):
        prompts = prepare_prompts(model, None, 1, None)
        events = list(
            stream(
                model,
                prompts,
                max_new_tokens=max_new_tokens,
                bos=False,  # already in the prompt
                generator=generator(seed, "report", number),
            )
        )
        done = events[-1]
        assert isinstance(done, DoneEvent)
        result = collect(model, done)
        replayed = number == 0 and not is_autoregressive(model)
        if replayed and model.tokenizer is not None:
            trace = trace_of_events(
                events, model.tokenizer, block_size=model.config.block_size, prompt_ids=prompts[0]
            )
        ids = result.sequences[0].tolist()
        samples.append(
            Sample(
                text=" ".join(map(str, ids)) if result.texts is None else result.texts[0],
                seed=seed,
                policy=_way(model),
                nfe=int(result.nfe[0]),
                tokens_per_forward=float(result.tokens_per_forward[0]),
                num_tokens=int(result.lengths[0] - result.prompt_lengths[0]),
            )
        )
    return trace, samples


def _way(model: BlockDiffusionModel) -> str:
    if is_autoregressive(model):
        return "left to right"
    return as_process(make_process(model.config)).name


def _commands(run: Path, config: Mapping[str, Any]) -> list[Command]:
    place, data = shlex.quote(str(run)), shlex.quote(str(config["data"]["path"]))
    return [
        Command(purpose="Train it again", command=f"blockdiff train {place}/config.yaml out=again"),
        Command(purpose="Go on training", command=f"blockdiff train {place}/config.yaml --resume"),
        Command(purpose="Measure it", command=f"blockdiff eval {place} --data {data}"),
        Command(purpose="Read it", command=f"blockdiff sample {place} --stream"),
    ]
