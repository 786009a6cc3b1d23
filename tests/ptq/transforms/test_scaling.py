"""Channel scalings: what is found leaves every block as it is, and what must be found is."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from calib.checkpoint.reader import open_model
from calib.model.block_inputs import BlockCall, capture_calls
from calib.model.structure import find_blocks, linear_weight
from calib.precision import strict_float32
from ptq.errors import UsageError
from ptq.transforms.scaling.query_keys import rotary_pairs
from ptq.transforms.scaling.search import (
    ScaleUse,
    Scaling,
    Scalings,
    apply_scaling,
    find_scalings,
    fold_scaling,
    in_float32,
    unsupported_reason,
)
from tests.support.tiny_models import FAMILIES, tiny_model

LLAMA_LIKE = ("llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text", "phi3", "stablelm")
ALL = {"qkv", "out", "mlp", "down", "qk"}
OTHERS = {  # families with parts that no scaling passes
    "phi": {"qkv", "out", "qk"},  # one norm for attention and MLP; GELU
    "opt": ALL,  # ReLU
    "gpt2": {"qkv", "out", "mlp", "qk"},
    "gpt_neox": {"qkv", "out", "mlp", "qk"},
    "falcon": {"qkv", "out", "qk"},
    "olmo2": {"out", "down", "qk"},  # norms after the linears
    "mixtral": {"qkv", "out", "mlp", "qk", *(f"mlp.experts.{i}.down" for i in range(4))},
    "qwen2_moe": {*ALL, *(f"mlp.experts.{i}.down" for i in range(4))},
    "gpt_oss": {"qkv", "out", "mlp", "qk"},  # the experts' gating adds one to up
    "deepseek_v3": {"qkv", "out", "mlp", "down", "q_a_layernorm", "kv_a_layernorm"},
}
QK_SCALES = {  # pairs of a head, times heads of keys unless a norm is shared by all
    "llama": 2 * 8,
    "qwen3": 8,
    "gemma3_text": 8,
    "phi": 2 * (4 + 8),  # half of the channels are turned
    "gpt_neox": 4 * (2 + 12),
    "opt": 4 * 16,  # no rotary embedding
    "falcon": 8,
    "cohere": 2 * 8,  # alternate pairs
    "olmo2": 2 * 8,
}


@contextmanager
def first_block(family: str, **changes: Any) -> Iterator[tuple[nn.Module, Callable[[], Tensor]]]:
    """A family's first block with its weights, and how to run it."""
    block, call, hidden = parts(family, **changes)
    with torch.no_grad(), strict_float32():
        yield block, lambda: call(block, hidden)


def parts(family: str, dtype: torch.dtype = torch.float32, **changes: Any) -> tuple[nn.Module, BlockCall, Tensor]:
    source = open_model(tiny_model(family, dtype, **changes))
    source.load(source.tensor_names())
    names = find_blocks(source.skeleton)
    tokens = torch.randint(0, 400, (2, 12), generator=torch.Generator().manual_seed(0))
    entered: list[Tensor] = []
    with torch.no_grad():
        calls = capture_calls(source.skeleton, names, iter([tokens]), lambda hidden, _: entered.append(hidden))
    return source.skeleton.get_submodule(names[0]), calls[0][0], entered[0]


def scales(scaling: Scaling, seed: int = 5) -> Tensor:
    return 0.5 + 1.5 * torch.rand(scaling.size, generator=torch.Generator().manual_seed(seed))


def change(found: Tensor, wanted: Tensor) -> float:
    return float((found - wanted).norm() / wanted.norm())


def found_in(family: str) -> Scalings:
    with first_block(family) as (block, run):
        return find_scalings(block, run)


def named(found: Scalings, name: str) -> Scaling:
    return next(scaling for scaling in found.scalings if scaling.name == name)


@pytest.mark.parametrize("family", [*LLAMA_LIKE, *OTHERS])
def test_all_that_is_found_leaves_the_block_as_it_is(family: str) -> None:
    with first_block(family) as (block, run):
        before = run()
        found = find_scalings(block, run)
        assert torch.equal(run(), before)  # the search itself left nothing behind
        assert {scaling.name for scaling in found.scalings} == OTHERS.get(family, ALL)
        for scaling in found.scalings:
            fold_scaling(block, scaling, scales(scaling))
        assert change(run(), before) < 1e-4


@pytest.mark.parametrize("family", LLAMA_LIKE)
def test_every_part_of_a_scaling_is_needed(family: str) -> None:
    with first_block(family) as (block, run):
        before = run()
        for scaling in find_scalings(block, run).scalings:
            weights = {u.parameter: block.get_parameter(u.parameter).detach().clone() for u in scaling.uses}
            for left_out in scaling.uses:
                rest = dataclasses.replace(scaling, uses=tuple(u for u in scaling.uses if u is not left_out))
                fold_scaling(block, rest, scales(scaling))
                assert change(run(), before) > 1e-4, (scaling.name, left_out.parameter)
                for name, value in weights.items():
                    block.get_parameter(name).data.copy_(value)


@pytest.mark.parametrize("family", LLAMA_LIKE)
def test_llama_like_blocks_lack_nothing(family: str) -> None:
    assert found_in(family).missing == ()


@pytest.mark.parametrize(
    ("family", "missing"),
    [
        ("gpt2", ["mlp.c_proj: what comes here is neither"]),
        ("phi", ["mlp.fc2: "]),
        ("olmo2", ["self_attn.q_proj, self_attn.k_proj, self_attn.v_proj: ", "mlp.gate_proj, mlp.up_proj: "]),
        ("gpt_oss", ["mlp.experts.*.down_proj: "]),
        ("deepseek_v3", ["q and k before self_attn.o_proj: "]),
    ],
)
def test_what_is_missing_is_told(family: str, missing: list[str]) -> None:
    found = found_in(family).missing
    assert len(found) == len(missing)
    assert all(text.startswith(start) for text, start in zip(found, missing, strict=True))


@pytest.mark.parametrize("family", QK_SCALES)
def test_queries_and_keys_have_a_scale_a_rotary_pair(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if family not in FAMILIES:
        monkeypatch.setitem(FAMILIES, family, {})
    assert named(found_in(family), "qk").size == QK_SCALES[family]


def test_untied_rotary_pairs_are_rejected() -> None:
    def uses(index: Tensor) -> tuple[ScaleUse, ...]:
        heads = index + torch.arange(2)[:, None] * (int(index.max()) + 1)  # [key heads, 16]
        return (
            ScaleUse("self_attn.q_proj.weight", 0, -1, heads.repeat_interleave(2, 0).flatten()),
            ScaleUse("self_attn.k_proj.weight", 0, 1, heads.flatten()),
        )

    with first_block("llama") as (block, run):
        tied = Scaling("qk", 16, uses(torch.arange(8).repeat(2)))
        assert unsupported_reason(block, run, tied) is None
        for size, index in ((32, torch.arange(16)), (16, torch.arange(8).repeat_interleave(2))):
            assert "the block's output changes by" in str(
                unsupported_reason(block, run, Scaling("qk", size, uses(index)))
            )


def test_grouped_queries_share_the_scales_of_their_keys() -> None:
    found = found_in("llama")
    columns = next(use.index for use in named(found, "out").uses if use.axis == 1)
    torch.testing.assert_close(columns, torch.arange(32).view(2, 1, 16).expand(2, 2, 16).flatten())
    queries, keys = (use.index.view(-1, 16) for use in named(found, "qk").uses)
    assert torch.equal(queries, keys.repeat_interleave(2, 0))
    assert torch.equal(keys[:, :8], keys[:, 8:])


def test_gains_of_one_plus_weight_are_known() -> None:
    for family, offset in (("gemma2", 1.0), ("llama", 0.0)):
        gain = named(found_in(family), "mlp").uses[0]
        assert (gain.parameter.endswith("layernorm.weight"), gain.offset, gain.power) == (True, offset, -1)


def test_routers_are_scaled_with_the_experts() -> None:
    names = {use.parameter for use in named(found_in("mixtral"), "mlp").uses}
    experts = {f"mlp.experts.{i}.{linear}.weight" for i in range(4) for linear in ("gate_proj", "up_proj")}
    assert names == {"post_attention_layernorm.weight", "mlp.gate.weight"} | experts


def test_a_norm_that_something_else_reads_is_left_out() -> None:
    with first_block("llama") as (block, run):
        original = block.post_attention_layernorm.forward
        kept: list[Tensor] = []

        def leaking(x: Tensor) -> Tensor:
            kept.append(original(x))
            return kept[-1]

        block.post_attention_layernorm.forward = leaking
        leaky = lambda: run() + kept[-1]  # noqa: E731  (the norm's output reaches the block's)
        found = find_scalings(block, leaky)
        assert {scaling.name for scaling in found.scalings} == ALL - {"mlp"}
        assert len(found.missing) == 1
        assert found.missing[0].startswith("mlp.gate_proj, mlp.up_proj: with scales, the block's output changes by")


def test_a_gated_relu_is_scaled_on_the_side_without_activation() -> None:
    with first_block("llama", hidden_act="relu") as (block, run):
        down = named(find_scalings(block, run), "down")
        assert {use.parameter for use in down.uses} == {"mlp.up_proj.weight", "mlp.down_proj.weight"}


def test_interleaved_rows_of_fused_values_are_found() -> None:
    rows = named(found_in("gpt_neox"), "out").uses[0].index.view(4, 3, 16)  # heads of query, key, value
    assert bool((rows[:, :2] == -1).all())
    assert torch.equal(rows[:, 2].flatten(), torch.arange(64))


def test_other_blocks_of_the_kind_pass_with_what_was_found() -> None:
    found = found_in("qwen3")
    with first_block("qwen3") as (block, run):
        for parameter in block.parameters():
            parameter.data.mul_(1.0 + torch.rand(parameter.shape, generator=torch.Generator().manual_seed(3)))
        assert [unsupported_reason(block, run, scaling) for scaling in found.scalings] == [None] * 5


def test_half_precision_is_refused_and_widened() -> None:
    block, call, hidden = parts("qwen2", torch.bfloat16)
    with pytest.raises(UsageError, match=r"is in torch\.bfloat16: .* tried in float32"):
        find_scalings(block, lambda: call(block, hidden))
    with torch.no_grad(), in_float32(block, call, hidden) as run:
        assert run().dtype == torch.float32
        assert run().shape == (1, 12, 64)
        found = find_scalings(block, run)
    assert {scaling.name for scaling in found.scalings} == ALL
    assert all(parameter.dtype == torch.bfloat16 for parameter in block.parameters())


# -- applying ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("axis", "power", "offset"), [(0, 1, 0.0), (0, -1, 0.0), (1, 1, 0.0), (1, -1, 0.5)])
def test_applying_agrees_with_the_formula(axis: int, power: int, offset: float) -> None:
    weight = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))
    scale = torch.tensor([2.0, 4.0])
    index = torch.tensor([1, -1, 0, 1][: weight.shape[axis]])
    result = apply_scaling(weight, ScaleUse("w", axis, power, index, offset), scale)
    for i in range(3):
        for j in range(4):
            number = int(index[(i, j)[axis]])
            factor = 1.0 if number < 0 else float(scale[number]) ** power
            assert float(result[i, j]) == pytest.approx((float(weight[i, j]) + offset) * factor - offset, rel=1e-6)


def test_gradients_reach_the_scales() -> None:
    scale = torch.tensor([2.0, 4.0, 1.0], dtype=torch.float64, requires_grad=True)
    vector = torch.randn(5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for power in (1, -1):
        use = ScaleUse("v", 0, power, torch.tensor([0, 1, -1, 1, 0]), 1.0)
        assert torch.autograd.gradcheck(lambda s, use=use: apply_scaling(vector, use, s), (scale,))


def test_transposed_weights_are_folded_as_they_are_stored() -> None:
    with first_block("gpt2") as (block, run):
        scaling = named(find_scalings(block, run), "mlp")
        (use,) = [use for use in scaling.uses if use.axis == 1]
        module = block.get_submodule(use.parameter.rpartition(".")[0])
        before, scale = linear_weight(module).clone(), scales(scaling)
        fold_scaling(block, scaling, scale)
        torch.testing.assert_close(linear_weight(module), before * scale[None])
        assert module.weight.shape == (64, 96)


@pytest.mark.parametrize("width", [2, 16, 80])
def test_pairs_have_one_scale_each(width: int) -> None:
    assert torch.equal(next(rotary_pairs(width, 0)), torch.arange(width))
    for pairs in rotary_pairs(width, width // 2):
        assert len(pairs) == width
        assert sorted(set(pairs.tolist())) == list(range(int(pairs.max()) + 1))
