import pytest
import torch
from scipy import stats

from blockdiffusion.runtime.seeding import seeded
from blockdiffusion.sampling.streams import CHUNK, row_streams

FALSE_ALARM = 1e-4
ROWS = [[1, 2], [], [1, 2], [7] * 30, []]


def of(rows, seed=1, most=8):
    return row_streams(seeded(seed), rows, most)


def test_a_stream_depends_on_what_its_row_is_given():
    """And on how many rows before it are given the same; on nothing else in the batch."""
    numbers = of(ROWS).each(20)
    assert torch.equal(of(ROWS[::-1]).each(20)[1], numbers[3])
    assert torch.equal(of([[], []]).each(20), numbers[[1, 4]])
    assert len(set(numbers.flatten().tolist())) == numbers.numel()
    assert not torch.isin(of(ROWS, seed=2).each(20), numbers).any()


def test_the_same_generator_gives_new_streams_each_time():
    source = seeded(1)
    first, second = (row_streams(source, ROWS, 8).each(3) for _ in range(2))
    assert not torch.isin(first, second).any()


@pytest.mark.parametrize("size", [1, 3, 8, 100])
def test_numbers_are_the_same_however_many_rows_draw_with_it(size):
    """Over several chunks; the others draw more or less, or have left."""
    alone, streams = of([[7] * 30], most=size), of(ROWS, most=size)
    for step in range(3 * CHUNK // size):
        expected = alone.each(size)[0]
        others = torch.arange(5) if step % 3 else torch.tensor([1, 3])
        counts = torch.tensor([size if n == 3 else step % 2 for n in others])
        rows = others.repeat_interleave(counts)
        found = streams.at(rows)[rows == 3]
        assert torch.equal(found, expected)


def test_parts_of_a_batch_go_on_where_it_is():
    streams = of(ROWS)
    first = streams.each(2)
    part = streams.of(torch.tensor([2, 3]))
    second = part.each(2)
    again = of(ROWS)
    both = again.each(4)
    assert torch.equal(both[:, :2], first) and torch.equal(both[2:4, 2:], second)
    assert torch.equal(part.of(torch.tensor([1])).each(2), again.of(torch.tensor([3])).each(2))


def test_numbers_are_uniform_within_a_stream_and_across_streams():
    """Kolmogorov and Smirnov's test of 50,000 numbers, and of the correlation of neighbours (4.9
    standard errors); false alarms 1e-4."""
    rows = [[i] for i in range(500)]
    numbers = of(rows).each(100)
    assert stats.kstest(numbers.flatten(), "uniform").pvalue > FALSE_ALARM
    assert stats.kstest(numbers[:, 0], "uniform").pvalue > FALSE_ALARM
    for a, b in ((numbers[1:], numbers[:-1]), (numbers[:, 1:], numbers[:, :-1])):
        correlation = torch.corrcoef(torch.stack([a.flatten(), b.flatten()]))[0, 1]
        assert abs(correlation) < 4.9 / a.numel() ** 0.5


def test_no_row_no_number():
    streams = of(ROWS)
    assert len(streams.at(torch.zeros(0, dtype=torch.long))) == 0
    assert streams.of(torch.zeros(0, dtype=torch.long)).each(3).shape == (0, 3)
