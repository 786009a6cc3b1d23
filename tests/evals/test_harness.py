"""Beside lm-evaluation-harness: its strings, its log-likelihoods, its scores; and the harness itself on our models."""

from __future__ import annotations

import importlib.util
import json
import os
import random
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from calib.errors import DataError, PtqError, UsageError
from evals import harness
from evals.inference.batching import BatchSize
from evals.inference.logits import ModelLogits
from evals.items import Items
from evals.tasks.loglikelihood import score_requests
from evals.tasks.metrics import per_item
from evals.tasks.prompts import fill
from evals.tasks.registry import TASKS, load_task
from evals.tasks.requests import encode_pairs
from evals.tasks.types import LoadedTask
from tests.support.tiny_models import tiny_model

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # other people's, at import
    lm_eval = pytest.importorskip("lm_eval", reason="the extra lm-eval is not installed")
    import datasets
    from lm_eval import evaluator
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

# Kept from being errors: files that data sets leave to the collector, and what the harness does to a tokenizer.
pytestmark = [
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]
FOLDERS = ("arc", "hellaswag", "piqa", "winogrande", "super_glue", "openbookqa", "lambada", "mmlu/default", "sciq")
NAMES = [task.name for task in TASKS]
ROWS = 50
NATS = 1e-3
WORDS = ("the", "quick", "brown", "fox", "Once", "model", "bits", "café", "東京", "of", "it", "x_y", "[b]", "3.5")


@pytest.fixture(scope="module")
def manager() -> Any:
    """The harness's own files of the tasks that we have (all of its files take five seconds to find)."""
    root = Path(lm_eval.__file__).parent / "tasks"
    return TaskManager(include_defaults=False, include_path=[root / name for name in FOLDERS])


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Callable[[str, int], None]:
    """Puts synthetic rows of a task on a hub of our own, for both sides."""

    def put(name: str, rows: int) -> None:
        table = datasets.Dataset.from_list(hub_rows(name, rows))
        train = datasets.Dataset.from_list(hub_rows(name, 1, "train") * 2)  # one example, whatever is drawn
        splits = datasets.DatasetDict({"train": train} | dict.fromkeys(("validation", "test", "dev"), table))

        def load(path: str, name: str | None = None, *, split: str | None = None, **_: Any) -> Any:
            return splits if split is None else splits[split]

        monkeypatch.setattr(datasets, "load_dataset", load)

    return put


def hub_rows(name: str, count: int, split: str = "") -> list[dict[str, Any]]:
    """Random rows in the form of a data set of the hub."""
    generator = random.Random(name + split)
    return [_hub_row(name, generator) for _ in range(count)]


def _hub_row(name: str, generator: random.Random) -> dict[str, Any]:
    def words(low: int = 1, high: int = 8) -> str:
        return " ".join(generator.choices(WORDS, k=generator.randint(low, high)))

    four = [words() for _ in range(4)]
    gold = generator.randrange(4)
    both = generator.randrange(2)
    labels = generator.choice((["A", "B", "C", "D"], ["1", "2", "3", "4"]))
    listed = {"choices": {"text": four, "label": labels}, "answerKey": labels[gold]}
    rows: dict[str, dict[str, Any]] = {
        "arc_easy": {"question": words(3, 12), **listed},
        "arc_challenge": {"question": words(3, 12) + "\n", **listed},
        "openbookqa": {"question_stem": words(3, 12), **listed},
        "hellaswag": {
            "activity_label": words(),
            "ctx_a": words(3, 9) + " [header] Stop.",
            "ctx_b": words(),
            "endings": [f"{text} [title] {text}" for text in four],
            "label": str(gold),
        },
        "piqa": {"goal": words(3, 12) + "\n\n", "sol1": four[0], "sol2": four[1] + " ", "label": both},
        "winogrande": {
            "sentence": f"{words()} _ {words()} .",
            "option1": "Ann",
            "option2": "Beatrix",
            "answer": str(both + 1),
        },
        "boolq": {"passage": words(9, 40), "question": words(), "label": both},
        "copa": {
            "premise": f" {words()}. ",
            "choice1": "The dog.",
            "choice2": words().capitalize(),
            "question": generator.choice(("cause", "effect")),
            "label": both,
        },
        "lambada_openai": {"text": f"{words(9, 30)}  {words(1, 1)}"},
        "mmlu": {"question": f" {words(3, 9)}\n", "choices": four, "answer": gold, "subject": "anatomy"},
        "sciq": {
            "support": generator.choice(("", "\n" + words(9, 20))),
            "question": words(),
            **dict(zip(("distractor1", "distractor2", "distractor3", "correct_answer"), four, strict=True)),
        },
    }
    return rows[name]


def their_task(manager: Any, name: str, fewshot: int = 0) -> Any:
    """The harness's task with its requests."""
    subtask = "mmlu_anatomy" if name == "mmlu" else name
    task = manager.load([subtask])["tasks"][subtask]
    task.set_config(key="num_fewshot", value=fewshot)
    task.build_all_requests(limit=None, rank=0, world_size=1)
    return task


def asked_by_them(task: Any) -> list[list[tuple[str, str]]]:
    rows: dict[int, list[tuple[str, str]]] = {}
    for instance in task.instances:
        rows.setdefault(instance.doc_id, []).append(instance.args)
    return list(rows.values())


def gold_of_them(task: Any) -> list[int]:
    if task.OUTPUT_TYPE == "loglikelihood":
        return [0] * len(task.eval_docs)
    find = task.doc_to_text if task.multiple_input else task.doc_to_target
    found = [find(document) for document in task.eval_docs]
    choices = [task.doc_to_choice(document) for document in task.eval_docs]
    return [
        int(gold) if not isinstance(gold, str) or gold.isdigit() else texts.index(gold)
        for gold, texts in zip(found, choices, strict=True)
    ]


def our_items(loaded: LoadedTask, model: Any, tokenizer: Any) -> Items:
    """Our scores of a task's questions."""
    questions = loaded.questions
    requests = [encode_pairs(question.pairs, tokenizer, 512) for question in questions]
    source = ModelLogits(model, torch.arange(2, 9))
    scores = score_requests(source, requests, BatchSize("auto", torch.device("cpu")))
    columns = {
        "gold": np.array([question.gold for question in questions]),
        "counts": np.array([len(question.pairs) for question in questions]),
        "ll": np.array([answer.ll for answers in scores for answer in answers]),
        "characters": np.array([len(answer) for question in questions for answer in question.answers]),
        "bytes": np.array([len(answer.encode()) for question in questions for answer in question.answers]),
    }
    if loaded.task.kind == "continuation":
        columns["greedy"] = np.array([int(answers[0].greedy) for answers in scores])
    return Items(np.arange(len(questions), dtype=np.uint64), columns)


# The same strings


@pytest.mark.parametrize("name", NAMES)
def test_every_prompt_is_the_harness_s_own(name: str, manager: Any, hub: Callable[[str, int], None]) -> None:
    hub(name, ROWS)
    task = their_task(manager, name)
    loaded = load_task(name)
    assert [list(question.pairs) for question in loaded.questions] == asked_by_them(task)
    assert [question.gold for question in loaded.questions] == gold_of_them(task)
    if loaded.task.kind != "continuation":
        assert [list(question.answers) for question in loaded.questions] == [
            task.doc_to_choice(document) for document in task.eval_docs
        ]
    assert loaded.task.metric in task.aggregation()


def test_examples_of_mmlu_are_the_harness_s_own(manager: Any, hub: Callable[[str, int], None]) -> None:
    hub("mmlu", 6)
    task = their_task(manager, "mmlu", fewshot=5)
    assert [list(question.pairs) for question in load_task("mmlu", fewshot=5).questions] == asked_by_them(task)


@pytest.mark.parametrize("name", ["piqa", "copa", "winogrande", "hellaswag"])
def test_examples_are_written_as_the_harness_writes_them(
    name: str, manager: Any, hub: Callable[[str, int], None]
) -> None:
    """Both draw in their own way; with one row to draw from they must agree."""
    hub(name, 3)
    task = their_task(manager, name)
    task.set_config(key="num_fewshot", value=1)
    task.set_fewshot_seed(1)
    task.build_all_requests(limit=None, rank=0, world_size=1)
    assert [list(question.pairs) for question in load_task(name, fewshot=1).questions] == asked_by_them(task)


def test_the_line_above_every_subject_of_mmlu() -> None:
    description = next(task.description for task in TASKS if task.name == "mmlu")
    files = sorted((Path(lm_eval.__file__).parent / "tasks/mmlu/default").glob("mmlu_*.yaml"))
    assert len(files) == 57
    for file in files:
        config = yaml.safe_load(file.read_text())
        assert fill(description, {"subject": config["dataset_name"].replace("_", " ")}) == config["description"]


@pytest.mark.parametrize("name", NAMES)
def test_splits_and_data_sets_are_the_harness_s(name: str, manager: Any, hub: Callable[[str, int], None]) -> None:
    hub(name, 2)
    config = their_task(manager, name).config
    source = next(task.hub for task in TASKS if task.name == name)
    assert source is not None
    assert source.repo == config.dataset_path
    assert source.split == (config.test_split or config.validation_split)
    assert source.fewshot_split == (config.fewshot_split or config.training_split)
    if name != "mmlu":  # one configuration has all subjects
        assert source.config == config.dataset_name


# The same numbers


@pytest.mark.parametrize("name", NAMES)
def test_log_likelihoods_and_scores_are_the_harness_s(
    name: str, manager: Any, hub: Callable[[str, int], None], tiny_tokenizer: Any
) -> None:
    hub(name, ROWS)
    model = tiny_model("llama", vocab_size=len(tiny_tokenizer))
    task = their_task(manager, name)
    wrapped = HFLM(pretrained=model, tokenizer=tiny_tokenizer, batch_size=16)
    theirs = wrapped.loglikelihood(task.instances, disable_tqdm=True)
    items = our_items(load_task(name), model, tiny_tokenizer)
    assert np.abs(items["ll"] - np.array([ll for ll, _ in theirs])).max() < NATS

    answers = iter(theirs)
    scores = [
        task.process_results(document, [next(answers) for _ in range(count)])
        for document, count in zip(task.eval_docs, items["counts"].tolist(), strict=True)
    ]
    for metric in {"acc", "acc_norm"} & set(scores[0]):
        assert per_item(items, metric).tolist() == [float(score[metric]) for score in scores]
    assert np.ptp(items["ll"]) > 1  # the model does tell answers apart


MODEL, DATA = (os.environ.get(name) for name in ("PTQ_TEST_MODEL", "PTQ_TEST_DATA"))


@pytest.mark.skipif(not (MODEL and DATA), reason="PTQ_TEST_MODEL and PTQ_TEST_DATA name no model and data")
@pytest.mark.parametrize("name", ["arc_easy", "arc_challenge", "piqa", "openbookqa", "winogrande", "boolq"])
def test_a_real_model_on_real_rows(name: str) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(str(MODEL), dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(str(MODEL))
    found = benchmark().compare(model, tokenizer, Path(str(DATA)), [name], ROWS, 8)[name]
    assert found["rows"] == ROWS
    assert found["max_abs_difference"] < NATS
    assert (found["acc_differs"], found["acc_norm_differs"]) == (0, 0)


def benchmark() -> Any:
    """``benchmarks/peers/harness_parity.py``, whose prompts are written apart from ours."""
    path = Path(__file__).parents[2] / "benchmarks" / "peers" / "harness_parity.py"
    spec = importlib.util.spec_from_file_location("harness_parity", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# The harness itself


@pytest.fixture
def few_files(manager: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(harness, "_task_manager", lambda include_path: manager)
    monkeypatch.setattr(evaluator, "add_env_info", lambda results: None)  # asks pip, which takes seconds


@pytest.mark.usefixtures("few_files")
def test_the_harness_runs_on_a_model_in_memory(
    hub: Callable[[str, int], None], tiny_tokenizer: Any, capfd: pytest.CaptureFixture[str]
) -> None:
    hub("arc_easy", 12)
    model = tiny_model("llama", vocab_size=len(tiny_tokenizer))
    before = tiny_tokenizer.pad_token, random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()
    found = harness.run_harness(model, tiny_tokenizer, ["arc_easy"], limit=10, batch_size=4)
    after = tiny_tokenizer.pad_token, random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()
    assert before[:3] == after[:3]
    assert torch.equal(before[3], after[3])
    printed = capfd.readouterr()
    assert (printed.out, printed.err) == ("", "")

    assert json.loads(json.dumps(found, allow_nan=False)) == found
    expected = per_item(our_items(load_task("arc_easy", limit=10), model, tiny_tokenizer), "acc").mean()
    assert found["results"]["arc_easy"]["acc,none"] == pytest.approx(expected)
    assert found["n_samples"]["arc_easy"]["effective"] == 10
    assert found["n_shot"] == {"arc_easy": 0}
    assert found["versions"] == {"arc_easy": 1.0}
    assert found["harness_version"] == lm_eval.__version__
    assert found["settings"] == {"tasks": ["arc_easy"], "limit": 10, "fewshot": None, "batch_size": 4}


@pytest.mark.usefixtures("few_files")
def test_a_group_and_a_tag_bring_their_tasks(hub: Callable[[str, int], None], tiny_tokenizer: Any) -> None:
    hub("mmlu", 2)
    model = tiny_model("llama", vocab_size=len(tiny_tokenizer))
    found = harness.run_harness(model, tiny_tokenizer, ["mmlu_stem"], limit=1, fewshot=1, batch_size=8)
    assert len(found["n_samples"]) == 19
    assert found["n_shot"]["mmlu_anatomy"] == 1
    assert 0 <= found["groups"]["mmlu_stem"]["acc,none"] <= 1
    hub("arc_easy", 2)
    found = harness.run_harness(model, tiny_tokenizer, ["ai2_arc"])
    assert {"arc_easy", "arc_challenge"} <= set(found["results"])


@pytest.mark.usefixtures("few_files")
def test_names_that_the_harness_does_not_know(tiny_tokenizer: Any) -> None:
    with pytest.raises(UsageError, match=r"unknown task of lm-evaluation-harness 'arc_esy'\. Did you mean 'arc_easy'"):
        harness.run_harness(None, tiny_tokenizer, ["arc_easy", "arc_esy"])


@pytest.mark.parametrize("wrong", [{"tasks": []}, {"limit": 0}, {"fewshot": -1}])
def test_numbers_that_cannot_be(wrong: dict[str, Any], tiny_tokenizer: Any) -> None:
    with pytest.raises(UsageError, match="the harness needs a task, limit >= 1 and fewshot >= 0"):
        harness.run_harness(None, tiny_tokenizer, **({"tasks": ["arc_easy"]} | wrong))


@pytest.mark.usefixtures("few_files")
def test_rows_that_cannot_be_read_are_a_matter_of_data(tiny_tokenizer: Any) -> None:
    with pytest.raises(DataError, match="cannot load the rows of arc_easy"):
        harness.run_harness(None, tiny_tokenizer, ["arc_easy"])


@pytest.mark.usefixtures("few_files")
def test_a_failure_inside_is_told_with_what_was_printed(hub: Callable[[str, int], None], tiny_tokenizer: Any) -> None:
    class Broken(torch.nn.Module):
        def __init__(self, inner: Any) -> None:
            super().__init__()
            self.inner, self.config, self.device = inner, inner.config, torch.device("cpu")

        def tie_weights(self) -> None:
            print("nearly there")

        def forward(self, *_: Any, **__: Any) -> Any:
            raise RuntimeError("no such kernel")

    hub("arc_easy", 2)
    model = Broken(tiny_model("llama", vocab_size=len(tiny_tokenizer)))
    with pytest.raises(PtqError, match="RuntimeError: no such kernel") as caught:
        harness.run_harness(model, tiny_tokenizer, ["arc_easy"])
    assert "nearly there" in str(caught.value)


def test_without_the_extra_the_error_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch, tiny_tokenizer: Any) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval.tasks", None)
    with pytest.raises(UsageError, match=r"pip install 'ptq-toolkit\[lm-eval\]'"):
        harness.run_harness(None, tiny_tokenizer, ["arc_easy"])


def test_a_folder_of_task_files_must_be_there(tmp_path: Path, tiny_tokenizer: Any) -> None:
    with pytest.raises(UsageError, match="there is no folder"):
        harness.run_harness(None, tiny_tokenizer, ["arc_easy"], include_path=tmp_path / "nowhere")


@pytest.mark.usefixtures("few_files")
def test_a_packed_model_runs_as_it_is(
    hub: Callable[[str, int], None], tiny_folder: Path, tiny_tokenizer: Any, tmp_path: Path
) -> None:
    import ptq

    ptq.quantize(tiny_folder, out=tmp_path / "out", method="rtn", bits=3, group_size=32, device="cpu")
    model = ptq.load(tmp_path / "out", dtype=torch.float32)
    tokens = torch.arange(3, 40)[None]
    with torch.no_grad():
        before = model(tokens).logits
        hub("arc_easy", 20)
        found = harness.run_harness(model, tiny_tokenizer, ["arc_easy"], batch_size=4)
        assert torch.equal(model(tokens).logits, before)  # nothing was unpacked, tied or converted
    expected = per_item(our_items(load_task("arc_easy"), model, tiny_tokenizer), "acc_norm").mean()
    assert found["results"]["arc_easy"]["acc_norm,none"] == pytest.approx(expected)
