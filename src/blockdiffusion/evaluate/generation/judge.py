"""Judges: language models under which generated text is scored (generative perplexity).

A judge is any Hugging Face causal language model, or one of ours: autoregressive, or block
diffusion, whose value is a bound. Texts are re-tokenised with the judge's tokenizer. What is
longer than the judge's context is read in windows, as the authors do it: the first window is
scored whole, each later one starts `stride` tokens further and scores what the one before it did
not reach. Every token is scored exactly once, but for a first token that nothing stands before.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
import torch.nn.functional as F

from blockdiffusion.checkpoints.formats import LIGHTNING, PICKLES, load, refuse_missing_path
from blockdiffusion.data.tokenizers import encode, load_tokenizer
from blockdiffusion.diffusion.denoiser import bos_id, is_autoregressive, masked_nll
from blockdiffusion.diffusion.estimators import Complement
from blockdiffusion.diffusion.exact import MAX_BLOCK_SIZE, exact_blocks
from blockdiffusion.diffusion.losses import subs_nll
from blockdiffusion.errors import UserError, shown
from blockdiffusion.evaluate.journal import Journal, fingerprint
from blockdiffusion.files.records import read_json
from blockdiffusion.from_pretrained import from_pretrained
from blockdiffusion.models.transformer import BlockDiffusionConfig
from blockdiffusion.runtime.seeding import generator

LOGIT_BYTES = 2**28  # logits of one pass: bounds memory
MOST_LAYERS, MOST_NUMBER = 10_000, 2**32  # of a judge's configuration
UNKNOWN_CONTEXT = 1024  # of a judge that names no limit
OURS = (BlockDiffusionConfig.model_type, "bd3lm")
PAIRS = 8  # complement pairs per window, where a judge's blocks are too long to enumerate


@dataclass(frozen=True, kw_only=True)
class JudgeTokens:
    """A sample as its judge reads it.

    Attributes:
        ids: all tokens: the judge's BOS where it belongs to the text, the text, its EOS where a
            document ends and the next begins.
        scored: which of them count: those of the text, without BOS and EOS, and without a first
            token that nothing stands before.
        text: the tokens of the text alone.
    """

    ids: tuple[int, ...]
    scored: tuple[bool, ...]
    text: tuple[int, ...]


@dataclass(frozen=True)
class Row:
    """One window: `ids` to read, `scored` of them."""

    ids: tuple[int, ...]
    scored: tuple[bool, ...]


@dataclass(frozen=True, kw_only=True)
class JudgeFacts:
    """What a result says about its judge.

    Attributes:
        kind: "causal language model", "autoregressive" or "block diffusion".
        is_bound: whether its values are upper bounds (block diffusion, S > 1).
        context: tokens of a window.
        stride: tokens by which later windows move, and which they score.
        first_token: what stands before the first token of a text (a BOS, say); None: nothing, and
            it is not scored.
        fingerprint: of its configuration and weights.
    """

    name: str
    kind: str
    parameters: int
    is_bound: bool
    context: int
    stride: int
    first_token: str | None
    fingerprint: str

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)


class Judge(Protocol):
    """A language model that scores text."""

    name: str
    model: Any
    tokenizer: Any
    kind: str
    is_bound: bool
    context: int
    """Most tokens of a window."""
    grain: int
    """Windows end at multiples of it: S of a block diffusion model, else 1."""
    lead: int
    """Tokens that the judge itself puts before every window: 1 for a given BOS, else 0."""
    first_token: str | None

    def read(self, documents: Sequence[str]) -> JudgeTokens:
        """The tokens of a sample that consists of `documents`."""
        ...

    def nll(self, rows: Sequence[Row], number: int) -> list[float]:
        """Nats of the scored tokens of every row (a bound where `is_bound`).

        `number` of the pass names its random draws, where there are any.
        """
        ...

    def features(self, rows: Sequence[Row]) -> torch.Tensor:
        """Hidden states (B, D) of the last layer at the last token of every row, float32."""
        ...


def load_judge(name: str, *, device: torch.device | str | None = None) -> Judge:
    """The judge in a directory or with a Hugging Face id.

    Args:
        name: a model or run directory of ours, a directory that `save_pretrained` wrote (a causal
            language model and its tokenizer), or a Hugging Face id of either.

    Raises:
        UserError: nothing there, no causal language model, weights that do not fit or could run
            code, no tokenizer, one whose ids the network does not have, or one of ours that has no
            likelihood here.
    """
    judge = _load(name, device)
    _check_ids(judge)
    return judge


def _load(name: str, device: torch.device | str | None) -> Judge:
    if _model_type(name) not in OURS:
        return CausalJudge(name, *_load_causal(name, device))
    model = load(name, device=device)
    if model.tokenizer is None:
        raise UserError(
            f"the judge {name} has no tokenizer, so text cannot be given to it; put its "
            "tokenizer.json into its directory, or take another judge"
        )
    if is_autoregressive(model):
        return AutoregressiveJudge(name, model)
    if model.config.objective != "block_diffusion" or model.config.time_conditioning:
        raise UserError(
            f"the judge {name} reads the time of a diffusion, and its likelihood is not used to "
            "judge; take an autoregressive model, or a block diffusion model without time input"
        )
    return DiffusionJudge(name, model)


def _check_ids(judge: Judge) -> None:
    """Refuses a tokenizer that can give ids to text which the network does not have."""
    tokenizer, size = judge.tokenizer, judge.model.config.vocab_size
    unread = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    ids = set(tokenizer.get_vocab().values()) - unread  # see `encode`
    ids |= {tokenizer.bos_token_id, tokenizer.eos_token_id} - {None}
    if max(ids) >= size:
        raise UserError(
            f"the tokenizer of the judge {judge.name} gives ids up to {max(ids)}, but its network "
            f"has {size} ids; the two do not belong together, take another judge"
        )


# --- Windows --------------------------------------------------------------------------------------


def windows(length: int, context: int, stride: int) -> list[tuple[int, int, int]]:
    """(start, end, first scored) of the windows over `length` tokens.

    The scored parts follow each other without gap or overlap. The rule is the authors'
    (`record_generative_perplexity`): window i starts at i * stride.
    """
    found = [(0, min(context, length), 0)]
    while found[-1][1] < length:
        start = len(found) * stride
        found.append((start, min(start + context, length), found[-1][1]))
    return found


def window_sizes(judge: Judge, context: int | None, stride: int | None) -> tuple[int, int]:
    """The context and stride to use: the judge's own context and half of it by default.

    Raises:
        UserError: they do not fit the judge or each other.
    """
    used = judge.context if context is None else context
    if not 2 <= used <= judge.context:
        raise UserError(
            f"the context is {used} tokens, but the judge {judge.name} reads from 2 to "
            f"{judge.context}; choose one in between"
        )
    step = (
        max((used + judge.lead) // 2 // judge.grain, 1) * judge.grain if stride is None else stride
    )
    # Windows of ours begin with a start of their own, so that a whole one may be scored.
    if not 1 <= step < used and not (step == used and judge.grain > 1):
        raise UserError(
            f"the stride is {step}; it must be at least 1 and smaller than the context of {used} "
            "tokens, so that no window begins with a token that is to be scored"
        )
    if (used + judge.lead) % judge.grain or step % judge.grain:
        raise UserError(
            f"the context is {used} and the stride {step} tokens, but the judge {judge.name} reads "
            f"whole blocks of {judge.grain}; choose a context of "
            f"{judge.context} or that less a multiple of {judge.grain}, and a stride that is one"
        )
    return used, step


@dataclass(frozen=True)
class _Place:
    """A window: `row` of sample `sample`."""

    sample: int
    row: Row


def judge_samples(
    judge: Judge,
    samples: Sequence[JudgeTokens],
    *,
    context: int | None = None,
    stride: int | None = None,
    progress: Callable[[int, int], None] | None = None,
    journal: Path | None = None,
) -> list[float]:
    """Nats that the judge gives to the scored tokens of every sample.

    Args:
        context, stride: see `window_sizes`.
        progress: called with (done, total) tokens read.
        journal: file that keeps finished passes, so that the same call goes on after a kill. The
            caller removes it.

    Raises:
        UserError: context and stride do not fit.
    """
    used, step = window_sizes(judge, context, stride)
    places = []
    for index, tokens in enumerate(samples):
        if any(tokens.scored):
            places += [_Place(index, row) for row in _rows(tokens, used, step)]
    places.sort(key=lambda place: len(place.row.ids), reverse=True)
    kept = None
    if journal is not None:
        kept = Journal(journal, fingerprint(judge.model, [p.row for p in places]))
    nats = [0.0] * len(samples)
    done, total = 0, sum(len(place.row.ids) for place in places)
    for number, group in enumerate(_passes(places, judge.model.config.vocab_size)):
        found = None if kept is None else kept.get(f"pass {number}")
        if found is None:
            found = judge.nll([place.row for place in group], number)
            if not all(map(math.isfinite, found)):
                raise UserError(
                    f"the judge {judge.name} gives a text {min(found)} nats: its weights or logits "
                    "are not finite; take another judge"
                )
            if kept is not None:
                kept.put(f"pass {number}", found)
        for place, value in zip(group, found, strict=True):
            nats[place.sample] += value
        done += sum(len(place.row.ids) for place in group)
        if progress is not None:
            progress(done, total)
    return nats


def judge_features(
    judge: Judge, samples: Sequence[JudgeTokens], context: int | None = None
) -> np.ndarray:
    """Features (number of samples, D) for MAUVE: the judge's last hidden state at the last token
    of the first window of each sample.

    Raises:
        UserError: the judge is a block diffusion model, which has no such state.
    """
    used, _ = window_sizes(judge, context, None)
    rows = [_Place(i, Row(t.ids[:used], t.scored[:used])) for i, t in enumerate(samples)]
    rows.sort(key=lambda place: len(place.row.ids), reverse=True)
    features: list[np.ndarray] = [np.empty(0)] * len(samples)
    for group in _passes(rows, judge.model.config.vocab_size):
        found = judge.features([place.row for place in group]).cpu().numpy()
        for place, vector in zip(group, found, strict=True):
            features[place.sample] = vector
    return np.stack(features)


def _rows(tokens: JudgeTokens, context: int, stride: int) -> list[Row]:
    """The windows that have something to score."""
    rows = []
    for start, end, first in windows(len(tokens.ids), context, stride):
        scored = (False,) * (first - start) + tokens.scored[first:end]
        if any(scored):
            rows.append(Row(tokens.ids[start:end], scored))
    return rows


def _passes(places: Sequence[_Place], vocab_size: int) -> list[list[_Place]]:
    """The windows (longest first) in passes whose logits take at most `LOGIT_BYTES`."""
    passes: list[list[_Place]] = []
    for place in places:
        longest = len(passes[-1][0].row.ids) if passes else 0
        if passes and (len(passes[-1]) + 1) * longest * vocab_size * 4 <= LOGIT_BYTES:
            passes[-1].append(place)
        else:
            passes.append([place])
    return passes


def _padded(
    rows: Sequence[Row], device: torch.device, grain: int = 1
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(ids, scored, valid), each (B, T) and padded at the right to whole blocks of `grain`."""
    longest = -(-max(len(row.ids) for row in rows) // grain) * grain
    ids_BT = torch.zeros(len(rows), longest, dtype=torch.long)
    scored_BT = torch.zeros(len(rows), longest, dtype=torch.bool)
    valid_BT = torch.zeros(len(rows), longest, dtype=torch.bool)
    for index, row in enumerate(rows):
        ids_BT[index, : len(row.ids)] = torch.tensor(row.ids)
        scored_BT[index, : len(row.ids)] = torch.tensor(row.scored)
        valid_BT[index, : len(row.ids)] = True
    return ids_BT.to(device), scored_BT.to(device), valid_BT.to(device)


# --- The judges -----------------------------------------------------------------------------------


class CausalJudge:
    """A Hugging Face causal language model; its BOS, where it has one, stands before every text."""

    kind, is_bound, grain, lead = "causal language model", False, 1, 0

    def __init__(self, name: str, model: Any, tokenizer: Any):
        self.name, self.model, self.tokenizer = name, model.eval(), tokenizer
        self.context = _context(model.config)
        self.first_token = tokenizer.bos_token

    def read(self, documents: Sequence[str]) -> JudgeTokens:
        tokenizer = self.tokenizer
        start = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
        between = (
            tokenizer.bos_token_id if tokenizer.eos_token_id is None else (tokenizer.eos_token_id)
        )
        return _joined(tokenizer, documents, start, between, scores_first=bool(start))

    @torch.no_grad()
    def nll(self, rows: Sequence[Row], number: int) -> list[float]:
        ids_BT, scored_BT, valid_BT = _padded(rows, self.model.device)
        logits_BTV = self.model(input_ids=ids_BT, attention_mask=valid_BT.long()).logits
        scored_BT = scored_BT[:, 1:]
        nll_M = F.cross_entropy(
            logits_BTV[:, :-1][scored_BT].float(), ids_BT[:, 1:][scored_BT], reduction="none"
        )
        return _row_sums(nll_M, scored_BT)

    @torch.no_grad()
    def features(self, rows: Sequence[Row]) -> torch.Tensor:
        ids_BT, _, valid_BT = _padded(rows, self.model.device)
        out = self.model(
            input_ids=ids_BT, attention_mask=valid_BT.long(), output_hidden_states=True
        )
        return _at_last(out.hidden_states[-1], valid_BT)


class AutoregressiveJudge:
    """One of our autoregressive models; every window begins with what its training rows begin
    with, the BOS or the start symbol, so every token of a text is scored."""

    kind, is_bound, grain = "autoregressive", False, 1

    def __init__(self, name: str, model: Any):
        self.name, self.model, self.tokenizer = name, model, model.tokenizer
        self.lead = int(bool(model.config.bos))
        self.context = model.config.seq_len - self.lead
        start = "BOS" if self.lead else "the start symbol"
        self.first_token: str | None = f"{start} in every window"

    def read(self, documents: Sequence[str]) -> JudgeTokens:
        return _joined(self.tokenizer, documents, [], self.model.config.eos_id, scores_first=True)

    @torch.no_grad()
    def nll(self, rows: Sequence[Row], number: int) -> list[float]:
        ids_BT, scored_BT, valid_BT = _padded(self._begun(rows), self.model.device)
        hidden_BTD = self.model.encode_causal(ids_BT[:, :-1], valid_BT[:, :-1])
        scored_BT, target_BT = scored_BT[:, 1:], ids_BT[:, 1:]
        logits_MV = self.model.head(hidden_BTD[scored_BT])
        nll_M = subs_nll(logits_MV, target_BT[scored_BT], self.model.config.mask_id)
        return _row_sums(nll_M, scored_BT)

    @torch.no_grad()
    def features(self, rows: Sequence[Row]) -> torch.Tensor:
        ids_BT, _, valid_BT = _padded(self._begun(rows), self.model.device)
        return _at_last(self.model.encode_causal(ids_BT, valid_BT), valid_BT)

    def _begun(self, rows: Sequence[Row]) -> list[Row]:
        """With the BOS or, as in `denoiser.causal_nll`, the mask token before every window."""
        return _after(bos_id(self.model) if self.lead else self.model.config.mask_id, rows)


class DiffusionJudge:
    """One of our block diffusion models: a bound, enumerated (blocks of up to 8 tokens) or from
    drawn masks; exact at S = 1. Windows are whole blocks."""

    kind = "block diffusion"

    def __init__(self, name: str, model: Any):
        self.name, self.model, self.tokenizer = name, model, model.tokenizer
        self.grain = model.config.block_size
        self.lead = int(bool(model.config.bos))
        self.context = model.config.seq_len - self.lead
        self.is_bound = self.grain > 1
        self.first_token: str | None = "BOS in every window" if self.lead else "an empty past"

    def read(self, documents: Sequence[str]) -> JudgeTokens:
        return _joined(self.tokenizer, documents, [], self.model.config.eos_id, scores_first=True)

    @torch.no_grad()
    def nll(self, rows: Sequence[Row], number: int) -> list[float]:
        device, config = self.model.device, self.model.config
        clean_BL, free_BL, valid_BL = _padded(
            _after(bos_id(self.model), rows) if self.lead else rows, device, self.grain
        )
        if self.grain <= MAX_BLOCK_SIZE:
            return exact_blocks(self.model, clean_BL, free_BL, valid_BL).nelbo_BK.sum(1).tolist()
        source, total_B = generator(0, "judge", number), torch.zeros(len(rows)).double()
        for _ in range(PAIRS):
            drawn = Complement()(clean_BL, free_BL, config.block_size, config.mask_id, source)
            nll_BNL = masked_nll(self.model, drawn.noisy_BNL, clean_BL, drawn.scored_BNL, valid_BL)
            total_B += (nll_BNL * drawn.weight_BNL).double().sum(-1).mean(-1).cpu()
        return (total_B / PAIRS).tolist()

    def features(self, rows: Sequence[Row]) -> torch.Tensor:
        raise UserError(
            f"MAUVE needs the hidden state of a whole text, which the block diffusion judge "
            f"{self.name} does not have; take a causal language model as judge"
        )


def _joined(
    tokenizer: Any, documents: Sequence[str], start: list[int], between: int | None,
    scores_first: bool,
) -> JudgeTokens:  # fmt: skip
    ids, scored, text = list(start), [False] * len(start), []
    for number, document in enumerate(documents):
        if number and between is not None:
            ids.append(between)
            scored.append(False)
        found = encode(tokenizer, document)
        text += found
        ids += found
        scored += [True] * len(found)
    if scored and not scores_first:
        scored[0] = False
    return JudgeTokens(ids=tuple(ids), scored=tuple(scored), text=tuple(text))


def _after(first: int, rows: Sequence[Row]) -> list[Row]:
    """The windows with a given token before each."""
    return [Row((first, *row.ids), (False, *row.scored)) for row in rows]


def _row_sums(nll_M: torch.Tensor, scored_BT: torch.Tensor) -> list[float]:
    """Sums over the scored tokens of every row, in float64."""
    nll_BT = torch.zeros(scored_BT.shape, dtype=torch.float64, device=nll_M.device)
    return nll_BT.masked_scatter(scored_BT, nll_M.double()).sum(1).tolist()


def _at_last(hidden_BTD: torch.Tensor, valid_BT: torch.Tensor) -> torch.Tensor:
    last_B = valid_BT.sum(1) - 1
    return hidden_BTD[torch.arange(len(last_B), device=last_B.device), last_B].float()


# --- Reading them ---------------------------------------------------------------------------------


def _model_type(name: str) -> str | None:
    """`model_type` of a directory's or a hub id's config.json."""
    folder = Path(name)
    for place in (folder / "config.json", folder / "model" / "config.json"):
        if place.is_file():
            return _read_type(place)
    if folder.is_file():
        raise UserError(
            f"the judge {name} is a file, and a judge is a directory that holds its tokenizer, "
            f"too; {_made_of(folder)}"
        )
    if folder.exists():
        files = sorted(folder.glob(f"*{LIGHTNING}"))
        instead = _made_of(files[0]) if files else "give a model's or a training run's directory"
        raise UserError(f"the judge {name} holds no config.json; {instead}")
    refuse_missing_path(name)
    from huggingface_hub import hf_hub_download

    try:
        return _read_type(Path(hf_hub_download(name, "config.json")))
    except UserError:
        raise
    except Exception as error:  # the hub client has no common base class for its failures
        raise UserError(
            f"the judge {name} is no local directory and could not be had from the hub "
            f"({type(error).__name__}); check the name and the connection, or give a directory"
        ) from error


def _made_of(file: Path) -> str:
    if file.suffix != LIGHTNING:
        return "give that directory"
    return f"make one of the Lightning file: blockdiff convert {file} --out DIRECTORY"


def _read_type(path: Path) -> str | None:
    kind = read_json(path, "give a model's directory").get("model_type")
    if not isinstance(kind, str):
        raise UserError(f"{path} is no model's configuration (its model_type is {shown(kind)})")
    return kind


def _load_causal(name: str, device: torch.device | str | None) -> tuple[Any, Any]:
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    folder = Path(name)
    if folder.is_dir() and not any(folder.glob("*.safetensors")):
        pickled = any(path.suffix in PICKLES for path in folder.iterdir())
        why = "only a pickle, which can hold code and is never opened" if pickled else "no weights"
        raise UserError(f"the judge {name} has {why}; a model.safetensors is needed")
    if (folder / "config.json").is_file():
        _check_sizes(folder / "config.json")
    try:
        tokenizer = load_tokenizer(name)
    except UserError as error:
        raise UserError(f"the judge {name} has no usable tokenizer: {error}") from error
    if not encode(tokenizer, "a"):
        raise UserError(
            f"the judge {name} has no tokenizer, so text cannot be given to it; save one there "
            "with save_pretrained, or take another judge"
        )
    logging.disable_progress_bar()  # it would cut through ours
    try:
        model, info = from_pretrained(
            AutoModelForCausalLM,
            name,
            f"the judge {name} cannot be read as a causal language model",
            "take one that AutoModelForCausalLM reads from safetensors, or one of ours",
            use_safetensors=True,
            output_loading_info=True,
            dtype="auto",
        )
    finally:
        logging.enable_progress_bar()
    if missing := sorted(info["missing_keys"]):
        raise UserError(
            f"the weights of the judge {name} lack {missing[0]} and do not fit its config.json; "
            "it would judge with random numbers"
        )
    return model.to(device=device), tokenizer


def _check_sizes(path: Path) -> None:
    """Refuses a network of other code whose numbers alone would fill the memory."""
    for name, value in read_json(path, "take another judge").items():
        most = MOST_LAYERS if "layer" in name else MOST_NUMBER
        if isinstance(value, int) and value > most:
            raise UserError(f"{path}: {shown(name)} is {shown(value)}; it must be at most {most}")


def _context(config: Any) -> int:
    """Most tokens that the network was made to read."""
    text = config.get_text_config()
    for key in ("max_position_embeddings", "n_positions", "max_sequence_length", "max_seq_len"):
        found = getattr(text, key, None)
        if isinstance(found, int) and found > 1:
            return found
    return UNKNOWN_CONTEXT
