"""Weights whose shapes a format does not take: all of them are named at once, with what to do about them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from ptq.errors import UsageError
from ptq.scheme import Scheme

__all__ = ["check_shapes"]

_SHOWN = 3  # patterns in a message
_EVERY_WIDTH = "e2m1 and fp8 take every width"


def check_shapes(schemes: Mapping[str, Scheme], shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Check that every weight can be stored, and every input rounded, as its scheme says.

    Args:
        schemes: by full name of a linear.
        shapes: of the weights, ``(out_features, in_features)``, by the same names.

    Raises:
        UsageError: some cannot; says which, why the first cannot, and what can be done.
    """
    stored, rounded = _refused(schemes, shapes)
    if stored:
        name, problem = next(iter(stored.items()))
        scheme = schemes[name]
        other = "=8,a0" if scheme.rounds_input else "=8"
        raise UsageError(
            f"{name} ({_size(shapes[name])}) cannot be stored as {scheme.describe()}: {problem}{_others(stored)}. "
            f"Give {_them(stored)} another scheme ({_options('--override', stored, other)}), leave {_them(stored)} "
            f"in full precision ({_options('--ignore', stored)}), or take another --format for all: {_EVERY_WIDTH}."
        )
    if rounded:
        name, problem = next(iter(rounded.items()))
        raise UsageError(
            f"{name} ({_size(shapes[name])}) cannot have inputs as {schemes[name].act_format}: {problem}"
            f"{_others(rounded)}. Leave inputs as they are ({_options('--override', rounded, '=a0')}), leave "
            f"{_them(rounded)} in full precision ({_options('--ignore', rounded)}), or take --act-format fp8, which "
            f"takes every width."
        )


def _refused(
    schemes: Mapping[str, Scheme], shapes: Mapping[str, tuple[int, ...]]
) -> tuple[dict[str, str], dict[str, str]]:
    """Why weights cannot be stored, and why inputs cannot be rounded, by the names of their linears."""
    stored, rounded = {}, {}
    for name, scheme in schemes.items():
        rows, columns = shapes[name]
        problem = scheme.number_format.unsupported_reason(rows, columns, scheme)
        if problem is not None:
            stored[name] = problem
            continue
        record = scheme.activation_format
        problem = None if record is None else record.unsupported_reason(columns)
        if problem is not None:
            rounded[name] = problem
    return stored, rounded


def _size(shape: tuple[int, ...]) -> str:
    return " x ".join(map(str, shape))


def _others(refused: Mapping[str, str]) -> str:
    count = len(refused) - 1
    return "" if not count else f"; nor can {count} other linear{'s' if count > 1 else ''}"


def _them(refused: Mapping[str, str]) -> str:
    return "it" if len(refused) == 1 else "them"


def _options(flag: str, refused: Mapping[str, str], value: str = "") -> str:
    """The options that name all refused linears: a single one in full, several by the end of their names."""
    names: Sequence[str] = list(refused)
    if len(names) > 1:
        names = list(dict.fromkeys(f"*.{name.rpartition('.')[2]}" for name in names))
    more = " ..." if len(names) > _SHOWN else ""
    return " ".join(f"{flag} '{name}{value}'" for name in names[:_SHOWN]) + more
