"""The section of scores in a card: marked, so that it can be replaced without touching a word around it."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from calib.checkpoint.atomic_files import os_errors, write_file
from ptq.model_card.text import cell, table

__all__ = ["BEGIN", "END", "NO_SCORES", "ScoreRow", "insert_scores", "scores_section"]

BEGIN = "<!-- ptq eval: begin of scores -->"
END = "<!-- ptq eval: end of scores -->"
NO_SCORES = "None yet: `ptq eval OUT` puts them here."
_HEADINGS = ("of", "measured", "score", "base")
_CELL = re.compile(r"(?<!\\)\|")


class ScoreRow(NamedTuple):
    """One score.

    Args:
        of: task or text, and metric.
        measured: how: convention, number of rows, dtype.
        score: with its standard error.
        base: the score of the model in full precision, if it was measured.
    """

    of: str
    measured: str
    score: str
    base: str = ""


def scores_section(content: str) -> str:
    """A section with its marks."""
    return f"{BEGIN}\n{content}\n{END}"


def insert_scores(path: Path, rows: Iterable[ScoreRow]) -> bool:
    """Put scores into the marked section of a card; one that is there is replaced where it is of the same thing.

    Args:
        path: the card.
        rows: what was measured.

    Returns:
        Whether there was a section; a card without one is left alone.

    Raises:
        OutputError: the card cannot be read or written; it is as it was.
    """
    with os_errors(path, "read"):
        text = path.read_bytes().decode("utf-8", errors="surrogateescape")  # of lines that others wrote, every byte
    if text.count(BEGIN) != 1 or text.count(END) != 1 or text.index(END) < text.index(BEGIN):
        return False
    before, _, rest = text.partition(BEGIN)
    old, _, after = rest.partition(END)
    merged = {row[:2]: row for row in _read(old)}
    for row in (ScoreRow(*map(cell, row)) for row in rows):
        earlier = merged.get(row[:2])
        # a run without --against keeps the base's score of an earlier one
        merged[row[:2]] = row if row.base or earlier is None else row._replace(base=earlier.base)
    section = scores_section(table(_HEADINGS, merged.values()) if merged else NO_SCORES)
    changed = (before + section + after).encode("utf-8", errors="surrogateescape")
    write_file(path, lambda temporary: temporary.write_bytes(changed))
    return True


def _read(section: str) -> list[ScoreRow]:
    """Rows of a table as it was written, cells in Markdown."""
    found = []
    for line in section.splitlines():
        cells = [part.strip() for part in _CELL.split(line)[1:-1]]
        if len(cells) == len(_HEADINGS) and cells[0] not in ("---", _HEADINGS[0]):
            found.append(ScoreRow(*cells))
    return found
