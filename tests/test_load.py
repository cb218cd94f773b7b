"""A base is loaded whole, in every proven family, or refused with the tensor's name before it is loaded."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import TinyModel
from safetensors.torch import load_file, save_file
from tiny_model import FAMILIES

from qadapt.errors import BadModel
from qadapt.model.load import load_base

CPU = torch.device("cpu")
Tensors = dict[str, torch.Tensor]


def load(folder: Path, quantization: str = "nf4") -> torch.nn.Module:
    return load_base(folder, quantization=quantization, double_quant=True, dtype=torch.float32, device=CPU)


def changed(source: Path, folder: Path, change: Callable[[Tensors], object], **config: object) -> Path:
    """A copy of a model folder with other tensors, and other values in config.json."""
    shutil.copytree(source, folder)
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    path = folder / "config.json"
    values = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps(values | config), encoding="utf-8")
    return folder


@pytest.mark.parametrize("quantization", ["nf4", "none"])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_loads_with_exactly_the_weights_of_its_files(
    tiny_model: TinyModel, family: str, quantization: str
) -> None:
    folder = tiny_model(family)
    model = load(folder, quantization)
    loaded = model.state_dict()
    for name, tensor in load_file(folder / "model.safetensors").items():
        if loaded[name].dtype.is_floating_point:
            assert torch.equal(loaded[name], tensor.float()), name


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_loads_with_its_own_head_and_with_a_tied_one(
    tiny_model: TinyModel, tmp_path: Path, family: str
) -> None:
    def own_head(tensors: Tensors) -> None:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"] + 1

    def no_head(tensors: Tensors) -> None:
        tensors.pop("lm_head.weight", None)

    def same_head(tensors: Tensors) -> None:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()

    source = tiny_model(family)
    model = load(changed(source, tmp_path / "own", own_head, tie_word_embeddings=False))
    assert not torch.equal(model.lm_head.weight, model.model.embed_tokens.weight)
    for place, head in (("none", no_head), ("same", same_head)):
        model = load(changed(source, tmp_path / place, head, tie_word_embeddings=True))
        assert model.lm_head.weight is model.model.embed_tokens.weight


@pytest.mark.parametrize("quantization", ["nf4", "none"])
@pytest.mark.parametrize(
    "name",
    [
        "model.embed_tokens.weight",
        "model.norm.weight",
        "model.layers.1.input_layernorm.weight",
        "model.layers.1.mlp.up_proj.weight",
        "lm_head.weight",
    ],
)
def test_missing_tensor_is_named(tiny_model: TinyModel, tmp_path: Path, name: str, quantization: str) -> None:
    folder = changed(tiny_model("llama"), tmp_path / "m", lambda tensors: tensors.pop(name))
    with pytest.raises(BadModel, match="lack tensors of the model") as caught:
        load(folder, quantization)
    assert caught.value.problem.endswith(f": {name}.")


@pytest.mark.parametrize("quantization", ["nf4", "none"])
@pytest.mark.parametrize(
    ("name", "shape", "expected"),
    [
        ("model.embed_tokens.weight", (432, 64), "(448, 64)"),
        ("model.norm.weight", (32,), "(64,)"),
        ("model.layers.0.mlp.up_proj.weight", (64, 128), "(128, 64)"),
    ],
)
def test_misshapen_tensor_is_named(
    tiny_model: TinyModel,
    tmp_path: Path,
    name: str,
    shape: tuple[int, ...],
    expected: str,
    quantization: str,
) -> None:
    folder = changed(
        tiny_model("llama"), tmp_path / "m", lambda tensors: tensors.update({name: torch.zeros(shape)})
    )
    with pytest.raises(BadModel, match="contradict the shapes") as caught:
        load(folder, quantization)
    assert f"{name} is {shape} instead of {expected}" in caught.value.problem


def test_tensors_of_another_model_are_named_up_to_three(tiny_model: TinyModel, tmp_path: Path) -> None:
    folder = changed(tiny_model("llama", layers=3), tmp_path / "m", lambda _: None, num_hidden_layers=2)
    with pytest.raises(BadModel, match=r"does not have: model\.layers\.2") as caught:
        load(folder)
    assert caught.value.problem.count("model.layers.2.") == 3
    assert caught.value.problem.endswith(", and 6 more.")


def test_rotary_frequencies_of_old_files_are_harmless(tiny_model: TinyModel, tmp_path: Path) -> None:
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    folder = changed(
        tiny_model("llama"), tmp_path / "m", lambda tensors: tensors.update({name: torch.ones(8)})
    )
    assert load(folder)
