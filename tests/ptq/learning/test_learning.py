"""Learning in windows of blocks: the loop against a plain one, and a block's learner."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.func import functional_call

from ptq.learning import LearnedConfig
from ptq.learning.block import BlockLearner
from ptq.learning.training import _order
from ptq.pipeline.inputs.input_transforms import transform_block_inputs
from ptq.scheme import KeyValueScheme, Scheme
from tests.ptq.learning.windows import SCHEME, TOKENS, options, states, tiny_window, train
from tests.support.tiny_models import tiny_model

# -- the loop against a plain one --------------------------------------------------------------------------------------


def through(rounded: Tensor, exact: Tensor) -> Tensor:
    return exact + (rounded - exact).detach()


def fake_weight(weight: Tensor, found: dict[str, Tensor], scheme: Scheme, smooth: bool) -> Tensor:
    """A weight with a low-rank addition, clipped and rounded, written down from the papers' formulas."""
    if "lora_b" in found:
        weight = weight + found["lora_b"] @ found["lora_a"] / len(found["lora_a"])
    out, width = weight.shape
    z = weight.view(out, width // scheme.group_size, scheme.group_size)  # type: ignore[operator]
    squeeze = torch.sigmoid if smooth else (lambda value: value)
    high = squeeze(found["clip_high"]) * z.amax(-1, keepdim=True).clamp(min=0)
    low = squeeze(found["clip_low"]) * z.amin(-1, keepdim=True).clamp(max=0)
    top = 2**scheme.bits - 1
    if scheme.symmetric:
        step = torch.where(high > -low, -high, -low) / 2 ** (scheme.bits - 1)
        zero = torch.full_like(step, 2 ** (scheme.bits - 1))
    else:
        step = (high - low) / top
        exact = -low / step
        zero = exact.round().detach() if smooth else through(exact.round(), exact)
    step = through(step.half().float(), step)
    level = z / step if "offset" not in found else z / step + found["offset"].view_as(z)
    return (step * ((through(level.round(), level) + zero).clamp(0, top) - zero)).view(out, width)


def fake_input(x: Tensor, bits: int) -> Tensor:
    """A linear's input, rounded a token, asymmetric, the gradient passed through."""
    low, high = x.amin(-1, keepdim=True).clamp(max=0), x.amax(-1, keepdim=True).clamp(min=0)
    step = (high - low) / (2**bits - 1)
    zero = (-low / step).round()
    rounded = (((x / step).round() + zero).clamp(0, 2**bits - 1) - zero) * step
    return through(rounded, x)


def called(model: nn.Module, layers: nn.ModuleList) -> tuple[Tensor, Tensor, list[dict[str, Any]]]:
    """The input and the output of these first layers on all tokens, and the keyword arguments of each layer."""
    calls: list[tuple[Any, dict[str, Any]]] = []
    hooks = [
        layer.register_forward_pre_hook(lambda _, args, kwargs: calls.append((args, kwargs)), with_kwargs=True)
        for layer in layers
    ]
    with torch.no_grad():
        model(TOKENS, use_cache=False)
        for hook in hooks:
            hook.remove()
        arguments = [kwargs for _, kwargs in calls]
        hidden = targets = calls[0][0][0].detach()
        for layer, kwargs in zip(layers, arguments, strict=True):
            targets = layer(targets, **kwargs)
    return hidden, targets, arguments


def plain_loop(
    config: LearnedConfig, start: dict[str, Tensor], blocks: int, family: str, scheme: Scheme, steps: int
) -> tuple[list[float], dict[str, Tensor]]:
    """The whole calibration data in every step, gradients by autograd, torch's own optimizer.

    Returns:
        The loss before every step and of what is kept, and what was learned.
    """
    model = tiny_model(family, num_hidden_layers=max(2, blocks))
    layers = nn.ModuleList(model.model.layers[:blocks])
    hidden, targets, arguments = called(model, layers)
    linears = {
        f"{n}.{name}": m for n, one in enumerate(layers) for name, m in one.named_modules() if type(m) is nn.Linear
    }
    if scheme.act_bits is not None:
        for module in linears.values():
            module.register_forward_pre_hook(lambda _, args: (fake_input(args[0], scheme.act_bits or 0),))
    learned = {name: value.clone().requires_grad_() for name, value in start.items()}
    groups = [{"params": [v], "lr": rate(config, name, steps)} for name, v in learned.items()]
    optimizer = torch.optim.AdamW(groups, weight_decay=0.0)

    def loss() -> Tensor:
        output = hidden
        for number, (layer, kwargs) in enumerate(zip(layers, arguments, strict=True)):
            weights = {}
            for name in [n for n in linears if n.startswith(f"{number}.")]:
                short = name.removeprefix(f"{number}.")
                found = {k.rpartition(":")[2]: v for k, v in learned.items() if k.startswith(f"{number}:{short}:")}
                weight = linears[name].weight.detach()
                weights[f"{short}.weight"] = fake_weight(weight, found, scheme, config.clip == "sigmoid")
            output = functional_call(layer, weights, (output,), kwargs)
        error = (output - targets).square().mean(-1)
        if config.loss == "token":
            error = error / targets.square().mean(-1)
        return error.mean()

    losses, best = [], (math.inf, {})
    for step in range(steps):
        value = loss()
        losses.append(value.item())
        if losses[-1] < best[0]:
            best = losses[-1], {name: tensor.detach().clone() for name, tensor in learned.items()}
        slow = 1.0 if config.decay == "constant" else 1 - step / steps
        found = torch.autograd.grad(value, list(learned.values()))
        if config.grad_clip:
            norm = math.sqrt(sum(float(g.square().sum()) for g in found))
            found = tuple(g * min(1.0, config.grad_clip / (norm + 1e-6)) for g in found)
        if config.optimizer == "sign":
            for (name, tensor), gradient in zip(learned.items(), found, strict=True):
                tensor.data -= slow * rate(config, name, steps) * gradient.sign()
                if "clip" in name:
                    tensor.data.clamp_(0, 1)
        else:
            for group, tensor, gradient in zip(optimizer.param_groups, learned.values(), found, strict=True):
                group["lr"], tensor.grad = slow * rate(config, name_of(learned, tensor), steps), gradient
            optimizer.step()
    if config.keep == "best":
        return [*losses, best[0]], best[1]
    return [*losses, loss().item()], {name: value.detach() for name, value in learned.items()}


def name_of(tensors: dict[str, Tensor], wanted: Tensor) -> str:
    return next(name for name, tensor in tensors.items() if tensor is wanted)


def rate(config: LearnedConfig, name: str, steps: int) -> float:
    if config.optimizer == "sign":
        return 1 / steps
    return (config.lr_lora or 3e-4) if "lora" in name else (config.lr_clip or 3e-2)


CASES: dict[str, tuple[str, dict[str, Any], int, str, Scheme]] = {
    "omniquant": ("omniquant", {"lr_clip": 0.1}, 1, "llama", SCHEME),
    "omniquant with biases": ("omniquant", {"lr_clip": 0.1}, 1, "qwen2", dataclasses.replace(SCHEME, symmetric=True)),
    "omniquant w4a4": (
        "omniquant",
        {"lr_clip": 0.1, "scaling": "off"},
        1,
        "llama",
        dataclasses.replace(SCHEME, bits=4, act_bits=4),
    ),
    "gradients clipped": ("omniquant", {"lr_clip": 0.1, "grad_clip": 1e-4}, 1, "llama", SCHEME),
    "low rank, two blocks": ("sliderquant-lora", {"lora_rank": 3, "lr_lora": 0.002}, 2, "qwen2", SCHEME),
    "autoround": ("autoround", {}, 1, "llama", SCHEME),
    "autoround symmetric": ("autoround", {}, 1, "qwen2", dataclasses.replace(SCHEME, symmetric=True)),
    "autoround, the last step": ("autoround", {"keep": "end"}, 2, "llama", dataclasses.replace(SCHEME, symmetric=True)),
    "the best step is not the last": ("omniquant", {"keep": "best", "lr_clip": 0.5}, 1, "llama", SCHEME),
}


@pytest.mark.parametrize("case", CASES)
def test_learning_is_the_plain_loop(case: str) -> None:
    method, changes, blocks, family, scheme = CASES[case]
    config, steps = options(method, **changes), 7 if method == "omniquant" else 12
    with tiny_window(config, blocks, family, scheme) as (window, learners):
        start = states(learners)
        (record,) = train(window, learners, config, steps)
        found = states(learners)
    losses, wanted = plain_loop(config, start, blocks, family, scheme, steps)
    assert record.loss_before == pytest.approx(losses[0], rel=1e-4)
    assert record.loss_after == pytest.approx(losses[-1], rel=1e-3)
    assert losses[-1] < 0.99 * losses[0]
    assert record.steps == steps
    assert record.notes == ()
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        moved = (value - start[name]).abs()
        assert moved.any(), name
        # A gradient near nothing can have either sign, and both optimizers take a whole step for it.
        close = (found[name] - value).abs() <= 1e-5 + 0.01 * moved
        assert close.float().mean() > (0.98 if config.optimizer == "sign" else 0.995), name


def test_gradients_of_several_batches_are_those_of_one_large_batch() -> None:
    found = []
    for batch, accumulated in ((8, 1), (4, 2), (2, 4)):
        config = options("omniquant", grad_accum=accumulated)
        with tiny_window(config, batch=batch) as (window, learners):
            records = train(window, learners, config)
            found.append((records[0], states(learners)))
    for record, state in found[1:]:
        assert record.loss_after == pytest.approx(found[0][0].loss_after, rel=1e-4)
        for name, value in state.items():
            torch.testing.assert_close(value, found[0][1][name], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("loss", ["mse", "huber", "token"])
@pytest.mark.parametrize("rounding", ["nearest", "offset", "soft"])
def test_every_kind_of_learning_lowers_its_loss(rounding: Any, loss: Any) -> None:
    config = LearnedConfig(rounding=rounding, loss=loss, lr_offset=0.05, lora_rank=2)
    with tiny_window(config) as (window, learners):
        (record,) = train(window, learners, config, 20)
        assert record.loss_after < record.loss_before
        (again,) = train(window, learners, config, 1)
    if loss != "huber":  # whose corner is a stage's own
        assert again.loss_before == record.loss_after, "the loss that is told is that of what was kept"


def test_the_corner_of_the_huber_loss_follows_the_error_at_the_start() -> None:
    """Losses before and after have the same corner, twice the mean error before: only then can they be compared."""
    config = LearnedConfig(loss="huber", clip="off")
    with tiny_window(config, batch=4) as (window, (learner,)):
        errors = []
        for batch in window.runner.batches:
            target = window.run(batch, full=True)
            window.blocks[0].use(full=False)
            call, hidden = window.runner.call(batch, 0, full=False), window.runner.hidden(batch, full=False)
            errors.append(learner.run(call, hidden, learner.tensors()) - target)
        error = torch.cat(errors)
        (record,) = train(window, [learner], config)
    corner = 2 * error.abs().mean()
    bends = torch.where(error.abs() < corner, error.square() / 2, corner * (error.abs() - corner / 2))
    assert (error.abs() > corner).any()
    assert record.loss_before == pytest.approx(bends.mean().item(), rel=1e-4)


def test_stages_go_on_from_each_other_and_are_told() -> None:
    config = options("sliderquant-lora", intra="window")
    reported: list[tuple[int, int]] = []
    with tiny_window(config) as (window, learners):
        first, second = train(
            window, learners, config, 5, shares=(0.5, 1.0), on_progress=lambda done, of: reported.append((done, of))
        )
        assert learners[0].share == 1.0
    assert (first.share, second.share) == (0.5, 1.0)
    assert first.loss_before < second.loss_before, "half of the channels are still exact"
    assert {of for _, of in reported} == {10}
    assert reported[0] == (5, 10)
    assert reported[-1] == (10, 10)


def test_keys_values_and_inputs_follow_the_share_of_a_stage() -> None:
    """Those of the first stage are rounded in part, whatever the share was when the block was opened."""
    config, scheme = LearnedConfig(), dataclasses.replace(SCHEME, act_bits=4)
    with tiny_window(config, scheme=scheme) as (window, (learner,)):
        learner.context.remove_input_transforms()
        transform_block_inputs(
            learner.context, dict.fromkeys(learner.linears, scheme), KeyValueScheme(4), lambda: learner.share
        )
        seen: list[tuple[float, float]] = []

        def note(*_: int) -> None:
            hidden = learner.context.block.self_attn._ptq_kv.share  # type: ignore[union-attr]
            x = torch.randn(3, 64, generator=torch.Generator().manual_seed(0))
            for hook in learner.context.linears["mlp.up_proj"]._forward_pre_hooks.values():
                (rounded,), _ = hook(None, (x,), {})
                seen.append((hidden, float((rounded != x).any(0).float().mean())))

        train(window, [learner], config, 2, shares=(0.5, 1.0), on_progress=note)
        assert list(dict.fromkeys(seen)) == [(0.5, 0.5), (1.0, 1.0)]
        window.run(0, full=True)
        assert not hasattr(learner.context.block.self_attn, "_ptq_kv"), "the full-precision stream is left alone"


def test_the_order_of_batches_follows_seed_sweep_and_window() -> None:
    config = options("omniquant", batch=2)

    def learned(**changes: Any) -> Tensor:
        with tiny_window(config, batch=2) as (window, learners):
            window.number = changes.pop("number", 0)
            train(window, learners, config, 3, **changes)
            return torch.cat([value.flatten() for value in states(learners).values()])

    same = learned()
    assert torch.equal(same, learned())
    for changes in ({"seed": 1}, {"sweep": 1}, {"number": 1}):
        assert not torch.equal(same, learned(**changes))


@given(st.integers(1, 9), st.integers(1, 40), st.integers(0, 5))
def test_every_epoch_has_every_batch_once(batches: int, count: int, seed: int) -> None:
    order = _order(batches, count, torch.Generator().manual_seed(seed))
    assert len(order) == count
    for start in range(0, count, batches):
        epoch = order[start : start + batches]
        assert len(set(epoch)) == len(epoch)
        assert set(epoch) <= set(range(batches))


# -- a block's learner -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("share", [0.5, 1.0])
@pytest.mark.parametrize("rounding", ["nearest", "soft"])
@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen2", "gemma2", "mixtral"])
def test_settled_weights_are_those_of_training_and_of_the_checkpoint(family: str, rounding: Any, share: float) -> None:
    config = LearnedConfig(rounding=rounding)
    with tiny_window(config, family=family) as (window, (learner,)):
        for number, value in enumerate(learner.parameters().values()):
            noise = torch.randn(value.shape, generator=torch.Generator().manual_seed(number))
            value.data += 0.1 * noise
        learner.share = share
        if rounding == "soft":  # all choices made
            for one in learner.linears.values():
                variable = one.parameters["soft"].data
                variable.copy_(torch.where(variable > 0, 50.0, -50.0))
        trained = learner.run(
            window.runner.call(0, 0, full=False), window.runner.hidden(0, full=False), learner.tensors()
        )
        learner.settle()
        settled = window.run(0, full=False)
        torch.testing.assert_close(settled, trained, rtol=0, atol=0)
        assert not torch.equal(settled, window.run(0, full=True))
        if share == 1:
            for name, weight in learner.fold().items():
                learner.context.replace(name, weight.dequantize())
            assert torch.equal(window.run(0, full=False), settled)


def test_a_state_comes_back_and_lacks_nothing() -> None:
    config = LearnedConfig(rounding="offset")
    with tiny_window(config) as (window, (learner,)):
        start = learner.state()
        train(window, [learner], config)
        end = learner.state()
        assert any(not torch.equal(end[name], value) for name, value in start.items())
        learner.load(start)
        assert all(torch.equal(learner.state()[name], value) for name, value in start.items())
        with pytest.raises(KeyError):
            learner.load({name: value for name, value in start.items() if "offset" not in name})


def test_linears_draw_for_themselves() -> None:
    config = LearnedConfig()
    with tiny_window(config) as (_, (learner,)):
        other = BlockLearner(learner.context, dict.fromkeys(["mlp.up_proj"], SCHEME), config)
        another = BlockLearner(learner.context, dict.fromkeys(["mlp.up_proj"], SCHEME), config, seed=1)
    name = "mlp.up_proj:lora_a"
    assert torch.equal(learner.parameters()[name], other.parameters()[name])
    assert not torch.equal(learner.parameters()[name], another.parameters()[name])
    assert not torch.equal(learner.parameters()[name], learner.parameters()["mlp.gate_proj:lora_a"])
