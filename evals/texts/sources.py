"""Evaluation texts by name: the sources of `calib.data.sources`, with a data set's test part where a name leaves it
open."""

from __future__ import annotations

from calib.data.chat import RowReader
from calib.data.sources import Text, read_text

__all__ = ["EVALUATION_PARTS", "load_text"]

EVALUATION_PARTS = {"wikitext2": "wikitext2:test", "c4": "c4:validation"}


def load_text(source: str, *, limit: int | None = None, rows: RowReader | None = None) -> Text:
    """The text to score: a file, ``FILE@0.8:1``, ``wikitext2`` (its test part), ``c4`` (validation), ``pydoc:eval``.

    Args:
        source: a path or a name.
        limit: characters after which a streamed hub data set is read no further; ``None`` reads it all.
        rows: how rows become text; needed for rows of messages.

    Raises:
        UsageError: an unknown name, a wrong slice, or ``self``, which has no text.
        DataError: the text cannot be read.
    """
    name, at, part = source.partition("@")
    return read_text(EVALUATION_PARTS.get(name, name) + at + part, limit=limit, rows=rows)
