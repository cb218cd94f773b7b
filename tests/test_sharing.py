"""Adapters of the store on a hub: pushed in one commit that mixes no two, and pulled again as they were."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import huggingface_hub.constants
import pytest
from hub_server import COMMIT, Hub, Repository, running_hub
from test_keeping import contract_of, facts_of, side_car, write_adapter

from qadapt.adapters.facts import read_facts, write_facts
from qadapt.adapters.store import Store
from qadapt.cli.main import run
from qadapt.data.prompt import CONTRACT_FILE
from qadapt.errors import BadAdapter, BadModel, HubRefused
from qadapt.export.hub import HubTarget
from qadapt.export.peft_folder import copy_adapter
from qadapt.exporting.sharing import push
from qadapt.trained.adoption import Said
from qadapt.trained.keeping import add

if TYPE_CHECKING:
    from conftest import TinyModel

NAME = "me/summaries"


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1,localhost")
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    with running_hub() as running:
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", running.endpoint)
        monkeypatch.setattr(
            "huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE",
            running.endpoint + "/{repo_id}/resolve/{revision}/{filename}",
        )
        yield running


@pytest.fixture
def store(tmp_path: Path, tiny_model: TinyModel, monkeypatch: pytest.MonkeyPatch) -> Store:
    """A store with `summaries`; the cache is empty."""
    monkeypatch.setattr("qadapt.exporting.sharing.cache_folder", lambda: tmp_path / "cache")
    model, kept = tiny_model("llama"), Store(tmp_path / "adapters")
    folder = write_adapter(tmp_path / "summaries", model)
    shutil.copyfile(contract_of(model, tmp_path), folder / CONTRACT_FILE)
    (folder / "LICENSE").write_text("mine", encoding="utf-8")
    add(str(folder), kept)
    return kept


def pushed(store: Store, what: str = "summaries") -> Any:
    found = []

    def whole() -> Iterator[object]:
        found.append((yield from push(what, HubTarget(NAME), folder="no runs", store=str(store.path))))

    list(whole())
    return found[0]


def test_what_is_pushed_can_be_pulled_as_it_was(hub: Hub, store: Store, tmp_path: Path) -> None:
    version = store.find("summaries")
    found = pushed(store)
    assert (found.name, found.version) == ("summaries", version)
    assert found.address == f"{hub.endpoint}/{NAME}/commit/{COMMIT}"
    files = hub.repositories[NAME].files
    assert {"README.md", "proof.json", "LICENSE"} <= files.keys()
    assert json.loads(files["proof.json"])["holds"]
    assert json.loads(files["proof.json"])["made_of"]["run"] == version[:12]
    other, base = Store(tmp_path / "elsewhere"), store.version(version).record.facts.base
    pulled = add(f"hub:{NAME}", other, said=Said(base=base)).version
    kept = store.version(version).files
    assert {name for name in kept if pulled.files[name] != kept[name]} == {"adapter_config.json"}
    assert pulled.record.facts == store.version(version).record.facts
    assert pulled.record.source == f"hub {NAME}@{COMMIT}"
    assert not list((tmp_path / "cache").iterdir())


def test_the_card_of_a_sum_names_its_parts_and_the_terms_of_all_of_them(
    hub: Hub, store: Store, tmp_path: Path
) -> None:
    other = Path(shutil.copytree(tmp_path / "summaries", tmp_path / "tone"))
    (other / "LICENSE").write_text("yours", encoding="utf-8")
    parts = [f"{tmp_path / name}={weight}" for name, weight in (("summaries", 0.75), ("tone", -0.25))]
    assert run(["adapters", "combine", *parts, "--to", str(tmp_path / "both")]) == 0
    add(str(tmp_path / "both"), store)
    pushed(store, "both")
    files = hub.repositories[NAME].files
    assert {name: files[name] for name in ("LICENSE", "LICENSE-2")} == {
        "LICENSE": b"mine",
        "LICENSE-2": b"yours",
    }
    card = files["README.md"].decode()
    assert "* The adapter was made of others: `summaries` times 0.75, `tone` times -0.25.\n" in card
    assert "* Terms of use: `LICENSE`, `LICENSE-2`.\n" in card


def test_no_folder_of_this_machine_is_pushed_and_its_base_is_known_by_its_files(
    hub: Hub, store: Store, tmp_path: Path, tiny_model: TinyModel
) -> None:
    base, other = tiny_model("llama"), Store(tmp_path / "elsewhere")
    places = [str(place).encode() for place in (tmp_path, base.parent, Path.home())]
    pushed(store)
    files = hub.repositories[NAME].files
    assert not [name for name, content in files.items() if any(place in content for place in places)]
    for name, field in (("adapter_config.json", "base_model_name_or_path"), ("qadapt.json", "base")):
        assert json.loads(files[name])[field] == base.name
    with pytest.raises(BadModel, match=rf"No model '{base.name}'") as refused:
        add(f"hub:{NAME}", other)
    assert "--base" in refused.value.cure
    with pytest.raises(BadAdapter, match="is not the base of the adapter"):
        add(f"hub:{NAME}", other, said=Said(base=str(tiny_model("qwen2"))))
    assert not other.path.exists()


def test_a_base_on_a_hub_is_named_with_its_revision_and_every_byte_stays(
    store: Store, tmp_path: Path, tiny_model: TinyModel
) -> None:
    folder = tmp_path / "summaries"
    facts = replace(read_facts(folder), base="owner/base", revision="c0ffee")
    write_facts(facts, folder)
    config = json.loads((folder / "adapter_config.json").read_text("utf-8"))
    said = {**config, "base_model_name_or_path": facts.base, "revision": facts.revision}
    (folder / "adapter_config.json").write_text(json.dumps(said), encoding="utf-8")
    out = tmp_path / "out"
    list(copy_adapter(model_folder=tiny_model("llama"), adapter_folder=folder, target=out, is_shared=True))
    for name in ("adapter_config.json", "qadapt.json", "adapter_model.safetensors"):
        assert (out / name).read_bytes() == (folder / name).read_bytes()


def test_nothing_of_an_earlier_adapter_stays_in_the_repository(
    hub: Hub, store: Store, tmp_path: Path, tiny_model: TinyModel
) -> None:
    earlier = ("side_car.json", "side_car.safetensors", "tokenizer.json", "additional_chat_templates/a.jinja")
    others = {"notes.md": b"kept", "model.safetensors": b"kept", "NOTICE": b"kept"}
    hub.repositories[NAME] = Repository({**dict.fromkeys(earlier, b"old"), **others})
    pushed(store)
    files = hub.repositories[NAME].files
    assert not set(earlier) & files.keys()
    assert {name: files[name] for name in others} == others
    said = Said(base=str(tiny_model("llama")))
    assert add(f"hub:{NAME}", Store(tmp_path / "elsewhere"), said=said).version.record.method == "lora"


def test_a_side_car_is_pushed_and_pulled(
    hub: Hub, store: Store, tmp_path: Path, tiny_model: TinyModel
) -> None:
    model = tiny_model("llama")
    folder = side_car(tmp_path / "beside", model)
    write_facts(facts_of(model), folder)
    shutil.copyfile(contract_of(model, tmp_path), folder / CONTRACT_FILE)
    pushed(store)
    add(str(folder), store)
    pushed(store, "beside")
    assert "adapter_model.safetensors" not in hub.repositories[NAME].files
    said = Said(base=str(model))
    pulled = add(f"hub:{NAME}", Store(tmp_path / "elsewhere"), said=said).version
    assert pulled.record.method == "pfeiffer"
    kept = store.version(store.find("beside")).files
    assert {name: facts for name, facts in pulled.files.items() if name != "LICENSE"} == kept


def test_the_command_pushes_and_says_where(
    hub: Hub, store: Store, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["adapters", "push", "summaries", "--to", f"hub:{NAME}", "--store", str(store.path)]
    assert run([*words, "--private"]) == 0
    said = capsys.readouterr()
    assert f"pushed summaries: {hub.endpoint}/{NAME}/commit/{COMMIT}" in said.out
    assert "is on no hub: its name helps nobody else" in " ".join(said.err.split())
    assert "hf_secret" not in said.out + said.err
    assert hub.repositories[NAME].is_private
    assert run([*words, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["version"] == store.find("summaries")


def test_a_push_that_the_hub_refuses_changes_nothing(hub: Hub, store: Store, tmp_path: Path) -> None:
    hub.write_status = 403
    with pytest.raises(HubRefused, match="status 403") as caught:
        pushed(store)
    assert caught.value.cure == "Nothing is lost: push it once more."
    assert not list((tmp_path / "cache").iterdir())


def test_what_cannot_be_pushed_is_said_before_anything_is_made(
    hub: Hub, store: Store, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(what: str, to: str) -> str:
        assert run(["adapters", "push", what, "--to", to, "--store", str(store.path)]) == 2
        return " ".join(capsys.readouterr().err.split())

    assert "no such name, tag or version" in refused("nothing", NAME)
    assert "no name of a repository" in refused("summaries", "hub:mine")
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(huggingface_hub.constants, "HF_TOKEN_PATH", "no-such-file")
    assert "no account is logged in" in refused("summaries", NAME)
    assert not hub.requests
