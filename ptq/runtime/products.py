"""Which product multiplies the linears of a report on a machine, without loading them; `dispatch` decides."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch

from ptq.report import LayerRecord
from ptq.runtime.dispatch import choose
from ptq.scheme import Scheme

__all__ = ["product_rows", "products_line"]


def product_rows(records: Iterable[LayerRecord], device: str, dtype: torch.dtype) -> list[dict[str, Any]]:
    """One row per kernel and way to round inputs, the most frequent first.

    Args:
        records: of a report's layers.
        device: type of the device, e.g. ``cuda``.
        dtype: of activations.

    Returns:
        ``kernel`` (a name of `ptq.runtime.dispatch.KERNELS`), ``product`` (how it multiplies), ``inputs`` (their
        format; ``None`` where they are not rounded), ``native`` (whether codes of inputs are multiplied, and not their
        values in floating point; ``None`` likewise), ``linears`` (their number).

    Raises:
        UsageError: ``PTQ_KERNEL`` names a kernel that does not serve a layer.
    """
    counts: Counter[tuple[str, str, str | None, bool | None]] = Counter()
    for record in records:
        scheme = Scheme.from_dict(record.scheme)
        kernel = choose(device, dtype, scheme, *record.shape)
        native = kernel.rounds_input if scheme.rounds_input else None
        counts[kernel.name, kernel.multiplies, _inputs(scheme), native] += 1
    names = ("kernel", "product", "inputs", "native")
    return [{**dict(zip(names, key, strict=True)), "linears": count} for key, count in counts.most_common()]


def products_line(rows: Sequence[Mapping[str, Any]], device: str, dtype: str) -> str:
    """The rows as a line for people.

    E.g. ``"cpu, bfloat16: reference, dequantized tiles (14 linears); inputs in fp8 are emulated (rounded, multiplied in
    floating point)"``.
    """
    kernels, emulated, native = Counter[str](), dict[str, None](), dict[str, None]()
    for row in rows:
        kernels[f"{row['kernel']}, {row['product']}" if row["product"] else row["kernel"]] += row["linears"]
        if row["inputs"] is not None:
            (native if row["native"] else emulated)[row["inputs"]] = None
    text = f"{device}, {dtype}: " + ", ".join(f"{name} ({count} linears)" for name, count in kernels.most_common())
    if native:
        text += f"; inputs in {', '.join(native)} are multiplied as codes"
    if emulated:
        text += f"; inputs in {', '.join(emulated)} are emulated (rounded, multiplied in floating point)"
    return text


def _inputs(scheme: Scheme) -> str | None:
    if scheme.act_format is not None:
        return scheme.act_format
    return None if scheme.act_bits is None else f"int{scheme.act_bits}{' sym' if scheme.act_symmetric else ''}"
