"""A GGUF export in a program that nobody here wrote: llama.cpp, out of npm's node-llama-cpp, on the CPU.

    python tools/bench/gguf_foreign.py       the demo's run, in Q8_0 and F16, and its adapter on an F16 base
    python tools/bench/gguf_foreign.py --run runs/mine --forms gguf-q4_0 --prompts 20

Exports the run (`python tools/demo` trains the demo's) as merged fp16 and as each GGUF form, what is there
already aside. Held-out prompts of the demo's task go as token ids through plain transformers (fp32 on the
merged fp16 weights) and through llama.cpp, both greedy; their answers are compared token for token. The same
prompts as the Modelfile's template writes them, and texts of all kinds, are cut into tokens by the GGUF
file's own tokenizer and by ours, and what the file says of first and end tokens is compared with the prompt
contract. The adapter alone (gguf-lora) goes onto a GGUF of its base in F16, made for it. Exits with 1 if
fewer than 95 % of the answers of a form of 8 bits or more are equal, any text becomes other tokens, or first
or end tokens are not the contract's.

Needs node and npm. Forms of fewer bits are shown without a bar: their numbers are others on purpose.
"""

from __future__ import annotations

import argparse
import itertools
import operator
import subprocess
import sys
import tempfile
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from foreign import VERSION, Heard, Task, ask, drawn_texts, runtime
from transformers import AutoModelForCausalLM

sys.path.insert(0, str(Path(__file__).parents[1]))

import demo_task

from qadapt.adapters.facts import read_facts
from qadapt.data.prompt import PromptContract, load_contract
from qadapt.export.gguf import About, write_gguf
from qadapt.export.gguf_lora import FORM as GGUF_LORA
from qadapt.export.merged_model import open_merged
from qadapt.export.ollama import adds_bos, modelfile
from qadapt.export.ollama import prompt as ollama_prompt
from qadapt.export.proof import read_proof
from qadapt.quiet import quiet_libraries
from qadapt.trained.same_base import find_same_base

MAX_NEW_TOKENS = 48
EQUAL_SHARE = 0.95
EIGHT_BITS = ("gguf-q8_0", "gguf-f16", "gguf-bf16", GGUF_LORA)


@dataclass(frozen=True)
class Expected:
    """What llama.cpp should say: plain transformers' answers, and how our tokenizer cuts the texts."""

    prompts: list[list[int]]
    answers: list[list[int]]
    texts: list[str]
    tokens: list[list[int]]


def expected(merged: Path, contract: PromptContract, *, rows: list[demo_task.Row], texts: int) -> Expected:
    """What there is to compare with, from the merged model's folder; at least `texts` texts."""
    prompts = [contract.prompt_ids(demo_task.prompt(row)) for row in rows]
    answers = plain_answers(merged, prompts, end_ids=sorted(contract.end_ids), pad_id=contract.pad_id)
    template = modelfile(contract, "model.gguf").template
    assert template is not None, "Ollama can write the demo's prompts"
    asked = [ollama_prompt(template, demo_task.prompt(row)) for row in rows]
    drawn = drawn_texts(max(texts - len(asked), 0), seed=0, tokenizer=contract.tokenizer)
    first = int(adds_bos(contract))  # a runtime puts it before a prompt, not into a text
    tokens = [ids[first:] for ids in prompts]
    tokens += [contract.tokenizer.encode(text, add_special_tokens=False) for text in drawn]
    return Expected(prompts, answers, [*asked, *drawn], tokens)


def plain_answers(
    folder: Path, prompts: Sequence[Sequence[int]], *, end_ids: Sequence[int], pad_id: int
) -> list[list[int]]:
    """The greedy answers of plain transformers, all prompts at once, filled up on the left."""
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    longest = max(map(len, prompts))
    ids = torch.tensor([[pad_id] * (longest - len(prompt)) + list(prompt) for prompt in prompts])
    mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    with torch.inference_mode():
        output = model.generate(
            ids,
            attention_mask=mask,
            do_sample=False,
            max_new_tokens=MAX_NEW_TOKENS,
            eos_token_id=list(end_ids),
            pad_token_id=pad_id,
        )
    written = (
        itertools.takewhile(lambda token: token not in end_ids, row) for row in output[:, longest:].tolist()
    )
    return [list(answer) for answer in written]


def exported(run: Path, form: str) -> Path:
    """The folder of a run's export; made now if it is not there."""
    folder = run / "export" / form
    if not folder.is_dir():
        words = ["export", str(run), "--form", form]
        print(" ".join(["qadapt", *words]), flush=True)
        subprocess.run([sys.executable, "-m", "qadapt", *words], check=True)
    return folder


@contextmanager
def base_file(run: Path, merged: Path) -> Iterator[Path]:
    """The base in F16 as a GGUF file, for a while: the weights that the merged model was merged on."""
    adapter, base = run / "adapter", read_proof(merged)["made_of"]["base"]
    model = find_same_base(read_facts(adapter)).folder
    with (
        tempfile.TemporaryDirectory() as place,
        open_merged(model, [(adapter, 0.0)], base=base, dtype="F32") as bare,
    ):
        file = Path(place) / "base.gguf"
        deque(write_gguf(bare, file, described=merged, kind="F16", about=About("base")), maxlen=0)
        yield file


def heard_of(form: str, task: Task, *, folder: Path, run: Path, merged: Path) -> Heard:
    """What llama.cpp makes of a form of a run."""
    (gguf,) = exported(run, form).glob("*.gguf")
    if form != GGUF_LORA:
        return ask(folder, gguf, task)
    with base_file(run, merged) as base:
        return ask(folder, base, task, lora=gguf)


def is_enough(form: str, heard: Heard, right: Expected, *, contract: PromptContract) -> bool:
    """Prints what is equal, and says whether it is enough."""
    answers = sum(map(operator.eq, heard.answers, right.answers))
    tokens = sum(map(operator.eq, heard.tokens, right.tokens))
    is_first_told = heard.adds_bos == adds_bos(contract)
    print(
        f"{form:12} {answers:3} of {len(right.answers)} answers equal, "
        f"{tokens:3} of {len(right.tokens)} texts the same tokens, "
        f"first token {'as' if is_first_told else 'NOT as'} the contract, "
        f"{sum(heard.ends_known)} of {len(heard.ends_known)} end tokens known"
    )
    for warning in heard.warnings:
        print(f"{'':12} llama.cpp warns: {warning}")
    is_equal = form not in EIGHT_BITS or answers >= EQUAL_SHARE * len(right.answers)
    return is_equal and tokens == len(right.tokens) and is_first_told and all(heard.ends_known)


def show_differences(heard: Heard, right: Expected, *, contract: PromptContract) -> None:
    """The first answer and the first text that are not equal."""
    for theirs, ours in zip(heard.answers, right.answers, strict=True):
        if theirs != ours:
            print(f"{'':12} plain     {contract.tokenizer.decode(ours)!r}")
            print(f"{'':12} llama.cpp {contract.tokenizer.decode(theirs)!r}")
            break
    for text, theirs, ours in zip(right.texts, heard.tokens, right.tokens, strict=True):
        if theirs != ours:
            print(f"{'':12} {text!r}\n{'':12} ours      {ours}\n{'':12} llama.cpp {theirs}")
            break


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--run", type=Path, default=Path("runs/quickstart"), help="folder of a finished run")
    parser.add_argument("--forms", nargs="+", default=["gguf-q8_0", "gguf-f16", GGUF_LORA])
    parser.add_argument("--prompts", type=int, default=60)
    parser.add_argument("--texts", type=int, default=200)
    options = parser.parse_args()
    quiet_libraries()
    if not (options.run / "adapter").is_dir():
        sys.exit(f"{options.run} is no finished run; `python tools/demo` trains the demo's.")
    folder = runtime()
    merged = exported(options.run, "merged-fp16")
    contract = load_contract(merged)
    rows = demo_task.make_rows(options.prompts, 0, held_out=True)
    right = expected(merged, contract, rows=rows, texts=options.texts)
    score = demo_task.score([contract.text(answer) for answer in right.answers], rows)
    print(f"plain transformers on merged-fp16, in fp32: {score:.0%} of the orders right")
    task = Task(sorted(contract.end_ids), right.prompts, texts=right.texts, max_new_tokens=MAX_NEW_TOKENS)
    results = []
    for form in options.forms:
        heard = heard_of(form, task, folder=folder, run=options.run, merged=merged)
        results.append(is_enough(form, heard, right, contract=contract))
        show_differences(heard, right, contract=contract)
    print(f"node-llama-cpp {VERSION} with llama.cpp {heard.release}")
    return 0 if all(results) else 1


if __name__ == "__main__":
    sys.exit(main())
