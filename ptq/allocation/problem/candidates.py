"""Candidate formats: what a linear may be stored as, by short names, with the error that each adds to a weight."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from ptq.errors import UsageError
from ptq.methods import LayerMethod, find_method, make_config
from ptq.number_formats import FORMATS
from ptq.scheme import Scheme
from ptq.transforms.hadamard import InputRotation

__all__ = ["DEFAULT_CANDIDATES", "FULL_PRECISION", "STAND_IN", "Candidate", "parse_candidates", "rounding_errors"]

DEFAULT_CANDIDATES = "2,3,4,5,6,8"
FULL_PRECISION = ("full", "bf16", "fp16", "none")
"""Names of the candidate that leaves a linear as it is."""
STAND_IN = "rtn"
"""The method whose errors stand for those of every other: nearest rounding with searched scales."""


@dataclasses.dataclass(frozen=True)
class Candidate:
    """One format that a linear may be stored in.

    Args:
        label: its short name in plans, e.g. ``"4"`` or ``"3g32"``.
        scheme: how a weight is stored; ``None`` leaves it in full precision.
    """

    label: str
    scheme: Scheme | None

    @property
    def bits(self) -> int:
        """Bits of one code, 16 in full precision: what limits (``*.v_proj>=4``) are about."""
        return 16 if self.scheme is None else self.scheme.bits


def parse_candidates(text: str, base: Scheme) -> tuple[Candidate, ...]:
    """Candidates from names with commas between them.

    Args:
        text: each name is an integer width with what differs from the base (``4``, ``3g32``, ``4g128asym``, ``8g0``:
            g0 is one scale per channel), a number format with its own defaults (``fp4``, ``fp4-g16``), or ``bf16`` for
            no quantization.
        base: what the name of a width does not say; of a number format, what happens to inputs.

    Raises:
        UsageError: a name that is none of these, one twice, or no name.
    """
    names = [name.strip() for name in text.split(",") if name.strip()]
    found = tuple(_candidate(name, base) for name in names)
    schemes = [candidate.scheme for candidate in found]
    for number, scheme in enumerate(schemes):
        if scheme in schemes[:number]:
            first = found[schemes.index(scheme)].label
            raise UsageError(f"candidates {first!r} and {found[number].label!r} are the same format; leave one out.")
    if not found:
        raise UsageError(f"no candidate formats are given; write for example --candidates {DEFAULT_CANDIDATES}.")
    return found


def _candidate(name: str, base: Scheme) -> Candidate:
    if name.lower() in FULL_PRECISION:
        return Candidate(name.lower(), None)
    match = re.fullmatch(r"(?P<bits>\d+)(?:g(?P<group>\d+))?(?P<sign>a?sym)?", name)
    changes: dict[str, Any] = {}
    if match is not None:
        changes["bits"] = int(match["bits"])
        if match["group"] is not None:
            changes["group_size"] = int(match["group"]) or None
        if match["sign"] is not None:
            changes["symmetric"] = match["sign"] == "sym"
        integer = {"scale_dtype": base.scale_dtype, "act_bits": base.act_bits, "act_symmetric": base.act_symmetric}
        own = {"symmetric": base.symmetric, "group_size": base.group_size} if base.format == "int" else {}
        return Candidate(name, Scheme.of("int", **{**integer, **own, **changes}))
    match = re.fullmatch(r"(?P<format>.+?)(?:-g(?P<group>\d+))?", name)
    if match is None or match["format"] not in FORMATS:
        known = ", ".join(format for format in FORMATS if format != "int")
        raise UsageError(
            f"unknown candidate {name!r}: write a width with what differs (4, 3g32, 4g128asym), a number format "
            f"({known}), or bf16 for no quantization."
        )
    if match["group"] is not None:
        changes["group_size"] = int(match["group"]) or None
    if base.act_bits is not None:
        changes |= {"act_bits": base.act_bits, "act_symmetric": base.act_symmetric}
    return Candidate(name, Scheme.of(match["format"], **changes))


def rounding_errors(weight: Tensor, candidates: Sequence[Candidate]) -> Iterator[Tensor]:
    """What every candidate would add to a weight when `STAND_IN` rounds it, float32 ``[out, in]``, one at a time.

    Args:
        weight: float32 ``[out, in]``.
        candidates: with the dtype of their scales settled.
    """
    method = find_method(STAND_IN)
    assert isinstance(method, LayerMethod)
    config = make_config(method, {})

    def rounded(target: Tensor, scheme: Scheme) -> Tensor:
        shared = scheme.number_format.share([target], scheme)
        return method.quantize(target, None, scheme, config, shared).weight.dequantize()

    for candidate in candidates:
        scheme = candidate.scheme
        if scheme is None:
            yield torch.zeros_like(weight)
        elif scheme.input_rotation is None:
            yield rounded(weight, scheme) - weight
        else:
            rotation = InputRotation.of(scheme.input_rotation, weight.shape[1])
            yield rotation.inverse(rounded(rotation.on_weight(weight), scheme)) - weight
