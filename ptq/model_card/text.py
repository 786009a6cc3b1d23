"""Names from elsewhere as parts of Markdown: no name ends a line, a table cell, a code block or a comment."""

from __future__ import annotations

import re
from collections.abc import Iterable

__all__ = ["cell", "code_block", "one_line", "table"]

_MARKS = re.compile(r"([\\`*_\[\]<>|#~$])")


def one_line(text: str) -> str:
    """The text without control characters; whatever breaks a line is a space."""
    return " ".join("".join(c if c.isprintable() else " " for c in text).split())


def cell(text: str) -> str:
    """The text as plain words of a paragraph or a table cell."""
    return _MARKS.sub(r"\\\1", one_line(text))


def table(headings: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """A table of cells that are Markdown already."""
    titles = list(headings)
    lines = [titles, ["---"] * len(titles), *map(list, rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def code_block(language: str, text: str) -> str:
    """A fenced block whose fence is longer than any row of backticks in it."""
    longest = max((len(found) for found in re.findall(r"`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}{language}\n{text.rstrip()}\n{fence}"
