"""One self-contained HTML page about a quantized model, its evaluations, or a comparison.

The page has no script and loads nothing, which its content security policy states. It follows the reader from light to
dark, from a wide screen to a phone, and onto paper. All that comes from files is escaped (`evals.report.html`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from evals.comparison.conclusions import sentences_on
from evals.comparison.types import Comparison
from evals.record import Record
from evals.report.charts.differences import difference_pictures, divergences, kl_pictures
from evals.report.charts.figure import Picture, inline_svg
from evals.report.charts.layers import layer_pictures
from evals.report.charts.quality import comparison_panels, quality_pictures, record_panels
from evals.report.html import Html, bullets, details, page, paragraph, pictures
from evals.report.labels import label_records, with_bases
from evals.report.tables_eval import (
    candidate_table,
    certificate,
    conclusion_table,
    difference_tables,
    harness_table,
    task_tables,
    text_tables,
)
from evals.report.tables_model import kept_table, layer_table, model_certificate, own_record, tile_list

__all__ = ["GENERATOR", "report_page"]

GENERATOR = "ptq report"
_MOST_SENTENCES = 10  # more are folded


def report_page(
    report: Mapping[str, Any] | None,
    records: Sequence[Record],
    comparison: Comparison | None,
    *,
    title: str,
    notes: Sequence[str] = (),
) -> str:
    """The page as a string of HTML; the same input gives the same bytes.

    Args:
        report: a ``ptq_report.json`` as JSON data (docs/json.md).
        records: evaluations; a base inside one is shown too.
        comparison: what `evals.comparison.compare.compare` found in them.
        title: of the page.
        notes: shown at the top, e.g. why records are not compared.
    """
    everything = with_bases(records)
    labels = label_records(everything, comparison)
    sections = [
        ("Significant differences", _established(comparison)),
        ("Pictures", _pictures(report, everything, labels, comparison)),
        ("Differences", difference_tables(comparison) if comparison else []),
        ("Texts", text_tables(everything, labels)),
        ("Tasks", [*task_tables(everything, labels), harness_table(everything, labels)]),
        ("Layers", [layer_table(report), kept_table(report)] if report else []),
        ("Where the figures come from", _origins(report, everything, labels)),
        ("Notes", _notes(report, comparison)),
    ]
    return page(
        generator=GENERATOR,
        title=title,
        subtitle=_subtitle(report, everything, comparison),
        warnings=notes,
        tiles=tile_list(report, own_record(report, records)) if report else Html(""),
        sections=[(heading, [part for part in parts if part]) for heading, parts in sections],
    )


def _subtitle(report: Mapping[str, Any] | None, records: Sequence[Record], comparison: Comparison | None) -> str:
    if report:
        model = report["model"]
        return f"{model['source']} ({model['architecture']}), {model['parameters']:,} parameters, {model['dtype']}"
    if comparison:
        others = ", ".join(candidate.label for candidate in comparison.candidates[1:])
        return f"{others} against {comparison.candidates[0].label}"
    dates = sorted(record.date for record in records)
    return (
        f"{len(dates)} evaluation{'s' if len(dates) > 1 else ''}, {' to '.join(dict.fromkeys((dates[0], dates[-1])))}"
    )


def _established(comparison: Comparison | None) -> list[Html]:
    if comparison is None:
        return []
    reference = comparison.candidates[0].label
    first = set(sentences_on([d for d in comparison.differences if d.reference == reference], comparison.confidence))
    about = [sentence for sentence in comparison.sentences if sentence in first]
    others = [sentence for sentence in comparison.sentences if sentence not in first]
    open_words = "n.s.: not significant, which does not mean that there is no difference."
    parts = [conclusion_table(comparison), paragraph(open_words, "quiet")]
    for summary, sentences in ((f"against {reference}", about), ("between the others", others)):
        if sentences:
            long = len(comparison.sentences) > _MOST_SENTENCES
            words = bullets(sentences)
            parts.append(details(f"In words, {summary} ({len(sentences)})", words, long=True) if long else words)
    return [*parts, candidate_table(comparison)]


def _pictures(
    report: Mapping[str, Any] | None, records: Sequence[Record], labels: Sequence[str], comparison: Comparison | None
) -> list[Html]:
    drawn: list[Picture] = quality_pictures(comparison_panels(comparison) if comparison else record_panels(records))
    drawn += difference_pictures(comparison) if comparison else []
    drawn += kl_pictures(divergences(records, labels))
    drawn += layer_pictures(report) if report else []
    return [pictures((Html(inline_svg(one)), one.caption) for one in drawn)] if drawn else []


def _origins(report: Mapping[str, Any] | None, records: Sequence[Record], labels: Sequence[str]) -> list[Html]:
    own = [model_certificate(report)] if report else []
    return [*own, *(certificate(record, f"Evaluation: {label}") for record, label in zip(records, labels, strict=True))]


def _notes(report: Mapping[str, Any] | None, comparison: Comparison | None) -> list[Html]:
    notes = [*(report.get("warnings", ()) if report else ()), *(comparison.notes if comparison else ())]
    return [bullets(notes)] if notes else []
