"""Number formats of GGUF: bytes as the gguf package reads them, fits, and what other widths fall back to."""

from __future__ import annotations

import gguf
import numpy as np
import pytest
import torch

from ptq import QuantizedWeight, Scheme
from ptq.errors import NumericalError, UsageError
from ptq.number_formats import FORMATS
from ptq.pipeline.preparation.schemes.scheme_assignment import make_plan
from ptq.recipe import Recipe
from tests.support.tiny_models import tiny_model

NAMES = ("q2_k", "q3_k", "q4_k", "q5_k", "q6_k", "iq4_nl")
LIMITS = {"q2_k": 0.12, "q3_k": 0.035, "q4_k": 0.008, "q5_k": 0.002, "q6_k": 0.0006, "iq4_nl": 0.008}
"""Relative squared error on Gaussian weights."""


def nearest(name: str, weight: torch.Tensor) -> QuantizedWeight:
    scheme = Scheme.of(name)
    record = scheme.number_format
    grid = record.grid(record.fit(weight, scheme), scheme, weight.shape[1])
    return QuantizedWeight.from_grid(grid.round(weight), grid, scheme)


def by_gguf(name: str, packed: torch.Tensor) -> torch.Tensor:
    kind = gguf.GGMLQuantizationType[name.upper()]
    return torch.from_numpy(np.array(gguf.quants.dequantize(packed.numpy(), kind)))


@pytest.mark.parametrize("name", NAMES)
def test_random_bytes_mean_what_the_gguf_package_says(name: str) -> None:
    scheme = Scheme.of(name)
    record = scheme.number_format
    shape, dtype = record.tensor_specs(4, 512, scheme)["weight_packed"]
    generator = torch.Generator().manual_seed(0)
    packed = torch.randint(0, 256, shape, dtype=dtype, generator=generator)
    codes, params = record.unpack({"weight_packed": packed}, scheme, 4, 512)
    params |= {
        key: value.float().nan_to_num(0, 1, -1).clamp(-9, 9).half()
        for key, value in params.items()
        if value.is_floating_point()
    }
    tensors = record.pack(codes, params, scheme)
    found = record.dequantize_rows(tensors, scheme, slice(None), 4, 512)
    torch.testing.assert_close(found, by_gguf(name, tensors["weight_packed"]), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("name", NAMES)
def test_weights_are_stored_closely(name: str) -> None:
    weight = torch.randn(16, 512, generator=torch.Generator().manual_seed(1)) * 0.05
    values = by_gguf(name, nearest(name, weight).tensors()["weight_packed"])
    error = (values - weight).square().sum() / weight.square().sum()
    assert error < LIMITS[name]


def test_importance_decides_where_the_error_goes() -> None:
    weight = torch.randn(8, 256, generator=torch.Generator().manual_seed(2))
    importance = torch.ones(256)
    importance[::4] = 100.0
    scheme = Scheme.of("q3_k")
    record = scheme.number_format
    errors = []
    for given in (None, importance):
        grid = record.grid(record.fit(weight, scheme, "hessian", given), scheme, 256)
        errors.append(((grid.dequantize(grid.round(weight)) - weight).square() * importance).sum())
    assert errors[1] < errors[0]


@pytest.mark.parametrize("name", NAMES)
def test_zeros_and_constants_are_stored(name: str) -> None:
    weight = torch.zeros(3, 256)
    weight[1] = 0.25
    weight[2, 5] = -1.0
    values = nearest(name, weight).dequantize()
    assert float(values[0].abs().max()) < 1e-20
    torch.testing.assert_close(values, weight, atol=0.03, rtol=0.05)


def test_what_is_not_finite_is_refused() -> None:
    weight = torch.ones(1, 256)
    weight[0, 3] = torch.inf
    for name in NAMES:
        with pytest.raises(NumericalError):
            FORMATS[name].fit(weight, Scheme.of(name))


def test_fields_of_the_format_cannot_be_changed() -> None:
    with pytest.raises(UsageError, match="q3_k has group_size=256, got 64"):
        Scheme.of("q3_k", group_size=64)


@pytest.mark.parametrize(("name", "other"), [("q3_k", "iq4_nl"), ("q4_k", "int5 sym g32"), ("q6_k", "int8 sym g32")])
def test_other_widths_fall_back(name: str, other: str) -> None:
    model = tiny_model("llama", hidden_size=256, intermediate_size=96)
    plan = make_plan(model, Recipe(method="rtn", scheme=Scheme.of(name)), torch.float32)
    found = {key.rpartition(".")[2]: scheme.describe() for key, scheme in plan.schemes.items() if scheme is not None}
    assert found["up_proj"] == name
    assert found["down_proj"] == other
