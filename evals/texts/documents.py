"""One text -> its documents, as they are shown to a model and as their words and bytes are counted.

WikiText is the case that matters: lm-evaluation-harness scores it page by page, with the spaces that its makers put
around punctuation taken back out, and counts the words and bytes of the page as it was.
"""

from __future__ import annotations

import dataclasses
import re

from calib.errors import unknown_name

__all__ = ["RULES", "Document", "detokenize_wikitext", "split_documents"]

RULES = ("auto", "wikitext", "lines", "blank-lines", "whole")
_TITLE = re.compile(r"^ = [^=\n]+ = *\r?$", re.MULTILINE)  # " = Title = ", not " = = Section = = "
_BETWEEN_ROWS = re.compile(r"(?:\A|(?<=\n))\n\n")  # rows of the data set end with a newline or are empty
_LITERALS = (
    ("s '", "s'"),
    (" @-@ ", "-"),
    (" @,@ ", ","),
    (" @.@ ", "."),
    (" : ", ": "),
    (" ; ", "; "),
    (" . ", ". "),
    (" ! ", "! "),
    (" ? ", "? "),
    (" , ", ", "),
)
_PAIRS = tuple(  # spaces inside brackets and quotes
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        (r"\(\s*([^\)]*?)\s*\)", r"(\1)"),
        (r"\[\s*([^\]]*?)\s*\]", r"[\1]"),
        (r"{\s*([^}]*?)\s*}", r"{\1}"),
        (r"\"\s*([^\"]*?)\s*\"", r'"\1"'),
        (r"'\s*([^']*?)\s*'", r"'\1'"),
    )
)
_REST = (
    ("= = = =", "===="),
    ("= = =", "==="),
    ("= =", "=="),
    (" \N{DEGREE SIGN} ", "\N{DEGREE SIGN}"),
    (" \n", "\n"),
    ("\n ", "\n"),
    (" N ", " 1 "),
    (" 's", "'s"),
)


@dataclasses.dataclass(frozen=True)
class Document:
    """``shown`` is tokenized; the words and bytes are those of ``original``."""

    original: str
    shown: str


def split_documents(text: str, rule: str = "auto") -> tuple[list[Document], str]:
    """Documents of a text, and the rule that was used.

    Args:
        text: the whole text.
        rule: ``wikitext`` (pages, detokenized), ``lines``, ``blank-lines`` (paragraphs), ``whole``, or ``auto``:
            ``wikitext`` where the text has its title lines, else ``whole``.

    Raises:
        UsageError: an unknown rule.
    """
    if rule not in RULES:
        raise unknown_name("rule for documents", rule, RULES)
    if rule == "auto":
        rule = "wikitext" if len(_TITLE.findall(text)) > 1 else "whole"
    if rule == "wikitext":
        pages = _pages(_raw_lines(text.replace("\r\n", "\n")))
        return [Document(page, detokenize_wikitext(page)) for page in pages], rule
    if rule == "whole":
        return [Document(text, text)], rule
    parts = text.split("\n") if rule == "lines" else re.split(r"\n\s*\n", text)
    return [Document(part, part) for part in parts if part.strip()], rule


def detokenize_wikitext(page: str) -> str:
    """A WikiText page with its spaces as people write them: the substitutions of lm-evaluation-harness, in its order.

    One of them, for apostrophes before digits, matches nothing in WikiText and is left out.
    """
    for old, new in _LITERALS:
        page = page.replace(old, new)
    for pattern, replacement in _PAIRS:
        page = pattern.sub(replacement, page)
    for old, new in _REST:
        page = page.replace(old, new)
    return page


def _raw_lines(text: str) -> str:
    """WikiText as its raw file has it; in the literature's form, rows of its lines were joined by two newlines."""
    if "\n\n\n" not in text:
        return text
    return "".join(row or " \n" for row in _BETWEEN_ROWS.split(text))


def _pages(text: str) -> list[str]:
    """Lines up to the next title; the newline before it belongs to no page, as in the harness's data set."""
    pages: list[list[str]] = [[]]
    for line in text.split("\n"):
        if _is_title(line):
            pages.append([])
        pages[-1].append(line)
    whole = ("\n".join(lines) for lines in pages)
    return [page for page in whole if page.strip()]


def _is_title(line: str) -> bool:
    """As the harness's data set finds titles: sections have their signs of equality joined first."""
    bare = line.replace("= = =", "===").replace("= =", "==").strip()
    return bare.startswith("= ") and bare.endswith(" =")
