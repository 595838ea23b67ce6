"""Block diffusion around networks of transformers: the same tests as for the paper's network."""

import copy
import itertools
import math

import pytest
import torch
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

import blockdiffusion
from blockdiffusion import likelihood
from blockdiffusion.diffusion.config import DiffusionConfig
from blockdiffusion.diffusion.denoiser import masked_loss, masked_nll
from blockdiffusion.errors import UserError
from blockdiffusion.models.causal_lm import CausalLM, adapted_model
from blockdiffusion.models.inference import optimize_for_inference
from blockdiffusion.sampling import Engine, Finished, generate
from tests.models.hugging_face import FAMILIES, SIZES, make_causal_lm, make_hugging_face
from tests.oracles import mask_by_loops, subs_log_prob
from tests.sampling.laws import DRAWS, FALSE_ALARM, p_value, seeded

TOLERANCE = 2e-6  # norms of transformers are computed in float32
READINGS = ("same", "next", "shifted")
CLEAN = ("block", "causal")
ALL = [*FAMILIES, "llada2_moe"]


def plain(model):
    """The network as transformers runs it."""
    network = copy.deepcopy(model.backbone.model)
    network.set_attn_implementation("eager")
    return network


def masked_logits(model, ids_T, positions_T, mask_TT):
    """Logits (T, V) of one row under any mask, by transformers alone."""
    network = plain(model)
    windows = set(model.backbone.attention.windows) - {None}
    window = windows.pop() if windows else None
    near_TT = positions_T[:, None] - positions_T < (window or math.inf)
    hidden = torch.finfo(torch.float64).min

    def added(mask):
        return torch.zeros(mask.shape, dtype=torch.float64).masked_fill(~mask, hidden)[None, None]

    masks = added(mask_TT & near_TT)
    if "layer_types" in network.config.to_dict() and window is not None:
        masks = {"full_attention": added(mask_TT), "sliding_attention": masks}
    with torch.no_grad():
        return network(ids_T[None], attention_mask=masks, position_ids=positions_T[None]).logits[0]


def delayed(ids, start):
    return torch.cat([torch.tensor([start]), ids[:-1]])


def expected_logits(model, noisy_L, clean_L):
    """Logits at the noisy positions, from the definition of the streams."""
    config, length = model.config, len(clean_L)
    if config.reading == "next":
        clean_in, noisy_in = delayed(clean_L, config.mask_id), delayed(noisy_L, config.mask_id)
        firsts = slice(None, None, config.block_size)
        noisy_in[firsts] = clean_in[firsts]
    else:
        clean_in, noisy_in = clean_L, noisy_L
    mask = mask_by_loops(length, config.block_size, 1, config.clean_attention)
    if config.block_attention == "causal":
        mask[:length, :length] &= torch.ones(length, length).tril().bool()
    positions = torch.arange(length).repeat(2)
    logits = masked_logits(model, torch.cat([noisy_in, clean_in]), positions, mask)
    if config.reading != "shifted":
        return logits[:length]
    # Each token is predicted one row before: the clean one before a block, itself before the text.
    rows = [
        max(0, token - 1) + (token > 0 and token % config.block_size == 0) * length
        for token in range(length)
    ]
    return logits[rows]


KINDS = [
    *(f"llama-{reading}-{clean}-full" for reading in READINGS for clean in CLEAN),
    *("gemma2-same-block-full", "gemma2-next-block-causal"),
    *("gemma2-shifted-block-full", "llama-shifted-block-full", "llama-shifted-causal-causal"),
    *(f"{family}-next-causal-causal" for family in FAMILIES),
    *(f"{family}-next-causal-full" for family in FAMILIES if family != "llama"),
    *("llada2_moe-same-block-full", "llada2_moe-next-causal-causal"),
]


@pytest.fixture(params=KINDS)
def model(request):
    family, reading, clean_attention, block_attention = request.param.split("-")
    return make_hugging_face(
        family, reading=reading, clean_attention=clean_attention, block_attention=block_attention
    )


def half_masked(clean, mask_id, seed=3):
    generator = torch.Generator().manual_seed(seed)
    return clean.masked_fill(torch.rand(clean.shape, generator=generator) < 0.5, mask_id)


@torch.no_grad()
@pytest.mark.parametrize("backend", ["dense", "chunked"])
def test_streams_are_those_of_the_definition(model, random_ids, backend):
    clean = random_ids(2, 16)
    noisy = half_masked(clean, 12)
    model.attention_backend = backend
    found = model.denoise_logits(noisy, clean)
    for row in range(2):
        expected = expected_logits(model, noisy[row], clean[row])
        assert (found[row] - expected).abs().max() < TOLERANCE
    padded = torch.cat([clean[:, :12], torch.full((2, 4), 12)], 1)
    valid = (torch.arange(16) < 12).expand(2, -1)
    part = model.encode(half_masked(padded, 12)[:, None], padded, valid_BL=valid)[:, :, :12]
    alone = model.encode(half_masked(padded, 12)[:, None, :12], padded[:, :12])
    assert (part - alone).abs().max() < TOLERANCE


@torch.no_grad()
@pytest.mark.parametrize("window", [None, 8])
def test_the_cache_gives_what_streams_give(model, random_ids, window):
    """Block by block, commits fused, rows of one length, of several, and ragged."""
    clean = random_ids(3, 16)
    noisy = half_masked(clean, 12)
    cache, ragged = model.make_cache(3, 16), model.make_cache(3, 16)
    for block in range(4):
        start, stop = max(0, 4 * block - 4), 4 * block + 4
        pending = stop - start - 4
        ids = torch.cat([clean[:, start : 4 * block], noisy[:, 4 * block : stop]], 1)
        hidden = model.decode(ids, pending, cache, window)[:, -4:]
        cache.commit(pending)
        if window is None:
            wanted = model.denoise_logits(noisy, clean)[:, 4 * block : stop]
            assert (model.head(hidden) - wanted).abs().max() < TOLERANCE
        tokens = torch.full((3,), ids.shape[1])
        found = model.decode_ragged(ids.flatten(), tokens, tokens - 4, ragged, window)
        ragged.commit(pending)
        assert (found.view(3, -1, found.shape[-1])[:, -4:] - hidden).abs().max() < TOLERANCE
    lengths = torch.tensor([0, 4, 12])
    cache, apart = model.make_cache(3, 16), model.make_cache(3, 16)
    model.decode(clean[:, :12], 12, cache, window)
    cache.commit(lengths)
    blocks = torch.stack([noisy[row, at : at + 4] for row, at in enumerate(lengths.tolist())])
    together = model.decode(blocks, 0, cache, window)
    none = torch.zeros(0, dtype=torch.long)
    pieces = torch.cat([clean[row, :at] for row, at in enumerate(lengths.tolist())])
    model.decode_ragged(pieces, lengths, lengths, apart, window, wanted_M=none)
    apart.commit(lengths)
    four = torch.full((3,), 4)
    found = model.decode_ragged(blocks.flatten(), four, four - 4, apart, window)
    assert (found.view(together.shape) - together).abs().max() < TOLERANCE


@pytest.mark.parametrize("family", ALL)
def test_single_token_blocks_with_the_next_reading_are_the_causal_model(family, random_ids):
    """Delayed inputs and S = 1: exactly what the network was, with a start symbol in front."""
    model = make_hugging_face(family, block_size=1, reading="next", start_id=0)
    ids = random_ids(2, 16)
    read = torch.cat([torch.zeros(2, 1, dtype=torch.long), ids[:, :-1]], 1)
    with torch.no_grad():
        logits = plain(model)(read).logits
    log_prob = subs_log_prob(logits, 12).gather(-1, ids[..., None])[..., 0]
    found = likelihood(model, ids, estimator="exact")
    assert not found.is_bound
    assert math.isclose(found.nats_per_token, -float(log_prob.mean()), abs_tol=TOLERANCE)


@torch.no_grad()
@pytest.mark.parametrize("clean_attention", CLEAN)
def test_single_token_blocks_with_the_shifted_reading_are_the_causal_model(
    clean_attention, random_ids
):
    """S = 1: each token but the first one is predicted by the clean row before it."""
    model = make_hugging_face(
        "llama", block_size=1, reading="shifted", clean_attention=clean_attention
    )
    ids = random_ids(2, 16)
    log_prob = subs_log_prob(plain(model)(ids).logits[:, :-1], 12)
    expected = -log_prob.gather(-1, ids[:, 1:, None])[..., 0]
    masked = torch.full_like(ids, 12)[:, None]
    found = masked_nll(model, masked, ids, torch.ones_like(masked, dtype=torch.bool))[:, 0]
    assert (found[:, 1:] - expected).abs().max() < TOLERANCE


@torch.no_grad()
@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_the_clean_stream_of_the_shifted_reading_predicts_next_tokens(family, random_ids):
    """Scored as a copy more, see `encode`: from the clean row before each token but the first."""
    model = make_hugging_face(family, reading="shifted", clean_attention="causal")
    ids, length = random_ids(1, 16), 16
    noisy = half_masked(ids, 12)
    scored = torch.zeros(1, 2, length, dtype=torch.bool)
    scored[:, 1, 1:] = True
    found = model.head(model.encode(noisy[:, None], ids, scored_BNL=scored))
    expected = plain(model)(ids).logits[0, :-1]
    assert (found - expected).abs().max() < TOLERANCE


@pytest.mark.parametrize(
    ("family", "reading"),
    [
        ("llama", "next"),
        ("gemma2", "same"),
        ("llama", "shifted"),
        *(
            pytest.param(*kind, marks=pytest.mark.slow)
            for kind in (
                ("llama", "same"),
                ("gemma2", "next"),
                ("gemma2", "shifted"),
                ("llada2_moe", "same"),
            )
        ),
    ],
)
def test_samples_have_the_law_that_likelihood_says(family, reading):
    """All texts of four tokens: exact probabilities sum to 1, and samples have them (chi-square,
    false alarm 1e-4), with the cache, without, through the copy for sampling, and the engine."""
    model = make_hugging_face(
        family, vocab_size=4, seq_len=4, block_size=2, reading=reading, eos_id=None
    )
    texts = list(itertools.product(range(3), repeat=4))
    exact = likelihood(model, torch.tensor(texts), estimator="exact")
    nll = torch.as_tensor(exact.exact_nats_per_row, dtype=torch.float64)
    law = dict(zip(texts, (-nll).exp().tolist(), strict=True))
    options = dict(max_new_tokens=4, bos=False, eos=False)
    for other in (model, optimize_for_inference(model)):
        for cache in (True, False):
            made = generate(
                other, num_samples=DRAWS // 2, generator=seeded(), use_cache=cache, **options
            )
            assert p_value(made, law) > FALSE_ALARM


@pytest.mark.parametrize("reading", ["next", "shifted"])
@pytest.mark.parametrize("options", [{}, dict(sampler="confidence", threshold=0.3)])
def test_the_engine_writes_what_generate_writes(reading, options):
    model = make_hugging_face("llama", reading=reading, bos=False, eos_id=None)
    prompts = [[1, 2, 3, 4, 5], [], [7] * 9, [3]]
    engine = Engine(model, max_rows=2)
    requests = [
        engine.submit(prompt, max_new_tokens=9, eos=False, seed=number, **options)
        for number, prompt in enumerate(prompts)
    ]
    ended = {event.row: event.ids for event in engine.run() if isinstance(event, Finished)}
    for number, (prompt, request) in enumerate(zip(prompts, requests, strict=True)):
        alone = generate(model, [prompt], max_new_tokens=9, eos=False, seed=number, **options)
        assert ended[request] == alone.sequences[0].tolist()


@pytest.mark.parametrize("reading", READINGS)
def test_the_training_loss_has_the_gradient_of_the_dense_oracle(reading, random_ids):
    clean = random_ids(2, 16)
    scored = torch.rand(2, 2, 16, generator=torch.Generator().manual_seed(1)) < 0.5
    noisy = clean[:, None].expand(2, 2, 16).masked_fill(scored, 12)
    weight = torch.rand(scored.shape, generator=torch.Generator().manual_seed(2)).double()
    gradients = []
    for backend in ("dense", "chunked"):
        model = make_hugging_face("llama", reading=reading)
        model.attention_backend = backend
        loss = masked_loss(model, noisy, clean, scored, weight)
        terms = masked_nll(model, noisy, clean, scored)
        assert torch.allclose(loss, (terms * weight).sum(), rtol=1e-5)
        loss.backward()
        gradients.append([p.grad for p in model.parameters()])
    for one, two in zip(*gradients, strict=True):
        assert torch.allclose(one, two, atol=1e-5)


@torch.no_grad()
def test_a_token_changes_only_what_the_mask_allows(model, random_ids):
    """Logits of a block depend on earlier clean tokens and on the block itself, on nothing else."""
    clean = random_ids(1, 16)
    noisy = half_masked(clean, 12)
    before = model.denoise_logits(noisy, clean)
    changed = clean.clone()
    changed[:, 8:] = (changed[:, 8:] + 1) % 12
    after = model.denoise_logits(noisy, changed)
    assert (after - before)[:, :12].abs().max() < 1e-12
    assert (after - before)[:, 12:].abs().max() > 1e-6
    other = noisy.clone()
    other[:, :4] = (other[:, :4] + 1) % 13
    assert (model.denoise_logits(other, clean) - before)[:, 4:].abs().max() < 1e-12


def test_the_wrapper_is_public():
    assert blockdiffusion.BlockDiffusion and blockdiffusion.DiffusionConfig


def gradients(model, random_ids):
    clean = random_ids(2, 16)
    scored = torch.rand(2, 1, 16, generator=torch.Generator().manual_seed(1)) < 0.5
    noisy = clean[:, None].masked_fill(scored, 12)
    masked_loss(model, noisy, clean, scored, scored.double()).backward()
    return [parameter.grad for parameter in model.parameters()]


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3_text", "llada2_moe"])
def test_activations_can_be_computed_again(family, random_ids):
    model = make_hugging_face(family)
    kept = gradients(model, random_ids)
    model.zero_grad()
    model.backbone.activation_checkpointing = True
    again = gradients(model.train(), random_ids)  # transformers does so in training only
    assert all(torch.equal(one, two) for one, two in zip(kept, again, strict=True))
    passes = []
    for name, module in model.backbone.named_modules():
        if name.endswith(("self_attn", ".attn", ".attention")):
            module.register_forward_pre_hook(lambda *_: passes.append(1))
    gradients(model, random_ids)
    assert len(passes) == 2 * len(model.backbone.units())


def test_a_family_that_hands_no_keywords_down_keeps_its_activations():
    with pytest.raises(UserError, match=r"train\.activation_checkpointing=false"):
        make_hugging_face("stablelm").backbone.activation_checkpointing = True


@torch.no_grad()
@pytest.mark.parametrize("family", ALL)
def test_layers_matrices_and_empty_copies(family, random_ids):
    model = make_hugging_face(family)
    backbone = model.backbone
    units, matrices = backbone.units(), backbone.hidden_matrices()
    assert len(units) == 2 and len({id(m) for m in matrices}) == len(matrices) >= 8
    assert not {id(m) for m in matrices} & {id(backbone.output.weight)}
    empty = backbone.empty_copy()
    assert all(parameter.is_meta for parameter in empty.parameters())
    empty.load_state_dict(backbone.state_dict(), assign=True)
    ids = random_ids(2, 16)
    found = model.with_backbone(empty.eval()).denoise_logits(ids, ids)
    assert torch.equal(found, model.denoise_logits(ids, ids))


OTHERS = {
    "bloom": (dict(hidden_size=16, n_layer=2, n_head=2), "0 times instead of once each"),
    "falcon": (dict(hidden_size=16, num_hidden_layers=2, num_attention_heads=2), "0 times"),
    "gpt_neo": (
        dict(hidden_size=16, num_layers=2, num_heads=2, attention_types=[[["global"], 2]]),
        "0 times",
    ),
    "mamba": (dict(hidden_size=16, num_hidden_layers=2, state_size=4), "0 times"),
    "diffllama": (SIZES, "4 times"),
    "gpt_oss": ({**SIZES, "num_local_experts": 2, "num_experts_per_tok": 1}, "takes s_aux"),
    "lfm2": ({**SIZES, "layer_types": ["conv", "full_attention"]}, "instead of once each"),
    "llama": (
        {**SIZES, "rope_parameters": dict(rope_type="dynamic", factor=2.0, rope_theta=1e4)},
        "depend on the length",
    ),
}


@pytest.mark.parametrize("family", OTHERS)
def test_what_cannot_be_a_backbone_is_refused_in_a_sentence(family):
    sizes, reason = OTHERS[family]
    network = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, vocab_size=13, **sizes))
    with pytest.raises(UserError, match=f"cannot become a block diffusion model: .*{reason}"):
        CausalLM(network)


def test_a_network_without_an_output_layer_is_refused():
    network = AutoModel.from_config(AutoConfig.for_model("llama", vocab_size=13, **SIZES))
    with pytest.raises(UserError, match="no output layer"):
        CausalLM(network)


def test_tokens_that_reach_each_other_past_attention_are_found():
    """A layer that adds the token before: causal logits are right, but streams are not."""
    network = make_causal_lm("llama")

    def mix(module, inputs, output):
        return output + 0.1 * output.roll(1, dims=1)

    network.model.layers[0].mlp.register_forward_hook(mix)
    config = DiffusionConfig(vocab_size=13, seq_len=16, block_size=4, mask_id=12)
    with pytest.raises(UserError, match="by another way than attention"):
        adapted_model(network, config)


def test_a_network_that_was_given_away_says_so():
    model = make_hugging_face("llama")
    with pytest.raises(UserError, match="attends through the block diffusion model around it"):
        model.backbone.model(input_ids=torch.zeros(1, 4, dtype=torch.long))


def test_the_vocabulary_is_that_of_the_embeddings():
    config = DiffusionConfig(vocab_size=14, seq_len=16, block_size=4, mask_id=13)
    with pytest.raises(UserError, match="has 13 embeddings, but vocab_size is 14"):
        adapted_model(make_causal_lm("llama"), config)
