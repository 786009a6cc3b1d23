"""A window of a tiny model, opened for learning."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from calib.checkpoint.reader import open_model
from calib.precision import strict_float32
from calib.runner.runner import BlockWindow, CalibrationRunner
from calib.runner.window_schedule import Window
from ptq.learning import LearnedConfig
from ptq.learning.block import BlockLearner
from ptq.learning.training import WindowRecord, train_window
from ptq.methods import find_method, make_config
from ptq.pipeline.inputs.input_transforms import transform_block_inputs
from ptq.scheme import Scheme
from tests.support.tiny_models import tiny_model

TOKENS = torch.randint(2, 400, (8, 12), generator=torch.Generator().manual_seed(3))
SCHEME = Scheme(3, False, 16, "float16")


def options(method: str, **changes: Any) -> LearnedConfig:
    config: LearnedConfig = make_config(find_method(method), changes)
    return config


@contextlib.contextmanager
def tiny_window(
    config: LearnedConfig,
    blocks: int = 1,
    family: str = "llama",
    scheme: Scheme | None = SCHEME,
    batch: int = 8,
    tokens: Tensor = TOKENS,
) -> Iterator[tuple[BlockWindow, list[BlockLearner]]]:
    """The first blocks of a tiny model as one window, with learners; all linears have the scheme."""
    source = open_model(tiny_model(family, num_hidden_layers=max(2, blocks)))
    with torch.no_grad(), strict_float32():
        runner = CalibrationRunner(source, tokens, device=torch.device("cpu"), dtype=torch.float32, batch=batch)
        windows = runner.windows([Window(0, blocks), Window(blocks - 1, max(2, blocks))])
        window = next(windows)
        learners = []
        for block in window.blocks:
            schemes = {} if scheme is None else dict.fromkeys(block.linears, scheme)
            transform_block_inputs(block, schemes, None)
            learners.append(BlockLearner(block, schemes, config))
        yield window, learners
        windows.close()  # type: ignore[attr-defined]


def train(
    window: BlockWindow, learners: Sequence[BlockLearner], config: LearnedConfig, steps: int = 6, **changes: Any
) -> list[WindowRecord]:
    return train_window(window, learners, config, **{"sweep": 0, "shares": (1.0,), "steps": steps, "seed": 0} | changes)


def states(learners: Sequence[BlockLearner]) -> dict[str, Tensor]:
    return {f"{n}:{name}": value for n, one in enumerate(learners) for name, value in one.state().items()}
