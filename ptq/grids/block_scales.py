"""Scales of the block formats of hardware, fitted to a weight: E4M3 under a tensor scale (NVFP4), E8M0 (MX), per block.

A weight is cut into blocks that share a scale (`as_blocks`): 1 x 16 for NVFP4, 1 x 32 for MX, a row, the whole weight
or 128 x 128 for FP8. Every scale is one of a few candidates, all of them values that can be stored; where a search is
asked for, each block takes the candidate with the smallest error ``sum h |w - q|^p``, measured exactly.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from ptq.errors import NumericalError
from ptq.grids.floating_point import E2M1, E4M3, FloatFormat
from ptq.grids.grid import check_finite

__all__ = [
    "E8M0_BIAS",
    "EXPONENT_RULES",
    "as_blocks",
    "block_exponents",
    "divided",
    "e8m0_values",
    "exponent_scales",
    "fit_e4m3",
    "fit_e8m0",
    "fit_ratio",
    "global_scale",
]

E8M0_BIAS = 127
"""A stored exponent byte ``b`` is the scale ``2^(b - 127)``; 255 is NaN."""
_LOWEST_BYTE, _HIGHEST_BYTE = 1, 254  # 2^-126, so that the scale is a normal number in float32, to 2^127
EXPONENT_RULES = ("floor", "even", "rceil")
"""How the exponent of a block follows from its largest magnitude without a search."""

_E4M3_STEPS_PER_OCTAVE = 8
_RATIOS = tuple(2.0 ** (-step / 8) for step in range(13))  # of the largest weight, down to 0.35
_CHUNK = 1 << 19  # weights measured at once on a CPU: the temporaries stay in cache
_DEVICE_CHUNK = 1 << 24


def as_blocks(weight: Tensor, rows: int | None, columns: int | None) -> Tensor:
    """``[out, in]`` cut into blocks, ``[out / rows, in / columns, rows * columns]``; edges are filled up with zeros.

    Args:
        weight: the matrix.
        rows: height of a block; ``None`` is all of them.
        columns: width of a block; ``None`` is all of them.
    """
    height, width = rows or weight.shape[0], columns or weight.shape[1]
    down, across = -(-weight.shape[0] // height), -(-weight.shape[1] // width)
    padded = torch.nn.functional.pad(weight, (0, across * width - weight.shape[1], 0, down * height - weight.shape[0]))
    return padded.view(down, height, across, width).transpose(1, 2).reshape(down, across, height * width)


def e8m0_values(exponents: Tensor) -> Tensor:
    """Scales of stored exponent bytes, float32, exact on every device.

    Raises:
        ValueError: a byte of 255, which is NaN.
    """
    if exponents.numel() and int(exponents.max()) > _HIGHEST_BYTE:
        raise ValueError("a stored exponent is 255, which is not a number")
    return exponent_scales(exponents)


def exponent_scales(exponents: Tensor) -> Tensor:
    """`e8m0_values` of bytes that are known to be numbers."""
    # The byte is float32's own exponent field; 0 is 2^-127, which is below float32's normal numbers.
    bits = torch.where(exponents == 0, 1 << 22, exponents.to(torch.int32) << 23)
    return bits.to(torch.int32).view(torch.float32)


def block_exponents(largest: Tensor, number: FloatFormat, rule: str) -> Tensor:
    """Bytes, int32, of blocks with magnitudes up to ``largest``; blocks of zeros get the scale 1."""
    bits = largest.float().view(torch.int32)
    shift = {
        "floor": 0,
        # Up from 1.75 times a power of two on, where E2M1 would round up to the next one and E4M3 would saturate.
        "even": 1 << 21,
        # Up where the largest value of the exponent is larger than the format's.
        "rceil": (1 << 23) - 1 - _mantissa_of_maximum(number),
    }[rule]
    bytes_ = ((bits + shift) >> 23) - number.max_exponent
    return torch.where(largest > 0, bytes_.clamp(_LOWEST_BYTE, _HIGHEST_BYTE), E8M0_BIAS)


def _mantissa_of_maximum(number: FloatFormat) -> int:
    return int(torch.tensor(number.maximum).view(torch.int32)) & ((1 << 23) - 1)


def fit_e8m0(
    blocks: Tensor,
    number: FloatFormat,
    search: str,
    importance: Tensor | None = None,
) -> Tensor:
    """Exponent bytes of blocks of ``number``, uint8 ``[rows, groups]``.

    Args:
        blocks: float32 ``[rows, groups, n]``.
        number: of the elements.
        search: ``floor`` (OCP: saturates), ``even`` (compressed-tensors), ``rceil`` (never saturates), ``minmax``
            (the same as ``even``), or a search for the smallest error among the exponents that hold the largest value
            and the two around it: ``mse``, ``pnorm``, ``hessian``.
        importance: ``[groups, n]`` or ``[rows, groups, n]``, for ``hessian``.

    Raises:
        NumericalError: a value is not finite.
    """
    largest = _largest(blocks)
    if search in EXPONENT_RULES or search == "minmax":
        return block_exponents(largest, number, "even" if search == "minmax" else search).to(torch.uint8)
    low = block_exponents(largest, number, "floor")
    candidates = (low + step for step in (0, 1, -1))
    best = _best(
        blocks,
        (byte.clamp(_LOWEST_BYTE, _HIGHEST_BYTE) for byte in candidates),
        exponent_scales,
        number,
        search,
        importance,
    )
    return torch.where(largest > 0, best, E8M0_BIAS).to(torch.uint8)


def global_scale(largest: Tensor, search: str) -> Tensor:
    """The stored tensor scale of NVFP4, float32 ``[1]``, as compressed-tensors has it: the larger, the finer.

    A weight is ``q * block scale / global scale``. Without a search the largest block scale is E4M3's 448; with one it
    is 256, so that a scale half as large again can be stored, too (four over six).

    Args:
        largest: the largest magnitude of all weights that share the scale.
        search: of the block scales.
    """
    top = E4M3.maximum if search == "minmax" else 256.0
    scale = E2M1.maximum * top / largest.float().reshape(1)
    return torch.where(torch.isfinite(scale), scale, 1.0)


def fit_e4m3(blocks: Tensor, tensor_scale: Tensor, search: str, importance: Tensor | None = None) -> Tensor:
    """Block scales of NVFP4, float8 E4M3 ``[rows, groups]``; blocks of zeros get the smallest one.

    Args:
        blocks: float32 ``[rows, groups, 16]``.
        tensor_scale: `global_scale`.
        search: ``minmax`` (the largest weight becomes 6), ``four_over_six`` (6 or 4, whichever has the smaller squared
            error), or all E4M3 numbers from half to twice that: ``mse``, ``pnorm``, ``hessian``.
        importance: ``[groups, 16]`` or ``[rows, groups, 16]``, for ``hessian``.

    Raises:
        NumericalError: a value is not finite.
    """
    largest = _largest(blocks)
    six = _e4m3_code(divided(largest, E2M1.maximum) * tensor_scale)
    if search == "minmax":
        return _e4m3(six)
    if search == "four_over_six":
        candidates = [six, _e4m3_code(largest / 4 * tensor_scale)]
    else:
        candidates = [
            six + step for step in (0, *range(-_E4M3_STEPS_PER_OCTAVE, 0), *range(1, _E4M3_STEPS_PER_OCTAVE + 1))
        ]
    values = E4M3.values(torch.arange(E4M3.magnitudes, device=blocks.device))

    def scales(code: Tensor) -> Tensor:
        return values[code.long()] / tensor_scale

    return _e4m3(
        _best(blocks, (code.clamp(1, E4M3.magnitudes - 1) for code in candidates), scales, E2M1, search, importance)
    )


def _e4m3_code(scale: Tensor) -> Tensor:
    return E4M3.patterns(E4M3.round(scale)).to(torch.int32).clamp_(min=1)


def _e4m3(code: Tensor) -> Tensor:
    return code.to(torch.uint8).view(torch.float8_e4m3fn)


def fit_ratio(
    blocks: Tensor, number: FloatFormat, dtype: torch.dtype, search: str, importance: Tensor | None = None
) -> Tensor:
    """Scales of blocks of ``number`` in a floating-point ``dtype``, ``[rows, groups]``; never zero.

    Args:
        blocks: float32 ``[rows, groups, n]``.
        number: of the elements.
        dtype: in which scales are stored.
        search: ``minmax`` (the largest weight becomes the largest value), or smaller ranges by the smallest error.
        importance: ``[groups, n]`` or ``[rows, groups, n]``, for ``hessian``.

    Raises:
        NumericalError: a value is not finite, or a scale overflows ``dtype``.
    """
    unit = divided(_largest(blocks), number.maximum)
    smallest = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps

    def stored(ratio: float) -> Tensor:
        return (unit * ratio).clamp(min=smallest).to(dtype).float()

    if search == "minmax":
        scale = stored(1.0)
    else:
        scale = _best(blocks, (stored(ratio) for ratio in _RATIOS), lambda scale: scale, number, search, importance)
    if not bool(torch.isfinite(scale).all()):
        raise NumericalError(f"a scale overflows {dtype}: the weights are too large. Use scale_dtype='bfloat16'.")
    return scale.to(dtype)


def divided(x: Tensor, number: float) -> Tensor:
    """``x / number``, correctly rounded everywhere: with a plain number, CUDA multiplies with its rounded inverse."""
    return x / torch.full((), number, dtype=x.dtype, device=x.device)


def _largest(blocks: Tensor) -> Tensor:
    largest = blocks.abs().amax(-1)
    check_finite(largest)
    return largest


def _best(
    blocks: Tensor,
    candidates: Iterable[Tensor],
    scale_of: Callable[[Tensor], Tensor],
    number: FloatFormat,
    search: str,
    importance: Tensor | None,
) -> Tensor:
    """Of several candidates ``[rows, groups]`` the one with the smallest error, the first among equals."""
    if search == "hessian" and importance is None:
        raise ValueError("scale search 'hessian' needs the diagonal of the Hessian")
    weights = importance if search == "hessian" else None
    power = 2.4 if search == "pnorm" else 2.0
    best: Tensor | None = None
    least = torch.empty(0)
    for candidate in candidates:
        error = _error(blocks, scale_of(candidate), number, power, weights)
        if best is None:
            best, least = candidate, error
            continue
        better = error < least
        best, least = torch.where(better, candidate, best), torch.where(better, error, least)
    if best is None:
        raise ValueError("no candidates")
    return best


def _error(blocks: Tensor, scale: Tensor, number: FloatFormat, power: float, weights: Tensor | None) -> Tensor:
    """``sum h |w - q|^p`` of every block, a slab of rows at a time."""
    step = max(1, (_CHUNK if blocks.device.type == "cpu" else _DEVICE_CHUNK) // max(1, blocks[0].numel()))
    parts = []
    for start in range(0, len(blocks), step):
        rows = slice(start, start + step)
        unit = scale[rows, :, None]
        error = number.round(blocks[rows] / unit).mul_(unit).sub_(blocks[rows]).abs_().pow_(power)
        if weights is not None:
            error.mul_(weights if weights.ndim == 2 else weights[rows])
        parts.append(error.sum(-1))
    return torch.cat(parts)
