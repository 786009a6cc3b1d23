"""``ptq compare``: the tables, the JSON, the picture, what is refused."""

from __future__ import annotations

import json
import sys
import types
from pathlib import Path

import numpy as np
import pytest

from cli.main import main
from cli.shared.terminal.screen import PIPE_WIDTH
from evals.record import Record
from tests.support.record_factory import made_divergence, made_record, made_task, made_text, recipe

RNG = np.random.default_rng(0)
BASE = RNG.normal(30, 3, 12)
RIGHT = RNG.integers(0, 2, 300)


def quantized(source: str, method: str, shift: float, seed: int = 0) -> Record:
    rng = np.random.default_rng(seed)
    nll = BASE + shift * rng.normal(1, 0.2, 12)
    columns = {"kl": np.abs(nll - BASE), "same_top": [9] * 12}
    right = np.where(rng.random(300) < shift / 20, 0, RIGHT)
    results = [
        made_text(nll.tolist(), name="words", columns=columns, divergence=made_divergence("f")),
        made_task(right.tolist(), name="quiz"),
        made_task(right.tolist()[:100], name="riddles"),
    ]
    return made_record(source, results, **recipe(method, seed=seed))


@pytest.fixture
def paths(tmp_path: Path) -> list[str]:
    """The base, two seeds of one method, one of another."""
    tasks = [made_task(RIGHT.tolist(), name="quiz"), made_task(RIGHT.tolist()[:100], name="riddles")]
    records = {
        "base": made_record("hub/tiny-model", [made_text(BASE.tolist(), name="words"), *tasks]),
        "c0": quantized("c0", "coreq", 1.0, 0),
        "c1": quantized("c1", "coreq", 1.1, 1),
        "g0": quantized("g0", "gptq", 6.0, 2),
    }
    for name, record in records.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(record.to_dict(), allow_nan=False))
    return [str(tmp_path / f"{name}.json") for name in records]


def test_tables_and_sentences(paths: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compare", *paths]) == 0
    shown = capsys.readouterr().out
    lines = shown.splitlines()
    tables = lines[: next(i for i, line in enumerate(lines) if line.startswith("n.s.: "))]
    assert max(map(len, tables)) <= PIPE_WIDTH
    titles = [line.strip() for line in tables if line.strip().endswith("items")]
    assert titles == [
        "words: ln ppl, 12 items",
        "words: kl, 12 items",
        "quiz: acc, 300 items",
        "riddles: acc, 100 items",
        "average of tasks: accuracy, 400 items",
    ]
    row = next(line for line in tables if line.startswith("gptq int3 sym g64 "))
    assert row.rstrip().endswith("worse")
    assert "gptq int3 sym g64 - " in shown
    assert "gptq int3 sym g64 is worse than tiny-model on words: ln ppl +" in shown
    assert "2 calibration seeds (0, 1) pooled" in shown
    assert "lost/won" in shown
    assert "p_gold" not in shown


def test_all_measures(paths: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compare", *paths, "--all", "--confidence", "0.9"]) == 0
    shown = capsys.readouterr().out
    for measure in ("words: top1", "quiz: acc_norm", "quiz: p_gold", "riddles: ll_gold"):
        assert measure in shown
    assert "90 % interval" in shown


def test_labels(paths: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    names = ["full", "[b]x[/b]", "second", "third"]
    assert main(["compare", *paths, *(word for name in names for word in ("--label", name))]) == 0
    shown = capsys.readouterr().out
    assert "third is worse than full" in shown
    assert "[b]x[/b]" in shown.split("n.s.:")[0]


def test_json_is_the_comparison(paths: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compare", *paths, "--json"]) == 0
    data = json.loads(capsys.readouterr().out)
    assert (data["compare"], data["version"], data["confidence"]) == ("ptq-compare", 2, 0.95)
    assert [c["label"] for c in data["candidates"]] == ["tiny-model", "coreq int3 sym g64", "gptq int3 sym g64"]
    kl = [d for d in data["differences"] if d["measure"] == "kl"]
    assert [(d["reference"], d["candidate"]) for d in kl] == [("coreq int3 sym g64", "gptq int3 sym g64")]


def test_shared(paths: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shorter = made_record("short", [made_task([1] * 50, name="quiz")])
    (tmp_path / "short.json").write_text(json.dumps(shorter.to_dict()))
    arguments = ["compare", paths[0], str(tmp_path / "short.json")]
    assert main(arguments) == 4
    assert "50 are shared" in capsys.readouterr().err
    assert main([*arguments, "--shared"]) == 0
    assert "only the 50 shared items" in capsys.readouterr().out.replace("\n", " ")


def test_the_picture_is_asked_for(
    paths: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    drawn = []
    module = types.ModuleType("evals.report.figures")
    module.comparison_picture = lambda found, path: drawn.append((len(found.candidates), path))  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "evals.report.figures", module)
    assert main(["compare", *paths, "-o", str(tmp_path / "x.SVG")]) == 0
    assert drawn == [(3, tmp_path / "x.SVG")]


@pytest.mark.parametrize(
    ("more", "code", "message"),
    [
        (["nowhere.json"], 6, "cannot read the record nowhere.json"),
        (["{folder}/broken.json"], 4, "broken.json is not a record of ptq eval: not JSON"),
        (["{folder}/other.json"], 4, "other.json: not a record of ptq eval"),
        (["{c0}", "-o", "x.pdf"], 2, "end its name in .svg, .png, .html"),
        (["{c0}", "-o", "{folder}/no/x.svg"], 6, "there is no folder"),
        (["{c0}", "--label", "a"], 2, "labels: 1, records: 2"),
        (["{c0}", "--confidence", "95"], 2, "must be in 0.5 .. 0.9999, got 95"),
        ([], 2, "one record only (hub/tiny-model)"),
    ],
)
def test_what_is_refused(
    more: list[str], code: int, message: str, paths: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "broken.json").write_text("{")
    (tmp_path / "other.json").write_text('{"record": "something"}')
    words = [word.format(folder=tmp_path, c0=paths[1]) for word in more]
    assert main(["compare", paths[0], *words]) == code
    assert message in capsys.readouterr().err
    assert main(["compare", paths[0], *words, "--json"]) == code
    assert message in json.loads(capsys.readouterr().out)["error"]["message"]


def test_no_records_at_all(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compare"]) == 2
    assert "ptq compare --help" in capsys.readouterr().err
