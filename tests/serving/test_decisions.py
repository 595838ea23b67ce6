"""Choices by their probabilities: exact, calibrated, and how good they are."""

import json
import math

import numpy as np
import pytest
import torch

import blockdiffusion
from blockdiffusion.data.tokenizers import byte_tokenizer
from blockdiffusion.errors import UserError
from blockdiffusion.evaluate.options import LikelihoodOptions
from blockdiffusion.serving import decisions
from blockdiffusion.serving.decisions import Case, calibration_error, decided, fit_temperature
from tests.command import blockdiff
from tests.data.test_chat import TEMPLATE, messages


@pytest.fixture
def model(make_model):
    made = make_model(vocab_size=258, mask_id=257, eos_id=256, bos=False, seq_len=64)
    made.tokenizer = byte_tokenizer()
    made.tokenizer.chat_template = TEMPLATE
    return made


def write(path, *cases):
    path.write_text("\n".join(map(json.dumps, cases)))
    return path


@pytest.mark.parametrize("block_size", [1, 4])
def test_probabilities_are_those_of_the_likelihood(model, block_size, tmp_path):
    """Of choices of several lengths, behind prompts that end inside a block, one behind messages
    with its EOS; each alone by `likelihood`."""
    model = model.with_block_size(block_size)
    talk = messages(("user", "a?"))
    file = write(
        tmp_path / "c.jsonl",
        {"prompt": "abcde", "choices": ["x", "yz", "longer"], "answer": 1, "id": "first"},
        {"messages": talk, "choices": ["yes", "no"], "answer": "no"},
        {"prompt": "abcd", "choices": ["1", "2", "5"]},
    )
    cases = decisions.read_cases(model, file)
    nats, is_exact = decisions.choice_nats(model, cases)
    assert is_exact
    asked = [*b"[user]a?", 256, *b"\n[assistant]"]
    prompts = [[*b"abcde"], asked, [*b"abcd"]]
    ends = [[], [256], []]
    for case, prompt, end, nats_C in zip(cases, prompts, ends, nats, strict=True):
        assert case.prompt == prompt
        expected = []
        for text in case.choices:
            ids = torch.tensor([[*prompt, *text.encode(), *end]])
            given = torch.arange(ids.shape[1])[None] < len(prompt)
            found = blockdiffusion.likelihood(model, ids, estimator="exact", bos=False, given=given)
            expected.append(float(found.exact_nats_per_row))
        assert nats_C == pytest.approx(expected, rel=1e-6)
        p = np.exp(-np.array(expected))
        assert decided(case, nats_C).probabilities_C == pytest.approx(p / p.sum(), rel=1e-6)
    assert [case.answer for case in cases] == [1, 1, None]
    last = decided(cases[2], nats[2])
    assert last.to_dict()["expected"] == pytest.approx(
        float(last.probabilities_C @ np.array([1, 2, 5]))
    )
    assert "expected" not in decided(cases[0], nats[0]).to_dict()


def test_bounds_are_said_to_be_bounds(model, tmp_path):
    case = {"prompt": "a", "choices": ["bcdefgh", "b"]}
    cases = decisions.read_cases(model, write(tmp_path / "c.jsonl", case))
    _, is_exact = decisions.choice_nats(model, cases, LikelihoodOptions(estimator="complement"))
    assert not is_exact


def test_the_temperature_of_known_data_is_found():
    """Answers drawn at temperature 2.5 from 4000 cases: 3 standard errors (false alarm 0.3 %)."""
    draw = np.random.default_rng(0)
    nats = [draw.normal(0, 3, 4) for _ in range(4000)]
    answers = []
    for nats_C in nats:
        p = np.exp(-nats_C / 2.5)
        answers.append(int(draw.choice(4, p=p / p.sum())))
    found = fit_temperature(nats, answers)
    assert found == pytest.approx(2.5, abs=0.2)

    def loss(temperature):
        return math.fsum(
            -math.log(decided(None, n, temperature).probabilities_C[a])
            for n, a in zip(nats, answers, strict=True)
        )

    assert loss(found) <= min(loss(found * 0.99), loss(found * 1.01))
    assert fit_temperature([np.array([0.0, 1.0])] * 3, [0, 0, 0]) == pytest.approx(0.05, rel=1e-3)


def test_quality_by_hand():
    def one(p, answer):
        case = Case(1, {}, [], ["a", "b"], [[1], [2]], answer)
        return decided(case, -np.log(np.array([p, 1 - p])))

    found = decisions.quality([one(0.9, 0), one(0.6, 1), one(0.2, 1), one(0.5, None)])
    assert found.num_cases == 3 and found.accuracy.value == pytest.approx(2 / 3)
    assert found.nats.value == pytest.approx(-np.log([0.9, 0.4, 0.8]).mean())
    assert found.brier.value == pytest.approx((2 * 0.01 + 2 * 0.36 + 2 * 0.04) / 3)
    # Bins: 0.9 (right), 0.6 (wrong), 0.8 (right).
    assert found.calibration_error == pytest.approx((0.1 + 0.6 + 0.2) / 3)
    assert calibration_error([0.55, 0.58, 1.0], [1, 0, 1]) == pytest.approx(0.13 / 3)
    assert decisions.quality([one(0.5, None)]) is None


@pytest.mark.parametrize(
    ("line", "key"),
    [
        ({}, "must have a prompt or messages"),
        ({"prompt": "a", "messages": [], "choices": ["b", "c"]}, "and not both"),
        ({"prompt": "a"}, "choices is null"),
        ({"prompt": "a", "choices": ["b"]}, "2 to 1000 different"),
        ({"prompt": "a", "choices": ["b", "b"]}, "different texts"),
        ({"prompt": "a", "choices": ["b", ""]}, "different texts"),
        ({"prompt": "a", "choices": ["b", 3]}, "different texts"),
        ({"prompt": 3, "choices": ["b", "c"]}, "prompt is 3"),
        ({"prompt": "a", "choices": ["b", "c"], "answer": 2}, "answer is 2"),
        ({"prompt": "a", "choices": ["b", "c"], "answer": True}, "answer is True"),
        ({"prompt": "a", "choices": ["b", "c"], "answer": "d"}, "answer is 'd'"),
        ({"prompt": "a", "choices": ["b", "c"], "label": 1}, "has 'label'"),
        ({"messages": [], "choices": ["b", "c"]}, "no list of messages"),
    ],
)
def test_a_bad_case_is_refused(line, key, model, tmp_path):
    with pytest.raises(UserError, match=f"line 1 of .*{key}"):
        decisions.read_cases(model, write(tmp_path / "c.jsonl", line))


def test_the_command(model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model.save_pretrained(tmp_path / "model")
    model.tokenizer.save_pretrained(tmp_path / "model")
    cases = [
        {"prompt": f"q{n}", "choices": ["yes", "no", "maybe"], "answer": n % 3} for n in range(6)
    ]
    write(tmp_path / "c.jsonl", *cases)
    done = blockdiff("decide", "model", "c.jsonl", "--out", "out.jsonl", "--calibrate", "c.jsonl")
    assert done.returncode == 0, done.stderr
    assert "6 cases; probabilities exact, at the temperature" in done.stdout
    for word in ("accuracy", "Brier score", "calibration error"):
        assert word in done.stdout
    found = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [r["line"] for r in found] == list(range(1, 7))
    assert all(sum(r["probabilities"]) == pytest.approx(1) for r in found)
    shown = blockdiff("decide", "model", "c.jsonl")
    assert shown.returncode == 0 and len(shown.stdout.splitlines()) == 6
    del cases[0]["answer"]
    write(tmp_path / "d.jsonl", *cases)
    done = blockdiff("decide", "model", "c.jsonl", "--calibrate", "d.jsonl")
    assert done.returncode == 2 and "a case without answer" in done.stderr
