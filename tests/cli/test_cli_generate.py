"""`ptq generate`: the text of transformers, repeatable, with errors in one sentence."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from calib.data.tokens import tokenize
from cli.main import main


def test_generate_greedy_equals_transformers(
    tiny_folder: Path, tiny_tokenizer: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["generate", str(tiny_folder), "Once upon", "--temperature", "0", "--max-new-tokens", "6"]
    assert main([*arguments, "--device", "cpu", "--json"]) == 0
    record = json.loads(capsys.readouterr().out)
    model = AutoModelForCausalLM.from_pretrained(tiny_folder)
    ids = tokenize("Once upon", tiny_tokenizer)[None]
    expected = model.generate(
        ids, max_new_tokens=6, do_sample=False, attention_mask=torch.ones_like(ids), pad_token_id=0
    )
    new = [token for token in expected[0, ids.shape[1] :].tolist() if token != tiny_tokenizer.eos_token_id]
    assert record["tokens"] == new
    assert record["text"] == tiny_tokenizer.decode(new, skip_special_tokens=True)


def test_generate_is_repeatable_and_follows_the_seed(tiny_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def tokens(seed: str) -> list[int]:
        assert main(["generate", str(tiny_folder), "Once", "--seed", seed, "--device", "cpu", "--json"]) == 0
        found: list[int] = json.loads(capsys.readouterr().out)["tokens"]
        return found

    assert tokens("0") == tokens("0") != tokens("1")


def test_generate_prints_prompt_and_continuation(tiny_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", str(tiny_folder), "Once upon", "--max-new-tokens", "3", "--device", "cpu"]) == 0
    shown = capsys.readouterr()
    assert shown.out.startswith("Once upon")
    assert "tokens in" in shown.err


def test_generate_errors(tiny_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", str(tiny_folder), ""]) == 2
    assert "the prompt is empty" in capsys.readouterr().err
    assert main(["generate", str(tiny_folder), "Once", "--max-new-tokens", "5000", "--device", "cpu"]) == 4
    assert "exceed the model's context of 2048" in capsys.readouterr().err
