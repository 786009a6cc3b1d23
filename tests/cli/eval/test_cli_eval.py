"""`ptq eval`: records, tables, the base and its cache."""

from __future__ import annotations

import importlib
import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from calib.data.tokens import tokenize, tokenizer_hash
from cli.main import main
from tests.cli.eval.commands import TEXT, run_eval


def run_tasks(folder: Path, data: Path, *extra: str) -> int:
    arguments = ["--tasks", "arc_easy,wikitext2,lambada_openai", "--data", str(data), "--seqlen", "32"]
    return main(["eval", str(folder), "--device", "cpu", *arguments, *extra])


def copy_with_noise(folder: Path, out: Path) -> Path:
    """The same model with other weights."""
    shutil.copytree(folder, out)
    tensors = load_file(out / "model.safetensors")
    generator = torch.Generator().manual_seed(0)
    for tensor in tensors.values():
        tensor += 0.02 * torch.randn(tensor.shape, generator=generator)
    save_file(tensors, out / "model.safetensors", {"format": "pt"})
    return out


def test_the_json_record(
    tiny_folder: Path, tiny_tokenizer: Any, text_file: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from evals.record import read_record

    out = tmp_path / "record.json"
    assert run_eval(tiny_folder, text_file, "--json", "--max-tokens", "100", "-o", str(out)) == 0
    shown = capsys.readouterr()
    assert shown.out.count("\n") == 1
    assert shown.err == ""
    record = json.loads(shown.out)
    assert json.loads(out.read_text(encoding="utf-8")) == record
    assert read_record(out).to_dict() == record
    model = AutoModelForCausalLM.from_pretrained(tiny_folder)
    segments = tokenize(TEXT, tiny_tokenizer)[:96].view(3, 32)
    with torch.no_grad():
        log_p = torch.log_softmax(model(segments).logits[:, :-1].double(), dim=-1)
    nll = -log_p.gather(-1, segments[:, 1:, None]).sum(dim=(1, 2))  # [3]
    size = sum(len(tiny_tokenizer.decode(ids[1:]).encode()) for ids in segments)  # ASCII: no character is cut
    (text,) = record["texts"]
    assert text["perplexity"] == pytest.approx((nll.sum() / 93).exp().item(), rel=1e-3)
    assert text["standard_error"] == pytest.approx((nll / 31).std().item() / 3**0.5, rel=1e-2)
    assert text["bits_per_byte"] == pytest.approx(nll.sum().item() / math.log(2) / size, rel=1e-3)
    assert (text["tokens"], text["bytes"], text["divergence"]) == (93, size, None)
    assert (text["convention"], text["settings"]) == ("segments", {"seqlen": 32, "max_tokens": 100})
    assert (text["name"], text["source"]) == (text_file, text_file)
    assert (record["record"], record["version"], record["base"], record["tasks"]) == ("ptq-eval", 2, None, [])
    assert record["tokenizer_hash"] == tokenizer_hash(tiny_tokenizer)
    assert record["environment"]["dtype"] == "bfloat16"
    assert record["environment"]["batch_size"] == "auto"
    assert record["model"]["source"] == str(tiny_folder)
    assert record["model"]["bytes"] == (tiny_folder / "model.safetensors").stat().st_size
    assert record["model"]["recipe"] is None


def test_a_table_for_people(tiny_folder: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = copy_with_noise(tiny_folder, tmp_path / "OTHER")
    assert run_tasks(model, data, "--against", str(tiny_folder), "--dtype", "float32", "--limit", "4") == 0
    shown = capsys.readouterr()
    assert shown.err == ""
    lines = [" ".join(line.split()) for line in shown.out.splitlines()]
    for words in (
        f"model {model}",
        f"base {tiny_folder}",
        "text wikitext2: 124 tokens",
        "convention segments, 4 segments of up to 32",
        "top-1 agreement",
        "KL(base || model)",
        "bits per byte",
        "kept of the base 256 tokens and draws",
        "task rows metric value p(gold) chance base lost / won answers changed",
        "note: arc_easy: only the first rows: 4 of 5",
    ):
        assert any(words in line for line in lines), words
    assert any(line.startswith("perplexity") and "+-" in line and "(base" in line for line in lines)
    assert any(line.startswith("arc_easy 4 acc") and "25.0%" in line and " / " in line for line in lines)
    assert any(line.startswith("lambada_openai 1 acc") and " - " in line for line in lines)
    assert "float32" in shown.out
    assert "None" not in shown.out
    assert "nan" not in shown.out


def test_lost_and_won(capsys: pytest.CaptureFixture[str]) -> None:
    from cli.shared.eval_tables import show
    from cli.shared.terminal.screen import console
    from tests.support.record_factory import made_record, made_task

    base = made_record("full", [made_task([1, 1, 1, 0, 0])])
    show(made_record("OUT", [made_task([1, 0, -1, 1, -1])], base=base), console())  # the last: wrong in another way
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("quiz"))
    assert "2 / 1" in line
    assert "80.0%" in line


def test_a_model_against_itself(tiny_folder: Path, data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_tasks(tiny_folder, data, "--against", str(tiny_folder), "--base-top-k", "full", "--json") == 0
    record = json.loads(capsys.readouterr().out)
    divergence = record["texts"][0]["divergence"]
    assert (divergence["kl_mean"], divergence["top1_agreement"], divergence["top_k"]) == (0, 1, None)
    assert record["base"]["model"] == record["model"]
    assert record["base"]["tasks"][0]["items"] == record["tasks"][0]["items"]
    assert run_tasks(tiny_folder, data, "--against", str(tiny_folder)) == 0
    shown = capsys.readouterr().out
    assert "100.00%" in shown
    assert "0 / 0" in shown


def test_the_base_is_loaded_once(
    tiny_folder: Path,
    data: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from cli.shared import models

    loaded: list[str] = []
    original = models.load_model

    def load(source: str, **options: Any) -> Any:
        loaded.append(Path(source).name)
        return original(source, **options)

    monkeypatch.setattr(models, "load_model", load)
    base = Path(shutil.copytree(tiny_folder, tmp_path / "BASE"))
    arguments = ["--against", str(base), "--cache", str(tmp_path / "cache"), "--json"]
    records = []
    for _ in range(2):
        assert run_tasks(tiny_folder, data, *arguments) == 0
        records.append(json.loads(capsys.readouterr().out))
    assert loaded == ["BASE", "MODEL", "MODEL"]
    assert records[0]["texts"][0]["divergence"] == records[1]["texts"][0]["divergence"]
    assert records[0]["base"]["texts"] == records[1]["base"]["texts"]
    assert records[1]["notes"] == []
    assert not (tmp_path / "default cache").exists()

    loaded.clear()  # the windows of another text are missing; the base is loaded, and nothing is said to have changed
    assert run_eval(tiny_folder, "pydoc:eval", "--max-tokens", "64", *arguments) == 0
    assert json.loads(capsys.readouterr().out)["notes"] == []
    assert loaded == ["BASE", "MODEL"]

    loaded.clear()
    shutil.rmtree(base)
    copy_with_noise(tiny_folder, base)
    assert run_tasks(tiny_folder, data, *arguments) == 0
    record = json.loads(capsys.readouterr().out)
    assert loaded == ["BASE", "MODEL"]
    assert record["notes"] == [f"{base} is not what it was when its results were kept: they are computed again"]
    assert record["base"]["model"]["fingerprint"] != records[0]["base"]["model"]["fingerprint"]
    assert record["texts"][0]["divergence"]["kl_mean"] > 0


def test_a_kept_base_that_is_damaged_is_run_again(
    tiny_folder: Path, text_file: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--against", str(tiny_folder), "--cache", str(tmp_path / "cache"), "--json"]
    found = []
    for damage in ("", "{", "{}", "[]"):
        if damage:
            (result,) = (tmp_path / "cache").glob("*/text-*/result.json")
            result.write_text(damage)
        assert run_eval(tiny_folder, text_file, *arguments) == 0
        found.append(json.loads(capsys.readouterr().out)["texts"][0]["divergence"])
    assert all(one == found[0] for one in found)


def test_a_slice_of_the_text(tiny_folder: Path, text_file: str, capsys: pytest.CaptureFixture[str]) -> None:
    def tokens(text: str) -> int:
        assert run_eval(tiny_folder, text, "--json") == 0
        count: int = json.loads(capsys.readouterr().out)["texts"][0]["tokens"]
        return count

    assert 0 < tokens(f"{text_file}@0.5:1") < tokens(text_file)


def test_several_texts_and_conventions(
    tiny_folder: Path, text_file: str, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    names = "segments, llamacpp,sliding,documents"
    more = ["--text", str(data / "wikitext2.txt"), "--convention", names, "--stride", "8"]
    assert run_eval(tiny_folder, text_file, *more, "--json") == 0
    texts = json.loads(capsys.readouterr().out)["texts"]
    assert [text["convention"] for text in texts] == ["segments", "llamacpp", "sliding", "documents"] * 2
    assert run_eval(tiny_folder, text_file, "--convention", "documents") == 0
    assert "per word, per byte" in capsys.readouterr().out


def test_the_folder_of_data_comes_from_the_environment(
    tiny_folder: Path, data: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PTQ_DATA", str(data))
    assert main(["eval", str(tiny_folder), "--seqlen", "32", "--device", "cpu", "--json"]) == 0
    record = json.loads(capsys.readouterr().out)
    assert [text["name"] for text in record["texts"]] == ["wikitext2"]  # the default


def test_harness_results_are_shown(
    tiny_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = []

    def run(model: Any, tokenizer: Any, tasks: list[str], **options: Any) -> dict[str, Any]:
        asked.append((tasks, options))
        results = {"gsm8k": {"exact_match,none": 0.25, "alias": "gsm8k"}}
        return {"harness_version": "0.4.13", "results": results}

    monkeypatch.setattr(importlib.import_module("evals.evaluate"), "run_harness", run)
    assert main(["eval", str(tiny_folder), "--harness", "gsm8k, mmlu", "--limit", "3", "--device", "cpu"]) == 0
    shown = capsys.readouterr().out
    assert asked == [(["gsm8k", "mmlu"], {"batch_size": 1, "limit": 3, "fewshot": None})]
    assert "0.4.13" in shown
    assert "exact_match,none 0.2500" in shown
    assert "perplexity" not in shown  # nothing else was asked


def test_a_model_scored_on_what_it_was_calibrated_on(
    tiny_folder: Path, text_file: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--calib", text_file, "--calib-samples", "2", "--calib-seqlen", "16", "--device", "cpu"]
    out = tmp_path / "OUT"
    assert main(["quantize", str(tiny_folder), "-o", str(out), "--method", "gptq", "--bits", "4", *flags]) == 0
    capsys.readouterr()
    assert run_eval(out, text_file, "--json") == 0
    record = json.loads(capsys.readouterr().out)
    ran, same_text = record["notes"]
    assert ran.startswith("packed linears run on: ")
    assert same_text == f"the model was calibrated on this very text: {text_file}"
    model = record["model"]
    assert (model["recipe"]["method"], model["recipe"]["scheme"]["bits"]) == ("gptq", 4)
    assert model["recipe"]["model_fingerprint"]
    assert model["calibration"]["source"] == text_file
    assert 4 < model["bits_per_weight"] < 5
    assert model["bytes"] == sum(file.stat().st_size for file in out.glob("*.safetensors"))
    assert run_eval(out, f"{text_file}@0.5:1") == 0
    shown = capsys.readouterr().out
    assert "calibrated on this very text" not in shown
    assert "bits per quantized weight" in shown


def test_the_record_is_written_whole_or_not_at_all(
    tiny_folder: Path, text_file: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "record.json"
    out.write_text("precious")
    original = Path.write_text

    def fail(self: Path, content: str, **options: Any) -> int:
        if self.name.startswith("record.json"):
            original(self, content[:20], **options)
            raise OSError(28, "No space left on device")
        return original(self, content, **options)

    monkeypatch.setattr(Path, "write_text", fail)
    assert run_eval(tiny_folder, text_file, "-o", str(out)) == 6
    assert out.read_text() == "precious"
    assert list(tmp_path.glob("record.json*")) == [out]


def test_rows_of_messages_and_how_windows_begin(
    tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = Path(shutil.copytree(tiny_folder, tmp_path / "chat"))
    chat = tmp_path / "chat.json"
    chat.write_text(json.dumps([{"messages": [{"role": "user", "content": TEXT}]}]), encoding="utf-8")
    assert run_eval(folder, str(chat), "--json") == 4
    assert (
        "chat.json, row 1 is a conversation, but this model's tokenizer has no chat template"
        in (json.loads(capsys.readouterr().out)["error"]["message"])
    )
    (folder / "chat_template.jinja").write_text("{% for m in messages %}<{{ m.role }}>{{ m.content }}</s>{% endfor %}")
    assert run_eval(folder, str(chat), "--bos", "always", "--json") == 0
    (text,) = json.loads(capsys.readouterr().out)["texts"]
    assert text["settings"]["bos"] is True
    assert any("1 conversations" in note for note in text["notes"])
    assert run_eval(folder, str(chat), "--bos", "always") == 0
    assert "each begins with BOS" in capsys.readouterr().out
