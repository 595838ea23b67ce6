"""What a recipe says of the objective and of the training: which noise, how long, how precisely."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Literal

from blockdiffusion.diffusion.estimators import (
    T_MIN,
    Estimator,
    EstimatorName,
    Stratify,
    Transition,
    build_estimator,
)
from blockdiffusion.errors import UserError
from blockdiffusion.limits import check_limits

Parallel = Literal["ddp", "fsdp"]


@dataclass(frozen=True, kw_only=True)
class ObjectiveKind:
    """What an objective's name stands for.

    Attributes:
        network: what the configuration of such a network says.
        has_one_block: whether a block is the whole row.
        stored: what it remembers of the options: its name there -> the name of the option.
        usual_estimator: what `estimator` null means.
        reads: the options that mean something.
        why_not: why the others do not.
    """

    network: Mapping[str, Any]
    has_one_block: bool = False
    stored: Mapping[str, str] = field(default_factory=dict)
    usual_estimator: EstimatorName = "complement"
    reads: tuple[str, ...] = ("estimator", "schedule", "clip", "num_noisy", "t_min", "stratify")
    why_not: str = "which has no such choice"


OBJECTIVES = {
    "bd3lm": ObjectiveKind(network={"objective": "block_diffusion"}),
    "mdlm": ObjectiveKind(network={"objective": "block_diffusion"}, has_one_block=True),
    "sedd": ObjectiveKind(network={"objective": "score_entropy", "time_conditioning": True}),
    "d3pm": ObjectiveKind(
        network={"objective": "d3pm", "time_conditioning": True},
        stored={
            "transition": "transition", "timesteps": "timesteps", "noise_schedule": "schedule",
        },
        usual_estimator="bernoulli",  # which `Diffusion.fitted` turns into `Timesteps`
        reads=("schedule", "num_noisy", "stratify", "transition", "timesteps"),
        why_not="whose time is discrete",
    ),
    "ar": ObjectiveKind(  # the baseline has no conditioning
        network={"objective": "autoregressive", "adaln": False},
        reads=(),
        why_not="which draws no masks",
    ),
}  # fmt: skip


@dataclass(frozen=True, kw_only=True, slots=True)
class ObjectiveOptions:
    """What the network is trained on: which noise, or the next token."""

    name: Literal["bd3lm", "mdlm", "sedd", "d3pm", "ar"] = "bd3lm"
    """bd3lm: masked diffusion in blocks; mdlm: the same, one block a row; sedd, d3pm: score entropy
    and discrete time in blocks; ar: the autoregressive baseline. See `OBJECTIVES`."""
    estimator: EstimatorName | None = None
    """How masks are drawn, and what they weigh; null: complement. The paper's is bernoulli. See
    docs/concepts.md."""
    schedule: str = "linear"
    """linear, cosine, square, sqrt or log; of bernoulli, resampled, d3pm and clips."""
    clip: tuple[float, float] | None = None
    """Mask probabilities are kept in this interval; null: all of (0, 1]."""
    num_noisy: int | None = None
    """Noisy copies that share one clean stream; null: 1, and a pair for complement."""
    t_min: float = T_MIN
    """Mask probabilities below are left out by bernoulli: 1/t has no finite variance."""
    stratify: Stratify = "row"
    """Draws are spread evenly over the batch and each row, over the batch only, or not at all."""
    transition: Transition = "absorbing"
    """What noise makes of a token in d3pm: the mask, or a uniform token."""
    timesteps: int = 1000
    """T, the time steps of d3pm."""

    def __post_init__(self) -> None:
        self._refuse_what_is_not_read()
        if not 0 <= self.t_min < 1:
            raise UserError(f"objective.t_min is {self.t_min}; it must be in [0, 1)")
        check_limits(self, "objective.")
        self.make_estimator()
        self._refuse_times_where_none_is_drawn()
        if self.clip is not None and not self.allows_clip:
            raise UserError(
                f"objective.clip is {self.clip}, but objective.estimator is {self.used_estimator}, "
                f"which draws the number of masked tokens before the time that {self.name} reads; "
                "set objective.clip=null, or objective.estimator=bernoulli"
            )

    @property
    def used_estimator(self) -> EstimatorName:
        """The estimator that masks are drawn with."""
        return self.estimator or OBJECTIVES[self.name].usual_estimator

    @property
    def has_one_block(self) -> bool:
        """Whether a block is the whole row."""
        return OBJECTIVES[self.name].has_one_block

    @property
    def is_autoregressive(self) -> bool:
        """Whether the network predicts the next token, and no masks are drawn."""
        return not OBJECTIVES[self.name].reads

    @property
    def of_network(self) -> dict[str, Any]:
        """What the configuration of such a network says."""
        kind = OBJECTIVES[self.name]
        stored = {name: getattr(self, option) for name, option in kind.stored.items()}
        return {**kind.network, **stored}

    @property
    def allows_clip(self) -> bool:
        """Whether mask probabilities can be kept in an interval."""
        kind = OBJECTIVES[self.name]
        times_first = self.used_estimator in ("bernoulli", "resampled")
        reads_time = kind.network.get("time_conditioning", False)
        return "clip" in kind.reads and (times_first or not reads_time)

    def _refuse_what_is_not_read(self) -> None:
        kind = OBJECTIVES[self.name]
        for item in fields(self):
            value, default = getattr(self, item.name), item.default
            if item.name not in ("name", *kind.reads) and value != default:
                raise UserError(
                    f"objective.{item.name} is {value}, but objective.name is {self.name}, "
                    f"{kind.why_not}; set objective.{item.name}="
                    f"{'null' if default is None else default}"
                )

    def _refuse_times_where_none_is_drawn(self) -> None:
        if self.is_autoregressive or self.used_estimator not in ("count", "complement"):
            return
        for name, value, default in (
            ("schedule", self.schedule if self.clip is None else "linear", "linear"),
            ("t_min", self.t_min, T_MIN),
        ):
            if value != default:
                raise UserError(
                    f"objective.{name} is {value}, but objective.estimator is "
                    f"{self.used_estimator}, which draws no times; set objective.{name}={default}, "
                    "or objective.estimator=bernoulli"
                )

    def make_estimator(self) -> Estimator:
        """The law of the masks that the options name; `Diffusion.fitted` makes it the network's."""
        return build_estimator(
            self.used_estimator,
            schedule=self.schedule,
            clip=self.clip,
            num_noisy=self.num_noisy,
            t_min=self.t_min,
            stratify=self.stratify,
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainOptions:
    """How long, on what and in which precision to train."""

    steps: int
    """Updates of the weights."""
    batch_size: int = 512
    """Rows of the global batch, one update."""
    micro_batch_size: int | None = None
    """Rows of one forward and backward pass; null: the whole batch. It saves memory only."""
    activation_checkpointing: bool = False
    """Keep only what enters the layers, and compute them again in the backward pass."""
    compile: bool = False
    """On GPUs, make few of the layers' small operations (after some twenty seconds)."""
    seed: int = 0
    dtype: Literal["float32", "bfloat16"] = "float32"
    """bfloat16 is autocast, in training: weights, average, optimizer and evaluation are float32."""
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    threads: int | None = None
    """Threads of the CPU operators; null: what PyTorch chooses."""
    parallel: Parallel = "ddp"
    """What several processes (torchrun) hold: each all of the network (ddp), or a shard of every
    tensor (fsdp). One process holds all of it, so that a recipe is good for any number."""

    def __post_init__(self) -> None:
        check_limits(self, "train.")
        if self.micro_batch_size is not None and self.micro_batch_size > self.batch_size:
            raise UserError(
                f"train.micro_batch_size is {self.micro_batch_size}; it must be at most "
                f"train.batch_size, which is {self.batch_size}"
            )
