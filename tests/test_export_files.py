"""What stands beside the weights, what failures leave (nothing), reading by rows, memory, the command."""

from __future__ import annotations

import io
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from rich.console import Console
from safetensors.torch import save_file
from tiny_model import make_tiny_model
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from qadapt import cache
from qadapt.adapters.facts import AdapterFacts, write_facts
from qadapt.cli.export import result_values, show_export
from qadapt.data.prompt import CONTRACT_FILE, load_contract
from qadapt.errors import BadModel, BadOutput, NoRoom
from qadapt.events import Evaluated, Event, Exported, StageAdvanced, StageStarted, StepDone
from qadapt.export import merged_rows
from qadapt.export.card import CardFacts, Made, card_facts, card_text, licence_of
from qadapt.export.merge import merge
from qadapt.export.writing import Writing
from qadapt.model.tensor_files import TensorReader, open_model
from qadapt.model.tensor_values import bytes_of, tensor_of

FACTS = AdapterFacts("org/base-1b", "abc123", "f" * 64, "nf4", True, "fp32", "p" * 64)


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A base with everything a published folder has, and an adapter."""
    root = tmp_path_factory.mktemp("parts")
    model = make_tiny_model(root / "model", "llama")
    (model / "README.md").write_text(
        "---\nlanguage: en\nlicense: apache-2.0\n---\n# Base\n", encoding="utf-8"
    )
    (model / "LICENSE").write_text("Apache License 2.0\n", encoding="utf-8")
    (model / "Notice.md").write_text("of others\n", encoding="utf-8")
    config = json.loads((model / "config.json").read_text(encoding="utf-8"))
    config |= {"torch_dtype": "bfloat16", "auto_map": {"AutoModelForCausalLM": "modeling_x.X"}}
    (model / "config.json").write_text(json.dumps(config), encoding="utf-8")
    loaded = AutoModelForCausalLM.from_pretrained(model)
    adapted = get_peft_model(loaded, LoraConfig(r=4, target_modules="all-linear"))
    adapted.save_pretrained(str(root / "adapter"))
    write_facts(FACTS, root / "adapter")
    return model, root / "adapter"


def export(parts: tuple[Path, Path], target: Path, **writing: object) -> list[Event]:
    options = {"writing": Writing(**writing)} if writing else {}
    return list(merge(model_folder=parts[0], adapter_folder=parts[1], target=target, **options))


@pytest.mark.parametrize(("shard_bytes", "files"), [(2**31, 1), (100_000, 4)])
def test_folder_loads_alone_with_plain_transformers(parts, tmp_path, shard_bytes, files):
    export(parts, tmp_path / "out", shard_bytes=shard_bytes)
    out = tmp_path / "out"
    assert len(list(out.glob("*.safetensors"))) == files
    assert (out / "model.safetensors.index.json").exists() == (files > 1)
    model = AutoModelForCausalLM.from_pretrained(out)
    assert model.dtype is torch.float16
    ours, theirs = (AutoTokenizer.from_pretrained(folder) for folder in (out, parts[0]))
    turns = [{"role": "user", "content": "Hello, two apples"}]
    assert ours.apply_chat_template(turns) == theirs.apply_chat_template(turns)
    assert GenerationConfig.from_pretrained(out) == GenerationConfig.from_pretrained(parts[0])
    assert (out / "LICENSE").read_text(encoding="utf-8") == "Apache License 2.0\n"
    assert (out / "Notice.md").read_text(encoding="utf-8") == "of others\n"


def test_config_names_the_type_and_nothing_of_the_past(parts, tmp_path):
    export(parts, tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text(encoding="utf-8"))
    assert config["dtype"] == "float16"
    assert not {"torch_dtype", "auto_map", "quantization_config"} & set(config)


def test_the_same_export_twice_is_the_same_bytes(parts, tmp_path):
    for name in ("one", "two"):
        export(parts, tmp_path / name, shard_bytes=100_000)
    files = sorted(path.name for path in (tmp_path / "one").iterdir())
    assert files == sorted(path.name for path in (tmp_path / "two").iterdir())
    assert all((tmp_path / "one" / f).read_bytes() == (tmp_path / "two" / f).read_bytes() for f in files)


def test_card_tells_what_is_known_and_nothing_else(parts):
    events = [
        StepDone(
            step=step, loss=3.0 / step, learning_rate=1e-3, gradient_norm=1.0, tokens=9, supervised_tokens=5,
            rows=1, seconds=0.1,
        )
        for step in (1, 2, 3)
    ]  # fmt: skip
    held_out = [Evaluated(step=s, loss=loss, is_best=True, seconds=1) for s, loss in ((2, 0.5), (3, 0.625))]
    facts = card_facts(FACTS, [*events, *held_out], recipe="train:\n  steps: 3\n", data=("orders.jsonl",))
    card = card_text(facts.with_licence_of(parts[0]), Made("merged-fp16", "dequantized"))
    assert "base_model: org/base-1b\n" in card and "\nlicense: apache-2.0\n" in card
    assert "at revision `abc123`" in card and "```yaml\ntrain:\n  steps: 3\n```" in card
    assert (
        "training rows of step 3: 1.0000" in card and "held-out rows after step 2, the best: 0.5000" in card
    )
    assert "merged-fp16" in card and "dequantized" in card and "`orders.jsonl`" in card
    bare = card_text(CardFacts(), Made("merged-bf16", "original"))
    assert "None" not in bare and "icence" not in bare and "Recipe" not in bare and "base_model" not in bare


@pytest.mark.parametrize("text", [None, "# no front matter\nlicense: mit\n", "---\nlicense:\n- mit\n---\n"])
def test_licence_that_is_not_stated_is_not_guessed(tmp_path, text):
    if text is not None:
        (tmp_path / "README.md").write_text(text, encoding="utf-8")
    assert licence_of(tmp_path) is None


def test_folder_speaks_as_the_adapter_was_trained(parts, tmp_path):
    template = tmp_path / "mine.jinja"
    text = "{% for turn in messages %}{{ turn.content }}<|start_header_id|>{% endfor %}"
    template.write_text(text, encoding="utf-8")
    contract = load_contract(parts[0], template=str(template))
    adapter = tmp_path / "adapter"
    shutil.copytree(parts[1], adapter)
    (adapter / CONTRACT_FILE).write_text(json.dumps(contract.facts()), encoding="utf-8")
    export((parts[0], adapter), tmp_path / "out")
    exported = load_contract(tmp_path / "out")
    assert exported.template.texts == {"default": text}
    ends = json.loads((tmp_path / "out/generation_config.json").read_text(encoding="utf-8"))["eos_token_id"]
    assert set(ends) == contract.end_ids, "what closes an answer ends it for every tool"
    (adapter / CONTRACT_FILE).write_text(json.dumps(load_contract(parts[0]).facts()), encoding="utf-8")
    export((parts[0], adapter), tmp_path / "own")
    for name in ("chat_template.jinja", "generation_config.json", "tokenizer_config.json"):
        assert (tmp_path / "own" / name).read_bytes() == (parts[0] / name).read_bytes()


def test_existing_target_is_kept(parts, tmp_path):
    (tmp_path / "out").mkdir()
    with pytest.raises(BadOutput, match="exists already"):
        export(parts, tmp_path / "out")
    assert list(tmp_path.iterdir()) == [tmp_path / "out"]


def test_folder_one_works_in_is_no_target(parts, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for here in ("", ".", ".."):
        with pytest.raises(BadOutput, match="exists already"):
            export(parts, Path(here))


def test_full_disk_is_found_before_the_first_byte(parts, tmp_path, monkeypatch):
    monkeypatch.setattr(cache, "free_bytes", lambda _: 40_000_000)
    with pytest.raises(NoRoom, match=r"needs 32\.\d MiB in .*; 38\.1 MiB are free there"):
        export(parts, tmp_path / "exports" / "out")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (PermissionError(13, "Permission denied"), "cannot be written: Permission denied"),
        (FileNotFoundError(2, "no such drive"), "a part of that path cannot be made"),
    ],
)
def test_place_that_cannot_be_made_is_said(parts, tmp_path, monkeypatch, error, message):
    def refuse(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(Path, "mkdir", refuse)
    with pytest.raises(BadOutput, match=message):
        export(parts, tmp_path / "exports" / "out")
    assert list(tmp_path.iterdir()) == []


def test_place_inside_a_file_is_said(parts, tmp_path):
    (tmp_path / "file").write_text("", encoding="utf-8")
    with pytest.raises(BadOutput, match="a part of that path is a file"):
        export(parts, tmp_path / "file" / "out")


def test_disk_that_fills_up_meanwhile_leaves_no_trace(parts, tmp_path, monkeypatch):
    def fill_up(_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(merged_rows, "bytes_of", fill_up)
    with pytest.raises(BadOutput, match="is full"):
        export(parts, tmp_path / "exports" / "out")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("ending", [KeyboardInterrupt, GeneratorExit])
def test_interrupted_export_leaves_no_trace(parts, tmp_path, ending):
    events = merge(model_folder=parts[0], adapter_folder=parts[1], target=tmp_path / "runs" / "a" / "out")
    while not isinstance(next(events), StageAdvanced):
        pass
    assert (tmp_path / "runs" / "a" / ".out.partial").is_dir()
    with pytest.raises(ending):
        events.throw(ending)
    assert list(tmp_path.iterdir()) == []


def test_what_a_killed_export_left_behind_is_cleared_by_the_next(parts, tmp_path):
    left = tmp_path / ".out.partial"
    left.mkdir()
    (left / "model.safetensors").write_bytes(b"half")
    export(parts, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    AutoModelForCausalLM.from_pretrained(tmp_path / "out")


def test_reader_gives_every_range_of_rows(tmp_path):
    tensors = {
        "b": torch.randn(7, 3), "a": torch.randn(5, 2, 2).bfloat16(), "scalar": torch.tensor(3.5),
        "none": torch.zeros(0, 4), "whole": torch.arange(9),
    }  # fmt: skip
    save_file(tensors, tmp_path / "model.safetensors")
    with open_model(tmp_path) as reader:
        assert set(reader.entries) == set(tensors)
        for name, tensor in tensors.items():
            entry = reader.entries[name]
            assert torch.equal(tensor_of(reader.read(name), entry.dtype, entry.shape), tensor)
        buffer = memoryview(bytearray(1000))
        data = reader.read_rows("a", buffer, first=1, last=4)
        assert torch.equal(tensor_of(data, "BF16", (3, 2, 2)), tensors["a"][1:4])
        assert bytes(bytes_of(tensors["b"][2:6])) == bytes(reader.read_rows("b", buffer, first=2, last=6))


def test_reader_names_a_damaged_file(tmp_path):
    save_file({"x": torch.randn(50, 50)}, tmp_path / "model.safetensors")
    whole = (tmp_path / "model.safetensors").read_bytes()
    for cut in (0, 5, 40, len(whole) - 1):
        (tmp_path / "model.safetensors").write_bytes(whole[:cut])
        with pytest.raises(BadModel, match=r"model\.safetensors"):
            open_model(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(whole.replace(b"[50,50]", b"[50,49]"))
    with pytest.raises(BadModel, match="x has 10000 bytes; its shape needs 9800"):
        open_model(tmp_path)


def test_reader_names_a_type_that_it_does_not_read(tmp_path):
    save_file({"x": torch.zeros(50, 50)}, tmp_path / "model.safetensors")
    whole = (tmp_path / "model.safetensors").read_bytes()
    for damaged in (b'"Q5x"', b"[[3]]"):
        (tmp_path / "model.safetensors").write_bytes(whole.replace(b'"F32"', damaged))
        with pytest.raises(BadModel, match="x is of a type that is not read here"):
            open_model(tmp_path)


def test_reader_notices_a_file_that_shrinks_and_a_name_that_comes_twice(tmp_path):
    for name in ("a", "b"):
        save_file({"x": torch.randn(50, 50)}, tmp_path / name)
    with pytest.raises(BadModel, match="holds the tensor x, which another file"):
        TensorReader([tmp_path / "a", tmp_path / "b"])
    with TensorReader([tmp_path / "a"]) as reader:
        with (tmp_path / "a").open("r+b") as file:
            file.truncate(5000)
        with pytest.raises(BadModel, match="ends inside the tensor x"):
            reader.read("x")


MEMORY = """
import sys
from pathlib import Path
sys.path.insert(0, {bench!r})
from export_7b import Peak, measured_merge
model, adapter, target = map(Path, sys.argv[1:4])
print(measured_merge(model, adapter, target, base=sys.argv[4])["peak_bytes"])
"""


@pytest.mark.parametrize("base", ["original", "dequantized"])
def test_memory_of_a_merge_does_not_grow_with_the_tensor(tmp_path, base):
    """On Linux anonymous memory, elsewhere resident memory. A tensor is 100 MiB, with its fp32 form 300 MiB.

    Usual are 25 and 60 MiB; on a machine short of memory the level at the start may lie lower than it should.
    """
    model, adapter = big_parts(tmp_path)
    bench = str(Path(__file__).parent.parent / "tools" / "bench")
    command = [
        sys.executable,
        "-c",
        MEMORY.format(bench=bench),
        *map(str, (model, adapter, tmp_path / "out")),
        base,
    ]
    result = subprocess.run(command, check=True, capture_output=True, text=True)
    peak_bytes = int(result.stdout.splitlines()[-1])
    assert 0 < peak_bytes < 192 * 2**20
    assert (tmp_path / "out" / "model.safetensors").stat().st_size > 100 * 2**20


def big_parts(root: Path) -> tuple[Path, Path]:
    """A base of one tensor of 100 MiB with its adapter: a merge reads tensors, not models."""
    name, rows, columns = "model.layers.0.mlp.down_proj", 51200, 1024
    make_tiny_model(root / "model", "llama")
    save_file(
        {f"{name}.weight": torch.randn(64, columns).bfloat16().repeat(rows // 64, 1)},
        root / "model" / "model.safetensors",
    )
    (root / "adapter").mkdir()
    pair = {"A": torch.randn(4, columns), "B": torch.randn(rows, 4)}
    save_file(
        {f"base_model.model.{name}.lora_{side}.weight": value for side, value in pair.items()},
        root / "adapter" / "adapter_model.safetensors",
    )
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 8}
    (root / "adapter" / "adapter_config.json").write_text(json.dumps(config), encoding="utf-8")
    write_facts(FACTS, root / "adapter")
    return root / "model", root / "adapter"


def a_whole_export() -> list[Event]:
    return [
        StageStarted(stage="merging"),
        StageAdvanced(stage="merging", done=1, total=2),
        StageAdvanced(stage="merging", done=2, total=2),
        Exported(form="merged-fp16", base="original", folder="runs/[a]/out", bytes=2048, seconds=1.25),
    ]


@pytest.mark.parametrize("is_terminal", [True, False])
def test_command_shows_the_export_and_its_end(is_terminal):
    console = Console(file=io.StringIO(), force_terminal=is_terminal, width=60)
    exported = show_export(a_whole_export(), console=console)
    text = console.file.getvalue()
    assert "merging" in text and "merged-fp16 on the original base: 2.0 KiB in 1.2 s, runs/[a]/out" in text
    assert ("━" in text) == is_terminal
    assert result_values(exported) == {
        "schema": 1, "form": "merged-fp16", "base": "original", "folder": "runs/[a]/out", "bytes": 2048,
        "seconds": 1.25, "notes": [], "pushed": None,
    }  # fmt: skip


class Listening(Console):
    """Keeps what is printed, bars aside."""

    def print(self, *said: object, **options: object) -> None:
        self.lines = [*getattr(self, "lines", []), *(each for each in said if isinstance(each, str))]
        super().print(*said, **options)


@pytest.mark.parametrize("is_terminal", [True, False])
def test_stages_are_bars_in_their_order_or_lines_and_never_both(is_terminal):
    console = Listening(file=io.StringIO(), force_terminal=is_terminal, width=80)
    events = [
        StageStarted(stage="measuring [one]"),
        StageAdvanced(stage="layer by layer", done=3, total=3, unit="layers"),
        StageStarted(stage="measuring [two]"),
        StageAdvanced(stage="layer by layer", done=2, total=3, unit="layers"),
        *a_whole_export(),
    ]
    show_export(events, console=console)
    stages = ["measuring [one]", "layer by layer", "measuring [two]", "layer by layer", "merging"]
    said = [line for line in console.lines if line in stages]
    assert said == ([] if is_terminal else stages[::2])
    if is_terminal:
        last = console.file.getvalue().splitlines()[-len(stages) - 1 : -1]
        assert all(stage in line for stage, line in zip(stages, last, strict=True))
        assert ["2 of 3 layers" in line for line in last] == [False, False, False, True, False]
