"""Records of version 1 read as records of today."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from calib.errors import DataError
from evals.compare import compare
from evals.record import Record, read_record

RESULTS = Path(__file__).parents[2] / "docs" / "results"
OLD = sorted(RESULTS.glob("2026-11-23-coreq-smollm2-32x512-*.eval.json"))


def perplexity(means: list[float], seqlen: int = 5) -> dict[str, Any]:
    tokens = len(means) * (seqlen - 1)
    return {
        "perplexity": 2.0,
        "bits_per_byte": 1.0,
        "mean_nll": sum(means) / len(means),
        "standard_error": 0.1,
        "nll": sum(means) * (seqlen - 1),
        "tokens": tokens,
        "bytes": 3 * tokens,
        "segments": len(means),
        "seqlen": seqlen,
        "segment_nll": means,
        "notes": ["whole forward"],
    }


def old_record(**changes: Any) -> dict[str, Any]:
    """As ptq 0.1.0 wrote it with --against."""
    return {
        "record": "ptq-eval",
        "version": 1,
        "date": "2026-01-01T00:00:00+00:00",
        "model": "OUT",
        "base": "MODEL",
        "text": {"source": "a.txt", "sha256": "5" * 64, "notes": ["a note"]},
        "tokenizer_hash": "7" * 64,
        "protocol": {"convention": "segments", "seqlen": 5, "max_tokens": None, "batch_size": 2},
        "perplexity": perplexity([1.0, 2.0, 3.5]),
        "base_perplexity": perplexity([0.5, 1.75, 3.0]),
        "divergence": {
            **dict.fromkeys(["kl_mean", "kl_median", "kl_p99", "kl_p999", "kl_max"], 0.25),
            "kl_standard_error": 0.01,
            "top1_agreement": 0.875,
            "log_ratio": 0.4167,
            "log_ratio_standard_error": None,
        },
        "seconds": 1.5,
        "environment": {"python": "3.11", "device": "cpu", "dtype": "float32"},
    } | changes


def test_figures_and_items() -> None:
    record = Record.from_dict(old_record())
    (text,) = record.texts
    assert text.items["nll"].tolist() == [4.0, 8.0, 14.0]
    assert text.items["tokens"].tolist() == [4, 4, 4]
    assert (text.nll, text.tokens, text.bytes, text.words) == (26.0, 12, 36, None)
    assert text.standard_error == pytest.approx(np.std([1.0, 2.0, 3.5], ddof=1) / np.sqrt(3))
    assert text.notes == ("a note", "whole forward")
    assert text.divergence is not None
    assert (text.divergence.kl_mean, text.divergence.kl_high, text.divergence.kl_draw_error) == (0.25, 0.25, 0.0)
    assert text.divergence.top1_agreement == 0.875
    assert text.divergence.dp_rms is None
    assert (record.model.source, record.model.recipe, record.tasks) == ("OUT", None, ())
    assert record.environment["batch_size"] == 2


def test_the_base_comes_along_and_is_compared() -> None:
    record = Record.from_dict(old_record())
    assert record.base is not None
    assert record.base.model.source == "MODEL"
    assert record.base.texts[0].items.fingerprint == record.texts[0].items.fingerprint
    (difference,) = compare([record]).differences
    assert difference.difference == pytest.approx((0.5 + 0.25 + 0.5) / 3)
    without = Record.from_dict(old_record(base=None, base_perplexity=None, divergence=None))
    assert without.base is None
    assert without.texts[0].divergence is None


def test_written_again_it_is_of_today() -> None:
    record = Record.from_dict(old_record())
    again = Record.from_dict(json.loads(json.dumps(record.to_dict(), allow_nan=False)))
    assert again.version == 2
    assert again.texts[0].items["nll"].tolist() == record.texts[0].items["nll"].tolist()
    assert again.to_dict() == record.to_dict()


@pytest.mark.parametrize(
    ("changes", "alike"),
    [
        ({"model": "other"}, True),
        ({"text": {"source": "b.txt", "sha256": "5" * 64, "notes": []}}, True),
        ({"text": {"source": "a.txt", "sha256": "6" * 64, "notes": []}}, False),
        ({"tokenizer_hash": "8" * 64}, False),
    ],
)
def test_hashes_are_of_the_protocol(changes: dict[str, Any], alike: bool) -> None:
    first, second = Record.from_dict(old_record()), Record.from_dict(old_record(**changes))
    same = set(first.texts[0].items.ids.tolist()) & set(second.texts[0].items.ids.tolist())
    assert len(same) == (3 if alike else 0)


def test_a_shorter_evaluation_shares_its_segments() -> None:
    long = Record.from_dict(old_record())
    short = Record.from_dict(old_record(model="b", perplexity=perplexity([1.5, 2.0])))
    with pytest.raises(DataError, match=r"3 in OUT, 2 in b; 2 are shared"):
        compare([long, short])
    (difference,) = compare([long, short], shared=True).differences
    assert (difference.items, difference.difference) == (2, pytest.approx(0.25))


@pytest.mark.parametrize(
    "changes",
    [
        {"perplexity": None},
        {"perplexity": {"segments": 1}},
        {"perplexity": perplexity([1.0]) | {"segments": 2}},
        {"perplexity": perplexity([1.0]) | {"segment_nll": [[1.0]]}},
        {"perplexity": perplexity([1.0]) | {"segment_nll": ["x"]}},
        {"divergence": {}},
        {"text": "a.txt"},
        {"environment": 3},
        {"protocol": None},
    ],
)
def test_damage_is_named(changes: dict[str, Any]) -> None:
    with pytest.raises(DataError, match="version 1 is damaged"):
        Record.from_dict(old_record(**changes))


def test_missing_fields_are_named() -> None:
    for name in ("date", "model", "text", "protocol", "perplexity", "divergence", "seconds", "environment"):
        data = {key: value for key, value in old_record().items() if key != name}
        with pytest.raises(DataError, match=f"KeyError: '{name}'"):
            Record.from_dict(data)


@pytest.mark.parametrize("path", OLD, ids=lambda path: path.name)
def test_records_that_a_release_wrote(path: Path) -> None:
    data = json.loads(path.read_text())
    record = read_record(path)
    (text,) = record.texts
    assert text.perplexity == pytest.approx(data["perplexity"]["perplexity"])
    runs = [np.mean(data["perplexity"]["segment_nll"][i : i + 3]) for i in range(0, 30, 3)]  # 32 segments: runs of 3
    assert text.standard_error == pytest.approx(np.std(runs, ddof=1) / 10**0.5, rel=0.15)
    assert text.bits_per_byte == pytest.approx(data["perplexity"]["bits_per_byte"])
    assert len(text.items) == 32


def test_two_of_them_are_compared() -> None:
    assert len(OLD) == 2
    coreq, gptq = OLD
    (difference,) = compare([read_record(gptq), read_record(coreq)]).differences
    before, after = (json.loads(path.read_text())["perplexity"]["segment_nll"] for path in (gptq, coreq))
    assert difference.difference == pytest.approx(np.mean(after) - np.mean(before))
    assert difference.verdict == "better"
