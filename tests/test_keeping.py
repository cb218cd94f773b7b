"""`qadapt adapters`: what goes into the store is checked against its base, and comes out as it was."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from hub_server import COMMIT, Hub, Repository, running_hub
from peft import IA3Config, LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from qadapt.adapters.bottleneck import bottleneck_shapes
from qadapt.adapters.facts import AdapterFacts, read_facts, write_facts
from qadapt.adapters.side_car_files import write_side_car
from qadapt.adapters.store import Store
from qadapt.cli.main import run
from qadapt.data.prompt import CONTRACT_FILE, load_contract
from qadapt.errors import BadAdapter, BadModel, BadRun, QadaptError
from qadapt.model.hub_files import fetch_files
from qadapt.model.source import find_model
from qadapt.trained.adapter import find_trained
from qadapt.trained.adoption import Said
from qadapt.trained.keeping import add
from qadapt.trained.loading import load_tuned

if TYPE_CHECKING:
    from conftest import TinyModel

Tensors = dict[str, torch.Tensor]
LAYER = "base_model.model.model.layers.0.self_attn.q_proj"


def facts_of(model: Path, **changed: object) -> AdapterFacts:
    values: dict[str, Any] = {
        "base": str(model), "revision": None, "fingerprint": find_model(str(model)).fingerprint,
        "quantization": "nf4", "double_quant": True, "load_dtype": "fp32", "prompt_fingerprint": "e" * 64,
    }  # fmt: skip
    return AdapterFacts(**{**values, **changed})


def write_adapter(folder: Path, model: Path, **options: Any) -> Path:
    """A LoRA of PEFT's on a tiny model, with a second factor that is not zero."""
    base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    config = LoraConfig(r=4, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM", **options)
    adapted = get_peft_model(base, config)
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.02)
    adapted.save_pretrained(str(folder))
    write_facts(facts_of(model), folder)
    return folder


@pytest.fixture(scope="module")
def good(tiny_model: TinyModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_adapter(tmp_path_factory.mktemp("adapters") / "good", tiny_model("llama"))


@pytest.fixture
def folder(good: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(good, tmp_path / "mine"))


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "adapters")


def change_tensors(folder: Path, change: Callable[[Tensors], object]) -> None:
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, {"format": "pt"})


def change_config(folder: Path, **values: object) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def refused(store: Store, folder: Path, problem: str, kind: type[QadaptError] = BadAdapter) -> None:
    with pytest.raises(kind, match=problem) as caught:
        add(str(folder), store)
    assert caught.value.cure
    assert not store.path.exists()


def test_an_adapter_comes_out_as_it_went_in(store: Store, folder: Path) -> None:
    added = add(str(folder), store)
    assert (added.name, added.is_new, added.version.record.method) == ("mine", True, "lora")
    kept = find_trained("mine", store=str(store.path)).adapter
    for name in ("adapter_model.safetensors", "adapter_config.json", "qadapt.json"):
        assert (kept / name).read_bytes() == (folder / name).read_bytes()


@pytest.mark.parametrize(
    ("options", "method"),
    [
        ({"use_rslora": True, "lora_alpha": 16}, "rslora"),
        ({"use_dora": True}, "dora"),
        ({"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"q_proj": 1.0}}, "lora"),
        ({"modules_to_save": ["lm_head"]}, "lora"),
        ({"bias": "lora_only"}, "lora"),
        ({"trainable_token_indices": {"embed_tokens": [5, 6], "lm_head": [5, 6]}}, "lora"),
    ],
)
def test_what_peft_can_save_is_kept_and_answers_as_peft_s_own(
    store: Store, tmp_path: Path, tiny_model: TinyModel, options: dict[str, Any], method: str
) -> None:
    model = tiny_model("qwen2")
    folder = write_adapter(tmp_path / "odd", model, **options)
    write_facts(facts_of(model, quantization="none", double_quant=False), folder)
    shutil.copyfile(contract_of(model, tmp_path), folder / CONTRACT_FILE)
    version = add(str(folder), store).version
    assert version.record.method == method
    theirs = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    theirs = PeftModel.from_pretrained(theirs, str(folder))
    ours = load_tuned(store.folder_of(version.id), device=torch.device("cpu"))
    ids = torch.arange(3, 40)[None]
    with torch.no_grad():
        assert torch.allclose(ours.model(input_ids=ids).logits, theirs(input_ids=ids).logits, atol=1e-5)


def contract_of(model: Path, place: Path) -> Path:
    path = place / "contract.json"
    path.write_text(json.dumps(load_contract(model).facts()), encoding="utf-8")
    return path


def test_ia3_fits(store: Store, tmp_path: Path, tiny_model: TinyModel) -> None:
    model = tiny_model("llama")
    base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    config = IA3Config(
        target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"], task_type="CAUSAL_LM"
    )
    get_peft_model(base, config).save_pretrained(str(tmp_path / "ia3"))
    write_facts(facts_of(model), tmp_path / "ia3")
    assert add(str(tmp_path / "ia3"), store).version.record.method == "ia3"


CHANGES: dict[str, tuple[Callable[[Tensors], object], str]] = {
    "another width": (
        lambda t: t.update({f"{LAYER}.lora_A.weight": torch.zeros(4, 7)}),
        r"q_proj\.lora_A\.weight has the shape \(4, 7\), its place \(4, ",
    ),
    "a missing one": (lambda t: t.pop(f"{LAYER}.lora_B.weight"), r"q_proj\.lora_B\.weight is missing"),
    "one more": (
        lambda t: t.update({"base_model.model.model.layers.99.mlp.x": torch.zeros(1)}),
        r"layers\.99\.mlp\.x has no place there",
    ),
    "a NaN": (
        lambda t: t[f"{LAYER}.lora_A.weight"].view(-1)[3:4].fill_(float("nan")),
        "a NaN or infinite number in .*q_proj",
    ),
    "an infinity": (
        lambda t: t[f"{LAYER}.lora_A.weight"].view(-1)[3:4].fill_(-float("inf")),
        "a NaN or infinite number in .*q_proj",
    ),
    "a huge number": (
        lambda t: t[f"{LAYER}.lora_A.weight"].view(-1)[3:4].fill_(2e4),
        r"would drown its base: .*lora_A\.weight has 2e\+04, more than 10000",
    ),
    "a huge update": (
        lambda t: [t[f"{LAYER}.lora_{side}.weight"].mul_(200) for side in "AB"],
        r"would drown its base: its update of .*q_proj has a root mean square of \S+, more than 1\.",
    ),
}


@pytest.mark.parametrize("change", CHANGES)
def test_tensors_that_do_not_fit_are_refused_by_name(store: Store, folder: Path, change: str) -> None:
    apply, problem = CHANGES[change]
    change_tensors(folder, apply)
    refused(store, folder, problem)


@pytest.mark.parametrize(
    "dtype", [torch.float8_e4m3fn, torch.int8, torch.bool, torch.complex64, torch.uint16]
)
def test_numbers_of_a_type_that_no_adapter_has_are_refused(
    store: Store, folder: Path, dtype: torch.dtype
) -> None:
    name = f"{LAYER}.lora_A.weight"
    change_tensors(folder, lambda t: t.update({name: t[name].to(dtype)}))
    refused(store, folder, "which is no type that adapters are trained in")


def test_a_huge_update_of_a_table_is_refused(store: Store, tmp_path: Path, tiny_model: TinyModel) -> None:
    model = tiny_model("llama")
    base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    config = LoraConfig(r=4, target_modules=["embed_tokens"], task_type="CAUSAL_LM")
    get_peft_model(base, config).save_pretrained(str(tmp_path / "table"), save_embedding_layers=False)
    write_facts(facts_of(model), tmp_path / "table")
    change_tensors(tmp_path / "table", lambda t: [each.normal_(std=0.02) for each in t.values()])
    assert add(str(tmp_path / "table"), store, name="good").is_new
    change_tensors(tmp_path / "table", lambda t: [each.mul_(200) for each in t.values()])
    with pytest.raises(
        BadAdapter, match=r"would drown its base: its update of .*embed_tokens has a root mean"
    ):
        add(str(tmp_path / "table"), store, name="bad")


@pytest.mark.parametrize(
    "values", [{"base": 4}, {"revision": 3}, {"double_quant": "yes"}, {"prompt_fingerprint": None}]
)
def test_what_is_said_of_a_base_must_say_something(
    store: Store, folder: Path, values: dict[str, Any]
) -> None:
    path = folder / "qadapt.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))
    refused(store, folder, "holds no adapter that qadapt trained", BadRun)


def test_an_absurd_alpha_is_refused(store: Store, folder: Path) -> None:
    change_config(folder, lora_alpha=1e9)
    refused(store, folder, "would drown its base: its update of")


@pytest.mark.parametrize(
    ("values", "problem"),
    [
        ({"target_modules": ["no_such"]}, "does not fit its base: Target modules"),
        ({"r": 8}, "has the shape"),
        ({"target_modules": "("}, r"does not fit its base: missing \)"),
        ({"peft_type": "NO_SUCH"}, "is of the method NO_SUCH, which is not loaded here"),
        ({"peft_type": "XLORA", "adapters": {"0": "owner/other"}}, "is of the method XLORA"),
        ({"peft_type": ["LORA"]}, "nothing there says of which method"),
        ({"peft_type": None}, "nothing there says of which method"),
        ({"alora_invocation_tokens": [1, 2]}, r"has alora_invocation_tokens = \[1, 2\], which is not loaded"),
        ({"megatron_config": {"x": 1}, "megatron_core": "antigravity"}, "has megatron_config"),
        (
            {"trainable_token_indices": {"embed_tokens": 5}},
            "has rows of the tokens .*: only those of new tokens",
        ),
        ({"trainable_token_indices": [1, 5]}, "has rows of the tokens .*: only those of new tokens"),
        ({"trainable_token_indices": "ab"}, "has rows of the tokens .*: only those of new tokens"),
        ({"r": 0}, "does not fit its base"),
    ],
)
def test_a_configuration_that_does_not_fit_is_refused(
    store: Store, folder: Path, values: dict[str, Any], problem: str
) -> None:
    change_config(folder, **values)
    refused(store, folder, problem)


def side_car(folder: Path, model: Path, **changed: object) -> Path:
    config = json.loads((model / "config.json").read_text(encoding="utf-8"))
    settings: dict[str, Any] = {
        "kind": "pfeiffer", "width": 2, "activation": "relu", "scale": 1.0, "norm": False, "dropout": 0.0,
        "layers": config["num_hidden_layers"], "model_width": config["hidden_size"],
        "model_type": config["model_type"], **changed,
    }  # fmt: skip
    shapes = bottleneck_shapes(settings, folder)
    folder.mkdir()
    write_side_car(
        folder, settings=settings, tensors={name: torch.ones(shape) for name, shape in shapes.items()}
    )
    write_facts(facts_of(model), folder)
    return folder


def test_a_side_car_is_kept_under_its_method(store: Store, tmp_path: Path, tiny_model: TinyModel) -> None:
    folder = side_car(tmp_path / "mine", tiny_model("llama"))
    version = add(str(folder), store).version
    assert version.record.method == "pfeiffer"
    assert find_trained("mine", store=str(store.path)).adapter == store.folder_of(version.id)
    assert find_trained(str(folder), store=str(store.path)).adapter == folder


@pytest.mark.parametrize(
    ("changed", "problem"),
    [
        ({"model_width": 24}, "for a base whose model_width is 24"),
        ({"model_type": "gemma2"}, "for a base whose model_type is gemma2"),
        ({"scale": 1e6}, r"would drown its base: its scale is 1e\+06"),
    ],
)
def test_a_side_car_that_does_not_fit_is_refused(
    store: Store, tmp_path: Path, tiny_model: TinyModel, changed: dict[str, Any], problem: str
) -> None:
    refused(store, side_car(tmp_path / "mine", tiny_model("llama"), **changed), problem)


@pytest.mark.parametrize(
    ("number", "problem"), [(float("nan"), "that is none"), (1e5, r"would drown its base: layers\.0\.")]
)
def test_a_side_car_with_absurd_numbers_is_refused(
    store: Store, tmp_path: Path, tiny_model: TinyModel, number: float, problem: str
) -> None:
    folder = side_car(tmp_path / "mine", tiny_model("llama"))
    path = folder / "side_car.safetensors"
    tensors = load_file(path)
    next(iter(tensors.values())).view(-1)[0] = number
    save_file(tensors, path)
    refused(store, folder, problem)


def plain(folder: Path) -> Path:
    (folder / "qadapt.json").unlink()
    return folder


def test_an_adapter_of_others_is_kept_with_what_is_said_of_it(
    store: Store, folder: Path, tiny_model: TinyModel
) -> None:
    change_config(plain(folder), base_model_name_or_path="gone")
    weights = (folder / "adapter_model.safetensors").read_bytes()
    said = Said(held="nf4", base=str(tiny_model("llama")))
    kept = store.folder_of(add(str(folder), store, said=said).version.id)
    facts = read_facts(kept)
    assert (facts.quantization, facts.base) == ("nf4", str(tiny_model("llama")))
    assert (kept / "adapter_model.safetensors").read_bytes() == weights
    assert not (folder / "qadapt.json").exists()
    tuned = load_tuned(kept, device=torch.device("cpu"))
    with torch.no_grad():
        assert tuned.model(input_ids=torch.arange(3, 9)[None]).logits.isfinite().all()
    assert add(str(folder), store, said=said).is_new is False


def test_a_base_that_lies_elsewhere_is_named_and_must_be_the_same(
    store: Store, folder: Path, tmp_path: Path, tiny_model: TinyModel
) -> None:
    moved = Path(shutil.copytree(tiny_model("llama"), tmp_path / "moved"))
    write_facts(facts_of(moved, base="/gone/model"), folder)
    with pytest.raises(BadModel):
        add(str(folder), store)
    kept = store.folder_of(add(str(folder), store, said=Said(base=str(moved))).version.id)
    assert read_facts(kept) == facts_of(moved)
    other = str(tiny_model("llama", layers=3))
    with pytest.raises(BadAdapter, match=r"is not the base of the adapter in .*: that is /gone/model"):
        add(str(folder), store, said=Said(base=other))


@pytest.mark.parametrize(
    ("folder_name", "name"), [("My Adapter", "my-adapter"), ("_v2_", "v2"), ("Größe 3", "gr-e-3")]
)
def test_a_folder_gives_the_name_that_it_can(
    store: Store, good: Path, tmp_path: Path, folder_name: str, name: str
) -> None:
    shutil.copytree(good, tmp_path / folder_name)
    assert add(str(tmp_path / folder_name), store).name == name


@pytest.mark.parametrize("folder_name", ["模型", "cafe", "a" * 65])
def test_a_folder_whose_name_the_store_cannot_have_needs_another(
    store: Store, good: Path, tmp_path: Path, folder_name: str
) -> None:
    shutil.copytree(good, tmp_path / folder_name)
    with pytest.raises(BadAdapter, match=f"'{folder_name}' makes no name for the store") as caught:
        add(str(tmp_path / folder_name), store)
    assert "--as" in caught.value.cure
    assert add(str(tmp_path / folder_name), store, name="mine").name == "mine"


def test_a_name_is_refused_before_anything_is_looked_at(store: Store) -> None:
    with pytest.raises(BadAdapter, match="'My name' cannot be a name"):
        add("nothing", store, name="My name")


@pytest.mark.parametrize(
    ("said", "config", "problem"),
    [
        (Said(), {}, "nothing there says how its base was held"),
        (Said(held="none"), {"base_model_name_or_path": None}, "names no base"),
        (
            Said(held="none"),
            {"peft_type": "LOHA"},
            r"is of the method LOHA; of PEFT.s, LORA, ADALORA, IA3\b.* are loaded here",
        ),
        (Said(held="none"), {"init_lora_weights": "pissa"}, "'pissa', which rewrites the base it starts on"),
    ],
)
def test_an_adapter_of_others_that_cannot_be_loaded_is_refused(
    store: Store, folder: Path, said: Said, config: dict[str, Any], problem: str
) -> None:
    change_config(plain(folder), **config)
    with pytest.raises(BadAdapter, match=problem):
        add(str(folder), store, said=said)


def test_what_an_adapter_says_itself_is_not_said_again(store: Store, folder: Path) -> None:
    with pytest.raises(BadAdapter, match="says itself which base"):
        add(str(folder), store, said=Said(held="nf4"))


def test_another_way_to_hold_a_base_is_refused(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["adapters", "add", str(folder), "--held", "fp8", "--store", str(tmp_path / "kept")]) == 2
    assert "--held is 'fp8'." in capsys.readouterr().err


@pytest.mark.parametrize("file", ["adapter_config.json", "qadapt.json", "side_car.json"])
def test_a_file_nested_too_deep_to_be_read_is_refused(store: Store, folder: Path, file: str) -> None:
    (folder / file).write_text("[" * 100_000)
    with pytest.raises(QadaptError) as caught:
        add(str(folder), store)
    assert file.partition(".")[0] in caught.value.problem or "holds no adapter" in caught.value.problem


def test_a_damaged_file_is_refused(store: Store, folder: Path) -> None:
    path = folder / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-9])
    refused(store, folder, r"adapter_model\.safetensors cannot be read")


def test_a_folder_without_configuration_or_facts_is_refused(store: Store, folder: Path) -> None:
    (folder / "adapter_config.json").unlink()
    refused(store, folder, r"adapter_config\.json in .* describes no adapter")
    (folder / "qadapt.json").unlink()
    refused(store, folder, "holds no adapter that qadapt trained", BadRun)


def test_another_base_is_refused(store: Store, folder: Path, tiny_model: TinyModel) -> None:
    write_facts(facts_of(tiny_model("llama"), fingerprint="0" * 64), folder)
    refused(store, folder, "is not the model this adapter was trained on", BadRun)
    write_facts(facts_of(tiny_model("llama", layers=3)), folder)
    refused(store, folder, "does not fit its base")


def test_a_hub_adapter_is_pinned_by_its_commit_and_its_pickles_stay_there(
    store: Store, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = {path.name: path.read_bytes() for path in folder.iterdir()} | {"training_args.bin": b"\x80\x04."}
    with running_hub() as hub:
        serve(hub, files, monkeypatch)
        added = add("owner/mine", store)
        assert added.version.record.source == f"hub owner/mine@{COMMIT}"
        assert not hub.downloads(".bin")
        assert (added.name, len(added.version.files)) == ("mine", 3)
        again = add("hub:owner/mine", store, said=Said(revision="main"))
        assert (again.version.id, again.is_new) == (added.version.id, False)


@pytest.mark.parametrize(
    ("file", "problem", "kind"),
    [
        ("adapter_model.bin", "are a pickle", BadAdapter),
        ("../evil.safetensors", "holds no adapter", BadAdapter),
    ],
)
def test_a_hub_repository_that_is_no_adapter_is_refused_before_anything_is_fetched(
    store: Store, monkeypatch: pytest.MonkeyPatch, file: str, problem: str, kind: type[QadaptError]
) -> None:
    with running_hub() as hub:
        serve(hub, {file: b"x", "adapter_config.json": b"{}"}, monkeypatch)
        with pytest.raises(kind, match=problem):
            add("owner/mine", store)
        assert not hub.downloads(".json")


@pytest.mark.parametrize("file", ["../evil.json", "/evil.json", "a/../../evil.json", "..\\evil.json"])
def test_a_hub_file_that_would_lie_outside_is_never_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, file: str
) -> None:
    (tmp_path / "place").mkdir()
    with running_hub() as hub:
        serve(hub, {file: b"x"}, monkeypatch)
        with pytest.raises(BadModel, match="which lies outside its folder"):
            fetch_files("owner/mine", tmp_path / "place", choose=list)
    assert [path.name for path in tmp_path.rglob("*")] == ["place"]


def serve(hub: Hub, files: dict[str, bytes], monkeypatch: pytest.MonkeyPatch) -> None:
    hub.repositories["owner/mine"] = Repository(files)
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", hub.endpoint)
    monkeypatch.setattr(
        "huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE",
        hub.endpoint + "/{repo_id}/resolve/{revision}/{filename}",
    )


def test_a_folder_has_no_revisions(store: Store, folder: Path) -> None:
    with pytest.raises(BadAdapter, match=r"has no revisions \('v1'\)"):
        add(str(folder), store, said=Said(revision="v1"))


def test_what_is_nothing_says_what_there_is(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(BadRun, match="There is no run 'nothing'"):
        add("nothing", store, folder=str(tmp_path))
    with pytest.raises(BadRun, match=f"There is no run '{tmp_path}/gone'"):
        add(f"{tmp_path}/gone", store)
    (tmp_path / "runs").mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(BadRun, match="There is no run 'runs/gone'"):  # and no hub is asked
        add("runs/gone", store)
    with pytest.raises(BadAdapter, match="hub:gone names no repository") as caught:
        add("hub:gone", store)
    assert caught.value.cure == "Write it as hub:owner/name."
    with pytest.raises(BadRun, match="no run 'nothing', no such folder, and no such name, tag or version"):
        find_trained("nothing", folder=str(tmp_path), store=str(store.path))


def test_the_commands_follow_each_other(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    where = ["--store", str(tmp_path / "kept")]

    def said(*words: str) -> str:
        assert run(["adapters", *words, *where]) == 0, capsys.readouterr().err
        return capsys.readouterr().out

    def values(*words: str) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(said(*words, "--json"))
        return found

    first = values("add", str(folder), "--as", "summaries")["id"]
    change_tensors(folder, lambda t: t[f"{LAYER}.lora_A.weight"].mul_(1.5))
    assert "The store keeps" in said("add", str(folder), "--as", "summaries")
    second = values("list")["names"]["summaries"]["id"]
    found = values("diff", first[:8], "summaries")
    assert (found["changed_tensors"], found["furthest"]) == (1, f"{LAYER}.lora_A.weight")
    assert "1 of" in said("diff", first[:8], "summaries")
    assert f"best stands for {first[:12]}" in said("tag", first[:8], "best")
    assert values("show", "best")["id"] == first
    assert "each as it was added" in said("show", "summaries")
    assert f"means {first[:12]} again, no more {second[:12]}" in said("rollback", "summaries")
    assert "(former)" in said("list")
    assert said("use", "next", second[:6]).startswith(f"next means {second[:12]}")
    assert said("remove", "next") == "Removed the name next.\n"
    assert said("remove", "summaries") == "Removed the name summaries.\n"
    assert values("gc", "--dry-run")["versions"] == [second]
    assert said("gc").startswith("Removed 1 version, ")
    assert run(["adapters", "list", "--store", str(tmp_path / "none")]) == 0
    assert "holds nothing" in capsys.readouterr().out
    assert run(["adapters", "show", "summaries", *where]) == 2
    assert "There is no name, tag or version 'summaries'" in capsys.readouterr().err
    assert "Traceback" not in capsys.readouterr().err
