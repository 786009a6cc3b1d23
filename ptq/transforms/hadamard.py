"""Random rotations that cost `n log n`: Walsh-Hadamard transforms of signed blocks.

A rotation spreads the outliers of a vector over all its entries, which makes it easier to quantize; a linear computes
the same when its input and its weight are rotated alike. Every transform here acts on the last dimension:

    InputRotation      R x = H (s * x): random signs s, then blocks of a power of two; for the input of one linear
    ResidualRotation   Q x of any width: signs, Hadamard of the power-of-two factor x random orthogonal odd factor;
                       on request it fixes the all-ones vector, which layer norms that subtract the mean need

Sources: QuaRot (arXiv 2404.00456), sections 3 and 4; QuIP# (arXiv 2402.04396), section 3, for the random signs.
"""

from __future__ import annotations

import functools
import itertools
import weakref

import torch
from torch import Tensor

from calib.errors import UsageError
from ptq.scheme import Rotation

__all__ = ["InputRotation", "ResidualRotation", "hadamard", "hadamard_blocks", "hadamard_matrix", "random_orthogonal"]

_WIDEST_MATRIX = 256  # of Hadamard products on a GPU
_EQUAL_BLOCKS_FROM = 64  # smaller equal blocks would mix too few channels


def hadamard_blocks(width: int, block: int | None = None) -> tuple[int, ...]:
    """The sizes of consecutive blocks, powers of two, that make up ``width``.

    With a ``block``, as many of that size as fit, and smaller ones for what is left (576 in blocks of 256: 256 + 256 +
    64). Without, a width whose largest power-of-two divisor is 64 or more has equal blocks of that divisor (4096: one
    block; 14336: seven of 2048), and any other width is cut greedily from the largest power of two (300: 256 + 32 + 8 +
    4).

    Args:
        width: of the vectors.
        block: the largest block, a power of two.

    Raises:
        UsageError: a width below one; a block that is no power of two.
    """
    if width < 1:
        raise UsageError(f"a Hadamard transform of width {width}: the width must be at least 1.")
    if block is not None:
        if block < 1 or block & (block - 1):
            raise UsageError(f"Hadamard blocks of {block}: the size of a block must be a power of two, at least 1.")
        return (block,) * (width // block) + _powers(width % block)
    divisor = width & -width
    if divisor >= _EQUAL_BLOCKS_FROM:
        return (divisor,) * (width // divisor)
    return _powers(width)


def _powers(width: int) -> tuple[int, ...]:
    """The powers of two that add up to ``width``, the largest first."""
    return tuple(1 << bit for bit in reversed(range(width.bit_length())) if width >> bit & 1)


def hadamard(x: Tensor, block: int | None = None) -> Tensor:
    """The normalised Walsh-Hadamard transform of every block of the last dimension (`hadamard_blocks`).

    It is symmetric and its own inverse. Half precision is computed in float32; gradients flow.

    Args:
        x: ``[..., n]``.
        block: as in `hadamard_blocks`.

    Returns:
        ``[..., n]`` in the dtype of ``x``.

    Raises:
        UsageError: a block that does not fit.
    """
    work = x if x.dtype == torch.float64 else x.float()
    transform = _products if x.is_cuda else _butterflies
    done = []
    for size, same in itertools.groupby(hadamard_blocks(x.shape[-1], block)):
        count = len(list(same))
        part, work = work[..., : count * size], work[..., count * size :]
        done.append(transform(part.reshape(*x.shape[:-1], count, size)).flatten(-2))
    return (done[0] if len(done) == 1 else torch.cat(done, -1)).to(x.dtype)


def _butterflies(x: Tensor) -> Tensor:
    """Transform of the last dimension, a power of two: each step adds and subtracts the halves and interleaves them, so
    that after all steps every bit of the index had its turn and is back in its place."""
    n = x.shape[-1]
    for _ in range(n.bit_length() - 1):
        low, high = x.chunk(2, -1)
        x = torch.stack((low + high, low - high), -1).flatten(-2)
    scaled: Tensor = x * float(n) ** -0.5
    return scaled


def _products(x: Tensor) -> Tensor:
    """`_butterflies` by matrix products of at most 256 columns: few passes over memory instead of several a step.
    ``H_n`` is the Kronecker product of those of its factors."""
    for before, size, after in _factors(x.shape[-1]):
        matrix = hadamard_matrix(size, x.dtype, x.device)
        parted = x.reshape(*x.shape[:-1], before, size, after)
        x = (parted.mT @ matrix).mT.flatten(-3) if after > 1 else (parted.squeeze(-1) @ matrix).flatten(-2)
    return x


def _factors(n: int) -> list[tuple[int, int, int]]:
    """A power of two as products ``before * size * after``, sizes up to 256, that cover all its bits."""
    found, after = [], 1
    while after < n:
        size = min(_WIDEST_MATRIX, n // after)
        found.append((n // after // size, size, after))
        after *= size
    return found


@functools.lru_cache(maxsize=32)
def hadamard_matrix(size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """``H``, normalised and symmetric, ``[size, size]``; half precision holds those of powers of four exactly."""
    with torch.inference_mode(False):  # kept for passes with gradients, too
        one = torch.ones(1, 1, dtype=torch.float64)
        for _ in range(size.bit_length() - 1):
            one = torch.cat((torch.cat((one, one), 1), torch.cat((one, -one), 1)), 0)
        scaled: Tensor = one * float(size) ** -0.5
        return scaled.to(device=device, dtype=dtype)


def _signs(width: int, generator: torch.Generator) -> Tensor:
    """Random signs, int8 ``[width]`` on the CPU, the same wherever they are used."""
    return torch.randint(0, 2, (width,), generator=generator, dtype=torch.int8) * 2 - 1


class InputRotation:
    """The orthogonal map ``R x = H (s * x)`` for a linear's input.

        rotation(x) @ rotation.on_weight(w).T == x @ w.T

    Args:
        width: of the input.
        seed: of the signs.
        block: size of the Hadamard blocks, `hadamard_blocks` by default.
        signed: whether there are random signs; all are 1 otherwise.

    Raises:
        UsageError: a width or block that does not fit.
    """

    def __init__(self, width: int, seed: int, block: int | None = None, *, signed: bool = True) -> None:
        hadamard_blocks(width, block)
        self.width, self.seed, self.block = width, seed, block
        signs = _signs(width, torch.Generator().manual_seed(seed))
        self.signs = signs if signed else torch.ones_like(signs)  # [width] int8
        self._placed: dict[torch.device, Tensor] = {self.signs.device: self.signs}
        self._last: tuple[weakref.ref[Tensor], int, bool, Tensor] | None = None

    @classmethod
    def of(cls, rotation: Rotation, width: int) -> InputRotation:
        """The map that a scheme's rotation stands for."""
        return cls(width, rotation.seed, rotation.block, signed=rotation.kind == "hadamard")

    def once(self, x: Tensor) -> Tensor:
        """``R x``, computed once for linears that are given the same tensor one after the other (q, k and v).

        The result is remembered as long as ``x`` lives and is not written to.
        """
        if torch.compiler.is_compiling() or x.is_inference():  # these do not say when they were written to
            return self(x)
        last, grad = self._last, torch.is_grad_enabled() and x.requires_grad
        if last is not None and last[0]() is x and last[1:3] == (x._version, grad):
            return last[3]
        rotated = self(x)
        self._last = (weakref.ref(x, self._forget), x._version, grad, rotated)
        return rotated

    def _forget(self, dead: weakref.ref[Tensor]) -> None:
        if self._last is not None and self._last[0] is dead:
            self._last = None

    def __getstate__(self) -> dict[str, object]:
        """Copies remember nothing."""
        return self.__dict__ | {"_last": None}

    def __call__(self, x: Tensor) -> Tensor:
        """``R x`` of vectors ``[..., width]``, in their dtype."""
        if x.is_cuda and self._tensor_cores(x.dtype):
            signed = (x * self._signs_for(x).to(x.dtype)).reshape(*x.shape[:-1], -1, _WIDEST_MATRIX)  # exact
            rotated: Tensor = (signed @ hadamard_matrix(_WIDEST_MATRIX, x.dtype, x.device)).flatten(-2)
            return rotated
        return hadamard(self._wide(x) * self._signs_for(x), self.block).to(x.dtype)

    def inverse(self, x: Tensor) -> Tensor:
        """``R^T x`` of vectors ``[..., width]``, in their dtype."""
        return (hadamard(self._wide(x), self.block) * self._signs_for(x)).to(x.dtype)

    def on_weight(self, weight: Tensor) -> Tensor:
        """The weight ``[out, width]`` for rotated inputs, ``W R^T``."""
        return self(weight)

    def on_hessian(self, hessian: Tensor) -> Tensor:
        """The second moments ``[width, width]`` of rotated inputs, ``R H R^T``."""
        return self(self(hessian).mT).mT

    def _tensor_cores(self, dtype: torch.dtype) -> bool:
        """Whether one product in half precision, summed in float32, rounds nothing but its result."""
        half = dtype in (torch.bfloat16, torch.float16)
        return half and self.block == _WIDEST_MATRIX and self.width % _WIDEST_MATRIX == 0

    @staticmethod
    def _wide(x: Tensor) -> Tensor:
        return x if x.dtype == torch.float64 else x.float()

    def _signs_for(self, x: Tensor) -> Tensor:
        """The signs on the device of ``x``: copied there once."""
        if x.shape[-1] != self.width:
            raise UsageError(f"a rotation of width {self.width} was given vectors of width {x.shape[-1]}.")
        if x.device not in self._placed:
            self._placed[x.device] = self.signs.to(x.device)
        return self._placed[x.device]


class ResidualRotation:
    """A random orthogonal map ``Q`` of the residual stream, of any width, applied without its matrix.

    Args:
        width: of the stream; seed: of signs and odd factor.
        keep_ones: ``Q 1 = 1``, so that the mean of a vector does not change. (A reflection moves ``Q 1`` back.)
    """

    def __init__(self, width: int, seed: int, *, keep_ones: bool = False) -> None:
        self.width, self.seed, self.keep_ones = width, seed, keep_ones
        generator = torch.Generator().manual_seed(seed)
        self._power = width & -width
        self._sign = _signs(width, generator)
        odd = width // self._power
        self._odd = _orthogonal(odd, generator)  # [odd, odd]
        self._mirror: Tensor | None = None
        self._placed: dict[tuple[torch.device, torch.dtype], tuple[Tensor, Tensor, Tensor | None]] = {}
        if keep_ones:
            ones = torch.full((width,), width**-0.5, dtype=torch.float64)
            apart = self(ones) - ones
            if apart.norm() > 1e-9:
                self._mirror = apart / apart.norm()
        self._placed.clear()

    def __call__(self, x: Tensor) -> Tensor:
        """``Q x`` of vectors ``[..., width]``, computed and returned in float64 on their device."""
        return self._product(x.double())

    def online(self, x: Tensor, *, inverse: bool = False) -> Tensor:
        """``Q x``, or ``Q^T x``, of vectors ``[..., width]`` in a forward pass: computed in float32, or float64 where
        they are, and returned in their dtype."""
        wide = x if x.dtype == torch.float64 else x.float()
        return (self._inverse(wide) if inverse else self._product(wide)).to(x.dtype)

    def _product(self, x: Tensor) -> Tensor:
        sign, odd, mirror = self._constants(x)
        work = (x * sign).reshape(*x.shape[:-1], self._power, -1)  # [..., power, odd]
        work = work @ odd.T
        work = hadamard(work.mT).mT.flatten(-2)
        return work if mirror is None else _reflected(work, mirror)

    def _inverse(self, x: Tensor) -> Tensor:
        sign, odd, mirror = self._constants(x)
        work = x if mirror is None else _reflected(x, mirror)
        work = hadamard(work.reshape(*x.shape[:-1], self._power, -1).mT).mT @ odd
        return work.flatten(-2) * sign

    def _constants(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """Signs, odd factor and mirror on the device and in the dtype of ``x``: copied there once."""
        where = x.device, x.dtype
        if where not in self._placed:
            mirror = None if self._mirror is None else self._mirror.to(*where)
            self._placed[where] = self._sign.to(*where), self._odd.to(*where), mirror
        return self._placed[where]

    def matrix(self) -> Tensor:
        """``Q``, float64 ``[width, width]``."""
        return self(torch.eye(self.width, dtype=torch.float64)).T.contiguous()


def _reflected(x: Tensor, mirror: Tensor) -> Tensor:
    """Vectors ``[..., width]`` in the plane mirror with unit normal ``mirror``."""
    return x - 2.0 * (x @ mirror)[..., None] * mirror


def random_orthogonal(width: int, seed: int) -> Tensor:
    """A random orthogonal matrix, float64 ``[width, width]``: the Kronecker product of the Hadamard matrix of the
    largest power-of-two factor and a random orthogonal odd factor, its columns with random signs."""
    return ResidualRotation(width, seed).matrix()


def _orthogonal(width: int, generator: torch.Generator) -> Tensor:
    """Haar distributed: QR of a Gaussian matrix, with the signs of R's diagonal moved into Q."""
    q, r = torch.linalg.qr(torch.randn(width, width, generator=generator, dtype=torch.float64))
    signed: Tensor = q * r.diagonal().sign()
    return signed
