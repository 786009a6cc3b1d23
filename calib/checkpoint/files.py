"""Which files of a model folder are read, checked before any of them is opened."""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, RepositoryNotFoundError
from huggingface_hub.utils._validators import validate_repo_id

from calib.checkpoint.hub import hub_access, no_hub
from calib.checkpoint.json import quoted, read_json
from calib.checkpoint.safetensors_header import StoredTensor, check_headers
from calib.errors import ModelError

__all__ = [
    "INDEX_NAME",
    "MAX_INDEX_BYTES",
    "SINGLE_NAME",
    "WEIGHT_SUFFIXES",
    "CompanionRule",
    "checkpoint_files",
    "resolve_model",
    "stored_tensors",
]

SINGLE_NAME = "model.safetensors"
INDEX_NAME = "model.safetensors.index.json"
MAX_INDEX_BYTES = 64 << 20
"""Ten times the index of the largest models published so far."""
ADAPTER_NAME = "adapter_config.json"
MAX_ADAPTER_BYTES = 8 << 20
_PICKLES = ("*.bin", "*.bin.index.json", "*.pt", "*.pth", "*.ckpt", "*.pkl")
WEIGHT_SUFFIXES = frozenset(
    {
        *(".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".distcp", ".h5", ".hdf5", ".keras"),
        *(".msgpack", ".gguf", ".ggml", ".llamafile", ".onnx", ".onnx_data", ".tflite", ".mlmodel", ".pdparams"),
        *(".nemo", ".ot", ".engine"),
    }
)
"""How names of files end that hold weights, in the formats that are found beside models (casefolded)."""
# Of a hub repository, all but weights that are not read: those in other formats and in sub-folders.
_UNWANTED = [*(f"*{suffix}" for suffix in sorted(WEIGHT_SUFFIXES - {".safetensors"})), "*/*.safetensors", "original/*"]
_UNWANTED += ["consolidated*.safetensors", "*.onnx*", "*.zip", "*.tar", "*.tar.*", "*.parquet", "*.mp4"]
_CONVERT = (
    "AutoModelForCausalLM.from_pretrained(FOLDER).save_pretrained(NEW) of transformers, on a machine where nothing is "
    "lost if they do, writes safetensors"
)


def resolve_model(model: str) -> Path:
    """The local folder of a model: the folder itself, or the snapshot of a hub id (safetensors files only).

    Raises:
        ModelError: neither a folder nor a hub id that can be reached; folders of similar names are offered.
    """
    path = Path(model)
    try:
        if path.is_dir():
            return path
        if path.is_file():
            raise ModelError(f"{model} is a file; give a model folder, a hub id, or a file that ends in .gguf.")
        validate_repo_id(model)
    except HFValidationError as error:
        raise ModelError(
            f"there is no folder {model}, and that is not the form of a hub id (owner/name).{_near(path)}"
        ) from error
    except OSError as error:  # a name that no file can have
        raise ModelError(f"there is no folder {model}: {error.strerror}.") from error
    with hub_access() as unreachable:
        try:
            return Path(snapshot_download(model, ignore_patterns=_UNWANTED))
        except RepositoryNotFoundError as error:
            raise ModelError(f"{model} is neither a local folder nor a model on the hub.{_near(path)}") from error
        except (LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
            why = f"the hub cannot be reached for it: {error}" if unreachable is None else no_hub(unreachable, "it")
            raise ModelError(f"there is no folder {model}.{_near(path)} As a hub id: {why}.") from error


def _near(path: Path) -> str:
    """A sentence that offers the folders beside ``path`` whose names are like its own; empty if there are none."""
    try:
        beside = [entry.name for entry in path.parent.iterdir() if entry.is_dir()]
    except OSError:
        return ""
    near = difflib.get_close_matches(path.name, beside[:10_000], n=3)
    return f" Did you mean {' or '.join(str(path.parent / name) for name in near)}?" if near else ""


def checkpoint_files(folder: Path) -> list[Path]:
    """The safetensors files that hold a model's weights.

    Raises:
        ModelError: no config or weights, pickle files only, an adapter, an index that is damaged, leaves the folder or
            names a file that is not there.
    """
    if (folder / ADAPTER_NAME).exists():
        raise ModelError(_adapter_sentence(folder))
    if not (folder / "config.json").is_file():
        raise ModelError(f"{folder} has no config.json: it is not a Hugging Face model folder.")
    if (folder / SINGLE_NAME).is_file():
        return [folder / SINGLE_NAME]
    if (folder / INDEX_NAME).is_file():
        return [folder / name for name in sorted(set(_read_weight_map(folder).values()))]
    pickle = next((path.name for pattern in _PICKLES for path in folder.glob(pattern)), None)
    if pickle is not None:
        raise ModelError(
            f"{folder} holds pickle weights only ({pickle}), which can run code when they are read. Convert them once, "
            f"if you trust them: {_CONVERT}."
        )
    raise ModelError(f"{folder} has no weights ({SINGLE_NAME} or {INDEX_NAME}). Is the download complete?")


def _adapter_sentence(folder: Path) -> str:
    """What to do with a folder that holds a peft adapter, alone or beside a model."""
    whole = (folder / "config.json").is_file()
    base: Any = None
    with contextlib.suppress(ModelError):  # damaged or not, it is an adapter
        base = read_json(folder / ADAPTER_NAME, MAX_ADAPTER_BYTES)
    base = base.get("base_model_name_or_path") if isinstance(base, dict) else None
    of = f" of {quoted(base)}" if isinstance(base, str) and base else ""
    return (
        f"{folder} holds an adapter{of} ({ADAPTER_NAME}), which is only the difference to its base model. Merge them "
        "first: peft.AutoPeftModelForCausalLM.from_pretrained(FOLDER).merge_and_unload().save_pretrained(NEW), and "
        "save the tokenizer to NEW as well; then give NEW."
        + (f" If the folder is a whole model already, remove {ADAPTER_NAME}." if whole else "")
    )


def stored_tensors(folder: Path) -> dict[str, StoredTensor]:
    """Every tensor of a model folder by name: file, dtype, shape and range, all checked, no data read.

    Raises:
        ModelError: see `checkpoint_files` and `calib.checkpoint.safetensors_header.check_headers`; or the index and the
            files disagree about which tensors there are and where.
    """
    files = checkpoint_files(folder)
    found = check_headers(files)
    if files == [folder / SINGLE_NAME]:
        return found
    index = folder / INDEX_NAME
    weight_map = _read_weight_map(folder)
    missing = sorted(weight_map.keys() - found.keys())
    if missing:
        raise ModelError(
            f"{index} names {len(missing)} tensors that its files do not hold ({_first(missing)}). Are all files "
            "of one download?"
        )
    for name, file in weight_map.items():
        if found[name].file.name != file:
            raise ModelError(
                f"{index} says that the tensor {quoted(name)} is in {file}, but it is in {found[name].file.name}. Are "
                "all files of one download?"
            )
    return found


def _read_weight_map(folder: Path) -> dict[str, str]:
    """File name of every tensor, from the index; every name is that of a file in the folder itself."""
    path = folder / INDEX_NAME
    index = read_json(path, MAX_INDEX_BYTES, strict=True)
    weight_map = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise ModelError(f"{path} is damaged: it has no readable weight_map (tensor name -> file). Fetch it again.")
    _check_metadata(path, index.get("metadata", {}))
    for name in sorted(set(map(_plain_name, weight_map.values())), key=str):
        if name is None:
            bad = next(value for value in weight_map.values() if _plain_name(value) is None)
            raise ModelError(f"{path} names {quoted(bad)}, which is not a safetensors file in that folder.")
        if not (folder / name).is_file():
            raise ModelError(f"{folder} lacks {name}, which its index names. Is the download complete?")
    return weight_map


def _plain_name(value: Any) -> str | None:
    """``value`` if it is the bare name of a safetensors file (on any system), ``None`` otherwise.

    The file itself may be a link: the hub's cache is made of links into another folder.
    """
    good = isinstance(value, str) and value.endswith(".safetensors") and len(value) <= 200
    return value if good and value.isascii() and value.isprintable() and not set("/\\:") & set(value) else None


def _check_metadata(path: Path, metadata: Any) -> None:
    """Nothing is allocated by the index's ``total_size``, but a wrong one tells of a damaged file."""
    if not isinstance(metadata, dict):
        raise ModelError(f"{path} is damaged: metadata is a {type(metadata).__name__} and not an object.")
    size = metadata.get("total_size", 0)
    if isinstance(size, bool) or not isinstance(size, int | float) or not 0 <= size < 2**63:
        raise ModelError(f"{path} is damaged: metadata.total_size is {quoted(size)}, not a number of bytes.")


def _first(names: list[str]) -> str:
    return ", ".join(quoted(name) for name in names[:3]) + (", ..." if len(names) > 3 else "")


@dataclasses.dataclass(frozen=True)
class CompanionRule:
    """Which files of a model's folder may go along beside the weights.

    Args:
        code: Python files too, because the user allowed the model's code to run.
        text_only: not those that prepare images, video or sound.
    """

    code: bool = False
    text_only: bool = False
