"""`ptq eval`: one sentence for what it refuses, before anything is loaded."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from cli.main import main
from cli.shared.models import load_model
from ptq.api import resolve_device
from ptq.errors import UsageError
from tests.cli.eval.commands import run_eval

BAD = {
    "no text": (["--text", "nowhere.txt"], 4, "there is no file 'nowhere.txt'"),
    "near text": (["--text", "wikitex2"], 2, "Did you mean 'wikitext2'"),
    "near task": (["--tasks", "arc_esy"], 2, "unknown task or text 'arc_esy'. Did you mean 'arc_easy'"),
    "no rows": (["--tasks", "piqa"], 4, "has no rows for 'piqa'"),
    "field": (["--tasks", "lacks"], 4, "lacks.jsonl, line 2 has no field 'gold'"),
    "gold": (["--tasks", "wild"], 4, "wild.jsonl, line 1: the field 'gold' is"),
    "choices": (["--tasks", "empty"], 4, "empty.jsonl, line 1: the field 'choices' is"),
    "folder": (["--tasks", "arc_easy", "--data", "no/such"], 4, "there is no folder no/such"),
    "context": (["--seqlen", "4096"], 4, "exceed the model's context of 2048"),
    "too short": (["--max-tokens", "8"], 4, "one segment needs 32"),
    "dtype": (["--dtype", "float61"], 2, "unknown dtype 'float61'. Did you mean 'float16'"),
    "device": (["--device", "tpus"], 2, "unknown device"),
    "base": (["--against", "no/such/model"], 3, "there is no folder no/such/model"),
    "target": (["-o", "no/such/folder/record.json"], 6, "there is no folder"),
    "seqlen": (["--seqlen", "1"], 2, "x>=2"),
    "convention": (["--convention", "llama"], 2, "unknown perplexity convention 'llama'. Did you mean 'llamacpp'"),
    "no convention": (["--convention", ","], 2, "convention"),
    "stride": (["--stride", "8"], 2, "--stride belongs to --convention sliding"),
    "long stride": (["--convention", "sliding", "--stride", "32"], 2, "the stride must be in 1 .. 31"),
    "rule": (["--convention", "documents", "--documents", "page"], 2, "unknown rule for documents 'page'"),
    "batch": (["--batch-size", "0"], 2, "the batch size must be a number of at least 1 or 'auto'"),
    "batch word": (["--batch-size", "\u00b2"], 2, "the batch size must be a number"),
    "top k": (["--base-top-k", "0"], 2, "--base-top-k must be a number of at least 1"),
    "top k word": (["--base-top-k", "\u00b2"], 2, "--base-top-k must be a number"),
    "limit": (["--limit", "0"], 2, "x>=1"),
    "fewshot": (["--tasks", "arc_easy", "--fewshot", "9"], 2, "9 examples are asked for"),
}


@pytest.mark.parametrize("name", BAD)
def test_errors(name: str, tiny_folder: Path, text_file: str, data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    row = {"query": "q", "choices": ["a", "b"], "gold": 0}
    lacking = {"query": "q", "choices": ["a", "b"]}
    for rows, task in (
        ([row, lacking], "lacks"),
        ([row | {"gold": 2}], "wild"),
        ([row | {"choices": []}], "empty"),
    ):
        (data / f"{task}.jsonl").write_text("".join(json.dumps(one) + "\n" for one in rows))
    arguments, code, words = BAD[name]
    where = [] if "--data" in arguments else ["--data", str(data)]
    assert run_eval(tiny_folder, text_file, *where, *arguments) == code
    shown = capsys.readouterr()
    assert shown.out == ""
    assert words in shown.err
    assert "Traceback" not in shown.err
    assert run_eval(tiny_folder, text_file, *where, *arguments, "--json") == code
    assert words in json.loads(capsys.readouterr().out)["error"]["message"]


def test_wrong_names_cost_no_loading(
    tiny_folder: Path, data: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("cli.shared.models.load_model", lambda *_, **__: pytest.fail("loaded"))
    assert main(["eval", str(tiny_folder), "--tasks", "arc_esy", "--data", str(data)]) == 2
    assert main(["eval", str(tiny_folder), "--tasks", "piqa", "--data", str(data)]) == 4
    assert main(["eval", str(tiny_folder), "--against", "no/such", "--data", str(data)]) == 3
    assert main(["eval", str(tiny_folder), "-o", "no/such/file.json", "--data", str(data)]) == 6
    assert "arc_easy" in capsys.readouterr().err


def test_a_base_whose_tokens_do_not_match(
    tiny_folder: Path, text_file: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = Path(shutil.copytree(tiny_folder, tmp_path / "BASE"))
    tokenizer = json.loads((base / "tokenizer.json").read_text())
    tokenizer["model"]["merges"] = tokenizer["model"]["merges"][:-20]
    (base / "tokenizer.json").write_text(json.dumps(tokenizer))
    assert run_eval(tiny_folder, text_file, "--against", str(base)) == 3
    assert f"the base {base} has another tokenizer" in capsys.readouterr().err


def test_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["eval", "--help"]) == 0
    shown = capsys.readouterr().out
    for option in ("--tasks", "--text", "--data", "--limit", "--fewshot", "--convention", "--against", "--cache"):
        assert option in shown
    assert "[default: segments]" in " ".join(shown.split())


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
