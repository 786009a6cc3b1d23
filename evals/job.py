"""Names -> what will be asked of a model: texts and tasks, read and checked before any model is loaded."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypedDict, Unpack

from calib.data.bos import check_bos_choice
from calib.data.chat import RowReader
from calib.data.rows import ROW_SUFFIXES
from calib.data.sources import SOURCE_NAMES, Text
from calib.errors import DataError, UsageError, unknown_name
from evals.tasks.registry import TASKS, known_tasks, load_task
from evals.tasks.types import LoadedTask
from evals.texts.sources import EVALUATION_PARTS, load_text
from evals.texts.windows import CONVENTIONS

__all__ = ["DEFAULT_TASKS", "TextJob", "WindowOptions", "Workload", "load_workload"]

DEFAULT_TASKS = ("wikitext2",)
_JSONL_TEXTS = tuple(f"{name}.jsonl" for name in EVALUATION_PARTS)
_SUFFIXES = (".txt", ".md", *ROW_SUFFIXES)


@dataclasses.dataclass(frozen=True)
class TextJob:
    """One text, and how it will be cut.

    Args:
        name: as asked for.
        text: the characters.
        convention: argument of `evals.texts.windows.make_plan`.
        options: further arguments of it; ``bos`` is resolved by `evals.bos_choice`.
    """

    name: str
    text: Text
    convention: str
    options: dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Workload:
    """Texts and tasks in the order asked for."""

    texts: tuple[TextJob, ...]
    tasks: tuple[LoadedTask, ...]


class WindowOptions(TypedDict, total=False):
    """How texts are cut into windows, by the names and with the defaults of `evals.texts.windows.make_plan`."""

    seqlen: int | None
    """Tokens of a window."""
    stride: int | None
    """Tokens scored per window of ``sliding``."""
    max_tokens: int | None
    """Tokens of each text that are used, from its beginning."""
    documents: str
    """How the convention ``documents`` separates them."""
    bos: str
    """Whether windows begin with BOS, in every convention but ``documents``: ``auto`` where the model is made for it
    (`evals.bos_choice`), ``always``, or ``never`` as in the literature."""


def load_workload(
    names: Sequence[str],
    *,
    texts: Sequence[str] = (),
    data: Path | None = None,
    conventions: Sequence[str] = ("segments",),
    rows: RowReader | None = None,
    limit: int | None = None,
    fewshot: int = 0,
    seed: int = 0,
    **windows: Unpack[WindowOptions],
) -> Workload:
    """Read everything that the names stand for.

    Args:
        names: of tasks and texts, mixed. A name is a task if the table or the data folder has it, else a text.
        texts: sources of more texts, which are never taken for tasks.
        data: folder of task and text files; without it they come from the hub.
        conventions: how texts are cut; each text is scored by each of them.
        rows: how rows of messages become text.
        limit: first rows of every task, first items of every text.
        fewshot: examples in front of every question of a task.
        seed: of the choice of these examples.
        windows: see `WindowOptions`.

    Raises:
        UsageError: an unknown name or convention, a limit below 1.
        DataError: data that is missing or not as it should be.
    """
    if limit is not None and limit < 1:
        raise UsageError(f"--limit must be at least 1, got {limit}.")
    options = _window_options(conventions, **windows)
    if data is not None and not data.is_dir():
        raise DataError(f"there is no folder {data} (looked in {Path.cwd()}); give the folder of the data files.")
    known = tuple(name for name in known_tasks(data) if name not in EVALUATION_PARTS)
    aliases = {alias: task.name for task in TASKS for alias in task.aliases}
    known += tuple(aliases)
    wanted = list(dict.fromkeys(aliases.get(name, name) for name in names))
    tasks = [load_task(n, data=data, limit=limit, fewshot=fewshot, seed=seed) for n in wanted if n in known]
    max_tokens = windows.get("max_tokens")
    read = [(n, _text(n, data, known, max_tokens, rows)) for n in wanted if n not in known]
    read += [(n, load_text(n, limit=_characters(max_tokens), rows=rows)) for n in dict.fromkeys(texts)]
    jobs = [
        TextJob(name, text, convention, {"limit": limit} | options[convention])
        for name, text in read
        for convention in options
    ]
    return Workload(tuple(jobs), tuple(tasks))


def _window_options(
    conventions: Sequence[str],
    *,
    seqlen: int | None = None,
    stride: int | None = None,
    max_tokens: int | None = None,
    documents: str = "auto",
    bos: str = "auto",
) -> dict[str, dict[str, Any]]:
    """The arguments of `make_plan` by convention, refused where a convention has no use for one that was given."""
    if max_tokens is not None and max_tokens < 1:
        raise UsageError(f"--max-tokens must be at least 1, got {max_tokens}.")
    if not conventions:
        raise UsageError(f"no perplexity convention is named; known: {', '.join(CONVENTIONS)}.")
    for convention in conventions:
        if convention not in CONVENTIONS:
            raise unknown_name("perplexity convention", convention, CONVENTIONS)
    if stride is not None and "sliding" not in conventions:
        raise UsageError("--stride belongs to --convention sliding; the others have none.")
    check_bos_choice(bos, "--bos")
    if bos != "auto" and set(conventions) == {"documents"}:
        raise UsageError("--bos has no effect on --convention documents, which always has BOS or EOS in front.")
    common = {"seqlen": seqlen, "max_tokens": max_tokens}
    special: dict[str, dict[str, Any]] = {
        "documents": {"documents": documents},
        "sliding": {"bos": bos, "stride": stride},
    }
    return {convention: common | special.get(convention, {"bos": bos}) for convention in conventions}


def _text(name: str, data: Path | None, known: Sequence[str], max_tokens: int | None, rows: RowReader | None) -> Text:
    """A text by a name that may also have been meant as a task's."""
    plain, at, part = name.partition("@")
    local = None if data is None else _local_text(plain, data)
    if local is not None:
        text = load_text(str(local) + at + part, rows=rows)
        whole = not at and plain == "c4"
        note = ("all of the file: where its beginning was calibrated on, say c4@0.8:1",) if whole else ()
        return dataclasses.replace(text, notes=(*text.notes, *note))
    if data is not None and plain in EVALUATION_PARTS:
        found = ", ".join(sorted(path.name for path in _text_files(data))) or "no text files"
        raise DataError(
            f"{data} has no {plain}.txt, {plain}.jsonl or {plain}-*.txt (nor {data / 'text'}); there are: {found}. "
            "Add the file, give its path, or leave out --data to read it from the hub."
        )
    if _looks_like_text(plain):
        return load_text(name, limit=_characters(max_tokens), rows=rows)
    raise unknown_name("task or text", name, (*known, *SOURCE_NAMES, "FILE.txt"))


def _looks_like_text(name: str) -> bool:
    return name in SOURCE_NAMES or ":" in name or Path(name).exists() or Path(name).suffix in _SUFFIXES


def _local_text(name: str, data: Path) -> Path | None:
    """``NAME.txt`` or ``NAME.jsonl``, else the only ``NAME-*.txt`` or ``NAME.*.txt``, in the folder or its ``text``."""
    if name not in EVALUATION_PARTS and "/" in name:
        return None
    files = _text_files(data)
    for stem in (f"{name}.txt", f"{name}.jsonl", f"{name}.md"):
        exact = [path for path in files if path.name == stem]
        if exact:
            return exact[0]
    near = [path for path in files if path.name.startswith((f"{name}-", f"{name}.", f"{name}_"))]
    if len(near) > 1:
        names = ", ".join(str(path) for path in near)
        raise DataError(f"{data} has several files for {name!r}: {names}. Give the path of the one that is meant.")
    return near[0] if near else None


def _text_files(data: Path) -> list[Path]:
    """In the folder, in ``text`` inside it, and in ``text`` beside it (where ``data`` is the folder of the tasks)."""
    folders = [folder for folder in (data, data / "text", data.parent / "text") if folder.is_dir()]
    files = [path for folder in folders for path in sorted(folder.iterdir())]
    return [path for path in files if path.suffix in (".txt", ".md") or path.name in _JSONL_TEXTS]


def _characters(max_tokens: int | None) -> int | None:
    return None if max_tokens is None else 16 * max_tokens  # four times what English needs
