"""What callers ask for, checked and in the samplers' terms: prompts as ids, names as objects."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from numbers import Integral, Real
from typing import Any

import torch

from blockdiffusion.diffusion.denoiser import Denoiser, bos_id, is_autoregressive
from blockdiffusion.errors import UserError, shown
from blockdiffusion.limits import check_limit
from blockdiffusion.sampling.params import SETTINGS, SamplingParams
from blockdiffusion.sampling.processes import Process, check_fits, make_process
from blockdiffusion.text import Given, encode_text

Prompt = str | Sequence[int] | torch.Tensor


def prepare_prompts(
    model: Denoiser, prompts: Any, num_samples: int, bos: bool | None
) -> list[list[int]]:
    """Prompts as id lists with BOS, each repeated `num_samples` times; see `stream`."""
    return with_bos(model, [_to_ids(model, p) for p in as_list(prompts)], num_samples, bos)


def with_bos(
    model: Denoiser, rows: list[list[int]], num_samples: int, bos: bool | None
) -> list[list[int]]:
    """Rows with BOS where there shall be one, each repeated `num_samples` times."""
    check_limit("num_samples", num_samples)
    if model.config.bos if bos is None else bos:
        first = bos_id(model)
        rows = [row if row[:1] == [first] else [first, *row] for row in rows]
    return [row for row in rows for _ in range(num_samples)]


def resolved(model: Denoiser, params: SamplingParams) -> SamplingParams:
    """`params` with the sampler as an object, for this model.

    Raises:
        UserError: they do not fit this kind of model.
    """
    sampler = params.sampler
    settings = {name: getattr(params, name) for name in SETTINGS}
    if is_autoregressive(model):
        refuse_masks(sampler=sampler, **settings, stride=params.stride)
        return params
    if isinstance(sampler, str | None):
        return replace(params, sampler=make_process(model.config, params))
    if not isinstance(sampler, Process) and not hasattr(sampler, "plan"):
        raise UserError(f"sampler is {shown(sampler)}; it must be a name, a Policy or a Process")
    if any(value is not None for value in settings.values()):
        raise UserError(
            "steps, schedule and the like go with a sampler's name; this object has its own"
        )
    check_fits(sampler, model.config)
    return params


def refuse_masks(**options: object) -> None:
    """What says how masks are revealed means nothing where there are none."""
    for name, value in options.items():
        if value is not None:
            raise UserError(
                f"{name} is given, but this model is autoregressive: it writes one token after the "
                "other and has no masks to reveal; leave it out"
            )


def as_list(prompts: Any) -> list[Any]:
    """One or many prompts as a list of them."""
    if prompts is None:
        return [[]]
    if isinstance(prompts, str):
        return [prompts]
    if isinstance(prompts, torch.Tensor):
        return [prompts] if prompts.ndim == 1 else list(prompts)
    if not isinstance(prompts, Iterable):
        return [prompts]
    prompts = list(prompts)
    if prompts and isinstance(prompts[0], Real):
        return [prompts]
    return prompts


def _to_ids(model: Denoiser, prompt: Prompt) -> list[int]:
    if isinstance(prompt, str):
        return encode_text(model.tokenizer, prompt)
    return as_ids(prompt)


def given_prompt(prompt: Prompt, length: int) -> list[Given]:
    """The text of a row's first `length` tokens, where its prompt was a text."""
    return [(0, length, prompt)] if isinstance(prompt, str) else []


def as_ids(given: Any, what: str = "a prompt") -> list[int]:
    """Token ids as a list.

    Raises:
        UserError: they are none.
    """
    ids = given.tolist() if isinstance(given, torch.Tensor) else given
    if not isinstance(ids, Iterable):
        raise UserError(f"{shown(ids)} is given as {what}; give a text, or a list of token ids")
    ids = list(ids)
    for token in ids:
        if isinstance(token, bool) or not isinstance(token, Integral) or abs(int(token)) >= 2**63:
            raise UserError(
                f"{what} holds {shown(token)}, which is no token id; give a text, or a list of "
                "whole numbers"
            )
    return [int(token) for token in ids]
