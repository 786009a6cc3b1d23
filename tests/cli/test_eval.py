"""``ptq eval`` and ``ptq generate`` on a tiny plain model, through the real entry point."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from calib.text import tokenize, tokenizer_hash
from cli.main import main
from cli.models import load_model
from ptq.api import resolve_device
from ptq.errors import UsageError

TEXT = "Once upon a time there was a quick brown fox that jumps over the lazy dog. " * 8


@pytest.fixture
def text_file(tmp_path: Path) -> str:
    path = tmp_path / "text.txt"
    path.write_text(TEXT, encoding="utf-8")
    return str(path)


def run_eval(folder: Path, text: str, *extra: str) -> int:
    return main(["eval", str(folder), "--text", text, "--seqlen", "32", "--device", "cpu", *extra])


def test_the_json_record(
    tiny_folder: Path, tiny_tokenizer: Any, text_file: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from evals import perplexity

    out = tmp_path / "record.json"
    assert run_eval(tiny_folder, text_file, "--json", "--max-tokens", "100", "-o", str(out)) == 0
    printed = capsys.readouterr().out
    assert printed.count("\n") == 1
    record = json.loads(printed)
    assert json.loads(out.read_text(encoding="utf-8")) == record
    model = AutoModelForCausalLM.from_pretrained(tiny_folder)
    expected = perplexity(model, TEXT, tiny_tokenizer, seqlen=32, max_tokens=100)
    assert record["perplexity"] == expected.to_dict()
    assert record["divergence"] is None
    assert record["protocol"] == {"convention": "segments", "seqlen": 32, "max_tokens": 100, "batch_size": 1}
    assert record["text"]["source"] == text_file
    assert record["tokenizer_hash"] == tokenizer_hash(tiny_tokenizer)
    assert record["environment"]["dtype"] == "bfloat16"


def test_a_table_for_people(tiny_folder: Path, text_file: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_eval(tiny_folder, text_file, "--against", str(tiny_folder), "--dtype", "float32") == 0
    shown = capsys.readouterr()
    for words in ("perplexity", "bits per byte", "top-1 agreement", "100.00%", "KL(base || model)", "float32"):
        assert words in shown.out
    assert shown.err == ""


def test_a_slice_of_the_text(tiny_folder: Path, text_file: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_eval(tiny_folder, f"{text_file}@0.5:1", "--json") == 0
    half = json.loads(capsys.readouterr().out)["perplexity"]["segments"]
    assert run_eval(tiny_folder, text_file, "--json") == 0
    assert 0 < half < json.loads(capsys.readouterr().out)["perplexity"]["segments"]


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["--text", "nowhere.txt"], 4, "there is no file 'nowhere.txt'"),
        (["--text", "wikitex2"], 2, "Did you mean 'wikitext2'"),
        (["--seqlen", "4096"], 4, "exceed the model's context of 2048"),
        (["--max-tokens", "8"], 4, "one segment needs 32"),
        (["--dtype", "float61"], 2, "unknown dtype 'float61'. Did you mean 'float16'"),
        (["--device", "tpus"], 2, "unknown device"),
        (["--against", "no/such/model"], 3, "there is no folder no/such/model"),
        (["-o", "no/such/folder/record.json"], 6, "there is no folder"),
        (["--seqlen", "1"], 2, "x>=2"),
    ],
)
def test_errors(
    tiny_folder: Path,
    text_file: str,
    arguments: list[str],
    code: int,
    words: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert run_eval(tiny_folder, text_file, *arguments) == code
    assert words in capsys.readouterr().err


def test_models_that_are_none(
    tiny_folder: Path, tmp_path: Path, text_file: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_eval(Path("/no/such/model"), text_file) == 3
    assert "there is no folder /no/such/model" in capsys.readouterr().err
    assert run_eval(tmp_path / "a.gguf", text_file) == 3
    assert "there is no file" in capsys.readouterr().err
    assert run_eval(Path(text_file), text_file) == 3
    assert "is a file; give a model folder" in capsys.readouterr().err
    folder = shutil.copytree(tiny_folder, tmp_path / "vit")
    (folder / "config.json").write_text('{"model_type": "vit"}', encoding="utf-8")
    assert run_eval(folder, text_file) == 3
    assert f"{folder} is not a causal language model" in capsys.readouterr().err


def test_a_pickle_is_never_opened(tiny_folder: Path, tmp_path: Path) -> None:
    from calib.errors import ModelError

    folder = tmp_path / "pickled"
    folder.mkdir()
    (folder / "config.json").write_bytes((tiny_folder / "config.json").read_bytes())
    torch.save({}, folder / "pytorch_model.bin")
    with pytest.raises(ModelError, match="pickle weights only"):
        load_model(str(folder), device="cpu")


def test_devices() -> None:
    assert resolve_device("cpu") == torch.device("cpu")
    assert resolve_device("auto").type in ("cpu", "cuda")
    with pytest.raises(UsageError, match=r"no device .cuda:99."):
        resolve_device("cuda:99")


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
