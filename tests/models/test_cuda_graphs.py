"""Recorded passes: each kind is recorded once, and what they compute is what passes compute.

A GPU's recordings are tested in test_gpu.py; here a recording runs its function again, with its
own copies of the inputs, so that all that must hold for both can be seen on a CPU.
"""

import pytest
import torch

import blockdiffusion
from blockdiffusion.models.cuda_graphs import Recorder
from tests.models.hugging_face import make_hugging_face
from tests.sampling.laws import seeded


class Rerun:
    """What a CUDA graph does, kernel by kernel: values come through the first inputs' memory."""

    made = 0

    def __init__(self, function, inputs):
        type(self).made += 1
        self.function, self.inputs = function, tuple(x.clone() for x in inputs)

    def __call__(self, *inputs):
        for mine, given in zip(self.inputs, inputs, strict=True):
            mine.copy_(given)
        return self.function(*self.inputs)


@pytest.fixture
def recorded(monkeypatch):
    """Makes a model record its passes, by `Rerun`."""
    monkeypatch.setattr(Rerun, "made", 0)
    monkeypatch.setattr(
        "blockdiffusion.models.block_diffusion.Recorder", lambda: Recorder(record=Rerun)
    )

    def make(model):
        model.records_passes = True
        return model

    return make


def negated(x):
    return (-x,)


def test_a_kind_is_recorded_when_it_comes_again():
    calls = []
    recorder = Recorder(record=Rerun)
    Rerun.made = 0
    for value in (1.0, 2.0, 3.0):
        given = torch.tensor([value])
        (out,) = recorder.run("kind", lambda x: (calls.append(float(x)) or 2 * x,), (given,))
        assert float(out) == 2 * value
    assert calls == [1.0, 2.0, 3.0] and Rerun.made == 1
    recorder.run("another", negated, (torch.ones(2),))
    assert Rerun.made == 1
    recorder.forget()
    recorder.run("kind", negated, (torch.ones(1),))
    assert Rerun.made == 1


def test_the_kinds_that_came_last_are_remembered():
    """Old ones make place for new ones, however many there are."""
    recorder = Recorder(record=Rerun, most=2)
    Rerun.made = 0
    for kind in range(20):
        for _ in range(3):
            (out,) = recorder.run(kind, negated, (torch.ones(1),))
            assert float(out) == -1
    assert Rerun.made == 20
    recorder.run(19, negated, (torch.ones(1),))
    assert Rerun.made == 20
    recorder.run(0, negated, (torch.ones(1),))  # its recording is gone, and it comes for the first
    assert Rerun.made == 20  # time again


def test_where_the_storage_moves_recordings_wait():
    recorder = Recorder(record=Rerun)
    Rerun.made, passes = 0, []
    for moves in range(1, 7):
        recorder.forget()
        while Rerun.made < moves:
            recorder.run("kind", negated, (torch.ones(1),))
            passes.append(moves)
    assert [passes.count(moves) for moves in range(1, 7)] == [3, 5, 9, 17, 17, 17]


def test_threads_do_not_mix_their_passes():
    """Each puts its inputs in place and gets what was made of them."""
    from concurrent.futures import ThreadPoolExecutor

    recorder = Recorder(record=Rerun)

    def many(value):
        given = torch.full((100,), float(value))
        return all(
            bool((recorder.run("kind", negated, (given,))[0] == -value).all()) for _ in range(200)
        )

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(many, range(4)))


OPTIONS = [
    dict(),
    dict(window=8),
    dict(sampler="ancestral", steps=3),
    dict(sampler="confidence", threshold=0.3),
    dict(sampler="remask", steps=5),
    dict(eos=True),
]


@pytest.mark.parametrize("options", OPTIONS)
def test_recorded_passes_sample_the_same(make_model, recorded, options):
    """Rows of several lengths that end at different times, with a ring for a cache, too."""
    texts = []
    for prepare in (lambda model: model, recorded):
        model = prepare(make_model(eos_id=3))
        result = blockdiffusion.generate(
            model,
            [[1, 2, 3], [], [5, 6, 7, 8, 9]],
            2,
            max_new_tokens=29,
            generator=seeded(),
            optimize=False,
            **{"eos": False, **options},
        )
        texts.append((result.sequences, result.nfe))
    assert torch.equal(texts[0][0], texts[1][0]) and torch.equal(texts[0][1], texts[1][1])
    assert Rerun.made > 1


@pytest.mark.parametrize("options", [dict(), dict(window=8), dict(sampler="ancestral", steps=2)])
def test_so_do_networks_that_predict_the_next_token(recorded, options):
    """The cache keeps the state of the last committed token, from memory that passes overwrite."""
    found = [
        blockdiffusion.generate(
            prepare(make_hugging_face("llama", reading="shifted", eos_id=None)),
            [[1, 2, 3], [], [5, 6, 7, 8, 9]], max_new_tokens=20,
            generator=seeded(), optimize=False, **options,
        )
        for prepare in (lambda model: model, recorded)
    ]  # fmt: skip
    assert torch.equal(found[0].sequences, found[1].sequences)
    assert Rerun.made > 1


def test_so_do_networks_that_read_the_time(make_model, recorded):
    found = [
        blockdiffusion.generate(
            prepare(make_model(time_conditioning=True)), [[], [1]], max_new_tokens=20,
            generator=seeded(), eos=False, optimize=False,
        ).sequences
        for prepare in (lambda model: model, recorded)
    ]  # fmt: skip
    assert torch.equal(*found) and Rerun.made > 1


def test_passes_over_a_longer_cache_are_of_another_kind(make_model, recorded, monkeypatch):
    """A pass reads a multiple of so many slots, and no more than there are."""
    monkeypatch.setattr("blockdiffusion.models.cache.SLOTS", 8)
    model = recorded(make_model())
    result = blockdiffusion.generate(
        model, max_new_tokens=22, generator=seeded(), eos=False, optimize=False
    )
    expected = blockdiffusion.generate(
        make_model(), max_new_tokens=22, generator=seeded(), eos=False, optimize=False
    )
    assert torch.equal(result.sequences, expected.sequences)
    # Two kinds (with and without the block before) for 8, 16 and 24 slots; the first block's alone
    # has no block before it.
    assert Rerun.made == 5


def test_so_does_the_autoregressive_baseline(make_ar, recorded):
    found = [
        blockdiffusion.generate(
            prepare(make_ar()),
            [[], [1, 2]],
            max_new_tokens=12,
            generator=seeded(),
            eos=False,
            optimize=False,
        ).sequences
        for prepare in (lambda model: model, recorded)
    ]
    assert torch.equal(*found) and Rerun.made == 1


def test_a_sampling_copy_records_on_gpus_only(make_model):
    from blockdiffusion.models.inference import optimize_for_inference

    assert not optimize_for_inference(make_model()).records_passes
