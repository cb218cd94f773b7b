"""Trained runs in the store: what is known of them, talking to them by name, and finding what broke."""

from __future__ import annotations

import json
import shutil
from collections.abc import Generator, Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from killed_store import RECORD, source
from test_train import changed, make_recipe
from two_adapters import first_stages

from qadapt.adapters.store import Store
from qadapt.cli.main import run as command
from qadapt.errors import BadAdapter
from qadapt.methods import METHODS, Method
from qadapt.run import load, train
from qadapt.train.stored_plan import read_plan
from qadapt.trained import bisecting
from qadapt.trained.bisecting import Break, Tried, ancestors, bisect
from qadapt.trained.keeping import add
from qadapt.trained.loading import load_tuned

if TYPE_CHECKING:
    from conftest import TinyModel


@pytest.mark.parametrize("method", METHODS)
def test_a_run_is_kept_with_all_that_is_known_and_answers_by_its_name(
    method: Method, tmp_path: Path, tiny_model: TinyModel, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = make_recipe(tmp_path, tiny_model("llama"), steps=7 if method == "adalora" else 6)
    given: dict[str, Any] = {"rank": 4, "alpha": 4} if METHODS[method].has_rank else {}
    rank = {name: value for name, value in given.items() if name not in METHODS[method].unused}
    if METHODS[method].attends:
        rank["targets"] = first_stages(recipe)
    adapter = type(recipe.adapter)(method=method, **rank)  # type: ignore[arg-type]
    recipe = recipe.model_copy(update={"adapter": adapter})
    list(train(recipe))
    store, runs = Store(tmp_path / "adapters"), recipe.run.folder
    version = add("first", store, name="summaries", folder=runs).version
    plan = read_plan(Path(runs) / "first" / "plan.json")
    assert (version.record.source, version.record.method) == ("run first", method)
    assert version.record.data == plan.ingredients.rows
    assert version.record.recipe == plan.recipe
    assert version.record.metrics["steps"] == plan.steps
    assert version.record.facts.prompt_fingerprint == plan.ingredients.template

    ids = torch.arange(3, 40)[None]
    with torch.no_grad():
        kept = load_tuned(store.folder_of(version.id), device=torch.device("cpu"))
        expected = load("first", folder=runs).model(input_ids=ids).logits
        assert torch.equal(kept.model(input_ids=ids).logits, expected)

    def answers(what: str) -> Any:
        words = [what, "--prompt", "say 3", "--longest", "6", "--folder", runs, "--store", str(store.path)]
        assert command(["chat", *words, "--json"]) == 0
        return json.loads(capsys.readouterr().out)["answers"]

    assert answers("summaries") == answers(version.id[:8]) == answers("first")


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_a_run_with_new_tokens_is_kept_with_its_tokenizer(
    family: str, tmp_path: Path, tiny_model: TinyModel
) -> None:
    recipe = changed(make_recipe(tmp_path, tiny_model(family)), "data", new_tokens=("<a1>", "<b2>"))
    list(train(recipe))
    version = add("first", Store(tmp_path / "adapters"), folder=recipe.run.folder).version
    assert {"tokenizer.json", "prompt.json"} <= set(version.files)


def test_a_version_is_not_loaded_on_another_base(
    tmp_path: Path, tiny_model: TinyModel, capsys: pytest.CaptureFixture[str]
) -> None:
    base = Path(shutil.copytree(tiny_model("llama"), tmp_path / "base"))
    recipe = make_recipe(tmp_path, base)
    list(train(recipe))
    store = Store(tmp_path / "adapters")
    add("first", store, name="bot", folder=recipe.run.folder)
    [weights] = base.glob("*.safetensors")
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    assert command(["chat", "bot", "--prompt", "say 3", "--store", str(store.path)]) == 2
    assert "is not the model this adapter was trained on" in capsys.readouterr().err


def history(place: Path, count: int) -> tuple[Store, list[str]]:
    """A store with a line of versions, `0` to `count - 1`."""
    store = Store(place / "adapters")
    added = [store.add(source(place, str(number)), RECORD, name="bot") for number in range(count)]
    return store, [each.version.id for each in added]


@pytest.fixture
def answers(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """What is asked; a version answers its number, which its weights begin with."""
    asked: list[int] = []

    class Numbered:
        def __init__(self, prompt: str, longest: int) -> None:
            assert (prompt, longest) == ("Which?", 256)

        def answer(self, folder: Path) -> str:
            weights = (folder / "adapter_model.safetensors").read_text()
            asked.append(int(weights[: len(weights) // 100]))
            return "right" if asked[-1] < BROKEN[0] else "wrong"

    monkeypatch.setattr(bisecting, "Asker", Numbered)
    return asked


BROKEN = [0]


def kept_end(tries: Generator[Tried, None, Break]) -> Iterator[Any]:
    """What is yielded, and then what is returned."""
    found = yield from tries
    yield found


@pytest.mark.parametrize("broken", range(1, 9))
def test_the_version_that_broke_is_found_by_asking_few(
    tmp_path: Path, answers: list[int], broken: int
) -> None:
    BROKEN[0] = broken
    store, line = history(tmp_path, 9)
    tries = kept_end(bisect(store, "bot", prompt="Which?", expected="right"))
    asked = list(tries)
    found = asked.pop()
    assert found == Break(right=line[broken - 1], broken=line[broken])
    assert [line.index(each.version) for each in asked] == answers
    assert len(asked) <= 2 + 3
    assert all(each.is_right == (line.index(each.version) < broken) for each in asked)


def test_what_is_not_broken_or_never_was_right_is_said(tmp_path: Path, answers: list[int]) -> None:
    store, line = history(tmp_path, 3)
    for broken, problem in (
        (9, f"{line[2][:12]} answers right"),
        (0, f"{line[0][:12]}, does not answer right"),
    ):
        BROKEN[0] = broken
        with pytest.raises(BadAdapter, match=problem):
            list(bisect(store, "bot", prompt="Which?", expected="right"))
    with pytest.raises(BadAdapter, match="does not answer right"):
        list(bisect(store, line[0], prompt="Which?", expected="right"))


def test_a_line_goes_back_as_far_as_the_store_has_it(tmp_path: Path) -> None:
    store, line = history(tmp_path, 4)
    side = store.add(source(tmp_path, "9"), replace(RECORD, method="dora"), name="side", parent=line[1])
    assert ancestors(store, line[3]) == line
    assert ancestors(store, side.version.id) == [*line[:2], side.version.id]
    store.remove(line[1])
    assert ancestors(store, line[3]) == line[2:]


def test_the_command_says_every_answer_and_what_broke(
    tmp_path: Path, answers: list[int], capsys: pytest.CaptureFixture[str]
) -> None:
    BROKEN[0] = 2
    store, line = history(tmp_path, 4)
    words = ["bot", "--prompt", "Which?", "--expect", "right", "--store", str(store.path)]
    assert command(["adapters", "bisect", *words]) == 0
    said = capsys.readouterr().out
    assert f"{line[3][:12]} broken: wrong" in said
    assert f"It broke with {line[2][:12]}; {line[1][:12]} before it is right." in said
    assert command(["adapters", "bisect", *words, "--json"]) == 0
    values = json.loads(capsys.readouterr().out)
    assert (values["right"], values["broken"], len(values["asked"])) == (line[1], line[2], 4)
