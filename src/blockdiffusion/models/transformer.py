"""The paper's transformer (a DiT with rotary positions and adaptive layer norm), in one file.

Read from top to bottom: configuration, small parts, a layer, the model with its uses:

* `encode`: one training pass over [noisy_1; ...; noisy_N; clean] (paper, section 3.2),
* `encode_causal`: one pass of the autoregressive baseline, each token seeing those before it,
* `decode`: new tokens against a cache of clean blocks (section 3.3),
* `decode_causal`: the same for the autoregressive baseline,
* `denoise_logits`: logits of a whole noisy sequence, for evaluation and tests.

The arithmetic is that of the published checkpoints, to the digit. Two things are done differently
because they cost nothing: the last layer's clean stream computes keys and values only, and for a
network without time input the modulation is one vector, fused into the layer norms.

Shape suffixes: B batch, N noisy copies, L tokens of a sequence, T tokens of all streams, K blocks,
D width, H heads, E head width, V vocabulary, C width of the conditioning.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache, partial
from typing import Any, Literal, NamedTuple, get_args

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import PretrainedConfig, PreTrainedModel

from blockdiffusion.diffusion.denoiser import is_autoregressive
from blockdiffusion.diffusion.estimators import Transition
from blockdiffusion.diffusion.schedules import make_schedule
from blockdiffusion.errors import UserError, shown
from blockdiffusion.limits import check_limit
from blockdiffusion.models import fused
from blockdiffusion.models.attention import (
    Built,
    attend,
    attend_cached,
    attend_causal,
    attend_ragged,
    ragged_groups,
    resolve_backend,
)
from blockdiffusion.models.cache import BlockCache, held_positions
from blockdiffusion.models.cuda_graphs import Recorder
from blockdiffusion.models.masks import Streams, decode_predicate
from blockdiffusion.runtime.devices import allow_compilations

NORM_EPS = 1e-5
ROTARY_BASE = 10_000.0
FREQUENCIES = 256  # features of the time embedding
FEW_ROWS, SPLIT = 32, 8  # see Linear; measured best on two cores
Objective = Literal["block_diffusion", "score_entropy", "d3pm", "autoregressive"]


class BlockDiffusionConfig(PretrainedConfig):
    """Sizes and conventions of a block diffusion language model.

    Args:
        vocab_size: V, the mask token included.
        seq_len: L of the training sequences. Any L that `block_size` divides can be evaluated.
        block_size: S, tokens of a diffusion block.
        mask_id: id of the mask token; V - 1 where None.
        width, num_layers, num_heads, cond_dim, dropout: the network (paper: 768, 12, 12, 128, 0.1).
        adaln: whether layers are modulated by the conditioning (no for the AR baseline).
        time_conditioning: whether the network reads sigma; a BD3-LM does not.
        clean_attention: "block" (paper) or "causal", how clean tokens see each other.
        objective: "block_diffusion"; "score_entropy" (SEDD) or "d3pm", for other diffusions inside
            a block; or "autoregressive" for the baseline that predicts the next token and has no
            blocks (its `block_size` is 1).
        transition, timesteps, noise_schedule: of "d3pm": what tokens turn into ("absorbing" for the
            mask, "uniform"), T, and the schedule of the mask (or jump) probabilities on 1..T.
        noise_eps: noise ends where a token is still kept with this probability: 0, and 1e-3 for the
            published SEDD weights, which were trained with sigma = -log(1 - 0.999 t).
        bos: whether position 0 is a given BOS in this model's training data; None = not known.
        bos_id, eos_id: ids of those tokens, where there are any.
    """

    model_type = "blockdiffusion"

    def __init__(
        self,
        vocab_size: int = 258,
        seq_len: int = 128,
        block_size: int = 4,
        mask_id: int | None = None,
        width: int = 192,
        num_layers: int = 6,
        num_heads: int = 6,
        cond_dim: int = 128,
        dropout: float = 0.1,
        adaln: bool = True,
        time_conditioning: bool = False,
        clean_attention: str = "block",
        objective: str = "block_diffusion",
        transition: str = "absorbing",
        timesteps: int | None = None,
        noise_schedule: str = "linear",
        noise_eps: float = 0.0,
        bos: bool | None = None,
        bos_id: int | None = None,
        eos_id: int | None = None,
        **kwargs: Any,
    ):
        self.vocab_size = vocab_size
        self.seq_len = seq_len
        self.block_size = block_size
        self.mask_id = vocab_size - 1 if mask_id is None else mask_id
        self.width = width
        self.num_layers = num_layers
        self.num_heads = num_heads
        self.cond_dim = cond_dim
        self.dropout = dropout
        self.adaln = adaln
        self.time_conditioning = time_conditioning
        self.clean_attention = clean_attention
        self.objective = objective
        self.transition = transition
        self.timesteps = timesteps
        self.noise_schedule = noise_schedule
        self.noise_eps = noise_eps
        self.bos = bos
        self.bos_id = bos_id
        self.eos_id = eos_id
        kwargs.setdefault("tie_word_embeddings", False)
        super().__init__(**kwargs)
        self._check()

    def _check(self) -> None:
        for name in (
            "vocab_size", "seq_len", "block_size", "width", "num_layers", "num_heads", "cond_dim",
            "timesteps", "dropout", "noise_eps",
        ):  # fmt: skip
            check_limit(name, getattr(self, name))
        if self.seq_len % self.block_size:
            raise UserError(
                f"the sequence length {self.seq_len} is not a multiple of the block size "
                f"{self.block_size}; choose a block_size that divides it"
            )
        for name in ("mask_id", "bos_id", "eos_id"):
            check_limit(name, getattr(self, name))
            if (getattr(self, name) or 0) >= self.vocab_size:
                raise UserError(
                    f"{name} {getattr(self, name)} lies outside the vocabulary "
                    f"0..{self.vocab_size - 1}"
                )
        if self.width % (2 * self.num_heads):
            raise UserError(
                f"width {self.width} must be a multiple of 2 * num_heads = {2 * self.num_heads}"
            )
        if not 0 <= self.dropout < 1:
            raise UserError(f"dropout is {self.dropout}; it must be in [0, 1)")
        if self.clean_attention not in ("block", "causal"):
            raise UserError(
                f"clean_attention is {shown(self.clean_attention)}; choose block or causal"
            )
        if self.time_conditioning and not self.adaln:
            raise UserError("time_conditioning needs adaln: true, which carries the time")
        if self.objective not in get_args(Objective):
            raise UserError(
                f"objective is {shown(self.objective)}; choose {' or '.join(get_args(Objective))}"
            )
        if self.objective == "autoregressive" and (self.block_size > 1 or self.time_conditioning):
            raise UserError(
                "an autoregressive network has no blocks and reads no time; give it block_size 1 "
                "and time_conditioning false"
            )
        if self.transition not in get_args(Transition):
            raise UserError(f"transition is {shown(self.transition)}; choose absorbing or uniform")
        if self.objective == "d3pm" and (self.timesteps is None or self.timesteps < 1):
            raise UserError(
                f"timesteps is {self.timesteps}; a d3pm network needs at least 1 time step"
            )
        make_schedule(self.noise_schedule)  # refuses an unknown one
        if not 0 <= self.noise_eps < 1:
            raise UserError(f"noise_eps is {self.noise_eps}; it must lie in [0, 1)")
        if self.noise_eps and self.objective not in ("score_entropy", "d3pm"):
            raise UserError(
                f"noise_eps is {self.noise_eps}, which only score_entropy and d3pm networks have; "
                f"give 0 where the objective is {self.objective}"
            )


# --- small parts -----------------------------------------------------------------------------


class Rotary(NamedTuple):
    """The rotary angles of a pass's tokens, as they multiply heads (..., T, H, E): both halves of
    `cos` are the cosines, and `sin` is -sin beside sin; (..., T, 1, E)."""

    cos: torch.Tensor
    sin: torch.Tensor


def rotary_tables(positions: torch.Tensor, head_width: int, dtype: torch.dtype) -> Rotary:
    """Of positions (..., T); computed in float64.

    In float32 the angles at position 100,000 would already shift logits by 7e-4.
    """
    half = torch.arange(head_width // 2, device=positions.device, dtype=torch.float64)
    frequency = ROTARY_BASE ** (-2 * half / head_width)
    angle = positions[..., None, None].to(torch.float64) * frequency
    cos, sin = angle.cos().to(dtype), angle.sin().to(dtype)
    return Rotary(torch.cat([cos, cos], dim=-1), torch.cat([-sin, sin], dim=-1))


def rotate(x_BTHE: torch.Tensor, rotary: Rotary) -> torch.Tensor:
    """Rotary embedding by halves: (x1, x2) -> (x1 cos - x2 sin, x2 cos + x1 sin).

    In few operations, which are most of the time for few tokens; and none pads a gradient.
    """
    cos, sin = (x.to(x_BTHE.dtype) for x in rotary)
    exchanged = x_BTHE.roll(x_BTHE.shape[-1] // 2, -1)
    return torch.addcmul(exchanged.mul_(sin), x_BTHE, cos)


class Linear(nn.Linear):
    """A linear layer that, on a CPU and for few rows (sampling), splits its weight among threads.

    Such products are bound by reading the weight, and the library's own kernel keeps one thread
    waiting: at 4 to 16 rows the split is about twice as fast on two cores.
    """

    starts_at_zero = False  # see `BlockDiffusionModel._init_weights`

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        out_features, in_features = self.weight.shape
        parts = math.gcd(out_features, SPLIT)
        if input.device.type != "cpu" or input.numel() > FEW_ROWS * in_features or parts == 1:
            return super().forward(input)
        rows = input.reshape(1, -1, in_features).expand(parts, -1, -1)
        split = torch.bmm(rows, self.weight.view(parts, -1, in_features).transpose(1, 2))
        out = split.transpose(0, 1).reshape(*input.shape[:-1], out_features)
        return out if self.bias is None else out + self.bias


class LinearGelu(Linear):
    """A linear layer and the GELU behind it."""

    def before(self, input: torch.Tensor) -> torch.Tensor:
        """What the GELU is of."""
        return super().forward(input)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return fused.gelu(self.before(input))


def mlp(input: torch.Tensor, inner: LinearGelu, outer: Linear) -> torch.Tensor:
    """outer(inner(input)). For a gradient the GELU is computed again, and not kept."""
    if not _are_plain(inner, outer) or not torch.is_grad_enabled() or torch.compiler.is_compiling():
        return outer(inner(input))
    return fused.gelu_linear(inner.before(input), outer.weight, outer.bias)


def _are_plain(*layers: nn.Module) -> bool:
    """Whether nothing was put in the place of linear layers."""
    return all(type(layer) in (Linear, LinearGelu) for layer in layers)


class Norm(nn.Module):
    """Layer norm with a weight and no bias, then modulated: LN(x) * (1 + scale) + shift."""

    def __init__(self, width: int):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: torch.Tensor, shift: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        shape = self.weight.shape
        if not is_per_token(scale):
            return F.layer_norm(x, shape, *self.affine(shift, scale), NORM_EPS)
        return F.layer_norm(x, shape, self.weight, None, NORM_EPS) * (1 + scale) + shift

    def affine(self, shift: torch.Tensor, scale: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Weight and bias (D,) of the norm with one modulation for all tokens."""
        dtype = self.weight.dtype  # under autocast the modulation comes in a shorter one
        return self.weight * (1 + scale.flatten().to(dtype)), shift.flatten().to(dtype)


class TimeEmbedding(nn.Module):
    """sigma -> conditioning (..., C): cosines and sines, then linear, silu, linear."""

    def __init__(self, cond_dim: int):
        super().__init__()
        self.linear_in = nn.Linear(FREQUENCIES, cond_dim)
        self.linear_out = nn.Linear(cond_dim, cond_dim)

    def forward(self, sigma: torch.Tensor) -> torch.Tensor:
        half = FREQUENCIES // 2
        index = torch.arange(half, device=sigma.device, dtype=torch.float32)
        angle = sigma[..., None].float() * torch.exp(-math.log(10_000.0) * index / half)
        features = torch.cat([angle.cos(), angle.sin()], dim=-1).to(self.linear_in.weight.dtype)
        return F.silu(self.linear_out(F.silu(self.linear_in(features))))


class Modulation(Linear):
    """Conditioning (..., C) -> `count` vectors of the width (DiT's adaLN)."""

    def __init__(self, cond_dim: int, width: int, count: int):
        super().__init__(cond_dim, count * width)
        self.count = count
        self.starts_at_zero = True

    def forward(self, input: torch.Tensor) -> tuple[torch.Tensor, ...]:  # type: ignore[override]
        return super().forward(input).chunk(self.count, dim=-1)


def is_per_token(m: torch.Tensor) -> bool:
    """Whether a modulation (..., D), or a conditioning, is another than one vector for all tokens:
    also where there are none."""
    return m.shape[:-1].numel() != 1


def split_heads(qkv_BTD: torch.Tensor, num_heads: int, rotary: Rotary) -> tuple[torch.Tensor, ...]:
    """Rotated queries and keys, and values, each (B, H, T, E), from all three (B, T, 3 H E)."""
    heads = qkv_BTD.unflatten(-1, (3 * num_heads, -1))
    both, v = heads.split([2 * num_heads, num_heads], dim=2)
    q, k = rotate(both, rotary).transpose(1, 2).chunk(2, dim=1)
    return q, k, v.transpose(1, 2)


class Kept(NamedTuple):
    """The tokens that the last layer finishes.

    Attributes:
        first: how many of a row's tokens, from the first, have queries; None = all.
        place: rows and columns (M,) of those among them whose states are wanted; None = all.
    """

    first: int | None = None
    place: tuple[torch.Tensor, torch.Tensor] | None = None


ALL = Kept()


def take(x_BTD: torch.Tensor, kept: Kept) -> torch.Tensor:
    """What is kept of the tokens: (B, T', D), or (1, M, D) at their places."""
    x_BTD = x_BTD[:, : kept.first]
    return x_BTD if kept.place is None else x_BTD[kept.place][None]


def attended(
    qkv: tuple[torch.Tensor, ...],
    read: Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor],
    kept: Kept,
) -> torch.Tensor:
    """What attention gives to the tokens that are kept, heads side by side."""
    q, k, v = qkv
    return take(read(q[:, :, : kept.first], k, v).transpose(1, 2).flatten(2), kept)


class Layer(nn.Module):
    """Attention and MLP, each with its norm, its modulation and its gate.

    Attributes:
        compiled: whether what stands before and behind attention is compiled, so that its small
            operations become few: for training on GPUs, where gradients are asked for.
    """

    compiled = False

    def __init__(self, config: BlockDiffusionConfig):
        super().__init__()
        width = config.width
        self.num_heads = config.num_heads
        self.dropout = config.dropout
        self.attn_norm = Norm(width)
        self.attn_qkv = Linear(width, 3 * width, bias=False)
        self.attn_out = Linear(width, width, bias=False)
        self.mlp_norm = Norm(width)
        self.mlp_in = LinearGelu(width, 4 * width)
        self.mlp_out = Linear(4 * width, width)
        self.modulation = Modulation(config.cond_dim, width, 6) if config.adaln else None
        # With a modulation the gates do.
        self.attn_out.starts_at_zero = self.mlp_out.starts_at_zero = self.modulation is None

    def modulate(self, cond: torch.Tensor | None) -> tuple[torch.Tensor, ...]:
        """Shift, scale, gate of attention, then of the MLP."""
        if self.modulation is not None:
            return self.modulation(cond)
        zero, one = torch.zeros_like(self.attn_norm.weight), torch.ones_like(self.attn_norm.weight)
        return zero, zero, one, zero, zero, one

    def forward(
        self,
        x_BTD: torch.Tensor,
        cond: torch.Tensor | None,
        rotary: Rotary,
        read: Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor],
        kept: Kept = ALL,
    ) -> torch.Tensor:
        """The residual stream (B, T, D) after this layer; `read(q, k, v)` is attention.

        With `kept`, that of these tokens (see `take`): the others give keys and values only.
        """
        shift, scale, *modulation = self.modulate(cond)
        before, behind = Layer._heads, Layer._behind
        if torch.is_grad_enabled() and self.compiled:
            before, behind = _compiled_parts()
        elif torch.is_grad_enabled() and not is_per_token(scale) and self._is_plain():
            before, behind = Layer._heads_fused, Layer._behind_fused
        out = attended(before(self, x_BTD, shift, scale, rotary), read, kept)
        if kept.place is not None and self.compiled:  # for each number of tokens anew
            behind = Layer._behind
        modulation = [take(m, kept) if is_per_token(m) else m for m in modulation]
        return behind(self, take(x_BTD, kept), out, *modulation)

    def _heads(
        self,
        x_BTD: torch.Tensor,
        shift: torch.Tensor,
        scale: torch.Tensor,
        rotary: Rotary,
    ) -> tuple[torch.Tensor, ...]:
        """What attention reads; see `split_heads`."""
        return split_heads(
            self.attn_qkv(self.attn_norm(x_BTD, shift, scale)), self.num_heads, rotary
        )

    def _behind(
        self,
        x_BTD: torch.Tensor,
        out_BTD: torch.Tensor,
        attn_gate: torch.Tensor,
        mlp_shift: torch.Tensor,
        mlp_scale: torch.Tensor,
        mlp_gate: torch.Tensor,
    ) -> torch.Tensor:
        """The residual stream after this layer, from the one before and what attention gave."""
        x_BTD = torch.addcmul(x_BTD, attn_gate, self._drop(self.attn_out(out_BTD)))
        h_BTD = self.mlp_norm(x_BTD, mlp_shift, mlp_scale)
        out_BTD = mlp(h_BTD, self.mlp_in, self.mlp_out)
        return torch.addcmul(x_BTD, mlp_gate, self._drop(out_BTD))

    def _is_plain(self) -> bool:
        """Whether the linear layers are still those of `__init__`."""
        return _are_plain(self.attn_qkv, self.attn_out, self.mlp_in, self.mlp_out)

    def _heads_fused(
        self,
        x_BTD: torch.Tensor,
        shift: torch.Tensor,
        scale: torch.Tensor,
        rotary: Rotary,
    ) -> tuple[torch.Tensor, ...]:
        """`_heads` for one modulation, with the gradient of `fused`."""
        weight, bias = self.attn_norm.affine(shift, scale)
        return fused.norm_heads(
            x_BTD, weight, bias, self.attn_qkv.weight, NORM_EPS, *rotary, self.num_heads
        )

    def _behind_fused(
        self,
        x_BTD: torch.Tensor,
        out_BTD: torch.Tensor,
        attn_gate: torch.Tensor,
        mlp_shift: torch.Tensor,
        mlp_scale: torch.Tensor,
        mlp_gate: torch.Tensor,
    ) -> torch.Tensor:
        """`_behind` for one modulation, with the gradient of `fused`."""
        dropout = self.dropout if self.training else 0.0
        add = partial(fused.gated_sum, dropout=dropout)
        out, inner, outer = self.attn_out, self.mlp_in, self.mlp_out
        x_BTD = add(x_BTD, attn_gate.flatten(), out_BTD, out.weight, out.bias, has_gelu=False)
        weight, bias = self.mlp_norm.affine(mlp_shift, mlp_scale)
        h_BTI = fused.norm_linear(x_BTD, weight, bias, inner.weight, inner.bias, NORM_EPS)
        return add(x_BTD, mlp_gate.flatten(), h_BTI, outer.weight, outer.bias, has_gelu=True)

    def _drop(self, x: torch.Tensor) -> torch.Tensor:
        return F.dropout(x, self.dropout, self.training) if self.dropout else x


@lru_cache(maxsize=1)
def _compiled_parts() -> tuple[Callable[..., Any], Callable[..., Any]]:
    """Those of all layers, whose weights are inputs; compiled once for each shape."""
    allow_compilations()
    return (
        torch.compile(Layer._heads, dynamic=False),
        torch.compile(Layer._behind, dynamic=False),
    )


# --- the model -------------------------------------------------------------------------------


class BlockDiffusionModel(PreTrainedModel):
    """A block diffusion language model; see `BlockDiffusionConfig` for its sizes.

    Attributes:
        tokenizer: the Hugging Face tokenizer that `blockdiffusion.load` found beside the weights,
            or None.
        attention_backend: "dense", "chunked" or "flex"; None = the default of the device.
        activation_checkpointing: whether gradients keep only what enters the layers, and compute
            these again: less memory, a third more work, the same numbers.
        records_passes: whether the kernels of passes over a cache are recorded and started
            together (a CUDA graph; see `cuda_graphs`). `inference.sampling_copy` decides.
    """

    config_class = BlockDiffusionConfig
    base_model_prefix = ""
    main_input_name = "noisy_ids"
    layers: list[Layer]  # an nn.ModuleList

    def __init__(self, config: BlockDiffusionConfig):
        super().__init__(config)
        self.tokenizer = None
        self.attention_backend: str | None = None
        self.activation_checkpointing = False
        self.records_passes = False
        self.embedding = nn.Embedding(config.vocab_size, config.width)
        self.time = TimeEmbedding(config.cond_dim) if config.adaln else None
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.num_layers))  # type: ignore
        self.final_norm = Norm(config.width)
        self.final_modulation = (
            Modulation(config.cond_dim, config.width, 2) if config.adaln else None
        )
        self.output = Linear(config.width, config.vocab_size)
        self.output.starts_at_zero = True
        self.post_init()

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        """As in transformers; weights are copied out of the mapped file, where they may lie
        unaligned, so that matrix products round as they did before saving."""
        loaded = super().from_pretrained(*args, **kwargs)
        for parameter in (loaded[0] if isinstance(loaded, tuple) else loaded).parameters():
            parameter.data = parameter.data.clone()
        return loaded

    def compile_layers(self) -> None:
        """Lets PyTorch's compiler make few of the layers' small operations; see `Layer`."""
        for layer in self.layers:
            layer.compiled = True

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """The authors' initialisation: PyTorch's defaults; modulations and the output at zero.

        So are, in layers without modulation, the last products before each sum: as with it (whose
        gates start at zero), a layer begins as the identity. With PyTorch's defaults its noise is
        several times as large as the embeddings, and the baseline learns slowly.
        """
        if isinstance(module, Linear) and module.starts_at_zero:
            for parameter in module.parameters():
                nn.init.zeros_(parameter)
        elif isinstance(module, nn.Linear):
            module.reset_parameters()
        elif isinstance(module, nn.Embedding):
            nn.init.kaiming_uniform_(module.weight, a=math.sqrt(5))
        elif isinstance(module, Norm):
            nn.init.ones_(module.weight)

    # --- conditioning

    def _condition(
        self, sigma_BNK: torch.Tensor | None, shape: tuple[int, int, int], has_clean: bool
    ) -> torch.Tensor | None:
        """Conditioning that broadcasts over (B, T): one vector for all without time input.

        The clean stream reads sigma = 0: it has no noise, and its keys serve every later block.
        """
        if self.time is None:
            return None
        if not self.config.time_conditioning:
            return self.time(torch.zeros(1, 1, device=self.device))
        batch, copies, length = shape
        if sigma_BNK is None:
            raise UserError("this network is conditioned on time: give sigma")
        repeats = length // sigma_BNK.shape[-1]
        sigma = sigma_BNK.repeat_interleave(repeats, dim=-1).expand(batch, copies, length)
        sigma_BT = sigma.reshape(batch, copies * length)
        if has_clean:
            sigma_BT = torch.cat([sigma_BT, sigma_BT.new_zeros(batch, length)], dim=1)
        return self.time(sigma_BT)

    def _finish(self, x_BTD: torch.Tensor, cond: torch.Tensor | None) -> torch.Tensor:
        if self.final_modulation is not None:
            return self.final_norm(x_BTD, *self.final_modulation(cond))
        zero = torch.zeros_like(self.final_norm.weight)
        return self.final_norm(x_BTD, zero, zero)

    # --- training and evaluation: all blocks in one pass

    def encode(
        self,
        noisy_BNL: torch.Tensor,
        clean_BL: torch.Tensor | None,
        sigma_BNK: torch.Tensor | None = None,
        valid_BL: torch.Tensor | None = None,
        scored_BNL: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Hidden states (B, N, L, D) of N noisy copies that share one clean stream.

        Args:
            noisy_BNL: ids; every block of every copy may be masked in its own way.
            clean_BL: the clean ids, or None when one block is the whole sequence.
            sigma_BNK: time per block, for time-conditioned networks only (others ignore it).
            valid_BL: bool, False at padding, which no token attends to; None = all valid.
            scored_BNL: bool, the positions whose states are returned, as (M, D); None = all.
        """
        self._require(autoregressive=False)
        batch, copies, length = noisy_BNL.shape
        config = self.config
        one_block = length == config.block_size
        if length % config.block_size:
            raise UserError(
                f"the sequence length {length} is not a multiple of the block size "
                f"{config.block_size}; cut or pad the sequence"
            )
        if clean_BL is None and not one_block:
            raise UserError(
                f"clean_ids are needed: a sequence of {length} tokens has "
                f"{length // config.block_size} blocks, and later blocks read earlier clean ones"
            )
        has_clean = not one_block
        streams = Streams(length, config.block_size, copies, has_clean, config.clean_attention)
        ids_BT = noisy_BNL.reshape(batch, copies * length)
        if has_clean:
            assert clean_BL is not None
            ids_BT = torch.cat([ids_BT, clean_BL], dim=1)
        cond = self._condition(sigma_BNK, (batch, copies, length), has_clean)
        x_BTD = self.embedding(ids_BT)
        positions = torch.arange(length, device=ids_BT.device).repeat(copies + has_clean)
        rotary = rotary_tables(positions, config.width // config.num_heads, x_BTD.dtype)
        backend = resolve_backend(self.attention_backend, ids_BT.device)
        built: Built = {}

        def read(index: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            return attend(q, k, v, streams, backend, valid_BL, built)

        # Nothing reads the clean stream's output.
        noisy = copies * length
        if scored_BNL is None:
            hidden_BTD = self._run_layers(x_BTD, cond, rotary, read, Kept(noisy))
            return hidden_BTD.unflatten(1, (copies, length))
        row_M, token_M = scored_BNL.flatten(1).nonzero(as_tuple=True)
        return self._run_layers(x_BTD, cond, rotary, read, Kept(noisy, (row_M, token_M)))[0]

    def encode_causal(
        self, ids_BT: torch.Tensor, valid_BT: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Hidden states (B, T, D) of an autoregressive network; each token sees those up to itself.

        Args:
            ids_BT: ids at positions 0..T-1.
            valid_BT: bool, False at padding, which no other token attends to; None = all valid.
        """
        self._require(autoregressive=True)
        config = self.config
        x_BTD = self.embedding(ids_BT)
        positions = torch.arange(ids_BT.shape[1], device=ids_BT.device)
        rotary = rotary_tables(positions, config.width // config.num_heads, x_BTD.dtype)

        def read(index: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            return attend_causal(q, k, v, valid_BT)

        cond = None if self.time is None else self.time(torch.zeros(1, 1, device=self.device))
        return self._run_layers(x_BTD, cond, rotary, read, ALL)

    def _run_layers(
        self,
        x_BTD: torch.Tensor,
        cond: torch.Tensor | None,
        rotary: Rotary,
        read: Callable[[int, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor],
        kept: Kept,
    ) -> torch.Tensor:
        """Hidden states of the tokens that are kept (see `take`) after all layers and the norm.

        `read(layer's number, queries, keys, values)` is attention. The last layer computes for the
        other tokens what attention needs of them, and nothing else.
        """
        again = self.activation_checkpointing and torch.is_grad_enabled()
        for index, layer in enumerate(self.layers):
            last = kept if layer is self.layers[-1] else ALL
            arguments = (x_BTD, cond, rotary, partial(read, index), last)
            # Computed again with the same dropout: the random state is kept, too.
            x_BTD = (
                checkpoint(layer, *arguments, use_reentrant=False) if again else layer(*arguments)
            )
        per_token = cond is not None and is_per_token(cond)
        return self._finish(x_BTD, take(cond, kept) if per_token else cond)

    def _require(self, *, autoregressive: bool) -> None:
        if is_autoregressive(self) != autoregressive:
            uses = ("denoise blocks", "predict the next token")
            wanted = ("block_diffusion", "autoregressive")[autoregressive]
            raise UserError(
                f"this network was made to {uses[not autoregressive]}, not to "
                f"{uses[autoregressive]}; use a model whose objective is {wanted}"
            )

    def head(self, hidden: torch.Tensor) -> torch.Tensor:
        """Logits (..., V) of hidden states (..., D), before SUBS; in float32 at least, as sums over
        a vocabulary of probabilities with 8 bits would not be any more."""
        logits = self.output(hidden)
        return logits.to(torch.promote_types(logits.dtype, torch.float32))

    def denoise_logits(
        self,
        noisy_ids: torch.Tensor,
        clean_ids: torch.Tensor | None = None,
        sigma: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Logits (B, L, V) at the noisy positions, before SUBS.

        Args:
            noisy_ids: (B, L), L any multiple of the block size.
            clean_ids: (B, L); may be left out when L is the block size.
            sigma: (B,) or (B, K), for time-conditioned networks.
        """
        if sigma is not None:
            sigma = sigma[:, None, None] if sigma.ndim == 1 else sigma[:, None, :]
        return self.head(self.encode(noisy_ids[:, None], clean_ids, sigma))[:, 0]

    def forward(
        self,
        noisy_ids: torch.Tensor,
        clean_ids: torch.Tensor | None = None,
        sigma: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """`denoise_logits`."""
        return self.denoise_logits(noisy_ids, clean_ids, sigma)

    # --- sampling: new tokens against the cache

    def make_cache(self, batch: int, capacity: int) -> BlockCache:
        """An empty cache for `batch` rows of at most `capacity` tokens at a time."""
        config = self.config
        return BlockCache(
            config.num_layers,
            batch,
            config.num_heads,
            config.width // config.num_heads,
            capacity,
            dtype=self.dtype,
            device=self.device,
            recorder=Recorder() if self.records_passes else None,
        )

    def decode(
        self,
        ids_BT: torch.Tensor,
        num_clean: int | torch.Tensor,
        cache: BlockCache,
        window: int | None = None,
        sigma_B: torch.Tensor | None = None,
        wanted: tuple[torch.Tensor, torch.Tensor] | None = None,
    ) -> torch.Tensor:
        """Hidden states (B, T, D) of the tokens that follow each row's cached ones.

        Args:
            ids_BT: whole blocks; the first `num_clean` tokens (of every row, or (B,)) are clean and
                may be committed by the caller afterwards, then comes the block being denoised.
            window: a query sees the last `window` tokens, its own block included; None = all.
            sigma_B: time of the noisy block, for time-conditioned networks.
            wanted: rows and columns (M,) of the tokens whose states are returned, as (M, D).
        """
        self._require(autoregressive=False)
        timeless = self.config.time_conditioning and sigma_B is None  # its tokens are looked at
        recorded = cache.recorder is not None and isinstance(num_clean, int) and not timeless
        if recorded and wanted is not None:
            return self._decode_recorded(ids_BT, num_clean, cache, window, sigma_B, wanted)
        hidden = self._decode(ids_BT, num_clean, cache, window, sigma_B, wanted)
        return hidden if wanted is None else hidden[0]

    def decode_ragged(
        self,
        ids_P: torch.Tensor,
        tokens_B: torch.Tensor,
        clean_B: torch.Tensor,
        cache: BlockCache,
        window: int | None = None,
        sigma_B: torch.Tensor | None = None,
        wanted_M: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """`decode` for rows of different numbers of tokens: hidden states (P, D).

        Args:
            ids_P: the tokens of all rows, one row after another.
            tokens_B: how many of them are each row's; int64 on the CPU, as `clean_B`.
            clean_B: how many of those, from the first, are clean.
            window, sigma_B: as for `decode`.
            wanted_M: the tokens of `ids_P` whose states are returned, as (M, D); None = all.
        """
        self._require(autoregressive=False)
        config = self.config
        place = cache.place_ragged(tokens_B)
        position_P = cache.lengths_B[place.rows_P] + place.offsets_P
        clean_P = place.offsets_P < clean_B[place.rows_P]
        x_1PD = self.embedding(ids_P)[None]
        rotary = rotary_tables(
            position_P.to(ids_P.device), config.width // config.num_heads, x_1PD.dtype
        )
        sigma_1P = None if sigma_B is None else sigma_B[place.rows_P.to(sigma_B.device)][None]
        cond = self._decode_condition(sigma_1P, clean_P[None])
        key_BK = cache.positions(tokens_B)

        def visible(rows: slice, tokens: int) -> torch.Tensor:
            column_T = torch.arange(tokens)
            position_RT = cache.lengths_B[rows, None] + column_T
            return self._visible(position_RT, column_T < clean_B[rows, None], key_BK[rows], window)

        groups = ragged_groups(place, tokens_B, 2 * config.block_size, visible, ids_P.device)
        stored = place.to(ids_P.device)

        def read(index: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            k_PHE, v_PHE = k[0].transpose(0, 1), v[0].transpose(0, 1)
            return attend_ragged(q, *cache.write_ragged(index, k_PHE, v_PHE, stored), groups)

        wanted = None if wanted_M is None else (torch.zeros_like(wanted_M), wanted_M)
        return self._run_layers(x_1PD, cond, rotary, read, Kept(place=wanted))[0]

    def decode_causal(
        self, ids_BT: torch.Tensor, cache: BlockCache, window: int | None = None
    ) -> torch.Tensor:
        """Hidden states (B, T, D) of the tokens that follow each row's cached ones, one after the
        other: those of `encode_causal` over the whole row.

        Args:
            ids_BT: tokens that the caller may commit afterwards.
            window: a token sees the last `window` tokens, itself included; None = all.
        """
        self._require(autoregressive=True)
        # Clean blocks of one token: a token sees those up to itself.
        if cache.recorder is not None and ids_BT.shape[1] == 1:
            row_B = torch.arange(len(ids_BT), device=ids_BT.device)
            first = (row_B, torch.zeros_like(row_B))
            return self._decode_recorded(ids_BT, 1, cache, window, None, first)[:, None]
        return self._decode(ids_BT, ids_BT.shape[1], cache, window, None, None)

    def _decode(
        self,
        ids_BT: torch.Tensor,
        num_clean: int | torch.Tensor,
        cache: BlockCache,
        window: int | None,
        sigma_B: torch.Tensor | None,
        wanted: tuple[torch.Tensor, torch.Tensor] | None,
    ) -> torch.Tensor:
        config = self.config
        batch, tokens = ids_BT.shape
        place = cache.place(tokens)
        position_BT = cache.lengths_B[:, None] + torch.arange(tokens)
        if cache.uniform:
            position_BT = position_BT[:1]
        clean_BT = torch.arange(tokens) < torch.as_tensor(num_clean).reshape(-1, 1)
        mask = self._decode_mask(position_BT, clean_BT, cache, window)
        x_BTD = self.embedding(ids_BT)
        rotary = rotary_tables(
            position_BT.to(ids_BT.device), config.width // config.num_heads, x_BTD.dtype
        )
        sigma_B1 = None if sigma_B is None else sigma_B[:, None]
        cond = self._decode_condition(sigma_B1, clean_BT.expand(batch, tokens))

        def read(index: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            keys, values = cache.write(index, k, v, place)
            return attend_cached(q, keys, values, mask)

        return self._run_layers(x_BTD, cond, rotary, read, Kept(place=wanted))

    def _decode_recorded(
        self,
        ids_BT: torch.Tensor,
        num_clean: int,
        cache: BlockCache,
        window: int | None,
        sigma_B: torch.Tensor | None,
        wanted: tuple[torch.Tensor, torch.Tensor],
    ) -> torch.Tensor:
        """`decode` by the cache's recorder. What differs between two passes of a kind is in the
        tensors `ids`, `lengths`, `places` (padded, so that there are few kinds) and `sigma`."""
        assert cache.recorder is not None
        number = len(wanted[0])
        padded = 1 << max(0, number - 1).bit_length()
        places_2M = ids_BT.new_zeros(2, padded)
        places_2M[:, :number] = torch.stack(wanted)
        used = cache.static_used(ids_BT.shape[1])
        inputs = (ids_BT, cache.lengths_B.to(ids_BT.device), places_2M)
        kind = (ids_BT.shape, num_clean, window, padded, used, sigma_B is None)
        function = partial(self._decode_static, cache, num_clean, window, used)
        sigma = () if sigma_B is None else (sigma_B,)
        (hidden_MD,) = cache.recorder.run(kind, function, (*inputs, *sigma))
        return hidden_MD[:number]

    def _decode_static(
        self,
        cache: BlockCache,
        num_clean: int,
        window: int | None,
        used: int,
        ids_BT: torch.Tensor,
        lengths_B: torch.Tensor,
        places_2M: torch.Tensor,
        sigma_B: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor]:
        """`_decode` of rows that hold `lengths_B` tokens, without a look at any tensor's values;
        (M, D). It reads the first `used` slots, filled or not."""
        batch, tokens = ids_BT.shape
        place = cache.place_static(lengths_B, tokens, used)
        column_1T = torch.arange(tokens, device=ids_BT.device)[None]
        position_BT = lengths_B[:, None] + column_1T
        clean_1T = column_1T < num_clean
        key_BK = held_positions(lengths_B + tokens, used, cache.capacity)
        visible_BTK = self._visible(position_BT, clean_1T, key_BK, window)
        # As what attention adds to its scores: made once, and not from booleans in every layer.
        bias_BTK = torch.zeros_like(visible_BTK, dtype=self.dtype)
        bias_BTK.masked_fill_(~visible_BTK, -math.inf)
        rotary = rotary_tables(position_BT, self.config.width // self.config.num_heads, self.dtype)
        sigma_B1 = None if sigma_B is None else sigma_B[:, None]
        cond = self._decode_condition(sigma_B1, clean_1T.expand(batch, tokens))

        def read(index: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            return attend_cached(q, *cache.write(index, k, v, place), bias_BTK)

        kept = Kept(place=(places_2M[0], places_2M[1]))
        return (self._run_layers(self.embedding(ids_BT), cond, rotary, read, kept)[0],)

    def _decode_condition(
        self, sigma_BT: torch.Tensor | None, clean_BT: torch.Tensor
    ) -> torch.Tensor | None:
        if self.time is None:
            return None
        if not self.config.time_conditioning:
            return self.time(torch.zeros(1, 1, device=self.device))
        if sigma_BT is None:
            if not clean_BT.all():
                raise UserError("this network is conditioned on time: give sigma")
            sigma_BT = torch.zeros(1, 1, device=self.device)
        return self.time(sigma_BT.masked_fill(clean_BT.to(self.device), 0.0))

    def _decode_mask(
        self,
        position_BT: torch.Tensor,
        clean_BT: torch.Tensor,
        cache: BlockCache,
        window: int | None,
    ) -> torch.Tensor | None:
        """Visible keys (B or 1, T, used slots), or None when every query sees every key."""
        rows, tokens = position_BT.shape
        mask_BTK = self._visible(position_BT, clean_BT, cache.positions(tokens)[:rows], window)
        # Asked on the CPU: a GPU would have to finish all its work to answer.
        return None if bool(mask_BTK.all()) else mask_BTK.to(self.device)

    def _visible(
        self,
        position_BT: torch.Tensor,
        clean_BT: torch.Tensor,
        key_BK: torch.Tensor,
        window: int | None,
    ) -> torch.Tensor:
        """The mask, where its arguments are: on the CPU."""
        return decode_predicate(
            position_BT[:, :, None],
            key_BK[:, None, :],
            clean_BT[:, :, None],
            block_size=self.config.block_size,
            window=window,
            clean_attention=self.config.clean_attention,
        )
