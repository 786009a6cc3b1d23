"""Scores of answers, by the formulas on single rows."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from evals.items import Items
from evals.tasks.metrics import HIGHER_IS_BETTER, METRICS, answers, per_item

Rows = list[tuple[int, list[tuple[float, str]]]]  # gold, and (log-likelihood, text) of each answer


def items_of(rows: Rows, **more: Any) -> Items:
    flat = [answer for _, given_answers in rows for answer in given_answers]
    columns = {
        "gold": np.array([gold for gold, _ in rows], dtype=np.int32),
        "counts": np.array([len(given_answers) for _, given_answers in rows], dtype=np.int32),
        "ll": np.array([ll for ll, _ in flat], dtype=np.float32),
        "characters": np.array([len(text) for _, text in flat], dtype=np.int32),
        "bytes": np.array([len(text.encode()) for _, text in flat], dtype=np.int32),
    }
    return Items(np.arange(len(rows), dtype=np.uint64), columns | more)


ROWS: Rows = [
    (1, [(-4.0, "four"), (-3.0, "one"), (-5.0, "a long answer")]),
    (0, [(-4.0, "a long answer"), (-3.0, "one")]),  # by characters the long one wins
    (1, [(-8.0, "東京東京"), (-9.0, "abcdefgh")]),  # by characters the second, by bytes the first
    (2, [(-1.0, "x"), (-1.0, "y"), (-1.0, "z"), (-1.0, "w")]),  # ties go to the first
]


def test_golden_rows() -> None:
    items = items_of(ROWS)
    assert answers(items, "acc").tolist() == [1, 1, 0, 0]
    assert answers(items, "acc_norm").tolist() == [2, 0, 1, 0]
    assert answers(items, "acc_bytes").tolist() == [2, 0, 0, 0]
    assert per_item(items, "acc").tolist() == [1.0, 0.0, 0.0, 0.0]
    assert per_item(items, "acc_norm").tolist() == [0.0, 1.0, 1.0, 0.0]
    assert per_item(items, "acc_bytes").tolist() == [0.0, 1.0, 0.0, 0.0]
    assert per_item(items, "ll_gold").tolist() == [-3.0, -4.0, -9.0, -1.0]
    first = math.exp(-3) / (math.exp(-4) + math.exp(-3) + math.exp(-5))
    expected = [first, 1 / (1 + math.e), 1 / (1 + math.e), 0.25]
    assert per_item(items, "p_gold") == pytest.approx(expected)


def test_one_continuation_is_right_if_the_model_would_write_it() -> None:
    items = items_of([(0, [(-0.5, "door")]), (0, [(-2.0, "tree")])], greedy=np.array([1, 0], dtype=np.uint8))
    assert answers(items, "acc").tolist() == [0, 1]
    assert answers(items, "acc").dtype == np.int64
    assert per_item(items, "acc").tolist() == [1.0, 0.0]
    assert per_item(items, "ll_gold").tolist() == [-0.5, -2.0]
    assert per_item(items, "p_gold") == pytest.approx([math.exp(-0.5), math.exp(-2.0)])


def test_an_empty_answer_divides_by_one() -> None:
    items = items_of([(0, [(-1.0, ""), (-3.0, "ab")])])
    assert answers(items, "acc_norm").tolist() == [0]


def test_very_unlikely_answers_still_share_their_probability() -> None:
    items = items_of([(1, [(-5000.0, "a"), (-5001.0, "b")]), (0, [(-3.0, "a"), (-5000.0, "b")])])
    assert per_item(items, "p_gold") == pytest.approx([1 / (1 + math.e), 1.0])


def test_names() -> None:
    assert set(METRICS) == set(HIGHER_IS_BETTER)
    with pytest.raises(KeyError):
        per_item(items_of(ROWS), "f1")
    with pytest.raises(KeyError):
        answers(items_of(ROWS), "p_gold")


_answers = st.lists(st.tuples(st.floats(-50, 0, width=32), st.text(min_size=1, max_size=6)), min_size=1, max_size=5)
_row = _answers.flatmap(lambda given_answers: st.tuples(st.integers(0, len(given_answers) - 1), st.just(given_answers)))


@given(st.lists(_row, min_size=1, max_size=6))
def test_any_rows(rows: Rows) -> None:
    rows = [(gold, [(ll, text.encode("utf-8", "replace").decode()) for ll, text in found]) for gold, found in rows]
    items = items_of(rows)
    sizes = {"acc": lambda text: 1, "acc_norm": len, "acc_bytes": lambda text: len(text.encode())}
    for metric, size in sizes.items():
        for (gold, found), answer, right in zip(
            rows, answers(items, metric).tolist(), per_item(items, metric), strict=True
        ):
            scores = [ll / size(text) for ll, text in found]
            assert answer == scores.index(max(scores))
            assert right == float(answer == gold)
    for (gold, found), share in zip(rows, per_item(items, "p_gold"), strict=True):
        assert share == pytest.approx(1 / sum(math.exp(ll - found[gold][0]) for ll, _ in found))
