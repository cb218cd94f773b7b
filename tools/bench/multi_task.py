"""Three tasks, three adapters of different methods, one base in memory, requests interleaved.

    python tools/bench/multi_task.py                   trains what is not trained yet, in runs/
    python tools/bench/multi_task.py --steps 24 --requests 24

The orders are the demo's; the same order is turned into JSON by one adapter (LoRA), answered with who orders
by the second (IA3), and with when by the third (a Pfeiffer bottleneck). Requests come in turn and are
answered together, each row of a batch by its own adapter. Every answer must be the one that the adapter gives
when it is loaded alone, on a base of its own, one request at a time; memory may grow by the adapters' bytes
only. Exits with 1 otherwise. Scores are of few steps: they show that each adapter does its own task.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import demo_task
from swap_adapters import live_bytes

import qadapt
from qadapt.adapters.facts import own_files
from qadapt.data.prompt import PromptContract
from qadapt.events import StepDone
from qadapt.methods import METHODS, Method
from qadapt.model.generate import generate
from qadapt.quiet import quiet_libraries
from qadapt.recipe_file import read_recipe
from qadapt.trained.together import Company, Together

TASKS: dict[str, Method] = {"order": "lora", "name": "ia3", "time": "pfeiffer"}
RATES = {"lora": "1e-3", "ia3": "1e-2", "pfeiffer": "1e-3"}
BATCH = 12
LONGEST = 48  # the longest right answer has about 40 tokens


@dataclass(frozen=True)
class Request:
    """What is asked of a task, and what is right."""

    task: str
    order: str
    answer: str


def main() -> int:
    """Trains, answers together and alone, compares."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=48, help="of each adapter")
    parser.add_argument("--requests", type=int, default=48)
    parser.add_argument("--folder", type=Path, default=Path("runs"), help="where the runs are, or will be")
    given = parser.parse_args()
    quiet_libraries()
    runs = {task: trained(task, given.folder, steps=given.steps) for task in TASKS}
    rows = demo_task.make_rows(given.requests, 0, held_out=True)
    requests = [of_task(row, list(TASKS)[place % len(TASKS)]) for place, row in enumerate(rows)]
    first, *others = runs.values()
    together = qadapt.load_together([first], folder=given.folder, device="cpu")
    before = live_bytes()
    Company(together, given.folder).bring(others)
    grown_bytes = live_bytes() - before
    begun = time.monotonic()
    answers = answer_together(together, requests, runs)
    print(f"{len(requests)} requests together in {time.monotonic() - begun:.1f} s")
    del together
    alone = [answer for task in TASKS for answer in answer_alone(task, requests, runs[task], given.folder)]
    file_bytes = sum(stored_bytes(given.folder / name / "adapter") for name in others)
    print(f"the second and third adapter took {grown_bytes:,} bytes; their files have {file_bytes:,}")
    return verdict(requests, answers, alone, is_small=grown_bytes <= file_bytes)


def of_task(row: dict[str, Any], task: str) -> Request:
    """An order of the demo, and what a task answers to it."""
    answer = row["messages"][-1]["content"]
    return Request(
        task, row["messages"][1]["content"], answer if task == "order" else json.loads(answer)[task]
    )


def trained(task: str, runs: Path, *, steps: int) -> str:
    """The name of a task's run, trained now or before."""
    method, name = TASKS[task], f"multi-task-{task}-{steps}"
    if (runs / name / "adapter").is_dir():
        return name
    runs.mkdir(parents=True, exist_ok=True)
    data = runs.absolute() / f"multi-task-{task}.jsonl"
    rows = demo_task.make_rows(demo_task.TRAINING_ROWS, 0, held_out=False)
    data.write_text("".join(json.dumps(taught(of_task(row, task))) + "\n" for row in rows), encoding="utf-8")
    overrides = [
        f"adapter.method={method}",
        f"data.sources=[{{path: {data}}}]",
        "data.held_out=null",
        f"train.learning_rate={RATES[method]}",
        f"train.steps={steps}",
        "train.evaluate_every=null",
        "memory.compute_dtype=fp32",  # in bf16 rounding alone decides between close tokens
        "train.rehearse=false",
        f"run.folder={runs}",
        f"run.name={name}",
    ]
    for event in qadapt.train(read_recipe("quickstart-smollm2-135m", overrides)):
        if isinstance(event, StepDone) and event.step % 8 == 0:
            print(f"{task} ({METHODS[method].title}): step {event.step}, loss {event.loss:.3f}", flush=True)
    return name


def taught(request: Request) -> dict[str, Any]:
    """A row to train on."""
    return {"messages": [*turns(request), {"role": "assistant", "content": request.answer}]}


def turns(request: Request) -> list[dict[str, str]]:
    return [{"role": "user", "content": request.order}]


def answer_together(together: Together, requests: list[Request], runs: dict[str, str]) -> list[str]:
    """All requests, in batches of whatever tasks."""
    names = [runs[each.task] for each in requests]
    pairs = zip(names, requests, strict=True)
    prompts = [together.contracts[name].prompt_ids(turns(each)) for name, each in pairs]
    contract = together.contracts[names[0]]
    return asked(together.model.asked(names), prompts, contract, batch=BATCH)


def answer_alone(task: str, requests: list[Request], run: str, folder: Path) -> list[str]:
    """A task's requests one by one, of its adapter on a base of its own."""
    tuned = qadapt.load(run, folder=str(folder), device="cpu")
    prompts = [tuned.contract.prompt_ids(turns(each)) for each in requests if each.task == task]
    return [asked(tuned.model, [prompt], tuned.contract, batch=1)[0] for prompt in prompts]


def asked(model: Any, prompts: list[list[int]], contract: PromptContract, *, batch: int) -> list[str]:
    answers = generate(
        model,
        prompts,
        max_new_tokens=LONGEST,
        end_ids=contract.end_ids,
        pad_id=contract.pad_id,
        batch=batch,
    )
    return [contract.text(answer) for answer in answers]


def stored_bytes(adapter: Path) -> int:
    return (adapter / own_files(adapter)[0]).stat().st_size


def verdict(requests: list[Request], answers: list[str], alone: list[str], *, is_small: bool) -> int:
    """Says what came of it, and whether all is as it must be; `alone` is task after task."""
    others, is_same = iter(alone), True
    for task, method in TASKS.items():
        mine = [pair for pair in zip(requests, answers, strict=True) if pair[0].task == task]
        same = sum(answer == next(others) for _, answer in mine)
        right = sum(answer == request.answer for request, answer in mine)
        request, answer = mine[0]
        print(
            f"{task} ({METHODS[method].title}): {same} of {len(mine)} answers as alone, {right} right\n"
            f"    {request.order!r} -> {answer!r}"
        )
        is_same = is_same and same == len(mine)
    print("each answer is its adapter's own" if is_same and is_small else "NOT as it must be")
    return 0 if is_same and is_small else 1


if __name__ == "__main__":
    sys.exit(main())
