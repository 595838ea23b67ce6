"""Instruction tuning: only responses are learnt, and answers end."""

import json

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import blockdiffusion
from blockdiffusion.data.loader import Batch, TokenRows, free_tokens
from blockdiffusion.diffusion.estimators import for_block_size, make_estimator
from blockdiffusion.evaluate.compare import compare
from blockdiffusion.train.loss import DiffusionLoss
from tests.command import blockdiff
from tests.data.test_chat import TEMPLATE, messages, write_chat
from tests.models.hugging_face import make_hugging_face
from tests.train.test_adapt import save_parent

SIZE, VOCAB = 4, 13


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A parent with a chat template, conversations, and a run that adapted it to them."""
    folder = tmp_path_factory.mktemp("chat")
    save_parent(folder / "parent", max_position_embeddings=512)
    tokenizer = AutoTokenizer.from_pretrained(folder / "parent")
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder / "parent")
    write_chat(folder / "c.jsonl")
    done = adapt(folder, "run", "--steps", 3)
    assert done.returncode == 0, done.stderr
    return folder


def adapt(folder, out, *more, chat="c.jsonl"):
    return blockdiff(
        "adapt", folder / "parent", "--chat", folder / chat, "--block-size", SIZE,
        "--seq-len", 128, "--out", folder / out, "train.batch_size=4", "train.threads=1", *more,
    )  # fmt: skip


# --- the loss -------------------------------------------------------------------------------------


def conversations():
    """Two rows: three examples and padding, and one that fills the row."""
    ids = torch.randint(0, VOCAB - 1, (2, 24), generator=torch.Generator().manual_seed(0))
    document = torch.tensor([[1] * 8 + [2] * 4 + [3] * 8 + [0] * 4, [1] * 24])
    context = torch.tensor([[5, 2, 3], [9, 0, 0]])
    target = torch.zeros(2, 24, dtype=torch.bool)
    for row in range(2):
        for number in range(1, int(document[row].max()) + 1):
            own = (document[row] == number).nonzero().flatten()
            target[row, own[int(context[row, number - 1]) :]] = True
    return Batch(ids, document > 0, target, document)


@pytest.mark.parametrize("ar_loss", [0.0, 0.5])
@pytest.mark.parametrize("block_attention", ["full", "causal"])
def test_the_gradient_is_that_of_the_responses_alone(block_attention, ar_loss):
    """Against one response token at a time, each from its example alone: -log p of every masked
    token by `denoise_logits` over a row of one example, and of every next token by the plain
    network's logits."""
    model = make_hugging_face(
        "llama", VOCAB, seq_len=24, block_size=SIZE, reading="next", clean_attention="causal",
        block_attention=block_attention, start_id=3,
    )  # fmt: skip
    batch = conversations()
    free_BL = free_tokens(batch, row_bos=False)
    estimator, _ = for_block_size(make_estimator("complement"), SIZE)
    drawn = estimator(batch.ids_BL, free_BL, SIZE, VOCAB - 1, torch.Generator().manual_seed(4))
    assert not (drawn.scored_BNL & ~batch.target_BL[:, None]).any()
    kept = ~batch.target_BL[:, None].expand_as(drawn.noisy_BNL)
    assert torch.equal(drawn.noisy_BNL[kept], batch.ids_BL[:, None].expand_as(kept)[kept])

    ar_weight_BL = ar_loss * free_BL if ar_loss else None
    loss = DiffusionLoss(batch, drawn, ar_weight_BL, SIZE)
    model.requires_grad_(True)
    found = loss.nats(model, slice(0, 2))
    expected, copies = torch.zeros((), dtype=torch.float64), drawn.noisy_BNL.shape[1]
    bias = torch.zeros(VOCAB, dtype=torch.float64)
    bias[-1] = -torch.inf  # the mask is never a token
    for row in range(2):
        for number in range(1, int(batch.document_BL[row].max()) + 1):
            own = batch.document_BL[row] == number
            clean, weight = batch.ids_BL[row][own], drawn.weight_BNL[row][:, own]
            for copy in range(copies):
                noisy = drawn.noisy_BNL[row, copy][own]
                log_p = (model.denoise_logits(noisy[None], clean[None])[0] + bias).log_softmax(-1)
                for place in drawn.scored_BNL[row, copy][own].nonzero().flatten().tolist():
                    expected -= weight[copy, place] * log_p[place, clean[place]] / copies
            if ar_loss:
                small = model.with_block_size(1)
                masks = torch.full_like(clean, VOCAB - 1)
                log_p = (small.denoise_logits(masks[None], clean[None])[0] + bias).log_softmax(-1)
                for place in batch.target_BL[row][own].nonzero().flatten().tolist():
                    expected -= ar_loss * log_p[place, clean[place]]
    assert found.item() == pytest.approx(expected.item(), rel=1e-5)
    names, parameters = zip(*model.named_parameters(), strict=True)
    grads = [torch.autograd.grad(value, parameters) for value in (found, expected)]
    for name, one, two in zip(names, *grads, strict=True):
        assert (one - two).abs().max() < 1e-4 * (1 + two.abs().max()), name


def test_a_run_evaluates_and_samples_by_responses(place):
    """`eval` counts the tokens of responses and their EOS; `compare` reads both models alike."""
    rows = TokenRows(place / "run" / "data", "valid")
    batch = rows.rows(np.arange(rows.num_rows)).unpacked()
    done = blockdiff("eval", place / "run", "--data", place / "run" / "data", "--json",
                     place / "eval.json")  # fmt: skip
    assert done.returncode == 0, done.stderr
    result = json.loads((place / "eval.json").read_text())
    assert result["num_tokens"] == int(batch.target_BL.sum())
    assert result["num_rows"] == len(batch.ids_BL) and result["bits_per_byte"] is None
    done = blockdiff("sample", place / "run", "--chat", "--prompt", "3 and 1?",
                     "--max-new-tokens", 8, "--seed", 1, "--json")  # fmt: skip
    values = json.loads(done.stdout)
    prompt = "[user]3 and 1?<|endoftext|>\n[assistant]"
    assert values["prompt_tokens"] == len(prompt) - len("<|endoftext|>") + 1
    tokenizer = blockdiffusion.load(place / "run").tokenizer
    answer = tokenizer.decode(values["ids"][values["prompt_tokens"] :], skip_special_tokens=True)
    assert values["text"] == answer and "assistant" not in answer


@torch.no_grad()
def test_compare_scores_responses_given_the_same_conversation(place):
    """Before training, with causal blocks, the child from left to right is the parent."""
    rows = TokenRows(place / "run" / "data", "valid")
    batch = rows.rows(np.arange(rows.num_rows)).unpacked()
    parent = AutoModelForCausalLM.from_pretrained(place / "parent").eval()
    parent.resize_token_embeddings(258, mean_resizing=False)
    child = make_parent_child(parent)
    plain = AutoModelForCausalLM.from_pretrained(place / "parent").eval()
    found = {reading.name: reading for reading in compare(plain, child, batch).readings}
    nats = 0.0
    for ids, valid, target in zip(batch.ids_BL, batch.valid_BL, batch.target_BL, strict=True):
        read = torch.cat([torch.tensor([256]), ids[valid]])
        log_p = plain(read[None]).logits[0, :-1].log_softmax(-1)
        nll = -log_p.gather(1, ids[valid][:, None])[:, 0]
        nats += float(nll[target[valid]].double().sum())
    expected = nats / int(batch.target_BL.sum())
    assert found["parent"].nats_per_token.value == pytest.approx(expected, rel=1e-5)
    for name in ("child, blocks of 4, left to right", "child, autoregressive"):
        assert abs(found[name].lost.value) < 1e-5


def make_parent_child(network):
    from blockdiffusion.diffusion.config import DiffusionConfig
    from blockdiffusion.models.causal_lm import adapted_model

    config = DiffusionConfig(
        vocab_size=258, seq_len=128, block_size=SIZE, mask_id=257, clean_attention="causal",
        block_attention="causal", reading="next", start_id=256, bos=False,
    )  # fmt: skip
    return adapted_model(network, config).eval()


def test_answers_are_learnt_and_end(place):
    """A network that saw four questions answers them, each with its own length, and stops."""
    pairs = {"a?": "yes", "bb?": "no, never", "c?": "m", "dddd?": "it is, it is"}
    lines = [messages(("user", q), ("assistant", a)) for q, a in pairs.items()]
    text = "\n".join(json.dumps({"messages": line}) for line in lines * 10)
    (place / "pairs.jsonl").write_text(text)
    done = adapt(place, "pairs", "--steps", 150, "optim.lr=1e-2", chat="pairs.jsonl")
    assert done.returncode == 0, done.stderr
    for question, answer in pairs.items():
        done = blockdiff(
            "sample", place / "pairs", "--chat", "--prompt", question, "--sampler", "confidence",
            "--tokens-per-step", 1, "--top-k", 1, "--max-new-tokens", 40,
        )  # fmt: skip
        assert done.stdout == f"{answer}\n"


# --- mistakes -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "more", "key"),
    [
        ('{"messages": [{"role": "user", "content": "hi"}]}', (), "has no response"),
        ('{"messages": []}', (), "no list of messages"),
        ("hi", (), "is not JSON"),
        (None, ("--seq-len", 126), "does not divide"),
        (None, ("--data", "x"), "both are given"),
        (None, ("train.block_sizes=[1,2,3]",), "block_sizes"),
    ],
)
def test_mistakes_are_one_sentence(content, more, key, place, tmp_path):
    chat = place / "c.jsonl"
    if content is not None:
        chat = tmp_path / "c.jsonl"
        chat.write_text(content)
    done = blockdiff("adapt", place / "parent", "--chat", chat, "--block-size", SIZE,
                     "--seq-len", 128, "--out", tmp_path / "run", "--steps", 2, *more)  # fmt: skip
    assert done.returncode == 2 and key in done.stderr and "Traceback" not in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1, done.stderr


def test_neither_data_nor_conversations(place, tmp_path):
    done = blockdiff("adapt", place / "parent", "--block-size", 4, "--out", tmp_path / "run")
    assert done.returncode == 2 and "none of them is given" in done.stderr


def test_blocks_stay_inside_a_conversation(place, tmp_path):
    done = blockdiff("adapt", place / "parent", "--data", place / "run" / "data", "--block-size", 8,
                     "--out", tmp_path / "run", "--steps", 2)  # fmt: skip
    assert done.returncode == 2 and "--align 8" in done.stderr


def test_a_role_that_the_template_refuses(place, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(place / "parent")
    tokenizer.chat_template = (
        "{% for m in messages %}{% if m.role not in ('user', 'assistant') %}"
        "{{ raise_exception('no such role') }}{% endif %}{% endfor %}" + TEMPLATE
    )
    save_parent(tmp_path / "parent", max_position_embeddings=512)
    tokenizer.save_pretrained(tmp_path / "parent")
    talk = messages(("user", "hi"), ("oracle", "hm"), ("assistant", "no"))
    (tmp_path / "c.jsonl").write_text(json.dumps({"messages": talk}) + "\n" * 2)
    done = adapt(tmp_path, "run", "--steps", 2)
    assert done.returncode == 2 and "Traceback" not in done.stderr


@pytest.mark.parametrize("more", [(), ("--prompt-file", "x")])
def test_a_question_is_needed(more, place, tmp_path):
    done = blockdiff("sample", place / "run", "--chat", *more)
    assert done.returncode == 2 and "Traceback" not in done.stderr
