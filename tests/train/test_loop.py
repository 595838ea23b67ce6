"""The loop: what a step computes, that nothing disturbs it, and how it stops."""

import itertools
import json
import math
import os
import signal
from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

from blockdiffusion.checkpoints.formats import load
from blockdiffusion.data.loader import Batch, BatchOrder, TokenRows, free_tokens
from blockdiffusion.diffusion import objectives as diffusions
from blockdiffusion.diffusion.denoiser import masked_loss, masked_nll
from blockdiffusion.diffusion.estimators import Bernoulli
from blockdiffusion.errors import UserError
from blockdiffusion.estimate.flops import Pass, training_flops
from blockdiffusion.estimate.sizes import NetworkSizes
from blockdiffusion.runtime.distributed import SINGLE
from blockdiffusion.runtime.seeding import generator
from blockdiffusion.train import checkpoint, loop
from blockdiffusion.train.loggers import read_metrics
from blockdiffusion.train.loop import Periodic, accumulate_gradients
from blockdiffusion.train.loss import DiffusionLoss, NextTokenLoss
from blockdiffusion.train.options import TrainOptions
from blockdiffusion.train.parallel import Parallelism
from blockdiffusion.train.recipe import build_model, load_recipe, to_dict
from blockdiffusion.train.session import Interrupted
from tests import noise_oracles

AR = ["objective.name=ar", "model.cond_dim=128"]  # the recipe's cond_dim is another
NAMES = {
    "bd3lm": [],
    "mdlm": ["objective.name=mdlm", "model.block_size=null"],
    "sedd": ["objective.name=sedd"],
    "d3pm": ["objective.name=d3pm"],
    "uniform": ["objective.name=d3pm", "objective.transition=uniform", "objective.timesteps=20"],
    "ar": AR,
}


@pytest.fixture
def run(recipe_file, prepared):
    """Builds the model of a recipe and trains it; returns the model and the run's directory."""

    def run(*overrides, resume=False, rows=None, **more):
        recipe = load_recipe(recipe_file, overrides)
        rows = rows or TokenRows(prepared, "train")
        model = build_model(recipe, rows.manifest)
        out = recipe_file.parent / recipe.out
        more.setdefault("tokenizer", prepared / "tokenizer")
        loop.train(
            model,
            rows,
            out=out,
            options=recipe.train,
            objective=recipe.objective,
            optim=recipe.optim,
            checkpoint=recipe.checkpoint,
            config=to_dict(recipe),
            resume=resume,
            **more,
        )
        return model, out

    return run


@pytest.fixture
def rows(prepared):
    """The training rows, with another manifest."""

    def make(**changes):
        rows = TokenRows(prepared, "train")
        rows.manifest = replace(rows.manifest, **changes)
        return rows

    return make


def weights(model):
    return {name: p.detach().clone() for name, p in model.backbone.named_parameters()}


def assert_equal(one, two):
    assert one.keys() == two.keys()
    assert all(torch.equal(one[name], two[name]) for name in one)


# --- what a step computes


def test_the_first_step_is_adamw_on_the_papers_loss(run, recipe_file, prepared):
    paper = ["objective.estimator=bernoulli", "model.dropout=0", "optim.clip_norm=null"]
    recipe = load_recipe(recipe_file, ["train.steps=1", *paper])
    rows = TokenRows(prepared, "train")
    expected = build_model(recipe, rows.manifest)
    batch = rows.rows(BatchOrder(rows.num_rows, 6, 0).indices(0))
    free = torch.ones_like(batch.ids_BL, dtype=torch.bool)
    drawn = Bernoulli()(batch.ids_BL, free, 4, rows.manifest.mask_id, generator(0, "corruption", 1))
    nll = masked_nll(expected, drawn.noisy_BNL, batch.ids_BL, drawn.scored_BNL)
    loss = (nll * drawn.weight_BNL).sum() / free.sum()
    loss.backward()
    norm = math.sqrt(sum(p.grad.square().sum().item() for p in expected.parameters()))
    torch.optim.AdamW(expected.parameters(), lr=1e-2 / 4, weight_decay=0).step()

    model, out = run("train.steps=1", *paper)
    line = read_metrics(out / "metrics.jsonl")[0]
    assert line["loss"] == pytest.approx(loss.item(), rel=1e-6)
    assert line["grad_norm"] == pytest.approx(norm, rel=1e-5)
    assert line["lr"] == 1e-2 / 4
    update = Pass(rows=6, scored=int((drawn.weight_BNL > 0).sum()))
    seconds = batch.ids_BL.numel() / line["tokens_per_second"]
    rate = training_flops(NetworkSizes.of(model), update).total / seconds / 1e12
    assert line["tflops_per_second"] == pytest.approx(rate, rel=2e-3)
    assert 0 < line.get("peak_share", 0.5) < 1  # none where the machine was busy before
    for name, parameter in model.backbone.named_parameters():
        torch.testing.assert_close(parameter, dict(expected.backbone.named_parameters())[name])


@pytest.mark.parametrize("name", ["sedd", "uniform"])
def test_the_loss_of_the_first_step_is_the_objectives(run, recipe_file, prepared, name):
    """From the drawn noise and the logits by the published formulas, token by token."""
    overrides = [*NAMES[name], "train.steps=1", "model.dropout=0"]
    if name == "sedd":
        overrides.append("objective.estimator=bernoulli")
    rows = TokenRows(prepared, "train")
    model = build_model(load_recipe(recipe_file, overrides), rows.manifest).double().eval()
    clean = rows.rows(BatchOrder(rows.num_rows, 6, 0).indices(0)).ids_BL
    free = torch.ones_like(clean, dtype=torch.bool)
    law = diffusions.diffusion_of(model.config).fitted(Bernoulli())
    drawn = law(clean, free, 4, model.config.mask_id, generator(0, "corruption", 1))
    noisy, p = drawn.noisy_BNL[:, 0], drawn.prob_BNK[:, 0]
    sigma = noise_oracles.sigma_of(p)
    with torch.no_grad():
        logits = model.denoise_logits(noisy, clean, sigma)
    total = 0.0
    for row, place in itertools.product(range(6), range(16)):
        block, at = place // 4, logits[row, place]
        x, y = int(clean[row, place]), int(noisy[row, place])
        if name == "sedd" and y == model.config.mask_id:
            s = noise_oracles.scores(at, y, sigma[row, block])
            r = 1 / sigma[row, block].expm1()
            rate = 1 / (r * p[row, block])  # dsigma/dt, where sigma is not cut
            total += rate * (s.sum() - 1 - r * s[x].log() + r * (r.log() - 1))
        elif name == "uniform":
            step = round(float(p[row, block]) * 20) - 1
            probs = [(i + 1) / 20 for i in range(20)]
            kl = noise_oracles.d3pm_kl(model, "uniform", probs, step, at, x, y)
            total += 20 * kl
    share = 1 - 1e-3 if name == "sedd" else 1  # of the times, after the cut
    _, out = run(*overrides)
    logged = read_metrics(out / "metrics.jsonl")[0]["loss"]
    assert logged == pytest.approx(share * float(total) / 96, rel=1e-4)


@pytest.mark.parametrize("row_bos", [False, True])
def test_the_first_step_of_ar_is_adamw_on_the_plain_cross_entropy(run, recipe_file, rows, row_bos):
    overrides = [*AR, "train.steps=1", "model.dropout=0", "optim.clip_norm=null"]
    rows = rows(row_bos=row_bos)
    expected = build_model(load_recipe(recipe_file, overrides), rows.manifest)
    ids = rows.rows(BatchOrder(rows.num_rows, 6, 0).indices(0)).ids_BL
    start = torch.full((6, 1), rows.manifest.mask_id)
    past, target = (ids[:, :-1], ids[:, 1:]) if row_bos else (torch.cat([start, ids], 1), ids)
    logits = expected.head(expected.encode_causal(past[:, : target.shape[1]]))
    logits[..., rows.manifest.mask_id] = -math.inf
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), target.flatten())
    loss.backward()
    torch.optim.AdamW(expected.parameters(), lr=1e-2 / 4, weight_decay=0).step()

    model, out = run(*overrides, rows=rows)
    line = read_metrics(out / "metrics.jsonl")[0]
    assert line["loss"] == pytest.approx(loss.item(), rel=1e-6)
    assert line["lr"] == 1e-2 / 4
    for name, parameter in model.backbone.named_parameters():
        torch.testing.assert_close(parameter, dict(expected.backbone.named_parameters())[name])


@pytest.mark.parametrize("name", ["bd3lm", "sedd", "uniform", "ar"])
def test_training_learns(run, name):
    _, out = run("train.steps=150", *NAMES[name])
    losses = [line["loss"] for line in read_metrics(out / "metrics.jsonl")]
    assert sum(losses[-30:]) / 30 < 0.8 * sum(losses[:10]) / 10


@pytest.fixture(params=["bd3lm", "sedd", "uniform", "ar"])
def accumulated(request, recipe_file, prepared):
    """Loss and gradients in float64 of one padded batch, cut into micro-batches."""
    recipe = load_recipe(recipe_file, ["model.dropout=0", *NAMES[request.param]])
    rows = TokenRows(prepared, "train")
    torch.manual_seed(0)
    model = build_model(recipe, rows.manifest).double()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    ids = rows.rows(BatchOrder(rows.num_rows, 6, 0).indices(0)).ids_BL
    valid = torch.arange(16) < torch.tensor([16, 3, 16, 9, 1, 12])[:, None]
    batch = Batch(ids, valid)
    free = free_tokens(batch, row_bos=True)
    batch_loss = NextTokenLoss(batch, free)
    if request.param != "ar":
        law = diffusions.diffusion_of(model.config).fitted(Bernoulli())
        drawn = law(ids, free, 4, model.config.mask_id, generator(0, "test"))
        batch_loss = DiffusionLoss(batch, drawn)

    def accumulate(micro_batch_size):
        model.zero_grad()
        options = TrainOptions(steps=1, batch_size=6, micro_batch_size=micro_batch_size)
        losses = accumulate_gradients(
            Parallelism(model, SINGLE), batch_loss, int(free.sum()), 1, options, nullcontext()
        )
        return losses, {n: p.grad.clone() for n, p in model.backbone.named_parameters()}

    return accumulate


@pytest.mark.parametrize("size", [1, 2, 4, 5, 6])
def test_accumulation_does_not_change_loss_or_gradient(accumulated, size):
    whole, gradients = accumulated(None)
    parts, accumulated_gradients = accumulated(size)
    assert len(parts) == math.ceil(6 / size)
    assert parts.sum().item() == pytest.approx(whole.sum().item(), rel=1e-6)
    for name, gradient in gradients.items():
        torch.testing.assert_close(accumulated_gradients[name], gradient, rtol=1e-6, atol=1e-9)
    assert max(g.abs().max().item() for g in gradients.values()) > 1e-3


def test_masks_do_not_depend_on_the_micro_batches(run, monkeypatch):
    def masks_with(size, out):
        seen = []

        def spy(model, noisy_BNL, clean_BL, *rest):
            seen.append((noisy_BNL.clone(), clean_BL.clone()))
            return masked_loss(model, noisy_BNL, clean_BL, *rest)

        monkeypatch.setattr(diffusions, "masked_loss", spy)
        run(f"train.micro_batch_size={size}", "train.steps=3", f"out={out}")
        return [torch.cat(column).unflatten(0, (3, 6)) for column in zip(*seen, strict=True)]

    noisy, clean = masks_with(6, "whole")
    for size in (1, 4):
        parts = masks_with(size, f"parts{size}")
        assert torch.equal(parts[0], noisy) and torch.equal(parts[1], clean)
    assert not torch.equal(noisy[0], noisy[1])


def test_given_bos_and_padding_are_not_free():
    ids = torch.zeros(2, 4, dtype=torch.long)
    assert free_tokens(Batch(ids, None), row_bos=False).all()
    valid = torch.tensor([[True, True, True, False], [True, False, False, False]])
    free = free_tokens(Batch(ids, valid), row_bos=True)
    assert free.tolist() == [[False, True, True, False], [False] * 4]
    assert valid[0, 0]  # the batch is left as it was


def test_dropout_is_a_function_of_seed_step_and_micro_batch(run):
    first, _ = run("out=a")
    torch.manual_seed(77)
    second, _ = run("out=b")
    other, _ = run("out=c", "model.dropout=0")
    assert_equal(weights(first), weights(second))
    assert not torch.equal(first.output.weight, other.output.weight)


@pytest.mark.parametrize("name", list(NAMES))
def test_activation_checkpointing_changes_no_number(run, name):
    plain, out = run("train.steps=3", *NAMES[name])
    again, other = run(
        "train.steps=3", "train.activation_checkpointing=true", "out=other", *NAMES[name]
    )
    assert again.backbone.activation_checkpointing and not plain.backbone.activation_checkpointing
    for key, rel in (("loss", 1e-6), ("grad_norm", 1e-6)):
        lines = [read_metrics(path / "metrics.jsonl") for path in (out, other)]
        one, two = ([line[key] for line in found] for found in lines)
        assert one == pytest.approx(two, rel=rel)
    for (name, a), b in zip(plain.backbone.named_parameters(), again.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6, msg=name)


def test_muon_learns_and_resumes_bit_for_bit(run):
    options = ["optim.name=muon", "optim.lr=3e-3", "train.steps=20", "checkpoint.every=7"]
    whole, out = run(*options)
    losses = [line["loss"] for line in read_metrics(out / "metrics.jsonl")]
    assert sum(losses[-5:]) < 0.9 * sum(losses[:5])
    run(*options, "out=other", "train.steps=14")
    resumed, other = run(*options, "out=other", resume=True)
    assert_equal(weights(whole), weights(resumed))
    name = "step-00000020/optimizer.safetensors"
    assert (out / "checkpoints" / name).read_bytes() == (other / "checkpoints" / name).read_bytes()


def test_bf16_autocast_keeps_float32_state_and_trains(run):
    model, _ = run("train.dtype=bfloat16", "train.steps=20")
    full, _ = run("train.steps=20", "out=full")
    assert model.output.weight.dtype == torch.float32
    assert not torch.equal(model.output.weight, full.output.weight)
    torch.testing.assert_close(model.output.weight, full.output.weight, rtol=0, atol=0.05)


# --- callbacks


def test_evaluation_and_samples_see_the_average_and_disturb_nothing(run):
    plain, plain_out = run("out=plain", "train.steps=6")
    seen = []

    def evaluate(model):
        assert not model.training and not torch.is_grad_enabled()
        seen.append(weights(model))
        torch.manual_seed(0)
        torch.rand(17)
        return {"valid_bound": 4.0 - len(seen)}

    def sample(model):
        torch.rand(3)
        return {"samples": ["some text"]}

    model, out = run(
        "train.steps=6",
        periodic=[Periodic(every=4, run=evaluate), Periodic(every=3, run=sample)],
    )
    assert_equal(weights(model), weights(plain))
    average = load_file(checkpoint.latest(out) / checkpoint.AVERAGE)
    assert_equal(seen[-1], average)
    assert not torch.equal(average["output.weight"], model.output.weight)
    lines = read_metrics(out / "metrics.jsonl")
    assert [(n["step"], n["valid_bound"]) for n in lines if "valid_bound" in n] == [(4, 3), (6, 2)]
    assert [n["step"] for n in lines if "samples" in n] == [3, 6]
    assert checkpoint.read_state(checkpoint.latest(out)).best_bound == 2.0
    losses = [n["loss"] for n in lines if "loss" in n]
    assert losses == [n["loss"] for n in read_metrics(plain_out / "metrics.jsonl")]


def test_loggers_are_finished_when_the_run_fails(run):
    calls = []

    class Spy:
        def start(self, config, first_step):
            calls.append(("start", config["train"]["steps"], first_step))

        def log(self, step, values):
            if step == 2:
                raise RuntimeError("a logger broke")

        def finish(self):
            calls.append("finish")

    with pytest.raises(RuntimeError, match="a logger broke"):
        run(loggers=[Spy()])
    assert calls == [("start", 12, 1), "finish"]


# --- refusals


def test_an_out_that_holds_a_run_is_refused_with_both_ways_out(run):
    _, out = run()
    before = (out / "metrics.jsonl").read_bytes()
    with pytest.raises(UserError, match=r"already holds a run; .*--resume.*another out"):
        run()
    assert (out / "metrics.jsonl").read_bytes() == before


def test_nothing_to_resume_is_refused(run):
    with pytest.raises(UserError, match="holds no run to resume"):
        run(resume=True)


def test_an_out_that_is_a_file_is_refused(run, tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match="which is a file"):
        run("out=file")


def test_a_second_process_in_the_same_out_is_refused(run, tmp_path):
    (tmp_path / "run").mkdir()
    with checkpoint.claimed(tmp_path / "run"):
        (tmp_path / "run" / "config.yaml").write_text("{}")
        with pytest.raises(UserError, match="another process is training"):
            run(resume=True)


@pytest.mark.parametrize(
    ("vocab_size", "overrides", "message"),
    [
        (300, [], r"the model's vocab_size is 258, but the data's is 300"),
        (258, AR, r"objective\.name is bd3lm, but the network's objective is autoregressive"),
        (258, NAMES["sedd"], r"objective\.name is bd3lm, but the network's objective is score_en"),
    ],
)
def test_data_objective_and_model_must_fit(rows, recipe_file, vocab_size, overrides, message):
    recipe = load_recipe(recipe_file)
    with pytest.raises(UserError, match=message):
        loop.train(
            build_model(load_recipe(recipe_file, overrides), rows().manifest),
            rows(vocab_size=vocab_size),
            out=recipe_file.parent / "run",
            options=recipe.train,
            objective=recipe.objective,
            optim=recipe.optim,
            checkpoint=recipe.checkpoint,
        )
    assert not (recipe_file.parent / "run").exists()


# --- stopping


def poison(monkeypatch, step, micro_batch, value=math.nan):
    """Makes the loss of one micro-batch of one step `value`."""
    calls = []

    def poisoned(*batch):
        nats = masked_loss(*batch)
        calls.append(None)
        return nats * value if len(calls) == (step - 1) * 2 + micro_batch else nats

    monkeypatch.setattr(diffusions, "masked_loss", poisoned)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_non_finite_loss_stops_before_the_weights_are_touched(run, monkeypatch, value):
    poison(monkeypatch, step=8, micro_batch=2, value=value)
    with pytest.raises(UserError, match=r"step 8: the loss is \w+ in micro-batch 2 of 2 \(rows "):
        run("train.micro_batch_size=3")
    monkeypatch.undo()
    resumed, out = run("train.micro_batch_size=3", resume=True)
    whole, _ = run("train.micro_batch_size=3", "out=whole")
    assert_equal(weights(resumed), weights(whole))
    assert [n["step"] for n in read_metrics(out / "metrics.jsonl") if "loss" in n] == [
        *range(1, 13)
    ]


def test_a_non_finite_gradient_names_its_parameter(run, monkeypatch):
    real = loop.clip_gradients

    def clip(parameters, clip_norm):
        parameters = list(parameters)
        parameters[-1].grad[0] = math.inf
        return real(parameters, clip_norm)

    monkeypatch.setattr(loop, "clip_gradients", clip)
    message = (
        r"step 1: the loss is .* but the gradient of output\.bias is not finite.*no checkpoint"
    )
    with pytest.raises(UserError, match=message):
        run()


@pytest.mark.parametrize(
    ("name", "code", "overrides"),
    [("SIGINT", 130, []), ("SIGTERM", 143, []), ("SIGTERM", 143, AR)],
    ids=["INT", "TERM", "TERM-ar"],
)
def test_signals_finish_the_step_save_and_say_how_to_go_on(run, name, code, overrides):
    class Signal:
        def start(self, config, first_step): ...

        def log(self, step, values):
            if step == 7:
                os.kill(os.getpid(), getattr(signal, name))

        def finish(self): ...

    before = signal.getsignal(getattr(signal, name))
    message = rf"{name}: saved step 7 in .*; resume with: blockdiff train x --resume"
    with pytest.raises(Interrupted, match=message) as raised:
        run(*overrides, loggers=[Signal()], resume_command="blockdiff train x --resume")
    assert raised.value.exit_code == code
    assert signal.getsignal(getattr(signal, name)) is before
    resumed, out = run(*overrides, resume=True)
    whole, whole_out = run(*overrides, "out=whole")
    assert_equal(weights(resumed), weights(whole))
    losses = [n["loss"] for n in read_metrics(out / "metrics.jsonl") if "loss" in n]
    assert losses == [n["loss"] for n in read_metrics(whole_out / "metrics.jsonl")]
    for folder in ("checkpoints/step-00000012", "model"):
        for file in (whole_out / folder).glob("*.safetensors"):
            assert (out / folder / file.name).read_bytes() == file.read_bytes()


def test_metrics_are_cut_to_the_checkpoint_on_resume(run):
    _, out = run("train.steps=5")
    with open(out / "metrics.jsonl", "a") as file:
        file.write(json.dumps({"step": 6, "loss": 1.0}) + "\n" + '{"step": 7, "lo')
    run("train.steps=8", resume=True)
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "loss" in line] == [*range(1, 9)]
    assert lines[5] == {"step": 5, "note": "resumed from step 5"}
    assert lines[6]["loss"] != 1.0
    seconds = [line["seconds"] for line in lines if "seconds" in line]
    assert seconds == sorted(seconds)


def test_resuming_a_complete_run_changes_nothing(run):
    first, out = run()
    before = (out / "model" / "model.safetensors").read_bytes()
    (out / "model" / "model.safetensors").unlink()  # as if killed before the export
    again, _ = run(resume=True)
    assert_equal(weights(first), weights(again))
    assert (out / "model" / "model.safetensors").read_bytes() == before
    with pytest.raises(UserError, match=r"already made 12 steps; give a larger number"):
        run("train.steps=11", resume=True)


def test_the_released_model_is_the_average_with_its_tokenizer(run, prepared):
    _, out = run()

    released = load(out / "model")
    average = load_file(checkpoint.latest(out) / checkpoint.AVERAGE)
    assert_equal(weights(released), average)
    tokenizer = (prepared / "tokenizer" / "tokenizer.json").read_bytes()
    assert (out / "model" / "tokenizer.json").read_bytes() == tokenizer


def test_a_failed_evaluation_can_be_resumed_from(run):
    def evaluate(model):
        raise UserError("broken evaluation")

    with pytest.raises(UserError, match="broken evaluation"):
        run(periodic=[Periodic(every=6, run=evaluate)])
    resumed, _ = run(resume=True)
    whole, _ = run("out=whole")
    assert_equal(weights(resumed), weights(whole))


def test_no_share_of_a_peak_is_above_one(run, monkeypatch):
    """A peak that was measured beside other programs is given up, not divided by."""
    monkeypatch.setattr("blockdiffusion.train.speed.quick_peak", lambda *_: 1.0)
    _, out = run("train.steps=2")
    lines = [line for line in read_metrics(out / "metrics.jsonl") if "tflops_per_second" in line]
    assert len(lines) == 2 and not any("peak_share" in line for line in lines)
