"""Runs through blocks that break an assumption: experts in a module list, one sequence a batch, memory given back."""

from __future__ import annotations

import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaMLP

import ptq
from calib.checkpoint.reader import open_model
from calib.data.tokens import Calibration
from calib.model.input_groups import BlockMap, InputGroup, merge_maps
from calib.runner.runner import CalibrationRunner, batch_size
from calib.stats import Stat
from tests.support.tiny_models import tiny_model

CPU = torch.device("cpu")
TOKENS = torch.randint(2, 400, (16, 24), generator=torch.Generator().manual_seed(3))


class TwoExperts(nn.Module):
    """A mixture that is no module of transformers': a module list, and a router of one comparison."""

    def __init__(self, config: Any, layer: int) -> None:
        super().__init__()
        self.experts = nn.ModuleList([LlamaMLP(config) for _ in range(2)])
        self.threshold = 1e9 if layer == 0 else 0.0  # the first block only uses one of them

    def forward(self, x: Tensor) -> Tensor:
        rows, out = x.reshape(-1, x.shape[-1]), torch.zeros_like(x).reshape(-1, x.shape[-1])
        chosen = rows[:, 0] > self.threshold
        for number, expert in enumerate(self.experts):
            mine = (chosen == number).nonzero()[:, 0]
            if len(mine):
                out[mine] = expert(rows[mine])
        return out.view_as(x)


class MixedLlama(LlamaForCausalLM):
    def __init__(self, config: Any) -> None:
        super().__init__(config)
        for number, layer in enumerate(self.model.layers):
            layer.mlp = TwoExperts(config, number)


@pytest.mark.parametrize("method", ["gptq", "coreq"])
def test_experts_in_a_module_list_are_calibrated_on_what_reaches_them(method: str, tmp_path: Path) -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = MixedLlama(tiny_model("llama").config).eval()
    calibration = Calibration(TOKENS, "test", 3, "none")
    report = ptq.quantize(model, out=tmp_path, method=method, group_size=16, calibration=calibration, device="cpu")
    layers = {layer.name.removeprefix("model.layers."): layer for layer in report.layers}
    second = [layers[f"1.mlp.experts.{number}.up_proj"] for number in (0, 1)]
    assert sum(layer.tokens or 0 for layer in second) == TOKENS.numel()
    assert all("routes tokens by itself" in " ".join(layer.notes) for layer in second)
    assert layers["0.mlp.experts.0.up_proj"].tokens == TOKENS.numel()
    unused = [warning for warning in report.warnings if "0.mlp.experts.1" in warning]
    assert len(unused) == 3
    assert all("never called" in warning for warning in unused)


def test_maps_of_several_batches_are_merged_in_the_order_of_execution() -> None:
    q, a, b, o = (InputGroup((name,)) for name in ("q", "a", "b", "o"))
    merged = merge_maps([BlockMap((q, a, o), 1.0), BlockMap((q, b, o), 2.0), BlockMap((q, a, b, o), 3.0)])
    assert [group.linears[0] for group in merged.groups] == ["q", "b", "a", "o"]
    assert [group.routed for group in merged.groups] == [False, True, True, False]
    assert merged.flops == 3.0


def test_the_weights_of_a_block_are_gone_before_the_next_is_loaded() -> None:
    source = open_model(tiny_model("llama", num_hidden_layers=3))
    load, seen = source.load, []
    references: list[weakref.ref[Tensor]] = []

    def watched(names: frozenset[str]) -> None:
        seen.append(sum(reference() is not None for reference in references))
        load(names)

    source.load = watched  # type: ignore[method-assign]
    with torch.no_grad():
        for context in CalibrationRunner(source, TOKENS, device=CPU, dtype=torch.bfloat16):
            for group in context.groups(frozenset({Stat.HESSIAN}), frozenset(context.linears)):
                group.statistics()
                for name in group.names:
                    group.replace(name, context.full(name) * 1)
            kept = (context._originals, context._full, context._replaced)
            references = [weakref.ref(tensor) for weights in kept for tensor in weights.values()]
            assert len(references) == 21
            del group, kept
    assert seen == [0] * 4  # the embedding with the first block, then every block


def test_batches_do_not_depend_on_the_number_of_processes_and_are_at_least_eight() -> None:
    for samples in (1, 7, 8, 9, 16, 100, 128):
        size = batch_size(samples, 24, CPU)
        assert -(-samples // size) >= min(samples, 8)
    assert batch_size(128, 4096, CPU) == 1
    assert batch_size(128, 2048, CPU) == 2


@pytest.mark.parametrize("samples", [8, 9, 16])
def test_cross_validation_has_two_halves_whatever_the_batches(samples: int, tmp_path: Path) -> None:
    """The same folds, and so the same coefficients, for one sequence a batch and for all of them in one."""
    model = tiny_model("llama")
    found = []
    for size in (1, samples):
        source = open_model(model)
        with torch.no_grad():
            for context in CalibrationRunner(source, TOKENS[:samples], device=CPU, dtype=torch.float32, batch=size):
                for group in context.groups(frozenset({Stat.FOLDS}), frozenset(context.linears)):
                    stats = group.statistics()
                    assert stats is not None
                    found.append([fold.hessian for fold in stats.folds])
                    for name in group.names:
                        group.replace(name, (group.weight(name) * 8).round() / 8)
    half = len(found) // 2
    for one, other in zip(found[:half], found[half:], strict=True):
        for a, b in zip(one, other, strict=True):
            assert float(a.abs().sum()) > 0
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
