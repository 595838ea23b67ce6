"""What callers ask for, checked and in the samplers' terms: prompts as ids, names as objects."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from numbers import Integral, Real
from typing import Any

import torch

from blockdiffusion.diffusion.denoiser import Denoiser, bos_id, is_autoregressive
from blockdiffusion.errors import UserError, shown
from blockdiffusion.limits import check_limit
from blockdiffusion.sampling.logits import Filters, TopPRule
from blockdiffusion.sampling.loop import SamplingOptions
from blockdiffusion.sampling.policies import FirstHitting, Policy, PolicySettings
from blockdiffusion.sampling.processes import Process, check_fits, make_process
from blockdiffusion.text import Given, encode_text

Prompt = str | Sequence[int] | torch.Tensor
CHECKED = (
    "max_new_tokens", "top_k", "window", "steps", "tokens_per_step", "temperature", "top_p",
    "threshold", "remask",
)  # fmt: skip


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


def sampling_options(
    model: Denoiser,
    *,
    max_new_tokens: int,
    eos: bool = True,
    policy: str | Policy | Process | None = None,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float = 1.0,
    top_p_rule: TopPRule = "transformers",
    use_cache: bool = True,
    window: int | None = None,
    **settings: Any,
) -> SamplingOptions:
    """The options of `stream` for this model; `settings` are those of `PolicySettings`.

    Raises:
        UserError: one is out of range, or not of this kind of model.
    """
    given = settings | dict(max_new_tokens=max_new_tokens, window=window)
    given |= dict(temperature=temperature, top_k=top_k, top_p=top_p)
    for name in CHECKED:
        if not (name == "max_new_tokens" and given[name] == 0):  # which `check_request` refuses
            check_limit(name, given.get(name))
    if is_autoregressive(model):
        refuse_masks(policy=policy, **settings)
    return SamplingOptions(
        max_new_tokens=max_new_tokens,
        policy=_policy(model, policy, PolicySettings(**settings)),
        filters=Filters(temperature=temperature, top_k=top_k, top_p=top_p, top_p_rule=top_p_rule),
        eos_id=model.config.eos_id if eos else None,
        window=window,
        use_cache=use_cache,
    )


def _policy(
    model: Denoiser, policy: str | Policy | Process | None, settings: PolicySettings
) -> Policy | Process:
    if is_autoregressive(model):
        return FirstHitting()  # not read
    if isinstance(policy, str | None):
        return make_process(model.config, policy, settings)
    if not isinstance(policy, Process) and not hasattr(policy, "plan"):
        raise UserError(f"policy is {shown(policy)}; it must be a name, a Policy or a Process")
    if settings != PolicySettings():
        raise UserError(
            "steps, schedule and the like go with a policy's name; this policy object has its own"
        )
    check_fits(policy, model.config)
    return policy


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
