"""How a folder is loaded, by the runtimes that read its container."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

from ptq.model_card.text import code_block
from ptq.report import Report

__all__ = ["Reader", "readers"]

_GPTQ_READERS_BITS = (4, 8)  # of vLLM and SGLang


@dataclasses.dataclass(frozen=True)
class Reader:
    """One runtime.

    Args:
        name: for people.
        code: Markdown that loads the folder in it.
        note: what is to be known.
    """

    name: str
    code: str
    note: str


_FOLDER = "OUT"
_PTQ = Reader("ptq", code_block("python", f'import ptq\n\nmodel = ptq.load("{_FOLDER}")'), "`pip install ptq-toolkit`.")
_EVAL = Reader("ptq", code_block("console", f"$ ptq eval {_FOLDER}"), "Dequantized, without more packages.")
_CONVERT = Reader(
    "llama.cpp",
    code_block("console", f"$ python convert_hf_to_gguf.py {_FOLDER} --outfile OUT.gguf\n$ llama-cli -m OUT.gguf"),
    "Its own converter reads the folder.",
)


def readers(report: Report) -> list[Reader]:
    """The runtimes for a result, those without more packages first."""
    return list(_READERS[report.container](report))


def _transformers(note: str, first: str = "") -> Reader:
    lines = [
        *([first, ""] if first else []),
        "from transformers import AutoModelForCausalLM, AutoTokenizer",
        "",
        f'model = AutoModelForCausalLM.from_pretrained("{_FOLDER}")',
        f'tokenizer = AutoTokenizer.from_pretrained("{_FOLDER}")',
    ]
    return Reader("transformers", code_block("python", "\n".join(lines)), note)


def _vllm(note: str) -> Reader:
    return Reader("vLLM", code_block("console", f"$ vllm serve {_FOLDER}"), note)


def _native(report: Report) -> Iterator[Reader]:
    yield _PTQ
    yield _transformers(
        "`pip install ptq-toolkit`; without the first line transformers refuses the folder.", "import ptq"
    )


def _compressed_tensors(report: Report) -> Iterator[Reader]:
    yield _transformers("`pip install compressed-tensors`.")
    stated = report.container_reason.partition("vLLM reads it (")[2].rpartition(")")[0]
    yield _vllm(f"Not every version reads it: {stated}." if stated else "Not run by ptq.")
    yield _PTQ


def _vllm_tensors(report: Report) -> Iterator[Reader]:
    if not any(row.scheme["input_rotation"] for row in report.layers):
        yield _vllm("Not run by ptq.")
        yield _PTQ
        yield _transformers(
            "`pip install compressed-tensors`, pass `quantization_config=CompressedTensorsConfig(dequantize=True)`: "
            "stock transformers 5.23 refuses packed zero points without it."
        )
        return
    yield _vllm("It rotates inputs as `transform_config` says, on one GPU. Not run by ptq.")
    yield _PTQ
    yield _transformers(
        "`pip install ptq-toolkit`; without the first line transformers refuses the folder, because it does not rotate "
        "inputs.",
        "import ptq",
    )


def _gptq(report: Report) -> Iterator[Reader]:
    load = f'from gptqmodel import GPTQModel\n\nmodel = GPTQModel.load("{_FOLDER}")'
    yield Reader("GPTQModel", code_block("python", load), "`pip install gptqmodel`.")
    yield _transformers("`pip install optimum gptqmodel`.")
    schemes = [row.scheme for row in report.layers]
    if all(scheme["bits"] in _GPTQ_READERS_BITS and scheme["symmetric"] for scheme in schemes):
        yield _vllm("Not run by ptq.")
    yield _EVAL


def _awq(report: Report) -> Iterator[Reader]:
    yield _vllm("Not run by ptq.")
    yield _transformers("`pip install gptqmodel`.")
    yield _EVAL


def _dense(report: Report) -> Iterator[Reader]:
    yield _transformers("The weights are dequantized: nothing else is needed.")
    yield _vllm("Not run by ptq.")
    yield _CONVERT


_READERS = {
    "native": _native,
    "compressed-tensors": _compressed_tensors,
    "compressed-tensors-vllm": _vllm_tensors,
    "gptq": _gptq,
    "gptq_v2": _gptq,
    "awq": _awq,
    **dict.fromkeys(("bf16", "f16", "f32"), _dense),
}
