"""What is kept of a base on disk: the same numbers back, nothing twice, nothing stale, nothing elsewhere."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

from calib.errors import OutputError
from evals import evaluate
from evals.texts import base_cache
from evals.texts.base_cache import BaseStore, TextStore, default_cache
from evals.texts.kl import DRAWS, TopKLogprobs, keep_top_k

LOADED = {"dtype": "float32", "device": "cpu"}


def kept(vocab: int, top_k: int | None, rows: int = 3, seed: int = 0) -> TopKLogprobs:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(rows, vocab, generator=generator)
    logits[0, -1] += 20  # the last id there is, as the likeliest
    return keep_top_k(logits, torch.arange(rows) % vocab, top_k, generator)


def require_equal(first: TopKLogprobs, second: TopKLogprobs) -> None:
    for field in dataclasses.fields(TopKLogprobs):
        one, other = getattr(first, field.name), getattr(second, field.name)
        if isinstance(one, Tensor):
            assert torch.equal(one, other), field.name
            assert one.dtype == other.dtype
        else:
            assert one == other, field.name


@pytest.fixture
def store(tmp_path: Path) -> TextStore:
    found = BaseStore(tmp_path / "cache", "some/MODEL", LOADED, "print").text({"text": "x"})
    found.begin(3)
    return found


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


def damage(path: Path, how: str) -> None:
    content = path.read_bytes()
    tensors = load_file(path)
    if how == "cut":
        path.write_bytes(content[: len(content) // 2])
    elif how == "empty":
        path.write_bytes(b"")
    elif how == "noise":
        path.write_bytes(bytes(255 - byte for byte in content))
    elif how == "no vocabulary":
        save_file(tensors, path)
    elif how == "wrong vocabulary":
        save_file(tensors, path, {"vocab": "many"})
    elif how == "a tensor less":
        del tensors["tail_mass"]
        save_file(tensors, path, {"vocab": "40"})
    elif how == "a tensor more":
        save_file(tensors | {"more": torch.zeros(1)}, path, {"vocab": "40"})
    else:
        path.unlink()


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


# What follows runs a tiny model as a base. Its passes over windows are told apart from the probe by their length.
SEQLEN = 20


@contextlib.contextmanager
def counted(model: Any) -> Iterator[list[int]]:
    """Windows of every pass of the decoder."""
    passes: list[int] = []

    def note(_: Any, __: Any, inputs: dict[str, Any]) -> None:
        ids = inputs["input_ids"]
        if ids.shape[1] > 8:
            passes.append(len(ids))

    handle = model.base_model.register_forward_pre_hook(note, with_kwargs=True)
    yield passes
    handle.remove()


@pytest.fixture
def against(
    make_model: Callable[..., Any], tiny_tokenizer: Any, tmp_path: Path, text: str
) -> Callable[..., tuple[Any, int]]:
    """Evaluates a model against a base; gives the record, and how many windows the base was run on."""
    path = tmp_path / "fox.txt"
    path.write_text(text * 2, encoding="utf-8")
    model = make_model("llama", 1)

    def run(base: Any, **options: Any) -> tuple[Any, int]:
        options = {"cache": tmp_path / "cache", "seqlen": SEQLEN, "batch_size": 1, "base_top_k": None} | options
        with counted(base) as passes:
            record = evaluate(model, tiny_tokenizer, [str(path)], against=base, **options)
        return record, sum(passes)

    return run


def kl(record: Any) -> list[float]:
    values: list[float] = record.texts[0].items["kl"].tolist()
    return values


def files(folder: Path, pattern: str) -> list[Path]:
    return sorted(folder.rglob(pattern))


def test_the_base_is_run_once(against: Callable[..., Any], make_model: Callable[..., Any]) -> None:
    first, windows = against(make_model("llama"))
    assert windows == len(first.texts[0].items) > 6
    again, none = against(make_model("llama"))  # another object with the same weights
    assert none == 0
    assert kl(again) == kl(first)
    assert again.base.texts[0].to_dict() == first.base.texts[0].to_dict()
    assert again.notes == ()
    assert against(make_model("llama"), max_tokens=100)[1] == 5  # another question
    assert against(make_model("llama"), base_top_k=3)[1] == windows
    assert against(make_model("llama", 2))[1] == windows  # another base
    assert against(make_model("llama"))[1] == 0


def test_killed_in_the_middle_it_goes_on(
    against: Callable[..., Any], make_model: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    base = make_model("llama")
    expected, windows = against(base, cache=tmp_path / "other")
    original = TextStore.write_window
    left = 3

    def write(self: TextStore, index: int, kept: TopKLogprobs) -> None:
        nonlocal left
        if left == 0:
            raise KeyboardInterrupt
        left -= 1
        original(self, index, kept)

    with monkeypatch.context() as patch:
        patch.setattr(TextStore, "write_window", write)
        with pytest.raises(KeyboardInterrupt):
            against(base)
    assert len(files(tmp_path / "cache", "*.safetensors")) == 3
    assert files(tmp_path / "cache", "*.tmp") == []
    assert files(tmp_path / "cache", "result.json") == []
    found, run = against(base)
    assert run == windows - 3
    assert kl(found) == kl(expected)
    assert found.base.texts[0].nll == expected.base.texts[0].nll


def test_a_lost_window_is_run_again(
    against: Callable[..., Any], make_model: Callable[..., Any], tmp_path: Path
) -> None:
    base = make_model("llama")
    expected, _ = against(base)
    files(tmp_path / "cache", "00004.safetensors")[0].unlink()
    found, run = against(base)
    assert run == 1
    assert kl(found) == kl(expected)


def test_a_damaged_result_is_made_again_from_what_is_kept(
    against: Callable[..., Any], make_model: Callable[..., Any], tmp_path: Path
) -> None:
    base = make_model("llama")
    expected, _ = against(base)
    (path,) = files(tmp_path / "cache", "result.json")
    whole = json.loads(path.read_text(encoding="utf-8"))
    for damaged in ("{", "{}", json.dumps(whole | {"items": {}})):
        path.write_text(damaged, encoding="utf-8")
        found, run = against(base)
        assert run == 0
        assert kl(found) == kl(expected)
        assert json.loads(path.read_text(encoding="utf-8")) | {"seconds": 0} == whole | {"seconds": 0}


def test_a_damaged_window_ends_the_run(
    against: Callable[..., Any], make_model: Callable[..., Any], tmp_path: Path
) -> None:
    base = make_model("llama")
    expected, windows = against(base)
    path = files(tmp_path / "cache", "00002.safetensors")[0]
    damage(path, "cut")
    with pytest.raises(OutputError, match=f"delete {path.parent} and run again"):
        against(base)
    shutil.rmtree(path.parent)
    found, run = against(base)
    assert run == windows
    assert kl(found) == kl(expected)


def test_no_space_is_said_before_the_work(
    against: Callable[..., Any], make_model: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    base = make_model("llama")
    monkeypatch.setattr(base_cache.shutil, "disk_usage", lambda _: SimpleNamespace(free=5000))
    with counted(base) as passes, pytest.raises(OutputError, match="GB are free"):
        against(base)
    assert passes == []
    assert files(tmp_path / "cache", "*.safetensors") == []


def test_a_base_that_changes_in_its_place(tmp_path: Path) -> None:
    """As `cli` opens it: by a path, which stays, and a fingerprint, which does not."""
    first = BaseStore(tmp_path, "dir/MODEL", LOADED, "1")
    first.describe({})
    window = first.text({"text": "x"})
    window.begin(1)
    window.write_window(0, kept(40, 4))
    assert window.complete()
    second = BaseStore(tmp_path, "dir/MODEL", LOADED, "2")
    assert second.notes != ()
    assert not second.text({"text": "x"}).complete()


def test_nothing_is_written_elsewhere(
    against: Callable[..., Any], make_model: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    home = tmp_path / "home"
    home.mkdir()
    for name in ("HOME", "PTQ_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.setenv(name, str(home))
    (tmp_path / "cache").mkdir()
    stranger = tmp_path / "cache" / "stranger.txt"
    stranger.write_text("mine", encoding="utf-8")
    before = set(tmp_path.iterdir())
    against(make_model("llama"), base_top_k=4)
    assert set(tmp_path.iterdir()) == before
    assert list(home.iterdir()) == []
    assert stranger.read_text(encoding="utf-8") == "mine"
    found = [path for path in (tmp_path / "cache").iterdir() if path != stranger]
    assert len(found) == 1
    assert found[0].name.startswith("LlamaForCausalLM-")
    against(make_model("llama"), cache=None, base_top_k=4)
    assert [path.name for path in home.iterdir()] == [found[0].name]  # $PTQ_CACHE


def test_sizes_that_are_documented() -> None:
    """About two kilobytes of a prediction (docs/evaluation.md)."""
    assert 1500 < base_cache._bytes_each(256, 49_152) < 2100
    assert base_cache._bytes_each(256, 49_152) == (256 + DRAWS) * 6 + 20


def test_a_cache_that_cannot_be_written_names_the_way_out_before_anything_is_run(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(
        OutputError, match=r"cannot create .*file/cache.*--cache DIR or \$PTQ_CACHE names another place"
    ):
        BaseStore(tmp_path / "file" / "cache", "base", {}, "fingerprint")
    store = BaseStore(tmp_path / "cache", "base", {}, "fingerprint")
    (tmp_path / "cache").rmdir()
    (tmp_path / "cache").write_text("in the way")
    with pytest.raises(OutputError, match=r"--cache DIR or \$PTQ_CACHE"):
        store.task({}).write({})
