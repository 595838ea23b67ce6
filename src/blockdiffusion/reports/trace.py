"""The denoising trace of one sample: when each token was decided, and with what confidence."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby, pairwise
from typing import TYPE_CHECKING

from blockdiffusion.text import token_text

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

    from blockdiffusion.sampling import Event

LONGEST_WORD = 24  # characters of a word of several tokens that are kept on one line


@dataclass(frozen=True, slots=True, kw_only=True)
class TraceStep:
    """The tokens that one denoising step of one sample decided.

    `positions` and `block` count from 0 at the start of the sequence, prompt included; `step`
    counts from 0 within the block. A confidence is the network's probability of the token.
    """

    block: int
    step: int
    positions: Sequence[int]
    ids: Sequence[int]
    texts: Sequence[str]
    confidences: Sequence[float]


@dataclass(frozen=True, slots=True, kw_only=True)
class Trace:
    """All steps of a sample in order, after the prompt (BOS included).

    A position that is decided twice (by a sampler that masks again) counts the last time.
    """

    steps: Sequence[TraceStep]
    prompt_texts: Sequence[str] = ()


def trace_of_events(
    events: Iterable[Event],
    tokenizer: PreTrainedTokenizerFast,
    *,
    block_size: int,
    row: int = 0,
) -> Trace:
    """Build the trace of one row of a sampling run from all its events (`blockdiffusion.stream`).

    Tokens that the sampler decided and then cut (after EOS, or over `max_new_tokens`) are left out.
    """
    from blockdiffusion.sampling import Finished, TokensRevealed

    decided = []
    length, prompt_ids = None, []
    for event in events:
        if isinstance(event, Finished) and event.row == row:
            length, prompt_ids = len(event.ids), event.ids[: event.prompt_tokens]
        if isinstance(event, TokensRevealed):
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
    """Return every token's own text, with its leading space; special tokens by name."""
    return [
        token_text(tokenizer, token) or str(tokenizer.convert_ids_to_tokens(token)) for token in ids
    ]


@dataclass(frozen=True, slots=True, kw_only=True)
class Token:
    """A token of the finished text; a given one has no `when`."""

    position: int
    text: str
    id: int = -1
    when: int = 0  # its step's place in the whole trace, from 1
    order: int = 0  # the same within its block
    confidence: float = 1.0
    step: int = 0

    @property
    def shown(self) -> str:
        """Its text with signs for whitespace."""
        signs = {"\n": "↵", "\t": "⇥", "\r": "␍", "\0": "␀"}
        return "".join(signs.get(letter, letter) for letter in self.text) or "∅"

    @property
    def hint(self) -> str:
        """All its values, in words."""
        if not self.when:
            return f"{self.shown} · given"
        return (
            f"{self.shown} · id {self.id} · position {self.position} · step {self.step + 1} of its "
            f"block · confidence {self.confidence:.3f}"
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Block:
    """A block's tokens by word; `begins` is the first step that decided one (0: all are given)."""

    number: int
    begins: int
    words: list[list[Token]]


class Replay:
    """A trace as the page shows it: the finished, annotated text and its steps."""

    def __init__(self, trace: Trace, block_size: int):
        self.steps = trace.steps
        self._given = len(trace.prompt_texts)
        self._tokens = _tokens(trace)
        begins: dict[int, int] = {}
        for when, step in enumerate(trace.steps, start=1):
            for position in step.positions:
                begins.setdefault(position // block_size, when)
        self.blocks = [
            Block(number=number, begins=begins.get(number, 0), words=_words(list(tokens)))
            for number, tokens in groupby(self._tokens, lambda token: token.position // block_size)
        ]

    @property
    def summary(self) -> str:
        """The trace in a sentence."""
        sure = [token.confidence for token in self._tokens if token.when]
        mean = sum(sure) / len(sure) if sure else 0.0
        return (
            f"{len(sure):,} tokens in {len(self.steps):,} steps, after {self._given:,} given; mean "
            f"confidence {mean:.2f}, {sum(one < 0.1 for one in sure):,} of them under 0.1."
        )


def _tokens(trace: Trace) -> list[Token]:
    """Return the finished text by position; a later decision replaces an earlier one."""
    tokens = {
        position: Token(position=position, text=text)
        for position, text in enumerate(trace.prompt_texts)
    }
    steps_of_block: dict[int, int] = {}
    for when, step in enumerate(trace.steps, start=1):
        order = steps_of_block[step.block] = steps_of_block.get(step.block, 0) + 1
        decided = zip(step.positions, step.ids, step.texts, step.confidences, strict=True)
        for position, token_id, text, confidence in decided:
            tokens[position] = Token(
                position=position, text=text, id=token_id, when=when, order=order,
                confidence=confidence, step=step.step,
            )  # fmt: skip
    return [tokens[position] for position in sorted(tokens)]


def _words(tokens: Sequence[Token]) -> list[list[Token]]:
    """Group the tokens of each word, which stays on one line, up to `LONGEST_WORD` letters."""
    words, letters = [[tokens[0]]], len(tokens[0].text)
    for before, token in pairwise(tokens):
        starts = token.text[:1].isspace() or before.text[-1:].isspace()
        letters = len(token.text) + (0 if starts else letters)
        if starts or letters > LONGEST_WORD:
            words.append([])
        words[-1].append(token)
    return words
