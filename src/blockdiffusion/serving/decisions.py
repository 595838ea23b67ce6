"""Choices among given texts, by their probabilities under a model.

The probability of a choice is that of its tokens behind the prompt, exact where the block size
allows it, divided by the sum over the choices:

    p(c) = exp(-nats(c) / T) / sum over c' of exp(-nats(c') / T)

With T = 1 it is the model's own probability, given that it says one of the choices. Another
temperature is found on cases with known answers, as the one of least mean -log p(answer) (Guo et
al. 2017, "On Calibration of Modern Neural Networks").

Shape suffix: C choices of a case.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from blockdiffusion.data.chat import messages_of, prompt_ids
from blockdiffusion.diffusion.denoiser import bos_id
from blockdiffusion.errors import UserError, counted, shown
from blockdiffusion.evaluate.journal import NO_JOURNAL, Journal
from blockdiffusion.evaluate.measured import Measured, mean_of
from blockdiffusion.evaluate.options import LikelihoodOptions
from blockdiffusion.evaluate.scoring import score
from blockdiffusion.evaluate.windows import Window
from blockdiffusion.reports.tables import described
from blockdiffusion.serving.lines import about, check_keys, copied, records
from blockdiffusion.text import encode_behind, encode_text

MOST_CHOICES = 1000  # of a case
BINS = 10  # of the calibration error
COLDEST, HOTTEST = 0.05, 20.0  # temperatures
Progress = Callable[[float, float], None]


@dataclass(frozen=True)
class Case:
    """A question with its choices.

    Attributes:
        line: its number in the file. copied: what the line says of itself.
        prompt: its tokens. choices: the texts. choice_ids: their tokens behind the prompt.
        answer: the number of the right one, if it is known.
    """

    line: int
    copied: dict[str, Any]
    prompt: list[int]
    choices: list[str]
    choice_ids: list[list[int]]
    answer: int | None


@dataclass(frozen=True, kw_only=True)
class Decided:
    """What a model thinks of the choices of a case.

    Attributes:
        nats_C: -log p of each choice behind the prompt.
        probabilities_C: given that it is one of them, at the temperature.
    """

    case: Case
    nats_C: np.ndarray
    probabilities_C: np.ndarray

    def to_dict(self) -> dict[str, Any]:
        """Return a line of results; with choices that are numbers also their expected value."""
        best = int(self.probabilities_C.argmax())
        values: dict[str, Any] = {
            "line": self.case.line,
            **self.case.copied,
            "choice": best,
            "text": self.case.choices[best],
            "probabilities": self.probabilities_C.tolist(),
            "nats": self.nats_C.tolist(),
        }
        numbers = [_number(text) for text in self.case.choices]
        known = [number for number in numbers if number is not None]
        if len(known) == len(numbers):
            values["expected"] = float(self.probabilities_C @ np.array(known))
        return values


@dataclass(frozen=True, kw_only=True)
class Quality:
    """How good decisions are, over cases with known answers.

    Attributes:
        accuracy: share of cases whose most likely choice is right.
        nats: mean -log p of the right choice.
        brier: mean over cases of the sum over choices of (p - [right])^2.
        calibration_error: mean over cases, by ten bins of the largest p, of |accuracy - p| of the
            bin.
    """

    num_cases: int
    accuracy: Measured
    nats: Measured
    brier: Measured
    calibration_error: float


def read_cases(model: Any, path: Path) -> list[Case]:
    """Read JSON lines with a `prompt` or `messages`, `choices`, and the `answer` if it is known: a
    number of a choice, from 0, or its text.

    Behind messages each choice is a whole answer, with its EOS.

    Raises:
        UserError: a line is no such case, or there is none.
    """
    cases = []
    for number, record in records(path):
        with about(number, path):
            cases.append(_case(model, number, record))
    if not cases:
        raise UserError(
            f'{path} holds no case; write lines such as {{"prompt": "...", "choices": ["a", "b"]}}'
        )
    return cases


def _case(model: Any, number: int, record: dict[str, Any]) -> Case:
    check_keys(record, ("prompt", "messages", "choices", "answer"))
    if ("prompt" in record) == ("messages" in record):
        raise UserError("it must have a prompt or messages, and not both")
    choices = record.get("choices")
    are_texts = isinstance(choices, list) and all(isinstance(c, str) and c for c in choices)
    if not are_texts or not 2 <= len(choices) <= MOST_CHOICES or len({*choices}) < len(choices):
        raise UserError(
            f"choices is {shown(choices)}; it must be a list of 2 to {MOST_CHOICES} different texts"
        )
    tokenizer, end = model.tokenizer, []
    if "messages" in record:
        prompt = prompt_ids(tokenizer, messages_of(record["messages"], "messages"))
        end = [tokenizer.eos_token_id]
    elif isinstance(record["prompt"], str):
        first = [bos_id(model)] if model.config.bos else []
        prompt = first + encode_text(tokenizer, record["prompt"])
    else:
        raise UserError(f"prompt is {shown(record['prompt'])}; it must be a text")
    encode = encode_behind if prompt else encode_text
    return Case(
        number,
        copied(record),
        prompt,
        choices,
        [[*encode(tokenizer, text), *end] for text in choices],
        _answer(record.get("answer"), choices),
    )


def _answer(given: Any, choices: list[str]) -> int | None:
    if given is None:
        return None
    if isinstance(given, str) and given in choices:
        return choices.index(given)
    if isinstance(given, int) and not isinstance(given, bool) and 0 <= given < len(choices):
        return given
    raise UserError(
        f"answer is {shown(given)}; it must be one of the choices, or its number from 0 to "
        f"{len(choices) - 1}"
    )


def choice_nats(
    model: Any,
    cases: Sequence[Case],
    options: LikelihoodOptions | None = None,
    *,
    seed: int = 0,
    journal: Journal = NO_JOURNAL,
    progress: Progress | None = None,
) -> tuple[list[np.ndarray], bool]:
    """Return the nats (C,) of each case's choices, and whether they are exact (else bounds).

    Raises:
        UserError: see `likelihood`.
    """
    windows = [
        Window(ids=np.array(case.prompt + ids), given=len(case.prompt), unit=0)
        for case in cases
        for ids in case.choice_ids
    ]
    windows = [Window(ids=w.ids, given=w.given, unit=n) for n, w in enumerate(windows)]
    found = score(
        model, windows, options or LikelihoodOptions(), bos=False, seed=seed, journal=journal,
        name="decide", progress=progress,
    )  # fmt: skip
    exact = found.exact_nats_per_row
    values = (found.nats_per_row if exact is None else exact).numpy()
    ends = np.cumsum([len(case.choices) for case in cases])
    return np.split(values, ends[:-1]), exact is not None


def decided(case: Case, nats_C: np.ndarray, temperature: float = 1.0) -> Decided:
    """Return the probabilities of a case's choices."""
    return Decided(
        case=case, nats_C=nats_C, probabilities_C=np.exp(_log_p(nats_C, 1 / temperature))
    )


def _log_p(nats_C: np.ndarray, inverse: float) -> np.ndarray:
    scores_C = -inverse * nats_C
    return scores_C - np.logaddexp.reduce(scores_C)


def fit_temperature(nats: Sequence[np.ndarray], answers: Sequence[int]) -> float:
    """Return the temperature of least mean -log p(answer), between 0.05 and 20.

    The mean is convex in 1 / T, so a ternary search finds it.
    """

    def loss(inverse: float) -> float:
        pairs = zip(nats, answers, strict=True)
        return -math.fsum(_log_p(nats_C, inverse)[answer] for nats_C, answer in pairs)

    low, high = 1 / HOTTEST, 1 / COLDEST
    for _ in range(100):
        left, right = low + (high - low) / 3, high - (high - low) / 3
        low, high = (left, high) if loss(left) > loss(right) else (low, right)
    return 2 / (low + high)


def quality(made: Sequence[Decided]) -> Quality | None:
    """Return how good decisions are; None if no answer is known."""
    known = [d for d in made if d.case.answer is not None]
    if not known:
        return None
    right, nats, brier = [], [], []
    for one in known:
        p_C, answer = one.probabilities_C, one.case.answer
        is_right_C = np.arange(len(p_C)) == answer
        right.append(float(p_C.argmax() == answer))
        nats.append(-float(np.log(max(p_C[answer], np.finfo(float).tiny))))
        brier.append(float(((p_C - is_right_C) ** 2).sum()))
    return Quality(
        num_cases=len(known),
        accuracy=mean_of(right),
        nats=mean_of(nats),
        brier=mean_of(brier),
        calibration_error=calibration_error([float(d.probabilities_C.max()) for d in known], right),
    )


def quality_lines(
    num_cases: int, found: Quality | None, temperature: float, is_exact: bool
) -> list[str]:
    """Return what is printed below the decisions."""
    kind = "exact" if is_exact else "from bounds: see --estimator exact"
    heated = "" if temperature == 1 else f", at the temperature {temperature:.3g}"
    lines = [f"{counted(num_cases, 'case')}; probabilities {kind}{heated}"]
    if found is not None:
        lines += described(
            f"{counted(found.num_cases, 'case')} with an answer",
            {
                "accuracy": _with_error(found.accuracy),
                "-log p(answer)": _with_error(found.nats),
                "Brier score": _with_error(found.brier),
                "calibration error": f"{found.calibration_error:.3f}",
            },
            [],
        )
    return lines


def _with_error(found: Measured) -> str:
    error = "" if found.stderr is None else f" ± {found.stderr:.3f}"
    return f"{found.value:.3f}{error}"


def calibration_error(confidences: Sequence[float], right: Sequence[float]) -> float:
    """Return the expected calibration error with ten bins of equal width."""
    bins = np.minimum((np.array(confidences) * BINS).astype(int), BINS - 1)
    sums = [
        abs(math.fsum(np.array(right)[bins == n]) - math.fsum(np.array(confidences)[bins == n]))
        for n in range(BINS)
    ]
    return math.fsum(sums) / len(confidences)


def _number(text: str) -> float | None:
    try:
        value = float(text)
    except ValueError:
        return None
    return value if math.isfinite(value) else None
