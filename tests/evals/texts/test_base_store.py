"""The folder of a base: windows as they were written, damaged files, space, names."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor

from calib.errors import OutputError
from evals.texts import base_cache
from evals.texts.base_cache import BaseStore, TextStore, default_cache
from evals.texts.kl import DRAWS, TopKLogprobs
from tests.evals.texts.damage import LOADED, damage, kept


def require_equal(first: TopKLogprobs, second: TopKLogprobs) -> None:
    for field in dataclasses.fields(TopKLogprobs):
        one, other = getattr(first, field.name), getattr(second, field.name)
        if isinstance(one, Tensor):
            assert torch.equal(one, other), field.name
            assert one.dtype == other.dtype
        else:
            assert one == other, field.name


@pytest.mark.parametrize("top_k", [4, None])
@pytest.mark.parametrize("vocab", [40, 1 << 16, (1 << 16) + 1])
def test_a_window_comes_back_as_it_was(store: TextStore, vocab: int, top_k: int | None) -> None:
    before = kept(vocab, top_k)
    store.write_window(1, before)
    require_equal(store.window(1), before)
    assert torch.equal(store.nll(1), before.nll.double())
    on_disk = load_file(store.folder / "00001.safetensors")
    small = torch.uint16 if vocab <= 1 << 16 else torch.int32
    assert {on_disk[name].dtype for name in ("ids", "drawn") if name in on_disk} == ({small} if top_k else set())


def test_parts_of_tensors_are_written_alone(store: TextStore) -> None:
    """A window is a slice of its batch: the file holds the slice."""
    whole = kept(50, 4, rows=20)
    part = whole.part(slice(5, 7), torch.device("cpu"))
    store.write_window(0, part)
    require_equal(store.window(0), part)
    assert (store.folder / "00000.safetensors").stat().st_size < 3000


def test_which_windows_are_missing(store: TextStore) -> None:
    assert store.missing() == [0, 1, 2]
    assert not store.complete()
    store.write_window(1, kept(9, 2))
    assert store.missing() == [0, 2]
    store.write_window(0, kept(9, 2))
    store.write_window(2, kept(9, 2))
    assert store.complete()
    assert not TextStore(store.folder.parent / "text-other").complete()  # nobody said how many there are
    (store.folder / "windows.json").write_text("{", encoding="utf-8")
    assert not store.complete()


def test_bases_texts_and_settings_have_folders_of_their_own(tmp_path: Path) -> None:
    def folder(source: str = "a/M", loaded: dict[str, Any] = LOADED, **question: Any) -> Path:
        return BaseStore(tmp_path, source, loaded, "print").text(question).folder

    found = [
        folder(text="x", top_k=1),
        folder(text="x", top_k=None),
        folder(text="y", top_k=1),
        folder(text="x"),
        folder("b/M", text="x", top_k=1),
        folder(loaded=LOADED | {"dtype": "bfloat16"}, text="x", top_k=1),
    ]
    assert len(set(found)) == len(found)
    assert folder(top_k=1, text="x") == found[0]  # the order of what is said does not matter
    tasks = [BaseStore(tmp_path, "a/M", LOADED, "print").task({"task": name}).path for name in ("arc", "piqa")]
    assert len({*tasks, *found}) == 8
    assert {path.parent for path in tasks} == {found[0].parent}


@given(st.text(max_size=60))
def test_any_source_is_a_folder_below_the_root(source: str) -> None:
    folder = BaseStore(Path("/nowhere"), source, LOADED, "print").folder
    assert folder.parent == Path("/nowhere")
    assert folder.name.replace("-", "").replace(".", "").isalnum()
    assert folder.name.isascii()
    assert not folder.name.startswith(".")
    assert len(folder.name) <= 60


def test_a_changed_base_is_forgotten_and_that_is_said(tmp_path: Path) -> None:
    def open_store(print_: str, source: str = "dir/MODEL") -> BaseStore:
        return BaseStore(tmp_path, source, LOADED, print_)

    other = open_store("old", "dir/OTHER")
    card = {"model": {"source": "x"}, "tokenizer_hash": "t", "environment": {}}
    other.describe(card)
    store = open_store("old")
    store.describe(card)
    store.task({"task": "arc"}).write({"value": 1})
    store.text({"text": "x"}).begin(4)
    again = open_store("old")
    assert again.notes == ()
    assert again.card == card | {"fingerprint": "old"}
    assert again.task({"task": "arc"}).read() == {"value": 1}
    changed = open_store("new")
    assert changed.notes == ("dir/MODEL is not what it was when its results were kept: they are computed again",)
    assert changed.card is None
    assert changed.task({"task": "arc"}).read() is None
    assert not changed.folder.exists()
    assert open_store("old", "dir/OTHER").card is not None


@pytest.mark.parametrize("card", [None, "{", "[]", "{}"])
def test_results_of_nobody_knows_what_are_forgotten(tmp_path: Path, card: str | None) -> None:
    """Without its card nothing says which weights the results in a folder are of."""
    store = BaseStore(tmp_path, "dir/MODEL", LOADED, "old")
    store.describe({})
    store.task({"task": "arc"}).write({"value": 1})
    path = store.folder / "base.json"
    if card is None:
        path.unlink()
    else:
        path.write_text(card, encoding="utf-8")
    again = BaseStore(tmp_path, "dir/MODEL", LOADED, "new")
    assert again.card is None
    assert again.notes != ()
    assert again.task({"task": "arc"}).read() is None


@pytest.mark.parametrize("content", ["", "{", "[1]", '{"a": 1', "\x00", '"text"'])
def test_a_damaged_result_counts_as_missing(store: TextStore, content: str) -> None:
    store.write({"nll": 1.5})
    assert store.read() == {"nll": 1.5}
    store.path.write_text(content, encoding="utf-8")
    assert store.read() is None


@pytest.mark.parametrize(
    "how",
    ["cut", "empty", "noise", "no vocabulary", "wrong vocabulary", "a tensor less", "a tensor more", "missing"],
)
def test_a_damaged_window_says_what_to_delete(store: TextStore, how: str) -> None:
    store.write_window(2, kept(40, 4))
    damage(store.folder / "00002.safetensors", how)
    with pytest.raises(OutputError) as error:
        store.window(2)
    assert str(store.folder / "00002.safetensors") in str(error.value)
    assert f"delete {store.folder} and run again" in str(error.value)


@pytest.mark.parametrize(("vocab", "top_k"), [(40, 4), (70_000, 300), (40, None), (40, 40)])
def test_space_is_reckoned_as_it_is_used(
    store: TextStore, monkeypatch: pytest.MonkeyPatch, vocab: int, top_k: int | None
) -> None:
    rows = 60
    store.write_window(0, kept(vocab, top_k, rows))
    used = (store.folder / "00000.safetensors").stat().st_size - 700  # the header
    free = 0
    monkeypatch.setattr(base_cache.shutil, "disk_usage", lambda _: SimpleNamespace(free=free))
    free = int(0.9 * used)
    with pytest.raises(OutputError, match=r"GB are free.*--cache.*--max-tokens.*--base-top-k") as error:
        store.require_space(rows, top_k, vocab)
    assert str(store.folder) in str(error.value)
    free = int(1.3 * used)
    store.require_space(rows, top_k, vocab)


def test_folders_that_cannot_be(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("", encoding="utf-8")
    with pytest.raises(OutputError, match=r"cannot create .*file.*"):
        BaseStore(tmp_path / "file", "M", LOADED, "print")
    store = BaseStore(tmp_path / "cache", "M", LOADED, "print")
    (tmp_path / "cache").rmdir()
    (tmp_path / "cache").write_text("", encoding="utf-8")
    with pytest.raises(OutputError, match=r"cannot create .*cache.*"):
        store.describe({})
    with pytest.raises(OutputError, match="cannot create"):
        store.task({}).write({})
    with pytest.raises(OutputError, match="cannot create"):
        store.text({}).begin(1)


def test_where_the_cache_is(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("PTQ_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert default_cache() == tmp_path / ".cache" / "ptq"
    monkeypatch.setenv("XDG_CACHE_HOME", "")
    assert default_cache() == tmp_path / ".cache" / "ptq"
    monkeypatch.setenv("XDG_CACHE_HOME", "/elsewhere")
    assert default_cache() == Path("/elsewhere/ptq")
    monkeypatch.setenv("PTQ_CACHE", "/mine")
    assert default_cache() == Path("/mine")


def test_sizes_that_are_documented() -> None:
    """About two kilobytes of a prediction (docs/evaluation.md)."""
    assert 1500 < base_cache._bytes_each(256, 49_152) < 2100
    assert base_cache._bytes_each(256, 49_152) == (256 + DRAWS) * 6 + 20
