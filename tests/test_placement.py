"""A base with its table or its layers on the host trains, answers and is saved exactly as one without."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import TinyModel
from peft import PeftModel
from safetensors.torch import load_file
from test_merge import facts
from test_train import changed, make_recipe, only

from qadapt.adapters.lora import Lora, attach_lora, load_lora, save_adapter, trainable
from qadapt.data.prompt import load_contract
from qadapt.engine import boundaries, streaming
from qadapt.engine.host import device_of, host_buffer
from qadapt.engine.loss import loss_sum
from qadapt.engine.recompute import decoder_layers, set_recompute
from qadapt.errors import BadRecipe, DoesNotFit
from qadapt.estimating.planning import ask
from qadapt.events import Warned
from qadapt.hardware.cards import find_card
from qadapt.model.generate import generate
from qadapt.model.load import load_base
from qadapt.plan.estimate import estimate_step
from qadapt.plan.fit import fit
from qadapt.plan.knobs import PLANNED
from qadapt.plan.room import Room
from qadapt.plan.setting import Setting
from qadapt.plan.weights import layer_bytes
from qadapt.run import train
from qadapt.shape import find_config, find_shape
from qadapt.train.dryrun import dry_run
from qadapt.units import GIB

CPU = torch.device("cpu")
WAYS = (("embeddings",), ("layers",), ("embeddings", "layers"))
LAYERS = 5


def base_of(folder: Path, offload: tuple[str, ...] = (), quantization: str = "nf4") -> Any:
    base = load_base(
        folder,
        quantization=quantization,
        double_quant=True,
        dtype=torch.float32,
        device=CPU,
        offload=offload,
    )
    set_recompute(base, "all")
    return base


def adapted(
    base: Any, new_ids: tuple[int, ...] = (), targets: str | tuple[str, ...] = "all-linear"
) -> PeftModel:
    """With adapters away from their start, so that every gradient says something."""
    lora = Lora(rank=4, alpha=8, targets=targets)
    model = attach_lora(base, lora, dtype=torch.float32, seed=0, new_ids=new_ids).train()
    draw = torch.Generator().manual_seed(1)
    for parameter in trainable(model).values():
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=draw)
    return model


def gradients(model: PeftModel, new_ids: tuple[int, ...] = ()) -> Iterator[dict[str, torch.Tensor]]:
    """Of two steps, with an evaluation between them."""
    draw = torch.Generator().manual_seed(2)
    for _ in range(2):
        ids = torch.randint(3, 400, (2, 23), generator=draw)
        ids[:, 7 : 7 + len(new_ids)] = torch.tensor(new_ids, dtype=torch.int64)
        model.train()
        positions = torch.arange(22)
        loss_sum(model, input_ids=ids[:, :-1], positions=positions, targets=ids[:, 1:]).backward()
        yield {name: parameter.grad.clone() for name, parameter in trainable(model).items()}  # type: ignore[union-attr]
        model.zero_grad()
        with torch.no_grad():
            model.eval()(input_ids=ids)


@pytest.mark.parametrize("quantization", ["nf4", "none"])
@pytest.mark.parametrize("family", ["llama", "phi3"])
def test_gradients_are_the_same_to_the_bit_wherever_the_base_lies(
    family: str, quantization: str, tiny_model: TinyModel
) -> None:
    folder = tiny_model(family, layers=LAYERS)
    plain = list(gradients(adapted(base_of(folder, (), quantization))))
    assert any(value.abs().max() > 0 for value in plain[0].values())
    for offload in WAYS:
        placed = list(gradients(adapted(base_of(folder, offload, quantization))))
        for before, after in zip(plain, placed, strict=True):
            assert before.keys() == after.keys()
            assert all(torch.equal(after[name], before[name]) for name in before), offload


class LateCopier:
    """Copies when somebody waits for it, as late as a card may."""

    def __init__(self) -> None:
        self._asked: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def copy(self, number: int, row: torch.Tensor, buffer: torch.Tensor) -> None:
        self._asked[number] = row, buffer

    def wait(self, number: int) -> None:
        if number in self._asked:
            row, buffer = self._asked.pop(number)
            buffer.copy_(row)


@pytest.mark.parametrize("targets", ["all-linear", ("q_proj", "v_proj"), ("down_proj",)])
def test_a_backward_pass_waits_for_every_weight_that_it_reads(
    targets: str | tuple[str, ...], tiny_model: TinyModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(streaming, "_Copier", LateCopier)
    folder = tiny_model("llama", layers=LAYERS)
    plain = list(gradients(adapted(base_of(folder), targets=targets)))
    placed = list(gradients(adapted(base_of(folder, ("layers",)), targets=targets)))
    for before, after in zip(plain, placed, strict=True):
        assert all(torch.equal(after[name], before[name]) for name in before)


@pytest.mark.parametrize(
    "new_ids", [(440, 441), tuple(range(440, 452))], ids=["spare rows", "a longer table"]
)
def test_rows_of_new_tokens_train_beside_a_table_on_the_host(
    new_ids: tuple[int, ...], tiny_model: TinyModel
) -> None:
    folder = tiny_model("llama", layers=2)
    plain = list(gradients(adapted(base_of(folder), new_ids), new_ids))
    placed = list(gradients(adapted(base_of(folder, WAYS[2]), new_ids), new_ids))
    assert any("new_rows" in name for name in plain[0])
    for before, after in zip(plain, placed, strict=True):
        assert all(torch.equal(after[name], before[name]) for name in before)


def weight_places(layer: torch.nn.Module) -> set[int]:
    """Addresses of the memory that a layer's frozen matrices are parts of."""
    frozen = (each for each in layer.parameters() if each.ndim > 1 and not each.requires_grad)
    return {each.untyped_storage().data_ptr() for each in frozen}


def test_layers_run_from_two_buffers_and_wait_on_the_host(tiny_model: TinyModel) -> None:
    base = base_of(tiny_model("llama", layers=LAYERS), ("layers",))
    model, ran = adapted(base), []
    layers = decoder_layers(base)
    for number, layer in enumerate(layers):  # its last part: it is seen recomputed, too
        layer.mlp.register_forward_pre_hook(lambda *_, at=number: ran.append((at, weight_places(layers[at]))))  # type: ignore[operator, union-attr]
    list(gradients(model))
    numbers = [number for number, _ in ran]
    up = list(range(LAYERS))
    assert numbers == [*up, *reversed(up), *up] * 2
    buffers = set().union(*(places for _, places in ran))
    assert len(buffers) == 2
    on_host = [layer for layer in layers if not weight_places(layer) & buffers]
    assert len(on_host) == LAYERS - 2
    assert len(set().union(*map(weight_places, on_host))) == LAYERS - 2


def test_a_streamed_base_answers_like_another_one(tiny_model: TinyModel) -> None:
    folder = tiny_model("llama", layers=LAYERS)
    prompts = [[5, 6, 7], [8, 9], [4, 5, 11, 12]]
    answers = [
        generate(adapted(base_of(folder, offload)), prompts, max_new_tokens=6, end_ids=frozenset(), pad_id=0)
        for offload in ((), *WAYS)
    ]
    assert len(answers[0][0]) == 6
    assert all(each == answers[0] for each in answers)


def test_what_is_read_of_a_streamed_base_and_saved_beside_it_is_what_it_would_be(
    tmp_path: Path, tiny_model: TinyModel
) -> None:
    folder = tiny_model("llama", layers=LAYERS)
    contract = load_contract(folder)
    for offload in ((), *WAYS):
        model = adapted(base_of(folder, offload))
        to = tmp_path / "-".join(("at", *offload))
        save_adapter(model, to, facts=facts(), tokenizer=contract.tokenizer)
        weights = {name: value for name, value in model.state_dict().items() if "base_layer" in name}
        if not offload:
            first, first_weights = load_file(to / "adapter_model.safetensors"), weights
        saved = load_file(to / "adapter_model.safetensors")
        assert saved.keys() == first.keys()
        assert all(torch.equal(saved[name], first[name]) for name in first)
        assert all(torch.equal(weights[name], first_weights[name]) for name in first_weights)
        again = load_lora(base_of(folder, offload), to, is_trainable=True)
        assert all(torch.equal(value, trainable(again)[name]) for name, value in trainable(model).items())


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"recompute": "none"}, "recompute = none: streamed layers"),
        ({"recompute": 1}, "recompute = 1: streamed layers"),
        ({"quantization": "int8"}, "8 bits cannot be streamed"),
        ({"device": "cpu"}, "a CPU's step lies on the host as it is"),
    ],
)
def test_layers_that_cannot_be_streamed_are_refused(fields: dict[str, Any], said: str) -> None:
    setting = dataclasses.replace(Setting(length=64, offload=("layers",)), **fields)
    with pytest.raises(BadRecipe, match=said):
        estimate_step(find_shape("Llama-3.1-8B"), setting)


def test_boundaries_without_recomputation_are_refused_and_hold_a_plan_to_some() -> None:
    shape, asked = find_shape("Llama-3.2-1B"), Setting(length=64, offload=("boundaries",))
    with pytest.raises(BadRecipe, match="they are inputs of recomputed layers"):
        estimate_step(shape, dataclasses.replace(asked, recompute="none"))
    plan = fit(shape, asked, room=Room(80 * GIB), rows_per_step=1, free=PLANNED - {"offload"}, card=None)
    assert plan.setting.recompute == 1


def test_an_estimate_for_a_cpu_says_what_it_does_not_move() -> None:
    question = ask("Llama-3.1-8B", ("memory.device=cpu", "memory.offload=[embeddings]"), card=None, vram=None)
    assert question.answer().notes == ("memory.offload: on a CPU embeddings lie on the host as it is.",)


def test_a_run_on_a_cpu_says_that_it_puts_nothing_on_the_host(tmp_path: Path, tiny_model: TinyModel) -> None:
    recipe = changed(make_recipe(tmp_path, tiny_model("llama"), steps=1), "memory", offload=("embeddings",))
    warned = only(Warned, list(train(recipe)))
    assert any("on a CPU embeddings lie on the host as it is" in event.message for event in warned)


def test_a_run_says_once_that_its_boundaries_got_no_pinned_memory(
    tmp_path: Path, tiny_model: TinyModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(boundaries, "_place_for", lambda tensor: boundaries._Host(tensor.device))
    recipe = changed(
        make_recipe(tmp_path, tiny_model("llama"), steps=2),
        "memory",
        offload=("boundaries",),
        recompute="all",
    )
    said = [event for event in only(Warned, list(train(recipe))) if "pinned memory" in event.message]
    assert [event.step for event in said] == [1]


def test_without_pinned_memory_rows_are_ordinary_ones() -> None:
    row = host_buffer(100, torch.device("cuda"))
    assert row.nbytes == 100
    assert row.is_pinned() == torch.cuda.is_available()


def test_a_model_computes_where_its_unplaced_parameters_lie() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2, device="meta"))
    assert device_of(model) == torch.device("meta")
    assert device_of(model[0]) == CPU


SETTING = Setting(length=128, rank=8, optimizer="adamw")


def test_a_dry_run_counts_what_is_on_the_card_and_the_host_apart(tiny_model: TinyModel) -> None:
    folder = tiny_model("llama", layers=LAYERS, width=256, vocabulary=2048)
    values, shape = find_config(str(folder)).values, find_shape(str(folder))
    plain = dry_run(values, SETTING)
    table = shape.embedding_weights * 2
    row = layer_bytes(shape, SETTING)
    for offload in WAYS:
        setting = dataclasses.replace(SETTING, offload=offload)
        dry, closed = dry_run(values, setting), estimate_step(shape, setting)
        host = ("embeddings" in offload) * table + ("layers" in offload) * LAYERS * row
        won = ("embeddings" in offload) * table + ("layers" in offload) * (LAYERS - 2) * row
        assert plain.peak.bytes - dry.peak.bytes == won, offload
        assert host <= dry.host_bytes <= host + 128 * (2 * shape.width + 8), offload  # what was looked up
        assert {name: closed.categories[name] for name in dry.static if dry.static[name]} == {
            name: value for name, value in dry.static.items() if value and name != "temporary"
        } | {"temporary": closed.categories["temporary"]}
        without = estimate_step(shape, SETTING)
        assert closed.host_bytes - without.host_bytes >= host
        assert (closed.pinned_bytes > 0) == ("layers" in offload)


def test_a_plan_puts_on_the_host_only_what_it_must() -> None:
    shape, card = find_shape("Llama-3.1-8B"), find_card("RTX 3060")
    setting = Setting(length=1024)
    chosen = []
    for budget in (20.0, 6.4, 5.7, 3.6):
        room = Room(round(budget * GIB))
        plan = fit(shape, setting, room=room, rows_per_step=16, free=PLANNED, card=card)
        chosen.append(plan.setting.offload)
        if plan.setting.offload:
            words = r"in the memory of the host: .* would take .* more; it costs .* of the host's memory and"
            assert any(re.search(words, reason) for reason in plan.reasons)
    assert chosen == [(), ("embeddings",), ("embeddings", "boundaries"), ("embeddings", "layers")]


def test_a_plan_says_what_the_recipe_put_on_the_host() -> None:
    shape, card, setting = find_shape("Llama-3.1-8B"), find_card("RTX 3060"), Setting(offload=("layers",))
    plan = fit(shape, setting, room=Room(8 * GIB), rows_per_step=1, free=PLANNED - {"offload"}, card=card)
    assert plan.reasons[-1] == "layers in the memory of the host: as the recipe says."


def test_a_host_without_room_is_no_host() -> None:
    shape, card = find_shape("Llama-3.1-8B"), find_card("RTX 3060")
    small = Room(round(3.6 * GIB), host_bytes=4 * GIB)
    with pytest.raises(DoesNotFit) as caught:
        fit(shape, Setting(length=1024), room=small, rows_per_step=1, free=PLANNED, card=card)
    lacking = r"With embeddings, layers .* would fit, but takes [\d.]+ GiB there, where 4\.00 GiB are free\."
    assert re.search(lacking, caught.value.problem)
    assert caught.value.cure.startswith("Cheapest change: a larger card"), "a lower rank helps no host"


def test_what_only_the_host_lacks_is_cured_by_putting_less_there() -> None:
    shape, card = find_shape("Llama-3.1-8B"), find_card("RTX 3060")
    room, setting = Room(8 * GIB, host_bytes=4 * GIB), Setting(length=1024, offload=("layers",))
    held = PLANNED - {"offload"}
    with pytest.raises(DoesNotFit) as caught:
        fit(shape, setting, room=room, rows_per_step=1, free=held, card=card)
    assert caught.value.problem.endswith("GiB of the host's memory; 4.00 GiB are free there.")
    assert caught.value.cure.startswith("Cheapest change: memory.offload=none (+")
    cured = dataclasses.replace(setting, offload=())
    assert fit(shape, cured, room=room, rows_per_step=1, free=held, card=card)


def test_streaming_costs_the_time_of_the_bus_where_products_are_faster() -> None:
    shape, card = find_shape("Llama-3.1-8B"), find_card("RTX 4090")

    def seconds(length: int, offload: tuple[str, ...]) -> float:
        found = estimate_step(shape, Setting(length=length, offload=offload), card=card).seconds_per_step  # type: ignore[arg-type]
        assert found is not None
        return found

    assert seconds(64, ("layers",)) > 1.5 * seconds(64, ())
    assert seconds(8192, ("layers",)) == pytest.approx(seconds(8192, ()))
