"""A long document: time per token over the position, and peak memory over the length.

    python -m benchmarks.long_document [NAME=MODEL ...] [--tokens 8192] [--window 128]
        [--cpu-time] [--json FILE] [--plot FILE]

Every model writes documents of several lengths with the sliding window, and without. Without a
MODEL a network of the demo's size with random weights does. Every document is made by a process of
its own, whose peak resident memory is read at its end. --cpu-time counts the time of the process on
the processor, which says more than the clock where other work shares it. Models of one block slide
their block over the text and have no other window. What the file of --json holds already is not
measured again.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from benchmarks.charts import COLOURS, named_curves

BINS = 32  # of the positions, for the times


@dataclass(frozen=True)
class Written:
    """One document: its curve is (position, milliseconds per token) for parts of equal length."""

    model: str
    window: int | None
    tokens: int
    peak_mb: float
    base_mb: float
    curve: Sequence[tuple[float, float]]
    machine: str

    @property
    def name(self) -> str:
        return f"{self.model}, " + ("no window" if self.window is None else f"W = {self.window}")

    def rate(self, first: float, last: float) -> float:
        """Median milliseconds per token between two shares of the text."""
        part = self.curve[int(first * len(self.curve)) : int(last * len(self.curve))]
        return statistics.median(value for _, value in part)


# --- in a process of its own ---------------------------------------------------------------------


def write_document(
    model: str | None, window: int | None, tokens: int, cpu_time: bool
) -> dict[str, object]:
    """Samples one document of `tokens` tokens and measures it."""
    import torch

    from benchmarks.machine import describe
    from blockdiffusion.checkpoints.formats import load
    from blockdiffusion.models.inference import optimize_for_inference
    from blockdiffusion.sampling import BlockDone, Event, stream

    network = optimize_for_inference(demo_network() if model is None else load(path_of(model)))

    def sample(length: int) -> Iterator[Event]:
        generator = torch.Generator().manual_seed(0)
        return stream(network, max_new_tokens=length, eos=False, window=window, generator=generator)

    list(sample(32))  # libraries make their own buffers once
    base = resident_memory()
    forget_peak_memory()  # that of loading
    clock = time.process_time if cpu_time else time.perf_counter
    ends, times = [0], [clock()]
    for event in sample(tokens):
        if isinstance(event, BlockDone):
            ends.append(int(event.ends[0]))
            times.append(clock())
    return {
        "curve": list(_binned(ends, times, max(1, ends[-1] // BINS))),
        "base_mb": base,
        "peak_mb": resident_memory("VmHWM"),
        "machine": describe(),
    }


def _binned(
    ends: Sequence[int], times: Sequence[float], size: int
) -> Iterator[tuple[float, float]]:
    """(middle, milliseconds per token) of the parts of about `size` tokens."""
    start = 0
    for index in range(1, len(ends)):
        tokens = ends[index] - ends[start]
        if tokens >= size:
            middle = (ends[index] + ends[start]) / 2
            yield middle, 1e3 * (times[index] - times[start]) / tokens
            start = index


def demo_network():
    """A network of the demo's size with random weights."""
    import torch

    from blockdiffusion.models.transformer import BlockDiffusionConfig, BlockDiffusionModel

    torch.manual_seed(0)
    model = BlockDiffusionModel(
        BlockDiffusionConfig(
            vocab_size=2049, seq_len=128, block_size=4, hidden_size=128, num_hidden_layers=4,
            num_attention_heads=4,
            cond_dim=64, dropout=0.0,
        )
    )  # fmt: skip
    for parameter in model.parameters():  # zeros would let kernels cheat
        torch.nn.init.normal_(parameter, std=0.02)
    return model.eval()


def resident_memory(what: str = "VmRSS") -> float:
    """Resident memory of this process in MB (Linux): now, or "VmHWM", the largest so far."""
    # Not getrusage: its figure starts with that of the process that started this one.
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(what)) * 1024 / 1e6


def forget_peak_memory() -> None:
    Path("/proc/self/clear_refs").write_text("5")


# --- all documents -------------------------------------------------------------------------------


def measure(model: str | None, window: int | None, tokens: int, cpu_time: bool) -> Written:
    """`write_document` in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.long_document", "--child"]
    command += ["--tokens", str(tokens), "--window", str(window or 0)]
    command += [*(["--cpu-time"] if cpu_time else []), *([model] if model else [])]
    found = json.loads(subprocess.run(command, check=True, capture_output=True).stdout)
    return Written(model=name_of(model), window=window, tokens=tokens, **found)


def only_window(model: str | None) -> int | None:
    """L of a model of one block, which is the window that it slides; None for others."""
    if model is None:
        return None
    from blockdiffusion.checkpoints.formats import load
    from blockdiffusion.sampling.sliding import has_one_block

    network = load(path_of(model))
    return network.config.seq_len if has_one_block(network) else None


def documents(
    models: Sequence[str | None], window: int, tokens: int, cpu_time: bool, file: Path | None
) -> Iterator[Written]:
    """All documents; those that `file` holds are taken from there, the others are added to it."""
    lines = file.read_text().splitlines() if file is not None and file.exists() else []
    known = [Written(**json.loads(line)) for line in lines]
    for model in models:
        lengths = (tokens // 8, tokens // 2, tokens)
        own = only_window(model)
        windows = (window, None) if own is None else (own,)
        for chosen, length in itertools.product(windows, lengths):
            key = (name_of(model), chosen, length)
            document = next((d for d in known if (d.model, d.window, d.tokens) == key), None)
            if document is None:
                document = measure(model, chosen, length, cpu_time)
                if file is not None:
                    with open(file, "a") as stream:
                        stream.write(json.dumps(asdict(document)) + "\n")
            print(row(document), flush=True)
            yield document


def name_of(model: str | None) -> str:
    return "random" if model is None else model.partition("=")[0]


def path_of(model: str) -> str:
    """Of NAME=MODEL, or of a model that is its own name."""
    return model.partition("=")[2] or model


HEADER = (
    "| document | tokens | ms a token, 2nd eighth | last eighth | peak memory, MB | "
    "above the loaded model |\n|---|---|---|---|---|---|"
)


def row(document: Written) -> str:
    early, late = document.rate(1 / 8, 1 / 4), document.rate(7 / 8, 1)
    return (
        f"| {document.name} | {document.tokens:,} | {early:.2f} | {late:.2f} | "
        f"{document.peak_mb:.0f} | {document.peak_mb - document.base_mb:.1f} |"
    )


def picture(found: Sequence[Written]) -> str:
    """Time per token over the position of the longest document of every kind, as one SVG."""
    longest = {document.name: document for document in sorted(found, key=lambda d: d.tokens)}
    shown = list(longest.values())[: len(COLOURS)]
    return named_curves(
        {document.name: document.curve for document in shown},
        end=max(document.tokens for document in shown),
        title="Milliseconds per token over the position in the document",
        x_label="position",
        y_label="ms per token",
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("models", nargs="*", default=[None], metavar="NAME=MODEL")
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--window", type=int, default=128)
    parser.add_argument("--cpu-time", action="store_true", help="not the time of the clock")
    parser.add_argument("--json", type=Path, help="JSON lines of what was measured")
    parser.add_argument("--plot", type=Path)
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        print(
            json.dumps(
                write_document(args.models[0], args.window or None, args.tokens, args.cpu_time)
            )
        )
        return
    print(HEADER)
    found = list(documents(args.models, args.window, args.tokens, args.cpu_time, args.json))
    print(f"\n{found[0].machine}")
    if args.plot is not None:
        args.plot.write_text(picture(found))


if __name__ == "__main__":
    main()
