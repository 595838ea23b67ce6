"""Finding a model: a directory, a file, or a hub id, which is downloaded."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from blockdiffusion.errors import UserError
from blockdiffusion.files import records

CONFIG = "config.json"
COPY_AGAIN = "copy or download it again"
WEIGHTS = "model.safetensors"
PARTS = "model*.safetensors"  # and `WEIGHTS`
INDEX = "model.safetensors.index.json"  # of weights in several files
ADAPTER = "adapter_model.safetensors"  # of LoRA: weights that are added to those of a parent
GGUF = ".gguf"
LIGHTNING = ".ckpt"
PICKLES = (".bin", LIGHTNING, ".pt", ".pth", ".pkl")
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
# Values of model_type that cannot be read, and why.
REFUSED = {
    "diffusion_gemma": "DiffusionGemma replaces tokens by random ones instead of a mask token, and "
    "its network reads its own previous predictions (self-conditioning)",
}


def config_of(path: Path) -> dict[str, Any]:
    """Return the config.json of a model's directory; {} of a file.

    Raises:
        UserError: it cannot be read, or is that of a kind of model that cannot.
    """
    raw = records.read_json(path / CONFIG, COPY_AGAIN) if path.is_dir() else {}
    if (why := REFUSED.get(str(raw.get("model_type")))) is not None:
        raise UserError(
            f"{path} cannot be read: {why}, and neither is masked diffusion; give a model with a "
            "mask token, such as SDAR, or adapt a causal one"
        )
    return raw


def find_directory(path: Path) -> Path | None:
    """Return `path` or the `model` in it (of a run), if it is a model directory.

    Raises:
        UserError: there is a config.json without weights.
    """
    folder = next((f for f in (path, path / "model") if (f / CONFIG).is_file()), None)
    if folder is not None and not any((folder / w).is_file() for w in (WEIGHTS, INDEX, ADAPTER)):
        pickles = sorted(p.name for p in folder.iterdir() if p.suffix in PICKLES)
        if pickles:
            raise UserError(
                f"{folder} holds {pickles[0]}, a pickle, which can hold code and is not opened; "
                f"a {WEIGHTS} is needed"
            )
        raise UserError(f"{folder} has a {CONFIG} but no {WEIGHTS}")
    return folder


def find_path(path_or_hub_id: str | Path) -> Path:
    """The local directory or Lightning file that holds the model; downloads a hub id."""
    path = Path(path_or_hub_id)
    if path.is_file():
        if path.suffix in (LIGHTNING, GGUF):
            return path
        if path.suffix in PICKLES:
            raise UserError(
                f"{path} is a pickle, which can hold code and is not opened; "
                f"give a directory with {CONFIG} and {WEIGHTS}, or a Lightning {LIGHTNING}"
            )
        raise UserError(f"{path} is a file; give the directory that holds {CONFIG}")
    folder = find_directory(path)
    if folder is not None:
        return folder
    if path.is_dir():
        files = sorted(path.glob(f"*{LIGHTNING}"))
        instead = "give a model's or a training run's directory"
        if files:
            instead = f"for a Lightning checkpoint give the file itself, such as {files[0]}"
        raise UserError(f"{path} holds no {CONFIG}; {instead}")
    refuse_missing_path(path_or_hub_id)
    if not HUB_ID.fullmatch(str(path_or_hub_id)):
        raise _nowhere(path)
    return _download(str(path_or_hub_id))


def refuse_missing_path(name: str | Path) -> None:
    """Refuse a local path that does not exist, before a hub is asked for it.

    OWNER/NAME is a path if there is a folder OWNER.

    Raises:
        UserError: the name is such a path.
    """
    text, parent = str(name), Path(name).parent
    if text.startswith((".", "/", "~")) or text.count("/") > 1:
        raise _nowhere(name)
    if "/" in text and parent.is_dir():
        raise UserError(
            f"{name} does not exist: the folder {parent} is here and has no {Path(name).name} in "
            "it; check the name, or give a Hugging Face id"
        )


def _nowhere(name: str | Path) -> UserError:
    return UserError(f"{name} does not exist; give a model directory or a Hugging Face id")


def _download(hub_id: str) -> Path:
    from huggingface_hub import snapshot_download

    try:
        folder = Path(snapshot_download(hub_id, allow_patterns=["*.json", PARTS, "*.txt"]))
    except Exception as error:  # the hub client has no common base class for its failures
        raise UserError(
            f"{hub_id} is no local directory, and the download from the hub failed "
            f"({type(error).__name__}); check the name and the connection, or give a directory"
        ) from error
    # Without a connection an interrupted download in the cache is taken for the snapshot.
    needed = (CONFIG, INDEX if (folder / INDEX).is_file() else WEIGHTS)
    if missing := [name for name in needed if not (folder / name).is_file()]:
        raise UserError(
            f"{hub_id} is incomplete in the cache: {folder} has no {' and no '.join(missing)}; "
            "repeat with a connection, or give a directory that has both"
        )
    return folder
