"""Which files of a model folder are read, checked before any of them is opened."""

from __future__ import annotations

import json
from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, RepositoryNotFoundError

from calib.errors import ModelError

__all__ = ["INDEX_NAME", "SINGLE_NAME", "checkpoint_files", "resolve_model"]

SINGLE_NAME = "model.safetensors"
INDEX_NAME = "model.safetensors.index.json"
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")
_WANTED = ["*.json", "*.safetensors", "*.jinja", "*.model", "*.txt", "*.py"]


def resolve_model(model: str) -> Path:
    """The local folder of a model: the folder itself, or the snapshot of a hub id (safetensors files only).

    Raises:
        ModelError: neither a folder nor a hub id that can be reached.
    """
    path = Path(model)
    if path.is_dir():
        return path
    if path.is_file():
        raise ModelError(f"{model} is a file; give a model folder, a hub id, or a file that ends in .gguf.")
    try:
        return Path(snapshot_download(model, allow_patterns=_WANTED))
    except RepositoryNotFoundError as error:
        raise ModelError(f"{model} is neither a local folder nor a model on the hub.") from error
    except HFValidationError as error:
        raise ModelError(f"there is no folder {model}, and that is not the form of a hub id (owner/name).") from error
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
        raise ModelError(f"there is no folder {model}, and the hub cannot be reached for it: {error}") from error


def checkpoint_files(folder: Path) -> list[Path]:
    """The safetensors files that hold a model's weights.

    Raises:
        ModelError: no config or weights, pickle files only, an index that is damaged, leaves the folder or names a
            file that is not there.
    """
    if not (folder / "config.json").is_file():
        raise ModelError(f"{folder} has no config.json: it is not a Hugging Face model folder.")
    if (folder / SINGLE_NAME).is_file():
        return [folder / SINGLE_NAME]
    if (folder / INDEX_NAME).is_file():
        return _indexed_files(folder)
    if any(next(folder.glob(pattern), None) for pattern in _PICKLES):
        raise ModelError(
            f"{folder} holds pickle weights only, which can run code when they are read. Convert them once where you "
            f"trust them: load with transformers and save_pretrained(...), which writes safetensors."
        )
    raise ModelError(f"{folder} has no weights ({SINGLE_NAME} or {INDEX_NAME}).")


def _indexed_files(folder: Path) -> list[Path]:
    index = folder / INDEX_NAME
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise ModelError(f"{index} is damaged: it has no readable weight_map ({error}).") from error
    for name in names:
        if not isinstance(name, str) or Path(name).name != name or not name.endswith(".safetensors"):
            raise ModelError(f"{index} names {name!r}, which is not a safetensors file in that folder.")
        if not (folder / name).is_file():
            raise ModelError(f"{folder} lacks {name}, which its index names. Is the download complete?")
    return [folder / name for name in names]
