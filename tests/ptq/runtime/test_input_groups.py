"""Merged products of linears that read one tensor, and tensors that are kept once: on the CPU, by a slow operator."""

from __future__ import annotations

import copy
import gc
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import ptq
from calib.data.sampling import sample_steps
from calib.data.static_sampling import static_steps
from ptq.integration.loading import load
from ptq.runtime.input_groups import _MOST_IDLE_PRODUCTS, InputGroups
from ptq.runtime.linear import QuantLinear
from ptq.scheme import Scheme
from ptq.transforms.hadamard import InputRotation
from tests.support.cpu_graph import CpuGraph
from tests.support.cuda_on_cpu import cuda_on_cpu
from tests.support.packed_models import packed_model, quantized

INT4 = Scheme(4, symmetric=False, group_size=32, scale_dtype="float16")
SCHEMES = [INT4, Scheme(3, group_size=64, scale_dtype="bfloat16"), Scheme.of("itq3s")]
IDS = torch.tensor([[5, 9, 2, 7]])


@pytest.fixture
def computed() -> Iterator[list[int]]:
    with cuda_on_cpu() as rows, torch.no_grad():
        yield rows


def linears(*rows: int, bias: bool = False, scheme: Scheme = INT4) -> list[QuantLinear]:
    """Of one input, with an `InputGroups`, and another linear that closes the group."""
    groups, made = InputGroups(), []
    generator = torch.Generator().manual_seed(0)
    for count in (*rows, 8):
        weight = torch.randn(count, 96, generator=generator) * 0.1
        own = nn.Parameter(torch.randn(count, generator=generator), requires_grad=False) if bias else None
        made.append(QuantLinear.from_quantized(quantized(weight, scheme), own))
        made[-1].share_inputs({}, groups)
        made[-1].__dict__["dense"] = made[-1].dequantize()  # before the first product: reading it later restores
    x = torch.randn(1, 96)
    for linear in made[:-1]:
        linear(x)
    made[-1](torch.randn(1, 96))
    return made[:-1]


def slow(linear: QuantLinear, x: Tensor) -> Tensor:
    bias = 0 if linear.bias is None else linear.bias
    return linear.transform_input(x) @ linear.__dict__["dense"].T + bias


@pytest.mark.parametrize("scheme", SCHEMES, ids=Scheme.describe)
@pytest.mark.parametrize("family", ["llama", "qwen2", "phi"])
def test_a_model_computes_the_same_with_fewer_products(scheme: Scheme, family: str, computed: list[int]) -> None:
    model = packed_model(scheme, family)
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PTQ_KERNEL", "reference")
        expected = model(IDS).logits
    first = model(IDS).logits
    separate = len(computed)
    second = model(IDS).logits
    merged = len(computed) - separate
    torch.testing.assert_close(first, expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(second, expected, rtol=1e-4, atol=1e-4)
    assert (separate, merged) == {"llama": (14, 8), "qwen2": (14, 8), "phi": (12, 8)}[family]
    packed = [module for module in model.modules() if isinstance(module, QuantLinear)]
    assert all("weight_packed" in module._gone for module in packed)
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)


def test_members_share_the_memory_of_the_whole(computed: list[int]) -> None:
    q, k, v = linears(32, 20, 16)
    assert q.merged is not None
    whole = q.merged[0]._weight.prepared
    assert whole.codes.shape[0] == 2 + 2 + 1  # tiles of 16 rows
    own = [linear._prepared[1].prepared for linear in (q, k, v)]  # type: ignore[index]
    assert [part.codes.data_ptr() - whole.codes.data_ptr() for part in own] == [
        tile * whole.codes[0].nbytes for tile in (0, 2, 4)
    ]
    assert {part.codes.untyped_storage().data_ptr() for part in own} == {whole.codes.untyped_storage().data_ptr()}


@pytest.mark.parametrize("bias", [False, True])
def test_the_first_member_computes_and_the_others_take(bias: bool, computed: list[int]) -> None:
    members = linears(32, 20, 16, bias=bias)
    for shape in ((1, 96), (3, 96), (2, 5, 96)):
        x = torch.randn(shape)
        computed.clear()
        for linear in reversed(members):
            torch.testing.assert_close(linear(x), slow(linear, x), rtol=1e-4, atol=1e-5)
        assert computed == [80]


def test_nothing_stale_is_taken(computed: list[int]) -> None:
    q, k, v = linears(32, 20, 16)
    x = torch.randn(1, 96)
    q(x)
    x.mul_(2)  # written to
    torch.testing.assert_close(k(x), slow(k, x), rtol=1e-4, atol=1e-5)
    x.data = torch.randn(1, 96)  # no version says so: but every member takes its rows once
    torch.testing.assert_close(k(x), slow(k, x), rtol=1e-4, atol=1e-5)
    del x
    gc.collect()
    assert q.merged is not None
    assert q.merged[0]._result is None  # nor is memory kept for it
    y = torch.randn(1, 96)
    torch.testing.assert_close(v(y), slow(v, y), rtol=1e-4, atol=1e-5)


def test_a_result_of_a_capture_is_not_taken_outside_of_it(computed: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, _ = linears(32, 20, 16)
    x = torch.randn(1, 96)
    monkeypatch.setattr("ptq.runtime.input_groups.is_capturing", lambda: True)
    q(x)
    monkeypatch.setattr("ptq.runtime.input_groups.is_capturing", lambda: False)
    computed.clear()
    k(x)
    assert computed == [80]


def test_a_member_that_is_called_alone_leaves_its_group(computed: list[int]) -> None:
    q, _, _ = linears(32, 20, 16)
    for _ in range(_MOST_IDLE_PRODUCTS + 1):
        x = torch.randn(1, 96)
        torch.testing.assert_close(q(x), slow(q, x), rtol=1e-4, atol=1e-5)
    computed.clear()
    q(torch.randn(1, 96))
    assert computed == [32]


def test_another_bias_is_seen(computed: list[int]) -> None:
    q, k = linears(32, 20, bias=True)
    x = torch.randn(1, 96)
    q(x), k(x)
    assert k.bias is not None
    k.bias.add_(1)
    torch.testing.assert_close(k(x), slow(k, x), rtol=1e-4, atol=1e-5)
    k.bias = nn.Parameter(torch.zeros(20), requires_grad=False)
    y = torch.randn(1, 96)
    q(y)
    torch.testing.assert_close(k(y), slow(k, y), rtol=1e-4, atol=1e-5)


def test_what_differs_is_not_merged_and_what_a_graph_reads_neither(computed: list[int]) -> None:
    groups = InputGroups()
    weight = torch.randn(32, 96) * 0.1
    four, three = (QuantLinear.from_quantized(quantized(weight, scheme)) for scheme in (INT4, SCHEMES[1]))
    captured, last = (QuantLinear.from_quantized(quantized(weight, INT4)) for _ in range(2))
    for linear in (four, three, captured, last):
        linear.share_inputs({}, groups)
    x = torch.randn(1, 96)
    four(x), three(x), captured(x)
    captured._captured = True
    last(torch.randn(1, 96))
    assert four.merged is None
    assert three.merged is None
    assert captured.merged is None


@pytest.mark.parametrize("scheme", SCHEMES, ids=Scheme.describe)
def test_tensors_that_are_gone_are_there_for_whoever_reads_them(scheme: Scheme, computed: list[int]) -> None:
    q = linears(32, 20, scheme=scheme)[0]
    x = torch.randn(1, 96)
    expected = slow(q, x)
    fresh = {key: tensor.clone() for key, tensor in quantized_tensors(q).items()}
    for read in (
        lambda layer: layer.weight_packed,
        lambda layer: dict(layer.named_buffers()),
        lambda layer: copy.deepcopy(layer),
        lambda layer: pickle.loads(pickle.dumps(layer)),
        lambda layer: layer.half().float(),
        lambda layer: layer.dequantize(),
    ):
        layer = linears(32, 20, scheme=scheme)[0]
        assert "weight_packed" in layer._gone
        other = read(layer)
        assert not layer._gone
        assert layer.merged is None
        for one in (layer, other if isinstance(other, QuantLinear) else layer):
            assert all(torch.equal(tensor, fresh[key]) for key, tensor in quantized_tensors(one).items())
            torch.testing.assert_close(one(x), expected, rtol=1e-3, atol=1e-3)


def quantized_tensors(layer: QuantLinear) -> dict[str, Tensor]:
    return copy.deepcopy(layer)._tensors()


def test_what_is_set_or_written_counts(computed: list[int]) -> None:
    q, k = linears(32, 20)
    x = torch.randn(1, 96)
    q(x), k(x)
    q.weight_scale.mul_(2)
    torch.testing.assert_close(q(x), 2 * slow(q, x), rtol=1e-4, atol=1e-5)
    computed.clear()
    k(torch.randn(1, 96))
    assert computed == [20]  # the group is no more
    k.weight_scale = k.weight_scale * 4
    torch.testing.assert_close(k(x), 4 * slow(k, x), rtol=1e-4, atol=1e-5)
    q, k = linears(32, 20)
    q.load_state_dict(
        {key: tensor.clone() for key, tensor in q.state_dict().items()}
        | {"weight_scale": k.weight_scale.new_ones(32, 3)}
    )
    torch.testing.assert_close(q(x), x @ q.dequantize().T, rtol=1e-4, atol=1e-5)
    assert (q.dequantize() == q.dequantize().round()).all()


def test_tensors_that_would_not_come_back_as_they_are_stay(computed: list[int]) -> None:
    layer = QuantLinear.from_quantized(quantized(torch.randn(32, 100) * 0.1, INT4))
    layer.weight_packed[:, -1] |= 1 << 30  # behind the last code of a row: ignored, but in the file
    stored = layer.weight_packed.clone()
    x = torch.randn(1, 100)
    expected = x @ layer.dequantize().T
    for _ in range(2):
        torch.testing.assert_close(layer(x), expected, rtol=1e-4, atol=1e-5)
    assert not layer._gone
    assert torch.equal(layer.weight_packed, stored)


def test_scales_of_float32_are_left_to_the_reference(computed: list[int]) -> None:
    weight = quantized(torch.randn(32, 96) * 0.1, INT4)
    layer = QuantLinear.from_quantized(weight)
    layer.weight_scale = layer.weight_scale.float() * 1.0001
    x = torch.randn(1, 96)
    torch.testing.assert_close(layer(x), x @ layer.dequantize().T, rtol=1e-5, atol=1e-6)
    assert layer.kernel_name(x) == "reference"
    assert computed == []


def test_gradients_take_the_reference_also_behind_checkpoints(computed: list[int]) -> None:
    q, k = linears(32, 20)
    x = torch.randn(2, 96)
    want = torch.ones(2, 32) @ q.__dict__["dense"] + torch.ones(2, 20) @ k.__dict__["dense"]

    def both(x: Tensor) -> Tensor:
        return q(x).sum() + k(x).sum()

    with torch.enable_grad():
        for _ in range(2):
            leaf = x.clone().requires_grad_()
            checkpoint(both, leaf, use_reentrant=False).backward()
            torch.testing.assert_close(leaf.grad, want, rtol=1e-4, atol=1e-4)


def test_inference_mode_has_no_groups_and_leaves_no_trace(computed: list[int]) -> None:
    model: Any = packed_model(INT4)
    with torch.inference_mode():
        first = model(IDS).logits
        second = model(IDS).logits
    torch.testing.assert_close(first, second)
    model(IDS), model(IDS)
    torch.testing.assert_close(model(IDS).logits, second.clone(), rtol=1e-4, atol=1e-4)


def test_a_captured_step_of_a_merged_model_gives_the_same_tokens(computed: list[int]) -> None:
    uniform = torch.zeros(1, 8, dtype=torch.float64)
    expected = torch.stack(list(sample_steps(packed_model(INT4), IDS, uniform, temperature=0)))
    capture, said = CpuGraph(), list[str]()
    model = packed_model(INT4)
    for _ in range(2):  # merged in the first prompt
        found = static_steps(model, IDS, uniform, temperature=0, capture=capture, on_fallback=said.append)
        assert torch.equal(torch.stack(list(found)), expected)
    assert (capture.captures, capture.replays, said) == (2, 12, [])


@pytest.mark.parametrize("options", [{"bits": 4, "group_size": 32}, {"format": "itq3s"}], ids=str)
def test_a_model_that_ran_is_saved_as_it_was_loaded(
    options: dict[str, Any], tiny_folder: Path, tmp_path: Path, computed: list[int]
) -> None:
    ptq.quantize(tiny_folder, method="rtn", out=tmp_path / "out", **options)
    model: Any = load(tmp_path / "out")
    for _ in range(2):
        model(IDS)
    linears_of_model = [module for module in model.modules() if isinstance(module, QuantLinear)]
    assert all(module._gone for module in linears_of_model)
    assert sum(module.merged is not None for module in linears_of_model) == 5 * model.config.num_hidden_layers
    model.save_pretrained(tmp_path / "again")
    old, new = (stored_tensors(tmp_path / name) for name in ("out", "again"))
    assert old.keys() == new.keys()
    assert all(torch.equal(old[key], new[key]) for key in old)


def stored_tensors(folder: Path) -> dict[str, Tensor]:
    return {key: value for file in folder.glob("*.safetensors") for key, value in load_file(file).items()}


def test_a_long_input_is_rotated_once_for_all_that_read_it(
    computed: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = packed_model(Scheme.of("itq3s"), dtype=torch.bfloat16, num_hidden_layers=1, hidden_size=256)
    model(IDS)
    rotated: list[torch.Size] = []
    whole = InputRotation.__call__

    def count(self: InputRotation, x: Tensor) -> Tensor:
        rotated.append(x.shape)
        return whole(self, x)

    monkeypatch.setattr(InputRotation, "__call__", count)
    model(torch.arange(128)[None] % 400)
    assert len(rotated) == 4  # for q, k and v; o; gate and up; down
