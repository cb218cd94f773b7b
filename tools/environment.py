"""Sets up `.venv` for the tools, once, and runs them inside it. Standard library only; works on every system.

`enter()` is the first thing a tool calls. It makes `.venv` at the root of the repository if there is none,
installs qadapt (editable, with what development needs) under the pinned versions of `tools/constraints/`,
and goes on under that interpreter. A stamp over `pyproject.toml` and the constraints makes the next start
immediate; what cannot be done is said in one sentence, with the cure.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv"
PYTHON = VENV / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
STAMP = VENV / "qadapt-stamp.txt"
LOG = VENV / "qadapt-install.log"
CONSTRAINTS = ROOT / "tools" / "constraints"
DESCRIPTIONS = {"cpu": "a machine without a CUDA device", "cuda": "an NVIDIA GPU"}


class CannotSetUp(Exception):
    """The environment cannot be made; the two arguments are the problem and its cure."""


def enter() -> None:
    """Makes sure the environment is there, and that the running program runs in it.

    Returns only inside the environment. Outside, the program is started anew under the environment's
    interpreter: replaced on POSIX, run as a child on Windows, which cannot replace a process.
    """
    try:
        prepare()
    except CannotSetUp as error:
        problem, cure = error.args
        sys.exit(f"error: {problem}\n{cure}")
    except KeyboardInterrupt:
        sys.exit("\nStopped while setting up; run the same command again and it goes on.")
    if is_inside():
        return
    command = [str(PYTHON), *sys.argv]
    sys.stdout.flush()
    if os.name == "nt":
        sys.exit(call(command))
    os.execv(PYTHON, command)


def call(command: Sequence[str], *, folder: Path | None = None) -> int:
    """Runs a program in a folder and waits for its end, also through Ctrl-C.

    The program gets the interrupt, too, and decides what it means: a run saves itself first.
    """
    with subprocess.Popen(command, cwd=folder) as process:
        while process.poll() is None:
            with contextlib.suppress(KeyboardInterrupt):
                process.wait()
        return process.returncode


def is_inside() -> bool:
    """Whether the running interpreter is the environment's own."""
    return Path(sys.prefix).resolve() == VENV.resolve()


def prepare() -> None:
    """Makes or refreshes the environment if its stamp is not the present one.

    Raises:
        CannotSetUp: This Python is too old, or lacks venv, or the packages cannot be installed.
    """
    check_python(sys.version_info[:2])
    kind = platform_kind()
    if STAMP.is_file() and STAMP.read_text(encoding="utf-8") == stamp(kind):
        return
    started = time.monotonic()
    if not _has_pip():
        _make_venv()
    _install(kind)
    STAMP.write_text(stamp(kind), encoding="utf-8")
    _say(f"The environment is ready after {time.monotonic() - started:.0f} s; from now on it starts at once.")


def check_python(version: tuple[int, ...]) -> None:
    """Refuses an interpreter that is older than `pyproject.toml` allows.

    Raises:
        CannotSetUp: It is too old.
    """
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    least = re.search(r'requires-python\s*=\s*">=\s*(\d+)\.(\d+)"', text)
    assert least is not None, "pyproject.toml states requires-python as >=X.Y"
    if version < (int(least[1]), int(least[2])):
        raise CannotSetUp(
            f"This is Python {version[0]}.{version[1]}; qadapt needs {least[1]}.{least[2]} or newer.",
            f"Start the same file with a newer one, for example: python{least[1]}.{least[2]} {sys.argv[0]}",
        )


def platform_kind() -> str:
    """`cuda` on Linux when an NVIDIA driver answers, else `cpu`; names the constraints file."""
    if not sys.platform.startswith("linux"):
        return "cpu"
    try:
        answer = subprocess.run(["nvidia-smi", "-L"], capture_output=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return "cpu"
    return "cuda" if answer.returncode == 0 and b"GPU" in answer.stdout else "cpu"


def stamp(kind: str) -> str:
    """What the environment was made from, as one line: equal stamps, equal environments."""
    digest = hashlib.sha256()
    for path in (ROOT / "pyproject.toml", *sorted(CONSTRAINTS.glob("*.txt"))):
        digest.update(path.name.encode() + b"\0" + path.read_bytes().replace(b"\r\n", b"\n"))
    return f"{kind} {ROOT} {digest.hexdigest()}"


def _has_pip() -> bool:
    if not PYTHON.exists():
        return False
    command = [str(PYTHON), "-m", "pip", "--version"]
    try:
        return subprocess.run(command, capture_output=True, check=False).returncode == 0
    except OSError:  # a .venv copied from another machine: its interpreter does not start
        return False


def _make_venv() -> None:
    if is_inside():
        raise CannotSetUp("The running environment .venv has no pip.", "Delete .venv and run this again.")
    _say(f"Making a virtual environment in {VENV} ...")
    command = [sys.executable, "-m", "venv", "--clear", str(VENV)]
    made = subprocess.run(command, capture_output=True, text=True, check=False)
    if made.returncode == 0:
        return
    said = made.stdout + made.stderr
    if "ensurepip" in said or "No module named venv" in said:
        raise CannotSetUp(
            "This Python cannot make virtual environments: its venv module is not whole.",
            "On Debian and Ubuntu: apt install python3-venv. Elsewhere, use the Python from python.org.",
        )
    raise CannotSetUp(f"{VENV} cannot be made: {_last_line(said)}", "Make room, or make the folder writable.")


def _install(kind: str) -> None:
    _say(f"Installing qadapt and its libraries for {DESCRIPTIONS[kind]} (the first time takes minutes) ...")
    if os.name == "nt":
        _say("On Windows this brings torch for the CPU; `qadapt doctor` names the command for a GPU.")
    pip = [str(PYTHON), "-m", "pip", "--disable-pip-version-check", "--no-input"]
    options = ["--progress-bar", "off", "--constraint", str(CONSTRAINTS / f"{kind}.txt")]
    said = _run_with_status([*pip, "install", *options, "--editable", f"{ROOT}[dev]"])
    if said is None:
        return
    missing = re.findall(r"No matching distribution found for (\S+)", said)
    if re.search(r"NewConnectionError|ConnectTimeout|NameResolution|ProxyError|Read timed out", said):
        problem = "The package index is out of reach."
        cure = "Connect to the network (or set pip's index) and run the same command again; it goes on."
    elif "No space left" in said:
        problem, cure = f"There is no room on the disk for {VENV}.", "Free about 3 GB and run this again."
    elif missing and "(from versions: none)" in said:
        problem = f"The package index is out of reach, or has no {missing[-1]} for this Python and system."
        cure = "Check the network and pip's index; else use Python 3.11 to 3.13 on a 64-bit system."
    elif missing:
        problem = f"The package index has no {missing[-1]} for this Python and system."
        cure = f"Use Python 3.11 to 3.13 on a 64-bit system, or change the pin in {CONSTRAINTS}."
    else:
        problem = f"pip could not install the libraries: {_last_line(said)}"
        cure = f"All it said is in {LOG}."
    raise CannotSetUp(problem, cure)


def _run_with_status(command: list[str]) -> str | None:
    """Runs pip with what it is at as one changing line; all of its output if it fails, else None."""
    said = []
    is_live = sys.stdout.isatty()
    piped = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "encoding": "utf-8", "errors": "replace"}
    # Two statements, because a Python that is too old has to read this file to be told so.
    with LOG.open("w", encoding="utf-8", buffering=1) as log:  # noqa: SIM117
        with subprocess.Popen(command, **piped) as pip:  # type: ignore[call-overload]
            for line in pip.stdout:
                log.write(line)
                said.append(line)
                if is_live and line.startswith(("Collecting", "Downloading", "  Downloading", "Installing")):
                    print(f"\r\x1b[K  {line.strip()[:76]}", end="", flush=True)
    if is_live:
        print("\r\x1b[K", end="", flush=True)
    return None if pip.returncode == 0 else "".join(said)


def _last_line(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith("ERROR")]
    return (errors or lines or ["it gave no reason"])[-1]


def _say(line: str) -> None:
    print(line, flush=True)
