"""`Job`: everything that is settled before a run, as one immutable value that loops, writer and report read."""

from __future__ import annotations

import dataclasses
import os
import platform
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from calib.checkpoint.reader import ModelSource
from calib.data.tokens import Calibration
from calib.distributed import Workers
from calib.model.structure import all_linears
from calib.runner.activation_store import OffloadTarget
from calib.runner.runner import CalibrationRunner
from ptq.checkpoint.journal import flatten
from ptq.pipeline.costs import Costs
from ptq.pipeline.events import Event, Listener
from ptq.pipeline.preparation.container import CONTAINER_CONDITION, key_values_of
from ptq.pipeline.preparation.labels import TensorLabels
from ptq.pipeline.preparation.method_setup import MethodSetup
from ptq.pipeline.preparation.preflight import cpu_name, stream_bytes
from ptq.pipeline.preparation.schemes.scheme_assignment import Plan
from ptq.pipeline.preparation.sizes import Sizes, plan_sizes
from ptq.proof import FormatChoice
from ptq.recipe import Recipe
from ptq.report import STAGING, PartRecord
from ptq.scheme import KeyValueScheme

__all__ = ["Job"]

_VERSIONS = ("ptq-toolkit", "torch", "transformers", "compressed-tensors", "safetensors")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Job:
    """One quantization, prepared by `ptq.pipeline.prepare`.

    Args:
        source: The model.
        assignment: What is done to its linears.
        recipe: What the user asked for.
        method: The method with its options.
        calibration: Tokens, or ``None`` for a method that needs none.
        tokenizer: Goes along with a model in memory.
        out: The output folder.
        container: In which the result is stored.
        device: Where blocks are run.
        dtype: Of the passes.
        offload: Where activations are kept between blocks.
        restart: Do not go on from an interrupted run.
        listener: Called at every step.
        workers: The processes of this run.
    """

    source: ModelSource
    assignment: Plan
    recipe: Recipe
    method: MethodSetup
    calibration: Calibration | None
    tokenizer: PreTrainedTokenizerBase | None
    out: Path
    container: FormatChoice
    device: torch.device
    dtype: torch.dtype
    offload: OffloadTarget
    restart: bool
    listener: Listener
    workers: Workers

    @cached_property
    def fingerprint(self) -> str:
        """Fingerprint of the model, read once: a condition of the journal and a line of the report."""
        return self.source.fingerprint()

    @cached_property
    def labels(self) -> TensorLabels:
        """Names and reasons for what stays in full precision."""
        return TensorLabels(self.source.skeleton, self.assignment)

    @cached_property
    def linears(self) -> dict[str, nn.Module]:
        """All linears of the model, by full name."""
        return all_linears(self.source.skeleton)

    @property
    def blocks(self) -> tuple[str, ...]:
        """Names of the blocks."""
        return self.assignment.blocks

    @property
    def tokens(self) -> Tensor | None:
        """Calibration tokens int64 ``[sequences, seqlen]``."""
        return None if self.calibration is None else self.calibration.tokens

    @property
    def key_values(self) -> KeyValueScheme | None:
        """How keys and values are rounded at run time."""
        return key_values_of(self.recipe)

    @property
    def staging(self) -> Path:
        """The folder of what is not finished."""
        return self.out / STAGING

    @property
    def activations(self) -> Path:
        """The folder of activations that are kept on disk."""
        return self.staging / "activations"

    def emit(self, text: str) -> None:
        """Give the listener a sentence."""
        self.listener(Event("message", text))

    def warn(self, part: PartRecord, *texts: str) -> None:
        """Give the listener sentences that are also for the record."""
        for text in texts:
            part.warnings.append(text)
            self.emit(text)

    def make_runner(
        self,
        costs: Costs,
        *,
        tokens: Tensor | None = None,
        batch: int | None = None,
        held_out: int = 0,
        folder: Path | None = None,
    ) -> CalibrationRunner:
        """A calibration runner over the model.

        Args:
            costs: Counts what it takes.
            tokens: A part of the calibration tokens, all of them by default.
            batch: Sequences in a batch.
            held_out: The last sequences, which nothing is fitted to.
            folder: For activations on disk, by default in the output folder.
        """
        return CalibrationRunner(
            self.source,
            self.tokens if tokens is None else tokens,
            device=self.device,
            dtype=self.dtype,
            two_streams=self.method.two_streams,
            timing=costs.timing,
            flops=costs.flops,
            offload=self.offload,
            folder=folder or self.activations,
            workers=self.workers,
            batch=batch,
            held_out=held_out,
        )

    def outside_blocks(self) -> frozenset[str]:
        """Full names of the tensors that lie in no block."""
        blocks = tuple(f"{block}." for block in self.blocks)
        return frozenset(name for name in self.source.tensor_names() if not name.startswith(blocks))

    def sizes(self) -> Sizes:
        """Bytes of the output."""
        return plan_sizes(self.source, self.assignment, self.labels)

    def passing_bytes(self, sizes: Sizes) -> int:
        """Bytes in the output folder, beside the output, while the run is under way: activations, learned states."""
        return self._activation_bytes() + self._learned_bytes(sizes)

    def _activation_bytes(self) -> int:
        if self.offload != "disk" or self.tokens is None:
            return 0
        return stream_bytes(self.source.skeleton, self.tokens.numel(), self.dtype, self.method.stores)

    def _learned_bytes(self, sizes: Sizes) -> int:
        """Bytes of what a learned method keeps, about."""
        config = self.method.learned
        if config is None:
            return 0
        blocks = len(self.blocks)
        window = max(len(one) for one in config.windows(blocks))
        fraction = 1.0 if len(config.sweeps) > 1 else min(1.0, 2 * window / blocks)  # the old state and the new one
        learned = 4 * sizes.quantized * fraction if config.rounding != "nearest" else 0
        return int(learned) + (sizes.packed if config.init != "none" else 0)

    def environment(self) -> dict[str, Any]:
        """Versions, devices and options under which the run works."""
        device = torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else cpu_name()
        config = self.method.config
        return {
            "versions": {name: version(name) for name in _VERSIONS},
            "python": platform.python_version(),
            "device": self.device.type,
            "device_name": device,
            "cores": os.cpu_count(),
            "threads": torch.get_num_threads(),
            "processes": self.workers.size,
            "pass_dtype": str(self.dtype).removeprefix("torch."),
            "method_config": {name: getattr(config, name) for name in type(config).__dataclass_fields__},
        }

    def conditions(self) -> dict[str, Any]:
        """Everything that decides the bytes: a run is only resumed under the same."""
        environment = self.environment()
        names = ("versions", "device", "device_name", "threads", "processes", "pass_dtype")
        return flatten(
            {
                "recipe": self.recipe.to_dict(),
                "model": {"source": self.source.name, "fingerprint": self.fingerprint},
                "calibration": None if self.calibration is None else self.calibration.fingerprint,
                CONTAINER_CONDITION: {"name": self.container.name, "reason": self.container.reason},
                "offload": self.offload,
                **{name: environment[name] for name in names},
            }
        )
