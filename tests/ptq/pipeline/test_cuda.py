"""The same work on a GPU. Skipped where there is none; the results pages say where it was run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import ptq
from calib.data.tokens import Calibration
from calib.precision import product_t
from ptq.grids import ScaledGrid, fit_scales, uniform_grid
from ptq.scheme import Scheme
from ptq.solvers import factorize, successive, successive_rounding
from tests.support.tiny_models import FAMILIES, tiny_model

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

TOKENS = torch.randint(2, 400, (6, 32), generator=torch.Generator().manual_seed(1))
OPTIONS: dict[str, Any] = {"calibration": Calibration(TOKENS, "test", 1, "none"), "group_size": 16, "bits": 4}


@pytest.mark.parametrize("family", FAMILIES)
def test_families_on_the_gpu(family: str, tmp_path: Path) -> None:
    model = tiny_model(family, torch.bfloat16)
    ptq.quantize(model, out=tmp_path / "out", device="cuda", **OPTIONS)
    packed = ptq.load(tmp_path / "out", device_map="cuda")
    with torch.no_grad():
        assert bool(torch.isfinite(packed(input_ids=TOKENS.cuda()).logits).all())


@pytest.mark.parametrize("method", ["rtn", "gptq", "gptaq", "coreq"])
def test_both_devices_give_almost_the_same_codes(method: str, tmp_path: Path) -> None:
    models = {}
    for device in ("cpu", "cuda"):
        ptq.quantize(
            tiny_model("llama"), out=tmp_path / device, device=device, method=method, compute_dtype="float32", **OPTIONS
        )
        models[device] = ptq.load(tmp_path / device)
    pairs = zip(models["cpu"].modules(), models["cuda"].modules(), strict=True)
    same = [(a.quantized().codes == b.quantized().codes).float().mean() for a, b in pairs if hasattr(a, "quantized")]
    assert len(same) == 14
    assert float(torch.stack(same).mean()) > 0.97  # ties and the order of summation


@pytest.mark.parametrize("shape", [(48, 100), (64, 256)])
def test_replayed_columns_are_those_of_the_loop(shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    rows, width = shape
    inputs = torch.randn(2 * width, width, device="cuda")
    weight = torch.randn(rows, width, device="cuda")
    factor = factorize(inputs.T @ inputs)
    scale, _ = fit_scales(weight, Scheme(bits=3, group_size=32))
    group = Scheme(bits=3, group_size=32).group_index(width, weight.device)
    grid = ScaledGrid(uniform_grid(3, weight.device), scale.float(), torch.full_like(scale, 4.0).float(), group)
    replayed, _ = successive_rounding(weight, grid, factor)
    monkeypatch.setattr(
        successive._Sweep,
        "_one_by_one",
        lambda self, grid, *tensors: successive._round_columns(successive._snapping(grid), *tensors),
    )
    assert torch.equal(successive_rounding(weight, grid, factor)[0], replayed)


@pytest.mark.parametrize("offload", ["memory", "disk"])
def test_offloaded_activations_change_no_code(offload: str, tmp_path: Path) -> None:
    model = tiny_model("llama", torch.bfloat16)
    for name, place in (("whole", "none"), ("out", offload)):
        ptq.quantize(model, out=tmp_path / name, device="cuda", offload=place, **OPTIONS)
    one, two = (sorted((tmp_path / name).glob("*.safetensors")) for name in ("whole", "out"))
    assert [path.read_bytes() for path in one] == [path.read_bytes() for path in two]


def test_half_precision_products_are_exact_on_the_gpu() -> None:
    a, b = (torch.randn(5000, 64).bfloat16() for _ in range(2))
    torch.testing.assert_close(
        product_t(a.cuda(), b.cuda()).cpu().double(), a.double().T @ b.double(), rtol=1e-4, atol=1e-3
    )
