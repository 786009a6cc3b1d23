"""One run: the blocks are quantized and written as they are finished, then everything that lies beside them.

Of several processes the first one writes and reports; the others only compute. What an interrupted run finished is not
done again: its blocks are read back and the streams of activations go through them, which gives the bits that the first
run had.
"""

from __future__ import annotations

import json
import shutil

import torch

from calib.precision import strict_float32
from ptq.checkpoint.writer import CheckpointWriter
from ptq.pipeline.costs import Costs
from ptq.pipeline.inputs.quantized_inputs import QuantizedInputs
from ptq.pipeline.job import Job
from ptq.pipeline.loops.layerwise import run_layerwise
from ptq.pipeline.loops.windowed import run_windowed
from ptq.pipeline.output.block_writer import BlockWriter
from ptq.pipeline.output.final_report import finish
from ptq.pipeline.preparation.preflight import check_disk
from ptq.report import PartRecord, Report, merge

__all__ = ["execute"]


def execute(job: Job) -> Report:
    """Quantize and write; returns the report that was written, on every process.

    Args:
        job: What to do.

    Raises:
        PtqError: See the tree in `ptq.errors`; what an earlier run wrote to the folder is still there.
    """
    costs = Costs()
    with torch.no_grad(), strict_float32():
        if not job.workers.is_main_process:
            _write_parts(job, costs, None)
            return Report.from_dict(job.workers.broadcast_object({}))
        with CheckpointWriter(job.out, job.conditions(), job.restart) as checkpoint:
            report = finish(job, checkpoint, _write_parts(job, costs, checkpoint))
        job.workers.broadcast_object(json.loads(report.to_json()))
        return report


def _write_parts(job: Job, costs: Costs, checkpoint: CheckpointWriter | None) -> PartRecord:
    """Quantize all blocks and write all parts; returns the record of the whole run."""
    if checkpoint is not None:
        _check_room(job, checkpoint)
    blocks = BlockWriter(job, costs, checkpoint)
    earlier = merge(blocks.records.values())
    done, total = len(blocks.finished.keys() & set(job.blocks)), len(job.blocks)
    if done:
        again = job.calibration is not None and done < total
        how = "activations pass through them again" if again else "they are kept"
        job.emit(f"going on after {done} of {total} blocks that are finished: {how}")
    job.emit(f"format {job.container.name}: {job.container.reason}")
    inputs = QuantizedInputs(
        job.source.skeleton,
        job.assignment,
        job.key_values,
        rounds=not job.method.full_inputs,
        fits_inputs=job.method.fits_inputs,
    )
    if job.method.learned is not None:
        run_windowed(job, job.method.learned, costs, inputs, blocks)
    else:
        run_layerwise(job, costs, inputs, blocks)
    costs.sum_flops(job.workers)
    blocks.write_unquantized()
    whole = merge(blocks.records.values())
    spent = merge([earlier, costs.so_far()])  # the parts' own sums lack what lies between them
    whole.timing, whole.flops, whole.seconds = spent.timing, spent.flops, spent.seconds
    return whole


def _check_room(job: Job, checkpoint: CheckpointWriter) -> None:
    """Remove what a killed run has left of its activations, and refuse a disk that is too small."""
    shutil.rmtree(job.activations, ignore_errors=True)
    sizes = job.sizes()
    check_disk(job.out, sizes.file_bytes - checkpoint.weight_bytes + job.passing_bytes(sizes))
    for note in checkpoint.notes:
        job.emit(note)
