"""qadapt beside TRL 1.16, LLaMA-Factory 0.9.5 and the plain PEFT loop: speed and memory, in one run.

    python tools/bench/peers.py             about an hour on two quiet cores; goes on where it was cut off
    python tools/bench/peers.py --losses    our losses against the plain loop's, about half an hour
    python tools/bench/peers.py --conversations 8 --tune-steps 2 --repeats 1 --length 128     a trial

Task: SmolLM2-135M-Instruct in NF4 with double quantization, LoRA of rank 16 on all linear layers, 64 real
conversations cut to 512 tokens, answers learned, AdamW, the same rows in the same order for every side, as
tokens. Each side runs in a process of its own, the peers in environments of their own that the tool makes.
Speed: real tokens per second, without a side's first step. Memory: the highest RssAnon of all its processes
above the level after its imports, sampled 20 times a second, loading included. A peer runs at its defaults
and at its best setting, which is looked for first, with few steps: how rows are laid, type, recompute. It is
given four of a step's eight rows at once: all eight, as both take by themselves, made both slower and larger.
Our side chooses by itself, as in any run; in the small-memory setting all recomputes, four rows at once, too.
The leanest of the settings that were tried runs as well.
All that is said is also kept: `outcomes.jsonl` in the folder of the task; `--fresh` forgets it. Exits with 1
where a bar is missed. The machine must be left alone meanwhile. Linux only.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import sys
import tempfile
from collections.abc import Generator
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))

from conversations import real_conversations
from peer_runs import Bench, Environments, run_side, task_of
from peer_table import PEERS, Outcome, Side, table, verdicts
from side import IGNORED, Task

from qadapt.cache import cache_folder

OUR_SIDES = (Side("qadapt", "defaults"), Side("qadapt", "small memory", is_recomputing=True))
PADDINGS = {"trl": ("filled", "free", "packed"), "llamafactory": ("filled", "packed"), "plain": ("filled",)}
"""How each side can lay rows."""
LOSS_TOLERANCE = {"fp32": 1e-3, "bf16": 2e-2}
"""Relative, for any of 50 steps: rounding differs, and the next step trains on what this one rounds."""
SPARE_ROWS = 4  # so many conversations are read for each that is wanted: some have nothing to learn


def finished(generator: Generator[Any, None, Any]) -> Any:
    """What a generator returns."""
    returned: list[Any] = []

    def whole() -> Generator[Any, None, None]:
        returned.append((yield from generator))

    for _ in whole():
        pass
    return returned[0]


def prepared(path: Path, task: Task) -> Any:
    """The rows of a file as the package makes tokens of them."""
    from side_qadapt import recipe_of

    from qadapt.running.material import prepare, resolved

    recipe = resolved(recipe_of(replace(task, conversations=str(path))))
    return finished(prepare(recipe, revision=None)).rows.train


def written(path: Path, entries: list[Any]) -> str:
    path.write_text("".join(json.dumps(entry) + "\n" for entry in entries), encoding="utf-8")
    return str(path)


def make_task(arguments: argparse.Namespace, cache: Path) -> tuple[Task, Path]:
    """The task and its folder: the first conversations with something to learn, as text and as tokens."""
    from qadapt.model.source import find_model
    from qadapt.quiet import quiet_libraries

    quiet_libraries()
    count, length = arguments.conversations, arguments.length
    task = Task(
        model=str(find_model("smollm2-135m").folder), rows="", conversations="", report="",
        place=tempfile.gettempdir(), steps=-(-count // arguments.rows_per_step),
        micro_batch=arguments.micro_batch, rows_per_step=arguments.rows_per_step, length=length,
    )  # fmt: skip
    threads = os.environ.get("OMP_NUM_THREADS", os.cpu_count())
    sizes = f"{count}x{length} by {task.micro_batch} of {task.rows_per_step}, {threads} threads"
    folder = cache / hashlib.sha256(sizes.encode()).hexdigest()[:12]
    folder.mkdir(parents=True, exist_ok=True)
    found = real_conversations(cache, SPARE_ROWS * count)
    with tempfile.TemporaryDirectory() as place:
        candidates = prepared(Path(written(Path(place) / "all.jsonl", found)), task)
        chosen = [found[number] for number in candidates.numbers()[:count]]
    conversations = written(folder / "conversations.jsonl", chosen)
    rows = prepared(Path(conversations), task)
    assert len(rows) == count, f"only {len(rows)} of {count} conversations have something to learn"
    tokens = [
        {
            "input_ids": row.ids.tolist(),
            "labels": [
                token if learned else IGNORED
                for token, learned in zip(row.ids.tolist(), row.supervised.tolist(), strict=True)
            ],
        }
        for row in rows
    ]
    print(
        f"{count} conversations, {rows.tokens:,} tokens, {rows.supervised_tokens:,} of them learned; "
        f"micro-batch {task.micro_batch}, {task.rows_per_step} rows a step; {folder}",
        flush=True,
    )
    return replace(task, conversations=conversations, rows=written(folder / "rows.jsonl", tokens)), folder


def tried_sides(bench: Bench, name: str, *, steps: int) -> dict[Side, Outcome]:
    """Settings of a peer: of ways to lay rows each, the fastest with another type, and that recomputing."""
    tried: dict[Side, Outcome] = {}

    def try_out(*sides: Side) -> Side:
        for side in sides:
            outcome = bench.outcome(side, repeat=0, steps=steps)
            if outcome is not None:
                tried[side] = outcome
        return max(tried, key=lambda side: tried[side].tokens_per_second)

    best = try_out(*(Side(name, "tried", "fp32", False, padding) for padding in PADDINGS[name]))
    best = try_out(replace(best, dtype="bf16"))
    try_out(replace(best, is_recomputing=True))
    return tried


def compare(bench: Bench, *, tune_steps: int, repeats: int) -> bool:
    """Tunes the peers, runs everybody in turn, prints the table and the bars."""
    names = (*PEERS, "plain")
    tried = {name: tried_sides(bench, name, steps=tune_steps) for name in names}
    best = [max(each, key=lambda side: each[side].tokens_per_second) for each in tried.values()]
    of_peers = {side: outcome for name in PEERS for side, outcome in tried[name].items()}
    leanest = min(of_peers, key=lambda side: of_peers[side].peak_bytes)
    sides = [*(Side(name, "defaults") for name in names), *(replace(side, kind="best") for side in best)]
    sides = [OUR_SIDES[0], *sides, replace(leanest, kind="leanest"), OUR_SIDES[1]]
    outcomes: dict[Side, list[Outcome]] = {side: [] for side in sides}
    for repeat in range(1, repeats + 1):
        for side in sides:
            outcome = bench.outcome(side, repeat=repeat, steps=bench.task.steps)
            if outcome is None:
                raise SystemExit(f"{side.key} failed: see {bench.folder / 'side.log'}")
            outcomes[side].append(outcome)
    print("\n".join(["", *table(outcomes), ""]))
    said = verdicts(outcomes)
    print("\n".join(each.line for each in said))
    return all(each.is_kept for each in said)


def compare_losses(bench: Bench, *, steps: int, dtype: str) -> bool:
    """Our losses in both settings against the plain loop's, which begins with the same adapter."""
    is_kept = True
    for side in OUR_SIDES:
        with tempfile.TemporaryDirectory() as adapter:
            task = replace(bench.task, adapter=adapter)
            losses = []
            for each in (replace(side, dtype=dtype), Side("plain", side.kind, dtype, False)):
                given = replace(task_of(task, each, steps=steps), adapter=adapter)
                python = bench.environments.python(each.name)
                lines = run_side(each, given, python, log=bench.folder / "side.log")
                losses.append([line["loss"] for line in lines if line["kind"] == "step"])
        apart = [abs(ours - theirs) / theirs for ours, theirs in zip(*losses, strict=True)]
        for step, (ours, theirs) in enumerate(zip(*losses, strict=True), 1):
            print(f"{side.kind}, step {step}: {ours:.6f}, plain {theirs:.6f}, apart {apart[step - 1]:.1e}")
        is_equal = max(apart) <= LOSS_TOLERANCE[dtype]
        is_kept &= is_equal
        print(
            f"losses at {side.kind}, {dtype}: at most {max(apart):.1e} apart in {steps} steps "
            f"(bar {LOSS_TOLERANCE[dtype]:.0e}): {'kept' if is_equal else 'MISSED'}",
            flush=True,
        )
    return is_kept


def add_task_options(parser: argparse.ArgumentParser) -> None:
    """What `make_task` asks for."""
    parser.add_argument("--conversations", type=int, default=64)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--micro-batch", type=int, default=4, help="rows that a peer takes at once")
    parser.add_argument("--rows-per-step", type=int, default=8)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_task_options(parser)
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--tune-steps", type=int, default=2)
    parser.add_argument("--losses", action="store_true")
    parser.add_argument("--loss-steps", type=int, default=50)
    parser.add_argument("--dtype", choices=("fp32", "bf16"), default="fp32", help="of --losses")
    parser.add_argument("--environments", type=Path, help="where the peers' environments lie")
    parser.add_argument("--fresh", action="store_true", help="forget what was measured before")
    arguments = parser.parse_args()
    cache = cache_folder() / "peers"
    cache.mkdir(parents=True, exist_ok=True)
    task, folder = make_task(arguments, cache)
    bench = Bench(Environments(arguments.environments or cache / "environments"), task, folder)
    if arguments.fresh:
        bench.file.unlink(missing_ok=True)
    if arguments.losses:
        is_kept = compare_losses(bench, steps=arguments.loss_steps, dtype=arguments.dtype)
    else:
        is_kept = compare(bench, tune_steps=arguments.tune_steps, repeats=arguments.repeats)
    return 0 if is_kept else 1


if __name__ == "__main__":
    sys.exit(main())
