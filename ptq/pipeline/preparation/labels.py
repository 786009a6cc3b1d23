"""Under which name a tensor that stays in full precision is listed, and why it stays."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from torch import nn
from transformers import PreTrainedModel

from calib.model.structure import fused_experts
from ptq.pipeline.preparation.schemes.scheme_assignment import Plan, is_router
from ptq.pipeline.preparation.sizes import FUSED_EXPERTS

__all__ = ["TensorLabels"]

_NONE: Mapping[str, str] = MappingProxyType({})


class TensorLabels:
    """Names and reasons for the tensors of one model.

    Args:
        model: The skeleton.
        assignment: What is done to its linears.
    """

    def __init__(self, model: PreTrainedModel, assignment: Plan) -> None:
        self._model, self._assignment = model, assignment
        blocks = tuple(f"{block}." for block in assignment.blocks)
        self._experts = frozenset(name for name in fused_experts(model) if name.startswith(blocks))

    def __call__(self, parameter: str, dimensions: int, found: Mapping[str, str] = _NONE) -> tuple[str, str]:
        """The name under which a tensor is listed, and why it stays in full precision.

        Args:
            parameter: Its full name.
            dimensions: How many it has.
            found: Reasons that a run has found, by the full name of a linear.
        """
        module = parameter.rpartition(".")[0]
        reason = found.get(module) or self._assignment.reasons.get(module)
        if reason is None and dimensions < 2:
            return "norms, biases and other vectors", "small"
        return parameter, reason or self._reason(parameter)

    def _reason(self, parameter: str) -> str:
        module: nn.Module = self._model.get_submodule(parameter.rpartition(".")[0])
        if module is self._model.get_output_embeddings():  # type: ignore[no-untyped-call]
            return "the head"
        if module is self._model.get_input_embeddings():
            return "the embedding"
        if is_router(parameter.rpartition(".")[0]):
            return "chooses experts"
        if parameter in self._experts:
            return FUSED_EXPERTS
        return "no linear of a block"
