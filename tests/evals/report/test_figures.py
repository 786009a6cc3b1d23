"""Pictures: every figure is there as a mark, names are text and stay harmless, the same input gives the same bytes."""

from __future__ import annotations

import dataclasses
import math
import re
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from calib.errors import OutputError, UsageError
from evals.comparison.types import Candidate, Comparison, Difference, Score
from evals.report.charts.differences import difference_pictures, divergences, kl_pictures
from evals.report.charts.figure import Picture, clean, figure_bytes, inline_svg, plain_number, shorten
from evals.report.charts.layers import layer_grid, layer_pictures
from evals.report.charts.quality import comparison_panels, quality_pictures, record_panels
from evals.report.figures import comparison_picture
from evals.report.labels import label_records, looks, with_bases
from evals.report.theme import DARK, LIGHT, PLACEHOLDERS, RAMP, css_variables
from tests.support.record_factory import made_divergence, made_record, made_text, recipe

SVG = "{http://www.w3.org/2000/svg}"
NASTY = '<script>alert("1")</script> & $x^2$ --> \N{CJK UNIFIED IDEOGRAPH-4E2D}\x00'


def made_comparison(
    labels: tuple[str, ...] = ("full", "rtn 3 bits", "gptq 3 bits"), *, kl: bool = True, conclusion: str = "worse"
) -> Comparison:
    """A reference and others, on one text and two tasks."""
    candidates = tuple(
        Candidate(label, (label,), (None,), 1e8 - 1e7 * i, None if i == 0 else 3.25) for i, label in enumerate(labels)
    )
    scores = [Score(label, "words", "ln ppl", 3.0 + i, 0.1, None, True) for i, label in enumerate(labels)]
    if kl:
        scores += [
            Score(label, "words", "kl", 0.01 * 10.0**i, 0.001, None, True) for i, label in enumerate(labels) if i > 0
        ]
    differences = [
        made_difference(labels[0], label, target, measure, 0.1 * i, conclusion)
        for i, label in enumerate(labels)
        if i > 0
        for target, measure in (("words", "ln ppl"), ("quiz", "acc"), ("exam", "acc_norm"))
    ]
    sentences = (f"{labels[1]} is worse than {labels[0]}.",)
    return Comparison(candidates, tuple(scores), tuple(differences), sentences, ("a note",), 0.95)


def made_difference(
    reference: str, candidate: str, target: str, measure: str, value: float, conclusion: str
) -> Difference:
    return Difference(
        reference,
        candidate,
        target,
        measure,
        headline=True,
        difference=value,
        standard_error=0.02,
        low=value - 0.04,
        high=value + 0.04,
        p_value=0.001,
        p_adjusted=0.002,
        items=100,
        blocks=100,
        within_seed=0.02,
        between_seeds=None,
        seeds=1,
        flips=None,
        detectable=0.05,
        higher_is_better=measure != "ln ppl",
        conclusion=conclusion,
    )


def made_report(blocks: int = 2, linears: tuple[str, ...] = ("self_attn.q_proj", "mlp.down_proj")) -> dict[str, Any]:
    names = [f"model.layers.{block}.{linear}" for block in range(blocks) for linear in linears]
    layers = [
        {"name": name, "bits_per_weight": 3.25 + (i % 2), "loss": 10.0 ** -(1 + i % 4)} for i, name in enumerate(names)
    ]
    return {"layers": layers}


def texts(svg: str) -> list[str]:
    return ["".join(element.itertext()) for element in ET.fromstring(svg).iter(f"{SVG}text")]


def all_pictures(label: str = "gptq 3 bits") -> list[Picture]:
    comparison = made_comparison((f"{label} (base)", label, "rtn 2 bits"))
    rows = {f"words of {label}": [(label, made_divergence("base"))]}
    return [
        *quality_pictures(comparison_panels(comparison)),
        *difference_pictures(comparison),
        *kl_pictures(rows),
        *layer_pictures(made_report()),
    ]


def test_every_kind_is_drawn_once() -> None:
    keys = [picture.key for picture in all_pictures()]
    assert keys == ["quality-0", "differences-0", "differences-1", "kl-0", "layers-bits", "layers-loss"]


@pytest.mark.parametrize("picture", all_pictures(NASTY), ids=lambda picture: picture.key)
def test_an_inline_svg_is_well_formed_harmless_and_of_the_page(picture: Picture) -> None:
    svg = inline_svg(picture)
    root = ET.fromstring(svg)
    assert root.get("role") == "img"
    title = root.find(f"{SVG}title")
    assert title is not None
    assert title.get("id") in str(root.get("aria-labelledby"))
    assert title.text == clean(picture.title)
    assert "<script" not in svg
    assert "http" not in svg.replace('xmlns="http://www.w3.org/2000/svg"', "")
    ids = [element.get("id", picture.key) for element in root.iter()]
    assert all(name.startswith(picture.key) for name in ids)
    assert len({name for name in ids if name != picture.key}) == sum(name != picture.key for name in ids)
    assert set(re.findall(r'(?:url\(|href=")#([^)"]*)', svg)) <= set(ids)
    assert "url(" not in re.sub(r"url\(#", "", svg)
    assert not re.search(r"#[0-9a-f]{6}\b", svg)  # every colour is the page's
    assert set(re.findall(r"var\(--(\w+)\)", svg)) <= set(LIGHT)
    assert "var(--ink)" in svg
    assert "var(" not in re.sub(r'style="[^"]*"', "", svg)  # attributes take no variables


def test_the_same_picture_has_the_same_bytes_and_leaves_the_settings_alone() -> None:
    before = dict(matplotlib.rcParams)
    with matplotlib.rc_context({"font.size": 33.0, "svg.fonttype": "path"}):
        first = [inline_svg(picture) for picture in all_pictures()]
    assert first == [inline_svg(picture) for picture in all_pictures()]
    assert dict(matplotlib.rcParams) == before


def test_names_are_text_as_they_are() -> None:
    (picture,) = quality_pictures(comparison_panels(made_comparison(("full", "a $x^2$ & <b>", "rtn"))))
    shown = " ".join(texts(inline_svg(picture)))
    assert "a $x^2$ & <b>" in shown
    assert "Quality against size, words" in shown
    assert "weights, MB" in shown
    assert "KL(base || model), nats per token" in shown


def test_quality_takes_kl_then_differences_then_perplexity() -> None:
    (panel,) = comparison_panels(made_comparison())
    assert (panel.target, panel.measure) == ("words", "kl")
    assert [point.value for point in panel.points] == [None, 0.1, pytest.approx(1.0)]
    assert panel.points[1].low == pytest.approx(0.1 - 1.96 * 0.001)
    (panel,) = comparison_panels(made_comparison(kl=False))
    assert panel.measure == "difference"
    assert [(p.value, p.low) for p in panel.points] == [(0.0, None), (0.1, pytest.approx(0.06)), (0.2, 0.16)]
    bare = dataclasses.replace(made_comparison(kl=False), differences=())
    (panel,) = comparison_panels(bare)
    assert (panel.measure, [p.value for p in panel.points]) == ("ln ppl", [3.0, 4.0, 5.0])
    assert [p.reference for p in panel.points] == [True, False, False]


def test_errors_of_items_and_seeds_are_added_in_squares() -> None:
    found = made_comparison(("full", "gptq 3 bits"))
    pooled = dataclasses.replace(found.candidates[1], sources=("a", "b", "c", "d"))
    scores = [
        dataclasses.replace(s, standard_error=0.003, between_seeds=0.008) if s.measure == "kl" else s
        for s in found.scores
    ]
    changed = dataclasses.replace(found, candidates=(found.candidates[0], pooled), scores=tuple(scores))
    (panel,) = comparison_panels(changed)
    point = panel.points[1]
    assert point.value is not None
    assert point.high == pytest.approx(point.value + 1.96 * math.sqrt(0.003**2 + 0.008**2 / 4))


def test_quality_from_records_marks_the_base() -> None:
    base = made_record("full", [made_text([20.0, 30.0])], fingerprint="of full", bytes=9000)
    text = made_text([22.0, 33.0], divergence=made_divergence("of full"))
    other = made_record("OUT", [text], base=base, bytes=3000, **recipe("gptq"))
    everything = with_bases([other])
    assert [record.model.source for record in everything] == ["full", "OUT"]
    assert with_bases([base, other]) == [base, other]
    (panel,) = record_panels([other])
    assert [(p.label, p.bytes, p.value, p.reference) for p in panel.points] == [
        ("full", 9000, None, True),
        ("gptq int3 sym g64", 3000, 0.125, False),
    ]
    alone = made_record("OUT", [made_text([22.0, 33.0])], bytes=3000)
    (panel,) = record_panels([base, alone])
    assert (panel.measure, [p.value for p in panel.points]) == ("ln ppl", [pytest.approx(2.5), pytest.approx(2.75)])
    assert quality_pictures(record_panels([alone])) == []  # one point is no picture


def test_texts_of_different_items_are_not_in_one_picture() -> None:
    records = [made_record(name, [made_text([20.0, 30.0], first=first)]) for name, first in (("a", 0), ("b", 5))]
    assert [len(panel.points) for panel in record_panels(records)] == [1, 1]


def test_labels_are_unique_and_name_seeds() -> None:
    text = [made_text([1.0, 2.0])]
    records = [made_record(f"out{seed}", text, **recipe(seed=seed)) for seed in (0, 1)]
    records += [made_record("dir/full", text), made_record("other/full", text)]
    labels = label_records(records)
    assert labels[:2] == ["coreq int3 sym g64, seed 0", "coreq int3 sym g64, seed 1"]
    assert len(set(labels)) == 4


def test_methods_share_a_colour_and_no_two_look_the_same() -> None:
    found = looks(["full", "rtn 3 bits", "rtn 4 bits", "gptq 3 bits", "plain name"])
    assert found["full"] == ("ink", "D")
    assert found["rtn 3 bits"][0] == found["rtn 4 bits"][0] != found["gptq 3 bits"][0]
    assert len(set(found.values())) == 5


@pytest.mark.parametrize(("conclusion", "words"), [("worse", 2), ("not significant", 0)])
def test_a_difference_has_a_mark_and_says_what_is_significant(conclusion: str, words: int) -> None:
    picture = difference_pictures(made_comparison(conclusion=conclusion))[0]
    svg = inline_svg(picture)
    assert texts(svg).count("worse") == words
    assert {"words", "ln ppl", "difference, ln ppl, nats per token"} <= set(texts(svg))
    assert len(re.findall(r"<use [^>]*fill: var\(--(?:series\d|surface)\)", svg)) == 4  # two, and two in the legend
    filled = "var(--surface)" not in svg
    assert filled == (conclusion == "worse")
    assert f"({conclusion})" in picture.description


def test_points_and_nats_are_apart_and_shares_in_percent() -> None:
    nats, points = difference_pictures(made_comparison())
    assert "nats" in nats.title
    assert "percentage points" in points.title
    assert "rtn 3 bits on quiz: +10" in points.description
    assert "to the left" in nats.caption
    assert "to the right" in points.caption


def test_long_lists_of_differences_become_several_pictures() -> None:
    found = made_comparison()
    many = [made_difference("full", "rtn 3 bits", f"task{i}", "acc", 0.01, "worse") for i in range(100)]
    pictures = difference_pictures(dataclasses.replace(found, differences=tuple(many)))
    assert len(pictures) == 3
    assert sum(picture.description.count("rtn 3 bits on") for picture in pictures) == 100


def test_differences_of_other_pairs_and_side_measures_are_not_drawn() -> None:
    found = made_comparison()
    other = made_difference("rtn 3 bits", "gptq 3 bits", "quiz", "acc", 0.5, "better")
    side = dataclasses.replace(made_difference("full", "rtn 3 bits", "quiz", "p_gold", 0.5, "better"), headline=False)
    assert difference_pictures(dataclasses.replace(found, differences=(other, side))) == []


def test_kl_has_a_mark_for_every_figure_above_zero() -> None:
    full = dataclasses.replace(made_divergence("b"), kl_median=0.01, kl_mean=0.02, kl_p99=0.5, kl_p999=1.0, kl_max=3.0)
    part = dataclasses.replace(full, kl_median=0.0)
    (picture,) = kl_pictures({"words": [("a", full), ("b", part)]})
    svg = inline_svg(picture)
    legend = 5
    assert svg.count("<use ") - svg.count("var(--muted); stroke: var(--muted)") == 9 + legend
    assert "nil" in picture.caption
    assert {"median", "99.9 %", "max"} <= set(texts(svg))
    nothing = dataclasses.replace(full, kl_median=0.0, kl_mean=0.0, kl_p99=0.0, kl_p999=0.0, kl_max=0.0)
    assert kl_pictures({"words": [("a", nothing)]}) == []


def test_divergences_are_by_text_and_convention() -> None:
    found = made_divergence("b")
    results = [made_text([1.0, 2.0], divergence=found), made_text([1.0, 2.0], convention="sliding", divergence=found)]
    by_text = divergences([made_record("m", results)], ["m"])
    assert {name: len(rows) for name, rows in by_text.items()} == {"words": 1, "words, sliding": 1}


def test_a_grid_has_every_linear_in_its_place_and_the_mean_of_experts() -> None:
    layers = [{"name": f"model.layers.{b}.mlp.experts.{e}.up", "loss": b + e} for b in (0, 2) for e in range(4)]
    layers += [{"name": "model.layers.0.self_attn.q", "loss": 7.0}, {"name": "lm_head", "loss": 1.0}]
    layers += [{"name": "model.layers.2.self_attn.q", "loss": None}]
    grid = layer_grid(layers, "loss")
    assert (grid.rows, grid.blocks, grid.experts, grid.outside) == (("up", "q"), (0, 2), 4, ("lm_head",))
    np.testing.assert_equal(grid.values, [[1.5, 3.5], [7.0, np.nan]])


def test_short_names_stay_apart() -> None:
    names = ("self_attn.proj", "mlp.proj", "mlp.shared.up", "mlp.experts.0.up", "down")
    grid = layer_grid([{"name": f"h.3.{name}", "loss": 1.0} for name in names], "loss")
    assert grid.rows == ("self_attn.proj", "mlp.proj", "shared.up", "experts.up", "down")


@pytest.mark.parametrize(("blocks", "numbers"), [(2, True), (80, False)])
def test_a_map_has_a_cell_for_every_linear(blocks: int, numbers: bool) -> None:
    linears = tuple(f"mlp.linear{i}" for i in range(7))
    report = made_report(blocks, linears)
    report["layers"] = [layer for layer in report["layers"] if layer["name"] != "model.layers.0.mlp.linear3"]
    bits, loss = (inline_svg(picture) for picture in layer_pictures(report))
    for svg in (bits, loss):
        shown = texts(svg)
        assert {name.removeprefix("mlp.") for name in linears} <= set(shown)
        assert "block" in shown
        assert len(re.findall(r"<path[^>]*fill: var\(--ramp\d+\)", svg)) >= 7 * blocks - 1
        assert "<pattern" in svg  # the missing cell is hatched
        assert len(svg) < 200_000
    assert ("3.25" in texts(bits)) == numbers
    assert "bits per weight, scales included" in texts(bits)
    assert "squared, relative to the output, log scale" in texts(loss)


def test_without_measured_errors_only_bits_are_drawn() -> None:
    report = made_report()
    for layer in report["layers"]:
        layer["loss"] = None
    assert [picture.key for picture in layer_pictures(report)] == ["layers-bits"]
    assert layer_pictures({"layers": []}) == []


@settings(max_examples=12, deadline=None)
@given(
    st.lists(st.tuples(st.floats(2, 9), st.none() | st.floats(0, 1e30, allow_subnormal=False)), min_size=1, max_size=4)
)
def test_any_figures_can_be_mapped(figures: list[tuple[float, float | None]]) -> None:
    layers = [
        {"name": f"h.{i}.linear", "bits_per_weight": bits, "loss": loss} for i, (bits, loss) in enumerate(figures)
    ]
    for picture in layer_pictures({"layers": layers}):
        cells = re.findall(r"<path[^>]*fill: var\(--ramp\d+\)", inline_svg(picture))
        field = "bits_per_weight" if picture.key == "layers-bits" else "loss"
        known = sum(layer[field] is not None for layer in layers)
        assert len(cells) == known + RAMP  # and the scale


@pytest.mark.parametrize(
    ("suffix", "start"),
    [(".svg", b"<?xml"), (".png", b"\x89PNG\r\n"), (".html", b"<!doctype html>"), (".SVG", b"<?xml")],
)
def test_a_comparison_goes_into_a_file(tmp_path: Path, suffix: str, start: bytes) -> None:
    path = tmp_path / f"picture{suffix}"
    comparison_picture(made_comparison(), path)
    content = path.read_bytes()
    assert content.startswith(start)
    assert len(content) < 400_000
    assert list(tmp_path.iterdir()) == [path]
    comparison_picture(made_comparison(), path)
    assert path.read_bytes() == content


def test_an_svg_file_has_colours_of_its_own(tmp_path: Path) -> None:
    comparison_picture(made_comparison(), tmp_path / "a.svg")
    svg = (tmp_path / "a.svg").read_text()
    ET.fromstring(svg)
    assert "var(" not in svg
    assert LIGHT["surface"] in svg
    assert LIGHT["ink"] in svg
    assert not set(PLACEHOLDERS.values()) & set(re.findall(r"#[0-9a-f]{6}", svg))


def test_what_cannot_be_written_is_said(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"picture\.jpg.*\.svg, \.png, \.html"):
        comparison_picture(made_comparison(), tmp_path / "picture.jpg")
    with pytest.raises(OutputError, match="cannot write"):
        comparison_picture(made_comparison(), tmp_path / "nowhere" / "picture.svg")
    empty = dataclasses.replace(made_comparison(), scores=(), differences=())
    with pytest.raises(UsageError, match="nothing to draw"):
        comparison_picture(empty, tmp_path / "picture.svg")


def test_both_themes_have_every_colour_and_enough_contrast() -> None:
    assert set(LIGHT) == set(DARK) == set(PLACEHOLDERS)
    assert len(set(PLACEHOLDERS.values())) == len(PLACEHOLDERS)
    assert "--ink: #1b1f24;" in css_variables(LIGHT)
    for palette in (LIGHT, DARK):
        for name, least in [("ink", 7.0), ("muted", 4.5), *((f"series{i}", 3.0) for i in range(8))]:
            assert contrast(palette[name], palette["surface"]) >= least, name


def contrast(one: str, other: str) -> float:
    """Contrast ratio of WCAG 2."""

    def luminance(colour: str) -> float:
        parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    high, low = sorted((luminance(one), luminance(other)), reverse=True)
    return (high + 0.05) / (low + 0.05)


@given(st.text(), st.integers(3, 50))
def test_shortened_text_is_short_and_printable(text: str, most: int) -> None:
    found = shorten(text, most)
    assert len(found) <= most
    if len(text) <= most:
        assert found == clean(text)
    ET.fromstring(f"<a>{found.replace('&', '').replace('<', '').replace(']]>', '')}</a>")


def test_ticks_are_plain_numbers() -> None:
    assert [plain_number(value) for value in (0.0, 0.002, 50.0, 1e-7, 2e7)] == ["0", "0.002", "50", "1e-07", "2e+07"]


def test_figure_files_hold_all_pictures() -> None:
    pictures = all_pictures()[:2]
    svg = figure_bytes(pictures, "svg").decode()
    assert {"Quality against size, words", "Difference from gptq 3 bits (base)"} <= set(texts(svg))
