"""Options of the objective and of training: which noise, how long, how precisely."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from itertools import pairwise
from typing import Any, Literal

from blockdiffusion.diffusion.estimators import (
    T_MIN,
    Estimator,
    EstimatorName,
    Stratify,
    Transition,
    build_estimator,
)
from blockdiffusion.diffusion.schedules import SCHEDULES
from blockdiffusion.errors import UserError, either
from blockdiffusion.limits import check_limit, check_limits
from blockdiffusion.options import REQUIRED, option

Parallel = Literal["ddp", "fsdp"]


@dataclass(frozen=True, kw_only=True)
class ObjectiveKind:
    """The meaning of an objective's name.

    Attributes:
        network: values in the configuration of such a network.
        has_one_block: whether a block is the whole row.
        stored: options that the configuration keeps: its name there -> the name of the option.
        usual_estimator: for `estimator` null.
        reads: the options that it reads.
        why_not: why it does not read the others.
    """

    network: Mapping[str, Any]
    has_one_block: bool = False
    stored: Mapping[str, str] = field(default_factory=dict)
    usual_estimator: EstimatorName = "complement"
    reads: tuple[str, ...] = (
        "estimator", "schedule", "clip", "num_noisy", "t_min", "stratify",
    )  # fmt: skip
    why_not: str = "which has no such choice"


OBJECTIVES = {
    "bd3lm": ObjectiveKind(
        network={"objective": "block_diffusion"},
        reads=(*ObjectiveKind.reads, "ar_loss"),
    ),
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
    """The training objective: which noise, or the next token."""

    name: Literal["bd3lm", "mdlm", "sedd", "d3pm", "ar"] = option(
        "bd3lm",
        "masked diffusion in blocks; the same with one block a row; SEDD or D3PM in blocks; or the "
        "autoregressive baseline, which reads no other key of this section",
    )
    estimator: EstimatorName | None = option(
        None,
        "how masks are drawn and weighted; the paper's is bernoulli. null: complement, which "
        "learns most from a row. Not read by d3pm",
    )
    schedule: str = option(
        "linear",
        f"noise schedule: {either(SCHEDULES)}. Without a clip, count and complement "
        "integrate t out and allow linear only. For d3pm it is part of the model",
    )
    clip: tuple[float, float] | None = option(
        None,
        "keep mask probabilities in this interval, such as [0.3, 0.8]; null: all of (0, 1]. With a "
        "clip the training loss is not a bound",
    )
    num_noisy: int | None = option(
        None,
        "N, noisy copies of a row that share one clean stream in a pass of (N + 1) L tokens; null: "
        "1, and a pair for complement",
    )
    t_min: float = option(
        T_MIN,
        "bernoulli leaves out smaller mask probabilities (with the linear schedule p = t), since "
        "1/t has no finite variance near 0; must be below the end of the clip",
    )
    stratify: Stratify = option(
        "row",
        "spread the draws evenly over the batch and over each row, over the batch only, or draw "
        "independently",
    )
    transition: Transition = option(
        "absorbing", "what noise turns a token into in d3pm: the mask, or a uniform token"
    )
    timesteps: int = option(1000, "T, the time steps of d3pm")
    ar_loss: float = option(
        0.0,
        "weight of the next-token loss on the clean stream of the same pass, for adapted causal "
        "models that keep their reading and attention",
    )

    def __post_init__(self) -> None:
        self._refuse_what_is_not_read()
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
    def is_adaptable(self) -> bool:
        """Whether a causal model can be adapted to it."""
        return "ar_loss" in OBJECTIVES[self.name].reads

    @property
    def of_network(self) -> dict[str, Any]:
        """Values in the configuration of such a network."""
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
        """Make the estimator of the options; `Diffusion.fitted` fits it to a network."""
        return build_estimator(
            self.used_estimator,
            schedule=self.schedule,
            clip=self.clip,
            num_noisy=self.num_noisy,
            t_min=self.t_min,
            stratify=self.stratify,
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class AdaptOptions:
    """A causal language model that becomes a block diffusion model."""

    parent: str | None = option(
        None,
        "causal language model to start from, whose sizes are taken: a directory of transformers, "
        "a GGUF file or a Hugging Face id; also one that was adapted before. null: a new network",
    )
    reading: Literal["next", "shifted", "same"] = option(
        "next",
        "which position predicts token i: position i, which reads the token before (next), or "
        "position i - 1, which reads its own token (shifted, as in Fast-dLLM v2), as the parent "
        "does both ways; or position i, which reads its own token, as in the paper's network "
        "(same)",
    )
    clean_attention: Literal["causal", "block"] = option(
        "causal", "how clean tokens see each other: as in the parent, or by whole blocks"
    )
    block_attention: Literal["full", "causal"] = option(
        "full",
        "how tokens of a noisy block see each other: all, or those up to themselves, with which "
        "left-to-right sampling is the parent, exactly",
    )
    mask: str = option(
        "mean",
        "how the embedding of the mask token starts: mean, of all embeddings, or a token of the "
        "parent, whose row is copied",
    )
    lora_rank: int = option(
        0,
        "rank of the matrices of LoRA, which are trained instead of the weights and saved alone; "
        "0: all weights are trained",
    )
    lora_alpha: float = option(32.0, "LoRA's products count this much, divided by the rank")
    lora_dropout: float = option(0.0, "dropout of the inputs of LoRA's matrices")
    freeze: tuple[str, ...] = option(
        (),
        "parameters that keep the parent's values: names of transformers, or patterns such as "
        "model.layers.0.* and *embed_tokens*",
    )

    def __post_init__(self) -> None:
        check_limits(self, "adapt.")
        usual = AdaptOptions.__dataclass_fields__
        for name in () if self.lora_rank else ("lora_alpha", "lora_dropout"):
            if (value := getattr(self, name)) != usual[name].default:
                raise UserError(
                    f"adapt.{name} is {value}, but adapt.lora_rank is 0, so nothing reads it; give "
                    "a rank, such as 16, or leave it out"
                )
        if self.lora_rank and self.freeze:
            raise UserError(
                "adapt.freeze is given, but LoRA trains no weight of the parent anyway; leave out "
                "adapt.freeze or adapt.lora_rank"
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainOptions:
    """How long, on which device and in which precision to train."""

    steps: int = option(REQUIRED, "updates of the weights")
    block_sizes: tuple[int, ...] = option(
        (),
        "block sizes in equal parts of the steps, such as [1, 2, 4]: each divides the next, and "
        "the last is model.block_size; empty: model.block_size in all steps",
    )
    batch_size: int = option(512, "rows of one update, of all processes together")
    micro_batch_size: int | None = option(
        None, "rows of one forward and backward pass; null: the whole batch"
    )
    activation_checkpointing: bool = option(
        False,
        "keep only the inputs of the layers and compute the rest again in the backward pass: less "
        "memory, a third more work, the same numbers",
    )
    compile: bool = option(
        False, "compile the layers on GPUs: faster steps, after some twenty seconds"
    )
    seed: int = option(0, "seed of the initial weights, the order of rows, the masks and dropout")
    dtype: Literal["float32", "bfloat16"] = option(
        "float32",
        "bfloat16 is autocast, in training only: weights, average, optimizer and evaluation are "
        "float32",
    )
    device: Literal["auto", "cpu", "cuda", "mps"] = option(
        "auto", "auto takes CUDA, then MPS, then the CPU"
    )
    threads: int | None = option(None, "threads of the CPU operators; null: what PyTorch chooses")
    parallel: Parallel = option(
        "ddp",
        "what each of several processes holds: the whole network, or a shard of every tensor. One "
        "process holds all of it either way",
    )

    def __post_init__(self) -> None:
        check_limits(self, "train.")
        if self.micro_batch_size is not None and self.micro_batch_size > self.batch_size:
            raise UserError(
                f"train.micro_batch_size is {self.micro_batch_size}; it must be at most "
                f"train.batch_size, which is {self.batch_size}"
            )
        sizes = self.block_sizes
        for size in sizes:
            check_limit("block_size", size, "train.block_sizes")
        grows = all(a < b and b % a == 0 for a, b in pairwise(sizes))
        if not grows or len(sizes) > self.steps:
            raise UserError(
                f"train.block_sizes is {list(sizes)}; it must grow, each size dividing the next, "
                "with at most as many sizes as train.steps"
            )

    def block_size_at(self, step: int) -> int | None:
        """Return the block size of update `step` (from 1); None: that of the model."""
        if not self.block_sizes:
            return None
        return self.block_sizes[(step - 1) * len(self.block_sizes) // self.steps]
