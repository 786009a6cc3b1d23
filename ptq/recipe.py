"""`Recipe`: everything that decides the result of a quantization, frozen, and the same as YAML."""

from __future__ import annotations

import dataclasses
import fnmatch
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, TypeVar

import yaml

from calib.data.bos import check_bos_choice
from calib.data.chat import check_template_choice
from ptq.errors import UsageError, unknown_name
from ptq.recipe_files.reader import read_recipe
from ptq.scheme import Rotation, Scheme, check_dynamic

__all__ = [
    "AUTO_ROTATION",
    "COMPUTE_DTYPES",
    "CONTAINER_NAMES",
    "ROTATE_HEADS",
    "ROTATIONS",
    "USUAL_SEQLEN",
    "CalibrationSpec",
    "Recipe",
]

T = TypeVar("T")
CONTAINER_NAMES = ("auto", "compressed-tensors", "native", "gptq", "awq")
COMPUTE_DTYPES = ("auto", "float32", "bfloat16", "float16")
ROTATIONS = ("residual", "down", "input")
AUTO_ROTATION = ("auto",)
"""`Recipe.rotate` that stands for the rotations which cost no bytes (`ptq.pipeline.preparation.rotations`)."""
ROTATE_HEADS = ("auto", "online", "merged")
USUAL_SEQLEN = 2048
"""Tokens in a calibration sequence, where nothing else is said and the model takes so many."""


@dataclasses.dataclass(frozen=True)
class CalibrationSpec:
    """Which tokens the statistics are gathered on.

    Args:
        source: a text file, a file of rows (``.json``, ``.jsonl``, ``.parquet``) with a ``text`` or ``messages``,
            ``wikitext2``, ``c4``, ``repo:split:field`` of a hub data set, ``pydoc`` (the reference manual every CPython
            carries) or ``self`` (sampled from the model).
        samples: number of sequences.
        seqlen: tokens in each sequence, BOS included; ``None`` is 2048, or the model's context where that is shorter
            (`fitted`).
        seed: seed of the draw of sequences.
        bos: ``auto`` begins every sequence with BOS where the tokenizer puts one before a text; ``always``, ``never``.
        template: ``auto`` writes rows of messages by the tokenizer's chat template, ``always`` takes no other rows,
            ``never`` joins the contents of messages as plain text.
    """

    source: str = "c4"
    samples: int = 128
    seqlen: int | None = None
    seed: int = 0
    bos: str = "auto"
    template: str = "auto"

    def __post_init__(self) -> None:
        if not isinstance(self.source, str) or not self.source:
            raise UsageError(f"the calibration source must be a name or a path, got {self.source!r}.")
        for name, low in (("samples", 1), ("seqlen", 1), ("seed", 0)):
            value = getattr(self, name)
            if value is None and name == "seqlen":
                continue
            if not isinstance(value, int) or isinstance(value, bool) or not low <= value < 2**63:
                raise UsageError(f"calibration {name} must be a whole number from {low} to 2^63 - 1, got {value!r}.")
        check_bos_choice(self.bos, "calibration bos")
        check_template_choice(self.template, "calibration template")

    def fitted(self, context: int | None, usual: int = USUAL_SEQLEN) -> CalibrationSpec:
        """The spec with its length settled for a model.

        Args:
            context: the most tokens that the model takes; ``None`` is any number.
            usual: the length where nothing was said and the context allows it.
        """
        if self.seqlen is not None:
            return self
        return dataclasses.replace(self, seqlen=usual if context is None else min(usual, context))

    @property
    def tokens_per_sequence(self) -> int:
        """``seqlen``, or the usual length where it is not settled."""
        return USUAL_SEQLEN if self.seqlen is None else self.seqlen

    def to_dict(self) -> dict[str, Any]:
        """Plain data, as written to YAML and to the report."""
        return dataclasses.asdict(self)


@dataclasses.dataclass(frozen=True)
class Recipe:
    """What to do to which linear, and on what data.

    Args:
        method: a name of `ptq.methods.METHODS`.
        options: fields of the method's own config, e.g. ``{"beam": 4}`` for coreq.
        scheme: the storage of every linear that no override names.
        overrides: ``(pattern, scheme)`` pairs; the first pattern that matches a linear's full name wins. Patterns are
            shell-like (``*.down_proj``).
        ignore: patterns of linears that stay in full precision.
        calibration: the data; methods that need none do not read it.
        compute_dtype: dtype of the passes through the model's blocks. ``auto`` is the checkpoint's half-precision dtype
            where the device multiplies it natively, float32 otherwise. Statistics and solves are float32 in any case.
        container: ``auto`` writes a compressed-tensors checkpoint where that can carry the result, else a native one;
            ``gptq`` is the layout of GPTQModel, ``awq`` that of AutoAWQ.
        kv_bits: width, 2 to 8, to which keys (after rotary) and values are rounded at run time, each token and head
            with a range of its own; ``None`` leaves them as they are.
        kv_symmetric: the grid of keys and values has its zero in the middle; otherwise an integer zero point.
        rotate: ``residual`` rotates the hidden state between blocks (merged into the weights), ``down``
            rotates at run time the input of the linears that end a block's MLP, ``input`` that of every linear;
            ``auto`` alone is ``residual`` and ``down`` as far as the model allows and the container carries them at no
            byte.
        rotate_block: the largest block of the rotations at run time, 32 to 1024; ``None`` is 256 for ``input`` and for
            number formats with a rotation of their own, and the largest that divides the width for ``down``.
        rotate_head: what ``residual`` does about a head that is tied to the embedding: ``online`` keeps the tie by two
            rotations a token at run time, ``merged`` gives the head a tensor of its own; ``auto`` is ``online`` in
            the native container, the only one that carries it, and ``merged`` in others.
        text_only: of a multimodal model, quantize and write the text part as a model of its own; otherwise the model
            is written whole, with all but its language part as it was.

    Raises:
        UsageError: a value that no field takes.
    """

    method: str = "coreq"
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    scheme: Scheme = dataclasses.field(default_factory=lambda: Scheme(bits=3))
    overrides: tuple[tuple[str, Scheme], ...] = ()
    ignore: tuple[str, ...] = ()
    calibration: CalibrationSpec = CalibrationSpec()
    compute_dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    container: Literal["auto", "compressed-tensors", "native", "gptq", "awq"] = "auto"
    kv_bits: int | None = None
    kv_symmetric: bool = False
    rotate: tuple[str, ...] = ()
    rotate_block: int | None = None
    rotate_head: Literal["auto", "online", "merged"] = "auto"
    text_only: bool = False

    def __post_init__(self) -> None:
        for name in ("method", "compute_dtype", "container"):
            if not isinstance(getattr(self, name), str):
                raise UsageError(f"{name} must be a name, got {getattr(self, name)!r}.")
        if not isinstance(self.ignore, tuple) or not all(isinstance(pattern, str) for pattern in self.ignore):
            raise UsageError(f"ignore must be a tuple of patterns, got {self.ignore!r}.")
        if not isinstance(self.text_only, bool):
            raise UsageError(f"text_only must be true or false, got {self.text_only!r}.")
        if self.container not in CONTAINER_NAMES:
            raise unknown_name("container", self.container, CONTAINER_NAMES)
        if self.compute_dtype not in COMPUTE_DTYPES:
            raise unknown_name("compute dtype", self.compute_dtype, COMPUTE_DTYPES)
        check_dynamic("kv", "keys and values", self.kv_bits, self.kv_symmetric)
        object.__setattr__(self, "rotate", _rotations(self.rotate))
        Rotation(block=self.rotate_block)  # refuses other sizes
        if self.rotate_head not in ROTATE_HEADS:
            raise unknown_name("rotation of the head", self.rotate_head, ROTATE_HEADS)
        if self.rotate_head == "online" and self.container not in ("auto", "native"):
            raise UsageError(
                f"rotate_head is online, which the container {self.container} cannot say: use native, or merged."
            )

    def scheme_for(self, linear: str) -> Scheme | None:
        """The scheme of a linear by its full name, or ``None`` if it stays in full precision."""
        if any(fnmatch.fnmatchcase(linear, pattern) for pattern in self.ignore):
            return None
        for pattern, scheme in self.overrides:
            if fnmatch.fnmatchcase(linear, pattern):
                return scheme
        return self.scheme

    def to_dict(self) -> dict[str, Any]:
        """Plain data, as written to YAML."""
        return {
            "method": self.method,
            "options": dict(self.options),
            "scheme": self.scheme.to_dict(),
            "overrides": [{"pattern": pattern, **scheme.to_dict()} for pattern, scheme in self.overrides],
            "ignore": list(self.ignore),
            "calibration": self.calibration.to_dict(),
            "compute_dtype": self.compute_dtype,
            "container": self.container,
            "kv_bits": self.kv_bits,
            "kv_symmetric": self.kv_symmetric,
            "rotate": list(self.rotate),
            "rotate_block": self.rotate_block,
            "rotate_head": self.rotate_head,
            "text_only": self.text_only,
        }

    def record(self) -> dict[str, Any]:
        """What reports state: plain data, with the schemes' names for people."""
        overrides = [{"pattern": pattern, **scheme.record()} for pattern, scheme in self.overrides]
        return self.to_dict() | {"scheme": self.scheme.record(), "overrides": overrides}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any], where: str = "recipe") -> Recipe:
        """Read plain data; unknown keys and wrong values are refused with the key's full path.

        Raises:
            UsageError: an unknown key, or a value that a field refuses.
        """
        fields = _known(cls, data, where)
        if "scheme" in fields:
            fields["scheme"] = _scheme(fields["scheme"], f"{where}.scheme")
        if "calibration" in fields:
            fields["calibration"] = _record(CalibrationSpec, fields["calibration"], f"{where}.calibration")
        if "ignore" in fields:
            fields["ignore"] = tuple(str(pattern) for pattern in _list(fields["ignore"], f"{where}.ignore"))
        if "rotate" in fields:
            fields["rotate"] = tuple(_list(fields["rotate"], f"{where}.rotate"))
        if "options" in fields and not isinstance(fields["options"], Mapping):
            raise UsageError(f"{where}.options must be a mapping, got {type(fields['options']).__name__}.")
        if "overrides" in fields:
            fields["overrides"] = tuple(
                _override(row, f"{where}.overrides[{i}]")
                for i, row in enumerate(_list(fields["overrides"], f"{where}.overrides"))
            )
        return cls(**fields)

    @classmethod
    def from_yaml(cls, path: str | Path) -> Recipe:
        """Read a YAML file, its method and options checked (safe loader: nothing in it is executed).

        Raises:
            UsageError: the file is missing, is not YAML, is empty, or does not describe a recipe.
        """
        return read_recipe(Path(path), cls)

    def to_yaml(self) -> str:
        return yaml.safe_dump(self.to_dict(), sort_keys=False)


def _rotations(names: object) -> tuple[str, ...]:
    """Rotations in the table's order, each once, so that equal recipes are equal data."""
    if not isinstance(names, tuple | list):
        raise UsageError(f"rotate must be a list of rotations ({', '.join(ROTATIONS)}), got {names!r}.")
    if tuple(names) == AUTO_ROTATION:
        return AUTO_ROTATION
    if "auto" in names:
        raise UsageError(f"rotate: auto stands alone, got {', '.join(map(str, names))}.")
    for name in names:
        if name not in ROTATIONS:
            raise unknown_name("rotation", str(name), (*ROTATIONS, *AUTO_ROTATION))
    return tuple(name for name in ROTATIONS if name in names)


def _known(kind: type, data: Any, where: str) -> dict[str, Any]:
    if not isinstance(data, Mapping):
        raise UsageError(f"{where} must be a mapping of keys to values, got {type(data).__name__}.")
    names = [field.name for field in dataclasses.fields(kind)]
    for key in data:
        if key not in names:
            raise unknown_name(f"key in {where}", str(key), names)
    return dict(data)


def _record(kind: type[T], data: Any, where: str) -> T:
    try:
        return kind(**_known(kind, data, where))
    except (TypeError, UsageError) as error:
        raise UsageError(f"{where}: {error}") from error


def _list(data: Any, where: str) -> list[Any]:
    if not isinstance(data, list):
        raise UsageError(f"{where} must be a list, got {type(data).__name__}.")
    return data


def _override(row: Any, where: str) -> tuple[str, Scheme]:
    if not isinstance(row, Mapping) or not isinstance(row.get("pattern"), str):
        raise UsageError(f"{where} needs a 'pattern' and the fields of a scheme.")
    return row["pattern"], _scheme({k: v for k, v in row.items() if k != "pattern"}, where)


def _scheme(data: Any, where: str) -> Scheme:
    fields = {key: value for key, value in data.items() if key != "name"} if isinstance(data, Mapping) else data
    try:
        return Scheme.from_dict(_known(Scheme, fields, where))
    except (TypeError, UsageError) as error:
        raise UsageError(f"{where}: {error}") from error
