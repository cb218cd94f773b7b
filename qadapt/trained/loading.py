"""Loads whatever can be asked: a run, an adapter's folder, an exported model, a GGUF file.

With an adapter, the base is held as it was trained on. An exported model computes in its own type, or in the
one that the device is good at. Each comes with its prompt contract. Knows no conversation.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import CONFIG_MAPPING, PreTrainedModel

from qadapt.adapters.facts import read_facts
from qadapt.adapters.method import load_adapter
from qadapt.adapters.swap import Swap
from qadapt.cache import ignore
from qadapt.data.prompt import CONTRACT_FILE, PromptContract, exported_contract, load_contract, saved_contract
from qadapt.engine.host import device_of
from qadapt.engine.out_of_memory import RanOut, attempt, free_memory
from qadapt.engine.tiles import set_tiles
from qadapt.errors import BadModel, BadRun, DoesNotFit, Unsupported
from qadapt.model.folder import read_config, weight_files
from qadapt.model.load import load_base, load_stored
from qadapt.model.placement import on_host
from qadapt.model.precision import DTYPES, choose_compute_dtype, choose_device
from qadapt.model.source import find_model
from qadapt.quiet import quiet_libraries
from qadapt.run_folder import RunFolder
from qadapt.serve.partner import Partner, find_partner
from qadapt.stage import Report
from qadapt.train.oom import FILE_NAME as RUNGS_FILE
from qadapt.train.oom import read_rungs
from qadapt.train.stored_plan import read_plan
from qadapt.trained.same_base import find_same_base
from qadapt.trained.together import Company, Together

_STORED = {"float16": "fp16", "float32": "fp32"}
"""By their names in config.json, the types that products may have, too, if the device is good at them."""


@dataclass(frozen=True)
class Tuned:
    """A base with a trained adapter, and how it is talked to."""

    model: PeftModel
    contract: PromptContract


@dataclass(frozen=True)
class Loaded:
    """What is talked to.

    Attributes:
        model: Who answers.
        contract: How it is asked.
        said: What it is, in words.
        together: Where other adapters can be brought in beside its own, if it has one and its method allows
            that.
    """

    model: PreTrainedModel | PeftModel | Swap
    contract: PromptContract
    said: str
    together: Together | None = None


def load_partner(partner: Partner, report: Report = ignore) -> Loaded:
    """Loads whom to talk to onto the best device there is.

    Args:
        partner: See `serve/partner.py`.
        report: Told of progress, where a base must be fetched or a file converted.

    Raises:
        BadRun: An adapter's base or tokenizer is not what it was.
        BadModel: An exported model is not whole, or cannot be read.
        DoesNotFit: Memory ran out.
    """
    device = choose_device("auto")
    if partner.kind == "gguf":
        return _load_gguf(partner.path, device, report)
    if partner.kind == "model":
        return _load_exported(partner.path, device)
    adapter, placed = _adapter_of(partner)
    base, files = _load_base_of(adapter, placed, device=device, report=report)
    where = f"of {partner.path.name}" if partner.kind == "run" else f"in {adapter}"
    return _beside(base, files, adapter, name=partner.path.name, where=where)


def load_run(run: RunFolder, *, device: torch.device, report: Report = ignore) -> Tuned:
    """Base and adapter of a finished run, as they were trained, and placed as they were in the end.

    Raises:
        BadRun: It has no adapter yet, or its base or tokenizer changed.
        DoesNotFit: Memory ran out.
    """
    read_facts(run.adapter)
    return _tuned(run.adapter, _placed(run), device=device, report=report)


def load_tuned(adapter: Path, *, device: torch.device, report: Report = ignore) -> Tuned:
    """A base with the adapter of a folder, as it was trained.

    Args:
        adapter: An adapter's folder that qadapt wrote.
        device: Where it computes.
        report: Told of progress, where the base must be fetched.

    Raises:
        BadRun: There is no adapter, or its base or tokenizer is not what it was.
        DoesNotFit: Memory ran out.
    """
    return _tuned(adapter, _Placed(), device=device, report=report)


def load_together(
    names: Sequence[str],
    *,
    folder: str | Path = "runs",
    store: str | Path = "adapters",
    device: str = "auto",
    report: Report = ignore,
) -> Together:
    """Loads one base with several adapters beside it, none of which answers yet.

    Args:
        names: Runs, adapters' folders, or names, tags or versions of the store. The base is held as the first
            was trained on it.
        folder: Where the runs are.
        store: Where the store is.
        device: Where it computes.
        report: Told of progress, where the base must be fetched.

    Raises:
        BadAdapter: They were not trained on one base, held one way; or a version is damaged.
        BadRun: There is no adapter of a name, or its base or tokenizer is not what it was.
        DoesNotFit: Memory ran out.
        Unsupported: A method is none that can stand beside others.
    """
    quiet_libraries()
    partner = find_partner(names[0], folder, store=store)
    if not partner.has_adapter:
        raise BadRun(f"{names[0]} is no adapter: it is a whole model.", cure="Give adapters of one base.")
    adapter, placed = _adapter_of(partner)
    base, files = _load_base_of(adapter, placed, device=choose_device(device), report=report)
    together = Together(Swap(base), read_facts(adapter), files)
    Company(together, folder, store).bring(names)
    return together


def _adapter_of(partner: Partner) -> tuple[Path, _Placed]:
    """The folder of an adapter, and how its base is placed."""
    if partner.kind != "run":
        return partner.path, _Placed()
    run = RunFolder(partner.path)
    read_facts(run.adapter)
    return run.adapter, _placed(run)


@dataclass(frozen=True)
class _Placed:
    """What of a base stays on the host, and in how many pieces its feed-forward parts compute."""

    offload: Sequence[str] = ()
    tiles: int = 1


def _placed(run: RunFolder) -> _Placed:
    """How a run's base was placed in the end."""
    plan = read_plan(run.plan)
    taken = (int(rung.value) for rung in read_rungs(run.path / RUNGS_FILE) if rung.knob == "mlp_tiles")
    return _Placed(on_host(plan.offload), max((plan.mlp_tiles, *taken)))


def _tuned(adapter: Path, placed: _Placed, *, device: torch.device, report: Report) -> Tuned:
    base, files = _load_base_of(adapter, placed, device=device, report=report)
    return Tuned(load_adapter(base, adapter), saved_contract(adapter, files))


def _load_base_of(
    adapter: Path, placed: _Placed, *, device: torch.device, report: Report
) -> tuple[PreTrainedModel, Path]:
    """The base of an adapter as it was trained on, and the folder of its files."""
    facts = read_facts(adapter)
    files = find_same_base(facts, report)

    def load() -> PreTrainedModel:
        return load_base(
            files.folder,
            quantization=facts.quantization,
            double_quant=facts.double_quant,
            dtype=DTYPES[facts.load_dtype],
            device=device,
            offload=placed.offload if device.type == "cuda" else (),
        )

    base = _if_it_fits(load, f"The base {facts.base} of the adapter in {adapter}", device)
    set_tiles(base, placed.tiles)
    return base, files.folder


def _beside(base: PreTrainedModel, files: Path, adapter: Path, *, name: str, where: str) -> Loaded:
    """A base with an adapter beside which others can stand; alone, if its method does not allow that."""
    facts, device = read_facts(adapter), device_of(base)
    held = {"nf4": " in 4 bits", "int8": " in 8 bits", "none": ""}[facts.quantization]
    said = f"{facts.base}{held} with the adapter {where}, on {device.type} ({facts.load_dtype})"
    together = Together(Swap(base), facts, files)
    try:
        together.add(name, adapter)
    except Unsupported:
        return Loaded(load_adapter(base, adapter), saved_contract(adapter, files), said)
    together.model.use(name)
    return Loaded(together.model, together.contracts[name], said, together)


def _load_exported(folder: Path, device: torch.device) -> Loaded:
    config = read_config(folder, name=str(folder))
    quantization, dtype = config.get("quantization_config"), _dtype_of(config, device)
    _check_loadable(config, folder)
    weight_files(folder, name=str(folder))
    stored = str(config.get("dtype", config.get("torch_dtype"))) if quantization is None else "4 bits"
    contract = exported_contract(folder)

    def load() -> PreTrainedModel:
        if quantization is None:
            return _plain(folder, dtype=dtype, device=device)
        return load_stored(folder, dtype=DTYPES[dtype], device=device)

    model = _if_it_fits(load, f"The model in {folder}", device)
    said = f"the exported model {folder.resolve().name} ({stored}), on {device.type} ({dtype})"
    return Loaded(model, contract, said)


def _load_gguf(path: Path, device: torch.device, report: Report) -> Loaded:
    files = find_model(str(path), report=report)
    dtype = _dtype_of(read_config(files.folder, name=path.name), device)
    contract = load_contract(files.folder, date=_day_of(path.parent))
    model = _if_it_fits(
        lambda: _plain(files.folder, dtype=dtype, device=device), f"The model in {path}", device
    )
    said = f"{path.name}, its weights converted to 16 bits in the cache, on {device.type} ({dtype})"
    return Loaded(model, contract, said)


def _plain(folder: Path, *, dtype: str, device: torch.device) -> PreTrainedModel:
    return load_base(folder, quantization="none", double_quant=False, dtype=DTYPES[dtype], device=device)


def _if_it_fits(load: Callable[[], PreTrainedModel], what: str, device: torch.device) -> PreTrainedModel:
    loaded = attempt(load)
    if not isinstance(loaded, RanOut):
        return loaded
    free_memory(device)
    raise DoesNotFit(
        f"{what} does not fit the memory of {device}.",
        cure="Close what else uses the memory. A run planned with memory.offload=[embeddings], or with "
        "layers in it, too, is loaded that way; a run in 4 bits needs a quarter of its merged model.",
    )


def _dtype_of(config: Mapping[str, Any], device: torch.device) -> str:
    """The type products are computed in: what is stored where the device is good at it, else the table's."""
    stored = _STORED.get(str(config.get("dtype", config.get("torch_dtype"))), "auto")
    is_own = stored == "fp32" or device.type == "cuda"
    return choose_compute_dtype(stored if is_own else "auto", device)


def _check_loadable(config: Mapping[str, Any], folder: Path) -> None:
    if "auto_map" in config and config.get("model_type") not in CONFIG_MAPPING:
        raise BadModel(
            f"{folder} needs Python code from its repository (auto_map in config.json), which is never run.",
            cure="Give a model whose architecture transformers knows itself.",
        )
    quantization = config.get("quantization_config")
    if quantization is None:
        return
    if quantization.get("quant_method") != "bitsandbytes" or not quantization.get("load_in_4bit"):
        method = quantization.get("quant_method", "unknown method")
        raise BadModel(
            f"{folder} is quantized in a way that is not loaded here ({method}).",
            cure="Loaded are 4 bits of bitsandbytes (bnb-4bit), merged models, GGUF files and adapters.",
        )


def _day_of(folder: Path) -> str | None:
    """The day that an exported model's template prints, if its prompt contract lies beside it."""
    path = folder / CONTRACT_FILE
    if not path.is_file():
        return None
    try:
        day: str | None = json.loads(path.read_text(encoding="utf-8"))["date"]
    except (ValueError, LookupError, TypeError) as error:
        raise BadModel(f"{path} is no prompt contract: {error}.", cure="Export it again.") from None
    return day
