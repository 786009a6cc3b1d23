"""Fused experts as linears: the same numbers, no second copy, nothing lost on the way through a source."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers.integrations.moe import use_experts_implementation

from calib.checkpoint.reader import ModelSource, open_model
from calib.model.experts import ExpertList, expert_linears, expert_lists, fill_experts, join_experts, split_experts
from calib.model.structure import find_blocks, fused_experts
from tests.support.tiny_models import EXPERT_FAMILIES, MIXTURES, tiny_model

FAMILIES = (*MIXTURES, *(family for family in EXPERT_FAMILIES if family != "llama4_text"))
TOKENS = torch.randint(2, 400, (2, 16), generator=torch.Generator().manual_seed(3))


def opened(model: Any, kind: str, folder: Path) -> ModelSource:
    if kind == "folder":
        model.save_pretrained(folder)
    return open_model(folder if kind == "folder" else model)


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        result: Tensor = model(input_ids=TOKENS, use_cache=False).logits
    return result


@pytest.mark.parametrize("kind", ["folder", "memory"])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_split_model_computes_the_same(family: str, kind: str, tmp_path: Path) -> None:
    model = tiny_model(family, experts_implementation="eager")
    source = opened(model, kind, tmp_path)
    assert expert_lists(source.skeleton)
    assert fused_experts(source.skeleton) == []
    assert all(parameter.is_meta for parameter in source.skeleton.parameters())
    source.load(source.tensor_names())
    torch.testing.assert_close(logits(source.skeleton), logits(model), rtol=1e-5, atol=1e-5)


def test_other_experts_stay_fused(tmp_path: Path) -> None:
    model = tiny_model("llama4_text")
    source = opened(model, "folder", tmp_path)
    assert expert_lists(source.skeleton) == {}
    assert len(fused_experts(source.skeleton)) == 2
    source.load(source.tensor_names())
    assert torch.equal(logits(source.skeleton), logits(model))


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss"])
def test_weights_are_views_of_the_fused_parameters(family: str, tmp_path: Path) -> None:
    model = tiny_model(family)
    source = opened(model, "folder", tmp_path)
    source.load(source.tensor_names())
    for name, experts in expert_lists(source.skeleton).items():
        for parameter in experts.layout.parameters:
            fused = model.get_parameter(f"{name}.{parameter}")
            parts = [experts.get_parameter(part) for part in experts.names(parameter)]
            assert len({part.untyped_storage().data_ptr() for part in parts}) == 1
            assert parts[0].untyped_storage().nbytes() == fused.nbytes
            assert sum(part.numel() for part in parts) == fused.numel()
        assert all(parameter.is_meta for parameter in experts.fused.parameters())


def test_a_block_is_loaded_and_released_alone(tmp_path: Path) -> None:
    source = opened(tiny_model("mixtral"), "folder", tmp_path)
    first, second = find_blocks(source.skeleton)
    names = frozenset(name for name in source.tensor_names() if name.startswith(f"{first}."))
    assert f"{first}.mlp.experts.3.down_proj.weight" in names
    source.load(names)
    loaded = {name for name, parameter in source.skeleton.named_parameters() if not parameter.is_meta}
    assert loaded == names
    assert all(parameter.is_meta for parameter in source.skeleton.get_submodule(second).parameters())
    source.release(names)
    assert all(parameter.is_meta for parameter in source.skeleton.parameters())


def test_only_the_experts_asked_for_are_changed(tmp_path: Path) -> None:
    """A caller who has replaced one expert's weight keeps it when another one is loaded."""
    source = opened(tiny_model("qwen3_moe"), "folder", tmp_path)
    one, other = (f"model.layers.0.mlp.experts.{i}.up_proj.weight" for i in (1, 2))
    source.load(frozenset({one}))
    source.skeleton.get_parameter(one).data = torch.zeros(32, 64)
    source.load(frozenset({other}))
    assert not source.skeleton.get_parameter(one).any()
    assert source.skeleton.get_parameter(other).any()


def test_a_model_in_memory_is_not_changed() -> None:
    model = tiny_model("qwen3_moe")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    source = open_model(model)
    source.load(source.tensor_names())
    for linear in expert_linears(source.skeleton).values():
        linear.get_parameter("weight").data.zero_()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


# -- what passes through -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss"])
def test_a_layer_that_passes_whole_keeps_its_bytes_and_names(family: str, tmp_path: Path) -> None:
    source = opened(tiny_model(family), "folder", tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    raw = {key: tensor for key, _, tensor in source.raw_tensors(source.tensor_names())}
    assert raw.keys() == stored.keys()
    assert all(torch.equal(raw[key], stored[key]) for key in raw)
    assert {p for _, p, _ in source.raw_tensors(source.tensor_names())} <= source.tensor_names()


@functools.cache
def cached_source(kind: str, folder: Path) -> ModelSource:
    return opened(tiny_model("gpt_oss"), kind, folder)


@pytest.mark.parametrize("kind", ["folder", "memory"])
@settings(max_examples=15, deadline=None)
@given(data=st.data())
def test_no_expert_is_lost_or_doubled(kind: str, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    """Whatever is asked for arrives once, with the values that loading gives, whether fused or one by one."""
    source = cached_source(kind, tmp_path_factory.getbasetemp() / "experts")
    block = sorted(name for name in source.tensor_names() if name.startswith("model.layers.0.mlp."))
    asked = frozenset(data.draw(st.sets(st.sampled_from(block), min_size=1)))
    raw = {key: tensor for key, _, tensor in source.raw_tensors(asked)}
    source.load(asked)
    values = {name: source.skeleton.get_parameter(name) for name in asked}
    assert sum(tensor.numel() for tensor in raw.values()) == sum(value.numel() for value in values.values())
    whole = sum(".experts." in name for name in asked) == sum(".experts." in name for name in block)
    assert any(key.endswith("experts.gate_up_proj") for key in raw) == whole
    for key, tensor in raw.items():
        assert tensor.is_contiguous()
        if key in values:
            assert torch.equal(tensor, values[key])
    source.release(asked)


# -- the proof ---------------------------------------------------------------------------------------------------------


class Experts(nn.Module):
    """Two matrices an expert, with what a test wants to be different."""

    accumulation: torch.dtype | str = "hidden"
    factor = 1.0

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.num_experts = 3
        self.gate_up_proj = nn.Parameter(torch.randn(3, 8, 6))
        self.down_proj = nn.Parameter(torch.randn(3, 6, 4))
        self.act_fn = nn.functional.silu
        if config == "parameter":
            self.extra = nn.Parameter(torch.ones(3))
        if config == "buffer":
            self.register_buffer("extra", torch.ones(3))
        if config == "shape":
            self.gate_up_proj = nn.Parameter(torch.randn(3, 10, 6))

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        dtypes = {"hidden": hidden_states.dtype, "weights": top_k_weights.dtype}
        total = torch.zeros_like(hidden_states, dtype=dtypes.get(str(self.accumulation), torch.float32))
        for token, (row, weights) in enumerate(zip(top_k_index.tolist(), top_k_weights, strict=True)):
            for index, weight in zip(row, weights, strict=True):
                gate, up = (self.gate_up_proj[index] @ hidden_states[token]).chunk(2)
                output = self.down_proj[index] @ (self.act_fn(gate) * up) * weight * self.factor
                total[token] += output.to(total.dtype)
        return total.to(hidden_states.dtype)


def holder(config: str = "", layout: dict[str, Any] | None = None, **attributes: Any) -> nn.Module:
    cls: Any = use_experts_implementation(type("Made", (Experts,), attributes), **(layout or {}))
    return nn.ModuleDict({"experts": cls(config).to("meta")})


@pytest.mark.parametrize("accumulation", ["hidden", "weights", "float32"])
def test_the_dtype_of_the_sum_is_found(accumulation: str) -> None:
    model = holder(accumulation=accumulation)
    assert split_experts(model) == ["experts"]
    experts = expert_lists(model)["experts"]
    assert experts.accumulation == accumulation
    join_experts(model)
    assert isinstance(model.get_submodule("experts"), Experts)


@pytest.mark.parametrize(
    "model",
    [
        holder("parameter"),
        holder("buffer"),
        holder("shape"),
        holder(layout={"is_transposed": True}),
        holder(layout={"has_bias": True}),
        holder(layout={"has_gate": False}),
        holder(layout={"has_post_expert_norm": True}),
        holder(factor=2.0),
        nn.ModuleDict({"experts": Experts("")}),
    ],
)
def test_what_is_not_the_same_stays_fused(model: nn.Module) -> None:
    assert split_experts(model) == []
    assert fused_experts(model)


def test_only_named_modules_are_split() -> None:
    model = nn.ModuleDict({"a": holder(), "b": holder()})
    assert split_experts(model, {"b.experts"}) == ["b.experts"]


def test_experts_by_a_slow_formula() -> None:
    """Every token by itself; the number of experts as an index stands for none."""
    fused: Any = holder()["experts"].to_empty(device="cpu")
    generator = torch.Generator().manual_seed(0)
    for parameter in fused.parameters():
        parameter.data.normal_(generator=generator)
    model = nn.ModuleDict({"experts": fused})
    split_experts(model)
    experts = model["experts"]
    assert isinstance(experts, ExpertList)
    for name in experts.layout.parameters:
        fill_experts(experts, name, fused.get_parameter(name).detach())
    x, weights = torch.randn(5, 6, generator=generator), torch.rand(5, 2, generator=generator)
    index = torch.tensor([[0, 1], [3, 2], [3, 3], [1, 0], [2, 3]])
    wanted = torch.zeros(5, 6)
    for token in range(5):
        for k in range(2):
            if index[token, k] < 3:
                gate_up, down = (fused.get_parameter(n)[index[token, k]] for n in ("gate_up_proj", "down_proj"))
                gate, up = gate_up[:4] @ x[token], gate_up[4:] @ x[token]
                wanted[token] += weights[token, k] * (down @ (gate * torch.sigmoid(gate) * up))
    torch.testing.assert_close(experts(x, index, weights), wanted.detach(), rtol=1e-5, atol=1e-5)
    assert not experts(x, index, weights)[2].any()
