"""Files and reports that were changed after they were written."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import ptq
from calib.checkpoint.atomic_files import file_sha256
from cli.main import main
from ptq.checkpoint.verify import SKIP_KEY, verify_checkpoint, verify_files
from ptq.checkpoint.writer import CheckpointWriter
from ptq.errors import OutputError
from ptq.report import REPORT_NAME, Report, canonical_json
from tests.support.tiny_models import tiny_model


@pytest.fixture
def folder(tmp_path: Path, small_report: Report) -> Path:
    """Two shards and a report with figures."""
    with CheckpointWriter(tmp_path, {}) as checkpoint:
        for name in ("a", "b"):
            checkpoint.write_part(name, {name: torch.ones(300)})
        fields = {field: getattr(small_report, field) for field in small_report.__dataclass_fields__}
        report = Report(**{**fields, "files": checkpoint.files()})
        checkpoint.finish({}, {"quant_method": "ptq"}, report)
    return tmp_path


def edit(folder: Path, **changes: Any) -> None:
    """Change a report, with the checksum that fits."""
    data = json.loads((folder / REPORT_NAME).read_text()) | changes
    del data["sha256"]
    data["sha256"] = hashlib.sha256(canonical_json(data)).hexdigest()
    (folder / REPORT_NAME).write_text(json.dumps(data))


def test_an_unchanged_folder_passes(folder: Path) -> None:
    assert verify_files(folder) == 2
    assert verify_files(str(folder)) == 2


def test_a_changed_shard_is_named_with_both_hashes(folder: Path) -> None:
    path = folder / "model-00002-of-00002.safetensors"
    before = file_sha256(path)
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(OutputError) as caught:
        verify_files(folder)
    text = str(caught.value)
    assert path.name in text
    assert before in text
    assert file_sha256(path) in text
    assert "verify=False" in text


@pytest.mark.parametrize(
    ("damage", "match"),
    [
        (lambda path: path.write_bytes(path.read_bytes()[:-4]), r"00001.*was changed after it was written"),
        (lambda path: path.unlink(), r"00001.* is missing"),
        (lambda path: path.with_name("model.safetensors").touch(), "would be loaded in place"),
    ],
    ids=["shorter", "missing", "shadowed"],
)
def test_other_damage(damage: Any, match: str, folder: Path) -> None:
    damage(folder / "model-00001-of-00002.safetensors")
    with pytest.raises(OutputError, match=match):
        verify_files(folder)


def test_an_edited_report_is_refused(folder: Path) -> None:
    report = Report.load(folder)
    assert report.to_dict() == json.loads((folder / REPORT_NAME).read_text())
    edit(folder)  # another layout, the same data
    assert Report.load(folder) == report
    data = json.loads((folder / REPORT_NAME).read_text()) | {"warnings": ["none"]}
    (folder / REPORT_NAME).write_text(json.dumps(data))
    with pytest.raises(OutputError, match=r"ptq_report\.json was changed after it was written: it states .* and has "):
        Report.load(folder)
    with pytest.raises(OutputError, match="was changed after it was written"):
        verify_files(folder)


@pytest.mark.parametrize("key", ["sha256", "files", "windows"])
def test_a_report_that_lacks_something_is_refused(key: str, folder: Path) -> None:
    data = json.loads((folder / REPORT_NAME).read_text())
    del data[key]
    (folder / REPORT_NAME).write_text(json.dumps(data))
    with pytest.raises(OutputError, match="was changed after it was written"):
        Report.load(folder)


@pytest.mark.parametrize(
    "files",
    [[], {"a": []}, {"a": {"bytes": 1}}, {"a": {"bytes": "x", "sha256": ""}}, {"../x": {"bytes": 1, "sha256": ""}}],
)
def test_a_report_with_odd_files_is_an_error_of_ours(files: Any, folder: Path) -> None:
    edit(folder, files=files)
    with pytest.raises(OutputError, match=r"is damaged|not a file of that folder"):
        verify_files(folder)


def test_without_a_report_there_is_nothing_to_verify(folder: Path) -> None:
    (folder / REPORT_NAME).unlink()
    (folder / "model-00001-of-00002.safetensors").unlink()
    assert verify_files(folder) == 0


def test_the_hook_of_quantizers(folder: Path) -> None:
    files = [str(path) for path in folder.glob("*.safetensors")]
    verify_checkpoint(SimpleNamespace(), files)
    (folder / "model-00001-of-00002.safetensors").write_bytes(b"")
    with pytest.raises(OutputError, match="was changed"):
        verify_checkpoint(SimpleNamespace(), files)
    config = SimpleNamespace(**{SKIP_KEY: True})
    verify_checkpoint(config, files)
    assert vars(config) == {}  # save_pretrained would write it down
    verify_checkpoint(config, None)


def test_load_verifies_unless_told_not_to(tmp_path: Path) -> None:
    model, out = tiny_model("llama"), tmp_path / "out"
    ptq.quantize(model, out=out, method="rtn", group_size=16, device="cpu")
    report = Report.load(out)
    path = out / "model.safetensors" if (out / "model.safetensors").exists() else sorted(out.glob("model-*"))[0]
    stated = {p.name: {"bytes": p.stat().st_size, "sha256": file_sha256(p)} for p in out.glob("model*.safetensors")}
    changed = Report(**{f: getattr(report, f) for f in report.__dataclass_fields__ if f != "files"}, files=stated)
    (out / REPORT_NAME).write_text(changed.to_json())
    ptq.load(out)
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(OutputError, match=f"{path.name} was changed"):
        ptq.load(out)
    loaded = ptq.load(out, verify=False)
    loaded.save_pretrained(tmp_path / "again")
    assert ptq.load(tmp_path / "again") is not None  # saved without a report: nothing to compare


def test_inspect_verify(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(folder), "--verify"]) == 0
    assert "2 weight files are as the report says" in capsys.readouterr().out
    (folder / "model-00001-of-00002.safetensors").write_bytes(b"")
    assert main(["inspect", str(folder)]) == 0
    assert main(["inspect", str(folder), "--verify"]) == 6
    assert "model-00001-of-00002.safetensors was changed" in capsys.readouterr().err
