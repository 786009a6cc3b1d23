"""What every test can use: a tiny random model with a tokenizer, a report, and no network."""

from __future__ import annotations

import os

# Before torch and the hub client are imported: one thread a worker, no network, no fork warnings.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
# Exact and without a compiler, unless a test is about another kernel; those compile once per machine.
os.environ["PTQ_KERNEL"] = "reference"
os.environ.setdefault("PTQ_KERNEL_CACHE", os.path.expanduser("~/.cache/ptq/kernels"))

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from ptq.proof import settle
from ptq.proof.prover import StockProver
from ptq.report import KeptTensor, LayerRecord, Report
from ptq.scheme import Scheme

torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))

TRAINING_TEXT = (
    "The quick brown fox jumps over the lazy dog. ",
    "Once upon a time there was a model that had more bits than it needed. ",
    "def function(argument): return the value of the expression if it is true else None\n",
)


@pytest.fixture(scope="session", autouse=True)
def one_prover(tmp_path_factory: pytest.TempPathFactory) -> Iterator[StockProver]:
    """One process per worker loads all skeletons, and what it found is kept for all workers and for commands that tests
    start: hundreds of tests quantize, and a start of transformers takes five seconds."""
    base = tmp_path_factory.getbasetemp()
    cache = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "ptq-cache"
    with StockProver() as prover, pytest.MonkeyPatch.context() as patch:
        patch.setenv("PTQ_CACHE", str(cache))
        patch.setattr(settle, "stock_prover", lambda: contextlib.nullcontext(prover))
        yield prover


@pytest.fixture(scope="session")
def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE of some 400 tokens: every text can be encoded, and nothing is downloaded."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(TRAINING_TEXT, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: PreTrainedTokenizerFast) -> Path:
    """A Hugging Face folder: a random Llama of two blocks, hidden size 64, and its tokenizer. Read-only by habit."""
    folder = tmp_path_factory.mktemp("tiny") / "MODEL"
    config = LlamaConfig(
        vocab_size=len(tiny_tokenizer),
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        bos_token_id=tiny_tokenizer.bos_token_id,
        eos_token_id=tiny_tokenizer.eos_token_id,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = LlamaForCausalLM(config)
    model.to(torch.bfloat16).save_pretrained(folder)
    tiny_tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def small_report() -> Report:
    """A report of two layers: one with every figure, one without calibration figures."""
    scheme = Scheme(bits=3)
    layers = (
        _record(
            "model.layers.0.self_attn.q_proj", scheme, loss_rtn=0.25, loss=0.125, figures={"alpha": 0.5, "r2": 0.5}
        ),
        _record("model.layers.0.mlp.down_proj", scheme, notes=("fp64 Cholesky",)),
        _record(
            "model.layers.1.self_attn.q_proj", scheme, loss_rtn=0.5, loss=0.375, figures={"alpha": 0.25, "r2": 0.25}
        ),
    )
    return Report(
        model={
            "source": "MODEL",
            "architecture": "LlamaForCausalLM",
            "model_type": "llama",
            "parameters": 20_000,
            "dtype": "bfloat16",
        },
        recipe={"method": "coreq", "scheme": scheme.record()},
        calibration={"source": "pydoc"},
        container="compressed-tensors",
        container_reason="symmetric integers",
        layers=layers,
        kept=(KeptTensor("model.embed_tokens", "embedding", 10_000), KeptTensor("lm_head", "tied", 0)),
        totals={
            "quantized_parameters": 12_288,
            "kept_parameters": 5_000,
            "payload_bytes": 4_992,
            "kept_bytes": 10_000,
            "file_bytes": 16_000,
            "source_bytes": 40_000,
            "bits_per_weight": 3.25,
            "seconds": 62.5,
        },
        timing={"solve": 2.5, "passes": 60.0},
        environment={"device": "cpu"},
        warnings=("one block is small",),
    )


def _record(name: str, scheme: Scheme, **fields: Any) -> LayerRecord:
    known: dict[str, Any] = {"method": "coreq", "scheme": scheme.record(), "shape": (64, 64), "seconds": 0.5}
    return LayerRecord(name=name, bits_per_weight=3.25, payload_bytes=1664, **known, **fields)
