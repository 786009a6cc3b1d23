"""Adapters beside packed linears: what peft and its like look at, and LoRA itself where peft is installed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import ptq
from ptq.errors import UsageError
from ptq.runtime.linear import QuantLinear

# peft 0.21 asks transformers 5.24 for a property of its former name
PEFT_WARNS = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")
TOKENS = torch.arange(24).reshape(2, 12)


@pytest.fixture(params=[True, False], ids=["compressed-tensors", "native"])
def packed(request: pytest.FixtureRequest, tiny_folder: Path, tmp_path: Path) -> Path:
    ptq.quantize(str(tiny_folder), method="rtn", bits=4, group_size=32, symmetric=request.param, out=tmp_path / "OUT")
    return tmp_path / "OUT"


def loss_of(model: Any) -> Tensor:
    loss: Tensor = model(TOKENS, labels=TOKENS).loss
    return loss


def test_a_packed_linear_is_what_adapters_look_for(packed: Path) -> None:
    model = ptq.load(packed)
    linears = [module for module in model.modules() if isinstance(module, QuantLinear)]
    assert len(linears) == 14
    for linear in linears:
        assert isinstance(linear, nn.Linear)
        assert (linear.weight.dtype, linear.weight.device.type) == (torch.bfloat16, "cpu")
        assert not any(parameter.requires_grad for parameter in linear.parameters())


def test_gradients_flow_through_packed_linears(packed: Path) -> None:
    """A low-rank branch written by hand in the first block learns, whatever is packed behind it."""
    model = ptq.load(packed, dtype=torch.float32).requires_grad_(False)
    linear = model.get_submodule("model.layers.0.self_attn.q_proj")
    down, up = nn.Linear(64, 4, bias=False), nn.Linear(4, 64, bias=False)
    nn.init.zeros_(up.weight)
    linear.register_forward_hook(lambda _, args, output: output + up(down(args[0])))
    optimizer = torch.optim.SGD([*down.parameters(), *up.parameters()], lr=20.0)
    before = loss_of(model).item()
    for _ in range(5):
        optimizer.zero_grad()
        loss_of(model).backward()
        optimizer.step()
    assert loss_of(model).item() < before - 1e-4
    assert up.weight.grad is not None


@pytest.mark.parametrize(
    "use",
    [
        lambda weight, delta: weight.data.__iadd__(delta),  # peft's merge
        lambda weight, delta: weight.data.clone().__iadd__(delta),  # its safe_merge
        lambda weight, delta: weight + delta,  # DoRA
        lambda weight, delta: torch.linalg.svd(weight, full_matrices=False),  # PiSSA
        lambda weight, delta: nn.functional.linear(delta, weight),
    ],
)
def test_what_needs_a_dense_weight_is_refused_with_a_sentence(packed: Path, use: Any) -> None:
    weight = ptq.load(packed).get_submodule("model.layers.0.self_attn.q_proj").weight
    with pytest.raises(UsageError, match=r"no dense weight.*quantize the result"):
        use(weight, torch.ones(64, 64))
    assert type(torch.ones(2).to(weight)) is Tensor  # what is made from it is nobody's weight


@PEFT_WARNS
def test_lora_of_peft(packed: Path, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft", reason="needs peft")
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM")
    model = peft.get_peft_model(ptq.load(packed, dtype=torch.float32), config)
    assert model.num_parameters(only_trainable=True) == 2 * (4 * (64 + 64) + 4 * (96 + 64))
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=20.0)
    before = loss_of(model).item()
    for _ in range(5):
        optimizer.zero_grad()
        loss_of(model).backward()
        optimizer.step()
    after = model(TOKENS).logits
    assert loss_of(model).item() < before - 1e-4
    model.save_pretrained(tmp_path / "adapter")
    again = peft.PeftModel.from_pretrained(ptq.load(packed, dtype=torch.float32), tmp_path / "adapter")
    assert torch.equal(again(TOKENS).logits, after)
    with again.disable_adapter():
        assert torch.equal(again(TOKENS).logits, ptq.load(packed, dtype=torch.float32)(TOKENS).logits)
    with pytest.raises(UsageError, match="no dense weight"):
        again.merge_and_unload()


@PEFT_WARNS
def test_the_trainer_of_transformers_takes_a_packed_model_with_adapters(packed: Path) -> None:
    peft = pytest.importorskip("peft", reason="needs peft")
    from transformers.trainer_utils import validate_quantization_for_training

    model = ptq.load(packed)
    with pytest.raises(ValueError, match="quantized"):  # nothing of it could be trained
        validate_quantization_for_training(model)
    config = peft.LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
    validate_quantization_for_training(peft.get_peft_model(model, config))
