"""Every kind of adapter on every architecture, merged as PEFT merges it; what cannot be merged says so."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from gguf_files import write_gguf
from merged_families import FAMILIES, TIED, make_family
from peft import (
    AdaLoraConfig,
    IA3Config,
    LoraConfig,
    OFTConfig,
    PeftConfig,
    PeftModel,
    VeraConfig,
    get_peft_model,
)
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import check_target_module_exists
from safetensors.torch import load_file, save_file
from test_merge import (
    CPU,
    UGLY,
    assert_one_rounding,
    change_config,
    change_tensors,
    facts,
    logits,
    merged,
    tensors_of,
)
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from qadapt.adapters.facts import write_facts
from qadapt.errors import BadExport, BadRecipe, BadRun, QadaptError, Unsupported
from qadapt.events import Warned
from qadapt.export.adapter import Adapter
from qadapt.export.adapter_names import is_promised
from qadapt.export.merged_model import MERGED_FAMILIES, open_merged
from qadapt.model.load import load_base
from qadapt.model.source import find_model

pytestmark = [
    # PEFT on a model whose tied head gets an adapter of its own, which is what is tested here
    pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`"),
]
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


def attention(family: str) -> list[str]:
    return ["qkv_proj", "o_proj"] if family == "phi3" else ["q_proj", "v_proj", "o_proj"]


def lora(family: str, *more: str, **options: Any) -> LoraConfig:
    return LoraConfig(**{"r": 4, "lora_alpha": 6, "target_modules": [*attention(family), *more]} | options)


def ia3(family: str, *more: str) -> IA3Config:
    targets = ["qkv_proj"] if family == "phi3" else ["k_proj", "v_proj"]
    return IA3Config(target_modules=[*targets, "down_proj", *more], feedforward_modules=["down_proj"])


KINDS: dict[str, Callable[[str], PeftConfig]] = {
    "rsLoRA with patterns": lambda family: lora(
        family, "down_proj", use_rslora=True, rank_pattern={"o_proj": 7}, alpha_pattern={"down_proj": 33}
    ),
    "DoRA": lambda family: lora(family, "down_proj", use_dora=True),
    "LoRA on both tables": lambda family: lora(family, "embed_tokens", "lm_head"),
    "DoRA on both tables": lambda family: lora(family, "embed_tokens", "lm_head", use_dora=True),
    "IA3": lambda family: ia3(family, "lm_head"),
    "AdaLoRA": lambda family: AdaLoraConfig(
        init_r=5, target_r=3, lora_alpha=600, total_step=9, target_modules=[*attention(family), "down_proj"]
    ),
    "OFT": lambda family: OFTConfig(oft_block_size=8, target_modules=[*attention(family), "down_proj"]),
    "VeRA": lambda family: VeraConfig(
        r=5, target_modules=[*attention(family), "down_proj"], projection_prng_key=3
    ),
    "whole head and norms": lambda family: lora(family, modules_to_save=["lm_head", "norm"]),
    "whole embedding": lambda family: lora(family, modules_to_save=["embed_tokens"]),
    "trained biases": lambda family: lora(family, bias="all"),
}
TABLES = ("LoRA on both tables", "DoRA on both tables", "IA3", "whole head and norms", "whole embedding")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    root = tmp_path_factory.mktemp("families")

    def folder(family: str) -> Path:
        if not (root / family).exists():
            make_family(root / family, family)
        return root / family

    return folder


def load(folder: Path) -> PreTrainedModel:
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return model


def untied(folder: Path) -> PreTrainedModel:
    """The model with two tables, equal ones where it has one, as PEFT asks for before it merges."""
    if json.loads((folder / "config.json").read_text(encoding="utf-8"))["tie_word_embeddings"] is False:
        return load(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, tie_word_embeddings=False)
    model.lm_head.weight.data = model.get_input_embeddings().weight.data.clone()
    return model


def train(adapted: PeftModel, *, seed: int = 1) -> PeftModel:
    """Every trainable number is another one, in place, as after training."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if not parameter.requires_grad:
                continue
            noise = torch.randn(parameter.shape, generator=generator) * 0.1
            if "magnitude" in name or "ia3_l" in name:
                parameter.mul_(1 + noise)
            elif "modules_to_save" in name or name.endswith("bias"):
                parameter.add_(noise)
            else:
                parameter.copy_(noise)
    return adapted.eval()


def adapt(model: PreTrainedModel, config: PeftConfig, folder: Path, *, seed: int = 1) -> PeftModel:
    """A trained adapter, saved as PEFT saves it."""
    adapted = train(get_peft_model(model, config), seed=seed)
    has_table = any("embed_tokens" in name for name in config.target_modules or ())
    adapted.save_pretrained(str(folder), save_embedding_layers=has_table)
    write_facts(facts(), folder)
    return adapted


def reference(model_folder: Path, adapter: Path) -> dict[str, torch.Tensor]:
    """PEFT's own merge."""
    loaded = PeftModel.from_pretrained(untied(model_folder), str(adapter))
    return dict(loaded.merge_and_unload().state_dict())


def config_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "config.json").read_text(encoding="utf-8"))


def test_every_architecture_that_is_merged_is_tested():
    assert {"llama" if family == "smollm2" else family for family in FAMILIES} == set(MERGED_FAMILIES)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", KINDS)
def test_merge_is_the_reference_rounded_once(tiny, tmp_path, kind, family):
    adapted = adapt(load(tiny(family)), KINDS[kind](family), tmp_path / "adapter")
    live = logits(adapted)
    exact = reference(tiny(family), tmp_path / "adapter")
    merged(tiny(family), tmp_path / "adapter", tmp_path / "out", base="original", writing=UGLY)
    written, source = tensors_of(tmp_path / "out"), tensors_of(tiny(family))
    is_untied = family in TIED and kind in TABLES
    assert list(written) == [*source, *([HEAD] if is_untied else [])]
    assert config_of(tmp_path / "out")["tie_word_embeddings"] == (family in TIED and not is_untied)
    for name, value in written.items():
        assert value.dtype is torch.float16
        assert_one_rounding(value, exact[name], name)
    assert torch.allclose(logits(load(tmp_path / "out")), live, atol=0.03)


@pytest.mark.parametrize("family", ["llama", "phi3", "gemma2"])
@pytest.mark.parametrize("kind", ["DoRA", "DoRA on both tables", "IA3", "whole head and norms"])
def test_merge_on_the_dequantized_base_is_the_live_model(tiny, tmp_path, kind, family):
    base = load_base(tiny(family), quantization="nf4", double_quant=True, dtype=torch.float32, device=CPU)
    live = logits(adapt(base, KINDS[kind](family), tmp_path / "adapter"))
    merged(tiny(family), tmp_path / "adapter", tmp_path / "out", form="merged-fp32", writing=UGLY)
    assert torch.allclose(logits(load(tmp_path / "out")), live, atol=5e-5)


@pytest.mark.parametrize("family", TIED)
@pytest.mark.parametrize("table", ["embed_tokens", "lm_head"])
@pytest.mark.parametrize("is_in_file", [False, True])
def test_tied_head_is_untied_when_one_table_alone_is_adapted(tiny, tmp_path, family, table, is_in_file):
    folder = with_head(tiny(family), tmp_path / "model") if is_in_file else tiny(family)
    live = logits(adapt(load(folder), lora(family, table), tmp_path / "adapter"))
    options = {"form": "merged-fp32", "base": "original", "writing": UGLY}
    events = merged(folder, tmp_path / "adapter", tmp_path / "out", **options)
    assert ["two of it" in event.message for event in events if isinstance(event, Warned)] == [True]
    written, start = tensors_of(tmp_path / "out"), tensors_of(folder)[EMBEDDING].float()
    kept, changed = (HEAD, EMBEDDING) if table == "embed_tokens" else (EMBEDDING, HEAD)
    assert torch.equal(written[kept], start) and not torch.allclose(written[changed], start)
    assert config_of(tmp_path / "out")["tie_word_embeddings"] is False
    assert torch.allclose(logits(load(tmp_path / "out")), live, atol=2e-5)


@pytest.mark.parametrize("family", [family for family in FAMILIES if family != "smollm2"])
def test_tie_that_config_does_not_mention_is_that_of_the_architecture(tiny, tmp_path, family):
    adapt(load(tiny(family)), lora(family, "lm_head"), tmp_path / "adapter")
    shutil.copytree(tiny(family), tmp_path / "model")
    values = config_of(tiny(family))
    del values["tie_word_embeddings"]
    (tmp_path / "model" / "config.json").write_text(json.dumps(values), encoding="utf-8")
    is_tied = AutoConfig.from_pretrained(tmp_path / "model").tie_word_embeddings
    with open_merged(tmp_path / "model", tmp_path / "adapter", base="original") as model:
        assert model.changed_config == ({"tie_word_embeddings": False} if is_tied else {})


def with_head(folder: Path, target: Path) -> Path:
    """The same tied model with its head in the files, too, as some are published."""
    shutil.copytree(folder, target)
    tensors = load_file(target / "model.safetensors")
    save_file({**tensors, HEAD: tensors[EMBEDDING].clone()}, target / "model.safetensors", {"format": "pt"})
    return target


@pytest.mark.parametrize("is_in_file", [False, True])
@pytest.mark.parametrize(
    "options", [{"target_modules": ["embed_tokens"]}, {"modules_to_save": ["embed_tokens"]}]
)
def test_tied_head_stays_tied_when_both_tables_are_adapted_alike(tiny, tmp_path, options, is_in_file):
    folder = with_head(tiny("smollm2"), tmp_path / "model") if is_in_file else tiny("smollm2")
    config = lora("smollm2", ensure_weight_tying=True, **options)
    live = logits(adapt(load(folder), config, tmp_path / "adapter"))
    merged(folder, tmp_path / "adapter", tmp_path / "out", form="merged-fp32", base="original", writing=UGLY)
    written = tensors_of(tmp_path / "out")
    assert (HEAD in written) == is_in_file and config_of(tmp_path / "out")["tie_word_embeddings"] is True
    if is_in_file:
        assert torch.equal(written[HEAD], written[EMBEDDING])
    assert torch.allclose(logits(load(tmp_path / "out")), live, atol=2e-5)


@pytest.mark.parametrize("family", ["llama", "smollm2"])
@pytest.mark.parametrize("table", [(), ("embed_tokens",)])
def test_resized_tables_come_with_their_rows(tiny, tmp_path, family, table):
    model = load(tiny(family))
    model.resize_token_embeddings(456, mean_resizing=False)
    adapted = train(get_peft_model(model, lora(family, *table)))
    adapted.save_pretrained(str(tmp_path / "adapter"), save_embedding_layers=True)
    live = logits(adapted)
    options = {"form": "merged-fp32", "base": "original", "writing": UGLY}
    if family == "llama" and table:  # PEFT saves the table that is adapted, and not the other one
        with pytest.raises(BadExport, match="rows of new tokens for one of"):
            merged(tiny(family), tmp_path / "adapter", tmp_path / "out", **options)
        return
    with pytest.raises(BadRun, match="no tokenizer that knows them"):
        merged(tiny(family), tmp_path / "adapter", tmp_path / "out", **options)
    AutoTokenizer.from_pretrained(tiny(family)).save_pretrained(tmp_path / "adapter")
    merged(tiny(family), tmp_path / "adapter", tmp_path / "out", **options)
    assert config_of(tmp_path / "out")["vocab_size"] == 456
    assert torch.allclose(logits(load(tmp_path / "out")), live, atol=2e-5)


@pytest.mark.filterwarnings("ignore:(PiSSA|OLoRA) changes the base weights")  # as PEFT converts it
@pytest.mark.parametrize("start", ["pissa", "olora"])
def test_adapter_that_rewrote_its_base_merges_once_peft_has_converted_it(tiny, tmp_path, start):
    adapted = get_peft_model(load(tiny("llama")), lora("llama", init_lora_weights=start))
    adapted.save_pretrained(str(tmp_path / "start"), save_embedding_layers=False)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_" in name:
                parameter.add_(torch.randn_like(parameter) * 0.05)
    live = logits(adapted.eval())
    adapted.save_pretrained(str(tmp_path / "raw"), save_embedding_layers=False)
    with pytest.raises(Unsupported, match=f"init_lora_weights = '{start}'") as refused:
        merged(tiny("llama"), tmp_path / "raw", tmp_path / "out", base="original")
    assert "path_initial_model_for_weight_conversion" in refused.value.cure
    adapted.save_pretrained(
        str(tmp_path / "adapter"),
        save_embedding_layers=False,
        path_initial_model_for_weight_conversion=str(tmp_path / "start"),
    )
    exact = reference(tiny("llama"), tmp_path / "adapter")
    merged(tiny("llama"), tmp_path / "adapter", tmp_path / "out", base="original", writing=UGLY)
    for name, value in tensors_of(tmp_path / "out").items():
        assert_one_rounding(value, exact[name], name)
    assert torch.allclose(logits(load(tmp_path / "out")), live, atol=0.03)


@pytest.mark.filterwarnings("ignore:Adapter 'default'. .* invalid shape")  # PEFT takes a bias for a matrix
def test_bias_of_an_adapter_is_added_to_that_of_the_base(tiny, tmp_path):
    config = lora("qwen2", target_modules=["q_proj", "k_proj"], lora_bias=True, bias="lora_only")
    adapt(load(tiny("qwen2")), config, tmp_path / "adapter")
    exact = reference(tiny("qwen2"), tmp_path / "adapter")
    merged(tiny("qwen2"), tmp_path / "adapter", tmp_path / "out", base="original", writing=UGLY)
    start = tensors_of(tiny("qwen2"))
    for name, value in tensors_of(tmp_path / "out").items():
        assert_one_rounding(value, exact[name], name)
        is_adapted = name.endswith(("q_proj.bias", "k_proj.bias"))
        assert not name.endswith(".bias") or torch.equal(value, start[name].half()) != is_adapted, name


@pytest.mark.filterwarnings("ignore:`lora_bias=True` was passed but")  # that is what is tested
@pytest.mark.filterwarnings("ignore:Adapter 'default'. .* invalid shape")
def test_bias_of_an_adapter_needs_one_in_the_base(tiny, tmp_path):
    adapt(load(tiny("llama")), lora("llama", lora_bias=True), tmp_path / "adapter")
    with pytest.raises(Unsupported, match=r"a bias for .*_proj\.bias, and the base none") as refused:
        merged(tiny("llama"), tmp_path / "adapter", tmp_path / "out", base="original")
    assert "--form adapter" in refused.value.cure


def test_scaling_of_inputs_leaves_the_bias_and_that_of_outputs_does_not(tiny, tmp_path):
    config = IA3Config(target_modules=["k_proj", "v_proj"], feedforward_modules=["k_proj"])
    adapt(load(tiny("qwen2")), config, tmp_path / "adapter")
    exact, start = reference(tiny("qwen2"), tmp_path / "adapter"), tensors_of(tiny("qwen2"))
    merged(tiny("qwen2"), tmp_path / "adapter", tmp_path / "out", base="original", writing=UGLY)
    for name, value in tensors_of(tmp_path / "out").items():
        assert_one_rounding(value, exact[name], name)
        assert torch.equal(value, start[name].half()) != name.endswith(
            ("k_proj.weight", "v_proj.weight", "v_proj.bias")
        )


def two_adapters(tiny: Callable[[str], Path], root: Path, *more: str, **options: Any) -> None:
    for seed, name in enumerate(("one", "other")):
        config = lora("llama", *more, lora_alpha=6 + seed, **options)
        adapted = train(get_peft_model(load(tiny("llama")), config), seed=seed)
        adapted.save_pretrained(str(root / name), save_embedding_layers=False)
        write_facts(facts(), root / name)


def test_several_adapters_are_added_with_their_weights(tiny, tmp_path):
    two_adapters(tiny, tmp_path, "embed_tokens", "down_proj")
    loaded = PeftModel.from_pretrained(load(tiny("llama")), str(tmp_path / "one"), adapter_name="one")
    loaded.load_adapter(str(tmp_path / "other"), adapter_name="other")
    weights = {"one": 0.7, "other": -0.3}
    for module in loaded.modules():
        if isinstance(module, LoraLayer):
            for name, weight in weights.items():
                module.set_scale(name, weight)
    exact = loaded.merge_and_unload(adapter_names=list(weights)).state_dict()
    chosen = [(tmp_path / name, weight) for name, weight in weights.items()]
    merged(tiny("llama"), chosen, tmp_path / "out", base="original", writing=UGLY)
    for name, value in tensors_of(tmp_path / "out").items():
        assert_one_rounding(value, exact[name], name)


def test_an_adapter_with_weight_nought_is_the_base(tiny, tmp_path):
    two_adapters(tiny, tmp_path)
    merged(tiny("llama"), [(tmp_path / "one", 0.0)], tmp_path / "out", form="merged-bf16", base="original")
    written, start = tensors_of(tmp_path / "out"), tensors_of(tiny("llama"))
    assert all(torch.equal(value, start[name]) for name, value in written.items())


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (ia3("llama"), "scales weights"),
        (lora("llama", modules_to_save=["lm_head"]), "has tensors in place of"),
    ],
    ids=["IA3", "modules_to_save"],
)
@pytest.mark.parametrize("is_alone", [False, True])
def test_adapter_that_adds_nothing_is_refused_in_a_mix(tiny, tmp_path, config, words, is_alone):
    two_adapters(tiny, tmp_path)
    adapt(load(tiny("llama")), config, tmp_path / "third")
    chosen = [(tmp_path / "third", 0.5), *([] if is_alone else [(tmp_path / "one", 0.5)])]
    with pytest.raises(Unsupported, match=f"third {words}"):
        merged(tiny("llama"), chosen, tmp_path / "out", base="original")
    assert not (tmp_path / "out").exists()


def test_mix_needs_one_base_and_real_weights(tiny, tmp_path):
    two_adapters(tiny, tmp_path)
    chosen = [(tmp_path / "one", 0.5), (tmp_path / "other", 0.5)]
    write_facts(facts(double_quant=False), tmp_path / "other")
    with pytest.raises(BadExport, match=r"one was trained on .* with double_quant True, .* with False"):
        merged(tiny("llama"), chosen, tmp_path / "out")
    write_facts(replace(facts(), fingerprint="e" * 64), tmp_path / "other")
    for base in ("dequantized", "original"):
        with pytest.raises(BadExport, match=r"trained on different bases: .*one on .*, .*other on "):
            merged(tiny("llama"), chosen, tmp_path / "out", base=base)
    write_facts(facts(double_quant=False), tmp_path / "other")
    merged(tiny("llama"), chosen, tmp_path / "out", base="original")
    for nothing in ([(tmp_path / "one", float("nan"))], []):
        with pytest.raises(BadRecipe, match=r"weight of the adapter|no adapter to merge"):
            merged(tiny("llama"), nothing, tmp_path / "other-out", base="original")


def test_mix_of_two_prompts_says_which_one_counts(tiny, tmp_path):
    two_adapters(tiny, tmp_path)
    (tmp_path / "other" / "prompt.json").write_text("{}", encoding="utf-8")
    chosen = [(tmp_path / "one", 0.5), (tmp_path / "other", 0.5)]
    events = merged(tiny("llama"), chosen, tmp_path / "out")
    assert [event.message.endswith("one.") for event in events if isinstance(event, Warned)] == [True]


METHODS = [
    "PREFIX_TUNING",
    "PROMPT_TUNING",
    "P_TUNING",
    "ADAPTION_PROMPT",
    "BOTTLENECK",
    "LOHA",
    None,
]


@pytest.mark.parametrize("method", METHODS)
def test_method_that_does_not_merge_says_which_form_serves(tiny, tmp_path, method):
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": method}), encoding="utf-8")
    with pytest.raises(Unsupported, match=str(method)) as refused:
        merged(tiny("llama"), tmp_path, tmp_path / "out", base="original")
    assert "--form adapter" in refused.value.cure


@pytest.fixture
def dora(tiny, tmp_path) -> Path:
    adapt(load(tiny("llama")), lora("llama", use_dora=True, bias="all"), tmp_path / "adapter")
    return tmp_path / "adapter"


Q = "base_model.model.model.layers.0.self_attn.q_proj."
Damage = Callable[[dict[str, torch.Tensor]], Any]
DAMAGES: dict[str, tuple[Damage, dict[str, Any], type[QadaptError], str]] = {
    "no magnitude": (
        lambda t: t.pop(Q + "lora_magnitude_vector"), {}, BadExport, "has no magnitude .*use_dora = True"
    ),
    "magnitudes nobody asked for": (
        lambda t: None, {"use_dora": False}, BadExport, "has a magnitude of .*use_dora = False"
    ),
    "a layer left out": (
        lambda t: [t.pop(name) for name in list(t) if name.startswith(Q)], {}, BadExport,
        r"nothing for model\.layers\.0\.self_attn\.q_proj\.weight",
    ),
    "short magnitude": (
        lambda t: t.update({Q + "lora_magnitude_vector": torch.ones(63)}), 
        {}, BadExport, r"\(63,\); it has 64 rows",
    ),
    "NaN in a magnitude": (
        lambda t: t[Q + "lora_magnitude_vector"].fill_(float("nan")), {}, BadExport, "NaN .*magnitude_vector"
    ),
    "a module that is not there": (
        lambda t: None, {"modules_to_save": ["lm_head"]}, BadExport, "lacks lm_head, which its modules"
    ),
    "a tensor nobody asked for": (
        lambda t: t.update({"base_model.model.model.norm.weight": torch.ones(64)}),
        {}, Unsupported, r"holds base_model\.model\.model\.norm\.weight",
    ),
    "a head of another width": (
        lambda t: t.update({"base_model.model.lm_head.weight": torch.ones(448, 63)}),
        {"modules_to_save": ["lm_head"]}, BadExport, r"lm_head\.weight is \(448, 63\)",
    ),
    "a bias the base lacks": (
        lambda t: t.update({Q + "base_layer.bias": torch.ones(64)}), {}, BadExport, "q_proj.bias, which the"
    ),
    "a weight twice": (
        lambda t: t.update({Q + "weight": torch.ones(64, 64)}),
        {"modules_to_save": ["q_proj"]}, Unsupported, "q_proj in two ways",
    ),
    "a name without its prefix": (
        lambda t: t.update({"lm_head.weight": torch.ones(448, 64)}), {}, Unsupported, r"holds lm_head\.weight"
    ),
    "another method": (lambda t: None, {"peft_type": "IA3"}, BadExport, "says peft_type = 'IA3'"),
    "a transposed layer": (lambda t: None, {"fan_in_fan_out": True}, Unsupported, "fan_in_fan_out = True"),
    "LoftQ": (lambda t: None, {"init_lora_weights": "loftq"}, Unsupported, "init_lora_weights = 'loftq'"),
    "CorDA": (lambda t: None, {"init_lora_weights": "corda"}, Unsupported, "init_lora_weights = 'corda'"),
}  # fmt: skip


@pytest.mark.parametrize("case", DAMAGES)
def test_adapter_that_would_merge_wrong_is_refused_by_name(tiny, tmp_path, dora, case):
    change, values, error, message = DAMAGES[case]
    change_tensors(dora, change)
    change_config(dora, **values)
    with pytest.raises(error, match=message):
        merged(tiny("llama"), dora, tmp_path / "exports" / "out", base="original")
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]


PLACES: tuple[dict[str, Any], ...] = (
    {"target_modules": ["q_proj", "down_proj"]},
    {"target_modules": r".*\.[01]\..*_proj"},
    {"target_modules": ["q_proj", "o_proj"], "exclude_modules": ["1.self_attn.o_proj"]},
    {"target_modules": ["q_proj"], "exclude_modules": r".*layers\.0.*"},
    {"target_modules": ["q_proj", "lm_head"], "layers_to_transform": [1]},
    {"target_modules": ["q_proj"], "layers_to_transform": 1, "layers_pattern": "layers"},
    {"target_modules": ["q_proj"], "layers_to_transform": [0], "layers_pattern": ["blocks", "layers"]},
    {"target_modules": ["model.layers.1.mlp.up_proj"], "layers_to_transform": [0]},
    {"target_modules": ["q_proj"], "layers_to_transform": []},
    {"target_modules": ["q_proj", "lm_head"], "modules_to_save": ["lm_head"]},
    {"target_modules": None},
)


@pytest.mark.parametrize("places", PLACES, ids=str)
def test_what_a_configuration_adapts_is_what_peft_adapts(tiny, places):
    config = LoraConfig(**places)
    modules = [name for name, _ in load(tiny("llama")).named_modules() if name]
    found = {name: check_target_module_exists(config, name) for name in modules if config.target_modules}
    theirs = {name for name, is_there in found.items() if is_there}
    assert {name for name in modules if is_promised(name, config.to_dict())} == theirs


def test_adapter_says_what_it_has_besides_low_rank_pairs(tiny, tmp_path, dora):
    with Adapter(dora) as adapter:
        assert adapter.beyond_pairs == ("DoRA (use_dora)",)
    two_adapters(tiny, tmp_path)
    with Adapter(tmp_path / "one") as adapter:
        assert adapter.beyond_pairs == () and adapter.touched == set(adapter.weights)


def test_source_in_many_files_and_source_of_a_gguf_file_merge_alike(tiny, tmp_path):
    adapt(load(tiny("llama")), KINDS["DoRA"]("llama"), tmp_path / "adapter")
    load(tiny("llama")).save_pretrained(tmp_path / "sharded", max_shard_size="100KB")
    half = {name: value.half().float() for name, value in tensors_of(tiny("llama")).items()}
    write_gguf(tiny("llama"), tmp_path / "tiny.gguf", weights=half)
    converted = find_model(str(tmp_path / "tiny.gguf"), cache=tmp_path / "cache").folder
    for name, folder in {"sharded": tmp_path / "sharded", "gguf": converted}.items():
        exact = reference(folder, tmp_path / "adapter")
        out = tmp_path / f"{name}-out"
        merged(folder, tmp_path / "adapter", out, base="original", writing=UGLY)
        for tensor, value in tensors_of(out).items():
            assert_one_rounding(value, exact[tensor], tensor)
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 1


def test_merged_model_gives_its_numbers_without_a_folder(tiny, tmp_path):
    adapt(load(tiny("smollm2")), lora("smollm2", "lm_head"), tmp_path / "adapter")
    merged(tiny("smollm2"), tmp_path / "adapter", tmp_path / "out", form="merged-fp32")
    written = tensors_of(tmp_path / "out")
    with open_merged(tiny("smollm2"), tmp_path / "adapter", base="dequantized", dtype="F32") as model:
        assert [entry.name for entry in model.entries] == [*written] and model.vocabulary is None
        assert model.changed_config == {"tie_word_embeddings": False}
        for entry in model.entries:
            numbers = torch.frombuffer(bytearray(b"".join(model.values(entry))), dtype=torch.float32)
            assert torch.equal(numbers.view(entry.shape), written[entry.name])
