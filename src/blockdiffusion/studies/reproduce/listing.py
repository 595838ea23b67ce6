"""A plan as text: its steps, their sizes and their states."""

from __future__ import annotations

import shlex

from blockdiffusion.reports.numbers import count, duration
from blockdiffusion.studies.reproduce.plan import Plan, Run, Step
from blockdiffusion.studies.reproduce.runner import slots
from blockdiffusion.studies.reproduce.step_cache import StepCache


def plan_lines(plan: Plan) -> list[str]:
    """Return every step with its command, state, sizes and estimated cost, then the sum."""
    cache, scale, free = StepCache(plan), plan.scale, slots(plan.scale)
    together = f"{len(free)} at a time"
    if free[0].processes > 1:
        together = f"one at a time, by {free[0].processes} processes"
    names = ", ".join(table.name for table in plan.tables)
    budget = "; ".join(f"{table.name}: {table.budget}" for table in plan.tables)
    lines = [
        f"{names} at the scale {scale.name}: {scale.about}",
        f"  in the paper    {budget}",
        f"  everything in   {plan.out}, {together}",
        "",
    ]
    left = 0.0
    for step in plan.steps:
        state = cache.state(step)
        lines.append(f"{step.name}: {_state(cache, step, state)}")
        if step.run is not None:
            lines += [f"    {line}" for line in _sizes(step.run, scale.flops)]
            if state != "done":
                left += step.run.flops * (1 - cache.progress(step) / step.run.steps)
        lines.append(f"    {shlex.join(['blockdiff', *step.command])}")
    done = sum(cache.state(step) == "done" for step in plan.steps)
    runs = [step.run for step in plan.steps if step.run is not None]
    speed = scale.flops * sum(slot.processes for slot in free)
    lines += [
        "",
        f"{len(plan.steps)} steps, {done} done; {len(runs)} runs of "
        f"{count(sum(run.tokens for run in runs))} tokens in all",
        f"training that is left: {left:.2g} FLOP, about {duration(left / speed)} ({together}, "
        f"each at {scale.flops:.2g} FLOP/s); measuring comes besides",
    ]
    return lines


def _state(cache: StepCache, step: Step, state: str) -> str:
    if state == "interrupted" and step.run is not None:
        return f"interrupted at step {cache.progress(step):,} of {step.run.steps:,}"
    return state


def _sizes(run: Run, flops: float) -> list[str]:
    model, objective = run.recipe["model"], run.recipe["objective"]
    size = "" if "block_size" not in model else f", S = {model['block_size']}"
    noise = ", ".join(f"{k} {v}" for k, v in objective.items() if k != "name")
    start = f"; from {model['init_from']}" if "init_from" in model else ""
    return [
        f"{objective['name']}{size}{f' ({noise})' if noise else ''}{start}",
        f"{model['num_hidden_layers']} layers, width {model['hidden_size']}, "
        f"{count(run.parameters)} parameters; "
        f"{run.steps:,} updates of {run.recipe['train']['batch_size']} rows, "
        f"{count(run.tokens)} tokens; {run.flops:.2g} FLOP, about {duration(run.flops / flops)}",
    ]
