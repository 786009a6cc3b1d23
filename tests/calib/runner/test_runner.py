"""The runner against the model itself: same hidden states, same inputs, for every family."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import calib.runner.runner as runner_module
from calib.checkpoint.reader import ModelSource, open_model
from calib.errors import ModelError, NumericalError
from calib.model.structure import find_blocks, find_linears, linear_weight
from calib.runner.forward import pass_dtype
from calib.runner.runner import CalibrationRunner
from calib.stats import Stat
from tests.support.tiny_models import FAMILIES, MIXTURES, tiny_model

CPU = torch.device("cpu")
TOKENS = torch.randint(2, 400, (5, 24), generator=torch.Generator().manual_seed(0))
TWO = frozenset({Stat.HESSIAN, Stat.MISMATCH, Stat.MISMATCH_ENERGY})


def saved(family: str, folder: Path) -> tuple[Any, ModelSource]:
    model = tiny_model(family)
    model.save_pretrained(folder)
    return model, open_model(folder)


def make_runner(source: ModelSource, tokens: Tensor | None = TOKENS, **options: Any) -> CalibrationRunner:
    return CalibrationRunner(source, tokens, device=CPU, dtype=torch.float32, **options)


def inputs_of(model: Any, name: str, tokens: Tensor) -> Tensor:
    """What a linear gets when the model itself runs."""
    found: list[Tensor] = []
    handle = model.get_submodule(name).register_forward_pre_hook(lambda _, args: found.append(args[0].detach()))
    with torch.no_grad():
        model(input_ids=tokens, use_cache=False)
    handle.remove()
    return torch.cat([x.reshape(-1, x.shape[-1]) for x in found])  # some linears are called more than once


def assert_close_to_scale(found: Tensor, wanted: Tensor) -> None:
    """To 1e-4 of the largest entry: sums over tokens, whose small entries are what large terms leave."""
    scale = float(wanted.abs().max())
    assert float((found - wanted).abs().max()) <= 1e-4 * scale


@pytest.mark.parametrize("family", FAMILIES)
def test_the_streams_are_the_models_own_hidden_states(family: str, tmp_path: Path) -> None:
    model, source = saved(family, tmp_path)
    runner = make_runner(source)
    for context in runner:
        for _ in context.groups(TWO, frozenset(context.linears)):
            pass
    last: list[Tensor] = []
    block = model.get_submodule(runner.block_names[-1])
    handle = block.register_forward_hook(lambda _, __, out: last.append(out[0] if isinstance(out, tuple) else out))
    with torch.no_grad():
        model(input_ids=TOKENS, use_cache=False)
    handle.remove()
    for full in (True, False):
        mine = torch.cat([runner.hidden(i, full=full) for i in runner.batches])
        torch.testing.assert_close(mine, last[0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", ["llama", "gpt2", "phi3", "gemma3_text", "falcon"])
def test_groups_share_inputs_and_statistics_are_those_of_the_model(family: str, tmp_path: Path) -> None:
    model, source = saved(family, tmp_path)
    for context in make_runner(source):
        seen: list[str] = []
        for group in context.groups(frozenset({Stat.HESSIAN}), frozenset(context.linears)):
            stats = group.statistics()
            assert stats is not None
            assert stats.moments is not None
            for name in group.names:
                x = inputs_of(model, group.full_name(name), TOKENS)
                torch.testing.assert_close(stats.moments.hessian, x.T @ x, rtol=1e-3, atol=1e-2)
            seen += group.names
        assert sorted(seen) == sorted(context.linears)


def test_llama_groups_are_qkv_o_gate_up_down(tmp_path: Path) -> None:
    _, source = saved("llama", tmp_path)
    steps = iter(make_runner(source))  # kept: an abandoned runner gives its memory back
    context = next(steps)
    names = [tuple(n.rpartition(".")[2] for n in g.names) for g in context.groups(TWO, frozenset(context.linears))]
    assert names == [("q_proj", "k_proj", "v_proj"), ("o_proj",), ("gate_proj", "up_proj"), ("down_proj",)]


@pytest.mark.parametrize("capture", [True, False])
@pytest.mark.parametrize("family", ["llama", "gpt2", "phi", "gemma2", "falcon", "opt", "gemma3n_text"])
def test_the_quantized_stream_sees_what_was_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, family: str, capture: bool
) -> None:
    """H and D of every group equal those of two whole models, one of them changed linear by linear."""
    if not capture:  # no room: full-precision inputs are computed again, group by group
        monkeypatch.setattr(runner_module, "_LOCKSTEP_SHARE", 0.0)
    full, source = saved(family, tmp_path)
    changed = tiny_model(family)
    for context in make_runner(source):
        for group in context.groups(TWO, frozenset(context.linears)):
            stats = group.statistics()
            assert stats is not None
            x = inputs_of(full, group.full_name(group.names[0]), TOKENS)
            own = inputs_of(changed, group.full_name(group.names[0]), TOKENS)
            moments = stats.of(group.names[0])
            assert_close_to_scale(moments.hessian, own.T @ own)
            assert_close_to_scale(moments.mismatch, (x - own).T @ own)
            for name in group.names:
                weight = group.weight(name)
                energy = (((x - own) @ weight.T) ** 2).sum(0)
                assert_close_to_scale(stats.of(name).energy, energy)
                rounded = weight.mul(4).round().div(4)
                group.replace(name, rounded)
                linear_weight(changed.get_submodule(group.full_name(name))).data.copy_(rounded)


def test_blocks_that_share_weights_are_refused() -> None:
    model = tiny_model("llama")
    model.model.layers[1].mlp = model.model.layers[0].mlp
    with pytest.raises(ModelError, match="share parameters"):
        find_blocks(model)


def test_weights_are_given_back_and_the_model_in_memory_stays_as_it_was(tmp_path: Path) -> None:
    model = tiny_model("llama")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    for source in (open_model(model), saved("llama", tmp_path)[1]):
        for context in make_runner(source, None):
            for group in context.groups(frozenset(), frozenset(context.linears)):
                group.replace(group.names[0], torch.zeros_like(group.weight(group.names[0])))
        assert all(p.device.type == "meta" for p in source.skeleton.parameters())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("family", FAMILIES)
def test_blocks_and_linears_are_found(family: str) -> None:
    model = tiny_model(family)
    blocks = find_blocks(model)
    assert len(blocks) == 2
    linears = find_linears(model.get_submodule(blocks[0]))
    assert len(linears) >= (4 if family not in MIXTURES else 2)
    assert all("head" not in name and "embed" not in name for name in linears)


def read_all_weights(runner: CalibrationRunner) -> None:
    for context in runner:
        for group in context.groups(frozenset(), frozenset(context.linears)):
            for name in group.names:
                group.weight(name)


def gather_all_statistics(runner: CalibrationRunner) -> None:
    for context in runner:
        for group in context.groups(frozenset({Stat.HESSIAN}), frozenset(context.linears)):
            group.statistics()


def test_nan_in_weights_and_activations_names_the_place(tmp_path: Path) -> None:
    model = tiny_model("llama")
    model.model.layers[1].mlp.up_proj.weight.data[0, :2] = float("nan")
    model.save_pretrained(tmp_path)
    with pytest.raises(NumericalError, match=r"layers\.1\.mlp\.up_proj: 0\.0326% of the weights"):
        read_all_weights(make_runner(open_model(tmp_path), None))
    model.model.layers[1].mlp.up_proj.weight.data.fill_(float("inf"))
    model.save_pretrained(tmp_path)
    with pytest.raises(NumericalError, match=r"layers\.1"):
        gather_all_statistics(make_runner(open_model(tmp_path)))


def test_pass_dtype_follows_the_checkpoint_and_the_request() -> None:
    assert pass_dtype("float32", torch.bfloat16, CPU) == torch.float32
    assert pass_dtype("auto", torch.float32, CPU) == torch.float32
    assert pass_dtype("auto", torch.float16, CPU) == torch.float32
