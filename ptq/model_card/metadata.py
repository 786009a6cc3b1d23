"""The hub's metadata of a card: what the source's own card says of the model, and what quantizing adds."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import ModelCardData

__all__ = ["MARK", "card_data", "front_matter", "hub_name"]

MARK = "<!-- written by ptq -->"
MAX_CARD_BYTES = 1 << 20
_CARRIED = ("license", "license_name", "license_link", "language", "tags", "pipeline_tag")
_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+", re.ASCII)
_BASE = ("base_model", "base_model_relation")
_OF_QUANTIZATION = re.compile(
    r"(ptq|compressed-tensors|gptq|gptqmodel|awq|autoround|auto-round|gguf|fp8|fp4|nvfp4|mxfp4|mxfp8|int[2348]|"
    r"quantized|quantization|w\da\d+|\d-?bits?)",
    re.IGNORECASE,
)


def front_matter(folder: Path | None, *, quantized: bool = False) -> dict[str, Any]:
    """Licence, language, tags and the like of a folder's ``README.md``; of a card of ours, the base model as well.

    Args:
        folder: of the source.
        quantized: the source is another program's quantization, whose base is ours as well.

    A card that is missing, too large or no YAML gives nothing: it is a courtesy to carry it on, no condition.
    """
    if folder is None:
        return {}
    try:
        with (folder / "README.md").open("rb") as file:
            text = file.read(MAX_CARD_BYTES).decode("utf-8").lstrip("\ufeff").replace("\r\n", "\n")
        found = re.match(r"---\n(.*?)\n---(?:\n|\Z)", text, re.DOTALL)
        # An alias is a few bytes that stand for many.
        if found is None or any(isinstance(event, yaml.AliasEvent) for event in yaml.parse(found[1])):
            return {}
        data = yaml.safe_load(found[1])
    except (OSError, ValueError, RecursionError, yaml.YAMLError):
        return {}
    keys = (*_CARRIED, *(_BASE if quantized or MARK in text else ()))
    entries = {key: _plain(data[key]) for key in keys if key in data} if isinstance(data, Mapping) else {}
    return {key: value for key, value in entries.items() if value}


def _plain(value: object) -> str | list[str] | None:
    """A string or a list of strings; YAML 1.1 takes the language code ``no`` for false."""
    if isinstance(value, list):
        words = [word for word in map(_plain, value) if isinstance(word, str)]
        return list(dict.fromkeys(words))
    if isinstance(value, bool):
        return None if value else "no"
    return str(value) if isinstance(value, str | int) else None


def hub_name(source: str, folder: Path | None) -> str | None:
    """The hub's name of the source model; ``None`` where it is a folder or a module of which no name is known.

    Args:
        source: what the user named.
        folder: where it was read from.
    """
    if folder is None:
        return None
    cached = folder.resolve().parent.parent  # models--OWNER--NAME/snapshots/REVISION
    if folder.resolve().parent.name == "snapshots" and cached.name.startswith("models--"):
        return "/".join(cached.name.removeprefix("models--").split("--", 1))
    return source if _HUB_NAME.fullmatch(source) and not Path(source).exists() else None


def card_data(carried: Mapping[str, Any], base: str | None, tags: Iterable[str]) -> ModelCardData:
    """The front matter of a card.

    Args:
        carried: `front_matter` of the source.
        base: the hub's name of the model in full precision, if it is known.
        tags: of the quantization.
    """
    fields = {key: value for key, value in carried.items() if key not in ("tags", *_BASE)}
    before = carried.get("tags", [])
    words = [word for word in ([before] if isinstance(before, str) else before) if not _OF_QUANTIZATION.fullmatch(word)]
    known = base or carried.get("base_model")
    if known:
        fields |= {"base_model": known, "base_model_relation": "quantized"}
    fields.setdefault("pipeline_tag", "text-generation")
    if "license_name" in fields or "license_link" in fields:
        fields.setdefault("license", "other")  # the hub asks for it beside them
    return ModelCardData(library_name="transformers", tags=list(dict.fromkeys([*words, *tags])), **fields)
