"""New tokens: their rows alone are trained, saved as PEFT's, merged; equal to a table trained whole."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from test_merge import change_tensors, facts, merged, tensors_of
from test_train import adapter_of, assert_same, only
from torch import nn
from torch.nn import functional
from transformers import AutoModelForCausalLM, AutoTokenizer

from qadapt.adapters.lora import Lora, attach_lora, load_lora, save_adapter, trainable, without_adapter
from qadapt.adapters.new_rows import NewRows, new_rows_of
from qadapt.data.conversation import Conversation, Message
from qadapt.data.new_tokens import absent_ids
from qadapt.data.prompt import load_contract
from qadapt.data.tokens import tokens_of
from qadapt.engine.head import Head
from qadapt.engine.loss import loss_sum, summed_loss
from qadapt.engine.recompute import set_recompute
from qadapt.errors import BadExport, BadRecipe, BadRun, Unsupported
from qadapt.events import AdapterAttached, Evaluated, StepDone, Warned
from qadapt.exporting.export import export
from qadapt.model.load import load_base
from qadapt.recipe import Recipe
from qadapt.recipe_file import check_recipe
from qadapt.run import evaluate, load, resume, train

if TYPE_CHECKING:
    from conftest import TinyModel

CPU = torch.device("cpu")
FEW = ("<tool>", "<|call|>", "</tool>")
"""They find room in the 16 spare rows of a tiny model's table."""
MANY = tuple(f"<mark{number}>" for number in range(19))
"""They do not: 448 rows grow to 456."""
FAMILIES = ("llama", "gemma2")  # an own head, a tied one


def base_of(folder: Path, *, dtype: torch.dtype = torch.float32, quantization: str = "nf4") -> Any:
    return load_base(folder, quantization=quantization, double_quant=True, dtype=dtype, device=CPU)


def adapted(folder: Path, tokens: tuple[str, ...], *, dtype: torch.dtype = torch.float32) -> PeftModel:
    """An adapted base with new tokens; everything trained is away from its start."""
    ids = load_contract(folder, new_tokens=tokens).new_ids
    base = base_of(folder, dtype=dtype)
    model = attach_lora(base, Lora(rank=4, alpha=8), dtype=dtype, seed=0, new_ids=ids)
    draw = torch.Generator().manual_seed(1)
    for parameter in trainable(model).values():
        parameter.data += torch.randn(parameter.shape, generator=draw).to(dtype) * 0.1
    return model


def some_ids(model: torch.nn.Module, *, seed: int = 2) -> torch.Tensor:
    """(3, 23) ids, about a third of them new ones."""
    draw = torch.Generator().manual_seed(seed)
    new = torch.tensor(next(iter(new_rows_of(model).values())).ids)
    old = torch.randint(3, 400, (3, 23), generator=draw)
    chosen = new[torch.randint(0, len(new), (3, 23), generator=draw)]
    return torch.where(torch.rand((3, 23), generator=draw) < 0.35, chosen, old)


def logits(model: torch.nn.Module, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model.eval()(input_ids=ids).logits.float()
    return found


def whole_table_reference(model: PeftModel, ids: torch.Tensor) -> dict[str, torch.Tensor]:
    """Loss and gradients of the new rows where embedding and head are trained whole, without hooks."""
    base, found = model.get_base_model(), new_rows_of(model)
    tables = {name: model.get_submodule(name).weight for name in found}
    for name, table in tables.items():
        rows = found[name]
        table.data[rows.ids.start : rows.ids.stop] = rows.weight.detach()
        table.requires_grad_(True)
        rows.is_on = False
    output = base(input_ids=ids, use_cache=False).logits[:, :-1]
    loss = functional.cross_entropy(output.flatten(0, 1), ids[:, 1:].flatten(), reduction="sum")
    loss.backward()
    gradients = {"loss": loss.detach()}
    for name, table in tables.items():
        assert table.grad is not None
        gradients[name] = table.grad[found[name].ids.start : found[name].ids.stop]
    return gradients


@pytest.mark.parametrize("recompute", ["all", "none"])
@pytest.mark.parametrize("tokens", [FEW, MANY], ids=["spare", "grown"])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_gradient_of_the_new_rows_is_that_of_whole_tables(
    tiny_model: TinyModel, family: str, tokens: tuple[str, ...], recompute: Any
) -> None:
    model = adapted(tiny_model(family), tokens).train()
    set_recompute(model.get_base_model(), recompute)
    ids = some_ids(model)
    loss = loss_sum(model, input_ids=ids, positions=torch.arange(22), targets=ids[:, 1:])
    loss.backward()
    mine = {name: rows.weight.grad for name, rows in new_rows_of(model).items()}
    lora = {name: p.grad for name, p in trainable(model).items() if "lora_" in name}
    assert len(mine) == (1 if family == "gemma2" else 2)
    for parameter in trainable(model).values():
        parameter.grad = None
    reference = whole_table_reference(model, ids)
    assert torch.allclose(loss, reference["loss"], rtol=1e-6)
    for name, gradient in mine.items():
        assert gradient is not None and gradient.any()
        assert torch.allclose(gradient, reference[name], rtol=1e-4, atol=1e-5 * gradient.abs().max()), name
    for name, gradient in lora.items():
        now = trainable(model)[name].grad
        assert torch.allclose(gradient, now, rtol=1e-4, atol=1e-5 * now.abs().max()), name


def test_a_new_row_starts_as_the_mean_and_the_base_is_undisturbed(tiny_model: TinyModel) -> None:
    folder = tiny_model("llama")
    before = base_of(folder)
    ids = load_contract(folder, new_tokens=MANY).new_ids
    plain = torch.arange(40).view(2, 20) + 5
    known = logits(before, plain)
    table = before.get_input_embeddings().weight.clone()
    model = attach_lora(base_of(folder), Lora(4, 8), dtype=torch.float32, seed=0, new_ids=ids)
    after = model.get_base_model().get_input_embeddings().weight
    assert after.shape == (456, 64) and torch.equal(after[: ids[0]], table[: ids[0]])
    assert torch.allclose(after[ids[0] : ids[-1] + 1], table[: ids[0]].mean(0).expand(19, -1), atol=1e-6)
    assert not after[ids[-1] + 1 :].any(), "what rounds the table up is zero"
    assert torch.equal(logits(model, plain)[..., : ids[0]], known[..., : ids[0]])


@pytest.mark.parametrize("family", FAMILIES)
def test_the_table_stays_frozen_and_a_tied_head_tied(tiny_model: TinyModel, family: str) -> None:
    model = adapted(tiny_model(family), MANY)
    base = model.get_base_model()
    embedding, head = base.get_input_embeddings(), base.get_output_embeddings()
    assert (head.weight is embedding.weight) == (family == "gemma2")
    assert not head.weight.requires_grad and not embedding.weight.requires_grad
    names = [name for name in trainable(model) if "lora_" not in name]
    assert names == ["base_model.model.model.embed_tokens.new_rows.weight"] + (
        ["base_model.model.lm_head.new_rows.weight"] if family == "llama" else []
    )


@pytest.mark.parametrize("tokens", [FEW, MANY], ids=["spare", "grown"])
@pytest.mark.parametrize("family", FAMILIES)
def test_stock_peft_on_a_stock_base_gives_the_same_logits(
    tiny_model: TinyModel, tmp_path: Path, family: str, tokens: tuple[str, ...]
) -> None:
    folder = tiny_model(family)
    contract = load_contract(folder, new_tokens=tokens)
    ids = torch.tensor(contract.new_ids)
    base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    base.requires_grad_(False)
    model = attach_lora(base, Lora(4, 8), dtype=torch.float32, seed=0, new_ids=contract.new_ids)
    for parameter in trainable(model).values():
        parameter.data += torch.randn_like(parameter) * 0.1
    save_adapter(model, tmp_path / "adapter", facts=facts(), tokenizer=contract.tokenizer)
    rows = some_ids(model)
    expected = logits(model, rows)

    stock = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "adapter")
    assert tokenizer.convert_tokens_to_ids(list(tokens)) == ids.tolist()
    if len(tokenizer) > stock.config.vocab_size:
        stock.resize_token_embeddings(len(tokenizer))
    stock = PeftModel.from_pretrained(stock, str(tmp_path / "adapter"))
    assert torch.allclose(
        logits(stock, rows)[..., : len(tokenizer)], expected[..., : len(tokenizer)], atol=2e-5
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_a_saved_adapter_is_loaded_as_it_was(tiny_model: TinyModel, tmp_path: Path, family: str) -> None:
    folder = tiny_model(family)
    model = adapted(folder, MANY, dtype=torch.bfloat16)
    contract = load_contract(folder, new_tokens=MANY)
    save_adapter(model, tmp_path / "adapter", facts=facts(), tokenizer=contract.tokenizer)
    rows = some_ids(model)
    loaded = load_lora(base_of(folder, dtype=torch.bfloat16), tmp_path / "adapter")
    assert torch.equal(logits(loaded, rows), logits(model, rows))
    assert not trainable(loaded)
    again = load_lora(base_of(folder, dtype=torch.bfloat16), tmp_path / "adapter", is_trainable=True)
    assert trainable(again).keys() == trainable(model).keys()
    assert next(iter(new_rows_of(again).values())).weight.dtype is torch.bfloat16


def test_without_the_adapter_the_new_rows_are_where_they_started(tiny_model: TinyModel) -> None:
    folder = tiny_model("llama")
    model, ids = adapted(folder, FEW), load_contract(folder, new_tokens=FEW).new_ids
    fresh = attach_lora(base_of(folder), Lora(4, 8), dtype=torch.float32, seed=0, new_ids=ids)
    rows = some_ids(model)
    tuned = logits(model, rows)
    with without_adapter(model):
        assert torch.allclose(logits(model, rows), logits(fresh, rows), atol=1e-6)
    assert torch.equal(logits(model, rows), tuned)


@pytest.mark.parametrize("loss_scale", [1.0, 1024.0])
def test_in_fp16_the_rows_gradient_does_not_overflow_where_a_dimension_stands_out(loss_scale: float) -> None:
    """As final norms' outputs have them; a smaller loss scale could not cure what overflows before it."""
    draw = torch.Generator().manual_seed(0)
    table = torch.randn(320, 64, generator=draw).div(8).half()
    hidden = torch.randn(256, 64, generator=draw)
    hidden[:, 5] = 16.0
    targets = torch.randint(0, 300, (256,), generator=draw)
    targets[:32] = 301
    found = []
    for dtype in (torch.float16, torch.float32):
        head = nn.Linear(64, 320, bias=False, dtype=dtype).requires_grad_(False)
        head.weight.copy_(table)
        rows = NewRows(table[300:303].float(), first=300)
        head.register_forward_hook(rows.add_logits)
        inputs = hidden.half().to(dtype).requires_grad_()
        loss = summed_loss(inputs, targets, head=Head(head, trained=(rows.weight,)), chunk=256)
        (loss / 256 * loss_scale).backward()
        assert rows.weight.grad is not None
        found.append(rows.weight.grad)
    assert (found[0] - found[1]).norm() < 2e-3 * found[1].norm()


def make_recipe(folder: Path, model: Path, tokens: tuple[str, ...], **train_fields: Any) -> Recipe:
    """Rows whose answers are calls marked by the new tokens."""
    folder.mkdir(exist_ok=True)
    for name, numbers in (("train.jsonl", range(24)), ("held_out.jsonl", range(100, 106))):
        rows = [
            {"prompt": f"say {number}", "completion": f"{tokens[0]}{number}{tokens[number % len(tokens)]}"}
            for number in numbers
        ]
        (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    section = {"steps": 6, "rows_per_step": 5, "learning_rate": 1e-2, "evaluate_every": 3, **train_fields}
    values = {
        "model": str(model),
        "adapter": {"rank": 4, "dropout": 0.1, "dtype": "bf16"},
        "data": {
            "sources": [{"path": str(folder / "train.jsonl")}],
            "held_out": str(folder / "held_out.jsonl"),
            "length": 128,
            "new_tokens": tokens,
        },
        "train": section,
        "memory": {"compute_dtype": "fp32", "micro_batch": 2},
        "run": {"name": "first", "folder": str(folder / "runs")},
    }
    return check_recipe(values, origin="the test")


@pytest.mark.parametrize("family", FAMILIES)
def test_a_run_with_new_tokens_trains_resumes_evaluates_and_exports(
    tiny_model: TinyModel, tmp_path: Path, family: str
) -> None:
    straight = list(train(make_recipe(tmp_path / "straight", tiny_model(family), MANY)))
    attached = only(AdapterAttached, straight)[0]
    tables = 1 if family == "gemma2" else 2
    assert attached.new_tokens == 19 and attached.adapted_layers == 14
    assert attached.trainable > 19 * 64 * tables
    steps = only(StepDone, straight)
    assert steps[-1].loss < steps[0].loss
    assert not only(Warned, straight)

    broken = train(make_recipe(tmp_path / "broken", tiny_model(family), MANY))
    for event in broken:
        if isinstance(event, StepDone) and event.step == 5:
            break
    broken.close()  # type: ignore[attr-defined]
    list(resume("first", folder=str(tmp_path / "broken" / "runs")))
    saved = adapter_of(tmp_path / "straight/runs/first")
    assert_same(saved, adapter_of(tmp_path / "broken/runs/first"))
    assert len([name for name in saved if "trainable_tokens_delta" in name]) == tables

    runs = str(tmp_path / "straight" / "runs")
    tuned = load("first", folder=runs)
    assert tuned.contract.new_ids == tuple(next(iter(new_rows_of(tuned.model).values())).ids)
    best = min(event.loss for event in only(Evaluated, straight))
    measured = evaluate("first", folder=runs, answers=1, max_new_tokens=4)
    assert measured.loss == pytest.approx(best, rel=1e-3), "a run multiplies bf16 adapters in bf16"
    assert measured.base_loss > measured.loss

    list(export("first", form="merged-fp32", folder=runs))
    merged_folder = tmp_path / "straight/runs/first/export/merged-fp32"
    merged = AutoModelForCausalLM.from_pretrained(merged_folder)
    assert merged.config.vocab_size == len(merged.get_input_embeddings().weight) == 456
    rows = some_ids(tuned.model)
    assert torch.allclose(logits(merged, rows), logits(tuned.model, rows), atol=3e-5)
    tokenizer = AutoTokenizer.from_pretrained(merged_folder)
    assert tokenizer.encode(f"say {MANY[3]}", add_special_tokens=False)[-1] == tuned.contract.new_ids[3]


def trained_folder(model: PeftModel, folder: Path, tokens: tuple[str, ...], to: Path) -> Path:
    """The saved adapter of a model of `folder`."""
    tokenizer = load_contract(folder, new_tokens=tokens).tokenizer
    save_adapter(model, to, facts=facts(), tokenizer=tokenizer)
    return to


@pytest.mark.parametrize("base", ["dequantized", "original"])
@pytest.mark.parametrize("tokens", [FEW, MANY], ids=["spare", "grown"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_merged_model_has_the_trained_rows_and_loads_without_complaint(
    tiny_model: TinyModel, tmp_path: Path, family: str, tokens: tuple[str, ...], base: str
) -> None:
    folder = tiny_model(family)
    model = adapted(folder, tokens)
    adapter = trained_folder(model, folder, tokens, tmp_path / "adapter")
    merged(folder, adapter, tmp_path / "out", form="merged-fp16", base=base)
    loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info.values()), info
    size = 448 if tokens == FEW else 456
    assert loaded.config.vocab_size == size == len(loaded.get_output_embeddings().weight)
    for path, rows in new_rows_of(model).items():
        table = loaded.get_submodule(path.removeprefix("base_model.model.")).weight
        assert torch.equal(table[rows.ids.start : rows.ids.stop], rows.weight.half())
    source = tensors_of(folder)["model.embed_tokens.weight"][: rows.ids.start]
    assert torch.equal(loaded.get_input_embeddings().weight[: rows.ids.start], source.half())
    if base == "dequantized":
        ids = some_ids(model)
        assert torch.allclose(logits(loaded.float(), ids), logits(model, ids), atol=0.02)


def test_a_tied_head_that_lies_in_the_files_gets_the_rows_too(tiny_model: TinyModel, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(tiny_model("gemma2"), folder)
    tensors = load_file(folder / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    adapter = trained_folder(adapted(folder, MANY), folder, MANY, tmp_path / "adapter")
    merged(folder, adapter, tmp_path / "out")
    written = tensors_of(tmp_path / "out")
    assert torch.equal(written["lm_head.weight"], written["model.embed_tokens.weight"])


def test_chatml_on_a_base_without_it_is_trained_saved_and_exported(
    tiny_model: TinyModel, tmp_path: Path
) -> None:
    marks = ("<|im_start|>", "<|im_end|>")
    recipe = make_recipe(tmp_path / "run", tiny_model("llama"), ("<tool>",), steps=2)
    values = recipe.model_dump()
    values["data"] |= {"new_tokens": (*marks, "<tool>"), "template": "chatml"}
    events = list(train(check_recipe(values, origin="the test")))
    assert not only(Warned, events), [event.message for event in only(Warned, events)]
    runs = str(tmp_path / "run/runs")
    contract = load("first", folder=runs).contract
    list(export("first", folder=runs))
    run = tmp_path / "run/runs/first"
    ends = json.loads((run / "export/merged-fp16/generation_config.json").read_text(encoding="utf-8"))
    assert contract.new_ids[1] in contract.end_ids and set(ends["eos_token_id"]) == contract.end_ids
    turns = [{"role": "user", "content": "say 7"}, {"role": "assistant", "content": "<tool>7"}]
    for folder in (run / "adapter", run / "export/merged-fp16"):
        ids = AutoTokenizer.from_pretrained(folder).apply_chat_template(turns, return_dict=False)
        assert ids == list(
            contract.encode(Conversation(tuple(Message(**turn) for turn in turns), "here")).ids
        ), folder.name
        assert set(contract.new_ids) < set(ids)


ROWS = "base_model.model.lm_head.token_adapter.trainable_tokens_delta"


def test_rows_that_would_merge_wrong_are_refused_by_name(tiny_model: TinyModel, tmp_path: Path) -> None:
    folder = tiny_model("llama")
    adapter = trained_folder(adapted(folder, MANY), folder, MANY, tmp_path / "adapter")

    def refused(kind: type[Exception]) -> str:
        with pytest.raises(kind) as caught:
            merged(folder, tmp_path / "changed", tmp_path / "out")
        shutil.rmtree(tmp_path / "changed")
        return str(caught.value)

    def changed() -> Path:
        return shutil.copytree(adapter, tmp_path / "changed")

    change_tensors(changed(), lambda tensors: tensors.pop(ROWS))
    assert "rows of new tokens for one of" in refused(BadExport)
    change_tensors(changed(), lambda tensors: tensors.update({ROWS: torch.zeros(18, 64)}))
    assert "(18, 64) values for the rows [432" in refused(BadExport)
    change_tensors(changed(), lambda tensors: tensors.update({ROWS: torch.zeros(19, 65)}))
    assert "lm_head.weight is (448, 65) in the adapter" in refused(BadExport)
    change_tensors(
        changed(), lambda tensors: [tensors.pop(name) for name in list(tensors) if "token_adapter" in name]
    )
    assert "lacks the rows" in refused(BadExport)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (changed() if name == "tokenizer.json" else tmp_path / "changed").joinpath(name).unlink()
    assert "no tokenizer that knows them" in refused(BadRun)


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        (("<tool>", "<a>", "<tool>"), "'<tool>' is given twice"),
        (("<tool>", "<|eot_id|>"), r"'<\|eot_id\|>' is in the model's vocabulary already, as \d+"),
        (("<tool>", "a"), "'a' is in the model's vocabulary already"),
        (("<tool>", " "), "begins or ends with white space"),
    ],
)
def test_new_tokens_that_are_not_new_are_refused_by_name(
    tiny_model: TinyModel, tmp_path: Path, tokens: tuple[str, ...], message: str
) -> None:
    with pytest.raises(BadRecipe, match=message):
        list(train(make_recipe(tmp_path / "run", tiny_model("llama"), tokens)))
    assert not (tmp_path / "run/runs/first").exists()


def test_a_table_that_is_no_plain_one_is_refused(tiny_model: TinyModel) -> None:
    base = base_of(tiny_model("llama"))
    base.lm_head = torch.nn.Linear(64, 448, bias=True)
    with pytest.raises(Unsupported, match="plain embedding and a plain head"):
        attach_lora(base, Lora(4, 8), dtype=torch.float32, seed=0, new_ids=range(432, 435))
    with pytest.raises(Unsupported, match="with gaps"):
        attach_lora(base_of(tiny_model("llama")), Lora(4, 8), dtype=torch.float32, seed=0, new_ids=(432, 434))


def test_tokens_that_no_row_has_are_told_before_training(tiny_model: TinyModel, tmp_path: Path) -> None:
    recipe = make_recipe(tmp_path / "run", tiny_model("llama"), FEW, steps=1)
    values = recipe.model_dump()
    values["data"]["new_tokens"] = (*FEW, "<never>")
    events = list(train(check_recipe(values, origin="the test")))
    warned = [event.message for event in only(Warned, events)]
    assert any("these of data.new_tokens: <never>." in message for message in warned)


def test_absent_tokens_are_found_without_reading_on() -> None:
    def rows() -> Any:
        yield tokens_of([1, 9], [True, True], place="a")
        yield tokens_of([8, 2], [True, True], place="b")
        raise AssertionError("read on")

    assert absent_ids(rows(), (8, 9)) == ()
    assert absent_ids([tokens_of([1, 9], [True, True], place="a")], (8, 9, 10)) == (8, 10)
    assert absent_ids([], ()) == ()
