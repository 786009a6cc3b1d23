"""The GPTQ container: golden bytes, an independent slow formula, what it refuses, and what readers find in configs."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

import ptq
from calib.checkpoint.reader import open_model
from ptq import QuantizedWeight, Scheme
from ptq.containers.gptq import GPTQ, GPTQ_V2, GptqContainer
from ptq.containers.select import select_container
from ptq.errors import OutputError, UsageError
from tests.support.packed_checkpoints import words
from tests.support.tiny_models import tiny_model

OUT, WIDTH, GROUP = 32, 64, 32


def random_weight(bits: int, symmetric: bool) -> QuantizedWeight:
    scheme = Scheme(bits, symmetric, GROUP, "float16")
    generator = torch.Generator().manual_seed(bits)
    codes = torch.randint(0, 2**bits, (OUT, WIDTH), generator=generator, dtype=torch.uint8)
    params = {"scale": torch.rand(OUT, WIDTH // GROUP, generator=generator).half()}
    if not symmetric:
        params["zero"] = torch.randint(0, 2**bits, (OUT, WIDTH // GROUP), generator=generator, dtype=torch.uint8)
    return QuantizedWeight(codes, params, scheme)


def test_golden_words() -> None:
    scheme = Scheme(4, True, 32, "float16")
    codes = torch.zeros(32, 32, dtype=torch.uint8)
    codes[0, :8] = torch.arange(8)  # the first output channel: nibbles 7 6 5 4 3 2 1 0 of its first word
    tensors = GPTQ.layer_tensors("x", QuantizedWeight(codes, {"scale": torch.ones(32, 1).half()}, scheme))
    assert tensors["x.qweight"][:, 0].tolist() == [0x76543210, 0, 0, 0]
    assert tensors["x.qzeros"].tolist() == [[0x77777777] * 4]  # the zero point 8 less 1
    assert tensors["x.g_idx"].tolist() == [0] * 32
    stored = GPTQ_V2.layer_tensors("x", QuantizedWeight(codes, {"scale": torch.ones(32, 1).half()}, scheme))
    assert stored["x.qzeros"].to(torch.int64).bitwise_and(0xFFFFFFFF).tolist() == [[0x88888888] * 4]


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_tensors_are_those_of_a_slow_formula(bits: int, symmetric: bool) -> None:
    weight = random_weight(bits, symmetric)
    tensors = GPTQ_V2.layer_tensors("x", weight)
    columns = [words(row.tolist(), bits) for row in weight.codes]
    assert tensors["x.qweight"].tolist() == [list(word) for word in zip(*columns, strict=True)]
    zeros = weight.params.get("zero", torch.full((OUT, WIDTH // GROUP), 2 ** (bits - 1)))
    assert tensors["x.qzeros"].tolist() == [words(zeros[:, group].tolist(), bits) for group in range(WIDTH // GROUP)]
    assert torch.equal(tensors["x.scales"], weight.params["scale"].T)
    back = GPTQ_V2.read_layer("x", tensors, weight.scheme, (OUT, WIDTH))
    assert torch.equal(back.dequantize(), weight.dequantize())


def test_the_first_version_comes_back_too() -> None:
    weight = random_weight(4, False)
    back = GPTQ.read_layer("x", GPTQ.layer_tensors("x", weight), weight.scheme, (OUT, WIDTH))
    assert torch.equal(back.dequantize(), weight.dequantize())


def test_damaged_tensors_are_named() -> None:
    tensors = GPTQ.layer_tensors("x", random_weight(4, True))
    with pytest.raises(OutputError, match=r"x\.qweight is missing"):
        GPTQ.read_layer(
            "x", {k: v for k, v in tensors.items() if "qweight" not in k}, Scheme(4, True, 32), (OUT, WIDTH)
        )
    with pytest.raises(OutputError, match=r"x\.scales is \[1, 32\], .* needs \[2, 32\]"):
        GPTQ.read_layer("x", tensors | {"x.scales": torch.ones(1, 32)}, Scheme(4, True, 32), (OUT, WIDTH))


REFUSED: dict[str, tuple[Scheme, nn.Linear, str]] = {
    "bits": (Scheme(5, True, 32, "float16"), nn.Linear(64, 32), "5 bits, and GPTQ takes 2, 3, 4, 8"),
    "ragged": (Scheme(4, True, 48, "float16"), nn.Linear(64, 32), "64 input channels, not a multiple"),
    "odd": (Scheme(4, True, 20, "float16"), nn.Linear(80, 32), "32 x 80, and GPTQ takes multiples of 32"),
    "format": (Scheme.of("fp4"), nn.Linear(64, 32), "fp4 g32, and gptq holds integers"),
    "inputs": (Scheme(4, True, 32, "float16", act_bits=8), nn.Linear(64, 32), "rounded to 8 bits at run time"),
    "rotated": (Scheme(4, True, 32, "float16", input_rotation=1), nn.Linear(64, 32), "rotated at run time"),  # type: ignore[arg-type]
    "scales": (Scheme(4, True, 32, "float16"), nn.Linear(64, 32, dtype=torch.bfloat16), "float16 scales"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_it_cannot_carry_is_refused(case: str) -> None:
    scheme, linear, reason = REFUSED[case]
    with pytest.raises(UsageError, match=reason):
        select_container("gptq", {"a": scheme}, {"a": linear}, tiny_model("llama"))


@pytest.mark.parametrize(
    ("bits", "symmetric", "name"), [(4, True, "gptq"), (8, True, "gptq"), (3, True, "gptq_v2"), (4, False, "gptq_v2")]
)
def test_the_version_of_the_layout(bits: int, symmetric: bool, name: str) -> None:
    scheme = Scheme(bits, symmetric, 32, "float16")
    chosen, _ = select_container("gptq", {"a": scheme}, {"a": nn.Linear(64, 32)}, tiny_model("llama"))
    assert chosen == name


def test_deviating_linears_are_named_for_readers() -> None:
    model = tiny_model("llama")
    names = [f"model.layers.{block}.{leaf}" for block in (0, 1) for leaf in ("mlp.up_proj", "mlp.down_proj")]
    usual, other = Scheme(4, True, 32, "float16"), Scheme(8, True, None, "float16")
    schemes: dict[str, Scheme | None] = dict.fromkeys(names, usual) | {names[1]: other, names[3]: None}
    linears = {name: model.get_submodule(name) for name in names} | {"lm_head": model.lm_head}
    config = GPTQ.quantization_config(schemes, linears)
    assert (config["bits"], config["group_size"], config["sym"]) == (4, 32, True)
    assert config["dynamic"] == {
        r"-:^model\.layers\.1\.mlp\.down_proj$": {},
        r"+:^model\.layers\.0\.mlp\.down_proj$": {"bits": 8, "group_size": -1, "sym": True},
    }
    assert "modules_in_block_to_quantize" not in config  # the blocks differ
    schemes |= {names[1]: None}
    assert GPTQ.quantization_config(schemes, linears)["modules_in_block_to_quantize"] == [["mlp.up_proj"]]


@pytest.mark.parametrize(("fields", "container"), [({"bits": 4}, GPTQ), ({"bits": 3, "symmetric": False}, GPTQ_V2)])
def test_a_model_is_written_and_read_back(tmp_path: Path, fields: dict[str, object], container: GptqContainer) -> None:
    model = tiny_model("llama")
    arguments = {"method": "rtn", "group_size": 32, "device": "cpu", **fields}
    report = ptq.quantize(model, out=tmp_path / "gptq", format="gptq", **arguments)  # type: ignore[arg-type]
    plain = ptq.quantize(model, out=tmp_path / "native", container="native", **arguments)  # type: ignore[arg-type]
    assert report.container == container.name
    assert (tmp_path / "gptq" / "quantize_config.json").is_file()
    source = open_model(tmp_path / "gptq")
    source.load(source.tensor_names())
    wanted = ptq.load(tmp_path / "native")
    for row in plain.layers:
        linear = wanted.get_submodule(row.name)
        found = source.skeleton.get_submodule(row.name).weight  # type: ignore[union-attr]
        assert torch.equal(found, linear.dequantize().half())  # type: ignore[operator]
