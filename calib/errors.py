"""The one exception tree of the toolkit. It stands at the bottom layer so that every package can raise from it.

    PtqError                      anything the toolkit raises on purpose             exit code
    +-- UsageError                a wrong option, method, bits, recipe, pattern              2
    +-- ModelError                the model cannot be read or is not one we quantize         3
    +-- DataError                 calibration or evaluation text does not serve              4
    +-- NumericalError            NaN or Inf, a Hessian that no fallback could factor        5
    +-- OutputError               the output folder, the disk, a damaged checkpoint          6
    +-- WorkersError              another process of a run over several processes ended      7

``ptq.errors`` re-exports the tree; the exit codes are what the command line returns. Every message says what is wrong,
where (the full layer or file name), the value and the limit, and what to do next.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable

__all__ = [
    "DataError",
    "ModelError",
    "NumericalError",
    "OutputError",
    "PtqError",
    "UsageError",
    "WorkersError",
    "unknown_name",
]


class PtqError(Exception):
    """Base of everything the toolkit raises on purpose."""

    exit_code: int = 1


class UsageError(PtqError):
    """What was asked for does not exist or does not fit together."""

    exit_code = 2


class ModelError(PtqError):
    """The model cannot be read, or is not a causal language model of the Hugging Face kind."""

    exit_code = 3


class DataError(PtqError):
    """The text is missing, too short, or does not fit the model's context."""

    exit_code = 4


class NumericalError(PtqError):
    """Weights, activations or statistics are not finite, or a system could not be solved."""

    exit_code = 5


class OutputError(PtqError):
    """The output cannot be written, or a checkpoint of ours is damaged or not ours."""

    exit_code = 6


class WorkersError(PtqError):
    """Another process of a run over several processes has ended, so this one cannot go on."""

    exit_code = 7


_SHOWN_NAMES = 40  # a model has hundreds of linears


def unknown_name(kind: str, name: object, known: Iterable[str]) -> UsageError:
    """A `UsageError` for a failed look-up: names near ``name`` first, then the list, of a long one the start.

    A name that differs only in case, hyphens and underscores is the only one that is offered. What is no text, as in a
    recipe file that was written by hand, is near nothing.
    """
    names = sorted(known)
    text = name if isinstance(name, str) else ""
    same = [known_name for known_name in names if folded_name(known_name) == folded_name(text)]
    folded = {known_name.casefold(): known_name for known_name in names}
    near = same or [folded[found] for found in difflib.get_close_matches(text.casefold(), folded, n=3, cutoff=0.5)]
    hint = f" Did you mean {' or '.join(repr(n) for n in near)}?" if near else ""
    more = f" and {len(names) - _SHOWN_NAMES} more" if len(names) > _SHOWN_NAMES else ""
    return UsageError(f"unknown {kind} {name!r}.{hint} Known: {', '.join(names[:_SHOWN_NAMES])}{more}.")


def folded_name(name: str) -> str:
    """A name without what people write in several ways: ``LLM_FP4`` and ``llm-fp4`` are one."""
    return name.casefold().replace("-", "").replace("_", "")
