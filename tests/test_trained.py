"""An adapter of the store, or of any folder, is measured, exported and proven as the run's that made it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from safetensors.torch import load_file
from test_train import make_recipe

from qadapt.adapters.store import SHOWN, Store
from qadapt.cli.main import run as command
from qadapt.errors import BadRecipe, BadRun
from qadapt.events import Evaluated, Event, StepDone, Warned
from qadapt.exporting.export import export
from qadapt.exporting.proving import Verified, verify_export
from qadapt.run import evaluate, load, train
from qadapt.run_folder import RunFolder
from qadapt.trained.adapter import find_trained, of_run
from qadapt.trained.keeping import add
from qadapt.view.journal import read_events

if TYPE_CHECKING:
    from conftest import TinyModel

NOWHERE = "no-such-folder"


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory, tiny_model: TinyModel) -> Iterator[Path]:
    """A folder with the run `first` in `runs`, and its adapter as `bot` in `adapters`."""
    place = tmp_path_factory.mktemp("trained")
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("qadapt.hardware.calibration.calibration_file", lambda: place / "calibration.jsonl")
        patched.setattr("qadapt.measured.measured_file", lambda: place / "measured.json")
        patched.setattr("qadapt.data.row_cache.data_folder", lambda: place / "cache" / "data")
        list(train(make_recipe(place, tiny_model("llama"))))
        add("first", Store(place / "adapters"), name="bot", folder=str(place / "runs"))
        yield place


@pytest.fixture
def here(root: Path) -> dict[str, str]:
    """Where runs are not, and where the store is."""
    return {"folder": NOWHERE, "store": str(root / "adapters")}


def verified(export_folder: Path, **options: Any) -> Verified:
    found: list[Verified] = []

    def whole() -> Iterator[Event]:
        found.append((yield from verify_export(export_folder, **options)))

    list(whole())
    return found[0]


def test_losses_are_those_of_the_step_whose_adapter_it_is(root: Path, tmp_path: Path) -> None:
    run = RunFolder(Path(shutil.copytree(root / "runs/first", tmp_path / "first")))
    text = run.journal.read_text(encoding="utf-8")
    assert text.count('"best_step": 6') == 1
    run.journal.write_text(text.replace('"best_step": 6', '"best_step": 3'), encoding="utf-8")
    [held_out] = [e.loss for e in read_events(run.path) if isinstance(e, Evaluated) and e.step == 3]
    [training] = [e.loss for e in read_events(run.path) if isinstance(e, StepDone) and e.step == 3]
    assert of_run(run).metrics == {"steps": 6, "training loss": training, "held-out loss": held_out}


def test_a_stored_adapter_is_loaded_and_measured_as_its_run(
    root: Path, here: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    of_its_run, of_the_store = evaluate("first", folder=str(root / "runs")), evaluate("bot", **here)
    assert of_the_store.rows == of_its_run.rows > 0
    assert of_the_store.loss == pytest.approx(of_its_run.loss, rel=1e-5)
    assert of_the_store.base_loss == pytest.approx(of_its_run.base_loss, rel=1e-5)
    assert of_the_store.loss < of_the_store.base_loss
    ids = torch.arange(3, 40)[None]
    with torch.no_grad():
        logits = [
            load(name, **where).model(input_ids=ids).logits
            for name, where in (("bot", here), ("first", {"folder": str(root / "runs")}))
        ]
    assert torch.equal(*logits)
    words = ["evaluate", "bot", "--folder", NOWHERE, "--store", here["store"], "--json"]
    assert command(words) == 0
    assert json.loads(capsys.readouterr().out)["loss"] == pytest.approx(of_its_run.loss, rel=1e-5)


def test_a_folder_that_says_no_rows_is_measured_on_those_of_a_file(root: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(root / "runs/first/adapter", tmp_path / "mine")
    with pytest.raises(BadRun, match="Nothing says which rows were held out") as caught:
        evaluate(str(folder))
    assert "--data" in caught.value.cure
    expected = evaluate("first", folder=str(root / "runs"))
    assert evaluate(str(folder), data=root / "held_out.jsonl").loss == pytest.approx(expected.loss, rel=1e-5)


@pytest.mark.parametrize("form", ["merged-fp16", "gguf-q8_0", "adapter"])
def test_a_stored_adapter_is_exported_and_proven_as_its_run(
    root: Path, here: dict[str, str], tmp_path: Path, form: str
) -> None:
    list(export("first", form=form, folder=str(root / "runs"), to=tmp_path / "of run"))
    list(export("bot", form=form, to=tmp_path / "of store", **here))
    proofs = [
        json.loads((tmp_path / each / "proof.json").read_text("utf-8")) for each in ("of run", "of store")
    ]
    version = Store(Path(here["store"])).find("bot")
    assert proofs[1]["made_of"] == proofs[0]["made_of"] | {"run": version[:SHOWN]}
    for part in ("tensors", "prompt", "behaviour", "left_out", "holds"):
        assert proofs[1][part] == proofs[0][part], part
    hashes = [{facts["sha256"] for facts in proof["files"].values()} for proof in proofs]
    assert len(hashes[0] - hashes[1]) <= 2, "the GGUF file says its name, and the Modelfile that of the file"
    assert hashes[0] == hashes[1] or form.startswith("gguf")
    cards = [(tmp_path / each / "README.md").read_text("utf-8") for each in ("of run", "of store")]
    assert "held-out rows: " in cards[1] and "LoRA, rank 4" in cards[1]
    assert str(root) not in cards[1]


def test_an_export_of_the_store_is_proven_again_while_its_version_is_there(
    root: Path, here: dict[str, str], tmp_path: Path
) -> None:
    store = Store(Path(shutil.copytree(here["store"], tmp_path / "kept")))
    where: dict[str, Any] = {"folder": NOWHERE, "store": str(store.path)}
    list(export("bot", form="adapter", to=tmp_path / "out", **where))
    version = store.find("bot")
    store.use("other", "bot")
    store.remove("bot")
    assert verified(tmp_path / "out", **where).proof is not None
    assert verified(tmp_path / "out", run="other", **where).proof is not None
    assert verified(tmp_path / "out", folder=str(root / "runs"), run="first").proof is not None
    store.remove("other")
    store.gc()
    alone = verified(tmp_path / "out", **where)
    assert alone.proof is None and alone.faults == ()
    assert alone.reason == f"the run {version[:SHOWN]} is not here; give it with --run"


def test_of_a_folder_all_is_proven_but_its_answers(root: Path, tmp_path: Path) -> None:
    shutil.copytree(root / "runs/first/adapter", tmp_path / "mine")
    events = list(export(str(tmp_path / "mine"), form="merged-fp16", to=tmp_path / "out", folder=NOWHERE))
    assert any(isinstance(e, Warned) and "Nothing says which rows" in e.message for e in events)
    proof = json.loads((tmp_path / "out/proof.json").read_text("utf-8"))
    assert proof["holds"] and proof["tensors"]["holds"] and proof["behaviour"] is None
    assert proof["left_out"] == ["behaviour: Nothing says which rows the adapter was trained on."]
    list(export("first", form="merged-fp16", folder=str(root / "runs"), to=tmp_path / "of run"))
    weights = [(tmp_path / each / "model.safetensors").read_bytes() for each in ("out", "of run")]
    assert weights[0] == weights[1]


def test_a_combination_is_an_adapter_like_any_other(
    root: Path, here: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    where = ["--folder", NOWHERE, "--store", here["store"]]
    assert command(["adapters", "combine", "bot=0.5", "--to", str(tmp_path / "half"), *where]) == 0
    options: dict[str, Any] = {"form": "merged-fp32", "base": "original"}
    list(export(str(tmp_path / "half"), to=tmp_path / "made", **options))
    list(export({"bot": 0.5}, to=tmp_path / "weighted", **options, **here))
    made, weighted = (load_file(tmp_path / each / "model.safetensors") for each in ("made", "weighted"))
    assert made.keys() == weighted.keys()
    assert all(torch.allclose(made[name], weighted[name], atol=1e-7) for name in made)
    assert "0.5 times that of the adapter bot" in (tmp_path / "weighted/README.md").read_text("utf-8")


def test_what_is_of_no_run_needs_a_place(here: dict[str, str]) -> None:
    with pytest.raises(BadRecipe, match="What is made of the adapter bot belongs to no run") as caught:
        list(export("bot", **here))
    assert "--to" in caught.value.cure
    with pytest.raises(BadRecipe, match="What adapters make together belongs to no run"):
        list(export({"bot": 0.5}, **here))


def test_a_model_is_no_adapter(root: Path, tiny_model: TinyModel) -> None:
    with pytest.raises(BadRun, match="is a model, and no adapter"):
        find_trained(str(tiny_model("llama")))


def test_a_recipe_of_another_release_is_not_known(root: Path, tmp_path: Path) -> None:
    store = Store(Path(shutil.copytree(root / "adapters", tmp_path / "adapters")))
    version = store.version(store.find("bot"))
    recipe = {**version.record.recipe, "of_tomorrow": {}}
    store.add(store.folder_of(version.id), replace(version.record, recipe=recipe), name="later")
    found = find_trained("later", folder=NOWHERE, store=str(store.path))
    assert (found.recipe, found.said_method) == (None, "LoRA")
    assert (found.name, found.rows) == ("later", version.record.data)


def test_virtual_tokens_stand_before_rows_that_no_recipe_speaks_of(
    tmp_path: Path, tiny_model: TinyModel
) -> None:
    recipe = make_recipe(tmp_path, tiny_model("llama"), steps=2, evaluate_every=None)
    adapter = type(recipe.adapter)(method="prompt", rank=4)
    list(train(recipe.model_copy(update={"adapter": adapter})))
    folder = shutil.copytree(tmp_path / "runs/first/adapter", tmp_path / "mine")
    expected = evaluate("first", folder=str(tmp_path / "runs"))
    found = evaluate(str(folder), data=tmp_path / "held_out.jsonl")
    assert (found.loss, found.base_loss) == pytest.approx((expected.loss, expected.base_loss), rel=1e-5)
