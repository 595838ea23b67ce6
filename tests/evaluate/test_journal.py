"""A journal keeps finished results over a kill, and only under the same conditions."""

import pytest
import torch

from blockdiffusion.evaluate.journal import Journal, fingerprint
from blockdiffusion.studies.variance import table
from blockdiffusion.studies.variance.table import measure_variance
from tests.studies.variance.test_table import options_of, text_of


def test_results_survive_and_a_line_cut_short_does_not(tmp_path):
    path = tmp_path / "journal"
    first = Journal(path, "a")
    first.put("one", {"x": 1.5})
    first.put("two", [2])
    with open(path, "ab") as file:
        file.write(b'{"identity": "a", "name": "three", "resu')
    again = Journal(path, "a")
    assert (len(again), again.get("one"), again.get("two"), again.get("three")) == (
        2, {"x": 1.5}, [2], None,
    )  # fmt: skip
    again.put("three", 3)  # after the broken line
    assert Journal(path, "a").get("three") == 3
    assert len(Journal(path, "b")) == 0


def test_the_fingerprint_sees_weights_sizes_and_values(make_model, random_ids):
    model = make_model()
    base = fingerprint(model, random_ids(2, 8), 16)
    assert fingerprint(model, random_ids(2, 8), 16) == base
    assert fingerprint(model, random_ids(2, 8), 17) != base
    assert fingerprint(model, random_ids(2, 8).view(4, 4), 16) != base
    with torch.no_grad():
        model.output.bias[3] += 1e-9
    assert fingerprint(model, random_ids(2, 8), 16) != base


def test_an_interrupted_measurement_goes_on(make_model, random_ids, tmp_path, monkeypatch):
    model, text = make_model(), text_of(random_ids(4, 16))
    options, path = options_of("count", "complement"), tmp_path / "v.journal"
    whole = measure_variance(model, text, options)
    real, calls = table.batch_moments, []

    def interrupted(*args, **more):
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return real(*args, **more)

    monkeypatch.setattr(table, "batch_moments", interrupted)
    with pytest.raises(KeyboardInterrupt):
        measure_variance(model, text, options, journal=path)
    assert path.exists() and len(calls) == 4
    resumed = measure_variance(model, text, options, journal=path)
    assert len(calls) == 4 + 6 - 3  # three estimators on two batches, three were finished
    assert resumed.rows == whole.rows
