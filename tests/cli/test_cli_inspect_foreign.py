"""``ptq inspect`` of folders that other programs wrote: a row per weight, with the bits that it really takes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from cli.main import main
from tests.support.packed_checkpoints import CASES, GROUP, change_config, write

ROWS: dict[str, tuple[str, float]] = {
    # codes, 16 bits of scale and of zero point per group where there are any; GPTQ's zero points have the codes' bits
    "gptq-3": (f"int3 g{GROUP}", 3 + 19 / GROUP),
    "awq": (f"int4 g{GROUP}", 4 + 20 / GROUP),
    "ct-4-sym": (f"int4 g{GROUP}", 4 + 16 / GROUP),
    "ct-4-asym": (f"int4 g{GROUP}", 4 + 20 / GROUP),
    "ct-int8": ("int8 per channel", 8.0),
    "fp8-tensor": ("fp8", 8.0),
}


def inspected(folder: Path, capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    assert main(["inspect", str(folder), "--json"]) == 0
    data: dict[str, Any] = json.loads(capsys.readouterr().out)
    return data


@pytest.mark.parametrize("case", ROWS)
def test_a_packed_weight_is_one_row_with_its_real_bits(
    case: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config, _, make = CASES[case]
    dense = write(tmp_path, config, make)
    data = inspected(tmp_path, capsys)
    rows = {row["name"]: row for row in data["tensors"]}
    kind, bits = ROWS[case]
    for name, weight in dense.items():
        row = rows[name]
        assert (row["type"], row["shape"]) == (kind, list(weight.shape))
        beside = 32 / len(weight) + 128 / weight.numel() + 16 / weight.shape[1]  # g_idx, weight_shape, scales
        assert bits - 1e-9 <= 8 * row["bytes"] / weight.numel() <= bits + beside
    assert not any(name.endswith(("qweight", "weight_packed", "qzeros", "scales")) for name in rows)
    assert data["numbers"] == sum(_product(row["shape"]) for row in data["tensors"])
    assert data["bits_per_weight"] == pytest.approx(8 * data["bytes"] / data["numbers"])
    file_bytes = (tmp_path / "model.safetensors").stat().st_size
    assert data["file_bytes"] == file_bytes
    assert 0 < file_bytes - data["bytes"] < 20_000  # the header
    assert main(["inspect", str(tmp_path)]) == 0
    assert "bits per weight" in capsys.readouterr().out


def test_a_packing_that_is_not_read_is_shown_as_it_is_stored_and_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config, _, make = CASES["gptq-4"]
    write(tmp_path, config, make)
    change_config(tmp_path, quantization_config={"quant_method": "hqq"})
    data = inspected(tmp_path, capsys)
    assert data["bits_per_weight"] is None
    assert "hqq" in data["note"]
    assert main(["inspect", str(tmp_path)]) == 0
    assert "bits per stored number" in capsys.readouterr().out


def _product(shape: list[int]) -> int:
    total = 1
    for size in shape:
        total *= size
    return total
