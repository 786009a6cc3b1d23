"""Huber's weights on tokens with huge inputs: what they change, what they leave alone, and that CoreQ reads them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import ptq
from calib.stats import Stat, StatisticsAccumulator
from calib.token_bounds import bound_tokens
from ptq.errors import UsageError
from ptq.methods.layerwise.coreq import COREQ, CoreqConfig
from tests.ptq.pipeline.test_windowed import CALIBRATION
from tests.support.tiny_models import tiny_model


def drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_huge_token_grows_with_its_norm_and_the_others_stay(dtype: torch.dtype) -> None:
    own, full = drawn(2, 8, 16).to(dtype), drawn(2, 8, 16, seed=1).to(dtype)
    own[0, 0], full[1, 3] = 300 * own[0, 0], 300 * full[1, 3]
    bounded, other = bound_tokens(own, full)
    assert other is not None
    huge = torch.zeros(2, 8, dtype=torch.bool)
    huge[0, 0] = huge[1, 3] = True
    assert torch.equal(bounded[~huge], own[~huge])
    assert torch.equal(other[~huge], full[~huge])
    factor = bounded[0, 0] / own[0, 0]
    assert torch.equal(factor, factor[:1].expand(16)), "a power of two: nothing is rounded"
    assert torch.equal(other[0, 0] / full[0, 0], factor), "both streams alike"
    norm = torch.maximum(own.float().norm(dim=-1), full.float().norm(dim=-1))
    weight, wanted = float(factor[0]) ** 2, float(norm.flatten().median() / norm[0, 0])
    assert wanted <= weight < 4 * wanted


def test_inputs_of_zeros_and_without_a_second_stream_stay() -> None:
    zeros = torch.zeros(1, 4, 8)
    assert bound_tokens(zeros, None) == (zeros, None)


def test_sums_of_squares_are_no_longer_one_token_s() -> None:
    own = drawn(1, 64, 8)
    own[0, 0] *= 1000
    weights = {"a": drawn(4, 8)}
    shares = []
    for needs in ({Stat.HESSIAN}, {Stat.HESSIAN, Stat.BOUNDED}):
        sums = StatisticsAccumulator("a", weights, frozenset(needs))
        sums.add(own, None)
        moments = sums.finish().moments
        assert moments is not None
        total = float(moments.hessian.trace())
        shares.append(1 - float(own[0, 1:].square().sum()) / total)
    assert shares[0] > 0.999
    assert shares[1] < 0.99


def test_coreq_asks_for_them_by_its_option(tmp_path: Path) -> None:
    model = tiny_model("llama")
    for value, wanted in (("full", False), ("bounded", True)):
        assert (Stat.BOUNDED in COREQ.needs(CoreqConfig(outliers=value))) == wanted  # type: ignore[arg-type]
        ptq.quantize(model, out=tmp_path / value, method="coreq", bits=3, calibration=CALIBRATION, outliers=value)
    with pytest.raises(UsageError, match="outliers"):
        ptq.quantize(model, out=tmp_path / "x", method="coreq", calibration=CALIBRATION, outliers="some")
