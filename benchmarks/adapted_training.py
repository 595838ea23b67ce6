"""A step of adaptation, beside a next-token step of the parent by transformers.

python -m benchmarks.adapted_training PARENT [--rows 4] [--tokens 64] [--block-size 4] [--rounds 3]

Both are a forward and a backward pass over the same tokens and an update by AdamW, in float32. The
parent's loss is that of transformers (`labels`). A step of adaptation reads the clean stream and
one noisy copy (`count`) or two (`complement`, the default of `blockdiff adapt`), with the
next-token loss on the clean stream or without. All take turns; the least CPU time of each counts
(of one thread, so other programs cost only what they take of caches and memory).
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import torch

from benchmarks.machine import describe
from blockdiffusion.checkpoints.formats import load_parent
from blockdiffusion.data.loader import Batch
from blockdiffusion.diffusion.config import DiffusionConfig
from blockdiffusion.diffusion.estimators import make_estimator
from blockdiffusion.models.causal_lm import adapted_model, num_embeddings
from blockdiffusion.train.loss import DiffusionLoss
from blockdiffusion.train.optim import OptimOptions, make_optimizer

Step = Callable[[], None]


def next_token_step(parent: str, ids_BL: torch.Tensor) -> Step:
    """Return a step of transformers."""
    network = load_parent(parent).float().train()
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-4, fused=True)

    def step() -> None:
        network(input_ids=ids_BL, labels=ids_BL, use_cache=False).loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def adaptation_step(
    parent: str, ids_BL: torch.Tensor, size: int, estimator: str, ar_loss: float
) -> Step:
    """Return a step of `blockdiff adapt` with these losses."""
    network = load_parent(parent).float()
    vocab = num_embeddings(network)
    network.resize_token_embeddings(vocab + 1, mean_resizing=False)
    config = DiffusionConfig(
        vocab_size=vocab + 1, seq_len=ids_BL.shape[1], block_size=size, mask_id=vocab,
        clean_attention="causal", reading="next", start_id=0, bos=False,
    )  # fmt: skip
    model = adapted_model(network, config).train()
    optimizer = make_optimizer(model.backbone, OptimOptions(lr=1e-4))
    free_BL, draw = torch.ones_like(ids_BL, dtype=torch.bool), torch.Generator().manual_seed(0)
    masks = make_estimator(estimator)

    def step() -> None:
        drawn = masks(ids_BL, free_BL, size, vocab, draw)
        weight_BL = ar_loss * free_BL if ar_loss else None
        loss = DiffusionLoss(Batch(ids_BL), drawn, weight_BL)
        (loss.nats(model, slice(0, len(ids_BL))) / ids_BL.numel()).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("parent")
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--block-size", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    torch.set_num_threads(1)
    draw = torch.Generator().manual_seed(0)
    ids_BL = torch.randint(1000, 40_000, (args.rows, args.tokens), generator=draw)
    kinds = [("count", 0.0), ("count", 0.5), ("complement", 0.0), ("complement", 0.5)]
    steps = {"next token, transformers": next_token_step(args.parent, ids_BL)}
    for estimator, ar_loss in kinds:
        name = f"adaptation, {estimator}, ar_loss {ar_loss:g}"
        steps[name] = adaptation_step(args.parent, ids_BL, args.block_size, estimator, ar_loss)
    seconds = dict.fromkeys(steps, float("inf"))
    for number in range(args.rounds + 1):
        for name, step in steps.items():
            began = time.thread_time()
            step()
            if number:  # the first round makes the optimizers' states
                seconds[name] = min(seconds[name], time.thread_time() - began)
    print(f"{describe()}; {args.rows} rows of {args.tokens} tokens, blocks of {args.block_size}\n")
    print("| step | CPU seconds | of the next-token step |\n|---|---|---|")
    own = next(iter(seconds.values()))
    for name, value in seconds.items():
        print(f"| {name} | {value:.2f} | {value / own:.2f} |")


if __name__ == "__main__":
    main()
