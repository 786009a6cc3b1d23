"""Checkpoints through transformers: packed loading, save and reload, and processes that have never heard of ptq."""

from __future__ import annotations

import dataclasses
import json
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
)
from transformers.core_model_loading import WeightRenaming

import ptq.integration.loading
from ptq.containers.native import NATIVE
from ptq.errors import OutputError
from ptq.integration.transformers import PtqConfig, PtqQuantizer, register
from ptq.runtime.activations import quantize_tokens
from ptq.runtime.kv_cache import set_key_values
from ptq.runtime.linear import QuantLinear
from ptq.scheme import KeyValueScheme, Scheme
from ptq.transforms.hadamard import InputRotation
from tests.ptq.integration.checkpoints import (
    ASYM,
    SYM,
    blocks,
    gpt2,
    linears_of,
    llama,
    logits,
    packed,
    write,
)


def qwen2() -> PreTrainedModel:
    torch.manual_seed(0)
    config = Qwen2Config(
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=80,
    )
    model = Qwen2ForCausalLM(config)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            nn.init.normal_(parameter)
    return model


@pytest.fixture(autouse=True)
def no_loading_complaints(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    """transformers reports missing, unexpected or mismatched keys by its logger: no test here may cause one."""
    logger = logging.getLogger("transformers")
    logger.addHandler(caplog.handler)
    yield
    logger.removeHandler(caplog.handler)
    assert [record.getMessage() for record in caplog.get_records("call") if record.levelno >= logging.WARNING] == []


@pytest.fixture(autouse=True)
def registered() -> None:
    register()


CASES: dict[str, tuple[Callable[[], PreTrainedModel], Scheme, str]] = {
    "llama sym": (llama, SYM, "compressed-tensors"),
    "llama sym per channel": (llama, Scheme(bits=5, group_size=None, scale_dtype="float16"), "compressed-tensors"),
    "llama asym": (llama, ASYM, "native"),
    "llama ragged": (llama, Scheme(bits=3, group_size=20, scale_dtype="float16"), "native"),
    "llama sym native": (llama, SYM, "native"),
    "gpt2 sym": (gpt2, SYM, "native"),
    "gpt2 asym bf16": (gpt2, Scheme(4, False, 64, "bfloat16"), "native"),
    "qwen2 sym": (qwen2, SYM, "compressed-tensors"),
    "qwen2 asym": (qwen2, ASYM, "native"),
}


@pytest.mark.parametrize("case", CASES)
def test_load_forward_save_reload(case: str, tmp_path: Path) -> None:
    make, scheme, wanted = CASES[case]
    model = make()
    dense = write(model, tmp_path / "out", blocks(model, scheme), wanted)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    count = len(linears_of(model)) - 1
    assert len(packed(loaded)) == count
    torch.testing.assert_close(logits(loaded), logits(dense), rtol=1e-5, atol=1e-5)
    assert len(packed(loaded)) == count, "weights must stay packed after a forward"
    assert loaded.lm_head.weight is loaded.get_input_embeddings().weight or not model.config.tie_word_embeddings

    loaded.save_pretrained(tmp_path / "again")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again")
    before, after = loaded.state_dict(), again.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) and before[key].dtype == after[key].dtype for key in before)
    assert torch.equal(logits(again), logits(loaded))


@pytest.mark.parametrize("wanted", ["compressed-tensors", "native"])
@pytest.mark.parametrize("scheme", [SYM, Scheme(bits=3, group_size=32, scale_dtype="bfloat16")])
def test_scales_keep_their_dtype(wanted: str, scheme: Scheme, tmp_path: Path) -> None:
    model = llama()
    write(model, tmp_path / "out", blocks(model, scheme), wanted)
    stored = {k: v for p in (tmp_path / "out").glob("*.safetensors") for k, v in load_file(p).items()}
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        loaded = ptq.integration.loading.load(tmp_path / "out", dtype=dtype)
        assert loaded.dtype == dtype
        nn.Module.to(loaded, torch.bfloat16)
        for name, module in loaded.named_modules():
            if isinstance(module, QuantLinear):
                assert torch.equal(module.get_buffer("weight_scale"), stored[f"{name}.weight_scale"])
                assert module.quantized().scheme == scheme
        assert logits(loaded).dtype == torch.bfloat16


def test_mixed_schemes_and_a_dense_linear(tmp_path: Path) -> None:
    model = llama(tie_word_embeddings=False)
    schemes = blocks(model, SYM)
    schemes["model.layers.1.mlp.down_proj"] = Scheme(bits=8, group_size=None, scale_dtype="float16")
    schemes["model.layers.0.self_attn.o_proj"] = None
    dense = write(model, tmp_path / "out", schemes, "compressed-tensors")
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert config["config_groups"]["group_1"]["targets"] == ["model.layers.1.mlp.down_proj"]
    assert config["ignore"] == ["lm_head", "model.layers.0.self_attn.o_proj"]
    loaded = ptq.integration.loading.load(tmp_path / "out")
    assert len(packed(loaded)) == 13
    torch.testing.assert_close(logits(loaded), logits(dense), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("wanted", ["compressed-tensors", "native"])
def test_device_map_auto(wanted: str, tmp_path: Path) -> None:
    model = llama()
    dense = write(model, tmp_path / "out", blocks(model, SYM), wanted)
    loaded = ptq.integration.loading.load(tmp_path / "out", device_map="auto")
    assert not any(tensor.is_meta for tensor in loaded.state_dict().values())
    torch.testing.assert_close(logits(loaded.cpu()), logits(dense), rtol=1e-5, atol=1e-5)


def test_automodel_builds_the_inner_model(tmp_path: Path) -> None:
    from transformers import AutoModel

    model = llama()
    write(model, tmp_path / "out", blocks(model, ASYM))
    inner = AutoModel.from_pretrained(tmp_path / "out")
    assert len(packed(inner)) == 14


def test_dequantize_on_request_is_stock(tmp_path: Path) -> None:
    from transformers import CompressedTensorsConfig

    model = llama()
    dense = write(model, tmp_path / "out", blocks(model, SYM))
    with pytest.warns(UserWarning, match="quantization_config"):
        loaded = AutoModelForCausalLM.from_pretrained(
            tmp_path / "out", quantization_config=CompressedTensorsConfig(dequantize=True)
        )
    assert packed(loaded) == []
    torch.testing.assert_close(logits(loaded), logits(dense), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("make", [llama, gpt2])
def test_what_happens_at_run_time_comes_back_with_the_checkpoint(
    make: Callable[[], PreTrainedModel], tmp_path: Path
) -> None:
    """Rounded inputs and a rotation in the schemes, rounded keys and values beside them: loaded, saved and reloaded."""
    model, key_values = make(), KeyValueScheme(3, symmetric=True)
    schemes = blocks(model, dataclasses.replace(SYM, act_bits=4, input_rotation=5))
    second = [name for name in schemes if ".1." in name]
    schemes |= dict.fromkeys(second, dataclasses.replace(SYM, act_bits=8, act_symmetric=True, input_rotation=6))
    dense = write(model, tmp_path / "out", schemes, "native", key_values)
    for name, scheme in schemes.items():
        if scheme is not None:
            dense.get_submodule(name).register_forward_pre_hook(input_transform(scheme))
    set_key_values(dense, key_values)
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert config["key_values"] == {"bits": 3, "symmetric": True}

    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert {name: loaded.get_submodule(name).scheme for name, scheme in schemes.items() if scheme} == {
        name: scheme for name, scheme in schemes.items() if scheme
    }
    torch.testing.assert_close(logits(loaded), logits(dense), rtol=1e-4, atol=1e-4)
    set_key_values(dense, None)
    assert not torch.allclose(logits(loaded), logits(dense), rtol=1e-3, atol=1e-3)
    loaded.save_pretrained(tmp_path / "again")
    again = ptq.integration.loading.load(tmp_path / "again")
    assert torch.equal(logits(again), logits(loaded))


def input_transform(scheme: Scheme) -> Callable[[nn.Module, tuple[Tensor]], Tensor]:
    """A hook that rotates and rounds the input of a dense linear."""

    def transform(linear: nn.Module, args: tuple[Tensor]) -> Tensor:
        assert scheme.act_bits is not None
        assert scheme.input_rotation is not None
        rotated = InputRotation.of(scheme.input_rotation, args[0].shape[-1])(args[0])
        return quantize_tokens(rotated, scheme.act_bits, scheme.act_symmetric)

    return transform


def test_packed_models_say_what_can_be_done_with_them(tmp_path: Path) -> None:
    model = llama()
    write(model, tmp_path / "a", blocks(model, SYM))
    write(llama(), tmp_path / "b", blocks(model, ASYM))
    for folder in ("a", "b"):
        quantizer: Any = ptq.integration.loading.load(tmp_path / folder).hf_quantizer
        assert quantizer.is_trainable  # with adapters: test_adapters.py
        assert not quantizer.is_qat_trainable
        assert quantizer.is_compileable  # tests/ptq/runtime/test_compile.py
        assert quantizer.is_serializable()


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"version": 3}, "version 3, this ptq reads version 1"),
        ({"version": None}, "version None"),
        ({"key_values": {"bits": 4}}, "key_values is damaged"),
        ({"key_values": {"bits": 1, "symmetric": False}}, "key_values is damaged"),
        ({"key_values": 4}, "key_values is damaged"),
        ({"layers": {"model.layers.7.mlp.up_proj": "x"}, "schemes": {"x": SYM.to_dict()}}, "has no such module"),
        ({"layers": {"model.norm": "x"}, "schemes": {"x": SYM.to_dict()}}, "it is a LlamaRMSNorm"),
        ({"layers": {"model.layers.0.mlp.up_proj": "y"}}, "damaged"),
        ({"schemes": {"x": {"bits": 99}}}, "damaged"),
    ],
)
def test_damaged_native_config(change: dict[str, object], match: str, tmp_path: Path) -> None:
    model = llama()
    write(model, tmp_path, blocks(model, ASYM))
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"] |= change
    config["quantization_config"].pop("check")  # what is wrong is said by whatever reads it
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(OutputError, match=match):
        ptq.integration.loading.load(tmp_path)


def test_load_refuses_other_folders(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="is not a folder"):
        ptq.integration.loading.load(tmp_path / "nowhere")
    with pytest.raises(OutputError, match=r"has no config\.json"):
        ptq.integration.loading.load(tmp_path)


def test_the_quantizer_itself_leaves_scales_alone() -> None:
    quantizer = PtqQuantizer(PtqConfig(**NATIVE.quantization_config({}, {})))
    for name, wanted in (("a.weight_scale", None), ("a.weight", torch.bfloat16)):
        step = WeightRenaming(name, name)
        assert quantizer.get_new_dtype(step, torch.zeros(1), torch.bfloat16) == wanted
