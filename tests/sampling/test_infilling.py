"""Infilling: given tokens anywhere, against enumerated laws and the sampler without a cache."""

import itertools

import pytest
import torch

import blockdiffusion
from blockdiffusion.errors import UserError
from blockdiffusion.sampling import infill
from blockdiffusion.sampling.infilling import prepare_templates
from tests.models.hugging_face import make_hugging_face
from tests.oracles import subs_log_prob
from tests.sampling.laws import DRAWS, FALSE_ALARM, p_value, seeded


@torch.no_grad()
def marginals(model, row, mask):
    """p(x_i | row) at every position, (T, V)."""
    ids = torch.tensor([row])
    logits = model.denoise_logits(ids, ids)[0]
    return torch.stack([subs_log_prob(logits[i], mask) for i in range(len(row))]).exp().double()


def filled_law(model, template):
    """Text -> probability: block by block, every order of a block's masks equally likely."""
    size, mask = model.config.block_size, model.config.mask_id
    law = {tuple(template): 1.0}
    for start in range(0, len(template), size):
        open_slots = [i for i in range(start, start + size) if template[i] == mask]
        orders = list(itertools.permutations(open_slots))
        after = {}
        for text, prob in law.items():
            for order in orders:
                states = {text: prob / len(orders)}
                for slot in order:
                    grown = {}
                    for state, chance in states.items():
                        given = marginals(model, list(state[: start + size]), mask)[slot]
                        for token in range(model.config.vocab_size):
                            if token != mask:
                                new = (*state[:slot], token, *state[slot + 1 :])
                                grown[new] = grown.get(new, 0.0) + chance * float(given[token])
                    states = grown
                for state, chance in states.items():
                    after[state] = after.get(state, 0.0) + chance
        law = after
    assert abs(sum(law.values()) - 1) < 1e-6
    return law


M = 4  # the mask of `tiny_law`


@pytest.mark.parametrize("template", [[2, M, M, 1], [M, 3, M, M], [1, 2, M, 0]])
def test_masks_see_their_block_and_what_is_before(tiny_law, template):
    result = infill(tiny_law, template, num_samples=DRAWS, bos=False, generator=seeded())
    assert p_value(result, filled_law(tiny_law, template)) > FALSE_ALARM


def test_given_tokens_behind_a_mask_matter(tiny_law):
    """The test above tells the law with the right neighbour from that without it."""
    result = infill(tiny_law, [M, 3, M, M], num_samples=DRAWS, bos=False, generator=seeded())
    other = filled_law(tiny_law, [M, 0, M, M])
    moved = {(text[0], 3, *text[2:]): prob for text, prob in other.items()}
    assert p_value(result, moved) < 1e-6


def test_both_sides_of_one_block(make_model):
    """Two holes in one block of 4, between and behind given tokens."""
    model = make_model(vocab_size=4, mask_id=3, seq_len=4, block_size=4)
    result = infill(model, [3, 1, 3, 0], num_samples=4000, bos=False, generator=seeded())
    assert p_value(result, filled_law(model, [3, 1, 3, 0])) > FALSE_ALARM


KINDS = {
    "masked": {},
    "timed": dict(time_conditioning=True),
    "sedd": dict(objective="score_entropy", time_conditioning=True),
    "uniform": dict(
        objective="d3pm", transition="uniform", timesteps=3, time_conditioning=True
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", [*KINDS, "shifted"])
def test_blocks_that_are_given_are_read_at_once(make_model, kind):
    """Rows with holes far apart, each at another place: as without a cache, in few passes."""
    if kind == "shifted":
        model = make_hugging_face("llama", seq_len=1024, reading=kind)
    else:
        model = make_model(seq_len=1024, **KINDS[kind])
    mask, size = model.config.mask_id, model.config.block_size
    text = [n % 7 for n in range(700)]
    holes = [[5, 6, 651], [0, 352, 353, 354], [699], [8, 9, 10, 11, 12]]
    rows = [[mask if i in some else t for i, t in enumerate(text)] for some in holes]
    rows[3] = rows[3][:15]
    cached, slow = (
        infill(model, rows, bos=False, use_cache=use, generator=seeded(3)) for use in (True, False)
    )
    assert torch.equal(cached.sequences, slow.sequences)
    assert cached.lengths.tolist() == [700, 700, 700, 15]
    assert cached.prompt_lengths.tolist() == [697, 696, 699, 10]
    for row, filled in zip(rows, cached.sequences.tolist(), strict=True):
        for before, after in zip(row, filled, strict=False):
            assert after == before if before != mask else after != mask
    if kind in ("masked", "shifted"):
        # 640 tokens before the last hole of the first row take 2 passes, not 160.
        blocks = [len({i // size for i in some}) for some in holes]
        assert all(n <= size * b + 2 for n, b in zip(cached.nfe.tolist(), blocks, strict=True))


def test_a_template_ends_inside_a_block(make_model):
    model = make_model()
    mask = model.config.mask_id
    result = infill(model, [[1, mask], [2] * 9 + [mask]], bos=False, generator=seeded())
    assert result.lengths.tolist() == [2, 10]
    assert (result.sequences != mask).all()


def test_an_eos_ends_nothing(make_model):
    model = make_model(eos_id=1)
    mask = model.config.mask_id
    result = infill(model, [mask] * 40, num_samples=8, bos=False, generator=seeded())
    assert result.lengths.tolist() == [40] * 8
    assert (result.sequences == 1).any()


@pytest.mark.parametrize("policy", [
    dict(sampler="confidence", tokens_per_step=2), dict(sampler="remask", steps=4),
    dict(sampler="ancestral", steps=2),
])  # fmt: skip
def test_policies_leave_given_tokens(make_model, policy):
    model = make_model()
    mask = model.config.mask_id
    row = [1, mask, mask, 2, 3, mask, 5, mask]
    result = infill(model, row, num_samples=16, bos=False, generator=seeded(), **policy)
    given = torch.tensor(row) != mask
    assert (result.sequences[:, given] == torch.tensor(row)[given]).all()
    assert (result.sequences != mask).all()


class Letters:
    """A token for each letter; as a tokenizer would, it answers to `encode` and `decode`."""

    def encode(self, text, add_special_tokens):
        assert not add_special_tokens
        return ["abcdef ".index(letter) for letter in text]

    def decode(self, ids, skip_special_tokens):
        return "".join("abcdef ghijk"[i] for i in ids)


def test_holes_of_a_text(make_model):
    model = make_model()
    model.tokenizer = Letters()
    [row] = prepare_templates(model, "a cab[MASK:3] fed[MASK] a[MASK]", 1, False)
    assert row.ids == [0, 6, 2, 0, 1, 12, 12, 12, 6, 5, 4, 3, 12, 6, 0, 12]
    [text] = infill(model, "a cab[MASK:3] fed[MASK] a[MASK]", bos=False, generator=seeded()).texts
    assert len(text) == 16 and text.startswith("a cab") and text[8:12] == " fed"


@pytest.mark.parametrize(("template", "message"), [
    ([1, 2], "nothing to fill"), ([], "nothing to fill"), ([99, 12], "allowed are"),
])  # fmt: skip
def test_a_template_that_makes_no_sense(make_model, template, message):
    with pytest.raises(UserError, match=message):
        infill(make_model(), [template], bos=False)


def test_one_block_has_an_end(make_model):
    model = make_model(seq_len=8, block_size=8)
    with pytest.raises(UserError, match="more than the one block"):
        infill(model, [1] * 8 + [model.config.mask_id], bos=False)


def test_generate_names_infill(make_model):
    model = make_model()
    with pytest.raises(UserError, match="infill fills masks"):
        blockdiffusion.generate(model, [[1, model.config.mask_id]], bos=False)
