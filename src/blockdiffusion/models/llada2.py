"""LLaDA2 (inclusionAI 2025): a mixture of experts, as a network that `CausalLM` takes.

The function and the names of tensors and configuration are those of the published code
(`LLaDA2MoeModelLM`); none of it is used. Each layer has one matrix for queries, keys and values,
norms of the heads, and rotates a part of each head. The first layers have a SwiGLU MLP. In all
others each token chooses some of many small ones:

    score_e = sigmoid(w_e . x)                      of every expert e, in float32 at least
    group   = sum of the two largest (score + bias) of its experts
    chosen  = the largest (score + bias) of the experts in the best groups
    y       = scale * sum of score_e / (sum of chosen scores) * expert_e(x), + shared experts

The bias enters the choice only (DeepSeek-AI 2024, section 2.1.2).

Shape suffixes: B batch, T tokens of all streams, D width, H heads, J heads of keys and values,
E head width, R rotated part of it, P tokens of all rows, N experts, K chosen ones of a token, G
groups, M = P K pairs of a token and an expert, sorted by the expert.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutput, CausalLMOutput
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from blockdiffusion.errors import UserError, check_number, check_whole, shown
from blockdiffusion.limits import Limit, interval

MOST = 2**24  # of widths
MOST_EXPERTS = 2**16  # of all layers; LLaDA2.0-flash, with 100B parameters, has 8,000
SIZES = {
    **dict.fromkeys(("vocab_size", "hidden_size", "max_position_embeddings"), Limit(1, MOST)),
    **dict.fromkeys(("intermediate_size", "moe_intermediate_size"), Limit(1, MOST)),
    **dict.fromkeys(("num_attention_heads", "num_key_value_heads", "head_dim"), Limit(1, 2**16)),
    "num_hidden_layers": Limit(1, 10_000),
    "first_k_dense_replace": Limit(0, 10_000),
    **dict.fromkeys(("num_experts", "num_experts_per_tok"), Limit(1, 2**16)),
    **dict.fromkeys(("n_group", "topk_group"), Limit(1, 2**16)),
    "num_shared_experts": Limit(0, 2**10),
    **dict.fromkeys(("rms_norm_eps", "routed_scaling_factor"), interval("(0, inf)")),
    "rope_theta": interval("[1, inf)"),
    "partial_rotary_factor": interval("(0, 1]"),
}
SWITCHES = ("use_qk_norm", "use_qkv_bias", "use_bias", "tie_word_embeddings")
# Keys of published files, and the only value of each that this network computes.
FIXED: dict[str, Any] = {
    "hidden_act": "silu", "score_function": "sigmoid", "norm_topk_prob": True,
    "moe_router_enable_expert_bias": True, "router_dtype": "fp32", "norm_head": False,
    "norm_softmax": False, "use_rmsnorm": True, "use_sliding_window": False,
    "using_split_qkv_in_self_attention": False, "use_linear_attention": False,
    "rope_scaling": None, "rope_parameters": None, "embedding_dropout": 0, "output_dropout": 0,
}  # fmt: skip


class LLaDA2Config(PreTrainedConfig):
    """Sizes of the network, by the names in published files; the defaults are LLaDA2.0-mini's.

    Raises:
        UserError: a value is out of its range, does not fit another one, or is none that this
            network computes.
    """

    model_type = "llada2_moe"

    vocab_size: int = 157184
    hidden_size: int = 2048
    intermediate_size: int = 5120
    num_hidden_layers: int = 20
    num_attention_heads: int = 16
    num_key_value_heads: int = 4
    head_dim: int = 128
    max_position_embeddings: int = 32768
    rope_theta: float = 600_000.0
    partial_rotary_factor: float = 0.5
    rms_norm_eps: float = 1e-6
    use_qk_norm: bool = True
    use_qkv_bias: bool = False
    use_bias: bool = False
    tie_word_embeddings: bool = False
    first_k_dense_replace: int = 1
    moe_intermediate_size: int = 512
    num_experts: int = 256
    num_experts_per_tok: int = 8
    num_shared_experts: int = 1
    n_group: int = 8
    topk_group: int = 4
    routed_scaling_factor: float = 2.5
    initializer_range: float = 0.02
    pad_token_id: int | None = 156892
    bos_token_id: int | None = None
    eos_token_id: int | None = None  # the token of padding, which ends published texts

    def __post_init__(self, **more: Any) -> None:
        for name, only in FIXED.items():
            if (found := more.get(name, only)) != only:
                raise UserError(f"{name} is {shown(found)}; it must be {shown(only)}")
        for name in ("rope_scaling", "rope_parameters"):
            more.pop(name, None)  # transformers would add other names of `rope_theta`
        for name, limit in SIZES.items():
            value = getattr(self, name)
            (check_whole if limit.whole else check_number)(name, value)
            if (instead := limit.instead_of(value)) is not None:
                raise UserError(f"{name} is {shown(value)}; it must be {instead}")
        for name in SWITCHES:
            if not isinstance(getattr(self, name), bool):
                raise UserError(f"{name} is {shown(getattr(self, name))}; it must be true or false")
        self.rotary_dim = more.pop("rotary_dim", int(self.head_dim * self.partial_rotary_factor))
        self._check_together()
        if self.eos_token_id is None:
            self.eos_token_id = self.pad_token_id
        super().__post_init__(**more)

    def _check_together(self) -> None:
        """Refuse sizes that do not fit each other."""
        in_group, rest = divmod(self.num_experts, self.n_group)
        rotated = int(self.head_dim * self.partial_rotary_factor)
        conditions = {
            "num_attention_heads must be a multiple of num_key_value_heads": (
                self.num_attention_heads % self.num_key_value_heads == 0
            ),
            "num_experts must be a multiple of n_group, at least twice it": (
                rest == 0 and in_group >= 2
            ),
            "topk_group must be at most n_group": self.topk_group <= self.n_group,
            "num_experts_per_tok must be at most the number of experts in topk_group groups": (
                self.num_experts_per_tok <= self.topk_group * in_group
            ),
            f"num_hidden_layers times num_experts must be at most {MOST_EXPERTS}": (
                self.num_hidden_layers * self.num_experts <= MOST_EXPERTS
            ),
            "rotary_dim must be head_dim times partial_rotary_factor, and even": (
                self.rotary_dim == rotated > 0 and rotated % 2 == 0
            ),
        }
        for sentence, holds in conditions.items():
            if not holds:
                raise UserError(f"the sizes do not fit each other: {sentence}")


class Attention(nn.Module):
    """Grouped attention through transformers' interface, which `CausalLM` sets."""

    is_causal = True  # without `CausalLM`

    def __init__(self, config: LLaDA2Config, layer_idx: int):
        super().__init__()
        self.config, self.layer_idx = config, layer_idx
        width, self.heads = config.head_dim, config.num_attention_heads
        self.key_heads = config.num_key_value_heads
        self.num_key_value_groups = self.heads // self.key_heads
        self.query_key_value = nn.Linear(
            config.hidden_size, (self.heads + 2 * self.key_heads) * width, bias=config.use_qkv_bias
        )
        if config.use_qk_norm:
            self.query_layernorm = nn.RMSNorm(width, eps=config.rms_norm_eps)
            self.key_layernorm = nn.RMSNorm(width, eps=config.rms_norm_eps)
        self.dense = nn.Linear(self.heads * width, config.hidden_size, bias=config.use_bias)

    def forward(
        self,
        x_BTD: torch.Tensor,
        rotation: tuple[torch.Tensor, torch.Tensor],
        mask: torch.Tensor | None,
        **keywords: Any,
    ) -> torch.Tensor:
        qkv_BTNE = self.query_key_value(x_BTD).unflatten(-1, (-1, self.config.head_dim))
        q_BHTE, k_BJTE, v_BJTE = qkv_BTNE.transpose(1, 2).split(
            [self.heads, self.key_heads, self.key_heads], dim=1
        )
        if self.config.use_qk_norm:
            q_BHTE, k_BJTE = self.query_layernorm(q_BHTE), self.key_layernorm(k_BJTE)
        q_BHTE, k_BJTE = _rotated(q_BHTE, *rotation), _rotated(k_BJTE, *rotation)
        chosen: Any = self.config._attn_implementation
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(chosen, ALL_ATTENTION_FUNCTIONS["sdpa"])
        out_BTHE, _ = attend(
            self, q_BHTE, k_BJTE, v_BJTE, mask, scaling=self.config.head_dim**-0.5, **keywords
        )
        return self.dense(out_BTHE.flatten(2))


def _rotated(x_BHTE: torch.Tensor, cos_BTR: torch.Tensor, sin_BTR: torch.Tensor) -> torch.Tensor:
    """Rotate the first R elements of each head, in pairs (r, r + R/2)."""
    rotary, rest = cos_BTR.shape[-1], x_BHTE[..., cos_BTR.shape[-1] :]
    x_BHTR = x_BHTE[..., :rotary]
    first, second = x_BHTR.chunk(2, -1)
    turned_BHTR = torch.cat([-second, first], -1)
    x_BHTR = x_BHTR * cos_BTR[:, None] + turned_BHTR * sin_BTR[:, None]
    return torch.cat([x_BHTR, rest], -1)


class MLP(nn.Module):
    """SwiGLU."""

    def __init__(self, width: int, inner: int):
        super().__init__()
        self.gate_proj = nn.Linear(width, inner, bias=False)
        self.up_proj = nn.Linear(width, inner, bias=False)
        self.down_proj = nn.Linear(inner, width, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Gate(nn.Module):
    """The choice of experts."""

    def __init__(self, config: LLaDA2Config):
        super().__init__()
        self.config = config
        self.weight = nn.Parameter(torch.zeros(config.num_experts, config.hidden_size))
        self.register_buffer("expert_bias", torch.zeros(config.num_experts))

    def logits(self, x_PD: torch.Tensor) -> torch.Tensor:
        """Return the scores before the sigmoid (P, N), in float32 at least."""
        kind = torch.promote_types(x_PD.dtype, torch.float32)
        return F.linear(x_PD.to(kind), self.weight.to(kind))

    def forward(self, x_PD: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the chosen experts of each token and their weights, both (P, K)."""
        config, score_PN = self.config, self.logits(x_PD).sigmoid()
        preference_PGS = (score_PN + self.expert_bias).unflatten(-1, (config.n_group, -1))
        group_PG = preference_PGS.topk(2, dim=-1).values.sum(-1)
        best_PG = group_PG.topk(config.topk_group, dim=-1).indices
        is_best_PG = torch.zeros_like(group_PG, dtype=torch.bool).scatter(1, best_PG, True)
        preference_PN = preference_PGS.masked_fill(~is_best_PG[..., None], -torch.inf).flatten(1)
        chosen_PK = preference_PN.topk(config.num_experts_per_tok, dim=-1).indices
        weight_PK = score_PN.gather(1, chosen_PK)
        if config.num_experts_per_tok > 1:
            weight_PK = weight_PK / (weight_PK.sum(-1, keepdim=True) + 1e-20)
        return chosen_PK, config.routed_scaling_factor * weight_PK


class Experts(nn.Module):
    """A mixture of experts: each runs once, over the tokens that chose it."""

    def __init__(self, config: LLaDA2Config):
        super().__init__()
        width, inner = config.hidden_size, config.moe_intermediate_size
        self.gate = Gate(config)
        self.experts = nn.ModuleList(MLP(width, inner) for _ in range(config.num_experts))
        self.shared_experts = None
        if config.num_shared_experts:
            self.shared_experts = MLP(width, inner * config.num_shared_experts)

    def forward(self, x_BTD: torch.Tensor) -> torch.Tensor:
        x_PD = x_BTD.flatten(0, -2)
        chosen_PK, weight_PK = self.gate(x_PD)
        order_M = chosen_PK.flatten().argsort(stable=True)
        counts = self._counts(chosen_PK)
        inputs_MD = x_PD[order_M // chosen_PK.shape[1]]
        outputs = [
            expert(tokens)
            for expert, tokens in zip(self.experts, inputs_MD.split(counts), strict=True)
            # In training, experts that nobody chose have gradients, too: zeros, as DDP needs.
            if self.training or len(tokens)
        ]
        mixed_PKD = torch.cat(outputs)[order_M.argsort()].unflatten(0, chosen_PK.shape)
        y_PD = (weight_PK[..., None] * mixed_PKD).sum(1).to(x_PD.dtype)
        if self.shared_experts is not None:
            y_PD = y_PD + self.shared_experts(x_PD)
        return y_PD.view_as(x_BTD)

    def _counts(self, chosen_PK: torch.Tensor) -> list[int]:
        """Return how many tokens chose each expert; on `meta`, where none is known, all the first,
        which costs the same."""
        if chosen_PK.is_meta:
            return [chosen_PK.numel()] + [0] * (len(self.experts) - 1)
        return chosen_PK.flatten().bincount(minlength=len(self.experts)).tolist()


class Layer(GradientCheckpointingLayer):
    def __init__(self, config: LLaDA2Config, index: int):
        super().__init__()
        width = config.hidden_size
        self.attention = Attention(config, index)
        is_dense = index < config.first_k_dense_replace
        self.mlp = MLP(width, config.intermediate_size) if is_dense else Experts(config)
        self.input_layernorm = nn.RMSNorm(width, eps=config.rms_norm_eps)
        self.post_attention_layernorm = nn.RMSNorm(width, eps=config.rms_norm_eps)

    def forward(self, x_BTD: torch.Tensor, **keywords: Any) -> torch.Tensor:
        x_BTD = x_BTD + self.attention(self.input_layernorm(x_BTD), **keywords)
        return x_BTD + self.mlp(self.post_attention_layernorm(x_BTD))


class _Network(PreTrainedModel):
    config: LLaDA2Config  # type: ignore
    config_class = LLaDA2Config
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_attention_backend = True
    _input_embed_layer = "word_embeddings"


class LLaDA2MoeModel(_Network):
    """Embeddings, layers and the final norm."""

    def __init__(self, config: LLaDA2Config):
        super().__init__(config)
        self.word_embeddings = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Layer(config, i) for i in range(config.num_hidden_layers))
        self.norm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.gradient_checkpointing = False
        self.post_init()

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        **keywords: Any,
    ) -> BaseModelOutput:
        """Return the hidden states of tokens (B, T).

        Args:
            attention_mask: (B, 1, T, T), True where a token is seen; None: causal.
            position_ids: (1 or B, T); None: those of a text.
        """
        if position_ids is None:
            position_ids = torch.arange(input_ids.shape[1], device=input_ids.device)[None]
        x_BTD = self.word_embeddings(input_ids)
        rotation = self._rotation(position_ids, x_BTD.dtype)
        for layer in self.layers:
            x_BTD = layer(x_BTD, rotation=rotation, mask=attention_mask, **keywords)
        return BaseModelOutput(last_hidden_state=self.norm(x_BTD))

    def _rotation(
        self, position_BT: torch.Tensor, dtype: torch.dtype
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Cosine and sine of the angles (B, T, R), computed in float32 at least."""
        kind, rotary = torch.promote_types(dtype, torch.float32), self.config.rotary_dim
        exponent_R = torch.arange(0, rotary, 2, device=position_BT.device, dtype=kind) / rotary
        angle_BTR = position_BT[..., None].to(kind) / self.config.rope_theta**exponent_R
        angle_BTR = torch.cat([angle_BTR, angle_BTR], -1)
        return angle_BTR.cos().to(dtype), angle_BTR.sin().to(dtype)


class LLaDA2MoeModelLM(_Network):
    """The network with its output layer, by the name of the published class."""

    _tied_weights_keys = {"lm_head.weight": "model.word_embeddings.weight"}  # noqa: RUF012

    def __init__(self, config: LLaDA2Config):
        super().__init__(config)
        self.model = LLaDA2MoeModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def forward(self, input_ids: torch.Tensor, **keywords: Any) -> CausalLMOutput:
        """Return the logits of tokens (B, T); see `LLaDA2MoeModel.forward`."""
        hidden_BTD = self.model(input_ids, **keywords).last_hidden_state
        return CausalLMOutput(logits=self.lm_head(hidden_BTD))
