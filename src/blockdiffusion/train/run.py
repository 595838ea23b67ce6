"""From a recipe to a run: network, data, evaluations, samples, and training."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

import numpy as np

from blockdiffusion.checkpoints.card import Card, public_name, read_card
from blockdiffusion.checkpoints.formats import copy_weights
from blockdiffusion.data.loader import TokenRows
from blockdiffusion.data.manifest import TOKENIZER_FOLDER, Manifest
from blockdiffusion.data.tokenizers import load_tokenizer
from blockdiffusion.errors import UserError
from blockdiffusion.evaluate.likelihood import choose_estimator, likelihood
from blockdiffusion.evaluate.prepared import evaluation_facts
from blockdiffusion.models.block_diffusion import BlockDiffusion
from blockdiffusion.reports.terminal import progress_bar
from blockdiffusion.runtime.distributed import ProcessGroup, process_group
from blockdiffusion.runtime.seeding import generator
from blockdiffusion.sampling import generate
from blockdiffusion.train.adapt import adapted_for
from blockdiffusion.train.checkpoint import TrainState, latest
from blockdiffusion.train.display import make_display
from blockdiffusion.train.loggers import make_loggers
from blockdiffusion.train.loop import Periodic, train
from blockdiffusion.train.recipe import (
    Recipe,
    build_model,
    differences,
    load_recipe,
    to_dict,
    with_block_size,
)
from blockdiffusion.train.schedule_search import ScheduleSearch

MOST_NAMES = 20  # sources that a model card names

# A resumed run may change these, which do not touch the weights. (Moved data are recognised by
# their fingerprint.)
CHANGEABLE = ("out", "data.path", "eval.", "sample.", "checkpoint.", "log.", "train.parallel")


def run_training(
    recipe: Recipe, *, resume: bool = False, resume_command: str | None = None
) -> TrainState:
    """Train as the recipe says, with a display on standard error; see `train.loop.train`.

    Processes started by torchrun share the work; the first of them logs and writes.

    Args:
        resume: the run in `recipe.out`; the recipe may differ from the run's in
            `out`, `data.path`, `eval`, `sample`, `checkpoint`, `log` and `train.parallel`, and in
            `train.steps` where the learning rate does not depend on it.
        resume_command: the command that an interrupted run shows; by default one that resumes from
            the run's own config.yaml.

    Raises:
        UserError: see `train.loop.train`; or the recipe is not that of the run to resume.
        PeerFailure: another process of the job ended.
    """
    with process_group() as processes:
        return _run_training(recipe, processes, resume, resume_command)


def _run_training(
    recipe: Recipe, processes: ProcessGroup, resume: bool, resume_command: str | None
) -> TrainState:
    out, data = Path(recipe.out), Path(recipe.data.path)
    with progress_bar("data", quiet=not processes.is_first) as report:
        rows = TokenRows(data, "train", report)
    recipe = with_block_size(recipe, rows.manifest)
    if resume:
        _refuse_changes(recipe, out / "config.yaml")
    is_new = recipe.adapt.parent is None
    model: BlockDiffusion = (build_model if is_new else adapted_for)(recipe, rows.manifest)
    tokenizer = data / TOKENIZER_FOLDER
    model.tokenizer = load_tokenizer(tokenizer)  # for samples
    notes = []
    if recipe.model.init_from is not None and not (resume and latest(out)):
        notes.append(_start_weights(recipe.model.init_from, out, model))
    saved = shlex.quote(str(out / "config.yaml"))
    loggers = [make_display(recipe.train.steps), *make_loggers(recipe.log, out)]
    return train(
        model,
        rows,
        out=out,
        options=recipe.train,
        objective=recipe.objective,
        optim=recipe.optim,
        checkpoint=recipe.checkpoint,
        search=_search(recipe, data, rows.manifest, model.config.block_size, processes),
        periodic=[
            *_evaluation(recipe, data, rows.manifest, model.config, processes),
            *_sampling(recipe, processes),
        ],
        loggers=loggers if processes.is_first else [],
        tokenizer=tokenizer,
        describe=lambda state: _card(recipe, rows.manifest, state),
        config=to_dict(recipe),
        notes=notes,
        resume=resume,
        resume_command=resume_command or f"blockdiff train {saved} --resume",
        processes=processes,
    )


def _start_weights(init_from: str, out: Path, model: BlockDiffusion) -> str:
    """Copy the weights in; return a note for the log."""
    if Path(init_from).resolve() in (out.resolve(), (out / "model").resolve()):
        raise UserError(
            f"model.init_from and out are both {out}; choose another out=... for the new run"
        )
    copy_weights(init_from, model)
    return f"started from the weights in {init_from}"


def _refuse_changes(recipe: Recipe, saved: Path) -> None:
    if not saved.exists():
        return  # `train` says what is missing
    changed = differences(to_dict(load_recipe(saved)), to_dict(recipe))
    changed = [key for key in changed if not key.startswith(CHANGEABLE)]
    if recipe.optim.schedule == "constant" and not recipe.train.block_sizes:
        changed = [key for key in changed if key != "train.steps"]
    if changed:
        keys = ", ".join(changed)
        reason = "block sizes depend" if recipe.train.block_sizes else "learning rate depends"
        why = f" (the {reason} on it)" if changed == ["train.steps"] else ""
        raise UserError(
            f"the run in {saved.parent} was started with another {keys}{why}; resume with its own "
            f"{saved}, or choose another out=... for a new run"
        )


def _search(
    recipe: Recipe, data: Path, manifest: Manifest, block_size: int, processes: ProcessGroup
) -> ScheduleSearch | None:
    if recipe.search.every is None:
        return None
    if "valid" not in manifest.splits:
        raise UserError(f"{data} has no validation rows; set search.every=null to train without")
    rows = TokenRows(data, "valid")
    seed = recipe.train.seed
    return ScheduleSearch(recipe.search, recipe.objective, rows, block_size, seed, processes)


def _evaluation(
    recipe: Recipe, data: Path, manifest: Manifest, network: Any, processes: ProcessGroup
) -> list[Periodic]:
    """Return the evaluation of the validation bound, with the same masks every time."""
    if recipe.eval.every is None:
        return []
    if "valid" not in manifest.splits:
        raise UserError(f"{data} has no validation rows; set eval.every=null to train without")
    choose_estimator(recipe.eval, network)  # now, not at the first evaluation
    rows = TokenRows(data, "valid")
    batch = rows.rows(np.arange(min(rows.num_rows, recipe.eval.rows or rows.num_rows))).unpacked()
    given_BL = None if batch.target_BL is None else ~batch.target_BL

    def evaluate(model: Any) -> dict[str, Any]:
        result = likelihood(
            model,
            batch.ids_BL,
            recipe.eval,
            valid=batch.valid_BL,
            given=given_BL,
            generator=generator(recipe.train.seed, "evaluate"),
            processes=processes,
        )
        tighter = {
            "valid_exact": result.exact_nats_per_token,
            "valid_orders": result.orders_nats_per_token,
        }
        return {
            "valid_bound": result.nats_per_token,
            "valid_stderr_noise": result.stderr_noise,
            "valid_stderr_data": result.stderr_data,
            "valid_perplexity_bound" if result.is_bound else "valid_perplexity": result.perplexity,
            **{name: value for name, value in tighter.items() if value is not None},
            "evaluation": evaluation_facts(result, manifest, data, "valid", seed=recipe.train.seed),
        }

    return [Periodic(every=recipe.eval.every, run=evaluate)]


def _card(recipe: Recipe, manifest: Manifest, state: TrainState) -> Card:
    """Return the card of the run's released model."""
    started, origin = ("model", "init_from") if recipe.adapt.parent is None else ("adapt", "parent")
    sections = {name: to_dict(recipe)[name] for name in (started, "objective", "train", "optim")}
    source = sections[started][origin]
    sections[started][origin] = None if source is None else public_name(source)
    # Settings of this machine do not matter to others.
    memory = ("micro_batch_size", "activation_checkpointing", "parallel")
    for name in ("steps", "device", "threads", "compile", *memory):
        del sections["train"][name]
    names = [
        Path(source["name"]).name if "size" in source else source["name"].partition(":")[0]
        for source in manifest.sources
    ]
    before = read_card(Path(recipe.out) / "model")
    return Card(
        name=Path(recipe.out).resolve().name,
        notes=None if before is None else before.notes,  # written by hand
        training={"steps": state.step, **sections},
        datasets=list(dict.fromkeys(names))[:MOST_NAMES],
        evaluation=state.evaluation,
    )


def _sampling(recipe: Recipe, processes: ProcessGroup) -> list[Periodic]:
    if recipe.sample.every is None:
        return []

    def sample(model: Any) -> dict[str, list[str]]:
        if not processes.is_first:
            return {}
        result = generate(
            model,
            num_samples=recipe.sample.num,
            max_new_tokens=recipe.sample.max_new_tokens,
            generator=generator(recipe.train.seed, "sample"),
            optimize=False,  # weights change before the next samples
        )
        return {"samples": result.texts or []}

    return [Periodic(every=recipe.sample.every, run=sample)]
