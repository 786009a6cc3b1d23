"""A finished result in the output folder: the same run finds it done, another run does not replace it unasked.

What was made is read from the report: recipe, fingerprints of model and calibration. Device, versions and threads may
differ: the result is finished, and what another machine would have made is no reason to lose it or to make it twice.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from calib.data.tokens import Calibration
from ptq.checkpoint.journal import JOURNAL_NAME, Journal, changed_conditions, flatten
from ptq.errors import OutputError, UsageError
from ptq.pipeline.events import Event, Listener
from ptq.recipe import AUTO_ROTATION, Recipe
from ptq.report import REPORT_NAME, STAGING, Report

__all__ = ["Finished", "find_finished", "output_obstacles"]

_SHOWN = 3  # differences in a message


class Finished:
    """A finished result.

    Args:
        out: its folder.
        report: its report.
    """

    def __init__(self, out: Path, report: Report) -> None:
        self.out, self.report = out, report

    def describe(self) -> str:
        """What it is and when it was written, for a message."""
        recipe, scheme = self.report.recipe, self.report.recipe.get("scheme", {})
        written = time.strftime("%Y-%m-%d %H:%M", time.localtime((self.out / REPORT_NAME).stat().st_mtime))
        return f"{recipe.get('method')}, {scheme.get('bits')} bits of {self.report.model.get('source')}, {written}"

    def refuse_other_recipe(self, recipe: Recipe) -> None:
        """Refuse to replace the result of another recipe. Needs no model: call it before one is opened.

        A length of sequences or rotations that are not settled yet are none that differ: call it again with the settled
        ones.

        Raises:
            UsageError: the recipes differ.
        """
        old, new = _as_today(self.report.recipe), recipe.to_dict()
        if recipe.calibration.seqlen is None:
            new["calibration"]["seqlen"] = (old.get("calibration") or {}).get("seqlen")
        if recipe.rotate == AUTO_ROTATION:
            new["rotate"] = old.get("rotate")
        if self.report.calibration is None and old.get("method") == new["method"] and not recipe.rotate:
            old, new = (
                {**one, "calibration": None} for one in (old, new)
            )  # made without data: nothing follows from it
        self._refuse(flatten({"recipe": old}), flatten({"recipe": new}))

    def refuse_other_data(self, fingerprint: str, calibration: Calibration | None) -> None:
        """Refuse to replace the result of another model or of other calibration tokens.

        Args:
            fingerprint: of the model.
            calibration: the tokens; ``None`` where they were not read or none are needed.

        Raises:
            UsageError: they differ from those of the result.
        """
        old, new = {"model.fingerprint": self.report.model.get("fingerprint")}, {"model.fingerprint": fingerprint}
        made = (self.report.calibration or {}).get("fingerprint")
        if calibration is not None and made is not None:
            old["calibration"], new["calibration"] = made, calibration.fingerprint
        self._refuse(old, new)

    def damage(self) -> str | None:
        """What is missing of its files; ``None`` if they are there with the sizes that the report states."""
        for name, row in self.report.files.items():
            path = self.out / name
            if not path.is_file() or path.stat().st_size != row["bytes"]:
                return f"{path} is missing or has not its {row['bytes']} bytes"
        return None if (self.out / "config.json").is_file() else f"{self.out / 'config.json'} is missing"

    def is_whole(self, listener: Listener) -> bool:
        """Whether all its files are there; a result that is damaged is made again, and the listener gets the reason."""
        damage = self.damage()
        if damage is not None:
            listener(Event("message", f"the result in {self.out} is not whole ({damage}): it is made again"))
        return damage is None

    def kept(self, fingerprint: str, calibration: Calibration | None, listener: Listener) -> Report:
        """The report of a result that stays, after a look at what it was made of (`refuse_other_data`)."""
        self.refuse_other_data(fingerprint, calibration)
        listener(Event("finished", self.sentence()))
        return self.report

    def needs_tokens(self, recipe: Recipe) -> bool:
        """Whether the calibration text has to be read to see that it is the same.

        A file may have changed. What comes from the hub, from Python's manual or from the model itself follows from the
        recipe, and reading it again may cost a download, or hours.
        """
        source = recipe.calibration.source
        return self.report.calibration is not None and any(
            Path(name).exists() for name in (source, _without_part(source))
        )

    def sentence(self) -> str:
        """What a user is told who asks for it again."""
        return (
            f"{self.out} holds the finished result of this recipe and model ({self.describe()}): nothing is left to "
            f"do. --restart makes it again."
        )

    def _refuse(self, old: dict[str, Any], new: dict[str, Any]) -> None:
        changed = changed_conditions(old, new)
        if changed:
            more = f"; and {len(changed) - _SHOWN} more" if len(changed) > _SHOWN else ""
            raise UsageError(
                f"{self.out} holds a finished result ({self.describe()}) of another run: "
                f"{'; '.join(changed[:_SHOWN])}{more}. Name another folder with -o, or replace it with --restart "
                f"(restart=True)."
            )


def find_finished(out: Path) -> Finished | None:
    """The finished result in a folder; ``None`` if there is none, or a run over it is under way
    (`ptq.checkpoint.resume`).

    Raises:
        UsageError: there is a report that cannot be read, so that nobody knows what would be replaced.
    """
    if not (out / REPORT_NAME).is_file() or (out / STAGING / JOURNAL_NAME).exists():
        return None
    try:
        return Finished(out, Report.load(out))
    except OutputError as error:
        raise UsageError(
            f"{out} holds a result whose report cannot be read ({error}). Name another folder with -o, or replace it "
            f"with --restart (restart=True)."
        ) from error


def output_obstacles(
    out: Path, recipe: Recipe, conditions: dict[str, Any], fingerprint: str, calibration: Calibration | None
) -> list[str]:
    """Why a run would refuse its output folder, or has nothing to do, as far as it can be seen without a lock.

    Args:
        out: The folder.
        recipe: Of the run.
        conditions: Everything that decides its bytes.
        fingerprint: Of its model.
        calibration: Its tokens.
    """
    journal = Journal.read_only(out / STAGING)
    if journal is None:
        return _finished_obstacles(out, recipe, fingerprint, calibration)
    changed = [] if journal.conditions is None else changed_conditions(journal.conditions, conditions)
    return [f"{out} holds an unfinished run of other settings ({'; '.join(changed)}): --restart"] if changed else []


def _finished_obstacles(out: Path, recipe: Recipe, fingerprint: str, calibration: Calibration | None) -> list[str]:
    try:
        found = find_finished(out)
        if found is None:
            return []
        found.refuse_other_recipe(recipe)
        found.refuse_other_data(fingerprint, calibration)
    except UsageError as error:
        return [str(error)]
    return [found.sentence()]


def _without_part(source: str) -> str:
    """``FILE`` of ``FILE@0:0.8``."""
    return source.rpartition("@")[0] or source


def _as_today(recipe: dict[str, Any]) -> dict[str, Any]:
    """A report's recipe as plain data to compare with."""
    try:
        return Recipe.from_dict(recipe).to_dict()
    except UsageError:
        return recipe
