"""`Plan`: a format for every linear, as a YAML file that a person can read and edit, and as a recipe.

about: {...}                                    # what made it; free text to the reader of the file
formats:
  '3': {bits: 3, symmetric: true, group_size: 64, scale_dtype: bfloat16}
  full: null                                    # full precision
linears:
  model.layers.0.self_attn.q_proj: '3'          # names of linears
  '*.down_proj': full                           # or patterns; a name wins over a pattern
"""

from __future__ import annotations

import dataclasses
import difflib
import fnmatch
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml
from torch import nn

from calib.checkpoint.atomic_files import write_file
from calib.model.structure import find_blocks, find_linears, linear_weight, tied_head
from ptq.errors import UsageError, unknown_name
from ptq.pipeline.preparation.schemes.outside import outside_modules
from ptq.pipeline.preparation.schemes.scheme_assignment import is_router
from ptq.recipe import Recipe
from ptq.recipe_files.safe_yaml import YamlFile, read_yaml
from ptq.scheme import Scheme

__all__ = ["Plan", "linear_weights", "read_plan"]

_KEYS = ("about", "formats", "linears")
_ALWAYS_SHOWN = ("bits", "group_size", "format", "name")


@dataclasses.dataclass(frozen=True)
class Plan:
    """Which linear is stored how.

    Args:
        formats: by label, how a weight is stored; ``None`` is full precision.
        linears: by full name of a linear, or by pattern, the label of its format.
        about: what made the plan, as plain data.
        file: where it was read, for messages.
        lines: by key of ``linears``, its line in the file.
    """

    formats: Mapping[str, Scheme | None]
    linears: Mapping[str, str]
    about: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    file: str = dataclasses.field(default="", compare=False)
    lines: Mapping[str, int] = dataclasses.field(default_factory=dict, compare=False)

    def recipe(self, base: Recipe | None = None) -> Recipe:
        """A recipe that stores every linear as the plan says.

        Args:
            base: everything else: the method, its options, the data. Its own overrides and ignored linears win over
                the plan, and what it does to the inputs of linears holds for all of them.
        """
        base = Recipe() if base is None else base
        overrides, ignored = [], []
        for key in sorted(self.linears, key=_is_pattern):  # names first: they win over patterns
            scheme = self.formats[self.linears[key]]
            if scheme is None:
                ignored.append(key)
            else:
                overrides.append((key, _with_inputs_of(scheme, base.scheme)))
        return dataclasses.replace(
            base, overrides=base.overrides + tuple(overrides), ignore=base.ignore + tuple(ignored)
        )

    def check(self, model: nn.Module) -> None:
        """Check that the plan is for a model of this structure.

        Args:
            model: the skeleton.

        Raises:
            UsageError: a name or pattern matches no linear, or two patterns give one linear different formats.
        """
        linears = _linears(model)
        known = frozenset(linears) | outside_modules(model).keys()
        names = [key for key in self.linears if not _is_pattern(key)]
        missing = [name for name in names if name not in known]
        if missing and 2 * len(missing) > len(names):
            raise UsageError(
                f"{self._at(missing[0])}: this plan is for another model"
                f"{self._made_for()}: {len(missing)} of its {len(names)} linears are not in "
                f"{type(model).__name__}, for example {missing[0]}."
            )
        if missing and missing[0] == tied_head(model):
            raise UsageError(
                f"{self._at(missing[0])}: {missing[0]} has no weight of its own in this model, it multiplies by the "
                f"embedding's: name {next(iter(outside_modules(model)))} instead."
            )
        if missing:
            raise UsageError(f"{self._at(missing[0])}: {unknown_name('linear', missing[0], linears)}")
        self._check_patterns([key for key in self.linears if _is_pattern(key)], linears)

    def check_weights(self, model: nn.Module) -> None:
        """Check that the linears of the model have the number of weights that the plan was made for.

        Args:
            model: the skeleton.

        Raises:
            UsageError: they have not; models of one family share names, but not their sizes or number of blocks.
        """
        made, found = self.about.get("weights"), linear_weights(model)
        if isinstance(made, int) and made != found:
            raise UsageError(
                f"{self.file or 'the plan'}: this plan is for another model{self._made_for()}: the linears of its "
                f"blocks have {made:,} weights, those of this {type(model).__name__} {found:,}. Make a plan for it "
                f"(ptq plan), or take the section 'about' out of the file to use its names and patterns all the same."
            )

    def uncovered(self, model: nn.Module) -> list[str]:
        """Linears that no name or pattern of the plan matches, routers aside."""
        patterns = [key for key in self.linears if _is_pattern(key)]
        return [
            name
            for name in _linears(model)
            if name not in self.linears
            and not is_router(name)
            and not any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)
        ]

    def _check_patterns(self, patterns: list[str], linears: Iterable[str]) -> None:
        owner: dict[str, str] = {}
        unused = set(patterns)
        for name in linears:
            for pattern in patterns:
                if not fnmatch.fnmatchcase(name, pattern):
                    continue
                unused.discard(pattern)
                other = owner.setdefault(name, pattern)
                if name not in self.linears and self.linears[other] != self.linears[pattern]:
                    raise UsageError(
                        f"{self._at(pattern)}: the patterns {other!r} ({self._at(other)}) and {pattern!r} both match "
                        f"{name} and say {self.linears[other]!r} and {self.linears[pattern]!r}: write {name} out, or "
                        f"make one of them narrower."
                    )
        for pattern in patterns:
            if pattern in unused:
                near = difflib.get_close_matches(pattern, list(linears), n=2, cutoff=0.3)
                shown = f" Names look like {', '.join(near)}." if near else ""
                raise UsageError(f"{self._at(pattern)}: the pattern {pattern!r} matches no linear.{shown}")

    def _made_for(self) -> str:
        source = self.about.get("model")
        return f" ({source})" if isinstance(source, str) else ""

    def _at(self, key: str) -> str:
        line = self.lines.get(key)
        return (self.file or "the plan") + (f", line {line}" if line is not None else "")

    def describe(self) -> str:
        """A short line, e.g. ``"3.50 bits per weight: 2 x 3, 5 x 110"``."""
        counts: dict[str, int] = {}
        for label in self.linears.values():
            counts[label] = counts.get(label, 0) + 1
        shares = ", ".join(f"{counts[label]} x {label}" for label in self.formats if label in counts)
        bits = self.about.get("bits_per_weight")
        return (f"{bits:.3f} bits per weight: " if isinstance(bits, float) else "") + shares

    def to_dict(self) -> dict[str, Any]:
        """Plain data, as written to YAML."""
        return {
            "about": dict(self.about),
            "formats": {label: None if scheme is None else _shown(scheme) for label, scheme in self.formats.items()},
            "linears": dict(self.linears),
        }

    def to_yaml(self) -> str:
        """The text of the file."""
        head = "# A plan of ptq: linears, by name or pattern, and the label of each one's format. Edit freely.\n"
        return head + yaml.safe_dump(self.to_dict(), sort_keys=False, width=120, allow_unicode=True)

    def save(self, path: str | Path) -> None:
        """Write the file, whole or not at all.

        Raises:
            OutputError: it cannot be written.
        """
        write_file(Path(path), lambda temporary: temporary.write_text(self.to_yaml(), encoding="utf-8"))

    @classmethod
    def load(cls, path: str | Path) -> Plan:
        """Read a plan; see `read_plan`."""
        return read_plan(Path(path))


def _linears(model: nn.Module) -> list[str]:
    return [f"{block}.{name}" for block in find_blocks(model) for name in find_linears(model.get_submodule(block))]


def _shape(model: nn.Module, name: str) -> tuple[int, ...]:
    return tuple(linear_weight(model.get_submodule(name)).shape)


def linear_weights(model: nn.Module) -> int:
    """Weights of all linears in the blocks of a model."""
    return sum(math.prod(_shape(model, name)) for name in _linears(model))


def _is_pattern(key: str) -> bool:
    return any(character in key for character in "*?[")


def _shown(scheme: Scheme) -> dict[str, Any]:
    """The fields of a scheme that are not those that every scheme of its number format has."""
    plain = Scheme.of(scheme.format).to_dict()
    return {name: value for name, value in scheme.to_dict().items() if value != plain[name] or name in _ALWAYS_SHOWN}


def _with_inputs_of(scheme: Scheme, base: Scheme) -> Scheme:
    """A plan says how weights are stored; whether inputs are rounded at run time is the recipe's affair."""
    if scheme.act_bits is not None or scheme.act_format is not None:
        return scheme
    return dataclasses.replace(
        scheme, act_bits=base.act_bits, act_symmetric=base.act_symmetric, act_format=base.act_format
    )


def read_plan(path: Path) -> Plan:
    """The plan in a YAML file.

    Raises:
        UsageError: the file is missing, is not YAML, or is no plan; says the line.
    """
    file = read_yaml(path)
    data = file.data
    if not isinstance(data, Mapping) or not isinstance(data.get("linears"), Mapping) or not data["linears"]:
        hint = " This looks like a recipe: use --recipe." if isinstance(data, Mapping) and "scheme" in data else ""
        raise UsageError(
            f"{path} is no plan: a plan has a mapping 'linears' of names to formats, as ptq plan writes it.{hint}"
        )
    for key in data:
        if key not in _KEYS:
            raise _wrong(path, file, (str(key),), str(unknown_name("key of a plan", str(key), _KEYS)))
    formats = _formats(path, file)
    linears: dict[str, str] = {}
    for key, value in data["linears"].items():
        label = str(value)
        if not isinstance(key, str):
            raise _wrong(path, file, ("linears", str(key)), f"{key!r} is no name of a linear.")
        if label not in formats:
            raise _wrong(path, file, ("linears", key), f"{key}: {unknown_name('format', label, formats)}")
        linears[key] = label
    lines = {key: line for key in linears if (line := file.lines.get(("linears", key))) is not None}
    about = data.get("about")
    return Plan(formats, linears, about if isinstance(about, Mapping) else {}, str(path), lines)


def _formats(path: Path, file: YamlFile) -> dict[str, Scheme | None]:
    rows = file.data.get("formats")
    if not isinstance(rows, Mapping) or not rows:
        raise UsageError(f"{path}: a plan has a mapping 'formats' of labels to the fields of a scheme.")
    formats: dict[str, Scheme | None] = {}
    for label, fields in rows.items():
        try:
            formats[str(label)] = None if fields is None else Scheme.from_dict(_checked(fields))
        except (TypeError, UsageError) as error:
            raise _wrong(path, file, ("formats", str(label)), f"format {label}: {error}") from error
    return formats


def _checked(fields: object) -> dict[str, Any]:
    if not isinstance(fields, Mapping):
        raise UsageError(f"a format is a mapping of fields, or null for full precision; got {fields!r}.")
    known = [*(field.name for field in dataclasses.fields(Scheme)), "name"]
    for key in fields:
        if key not in known:
            raise unknown_name("field of a scheme", str(key), known)
    return {str(key): value for key, value in fields.items()}


def _wrong(path: Path, file: YamlFile, key: tuple[str, ...], text: str) -> UsageError:
    line = file.lines.get(key)
    return UsageError(f"{path}: {text}" if line is None else f"{path}, line {line}: {text}")
