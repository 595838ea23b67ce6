"""`sample` and `infill` on the command line: texts, prompts, outputs; seeds of `generate`."""

import contextlib
import inspect
import io
import json
import os
import sys

import pytest
import torch

import blockdiffusion
from blockdiffusion.cli import main
from blockdiffusion.errors import UserError
from blockdiffusion.sampling import Finished
from blockdiffusion.sampling.infilling import MOST_MASKS, prepare_templates
from tests.command import blockdiff
from tests.tokenizer_kinds import KINDS


@pytest.fixture
def saved(tmp_path, make_model):
    """A model directory with a tokenizer of a kind."""

    def save(kind, **sizes):
        tokenizer = KINDS[kind]()
        size = len(tokenizer)
        model = make_model(vocab_size=size + 1, mask_id=size, seq_len=32, **sizes)
        model.save_pretrained(tmp_path / "model")
        tokenizer.save_pretrained(tmp_path / "model")
        return tmp_path / "model"

    return save


# --- one text -------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("block_size", [1, 4])
def test_streamed_printed_and_json_are_one_text(kind, block_size, saved):
    model = saved(kind, block_size=block_size)
    for seed, prompt in ((1, None), (2, "The Cat "), (3, "it's")):
        options = ["sample", model, "--max-new-tokens", 22, "--seed", seed, "--dtype", "float64"]
        options += [] if prompt is None else ["--prompt", prompt]
        said = [blockdiff(*options, *more) for more in ([], ["--stream"], ["--json"])]
        assert [run.returncode for run in said] == [0, 0, 0], [run.stderr for run in said]
        printed, streamed, line = (run.stdout for run in said)
        assert printed == streamed == json.loads(line)["text"] + "\n"
        assert printed.startswith(prompt or "")


def test_a_model_without_a_tokenizer_streams_its_numbers(tmp_path, make_model):
    make_model().save_pretrained(tmp_path)
    options = ("sample", tmp_path, "--max-new-tokens", 9, "--seed", 1)
    assert blockdiff(*options).stdout == blockdiff(*options, "--stream").stdout


def test_infill_keeps_a_piece_of_llamas_kind(saved):
    model = saved("byte fallback")
    run = blockdiff("infill", model, "Return[MASK:3]. The end", "--seed", 1)
    assert run.stdout.startswith("Return") and run.stdout.endswith(". The end\n")
    assert not run.stdout.endswith(" . The end\n")


# --- what is given --------------------------------------------------------------------------------


@pytest.mark.parametrize("command", [
    ("sample", "--prompt", "caf\udce9"), ("infill", "caf\udce9 [MASK]"), ("infill", "[MASK]\udcff"),
])  # fmt: skip
def test_text_that_is_not_utf8(command, saved):
    name, *text = command
    run = blockdiff(name, saved("bytes"), *text)
    assert run.returncode == 2 and "is not UTF-8" in run.stderr
    assert len(run.stderr.splitlines()) == 1


def test_utf8_in_a_locale_without_letters(saved, monkeypatch):
    monkeypatch.setattr(os, "fsencode", lambda text: text.encode("ascii", "surrogateescape"))
    typed = "café".encode().decode("ascii", "surrogateescape")
    run = blockdiff("sample", saved("bytes"), "--prompt", typed, "--max-new-tokens", 2)
    assert run.returncode == 0 and run.stdout.startswith("café")


@pytest.mark.parametrize("masks", [
    "[MASK:99999]", f"[MASK:{MOST_MASKS}][MASK]", "[MASK:" + "9" * 5000 + "]", "[MASK:9999]" * 2,
])  # fmt: skip
def test_more_masks_than_are_filled(masks, make_model):
    model = make_model(vocab_size=259)
    model.tokenizer = KINDS["bytes"]()
    with pytest.raises(UserError, match="at most 16,384 are filled") as caught:
        prepare_templates(model, f"a{masks}b", 1, False)
    assert len(str(caught.value)) < 200


@pytest.mark.parametrize("gap", ["[MASK:0]", "[MASK:-3]", "[MASK:]", "[MASK:٣]", "[MASK:two]"])
def test_a_gap_that_is_none_is_named(gap, make_model):
    model = make_model(vocab_size=259)
    model.tokenizer = KINDS["bytes"]()
    with pytest.raises(UserError, match=r"write \[MASK\] for one") as caught:
        prepare_templates(model, f"a{gap}b[MASK:2]", 1, False)
    assert gap in str(caught.value)


def test_a_prompt_that_ends_in_a_space(saved):
    model = saved("byte level")
    for prompt, warns in (("Return of the ", 1), ("Return of the", 0)):
        run = blockdiff("sample", model, "--prompt", prompt, "--max-new-tokens", 2)
        assert run.returncode == 0
        assert run.stderr.count("warning: the prompt ends in a space") == warns


# --- where it goes --------------------------------------------------------------------------------


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
@pytest.mark.parametrize("how", [[], ["--stream"], ["--json"]])
def test_an_output_of_another_encoding(encoding, how, saved, monkeypatch):
    out = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    command = ["sample", str(saved("bytes")), "--prompt", "深 é", "--max-new-tokens", "40", *how]
    monkeypatch.setattr(sys, "argv", ["blockdiff", *command])
    with contextlib.redirect_stdout(out), pytest.raises(SystemExit) as end:
        main()
    assert end.value.code in (None, 0)
    out.flush()
    written = out.buffer.getvalue().decode(encoding)  # type: ignore[attr-defined]
    if how == ["--json"]:
        assert json.loads(written)["text"].startswith("深 é")
    else:
        assert written.startswith("深 é".encode(encoding, "backslashreplace").decode(encoding))


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_who_waits_in_front_of_a_terminal_is_told(saved, monkeypatch):
    model = saved("bytes")
    assert "loading" not in blockdiff("sample", model, "--max-new-tokens", 2).stderr
    err = Terminal()
    monkeypatch.setattr(sys, "argv", ["blockdiff", "sample", str(model), "--max-new-tokens", "2"])
    monkeypatch.setenv("COLUMNS", "500")
    monkeypatch.setenv("TERM", "xterm")
    out = contextlib.redirect_stdout(io.StringIO())
    with out, contextlib.redirect_stderr(err), pytest.raises(SystemExit):
        main()
    assert f"loading {model}" in err.getvalue()


# --- seeds ----------------------------------------------------------------------------------------


def test_a_seed_repeats_a_draw(make_model):
    model = make_model(mask_id=12)
    for sample, what in ((blockdiffusion.generate, [1, 2]), (blockdiffusion.infill, [1, 12, 12])):
        drawn = [
            sample(model, what, num_samples=8, bos=False, seed=seed).sequences for seed in (3, 3, 4)
        ]
        assert drawn[0].equal(drawn[1]) and not drawn[0].equal(drawn[2])
        with pytest.raises(UserError, match="seed and generator are both given"):
            sample(model, what, bos=False, seed=3, generator=torch.Generator())
        with pytest.raises(UserError, match="seed is -1"):
            sample(model, what, bos=False, seed=-1)
    events = blockdiffusion.stream(model, [1, 2], num_samples=8, bos=False, seed=3)
    rows = {event.row: event.ids for event in events if isinstance(event, Finished)}
    whole = blockdiffusion.generate(model, [1, 2], num_samples=8, bos=False, seed=3)
    assert [rows[row] for row in range(8)] == [
        ids[:length].tolist() for ids, length in zip(whole.sequences, whole.lengths, strict=True)
    ]


def test_generate_says_what_it_takes():
    takes = inspect.signature(blockdiffusion.generate).parameters
    assert takes == inspect.signature(blockdiffusion.stream).parameters
    assert all(name in (blockdiffusion.generate.__doc__ or "") for name in takes)
