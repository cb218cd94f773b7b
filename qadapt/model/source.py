"""Where a base model comes from: an alias, a folder, a GGUF file or a hub id; all become a checked folder.

This module decides which of the four a text is and imports no torch; each kind has its own module. Whatever
the source, the result is a folder as `save_pretrained` writes it: config.json, *.safetensors, tokenizer
files.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from qadapt.cache import cache_folder, ignore
from qadapt.errors import BadModel
from qadapt.model.folder import checked_folder
from qadapt.model.gguf_source import converted_once, folder_from_gguf, stored_type
from qadapt.model.quick_start import SMOLLM2, PackagedModel, kept_file, packaged_file
from qadapt.stage import Report

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


@dataclass(frozen=True)
class ModelFiles:
    """A model on this machine, whole and checked.

    Attributes:
        name: What it was asked for as.
        folder: Holds config.json, *.safetensors with their index, and tokenizer files.
        revision: The hub's commit; None for what does not come from a hub.
        fingerprint: Recognizes the weights, wherever they lie (`folder.checked_folder`).
    """

    name: str
    folder: Path
    revision: str | None
    fingerprint: str


def find_model(
    source: str,
    *,
    revision: str | None = None,
    cache: Path | None = None,
    endpoint: str | None = None,
    report: Report = ignore,
    needs_weights: bool = True,
) -> ModelFiles:
    """Finds a model, fetching or converting it the first time.

    Args:
        source: `smollm2-135m`, a model folder, a `.gguf` file, or a hub id `owner/name`.
        revision: Branch, tag or commit; only for a hub id.
        cache: Where downloads and converted models are kept; by default `cache_folder()`, and for hub
            models huggingface_hub's own cache.
        endpoint: Another hub than huggingface_hub's default.
        report: Told of progress: stage, bytes done, bytes in total.
        needs_weights: Of a hub model, fetch the weights, too: without them there is no fingerprint, and the
            folder serves for its shape and its tokens only.

    Raises:
        BadModel: Nothing of that name, or what is there cannot be read or trusted.
        HubRefused: Gated, missing, or out of reach.
        BadOutput: The cache is read-only or its disk too full.
        Unsupported: The architecture is not proven here.
    """
    place = Path(source).expanduser()
    kept = cache or cache_folder()
    is_alias = source.lower() == SMOLLM2.alias
    if revision is not None and (is_alias or place.exists()):
        raise BadModel(
            f"{source} has no revisions ({revision!r}): only hub models do.", cure="Leave the revision out."
        )
    if is_alias:
        return _converted(source, lambda: _packaged_folder(SMOLLM2, cache=kept, report=report))
    if place.is_dir():
        return ModelFiles(source, place.resolve(), None, checked_folder(place, name=source))
    if place.is_file() and place.suffix.lower() == ".gguf":
        return _converted(source, lambda: folder_from_gguf(place, cache=kept, report=report))
    if _HUB_ID.fullmatch(source) and place.suffix.lower() != ".gguf":
        from qadapt.model.hub import snapshot

        found = snapshot(
            source,
            revision=revision,
            cache=cache,
            endpoint=endpoint,
            report=report,
            needs_weights=needs_weights,
        )
        if not needs_weights:
            return ModelFiles(source, found.folder, found.commit, "")
        return ModelFiles(source, found.folder, found.commit, checked_folder(found.folder, name=source))
    raise BadModel(
        f"No model {source!r}: it is no folder, no .gguf file, no hub id (owner/name) and no known alias.",
        cure=f"Check the path, or use `{SMOLLM2.alias}`, which needs no hub.",
    )


def is_here(source: str, *, revision: str | None = None, cache: Path | None = None) -> bool:
    """Whether a model needs no download, as far as can be told without asking the hub.

    Args:
        source: As `find_model` takes it; so too the others.
        revision: Branch, tag or commit.
        cache: Where downloads are kept.
    """
    if Path(source).expanduser().exists():
        return True
    if source.lower() == SMOLLM2.alias:
        return kept_file(SMOLLM2, cache=cache or cache_folder()).is_file()
    if not _HUB_ID.fullmatch(source):
        return False
    from qadapt.model.hub import is_kept

    return is_kept(source, revision=revision, cache=cache)


def quantized_type_of(source: str) -> str | None:
    """The type of most weights of a source that is itself quantized, such as `Q4_1`; None from 16 bits on.

    Only a GGUF file can be: other quantized models are refused when they are looked for.

    Args:
        source: As `find_model` takes it.

    Raises:
        BadModel: The file cannot be read.
    """
    if source.lower() == SMOLLM2.alias:
        return SMOLLM2.stored_type
    place = Path(source).expanduser()
    is_gguf = place.is_file() and place.suffix.lower() == ".gguf"
    return stored_type(place) if is_gguf else None


def _packaged_folder(model: PackagedModel, *, cache: Path, report: Report) -> Path:
    return converted_once(
        lambda: packaged_file(model, cache=cache, report=report),
        stem=Path(model.member).stem,
        sha256=model.sha256,
        cache=cache,
        report=report,
    )


def _converted(name: str, convert: Callable[[], Path]) -> ModelFiles:
    folder = convert()
    try:
        fingerprint = checked_folder(folder, name=name)
    except BadModel:
        # The cache is ours to mend: whatever damaged it, the source is still there.
        shutil.rmtree(folder)
        folder = convert()
        fingerprint = checked_folder(folder, name=name)
    return ModelFiles(name, folder, None, fingerprint)
