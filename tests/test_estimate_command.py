"""`qadapt estimate` and `qadapt plan` as a user runs them: verdicts, JSON by its schema, bad input, speed."""

from __future__ import annotations

import io
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import typer
from rich.console import Console
from typer.testing import CliRunner

import qadapt
from qadapt.cli import main
from qadapt.cli.estimate import estimate, plan
from qadapt.errors import QadaptError
from qadapt.estimating.planning import ask
from qadapt.hardware import target as targets
from qadapt.hardware.calibration import kind_of, remember
from qadapt.hardware.cards import cards, this_platform
from qadapt.hardware.probe import Machine
from qadapt.plan.setting import Setting
from qadapt.units import GIB
from qadapt.view.tables import EstimateTable, bar, setting_words

SCHEMA, MAX_SCHEMA, CARDS_SCHEMA = (
    json.loads((Path(qadapt.__file__).parent / "schemas" / f"{name}.schema.json").read_text(encoding="utf-8"))
    for name in ("estimate", "max", "cards")
)
app = typer.Typer()
app.command()(estimate)
app.command()(plan)


@pytest.fixture(autouse=True)
def _cpu_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever machine the tests run on, here it has 16 GiB free and no card."""
    monkeypatch.setattr(targets, "probe", lambda: Machine((), 24 * GIB, 16 * GIB, 100 * GIB))


def run(*arguments: str) -> str:
    result = CliRunner().invoke(app, list(arguments), catch_exceptions=False, env={"COLUMNS": "100"})
    assert result.exit_code == 0, result.output
    return result.output


def values_of(*arguments: str) -> dict[str, Any]:
    values: dict[str, Any] = json.loads(run(*arguments, "--json"))
    return values


def problems(value: Any, schema: dict[str, Any], place: str = "$") -> list[str]:
    """What of a value the schema does not allow: the part of JSON Schema that ours uses."""
    found: list[str] = []
    kinds = {
        "object": dict, "array": list, "string": str, "boolean": bool, "integer": int, "number": (int, float),
        "null": type(None),
    }  # fmt: skip
    names = schema.get("type", [])
    names = [names] if isinstance(names, str) else names
    is_bool_for_number = isinstance(value, bool) and "boolean" not in names
    if names and (is_bool_for_number or not any(isinstance(value, kinds[name]) for name in names)):  # type: ignore[arg-type]
        return [f"{place} is no {names}"]
    if "const" in schema and value != schema["const"]:
        found.append(f"{place} is not {schema['const']}")
    if "enum" in schema and value not in schema["enum"]:
        found.append(f"{place} is none of {schema['enum']}")
    if value is not None and "minimum" in schema and value < schema["minimum"]:
        found.append(f"{place} is below {schema['minimum']}")
    if isinstance(value, dict):
        known = schema.get("properties", {})
        found += [f"{place}.{name} is missing" for name in schema.get("required", []) if name not in value]
        if schema.get("additionalProperties") is False:
            found += [f"{place}.{name} is not in the schema" for name in value if name not in known]
        for name, inner in known.items():
            found += problems(value[name], inner, f"{place}.{name}") if name in value else []
    if isinstance(value, list) and "items" in schema:
        for index, item in enumerate(value):
            found += problems(item, schema["items"], f"{place}[{index}]")
    return found


@pytest.mark.parametrize(
    "arguments",
    [
        ("Llama-3.1-8B", "--card", "RTX 4060", "--length", "4096"),
        ("Llama-3.1-8B", "--card", "RTX 4090", "--rows", "2", "--supervised", "0.3"),
        ("smollm2-135m",),
        ("gemma-2-9b", "--vram", "15GiB", "--recompute", "none"),
        ("Qwen2.5-7B", "--card", "T4", "train.rows_per_step=8", "adapter.rank=4"),
    ],
)
def test_the_json_is_what_its_schema_says(arguments: tuple[str, ...]) -> None:
    values = values_of("estimate", *arguments)
    assert problems(values, SCHEMA) == []
    assert values["peak_allocated_bytes"] == sum(values["categories"].values())
    assert values["fits"] == (
        values["needed_bytes"] + values["error_bytes"] <= values["target"]["free_bytes"]
    )
    assert bool(values["changes"]) != values["fits"]
    assert values["exact"] is False


def test_the_schema_check_can_fail() -> None:
    values = values_of("estimate", "smollm2-135m")
    del values["fits"]
    values["peak_phase"] = "later"
    values["host_bytes"] = True
    values["categories"]["loss"] = -1
    values["more"] = 1
    assert len(problems(values, SCHEMA)) == 5


def test_the_table_shows_categories_verdict_and_ladder() -> None:
    output = run("estimate", "Llama-3.1-8B", "--card", "RTX 4060", "--length", "4096")
    for words in (
        "meta-llama/Llama-3.1-8B",
        "base weights               3.25 GiB",
        "recompute boundaries       1.00 GiB",
        "does not fit: 7.84 ± ",
        "of 7.06 GiB free on RTX 4060 8GB",
        "peak      while the widest layer goes backward",
        "per 1,000 steps",
        "data.length=1536 (-",
        "unknown   this very step on this card; an H100 confirmed steps of Llama-3.1-8B, Qwen2.5-7B,",
    ):
        assert words in output
    fitting = run("estimate", "Llama-3.1-8B", "--card", "RTX 4090", "--length", "2048")
    assert "fits: " in fitting
    assert "What would make it fit" not in fitting


@pytest.mark.parametrize("width", [44, 60, 80, 140])
@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])
def test_the_table_keeps_to_its_width(width: int, encoding: str) -> None:
    stream = io.TextIOWrapper(io.BytesIO(), encoding=encoding, errors="replace")
    console = Console(width=width, file=stream, legacy_windows=False)
    table = EstimateTable(ask("Llama-3.1-8B", (), card="RTX 4060", vram=None).answer())
    lines = "".join(segment.text for segment in console.render(table)).splitlines()
    assert max(len(line) for line in lines) <= width
    assert any(line.startswith("quantization constants") for line in lines)
    bars = "".join(lines)
    assert ("█" in bars) == (encoding == "utf-8" and width > 50)


@pytest.mark.parametrize("what", ["length", "rows", "rank"])
def test_the_most_that_fits_is_asked_the_other_way_round(what: str) -> None:
    values = values_of("estimate", "Llama-3.1-8B", "--card", "RTX 4060", "--length", "256", "--max", what)
    assert problems(values, MAX_SCHEMA) == []
    assert problems(values["estimate"], SCHEMA) == []
    assert values["estimate"]["fits"]
    assert values["estimate"]["setting"][what] == values["value"] > 1
    put = values["estimate"]["setting"]["offload"]
    above = values_of(
        "estimate", "Llama-3.1-8B", f"memory.offload=[{','.join(put)}]", "--card", "RTX 4060",
        "--length", "256", f"--{what}", str(values["value"] + 1),
    )  # fmt: skip
    assert "embeddings" in put and "layers" in put, "as far as a plan goes"
    assert not above["fits"]
    assert above["needed_bytes"] >= values["one_more"]["needed_bytes"], "in pieces, as a plan takes it"
    output = run("estimate", "Llama-3.1-8B", "--card", "RTX 4060", "--length", "256", "--max", what)
    assert f"{values['value']:,}" in output
    assert "no longer surely fits" in output
    assert len(output.splitlines()) <= 16, "a short screen"


def test_the_context_caps_the_longest_row_and_is_said() -> None:
    output = run("estimate", "Llama-2-7b-hf", "--card", "RTX 4090", "--max", "length")
    assert "longest row: 4,096 tokens, the context of meta-llama/Llama-2-7b-hf; memory would allow" in output


def test_rows_are_capped_by_those_of_a_step_where_a_recipe_says_so() -> None:
    asked = ("estimate", "smollm2-135m", "--card", "RTX 4090", "--length", "64", "--max", "rows")
    assert values_of(*asked, "train.rows_per_step=12")["value"] == 12
    assert values_of(*asked, "adapter.rank=4")["value"] > 12


def test_where_nothing_fits_the_cheapest_changes_are_shown() -> None:
    asked = ("estimate", "Llama-3.1-8B", "--vram", "1GiB", "--max", "length")
    output = run(*asked)
    assert "longest row: none; even 1 token does not surely fit" in output
    assert "a larger card, such as the RTX" in " ".join(output.split())
    values = values_of(*asked)
    assert problems(values, MAX_SCHEMA) == []
    assert (values["value"], values["one_more"], values["is_at_ceiling"]) == (None, None, False)
    assert values["estimate"]["changes"]


def test_the_largest_model_is_named_with_its_runners_up() -> None:
    values = values_of("estimate", "--card", "RTX 4060", "--length", "1024", "--max", "model")
    assert problems(values, MAX_SCHEMA) == []
    fitting = [model for model in values["models"] if model["fits"]]
    assert values["value"] == fitting[0]["name"]
    assert fitting[0]["parameters"] == max(model["parameters"] for model in fitting)
    output = run("estimate", "--card", "RTX 4060", "--length", "1024", "--max", "model")
    assert f"largest model: {values['value']}" in output
    assert all(model["name"] in output for model in fitting[:6])
    refused = [model for model in values["models"] if model["refusal"]]
    long = values_of("estimate", "--card", "RTX 4090", "--length", "9000", "--max", "model")
    refused = [model for model in long["models"] if model["refusal"]]
    assert refused
    assert all(model["needed_bytes"] is None for model in refused)
    assert "Not asked" in run("estimate", "--card", "RTX 4090", "--length", "9000", "--max", "model")
    assert "none of the known ones" in run("estimate", "--vram", "64MiB", "--max", "model")


def test_a_named_model_gives_the_largest_one_its_setting() -> None:
    asked = ("--card", "RTX 4060", "--max", "model")
    assert (
        values_of("estimate", "TinyLlama-1.1B-Chat-v1.0", "adapter.rank=64", *asked)["models"]
        != values_of("estimate", *asked)["models"]
    )


@pytest.mark.parametrize("asked", [None, "length", "rank"])
def test_all_cards_make_a_matrix(asked: str | None) -> None:
    more = () if asked is None else ("--max", asked)
    values = values_of("estimate", "Llama-3.1-8B", "--all-cards", "--length", "512", *more)
    assert problems(values, CARDS_SCHEMA) == []
    assert [row["name"] for row in values["cards"]] == [card.name for card in cards()]
    assert (values["asked"], values["cards"][0]["value"] is None) == (asked, asked is None)
    one = values_of("estimate", "Llama-3.1-8B", "--card", "RTX 4060 8GB", "--length", "512", *more)
    row = next(row for row in values["cards"] if row["name"] == "RTX 4060 8GB")
    assert row["needed_bytes"] == one.get("estimate", one)["needed_bytes"]
    assert row["value"] == one.get("value")


@pytest.mark.parametrize("asked", [(), ("--max", "length"), ("--max", "rows")])
def test_the_matrix_is_readable_at_80_columns(asked: tuple[str, ...]) -> None:
    result = CliRunner().invoke(
        app,
        ["estimate", "Llama-3.1-8B", "--all-cards", *asked],
        catch_exceptions=False,
        env={"COLUMNS": "80"},
    )
    lines = result.output.splitlines()
    assert max(len(line) for line in lines) <= 80
    for card in cards():
        line = next(line for line in lines if line.startswith(f"{card.name} "))
        assert f"{card.free_bytes(this_platform()) / GIB:.2f}" in line
    assert "T4 16GB: no bf16, so fp16 with fp32 adapters." in result.output


def test_what_runs_measured_here_is_said_and_widens_the_verdict() -> None:
    before = ask("Qwen2.5-0.5B", (), card=None, vram=None)
    assert values_of("estimate", "Qwen2.5-0.5B")["calibration"] is None
    predicted = before.estimate()
    for share in (1.5, 1.58, 1.6):
        peak_bytes = predicted.peak_allocated_bytes
        assert remember(
            kind_of(model="Qwen/Qwen2.5-0.5B", device="cpu", method="lora", quantization="nf4"),
            predicted_bytes=peak_bytes,
            measured_bytes=round(share * peak_bytes),
        )
    values = values_of("estimate", "Qwen2.5-0.5B")
    assert problems(values, SCHEMA) == []
    assert values["calibration"]["runs"] == 3
    assert values["error_bytes"] > predicted.error_bytes
    assert round(values["error_bytes"] / values["peak_allocated_bytes"], 2) == 0.6
    output = " ".join(run("estimate", "Qwen2.5-0.5B").split())
    assert (
        "on this machine: measured 58.0 % above the estimate in the last 3 runs (+50.0 to +60.0 %)" in output
    )
    assert values_of("estimate", "Qwen2.5-0.5B", "--card", "RTX 4060")["calibration"] is None


def test_a_verdict_on_windows_says_that_the_driver_may_spill(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = ("estimate", "Llama-3.1-8B", "--card", "RTX 4060", "--length", "4096")
    assert "host memory: many times slower" not in run(*asked)
    monkeypatch.setattr(targets, "this_platform", lambda: "wsl")
    assert "may put what does not fit into host memory: many times slower, and no error" in run(*asked)
    assert values_of(*asked)["target"]["may_spill"]


def test_a_bar_shows_anything_above_nothing() -> None:
    assert (bar(1.0, 4), bar(0.5, 4), bar(0.001, 4), bar(0.0, 4)) == ("████", "██", "▏", "")
    assert (bar(0.5, 4, is_ascii=True), bar(0.001, 4, is_ascii=True)) == ("##", "#")


def test_without_a_card_it_is_this_machine() -> None:
    values = values_of("estimate", "Qwen2.5-0.5B")
    assert values["target"]["device"] == "cpu"
    assert (values["setting"]["compute_dtype"], values["setting"]["adapter_dtype"]) == ("fp32", "fp32")
    assert (values["setting"]["optimizer"], values["context_bytes"]) == ("adamw", 0)
    assert values["host_bytes"] > values["peak_allocated_bytes"]


def test_turing_gets_fp16_with_fp32_adapters() -> None:
    setting = values_of("estimate", "Qwen2.5-1.5B", "--card", "T4")["setting"]
    assert (setting["compute_dtype"], setting["adapter_dtype"]) == ("fp16", "fp32")


def test_options_and_overrides_reach_the_step() -> None:
    setting = values_of(
        "estimate", "smollm2-135m", "adapter.rank=8", "memory.micro_batch=2", "train.rows_per_step=4",
        "--length", "300", "--card", "4060",
    )["setting"]  # fmt: skip
    assert (setting["rank"], setting["rows"], setting["length"], setting["accumulates"]) == (8, 2, 300, True)
    assert values_of("estimate", "smollm2-135m", "--rows", "3")["micro_batches_per_step"] == 1


@pytest.fixture()
def recipe(tmp_path: Path) -> Path:
    path = tmp_path / "mine.yaml"
    path.write_text(
        "model: meta-llama/Llama-3.1-8B\n"
        "data: {sources: [{path: rows.jsonl}], length: 512}\n"
        "run: {name: mine}\n",
        encoding="utf-8",
    )
    return path


def test_a_recipe_is_planned_with_reasons(recipe: Path) -> None:
    values = values_of("plan", str(recipe), "--card", "RTX 3060 12GB")
    assert problems(values, SCHEMA) == []
    assert values["fits"]
    assert len(values["reasons"]) == 2
    assert values["micro_batches_per_step"] * values["setting"]["rows"] >= 16
    answers = values_of("plan", str(recipe), "--card", "RTX 3060 12GB", "--supervised", "0.2")
    assert answers["setting"]["supervised_share"] == 0.2
    assert answers["seconds_per_1000_steps"] < values["seconds_per_1000_steps"]
    output = run("plan", str(recipe), "--card", "RTX 3060 12GB")
    assert "The plan, each choice with its price:" in output
    assert "rows at a time" in output or "row at a time" in output


def test_a_recipe_is_estimated_as_it_stands(recipe: Path) -> None:
    values = values_of("estimate", str(recipe), "memory.micro_batch=4", "--vram", "20GiB")
    assert (values["setting"]["rows"], values["micro_batches_per_step"]) == (4, 4)
    budget = values_of("estimate", str(recipe), "memory.budget=9GiB", "--card", "RTX 4090")
    assert (budget["target"]["free_bytes"], budget["target"]["assumption"]) == (9 * GIB, "memory.budget")


def test_models_and_cards_are_listed() -> None:
    models = run("estimate", "--models")
    assert "mistralai/Mistral-7B-v0.3" in models and "7.25 B" in models
    assert "RTX 5090 32GB" in run("estimate", "--cards")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("estimate",), "needs a model or a recipe"),
        (("estimate", "Llma-3.1-8B"), "Did you mean `meta-llama/Llama-3.1-8B`?"),
        (("estimate", "no-such.yaml"), "There is no recipe file 'no-such.yaml'"),
        (("estimate", "Llama-3.1-8B", "--card", "RTX 4061"), "Did you mean `RTX 4060 8GB`?"),
        (("estimate", "Llama-3.1-8B", "--vram", "7.3"), "'7.3' is not an amount of memory"),
        (("estimate", "Llama-3.1-8B", "--length", "0"), "length = 0"),
        (("estimate", "Llama-3.1-8B", "--rows", "-1"), "rows = -1"),
        (("estimate", "Llama-2-7b-hf", "--length", "5000"), "above the context"),
        (("estimate", "Llama-3.1-8B", "--rank", "5000"), "rank = 5000 is above 1024"),
        (("estimate", "Llama-3.1-8B", "--recompute", "some"), "Give all, none, or how many"),
        (("estimate", "Llama-3.1-8B", "--recompute", "0"), "recompute = 0"),
        (("estimate", "Llama-3.1-8B", "--recompute", "-2"), "recompute = -2"),
        (("estimate", "Llama-3.1-8B", "--recompute", "33"), "has 32 layers.\nGive all, none, or"),
        (("estimate", "Llama-3.1-8B", "adaptr.rank=3"), "did you mean `adapter`?"),
        (("estimate", "Llama-3.1-8B", "adapter.rank"), "is not an override"),
        (("plan", "Llama-3.1-8B"), "There is no recipe file"),
        (("estimate", "Llama-3.1-8B", "--max", "width"), "Give one of: length, rows, rank, model."),
        (("estimate", "--max", "length"), "needs a model or a recipe"),
        (("estimate", "--all-cards"), "needs a model or a recipe"),
        (("estimate", "--all-cards", "--max", "model"), "--max model about all of them"),
        (("estimate", "Llama-3.1-8B", "--all-cards", "--max", "model"), "--max model about all of them"),
        (("estimate", "Llama-3.1-8B", "--all-cards", "--card", "4060"), "contradict each other"),
        (("estimate", "Llama-3.1-8B", "--all-cards", "--vram", "7GiB"), "contradict each other"),
        (("estimate", "Llama-3.1-8B", "--max", "rows", "--length", "-5"), "length = -5"),
        (("estimate", "Llama-3.1-8B", "--vram", "-3GiB"), "'-3GiB' is not an amount of memory"),
        (("estimate", "Llama-3.1-8B", "--vram", "0GiB"), "'0GiB' is not an amount of memory"),
        (("estimate", "Llama-3.1-8B", "--rank", "0"), "rank = 0"),
        (("estimate", "Llama-3.1-8B", "--rank", "-4"), "rank = -4"),
        (("estimate", "Llama-3.1-8B", "--length", "-1"), "length = -1"),
        (("estimate", "Llama-3.1-8B", "--rows", "0"), "rows = 0"),
        (("estimate", "Llama-3.1-8B", "--rows", "99999999999"), "at most 4,096"),
        (("estimate", "Llama-3.1-8B", "--supervised", "0"), "supervised share = 0"),
        (("estimate", "--models", "--json"), "print a list, nothing else"),
        (("estimate", "Llama-3.1-8B", "--supervised", "1.5"), "a share lies between 0 and 1"),
        (("estimate", "Llama-3.1-8B", "--card", ""), "There is no card"),
        (("estimate", "--max", "model", "--length", "-5", "--card", "4060"), "length = -5"),
    ],
)
def test_bad_input_is_one_clear_error(
    arguments: tuple[str, ...], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main.run(list(arguments)) == 2
    said = capsys.readouterr()
    assert words in said.err
    assert said.out == ""
    assert "Traceback" not in said.err
    assert said.err.startswith("error: ")
    assert 2 <= len(said.err.splitlines()) <= 3, "the problem and its cure"


FOLDERS: dict[str, tuple[dict[str, Any], str]] = {
    "vision": ({"model_type": "llava", "vision_config": {"hidden_size": 8}}, "no decoder-only text model"),
    "encoder-decoder": ({"model_type": "t5", "is_encoder_decoder": True}, "no decoder-only text model"),
    "contradiction": (
        {"model_type": "llama", "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
         "num_attention_heads": 4, "num_key_value_heads": 3, "vocab_size": 99, "max_position_embeddings": 64},
        "3 key-value heads",
    ),
    "missing field": ({"model_type": "llama", "hidden_size": 64}, "a positive whole number is needed"),
}  # fmt: skip


@pytest.mark.parametrize("kind", FOLDERS)
def test_a_folder_that_is_no_model_for_this_is_one_clear_error(
    kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config, words = FOLDERS[kind]
    (tmp_path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    assert main.run(["estimate", str(tmp_path), "--card", "4060"]) == 2
    said = capsys.readouterr()
    assert words in said.err
    assert (said.out, "Traceback" in said.err) == ("", False)


def test_a_plan_that_cannot_fit_names_the_cheapest_change(recipe: Path) -> None:
    with pytest.raises(QadaptError, match="Cheapest change: "):
        CliRunner().invoke(
            app,
            ["plan", str(recipe), "data.length=8192", "memory.offload=none", "--card", "4060"],
            catch_exceptions=False,
        )


FRESH = """
import sys, time
start = time.process_time()
from qadapt.cli.main import run
run(["estimate", "meta-llama/Llama-3.1-8B", "--card", "RTX 4060 8GB", "--length", "4096"])
seconds = time.process_time() - start
heavy = {"torch", "transformers", "peft", "bitsandbytes", "qadapt.recipe"} & set(sys.modules)
print("HEAVY", sorted(heavy), "SECONDS", seconds)
"""


def test_a_known_model_is_estimated_at_once_without_torch_or_a_recipe() -> None:
    command, seconds = [sys.executable, "-c", FRESH], []
    for _ in range(3):
        start = time.perf_counter()
        result = subprocess.run(command, capture_output=True, text=True, encoding="utf-8")
        elapsed = time.perf_counter() - start
        assert "does not fit" in result.stdout, result.stderr
        last = result.stdout.splitlines()[-1]
        assert last.startswith("HEAVY [] SECONDS")
        seconds.append(float(last.split()[-1]))
        if seconds[-1] < 0.5 and elapsed < 5:
            return
    pytest.fail(f"{seconds} seconds of the processor, {elapsed:.1f} s in the end")


def test_a_settings_line_names_what_is_chunked_cut_and_put_away() -> None:
    setting = Setting(loss_chunk=64, mlp_tiles=4, offload=("embeddings", "boundaries"))
    pieces = "loss of 64 tokens at a time · feed-forward in 4 pieces · embeddings, boundaries on the host"
    assert f" · every layer recomputed · {pieces} · " in setting_words(setting)
    assert "boundaries in a temporary file" in setting_words(Setting(device="cpu", offload=("boundaries",)))
    assert "loss of all tokens at once" in setting_words(Setting(loss_chunk=0))
    assert " · every layer recomputed · adamw" in setting_words(Setting())
