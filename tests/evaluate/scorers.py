"""Small judges and what they say, one token at a time."""

import torch
from transformers import GPT2Config, GPT2LMHeadModel

from blockdiffusion.data.tokenizers import byte_tokenizer

BYTES = dict(vocab_size=258, mask_id=257, eos_id=256, bos_id=256)


def save_gpt2(folder, positions=24, seed=0, **changes):
    """A GPT-2 of random, large weights with the byte tokenizer, as `save_pretrained` writes it."""
    torch.manual_seed(seed)
    sizes = dict(vocab_size=258, n_positions=positions, n_embd=16, n_layer=2, n_head=2)
    config = GPT2Config(**{**sizes, "bos_token_id": 256, "eos_token_id": 256, **changes})
    model = GPT2LMHeadModel(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(6)
    model.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


def with_bytes(model):
    """One of ours with the byte tokenizer."""
    model.tokenizer = byte_tokenizer()
    return model


@torch.no_grad()
def slow_nats(next_token_logits, ids, scored, context, stride):
    """Nats of the scored tokens, one forward pass for each: token i is read with the tokens from
    k * stride on, for the smallest k such that no more than `context` are read, itself included."""
    total = 0.0
    for index, target in enumerate(ids):
        if scored[index]:
            window = 0 if index < context else -(-(index - context + 1) // stride)
            logits = next_token_logits(ids[window * stride : index])
            total -= float(logits.double().log_softmax(-1)[target])
    return total
