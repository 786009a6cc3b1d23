"""The rows that a mixture's router sends to each expert.

Both streams are stopped where the module of all experts is called. The full-precision model's router decides which
tokens are an expert's, in both streams: statistics of the two can then be compared token by token, and an expert is
quantized for the tokens that it will see if quantization does its work.

An expert to which too few tokens come (fewer than a quarter of the width of its input, so that its Hessian would be
mostly damping) is calibrated on all tokens of the layer instead, and named.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from calib.distributed import Workers
from calib.model.block_inputs import BlockCall
from calib.runner.suspended_forward import Arguments, run_to

__all__ = ["FEW", "RoutedRows"]

FEW = 0.25  # tokens an expert needs, as a share of the width of its input


class RoutedRows:
    """The inputs of one module of experts, over all batches of a process.

    Args:
        name: of the module of all experts, in the block; experts: how many it holds.
        own: for every batch what the module is called with in the quantized stream: ``(hidden [tokens, width], index
            [tokens, k], weights [tokens, k])``; full: the same in the full-precision stream.
        workers: tokens are counted over all processes.
    """

    def __init__(self, name: str, experts: int, own: list[Arguments], full: list[Arguments], workers: Workers) -> None:
        self.name = name
        self._own = [arguments[0] for arguments in own]
        self._full = [(arguments[0], arguments[1]) for arguments in full]
        counts = torch.zeros(experts + 1, dtype=torch.float64, device=workers.device)  # the last one: all tokens
        for hidden, index in self._full:
            found = torch.bincount(index.flatten(), minlength=experts + 1)[:experts]  # beyond: routed nowhere
            counts[:experts] += found.to(counts)
            counts[experts] += len(hidden)
        workers.sum_(counts)
        self._counts, self._total = counts[:experts].tolist(), int(counts[experts])

    def tokens(self, expert: str) -> int:
        """Calibration tokens that the router sends to an expert."""
        return int(self._counts[_number(expert)])

    def starved(self, expert: str) -> bool:
        """Whether these are too few."""
        width = int(self._own[0].shape[-1])
        return self.tokens(expert) < FEW * width

    def notes(self, expert: str) -> tuple[str, ...]:
        """What a reader must know of the expert's statistics."""
        if not self.starved(expert):
            return ()
        return (f"{self.tokens(expert)} of {self._total} tokens were routed here: calibrated on all of them",)

    def of(self, expert: str, batch: int) -> tuple[Tensor, Tensor]:
        """The expert's rows in the quantized and in the full-precision stream, ``[rows, width]`` each."""
        own, (full, index) = self._own[batch], self._full[batch]
        if self.starved(expert):
            return own, full
        rows = (index == _number(expert)).any(-1).nonzero()[:, 0]
        return own[rows], full[rows]

    @staticmethod
    def through(expert: nn.Module, linear: str, rows: Tensor) -> Tensor:
        """What a linear of the expert gets for ``rows`` ``[rows, width]``, as ``[rows, 1, n]``: to statistics that ask,
        every row is a sequence of its own."""
        found = run_to(expert, linear, BlockCall((), {}), rows)
        inputs: Tensor = found[0][0]
        return inputs[:, None]


def _number(expert: str) -> int:
    return int(expert.rpartition(".")[2])
