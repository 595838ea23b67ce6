import pytest
import torch

from blockdiffusion.errors import UserError
from blockdiffusion.models import attention
from blockdiffusion.models.attention import attend, attend_cached, resolve_backend
from blockdiffusion.models.masks import Streams, dense_mask

TOLERANCE = 1e-12  # float64


def tensors(streams, batch=2, heads=2, width=8, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shape = (batch, heads, streams.num_tokens, width)
    return [torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(3)]


def by_loops(q, k, v, streams, valid=None):
    """Softmax over the visible keys, one query at a time."""
    mask = dense_mask(streams)
    out = torch.empty_like(q)
    for b in range(q.shape[0]):
        for i in range(q.shape[2]):
            keys = mask[i].clone()
            if valid is not None:
                copies = streams.num_tokens // streams.seq_len
                keys &= valid[b].repeat(copies)
                keys[i] = True
            for h in range(q.shape[1]):
                scores = k[b, h, keys] @ q[b, h, i] / q.shape[-1] ** 0.5
                out[b, h, i] = scores.softmax(0) @ v[b, h, keys]
    return out


LAYOUTS = [
    Streams(16, 4),
    Streams(16, 1),
    Streams(12, 3, num_noisy=3),
    Streams(16, 4, num_noisy=2, clean_attention="causal"),
    Streams(8, 8, num_noisy=2, has_clean=False),
    Streams(8, 8),
]


@pytest.mark.parametrize("streams", LAYOUTS, ids=str)
@pytest.mark.parametrize("padded", [False, True])
def test_all_backends_equal_the_loop(streams, padded):
    q, k, v = tensors(streams)
    valid = None
    if padded:
        valid = torch.arange(streams.seq_len) < torch.tensor([[streams.seq_len - 3], [2]])
    expected = by_loops(q, k, v, streams, valid)
    for backend in ("dense", "chunked", "flex"):
        out = attend(q, k, v, streams, backend, valid)
        assert (out - expected).abs().max() < TOLERANCE, backend


@pytest.mark.parametrize("streams", LAYOUTS, ids=str)
@pytest.mark.parametrize("padded", [False, True])
def test_noisy_queries_alone_give_the_same(streams, padded):
    q, k, v = tensors(streams)
    noisy = streams.num_noisy * streams.seq_len
    valid = torch.arange(streams.seq_len)[None] < torch.tensor([[5], [3]]) if padded else None
    for backend in ("dense", "chunked", "flex"):
        whole = attend(q, k, v, streams, backend, valid)[:, :, :noisy]
        part = attend(q[:, :, :noisy], k, v, streams, backend, valid)
        assert (whole - part).abs().max() < TOLERANCE, backend


@pytest.mark.parametrize("written_out", [False, True], ids=["CPU", "elsewhere"])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize(
    "streams",
    [
        Streams(40, 4),
        Streams(40, 2, num_noisy=2),
        Streams(40, 20),
        Streams(40, 5, clean_attention="causal"),
        Streams(20, 20, num_noisy=2, has_clean=False),
    ],
    ids=str,
)
def test_chunks_smaller_than_the_sequence(streams, padded, written_out, monkeypatch):
    """Chunk borders must not show: 8-token chunks over 40 tokens, forward and backward; with the
    CPU's kernel and with plain products."""
    monkeypatch.setattr(attention, "CHUNK", 8)
    if written_out:
        monkeypatch.setattr(attention, "_flash", attention._written_out)
        monkeypatch.setattr(attention, "_flash_backward", attention._written_out_backward)
    valid = None
    if padded:  # also before the text, so that noisy tokens see no clean one
        place = torch.arange(streams.seq_len)
        valid = torch.stack([place < streams.seq_len - 3, place >= 11])
    gradients = []
    for backend in ("dense", "chunked"):
        inputs = [x.requires_grad_() for x in tensors(streams)]
        out = attend(*inputs, streams, backend, valid)
        weight = torch.linspace(-1, 1, out.numel(), dtype=torch.float64).view(out.shape)
        (out * weight).sum().backward()
        gradients.append([out.detach(), *(x.grad for x in inputs)])
    for dense, chunked in zip(*gradients, strict=True):
        assert (dense - chunked).abs().max() < 1e-10


def test_chunked_attention_keeps_its_inputs_and_output_only():
    """Of no chunk a copy: a gigabyte of them at the paper's sizes."""
    streams, kept = Streams(512, 4), []
    inputs = [x.requires_grad_() for x in tensors(streams)]
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        out = attend(*inputs, streams, "chunked")
    numbers = {t.untyped_storage().data_ptr(): t.numel() for t in kept}
    assert sum(numbers.values()) == 4 * out.numel() + out[..., 0].numel()


def test_cached_attention_equals_the_formula():
    generator = torch.Generator().manual_seed(1)
    q, k, v = (torch.randn(2, 2, n, 4, generator=generator).double() for n in (3, 7, 7))
    mask = torch.rand(2, 3, 7, generator=generator) < 0.6
    mask[..., 0] = True
    scores = (q @ k.transpose(-1, -2) / 2).masked_fill(~mask[:, None], float("-inf"))
    assert (attend_cached(q, k, v, mask) - scores.softmax(-1) @ v).abs().max() < TOLERANCE


def test_backends_are_resolved_by_device_and_unknown_ones_refused():
    assert resolve_backend(None, torch.device("cpu")) == "chunked"
    assert resolve_backend(None, torch.device("cuda")) == "flex"
    assert resolve_backend("dense", torch.device("cuda")) == "dense"
    with pytest.raises(UserError, match="dense, chunked, flex"):
        resolve_backend("flash", torch.device("cpu"))


def test_a_padded_pass_builds_its_block_masks_once(make_model, random_ids, monkeypatch):
    """Not in every layer: one for the layers, and one for the last, where only noisy tokens ask."""
    made = []
    module = torch.nn.attention.flex_attention
    original = module.create_block_mask
    monkeypatch.setattr(
        module, "create_block_mask", lambda *a, **k: made.append(a[3]) or original(*a, **k)
    )
    model, ids = make_model(num_hidden_layers=4), random_ids(2, 16)
    noisy = ids[:, None].masked_fill(ids[:, None] % 3 == 0, model.config.mask_id)
    results = []
    for backend, length in (("flex", 9), ("flex", 12), ("dense", 9), ("dense", 12)):
        model.attention_backend = backend
        valid = torch.arange(16)[None] < torch.tensor([[16], [length]])
        with torch.no_grad():
            results.append(model.encode(noisy, ids, valid_BL=valid))
    assert made == [32, 16] * 2  # anew for every pass
    assert torch.allclose(results[0], results[2], atol=1e-9)
    assert torch.allclose(results[1], results[3], atol=1e-9)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.bfloat16, 3e-2)])
@pytest.mark.parametrize("size", [1, 4, 8, 16, 128, 1024])
def test_flex_on_cuda_equals_dense(size, dtype, tolerance):
    streams = Streams(1024, size)
    inputs = [x.to("cuda", dtype) for x in tensors(streams, width=64)]
    results = []
    for backend in ("dense", "flex"):
        leaves = [x.clone().requires_grad_() for x in inputs]
        out = attend(*leaves, streams, backend)
        out.float().square().mean().backward()
        results.append([out, *(x.grad for x in leaves)])
    for dense, flex in zip(*results, strict=True):
        assert (dense - flex).abs().max() < tolerance * dense.abs().max().clamp(min=1)


def test_bf16_on_a_cpu_is_attended_to_in_float32():
    """Within the rounding of bf16 of the exact value, and with gradients."""
    streams = Streams(16, 4, 1, True, "block")
    draw = torch.Generator().manual_seed(0)
    q, k, v = torch.randn(3, 1, 2, 32, 8, generator=draw).bfloat16().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        found = attend(q, k, v, streams, "chunked")
    exact = attend(q.double(), k.double(), v.double(), streams, "dense")
    assert found.dtype == torch.bfloat16
    assert (found.double() - exact).abs().max() < 2**-8 * exact.abs().max()
    (gradient,) = torch.autograd.grad(found.float().square().sum(), v)
    assert gradient.isfinite().all() and gradient.abs().sum() > 0
