"""What goes along from a model's folder: all but weights and their index, and nothing from outside."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest

import ptq
from ptq.checkpoint import companions
from ptq.checkpoint.companions import copy_companions, find_companions
from ptq.pipeline.events import Event
from ptq.report import Report

OPTIONS = {"method": "rtn", "bits": 4, "group_size": 32}


def fill(folder: Path, *names: str) -> Path:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(name)
    return folder


def left(folder: Path, **options: bool) -> set[str]:
    return {name for names in find_companions(folder, folder / "out", **options).left.values() for name in names}


def taken(folder: Path, **options: bool) -> set[str]:
    return set(find_companions(folder, folder / "out", **options).files)


def test_files_go_along_by_exclusion(tmp_path: Path) -> None:
    along = (
        *("tokenizer.json", "tokenizer.model", "tekken.json", "chat_template.jinja", "preprocessor_config.json"),
        *("LICENSE", "NOTICE.txt", "USE_POLICY.md", "added_tokens.json", "anything.xyz", "spec.pt.txt"),
    )
    weights = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "a.pt", "b.PTH", "c.gguf")
    weights += ("d.h5", "e.msgpack", "f.onnx", "g.onnx_data_1", "pytorch_model.bin.index.json", "config.json")
    fill(tmp_path, *along, *weights, ".gitattributes", ".cache/x", "README.md", "quantize_config.json")
    assert taken(tmp_path) == set(along)
    assert left(tmp_path) == {"README.md", "quantize_config.json"}  # weights and hidden files need no word


def test_python_files_go_along_with_the_users_leave(tmp_path: Path) -> None:
    fill(tmp_path, "modeling_own.py", "layers/attention.py", "layers/table.json")
    assert taken(tmp_path) == {"layers/table.json"}
    assert left(tmp_path) == {"modeling_own.py", "layers/attention.py"}
    assert taken(tmp_path, code=True) == {"modeling_own.py", "layers/attention.py", "layers/table.json"}


def test_processors_stay_behind_where_only_text_is_written(tmp_path: Path) -> None:
    fill(tmp_path, "preprocessor_config.json", "video_preprocessor_config.json", "processor_config.json", "vocab.txt")
    assert taken(tmp_path, text_only=True) == {"vocab.txt"}
    assert "vocab.txt" not in left(tmp_path, text_only=True)


def test_sub_folders_that_are_small_and_hold_no_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fill(tmp_path, "templates/tool/use.jinja", "original/params.json", "other/config.json", "other/deep/x.safetensors")
    fill(tmp_path, "out/tokenizer.json", "__pycache__/x.json", "l1/l2/l3/l4/l5/file")
    assert taken(tmp_path) == {"templates/tool/use.jinja"}
    assert left(tmp_path) == {"original/", "other/", "l1/"}
    monkeypatch.setattr(companions, "MAX_FOLDER", 4)
    monkeypatch.setattr(companions, "MAX_FILE", 4)
    fill(tmp_path, "large", "tiny")
    assert taken(tmp_path) == {"tiny"}
    assert left(tmp_path) == {"original/", "other/", "l1/", "templates/", "large"}


def test_links_are_followed_inside_the_folder_only(tmp_path: Path) -> None:
    folder = fill(tmp_path / "model", "vocab.txt", "shared/inside.txt")
    fill(tmp_path, "secret.txt", "secrets/key.txt")
    (folder / "same.txt").symlink_to("vocab.txt")
    (folder / "again").symlink_to("shared")
    (folder / "secret.txt").symlink_to(tmp_path / "secret.txt")
    (folder / "secrets").symlink_to(tmp_path / "secrets")
    (folder / "shared" / "secret.txt").symlink_to("../../secret.txt")
    (folder / "shared" / "up").symlink_to("..")
    (folder / "gone.txt").symlink_to("nowhere")
    (folder / "loop.txt").symlink_to("loop.txt")
    os.mkfifo(folder / "pipe")
    found = find_companions(folder, tmp_path / "out")
    assert set(found.files) == {"vocab.txt", "same.txt", "shared/inside.txt", "again/inside.txt"}
    assert {"secret.txt", "secrets", "shared/secret.txt", "gone.txt", "loop.txt", "pipe"} <= left(folder)
    copy_companions(found, tmp_path / "out")
    assert (tmp_path / "out" / "same.txt").read_text() == "vocab.txt"
    assert not (tmp_path / "out" / "same.txt").is_symlink()
    assert any("out of the folder" in note and "secret.txt" in note for note in found.notes())


def test_a_link_to_weights_is_weights(tmp_path: Path) -> None:
    fill(tmp_path, "model.safetensors")
    (tmp_path / "notes.txt").symlink_to("model.safetensors")
    assert taken(tmp_path) == set()


def test_a_snapshot_of_the_hub_is_links_into_its_blobs(tmp_path: Path) -> None:
    repository = fill(tmp_path / "models--owner--name", "blobs/aa", "blobs/bb", "refs/main", "blobs/cc")
    snapshot = repository / "snapshots" / "0123"
    (snapshot / "templates").mkdir(parents=True)
    (snapshot / "tokenizer.json").symlink_to("../../blobs/aa")
    (snapshot / "templates" / "tool.jinja").symlink_to("../../../blobs/bb")
    (snapshot / "model.safetensors").symlink_to("../../blobs/cc")
    (snapshot / "refs.txt").symlink_to("../../refs/main")
    found = find_companions(snapshot, tmp_path / "out")
    assert set(found.files) == {"tokenizer.json", "templates/tool.jinja"}
    assert left(snapshot) == {"refs.txt"}
    named = tmp_path / "named"
    named.symlink_to(snapshot)
    assert taken(named) == {"tokenizer.json", "templates/tool.jinja"}


@pytest.fixture
def model(tiny_folder: Path, tmp_path: Path) -> Path:
    return shutil.copytree(tiny_folder, tmp_path / "model")


def test_companions_are_in_the_output_and_the_report(model: Path, tmp_path: Path) -> None:
    fill(model, "LICENSE", "templates/tool.jinja", "README.md", "weights.bin")
    said: list[str] = []

    def listen(event: Event) -> None:
        said.append(event.text if event.kind == "message" else "")

    out = tmp_path / "out"
    report = ptq.quantize(model, out=out, on_event=listen, **OPTIONS)
    assert (out / "templates" / "tool.jinja").read_text() == "templates/tool.jinja"
    assert {"LICENSE", "templates/tool.jinja", "tokenizer.json"} <= set(report.companions)
    assert Report.load(out) == report
    assert not {"weights.bin", "companions"} & {path.name for path in out.iterdir()}
    assert "written by ptq" in (out / "README.md").read_text()  # not the source's, which has these letters
    assert any("README.md" in text for text in said)


def test_companions_of_an_earlier_run_do_not_stay(model: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    fill(model, "LICENSE", "templates/tool.jinja")
    ptq.quantize(model, out=out, **OPTIONS)
    fill(out, "results.json", "templates/mine.jinja")
    shutil.rmtree(model / "templates")
    (model / "LICENSE").unlink()
    ptq.quantize(model, out=out, restart=True, **OPTIONS)
    assert not (out / "LICENSE").exists()
    assert {path.name for path in (out / "templates").iterdir()} == {"mine.jinja"}
    assert (out / "results.json").exists()


def test_a_report_names_no_file_outside_its_folder_to_be_removed(model: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    ptq.quantize(model, out=out, **OPTIONS)
    fill(tmp_path, "precious.txt")
    report = json.loads((out / "ptq_report.json").read_text())
    report["companions"] = ["../precious.txt", str(tmp_path / "precious.txt")]
    (out / "ptq_report.json").write_text(json.dumps(report))
    ptq.quantize(model, out=out, restart=True, **OPTIONS)
    assert (tmp_path / "precious.txt").exists()


def test_a_config_does_not_name_code_that_stayed_behind(model: Path, tmp_path: Path) -> None:
    config = json.loads((model / "config.json").read_text())
    config["auto_map"] = {"AutoModelForCausalLM": "modeling_own.OwnForCausalLM"}
    (model / "config.json").write_text(json.dumps(config))
    fill(model, "modeling_own.py")
    ptq.quantize(model, out=tmp_path / "out", **OPTIONS)
    assert "auto_map" not in json.loads((tmp_path / "out" / "config.json").read_text())
    assert not (tmp_path / "out" / "modeling_own.py").exists()
