"""Publishing models: convert from any readable format, describe on a card, push to a hub."""

from __future__ import annotations

import json
import shutil
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from blockdiffusion.checkpoints.bd3lm import to_bd3lm
from blockdiffusion.checkpoints.card import (
    FACTS,
    README,
    Card,
    is_ours,
    public_name,
    read_card,
    render,
    write_card,
)
from blockdiffusion.checkpoints.finding import (
    CONFIG,
    COPY_AGAIN,
    HUB_ID,
    WEIGHTS,
    find_directory,
)
from blockdiffusion.checkpoints.formats import Found, find_model, read_config, write_model
from blockdiffusion.checkpoints.options import LightningOptions, Target
from blockdiffusion.checkpoints.tensors import write_safetensors
from blockdiffusion.data.tokenizers import load_tokenizer, save_tokenizer, vocab_size
from blockdiffusion.errors import UserError, reason, shown
from blockdiffusion.files.checksums import sums_of, write_sums
from blockdiffusion.files.directories import publish_directory, writing
from blockdiffusion.files.disk import written_aside
from blockdiffusion.files.records import read_json
from blockdiffusion.models.block_diffusion import BlockDiffusion
from blockdiffusion.models.causal_lm import has_vocabulary
from blockdiffusion.models.transformer import BlockDiffusionConfig

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

MEASURED_AS_A_BOUND = (
    "as a bound, by one draw of t and masks (bernoulli, t cut at 0.001), rows of L tokens; "
    "position 0 of every row is given, whatever token it is, and not counted"
)
MEASURED_EXACTLY = "exactly, rows of L tokens; position 0 of every row is given and not counted"
UPLOADED = ["*.json", "*.safetensors", "*.txt", "*.jinja", README]


# --- Converting -----------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Converted:
    """A model written by `convert`; `notes` are sentences for the user."""

    model: BlockDiffusion
    out: Path
    notes: tuple[str, ...]


def convert(
    source: str | Path,
    out: str | Path,
    *,
    to: Target = "blockdiffusion",
    lightning: LightningOptions | None = None,
    tokenizer: str | Path | None = None,
    bos: bool | None = None,
) -> Converted:
    """Write a model that `load` can read as a new directory `out`, whole or not at all.

    Args:
        source: a model's or run's directory, a Hugging Face id, or the authors' `last.ckpt`.
        to: our own format, with a model card; or the published `bd3lm` one.
        lightning: which weights of a Lightning file to take, and what it does not record.
        tokenizer: as in `data.tokenizers.load_tokenizer`; by default that of the source.
        bos: whether position 0 of a row is a given BOS; None = as in the source.

    Raises:
        UserError: see `load`; `out` exists or cannot be written; the tokenizer is another model's;
            or the format cannot describe the model.
    """
    if to not in get_args(Target):
        raise UserError(f"--to is {shown(to)}; choose {' or '.join(get_args(Target))}")
    out = Path(out)
    if out.is_file() or (out.is_dir() and any(out.iterdir())):
        raise UserError(f"{out} already exists; choose another --out, or remove it")
    found = find_model(source, lightning)
    model = found.model
    notes: list[str] = []
    model.tokenizer = _tokenizer(found, tokenizer, notes)
    if model.tokenizer is not None:
        _name_tokens(model, model.tokenizer)
    if bos is not None:
        model.config = replace(model.config, bos=bos)
    if bos and model.config.bos_id is None:
        raise UserError(
            "--bos needs a BOS token, and neither the source nor a tokenizer names one; "
            "give --tokenizer, or leave --bos out"
        )
    partial = out.with_name(f".{out.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)  # what a killed process left
    try:
        with writing(f"model {out}", partial, "convert again"):
            partial.mkdir(parents=True)
            if to == "bd3lm":
                sums = _write_bd3lm(found, partial)
            else:
                sums = write_model(model, partial)
                write_card(partial, found.config, _card(found, source, out))
            if model.tokenizer is not None:
                save_tokenizer(model.tokenizer, partial)
            write_sums(partial, sums_of(partial, sums))
            if out.is_dir():
                out.rmdir()  # it is empty
            publish_directory(partial, out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return Converted(model=model, out=out, notes=tuple(notes))


def _tokenizer(
    found: Found, spec: str | Path | None, notes: list[str]
) -> PreTrainedTokenizerFast | None:
    """The tokenizer `spec`, or the source's own, if it fits the model."""
    if spec is not None:
        tokenizer = load_tokenizer(spec)
        if why := _misfit(tokenizer, found.model):
            raise UserError(f"the tokenizer {spec} is not this model's: {why}; give another")
        return tokenizer
    if found.model.tokenizer is not None:
        return found.model.tokenizer
    if found.lightning is not None and found.lightning.tokenizer is not None:
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "tokenizer.json"
            file.write_text(found.lightning.tokenizer, encoding="utf-8")
            tokenizer = load_tokenizer(file)
        why = _misfit(tokenizer, found.model)
        if why is None:
            notes.append("the tokenizer is the one in the file")
            return tokenizer
        notes.append(f"the tokenizer in the file was left out: {why}")
        return None
    notes.append("no tokenizer: this model works with ids; convert with --tokenizer for text")
    return None


def _misfit(tokenizer: PreTrainedTokenizerFast, model: BlockDiffusion) -> str | None:
    theirs = (vocab_size(tokenizer), tokenizer.mask_token_id)
    ours = (model.config.vocab_size, model.config.mask_id)
    if has_vocabulary(model, theirs[0]) and theirs[1] == ours[1]:
        return None
    return (
        f"it has V = {theirs[0]} and mask {theirs[1]}, the model V = {ours[0]} and mask {ours[1]}"
    )


def _name_tokens(model: BlockDiffusion, tokenizer: PreTrainedTokenizerFast) -> None:
    """Take the ids of BOS and EOS from the tokenizer if the source does not name them."""
    for name in ("bos_id", "eos_id"):
        if getattr(model.config, name) is None:
            found = getattr(tokenizer, f"{name.removesuffix('_id')}_token_id")
            model.config = replace(model.config, **{name: found})


def _write_bd3lm(found: Found, folder: Path) -> dict[str, str]:
    """Write the published format; return the sha256 of the weights, by the name of their file."""
    if found.format == "transformers":
        raise UserError(
            f"--to is bd3lm, but {found.path} is an adapted causal model, which that format cannot "
            "describe; leave --to out"
        )
    raw, tensors = to_bd3lm(found.config, found.model.backbone.state_dict())
    raw["dtype"] = str(found.model.dtype).removeprefix("torch.")
    (folder / CONFIG).write_text(json.dumps(raw, indent=2) + "\n", encoding="utf-8")
    return {WEIGHTS: write_safetensors(tensors, folder / WEIGHTS)}


def _card(found: Found, source: str | Path, out: Path) -> Card:
    """The card of converted weights, or our own card, which stays true of the same weights."""
    own = read_card(found.path) if found.path.is_dir() else None
    if own is not None or found.format == "blockdiffusion":
        return replace(own or Card(name=out.name), name=out.name)
    facts: dict[str, Any] = {
        "format": found.format,
        "converted from": public_name(source),
        "how its authors measure": MEASURED_EXACTLY
        if found.model.config.is_autoregressive
        else MEASURED_AS_A_BOUND,
    }
    if found.lightning is None:
        return Card(name=out.name, source=facts)
    average = found.lightning.weights == "ema"
    facts["kind"] = found.lightning.kind
    facts["weights"] = "moving average" if average else "as trained"
    steps = found.lightning.steps
    return Card(
        name=out.name,
        source=facts,
        training=None if steps is None else {"steps": steps},
        datasets=None if found.lightning.data is None else [public_name(found.lightning.data)],
    )


# --- Describing -----------------------------------------------------------------------------------


def record_evaluation(directory: str | Path, evaluation: dict[str, Any]) -> Path:
    """Put a measured perplexity into a model's card; return the model's directory.

    Args:
        evaluation: from `evaluate.prepared.evaluation_facts`.

    Raises:
        UserError: there is no model of our format, or its README.md was written by hand.
    """
    folder = check_card(directory)
    card = read_card(folder) or Card(name=_title(folder))
    card = replace(card, evaluation=evaluation)
    with written_aside(folder / FACTS) as file:
        file.write(card.to_json().encode())
    refresh_readme(folder)
    return folder


def check_card(directory: str | Path) -> Path:
    """Return the model's directory if its card can be written.

    Raises:
        UserError: there is no model of our format, or its README.md was written by hand.
    """
    folder = _model_directory(Path(directory))
    if read_json(folder / CONFIG, COPY_AGAIN).get("model_type") != BlockDiffusionConfig.model_type:
        raise UserError(f"{folder} is not in our own format; blockdiff convert gives it a card")
    if not is_ours(folder):
        raise UserError(
            f"{folder / README} was not written by blockdiffusion and is left alone; "
            "move it away to have a card written"
        )
    return folder


def refresh_readme(folder: Path) -> None:
    """Rewrite README.md from config.json and card.json."""
    config = read_config(folder / CONFIG)
    card = read_card(folder) or Card(name=_title(folder))
    with written_aside(folder / README) as file:
        file.write(render(config, card).encode())


def _title(folder: Path) -> str:
    """A model in a run's directory has the run's name."""
    folder = folder.resolve()
    return folder.parent.name if folder.name == "model" else folder.name


def _model_directory(path: Path) -> Path:
    folder = find_directory(path)
    if folder is None:
        raise UserError(
            f"{path} holds no {CONFIG}; give a model's or a training run's directory "
            "(blockdiff convert makes one of a checkpoint)"
        )
    return folder


# --- Sending --------------------------------------------------------------------------------------


def push(directory: str | Path, repo_id: str, *, private: bool = False) -> str:
    """Upload a model directory to the Hugging Face hub, creating the repository if needed.

    The model is loaded first, to check that it can be read, and its card is rewritten.

    Args:
        directory: a model's or run's directory.
        repo_id: `owner/name`.
        private: make the repository private; an existing public one is refused.

    Returns:
        The repository's address.

    Raises:
        UserError: no such model, a bad name, no token, no connection, or the hub refuses.
    """
    if not HUB_ID.fullmatch(repo_id):
        raise UserError(f"the repository is {shown(repo_id)}; give it as owner/name")
    folder = _model_directory(Path(directory))
    if find_model(folder).format == "blockdiffusion" and is_ours(folder):
        refresh_readme(folder)
    import huggingface_hub

    if huggingface_hub.get_token() is None:
        raise UserError(
            "there is no Hugging Face token on this machine; run `hf auth login`, or set HF_TOKEN"
        )
    api = huggingface_hub.HfApi()
    try:
        address = str(api.create_repo(repo_id, private=private, exist_ok=True))
        if private and not api.model_info(repo_id).private:
            raise UserError(
                f"{repo_id} exists and is public, so nothing was sent; make it private on the hub, "
                "or choose another name"
            )
        api.upload_folder(
            repo_id=repo_id,
            folder_path=folder,
            allow_patterns=UPLOADED,
            commit_message="Upload a model with blockdiffusion",
        )
    except UserError:
        raise
    except Exception as error:  # the hub client has no common base class for its failures
        raise UserError(_hub_failure(repo_id, error)) from error
    return address


def _hub_failure(repo_id: str, error: Exception) -> str:
    status = getattr(getattr(error, "response", None), "status_code", None)
    if status in (401, 403):
        return (
            f"the hub refused to write {repo_id} (status {status}); use a token with write access "
            "(`hf auth login`), and a name that is yours"
        )
    why = f"status {status}" if status is not None else f"{type(error).__name__}: {reason(error)}"
    return f"{repo_id} could not be sent to the hub ({why}); check the connection, then push again"
