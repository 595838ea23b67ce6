"""Causal language models of transformers as backbones, without a change to their code.

transformers calls a registered function for the attention of each layer. Ours calls `read`, which
reaches it as a keyword of the model's call. The function's name has no entry in transformers' table
of masks, so the library makes no mask.

What the attention of a family is (heads, scale, soft cap, windows) is not read from its
configuration: one pass over a few tokens observes what reaches the function. A family that does not
call it once a layer, or that passes more than queries, keys and values, is refused.

Shape suffixes: B batch, T tokens of all streams, D width, H heads, J heads of keys and values,
E head width, V vocabulary.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import asdict, replace
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers import AttentionInterface, PreTrainedModel

from blockdiffusion.diffusion.config import DiffusionConfig
from blockdiffusion.errors import UserError
from blockdiffusion.models import lora
from blockdiffusion.models.attention import attend_causal, causal_mask
from blockdiffusion.models.backbone import ALL, AttentionSizes, Outputs, Read
from blockdiffusion.models.block_diffusion import BlockDiffusion
from blockdiffusion.models.fused_llama import fused_llama, replace_conv1d
from blockdiffusion.models.llada2 import Experts, LLaDA2MoeModelLM
from blockdiffusion.runtime.devices import allow_compilations

ATTENTION = "blockdiffusion"  # our function's name in the registry of transformers
SECTION = "block_diffusion"  # of config.json: a `DiffusionConfig`
TOKENS = 8  # of the pass that observes
# Two ways to the same logits differ by at most this share of the largest; in 16 bits, by the other.
AGREE, AGREE_HALF = 1e-4, 0.05
# Keywords of the attention function beside those that `AttentionSizes` holds. Any other one that is
# not None may change the scores, and is refused.
HARMLESS = {"dropout", "position_ids", "is_causal", "use_cache", "output_attentions", "read"}
# The attention of the current pass, for families that do not hand keywords down to their layers.
_current: ContextVar[Read | None] = ContextVar("read", default=None)


def _attend(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    **keywords: Any,
) -> tuple[torch.Tensor, None]:
    """The attention function that transformers calls: (B, H, T, E) in, (B, T, H, E) out."""
    read = keywords.get("read") or _current.get()
    if read is None:
        raise UserError(
            f"{type(module).__name__} attends through the block diffusion model around it; call "
            "that model, or load the network again with transformers"
        )
    if isinstance(read, _Observer):
        read.see(module, query, key, value, attention_mask, keywords)
    return read(module.layer_idx, query, key, value).transpose(1, 2), None


AttentionInterface.register(ATTENTION, _attend)


class CausalLM(nn.Module):
    """A causal language model of transformers as a `Backbone`.

    Dropout of attention probabilities is not applied; all other dropout is.

    Args:
        model: one with an output layer (`...ForCausalLM`). It is kept, not copied, and from now on
            attends through the `BlockDiffusion` around it.

        adapters: that it holds in training, if any.

    Attributes:
        attention: what was observed; see `AttentionSizes`.

    Raises:
        UserError: it is of a family that cannot be a backbone; the sentence gives the reason.
    """

    def __init__(self, model: PreTrainedModel, adapters: lora.Lora | None = None):
        super().__init__()
        self.model = model
        self.lora = adapters
        self._checkpoints_activations = False
        self._max_positions = self.max_positions
        if model.get_output_embeddings() is None:
            raise refusal(model, "it has no output layer over the vocabulary")
        if model.base_model is model:
            raise refusal(model, "its layers are not separate from its output layer")
        if _rope_type(model.config) == "dynamic":
            raise refusal(model, "its rotary frequencies depend on the length of the text")
        ids_1T = torch.arange(TOKENS, device=model.device)[None] % model.config.vocab_size
        positions_1T = torch.arange(TOKENS, device=model.device)[None]
        observer = _Observer(model)
        with torch.no_grad(), _evaluating(model):
            expected_TV = None
            if has_numbers(model):
                expected_TV = model(input_ids=ids_1T, use_cache=False).logits[0]
            model.set_attn_implementation(ATTENTION)
            hidden_TD = self._hidden(ids_1T, positions_1T, observer)[0]
            self.attention = observer.sizes()
            self._passes_keywords = observer.passes_keywords
            self._attending = observer.modules
            self._softcap = getattr(model.config, "final_logit_softcapping", None)
            self._scale = 1.0
            if expected_TV is not None:
                self._scale = self._scale_of_head(hidden_TD, expected_TV)

    def _scale_of_head(self, hidden_TD: torch.Tensor, expected_TV: torch.Tensor) -> float:
        """The factor between the output layer's products and the model's own logits (Cohere and
        Granite have one), by least squares."""
        scale = 1.0
        if isinstance(self.model, LLaDA2MoeModelLM):  # ours, see `_check_streams`
            return scale
        found_TV, expected_TV = self.output(hidden_TD).double(), expected_TV.double()
        if self._softcap is not None:
            found_TV = self._softcap * torch.tanh(found_TV / self._softcap)
        elif not torch.equal(found_TV, expected_TV):
            scale = float((found_TV * expected_TV).sum() / found_TV.square().sum())
            scale = 1.0 if abs(scale - 1) < AGREE else scale
        if not _agree(scale * found_TV, expected_TV, self.dtype):
            error = (scale * found_TV - expected_TV).abs().max()
            raise refusal(
                self.model,
                "with the attention passed in, its logits are not its own "
                f"(they differ by {error:.2g}), so it mixes or scales in a way that is not known",
            )
        return scale

    # --- the protocol

    @property
    def config(self) -> Any:
        """The configuration of transformers."""
        return self.model.config

    @property
    def output(self) -> nn.Linear:
        """The layer behind `head`; of a model with a soft cap it is not all of it.

        With LoRA it is the layer without the mask token's trained row, which only a tied table has:
        no token is predicted to be the mask.
        """
        layer: Any = self.model.get_output_embeddings()
        return layer.token_adapter.base_layer if hasattr(layer, "token_adapter") else layer

    @property
    def logits_are_linear(self) -> bool:
        """Whether `output` alone makes the logits."""
        return self._softcap is None

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.model.device

    @property
    def dtype(self) -> torch.dtype:
        """The precision of the weights."""
        return self.model.dtype

    @property
    def activation_checkpointing(self) -> bool:
        """Whether gradients keep only what enters the layers, and compute these again."""
        return self._checkpoints_activations

    @activation_checkpointing.setter
    def activation_checkpointing(self, on: bool) -> None:
        if on and not self._passes_keywords:
            raise UserError(
                f"{type(self.model).__name__} cannot recompute its activations: it passes no "
                "keywords to its layers; set train.activation_checkpointing=false"
            )
        if on:
            _checkpointing(self.model, "enable")({"use_reentrant": False})
        elif self._checkpoints_activations:
            _checkpointing(self.model, "disable")()
        self._checkpoints_activations = on

    def forward(
        self,
        ids_BT: torch.Tensor,
        positions_BT: torch.Tensor,
        read: Read,
        outputs: Outputs = ALL,
        sigma_BT: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Hidden states before the head, as `Outputs.take` shapes them."""
        hidden_BTD = outputs.take(
            self._hidden(ids_BT, positions_BT.reshape(-1, ids_BT.shape[1]), read)
        )
        return hidden_BTD if self._scale == 1 else self._scale * hidden_BTD

    @property
    def max_positions(self) -> int | None:
        """The number of positions that the network knows; None: any.

        Learned positions end, and `longrope` has other frequencies for longer texts.
        """
        rope = getattr(self.config, "rope_parameters", None) or {}
        if rope.get("rope_type") == "longrope":
            return rope.get("original_max_position_embeddings")
        most = getattr(self.config, "max_position_embeddings", None)
        tables = [m for m in self.model.base_model.modules() if isinstance(m, nn.Embedding)]
        # OPT's table begins with two rows that are no positions.
        learned = most and any(m.num_embeddings - most in (0, 2) for m in tables[1:])
        return most if learned else None

    def check_length(self, length: int) -> None:
        """Refuse texts beyond the positions that the network knows.

        Raises:
            UserError: the text is longer.
        """
        if self._max_positions is not None and length > self._max_positions:
            raise UserError(
                f"{type(self.model).__name__} knows {self._max_positions} positions, and the text "
                f"has {length} tokens; take shorter rows, or fewer new tokens"
            )

    def _hidden(self, ids_BT: torch.Tensor, positions_BT: torch.Tensor, read: Read) -> torch.Tensor:
        # A GPU is not waited for: there `adapted_model` has refused longer rows.
        if self._max_positions is not None and positions_BT.device.type == "cpu":
            self.check_length(int(positions_BT.max()) + 1)
        token = _current.set(read)
        try:
            return self.model.base_model(
                input_ids=ids_BT, position_ids=positions_BT, use_cache=False, read=read
            ).last_hidden_state
        finally:
            _current.reset(token)

    def head(self, hidden: torch.Tensor) -> torch.Tensor:
        """Logits (..., V) of hidden states (..., D), in float32 at least."""
        logits = self.output(hidden)
        logits = logits if logits.dtype.itemsize > 2 else logits.float()
        return (
            logits if self._softcap is None else self._softcap * torch.tanh(logits / self._softcap)
        )

    def units(self) -> list[nn.Module]:
        """The layers: in each of them attention was observed once."""
        attending = set(self._attending)
        lists = [m for m in self.model.base_model.modules() if isinstance(m, nn.ModuleList)]
        for layers in lists:
            if len(layers) == len(attending) and all(
                any(m in attending for m in layer.modules()) for layer in layers
            ):
                return list(layers)
        raise AssertionError("the layers are in no list")

    def hidden_matrices(self) -> list[nn.Parameter]:
        """The matrices of the layers."""
        return [p for layer in self.units() for p in layer.parameters() if p.ndim == 2]

    def empty_copy(self) -> CausalLM:
        """A network of the same sizes whose parameters hold nothing (on the device `meta`), without
        adapters."""
        model = without_weights(self.model, copy.deepcopy(self.config))
        made = copy.copy(self)
        made.lora = None
        made._modules = {"model": model}
        names = {module: name for name, module in self.model.named_modules()}
        made._attending = [model.get_submodule(names[module]) for module in self._attending]
        return made

    def load_state_dict(self, *arguments: Any, **keywords: Any) -> Any:
        """As a module does; tied weights are one tensor afterwards."""
        found = super().load_state_dict(*arguments, **keywords)
        self.model.tie_weights()
        return found

    def saved_tensors(self) -> dict[str, torch.Tensor]:
        """The weights by the names of transformers; tied ones once, by the first name. With LoRA
        only those of the adapters, by the names of peft."""
        if self.lora is not None:
            return lora.adapter_tensors(self.model)
        first: dict[int, tuple[str, torch.Tensor]] = {}
        for name, tensor in self.model.state_dict().items():
            first.setdefault(tensor.data_ptr(), (name, tensor))
        return dict(first.values())

    def simplify(self) -> None:
        """Replace layers by faster ones of the same function, in a copy that only samples."""
        replace_conv1d(self.model)
        body = fused_llama(self.model.base_model, self.attention)
        if body is None:
            return
        ids_1T = torch.arange(TOKENS)[None] % self.config.vocab_size
        positions_1T = torch.arange(TOKENS)[None]
        mask_BTT = causal_mask(torch.ones_like(ids_1T, dtype=torch.bool), None)

        def read(index: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            return attend_causal(q, k, v, mask_BTT, self.attention)

        with torch.no_grad(), _evaluating(self):
            expected = self._hidden(ids_1T, positions_1T, read)
            found = body(ids_1T, positions_1T, read, use_cache=False).last_hidden_state
        if _agree(found, expected, self.dtype):
            setattr(self.model, self.model.base_model_prefix, body)

    def compile_layers(self) -> None:
        """Let PyTorch compile the parts of the layers that do not attend, and whose operations do
        not depend on values, as a mixture's do."""
        allow_compilations()
        for layer in self.units():
            for part in layer.children():
                attends = any(module in self._attending for module in part.modules())
                if not attends and not isinstance(part, Experts):
                    part.compile()


def has_numbers(model: PreTrainedModel) -> bool:
    """Return whether there is anything to compare: the device `meta` has shapes alone."""
    return model.device.type != "meta"


def without_weights(model: PreTrainedModel, config: Any) -> PreTrainedModel:
    """Return a network of the class of `model` whose parameters hold nothing (on `meta`).

    It shares the buffers that no file holds, such as rotary frequencies.
    """
    with torch.device("meta"):
        made = type(model)(config)
    saved, known = set(model.state_dict()), dict(made.named_buffers())
    for name, buffer in model.named_buffers():
        if name not in saved and name in known:
            module, _, own = name.rpartition(".")
            setattr(made.get_submodule(module), own, buffer)
    return made


def _agree(found: torch.Tensor, expected: torch.Tensor, dtype: torch.dtype) -> bool:
    """Whether logits of a network of this type are equal but for rounding."""
    tolerance = AGREE if dtype.itemsize > 2 else AGREE_HALF
    return bool((found - expected).abs().max() <= tolerance * expected.abs().max())


def num_embeddings(model: PreTrainedModel) -> int:
    """The rows of the table of embeddings, padding included."""
    return model.get_input_embeddings().weight.shape[0]  # type: ignore


class AdaptedModel(BlockDiffusion):
    """A block diffusion model around a causal language model."""

    backbone: CausalLM

    def full_config(self) -> Any:
        """What config.json says: the network's configuration, and the conventions as a section."""
        full = copy.deepcopy(self.backbone.config)
        full.dtype = str(self.dtype).removeprefix("torch.")
        full.architectures = [type(self.backbone.model).__name__]
        setattr(full, SECTION, asdict(self.config))
        if self.backbone.lora is not None:
            setattr(full, lora.SECTION, asdict(self.backbone.lora.origin))
        return full


def has_vocabulary(model: Any, size: int) -> bool:
    """Return whether a model is one of `size` tokens: a causal model may have more embeddings."""
    found = model.config.vocab_size
    return found == size or (isinstance(model, AdaptedModel) and found > size)


def adapted_model(
    model: PreTrainedModel,
    config: DiffusionConfig,
    tokenizer: Any = None,
    adapters: lora.Lora | None = None,
) -> AdaptedModel:
    """Make a block diffusion model around a causal language model, checked in one small pass.

    Raises:
        UserError: the family cannot be a backbone, see `CausalLM`; its vocabulary is not the
            configuration's; or tokens reach each other by another way than attention.
    """
    rows = num_embeddings(model)
    if rows != config.vocab_size:
        raise UserError(
            f"{type(model).__name__} has {rows} embeddings, but vocab_size is {config.vocab_size}; "
            "give the number of embeddings"
        )
    made = AdaptedModel(CausalLM(model, adapters), config, tokenizer)
    made.backbone.check_length(config.seq_len)
    if not config.is_autoregressive and has_numbers(model):
        with torch.no_grad(), _evaluating(model):
            _check_streams(made)
    return made


def _check_streams(model: BlockDiffusion) -> None:
    """Refuse a model whose streams in a training pass differ from blocks over a cache.

    Our own network is known not to. Rounding may change which of its many experts are chosen, and
    with them its logits by more than rounding, so two ways are not compared.
    """
    if isinstance(model.backbone.model, LLaDA2MoeModelLM):
        return
    size = 2
    config = replace(model.config, block_size=size, seq_len=3 * size)
    small = BlockDiffusion(model.backbone, config)
    ids_1L = torch.arange(3 * size, device=model.device)[None] % config.vocab_size
    noisy_1L = ids_1L.clone()
    noisy_1L[:, ::size] = config.mask_id
    cache = small.make_cache(1, 3 * size)
    small.decode(ids_1L[:, : 2 * size], 2 * size, cache)
    cache.commit(2 * size)
    cached = small.head(small.decode(noisy_1L[:, 2 * size :], 0, cache))[0]
    streams = small.denoise_logits(noisy_1L, ids_1L)[0, 2 * size :]
    if not _agree(cached, streams, model.dtype):
        raise refusal(
            model.backbone.model, "its tokens reach each other by another way than attention"
        )


class _Layer(NamedTuple):
    """What one layer's attention was called with."""

    num_heads: int
    num_key_value_heads: int
    head_dim: int
    scale: float | None
    softcap: float | None
    window: int | None


class _Observer:
    """A `read` that notes what the layers pass and attends causally.

    Attributes:
        modules: those that attend, in the order of their calls.
        passes_keywords: whether `read` itself came through as a keyword.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self.modules: list[nn.Module] = []
        self.passes_keywords = True
        self._model = model
        self._calls: list[tuple[int, _Layer]] = []

    def see(
        self,
        module: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        mask: torch.Tensor | None,
        keywords: dict[str, Any],
    ) -> None:
        """Note one call of the attention function.

        Raises:
            UserError: it is called with what `read` does not take.
        """
        self.modules.append(module)
        self.passes_keywords &= "read" in keywords
        window, scale = keywords.pop("sliding_window", None), keywords.pop("scaling", None)
        softcap = keywords.pop("softcap", None)
        more = [n for n, given in keywords.items() if given is not None and n not in HARMLESS]
        if more:
            reason = f"its attention takes {', '.join(more)} beside queries, keys and values"
            raise refusal(self._model, reason)
        if mask is not None:
            raise refusal(self._model, "it makes an attention mask of its own")
        if key.shape != value.shape or query.shape[-1] != key.shape[-1]:
            raise refusal(self._model, "its queries, keys and values have different widths")
        sizes = (query.shape[1], key.shape[1], key.shape[3])
        self._calls.append((module.layer_idx, _Layer(*sizes, scale, softcap, window)))

    def __call__(
        self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor
    ) -> torch.Tensor:
        seen = self._calls[-1][1]
        mask_BTT = causal_mask(
            torch.ones(1, q.shape[2], dtype=torch.bool, device=q.device), seen.window
        )
        return attend_causal(q, k, v, mask_BTT, _sizes([seen]))

    def sizes(self) -> AttentionSizes:
        """The sizes of the attention of all layers.

        Raises:
            UserError: it is not one that a backbone can have.
        """
        model = self._model
        layers, count = dict(self._calls), model.config.num_hidden_layers
        if sorted(layers) != list(range(count)) or len(self._calls) != count:
            raise refusal(
                model,
                f"its {count} layers call the attention function that was set "
                f"{len(self._calls)} times instead of once each",
            )
        kinds = {seen._replace(window=None) for seen in layers.values()}
        if len(kinds) > 1:
            raise refusal(model, "its layers attend with different heads, widths or scales")
        ordered = [layers[index] for index in range(count)]
        declared = getattr(model.config, "layer_types", None) or [None] * count
        for kind, seen in zip(declared, ordered, strict=True):
            sliding = seen.window is not None
            if kind not in (None, "full_attention") and not (
                kind == "sliding_attention" and sliding
            ):
                raise refusal(model, f"it has layers of the kind {kind}")
        return _sizes(ordered)


def _sizes(layers: list[_Layer]) -> AttentionSizes:
    first, windows = layers[0], tuple(seen.window for seen in layers)
    return AttentionSizes(
        len(layers),
        first.num_heads,
        first.num_key_value_heads,
        first.head_dim,
        scale=first.scale,
        softcap=first.softcap,
        windows=windows if any(windows) else (),
    )


def refusal(model: PreTrainedModel, reason: str) -> UserError:
    """Why a model cannot be a backbone."""
    return UserError(
        f"{type(model).__name__} cannot become a block diffusion model: {reason}; take a causal "
        "model whose layers all attend through transformers' attention interface, such as Llama"
    )


def _checkpointing(model: PreTrainedModel, name: str) -> Callable[..., None]:
    """The method that turns it on or off; transformers gave it a new name in 5.2x."""
    old = f"gradient_checkpointing_{name}"
    return getattr(model, f"activation_checkpointing_{name}", None) or getattr(model, old)


def _rope_type(config: Any) -> str | None:
    return (getattr(config, "rope_parameters", None) or {}).get("rope_type")


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)
