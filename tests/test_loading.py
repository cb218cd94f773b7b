"""Whatever can be talked to is found and loaded as it is, with its own prompts; or refused by name."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import gguf
import numpy as np
import pytest
import torch
from gguf_files import write_gguf
from killed_store import RECORD
from killed_store import source as adapter_source
from peft import PeftModel
from safetensors.torch import load_file, save_file
from test_train import changed, make_recipe
from transformers import AutoModelForCausalLM

from qadapt.adapters.store import Store
from qadapt.data.prompt import CONTRACT_FILE, exported_contract, load_contract
from qadapt.errors import BadAdapter, BadModel, BadRun, DoesNotFit, QadaptError
from qadapt.export.prompt_files import write_prompt_files
from qadapt.model.load import load_base
from qadapt.run import load, train
from qadapt.serve.chat import Chat, Manner
from qadapt.serve.partner import Partner, find_partner
from qadapt.trained.loading import Loaded, load_partner

if TYPE_CHECKING:
    from conftest import TinyModel

CPU = torch.device("cpu")
QUESTIONS = ("say 3", "say 104 please")


def answers(loaded: Any, *, uses_adapter: bool = True) -> list[str]:
    chat = Chat(loaded.model, loaded.contract, Manner(longest=8), uses_adapter=uses_adapter)
    return ["".join(chat.ask(question)) for question in QUESTIONS]


def loaded_from(path: Path) -> Loaded:
    return load_partner(find_partner(str(path)))


def trained(folder: Path, model: Path, **data: Any) -> Path:
    """A finished run whose base is as its files are."""
    recipe = changed(make_recipe(folder, model, steps=4, evaluate_every=None), "model", quantization="none")
    if data:
        recipe = changed(recipe, "data", **data)
    list(train(recipe))
    return folder / "runs/first"


def merged_by_peft(run: Path, model: Path, folder: Path, *, dtype: torch.dtype = torch.float32) -> Path:
    """The naive reference: base and adapter merged and saved by PEFT and transformers."""
    base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    merged = PeftModel.from_pretrained(base, str(run / "adapter")).merge_and_unload().to(dtype)
    merged.save_pretrained(folder)
    load_contract(model).tokenizer.save_pretrained(folder)
    shutil.copy(run / "adapter" / CONTRACT_FILE, folder)
    return folder


# --- what is found ----------------------------------------------------------------------------------------


def refused(what: str | Path, folder: str | Path = "runs") -> QadaptError:
    with pytest.raises(BadRun) as caught:
        find_partner(str(what), folder)
    return caught.value


def test_each_kind_is_known_by_its_files(tmp_path: Path) -> None:
    for file in ("runs/a/events.jsonl", "adapter/adapter_config.json", "merged/config.json", "g/x.Q8_0.gguf"):
        (tmp_path / file).parent.mkdir(parents=True)
        (tmp_path / file).touch()
    (tmp_path / "runs/a/adapter").mkdir()
    runs = tmp_path / "runs"
    assert find_partner("a", runs) == find_partner(str(runs / "a")) == Partner("run", runs / "a")
    assert find_partner(str(tmp_path / "adapter")) == Partner("adapter", tmp_path / "adapter")
    assert find_partner(str(tmp_path / "merged")) == Partner("model", tmp_path / "merged")
    file = tmp_path / "g/x.Q8_0.gguf"
    assert find_partner(str(file)) == find_partner(str(file.parent)) == Partner("gguf", file)
    assert [each for each in ("run", "adapter", "model", "gguf") if Partner(each, file).has_adapter] == [  # type: ignore[arg-type]
        "run",
        "adapter",
    ]


def test_an_unknown_name_is_refused_with_the_nearest_run(tmp_path: Path) -> None:
    (tmp_path / "order-bot").mkdir()
    (tmp_path / "order-bot/events.jsonl").touch()
    assert "Did you mean `order-bot`?" in refused("oder-bot", tmp_path).cure


def named_bot(place: Path) -> Store:
    """A store in which `bot` means the adapter of the run `bot` beside it."""
    run, store = place / "runs/bot", Store(place / "adapters")
    run.mkdir(parents=True)
    (run / "events.jsonl").touch()
    shutil.copytree(adapter_source(place, "one"), run / "adapter")
    store.add(adapter_source(place, "one"), RECORD, name="bot")
    return store


def test_a_name_for_one_adapter_is_the_run_and_for_two_is_refused(tmp_path: Path) -> None:
    store, runs = named_bot(tmp_path), tmp_path / "runs"
    run = Partner("run", runs / "bot")
    assert find_partner("bot", runs, store=store.path) == run
    second = store.add(adapter_source(tmp_path, "two"), RECORD, name="bot").version.id
    with pytest.raises(BadAdapter, match=r"bot is .*runs.bot, and in the store .* another adapter") as caught:
        find_partner("bot", runs, store=store.path)
    assert f"Give {runs / 'bot'} for the one, {second[:12]} for the other." == caught.value.cure
    assert find_partner(str(runs / "bot"), runs, store=store.path) == run
    kept = Partner("adapter", store.folder_of(second), second)
    assert find_partner(second[:12], runs, store=store.path) == kept
    store.rollback("bot")
    assert find_partner("bot", runs, store=store.path) == run
    shutil.rmtree(runs)
    store.use("bot", second)
    assert find_partner("bot", runs, store=store.path) == kept


def test_a_folder_here_and_another_adapter_of_its_name_in_the_store_are_not_mistaken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = named_bot(tmp_path)
    here = tmp_path / "here"
    (here / "bot").mkdir(parents=True)
    monkeypatch.chdir(here)
    assert find_partner("bot", store=store.path).version == store.find("bot")  # an empty folder is nothing
    shutil.copytree(adapter_source(tmp_path, "two"), here / "bot", dirs_exist_ok=True)
    with pytest.raises(BadAdapter, match=r"and in the store .* another adapter"):
        find_partner("bot", store=store.path)
    assert find_partner("./bot", store=store.path) == Partner("adapter", Path("bot"))


def test_a_damaged_store_does_not_hinder_a_run(tmp_path: Path) -> None:
    store = named_bot(tmp_path)
    (store.path / "names/other.json").write_text("{", encoding="utf-8")
    assert find_partner("bot", tmp_path / "runs", store=store.path).kind == "run"


def test_a_mistyped_name_hears_what_the_store_has(tmp_path: Path) -> None:
    store = named_bot(tmp_path)
    with pytest.raises(BadRun, match="no such name, tag or version in the store") as caught:
        find_partner("bott", tmp_path / "none", store=store.path)
    assert caught.value.cure.endswith("has bot.")


def test_a_run_without_an_adapter_says_how_it_comes_by_one(tmp_path: Path) -> None:
    (tmp_path / "half").mkdir()
    (tmp_path / "half/events.jsonl").touch()
    error = refused("half", tmp_path)
    assert "has no adapter yet" in error.problem
    assert "`qadapt resume half`" in error.cure


def test_a_folder_that_is_none_of_them_says_what_each_would_have(tmp_path: Path) -> None:
    error = refused(tmp_path)
    assert "holds no adapter and no model" in error.problem
    assert "adapter_config.json" in error.cure
    (tmp_path / "notes.txt").touch()
    assert "is no model" in refused(tmp_path / "notes.txt").problem
    for name in ("a.gguf", "b.gguf"):
        (tmp_path / name).touch()
    assert "holds 2 GGUF files: a.gguf, b.gguf" in refused(tmp_path).problem


def test_a_gguf_file_of_an_adapter_alone_is_no_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qadapt.model.source.cache_folder", lambda: tmp_path / "cache")
    writer = gguf.GGUFWriter(tmp_path / "x-LORA.gguf", "llama")
    writer.add_type("adapter")
    writer.add_tensor("blk.0.attn_q.weight.lora_a", np.zeros((4, 64), dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(BadModel, match="is an adapter alone") as error:
        loaded_from(tmp_path)
    assert "Give the run" in error.value.cure


def test_a_mistyped_name_is_refused_before_any_heavy_import() -> None:
    code = "import sys\nfrom qadapt.cli.main import run\ncode = run(['chat', 'no-such-run'])\n"
    done = subprocess.run(
        [sys.executable, "-c", f"{code}print(code, 'torch' in sys.modules)"], capture_output=True, text=True
    )
    assert done.stdout.split() == ["2", "False"]
    assert "There is no run 'no-such-run'" in done.stderr


# --- what is loaded ---------------------------------------------------------------------------------------


def test_run_adapter_and_exported_model_answer_alike(tmp_path: Path, tiny_model: TinyModel) -> None:
    model = tiny_model("llama", dtype=torch.float32)
    run = trained(tmp_path, model)
    tuned = load("first", folder=str(run.parent))
    expected = answers(tuned)
    assert expected != answers(tuned, uses_adapter=False), "a control: the adapter does something"
    of_run = loaded_from(run)
    assert answers(of_run) == expected
    assert of_run.said == f"{model} with the adapter of first, on cpu (fp32)"
    moved = Path(shutil.copytree(run / "adapter", tmp_path / "elsewhere"))
    of_folder = loaded_from(moved)
    assert answers(of_folder) == expected
    assert of_folder.said == f"{model} with the adapter in {moved}, on cpu (fp32)"
    exported = merged_by_peft(run, model, tmp_path / "merged-fp32")
    of_export = loaded_from(exported)
    assert answers(of_export) == expected
    assert of_export.said == "the exported model merged-fp32 (float32), on cpu (fp32)"
    assert of_export.contract.facts() == tuned.contract.facts()


@pytest.mark.parametrize(
    ("stored", "measured"), [("float16", "bf16"), ("bfloat16", "fp32"), ("float32", "bf16")]
)
def test_a_16_bit_model_computes_in_what_the_processor_is_good_at(
    tiny_model: TinyModel, monkeypatch: pytest.MonkeyPatch, stored: str, measured: str
) -> None:
    monkeypatch.setattr("qadapt.model.precision.known_cpu_dtype", lambda: measured)
    folder = tiny_model("llama", dtype=getattr(torch, stored))
    loaded = loaded_from(folder)
    wanted = "fp32" if stored == "float32" else measured
    assert loaded.said.endswith(f"({stored}), on cpu ({wanted})")
    assert loaded.model.dtype == {"fp32": torch.float32, "bf16": torch.bfloat16}[wanted]


@pytest.fixture(scope="module")
def four_bit(tiny_model: TinyModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model in 4 bits as transformers saves it."""
    model, folder = tiny_model("llama"), tmp_path_factory.mktemp("four") / "bnb-4bit"
    base = load_base(model, quantization="nf4", double_quant=True, dtype=torch.float32, device=CPU)
    base.save_pretrained(folder)
    load_contract(model).tokenizer.save_pretrained(folder)
    return folder


def test_a_model_stored_in_4_bits_computes_what_it_computed_when_it_was_quantized(
    four_bit: Path, tiny_model: TinyModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("qadapt.model.precision.known_cpu_dtype", lambda: "fp32")
    loaded = loaded_from(four_bit)
    base = load_base(
        tiny_model("llama"), quantization="nf4", double_quant=True, dtype=torch.float32, device=CPU
    )
    ids = torch.tensor([[5, 6, 7, 8]])
    with torch.no_grad():
        expected, found = base.eval()(ids).logits, loaded.model.eval()(ids).logits
    assert torch.equal(expected, found)
    assert "(4 bits), on cpu (fp32)" in loaded.said
    assert all(answers(loaded))


@pytest.mark.parametrize("lacking", ["up_proj.weight", "up_proj.weight.absmax", "up_proj.weight.quant_state"])
def test_a_missing_tensor_in_4_bits_is_no_random_one(four_bit: Path, tmp_path: Path, lacking: str) -> None:
    folder = Path(shutil.copytree(four_bit, tmp_path / "lacking"))
    tensors = load_file(folder / "model.safetensors")
    gone = [name for name in tensors if name.startswith(f"model.layers.1.mlp.{lacking}")]
    assert gone
    save_file(
        {n: t for n, t in tensors.items() if n not in gone}, folder / "model.safetensors", {"format": "pt"}
    )
    with pytest.raises(BadModel, match=r"lack .*: model.layers.1.mlp.up_proj"):
        loaded_from(folder)


@pytest.mark.parametrize("said", [b"{", b"[]", b"{}", b"\xff"])
def test_damaged_constants_of_4_bits_are_named(four_bit: Path, tmp_path: Path, said: bytes) -> None:
    folder = Path(shutil.copytree(four_bit, tmp_path / "damaged"))
    tensors = load_file(folder / "model.safetensors")
    name = "model.layers.1.mlp.up_proj.weight.quant_state.bitsandbytes__nf4"
    tensors[name] = torch.frombuffer(bytearray(said.ljust(len(tensors[name]))), dtype=torch.uint8)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(BadModel, match=f"damaged constants of 4-bit weights: {name}"):
        loaded_from(folder)


def test_another_quantization_is_refused_by_name(tiny_model: TinyModel, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny_model("llama"), tmp_path / "gptq"))
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config["quantization_config"] = {"quant_method": "gptq", "bits": 4}
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    with pytest.raises(BadModel, match=r"not loaded here \(gptq\)"):
        loaded_from(folder)


def test_a_gguf_file_is_converted_and_answers_as_its_model(
    tiny_model: TinyModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("qadapt.model.source.cache_folder", lambda: tmp_path / "cache")
    monkeypatch.setattr("qadapt.model.precision.known_cpu_dtype", lambda: "fp32")
    model = tiny_model("llama", dtype=torch.float16)
    path = write_gguf(model, tmp_path / "tiny.gguf")
    stages: list[str] = []
    loaded = load_partner(find_partner(str(path)), lambda stage, *_: stages.append(stage))
    assert answers(loaded) == answers(loaded_from(model))
    assert loaded.said == "tiny.gguf, its weights converted to 16 bits in the cache, on cpu (fp32)"
    assert "converting tiny.gguf" in stages


def test_no_memory_for_a_model_says_which_and_what_helps(
    tiny_model: TinyModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    def too_large(*_: Any, **__: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr("qadapt.trained.loading.load_base", too_large)
    folder = tiny_model("llama")
    with pytest.raises(DoesNotFit, match="does not fit the memory of cpu") as error:
        loaded_from(folder)
    assert str(folder) in error.value.problem
    assert "a quarter" in error.value.cure


# --- how an exported model is asked -----------------------------------------------------------------------


def exported(adapter: Path, base: Path, folder: Path) -> Path:
    """What stands beside an export's weights: the base's tokenizer, or the adapter's, and the contract."""
    for source in (base, adapter):
        for name in (
            "tokenizer.json",
            "tokenizer_config.json",
            "chat_template.jinja",
            "generation_config.json",
        ):
            if (source / name).is_file():
                folder.mkdir(exist_ok=True)
                shutil.copy(source / name, folder / name)
    shutil.copy(base / "config.json", folder)
    write_prompt_files(adapter, folder)
    shutil.copy(adapter / CONTRACT_FILE, folder)
    return folder


@pytest.mark.parametrize(
    "data",
    [
        {},
        {"new_tokens": ["<note>", "<loaf>"]},
        {"template": "chatml", "new_tokens": ["<|im_start|>", "<|im_end|>"]},
    ],
)
def test_an_exported_models_contract_is_its_runs(
    tmp_path: Path, tiny_model: TinyModel, data: dict[str, Any]
) -> None:
    model = tiny_model("llama", dtype=torch.float32)
    run = trained(tmp_path, model, **data)
    tuned = load("first", folder=str(run.parent))
    found = exported_contract(exported(run / "adapter", model, tmp_path / "export"))
    assert found.facts() == tuned.contract.facts()
    turns = [{"role": "user", "content": "two <loaf>, <note> please"}]
    assert found.prompt_ids(turns) == tuned.contract.prompt_ids(turns)
    assert (found.end_ids, found.new_ids) == (tuned.contract.end_ids, tuned.contract.new_ids)


def test_a_folder_without_a_contract_speaks_for_itself(tiny_model: TinyModel) -> None:
    folder = tiny_model("qwen2")
    assert exported_contract(folder).facts() == load_contract(folder).facts()


def test_a_tokenizer_that_is_not_the_runs_is_refused(tmp_path: Path, tiny_model: TinyModel) -> None:
    folder = Path(shutil.copytree(tiny_model("llama"), tmp_path / "export"))
    facts = load_contract(folder).facts()
    (folder / CONTRACT_FILE).write_text(json.dumps(facts | {"end_ids": [1]}), encoding="utf-8")
    with pytest.raises(BadRun, match=r"is not what the adapter was trained on: end_ids changed"):
        exported_contract(folder)
    facts = load_contract(tiny_model("llama", vocabulary=512)).facts()
    (folder / CONTRACT_FILE).write_text(json.dumps(facts | {"new_tokens": ["<note>"]}), encoding="utf-8")
    with pytest.raises(BadRun, match=r"new_tokens, tokenizer changed"):
        exported_contract(folder)
    (folder / CONTRACT_FILE).write_text("{", encoding="utf-8")
    with pytest.raises(BadRun, match="does not tell how"):
        exported_contract(folder)
