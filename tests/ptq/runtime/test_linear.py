"""`QuantLinear`: exact against the dequantized weight, whatever the tile, the dtype, the groups or the device."""

from __future__ import annotations

import copy
import dataclasses

import pytest
import torch
from torch.nn import functional

from ptq.errors import OutputError
from ptq.quantized import QuantizedWeight
from ptq.runtime import dispatch
from ptq.runtime.activations import quantize_tokens
from ptq.runtime.linear import QuantLinear
from ptq.scheme import SCALE_DTYPES, Scheme
from ptq.transforms.hadamard import InputRotation
from tests.support.integer_weights import integer_weight, zero_of

SCHEMES = [
    Scheme(bits=3, group_size=32, scale_dtype="float16"),
    Scheme(bits=3, symmetric=False, group_size=32, scale_dtype="float16"),
    Scheme(bits=2, symmetric=False, group_size=28, scale_dtype="float16"),  # 96 = 3 * 28 + 12: a ragged last group
    Scheme(bits=5, group_size=128, scale_dtype="float16"),  # one group, shorter than its size
    Scheme(bits=8, symmetric=False, group_size=None, scale_dtype="float16"),
    Scheme(bits=7, group_size=None, scale_dtype="bfloat16"),
]


def random_weight(scheme: Scheme, out: int = 40, width: int = 96, seed: int = 0) -> QuantizedWeight:
    generator = torch.Generator().manual_seed(seed)
    top, groups = 2**scheme.bits, scheme.groups(width)
    codes = torch.randint(0, top, (out, width), generator=generator, dtype=torch.uint8)
    scale = torch.randn(out, groups, generator=generator).mul(0.02).to(SCALE_DTYPES[scheme.scale_dtype])
    zero = torch.randint(0, top, (out, groups), generator=generator, dtype=torch.uint8)
    return integer_weight(codes, scale, None if scheme.symmetric else zero, scheme)


def slow_value(weight: QuantizedWeight, row: int, column: int) -> float:
    group = column // (weight.scheme.group_size or weight.shape[1])
    zero = 2 ** (weight.scheme.bits - 1) if zero_of(weight) is None else int(zero_of(weight)[row, group])
    return (int(weight.codes[row, column]) - zero) * float(weight.params["scale"][row, group])


@pytest.mark.parametrize("scheme", SCHEMES, ids=Scheme.describe)
def test_weights_are_the_formula(scheme: Scheme) -> None:
    weight = random_weight(scheme)
    dequantized = QuantLinear.from_quantized(weight).dequantize()
    for row, column in [(0, 0), (7, 31), (7, 32), (39, 83), (39, 84), (39, 95)]:
        assert dequantized[row, column].item() == pytest.approx(slow_value(weight, row, column), rel=1e-6, abs=0)
    assert torch.equal(dequantized, weight.dequantize())


@pytest.mark.parametrize("scheme", SCHEMES, ids=Scheme.describe)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_forward_is_the_dense_forward(scheme: Scheme, dtype: torch.dtype) -> None:
    weight = random_weight(scheme)
    bias, x = torch.randn(40), torch.randn(2, 5, 96).to(dtype)
    layer = QuantLinear.from_quantized(weight, bias)
    y = layer(x)
    assert y.dtype == dtype
    assert torch.equal(y, functional.linear(x, weight.dequantize(dtype), bias.to(dtype)))


@pytest.mark.parametrize("scheme", SCHEMES[:3], ids=Scheme.describe)
def test_tiles_do_not_show(scheme: Scheme, monkeypatch: pytest.MonkeyPatch) -> None:
    weight, x = random_weight(scheme), torch.randn(3, 96)
    layer = QuantLinear.from_quantized(weight, torch.randn(40))
    whole = layer(x)
    monkeypatch.setattr(dispatch, "TILE_WEIGHTS", 7 * 96)
    assert torch.equal(layer.dequantize(), weight.dequantize())
    torch.testing.assert_close(layer(x), whole, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("scheme", SCHEMES, ids=Scheme.describe)
def test_quantized_is_the_inverse(scheme: Scheme) -> None:
    weight = random_weight(scheme)
    back = QuantLinear.from_quantized(weight).quantized()
    assert back.scheme == scheme
    assert torch.equal(back.codes, weight.codes)
    assert torch.equal(back.params["scale"], weight.params["scale"])
    assert (zero_of(back) is None) == (zero_of(weight) is None)
    assert zero_of(weight) is None or torch.equal(zero_of(back), zero_of(weight))  # type: ignore[arg-type]


@pytest.mark.parametrize("guard", [False, True])
def test_state_dict_is_the_checkpoint(guard: bool) -> None:
    layer = QuantLinear.from_quantized(random_weight(SCHEMES[0]), torch.zeros(40), guard=guard)
    names = {"weight_packed", "weight_scale", "weight_shape", "bias"} | ({"weight"} if guard else set())
    assert layer.state_dict().keys() == names
    assert layer.weight_packed.nbytes == 40 * 96 * 3 // 8


def test_casting_a_module_does_not_touch_its_scales() -> None:
    layer = QuantLinear.from_quantized(random_weight(SCHEMES[1]), torch.zeros(40))
    before = layer.weight_scale.clone()
    layer = layer.bfloat16().float().half()
    assert torch.equal(layer.weight_scale, before)
    assert layer.weight_scale.dtype == torch.float16
    assert layer.bias is not None
    assert layer.bias.dtype == torch.float16
    assert layer.to("meta").weight_scale.is_meta


def test_gradients_reach_the_input() -> None:
    weight = random_weight(SCHEMES[0])
    x = torch.randn(3, 96, requires_grad=True)
    QuantLinear.from_quantized(weight)(x).sum().backward()
    assert x.grad is not None
    torch.testing.assert_close(x.grad, weight.dequantize().sum(0).expand(3, -1))


def test_foreign_scales_compute_but_have_no_scheme() -> None:
    layer = QuantLinear.from_quantized(random_weight(SCHEMES[0]))
    expected = layer(torch.ones(1, 96))
    layer.weight_scale = layer.weight_scale.float()
    assert torch.equal(layer(torch.ones(1, 96)), expected)
    with pytest.raises(OutputError, match="float32 have no scheme"):
        layer.quantized()


def test_repr_names_the_storage() -> None:
    text = repr(QuantLinear.from_quantized(random_weight(SCHEMES[1])))
    assert "in_features=96, out_features=40, int3 asym g32, bias=False" in text


@pytest.mark.parametrize("guard", [True, False])
def test_models_that_ask_a_linear_for_its_dtype_get_that_of_activations(guard: bool) -> None:
    layer = QuantLinear(32, 8, Scheme(bits=3, group_size=16, scale_dtype="float16"), guard=guard, dtype=torch.float32)
    assert layer.weight.dtype == torch.float32
    assert layer.weight.numel() == 0
    assert layer.to(torch.bfloat16).weight.dtype == torch.bfloat16
    assert layer.weight_scale.dtype == torch.float16
    assert ("weight" in layer.state_dict()) == guard
    if guard:
        assert layer.state_dict()["weight"].dtype == torch.int8


TRANSFORMS = [
    {"act_bits": 4},
    {"act_bits": 8, "act_symmetric": True},
    {"input_rotation": 3},
    {"act_bits": 4, "input_rotation": 3},
]


@pytest.mark.parametrize("transform", TRANSFORMS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_inputs_are_rotated_then_rounded(transform: dict[str, int], dtype: torch.dtype) -> None:
    scheme = dataclasses.replace(SCHEMES[1], **transform)
    weight, x = random_weight(scheme), torch.randn(2, 5, 96).to(dtype)
    layer = QuantLinear.from_quantized(weight, torch.randn(40))
    transformed = x
    if scheme.input_rotation is not None:
        transformed = InputRotation.of(scheme.input_rotation, 96)(transformed)
    if scheme.act_bits is not None:
        transformed = quantize_tokens(transformed, scheme.act_bits, scheme.act_symmetric)
    assert layer.bias is not None
    assert torch.equal(layer(x), functional.linear(transformed, weight.dequantize(dtype), layer.bias.to(dtype)))
    assert not torch.equal(transformed, x)
    assert layer.scheme == layer.quantized().scheme == scheme
    assert torch.equal(copy.deepcopy(layer)(x), layer(x))
    assert torch.equal(layer.dequantize(), weight.dequantize()), "the stored weight is not turned back"
    assert (
        layer.state_dict().keys()
        == QuantLinear.from_quantized(random_weight(SCHEMES[1]), layer.bias).state_dict().keys()
    )


def test_a_rotated_weight_gives_the_product_of_the_plain_one() -> None:
    generator = torch.Generator().manual_seed(0)
    plain, x = torch.randn(40, 96, generator=generator), torch.randn(7, 96, generator=generator)
    scheme = Scheme(8, group_size=None, scale_dtype="float16", input_rotation=11)
    rotated = InputRotation(96, 11).on_weight(plain)
    scale = (rotated.abs().amax(1, keepdim=True) / 127).half()
    codes = (rotated / scale.float() + 128).round().clamp(0, 255).to(torch.uint8)
    y = QuantLinear.from_quantized(integer_weight(codes, scale, None, scheme))(x)
    assert (y - x @ plain.T).norm() < 0.02 * y.norm()


def test_a_skeleton_on_meta_rotates_once_it_has_a_device() -> None:
    with torch.device("meta"):
        layer = QuantLinear(96, 40, Scheme(3, group_size=32, scale_dtype="float16", act_bits=8, input_rotation=1))
    twin = QuantLinear.from_quantized(random_weight(layer.scheme))
    layer = layer.to_empty(device="cpu")
    layer.load_state_dict(twin.state_dict())
    x = torch.randn(3, 96)
    assert torch.equal(layer(x), twin(x))


def test_gradients_pass_straight_through_the_transform() -> None:
    weight = random_weight(dataclasses.replace(SCHEMES[0], act_bits=4, input_rotation=2))
    x = torch.randn(3, 96, requires_grad=True)
    QuantLinear.from_quantized(weight)(x).sum().backward()
    assert x.grad is not None
    expected = InputRotation(96, 2).inverse(weight.dequantize().sum(0, keepdim=True))
    torch.testing.assert_close(x.grad, expected.expand(3, -1), rtol=1e-4, atol=1e-5)


def test_repr_names_the_transform() -> None:
    scheme = dataclasses.replace(SCHEMES[0], act_bits=4, act_symmetric=True, input_rotation=9)
    text = repr(QuantLinear.from_quantized(random_weight(scheme)))
    assert text.endswith("int3 sym g32 a4 sym rotated, bias=False)")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("scheme", SCHEMES, ids=Scheme.describe)
def test_cuda_has_the_same_weights(scheme: Scheme) -> None:
    weight = random_weight(scheme)
    assert torch.equal(QuantLinear.from_quantized(weight.to("cuda")).dequantize().cpu(), weight.dequantize())
