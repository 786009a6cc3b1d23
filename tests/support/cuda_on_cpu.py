"""The CUDA kernel's path on a CPU: its layout, merging and restoring as they are, its operator computed slowly."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor

from ptq.runtime import cuda_products
from ptq.runtime.cuda_products import CUDA_PRODUCTS, CudaWeight
from ptq.runtime.dispatch import KERNELS, REFERENCE
from ptq.transforms.hadamard import hadamard
from tests.ptq.runtime import cuda_model

__all__ = ["cuda_on_cpu"]


@contextmanager
def cuda_on_cpu() -> Iterator[list[int]]:
    """While it lasts the kernel serves the CPU; gives a list of the rows of every product that was computed."""
    rows_computed: list[int] = []

    def product(
        x: Tensor,
        codes: Tensor,
        scales: Tensor,
        zeros: Tensor | None,
        signs: Tensor | None,
        bias: Tensor | None,
        format: int,
        group: int,
        rows: int,
        columns: int,
    ) -> Tensor:
        rows_computed.append(rows)
        dense = cuda_model.dense(CudaWeight(format, group, codes, scales, zeros), rows, columns)
        wide = x.float() if signs is None else hadamard(x.float() * cuda_products._plus_minus(signs), 256)
        result = wide.double() @ dense.T
        return (result if bias is None else result + bias.double()).to(x.dtype)

    library = torch.library.Library("ptq_cuda", "IMPL")  # type: ignore[no-untyped-call]
    library.impl("product", product, "CPU")  # type: ignore[no-untyped-call]
    kernel = dataclasses.replace(
        CUDA_PRODUCTS,
        devices=frozenset({"cpu"}),
        dtypes=frozenset({torch.float32, torch.bfloat16, torch.float16}),
        unsupported_reason=lambda scheme, rows, columns: None,
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("PTQ_KERNEL", raising=False)
        patch.setattr("ptq.runtime.dispatch.KERNELS", [kernel, REFERENCE])
        patch.setattr("ptq.runtime.linear.KERNELS", [kernel, REFERENCE])
        try:
            yield rows_computed
        finally:
            library._destroy()  # type: ignore[no-untyped-call]
    assert CUDA_PRODUCTS in KERNELS
