"""``ptq bench``: figures of kernels and of generation, in tables and as JSON."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from cli.main import main
from ptq.errors import UsageError
from ptq.number_formats import FORMATS
from ptq.runtime import benchmark
from ptq.runtime.benchmark import parse_format, random_layer
from ptq.scheme import Scheme


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(benchmark, "_BYTES", {"cpu": 10_000})
    monkeypatch.setattr(benchmark, "_COPY", {"cpu": 1 << 16})
    timed = benchmark._on_cpu
    monkeypatch.setattr(benchmark, "_on_cpu", lambda calls, budget: timed(calls, 0.0))


def test_kernels_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--shape", "48x256,16x64", "--batch", "1,3", "--format", "int4,nvfp4", "--device", "cpu"]
    assert main(["bench", "kernels", *arguments, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    rows = found["kernels"]
    assert [(row["shape"], row["format"], row["batch"]) for row in rows] == [
        (shape, name, batch)
        for shape in ([48, 256], [16, 64])
        for name in ("int4 sym g128", "nvfp4")
        for batch in (1, 3)
    ]
    for row in rows:
        assert row["kernel"] == "reference"
        assert row["speedup"] == pytest.approx(row["dense_seconds"] / row["seconds"])
        rate = row["weight_bytes"] / row["seconds"]
        assert row["bandwidth_share"] == pytest.approx(rate / found["copy_bytes_per_second"])


def test_kernels_as_a_table(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "kernels", "--shape", "16x64", "--format", "itq3s", "--device", "cpu"]) == 0
    out = capsys.readouterr().out
    assert "16x64" in out
    assert "times bf16" in out


def test_generation(tiny_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sizes = ["--prompt-tokens", "5", "--new-tokens", "3", "--device", "cpu"]
    assert main(["bench", "generate", str(tiny_folder), "--against", str(tiny_folder), *sizes, "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)["models"]
    assert len(rows) == 2
    for row in rows:
        assert row["prompt_tokens"] == 5
        assert row["tokens_per_second"] > 0
        assert row["first_token_seconds"] > 0
        assert 0 < row["weight_bytes"] < row["peak_bytes"]
    assert main(["bench", "generate", str(tiny_folder), *sizes]) == 0
    assert "tokens/s" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--shape", "4096"], "--shape takes rows x columns"),
        (["--batch", "0"], "--batch takes whole numbers"),
        (["--format", "int9"], "int9"),
        (["--format", "nvfp4", "--shape", "8x40"], "cannot store a weight of 8 x 40"),
    ],
)
def test_bad_values_are_refused(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "kernels", "--device", "cpu", *arguments]) == 2
    assert message in capsys.readouterr().err


def test_names_of_formats() -> None:
    assert parse_format("int4") == Scheme(4, group_size=128, scale_dtype="bfloat16")
    assert parse_format("int3g64asym") == Scheme(3, symmetric=False, group_size=64, scale_dtype="bfloat16")
    assert parse_format("itq3s") == Scheme.of("itq3s")
    with pytest.raises(UsageError):
        parse_format("fp5")


@pytest.mark.parametrize("name", FORMATS)
def test_random_layers_compute(name: str) -> None:
    layer = random_layer(Scheme.of(name).resolved(torch.bfloat16), (16, 512), torch.device("cpu"))
    assert torch.isfinite(layer(torch.ones(1, 512, dtype=torch.bfloat16))).float().mean() > 0.9
