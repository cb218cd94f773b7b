"""Adapters of every method side by side on one base: each as when it is loaded alone, no trace after it."""

from __future__ import annotations

import json
import math
import random
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from swap_adapters import live_bytes
from test_method_runs import drawn, logits
from test_methods import attached, base_of
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedModel

from qadapt.adapters.bottleneck import load_bottleneck
from qadapt.adapters.effect import Effect
from qadapt.adapters.facts import AdapterFacts, own_files
from qadapt.adapters.lora import save_adapter, trainable
from qadapt.adapters.method import load_adapter
from qadapt.adapters.swap import Swap, effects_of
from qadapt.engine.adapted import Adapted
from qadapt.engine.tiles import set_tiles
from qadapt.errors import BadAdapter, Unsupported
from qadapt.methods import METHODS, Method, front_ids
from qadapt.model.generate import generate

if TYPE_CHECKING:
    from conftest import TinyModel

ALL = tuple(METHODS)
MIXED: tuple[Method, ...] = ("lora", "dora", "ia3", "pfeiffer", "houlsby", "parallel")
PROMPTED: tuple[Method, ...] = (*MIXED, "vera", "oft", "prompt", "prefix", "compacter", "fusion")
"""Those that rows of one batch have side by side."""
IDS = torch.arange(3, 43).view(2, 20)
UP_PROJ = "base_model.model.model.layers.0.mlp.up_proj"
Saved = Callable[..., Path]


@pytest.fixture(scope="module")
def saved(tiny_model: TinyModel, tmp_path_factory: pytest.TempPathFactory) -> Saved:
    """`saved("dora")`: the folder of an adapter that does something, made once and not to be changed."""
    made: dict[tuple[str, ...], Path] = {}
    place = tmp_path_factory.mktemp("adapters")

    def make(method: Method, *, family: str = "qwen2", quantization: str = "nf4") -> Path:
        key = (method, family, quantization)
        if key not in made:
            folder = tiny_model(family)
            model = drawn(method, folder, quantization=quantization)
            facts = AdapterFacts(
                str(folder), None, "", quantization, True, "fp32", "", mends_base=METHODS[method].mends_base
            )
            made[key] = kept(model, place / "-".join(key), facts)
        return made[key]

    return make


def kept(model: Any, to: Path, facts: AdapterFacts) -> Path:
    save_adapter(model, to, facts=facts, tokenizer=AutoTokenizer.from_pretrained(facts.base))
    return to


def beside(base: PreTrainedModel, folders: dict[str, Path]) -> Swap:
    swap = Swap(base)
    for name, folder in folders.items():
        swap.add(name, folder)
    return swap.eval()


def several(saved: Saved, base: Path, names: Sequence[Method] = MIXED) -> Swap:
    return beside(base_of(base), {name: saved(name) for name in names})


def assert_near(found: Tensor, expected: Tensor) -> None:
    assert (found - expected).abs().max() < 1e-5 * expected.abs().max()


# --- one of them ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "quantization"),
    [
        *((name, "nf4") for name in ALL),
        *((name, "none") for name in ("lora", "dora", "vera", "ia3", "prefix")),
    ],
)
def test_an_adapter_is_what_it_is_when_it_is_loaded_alone_and_leaves_no_trace(
    method: Method, quantization: str, tiny_model: TinyModel, saved: Saved
) -> None:
    folder, adapter = tiny_model("qwen2"), saved(method, quantization=quantization)
    alone = logits(load_adapter(base_of(folder, quantization=quantization), adapter))
    base = base_of(folder, quantization=quantization)
    before = logits(base)
    swap = beside(base, {"mine": adapter})
    assert torch.equal(logits(swap), before), "it is not on"
    swap.use("mine")
    assert_near(logits(swap), alone)
    assert not torch.allclose(alone, before, atol=1e-2), "a control: the adapter does something"
    swap.none()
    assert torch.equal(logits(swap), before)
    assert not trainable(swap)


@pytest.mark.parametrize(
    ("method", "family"),
    [
        ("dora", "phi3"),
        ("pfeiffer", "gemma2"),
        ("compacter", "gemma2"),
        ("prefix", "gemma2"),
        ("ia3", "llama"),
    ],
)
def test_other_architectures_are_no_different(
    method: Method, family: str, tiny_model: TinyModel, saved: Saved
) -> None:
    folder, adapter = tiny_model(family), saved(method, family=family)
    swap = beside(base_of(folder), {"mine": adapter})
    swap.use("mine")
    assert_near(logits(swap), logits(load_adapter(base_of(folder), adapter)))


@pytest.mark.parametrize("method", ["lora", "dora", "ia3"])
def test_a_base_in_8_bits_is_no_different(method: Method, tiny_model: TinyModel, saved: Saved) -> None:
    folder, adapter = tiny_model("llama"), saved(method, family="llama", quantization="int8")
    swap = beside(base_of(folder, quantization="int8"), {"mine": adapter})
    swap.use("mine")
    assert_near(logits(swap), logits(load_adapter(base_of(folder, quantization="int8"), adapter)))


@pytest.mark.parametrize("method", ["lora", "dora", "vera", "ia3", "pfeiffer"])
def test_a_base_in_bf16_is_no_different(method: Method, tiny_model: TinyModel, saved: Saved) -> None:
    folder, adapter, dtype = tiny_model("qwen2"), saved(method), torch.bfloat16
    swap = beside(base_of(folder, dtype=dtype), {"mine": adapter})
    swap.use("mine")
    alone = logits(load_adapter(base_of(folder, dtype=dtype), adapter))
    assert (logits(swap) - alone).abs().max() < 5e-3 * alone.abs().max()


def test_it_looks_like_any_model_with_an_adapter(tiny_model: TinyModel, saved: Saved) -> None:
    swap = several(saved, tiny_model("qwen2"))
    base = logits(swap)
    swap.use("ia3")
    with swap.disable_adapter():
        assert torch.equal(logits(swap), base)
    with swap.using("lora"):
        assert swap.chosen == (("lora",),)
    assert swap.chosen == (("ia3",),)
    assert isinstance(swap, Adapted)


def test_memory_grows_by_the_adapters_bytes_and_is_given_back(tiny_model: TinyModel, saved: Saved) -> None:
    folders = {name: saved(name) for name in PROMPTED}
    swap = Swap(base_of(tiny_model("qwen2")))
    with torch.no_grad():
        swap(input_ids=IDS)
    before = live_bytes()
    for name, folder in folders.items():
        swap.add(name, folder)
        swap.use(name)
        with torch.no_grad():
            swap(input_ids=IDS)
    with torch.no_grad(), swap.rows(["lora", "pfeiffer"]):
        swap(input_ids=IDS)
    files = [load_file(folder / own_files(folder)[0]) for folder in folders.values()]
    expected = sum(tensor.nbytes for file in files for tensor in file.values())
    del files
    assert live_bytes() - before == expected
    for name in PROMPTED:
        swap.remove(name)
    assert live_bytes() == before
    assert swap.names == swap.chosen == ()
    base = swap.get_base_model()
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in base.modules())


def test_a_pass_that_is_broken_off_leaves_nothing(tiny_model: TinyModel, saved: Saved) -> None:
    swap = several(saved, tiny_model("qwen2"), ("pfeiffer", "prompt"))
    ids = torch.cat((torch.tensor([[7] * 4, front_ids(4)]), IDS), dim=1)
    swap.use("pfeiffer")
    with torch.no_grad(), swap.rows(["pfeiffer", "prompt"]):
        expected = swap(input_ids=ids).logits
    before = live_bytes()
    handle = swap.get_submodule("base.model.layers.1.mlp").register_forward_pre_hook(break_off)
    assert was_broken_off(swap, IDS)
    assert live_bytes() == before
    with swap.rows(["pfeiffer", "prompt"]):
        assert was_broken_off(swap, ids)
    assert live_bytes() == before
    handle.remove()
    with torch.no_grad(), swap.rows(["pfeiffer", "prompt"]):
        assert torch.equal(swap(input_ids=ids).logits, expected)


def break_off(*_: object) -> None:
    raise torch.OutOfMemoryError("in the middle")


def was_broken_off(swap: Swap, ids: Tensor) -> bool:
    try:
        with torch.no_grad():
            swap(input_ids=ids)
    except torch.OutOfMemoryError:
        return True
    return False


def test_what_is_taken_out_meanwhile_is_not_on_again(tiny_model: TinyModel, saved: Saved) -> None:
    swap = several(saved, tiny_model("qwen2"), ("lora", "prompt"))
    swap.use("prompt")
    with swap.using("lora"):
        swap.remove("prompt")
        assert swap.chosen == (("lora",),)
    assert swap.chosen == ()
    assert swap.virtual_tokens == 0


def test_a_prefix_leaves_no_trace_where_another_adapter_stays(tiny_model: TinyModel, saved: Saved) -> None:
    swap = several(saved, tiny_model("qwen2"), ("houlsby", "prefix"))
    swap.use("houlsby")
    before, names = logits(swap), [name for name, _ in swap.base.named_modules()]
    assert any(name.endswith("prefix") for name in names)
    swap.remove("prefix")
    assert not any(name.endswith("prefix") for name, _ in swap.base.named_modules())
    assert torch.equal(logits(swap), before)


def test_a_switch_takes_far_less_than_ten_milliseconds(tiny_model: TinyModel, saved: Saved) -> None:
    swap = several(saved, tiny_model("qwen2"))
    seconds = []
    for name in MIXED * 20:
        begun = time.perf_counter()
        swap.use(name)
        seconds.append(time.perf_counter() - begun)
    assert statistics.median(seconds) < 1e-3


# --- several of them --------------------------------------------------------------------------------------


@pytest.mark.parametrize("quantization", ["nf4", "none"])
def test_rows_of_a_batch_have_their_own_adapters(
    quantization: str, tiny_model: TinyModel, saved: Saved
) -> None:
    base = base_of(tiny_model("qwen2"), quantization=quantization)
    swap = beside(base, {name: saved(name, quantization=quantization) for name in MIXED})
    whose = [*MIXED, None, ("lora", "pfeiffer"), "lora"]
    ids = torch.arange(3, 3 + 11 * len(whose)).view(len(whose), 11)
    with torch.no_grad():
        plain = swap(input_ids=ids).logits
        with swap.rows(whose):
            together = swap(input_ids=ids).logits
        for row, names in enumerate(whose):
            with swap.rows([names]):
                assert_near(together[row], swap(input_ids=ids[row : row + 1]).logits[0])
    assert torch.equal(together[whose.index(None)], plain[whose.index(None)])
    assert not torch.equal(together[0], plain[0])


def test_prompts_to_several_are_answered_together_as_alone(tiny_model: TinyModel, saved: Saved) -> None:
    swap = several(saved, tiny_model("qwen2"), PROMPTED)
    whose = [*reversed(PROMPTED), None, "lora", ("prompt", "lora")] * 2  # more than are answered at once
    prompts = [list(range(5 + place, 5 + place + 3 + place * 7 % 17)) for place in range(len(whose))]
    how: dict[str, Any] = {"max_new_tokens": 8, "end_ids": frozenset({2}), "pad_id": 0}
    alone = []
    for prompt, name in zip(prompts, whose, strict=True):
        with swap.rows([name]):
            alone += generate(swap, [prompt], **how)
    assert generate(swap.asked(whose), prompts, **how) == alone
    assert generate(swap, prompts, **how) != alone, "a control: they answer differently"
    assert swap.chosen == ()


def test_updates_of_lora_add_up_as_pefts_do(tiny_model: TinyModel, saved: Saved) -> None:
    folder = tiny_model("qwen2")
    names: tuple[Method, ...] = ("lora", "rslora", "pissa")
    folders = {name: saved(name, quantization="none") for name in names}
    stock = PeftModel.from_pretrained(base_of(folder, quantization="none"), folders["lora"], "lora")
    for name in names[1:]:
        stock.load_adapter(folders[name], name)
    stock.base_model.set_adapter(list(names))
    swap = beside(base_of(folder, quantization="none"), folders)
    swap.stack(names)
    assert_near(logits(swap), logits(stock))
    swap.stack(names[::-1])
    assert_near(logits(swap), logits(stock))


def test_a_bottleneck_works_on_what_the_one_before_it_gave(tiny_model: TinyModel, saved: Saved) -> None:
    folder = tiny_model("llama")
    one, other = (saved(method, family="llama") for method in ("parallel", "pfeiffer"))
    attached_both = load_bottleneck(load_bottleneck(base_of(folder), one).base, other)
    swap = beside(base_of(folder), {"one": one, "other": other})
    swap.stack(["one", "other"])
    assert_near(logits(swap), logits(attached_both))
    swap.stack(["other", "one"])
    assert not torch.allclose(logits(swap), logits(attached_both), atol=1e-3)


def test_a_language_and_a_task_stand_on_each_other_whatever_their_methods(
    tiny_model: TinyModel, saved: Saved
) -> None:
    folder = tiny_model("qwen2")
    swap = several(saved, folder)
    swap.stack(["lora", "houlsby"])
    naive = load_bottleneck(load_adapter(base_of(folder), saved("lora")).get_base_model(), saved("houlsby"))
    assert_near(logits(swap), logits(naive))


def test_random_stacks_with_a_fusion_in_them_are_adapters_loaded_one_on_the_other(
    tiny_model: TinyModel, saved: Saved
) -> None:
    """Rows of one batch, each with a stack of its own; what stands on disk is attached in that order."""
    folder, draw = tiny_model("qwen2"), random.Random(5)
    in_layers: tuple[Method, ...] = ("lora", "adalora", "dora", "ia3")
    beside_parts: tuple[Method, ...] = ("houlsby", "parallel", "compacter", "pfeiffer", "prefix")
    swap = several(saved, folder, (*in_layers, *beside_parts, "fusion"))
    stacks: list[tuple[Method, ...]] = []
    for first in in_layers:
        others: list[Method] = [*draw.sample(beside_parts, draw.randint(0, 3)), "fusion"]
        stacks.append((first, *draw.sample(others, len(others))))
    ids = torch.randint(3, 300, (len(stacks) + 2, 13))
    with torch.no_grad(), swap.rows([*stacks, "fusion", None]):
        together = swap(input_ids=ids).logits
    for row, names in enumerate([*stacks, ("fusion",)]):
        model: Any = base_of(folder)
        for name in names:
            model = load_adapter(model, saved(name)).get_base_model()
        with torch.no_grad():
            alone = model.eval()(input_ids=ids[row : row + 1]).logits[0]
        assert_near(together[row], alone)
    with torch.no_grad():
        plain = swap(input_ids=ids).logits
    assert torch.equal(together[-1], plain[-1])
    assert all(not torch.allclose(together[row], plain[row], atol=1e-2) for row in range(len(ids) - 1))


def test_a_prefix_stands_within_what_others_change(tiny_model: TinyModel, saved: Saved) -> None:
    folder = tiny_model("qwen2")
    swap = several(saved, folder, ("prefix", "houlsby", "prefix-flat"))
    both = load_bottleneck(load_adapter(base_of(folder), saved("prefix")).get_base_model(), saved("houlsby"))
    for names in (["prefix", "houlsby"], ["houlsby", "prefix"]):
        swap.stack(names)
        assert_near(logits(swap), logits(both))
    with pytest.raises(Unsupported, match=r"prefix and prefix-flat cannot be stacked: at .*self_attn they"):
        swap.stack(["prefix", "houlsby", "prefix-flat"])


# --- new tokens -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("family", "known"), [("llama", 12), ("llama", 5), ("gemma2", 12), ("gemma2", 0)])
def test_rows_of_new_tokens_stand_beside_the_tables(
    family: str, known: int, tiny_model: TinyModel, tmp_path: Path, saved: Saved
) -> None:
    folder = tiny_model(family)
    table = base_of(folder).get_input_embeddings().weight
    new_ids = list(range(len(table) - known, len(table) - known + 12))  # the table has room for some of them
    model = attached("lora", folder, new_ids=new_ids)
    torch.manual_seed(6)
    for parameter in trainable(model).values():
        parameter.data += 0.05 * torch.randn(parameter.shape)
    facts = AdapterFacts(str(folder), None, "", "nf4", True, "fp32", "")
    adapter = kept(model, tmp_path / "new", facts)
    swap = beside(base_of(folder), {"new": adapter, "other": saved("pfeiffer", family=family)})
    ids = torch.tensor([[5, new_ids[0], 7, new_ids[-1]], [9, 8, new_ids[4], 6]])
    plain = torch.where(ids < new_ids[0], ids, 11)
    alone = load_adapter(base_of(folder), adapter).eval()
    with torch.no_grad():
        swap.use("new")
        found = swap(input_ids=ids).logits
        assert_near(found, alone(input_ids=ids).logits[..., : found.shape[-1]])
        swap.none()
        base = swap(input_ids=plain).logits
        assert torch.equal(base, base_of(folder).eval()(input_ids=plain).logits)
        with swap.rows(["new", "other"]):
            both = swap(input_ids=torch.stack((ids[0], plain[1]))).logits
        assert_near(both[0], found[0])
        swap.use("other")
        assert_near(both[1, :, : len(table)], swap(input_ids=plain).logits[1])
    least = -30 if family == "gemma2" else -math.inf  # it caps its logits
    assert (both[1, :, len(table) :] == least).all(), "tokens that this row does not know"


# --- what is refused --------------------------------------------------------------------------------------


def test_names_are_checked(tiny_model: TinyModel, saved: Saved) -> None:
    swap = several(saved, tiny_model("qwen2"), ("lora",))
    with pytest.raises(BadAdapter, match="There is an adapter lora in memory already"):
        swap.add("lora", saved("ia3"))
    for call in (swap.use, swap.remove):
        with pytest.raises(BadAdapter, match="There is no adapter dora in memory") as refused:
            call("dora")
        assert "In memory are lora" in refused.value.cure
    with pytest.raises(BadAdapter, match="no adapter dora"), swap.rows(["lora", "dora"]):
        pass
    assert swap.chosen == ()


def test_what_has_no_meaning_together_is_not_stacked(tiny_model: TinyModel, saved: Saved) -> None:
    swap = several(saved, tiny_model("qwen2"))
    for names in (("lora", "dora"), ("lora", "ia3"), ("ia3", "dora"), ("lora", "lora")):
        with pytest.raises(
            Unsupported, match=f"{names[0]} and {names[1]} cannot be stacked: at .*q_proj they"
        ):
            swap.stack(names)
    with pytest.raises(Unsupported, match="lora and dora cannot be stacked"), swap.rows([("lora", "dora")]):
        pass


def test_what_mends_its_base_is_not_stacked(tiny_model: TinyModel, saved: Saved) -> None:
    swap = several(saved, tiny_model("qwen2"), ("lora", "loftq"))
    with pytest.raises(Unsupported, match="lora and loftq cannot be stacked"):
        swap.stack(["lora", "loftq"])


def test_virtual_tokens_must_stand_in_front_of_their_rows(tiny_model: TinyModel, saved: Saved) -> None:
    swap = several(saved, tiny_model("qwen2"), ("prompt", "lora"))
    ids = torch.cat((torch.tensor([front_ids(4), [7] * 4]), IDS), dim=1)
    with torch.no_grad(), swap.rows(["prompt", "lora"]):
        for lacking in (IDS, ids[:, 1:]):
            with pytest.raises(Unsupported, match="has 4 virtual tokens do not have them in front"):
                swap(input_ids=lacking)
            with pytest.raises(Unsupported, match="has 4 virtual tokens do not have them in front"):
                swap(lacking)
        both = swap(input_ids=ids).logits
    with torch.no_grad(), swap.using("prompt"):
        assert_near(both[0, 4:], swap(input_ids=IDS[:1]).logits[0])
    with torch.no_grad(), swap.using("lora"):
        assert_near(both[1], swap(input_ids=ids[1:]).logits[0])


def test_a_batch_of_another_number_of_rows_is_refused(tiny_model: TinyModel, saved: Saved) -> None:
    swap = several(saved, tiny_model("qwen2"), ("lora", "ia3", "prefix"))
    for whose in (["lora", "ia3", None], ["prefix", None, None], ["prefix"] * 2 + ["lora"]):
        with (
            torch.no_grad(),
            swap.rows(whose),
            pytest.raises(Unsupported, match="chosen for 3 rows, and the model computes 2 at once"),
        ):
            swap(input_ids=IDS)
    with (
        torch.no_grad(),
        swap.rows(["prefix", None]),
        pytest.raises(Unsupported, match="chosen for 2 rows, and the model computes 4 at once"),
    ):
        swap(input_ids=IDS.repeat(2, 1))
    set_tiles(swap.base, 2)
    with (
        torch.no_grad(),
        swap.rows(["lora", "ia3"]),
        pytest.raises(Unsupported, match="chosen for 2 rows, and the model computes 1 at once"),
    ):
        swap(input_ids=IDS)
    set_tiles(swap.base, 1)
    with torch.no_grad(), swap.rows(["lora", "ia3"]):
        swap(input_ids=IDS)


def copied(adapter: Path, to: Path, *, config: dict[str, Any] | None = None, **tensors: Tensor) -> Path:
    """An adapter with other settings and tensors, these named by their ends."""
    to.mkdir()
    for path in adapter.iterdir():
        (to / path.name).write_bytes(path.read_bytes())
    settings = json.loads((to / "adapter_config.json").read_text("utf-8"))
    (to / "adapter_config.json").write_text(json.dumps({**settings, **(config or {})}), "utf-8")
    values = load_file(to / "adapter_model.safetensors")
    save_file({**values, **tensors}, to / "adapter_model.safetensors")
    return to


@pytest.mark.parametrize(
    ("config", "tensors", "problem"),
    [
        ({"use_qalora": True}, {}, "cannot stand beside others: it has use_qalora"),
        ({"use_dora": True}, {}, "is of other sizes than"),
        ({"init_lora_weights": "pissa"}, {}, "it starts from 'pissa', which rewrites the base"),
        ({"target_parameters": ["mlp.experts.up_proj"]}, {}, "it has target_parameters"),
        (
            {},
            {f"{UP_PROJ}.token_adapter.trainable_tokens_delta": torch.ones(2, 2)},
            "it has more at model.layers.0.mlp.up_proj than rows of new tokens",
        ),
        (
            {},
            {f"{UP_PROJ}.lora_A.weight": torch.tensor(1.0)},
            "of other sizes",
        ),
        ({}, {"base_model.model.lm_head.weight": torch.ones(2, 2)}, "it has base_model.model.lm_head.weight"),
        (
            {},
            {"base_model.model.model.norm.lora_A.weight": torch.ones(4, 64)},
            "model.norm is no linear layer",
        ),
        ({}, {"base_model.model.model.more.lora_A.weight": torch.ones(4, 64)}, "this base has no model.more"),
        (
            {},
            {f"{UP_PROJ}.lora_A.weight": torch.ones(4, 63)},
            "of other sizes",
        ),
        (
            {},
            {f"{UP_PROJ}.lora_A.weight": torch.full((4, 64), torch.nan)},
            "has a number in .*up_proj.lora_A.weight that is none",
        ),
    ],
)
def test_what_is_not_known_or_does_not_fit_is_refused_and_nothing_stays(
    config: dict[str, Any],
    tensors: dict[str, Tensor],
    problem: str,
    tiny_model: TinyModel,
    saved: Saved,
    tmp_path: Path,
) -> None:
    swap = Swap(base_of(tiny_model("qwen2")))
    adapter = copied(saved("lora"), tmp_path / "changed", config=config, **tensors)
    with pytest.raises((BadAdapter, Unsupported), match=problem):
        swap.add("mine", adapter)
    assert swap.names == ()
    assert not any(module._forward_hooks for module in swap.base.modules())


def test_an_adapter_that_lacks_a_layer_is_refused(
    tiny_model: TinyModel, saved: Saved, tmp_path: Path
) -> None:
    swap = Swap(base_of(tiny_model("qwen2")))
    adapter = copied(saved("lora"), tmp_path / "changed")
    path = adapter / "adapter_model.safetensors"
    lacking = {name: each for name, each in load_file(path).items() if "layers.1.mlp.up_proj" not in name}
    save_file(lacking, path)
    with pytest.raises(BadAdapter, match=r"has nothing for model.layers.1.mlp.up_proj, which its config"):
        swap.add("mine", adapter)


def test_an_adapter_of_another_base_is_refused(tiny_model: TinyModel, saved: Saved) -> None:
    swap = Swap(base_of(tiny_model("llama")))
    with pytest.raises(BadAdapter, match="whose model_type is qwen2; this base's is llama"):
        swap.add("mine", saved("pfeiffer"))
    with pytest.raises(BadAdapter, match="does not fit its base: "):
        swap.add("mine", saved("lora", family="phi3"))


def test_projections_that_are_no_matrices_are_refused(
    tiny_model: TinyModel, saved: Saved, tmp_path: Path
) -> None:
    swap = Swap(base_of(tiny_model("qwen2")))
    adapter = copied(saved("vera"), tmp_path / "changed", **{"base_model.vera_A": torch.ones(4)})
    with pytest.raises(BadAdapter, match="is of other sizes than"):
        swap.add("mine", adapter)


def test_damaged_files_are_refused(tiny_model: TinyModel, saved: Saved, tmp_path: Path) -> None:
    swap = Swap(base_of(tiny_model("qwen2")))
    adapter = copied(saved("lora"), tmp_path / "changed")
    (adapter / "adapter_model.safetensors").write_bytes(b"nothing")
    with pytest.raises(BadAdapter, match=r"adapter_model.safetensors cannot be read"):
        swap.add("mine", adapter)
    (adapter / "adapter_config.json").write_text("{", "utf-8")
    with pytest.raises(BadAdapter, match="describes no adapter"):
        swap.add("mine", adapter)


# --- what fusion needs ------------------------------------------------------------------------------------


def test_effects_can_be_had_without_a_swap(tiny_model: TinyModel, saved: Saved) -> None:
    base = base_of(tiny_model("qwen2"))
    effects = effects_of(base, saved("houlsby"))
    assert {type(effect) for effect in effects} == {Effect}
    places = [name for name, module in base.named_modules() if module in {each.module for each in effects}]
    assert places == [f"model.layers.{layer}.{part}" for layer in (0, 1) for part in ("self_attn", "mlp")]
    assert not any(module._forward_hooks for module in base.modules())
    values = torch.randn(2, 3, 64)
    hook = effects[1].after
    assert hook is not None
    assert not torch.equal(hook(effects[1].module, (values,), values), values)
