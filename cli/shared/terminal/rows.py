"""`NamedRows`: a table whose rows can be told apart at any width.

The first column holds names (of layers, tensors, models, tasks), the last may hold sentences, those between figures.
Where a row does not fit on one line, the name gets a line of its own, whole, and the figures stand below it in columns.
Neither names nor figures are ever cut.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence

from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, RenderResult
from rich.measure import Measurement
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

__all__ = ["Column", "NamedRows"]

_GAP = 2  # spaces between columns, and before figures that stand below a name


@dataclasses.dataclass(frozen=True)
class Column:
    """Heading of a column of figures. ``left``: text that is aligned to the left."""

    heading: str
    left: bool = False


@dataclasses.dataclass(frozen=True)
class NamedRows:
    """A table; print it on a `cli.shared.terminal.screen.Screen`.

    Args:
        name: heading of the names.
        columns: the figures' headings. A column whose cells are all empty or ``-`` is left out where that saves lines.
        rows: a name, a cell per column, and a sentence if there is a heading for it. Cells may have several lines.
        notes: heading of the sentences, ``None`` where rows have none.
        title: a line above.
    """

    name: str
    columns: tuple[Column, ...]
    rows: tuple[tuple[str, ...], ...]
    notes: str | None = None
    title: str | None = None

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        widest = options.update(width=1 << 16)
        for table in (self, self._without_empty()):
            plain = table._on_one_line()
            if Measurement.get(console, widest, plain).maximum <= options.max_width:
                yield plain
                return
        if self.title is not None:
            yield Text(console.render_str(self.title).plain, style="table.title")
        yield from self._without_empty()._below(console, options.max_width)

    def _on_one_line(self) -> Table:
        table = Table(title=self.title, title_justify="left", box=None, pad_edge=False)
        table.add_column(self.name, no_wrap=True)
        for column in self.columns:
            table.add_column(column.heading, justify="left" if column.left else "right", no_wrap=True)
        if self.notes is not None:
            table.add_column(self.notes)
        for row in self.rows:
            table.add_row(*row)
        return table

    def _without_empty(self) -> NamedRows:
        """Only the columns of figures that say something."""
        said = [i for i in range(len(self.columns)) if any(row[i + 1] not in ("", "-") for row in self.rows)]
        last = slice(len(self.columns) + 1, None)
        return dataclasses.replace(
            self,
            columns=tuple(self.columns[i] for i in said),
            rows=tuple((row[0], *(row[i + 1] for i in said), *row[last]) for row in self.rows),
        )

    def _below(self, console: Console, width: int) -> Iterator[Text | Padding]:
        """Every name on a line of its own, its figures and its sentence below it."""
        widths = [
            max(
                cell_len(line) for cell in (column.heading, *(row[i + 1] for row in self.rows)) for line in _lines(cell)
            )
            for i, column in enumerate(self.columns)
        ]
        groups = _groups(widths, width - _GAP)
        yield Text(self.name, style="table.header", overflow="fold")
        for line in self._figures([column.heading for column in self.columns], widths, groups):
            yield Text(line, style="table.header", overflow="fold")
        for row in self.rows:
            yield Text(console.render_str(row[0]).plain, overflow="fold")
            for line in self._figures(row[1 : 1 + len(self.columns)], widths, groups):
                yield Text(console.render_str(line).plain, overflow="fold")
            for sentence in filter(None, row[1 + len(self.columns) :]):
                yield Padding(Text(console.render_str(sentence).plain, overflow="fold"), (0, 0, 0, _GAP))

    def _figures(self, cells: Sequence[str], widths: Sequence[int], groups: Sequence[range]) -> Iterator[str]:
        """The lines of one row's figures, a group of columns after the other."""
        for group in groups:
            columns = [_lines(cells[i]) for i in group]
            for number in range(max(map(len, columns), default=0)):
                parts = [column[number] if number < len(column) else "" for column in columns]
                aligned = [_aligned(part, widths[i], self.columns[i]) for part, i in zip(parts, group, strict=True)]
                yield (" " * _GAP + (" " * _GAP).join(aligned)).rstrip()


def _lines(cell: str) -> list[str]:
    return cell.split("\n")


def _aligned(text: str, width: int, column: Column) -> str:
    space = " " * (width - cell_len(text))
    return text + space if column.left else space + text


def _groups(widths: Sequence[int], limit: int) -> list[range]:
    """Consecutive columns that fit on a line together; a column that fits on none is alone and wraps."""
    groups: list[range] = []
    start, used = 0, 0
    for i, width in enumerate(widths):
        if i > start and used + _GAP + width > limit:
            groups.append(range(start, i))
            start, used = i, 0
        used += width + (_GAP if i > start else 0)
    return [*groups, range(start, len(widths))] if widths else []
