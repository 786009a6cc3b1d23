"""Pages of WikiText as lm-evaluation-harness has them, from the raw file and from the literature's form of it."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from calib.errors import UsageError
from evals.texts.documents import RULES, detokenize_wikitext, split_documents
from evals.texts.windows import make_plan

WORDS = (
    "a",
    "the",
    "@-@",
    "@,@",
    ",",
    ".",
    ";",
    ":",
    "(",
    ")",
    '"',
    "'",
    "'s",
    "N",
    "°",
    "5",
    "[",
    "]",
    "é",
    "東京",
    "=",
)


@pytest.fixture(scope="module")
def harness() -> ModuleType:
    """The harness's functions for WikiText; its packages are not imported for them."""
    package = importlib.util.find_spec("lm_eval")
    if package is None or not package.submodule_search_locations:
        pytest.skip("the extra lm-eval is not installed")
    path = Path(package.submodule_search_locations[0]) / "tasks" / "wikitext" / "preprocess_wikitext.py"
    spec = importlib.util.spec_from_file_location("preprocess_wikitext", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def harness_pages(raw: str) -> list[str]:
    """How the data set of documents is made from the raw file: lines up to the next title, joined again."""
    pages: list[list[str]] = [[]]
    for line in raw.split("\n"):
        bare = line.replace("= = =", "===").replace("= =", "==").strip()
        if bare[:2] == "= " and bare[-2:] == " =":
            pages.append([])
        pages[-1].append(line)
    texts = ["\n".join(lines) for lines in pages]
    return [text for text in texts if text.strip()]


def rows_of(raw: str) -> list[str]:
    """The rows of the data set of lines: a row per line, with its line feed; blank lines are empty rows."""
    return [line + "\n" if line.strip() else "" for line in raw.split("\n")[:-1]]


def joined(raw: str) -> str:
    """The literature's form."""
    return "\n\n".join(rows_of(raw))


def page_lines(words: list[str]) -> st.SearchStrategy[list[str]]:
    line = st.lists(st.sampled_from(words), min_size=1, max_size=8).map(" ".join)
    body = st.one_of(
        line.map(lambda text: [f" {text} "]),
        line.map(lambda text: [f" {text} ", f" {text} {text} "]),  # paragraphs without a blank line between
        line.map(lambda text: [f" = = {text} = = "]),
        line.map(lambda text: [f" = = = {text} = = = "]),
    )
    blank = st.integers(1, 2).map(lambda count: [" "] * count)
    title = line.map(lambda text: [f" = {text} = "])
    sections = st.lists(st.tuples(body, blank), max_size=4)
    return st.tuples(title, blank, sections).map(
        lambda found: [*found[0], *found[1], *(text for part in found[2] for lines in part for text in lines)]
    )


raw_files = st.lists(page_lines(list(WORDS)), min_size=2, max_size=4).map(
    lambda pages: "\n".join([" ", *(line for page in pages for line in page)]) + "\n"
)
PLAIN = (
    " \n = Robert Boulter = \n \n Robert Boulter is an English film @-@ actor . \n \n"
    " In 2006 , Boulter starred . \n Twice . \n \n = = Career = = \n \n x = y \n \n"
    " = Du Fu = \n \n Du Fu ( Chinese : 杜甫 ) was a poet . \n \n"
)


def test_the_pages_of_a_raw_file() -> None:
    found, rule = split_documents(PLAIN)
    assert rule == "wikitext"
    assert [document.original for document in found] == [
        " = Robert Boulter = \n \n Robert Boulter is an English film @-@ actor . \n \n"
        " In 2006 , Boulter starred . \n Twice . \n \n = = Career = = \n \n x = y \n ",
        " = Du Fu = \n \n Du Fu ( Chinese : 杜甫 ) was a poet . \n \n",
    ]
    assert found[1].shown == " = Du Fu =\n\nDu Fu (Chinese: 杜甫) was a poet.\n\n"


@given(raw_files)
@example(PLAIN)
@example(" \n = A = \n \n x \n \n = B = C = \n \n y \n \n = = x = \n \n = z = = \n")
def test_pages_are_those_of_the_harness(raw: str) -> None:
    assert [document.original for document in split_documents(raw, "wikitext")[0]] == harness_pages(raw)


@given(raw_files)
@example(PLAIN)
def test_joined_rows_are_put_back_together(raw: str) -> None:
    assert split_documents(joined(raw), "wikitext") == split_documents(raw, "wikitext")


@given(raw_files)
@example(PLAIN)
def test_line_ends_of_windows_change_nothing(raw: str) -> None:
    expected = split_documents(raw, "wikitext")
    assert split_documents(raw.replace("\n", "\r\n"), "wikitext") == expected
    assert split_documents(joined(raw).replace("\n", "\r\n"), "wikitext") == expected


def test_what_stands_before_the_first_title_is_a_page() -> None:
    raw = " Some words . \n \n = T = \n \n x \n"
    assert [document.original for document in split_documents(raw, "wikitext")[0]] == harness_pages(raw)
    assert len(harness_pages(raw)) == 2
    assert [document.original for document in split_documents("no title\n", "wikitext")[0]] == ["no title\n"]


@given(st.lists(st.sampled_from([*(f" {word} " for word in WORDS), *WORDS, " ", "\n", " \n", "\t"])).map("".join))
@example("( a ) [ b ] { c } \" d \" ' e '")
@example("boys ' toys and the dog 's = = = = x = = = y = = z ° N")
def test_the_detokenizer_is_that_of_the_harness(harness: ModuleType, text: str) -> None:
    assert detokenize_wikitext(text) == harness.wikitext_detokenizer({"page": text})


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("film @-@ maker , 1 @,@ 000 at 3 @.@ 5", "film-maker, 1,000 at 3.5"),
        ("a : b ; c . d ! e ? f , g", "a: b; c. d! e? f, g"),
        ("f ( x ) [ y ] { z } ' w '", "f (x) [y] {z} 'w'"),
        ('say " hi there " now', 'say "hi there" now'),
        ("the boys ' dog", "the boys' dog"),
        ("the dog 's bone", "the dog's bone"),
        (" = = Early life = = \n", " == Early life ==\n"),
        (" = = = Deep = = = \n", " === Deep ===\n"),
        ("20 ° C , N = 5 , N .", "20°C, 1 = 5, 1 ."),
        ("with N of them \n next", "with 1 of them\nnext"),
        ("Dickens ' novel", "Dickens' novel"),
    ],
)
def test_detokenized(before: str, after: str) -> None:
    assert detokenize_wikitext(before) == after


def test_words_and_bytes_are_counted_before_detokenizing(harness: ModuleType, tiny_tokenizer: Any) -> None:
    plan = make_plan(joined(PLAIN), tiny_tokenizer, None, convention="documents")
    found = [harness.process_results({"page": page}, (0.0,)) for page in harness_pages(PLAIN)]
    assert plan.words == tuple(scores["word_perplexity"][1] for scores in found)
    assert plan.bytes == tuple(scores["byte_perplexity"][1] for scores in found)


def test_auto_wants_two_titles() -> None:
    assert split_documents("a = b\n = One = \nno more\n")[1] == "whole"
    assert split_documents(" = One = \n x \n = Two = \n y \n")[1] == "wikitext"
    assert split_documents(" = = Section = = \n x \n = = Section = = \n y \n")[1] == "whole"
    assert split_documents("= One =\n= Two =\n")[1] == "whole"  # Markdown-like underlines, not WikiText


def test_other_rules() -> None:
    text = "one\n\ntwo\nthree\n   \n\nfour\n"

    def parts(rule: str) -> list[str]:
        found, used = split_documents(text, rule)
        assert used == rule
        assert all(document.original == document.shown for document in found)
        return [document.original for document in found]

    assert parts("whole") == [text]
    assert parts("lines") == ["one", "two", "three", "four"]
    assert parts("blank-lines") == ["one", "two\nthree", "four\n"]


def test_an_unknown_rule() -> None:
    with pytest.raises(UsageError, match=r"unknown rule for documents 'wikitex'\. Did you mean 'wikitext'\?") as error:
        split_documents("x", "wikitex")
    assert all(rule in str(error.value) for rule in RULES)
