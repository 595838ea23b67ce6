"""Sampling: `generate` for whole results, `stream` for events as they happen, `Engine` for many
requests that come and go."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ParamSpec, TypeVar

import torch

from blockdiffusion.diffusion.denoiser import Denoiser, is_autoregressive
from blockdiffusion.errors import UserError
from blockdiffusion.runtime.seeding import fresh_seed, seeded
from blockdiffusion.sampling.autoregressive import sample_next_tokens
from blockdiffusion.sampling.engine import Engine
from blockdiffusion.sampling.infilling import fill_events, prepare_templates
from blockdiffusion.sampling.logits import TopPRule, refuse_masks_written
from blockdiffusion.sampling.loop import (
    BlockEvent,
    DoneEvent,
    Event,
    SamplingOptions,
    StepEvent,
    sample_events,
)
from blockdiffusion.sampling.policies import Policy
from blockdiffusion.sampling.processes import Process
from blockdiffusion.sampling.requests import (
    Prompt,
    as_list,
    given_prompt,
    prepare_prompts,
    refuse_masks,
    sampling_options,
)
from blockdiffusion.sampling.sliding import has_one_block, sample_sliding
from blockdiffusion.text import Detokenizer, Given, whole_text

__all__ = [
    "BlockEvent",
    "Detokenizer",
    "DoneEvent",
    "Engine",
    "Event",
    "Generation",
    "SamplingOptions",
    "StepEvent",
    "collect",
    "finish",
    "generate",
    "infill",
    "prepare_prompts",
    "stream",
]

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")


@dataclass(frozen=True)
class Generation:
    """Finished samples.

    Attributes:
        sequences: int64 (B, longest), BOS and prompt included, padded at the right with EOS (0
            where the model has none).
        lengths: int64 (B,), tokens of each row before padding.
        prompt_lengths: int64 (B,), tokens that were given (BOS and prompt).
        texts: of each row, the prompt as it was given (of ids: decoded) and what is new, without
            special tokens; None without a tokenizer.
        nfe: int64 (B,), network passes each row took part in, commits included, a fused pass once.
        tokens_per_forward: float64 (B,), new tokens per network pass.
    """

    sequences: torch.Tensor
    lengths: torch.Tensor
    prompt_lengths: torch.Tensor
    texts: list[str] | None
    nfe: torch.Tensor
    tokens_per_forward: torch.Tensor


def stream(
    model: Denoiser,
    prompts: Prompt | Sequence[Prompt] | None = None,
    num_samples: int = 1,
    max_new_tokens: int = 128,
    *,
    bos: bool | None = None,
    eos: bool = True,
    policy: str | Policy | Process | None = None,
    steps: int | None = None,
    schedule: str | None = None,
    tokens_per_step: int | None = None,
    threshold: float | None = None,
    remask: float | None = None,
    stride: int | None = None,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float = 1.0,
    top_p_rule: TopPRule = "transformers",
    use_cache: bool = True,
    window: int | None = None,
    seed: int | None = None,
    generator: torch.Generator | None = None,
) -> Iterator[Event]:
    """Events of sampling: tokens as they are decided, blocks as they are finished.

    Takes the arguments of `generate`.

    Yields:
        `StepEvent` for each pass, `BlockEvent` for each block, then one `DoneEvent`.

    Raises:
        UserError: see `generate`.
    """
    if is_autoregressive(model):
        refuse_masks(stride=stride)
    sampling = sampling_options(
        model,
        max_new_tokens=max_new_tokens,
        eos=eos,
        policy=policy,
        steps=steps,
        schedule=schedule,
        tokens_per_step=tokens_per_step,
        threshold=threshold,
        remask=remask,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        top_p_rule=top_p_rule,
        use_cache=use_cache,
        window=window,
    )
    generator = _source(seed, generator)
    rows = prepare_prompts(model, prompts, num_samples, bos)
    longest = max(map(len, rows), default=0) + max_new_tokens
    if is_autoregressive(model):
        yield from sample_next_tokens(model, rows, sampling, generator)
    elif stride is not None or (has_one_block(model) and longest > model.config.seq_len):
        yield from sample_sliding(model, rows, sampling, generator, stride)
    else:
        yield from sample_events(model, rows, sampling, generator)


def _with_arguments_of(
    of: Callable[Arguments, Any],
) -> Callable[[Callable[..., Result]], Callable[Arguments, Result]]:
    """For what takes the arguments of another function: they are spelled there, once."""

    def decorate(function: Callable[..., Result]) -> Callable[Arguments, Result]:
        own, signature = inspect.signature(function), inspect.signature(of)
        signature = signature.replace(return_annotation=own.return_annotation)
        function.__signature__ = signature  # type: ignore[attr-defined]
        return function

    return decorate


@_with_arguments_of(stream)
def generate(
    model: Denoiser,
    prompts: Prompt | Sequence[Prompt] | None = None,
    *numbers: int,
    **options: Any,
) -> Generation:
    """Samples continuations of prompts, or texts from nothing.

    >>> generate(model, ["Once upon", "The"], num_samples=2, max_new_tokens=40, seed=1).texts

    Args:
        model: from `blockdiffusion.load`, or any `Denoiser`.
        prompts: a text or ids, or a list of them, of any lengths; None = from nothing.
        num_samples: samples of each prompt.
        max_new_tokens: tokens after the prompt; a row may end earlier at EOS.
        bos: whether a BOS is given before each prompt (unless its ids begin with it); None = what
            the model's configuration says, and none where it says nothing. False: position 0 is
            sampled like any other.
        eos: whether a sampled EOS ends a row (where the model has an EOS).
        policy: how a block comes to be; None = the usual way of the model's objective. For masked
            diffusion "first-hitting" (usual), which keeps the law, "ancestral" (with `steps` and,
            if not the linear one, a noise `schedule`), which tends to it, or an approximation in
            fewer passes: "random" (with `tokens_per_step`), "confidence", "margin" and "entropy"
            (with that or a `threshold`; see `MostCertain`), "remask" (with `steps`, `schedule` and
            a rate `remask` in [0, 1]; see `Remasking`). For score entropy "analytic" (with `steps`
            per block, as many as its tokens by default); for d3pm "ancestral" (by default in its
            own T steps). Or a `Policy` or `Process`.
        stride: for models of one block (S = L): new tokens of each slide where the text goes beyond
            L, half of L by default; see `sampling.sliding`.
        temperature, top_k, top_p, top_p_rule: see `Filters`.
        use_cache: keep keys and values of finished blocks; the same law and logits without.
        window: a token sees the last `window` tokens, its own block included; None = all. Beyond L
            a model of one block has the window L and no other.
        seed: of the draws, from 0 to 2**64 - 1; None = any.
        generator: instead of a seed, the source of randomness itself (CPU).

    Raises:
        UserError: for options out of range or not of this kind of model, foreign ids, or a prompt
            longer than the window.
    """
    if isinstance(prompts, Iterator):  # is read twice
        prompts = list(prompts)
    return finish(model, stream(model, prompts, *numbers, **options), as_list(prompts))


def infill(
    model: Denoiser,
    templates: Prompt | Sequence[Prompt],
    num_samples: int = 1,
    *,
    bos: bool | None = None,
    seed: int | None = None,
    generator: torch.Generator | None = None,
    **options: Any,
) -> Generation:
    """Fills what is missing in texts, given tokens anywhere; see `sampling.infilling`.

    >>> infill(model, "The [MASK:3] sat on the [MASK].", num_samples=4).texts

    Args:
        model: from `blockdiffusion.load`, or any `Denoiser`.
        templates: texts in which `[MASK]` stands for one missing token and `[MASK:5]` for five, or
            ids with the mask token in their place; one or a list.
        num_samples: fillings of each template.
        bos, seed, generator: as for `generate`.
        options: `policy` and its settings, `temperature`, `top_k`, `top_p`, `top_p_rule`,
            `use_cache`, as for `generate`.

    Returns:
        Whole texts, in which the pieces of a text are as they were given; `prompt_lengths` counts
        the given tokens, wherever they stand.

    Raises:
        UserError: for options as `generate`, an autoregressive model, a template without a mask or
            with more masks than `sampling.infilling.MOST_MASKS`.
    """
    source = _source(seed, generator)
    rows = prepare_templates(model, templates, num_samples, bos)
    sampling = sampling_options(model, max_new_tokens=0, eos=False, **options)
    events = fill_events(model, [row.ids for row in rows], sampling, source)
    return collect(model, _last(events), [row.given for row in rows])


def _source(seed: int | None, generator: torch.Generator | None) -> torch.Generator:
    """The source of randomness: of the given seed, the given one, or one that is like no other."""
    if seed is not None and generator is not None:
        raise UserError("seed and generator are both given, and each is a source; leave one out")
    if generator is None:
        generator = seeded(fresh_seed() if seed is None else seed)
    return generator


def finish(model: Denoiser, events: Iterator[Event], prompts: Sequence[Any] = ()) -> Generation:
    """Takes all events of a stream; its result. `prompts` are those whose samples it has."""
    done = _last(events)
    given = done.prompt_lengths.tolist()
    samples = len(given) // max(1, len(prompts))  # of each prompt
    return collect(
        model,
        done,
        [
            given_prompt(prompt, given[number * samples + sample])
            for number, prompt in enumerate(prompts)
            for sample in range(samples)
        ],
    )


def _last(events: Iterator[Event]) -> DoneEvent:
    return next(event for event in events if isinstance(event, DoneEvent))


def collect(model: Denoiser, done: DoneEvent, given: Sequence[Sequence[Given]] = ()) -> Generation:
    """The result of a finished stream; `given`: what of each row was given as text."""
    longest = int(done.lengths.max())
    pad_id = model.config.eos_id if model.config.eos_id is not None else 0
    outside = torch.arange(longest) >= done.lengths[:, None]
    refuse_masks_written(done.ids[:, :longest][~outside], model.config.mask_id)
    sequences = done.ids[:, :longest].masked_fill(outside, pad_id)
    texts = None
    if model.tokenizer is not None:
        texts = [
            whole_text(model.tokenizer, row[:length].tolist(), texts_given)
            for row, length, texts_given in zip(
                sequences, done.lengths.tolist(), given or [()] * len(sequences), strict=True
            )
        ]
    return Generation(
        sequences=sequences,
        lengths=done.lengths,
        prompt_lengths=done.prompt_lengths,
        texts=texts,
        nfe=done.nfe,
        tokens_per_forward=(done.lengths - done.prompt_lengths).double() / done.nfe,
    )
