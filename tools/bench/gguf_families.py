"""GGUF files of every architecture in llama.cpp: the probabilities of the next token, against transformers.

    python tools/bench/gguf_families.py

For each family of `tools/tiny_model.py` a random model (fp16, 4 layers) is written as a GGUF file in F16 and
asked by llama.cpp (`foreign.py`) and by plain transformers in fp32 for the next token after prompts of random
tokens, longer than Gemma's window among them. Shown are the mean Kullback-Leibler divergence (nats) and how
many texts become the same tokens; as a measure of the measure, the divergence after two tokens of a prompt
changed places. Exits with 1 above 1e-5 nats (with the rotary halves of a llama left in their places it is
0.02), or if any text becomes other tokens, or if what the file says of first and end tokens is not the prompt
contract.
"""

from __future__ import annotations

import argparse
import operator
import random
import statistics
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from foreign import Heard, Task, ask, drawn_texts, runtime
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

sys.path.insert(0, str(Path(__file__).parents[1]))

from tiny_model import FAMILIES, make_tiny_model

from qadapt.data.prompt import PromptContract, load_contract
from qadapt.export.gguf import About, write_gguf
from qadapt.export.ollama import adds_bos
from qadapt.model.shards import TensorEntry
from qadapt.model.tensor_values import bytes_of
from qadapt.quiet import quiet_libraries

MOST_NATS = 1e-5
TYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


class Tensors:
    """The tensors of a folder, as an export reads those of a merged model."""

    def __init__(self, folder: Path) -> None:
        self._tensors = load_file(folder / "model.safetensors")
        self.entries = [TensorEntry(name, "F32", tuple(each.shape)) for name, each in self._tensors.items()]

    def values(self, entry: TensorEntry) -> Iterator[memoryview]:
        yield bytes_of(self._tensors[entry.name].to(TYPES[entry.dtype]))


def log_probabilities(folder: Path, prompts: Sequence[Sequence[int]]) -> list[Tensor]:
    """Of the next token after each prompt, by plain transformers in fp32."""
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    with torch.inference_mode():
        return [
            model(input_ids=torch.tensor([list(ids)])).logits[0, -1].double().log_softmax(-1)
            for ids in prompts
        ]


def nats(ours: Tensor, theirs: Tensor) -> float:
    """KL(ours ‖ theirs) of two rows of log-probabilities."""
    return float((ours.exp() * (ours - theirs)).sum())


def told(probabilities: dict[int, float], size: int) -> Tensor:
    row = torch.full((size,), 1e-30, dtype=torch.float64)
    for token, probability in probabilities.items():
        row[token] = max(probability, 1e-30)
    return row.log()


def swapped(ids: Sequence[int]) -> list[int]:
    """The prompt with two of its tokens in each other's place."""
    middle = len(ids) // 2
    return [*ids[: middle - 1], ids[middle], ids[middle - 1], *ids[middle + 1 :]]


def drawn_prompts(tokens: int, *, count: int = 16) -> list[list[int]]:
    draw = random.Random(0)
    return [draw.choices(range(tokens), k=draw.randint(4, 120)) for _ in range(count)]


def one_family(family: str, root: Path, *, foreign: Path) -> bool:
    folder = make_tiny_model(root / family, family, layers=4, dtype=torch.float16)
    gguf = root / f"{family}.gguf"
    contract = load_contract(folder)
    about = About(family, adds_bos=adds_bos(contract))
    for _ in write_gguf(Tensors(folder), gguf, described=folder, kind="F16", about=about):
        pass
    prompts = drawn_prompts(len(contract.tokenizer))
    texts = drawn_texts(200, seed=0, tokenizer=contract.tokenizer)
    heard = ask(
        foreign, gguf, Task(sorted(contract.end_ids), scored=prompts, texts=texts, context_tokens=512)
    )
    ours = log_probabilities(folder, prompts)
    theirs = [told(each, len(row)) for each, row in zip(heard.probabilities, ours, strict=True)]
    apart = statistics.fmean(map(nats, ours, theirs))
    moved = statistics.fmean(map(nats, ours, log_probabilities(folder, list(map(swapped, prompts)))))
    return is_equal(family, heard, contract, texts=texts, divergences=(apart, moved))


def is_equal(
    family: str, heard: Heard, contract: PromptContract, *, texts: list[str], divergences: tuple[float, float]
) -> bool:
    """Prints one family's line."""
    apart, moved = divergences
    cut = [contract.tokenizer.encode(text, add_special_tokens=False) for text in texts]
    tokens = sum(map(operator.eq, heard.tokens, cut))
    is_first_told = heard.adds_bos == adds_bos(contract)
    print(
        f"{family:8} {apart:9.2e} nats ({moved:.2e} with two tokens swapped), {tokens} of {len(cut)} texts "
        f"the same tokens, first token {'as' if is_first_told else 'NOT as'} the contract, "
        f"{sum(heard.ends_known)} of {len(heard.ends_known)} end tokens known",
        flush=True,
    )
    return apart <= MOST_NATS and tokens == len(cut) and is_first_told and all(heard.ends_known)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--families", nargs="+", default=list(FAMILIES), choices=list(FAMILIES))
    options = parser.parse_args()
    quiet_libraries()
    foreign = runtime()
    with tempfile.TemporaryDirectory() as root:
        results = [one_family(family, Path(root), foreign=foreign) for family in options.families]
    return 0 if all(results) else 1


if __name__ == "__main__":
    sys.exit(main())
