"""AdaLoRA: against plain PEFT, what it gives up and when, what is left, and files that do not go together."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import bitsandbytes
import pytest
import torch
from own_layers import (
    BF16,
    FP32,
    adapted_block,
    assert_near_fp32_in_bf16,
    assert_plain_pefts,
    assert_would_be_seen,
    kept_for_backward,
)
from peft import AdaLoraConfig, PeftModel
from peft.tuners.adalora import RankAllocator, SVDLinear, SVDLinear4bit
from safetensors.torch import load_file, save_file
from test_estimate import CPU, build, folders, shape_of
from test_gguf_adapters import proof_of
from test_gguf_export import ABOUT
from test_linear import BASES, inputs_of
from test_method_runs import drawn, logits
from test_methods import base_of
from test_packing import assert_close, rows
from test_resume import assert_same_run, copied, until
from test_train import make_recipe, only
from torch import Tensor
from torch.nn import functional
from transformers import AutoTokenizer

from qadapt.adapters.check import check_adapter
from qadapt.adapters.facts import AdapterFacts
from qadapt.adapters.lora import save_adapter, trainable
from qadapt.adapters.method import Adapter, attach, load_adapter
from qadapt.adapters.rank_budget import RankBudget
from qadapt.adapters.swap import Swap
from qadapt.adapters.triplets import TripletLinear, triplets_of, use_triplet_layers
from qadapt.cli.main import run as command
from qadapt.data.batches import packed_batches
from qadapt.data.tokens import Tokens
from qadapt.engine.recompute import set_recompute
from qadapt.errors import BadAdapter, BadExport, BadRecipe, BadRun, QadaptError
from qadapt.events import Event, RunFinished, StepDone, Warned
from qadapt.export.adapter import Adapter as OnDisk
from qadapt.export.combine import combine
from qadapt.export.gguf_lora import write_gguf_lora
from qadapt.export.merge import merge
from qadapt.model.skeleton import skeleton_base
from qadapt.plan.adapters import adapter_bytes, saved_bytes
from qadapt.plan.adapters import trainable as planned
from qadapt.plan.inverse import most
from qadapt.plan.ranks import LEAST_STEPS, RankSchedule, rank_schedule, trained_rank
from qadapt.plan.room import Room
from qadapt.plan.setting import check_setting
from qadapt.recipe import Recipe
from qadapt.recipe_file import check_recipe, dump_yaml
from qadapt.run import resume, train
from qadapt.train.optimizer import AdapterOptimizer, make_optimizer
from qadapt.train.step import StepResult, apply_gradient, find_gradient

if TYPE_CHECKING:
    from conftest import TinyModel

__all__ = ["folders"]  # a fixture
START, TARGET = 6, 4
LAYERS = 2 * 7


# --- what a layer computes --------------------------------------------------------------------------------


def adapted(base: str, dtype: torch.dtype, *, bias: bool = False, ours: bool = True) -> PeftModel:
    """A block with AdaLoRA, with layers as here or of stock PEFT, its triplets random."""
    config = AdaLoraConfig(init_r=5, target_r=3, lora_alpha=7, total_step=9, target_modules=["projection"])
    made = adapted_block(config, base, dtype, bias=bias)
    torch.manual_seed(2)
    for name, parameter in sorted(trainable(made).items()):
        parameter.data = (1.0 if "lora_E" in name else 0.2) * torch.randn(parameter.shape)
    if ours:
        use_triplet_layers(made)
    return made.train()


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("base", BASES)
def test_in_fp32_output_and_gradients_are_those_of_plain_peft(base: str, bias: bool) -> None:
    assert_plain_pefts(adapted, base, TripletLinear, bias=bias)


@pytest.mark.parametrize("base", BASES)
def test_in_bf16_it_is_near_fp32_and_stays_in_bf16(base: str) -> None:
    assert_near_fp32_in_bf16(adapted, base)


def test_a_wrong_value_would_be_seen() -> None:
    assert_would_be_seen(adapted, "lora_E.default")


@pytest.mark.parametrize("base", BASES)
def test_of_a_layer_little_is_kept_but_its_inputs(base: str) -> None:
    model, inputs = adapted(base, BF16), inputs_of(BF16)
    own = {each.untyped_storage().data_ptr() for each in [inputs, *model.parameters()]}
    kept = kept_for_backward(model, inputs)
    others = [each.numel() for each in kept if each.untyped_storage().data_ptr() not in own]
    between, scaled = inputs.shape[:-1].numel() * 5, 5 * inputs.shape[-1]
    assert sorted(others) == sorted((between, scaled))


# --- what a step computes ---------------------------------------------------------------------------------


def with_budget(model: PeftModel) -> AdapterOptimizer:
    optimizer = make_optimizer(trainable(model), kind="adamw", betas=(0.9, 0.99), weight_decay=0.0)
    optimizer.companion = RankBudget(model)
    return optimizer


def naive(model: PeftModel, chosen: list[Tokens]) -> tuple[float, dict[str, Tensor]]:
    """Each row alone through PEFT's own layers, the library's attention, and PEFT's own penalty, once."""
    layers = [layer for layer in model.modules() if isinstance(layer, TripletLinear)]
    for layer in layers:
        is_quantized = isinstance(layer.get_base_layer(), bitsandbytes.nn.Linear4bit)
        layer.__class__ = SVDLinear4bit if is_quantized else SVDLinear
    total, count, penalty = torch.zeros(()), sum(row.supervised_count for row in chosen), None
    for row in chosen:
        ids = torch.from_numpy(row.ids).long()
        targets = torch.where(torch.from_numpy(row.supervised), ids, -100)
        output = model(input_ids=ids[None], labels=targets[None])
        loss = functional.cross_entropy(
            output.logits[0, :-1], targets[1:], ignore_index=-100, reduction="sum"
        )
        if penalty is None:
            penalty = output.loss - loss / row.supervised_count
        total = total + loss / count
    assert penalty is not None
    assert penalty.item() > 0.1
    (total + penalty).backward()
    found = {name: value.grad.clone() for name, value in trainable(model).items() if value.grad is not None}
    model.zero_grad()
    for layer in layers:
        layer.__class__ = TripletLinear
    return total.item(), found


def smaller(model: PeftModel) -> PeftModel:
    """P and Q nearer to what they are in training; with large ones rounding is large, too."""
    for _, parts in triplets_of(model):
        for part in ("lora_A", "lora_B"):
            parts[part].data *= 0.3
    return model


@pytest.mark.parametrize("quantization", ["nf4", "none"])
def test_a_packed_and_recomputed_step_has_pefts_gradient_with_its_penalty(
    quantization: str, tiny_model: TinyModel
) -> None:
    model, chosen = smaller(drawn("adalora", tiny_model("qwen2"), quantization=quantization)), rows()
    expected = naive(model, chosen)
    set_recompute(model.get_base_model(), "all")
    batches = packed_batches(chosen, capacity=120)
    assert len(batches) > 1, "a control: the gradients of several micro-batches add up"
    optimizer = with_budget(model)
    result = find_gradient(model, optimizer, batches, clip_norm=None, scaler=None)
    assert result is not None
    gradients = {name: value.grad for name, value in optimizer.parameters.items() if value.grad is not None}
    assert_close((result.loss, gradients), expected)


def test_a_step_without_the_penalty_would_be_seen(tiny_model: TinyModel) -> None:
    model, chosen = smaller(drawn("adalora", tiny_model("qwen2"))), rows()
    expected = naive(model, chosen)
    optimizer = make_optimizer(trainable(model), kind="adamw", betas=(0.9, 0.99), weight_decay=0.0)
    result = find_gradient(
        model, optimizer, packed_batches(chosen, capacity=120), clip_norm=None, scaler=None
    )
    assert result is not None
    gradients = {name: value.grad for name, value in optimizer.parameters.items() if value.grad is not None}
    with pytest.raises(AssertionError):
        assert_close((result.loss, gradients), expected)


# --- what is given up -------------------------------------------------------------------------------------


def small(steps: int = 20, *, dtype: torch.dtype = FP32) -> PeftModel:
    """Triplets on the layers of a model of a few numbers."""
    model = skeleton_base(
        {"model_type": "llama", "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 2,
         "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 64},
        quantization="none", double_quant=False, dtype=FP32,
    )  # fmt: skip
    model = model.to_empty(device="cpu")
    return attach(model, Adapter("adalora", TARGET, 8, steps=steps), dtype=dtype, seed=0)


def gradients_at(model: PeftModel, step: int, *, size: float = 1e-3) -> None:
    draw = torch.Generator().manual_seed(step)
    for _, parameter in sorted(trainable(model).items()):
        parameter.grad = (size * torch.randn(parameter.shape, generator=draw)).to(parameter.dtype)


def result(*, is_applied: bool = True) -> StepResult:
    return StepResult(1.0, 1.0, 1, 1, is_applied=is_applied)


def stepped(optimizer: AdapterOptimizer, **options: Any) -> None:
    apply_gradient(optimizer, result(**options), learning_rate=1e-2, scaler=None)


def left_of(model: PeftModel) -> dict[str, list[bool]]:
    return {
        f"{path}.lora_E.default": (parts["lora_E"].flatten() != 0).tolist()
        for path, parts in triplets_of(model.get_base_model())
    }


def test_averages_and_masks_are_those_of_pefts_allocator() -> None:
    model = small()
    optimizer = with_budget(model)
    theirs = RankAllocator(model.get_base_model(), model.peft_config["default"], "default")
    schedule, seen = rank_schedule(20), set()
    for step in range(1, 21):
        gradients_at(model, step)
        is_final = step >= 20 - schedule.after
        if step <= 20 - schedule.after:
            theirs.update_ipt(model.get_base_model())
        expected = None
        if schedule.before < step <= 20 - schedule.after:
            expected = {name: list(values) for name, values in masks_of(theirs, model, step).items()}
        stepped(optimizer)
        if expected is not None:
            assert left_of(model) == expected
            seen.add(sum(sum(flags) for flags in expected.values()))
        if is_final:
            assert sum(sum(flags) for flags in left_of(model).values()) == TARGET * LAYERS
        else:
            assert_averages(optimizer.companion.tensors(), theirs)
    assert seen == {73, 66, 61, 58, 56}, "the cube of what is left of seven steps, from 84"


def assert_averages(kept: dict[str, Tensor], theirs: RankAllocator) -> None:
    assert len(theirs.exp_avg_ipt) == 3 * LAYERS
    for name, average in theirs.exp_avg_ipt.items():
        place = f"base_model.model.{name}"
        assert torch.allclose(kept[f"importance/{place}"], average, rtol=1e-5, atol=0)
        assert torch.allclose(kept[f"uncertainty/{place}"], theirs.exp_avg_unc[name], rtol=1e-5, atol=0)


def masks_of(theirs: RankAllocator, model: PeftModel, step: int) -> dict[str, list[bool]]:
    """What PEFT would leave, without touching the model."""
    before = {name: value.detach().clone() for name, value in trainable(model).items()}
    budget, _ = theirs.budget_schedule(step)
    found: dict[str, list[bool]] = theirs.mask_to_budget(model.get_base_model(), budget)
    with torch.no_grad():
        for name, value in trainable(model).items():
            value.copy_(before[name])
    return found


def test_of_equally_important_triplets_as_many_are_left_as_the_budget_has() -> None:
    model = small()
    budget = RankBudget(model)
    for _ in range(20):
        gradients_at(model, 1, size=0.0)
        budget.begin_update()
        list(budget.end_update())
    assert budget.left == TARGET * LAYERS


@pytest.mark.parametrize("dtype", [FP32, BF16])
def test_an_update_that_memory_ran_out_in_is_gone_on_with(dtype: torch.dtype) -> None:
    ends = []
    for fails in (False, True):
        model, averages = small(dtype=dtype), dict[str, Tensor]()
        optimizer = with_budget(model)
        for step in range(1, 13):
            gradients_at(model, step)
            stopped = [optimizer.progress]
            for fail in (in_the_averages, in_the_update) if fails and step < 10 else ():
                fail(optimizer)
                with pytest.raises(torch.OutOfMemoryError):
                    stepped(optimizer)
                stopped.append(optimizer.progress)
            assert sorted(set(stopped)) == stopped, "twice at one place would be for good"
            stepped(optimizer)
            averages |= optimizer.tensors() if step == 9 else {}  # the last ones
        ends.append({name: value.clone() for name, value in (trainable(model) | averages).items()})
        ends[-1] |= optimizer.tensors()
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])
    assert ends[0]["budget/steps"].tolist() == [12, 1]


def in_the_averages(optimizer: AdapterOptimizer) -> None:
    """Memory runs out at one tensor of the next step, once."""
    budget = optimizer.companion
    assert isinstance(budget, RankBudget)
    middle = sorted(budget._importance)[40]

    class Failing(dict[str, Tensor]):
        has_failed = False

        def __getitem__(self, key: str) -> Tensor:
            if key == middle and not self.has_failed:
                self.has_failed = True
                raise torch.OutOfMemoryError("no more")
            return super().__getitem__(key)

    budget._importance = Failing(budget._importance)


def in_the_update(optimizer: AdapterOptimizer) -> None:
    real = optimizer.step

    def fail(learning_rate: float) -> None:
        optimizer.step = real  # type: ignore[method-assign]
        raise torch.OutOfMemoryError("no more")

    optimizer.step = fail  # type: ignore[method-assign]


def test_a_step_whose_update_is_left_out_counts_in_no_average_and_its_time_passes() -> None:
    model = small()
    optimizer = with_budget(model)
    for step in range(1, 10):
        gradients_at(model, step)
        stepped(optimizer)
    before = {name: value.clone() for name, value in (trainable(model) | optimizer.tensors()).items()}
    gradients_at(model, 10, size=float("nan"))
    stepped(optimizer, is_applied=False)  # the one in which the last ranks were to be given up
    after = trainable(model) | optimizer.tensors()
    assert after.pop("budget/steps").tolist() == [10, 0]
    assert all(torch.equal(before[name], value) for name, value in after.items())
    gradients_at(model, 11)
    stepped(optimizer)
    assert sum(sum(flags) for flags in left_of(model).values()) == TARGET * LAYERS
    assert optimizer.tensors()["budget/steps"].tolist() == [11, 1]


def test_what_rounding_lost_of_a_value_is_given_up_with_it() -> None:
    model = small(dtype=BF16)
    optimizer = with_budget(model)
    averages = [tensor for name, tensor in optimizer.tensors().items() if name.startswith("importance/")]
    assert {tensor.dtype for tensor in averages} == {BF16}
    for step in range(1, 12):
        gradients_at(model, step)
        stepped(optimizer)
    lost = optimizer.tensors()
    for path, parts in triplets_of(model):
        assert not lost[f"lost/{path}.lora_E.default"][parts["lora_E"] == 0].any()


def test_the_averages_are_gone_with_the_last_rank_and_are_there_again_at_an_earlier_step() -> None:
    model = small()
    optimizer = with_budget(model)
    whole = sum(tensor.nbytes for tensor in optimizer.companion.held())
    saved: dict[int, dict[str, Tensor]] = {}
    ends = []
    for begin in (0, 9, 10):  # the last rank is given up in step 10
        if begin:
            optimizer.load(saved[begin])
            with torch.no_grad():
                for name, value in trainable(model).items():
                    value.copy_(saved[begin][f"trained/{name}"])
        for step in range(begin + 1, 13):
            gradients_at(model, step)
            stepped(optimizer)
            held = sum(tensor.nbytes for tensor in optimizer.companion.held())
            assert held == (whole if step < 10 else START * LAYERS), "which ones are given up, a byte each"
            trained = {f"trained/{name}": value for name, value in trainable(model).items()}
            saved[step] = {name: each.clone() for name, each in (trained | optimizer.tensors()).items()}
        ends.append(saved[12])
    assert not [name for name in ends[0] if name.startswith(("importance/", "uncertainty/"))]
    for end in ends[1:]:
        assert end.keys() == ends[0].keys()
        assert all(torch.equal(end[name], value) for name, value in ends[0].items())


def test_the_schedule_is_a_tenth_and_a_half() -> None:
    assert rank_schedule(1000) == RankSchedule(100, 500, 1)
    assert rank_schedule(85_900) == RankSchedule(8590, 42_950, 85)
    assert rank_schedule(LEAST_STEPS) == RankSchedule(3, 3, 1)
    assert [trained_rank("adalora", rank) for rank in (1, 2, 5, 8)] == [2, 3, 8, 12]
    assert trained_rank("lora", 8) == 8


# --- runs -------------------------------------------------------------------------------------------------


def recipe_of(folder: Path, model: Path, *, dtype: str = "bf16", **fields: Any) -> Recipe:
    section = {"steps": 12, "checkpoint_every": 5, "evaluate_every": None, "learning_rate": 0.02} | fields
    values = make_recipe(folder, model, **section).model_dump(mode="json")
    values["adapter"] = {"method": "adalora", "rank": TARGET, "dtype": dtype}
    return check_recipe(values, origin="the test")


@pytest.mark.parametrize(("dtype", "step"), [("bf16", 5), ("fp32", 10)])
def test_a_run_that_died_on_the_way_or_after_it_is_the_straight_run(
    dtype: str, step: int, tmp_path: Path, tiny_model: TinyModel
) -> None:
    straight = tmp_path / "runs/first"
    events = train(recipe_of(tmp_path, tiny_model("qwen2"), dtype=dtype))

    def is_there(event: Event) -> bool:
        return isinstance(event, StepDone) and event.step == step + 1

    seen = until(events, is_there, lambda: copied(straight, tmp_path / "copy"))
    assert not [event for event in only(Warned, seen) if "moved" in event.message]
    assert isinstance(list(resume("first", folder=str(tmp_path / "copy")))[-1], RunFinished)
    assert_same_run(straight, tmp_path / "copy/first")
    config = json.loads((straight / "adapter/adapter_config.json").read_text(encoding="utf-8"))
    ranks = [sum(flags) for flags in config["rank_pattern"].values()]
    assert (config["init_r"], len(ranks), sum(ranks)) == (START, LAYERS, TARGET * LAYERS)
    assert len(set(ranks)) > 1, "a control: layers are left with different ranks"


def test_too_few_steps_are_refused_before_anything_is_loaded(tmp_path: Path, tiny_model: TinyModel) -> None:
    with pytest.raises(BadRecipe, match=r"has 6 steps; AdaLoRA, which .* needs 7") as refused:
        list(train(recipe_of(tmp_path, tiny_model("qwen2"), steps=6)))
    assert "train.steps=7" in refused.value.cure
    assert not (tmp_path / "runs/first").exists()


@pytest.mark.parametrize("asked", ["estimate", "plan"])
def test_estimate_and_plan_refuse_the_same_steps_that_train_does(
    asked: str, tmp_path: Path, tiny_model: TinyModel, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "mine.yaml").write_text(dump_yaml(recipe_of(tmp_path, tiny_model("qwen2"))), encoding="utf-8")
    for steps, code in ((LEAST_STEPS - 1, 2), (LEAST_STEPS, 0)):
        words = [asked, str(tmp_path / "mine.yaml"), f"train.steps={steps}", "--vram", "4GiB"]
        assert command(words) == code
    assert "error: The run has 6 steps; AdaLoRA, which" in capsys.readouterr().err


def test_a_rank_that_starts_wider_than_a_layer_is_refused_with_the_largest_that_fits(
    tiny_model: TinyModel,
) -> None:
    base, narrowest = base_of(tiny_model("llama")), 32
    with pytest.raises(BadRecipe, match=rf"rank is 22, with which AdaLoRA starts at 33; .* is {narrowest}"):
        attach(base, Adapter("adalora", 22, 8), dtype=FP32, seed=0)
    attach(base, Adapter("adalora", narrowest * 2 // 3, 8), dtype=FP32, seed=0)
    wide = dataclasses.replace(CPU, method="adalora", rank=22)
    shape = shape_of("llama")
    least = min(min(each.inputs, each.outputs) for each in shape.linears)
    with pytest.raises(BadRecipe, match=f"with which AdaLoRA starts at .* is {least} wide"):
        check_setting(shape, dataclasses.replace(wide, rank=least * 2 // 3 + 1))
    found = most(shape, wide, what="rank", room=Room(1 << 40))
    assert found.value == found.ceiling.value == least * 2 // 3


# --- what stands on disk ----------------------------------------------------------------------------------


def pruned(folder: Path, *, quantization: str = "nf4") -> PeftModel:
    """A model some of whose triplets are given up: of one layer all, of others none to most."""
    model = drawn("adalora", folder, quantization=quantization)
    with torch.no_grad():
        for place, (_, parts) in enumerate(triplets_of(model)):
            parts["lora_E"][torch.arange(START) < (place * 5) % (START + 1)] = 0
    ranks = [sum(flags) for flags in left_of(model).values()]
    assert {0, START} < set(ranks)
    return model


def saved(model: PeftModel, folder: Path, to: Path, *, quantization: str = "nf4") -> Path:
    facts = AdapterFacts(str(folder), None, "", quantization, True, "fp32", "")
    save_adapter(model, to, facts=facts, tokenizer=AutoTokenizer.from_pretrained(folder))
    return to


@pytest.mark.filterwarnings("ignore:The PEFT config's .base_model_name_or_path. was renamed")
@pytest.mark.parametrize("quantization", ["nf4", "none"])
def test_a_folder_without_what_is_given_up_is_the_live_model_here_and_in_plain_peft(
    quantization: str, tmp_path: Path, tiny_model: TinyModel
) -> None:
    folder = tiny_model("qwen2")
    live = pruned(folder, quantization=quantization)
    found, whole = logits(live), sum(each.nbytes for each in trainable(live).values())
    adapter = saved(live, folder, tmp_path / "adapter", quantization=quantization)
    tensors = load_file(adapter / "adapter_model.safetensors")
    ranks = [sum(flags) or 1 for flags in left_of(live).values()]  # of none PEFT would say it is damaged
    assert [len(each) for name, each in sorted(tensors.items()) if "lora_E" in name] == [
        rank for _, rank in sorted(zip(left_of(live), ranks, strict=True))
    ]
    assert sum(each.nbytes for each in tensors.values()) < 0.7 * whole
    again = load_adapter(base_of(folder, quantization=quantization), adapter)
    assert_near(logits(again), found)  # a sum of fewer terms is added up in another order
    with pytest.warns(RuntimeWarning, match="rank_pattern keys did not match"):  # PEFT's, who uses them still
        plain = PeftModel.from_pretrained(base_of(folder, quantization=quantization), str(adapter))
    assert not any(isinstance(module, TripletLinear) for module in plain.modules())
    assert_near(logits(plain), found)
    swap = Swap(base_of(folder, quantization=quantization))
    before = logits(swap)
    swap.add("mine", adapter)
    swap.use("mine")
    assert_near(logits(swap), found)
    swap.remove("mine")
    assert torch.equal(logits(swap), before)
    once_more = saved(again, folder, tmp_path / "again", quantization=quantization)
    assert torch.equal(
        logits(load_adapter(base_of(folder, quantization=quantization), once_more)), logits(again)
    )
    check_adapter(adapter, skeleton(folder))


def assert_near(found: Tensor, expected: Tensor) -> None:
    assert (found - expected).abs().max() < 1e-5 * expected.abs().max()


def skeleton(folder: Path) -> Any:
    values = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    return skeleton_base(values, quantization="none", double_quant=False, dtype=FP32)


def test_sums_with_other_adapters_are_exact_and_are_lora(tmp_path: Path, tiny_model: TinyModel) -> None:
    folder = tiny_model("qwen2")
    one = saved(pruned(folder), folder, tmp_path / "one")
    other = saved(drawn("lora", folder), folder, tmp_path / "other")
    changed(one, nothing_left)  # as PEFT itself saves it
    parts = [(one, 0.75), (other, -0.5)]
    both, alone = tmp_path / "both", tmp_path / "alone"
    list(combine(parts, both))
    list(combine([(one, 0.5)], alone))
    for made, of in ((both, parts), (alone, [(one, 0.5)])):
        with OnDisk(made) as found:
            opened = [OnDisk(*each) for each in of]
            assert set(found.weights) == {name for each in opened for name in each.weights}
            assert (Q.removeprefix("base_model.model.") + "weight" in found.weights) == (made is both)
            for name in found.weights:
                wanted = sum(delta(each, name) for each in opened if name in each.weights)
                assert torch.allclose(delta(found, name), wanted, rtol=1e-5, atol=1e-7)  # type: ignore[arg-type]
            for each in opened:
                each.close()
        assert json.loads((made / "adapter_config.json").read_text(encoding="utf-8"))["peft_type"] == "LORA"
        load_adapter(base_of(folder), made)


def delta(adapter: OnDisk, name: str) -> Tensor:
    update = adapter.update(name)
    return update.scale * (update.b.double() @ update.a.double())


def test_a_lora_file_for_llama_cpp_with_ranks_that_differ_is_proven(
    tmp_path: Path, tiny_model: TinyModel
) -> None:
    folder, file = tiny_model("llama"), tmp_path / "lora.gguf"
    adapter = saved(pruned(folder), folder, tmp_path / "adapter")
    list(write_gguf_lora(adapter, file, model_folder=folder, about=ABOUT))
    proof = proof_of(file, folder, adapter)
    assert proof.holds, proof.sentence()


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_the_plan_counts_the_triplets_and_the_most_that_is_saved(
    dtype: str, folders: dict[str, Path], tmp_path: Path
) -> None:
    setting = dataclasses.replace(CPU, method="adalora", rank=7, adapter_dtype=dtype)
    model = build(folders["llama"], setting)
    trained = trainable(model)
    assert sum(each.nbytes for each in trained.values()) == adapter_bytes(shape_of("llama"), setting)
    assert sum(each.numel() for each in trained.values()) == planned(shape_of("llama"), setting)
    for name, value in trained.items():
        value.data += 1 if "lora_E" in name else 0
    facts = AdapterFacts("base", None, "", "nf4", True, "fp32", "")
    save_adapter(model, tmp_path / "adapter", facts=facts, tokenizer=None)  # type: ignore[arg-type]
    tensors = load_file(tmp_path / "adapter/adapter_model.safetensors")
    assert sum(each.nbytes for each in tensors.values()) == saved_bytes(shape_of("llama"), setting)


Q = "base_model.model.model.layers.0.self_attn.q_proj."
PATTERN = "model.layers.0.self_attn.q_proj.lora_E"
Damage = Callable[[dict[str, Tensor], dict[str, Any]], Any]
DAMAGES: dict[str, tuple[Damage, type[QadaptError], str]] = {
    "more left than there is": (
        lambda t, c: c["rank_pattern"].update({PATTERN: [True] * START}), BadExport, "says rank 6"
    ),
    "no value": (lambda t, c: t.pop(Q + "lora_E"), BadExport, "says peft_type = 'ADALORA'"),
    "too few values": (
        lambda t, c: t.update({Q + "lora_E": torch.ones(1, 1)}), BadExport, "values of .*q_proj is"
    ),
    "no number": (lambda t, c: t[Q + "lora_A"].fill_(float("nan")), BadExport, "NaN .*lora_A"),
    "another method": (lambda t, c: c.update(peft_type="LORA"), BadRun, "rank_pattern is"),
    "no pattern": (lambda t, c: c.pop("rank_pattern"), BadExport, "says rank 6"),
}  # fmt: skip
FLAGS: dict[str, Any] = {"of another length": [True] * 3, "no flags": [1] * START, "a number": 4}


@pytest.mark.parametrize("case", DAMAGES)
def test_parts_that_do_not_go_together_are_not_merged(
    case: str, tiny_model: TinyModel, tmp_path: Path
) -> None:
    change, error, message = DAMAGES[case]
    folder = tiny_model("llama")
    adapter = saved(half_left(folder), folder, tmp_path / "adapter")
    changed(adapter, change)
    with pytest.raises(error, match=message):
        list(merge(model_folder=folder, adapter_folder=adapter, target=tmp_path / "out", base="original"))


@pytest.mark.parametrize("case", FLAGS)
def test_a_pattern_that_says_nothing_is_not_loaded(case: str, tiny_model: TinyModel, tmp_path: Path) -> None:
    folder = tiny_model("llama")
    adapter = saved(half_left(folder), folder, tmp_path / "adapter")
    changed(adapter, lambda t, c: c["rank_pattern"].update({PATTERN: FLAGS[case]}))
    for act in (
        lambda: load_adapter(base_of(folder), adapter),
        lambda: Swap(base_of(folder)).add("a", adapter),
    ):
        with pytest.raises(BadAdapter, match="rank_pattern is no list of init_r true and false"):
            act()


def test_a_pattern_for_a_layer_that_is_not_there_is_refused(tiny_model: TinyModel, tmp_path: Path) -> None:
    folder = tiny_model("llama")
    adapter = saved(half_left(folder), folder, tmp_path / "adapter")
    changed(adapter, lambda t, c: c["rank_pattern"].update({PATTERN.replace("0", "9"): [True] * START}))
    with pytest.raises(BadAdapter, match="does not fit its base"):
        load_adapter(base_of(folder), adapter)


def nothing_left(tensors: dict[str, Tensor], config: dict[str, Any]) -> None:
    config["rank_pattern"][PATTERN] = [False] * START
    tensors |= {Q + "lora_A": torch.ones(0, 64), Q + "lora_E": torch.ones(0, 1)}
    tensors[Q + "lora_B"] = tensors[Q + "lora_B"][:, :0].contiguous()


def half_left(folder: Path) -> PeftModel:
    model = drawn("adalora", folder)
    with torch.no_grad():
        for _, parts in triplets_of(model):
            parts["lora_E"][::2] = 0
    return model


def changed(adapter: Path, change: Damage) -> None:
    path, config = adapter / "adapter_model.safetensors", adapter / "adapter_config.json"
    tensors, values = load_file(path), json.loads(config.read_text(encoding="utf-8"))
    change(tensors, values)
    save_file(tensors, path, {"format": "pt"})
    config.write_text(json.dumps(values), encoding="utf-8")
