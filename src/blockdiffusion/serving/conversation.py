"""A conversation with a model: messages in, answers as they are written."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from blockdiffusion.data.chat import RESPONSE, check_template, prompt_ids
from blockdiffusion.runtime.seeding import derive_seed
from blockdiffusion.sampling.api import stream
from blockdiffusion.sampling.events import Event, Finished
from blockdiffusion.sampling.params import SamplingParams
from blockdiffusion.text import whole_text


class Conversation:
    """The messages so far, and what answers them.

    >>> talk = Conversation(model, SamplingParams(max_new_tokens=200))
    >>> prompt, events = talk.ask("What is the capital of France?")
    >>> for event in events: ...
    >>> print(talk.messages[-1]["content"])

    Args:
        model: with a tokenizer that has a chat template.
        params: of every answer; with a seed each answer has its own, derived from it.
        system: what the model is told first; None = what the template says by itself.

    Attributes:
        messages: with their roles and contents. An answer is added when it is finished.

    Raises:
        UserError: there is no chat template.
    """

    def __init__(self, model: Any, params: SamplingParams, system: str | None = None):
        check_template(model.tokenizer)
        self.model, self.params = model, params
        self._first = [] if system is None else [{"role": "system", "content": system}]
        self.reset()

    def reset(self) -> None:
        """Forget everything but what the model is told first."""
        self.messages = list(self._first)

    def ask(self, content: str) -> tuple[list[int], Iterator[Event]]:
        """Return the prompt's tokens, and the events of the answer as they happen.

        If the events are not read to their end, the message is as if it had not been.

        Raises:
            UserError: the template refuses the message, or it is too long for the model (then when
                the first event is asked for).
        """
        messages = [*self.messages, {"role": "user", "content": content}]
        prompt = prompt_ids(self.model.tokenizer, messages)
        return prompt, self._answer(prompt, messages)

    def _answer(self, prompt: list[int], messages: list[dict[str, str]]) -> Iterator[Event]:
        params = self.params
        if params.seed is not None:
            params = replace(params, seed=derive_seed(params.seed, "answer", len(messages)))
        for event in stream(self.model, prompt, params):
            if isinstance(event, Finished):
                answer = whole_text(self.model.tokenizer, event.ids[event.prompt_tokens :])
                self.messages = [*messages, {"role": RESPONSE, "content": answer}]
            yield event
