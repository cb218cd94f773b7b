"""An adapter that qadapt did not train, made one that says what must be known to load it.

A plain PEFT folder, or one of the library `adapters`, names its base, and neither how that was held in
training nor how prompts were made. The first must be said by whoever brings it; the second is taken to be the
base's own template, and is not known to be right. Its numbers stay as they are.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from qadapt.adapters.adapters_library import import_bottleneck, is_of_library, librarys_config
from qadapt.adapters.facts import BASE_KEEPING_STARTS, FACTS_FILE, AdapterFacts, read_facts, write_facts
from qadapt.adapters.peft_config import CONFIG, PEFT_TYPES, peft_values
from qadapt.adapters.peft_prompt import PEFT_PROMPTS, import_prompt
from qadapt.adapters.versions import copy_adapter_files
from qadapt.data.prompt import CONTRACT_FILE, load_contract
from qadapt.errors import BadAdapter
from qadapt.model.folder import read_config
from qadapt.model.precision import choose_compute_dtype, choose_device
from qadapt.model.source import find_model

Held = Literal["nf4", "int8", "none"]


@dataclass(frozen=True)
class Said:
    """What is said of an adapter that comes from elsewhere.

    Attributes:
        revision: Branch, tag or commit of a hub.
        held: How its base was held in training: in 4 bits, 8 bits, or as it is.
        base: Its base, if not the one that its configuration names, or where that is here.
    """

    revision: str | None = None
    held: Held | None = None
    base: str | None = None


def is_foreign(folder: Path) -> bool:
    """Whether a folder's adapter does not say itself what it was trained on."""
    return (folder / CONFIG).is_file() and not (folder / FACTS_FILE).is_file()


def adopt(folder: Path, place: Path, said: Said, *, name: str) -> None:
    """Writes a copy of an adapter that says what it was trained on.

    Args:
        folder: A PEFT folder, or one of the library `adapters`.
        place: An empty folder.
        said: What is said of it.
        name: What to call it in messages.

    Raises:
        BadAdapter: Not enough is said, it is no adapter, or of a method that is not loaded here.
        BadModel: Its base cannot be found or read.
        HubRefused: Its base is on a hub, which said no.
        Unsupported: It is of the library `adapters`, and uses what is not known here.
    """
    if said.held is None:
        raise BadAdapter(
            f"{name} was not trained with qadapt: nothing there says how its base was held.",
            cure="Say it: --held nf4 (QLoRA), --held int8, or --held none (16 or 32 bits).",
        )
    is_librarys = is_of_library(folder)
    config = librarys_config(folder) if is_librarys else _config_of(folder, name)
    base = said.base or config.get("base_model_name_or_path")
    revision = None if said.base else config.get("revision")
    if not isinstance(base, str) or not base or not isinstance(revision, str | None):
        raise BadAdapter(f"{name} names no base.", cure="Name it with --base.")
    files = find_model(base, revision=revision)
    contract = load_contract(files.folder)
    if is_librarys:
        import_bottleneck(folder, place)
    elif config["peft_type"] in PEFT_PROMPTS:
        model_type = str(read_config(files.folder, name=base).get("model_type"))
        import_prompt(folder, place, model_type=model_type)
    else:
        copy_adapter_files(folder, place)
    facts = AdapterFacts(
        base=files.name,
        revision=files.revision,
        fingerprint=files.fingerprint,
        quantization=said.held,
        double_quant=said.held == "nf4",
        load_dtype=choose_compute_dtype("auto", choose_device("auto")),
        prompt_fingerprint=contract.fingerprint,
    )
    write_facts(facts, place)
    text = json.dumps(contract.facts(), indent=2) + "\n"
    (place / CONTRACT_FILE).write_text(text, encoding="utf-8")


def move_base(folder: Path, place: Path, base: str) -> None:
    """Writes a copy of an adapter that finds its base elsewhere: the same files under another name.

    Args:
        folder: An adapter's that says what it was trained on.
        place: An empty folder.
        base: Where its base is, as `find_model` takes it.

    Raises:
        BadAdapter: That is another base.
        BadModel: It cannot be found or read.
        BadRun: The folder holds no adapter.
    """
    facts, files = read_facts(folder), find_model(base)
    if files.fingerprint != facts.fingerprint:
        raise BadAdapter(
            f"{base} is not the base of the adapter in {folder}: that is {facts.base}, with other files.",
            cure="Give the very files it was trained on.",
        )
    copy_adapter_files(folder, place)
    write_facts(replace(facts, base=files.name, revision=files.revision), place)


def _config_of(folder: Path, name: str) -> dict[str, Any]:
    config = peft_values(folder)
    method, start = config.get("peft_type"), config.get("init_lora_weights", True)
    known = (*PEFT_TYPES, *PEFT_PROMPTS)
    if method not in known:
        raise BadAdapter(
            f"{name} is of the method {method}; of PEFT's, {', '.join(known)} are loaded here.",
            cure="Load it with PEFT.",
        )
    if start not in BASE_KEEPING_STARTS:
        raise BadAdapter(
            f"{name} has init_lora_weights = {start!r}, which rewrites the base it starts on: on the "
            "published weights it is another model.",
            cure="Ask its author for one saved with path_initial_model_for_weight_conversion.",
        )
    return config
