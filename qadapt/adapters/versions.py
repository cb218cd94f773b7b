"""A version of an adapter: which files it has, and what is known of where they come from.

A version is told by the sha256 of its description, `version.json`, which holds the sha256 of every file: the
same id is the same adapter to the last bit, on every machine (as in git). No time stands in it, so that what
is added twice is one version. Knows no store.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import MISSING, asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from qadapt.adapters.facts import AdapterFacts
from qadapt.errors import BadAdapter
from qadapt.licences import is_licence
from qadapt.units import MIB

VERSION_FILE = "version.json"
_FORMAT = 1
_WEIGHTS = ("adapter_model.safetensors", "side_car.safetensors")
_FILES = (
    *_WEIGHTS, "adapter_config.json", "side_car.json", "qadapt.json", "prompt.json", "combination.json",
    "tokenizer.json", "tokenizer_config.json", "tokenizer.model", "tekken.json", "vocab.json", "vocab.txt",
    "merges.txt", "special_tokens_map.json", "added_tokens.json", "chat_template.jinja", "chat_template.json",
)  # fmt: skip
"""What belongs to an adapter; others are left out: notes, checkpoints, and pickles above all."""
PATTERNS = (*_FILES, "additional_chat_templates/*")
"""The same and its templates as patterns; of licences a folder may have more than its adapter's."""
_TEMPLATE = re.compile(r"additional_chat_templates/\w[\w.-]*\.jinja")
_PICKLED = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")


@dataclass(frozen=True)
class FileFacts:
    """Of one file: its size and what recognizes its bytes."""

    bytes: int
    sha256: str


@dataclass(frozen=True)
class Record:
    """What is known of an adapter beside its files.

    Attributes:
        facts: What it was trained on.
        method: Such as `lora`.
        source: Where it was taken from, in words.
        data: Hash of the rows it was trained on; empty where that is not known, so too the next.
        recipe: Of its run, as plain values.
        metrics: Losses in nats per learned token and counts, by name.
    """

    facts: AdapterFacts
    method: str
    source: str
    data: str = ""
    recipe: Mapping[str, Any] = field(default_factory=dict)
    metrics: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Version:
    """An adapter as it is kept.

    Attributes:
        files: Path in its folder → what recognizes the file.
        record: What is known of it.
        parent: Id of the version it followed; None for a first one.
    """

    files: Mapping[str, FileFacts]
    record: Record
    parent: str | None = None

    @property
    def id(self) -> str:
        """The sha256 of its description."""
        return hashlib.sha256(self.text().encode()).hexdigest()

    @property
    def bytes(self) -> int:
        """Of all its files."""
        return sum(facts.bytes for facts in self.files.values())

    def has_content_of(self, other: Version) -> bool:
        """Whether two versions are the same but for what they followed."""
        return replace(self, parent=None).text() == replace(other, parent=None).text()

    def text(self) -> str:
        """The description, the same text for the same version in every release.

        A fact that came with a later release stands there only where it says something.
        """
        values = {"version": _FORMAT, **asdict(self)}
        facts = values["record"]["facts"]
        for each in fields(AdapterFacts):
            if each.default is not MISSING and facts[each.name] == each.default:
                del facts[each.name]
        return json.dumps(values, indent=2, sort_keys=True, ensure_ascii=False) + "\n"


def read_version(folder: Path) -> Version:
    """The version that a folder of a store holds, by its description; the files are not looked at.

    Raises:
        BadAdapter: It is missing, or not what its folder is named after.
    """
    try:
        text = (folder / VERSION_FILE).read_text(encoding="utf-8")
        values = json.loads(text)
        if values["version"] != _FORMAT:
            raise ValueError(f"it has format {values['version']}, this release reads {_FORMAT}")
        record = {**values["record"], "facts": AdapterFacts(**values["record"]["facts"])}
        files = {name: FileFacts(**facts) for name, facts in values["files"].items()}
        version = Version(files, Record(**record), values["parent"])
        if version.id != folder.name:
            raise ValueError("it was changed")
        return version
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise BadAdapter(
            f"The version {folder.name[:12]} has no sound {VERSION_FILE}: {error}.",
            cure="Add the adapter again from where it came from; `qadapt adapters list` shows what is whole.",
        ) from None


def fault_of(version: Version, folder: Path) -> str | None:
    """What in a version's folder is not as it was added: a file that is damaged, missing, or too many.

    Args:
        version: What must be there.
        folder: Its folder: the description, and `adapter` with the files.
    """
    description, adapter = folder / VERSION_FILE, folder / "adapter"
    if not description.is_file() or description.read_bytes() != version.text().encode():
        return VERSION_FILE
    for name, facts in version.files.items():
        path = adapter / name
        if not path.is_file() or path.stat().st_size != facts.bytes or sha256_of(path) != facts.sha256:
            return name
    there = {path.relative_to(adapter).as_posix() for path in adapter.rglob("*") if not path.is_dir()}
    return min(there - set(version.files), default=None)


def files_of(folder: Path) -> dict[str, FileFacts]:
    """The files of an adapter's folder that belong to it, with their hashes.

    Args:
        folder: A PEFT folder or a side-car's.

    Raises:
        BadAdapter: A file is a link, which may lead anywhere; or its weights are a pickle, or missing.
    """
    found: dict[str, FileFacts] = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if not belongs(name):
            continue
        if path.is_symlink():
            raise BadAdapter(
                f"{name} in {folder} is a link to {path.readlink()}: an adapter's files lie in its folder.",
                cure="Copy the file itself into the folder.",
            )
        if path.is_file():
            found[name] = FileFacts(path.stat().st_size, sha256_of(path))
    check_weights(found, [path.name for path in folder.glob("*")], where=str(folder))
    return found


def copy_adapter_files(folder: Path, place: Path) -> None:
    """Copies the files of an adapter's folder that belong to it into another; raises as `files_of`."""
    for name in files_of(folder):
        (place / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(folder / name, place / name)


def belongs(name: str) -> bool:
    """Whether a file, by its path in the folder, is one of an adapter's."""
    return name in _FILES or is_licence(name) or _TEMPLATE.fullmatch(name) is not None


def check_weights(chosen: Iterable[str], names: Iterable[str], *, where: str) -> None:
    """Checks that among an adapter's files there are weights that can be read safely.

    Args:
        chosen: The files that belong to it.
        names: All files there are.
        where: Folder or repository, for messages.

    Raises:
        BadAdapter: There are none.
    """
    if any(name in _WEIGHTS for name in chosen):
        return
    pickles = sorted(
        (name for name in names if name.endswith(_PICKLED)), key=lambda name: "model" not in name
    )
    if pickles:
        raise BadAdapter(
            f"The weights in {where} are a pickle ({pickles[0]}), which can run code when it is read: only "
            "safetensors are.",
            cure="Ask its author to save it with safetensors, or choose another revision.",
        )
    raise BadAdapter(
        f"{where} holds no adapter: it has none of {', '.join(_WEIGHTS)}.",
        cure="Give an adapter's folder, or a run.",
    )


def sha256_of(path: Path) -> str:
    """The sha256 of a file's bytes."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(MIB):
            digest.update(block)
    return digest.hexdigest()
