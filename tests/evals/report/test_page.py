"""The page: whole, well-formed, self-contained, harmless, and the same each time."""

from __future__ import annotations

import dataclasses
import re
from html.parser import HTMLParser
from typing import Any

import pytest

from evals.comparison.compare import compare
from evals.record import Record
from evals.report.html import bullets, data_list, details, marked, paragraph, table
from evals.report.page import GENERATOR, report_page
from ptq.report import Report
from tests.support.record_factory import made_divergence, made_record, made_task, made_text, recipe

NASTY = '<script>alert("1")</script>&"\''
VOID = {"meta", "br"}


class Reader(HTMLParser):
    """Collects tags, attributes and text, and checks that elements are closed in order."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str]] = []
        self.text: list[str] = []
        self.stack: list[str] = []
        self.feed(page)
        self.close()
        assert self.stack == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(name, value or "") for name, value in attrs]
        if tag not in VOID:
            self.stack.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(name, value or "") for name, value in attrs]

    def handle_endtag(self, tag: str) -> None:
        assert self.stack.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.append(data)


@pytest.fixture
def report(small_report: Report) -> dict[str, Any]:
    return small_report.to_dict()


def made_records(name: str = "full") -> list[Record]:
    """A base and two models on a text by two conventions and two tasks."""
    base = made_record(name, texts_of(0.0) + tasks_of([1, 1, 0, 1] * 5), fingerprint="of the base", bytes=9000)
    others = [
        made_record(f"{name}-{method}", texts_of(shift) + tasks_of([1, 0, 0, 1] * 5), bytes=3000, **recipe(method))
        for method, shift in (("rtn", 2.0), ("gptq", 1.0))
    ]
    return [base, *others]


def texts_of(shift: float) -> list[Any]:
    kl = [shift + 0.01 * i for i in range(8)]
    divergence = made_divergence("of the base") if shift else None
    columns = {"kl": kl, "same_top": [8.0] * 8} if shift else {}
    nll = [20.0 + i + shift * (1 + 0.1 * i) for i in range(8)]
    first = made_text(nll, columns=columns | {"bytes": [40] * 8}, divergence=divergence)
    second = made_text(nll, convention="documents", settings={"max_length": 64}, columns={"bytes": [40] * 8})
    return [first, dataclasses.replace(second, words=60)]


def tasks_of(right: list[int]) -> list[Any]:
    return [made_task(right, name="quiz"), made_task(right, name="exam", settings={"fewshot": 3})]


def full_page(report: dict[str, Any] | None, name: str = "full", title: str = "Title") -> str:
    records = made_records(name)
    return report_page(report, records, compare(records), title=title)


def test_everything_is_on_the_page(report: dict[str, Any]) -> None:
    page = full_page(report)
    words = " ".join(Reader(page).text)
    headings = (
        "Significant differences",
        "Pictures",
        "Differences",
        "Texts",
        "Tasks",
        "Layers",
        "Where the figures come from",
    )
    for expected in (
        *headings,
        "bits per weight",
        "3.250",
        "MODEL (LlamaForCausalLM)",
        "documents: max_length 64",
        "segments: seqlen 11",
        "model.layers.0.self_attn.q_proj",
        "model.embed_tokens",
        "embedding",
        "one block is small",
        "exam, 3-shot",
        "33.3",
        "of the base",
        "fingerprint",
        "environment.dtype",
        "rtn int3 sym g64",
        "is worse than full",
    ):
        assert expected in words, expected


def test_the_same_input_gives_the_same_bytes(report: dict[str, Any]) -> None:
    assert full_page(report) == full_page(report)


def test_nothing_is_loaded_and_nothing_runs(report: dict[str, Any]) -> None:
    page = full_page(report, NASTY, NASTY)
    found = Reader(page)
    assert not {"script", "link", "img", "iframe", "object", "base", "form", "a"} & set(found.tags)
    assert "alert" in page
    for name, value in found.attributes:
        assert not name.startswith("on"), name
        assert name in ("xmlns",) or "http" not in value.replace("http-equiv", ""), (name, value)
        assert name != "src"
        assert name != "href" or value.startswith("#")
    assert "@import" not in page
    assert not re.search(r"url\((?!#)", page)
    assert "default-src 'none'" in page


def test_ids_on_a_page_are_unique_and_references_resolve(report: dict[str, Any]) -> None:
    found = Reader(full_page(report))
    ids = [value for name, value in found.attributes if name == "id"]
    assert len(ids) == len(set(ids))
    targets = {value[1:] for name, value in found.attributes if name == "href"}
    targets |= {one for name, value in found.attributes if name == "aria-labelledby" for one in value.split()}
    assert targets <= set(ids)


def test_names_from_files_stay_text(report: dict[str, Any]) -> None:
    report["model"]["source"] = report["layers"][0]["name"] = report["warnings"][0] = NASTY
    report["kept"][0]["reason"] = report["recipe"]["method"] = NASTY
    words = Reader(full_page(report, NASTY, NASTY)).text
    assert sum(NASTY in text for text in words) >= 6


def test_light_dark_and_paper(report: dict[str, Any]) -> None:
    page = full_page(report)
    style = re.search(r"<style>(.*?)</style>", page, re.DOTALL)
    assert style is not None
    assert style[1].count("{") == style[1].count("}")
    assert "@media screen and (prefers-color-scheme: dark)" in style[1]
    assert "@media print" in style[1]
    defined = set(re.findall(r"(--\w+):", style[1]))
    assert set(re.findall(r"var\((--\w+)\)", page)) <= defined


def test_figures_of_its_own_record_stand_at_the_top(report: dict[str, Any]) -> None:
    records = made_records()
    own = dataclasses.replace(
        records[2].model, recipe=report["recipe"], calibration={"fingerprint": report["calibration"].get("fingerprint")}
    )
    with_own = [*records[:2], dataclasses.replace(records[2], model=own)]

    def head(page: str) -> str:
        return page.split("<section>")[0]

    assert "KL to the base, words, segments" in head(report_page(report, with_own, None, title="t"))
    assert "KL to the base" not in head(report_page(report, records, None, title="t"))


def test_a_report_alone_and_records_alone(report: dict[str, Any]) -> None:
    alone = " ".join(Reader(report_page(report, [], None, title="t")).text)
    assert "Layers" in alone
    assert "Texts" not in alone
    assert "Significant differences" not in alone
    records = " ".join(Reader(report_page(None, made_records()[:1], None, title="t")).text)
    assert "Layers" not in records
    assert "1 evaluation, 2026-01-01" in records


def test_a_base_inside_a_record_is_shown() -> None:
    base, other, _ = made_records()
    inside = dataclasses.replace(other, base=base)
    words = " ".join(Reader(report_page(None, [inside], compare([inside]), title="t")).text)
    assert "rtn int3 sym g64 is worse than full" in words


def test_few_sentences_are_open_and_many_are_folded() -> None:
    base, other, _ = made_records()
    found = compare([base, other])
    few = dataclasses.replace(found, sentences=found.sentences[:2])
    many = dataclasses.replace(found, sentences=tuple(f"sentence {i}" for i in range(30)))
    assert "In words" not in report_page(None, [], few, title="t")
    folded = report_page(None, [], many, title="t")
    assert "In words, between the others (30)" in folded
    assert "sentence 29" in folded


def test_notes_are_shown_first() -> None:
    page = report_page(None, made_records(), None, title="t", notes=["not comparable: <because>"])
    assert '<p class="warning">not comparable: &lt;because&gt;</p>' in page.split("<section>")[0]


def test_harness_results_and_notes_of_records() -> None:
    harness = {"results": {"gsm8k": {"exact_match,strict": 0.25, "alias": "gsm8k"}}, "settings": {"limit": 8}}
    record = dataclasses.replace(made_records()[0], harness=harness, notes=("halved the batch",))
    words = Reader(report_page(None, [record], None, title="t")).text
    assert {"gsm8k", "exact_match,strict", "0.25", "harness.settings.limit", "halved the batch"} <= set(words)


def test_a_large_model_and_many_records_stay_small(report: dict[str, Any]) -> None:
    layer = report["layers"][0]
    names = [f"model.layers.{b}.mlp.linear_{i}" for b in range(80) for i in range(7)]
    report["layers"] = [dict(layer, name=name, loss=1e-3 * (1 + i % 50)) for i, name in enumerate(names)]
    records = made_records()
    records += [made_record(f"m{i}", texts_of(3.0 + i) + tasks_of([1, 0] * 10), **recipe(f"m{i}")) for i in range(3)]
    page = report_page(report, records, compare(records), title="t")
    assert len(page.encode()) < 2_000_000
    assert page.count("model.layers.79.mlp.linear_6") == 1


def test_it_says_who_made_it() -> None:
    page = report_page(None, made_records()[:1], None, title="t")
    assert f'<meta name="generator" content="{GENERATOR}">' in page[:1024]
    assert page.startswith("<!doctype html>\n")


def test_markup_escapes_all_but_markup() -> None:
    inner = marked("<i>", '"x')
    assert inner == '<span class="&#34;x">&lt;i&gt;</span>'
    assert paragraph("a<\x00", "quiet") == '<p class="quiet">a&lt;\ufffd</p>'
    assert bullets([inner, "<b>"]) == f"<ul><li>{inner}</li><li>&lt;b&gt;</li></ul>"
    assert details("a", "b<", inner, long=True) == (
        f'<details class="long"><summary>a</summary><div class="folded">b&lt;{inner}</div></details>'
    )


def test_tables_name_rows_and_mark_words() -> None:
    found = table("Cap<", ("a", "b"), [("<x>", None), ("y", 3)])
    assert '<p class="caption">Cap&lt;</p>' in found
    assert '<th scope="row" class="w">&lt;x&gt;</th><td>\N{EN DASH}</td>' in found
    assert found.count("<tr>") == 3


def test_lists_of_data_are_flat_and_leave_out_what_is_empty() -> None:
    found = data_list({"a": {"b": 12345, "c": None}, "d": [True, 0.5], "e": "", "zero": 0})
    pairs = re.findall(r"<dt>(.*?)</dt><dd>(.*?)</dd>", found)
    assert pairs == [("a.b", "12,345"), ("d", "yes, 0.5"), ("zero", "0")]
