"""The whole way of a weight, for every method: quantize, save, load, forward, generate."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

import ptq
from calib.checkpoint.reader import open_model
from calib.data.tokens import Calibration
from ptq.errors import ModelError, NumericalError, OutputError, UsageError
from ptq.methods import METHODS, LayerMethod
from ptq.report import Report
from ptq.runtime.linear import QuantLinear
from tests.support.tiny_models import EXPERT_FAMILIES, FAMILIES, MIXTURES, ODD_FAMILIES, tiny_model

TOKENS = torch.randint(2, 400, (6, 32), generator=torch.Generator().manual_seed(1))
CALIBRATION = Calibration(TOKENS, "test", 1, "none")
VARIANTS: dict[str, dict[str, Any]] = {"coreq-beam": {"method": "coreq", "beam": 3, "cd_passes": 1}}
INTEGER_METHODS = [
    name for name, m in METHODS.items() if isinstance(m, LayerMethod) and m.defaults.get("format", "int") == "int"
]
"""From the table itself, so that no method is without the common tests (learned ones: test_windowed.py)."""


def run(model: Any, out: Path, method: str = "coreq", **fields: Any) -> Report:
    options = {"method": method, "group_size": 16, **VARIANTS.get(method, {}), **fields}
    return ptq.quantize(model, out=out, calibration=CALIBRATION, device="cpu", **options)


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        result: Tensor = model(input_ids=TOKENS[:2]).logits.float()
    return result


def dense_twin(model: Any, packed: Any) -> Any:
    """The original model with the packed model's dequantized weights: what the packed one must compute."""
    source = open_model(model)
    source.load(source.tensor_names())
    model = source.skeleton
    for name, module in packed.named_modules():
        if isinstance(module, QuantLinear):
            linear = model.get_submodule(name)
            weight = module.quantized().dequantize()
            linear.weight.data.copy_(
                weight if linear.weight.shape == weight.shape and "Conv1D" not in type(linear).__name__ else weight.T
            )
    return model


@pytest.mark.parametrize("method", [*INTEGER_METHODS, *VARIANTS])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(
    ("bits", "group_size", "dtype"),
    [(2, 16, torch.float32), (3, None, torch.bfloat16), (4, 24, torch.float32), (8, 64, torch.float16)],
)
def test_matrix(
    method: str, symmetric: bool, bits: int, group_size: int | None, dtype: torch.dtype, tmp_path: Path
) -> None:
    model = tiny_model("llama", dtype)
    report = run(model, tmp_path / "out", method, symmetric=symmetric, bits=bits, group_size=group_size)
    packed = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=dtype)
    count = sum(isinstance(module, QuantLinear) for module in packed.modules())
    assert count == len(report.layers) == 14
    before, after = logits(packed), logits(dense_twin(model, packed))
    tolerance = 1e-4 if dtype == torch.float32 else 0.05
    torch.testing.assert_close(before, after, rtol=tolerance, atol=tolerance * float(after.abs().max()))
    divides = group_size in (None, 16)  # 24 and 64 leave a shorter last group in some of the linears
    assert report.container == ("compressed-tensors" if symmetric and divides else "native")
    packed.save_pretrained(tmp_path / "again")
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "again", dtype=dtype)), before)
    assert isinstance(next(m for m in packed.modules() if isinstance(m, QuantLinear)), QuantLinear)  # still packed
    assert report.totals["bits_per_weight"] == pytest.approx(
        sum(8 * layer.payload_bytes for layer in report.layers) / report.totals["quantized_parameters"]
    )
    assert Report.load(tmp_path / "out").to_dict() == json.loads(report.to_json())


@pytest.mark.parametrize("family", FAMILIES | EXPERT_FAMILIES)
@pytest.mark.parametrize("method", INTEGER_METHODS)
def test_families(method: str, family: str, tmp_path: Path) -> None:
    model = tiny_model(family)
    model.save_pretrained(tmp_path / "model")
    report = run(str(tmp_path / "model"), tmp_path / "out", method, bits=4)
    packed = ptq.load(tmp_path / "out")
    torch.testing.assert_close(logits(packed), logits(dense_twin(model, packed)), rtol=1e-3, atol=1e-3)
    generated = packed.generate(TOKENS[:1, :8], max_new_tokens=4, do_sample=False, pad_token_id=1)
    assert generated.shape[1] > 8
    buffers = dict(model.named_buffers())  # DeepSeek's routers store one
    stored = sum(p.numel() for p in model.parameters())
    stored += sum(buffers[name].numel() for name in model.state_dict().keys() & buffers.keys())
    assert report.totals["quantized_parameters"] + report.totals["kept_parameters"] == stored
    if family in MIXTURES:
        assert any(".experts." in layer.name for layer in report.layers)
        assert not any(kept.reason.startswith("fused experts") for kept in report.kept)


@pytest.mark.parametrize("family", ODD_FAMILIES)
@pytest.mark.parametrize("method", ["rtn", "coreq"])
@pytest.mark.parametrize("symmetric", [True, False])
def test_odd_families(family: str, method: str, symmetric: bool, tmp_path: Path) -> None:
    model = tiny_model(family)
    model.save_pretrained(tmp_path / "model")
    report = run(str(tmp_path / "model"), tmp_path / "out", method, bits=4, symmetric=symmetric)
    packed = ptq.load(tmp_path / "out")
    torch.testing.assert_close(logits(packed), logits(dense_twin(model, packed)), rtol=1e-3, atol=1e-3)
    done, kept = {layer.name for layer in report.layers}, {tensor.name: tensor.reason for tensor in report.kept}
    if family == "hunyuan_v1_moe":
        assert kept["model.layers.0.mlp.gate.wg.weight"] == "chooses experts"
    if family == "mamba":
        assert not any("dt_proj" in name for name in done)
        assert "reads its weight directly" in kept["backbone.layers.0.mixer.dt_proj.weight"]
    if family == "lfm2":
        assert not any("experts" in reason for reason in kept.values())
        assert report.container == ("compressed-tensors" if symmetric else "native")


def test_a_layer_that_is_always_zero_is_no_reason_to_stop(tmp_path: Path) -> None:
    model = tiny_model("llama")
    model.model.layers[1].mlp.up_proj.weight.data.zero_()
    report = run(model, tmp_path / "out", "coreq")
    assert any("layers.1.mlp.down_proj: 96 input channels were never active" in text for text in report.warnings)


def test_the_same_command_gives_the_same_bytes(tmp_path: Path) -> None:
    for name in ("a", "b"):
        run(tiny_model("llama"), tmp_path / name, "coreq", beam=2)
    files = sorted(path.name for path in (tmp_path / "a").glob("*.safetensors"))
    assert files
    assert all((tmp_path / "a" / f).read_bytes() == (tmp_path / "b" / f).read_bytes() for f in files)


def test_better_methods_stay_closer_to_the_full_model(tmp_path: Path) -> None:
    model = tiny_model("llama")
    losses = {}
    for method in ("rtn", "gptq", "coreq"):
        run(model, tmp_path / method, method, bits=3)
        losses[method] = float((logits(ptq.load(tmp_path / method)) - logits(model)).pow(2).mean())
    assert losses["gptq"] < losses["rtn"]
    assert losses["coreq"] < losses["rtn"]


def test_overrides_ignore_and_their_record(tmp_path: Path) -> None:
    recipe = ptq.Recipe(
        method="rtn",
        scheme=ptq.Scheme(3, group_size=16),
        overrides=(("*.down_proj", ptq.Scheme(6, group_size=32)),),
        ignore=("*.layers.0.*",),
    )
    report = ptq.quantize(tiny_model("llama"), recipe, out=tmp_path / "out", device="cpu")
    schemes = {layer.name: layer.scheme["bits"] for layer in report.layers}
    assert set(schemes.values()) == {3, 6}
    assert all("layers.1" in name for name in schemes)
    assert {kept.reason for kept in report.kept if "layers.0" in kept.name} == {"ignored by the recipe"}
    packed = ptq.load(tmp_path / "out")
    assert packed.model.layers[1].mlp.down_proj.scheme.bits == 6
    assert isinstance(packed.model.layers[0].mlp.down_proj, torch.nn.Linear)


def test_from_folder_with_text(tiny_folder: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("The quick brown fox jumps over the lazy dog. " * 400)
    messages: list[str] = []
    report = ptq.quantize(
        tiny_folder,
        out=tmp_path / "out",
        bits=4,
        calib=str(text),
        calib_samples=4,
        calib_seqlen=32,
        on_event=lambda event: messages.append(event.kind),
    )
    assert report.calibration is not None
    assert report.calibration["sequences"] == 4
    assert messages.count("block_done") == 2
    assert messages.count("layer_done") == 14
    assert (tmp_path / "out" / "tokenizer.json").exists()
    again = ptq.quantize(tiny_folder, out=tmp_path / "out", method="rtn", bits=2, restart=True)  # replaces our own
    assert again.totals["file_bytes"] < report.totals["file_bytes"]


def test_self_calibration_needs_no_text(tiny_folder: Path, tmp_path: Path) -> None:
    report = ptq.quantize(tiny_folder, out=tmp_path / "out", calib="self", calib_samples=2, calib_seqlen=16)
    assert report.calibration is not None
    assert report.calibration["source"] == "self"


@pytest.mark.parametrize(
    ("fields", "error", "message"),
    [
        ({"method": "coreg"}, UsageError, "'coreq'"),
        ({"beems": 4}, UsageError, "'beam'"),
        ({"bits": 1}, UsageError, "2 to 8"),
        ({"ignore": ("*.q_prj",)}, UsageError, "q_proj"),
        ({"ignore": ("*lm_head",)}, UsageError, "head"),
        ({"ignore": ("*",)}, UsageError, "nothing is left"),
        ({"device": "tpu"}, UsageError, "tpu"),
        ({"device": "cuda:77"}, UsageError, "cuda:77"),
        ({"seed": 10**20}, UsageError, "2\\^63"),
        ({"symmetric": "no"}, UsageError, "true or false"),
        ({"beam": "4"}, UsageError, r"coreq\.beam is a int, got '4'"),
        ({"compute_dtype": ["x"]}, UsageError, "compute_dtype must be a name"),
        ({"container": "gguf"}, UsageError, "compressed-tensors"),
        ({"format": "fp5"}, UsageError, "unknown number format 'fp5'"),
        ({"format": "compressed-tensors", "symmetric": False}, UsageError, "zero points of 3 bits"),
    ],
)
def test_wrong_requests_are_refused_before_work(
    fields: dict[str, Any], error: type[Exception], message: str, tmp_path: Path
) -> None:
    with pytest.raises(error, match=message):
        ptq.quantize(
            tiny_model("llama", tie_word_embeddings=False),
            out=tmp_path / "out",
            calibration=CALIBRATION,
            **{"device": "cpu", "group_size": 16, **fields},
        )
    assert not (tmp_path / "out" / "config.json").exists()


def test_recipe_and_parts_together_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="not both"):
        ptq.quantize("MODEL", ptq.Recipe(), out=tmp_path / "out", bits=3)


def test_nothing_of_the_users_is_overwritten(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(OutputError, match="not empty"):
        run(tiny_model("llama"), tmp_path, "rtn")
    assert (tmp_path / "thesis.txt").read_text() == "years of work"


def test_a_model_in_memory_needs_a_tokenizer_or_tokens(tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    model = tiny_model("llama")
    with pytest.raises(UsageError, match="tokenizer"):
        ptq.quantize(model, out=tmp_path / "out", device="cpu")
    options = {"calib": "self", "calib_samples": 2, "calib_seqlen": 8}
    ptq.quantize(model, out=tmp_path / "out", tokenizer=tiny_tokenizer, device="cpu", **options)
    assert (tmp_path / "out" / "tokenizer.json").exists()


def test_a_damaged_weight_ends_the_run_and_keeps_the_old_result(tmp_path: Path) -> None:
    model = tiny_model("llama")
    run(model, tmp_path / "out", "rtn")
    before = logits(ptq.load(tmp_path / "out"))
    model.model.layers[1].mlp.down_proj.weight.data[0, 0] = float("nan")
    with pytest.raises(NumericalError, match=r"layers\.1\.mlp\.down_proj"):
        run(model, tmp_path / "out", "gptq", restart=True)
    assert torch.equal(logits(ptq.load(tmp_path / "out")), before)


def test_a_quantized_output_is_not_quantized_again(tmp_path: Path) -> None:
    run(tiny_model("llama"), tmp_path / "out", "rtn", format="native")
    with pytest.raises(ModelError, match=r"native format\. It is not quantized again"):
        run(str(tmp_path / "out"), tmp_path / "twice", "rtn")
