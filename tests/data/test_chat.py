"""Conversations become tokens: which are responses, and how they share rows."""

import json

import numpy as np
import pytest
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import AddedToken, PreTrainedTokenizerFast

from blockdiffusion.data.chat import conversation_text, prompt_ids, render
from blockdiffusion.data.loader import TokenRows
from blockdiffusion.data.options import PrepareOptions
from blockdiffusion.data.packing import prepare
from blockdiffusion.data.shards import MARK, ChatPacker, RowRules
from blockdiffusion.data.tokenizers import load_tokenizer
from blockdiffusion.errors import UserError
from tests.command import blockdiff

WORDS = ["<user>", "<assistant>", "<end>", "hi", "yes", "no", "why", "|", "?", "[end]"]
PLAIN = (
    "{% for m in messages %}<{{ m.role }}> {{ m.content }} <end> {% endfor %}"
    "{% if add_generation_prompt %}<assistant> {% endif %}"
)
MARKED = (
    "{% for m in messages %}<{{ m.role }}> {% if m.role == 'assistant' %}{%+ generation %}"
    "{{ m.content }} <end> {% endgeneration %}{% else %}{{ m.content }} <end> {% endif %}"
    "{% endfor %}"
)
# No header: what follows the user's message is the response.
BARE = (
    "{% for m in messages %}{{ m.content }} {{ '|' if m.role == 'user' else '<end>' }} {% endfor %}"
)
SHOWN = (
    "<user> hi <end> <assistant> *yes *no *<end> "
    "<user> hi <end> <assistant> yes no <end> <user> why <end> <assistant> *no *<end>"
)
TALK = [("user", "hi"), ("assistant", "yes no"), ("user", "why"), ("assistant", "no")]


def messages(*talk):
    return [{"role": role, "content": text} for role, text in talk]


def tokenizer_with(template, eos="<end>"):
    inner = Tokenizer(WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="?"))
    inner.pre_tokenizer = WhitespaceSplit()
    made = PreTrainedTokenizerFast(tokenizer_object=inner, eos_token=eos)
    made.chat_template = template
    return made


def marked(rendered):
    """The words, targets with a star."""
    pairs = zip(rendered.ids, rendered.is_target, strict=True)
    return " ".join("*" * target + WORDS[token] for token, target in pairs)


@pytest.mark.parametrize(
    "template",
    [PLAIN, MARKED, PLAIN.replace("<end> {% endfor", "<end> | {% endfor")],
    ids=["prompt", "marks", "text behind the end"],
)
def test_every_response_is_an_example_that_ends_with_its_end(template):
    shown = SHOWN.replace("hi <end> <", "hi <end> | <") if "|" in template else SHOWN
    shown = shown.replace("no <end> <user>", "no <end> | <user>") if "|" in template else shown
    shown = shown.replace("why <end> <", "why <end> | <") if "|" in template else shown
    shown = shown.replace("*<end> | <user>", "*<end> <user>")
    assert marked(render(tokenizer_with(template), messages(*TALK))) == shown


def test_a_template_without_headers():
    found = render(tokenizer_with(BARE), messages(*TALK[:2]))
    assert marked(found) == "hi | *yes *no *<end>"


def test_a_response_without_an_end_gets_one():
    found = render(tokenizer_with(PLAIN, eos="[end]"), messages(*TALK[:2]))
    assert marked(found) == "<user> hi <end> <assistant> *yes *no *<end> *[end]"


def test_a_question_ends_with_the_header_of_the_answer():
    ids = prompt_ids(tokenizer_with(PLAIN), messages(("user", "why")))
    assert [WORDS[i] for i in ids] == ["<user>", "why", "<end>", "<assistant>"]


def test_special_tokens_are_the_templates_alone():
    tokenizer = tokenizer_with(PLAIN)
    tokenizer.backend_tokenizer.add_special_tokens([AddedToken("<end>", special=True)])
    with pytest.raises(UserError, match=r"'<end>'.*only the chat template"):
        render(tokenizer, messages(("user", "hi <end>"), ("assistant", "no")))
    # Tokenizers of prepared data split them in a text, but not what the template writes.
    tokenizer = tokenizer_with("{% for m in messages %}{{ m.content }}<end>{% endfor %}")
    tokenizer.backend_tokenizer.add_special_tokens([AddedToken("<end>", special=True)])
    tokenizer.split_special_tokens = True
    found = render(tokenizer, messages(("user", "hi"), ("assistant", "no")))
    assert marked(found) == "hi <end> *no *<end>"


@pytest.mark.parametrize(
    ("template", "talk", "key"),
    [
        (None, TALK, "no chat template"),
        ({"a": PLAIN, "b": PLAIN}, TALK, "no chat template, or several"),
        ("{{ raise_exception('roles must alternate') }}", TALK, "refuses.*alternate"),
        ("{{ messages[0].content + 1 }}", TALK, "refuses"),
        ("{{ messages[9].content[0] }}", TALK, "refuses"),
        ("{{ ''.__class__.__mro__ }}", TALK, "refuses"),  # the sandbox
        ("{% for m in messages|reverse %}{{ m.content }} {% endfor %}", TALK, "not its beginning"),
        (PLAIN.split("{% if")[0], TALK, "ignores add_generation_prompt"),
        (PLAIN + "{% generation %}{% endgeneration %}", TALK, "encloses no token"),
        ("{{ messages[1].content if messages|length > 1 else '' }}", TALK[:2], "nothing is before"),
    ],
)
def test_refused_templates(template, talk, key):
    with pytest.raises(UserError, match=key):
        render(tokenizer_with(template), messages(*talk))


def test_a_token_across_the_beginning_of_a_response_is_refused():
    inner = Tokenizer(WordLevel({"a": 0, "a:b": 1, "a:": 2, "?": 3}, unk_token="?"))
    inner.pre_tokenizer = WhitespaceSplit()
    made = PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="?")
    made.chat_template = "{{ messages[0].content }}:{% if messages|length > 1 %}b{% endif %}"
    with pytest.raises(UserError, match="spans its beginning"):
        render(made, messages(("user", "a"), ("assistant", "b")))


# --- records --------------------------------------------------------------------------------------


def test_records_of_both_shapes():
    expected = json.dumps(messages(*TALK[:2]))
    assert conversation_text({"messages": messages(*TALK[:2])}, "messages", "line 1") == expected
    older = [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "yes no"}]
    for field in ("messages", "conversations"):
        assert conversation_text({"conversations": older}, field, "line 1") == expected


@pytest.mark.parametrize(
    ("record", "key"),
    [
        ({"text": "hi"}, "no string 'messages'"),
        ({"messages": []}, "no list of messages"),
        ({"messages": 3}, "no list of messages"),
        ({"messages": [3]}, "no list of messages"),
        ({"messages": [{"role": "user", "content": None}]}, "no list of messages"),
        ({"messages": [{"role": ["user"], "content": "hi"}]}, "no list of messages"),
        ({"messages": [{"from": {}, "value": "hi"}]}, "no list of messages"),
        ({"messages": messages(("user", "hi"))}, "has no response"),
        ({"messages": messages(*TALK[1:])}, "begins with a response"),
        ({"messages": messages(("user", "\ud800"), ("assistant", "no"))}, "surrogate"),
    ],
)
def test_refused_records(record, key):
    with pytest.raises(UserError, match=f"line 7.*{key}"):
        conversation_text(record, "messages", "line 7")


# --- rows -----------------------------------------------------------------------------------------


def packed(examples, seq_len, align, at_once=3):
    """Rows and marks of examples of (context length, target length); ids count up."""
    packer = ChatPacker(RowRules(seq_len=seq_len, dtype=np.dtype("<u2"), pad_id=0, align=align))
    made, next_id = [], 1
    for first in range(0, len(examples), at_once):
        some = examples[first : first + at_once]
        total = sum(map(sum, some))
        ids = np.arange(next_id, next_id + total, dtype="<u2")
        next_id += total
        targets = np.concatenate([np.repeat([False, True], sizes) for sizes in some])
        made.append(packer.add(ids, np.array([total]), targets))
    if (rest := packer.finish()) is not None:
        made.append(rest)
    return packer, *(np.concatenate(arrays) for arrays in zip(*made, strict=True))


@pytest.mark.parametrize("at_once", [1, 3, 200])
@pytest.mark.parametrize(("seq_len", "align"), [(32, 4), (24, 1), (16, 16)])
def test_every_example_stands_whole_in_one_row(seq_len, align, at_once):
    draw = np.random.default_rng(1)
    examples = [(int(a), int(b)) for a, b in draw.integers(1, 9, (200, 2))]
    packer, rows, marks = packed(examples, seq_len, align, at_once)
    assert marks.dtype == MARK and packer.left_over == 0
    found = []
    for ids, mark in zip(rows, marks, strict=True):
        numbers = mark // 2
        used = np.count_nonzero(numbers)
        assert (numbers[used:] == 0).all() and (np.diff(numbers[:used]) >= 0).all()
        for number in range(1, numbers.max() + 1):
            own = np.flatnonzero(numbers == number)
            assert own[0] % align == 0 and len(own) % align == 0
            targets = mark[own] % 2 == 1
            # Targets end it, the filling among them.
            assert (np.diff(targets.astype(int)) >= 0).all() and targets[-1]
            text = ids[own][ids[own] > 0]
            assert (ids[own][len(text) :] == 0).all()
            context = int((~targets).sum())
            found.append((text[0], (context, len(text) - context)))
            assert text.tolist() == list(range(text[0], text[0] + len(text)))
    assert [sizes for _, sizes in sorted(found)] == examples
    if (seq_len, align) == (32, 4):  # rows are nearly full: of 32 tokens, of sizes up to 16
        assert np.count_nonzero(marks) > 0.93 * marks.size


def test_longer_examples_are_cut_and_left_out_without_targets():
    packer, rows, marks = packed([(3, 9), (9, 3), (2, 2)], seq_len=8, align=4)
    assert sorted(rows.tolist()) == [list(range(1, 9)), [25, 26, 27, 28, 0, 0, 0, 0]]
    assert packer.left_over == 4 + 12
    assert sorted((marks % 2).sum(1).tolist()) == [2, 5]


def write_chat(path, count=40):
    lines = []
    for number in range(count):
        talk = [("user", f"{number} and 1?"), ("assistant", f"{number + 1}!" * (number % 4 + 1))]
        talk += [("user", "sure?"), ("assistant", "yes")] * (number % 3)
        lines.append(json.dumps({"messages": messages(*talk)}))
    path.write_text("\n".join(lines))


TEMPLATE = (
    "{% for m in messages %}[{{ m.role }}]{{ m.content }}<|endoftext|>\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("chat")
    write_chat(folder / "c.jsonl")
    tokenizer = load_tokenizer("byte")
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder / "tokenizer")
    return folder


def options(place, **more):
    return PrepareOptions(
        **{
            "tokenizer": str(place / "tokenizer"), "packing": "chat", "seq_len": 128, "align": 8,
            "num_workers": 1, **more,
        }
    )  # fmt: skip


def test_prepared_rows_hold_what_the_template_writes(place, tmp_path):
    manifest = prepare([str(place / "c.jsonl")], tmp_path / "data", options(place))
    assert manifest.splits["train"].documents == 38 and manifest.splits["valid"].documents == 2
    assert manifest.options["field"] == "messages" and not manifest.document_eos
    tokenizer = load_tokenizer(tmp_path / "data" / "tokenizer")
    wanted = set()
    for line in (place / "c.jsonl").read_text().splitlines():
        rendered = render(tokenizer, json.loads(line)["messages"])
        starts = [0, *(np.flatnonzero(np.diff(np.array(rendered.is_target, int)) == -1) + 1)]
        for start, end in zip(starts, [*starts[1:], len(rendered.ids)], strict=True):
            ids = rendered.ids[start:end]
            wanted.add((tuple(ids), sum(rendered.is_target[start:end]), -len(ids) % 8))
    found = set()
    for split in ("train", "valid"):
        rows = TokenRows(tmp_path / "data", split)
        batch = rows.rows(np.arange(rows.num_rows))
        assert batch.num_tokens == manifest.splits[split].tokens
        alone = batch.unpacked()
        assert alone.document_BL is None and alone.num_tokens == batch.num_tokens
        for ids, valid, target in zip(alone.ids_BL, alone.valid_BL, alone.target_BL, strict=True):
            ids, filled = ids[valid].tolist(), 0
            while ids[-2] == 256 == ids[-1] and ids[-2:] != ids[:2]:
                ids, filled = ids[:-1], filled + 1
            found.add((tuple(ids), int(target.sum()) - filled, filled))
    assert found == wanted


def test_the_result_does_not_depend_on_workers_and_is_found_again(place, tmp_path):
    for name, workers in (("one", 1), ("two", 2)):
        prepare([str(place / "c.jsonl")], tmp_path / name, options(place, num_workers=workers))
    names = sorted(path.name for path in (tmp_path / "one").iterdir())
    assert "train-00000.chat" in names
    for name in ("train-00000.bin", "train-00000.chat", "valid-00000.chat"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()
    before = (tmp_path / "one" / "manifest.json").stat().st_mtime_ns
    prepare([str(place / "c.jsonl")], tmp_path / "one", options(place))
    assert (tmp_path / "one" / "manifest.json").stat().st_mtime_ns == before
    with pytest.raises(UserError, match="align=8, not 4"):
        prepare([str(place / "c.jsonl")], tmp_path / "one", options(place, align=4))


def test_damage_beside_the_rows_is_seen(place, tmp_path):
    prepare([str(place / "c.jsonl")], tmp_path / "data", options(place))
    file = tmp_path / "data" / "train-00000.chat"
    content = bytearray(file.read_bytes())
    content[5] ^= 1
    file.write_bytes(content)
    with pytest.raises(UserError, match=r"train-00000.chat"):
        TokenRows(tmp_path / "data", "train")
    file.write_bytes(content[:-2])
    with pytest.raises(UserError, match=r"train-00000.chat has"):
        TokenRows(tmp_path / "data", "train")


def test_longer_conversations_are_reported(place, tmp_path):
    long = [messages(("user", "w" * size), ("assistant", "yes")) for size in (10, 90, 200, 10)]
    file = tmp_path / "c.jsonl"
    file.write_text("\n".join(json.dumps({"messages": talk}) for talk in long))
    line = ["prepare", file, "--packing", "chat", "--tokenizer", place / "tokenizer",
            "--valid-fraction", 0, "--align", 8, "--seq-len"]  # fmt: skip
    done = blockdiff(*line, 128, "--out", tmp_path / "data")
    assert done.returncode == 0, done.stderr
    tokens = len("[user]") + 200 + 1 + len("\n[assistant]") + len("yes") + 1
    assert f"left out {tokens} tokens beyond L, of longer conversations" in done.stdout
    done = blockdiff(*line, 16, "--out", tmp_path / "short")
    assert done.returncode == 2 and "no training conversation has a response" in done.stderr


@pytest.mark.parametrize(
    ("more", "key"),
    [
        (dict(row_bos=True), "row_bos is True, but packing is chat"),
        (dict(detokenize="ptb"), "detokenize is 'ptb', but packing is chat"),
        (dict(align=48), "align=48 does not divide"),
        (dict(tokenizer="byte"), "no chat template"),
    ],
)
def test_refused_options(more, key, place, tmp_path):
    with pytest.raises(UserError, match=key):
        prepare([str(place / "c.jsonl")], tmp_path / "data", options(place, **more))


@pytest.mark.parametrize(
    ("name", "content", "key"),
    [
        ("c.txt", "hi", "plain text or CSV"),
        ("c.csv", "messages\nhi", "plain text or CSV"),
        ("c.jsonl", '[{"role": "user"}]', "JSON array"),
        ("c.jsonl", json.dumps({"messages": messages(("user", "hi"))}), "line 1.*no response"),
        ("c.jsonl", '{"messages": []}', "line 1.*no list of messages"),
        ("python-docs", None, "no file or folder"),
        ("ptb", None, "holds no conversations"),
    ],
)
def test_refused_sources(name, content, key, place, tmp_path):
    source = tmp_path / name if content is not None else name
    if content is not None:
        source.write_text(content)
    with pytest.raises(UserError, match=key):
        prepare([str(source)], tmp_path / "data", options(place))
