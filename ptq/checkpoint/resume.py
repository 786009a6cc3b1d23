"""What the next run takes over from one that was cut off: `open_journal`, called once at the start of a writer."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from calib.checkpoint.atomic_files import file_sha256, os_errors, sync
from ptq.checkpoint.journal import JOURNAL_NAME, FinishedPart, Journal, changed_conditions
from ptq.checkpoint.workspace import WORK
from ptq.errors import OutputError
from ptq.report import STAGING

__all__ = ["open_journal", "shard_name"]


def shard_name(index: int) -> str:
    """The name of the shard of the part ``index`` until it is moved into place."""
    return f"shard-{index:05d}.safetensors"


def open_journal(out: Path, conditions: Mapping[str, Any] | None, restart: bool) -> tuple[Journal, list[str]]:
    """The journal of an interrupted run if this one continues it, else a new one in an empty staging folder.

    Args:
        out: the output folder, locked by the caller.
        conditions: everything that decides the bytes; ``None`` starts over and cannot be resumed.
        restart: start over whatever is there.

    Returns:
        The journal, all its shards whole in the staging folder and nothing else there; sentences for the user.

    Raises:
        OutputError: the interrupted run had other conditions; its journal is damaged or of a newer version; a file
            cannot be read, written or moved.
    """
    staging = out / STAGING
    with os_errors(staging):
        old = None if restart or conditions is None else Journal.read(staging)
        if old is None or old.conditions is None or conditions is None:
            _start_over(staging)
            return Journal.create(staging, conditions), []
        _refuse_changes(out, old.conditions, conditions)
        return old, _recover(out, old)


def _start_over(staging: Path) -> None:
    # The folder itself stays: it is what tells us that OUT is ours, whatever was moved there.
    staging.mkdir(parents=True, exist_ok=True)
    (staging / JOURNAL_NAME).unlink(missing_ok=True)  # first: shards without a journal are nothing to go on with
    sync(staging)
    _clean(staging, set())


def _refuse_changes(out: Path, old: Mapping[str, Any], new: Mapping[str, Any]) -> None:
    changed = changed_conditions(old, new)
    if changed:
        raise OutputError(
            f"{out} holds an unfinished run that this command does not continue: {'; '.join(changed)}. Repeat the old "
            f"command to go on with it, or start over with --restart."
        )


def _recover(out: Path, journal: Journal) -> list[str]:
    """Keep the finished parts whose shards are whole, put back what had been moved to OUT, remove the rest."""
    notes = ["the run was cut off while it noted a part: that part is done again"] if journal.torn else []
    good, reason = _whole_parts(out, journal)
    if reason:
        lost = [part.name for part in journal.parts[good:]]
        after = f" and the {len(lost) - 1} after it are" if lost[1:] else " is"
        notes.append(f"{reason}: the part {lost[0]}{after} done again")
    if reason or journal.names is not None:
        sync(journal.path.parent)  # what was moved back has to be there before the journal forgets that it had moved
        journal.keep_parts(good)
    _clean(journal.path.parent, {part.file for part in journal.parts} | {JOURNAL_NAME, WORK})
    return notes


def _whole_parts(out: Path, journal: Journal) -> tuple[int, str | None]:
    """How many parts from the first on are whole, and what is wrong with the next one."""
    for index, part in enumerate(journal.parts):
        final = journal.names[index] if journal.names and index < len(journal.names) else None
        reason = _missing(out, journal.path.parent / shard_name(index), part, final)
        if reason:
            return index, reason
    return len(journal.parts), None


def _missing(out: Path, path: Path, part: FinishedPart, final: str | None) -> str | None:
    """Why a finished part is not usable, ``None`` if it is; a shard that had been moved to OUT is moved back."""
    if part.file != path.name:
        return f"the journal names {part.file!r} in the place of {path.name}"
    if path.is_file():
        return _differs(path, part)
    moved = None if final is None or Path(final).name != final else out / final
    if moved is None or not moved.is_file() or _differs(moved, part):
        return f"{path} is missing"
    (out / "config.json").unlink(missing_ok=True)  # if there is one it is the new one: without shards it must not load
    os.replace(moved, path)
    return None


def _differs(path: Path, part: FinishedPart) -> str | None:
    """How a file differs from what the journal says of it; ``None`` if it does not."""
    size = path.stat().st_size
    if size != part.bytes:
        return f"{path} has {size} bytes, the journal says {part.bytes}"
    digest = file_sha256(path)
    return None if digest == part.sha256 else f"{path} has the SHA-256 {digest}, the journal says {part.sha256}"


def _clean(staging: Path, keep: set[str]) -> None:
    for path in staging.iterdir():
        if path.name in keep:
            continue
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()
