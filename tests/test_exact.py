"""`qadapt estimate --exact` and `--plot`: the step itself, run without its memory, by the real command."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from test_estimate_command import SCHEMA, problems

import qadapt
from qadapt.cli.main import run
from qadapt.errors import NoClosedForm
from qadapt.estimating.planning import ask
from qadapt.plan.answer import Answer
from qadapt.plan.categories import STATIC
from qadapt.plan.estimate import KEPT_ON_CPU
from qadapt.shape import find_config
from qadapt.units import format_bytes

LLAMA: dict[str, Any] = {
    "model_type": "llama", "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 512, "max_position_embeddings": 256,
}  # fmt: skip
GPT_NEOX: dict[str, Any] = {
    "model_type": "gpt_neox", "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
    "num_attention_heads": 4, "vocab_size": 512, "max_position_embeddings": 256,
}  # fmt: skip


def model(folder: Path, config: dict[str, Any]) -> str:
    path = folder / str(config["model_type"])
    path.mkdir()
    (path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return str(path)


def values_of(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    assert run(["estimate", *arguments, "--json"]) == 0
    values: dict[str, Any] = json.loads(capsys.readouterr().out)
    assert problems(values, SCHEMA) == []
    return values


def test_the_dry_run_answers_in_the_same_form_as_the_closed_form(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    llama = model(tmp_path, LLAMA)
    closed = values_of(capsys, llama, "--card", "4060", "--rows", "4")
    exact = values_of(capsys, llama, "--card", "4060", "--rows", "4", "--exact")
    assert (closed["exact"], exact["exact"]) == (False, True)
    assert exact["peak_allocated_bytes"] == pytest.approx(closed["peak_allocated_bytes"], rel=0.03)
    static = ("base_weights", "quantization_constants", "unquantized", "adapters", "optimizer")
    assert {name: exact["categories"][name] for name in static} == {
        name: closed["categories"][name] for name in static
    }
    assert exact["reserved_bytes"]["low"] >= exact["peak_allocated_bytes"]
    assert exact["seconds_per_1000_steps"] == closed["seconds_per_1000_steps"]
    assert run(["estimate", llama, "--card", "4060", "--exact"]) == 0
    output = " ".join(capsys.readouterr().out.split())
    assert "every tensor of the step, counted on the step itself without its memory" in output
    assert "what kernels take inside, from a table" in output
    assert "what comes and goes, within" not in output


def test_on_a_cpu_nothing_comes_from_a_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    values = values_of(capsys, model(tmp_path, LLAMA), "--exact")
    working = values["peak_allocated_bytes"] - sum(values["categories"][name] for name in STATIC)
    assert (values["target"]["device"], values["relative_error"]) == ("cpu", 0)
    assert values["error_bytes"] == round(KEPT_ON_CPU * working)  # what the system keeps besides


def test_a_model_without_closed_form_is_counted_by_the_dry_run_and_that_is_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    neox = model(tmp_path, GPT_NEOX)
    values = values_of(capsys, neox, "--card", "4060")
    assert values["exact"]
    assert values["notes"] == ["gpt_neox has no closed form here: counted by the exact dry run"]
    assert values["model"]["parameters"] > 2 * 512 * 64
    assert values["disk_parts"]["merged-fp16"] == 2 * values["model"]["parameters"]
    assert values["seconds_per_1000_steps"] is None
    assert run(["estimate", neox, "--card", "4060", "adapter.rank=4"]) == 0
    output = capsys.readouterr().out
    assert "counted by the exact dry run" in output
    assert "there is no closed form for this architecture" in output
    assert qadapt.estimate(neox, card="4060").exact


@pytest.mark.parametrize(
    ("offload", "is_pinned"), [("[embeddings]", False), ("[embeddings,boundaries]", True)]
)
def test_a_table_on_the_host_is_not_called_pinned(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], offload: str, is_pinned: bool
) -> None:
    neox = model(tmp_path, GPT_NEOX)
    more = ("memory.recompute=all", f"memory.offload={offload}")
    found = qadapt.estimate(neox, more, card="4060")
    assert (found.pinned_bytes > 0) is is_pinned
    assert found.pinned_bytes < found.host_bytes
    assert run(["estimate", neox, *more, "--card", "4060"]) == 0
    assert ("of it pinned" in capsys.readouterr().out) is is_pinned


def test_an_architecture_that_nobody_knows_is_a_clear_no(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    unknown = model(tmp_path, GPT_NEOX | {"model_type": "novelty"})
    assert run(["estimate", unknown, "--card", "4060"]) == 2
    said = capsys.readouterr()
    assert "'novelty' is not known to transformers" in said.err
    assert (said.out, "Traceback" in said.err) == ("", False)


@pytest.mark.parametrize("more", [("--max", "length"), ("--all-cards",)])
def test_many_steps_are_not_asked_of_a_model_without_closed_form(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], more: tuple[str, ...]
) -> None:
    assert run(["estimate", model(tmp_path, GPT_NEOX), *more]) == 2
    assert "'gpt_neox', which has no closed form here" in capsys.readouterr().err
    with pytest.raises(NoClosedForm):
        ask(str(tmp_path / "gpt_neox"), (), card="4060", vram=None).plan()


def test_the_picture_is_written_whole(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    picture = tmp_path / "memory.svg"
    picture.write_text("an older one", encoding="utf-8")
    llama = model(tmp_path, LLAMA)
    values = values_of(capsys, llama, "--card", "4060", "--plot", str(picture))
    text = picture.read_text(encoding="utf-8")
    words = [each.text for each in ElementTree.fromstring(text).iter("{http://www.w3.org/2000/svg}text")]
    assert "llama, 1 row of 256 tokens, on RTX 4060 8GB" in words
    assert f"peak {format_bytes(values['peak_allocated_bytes'])}" in words
    assert {"forward", "backward", "update"} <= set(words)
    assert sorted(each.name for each in tmp_path.iterdir()) == ["llama", "memory.svg"]


BAD = [
    (["--plot", "memory.png"], "the picture is an SVG"),
    (["--plot", "nowhere/memory.svg"], "there is no folder 'nowhere'"),
    (["--plot", "taken.svg"], "which is a folder"),
    (["--exact", "--max", "length"], "--exact and --plot are about one step"),
    (["--plot", "memory.svg", "--all-cards"], "--exact and --plot are about one step"),
]


@pytest.mark.parametrize(("arguments", "words"), BAD)
def test_a_picture_that_cannot_be_is_refused_before_anything_is_run(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    arguments: list[str],
    words: str,
) -> None:
    (tmp_path / "taken.svg").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "qadapt.estimating.exact", None)  # an attempt to run it would fail
    assert run(["estimate", "SmolLM2-135M", "--card", "4060", *arguments]) == 2
    said = capsys.readouterr()
    assert words in said.err
    assert said.out == ""
    assert [each.name for each in tmp_path.iterdir()] == ["taken.svg"]


def test_a_disk_that_takes_no_picture_leaves_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    llama = model(tmp_path, LLAMA)
    monkeypatch.setattr(Path, "replace", full)
    assert run(["estimate", llama, "--card", "4060", "--plot", str(tmp_path / "memory.svg")]) == 2
    assert "memory.svg cannot be written: No space left on device." in capsys.readouterr().err
    assert [each.name for each in tmp_path.iterdir()] == ["llama"]


def test_a_mixture_of_experts_has_a_range_of_routing_and_the_verdict_takes_its_end(tmp_path: Path) -> None:
    values = find_config("mistralai/Mixtral-8x7B-v0.1").values | {
        "num_hidden_layers": 2, "hidden_size": 256, "intermediate_size": 896, "num_attention_heads": 8,
        "num_key_value_heads": 4, "vocab_size": 999,
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(values), encoding="utf-8")

    def answer(card: str | None) -> Answer:
        question = ask(str(tmp_path), (), card=card, vram=None)
        return question.changed({"supervised_share": 0.1}).dry_run().answer

    on_card, on_cpu = answer("RTX 4090"), answer(None)
    assert on_card.routing_bytes is not None
    assert on_card.routing_bytes[0] < on_card.routing_bytes[1] == on_card.estimate.peak_allocated_bytes
    assert any("stay in 16 bits" in note and "Training it is refused" in note for note in on_card.notes)
    assert on_cpu.routing_bytes is None
    assert any("worst routing" in note for note in on_cpu.notes)
