"""Block diffusion around any network: makes streams, positions, masks and cache.

* `encode`: one training pass over [noisy_1; ...; noisy_N; clean] (paper, section 3.2),
* `encode_causal`: one pass of the autoregressive baseline, in which a token sees those before it,
* `decode`, `decode_ragged`: new tokens against a cache of clean blocks (section 3.3),
* `decode_causal`: the same for the autoregressive baseline,
* `denoise_logits`: logits of a whole noisy sequence, for evaluation and tests.

What they return for a token is the hidden state that predicts it; see `DiffusionConfig.reading`.

The network (a `Backbone`) embeds ids, runs its layers and returns logits. It calls
`read(layer, q, k, v)` for attention and knows nothing of blocks.

Shape suffixes: B batch, N noisy copies, L tokens of a sequence, T tokens of all streams, K blocks
(of keys: slots), P tokens of all rows, one row after another, D width, V vocabulary.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import nn

from blockdiffusion.diffusion.config import DiffusionConfig
from blockdiffusion.errors import UserError
from blockdiffusion.models.attention import (
    Built,
    RaggedGroup,
    attend,
    attend_cached,
    attend_causal,
    attend_ragged,
    causal_mask,
    ragged_groups,
    resolve_backend,
)
from blockdiffusion.models.backbone import Backbone, Outputs, Read
from blockdiffusion.models.cache import BlockCache, Placement, held_positions
from blockdiffusion.models.cuda_graphs import Recorder
from blockdiffusion.models.masks import Streams, decode_predicate
from blockdiffusion.models.shifted import ShiftedPass, predicting_columns


class BlockDiffusion(nn.Module):
    """A block diffusion language model: a network, and the meaning of its ids and blocks.

    Attributes:
        backbone: the network, which holds all weights.
        config: the conventions. It is frozen: see `with_block_size`.
        tokenizer: the Hugging Face tokenizer that `blockdiffusion.load` found with the weights, or
            None.
        attention_backend: "dense", "chunked" or "flex"; None = the default of the device.
        records_passes: whether the kernels of passes over a cache are recorded and started together
            (a CUDA graph; see `cuda_graphs`). `inference.optimize_for_inference` decides.
    """

    backbone: Any  # a `Backbone` that is a module

    def __init__(self, backbone: Backbone, config: DiffusionConfig, tokenizer: Any = None):
        super().__init__()
        self.backbone = backbone
        self.config = config
        self.tokenizer = tokenizer
        self.attention_backend: str | None = None
        self.records_passes = False

    @property
    def device(self) -> torch.device:
        """The device of the weights."""
        return self.backbone.device

    @property
    def dtype(self) -> torch.dtype:
        """The precision of the weights."""
        return self.backbone.dtype

    @property
    def output(self) -> nn.Linear:
        """The linear layer of `head`, for losses that make few logits at a time."""
        return self.backbone.output

    def head(self, hidden: torch.Tensor) -> torch.Tensor:
        """Return the logits (..., V) of hidden states (..., D), before SUBS, in float32 at least:
        in bfloat16 probabilities would not sum to 1 over a vocabulary."""
        return self.backbone.head(hidden)

    def with_backbone(self, backbone: Backbone) -> Self:
        """Return this model around another network."""
        made = copy.copy(self)
        made._modules = {**self._modules, "backbone": backbone}  # type: ignore
        return made

    def with_block_size(self, block_size: int) -> Self:
        """Return this model, with the same weights, and blocks of another size.

        Raises:
            UserError: the size does not divide the model's L.
        """
        made = self.with_backbone(self.backbone)
        made.config = replace(self.config, block_size=block_size)
        return made

    def full_config(self) -> Any:
        """Return what config.json holds of a model that has files; see its subclasses.

        Raises:
            UserError: it is another network, which no file describes.
        """
        raise UserError(
            f"a model around {type(self.backbone).__name__} has no configuration to save; keep its "
            "weights by torch.save, or use a network that `load` reads"
        )

    # --- training and evaluation: all blocks in one pass

    def encode(
        self,
        noisy_BNL: torch.Tensor,
        clean_BL: torch.Tensor | None,
        sigma_BNK: torch.Tensor | None = None,
        valid_BL: torch.Tensor | None = None,
        scored_BNL: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Return the hidden states (B, N, L, D) of N noisy copies that share one clean stream.

        Args:
            noisy_BNL: ids; every block of every copy may be masked in its own way.
            clean_BL: the clean ids; may be None if one block is the whole sequence.
            sigma_BNK: time per block, for time-conditioned networks only (others ignore it).
            valid_BL: bool, False at padding, which no token attends to; None = all valid. Integers
                number the documents of a row, 0 at padding: each is whole blocks, begins at
                position 0, and sees no other.
            scored_BNL: bool, the positions whose states are returned, as (M, D); None = all noisy
                ones. With N + 1 copies the last one is the clean stream.
        """
        self._require(autoregressive=False)
        batch, copies, length = noisy_BNL.shape
        has_clean = self._has_clean(length, clean_BL)
        position_BL = torch.arange(length, device=noisy_BNL.device)[None]
        first_BL = position_BL == 0  # of a document
        if valid_BL is not None and valid_BL.dtype != torch.bool:
            first_BL = torch.diff(valid_BL, prepend=torch.full_like(valid_BL[:, :1], -1)) != 0
            position_BL = position_BL - (first_BL * position_BL).cummax(1).values
        if self.config.reading == "next":
            noisy_BNL, clean_BL = self._delayed_streams(noisy_BNL, clean_BL, first_BL)
            if valid_BL is not None and valid_BL.dtype == torch.bool:
                valid_BL = F.pad(valid_BL[:, :-1], (1, 0), value=True)
        ids_BT = noisy_BNL.reshape(batch, copies * length)
        if has_clean:
            assert clean_BL is not None
            ids_BT = torch.cat([ids_BT, clean_BL], dim=1)
        positions_BT = position_BL.repeat(1, copies + has_clean)
        predicting_BT = None
        if self._is_shifted:
            columns = predicting_columns(first_BL, self.config.block_size, copies, has_clean)
            predicting_BT = columns.expand(batch, -1)
        read = self._read_streams(length, copies, has_clean, valid_BL, ids_BT.device)
        sigma_BT = self._sigma_of_streams(sigma_BNK, (batch, copies, length), has_clean)
        places = None
        if scored_BNL is not None:
            row_M, token_M = scored_BNL.flatten(1).nonzero(as_tuple=True)
            places = (row_M, token_M if predicting_BT is None else predicting_BT[row_M, token_M])
        # Mostly nothing reads the clean stream's output.
        reads_clean = scored_BNL is not None and scored_BNL.shape[1] > copies
        reads_clean |= self._is_shifted
        outputs = Outputs(None if reads_clean else copies * length, places)
        hidden_BTD = self.backbone(ids_BT, positions_BT, read, outputs, sigma_BT)
        if places is not None:
            return hidden_BTD[0]
        if predicting_BT is not None:
            row_B1 = torch.arange(batch, device=ids_BT.device)[:, None]
            hidden_BTD = hidden_BTD[row_B1, predicting_BT[:, : copies * length]]
        return hidden_BTD.unflatten(1, (copies, length))

    def encode_causal(
        self, ids_BT: torch.Tensor, valid_BT: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Return the hidden states (B, T, D) of an autoregressive network, in which each token sees
        those up to itself.

        Args:
            ids_BT: ids at positions 0..T-1.
            valid_BT: bool, False at padding, which no other token attends to; None = all valid.
        """
        self._require(autoregressive=True)
        sizes = self.backbone.attention
        positions_T = torch.arange(ids_BT.shape[1], device=ids_BT.device)

        def mask(window: int | None) -> torch.Tensor | None:
            if valid_BT is None and window is None and sizes.softcap is None:
                return None
            valid = torch.ones_like(ids_BT, dtype=torch.bool) if valid_BT is None else valid_BT
            return causal_mask(valid, window)

        masks = self._by_window(mask)

        def read(index: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            return attend_causal(q, k, v, masks[sizes.window(index)], sizes)

        return self.backbone(ids_BT, positions_T, read)

    def denoise_logits(
        self,
        noisy_ids: torch.Tensor,
        clean_ids: torch.Tensor | None = None,
        sigma: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Return the logits (B, L, V) of the tokens at the noisy positions, before SUBS.

        Args:
            noisy_ids: (B, L), L any multiple of the block size.
            clean_ids: (B, L); may be None if L is the block size.
            sigma: (B,) or (B, K), for time-conditioned networks.
        """
        if sigma is not None:
            sigma = sigma[:, None, None] if sigma.ndim == 1 else sigma[:, None, :]
        return self.head(self.encode(noisy_ids[:, None], clean_ids, sigma))[:, 0]

    forward = denoise_logits

    # --- sampling: new tokens against the cache

    def make_cache(self, batch: int, capacity: int) -> BlockCache:
        """Return an empty cache for `batch` rows of at most `capacity` tokens at a time."""
        sizes = self.backbone.attention
        return BlockCache(
            sizes.num_hidden_layers,
            batch,
            sizes.num_key_value_heads,
            sizes.head_dim,
            capacity,
            dtype=self.dtype,
            device=self.device,
            recorder=Recorder() if self.records_passes else None,
            start_id=self._start_id if self.config.reading == "next" else None,
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
        """Return the hidden states (B, T, D) of the tokens that follow each row's cached ones.

        Args:
            ids_BT: whole blocks. The first `num_clean` tokens (of every row, or (B,)) are clean;
                the caller may commit them afterwards. The block being denoised follows.
            window: a query sees the last `window` tokens, including its own block; None = all.
            sigma_B: time of the noisy block, for time-conditioned networks.
            wanted: rows and columns (M,) of the tokens whose states are returned, as (M, D).
        """
        self._require(autoregressive=False)
        ids_BT, shifted = cache.delayed(ids_BT), None
        if self._is_shifted:
            batch, tokens = ids_BT.shape
            tokens_B = torch.full((batch,), tokens)
            clean_B = torch.as_tensor(num_clean).expand(batch)
            wanted_M = None if wanted is None else wanted[0] * tokens + wanted[1]
            shifted = ShiftedPass(cache, tokens_B, clean_B, wanted_M, ids_BT.device)
            if shifted.places is not None:
                wanted = (shifted.places // tokens, shifted.places % tokens)
        # Without a time `_sigma_at_clean` looks at tokens, which a recording cannot.
        timeless = self.config.time_conditioning and sigma_B is None
        recorded = cache.recorder is not None and isinstance(num_clean, int) and not timeless
        if recorded and wanted is not None:
            hidden = self._decode_recorded(ids_BT, num_clean, cache, window, sigma_B, wanted)
        else:
            hidden = self._decode(ids_BT, num_clean, cache, window, sigma_B, wanted)
            hidden = hidden if wanted is None else hidden[0]
        return hidden if shifted is None else shifted.predicting(hidden)

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
        """Return the hidden states (P, D) of `decode` for rows of different numbers of tokens.

        Args:
            ids_P: the tokens of all rows, one row after another.
            tokens_B: the number of tokens of each row; int64 on the CPU, as `clean_B`.
            clean_B: how many of these, from the first, are clean.
            window, sigma_B: as for `decode`.
            wanted_M: the tokens of `ids_P` whose states are returned, as (M, D); None = all.
        """
        sizes = self.backbone.attention
        ids_P = cache.delayed_ragged(ids_P, tokens_B)
        place = cache.place_ragged(tokens_B)
        position_1P = (cache.lengths_B[place.rows_P] + place.offsets_P)[None]
        clean_P = place.offsets_P < clean_B[place.rows_P]
        sigma_1P = None if sigma_B is None else sigma_B[place.rows_P.to(sigma_B.device)][None]
        key_BK = cache.positions(tokens_B)

        def groups(layer_window: int | None) -> list[RaggedGroup]:
            def visible(rows: slice, tokens: int) -> torch.Tensor:
                column_T = torch.arange(tokens)
                position_RT = cache.lengths_B[rows, None] + column_T
                clean_RT = column_T < clean_B[rows, None]
                return self._visible(position_RT, clean_RT, key_BK[rows], window, layer_window)

            return ragged_groups(place, tokens_B, 2 * self.config.block_size, visible, ids_P.device)

        groups_of, stored = self._by_window(groups), place.to(ids_P.device)

        def read(index: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            k_PJE, v_PJE = k[0].transpose(0, 1), v[0].transpose(0, 1)
            keys, values = cache.write_ragged(index, k_PJE, v_PJE, stored)
            return attend_ragged(q, keys, values, groups_of[sizes.window(index)], sizes)

        shifted = None
        if self._is_shifted:
            shifted = ShiftedPass(cache, tokens_B, clean_B, wanted_M, ids_P.device)
            wanted_M = shifted.places
        outputs = Outputs()
        if wanted_M is not None:
            outputs = Outputs(places=(torch.zeros_like(wanted_M), wanted_M))
        sigma_1P = self._sigma_at_clean(sigma_1P, clean_P[None])
        positions = position_1P.to(ids_P.device)
        (hidden_MD,) = self.backbone(ids_P[None], positions, read, outputs, sigma_1P)
        return hidden_MD if shifted is None else shifted.predicting(hidden_MD)

    def decode_causal(
        self, ids_BT: torch.Tensor, cache: BlockCache, window: int | None = None
    ) -> torch.Tensor:
        """Return the hidden states (B, T, D) of the tokens that follow each row's cached ones, as
        `encode_causal` gives them for the whole row.

        Args:
            ids_BT: tokens that the caller may commit afterwards.
            window: a token sees the last `window` tokens, including itself; None = all.
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
        batch, tokens = ids_BT.shape
        place = cache.place(tokens)
        position_BT = cache.lengths_B[:, None] + torch.arange(tokens)
        if cache.uniform:
            position_BT = position_BT[:1]
        clean_BT = torch.arange(tokens) < torch.as_tensor(num_clean).reshape(-1, 1)
        key_BK = cache.positions(tokens)[: len(position_BT)]

        def mask(layer_window: int | None) -> torch.Tensor | None:
            mask_BTK = self._visible(position_BT, clean_BT, key_BK, window, layer_window)
            # Asked on the CPU: a GPU would first finish all its work.
            return None if bool(mask_BTK.all()) else mask_BTK.to(self.device)

        read = self._read_cache(cache, place, self._by_window(mask))
        sigma_BT = self._sigma_at_clean(sigma_B, clean_BT.expand(batch, tokens))
        positions = position_BT.to(ids_BT.device)
        return self.backbone(ids_BT, positions, read, Outputs(places=wanted), sigma_BT)

    def _decode_recorded(
        self,
        ids_BT: torch.Tensor,
        num_clean: int,
        cache: BlockCache,
        window: int | None,
        sigma_B: torch.Tensor | None,
        wanted: tuple[torch.Tensor, torch.Tensor],
    ) -> torch.Tensor:
        """`decode` by the cache's recorder. Two passes of a kind differ in the tensors `ids`,
        `lengths`, `places` (padded, so that there are few kinds) and `sigma` only."""
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
        """`_decode` of rows that hold `lengths_B` tokens, (M, D), which reads no tensor's values on
        the host. It attends to the first `used` slots, filled or not."""
        batch, tokens = ids_BT.shape
        place = cache.place_static(lengths_B, tokens, used)
        column_1T = torch.arange(tokens, device=ids_BT.device)[None]
        position_BT = lengths_B[:, None] + column_1T
        clean_1T = column_1T < num_clean
        key_BK = held_positions(lengths_B + tokens, used, cache.capacity)

        def bias(layer_window: int | None) -> torch.Tensor:
            visible_BTK = self._visible(position_BT, clean_1T, key_BK, window, layer_window)
            # In the form that attention adds to its scores: made once, not in every layer.
            bias_BTK = torch.zeros_like(visible_BTK, dtype=self.dtype)
            return bias_BTK.masked_fill_(~visible_BTK, -math.inf)

        read = self._read_cache(cache, place, self._by_window(bias))
        sigma_BT = self._sigma_at_clean(sigma_B, clean_1T.expand(batch, tokens))
        outputs = Outputs(places=(places_2M[0], places_2M[1]))
        return (self.backbone(ids_BT, position_BT, read, outputs, sigma_BT)[0],)

    # --- the inputs and masks of a pass

    def _require(self, *, autoregressive: bool) -> None:
        if self.config.is_autoregressive != autoregressive:
            uses = ("denoise blocks", "predict the next token")
            raise UserError(
                f"this network was made to {uses[not autoregressive]}, not to "
                f"{uses[autoregressive]}; use a model of that kind"
            )

    def _has_clean(self, length: int, clean_BL: torch.Tensor | None) -> bool:
        """Whether a sequence of `length` tokens needs a clean stream."""
        size = self.config.block_size
        if length % size:
            raise UserError(
                f"the sequence length {length} is not a multiple of the block size {size}; "
                "cut or pad the sequence"
            )
        if clean_BL is None and length != size:
            raise UserError(
                f"clean_ids are needed: a sequence of {length} tokens has {length // size} blocks, "
                "and later blocks read earlier clean ones"
            )
        return length != size

    @property
    def _is_shifted(self) -> bool:
        return self.config.reading == "shifted"

    @property
    def _start_id(self) -> int:
        start_id = self.config.start_id
        return self.config.mask_id if start_id is None else start_id

    def _delayed_streams(
        self, noisy_BNL: torch.Tensor, clean_BL: torch.Tensor | None, first_BL: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Both streams, each token at the position after its own. A block's first position reads
        the clean token before the block, and a document's (`first_BL`) the start symbol."""
        start_id = self._start_id
        delayed_BNL = noisy_BNL.roll(1, -1).masked_fill(first_BL[:, None], start_id)
        if clean_BL is None:
            return delayed_BNL, None
        delayed_BL = clean_BL.roll(1, -1).masked_fill(first_BL, start_id)
        size = self.config.block_size
        delayed_BNL[..., ::size] = delayed_BL[:, None, ::size]
        return delayed_BNL, delayed_BL

    def _read_streams(
        self,
        length: int,
        copies: int,
        has_clean: bool,
        valid_BL: torch.Tensor | None,
        device: torch.device,
    ) -> Read:
        sizes, config = self.backbone.attention, self.config
        backend = resolve_backend(self.attention_backend, device)
        built: Built = {}

        def streams(window: int | None) -> Streams:
            return Streams(
                length,
                config.block_size,
                copies,
                has_clean,
                config.clean_attention,
                window,
                config.block_attention,
            )

        streams_of = self._by_window(streams)

        def read(index: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            own = streams_of[sizes.window(index)]
            return attend(q, k, v, own, backend, valid_BL, built, sizes)

        return read

    def _read_cache(
        self, cache: BlockCache, place: Placement, masks: dict[int | None, torch.Tensor | None]
    ) -> Read:
        sizes = self.backbone.attention

        def read(index: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            keys, values = cache.write(index, k, v, place)
            return attend_cached(q, keys, values, masks[sizes.window(index)], sizes)

        return read

    def _by_window(self, make: Callable[[int | None], Any]) -> dict[int | None, Any]:
        """`make(window)` for each window that a layer has."""
        return {window: make(window) for window in set(self.backbone.attention.windows or (None,))}

    def _visible(
        self,
        position_BT: torch.Tensor,
        clean_BT: torch.Tensor,
        key_BK: torch.Tensor,
        window: int | None,
        layer_window: int | None,
    ) -> torch.Tensor:
        """Visible keys (B or 1, T, slots), on the device of the arguments."""
        return decode_predicate(
            position_BT[:, :, None],
            key_BK[:, None, :],
            clean_BT[:, :, None],
            block_size=self.config.block_size,
            window=window,
            clean_attention=self.config.clean_attention,
            layer_window=layer_window,
            block_attention=self.config.block_attention,
        )

    def _sigma_of_streams(
        self, sigma_BNK: torch.Tensor | None, shape: tuple[int, int, int], has_clean: bool
    ) -> torch.Tensor | None:
        """The time of every token (B, T) of a training pass; None without time input. The clean
        stream has no noise, so it reads sigma = 0."""
        if not self.config.time_conditioning:
            return None
        batch, copies, length = shape
        if sigma_BNK is None:
            raise UserError("this network reads the time; give sigma")
        repeats = length // sigma_BNK.shape[-1]
        sigma = sigma_BNK.repeat_interleave(repeats, dim=-1).expand(batch, copies, length)
        sigma_BT = sigma.reshape(batch, copies * length)
        return F.pad(sigma_BT, (0, length)) if has_clean else sigma_BT

    def _sigma_at_clean(
        self, sigma_BT: torch.Tensor | None, clean_BT: torch.Tensor
    ) -> torch.Tensor | None:
        """The time of every token (B, T) of a pass over the cache, 0 at clean ones; `sigma_BT` may
        be that of every row (B,)."""
        if not self.config.time_conditioning:
            return None
        if sigma_BT is None:
            if not clean_BT.all():
                raise UserError("this network reads the time; give sigma")
            sigma_BT = torch.zeros(1, 1, device=self.device)
        if sigma_BT.ndim == 1:
            sigma_BT = sigma_BT[:, None]
        return sigma_BT.masked_fill(clean_BT.to(self.device), 0.0)
