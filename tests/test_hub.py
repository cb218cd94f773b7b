"""Models from a hub: pinned, resumed, checked before the first byte, refused with the reason and the cure."""

import shutil
from collections import namedtuple
from collections.abc import Iterator
from pathlib import Path

import huggingface_hub.constants
import pytest
from hub_server import COMMIT, Hub, Repository, running_hub
from model_folders import CONFIG, ENTRIES, files_of, write_folder

from qadapt.errors import BadModel, BadOutput, HubRefused, Unsupported
from qadapt.export.card import licence_of
from qadapt.licences import copy_licences
from qadapt.model import download
from qadapt.model.shards import TensorEntry
from qadapt.model.source import ModelFiles, find_model

NAME = "owner/tiny"
BIG = [*ENTRIES, TensorEntry("model.layers.0.mlp.up_proj.weight", "F16", (1024, 1024))]


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1,localhost")
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_TOKEN_PATH", "no-such-file")
    with running_hub() as running:
        yield running


@pytest.fixture
def tiny(hub: Hub, tmp_path: Path) -> Repository:
    folder = write_folder(tmp_path / "origin", entries=BIG, shard_bytes=100_000)
    files = files_of(folder) | {"modeling_tiny.py": b"raise SystemExit", "pytorch_model.bin": b"pickle"}
    files |= {"LICENSE.txt": b"terms", "USE_POLICY.md": b"more terms", "original/LICENSE": b"the same"}
    files |= {"README.md": b"---\nlicense: apache-2.0\n---\n", "licensed.png": b"a picture"}
    hub.repositories[NAME] = Repository(files)
    return hub.repositories[NAME]


def fetch(hub: Hub, tmp_path: Path, name: str = NAME, revision: str | None = None) -> ModelFiles:
    return find_model(name, revision=revision, cache=tmp_path / "cache", endpoint=hub.endpoint)


def test_model_is_fetched_whole_and_its_commit_recorded(hub: Hub, tiny: Repository, tmp_path: Path) -> None:
    found = fetch(hub, tmp_path)
    assert found.revision == COMMIT
    assert found.name == NAME
    fetched = files_of(found.folder)
    assert fetched == {name: tiny.files[name] for name in fetched}
    assert {name for name in fetched if name.endswith(".safetensors")} == {
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
    }


def test_the_terms_of_a_model_come_with_it(hub: Hub, tiny: Repository, tmp_path: Path) -> None:
    found = fetch(hub, tmp_path).folder
    terms = {name for name in files_of(found) if not name.endswith((".json", ".safetensors", ".jinja"))}
    assert terms == {"LICENSE.txt", "USE_POLICY.md", "README.md"}
    assert licence_of(found) == "apache-2.0"
    copy_licences(found, tmp_path)
    assert (tmp_path / "LICENSE.txt").read_bytes() == b"terms"


def test_code_and_pickles_are_never_asked_for(hub: Hub, tiny: Repository, tmp_path: Path) -> None:
    found = fetch(hub, tmp_path)
    assert not [r.path for r in hub.requests if r.path.endswith((".py", ".bin"))]
    assert not [*found.folder.glob("*.py"), *found.folder.glob("*.bin")]


def test_who_needs_no_weights_fetches_none(hub: Hub, tiny: Repository, tmp_path: Path) -> None:
    options = {"cache": tmp_path / "cache", "endpoint": hub.endpoint}
    found = find_model(NAME, needs_weights=False, **options)  # type: ignore[arg-type]
    assert {"config.json", "tokenizer.json"} <= {path.name for path in found.folder.iterdir()}
    assert not [r.path for r in hub.requests if r.path.endswith(".safetensors")]
    assert found.fingerprint == ""
    whole = fetch(hub, tmp_path)
    assert whole.folder == found.folder
    assert whole.fingerprint
    hub.stop()
    assert find_model(NAME, needs_weights=False, **options).folder == found.folder  # type: ignore[arg-type]


def test_pickled_weights_are_refused_even_where_none_are_needed(
    hub: Hub, tiny: Repository, tmp_path: Path
) -> None:
    for file in [name for name in tiny.files if "safetensors" in name]:
        del tiny.files[file]
    with pytest.raises(BadModel, match="only pickled weights"):
        find_model(NAME, needs_weights=False, cache=tmp_path / "cache", endpoint=hub.endpoint)


def test_fingerprint_is_that_of_the_same_files_in_a_folder(
    hub: Hub, tiny: Repository, tmp_path: Path
) -> None:
    assert fetch(hub, tmp_path).fingerprint == find_model(str(tmp_path / "origin")).fingerprint


def test_second_call_fetches_no_file(hub: Hub, tiny: Repository, tmp_path: Path) -> None:
    first = fetch(hub, tmp_path)
    hub.requests.clear()
    assert fetch(hub, tmp_path) == first
    assert not [r for r in hub.requests if "/resolve/" in r.path]


def test_a_connection_that_breaks_off_is_resumed_where_it_broke(
    hub: Hub, tiny: Repository, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(download, "_PAUSE_SECONDS", 0.01)
    tiny.cuts = [0, 1_000_000, 500_000]
    found = fetch(hub, tmp_path)
    weights = "model-00002-of-00002.safetensors"
    assert (found.folder / weights).read_bytes() == tiny.files[weights]
    ranges = [r.range for r in hub.requests if r.path.startswith("/cdn") and r.path.endswith(weights)]
    assert ranges[0] == "bytes=0-"
    assert ranges[-1] not in (None, "bytes=0-")


def test_download_is_resumed_by_the_next_process(hub: Hub, tiny: Repository, tmp_path: Path) -> None:
    class Killed(BaseException):
        pass

    def kill_halfway(stage: str, done_bytes: int, total_bytes: int) -> None:
        if done_bytes > total_bytes // 2:
            raise Killed

    with pytest.raises(Killed):
        find_model(NAME, cache=tmp_path / "cache", endpoint=hub.endpoint, report=kill_halfway)
    hub.requests.clear()
    fetch(hub, tmp_path)
    ranges = [r.range for r in hub.requests if r.path.startswith("/cdn")]
    assert len(ranges) == 1
    assert int(ranges[0][6:-1]) >= 1024**2
    assert not list((tmp_path / "cache").rglob("*.qadapt.*"))


def test_progress_rises_to_the_total(hub: Hub, tiny: Repository, tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    find_model(
        NAME,
        cache=tmp_path / "cache",
        endpoint=hub.endpoint,
        report=lambda _, done, total: seen.append((done, total)),
    )
    done = [d for d, _ in seen]
    assert done == sorted(done)
    total = sum(len(c) for f, c in tiny.files.items() if f.endswith(".safetensors"))
    assert seen[-1] == (total, total)


def test_size_that_the_list_states_wrongly_does_no_harm(hub: Hub, tiny: Repository, tmp_path: Path) -> None:
    name = "model-00002-of-00002.safetensors"
    tiny.stated_sizes[name] = 0
    assert (fetch(hub, tmp_path).folder / name).read_bytes() == tiny.files[name]


def test_damaged_download_is_refused_and_deleted(hub: Hub, tiny: Repository, tmp_path: Path) -> None:
    name = "model-00002-of-00002.safetensors"
    tiny.served[name] = tiny.files[name][:-1] + b"\0"
    with pytest.raises(BadModel, match="arrived damaged"):
        fetch(hub, tmp_path)
    assert not list((tmp_path / "cache").rglob("*.incomplete"))
    tiny.served.clear()
    assert fetch(hub, tmp_path).revision == COMMIT


def test_token_goes_to_the_hub_and_not_to_the_host_of_the_files(
    hub: Hub, tiny: Repository, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    fetch(hub, tmp_path)
    cdn = [r for r in hub.requests if r.path.startswith("/cdn")]
    assert cdn
    assert all(r.authorization is None for r in cdn)
    assert all(r.authorization == "Bearer hf_secret" for r in hub.requests if r not in cdn)


def test_disk_is_checked_before_the_first_byte_of_the_weights(
    hub: Hub, tiny: Repository, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(2**40, 2**40 - 2**20, 2**20))
    with pytest.raises(BadOutput, match=r"needs 2\.0 MiB in .*; 1\.0 MiB are free") as caught:
        fetch(hub, tmp_path)
    assert "Free" in caught.value.cure
    assert not hub.downloads(".safetensors")


def test_gated_model_says_what_to_accept_and_where(hub: Hub, tiny: Repository, tmp_path: Path) -> None:
    tiny.is_gated = True
    with pytest.raises(HubRefused, match="is gated and no account is logged in") as caught:
        fetch(hub, tmp_path)
    assert f"{hub.endpoint}/{NAME}" in caught.value.cure
    assert "hf auth login" in caught.value.cure


def test_gated_model_without_access_never_shows_the_token(
    hub: Hub, tiny: Repository, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    tiny.is_gated = True
    with pytest.raises(HubRefused, match="has not been granted access") as caught:
        fetch(hub, tmp_path)
    assert "hf_secret" not in str(caught.value)
    assert caught.value.__cause__ is None


def test_unknown_model_and_unknown_revision_are_told_apart(
    hub: Hub, tiny: Repository, tmp_path: Path
) -> None:
    with pytest.raises(HubRefused, match="owner/none is no folder here, and it does not exist on the hub"):
        fetch(hub, tmp_path, "owner/none")
    with pytest.raises(HubRefused, match="has no revision 'v9'"):
        fetch(hub, tmp_path, revision="v9")


@pytest.mark.parametrize(
    ("status", "problem"), [(403, "does not let this account or token read"), (503, "with status 503")]
)
def test_host_of_the_weights_that_refuses_is_one_clear_error(
    hub: Hub, tiny: Repository, tmp_path: Path, status: int, problem: str
) -> None:
    tiny.weights_status = status
    with pytest.raises(HubRefused, match=problem):
        fetch(hub, tmp_path)


def test_commit_can_be_asked_for(hub: Hub, tiny: Repository, tmp_path: Path) -> None:
    assert fetch(hub, tmp_path, revision=COMMIT).revision == COMMIT


def test_without_network_the_whole_local_snapshot_is_used(hub: Hub, tiny: Repository, tmp_path: Path) -> None:
    first = fetch(hub, tmp_path)
    hub.stop()
    assert fetch(hub, tmp_path) == first


def test_offline_mode_uses_the_local_snapshot(
    hub: Hub, tiny: Repository, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = fetch(hub, tmp_path)
    hub.requests.clear()
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert fetch(hub, tmp_path) == first
    assert not hub.requests
    with pytest.raises(HubRefused, match=r"out of reach: offline mode is on \(HF_HUB_OFFLINE\)"):
        fetch(hub, tmp_path, "owner/other")


def test_without_network_an_incomplete_snapshot_is_an_error(
    hub: Hub, tiny: Repository, tmp_path: Path
) -> None:
    found = fetch(hub, tmp_path)
    (found.folder / "model-00002-of-00002.safetensors").unlink()
    hub.stop()
    with pytest.raises(HubRefused, match="is not whole on this disk and the hub is out of reach"):
        fetch(hub, tmp_path)


def test_without_network_and_snapshot_the_cure_names_the_other_ways(tmp_path: Path) -> None:
    with pytest.raises(HubRefused, match="the hub is out of reach") as caught:
        find_model(NAME, cache=tmp_path, endpoint="http://127.0.0.1:9")
    assert "smollm2-135m" in caught.value.cure


@pytest.mark.parametrize("method", ["bitsandbytes", "gptq", "awq", "fp8"])
def test_quantized_repository_is_refused_before_its_weights(hub: Hub, tmp_path: Path, method: str) -> None:
    config = CONFIG | {"quantization_config": {"quant_method": method}}
    name = "owner/tiny-unsloth-bnb-4bit"
    hub.repositories[name] = Repository(files_of(write_folder(tmp_path / "origin", config=config)))
    with pytest.raises(BadModel, match=f"already quantized \\({method}\\)") as caught:
        fetch(hub, tmp_path, name)
    assert "owner/tiny." in caught.value.cure
    assert not hub.downloads(".safetensors")


def test_unproven_architecture_is_refused_before_its_weights(hub: Hub, tmp_path: Path) -> None:
    config = CONFIG | {"model_type": "mamba"}
    hub.repositories[NAME] = Repository(files_of(write_folder(tmp_path / "origin", config=config)))
    with pytest.raises(Unsupported, match="mamba"):
        fetch(hub, tmp_path)
    assert not hub.downloads(".safetensors")


def test_model_that_needs_repository_code_is_refused(hub: Hub, tmp_path: Path) -> None:
    config = CONFIG | {"model_type": "mamba", "auto_map": {"AutoModel": "modeling.Model"}}
    hub.repositories[NAME] = Repository(files_of(write_folder(tmp_path / "origin", config=config)))
    with pytest.raises(BadModel, match="needs Python code from its repository"):
        fetch(hub, tmp_path)


@pytest.mark.parametrize(
    ("files", "problem"),
    [
        ({"config.json": b"{}", "pytorch_model.bin": b"x"}, "missing"),
        ({"pytorch_model.bin": b"x"}, "only pickled weights"),
        ({"model-q4.gguf": b"x"}, "holds GGUF files only"),
        ({"README.md": b"x"}, "holds no model"),
    ],
)
def test_repository_without_safetensors_says_what_it_holds(
    hub: Hub, tmp_path: Path, files: dict[str, bytes], problem: str
) -> None:
    hub.repositories[NAME] = Repository(files)
    with pytest.raises((BadModel, Unsupported), match=problem):
        fetch(hub, tmp_path)
