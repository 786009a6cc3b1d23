"""The model card: what it carries on, the command that gives the recipe again, names that break nothing, scores."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

import click
import pytest
import torch
from huggingface_hub import ModelCard
from markdown_it import MarkdownIt

import ptq
from cli.quantize import command
from cli.shared.recipe_flags import build_recipe
from ptq.export import export
from ptq.model_card import ScoreRow, card_is_ours, insert_scores
from ptq.model_card.command import command_words, public_source
from ptq.model_card.metadata import front_matter, hub_name
from ptq.recipe import Recipe
from ptq.report import Report
from tests.support.bytes_table import CASES
from tests.support.tiny_models import tiny_model

FRONT = """---
license: other
license_name: mine
license_link: LICENSE
language: [en, no]
tags: [chat, 4-bit, GPTQ, "x: y"]
base_model: somebody/else
---
# Another card
"""


def saved(folder: Path, readme: str | None = FRONT) -> Path:
    tiny_model("llama", torch.bfloat16).save_pretrained(folder)
    if readme is not None:
        (folder / "README.md").write_text(readme)
    return folder


def quantized(source: Path, out: Path, **fields: Any) -> Path:
    ptq.quantize(str(source), out=out, **{"method": "rtn", "bits": 4, "group_size": 32, "device": "cpu", **fields})
    return out


def test_the_card_of_a_result_is_the_hubs_kind_of_card(tmp_path: Path) -> None:
    out = quantized(saved(tmp_path / "model"), tmp_path / "out")
    card = ModelCard.load(out / "README.md")
    data = card.data.to_dict()
    assert data["license"] == "other"
    assert data["license_name"] == "mine"
    assert data["language"] == ["en", "no"]
    assert data["tags"] == ["chat", "x: y", "ptq", "compressed-tensors", "4-bit"]
    assert "base_model" not in data  # a folder has no name on the hub, and the base's base is not the base
    assert "README.md" in Report.load(out).companions
    for word in ("4.500", "int4 sym g32", "vllm serve", "from_pretrained", "ptq.load", "model.embed\\_tokens.weight"):
        assert word in card.text


def test_the_card_is_the_same_for_the_same_run(tmp_path: Path) -> None:
    source = saved(tmp_path / "model")
    first, second = (quantized(source, tmp_path / name) / "README.md" for name in ("a", "b"))
    assert first.read_bytes() == second.read_bytes()
    assert str(tmp_path) not in first.read_text()


def test_an_export_carries_the_metadata_on(tmp_path: Path) -> None:
    out = quantized(saved(tmp_path / "model"), tmp_path / "out")
    text = (out / "README.md").read_text().replace("library_name:", "base_model: owner/name\nlibrary_name:")
    (out / "README.md").write_text(text)
    export(out, format="gptq", out=tmp_path / "gptq")
    data = ModelCard.load(tmp_path / "gptq" / "README.md").data.to_dict()
    assert (data["base_model"], data["base_model_relation"]) == ("owner/name", "quantized")
    assert data["tags"] == ["chat", "x: y", "ptq", "gptq", "4-bit"]
    export(out, format="bf16", out=tmp_path / "bf16")
    assert ModelCard.load(tmp_path / "bf16" / "README.md").data.to_dict()["tags"] == ["chat", "x: y", "ptq"]


@pytest.mark.parametrize(
    "card",
    [
        "no front matter",
        "---\nlicense: [\n---\n",
        "---\n- a list\n---\n",
        "---\na: &a [x]\nlicense: *a\n---\n",
        "---\nlicense: !!python/object:os.system x\n---\n",
        "---\nlicense: {a: b}\n---\n",
    ],
)
def test_a_card_that_cannot_be_read_gives_nothing(card: str, tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text(card)
    assert front_matter(tmp_path) == {}
    assert front_matter(tmp_path / "none") == {}


def test_names_on_the_hub(tmp_path: Path) -> None:
    snapshot = tmp_path / "models--owner--a-b" / "snapshots" / "0123"
    snapshot.mkdir(parents=True)
    assert hub_name(str(snapshot), snapshot) == "owner/a-b"
    assert hub_name("owner/name", tmp_path) == "owner/name"
    assert hub_name(str(tmp_path), tmp_path) is None
    assert hub_name("LlamaForCausalLM", None) is None


NAMES = [
    "a 😀",
    "q\"uo`te's",
    "new\nline\n---\n# heading",
    "<script>|`` ``` [x](y)",
    "--> <!-- ptq eval: begin of scores -->",
]


@pytest.mark.parametrize("name", NAMES)
def test_no_name_breaks_the_card(name: str, tmp_path: Path) -> None:
    out = quantized(saved(tmp_path / "model"), tmp_path / "out")
    report = Report.load(out)
    data = json.loads(report.to_json())
    data["model"]["source"] = f"/some/where/{name}"
    text = ptq.model_card.render_card(Report.from_dict(data), tmp_path / "model")
    tokens = MarkdownIt("commonmark").enable("table").parse(text.partition("<!-- written by ptq -->")[2])
    plain = MarkdownIt("commonmark").enable("table").parse((out / "README.md").read_text().partition("ptq -->")[2])
    assert [token.type for token in tokens] == [token.type for token in plain]
    assert "/some" not in text
    (tmp_path / "card.md").write_text(text)
    assert insert_scores(tmp_path / "card.md", [ScoreRow("x", "y", "1")]) or "ptq eval: begin" in name


RECIPES = {name: {k: v for k, v in case.items() if k not in ("family", "dtype")} for name, case in CASES.items()}
RECIPES |= {
    "calibration": {"method": "gptq", "calib": "wikitext2", "calib_samples": 3, "seed": 7, "calib_bos": "never"},
    "overrides": {
        "method": "rtn",
        "overrides": (
            ("*.a", ptq.Scheme(8, False, None, act_bits=8)),
            ("*.b", ptq.Scheme.of("fp4", group_size=64)),
        ),
        "ignore": ("*.c d",),
    },
    "rotations": {"method": "rtn", "rotate": ("residual", "input"), "rotate_block": 64, "kv_bits": 4},
    "k-quants": {"method": "rtn", "format": "q2_k"},
    "itq3s": {"method": "itq3s", "rotate_block": 64, "shaping": 0.5, "seed": 3},
    "itq3s with data": {"method": "itq3s", "calib": "self", "beam": 4},
    "higgs": {"method": "itq3s", "format": "higgs", "bits": 2},
    "fp8": {"method": "rtn", "preset": "FP8_DYNAMIC", "text_only": True},
}


@pytest.mark.parametrize("name", RECIPES)
def test_the_command_makes_the_same_recipe(name: str) -> None:
    recipe = ptq.api.make_recipe(RECIPES[name])
    words = command_words(recipe.record(), "MODEL")
    assert words[:2] == ["ptq", "quantize"]
    with click.Context(command) as context:
        command.parse_args(context, shlex.split(shlex.join(words))[2:])
        flags = {key: value for key, value in context.params.items() if key not in ("model", "out", "device")}
    assert build_recipe(Recipe(), flags) == recipe


def test_reports_of_earlier_releases_lack_fields() -> None:
    whole = ptq.api.make_recipe(RECIPES["overrides"]).record()
    before = {key: value for key, value in whole.items() if key not in ("rotate_block", "rotate_head", "text_only")}
    for scheme in (before["scheme"], *before["overrides"]):
        scheme.pop("act_format")
    assert command_words(before, "MODEL") == command_words(ptq.api.make_recipe(RECIPES["overrides"]).record(), "MODEL")


def test_a_long_recipe_is_a_file_beside_the_command(tmp_path: Path) -> None:
    source = saved(tmp_path / "model")
    names = [f"*{i}.self_attn.{x}_proj" for i in "01" for x in "qkvo"]
    rows = tuple((name, ptq.Scheme(4, True, 32)) for name in (*names, "*.down_proj"))
    out = quantized(source, tmp_path / "out", overrides=rows)
    text = (out / "README.md").read_text()
    assert "--recipe recipe.yaml" in text
    (tmp_path / "recipe.yaml").write_text(text.partition("```yaml\n")[2].partition("```")[0])
    assert Recipe.from_yaml(tmp_path / "recipe.yaml").record() == Report.load(out).recipe


def test_sources_lose_the_folders_of_the_machine() -> None:
    assert public_source("/home/me/text.txt@0.8:1") == "text.txt@0.8:1"
    assert public_source("owner/set:train:text") == "owner/set:train:text"


def test_a_card_of_somebody_else_stays(tmp_path: Path) -> None:
    source, said = saved(tmp_path / "model"), []
    out = quantized(source, tmp_path / "out")
    (out / "README.md").write_text("mine")
    assert not card_is_ours(out)
    ptq.quantize(
        str(source), method="rtn", bits=3, out=out, device="cpu", restart=True, on_event=lambda e: said.append(e.text)
    )
    assert (out / "README.md").read_text() == "mine"
    assert any("was not written by ptq and stays" in text for text in said)
    assert "README.md" not in Report.load(out).companions


def test_scores_are_put_in_and_replaced(tmp_path: Path) -> None:
    card = quantized(saved(tmp_path / "model"), tmp_path / "out") / "README.md"
    before = card.read_text()
    assert insert_scores(card, [ScoreRow("a | b", "2,048 tokens", "7.1 ± 0.1", "6.9")])
    assert insert_scores(card, [ScoreRow("arc", "10 rows", "50 %")])
    assert insert_scores(card, [ScoreRow("a | b", "2,048 tokens", "7.2 ± 0.1")])
    text = card.read_text()
    assert "| a \\| b | 2,048 tokens | 7.2 ± 0.1 | 6.9 |" in text
    assert "| arc | 10 rows | 50 % |  |" in text
    assert "7.1" not in text
    assert text.partition("<!-- ptq eval: begin")[0] == before.partition("<!-- ptq eval: begin")[0]
    assert text.partition("end of scores -->")[2] == before.partition("end of scores -->")[2]
    card.write_text("no section")
    assert not insert_scores(card, [ScoreRow("a", "b", "c")])
    assert card.read_text() == "no section"
