"""How fast this machine multiplies packed weights: medians over enough distinct weights that no cache holds them.

On a GPU the products of all weights are captured in a CUDA graph; what is timed is a layer's forward, with the rotation
and the rounding of inputs. The measure is the machine's own rate of copying memory in the same run.
"""

from __future__ import annotations

import copy
import dataclasses
import re
import statistics
import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional

from ptq.errors import UsageError
from ptq.quantized import QuantizedWeight
from ptq.runtime.linear import QuantLinear
from ptq.scheme import Scheme

__all__ = [
    "KernelTiming",
    "captured",
    "copy_bandwidth",
    "median_replay",
    "median_seconds",
    "parse_format",
    "random_layer",
    "time_formats",
]

_BYTES = {"cuda": 1_000_000_000, "cpu": 200_000_000}  # of distinct weights: far above any cache
_COPY = {"cuda": 2**30, "cpu": 2**27}
_MOST_LAYERS = 400
_DRAWN_ROWS = 32
_INTEGER = re.compile(r"int([2-8])(?:g(\d+))?(sym|asym)?")


@dataclasses.dataclass(frozen=True)
class KernelTiming:
    """One product, timed.

    Args:
        format: the scheme in words.
        kernel: the name of the kernel that ran.
        shape: ``(out_features, in_features)``.
        batch: vectors multiplied at once.
        seconds: median per product.
        dense_seconds: the same of ``torch.nn.functional.linear`` with a bfloat16 weight.
        weight_bytes: of the packed weight.
        copy_bytes_per_second: read and written by copies, in this run.
    """

    format: str
    kernel: str
    shape: tuple[int, int]
    batch: int
    seconds: float
    dense_seconds: float
    weight_bytes: int
    copy_bytes_per_second: float

    @property
    def speedup(self) -> float:
        """Of the packed product over the dense one."""
        return self.dense_seconds / self.seconds

    @property
    def bandwidth_share(self) -> float:
        """Bytes of the weight per second, as a share of the copy bandwidth."""
        return self.weight_bytes / self.seconds / self.copy_bytes_per_second

    def record(self) -> dict[str, object]:
        """Plain data, with what follows from it."""
        return dataclasses.asdict(self) | {"speedup": self.speedup, "bandwidth_share": self.bandwidth_share}


def parse_format(name: str) -> Scheme:
    """A scheme by a short name: ``int4``, ``int3g128``, ``int4g64asym``, or a number format such as ``itq3s``.

    Raises:
        UsageError: no such format, or values that it does not take.
    """
    match = _INTEGER.fullmatch(name)
    if match is None:
        return Scheme.of(name).resolved(torch.bfloat16)
    group = int(match[2]) if match[2] else 128
    scheme = Scheme(int(match[1]), symmetric=match[3] != "asym", group_size=group or None)
    return scheme.resolved(torch.bfloat16)


@torch.no_grad()
def time_formats(
    schemes: Sequence[Scheme], shape: tuple[int, int], batches: Sequence[int], device: torch.device, copied: float
) -> list[KernelTiming]:
    """Time all schemes at all batches.

    Args:
        schemes: of the weights.
        shape: ``(out_features, in_features)``.
        batches: numbers of vectors.
        device: where.
        copied: what `copy_bandwidth` measured.

    Raises:
        UsageError: a shape that a format does not take.
    """
    inputs = {batch: torch.randn(batch, shape[1]).to(device, torch.bfloat16) for batch in batches}
    dense = _dense_layers(shape, device)
    plain = {batch: median_seconds([_call(layer, x) for layer in dense], device) for batch, x in inputs.items()}
    del dense
    timings = []
    for scheme in schemes:
        layers = _packed_layers(scheme, shape, device)
        size = sum(tensor.nbytes for tensor in layers[0].buffers())
        for batch, x in inputs.items():
            seconds = median_seconds([_call(layer, x) for layer in layers], device)
            kernel = layers[0].kernel_name(x)
            timings.append(KernelTiming(scheme.describe(), kernel, shape, batch, seconds, plain[batch], size, copied))
        del layers
    return timings


def random_layer(scheme: Scheme, shape: tuple[int, int], device: torch.device, seed: int = 0) -> QuantLinear:
    """A layer of Gaussian weights, some rows of them repeated.

    Raises:
        UsageError: a shape that the format does not take.
    """
    reason = scheme.number_format.unsupported_reason(*shape, scheme)
    if reason is not None:
        raise UsageError(f"{scheme.describe()} cannot store a weight of {shape[0]} x {shape[1]}: {reason}.")
    rows, columns = min(shape[0], _DRAWN_ROWS), shape[1]
    target = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) * columns**-0.5
    record = scheme.number_format
    grid = record.grid(record.fit(target, scheme, "minmax"), scheme, columns)
    fill = -(-shape[0] // rows)
    codes = grid.round(target).repeat(fill, 1)[: shape[0]]
    params = {
        name: value.repeat(fill, 1)[: shape[0]] if value.ndim == 2 else value for name, value in grid.params.items()
    }
    inputs = {name: torch.ones(size, dtype=kind) for name, (size, kind) in scheme.input_specs(columns).items()}
    layer = QuantLinear.from_quantized(QuantizedWeight(codes, params, scheme, inputs))
    return layer.to(device, torch.bfloat16)


def copy_bandwidth(device: torch.device) -> float:
    """Bytes read and written per second by copies of a large tensor."""
    source = torch.ones(_COPY[device.type], dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * source.nbytes / median_seconds([lambda: target.copy_(source)] * 2, device)


def _dense_layers(shape: tuple[int, int], device: torch.device) -> list[Callable[[Tensor], Tensor]]:
    count = _copies(2 * shape[0] * shape[1], device)
    weights = [torch.randn(shape, dtype=torch.bfloat16, device=device) for _ in range(count)]
    return [lambda x, w=weight: functional.linear(x, w) for weight in weights]  # type: ignore[misc]


def _packed_layers(scheme: Scheme, shape: tuple[int, int], device: torch.device) -> list[QuantLinear]:
    first = random_layer(scheme, shape, device)
    count = _copies(sum(buffer.nbytes for buffer in first.buffers()), device)
    return [first, *(copy.deepcopy(first) for _ in range(1, count))]  # other memory, the same values


def _copies(size: int, device: torch.device) -> int:
    return min(_MOST_LAYERS, max(3, -(-_BYTES[device.type] // size)))


def _call(layer: Callable[[Tensor], Tensor], x: Tensor) -> Callable[[], object]:
    return lambda: layer(x)


def median_seconds(
    calls: Sequence[Callable[[], object]], device: torch.device, *, budget: float = 0.5, launches: int = 320
) -> float:
    """Median seconds per call.

    Args:
        calls: run one after the other; of weights that no cache holds, if caches are not what is timed.
        device: where they run. On a GPU all of them are one CUDA graph.
        budget: seconds after which no further time is taken, if there are five.
        launches: calls in a graph at least, by repetition.
    """
    calls[0]()
    if device.type != "cuda":
        return _on_cpu(calls, budget)
    rounds = max(1, launches // len(calls))
    graph = captured([*calls] * rounds)
    return median_replay(graph, budget) / (rounds * len(calls))


def captured(calls: Sequence[Callable[[], object]]) -> torch.cuda.CUDAGraph:
    """A CUDA graph of calls, each of which has run once on its stream (weights are repacked there)."""
    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for call in dict.fromkeys(calls):
            call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        for call in calls:
            call()
    return graph


def median_replay(graph: torch.cuda.CUDAGraph, budget: float = 0.5) -> float:
    """Median seconds of 5 to 15 replays, about ``budget`` seconds in all."""
    graph.replay()
    torch.cuda.synchronize()
    taken: list[float] = []
    start = time.perf_counter()
    while len(taken) < 5 or (time.perf_counter() - start < budget and len(taken) < 15):
        events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]  # type: ignore[no-untyped-call]
        events[0].record()
        graph.replay()
        events[1].record()
        events[1].synchronize()
        taken.append(events[0].elapsed_time(events[1]) * 1e-3)
    return statistics.median(taken)


def _on_cpu(calls: Sequence[Callable[[], object]], budget: float) -> float:
    taken: list[float] = []
    start = time.perf_counter()
    while len(taken) < 5 or (time.perf_counter() - start < budget and len(taken) < 200):
        call = calls[len(taken) % len(calls)]
        before = time.perf_counter()
        call()
        taken.append(time.perf_counter() - before)
    return statistics.median(taken)
