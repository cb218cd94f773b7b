"""The tools: the demo's task and its score, the tiny models, the environment's decisions."""

from __future__ import annotations

import io
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import demo_methods
import demo_task
import environment
import pytest
from demo_task import (
    HELD_OUT,
    TRAINING,
    few_shot_prompt,
    is_exact,
    make_rows,
    schema_prompt,
    score,
    write_task,
)
from hypothesis import given
from hypothesis import strategies as st
from packaging.requirements import Requirement
from rich.console import Console

from qadapt.methods import METHODS

if TYPE_CHECKING:
    from conftest import TinyModel

ROOT = Path(__file__).parent.parent
FAMILIES = ["llama", "mistral", "qwen2", "qwen3", "gemma2", "phi3", "smollm2"]


def words_of(text: str) -> set[str]:
    return set(re.findall(r"[a-z]+", text.lower()))


def answer_of(row: demo_task.Row) -> dict[str, Any]:
    answer: dict[str, Any] = json.loads(row["messages"][-1]["content"])
    return answer


# The task


def test_names_and_items_of_the_held_out_part_never_occur_in_training() -> None:
    trained = words_of(json.dumps(make_rows(2000, 0, held_out=False)))
    held_out_words = words_of(" ".join((*HELD_OUT.names, *HELD_OUT.items)))
    plurals = {f"{word}s" for word in held_out_words}
    assert not trained & (held_out_words | plurals)
    assert len(held_out_words) > 30


def test_every_held_out_order_has_an_unseen_name_and_only_unseen_items() -> None:
    for row in make_rows(200, 3, held_out=True):
        answer = answer_of(row)
        assert answer["name"] in HELD_OUT.names
        assert set(answer["items"]) <= set(HELD_OUT.items)
    assert not set(HELD_OUT.names) & set(TRAINING.names)


def test_the_same_seed_gives_the_same_rows_and_another_seed_others() -> None:
    assert make_rows(50, 7, held_out=False) == make_rows(50, 7, held_out=False)
    assert make_rows(50, 7, held_out=False) != make_rows(50, 8, held_out=False)
    assert make_rows(50, 7, held_out=False) == make_rows(80, 7, held_out=False)[:50]


def test_there_are_thousands_of_different_orders() -> None:
    rows = make_rows(5000, 0, held_out=False)
    assert len({row["messages"][1]["content"] for row in rows}) == 5000
    answers = [answer_of(row) for row in rows]
    assert len({answer["time"] for answer in answers}) >= 40
    assert len({item for answer in answers for item in answer["items"]}) == len(TRAINING.items)
    assert {len(answer["items"]) for answer in answers} == {1, 2}
    assert 0.4 < sum(answer["pickup"] for answer in answers) / len(answers) < 0.6


@given(st.integers(0, 10**6), st.booleans())
def test_every_answer_can_be_read_off_its_order(seed: int, held_out: bool) -> None:
    [row] = make_rows(1, seed, held_out=held_out)
    order, answer = row["messages"][1]["content"], answer_of(row)
    assert answer["name"] in order
    assert all(item in order for item in answer["items"])
    assert answer["pickup"] == ("pick" in order.lower())
    assert re.fullmatch(r"(0[7-9]|1[0-8]):(00|15|30|45)", answer["time"])
    assert list(answer) == ["name", "items", "time", "pickup"]
    assert "\n" not in row["messages"][-1]["content"]


@pytest.mark.parametrize(
    ("said", "written"),
    [("nine o'clock", "09:00"), ("half past nine", "09:30"), ("9:15 am", "09:15"), ("14.45", "14:45")],
)
def test_times_are_said_in_several_ways(said: str, written: str) -> None:
    rows = make_rows(5000, 0, held_out=False)
    found = [row for row in rows if re.search(rf" {re.escape(said)}[ ,.?]", row["messages"][1]["content"])]
    assert found
    assert all(answer_of(row)["time"] == written for row in found)


def test_the_files_hold_the_rows(tmp_path: Path) -> None:
    training, held_out = write_task(tmp_path / "demo")
    rows = [json.loads(line) for line in training.read_text(encoding="utf-8").splitlines()]
    assert rows == make_rows(demo_task.TRAINING_ROWS, 0, held_out=False)
    assert len(held_out.read_text(encoding="utf-8").splitlines()) == demo_task.HELD_OUT_ROWS >= 60
    assert sorted(path.name for path in (tmp_path / "demo").iterdir()) == ["held_out.jsonl", "train.jsonl"]


# The score

ROW: demo_task.Row = {
    "messages": [
        {"role": "system", "content": demo_task.SYSTEM},
        {"role": "user", "content": "..."},
        {
            "role": "assistant",
            "content": '{"name":"Mona","items":{"mint shake":2},"time":"09:30","pickup":true}',
        },
    ]
}
RIGHT = ROW["messages"][2]["content"]


@pytest.mark.parametrize(
    "answer",
    [
        RIGHT,
        json.dumps(json.loads(RIGHT)),
        '{"pickup":true,"time":"09:30","items":{"mint shake":2},"name":"Mona"}',
    ],
)
def test_the_right_json_counts_however_it_is_spaced_and_ordered(answer: str) -> None:
    assert is_exact(answer, ROW)


@pytest.mark.parametrize(
    "answer",
    [
        "",
        "true",
        "{}",
        f"Sure! {RIGHT}",
        f"{RIGHT}\n",
        f" {RIGHT}",
        f"```json\n{RIGHT}\n```",
        f"{RIGHT}{RIGHT}",
        RIGHT[:-1],
        RIGHT.replace("true", "1"),
        RIGHT.replace(":2}", ":2.0}"),
        RIGHT.replace(":2}", ':"2"}'),
        RIGHT.replace("mint shake", "mint shakes"),
        RIGHT.replace("Mona", "mona"),
        RIGHT.replace("09:30", "9:30"),
        RIGHT.replace('"pickup":true', '"pickup":true,"note":""'),
        RIGHT.replace('"pickup":true', '"pickup":false,"pickup":true'),
        RIGHT.replace(',"pickup":true', ""),
        RIGHT.replace('"', "'"),
        RIGHT.replace("true", "NaN"),
    ],
)
def test_anything_else_does_not_count(answer: str) -> None:
    assert not is_exact(answer, ROW)


def test_the_score_is_the_share_of_exact_answers() -> None:
    assert score([RIGHT, "no", RIGHT, RIGHT], [ROW] * 4) == 0.75
    with pytest.raises(ValueError, match="zip"):
        score([RIGHT], [ROW] * 2)


def test_the_base_model_is_told_the_schema_and_shown_examples_from_training_only() -> None:
    row = make_rows(1, 0, held_out=True)[0]
    assert schema_prompt(row)[-1] == few_shot_prompt(row)[-1] == row["messages"][1]
    shown = few_shot_prompt(row)
    assert [turn["role"] for turn in shown] == ["system", *["user", "assistant"] * 3, "user"]
    assert row["messages"][2]["content"] not in json.dumps(shown)
    assert not words_of(json.dumps(shown[1:-1])) & words_of(" ".join(HELD_OUT.items))
    example = json.loads(re.search(r"\{.*\}", schema_prompt(row)[0]["content"])[0])  # type: ignore[index]
    assert list(example) == list(answer_of(row))


# The tiny models


@pytest.mark.parametrize("family", FAMILIES)
def test_a_tiny_model_is_a_whole_folder_that_answers(family: str, tiny_model: TinyModel) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = tiny_model(family)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    assert len(tokenizer) < model.config.vocab_size == 448
    turns = [{"role": "user", "content": "Zwei Käse, bitte: ½"}]
    prompt = tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_tensors="pt")[
        "input_ids"
    ]
    assert "Zwei Käse, bitte: ½" in tokenizer.decode(prompt[0])
    answer = model.generate(input_ids=prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=4)
    assert answer.shape[1] > prompt.shape[1]
    whole = tokenizer.apply_chat_template([*turns, {"role": "assistant", "content": "Ja."}], tokenize=False)
    ends = tokenizer.convert_ids_to_tokens(list(model.generation_config.eos_token_id))
    assert whole.rstrip("\n").endswith(tuple(ends))


def test_the_same_seed_makes_the_same_tiny_model(tmp_path: Path) -> None:
    import torch
    from tiny_model import make_tiny_model

    before = torch.random.get_rng_state()
    first = make_tiny_model(tmp_path / "a", "llama") / "model.safetensors"
    second = make_tiny_model(tmp_path / "b", "llama") / "model.safetensors"
    other = make_tiny_model(tmp_path / "c", "llama", seed=1) / "model.safetensors"
    assert first.read_bytes() == second.read_bytes() != other.read_bytes()
    assert torch.equal(before, torch.random.get_rng_state()), "a test's own draws must not move"


@pytest.mark.parametrize("family", ["mistral", "gemma2"])
def test_families_that_refuse_a_system_turn_do(family: str, tiny_model: TinyModel) -> None:
    from jinja2 import TemplateError
    from transformers import AutoTokenizer

    turns = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
    with pytest.raises(TemplateError):
        AutoTokenizer.from_pretrained(tiny_model(family)).apply_chat_template(turns)


# The environment


def test_the_table_of_methods_fits_in_eighty_columns() -> None:
    told = io.StringIO()
    found = demo_methods.Learned(
        title=max((facts.title for facts in METHODS.values()), key=len),
        trainable=14_942_208,
        share=0.1111,
        file_bytes=int(28.5 * (1 << 20)),
        tokens_per_second=12345.6,
        peak_bytes=int(1023.5 * (1 << 20)),
        loss=0.12345,
        exact=1.0,
    )
    demo_methods.show([found], Console(file=told, width=80))
    *_, last = told.getvalue().splitlines()
    assert last.removeprefix(found.title).split() == [
        "14,942,208", "11.11%", "28.5", "MiB", "12346", "1023.5", "MiB", "0.1235", "100.0%"
    ]  # fmt: skip


def test_a_python_that_is_too_old_is_told_which_one_to_use() -> None:
    with pytest.raises(environment.CannotSetUp) as caught:
        environment.check_python((3, 8))
    assert "This is Python 3.8; qadapt needs 3.1" in caught.value.args[0]
    assert "python3.1" in caught.value.args[1]
    environment.check_python(sys.version_info[:2])


def test_the_stamp_changes_with_what_is_installed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    constraints = tmp_path / "constraints"
    constraints.mkdir()
    (constraints / "cpu.txt").write_text("torch==2.13.0\n", encoding="utf-8")
    (tmp_path / "pyproject.toml").write_text('requires-python = ">=3.10"\n', encoding="utf-8")
    monkeypatch.setattr(environment, "ROOT", tmp_path)
    monkeypatch.setattr(environment, "CONSTRAINTS", constraints)
    first = environment.stamp("cpu")
    assert environment.stamp("cpu") == first != environment.stamp("cuda")
    (constraints / "cpu.txt").write_bytes(b"torch==2.13.0\r\n")
    assert environment.stamp("cpu") == first, "line ends of a checkout on Windows change nothing"
    (constraints / "cpu.txt").write_text("torch==2.13.1\n", encoding="utf-8")
    assert environment.stamp("cpu") != first


@pytest.mark.parametrize(
    ("said", "problem"),
    [
        (
            "WARNING: Retrying: NewConnectionError\nERROR: No matching distribution found for rich",
            "out of reach",
        ),
        ("ERROR: Could not install: [Errno 28] No space left on device", "no room on the disk"),
        (
            "(from versions: none)\nERROR: No matching distribution found for hatchling",
            "out of reach, or has no",
        ),
        ("ERROR: No matching distribution found for torch==2.13.0", "index has no torch==2.13.0"),
        (
            "Collecting x\nERROR: metadata is broken\n",
            "could not install the libraries: ERROR: metadata is broken",
        ),
    ],
)
def test_a_failed_installation_is_one_sentence_with_its_cure(
    said: str, problem: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(environment, "_run_with_status", lambda command: said)
    with pytest.raises(environment.CannotSetUp) as caught:
        environment._install("cpu")
    assert problem in caught.value.args[0]
    assert caught.value.args[1]
    assert "a machine without a CUDA device" in capsys.readouterr().out


def test_nvidia_smi_decides_between_cpu_and_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    answers: dict[bytes, str] = {
        b"GPU 0: NVIDIA RTX 4060 (UUID: x)\n": "cuda",
        b"No devices were found\n": "cpu",
    }
    monkeypatch.setattr(environment.sys, "platform", "linux")
    for said, kind in answers.items():
        done = subprocess.CompletedProcess([], 0, stdout=said)
        monkeypatch.setattr(environment.subprocess, "run", lambda *_, done=done, **__: done)
        assert environment.platform_kind() == kind

    def is_missing(*_: Any, **__: Any) -> None:
        raise FileNotFoundError

    monkeypatch.setattr(environment.subprocess, "run", is_missing)
    assert environment.platform_kind() == "cpu"
    monkeypatch.setattr(environment.sys, "platform", "win32")
    assert environment.platform_kind() == "cpu"


def test_every_dependency_is_pinned_once_for_each_python() -> None:
    text = (ROOT / "tools" / "constraints" / "common.txt").read_text(encoding="utf-8")
    text += (ROOT / "tools" / "constraints" / "cpu.txt").read_text(encoding="utf-8")
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    wanted = re.findall(r'^    "([A-Za-z0-9._-]+)[><=]', project, flags=re.MULTILINE)
    wanted += re.findall(r'"([a-z0-9-]+)[>"]', re.search(r"^dev = \[(.*)\]$", project, re.MULTILINE)[1])  # type: ignore[index]
    pins = re.findall(r"^([A-Za-z0-9._-]+)==\S+( ; .*)?$", text, flags=re.MULTILINE)
    names = [re.sub(r"[-_.]+", "-", name).lower() for name, _ in pins]
    assert len(wanted) > 15
    assert set(wanted) - {"ruamel.yaml"} <= set(names)
    for name, (_, marker) in zip(names, pins, strict=True):
        assert names.count(name) == (2 if "python_version" in marker and names.count(name) > 1 else 1), name


@pytest.mark.parametrize("python", ["3.10", "3.11", "3.12", "3.13"])
def test_every_pin_is_one_that_the_project_accepts(python: str) -> None:
    text = (ROOT / "tools" / "constraints" / "common.txt").read_text(encoding="utf-8")
    lines = [Requirement(line) for line in text.splitlines() if line and not line.startswith("#")]
    where = {"python_version": python}
    pins = {pin.name: pin for pin in lines if pin.marker is None or pin.marker.evaluate(where)}
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    wanted = [
        Requirement(text)
        for text in re.findall(r'^    "([A-Za-z0-9._-]+[><=][^"]+)",$', project, flags=re.MULTILINE)
    ]
    checked = [each for each in wanted if each.name in pins]
    assert len(checked) > 14
    for each in checked:
        (pin,) = pins[each.name].specifier
        assert pin.version in each.specifier, f"{each} on Python {python} is pinned to {pin.version}"


def test_the_machine_files_pin_torch_before_anything_else() -> None:
    for kind in ("cpu", "cuda"):
        lines = (ROOT / "tools" / "constraints" / f"{kind}.txt").read_text(encoding="utf-8").splitlines()
        assert [line for line in lines if not line.startswith("#")] == ["torch==2.13.0", "-c common.txt"]


def test_ci_runs_exactly_the_check() -> None:
    lines = (ROOT / ".ci" / "run").read_text(encoding="utf-8").splitlines()
    assert [line for line in lines if not line.startswith("#")] == ["exec python3 tools/check"]


@pytest.mark.parametrize("tool", ["demo", "check"])
def test_a_tool_says_how_it_is_used_before_it_sets_anything_up(tool: str) -> None:
    program = [sys.executable, str(ROOT / "tools" / tool), "--help"]
    said = subprocess.run(program, capture_output=True, text=True, check=True)
    assert "usage:" in said.stdout
    assert f"python tools/{tool}" in said.stdout
