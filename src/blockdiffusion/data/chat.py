"""Conversations: read from records, written as tokens by a chat template, with the responses found.

Only responses are targets of training, each with its end of turn: never the header of a role, which
the template writes.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from blockdiffusion.data.reading import MAX_DOCUMENT_BYTES, too_long
from blockdiffusion.data.sources import no_field
from blockdiffusion.errors import UserError, shown

Message = dict[str, str]
FIELD = "messages"
RESPONSE = "assistant"
OLDER_FIELD = "conversations"  # ShareGPT's, with other names inside
OLDER_ROLES = {"human": "user", "gpt": RESPONSE}
SHAPE = '[{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}]'
MARKS = re.compile(r"\{%[-+]?\s*generation\b")  # a template that marks responses itself
# What evaluating somebody's template may raise, beside jinja's own errors.
TEMPLATE_ERRORS = (TypeError, ValueError, LookupError, ArithmeticError, AttributeError)


def conversation_text(record: Mapping[str, Any], field: str, where: str) -> str:
    """Return the messages of a record as JSON; of each, the role and the content.

    Args:
        field: of the list of messages. `conversations` is read too, in which messages are
            {"from": "human", "value": ...}.

    Raises:
        UserError: there are no messages, one is no text, the first is a response, or none is.
    """
    if field not in record and OLDER_FIELD in record:
        field = OLDER_FIELD
    if field not in record:
        raise no_field(where, field, list(record))
    try:
        messages = messages_of(record[field], field)
    except UserError as error:
        raise UserError(f"{where}: {error}") from None
    roles = [message["role"] for message in messages]
    if RESPONSE not in roles:
        raise UserError(
            f"{where} has no response, so there is nothing to learn; give a message with the role "
            f"{RESPONSE}"
        )
    if roles[0] == RESPONSE:
        raise UserError(
            f"{where} begins with a response to nothing; begin with a message of another role"
        )
    text = json.dumps(messages, ensure_ascii=False)
    try:
        num_bytes = len(text.encode())
    except UnicodeEncodeError:
        raise UserError(
            f"{where} holds half a surrogate pair, which is not a character: fix it"
        ) from None
    if num_bytes > MAX_DOCUMENT_BYTES:
        raise too_long(where, "shorter conversations")
    return text


def messages_of(found: Any, name: str) -> list[Message]:
    """Return messages with their roles and contents alone.

    Raises:
        UserError: `found`, which is called `name`, is no list of them.
    """
    messages = [_message(item) for item in found] if isinstance(found, list) else []
    known = [message for message in messages if message is not None]
    if not known or len(known) < len(messages):
        raise UserError(f"{shown(name)} is no list of messages with texts; write {SHAPE}")
    return known


def _message(item: Any) -> Message | None:
    if not isinstance(item, Mapping):
        return None
    role, content = item.get("role"), item.get("content")
    if "from" in item and "value" in item:
        role, content = item["from"], item["value"]
        role = OLDER_ROLES.get(role, role) if isinstance(role, str) else None
    if not isinstance(role, str) or not isinstance(content, str):
        return None
    return {"role": role, "content": content}


@dataclass(frozen=True)
class Rendered:
    """Token ids, and for each whether it is a target."""

    ids: list[int]
    is_target: list[bool]


def render(tokenizer: Any, messages: list[Message]) -> Rendered:
    """Return one example for each response of a conversation, one after another.

    An example is the conversation up to its response, as a sampler sees it: the targets, which are
    the response and its EOS, end it. (In one row for all responses, the block in which one ends
    would show the beginning of the next message.) What a template writes behind the EOS is left
    out, and an EOS is added to a response that the template ends without.

    Raises:
        UserError: there is no template, it refuses the messages, it does not show where responses
            begin, or a message contains a special token.
    """
    check_template(tokenizer)
    _check_contents(tokenizer, messages)
    ids: list[int] = []
    is_target: list[bool] = []
    for number, message in enumerate(messages):
        if message["role"] == RESPONSE:
            context, response = _example(tokenizer, messages[: number + 1])
            ids += context + response
            is_target += [False] * len(context) + [True] * len(response)
    return Rendered(ids, is_target)


def prompt_ids(tokenizer: Any, messages: list[Message]) -> list[int]:
    """Return the tokens of a conversation up to where the next response begins.

    Raises:
        UserError: see `render`.
    """
    check_template(tokenizer)
    _check_contents(tokenizer, messages)
    return encode_chat(tokenizer, _text(tokenizer, messages, add_generation_prompt=True))


def encode_chat(tokenizer: Any, text: str) -> list[int]:
    """Return the ids of a text that a template wrote: names of special tokens are these tokens."""
    # Tokenizers of prepared data split such names, as they do in the text of a document.
    found = tokenizer(text, add_special_tokens=False, split_special_tokens=False)
    return list(found["input_ids"])


def check_template(tokenizer: Any) -> None:
    """Refuse a tokenizer that has no chat template."""
    if not isinstance(getattr(tokenizer, "chat_template", None), str):
        raise UserError(
            "the tokenizer has no chat template, or several; take an instruction-tuned model's"
        )


def _check_contents(tokenizer: Any, messages: list[Message]) -> None:
    """Refuse names of special tokens in a message, which would become these tokens."""
    added = tokenizer.backend_tokenizer.get_added_tokens_decoder().values()
    special = [token.content for token in added if token.special]
    for message in messages:
        for name in special:
            if name in message["content"]:
                raise UserError(
                    f"a message contains {shown(name)}, which only the chat template may write "
                    f"({shown(message['content'])}); take it out"
                )


def _example(tokenizer: Any, messages: list[Message]) -> tuple[list[int], list[int]]:
    """Return the tokens before the last message, a response, and those of it."""
    after = _text(tokenizer, messages)
    ids = encode_chat(tokenizer, after)
    if MARKS.search(tokenizer.chat_template):
        start = _first_marked(tokenizer, messages, ids)
    else:
        start = _prompt_length(tokenizer, messages, after, ids)
    response, eos_id = ids[start:], tokenizer.eos_token_id
    if eos_id in response:
        response = response[: response.index(eos_id) + 1]
    else:
        response.append(eos_id)
    if not start:
        raise _not_shown("nothing is before it")
    return ids[:start], response


def _first_marked(tokenizer: Any, messages: list[Message], ids: list[int]) -> int:
    """Return where the last tokens that `{% generation %}` encloses begin."""
    found = _apply(
        tokenizer, messages, tokenize=True, return_dict=True, return_assistant_tokens_mask=True,
        tokenizer_kwargs={"split_special_tokens": False},
    )  # fmt: skip
    marks = "".join(str(int(mark)) for mark in found["assistant_masks"])
    last = marks.rfind("1")
    if list(found["input_ids"]) != ids or last < 0:
        raise _not_shown("its {% generation %} encloses no token of it")
    return marks.rfind("0", 0, last) + 1


def _prompt_length(tokenizer: Any, messages: list[Message], after: str, ids: list[int]) -> int:
    """Return the number of tokens before the last message, with its header."""
    *history, response = messages
    before = _text(tokenizer, history, add_generation_prompt=True)
    if not after.startswith(before):
        raise _not_shown("the conversation with its generation prompt is not its beginning")
    added = after[len(before) :].lstrip()
    if before == _text(tokenizer, history) and not added.startswith(response["content"].strip()):
        raise _not_shown("it ignores add_generation_prompt, so the header would be learnt")
    prompt = encode_chat(tokenizer, before)
    if ids[: len(prompt)] != prompt:
        raise _not_shown("a token spans its beginning")
    return len(prompt)


def _not_shown(reason: str) -> UserError:
    return UserError(
        f"the chat template does not show where a response begins ({reason}); enclose responses in "
        "{% generation %} and {% endgeneration %} in it"
    )


def _text(tokenizer: Any, messages: list[Message], **options: Any) -> str:
    text = _apply(tokenizer, messages, tokenize=False, **options)
    if len(text) > MAX_DOCUMENT_BYTES:
        raise too_long("a conversation", "shorter conversations")
    return text


def _apply(tokenizer: Any, messages: list[Message], **options: Any) -> Any:
    """Apply the template, which transformers runs in jinja's sandbox."""
    from jinja2 import TemplateError

    try:
        return tokenizer.apply_chat_template(list(messages), **options)
    except (TemplateError, *TEMPLATE_ERRORS) as error:
        raise UserError(
            f"the chat template refuses the messages ({shown(str(error))}); check their roles and "
            "their order"
        ) from None
