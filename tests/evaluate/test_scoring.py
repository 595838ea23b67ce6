import dataclasses

import numpy as np
import pytest
import torch

from blockdiffusion.evaluate import scoring
from blockdiffusion.evaluate.journal import Journal
from blockdiffusion.evaluate.likelihood import data_error, likelihood
from blockdiffusion.evaluate.options import LikelihoodOptions
from blockdiffusion.evaluate.scoring import score
from blockdiffusion.evaluate.windows import Window


def windows_of(ids_BL, given=0):
    return [Window(ids=row, given=given, unit=unit) for unit, row in enumerate(ids_BL.numpy())]


@pytest.mark.parametrize("estimator", ["exact", "orders", "complement"])
def test_chunks_together_are_the_likelihood_of_all_rows(
    make_model, random_ids, monkeypatch, estimator
):
    model, ids = make_model(), random_ids(10, 16)
    options = LikelihoodOptions(estimator=estimator, mc_samples=4, orders=2)
    monkeypatch.setattr(scoring, "CHUNK_TOKENS", 48)  # three rows
    found = score(model, windows_of(ids), options, bos=False, num_bytes=400)
    whole = likelihood(model, ids, "exact", num_bytes=400)
    assert (found.num_tokens, found.num_rows, found.estimator) == (160, 10, estimator)
    # Draws within 4 standard errors of their noise (false alarm 6e-5); enumeration exactly.
    tolerance = 4 * found.stderr_noise + 1e-9
    assert abs(found.nats_per_token - whole.nats_per_token) < tolerance
    assert found.stderr_data == pytest.approx(whole.stderr_data, rel=0.5)
    if estimator == "exact":
        assert torch.allclose(found.nats_per_row, whole.nats_per_row)
        assert found.exact_nats_per_token == pytest.approx(whole.exact_nats_per_token)
        assert found.exact_bits_per_byte == pytest.approx(whole.exact_bits_per_byte)
        assert found.exact_stderr_data == pytest.approx(whole.exact_stderr_data)
    if estimator == "orders":
        assert found.order_bounds[1] == pytest.approx(found.nats_per_token)
        assert found.order_bounds[2] == pytest.approx(found.orders_nats_per_token)
        noise = found.order_bounds_stderr_noise
        assert noise == pytest.approx({1: found.stderr_noise, 2: found.orders_stderr_noise})
        assert whole.exact_nats_per_token < found.orders_nats_per_token < found.nats_per_token


def test_noise_of_chunks_adds_in_squares(make_model, random_ids, monkeypatch):
    """The stated error of 2 chunks is that of the parts, which are independent."""
    model, ids = make_model(), random_ids(6, 16)
    monkeypatch.setattr(scoring, "CHUNK_TOKENS", 64)  # four rows, two rows
    parts = []
    real = likelihood

    def spy(*args, **options):
        parts.append(real(*args, **options))
        return parts[-1]

    monkeypatch.setattr(scoring, "likelihood", spy)
    found = score(model, windows_of(ids), LikelihoodOptions(estimator="count"), bos=False)
    assert [part.num_tokens for part in parts] == [64, 32]
    expected = np.hypot(64 * parts[0].stderr_noise, 32 * parts[1].stderr_noise) / 96
    assert found.stderr_noise == pytest.approx(expected)
    assert parts[0].nats_per_row[0] != parts[1].nats_per_row[0]


def test_a_target_of_the_noise_is_that_of_all_chunks(make_model, random_ids, monkeypatch):
    monkeypatch.setattr(scoring, "CHUNK_TOKENS", 64)
    model, windows = make_model(), windows_of(random_ids(16, 16))
    loose = score(model, windows, LikelihoodOptions(estimator="count", mc_samples=4), bos=False)
    target = loose.stderr_noise / 2
    options = LikelihoodOptions(estimator="count", mc_samples=4, target_stderr=target)
    found = score(model, windows, options, bos=False)
    assert found.stderr_noise <= target and found.samples < 4 * 40
    assert found.target_stderr == target and not found.remarks


def test_a_target_out_of_reach_is_that_of_all_chunks(make_model, random_ids, monkeypatch):
    monkeypatch.setattr(scoring, "CHUNK_TOKENS", 64)
    monkeypatch.setattr("blockdiffusion.evaluate.replicates.MAX_SAMPLES", 8)
    options = LikelihoodOptions(estimator="count", mc_samples=4, target_stderr=1e-9)
    found = score(make_model(), windows_of(random_ids(8, 16)), options, bos=False)
    (remark,) = found.remarks
    assert f"error is {found.stderr_noise:.2g} after 8" in remark and "target of 1e-09" in remark


def test_units_are_what_the_data_error_counts(make_model, random_ids):
    model, ids = make_model(), random_ids(6, 16)
    windows = [
        Window(ids=row, given=4 * (n % 3 > 0), unit=n // 3) for n, row in enumerate(ids.numpy())
    ]
    found = score(model, windows, LikelihoodOptions(estimator="exact"), bos=False)
    assert found.num_rows == 2 and found.num_tokens == 2 * (16 + 12 + 12)
    assert found.stderr_data == data_error(found.nats_per_row, torch.tensor([40, 40]))


@pytest.mark.parametrize("estimator", ["exact", "orders", "complement"])
def test_a_killed_measurement_goes_on_bit_for_bit(
    make_model, random_ids, tmp_path, monkeypatch, estimator
):
    model, windows = make_model(), windows_of(random_ids(9, 16))
    options = LikelihoodOptions(estimator=estimator, mc_samples=3, orders=2)
    monkeypatch.setattr(scoring, "CHUNK_TOKENS", 48)
    whole = score(model, windows, options, bos=False, name="a")
    calls, real = [], likelihood

    def interrupted(*args, **more):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(*args, **more)

    monkeypatch.setattr(scoring, "likelihood", interrupted)
    journal = Journal(tmp_path / "journal", "x")
    with pytest.raises(KeyboardInterrupt):
        score(model, windows, options, bos=False, name="a", journal=journal)
    done = []
    resumed = score(
        model, windows, options, bos=False, name="a", journal=Journal(tmp_path / "journal", "x"),
        progress=lambda *state: done.append(state),
    )  # fmt: skip
    assert len(calls) == 4  # two were finished, the third began again
    assert done[:2] == [(3, 9), (6, 9)] and done[-1] == (9, 9)
    for field in dataclasses.fields(whole):
        value, again = getattr(whole, field.name), getattr(resumed, field.name)
        if isinstance(value, torch.Tensor):
            assert torch.equal(value, again), field.name
        elif field.name != "seconds":
            assert value == again, field.name
    other = windows_of(random_ids(9, 16, seed=1))  # other text under the same name is not taken
    score(model, other, options, bos=False, name="a", journal=Journal(tmp_path / "journal", "x"))
    assert len(calls) == 7
