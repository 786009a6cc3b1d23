"""What every row of the table of number formats does: fit, grid, pack, unpack, dequantize by rows, sizes, methods."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import ptq
from calib.stats import LinearStatistics, Stat, StatisticsAccumulator
from ptq import QuantizedWeight, Scheme
from ptq.errors import UsageError
from ptq.methods import METHODS, LayerMethod
from ptq.number_formats import FORMATS, join_groups
from ptq.runtime.linear import QuantLinear
from tests.support.tiny_models import tiny_model

WIDTH, ROWS = 256, 24


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        result: Tensor = model(torch.arange(12).reshape(2, 6)).logits
    return result


def weight_of(seed: int = 0, width: int = WIDTH) -> Tensor:
    return torch.randn(ROWS, width, generator=torch.Generator().manual_seed(seed)) / width**0.5


def nearest(weight: Tensor, scheme: Scheme) -> QuantizedWeight:
    record = scheme.number_format
    grid = record.grid(record.fit(weight, scheme), scheme, weight.shape[1])
    return QuantizedWeight.from_grid(grid.round(weight), grid, scheme)


MISMATCH = 1.01  # the full-precision model has inputs larger by this


def statistics() -> LinearStatistics:
    needs = frozenset({Stat.HESSIAN, Stat.MISMATCH, Stat.MISMATCH_ENERGY})
    accumulator = StatisticsAccumulator("layer", {"layer": weight_of()}, needs)
    inputs = torch.randn(4, 128, WIDTH, generator=torch.Generator().manual_seed(1))
    inputs = inputs @ torch.randn(WIDTH, WIDTH, generator=torch.Generator().manual_seed(2)) / WIDTH**0.5
    accumulator.add(inputs, inputs * MISMATCH)
    return accumulator.finish().of("layer")


@pytest.mark.parametrize("name", FORMATS)
def test_what_is_stored_is_what_was_rounded(name: str) -> None:
    scheme = Scheme.of(name)
    weight = nearest(weight_of(), scheme)
    tensors = weight.tensors()
    specs = scheme.number_format.tensor_specs(ROWS, WIDTH, scheme)
    assert {key: (tuple(t.shape), t.dtype) for key, t in tensors.items()} == specs
    back = QuantizedWeight.from_tensors(tensors, scheme, (ROWS, WIDTH))
    assert torch.equal(back.codes, weight.codes)
    assert torch.equal(back.dequantize(), weight.dequantize())
    rows = scheme.number_format.dequantize_rows(tensors, scheme, slice(5, 11), ROWS, WIDTH)
    assert torch.equal(rows, weight.dequantize()[5:11])
    layer = QuantLinear.from_quantized(weight)
    x = torch.randn(3, WIDTH)
    transformed = layer.transform_input(x)
    torch.testing.assert_close(layer(x), torch.nn.functional.linear(transformed, weight.dequantize()))
    assert torch.equal(layer.half().quantized().dequantize(), weight.dequantize())  # stored scales keep their bits
    error = (weight.dequantize() - weight_of()).square().sum() / weight_of().square().sum()
    limit = 0.25 if name == "itq3s-ternary" or scheme.bits == 2 else 0.05  # three or four levels
    assert error < limit, f"{name} stores {error:.1%} of the weight's energy as something else"


@pytest.mark.parametrize("name", FORMATS)
def test_real_bits_are_those_of_the_tensors(name: str) -> None:
    scheme = Scheme.of(name)
    bits = scheme.number_format.payload_bits(ROWS, WIDTH, scheme)
    tensors = nearest(weight_of(), scheme).tensors()
    stored = 8 * sum(tensor.nbytes for key, tensor in tensors.items() if key != "weight_shape")
    assert bits <= stored < 1.05 * bits


def test_names_tell_formats_apart() -> None:
    texts = {Scheme.of(name).describe() for name in FORMATS}
    assert len(texts) == len(FORMATS)
    assert all(record.name == name for name, record in FORMATS.items())


@pytest.mark.parametrize("method", [m for m in METHODS.values() if isinstance(m, LayerMethod)], ids=lambda m: m.name)
@pytest.mark.parametrize("name", FORMATS)
def test_every_layer_wise_method_rounds_onto_every_format_it_accepts(name: str, method: LayerMethod) -> None:
    scheme = Scheme.of(name)
    if method.unsupported_reason(scheme) is not None:
        pytest.skip(f"{method.name}: {method.unsupported_reason(scheme)}")
    config: Any = method.config()
    stats = statistics() if method.needs(config) else None
    weight = weight_of()
    result = method.quantize(weight, stats, scheme, config, scheme.number_format.share([weight], scheme))
    stored = QuantizedWeight.from_tensors(result.weight.tensors(), result.weight.scheme, (ROWS, WIDTH))
    assert torch.equal(stored.dequantize(), result.weight.dequantize())
    if stats is not None:
        # Output error in the metric of the inputs: no method that sees them may be worse than plain rounding.
        # Where the method makes good that inputs are too small, in whole or in part, it aims at a larger weight.
        aims = [weight * (1 + share * (MISMATCH - 1)) for share in torch.linspace(0, 1, 51)]
        errors = [
            min(float(((values - aim) @ stats.hessian * (values - aim)).sum()) for aim in aims)
            for values in (nearest(weight, scheme).dequantize(), stored.dequantize())
        ]
        assert errors[1] < errors[0]


def test_fp4_is_rounded_by_gptq_as_fp4() -> None:
    """The error of a grid that was stored as something else was .414 instead of .007."""
    scheme, weight = Scheme.of("fp4"), weight_of()
    method = METHODS["gptq"]
    assert isinstance(method, LayerMethod)
    stats = statistics()
    result = method.quantize(weight, stats, scheme, method.config(), {}).weight.dequantize()
    difference = result - weight
    loss = (difference @ stats.hessian * difference).sum() / (weight @ stats.hessian * weight).sum()
    assert loss < 0.01


def test_fp4_has_golden_bytes() -> None:
    values = torch.tensor([[0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0, 0.0]])
    scheme = Scheme.of("fp4", group_size=16)
    record = scheme.number_format
    grid = record.grid({"scale": torch.ones(1, 1, dtype=torch.float16)}, scheme, 16)
    weight = QuantizedWeight.from_grid(grid.round(values), grid, scheme)
    assert weight.tensors()["weight_packed"].flatten().tolist() == [0x10, 0x32, 0x54, 0x76, 0xA9, 0xCB, 0xED, 0x0F]
    assert torch.equal(weight.dequantize(), values)
    minus_zero = weight.tensors() | {"weight_packed": torch.full((1, 8), 0x88, dtype=torch.uint8)}
    assert torch.equal(QuantizedWeight.from_tensors(minus_zero, scheme, (1, 16)).dequantize(), torch.zeros(1, 16))


@pytest.mark.parametrize("width", [1, 31, 33, 75])
def test_fp4_takes_any_width(width: int) -> None:
    scheme, weight = Scheme.of("fp4"), weight_of(width=width)
    stored = nearest(weight, scheme)
    back = QuantizedWeight.from_tensors(stored.tensors(), scheme, (ROWS, width))
    assert torch.equal(back.dequantize(), stored.dequantize())
    rows = scheme.number_format.dequantize_rows(stored.tensors(), scheme, slice(0, 4), ROWS, width)
    assert torch.equal(rows, stored.dequantize()[:4])


def test_neighbouring_groups_are_joined() -> None:
    scheme = Scheme(4, False, 16, "float16")
    record, weight = scheme.number_format, weight_of()
    halves = [record.fit(half, scheme) for half in weight.split(WIDTH // 2, 1)]
    whole = record.fit(weight, scheme)
    joined = join_groups(halves)
    assert joined.keys() == whole.keys()
    assert all(torch.equal(joined[key], whole[key]) for key in whole)


def test_a_model_in_two_formats_is_stored_loaded_and_run(tmp_path: Path) -> None:
    recipe = ptq.Recipe(method="rtn", scheme=Scheme.of("fp4"), overrides=(("*.down_proj", Scheme(8, group_size=32)),))
    model = tiny_model("llama")
    report = ptq.quantize(model, recipe, out=tmp_path / "out", device="cpu")
    assert {layer.scheme["name"] for layer in report.layers} == {"fp4 g32", "int8 sym g32"}
    assert report.container == "native"
    stored = {k: v for p in (tmp_path / "out").glob("*.safetensors") for k, v in load_file(p).items()}
    assert stored["model.layers.0.self_attn.q_proj.weight_packed"].dtype == torch.uint8
    loaded = ptq.load(tmp_path / "out")
    assert loaded.model.layers[0].self_attn.q_proj.scheme.format == "fp4"
    difference = (logits(loaded) - logits(model)).square().mean() / logits(model).square().mean()
    assert 0 < difference < 0.05


def test_methods_that_compute_with_integers_refuse_other_formats(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"autoround cannot produce fp4 g32: .*Methods that can: coreq, gptaq, gptq"):
        ptq.quantize(
            tiny_model("llama"), out=tmp_path / "out", method="autoround", format="fp4", calib="pydoc", device="cpu"
        )
    assert not (tmp_path / "out").exists()
