"""Scorers: language models that measure how likely generated text is (generative perplexity).

A scorer, also called an evaluator model, is any Hugging Face causal language model, or one of ours:
autoregressive, or block diffusion, whose value is a bound. Texts are tokenized again with its
tokenizer and read in windows (`evaluate.generation.perplexity`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.nn.functional as F

from blockdiffusion.checkpoints.causal_lm import check_folder, load_network
from blockdiffusion.checkpoints.finding import LIGHTNING, PICKLES, refuse_missing_path
from blockdiffusion.checkpoints.formats import load
from blockdiffusion.data.tokenizers import encode, load_tokenizer
from blockdiffusion.diffusion.denoiser import bos_id, causal_nll, is_autoregressive
from blockdiffusion.diffusion.exact import MAX_BLOCK_SIZE
from blockdiffusion.diffusion.objectives import diffusion_of
from blockdiffusion.errors import UserError, shown
from blockdiffusion.evaluate.journal import fingerprint
from blockdiffusion.evaluate.likelihood import likelihood
from blockdiffusion.evaluate.options import LikelihoodOptions
from blockdiffusion.evaluate.windows import rectangle
from blockdiffusion.files.records import read_json
from blockdiffusion.models.transformer import BlockDiffusionConfig
from blockdiffusion.runtime.seeding import generator

UNKNOWN_CONTEXT = 1024  # of a scorer that names no limit
OURS = (BlockDiffusionConfig.model_type, "bd3lm")
PAIRS = 8  # complement pairs per window, if a scorer's blocks are too long to enumerate


@dataclass(frozen=True)
class Row:
    """One window: `ids` to read, and which of them are `scored`."""

    ids: tuple[int, ...]
    scored: tuple[bool, ...]


@dataclass(frozen=True)
class ScorerTokens(Row):
    """A sample in the tokens of its scorer.

    Attributes:
        ids: the text, after a BOS if the scorer has one, with an EOS between documents.
        scored: the tokens of the text, but not a first token that nothing precedes.
        text: the tokens of the text alone.
    """

    text: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class ScorerFacts:
    """The scorer of a result.

    Attributes:
        kind: "causal language model", "autoregressive" or "block diffusion".
        is_bound: whether its values are upper bounds (block diffusion, S > 1).
        context: tokens of a window.
        stride: tokens by which later windows move, and which they score.
        first_token: the token before the first one of a text, such as a BOS, in words. None: there
            is no such token, and the first one is not scored.
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


class Scorer(Protocol):
    """A language model that scores text."""

    name: str
    model: Any
    tokenizer: Any
    kind: str
    is_bound: bool
    context: int  # most tokens of a window
    grain: int  # windows end at its multiples: S of a block diffusion model, else 1
    lead: int  # tokens that the scorer puts before every window: 1 for a given BOS, else 0
    first_token: str | None

    def read(self, documents: Sequence[str]) -> ScorerTokens:
        """Return the tokens of a sample that consists of `documents`."""
        ...

    def nll(self, rows: Sequence[Row], number: int) -> list[float]:
        """Return the nats of the scored tokens of every row (a bound if `is_bound`).

        `number` of the pass names its random draws, if it has any.
        """
        ...

    def features(self, rows: Sequence[Row]) -> torch.Tensor:
        """Return the last layer's hidden states (B, D) at the last token of every row, float32."""
        ...


def load_scorer(name: str, *, device: torch.device | str | None = None) -> Scorer:
    """Load the scorer in a directory or with a Hugging Face id.

    Args:
        name: a model or run directory of ours, a directory that `save_pretrained` wrote (a causal
            language model and its tokenizer), or a Hugging Face id of either.

    Raises:
        UserError: there is no causal language model, its weights do not fit or could run code, it
            has no tokenizer, or one whose ids the network lacks, or it is one of ours without a
            likelihood.
    """
    scorer: Scorer
    if _model_type(name) not in OURS:
        scorer = CausalScorer(name, *_load_causal(name, device))
    else:
        model = load(name, device=device)
        if not is_autoregressive(model) and not diffusion_of(model.config).enumerable:
            raise UserError(
                f"the scorer {name} reads the time of a diffusion, and its likelihood is no score; "
                "take an autoregressive model, or a block diffusion model without time input"
            )
        scorer = OwnScorer(name, model)
    _check_ids(scorer)
    return scorer


def _check_ids(scorer: Scorer) -> None:
    """Refuse a tokenizer that can give ids to text which the network does not have."""
    tokenizer, size = scorer.tokenizer, scorer.model.config.vocab_size
    if tokenizer is None or not encode(tokenizer, "a"):
        raise UserError(
            f"the scorer {scorer.name} has no tokenizer, so text cannot be given to it; put its "
            "tokenizer.json into its directory, or take another scorer"
        )
    unread = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    ids = set(tokenizer.get_vocab().values()) - unread  # see `encode`
    ids |= {tokenizer.bos_token_id, tokenizer.eos_token_id} - {None}
    if max(ids) >= size:
        raise UserError(
            f"the tokenizer of the scorer {scorer.name} gives ids up to {max(ids)}, but its "
            f"network has {size} ids; the two do not belong together, take another scorer"
        )


def scorer_facts(scorer: Scorer, context: int, stride: int) -> ScorerFacts:
    """Return the facts of a scorer that reads windows of `context` tokens."""
    return ScorerFacts(
        name=scorer.name,
        kind=scorer.kind,
        parameters=sum(parameter.numel() for parameter in scorer.model.parameters()),
        is_bound=scorer.is_bound,
        context=context,
        stride=stride,
        first_token=scorer.first_token,
        fingerprint=fingerprint(scorer.model),
    )


def _tensors(
    rows: Sequence[Row], device: torch.device, multiple: int = 1
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return (ids, scored, valid), each (B, T), padded at the right to whole multiples."""
    ids_BT, valid_BT = rectangle([row.ids for row in rows], multiple)
    scored_BT, _ = rectangle([row.scored for row in rows], multiple)
    return ids_BT.to(device), scored_BT.bool().to(device), valid_BT.to(device)


class CausalScorer:
    """A Hugging Face causal language model; its BOS, if it has one, precedes every text."""

    kind, is_bound, grain, lead = "causal language model", False, 1, 0

    def __init__(self, name: str, model: Any, tokenizer: Any):
        self.name, self.model, self.tokenizer = name, model.eval(), tokenizer
        self.context = _context(model.config)
        self.first_token = tokenizer.bos_token

    def read(self, documents: Sequence[str]) -> ScorerTokens:
        bos, eos = self.tokenizer.bos_token_id, self.tokenizer.eos_token_id
        start, between = [] if bos is None else [bos], bos if eos is None else eos
        return _joined(self.tokenizer, documents, start, between, scores_first=bool(start))

    @torch.no_grad()
    def nll(self, rows: Sequence[Row], number: int) -> list[float]:
        ids_BT, scored_BT, valid_BT = _tensors(rows, self.model.device)
        logits_BTV = self.model(input_ids=ids_BT, attention_mask=valid_BT.long()).logits
        scored_BT = scored_BT[:, 1:]
        nll_M = F.cross_entropy(
            logits_BTV[:, :-1][scored_BT].float(), ids_BT[:, 1:][scored_BT], reduction="none"
        )
        nll_BT = torch.zeros(scored_BT.shape, dtype=torch.float64, device=nll_M.device)
        return nll_BT.masked_scatter(scored_BT, nll_M.double()).sum(1).tolist()

    @torch.no_grad()
    def features(self, rows: Sequence[Row]) -> torch.Tensor:
        ids_BT, _, valid_BT = _tensors(rows, self.model.device)
        out = self.model(
            input_ids=ids_BT, attention_mask=valid_BT.long(), output_hidden_states=True
        )
        return _at_last(out.hidden_states[-1], valid_BT)


class OwnScorer:
    """One of our models.

    An autoregressive model begins every window as its training rows, with the BOS or the start
    symbol. A block diffusion model gives a bound, enumerated (blocks of up to 8 tokens) or from
    drawn masks, which is exact at S = 1; its windows are whole blocks.
    """

    def __init__(self, name: str, model: Any):
        self.name, self.model, self.tokenizer = name, model, model.tokenizer
        is_next_token = is_autoregressive(model)
        self.kind = "autoregressive" if is_next_token else "block diffusion"
        self.grain = 1 if is_next_token else model.config.block_size
        self.is_bound = self.grain > 1
        self.lead = int(bool(model.config.bos))
        self.context = model.config.seq_len - self.lead
        start = "the start symbol in every window" if is_next_token else "an empty past"
        self.first_token: str | None = "BOS in every window" if self.lead else start

    def read(self, documents: Sequence[str]) -> ScorerTokens:
        return _joined(self.tokenizer, documents, [], self.model.config.eos_id, scores_first=True)

    @torch.no_grad()
    def nll(self, rows: Sequence[Row], number: int) -> list[float]:
        model, config = self.model, self.model.config
        if is_autoregressive(model):
            # `causal_nll` itself prepends the start symbol only if bos is false.
            begun = rows if config.bos is False else self._begun(rows)
            tensors = _tensors(begun, model.device)
            return causal_nll(model, *tensors).double().sum(1).tolist()
        begun = self._begun(rows) if self.lead else rows
        ids_BT, scored_BT, valid_BT = _tensors(begun, torch.device("cpu"), self.grain)
        estimator = "exact" if self.grain <= MAX_BLOCK_SIZE else "complement"
        found = likelihood(
            model,
            ids_BT,
            LikelihoodOptions(estimator=estimator, mc_samples=PAIRS),
            bos=False,
            valid=valid_BT,
            given=~scored_BT,
            generator=generator(0, "judge", number),
        )
        return found.nats_per_row.tolist()

    @torch.no_grad()
    def features(self, rows: Sequence[Row]) -> torch.Tensor:
        if not is_autoregressive(self.model):
            raise UserError(
                f"MAUVE needs the hidden state of a whole text, which the block diffusion scorer "
                f"{self.name} does not have; take a causal language model as scorer"
            )
        ids_BT, _, valid_BT = _tensors(self._begun(rows), self.model.device)
        return _at_last(self.model.encode_causal(ids_BT, valid_BT), valid_BT)

    def _begun(self, rows: Sequence[Row]) -> list[Row]:
        """Prepend the BOS or, as `denoiser.causal_nll` does, the mask token to the windows."""
        first = bos_id(self.model) if self.lead else self.model.config.mask_id
        return [Row((first, *row.ids), (False, *row.scored)) for row in rows]


def _joined(
    tokenizer: Any, documents: Sequence[str], start: list[int], between: int | None,
    scores_first: bool,
) -> ScorerTokens:  # fmt: skip
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
    return ScorerTokens(tuple(ids), tuple(scored), tuple(text))


def _at_last(hidden_BTD: torch.Tensor, valid_BT: torch.Tensor) -> torch.Tensor:
    last_B = valid_BT.sum(1) - 1
    return hidden_BTD[torch.arange(len(last_B), device=last_B.device), last_B].float()


# --- Loading --------------------------------------------------------------------------------------


def _model_type(name: str) -> str:
    """Return the `model_type` of a directory's or a hub id's config.json."""
    config = _config_file(name)
    kind = read_json(config, "give a model's directory").get("model_type")
    if not isinstance(kind, str):
        raise UserError(f"{config} is no model's configuration (its model_type is {shown(kind)})")
    return kind


def _config_file(name: str) -> Path:
    folder = Path(name)
    for place in (folder / "config.json", folder / "model" / "config.json"):
        if place.is_file():
            return place
    if folder.is_file():
        raise UserError(
            f"the scorer {name} is a file, and a scorer is a directory that holds its tokenizer, "
            f"too; {_made_of(folder)}"
        )
    if folder.exists():
        files = sorted(folder.glob(f"*{LIGHTNING}"))
        instead = _made_of(files[0]) if files else "give a model's or a training run's directory"
        raise UserError(f"the scorer {name} holds no config.json; {instead}")
    refuse_missing_path(name)
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(name, "config.json"))
    except Exception as error:  # the hub client has no common base class for its failures
        raise UserError(
            f"the scorer {name} is no local directory and could not be loaded from the hub "
            f"({type(error).__name__}); check the name and the connection, or give a directory"
        ) from error


def _made_of(file: Path) -> str:
    if file.suffix != LIGHTNING:
        return "give that directory"
    return f"make one of the Lightning file: blockdiff convert {file} --out DIRECTORY"


def _load_causal(name: str, device: torch.device | str | None) -> tuple[Any, Any]:
    folder = Path(name)
    if folder.is_dir() and not any(folder.glob("*.safetensors")):
        pickled = any(path.suffix in PICKLES for path in folder.iterdir())
        why = "only a pickle, which can hold code and is never opened" if pickled else "no weights"
        raise UserError(f"the scorer {name} has {why}; a model.safetensors is needed")
    if (folder / "config.json").is_file():
        check_folder(folder)
    try:
        tokenizer = load_tokenizer(name)
    except UserError as error:
        raise UserError(f"the scorer {name} has no usable tokenizer: {error}") from error
    model: Any = load_network(
        name,
        f"the scorer {name}",
        "take one that AutoModelForCausalLM reads from safetensors, or one of ours",
    )

    return model.to(device=device), tokenizer


def _context(config: Any) -> int:
    """Return the most tokens that the network was made to read."""
    text = config.get_text_config()
    for key in ("max_position_embeddings", "n_positions", "max_sequence_length", "max_seq_len"):
        found = getattr(text, key, None)
        if isinstance(found, int) and found > 1:
            return found
    return UNKNOWN_CONTEXT


# Their names in the version before.
Judge, JudgeFacts, JudgeTokens, load_judge = Scorer, ScorerFacts, ScorerTokens, load_scorer
