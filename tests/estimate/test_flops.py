"""Operations against PyTorch's counter on the real network; sizes against its parameters."""

from collections.abc import Callable
from dataclasses import replace
from math import prod

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from blockdiffusion.data.loader import Batch
from blockdiffusion.diffusion.estimators import make_estimator
from blockdiffusion.diffusion.objectives import diffusion_of
from blockdiffusion.estimate.flops import (
    ATTENTION_BACKWARD,
    Pass,
    attention_pairs,
    call_flops,
    causal_pairs,
    forward_flops,
    muon_flops,
    training_flops,
)
from blockdiffusion.estimate.memory import cache_bytes, weight_bytes
from blockdiffusion.estimate.sizes import NetworkSizes
from blockdiffusion.models.attention import _flex_block_mask
from blockdiffusion.models.inference import optimize_for_inference
from blockdiffusion.models.lora import add_lora
from blockdiffusion.models.masks import Streams, dense_mask
from blockdiffusion.models.transformer import BlockDiffusionConfig, BlockDiffusionModel
from blockdiffusion.train.loss import BatchLoss, DiffusionLoss, NextTokenLoss
from tests.models.hugging_face import make_hugging_face

SIZES = {
    "vocab_size": 53,
    "hidden_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "cond_dim": 8,
}
AR = {"objective": "autoregressive", "adaln": False, "block_size": 1}
SEDD = {"objective": "score_entropy", "time_conditioning": True}
# (sizes, estimator)
CASES = [
    ({"seq_len": 64, "block_size": 4}, "count"),
    ({"seq_len": 192, "block_size": 16, "dropout": 0.0}, "complement"),
    ({"seq_len": 320, "block_size": 5}, "countx3"),
    ({"seq_len": 160, "block_size": 160}, "bernoulli"),
    ({"seq_len": 48, "block_size": 1}, "count"),
    ({"seq_len": 96, "block_size": 8, **SEDD}, "count"),
    ({"seq_len": 96, "block_size": 8, "adaln": False}, "count"),
    ({"seq_len": 192, **AR}, None),
    ({"seq_len": 64, **AR, "adaln": True, "dropout": 0.0}, None),
]
IDS = ["S=4", "S=16 N=2", "S=5 N=3", "S=L", "S=1", "time", "no adaLN", "causal", "causal adaLN"]


def network(sizes) -> tuple[BlockDiffusionModel, NetworkSizes]:
    torch.manual_seed(0)
    model = BlockDiffusionModel(BlockDiffusionConfig(**{**SIZES, **sizes})).train()
    return model, NetworkSizes.of(model)


def update(model, estimator, rows=2) -> tuple[BatchLoss, Pass]:
    """A loss of random rows, and the same as a `Pass`."""
    config = model.config
    draw = torch.Generator().manual_seed(1)
    ids_BL = torch.randint(0, config.vocab_size - 1, (rows, config.seq_len), generator=draw)
    free_BL = torch.ones_like(ids_BL, dtype=torch.bool)
    if estimator is None:
        loss: BatchLoss = NextTokenLoss(Batch(ids_BL, None), free_BL)
    else:
        law = diffusion_of(config).fitted(make_estimator(estimator))
        drawn = law(ids_BL, free_BL, config.block_size, config.mask_id, draw)
        loss = DiffusionLoss(Batch(ids_BL, None), drawn)
    return loss, Pass(rows=rows, scored=loss.num_scored, num_noisy=loss.num_noisy)


def counted(function: Callable[[], object]) -> int:
    """Operations that PyTorch counts. Its counter knows neither `addmm_` nor the CPU's fused
    attention. That of autoregressive rows is made of plain products here, and that of streams
    told: two products forward, five backward."""

    def attention(q, k, *_, **__):
        return 4 * prod(q) * k[-2]

    def attention_backward(_, *inputs, **__):
        return 5 * attention(*inputs) // 2

    fused = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    more = {
        torch.ops.aten.addmm_: lambda _, a, b, **__: 2 * a[0] * a[1] * b[1],
        fused: attention,
        torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: attention_backward,
    }
    with (
        sdpa_kernel(SDPBackend.MATH),
        FlopCounterMode(display=False, custom_mapping=more) as counter,
    ):
        function()
    return counter.get_total_flops()


@pytest.mark.parametrize(("sizes", "estimator"), CASES, ids=IDS)
def test_a_network_without_storage_has_the_same_sizes(sizes, estimator):
    model, sizes_ = network(sizes)
    state = torch.get_rng_state()
    assert NetworkSizes.of_config(model.full_config()) == sizes_
    assert torch.equal(torch.get_rng_state(), state)  # drawing it would shift what follows
    assert sizes_.parameters == sum(p.numel() for p in model.parameters())
    assert sizes_.layer_parameters == sum(p.numel() for p in model.backbone.layers[1].parameters())
    rest = sum(p.numel() for name, p in model.backbone.named_parameters()
               if not name.startswith(("embedding.", "output.")))  # fmt: skip
    assert sizes_.parameters - sizes_.embedding_parameters == rest
    assert sizes_.layer_numbers == 12 * 96**2


def close(sizes_, got, expected) -> bool:
    """Equal, or within 1 % where vectors of a conditioning pass through matrices of their own."""
    return got == expected if not sizes_.conditioning else got == pytest.approx(expected, rel=0.01)


@pytest.mark.parametrize("checkpointing", [False, True], ids=["", "checkpointing"])
@pytest.mark.parametrize(("sizes", "estimator"), CASES, ids=IDS)
def test_operations_of_training_are_those_that_are_counted(sizes, estimator, checkpointing):
    model, sizes_ = network(sizes)
    model.backbone.activation_checkpointing = checkpointing
    loss, p = update(model, estimator)
    again = 0.0
    if sizes_.autoregressive:  # plain products compute all pairs of a row, and make no score twice
        p = replace(p, attention="dense")
        again = (ATTENTION_BACKWARD - 2) * forward_flops(sizes_, p).attention
    got = counted(lambda: loss.nats(model, slice(0, 2)).backward())
    whole = training_flops(sizes_, p, checkpointing=checkpointing)
    assert close(sizes_, got, whole.total - again)
    assert whole.attention_needed <= whole.attention


@pytest.mark.parametrize(("sizes", "estimator"), CASES[:4], ids=IDS[:4])
def test_operations_of_a_forward_pass_are_those_that_are_counted(sizes, estimator):
    model, sizes_ = network(sizes)
    loss, p = update(model, estimator)
    corrupted = loss.corrupted
    clean_BL = loss.batch.ids_BL if sizes_.has_clean else None

    def score():
        scored_BNL = corrupted.weight_BNL > 0
        return model.head(model.encode(corrupted.noisy_BNL, clean_BL, scored_BNL=scored_BNL))

    with torch.no_grad():
        assert close(sizes_, counted(score), forward_flops(sizes_, p).total)


@pytest.mark.parametrize("kind", ["block", "causal"])
@pytest.mark.parametrize(
    ("length", "size", "copies"),
    [(256, 4, 1), (384, 16, 2), (300, 5, 1), (256, 256, 1), (512, 64, 3)],
)
def test_pairs_are_those_of_the_mask(length, size, copies, kind):
    streams = Streams(length, size, copies, size < length, kind)
    seen = dense_mask(streams)
    noisy, clean = seen[: copies * length], seen[copies * length :]
    assert attention_pairs(streams, "needed") == (int(noisy.sum()), int(clean.sum()))
    assert sum(attention_pairs(streams, "dense")) == seen.numel()
    for faster in ("chunked", "flex"):
        assert sum(attention_pairs(streams, faster)) >= int(seen.sum())


@pytest.mark.parametrize(
    ("length", "size", "copies"), [(256, 4, 1), (384, 16, 2), (256, 256, 1), (512, 64, 3)]
)
def test_tiles_are_those_of_flex_attention(length, size, copies):
    streams = Streams(length, size, copies, size < length)
    mask = _flex_block_mask(streams, streams.num_tokens, torch.device("cpu"))
    tiles = int(mask.kv_num_blocks.sum())
    if mask.full_kv_num_blocks is not None:
        tiles += int(mask.full_kv_num_blocks.sum())
    assert sum(attention_pairs(streams, "flex")) == tiles * 128**2


def test_pairs_of_a_causal_row():
    assert causal_pairs(300, "needed") == sum(range(1, 301)) and causal_pairs(300, "dense") == 90000
    assert causal_pairs(300, "causal") == 128 * 128 + 128 * 256 + 44 * 300


@pytest.mark.parametrize("sizes", [{"block_size": 4}, {"block_size": 4, **SEDD}, AR])
def test_operations_of_a_call_are_those_that_are_counted(sizes):
    model, sizes_ = network({"seq_len": 64, **sizes})
    model = optimize_for_inference(model.double())  # whose products are plain ones in float64
    size, rows, past, scored = sizes_.block_size, 3, 12, 2
    ids = torch.zeros(rows, past, dtype=torch.long)
    with torch.no_grad():
        cache = model.make_cache(rows, 64)
        if sizes_.autoregressive:
            model.decode_causal(ids, cache)
        else:
            model.decode(ids, past, cache)
        cache.commit(past)

        def call():
            if sizes_.autoregressive:
                hidden = model.decode_causal(ids[:, :1], cache)
                return model.head(hidden[:1, -1:].expand(1, scored, -1))
            both = ids[:, : 2 * size]  # a commit rides on it
            wanted = (torch.tensor([0, 2]), torch.tensor([size, size + 1]))
            return model.head(
                model.decode(both, size, cache, sigma_B=torch.ones(rows), wanted=wanted)
            )

        tokens = 1 if sizes_.autoregressive else 2 * size
        expected = call_flops(sizes_, rows, tokens, past + tokens, scored)
        got = counted(call)
        assert got == expected.total or (
            sizes_.time_conditioning and got == pytest.approx(expected.total, rel=0.01)
        )


@pytest.mark.parametrize("sizes", [{}, {"adaln": False}, {"time_conditioning": True}, AR])
def test_bytes_of_weights_and_cache(sizes):
    """Those of the copy that samples; norms and biases that are folded away are less than 1 %."""
    model, sizes_ = network({"seq_len": 32, "block_size": 4, **sizes})
    copied = optimize_for_inference(model.double())  # float64 is not packed
    for dtype, kind in (("float32", torch.float32), ("bfloat16", torch.bfloat16)):
        model.to(kind)
        held = sum(p.numel() * kind.itemsize for p in copied.parameters())
        whole, read = weight_bytes(sizes_, dtype)
        assert whole == pytest.approx(held, rel=0.01)
        assert whole - read == model.backbone.embedding.weight.nbytes
        cache = model.make_cache(5, 20)
        held = sum(x.nbytes for x in (*cache.keys, *cache.values))
        assert 5 * 20 * cache_bytes(sizes_, dtype) == held
    assert cache_bytes(sizes_, "int8") == cache_bytes(sizes_, "float32")
    linear = [m.weight for name, m in copied.named_modules()
              if isinstance(m, torch.nn.Linear) and "time" not in name
              and "modulation" not in name]  # fmt: skip
    saved = sum(3 * weight.numel() for weight in linear)
    assert weight_bytes(sizes_, "int8")[1] == weight_bytes(sizes_, "float32")[1] - saved


@pytest.mark.parametrize("family", ["llama", "gemma2"])
@pytest.mark.parametrize("tokens", [0, 8])
def test_any_backbone_can_be_estimated(family, tokens):
    """Networks of transformers: sizes, and the operations of training and of a call.

    Beside what the formulas know, PyTorch counts the product that makes rotary angles."""
    model = make_hugging_face(family, vocab_size=53, seq_len=64, block_size=4)
    network = model.backbone.model
    sizes_ = NetworkSizes.of(model)
    assert NetworkSizes.of(model.with_backbone(model.backbone.empty_copy())) == sizes_
    assert sizes_.parameters == network.num_parameters()
    layers = list(network.base_model.layers[1].parameters())
    assert sizes_.layer_parameters == sum(p.numel() for p in layers)
    assert sizes_.layer_numbers == 16 * (16 + 8 + 8 + 16) + 3 * 16 * 32
    assert sizes_.cache_width == 2 * 2 * 4 and sizes_.conditioning == 0
    assert sizes_.tied == network.config.tie_word_embeddings
    ends = (1 if sizes_.tied else 2) * 53 * 16
    assert sizes_.embedding_parameters == ends
    angles = 2 * network.config.head_dim // 2
    if not tokens:
        loss, p = update(model, "complement")
        p = replace(p, attention="chunked" if family == "llama" else "dense")
        model.train()
        got = counted(lambda: loss.nats(model, slice(0, 2)).backward())
        # The written softmax of soft-capped scores keeps them: two products backward.
        again = 0.5 * forward_flops(sizes_, p).attention if family == "gemma2" else 0
        read = p.rows * p.tokens(sizes_)
        expected = training_flops(sizes_, p).total - again
        assert expected <= got <= expected + angles * read
    else:
        cache = model.make_cache(3, 64)
        ids = torch.zeros(3, tokens, dtype=torch.long)
        wanted = (torch.tensor([0, 2]), torch.tensor([4, 5]))
        with torch.no_grad():
            got = counted(lambda: model.head(model.decode(ids, 4, cache, wanted=wanted)))
        expected = call_flops(sizes_, 3, tokens, tokens, 2).total
        assert expected <= got <= expected + angles * 3 * tokens


def test_muon_is_five_rounds_of_three_products():
    torch.manual_seed(0)
    shapes = [(16, 48), (48, 16), (16, 16)]
    matrices = [torch.nn.Parameter(torch.randn(shape)) for shape in shapes]
    for matrix in matrices:
        matrix.grad = torch.randn_like(matrix)
    got = counted(torch.optim.Muon(matrices).step)
    assert got == muon_flops(shapes)


@pytest.mark.parametrize("kind", ["LoRA", "frozen layer", "frozen output"])
def test_what_is_frozen_needs_no_gradient(kind):
    """Of a product with frozen weights the gradient is one product; of those below everything that
    is trained it is none, which the formula does not look at."""
    model = make_hugging_face(
        "llama", vocab_size=53, seq_len=64, block_size=4, reading="next", clean_attention="causal"
    )
    network = model.backbone.model
    if kind == "LoRA":
        add_lora(network, rank=4, alpha=8, dropout=0.0, mask_id=52, parent="", fingerprint="")
    frozen = {"LoRA": (), "frozen layer": network.base_model.layers[1].parameters(),
              "frozen output": [network.get_output_embeddings().weight]}  # fmt: skip
    for parameter in frozen[kind]:
        parameter.requires_grad_(False)
    sizes_ = NetworkSizes.of(model)
    trained = [p for p in network.parameters() if p.requires_grad]
    assert sizes_.trained_parameters == sum(p.numel() for p in trained) < sizes_.parameters
    loss, p = update(model, "complement")
    model.train()
    got = counted(lambda: loss.nats(model, slice(0, 2)).backward())
    read = p.rows * p.tokens(sizes_)
    expected = training_flops(sizes_, replace(p, attention="chunked")).total
    assert got == pytest.approx(expected, rel=0.02), (got - expected) / read
