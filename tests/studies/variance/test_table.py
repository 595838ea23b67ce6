"""The table of variances: against moments computed one by one, its errors, and its picture."""

import json
import math

import pytest
import torch

from blockdiffusion.data.loader import Batch
from blockdiffusion.diffusion.estimators import Bernoulli, Count, make_estimator
from blockdiffusion.diffusion.variance import batch_moments
from blockdiffusion.errors import UserError
from blockdiffusion.evaluate.likelihood import likelihood
from blockdiffusion.evaluate.prepared import HeldOutText
from blockdiffusion.reports.numbers import scientific
from blockdiffusion.reports.plots import ACCENT, WARM, svg, variance_figure
from blockdiffusion.reports.plots import PAPER as GROUND
from blockdiffusion.runtime.seeding import generator
from blockdiffusion.studies.options import DEFAULT_ESTIMATORS
from blockdiffusion.studies.variance.listing import variance_lines
from blockdiffusion.studies.variance.table import (
    EXACT,
    PAPER,
    VarianceOptions,
    measure_variance,
    parameter_group,
)
from tests.hostile import HOSTILE, check_picture


def text_of(ids, valid=None, bos=False):
    return HeldOutText(Batch(ids, valid), 0.0, bos)


def options_of(*estimators, **changes):
    small = dict(block_sizes=(4,), batch_size=2, batches=2, replicates=3)
    return VarianceOptions(estimators=estimators, **{**small, **changes})


def row_of(table, label, size=4):
    return next(row for row in table.at(size) if row.label == label)


def test_rows_are_the_moments_of_every_batch(make_model, random_ids):
    """Each number again from `batch_moments`, with padding and a given BOS."""
    model, ids = make_model(), random_ids(4, 16)
    valid = torch.ones_like(ids, dtype=torch.bool)
    valid[3, 9:] = False
    table = measure_variance(model, text_of(ids, valid, bos=True), options_of("countx2", seed=5))
    free = valid.clone()
    free[:, 0] = False
    for label, law in ((PAPER, Bernoulli(stratify="batch")), ("countx2", Count(num_noisy=2))):
        row = row_of(table, label)
        moments = [
            batch_moments(
                model, ids[i : i + 2], free[i : i + 2], valid[i : i + 2], law, 3,
                generator(5, "variance", i // 2), gradients=True,
            )
            for i in (0, 2)
        ]  # fmt: skip
        traces = [sum(m.gradient_variance.values()) for m in moments]
        variances = [m.loss_variance for m in moments]
        assert row.loss.value == pytest.approx(sum(m.loss for m in moments) / 2)
        assert row.loss.stderr == pytest.approx(math.sqrt(sum(variances) / 3) / 2)
        assert row.loss_variance.value == pytest.approx(sum(variances) / 2)
        assert row.loss_variance.stderr == pytest.approx(abs(variances[0] - variances[1]) / 2)
        assert row.gradient_variance.value == pytest.approx(sum(traces) / 2)
        assert sum(g.value for g in row.groups.values()) == pytest.approx(sum(traces) / 2)
        squares = sum(sum(m.gradient_square.values()) for m in moments)
        assert row.signal_to_noise.value == pytest.approx(squares / sum(traces))
        blocks = [m.block_variance for m in moments]
        assert row.block_variance.value == pytest.approx(sum(blocks) / 2)
    assert table.num_tokens == 4 * 15 - 7 and table.bos


def test_equal_compute_and_gains(make_model, random_ids):
    """N copies cost (N + 1) / 2 passes, and N where one block leaves no clean stream."""
    table = measure_variance(
        make_model(), text_of(random_ids(4, 16)), options_of("countx4", block_sizes=(4, 16))
    )
    for size, cost in ((4, 2.5), (16, 4.0)):
        paper, row = table.at(size)
        assert paper.label == PAPER and paper.cost == 1 and row.cost == cost
        for name in ("loss", "gradient"):
            variance, gain = getattr(row, f"{name}_variance"), getattr(row, f"{name}_gain")
            assert gain.value == pytest.approx(
                getattr(paper, f"{name}_variance").value / variance.value
            )
            equal = row.at_equal_compute(f"{name}_variance")
            assert equal.value == pytest.approx(cost * variance.value)
            assert equal.stderr == pytest.approx(cost * variance.stderr)
            assert row.at_equal_compute(f"{name}_gain").value == pytest.approx(gain.value / cost)
        assert (paper.loss_gain.value, paper.loss_gain.stderr) == (1, 0)


def test_the_bias_of_a_clip_is_found_and_no_other(tiny_law, tiny_law_expected):
    """Against enumeration: unbiased estimators lie within 4.5 of their errors of the exact bound
    (4 batches of 32 replicates, each over 24 blocks: false alarm 1e-5 each), the clipped one does
    not, and its bias is that of its objective, here from another law of masks and another seed."""
    model, clip = tiny_law.double(), "bernoulli[0.8,1]"
    ids = tiny_law_expected["sequences"][::5][:48]
    table = measure_variance(
        model,
        text_of(ids),
        options_of(
            "count", "complement", clip,
            block_sizes=(2,), batch_size=12, batches=4, replicates=32, gradients=False,
        ),
    )  # fmt: skip
    exact = float(tiny_law_expected["exact_nelbo"][::5][:48].sum()) / ids.numel()
    assert table.references == {2: EXACT}
    assert table.exact[2] == pytest.approx(exact, abs=1e-6)
    for label in ("count", "complement"):
        row = row_of(table, label, 2)
        assert row.is_bound and row.bias is None
        assert row.difference.value == pytest.approx(row.loss.value - exact, abs=1e-6)
        assert row.difference.stderr == row.loss.stderr
        assert abs(row.difference.value) < 4.5 * row.difference.stderr
    lines = variance_lines(table, "model on data")
    assert f"S = 2 (the model's): exact bound {exact:.4f}" in lines
    sign = row_of(table, "count", 2).difference
    shown = f"bound, {sign.value / sign.stderr:+.1f}σ"
    assert any(line.startswith("  count ") and shown in line for line in lines)
    clipped = row_of(table, clip, 2)
    assert not clipped.is_bound and abs(clipped.bias.value) > 6 * clipped.bias.stderr
    free = torch.ones_like(ids, dtype=torch.bool)
    other = make_estimator("count[0.8,1]x8")
    many = batch_moments(model, ids, free, None, other, 100, generator(1, "x"))
    error = math.hypot(clipped.bias.stderr, math.sqrt(many.loss_variance / 100))
    assert abs(clipped.bias.value - (many.loss - exact)) < 4.5 * error


def test_without_an_unbiased_estimator_but_the_papers(make_model, random_ids):
    """Beyond S = 8 differences are paired, draw by draw, with the best unbiased estimator."""
    options = options_of("count[0.3,0.8]", block_sizes=(16,))
    table = measure_variance(make_model(), text_of(random_ids(4, 16)), options)
    assert table.references == {16: PAPER} and not table.exact
    row = row_of(table, "count[0.3,0.8]", 16)
    assert row.bias is not None and row.t_min is None
    paper = row_of(table, PAPER, 16)
    assert paper.t_min == 1e-3 and paper.difference is None
    assert row.bias.value == pytest.approx(row.loss.value - paper.loss.value)


def test_single_tokens_have_no_noise(make_model, random_ids):
    """S = 1: whatever masks everything has variance 0, and a pair becomes one copy, with a note."""
    table = measure_variance(
        make_model(),
        text_of(random_ids(4, 16)),
        options_of("bernoulli[1,1]", "count", "complement", block_sizes=(1,)),
    )
    for label in ("bernoulli[1,1]", "count", "complement"):
        row = row_of(table, label, 1)
        assert row.loss_variance.value == 0 and row.gradient_variance.value == 0
        assert row.loss.stderr == 0 and row.loss_gain is None and row.cost == 1
    assert row_of(table, "bernoulli[1,1]", 1).bias.value == pytest.approx(0, abs=1e-6)
    pair = row_of(table, "complement", 1)
    assert pair.estimator == "count" and "one is used" in pair.note
    lines = variance_lines(table, "model on data")
    assert sum(" ∞" in line for line in lines) == 6
    axes = variance_figure(table, "model on data").axes
    assert [[text.get_text() for text in one.texts] for one in axes] == 2 * [
        ["0 (clipped)", "0", "0"]
    ]


def test_what_does_not_exist_at_a_block_size_is_left_out(make_model, random_ids):
    model, text = make_model(), text_of(random_ids(4, 16))
    table = measure_variance(model, text, options_of("resampled[0.3,0.8]", block_sizes=(1, 4)))
    assert [(s, label) for s, label, _ in table.left_out] == [(1, "resampled[0.3,0.8]")]
    assert len(table.at(1)) == 1 and len(table.at(4)) == 2
    with pytest.raises(UserError, match="out of 1 has its share"):
        measure_variance(model, text, options_of("resampled[0.3,0.8]", block_sizes=(1,)))


@pytest.mark.parametrize("objective", ["block_diffusion", "score_entropy"])
def test_a_network_that_reads_the_time(make_model, random_ids, objective):
    """Nothing is enumerated, clips are those of `bernoulli`; means within 4.5 of their errors of
    those of `likelihood` with many draws (false alarm 1e-5 each; the cut is below the noise)."""
    model, ids = make_model(objective=objective, time_conditioning=True), random_ids(8, 16)
    specs = ("bernoulli:cosine", "count", "complement", "bernoulli[0.3,0.8]", "count[0.3,0.8]")
    options = options_of(*specs, block_sizes=(1, 4), batch_size=4, replicates=12, gradients=False)
    table = measure_variance(model, text_of(ids), options)
    assert [(s, spec) for s, spec, _ in table.left_out] == [(1, specs[-1]), (4, specs[-1])]
    assert not table.exact and set(table.references.values()) <= {"count", "complement"}
    many = likelihood(model, ids, "complement", mc_samples=40)
    for label in specs[:3]:
        row = row_of(table, label)
        error = math.hypot(row.loss.stderr, many.stderr_noise)
        assert row.is_bound and abs(row.loss.value - many.nats_per_token) < 4.5 * error
    assert row_of(table, "count", 1).loss_variance.value > 0  # of the times
    assert row_of(table, "complement").loss_gain.value > 4
    assert "left out: count[0.3,0.8] draws" in " ".join(variance_lines(table, "model on data"))


def test_the_prior_is_part_of_the_bound(make_model, random_ids):
    """As in `likelihood`, within 4.5 errors of the masks (false alarm 1e-5)."""
    model = make_model(objective="score_entropy", time_conditioning=True, noise_eps=0.3)
    ids, options = random_ids(8, 16), dict(batch_size=4, replicates=60, gradients=False)
    table = measure_variance(model, text_of(ids), options_of("bernoulli", "count", **options))
    assert [label for _, label, _ in table.left_out] == ["count"]
    row, many = row_of(table, "bernoulli"), likelihood(model, ids, "bernoulli", mc_samples=200)
    error = math.hypot(row.loss.stderr, many.stderr_noise)
    assert abs(row.loss.value - many.nats_per_token) < 4.5 * error < 0.3 * math.log(12) / 2


def test_the_model_is_left_as_it_was(make_model, random_ids, monkeypatch):
    model = make_model().train()
    measure_variance(model, text_of(random_ids(4, 16)), options_of("count", block_sizes=(1, 8)))
    assert model.config.block_size == 4 and model.training
    assert all(p.grad is None for p in model.parameters())

    def broken(*_):
        raise RuntimeError("the network broke")

    monkeypatch.setattr(model, "head", broken)
    with pytest.raises(RuntimeError, match="broke"):
        measure_variance(model, text_of(random_ids(4, 16)), options_of("count", block_sizes=(8,)))
    assert model.config.block_size == 4 and model.training


def test_the_same_seed_gives_the_same_table_and_order_does_not_matter(make_model, random_ids):
    model, text = make_model(), text_of(random_ids(4, 16))
    one = measure_variance(model, text, options_of("count", "complement"))
    two = measure_variance(model, text, options_of("complement", "count"))
    other = measure_variance(model, text, options_of("count", seed=1))
    assert row_of(one, "count") == row_of(two, "count")
    assert [row.label for row in two.rows] == [PAPER, "complement", "count"]
    assert row_of(one, "count").loss != row_of(other, "count").loss


def test_every_parameter_has_a_group(make_model):
    names = dict(make_model().backbone.named_parameters())
    groups = {name: parameter_group(name) for name in names}
    assert set(groups.values()) == {
        "embedding", "attention", "mlp", "norms and modulation", "output",
    }  # fmt: skip
    expected = {
        "embedding.weight": "embedding", "layers.1.attn_qkv.weight": "attention",
        "layers.0.mlp_out.bias": "mlp", "layers.0.mlp_norm.weight": "norms and modulation",
        "layers.0.modulation.bias": "norms and modulation", "output.weight": "output",
        "time.linear_in.weight": "norms and modulation",
        "final_modulation.weight": "norms and modulation",
    }  # fmt: skip
    assert {name: groups[name] for name in expected} == expected
    assert parameter_group("wte.weight") == "other"


def test_the_default_list_is_written_as_text_json_and_picture(make_model, random_ids):
    table = measure_variance(
        make_model(num_hidden_layers=1),
        text_of(random_ids(2, 16)),
        options_of(*DEFAULT_ESTIMATORS, block_sizes=(1, 4), batch_size=1, replicates=2),
    )
    values = json.loads(json.dumps(table.to_dict()))
    assert len(values["rows"]) == len(table.rows) == 2 * (len(DEFAULT_ESTIMATORS) + 1) - 1
    row = next(row for row in reversed(values["rows"]) if row["label"] == "countx4")
    assert row["cost"] == 2.5
    assert row["loss_variance_equal_compute"]["value"] == 2.5 * row["loss_variance"]["value"]
    lines = variance_lines(table, "model on data")
    assert max(map(len, lines)) <= 100
    for row in table.rows:
        assert any(f"  {row.label} " in line and scientific(row.loss_variance.value) in line
                   for line in lines)  # fmt: skip
    figure = variance_figure(table, "a <model> & its data")
    assert "a &lt;model&gt; &amp; its data" in svg(figure)
    assert svg(figure) == svg(variance_figure(table, "a <model> & its data"))
    titles = [figure.axes[band].get_title("left") for band in (0, 2)]
    assert titles == ["S = 1", "S = 4 (the model's)"]
    for band, axes in enumerate(figure.axes):
        rows, kind = table.at((1, 4)[band // 2]), ("loss", "gradient")[band % 2]
        drawn = [row for row in rows if getattr(row, f"{kind}_variance").value > 0]
        markers = [bar.lines[0] for bar in axes.containers]
        filled = [marker.get_markerfacecolor() != GROUND for marker in markers]
        assert filled == [row.is_bound for row in drawn]
        colours = [marker.get_color() for marker in markers]
        assert colours == [WARM if row.label == PAPER else ACCENT for row in drawn]
        labels = [label.get_text() for label in figure.axes[band - band % 2].get_yticklabels()]
        assert labels == [row.label for row in rows]


def test_dots_stand_at_their_values_with_their_errors(make_model, random_ids):
    table = measure_variance(make_model(), text_of(random_ids(4, 16)),
                             options_of("count", "countx4", "complement"))  # fmt: skip
    for kind, axes in zip(("loss", "gradient"), variance_figure(table, "x").axes, strict=True):
        assert axes.get_xscale() == "log"
        assert len(axes.containers) == len(table.rows) == 4
        for y, (row, bar) in enumerate(zip(table.rows, axes.containers, strict=True)):
            found = row.at_equal_compute(f"{kind}_variance")
            assert bar.lines[0].get_xydata().tolist() == [[found.value, y]]
            low, high = bar.lines[2][0].get_segments()[0][:, 0]
            assert high == pytest.approx(found.value + found.stderr)
            assert low == pytest.approx(max(found.value - found.stderr, found.value / 3))


def test_one_batch_has_no_errors_over_batches(make_model, random_ids):
    table = measure_variance(
        make_model(), text_of(random_ids(2, 16)), options_of("count", batches=1)
    )
    row = row_of(table, "count")
    assert row.loss_variance.stderr is None and row.loss_gain.stderr is None
    assert row.loss.stderr > 0
    assert "±" not in variance_lines(table, "x")[5].split("bound")[1]
    figure = variance_figure(table, HOSTILE)
    check_picture(svg(figure))
    assert [len(axes.containers) for axes in figure.axes] == [2, 2]


def test_progress_reaches_the_total(make_model, random_ids):
    calls = []
    measure_variance(make_model(), text_of(random_ids(4, 16)), options_of("count", "countx4"),
                     lambda *call: calls.append(call))  # fmt: skip
    assert calls[-1] == (f"S = 4 {EXACT}", 22, 22)
    assert [done for _, done, _ in calls] == sorted(done for _, done, _ in calls)


@pytest.mark.parametrize(("changes", "message"), [
    (dict(estimators=()), "nothing to measure"),
    (dict(block_sizes=()), "nothing to measure"),
    (dict(block_sizes=(0,)), "a block size is 0; it must be at least 1"),
    (dict(estimators=("best",)), "unknown estimator"),
    (dict(batch_size=0), "batch_size is 0"),
    (dict(batches=0), "batches is 0"),
    (dict(replicates=1), "at least 2"),
])  # fmt: skip
def test_bad_options_are_refused(changes, message):
    with pytest.raises(UserError, match=message):
        VarianceOptions(**changes)


def test_bad_input_is_refused(make_model, random_ids):
    text = text_of(random_ids(4, 16))
    with pytest.raises(UserError, match="does not divide the 16 tokens"):
        measure_variance(make_model(), text, options_of("count", block_sizes=(5,)))
    with pytest.raises(UserError, match="split has 4"):
        measure_variance(make_model(), text, options_of("count", batches=3))
    timed = dict(time_conditioning=True)
    with pytest.raises(UserError, match=r"10 steps \(D3PM\) has one estimator, timesteps"):
        measure_variance(
            make_model(objective="d3pm", timesteps=10, **timed), text, options_of("count")
        )
    with pytest.raises(UserError, match="with a clip take bernoulli"):
        measure_variance(make_model(**timed), text, options_of("count[0.3,0.8]"))
