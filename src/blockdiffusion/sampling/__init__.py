"""Sampling: `generate` for whole results, `stream` for events as they happen, `Engine` for many
requests that come and go."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from blockdiffusion.denoiser import Denoiser, is_autoregressive
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
    prepare_prompts,
    refuse_masks,
    sampling_options,
)
from blockdiffusion.sampling.sliding import has_one_block, sample_sliding

__all__ = [
    "BlockEvent",
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


@dataclass(frozen=True)
class Generation:
    """Finished samples.

    Attributes:
        sequences: int64 (B, longest), BOS and prompt included, padded at the right with EOS (0
            where the model has none).
        lengths: int64 (B,), tokens of each row before padding.
        prompt_lengths: int64 (B,), tokens that were given (BOS and prompt).
        texts: decoded rows without special tokens; None without a tokenizer.
        nfe: int64 (B,), network passes each row took part in, commits included, a fused pass once.
        tokens_per_forward: float64 (B,), new tokens per network pass.
    """

    sequences: torch.Tensor
    lengths: torch.Tensor
    prompt_lengths: torch.Tensor
    texts: list[str] | None
    nfe: torch.Tensor
    tokens_per_forward: torch.Tensor


def generate(
    model: Denoiser,
    prompts: Prompt | Sequence[Prompt] | None = None,
    num_samples: int = 1,
    max_new_tokens: int = 128,
    **options: Any,
) -> Generation:
    """Samples continuations of prompts, or texts from nothing.

    Takes the arguments of `stream` and returns the finished result.
    """
    return finish(model, stream(model, prompts, num_samples, max_new_tokens, **options))


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
    generator: torch.Generator | None = None,
) -> Iterator[Event]:
    """Events of sampling: tokens as they are decided, blocks as they are finished.

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
        generator: source of randomness (CPU); a fresh, unseeded one by default.

    Yields:
        `StepEvent` for each pass, `BlockEvent` for each block, then one `DoneEvent`.

    Raises:
        UserError: for options out of range or not of this kind of model, foreign ids, or a prompt
            longer than the window.
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
    generator = _seeded(generator)
    rows = prepare_prompts(model, prompts, num_samples, bos)
    longest = max(map(len, rows), default=0) + max_new_tokens
    if is_autoregressive(model):
        yield from sample_next_tokens(model, rows, sampling, generator)
    elif stride is not None or (has_one_block(model) and longest > model.config.seq_len):
        yield from sample_sliding(model, rows, sampling, generator, stride)
    else:
        yield from sample_events(model, rows, sampling, generator)


def infill(
    model: Denoiser,
    templates: Prompt | Sequence[Prompt],
    num_samples: int = 1,
    *,
    bos: bool | None = None,
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
        bos, generator: as for `stream`.
        options: `policy` and its settings, `temperature`, `top_k`, `top_p`, `top_p_rule`,
            `use_cache`, as for `stream`.

    Returns:
        Whole texts; `prompt_lengths` counts the given tokens, wherever they stand.

    Raises:
        UserError: for options as `stream`, an autoregressive model, a template without a mask.
    """
    rows = prepare_templates(model, templates, num_samples, bos)
    sampling = sampling_options(model, max_new_tokens=0, eos=False, **options)
    return finish(model, fill_events(model, rows, sampling, _seeded(generator)))


def _seeded(generator: torch.Generator | None) -> torch.Generator:
    """The given source, or a fresh one that is like no other."""
    if generator is None:
        generator = torch.Generator()
        generator.seed()
    return generator


def finish(model: Denoiser, events: Iterator[Event]) -> Generation:
    """Takes all events of a stream; its result."""
    return collect(model, next(event for event in events if isinstance(event, DoneEvent)))


def collect(model: Denoiser, done: DoneEvent) -> Generation:
    """The result of a finished stream."""
    longest = int(done.lengths.max())
    pad_id = model.config.eos_id if model.config.eos_id is not None else 0
    outside = torch.arange(longest) >= done.lengths[:, None]
    refuse_masks_written(done.ids[:, :longest][~outside], model.config.mask_id)
    sequences = done.ids[:, :longest].masked_fill(outside, pad_id)
    texts = None
    if model.tokenizer is not None:
        texts = [
            model.tokenizer.decode(row[:length].tolist(), skip_special_tokens=True)
            for row, length in zip(sequences, done.lengths.tolist(), strict=True)
        ]
    return Generation(
        sequences=sequences,
        lengths=done.lengths,
        prompt_lengths=done.prompt_lengths,
        texts=texts,
        nfe=done.nfe,
        tokens_per_forward=(done.lengths - done.prompt_lengths).double() / done.nfe,
    )
