"""A model that comes layer by layer against the same files loaded whole by plain transformers."""

from __future__ import annotations

import math
from collections.abc import Callable, Generator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, TypeVar

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_model import FAMILIES, make_tiny_model
from torch import Tensor
from torch.nn import functional
from transformers import AutoConfig, AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedModel

from qadapt.data.tokens import Tokens, tokens_of
from qadapt.errors import BadExport
from qadapt.events import Event, StageAdvanced
from qadapt.export import plain_load, streamed_model
from qadapt.export.activations import FP16_LIMIT, Ranges
from qadapt.export.learned_tokens import batches_of
from qadapt.export.plain_load import FROM_DISK, IN_MEMORY, load_plainly
from qadapt.export.streamed_model import StreamedModel, Tensors, row_losses, tensors_of
from qadapt.model.tensor_files import open_model

CPU = torch.device("cpu")
OTHERS: dict[str, dict[str, Any]] = {
    "gemma3_text": {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]},
    "smollm3": {"no_rope_layer_interval": 2},
    "mistral": {"sliding_window": 8},
}
"""Beside the tiny families: layers with windows shorter than the rows, without positions, head with a cap."""

Result = TypeVar("Result")


def ended(events: Generator[Event, None, Result]) -> Result:
    found: list[Result] = []

    def whole() -> Generator[Event, None, None]:
        found.append((yield from events))

    list(whole())
    return found[0]


def make_other(folder: Path, family: str) -> Path:
    """A model folder without a tokenizer, its weights in bf16."""
    values = {
        "vocab_size": 320, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "head_dim": 16,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128,
        "initializer_range": 0.08, "pad_token_id": 319,
    }  # fmt: skip
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **values | OTHERS[family])
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def folder_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    root = tmp_path_factory.mktemp("models")

    def made(name: str) -> Path:
        if not (root / name).exists():
            if name in FAMILIES:
                make_tiny_model(root / name, name)
            else:
                make_other(root / name, name.removesuffix(" with windows"))
        return root / name

    return made


NAMES = (*FAMILIES, *(f"{name} with windows" for name in OTHERS))


def whole(folder: Path) -> PreTrainedModel:
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return model.eval()


def some_ids(*lengths: int) -> list[Tensor]:
    draw = torch.Generator().manual_seed(1)
    return [torch.randint(0, 300, (2, length), generator=draw) for length in lengths]


def streamed_logits(folder: Path, batches: list[Tensor], ranges: Ranges | None = None) -> list[Tensor]:
    config = AutoConfig.from_pretrained(folder)
    with open_model(folder) as reader:
        model = StreamedModel(config, tensors_of(reader), device=CPU)
        hidden = ended(model.hidden_states(batches, ranges=ranges))
        return [model.logits(each.flatten(0, 1), ranges=ranges) for each in hidden]


@pytest.mark.parametrize("name", NAMES)
def test_logits_are_those_of_the_model_loaded_whole(folder_of, name):
    batches = some_ids(33, 7, 1)
    found = streamed_logits(folder_of(name), batches)
    model = whole(folder_of(name))
    for ids, logits in zip(batches, found, strict=True):
        with torch.no_grad():
            wanted = model(input_ids=ids).logits.flatten(0, 1)
        assert logits.dtype is torch.float32
        assert torch.allclose(logits, wanted, atol=2e-5, rtol=1e-5), (logits - wanted).abs().max()


def test_head_with_a_cap_and_in_blocks_is_the_same(folder_of, monkeypatch):
    monkeypatch.setattr(streamed_model, "_HEAD_BYTES", 64 * 4 * 100)
    ids = some_ids(9)
    with torch.no_grad():
        wanted = whole(folder_of("gemma2"))(input_ids=ids[0]).logits.flatten(0, 1)
    assert wanted.abs().max() <= 30, "the architecture caps its logits"
    assert torch.allclose(streamed_logits(folder_of("gemma2"), ids)[0], wanted, atol=2e-5)


def test_an_untied_head_in_the_files_counts_whatever_the_configuration_says(folder_of, tmp_path):
    source, copy = folder_of("smollm2"), tmp_path / "copy"
    copy.mkdir()
    for path in source.iterdir():
        (copy / path.name).write_bytes(path.read_bytes())
    tensors = load_file(copy / "model.safetensors")
    assert "lm_head.weight" not in tensors
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"] * 2
    save_file(tensors, copy / "model.safetensors", {"format": "pt"})
    ids = some_ids(9)
    with torch.no_grad():
        wanted = whole(copy)(input_ids=ids[0]).logits.flatten(0, 1)
    assert torch.allclose(streamed_logits(copy, ids)[0], wanted, atol=2e-5)


def test_only_one_layer_is_in_memory_at_a_time(folder_of):
    """Every tensor of the layers is read once, in the order of the layers, whatever the number of batches."""
    asked: list[str] = []
    folder = folder_of("llama")
    with open_model(folder) as reader:
        plain = tensors_of(reader)

        def read(name: str, first: int, last: int) -> Tensor:
            asked.append(name)
            return plain.read(name, first, last)

        model = StreamedModel(AutoConfig.from_pretrained(folder), Tensors(plain.names, read), device=CPU)
        events = list(model.hidden_states(some_ids(5, 6, 7)))
        assert all(parameter.is_meta for parameter in model._model.parameters()), "all weights are let go"
    layers = [name for name in asked if ".layers." in name]
    assert len(layers) == len(set(layers)) == 2 * 9
    assert [name.split(".")[2] for name in layers] == ["0"] * 9 + ["1"] * 9
    assert [event.done for event in events if isinstance(event, StageAdvanced)] == [1, 2]
    embedding = asked.count("model.embed_tokens.weight")
    assert embedding == len(torch.cat([each.flatten() for each in some_ids(5, 6, 7)]).unique())


def test_a_call_that_is_closed_half_way_leaves_the_model_as_it_was(folder_of):
    folder, ids = folder_of("llama"), some_ids(5)
    with open_model(folder) as reader:
        model = StreamedModel(AutoConfig.from_pretrained(folder), tensors_of(reader), device=CPU)
        events = model.hidden_states(ids)
        next(events)
        events.close()
        again = ended(model.hidden_states(ids))[0]
    with torch.no_grad():
        wanted = whole(folder).get_decoder()(input_ids=ids[0]).last_hidden_state
    assert torch.allclose(again, wanted, atol=2e-5)


def rows_to_learn() -> list[Tokens]:
    draw = torch.Generator().manual_seed(3)
    rows = []
    for length, learned in ((40, 11), (9, 3), (23, 22), (9, 1)):
        ids = torch.randint(0, 300, (length,), generator=draw).tolist()
        rows.append(tokens_of(ids, [False] * (length - learned) + [True] * learned, place="here"))
    return rows


def test_losses_of_rows_are_those_of_the_model_loaded_whole(folder_of, monkeypatch):
    monkeypatch.setattr(streamed_model, "_LOGIT_BYTES", 4 * 448 * 5)
    folder, rows = folder_of("qwen2"), rows_to_learn()
    with open_model(folder) as reader:
        model = StreamedModel(AutoConfig.from_pretrained(folder), tensors_of(reader), device=CPU)
        found = ended(row_losses(model, rows, pad_id=0))
    plain = whole(folder)
    for row, loss in zip(rows, found, strict=True):
        ids = torch.tensor(row.ids).long()
        with torch.no_grad():
            logits = plain(input_ids=ids[None]).logits[0, :-1]
        losses = functional.cross_entropy(logits, ids[1:], reduction="none")
        wanted = losses[torch.tensor(row.supervised[1:])].sum()
        assert loss == pytest.approx(float(wanted), rel=1e-5)


def test_batches_hold_every_row_once_and_no_more_tokens_than_asked():
    rows = rows_to_learn()
    batches = batches_of(rows, pad_id=0, tokens=50)
    assert sorted(number for batch in batches for number in batch.rows) == [0, 1, 2, 3]
    assert all(batch.content.input_ids.numel() <= 50 for batch in batches)
    for batch in batches:
        targets = [(number, int(t)) for number, t in zip(batch.row_of_each, batch.targets, strict=True)]
        for number in batch.rows:
            learned = [token for row, token in targets if row == number]
            assert learned == rows[number].ids[rows[number].supervised].tolist()


def test_ranges_are_those_that_hooks_see_in_the_whole_model(folder_of):
    ids, ranges = some_ids(12), Ranges()
    streamed_logits(folder_of("llama"), ids, ranges)
    model, seen = whole(folder_of("llama")), Ranges()
    with torch.no_grad(), seen.watching(model, name=""):
        model(input_ids=ids[0])
    wanted = {path.removeprefix("."): reach for path, reach in seen.largest.items()}
    for path, reach in ranges.largest.items():
        assert reach == pytest.approx(wanted[path], rel=1e-4), path
    parts = [name for name, part in model.named_modules() if isinstance(part, torch.nn.Linear)]
    assert {*parts, "model.norm", "model.embed_tokens", "model.layers.1"} <= set(ranges.largest)


def test_activations_beyond_fp16_are_named_where_they_are(folder_of, tmp_path):
    copy = tmp_path / "copy"
    copy.mkdir()
    for path in folder_of("llama").iterdir():
        (copy / path.name).write_bytes(path.read_bytes())
    tensors = load_file(copy / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"] *= 1e6
    save_file(tensors, copy / "model.safetensors", {"format": "pt"})
    ranges = Ranges()
    streamed_logits(copy, some_ids(12), ranges)
    assert next(iter(ranges.beyond())) == "model.layers.1.mlp.up_proj"
    assert "model.layers.1.mlp.down_proj" in ranges.beyond(), "what goes into a module counts, too"
    assert not any(name.startswith("model.layers.0.") for name in ranges.beyond())
    ranges.see("here", torch.tensor([1.0, math.nan]))
    assert ranges.largest["here"] == math.inf > FP16_LIMIT


@pytest.mark.parametrize("fault", ["missing", "shape", "architecture"])
def test_files_that_are_no_such_model_are_refused_by_name(folder_of, tmp_path, fault):
    folder = folder_of("llama")
    config, tensors = AutoConfig.from_pretrained(folder), load_file(folder / "model.safetensors")
    name = "model.layers.1.mlp.up_proj.weight"
    if fault == "missing":
        del tensors[name]
    elif fault == "shape":
        tensors[name] = tensors[name].T.contiguous()
    else:
        config = AutoConfig.for_model("mpt", d_model=64, n_heads=4, n_layers=1, vocab_size=320)
    save_file(tensors, tmp_path / "model.safetensors")
    said = {"missing": name, "shape": r"\(64, 128\)", "architecture": "mpt"}[fault]
    with open_model(tmp_path) as reader, pytest.raises(Exception, match=said) as raised:
        ended(StreamedModel(config, tensors_of(reader), device=CPU).hidden_states(some_ids(4)))
    assert isinstance(raised.value, BadExport) or fault == "architecture"


@pytest.mark.parametrize("from_disk", [False, True])
@pytest.mark.parametrize("family", ["llama", "smollm2", "phi3"])
def test_plain_transformers_gives_the_streamed_logits_in_memory_and_from_disk(folder_of, family, from_disk):
    folder = folder_of(family)
    [batch] = batches_of(rows_to_learn()[:1], pad_id=0)
    with open_model(folder) as reader:
        model = StreamedModel(AutoConfig.from_pretrained(folder), tensors_of(reader), device=CPU)
        [hidden] = ended(model.hidden_states([batch.content.input_ids]))
        logits = model.logits(batch.before_head(hidden))
    found = load_plainly(folder, batch, logits, from_disk=from_disk)
    assert found.how == (FROM_DISK if from_disk else IN_MEMORY)
    assert found.tokens == 11 and found.difference < 1e-5
    assert load_plainly(folder, batch, logits * 1.01, from_disk=from_disk).difference > 5e-3


def test_files_that_transformers_would_fill_up_are_refused(folder_of, tmp_path):
    for path in folder_of("llama").iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    [batch] = batches_of(rows_to_learn()[:1], pad_id=0)
    with pytest.raises(BadExport, match=r"missing tensors in the export: model.layers.1.mlp.up_proj.weight"):
        load_plainly(tmp_path, batch, torch.zeros(11, 448))


def test_weights_in_4_bits_are_loaded_into_memory_however_little_is_free(folder_of, tmp_path, monkeypatch):
    """transformers refuses to take them from disk; and a card, where it would put them, has not the rows."""
    four_bits = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    source = AutoModelForCausalLM.from_pretrained(folder_of("llama"), quantization_config=four_bits)
    source.save_pretrained(tmp_path)
    free = SimpleNamespace(virtual_memory=lambda: SimpleNamespace(available=0))
    monkeypatch.setattr(plain_load, "psutil", free)
    [batch] = batches_of(rows_to_learn()[:1], pad_id=0)
    assert load_plainly(tmp_path, batch, torch.zeros(11, 448)).how == IN_MEMORY
    assert load_plainly(folder_of("llama"), batch, torch.zeros(11, 448)).how == FROM_DISK
