"""How fast rows are prepared, beside the bare fast tokenizer on the very same texts, in one run.

    python tools/bench/data_speed.py                    20,000 conversations, the demo model's tokenizer
    python tools/bench/data_speed.py --rows 2000 --model FOLDER

Prepared means all of it: a file of JSON lines hashed, read, checked, rendered by the contract, its learned
tokens proven, cut, counted and written to a store. Bare is one call of the tokenizer with all rendered texts,
which are made before its time begins. Both use as many threads as the tokenizer takes. They alternate; the
ratio is that of each pair, and the median of them counts. Exits with 1 below the bar, 70 %.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from made_conversations import made_conversations, write_conversations

from qadapt.data.prepared import Reading, Source, identify, prepare_part
from qadapt.data.prompt import PromptContract, load_contract
from qadapt.data.row_cache import data_folder
from qadapt.model.source import find_model
from qadapt.quiet import quiet_libraries

BAR = 0.7
LENGTH = 2048


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=int, default=20_000)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--model", help="a folder with a tokenizer; default: the demo model")
    arguments = parser.parse_args()
    quiet_libraries()
    folder = Path(arguments.model) if arguments.model else find_model("smollm2-135m").folder
    contract = load_contract(folder)
    with tempfile.TemporaryDirectory() as place:
        os.environ["XDG_CACHE_HOME"] = place
        file = Path(place) / "rows.jsonl"
        write_conversations(file, arguments.rows)
        texts: list[Any] = [
            contract.tokenizer.apply_chat_template(messages, tokenize=False)
            for messages in made_conversations(arguments.rows)
        ]
        ratios = []
        for _ in range(arguments.repeats):
            tokens, bare_seconds = bare(contract, texts)
            seconds = prepared(contract, file)
            ratios.append(bare_seconds / seconds)
            print(
                f"{arguments.rows:,} rows, {tokens:,} tokens: bare {bare_seconds:.1f} s, "
                f"prepared {seconds:.1f} s, {ratios[-1]:.0%} of the bare speed",
                flush=True,
            )
    median = statistics.median(ratios)
    print(f"prepared at {median:.0%} of the bare tokenizer's speed (median of {len(ratios)}); bar {BAR:.0%}")
    return 0 if median >= BAR else 1


def bare(contract: PromptContract, texts: list[str]) -> tuple[int, float]:
    """Tokens of all texts by the tokenizer alone, and the seconds that took."""
    start = time.perf_counter()
    encoded = contract.tokenizer(texts, add_special_tokens=False)
    seconds = time.perf_counter() - start
    return sum(map(len, encoded["input_ids"])), seconds


def prepared(contract: PromptContract, file: Path) -> float:
    """Seconds from a file of rows to a store in the cache, which has it not yet."""
    shutil.rmtree(data_folder(), ignore_errors=True)
    reading = Reading(form="auto", columns=(), skips_malformed=False, length=LENGTH)
    start = time.perf_counter()
    part = prepare_part(identify((Source(str(file)),)), reading, contract)
    seconds = time.perf_counter() - start
    assert part.prepared.is_new
    return seconds


if __name__ == "__main__":
    sys.exit(main())
