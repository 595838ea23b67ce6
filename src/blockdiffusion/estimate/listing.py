"""An account in words."""

from __future__ import annotations

from blockdiffusion.estimate.run import Account
from blockdiffusion.estimate.sampling import SamplingAccount
from blockdiffusion.estimate.training import TrainingAccount
from blockdiffusion.reports.terminal import amount
from blockdiffusion.runtime.hardware import Hardware, Shares


def account_lines(account: Account) -> list[str]:
    """What `blockdiff plan` prints."""
    network, device = account.network, account.device
    kind = "autoregressive" if network.autoregressive else f"S = {network.block_size:,}"
    rest = account.parameters - account.embedding_parameters
    many = f"{account.devices} x " if account.devices > 1 else ""
    return [
        f"{account.recipe} on {many}{device.name}",
        _line("network", f"{network.num_layers} layers, width {network.width}, {kind}, "
                         f"L = {network.seq_len:,}, V = {network.vocab_size:,}"),
        _line("parameters", f"{amount(account.parameters)}, without input embedding and output "
                            f"{amount(rest)}"),
        *_device_lines(device),
        "",
        *_training_lines(account.training, account.devices),
        "",
        *_sampling_lines(account.sampling),
    ]  # fmt: skip


def _device_lines(device: Hardware) -> list[str]:
    source = "measured just now" if device.measured else "of the data sheet"
    peaks = ", ".join(f"{name} {_rate(flops)}" for name, flops in device.flops.items())
    shares = device.shares
    return [
        _line(
            "device",
            f"{peaks}; {device.bandwidth / 1e9:,.4g} GB/s; {_bytes(device.memory)} to use; "
            f"{source}",
        ),
        _line(
            "assumed",
            f"{shares.products:.0%} of the peak in products, {shares.attention:.0%} in attention; "
            f"of the bandwidth {_traffic(shares)}",
        ),
        _line(
            "",
            f"between them; in sampling {shares.call_products:.0%} of the peak; of the bandwidth "
            f"{shares.reading:.0%} for weights,",
        ),
        _line(
            "",
            f"{shares.call_rows:.0%} for the rest; {_time(shares.layer_seconds)} to start a layer",
        ),
    ]


def _traffic(shares: Shares) -> str:
    """Compiled layers only where they are others."""
    plain, compiled = shares.traffic, shares.traffic_compiled
    return f"{plain:.0%}" + (f" (compiled {compiled:.0%})" if compiled != plain else "")


def _training_lines(a: TrainingAccount, devices: int) -> list[str]:
    memory, seconds = a.memory, a.seconds
    flops, total = a.flops, a.flops.total
    lines = [
        f"training in {a.dtype}: {a.steps:,} updates of {a.batch_size:,} rows, "
        f"{amount(a.tokens_run)} tokens of text",
        _line("a row", f"{a.tokens_read:,} tokens read (N = {a.num_noisy}), "
                       f"{a.tokens_scored:,.0f} positions scored"),
        _line("operations", f"{_flop(a.flops_per_token)} a token, {_flop(total)} an update, "
                            f"{_flop(a.flops_run)} in all"),
        _line("", f"layers {flops.layers / total:.0%}, attention {flops.attention / total:.0%} "
                  f"(the mask asks for {flops.attention_needed / total:.0%}), "
                  f"output {flops.head / total:.0%}"),
        _line("memory", f"weights {_bytes(memory.weights)}, gradients {_bytes(memory.gradients)}, "
                        f"optimizer {_bytes(memory.optimizer)}, moving average "
                        f"{_bytes(memory.average)}"),
        *([_line("", f"whole while they are needed {_bytes(memory.gathered)}")]
          if memory.gathered else []),
        _line("", f"a micro-batch of {a.micro_batch}: activations {_bytes(memory.activations)}, "
                  f"weights in bf16 {_bytes(memory.copies)},"),
        _line("", f"logits and output's gradient {_bytes(memory.loss)}, backward pass of a layer "
                  f"{_bytes(memory.working)}"),
        _line("", f"at most {_bytes(memory.peak)} at a time, of {_bytes(a.memory_of_device)}"),
        _line("micro-batch", _fit(a, devices)),
        _line("time", f"{_time(a.seconds_run)} in all; an update {_time(seconds.total)}"),
        _line("", _shares(a)),
    ]  # fmt: skip
    extra = a.flops_evaluation + a.flops_search
    if extra:
        lines.append(
            _line("", f"evaluation and search take {_flop(extra)} besides (samples not counted)")
        )
    lines.append(
        _line("speed", f"{a.tokens_per_second:,.3g} tokens of text a second; "
                       f"{_rate(a.flops_per_second)} a device, {a.peak_share:.0%} of its peak")
    )  # fmt: skip
    if a.price is not None:
        lines.append(_line("price", f"{a.price:,.2f}"))
    return lines


def _shares(a: TrainingAccount) -> str:
    kinds = ("products", "attention", "traffic", "update", "exchange", "starting")
    parts = [(name, getattr(a.seconds, name) / a.seconds.total) for name in kinds]
    return ", ".join(f"{name} {share:.0%}" for name, share in parts if share >= 0.005)


def _fit(a: TrainingAccount, devices: int) -> str:
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


def _sampling_lines(a: SamplingAccount) -> list[str]:
    request = a.request
    slowest = max(
        ("reading", a.seconds_reading),
        ("arithmetic", a.seconds_arithmetic),
        ("starting", a.seconds_starting),
        key=lambda item: item[1],
    )[0]
    lines = [
        f"sampling in {request.dtype}: {request.batch} x {a.new_tokens:,} tokens, "
        f"{a.tokens_per_forward:.3g} a call",
        _line("calls", f"{a.calls:,}; one reads {_bytes(a.bytes_read)} (weights "
                       f"{_bytes(a.weight_bytes_read)}) and takes {_flop(a.flops.total)}"),
        _line("time", f"a call {_time(a.seconds_call)}, mostly {slowest}"),
        _line("", f"reading {_time(a.seconds_reading)}, arithmetic "
                  f"{_time(a.seconds_arithmetic)}, starting {_time(a.seconds_starting)}"),
        _line("speed", f"{a.tokens_per_second:,.3g} tokens a second; "
                       f"a text {_time(a.seconds_row)}"),
        _line("memory", f"weights {_bytes(a.weights)}, cache {_bytes(a.cache)}, logits "
                        f"{_bytes(a.logits)}; {a.largest_batch:,} rows are the most that fit"),
    ]  # fmt: skip
    if a.price_per_million is not None:
        lines.append(_line("price", f"{a.price_per_million:,.2f} a million tokens"))
    return lines


def _line(name: str, text: str) -> str:
    return f"  {name:<13}{text}"


def _scaled(number: float, unit: str) -> str:
    for limit, letter in (
        (1e18, "E"),
        (1e15, "P"),
        (1e12, "T"),
        (1e9, "G"),
        (1e6, "M"),
        (1e3, "k"),
    ):
        if number >= limit:
            return f"{number / limit:.3g} {letter}{unit}"
    return f"{number:.3g} {unit}"


def _bytes(number: float) -> str:
    return _scaled(number, "B")


def _flop(number: float) -> str:
    return _scaled(number, "FLOP")


def _rate(number: float) -> str:
    return _scaled(number, "FLOP/s")


def _time(seconds: float) -> str:
    for limit, length, word in (
        (2 * 86_400, 86_400, "days"),
        (5400, 3600, "hours"),
        (90, 60, "minutes"),
        (1, 1, "s"),
        (1e-3, 1e-3, "ms"),
    ):
        if seconds >= limit:
            return f"{seconds / length:,.3g} {word}"
    return f"{seconds * 1e6:.3g} us"
