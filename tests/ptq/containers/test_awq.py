"""The AWQ container: golden bytes, an independent slow formula, what it refuses, and models read back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import ptq
from calib.checkpoint.reader import open_model
from ptq import QuantizedWeight, Scheme
from ptq.containers.awq import AWQ
from ptq.containers.select import select_container
from ptq.errors import OutputError, UsageError
from ptq.export import export
from tests.support.tiny_models import tiny_model

OUT, WIDTH, GROUP = 32, 64, 32


def random_weight(symmetric: bool) -> QuantizedWeight:
    generator = torch.Generator().manual_seed(3)
    codes = torch.randint(0, 16, (OUT, WIDTH), generator=generator, dtype=torch.uint8)
    params = {"scale": torch.rand(OUT, WIDTH // GROUP, generator=generator).half()}
    if not symmetric:
        params["zero"] = torch.randint(0, 16, (OUT, WIDTH // GROUP), generator=generator, dtype=torch.uint8)
    return QuantizedWeight(codes, params, Scheme(4, symmetric, GROUP, "float16"))


def word(values: list[int]) -> int:
    """Eight numbers of neighbouring output channels as AutoAWQ packs them, signed."""
    found = sum(value << shift for value, shift in zip(values, (0, 16, 4, 20, 8, 24, 12, 28), strict=True))
    return found - 2**32 if found >= 2**31 else found


def test_golden_words() -> None:
    codes = torch.zeros(32, 32, dtype=torch.uint8)
    codes[:8, 0] = torch.arange(8)  # of the first input channel
    weight = QuantizedWeight(codes, {"scale": torch.ones(32, 1).half()}, Scheme(4, True, 32, "float16"))
    tensors = AWQ.layer_tensors("x", weight)
    assert tensors["x.qweight"][0].tolist() == [0x75316420, 0, 0, 0]
    assert tensors["x.qweight"][1:].count_nonzero() == 0
    assert tensors["x.qzeros"].to(torch.int64).bitwise_and(0xFFFFFFFF).tolist() == [[0x88888888] * 4]


@pytest.mark.parametrize("symmetric", [True, False])
def test_tensors_are_those_of_a_slow_formula(symmetric: bool) -> None:
    weight = random_weight(symmetric)
    tensors = AWQ.layer_tensors("x", weight)
    zeros = weight.params.get("zero", torch.full((OUT, WIDTH // GROUP), 8))
    for stored, values in ((tensors["x.qweight"], weight.codes), (tensors["x.qzeros"], zeros)):
        wanted = [[word(column[i : i + 8].tolist()) for i in range(0, OUT, 8)] for column in values.T]
        assert stored.tolist() == wanted
    assert torch.equal(tensors["x.scales"], weight.params["scale"].T)
    back = AWQ.read_layer("x", tensors, weight.scheme, (OUT, WIDTH))
    assert torch.equal(back.dequantize(), weight.dequantize())


def test_damaged_tensors_are_named() -> None:
    tensors = AWQ.layer_tensors("x", random_weight(False))
    with pytest.raises(OutputError, match=r"x\.qweight is \[64, 3\], .* needs \[64, 4\]"):
        AWQ.read_layer("x", tensors | {"x.qweight": tensors["x.qweight"][:, :3]}, Scheme(4, False, GROUP), (OUT, WIDTH))
    with pytest.raises(OutputError, match="other zero points than 8"):
        AWQ.read_layer("x", tensors, Scheme(4, True, GROUP), (OUT, WIDTH))


REFUSED: dict[str, tuple[Scheme, nn.Linear, str]] = {
    "bits": (Scheme(3, True, 32, "float16"), nn.Linear(64, 32), "3 bits, and awq takes 4: gptq takes 2, 3, 4 and 8"),
    "ragged": (Scheme(4, True, 48, "float16"), nn.Linear(64, 32), "64 input channels, not a multiple"),
    "groups": (Scheme(4, True, 16, "float16"), nn.Linear(64, 32), "groups of 16, and awq takes multiples of 32"),
    "sizes": (Scheme(4, True, 32, "float16"), nn.Linear(64, 24), "24 x 64, and awq takes multiples of 32"),
    "format": (Scheme.of("fp4"), nn.Linear(64, 32), "fp4 g32, and awq holds integers"),
    "rotated": (Scheme(4, True, 32, "float16", input_rotation=1), nn.Linear(64, 32), "rotated at run time"),  # type: ignore[arg-type]
    "scales": (Scheme(4, True, 32, "float16"), nn.Linear(64, 32, dtype=torch.bfloat16), "float16 scales"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_it_cannot_carry_is_refused(case: str) -> None:
    scheme, linear, reason = REFUSED[case]
    with pytest.raises(UsageError, match=reason):
        select_container("awq", {"a": scheme}, {"a": linear}, tiny_model("llama"))


def test_one_group_size_for_all() -> None:
    schemes: dict[str, Any] = {"a": Scheme(4, True, 32, "float16"), "b": Scheme(4, True, 64, "float16")}
    with pytest.raises(UsageError, match=r"b is int4 sym g64 and a int4 sym g32, .* \(--ignore\)"):
        select_container("awq", schemes, dict.fromkeys("ab", nn.Linear(64, 32)), tiny_model("llama"))


@pytest.mark.parametrize("symmetric", [True, False])
def test_a_model_is_written_and_read_back(tmp_path: Path, symmetric: bool) -> None:
    model = tiny_model("llama", torch.bfloat16)
    fields: dict[str, Any] = {"method": "rtn", "bits": 4, "group_size": 32, "symmetric": symmetric, "device": "cpu"}
    report = ptq.quantize(model, out=tmp_path / "awq", format="awq", ignore=("*.0.*.down_proj",), **fields)
    assert report.container == "awq"
    export(tmp_path / "awq", format="native", out=tmp_path / "native")
    source = open_model(tmp_path / "awq")
    assert source.quantization is not None
    assert source.quantization.method == "awq"
    source.load(source.tensor_names())
    wanted = ptq.load(tmp_path / "native")
    for row in report.layers:
        linear: Any = wanted.get_submodule(row.name)
        found: Any = source.skeleton.get_submodule(row.name)
        assert torch.equal(found.weight, linear.dequantize().bfloat16())
    config: Any = source.stored_config()["quantization_config"]
    assert config["modules_to_not_convert"] == ["lm_head", "model.layers.0.mlp.down_proj"]
