"""Packed models under ``torch.compile``: one graph for a step with a static cache, and the shapes of operators."""

from __future__ import annotations

import contextlib

import pytest
import torch
from transformers import StaticCache

from calib.model.cache import cache_argument
from ptq.runtime import cpu_products
from ptq.scheme import Scheme
from tests.ptq.runtime.test_cpu_products import packed
from tests.support.cuda_on_cpu import cuda_on_cpu
from tests.support.packed_models import packed_model

INT4, ITQ3S = Scheme(4, group_size=32, scale_dtype="float16"), Scheme.of("itq3s")


def no_kernels_here() -> None:
    if cpu_products._missing() is not None:
        pytest.skip(f"no CPU kernels here: {cpu_products._missing()}")


FORMATS = [INT4, ITQ3S, *(Scheme.of(name) for name in ("nvfp4", "higgs"))]
CASES = [*(("reference", scheme) for scheme in FORMATS), ("cpu", INT4), ("cpu", ITQ3S), ("cuda", INT4), ("cuda", ITQ3S)]


@pytest.mark.filterwarnings("ignore:Dynamo detected a call to a `functools.lru_cache`")  # tables: traced through
@pytest.mark.parametrize(("kernel", "scheme"), CASES, ids=str)
def test_a_step_is_one_graph_and_no_later_step_compiles(
    kernel: str, scheme: Scheme, monkeypatch: pytest.MonkeyPatch
) -> None:
    if kernel == "cpu":
        no_kernels_here()
    monkeypatch.setenv("PTQ_KERNEL", kernel)
    with cuda_on_cpu() if kernel == "cuda" else contextlib.nullcontext():
        graph = compare(scheme)
    products = [node for node in graph.graph.nodes if "ptq_cuda" in str(node.target)]
    assert len(products) == (4 if kernel == "cuda" else 0)  # q, k, v and gate, up are merged


def compare(scheme: Scheme) -> torch.fx.GraphModule:
    model = packed_model(scheme, num_hidden_layers=1)
    graphs = []

    def count(graph: torch.fx.GraphModule, inputs: object) -> torch.fx.GraphModule:
        graphs.append(graph)
        return graph

    torch._dynamo.reset()
    compiled = torch.compile(model.__call__, fullgraph=True, backend=count)
    caches = [StaticCache(config=model.config, max_cache_len=16) for _ in range(2)]
    with torch.no_grad():
        for cache in caches:
            model(input_ids=torch.tensor([[5, 9, 2]]), use_cache=True, **cache_argument(model, cache))
        for token in (3, 8, 5):
            fast, slow = (
                call(input_ids=torch.tensor([[token]]), use_cache=True, **cache_argument(model, cache)).logits
                for call, cache in zip((compiled, model), caches, strict=True)
            )
            torch.testing.assert_close(fast, slow, rtol=1e-5, atol=1e-5)
    assert len(graphs) == 1
    torch._dynamo.reset()
    return graphs[0]


@pytest.mark.parametrize("scheme", [INT4, ITQ3S], ids=Scheme.describe)
def test_shapes_without_values_are_those_of_the_operators(scheme: Scheme) -> None:
    no_kernels_here()
    weight = packed(scheme, 37, 384)
    assert weight is not None
    call = cpu_products.prepare(weight)
    for shape in ((384,), (3, 384), (2, 1, 384)):
        rotation = call.rotation or (None, ())
        arguments = (torch.randn(shape).bfloat16(), *call.arguments, torch.randn(37), *rotation)
        torch.library.opcheck(call.multiply.default, arguments, test_utils="test_faketensor")
    torch.library.opcheck(call.values.default, (*call.arguments, 3, 11), test_utils="test_faketensor")
    if call.rotation is not None:
        torch.library.opcheck(
            torch.ops.ptq_cpu.rotated.default, (torch.randn(2, 384), *call.rotation), test_utils="test_faketensor"
        )
