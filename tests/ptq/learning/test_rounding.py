"""Rounding with a gradient: values and every gradient against a slow formula, one group after another."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ptq.grids.scale_search import fit_scales
from ptq.learning import LearnedConfig
from ptq.learning.linear import LinearLearner, round_together, soft_rounding
from ptq.learning.rounding import Kind, Levels, group_range, levels_of, round_groups, stored
from ptq.methods import METHODS, make_config
from ptq.scheme import SCALE_DTYPES, Scheme
from tests.support.integer_weights import integer_weight, zero_of

KINDS: tuple[Kind, ...] = ("nearest", "offset", "soft")


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=generator(seed))


# -- the slow formula --------------------------------------------------------------------------------------------------


def through(rounded: Tensor, exact: Tensor) -> Tensor:
    """The value of one with the gradient of the other."""
    return exact + (rounded - exact).detach()


def slow_group(z: Tensor, scale: Tensor, zero: Tensor, offset: Tensor | None, top: int, kind: Kind) -> Tensor:
    """One group ``z [g]`` with its own scale and zero, numbers that autograd follows."""
    if kind == "soft":  # a weight moves by whole levels only through its variable
        exact = z.detach() / scale
        code = through(exact.floor(), exact) + offset
    else:
        exact = z / scale if offset is None else z / scale + offset
        code = through(exact.round(), exact)
    return scale * (torch.clamp(code + zero, 0, top) - zero)


def slow_stored(scale: Tensor, scheme: Scheme) -> Tensor:
    """Rounded to the dtype of scales, the gradient passed through."""
    return through(scale.to(SCALE_DTYPES[scheme.scale_dtype]).float(), scale)


def slow_grid(z: Tensor, low: Tensor | float, high: Tensor | float, scheme: Scheme, zero_gradient: bool) -> Any:
    """Scale and zero of one group: its range, shrunk by two factors."""
    smallest, largest = low * z.min().clamp(max=0), high * z.max().clamp(min=0)
    top = 2**scheme.bits - 1
    if scheme.symmetric:
        half = 2 ** (scheme.bits - 1)
        reach = -largest if largest > -smallest else -smallest  # above zero: mirrored
        return slow_stored(reach / half, scheme), torch.tensor(float(half))
    step = (largest - smallest) / top
    exact = (-smallest / step).clamp(0, top)
    return slow_stored(step, scheme), through(exact.round(), exact) if zero_gradient else exact.round().detach()


def slow_weight(learner: LinearLearner, target: Tensor, share: float = 1.0) -> Tensor:
    """What `round_together` gives for one linear, group by group without any padding."""
    found, config, scheme = learner.parameters, learner.config, learner.scheme
    rounded_groups = -int(-share * learner.groups // 1)
    rows = []
    for row in range(learner.out):
        parts = []
        for group in range(learner.groups):
            at = slice(group * learner.size, min((group + 1) * learner.size, learner.width))
            z = target[row, at]
            scale, zero = slow_levels(learner, z, row, group)
            offset = None
            if config.rounding == "offset":
                offset = found["offset"][row, at]
            elif config.rounding == "soft":
                offset = (1.2 * torch.sigmoid(found["soft"][row, at]) - 0.1).clamp(0, 1)
            done = slow_group(z, scale, zero, offset, 2**scheme.bits - 1, config.rounding)
            count = len(z) if group < rounded_groups else 0
            if share < 1 and learner.groups == 1:
                count = -int(-share * len(z) // 1)
            parts.append(torch.cat([done[:count], z[count:]]))
        rows.append(torch.cat(parts))
    return torch.stack(rows)


def slow_levels(learner: LinearLearner, z: Tensor, row: int, group: int) -> tuple[Tensor, Tensor]:
    found, config, scheme = learner.parameters, learner.config, learner.scheme
    shrink = torch.sigmoid if config.clip == "sigmoid" else (lambda value: value)
    if learner.anchor is not None:
        scale, zero = learner.anchor.scale[row, group, 0], learner.anchor.zero[row, group, 0]
        if config.clip == "off":
            return scale, zero
        factor = shrink(found["factor"][row, group, 0])
        return slow_stored(scale * factor * (2 if config.clip == "sigmoid" else 1), scheme), zero
    low, high = (shrink(found[name][row, group, 0]) if name in found else 1.0 for name in ("clip_low", "clip_high"))
    grid: tuple[Tensor, Tensor] = slow_grid(z, low, high, scheme, config.clip == "bounded")
    return grid


def gradients(result: Tensor, of: dict[str, Tensor], seed: int = 9) -> dict[str, Tensor | None]:
    """Of a random linear function of the result."""
    weights = normal(*result.shape, seed=seed)
    found = torch.autograd.grad((result * weights).sum(), list(of.values()), allow_unused=True)
    return dict(zip(of, found, strict=True))


def assert_same(found: dict[str, Tensor | None], wanted: dict[str, Tensor | None]) -> None:
    for name, value in wanted.items():
        ours = found[name]
        if value is None or ours is None:
            assert ours is None or not ours.any(), name
            assert value is None or not value.any(), name
        else:
            torch.testing.assert_close(ours, value, rtol=2e-4, atol=2e-5 * float(value.abs().max() + 1), msg=name)


# -- the rounding itself -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("share", [1.0, 0.5])
@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize("kind", KINDS)
def test_values_and_gradients_of_one_rounding(kind: Kind, groups: int, share: float) -> None:
    rows, size, top = 4, 7, 7
    given_offset = {"nearest": None, "offset": normal(rows, groups, size, seed=1) * 0.3}.get(
        kind, torch.rand(rows, groups, size, generator=generator(1))
    )
    tensors = {
        "z": normal(rows, groups, size),
        "scale": 0.1 + torch.rand(rows, groups, 1, generator=generator(2)) * 0.3,  # narrow: some entries are clamped
        "zero": torch.randint(0, 8, (rows, groups, 1), generator=generator(3)).float(),
    }
    tensors["scale"][1] *= -1
    if given_offset is not None:
        tensors["offset"] = given_offset
    tensors = {name: value.requires_grad_() for name, value in tensors.items()}
    z, scale, zero, offset = tensors["z"], tensors["scale"], tensors["zero"], tensors.get("offset")
    fast = round_groups(z, Levels(scale, zero, top), offset, kind, share)
    whole = torch.stack([
        torch.stack([
            slow_group(z[r, g], scale[r, g], zero[r, g], None if offset is None else offset[r, g], top, kind)
            for g in range(groups)
        ])
        for r in range(rows)
    ])  # fmt: skip
    rounded = torch.ones(rows, groups, size, dtype=torch.bool)
    if share < 1 and groups == 1:
        rounded[..., 4:] = False  # ceil(3.5) channels
    elif share < 1:
        rounded[:, 2:] = False  # ceil(1.5) groups
    slow = torch.where(rounded, whole, z)
    torch.testing.assert_close(fast, slow)
    assert torch.equal(fast[~rounded], z[~rounded])
    codes = (whole / scale + zero)[rounded.expand_as(whole)]
    assert (codes < 1e-4).any()
    assert (codes > top - 1e-4).any()
    assert ((codes > 0.5) & (codes < top - 0.5)).any()
    assert_same(gradients(fast, tensors), gradients(slow, tensors))


@pytest.mark.parametrize("share", [0.5, 0.3, 2 / 3])
def test_a_part_of_the_groups_is_rounded_with_the_scales_of_its_own_rows(share: float) -> None:
    size, groups, rows = 8, 4, 6
    sizes = torch.tensor([1.0, 1e3, 1e-3, 7.0, 1e5, 0.1])
    weight = normal(rows, groups * size) * sizes[:, None]
    config = LearnedConfig(lora_rank=0, clip="off", rounding="offset")
    learner = LinearLearner(weight, Scheme(4, False, size, "bfloat16"), config, generator(0))
    found = learner.weight(share=share).detach()
    count = {0.5: 2, 0.3: 2, 2 / 3: 3}[share] * size
    assert torch.equal(found[:, count:], weight[:, count:])
    for row in range(rows):
        alone = LinearLearner(weight[row : row + 1], learner.scheme, config, generator(0)).weight(share=share)
        assert torch.equal(found[row], alone[0].detach())
        error = (found[row, :count] - weight[row, :count]).abs().view(-1, size).amax(-1)
        ranges = weight[row].view(groups, size)[: count // size]
        steps = (ranges.amax(-1).clamp(min=0) - ranges.amin(-1).clamp(max=0)) / 15
        assert (error > 0).all()
        assert (error <= steps * 0.62).all()  # half a step, and what the rounding of scale and zero adds


# -- ranges and grids --------------------------------------------------------------------------------------------------


def test_a_range_holds_zero_and_sends_its_gradient_to_the_extreme_entries() -> None:
    z = torch.tensor([[[1.0, -3.0, 2.0], [1.0, 3.0, 2.0], [-1.0, -3.0, -2.0], [0.0, 0.0, 0.0]]]).requires_grad_()
    low, high = group_range(z)
    assert low.flatten().tolist() == [-3.0, 0.0, -3.0, 0.0]
    assert high.flatten().tolist() == [2.0, 3.0, 0.0, 0.0]
    (gradient,) = torch.autograd.grad((low * 10 + high).sum(), z)
    assert gradient.tolist() == [[[0.0, 10.0, 1.0], [0.0, 1.0, 0.0], [0.0, 10.0, 0.0], [0.0, 0.0, 0.0]]]


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_scales_have_values_that_can_be_stored_and_keep_their_gradient(dtype: Any) -> None:
    scheme = Scheme(4, scale_dtype=dtype)
    scale = (normal(50) * 0.1).requires_grad_()
    found = stored(scale, scheme)
    assert torch.equal(found, found.to(SCALE_DTYPES[dtype]).float())
    torch.testing.assert_close(found, scale, rtol=2.0**-8, atol=1e-7)
    assert torch.equal(torch.autograd.grad(found.sum(), scale)[0], torch.ones(50))
    assert (stored(torch.zeros(3), scheme) > 0).all(), "a scale of zero would divide by zero"


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_the_side_that_reaches_further_gets_the_extra_level(bits: int) -> None:
    half = 2 ** (bits - 1)
    low, high = torch.tensor([[[-4.0]], [[-1.0]], [[-2.0]]]), torch.tensor([[[1.0]], [[4.0]], [[2.0]]])
    levels = levels_of(low, high, Scheme(bits), zero_gradient=False)
    assert torch.equal(levels.scale.flatten(), torch.tensor([4.0, -4.0, 2.0]) / half)
    assert torch.equal(levels.zero, torch.full((3, 1, 1), float(half)))
    ends = torch.cat([low, high], -1)
    rounded = round_groups(ends, levels, None, "nearest")
    assert rounded[0, 0].tolist() == [-4.0, 1.0 if bits > 2 else rounded[0, 0, 1].item()]
    assert rounded[1, 0, 1] == 4.0
    assert rounded[2, 0].tolist() == [-2.0, 2.0 * (half - 1) / half]  # a draw: the side below zero


@pytest.mark.parametrize("symmetric", [True, False])
def test_a_group_of_zeros_stays_one(symmetric: bool) -> None:
    config = LearnedConfig()
    learner = LinearLearner(torch.zeros(2, 8), Scheme(3, symmetric, 4), config, generator(0))
    assert not learner.weight().any()
    assert not learner.fold().dequantize().any()
    found = torch.autograd.grad(learner.weight().sum(), list(learner.parameters.values()), allow_unused=True)
    assert all(one is None or torch.isfinite(one).all() for one in found)


@pytest.mark.parametrize("clip", ["off", "bounded"])
@pytest.mark.parametrize("group_size", [None, 8, 12])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_without_clipping_the_start_is_nearest_rounding_on_minmax_scales(
    bits: int, group_size: int | None, clip: Any
) -> None:
    weight, scheme = normal(16, 32), Scheme(bits, False, group_size, "float16")
    learner = LinearLearner(weight, scheme, LearnedConfig(clip=clip), generator(0))
    found = learner.fold()
    scale, zero = fit_scales(weight, scheme, "minmax")
    assert zero is not None
    assert zero_of(found) is not None
    assert torch.equal(found.params["scale"], scale)
    assert torch.equal(zero_of(found), zero)
    index = torch.arange(32) // (group_size or 32)
    codes = ((weight / scale.float()[:, index]).round() + zero[:, index]).clamp(0, 2**bits - 1)
    assert torch.equal(found.codes, codes.to(torch.uint8))


def test_smooth_clipping_starts_a_little_inside_the_range() -> None:
    weight, scheme = normal(16, 32), Scheme(4, False, 8, "bfloat16")
    found, whole = (
        LinearLearner(weight, scheme, LearnedConfig(clip=clip), generator(0)).fold().params["scale"].float()  # type: ignore[arg-type]
        for clip in ("sigmoid", "off")
    )
    torch.testing.assert_close(found / whole, torch.full_like(found, 1 / (1 + math.exp(-4))), rtol=2.0**-7, atol=0)


# -- a whole linear ----------------------------------------------------------------------------------------------------

CONFIGS = [
    dict(zip(("rounding", "clip", "lora_rank"), values, strict=True))
    for values in itertools.product(KINDS, ("sigmoid", "bounded", "off"), (0, 3))
    if values != ("nearest", "off", 0)
]


def made_learner(
    config: LearnedConfig, scheme: Scheme, shape: tuple[int, int] = (5, 22), anchor: str = "", seed: int = 0
) -> LinearLearner:
    """A learner that has learned something: every tensor is moved from its start."""
    weight = normal(*shape, seed=seed)
    start = None
    if anchor:
        method = METHODS[anchor]
        start = method.quantize(weight, None, scheme, make_config(method, {})).weight  # type: ignore[union-attr]
    learner = LinearLearner(weight, scheme, config, generator(seed), start)
    for number, (name, value) in enumerate(learner.parameters.items()):
        noise = normal(*value.shape, seed=seed * 10 + number + 1)
        amount = {"offset": 0.2, "soft": 1.0, "lora_b": 0.5}.get(name, 0.3)
        value.data += amount * (noise if config.clip != "bounded" or name == "lora_b" else -noise.abs())
    learner.keep_inside()
    return learner


@pytest.mark.parametrize("anchor", ["", "rtn"])
@pytest.mark.parametrize("share", [1.0, 0.5])
@pytest.mark.parametrize("scheme", [Scheme(3, True, 8), Scheme(2, False, 8), Scheme(4, False, None)], ids=str)
@pytest.mark.parametrize("options", CONFIGS, ids=lambda o: "-".join(map(str, o.values())))
def test_values_and_gradients_of_a_linear(options: dict[str, Any], scheme: Scheme, share: float, anchor: str) -> None:
    learner = made_learner(LearnedConfig(**options), scheme, anchor=anchor)  # 22 channels: a ragged last group of 6
    target = learner.target().detach().requires_grad_()
    leaves = {"target": target} | {n: v for n, v in learner.parameters.items() if not n.startswith("lora")}
    fast, slow = round_together([learner], [target], share)[0], slow_weight(learner, target, share)
    torch.testing.assert_close(fast, slow, rtol=1e-6, atol=1e-6)
    assert_same(gradients(fast, leaves), gradients(slow, leaves))


def test_a_low_rank_addition_gets_its_gradient() -> None:
    learner = made_learner(LearnedConfig(lora_rank=3), Scheme(4, False, 8))
    a, b = learner.parameters["lora_a"], learner.parameters["lora_b"]
    assert (a.shape, b.shape) == ((3, 22), (5, 3))
    target = learner.base + b @ a / 3
    torch.testing.assert_close(learner.target(), target)
    assert_same(
        gradients(learner.weight(), learner.parameters), gradients(slow_weight(learner, target), learner.parameters)
    )
    doubled = learner.target(lambda weight: 2 * weight)
    torch.testing.assert_close(doubled, 2 * learner.base + b @ a / 3)


def test_the_low_rank_addition_starts_as_nothing() -> None:
    weight = normal(8, 64)
    learner = LinearLearner(weight, Scheme(4), LearnedConfig(lora_rank=4), generator(5))
    assert torch.equal(learner.target(), weight)
    drawn = learner.parameters["lora_a"]
    assert 0.9 / 8 < drawn.abs().max() <= 1 / 8
    again = LinearLearner(weight, Scheme(4), LearnedConfig(lora_rank=4), generator(5)).parameters["lora_a"]
    assert torch.equal(drawn, again)


@pytest.mark.parametrize("share", [1.0, 0.5])
@pytest.mark.parametrize("anchor", ["", "rtn"])
@pytest.mark.parametrize("options", CONFIGS[::2], ids=lambda o: "-".join(map(str, o.values())))
def test_linears_together_are_as_each_by_itself(options: dict[str, Any], anchor: str, share: float) -> None:
    config = LearnedConfig(**options)
    kinds = [
        ((5, 22), Scheme(3, True, 8)), ((3, 22), Scheme(3, True, 8)), ((4, 16), Scheme(3, True, 8)),
        ((2, 22), Scheme(2, False, 8)), ((6, 16), Scheme(4, False, None)), ((3, 22), Scheme(4, False, None)),
    ]  # fmt: skip
    learners = [made_learner(config, scheme, shape, anchor, seed) for seed, (shape, scheme) in enumerate(kinds)]
    together = round_together(learners, [one.target() for one in learners], share)
    alone = [one.weight(share=share) for one in learners]
    leaves = {f"{n}{name}": value for n, one in enumerate(learners) for name, value in one.parameters.items()}
    for ours, own in zip(together, alone, strict=True):
        assert torch.equal(ours, own)
    flat = torch.cat([weight.flatten() for weight in together]), torch.cat([weight.flatten() for weight in alone])
    assert_same(gradients(flat[0], leaves), gradients(flat[1], leaves))


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from(CONFIGS),
    st.integers(2, 8),
    st.booleans(),
    st.sampled_from([None, 1, 5, 8, 22, 40]),
    st.sampled_from(["float16", "bfloat16"]),
    st.sampled_from(["", "rtn"]),
    st.integers(0, 50),
)
def test_what_is_folded_is_what_was_learned_bit_for_bit(
    options: dict[str, Any],
    bits: int,
    symmetric: bool,
    group_size: int | None,
    scale_dtype: Any,
    anchor: str,
    seed: int,
) -> None:
    scheme = Scheme(bits, symmetric, group_size, scale_dtype)
    learner = made_learner(LearnedConfig(**options), scheme, anchor=anchor, seed=seed)
    folded = learner.fold()
    if options["rounding"] == "soft":  # folding makes the choice: the weight with every choice made
        variable = learner.parameters["soft"].data
        variable.copy_(torch.where(soft_rounding(variable) >= 0.5, 50.0, -50.0))
    assert torch.equal(folded.dequantize(), learner.weight().detach())
    assert int(folded.codes.max()) < 2**bits
    assert (zero_of(folded) is None) == symmetric


# -- starting points ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("clip", ["sigmoid", "bounded", "off"])
@pytest.mark.parametrize("rounding", KINDS)
@pytest.mark.parametrize("scheme", [Scheme(2, True, 8), Scheme(3, False, 12), Scheme(8, True, None)], ids=str)
@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 10**6))
def test_a_starting_point_is_kept_whatever_its_codes(scheme: Scheme, rounding: Any, clip: Any, seed: int) -> None:
    """Codes that nearest rounding would not choose, as error compensation makes them, and mirrored scales."""
    groups = scheme.groups(32)
    codes = torch.randint(0, 2**scheme.bits, (6, 32), generator=generator(seed)).to(torch.uint8)
    scale = (normal(6, groups, seed=seed) * 0.1).to(SCALE_DTYPES[scheme.scale_dtype])
    scale = torch.where(scale.abs() < 1e-3, torch.full_like(scale, 1e-3), scale)
    zero = None
    if not scheme.symmetric:
        zero = torch.randint(0, 2**scheme.bits, (6, groups), generator=generator(seed + 1)).to(torch.uint8)
        scale = scale.abs()
    anchor = integer_weight(codes, scale, zero, scheme)
    config = LearnedConfig(rounding=rounding, clip=clip)
    learner = LinearLearner(normal(6, 32, seed=seed + 2), scheme, config, generator(0), anchor)
    found = learner.fold()
    assert torch.equal(found.codes, codes)
    assert torch.equal(found.params["scale"], scale)
    if rounding != "soft":
        assert torch.equal(learner.weight().detach(), anchor.dequantize())


def test_a_weight_starts_as_near_to_the_border_of_its_cell_as_it_was() -> None:
    scheme = Scheme(4, True, None, "float16")
    weight = torch.tensor([[0.1, -0.3, 0.72, 5.0]])
    anchor = integer_weight(
        torch.tensor([[8, 8, 9, 10]], dtype=torch.uint8), torch.ones(1, 1, dtype=torch.float16), None, scheme
    )
    learner = LinearLearner(weight, scheme, LearnedConfig(), generator(0), anchor)
    torch.testing.assert_close(learner.base, torch.tensor([[0.1, -0.3, 0.72, 2.49]]))
    assert torch.equal(weight, torch.tensor([[0.1, -0.3, 0.72, 5.0]])), "the checkpoint's weight is not changed"


# -- soft rounding and bounds ------------------------------------------------------------------------------------------


def test_soft_rounding_starts_at_the_weight_itself() -> None:
    weight = normal(6, 16)
    learner = LinearLearner(weight, Scheme(4, False, 8), LearnedConfig(rounding="soft", clip="off"), generator(0))
    codes, error = learner.fold().codes, (learner.weight().detach() - weight).abs()
    between = (codes > 0) & (codes < 15)
    assert between.sum() > 60
    assert error[between].max() < 1e-6
    assert error.max() < 0.5 * 6 / 15, "the ends of a range: a zero that is a whole number moves it"
    value = torch.tensor([-50.0, 0.0, 50.0])
    torch.testing.assert_close(soft_rounding(value), torch.tensor([0.0, 0.5, 1.0]))


def test_the_regularizer_is_small_where_choices_are_made() -> None:
    learner = LinearLearner(normal(4, 8), Scheme(4, False, 8), LearnedConfig(rounding="soft", clip="off"), generator(0))
    variable = learner.parameters["soft"]

    def found(value: float, power: float) -> float:
        variable.data.fill_(value)
        term = learner.regularizer(power)
        assert term is not None
        return term.item()

    chosen = 1.2 / (1 + math.exp(-0.4)) - 0.1
    assert found(50.0, 2.0) == 0
    assert found(0.0, 2.0) == 32
    assert found(0.4, 3.0) == pytest.approx(32 * (1 - (2 * chosen - 1) ** 3), rel=1e-5)
    assert LinearLearner(normal(4, 8), Scheme(4), LearnedConfig(), generator(0)).regularizer(2.0) is None


def test_bounded_factors_stay_inside() -> None:
    config = LearnedConfig(clip="bounded", lora_rank=0)
    learner = LinearLearner(normal(4, 8), Scheme(4, False, 8), config, generator(0))
    learner.parameters["clip_low"].data.fill_(1.5)
    learner.parameters["clip_high"].data.fill_(-0.5)
    learner.keep_inside()
    assert (learner.parameters["clip_low"] == 1).all()
    assert (learner.parameters["clip_high"] == 0).all()
    smooth = LinearLearner(normal(4, 8), Scheme(4, False, 8), LearnedConfig(), generator(0))
    smooth.parameters["clip_low"].data.fill_(9.0)
    smooth.keep_inside()
    assert (smooth.parameters["clip_low"] == 9).all(), "a sigmoid bounds itself"
