"""AdamW and Muon, learning-rate schedules, gradient clipping, the moving average of the weights."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from blockdiffusion.errors import UserError
from blockdiffusion.limits import check_limits
from blockdiffusion.options import option
from blockdiffusion.runtime.distributed import first_row, is_sharded, local, whole
from blockdiffusion.train.adamw_8bit import AdamW8bit

MOMENTUM = 0.95


@dataclass(frozen=True, kw_only=True, slots=True)
class OptimOptions:
    """The optimizer and what surrounds it; the defaults are the paper's recipe."""

    name: Literal["adamw", "muon"] = option(
        "adamw", "muon: Muon for the matrices of attention and MLP, AdamW for everything else"
    )
    lr: float = option(3e-4, "learning rate after the warm-up, of AdamW and of Muon")
    betas: tuple[float, float] = option((0.9, 0.999), "AdamW's decay rates, in [0, 1)")
    eps: float = option(1e-8, "AdamW's epsilon")
    momentum: float = option(MOMENTUM, "Muon's momentum")
    state: Literal["float32", "8bit"] = option(
        "float32",
        "type of AdamW's moments: 8bit takes a quarter of the memory, and nearly the same steps",
    )
    weight_decay: float = option(0.0, "decoupled weight decay, on matrices only")
    warmup_steps: int = option(2500, "updates of the linear warm-up")
    schedule: Literal["constant", "cosine", "linear"] = option(
        "constant", "learning rate after the warm-up; cosine and linear end at zero"
    )
    clip_norm: float | None = option(1.0, "the gradient's global norm is cut to this; null: never")
    ema_decay: float = option(
        0.9999,
        "decay of the moving average that is evaluated and released, warmed up as (1 + n) / (10 + "
        "n); with 0 it is the weights themselves",
    )

    def __post_init__(self) -> None:
        check_limits(self, "optim.")
        if not all(0 <= beta < 1 for beta in self.betas):
            raise UserError(f"optim.betas is {list(self.betas)}; both must be in [0, 1)")
        if self.name != "muon" and self.momentum != MOMENTUM:
            raise UserError(
                f"optim.momentum is {self.momentum}, but optim.name is {self.name}, which has "
                f"optim.betas; set optim.momentum={MOMENTUM}, or optim.name=muon"
            )
        if self.state != "float32" and self.name != "adamw":
            raise UserError(
                f"optim.state is {self.state}, but optim.name is {self.name}; set "
                "optim.state=float32, or optim.name=adamw"
            )


def learning_rate(options: OptimOptions, step: int, steps: int) -> float:
    """Return the learning rate of update `step` (1 .. steps): linear warm-up, then the schedule.

    The warm-up reaches `lr` at update `warmup_steps`. A decay starts there and reaches zero one
    update after the last.
    """
    warmup = options.warmup_steps
    if step < warmup:
        return options.lr * step / warmup
    progress = max(0, step - 1 - warmup) / max(1, steps - warmup)
    match options.schedule:
        case "constant":
            return options.lr
        case "cosine":
            return options.lr * 0.5 * (1 + math.cos(math.pi * progress))
        case "linear":
            return options.lr * (1 - progress)


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def make_optimizer(network: Any, options: OptimOptions) -> torch.optim.Optimizer:
    """Return the optimizer of a network: AdamW with weight decay on matrices only; with `muon`,
    Muon has the hidden matrices.

    Raises:
        UserError: moments of 8 bits are asked for, and the parameters are shards.

    AdamW is fused: several times faster than the other kernels, on CPUs too.
    """
    parameters = trainable(network).values()
    of_muon = {id(p) for p in network.hidden_matrices()} if options.name == "muon" else set()
    hidden = [p for p in parameters if id(p) in of_muon]
    others = [p for p in parameters if id(p) not in of_muon]
    groups = [
        {"params": [p for p in others if p.ndim >= 2], "weight_decay": options.weight_decay},
        {"params": [p for p in others if p.ndim < 2], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    if options.state == "8bit":
        if any(map(is_sharded, others)):
            raise UserError(
                "optim.state is 8bit, but train.parallel is fsdp, which shards moments already; "
                "set optim.state=float32, or train.parallel=ddp"
            )
        return AdamW8bit(groups, options.lr, options.betas, options.eps)
    adamw = torch.optim.AdamW(
        groups,
        lr=options.lr,
        betas=options.betas,
        eps=options.eps,
        fused=True,
    )
    if not hidden:
        return adamw
    kind = ShardedMuon if any(map(is_sharded, hidden)) else torch.optim.Muon
    muon = kind(
        hidden,
        lr=options.lr,
        momentum=options.momentum,
        weight_decay=options.weight_decay,
        adjust_lr_fn="match_rms_adamw",
    )
    return CombinedOptimizer(muon, adamw)


def optimizer_state_keys(
    optimizer: torch.optim.Optimizer, parameter: nn.Parameter
) -> tuple[str, ...]:
    """Return the names of the tensors that the optimizer keeps for a parameter."""
    for group in optimizer.param_groups:
        if "ns_steps" in group and any(parameter is p for p in group["params"]):
            return ("momentum_buffer",)
    return ("step", "exp_avg", "exp_avg_sq")


def moments_of(
    optimizer: torch.optim.Optimizer, parameter: nn.Parameter
) -> Mapping[str, torch.Tensor]:
    """Return the optimizer's state of a parameter, in floats."""
    if isinstance(optimizer, AdamW8bit):
        return optimizer.moments(parameter)
    return optimizer.state[parameter]


def set_moments(
    optimizer: torch.optim.Optimizer, parameter: nn.Parameter, moments: dict[str, torch.Tensor]
) -> None:
    """Replace the optimizer's state of a parameter."""
    if isinstance(optimizer, AdamW8bit) and moments:
        optimizer.load_moments(parameter, moments)
    else:
        optimizer.state[parameter] = moments


class ShardedMuon(torch.optim.Muon):
    """Muon for matrices sharded by rows (FSDP2), with the numbers of `torch.optim.Muon` on whole
    matrices, bit for bit.

    Weights and momentum stay in shards. The direction of one matrix at a time is gathered, in the
    bfloat16 that Muon rounds it to; every process orthogonalizes all of it and keeps its rows. An
    update exchanges 2 bytes per number of the matrices, and costs every process as many operations
    as with replicas (`flops.muon_flops`).
    """

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        assert closure is None
        for group in self.param_groups:
            assert group["nesterov"] and group["adjust_lr_fn"] == "match_rms_adamw"
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, group)

    def _update(self, parameter: nn.Parameter, group: dict[str, Any]) -> None:
        grad, state, lr = parameter.grad, self.state[parameter], group["lr"]
        assert grad is not None
        if not state:
            state["momentum_buffer"] = torch.zeros_like(grad)
        momentum = state["momentum_buffer"].lerp_(grad, 1 - group["momentum"])
        direction_RC = whole(grad.lerp(momentum, group["momentum"]).bfloat16())
        update_RC = _orthogonalized(direction_RC, group)
        own, first = local(parameter), first_row(parameter)
        own.mul_(1 - lr * group["weight_decay"])
        scale = 0.2 * math.sqrt(max(parameter.shape))
        own.add_(update_RC[first : first + len(own)], alpha=-lr * scale)


def _orthogonalized(direction_RC: torch.Tensor, group: dict[str, Any]) -> torch.Tensor:
    """Return the Newton-Schulz iteration of `torch.optim.Muon`: singular values near 1."""
    a, b, c = group["ns_coefficients"]
    is_tall = direction_RC.shape[0] > direction_RC.shape[1]
    x = direction_RC.T if is_tall else direction_RC
    x = x / x.norm().clamp(min=group["eps"])
    for _ in range(group["ns_steps"]):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.T if is_tall else x


class CombinedOptimizer(torch.optim.Optimizer):
    """Several optimizers of different parameters as one: one list of groups, one state."""

    def __init__(self, *parts: torch.optim.Optimizer):
        self._parts = [(part, len(part.param_groups)) for part in parts]
        super().__init__([group for part in parts for group in part.param_groups], {})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        assert closure is None
        first = 0
        for part, count in self._parts:
            # The groups and the state are this object's, also after it has loaded others.
            part.param_groups = self.param_groups[first : first + count]
            part.state = self.state
            part.step()
            first += count


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = lr


def clip_gradients(parameters: Iterable[nn.Parameter], clip_norm: float | None) -> torch.Tensor:
    """Scale the gradients in place to a global 2-norm of at most `clip_norm`.

    Returns:
        The norm before clipping, a scalar tensor on the device of the parameters.
    """
    trained = [parameter for parameter in parameters if parameter.grad is not None]
    norm = whole(nn.utils.get_total_norm([p.grad for p in trained if p.grad is not None]))
    if clip_norm is not None:
        nn.utils.clip_grads_with_norm_(trained, clip_norm, norm)
    return norm


class MovingAverage:
    """Exponential moving average (EMA) of a model's trainable parameters.

    The decay warms up as min(decay, (1 + n) / (10 + n)) with n the number of updates; otherwise the
    average of a short run would be its initialisation.
    """

    def __init__(self, model: nn.Module, decay: float):
        self.decay = decay
        named = trainable(model)
        self._parameters: list[torch.Tensor] = list(named.values())
        self.average: dict[str, torch.Tensor] = {n: p.detach().clone() for n, p in named.items()}

    def decay_at(self, step: int) -> float:
        return min(self.decay, (1 + step) / (10 + step))

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Move the average towards the weights after update `step` (from 1)."""
        torch._foreach_lerp_(list(self.average.values()), self._parameters, 1 - self.decay_at(step))

    @contextmanager
    def swapped(self) -> Iterator[None]:
        """Let the model hold the average within the context, and its weights again afterwards."""
        self._exchange()
        try:
            yield
        finally:
            self._exchange()

    def _exchange(self) -> None:
        # Pointers are exchanged, not contents: no memory, no time, no rounding.
        for name, parameter in zip(self.average, self._parameters, strict=True):
            weights = parameter.data
            parameter.data = self.average[name]
            self.average[name] = weights
