"""An estimate in words: what `blockdiff estimate` prints."""

from __future__ import annotations

from blockdiffusion.estimate.run import Estimate
from blockdiffusion.estimate.sampling import SamplingEstimate
from blockdiffusion.estimate.training import TrainingEstimate
from blockdiffusion.reports.numbers import count as amount
from blockdiffusion.reports.numbers import duration, scaled
from blockdiffusion.runtime.hardware import Hardware


def _in(number: float, unit: str = "B") -> str:
    return scaled(number, unit)


def estimate_lines(estimate: Estimate) -> list[str]:
    """The lines of an estimate."""
    network, device = estimate.network, estimate.device
    kind = "autoregressive" if network.autoregressive else f"S = {network.block_size:,}"
    many = f"{estimate.devices} x " if estimate.devices > 1 else ""
    return [
        f"{estimate.recipe} on {many}{device.name}",
        *_section({
            "network": [f"{network.num_hidden_layers} layers, width {network.hidden_size}, {kind}, "
                     f"L = {network.seq_len:,}, V = {network.vocab_size:,}"],
            "parameters": [f"{amount(estimate.parameters)}, without input embedding and output "
                        f"{amount(estimate.parameters - estimate.embedding_parameters)}"],
            **_device(device),
        }),
        "",
        *_training_lines(estimate.training, estimate.devices),
        "",
        *_sampling_lines(estimate.sampling),
    ]  # fmt: skip


def _section(lines: dict[str, list[str]]) -> list[str]:
    """Lines of texts by name, each name before its first text."""
    return [
        f"  {'' if index else name:<13}{text}"
        for name, texts in lines.items()
        for index, text in enumerate(texts)
    ]


def _device(device: Hardware) -> dict[str, list[str]]:
    source = "measured just now" if device.measured else "from the data sheet"
    peaks = ", ".join(f"{name} {_in(flops, 'FLOP/s')}" for name, flops in device.flops.items())
    shares = device.shares
    between = f"{shares.traffic:.0%}"
    if shares.traffic_compiled != shares.traffic:
        between += f" (compiled {shares.traffic_compiled:.0%})"
    return {
        "device": [f"{peaks}; {device.bandwidth / 1e9:,.4g} GB/s; {_in(device.memory)} to use",
                   source],
        "assumed": [
            f"{shares.products:.0%} of the peak in products, {shares.attention:.0%} in attention; "
            f"of the bandwidth {between}",
            f"between them; in sampling {shares.call_products:.0%} of the peak; of the bandwidth "
            f"{shares.reading:.0%} for weights,",
            f"{shares.call_rows:.0%} for the rest; "
            f"{duration(shares.layer_seconds)} to start a layer",
        ],
    }  # fmt: skip


def _training_lines(a: TrainingEstimate, devices: int) -> list[str]:
    memory, flops, total = a.memory, a.flops, a.flops.total
    parts = [(name, part / a.seconds.total) for name, part in vars(a.seconds).items()]
    time = [
        f"{duration(a.seconds_run)} in all; an update {duration(a.seconds_update)}",
        ", ".join(f"{name} {share:.0%}" for name, share in parts if share >= 0.005),
    ]
    if extra := a.flops_evaluation + a.flops_search:
        time.append(
            f"evaluation and search take {_in(extra, 'FLOP')} in addition (samples not counted)"
        )
    whole = [f"whole while needed {_in(memory.gathered)}"] if memory.gathered else []
    return [
        f"training in {a.dtype}: {a.steps:,} updates of {a.batch_size:,} rows, "
        f"{amount(a.tokens_run)} tokens of text",
        *_section({
            "a row": [f"{a.tokens_read:,} tokens read (N = {a.num_noisy}), "
                   f"{a.tokens_scored:,.0f} positions scored"],
            "operations": [
                f"{_in(a.flops_per_token, 'FLOP')} a token, {_in(total, 'FLOP')} an update, "
                f"{_in(a.flops_run, 'FLOP')} in all",
                f"layers {flops.layers / total:.0%}, attention {flops.attention / total:.0%} "
                f"(the mask asks for {flops.attention_needed / total:.0%}), "
                f"output {flops.head / total:.0%}",
            ],
            "memory": [
                f"weights {_in(memory.weights)}, gradients {_in(memory.gradients)}, optimizer "
                f"{_in(memory.optimizer)}, moving average {_in(memory.average)}",
                *whole,
                f"a micro-batch of {a.micro_batch}: activations {_in(memory.activations)}, "
                f"working space {_in(memory.working)}",
                f"at most {_in(memory.peak)} at a time, of {_in(a.memory_of_device)}",
            ],
            "micro-batch": [_fit(a, devices)],
            "time": time,
            "speed": [f"{a.tokens_per_second:,.3g} tokens of text a second; "
                   f"{_in(a.flops_per_second, 'FLOP/s')} a device, {a.peak_share:.0%} of its peak"],
            "price": [] if a.price is None else [f"{a.price:,.2f}"],
        }),
    ]  # fmt: skip


def _fit(a: TrainingEstimate, devices: int) -> str:
    rows = a.batch_size // devices
    if a.largest_micro_batch == 0:
        return (
            "not even one row fits; take train.activation_checkpointing=true, a shorter L, or "
            "more memory"
        )
    if a.largest_micro_batch == rows:  # more than an update has are not looked for
        return f"all {rows:,} rows that a device has of an update fit at once, or more"
    most = f"{a.largest_micro_batch:,} rows are the most that fit"
    return most if a.fits else f"{most}; the recipe's train.micro_batch_size does not"


def _sampling_lines(a: SamplingEstimate) -> list[str]:
    parts = {
        "reading": a.seconds_reading,
        "arithmetic": a.seconds_arithmetic,
        "starting": a.seconds_starting,
    }
    price = a.price_per_million
    return [
        f"sampling in {a.request.dtype}: {a.request.batch} x {a.new_tokens:,} tokens, "
        f"{a.tokens_per_forward:.3g} a call",
        *_section({
            "calls": [f"{a.calls:,}; one reads {_in(a.bytes_read)} (weights "
                   f"{_in(a.weight_bytes_read)}) and takes {_in(a.flops.total, 'FLOP')}"],
            "time": [
                f"a call {duration(a.seconds_call)}, mostly {max(parts, key=lambda n: parts[n])}",
                ", ".join(f"{name} {duration(seconds)}" for name, seconds in parts.items()),
            ],
            "speed": [f"{a.tokens_per_second:,.3g} tokens a second; "
                   f"a text {duration(a.seconds_row)}"],
            "memory": [f"weights {_in(a.weights)}, cache {_in(a.cache)}, logits {_in(a.logits)}; "
                    f"{a.largest_batch:,} rows are the most that fit"],
            "price": [] if price is None else [f"{price:,.2f} a million tokens"],
        }),
    ]  # fmt: skip
