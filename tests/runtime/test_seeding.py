import hashlib

import numpy as np
import pytest
import torch

import blockdiffusion
from blockdiffusion.errors import UserError
from blockdiffusion.runtime.seeding import derive_seed, fresh_seed, generator, seed_global, seeded


def numbers(source, count=5):
    return torch.rand(count, generator=source, dtype=torch.float64).tolist()


def test_streams_are_stable_and_distinct():
    assert derive_seed(0, "dropout", 3) == derive_seed(0, "dropout", 3)
    names = [(0, "a", 1), (0, "a", 2), (0, "b", 1), (1, "a", 1), (0, "a", "1"), (0, "a1")]
    assert len({derive_seed(seed, *rest) for seed, *rest in names}) == len(names)
    assert len({tuple(numbers(generator(seed, *rest))) for seed, *rest in names}) == len(names)
    assert all(0 <= derive_seed(s, "x") < 2**63 for s in range(100))


def test_the_value_is_fixed_across_versions():
    """A changed derivation would silently change every resumed run."""
    assert derive_seed(0, "corruption", 0) == FIXED
    assert int(torch.randint(2**31, (), generator=seeded(1))) == FIRST
    assert int(torch.randint(2**31, (), generator=generator(0, "corruption", 0))) == NAMED


def test_generators_start_afresh():
    assert numbers(generator(1, "x")) == numbers(generator(1, "x"))


def test_a_generator_is_a_mersenne_twister_with_the_whole_state_of_its_name():
    """NumPy's, given the same 624 words, gives the same bits."""
    words = np.frombuffer(hashlib.shake_256(b"seed 7").digest(4 * 624), dtype="<u4")
    twister = np.random.MT19937()
    twister.state = {"bit_generator": "MT19937", "state": {"key": words.copy(), "pos": 624}}
    raw = twister.random_raw(3000)
    found = torch.randint(2**31, (1500,), generator=seeded(7))
    # PyTorch draws 64 bits at a time, the upper half first, and takes the remainder.
    assert found.tolist() == (raw[1::2] % 2**31).tolist()


@pytest.mark.parametrize("bit", range(64))
def test_every_bit_of_a_seed_counts(bit):
    assert numbers(seeded(7)) != numbers(seeded(7 ^ (1 << bit)))


def test_named_streams_whose_seeds_share_32_bits_differ():
    """Steps 19,258 and 122,681 are a pair that shares the lowest 32 bits of its derived seeds."""
    steps = 19_258, 122_681
    first, second = (derive_seed(0, "corruption", step) & 0xFFFFFFFF for step in steps)
    assert first == second
    assert numbers(generator(0, "corruption", steps[0])) != numbers(
        generator(0, "corruption", steps[1])
    )


def test_samples_of_seeds_that_share_32_bits_differ(make_model):
    first, second = (
        blockdiffusion.generate(make_model(), num_samples=5, max_new_tokens=8, generator=seeded(s))
        for s in (7, 7 + 2**32)
    )
    assert not torch.equal(first.sequences, second.sequences)


def test_pytorchs_own_streams_are_seeded_as_widely():
    """Dropout and initial weights draw from them."""
    with torch.random.fork_rng(devices=[]):
        seed_global(0, "corruption", 19_258)
        first = torch.rand(5, dtype=torch.float64).tolist()
        assert first == numbers(generator(0, "corruption", 19_258))
        seed_global(0, "corruption", 122_681)
        assert torch.rand(5, dtype=torch.float64).tolist() != first


def test_fresh_seeds_differ():
    assert len({fresh_seed() for _ in range(100)}) == 100
    seeded(fresh_seed())


@pytest.mark.parametrize("seed", [-1, 2**64, 1.0, "7", True, None])
def test_what_is_no_seed_is_refused(seed):
    with pytest.raises(UserError, match="seed"):
        seeded(seed)


FIXED = 7066807031520144742
FIRST, NAMED = 1600222026, 1012544260
