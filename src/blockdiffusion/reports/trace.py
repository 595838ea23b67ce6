"""How one sample came to be, as text: which token was decided when, and with what confidence."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from blockdiffusion.escape import html as escape
from blockdiffusion.reports.markup import missing
from blockdiffusion.text import token_text

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

    from blockdiffusion.sampling.loop import Event

LONGEST_WORD = 24  # characters that are kept on one line, where a word consists of several tokens


@dataclass(frozen=True, slots=True, kw_only=True)
class TraceStep:
    """One denoising step of one sample: the tokens that were decided in it.

    `positions` count from 0 at the start of the sequence, prompt included; `block` counts from 0
    there too, `step` from 0 within the block. A confidence is the probability that the network gave
    the token.
    """

    block: int
    step: int
    positions: Sequence[int]
    ids: Sequence[int]
    texts: Sequence[str]
    confidences: Sequence[float]


@dataclass(frozen=True, slots=True, kw_only=True)
class Trace:
    """All steps of a sample in the order they happened, after the prompt (BOS included).

    A position decided twice (a policy that masks again) counts as decided the last time.
    """

    steps: Sequence[TraceStep]
    prompt_texts: Sequence[str] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class _Token:
    """A token of the finished text. `when` is the step's place in the whole trace, from 1."""

    position: int
    text: str
    id: int = -1
    when: int = 0
    order: int = 0
    confidence: float = 1.0
    step: int = 0


def trace_of_events(
    events: Iterable[Event],
    tokenizer: PreTrainedTokenizerFast,
    *,
    block_size: int,
    prompt_ids: Sequence[int] = (),
    row: int = 0,
) -> Trace:
    """The trace of one row of a sampling run, from all its events (`blockdiffusion.stream`).

    `prompt_ids` are the given tokens of that row, BOS included. Tokens that the sampler decided and
    then cut (behind EOS, or over `max_new_tokens`) are left out.
    """
    from blockdiffusion.sampling.loop import DoneEvent, StepEvent

    decided = []
    length = None
    for event in events:
        if isinstance(event, DoneEvent):
            length = int(event.lengths[row])
        if isinstance(event, StepEvent):
            here = event.rows == row
            columns = (event.positions, event.ids.cpu(), event.confidences.cpu())
            decided.append((event.step, zip(*(c[here].tolist() for c in columns), strict=True)))
    steps = []
    for step, tokens in decided:
        kept = [token for token in tokens if length is None or token[0] < length]
        if kept:
            positions, ids, confidences = zip(*kept, strict=True)
            steps.append(
                TraceStep(
                    block=positions[0] // block_size,
                    step=step,
                    positions=positions,
                    ids=ids,
                    texts=token_texts(tokenizer, ids),
                    confidences=confidences,
                )
            )
    return Trace(steps=steps, prompt_texts=token_texts(tokenizer, prompt_ids))


def token_texts(tokenizer: PreTrainedTokenizerFast, ids: Sequence[int]) -> list[str]:
    """Every token's own text, with the space before it where it has one; special ones by name."""
    return [
        token_text(tokenizer, token) or str(tokenizer.convert_ids_to_tokens(token)) for token in ids
    ]


def trace_section(trace: Trace | None, block_size: int) -> str:
    """The replay as HTML: without a script it is the finished text, fully annotated."""
    if trace is None or not trace.steps:
        return missing("There is no denoising trace: no sample was recorded step by step.")
    tokens = _tokens(trace)
    blocks: dict[int, list[_Token]] = {}
    for token in tokens:
        blocks.setdefault(token.position // block_size, []).append(token)
    begins: dict[int, int] = {}
    for when, step in enumerate(trace.steps, start=1):
        for position in step.positions:
            begins.setdefault(position // block_size, when)
    html = "".join(_block(number, block, begins.get(number, 0)) for number, block in blocks.items())
    steps = "".join(
        f'<i data-block="{step.block + 1}" data-decided="{len(step.positions)}"></i>'
        for step in trace.steps
    )
    return (
        '<p class="lead">One sample, block by block. Inside a block all tokens start hidden and '
        "are decided in the order of the small numbers; the colour is the confidence, the "
        "probability that the network gave the token.</p>"
        '<div class="trace-controls" hidden><button type="button">Play</button>'
        f'<input type="range" min="0" max="{len(trace.steps)}" value="{len(trace.steps)}" '
        'aria-label="denoising step"><output></output></div>'
        f'<div class="trace" data-steps="{len(trace.steps)}">{html}</div>'
        f'<div class="trace-steps" hidden>{steps}</div>'
        '<ul class="legend"><li>confidence 0 <i class="ramp"></i> 1</li>'
        '<li><i class="block-key"></i>a block starts</li>'
        '<li><span class="prompt-key">given</span> prompt</li>'
        '<li class="masked-key" hidden><i></i>masked</li></ul>'
        f'<p class="note">{_counts(trace, tokens)}</p>'
    )


def _tokens(trace: Trace) -> list[_Token]:
    """The finished text by position; a later decision replaces an earlier one."""
    tokens = {
        position: _Token(position=position, text=text)
        for position, text in enumerate(trace.prompt_texts)
    }
    steps_of_block: dict[int, int] = {}
    for when, step in enumerate(trace.steps, start=1):
        order = steps_of_block[step.block] = steps_of_block.get(step.block, 0) + 1
        decided = zip(step.positions, step.ids, step.texts, step.confidences, strict=True)
        for position, token_id, text, confidence in decided:
            tokens[position] = _Token(
                position=position,
                text=text,
                id=token_id,
                when=when,
                order=order,
                confidence=confidence,
                step=step.step,
            )
    return [tokens[position] for position in sorted(tokens)]


def _block(number: int, tokens: list[_Token], begins: int) -> str:
    """A block's tokens; `begins` is the first step that decided one of them (0: all are given)."""
    # The tokens of one word stay on one line, and a block's border with its first word.
    words = [[f'<span class="edge">{number + 1}</span>']]
    letters = 0
    for token, before in zip(tokens, [None, *tokens], strict=False):
        starts = before is not None and (token.text[:1].isspace() or before.text[-1:].isspace())
        letters = len(token.text) + (0 if starts else letters)
        if starts or letters > LONGEST_WORD:
            words.append([])
        words[-1].append(_token_html(token))
    html = "".join(f'<span class="word">{"".join(word)}</span>' for word in words)
    return f'<span class="block" data-from="{begins}">{html}</span>'


def _token_html(token: _Token) -> str:
    text, line_break = _visible(token.text)
    if not token.when:
        return (
            f'<span class="token given" title="{text} · given">{_face(text)}<small> </small></span>'
            f"{line_break}"
        )
    hint = (
        f"{text} · id {token.id} · position {token.position} · step {token.step + 1} of its block "
        f"· confidence {token.confidence:.3f}"
    )
    return (
        f'<span class="token" data-when="{token.when}" style="--c:{token.confidence:.3f}" '
        f'title="{hint}">{_face(text)}<small>{token.order}</small></span>{line_break}'
    )


def _face(text: str) -> str:
    return f"<span>{text}</span>"


def _visible(text: str) -> tuple[str, str]:
    """The token's text escaped, with signs for what has no shape, and a break after a newline."""
    signs = {"\n": "↵", "\t": "⇥", "\r": "␍", "\0": "␀"}
    shown = "".join(signs.get(letter, letter) for letter in text) or "∅"
    return escape(shown), "<br>" if "\n" in text else ""


def _counts(trace: Trace, tokens: list[_Token]) -> str:
    decided = [token for token in tokens if token.when]
    mean = sum(token.confidence for token in decided) / len(decided) if decided else 0.0
    low = sum(token.confidence < 0.1 for token in decided)
    return (
        f"{len(decided):,} tokens in {len(trace.steps):,} steps, after "
        f"{len(trace.prompt_texts):,} given; mean confidence {mean:.2f}, "
        f"{low:,} of them under 0.1."
    )
