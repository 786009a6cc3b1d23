"""Parts of a page that come from a ``ptq_report.json``: layers, what was kept, where it comes from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from evals.record import Record, TextResult
from evals.report.html import Html, bullets, data_list, details, paragraph, table, tiles
from evals.report.tables_eval import megabytes

__all__ = ["kept_table", "layer_table", "model_certificate", "own_record", "scheme_words", "tile_list"]

_FILE_ROWS = 6  # weight files with their hashes in the certificate; the report itself has all


def own_record(report: Mapping[str, Any], records: Sequence[Record]) -> Record | None:
    """The record of the very model that the report is of: recipe and calibration text agree."""
    drawn = (report.get("calibration") or {}).get("fingerprint")
    for record in records:
        same = record.model.recipe is not None and dict(record.model.recipe) == report["recipe"]
        if same and (record.model.calibration or {}).get("fingerprint") == drawn:
            return record
    return None


def scheme_words(scheme: Mapping[str, Any]) -> str:
    """The scheme's name as its number format describes it, e.g. ``int3 sym g64``."""
    return str(scheme.get("name", "unknown"))


def tile_list(report: Mapping[str, Any], record: Record | None) -> Html:
    """The figures that people ask for first."""
    totals, recipe = report["totals"], report["recipe"]
    after = totals["payload_bytes"] + totals["kept_bytes"]
    before = totals["source_bytes"]
    ratio = f"{before / after:.2f} times smaller than {megabytes(before)}" if after else ""
    quantized = f"of {totals['quantized_parameters']:,} weights in {len(report['layers'])} linears"
    rows = [
        ("method", recipe.get("method", "unknown"), scheme_words(recipe.get("scheme", {}))),
        ("bits per weight", f"{totals['bits_per_weight']:.3f}", quantized),
        ("weights", megabytes(after), ratio),
    ]
    for text in record.texts if record else ():
        rows += _text_tiles(text)
    return tiles(rows)


def _text_tiles(text: TextResult) -> list[tuple[str, str, str]]:
    where = f"{text.name}, {text.convention}"
    ppl, error = text.perplexity, text.standard_error
    spread = None if ppl is None or error is None else ppl * error
    error_words = "" if spread is None else f"\N{PLUS-MINUS SIGN} {spread:.2g}, "
    tiles = [
        (f"perplexity, {where}", "overflows" if ppl is None else f"{ppl:.2f}", f"{error_words}{text.tokens:,} tokens")
    ]
    found = text.divergence
    if found is not None:
        error_words = "" if found.kl_standard_error is None else f"\N{PLUS-MINUS SIGN} {found.kl_standard_error:.2g}, "
        agreement = f"{error_words}top-1 agreement {100 * found.top1_agreement:.1f} %"
        tiles.append((f"KL to the base, {where}", f"{found.kl_mean:.4f}", agreement))
    return tiles


def layer_table(report: Mapping[str, Any]) -> Html:
    """One row per linear, folded."""
    layers = report["layers"]
    figures = list(dict.fromkeys(name for layer in layers for name in layer.get("figures", {})))  # the methods' own
    headings = (
        "linear",
        "method",
        "scheme",
        "bits per weight",
        "bytes",
        "error, nearest",
        "error",
        *figures,
        "seconds",
    )
    rows = [_layer_row(layer, figures) for layer in layers]
    notes = [f"{layer['name']}: {note}" for layer in layers for note in layer.get("notes", ())]
    shown = table("Linears; errors are squared, relative to the output", headings, rows, words=(0, 1, 2))
    return details(f"Every linear ({len(rows)})", shown, bullets(notes) if notes else "", long=True)


def _layer_row(layer: Mapping[str, Any], figures: Sequence[str]) -> tuple[object, ...]:
    own = layer.get("figures", {})

    def number(field: str, form: str = ".4g") -> str | None:
        value = layer.get(field)
        return None if value is None else format(value, form)

    return (
        layer["name"],
        layer.get("method"),
        scheme_words(layer.get("scheme", {})),
        number("bits_per_weight", ".3f"),
        number("payload_bytes", ","),
        number("loss_rtn"),
        number("loss"),
        *(f"{own[name]:.3g}" if name in own else None for name in figures),
        number("seconds", ".2f"),
    )


def kept_table(report: Mapping[str, Any]) -> Html:
    """What stayed in full precision, the largest first."""
    kept = sorted(report["kept"], key=lambda tensor: -tensor["bytes"])
    if not kept:
        return paragraph("Nothing was kept in full precision.")
    total = max(report["totals"]["payload_bytes"] + report["totals"]["kept_bytes"], 1)
    rows = [(t["name"], t["reason"], f"{t['bytes']:,}", f"{t['bytes'] / total:.1%}") for t in kept]
    shown = table("Kept in full precision", ("tensor", "why", "bytes", "share of all"), rows, words=(0, 1))
    return shown if len(rows) <= 12 else details(f"Every tensor that was kept ({len(rows)})", shown, long=True)


def model_certificate(report: Mapping[str, Any]) -> Html:
    """Where the quantized model comes from, folded."""
    names = (
        "model",
        "recipe",
        "calibration",
        "container",
        "container_reason",
        "totals",
        "timing",
        "environment",
        "sha256",
    )
    files = dict(list(report.get("files", {}).items())[:_FILE_ROWS])
    data = {name: report[name] for name in names if report.get(name) is not None}
    hashes = {f"file {name}": file["sha256"] for name, file in files.items()}
    return details("The quantized model", data_list(data | hashes))
