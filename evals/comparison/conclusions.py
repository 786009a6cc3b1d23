"""Differences in words: what is significant, what is not, and what a reader must know about it.

A difference that is not significant is never called equality: the sentence gives its interval, and the difference that
the sample would have found.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence

from evals.comparison.grouping import Group
from evals.comparison.types import Difference
from evals.record import Record

__all__ = ["amount", "figure", "in_points", "notes_on", "p_words", "sentences_on"]

_SHARES = ("acc", "acc_norm", "acc_bytes", "p_gold", "top1", "accuracy")  # shown in points of 100
_UNITS = {"kl": " nats per token", "ll_gold": " nats"}
_MOST_DIGITS = 6


def sentences_on(differences: Sequence[Difference], confidence: float) -> list[str]:
    """One sentence for each headline difference, those that are not significant of one pair's tasks in one."""
    sentences = []
    for (reference, candidate), pair in itertools.groupby(differences, key=lambda one: (one.reference, one.candidate)):
        headline = [one for one in pair if one.headline]
        unclear = [one for one in headline if one.conclusion == "not significant" and one.flips is not None]
        joined = len(unclear) > 1
        sentences += [_sentence(one) for one in headline if not (joined and one in unclear)]
        if joined:
            parts = "; ".join(_open_part(one) for one in unclear)
            names = f"{candidate} and {reference}"
            sentences.append(f"On {len(unclear)} tasks no difference between {names} is significant: {parts}.")
    return sentences


def _sentence(one: Difference) -> str:
    average = one.measure == "accuracy"
    what = amount(one) if average else f"{one.measure} {amount(one)}"
    where = f"the {one.target}" if average else one.target
    if one.conclusion != "not significant":
        sure = f"{what}{_error(one)} ({p_words(one.p_adjusted)})"
        return f"{one.candidate} is {one.conclusion} than {one.reference} on {where}: {sure}."
    between = f"between {one.candidate} and {one.reference}"
    if one.p_value is None:
        return f"On {where} nothing can be said {between}: {what}, but {_why_no_error(one)}."
    if one.difference == 0 and one.standard_error == 0 and one.flips is None:
        return f"On {where} {one.candidate} and {one.reference} have the same {one.measure} on every item."
    return f"On {where} no difference {between} is significant: {what}{_interval(one)}{_finds(one)}."


def _open_part(one: Difference) -> str:
    return f"{one.target} {amount(one)}{_interval(one)}{_limit(one)}"


def _finds(one: Difference) -> str:
    if one.detectable is None:
        return ""
    return f"; this sample finds differences of {_plain(one, one.detectable)} or more"


def _limit(one: Difference) -> str:
    return "" if one.detectable is None else f", finds {_plain(one, one.detectable)}"


def _why_no_error(one: Difference) -> str:
    if one.blocks < 2:
        return "from one independent draw no error is known"
    return f"the {one.blocks} independent draws do not spread, so that no error is known"


def _error(one: Difference) -> str:
    if one.standard_error is None:
        return ""
    return f" +- {figure(one, one.standard_error)}{_unit(one)}"


def _interval(one: Difference) -> str:
    if one.low is None or one.high is None:
        return ""
    return f" [{figure(one, one.low, sign=True)}, {figure(one, one.high, sign=True)}]"


def amount(one: Difference) -> str:
    """The difference with its sign; its unit where no error follows, e.g. ``"-0.6 points"``."""
    shown = figure(one, one.difference, sign=True)
    return shown if one.conclusion != "not significant" else shown + _unit(one)


def _plain(one: Difference, value: float) -> str:
    return figure(one, value) + _unit(one)


def figure(one: Difference, value: float, *, sign: bool = False) -> str:
    """A value of a difference's measure, with as many digits as its error deserves; shares in points of 100."""
    scale = 100.0 if in_points(one.measure) else 1.0
    error = one.standard_error or one.detectable or abs(one.difference) or 1.0
    least = 1 if scale > 1 else 2
    digits = min(_MOST_DIGITS, max(least, 1 - math.floor(math.log10(max(error * scale, 1e-12)))))
    digits = 1 if scale > 1 and error * scale >= 0.1 else digits
    shown = f"{value * scale:{'+' if sign else ''},.{digits}f}"
    return shown if float(shown.replace(",", "")) != 0 else f"{0:.{digits}f}"


def in_points(measure: str) -> bool:
    """Whether a measure is a share, shown in points of 100."""
    return measure in _SHARES


def _unit(one: Difference) -> str:
    return " points" if in_points(one.measure) else _UNITS.get(one.measure, "")


def p_words(p: float | None) -> str:
    """``"p < 0.001"``, ``"p = 0.034"``; no more digits than anyone needs."""
    if p is None:
        return "p unknown"
    if p < 0.001:
        return "p < 0.001"
    return f"p = {p:.3f}" if p < 0.1 else f"p = {p:.2f}"


def notes_on(
    records: Sequence[Record], groups: Sequence[Group], differences: Sequence[Difference], confidence: float
) -> Iterator[str]:
    """What limits the comparison as a whole."""
    family = sum(one.headline and one.p_value is not None for one in differences)
    yield (
        f"p values are Holm's over {family} headline difference{'s' * (family != 1)}; significant means "
        f"p < {1 - confidence:.4g}; intervals are of {100 * confidence:.4g} %, each by itself"
    )
    yield from _notes_on_seeds(groups)
    for name in ("dtype", "device", "batch_size"):
        values = [str(record.environment.get(name, "unknown")) for record in records]
        if len(set(values)) > 1:
            pairs = dict(zip(_labels(groups, len(records)), values, strict=True))
            shown = ", ".join(f"{label} {value}" for label, value in pairs.items())
            yield f"not the same {name.replace('_', ' ')} ({shown}): a small part of the differences is rounding"
    for i, j in itertools.combinations(range(len(records)), 2):
        if records[i].model.fingerprint and records[i].model.fingerprint == records[j].model.fingerprint:
            yield f"{records[i].model.source} and {records[j].model.source} are the same model by their fingerprint"


def _notes_on_seeds(groups: Sequence[Group]) -> Iterator[str]:
    for group in groups:
        if len(group.places) > 1:
            seeds = ", ".join("?" if seed is None else str(seed) for seed in group.candidate.seeds)
            yield f"{group.label}: {len(group.places)} calibration seeds ({seeds}) pooled"
    single = [group.label for group in groups if group.calibrated and len(group.places) == 1]
    if single:
        yield (
            f"one calibration seed only: {', '.join(single)}. This says something about "
            f"{'these models' if len(single) > 1 else 'this model'}, not about the method{'s' * (len(single) > 1)}"
        )


def _labels(groups: Sequence[Group], count: int) -> list[str]:
    labels = [""] * count
    for group in groups:
        for place in group.places:
            labels[place] = group.label
    return labels
