"""Scores against what autograd says of the whole model, and against the KL that they predict."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from transformers.models.llama import modeling_llama

from calib.checkpoint.reader import open_model
from calib.gradients import GradientPasses
from calib.runner.activation_store import ActivationStore
from ptq.allocation.measure import token_kl
from ptq.allocation.problem.candidates import parse_candidates, rounding_errors
from ptq.allocation.progress import Steps
from ptq.allocation.scores import SCORES, Context, ScoreValues
from ptq.allocation.scores.fisher import squared_gradient
from ptq.allocation.scores.lim import turned
from ptq.allocation.scores.zd import share_above_one
from ptq.errors import ModelError
from ptq.pipeline.events import Event
from ptq.scheme import Scheme
from tests.support.tiny_models import tiny_model

CPU = torch.device("cpu")
TOKENS = torch.randint(2, 400, (3, 12), generator=torch.Generator().manual_seed(1))
CANDIDATES = parse_candidates("3,4,6", Scheme(group_size=16, scale_dtype="float16"))


def store(_: str) -> ActivationStore:
    return ActivationStore(CPU)


def context(model: Any, tokens: Tensor = TOKENS, **changes: Any) -> Context:
    source = open_model(model)
    fields: dict[str, Any] = {
        "source": source,
        "linears": tuple(name for name, one in model.named_modules() if name.endswith("_proj")),
        "candidates": CANDIDATES,
        "tokens": tokens,
        "device": CPU,
        "dtype": torch.float32,
        "seed": 0,
        "errors": lambda weight: rounding_errors(weight, CANDIDATES),
        "new_store": store,
    }
    return Context(**{**fields, **changes})


def labels_of(model: Any, tokens: Tensor, seed: int) -> Tensor:
    """The labels that `GradientPasses` draws, by the same uniform numbers through the inverse distribution."""
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for row in tokens:
        with torch.no_grad():
            probabilities = torch.softmax(model(input_ids=row[None]).logits[0], -1)
        rows.append(torch.searchsorted(probabilities.cumsum(-1), torch.rand(len(row), 1, generator=generator))[:, 0])
    return torch.stack(rows)


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2"])
def test_block_by_block_gradients_are_those_of_the_whole_model(family: str) -> None:
    model = tiny_model(family)
    passes = GradientPasses(open_model(model), TOKENS, device=CPU, dtype=torch.float32, new_store=store)
    passes.forward()
    passes.sample_labels(torch.Generator().manual_seed(5))
    squares: dict[str, Tensor] = {}
    for block in passes.backward():
        for calls in block.batches():
            squares |= {f"{block.name}.{name}": squared_gradient(pairs) for name, pairs in calls.items()}
    labels = labels_of(model, TOKENS, 5)
    expected: dict[str, Tensor] = {}
    for row, label in zip(TOKENS, labels, strict=True):
        model.zero_grad()
        loss = torch.nn.functional.cross_entropy(model(input_ids=row[None]).logits[0], label, reduction="sum")
        loss.backward()
        for name in squares:
            weight = model.get_submodule(name).weight
            gradient = weight.grad.T if "Conv1D" in type(model.get_submodule(name)).__name__ else weight.grad
            expected[name] = expected.get(name, 0) + gradient**2
    assert len(squares) >= 8
    for name, value in squares.items():
        torch.testing.assert_close(value, expected[name], rtol=2e-3, atol=1e-6 * float(expected[name].max()))


def test_the_mean_squared_gradient_is_the_trace_of_the_fisher_matrix() -> None:
    """Exactly, by a backward pass for every label at every position of a model with 16 tokens."""
    model = tiny_model("llama", vocab_size=16, num_hidden_layers=1, hidden_size=32, tie_word_embeddings=False)
    tokens = torch.randint(2, 16, (1, 5), generator=torch.Generator().manual_seed(2))
    name = "model.layers.0.mlp.up_proj"
    weight = model.get_submodule(name).weight
    logprobs = torch.log_softmax(model(input_ids=tokens).logits[0], -1)
    trace = 0.0
    for position, row in enumerate(logprobs):
        for label in range(16):
            (gradient,) = torch.autograd.grad(logprobs[position, label], weight, retain_graph=True)
            trace += float(row[label].detach().exp() * gradient.square().sum())
    draws = []
    passes = GradientPasses(open_model(model), tokens, device=CPU, dtype=torch.float32, new_store=store)
    passes.forward()
    for seed in range(150):
        passes.sample_labels(torch.Generator().manual_seed(seed))
        block = next(passes.backward())
        (calls,) = block.batches()
        draws.append(float(squared_gradient(calls["mlp.up_proj"]).sum()))
    mean, error = torch.tensor(draws).mean(), torch.tensor(draws).std() / len(draws) ** 0.5
    assert abs(float(mean) - trace) < 3 * float(error)
    assert float(error) < 0.15 * trace  # otherwise the line above holds for anything


def measured(model: Any, name: str, column: int) -> float:
    """The KL that one linear costs in one format, by running the whole model twice."""
    weight = model.get_submodule(name).weight
    kept = weight.data.clone()
    with torch.no_grad():
        full = model(input_ids=TOKENS).logits
        weight.data += list(rounding_errors(kept, CANDIDATES))[column]
        kl = token_kl(full, model(input_ids=TOKENS).logits).mean()
        weight.data = kept
    return float(kl)


@pytest.mark.parametrize("name", ["fisher", "out-fisher", "hawq"])
def test_second_order_scores_predict_the_kl_in_nats_per_token(name: str) -> None:
    model = tiny_model("llama")
    draws = [SCORES[name].compute(context(model, seed=seed)).table for seed in range(8)]
    linears = list(draws[0])
    assert len(linears) == 14
    for column in (1, 2):  # 4 and 6 bits
        predicted = sum(row[linear][column] for row in draws for linear in linears) / len(draws)
        true = sum(measured(model, linear, column) for linear in linears)
        assert 0.5 < predicted / true < 2.0, (name, column, predicted, true)


def test_scores_scale_with_the_squared_error_and_vanish_without_one() -> None:
    model = tiny_model("llama")
    base = context(model)
    for name in ("fisher", "out-fisher", "hawq"):
        once = SCORES[name].compute(base).table
        twice = (
            SCORES[name]
            .compute(context(model, errors=lambda weight: (2 * error for error in rounding_errors(weight, CANDIDATES))))
            .table
        )
        none = SCORES[name].compute(context(model, errors=lambda weight: [torch.zeros_like(weight)] * 3)).table
        for linear, row in once.items():
            assert twice[linear] == pytest.approx([4 * value for value in row], rel=1e-4)
            assert none[linear] == [0.0, 0.0, 0.0]


def test_the_score_of_model_optimizer_is_made_of_element_wise_products_with_the_labels_of_the_text() -> None:
    model, name = tiny_model("llama"), "model.layers.0.mlp.up_proj"
    found = SCORES["modelopt"].compute(context(model)).table[name]
    seen: list[tuple[Tensor, Tensor]] = []

    def keep(_: Any, args: tuple[Tensor, ...], output: Tensor) -> None:
        output.retain_grad()
        seen.append((args[0].detach(), output))

    handle = model.get_submodule(name).register_forward_hook(keep)
    for row in TOKENS:
        logits = model(input_ids=row[None]).logits[0]
        torch.nn.functional.cross_entropy(logits[:-1], row[1:], reduction="sum").backward()
    handle.remove()
    expected = []
    for error in rounding_errors(model.get_submodule(name).weight.detach(), CANDIDATES):
        products = [(inputs @ error.T) * output.grad for inputs, output in seen if output.grad is not None]
        expected.append(0.5 / TOKENS.numel() * float(sum(product.square().sum() for product in products)))
    assert len(seen) == 3
    assert min(expected) > 0
    assert found == pytest.approx(expected, rel=1e-3)


def test_experts_are_scored_on_the_rows_that_reach_them() -> None:
    model = tiny_model("qwen3_moe")
    source = open_model(model)
    linears = tuple(
        f"model.layers.0.mlp.experts.{i}.{n}" for i in range(4) for n in ("gate_proj", "up_proj", "down_proj")
    )
    values: ScoreValues = SCORES["fisher"].compute(context(model, source=source, linears=linears))
    assert values.table.keys() == set(linears)
    assert any("token by token" in note for note in values.notes)
    assert sum(row[0] > row[2] > 0 for row in values.table.values()) >= 10


def test_lim_is_minus_one_for_a_block_that_changes_nothing_and_one_for_a_flip() -> None:
    hidden = torch.randn(2, 5, 8)
    assert turned(hidden, hidden) == pytest.approx(-torch.ones(2, 4))
    assert turned(hidden, -hidden) == pytest.approx(torch.ones(2, 4))
    sink = hidden.clone()
    sink[:, 0] = 1e6  # the first position is left out
    assert turned(hidden, sink) == pytest.approx(-torch.ones(2, 4))


def test_lim_of_a_model_is_the_mean_over_tokens_of_its_hidden_states() -> None:
    model = tiny_model("llama")
    found = SCORES["lim"].compute(context(model)).blocks
    with torch.no_grad():
        hidden = model.model(input_ids=TOKENS, output_hidden_states=True).hidden_states
    first = -torch.nn.functional.cosine_similarity(hidden[0][:, 1:], hidden[1][:, 1:], dim=-1).mean()
    assert found["model.layers.0"] == pytest.approx(float(first), abs=1e-5)


def test_zd_of_a_gaussian_and_under_scale_and_shift() -> None:
    weights = [torch.randn(200, 300, generator=torch.Generator().manual_seed(i)) for i in range(2)]
    assert share_above_one(weights) == pytest.approx(0.1587, abs=0.003)
    assert share_above_one([3 * weight + 5 for weight in weights]) == pytest.approx(share_above_one(weights), abs=1e-4)


def test_zd_and_random_rank_every_block() -> None:
    model = tiny_model("llama")
    zd = SCORES["zd"].compute(context(model, tokens=None)).blocks
    block = model.model.layers[1]
    pooled = torch.cat([m.weight.flatten() for m in block.modules() if isinstance(m, torch.nn.Linear)]).double()
    share = float((pooled > pooled.mean() + pooled.std(unbiased=False)).double().mean())
    assert zd["model.layers.1"] == pytest.approx(-share)
    orders = {tuple(SCORES["random"].compute(context(model, seed=seed)).blocks.values()) for seed in range(10)}
    assert len(orders) == 2


def tiny_curvature() -> tuple[Any, Tensor, str]:
    """A model and tokens that are small enough for an explicit Hessian."""
    sizes = {"hidden_size": 8, "intermediate_size": 6, "num_attention_heads": 2, "num_key_value_heads": 2}
    model = tiny_model("llama", vocab_size=12, num_hidden_layers=1, tie_word_embeddings=False, **sizes)
    return model, torch.randint(2, 12, (2, 4), generator=torch.Generator().manual_seed(3)), "model.layers.0.mlp.up_proj"


def explicit_hessian(model: Any, tokens: Tensor, name: str) -> Tensor:
    """The Hessian of the mean KL per token by one weight, entry by entry through autograd."""
    weight = model.get_submodule(name).weight.detach()
    full = torch.log_softmax(model(input_ids=tokens).logits, -1).detach()

    def loss(flat: Tensor) -> Tensor:
        changed = {f"{name}.weight": flat.view_as(weight)}
        logits = torch.func.functional_call(model, changed, (), {"input_ids": tokens}).logits
        return (full.exp() * (full - torch.log_softmax(logits, -1))).sum(-1).mean()

    model.set_attn_implementation("eager")
    hessian: Tensor = torch.autograd.functional.hessian(loss, weight.flatten())  # type: ignore[no-untyped-call]
    return hessian


def test_hessian_vector_products_find_the_explicit_trace_and_eigenvalue() -> None:
    model, tokens, name = tiny_curvature()
    hessian = explicit_hessian(model, tokens, name)
    found = SCORES["hawq-hvp"].compute(context(model, tokens, linears=(name,), probes=200)).details[name]
    assert abs(found["trace"] - float(hessian.trace())) < 3 * found["standard_error"]
    assert found["standard_error"] < 0.2 * found["trace"]
    top = float(torch.linalg.eigvalsh(hessian)[-1])
    values = SCORES["hawq-eig"].compute(context(model, tokens, linears=(name,), probes=200))
    assert values.details[name]["eigenvalue"] == pytest.approx(top, rel=0.02)
    assert values.details[name]["order"] == pytest.approx(top / hessian.shape[0], rel=0.02)


def test_hutchinson_and_sampled_gradients_estimate_the_same_trace() -> None:
    model = tiny_model("llama", num_hidden_layers=1)
    name = "model.layers.0.self_attn.v_proj"
    probes = SCORES["hawq-hvp"].compute(context(model, linears=(name,), probes=25)).details[name]
    draws = [SCORES["hawq"].compute(context(model, linears=(name,), seed=i)).details[name]["trace"] for i in range(25)]
    mean, error = torch.tensor(draws).mean(), torch.tensor(draws).std() / len(draws) ** 0.5
    assert abs(float(mean) - probes["trace"]) < 3 * (float(error) ** 2 + probes["standard_error"] ** 2) ** 0.5
    assert float(error) < 0.2 * float(mean)


def test_direct_kl_is_that_of_two_whole_models() -> None:
    model = tiny_model("llama")
    names = ("model.layers.0.mlp.down_proj", "model.layers.1.self_attn.q_proj")
    values = SCORES["kl"].compute(context(model, linears=names))
    for name in names:
        assert values.table[name][1] == pytest.approx(measured(model, name, 1), rel=1e-3)
        weight = model.get_submodule(name).weight.detach()
        energies = [float(error.square().sum()) for error in rounding_errors(weight, CANDIDATES)]
        assert values.table[name][0] / values.table[name][1] == pytest.approx(energies[0] / energies[1])


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("fisher", {"blocks: forward pass": 2, "blocks: backward pass, rounding to every candidate": 2}),
        ("kl", {"blocks: KL with each linear rounded alone": 2}),
        ("hawq-hvp", {"sequences: 2 Hessian-vector products each": 3}),
        ("hawq-eig", {"linears: power iteration": 1}),
        ("zd", {"blocks: reading weights": 2}),
    ],
)
def test_progress_names_what_is_done_and_counts_what_it_names(name: str, expected: dict[str, int]) -> None:
    events: list[Event] = []
    one = ("model.layers.0.mlp.up_proj",)
    model = tiny_model("llama")
    SCORES[name].compute(context(model, probes=2, linears=one, steps=Steps(events.append)))
    begun = [number for number, event in enumerate(events) if event.kind == "blocks"]
    assert {events[number].text: events[number].total for number in begun} == expected
    for first, after in zip(begun, [*begun[1:], len(events)], strict=True):
        total = events[first].total
        assert [(event.done, event.total) for event in events[first + 1 : after]] == [
            (done, total) for done in range(1, total + 1)
        ]


@pytest.mark.parametrize("name", ["hawq-hvp", "hawq-eig"])
def test_an_expert_that_no_token_reaches_has_no_curvature(name: str) -> None:
    model, one = tiny_model("qwen3_moe"), TOKENS[:1, :1]  # one token goes to some of the experts only
    source = open_model(model)
    linears = tuple(f"model.layers.0.mlp.experts.{i}.up_proj" for i in range(4))
    values = SCORES[name].compute(context(model, one, source=source, linears=linears, probes=2))
    idle = [row for row in values.table.values() if row == [0.0, 0.0, 0.0]]
    assert 0 < len(idle) < 4


@pytest.mark.parametrize("name", ["hawq-hvp", "hawq-eig"])
def test_a_model_without_second_derivatives_is_told_which_attention_has_them(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = modeling_llama.eager_attention_forward

    class Once(torch.autograd.Function):
        @staticmethod
        def forward(_: Any, x: Tensor) -> Tensor:
            return x.clone()

        @staticmethod
        @once_differentiable
        def backward(_: Any, gradient: Tensor) -> Tensor:
            return gradient

    def fused(*args: Any, **kwargs: Any) -> Any:
        output, weights = plain(*args, **kwargs)
        return Once.apply(output), weights

    monkeypatch.setattr(modeling_llama, "eager_attention_forward", fused)
    with pytest.raises(ModelError, match=r"no second derivative.*attn_implementation='eager'.*Take --score hawq"):
        SCORES[name].compute(context(tiny_model("llama"), probes=2))
