"""Talking to a model: what is asked by the template, what is kept, what is refused."""

import io
import subprocess
import sys

import pytest
import torch

import blockdiffusion
from blockdiffusion.data.tokenizers import byte_tokenizer
from blockdiffusion.errors import UserError
from blockdiffusion.sampling import Finished
from blockdiffusion.sampling.params import SamplingParams
from blockdiffusion.serving.conversation import Conversation
from tests.command import blockdiff
from tests.data.test_chat import TEMPLATE

PARAMS = SamplingParams(max_new_tokens=10, seed=4)


@pytest.fixture
def model(make_model):
    made = make_model(vocab_size=258, mask_id=257, eos_id=256, bos=False, seq_len=64)
    made.tokenizer = byte_tokenizer()
    made.tokenizer.chat_template = TEMPLATE
    with torch.no_grad():
        made.output.bias[256] += 8
        made.output.bias[128:256] -= 50  # ASCII, which is whole text
    return made


@pytest.fixture
def saved(model, tmp_path):
    model.save_pretrained(tmp_path / "model")
    model.tokenizer.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def answer(talk, content):
    _, events = talk.ask(content)
    (last,) = [event for event in events if isinstance(event, Finished)]
    return last


def ids_of(text):
    parts = text.split("<end>")
    ids = [token for part in parts for token in (*part.encode(), 256)]
    return ids[:-1]


def test_each_question_is_asked_with_all_that_was_said(model):
    talk = Conversation(model, PARAMS, system="Be brief.")
    first = answer(talk, "a?")
    said = talk.messages[-1]["content"]
    start = "[system]Be brief.<end>\n[user]a?<end>\n[assistant]"
    assert first.ids[: first.prompt_tokens] == ids_of(start)
    second = answer(talk, "b?")
    more = f"{start}{said}<end>\n[user]b?<end>\n[assistant]"
    assert second.ids[: second.prompt_tokens] == ids_of(more)
    assert [m["role"] for m in talk.messages] == ["system", *["user", "assistant"] * 2]
    talk.reset()
    assert answer(talk, "a?").ids == first.ids  # the same seed, and nothing of before
    alone = blockdiffusion.generate(model, [ids_of(start)], max_new_tokens=10, eos=False, seed=1)
    assert alone.prompt_lengths[0] == first.prompt_tokens


def test_an_answer_that_is_not_read_to_its_end_was_not_given(model):
    talk = Conversation(model, PARAMS)
    _, events = talk.ask("a?")
    next(events)
    events.close()
    assert talk.messages == []
    with pytest.raises(UserError, match="only the chat template"):
        talk.ask("a<|mask|>")
    assert talk.messages == []


def test_a_model_without_a_template_is_refused(model):
    model.tokenizer.chat_template = None
    with pytest.raises(UserError, match="no chat template"):
        Conversation(model, PARAMS)


def chat(saved, lines, monkeypatch, *more):
    class Input:
        buffer = io.BytesIO(lines)

        def isatty(self):
            return False

    monkeypatch.setattr(sys, "stdin", Input())
    return blockdiff("chat", saved, "--max-new-tokens", 10, "--seed", 4, *more)


def test_the_command_answers_lines(saved, model, monkeypatch):
    talk, expected = Conversation(model, PARAMS), []
    for question in ("a?", "b?"):
        answer(talk, question)
        expected.append(talk.messages[-1]["content"])
    done = chat(saved, b"a?\n\nb?\n/reset\na?\n/exit\nno\n", monkeypatch)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "".join(f"{text}\n" for text in [*expected, expected[0]])
    bad = chat(saved, b"x<|mask|>\na?\n", monkeypatch)
    assert bad.returncode == 0 and bad.stdout == f"{expected[0]}\n"
    assert "only the chat template" in bad.stderr and "Traceback" not in bad.stderr


@pytest.mark.parametrize(
    ("lines", "key"), [(b"\xff\n", "not UTF-8"), (b"a" * (2**20 + 2), "longer than")]
)
def test_what_is_no_message_ends_with_a_sentence(lines, key, saved, monkeypatch):
    done = chat(saved, lines, monkeypatch)
    assert done.returncode == 2 and key in done.stderr and "Traceback" not in done.stderr


@pytest.mark.slow
def test_on_a_terminal(saved):
    """With line editing and a prompt; Ctrl-D ends."""
    pty = pytest.importorskip("pty")
    import os

    leader, follower = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-m", "blockdiffusion.cli", "chat", saved, "--max-new-tokens", "6"],
        stdin=follower, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    os.close(follower)
    os.write(leader, b"a?\n\x04")
    out, err = process.communicate(timeout=120)
    os.close(leader)
    assert process.returncode == 0, err
    assert "/exit or Ctrl-D ends" in err and out.startswith("> ")
