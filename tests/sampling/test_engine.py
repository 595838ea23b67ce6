"""The engine against `generate` of one request, and against an exactly known law."""

import math
import random
from collections import Counter

import pytest
import torch

import blockdiffusion
from blockdiffusion import Engine, UserError
from blockdiffusion.models.inference import optimize_for_inference
from blockdiffusion.sampling import BlockDone, Finished, TokensRevealed
from tests.sampling.laws import FALSE_ALARM, law_of, p_value, seeded
from tests.tiny import NOISES

KINDS = NOISES | {"causal": dict(clean_attention="causal")}
MASKED = [
    {},
    dict(sampler="ancestral", steps=2),
    dict(sampler="random", tokens_per_step=2),
    dict(sampler="confidence", tokens_per_step=2),
    dict(sampler="confidence", threshold=0.3),
    dict(sampler="margin", tokens_per_step=1),
    dict(sampler="entropy", threshold=0.5),
    dict(sampler="remask", steps=5),
]
POLICIES = {
    "masked": MASKED,
    "causal": MASKED,
    "timed": [policy for policy in MASKED if policy.get("sampler") != "random"],
    "sedd": [{}, dict(sampler="analytic", steps=3)],
}


def requests(count, kind, longest_prompt=21, seed=0):
    """Random requests: (prompt, options), some from nothing, some with long prompts."""
    draw = random.Random(seed)
    for number in range(count):
        prompt = [draw.randrange(12) for _ in range(draw.choice([0, 0, 3, 4, longest_prompt]))]
        options = dict(
            max_new_tokens=draw.randint(1, 19),
            temperature=draw.choice([1.0, 0.7]),
            top_k=draw.choice([None, 3]),
            top_p=draw.choice([1.0, 0.8]),
            eos=draw.random() < 0.7,
            seed=number,
            **draw.choice(POLICIES.get(kind, [{}])),
        )
        yield prompt, options


@pytest.fixture
def make_stopping(make_model):
    """Networks that often say EOS, which is 5."""

    def make(**overrides):
        model = make_model(eos_id=5, **overrides)
        with torch.no_grad():
            model.output.bias[5] += 1.5
        return model

    return make


def alone(model, prompt, options, window=None):
    """What `generate` gives for one request: its ids."""
    seed = seeded(options["seed"])
    options = {name: value for name, value in options.items() if name != "seed"}
    result = blockdiffusion.generate(model, [prompt], generator=seed, window=window, **options)
    return result.sequences[0, : int(result.lengths[0])].tolist()


def run_all(engine, wanted, arrivals=2):
    """Submits `arrivals` requests a step, not all at once; the Finished events by id."""
    finished, pending = {}, list(wanted)
    while pending or engine.num_active or engine.num_waiting:
        for prompt, options in pending[:arrivals]:
            engine.submit(prompt, **options)
        del pending[:arrivals]
        for event in engine.step():
            if isinstance(event, Finished):
                assert event.row not in finished
                finished[event.row] = event
    return finished


@pytest.mark.parametrize("window", [None, 24])
@pytest.mark.parametrize("kind", KINDS)
def test_requests_that_come_and_go_are_those_of_one_alone(make_stopping, kind, window):
    model = make_stopping(**KINDS[kind])
    wanted = list(requests(40, kind))
    finished = run_all(Engine(model, max_rows=5, max_tokens=40, window=window), wanted)
    assert sorted(finished) == list(range(40))  # none lost
    for number, (prompt, options) in enumerate(wanted):  # none mixed up
        event = finished[number]
        assert event.ids == alone(model, prompt, options, window)
        assert event.ids[: event.prompt_tokens] == prompt
        stopped = event.ids[-1] == 5 and options["eos"] and len(event.ids) > len(prompt)
        full = len(event.ids) == len(prompt) + options["max_new_tokens"]
        assert event.reason == ("eos" if stopped else "length") and (stopped or full)
    reasons = Counter(event.reason for event in finished.values())
    assert min(reasons["eos"], reasons["length"]) > 5


def test_a_prompt_longer_than_a_pass_is_read_in_parts(make_model):
    """And meanwhile others are denoised."""
    model = make_model()
    engine = Engine(model, max_rows=2, max_tokens=1300)
    long = [n % 12 for n in range(1203)]
    finished = run_all(engine, [([], dict(seed=0)), (long, dict(max_new_tokens=9, seed=1))])
    assert finished[1].ids == alone(model, long, dict(max_new_tokens=9, seed=1))
    assert finished[0].ids == alone(model, [], dict(seed=0, max_new_tokens=128))
    # Two passes that only read, then one for each token: 1 of the first block, 4, 4.
    assert finished[1].nfe == 2 + 1 + 4 + 4


def test_the_engine_keeps_the_law(tiny_law, tiny_law_expected):
    """Requests of one and of two blocks through 128 rows, of a copy with folded weights: those of
    two have the known law. Chi-square with a false-alarm probability of 1e-4."""
    engine = Engine(optimize_for_inference(tiny_law), max_rows=128, max_tokens=4)
    draws = 4000
    for seed in range(draws):
        engine.submit(max_new_tokens=4, bos=False, seed=seed)
        if seed % 3 == 0:
            engine.submit(max_new_tokens=2, bos=False, seed=seed)
    finished = [event for event in engine.run() if isinstance(event, Finished)]
    texts = [tuple(event.ids) for event in finished if len(event.ids) == 4]
    assert len(texts) == draws
    assert p_value(texts, law_of(tiny_law_expected)) > FALSE_ALARM


def test_events_tell_all_that_is_written(make_model):
    model = make_model()
    engine = Engine(model, max_rows=3, max_tokens=40)
    text, blocks = {}, {}
    for prompt, options in requests(9, "masked", longest_prompt=9):
        text[engine.submit(prompt, **options)] = dict(enumerate(prompt))
    for event in engine.run():
        if isinstance(event, TokensRevealed):
            assert all(0 < c <= 1 for c in event.confidences)
            (row,) = set(event.rows.tolist())
            text[row].update(zip(event.positions.tolist(), event.ids.tolist(), strict=True))
        elif isinstance(event, BlockDone):
            row, start, end = int(event.rows), int(event.starts), int(event.ends)
            kept = event.ids[0, : end - start].tolist()
            assert kept == [text[row][position] for position in range(start, end)]
            blocks.setdefault(row, []).extend(kept)
        else:
            assert [text[event.row][n] for n in range(len(event.ids))] == event.ids
            first = event.prompt_tokens // 4 * 4
            assert blocks[event.row] == event.ids[first:]
            new = len(event.ids) - event.prompt_tokens
            assert event.tokens_per_forward == new / event.nfe > 0


def test_cancelled_requests_leave_the_others_alone(make_model):
    model = make_model()
    engine = Engine(model, max_rows=2, max_tokens=40)
    wanted = list(requests(6, "masked"))
    for prompt, options in wanted:
        engine.submit(prompt, **options | {"max_new_tokens": 19, "eos": False})
    events = [event for _ in range(6) for event in engine.step()]
    assert engine.cancel(0) and engine.cancel(4)  # one at work, one that waits
    assert not engine.cancel(0) and not engine.cancel(17)
    events += engine.run()
    finished = {event.row: event for event in events if isinstance(event, Finished)}
    assert sorted(finished) == list(range(6))
    for number, (prompt, options) in enumerate(wanted):
        expected = alone(model, prompt, options | {"max_new_tokens": 19, "eos": False})
        if number in (0, 4):
            event = finished[number]
            assert event.reason == "cancelled" and event.ids == expected[: len(event.ids)]
        else:
            assert finished[number].ids == expected
    assert len(finished[0].ids) > len(wanted[0][0])  # the blocks that it had finished
    assert finished[4].ids == wanted[4][0]


def test_texts_are_decoded_and_prompts_encoded(make_model):
    class Words:
        bos_token_id = 3

        def encode(self, text, add_special_tokens):
            return [int(word) for word in text.split()]

        def decode(self, ids, skip_special_tokens):
            return " ".join(map(str, ids))

    model = make_model(bos=True, bos_id=3)
    model.tokenizer = Words()
    engine = Engine(model)
    engine.submit("1 2", max_new_tokens=3, seed=0)
    (event,) = (event for event in engine.run() if isinstance(event, Finished))
    assert event.ids[:3] == [3, 1, 2] and event.prompt_tokens == 3
    assert event.text == " ".join(map(str, event.ids[1:]))  # the prompt as it was given


@pytest.mark.slow
def test_a_thousand_requests_in_flat_memory(make_stopping):
    """None lost, none mixed up; the process does not grow with the number of requests, tensors
    included: a row's cache kept for each of them would be 20 MB."""
    process = pytest.importorskip("psutil").Process()
    model = make_stopping()
    wanted = list(requests(1000, "masked"))
    engine = Engine(model, max_rows=16, max_tokens=40)
    run_all(engine, wanted[:100], arrivals=5)
    before = process.memory_info().rss
    finished = {}
    for first in range(0, 1000, 100):
        found = run_all(engine, wanted[first : first + 100], arrivals=5)
        finished |= {event.row - 100: event.ids for event in found.values()}
    assert process.memory_info().rss - before < 10_000_000
    assert sorted(finished) == list(range(1000))
    for number, (prompt, options) in enumerate(wanted):
        assert finished[number] == alone(model, prompt, options)


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "most"), [
    ("float64", 0), ("float32", 2), ("bfloat16", 24), ("int8", 112),
])  # fmt: skip
def test_how_many_requests_rounding_changes(make_model, kind, most):
    """Of 112, by seven policies, through eight rows; the documentation tells what is printed here.
    In 8 bits there is no promise; the test only sees that there are results."""
    model = make_model(vocab_size=200, hidden_size=32, seq_len=64)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(0.75)
    if kind != "float64":
        model = model.bfloat16() if kind == "bfloat16" else model.float()
    if kind == "int8" and "fbgemm" not in torch.backends.quantized.supported_engines:
        pytest.skip("no 8-bit products here")
    model = optimize_for_inference(model, int8=kind == "int8")
    draw = random.Random(0)
    wanted = []
    for number in range(112):
        prompt = [draw.randrange(199) for _ in range(draw.choice([0, 0, 3, 8, 21]))]
        options = dict(
            max_new_tokens=draw.randint(4, 30),
            temperature=draw.choice([1.0, 0.7]),
            top_p=draw.choice([1.0, 0.8]),
            seed=number,
        )
        wanted.append((prompt, options | [*MASKED[:4], *MASKED[5:]][number % 7]))
    finished = run_all(Engine(model, max_rows=8, max_tokens=80), wanted)
    differ = sum(
        finished[number].ids != alone(model, prompt, options)
        for number, (prompt, options) in enumerate(wanted)
    )
    print(f"{kind}: {differ} of {len(wanted)} requests write another text than alone")
    assert len(finished) == len(wanted) and differ <= most


def test_ties_are_not_broken_by_rounding(make_model):
    """The masks of a text's first block have the same predictions: the first goes first, whatever
    the numbers of rows and the type."""
    model = make_model()
    for dtype in (torch.float64, torch.float32):
        model = model.to(dtype)
        for rows in (1, 3, 8):
            for policy in ("confidence", "margin", "entropy"):
                engine = Engine(model, max_rows=rows)
                for seed in range(rows):
                    engine.submit(sampler=policy, tokens_per_step=2, max_new_tokens=4, seed=seed)
                told = [e for e in engine.step() if isinstance(e, TokensRevealed)]
                assert [e.positions.tolist() for e in told] == [[0, 1]] * rows


def test_without_a_seed_requests_differ(make_model):
    engine = Engine(make_model())
    for _ in range(2):
        engine.submit(max_new_tokens=60)
    one, two = (event.ids for event in engine.run() if isinstance(event, Finished))
    assert one != two


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(max_rows=0), "max_rows is 0"),
        (dict(max_tokens=0), "max_tokens is 0"),
        (dict(max_rows=2.5), r"max_rows is 2\.5; it must be a whole number"),
        (dict(window=4.5), r"window is 4\.5; it must be a whole number"),
        (dict(window=3), "window of 3 tokens is smaller than a block of 4"),
    ],
)
def test_an_engine_that_cannot_be(make_model, options, message):
    with pytest.raises(UserError, match=message):
        Engine(make_model(), **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(max_new_tokens=41), "does not fit into max_tokens = 40"),
        (dict(max_new_tokens=0), "max_new_tokens is 0"),
        (dict(top_p=0), "top_p is 0"),
        (dict(sampler="ancestral"), "needs a number of steps"),
        (dict(prompt=[12]), "a prompt holds the id 12"),
        (dict(prompt="text"), "no tokenizer"),
        (dict(sampler="analytic"), "analytic"),
        (dict(sampler=3), "sampler is 3; it must be a name or a Sampler"),
        (dict(temperature=math.inf), r"temperature is inf; it must lie in \[0\.001, 1000\]"),
        (dict(temperature=math.nan), "temperature is nan"),
        (dict(temperature=1e-45), "temperature is 1e-45; .*between 1e-30 and"),
        (dict(temperature="hot"), "temperature is 'hot'; it must be a number"),
        (dict(max_new_tokens=4.5), r"max_new_tokens is 4\.5; it must be a whole number"),
        (dict(max_new_tokens=True), "max_new_tokens is True; it must be a whole number"),
        (
            dict(sampler="random", tokens_per_step=2.5),
            r"tokens_per_step is 2\.5; it must be a whole",
        ),
        (dict(sampler="margin", threshold="1"), "threshold is '1'; it must be a number"),
        (dict(top_k=2.5), r"top_k is 2\.5; it must be a whole number"),
        (dict(seed=2**70), r"seed is 1180591620717411303424; it must be at most"),
        (dict(seed=-1), "seed is -1"),
        (dict(seed=1.5), r"seed is 1\.5; it must be a whole number"),
        (dict(prompt=["a", "b"]), "holds 'a', which is no token id; give a text, or a list"),
        (dict(prompt=[1.5]), r"holds 1\.5, which is no token id"),
        (dict(prompt=1.5), r"holds 1\.5, which is no token id"),
        (dict(prompt=torch.zeros(2, 2, dtype=torch.long)), r"holds \[0, 0\], which is no token id"),
        (dict(prompt=len), "is given as a prompt; give a text, or a list of token ids"),
        (
            dict(use_cache=False),
            "use_cache is no option of a request; leave it out",
        ),
        (dict(window=8), r"window is no option of a request; .* \(a window is the engine's\)"),
        (dict(stride=3), "stride is no option of a request"),
        (dict(foo=1), "foo.? is no option; there are num_samples"),
    ],
)
def test_requests_are_checked_when_they_are_submitted(make_model, options, message):
    engine = Engine(make_model(), max_tokens=40)
    with pytest.raises(UserError, match=message):
        engine.submit(**{"max_new_tokens": 8, **options})
    assert engine.num_waiting == 0 and list(engine.run()) == []


def test_a_pass_that_fails_can_be_made_again(make_model, monkeypatch):
    """Nothing has advanced before the network's answer is there."""
    model = make_model()
    engine = Engine(model, max_rows=3, max_tokens=40)
    wanted = list(requests(6, "masked"))
    for prompt, options in wanted:
        engine.submit(prompt, **options)
    waiting = engine.submit([1], max_new_tokens=4)
    assert engine.cancel(waiting)
    head, calls, finished = engine.model.head, [], {}

    def failing(hidden):
        calls.append(len(hidden))
        if len(calls) % 2:
            raise RuntimeError("out of memory")
        return head(hidden)

    monkeypatch.setattr(engine.model, "head", failing)
    while engine.num_active or engine.num_waiting:
        with pytest.raises(RuntimeError, match="out of memory"):
            engine.step()
        finished |= {event.row: event for event in engine.step() if isinstance(event, Finished)}
    monkeypatch.undo()
    assert finished.pop(waiting).reason == "cancelled"
    for number, (prompt, options) in enumerate(wanted):
        assert finished[number].ids == alone(model, prompt, options)


def test_a_model_of_one_block_writes_one_block(make_model):
    model = make_model(block_size=16)
    engine = Engine(model, max_tokens=64)
    options = dict(max_new_tokens=13, seed=4)
    engine.submit([1, 2, 3], **options)
    (event,) = (event for event in engine.run() if isinstance(event, Finished))
    assert event.ids == alone(model, [1, 2, 3], options)
    with pytest.raises(UserError, match="17 tokens in all goes beyond the one block"):
        engine.submit([1, 2, 3], max_new_tokens=14)


@pytest.mark.parametrize("window", [None, 24])
@pytest.mark.parametrize("bos", [True, False])
def test_autoregressive_requests_are_those_of_one_alone(make_ar, monkeypatch, bos, window):
    """With the start symbol, and with a BOS in its place; long prompts are read in parts."""
    model = make_ar(eos_id=5, bos_id=3, bos=bos)
    monkeypatch.setattr("blockdiffusion.sampling.engine.PREFILL_TOKENS", 8)
    wanted = [
        (prompt, options | {"bos": options["seed"] % 2 == 0})
        for prompt, options in requests(20, "autoregressive")
    ]
    finished = run_all(Engine(model, max_rows=5, max_tokens=41, window=window), wanted)
    assert sorted(finished) == list(range(20))
    for number, (prompt, options) in enumerate(wanted):
        assert finished[number].ids == alone(model, prompt, options, window)
    assert {event.reason for event in finished.values()} == {"eos", "length"}
