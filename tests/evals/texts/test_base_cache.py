"""What is kept of a base on disk: the same numbers back, nothing twice, nothing stale, nothing elsewhere."""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from calib.errors import OutputError
from evals import evaluate
from evals.texts import base_cache
from evals.texts.base_cache import BaseStore, TextStore
from evals.texts.kl import TopKLogprobs
from tests.evals.texts.damage import LOADED, damage, kept

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
