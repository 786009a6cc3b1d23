"""From the arguments of a call to a `Job`: everything is checked in the order of what it costs, and decided once."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Collection
from pathlib import Path

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from calib.checkpoint.reader import ModelSource, open_model
from calib.data.tokens import Calibration
from calib.distributed import Workers, init_distributed
from calib.model.model_class import is_multimodal
from calib.model.structure import all_linears, find_blocks
from calib.runner.activation_store import OFFLOADS, Offload
from calib.runner.forward import pass_dtype
from ptq.checkpoint.writer import check_output_folder
from ptq.errors import ModelError, unknown_name
from ptq.pipeline.dry_run.rough_time import long_run_notices
from ptq.pipeline.dry_run.windows import Surroundings, check_learning
from ptq.pipeline.events import Event, Listener, ignore_events
from ptq.pipeline.job import Job
from ptq.pipeline.preparation.calibration import draw_calibration, load_tokenizer, longest_context
from ptq.pipeline.preparation.container import choose_container, rotates_head_online
from ptq.pipeline.preparation.effects import without_effect
from ptq.pipeline.preparation.finished import Finished, find_finished
from ptq.pipeline.preparation.method_setup import MethodSetup, set_up_method
from ptq.pipeline.preparation.preflight import check_path_names, check_vocabulary, choose_offload_target, resolve_device
from ptq.pipeline.preparation.rotations import free_rotations
from ptq.pipeline.preparation.schemes.rotated_assignment import (
    drop_signs,
    resize_rotations,
    rotate_inputs,
    rotate_last_inputs,
    seed_rotations,
)
from ptq.pipeline.preparation.schemes.scheme_assignment import Plan, make_plan
from ptq.proof import FormatChoice
from ptq.recipe import AUTO_ROTATION, Recipe
from ptq.report import Report
from ptq.scheme import Rotation
from ptq.transforms.rotation.residual import rotate_residual

__all__ = ["Request", "prepare"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Request:
    """What a caller asks for; see `ptq.quantize`.

    Args:
        model: A path, the name of a hub model, or a model in memory.
        recipe: What to do.
        given: Names of the arguments that the caller gave.
        out: The output folder.
        tokenizer: Of a model in memory.
        calibration: Tokens in the place of the recipe's.
        device: ``auto``, ``cpu``, ``cuda`` or ``cuda:i``.
        listener: Called at every step.
        trust_remote_code: Run modelling code that ships with the model.
        offload: Where activations are kept between blocks.
        restart: Start over whatever is in the output folder.
        keep_finished: Return the report of a finished result that is what this run would make.
    """

    model: str | os.PathLike[str] | nn.Module
    recipe: Recipe
    given: Collection[str]
    out: Path
    tokenizer: PreTrainedTokenizerBase | None
    calibration: Calibration | None
    device: str
    listener: Listener
    trust_remote_code: bool
    offload: Offload
    restart: bool = False
    keep_finished: bool = False


def prepare(request: Request) -> Job | Report:
    """The prepared run, or the report of a finished result that is what the run would make.

    Args:
        request: What the caller asks for.

    Raises:
        PtqError: What is refused before the first block is computed.
    """
    return _Preparation(request).finish()


class _Preparation:
    """The steps of one preparation: what each one settles is read by the following ones."""

    def __init__(self, request: Request) -> None:
        recipe = request.recipe
        if request.offload not in OFFLOADS:
            raise unknown_name("offload", request.offload, OFFLOADS)
        self.request, self.recipe = request, recipe
        self.method: MethodSetup = set_up_method(recipe)
        check_path_names(*([request.out] if isinstance(request.model, nn.Module) else [request.model, request.out]))
        check_output_folder(request.out)
        finished = find_finished(request.out) if request.keep_finished else None
        if finished is not None:
            finished.refuse_other_recipe(recipe)
        self.workers: Workers
        self.device: torch.device
        self.workers, self.device = init_distributed(resolve_device(request.device))
        self.source = _open(request)
        fitted = recipe.calibration.fitted(longest_context(self.source.skeleton))
        recipe = self.recipe = dataclasses.replace(recipe, calibration=fitted)
        if finished is not None:
            finished.refuse_other_recipe(recipe)
        if self.method.learned is not None:
            self.method.learned.windows(len(find_blocks(self.source.skeleton)))  # refused before anything is read
        self.assignment: Plan = make_plan(self.source.skeleton, recipe, self.source.dtype)  # likewise
        self.listener = request.listener if self.workers.is_main_process else ignore_events
        self.finished: Finished | None = finished if finished is not None and finished.is_whole(self.listener) else None
        self.dtype = pass_dtype(recipe.compute_dtype, self.source.dtype, self.device)

    def finish(self) -> Job | Report:
        """All steps that read the model or the calibration text."""
        request, finished = self.request, self.finished
        self._emit_notices()
        self._rotate()
        container = self._container()
        given = request.calibration
        if finished is not None and (given is not None or not finished.needs_tokens(self.recipe)):
            used = given if self.method.needs_data else None
            return finished.kept(self.source.fingerprint(), used, self.listener)
        required = self.method.needs_data and given is None
        tokenizer = request.tokenizer or load_tokenizer(self.source, request.trust_remote_code, required=required)
        calibration = self._calibration(tokenizer)
        if finished is not None:
            return finished.kept(self.source.fingerprint(), calibration, self.listener)
        if calibration is not None:
            self._check_calibration(calibration)
        return self._job(container, tokenizer, calibration)

    def _emit_notices(self) -> None:
        for name, reason in without_effect(self.request.given, self.recipe).items():
            self._emit(f"{name} has no effect: {reason}")
        if self.source.quantization is not None:
            self._emit(self.source.quantization.describe())
        if self.recipe.text_only and not self.source.companions.text_only:
            self._emit(f"--text-only has no effect: {self.source.name} is a text model")

    def _rotate(self) -> None:
        """Rotate the residual stream and the inputs of linears, where the recipe says so."""
        seed = self.recipe.calibration.seed
        if self.recipe.rotate == AUTO_ROTATION:
            return self._rotate_freely()
        if "residual" in self.recipe.rotate:
            self._rotate_residual(seed)
        block = self.recipe.rotate_block
        if "input" in self.recipe.rotate:
            self.assignment = rotate_inputs(self.assignment, seed, block)
        elif "down" in self.recipe.rotate:
            rotation = Rotation(seed, block)
            self.assignment = rotate_last_inputs(self.assignment, self.source, rotation, self.device, self.dtype)
        elif block is not None:
            self.assignment = resize_rotations(self.assignment, block)
        if self.recipe.container == "compressed-tensors" and {"input", "down"} & set(self.recipe.rotate):
            self.assignment = drop_signs(self.assignment, all_linears(self.source.skeleton))
        self.assignment = seed_rotations(self.assignment, self.source, seed, self.device, self.dtype)

    def _rotate_freely(self) -> None:
        """Settle ``rotate: auto``, and rotate."""
        names, left_out = free_rotations(self.source, self.assignment, self.recipe, self.method)
        while True:
            self.recipe = dataclasses.replace(self.recipe, rotate=names)
            try:
                self._rotate()
                break
            except ModelError as error:
                if "residual" not in names:
                    raise
                left_out = f"the residual stream cannot be rotated: {error}"
                names = tuple(name for name in names if name != "residual")
                self.source = _open(dataclasses.replace(self.request, recipe=self.recipe))
        self._emit(f"rotate auto: {', '.join(names) or 'none'}{f' ({left_out})' if left_out else ''}")
        if self.finished is not None:
            self.finished.refuse_other_recipe(self.recipe)

    def _rotate_residual(self, seed: int) -> None:
        self._emit("rotating the residual stream: norm gains go into the linears that read them")
        online = rotates_head_online(self.source, self.assignment, self.recipe)
        rotated = rotate_residual(self.source, seed, keep_tie=online)
        for note in rotated.notes:
            self._emit(note)
        self.source = rotated

    def _container(self) -> FormatChoice:
        """The container, decided by the first process for all."""
        chosen: list[FormatChoice] = []
        if self.workers.is_main_process:
            choice = choose_container(
                self.source,
                self.assignment,
                self.recipe,
                out=None if self.request.restart else self.request.out,
                device=self.device,
                dtype=self.dtype,
                trust_remote_code=self.request.trust_remote_code,
            )
            chosen.append(choice)
        (shared,) = self.workers.broadcast_object(chosen)
        return shared

    def _calibration(self, tokenizer: PreTrainedTokenizerBase | None) -> Calibration | None:
        """The tokens that the first process has drawn; ``None`` for a method that reads none."""
        given, spec = self.request.calibration, self.recipe.calibration
        if not self.method.needs_data:
            return self.workers.broadcast_object(None)
        if self.device.type == "cpu":
            shape = (spec.samples, spec.tokens_per_sequence) if given is None else tuple(given.tokens.shape)
            for notice in long_run_notices(self.source.skeleton, self.assignment, self.method, *shape):
                self._emit(notice)
        if given is None and self.workers.is_main_process:
            given = draw_calibration(self.source, spec, tokenizer, self.listener, self.request.trust_remote_code)
        return self.workers.broadcast_object(given)

    def _check_calibration(self, calibration: Calibration) -> None:
        check_vocabulary(self.source.skeleton, calibration.tokens)
        if self.method.learned is not None:
            place = Surroundings(self.device, self.dtype, self.workers.size)
            check_learning(self.source, self.method.learned, calibration.tokens, place)

    def _job(
        self, container: FormatChoice, tokenizer: PreTrainedTokenizerBase | None, calibration: Calibration | None
    ) -> Job:
        offload = choose_offload_target(
            self.request.offload,
            self.source.skeleton,
            None if calibration is None else calibration.tokens,
            self.dtype,
            self.device,
            self.workers.size,
            self.method.stores,
        )
        return Job(
            source=self.source,
            assignment=self.assignment,
            recipe=self.recipe,
            method=self.method,
            calibration=calibration,
            tokenizer=tokenizer,
            out=self.request.out,
            container=container,
            device=self.device,
            dtype=self.dtype,
            offload=offload,
            restart=self.request.restart,
            listener=self.listener,
            workers=self.workers,
        )

    def _emit(self, text: str) -> None:
        self.listener(Event("message", text))


def _open(request: Request) -> ModelSource:
    """The model.

    Raises:
        ModelError: It cannot be opened, or its residual stream is to be rotated, into which images enter.
    """
    model, recipe = request.model, request.recipe
    source = open_model(
        model if isinstance(model, nn.Module) else os.fspath(model),
        trust_remote_code=request.trust_remote_code,
        text_only=recipe.text_only,
    )
    if "residual" in recipe.rotate and is_multimodal(source.skeleton):
        raise ModelError(
            f"{type(source.skeleton).__name__} reads more than text, and what its other parts put into the residual "
            f"stream would not be rotated: leave out --rotate residual, or write the text part alone (--text-only)."
        )
    return source
