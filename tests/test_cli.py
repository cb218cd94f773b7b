"""The commands as a user meets them: what they print, where, and their exit codes."""

from __future__ import annotations

import errno
import io
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from qadapt import control
from qadapt.cli.main import run
from qadapt.cli.train import _polite_interrupt
from qadapt.events import StepDone
from qadapt.view.journal import read_events

if TYPE_CHECKING:
    from conftest import TinyModel


def write_recipe(folder: Path, model: Path, *, steps: int = 4, rows: int = 12) -> Path:
    messages = [
        {
            "messages": [
                {"role": "user", "content": f"say {number}"},
                {"role": "assistant", "content": str(number)},
            ]
        }
        for number in range(rows)
    ]
    data = folder / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in messages), encoding="utf-8")
    recipe = folder / "recipe.yaml"
    recipe.write_text(
        f"""
model: {model}
adapter: {{rank: 4}}
data:
  sources: [{{path: {data}}}]
  held_out_fraction: 0.25
  length: 128
train: {{steps: {steps}, rows_per_step: 4, learning_rate: 1e-2, evaluate_every: 2}}
memory: {{compute_dtype: fp32}}
run: {{name: first, folder: {folder / "runs"}}}
""",
        encoding="utf-8",
    )
    return recipe


def test_train_evaluate_export_and_watch_follow_each_other(
    tmp_path: Path, tiny_model: TinyModel, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe, runs = write_recipe(tmp_path, tiny_model("llama")), str(tmp_path / "runs")
    assert run(["train", str(recipe)]) == 0
    trained = capsys.readouterr()
    assert "step 4" in trained.out.lower().replace("/4", "")
    assert trained.err == ""
    assert run(["evaluate", "first", "--folder", runs, "--answers", "2", "--longest", "4", "--json"]) == 0
    evaluated = json.loads(capsys.readouterr().out)
    assert evaluated["rows"] == 3
    assert evaluated["loss"] < evaluated["base_loss"]
    assert len(evaluated["answers"]) == 2
    assert run(["evaluate", "first", "--folder", runs, "--answers", "1", "--longest", "4"]) == 0
    printed = capsys.readouterr().out
    assert "with the adapter" in printed
    assert "passed over" not in printed
    one, turns = tmp_path / "one.jsonl", [{"role": role, "content": "1"} for role in ("user", "assistant")]
    lines = [json.dumps({"messages": each}) + "\n" for each in (turns, turns[::-1])]
    one.write_text("".join(lines), encoding="utf-8")
    asked = ["evaluate", "first", "--folder", runs, "--data", str(one), "--answers", "2", "--longest", "4"]
    assert run(asked) == 0
    assert "1 of 2 answers: rows that ask nothing" in capsys.readouterr().out
    own = tmp_path / "own.jsonl"
    rows = [{"prompt": "Say 9!", "completion": "9"}, {"prompt": "word " * 400, "completion": "9"}]
    own.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    assert run(["evaluate", "first", "--folder", runs, "--data", str(own), "--json"]) == 0
    evaluated = json.loads(capsys.readouterr().out)
    assert evaluated["rows"] == 1
    assert ["nothing to learn" in warning["problem"] for warning in evaluated["warnings"]] == [True]
    assert run(["evaluate", "first", "--folder", runs, "--data", str(own)]) == 0
    assert "nothing to learn" in " ".join(capsys.readouterr().out.split())
    assert run(["watch", "first", "--folder", runs, "--json"]) == 0
    json.loads(capsys.readouterr().out)
    assert run(["export", "first", "--folder", runs, "--json"]) == 0
    exported = json.loads(capsys.readouterr().out)
    assert (Path(exported["folder"]) / "model.safetensors").is_file()


def test_quiet_says_the_end_only(
    tmp_path: Path, tiny_model: TinyModel, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = write_recipe(tmp_path, tiny_model("llama"))
    assert run(["train", str(recipe), "--quiet"]) == 0
    said = capsys.readouterr().out
    assert "reading the rows" not in said
    assert f"qadapt export {tmp_path / 'runs' / 'first'}" in said, "the command works from any folder"


CASES = [
    (["train", "{recipe}", "train.stps=3"], "did you mean `steps`?"),
    (["train", "{recipe}", "train.steps=0", "adapter.rank=-1", "data.lenght=5"], "has 3 problems"),
    (["train", "nothing.yaml"], "There is no recipe file"),
    (["train", "{recipe}", "nonsense"], "'nonsense' is not an override"),
    (["train", "{recipe}", "data.sources=[{{path: none.jsonl}}]"], "There is no data file"),
    (["train", "{recipe}", "model.source={folder}"], "no config.json"),
    (["train", "{recipe}", "model.source=no such model"], "no such model"),
    (["train", "{recipe}", "data.length=900000"], "context"),
    (["train", "{recipe}", "memory.budget=lots"], "not an amount of memory"),
    (["estimate", "Llama-3.1-8C"], "Did you mean"),
    (["estimate", "Llama-3.1-8B", "--card", "RTX 4061"], "RTX 4061"),
    (["estimate", "Llama-3.1-8B", "--length", "0"], "length"),
    (["estimate", "Llama-3.1-8B", "--rows", "-3"], "rows"),
    (["estimate", "Llama-3.1-8B", "--rank", "999999"], "rank"),
    (["estimate"], "needs a model or a recipe"),
    (["plan", "llama-3.1-8b-qlora-8gb", "--vram", "1GiB"], "1.00 GiB"),
    (["resume", "none"], "There is no run 'none'"),
    (["export", "none"], "There is no run 'none'"),
    (["evaluate", "none"], "There is no run 'none'"),
    (["watch", "none"], "none"),
    (["recipes", "none"], "There is no recipe file"),
    (["frobnicate"], "No such command"),
    (["train"], "Missing"),
]


@pytest.mark.parametrize(("arguments", "problem"), CASES, ids=[" ".join(case[0][:3]) for case in CASES])
def test_bad_input_is_one_message_and_exit_code_2(
    tmp_path: Path,
    tiny_model: TinyModel,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    arguments: list[str],
    problem: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    recipe = write_recipe(tmp_path, tiny_model("llama"))
    before = sorted(tmp_path.rglob("*"))
    code = run([text.format(recipe=recipe, folder=tmp_path) for text in arguments])
    said = capsys.readouterr()
    assert code == 2
    assert problem in said.err
    assert "Traceback" not in said.err
    assert said.out == "" or arguments[0] == "train", "results and errors do not mix"
    assert "starting" not in said.out, "nothing has begun that was refused"
    left = [path for path in sorted(tmp_path.rglob("*")) if path != tmp_path / "runs"]
    assert left == before, "nothing is left but the empty folder of runs"


def test_names_that_look_like_emoji_are_said_as_they_are(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["estimate", "smollm2-135m", "adapter.targets=[on:x]"]) == 2
    assert "adapter.targets = on:x: LoRA stands on no other adapter" in capsys.readouterr().err


def test_a_bug_is_not_dressed_up_as_bad_input(monkeypatch: pytest.MonkeyPatch) -> None:
    from qadapt.cli import recipes

    def broken() -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(recipes, "console", broken)
    with pytest.raises(ZeroDivisionError):
        run(["recipes"])


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "qadapt", *arguments]


def test_help_and_version_start_in_a_blink_and_without_torch() -> None:
    program = (
        "import sys, time; start = time.process_time()\n"
        "from qadapt.cli.main import run\n"
        "code = run(sys.argv[1:])\n"
        "assert not {'torch', 'transformers', 'pydantic'} & set(sys.modules), 'heavy imports'\n"
        "print('seconds', time.process_time() - start, file=sys.stderr)\n"
    )
    for arguments in (["--help"], ["--version"]):
        taken = []
        for _ in range(3):
            done = subprocess.run(
                [sys.executable, "-c", program, *arguments], capture_output=True, text=True, check=True
            )
            taken.append(float(done.stderr.split()[-1]))
        assert min(taken) < 0.3, arguments


@pytest.mark.skipif(os.name == "nt", reason="Windows has no SIGINT to send to another process")
def test_ctrl_c_leaves_a_run_that_resumes(tmp_path: Path, tiny_model: TinyModel) -> None:
    recipe = write_recipe(tmp_path, tiny_model("llama"), steps=100)
    with subprocess.Popen(
        command("train", str(recipe)), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        journal = tmp_path / "runs/first/events.jsonl"
        deadline = time.monotonic() + 90
        while time.monotonic() < deadline:
            if journal.is_file() and '"StepDone"' in journal.read_text(encoding="utf-8"):
                break
            time.sleep(0.1)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert "Traceback" not in err
    assert "finishing the micro-batch" in err
    assert "qadapt resume" in out
    last = read_events(tmp_path / "runs/first")[-1]
    assert type(last).__name__ == "Stopped"
    done = subprocess.run(
        command("resume", str(tmp_path / "runs/first"), "--plain"), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert type(read_events(tmp_path / "runs/first")[-1]).__name__ == "RunFinished"
    assert "kernels" not in done.stderr + err, "notices of libraries do not reach the screen"


@pytest.mark.skipif(os.name == "nt", reason="Windows has no limit on the size of files")
def test_a_disk_without_room_for_a_checkpoint_is_one_message_before_the_first_step(
    tmp_path: Path, tiny_model: TinyModel
) -> None:
    recipe = write_recipe(tmp_path, tiny_model("llama"))
    limited = (
        "import resource, sys\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))\n"
        "from qadapt.cli.main import run\n"
        "sys.exit(run(sys.argv[1:]))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", limited, "train", str(recipe), "--plain"], capture_output=True, text=True
    )
    assert done.returncode == 2, done.stderr
    assert "cannot be written" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "runs/first").exists(), "the rehearsal found it: nothing is lost"


@pytest.mark.skipif(os.name == "nt", reason="Windows has no SIGHUP")
@pytest.mark.parametrize("error", [BrokenPipeError, OSError])
def test_a_run_whose_terminal_or_pipe_is_gone_is_asked_to_save_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: type[OSError]
) -> None:
    class Gone(io.StringIO):
        def write(self, text: str) -> int:
            raise error(errno.EIO, "gone")

        def fileno(self) -> int:
            return scratch.fileno()

    with (tmp_path / "scratch").open("w") as scratch:
        monkeypatch.setattr(sys, "stdout", Gone())  # rich's own way to be silent closes this file
        monkeypatch.setattr(sys, "stderr", Gone())
        step = StepDone(
            step=1, loss=1, learning_rate=1, gradient_norm=1, tokens=1, supervised_tokens=1, rows=1, seconds=1
        )
        with _polite_interrupt(tmp_path) as watched:
            list(watched([step]))
            signal.raise_signal(signal.SIGHUP)
            assert control.is_asked(tmp_path, "stop")
            signal.raise_signal(signal.SIGHUP)  # shells say it once more
            with pytest.raises(KeyboardInterrupt):
                signal.raise_signal(signal.SIGINT)


@pytest.mark.skipif(os.name == "nt", reason="Windows has no SIGHUP")
def test_under_nohup_a_closed_terminal_is_no_reason_to_leave(tmp_path: Path) -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with _polite_interrupt(tmp_path):
            signal.raise_signal(signal.SIGHUP)
        assert not control.is_asked(tmp_path, "stop")
    finally:
        signal.signal(signal.SIGHUP, before)
