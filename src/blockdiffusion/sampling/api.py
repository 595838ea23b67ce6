"""`generate` for whole results, `stream` for events as they happen, `infill` for gaps."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from blockdiffusion.diffusion.denoiser import Denoiser
from blockdiffusion.errors import UserError
from blockdiffusion.models.inference import inference_form
from blockdiffusion.runtime.seeding import fresh_seed, seeded
from blockdiffusion.sampling.events import Event, Finished
from blockdiffusion.sampling.infilling import fill_events, prepare_templates
from blockdiffusion.sampling.loop import sample_events
from blockdiffusion.sampling.params import SamplingParams, as_params
from blockdiffusion.sampling.requests import Prompt, prepare_rows, resolved
from blockdiffusion.sampling.sliding import has_one_block, sample_sliding


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
    params: SamplingParams | None = None,
    *,
    generator: torch.Generator | None = None,
    optimize: bool = True,
    **options: Any,
) -> Iterator[Event]:
    """Events of sampling: tokens as they are decided, blocks as they are finished.

    Takes the arguments of `generate`.

    Yields:
        `TokensRevealed` for each pass, `BlockDone` for each block, `Finished` for each row.

    Raises:
        UserError: see `generate`.
    """
    params = resolved(model, as_params(params, **options))
    model = inference_form(model) if optimize else model
    generator = _source(params.seed, generator)
    rows = prepare_rows(model, prompts, params.num_samples, params.bos)
    longest = max((len(row.ids) for row in rows), default=0) + params.max_new_tokens
    if params.stride is not None or (has_one_block(model) and longest > model.config.seq_len):
        yield from sample_sliding(model, rows, params, generator)
    else:
        yield from sample_events(model, rows, params, generator)


def generate(
    model: Denoiser,
    prompts: Prompt | Sequence[Prompt] | None = None,
    params: SamplingParams | None = None,
    *,
    generator: torch.Generator | None = None,
    optimize: bool = True,
    **options: Any,
) -> Generation:
    """Samples continuations of prompts, or texts from nothing.

    >>> generate(model, ["Once upon", "The"], num_samples=2, max_new_tokens=40, seed=1).texts
    >>> generate(model, "Once upon", SamplingParams(top_p=0.9)).texts

    Args:
        model: from `blockdiffusion.load`, or any `Denoiser`.
        prompts: a text or ids, or a list of them, of any lengths; None = from nothing.
        params: how to sample; `options`, fields of `SamplingParams` by name, go before it.
        generator: instead of a seed, the source of randomness itself (CPU).
        optimize: sample with a copy that is made for it, once (`models.inference`); the same up to
            rounding. False: with the network as it is.

    Raises:
        UserError: for options out of range or not of this kind of model, foreign ids, or a prompt
            longer than the window.
    """
    events = stream(model, prompts, params, generator=generator, optimize=optimize, **options)
    return collect(model, events)


def infill(
    model: Denoiser,
    templates: Prompt | Sequence[Prompt],
    params: SamplingParams | None = None,
    *,
    generator: torch.Generator | None = None,
    optimize: bool = True,
    **options: Any,
) -> Generation:
    """Fills what is missing in texts, given tokens anywhere; see `sampling.infilling`.

    >>> infill(model, "The [MASK:3] sat on the [MASK].", num_samples=4).texts

    Args:
        model: from `blockdiffusion.load`, or any `Denoiser`.
        templates: texts in which `[MASK]` stands for one missing token and `[MASK:5]` for five, or
            ids with the mask token in their place; one or a list.
        params, generator, optimize, options: as for `generate`. A template has its length, and no
            EOS ends it: `max_new_tokens`, `eos` and `stride` are not read.

    Returns:
        Whole texts, in which the pieces of a text are as they were given; `prompt_lengths` counts
        the given tokens, wherever they stand.

    Raises:
        UserError: for options as `generate`, an autoregressive model, a template without a mask or
            with more masks than `sampling.infilling.MOST_MASKS`.
    """
    params = as_params(params, **options)
    source = _source(params.seed, generator)
    rows = prepare_templates(model, templates, params.num_samples, params.bos)
    network = inference_form(model) if optimize else model
    return collect(model, fill_events(network, rows, resolved(model, params), source))


def _source(seed: int | None, generator: torch.Generator | None) -> torch.Generator:
    """The source of randomness: of the given seed, the given one, or one that is like no other."""
    if seed is not None and generator is not None:
        raise UserError("seed and generator are both given, and each is a source; leave one out")
    if generator is None:
        generator = seeded(fresh_seed() if seed is None else seed)
    return generator


def collect(model: Denoiser, events: Iterable[Event]) -> Generation:
    """The result of a stream, from all its events."""
    rows = [event for event in events if isinstance(event, Finished)]
    rows.sort(key=lambda event: event.row)
    pad_id = model.config.eos_id if model.config.eos_id is not None else 0
    lengths = torch.tensor([len(row.ids) for row in rows])
    prompt_lengths = torch.tensor([row.prompt_tokens for row in rows])
    nfe = torch.tensor([row.nfe for row in rows])
    sequences = torch.full((len(rows), int(lengths.max())), pad_id)
    for sequence, row in zip(sequences, rows, strict=True):
        sequence[: len(row.ids)] = torch.tensor(row.ids)
    return Generation(
        sequences=sequences,
        lengths=lengths,
        prompt_lengths=prompt_lengths,
        texts=None if model.tokenizer is None else [row.text or "" for row in rows],
        nfe=nfe,
        tokens_per_forward=(lengths - prompt_lengths).double() / nfe,
    )
