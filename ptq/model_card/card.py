"""`render_card`: a report as ``README.md``. It holds no date, path or time: the same run writes the same card."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from calib.checkpoint.atomic_files import os_errors
from ptq.model_card.command import MAX_OVERRIDES, RECIPE_FILE, command_words, public_source, quoted
from ptq.model_card.metadata import MARK, card_data, front_matter, hub_name
from ptq.model_card.readers import readers
from ptq.model_card.scores import NO_SCORES, scores_section
from ptq.model_card.text import cell, code_block, one_line, table
from ptq.report import IMPORTED, Report

__all__ = ["CARD_NAME", "card_is_ours", "render_card"]

CARD_NAME = "README.md"
_DENSE = ("bf16", "f16", "f32")
_WIDEST_NAMES = 3


def card_is_ours(folder: Path) -> bool:
    """Whether the card of a folder is of ptq, or there is none: others are not replaced."""
    path = folder / CARD_NAME
    if not path.exists():
        return True
    with os_errors(path, "read"):
        return MARK.encode() in path.read_bytes()


def render_card(report: Report, source: Path | None) -> str:
    """The card of a result.

    Args:
        report: of the result.
        source: the folder that it was made of, whose own card has licence, language and tags.
    """
    name = str(report.model["source"])
    imported = report.recipe["method"] == IMPORTED
    carried = front_matter(source, quantized=imported)
    base = None if imported and "base_model" in carried else hub_name(name, source)
    data = card_data(carried, base, _tags(report))
    parts = [
        f"---\n{data.to_yaml()}\n---\n{MARK}",
        f"# {cell(_title(name))}, {cell(_storage(report))}",
        _introduction(report, data.base_model),
        "## How it was made",
        *_recipe(report, base or Path(name).name or "MODEL"),
        "## What is inside",
        table(("", ""), _sizes(report)),
        *_kept(report),
        *_warnings(report),
        "## Scores",
        scores_section(NO_SCORES),
        "## How to load it",
        *(f"### {one.name}\n\n{one.note}\n\n{one.code}" for one in readers(report)),
    ]
    return "\n\n".join(parts) + "\n"


def _title(name: str) -> str:
    return one_line(Path(name).name.removesuffix(".gguf")) or "A model"


def _storage(report: Report) -> str:
    """The formats in the result; the recipe's where there are many."""
    names = [name for name, _ in Counter(str(row.scheme["name"]) for row in report.layers).most_common()]
    formats = ", ".join(names) if len(names) <= _WIDEST_NAMES else f"{len(names)} formats"
    method = str(report.recipe["method"])
    return f"{formats} by {method}" if method != IMPORTED else formats or "dequantized"


def _tags(report: Report) -> list[str]:
    if report.container in _DENSE:
        return ["ptq"]
    usual = Counter((str(row.scheme["format"]), int(row.scheme["bits"])) for row in report.layers).most_common(1)
    method = report.container.removesuffix("_v2")
    (number_format, bits), _ = usual[0]
    of_format = [f"{bits}-bit"] if number_format == "int" else [number_format]
    return ["ptq", *([method] if method != "native" else []), *of_format]


def _introduction(report: Report, base: Any) -> str:
    model = report.model
    source = cell(str(base) if base else _title(str(model["source"])))
    if isinstance(base, str):
        source = f"[{source}](https://huggingface.co/{base})"
    unknown = (
        "" if base else " The model's name on the hub is not known: before publishing, give it as `base_model` above."
    )
    made = "dequantized after being quantized" if report.container in _DENSE else "quantized"
    version = report.environment.get("versions", {}).get("ptq-toolkit", "")
    return (
        f"{source} ({cell(str(model['architecture']))}, {model['parameters']:,} parameters, {model['dtype']}), {made} "
        f"after training by ptq-toolkit {cell(str(version))}. `ptq_report.json` has every layer.{unknown}"
    )


def _recipe(report: Report, model: str) -> Iterator[str]:
    recipe = report.recipe
    if recipe["method"] == IMPORTED:
        yield "Another program quantized it; ptq wrote the same values in another format."
        return
    yield code_block("console", f"$ {quoted([one_line(word) for word in command_words(recipe, model)])}")
    if len(recipe["overrides"]) + len(recipe["ignore"]) > MAX_OVERRIDES:
        plain = yaml.safe_dump(_without_names(recipe), sort_keys=False, allow_unicode=True)
        yield f"<details><summary>{RECIPE_FILE}</summary>\n\n{code_block('yaml', plain)}\n\n</details>"
    yield _calibration(report.calibration)


def _without_names(recipe: Mapping[str, Any]) -> dict[str, Any]:
    """A recipe as a recipe file has it."""
    calibration = {**recipe["calibration"], "source": public_source(recipe["calibration"]["source"])}
    scheme = {key: value for key, value in recipe["scheme"].items() if key != "name"}
    overrides = [{key: value for key, value in row.items() if key != "name"} for row in recipe["overrides"]]
    return {**recipe, "scheme": scheme, "overrides": overrides, "calibration": calibration}


def _calibration(found: Mapping[str, Any] | None) -> str:
    if found is None:
        return "No calibration data."
    source = cell(public_source(str(found["source"])))
    return (
        f"Calibration data: {source}, {found['sequences']} sequences of {found['seqlen']} tokens, "
        f"seed {found['seed']}, fingerprint of the tokens `{found['fingerprint']}`."
    )


def _sizes(report: Report) -> Iterator[tuple[str, str]]:
    totals = report.totals
    yield "container", cell(report.container)
    for name, count in Counter(str(row.scheme["name"]) for row in report.layers).most_common():
        yield cell(name), f"{count} linears"
    if report.container in _DENSE:
        yield "bits per quantized weight, before dequantizing", f"{totals['bits_per_weight']:.3f}"
    else:
        yield "bits per quantized weight", f"{totals['bits_per_weight']:.3f}"
    yield "weight files", f"{totals['file_bytes']:,} bytes"
    yield "full precision", f"{totals['source_bytes']:,} bytes"
    if report.recipe["kv_bits"] is not None:
        yield "keys and values at run time", f"{report.recipe['kv_bits']} bits"


def _kept(report: Report) -> Iterator[str]:
    if not report.kept:
        return
    count, size = Counter[str](), Counter[str]()
    only: dict[str, str] = {}
    for tensor in report.kept:
        count[tensor.reason] += 1
        size[tensor.reason] += tensor.bytes
        only[tensor.reason] = tensor.name
    yield "In full precision:"
    rows = []
    for reason, number in size.most_common():
        what = only[reason] if count[reason] == 1 else f"{count[reason]} tensors"
        rows.append((cell(what), cell(reason), f"{number:,}"))
    yield table(("what", "why", "bytes"), rows)


def _warnings(report: Report) -> Iterator[str]:
    found = list(dict.fromkeys(report.warnings))
    if found:
        yield "\n".join(f"* {cell(text)}" for text in found)
