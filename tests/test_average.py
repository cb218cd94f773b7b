"""Bottleneck adapters have a mean, and it is one of them; what else could be asked is refused by name."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from merged_families import make_family
from safetensors.torch import load_file, save_file
from test_compose import put_together, refused
from test_merge import facts, logits, make_adapter
from test_merge_methods import load

from qadapt.adapters.bottleneck import Bottleneck, attach_bottleneck, load_bottleneck
from qadapt.adapters.facts import SIDE_CAR_FILES, write_facts
from qadapt.adapters.side_car_files import save_side_car
from qadapt.cli.main import run
from qadapt.errors import BadAdapter, QadaptError, Unsupported

TENSORS, SETTINGS = SIDE_CAR_FILES
Make = Callable[..., Path]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base") / "llama"
    make_family(folder, "llama")
    return folder


@pytest.fixture
def make(tiny: Path, tmp_path: Path) -> Make:
    def adapter(name: str, seed: int, **options: Any) -> Path:
        asked = {"kind": "pfeiffer", "width": 6, "activation": "relu"} | options
        adapted = attach_bottleneck(load(tiny), Bottleneck(**asked))
        generator = torch.Generator().manual_seed(seed)
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.data = torch.randn(parameter.shape, generator=generator) * 0.1
        (tmp_path / name).mkdir()
        save_side_car(adapted, tmp_path / name)
        write_facts(facts(), tmp_path / name)
        return tmp_path / name

    return adapter


def test_a_mean_is_the_mean_of_every_number_and_is_loaded_like_any_other(tiny, make, tmp_path):
    a, b = make("a", 1), make("b", 2)
    made = put_together([(a, 0.7), (b, 0.3)], tmp_path / "out")
    found, first, second = (load_file(folder / TENSORS) for folder in (tmp_path / "out", a, b))
    assert found.keys() == first.keys() and made.weights == len(found)
    for name, value in found.items():
        assert torch.equal(value, (0.7 * first[name].double() + 0.3 * second[name].double()).float())
    assert 0 < made.error < 1e-7
    settings = [
        json.loads((folder / SETTINGS).read_text(encoding="utf-8")) for folder in (a, tmp_path / "out")
    ]
    assert settings[0] == settings[1]
    adapted = load_bottleneck(load(tiny), tmp_path / "out").eval()
    assert not torch.allclose(logits(adapted), logits(load(tiny).eval()), atol=1e-3)


def test_the_mean_of_one_adapter_is_that_adapter(make, tmp_path):
    a = make("a", 1)
    for place, weights in enumerate([(1,), (0.5, 0.5), (0.7, 0.1, 0.2)]):
        put_together([(a, weight) for weight in weights], tmp_path / f"{place}")
        found = load_file(tmp_path / f"{place}" / TENSORS)
        assert all(torch.equal(found[name], value) for name, value in load_file(a / TENSORS).items())


def test_the_order_changes_no_bit_of_a_mean(make, tmp_path):
    named = zip("abc", (0.1, 0.2, 0.7), strict=True)
    parts = [(make(name, seed), weight) for seed, (name, weight) in enumerate(named)]
    put_together(parts, tmp_path / "abc")
    put_together(parts[::-1], tmp_path / "cba")
    assert (tmp_path / "abc" / TENSORS).read_bytes() == (tmp_path / "cba" / TENSORS).read_bytes()


def test_a_mean_can_be_asked_for_by_command(make, tmp_path, capfd):
    a, b = make("a", 1), make("b", 2)
    assert run(["adapters", "combine", f"{a}=0.5", f"{b}=0.5", "--to", str(tmp_path / "made")]) == 0
    assert (tmp_path / "made" / TENSORS).is_file() and "tensors, width 6" in capfd.readouterr().out


@pytest.mark.parametrize("weights", [(1, -1), (1, 1), (2,), (0.5,), (1.5, -0.5)])
def test_sums_differences_and_multiples_of_bottlenecks_are_refused(make, tmp_path, weights):
    folders = [make(name, seed) for seed, name in enumerate("ab")]
    refused(list(zip(folders, weights, strict=False)), tmp_path, Unsupported, "make no mean")


@pytest.mark.parametrize(
    ("other", "said"),
    [
        ({"kind": "parallel"}, "kind = 'pfeiffer'.*kind = 'parallel'"),
        ({"width": 5}, "width = 6.*width = 5"),
        ({"activation": "gelu"}, "activation = 'relu'.*activation = 'gelu'"),
        ({"scale": 2.0}, "scale = 1.0.*scale = 2.0"),
        ({"norm": True}, "norm = False.*norm = True"),
    ],
)
def test_bottlenecks_of_two_architectures_are_refused(make, tmp_path, other, said):
    parts = [(make("a", 1), 0.5), (make("b", 2, **other), 0.5)]
    refused(parts, tmp_path, Unsupported, said.replace("kind = 'pfeiffer'", "'pfeiffer'"))


def test_another_dropout_is_no_other_architecture(make, tmp_path):
    assert put_together([(make("a", 1), 0.5), (make("b", 2, dropout=0.1), 0.5)], tmp_path / "out").rank == 6


@pytest.mark.parametrize(
    ("way", "said"), [({"rank": 3}, "rank 3 means"), ({"name": "ties", "density": 0.2}, "ties means nothing")]
)
def test_ways_of_sums_are_refused_for_bottlenecks(make, tmp_path, way, said):
    refused([(make("a", 1), 1)], tmp_path, Unsupported, said, **way)


def test_a_bottleneck_and_a_lora_have_no_sum(tiny, make, tmp_path):
    make_adapter(load(tiny), tmp_path / "lora")
    refused([(make("a", 1), 0.5), (tmp_path / "lora", 0.5)], tmp_path, Unsupported, "have no sum and no mean")


@pytest.mark.parametrize("weights", [(1,), (0.5, 0.5)])
def test_a_bottleneck_with_nan_is_refused(make, tmp_path, weights):
    a = make("a", 1)
    tensors = load_file(a / TENSORS)
    next(iter(tensors.values())).view(-1)[0] = float("nan")
    save_file(tensors, a / TENSORS, {"format": "pt"})
    kind: type[QadaptError] = QadaptError if len(weights) == 1 else BadAdapter
    refused([(a, weight) for weight in weights], tmp_path, kind, "NaN|is none")


@pytest.mark.parametrize(("density", "first"), [(0.5, 1), (0.01, 1), (1.0, 0)])
def test_low_layers_can_be_left_out_of_an_adapter(tiny, make, tmp_path, density, first):
    a = make("a", 1)
    made = put_together([(a, 1)], tmp_path / "out", name="upper", density=density)
    assert made.error == 0
    found, whole = load_file(tmp_path / "out" / TENSORS), load_file(a / TENSORS)
    assert found.keys() == {name for name in whole if first == 0 or not name.startswith("layers.0.")}
    adapted = load_bottleneck(load(tiny), a).eval()
    for name, part in adapted.parts.items():
        part.is_on = first == 0 or not name.startswith("layers.0.")
    assert torch.equal(logits(load_bottleneck(load(tiny), tmp_path / "out").eval()), logits(adapted))


def test_only_bottlenecks_can_be_left_out_of_layers(tiny, make, tmp_path):
    make_adapter(load(tiny), tmp_path / "lora")
    refused([(tmp_path / "lora", 1)], tmp_path, Unsupported, "changes weights", name="upper", density=0.5)
    refused([(make("a", 1), 1)], tmp_path, QadaptError, "its density is None", name="upper")
