"""`QuantEmbedding`: a table of embeddings that stays packed in memory, and the head that is tied to it."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ptq.runtime.linear import QuantLinear
from ptq.scheme import Scheme

__all__ = ["QuantEmbedding", "TiedHead", "finds_rows"]

_FEW_IDS = 64  # looked up one by one, without finding equal ones: a GPU need not wait, and a graph can capture it
_WHOLE = 2  # numbers of a tensor that belongs to the whole weight: a shape, a global scale


def finds_rows(scheme: Scheme, out_features: int, in_features: int) -> bool:
    """Whether a row of the weight can be read without its neighbours, as a look-up does.

    Args:
        scheme: how the weight is stored.
        out_features: rows of the weight.
        in_features: columns of the weight.
    """
    shapes = [shape for shape, _ in scheme.number_format.tensor_specs(out_features, in_features, scheme).values()]
    return all(shape[0] == out_features or (len(shape) == 1 and shape[0] <= _WHOLE) for shape in shapes)


class QuantEmbedding(QuantLinear):
    """Rows of ``W [num_embeddings, embedding_dim]`` by number, with ``W`` kept as the checkpoint's own tensors.

    Only the rows that are asked for are unpacked. It is a `QuantLinear` because a tied head multiplies by the same
    tensors (`TiedHead`).

    Args:
        num_embeddings: rows.
        embedding_dim: columns.
        scheme: how the weight is stored; `finds_rows` must hold.
        guard: as in `QuantLinear`.
        device: where to allocate the (uninitialised) buffers.
        dtype: of what a look-up gives.
    """

    keeps_stored_tensors = True  # look-ups read them

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        scheme: Scheme,
        *,
        guard: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(embedding_dim, num_embeddings, scheme, guard=guard, device=device, dtype=dtype)
        self.num_embeddings, self.embedding_dim = num_embeddings, embedding_dim

    def forward(self, ids: Tensor) -> Tensor:
        """``[...]`` row numbers to ``[..., embedding_dim]``."""
        if ids.numel() <= _FEW_IDS:
            return self._rows(ids.reshape(-1)).view(*ids.shape, self.embedding_dim)
        wanted, places = torch.unique(ids.reshape(-1), return_inverse=True)
        return self._rows(wanted)[places].view(*ids.shape, self.embedding_dim)

    def _rows(self, wanted: Tensor) -> Tensor:
        """``[n]`` row numbers to ``[n, embedding_dim]``."""
        count = len(wanted)
        rows = {
            key: tensor[wanted] if tensor.shape[0] == self.num_embeddings else tensor
            for key, tensor in self._tensors().items()
        }
        record = self._scheme.number_format
        values = record.dequantize_rows(rows, self._scheme, slice(0, count), count, self.embedding_dim)
        return values.to(self._activations)

    def product(self, x: Tensor) -> Tensor:
        """``x W^T``, as the tied head computes it."""
        return super().forward(x)


class TiedHead(nn.Linear):
    """A head that multiplies by the table of a `QuantEmbedding`; it stores nothing.

    Args:
        embedding: the table.
        bias: ``[num_embeddings]`` or ``None``.
    """

    bias: nn.Parameter | None  # type: ignore[assignment]

    def __init__(self, embedding: QuantEmbedding, bias: nn.Parameter | None = None) -> None:
        nn.Module.__init__(self)  # not that of nn.Linear, which allocates a weight
        self.in_features, self.out_features = embedding.embedding_dim, embedding.num_embeddings
        self._embedding = (embedding,)  # in a tuple: not a module of this one
        self.register_parameter("bias", bias)

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """The empty tensor of `QuantLinear.weight`."""
        return self._embedding[0].weight

    def forward(self, x: Tensor) -> Tensor:
        """``[..., embedding_dim]`` to ``[..., num_embeddings]``."""
        found = self._embedding[0].product(x)
        return found if self.bias is None else found + self.bias.to(found.dtype)
