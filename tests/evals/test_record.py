"""Records: their figures, the way through JSON and back, and files that are none."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from calib.errors import DataError, OutputError
from evals.items import Items
from evals.record import (
    RECORD_VERSION,
    Divergence,
    ModelInfo,
    Record,
    TaskResult,
    TextResult,
    read_record,
    read_task_result,
    read_text_result,
)
from tests.support.record_factory import made_divergence, made_record, made_task, made_text, recipe


def cloze(ll: list[float]) -> TaskResult:
    """A task with one continuation a row."""
    n = len(ll)
    columns = {
        "gold": np.zeros(n, dtype="<i4"),
        "counts": np.ones(n, dtype="<i4"),
        "ll": np.array(ll, dtype="<f4"),
        "characters": np.full(n, 4, dtype="<i4"),
        "bytes": np.full(n, 4, dtype="<i4"),
        "greedy": (np.array(ll) > -1).astype("|u1"),
    }
    return TaskResult("cloze", "cloze.jsonl", {"fewshot": 0}, "acc", None, Items(np.arange(n, dtype="<u8"), columns))


def whole() -> Record:
    """A record in which every field is set."""
    base = made_record("base", [made_text([20.0, 30.0]), made_task([1, 0, 1])])
    text = made_text(
        [21.0, 31.5],
        [10, 12],
        columns={"bytes": [40, 50], "kl": [0.5, 0.25], "same_top": [9, 11]},
        divergence=made_divergence("of base", top_k=256),
    )
    text = dataclasses.replace(text, words=17, notes=("a note",), seconds=0.5)
    tasks = [made_task([1, 0, -1, 1], cluster=[0, 0, 1, 1]), cloze([-0.5, -2.0])]
    record = made_record("OUT", [text, *tasks], base=base, **recipe())
    return dataclasses.replace(record, notes=("first", "second"), harness={"results": {"x": {"acc,none": 0.5}}})


def packed(values: np.ndarray[Any, Any]) -> dict[str, Any]:
    """A column as it stands in a record."""
    found: dict[str, Any] = Items(np.zeros(1, dtype=np.uint64), {"x": values}).to_dict()["columns"]["x"]
    return found


def through_json(record: Record) -> Record:
    return Record.from_dict(json.loads(json.dumps(record.to_dict(), allow_nan=False)))


def fields(kind: Any) -> list[str]:
    return [field.name for field in dataclasses.fields(kind)]


# Figures


def test_figures_of_a_text() -> None:
    text = whole().texts[0]
    assert (text.nll, text.tokens) == (52.5, 22)
    assert text.mean_nll == pytest.approx(52.5 / 22)
    assert text.perplexity == pytest.approx(math.exp(52.5 / 22))
    assert text.word_perplexity == pytest.approx(math.exp(52.5 / 17))
    assert text.byte_perplexity == pytest.approx(math.exp(52.5 / 90))
    assert text.bits_per_byte == pytest.approx(52.5 / 90 / math.log(2))
    mean = 52.5 / 22
    squares = (21.0 - mean * 10) ** 2 + (31.5 - mean * 12) ** 2
    assert text.standard_error == pytest.approx(math.sqrt(2 * squares) / 22)
    bare = made_text([3.0])
    assert (bare.standard_error, bare.bits_per_byte, bare.byte_perplexity, bare.word_perplexity) == (None,) * 4


def test_figures_of_a_task() -> None:
    task = made_task([1, 0, -1, 1])
    acc = task.metrics["acc"]
    assert acc["value"] == 0.5
    assert acc["standard_error"] == pytest.approx(math.sqrt(0.5 * 0.5 / 3))
    assert set(task.metrics) == {"acc", "acc_norm", "acc_bytes", "p_gold", "ll_gold"}
    clustered = made_task([1, 1, 0, 0], cluster=[3, 3, 5, 5]).metrics["acc"]
    assert clustered["standard_error"] == pytest.approx(0.5)  # two draws: 1 and 0
    assert made_task([1]).metrics["acc"]["standard_error"] is None


def test_a_cloze_has_a_perplexity_and_no_lengths() -> None:
    metrics = cloze([-0.5, -2.0, -3.5]).metrics
    assert set(metrics) == {"acc", "p_gold", "ll_gold", "perplexity"}
    assert metrics["acc"]["value"] == pytest.approx(1 / 3)
    assert metrics["perplexity"]["value"] == pytest.approx(math.exp(2))
    error = np.std([0.5, 2.0, 3.5], ddof=1) / math.sqrt(3)
    assert metrics["perplexity"]["standard_error"] == pytest.approx(math.exp(2) * error)


@pytest.mark.parametrize("nats", [1e3, 1e30, 1e300])
def test_what_overflows_is_null_in_json(nats: float) -> None:
    text = dataclasses.replace(made_text([nats, nats], [1, 1], columns={"bytes": [1, 1]}), words=1)
    record = made_record("wild", [text, cloze([-min(nats, 1e30), -1.0])])
    data = json.loads(json.dumps(record.to_dict(), allow_nan=False))
    found = data["texts"][0]
    assert (found["perplexity"], found["byte_perplexity"], found["word_perplexity"]) == (None, None, None)
    assert found["mean_nll"] == nats
    cloze_found = data["tasks"][0]["metrics"]
    assert cloze_found["ll_gold"]["value"] < 0


def test_an_error_that_overflows_is_null() -> None:
    metrics = cloze([-1380.0, -36.0]).metrics["perplexity"]  # exp(708) times hundreds
    assert metrics["value"] == pytest.approx(math.exp(708.0))
    assert metrics["standard_error"] is None


# There and back


def test_there_and_back() -> None:
    record = whole()
    again = through_json(record)
    assert again.to_dict() == record.to_dict()
    assert again.base is not None
    assert again.base.model.source == "base"
    assert again.texts[0].divergence == record.texts[0].divergence
    assert again.model == record.model
    assert again.notes == ("first", "second")
    assert again.texts[0].notes == ("a note",)
    assert again.tasks[0].items["ll"].tolist() == record.tasks[0].items["ll"].tolist()
    assert again.tasks[0].clusters is not None


def test_json_has_every_field_and_the_figures() -> None:
    data = whole().to_dict()
    assert set(data) == {"record", *fields(Record)}
    assert set(data["model"]) == set(fields(ModelInfo))
    figures = {"perplexity", "word_perplexity", "byte_perplexity", "bits_per_byte", "mean_nll", "standard_error"}
    assert set(data["texts"][0]) == {*fields(TextResult), *figures}
    assert set(data["texts"][0]["divergence"]) == set(fields(Divergence))
    assert set(data["tasks"][0]) == {*fields(TaskResult), "rows", "metrics"}
    assert data["version"] == RECORD_VERSION == 2


def test_fields_of_a_later_release_are_left_out() -> None:
    data = whole().to_dict()
    for place in (data, data["model"], data["texts"][0], data["texts"][0]["divergence"], data["tasks"][0]):
        place["from_the_future"] = 1
    assert Record.from_dict(data).to_dict() == whole().to_dict()


def test_results_by_themselves() -> None:
    record = whole()
    text, task = read_text_result(record.texts[0].to_dict()), read_task_result(record.tasks[0].to_dict())
    assert text is not None
    assert task is not None
    assert (text.to_dict(), task.to_dict()) == (record.texts[0].to_dict(), record.tasks[0].to_dict())
    for damaged in ({}, {"items": 3}, record.texts[0].to_dict() | {"items": {}}):
        assert read_text_result(damaged) is None
        assert read_task_result(damaged) is None


# What is no record


REQUIRED: dict[str, tuple[Callable[[dict[str, Any]], dict[str, Any]], tuple[str, ...]]] = {
    "record": (
        lambda data: data,
        ("date", "model", "tokenizer_hash", "texts", "tasks", "environment", "seconds"),
    ),
    "model": (lambda data: data["model"], ("source", "fingerprint", "architecture", "parameters", "bytes")),
    "text": (
        lambda data: data["texts"][0],
        ("name", "source", "sha256", "convention", "settings", "nll", "tokens", "words", "bytes", "items"),
    ),
    "divergence": (lambda data: data["texts"][0]["divergence"], tuple(fields(Divergence))),
    "task": (lambda data: data["tasks"][0], ("name", "source", "settings", "metric", "chance", "items")),
    "items": (lambda data: data["tasks"][0]["items"], ("ids", "columns")),
}


@pytest.mark.parametrize("part", REQUIRED)
def test_missing_fields_are_named(part: str) -> None:
    find, names = REQUIRED[part]
    for name in names:
        data = whole().to_dict()
        del find(data)[name]
        with pytest.raises(DataError, match=f"the record is damaged: .*'{name}'"):
            Record.from_dict(data)


@pytest.mark.parametrize("part", REQUIRED)
@pytest.mark.parametrize("value", [None, 3, "x", [], True, -1.5, {}, [[]], float("inf")])
def test_parts_of_another_kind(part: str, value: Any) -> None:
    """Whatever stands there, it is read or it is a `DataError`, and nothing else."""
    find, names = REQUIRED[part]
    for name in names:
        data = whole().to_dict()
        find(data)[name] = value
        with contextlib.suppress(DataError):
            Record.from_dict(data)


@pytest.mark.parametrize("columns", ["nll", "tokens"])
def test_a_text_without_its_columns_is_damaged(columns: str) -> None:
    data = whole().to_dict()
    del data["texts"][0]["items"]["columns"][columns]
    with pytest.raises(DataError, match=columns):
        Record.from_dict(data)


@pytest.mark.parametrize("column", ["gold", "counts", "ll", "characters", "bytes"])
def test_a_task_without_its_columns_is_damaged(column: str) -> None:
    data = whole().to_dict()
    del data["tasks"][0]["items"]["columns"][column]
    with pytest.raises(DataError, match="column 'll' has 12 values" if column == "counts" else column):
        Record.from_dict(data)


@pytest.mark.parametrize(
    ("column", "values"),
    [
        ("gold", [0, 1, 3, 0]),  # there are three answers
        ("gold", [0, 1, -1, 0]),
        ("counts", [3, 3, 6, 0]),
        ("counts", [-3, 3, 6, 6]),
        ("counts", [4, 4, 4, 4]),
    ],
)
def test_answers_that_do_not_fit_together_are_damage(column: str, values: list[int]) -> None:
    data = whole().to_dict()
    data["tasks"][0]["items"]["columns"][column] = packed(np.array(values, dtype="<i4"))
    with pytest.raises(DataError, match=r"quiz: gold, counts and ll do not fit together|column .* has \d+ values"):
        Record.from_dict(data)


@pytest.mark.parametrize(("column", "count"), [("ll", 4), ("characters", 4), ("bytes", 4), ("gold", 12), ("ll", 11)])
def test_columns_of_another_length_are_damage(column: str, count: int) -> None:
    data = whole().to_dict()
    data["tasks"][0]["items"]["columns"][column] = packed(np.zeros(count, dtype="<i4"))
    with pytest.raises(DataError):
        Record.from_dict(data)


@pytest.mark.parametrize("tokens", [[0, 22], [-1, 3]])
def test_items_without_tokens_are_damage(tokens: list[int]) -> None:
    data = whole().to_dict()
    data["texts"][0]["items"]["columns"]["tokens"] = packed(np.array(tokens, dtype="<i4"))
    with pytest.raises(DataError, match="without scored tokens"):
        Record.from_dict(data)
    with pytest.raises(DataError, match="without scored tokens"):
        Record.from_dict(whole().to_dict() | {"texts": [whole().to_dict()["texts"][0] | {"tokens": 0}]})


def test_counts_that_are_no_counts() -> None:
    record = made_record("x", [made_task([1, 0])])
    for value in (float("inf"), float("nan")):
        data = record.to_dict()
        data["tasks"][0]["items"]["columns"]["counts"] = packed(np.array([value, 1.0]))
        with pytest.raises(DataError, match="damaged"):
            Record.from_dict(data)


@pytest.mark.parametrize("version", [0, 1, 3, "2", None, 2.5, [], True])
def test_other_versions_are_refused(version: Any) -> None:
    data = whole().to_dict() | {"version": version}
    with pytest.raises(DataError, match=r"a record of version .*; this ptq reads version 2"):
        Record.from_dict(data)


@pytest.mark.parametrize("data", [None, [], "x", 3, {}, {"record": "other"}, {"version": 2}])
def test_other_json_is_no_record(data: Any) -> None:
    with pytest.raises(DataError, match="not a record of ptq eval"):
        Record.from_dict(data)


# Files


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"\xff\xfe", b"not json", b"[" * 100_000, b'{"record": NaN}', b"9" * 5000],
    ids=lambda content: repr(content[:8]),
)
def test_files_that_are_not_json(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "r.json"
    path.write_bytes(content)
    with pytest.raises(DataError, match=f"{path} is not a record of ptq eval: not JSON"):
        read_record(path)


def test_numbers_that_json_does_not_have_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "r.json"
    for text in ("NaN", "Infinity", "-Infinity"):
        path.write_text(json.dumps(whole().to_dict()).replace('"nll": 52.5', f'"nll": {text}'))
        assert text in path.read_text()
        with pytest.raises(DataError, match=f"not JSON .*{text}"):
            read_record(path)


def test_bases_within_bases_within_bases(tmp_path: Path) -> None:
    """As deep as a parser of JSON goes: read, or a `DataError`."""
    bare = json.dumps(made_record("x", []).to_dict() | {"base": "HERE"})
    before, after = bare.split('"HERE"')
    path = tmp_path / "r.json"
    for depth in (100, 300, 480, 900, 5000):
        path.write_text(before * depth + "null" + after * depth)
        with contextlib.suppress(DataError):
            read_record(path)


def test_files_that_cannot_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(OutputError, match=r"cannot read the record .*nowhere\.json: No such file"):
        read_record(tmp_path / "nowhere.json")
    with pytest.raises(OutputError, match="cannot read the record"):
        read_record(tmp_path)
    path = tmp_path / "r.json"
    path.write_text(json.dumps(whole().to_dict()))
    assert read_record(str(path)).to_dict() == whole().to_dict()
    monkeypatch.setattr("evals.record._LARGEST_FILE", 100)
    with pytest.raises(DataError, match="bytes: that is no record"):
        read_record(path)


def test_a_damaged_record_names_its_file(tmp_path: Path) -> None:
    path = tmp_path / "r.json"
    path.write_text(json.dumps(whole().to_dict() | {"texts": 3}))
    with pytest.raises(DataError, match=f"{path}: the record is damaged"):
        read_record(path)
