"""Tuning of norms: what is learned, what is kept, what is written, what is refused."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import PreTrainedTokenizerFast

import ptq
from calib.data.tokens import Calibration
from cli.main import main
from ptq.errors import ModelError, OutputError, UsageError
from ptq.tuning import TuneConfig, tune
from ptq.tuning.training import norm_parameters, train
from tests.support.tiny_models import tiny_model

TOKENS = torch.randint(2, 400, (12, 24), generator=torch.Generator().manual_seed(5))
CALIBRATION = Calibration(TOKENS, "test", 5, "none")


def quantized(folder: Path, family: str = "llama", **fields: Any) -> Path:
    """A result of 2 bits, which leaves much to learn, beside its model."""
    tiny_model(family, torch.bfloat16).save_pretrained(folder / "model")
    options = {"method": "rtn", "bits": 2, "group_size": 16} | fields
    ptq.quantize(folder / "model", out=folder / "out", device="cpu", **options)
    return folder / "out"


def tensors(folder: Path) -> dict[str, Tensor]:
    return {name: value for file in folder.glob("*.safetensors") for name, value in load_file(file).items()}


def divergence(out: Path, model: Path) -> float:
    """Mean KL in nats per token of the sequences that `tune` holds out, by the plain formula."""
    logits = []
    for loaded in (ptq.load(model, dtype=torch.float32), ptq.load(out, dtype=torch.float32)):
        with torch.no_grad():
            logits.append(loaded(TOKENS[-2:], use_cache=False).logits.double().log_softmax(-1))
    return float((logits[0].exp() * (logits[0] - logits[1])).sum(-1).mean())


@pytest.mark.parametrize(
    ("family", "fields"),
    [
        ("llama", {}),
        ("llama", {"format": "itq3s", "bits": 3, "group_size": 256}),
        ("llama", {"rotate": ("residual",), "container": "native"}),
        ("gpt2", {"container": "native"}),
        ("qwen3_moe", {"container": "native"}),
    ],
)
def test_norms_learn_and_nothing_else_changes(family: str, fields: dict[str, Any], tmp_path: Path) -> None:
    source = quantized(tmp_path, family, **fields)
    found = tune(
        source, out=tmp_path / "new", calibration=CALIBRATION, config=TuneConfig(epochs=4, lr=0.01), device="cpu"
    )
    assert found.kl_after < found.kl_before
    assert found.kl_before == pytest.approx(divergence(source, tmp_path / "model"), rel=0.02)
    assert found.kl_after == pytest.approx(divergence(tmp_path / "new", tmp_path / "model"), rel=0.02)
    before, after = tensors(source), tensors(tmp_path / "new")
    assert before.keys() == after.keys()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed
    assert all(("norm" in name or "ln_" in name) and before[name].ndim == 1 for name in changed)
    assert all(before[name].dtype == after[name].dtype for name in before)
    tuning = ptq.Report.load(tmp_path / "new").environment["tuning"]
    assert tuning["kl_after"] == found.kl_after
    assert tuning["calibration"]["sequences"] == 12


def test_what_learns_nothing_stays_as_it_is(tmp_path: Path) -> None:
    source = quantized(tmp_path)
    found = tune(source, out=tmp_path / "new", calibration=CALIBRATION, config=TuneConfig(lr=1e3), device="cpu")
    assert found.kl_after == found.kl_before
    before, after = tensors(source), tensors(tmp_path / "new")
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert found.report.environment["tuning"]["steps"] == 0


def test_the_gradient_is_that_of_the_plain_model() -> None:
    """With recomputed blocks, chunks of logits and accumulated sequences, one step of plain gradient descent's sign."""
    model, full = tiny_model("llama"), tiny_model("llama", seed=1)
    norms = norm_parameters(model)
    for value in norms.values():
        value.data.uniform_(0.5, 1.5)
    start = {name: value.detach().clone() for name, value in norms.items()}
    logits = [one(TOKENS[:4], use_cache=False).logits.log_softmax(-1) for one in (full, model)]
    loss = (logits[0].detach().exp() * (logits[0].detach() - logits[1])).sum(-1).mean()
    wanted = torch.autograd.grad(loss, list(norms.values()))
    dtypes = dict.fromkeys(norms, torch.float32)
    config = TuneConfig(epochs=1, batch=4, lr=1e-3, held_out=0.3, checks=1)
    tokens = torch.cat([TOKENS[:4], TOKENS[:2]])
    learned = train(model, full, tokens, config, stored=dtypes)
    for (name, value), gradient in zip(start.items(), wanted, strict=True):
        large = gradient.abs() > 0.05 * gradient.abs().max()
        moved = (learned.values[name] - value)[large]  # the first step of Adam: the rate against the sign
        torch.testing.assert_close(moved, -1e-3 * gradient[large].sign(), rtol=0.01, atol=1e-5)


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2", "qwen3", "olmo2"])
def test_norms_are_found_whatever_they_are_called(family: str) -> None:
    model = tiny_model(family)
    names = {name.rpartition(".")[0] for name in norm_parameters(model)}
    wanted = {name for name, module in model.named_modules() if "Norm" in type(module).__name__}
    assert names == {name for name in wanted if list(model.get_submodule(name).parameters())}


def test_the_model_is_left_as_it_was() -> None:
    model, full = tiny_model("llama"), tiny_model("llama", seed=1)
    flags = [parameter.requires_grad for parameter in model.parameters()]
    dtypes = dict.fromkeys(norm_parameters(model), torch.float32)
    train(model, full, TOKENS[:4], TuneConfig(epochs=1), stored=dtypes)
    assert [parameter.requires_grad for parameter in model.parameters()] == flags
    assert all(parameter.grad is None for parameter in model.parameters())
    assert "forward" not in vars(model.model.layers[0])


def test_refusals(tmp_path: Path) -> None:
    source = quantized(tmp_path)
    with pytest.raises(OutputError, match="the result itself"):
        tune(source, out=source, calibration=CALIBRATION)
    few = dataclasses.replace(CALIBRATION, tokens=TOKENS[:2])
    with pytest.raises(UsageError, match="at least 3 sequences"):
        tune(source, out=tmp_path / "new", calibration=few, device="cpu")
    long = dataclasses.replace(CALIBRATION, tokens=TOKENS.repeat(1, 100))
    with pytest.raises(UsageError, match="exceed the model's context of"):
        tune(source, out=tmp_path / "new", calibration=long, device="cpu")
    with pytest.raises(ModelError, match=r"the full-precision model .* cannot be loaded: "):
        tune(source, out=tmp_path / "new", calibration=CALIBRATION, reference=tmp_path / "nope")
    tiny_model("llama", hidden_size=32).save_pretrained(tmp_path / "other")
    with pytest.raises(UsageError, match="is another model than"):
        tune(source, out=tmp_path / "new", calibration=CALIBRATION, reference=tmp_path / "other")
    (tmp_path / "x.gguf").touch()
    with pytest.raises(UsageError, match=r"tune the folder that it was made from \(x\)"):
        tune(tmp_path / "x.gguf", out=tmp_path / "new", calibration=CALIBRATION)
    (tmp_path / "model").rename(tmp_path / "moved")
    with pytest.raises(UsageError, match="--reference MODEL"):
        tune(source, out=tmp_path / "new", calibration=CALIBRATION)
    packed = quantized(tmp_path / "gptq", bits=4, group_size=32, container="gptq")
    with pytest.raises(UsageError, match="tune the result it was exported from"):
        tune(packed, out=tmp_path / "new", calibration=CALIBRATION)
    rounds = quantized(tmp_path / "acts", act_bits=8)
    with pytest.raises(UsageError, match="no gradient passes that"):
        tune(rounds, out=tmp_path / "new", calibration=CALIBRATION)
    assert not (tmp_path / "new" / "config.json").exists()


@pytest.mark.parametrize(
    "fields", [{"epochs": 0}, {"lr": -1.0}, {"lr": float("nan")}, {"held_out": 1.0}, {"seed": 0.5}]
)
def test_values_out_of_range(fields: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match=next(iter(fields))):
        TuneConfig(**fields)


def test_the_command(
    tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny_model("llama", torch.bfloat16, vocab_size=len(tiny_tokenizer)).save_pretrained(tmp_path / "model")
    tiny_tokenizer.save_pretrained(tmp_path / "model")
    ptq.quantize(tmp_path / "model", out=tmp_path / "out", device="cpu", method="rtn", bits=2, group_size=16)
    (tmp_path / "text.txt").write_text(" ".join(str(n * n * 7919) for n in range(2000)))
    words = ["tune", str(tmp_path / "out"), "--calib", str(tmp_path / "text.txt"), "--calib-samples", "6"]
    words += ["--calib-seqlen", "16", "--device", "cpu", "-o", str(tmp_path / "new")]
    assert main([*words, "--json"]) == 0
    record = json.loads(capsys.readouterr().out)
    assert record["kl_after"] <= record["kl_before"]
    assert record["sequences_held_out"] == 2
    assert main(words) == 6  # the folder is in use
    assert "--overwrite" in capsys.readouterr().err
    assert main([*words, "--overwrite"]) == 0
