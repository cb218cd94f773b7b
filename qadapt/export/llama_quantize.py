"""GGUF types that only llama.cpp makes (K-quants), through an installed `llama-quantize`.

The program is looked for on the PATH, its build is read and checked, and it gets a GGUF file in F16; what it
makes is held against that file. Its tools print their build in more than one way, so both are understood.
https://github.com/ggml-org/llama.cpp/tree/master/tools/quantize
"""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

from qadapt.cache import require_free
from qadapt.errors import BadExport, BadModel, Unsupported
from qadapt.events import Event, StageAdvanced, StageStarted
from qadapt.export.gguf_front import read_front

K_FORMS = {
    "gguf-q3_k_m": "Q3_K_M", "gguf-q4_k_s": "Q4_K_S", "gguf-q4_k_m": "Q4_K_M", "gguf-q5_k_m": "Q5_K_M",
    "gguf-q6_k": "Q6_K",
}  # fmt: skip
"""Forms that need `llama-quantize`, with the type in its words."""
LEAST_BUILD = 6000
"""A build of summer 2025: it knows every architecture that is written here."""
STAGE = "quantizing with llama-quantize"
_PROGRAM = "llama-quantize"
_BUILD = re.compile(r"\bbuild\s*[=:]?\s*b?(\d+)|\bversion:\s*b?(\d+)(?![\d.])")
_TENSOR = re.compile(r"\[\s*(\d+)\s*/\s*(\d+)\s*\]")
_OF_THE_TYPE = frozenset({"general.file_type", "general.quantization_version"})
"""Metadata that a quantized file has otherwise."""
_SECONDS = 30
_ELSEWHERE = "give a folder on a larger one with --to"
_HOW_TO_GET = (
    "Install llama.cpp (`brew install llama.cpp`, `winget install llama.cpp`, or a release from "
    "https://github.com/ggml-org/llama.cpp/releases) so that `llama-quantize` is on the PATH; "
    "or export with --form gguf-q8_0 or gguf-q5_1, which need no other program."
)


def find_llama_quantize() -> Path:
    """The installed program, new enough.

    Raises:
        Unsupported: There is none, it does not start, or it is too old.
    """
    found = shutil.which(_PROGRAM)
    if found is None:
        raise Unsupported(
            f"K-quants are made by llama.cpp's `{_PROGRAM}`, which is not installed.", cure=_HOW_TO_GET
        )
    program = Path(found)
    beside = program.with_name(program.name.replace("quantize", "cli"))
    no_work = [str(program.with_name(name)) for name in ("no-such.gguf", "no-such-either.gguf")]
    # its own `--version` is not known to every build, which all say it where they begin to work
    for asking in ([str(program), "--version"], [str(beside), "--version"], [str(program), *no_work, "Q8_0"]):
        build = _build(asking)
        if build is not None:
            _check_build(build, program)
            return program
    raise Unsupported(f"{program} does not say which build it is.", cure=_HOW_TO_GET)


def _build(asking: list[str]) -> int | None:
    """The number of a tool's build; None if it does not say."""
    try:
        said = subprocess.run(
            asking, capture_output=True, text=True, timeout=_SECONDS, check=False,
            stdin=subprocess.DEVNULL, errors="replace",
        )  # fmt: skip
    except (OSError, subprocess.TimeoutExpired):
        return None
    match = _BUILD.search(said.stdout + said.stderr)
    return int(match[1] or match[2]) if match else None


def _check_build(build: int, program: Path) -> None:
    if build < LEAST_BUILD:
        raise Unsupported(
            f"{program} is build {build}; at least {LEAST_BUILD} is needed.",
            cure=f"Bring llama.cpp up to date. {_HOW_TO_GET}",
        )


def quantize_gguf(source: Path, target: Path, *, kind: str, program: Path) -> Iterator[Event]:
    """Quantizes a GGUF file, yielding after every tensor.

    Args:
        source: A GGUF file in F16 or BF16.
        target: The file to be.
        kind: A value of `K_FORMS`.
        program: From `find_llama_quantize`.

    Raises:
        BadExport: The program failed, or made something else.
        NoRoom: The disk is too full for a second file.
    """
    yield StageStarted(stage=STAGE)
    require_free(target.parent, source.stat().st_size, purpose=target.name, or_else=_ELSEWHERE)
    last = ""
    with subprocess.Popen(
        [str(program), str(source), str(target), kind], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, text=True, errors="replace",
    ) as process:  # fmt: skip
        assert process.stdout is not None
        try:
            for line in process.stdout:
                last = line.strip() or last
                if match := _TENSOR.search(line):
                    yield StageAdvanced(stage=STAGE, done=int(match[1]), total=int(match[2]), unit="tensors")
        except GeneratorExit:
            process.kill()
            raise
    if process.returncode != 0:
        raise BadExport(
            f"{program.name} failed with exit code {process.returncode}: {last[:200]}",
            cure="Export with --form gguf-q8_0, which needs no other program.",
        )
    _check_made(source, target, program)


def _check_made(source: Path, target: Path, program: Path) -> None:
    """The same tensors, whatever their types, and the same metadata but for type and file."""
    try:
        made, given = read_front(target), read_front(source)
    except BadModel as error:
        raise BadExport(
            f"What {program.name} wrote cannot be read: {error.problem}", cure="Export with --form gguf-q8_0."
        ) from None
    tables = [sorted((name, place.shape) for name, place in front.tensors.items()) for front in (made, given)]
    lost = sorted(
        key for key in set(given.values) - _OF_THE_TYPE if made.values.get(key) != given.values[key]
    )
    if tables[0] != tables[1] or lost:
        raise BadExport(
            f"What {program.name} wrote is not the model it was given: "
            f"{lost[0] if lost else 'its table of tensors'} is another.",
            cure="Bring llama.cpp up to date, or export with --form gguf-q8_0.",
        )
