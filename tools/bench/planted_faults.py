"""Exports with a fault planted in their files, each with the cause by which a proof must name it.

Each is what a real mistake leaves on disk: made by merging wrongly where a merge can be wrong, else by
editing the files. `proof_power.py`, `tests/test_tensor_proof.py` and `tests/test_proof.py` plant them.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from tiny_model import make_tiny_model
from transformers import AutoModelForCausalLM

from qadapt.adapters.facts import AdapterFacts, write_facts
from qadapt.data.prompt import load_contract
from qadapt.events import Event, StageAdvanced
from qadapt.export.exported_tensors import dtype_of, open_written
from qadapt.export.merge import merge
from qadapt.export.prompt_proof import prove_prompt
from qadapt.export.quantized import FORM as QUANTIZED
from qadapt.export.quantized import quantize
from qadapt.export.reference import open_reference
from qadapt.export.tensor_fault import (
    CHANGED,
    DAMAGED,
    LEFT_OUT,
    MISSING,
    NO_NUMBER,
    OTHER_BASE,
    OTHER_STRENGTH,
    OTHER_TENSOR,
    SWAPPED_FILES,
    TIED_HEAD,
    TOO_LARGE,
    TRANSPOSED,
    TYPE,
    UNEXPECTED,
    WRONG_FILE,
)
from qadapt.export.tensor_proof import TensorProof, prove_tensors, prove_written
from qadapt.export.writing import Writing

INDEX = "model.safetensors.index.json"
Q, K = "model.layers.0.self_attn.q_proj.weight", "model.layers.0.self_attn.k_proj.weight"
K_ABOVE, GATE = "model.layers.1.self_attn.k_proj.weight", "model.layers.0.mlp.gate_proj.weight"
EMBEDDING, HEAD, NORM = "model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"
_SHARDS = Writing(shard_bytes=150_000, chunk_bytes=12_000)


@dataclass(frozen=True)
class Case:
    """A base, an adapter and their export, which may be edited."""

    model: Path
    adapter: Path
    export: Path
    base: str = "dequantized"
    form: str = "merged-fp16"


def make_case(
    root: Path, *, family: str = "llama", base: str = "dequantized", form: str = "merged-fp16",
    size: float = 0.1, width: int = 64, **lora: Any,
) -> Case:  # fmt: skip
    """A tiny model with a random adapter of some size, exported into several shards."""
    make_tiny_model(root / "model", family, width=width)
    model = AutoModelForCausalLM.from_pretrained(root / "model", dtype=torch.float32)
    adapted = get_peft_model(
        model, LoraConfig(**{"r": 4, "lora_alpha": 6, "target_modules": "all-linear"} | lora)
    )
    generator = torch.Generator().manual_seed(1)
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            parameter.data = torch.randn(parameter.shape, generator=generator) * size
    adapted.save_pretrained(str(root / "adapter"), save_embedding_layers=False)
    write_facts(AdapterFacts("tiny", None, "f" * 64, "nf4", True, "fp32", "p" * 64), root / "adapter")
    case = Case(root / "model", root / "adapter", root / "export", base, form)
    export(case)
    return case


def export(case: Case) -> None:
    """Merges; what stood there is gone."""
    shutil.rmtree(case.export, ignore_errors=True)
    parts: dict[str, Any] = {
        "model_folder": case.model, "adapter_folder": case.adapter, "target": case.export,
        "base": case.base, "writing": _SHARDS,
    }  # fmt: skip
    is_quantized = case.form == QUANTIZED
    for _ in quantize(**parts, load_dtype="fp32") if is_quantized else merge(**parts, form=case.form):
        pass


def copied(case: Case, folder: Path) -> Case:
    """The same with an export of its own."""
    shutil.copytree(case.export, folder)
    return replace(case, export=folder)


def proof_of(case: Case) -> TensorProof:
    """The proof of an export."""
    if case.form == QUANTIZED:
        return finished(_quantized_proof(case))
    steps = prove_tensors(
        case.export, model_folder=case.model, adapter_folder=case.adapter, base=case.base, form=case.form
    )
    return finished(steps)


def _quantized_proof(case: Case) -> Generator[Event, None, TensorProof]:
    with (
        open_reference(case.model, [(case.adapter, 1.0)], base=case.base) as reference,
        open_written(case.export, case.form, model_folder=case.model) as written,
    ):
        return (yield from prove_written(written, reference, dtype=dtype_of(case.export, case.form)))


def finished(steps: Generator[Event, None, TensorProof]) -> TensorProof:
    """What a proof comes to."""
    found: list[TensorProof] = []

    def followed() -> Iterator[Event]:
        found.append((yield from steps))

    for event in followed():
        assert isinstance(event, StageAdvanced)
    return found[0]


def placed(case: Case) -> dict[str, str]:
    """Tensor → file, by the index."""
    index: dict[str, dict[str, str]] = json.loads((case.export / INDEX).read_text(encoding="utf-8"))
    return index["weight_map"]


def edit(case: Case, name: str, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
    """Writes another tensor in place of one."""
    path = case.export / placed(case)[name]
    tensors = load_file(path)
    tensors[name] = change(tensors[name].clone()).contiguous()
    save_file(tensors, path, {"format": "pt"})


def read(case: Case, name: str) -> torch.Tensor:
    """A tensor of the export."""
    return load_file(case.export / placed(case)[name])[name]


def put(case: Case, name: str, value: torch.Tensor) -> None:
    """Writes a tensor in place of one."""
    edit(case, name, lambda _: value)


def merged_with(case: Case, change: Callable[[Path], None], *, base: str | None = None) -> None:
    """Exports again with an adapter that has been changed."""
    adapter = case.export.with_name(f"{case.export.name}-adapter")
    shutil.copytree(case.adapter, adapter)
    change(adapter)
    export(replace(case, adapter=adapter, base=base or case.base))


def _without_update(adapter: Path) -> None:
    path = adapter / "adapter_model.safetensors"
    save_file({name: t * 0 if "lora_B" in name else t for name, t in load_file(path).items()}, path)


def _with_alpha_doubled(adapter: Path) -> None:
    path = adapter / "adapter_config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps(config | {"lora_alpha": 2 * config["lora_alpha"]}), encoding="utf-8")


def _without_adapter(case: Case) -> None:
    merged_with(case, _without_update)


def _without_adapter_of_one(case: Case) -> None:
    bare = replace(case, export=case.export.with_name(f"{case.export.name}-bare"))
    shutil.copytree(case.export, bare.export)
    _without_adapter(bare)
    put(case, K_ABOVE, read(bare, K_ABOVE))


def _exchange(case: Case) -> None:
    one, other = read(case, K), read(case, K_ABOVE)
    put(case, K, other)
    put(case, K_ABOVE, one)


def _exchange_files(case: Case) -> None:
    first, second = sorted(set(placed(case).values()))[:2]
    (case.export / first).rename(case.export / "between")
    (case.export / second).rename(case.export / first)
    (case.export / "between").rename(case.export / second)


def _cut_off(case: Case) -> None:
    path = case.export / placed(case)[Q]
    path.write_bytes(path.read_bytes()[:-100])


def _misplace(case: Case) -> None:
    path = case.export / INDEX
    index = json.loads(path.read_text(encoding="utf-8"))
    index["weight_map"][NORM] = placed(case)[EMBEDDING]
    path.write_text(json.dumps(index), encoding="utf-8")


def _flip_last_bit(tensor: torch.Tensor) -> torch.Tensor:
    tensor.view(torch.int16)[3, 5] ^= 1
    return tensor


def _set(value: float) -> Callable[[torch.Tensor], torch.Tensor]:
    def change(tensor: torch.Tensor) -> torch.Tensor:
        tensor[3, 5] = value
        return tensor

    return change


def _overflow(case: Case) -> None:
    """A number of the adapter beyond fp16, and the merge that let it become infinite."""
    path = case.adapter / "adapter_model.safetensors"
    tensors = load_file(path)
    tensors[f"base_model.model.{Q.removesuffix('.weight')}.lora_A.weight"][:, 5] = 1e7
    save_file(tensors, path)
    exact = replace(case, form="merged-fp32", export=case.export.with_name(f"{case.export.name}-exact"))
    export(exact)
    put(case, Q, read(exact, Q).half())


def _drop(case: Case) -> None:
    path = case.export / placed(case)[NORM]
    tensors = load_file(path)
    del tensors[NORM]
    save_file(tensors, path, {"format": "pt"})
    index = json.loads((case.export / INDEX).read_text(encoding="utf-8"))
    del index["weight_map"][NORM]
    (case.export / INDEX).write_text(json.dumps(index), encoding="utf-8")


def _add(case: Case, name: str, value: torch.Tensor) -> None:
    path = case.export / placed(case)[NORM]
    save_file(load_file(path) | {name: value}, path, {"format": "pt"})
    index = json.loads((case.export / INDEX).read_text(encoding="utf-8"))
    index["weight_map"][name] = path.name
    (case.export / INDEX).write_text(json.dumps(index), encoding="utf-8")


def _overwrite_tied(case: Case) -> None:
    """A head with an adapter of its own, merged into the table that the embedding shares."""
    merged_head = read(case, HEAD)
    _drop_head(case)
    put(case, EMBEDDING, merged_head)
    path = case.export / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps(config | {"tie_word_embeddings": True}), encoding="utf-8")


def _drop_head(case: Case) -> None:
    path = case.export / placed(case)[HEAD]
    tensors = {name: value for name, value in load_file(path).items() if name != HEAD}
    index = json.loads((case.export / INDEX).read_text(encoding="utf-8"))
    del index["weight_map"][HEAD]
    (case.export / INDEX).write_text(json.dumps(index), encoding="utf-8")
    path.unlink()
    if tensors:
        save_file(tensors, path, {"format": "pt"})


@dataclass(frozen=True)
class Planted:
    """A fault: how it comes into the files, and what the proof must say of which tensor or file."""

    plant: Callable[[Case], None]
    cause: str
    place: str = ""
    family: str = "llama"
    targets: str | tuple[str, ...] = "all-linear"
    base: str = "dequantized"
    form: str = "merged-fp16"
    size: float = 0.1
    width: int = 64

    def right(self, root: Path) -> Case:
        """An export to plant it in."""
        targets = self.targets if isinstance(self.targets, str) else list(self.targets)
        return make_case(
            root, family=self.family, base=self.base, form=self.form, size=self.size, width=self.width,
            target_modules=targets,
        )  # fmt: skip


PLANTED = {
    "adapter left out": Planted(_without_adapter, LEFT_OUT, Q),
    "adapter left out of one tensor": Planted(_without_adapter_of_one, LEFT_OUT, K_ABOVE),
    "alpha doubled": Planted(lambda case: merged_with(case, _with_alpha_doubled), OTHER_STRENGTH, Q),
    "small adapter left out of 4 bits": Planted(
        _without_adapter, LEFT_OUT, Q, base="original", form=QUANTIZED, size=0.01, width=128
    ),
    "small adapter doubled in 4 bits": Planted(
        lambda case: merged_with(case, _with_alpha_doubled),
        OTHER_STRENGTH,
        Q,
        base="original",
        form=QUANTIZED,
        size=0.01,
        width=128,
    ),
    "merged on the other base": Planted(
        lambda case: merged_with(case, lambda _: None, base="original"), OTHER_BASE, Q
    ),
    "square tensor transposed": Planted(lambda case: edit(case, Q, lambda t: t.T), TRANSPOSED, Q),
    "oblong tensor transposed": Planted(lambda case: edit(case, GATE, lambda t: t.T), TRANSPOSED, GATE),
    "tied head overwritten": Planted(
        _overwrite_tied, TIED_HEAD, EMBEDDING, family="smollm2", targets=("q_proj", "lm_head")
    ),
    "second head beside a tied one": Planted(
        lambda case: _add(case, HEAD, read(case, EMBEDDING) * 2), TIED_HEAD, HEAD, family="smollm2"
    ),
    "overflow in fp16": Planted(_overflow, TOO_LARGE, Q),
    "infinite number": Planted(lambda case: edit(case, Q, _set(float("inf"))), NO_NUMBER, Q),
    "NaN": Planted(lambda case: edit(case, NORM, lambda t: t * float("nan")), NO_NUMBER, NORM),
    "two tensors exchanged": Planted(_exchange, OTHER_TENSOR, K),
    "tensor of another layer": Planted(lambda case: put(case, K, read(case, K_ABOVE)), OTHER_TENSOR, K),
    "shard files exchanged": Planted(_exchange_files, SWAPPED_FILES, "model-00001-of-"),
    "one bit flipped, the last": Planted(lambda case: edit(case, Q, _flip_last_bit), CHANGED, Q),
    "one number set to 0": Planted(lambda case: edit(case, EMBEDDING, _set(0.0)), CHANGED, EMBEDDING),
    "file cut off": Planted(_cut_off, DAMAGED, "model-0000"),
    "index names a wrong file": Planted(_misplace, WRONG_FILE, NORM),
    "tensor missing": Planted(_drop, MISSING, NORM),
    "tensor too many": Planted(
        lambda case: _add(case, "model.rotary.inv_freq", torch.ones(4)), UNEXPECTED, "model.rotary.inv_freq"
    ),
    "tensor of another type": Planted(lambda case: edit(case, NORM, lambda t: t.bfloat16()), TYPE, NORM),
}
"""Faults by name."""


def is_named(proof: TensorProof, planted: Planted) -> bool:
    """Whether the proof says what is wrong, and where."""
    return any(
        fault.cause == planted.cause and fault.place.startswith(planted.place) for fault in proof.faults
    )


def _another_template(folder: Path) -> None:
    path = folder / "chat_template.jinja"
    path.write_text(path.read_text(encoding="utf-8").replace("<|im_start|>", "<|im_end|>"), encoding="utf-8")


def _no_template(folder: Path) -> None:
    (folder / "chat_template.jinja").unlink()


def _one_end_token(folder: Path) -> None:
    path = folder / "generation_config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps(config | {"eos_token_id": min(config["eos_token_id"])}), encoding="utf-8")


def _exchange_merges(folder: Path) -> None:
    """The last two merges the other way round: the same vocabulary, other tokens of hardly any text."""
    path = folder / "tokenizer.json"
    values = json.loads(path.read_text(encoding="utf-8"))
    merges = values["model"]["merges"]
    merges[-2:] = merges[:-3:-1]
    path.write_text(json.dumps(values), encoding="utf-8")


PROMPTS: dict[str, tuple[Callable[[Path], None], str]] = {
    "wrong template": (_another_template, "the chat template is not the run's"),
    "missing template": (_no_template, "the chat template is missing"),
    "missing end token": (_one_end_token, "is missing in generation_config.json"),
    "tokenizer with other merges": (_exchange_merges, "tokenizer.json is not the run's"),
}
"""Faults in what stands beside the weights, by name: how each is planted, and what the proof must say."""


def prompt_faults(root: Path, plant: Callable[[Path], None]) -> tuple[str, ...]:
    """What the proof says of a folder that asks as its run did, once a fault is planted."""
    folder = make_tiny_model(root, "qwen2")
    contract = load_contract(folder)
    path = folder / "generation_config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps(config | {"eos_token_id": sorted(contract.end_ids)}), encoding="utf-8")
    assert not prove_prompt(folder, contract).faults
    plant(folder)
    return prove_prompt(folder, contract).faults
