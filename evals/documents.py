"""One text -> its documents, as they are shown to a model and as their words and bytes are counted.

WikiText is the case that matters: lm-evaluation-harness scores it page by page, with the spaces that its makers put
around punctuation taken back out, and counts the words and bytes of the page as it was.
"""

from __future__ import annotations

import dataclasses
import itertools
import re

from calib.errors import unknown_name

__all__ = ["RULES", "Document", "detokenize_wikitext", "split_documents"]

RULES = ("auto", "wikitext", "lines", "blank-lines", "whole")
_TITLE = re.compile(r"^ = [^=\n]+ = *\r?$", re.MULTILINE)  # " = Title = ", not " = = Section = = "
# Rows of the data set end with a newline; joined by two more, as the literature does, an empty row makes five of them.
_JOINED_EMPTY, _JOINED = re.compile(r"(?:\r?\n){4,}"), re.compile(r"(?:\r?\n){2,3}")
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
        pages = _pages(_JOINED.sub("\n", _JOINED_EMPTY.sub("\n \n", text)))
        return [Document(page, detokenize_wikitext(page)) for page in pages], rule
    if rule == "whole":
        return [Document(text, text)], rule
    parts = text.splitlines() if rule == "lines" else re.split(r"\n\s*\n", text)
    return [Document(part, part) for part in parts if part.strip()], rule


def detokenize_wikitext(page: str) -> str:
    """A WikiText page with its spaces as people write them: the substitutions of lm-evaluation-harness, in its order.

    One of them, for apostrophes before digits, never matches there and is left out.
    """
    for old, new in _LITERALS:
        page = page.replace(old, new)
    for pattern, replacement in _PAIRS:
        page = pattern.sub(replacement, page)
    for old, new in _REST:
        page = page.replace(old, new)
    return page


def _pages(text: str) -> list[str]:
    starts = [found.start() for found in _TITLE.finditer(text)]
    edges = [*starts, len(text)]
    head = text[: starts[0]] if starts else text
    pages = [text[start:end] for start, end in itertools.pairwise(edges)]
    return [page for page in (head, *pages) if page.strip()]
