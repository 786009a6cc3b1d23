"""Sentences on differences, and the notes on a comparison."""

from __future__ import annotations

import json

import numpy as np

from evals.comparison.compare import compare
from tests.evals.comparison.test_compare import BASE, full, moved
from tests.support.record_factory import made_record, made_task, made_text, recipe


def test_sentences() -> None:
    rng = np.random.default_rng(3)
    right = rng.integers(0, 2, 400)
    some = right.copy()
    some[:9] = 1 - some[:9]
    base = full(made_text(BASE), made_task(right.tolist()))
    b = made_record("b", [made_text(moved()), made_task(some.tolist())], **recipe())
    c = made_record("c", [made_text(BASE[:]), made_task([0] * 400)], **recipe("gptq"))
    found = compare([base, b, c])
    assert list(found.sentences) == [
        "coreq int3 sym g64 is worse than full on words: ln ppl +0.150 +- 0.023 (p = 0.001).",
        "On quiz no difference between coreq int3 sym g64 and full is significant: acc +0.2 points [-1.3, +1.8]; "
        "this sample finds differences of 2.1 points or more.",
        "On words gptq int3 sym g64 and full have the same ln ppl on every item.",
        "gptq int3 sym g64 is worse than full on quiz: acc -50.2 +- 2.5 points (p < 0.001).",
        "gptq int3 sym g64 is better than coreq int3 sym g64 on words: ln ppl -0.150 +- 0.023 (p = 0.001).",
        "gptq int3 sym g64 is worse than coreq int3 sym g64 on quiz: acc -50.5 +- 2.5 points (p < 0.001).",
    ]
    assert any(note.startswith("p values are Holm's over 6 headline differences") for note in found.notes)
    assert (
        "one calibration seed only: coreq int3 sym g64, gptq int3 sym g64. "
        "This says something about these models, not about the methods"
    ) in found.notes


def test_open_tasks_are_said_in_one_sentence() -> None:
    tasks = [[made_task([1, 0, 1, 1, i], name=name) for name in ("a", "b")] for i in (0, 1)]
    found = compare([full(*tasks[0]), made_record("x", tasks[1])])
    said = next(s for s in found.sentences if s.startswith("On 2 tasks no difference between x and full"))
    assert "a +20.0 points" in said
    assert "; b +20.0 points" in said


def test_one_item_says_nothing() -> None:
    found = compare([full(made_text([30.0])), made_record("b", [made_text([40.0])])])
    one = found.differences[0]
    assert (one.standard_error, one.low, one.p_value, one.p_adjusted) == (None, None, None, None)
    assert one.conclusion == "not significant"
    said = "On words nothing can be said between b and full: ln ppl +1.00, but from one independent draw no error is"
    assert found.sentences == (f"{said} known.",)


def test_differences_that_do_not_spread_are_not_significant() -> None:
    found = compare([full(), made_record("b", [made_text([value + 1 for value in BASE])])])
    assert found.differences[0].conclusion == "not significant"
    assert "do not spread" in found.sentences[0]


def test_no_sentence_claims_equality() -> None:
    found = compare([full(made_task([1, 0] * 20)), made_record("b", [made_task([1, 0] * 19 + [0, 1])])])
    assert all("equal" not in s and "same" not in s for s in found.sentences)


def test_other_circumstances_are_noted() -> None:
    a = full()
    b = made_record(
        "b", [made_text(moved())], environment={"dtype": "bfloat16", "device": "cuda"}, fingerprint="of models/full"
    )
    notes = " ".join(compare([a, b]).notes)
    assert "not the same dtype (full float32, b bfloat16)" in notes
    assert "not the same device (full cpu, b cuda)" in notes
    assert "batch size" not in notes
    assert "models/full and b are the same model" in notes


def test_as_json_and_again_the_same() -> None:
    records = [full(), made_record("b", [made_text(moved(2.0, 1.0))], **recipe())]
    found = compare(records, seed=5)
    data = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    assert data["compare"] == "ptq-compare"
    assert data["differences"][0]["conclusion"] == "worse"
    assert compare(records, seed=5) == found
    assert compare(records, seed=6).differences[0].low != found.differences[0].low
