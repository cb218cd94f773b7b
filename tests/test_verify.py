"""An export of a run, proven as it is made, and `qadapt verify` on a later day."""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from rich.console import Console
from safetensors.torch import load_file, save_file

from qadapt.cli.main import run
from qadapt.cli.stages import drawn as drawn_on
from qadapt.data.prepared import identify, prepare_part
from qadapt.data.prompt import load_contract, saved_contract
from qadapt.errors import BadExport, BadRun
from qadapt.events import Event, Exported, Warned
from qadapt.export import writing
from qadapt.export.gguf_prompt_proof import prove_gguf_prompt
from qadapt.exporting import proving
from qadapt.exporting.export import export
from qadapt.exporting.proving import Verified, verify_export
from qadapt.recipe_file import check_recipe, read_recipe
from qadapt.run import train
from qadapt.run_folder import RunFolder
from qadapt.running.material import divided, reading_of, training_sources
from qadapt.trained.adapter import of_run
from qadapt.trained.measuring import rows_to_prove
from qadapt.trained.same_base import find_same_base

if TYPE_CHECKING:
    from conftest import TinyModel


def write_rows(path: Path, numbers: range) -> Path:
    rows = [
        {
            "messages": [
                {"role": "user", "content": f"say {n}"},
                {"role": "assistant", "content": f"private{n}"},
            ]
        }
        for n in numbers
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, tiny_model: TinyModel) -> Iterator[Path]:
    """A folder of runs with a short one, `first`, and its merged export, proven."""
    root = tmp_path_factory.mktemp("verify")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("qadapt.hardware.calibration.calibration_file", lambda: root / "calibration.jsonl")
        patch.setattr("qadapt.measured.measured_file", lambda: root / "measured.json")
        patch.setattr("qadapt.data.row_cache.data_folder", lambda: root / "cache" / "data")
        values = {
            "model": str(tiny_model("llama")),
            "adapter": {"rank": 4},
            "data": {
                "sources": [{"path": str(write_rows(root / "rows.jsonl", range(24)))}],
                "held_out": str(write_rows(root / "held_out.jsonl", range(100, 106))),
                "length": 128,
            },
            "train": {"steps": 4, "rows_per_step": 6, "learning_rate": 1e-2, "rehearse": False},
            "memory": {"compute_dtype": "fp32", "micro_batch": 2},
            "run": {"name": "first", "folder": str(root / "runs")},
        }
        list(train(check_recipe(values, origin="test")))
        list(export("first", form="merged-fp16", folder=str(root / "runs")))
        yield root


@pytest.fixture
def runs(trained: Path, tmp_path: Path) -> Path:
    """A copy to spoil."""
    shutil.copytree(trained / "runs", tmp_path / "runs")
    return tmp_path / "runs"


def test_an_export_is_proven_as_it_is_made(trained):
    folder = trained / "runs/first/export/merged-fp16"
    proof = json.loads((folder / "proof.json").read_text(encoding="utf-8"))
    assert proof["holds"] and proof["faults"] == [] and proof["left_out"] == []
    assert proof["made_of"]["run"] == "first" and proof["made_of"]["base"] == "dequantized"
    assert proof["tensors"]["tensors"] == 21 and proof["tensors"]["holds"]
    assert proof["prompt"]["conversations"] == 4
    behaviour = proof["behaviour"]
    assert behaviour["rows"] == 6 and behaviour["are_held_out"]
    assert behaviour["same_choice_or_tie"] >= 0.99 and behaviour["mean_divergence"] < 1e-3
    assert behaviour["plain"]["how"] == "in memory"
    text = (folder / "proof.json").read_text(encoding="utf-8")
    assert "private" not in text and str(trained) not in text
    assert "model.safetensors" in proof["files"] and "README.md" not in proof["files"]


def test_verify_repeats_the_whole_proof(runs, capsys):
    folder = runs / "first/export/merged-fp16"
    before = {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}
    assert run(["verify", str(folder)]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "files are what was written" in said
    assert "All 21 tensors as written" in said and "6 held-out rows" in said
    assert run(["verify", str(folder), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["holds"] and found["reason"] is None
    recorded = json.loads(before["proof.json"])
    assert found["proof"]["tensors"] == recorded["tensors"]
    assert found["proof"]["files"] == recorded["files"]
    assert {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()} == before


def test_verify_draws_its_stages_on_a_terminal(runs):
    console = Console(file=io.StringIO(), force_terminal=True, width=80)
    shown = drawn_on(verify_export(runs / "first/export/merged-fp16"), console)
    assert shown.proof is not None
    drawn = [line for line in console.file.getvalue().splitlines() if "━" in line]
    for stage in ("hashing the export", "finding the base", "proving the tensors", "layer by layer"):
        assert any(stage in line for line in drawn), stage


def test_verify_elsewhere_finds_the_run_by_name_or_when_it_is_given(runs, tmp_path):
    moved = tmp_path / "far" / "away" / "mine"
    shutil.copytree(runs / "first/export/merged-fp16", moved)
    assert result_of(moved, folder=str(runs)).proof is not None
    alone = result_of(moved, folder=str(tmp_path / "no runs"))
    assert alone.proof is None and alone.faults == ()
    assert alone.reason == "the run first is not here; give it with --run"
    assert result_of(moved, run=str(runs / "first")).proof is not None


def result_of(export: Path, **options: Any) -> Verified:
    found: list[Verified] = []

    def whole() -> Iterator[Event]:
        found.append((yield from verify_export(export, **options)))

    list(whole())
    return found[0]


@pytest.mark.parametrize("how", ["bit", "gone", "new", "shorter"])
def test_verify_finds_a_file_that_changed_and_ends_with_2(runs, capsys, how):
    folder = runs / "first/export/merged-fp16"
    path = folder / "model.safetensors"
    data = bytearray(path.read_bytes())
    if how == "gone":
        path.unlink()
    elif how == "new":
        (folder / "other.safetensors").write_bytes(b"x")
    else:
        data[-100] ^= 1
        path.write_bytes(data if how == "bit" else data[:-1])
    assert run(["verify", str(folder), "--json"]) == 2
    found = capsys.readouterr()
    name = "other.safetensors" if how == "new" else "model.safetensors"
    assert name in found.err and not json.loads(found.out)["holds"]
    assert json.loads(found.out)["proof"] is None


def test_the_card_may_be_edited(runs):
    folder = runs / "first/export/merged-fp16"
    (folder / "README.md").write_text("mine", encoding="utf-8")
    assert result_of(folder).faults == ()


def test_verify_says_what_cannot_be_repeated(runs):
    folder = runs / "first/export/merged-fp16"
    config = runs / "first/adapter/adapter_config.json"
    config.write_text(config.read_text(encoding="utf-8") + "\n", encoding="utf-8")
    found = result_of(folder)
    assert found.proof is None and found.faults == ()
    assert found.reason == "the run first has another adapter or base than this export was made of"


def test_verify_of_an_export_of_another_model_names_the_fault(runs):
    """Hashes alone would not see a proof that was written for files that are wrong."""
    folder = runs / "first/export/merged-fp16"
    ends = folder / "generation_config.json"
    values = json.loads(ends.read_text(encoding="utf-8"))
    ends.write_text(json.dumps(values | {"eos_token_id": []}), encoding="utf-8")
    proof = json.loads((folder / "proof.json").read_text(encoding="utf-8"))
    proof["files"] = proving.file_facts(folder, lambda _: None)
    (folder / "proof.json").write_text(json.dumps(proof), encoding="utf-8")
    found = result_of(folder)
    assert any("is missing in generation_config.json" in fault for fault in found.faults)


def test_a_failed_proof_leaves_nothing_at_the_target(runs, monkeypatch):
    def without_end_tokens(_: Path, folder: Path) -> None:
        path = folder / "generation_config.json"
        path.write_text(json.dumps({"eos_token_id": []}), encoding="utf-8")

    monkeypatch.setattr(writing, "write_prompt_files", without_end_tokens)
    target = runs / "first/export/merged-bf16"
    with pytest.raises(BadExport, match="is not the model that was trained: the end token"):
        list(export("first", form="merged-bf16", folder=str(runs)))
    assert not target.exists()
    assert sorted(path.name for path in target.parent.iterdir()) == ["merged-fp16"]


def test_without_a_proof_there_is_none(runs):
    events = list(export("first", form="merged-bf16", folder=str(runs), proof=False))
    assert isinstance(events[-1], Exported)
    folder = runs / "first/export/merged-bf16"
    assert not (folder / "proof.json").exists()
    assert run(["verify", str(folder)]) == 2


def test_rows_that_are_gone_are_said_and_the_rest_is_proven(runs, trained, tmp_path):
    rows = trained / "held_out.jsonl"
    kept = rows.read_bytes()
    try:
        write_rows(rows, range(200, 203))
        events = list(export("first", form="merged-bf16", folder=str(runs)))
    finally:
        rows.write_bytes(kept)
    said = [event.message for event in events if isinstance(event, Warned)]
    assert any("is not run beside the live model" in message for message in said)
    proof = json.loads((runs / "first/export/merged-bf16/proof.json").read_text(encoding="utf-8"))
    assert proof["holds"] and proof["behaviour"] is None and proof["tensors"]["holds"]
    assert any("behaviour" in reason for reason in proof["left_out"])


def test_a_run_that_held_out_no_rows_is_proven_on_training_rows(runs):
    """Told so, since such losses say nothing of new rows."""
    recipe = read_recipe(str(runs / "first/recipe.yaml"))
    recipe = recipe.model_copy(update={"data": recipe.data.model_copy(update={"held_out": None})})
    contract = saved_contract(runs / "first/adapter", Path(recipe.model.source))
    part = prepare_part(identify(training_sources(recipe)), reading_of(recipe), contract)
    fingerprint = divided(recipe, [part], contract).rows.fingerprint
    chosen, are_held_out = rows_to_prove(recipe, contract, fingerprint=fingerprint)
    assert not are_held_out and len(chosen.rows) == 24
    with pytest.raises(BadRun, match="are not those that the run first was made of"):
        rows_to_prove(recipe, contract, fingerprint="other")


OTHER_FORMS = {"bnb-4bit": True, "gguf-q8_0": True, "gguf-lora": False, "adapter": False}


@pytest.mark.parametrize(("form", "is_run"), OTHER_FORMS.items())
def test_other_forms_are_proven_as_far_as_they_go(runs, form, is_run):
    list(export("first", form=form, folder=str(runs)))
    folder = runs / "first/export" / form
    proof = json.loads((folder / "proof.json").read_text(encoding="utf-8"))
    assert proof["holds"] and bool(proof["behaviour"]) == is_run
    assert proof["tensors"]["holds"] and proof["tensors"]["tensors"] > 0
    assert bool(proof["left_out"]) == (form != "bnb-4bit")
    if is_run:
        found = proof["behaviour"]
        assert found["exported_loss"] == pytest.approx(found["live_loss"], rel=0.2)
        assert 0 < found["mean_divergence"] < 0.3, "quantized once more: near, and not the same"
        assert bool(found["plain"]) == (form == "bnb-4bit")
    again = result_of(folder)
    assert again.faults == () and again.proof is not None


def forged(folder: Path, **changes: Any) -> Path:
    """An export whose proof.json was written anew for its files as they are now."""
    path = folder / "proof.json"
    proof = json.loads(path.read_text(encoding="utf-8"))
    proof["made_of"] |= changes
    proof["files"] = proving.file_facts(folder, lambda _: None)
    path.write_text(json.dumps(proof), encoding="utf-8")
    return folder


def proof_by(runs: Path, folder: Path, form: str, *, base: str) -> None:
    """Proves any folder as an export of the run `first`."""
    whole = of_run(RunFolder(runs / "first"))
    files = find_same_base(whole.facts)
    list(proving.prove_export(folder, whole, form=form, base=base, files=files))


@pytest.mark.parametrize(("form", "share"), [("gguf-q4_0", 0.002), ("gguf-q8_0", 0.0005)])
def test_an_adapter_left_out_of_a_form_of_few_bits_is_found(runs, tmp_path, form, share):
    """Also one so small that no number is farther off than the form may round it."""
    adapter = runs / "first/adapter/adapter_model.safetensors"
    small = {name: value * (share if "lora_B" in name else 1) for name, value in load_file(adapter).items()}
    save_file(small, adapter)
    shutil.copytree(runs, tmp_path / "bare")
    bare = {name: value * (0 if "lora_B" in name else 1) for name, value in small.items()}
    save_file(bare, tmp_path / "bare/first/adapter/adapter_model.safetensors")
    chosen: dict[str, Any] = {"form": form, "base": "original", "proof": False}
    list(export("first", folder=str(runs), to=tmp_path / "right", **chosen))
    list(export("first", folder=str(tmp_path / "bare"), to=tmp_path / "wrong", **chosen))
    proof_by(runs, tmp_path / "right", form, base="original")
    with pytest.raises(BadExport, match="the adapter is left out"):
        proof_by(runs, tmp_path / "wrong", form, base="original")
    assert not (tmp_path / "wrong" / "proof.json").exists()


def test_an_adapter_that_is_not_the_runs_is_found(runs):
    list(export("first", form="adapter", folder=str(runs)))
    folder = runs / "first/export/adapter"
    tensors = load_file(folder / "adapter_model.safetensors")
    name = next(iter(tensors))
    tensors[name].view(-1)[0] += 1
    save_file(tensors, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").unlink()
    faults = " ".join(result_of(forged(folder)).faults)
    assert "adapter_model.safetensors: it is not the file of the run" in faults
    assert "adapter_config.json: missing" in faults


def test_a_configuration_that_makes_another_model_of_the_tensors_is_found(runs):
    """On the original base no live model shows it: answers are told there, not judged."""
    list(export("first", form="merged-bf16", base="original", folder=str(runs)))
    folder = runs / "first/export/merged-bf16"
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    values = config | {"rms_norm_eps": 0.01}
    (folder / "config.json").write_text(json.dumps(values), encoding="utf-8")
    [fault] = result_of(forged(folder)).faults
    assert fault.startswith("config.json: it makes another model of the tensors (rms_norm_eps is 0.01, not ")


def test_what_a_gguf_file_says_of_prompts_is_held_against_the_run(runs, tmp_path, tiny_model):
    list(export("first", form="gguf-q8_0", folder=str(runs)))
    [file] = (runs / "first/export/gguf-q8_0").glob("*.gguf")
    model = tiny_model("llama")
    right = saved_contract(runs / "first/adapter", model)
    proof = prove_gguf_prompt(file, right)
    assert proof.faults == () and proof.end_ids == tuple(sorted(right.end_ids))
    (tmp_path / "other.jinja").write_text(
        "{% for m in messages %}{{ m.content }}<|eot_id|>{% endfor %}", encoding="utf-8"
    )
    other = load_contract(model, template=str(tmp_path / "other.jinja"))
    assert "the chat template is not the run's" in prove_gguf_prompt(file, other).faults
    right.end_ids = right.end_ids | {300}
    [fault] = prove_gguf_prompt(file, right).faults
    assert "(300) is missing in the file" in fault
    right.end_ids = frozenset()
    assert all("ends answers at" in fault for fault in prove_gguf_prompt(file, right).faults)
    others = " ".join(prove_gguf_prompt(file, load_contract(tiny_model("qwen2"))).faults)
    assert "the vocabulary in the file has" in others and "begins texts with token" in others


@pytest.mark.parametrize(
    "changes",
    [
        {"form": "merged-fp8"}, {"form": ["merged-fp16"]}, {"base": ""}, {"form": "adapter"}, {"run": None},
    ],
)  # fmt: skip
def test_a_proof_of_nothing_that_is_exported_is_said(runs, changes):
    with pytest.raises(BadRun, match="has no proof that can be read"):
        result_of(forged(runs / "first/export/merged-fp16", **changes))


@pytest.mark.parametrize("files", [[], {"a": 3}, {"a": ["bytes", "sha256"]}, {"a": {"bytes": 3}}])
def test_a_proof_with_damaged_hashes_is_said(runs, files):
    path = runs / "first/export/merged-fp16/proof.json"
    proof = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps(proof | {"files": files}), encoding="utf-8")
    with pytest.raises(BadRun, match="has no proof that can be read"):
        result_of(path.parent)


def test_a_proof_that_tells_of_another_form_does_not_hold(runs):
    found = result_of(forged(runs / "first/export/merged-fp16", form="merged-bf16"))
    assert "another type" in " ".join(found.faults)
    found = result_of(forged(runs / "first/export/merged-fp16", form="merged-fp16", base="original"))
    assert "merged on the other base" in " ".join(found.faults)
    found = result_of(forged(runs / "first/export/merged-fp16", form="adapter", base=""))
    assert found.faults == ("adapter_model.safetensors and 2 more: missing",)


def test_a_run_that_is_given_must_be_the_one_that_was_exported(runs, tmp_path):
    folder = runs / "first/export/merged-fp16"
    weights = runs / "first/adapter/adapter_model.safetensors"
    shutil.copytree(folder, tmp_path / "mine")
    weights.unlink()
    assert result_of(folder).reason.endswith(
        "adapter_model.safetensors cannot be read: No such file or directory."
    )
    with pytest.raises(BadRun, match=r"cannot be repeated: .*adapter_model\.safetensors cannot be read"):
        result_of(tmp_path / "mine", run=str(runs / "first"))
    assert run(["verify", str(tmp_path / "mine"), "--run", str(runs / "first")]) == 2
