"""Comparisons of records with chosen numbers: pooling, pairing, differences, conclusions, words."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from calib.errors import UsageError
from evals.comparison.compare import compare
from evals.comparison.types import Comparison, Difference
from evals.record import Record
from tests.support.record_factory import made_divergence, made_record, made_task, made_text, recipe

BASE = [30.0, 28.0, 33.0, 27.0, 31.0, 29.5, 30.5, 28.5]
SHIFT = [1.0, 2.0, 1.5, 0.5, 1.0, 2.5, 1.5, 2.0]


def moved(by: float = 1.0, noise: float = 0.0, seed: int = 0) -> list[float]:
    rng = np.random.default_rng(seed)
    return [b + by * s + noise * float(rng.normal()) for b, s in zip(BASE, SHIFT, strict=True)]


def pick(found: Comparison, **fields: Any) -> Difference:
    (one,) = [d for d in found.differences if all(getattr(d, name) == value for name, value in fields.items())]
    return one


def full(*results: Any) -> Record:
    return made_record("models/full", results or [made_text(BASE)])


# pooling


def test_seeds_of_one_recipe_are_one_candidate() -> None:
    seeds = [made_record(f"s{i}", [made_text(moved(1 + i / 10))], bytes=100 + i, **recipe(seed=i)) for i in (4, 7, 9)]
    found = compare([full(), *seeds])
    assert [c.label for c in found.candidates] == ["full", "coreq int3 sym g64"]
    pooled = found.candidates[1]
    assert (pooled.sources, pooled.seeds) == (("s4", "s7", "s9"), (4, 7, 9))
    assert pooled.bytes == pytest.approx((104 + 107 + 109) / 3)
    assert pooled.bits_per_weight == 3.25
    assert found.candidates[0].bits_per_weight is None
    assert "coreq int3 sym g64: 3 calibration seeds (4, 7, 9) pooled" in found.notes


@pytest.mark.parametrize(
    "other",
    [
        recipe("gptq", seed=1),
        recipe(bits=4, seed=1),
        recipe(seed=0),
        {**recipe(seed=1), "architecture": "Other"},
        {**recipe(seed=1), "parameters": 999},
        {"recipe": recipe(seed=1)["recipe"], "calibration": {"source": "c4", "seed": 1, "sequences": 9}},
        {"recipe": None},
    ],
    ids=["method", "bits", "same seed", "architecture", "size", "calibration", "no recipe"],
)
def test_anything_else_stands_alone(other: dict[str, Any]) -> None:
    records = [made_record("a", [made_text(BASE)], **recipe(seed=0)), made_record("b", [made_text(BASE)], **other)]
    labels = [c.label for c in compare(records).candidates]
    assert len(set(labels)) == 2


def test_what_has_no_recipe_is_never_pooled() -> None:
    found = compare([full(), made_record("a/x", [made_text(BASE)]), made_record("b/x", [made_text(BASE)])])
    assert [c.label for c in found.candidates] == ["full", "x (x)", "x (x) #3"]


def test_names_cannot_steer_a_terminal() -> None:
    found = compare(
        [full(made_text(BASE, name="w\x1b[2J")), made_record("a/\x1b[31mred", [made_text(BASE, name="w\x1b[2J")])]
    )
    assert [c.label for c in found.candidates] == ["full", "?[31mred"]
    assert "\x1b" not in " ".join((*found.sentences, *found.notes))


def test_labels_decide() -> None:
    records = [full(), *(made_record(f"x{i}", [made_text(moved(i))]) for i in (1, 2))]
    found = compare(records, labels=["base", "mine", "mine"])
    assert [c.label for c in found.candidates] == ["base", "mine"]
    assert found.differences[0].seeds == 2
    apart = [made_record(f"s{i}", [made_text(moved(i))], **recipe(seed=i)) for i in (1, 2)]
    assert len(compare(apart, labels=["a", "b"]).candidates) == 2


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (["a", "b"], "labels: 2, records: 3"),
        (["a", "b", "b"], "a copy is no other seed"),
        (["b", "b", "a"], "different recipes: coreq int3 sym g64, gptq int3 sym g64"),
    ],
)
def test_labels_that_do_not_fit(labels: list[str], message: str) -> None:
    one = made_record("one", [made_text(BASE)], **recipe("gptq"))
    with pytest.raises(UsageError, match=message):
        compare([made_record("zero", [made_text(BASE)], **recipe()), one, one], labels=labels)


# numbers


def test_perplexity_by_hand() -> None:
    found = compare([full(), made_record("b", [made_text(moved())])])
    one = pick(found, measure="ln ppl")
    d = np.array(SHIFT) / 10
    assert one.difference == pytest.approx(d.mean())
    assert one.standard_error == one.within_seed == pytest.approx(d.std(ddof=1) / math.sqrt(8))
    assert (one.items, one.blocks, one.seeds, one.between_seeds, one.flips) == (8, 8, 1, None, None)
    assert one.low is not None
    assert one.low < one.difference < (one.high or 0)
    assert one.p_value is not None
    assert one.p_value < 0.01
    t = stats.t(7)
    assert one.detectable == pytest.approx((t.ppf(0.975) + t.ppf(0.8)) * one.standard_error)
    assert (one.conclusion, one.higher_is_better) == ("worse", False)
    value = next(s for s in found.scores if s.candidate == "full")
    assert value.value == pytest.approx(np.mean(BASE) / 10)


def test_tokens_weigh() -> None:
    tokens = [10, 20, 5]
    a = made_record("a", [made_text([30.0, 60.0, 10.0], tokens)])
    b = made_record("b", [made_text([31.0, 66.0, 10.5], tokens)])
    one = compare([a, b]).differences[0]
    residual = np.array([1.0, 6.0, 0.5]) - 7.5 / 35 * np.array(tokens)
    assert one.difference == pytest.approx(7.5 / 35)
    assert one.standard_error == pytest.approx(math.sqrt(3 / 2 * float(residual @ residual)) / 35)


def test_pooled_seeds_by_hand() -> None:
    changes = np.array([moved(1.0, 1.0, i) for i in range(3)]) - np.array(BASE)  # [seeds, items]
    seeds = [made_record(f"s{i}", [made_text(moved(1.0, 1.0, i))], **recipe(seed=i)) for i in range(3)]
    one = compare([full(), *seeds]).differences[0]
    means = changes.mean(axis=1) / 10
    within = float(np.std(changes.mean(axis=0) / 10, ddof=1)) / math.sqrt(8)
    between = float(np.std(means, ddof=1))
    total = within**2 + between**2 / 3
    freedom = total**2 / (within**4 / 7 + (between**2 / 3) ** 2 / 2)
    reach = stats.t(freedom).ppf(0.975) * math.sqrt(total)
    assert one.difference == pytest.approx(means.mean())
    assert (one.within_seed, one.between_seeds) == pytest.approx((within, between))
    assert one.standard_error == pytest.approx(math.sqrt(total))
    assert (one.low, one.high) == pytest.approx((means.mean() - reach, means.mean() + reach))
    assert one.p_value == pytest.approx(2 * stats.t(freedom).sf(means.mean() / math.sqrt(total)))
    assert one.seeds == 3


def test_both_sides_with_seeds() -> None:
    a = [made_record(f"a{i}", [made_text(moved(1.0, 1.0, i))], **recipe(seed=i)) for i in range(2)]
    b = [made_record(f"b{i}", [made_text(moved(2.0, 1.0, 9 + i))], **recipe("gptq", seed=i)) for i in range(3)]
    one = compare([*a, *b]).differences[0]
    left = [float(np.sum(moved(1.0, 1.0, i))) / 80 for i in range(2)]
    right = [float(np.sum(moved(2.0, 1.0, 9 + i))) / 80 for i in range(3)]
    assert one.difference == pytest.approx(np.mean(right) - np.mean(left))
    assert one.between_seeds == pytest.approx(math.sqrt(np.var(left, ddof=1) + np.var(right, ddof=1)))
    assert one.within_seed is not None
    expected = one.within_seed**2 + np.var(left, ddof=1) / 2 + np.var(right, ddof=1) / 3
    assert one.standard_error == pytest.approx(math.sqrt(expected))


def test_seeds_that_agree_are_not_more_items() -> None:
    """Three copies of one result have the error of one: the items are the same."""
    seeds = [made_record(f"s{i}", [made_text(moved())], **recipe(seed=i)) for i in range(3)]
    pooled, alone = compare([full(), *seeds]).differences[0], compare([full(), seeds[0]]).differences[0]
    assert pooled.standard_error == pytest.approx(alone.standard_error)
    assert pooled.between_seeds == pytest.approx(0.0, abs=1e-12)


def test_flips_and_mcnemar() -> None:
    before = [1, 1, 1, 1, 1, 1, 1, 1, 0, 0, 0, 1]
    after = [0, 0, -1, 0, 0, 0, 0, 1, 1, 0, -1, 1]
    found = compare([full(made_task(before)), made_record("b", [made_task(after)])])
    one = pick(found, measure="acc")
    assert one.flips is not None
    assert (one.flips.lost, one.flips.won) == (7, 1)
    assert one.flips.rate == pytest.approx(8 / 12)
    assert one.flips.answers_changed == pytest.approx(9 / 12)
    assert one.difference == pytest.approx(-6 / 12)
    assert one.p_value == pytest.approx(stats.binomtest(1, 8).pvalue)
    spec = math.sqrt(8 - 36 / 12) / 12  # with n in place of n - 1
    assert one.standard_error == pytest.approx(spec * math.sqrt(12 / 11))
    # Agresti and Min: half an item more in each of the four cells
    mean, error = -6 / 14, math.sqrt(9 - 36 / 14) / 14
    assert (one.low, one.high) == pytest.approx((mean - 1.959964 * error, mean + 1.959964 * error))


def test_flips_of_seeds_are_means() -> None:
    seeds = [
        made_record(f"s{i}", [made_task(right)], **recipe(seed=i))
        for i, right in enumerate([[0, 1, 1, 1], [0, 0, 1, 1]])
    ]
    one = pick(compare([full(made_task([1, 1, 0, 0])), *seeds]), measure="acc")
    assert one.flips is not None
    assert (one.flips.lost, one.flips.won) == (1.5, 2.0)
    assert one.difference == pytest.approx(0.125)


def test_continuous_measures_of_tasks() -> None:
    task, other = made_task([1] * 20, margin=2.0), made_task([1] * 20, margin=[1.0 + i / 20 for i in range(20)])
    found = compare([full(task), made_record("b", [other])])
    gold = pick(found, measure="ll_gold")
    change = np.array([-1.0 + i / 20 for i in range(20)])
    assert gold.difference == pytest.approx(change.mean())
    assert gold.standard_error == pytest.approx(stats.sem(change))
    share = pick(found, measure="p_gold")
    new = np.exp(np.array([1.0 + i / 20 for i in range(20)]))
    assert share.difference == pytest.approx(float(np.mean(new / (new + 2)) - math.exp(2) / (math.exp(2) + 2)))
    for one in (gold, share):
        assert (one.headline, one.p_adjusted, one.conclusion) == (False, None, "not significant")
        assert one.p_value is not None
        assert one.p_value < 0.001


def test_clusters_are_draws() -> None:
    groups = [i // 5 for i in range(60)]
    before = [1] * 60
    after = [0 if group in (1, 4) else 1 for group in groups]  # whole clusters are lost
    tasks = [made_task(right, cluster=groups) for right in (before, after)]
    found = compare([full(tasks[0]), made_record("b", [tasks[1]])])
    one = pick(found, measure="acc")
    assert (one.items, one.blocks) == (60, 12)
    lost = np.array([-5.0 if group in (1, 4) else 0.0 for group in range(12)])
    assert one.standard_error == pytest.approx(float(np.std(lost / 5, ddof=1)) / math.sqrt(12))
    assert stats.binomtest(0, 10).pvalue < 0.01 < (one.p_value or 0)  # McNemar would take rows for draws
    assert one.conclusion == "not significant"


def test_average_of_tasks() -> None:
    rng = np.random.default_rng(0)
    before = {name: rng.integers(0, 2, n) for name, n in (("a", 40), ("b", 90))}
    after = {name: np.where(rng.random(len(v)) < 0.2, 0, v) for name, v in before.items()}
    records = [
        made_record(source, [made_task(v.tolist(), name=name) for name, v in scores.items()])
        for source, scores in (("x", before), ("y", after))
    ]
    found = compare(records)
    one = pick(found, target="average of tasks")
    changes = [after[name] - before[name] for name in before]
    assert one.difference == pytest.approx(np.mean([c.mean() for c in changes]))
    variances = [np.var(c, ddof=1) / len(c) for c in changes]
    assert one.standard_error == pytest.approx(math.sqrt(sum(variances)) / 2)
    freedom = sum(variances) ** 2 / sum(v**2 / (len(c) - 1) for v, c in zip(variances, changes, strict=True))
    assert one.p_value == pytest.approx(2 * stats.t(freedom).sf(abs(one.difference) / one.standard_error))
    assert (one.headline, one.items) == (True, 130)
    score = [s.value for s in found.scores if s.target == "average of tasks"]
    assert score[1] - score[0] == pytest.approx(one.difference)


def test_seeds_move_all_tasks_of_an_average_together() -> None:
    """Each seed wins on one task what it loses on the other, so the average does not depend on the seed."""
    scores = [([1, 1, 0, 0], [1, 0, 0, 0]), ([1, 0, 0, 0], [1, 1, 0, 0])]
    seeds = [
        made_record(f"s{i}", [made_task(a, name="a"), made_task(b, name="b")], **recipe(seed=i))
        for i, (a, b) in enumerate(scores)
    ]
    found = compare([full(made_task([1, 1, 1, 0], name="a"), made_task([1, 1, 1, 0], name="b")), *seeds])
    one = pick(found, target="average of tasks")
    assert one.between_seeds == 0
    assert (pick(found, target="a", measure="acc").between_seeds or 0) > 0.1


def test_divergence_from_one_base() -> None:
    def against(source: str, kl: list[float], base: str) -> Record:
        columns = {"kl": kl, "same_top": [9] * 8}
        return made_record(source, [made_text(moved(), columns=columns, divergence=made_divergence(base))])

    kl = [0.1 * s for s in SHIFT]
    found = compare([full(), against("a", kl, "f"), against("b", [2 * k for k in kl], "f"), against("c", kl, "g")])
    scores = {s.candidate: s.value for s in found.scores if s.measure == "kl"}
    assert scores["a"] == pytest.approx(np.mean(kl) / 10)
    assert "full" not in scores
    (one,) = [d for d in found.differences if d.measure == "kl"]  # c has another base
    assert (one.reference, one.candidate) == ("a", "b")
    assert one.difference == pytest.approx(np.mean(kl) / 10)
    top = next(s for s in found.scores if s.measure == "top1")
    assert (top.value, top.headline) == (0.9, False)


def test_bits_per_byte_of_documents() -> None:
    size = [40.0] * 8
    texts = [made_text(v, convention="documents", columns={"bytes": size}) for v in (BASE, moved())]
    found = compare([full(texts[0]), made_record("b", [texts[1]])])
    one = pick(found, measure="bits per byte")
    assert one.target == "words (documents)"
    assert one.difference == pytest.approx(np.mean(SHIFT) / 40 / math.log(2))
    assert not one.headline


@settings(max_examples=20, deadline=None)
@given(st.lists(st.tuples(st.integers(-1, 1), st.integers(-1, 1)), min_size=2, max_size=12), st.integers(0, 9))
def test_the_other_way_round_is_the_other_sign(pairs: list[tuple[int, int]], seed: int) -> None:
    left, right = ([pair[i] for pair in pairs] for i in range(2))
    rng = np.random.default_rng(seed)
    texts = [made_text(rng.normal(30, 3, size=8).tolist()) for _ in range(2)]
    a, b = made_record("a", [texts[0], made_task(left)]), made_record("b", [texts[1], made_task(right)])
    there, back = compare([a, b], draws=200), compare([b, a], draws=200)
    for one, other in zip(there.differences, back.differences, strict=True):
        assert one.difference == pytest.approx(-other.difference, abs=1e-12)
        assert one.p_value == pytest.approx(other.p_value)
        assert one.standard_error == pytest.approx(other.standard_error)
        assert {one.conclusion, other.conclusion} in ({"better", "worse"}, {"not significant"})


def test_holm_is_over_all_headlines() -> None:
    records = [full(made_text(BASE), made_task([1] * 10)), made_record("b", [made_text(moved()), made_task([0] * 10)])]
    records.append(made_record("c", [made_text(moved(0.1, 1.0)), made_task([1] * 9 + [0])]))
    found = compare(records)
    family = [d for d in found.differences if d.headline]
    assert len(family) == 6
    raw = sorted(d.p_value or 0.0 for d in family)
    smallest = min(d.p_adjusted or 0.0 for d in family)
    assert smallest == pytest.approx(6 * raw[0])
    for d in family:
        assert (d.conclusion != "not significant") == ((d.p_adjusted or 0.0) < 0.05)
