"""Which items of records are compared, and what is refused."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np
import pytest

from calib.errors import DataError, UsageError
from evals.comparison.compare import compare
from evals.record import Record
from tests.evals.comparison.test_compare import BASE, SHIFT, full, moved, pick
from tests.support.record_factory import made_record, made_task, made_text, recipe


def test_rows_in_another_order_are_paired() -> None:
    task = made_task([1, 0, 1, 1, 0])
    order = np.array([3, 1, 4, 0, 2])
    columns = dict(task.items.columns)
    answers = {name: columns[name].reshape(5, 3)[order].reshape(-1) for name in ("ll", "characters", "bytes")}
    columns |= answers | {name: columns[name][order] for name in ("gold", "counts")}
    other = dataclasses.replace(task, items=dataclasses.replace(task.items, ids=task.items.ids[order], columns=columns))
    found = compare([full(task), made_record("b", [other])])
    assert all(d.difference == 0 for d in found.differences)
    assert pick(found, measure="acc").items == 5


def test_items_that_occur_twice_are_paired_once_each() -> None:
    def twice(right: list[int]) -> Any:
        task = made_task(right)
        ids = task.items.ids.copy()
        ids[3] = ids[0]  # same gold answer: 3 questions apart
        return dataclasses.replace(task, items=dataclasses.replace(task.items, ids=ids))

    one = pick(compare([full(twice([1, 1, 1, 1])), made_record("b", [twice([1, 1, 1, 0])])]), measure="acc")
    assert one.flips is not None
    assert (one.items, one.flips.lost) == (4, 1)


def test_records_of_different_items_are_refused() -> None:
    a = full(made_task([1] * 10, settings={"limit": 10}))
    b = made_record("runs/b", [made_task([1] * 8, first=4, settings={"limit": 8})])
    message = (
        "different items of quiz: 10 in models/full, 8 in runs/b; 6 are shared. Their settings differ: limit 10 and 8"
    )
    with pytest.raises(DataError) as refused:
        compare([a, b])
    assert message in str(refused.value)
    assert "--shared" in str(refused.value)


def test_shared_items_on_request() -> None:
    a = full(made_text(BASE), made_task([1, 1, 1, 0, 0, 1]))
    b = made_record("b", [made_text(moved()[2:], first=2), made_task([0, 0, 1, 1], first=3)])
    found = compare([a, b], shared=True)
    assert pick(found, measure="ln ppl").difference == pytest.approx(np.mean(SHIFT[2:]) / 10)
    one = pick(found, measure="acc")  # shared: 0 0 1 before, 0 0 1 after
    assert (one.items, one.difference) == (3, 0.0)
    assert any("words (segments): only the 6 shared items" in note for note in found.notes)
    with pytest.raises(DataError, match="0 are shared"):
        compare([full(), made_record("b", [made_text(BASE, first=50)])], shared=True)


def test_texts_of_other_settings_are_told_apart() -> None:
    short = made_text(BASE, name="w", first=100, settings={"seqlen": 5})
    long = made_text(BASE, name="w", settings={"seqlen": 11})
    both = compare([full(short, long), made_record("b", [short, long])])
    assert [d.target for d in both.differences] == ["w, 5 tokens", "w, 11 tokens"]
    one = compare([full(short, long), made_record("b", [long])])
    assert [d.target for d in one.differences] == ["w"]
    assert "w (segments) is left out: not in the record of b" in one.notes
    with pytest.raises(DataError, match="seqlen 5 and 11"):
        compare([full(short), made_record("b", [long])])


def test_a_text_by_another_path_is_the_same_text() -> None:
    first = made_text(BASE, name="/here/text.txt")
    other = dataclasses.replace(made_text(moved(), name="/there/t.txt"), sha256=first.sha256)
    assert [d.target for d in compare([full(first), made_record("b", [other])]).differences] == ["text.txt"]


def test_what_is_not_in_all_records_is_left_out_and_said() -> None:
    a = full(made_text(BASE), made_task([1, 0], name="a"))
    b = made_record("b", [made_text(moved()), made_task([1, 0], name="c")])
    found = compare([a, b])
    assert {d.target for d in found.differences} == {"words"}
    assert "a is left out: not in the record of b" in found.notes
    assert "c: left out, not in the first record" in found.notes


def test_nothing_in_common_is_refused() -> None:
    with pytest.raises(DataError, match=r"models/full has words \(segments\); b has quiz"):
        compare([full(), made_record("b", [made_task([1, 0])])])


def test_other_tokenizers() -> None:
    both = [made_text(BASE), made_task([1, 0, 1])]
    found = compare([full(*both), made_record("b", both, tokenizer="u")])
    assert {d.target for d in found.differences} == {"quiz"}
    assert any("different tokenizers" in note for note in found.notes)
    with pytest.raises(DataError, match="different tokenizers, whose tokens do not match"):
        compare([full(), made_record("b", [made_text(BASE)], tokenizer="u")])


def test_damaged_records_are_refused() -> None:
    with pytest.raises(DataError, match="ln ppl of item 1 of record 2 is nan"):
        compare([full(made_text([1.0, 2.0])), made_record("b", [made_text([1.0, math.nan])])])
    with pytest.raises(DataError, match="1 items have other tokens"):
        compare([full(made_text([1.0, 2.0])), made_record("b", [made_text([1.0, 2.0], [10, 11])])])


@pytest.mark.parametrize(
    ("records", "options", "message"),
    [
        ([], {}, "no records"),
        ([full()], {}, "one record only"),
        ([full(), full()], {"confidence": 1.0}, "got 1.0"),
        ([full(), full()], {"draws": 10}, "bootstrap of 10"),
        ([made_record(f"s{i}", [made_text(BASE)], **recipe(seed=i)) for i in (0, 1)], {}, "seeds of one recipe"),
    ],
)
def test_wrong_use(records: list[Record], options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        compare(records, **options)


def test_one_record_is_compared_with_its_base() -> None:
    found = compare([made_record("b", [made_text(moved())], base=full())])
    assert [c.label for c in found.candidates] == ["full", "b"]
