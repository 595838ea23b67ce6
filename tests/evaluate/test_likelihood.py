import math

import pytest
import torch

import blockdiffusion
import blockdiffusion.evaluate.replicates as replicates
from blockdiffusion.diffusion.denoiser import causal_nll
from blockdiffusion.diffusion.exact import exact_blocks
from blockdiffusion.errors import UserError
from blockdiffusion.evaluate.listing import likelihood_lines

T_MIN = 1e-3


def test_exact_equals_the_golden_values(tiny_law, tiny_law_expected):
    result = blockdiffusion.likelihood(
        tiny_law.double(), tiny_law_expected["sequences"], "exact", bos=False
    )
    assert (result.nats_per_row - tiny_law_expected["exact_nelbo"]).abs().max() < 1e-5
    exact = -tiny_law_expected["probabilities"].log()
    assert (result.exact_nats_per_row - exact).abs().max() < 1e-5
    assert result.num_tokens == 1024 and result.stderr_noise == 0 and result.is_bound
    assert result.nats_per_token == pytest.approx(float(result.nats_per_row.sum()) / 1024)
    assert result.exact_nats_per_token == pytest.approx(float(exact.mean()) / 4, abs=1e-6)
    assert result.perplexity == math.exp(result.nats_per_token)


def cut_values(model, clean):
    """What Bernoulli with a cut expects, per row: the exact value without what is cut.

    Each mask set of size k of a block of n then weighs the integral of t^(k-1) (1-t)^(n-k) over
    [t_min, 1], in place of 1 / (k C(n, k)).
    """
    size = model.config.block_size
    t = T_MIN + (1 - T_MIN) * (torch.arange(200_000).double() + 0.5) / 200_000
    total = torch.zeros(len(clean), dtype=torch.float64)
    for subset in range(1, 2**size):
        members = [i for i in range(size) if subset >> i & 1]
        weight = (t ** (len(members) - 1) * (1 - t) ** (size - len(members))).mean()
        weight *= 1 - T_MIN
        masked = torch.tensor([i in members for i in range(size)]).repeat(clean.shape[1] // size)
        noisy = clean.masked_fill(masked, model.config.mask_id)
        with torch.no_grad():
            logits = model.denoise_logits(noisy, clean)
        logits[..., model.config.mask_id] = -math.inf
        nll = -logits.log_softmax(-1).gather(-1, clean[..., None])[..., 0]
        total += weight * (nll * masked).sum(1)
    return total


def test_bernoulli_agrees_with_the_exact_value(tiny_law, tiny_law_expected):
    """Within 4 standard errors of its noise (false alarm 6e-5), at a noise below 0.5 %."""
    model, clean = tiny_law.double(), tiny_law_expected["sequences"]
    result = blockdiffusion.likelihood(
        model,
        clean,
        "bernoulli",
        mc_samples=600,
        bos=False,
        generator=torch.Generator().manual_seed(0),
    )
    expected = float(cut_values(model, clean).sum()) / clean.numel()
    exact = float(tiny_law_expected["exact_nelbo"].sum()) / clean.numel()
    assert result.stderr_noise / result.nats_per_token < 0.005
    assert abs(result.nats_per_token - expected) < 4 * result.stderr_noise
    assert abs(expected / exact - 1) < 2e-3  # the cut's own bias is small, and known
    assert result.t_min == T_MIN and result.exact_nats_per_token is None


@pytest.mark.parametrize(
    ("estimator", "noise"),
    [("count", 0.004), ("complement", 0.004), ("countx4", 0.004), ("bernoulli:cosine", 0.02)],
)
def test_every_unbiased_estimator_agrees_with_the_exact_value(
    tiny_law, tiny_law_expected, estimator, noise
):
    """Within 4 standard errors of its noise (false alarm 6e-5), which is small."""
    model, clean = tiny_law.double(), tiny_law_expected["sequences"]
    result = blockdiffusion.likelihood(
        model,
        clean,
        estimator,
        mc_samples=40,
        bos=False,
        generator=torch.Generator().manual_seed(0),
    )
    exact = float(tiny_law_expected["exact_nelbo"].sum()) / clean.numel()
    assert result.stderr_noise / result.nats_per_token < noise
    # The cosine's cut at 1e-3 leaves out 1e-6 of the masks.
    assert abs(result.nats_per_token - exact) < 4 * result.stderr_noise + 1e-5


@pytest.mark.parametrize(("orders", "samples"), [(1, 80), (2, 40), (8, 10)])
def test_the_order_bound_lies_where_enumeration_puts_it(
    tiny_law, tiny_law_expected, orders, samples
):
    """Blocks of 2 have 2 orders, so the K-order bound is a sum over binomial counts; 4 standard
    errors (false alarm 6e-5)."""
    model, clean = tiny_law.double(), tiny_law_expected["sequences"]
    result = blockdiffusion.likelihood(
        model,
        clean,
        "orders",
        mc_samples=samples,
        orders=orders,
        bos=False,
        generator=torch.Generator().manual_seed(0),
    )
    first, second = (order_probs(model, clean, order) for order in ((0, 1), (1, 0)))
    expected = torch.zeros(len(clean), 2, dtype=torch.float64)
    for k in range(orders + 1):
        mean = (k * first + (orders - k) * second) / orders
        expected -= math.comb(orders, k) / 2**orders * mean.log()
    expected = float(expected.sum()) / clean.numel()
    assert abs(result.orders_nats_per_token - expected) < 4 * result.orders_stderr_noise
    nelbo = float(tiny_law_expected["exact_nelbo"].sum()) / clean.numel()
    assert abs(result.nats_per_token - nelbo) < 4 * result.stderr_noise
    assert list(result.order_bounds) == [k for k in (1, 2, 4, 8) if k <= orders]
    assert result.order_bounds[orders] == result.orders_nats_per_token
    assert result.order_bounds[1] == pytest.approx(result.nats_per_token, rel=1e-12)
    noise = result.order_bounds_stderr_noise
    assert list(noise) == list(result.order_bounds)
    assert noise[orders] == result.orders_stderr_noise
    assert noise[1] == pytest.approx(result.stderr_noise, rel=1e-9)


def order_probs(model, clean, order):
    """Probability of both blocks (B, 2) when their tokens are revealed in this order."""
    total = torch.zeros(len(clean), 2, dtype=torch.float64)
    hidden = torch.ones(2, dtype=torch.bool)
    for token in order:
        noisy = clean.masked_fill(hidden.repeat(2), model.config.mask_id)
        with torch.no_grad():
            logits = model.denoise_logits(noisy, clean)
        logits[..., model.config.mask_id] = -math.inf
        log_probs = logits.log_softmax(-1).gather(-1, clean[..., None])[..., 0]
        total += log_probs[:, token::2]
        hidden[token] = False
    return total.exp()


def test_more_orders_tighten_the_bound_towards_the_exact_value(make_model, random_ids):
    model, clean = make_model().double(), random_ids(4, 16)
    exact = blockdiffusion.likelihood(model, clean, "exact")
    result = blockdiffusion.likelihood(model, clean, "orders", mc_samples=12, orders=32)
    bounds = list(result.order_bounds.values())
    assert list(result.order_bounds) == [1, 2, 4, 8, 16, 32]
    assert bounds == sorted(bounds, reverse=True)
    assert exact.exact_nats_per_token < bounds[-1] + 3 * result.orders_stderr_noise
    gap = exact.nats_per_token - exact.exact_nats_per_token
    assert bounds[-1] - exact.exact_nats_per_token < 0.1 * gap + 3 * result.orders_stderr_noise
    assert result.copies == 12 * 32 * 4


def test_given_tokens_and_padding_are_left_out_of_the_orders(make_model, random_ids):
    model = make_model().double()
    rows = [random_ids(1, n)[0].tolist() for n in (5, 16, 11)]
    exact = blockdiffusion.likelihood(model, rows, "exact", bos=True)
    result = blockdiffusion.likelihood(model, rows, "orders", mc_samples=300, orders=1, bos=True)
    assert result.num_tokens == exact.num_tokens == 29
    assert abs(result.nats_per_token - exact.nats_per_token) < 4 * result.stderr_noise


@pytest.mark.parametrize(
    ("block_size", "samples", "copies"), [(1, 1, 1), (2, 1, 2), (2, 2, 3), (4, 7, 14), (4, 8, 15),
                                          (8, 8, 16), (8, 127, 254), (8, 128, 255), (16, 8, 16)],
)  # fmt: skip
def test_auto_enumerates_where_that_costs_no_more_than_drawing(
    make_model, random_ids, block_size, samples, copies
):
    """Never more noisy copies of a row than so many pairs have, which is what `samples` allows."""
    model, clean = make_model(block_size=block_size), random_ids(1, 16)
    result = blockdiffusion.likelihood(model, clean, mc_samples=samples)
    exact = copies == 2**block_size - 1
    assert result.estimator == ("exact" if exact else "complement")
    assert result.copies == copies <= 2 * samples
    assert (result.exact_nats_per_token is not None) == exact


def test_auto_with_a_target_is_done_where_there_is_no_noise(make_model, random_ids):
    result = blockdiffusion.likelihood(make_model(), random_ids(2, 16), target_stderr=1e-12)
    assert (result.estimator, result.stderr_noise, result.copies) == ("exact", 0.0, 15)
    assert result.target_stderr == 1e-12 and not result.remarks


def test_auto_is_the_estimator_of_least_noise(make_model, random_ids):
    model, source = make_model(block_size=8), torch.Generator().manual_seed(0)
    errors = {
        name: blockdiffusion.likelihood(
            model, random_ids(32, 16), name, mc_samples=samples, generator=source
        ).stderr_noise
        for name, samples in (("auto", 8), ("bernoulli", 16))
    }
    assert errors["auto"] < errors["bernoulli"] / 2


def test_a_target_of_the_noise_error_is_reached_and_stops(make_model, random_ids):
    model, clean = make_model(), random_ids(8, 16)
    loose = blockdiffusion.likelihood(model, clean, "count", mc_samples=64)
    target = loose.stderr_noise
    result = blockdiffusion.likelihood(model, clean, "count", mc_samples=4, target_stderr=target)
    assert result.stderr_noise <= target
    assert 32 <= result.samples <= 128 and result.samples % 4 == 0
    assert result.copies == result.samples


def test_a_target_out_of_reach_is_given_up(make_model, random_ids, monkeypatch):
    monkeypatch.setattr("blockdiffusion.evaluate.replicates.MAX_SAMPLES", 8)
    calls = []
    result = blockdiffusion.likelihood(
        make_model(), random_ids(2, 16), "count", mc_samples=3, target_stderr=1e-9,
        progress=lambda *units: calls.append(units),
    )  # fmt: skip
    assert result.samples == 9 and result.stderr_noise > 1e-9
    (remark,) = result.remarks
    assert f"error is {result.stderr_noise:.2g} after 9 draws" in remark
    assert "target of 1e-09 was not reached" in remark
    assert calls[-1] == (18, 18) and max(total for _, total in calls) == 18  # rows, not days


@pytest.mark.parametrize("estimator", ["exact", "orders"])
def test_a_network_that_reads_t_has_no_finite_sum(make_model, random_ids, estimator):
    model = make_model(time_conditioning=True)
    with pytest.raises(UserError, match="masked diffusion network that reads no time"):
        blockdiffusion.likelihood(model, random_ids(2, 16), estimator)


def test_the_noise_error_is_that_of_repeated_evaluations(make_model, random_ids):
    """40 evaluations of 8 replicates: their spread equals the stated error within a factor 1.6
    (chi-square with 39 and about 280 degrees of freedom; false alarm below 1e-4)."""
    model, clean = make_model(), random_ids(8, 16)
    source = torch.Generator().manual_seed(0)
    results = [
        blockdiffusion.likelihood(
            model, clean, "bernoulli", mc_samples=8, generator=source, t_min=0.1
        )
        for _ in range(40)
    ]
    spread = torch.tensor([r.nats_per_token for r in results]).std()
    stated = torch.tensor([r.stderr_noise for r in results]).square().mean().sqrt()
    assert 1 / 1.6 < spread / stated < 1.6


def test_the_data_error_is_the_ratio_estimator(make_model, random_ids):
    model, clean = make_model(), random_ids(5, 16)
    valid = torch.arange(16)[None] < torch.tensor([16, 9, 4, 16, 1])[:, None]
    result = blockdiffusion.likelihood(model, clean, "exact", valid=valid)
    counts = valid.sum(1).double()
    assert result.num_tokens == 46
    jackknife = []
    for left_out in range(5):
        keep = torch.arange(5) != left_out
        jackknife.append(float(result.nats_per_row[keep].sum() / counts[keep].sum()))
    spread = torch.tensor(jackknife)
    jackknife_error = ((spread - spread.mean()).square().sum() * 4 / 5).sqrt()
    assert result.stderr_data == pytest.approx(float(jackknife_error), rel=0.5)
    low, high = result.interval
    assert high - low == pytest.approx(2 * 1.96 * result.stderr_data, rel=1e-3)


def test_bos_is_given_and_not_counted(make_model, random_ids):
    clean = random_ids(3, 16)
    silent, says_so = make_model(), make_model(bos=True)
    assert blockdiffusion.likelihood(silent, clean, "exact").num_tokens == 48
    assert blockdiffusion.likelihood(silent, clean, "exact", bos=True).num_tokens == 45
    assert blockdiffusion.likelihood(says_so, clean, "exact").num_tokens == 45
    given = blockdiffusion.likelihood(says_so, clean, "exact")
    assert given.bos
    free = torch.ones_like(clean, dtype=torch.bool)
    free[:, 0] = False
    expected = exact_blocks(says_so, clean, free).nelbo_BK.sum(1)
    assert torch.allclose(given.nats_per_row, expected)
    whole = blockdiffusion.likelihood(says_so, clean, "exact", bos=False)
    assert whole.num_tokens == 48 and not whole.bos


def test_given_tokens_are_read_and_not_counted(make_model, random_ids):
    model, clean = make_model(), random_ids(3, 14)
    given = torch.zeros_like(clean, dtype=torch.bool)
    given[0, :6] = given[1, 3:9] = True
    result = blockdiffusion.likelihood(model, clean, "exact", given=given)
    assert result.num_tokens == 3 * 14 - 12
    padded = torch.nn.functional.pad(clean, (0, 2))
    valid = torch.arange(16)[None].expand(3, -1) < 14
    free = valid & ~torch.nn.functional.pad(given, (0, 2))
    expected = exact_blocks(model, padded, free, valid).nelbo_BK.sum(1)
    assert torch.allclose(result.nats_per_row, expected)
    for wrong in (dict(ids=clean, given=given[:, 1:]), dict(ids=clean.tolist(), given=given)):
        with pytest.raises(UserError, match="given needs a tensor"):
            blockdiffusion.likelihood(model, **wrong)


def test_rows_of_any_length(make_model):
    """Lists are padded, and padding changes nothing."""
    model = make_model()
    rows = [[1, 2, 3, 4, 5, 6], [7, 8, 9]]
    together = blockdiffusion.likelihood(model, rows, "exact")
    apart = [blockdiffusion.likelihood(model, [row], "exact") for row in rows]
    assert together.num_tokens == 9
    for row in range(2):
        assert together.nats_per_row[row] == pytest.approx(float(apart[row].nats_per_row[0]))
    assert apart[0].stderr_data is None and apart[0].num_tokens == 6


def test_single_token_blocks_give_an_exact_value_without_bound_sign(make_model, random_ids):
    result = blockdiffusion.likelihood(make_model(block_size=1), random_ids(2, 8), "exact")
    assert not result.is_bound
    assert result.nats_per_token == pytest.approx(result.exact_nats_per_token, abs=1e-12)


@pytest.mark.parametrize("estimator", ["count", "complement", "countx2", "orders"])
def test_a_block_of_one_token_has_one_mask_set_whoever_draws_it(make_model, random_ids, estimator):
    model, clean = make_model(block_size=1), random_ids(2, 8)
    exact = blockdiffusion.likelihood(model, clean, "exact")
    result = blockdiffusion.likelihood(model, clean, estimator, mc_samples=3, orders=2)
    assert not result.is_bound and result.exact_nats_per_token == result.nats_per_token
    assert result.nats_per_token == pytest.approx(exact.nats_per_token, abs=1e-6)
    assert result.stderr_noise < 1e-6
    lines = likelihood_lines(result, "model on data")
    assert not any("bound" in line or "<=" in line for line in lines)


def test_a_drawn_time_leaves_a_bound_of_single_tokens(make_model, random_ids):
    """Whether the token is masked is drawn, or the network reads when."""
    clean = random_ids(2, 8)
    assert blockdiffusion.likelihood(make_model(block_size=1), clean, "bernoulli").is_bound
    timed = make_model(block_size=1, time_conditioning=True)
    result = blockdiffusion.likelihood(timed, clean)
    assert result.is_bound and result.estimator == "complement" and result.stderr_noise > 0


def test_a_pair_of_single_tokens_is_one_copy_and_says_so(make_model, random_ids):
    clean = random_ids(2, 8)
    result = blockdiffusion.likelihood(make_model(block_size=1), clean, "complement")
    assert result.copies == result.samples == 8
    assert result.remarks == [result.note] and "one is used" in result.note
    assert f"  {result.note}" in likelihood_lines(result, "model on data")
    assert blockdiffusion.likelihood(make_model(), clean, "complement").remarks == []


def test_bits_per_byte(make_model, random_ids):
    model, clean = make_model(), random_ids(2, 8)
    assert blockdiffusion.likelihood(model, clean, "exact").bits_per_byte is None
    result = blockdiffusion.likelihood(model, clean, "exact", num_bytes=40)
    assert result.bits_per_byte == pytest.approx(
        float(result.nats_per_row.sum()) / 40 / math.log(2)
    )


def test_texts_need_a_tokenizer_and_know_their_bytes(make_model):
    model = make_model()
    with pytest.raises(UserError, match="no tokenizer"):
        blockdiffusion.likelihood(model, ["abc"])

    class Letters:
        def encode(self, text, add_special_tokens):
            assert not add_special_tokens
            return [ord(c) - ord("a") for c in text]

    model.tokenizer = Letters()
    result = blockdiffusion.likelihood(model, ["abc", "dddd"], "exact")
    assert result.num_tokens == 7
    assert result.bits_per_byte == pytest.approx(result.nats_per_token / math.log(2))


def test_the_same_seed_gives_the_same_estimate(make_model, random_ids):
    model, clean = make_model(), random_ids(4, 16)
    values = [
        blockdiffusion.likelihood(model, clean, mc_samples=3).nats_per_token for _ in range(2)
    ]
    assert values[0] == values[1]


def test_progress_reaches_the_total(make_model, random_ids, monkeypatch):
    monkeypatch.setattr("blockdiffusion.evaluate.replicates.PASS_TOKENS", 64)
    for estimator in ("exact", "bernoulli", "complement", "orders"):
        calls = []
        blockdiffusion.likelihood(
            make_model(),
            random_ids(5, 16),
            estimator,
            mc_samples=3,
            progress=lambda *a, calls=calls: calls.append(a),
        )
        assert calls[-1][0] == calls[-1][1] and len(calls) > 2


def test_the_result_is_plain_json(make_model, random_ids):
    import json

    values = blockdiffusion.likelihood(make_model(), random_ids(2, 8), "exact").to_dict(rows=True)
    assert json.loads(json.dumps(values))["nats_per_row"] == values["nats_per_row"]


@pytest.mark.parametrize(("ids", "options", "message"), [
    ([[1, 2]], dict(estimator="count[0.3,0.8]"), "gives no perplexity"),
    ([[1, 2]], dict(estimator="elbo"), "unknown estimator.*exact or orders"),
    ([[1, 2]], dict(mc_samples=0), "mc_samples"),
    ([[1, 2]], dict(orders=0), "orders"),
    ([[1, 2]], dict(target_stderr=0), "target_stderr"),
    ([[1, 12]], {}, "mask token"),
    ([[1, 13]], {}, "vocabulary"),
    ([[]], {}, "empty row"),
    ([[1]], dict(bos=True), "nothing to score"),
    (torch.zeros(4, dtype=torch.long), {}, "shape"),
    ("text", {}, "list of texts"),
])  # fmt: skip
def test_mistakes_are_told_in_one_sentence(make_model, ids, options, message):
    with pytest.raises(UserError, match=message):
        blockdiffusion.likelihood(make_model(), ids, **options)


def test_long_blocks_cannot_be_enumerated(make_model, random_ids):
    with pytest.raises(UserError, match="S = 16"):
        blockdiffusion.likelihood(make_model(block_size=16), random_ids(1, 16), "exact")


# --- autoregressive models -----------------------------------------------------------------------


@pytest.mark.parametrize("estimator", ["auto", "exact"])
@pytest.mark.parametrize("bos", [False, True])
def test_an_autoregressive_likelihood_is_exact(make_ar, random_ids, bos, estimator):
    model, ids = make_ar(bos=bos), random_ids(5, 7)
    done = []
    result = blockdiffusion.likelihood(
        model, ids, estimator, progress=lambda *units: done.append(units)
    )
    free = torch.ones_like(ids, dtype=torch.bool)
    free[:, : int(bos)] = False
    with torch.no_grad():
        row = causal_nll(model, ids, free).sum(1)
    assert torch.allclose(result.nats_per_row, row)
    assert result.num_tokens == 35 - 5 * bos
    assert result.nats_per_token == pytest.approx(float(row.sum()) / result.num_tokens)
    assert result.exact_nats_per_token == result.nats_per_token and not result.is_bound
    assert result.stderr_noise == 0 and result.stderr_data == result.exact_stderr_data > 0
    assert (result.estimator, result.samples, result.copies) == ("exact", 1, 1)
    assert done[-1][0] == done[-1][1]


def test_rows_of_an_autoregressive_model_do_not_see_each_other(make_ar, random_ids, monkeypatch):
    model, ids = make_ar(bos=False), random_ids(5, 7).tolist()
    ids[1], ids[3] = ids[1][:2], ids[3][:5]
    whole = blockdiffusion.likelihood(model, ids)
    alone = [blockdiffusion.likelihood(model, [row]).nats_per_token * len(row) for row in ids]
    assert torch.allclose(whole.nats_per_row, torch.tensor(alone, dtype=torch.float64))
    monkeypatch.setattr("blockdiffusion.evaluate.replicates.PASS_TOKENS", 14)  # two rows a pass
    again = blockdiffusion.likelihood(model, ids)
    assert torch.allclose(whole.nats_per_row, again.nats_per_row) and whole.num_tokens == 28


@pytest.mark.parametrize("estimator", ["count", "bernoulli", "orders", "nonsense"])
def test_masks_are_refused_for_an_autoregressive_model(make_ar, random_ids, estimator):
    with pytest.raises(UserError, match=f"estimator is {estimator}, but .* exact in one pass"):
        blockdiffusion.likelihood(make_ar(), random_ids(1, 8), estimator)


@pytest.mark.parametrize(
    ("estimator", "options"),
    [
        ("exact", {}),
        ("complement", {"mc_samples": 3}),
        ("orders", {"mc_samples": 2, "orders": 3}),
        ("count", {"mc_samples": 2, "target_stderr": 0.3}),
        ("ar", {}),
    ],
)
def test_a_killed_evaluation_goes_on_bit_for_bit(
    make_model, make_ar, random_ids, tmp_path, monkeypatch, estimator, options
):
    monkeypatch.setattr(replicates, "PASS_TOKENS", 96)  # a row or two at a time
    model, name = (make_ar(), "auto") if estimator == "ar" else (make_model(), estimator)
    ids, passes, stop = random_ids(7, 16), [], None
    encode = "encode_causal" if estimator == "ar" else "encode"
    real = getattr(model, encode)

    def counted(*args, **more):
        passes.append(1)
        if len(passes) == stop:
            raise KeyboardInterrupt
        return real(*args, **more)

    monkeypatch.setattr(model, encode, counted)
    kept = dict(journal=tmp_path / "journal", **options)
    told = []
    whole = blockdiffusion.likelihood(
        model, ids, name, **options, progress=lambda *state: told.append(state)
    )
    all_passes, last = len(passes), told[-1]
    passes.clear()
    stop = all_passes // 2 + 1
    with pytest.raises(KeyboardInterrupt):
        blockdiffusion.likelihood(model, ids, name, **kept)
    passes.clear()
    stop = None
    again = blockdiffusion.likelihood(
        model, ids, name, **kept, progress=lambda *state: told.append(state)
    )
    assert 0 < len(passes) < all_passes and told[-1] == last
    one, other = (result.to_dict(rows=True) | {"seconds": None} for result in (whole, again))
    assert one == other
    passes.clear()
    assert blockdiffusion.likelihood(model, ids, name, **kept).perplexity == whole.perplexity
    assert not passes  # everything was found
    for changed in (dict(bos=True), dict(generator=torch.Generator().manual_seed(5))):
        if estimator in ("exact", "ar") and "generator" in changed:
            continue  # which draw nothing
        passes.clear()
        plain = blockdiffusion.likelihood(model, ids, name, **options, **changed)
        generator = changed.get("generator")
        if generator is not None:
            generator.manual_seed(5)
        alone = len(passes)
        passes.clear()
        found = blockdiffusion.likelihood(model, ids, name, **kept, **changed)
        assert found.nats_per_token == plain.nats_per_token and len(passes) == alone
