"""Checkpoints in a process without ptq: stock transformers reads them, or refuses in one sentence."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import nn

import ptq.integration.loading
from ptq.containers import native
from ptq.integration.transformers import register
from ptq.scheme import Scheme
from tests.ptq.integration.checkpoints import (
    ASYM,
    SYM,
    TOKENS,
    blocks,
    gpt2,
    llama,
    logits,
    packed,
    write,
)


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


STOCK = """
import json, sys, torch, transformers
assert not any(name.split(".")[0] == "ptq" for name in sys.modules)
tokens, answers = torch.tensor(json.loads(sys.argv[1])), []
for folder, name in json.loads(sys.argv[2]):
    try:
        model = getattr(transformers, name).from_pretrained(folder)
        torch.save(model(tokens).logits, folder + "/logits.pt")
        answers.append("OK")
    except Exception as error:
        answers.append(type(error).__name__ + " " + str(error))
print(json.dumps(answers))
"""
NATIVE_WAYS = [("native", cls) for cls in ("AutoModelForCausalLM", "LlamaForCausalLM", "AutoModel")]
AGAIN = [("llama-again", "AutoModelForCausalLM"), ("llama-again", "LlamaForCausalLM"), ("llama-again", "AutoModel")]
AGAIN += [("gpt2-again", "AutoModelForCausalLM"), ("gpt2-again", "GPT2LMHeadModel")]


STOCK_READS = {
    "sym": (SYM, "float32"),
    "per-channel": (Scheme(bits=3, group_size=None, scale_dtype="float16"), "float32"),
    "24-in-72": (Scheme(bits=4, group_size=24, scale_dtype="float16"), "float32"),
    "bf16": (Scheme(bits=3, group_size=32, scale_dtype="bfloat16"), "bfloat16"),
    "fp16": (Scheme(bits=8, group_size=32, scale_dtype="float16"), "float16"),
    "ct-again": (SYM, "float32"),
}


@pytest.fixture(scope="module")
def without_ptq(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[tuple[str, str], str]]:
    """What transformers makes of our folders in one process that never imports ptq (its start takes seconds)."""
    register()
    root = tmp_path_factory.mktemp("stock")
    write(llama(), root / "native", blocks(llama(), ASYM))
    ptq.integration.loading.load(root / "native").save_pretrained(root / "llama-again")
    write(gpt2(), root / "gpt2", blocks(gpt2(), ASYM))
    ptq.integration.loading.load(root / "gpt2").save_pretrained(root / "gpt2-again")
    for name, (scheme, dtype) in STOCK_READS.items():
        model = llama(hidden_size=64 if scheme.group_size == 32 else 72)
        nn.Module.to(model, getattr(torch, dtype))
        write(model, root / name, blocks(model, scheme), "compressed-tensors")
    write(llama(), root / "ct-asym", blocks(llama(), ASYM), "forced")
    loaded = ptq.integration.loading.load(root / "sym")
    loaded.save_pretrained(root / "ct-again")
    jobs = [
        *NATIVE_WAYS,
        *AGAIN,
        ("ct-asym", "LlamaForCausalLM"),
        *((name, "LlamaForCausalLM") for name in STOCK_READS),
    ]
    arguments = [json.dumps(TOKENS.tolist()), json.dumps([(str(root / name), cls) for name, cls in jobs])]
    command = [sys.executable, "-c", STOCK, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True, cwd=root)
    return root, dict(zip(jobs, json.loads(done.stdout), strict=True))


Stock = tuple[Path, dict[tuple[str, str], str]]


@pytest.mark.parametrize("job", NATIVE_WAYS)
def test_without_ptq_native_raises_with_the_sentence(job: tuple[str, str], without_ptq: Stock) -> None:
    answer = without_ptq[1][job]
    assert answer.startswith("ValueError")
    assert native.GUARD_SENTENCE in answer


@pytest.mark.parametrize("job", AGAIN)
def test_without_ptq_native_saved_again_raises(job: tuple[str, str], without_ptq: Stock) -> None:
    answer = without_ptq[1][job]
    assert answer.startswith("RuntimeError")
    assert "mismatch" in answer


@pytest.mark.parametrize("name", STOCK_READS)
def test_without_ptq_compressed_tensors_gives_our_logits(name: str, without_ptq: Stock) -> None:
    root, answers = without_ptq
    assert answers[name, "LlamaForCausalLM"] == "OK"
    theirs, ours = torch.load(root / name / "logits.pt"), logits(ptq.integration.loading.load(root / name))
    assert theirs.dtype == getattr(torch, STOCK_READS[name][1])
    torch.testing.assert_close(theirs, ours, rtol=1e-5, atol=1e-5)


def test_without_ptq_asymmetric_compressed_tensors_fails(without_ptq: Stock) -> None:
    """The reason why `unsupported_reason` refuses it; once transformers loads these files, this test says so."""
    assert "mismatch" in without_ptq[1]["ct-asym", "LlamaForCausalLM"]


def test_asymmetric_compressed_tensors_of_others_stay_packed(tmp_path: Path) -> None:
    dense = write(llama(), tmp_path, blocks(llama(), ASYM), "forced")
    loaded = ptq.integration.loading.load(tmp_path)
    assert len(packed(loaded)) == 14
    torch.testing.assert_close(logits(loaded), logits(dense), rtol=1e-5, atol=1e-5)
