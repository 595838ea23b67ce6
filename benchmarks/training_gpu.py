"""Training steps (forward + backward) of the 110M network on a GPU: V = 50258, L = 1024, bfloat16.

python -m benchmarks.training_gpu [--batch 16] [--repeats 10]
python -m benchmarks.training_gpu --authors CHECKOUT     (see benchmarks.authors)
python -m benchmarks.training_gpu --rehearse             (a tiny network in float32 on the CPU)

One row a step, printed as soon as it is known: block diffusion at S = 16, beside it, at the same
batch, what the paper compares: two passes instead of one, SDPA with the dense mask instead of
FlexAttention, plain diffusion (S = L, without a clean stream), and the authors' code; then compiled
layers (`train.compile`) at S = 16 and 4, with that batch and the largest of its doubles that fits.

Weights are float32 under autocast. AdamW's update comes after every step and is not timed; the
first steps, which compile FlexAttention, are left out. FLOP are those that the step needs: what a
code computes besides, such as scores behind the mask, does not count.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, Protocol
from unittest.mock import patch

import torch
import torch.nn.functional as F

from benchmarks import authors
from benchmarks.machine import describe
from benchmarks.training_step import generic_model, paper_config, step_flops
from blockdiffusion.diffusion.denoiser import masked_loss
from blockdiffusion.diffusion.estimators import Corrupted, Count
from blockdiffusion.models import transformer
from blockdiffusion.models.attention import attend, resolve_backend
from blockdiffusion.models.backbone import Outputs
from blockdiffusion.models.masks import Streams, dense_mask
from blockdiffusion.models.transformer import (
    BlockDiffusionConfig,
    BlockDiffusionModel,
    Rotary,
    rotary_tables,
    split_heads,
)
from blockdiffusion.runtime.hardware import best_seconds, hardware_of_gpu, share_of_peak

WARM_UP = 3  # steps that are not timed
GIB = 2**30


# --- where it runs ----------------------------------------------------------------------------


class Place(Protocol):
    """A device, and what is measured of it. All memory is in bytes."""

    device: torch.device
    dtype: torch.dtype  # of matrix products
    capacity: int  # its memory
    product: int  # rows and columns of the product that tells its peak

    def config(self, block_size: int) -> BlockDiffusionConfig:
        """The network's sizes."""
        ...

    def describe(self) -> str:
        """One line."""
        ...

    def data_sheet(self) -> float:
        """Peak FLOP/s of matrix products as the maker gives it, or 0 where it is not known."""
        ...

    def begin(self, batch: int) -> None:
        """Gives back what the last step left, before one with so many rows."""
        ...

    def wait(self) -> None:
        """Until all work is done."""
        ...

    def held(self) -> int:
        """Memory that is in use; the most is counted anew from here."""
        ...

    def most(self) -> int:
        """The most that was in use."""
        ...


class Gpu:
    """The first CUDA device, in bfloat16."""

    device, dtype, product = torch.device("cuda"), torch.bfloat16, 8192

    def __init__(self) -> None:
        import torch._dynamo

        # FlexAttention is compiled for every mask and batch; it must not go on uncompiled.
        torch._dynamo.config.fail_on_recompile_limit_hit = True
        self.name = torch.cuda.get_device_name()
        self.capacity = torch.cuda.mem_get_info()[1]

    def config(self, block_size: int) -> BlockDiffusionConfig:
        return paper_config(block_size)

    def describe(self) -> str:
        return f"{self.name}, {self.capacity / GIB:.1f} GiB, CUDA {torch.version.cuda}"

    def data_sheet(self) -> float:
        known = hardware_of_gpu(self.name)
        return 0.0 if known is None else known.flops["bfloat16"]

    def begin(self, batch: int) -> None:
        gc.collect()
        torch.cuda.empty_cache()

    def wait(self) -> None:
        torch.cuda.synchronize()

    def held(self) -> int:
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()

    def most(self) -> int:
        return torch.cuda.max_memory_allocated()


class Rehearsal:
    """The CPU, as if a row of the batch took 1 GiB and no more than `FIT` rows did fit."""

    FIT = 8
    device, dtype, product = torch.device("cpu"), torch.float32, 256
    capacity = 2 * FIT * GIB  # more than fits, for a step that runs out of it

    def config(self, block_size: int) -> BlockDiffusionConfig:
        return BlockDiffusionConfig(
            vocab_size=300, seq_len=64, block_size=min(block_size, 64), hidden_size=64,
            num_hidden_layers=2,
            num_attention_heads=2,
        )  # fmt: skip

    def describe(self) -> str:
        return "a rehearsal: no number below means anything"

    def data_sheet(self) -> float:
        return 0.0

    def begin(self, batch: int) -> None:
        self.batch = batch

    def wait(self) -> None:
        if self.batch > self.FIT:
            raise torch.OutOfMemoryError(f"{self.batch} rows")

    def held(self) -> int:
        return 0

    def most(self) -> int:
        return self.batch * GIB


def chosen_place(rehearse: bool) -> Place:
    """The GPU, or the CPU for a rehearsal; ends the program where there is no GPU."""
    if not rehearse and not torch.cuda.is_available():
        print("this machine has no CUDA device; --rehearse goes without one", file=sys.stderr)
        sys.exit(2)
    return Rehearsal() if rehearse else Gpu()


def product_flops(place: Place) -> float:
    """FLOP/s of one large matrix product, measured."""
    size, together = place.product, 20
    a, b = (torch.randn(size, size, device=place.device).to(place.dtype) for _ in range(2))

    def products() -> None:
        for _ in range(together):
            torch.mm(a, b)
        place.wait()

    return together * 2 * size**3 / best_seconds(products)


# --- what is compared -------------------------------------------------------------------------


def one_pass(model: Any, batch: Corrupted, clean_BL: torch.Tensor) -> torch.Tensor:
    """The package's loss: a pass over [noisy ; clean]."""
    nats = masked_loss(model, batch.noisy_BNL, clean_BL, batch.scored_BNL, batch.weight_BNL)
    return nats / clean_BL.numel()


def two_passes(model: Any, batch: Corrupted, clean_BL: torch.Tensor) -> torch.Tensor:
    """The same loss with `TwoPasses`."""
    return one_pass(TwoPasses(model), batch, clean_BL)


def one_pass_sdpa(model: Any, batch: Corrupted, clean_BL: torch.Tensor) -> torch.Tensor:
    """The same loss with PyTorch's attention and the whole mask."""
    with patch.object(transformer, "attend", dense_sdpa):
        return one_pass(model, batch, clean_BL)


def compiled_model(config: BlockDiffusionConfig) -> BlockDiffusionModel:
    """Ours with compiled layers."""
    model = generic_model(config)
    model.backbone.compile_layers()
    return model


def authors_loss(model: Any, batch: Corrupted, clean_BL: torch.Tensor) -> torch.Tensor:
    """The authors' loss of the same masks."""
    return authors.training_loss(model, batch.noisy_BNL[:, 0], clean_BL, batch.weight_BNL[:, 0])


def unscripted_authors_loss(model: Any, batch: Corrupted, clean_BL: torch.Tensor) -> torch.Tensor:
    """The same without TorchScript."""
    with authors.unscripted(model):
        return authors_loss(model, batch, clean_BL)


class TwoPasses:
    """A network that first takes the clean stream alone, for its keys and values in every layer,
    and then one noisy stream, which reads them. It computes what the single pass does."""

    def __init__(self, model: BlockDiffusionModel) -> None:
        self.model, self.config, self.output = model, model.full_config(), model.output

    def encode(
        self,
        noisy_BNL: torch.Tensor,
        clean_BL: torch.Tensor,
        sigma_BNK: None,
        valid_BL: None,
        scored_BNL: torch.Tensor,
    ) -> torch.Tensor:
        """Hidden states (M, D) at the scored positions."""
        model, device, length = self.model, noisy_BNL.device, clean_BL.shape[1]
        head_dim = self.config.hidden_size // self.config.num_attention_heads
        positions = torch.arange(length, device=device)
        rotary = rotary_tables(positions, head_dim, model.dtype)
        cond = model.backbone.time(torch.zeros(1, 1, device=device))
        clean = self._clean_pass(clean_BL, cond, rotary)
        streams = Streams(length, self.config.block_size)
        backend = resolve_backend(None, device)

        def read(index: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            k, v = (torch.cat(pair, dim=2) for pair in zip((k, v), clean[index], strict=True))
            return attend(q, k, v, streams, backend)

        outputs = Outputs(places=scored_BNL[:, 0].nonzero(as_tuple=True))
        return model.backbone(noisy_BNL[:, 0], positions, read, outputs)[0]

    def _clean_pass(
        self, clean_BL: torch.Tensor, cond: torch.Tensor, rotary: Rotary
    ) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Keys and values of every layer; the last one computes nothing else."""
        *layers, last = self.model.backbone.layers
        streams = Streams(clean_BL.shape[1], self.config.block_size, num_noisy=0)
        backend = resolve_backend(None, clean_BL.device)
        found = []

        def read(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            found.append((k, v))
            return attend(q, k, v, streams, backend)

        x_BLD = self.model.backbone.embedding(clean_BL)
        for layer in layers:
            x_BLD = layer(x_BLD, cond, rotary, read)
        shift, scale = last.modulate(cond)[:2]
        qkv = last.attn_qkv(last.attn_norm(x_BLD, shift, scale))
        found.append(split_heads(qkv, last.num_heads, rotary)[1:])
        return found


def dense_sdpa(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, streams: Streams, *_: Any
) -> torch.Tensor:
    """scaled_dot_product_attention over all keys of all streams."""
    mask_QT = whole_mask(streams, q.device)[: q.shape[2]]
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask_QT)


whole_mask = lru_cache(maxsize=4)(dense_mask)


def authors_network(
    checkout: Path, place: Place, attention: str, config: BlockDiffusionConfig
) -> Any:
    """Their network in these sizes, with layers in the place's type."""
    network = authors.authors_network(
        checkout, config.block_size, config.vocab_size, config.seq_len, attn_backend=attention,
        hidden_dim=config.hidden_size, n_blocks=config.num_hidden_layers,
        n_heads=config.num_attention_heads,
    )  # fmt: skip
    network.backbone.precision = place.dtype
    return network


# --- measuring --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Step:
    """What is repeated: a loss of a network, and its gradient."""

    name: str
    config: BlockDiffusionConfig
    batch: int
    loss: Callable[[Any, Corrupted, torch.Tensor], torch.Tensor] = one_pass
    network: Callable[[BlockDiffusionConfig], Any] = generic_model

    def rows(self) -> tuple[torch.Tensor, Corrupted]:
        """Clean rows, and their noisy copies: half of the tokens masked on average."""
        config, shape = self.config, (self.batch, self.config.seq_len)
        draw = torch.Generator().manual_seed(1)
        clean_BL = torch.randint(0, config.mask_id, shape, generator=draw)
        free_BL = torch.ones_like(clean_BL, dtype=torch.bool)
        return clean_BL, Count()(clean_BL, free_BL, config.block_size, config.mask_id, draw)


@dataclass(frozen=True)
class Measured:
    """Seconds of the steps, the first of all apart; FLOP of each; memory in bytes."""

    first: float
    seconds: list[float]
    flops: float
    held: int  # between the steps: weights and AdamW's averages
    most: int

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)


def measure(step: Step, place: Place, repeats: int) -> Measured:
    """Repeats the step, each time with an update of the weights after it."""
    place.begin(step.batch)
    with torch.device(place.device):
        model = step.network(step.config).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6, fused=True)
    clean_BL, batch = step.rows()
    masked = int((batch.noisy_BNL == step.config.mask_id).sum())
    clean_BL, batch = clean_BL.to(place.device), batch.to(place.device)
    half = place.dtype != torch.float32
    seconds, held = [], 0
    for turn in range(WARM_UP + repeats):
        if turn == WARM_UP:
            held = place.held()
        place.wait()
        start = time.perf_counter()
        with torch.autocast(place.device.type, place.dtype, enabled=half):
            loss = step.loss(model, batch, clean_BL)
        loss.backward()
        place.wait()
        seconds.append(time.perf_counter() - start)
        del loss
        optimizer.step()
        optimizer.zero_grad()
    flops = step_flops(step.config, masked, batch=step.batch)
    return Measured(seconds[0], seconds[WARM_UP:], flops, held, place.most())


class Table:
    """Measures steps and prints a row for each; keeps the first, which the others are compared to.

    Attributes:
        peak: FLOP/s of matrix products.
    """

    def __init__(self, place: Place, repeats: int, peak: float) -> None:
        self.place, self.repeats, self.peak = place, repeats, peak
        self.per_token: float | None = None  # seconds, of the first
        print(
            "| | S | batch | ms, median (best) | tokens/s | TFLOP/s | of the peak (data sheet's) | "
            "most memory, with AdamW | first step | seconds per token, times the first's |\n"
            "|---|---|---|---|---|---|---|---|---|---|",
            flush=True,
        )

    def add(self, step: Step) -> Measured | None:
        """Measures one more step, or says why not.

        Returns:
            None where its batch does not fit.

        Raises:
            RuntimeError: anything else went wrong in it.
        """
        title = f"| {step.name} | {step.config.block_size} | {step.batch} |"
        try:
            found = measure(step, self.place, self.repeats)
        except torch.OutOfMemoryError:
            print(f"{title} does not fit" + " |" * 7, flush=True)
            return None
        except Exception as error:
            print(f"{title} failed: {type(error).__name__}" + " |" * 7, flush=True)
            raise RuntimeError(f"{step.name} failed") from error
        print(f"{title} {self._cells(step, found)} |", flush=True)
        return found

    def _cells(self, step: Step, found: Measured) -> str:
        tokens, sheet = step.batch * step.config.seq_len, self.place.data_sheet()
        per_token = found.median / tokens
        self.per_token = self.per_token or per_token
        speed = found.flops / found.median
        of_peak, of_sheet = (
            share_of_peak(speed, self.peak),
            f" ({speed / sheet:.0%})" if sheet else "",
        )
        return " | ".join(
            [
                f"{found.median * 1e3:.1f} ({min(found.seconds) * 1e3:.1f})",
                f"{1 / per_token:,.0f}",
                f"{speed / 1e12:.3g}",
                f"{'' if of_peak is None else f'{of_peak:.0%}'}{of_sheet}",
                f"{found.most / GIB:.2f} GiB",
                f"{found.first:.1f} s",
                f"{per_token / self.per_token:.2f}",
            ]
        )

    def try_each(self, *steps: Step) -> tuple[Step, Measured] | None:
        """The first of these steps in which nothing goes wrong, if its batch fits.

        What went wrong in others is printed.
        """
        for step in steps:
            try:
                found = self.add(step)
            except RuntimeError:
                traceback.print_exc()
            else:
                return None if found is None else (step, found)
        return None

    def add_largest(self, step: Step, found: Measured) -> None:
        """Adds the step with the largest of the doubles of its batch that fits, if one does.

        `found` tells which may fit: rows take memory in proportion.
        """
        batch, per_row = step.batch, (found.most - found.held) / step.batch
        while found.held + 2 * batch * per_row < 1.1 * self.place.capacity:
            batch *= 2
        while batch > step.batch and not self.try_each(replace(step, batch=batch)):
            batch //= 2


def compare(table: Table, place: Place, batch: int, checkout: Path | None) -> None:
    """All rows, the one that takes longest to compile at the end."""
    paper, short = place.config(16), place.config(4)
    plain = place.config(paper.seq_len)
    table.try_each(Step("block diffusion", paper, batch))
    table.try_each(Step("two passes", paper, batch, two_passes))
    table.try_each(Step("SDPA, dense mask", paper, batch, one_pass_sdpa))
    table.try_each(Step("plain diffusion", plain, batch))
    theirs = None
    if checkout is not None:
        build = partial(authors_network, checkout, place, "sdpa")
        step = Step("authors' code, SDPA", paper, batch, authors_loss, build)
        plainer = replace(step, name=f"{step.name}, no TorchScript", loss=unscripted_authors_loss)
        theirs = table.try_each(step, plainer)
    for config in (paper, short):
        name = "block diffusion, compiled"
        known = table.try_each(Step(name, config, batch, network=compiled_model))
        if known is not None:
            table.add_largest(*known)
    if checkout is not None and theirs is not None:
        build = partial(authors_network, checkout, place, "flex")
        name = theirs[0].name.replace("SDPA", "FlexAttention")
        table.try_each(replace(theirs[0], name=name, network=build))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--authors", type=Path, help="a checkout of kuleshov-group/bd3lms")
    parser.add_argument("--rehearse", action="store_true", help="on the CPU, with a tiny network")
    args = parser.parse_args()
    place = chosen_place(args.rehearse)
    place.begin(args.batch)
    peak, sheet = product_flops(place), place.data_sheet()
    print(f"{describe()}\n{place.describe()}")
    print(
        f"peak: {peak / 1e12:.3g} TFLOP/s in a product of {place.product}^3"
        + (f" (data sheet: {sheet / 1e12:.3g})" if sheet else "")
    )
    print(f"median (best) of {args.repeats} steps each; tokens are those of the clean text\n")
    compare(Table(place, args.repeats, peak), place, args.batch, args.authors)


if __name__ == "__main__":
    main()
