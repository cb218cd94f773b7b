"""Pushing an export: a repository, every file, huggingface_hub's login and nothing else, clear refusals."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from pathlib import Path

import huggingface_hub.constants
import pytest
from hub_server import COMMIT, Hub, Repository, running_hub

from qadapt.cli.main import run
from qadapt.errors import BadRecipe, HubRefused
from qadapt.export.hub import HubTarget, check_target, push_folder

NAME, TOKEN = "me/mine", "hf_secret"
FILES = {
    "README.md": b"---\nlicense: mit\n---\n# Mine\n",
    "model.safetensors": bytes(range(256)) * 8,
    "additional_chat_templates/rag.jinja": b"{{ messages }}",
}


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1,localhost")
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setattr(huggingface_hub.constants, "HF_TOKEN_PATH", "no-such-file")
    with running_hub() as running:
        yield running


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name, content in FILES.items():
        (tmp_path / "out" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "out" / name).write_bytes(content)
    return tmp_path / "out"


def push(folder: Path, hub: Hub, name: str = NAME, *, is_private: bool = False) -> str:
    return push_folder(
        folder, HubTarget(name, is_private=is_private, endpoint=hub.endpoint), message="Add it"
    )


@pytest.mark.parametrize("is_private", [True, False])
def test_every_file_of_an_export_is_pushed_to_a_new_repository(
    hub: Hub, folder: Path, is_private: bool
) -> None:
    address = push(folder, hub, is_private=is_private)
    assert address == f"{hub.endpoint}/{NAME}/commit/{COMMIT}"
    assert hub.repositories[NAME].files == FILES
    assert hub.repositories[NAME].is_private == is_private


def test_a_repository_that_is_there_keeps_its_other_files(hub: Hub, folder: Path) -> None:
    hub.repositories[NAME] = Repository({"notes.md": b"kept", "README.md": b"old"})
    push(folder, hub)
    assert hub.repositories[NAME].files == {"notes.md": b"kept", **FILES}


def test_the_token_is_huggingface_hubs_own(hub: Hub, folder: Path) -> None:
    push(folder, hub)
    writing = [request for request in hub.requests if request.method == "POST"]
    assert {request.authorization for request in writing} == {f"Bearer {TOKEN}"}


@pytest.mark.parametrize("status", [401, 403, 404, 500])
def test_a_push_that_is_refused_says_why_and_how_to_push_again(hub: Hub, folder: Path, status: int) -> None:
    hub.write_status = status
    with pytest.raises(HubRefused, match=f"status {status}") as refused:
        push(folder, hub)
    assert ("hf auth login" in refused.value.problem) == (status in (401, 403))
    assert f"`hf upload {NAME} {folder}`" in refused.value.cure
    assert TOKEN not in str(refused.value)
    assert (folder / "model.safetensors").read_bytes() == FILES["model.safetensors"]


def test_a_hub_out_of_reach_is_said(hub: Hub, folder: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        endpoint = f"http://127.0.0.1:{taken.getsockname()[1]}"  # nobody listens
        with pytest.raises(HubRefused, match="out of reach"):
            push_folder(folder, HubTarget(NAME, endpoint=endpoint), message="Add it")


def test_a_name_that_no_hub_takes_is_refused(hub: Hub, folder: Path) -> None:
    for name in ("mine", "me/mine/too", "me/", "-me/mine"):
        with pytest.raises(BadRecipe, match="no name of a repository"):
            check_target(HubTarget(name))
    with pytest.raises(BadRecipe, match="no name of a repository"):
        push(folder, hub, f"me/{'x' * 120}")
    assert not hub.repositories


def test_what_would_stop_the_push_is_found_before_the_export(
    hub: Hub, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    check_target(HubTarget(NAME))
    monkeypatch.delenv("HF_TOKEN")
    assert run(["export", "none", "--push", NAME]) == 2
    assert "no account is logged in" in capsys.readouterr().err
    assert run(["export", "none", "--push", "mine"]) == 2
    assert "Write it as owner/name" in capsys.readouterr().err
    assert run(["export", "none", "--private"]) == 2
    assert "--private" in capsys.readouterr().err
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(HubRefused, match="HF_HUB_OFFLINE"):
        check_target(HubTarget(NAME))
    assert not hub.requests
