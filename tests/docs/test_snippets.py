"""Every fenced ``python`` and ``console`` block of README and docs is run, in order, one test a page.

A page runs in an empty folder that holds ``MODEL`` (a tiny random model with its tokenizer), so its text works as it
is printed. Blocks of a page share the folder and, in Python, their names. ``console`` lines that begin with ``$ ptq``
go through the real command line in this process; other lines of the block are output and are not compared. A block
that cannot run here says why, in a comment on the line before it:  ``<!-- snippet: skip, needs a network -->``
"""

from __future__ import annotations

import dataclasses
import re
import shlex
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from cli.main import main

ROOT = Path(__file__).parents[2]
PAGES = sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", *ROOT.glob("docs/**/*.md")])
FENCE = re.compile(r"^(?P<indent> *)```(?P<language>\w*)\n(?P<body>.*?)^(?P=indent)```", re.MULTILINE | re.DOTALL)
SKIP = re.compile(r"<!-- snippet: skip(?P<reason>[^>]*)-->\s*\Z")
RUN = ("python", "console")
SHOW = ("", "text", "yaml", "json", "toml", "make")  # not programs
SHELL_SYNTAX = {"|", "||", "&", "&&", ";", ">", ">>", "<"}


@dataclasses.dataclass(frozen=True)
class Snippet:
    """One fenced block: where it begins, what it is, and why it is not run (empty if it is)."""

    where: str
    language: str
    body: str
    skip: str | None


def snippets(text: str, page: str) -> Iterator[Snippet]:
    """The fenced blocks of a page, in order."""
    for match in FENCE.finditer(text):
        skip = SKIP.search(text[: match.start()])
        line = text.count("\n", 0, match.start()) + 1
        indent = match["indent"]
        body = "".join(row.removeprefix(indent) for row in match["body"].splitlines(keepends=True))
        yield Snippet(f"{page}:{line}", match["language"], body, skip["reason"].strip(" ,") if skip else None)


def run_console(snippet: Snippet) -> None:
    """Run every ``$ ptq ...`` line of a block; a trailing backslash joins lines, ``#`` begins a comment."""
    for line in snippet.body.replace("\\\n", " ").splitlines():
        if not line.startswith("$ "):
            continue
        program, *arguments = shlex.split(line[2:], comments=True)
        plain = program == "ptq" and "$" not in line[2:] and not SHELL_SYNTAX.intersection(arguments)
        assert plain, f"{snippet.where}: only plain ptq commands run here, not {line!r}; mark the block as skipped"
        code = main(arguments)
        assert code == 0, f"{snippet.where}: {line} ended with {code}"


def run_page(path: Path, folder: Path) -> int:
    """Run the blocks of a page; the number that ran."""
    names: dict[str, Any] = {"__name__": "__main__"}
    ran = 0
    for snippet in snippets(path.read_text(encoding="utf-8"), path.name):
        if snippet.skip is not None or snippet.language in SHOW:
            continue
        if snippet.language == "python":
            exec(compile(snippet.body, snippet.where, "exec"), names)
        else:
            run_console(snippet)
        ran += 1
    return ran


@pytest.fixture
def folder(tmp_path: Path, tiny_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working folder with MODEL in it."""
    shutil.copytree(tiny_folder, tmp_path / "MODEL")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("page", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_page_runs(page: Path, folder: Path) -> None:
    run_page(page, folder)


@pytest.mark.parametrize("page", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_blocks_are_labelled_and_skips_have_reasons(page: Path) -> None:
    for snippet in snippets(page.read_text(encoding="utf-8"), page.name):
        assert snippet.language in RUN + SHOW, f"{snippet.where}: write ```console or ```python, not {snippet.language}"
        assert snippet.skip is None or len(snippet.skip) > 5, f"{snippet.where}: a skipped block says why"


def test_readme_is_really_run(folder: Path) -> None:
    languages = {s.language for s in snippets((ROOT / "README.md").read_text(encoding="utf-8"), "") if s.skip is None}
    assert set(RUN) <= languages


@pytest.mark.parametrize(
    "block",
    [
        "```python\nassert False\n```\n",
        "```console\n$ ptq quantize NOWHERE --method no_such\n```\n",
        "```console\n$ make demo\n```\n",
        "```console\n$ ptq methods | head\n```\n",
    ],
)
def test_a_wrong_snippet_fails(block: str, folder: Path) -> None:
    (folder / "page.md").write_text(f"# Page\n\n{block}")
    with pytest.raises(AssertionError):
        run_page(folder / "page.md", folder)


def test_a_skipped_snippet_does_not_run(folder: Path) -> None:
    (folder / "page.md").write_text("<!-- snippet: skip, takes hours -->\n```python\nassert False\n```\n")
    assert run_page(folder / "page.md", folder) == 0


def test_blocks_share_names_and_a_skip_covers_one_block(folder: Path) -> None:
    skipped = "<!-- snippet: skip, takes hours -->\n```python\n1 / 0\n```\n\n"
    text = skipped + "```python\nx = 1\n```\n- item\n  ```python\n  assert x == 1\n  ```\n"
    (folder / "page.md").write_text(text)
    assert run_page(folder / "page.md", folder) == 2
