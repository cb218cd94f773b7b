"""The proof: live and exported model compared, each planted fault found and named."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Generator
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from planted_faults import PROMPTS, prompt_faults
from safetensors.torch import load_file, save_file
from tiny_model import FAMILIES, make_tiny_model
from torch.nn import functional
from transformers import AutoConfig

from qadapt.adapters.facts import AdapterFacts, write_facts
from qadapt.data.prompt import PromptContract, load_contract
from qadapt.data.tokens import Tokens, tokens_of
from qadapt.errors import BadExport, BadRun
from qadapt.events import Event
from qadapt.export.behaviour import Behaviour, Sample, prove_behaviour
from qadapt.export.merge import merge
from qadapt.export.plain_load import PlainLoad
from qadapt.export.prompt_proof import CONVERSATIONS, prove_prompt
from qadapt.export.proof import (
    LEAST_SAME_CHOICE,
    MOST_DIVERGENCE,
    MOST_LOST,
    MOST_PLAIN_DIFFERENCE,
    MadeOf,
    Proof,
    changed_files,
    file_facts,
    read_proof,
    write_proof,
)
from qadapt.export.streamed_model import StreamedModel, tensors_of
from qadapt.exporting.proving import sampled
from qadapt.model.load import load_base
from qadapt.model.tensor_files import open_model

CPU = torch.device("cpu")
ENDS, PAD = frozenset({5, 6}), 3
Result = TypeVar("Result")


def ended(events: Generator[Event, None, Result]) -> Result:
    found: list[Result] = []

    def whole() -> Generator[Event, None, None]:
        found.append((yield from events))

    list(whole())
    return found[0]


class Parts:
    """A base, an adapter that changes much, and the live model of both."""

    def __init__(self, root: Path, family: str, *, dtype: str = "fp32") -> None:
        self.model, self.adapter = make_tiny_model(root / "model", family), root / "adapter"
        self.dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[dtype]
        config = LoraConfig(r=4, lora_alpha=6, target_modules="all-linear", task_type="CAUSAL_LM")
        adapted = get_peft_model(self._base(), config, autocast_adapter_dtype=False)
        draw = torch.Generator().manual_seed(1)
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.data = (torch.randn(parameter.shape, generator=draw) * 0.1).to(parameter.dtype)
        adapted.save_pretrained(str(self.adapter), save_embedding_layers=False)
        write_facts(AdapterFacts("tiny", None, "f" * 64, "nf4", True, dtype, "p" * 64), self.adapter)

    def _base(self) -> Any:
        return load_base(self.model, quantization="nf4", double_quant=True, dtype=self.dtype, device=CPU)

    def live(self) -> PeftModel:
        return PeftModel.from_pretrained(self._base(), str(self.adapter), autocast_adapter_dtype=False)

    def merged(self, target: Path, **options: Any) -> Path:
        list(merge(model_folder=self.model, adapter_folder=self.adapter, target=target, **options))
        return target


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Parts]:
    made: dict[tuple[str, str], Parts] = {}

    def get(family: str = "llama", *, dtype: str = "fp32") -> Parts:
        if (family, dtype) not in made:
            made[family, dtype] = Parts(tmp_path_factory.mktemp(f"{family}-{dtype}"), family, dtype=dtype)
        return made[family, dtype]

    return get


def a_sample(count: int = 12) -> Sample:
    draw = torch.Generator().manual_seed(4)
    rows = []
    for number in range(count):
        ids = torch.randint(10, 300, (12 + 3 * number,), generator=draw).tolist()
        rows.append(tokens_of(ids, [False] * 6 + [True] * (len(ids) - 6), place="secret.jsonl, line 1"))
    rows.append(tokens_of(ids, [True] * len(ids), place="a text"))
    return Sample(tuple(rows), True, ENDS, PAD)


def behaviour_of(folder: Path, live: Callable[[], PeftModel], sample: Sample | None = None) -> Behaviour:
    with open_model(folder) as reader:
        model = StreamedModel(AutoConfig.from_pretrained(folder), tensors_of(reader), device=CPU)
        return ended(prove_behaviour(model, live, sample or a_sample(), folder=folder))


def a_proof(
    behaviour: Behaviour | None = None, *, form: str = "merged-fp16", base: str = "dequantized"
) -> Proof:
    return Proof(MadeOf("first", form, base, "tiny", None, "f" * 64, "a" * 64), behaviour=behaviour)


@pytest.mark.parametrize("family", ["llama", "gemma2", "qwen2", "smollm2"])
def test_a_merge_behaves_as_the_live_model(parts, tmp_path, family):
    found = behaviour_of(parts(family).merged(tmp_path / "out"), parts(family).live)
    assert found.mean_divergence < 1e-4 and found.largest_divergence < 1e-3
    assert found.same_choice_or_tie == 1 and found.same_choice > 0.98
    assert found.live_loss == pytest.approx(found.exported_loss, abs=2e-3)
    assert found.answers == 8 and found.same_answer_tokens / found.answer_tokens > 0.95
    assert found.plain.difference < MOST_PLAIN_DIFFERENCE and found.plain.how == "in memory"
    assert not found.beyond_fp16 and found.largest_activation > 1
    a_proof(found).check()


def test_numbers_are_those_of_a_naive_comparison(parts, tmp_path):
    from transformers import AutoModelForCausalLM

    sample, live = a_sample(), parts().live().eval()
    folder = parts().merged(tmp_path / "out", form="merged-bf16", base="original")
    found = behaviour_of(folder, parts().live, sample)
    plain = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    losses, divergences, same = [], [], []
    for row in sample.rows:
        ids = torch.tensor(row.ids).long()[None]
        with torch.no_grad():
            ours, theirs = (model(input_ids=ids).logits[0, :-1].log_softmax(-1) for model in (live, plain))
        learned = torch.tensor(row.supervised[1:])
        ours, theirs, targets = ours[learned], theirs[learned], ids[0, 1:][learned]
        losses += [[functional.nll_loss(each, targets, reduction="none") for each in (ours, theirs)]]
        divergences.append(functional.kl_div(theirs, ours, log_target=True, reduction="none").sum(-1))
        same.append(ours.argmax(-1) == theirs.argmax(-1))
    assert found.tokens == sum(map(len, same)) == sum(row.supervised_count for row in sample.rows)
    assert found.live_loss == pytest.approx(float(torch.cat([each[0] for each in losses]).mean()), rel=1e-5)
    assert found.exported_loss == pytest.approx(
        float(torch.cat([each[1] for each in losses]).mean()), rel=1e-5
    )
    assert found.mean_divergence == pytest.approx(float(torch.cat(divergences).mean()), rel=1e-3)
    assert found.largest_divergence == pytest.approx(float(torch.cat(divergences).max()), rel=1e-3)
    assert found.same_choice == pytest.approx(float(torch.cat(same).float().mean()))
    assert 0 < found.same_choice < 1, "the original base answers otherwise now and then"


def test_answers_are_those_that_the_exported_model_gives_itself(parts, tmp_path):
    from transformers import AutoModelForCausalLM

    from qadapt.model.generate import generate

    folder, sample = parts().merged(tmp_path / "out", form="merged-bf16", base="original"), a_sample()
    found = behaviour_of(folder, parts().live, sample)
    prompts = [row.ids[:6].tolist() for row in sample.rows[:8]]
    models = (parts().live(), AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32))
    ours, theirs = (generate(model, prompts, max_new_tokens=32, end_ids=ENDS, pad_id=PAD) for model in models)
    assert found.same_answers == sum(one == other for one, other in zip(ours, theirs, strict=True))
    assert found.same_answers < 8
    firsts = [
        next((at for at, pair in enumerate(zip(one, other, strict=False)) if pair[0] != pair[1]), 32)
        for one, other in zip(ours, theirs, strict=True)
        if one != other
    ]
    assert found.first_difference == min(firsts)


def test_a_live_model_in_bf16_is_no_fault(parts, tmp_path):
    found = behaviour_of(parts(dtype="bf16").merged(tmp_path / "out"), parts(dtype="bf16").live)
    assert found.mean_divergence < MOST_DIVERGENCE / 4
    a_proof(found).check()


def scaled(parts: Parts, folder: Path, factor: float) -> Path:
    """The same adapter with another strength."""
    shutil.copytree(parts.adapter, folder)
    config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    config["lora_alpha"] *= factor
    (folder / "adapter_config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder


@pytest.mark.parametrize("factor", [0.0, 2.0, 0.5])
def test_an_adapter_left_out_or_of_another_strength_shows_in_the_behaviour_alone(parts, tmp_path, factor):
    other = scaled(parts(), tmp_path / "other", factor)
    list(merge(model_folder=parts().model, adapter_folder=other, target=tmp_path / "out"))
    proof = a_proof(behaviour_of(tmp_path / "out", parts().live))
    with pytest.raises(BadExport, match=r"diverges from the live model by [\d.]+ nats"):
        proof.check()
    assert a_proof(proof.behaviour, base="original").faults == (), "there it is told, not judged"


def test_activations_too_large_for_fp16_fail_that_form_only_and_name_the_module(parts, tmp_path):
    folder = parts().merged(tmp_path / "out", form="merged-fp32")
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.0.mlp.up_proj.weight"] *= 1e5
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    found = behaviour_of(folder, parts().live)
    with pytest.raises(BadExport, match=r"do not fit fp16: model\.layers\.0\.mlp\.up_proj reaches") as raised:
        a_proof(found, base="original").check()
    assert "--form merged-bf16" in raised.value.cure
    a_proof(found, form="merged-bf16", base="original").check()


def test_another_vocabulary_is_a_fault(parts, tmp_path):
    folder = parts().merged(tmp_path / "out", form="merged-fp32")
    tensors = load_file(folder / "model.safetensors")
    for name in ("lm_head.weight", "model.embed_tokens.weight"):
        tensors[name] = tensors[name][:400].clone()
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    (folder / "config.json").write_text(json.dumps(config | {"vocab_size": 400}), encoding="utf-8")
    with pytest.raises(BadExport, match="knows 400 tokens, the live one 448"):
        behaviour_of(folder, parts().live)


GOOD = Behaviour(
    rows=4, are_held_out=True, tokens=1000, live_loss=1.0, exported_loss=1.0, mean_divergence=1e-5,
    largest_divergence=1e-3, same_choice=0.995, same_choice_or_tie=1.0, answers=2, same_answers=2,
    answer_tokens=20, same_answer_tokens=20, first_difference=None, largest_activation=12.0,
    largest_module="model.norm", beyond_fp16={}, plain=PlainLoad("in memory", 5, 1e-7),
)  # fmt: skip
NAN = float("nan")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({}, ""),
        ({"mean_divergence": MOST_DIVERGENCE * 1.01}, "diverges"),
        ({"mean_divergence": NAN}, "are no numbers (NaN)"),
        ({"same_choice_or_tie": LEAST_SAME_CHOICE - 0.002}, "chooses as the live model at 98.8%"),
        ({"same_choice_or_tie": LEAST_SAME_CHOICE}, ""),
        ({"tokens": 20, "same_choice_or_tie": 0.95}, ""),
        ({"tokens": 20, "same_choice_or_tie": 0.9}, "at 90.0%"),
        ({"plain": PlainLoad("from disk", 5, 2e-3)}, "plain transformers gives other logits"),
        ({"plain": PlainLoad("from disk", 5, NAN)}, "plain transformers gives other logits"),
        ({"beyond_fp16": {"model.layers.3.mlp": 7e4}}, "model.layers.3.mlp reaches 70000"),
    ],
)
def test_what_must_hold_is_this(changes, said):
    proof = a_proof(replace(GOOD, **changes))
    assert bool(proof.faults) == bool(said)
    assert said in " ".join(proof.faults)
    json.dumps(proof.values(), allow_nan=False)


@pytest.mark.parametrize(("form", "base"), [("merged-fp16", "original"), ("gguf-q4_0", "dequantized")])
def test_whatever_is_asked_for_is_not_another_model(form, base):
    near, far = (replace(GOOD, mean_divergence=MOST_LOST * factor) for factor in (0.99, 1.01))
    a_proof(near, form=form, base=base).check()
    with pytest.raises(BadExport, match=r"diverges from the live model by 1\.01") as raised:
        a_proof(far, form=form, base=base).check()
    assert "--base dequantized" in raised.value.cure
    [fault] = a_proof(replace(GOOD, mean_divergence=NAN), form=form, base=base).faults
    assert "no numbers" in fault


def test_files_that_compute_no_numbers_are_a_fault(parts, tmp_path):
    """A NaN must not be lost on the way to the bound."""
    folder = parts().merged(tmp_path / "out", form="merged-fp32")
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][3] = NAN
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with open_model(folder) as reader:
        model = StreamedModel(AutoConfig.from_pretrained(folder), tensors_of(reader), device=CPU)
        found = ended(prove_behaviour(model, parts().live, a_sample(), folder=None))
    assert found.mean_divergence != found.mean_divergence
    assert "no numbers" in a_proof(found, form="gguf-q8_0").faults[0]
    json.dumps(a_proof(found).values(), allow_nan=False)


def test_a_form_of_few_bits_that_lost_something_says_how_much():
    lossy = replace(GOOD, mean_divergence=0.3, same_choice=0.81)
    said = a_proof(lossy, form="bnb-4bit").deviation
    assert said is not None
    assert "0.300 nats per token" in said and "81.0%" in said
    assert not a_proof(lossy, form="bnb-4bit").faults, "it is what was asked for, and told"
    assert a_proof(GOOD, form="gguf-q8_0").deviation is None
    assert a_proof(replace(GOOD, mean_divergence=NAN), form="gguf-q4_0").deviation is not None


def test_a_reason_that_is_a_sentence_of_its_own_ends_in_one_full_stop():
    for reason in ("behaviour: rows.jsonl is not there.", "answers: it has no weights"):
        [said] = replace(a_proof(None), left_out=(reason,)).sentences()
        assert said == f"Not proven: {reason.rstrip('.')}."


@pytest.mark.parametrize("family", FAMILIES)
def test_the_prompt_of_an_export_is_that_of_the_run(tmp_path, tiny_model, family):
    folder = tiny_model(family)
    contract = load_contract(folder)
    shutil.copytree(folder, tmp_path / "out")
    ends(tmp_path / "out", sorted(contract.end_ids))
    found = prove_prompt(tmp_path / "out", contract)
    assert found.faults == () and found.conversations == len(CONVERSATIONS) and found.texts == 3


def ends(folder: Path, ids: list[int]) -> None:
    path = folder / "generation_config.json"
    values = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps(values | {"eos_token_id": ids}), encoding="utf-8")


@pytest.fixture
def told(tmp_path: Path, tiny_model: Callable[..., Path]) -> tuple[Path, PromptContract]:
    """A copy of a folder that speaks as its contract says."""
    folder = tiny_model("qwen2")
    shutil.copytree(folder, tmp_path / "out")
    return tmp_path / "out", load_contract(folder)


def set_template(folder: Path, text: str) -> None:
    for path in (folder / "chat_template.jinja",):
        path.write_text(text, encoding="utf-8")


def test_a_wrong_template_is_named(told):
    folder, contract = told
    set_template(folder, contract.template.texts["default"].replace("<|im_start|>", "<|im_end|>"))
    faults = prove_prompt(folder, contract).faults
    assert faults[0] == "the chat template is not the run's"
    assert "writes a question with '<|im_end|>' as token 1, the run with '<|im_start|>'" in faults[1]


def test_a_template_that_differs_where_no_sample_goes_is_named_too(told):
    folder, contract = told
    set_template(folder, contract.template.texts["default"] + "{% if tools %}x{% endif %}")
    assert prove_prompt(folder, contract).faults == ("the chat template is not the run's",)


def test_a_missing_template_is_named(told):
    folder, contract = told
    (folder / "chat_template.jinja").unlink()
    assert prove_prompt(folder, contract).faults == ("the chat template is missing",)


def test_a_missing_end_token_is_named(told):
    folder, contract = told
    names = {contract.tokenizer.convert_ids_to_tokens(token): token for token in contract.end_ids}
    ends(folder, [names["<|endoftext|>"]])
    [fault] = prove_prompt(folder, contract).faults
    assert fault == f"the end token '<|im_end|>' ({names['<|im_end|>']}) is missing in generation_config.json"
    ends(folder, [*contract.end_ids, 100])
    [fault] = prove_prompt(folder, contract).faults
    assert "ends answers at" in fault and "(100), which the run did not" in fault


def test_another_tokenizer_is_named(told, tiny_model):
    folder, contract = told
    shutil.copyfile(tiny_model("llama") / "tokenizer.json", folder / "tokenizer.json")
    faults = " ".join(prove_prompt(folder, contract).faults)
    assert "another vocabulary" in faults and "makes other tokens of 'Two apples" in faults
    (folder / "tokenizer.json").write_text("{}", encoding="utf-8")
    assert "the tokenizer cannot be read" in prove_prompt(folder, contract).faults[0]


@pytest.mark.parametrize("name", PROMPTS)
def test_planted_fault_of_the_prompt_is_found_and_named(tmp_path, name):
    plant, said = PROMPTS[name]
    faults = prompt_faults(tmp_path / "model", plant)
    assert any(said in fault for fault in faults), faults


def test_generation_settings_that_cannot_be_read_are_a_fault(told):
    folder, contract = told
    (folder / "generation_config.json").write_text("[]", encoding="utf-8")
    assert "generation_config.json cannot be read" in prove_prompt(folder, contract).faults[0]


def test_a_template_that_prints_a_date_is_compared_on_one_day(told):
    folder, _ = told
    text = "{{ strftime_now('%d %B %Y') }}{% for m in messages %}{{ m.content }}<|im_end|>{% endfor %}"
    set_template(folder, text)
    contract = load_contract(folder, date="2020-02-29")
    assert contract.template.prints_date
    assert prove_prompt(folder, contract).faults == ()


def test_proof_holds_numbers_and_hashes_only(parts, tmp_path):
    folder = parts().merged(tmp_path / "out")
    (folder / "nested").mkdir()
    (folder / "nested" / "file.txt").write_text("x", encoding="utf-8")
    proof = replace(a_proof(behaviour_of(folder, parts().live)), files=file_facts(folder, lambda _: None))
    write_proof(folder, proof)
    text = (folder / "proof.json").read_text(encoding="utf-8")
    assert "secret" not in text and str(tmp_path) not in text
    values = read_proof(folder)
    assert values == json.loads(json.dumps(proof.values()))
    assert values["holds"] and values["behaviour"]["rows"] == 13
    assert {"model.safetensors", "nested/file.txt", "config.json"} <= set(values["files"])
    assert not {"proof.json", "README.md"} & set(values["files"])
    assert all(len(facts["sha256"]) == 64 for facts in values["files"].values())
    said = " ".join(proof.sentences())
    assert "13 held-out rows" in said and "Plain transformers loads the files (in memory)" in said


def test_changed_files_are_named(tmp_path):
    for name in ("a", "b", "c"):
        (tmp_path / name).write_text(name, encoding="utf-8")
    before = file_facts(tmp_path, lambda _: None)
    assert changed_files(before, file_facts(tmp_path, lambda _: None)) == []
    (tmp_path / "a").unlink()
    (tmp_path / "b").write_text("x", encoding="utf-8")
    (tmp_path / "d").write_text("d", encoding="utf-8")
    assert changed_files(before, file_facts(tmp_path, lambda _: None)) == [
        "a is gone", "b is not what was written", "d is not of this export",
    ]  # fmt: skip


@pytest.mark.parametrize("text", [None, "{", "[]", '{"files": {}}', '{"made_of": {}, "files": {}}'])
def test_a_folder_without_a_proof_is_said(tmp_path, text):
    if text is not None:
        (tmp_path / "proof.json").write_text(text, encoding="utf-8")
    with pytest.raises(BadRun, match="has no proof that can be read"):
        read_proof(tmp_path)


def test_rows_are_taken_from_all_over_the_set():
    from qadapt.data.rows import RowSet

    rows = RowSet([tokens_of([number] * 10, [True] * 10, place="here") for number in range(1, 301)])
    chosen = sampled(rows, tokens=10_000)
    assert len(chosen) == 64 and len({int(row.ids[0]) for row in chosen}) == 64
    few = sorted(int(row.ids[0]) for row in sampled(rows, tokens=40))
    assert len(few) == 4 and few[0] < 100 and few[-1] > 200
    long = RowSet([Tokens(row.ids, row.supervised, "here") for row in rows[:1]])
    assert len(sampled(long, tokens=1)) == 1
