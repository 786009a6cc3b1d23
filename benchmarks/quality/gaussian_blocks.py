#!/usr/bin/env python3
"""Relative squared error of rotated formats on synthetic weights, in seconds on a CPU: no model, no data.

    python benchmarks/quality/gaussian_blocks.py
    python benchmarks/quality/gaussian_blocks.py --rows 512 --width 4096 --seed 1

Two tables in Markdown: number formats on six distributions, each rotated with random signs and measured after the
rotation back; and higgs with 3 bits on weights whose mean is not zero, with signs and without.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import torch
from torch import Tensor

from ptq.grids import ScaleSearch
from ptq.scheme import Rotation, Scheme
from ptq.transforms.hadamard import InputRotation

Draw = Callable[[int, int, torch.Generator], Tensor]


def gauss(rows: int, width: int, generator: torch.Generator) -> Tensor:
    return torch.randn(rows, width, generator=generator)


def laplace(rows: int, width: int, generator: torch.Generator) -> Tensor:
    uniform = torch.rand(rows, width, generator=generator) - 0.5
    return -uniform.sign() * torch.log1p(-2 * uniform.abs().clamp(max=0.4999999))


def student(degrees: int) -> Draw:
    """Student's t."""

    def draw(rows: int, width: int, generator: torch.Generator) -> Tensor:
        chi = torch.randn(degrees, rows, width, generator=generator).square_().sum(0)
        return gauss(rows, width, generator) / (chi / degrees).sqrt_()

    return draw


def large_columns(rows: int, width: int, generator: torch.Generator) -> Tensor:
    weight = gauss(rows, width, generator)
    weight[:, torch.randperm(width, generator=generator)[:16]] *= 10
    return weight


def outliers(rows: int, width: int, generator: torch.Generator) -> Tensor:
    weight = gauss(rows, width, generator)
    return torch.where(torch.rand(rows, width, generator=generator) < 1e-3, 20 * weight, weight)


DISTRIBUTIONS: dict[str, Draw] = {
    "Gauss": gauss,
    "Laplace": laplace,
    "t(5)": student(5),
    "t(3)": student(3),
    "16 columns x 10": large_columns,
    "0.1 % x 20": outliers,
}
FORMATS: dict[str, tuple[Scheme, ScaleSearch]] = {
    "itq3s-ternary, the paper's step": (Scheme.of("itq3s-ternary"), "minmax"),
    "itq3s-ternary, searched": (Scheme.of("itq3s-ternary"), "pnorm"),
    "higgs, 2 bits": (Scheme.of("higgs", bits=2), "pnorm"),
    "higgs, 3 bits": (Scheme.of("higgs", bits=3), "pnorm"),
    "itq3s": (Scheme.of("itq3s"), "pnorm"),
    "itq3s-104": (Scheme.of("itq3s-104"), "pnorm"),
    "higgs, 4 bits": (Scheme.of("higgs", bits=4), "pnorm"),
}


def relative_error(weight: Tensor, scheme: Scheme, search: ScaleSearch = "pnorm") -> float:
    """``||rounded - weight||^2 / ||weight||^2`` after the rotation back."""
    assert scheme.input_rotation is not None
    width = weight.shape[1]
    rotation = InputRotation.of(scheme.input_rotation, width)
    turned = rotation.on_weight(weight)
    record = scheme.number_format
    grid = record.grid(record.fit(turned, scheme, search), scheme, width)
    error = rotation.inverse(grid.dequantize(grid.round(turned))) - weight
    return float(error.double().square().sum() / weight.double().square().sum())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=256)
    parser.add_argument("--width", type=int, default=2048)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    size = (arguments.rows, arguments.width)
    weights = {n: d(*size, torch.Generator().manual_seed(arguments.seed)) for n, d in DISTRIBUTIONS.items()}
    print(f"| format | bits per weight | {' | '.join(weights)} |\n|---|---|{'---|' * len(weights)}")
    for name, (scheme, search) in FORMATS.items():
        bits = scheme.number_format.payload_bits(*size, scheme) / (size[0] * size[1])
        errors = " | ".join(f"{relative_error(weight, scheme, search):.4f}" for weight in weights.values())
        print(f"| {name} | {bits:g} | {errors} |")
    print("\n| mean, in standard deviations | format | without signs | with signs |\n|---|---|---|---|")
    for mean in (0.0, 0.25, 0.5):
        for name in ("higgs", "itq3s"):
            signed = Scheme.of(name, bits=3)
            plain = Scheme.of(name, bits=3, input_rotation=Rotation(0, 256, "hadamard-unsigned"))
            one, other = (relative_error(weights["Gauss"] + mean, scheme) for scheme in (plain, signed))
            print(f"| {mean:g} | {name} | {one:.4f} | {other:.4f} |")


if __name__ == "__main__":
    main()
