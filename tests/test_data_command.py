"""`qadapt data check` and `qadapt data preview` as a user runs them: what they say, write and refuse."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from test_data_check import Page
from test_estimate_command import problems

import qadapt
from qadapt.cli.main import run
from qadapt.model.source import ModelFiles, find_model

if TYPE_CHECKING:
    from conftest import TinyModel

SCHEMA = json.loads(
    (Path(qadapt.__file__).parent / "schemas" / "data.schema.json").read_text(encoding="utf-8")
)
EVIL = "\x1b]0;title\x07[red]<script>x</script>"


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Prepared rows of the tests stay out of the user's cache; the screen is wide."""
    monkeypatch.setattr("qadapt.data.row_cache.data_folder", lambda: tmp_path / "cache")
    monkeypatch.setenv("COLUMNS", "200")


def conversation(*turns: str) -> dict[str, Any]:
    roles = ("user", "assistant")
    return {"messages": [{"role": roles[n % 2], "content": turn} for n, turn in enumerate(turns)]}


ROWS = (
    conversation(f"hi {EVIL}", "one 👩‍👩‍👧"),
    *(conversation(f"say {number}", f"{number} it is") for number in range(20)),
    conversation("again", "and", "again", "so " * 200),
    conversation("long", "no " * 300),
    conversation("say 3", "3 it is"),
    conversation("why " * 200, "because"),
)


def write_recipe(folder: Path, model: Path, *, rows: Any = ROWS, more: str = "") -> str:
    data = folder / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    recipe = folder / "recipe.yaml"
    recipe.write_text(
        f"model: {model}\ndata:\n  sources: [{{path: {data}}}]\n  length: 192\n{more}"
        "train: {rows_per_step: 4, epochs: 2}\n"
        "memory: {compute_dtype: fp32, device: cpu}\nrun: {name: mine}\n",
        encoding="utf-8",
    )
    return str(recipe)


def test_check_says_what_a_run_will_see_and_keeps_its_folder_clean(
    tmp_path: Path, tiny_model: TinyModel, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    recipe = write_recipe(tmp_path, tiny_model("llama"))
    assert run(["data", "check", recipe]) == 0
    said = " ".join(capsys.readouterr().out.split())
    for words in (
        "24 to train on; none held out", "messages 25 rows", "1 whole turns left out, 1 cut inside a turn",
        "1 row (4.0%): 1 nothing to learn", "repeated 1 row",
        "12 steps of 4 rows each; 2.00 passes, 6.0 steps a pass", "data.length 192",
        "⟦one 👩‍👩‍👧⟨<|eot_id|>⟩⟧",
        "‹1b›]0;title‹07›[red]<script>", "cut inside an answer, whose end is not learned",
        "see above what to do",
    ):  # fmt: skip
        assert words in said, words
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cache", "recipe.yaml", "rows.jsonl"]


def test_check_as_json_is_what_its_schema_says(
    tmp_path: Path, tiny_model: TinyModel, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = write_recipe(tmp_path, tiny_model("llama"), more="  held_out_fraction: 0.2\n")
    assert run(["data", "check", recipe, "--json", "train.steps=7"]) == 0
    values = json.loads(capsys.readouterr().out)
    assert problems(values, SCHEMA) == []
    assert values["rows"] + values["held_out_rows"] == 24
    assert sum(values["lengths"]["histogram"]["counts"]) == values["rows"]
    assert values["cut_rows"] == {"turns": 1, "inside": 1}
    assert values["left_out_rows"] == {"truncated": 1}
    assert values["steps"] == 7
    assert values["supervised_share"] == values["supervised_tokens"] / values["tokens"]
    assert 0 <= values["layout"]["padding_share"] < 1
    assert values["forecast"]["peak_bytes"] > 0
    assert math.ceil(values["pass_rows"] / 4) >= 4
    assert any("whole turns" in each["message"] for each in values["problems"])


def test_the_schema_names_every_field_and_can_fail(
    tmp_path: Path, tiny_model: TinyModel, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = write_recipe(tmp_path, tiny_model("llama"))
    assert run(["data", "check", recipe, "--json"]) == 0
    values = json.loads(capsys.readouterr().out)
    assert sorted(values) == sorted(SCHEMA["properties"])
    del values["rows"]
    values["steps"] = "many"
    values["mood"] = "good"
    assert len(problems(values, SCHEMA)) == 3


def test_a_pass_counts_rows_by_the_weights_of_their_sources(
    tmp_path: Path, tiny_model: TinyModel, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe, data = write_recipe(tmp_path, tiny_model("llama")), tmp_path / "rows.jsonl"
    sources = f"data.sources=[{{path: {data}, weight: 2}}]"
    assert run(["data", "check", recipe, sources, "--json"]) == 0
    values = json.loads(capsys.readouterr().out)
    assert values["pass_rows"] == 2 * values["rows"]
    assert values["pass_tokens"] == 2 * values["tokens"]
    assert run(["data", "check", recipe, sources]) == 0
    assert f"{values['pass_tokens']:,} a pass, by weights" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize("command", ["check", "preview"])
def test_no_weights_are_fetched_to_look_at_rows(
    tmp_path: Path, tiny_model: TinyModel, monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    asked: list[bool] = []

    def find(source: str, *, needs_weights: bool, **options: Any) -> ModelFiles:
        asked.append(needs_weights)
        return find_model(source, **options)

    monkeypatch.setattr("qadapt.running.material.find_model", find)
    monkeypatch.setattr("qadapt.running.data_check.find_model", find)
    assert run(["data", command, write_recipe(tmp_path, tiny_model("llama"))]) == 0
    assert asked == [False]


def test_what_was_prepared_is_kept(tmp_path: Path, tiny_model: TinyModel) -> None:
    recipe = write_recipe(tmp_path, tiny_model("llama"))
    found = []
    for more in ([], ["train.steps=3"], ["data.length=180"]):
        assert run(["data", "check", recipe, "--json", *more]) == 0
        found.append(sum(path.is_dir() for path in (tmp_path / "cache").iterdir()))
    assert found == [1, 1, 2]


def test_a_run_finds_what_was_prepared_by_another_path_of_the_file(
    tmp_path: Path, tiny_model: TinyModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    recipe = write_recipe(tmp_path, tiny_model("llama"))
    relative = "data.sources=[{path: rows.jsonl}]"
    assert run(["data", "check", recipe, relative]) == 0
    assert run(["train", recipe, relative, "train.epochs=0.1", "train.rehearse=false"]) == 0
    assert sum(path.is_dir() for path in (tmp_path / "cache").iterdir()) == 1


def test_html_is_one_page_with_so_many_rows(
    tmp_path: Path, tiny_model: TinyModel, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe, path = write_recipe(tmp_path, tiny_model("llama")), tmp_path / "rows.html"
    assert run(["data", "check", recipe, "--html", str(path), "-n", "3"]) == 0
    said = capsys.readouterr().out
    assert str(path) in said
    assert "row 1 ·" not in said
    page = Page(path.read_text(encoding="utf-8"))
    assert page.open == []
    assert page.tags.count("h3") == 3
    assert "script" not in page.tags
    assert "3 to train on" not in said
    assert run(["data", "check", recipe, "--html", str(path)]) == 0
    assert Page(path.read_text(encoding="utf-8")).tags.count("h3") == 20


def test_preview_shows_the_first_rows_and_why_one_would_be_left_out(
    tmp_path: Path, tiny_model: TinyModel, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = write_recipe(tmp_path, tiny_model("llama"))
    assert run(["data", "preview", recipe, "-n", "3"]) == 0
    said = capsys.readouterr().out
    assert [f"row {number} ·" in said for number in (1, 3, 4)] == [True, True, False]
    assert run(["data", "preview", recipe, "--row", "25", "--ids"]) == 0
    said = capsys.readouterr().out
    assert "rows.jsonl, line 25" in said
    assert "LEFT OUT: nothing to learn within data.length" in said
    assert "row 1 ·" not in said
    assert run(["data", "preview", recipe, "--row", "22"]) == 0
    assert "whole turns left out at the end" in capsys.readouterr().out


def test_preview_reads_no_further_than_it_shows(
    tmp_path: Path, tiny_model: TinyModel, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = write_recipe(tmp_path, tiny_model("llama"), rows=(*ROWS, {"nonsense": 1}))
    assert run(["data", "preview", recipe, "-n", "2"]) == 0
    assert run(["data", "check", recipe]) == 2
    assert "line 26" in capsys.readouterr().err


def test_a_row_that_the_template_refuses_says_so_in_its_place(
    tmp_path: Path, tiny_model: TinyModel, capsys: pytest.CaptureFixture[str]
) -> None:
    wrong = {"messages": [{"role": "assistant", "content": "first"}, {"role": "user", "content": "x"}]}
    recipe = write_recipe(tmp_path, tiny_model("mistral"), rows=(wrong, conversation("a", "b")))
    assert run(["data", "preview", recipe]) == 0
    said = capsys.readouterr().out
    assert "refused: " in said
    assert "row 2 ·" in said


def test_a_long_row_is_shortened_unless_asked(
    tmp_path: Path, tiny_model: TinyModel, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = (conversation("why", "no " * 900),)
    recipe = write_recipe(tmp_path, tiny_model("llama"), rows=rows)
    assert run(["data", "preview", recipe, "data.length=2000"]) == 0
    assert "learned tokens not shown" in capsys.readouterr().out
    assert run(["data", "preview", recipe, "data.length=2000", "--whole"]) == 0
    said = capsys.readouterr().out
    assert "not shown" not in said
    assert said.count("no") >= 900


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (["data", "check", "{recipe}", "--html", "rows.txt"], "the page is HTML"),
        (["data", "check", "{recipe}", "--html", "{folder}/none/rows.html"], "there is no folder"),
        (["data", "check", "{recipe}", "data.lenght=5"], "did you mean"),
        (["data", "check", "nothing.yaml"], "There is no recipe file"),
        (["data", "preview", "{recipe}", "--row", "99"], "There is no row 99"),
        (["data", "preview", "{recipe}", "-n", "0"], "greater than or equal to 1"),
        (["data", "chek"], "No such command"),
    ],
)
def test_bad_input_is_one_message_and_exit_code_2(
    tmp_path: Path,
    tiny_model: TinyModel,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    problem: str,
) -> None:
    recipe = write_recipe(tmp_path, tiny_model("llama"))
    assert run([each.format(recipe=recipe, folder=tmp_path) for each in arguments]) == 2
    said = capsys.readouterr()
    assert problem in " ".join(said.err.split())
    assert said.out == ""


def test_what_does_not_fit_is_a_problem_with_its_cure_and_no_error(
    tmp_path: Path, tiny_model: TinyModel, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = write_recipe(tmp_path, tiny_model("llama"))
    assert run(["data", "check", recipe, "memory.budget=1KiB"]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "not planned: " in said
    assert "1.0 KiB are free" in said
