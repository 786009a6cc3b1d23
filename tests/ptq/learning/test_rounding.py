"""One rounding and one linear: values and every gradient against a slow formula."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ptq.learning import LearnedConfig
from ptq.learning.linear import LinearLearner, round_together, soft_rounding
from ptq.learning.rounding import Kind, Levels, round_groups
from ptq.methods import METHODS, make_config
from ptq.scheme import SCALE_DTYPES, Scheme
from tests.ptq.learning.drawn import KINDS, generator, normal
from tests.support.integer_weights import zero_of

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
