"""Estimates: against the run and the tensors that they are about, by hand, and what is refused."""

import json
from dataclasses import replace
from math import prod

import pytest
import torch
import yaml

from blockdiffusion.estimate.flops import muon_flops
from blockdiffusion.estimate.listing import estimate_lines
from blockdiffusion.estimate.run import estimate_recipe, manifest_of
from blockdiffusion.estimate.sampling import SamplingRequest
from blockdiffusion.estimate.training import drawn_rows, largest
from blockdiffusion.runtime.hardware import find_hardware
from blockdiffusion.sampling import generate
from blockdiffusion.train.optim import OptimOptions, make_optimizer
from blockdiffusion.train.recipe import build_model, load_recipe, network_config
from tests.command import blockdiff

H100 = find_hardware("h100")
MODEL = {
    "num_hidden_layers": 2,
    "hidden_size": 32,
    "num_attention_heads": 2,
    "cond_dim": 8,
    "block_size": 4,
}


@pytest.fixture
def recipe_of(tmp_path):
    """A recipe of a small network, with the given sections; its data are not prepared."""

    def make(**sections):
        tree = {
            "out": str(tmp_path / "run"),
            "data": {"path": str(tmp_path / "none")},
            "model": MODEL,
            "train": {"steps": 10, "batch_size": 8},
            "eval": {"every": None},
        }
        for name, values in sections.items():
            tree[name] = {**tree.get(name, {}), **values}
        path = tmp_path / "recipe.yaml"
        path.write_text(yaml.safe_dump(tree))
        return load_recipe(path)

    return make


def estimate_of(recipe, device=H100, **options):
    return estimate_recipe(recipe, device, **{"seq_len": 64, "vocab_size": 50, **options})


def matrices_of(recipe):
    """Shapes of the matrices that Muon takes."""
    model = build_model(recipe, manifest_of(recipe, 64, 50))
    return [p.shape for p in model.backbone.hidden_matrices()]


# --- against what is there --------------------------------------------------------------------


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_memory_of_what_stands_is_that_of_the_tensors(recipe_of, name):
    recipe = recipe_of(optim={"name": name})
    model = build_model(recipe, manifest_of(recipe, 64, 50))
    memory = estimate_of(recipe).training.memory
    assert memory.weights == memory.average == sum(p.nbytes for p in model.parameters())
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    assert memory.gradients == sum(p.grad.nbytes for p in model.parameters())
    optimizer = make_optimizer(model.backbone, OptimOptions(name=name))
    optimizer.step()
    held = sum(x.nbytes for state in optimizer.state.values() for x in state.values())
    # Besides, AdamW has a counter of 4 bytes for every tensor.
    assert 0 <= held - memory.optimizer <= 4 * len(list(model.parameters()))


@pytest.mark.parametrize(
    ("objective", "share"),
    [
        ({"estimator": "count"}, 5 / 8),  # mean of 1, 2, 3, 4 of 4 tokens
        ({"estimator": "complement"}, 2 * 5 / 8),
        ({"estimator": "bernoulli"}, 0.5005),
        ({"estimator": "bernoulli", "clip": [0.6, 0.8]}, 0.7),
        ({"name": "sedd", "estimator": "count", "num_noisy": 3}, 3 * 5 / 8),
        ({"name": "d3pm", "transition": "uniform"}, 1),
    ],
)
def test_positions_scored_are_those_of_the_law(recipe_of, objective, share):
    """65,536 tokens are drawn, stratified: a coin of one half has a standard error of 0.002."""
    recipe = recipe_of(objective=objective)
    manifest = manifest_of(recipe, 64, 50)
    drawn = drawn_rows(recipe, manifest, network_config(recipe, manifest))
    assert drawn.scored / 64 == pytest.approx(share, abs=0.01)


def test_padding_and_a_given_bos_are_not_scored(recipe_of, prepared):
    recipe = recipe_of(data={"path": str(prepared)}, objective={"estimator": "count"})
    manifest = manifest_of(recipe, None, None)
    split = manifest.splits["train"]
    half = replace(split, tokens=split.rows * manifest.seq_len // 2)
    other = replace(manifest, row_bos=True, splits={"train": half})
    drawn = drawn_rows(recipe, other, network_config(recipe, other))
    # 3 blocks of 4 free tokens and one of 3: means 2.5 and 2.
    assert drawn.scored == pytest.approx((3 * 2.5 + 2) / 2, rel=0.01)
    assert drawn.valid == pytest.approx(0.5, rel=0.01)


@pytest.mark.parametrize(
    ("model", "objective"),
    [({}, {}), ({"block_size": 16}, {}), ({"block_size": None, "cond_dim": 128}, {"name": "ar"})],
)
@pytest.mark.parametrize("tokens", [1, 30, 64])
def test_calls_are_those_of_the_sampler(recipe_of, model, objective, tokens):
    recipe = recipe_of(model=model, objective=objective)
    network = build_model(recipe, manifest_of(recipe, 64, 50)).eval()
    estimate = estimate_of(recipe, sampling=SamplingRequest(max_new_tokens=tokens)).sampling
    made = generate(
        network, max_new_tokens=tokens, generator=torch.Generator().manual_seed(0), eos=False
    )
    size = network.config.block_size
    whole = -(-tokens // size) * size  # a row may leave before its last block is whole
    assert estimate.calls == whole >= int(made.nfe[0]) > whole - size


# --- by hand ------------------------------------------------------------------------------------


def test_a_sampling_call_by_hand(recipe_of):
    estimate = estimate_of(
        recipe_of(), sampling=SamplingRequest(batch=3, max_new_tokens=8)
    ).sampling
    # Two blocks of 4: calls of 4, 4, 4, 4, then 8 (with the commit), 4, 4, 4 tokens a row.
    # Of two layers the last makes keys, queries and values of all and finishes the token drawn.
    layers = 2 * 32**2 * 3 * ((12 + 3) * (4 * 4 + 8 + 4 * 3) + 9 * 8)
    # The modulation is folded into the weights.
    attention = 4 * 32 * 2 * 3 * (4 * 4 * 4 + 8 * 8 + 3 * 4 * 8)
    head = 2 * 32 * 50 * 3 * 8
    assert estimate.flops.total * 8 == pytest.approx(layers + attention + head)
    assert estimate.cache == 2 * 4 * 2 * 32 * 3 * 8 and estimate.tokens_per_forward == 1
    assert estimate.tokens_per_second == pytest.approx(3 / estimate.seconds_call)


def test_more_tokens_a_step_are_fewer_calls(recipe_of):
    recipe = recipe_of(model={"block_size": 16})
    one, four = (
        estimate_of(recipe, sampling=SamplingRequest(tokens_per_step=k)).sampling for k in (1, 4)
    )
    assert one.calls == 64 and four.calls == 16 and four.tokens_per_forward == 4
    assert four.tokens_per_second > 3.5 * one.tokens_per_second


def test_a_window_bounds_the_cache(recipe_of):
    wide, narrow = (
        estimate_of(
            recipe_of(), sampling=SamplingRequest(max_new_tokens=4096, window=window)
        ).sampling
        for window in (None, 32)
    )
    assert narrow.cache == wide.cache * 36 / 4096
    assert narrow.flops.attention < wide.flops.attention / 30


def test_a_bf16_text_reads_half_of_the_bytes(recipe_of):
    long, short = (
        estimate_of(recipe_of(), sampling=SamplingRequest(dtype=dtype)).sampling
        for dtype in ("float32", "bfloat16")
    )
    assert long.weights == 2 * short.weights and long.cache == 2 * short.cache


def test_the_usual_evaluation_enumerates_or_draws_whichever_is_less(recipe_of):
    def flops(estimator, samples):
        options = {"every": 5, "rows": 4, "estimator": estimator, "mc_samples": samples}
        return estimate_of(recipe_of(eval=options)).training.flops_evaluation

    assert flops("auto", 4) == flops("complement", 4) < flops("exact", 4)
    assert flops("auto", 8) == flops("exact", 8) < flops("complement", 8)


def test_time_is_the_sum_of_its_parts_and_the_price_goes_with_it(recipe_of):
    recipe = recipe_of(eval={"every": 5, "rows": 4}, optim={"name": "muon"})
    plain = estimate_of(recipe).training
    assert plain.price is None
    device = replace(H100, flops={"float32": 1e9, "bfloat16": 1e9}, bandwidth=1e9)
    estimate = estimate_of(recipe, device, price_per_hour=36.0).training
    shares = device.shares
    assert estimate.seconds.products == pytest.approx(
        (estimate.flops.layers + estimate.flops.head) / (1e9 * shares.products)
    )
    matrices = matrices_of(recipe)
    assert sum(map(prod, matrices)) == 2 * 12 * 32**2
    assert estimate.seconds.update > muon_flops(matrices) / (1e9 * shares.products)
    evaluation = estimate.flops_evaluation / (1e9 * shares.products)
    assert estimate.seconds_run == pytest.approx(10 * estimate.seconds.total + evaluation)
    assert estimate.price == pytest.approx(estimate.seconds_run / 100)
    assert estimate.peak_share == pytest.approx(estimate.flops_per_second / 1e9)
    assert estimate.tokens_per_second == pytest.approx(8 * 64 / estimate.seconds.total)


def test_devices_share_the_rows_and_exchange_gradients(recipe_of):
    recipe = recipe_of(train={"batch_size": 512})
    one, four = (estimate_of(recipe, devices=n, price_per_hour=1.0).training for n in (1, 4))
    assert four.seconds.products == pytest.approx(one.seconds.products / 4, rel=1e-3)
    assert one.seconds.exchange == 0 < four.seconds.exchange
    assert four.flops.total == pytest.approx(one.flops.total, rel=1e-4)
    assert four.largest_micro_batch == 128
    assert four.price == pytest.approx(4 * four.seconds_run / 3600)


def test_shards_hold_a_part(recipe_of):
    """Of everything that stands; whole are the weights that a pass needs, in turn."""
    ddp, fsdp = (
        estimate_of(recipe_of(train={"batch_size": 8, "parallel": kind}), devices=8).training
        for kind in ("ddp", "fsdp")
    )
    for name in ("weights", "gradients", "optimizer", "average"):
        assert getattr(fsdp.memory, name) == getattr(ddp.memory, name) / 8
    assert ddp.memory.gathered == 0
    network = build_model(recipe_of(), manifest_of(recipe_of(), 64, 50))
    away = network.backbone.layers[1].parameters()
    there = sum(p.numel() for p in network.parameters()) - sum(
        p.numel() for p in away
    )  # one layer of two
    assert fsdp.memory.gathered == 2 * 4 * there
    assert fsdp.memory.activations == ddp.memory.activations
    assert fsdp.seconds.exchange == pytest.approx(1.5 * ddp.seconds.exchange)
    assert fsdp.seconds.update == pytest.approx(ddp.seconds.update / 8)
    # Several micro-batches sum whole gradients.
    options = {"batch_size": 16, "micro_batch_size": 1, "parallel": "fsdp"}
    two = estimate_of(recipe_of(train=options), devices=8).training
    assert two.memory.gradients == ddp.memory.gradients
    # Muon's matrices are put together, in bf16, and made orthogonal by every device.
    ddp, fsdp = (
        estimate_of(
            recipe_of(optim={"name": "muon"}, train={"batch_size": 8, "parallel": kind}), devices=8
        ).training.seconds
        for kind in ("ddp", "fsdp")
    )
    matrices = matrices_of(recipe_of())
    put_together = 7 / 8 * 2 * sum(map(prod, matrices)) / H100.link
    assert fsdp.exchange == pytest.approx(1.5 * ddp.exchange + put_together)
    orthogonal = muon_flops(matrices) / (H100.flops["bfloat16"] * H100.shares.products)
    assert fsdp.update - orthogonal == pytest.approx((ddp.update - orthogonal) / 8)
    # One device has it all, whatever the word.
    one = [estimate_of(recipe_of(train={"parallel": kind})).training for kind in ("ddp", "fsdp")]
    assert one[0] == one[1]


def test_shards_leave_room_for_more_rows(recipe_of):
    many = {"num_hidden_layers": 4, "hidden_size": 256}
    ddp, fsdp = (
        recipe_of(model=many, train={"batch_size": 512, "parallel": kind})
        for kind in ("ddp", "fsdp")
    )
    needed = estimate_of(
        recipe_of(model=many, train={"batch_size": 512, "micro_batch_size": 8, "parallel": "ddp"}),
        devices=8,
    ).training.memory
    device = replace(H100, memory=needed.peak)
    most = [estimate_of(recipe, device, devices=8).training.largest_micro_batch
            for recipe in (ddp, fsdp)]  # fmt: skip
    assert most[0] == 8 < most[1]


def test_sampling_in_8_bits(recipe_of):
    cpu = replace(H100, name="mine", cuda=False)
    long, short = (
        estimate_of(recipe_of(), cpu, sampling=SamplingRequest(dtype=dtype)).sampling
        for dtype in ("float32", "int8")
    )
    assert short.cache == long.cache
    assert short.weight_bytes_read < 0.35 * long.weight_bytes_read
    assert short.seconds_reading < long.seconds_reading
    assert short.seconds_arithmetic == long.seconds_arithmetic


def test_the_largest_micro_batch_is_the_last_that_fits(recipe_of):
    recipe = recipe_of(train={"batch_size": 64})
    needed = estimate_of(
        recipe_of(train={"batch_size": 64, "micro_batch_size": 10})
    ).training.memory
    for spare, most in ((0, 10), (-1, 9), (1e12, 64)):
        device = replace(H100, memory=needed.peak + spare)
        estimate = estimate_of(recipe, device).training
        assert estimate.largest_micro_batch == estimate.micro_batch == most
        assert estimate.fits == (most == 64)
    nothing = estimate_of(recipe, replace(H100, memory=1000)).training
    assert nothing.largest_micro_batch == 0 and not nothing.fits
    assert [largest(lambda n, k=k: n <= k, 20) for k in (0, 1, 7, 20, 99)] == [0, 1, 7, 20, 20]


def test_the_most_that_fit_are_no_cap(recipe_of):
    """More rows are looked for where there is more memory, or it is said that none were."""
    recipe, counts = recipe_of(train={"batch_size": 64}), []
    for memory in (1e12, 1e15):
        estimate = estimate_of(recipe, replace(H100, memory=memory))
        words = "\n".join(estimate_lines(estimate))
        assert "all 64 rows that a device has of an update fit at once, or more" in words
        assert f"{estimate.sampling.largest_batch:,} rows are the most that fit" in words
        counts.append(estimate.sampling.largest_batch)
    assert counts[1] / counts[0] == pytest.approx(1000, rel=0.01) and counts[1] > 65_536
    sampling = estimate.sampling
    row = sampling.cache + sampling.logits
    assert sampling.weights + counts[1] * row <= 1e15 < sampling.weights + (counts[1] + 1) * row
    assert "31 rows are the most that fit; the recipe's" in "\n".join(
        estimate_lines(estimate_of(recipe, replace(H100, memory=_memory_of(recipe_of, 31))))
    )


def _memory_of(recipe_of, rows):
    recipe = recipe_of(train={"batch_size": 64, "micro_batch_size": rows})
    return estimate_of(recipe).training.memory.peak


def test_checkpointing_takes_memory_away_and_adds_a_forward_pass(recipe_of):
    plain, again = (
        estimate_of(
            recipe_of(model={"num_hidden_layers": 8}, train={"activation_checkpointing": on})
        )
        for on in (False, True)
    )
    assert again.training.memory.peak < 0.5 * plain.training.memory.peak
    assert 1.2 < again.training.flops.layers / plain.training.flops.layers <= 4 / 3
    assert again.training.flops.head == plain.training.flops.head


def test_bf16_saves_activations_only(recipe_of):
    long, short = (
        estimate_of(recipe_of(train={"dtype": dtype, "batch_size": 64})).training.memory
        for dtype in ("float32", "bfloat16")
    )
    assert long.weights == short.weights and long.optimizer == short.optimizer
    assert short.activations < 0.7 * long.activations


# --- the command ----------------------------------------------------------------------------------


def test_the_papers_recipe_on_a_device(tmp_path):
    path = tmp_path / "estimate.json"
    ended = blockdiff(
        "estimate", "recipes/owt.yaml", "--device", "h100", "--devices", "8",
        "--price-per-hour", "2",
        "--seq-len", "1024", "--vocab-size", "50258", "--sample-dtype", "bfloat16", "--json", path,
        "train.parallel=fsdp",
    )  # fmt: skip
    assert ended.returncode == 0, ended.stderr
    lines = ended.stdout.splitlines()
    assert lines[0] == "recipes/owt.yaml on 8 x h100" and max(map(len, lines)) <= 100
    told = json.loads(path.read_text())
    assert told["parameters"] == 169_627_218 and told["network"]["block_size"] == 4
    # 110M parameters in the paper's words; 6 operations for each that a token meets, about.
    flops = told["training"]["flops"]
    per_token = (flops["layers"] + flops["head"]) / (512 * 1024)
    assert per_token == pytest.approx(6 * (2 * 85e6 + 0.5 * 38.6e6), rel=0.05)
    assert told["training"]["tokens_run"] == 150_000 * 512 * 1024
    assert told["training"]["seconds"]["exchange"] > 0 and told["training"]["price"] > 0


def test_the_old_name_of_the_command_works_and_warns(recipe_file):
    new, old = (blockdiff(name, recipe_file, "--device", "l4") for name in ("estimate", "plan"))
    assert old.returncode == 0 and old.stdout == new.stdout and not new.stderr
    assert "plan is now called estimate" in old.stderr and old.stderr.count("\n") == 1
    listed = blockdiff("--help").stdout
    assert " estimate " in listed and " plan " not in listed


def test_prepared_data_tell_the_sizes(recipe_file):
    ended = blockdiff("estimate", recipe_file, "--device", "l4")
    assert ended.returncode == 0, ended.stderr
    assert "L = 16, V = 258" in ended.stdout


def test_every_objective_has_an_estimate(recipe_of):
    for objective in (
        {"name": "mdlm"}, {"name": "sedd"}, {"name": "d3pm"}, {"name": "ar"},
        {"name": "d3pm", "transition": "uniform", "timesteps": 9},
    ):  # fmt: skip
        model = {"block_size": None, "cond_dim": 128 if objective["name"] == "ar" else 8}
        estimate = estimate_of(recipe_of(objective=objective, model=model), price_per_hour=1.0)
        lines = estimate_lines(estimate)
        assert max(map(len, lines)) <= 100 and not any("nan" in line for line in lines)
        assert estimate.training.seconds.total > 0 and estimate.sampling.tokens_per_second > 0
    assert estimate.sampling.calls == 9 * 64 // 4


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (
            ["--seq-len", "16"],
            "holds no prepared data to read L and V from; give --seq-len and --vo",
        ),
        (["--seq-len", "1", "--vocab-size", "9"], "--seq-len is 1; it must be at least 2"),
        (
            ["--devices", "3"],
            "--devices is 3; it must divide train.batch_size, wh",
        ),
        (["--devices", "0"], "--devices is 0; it must be at least 1"),
        (["--price-per-hour", "-1"], "--price-per-hour is -1; it must not be negative"),
        (["--device", "h10"], "--device is 'h10'; known are"),
        (["--tflops", "3"], "a device of your own needs --tflops, --bandwidth and --memory"),
        (["--tokens-per-step", "5"], "--tokens-per-step is 5, more than the 4 tokens of a block"),
        (["--tokens-per-step", "0"], "--tokens-per-step is 0; it must be at least 1"),
        (["--window", "3"], "--window is 3, smaller than a block of 4"),
        (["--batch", "0"], "--batch is 0; it must be at least 1"),
        (["--sample-dtype", "int4"], "--sample-dtype is 'int4'; choose float32, bfloat16 or i"),
        (
            ["--sample-dtype", "int8"],
            "--sample-dtype is int8, which is for CPUs",
        ),
        (["model.block_size=5"], "model.block_size is 5, which does not divide the 64 tokens"),
        (
            ["model.block_size=64", "--max-new-tokens", "65"],
            "--max-new-tokens is 65, beyond the one",
        ),
        (
            ["model.hiden_size=9"],
            "unknown key model.hiden_size; the nearest known one is model.hidden_size",
        ),
        (["--json", "."], ". is a directory; give the name of a file"),
    ],
)
def test_a_mistake_is_one_sentence(recipe_of, tmp_path, arguments, sentence):
    recipe_of()
    sizes = [] if "--seq-len" in arguments else ["--seq-len", "64", "--vocab-size", "50"]
    device = [] if "--device" in arguments else ["--device", "h100"]
    ended = blockdiff("estimate", tmp_path / "recipe.yaml", *arguments, *sizes, *device)
    assert ended.returncode == 2 and sentence in ended.stderr
    assert ended.stderr.count("\n") == 1 and not ended.stdout


def test_sizes_that_contradict_the_data_are_refused(recipe_file):
    ended = blockdiff("estimate", recipe_file, "--device", "h100", "--seq-len", "32")
    assert ended.returncode == 2
    assert "--seq-len is 32, but the data in" in ended.stderr and "have 16" in ended.stderr
