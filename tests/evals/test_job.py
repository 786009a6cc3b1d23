"""Names on the command line -> texts and tasks: which is which, where files are looked for, what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from calib.data.chat import RowReader
from calib.data.sources import Text
from calib.errors import DataError, UsageError
from evals import job as workload
from evals.job import load_workload
from evals.texts.windows import CONVENTIONS

ROW = {"query": "Question: 1", "choices": ["a", "b"], "gold": 0}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Rows of three tasks, one of them of the user's own, and texts in and beside it."""
    data = tmp_path / "data" / "tasks"
    data.mkdir(parents=True)
    for name in ("arc_easy", "openbookqa", "quiz"):
        (data / f"{name}.jsonl").write_text((json.dumps(ROW) + "\n") * 3, encoding="utf-8")
    (data / "wikitext2.txt").write_text("a text", encoding="utf-8")
    (tmp_path / "data" / "text").mkdir()
    (tmp_path / "data" / "text" / "c4-part.txt").write_text("0123456789", encoding="utf-8")
    (tmp_path / "data" / "text" / "notes.md").write_text("some notes", encoding="utf-8")
    return data


def test_texts_and_tasks_are_told_apart(folder: Path) -> None:
    found = load_workload(["quiz", "wikitext2", "arc_easy", "c4", "notes"], data=folder)
    assert [task.task.name for task in found.tasks] == ["quiz", "arc_easy"]
    assert [(job.name, job.text.text) for job in found.texts] == [
        ("wikitext2", "a text"),
        ("c4", "0123456789"),
        ("notes", "some notes"),
    ]
    assert found.texts[1].text.source == str(folder.parent / "text" / "c4-part.txt")


def test_names_asked_for_twice_are_done_once(folder: Path) -> None:
    found = load_workload(["arc_easy", "wikitext2", "arc_easy", "wikitext2"], data=folder)
    assert (len(found.tasks), len(found.texts)) == (1, 1)
    found = load_workload(["openbookqa", "openbook_qa"], data=folder)
    assert [task.task.name for task in found.tasks] == ["openbookqa"]


def test_aliases(folder: Path) -> None:
    (task,) = load_workload(["openbook_qa"], data=folder).tasks
    assert task.task.name == "openbookqa"


def test_a_part_of_a_text(folder: Path) -> None:
    (job,) = load_workload(["c4@0.5:1"], data=folder).texts
    assert (job.name, job.text.text) == ("c4@0.5:1", "56789")
    assert job.text.notes == ()
    (job,) = load_workload(["c4"], data=folder).texts
    assert "c4@0.8:1" in job.text.notes[-1]  # its beginning may have been calibrated on


def test_texts_by_path_are_never_tasks(folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "quiz"
    path.write_text("a text that is called as a task is", encoding="utf-8")
    found = load_workload([], texts=[str(path), str(path)], data=folder)
    assert found.tasks == ()
    assert [job.text.text for job in found.texts] == ["a text that is called as a task is"]


def test_every_text_by_every_convention(folder: Path) -> None:
    found = load_workload(
        ["wikitext2", "notes"], data=folder, conventions=[*CONVENTIONS, "segments"], stride=4, seqlen=16, limit=3
    )
    asked = [(job.name, job.convention) for job in found.texts]
    assert asked == [(name, convention) for name in ("wikitext2", "notes") for convention in CONVENTIONS]
    common = {"seqlen": 16, "max_tokens": None, "limit": 3}
    extra = {"sliding": {"bos": "auto", "stride": 4}, "documents": {"documents": "auto"}}
    assert all(job.options == common | extra.get(job.convention, {"bos": "auto"}) for job in found.texts)


def test_limit_and_examples_go_to_tasks(folder: Path) -> None:
    (task,) = load_workload(["quiz"], data=folder, limit=2, fewshot=1, seed=3).tasks
    assert len(task.questions) == 2
    assert task.settings["fewshot"] == 1
    assert "seed 3" in task.settings["examples"]


def test_a_hub_text_is_read_as_far_as_is_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, int | None]] = []

    def load(source: str, *, limit: int | None = None, rows: RowReader | None = None) -> Text:
        asked.append((source, limit))
        return Text("x", source)

    monkeypatch.setattr(workload, "load_text", load)
    load_workload(["c4", "wikitext2"], texts=["a:b:c"], max_tokens=100)
    load_workload(["c4"])
    assert asked == [("c4", 1600), ("wikitext2", 1600), ("a:b:c", 1600), ("c4", None)]


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["arc_esy"], r"unknown task or text 'arc_esy'\. Did you mean 'arc_easy'"),
        (["wikitext"], "Did you mean 'wikitext2'"),
        (["quizz"], "Did you mean 'quiz'"),
        (["openbook_q"], "Did you mean 'openbook_qa'"),
        (["arc_easy", "nothing-like-it"], "unknown task or text 'nothing-like-it'"),
    ],
)
def test_unknown_names(names: list[str], message: str, folder: Path) -> None:
    with pytest.raises(UsageError, match=message):
        load_workload(names, data=folder)


def test_files_that_are_missing(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"has no rows for 'piqa': looked for piqa\.jsonl.*There is: arc_easy\.jsonl"):
        load_workload(["piqa"], data=folder)
    with pytest.raises(DataError, match=f"there is no folder {tmp_path / 'nowhere'}"):
        load_workload(["piqa"], data=tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"has no wikitext2\.txt, .*there are: no text files"):
        load_workload(["wikitext2"], data=tmp_path / "empty")
    (folder / "c4-two.txt").write_text("x", encoding="utf-8")
    with pytest.raises(DataError, match="has several files for 'c4'"):
        load_workload(["c4"], data=folder)
    with pytest.raises(DataError, match=r"there is no file 'nowhere\.txt'"):
        load_workload([], texts=["nowhere.txt"], data=folder)


def test_a_field_that_is_missing_is_named_with_file_and_line(folder: Path) -> None:
    path = folder / "arc_easy.jsonl"
    path.write_text(json.dumps(ROW) + "\n" + json.dumps({"query": "q", "choices": ["a", "b"]}) + "\n")
    with pytest.raises(DataError, match=rf"{path}, line 2 has no field 'gold'"):
        load_workload(["arc_easy"], data=folder)
    path.write_text(json.dumps(ROW | {"gold": 2}))
    with pytest.raises(DataError, match=rf"{path}, line 1: the field 'gold' is '?2'?, .*from 0 to 1"):
        load_workload(["arc_easy"], data=folder)
    path.write_text(json.dumps(ROW | {"choices": []}))
    with pytest.raises(DataError, match=rf"{path}, line 1: the field 'choices' is .*two or more"):
        load_workload(["arc_easy"], data=folder)


def test_combinations_that_cannot_be(folder: Path) -> None:
    with pytest.raises(UsageError, match="limit must be at least 1, got 0"):
        load_workload(["arc_easy"], data=folder, limit=0)
    with pytest.raises(UsageError, match=r"unknown perplexity convention 'segment'\. Did you mean 'segments'"):
        load_workload(["wikitext2"], data=folder, conventions=["segment"])
    with pytest.raises(UsageError, match="--stride belongs to --convention sliding"):
        load_workload(["wikitext2"], data=folder, stride=3)
    with pytest.raises(UsageError, match="convention"):
        load_workload(["wikitext2"], data=folder, conventions=[])
