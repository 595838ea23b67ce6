"""What callers ask for, checked and in the samplers' terms: prompts as ids, names as objects."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from numbers import Integral, Real
from typing import Any, NamedTuple

import torch

from blockdiffusion.diffusion.denoiser import Denoiser, bos_id
from blockdiffusion.errors import UserError, shown
from blockdiffusion.limits import check_limit
from blockdiffusion.sampling.choosing import make_sampler
from blockdiffusion.sampling.params import SamplingParams
from blockdiffusion.text import Given, encode_text

Prompt = str | Sequence[int] | torch.Tensor


class Row(NamedTuple):
    """Ids, and the texts of what was given as text."""

    ids: list[int]
    given: list[Given]


def prepare_prompts(
    model: Denoiser, prompts: Any, num_samples: int, bos: bool | None
) -> list[list[int]]:
    """Prompts as id lists with BOS, each repeated `num_samples` times; see `stream`."""
    return [row.ids for row in prepare_rows(model, prompts, num_samples, bos)]


def prepare_rows(model: Denoiser, prompts: Any, num_samples: int, bos: bool | None) -> list[Row]:
    """The same with the texts of the prompts."""
    rows = []
    for prompt in as_list(prompts):
        if isinstance(prompt, str):
            ids = encode_text(model.tokenizer, prompt)
            rows.append(Row(ids, [(0, len(ids), prompt)]))
        else:
            rows.append(Row(as_ids(prompt), []))
    return with_bos(model, rows, num_samples, bos)


def with_bos(model: Denoiser, rows: list[Row], num_samples: int, bos: bool | None) -> list[Row]:
    """Rows with BOS where there shall be one, each repeated `num_samples` times."""
    check_limit("num_samples", num_samples)
    if model.config.bos if bos is None else bos:
        first = bos_id(model)
        rows = [row if row.ids[:1] == [first] else _behind(first, row) for row in rows]
    return [row for row in rows for _ in range(num_samples)]


def _behind(token: int, row: Row) -> Row:
    """With a token before it, which counts as given with the text that begins it."""
    given = [(start + 1 if start else 0, stop + 1, text) for start, stop, text in row.given]
    return Row([token, *row.ids], given)


def resolved(model: Denoiser, params: SamplingParams) -> SamplingParams:
    """`params` with the sampler as an object, for this model.

    Raises:
        UserError: they do not fit this kind of model.
    """
    return replace(params, sampler=make_sampler(model.config, params))


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
