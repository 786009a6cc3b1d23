"""Experts: statistics of the rows that the full-precision router sends to each, in both streams."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import calib.runner.runner as runner_module
from calib.checkpoint.reader import open_model
from calib.runner.expert_routing import FEW
from calib.runner.runner import CalibrationRunner
from calib.stats import Stat
from tests.support.tiny_models import tiny_model

CPU = torch.device("cpu")
TOKENS = torch.randint(2, 400, (5, 24), generator=torch.Generator().manual_seed(0))
TWO = frozenset({Stat.HESSIAN, Stat.MISMATCH, Stat.MISMATCH_ENERGY})
LAYER = 1  # deepseek's first block is dense


def experts_called_with(model: Any, layer: int) -> tuple[Tensor, Tensor]:
    """Hidden rows and expert numbers that a model's own experts get, ``[tokens, width]`` and ``[tokens, k]``."""
    found: list[tuple[Tensor, ...]] = []
    module = model.model.layers[layer].mlp.experts
    handle = module.register_forward_pre_hook(lambda _, args: found.append(args))
    with torch.no_grad():
        model(input_ids=TOKENS, use_cache=False)
    handle.remove()
    return torch.cat([args[0] for args in found]), torch.cat([args[1] for args in found])


def slow_inner(model: Any, layer: int, expert: int, rows: Tensor) -> Tensor:
    """What the down projection of an expert gets, from the fused weights."""
    experts = model.model.layers[layer].mlp.experts
    gate, up = (rows @ experts.gate_up_proj[expert].T).chunk(2, dim=-1)
    return experts.act_fn(gate) * up


@pytest.mark.parametrize("lockstep", [True, False])
@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "deepseek_v3"])
def test_statistics_are_those_of_the_routed_tokens(
    family: str, lockstep: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """H and D of every expert against whole fused models, one of them with its first block's weights changed."""
    if not lockstep:
        monkeypatch.setattr(runner_module, "_LOCKSTEP_SHARE", 0.0)
    full, changed = tiny_model(family), tiny_model(family)
    o_proj = changed.model.layers[0].self_attn.o_proj.weight
    o_proj.data = (o_proj.data * 8).round() / 8
    x, index = experts_called_with(full, LAYER)
    own, _ = experts_called_with(changed, LAYER)
    starved = 0
    with torch.no_grad():
        for context in CalibrationRunner(open_model(full), TOKENS, device=CPU, dtype=torch.float32):
            for group in context.groups(TWO, frozenset(context.linears)):
                if context.index == 0 and group.names == ("self_attn.o_proj",):
                    group.replace(group.names[0], o_proj.data)
                if context.index != LAYER or not group.group.experts:
                    continue
                stats = group.statistics()
                assert stats is not None
                assert stats.moments is not None
                assert stats.moments.mismatch is not None
                expert = int(group.group.expert.rpartition(".")[2])
                rows = (index == expert).any(-1)
                few = int(rows.sum()) < FEW * x.shape[1]
                assert bool(group.notes) == few
                if few:
                    starved += 1
                    assert f"{int(rows.sum())} of {len(x)} tokens" in group.notes[0]
                    rows = torch.ones_like(rows)
                assert stats.tokens == int(rows.sum())
                a, b = x[rows], own[rows]
                if group.names[0].endswith("down_proj"):
                    a, b = slow_inner(full, LAYER, expert, a), slow_inner(full, LAYER, expert, b)
                torch.testing.assert_close(stats.moments.hessian, b.T @ b, rtol=1e-3, atol=1e-3)
                torch.testing.assert_close(stats.moments.mismatch, (a - b).T @ b, rtol=1e-3, atol=1e-3)
    assert starved < 8


def test_a_starved_expert_sees_every_token() -> None:
    """A router that never chooses an expert: it is calibrated on all tokens, and the others are not."""
    model = tiny_model("mixtral")
    for layer in model.model.layers:
        layer.mlp.gate.weight.data[3] = 0.0
        layer.mlp.gate.weight.data[:3] = layer.mlp.gate.weight.data[:3].abs() * 5
        layer.post_attention_layernorm.weight.data.abs_()
    _, index = experts_called_with(model, 0)
    counts = torch.bincount(index.flatten(), minlength=4)
    notes: dict[str, tuple[str, ...]] = {}
    tokens: dict[str, int] = {}
    with torch.no_grad():
        for context in CalibrationRunner(open_model(model), TOKENS, device=CPU, dtype=torch.float32, two_streams=False):
            for group in context.groups(frozenset({Stat.HESSIAN}), frozenset(context.linears)):
                stats = group.statistics()
                if context.index == 0 and group.group.experts:
                    assert stats is not None
                    notes[group.group.expert], tokens[group.group.expert] = group.notes, stats.tokens
    for number, count in enumerate(counts.tolist()):
        name = f"mlp.experts.{number}"
        assert tokens[name] == (count if count >= FEW * 64 else TOKENS.numel())
        assert bool(notes[name]) == (count < FEW * 64)


def test_every_expert_is_a_group_without_data() -> None:
    model = tiny_model("qwen3_moe")
    seen: list[str] = []
    with torch.no_grad():
        for context in CalibrationRunner(open_model(model), None, device=CPU, dtype=torch.float32):
            for group in context.groups(frozenset(), frozenset(context.linears)):
                seen += [group.full_name(name) for name in group.names]
    assert sum(".experts." in name for name in seen) == 2 * 4 * 3
